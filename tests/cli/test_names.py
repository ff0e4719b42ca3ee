"""`d-emo`: every command has a name, nothing heavy is loaded for the list or for help, mistakes are one line."""

import ast
import os
import re
import subprocess
import sys
from importlib import import_module

import pytest
from helpers.import_graph import modules

from d_emo.cli import main as cli
from d_emo.cli.names import COMMANDS, GROUPS, WORDS
from d_emo.common.command_line import parser_of
from d_emo.common.typed import Typed, as_typed, called_as, name_of

HEAVY = ("torch", "diffusers", "transformers", "accelerate", "numpy", "PIL")


def has_main(module: str) -> bool:
    """Whether a module has a function `main` that is a command."""
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    return any(
        isinstance(node, ast.FunctionDef) and node.name == "main" and "command(" in ast.unparse(node)
        for node in tree.body
    )


def printed_by(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of `d-emo ARGUMENTS`."""
    code = 0
    try:
        cli.main(list(arguments))
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    out, err = capsys.readouterr()
    return code, out, err


def test_every_script_of_train_and_eval_has_a_name_and_so_has_what_draws():
    scripts = {name for name in modules() if re.fullmatch(r"d_emo\.(train|eval|cli)\.\w+", name) and has_main(name)}
    scripts |= {name for name in modules() if name.startswith("d_emo.pipelines.") and has_main(name)}
    assert scripts == {named.module for named in COMMANDS.values()}
    assert sum(map(len, GROUPS.values())) == len(COMMANDS) == len(WORDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_name_runs_its_modules_parser_which_says_that_name(name, capsys):
    with called_as(cli.typed(name)):
        parser = parser_of(import_module(COMMANDS[name].module).main)
    assert parser.prog == f"d-emo {name}"
    code, out, err = printed_by(capsys, name, "--help")
    assert code == 0 and out.startswith(f"usage: d-emo {name} ") and not err
    assert not re.search(r"(python|accelerate launch) (train|eval)/|\b(train|eval)/\w+\.py", out)
    assert ("1 process is launched" in out) == COMMANDS[name].launched
    assert printed_by(capsys, name, "--version")[1].startswith(f"d-emo {name} (d_emo ")


def test_without_a_name_all_are_listed(capsys):
    code, out, _ = printed_by(capsys)
    assert code == 0 and printed_by(capsys, "--help")[1] == printed_by(capsys, "help")[1] == out
    for title, group in GROUPS.items():
        assert f"\n{title}:\n" in out
        for name, named in group.items():
            assert re.search(rf"^  {name} +{re.escape(named.about)}$", out, flags=re.MULTILINE)
    assert all(len(line) < 100 for line in out.splitlines())


def test_the_version_and_help_of_a_name(capsys):
    import d_emo

    assert printed_by(capsys, "--version")[1] == f"d-emo (d_emo {d_emo.__version__})\n"
    assert printed_by(capsys, "help", "fid") == printed_by(capsys, "fid", "--help")


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("trian", "did you mean train?"),
        ("train_dit", "did you mean train?"),
        ("evaluate_fid", "did you mean fid?"),
        ("Sample", "did you mean sample?"),
        ("throughput", "did you mean bench?"),
        ("xyzzy", "d-emo alone lists them."),
        ("--steps", "d-emo alone lists them."),
    ],
)
def test_unknown_names_suggest_the_nearest(typed, hint, capsys):
    assert printed_by(capsys, typed) == (2, "", f"d-emo: {typed!r} is no command; {hint}\n")


def test_underscores_are_hyphens_as_in_options(capsys):
    assert printed_by(capsys, "train_classifier", "--help") == printed_by(capsys, "train-classifier", "--help")


def test_mistakes_are_those_of_the_script_under_the_name_that_was_typed(capsys):
    code, _, err = printed_by(capsys, "encode", "--foo", "1")
    assert (code, err) == (1, "d-emo encode: --foo is not an option; see --help for the options.\n")
    code, _, err = printed_by(capsys, "compare")
    assert (code, err) == (2, "d-emo compare: the following arguments are required: runs\n")


@pytest.mark.parametrize(
    ("said", "typed"),
    [
        ("run train/encode_latents.py again.", "run d-emo encode again."),
        ("as train/convert_dit.py does; or", "as d-emo convert does; or"),
        ("accelerate launch train/train_dit.py --config x", "d-emo train --config x"),
        ("python -m d_emo.eval.evaluate_fid --model m", "d-emo fid --model m"),
        ("what encode_latents.py --statistics measured", "what d-emo encode --statistics measured"),
        ("python train/my_train_dit.py and train.py", "python train/my_train_dit.py and train.py"),
        ("accelerate launch --config_file train/configs/accelerate/fsdp2.yaml ...",) * 2,
        ("my app.py and models.py; pipelines/sample.py", "my app.py and models.py; d-emo sample"),
        ("d_emo.train.train_dit", "d_emo.train.train_dit"),
    ],
)
def test_hints_name_what_the_user_can_type(said, typed):
    assert as_typed(said) == said and name_of("train_dit") == "train_dit"
    with called_as(cli.typed("train")):
        assert as_typed(said) == typed and name_of("train_dit") == "d-emo train"
    assert as_typed(said) == said


def test_a_failing_command_leaves_no_name_behind():
    with pytest.raises(KeyError), called_as(Typed("x", {})):
        raise KeyError
    assert name_of("fid") == "fid"


def test_neither_the_list_nor_any_help_loads_a_library():
    code = (
        "import contextlib, io, sys\n"
        "from d_emo.cli.main import main\n"
        "from d_emo.cli.names import COMMANDS\n"
        "for words in ([], ['--help'], ['--version'], *([name, '--help'] for name in COMMANDS)):\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "        main(words)\n"
        f"    loaded = [name for name in {HEAVY} if name in sys.modules]\n"
        "    assert not loaded, (words, loaded)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_python_m_d_emo_is_the_same_and_ends_quietly_when_nobody_reads(capsys):
    listed = printed_by(capsys)[1]
    done = subprocess.run([sys.executable, "-m", "d_emo"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, listed, "")
    if os.name == "posix":
        piped = f"{sys.executable} -m d_emo | true; echo ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", piped], capture_output=True, text=True, check=False)
        assert done.stdout.strip() in ("0", "141") and not done.stderr


def test_the_packages_files_of_options_are_found_from_any_folder(monkeypatch, tmp_path):
    from d_emo.train.diffusion.config import parse_config

    monkeypatch.chdir(tmp_path)
    assert parse_config(["--config", "train/configs/digits.yaml"], "").run.output_dir == "runs/digits"
    (tmp_path / "train" / "configs").mkdir(parents=True)
    (tmp_path / "train" / "configs" / "digits.yaml").write_text("output_dir: mine\n")
    assert parse_config(["--config", "train/configs/digits.yaml"], "").run.output_dir == "mine"
    with pytest.raises(ValueError, match=r"train/configs/none\.yaml: there is no such file"):
        parse_config(["--config", "train/configs/none.yaml"], "")
