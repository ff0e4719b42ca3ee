"""EMOv1 and EMOv2 in timm: `import d_emo.timm_models`, then `timm.create_model("emov2_5m", features_only=True)`.

Names are those of `d_emo.list_classifiers()` in timm's spelling: "EMOv2-5M" is "emov2_5m". A model has all that timm's
scripts ask of theirs; tests/classification/test_timm_contract.py makes their calls. Its tensors have the names of
`create_classifier`'s; a transformers folder has them behind "emov2.".
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

try:
    from timm.layers import SelectAdaptivePool2d
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
    from timm.models._features import feature_take_indices
except ImportError as error:
    raise ImportError("d_emo.timm_models needs timm; pip install 'd-emo[timm]'.") from error

from d_emo.classification.checks import check_features
from d_emo.classification.emov2 import EMOv2
from d_emo.classification.preprocessing import CROP_RATIO, IMAGENET_MEAN, IMAGENET_STD
from d_emo.classification.published import checkpoint_state
from d_emo.classification.ranges import CLASSIFIER
from d_emo.classification.variants import CLASSIFIERS, classifier_config
from d_emo.common.block_ranges import EPSILON, SIDE
from d_emo.common.checks import one_of
from d_emo.common.ranges import Each, Maybe, OneOf, OneOrPair, Real, Rule, Table, Whole, checked, take

# How the last grid becomes one vector: not at all, mean, maximum, their mean, both side by side.
POOLS = ("", "avg", "max", "avgmax", "catavgmax")
SHARE = Real(0, 1, below=True)
# What timm calls so; the network's own arguments have `ranges.CLASSIFIER`.
TIMM: Table = {
    "in_chans": CLASSIFIER["in_channels"],
    "num_classes": CLASSIFIER["num_classes"],
    "global_pool": Maybe(OneOf(POOLS)),
    "drop_rate": SHARE,
    "drop_path_rate": Maybe(SHARE),
    "drop_block_rate": Real(0, 0, "EMOv2 has no DropBlock; use drop_path_rate"),
    "bn_momentum": Maybe(Real(0, 1)),
    "bn_eps": Maybe(EPSILON),
    "img_size": OneOrPair(SIDE),
}
Indices = int | list[int] | None


def timm_name(name: str) -> str:
    """timm's spelling of a name."""
    return name.lower().replace("-", "_")


default_cfgs = generate_default_cfgs(
    {
        f"{timm_name(name)}.untrained": {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": CROP_RATIO,
            "interpolation": "bicubic",
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "first_conv": "stem.conv",
            "classifier": "head",
        }
        for name in CLASSIFIERS
    }
)


class TimmEMOv2(EMOv2):
    """EMOv2 with what timm asks of its models.

    Args:
        in_chans: channels of the images.
        num_classes: 0 leaves the head out.
        global_pool: one of `POOLS`; without pooling the head answers at every place, (B, K, h, w).
        drop_rate: of the features before the head, in training.
        drop_path_rate: of the last block's branch, in training; None for the size's own.
        drop_block_rate: 0; the network has no DropBlock.
        bn_momentum, bn_eps: of every BatchNorm; None for PyTorch's momentum and the published epsilon.
        device, dtype: of the parameters.
        **config: arguments of `EMOv2`.

    Raises:
        ValueError: a value out of range.
    """

    @checked(TIMM)
    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float | None = None,
        drop_block_rate: float = 0.0,
        bn_momentum: float | None = None,
        bn_eps: float | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **config: Any,
    ):
        if drop_path_rate is not None:
            config["drop_path"] = drop_path_rate
        super().__init__(in_channels=in_chans, num_classes=num_classes, **config)
        self.in_chans = in_chans
        self.num_features = self.widths[-1]
        self.head_drop = nn.Dropout(drop_rate)
        self._pool(global_pool)
        for norm in self.modules():
            if isinstance(norm, nn.BatchNorm2d):
                if bn_momentum is not None:
                    norm.momentum = bn_momentum
                if bn_eps is not None:
                    norm.eps = bn_eps
        stem = "stem.pointwise" if config.get("version", 2) == 2 else "stem"
        maps = [(self.stem_dim, stem), *((width, f"stages.{number}") for number, width in enumerate(self.widths))]
        self.feature_info = [
            {"num_chs": channels, "reduction": min(2 ** (number + 1), self.output_stride), "module": module}
            for number, (channels, module) in enumerate(maps)
        ]
        self.to(device=device, dtype=dtype)

    def _pool(self, kind: str) -> None:
        """Pool so from now on; a head for vectors of another length is a fresh one."""
        self.global_pool = SelectAdaptivePool2d(pool_type=kind, flatten=bool(kind)).train(self.training)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        if isinstance(self.head, nn.Linear) and self.head.in_features != self.head_hidden_size:
            self.head = self.make_head(self.head_hidden_size, self.num_classes)

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    @checked(TIMM)
    def reset_classifier(self, num_classes: int, global_pool: str | None = None, **_: Any) -> None:
        """A fresh head for other classes, 0 for none; pools as before where `global_pool` is None."""
        self.num_classes = num_classes
        if global_pool is not None:
            self._pool(global_pool)
        self.head = self.make_head(self.head_hidden_size, num_classes)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """None beyond those of one dimension, which timm's optimizers leave out."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers from the first to the last for layer-wise learning rates: stem, then stages (`coarse`) or blocks."""
        stages = r"^stages\.(\d+)" if coarse else [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stem", "blocks": stages}

    def forward_head(self, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(B, C, h, w) -> logits (B, K), or the pooled features; without pooling (B, K, h, w)."""
        check_features(features, self.num_features)
        pooled = self.head_drop(self.global_pool(features))  # (B, C), or (B, C, h, w)
        if pre_logits:
            return pooled
        if pooled.dim() == 2:
            return self.head(pooled)
        return self.head(pooled.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: Indices = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """What `forward_features` returns, and outputs of stem and stages on the way, (B, C, H / 2^i, W / 2^i).

        Args:
            x: (B, C, H, W), normalised.
            indices: which of the five, from 0 (stem); a number for the last ones, None for all.
            norm: normalise the last stage's, the only one that the norm is for.
            stop_early: leave out the stages after the last one that was asked for.
            output_fmt: "NCHW".
            intermediates_only: return the outputs alone.
        """
        one_of(str(getattr(output_fmt, "value", output_fmt)), "output_fmt", ("NCHW",))
        taken, last = self._taken(indices)
        maps = [self.stem(x)]
        for stage in self.stages[:last] if stop_early else self.stages:
            maps.append(stage(maps[-1]))
        final = self.normed(maps[-1]) if len(maps) == len(self.stages) + 1 else maps[-1]
        outputs = [final if norm and index == len(self.stages) else maps[index] for index in taken]
        return outputs if intermediates_only else (final, outputs)

    def _taken(self, indices: Indices) -> tuple[list[int], int]:
        """Which outputs are asked for, counted from 0, and the last of them."""
        outputs = len(self.stages) + 1
        return feature_take_indices(outputs, take("", {"indices": indices}, {"indices": Taps(outputs)})["indices"])

    def prune_intermediate_layers(
        self, indices: Indices = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the outputs of `forward_intermediates` at these indices do not need; they are returned."""
        taken, last = self._taken(indices)
        ends_early = last < len(self.stages)
        self.stages = self.stages[:last]
        if ends_early:
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_norm or ends_early:
            self.drop_final_norm()
        if prune_head or ends_early:
            self.reset_classifier(0, "")
        return taken


@dataclass(frozen=True)
class Taps(Rule):
    """Which of so many outputs: None for all, a number for the last ones, or their places from 0, or -1 backwards."""

    outputs: int

    def take(self, value: Any) -> Any:
        """See `Rule`."""
        if value is None or not isinstance(value, list | tuple):
            return Maybe(Whole(1, self.outputs)).take(value)
        return Each(Whole(-self.outputs, self.outputs - 1), 1, self.outputs).take(value)

    def __str__(self) -> str:
        places = f"a list of places from {-self.outputs} to {self.outputs - 1}"
        return f"None (all), a number from 1 to {self.outputs} (the last ones), or {places}"


def checkpoint_filter_fn(state: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors of a file under the network's names: timm's own, a transformers folder's, or the authors'."""
    return checkpoint_state(state)


def _register(name: str) -> None:
    def build(pretrained: bool = False, **options: Any) -> Any:
        size = take(timm_name(name), {"img_size": options.get("img_size", 224)}, TIMM)["img_size"]
        if options.get("features_only"):
            take(timm_name(name), {"out_indices": options.get("out_indices")}, {"out_indices": Taps(5)})
        # The shorter side decides the window.
        config = {**classifier_config(name, min(size) if isinstance(size, tuple) else size), **options}
        return build_model_with_cfg(
            _without_size,
            timm_name(name),
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"out_indices": (0, 1, 2, 3, 4), "flatten_sequential": True},
            **config,
        )

    build.__name__ = timm_name(name)
    build.__module__ = __name__
    build.__doc__ = f"{name} with fresh weights; none are published in timm's format."
    globals()[build.__name__] = build
    entry: Callable = build
    register_model(entry)


def _without_size(*, img_size: Any = None, **options: Any) -> TimmEMOv2:
    """The model; timm itself remembers the image size, which has decided the window by now."""
    return TimmEMOv2(**options)


for _name in CLASSIFIERS:
    _register(_name)
