"""Files of LoRA adapters, strictly: each adapter that a file describes is in it, and nothing of it is left over."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import SafetensorError, safe_open
from torch import nn

from d_emo.common.ranges import Whole, take
from d_emo.common.saved_folders import ADAPTERS, some


@dataclass(frozen=True)
class AdapterFile:
    """What a file holds, as far as it is to be seen; empty for the Hub's files.

    Attributes:
        shapes: of its tensors, by their names after the prefix.
        description: PEFT's configuration, if it is there.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    description: dict[str, Any] = field(default_factory=dict)


def look_into(source: Any, prefix: str | None, weight_name: str | None, metadata: Any) -> AdapterFile:
    """Read names, shapes and description, and no tensor.

    Args:
        source: tensors by name, or where `from_pretrained` would look: a file, or a folder.
        prefix: what the model's own names begin with; None if they begin at once.
        weight_name: of the file in a folder.
        metadata: the description, if it does not lie in the file.

    Raises:
        ValueError: the file's description is none.
    """
    if isinstance(source, Mapping):
        shapes, about = {str(name): tuple(getattr(tensor, "shape", ())) for name, tensor in source.items()}, metadata
    else:
        path = Path(source) / (weight_name or ADAPTERS) if Path(source).is_dir() else Path(source)
        if path.suffix != ".safetensors" or not path.is_file():
            return AdapterFile()
        try:
            with safe_open(path, framework="pt") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
                stored = (file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY)
        except SafetensorError:
            return AdapterFile()  # Diffusers says so itself
        about = json.loads(stored) if metadata is None and stored is not None else metadata
    if not isinstance(about, Mapping | None):
        raise ValueError(f"its description is a {type(about).__name__}, not an object; copy the file again.")
    start = "" if prefix is None else f"{prefix}."
    return AdapterFile(
        {name.removeprefix(start): shape for name, shape in shapes.items() if name.startswith(start)},
        {str(name).removeprefix(start): value for name, value in (about or {}).items()},
    )


def check_description(file: AdapterFile, model: nn.Module) -> None:
    """Refuse a description of more than the tensors beside it: layers without, or larger ones, which would be made.

    Raises:
        ValueError: a rank is none, or above every tensor's; or a described layer of the model has no tensors.
        re.error: the description's names of layers are no pattern.
    """
    targets = file.description.get("target_modules")
    narrowed = any(file.description.get(name) for name in ("exclude_modules", "layers_to_transform"))
    if isinstance(targets, str) and not narrowed:
        # Other adapters may be there, whose own layers are none of the model's.
        layers = [name.removesuffix(".base_layer") for name, module in model.named_modules()
                  if isinstance(module, nn.Linear) and ".lora_" not in name]  # fmt: skip
        held = {name.rpartition(".lora_")[0] for name in file.shapes}
        if missing := [name for name in layers if re.fullmatch(targets, name) and name not in held]:
            raise ValueError(f"the adapters of {some(missing)} are missing in it; copy the file again.")
    ranks = [shape[0] for name, shape in file.shapes.items() if ".lora_A." in name and shape]
    if not file.description or not ranks:
        return
    pattern = file.description.get("rank_pattern") or {}
    if not isinstance(pattern, Mapping):
        raise ValueError(f"its description says rank_pattern={pattern!r}; copy the file again.")
    rule = Whole(1, max(ranks), "the tensors' own; copy the file again")
    described = {"r": file.description.get("r"), **pattern}
    take("its description", described, dict.fromkeys(described, rule))


def check_adapters(model: nn.Module, adapter: str, given: set[str]) -> None:
    """Refuse adapters of which a part did not come from the file, and a file of which a part did not go into them.

    Args:
        model: with the adapters loaded.
        adapter: their name.
        given: names of the file's tensors, in PEFT's layout; others are converted, and not looked at.

    Raises:
        ValueError: something is missing or left over.
    """
    from peft import get_peft_model_state_dict

    if not given or not all(".lora_A." in name or ".lora_B." in name for name in given if "lora" in name):
        return
    loaded = set(get_peft_model_state_dict(model, adapter_name=adapter))
    missing, unknown = sorted(loaded - given), sorted(given - loaded)
    if missing or unknown:
        raise ValueError(
            f"the adapters do not fit the model (missing in the file: {some(missing)}; not in the model: "
            f"{some(unknown)}); load them on the network that they were trained on."
        )
