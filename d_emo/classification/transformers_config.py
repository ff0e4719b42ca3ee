"""EMOv2's configuration in transformers, which `d_emo.registration` enters in `AutoConfig`.

It imports no network, no model class and no Auto class: transformers may be in the middle of importing itself.
"""

import difflib
import inspect
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from d_emo.classification.ranges import CLASSIFIER, stages_agree
from d_emo.common.ranges import Rule, Table, checked, take

if TYPE_CHECKING:
    from d_emo.classification.emov2 import EMOv2

# What a configuration says of the network; arguments of `EMOv2`.
NETWORK_ARGUMENTS = (
    "version", "depths", "widths", "expansions", "head_dims", "kernel_sizes", "stem_dim", "window_size", "clip_window",
    "attention_type", "attending_stages", "local", "dilation", "arrangement", "norms", "activations", "layer_scale",
    "drop_path", "output_stride",
)  # fmt: skip
# What the network calls otherwise than configurations of transformers do.
RENAMED = {"num_classes": "num_labels", "in_channels": "num_channels", "in_chans": "num_channels"}


def number_or_names(function: str, num_classes: Any, names: Any, usual: int, rule: Rule) -> dict[str, Any]:
    """A configuration's `num_labels`, or its `id2label` where the classes have names.

    Args:
        function: that they were passed to.
        num_classes: how many.
        names: of them, as a configuration takes them; None where they have none.
        usual: what `num_classes` is unless it is given.
        rule: of `num_classes`.

    Raises:
        ValueError: there are not so many names, or the number is out of range.
    """
    number = take(function, {"num_classes": num_classes}, {"num_classes": rule})["num_classes"]
    if names is None:
        return {"num_labels": number}
    if hasattr(names, "__len__") and number not in (len(names), usual):
        raise ValueError(f"num_classes={number}, and id2label has {len(names)} names; leave num_classes out.")
    return {"id2label": names}


class NamedClasses:
    """What our configurations in transformers share: names of classes as transformers has them, and options by name.

    Attributes:
        class_rules: what `num_labels` may be.
    """

    class_rules: ClassVar[Table] = {"num_labels": CLASSIFIER["num_classes"]}

    def __setattr__(self, name: str, value: Any) -> None:
        # `from_pretrained(folder, id2label=...)` sets them on a configuration that is there.
        value = take(type(self).__name__, {name: value}, self.class_rules)[name]
        if name == "id2label" and value is not None:
            value = names_by_number(value)
            take(type(self).__name__, {"num_labels": len(value)}, self.class_rules)
            super().__setattr__("label2id", numbers_by_name(value))
        super().__setattr__(name, value)

    @staticmethod
    def named(options: dict[str, Any]) -> dict[str, Any]:
        """Options of transformers' own, `id2label` as numbers to names and `label2id` after it."""
        if options.get("id2label") is not None:
            names = names_by_number(options["id2label"])
            return {**options, "id2label": names, "label2id": options.get("label2id") or numbers_by_name(names)}
        return options

    @classmethod
    def arguments(cls) -> set[str]:
        """Names of the arguments that the configuration takes, transformers' own left out."""
        ours = [kind for kind in cls.__mro__ if issubclass(kind, NamedClasses) and issubclass(kind, PreTrainedConfig)]
        return {name for kind in ours for name in inspect.signature(kind).parameters} - {"more"}

    @classmethod
    def refuse_unknown(cls, overrides: Iterable[str]) -> None:
        """Refuse what neither the configuration nor transformers has; see the function `refuse_unknown`."""
        refuse_unknown(cls.__name__, overrides, cls.arguments())


def refuse_unknown(owner: str, overrides: Iterable[str], known: Iterable[str]) -> None:
    """Refuse options that a configuration does not have.

    Args:
        owner: what the message begins with.
        overrides: names of options.
        known: names that it has; what every configuration of transformers has is known too.

    Raises:
        ValueError: an unknown name; the message offers the nearest known one.
    """
    names, shared = sorted(known), PreTrainedConfig()
    for override in overrides:
        if override in names or not callable(getattr(shared, override, print)):
            continue
        near = [RENAMED[override]] if override in RENAMED else difflib.get_close_matches(override, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(names)}."
        raise ValueError(f"{owner} has no {override}; {hint}")


class EMOv2Config(NamedClasses, BackboneConfigMixin, PreTrainedConfig):
    """Configuration of an EMOv1 or EMOv2 network; `EMOv2Config.of("EMOv2-5M")` gives the published sizes.

    Args:
        image_size: side of the images that it is for, in pixels.
        num_channels: of the images.
        out_features, out_indices: stages that `EMOv2Backbone` returns, of "stem", "stage1" to "stage4".
        **more: transformers' own, `num_labels` and `id2label` among them; the latter may be a list of names, and
            `label2id` follows from it.

    The others are those of `EMOv2`.

    Raises:
        ValueError: names of classes that are no list, or whose numbers are not 0, 1, 2 and so on.
    """

    model_type = "emov2"

    @checked(CLASSIFIER, stages_agree)
    def __init__(
        self,
        version: int = 2,
        depths: Any = (3, 3, 9, 3),
        widths: Any = (48, 72, 160, 288),
        expansions: Any = (2.0, 3.0, 4.0, 4.0),
        head_dims: Any = (16, 24, 32, 32),
        kernel_sizes: Any = (5, 5, 5, 5),
        num_channels: int = 3,
        stem_dim: int | None = None,
        window_size: int = 7,
        clip_window: bool = False,
        attention_type: str = "spanning",
        attending_stages: Any = (3, 4),
        local: str = "conv",
        dilation: int = 1,
        arrangement: str = "cascaded",
        norms: Any = ("batch", "batch", "layer", "layer"),
        activations: Any = ("silu", "silu", "gelu", "gelu"),
        layer_scale: float | None = 1e-6,
        drop_path: float = 0.05,
        output_stride: int = 32,
        image_size: int = 224,
        out_features: list[str] | None = None,
        out_indices: list[int] | None = None,
        **more: Any,
    ):
        # The Auto classes find a model by its configuration, so that the models are registered before there is one.
        # Not before: this module is imported in the middle of transformers' own import.
        import_module("d_emo.classification.transformers_models")
        super().__init__(**self.named(more))
        self.version = version
        self.depths = list(depths)
        self.widths = list(widths)
        self.expansions = list(expansions)
        self.head_dims = list(head_dims)
        self.kernel_sizes = list(kernel_sizes)
        self.num_channels = num_channels
        self.stem_dim = stem_dim
        self.window_size = window_size
        self.clip_window = clip_window
        self.attention_type = attention_type
        self.attending_stages = list(attending_stages)
        self.local = local
        self.dilation = dilation
        self.arrangement = arrangement
        self.norms = list(norms)
        self.activations = list(activations)
        self.layer_scale = layer_scale
        self.drop_path = drop_path
        self.output_stride = output_stride
        self.image_size = image_size
        self.stage_names = ["stem", *(f"stage{number}" for number in range(1, len(self.depths) + 1))]
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)

    @classmethod
    def of(cls, name: str, image_size: int = 224, **overrides: Any) -> "EMOv2Config":
        """The configuration of a published size.

        Args:
            name: one of `d_emo.list_classifiers()`.
            image_size: side of the images, which decides the window.
            **overrides: any argument of the configuration.

        Raises:
            ValueError: the name is unknown, or an override that neither the configuration nor transformers has.
        """
        cls.refuse_unknown(overrides)
        from d_emo.classification.variants import classifier_config

        return cls(**{**classifier_config(name, image_size), "image_size": image_size, **overrides})

    def build(self, num_classes: int) -> "EMOv2":
        """The network, with fresh weights."""
        from d_emo.classification.emov2 import EMOv2

        return EMOv2(
            **{name: getattr(self, name) for name in NETWORK_ARGUMENTS},
            num_classes=num_classes,
            in_channels=self.num_channels,
        )


def names_by_number(names: Any) -> dict[int, str]:
    """`id2label` as transformers has it.

    Args:
        names: a list of names, or names by the numbers 0, 1, 2 and so on, which may be strings (as in JSON).

    Raises:
        ValueError: it is neither.
    """
    rule = "pass a list of names, or a dictionary from 0, 1, 2 and so on to names"
    if isinstance(names, list | tuple):
        names = dict(enumerate(names))
    if not isinstance(names, Mapping):
        raise ValueError(f"id2label is a {type(names).__name__}; {rule}.")
    whole = all(isinstance(number, int) or str(number).isdecimal() for number in names)
    numbered = {int(number): str(name) for number, name in names.items()} if whole else {}
    if sorted(numbered) != list(range(len(names))):
        raise ValueError(f"id2label has the numbers {', '.join(map(str, list(names)[:4]))}; {rule}.")
    return dict(sorted(numbered.items()))


def numbers_by_name(names: Mapping[int, str]) -> dict[str, int]:
    """`label2id` of an `id2label`."""
    return {name: number for number, name in names.items()}
