"""What the options of a diffusion run stand for: its autoencoder, what it starts from, its length, its names."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from d_emo.eval.fid.references import check_reference
from d_emo.images.autoencoders import open_vae
from d_emo.images.source import ImageSource
from d_emo.train.diffusion.config import AUTO_VAE, DiffusionRunOptions, ModelOptions, TrainConfig
from d_emo.train.diffusion.init_from import InitialWeights
from d_emo.train.engine.batch_layout import BatchLayout
from d_emo.train.engine.fit import steps_of_epochs

# From this side on, --vae auto trains on latents.
AUTO_VAE_RESOLUTION = 128
# Of the paper's training runs.
PAPER_STEPS = 400_000
# --color by the channels of pictures.
COLORS = {1: "grey", 3: "rgb"}


def check_fid(options: DiffusionRunOptions, source: ImageSource) -> None:
    """Refuse FIDs on the way that have nothing to compare with.

    Raises:
        ValueError: the training data holds no images and no reference is named, or there is none of that name.
    """
    if not options.fid_every:
        return
    if options.fid_reference is not None:
        check_reference(options.fid_reference, "--fid-reference")
    elif source.latents is not None or source.stream is not None:
        raise ValueError(
            "--fid-every: latents and streams hold no images to compare with; name some with --fid-reference."
        )


def initial_weights(config: TrainConfig) -> InitialWeights | None:
    """What --init-from names. A resumed run needs of it no more than the network, which its checkpoints hold, too.

    Raises:
        ValueError: it does not load.
    """
    if config.model.init_from is None:
        return None
    try:
        return InitialWeights(config.model.init_from)
    except ValueError as error:
        if config.run.resume_from is None:
            raise
        raise ValueError(
            f"{error} To resume without it, name the checkpoint in its place: --init-from RUN/checkpoint-STEP "
            "--allow-change init_from."
        ) from error


def in_color(source: ImageSource, color: str, initial: InitialWeights | None) -> ImageSource:
    """The source in grey or colour: as asked, else as the model of `initial` sees pixels, else as it is by default."""
    channels = {"grey": 1, "rgb": 3}.get(color)
    if channels is None and initial is not None:
        channels = initial.transformer.config.in_channels
    return source if channels not in (1, 3) or source.latents is not None else replace(source, channels=channels)


def max_train_steps(options: DiffusionRunOptions, source: ImageSource, layout: BatchLayout) -> int:
    """Optimizer steps: as named, as the epochs make, or the paper's.

    Raises:
        ValueError: epochs of a source that does not tell its size.
    """
    if options.num_epochs is None:
        return options.max_train_steps or PAPER_STEPS
    if not source.size:
        raise ValueError(
            f"--num-epochs {options.num_epochs:g}: {source.name} does not tell how many images an epoch has; use "
            "--max-train-steps."
        )
    return steps_of_epochs(options.num_epochs, source.size, layout.global_batch_size)


def model_name(config: TrainConfig) -> str:
    """--model, or what --init-from is called."""
    return Path(config.model.init_from).name if config.model.init_from else config.model.model


def output_dir(config: TrainConfig, source: ImageSource) -> Path:
    """Where the run is written."""
    return config.run.folder(model_name(config), source.name)


def vae_name(options: ModelOptions, source: ImageSource, resolution: int, initial: InitialWeights | None) -> str:
    """What --vae stands for: a folder, a Hub id or "none".

    "auto" is what the pipeline of --init-from has, else what made the latents, else a default.
    """
    if options.vae != "auto":
        return options.vae
    if initial is not None:
        return "none" if initial.space is None else initial.name
    if source.latents is not None:
        return str(source.latents.manifest.vae)
    return AUTO_VAE if resolution >= AUTO_VAE_RESOLUTION else "none"


def choose_vae(options: ModelOptions, source: ImageSource, initial: InitialWeights | None) -> tuple[Any, int]:
    """The autoencoder, None for pixels, and the side of images in pixels, as far as it does not decide that itself.

    With --vae auto both follow the weights to start from; latents that were encoded beforehand keep their size.

    Raises:
        ValueError: it does not load.
    """
    if options.vae == "auto" and initial is not None:
        default = initial.resolution if source.latents is None else source.resolution
        return initial.autoencoder(), options.resolution or default
    resolution = options.resolution or source.resolution
    return load_vae(vae_name(options, source, resolution, initial)), resolution


def load_vae(name: str) -> Any:
    """The autoencoder of a name that `vae_name` gave, frozen; None for pixels.

    Raises:
        ValueError: it is neither a local folder nor reachable.
    """
    if name == "none":
        return None
    try:
        return open_vae(name).requires_grad_(False)
    except ValueError as error:
        raise ValueError(f"--vae {error} Or train on pixels with --vae none.") from error
