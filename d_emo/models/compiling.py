"""`torch.compile` for a network whose time goes into launches or small operators."""

from typing import Any

# The ways, with the options of `torch.nn.Module.compile` where a network is compiled as a whole.
_OPTIONS: dict[str, dict[str, Any]] = {"blocks": {}, "whole": {}, "graphs": {"mode": "reduce-overhead"}}
WAYS = tuple(_OPTIONS)


def compile_network(model: Any, way: str) -> None:
    """Compile a network in place, at its next call.

    Args:
        model: one of Diffusers' or of this package's.
        way: of `WAYS`. "blocks": the repeated block, once for all of them, in seconds; everything where a network names
            none. "whole": everything, as one graph in one process (DDP and FSDP2 divide it), which takes the longer to
            compile the more blocks there are. "graphs": that, launched as CUDA graphs on a GPU, for networks and
            batches so small that launches are the limit; its results are overwritten by the next call.
    """
    options = _OPTIONS[way]
    if way == "blocks" and getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks(fullgraph=True)
    else:
        model.compile(**options)
