"""`d-emo completion`: what a real bash offers after TAB."""

import shutil
import subprocess
import sys

import pytest

from d_emo.cli import completion
from d_emo.cli.names import COMMANDS

needs_bash = pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """The script for bash, in a file."""
    import shtab

    path = tmp_path_factory.mktemp("completion") / "d-emo.bash"
    path.write_text(shtab.complete(completion.all_parsers(shtab.FILE, shtab.DIRECTORY), "bash"))
    return path


def offered(script, *words: str, folder=None) -> list[str]:
    """What bash offers for the last of these words, as it asks the function that `complete -p` names."""
    quoted = " ".join(f"'{word}'" for word in words)
    code = (
        f"source {script}\n"
        "function=$(complete -p d-emo | sed 's/.*-F \\([^ ]*\\).*/\\1/')\n"
        f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}\n"
        f"COMP_LINE='{' '.join(words)}'; COMP_POINT=${{#COMP_LINE}}\n"
        "compopt() { :; }\n"  # which bash knows within a completion only
        '"$function" d-emo "${COMP_WORDS[COMP_CWORD]}"\n'
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.split()


@needs_bash
def test_bash_completes_names_options_choices_and_folders(script, tmp_path):
    assert set(offered(script, "d-emo", "train-")) == {name for name in COMMANDS if name.startswith("train-")}
    assert set(offered(script, "d-emo", "")) >= set(COMMANDS)
    assert offered(script, "d-emo", "sample", "--every") == ["--every-class"]
    assert offered(script, "d-emo", "train", "--train-d") == ["--train-data-dir"]
    assert offered(script, "d-emo", "sample", "--dtype", "b") == ["bfloat16"]
    (tmp_path / "pictures").mkdir()
    (tmp_path / "picnic.txt").touch()
    assert offered(script, "d-emo", "encode", "--train-data-dir", "pic", folder=tmp_path) == ["pictures"]


@needs_bash
@pytest.mark.parametrize("shell", completion.SHELLS)
def test_scripts_are_printed(shell, capsys):
    completion.main([shell])
    printed = capsys.readouterr().out
    assert ("complete " if shell == "bash" else "#compdef d-emo") in printed and "--guidance-scale" in printed


def test_without_shtab_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit, match=r"completion: shtab is not installed: pip install 'd-emo\[completion\]'"):
        completion.main(["bash"])
