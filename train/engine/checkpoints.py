"""Checkpoints that are whole or not there, and the folder of a run.

A run's folder holds `run.json` (what it trains), `checkpoint-STEP` folders, sample grids, the log, and at the end the
pipeline itself. A checkpoint is a pipeline folder with the averaged weights plus `training_state/` (Accelerate's) and a
checksummed `manifest.json` written last. It is made under another name and renamed, so a killed run leaves no partial
folder under a final name.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from d_emo.common.files import file_digest, partial_path, replace_folder, sync, write_json
from d_emo.common.messages import first_line
from d_emo.common.processes import is_dead_worker, is_sharded
from d_emo.train.engine.options import RUN_FILE
from d_emo.train.engine.run import Savable, UnfinishedError

MANIFEST = "manifest.json"
CARD = "README.md"
STATE_FOLDER = "training_state"
_NAME = re.compile(r"checkpoint-(\d+)")

# Options that may differ between a run and its continuation: they do not change what is computed. (The data may move; a
# fingerprint of it is compared.)
FREE_OPTIONS = frozenset({
    "output_dir", "resume_from", "dry_run", "max_train_steps", "num_epochs", "log_every", "checkpoint_every",
    "sample_every", "sample_steps", "sample_guidance_scale", "samples_per_class", "fid_every", "fid_images",
    "fid_reference", "fid_features", "fid_inception_weights", "report_to",
    "push_to_hub", "hub_model_id", "hub_private", "keep_checkpoints", "keep_every", "num_workers", "license",
    "on_bad_image", "dataset", "train_data_dir", "latents", "class_names", "data",
    "gradient_checkpointing", "compile", "kernels", "cpu_threads",
    "epochs", "validate_every", "validation_split", "validation_dataset", "validation_dir", "validation_share",
})  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint or run folder that must not be used; the message names it and says why."""


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """Folder of a checkpoint."""
    return output_dir / f"checkpoint-{step:07d}"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders by step, oldest first, whole or not."""
    found = [path for path in output_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def save_checkpoint(
    accelerator: Accelerator,
    pipeline: Savable,
    output_dir: Path,
    step: int,
    card: str,
    write_more: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Write a whole checkpoint of all processes; every process calls this.

    Args:
        accelerator: holds model, optimizer and schedule.
        pipeline: the averaged model with what it takes to use it.
        output_dir: the run's folder.
        step: optimizer steps done.
        card: what its README.md says.
        write_more: writes what else belongs into the folder; every process calls it.
    """
    final = checkpoint_path(output_dir, step)
    partial = partial_path(final)
    if accelerator.is_main_process and partial.exists():
        shutil.rmtree(partial)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial / STATE_FOLDER))
        write_more(partial)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            pipeline.save_pretrained(partial)
            (partial / CARD).write_text(card, encoding="utf-8")
            content = {"step": step, "processes": accelerator.num_processes, "sharded": is_sharded(accelerator)}
            write_manifest(partial, content)
            replace_folder(partial, final)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk, as each library says it
        shutil.rmtree(partial, ignore_errors=True)
        if is_dead_worker(error):
            raise
        reason = first_line(error)
        raise UnfinishedError(
            f"{final} cannot be written ({reason}). Earlier checkpoints are whole; make room, or save elsewhere, and "
            "continue with --resume-from latest."
        ) from error
    accelerator.wait_for_everyone()
    return final


def prune_checkpoints(output_dir: Path, keep_last: int | None, keep_every: int | None) -> list[Path]:
    """Delete all but the newest checkpoints; call it when a new one is whole.

    Args:
        output_dir: the run's folder.
        keep_last: how many of the newest stay; None keeps all.
        keep_every: checkpoints at multiples of so many steps stay as well.

    Returns:
        What was deleted. A folder loses its name before its content.
    """
    deleted = []
    for path in list_checkpoints(output_dir)[: -keep_last if keep_last else 0]:
        step = int(path.name.split("-")[1])
        if keep_every is None or step % keep_every:
            path.rename(partial_path(path))
            shutil.rmtree(partial_path(path))
            deleted.append(path)
    return deleted


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Record size and SHA-256 of every file of `folder`, beside `content`, after everything reached the disk."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        sync(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    write_json(folder / MANIFEST, {**content, "files": files})


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Return the manifest of a whole checkpoint.

    Raises:
        CheckpointError: no manifest, or a file is missing, cut short or changed; the message names it.
    """
    manifest_path = path / MANIFEST
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path}: there is no such folder.")
    if not manifest_path.is_file():
        raise CheckpointError(f"checkpoint {path}: {MANIFEST} is missing, so it was not written to its end.")
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        files = manifest["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path}: {MANIFEST} is damaged.") from error
    for name, expected in files.items():
        file_path = path / name
        if not file_path.is_file():
            raise CheckpointError(f"checkpoint {path}: {name} is missing.")
        if file_path.stat().st_size != expected["bytes"]:
            raise CheckpointError(
                f"checkpoint {path}: {name} has {file_path.stat().st_size} bytes, not {expected['bytes']}: damaged."
            )
    for name, expected in files.items():
        if file_digest(path / name) != expected["sha256"]:
            raise CheckpointError(f"checkpoint {path}: the content of {name} changed since it was written.")
    return manifest


def find_checkpoint(resume_from: str, output_dir: Path) -> tuple[Path | None, dict[str, Any], list[str]]:
    """The checkpoint to continue from, its manifest, and lines to tell the user.

    A named checkpoint must be whole. Only "latest" looks further back, and says so; where no checkpoint was ever
    written it answers None, so that a job script may always pass it.

    Raises:
        CheckpointError: the named one is damaged, or there is no whole one.
    """
    if resume_from != "latest":
        path = Path(resume_from)
        if list_checkpoints(path) and not (path / MANIFEST).exists():
            raise CheckpointError(
                f"--resume-from {path} is a run's folder; name a checkpoint in it, such as "
                f"{list_checkpoints(path)[-1]}, or continue it with --output-dir {path} --resume-from latest."
            )
        return path, verify_checkpoint(path), []
    checkpoints = list_checkpoints(output_dir)
    if not checkpoints:
        return None, {}, [f"no checkpoint in {output_dir} yet: starting from the beginning."]
    notes: list[str] = []
    for path in reversed(checkpoints):
        try:
            return path, verify_checkpoint(path), [*notes, f"resuming from {path}, the newest whole checkpoint."]
        except CheckpointError as error:
            notes.append(f"skipped: {error}")
    raise CheckpointError(f"--resume-from latest: no whole checkpoint in {output_dir}; {' '.join(notes)}")


def agreed_checkpoint(
    accelerator: Accelerator, resume_from: str, output_dir: Path
) -> tuple[Path | None, dict[str, Any], list[str]]:
    """`find_checkpoint` on the main process, its answer or its error on all of them."""
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = find_checkpoint(resume_from, output_dir)
        except CheckpointError as error:
            answer[1] = str(error)
    broadcast_object_list(answer)
    if answer[0] is not None and answer[0][0] is not None:
        path, manifest, _ = answer[0]
        sharded = manifest.get("sharded", False)
        if sharded != is_sharded(accelerator):
            answer[1] = (
                f"checkpoint {path}: its state was saved {'with' if sharded else 'without'} FSDP; continue with the "
                "launch configuration of before, or start from its averaged weights with --init-from."
            )
    if answer[1] is not None:
        raise CheckpointError(answer[1])
    return answer[0]


def check_run_folder(
    output_dir: Path, identity: dict[str, Any], resuming: bool, defaults: dict[str, Any] | None = None
) -> None:
    """Refuse to write into a folder that holds another run or anything else.

    Args:
        output_dir: the folder; may be missing.
        identity: what decides the run's results, as `Plan.identity` gives it.
        resuming: whether the user asked to continue a run.
        defaults: of options; they stand for those that a run of an older version did not have.

    Raises:
        CheckpointError: with what differs and what to do.
    """
    run_file = output_dir / RUN_FILE
    if not run_file.is_file():
        if output_dir.is_dir() and any(output_dir.iterdir()):
            raise CheckpointError(
                f"--output-dir {output_dir} is not empty and holds no run of this trainer; choose another."
            )
        return
    checkpoints = list_checkpoints(output_dir)
    if not checkpoints:
        return  # killed before it had anything to lose
    if not resuming:
        raise CheckpointError(
            f"--output-dir {output_dir} holds a run up to {checkpoints[-1].name}; continue it with "
            "--resume-from latest, or choose another folder."
        )
    stored = {**(defaults or {}), **json.loads(run_file.read_text(encoding="utf-8"))}
    changed = [
        f"{name} {stored.get(name)!r} -> {identity.get(name)!r}"
        for name in sorted({*stored, *identity})
        if name not in FREE_OPTIONS and stored.get(name) != identity.get(name)
    ]
    if changed:
        raise CheckpointError(
            f"--output-dir {output_dir} holds another run: {'; '.join(changed)}. "
            "Use the same options to continue it, or another folder."
        )


def publish_pipeline(
    pipeline: Savable,
    output_dir: Path,
    card: str,
    write_more: Callable[[Path], None] = lambda folder: None,
    index_name: str = "model_index.json",
) -> None:
    """Save the pipeline with its card into the run's folder itself, whole or not at all.

    `index_name`, the file without which a folder does not load, goes first and comes last.
    """
    partial = partial_path(output_dir / "pipeline")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    write_more(partial)
    (partial / CARD).write_text(card, encoding="utf-8")
    index = output_dir / index_name
    index.unlink(missing_ok=True)
    for part in (path for path in partial.iterdir() if path.name != index.name):
        if part.is_dir():
            replace_folder(part, output_dir / part.name)
        else:
            part.replace(output_dir / part.name)
    (partial / index.name).replace(index)
    partial.rmdir()
