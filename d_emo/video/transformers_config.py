"""V-EMOv2's configuration in transformers, which `AutoConfig` knows as soon as this module is imported.

It imports no network and no model class: `d_emo.registration` has it imported while transformers is importing itself.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

from d_emo.classification.transformers_config import NamedClasses
from d_emo.common.ranges import checked
from d_emo.video.ranges import VIDEO, video_agrees

if TYPE_CHECKING:
    from d_emo.video.v_emov2 import VEMOv2

# What a configuration says of the network; arguments of `VEMOv2`.
NETWORK_ARGUMENTS = (
    "depths", "widths", "expansions", "head_dims", "kernel_sizes", "stem_dim", "window_size", "clip_window",
    "attention_type", "attending_stages", "norms", "activations", "layer_scale", "temporal_strides", "dropout",
    "drop_path",
)  # fmt: skip


class VEMOv2Config(NamedClasses, PreTrainedConfig):
    """Configuration of a V-EMOv2 network; `VEMOv2Config.of("V-EMOv2-5M")` gives the sizes by name.

    Args:
        image_size: side of the frames that it is for, in pixels; others run.
        num_frames: of the clips that it is for, which processor and pipeline then choose; others run.
        num_channels: of the frames.
        **more: transformers' own, `num_labels` and `id2label` among them; the latter may be a list of names, and
            `label2id` follows from it.

    The others are those of `VEMOv2`.

    Raises:
        ValueError: a value out of range, or names of classes that are no list.
    """

    model_type = "v_emov2"

    @checked(VIDEO, video_agrees)
    def __init__(
        self,
        depths: Any = (3, 3, 9, 3),
        widths: Any = (48, 72, 160, 288),
        expansions: Any = (2.0, 3.0, 4.0, 4.0),
        head_dims: Any = (16, 24, 32, 32),
        kernel_sizes: Any = (5, 5, 5, 5),
        num_channels: int = 3,
        stem_dim: int | None = None,
        window_size: Any = (2, 5, 5),
        clip_window: bool = False,
        attention_type: str = "spanning",
        attending_stages: Any = (3, 4),
        norms: Any = ("batch", "batch", "layer", "layer"),
        activations: Any = ("silu", "silu", "gelu", "gelu"),
        layer_scale: float | None = 1e-6,
        temporal_strides: Any = (2, 1, 1, 1, 1),
        dropout: float = 0.5,
        drop_path: float = 0.05,
        image_size: int = 160,
        num_frames: int = 4,
        **more: Any,
    ):
        # The Auto classes find a model by its configuration, so that the models are registered before there is one.
        # Not before: this module is imported in the middle of transformers' own import.
        import_module("d_emo.video.transformers_models")
        super().__init__(**self.named(more))
        self.depths = list(depths)
        self.widths = list(widths)
        self.expansions = list(expansions)
        self.head_dims = list(head_dims)
        self.kernel_sizes = list(kernel_sizes)
        self.num_channels = num_channels
        self.stem_dim = stem_dim
        self.window_size = list(window_size)
        self.clip_window = clip_window
        self.attention_type = attention_type
        self.attending_stages = list(attending_stages)
        self.norms = list(norms)
        self.activations = list(activations)
        self.layer_scale = layer_scale
        self.temporal_strides = list(temporal_strides)
        self.dropout = dropout
        self.drop_path = drop_path
        self.image_size = image_size
        self.num_frames = num_frames

    @classmethod
    def of(cls, name: str = "V-EMOv2-5M", **overrides: Any) -> "VEMOv2Config":
        """The configuration of a size.

        Args:
            name: one of `d_emo.list_video_classifiers()`.
            **overrides: any argument of the configuration.

        Raises:
            ValueError: the name is unknown, or an override that neither the configuration nor transformers has.
        """
        from d_emo.video.sizes import video_config

        size = video_config(name)
        cls.refuse_unknown(overrides)
        classes = {} if overrides.get("id2label") is not None else {"num_labels": 400}
        return cls(**{**size, **classes, **overrides})

    def build(self, num_classes: int) -> "VEMOv2":
        """The network, with fresh weights."""
        from d_emo.video.v_emov2 import VEMOv2

        return VEMOv2(
            **{name: getattr(self, name) for name in NETWORK_ARGUMENTS},
            num_classes=num_classes,
            in_channels=self.num_channels,
        )


# exist_ok: a reload makes a new class.
AutoConfig.register(VEMOv2Config.model_type, VEMOv2Config, exist_ok=True)
