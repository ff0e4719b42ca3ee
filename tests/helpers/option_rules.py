"""What every option of every command does with every kind of value: the table that the sweep holds the commands to.

An option has a kind; a kind says which values it accepts. Everything else is refused, in one line that names the option
or the value. What a kind calls `later` is for the run itself to judge: the parser may take it.
"""

from typing import NamedTuple

# Every value that every option is given, by name.
VALUES = {
    "a word": "word",
    "empty": "",
    "zero": "0",
    "minus one": "-1",
    "one": "1",
    "a fraction": "0.5",
    "more than one": "1.5",
    "not a number": "nan",
    "infinity": "inf",
    "minus infinity": "-inf",
    "1e30": "1e30",
    "10^30": "1" + "0" * 30,
    "10,000 digits": "9" * 10_000,
    "10,000 letters": "x" * 10_000,
    "two lines": "a\nb",
    "a list": "[1, 2]",
    "a mapping": '{"a": 1}',
}
_EVERYTHING = frozenset(VALUES) - {"empty"}


class Rule(NamedTuple):
    """What becomes of a value.

    Attributes:
        accepted: values with which the command comes to its work.
        later: values that the work itself refuses, or not: a name of something that is not there, for example.
    """

    accepted: frozenset[str]
    later: frozenset[str] = frozenset()


def _rule(*accepted: str, later: frozenset[str] = frozenset()) -> Rule:
    return Rule(frozenset(accepted), later)


RULES = {
    # whole numbers
    "count": _rule("one"),
    "count or zero": _rule("zero", "one"),
    "side of 32 or more": _rule(),
    "two numbers": _rule(),
    "length of an average": _rule(),
    "two or more": _rule(),
    "four or more": _rule(),
    # numbers
    "zero, its default": _rule("zero"),
    "positive": _rule("one", "a fraction", "more than one", "1e30", "10^30"),
    "positive or zero": _rule("zero", "one", "a fraction", "more than one", "1e30", "10^30"),
    "one, its default": _rule("one"),  # others go with an option that the base line does not have
    "a half, its default": _rule("a fraction"),
    "one to sixteen": _rule("one", "more than one"),
    "up to a thousand": _rule("one", "a fraction", "more than one"),
    "one or more": _rule("one", "more than one", "1e30", "10^30"),
    "share below one": _rule("zero", "a fraction"),
    "share": _rule("zero", "one", "a fraction"),
    "share above zero": _rule("one", "a fraction"),
    # words
    "boolean": _rule("zero", "one"),
    "boolean that needs another": _rule("zero"),  # true goes with an option that the base line does not have
    "switch": _rule(*VALUES),  # takes no value: is given or not
    "choice": _rule(),
    "text": _rule(later=_EVERYTHING),
    "JSON": _rule(later=_EVERYTHING),
    # places; their own sweep looks at what is there
    "file to read": _rule(later=_EVERYTHING),
    "folder to read": _rule(later=_EVERYTHING),
    "file to write": _rule(later=_EVERYTHING),
    "folder to write": _rule(later=_EVERYTHING),
    # beside the base command line it is refused whatever it says
    "excluded": _rule(),
}

# The kind of every option, by its name and, where commands differ, by "command name".
KINDS = {
    "count": (
        "lora_alpha", "resolution", "stream_buffer", "global_batch_size", "micro_batch_size", "log_every",
        "checkpoint_every", "keep_checkpoints", "cpu_threads", "max_train_steps", "sample_steps", "samples_per_class",
        "fid_images", "teacher_resolution", "validate_every", "batch_size", "shard_size", "num_heads", "image_size",
        "reference_images", "num_images", "steps", "guidance_channels", "feature_batch_size", "per_class", "batch",
        "latent", "image", "frames", "depth", "threads", "rounds", "count", "encoded", "sampling_table repeats",
        "token_dropping repeats",
        "train_video_classifier short_side", "clips", "crops", "held_out",
        "max_images", "validation_window", "fid_cost samples", "fid_cost reference", "patch_bottleneck", "guide_block",
        "dense_blocks",
        "evaluate_segmenter window", "evaluate_segmenter short_side", "min_image_side", "size",
        "choose_average step", "max_side", "max_waiting", "port", "demo max_steps", "evaluations",
    ),
    "count or zero": (
        "snapshot_every", "num_workers", "seed", "ignore_index", "lr_warmup_steps", "sample_every", "fid_every",
        "pictures", "frozen_stages", "rand_augment", "rand_augment_magnitude", "seeds", "curve_points",
    ),
    "side of 32 or more": (
        "train_video_classifier resolution", "make_camera_motion resolution",
        "train_classifier resolution", "train_detector resolution", "crop_size", "short_side",
        "loader_speed resolution", "receptive_field image_size",
    ),
    "length of an average": ("length", "ema"),
    "two or more": (
        "throughput repeats", "sweep_images", "num_photos", "make_camera_motion frames", "recipe_table num_images",
        "curve_images",
    ),
    "four or more": ("probe_steps", "drop_pause", "token_dropping latent"),
    "two numbers": ("guidance_interval",),
    "zero, its default": ("logit_normal_mean", "contrastive"),
    "positive": (
        "min_snr_gamma", "learning_rate", "max_grad_norm", "teacher_tau", "decay_epochs", "epochs",
        "train_video_classifier lr_decay_end", "minutes",
    ),
    "positive or zero": (
        "dispersive", "weight_decay", "adam_eps", "color_jitter", "mixup", "cutmix", "teacher_weight", "warmup_epochs",
        "train_classifier max_grad_norm", "train_detector max_grad_norm", "train_segmenter max_grad_norm",
        "train_video_classifier max_grad_norm", "lr_warmup_epochs",
        "evaluate_fid guidance_scale",
    ),
    "one, its default": ("train_dit time_shift", "logit_normal_std", "flow_map_guidance"),
    "a half, its default": ("guide_weight", "align_weight", "flow_map_split", "flow_map_share"),
    "one to sixteen": ("zoom_out",),
    "up to a thousand": ("scale_min", "scale_max", "evaluate_fid time_shift",),
    "one or more": ("lr_decay_end", "guidance_scale", "sample_guidance_scale", "internal_guidance"),
    "share below one": (
        "class_dropout_prob", "adam_beta1", "adam_beta2", "ema_decay", "validation_share", "random_erasing",
        "label_smoothing", "lr_decay_start",
    ),
    "share": (
        "train_video_classifier lr_decay_start", "rand_augment_probability",
        "warmup_lr_ratio", "min_lr_ratio", "lr_warmup_ratio", "score_threshold",
    ),
    "share above zero": ("crop_max_share", "crop_scale_min", "crop_ratio", "decay_rate"),
    "boolean": (
        "gradient_checkpointing", "compile", "unconditional", "random_flip", "ema_warmup", "dry_run", "push_to_hub",
        "statistics", "reduce_zero_label", "photometric", "fixed_statistics", "iou_crop",
    ),
    "boolean that needs another": ("drop_tokens", "streaming", "train_classifier unconditional"),
    "switch": (
        "unverified_inception", "confidence", "by_class", "full_size", "evaluate_segmenter reduce_zero_label",
        "every_class", "overwrite",
    ),
    "choice": (
        "color", "kernels", "on_bad_image", "mixed_precision", "objective", "crop", "crop_interpolation", "lr_decay",
        "dtype", "flow_path", "prediction", "weights", "metrics", "sampler", "labels", "formats", "jobs", "dtypes",
        "throughput compile", "throughput models", "noise_on", "loop_cost side",
        "clock", "layout", "time_sampling", "stride",
        "box_format", "order", "name", "head", "panoptic_classes", "lr_decay_unit", "system", "images_without_objects",
        "images_without_masks", "format", "shell", "guider", "train_dit optimizer", "lr_cooldown",
    ),
    "text": (
        "model", "class_names", "dataset_config", "dataset_split", "image_column", "label_column", "lr_scheduler",
        "report_to", "fid_reference", "fid_features", "auto_augment", "teacher", "optimizer", "features", "preset",
        "reference", "pattern", "only", "models", "license", "allow_change", "objects_column",
        "device", "host", "video_column", "image_suffix", "mask_suffix", "lr_multipliers", "no_weight_decay",
        "snapshot_lengths",
    ),
    "JSON": ("model_config", "detector_config"),
    "file to read": (
        "config", "checkpoint", "inception_weights", "fid_inception_weights", "samples", "images", "coco_annotations",
        "annotations", "palette", "panoptic_json", "recipes",
    ),
    "folder to read": (
        "init_from", "vae", "dataset", "train_data_dir", "resume_from", "validation_dataset", "validation_dir",
        "mask_dir", "data_dir", "guide", "export", "runs", "checkouts", "latent_statistics", "receptive_field images",
        "photos", "run", "align",
    ),
    "file to write": ("export_npz", "output"),
    "folder to write": ("output_dir", "cache_dir", "throughput output", "run_dir"),
    # because of what else is given, or is not
    "excluded": (
        "lora_rank",  # without --init-from
        "sample labels",  # beside --every-class
        "latents",  # to classifiers; beside --train-data-dir
        "train_classifier init_from",  # beside --model-config
        "keep_every",  # without --keep-checkpoints
        "num_epochs",  # beside --max-train-steps
        "hub_model_id",  # without --push-to-hub
        "hub_private",
        "on",  # without --dry-run
        "compile_mode",  # without --compile
        "validation_split",  # without --dataset
        "loss_weighting",  # of the objective's default
        "lr_cooldown_share",  # without --lr-scheduler wsd
        "align_block",  # without --align
        "dispersive_block",  # without --dispersive
        "end_block",  # without --objective flow-map
        "train_segmenter dataset",  # beside --train-data-dir
        "mask_column",  # without --dataset
        "validation_mask_dir",  # without --validation-dir
        "validation_json",
        "long_side",  # without --short-side
        "validation_stride",  # without --validation-window
        "encode_latents dataset",  # beside --train-data-dir
        "evaluate_classifier dataset",  # beside --data-dir
        "evaluate_video_classifier dataset",
        "train_video_classifier dataset",  # beside --train-data-dir
        "opposites",  # without --order reversed
        "evaluate_detector dataset",
        "evaluate_detector class_names",  # without --dataset
        "train_detector dataset",  # beside --train-data-dir
        "train_detector class_names",  # without --dataset
        "max_size",  # of ssdlite
        "validation_annotations",  # without --validation-dir
        "evaluate_segmenter dataset",
        "evaluate_segmenter stride",  # without --window
        "evaluate_fid model",  # beside --samples
        "sweep",  # without --model
        "checkpoints",  # without --model
    ),
}  # fmt: skip


def kind_of(command: str, option: str) -> str | None:
    """The kind of an option; None if the table has none."""
    for name in (f"{command} {option}", option):
        for kind, options in KINDS.items():
            if name in options:
                return kind
    return None
