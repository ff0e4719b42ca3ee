"""Which image processors of transformers belong to a configuration of ours."""

from typing import Any

import transformers
from transformers.utils import is_torchvision_available


def register_image_processor(config: type[transformers.PreTrainedConfig], family: str) -> None:
    """Make AutoImageProcessor find a family of processors; again after a reload, which makes new classes.

    Args:
        config: class of the configurations that they are for.
        family: how the processors' names begin, "Bit". The one on torchvision is named only where torchvision is:
            transformers warns of it elsewhere.
    """
    on_torchvision: Any = getattr(transformers, f"{family}ImageProcessor") if is_torchvision_available() else None
    transformers.AutoImageProcessor.register(
        config, slow_image_processor_class=getattr(transformers, f"{family}ImageProcessorPil"),
        fast_image_processor_class=on_torchvision, exist_ok=True,
    )  # fmt: skip
