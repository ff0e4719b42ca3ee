"""EMOv1 and EMOv2 in timm: `import d_emo.timm_models`, then `timm.create_model("emov2_5m", features_only=True)`.

Names are those of `d_emo.list_classifiers()` in timm's spelling: "EMOv2-5M" is "emov2_5m".
"""

from collections.abc import Callable
from typing import Any

try:
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
except ImportError as error:
    raise ImportError("d_emo.timm_models needs timm; pip install 'd-emo[timm]'.") from error

from d_emo.classification.emov2 import EMOv2
from d_emo.classification.transformers_models import CROP_RATIO, IMAGENET_MEAN, IMAGENET_STD
from d_emo.classification.variants import CLASSIFIERS, classifier_config


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
    """EMOv2 with what timm asks of its models."""

    def __init__(self, *, in_chans: int = 3, drop_path_rate: float | None = None, **config: Any):
        if drop_path_rate is not None:
            config["drop_path"] = drop_path_rate
        super().__init__(in_channels=in_chans, **config)
        self.num_features = self.head_hidden_size = self.widths[-1]
        stem = "stem.pointwise" if config.get("version", 2) == 2 else "stem"
        maps = [(self.stem_dim, stem), *((width, f"stages.{number}") for number, width in enumerate(self.widths))]
        self.feature_info = [
            {
                "num_chs": channels,
                "reduction": min(2 ** (number + 1), config.get("output_stride", 32)),
                "module": module,
            }
            for number, (channels, module) in enumerate(maps)
        ]

    def get_classifier(self) -> Any:
        """The head."""
        return self.head


def _register(name: str) -> None:
    def build(pretrained: bool = False, **options: Any) -> Any:
        size = options.pop("img_size", 224)
        config = {**classifier_config(name, size), **options}
        return build_model_with_cfg(
            TimmEMOv2,
            timm_name(name),
            pretrained,
            feature_cfg={"out_indices": (0, 1, 2, 3, 4), "flatten_sequential": True},
            **config,
        )

    build.__name__ = timm_name(name)
    build.__module__ = __name__
    build.__doc__ = f"{name} with fresh weights; none are published in timm's format."
    globals()[build.__name__] = build
    entry: Callable = build
    register_model(entry)


for _name in CLASSIFIERS:
    _register(_name)
