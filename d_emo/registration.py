"""Makes Diffusers find this package's classes by name.

`model_index.json` then stores `["d_emo", "DEMOTransformer2DModel"]` instead of a file path, and
`DiffusionPipeline.from_pretrained` works on such folders and Hub repositories after `import d_emo`. The tables are
private to Diffusers; where a future version lacks one, this raises instead of saving pipelines that do not load.
"""

import diffusers
from diffusers.hooks import _helpers as block_registry
from diffusers.pipelines import pipeline_loading_utils

from .models import DEMOBlock, DEMOTransformer2DModel, DiTBaselineTransformer2DModel, DiTBlock
from .schedulers import FlowMatchEulerMaruyamaScheduler, FlowMatchODESolverScheduler

COMPONENTS = (
    DEMOTransformer2DModel,
    DiTBaselineTransformer2DModel,
    FlowMatchEulerMaruyamaScheduler,
    FlowMatchODESolverScheduler,
)


def register_with_diffusers(pipeline_class: type) -> None:
    """Register models, schedulers, the pipeline and the blocks' caching metadata. Safe to call again."""
    try:
        loadable = pipeline_loading_utils.LOADABLE_CLASSES
        importable = pipeline_loading_utils.ALL_IMPORTABLE_CLASSES
        register_block = block_registry.TransformerBlockRegistry.register
        metadata_class = block_registry.TransformerBlockMetadata
    except AttributeError as error:
        raise ImportError(
            f"diffusers {diffusers.__version__} moved a table that d_emo registers its classes in ({error}); "
            "use diffusers>=0.40,<0.43 or a newer d_emo."
        ) from error
    loadable["d_emo"] = {component.__name__: ["save_pretrained", "from_pretrained"] for component in COMPONENTS}
    importable.update(loadable["d_emo"])
    for block_class in (DEMOBlock, DiTBlock):
        register_block(block_class, metadata_class(return_hidden_states_index=0))
    for named_class in (pipeline_class, *COMPONENTS):
        setattr(diffusers, named_class.__name__, named_class)
