"""Every option of the diffusion trainer, once; `engine.options` and `data.options` have those of all trainers."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from d_emo.common.gpus import Fleet, parse_fleet
from d_emo.common.numbers import finite
from d_emo.common.options import (
    OptionTable,
    Recipe,
    below_one,
    goes_with,
    option,
    parse_options,
    positive,
    require,
    require_defaults,
    zero_or_more,
)
from d_emo.common.ranges import RELATIVE_LENGTH
from d_emo.train.data.options import DataOptions, digits_recipe
from d_emo.train.diffusion.flow_map_options import FlowMapOptions
from d_emo.train.diffusion.recipe_options import RecipeOptions
from d_emo.train.engine.options import KERNELS_HELP, RunOptions, StepOptions, options_of_run

# What --vae auto names, from some resolution on.
AUTO_VAE = "stabilityai/sd-vae-ft-ema"
# The one of --lr-scheduler that is not Diffusers' but transformers': warm-up, stable rate, decay.
WSD = "wsd"


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What is trained, and on which space."""

    model: str = option("D-EMOv2-S-2", "Model name, see d_emo.list_models().")
    init_from: str | None = option(
        None,
        "Start from a trained pipeline (folder or Hub id): its network and weights, --model aside; the label table is "
        "new where the classes differ.",
    )
    lora_rank: int | None = option(
        None, "With --init-from: train adapters of this rank and the label table only. Default: all weights."
    )
    lora_alpha: int | None = option(None, "Scale of the adapters, over their rank. Default: the rank.")
    resolution: int | None = option(
        None,
        "Image side in pixels. Default: with --vae auto that of --init-from; 16 for the digits, 256 for folders, for a "
        "data set as its first image.",
    )
    color: Literal["auto", "grey", "rgb"] = option(
        "auto",
        "Train on grey or colour images. auto: grey for the digits and for a grey model's weights, else colour.",
    )
    vae: str = option(
        "auto",
        "Folder or Hub id of one of Diffusers' autoencoders of images (docs/autoencoders.md lists them), or 'none' to "
        "train on pixels. 'auto' is what --init-from has, or made --latents, else stabilityai/sd-vae-ft-ema at 128 "
        "pixels and more.",
    )
    latent_statistics: str | None = option(
        None,
        "Normalise latents by what encode_latents.py --statistics measured: a folder of latents or statistics.json; "
        "'none' for the autoencoder's own. Default: what goes with --init-from, --latents or --vae, in this order.",
    )
    patch_bottleneck: int | None = option(
        None, "Embed patches by way of so few channels, for large patches of pixels. Default: straight away."
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory.")
    compile: bool = option(False, "torch.compile the network; the fast way on GPUs.")
    compile_mode: Literal["blocks", "whole", "graphs"] = option(
        "blocks",
        "With --compile. blocks: the repeated block, in seconds. whole: the network as one graph. graphs: that, "
        "launched as CUDA graphs on a GPU, for networks and batches so small that launches are the limit.",
    )
    kernels: Literal["auto", "reference", "native"] | None = option(None, KERNELS_HELP)

    def __post_init__(self):
        positive(self, "resolution", "lora_rank", "lora_alpha", "patch_bottleneck")
        goes_with(self, "compile", "compile_mode")
        require(
            self.compile_mode == "blocks" or not self.gradient_checkpointing,
            "compile_mode",
            self.compile_mode,
            "--gradient-checkpointing computes block by block again; use --compile-mode blocks, or leave it out",
        )
        require(
            self.lora_rank is None or self.init_from is not None,
            "lora_rank",
            self.lora_rank,
            "adapters belong to trained weights; name them with --init-from",
        )


@dataclass(frozen=True, kw_only=True)
class OptimizationOptions(StepOptions):
    """Objective and optimizer. The defaults are the paper's, which are DiT's."""

    objective: Literal["dit", "sit", "flow-map"] = option(
        "dit",
        "dit: noise and learned variance. sit: flow matching. flow-map: jumps along a flow, for sampling in a few "
        "steps; takes sit's options, best with --init-from a trained flow.",
    )
    min_snr_gamma: float | None = option(
        None,
        "Weight the loss as min(SNR, this) times that of the data, which spares times with little noise; 5 is "
        "customary. dit: epsilon's part. Default: even weights.",
    )
    flow_path: Literal["linear", "gvp", "vp"] = option("linear", "sit: the path from data to noise.")
    prediction: Literal["velocity", "noise", "score", "data"] = option(
        "velocity", "sit: what the network predicts. data: clean images (linear path), with the velocity's loss."
    )
    loss_weighting: Literal["none", "velocity", "likelihood"] = option(
        "none", "sit, for noise and score: weight the loss as one on the velocity or as the likelihood's bound."
    )
    time_sampling: Literal["uniform", "logit-normal"] = option("uniform", "sit: how times are drawn.")
    logit_normal_mean: float = option(0.0, "Mean of the time's logit; above 0 means more noise.")
    logit_normal_std: float = option(1.0, "Standard deviation of the time's logit.")
    time_shift: float | Literal["auto"] = option(
        1.0,
        "sit: shift drawn times, and those of sampling, towards noise by a number above 1. auto: the square root of "
        "(C x H x W) / 4096, of what the model sees.",
    )
    noise_on: Literal["cpu", "device"] = option(
        "cpu",
        "Where noise is drawn. cpu: by threads ahead of the step, the same on every machine. device: faster where the "
        "CPU is the limit; another run, and another on another kind of device.",
    )
    class_dropout_prob: float = option(0.1, "Share of samples that train without their label.")
    optimizer: Literal["adamw", "muon"] = option(
        "adamw", "muon: Muon for the matrices of the blocks, AdamW for the rest, at one learning rate and one decay."
    )
    learning_rate: float = option(1e-4, "The optimizer's learning rate.")
    weight_decay: float = option(0.0, "The optimizer's decay.")
    no_weight_decay: str | None = option(
        None,
        "Parameters that do not decay: parts of their names, with commas between; 'vectors' are all norms and biases. "
        "Default: all decay alike.",
    )
    adam_beta1: float = option(0.9, "AdamW's first beta.")
    adam_beta2: float = option(0.999, "AdamW's second beta.")
    lr_scheduler: str = option(
        "constant",
        "Name of a Diffusers schedule, such as constant_with_warmup or cosine; or wsd: warm-up, a stable rate, then "
        "down to 0.",
    )
    lr_warmup_steps: int = option(0, "Warm-up of that schedule in optimizer steps, at most a quarter of the run.")
    lr_cooldown_share: float = option(0.2, "wsd: the share of the run in which the rate goes down.")
    lr_cooldown: Literal["1-sqrt", "linear", "cosine"] = option(
        "1-sqrt", "wsd: how it goes down; 1-sqrt is 1 minus the root of what has passed of that share."
    )
    max_grad_norm: float | None = option(None, "Clip the gradient's norm to this. Default: no clipping.")
    ema_decay: float = option(0.9999, "Decay of the averaged weights and buffers, once an optimizer step.")

    def __post_init__(self):
        if self.objective == "flow-map":
            rule = "belongs to --objective dit and sit; a jump has two times, and no one ratio of signal to noise"
            require(self.min_snr_gamma is None, "min_snr_gamma", self.min_snr_gamma, rule)
        if self.loss_weighting != "none":
            rule = f"is a weighting, and so is --loss-weighting {self.loss_weighting}; leave one out"
            require(self.min_snr_gamma is None, "min_snr_gamma", self.min_snr_gamma, rule)
        if self.objective == "dit":
            flow = ("flow_path", "prediction", "loss_weighting", "time_sampling", "time_shift")
            require_defaults(self, "belongs to --objective sit", *flow)
        require(
            self.prediction != "data" or self.flow_path == "linear",
            "flow_path",
            self.flow_path,
            "--prediction data goes with --flow-path linear",
        )
        if self.objective == "flow-map":
            require(self.prediction == "velocity", "prediction", self.prediction, "flow maps predict velocities")
            require(self.flow_path != "vp", "flow_path", self.flow_path, "flow maps are for linear and gvp")
        require(
            self.prediction in ("noise", "score") or self.loss_weighting == "none",
            "loss_weighting",
            self.loss_weighting,
            "belongs to --prediction noise or score",
        )
        positive(self, "min_snr_gamma")
        if self.time_sampling != "logit-normal":
            require_defaults(self, "belongs to --time-sampling logit-normal", "logit_normal_mean", "logit_normal_std")
        positive(self, "logit_normal_std", "learning_rate")
        below_one(self, "class_dropout_prob", "adam_beta1", "adam_beta2", "ema_decay")
        zero_or_more(self, "weight_decay", "lr_warmup_steps")
        require(
            0 < self.lr_cooldown_share <= 1, "lr_cooldown_share", self.lr_cooldown_share, "must be above 0, at most 1"
        )
        if self.lr_scheduler != WSD:
            require_defaults(self, f"belongs to --lr-scheduler {WSD}", "lr_cooldown_share", "lr_cooldown")
        require(
            self.max_grad_norm is None or self.max_grad_norm > 0,
            "max_grad_norm",
            self.max_grad_norm,
            "must be positive; leave it out for no clipping",
        )


@dataclass(frozen=True, kw_only=True)
class DiffusionRunOptions(RunOptions):
    """The diffusion trainer's length, and what it shows, scores and shares on its way."""

    max_train_steps: int | None = option(
        None, "Optimizer steps in all. Default: the paper's 400,000, the digits' 1,000.", "num_epochs"
    )
    num_epochs: float | None = option(None, "Passes over the images, in place of --max-train-steps.", "max_train_steps")
    sample_every: int = option(10_000, "Steps between two sample grids; 0 for none.")
    sample_steps: int | None = option(None, "Sampler steps of a grid. Default: 50, of a flow map 4.")
    sample_guidance_scale: float = option(1.5, "Guidance scale of a grid; 1.0 is off.")
    samples_per_class: int = option(8, "Images a class in a grid, for at most ten classes.")
    fid_every: int = option(
        0, "Steps between two quick FIDs (50 sampler steps, 4 of a flow map, no guidance); 0 for none."
    )
    fid_images: int = option(5000, "Samples of such a FID.")
    fid_reference: str | None = option(None, "Its reference, as of evaluate_fid. Default: the training images.")
    fid_features: str = option("inception", "Its features, as of evaluate_fid; 'pixels' needs no weights.")
    fid_inception_weights: str | None = option(
        None, "File of the Inception weights. Default: torch's cache, or the net."
    )
    snapshot_every: int = option(
        0,
        "Steps between two snapshots of averages, of which choose_average makes others after the run; 0 for none.",
    )
    snapshot_lengths: str = option(
        "0.05,0.1", "Relative lengths of the power-function averages in snapshots, with commas between."
    )
    push_to_hub: bool = option(
        False, "Upload the finished pipeline, with its card and samples, to the Hugging Face Hub."
    )
    hub_model_id: str | None = option(
        None, "Repository to upload to. Default: the output folder's name, in your account."
    )
    on: str | None = option(
        None, "With --dry-run: plan for these GPUs, which need not be here, such as 64xH100: memory, speed, hours."
    )
    hub_private: bool | None = option(None, "Make a new repository private (true/false). Default: your account's.")

    def __post_init__(self):
        super().__post_init__()
        positive(self, "max_train_steps", "num_epochs", "sample_steps", "samples_per_class", "fid_images")
        if self.max_train_steps is not None and self.num_epochs is not None:
            raise ValueError(
                f"--max-train-steps {self.max_train_steps} and --num-epochs {self.num_epochs:g} both say how long to "
                "train; choose one."
            )
        if not self.push_to_hub and (self.hub_model_id or self.hub_private is not None):
            raise ValueError("--hub-model-id and --hub-private need --push-to-hub.")
        require(self.on is None or self.dry_run, "on", self.on, "it is for plans; add --dry-run true")
        self.fleet()
        require(self.snapshot_every >= 0, "snapshot_every", self.snapshot_every, "must be 0 (no snapshots) or more")
        self.lengths()
        require(self.fid_every >= 0, "fid_every", self.fid_every, "must be 0 (no FIDs) or more")
        require(self.sample_every >= 0, "sample_every", self.sample_every, "must be 0 (no grids) or more")
        require(
            self.sample_guidance_scale >= 1,
            "sample_guidance_scale",
            self.sample_guidance_scale,
            "must be 1 (off) or more",
        )

    def fleet(self) -> Fleet | None:
        """--on, read.

        Raises:
            ValueError: it names no GPUs of which something is known.
        """
        try:
            return None if self.on is None else parse_fleet(self.on)
        except ValueError as error:
            raise ValueError(f"--on {error}") from None

    def lengths(self) -> list[float]:
        """--snapshot-lengths, read.

        Raises:
            ValueError: one is no number, out of range, or named twice.
        """
        rule = f"expected different numbers with commas between, each {RELATIVE_LENGTH}"
        try:
            found = [RELATIVE_LENGTH.take(finite(text)) for text in self.snapshot_lengths.split(",")]
        except ValueError:
            raise ValueError(f"--snapshot-lengths {self.snapshot_lengths[:80]}: {rule}.") from None
        require(len({f"{length:g}" for length in found}) == len(found), "snapshot_lengths", self.snapshot_lengths, rule)
        return found


@dataclass(frozen=True, kw_only=True)
class TrainConfig(OptionTable):
    """The diffusion trainer's options."""

    trainer: ClassVar[str] = "train_dit"
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    optimization: OptimizationOptions = field(default_factory=OptimizationOptions)
    flow_map: FlowMapOptions = field(default_factory=FlowMapOptions)
    recipe: RecipeOptions = field(default_factory=RecipeOptions)
    run: DiffusionRunOptions = field(default_factory=DiffusionRunOptions)

    def __post_init__(self):
        self._check_adapters()
        self.recipe.check_objective(self.optimization.objective, self.optimization.prediction)
        require(
            not self.recipe.contrastive or self.optimization.min_snr_gamma is None,
            "contrastive",
            self.recipe.contrastive,
            "where --min-snr-gamma gives the error little weight nothing would hold it; leave one of them out",
        )
        require(
            self.flow_map.flow_map_guidance == 1 or self.optimization.class_dropout_prob > 0,
            "flow_map_guidance",
            self.flow_map.flow_map_guidance,
            "it steers from samples without their class, which --class-dropout-prob 0 has none of",
        )
        if self.optimization.objective != "flow-map":
            require_defaults(self.flow_map, "belongs to --objective flow-map", *asdict(self.flow_map))

    def _check_adapters(self) -> None:
        """Refuse what adapters do not go with."""
        require(
            self.model.lora_rank is None or self.optimization.optimizer == "adamw",
            "optimizer",
            self.optimization.optimizer,
            "Muon is for whole matrices, not for the factors of --lora-rank; leave it at adamw",
        )
        require(
            self.model.lora_rank is None or self.recipe.align is None,
            "align",
            self.recipe.align,
            "it shapes what a whole network learns, and --lora-rank trains adapters; leave one of them out",
        )
        require(
            self.model.lora_rank is None or not self.run.snapshot_every,
            "snapshot_every",
            self.run.snapshot_every,
            "snapshots hold whole networks, and --lora-rank trains adapters; leave one of them out",
        )

    @property
    def followed(self) -> list[float]:
        """Relative lengths of the averages that are followed for snapshots."""
        return self.run.lengths() if self.run.snapshot_every else []


def parse_config(arguments: list[str], about: str = "Train D-EMOv2, DiT or SiT.") -> TrainConfig:
    """Read the trainer's command line and, under it, the YAML file that --config names; see `parse_options`.

    Under both lie a resumed run's own options, or without a source of data the digits' recipe.
    """

    def beneath(given: Mapping[str, Any]) -> Recipe | Mapping[str, Any] | None:
        own = options_of_run(TrainConfig.trainer, given)
        # A run from before latents were measured goes on without, whatever lies beside its latents by now.
        return {"latent_statistics": "none", **own} if own else digits_recipe("digits.yaml", given)

    return parse_options(arguments, TrainConfig, TrainConfig.trainer, about, beneath)
