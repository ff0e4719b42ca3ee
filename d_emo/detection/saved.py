"""Detectors as folders: config.json with all that it takes to build one, and its weights, model.safetensors.

    bundle = make_detector("retinanet", "EMOv2-5M", {0: "cat", 1: "dog"}, min_size=640)
    bundle.save_pretrained("my_detector")
    model = load_detector("my_detector").model.eval()

Nothing in such a folder is run: the configuration is checked value by value, weights are read as safetensors.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from d_emo.classification.backbones import dense_config, is_trained, known_name, load_backbone, normalization
from d_emo.classification.checkpoint_files import read_classifier
from d_emo.classification.transformers_config import NETWORK_ARGUMENTS, EMOv2Config, names_by_number
from d_emo.classification.transformers_models import EMOv2Backbone
from d_emo.classification.variants import CLASSIFIERS
from d_emo.common import checks
from d_emo.common.files import read_json, write_json
from d_emo.common.messages import first_line, shown
from d_emo.common.saved_folders import DETECTOR, LOADING_ERRORS, RESTORE, different, held_in, may_be_on_hub, not_found
from d_emo.common.tensor_files import read_tensors
from d_emo.detection.checks import OBJECTS
from d_emo.detection.detectors import FEATURES, PUBLISHED_FROZEN, mask_rcnn, retinanet, ssdlite

SYSTEMS = {"ssdlite": ssdlite, "retinanet": retinanet, "mask_rcnn": mask_rcnn}
CONFIG, WEIGHTS = "config.json", "model.safetensors"
# What config.json has; what it may lack has a default.
FIELDS = {"model_type", "system", "backbone", "id2label", "frozen_stages", "fixed_statistics", "options"}
OF_BACKBONE = (*NETWORK_ARGUMENTS, "num_channels", "image_size")
# Files of weights, as against folders.
WEIGHT_FILES = (".pth", ".pt", ".bin", ".tar", ".safetensors")


@dataclass
class DetectorBundle:
    """A detector with what is saved beside its weights.

    Attributes:
        model: of `d_emo.detection`: list of images in [0, 1] -> boxes, labels, scores, (masks).
        id2label: class names by id, from 0 on without the background.
        settings: the folder's config.json: `system`, `backbone` (arguments of `EMOv2Config`), `id2label`,
            `frozen_stages`, `fixed_statistics` and `options` (of the system's function, such as `min_size`,
            `image_mean`).
    """

    model: nn.Module
    id2label: dict[int, str]
    settings: dict[str, Any]

    @property
    def system(self) -> str:
        """One of `SYSTEMS`."""
        return self.settings["system"]

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write config.json and model.safetensors into a folder, the former last."""
        folder = checks.path_named(save_directory, "save_directory")
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.model.state_dict().items()}
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        write_json(folder / CONFIG, self.settings)

    def with_classes(self, id2label: Mapping[int, str], **options: Any) -> "DetectorBundle":
        """This detector with other classes or options: its weights, but for fresh layers where the classes differ.

        Args:
            id2label: class names by id.
            **options: see `make_detector`.

        Raises:
            ValueError: an option that the weights do not fit, or that there is none of.
        """
        names, settings = names_by_number(id2label), _changed(self.settings, options)
        settings["id2label"] = {str(number): name for number, name in names.items()}
        model = _build(settings)
        state = self.model.state_dict()
        if names != self.id2label:
            for name in _of_classes(settings):
                state[name] = model.state_dict()[name]
        _load(state, model)
        return DetectorBundle(model, names, _resolved(settings, model))


def make_detector(
    system: str, backbone: str | os.PathLike, id2label: Mapping[int, str], **options: Any
) -> DetectorBundle:
    """A detector on a fresh or trained backbone, its heads fresh.

    Args:
        system: "ssdlite", "retinanet" or "mask_rcnn".
        backbone: name of `d_emo.list_classifiers()` (fresh weights); folder or Hub id of a trained classifier; or the
            file of a published checkpoint (.pth), whose size is told by its tensors.
        id2label: class names by id from 0 on, or a list of names.
        **options: of the system's function, numbers and words alone; and `network`, arguments of `EMOv2Config` that
            differ, such as {"drop_path": 0.1}. `frozen_stages` and `fixed_statistics` are as published where the
            backbone is trained.

    Raises:
        ValueError: no such system, backbone or option.
    """
    checks.one_of(system, "system", SYSTEMS)
    names = names_by_number(id2label)
    for option in OBJECTS:
        if options.get(option) is not None:
            raise ValueError(f"{system}: {option} is an object of Python, which no config.json holds; leave it out.")
    overrides = {**(options.pop("network", None) or {}), "out_features": list(FEATURES[system])}
    if (window := options.pop("window_size", None)) is not None:
        overrides["window_size"] = window
    inner, trained, normal = _backbone(backbone, overrides)
    frozen, fixed = options.pop("frozen_stages", None), options.pop("fixed_statistics", None)
    settings = {
        "model_type": DETECTOR,
        "system": system,
        "backbone": {name: getattr(inner.config, name) for name in OF_BACKBONE},
        "frozen_stages": PUBLISHED_FROZEN[system] * trained if frozen is None else frozen,
        "fixed_statistics": trained if fixed is None else fixed,
        "id2label": {str(number): name for number, name in names.items()},
        "options": {**normal, **{name: value for name, value in options.items() if value is not None}},
    }
    model = _build(settings, inner)
    return DetectorBundle(model, names, _resolved(settings, model))


def is_detector(name: str | os.PathLike) -> bool:
    """Whether a local folder holds a detector."""
    try:
        return read_json(Path(name) / CONFIG, RESTORE).get("model_type") == DETECTOR
    except (OSError, ValueError):
        return False


def load_detector(name: str | os.PathLike) -> DetectorBundle:
    """The detector of a folder, or of the Hub, every weight of it.

    Args:
        name: folder that `save_pretrained` wrote, or Hub id.

    Raises:
        ValueError: there is none, its files are damaged or not of each other, or it holds something else.
    """
    folder = _folder(checks.text(name, "name"))
    with _told(folder):
        settings = read_json(folder / CONFIG, "restore it")
        if settings.get("model_type") != DETECTOR:
            raise ValueError(f"it holds {held_in(folder)}, not a detector")
        absent, unknown = FIELDS - settings.keys(), settings.keys() - FIELDS
        if absent or unknown:
            raise ValueError(f"{CONFIG} lacks {sorted(absent)} and has {sorted(unknown)}; {RESTORE}")
        checks.one_of(settings["system"], "system", SYSTEMS)
        names = names_by_number(settings["id2label"])
        model = _build(settings)
        _load(read_tensors(folder / WEIGHTS), model)
    return DetectorBundle(model, names, settings)


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Within it, whatever goes wrong is a line that begins with the folder."""
    try:
        yield
    except LOADING_ERRORS as error:
        said = str(error) if isinstance(error, ValueError) else first_line(error)
        raise ValueError(f"{folder}: {said.removeprefix(f'{folder}/')}") from error


def _folder(name: str) -> Path:
    """The folder itself, or where the Hub's was put."""
    folder = Path(name)
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            raise ValueError(f"{name} holds {held_in(folder)}, not a detector (no {CONFIG}).")
        return folder
    if folder.exists() or not may_be_on_hub(name, CLASSIFIERS):
        raise ValueError(f"{name}: there is no such folder; name one that a detector was saved in.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS]))
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(str(not_found(name, OSError(first_line(error))))) from error


def _backbone(name: str | os.PathLike, overrides: dict[str, Any]) -> tuple[EMOv2Backbone, bool, dict[str, list[float]]]:
    """A backbone, whether it is trained, and what its images are normalised with."""
    if Path(name).is_file() or (str(name).endswith(WEIGHT_FILES) and not Path(name).is_dir()):
        size, _, state = read_classifier(Path(name))
        config = dense_config(size, "detection", **overrides)
        inner = EMOv2Backbone(config)
        _load({key: value for key, value in state.items() if not key.startswith(("norm.", "head."))}, inner.emov2)
        return inner, True, normalization(size, config.num_channels)
    known_name("backbone", name, list(CLASSIFIERS))
    config = dense_config(name, "detection", **overrides)
    inner = load_backbone(name, config) if is_trained(name) else EMOv2Backbone(config)
    return inner, is_trained(name), normalization(name, config.num_channels)


def _build(settings: Mapping[str, Any], inner: EMOv2Backbone | None = None) -> nn.Module:
    """The network of a config.json, on a backbone that is there or a fresh one."""
    system = settings["system"]
    if not all(isinstance(settings[part], dict) for part in ("backbone", "options", "id2label")):
        raise ValueError(f"backbone, options and id2label of a detector are tables; {RESTORE}")
    if inner is None:
        if unknown := settings["backbone"].keys() - set(OF_BACKBONE):
            raise ValueError(f"backbone has {shown(sorted(unknown)[0])}; it has {', '.join(OF_BACKBONE)}.")
        inner = EMOv2Backbone(EMOv2Config(**settings["backbone"], out_features=list(FEATURES[system])))
    return SYSTEMS[system](
        inner,
        num_classes=len(settings["id2label"]),
        frozen_stages=settings["frozen_stages"],
        fixed_statistics=settings["fixed_statistics"],
        **settings["options"],
    )


def _changed(settings: Mapping[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Settings with these options in place of their own; None leaves what is there."""
    options = {name: value for name, value in options.items() if value is not None}
    network, window = options.pop("network", {}), options.pop("window_size", None)
    if window is not None:
        network = {**network, "window_size": window}
    own: dict[str, Any] = {name: options.pop(name) for name in ("frozen_stages", "fixed_statistics") if name in options}
    return {
        **settings,
        **own,
        "backbone": {**settings["backbone"], **network},
        "options": {**settings["options"], **options},
    }


def _resolved(settings: dict[str, Any], model: Any) -> dict[str, Any]:
    """Settings with the sizes that the detector has, so that they stay when defaults change."""
    transform, sizes = model.transform, {}
    if settings["system"] != "ssdlite":
        shorter = list(transform.min_size)
        sizes = {"min_size": shorter if len(shorter) > 1 else shorter[0], "max_size": transform.max_size}
    return {**settings, "options": {**settings["options"], **sizes}}


def _of_classes(settings: Mapping[str, Any]) -> list[str]:
    """Names of the tensors whose shape depends on the number of classes."""
    shapes = []
    for more in ({}, {"": ""}):
        with torch.device("meta"):
            model = _build({**settings, "id2label": {**settings["id2label"], **more}})
        shapes.append({name: tensor.shape for name, tensor in model.state_dict().items()})
    return [name for name, shape in shapes[0].items() if shapes[1][name] != shape]


def _load(state: Mapping[str, torch.Tensor], model: nn.Module) -> None:
    """Every tensor, none left over.

    Raises:
        ValueError: they do not fit.
    """
    expected = model.state_dict()
    if wrong := different(expected.keys() - state.keys(), state.keys() - expected.keys()):
        raise ValueError(wrong)
    if other := [name for name, tensor in state.items() if tensor.shape != expected[name].shape]:
        shapes = f"{tuple(state[other[0]].shape)}, not {tuple(expected[other[0]].shape)}"
        raise ValueError(f"weights have other shapes than the configuration says ({other[0]} {shapes}). {RESTORE}")
    model.load_state_dict(state, strict=True)
