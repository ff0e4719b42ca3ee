"""Class names: ImageNet's table, and names to ids without guessing.

A name may list several synonyms separated by commas ("killer whale, killer, orca"), as ImageNet's do.
"""

import collections
import difflib
import functools
import json
import unicodedata
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from d_emo.common import checks
from d_emo.common.messages import describe_os_error, first_line, printable, shown

LabelLike = str | int


@functools.cache
def imagenet_wnid_to_name() -> dict[str, str]:
    """ImageNet-1K's 1,000 WordNet ids and English names in the order of the class ids (ILSVRC 2012)."""
    return json.loads(resources.files("d_emo.images").joinpath("imagenet_classes.json").read_text(encoding="utf-8"))


def english_names(folder_names: Iterable[str]) -> list[str]:
    """Replace ImageNet's WordNet ids ("n02099601") by English names; other names pass through.

    Two classes are called "crane", two "maillot" and, but for the case, two "cardigan": these keep their WordNet id as
    a synonym ("crane, n02012849"), so that full names are unique and the bare name is reported as ambiguous.
    """
    table = imagenet_wnid_to_name()
    counts = collections.Counter(map(_fold, table.values()))

    def english(name: str) -> str:
        if name not in table:
            return name
        return table[name] if counts[_fold(table[name])] == 1 else f"{table[name]}, {name}"

    return [english(name) for name in folder_names]


def read_class_names(source: str) -> list[str]:
    """Class names in the order of their ids.

    Args:
        source: "imagenet" for ImageNet-1K's WordNet ids, or a file: JSON (a list, or a table of names by id), or text
            with a name a line.

    Raises:
        ValueError: there is no such file, or ids are missing or names repeated in it.
    """
    source = checks.text(source, "--class-names")
    if source == "imagenet":
        return list(imagenet_wnid_to_name())
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"--class-names {source}: there is no such file ('imagenet' stands for ImageNet's).")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"--class-names {source}: no list of names (line {line} is not in UTF-8); save the file as UTF-8."
        ) from error
    except OSError as error:
        raise ValueError(f"--class-names {describe_os_error(error)}.") from error
    if "\0" in text:
        raise ValueError(f"--class-names {source}: no list of names (there are zero bytes in it); copy it again.")
    names = _names_of_json(source, text) if path.suffix == ".json" else text.rstrip().splitlines()
    names = [class_name(name) for name in names]
    unit, offset = ("id", 0) if path.suffix == ".json" else ("line", 1)
    wrong = "" if names else "there is nothing in it"
    for place, name in enumerate(names):
        if not name or (before := names.index(name)) < place:
            what = f"repeats {name!r} of {unit} {before + offset}" if name else "is empty"
            wrong = f"{unit} {place + offset} {what}"
            break
    if wrong:
        raise ValueError(
            f"--class-names {source}: empty, or with empty or repeated names ({wrong}); give every class a name of its "
            "own, in the order of the ids."
        )
    return names


def _names_of_json(source: str, text: str) -> list[str]:
    try:
        content = json.loads(text)
        names = [content[str(i)] for i in range(len(content))] if isinstance(content, dict) else content
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("something else than words")
    except (ValueError, KeyError, RecursionError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else first_line(error)
        raise ValueError(
            f"--class-names {source}: no list of names, and no table by the ids 0 to N - 1 ({reason})."
        ) from error
    return names


def normalize_id2label(id2label: Mapping[Any, str], num_classes: int) -> dict[int, str]:
    """Return the table with integer keys in order (JSON turns them into strings).

    Raises:
        ValueError: an id is not an integer in [0, num_classes).
    """
    table = {}
    for key, name in _table_of_names(id2label, checks.whole(num_classes, "num_classes", least=0)).items():
        try:
            label_id = int(key)
        except (TypeError, ValueError):
            raise ValueError(f"id2label has the key {key!r}; keys are class ids, 0 to {num_classes - 1}.") from None
        if not 0 <= label_id < num_classes:
            raise ValueError(f"id2label names class {label_id}, the model has classes 0 to {num_classes - 1}.")
        table[label_id] = str(name)
    return dict(sorted(table.items()))


class LabelResolver:
    """Turns names and ids into ids.

    Args:
        id2label: names by id; may be empty, then only ids are accepted.
        num_classes: ids run from 0 to num_classes - 1.
    """

    def __init__(self, id2label: Mapping[int, str], num_classes: int):
        self.id2label = dict(_table_of_names(id2label, num_classes))
        self.num_classes = num_classes
        self._by_exact_name: dict[str, set[int]] = {}
        self._by_full_name: dict[str, set[int]] = {}
        self._by_synonym: dict[str, set[int]] = {}
        for label_id, name in self.id2label.items():
            self._by_exact_name.setdefault(class_name(name), set()).add(label_id)
            self._by_full_name.setdefault(_fold(name), set()).add(label_id)
            for synonym in name.split(","):
                self._by_synonym.setdefault(_fold(synonym), set()).add(label_id)

    def resolve(self, label: LabelLike) -> int:
        """Return the id of a name or id.

        A name matches by its exact full string first, then by its full string and then as a synonym with case and
        spacing ignored.

        Raises:
            ValueError: unknown id; unknown name (close matches are listed); a name that several classes share.
            TypeError: neither a string nor an integer.
        """
        if isinstance(label, str):
            return self._resolve_name(label)
        if isinstance(label, bool) or not hasattr(label, "__index__"):
            raise TypeError(f"label {label!r} is a {type(label).__name__}; pass a class name or an integer id.")
        label_id = label.__index__()
        if not 0 <= label_id < self.num_classes:
            raise ValueError(f"label {label_id} is out of range; this model has classes 0 to {self.num_classes - 1}.")
        return label_id

    def _resolve_name(self, name: str) -> int:
        if not self.id2label:
            raise ValueError(f"label {name!r} is a name, but this model carries no class names (id2label); pass an id.")
        folded = _fold(name)
        exact = self._by_exact_name.get(class_name(name), ())
        for found in (exact, self._by_full_name.get(folded, ()), self._by_synonym.get(folded, ())):
            matches = sorted(found)
            if len(matches) == 1:
                return matches[0]
            if matches:
                candidates = "; ".join(f"{i}: {self.id2label[i]}" for i in matches)
                raise ValueError(f"label {name!r} is ambiguous; pass one of these ids or full names: {candidates}.")
        close = difflib.get_close_matches(folded, self._by_synonym, n=5)
        if close:
            options = "; ".join(f"{match} ({', '.join(map(str, sorted(self._by_synonym[match])))})" for match in close)
            raise ValueError(f"label {name!r} is unknown; close names (ids): {options}.")
        examples = ", ".join(list(self.id2label.values())[:5])
        raise ValueError(
            f"label {name!r} is unknown among {len(self.id2label)} names such as {examples}; "
            "the pipeline's id2label lists all of them."
        )


def _table_of_names(id2label: Any, num_classes: int) -> Mapping[Any, str]:
    if not isinstance(id2label, Mapping):
        raise ValueError(f"id2label={shown(id2label)} is not a table of names by class id, 0 to {num_classes - 1}.")
    return id2label


def class_name(name: str) -> str:
    """A name of a class as it is kept and compared: Unicode's composed form (NFC), no spaces around it, printable.

    File systems give "é" as one character or as two, and bytes that are not UTF-8.
    """
    return unicodedata.normalize("NFC", printable(name.strip()))


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", " ".join(class_name(name).split()).casefold())
