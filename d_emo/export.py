"""Classifiers in formats that run without this package; see `d_emo.classification.export`."""

from d_emo.classification.export import (
    FORMATS,
    Logits,
    OnnxModel,
    export_program,
    save_coreml,
    save_onnx,
    save_program,
)

__all__ = ["FORMATS", "Logits", "OnnxModel", "export_program", "save_coreml", "save_onnx", "save_program"]
