"""Networks of images and clips in formats that run without this package: ONNX, torch.export, Core ML.

    from d_emo.export import OnnxModel, save_onnx
    save_onnx(create_segmenter("EMOv2-5M"), (384, 512), "segmenter.onnx")
    logits = OnnxModel("segmenter.onnx")(pixel_values)                      # (B, C, 384, 512) -> (B, 150, 12, 16)

Every format holds the network alone, normalised `pixel_values` in, `logits` out, for any B (Core ML: one):

- a classifier: (B, C, H, W) -> (B, K); a video classifier: (B, T, C, H, W) -> (B, K)
- a segmenter: (B, C, H, W) -> (B, K, h, w), the head's own grid
- a detector, RetinaNet or SSDLite of torchvision's classes: (B, C, H, W) -> `logits` (B, A, K) as the head gives them,
  and `boxes` (B, A, 4) as (x1, y1, x2, y2) in the file's pixels, one of each anchor; what follows, scores and
  suppression, is the caller's, since its numbers of boxes depend on the picture

The image processor that goes with a saved model says how pixels become its input; a detector's is its `transform`.
Channels and type of numbers are the model's, but that bfloat16 and float64 become float32 in ONNX, whose runtimes lack
them, and Core ML files are float16. Extras: `export` (ONNX), `coreml`.
"""

from d_emo.export.files import FORMATS, as_in_file, export_program, save_coreml, save_onnx, save_program
from d_emo.export.inputs import ImageSize, example_images, frames_of
from d_emo.export.networks import Candidates, Logits, as_network
from d_emo.export.onnx_model import OnnxModel

__all__ = [
    "FORMATS",
    "Candidates",
    "ImageSize",
    "Logits",
    "OnnxModel",
    "as_in_file",
    "as_network",
    "example_images",
    "export_program",
    "frames_of",
    "save_coreml",
    "save_onnx",
    "save_program",
]
