"""Starting from trained weights: other classes, another resolution, the same network.

Everything is taken over but what the new task has otherwise: the label table where the classes differ (its "no class"
row stays), positions where the grid differs, a second output head where the weights have none.
"""

from collections.abc import Mapping
from typing import Any

import torch

from d_emo.models import ClassConditionalTransformer2DModel
from d_emo.pipelines import open_pipeline
from d_emo.pipelines.samplers import own_shift
from d_emo.schedulers.flow_paths import path_of
from d_emo.train.diffusion.objectives import prediction_of

LABELS, POSITIONS = "label_embed.weight", "pos_embed"
# What a new task may change of a model's configuration.
ADAPTABLE = ("sample_size", "num_classes", "end_block", "distilled_guidance")
# What the new model may have where the old one has it not, and what its weights are called.
HEAD, HEADS_WEIGHTS = "guide_block", "guide_"


class InitialWeights:
    """The transformer of a pipeline, from which a run starts.

    Args:
        name: pipeline folder, checkpoint-STEP folder or Hub id; its averaged weights.

    Raises:
        ValueError: it does not load.
    """

    def __init__(self, name: str):
        try:
            pipeline = open_pipeline(name)
        except ValueError as error:
            raise ValueError(f"--init-from {error}") from error
        self.name = name
        self.transformer: ClassConditionalTransformer2DModel = pipeline.transformer
        self.id2label = pipeline.id2label
        self.time_shift = own_shift(pipeline.scheduler)
        self.space = pipeline.latent_space
        self._vae = pipeline.vae

    @property
    def resolution(self) -> int:
        """Side in pixels of the images that it was trained on."""
        return self.transformer.sample_shape[0] * (1 if self.space is None else self.space.factor)

    def autoencoder(self) -> Any:
        """The pipeline's own, frozen; None for pixels.

        Raises:
            ValueError: it is trained on latents and saved without their autoencoder.
        """
        if self.space is not None and self._vae is None:
            raise ValueError(
                f"--vae auto: --init-from {self.name} was saved without the {self.space.autoencoder} that it was "
                "trained with; name that: --vae FOLDER."
            )
        return None if self._vae is None else self._vae.requires_grad_(False)

    def config(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """The new model's configuration: the old one with the task's grid and number of classes.

        Raises:
            ValueError: the task wants another network; the message names what differs.
        """
        stored = {name: value for name, value in self.transformer.config.items() if name[0] != "_"}
        stored["flow_path"] = path_of(stored)  # also where it was left to the prediction
        if stored[HEAD] is not None and task.get("end_block") is not None:
            raise ValueError(
                f"--init-from {self.name} has a second output head ({HEAD} {stored[HEAD]}), which flow maps have not; "
                "start from a flow without one."
            )
        adaptable = (*ADAPTABLE, HEAD) if stored[HEAD] is None else ADAPTABLE
        wrong = [
            f"{name} {stored.get(name)!r}, not {value!r}"
            for name, value in task.items()
            if name not in adaptable and stored.get(name) != value
        ]
        if wrong:
            raise ValueError(
                f"--init-from {self.name} is another network: {'; '.join(wrong)}. Train as it was trained: "
                f"{' '.join(self._options())}."
            )
        return {**stored, **{name: task[name] for name in adaptable if name in task}}

    def _options(self) -> list[str]:
        """The options that fit these weights."""
        config = self.transformer.config
        path = path_of(config)
        bottleneck = config.get("patch_bottleneck")
        options = [] if bottleneck is None else [f"--patch-bottleneck {bottleneck}"]
        options += [] if config.guide_block is None else [f"--guide-block {config.guide_block}"]
        dense = config.get("dense_blocks")
        options += [] if dense is None else [f"--dense-blocks {dense}"]
        flow = f"--objective {'sit' if config.end_block is None else 'flow-map'}"
        options += ["--objective dit"] if path is None else [flow, f"--flow-path {path}"]
        if path is not None:
            options.append(f"--prediction {prediction_of(config.prediction_type)}")
            options += [f"--time-shift {self.time_shift:g}"] if self.time_shift != 1 else []
        if self.space is not None:
            return [*options, "--vae auto"]
        return [*options, "--vae none", f"--color {'grey' if config.in_channels == 1 else 'rgb'}"]

    def build(self, config: Mapping[str, Any], id2label: Mapping[int, str]) -> ClassConditionalTransformer2DModel:
        """A model for the new task that holds these weights.

        Args:
            config: what `config` answered.
            id2label: the new task's classes; the label table is kept if they are the same.
        """
        model = type(self.transformer)(**config)
        if model.device.type == "meta":
            return model  # a dry look at its size
        state = self.transformer.state_dict()
        fresh = model.state_dict()
        if self.transformer.config.guide_block is None:
            state |= {name: value for name, value in fresh.items() if name.startswith(HEADS_WEIGHTS)}
        if state[POSITIONS].shape != fresh[POSITIONS].shape:
            state[POSITIONS] = fresh[POSITIONS]
        if dict(id2label) != self.id2label:
            state[LABELS] = torch.cat([fresh[LABELS][:-1], state[LABELS][-1:]])
        model.load_state_dict(state, strict=True)
        return model
