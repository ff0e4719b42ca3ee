"""Strict loading for the classes of transformers, whose own only logs what a folder lacks."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedConfig

from d_emo.common.messages import first_line
from d_emo.common.saved_folders import PLACE, RESTORE, different, kind_of, stored_object


class StrictLoading:
    """`from_pretrained` that refuses other models' folders, and half a network.

    Attributes:
        config_class, base_model_prefix: transformers' own; folders of other `model_type`s are refused, and what a
            derived class has beside the network of that prefix is of its task.
        task_weights: names of what a network has for its task alone; folders of features and of other tasks lack it.
    """

    config_class: Any
    base_model_prefix: str
    task_weights = re.compile(r"emov2\.(head|norm)\.")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' `from_pretrained`, strict.

        What is new is named in a warning: with `ignore_mismatched_sizes=True` the head where the number of classes
        differs; head, last norm and what a derived class has beside the network, of a folder that another class wrote.

        Raises:
            ValueError: the folder holds another model, or weights are damaged, missing, left over or of other shapes.
        """
        name, wanted = pretrained_model_name_or_path, cls.__name__
        stored = _stored_config(name, wanted, cls.config_class.model_type, kwargs)
        tells, may_differ = (kwargs.pop(key, False) for key in ("output_loading_info", "ignore_mismatched_sizes"))
        mixed: Any = super()
        # Mismatches are looked at here: transformers' message would not name them.
        try:
            model, information = mixed.from_pretrained(
                name, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        except SafetensorError as error:
            raise ValueError(f"{name}: its weights are damaged ({first_line(error)}); restore the file.") from error
        if getattr(model, "hf_quantizer", None) is None:  # quantized weights have other names
            other_task = wanted not in (stored.get("architectures") or [wanted])
            beside = re.compile(rf"(?!{re.escape(cls.base_model_prefix)}\.)")
            _check(name, information, cls.task_weights, beside if other_task else None, may_differ)
        return (model, information) if tells else model


def _stored_config(name: Any, wanted: str, model_type: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a folder's config.json says; empty where there is none to look at, as in PEFT's folders of adapters."""
    if name is None or _holds_adapters(name, options):
        return {}
    config = stored_object(name, options.get("subfolder"), wanted)
    if config is None:
        config, _ = PreTrainedConfig.get_config_dict(name, **{key: options[key] for key in PLACE if key in options})
    if "_class_name" in config or config.get("model_type") not in (model_type, None):
        library = "Diffusers" if "_class_name" in config else "transformers"
        raise ValueError(
            f"{name}: its config.json is of {kind_of(config)}, not of a {wanted}; load it with {library}' own class."
        )
    return config


def _holds_adapters(name: Any, options: Mapping[str, Any]) -> bool:
    """Whether a folder holds adapters alone, whose base transformers looks up."""
    folder = Path(name) / (options.get("subfolder") or "")
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def _check(
    name: Any, information: Mapping[str, Any], task: re.Pattern[str], beside: re.Pattern[str] | None, may_differ: bool
) -> None:
    """Refuse what does not fit; `beside` is None for a folder that the same class wrote."""
    missing, unknown = set(information["missing_keys"]), set(information["unexpected_keys"])
    mismatched = {key: shapes for key, *shapes in information.get("mismatched_keys") or ()}
    missing -= set(mismatched)
    fresh = {key for key in missing if beside and (task.match(key) or beside.match(key))}
    left_out = {key for key in unknown if beside and task.match(key)}
    if wrong := different(missing - fresh, unknown - left_out):
        raise ValueError(f"{name}: {wrong} {RESTORE}")
    if mismatched and not may_differ:
        listed = "; ".join(f"{key} {tuple(a)}, not {tuple(b)}" for key, (a, b) in sorted(mismatched.items())[:3])
        remedy = RESTORE
        if all(task.match(key) for key in mismatched):
            remedy = "For other classes pass ignore_mismatched_sizes=True, which makes a new head."
        raise ValueError(f"{name}: weights have other shapes than config.json says ({listed}). {remedy}")
    if new := sorted(fresh | set(mismatched)):
        warnings.warn(f"{name}: {', '.join(new)} are newly initialised, and have to be trained.", stacklevel=4)
