"""Every option that names a file or a folder, with what can be wrong there: one line, and nothing is written."""

import os
import shutil
from pathlib import Path

import pytest
from helpers.commands import COMMANDS, filled, left_behind, options_of, outcome, with_option
from helpers.option_rules import kind_of

# What lies at the place, by the option's kind.
STATES = {
    "file to read": ("missing", "a folder", "a link to nowhere", "a pipe"),
    "folder to read": ("missing", "a file", "an empty folder", "a link to nowhere"),
    "file to write": ("a folder", "below a file"),
    "folder to write": ("a file", "below a file", "a link to nowhere"),
}
# These are judged by what else is there, or name no place here.
ELSEWHERE = {
    ("convert_emov2", "output_dir"): "needs published weights",
    ("train_dit", "fid_inception_weights"): "without --fid-every it is not read",
    ("evaluate_fid", "inception_weights"): "beside --features pixels it is not read",
    ("evaluate_fid", "vae"): "beside --samples it is not read",
    ("evaluate_fid", "guide"): "beside --samples it is not read",
    ("train_classifier", "latents"): "classifiers take none",
    ("evaluate_detector", "mask_dir"): "a list of instances has its masks itself",
    ("evaluate_fid", "cache_dir"): "what is kept there can be made again",
}


def put(state: str, place: Path) -> Path:
    """Make what a state says, and give its path."""
    place.mkdir(parents=True)
    path = place / "there"
    if state == "a folder":
        path.mkdir()
        (path / "thesis.txt").write_text("mine")
    elif state == "an empty folder":
        path.mkdir()
    elif state == "a file":
        path.write_text("mine")
    elif state == "below a file":
        path.write_text("mine")
        return path / "deeper"
    elif state == "a link to nowhere":
        path.symlink_to(place / "nowhere")
    elif state == "a pipe":
        os.mkfifo(path)
    return path


# Trainers share what they do with places.
QUICK = [
    pytest.param(command, marks=[pytest.mark.slow] * (name.startswith("train_") and name != "train_dit"))
    for name, command in COMMANDS.items()
    if command.quick
]


@pytest.mark.parametrize("command", QUICK, ids=lambda command: command.name)
def test_what_is_not_as_it_should_be_is_named_in_one_line(command, made, tmp_path, capsys):
    wrong, cases = [], 0
    for action in options_of(command):
        kind = kind_of(command.name, action.dest)
        if (command.name, action.dest) in ELSEWHERE:
            continue
        for number, state in enumerate(STATES.get(kind, ())):
            cases += 1
            place, out = tmp_path / f"{action.dest}-{number}", tmp_path / "out"
            path = put(state, place)
            before = sorted(place.rglob("*"))
            arguments = with_option(filled(command.base, made, out), action, str(path))
            result = outcome(command.main, arguments, capsys)
            case = f"{command.name} {action.dest}, {state}"
            if result.kind != "refused":
                wrong.append(f"{case}: {result.kind} {result.message}")
            elif str(place) not in result.message and max(action.option_strings, default="?") not in result.message:
                wrong.append(f"{case}: neither option nor path is named in {result.message!r}")
            elif left_behind(out):
                wrong.append(f"{case}: left {left_behind(out)[:3]}")
            elif sorted(place.rglob("*")) != before:
                wrong.append(f"{case}: changed the place to {sorted(place.rglob('*'))}")
            shutil.rmtree(out, ignore_errors=True)
    print(f"\n{command.name}: {cases} cases")
    assert not wrong, "\n".join(wrong)
