"""Files of LoRA adapters, strictly: each adapter that a file describes is in it, and nothing of it is left over."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from .checks import some


def names_in(source: Any, prefix: str | None, weight_name: str | None) -> set[str]:
    """The names of a file's tensors after the prefix, as far as they are to be seen; empty for the Hub's files.

    Args:
        source: tensors by name, or where `from_pretrained` would look: a file, or a folder.
        prefix: what the model's own names begin with; None if they begin at once.
        weight_name: of the file in a folder.
    """
    if isinstance(source, Mapping):
        names = set(map(str, source))
    else:
        path = Path(source) / (weight_name or "") if Path(source).is_dir() else Path(source)
        if path.suffix != ".safetensors" or not path.is_file():
            return set()
        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
        except SafetensorError:
            return set()  # Diffusers says so itself
    return {name.removeprefix(f"{prefix}.") for name in names if prefix is None or name.startswith(f"{prefix}.")}


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
