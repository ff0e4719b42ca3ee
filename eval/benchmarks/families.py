"""Families of networks that the benchmark runs: how one is named, built, fed and trained."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from d_emo import create_model
from d_emo.eval.systems.names import KINDS, kind_of
from d_emo.models.variants import model_spec

LATENT_CHANNELS = 4
# Every diffusion network for one task, DiT's, whatever it was published for.
TASK = {"in_channels": LATENT_CHANNELS, "learn_sigma": True, "prediction_type": "epsilon", "flow_path": None}
# ADE20K's and COCO's, for the libraries' networks as for ours.
PIXEL_CLASSES, OBJECT_CLASSES = 150, 80
CLIP_FRAMES = max(kind.frames for kind in KINDS)
TORCHVISION_SEGMENTERS = ("deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
TORCHVISION_DETECTORS = ("ssdlite320_mobilenet_v3_large",)
SEGFORMERS = ("segformer-b0",)


@dataclass(frozen=True)
class Case:
    """One row's conditions, apart from the model; `size` is the side of its latents or images."""

    job: str
    dtype: str
    compile: str
    batch: int
    size: int
    depth: int | None
    frames: int = 0

    @property
    def label(self) -> str:
        """The conditions, for people."""
        depth = f", depth {self.depth}" if self.depth else ""
        compiled = {"none": "", "blocks": ", compiled"}.get(self.compile, f", compiled ({self.compile})")
        frames = f"{self.frames} frames of " if self.frames else ""
        return f"{self.job} {self.dtype}, batch {self.batch}, {frames}{self.size}x{self.size}{depth}{compiled}"


Loss = Callable[[Any, tuple[Any, ...]], torch.Tensor]


@dataclass(frozen=True)
class Family:
    """Networks of a kind.

    Attributes:
        has: whether a name is one of theirs.
        build: name and case -> a network with fresh weights, on the default device.
        inputs: case and device -> arguments of its forward pass.
        given: what these are, "latents", "images" or "clips"; only what is given the same is measured side by side.
        jobs, variants, dtypes: what can be asked of them.
        loss: what a training step differentiates.
        checkpointing: the method that switches recomputation on.
        needs: package and the extra that has it, where it may be missing.
        counted_on: where FLOPs are counted; detectors choose boxes, for which "meta" has no numbers.
        drawn: whether weights are drawn anew, because fresh ones would be zeros.
    """

    has: Callable[[str], bool]
    build: Callable[[str, Case], Any]
    inputs: Callable[[Case, torch.device], tuple[Any, ...]]
    given: str = "images"
    jobs: tuple[str, ...] = ("forward", "train")
    variants: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    loss: Loss | None = None
    checkpointing: str = ""
    needs: tuple[str, str] | None = None
    counted_on: str = "meta"
    drawn: bool = False

    @property
    def size_option(self) -> str:
        """The option that has the sides of their inputs."""
        return "latent" if self.given == "latents" else "image"


# ---- inputs ----------------------------------------------------------------------------------------------------------


def _latents(case: Case, device: torch.device) -> tuple[Any, ...]:
    latents = torch.randn(case.batch, LATENT_CHANNELS, case.size, case.size, device=device)
    labels = torch.zeros(case.batch, dtype=torch.long, device=device)
    return latents, torch.full((case.batch,), 500, device=device), labels


def _images(case: Case, device: torch.device) -> tuple[Any, ...]:
    return (torch.randn(case.batch, 3, case.size, case.size, device=device),)


def _pictures(case: Case, device: torch.device) -> tuple[Any, ...]:
    """A list, as detectors take it."""
    return (list(torch.rand(case.batch, 3, case.size, case.size, device=device)),)


def _clips(case: Case, device: torch.device) -> tuple[Any, ...]:
    return (torch.randn(case.batch, case.frames, 3, case.size, case.size, device=device),)


# ---- losses ----------------------------------------------------------------------------------------------------------


def squared(model: Any, inputs: tuple[Any, ...]) -> torch.Tensor:
    """The mean square of what comes out."""
    output = model(*inputs)
    for name in ("sample", "logits"):
        output = getattr(output, name, output)
    return output.float().square().mean()


def _pixel_labels(inputs: tuple[Any, ...]) -> torch.Tensor:
    (pixels,) = inputs
    return torch.zeros(len(pixels), *pixels.shape[-2:], dtype=torch.long, device=pixels.device)


def _own_loss(model: Any, inputs: tuple[Any, ...]) -> torch.Tensor:
    """A segmenter's in transformers, at the labels' size, the auxiliary head's with it."""
    return model(*inputs, labels=_pixel_labels(inputs)).loss


def _pixel_entropy(model: Any, inputs: tuple[Any, ...]) -> torch.Tensor:
    """Cross-entropy of what torchvision's segmenters give, which is of the images' size."""
    return F.cross_entropy(model(*inputs)["out"].float(), _pixel_labels(inputs))


# ---- networks --------------------------------------------------------------------------------------------------------


def _of_kind(title: str) -> Callable[[str], bool]:
    return lambda name: (kind := kind_of(name)) is not None and kind.title == title


def _ours(name: str, case: Case) -> Any:
    kind = kind_of(name)
    assert kind is not None
    return kind.build(name, case.size)


def _of(library: str, names: tuple[str, ...] = ()) -> Callable[[str], bool]:
    def has(name: str) -> bool:
        prefix, _, rest = name.partition(":")
        return prefix == library and (not names or rest in names)

    return has


def _size_of(case: Case) -> dict[str, Any]:
    return {"sample_size": case.size} | ({"num_layers": case.depth} if case.depth else {})


def _diffusers(name: str, case: Case) -> Any:
    from diffusers import DiTTransformer2DModel

    _, size, patch = model_spec(name.removeprefix("diffusers:"))
    return DiTTransformer2DModel(
        num_attention_heads=size.num_attention_heads,
        attention_head_dim=size.hidden_size // size.num_attention_heads,
        in_channels=LATENT_CHANNELS,
        out_channels=2 * LATENT_CHANNELS,
        patch_size=patch,
        num_embeds_ada_norm=1000,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        **{"num_layers": size.num_layers, **_size_of(case)},
    )


def _timm(name: str, _: Case) -> Any:
    import timm

    return timm.create_model(name.removeprefix("timm:"))


def _torchvision(classes: int) -> Callable[[str, Case], Any]:
    def build(name: str, _: Case) -> Any:
        from torchvision.models import get_model

        return get_model(name.removeprefix("torchvision:"), weights=None, weights_backbone=None, num_classes=classes)

    return build


def _segformer(_: str, __: Case) -> Any:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    # The configuration's defaults are B0's.
    options: dict[str, Any] = {"num_labels": PIXEL_CLASSES}
    return SegformerForSemanticSegmentation(SegformerConfig(**options))


def _is_diffusion(name: str) -> bool:
    if ":" in name:
        return False
    model_spec(name)  # names what is unknown
    return True


def _is_diffusers(name: str) -> bool:
    return name.startswith("diffusers:") and _is_diffusion(name.removeprefix("diffusers:"))


FAST, WITH_ONNX = ("reference", "checkpointed"), ("reference", "checkpointed", "onnx")
DIFFUSERS_SWITCH = "enable_gradient_checkpointing"
# transformers renames the second one.
TRANSFORMERS_SWITCH = next(
    name
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    if hasattr(PreTrainedModel, name)
)
TV = ("torchvision", "eval")
# The last takes every name that is left, and says what is wrong with it.
FAMILIES = (
    Family(_of_kind("classifier"), _ours, _images, variants=WITH_ONNX, checkpointing="set_grad_checkpointing"),
    Family(_of("timm"), _timm, _images, variants=("onnx",), needs=("timm", "timm")),
    Family(_of_kind("segmenter"), _ours, _images, variants=WITH_ONNX, loss=_own_loss,
           checkpointing=TRANSFORMERS_SWITCH),
    Family(_of("torchvision", TORCHVISION_SEGMENTERS), _torchvision(PIXEL_CLASSES), _images, loss=_pixel_entropy,
           needs=TV),
    Family(_of("transformers", SEGFORMERS), _segformer, _images, variants=("onnx",), loss=_own_loss),
    Family(_of_kind("detector"), _ours, _pictures, jobs=("forward",), variants=("reference",), dtypes=("float32",),
           needs=TV, counted_on="cpu"),
    Family(_of("torchvision", TORCHVISION_DETECTORS), _torchvision(OBJECT_CLASSES + 1), _pictures, jobs=("forward",),
           dtypes=("float32",), needs=TV, counted_on="cpu"),
    Family(_of_kind("video classifier"), _ours, _clips, given="clips", variants=WITH_ONNX,
           checkpointing=TRANSFORMERS_SWITCH),
    Family(_is_diffusers, _diffusers, _latents, given="latents", variants=("checkpointed",),
           checkpointing=DIFFUSERS_SWITCH, drawn=True),
    Family(_is_diffusion, lambda name, case: create_model(name, **TASK, **_size_of(case)), _latents, given="latents",
           jobs=("forward", "train", "sample"), variants=FAST, checkpointing=DIFFUSERS_SWITCH, drawn=True),
)  # fmt: skip


def family_of(name: str) -> Family:
    """The family of a name without variants.

    Raises:
        ValueError: there is none, or its package is missing.
    """
    family = next((family for family in FAMILIES if family.has(name)), None)
    if family is None:
        library = name.partition(":")[0]
        known = {"torchvision": (*TORCHVISION_SEGMENTERS, *TORCHVISION_DETECTORS), "transformers": SEGFORMERS}
        if library in known:
            raise ValueError(f"{name} is unknown; of {library} there are {', '.join(known[library])}.")
        raise ValueError(f"{name} is unknown; libraries are diffusers, timm, torchvision and transformers.")
    if family.needs and importlib.util.find_spec(family.needs[0]) is None:
        package, extra = family.needs
        raise ValueError(f"{name} needs the package {package}: pip install 'd-emo[{extra}]'.")
    return family
