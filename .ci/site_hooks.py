"""What MkDocs does for the site besides the pages of docs/ (`hooks` in mkdocs.yml).

- Documents that lie elsewhere are pages, too; links between documents hold on the site as they do in the repository.
- The commands' options are a page, made of their parsers.
- What was built is looked through: a page that would load anything from another host is a warning, which `--strict`
  makes an error.
"""

import argparse
import importlib
import os.path
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
log = get_plugin_logger("site")

# Documents outside of docs/ that are pages.
ELSEWHERE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "eval/benchmarks/gpu/README.md",
    "eval/benchmarks/gpu/cifar10_ti2/README.md",
)
COMMANDS_PAGE = "reference/commands.md"
# A link or picture in Markdown: what comes before its target, and the target without its anchor.
_LINK = re.compile(r"(\]\()([^)\s#:]+)(?=[)#])")
# What a page loads by itself: scripts, pictures, frames, what a <link> fetches; a canonical address fetches nothing.
_LOADS = re.compile(
    r"<(?:script|img|iframe|source|video|audio|embed)\b[^>]*?\bsrc\s*=\s*[\"']?((?:https?:)?//[^\"'\s>]+)"
    r"|<link\b(?![^>]*\brel=[\"']?(?:canonical|prev|next))[^>]*?\bhref\s*=\s*[\"']?((?:https?:)?//[^\"'\s>]+)"
    r"|<object\b[^>]*?\bdata\s*=\s*[\"']?((?:https?:)?//[^\"'\s>]+)",
    re.IGNORECASE,
)
_STYLE_LOADS = re.compile(r"(?:url\(\s*[\"']?|@import\s+[\"'])((?:https?:)?//[^\"')\s]+)", re.IGNORECASE)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are no files of docs/."""
    for name in ELSEWHERE:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    files.append(File.generated(config, COMMANDS_PAGE, content=commands_page()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they hold on the site."""
    name = page.file.src_uri
    return relinked(markdown, name if name in ELSEWHERE else f"docs/{name}", name)


def on_post_build(config: Any) -> None:
    """Warn of every page and style that loads something from another host."""
    for path in sorted(Path(config["site_dir"]).rglob("*")):
        if path.suffix in (".html", ".css"):
            for address in foreign_loads(path.read_text(encoding="utf-8"), path.suffix):
                log.warning(f"{path.relative_to(config['site_dir'])} loads {address}")


def relinked(markdown: str, document: str, page: str) -> str:
    """A document's links for its place on the site.

    Args:
        markdown: the document.
        document: its path in the repository.
        page: its path on the site; docs/ is the site's root, `ELSEWHERE` keep their paths.
    """

    def relink(found: re.Match) -> str:
        target = os.path.normpath(os.path.join(os.path.dirname(document), found[2]))  # noqa: PTH118, PTH120  # of no file
        place = target.removeprefix("docs/")
        return f"{found[1]}{os.path.relpath(place, os.path.dirname(page) or '.')}"  # noqa: PTH120

    parts = re.split(r"(^ *```.*?^ *```)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if index % 2 else _LINK.sub(relink, part) for index, part in enumerate(parts))


def foreign_loads(text: str, suffix: str) -> list[str]:
    """The addresses on other hosts that a page (.html) or a style (.css) loads when it is opened."""
    pages = [next(filter(None, groups)) for groups in _LOADS.findall(text)] if suffix == ".html" else []
    return pages + _STYLE_LOADS.findall(text)


def commands_page() -> str:
    """Every command with its options, in tables."""
    from d_emo.cli.names import GROUPS

    lines = [
        "# Commands and options",
        "",
        "What `--help` prints, by command. Every command takes `--version`; hyphens and underscores are the same. The "
        "trainers also take a YAML file of the same names (`--config`), which the command line overrides.",
    ]
    for title, group in GROUPS.items():
        lines += ["", f"## To {title}"]
        for name in group:
            lines += ["", *command_section(name)]
    return "\n".join(lines) + "\n"


def command_section(name: str) -> Iterator[str]:
    """A command's heading, text, examples and tables of options, as `d-emo NAME --help` has them."""
    from d_emo.cli.main import typed
    from d_emo.cli.names import COMMANDS, PROGRAM
    from d_emo.common.command_line import parser_of, split_docstring
    from d_emo.common.typed import as_typed, called_as

    named = COMMANDS[name]
    module = importlib.import_module(named.module)
    with called_as(typed(name)):
        text, examples = split_docstring(as_typed(module.__doc__ or ""))
        yield from (f"### {PROGRAM} {name}", "", text)
        if examples:
            yield from ("", "```bash", examples.strip("\n"), "```")
        if named.launched:
            yield from ("", f"On several processes: `accelerate launch -m {named.module}` and the same options.")
        for group in parser_of(module.main)._action_groups:
            actions = [
                action
                for action in group._group_actions
                if action.help != argparse.SUPPRESS and action.dest not in ("help", "version")
            ]
            if actions:
                yield from ("", f"| {group.title or 'options'} | |", "|---|---|")
                yield from (f"| {option_name(action)} | {as_typed(cell(action))} |" for action in actions)


def option_name(action: argparse.Action) -> str:
    """`--name` or, of an argument without one, what it is called."""
    name = max(action.option_strings, key=len) if action.option_strings else str(action.metavar or action.dest)
    return f"`{name}`"


def cell(action: argparse.Action) -> str:
    """What an option's help says, with its choices and default, fit for a table."""
    from d_emo.common.command_line import with_default

    text = with_default((action.help or "").replace("%%", "%"), action.default)
    if action.choices and not re.search(r"\bNone\b", str(action.choices)):
        text = f"One of {', '.join(map(str, action.choices))}. {text}"
    return re.sub(r"([|*_<>\[\]`])", lambda found: f"&#{ord(found[1])};", text).replace("\n", " ")


if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # the checkout that the site is of
