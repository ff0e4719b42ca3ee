"""The frame that all diffusion transformers share: everything around the blocks.

Source: "Scalable Diffusion Models with Transformers" (DiT), arXiv 2212.09748, section 3.2.

Shapes: B batch, C latent or image channels, H x W input in pixels (of the image or of the latent), p patch side,
        h x w = H/p x W/p token grid, D hidden size, O output channels (2C with learned variance, otherwise C).
"""

import contextlib
import copy
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import OffloadedWeightsLoader
from diffusers import CacheMixin, ConfigMixin, ModelMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from safetensors import SafetensorError
from torch import nn

from d_emo.common.messages import first_line

from .adapter_files import check_adapters, check_description, look_into
from .checkpointing import checkpoint_block, frozen_batch_norm_statistics
from .checks import (
    check_depth,
    check_input,
    check_kind,
    check_loading,
    stored_config,
    warn_of_untouched_statistics,
)
from .diffusers_dit import is_diffusers_dit
from .kept_tokens import TokenFusion, check_kept, keep
from .layers import AdaNormOut, BottleneckPatchEmbed, sincos_positions

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel

# Channels of the sinusoidal timestep encoding, as in DiT.
TIMESTEP_CHANNELS = 256


@dataclass
class ClassConditionalOutput(Transformer2DModelOutput):
    """What a network answers.

    Attributes:
        sample: (B, O, H, W), the prediction.
        guide: (B, O, H, W), the weaker prediction of a network with a `guide_block`, made after that block.
        features: (B, h, w, D), the tokens after `features_after` blocks, where a call asks for them.
    """

    guide: torch.Tensor | None = None
    features: torch.Tensor | None = None


class ClassConditionalTransformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin):
    """Patch embedding, positions, timestep and label conditioning, blocks, modulated output.

    A subclass registers its configuration in its own `__init__`, then calls `build` with a function that makes one
    block. Blocks map (B, h, w, D) tokens and (B, D) conditioning to (B, h, w, D) tokens; a subclass whose blocks take
    more has a `run_blocks` of its own.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["pos_embed", "norm", "label_embed"]
    _keep_in_fp32_modules = ["pos_embed", "conv_norm"]

    def build(self, make_block: Callable[[], nn.Module], output_norm: nn.Module) -> None:
        """Create every submodule from `self.config`, which the constructor checked, and initialise it as DiT does."""
        config = self.config
        height, width = self.sample_shape
        dim, patch = config.hidden_size, config.patch_size
        self.patch_embed: nn.Module = (
            nn.Conv2d(config.in_channels, dim, kernel_size=patch, stride=patch)
            if config.patch_bottleneck is None
            else BottleneckPatchEmbed(config.in_channels, patch, config.patch_bottleneck, dim)
        )
        # Not trained, yet a parameter: the published counts include it, and it travels with the weights.
        self.pos_embed = nn.Parameter(sincos_positions(height // patch, width // patch, dim), requires_grad=False)
        shift = config.get("timestep_freq_shift", 0)
        self.time_proj = Timesteps(TIMESTEP_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=shift)
        self.time_embed = TimestepEmbedding(TIMESTEP_CHANNELS, dim)
        self.label_embed = nn.Embedding(config.num_classes + 1, dim)
        self.blocks = nn.ModuleList(make_block() for _ in range(config.num_layers))
        self.norm_out = AdaNormOut(output_norm, dim)
        self.proj_out = nn.Linear(dim, patch * patch * self.out_channels)
        if config.get("guide_block") is not None:
            self.guide_norm_out = AdaNormOut(copy.deepcopy(output_norm), dim)
            self.guide_proj_out = nn.Linear(dim, patch * patch * self.out_channels)
        if config.get("dense_blocks") is not None:
            self.fusion = TokenFusion(dim)
        self.gradient_checkpointing = False
        self.initialize_weights()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Diffusers' `from_pretrained`, strict: a folder whose configuration and weights differ is no model.

        BatchNorm statistics survive a device map that puts blocks on disk.

        Raises:
            ValueError: the folder holds another kind of network, or weights are missing or left over.
        """
        config = stored_config(cls, pretrained_model_name_or_path, kwargs)
        if (converted := cls._converted(pretrained_model_name_or_path, config, kwargs)) is not None:
            return converted
        converted_by = "DiTBaselineTransformer2DModel" if is_diffusers_dit(config) else None
        check_kind(cls, pretrained_model_name_or_path, config, converted_by)
        wants_information = kwargs.pop("output_loading_info", False)
        try:
            loaded = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        except (RuntimeError, SafetensorError, ValueError) as error:
            name, reason = str(pretrained_model_name_or_path), first_line(error)
            if name in reason or reason.startswith(f"{cls.__name__}: "):  # the latter says which field is wrong
                raise
            raise ValueError(f"{name} does not load as a {cls.__name__} ({reason}).") from error
        model, information = loaded if isinstance(loaded, tuple) else (loaded, {})
        check_loading(str(pretrained_model_name_or_path), model, information)
        if "disk" in (getattr(model, "hf_device_map", None) or {}).values():
            # Diffusers writes buffers to the disk with the weights, but its hooks load only weights back.
            stored = OffloadedWeightsLoader(save_folder=kwargs["offload_folder"])
            for name, buffer in model.named_buffers():
                if name in stored.all_keys:
                    buffer.copy_(stored[name])
        warn_of_untouched_statistics(model, f"{pretrained_model_name_or_path} was saved")
        return (model, information) if wants_information else model

    @classmethod
    def _converted(cls, name: Any, config: dict[str, Any], options: dict[str, Any]) -> Any:
        """What `from_pretrained` returns for a folder of another library's network that a subclass converts, or None.

        Args:
            name: folder or Hub id.
            config: what it holds.
            options: of `from_pretrained`.
        """
        return None

    def to_diffusers(self) -> "DiTTransformer2DModel":
        """This network as Diffusers' own DiT, where that gives the same outputs; a copy in float32 and eval mode.

        Raises:
            ValueError: it is no DiT, a flow model, or has what Diffusers' class lacks.
        """
        raise ValueError(f"{type(self).__name__} is not the DiT network; only DiT-* models become Diffusers' DiT.")

    @functools.wraps(ModelMixin.save_pretrained)  # pipelines look at its signature for what it takes
    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Diffusers' `save_pretrained`; says where BatchNorm's statistics were forgotten."""
        warn_of_untouched_statistics(self, f"{save_directory} is being saved")
        super().save_pretrained(save_directory, *args, **kwargs)

    def load_lora_adapter(
        self, pretrained_model_name_or_path_or_dict: Any, prefix: str | None = "transformer", **kwargs: Any
    ) -> None:
        """Diffusers' `load_lora_adapter`, strict: a file that does not fit the model wholly is an error.

        Raises:
            ValueError: no key begins with the prefix, adapters are missing or left over, or have other shapes than the
                model or the file's description say.
        """
        source = pretrained_model_name_or_path_or_dict
        said = "the adapter" if isinstance(source, dict) else str(source)
        before = set(getattr(self, "peft_config", None) or {})
        try:
            file = look_into(source, prefix, kwargs.get("weight_name"), kwargs.get("metadata"))
            check_description(file, self)
            super().load_lora_adapter(source, prefix=prefix, **kwargs)
            new = set(getattr(self, "peft_config", None) or {}) - before
            for adapter in new:
                check_adapters(self, adapter, set(file.shapes))
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError, re.error) as error:
            for adapter in set(getattr(self, "peft_config", None) or {}) - before:
                self.delete_adapters(adapter)
            raise ValueError(f"{said}: {first_line(error)}") from error
        if not kwargs.get("hotswap") and not new:
            raise ValueError(
                f"{said}: no key begins with {prefix!r} and a dot, so "
                "nothing would be loaded; pass prefix=None for a file of this model alone, or the prefix that its keys "
                "have."
            )

    @property
    def sample_shape(self) -> tuple[int, int]:
        """Height and width that the model was configured for; `forward` takes any other that the patch divides."""
        size = self.config.sample_size
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    @property
    def out_channels(self) -> int:
        """Output channels: twice the input's with learned variance (prediction first, then variance)."""
        return self.config.in_channels * (2 if self.config.learn_sigma else 1)

    @property
    def null_label(self) -> int:
        """The label that stands for "no class": what label dropout and guidance use."""
        return self.config.num_classes

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """DiT's initialisation: Xavier for products, 0.02 for embeddings, zeros for modulation and output."""
        products: list[Any] = [module for module in self.modules() if isinstance(module, nn.Linear)]
        products += [module for module in self.patch_embed.modules() if isinstance(module, nn.Conv2d)]
        for product in products:
            nn.init.xavier_uniform_(product.weight.flatten(1))
            if product.bias is not None:
                nn.init.zeros_(product.bias)
        for weight in (self.label_embed.weight, self.time_embed.linear_1.weight, self.time_embed.linear_2.weight):
            nn.init.normal_(weight, std=0.02)
        zero_layers: list[Any] = [block.modulation for block in self.blocks]
        zero_layers += [self.norm_out.modulation, self.proj_out]
        if self.config.get("guide_block") is not None:
            zero_layers += [self.guide_norm_out.modulation, self.guide_proj_out]
        for layer in zero_layers:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        if self.config.get("dense_blocks") is not None:
            self.fusion.reset()

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable | None = None) -> None:
        """Trade compute for memory: blocks recompute their activations in the backward pass.

        The default function keeps BatchNorm statistics exact; `torch.utils.checkpoint` alone updates them twice.
        """
        super().enable_gradient_checkpointing(gradient_checkpointing_func or checkpoint_block)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        features_after: int | None = None,
        end_timestep: torch.Tensor | float | int | None = None,
        kept: torch.Tensor | None = None,
    ) -> ClassConditionalOutput | tuple[torch.Tensor, ...]:
        """Predict noise (and variance), velocity, score or data, as `config.prediction_type` says.

        Args:
            hidden_states: (B, C, H, W) noisy images or latents; the patch divides H and W, which need not be equal.
            timestep: (B,) or one value for all, in [0, 1000): 0 is clean data, the end is pure noise.
            class_labels: (B,) integers in [0, num_classes]; num_classes itself is "no class". May be left out by
                unconditional models only. Nothing is dropped at random here, in training mode either: the trainer
                replaces labels, once per sample.
            return_dict: return a `ClassConditionalOutput` instead of a tuple of what it holds.
            features_after: also return the tokens after so many blocks, 1 to `num_layers`.
            end_timestep: of a flow map (`end_block`), (B,) or one value: the time that the sample is taken to. The
                prediction is then the mean velocity between the two times: the sample there is `hidden_states` - (time
                - end) * prediction, times being timesteps over 1000. None: the present one, where it is the velocity.
            kept: of a network with `dense_blocks`, (B, h / 2, w / 2) whole numbers: which of each 2 x 2 tokens the
                middle blocks see, 0 to 3 by rows. They then leave their BatchNorm statistics as they are, which are
                those of all tokens. None: they see all.

        Returns:
            `sample`, and `guide` and `features` where there are any.

        Raises:
            ValueError: wrong shapes or types, a size that the patch does not divide, a block that is not there, an end
                for a network that is no flow map, labels that are missing or (on the CPU, where looking costs nothing)
                out of range.
        """
        check_input(self.config, self.null_label, hidden_states, timestep, class_labels, end_timestep)
        check_depth(features_after, len(self.blocks))
        batch, _, height, width = hidden_states.shape
        patch = self.config.patch_size
        check_kept(kept, self.config.get("dense_blocks"), (batch, height // patch, width // patch))
        if class_labels is None:
            class_labels = torch.full((batch,), self.null_label, device=hidden_states.device)
        timestep = torch.as_tensor(timestep, device=hidden_states.device).expand(batch)

        hidden_states = self.seen_sample(hidden_states, timestep)            # (B, C, H, W)
        tokens = self.patch_embed(hidden_states).permute(0, 2, 3, 1)         # (B, C, H, W) -> (B, h, w, D)
        # Sums keep the memory order of their first operand; without this, every block would reorder its input.
        tokens = tokens.contiguous() + self._positions(height // patch, width // patch).to(tokens.dtype)
        label = self.label_embed(class_labels)                               # (B, D)
        conditioning = last = self.embed_time(timestep) + label              # (B, D)
        if end_timestep is not None:
            end_timestep = torch.as_tensor(end_timestep, device=hidden_states.device).expand(batch)
            last = self.embed_time(end_timestep) + label                     # (B, D)

        guide_block = self.config.get("guide_block")
        present = self.config.get("end_block") or len(self.blocks)
        of_blocks = [conditioning] * present + [last] * (len(self.blocks) - present)
        run = self.run_blocks if self.config.get("dense_blocks") is None else functools.partial(self.run_fused, kept)
        blocks, passed = run(tokens, of_blocks, label), {}
        for depth, tokens in enumerate(blocks, start=1):                     # (B, h, w, D)
            if depth in (guide_block, features_after):
                passed[depth] = tokens

        tokens, guide = self.proj_out(self.norm_out(tokens, last)), None     # (B, h, w, p * p * O)
        if guide_block is not None:
            guide = self.guide_proj_out(self.guide_norm_out(passed[guide_block], conditioning))
        output = ClassConditionalOutput(
            sample=self._unpatchify(tokens),                                 # (B, O, H, W)
            guide=None if guide is None else self._unpatchify(guide),        # (B, O, H, W)
            features=None if features_after is None else passed[features_after],  # (B, h, w, D)
        )
        return output if return_dict else output.to_tuple()

    def run_blocks(
        self, tokens: torch.Tensor, conditioning: Sequence[torch.Tensor], label: torch.Tensor
    ) -> Iterator[torch.Tensor]:
        """The tokens (B, h, w, D) after each block.

        Args:
            tokens: (B, h, w, D).
            conditioning: (B, D) for each block, time and label.
            label: (B, D), the label alone, for networks that have tokens of it.
        """
        for block, condition in zip(self.blocks, conditioning, strict=True):
            tokens = self.run_block(block, tokens, condition)                # (B, h, w, D)
            yield tokens

    def run_fused(
        self,
        kept: torch.Tensor | None,
        tokens: torch.Tensor,
        conditioning: Sequence[torch.Tensor],
        label: torch.Tensor,
    ) -> Iterator[torch.Tensor]:
        """`run_blocks` of a network with `dense_blocks`; the middle yields (B, h / 2, w / 2, D) where some are kept."""
        first = self.config.dense_blocks
        last = len(self.blocks) - first
        before = tokens
        for index, (block, condition) in enumerate(zip(self.blocks, conditioning, strict=True)):
            if index == first:
                before = tokens                                              # (B, h, w, D)
                tokens = tokens if kept is None else keep(tokens, kept)
            if index == last:
                tokens = self.fusion(before, tokens, kept)                   # (B, h, w, D)
            sparse = kept is not None and first <= index < last
            with frozen_batch_norm_statistics(block) if sparse else contextlib.nullcontext():
                tokens = self.run_block(block, tokens, condition)
            yield tokens

    def run_block(self, block: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """One block; with gradient checkpointing, its activations are computed again in the backward pass."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)

    def seen_sample(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The noisy images or latents as the network was trained on them, of (B, C, H, W) and Diffusers' timestep."""
        return hidden_states

    def seen_time(self, timestep: torch.Tensor) -> torch.Tensor:
        """The time that the network was trained on, (B,), of Diffusers' timestep."""
        return timestep

    def embed_time(self, timestep: torch.Tensor) -> torch.Tensor:
        """(B,) timesteps -> (B, D)."""
        time = self.time_proj(self.seen_time(timestep))                      # (B, 256), computed in float32
        return self.time_embed(time.to(self.label_embed.weight.dtype))       # (B, D)

    def _positions(self, rows: int, columns: int) -> torch.Tensor:
        if self.pos_embed.shape[:2] == (rows, columns):
            return self.pos_embed
        return sincos_positions(rows, columns, self.config.hidden_size).to(self.pos_embed.device)

    def _unpatchify(self, tokens: torch.Tensor) -> torch.Tensor:
        batch, rows, columns, _ = tokens.shape
        patch = self.config.patch_size
        tokens = tokens.view(batch, rows, columns, patch, patch, self.out_channels)
        tokens = tokens.permute(0, 5, 1, 3, 2, 4)                            # (B, O, h, p, w, p)
        return tokens.reshape(batch, self.out_channels, rows * patch, columns * patch)
