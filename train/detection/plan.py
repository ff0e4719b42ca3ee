"""From options to everything a detector's run needs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from d_emo.classification.variants import CLASSIFIERS
from d_emo.common.messages import first_line
from d_emo.common.saved_folders import CLASSIFIER, LOADING_ERRORS, OBJECTS, may_be_on_hub, refuse_other_tasks
from d_emo.detection.saved import DetectorBundle, is_detector, load_detector, make_detector
from d_emo.images.coco import ObjectSource
from d_emo.train.detection.augmentation import Augmentation
from d_emo.train.detection.config import DetectorConfig, DetectorOptions
from d_emo.train.engine.task_plan import (
    A_SIZE,
    TaskPlan,
    named_start,
    refuse_bfloat16_on_cpu,
    resolved_length,
    start_name,
)

SYSTEM = "retinanet"
# SSDLite halves the last stage's grid four times more: up to this side its smallest map is one value a channel.
SINGLE_VALUE_SIDE = 512


@dataclass(frozen=True, kw_only=True)
class DetectorPlan(TaskPlan):
    """A run, resolved; there is no processor, as detectors prepare pictures themselves.

    Attributes:
        system: "ssdlite", "retinanet" or "mask_rcnn".
        settings: of the detector, as its folder's config.json will say them.
        augmentation: what becomes of a training picture.
    """

    config: DetectorConfig
    source: ObjectSource
    validation: ObjectSource | None
    system: str
    settings: dict[str, Any]
    augmentation: Augmentation

    @property
    def model_name(self) -> str:
        """See `TaskPlan.model_name`."""
        return model_name(self.config.model, self.system)

    def build_model(self) -> Any:
        """See `TaskPlan.build_model`."""
        return build_detector(self.config.model, self.system, self.source.id2label).model

    def lines(self, model: Any) -> dict[str, str]:
        """See `TaskPlan.lines`."""
        options, settings = self.settings["options"], self.settings
        if self.system == "ssdlite":
            side = model.transform.fixed_size[0]
            sizes = f"{side} x {side} pixels whatever the ratio"
        else:
            short = options["min_size"]
            sizes = f"short side {short}, long side at most {options['max_size']} pixels"
        stages = settings["frozen_stages"]
        frozen = f"the stem and {stages} stage{'s' if stages > 1 else ''}" if stages else "nothing"
        statistics = "are fixed" if settings["fixed_statistics"] else "move"
        return {
            "images": sizes,
            "augment": self.augmentation.describe(),
            "frozen": f"{frozen}; the backbone's BatchNorm statistics {statistics}",
        }


def make_detector_plan(
    config: DetectorConfig, source: ObjectSource, validation: ObjectSource | None, accelerator: Accelerator
) -> DetectorPlan:
    """Resolve every default and check that the parts fit.

    Raises:
        ValueError: they do not; the message names the option and the remedy.
    """
    length = resolved_length(config, source, accelerator, config.optimization.asked_warmup)
    system = system_of(config.model)
    bundle = build_detector(config.model, system, source.id2label)
    model: Any = bundle.model
    side = model.transform.fixed_size[0] if system == "ssdlite" else None
    micro = length["layout"].micro_batch_size
    if side is not None and micro < 2 and side <= SINGLE_VALUE_SIDE:
        raise ValueError(
            f"--system ssdlite at {side} pixels ends in a map of one pixel, which BatchNorm cannot train on with one "
            "image at once; use a --micro-batch-size of 2 or more."
        )
    if system != "mask_rcnn":
        strided = "its last maps may be of one pixel, of which PyTorch's strided convolutions"
        refuse_bfloat16_on_cpu(accelerator, strided, f"--system {system}")
    return DetectorPlan(
        config=config,
        source=source,
        validation=validation,
        processor=None,
        output_dir=config.run.folder(model_name(config.model, system), source.name),
        system=system,
        settings=bundle.settings,
        augmentation=Augmentation(
            config.augmentation, side, model.transform.image_mean, system == "mask_rcnn", config.run.seed
        ),
        **length,
    )


def system_of(options: DetectorOptions) -> str:
    """--system, or that of a detector that --init-from names.

    Raises:
        ValueError: the detector is another system.
    """
    if not (options.init_from and _is_detector(options.init_from)):
        return options.system or SYSTEM
    own = _loaded(options.init_from).system
    if options.system not in (None, own):
        raise ValueError(f"--init-from {options.init_from} is a detector {own}; leave out --system {options.system}.")
    return own


def build_detector(options: DetectorOptions, system: str, id2label: dict[int, str]) -> DetectorBundle:
    """The detector of these options: fresh, on a trained backbone, or a trained one for these classes.

    Raises:
        ValueError: no such network, options that it does not take, or weights that do not load.
    """
    asked: dict[str, Any] = {
        **options.settings(),
        **options.sizes(system),
        "network": options.overrides(),
        "frozen_stages": options.frozen_stages,
        "fixed_statistics": options.fixed_statistics,
    }
    try:
        if options.init_from in CLASSIFIERS and not Path(options.init_from).is_dir():
            raise ValueError(A_SIZE)
        refuse_other_tasks(options.init_from, OBJECTS, CLASSIFIER)
        if options.init_from and _is_detector(options.init_from):
            return _loaded(options.init_from).with_classes(id2label, **asked)
        return make_detector(system, options.init_from or options.model, id2label, **asked)
    except LOADING_ERRORS as error:
        said = str(error) if isinstance(error, ValueError) else first_line(error)
        raise ValueError(f"{named_start(options)}: {said}") from error


def model_name(options: DetectorOptions, system: str) -> str:
    """What to call a detector."""
    name = start_name(options)
    return name if name.endswith(system) else f"{name}-{system}"


def _is_detector(name: str) -> bool:
    """Whether --init-from names a detector: a folder's config.json says so, or the Hub's."""
    if Path(name).exists() or not may_be_on_hub(name):
        return is_detector(name)
    from huggingface_hub import hf_hub_download

    try:
        return is_detector(Path(hf_hub_download(name, "config.json")).parent)
    except (OSError, ValueError, RuntimeError):
        return False  # `make_detector` says what is wrong with it


def _loaded(name: str) -> DetectorBundle:
    try:
        return load_detector(name)
    except ValueError as error:
        raise ValueError(f"--init-from {error}") from error
