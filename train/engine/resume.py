"""Continuing a run: from which checkpoint, whether it is the same run, and what may be another.

A checkpoint holds the options of its run in `run.json`. A continued run has to agree with them wherever its output
goes, in all that decides its results: a figure in a table must be of the run that its card describes. What changes on
purpose is named with --allow-change, and a new task starts from trained weights with --init-from instead.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d_emo.common.files import holds_something, read_json
from d_emo.train.engine.checkpoints import MANIFEST, CheckpointError, list_checkpoints, verify_checkpoint
from d_emo.train.engine.options import RUN_FILE

# Options that may differ between a run and its continuation: they do not change what is computed. (The data may move; a
# fingerprint of it is compared.)
FREE_OPTIONS = frozenset({
    "output_dir", "resume_from", "allow_change", "dry_run", "on", "max_train_steps", "num_epochs", "log_every",
    "checkpoint_every", "snapshot_every", "sample_every", "sample_steps", "sample_guidance_scale",
    "samples_per_class", "fid_every", "fid_images", "fid_reference", "fid_features", "fid_inception_weights",
    "report_to", "push_to_hub", "hub_model_id", "hub_private", "keep_checkpoints", "keep_every", "num_workers",
    "license", "on_bad_image", "dataset", "train_data_dir", "latents", "class_names", "data",
    "annotations", "mask_dir", "panoptic_json", "palette",
    "latent_statistics",
    "gradient_checkpointing", "compile", "compile_mode", "kernels", "cpu_threads",
    "epochs", "validate_every", "validation_split", "validation_dataset", "validation_dir", "validation_share",
    "validation_annotations", "validation_mask_dir", "validation_json", "validation_window", "validation_stride",
})  # fmt: skip
# What a checkpoint's weights were made for: with another value of these they mean nothing, and no permission helps.
NETWORK_OPTIONS = frozenset({
    "model", "model_config", "resolution", "color", "vae", "vae_digest", "latent_space", "lora_rank", "lora_alpha",
    "unconditional", "patch_bottleneck", "objective", "prediction", "flow_path", "num_classes", "optimizer",
    "guide_block", "dense_blocks", "end_block",
    "system", "head", "trainer",
})  # fmt: skip
# What the plan derives, by the option that it comes from.
DERIVED = {
    "lr_schedule_steps": "max_train_steps", "warmup_steps": "max_train_steps", "data_size": "data",
    "data_fingerprint": "data",
}  # fmt: skip


# What older runs left to a default, or did not write down; runs now say what it came to.
UNSAID = {"trainer": None, "mixed_precision": None, "color": "auto", "vae_digest": None, "latent_space": None}


def find_checkpoint(resume_from: str, output_dir: Path) -> tuple[Path | None, dict[str, Any], list[str]]:
    """The checkpoint to continue from, its manifest, and lines to tell the user.

    A named checkpoint must be whole. Only "latest" looks further back, and says so; where no checkpoint was ever
    written it answers None, so that a job script may always pass it.

    Raises:
        CheckpointError: the named one is damaged, or there is no whole one.
    """
    if resume_from != "latest":
        check_named(resume_from)
        path = Path(resume_from)
        return path, verify_checkpoint(path), []
    checkpoints = list_checkpoints(output_dir)
    if not checkpoints:
        return None, {}, [f"no checkpoint in {output_dir} yet{_near_name(output_dir)}: starting from the beginning."]
    notes: list[str] = []
    for path in reversed(checkpoints):
        try:
            return path, verify_checkpoint(path), [*notes, f"resuming from {path}, the newest whole checkpoint."]
        except CheckpointError as error:
            notes.append(f"skipped: {error}")
    raise CheckpointError(f"--resume-from latest: no whole checkpoint in {output_dir}; {' '.join(notes)}")


def check_named(resume_from: str) -> None:
    """Refuse a run's folder in place of a checkpoint's."""
    path = Path(resume_from)
    if resume_from != "latest" and list_checkpoints(path) and not (path / MANIFEST).exists():
        raise CheckpointError(
            f"--resume-from {path} is a run's folder; name a checkpoint in it, such as "
            f"{list_checkpoints(path)[-1]}, or continue it with --output-dir {path} --resume-from latest."
        )


def _near_name(folder: Path) -> str:
    """A run beside a folder that is not there, whose name is nearly the same."""
    if (folder / RUN_FILE).exists() or not folder.parent.is_dir():
        return ""
    runs = [path.name for path in folder.parent.iterdir() if (path / RUN_FILE).is_file()]
    close = difflib.get_close_matches(folder.name, runs, n=1)
    return f" (there is {folder.parent / close[0]})" if close else ""


def check_run_folder(output_dir: Path, resuming: bool) -> None:
    """Refuse to write into a folder that holds anything but a run, or a run that nobody asked to continue.

    Raises:
        CheckpointError: with what to do.
    """
    checkpoints = list_checkpoints(output_dir)
    if not (output_dir / RUN_FILE).is_file():
        if holds_something(output_dir):
            raise CheckpointError(
                f"--output-dir {output_dir} is not empty and holds no run of this trainer; choose another."
            )
    elif checkpoints and not resuming:  # a run that was killed before had nothing to lose
        raise CheckpointError(
            f"--output-dir {output_dir} holds a run up to {checkpoints[-1].name}; continue it with "
            "--resume-from latest, or choose another folder."
        )


def read_identity(path: Path, defaults: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a run's `run.json` says of it; None if there is none.

    Args:
        path: of the file.
        defaults: of options; they stand for those that a run of an older version did not have.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        return {**defaults, **read_json(path, "take it from a copy, or start another run")}
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _differs(name: str, stored: Mapping[str, Any], identity: Mapping[str, Any]) -> bool:
    """Whether a run and its continuation have another value of something, as far as the stored run says it."""
    if name == "vae" and stored.get("vae_digest") is not None:
        return False  # wherever it lies: its weights are compared
    unsaid = name in UNSAID and stored.get(name) == UNSAID[name]
    return not unsaid and stored.get(name) != identity.get(name)


def check_same_run(
    place: str, stored: Mapping[str, Any], identity: Mapping[str, Any], allowed: str | None, weights: Path
) -> list[str]:
    """Refuse to continue a run as another one.

    Args:
        place: what holds the stored run, as the user named it.
        stored: what decides its results, as `Plan.identity` gives it.
        identity: of the run that is to go on.
        allowed: --allow-change, names of options separated by commas.
        weights: a checkpoint, for --init-from.

    Returns:
        The changes that are allowed, `NAME old -> new` each.

    Raises:
        CheckpointError: with what differs and what to do.
    """
    permitted = {name.strip().lstrip("-").replace("-", "_") for name in (allowed or "").split(",") if name.strip()}
    known = {*identity, *DERIVED.values()}
    if unknown := permitted - known:
        name = min(unknown)
        close = difflib.get_close_matches(name, sorted(known), n=3)
        raise CheckpointError(
            f"--allow-change {name}: there is no such option"
            + (f"; did you mean {', '.join(close)}?" if close else ".")
        )
    changes = {
        name: f"{name} {stored.get(name)!r} -> {identity.get(name)!r}"
        for name in sorted({*stored, *identity})
        if name not in FREE_OPTIONS and _differs(name, stored, identity)
    }
    fixed = [name for name in changes if name in NETWORK_OPTIONS]
    refused = [name for name in changes if name not in NETWORK_OPTIONS and DERIVED.get(name, name) not in permitted]
    if not fixed and not refused:
        return list(changes.values())
    if all(DERIVED.get(name) == "data" for name in changes):
        remedies = ["name the images of before"]  # compared by number, labels and class names
    else:
        remedies = [f"leave {'them' if len(changes) > 1 else 'it'} out, for what was before"]
    if not fixed:
        names = ",".join(dict.fromkeys(DERIVED.get(name, name) for name in refused))
        remedies.append(f"go on with the new values on purpose (--allow-change {names})")
    remedies.append(f"start a new run from its weights (--init-from {weights}, another --output-dir)")
    raise CheckpointError(
        f"{place} is of another run: {'; '.join(changes[name] for name in [*fixed, *refused])}. Either "
        f"{', or '.join(remedies)}."
    )
