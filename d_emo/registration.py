"""Makes Diffusers and transformers find this package's classes by name, in whichever order they are imported.

`model_index.json` then stores `["d_emo", "DEMOTransformer2DModel"]` instead of a file path, and
`DiffusionPipeline.from_pretrained` works on such folders and Hub repositories after `import d_emo`; transformers' Auto
classes find EMOv2. Both libraries are large, so nothing is imported for their sake: what is registered in one of their
modules waits until somebody has imported that module, and the names given to Diffusers become classes at their first
use. The tables are private to Diffusers; where a future version lacks one, this raises instead of saving pipelines
that do not load.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PIPELINE = "DEMOPipeline"
COMPONENTS = (
    "DEMOTransformer2DModel",
    "DiTBaselineTransformer2DModel",
    "FlowMatchEulerMaruyamaScheduler",
    "FlowMatchODESolverScheduler",
    "FlowMatchSDEHeunScheduler",
    "JiTTransformer2DModel",
    "LightningDiTTransformer2DModel",
)
CONFIGURATIONS = {
    "d_emo.classification.transformers_config": "EMOv2Config",
    "d_emo.segmentation.transformers_config": "EMOv2SegmentationConfig",
    "d_emo.segmentation.unet_config": "UEMOv2Config",
    "d_emo.video.transformers_config": "VEMOv2Config",
}

Action = Callable[[ModuleType], None]


def register() -> None:
    """Register with what is imported by now, and with the rest as soon as it is."""
    when_imported("diffusers", _share_names)
    when_imported("diffusers.pipelines.pipeline_loading_utils", _extend_tables)
    when_imported("transformers.models.auto.configuration_auto", _enter_configurations)
    when_imported("transformers.models.auto.video_processing_auto", _load_video_processor)
    when_imported(
        "d_emo.models", lambda models: _register_blocks((models.DEMOBlock, models.DiTBlock, models.RotaryBlock))
    )


def _register_blocks(blocks: Sequence[type]) -> None:
    """Tell Diffusers' caches what the blocks return, once its hooks are imported."""

    def enter(module: ModuleType) -> None:
        with _tables_of(module):
            # Its own `register` would first import every transformer that Diffusers has.
            registry, metadata = module.TransformerBlockRegistry._registry, module.TransformerBlockMetadata
            registry.update({block: metadata(return_hidden_states_index=0, _cls=block) for block in blocks})

    when_imported("diffusers.hooks._helpers", enter)


def _share_names(diffusers: ModuleType) -> None:
    """Make `diffusers.DEMOPipeline` and the components resolve, as Diffusers' loaders look them up (PEP 562)."""
    names, before = (PIPELINE, *COMPONENTS), vars(diffusers).get("__getattr__")

    def find(name: str) -> Any:
        if name in names:
            return getattr(importlib.import_module("d_emo"), name)
        if before is not None:
            return before(name)
        raise AttributeError(f"module 'diffusers' has no attribute {name!r}")

    vars(diffusers)["__getattr__"] = find


def _extend_tables(module: ModuleType) -> None:
    """Enter the components among the classes that pipelines save and load by name."""
    with _tables_of(module):
        module.LOADABLE_CLASSES["d_emo"] = {name: ["save_pretrained", "from_pretrained"] for name in COMPONENTS}
        module.ALL_IMPORTABLE_CLASSES.update(module.LOADABLE_CLASSES["d_emo"])


def _enter_configurations(module: ModuleType) -> None:
    """Make AutoConfig know the configurations, which import their models when they are first used."""
    for home, name in CONFIGURATIONS.items():
        configuration = getattr(importlib.import_module(home), name)
        module.AutoConfig.register(configuration.model_type, configuration)


def _load_video_processor(_: ModuleType) -> None:
    """Import V-EMOv2's video processor, which folders name: AutoVideoProcessor does not look at the configuration."""
    if importlib.util.find_spec("torchvision") is not None:
        importlib.import_module("d_emo.video.processing")


@contextmanager
def _tables_of(module: ModuleType) -> Iterator[None]:
    """Turns a missing table into an error that says what to install."""
    try:
        yield
    except (AttributeError, TypeError) as error:
        version = getattr(sys.modules.get("diffusers"), "__version__", "")
        raise ImportError(
            f"diffusers {version} moved a table that d_emo registers its classes in ({module.__name__}: {error}); "
            "use diffusers>=0.41,<0.43 or a newer d_emo."
        ) from error


def when_imported(name: str, action: Action) -> None:
    """Call `action(module)` now if that module is imported, else right after its import, whoever asks for it."""
    if name in sys.modules:
        action(sys.modules[name])
    else:
        _WAITING.wait(name, action)


class _Waiting(MetaPathFinder):
    """Finds no module itself: lets the others find those that are waited for, and has their loader call back."""

    def __init__(self) -> None:
        self.actions: dict[str, list[Action]] = {}

    def wait(self, name: str, action: Action) -> None:
        self.actions.setdefault(name, []).append(action)
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in self.actions:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Calling(spec.loader)
        return spec

    def call(self, name: str) -> None:
        """Run what waits for a module, which has just been imported."""
        for action in self.actions.pop(name, ()):
            action(sys.modules[name])
        if not self.actions and self in sys.meta_path:
            sys.meta_path.remove(self)


class _Calling(Loader):
    """A module's own loader, and the call after it. The module keeps no trace of this one."""

    def __init__(self, loader: Any):
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)  # for those who only look for the module

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _WAITING.call(module.__spec__.name)


_WAITING = _Waiting()
