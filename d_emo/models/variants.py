"""Names and sizes of the models, and the function that builds one by name."""

import difflib
import fnmatch
from typing import Any, NamedTuple

from d_emo.common.checks import text

from .transformer_base import ClassConditionalTransformer2DModel
from .transformer_demo import DEMOTransformer2DModel
from .transformer_dit import DiTBaselineTransformer2DModel
from .transformer_jit import JiTTransformer2DModel
from .transformer_lightningdit import LightningDiTTransformer2DModel


class Size(NamedTuple):
    """Blocks, channels and heads of a model; `published` is False for sizes that are not in the paper."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    published: bool = True
    patch_bottleneck: int | None = None


SIZES: dict[str, Size] = {
    "N": Size(6, 128, 2, published=False),  # nano, for a laptop: the README's digits
    "Ti": Size(12, 192, 3, published=False),  # tiny, DeiT-Tiny's depth and width
    "S": Size(12, 384, 6),
    "B": Size(12, 768, 12),
    "L": Size(24, 1024, 16),
    "XL": Size(28, 1152, 16),
}

JIT_SIZES: dict[str, Size] = {
    "B": Size(12, 768, 12, patch_bottleneck=128),
    "L": Size(24, 1024, 16, patch_bottleneck=128),
    "H": Size(32, 1280, 16, patch_bottleneck=256),
}

FAMILIES: dict[str, type[ClassConditionalTransformer2DModel]] = {
    "D-EMOv2": DEMOTransformer2DModel,
    "DiT": DiTBaselineTransformer2DModel,
    "LightningDiT": LightningDiTTransformer2DModel,
    "JiT": JiTTransformer2DModel,
}
FAMILY_SIZES: dict[str, dict[str, Size]] = {
    "D-EMOv2": SIZES,
    "DiT": SIZES,
    "LightningDiT": {name: SIZES[name] for name in ("B", "L", "XL")},
    "JiT": JIT_SIZES,
}
PATCH_SIZES: dict[str, tuple[int, ...]] = {
    "D-EMOv2": (1, 2, 4, 8, 16),
    "DiT": (1, 2, 4, 8, 16),
    "LightningDiT": (1, 2),
    "JiT": (16, 32),  # for pictures of 256 and of 512 pixels
}

MODELS: dict[str, tuple[type[ClassConditionalTransformer2DModel], Size, int]] = {
    f"{family}-{name}-{patch}": (model_class, size, patch)
    for family, model_class in FAMILIES.items()
    for name, size in FAMILY_SIZES[family].items()
    for patch in PATCH_SIZES[family]
}


def list_models(pattern: str = "*") -> list[str]:
    """Names that `create_model` takes, optionally those matching a shell pattern such as `"D-EMOv2-*-2"`."""
    return fnmatch.filter(MODELS, text(pattern, "pattern"))


def model_spec(name: str) -> tuple[type[ClassConditionalTransformer2DModel], Size, int]:
    """Class, size and patch of a model name.

    Raises:
        ValueError: the name is unknown; the message offers the nearest names.
    """
    if text(name, "name") not in MODELS:
        lower = {known.casefold(): known for known in MODELS}
        folded = name.casefold().replace("/", "-")
        close = [lower[match] for match in difflib.get_close_matches(folded, lower, n=4)]
        hint = f"did you mean {', '.join(close)}?" if close else f"choose from {', '.join(MODELS)}."
        raise ValueError(f"model {name!r} is unknown; {hint} d_emo.list_models() shows all names.")
    return MODELS[name]


def heads_of(num_layers: int, hidden_size: int) -> int:
    """Attention heads of a published size, which its tensors do not tell.

    Raises:
        ValueError: it is none.
    """
    heads = {(size.num_layers, size.hidden_size): size.num_attention_heads for size in SIZES.values()}
    if (num_layers, hidden_size) not in heads:
        raise ValueError(
            f"{num_layers} blocks of {hidden_size} channels are no published size; say how many heads it has "
            "(--num-heads)."
        )
    return heads[num_layers, hidden_size]


def create_model(name: str, **config_overrides: Any) -> ClassConditionalTransformer2DModel:
    """Build a model with fresh weights.

    Args:
        name: one of `list_models()`, family-size-patch, such as "D-EMOv2-B-2" or "JiT-L-16".
        **config_overrides: constructor arguments of the model class, such as `num_classes=10`, `in_channels=3`,
            `sample_size=64` or, for the flow objective, `learn_sigma=False, prediction_type="flow_prediction"`.

    Raises:
        ValueError: unknown name, or a configuration out of range.
        TypeError: an override that the model class does not have.
    """
    model_class, size, patch = model_spec(name)
    config = {
        "patch_size": patch,
        "num_layers": size.num_layers,
        "hidden_size": size.hidden_size,
        "num_attention_heads": size.num_attention_heads,
        "patch_bottleneck": size.patch_bottleneck,
    }
    return model_class(**{**config, **config_overrides})
