"""A written ONNX file, run."""

import os

import torch

from d_emo.common.messages import first_line
from d_emo.common.ranges import checked
from d_emo.export.files import path_of_file
from d_emo.export.inputs import EXPORT, INPUT
from d_emo.export.networks import BOXES, OUTPUT


class OnnxModel:
    """An ONNX file in onnxruntime on the CPU.

    Args:
        path: of a file that `save_onnx` wrote.
        threads: None for onnxruntime's choice.

    Attributes:
        names: of what it gives: "logits", and of a detector "boxes" too.

    Raises:
        ValueError: there is no such file, or it is none of `save_onnx`.
        ImportError: the extra is missing.
    """

    @checked(EXPORT)
    def __init__(self, path: str | os.PathLike, threads: int | None = None):
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError("ONNX needs onnxruntime; pip install 'd-emo[export]'.") from error
        path = path_of_file(path)
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file.")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        # Its threads would spin between two calls, and take the cores from whatever runs then.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's have no class of their own
            raise ValueError(f"{path}: not an ONNX file that runs here ({first_line(error)}).") from error
        inputs = {given.name: given for given in self.session.get_inputs()}
        outputs = [given.name for given in self.session.get_outputs()]
        if set(inputs) != {INPUT} or OUTPUT not in outputs:
            raise ValueError(f"{path}: it has no input {INPUT} and output {OUTPUT}; pass a file that save_onnx wrote.")
        self.names = (OUTPUT, BOXES) if BOXES in outputs else (OUTPUT,)
        self.shape = inputs[INPUT].shape
        self.dtype = torch.float16 if inputs[INPUT].type == "tensor(float16)" else torch.float32

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Images (B, C, H, W) or clips (B, T, C, H, W), normalised, of any type of numbers -> what the file gives.

        Returns:
            Logits (B, K), or of a segmenter (B, K, h, w); of a detector logits (B, A, K) and boxes (B, A, 4).

        Raises:
            ValueError: no tensor, or the file is for images of another shape.
        """
        if not isinstance(pixels, torch.Tensor):
            raise ValueError(f"pixels is a {type(pixels).__name__}; pass a tensor (torch.from_numpy makes one).")
        given = tuple(pixels.shape)
        same = len(given) == len(self.shape)
        if not (same and given[0] and given[1:] == tuple(self.shape[1:])):
            wanted = ", ".join(map(str, self.shape[1:]))
            raise ValueError(f"pixels have the shape {given}, the file takes (B, {wanted}).")
        made = self.session.run(list(self.names), {INPUT: pixels.detach().cpu().to(self.dtype).numpy()})
        tensors = tuple(map(torch.from_numpy, made))
        return tensors if len(tensors) > 1 else tensors[0]
