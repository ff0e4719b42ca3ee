"""Adapters on a pipeline: what a LoRA run trained lies in one folder, and goes onto its base and off again.

The folder holds `pytorch_lora_weights.safetensors`, as Diffusers' `load_lora_adapter` reads it (keys begin with
"transformer."), and `trained_beside.safetensors`: the label table, which such a run trains whole, the positions of its
grid, and the base's last layer, to know the base by.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from d_emo.common.messages import first_line
from d_emo.common.ranges import take
from d_emo.common.saved_folders import LOADING_ERRORS
from d_emo.models.ranges import TRANSFORMER

FOLDER, ADAPTERS, BESIDE = "lora", "pytorch_lora_weights.safetensors", "trained_beside.safetensors"
PREFIX = "transformer"
LABELS, POSITIONS, LAST = "label_embed.weight", "pos_embed", "proj_out.weight"
# A base in half precision differs from the one in float32 by its rounding.
SAME_BASE = 1e-2
ABOUT = {name: TRANSFORMER[name] for name in ("num_classes", "sample_size")}


def write_adapters(folder: Path, transformer: Any, id2label: Mapping[int, str], base: str | None) -> None:
    """Write everything that a LoRA run trained.

    Args:
        folder: where the two files go; made if it is missing.
        transformer: with its adapters.
        id2label: names of the classes.
        base: what the pipeline is called that the run began with.
    """
    from peft import get_peft_model_state_dict

    (name, config), *_ = transformer.peft_config.items()
    described = {f"{PREFIX}.{key}": _plain(value) for key, value in config.to_dict().items()}
    adapters = {f"{PREFIX}.{key}": tensor.contiguous() for key, tensor in
                get_peft_model_state_dict(transformer, adapter_name=name).items()}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(described, sort_keys=True)}
    save_file(adapters, folder / ADAPTERS, metadata=metadata)
    state = transformer.state_dict()
    about = {
        "num_classes": transformer.config.num_classes,
        "sample_size": transformer.config.sample_size,
        "id2label": {str(key): value for key, value in id2label.items()},
        "base": base,
    }
    beside = {key: state[key].contiguous() for key in (LABELS, POSITIONS, LAST)}
    save_file(beside, folder / BESIDE, metadata={"format": "pt", "about": json.dumps(about)})


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value


class LoraMixin:
    """`load_lora_weights` and `unload_lora_weights`, as Diffusers' pipelines call them."""

    transformer: Any
    _without_lora: tuple[dict[str, torch.Tensor], dict[str, Any], dict[int, str]] | None = None

    def load_lora_weights(self, folder: str | Path, adapter_name: str | None = None) -> None:
        """Put a LoRA run's adapters, label table and class names on the pipeline of its base.

        Args:
            folder: the run's `lora` folder, or the run or checkpoint that has it.
            adapter_name: what the adapters are to be called.

        Raises:
            ValueError: nothing is there, it belongs to another base, or adapters are loaded already.
        """
        place = Path(folder)
        place = place / FOLDER if (place / FOLDER).is_dir() else place
        adapters, beside, about = _read(place)
        if self._without_lora is not None:
            raise ValueError(f"{folder}: the pipeline carries adapters already; call unload_lora_weights() first.")
        _check_base(folder, self.transformer, adapters, beside[LAST], about.get("base"))
        _check_beside(folder, self.transformer, beside, about)
        config = self.transformer.config
        kept = {name: self.transformer.get_parameter(name).detach().clone() for name in (LABELS, POSITIONS)}
        before = {"num_classes": config.num_classes, "sample_size": config.sample_size}
        names = dict(self.id2label)  # type: ignore[attr-defined]
        self.transformer.load_lora_adapter(adapters, prefix=PREFIX, adapter_name=adapter_name,
                                           metadata=_adapter_metadata(place))  # fmt: skip
        self._without_lora = (kept, before, names)
        self._take(beside, {key: about[key] for key in before}, {int(k): v for k, v in about["id2label"].items()})

    def unload_lora_weights(self) -> None:
        """Take adapters off, and bring back the base's label table and class names."""
        if self._without_lora is None:
            raise ValueError("the pipeline carries no adapters; load_lora_weights(folder) loads them.")
        self.transformer.unload_lora()
        kept, config, names = self._without_lora
        self._without_lora = None
        self._take(kept, config, names)

    def _take(self, tensors: Mapping[str, torch.Tensor], config: dict[str, Any], names: dict[int, str]) -> None:
        """Give the transformer another label table and grid, and the pipeline other names."""
        transformer = self.transformer
        for name in (LABELS, POSITIONS):
            module, _, attribute = name.rpartition(".")
            old = transformer.get_parameter(name)
            new = tensors[name].to(old.device, old.dtype, copy=True)
            setattr(
                transformer.get_submodule(module),
                attribute,
                torch.nn.Parameter(new, requires_grad=old.requires_grad),
            )
        transformer.label_embed.num_embeddings = len(tensors[LABELS])
        size = config["sample_size"]
        config = {**config, "sample_size": tuple(size) if isinstance(size, list) else size}
        transformer.register_to_config(**config)
        self.name_classes(names)  # type: ignore[attr-defined]


def _read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """Adapters, what lies beside them, and what is said of them."""
    for name in (ADAPTERS, BESIDE):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder}: there is no {name} in it; pass the `{FOLDER}` folder of a run with --lora-rank, or for "
                "adapters of another origin pipe.transformer.load_lora_adapter."
            )
    try:
        with safe_open(folder / BESIDE, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "null"))
        adapters, beside = load_file(folder / ADAPTERS), load_file(folder / BESIDE)
        if set(beside) != {LABELS, POSITIONS, LAST}:
            raise ValueError(f"{BESIDE} holds {', '.join(sorted(beside))}")
        about = take(BESIDE, dict(about), ABOUT)
        if not set(ABOUT) <= set(about) or not isinstance(about.get("id2label"), Mapping):
            raise ValueError(f"{BESIDE} says {sorted(about)} of itself")
        return adapters, beside, about
    except LOADING_ERRORS as error:
        raise ValueError(f"{folder}: its files are damaged ({first_line(error)}); copy them again.") from error


def _check_beside(folder: Any, transformer: Any, beside: Mapping[str, torch.Tensor], about: dict[str, Any]) -> None:
    """Refuse a label table or positions of other shapes than what is said of them."""
    config, size = transformer.config, about["sample_size"]
    height, width = size if isinstance(size, tuple) else (size, size)
    grid = (height // config.patch_size, width // config.patch_size)
    shapes = {LABELS: (about["num_classes"] + 1, config.hidden_size), POSITIONS: (*grid, config.hidden_size)}
    for name, shape in shapes.items():
        if tuple(beside[name].shape) != shape:
            raise ValueError(
                f"{folder}: {name} has the shape {tuple(beside[name].shape)}, not {shape}; its files are of two runs: "
                "copy them again."
            )


def _adapter_metadata(folder: Path) -> dict[str, Any] | None:
    with safe_open(folder / ADAPTERS, framework="pt") as file:
        text = (file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY)
    return None if text is None else json.loads(text)


def _check_base(
    folder: Any, transformer: Any, adapters: Mapping[str, torch.Tensor], last: torch.Tensor, base: str | None
) -> None:
    """Refuse adapters of another network, or of other weights."""
    modules = dict(transformer.named_modules())
    wanted = {key.removeprefix(f"{PREFIX}.").rpartition(".lora_")[0]: tensor for key, tensor in adapters.items()
              if key.endswith("lora_A.weight")}  # fmt: skip
    wrong = [
        name for name, tensor in wanted.items() if getattr(modules.get(name), "in_features", None) != tensor.shape[1]
    ]
    own = transformer.get_parameter(LAST).detach().float().cpu()
    same = own.shape == last.shape and bool((own - last.float()).abs().max() <= SAME_BASE * last.float().abs().max())
    if wrong or not wanted or not same:
        named = f" ({base})" if base else ""
        detail = f"no layer {wrong[0]} of its size is here" if wrong else "the last layer has other weights"
        raise ValueError(
            f"{folder}: the adapters were trained on another pipeline{named}: {detail}. Load them on the one "
            "that the run began with (--init-from)."
        )
