"""Classifiers in formats that run without this package; see `d_emo.classification.export`."""

from d_emo.classification.export import (
    FORMATS,
    Logits,
    OnnxModel,
    as_in_file,
    example_images,
    export_program,
    save_coreml,
    save_onnx,
    save_program,
)

__all__ = [
    "FORMATS",
    "Logits",
    "OnnxModel",
    "as_in_file",
    "example_images",
    "export_program",
    "save_coreml",
    "save_onnx",
    "save_program",
]
