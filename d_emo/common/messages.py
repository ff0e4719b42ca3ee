"""What errors say, and names that people can read."""

import errno
import unicodedata

# What to do about the system's refusals; others speak for themselves.
_REMEDIES = {
    errno.ENOSPC: "make room, or write elsewhere",
    errno.EDQUOT: "make room, or write elsewhere",
    errno.EROFS: "choose a folder that you may write in",
    errno.EACCES: "change its rights, or choose another place",
    errno.EPERM: "change its rights, or choose another place",
    errno.ENOTDIR: "part of that path is a file; choose another",
    errno.EEXIST: "part of that path is a file; choose another",
    errno.EISDIR: "name a file, not a folder",
    errno.ELOOP: "a link lies there, and nothing is written through links; delete it, or choose another place",
    errno.ENAMETOOLONG: "use shorter names",
    errno.ENOENT: "was it moved or deleted?",
}


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def describe_os_error(error: OSError) -> str:
    """What the system refuses, in one line: path, reason, remedy."""
    if error.errno is None or error.strerror is None:
        return first_line(error)
    path = f"{printable(str(error.filename))}: " if error.filename is not None else ""
    remedy = _REMEDIES.get(error.errno)
    return f"{path}{error.strerror}" + (f" ({remedy})" if remedy else "")


def printable(text: str) -> str:
    """A text that any terminal and any file takes: bytes that are not UTF-8 and control characters are escaped."""
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte of a file's name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
        return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    return character
