"""What libraries' errors become in our lines: the reason, without advice to switch safety off, addresses and noise."""

import json
import os
import pickle

import numpy as np
import pytest
import torch

from d_emo.common.commands import CommandError, command
from d_emo.common.messages import first_line, own_line


class Runs:
    """An object whose pickle runs code."""

    def __reduce__(self):
        return os.getcwd, ()


def file_with_code(tmp_path):
    torch.save({"weights": Runs()}, tmp_path / "code.pt")
    return torch.load(tmp_path / "code.pt", weights_only=True)


def damaged_file(tmp_path):
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    return torch.load(tmp_path / "bad.pt", weights_only=True)


def array_with_objects(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    return np.load(tmp_path / "objects.npy", allow_pickle=False)


def other_network(tmp_path):
    return torch.nn.Linear(2, 2).load_state_dict({"unknown": torch.zeros(1)})


def no_such_repository(tmp_path):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained("nobody/nothing")


def no_such_vae(tmp_path):
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained("nobody/nothing")


LIBRARIES = {
    file_with_code: "it is damaged, or holds objects that could run code",
    damaged_file: "it is damaged, or holds objects that could run code",
    array_with_objects: "it holds Python objects, which could run code",
    other_network: "Error(s) in loading state_dict for Linear: Missing key(s)",
    no_such_repository: "",  # in words that change with the network and the versions
    no_such_vae: "nobody/nothing",
    lambda path: b"\xff".decode("utf-8"): "it is no text in UTF-8",
    lambda path: (path / "missing").read_text(): "missing: No such file or directory (was it moved or deleted?)",
    lambda path: json.loads("{"): "Expecting property name enclosed in double quotes",
    lambda path: pickle.loads(b"x"): "invalid load key",
}
NOISE = ("weights_only", "trust_remote_code", "allow_pickle", "http", "://", "\n", "stacktrace", "GitHub", "\x1b")


@pytest.mark.parametrize("failure", LIBRARIES)
def test_a_librarys_reason_is_a_line_without_its_advice(tmp_path, offline, failure):
    with pytest.raises(Exception) as raised:
        failure(tmp_path)
    reason = first_line(raised.value)
    assert LIBRARIES[failure] in reason and len(reason) < 310
    assert not any(word in reason for word in NOISE), reason
    assert not reason.endswith(".")


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("Cannot open. See https://a.b/c for the documentation.", "Cannot open"),
        ("Cannot open x. For more information visit the page.", "Cannot open x"),
        ("We could not reach 'https://a.b/c/d' at all.", "We could not reach a.b at all"),
        ("\x1b[31mRuntimeError: no room\x1b[0m\n at line 3", "no room"),
        ("Loading x requires you to execute code. Set the option `trust_remote_code=True` to remove this error.",
         "Loading x requires you to execute code"),
        ("Pass strict=False to go on.", "value"),
        ("", "value"),
        ("a" * 1000, "a" * 300 + " ..."),
    ],
)  # fmt: skip
def test_advice_addresses_and_noise_are_cut(message, reason):
    assert first_line(ValueError(message)) == reason


def test_our_own_lines_are_said_whole_and_libraries_without_their_advice(capsys):
    @command("do")
    def main(kind):
        if kind == "ours":
            exec(
                "raise ValueError('--trust_remote_code has no counterpart; see https://a.b/c.')",
                {"__name__": "d_emo.common.options"},
            )
        if kind == "error":
            raise CommandError("own.")
        exec("raise ValueError('No. Set trust_remote_code=True.')", {"__name__": "somebodys"})

    for kind, line in (
        ("ours", "do: --trust_remote_code has no counterpart; see https://a.b/c."),
        ("theirs", "do: No"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(kind)
        assert stop.value.code == line
    assert own_line(ValueError("never raised")) == "never raised"
