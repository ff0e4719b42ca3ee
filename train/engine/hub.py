"""--push-to-hub: the finished pipeline, its card, curves and samples, as a model repository of the Hub."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from d_emo.common.messages import first_line
from d_emo.train.engine.run import UnfinishedError

# What a visitor wants of a run's folder; checkpoints and logs stay.
SHARED = ("*.json", "*.md", "*.png", "scheduler/*", "transformer/*", "vae/*", "lora/*", "samples/*", "fid/*.png")
PRIVATE = ("checkpoint-*", "average-*", "run.json")


def claim_repository(name: str, private: bool | None) -> str:
    """Make the repository, or find it, before anything is computed.

    Args:
        name: of the repository, with or without its owner.
        private: of a new one; None for the account's default.

    Raises:
        ValueError: nobody is logged in, the name is taken or not allowed, or the Hub cannot be reached.
    """
    import huggingface_hub

    with _opening(name):
        return huggingface_hub.create_repo(name, private=private, exist_ok=True).repo_id


def check_repository(name: str) -> None:
    """What can be found out without making a repository.

    Raises:
        ValueError: nobody is logged in, the name is not allowed, or the Hub cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub.utils import validate_repo_id

    with _opening(name):
        validate_repo_id(name)
        huggingface_hub.whoami()


@contextlib.contextmanager
def _opening(name: str) -> Iterator[None]:
    """Within it, what the Hub refuses is a line about the repository of that name."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise ValueError(
            f"--push-to-hub: the repository {name} cannot be opened ({first_line(error)}). Log in with `hf auth "
            "login`, choose a name with --hub-model-id USER/NAME, or train without it and upload the folder later."
        ) from error


def push(folder: Path, repository: str, step: int) -> str:
    """Upload a run's folder.

    Returns:
        The address of what was uploaded.

    Raises:
        UnfinishedError: it failed; the folder is whole.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        message = f"After {step:,} steps"
        return str(
            huggingface_hub.upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message=message,
                allow_patterns=list(SHARED),
                ignore_patterns=[f"{pattern}*" for pattern in PRIVATE],
            )
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UnfinishedError(
            f"--push-to-hub: {first_line(error)}. The pipeline is whole in {folder}; send it with "
            f"`hf upload {repository} {folder}`."
        ) from error
