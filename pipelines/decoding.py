"""The pipeline's side of its autoencoder: which latents the model was trained on, image sizes, decoding.

The description of the latents (`LatentSpace`) is saved with the pipeline and is what decoding goes by, so that measured
statistics, and those of a folder in half precision, are the ones of training. A decoder that is assigned later
(`pipe.vae = AutoencoderTiny...` for quick pictures) is scaled by its own statistics instead.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor

from d_emo.common.checks import whole
from d_emo.common.messages import first_line
from d_emo.images.autoencoder_kinds import KINDS
from d_emo.images.autoencoders import LatentSpace, latent_space, space_of
from d_emo.images.latents import decode_latents

from . import checks

# Where a transformer remembers the measured statistics of its last pipeline, as it does the class names.
REMEMBERED_LATENTS = "latents_of_its_pipeline"
# What a decoder of another class has to share with the autoencoder that a model was trained with.
SHARED = ("channels", "factor", "image_channels")


class DecodingMixin:
    """From latents to images, and what other pipelines have around that."""

    transformer: Any
    vae: Any
    config: Any
    _of_decoder: tuple[Any, LatentSpace | None] = (None, None)

    def describe_latents(self, given: Mapping[str, Any] | None) -> None:
        """Find out, and keep for saving, which latents the model is for; see the argument of the class.

        Raises:
            ValueError: the autoencoder is another one, or has not the model's number of channels.
        """
        described = getattr(self.transformer, REMEMBERED_LATENTS, None) if given is None else given
        own = None if self.vae is None else latent_space(self.vae)
        space = own
        if described is not None:
            try:
                space = space_of(described)
            except ValueError as error:
                raise ValueError(f"latent_space: {first_line(error)}") from error
            if own is not None and (changed := space.differences(own)):
                raise ValueError(
                    f"vae is another autoencoder than the model was trained with: {'; '.join(changed)}. Load the "
                    f"pipeline with its own {space.autoencoder}, then assign pipe.vae to decode by another."
                )
        self._check_channels(space)
        self._of_decoder = (self.vae, own)
        stored = None if space is None else asdict(space)
        setattr(self.transformer, REMEMBERED_LATENTS, stored if space is not None and space.measured_on else None)
        self.register_to_config(latent_space=stored)  # type: ignore[attr-defined]
        self.vae_scale_factor = 1 if space is None else space.factor
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def latent_space(self) -> LatentSpace | None:
        """What decoding goes by: the latents that the model was trained on, or those of a decoder assigned since.

        Raises:
            ValueError: the assigned decoder does not fit the model; the message names it.
        """
        stored = None if self.config.latent_space is None else space_of(self.config.latent_space)
        if self.vae is None:
            return stored
        if self._of_decoder[0] is not self.vae:
            self._of_decoder = (self.vae, latent_space(self.vae))
        own = self._of_decoder[1]
        assert own is not None
        if stored is None:
            self._check_channels(own)
            return own
        changed = stored.differences(own)
        if not changed:
            return stored
        fits = all(getattr(stored, name) == getattr(own, name) for name in SHARED)
        if not fits or stored.measured_on:
            raise ValueError(
                f"vae: {own.autoencoder} does not decode the latents that the model was trained on: "
                f"{'; '.join(changed)}{f' (statistics measured on {stored.measured_on})' * bool(stored.measured_on)}; "
                f"set pipe.vae to an autoencoder like its own {stored.autoencoder}."
            )
        return own

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Diffusers' `save_pretrained`, of the autoencoder that the model was trained with.

        Raises:
            ValueError: another one stands in its place; the folder would not load.
        """
        space = self.latent_space
        stored = self.config.latent_space
        if space is not None and stored is not None and (changed := space_of(stored).differences(space)):
            raise ValueError(
                f"{save_directory}: pipe.vae is another autoencoder than the model was trained with: "
                f"{'; '.join(changed)}. Set pipe.vae to its own before saving."
            )
        mixed: Any = super()
        mixed.save_pretrained(save_directory, *args, **kwargs)

    def _check_channels(self, space: LatentSpace | None) -> None:
        channels = self.transformer.config.in_channels
        if space is not None and space.channels != channels:
            raise ValueError(
                f"the transformer takes {channels} channels, latents of {space.autoencoder} have {space.channels}; "
                "pass the autoencoder that it was trained with, or vae=None for a model of pixels."
            )

    def _check_decoder(self, output_type: str) -> None:
        """Refuse, before anything is drawn, what no decoder is there for."""
        space = self.latent_space
        if space is None or output_type == "latent":
            return
        if self.vae is None:
            raise ValueError(
                f"output_type={output_type!r}: the model draws latents of {space.autoencoder}, which the pipeline is "
                "without; set pipe.vae, or pass output_type='latent'."
            )
        if KINDS[space.autoencoder].draws and self.vae.device.type == "meta":
            raise ValueError(
                f"vae: {space.autoencoder} cannot decode while its weights are moved layer by layer; use "
                "enable_model_cpu_offload()."
            )

    def _latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width that the model sees, of an image's in pixels."""
        default_height, default_width = self.transformer.sample_shape
        patch, space = self.transformer.config.patch_size, self.latent_space
        factor, only = (1, None) if space is None else (space.factor, space.output_size)
        step, size = factor * patch, []
        for name, value, default in (("height", height, default_height), ("width", width, default_width)):
            remedy = f"leave it out for {default * factor} pixels"
            pixels = default * factor if value is None else whole(value, name, hint=remedy)
            if only not in (None, pixels):
                raise ValueError(f"{name}={pixels}: {space.autoencoder} decodes to {only} pixels only; pass {only}.")  # type: ignore[union-attr]
            if pixels < step or pixels % step:
                raise ValueError(
                    f"{name}={pixels} is not a positive multiple of {step} (patch_size {patch} x VAE factor {factor}); "
                    f"use {max(step, pixels - pixels % step)}."
                )
            size.append(pixels // factor)
        return size[0], size[1]

    def _decode(
        self, latents: torch.Tensor, output_type: str, generator: torch.Generator | list[torch.Generator] | None
    ) -> Any:
        """Images of latents (N, C, h, w), as `output_type` says; a decoder that draws noise takes the generator."""
        if output_type == "latent":
            return latents
        images, space = latents, self.latent_space
        if space is not None:
            images = decode_latents(self.vae, space, latents, generator)
            checks.check_decoded(images, self.vae)
        # Already float32, so that PIL output is rounded there and not in half precision.
        return self.image_processor.postprocess(images, output_type=output_type)
