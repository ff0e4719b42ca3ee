"""What errors say, and names that people can read."""

import difflib
import errno
import re
import reprlib
import unicodedata
from collections.abc import Iterable
from typing import Any

# What to do about the system's refusals; others speak for themselves.
_REMEDIES = {
    errno.ENOSPC: "make room, or write elsewhere",
    errno.EDQUOT: "make room, or write elsewhere",
    errno.EFBIG: "the system takes no file of that size; allow it (ulimit -f), or write elsewhere",
    errno.EROFS: "choose a folder that you may write in",
    errno.EACCES: "change its rights, or choose another place",
    errno.EPERM: "change its rights, or choose another place",
    errno.ENOTDIR: "part of that path is a file; choose another",
    errno.EEXIST: "part of that path is a file; choose another",
    errno.EISDIR: "a folder lies where a file belongs; move it, or name another place",
    errno.ELOOP: "a link lies there, and nothing is written through links; delete it, or choose another place",
    errno.ENAMETOOLONG: "use shorter names",
    errno.ENOENT: "was it moved or deleted?",
}


# A line is at most so long; of a longer one the middle is left out, as its end says what to do.
LONGEST_LINE = 600


def one_line(text: str) -> str:
    """A message as one line that a terminal shows: without line breaks and control characters, and not endless."""
    line = printable(re.sub(r"\s+", " ", text).strip())
    if len(line) <= LONGEST_LINE:
        return line
    return f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2 :]}"


# What libraries advise that this package does not: to let a file run code, or to go on without a check.
_UNSAFE = re.compile(
    r"weights_only|trust_remote_code|allow_pickle|ignore_mismatched_sizes|allow_dangerous|verify\s*=\s*False|"
    r"safety_checker|add_safe_globals|safe_globals|trusted source|use_safetensors\s*=\s*False|strict\s*=\s*False",
    re.IGNORECASE,
)
# Facts that libraries give with such advice, or in words of their own.
_PLAIN = (
    (re.compile(r"weights.only load failed", re.IGNORECASE), "it is damaged, or holds objects that could run code"),
    (re.compile(r"codec can't decode", re.IGNORECASE), "it is no text in UTF-8"),
    (re.compile(r"maximum recursion depth", re.IGNORECASE), "it is nested too deeply"),
    (re.compile(r"object arrays cannot be loaded", re.IGNORECASE), "it holds Python objects, which could run code"),
)
# An address, of which the host is named.
_ADDRESS = re.compile(r"""['"(<\[]?\b(?:https?|file)://([^\s/)>\]'"]*)[^\s)>\]'"]*['")>\]]?""")
# Sentences that send the reader elsewhere, and that say nothing once their address is gone.
_ELSEWHERE = re.compile(
    r"\b(see|check|visit|refer to|read|report|open|file|submit) .{0,40}"
    r"(documentation|docs|issue|here|link|page|guide|error report)|"
    r"^(see|visit|read|check|more at|documentation)\b.{0,20}\w\.\w|"
    r"\bfor more (information|details)|\bread more\b|stack ?trace|check the parameter",
    re.IGNORECASE,
)
_PREFIX = re.compile(r"^(\[Errno \d+\]|\[rank\d+\]:?|[\w.]*(?:Error|Exception|Warning):)\s*")
# A reason is part of a line; the beginning of a longer one says what is wrong.
_LONGEST = 300
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def own_line(error: BaseException) -> str:
    """What an error that ends a command says, in one line: of one that this package raised all of it."""
    if said := _said_by_loader(error):
        return said
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    module = place.tb_frame.f_globals.get("__name__", "") if place is not None else ""
    if module.partition(".")[0] not in (__name__.partition(".")[0], "__main__"):
        return first_line(error)
    return one_line(str(error)) or _kind(error)


def first_line(error: BaseException) -> str:
    """Why a library refuses, as part of a line of ours: its first line that says something, with hosts for addresses.

    Left out are advice to switch safety off, sentences that only send the reader elsewhere, terminals' colours, and the
    full stop at the end.
    """
    if isinstance(error, OSError) and error.strerror is not None:
        return describe_os_error(error)
    if said := _said_by_loader(error):
        return said
    whole = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    for pattern, plain in _PLAIN:
        if pattern.search(whole):
            return plain
    for line in re.sub(r":\s*\n\s*", ": ", whole).splitlines():
        kept = []
        for sentence in _sentences(_PREFIX.sub("", line.strip())):
            bare = _ADDRESS.sub(r"\1", sentence)
            if not _UNSAFE.search(sentence) and not _ELSEWHERE.search(bare):
                kept.append(re.sub(r"\s+([.,;:])", r"\1", " ".join(bare.split())))
        text = " ".join(part for part in kept if re.search(r"\w", part)).rstrip(".:;, ")
        if text:
            return printable(text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ...")
    return _kind(error)


def kind_and_line(error: BaseException) -> str:
    """An error of any kind as a result among others: its kind as Python names it, and `first_line`."""
    return f"{type(error).__name__}: {first_line(error)}"


def _said_by_loader(error: BaseException) -> str:
    """What an error said in the loader's process that it comes from: PyTorch adds that process's traceback."""
    lines = str(error).strip().splitlines()
    if len(lines) < 2 or "DataLoader worker" not in lines[0]:
        return ""
    return _PREFIX.sub("", lines[-1])


def _sentences(line: str) -> list[str]:
    """A line, cut after full stops, exclamation marks and question marks that a space and a capital follow."""
    return [part for part in re.split(r"(?<=[.!?])\s+(?=[A-Z\[(`'\"])", line) if part]


def _kind(error: BaseException) -> str:
    """The kind of an error that says nothing more, in words: FileNotFoundError as `file not found`."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__.removesuffix("Error")).lower()
    return words or type(error).__name__


def describe_os_error(error: OSError) -> str:
    """What the system refuses, in one line: path, reason, remedy."""
    if error.errno is None or error.strerror is None:
        return first_line(error)
    path = f"{printable(str(error.filename))}: " if error.filename is not None else ""
    remedy = _REMEDIES.get(error.errno)
    return f"{path}{error.strerror}" + (f" ({remedy})" if remedy else "")


_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def readable_size(count: int) -> str:
    """A number of bytes for people: 1.5 GiB, 126 MiB."""
    power = next((power for power in range(4) if count < 1000 * 1024**power), 4)
    size = count / 1024**power
    return f"{size:.1f} {_UNITS[power]}" if size < 10 and power else f"{size:.0f} {_UNITS[power]}"


def printable(text: str) -> str:
    """A text that any terminal and any file takes: bytes that are not UTF-8 and control characters are escaped."""
    return text if text.isprintable() else "".join(map(_escaped, text))


def shown(value: Any) -> str:
    """A value as part of a line, cut short, whatever it is."""
    try:
        return re.sub(r"\s*\n\s*", " ", _SHORT.repr(value))
    except Exception:  # whatever a foreign repr raises
        return f"a {type(value).__name__}"


def nearest(name: Any, names: Iterable[str], otherwise: str = "") -> str:
    """The end of a line on an unknown name: which are near, in whatever case and with whatever dashes; else all."""
    known = list(names)
    spelled = {one.lower(): one for one in known}
    # timm writes names in small letters with underscores.
    close = [spelled[near] for near in difflib.get_close_matches(str(name).lower().replace("_", "-"), spelled, n=3)]
    return f"did you mean {', '.join(close)}?" if close else otherwise or f"choose from {', '.join(known)}."


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte of a file's name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
        return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    return character
