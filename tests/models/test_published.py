"""Published DiT and SiT weights against a plain implementation of the network that knows only the published names."""

import argparse
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.golden import seeded_weight

from d_emo import DEMOPipeline, create_model
from d_emo.models.published import export_state, import_state, published_config
from d_emo.models.transformer_dit import DiTBaselineTransformer2DModel
from d_emo.train import convert_dit

DEPTH, WIDTH, HEADS, PATCH, CHANNELS, CLASSES, SIDE = 2, 32, 4, 2, 4, 10, 8


def published_state(depth=DEPTH, width=WIDTH, classes=CLASSES) -> dict[str, torch.Tensor]:
    """Seeded weights in the published layout, written from the papers' definitions."""
    shapes = {
        "pos_embed": (1, (SIDE // PATCH) ** 2, width),
        "x_embedder.proj.weight": (width, CHANNELS, PATCH, PATCH),
        "x_embedder.proj.bias": (width,),
        "t_embedder.mlp.0.weight": (width, 256),
        "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width),
        "t_embedder.mlp.2.bias": (width,),
        "y_embedder.embedding_table.weight": (classes + 1, width),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "final_layer.adaLN_modulation.1.bias": (2 * width,),
        "final_layer.linear.weight": (PATCH * PATCH * 2 * CHANNELS, width),
        "final_layer.linear.bias": (PATCH * PATCH * 2 * CHANNELS,),
    }
    for number in range(depth):
        for name, rows, columns in (
            ("attn.qkv", 3, 1),
            ("attn.proj", 1, 1),
            ("mlp.fc1", 4, 1),
            ("mlp.fc2", 1, 4),
            ("adaLN_modulation.1", 6, 1),
        ):
            shapes[f"blocks.{number}.{name}.weight"] = (rows * width, columns * width)
            shapes[f"blocks.{number}.{name}.bias"] = (rows * width,)
    return {name: seeded_weight(name, shape) for name, shape in shapes.items()}


def plain_dit(state, images, time, labels):
    """The network as the papers define it; answers all of its output channels, (B, 2C, H, W)."""

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def modulated(x, shift, scale):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    x = F.conv2d(images, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=PATCH)
    x = x.flatten(2).transpose(1, 2) + state["pos_embed"]
    frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    angles = time[:, None].float() * frequencies
    t = torch.cat([angles.cos(), angles.sin()], dim=-1)
    c = linear(F.silu(linear(t, "t_embedder.mlp.0")), "t_embedder.mlp.2")
    c = F.silu(c + state["y_embedder.embedding_table.weight"][labels])
    for number in range(DEPTH):
        block = f"blocks.{number}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(c, f"{block}.adaLN_modulation.1").chunk(6, dim=1)
        q, k, v = linear(modulated(x, shift1, scale1), f"{block}.attn.qkv").chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        x = x + gate1[:, None] * linear((weights @ v).transpose(1, 2).flatten(2), f"{block}.attn.proj")
        hidden = F.gelu(linear(modulated(x, shift2, scale2), f"{block}.mlp.fc1"), approximate="tanh")
        x = x + gate2[:, None] * linear(hidden, f"{block}.mlp.fc2")
    shift, scale = linear(c, "final_layer.adaLN_modulation.1").chunk(2, dim=1)
    x = linear(modulated(x, shift, scale), "final_layer.linear")
    grid = SIDE // PATCH
    x = x.view(len(x), grid, grid, PATCH, PATCH, -1)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), -1, SIDE, SIDE)


def imported(objective: str) -> DiTBaselineTransformer2DModel:
    state = published_state()
    model = DiTBaselineTransformer2DModel(**published_config(state, objective, HEADS)).eval()
    import_state(state, model)
    return model


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, CHANNELS, SIDE, SIDE, generator=generator), torch.tensor([0, 7, CLASSES])


@torch.no_grad()
def test_imported_dit_equals_the_plain_network(inputs):
    images, labels = inputs
    time = torch.tensor([0, 417, 999])
    expected = plain_dit(published_state(), images, time, labels)
    assert expected.std() > 0.1
    found = imported("dit")(images, time, labels, return_dict=False)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_imported_sit_equals_the_plain_network_in_diffusers_convention(inputs):
    images, labels = inputs
    time = torch.tensor([0.0, 0.417, 0.999])  # SiT's: 1 is data
    velocity = plain_dit(published_state(), images, time, labels)[:, :CHANNELS]
    found = imported("sit")(images, 1000 * (1 - time), labels, return_dict=False)[0]
    torch.testing.assert_close(found, -velocity, atol=1e-5, rtol=1e-5)


def test_exported_weights_come_back_the_same():
    state = published_state()
    exported = export_state(imported("dit"))
    assert exported.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(exported[name], tensor, atol=0, rtol=0)
    with pytest.raises(ValueError, match="would not work in SiT's scripts"):
        export_state(imported("sit"))
    with pytest.raises(ValueError, match="is not the DiT network"):
        export_state(create_model("D-EMOv2-N-4", sample_size=8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("blocks.1.attn.qkv.bias"), r"missing \['blocks.1.to_qkv.bias'\]"),
        (lambda state: state.update(extra=torch.zeros(1)), r"unknown \['extra'\]"),
        (
            lambda state: state.update({"blocks.0.mlp.fc2.bias": torch.zeros(3)}),
            r"other shapes \['blocks.0.mlp_out.bias",
        ),
        (
            lambda state: state.pop("x_embedder.proj.weight"),
            "no DiT or SiT weights: 'x_embedder.proj.weight' is missing",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message):
    state = published_state()
    change(state)
    with pytest.raises(ValueError, match=message):
        import_state(state, DiTBaselineTransformer2DModel(**published_config(state, "dit", HEADS)))


def test_published_sizes_need_no_heads_and_others_do():
    state = published_state(depth=12, width=384, classes=1000)
    config = published_config(state, "sit")
    assert (config["num_attention_heads"], config["num_classes"], config["sample_size"]) == (6, 1000, SIDE)
    assert config["learn_sigma"] is False and config["timestep_factor"] == -0.001
    with pytest.raises(ValueError, match="2 blocks of 32 channels are no published size"):
        published_config(published_state(), "dit")
    with pytest.raises(ValueError, match="objective 'flow' is unknown"):
        published_config(state, "flow")


def convert(*arguments):
    convert_dit.main([str(argument) for argument in arguments])


def test_full_checkpoints_become_pipelines_and_go_back(tmp_path, capsys):
    ema, raw = published_state(), {name: 0.5 * tensor for name, tensor in published_state().items()}
    content = {"model": raw, "ema": ema, "opt": {"step": 3}, "args": argparse.Namespace(model="DiT-S/2")}
    torch.save(content, tmp_path / "full.pt")
    for weights, state in (("ema", ema), ("model", raw)):
        folder = tmp_path / weights
        arguments = ("--objective", "dit", "--output-dir", folder, "--weights", weights, "--vae", "none")
        convert(tmp_path / "full.pt", *arguments, "--num-heads", HEADS)
        pipeline = DEMOPipeline.from_pretrained(folder)
        torch.testing.assert_close(pipeline.transformer.proj_out.bias, state["final_layer.linear.bias"])
        assert pipeline.scheduler.config.variance_type == "learned_range"
        assert pipeline(3, num_inference_steps=2, output_type="latent").images.shape == (1, CHANNELS, SIDE, SIDE)
        convert("--export", folder, tmp_path / f"{weights}.pt")
        back = torch.load(tmp_path / f"{weights}.pt", weights_only=True)
        torch.testing.assert_close(back, dict(state))
    assert "2 blocks of 32 channels, patch 2, 10 classes, epsilon" in capsys.readouterr().out


def test_sit_checkpoints_are_sampled_as_flows(tmp_path):
    torch.save(published_state(), tmp_path / "sit.pt")
    convert(tmp_path / "sit.pt", "--objective", "sit", "--output-dir", tmp_path / "sit", "--vae", "none",
            "--num-heads", HEADS)  # fmt: skip
    pipeline = DEMOPipeline.from_pretrained(tmp_path / "sit")
    images = pipeline([1, 2], num_inference_steps=3, output_type="latent").images
    assert torch.isfinite(images).all() and pipeline.transformer.config.timestep_offset == 1.0


@torch.no_grad()
def test_sit_weights_of_another_path_and_prediction_keep_their_sign(tmp_path, inputs):
    images, labels = inputs
    torch.save(published_state(), tmp_path / "sit.pt")
    convert(tmp_path / "sit.pt", "--objective", "sit", "--flow-path", "gvp", "--prediction", "noise", "--output-dir",
            tmp_path / "sit", "--vae", "none", "--num-heads", HEADS)  # fmt: skip
    pipeline = DEMOPipeline.from_pretrained(tmp_path / "sit")
    config = pipeline.transformer.config
    assert (config.flow_path, config.prediction_type) == ("gvp", "epsilon")
    time = torch.tensor([0.1, 0.417, 0.999])
    expected = plain_dit(published_state(), images, time, labels)[:, :CHANNELS]
    found = pipeline.transformer(images, 1000 * (1 - time), labels, return_dict=False)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.isfinite(pipeline([1], num_inference_steps=3, output_type="latent").images).all()


class Harmful:
    def __reduce__(self):
        return (print, ("code of a file ran",))


def test_files_that_hold_code_or_no_weights_are_refused(tmp_path, capsys):
    arguments = ("--objective", "dit", "--output-dir", tmp_path / "out", "--vae", "none")
    torch.save({"ema": Harmful()}, tmp_path / "code.pt")
    torch.save({"model": published_state()}, tmp_path / "raw.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name, message in (
        ("code.pt", "not a file of tensors"),
        ("raw.pt", "there are no 'ema' weights in it, but model; see --weights"),
        ("list.pt", "it holds no state dictionary"),
        ("absent.pt", "there is no such file"),
    ):
        with pytest.raises(SystemExit, match=message):
            convert(tmp_path / name, *arguments)
    assert "code of a file ran" not in capsys.readouterr().out
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    torch.save(published_state(), tmp_path / "good.pt")
    with pytest.raises(SystemExit, match="is not empty and holds no pipeline"):
        convert(tmp_path / "good.pt", *arguments, "--num-heads", HEADS)
