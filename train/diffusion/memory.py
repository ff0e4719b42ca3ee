"""What a step of the diffusion trainer holds in memory and computes, with and without gradient checkpointing."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from d_emo.common.messages import readable_size
from d_emo.models import ClassConditionalTransformer2DModel
from d_emo.train.diffusion.encode_plan import held_by_encoding
from d_emo.train.diffusion.teacher import Teacher
from d_emo.train.engine.memory import Launch, TrainingMemory, training_memory
from d_emo.train.engine.rehearsal import size_of
from d_emo.train.engine.roofline import Work, count_work


@dataclass(frozen=True, kw_only=True)
class DiffusionStep:
    """A step as far as its memory and work depend on it, but for the objective's own tensors, of the latents' size.

    Attributes:
        model: as it is trained, on any device; is put in its mode and loses its gradient checkpointing.
        followed: averages besides the one that is published.
        plain: the network that the average is written into, where that is not the average itself.
        optimizer: its name.
        make_optimizer: gives the optimizer of the model.
        launch: what is computed on.
        micro_batch: images.
        accumulation: micro batches of a step.
        vae: the autoencoder; None for pixels.
        images: shape of what it encodes at once, (B, channels, H, W); None if latents were encoded beforehand.
        teacher: that looks at every image.
        aligned: (h, w, T) of the features that the network is aligned with, a teacher's or stored ones.
        features_after: the number of blocks after which it answers with features.
    """

    model: ClassConditionalTransformer2DModel
    followed: int
    plain: torch.nn.Module | None
    optimizer: str
    make_optimizer: Callable[[torch.nn.Module], torch.optim.Optimizer]
    launch: Launch
    micro_batch: int
    vae: Any
    images: tuple[int, int, int, int] | None
    accumulation: int = 1
    teacher: Teacher | None = None
    aligned: tuple[int, int, int] | None = None
    features_after: int | None = None

    def memory(self, checkpointing: bool) -> TrainingMemory:
        """Its memory, with gradient checkpointing or without.

        Raises:
            RuntimeError: see `training_memory`.
        """
        with self._checkpointed(checkpointing):
            memory = training_memory(self.model, self.launch, self.make_optimizer, self._forward)
        # FSDP2 shares gradients out when they are whole: until then each process has its own of all values.
        kept = self.launch.processes if self.launch.sharded and self.accumulation > 1 else 1
        return replace(
            memory,
            gradients=memory.gradients * kept,
            average=memory.average * (1 + self.followed)
            + (0 if self.plain is None else size_of(self.plain.state_dict())),
            encoder=0 if self.vae is None else size_of(self.vae.state_dict()),
            encoding=max(
                0 if self.images is None else held_by_encoding(self.vae, self.images, self.launch.device),
                0 if self.teacher is None else self.teacher.held(self.micro_batch, self.launch.device),
            ),
            teacher=0 if self.teacher is None else size_of(self.teacher.network.state_dict()),
        )

    def of(self, micro_batch: int) -> "DiffusionStep":
        """The same with another number of images."""
        images = None if self.images is None else (micro_batch, *self.images[1:])
        return replace(self, micro_batch=micro_batch, images=images)

    def work(self, checkpointing: bool) -> Work:
        """What the operators of forward and backward pass do.

        Raises:
            RuntimeError: see `training_memory`.
        """
        with self._checkpointed(checkpointing), self.launch.rehearsed(self.model):
            return count_work(lambda: self.launch.passes(self._forward))

    def optimizing(self) -> Work:
        """What the optimizer's operators do besides moving values, Muon's products."""
        with self.launch.rehearsed(self.model):
            for parameter in self.model.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            optimizer = self.make_optimizer(self.model)
            return count_work(optimizer.step)

    def before(self) -> list[tuple[Work, bool]]:
        """What is done with a micro batch before its passes, without gradients, and whether in the run's autocast.

        The autoencoder encodes it, a teacher looks at it, and for a flow map the average answers two times.

        Raises:
            RuntimeError: see `training_memory`.
        """
        found = []
        with torch.no_grad():
            if self.images is not None:
                with self.launch.rehearsed(self.vae):
                    images = torch.empty(self.images, dtype=self.vae.dtype)
                    found.append((count_work(lambda: self.vae.encode(images)), False))
            if self.teacher is not None:
                with self.launch.rehearsed(self.teacher.network), self.launch.autocasting():
                    found.append((self.teacher.work(self.micro_batch), True))
            if self.model.config.end_block is not None:
                with self.launch.rehearsed(self.model), self.launch.autocasting():
                    found += [(count_work(self._forward), True)] * 2
        return found

    def describe(self, checkpointing: bool) -> str:
        """For people; without gradient checkpointing also what it would change."""
        said = f"micro batch {self.micro_batch}"
        if not checkpointing:
            said += f"; {readable_size(self.memory(True).activations)} with --gradient-checkpointing true"
        return self.memory(checkpointing).describe(self.optimizer, said)

    @contextlib.contextmanager
    def _checkpointed(self, checkpointing: bool) -> Iterator[None]:
        (self.model.enable_gradient_checkpointing if checkpointing else self.model.disable_gradient_checkpointing)()
        try:
            yield
        finally:
            self.model.disable_gradient_checkpointing()

    def _forward(self) -> torch.Tensor:
        noisy = torch.empty(self.micro_batch, self.model.config.in_channels, *self.model.sample_shape)
        labels = torch.empty(self.micro_batch, dtype=torch.long)
        output = self.model(noisy, torch.empty(self.micro_batch), labels, features_after=self.features_after)
        predictions = [output.sample] if output.guide is None else [output.sample, output.guide]
        result = functools.reduce(torch.add, predictions)  # each has its loss
        return result if self.aligned is None else result + output.projected.mean()
