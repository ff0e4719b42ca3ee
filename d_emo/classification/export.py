"""A classifier as a file that runs without this package: ONNX, torch.export, Core ML.

Every format holds the network alone, (B, 3, H, W) normalised pixels -> logits (B, K), for any B (Core ML: one image);
the image processor that goes with a saved model says how pixels become its input. Extras: `export` (ONNX), `coreml`.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from d_emo.common.files import partial_path, replace_folder, written_whole
from d_emo.kernels import use_backend

FORMATS = ("onnx", "torch", "coreml")
INPUT, OUTPUT = "pixel_values", "logits"
# Exporting with this many images; one would make the exporters take the batch for a constant.
EXAMPLE_BATCH = 2


class Logits(nn.Module):
    """A classifier of transformers, or a plain network, with a tensor in and a tensor out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> logits (B, K)."""
        output = self.model(pixel_values)
        return output if isinstance(output, torch.Tensor) else output.logits


def export_program(model: nn.Module, image_size: int, batch_size: int | None = None) -> torch.export.ExportedProgram:
    """The network's graph in plain PyTorch operations.

    Args:
        model: a classifier; it is exported in eval mode.
        image_size: side of its images in pixels, fixed in the graph.
        batch_size: fixed in the graph; None for any.
    """
    device = next(model.parameters()).device
    example = torch.randn(batch_size or EXAMPLE_BATCH, 3, image_size, image_size, device=device)
    shapes = {INPUT: {0: torch.export.Dim("batch")}} if batch_size is None else None
    training = model.training
    # The fast kernels are this package's own operations; a file must do without them.
    with use_backend("reference"), torch.no_grad():
        program = torch.export.export(Logits(model).eval(), (example,), dynamic_shapes=shapes)
    model.train(training)
    return program


def save_program(model: nn.Module, image_size: int, path: Path) -> None:
    """Write a `.pt2` file; `torch.export.load(path).module()(pixels)` runs it."""
    program = export_program(model, image_size)
    with written_whole(path) as partial:
        torch.export.save(program, str(partial))


def save_onnx(model: nn.Module, image_size: int, path: Path) -> None:
    """Write an `.onnx` file with the input `pixel_values` and the output `logits`.

    Raises:
        ImportError: the extra is missing.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("ONNX needs onnx and onnxscript; pip install 'd-emo[export]'.") from error
    program = torch.onnx.export(
        export_program(model, image_size), input_names=[INPUT], output_names=[OUTPUT], dynamo=True, verbose=False
    )
    assert program is not None
    with written_whole(path) as partial:
        program.save(str(partial), external_data=False)


def save_coreml(model: nn.Module, image_size: int, path: Path) -> None:
    """Write an `.mlpackage` folder for a batch of one, in half precision.

    Raises:
        ImportError: the extra is missing.
    """
    try:
        import coremltools
    except ImportError as error:
        raise ImportError("Core ML needs coremltools; pip install 'd-emo[coreml]'.") from error
    program = export_program(model, image_size, batch_size=1).run_decompositions({})
    _drop_aliases(program)
    converted: Any = coremltools.convert(
        program,
        outputs=[coremltools.TensorType(OUTPUT)],
        minimum_deployment_target=coremltools.target.iOS16,
    )
    partial = partial_path(path)
    converted.save(str(partial))
    replace_folder(partial, path)


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
        path: of the file.
        threads: None for onnxruntime's choice.

    Raises:
        ImportError: the extra is missing.
    """

    def __init__(self, path: Path, threads: int | None = None):
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError("ONNX needs onnxruntime; pip install 'd-emo[export]'.") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        # Its threads would spin between two calls, and take the cores from whatever runs then.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> logits (B, K)."""
        return torch.from_numpy(self.session.run([OUTPUT], {INPUT: pixels.numpy()})[0])
