"""Names of tensors without what wrapped the network, and files of tensors of every kind."""

import itertools

import pytest
import torch
from safetensors.torch import save_file

from d_emo.common.tensor_files import read_state, strip_wrappers

PLAIN = {"blocks.0.attn.weight": torch.ones(2), "model_head.bias": torch.zeros(1), "norm.weight": torch.ones(3)}
WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.", "model.", "ema.", "ema_model.", "_forward_module.")


def wrapped(prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in PLAIN.items()}


@pytest.mark.parametrize("depth", (0, 1, 2, 3))
def test_wrappers_are_stripped_in_any_order(depth):
    for order in itertools.permutations(WRAPPERS, depth):
        assert strip_wrappers(wrapped("".join(order))) == PLAIN, order


def test_wrappers_inside_of_the_network_are_stripped():
    inner = {
        "module.blocks.0._checkpoint_wrapped_module._orig_mod.attn.weight": PLAIN["blocks.0.attn.weight"],
        "module.model_head._fsdp_wrapped_module.bias": PLAIN["model_head.bias"],
        "module.norm.weight": PLAIN["norm.weight"],
    }
    assert strip_wrappers(inner) == PLAIN


def test_torchs_own_wrappers_are_stripped():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    averaged = torch.optim.swa_utils.AveragedModel(torch.compile(network))
    assert strip_wrappers(averaged.state_dict()).keys() == network.state_dict().keys()


def test_a_prefix_that_not_all_share_is_a_name():
    state = {"model.weight": torch.ones(1), "head.weight": torch.ones(1)}
    assert strip_wrappers(state) == state


def test_two_networks_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"are both weight; keep one"):
        strip_wrappers({"_orig_mod.weight": torch.ones(1), "weight": torch.ones(1)})


@pytest.mark.parametrize("suffix", (".pt", ".pth", ".bin", ".safetensors"))
def test_every_kind_of_file_is_read(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(wrapped("module._orig_mod."), path)
    state = read_state(path, ("ema", "model"), "ema")
    assert state.keys() == PLAIN.keys()
    assert all(torch.equal(state[name], PLAIN[name]) for name in PLAIN)


@pytest.mark.parametrize(
    "content",
    (
        {"ema": wrapped("module."), "model": {"a": torch.ones(1)}, "epoch": 3},
        {"state_dict": {"ema": PLAIN, "model": {}}},
        {"state_dict": {**wrapped("ema."), **{f"model.{name}": torch.ones(1) for name in PLAIN}}},
        {**wrapped("module.ema."), **{f"module.model.{name}": torch.ones(1) for name in PLAIN}},
        {"module": wrapped("_orig_mod.")},
        {"model_state_dict": PLAIN, "optimizer": {}},
    ),
    ids=("parts", "parts in a holder", "parts by prefix", "parts by prefix in a wrapper", "deepspeed", "holder"),
)
def test_the_part_asked_for_is_found(tmp_path, content):
    torch.save(content, tmp_path / "full.pt")
    state = read_state(tmp_path / "full.pt", ("ema", "model"), "ema")
    assert state.keys() == PLAIN.keys()
    assert all(torch.equal(state[name], PLAIN[name]) for name in PLAIN)


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    (
        ("a.pt", b"", "not a file of tensors"),
        ("a.pt", b"\0" * 100, "not a file of tensors"),
        ("a.safetensors", b"\xff" * 100, "not a file of tensors"),
        ("a.pt", {"model": PLAIN}, "no 'ema' weights in it, but model"),
        ("a.pt", {"epoch": 1}, "holds no state dictionary"),
        ("a.pt", [torch.ones(1)], "holds no state dictionary"),
        ("a.pt", {}, "holds no state dictionary"),
        ("a.pt", {1: torch.ones(1)}, "holds no state dictionary"),
        ("a.pt", None, "there is no such file"),
    ),
)
def test_other_files_are_refused_by_name(tmp_path, name, content, rule):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=rule) as refusal:
        read_state(path, ("ema", "model"), "ema")
    assert str(refusal.value).startswith(f"{path}: ")
    assert "\n" not in str(refusal.value)
