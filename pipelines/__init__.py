"""Sampling. Installed as `d_emo.pipelines`.

A name is looked up where it lives when it is first used: the commands of this folder read their options before they
load PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checks import NonFiniteSampleError, default_steps
    from .loading import open_pipeline
    from .pipeline_demo import DEMOPipeline, DEMOPipelineOutput

__all__ = ["DEMOPipeline", "DEMOPipelineOutput", "NonFiniteSampleError", "default_steps", "open_pipeline"]

# Where the names of `__all__` live.
_HOMES = {
    "DEMOPipeline": "pipeline_demo",
    "DEMOPipelineOutput": "pipeline_demo",
    "NonFiniteSampleError": "checks",
    "default_steps": "checks",
    "open_pipeline": "loading",
}


def __getattr__(name: str) -> Any:
    """The class or function of that name, imported at its first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return found


def __dir__() -> list[str]:
    """What is there now, and what would be at its first use."""
    return sorted({*globals(), *__all__})
