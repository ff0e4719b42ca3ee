"""What a run starts from: fresh weights, an image classifier's that are inflated, or a trained video classifier's."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from d_emo.classification.checkpoint_files import read_classifier
from d_emo.classification.emov2 import EMOv2, initialize
from d_emo.classification.published import import_classifier
from d_emo.classification.transformers_config import EMOv2Config
from d_emo.classification.transformers_models import EMOv2ForImageClassification
from d_emo.classification.variants import create_classifier
from d_emo.common.messages import first_line
from d_emo.common.options import blamed
from d_emo.common.saved_folders import (
    CLASSIFIER,
    LOADING_ERRORS,
    VIDEO_CLASSIFIER,
    kind_of,
    may_be_on_hub,
    refuse_other_tasks,
)
from d_emo.train.engine.task_plan import named_start
from d_emo.train.video.config import VideoModelOptions
from d_emo.video.inflation import inflate
from d_emo.video.processing import VEMOv2VideoProcessor, make_video_processor
from d_emo.video.sizes import VIDEO_CLASSIFIERS
from d_emo.video.transformers_config import NETWORK_ARGUMENTS, VEMOv2Config
from d_emo.video.transformers_models import VEMOv2ForVideoClassification

FRAMES, RESOLUTION = 4, 160
# What an image classifier's configuration says that holds for the video classifier of its size, too.
SHARED = (
    "depths", "widths", "expansions", "head_dims", "kernel_sizes", "num_channels", "stem_dim", "attention_type",
    "attending_stages", "norms", "activations", "layer_scale",
)  # fmt: skip


@dataclass(frozen=True)
class Start:
    """Where the weights of a run come from, looked up.

    Attributes:
        options: of the model.
        config: of what --init-from names; None for fresh weights and for a file.
    """

    options: VideoModelOptions
    config: EMOv2Config | VEMOv2Config | None

    @property
    def of_video(self) -> bool:
        """Whether a trained video classifier is trained further."""
        return isinstance(self.config, VEMOv2Config)

    @property
    def frames(self) -> int:
        """Of a clip."""
        return self.options.frames or (self.config.num_frames if isinstance(self.config, VEMOv2Config) else FRAMES)

    @property
    def resolution(self) -> int:
        """Side of the frames in pixels."""
        own = self.config.image_size if isinstance(self.config, VEMOv2Config) else RESOLUTION
        return self.options.resolution or own

    def describe(self) -> str:
        """For people."""
        if self.options.init_from is None:
            return "fresh weights"
        how = "trained further" if self.of_video else "kernels inflated in time"
        return f"{self.options.init_from}, {how}"

    def processor(self) -> VEMOv2VideoProcessor:
        """What prepares clips for validation and use; a trained video classifier's mean and deviation are kept.

        Raises:
            ValueError: that has no video processor.
        """
        processor = make_video_processor(self.resolution, self.frames)
        if self.of_video:
            with blamed(named_start(self.options), *LOADING_ERRORS):
                former: Any = VEMOv2VideoProcessor.from_pretrained(str(self.options.init_from))
            processor.image_mean, processor.image_std = list(former.image_mean), list(former.image_std)
        return processor

    def build(self, id2label: dict[int, str]) -> VEMOv2ForVideoClassification:
        """The network for these classes; the head is new but where all their names are those of --init-from.

        Raises:
            ValueError: no such size, overrides that it does not take, or weights that do not load or fit.
        """
        labels: dict[str, Any] = {"id2label": id2label, "label2id": {name: number for number, name in id2label.items()}}
        more = {**labels, "num_frames": self.frames, "image_size": self.resolution}
        options = self.options
        with blamed(named_start(options), *LOADING_ERRORS):
            if options.init_from is None:
                return VEMOv2ForVideoClassification(VEMOv2Config.of(options.model, **{**more, **options.overrides()}))
            return self._further(more) if self.of_video else self._inflated(more)

    def _further(self, more: dict[str, Any]) -> VEMOv2ForVideoClassification:
        model: Any = VEMOv2ForVideoClassification.from_pretrained(str(self.options.init_from), dtype=torch.float32)
        if model.config.id2label != more["id2label"]:
            renew_head(model, len(more["id2label"]))
        for name, value in more.items():
            setattr(model.config, name, value)
        return model

    def _inflated(self, more: dict[str, Any]) -> VEMOv2ForVideoClassification:
        name, overrides = str(self.options.init_from), self.options.overrides()
        images: EMOv2 | EMOv2ForImageClassification
        if isinstance(self.config, EMOv2Config):
            shared = {field: getattr(self.config, field) for field in SHARED}
            config = VEMOv2Config(**{**shared, **more, **overrides})
            images, same = name, self.config.id2label == more["id2label"]  # type: ignore[assignment]
        else:
            size, num_classes, state = read_classifier(Path(name))
            if f"V-{size}" not in VIDEO_CLASSIFIERS:
                raise ValueError(
                    f"it is an {size}, of which there is no video classifier; pass one of "
                    f"{', '.join(known.removeprefix('V-') for known in VIDEO_CLASSIFIERS)}."
                )
            config = VEMOv2Config.of(f"V-{size}", **{**more, **overrides})
            images, same = create_classifier(size, num_classes=num_classes), False
            import_classifier(state, images)
        model = VEMOv2ForVideoClassification(config)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* newly initialised")  # of the head, which is to be trained
            inflate(model, images)
        if not same:
            renew_head(model, len(more["id2label"]))
        return model


def renew_head(model: Any, num_classes: int) -> None:
    """Give a video classifier a fresh head."""
    network = model.v_emov2
    network.head = nn.Linear(network.widths[-1], num_classes)
    network.head.apply(initialize)
    network.num_classes = num_classes


def look_up(options: VideoModelOptions) -> Start:
    """What --init-from names.

    Raises:
        ValueError: it is nothing that a video classifier starts from, or --model-config does not go with it.
    """
    name = options.init_from
    unknown = [override for override in options.overrides() if override not in NETWORK_ARGUMENTS]
    if unknown:
        raise ValueError(f"--model-config has {unknown}; choose from {', '.join(NETWORK_ARGUMENTS)}.")
    if name is None or Path(name).is_file():
        return Start(options, None)
    if not Path(name).is_dir() and not may_be_on_hub(name):
        raise ValueError(
            f"--init-from {name}: there is no such folder or file; pass a trained EMOv2 or V-EMOv2 (folder or "
            "Hub id), or a published .pth."
        )
    with blamed(named_start(options)):
        refuse_other_tasks(name, VIDEO_CLASSIFIER, CLASSIFIER)
    try:
        config: Any = AutoConfig.from_pretrained(name)
    except LOADING_ERRORS as error:
        raise ValueError(f"--init-from {name} does not load as EMOv2 or V-EMOv2 ({first_line(error)}).") from error
    if not isinstance(config, EMOv2Config | VEMOv2Config):
        raise ValueError(f"--init-from {name} holds {kind_of(config.to_dict())}; pass a trained EMOv2 or V-EMOv2.")
    if isinstance(config, VEMOv2Config) and options.overrides():
        raise ValueError(
            f"--model-config {options.model_config}: the network of --init-from {name} is what it is; leave one out."
        )
    return Start(options, config)
