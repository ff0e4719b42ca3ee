"""What people bring from other pipelines: arguments of other names, and switches that live on the decoder here."""

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any

from d_emo.images.autoencoder_kinds import KINDS
from d_emo.images.autoencoders import class_of

# Names that other pipelines have for a call's arguments, and what to do here.
ELSEWHERE = {
    "num_images_per_prompt": "num_images_per_label",
    "num_images": "num_images_per_label",
    "batch_size": "num_images_per_label",
    "prompt": "class_labels",
    "labels": "class_labels",
    "class_label": "class_labels",
    "classes": "class_labels",
    "steps": "num_inference_steps",
    "num_steps": "num_inference_steps",
    "num_sampling_steps": "num_inference_steps",
    "cfg_scale": "guidance_scale",
    "cfg": "guidance_scale",
    "gnet": "guide",
    "ig_scale": "internal_guidance",
    "seed": "generator (torch.Generator().manual_seed(SEED))",
    "noise": "latents",
    "resolution": "height and width",
    "image_size": "height and width",
    "size": "height and width",
    "callback": "callback_on_step_end",
    "callback_steps": "callback_on_step_end, called after every step",
}


def names_arguments(call: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a call whose unknown arguments are to be named with what they are called here."""
    known = [name for name in inspect.signature(call).parameters if name != "self"]

    @functools.wraps(call)
    def naming(self: Any, *args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in known:
                close = ELSEWHERE.get(name) or " or ".join(difflib.get_close_matches(name, known, 2))
                remedy = f"here it is {close}" if close else f"its arguments are {', '.join(known)}"
                raise TypeError(f"{type(self).__name__} takes no {name}; {remedy}.")
        return call(self, *args, **kwargs)

    return naming


class DecoderSwitches:
    """`enable_vae_slicing` and its like, which other pipelines have: for large batches and large pictures."""

    vae: Any

    def enable_vae_slicing(self) -> None:
        """Decode picture by picture, for large batches.

        Raises:
            ValueError: the decoder's class does not; it would only encode so.
        """
        vae, name = self._decoder("enable_vae_slicing")
        if not KINDS[name].slices:
            raise ValueError(f"enable_vae_slicing: {name} decodes a batch at once; draw fewer pictures at once.")
        vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decode a batch at once."""
        self._decoder("disable_vae_slicing")[0].disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Decode in tiles, for large pictures.

        Raises:
            ValueError: the decoder's class does not, or its tiles would not meet.
        """
        vae, name = self._decoder("enable_vae_tiling")
        if not KINDS[name].tiles(vae):
            raise ValueError(
                f"enable_vae_tiling: this {name} decodes whole pictures only, or its tiles would not meet; draw "
                "smaller pictures."
            )
        vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Decode whole pictures."""
        self._decoder("disable_vae_tiling")[0].disable_tiling()

    def _decoder(self, switch: str) -> tuple[Any, str]:
        """The decoder and its class."""
        if self.vae is None:
            raise ValueError(f"{switch}: this pipeline draws pixels and has no VAE; draw fewer pictures at once.")
        return self.vae, class_of(self.vae)
