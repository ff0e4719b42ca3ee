"""Reading checkpoints of DiT, SiT, LightningDiT, JiT and Diffusers' DiT, writing DiT's (`train/convert_dit.py`)."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from d_emo.common.files import check_replaceable, check_writable, holds_something, written_folder, written_whole
from d_emo.common.tensor_files import read_state
from d_emo.images.labels import english_names, imagenet_wnid_to_name
from d_emo.models import ClassConditionalTransformer2DModel, DiTBaselineTransformer2DModel, JiTTransformer2DModel
from d_emo.models.diffusers_dit import config_of_state, import_diffusers_state, is_diffusers_state
from d_emo.models.published import export_state, import_state, published_config
from d_emo.models.published_rotary import is_rotary_state, rotary_model
from d_emo.models.variants import heads_of
from d_emo.pipelines import DEMOPipeline, open_pipeline
from d_emo.schedulers.flow_paths import path_of
from d_emo.train.diffusion.choose_objective import make_objective
from d_emo.train.diffusion.config import AUTO_VAE, OptimizationOptions
from d_emo.train.diffusion.objectives import PREDICTIONS
from d_emo.train.diffusion.resolving import load_vae

IMAGENET_CLASSES = 1000
# The side of latents of the published models of Diffusers, whose tensors do not tell it.
DIFFUSERS_SIDE = 32
# Where full checkpoints hold their weights: DiT's, SiT's and LightningDiT's, and JiT's with its two averages.
WEIGHTS = {"ema": ("ema", "model_ema1"), "ema2": ("model_ema2",), "model": ("model",)}
# Latent channels of the default decoder.
VAE_CHANNELS = 4


def import_checkpoint(options: argparse.Namespace) -> None:
    """Write a pipeline folder, whole or not at all."""
    source, target = Path(options.checkpoint), Path(options.output_dir)
    check_replaceable(target, "--output-dir", "model_index.json", "pipeline")
    if source.is_dir() and (source / "model_index.json").is_file():
        _check_objective(options)
        pipeline = open_pipeline(str(source))
        if options.vae is not None:
            pipeline = DEMOPipeline.from_pipe(pipeline, vae=load_vae(options.vae))
    else:
        pipeline = _pipeline_around(_network(source, options), options)
    with written_folder(target) as partial:
        pipeline.save_pretrained(partial)
    config = pipeline.transformer.config
    print(
        f"{options.checkpoint}: {config['num_layers']} blocks of {config['hidden_size']} channels, patch "
        f"{config['patch_size']}, {config['num_classes']} classes, {config.prediction_type}; pipeline in {target}"
    )


def _network(source: Path, options: argparse.Namespace) -> Any:
    """The network of a checkpoint, or of a folder of Diffusers' class."""
    if source.is_dir():
        _check_objective(options)
        return DiTBaselineTransformer2DModel.from_pretrained(source)
    state = read_state(source, [name for names in WEIGHTS.values() for name in names], *WEIGHTS[options.weights])
    if is_rotary_state(state):
        _check_told(options)
        return rotary_model(state)
    load: Callable[[Any, Any], None] = import_state
    if is_diffusers_state(state):
        _check_objective(options)
        given = options.num_heads
        config = config_of_state(state, lambda *size: heads_of(*size) if given is None else given, DIFFUSERS_SIDE)
        load = import_diffusers_state
    elif options.objective is None:
        raise ValueError(f"{source}: the file does not tell what it was trained for; pass --objective dit or sit.")
    else:
        flow = (options.flow_path, PREDICTIONS[options.prediction])
        config = published_config(state, options.objective, options.num_heads, *flow)
    model = DiTBaselineTransformer2DModel(**config)
    load(state, model)
    return model.eval()


def _check_objective(options: argparse.Namespace) -> None:
    if options.objective not in (None, "dit"):
        raise ValueError(
            f"--objective {options.objective}: {options.checkpoint} is of Diffusers' DiT, which is for DiT's objective "
            "alone; leave the option out."
        )


def _check_told(options: argparse.Namespace) -> None:
    """Refuse options that say what LightningDiT's and JiT's tensors tell."""
    told = {
        f"--objective {options.objective}": options.objective == "dit",
        f"--flow-path {options.flow_path}": options.flow_path != "linear",
        f"--prediction {options.prediction}": options.prediction != "velocity",
        f"--num-heads {options.num_heads}": options.num_heads is not None,
    }
    if wrong := [option for option, given in told.items() if given]:
        raise ValueError(
            f"{wrong[0]}: {options.checkpoint} is of LightningDiT or JiT, whose tensors tell what they are for; leave "
            "the option out."
        )


def _vae_name(model: ClassConditionalTransformer2DModel, given: str | None) -> str:
    """The decoder to save with a network, where none is named: none for JiT's pixels, else the default one."""
    if given is not None:
        return given
    if isinstance(model, JiTTransformer2DModel):
        return "none"
    if model.config.in_channels != VAE_CHANNELS:
        raise ValueError(
            f"--vae is needed: the network takes {model.config.in_channels} channels, and {AUTO_VAE} has "
            f"{VAE_CHANNELS}; pass the folder or Hub id of the autoencoder that it was trained on, or none."
        )
    return AUTO_VAE


def _pipeline_around(model: ClassConditionalTransformer2DModel, options: argparse.Namespace) -> DEMOPipeline:
    objective = OptimizationOptions(
        objective="dit" if path_of(model.config) is None else "sit",
        time_shift=model.config.get("noise_scale", 1.0),  # even steps of JiT's own time
    )
    named = model.config.num_classes == IMAGENET_CLASSES
    names = dict(enumerate(english_names(imagenet_wnid_to_name()))) if named else None
    scheduler = make_objective(objective).make_scheduler()
    return DEMOPipeline(model, scheduler, vae=load_vae(_vae_name(model, options.vae)), id2label=names)


def export_checkpoint(pipeline: str, path: Path) -> None:
    """Write the transformer of a pipeline under the published names, whole."""
    check_writable(path, "checkpoint")
    try:
        state = export_state(open_pipeline(pipeline).transformer)
    except ValueError as error:
        raise ValueError(f"--export {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        torch.save(state, partial)
    print(f"{len(state)} tensors in {path}")


def export_folder(pipeline: str, target: Path) -> None:
    """Write a pipeline as a folder of Diffusers' `DiTPipeline`; without a VAE, its `DiTTransformer2DModel` alone."""
    if holds_something(target) or target.is_file():
        raise ValueError(f"{target} is there already; choose another folder.")
    try:
        opened = open_pipeline(pipeline)
        saved = opened.transformer.to_diffusers() if opened.vae is None else opened.to_dit_pipeline()
    except ValueError as error:
        raise ValueError(f"--export {pipeline}: {error}") from error
    with written_folder(target) as partial:
        saved.save_pretrained(partial)
    print(f"{type(saved).__name__} of Diffusers in {target}")
