"""Recipes as a YAML file has them: a name, flags of the trainer, flags of the evaluator."""

import re
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from d_emo.common.messages import first_line, shown

# Without --recipes.
OWN_RECIPES = Path(__file__).with_name("recipes.yaml")
# Names are folders, too.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
# What the comparison decides itself, in every run.
TAKEN = ("output-dir", "max-train-steps", "num-epochs", "seed", "resume-from", "config", "dataset", "train-data-dir")
TAKEN_IN_SAMPLING = ("model", "samples", "reference", "features", "output-dir", "num-images", "labels", "sweep")


@dataclass(frozen=True)
class Phase:
    """A run of the trainer.

    Attributes:
        flags: beside those that all recipes share.
        share: of the recipe's time.
    """

    flags: tuple[str, ...]
    share: float


@dataclass(frozen=True)
class Recipe:
    """What is compared.

    Attributes:
        name: of it, and of its folder.
        phases: each from the second on starts from the weights of the one before.
        sample: flags of the evaluator.
    """

    name: str
    phases: tuple[Phase, ...]
    sample: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """What a file of results keeps of it, to know it again."""
        return {
            "phases": [{**asdict(phase), "flags": list(phase.flags)} for phase in self.phases],
            "sample": list(self.sample),
        }


def read_recipes(path: Path) -> list[Recipe]:
    """The recipes of a file, in its order.

    Raises:
        ValueError: it is missing, no YAML, or a recipe cannot be read; the message names file and recipe.
    """
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ValueError(f"--recipes {path} needs PyYAML: pip install 'd-emo[train]'.") from error
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"--recipes {path}: there is no such file.") from None
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError, ValueError) as error:
        raise ValueError(f"--recipes {path} cannot be read as YAML ({first_line(error)}).") from error
    if not isinstance(found, dict) or not found:
        raise ValueError(f"--recipes {path}: expected `name: flags` lines, one a recipe.")
    return [_recipe(f"--recipes {path}", name, value) for name, value in found.items()]


def _recipe(place: str, name: Any, value: Any) -> Recipe:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"{place}: {shown(name)} is no name; use up to 64 letters, digits and . _ + - in it.")
    place = f"{place}, {name}"
    table = value if isinstance(value, dict) else {"train": value}
    if unknown := set(table) - {"train", "shares", "sample"}:
        raise ValueError(f"{place}: {shown(min(map(str, unknown)))} is unknown; it has train, shares and sample.")
    train = table.get("train")
    trained = train if isinstance(train, list) and train else [train]
    shares = table.get("shares", [1 / len(trained)] * len(trained))
    if not isinstance(shares, list) or len(shares) != len(trained) or not _are_shares(shares):
        raise ValueError(
            f"{place}: shares={shown(shares)} is not a list of one number above 0 a phase, whose sum is 1."
        )
    phases = tuple(
        Phase(_flags(place, "train", flags, TAKEN), float(share)) for flags, share in zip(trained, shares, strict=True)
    )
    return Recipe(name, phases, _flags(place, "sample", table.get("sample"), TAKEN_IN_SAMPLING))


def _are_shares(shares: list[Any]) -> bool:
    numbers = all(isinstance(share, int | float) and not isinstance(share, bool) for share in shares)
    return numbers and all(share > 0 for share in shares) and abs(sum(shares) - 1) < 1e-6


def _flags(place: str, field: str, text: Any, taken: tuple[str, ...]) -> tuple[str, ...]:
    """Flags of a text, without those that the comparison sets."""
    if text is None:
        return ()
    if not isinstance(text, str):
        raise ValueError(f"{place}: {field}={shown(text)} is no text of flags, such as --optimizer muon.")
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{place}: {field}={shown(text)} cannot be split into words ({error}).") from error
    for word in words:
        option = word.removeprefix("--").partition("=")[0].replace("_", "-")
        if word.startswith("--") and option in taken:
            raise ValueError(f"{place}: {word} is decided by the comparison, the same for all recipes; leave it out.")
    return tuple(words)
