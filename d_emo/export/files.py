"""Files of networks: what is exported, and how it is written."""

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

from d_emo.common.files import written_folder, written_whole
from d_emo.common.messages import first_line
from d_emo.common.ranges import checked
from d_emo.export.inputs import EXPORT, INPUT, ImageSize, example_images
from d_emo.export.networks import BOXES, OUTPUT, as_network
from d_emo.kernels import use_backend

FORMATS = ("onnx", "torch", "coreml")
# Exporting with this many images; one would make the exporters take the batch for a constant.
EXAMPLE_BATCH = 2
# Types of numbers that a format, or what runs it, has no layers for; float32 takes their place.
LACKING = {"onnx": (torch.bfloat16, torch.float64), "coreml": (torch.bfloat16, torch.float16, torch.float64)}


def as_in_file(model: nn.Module, kind: str) -> nn.Module:
    """The model in the type of numbers that a file of a format has: itself, or a copy in float32.

    Args:
        model: a classifier, a segmenter or a detector.
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
    model: nn.Module, image_size: ImageSize, batch_size: int | None = None, num_frames: int | None = None
) -> torch.export.ExportedProgram:
    """The network's graph in plain PyTorch operations.

    Args:
        model: a classifier, a segmenter or a detector; it is exported in eval mode, and left in the mode that it is in.
        image_size: side of its images in pixels, or height and width; fixed in the graph.
        batch_size: fixed in the graph; None for any.
        num_frames: of a video classifier's clips, fixed in the graph; None for what its configuration names.

    Raises:
        ValueError: a value out of range, or nothing that can be exported.
    """
    batch = EXAMPLE_BATCH if batch_size is None else batch_size
    example = example_images(model, image_size, batch, num_frames=num_frames)
    shapes = {INPUT: {0: torch.export.Dim("batch")}} if batch_size is None else None
    # The fast kernels are this package's own operations; a file must do without them.
    with _in_eval_mode(model), use_backend("reference"), torch.no_grad():
        network = as_network(model, example)
        network(example)  # what it refuses, it refuses here in its own words
        return torch.export.export(network, (example,), dynamic_shapes=shapes)


def path_of_file(path: Any) -> Path:
    """A path, or one line that says it is none."""
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise ValueError(f"path={path!r} is no path of a file.")
    return Path(path)


def save_program(
    model: nn.Module, image_size: ImageSize, path: str | os.PathLike, num_frames: int | None = None
) -> None:
    """Write a `.pt2` file; `torch.export.load(path).module()(pixels)` runs it. Arguments as of `export_program`."""
    path = path_of_file(path)
    program = export_program(model, image_size, num_frames=num_frames)
    buffer = io.BytesIO()  # PyTorch's own writer says nothing of a full disk but that it failed
    torch.export.save(program, buffer)
    with written_whole(path) as partial:
        partial.write_bytes(buffer.getbuffer())


def save_onnx(model: nn.Module, image_size: ImageSize, path: str | os.PathLike, num_frames: int | None = None) -> None:
    """Write an `.onnx` file with the input `pixel_values` and the output `logits` (of a detector `boxes` too).

    Arguments as of `export_program`.

    Raises:
        ImportError: the extra is missing.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("ONNX needs onnx and onnxscript; pip install 'd-emo[export]'.") from error
    path = path_of_file(path)
    graph = export_program(as_in_file(model, "onnx"), image_size, num_frames=num_frames)
    program = torch.onnx.export(
        graph, input_names=[INPUT], output_names=_outputs_of(graph), dynamic_shapes=({0: "batch"},), dynamo=True,
        verbose=False,
    )  # fmt: skip
    assert program is not None
    with written_whole(path) as partial:
        program.save(str(partial), external_data=False)


def save_coreml(
    model: nn.Module, image_size: ImageSize, path: str | os.PathLike, num_frames: int | None = None
) -> None:
    """Write an `.mlpackage` folder for a batch of one, in half precision. Arguments as of `export_program`.

    Raises:
        ValueError: the path ends otherwise.
        ImportError: the extra is missing.
    """
    try:
        import coremltools
    except ImportError as error:
        raise ImportError("Core ML needs coremltools; pip install 'd-emo[coreml]'.") from error
    path = path_of_file(path)
    if path.suffix != ".mlpackage":
        raise ValueError(f"path={str(path)!r} is no .mlpackage; Core ML's folders end so.")
    program = export_program(as_in_file(model, "coreml"), image_size, 1, num_frames).run_decompositions({})
    _drop_aliases(program)
    try:
        converted: Any = coremltools.convert(
            program,
            outputs=[coremltools.TensorType(name) for name in _outputs_of(program)],
            minimum_deployment_target=coremltools.target.iOS16,
        )
        with written_folder(path) as partial:
            converted.save(str(partial))
    except RuntimeError as error:
        room = f"is there room in {path.parent} and in {tempfile.gettempdir()}?"
        raise ValueError(f"{path}: Core ML's converter failed ({first_line(error)}); {room}") from error


def _outputs_of(program: torch.export.ExportedProgram) -> list[str]:
    """The names of what a network gives."""
    return [OUTPUT, BOXES][: len(program.graph_signature.user_outputs)]


def _drop_aliases(program: torch.export.ExportedProgram) -> None:
    """Take out `alias`, which does nothing and which coremltools 9 does not know."""
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.alias.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
