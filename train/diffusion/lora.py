"""LoRA: fine-tuning by small matrices beside the blocks' linear layers, which stay as they are (arXiv 2106.09685).

The label table is trained whole, since other classes have other rows. BatchNorm stays in eval mode: its statistics
belong to weights that do not change.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from d_emo.models import ClassConditionalTransformer2DModel
from d_emo.pipelines.lora import FOLDER, write_adapters

# The blocks' linear layers, of D-EMOv2 and of the DiT baseline.
TARGETS = r"blocks\.\d+\.(i2rmb\.attn\.to_qkv|i2rmb\.proj_out|to_qkv|to_out|mlp_in|mlp_out|modulation)"
LABELS = "label_embed"
AVERAGE = "average.safetensors"


def add_lora(model: ClassConditionalTransformer2DModel, rank: int, alpha: int) -> None:
    """Freeze a model and give it trainable adapters, which change nothing yet.

    Args:
        model: trained weights.
        rank: inner size of each adapter.
        alpha: its outputs are scaled by alpha / rank.

    Raises:
        ValueError: peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError("--lora-rank needs peft; pip install 'd-emo[lora]'.") from error
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS, init_lora_weights=True))
    model.get_submodule(LABELS).requires_grad_(True)


def set_mode(model: torch.nn.Module, frozen_norms: bool) -> None:
    """Training mode, BatchNorm's aside where it is frozen."""
    model.train()
    if frozen_norms:
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()


def save_adapters(model: Any, folder: Path, id2label: Mapping[int, str], base: str | None) -> None:
    """Write everything that is trained, as `DEMOPipeline.load_lora_weights` reads it.

    Args:
        model: with its adapters.
        folder: of the pipeline that holds them merged; they go into its `lora` folder.
        id2label: names of the classes.
        base: --init-from.
    """
    write_adapters(folder / FOLDER, model, id2label, base)


def save_average(average: torch.nn.Module, model: torch.nn.Module, folder: Path) -> None:
    """Write the averages of what a model trains, for continuing the run: the pipeline holds them merged."""
    names = {name.removeprefix("module.") for name, value in model.named_parameters() if value.requires_grad}
    state = {name: tensor.contiguous() for name, tensor in average.state_dict().items() if name in names}
    save_file(state, folder / AVERAGE)


def load_average(folder: Path) -> dict[str, torch.Tensor]:
    """What `save_average` wrote."""
    return load_file(folder / AVERAGE)
