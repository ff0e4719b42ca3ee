"""Checkpoints that are whole or not there, and the folder of a run.

A run's folder holds `run.json` (what it trains), `checkpoint-STEP` folders, sample grids, the log, and at the end the
pipeline itself. A checkpoint is a pipeline folder with the averaged weights plus `training_state/` (see `state`), its
run's `run.json` and a `manifest.json`, written last, with a checksum of every file. It is made under another name and
renamed, so a killed run leaves no partial folder under a final name.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError

from d_emo.common.files import (
    content_digest,
    file_digest,
    new_partial_folder,
    partial_path,
    remove,
    replace_folder,
    sync,
    write_json,
)
from d_emo.common.messages import first_line
from d_emo.common.processes import is_dead_worker
from d_emo.images.listing import is_hidden
from d_emo.train.engine.options import RUN_FILE
from d_emo.train.engine.run import Savable, UnfinishedError

MANIFEST = "manifest.json"
OWN_DIGEST = "sha256"
CARD = "README.md"
STATE_FOLDER = "training_state"
_NAME = re.compile(r"checkpoint-(\d+)")


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
    identity: dict[str, Any],
    write_state: Callable[[Path], None],
    write_more: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Write a whole checkpoint of all processes; every process calls this.

    Args:
        accelerator: of the run.
        pipeline: the averaged model with what it takes to use it.
        output_dir: the run's folder.
        step: optimizer steps done.
        card: what its README.md says.
        identity: what decides the run's results, for its `run.json`.
        write_state: writes the run's state into a folder; every process calls it.
        write_more: writes what else belongs into the checkpoint's folder; the main process calls it.

    Raises:
        UnfinishedError: it cannot be written; nothing of it is left.
    """
    final = checkpoint_path(output_dir, step)
    partial = partial_path(final)
    try:
        if accelerator.is_main_process:
            (new_partial_folder(final) / STATE_FOLDER).mkdir()
        accelerator.wait_for_everyone()
        write_state(partial / STATE_FOLDER)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            pipeline.save_pretrained(partial)
            write_more(partial)
            (partial / CARD).write_text(card, encoding="utf-8", errors="backslashreplace")  # names of folders
            write_json(partial / RUN_FILE, identity)
            write_manifest(partial, {"step": step, "processes": accelerator.num_processes})
            replace_folder(partial, final)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk, as each library says it
        remove(partial)
        if is_dead_worker(error):
            raise
        reason = first_line(error)
        raise UnfinishedError(
            f"step {step}: {final} cannot be written ({reason}). Earlier checkpoints in --output-dir {output_dir} are "
            "whole; continue with --resume-from latest, or from one of them with another --output-dir."
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
            remove(partial_path(path))
            deleted.append(path)
    return deleted


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Record size and SHA-256 of every file of `folder`, beside `content`, after everything reached the disk.

    The manifest carries a digest of its own.
    """
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        sync(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    content = {**content, "files": files}
    write_json(folder / MANIFEST, {**content, OWN_DIGEST: content_digest(content)})


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Return the manifest of a whole checkpoint.

    Raises:
        CheckpointError: no manifest, or a file is missing, cut short, changed, or there and not in the manifest; the
            message names it.
    """
    manifest_path = path / MANIFEST
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path}: there is no such folder.")
    if not manifest_path.is_file():
        raise CheckpointError(f"checkpoint {path}: {MANIFEST} is missing, so it was not written to its end.")
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        own = manifest.pop(OWN_DIGEST, None)  # older versions wrote none
        if own is not None and own != content_digest(manifest):
            raise ValueError("its content changed")
        files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        step = int(manifest["step"])
        manifest["processes"] = int(manifest.get("processes", 1))
        folders = {name.partition("/")[0] for name in files if "/" in name}
        if step < 0 or STATE_FOLDER not in folders or any(".." in Path(name).parts for name in files):
            raise ValueError("it lists no state")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"checkpoint {path}: {MANIFEST} is damaged ({first_line(error)}).") from error
    match = _NAME.fullmatch(path.name)
    if match and int(match.group(1)) != step:
        raise CheckpointError(f"checkpoint {path}: it was renamed, it is of step {step}.")
    for name, (size, _) in files.items():
        file_path = path / name
        if not file_path.is_file():
            raise CheckpointError(f"checkpoint {path}: {name} is missing.")
        if file_path.stat().st_size != size:
            raise CheckpointError(
                f"checkpoint {path}: {name} has {file_path.stat().st_size} bytes, not {size}: damaged."
            )
    # What others put beside its folders (scores, notes) is never read; in them, it would be.
    for part in (part for folder in folders for part in sorted((path / folder).rglob("*")) if not part.is_dir()):
        if (name := part.relative_to(path).as_posix()) not in files and not is_hidden(part.name):
            raise CheckpointError(f"checkpoint {path}: {name} was not written with it; move it elsewhere.")
    for name, (_, digest) in files.items():
        if file_digest(path / name) != digest:
            raise CheckpointError(f"checkpoint {path}: the content of {name} changed since it was written.")
    return manifest


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
    partial = new_partial_folder(output_dir / "pipeline")
    pipeline.save_pretrained(partial)
    write_more(partial)
    (partial / CARD).write_text(card, encoding="utf-8", errors="backslashreplace")  # names of folders
    index = output_dir / index_name
    index.unlink(missing_ok=True)
    for part in (path for path in partial.iterdir() if path.name != index.name):
        if part.is_dir():
            replace_folder(part, output_dir / part.name)
        else:
            part.replace(output_dir / part.name)
    (partial / index.name).replace(index)
    partial.rmdir()
