"""A classifier as a file that runs without this package: ONNX, torch.export, Core ML.

Every format holds the network alone, (B, C, H, W) normalised pixels -> logits (B, K), for any B (Core ML: one image);
the image processor that goes with a saved model says how pixels become its input. Channels and type of numbers are the
model's, but that bfloat16 and float64 become float32 in ONNX, whose runtimes lack them, and Core ML files are float16.
Extras: `export` (ONNX), `coreml`.
"""

import copy
import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from d_emo.common.block_ranges import SIDE
from d_emo.common.files import written_folder, written_whole
from d_emo.common.messages import first_line
from d_emo.common.ranges import Maybe, OneOrPair, Table, Whole, checked
from d_emo.kernels import use_backend

FORMATS = ("onnx", "torch", "coreml")
INPUT, OUTPUT = "pixel_values", "logits"
# Exporting with this many images; one would make the exporters take the batch for a constant.
EXAMPLE_BATCH = 2
# Types of numbers that a format, or what runs it, has no layers for; float32 takes their place.
LACKING = {"onnx": (torch.bfloat16, torch.float64), "coreml": (torch.bfloat16, torch.float16, torch.float64)}
EXPORT: Table = {"image_size": OneOrPair(SIDE), "batch_size": Maybe(Whole(1, 65_536)),
                 "threads": Maybe(Whole(1, 1024))}  # fmt: skip
ImageSize = int | tuple[int, int]


class Logits(nn.Module):
    """A classifier of transformers, or a plain network, with a tensor in and a tensor out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> logits (B, K).

        Raises:
            ValueError: the model has no logits.
        """
        output = self.model(pixel_values)
        logits = output if isinstance(output, torch.Tensor) else getattr(output, OUTPUT, None)
        if logits is None:
            raise ValueError(f"model is a {type(self.model).__name__}, which gives no logits; pass a classifier.")
        return logits


@checked(EXPORT)
def example_images(model: nn.Module, image_size: ImageSize, batch_size: int, seed: int = 0) -> torch.Tensor:
    """Random images as a model takes them: its channels, type of numbers and device, (B, C, H, W).

    Args:
        model: a classifier.
        image_size: side in pixels, or height and width.
        batch_size: images B.
        seed: of the random numbers.

    Raises:
        ValueError: a value out of range, or no network of images.
    """
    height, width = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}; pass a classifier (torch.nn.Module).")
    like = next(model.parameters(), None)
    if like is None:
        raise ValueError(f"model is a {type(model).__name__} without parameters; pass a classifier.")
    # Drawn in float32 on the CPU, the images are the same for every type and device.
    images = torch.randn(
        batch_size, image_channels(model), height, width, generator=torch.Generator().manual_seed(seed)
    )
    return images.to(like.device, like.dtype)


def image_channels(model: nn.Module) -> int:
    """Channels of a network's images: as its configuration says, or its first convolution."""
    for holder, name in ((getattr(model, "config", None), "num_channels"), (model, "in_chans")):
        if isinstance(channels := getattr(holder, name, None), int):
            return channels
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None:
        raise ValueError(f"model is a {type(model).__name__} without a convolution; pass a classifier of images.")
    return first.in_channels


def as_in_file(model: nn.Module, kind: str) -> nn.Module:
    """The model in the type of numbers that a file of a format has: itself, or a copy in float32.

    Args:
        model: a classifier.
        kind: one of `FORMATS`.
    """
    dtype = next((parameter.dtype for parameter in model.parameters()), None)
    return copy.deepcopy(model).to(torch.float32) if dtype in LACKING.get(kind, ()) else model


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Leave every module in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@checked(EXPORT)
def export_program(
    model: nn.Module, image_size: ImageSize, batch_size: int | None = None
) -> torch.export.ExportedProgram:
    """The network's graph in plain PyTorch operations.

    Args:
        model: a classifier; it is exported in eval mode, and left in the mode that it is in.
        image_size: side of its images in pixels, or height and width; fixed in the graph.
        batch_size: fixed in the graph; None for any.

    Raises:
        ValueError: a value out of range, or no classifier of images.
    """
    example = example_images(model, image_size, EXAMPLE_BATCH if batch_size is None else batch_size)
    shapes = {INPUT: {0: torch.export.Dim("batch")}} if batch_size is None else None
    # The fast kernels are this package's own operations; a file must do without them.
    with _in_eval_mode(model), use_backend("reference"), torch.no_grad():
        network = Logits(model).eval()
        network(example)  # what it refuses, it refuses here in its own words
        return torch.export.export(network, (example,), dynamic_shapes=shapes)


def _file(path: Any) -> Path:
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise ValueError(f"path={path!r} is no path of a file.")
    return Path(path)


def save_program(model: nn.Module, image_size: ImageSize, path: str | os.PathLike) -> None:
    """Write a `.pt2` file; `torch.export.load(path).module()(pixels)` runs it. Arguments as of `export_program`."""
    path = _file(path)
    program = export_program(model, image_size)
    buffer = io.BytesIO()  # PyTorch's own writer says nothing of a full disk but that it failed
    torch.export.save(program, buffer)
    with written_whole(path) as partial:
        partial.write_bytes(buffer.getbuffer())


def save_onnx(model: nn.Module, image_size: ImageSize, path: str | os.PathLike) -> None:
    """Write an `.onnx` file with the input `pixel_values` and the output `logits`. Arguments as of `export_program`.

    Raises:
        ImportError: the extra is missing.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("ONNX needs onnx and onnxscript; pip install 'd-emo[export]'.") from error
    path = _file(path)
    graph = export_program(as_in_file(model, "onnx"), image_size)
    program = torch.onnx.export(graph, input_names=[INPUT], output_names=[OUTPUT], dynamo=True, verbose=False)
    assert program is not None
    with written_whole(path) as partial:
        program.save(str(partial), external_data=False)


def save_coreml(model: nn.Module, image_size: ImageSize, path: str | os.PathLike) -> None:
    """Write an `.mlpackage` folder for a batch of one, in half precision. Arguments as of `export_program`.

    Raises:
        ValueError: the path ends otherwise.
        ImportError: the extra is missing.
    """
    try:
        import coremltools
    except ImportError as error:
        raise ImportError("Core ML needs coremltools; pip install 'd-emo[coreml]'.") from error
    path = _file(path)
    if path.suffix != ".mlpackage":
        raise ValueError(f"path={str(path)!r} is no .mlpackage; Core ML's folders end so.")
    program = export_program(as_in_file(model, "coreml"), image_size, batch_size=1).run_decompositions({})
    _drop_aliases(program)
    try:
        converted: Any = coremltools.convert(
            program,
            outputs=[coremltools.TensorType(OUTPUT)],
            minimum_deployment_target=coremltools.target.iOS16,
        )
        with written_folder(path) as partial:
            converted.save(str(partial))
    except RuntimeError as error:
        room = f"is there room in {path.parent} and in {tempfile.gettempdir()}?"
        raise ValueError(f"{path}: Core ML's converter failed ({first_line(error)}); {room}") from error


def _drop_aliases(program: torch.export.ExportedProgram) -> None:
    """Take out `alias`, which does nothing and which coremltools 9 does not know."""
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.alias.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


class OnnxModel:
    """An ONNX file in onnxruntime on the CPU.

    Args:
        path: of a file that `save_onnx` wrote.
        threads: None for onnxruntime's choice.

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
        path = _file(path)
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
        if set(inputs) != {INPUT} or OUTPUT not in [given.name for given in self.session.get_outputs()]:
            raise ValueError(f"{path}: it has no input {INPUT} and output {OUTPUT}; pass a file that save_onnx wrote.")
        self.shape = inputs[INPUT].shape
        self.dtype = torch.float16 if inputs[INPUT].type == "tensor(float16)" else torch.float32

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W), normalised, of any type of numbers -> logits (B, K).

        Raises:
            ValueError: the file is for images of another shape.
        """
        given = tuple(pixels.shape)
        fits = len(given) == 4 and all(size == wanted for size, wanted in zip(given[1:], self.shape[1:], strict=True))
        if not fits or not given[0]:
            wanted = ", ".join(map(str, self.shape[1:]))
            raise ValueError(f"pixels have the shape {given}, the file takes (B, {wanted}).")
        return torch.from_numpy(self.session.run([OUTPUT], {INPUT: pixels.detach().cpu().to(self.dtype).numpy()})[0])
