"""Published LightningDiT and JiT weights against plain implementations that know only the published names and time."""

import argparse
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.golden import seeded_weight

from d_emo import DEMOPipeline, JiTTransformer2DModel, LightningDiTTransformer2DModel
from d_emo.models.published_rotary import is_rotary_state, rotary_model
from d_emo.train import convert_dit

DEPTH, WIDTH, HEADS, CLASSES, SIDE = 4, 32, 2, 5, 8
HEAD, INNER = WIDTH // HEADS, int(2 / 3 * 4 * WIDTH)
KEPT, CONTEXT, START = 6, 3, 1  # JiT: bottleneck, class tokens, and the block before which they join: a third of DEPTH


def plain_table(grid: int) -> torch.Tensor:
    """Angles of every channel: (grid * grid, HEAD). Rows turn the first half, columns the second, pairs alike."""
    table = torch.zeros(grid, grid, HEAD)
    for row in range(grid):
        for column in range(grid):
            for pair in range(HEAD // 4):
                rate = 10_000 ** (-2 * pair / (HEAD // 2))
                table[row, column, 2 * pair : 2 * pair + 2] = row * rate
                table[row, column, HEAD // 2 + 2 * pair : HEAD // 2 + 2 * pair + 2] = column * rate
    return table.flatten(0, 1)


def shared_shapes(patch: int, channels: int, grid: int, out_channels: int, normed: bool) -> dict[str, tuple[int, ...]]:
    shapes = {
        "pos_embed": (1, grid * grid, WIDTH),
        "t_embedder.mlp.0.weight": (WIDTH, 256),
        "t_embedder.mlp.2.weight": (WIDTH, WIDTH),
        "y_embedder.embedding_table.weight": (CLASSES + 1, WIDTH),
        "final_layer.norm_final.weight": (WIDTH,),
        "final_layer.adaLN_modulation.1.weight": (2 * WIDTH, WIDTH),
        "final_layer.linear.weight": (patch * patch * out_channels, WIDTH),
    }
    for number in range(DEPTH):
        products = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH), "mlp.w12": (2 * INNER, WIDTH),
                    "mlp.w3": (WIDTH, INNER), "adaLN_modulation.1": (6 * WIDTH, WIDTH)}  # fmt: skip
        norms = {"norm1": (WIDTH,), "norm2": (WIDTH,)} | (
            {"attn.q_norm": (HEAD,), "attn.k_norm": (HEAD,)} if normed else {}
        )
        for name, shape in (products | norms).items():
            shapes[f"blocks.{number}.{name}.weight"] = shape
    biased = [name for name, shape in shapes.items() if len(shape) == 2 and "embedding_table" not in name]
    return shapes | {name.replace(".weight", ".bias"): shapes[name][:1] for name in biased}


def seeded(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    weights = {name: seeded_weight(name, shape) for name, shape in shapes.items()}
    return {name: 1 + tensor if "norm" in name else tensor for name, tensor in weights.items()}


def lightningdit_state(patch=1, channels=6, normed=False, learn_sigma=False) -> dict[str, torch.Tensor]:
    grid = SIDE // patch
    shapes = shared_shapes(patch, channels, grid, channels * (1 + learn_sigma), normed)
    shapes |= {"x_embedder.proj.weight": (WIDTH, channels, patch, patch), "x_embedder.proj.bias": (WIDTH,)}
    table = plain_table(grid)
    return {**seeded(shapes), "feat_rope.freqs_cos": table.cos(), "feat_rope.freqs_sin": table.sin()}


def jit_state(patch=4, side=16) -> dict[str, torch.Tensor]:
    shapes = shared_shapes(patch, 3, side // patch, 3, normed=True)
    shapes |= {
        "x_embedder.proj1.weight": (KEPT, 3, patch, patch),
        "x_embedder.proj2.weight": (WIDTH, KEPT, 1, 1),
        "x_embedder.proj2.bias": (WIDTH,),
        "in_context_posemb": (1, CONTEXT, WIDTH),
    }
    return seeded(shapes)


def plain_network(state, images, time, labels):
    """LightningDiT or JiT as their papers define them, in their own time; (B, C, H, W)."""

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def normed(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"]

    def turn(x, table):
        swapped = torch.empty_like(x)
        swapped[..., 0::2], swapped[..., 1::2] = -x[..., 1::2], x[..., 0::2]
        return x * table.cos() + swapped * table.sin()

    jit = "x_embedder.proj1.weight" in state
    if jit:
        patch = state["x_embedder.proj1.weight"].shape[-1]
        x = F.conv2d(images, state["x_embedder.proj1.weight"], stride=patch)
        x = F.conv2d(x, state["x_embedder.proj2.weight"], state["x_embedder.proj2.bias"])
    else:
        patch = state["x_embedder.proj.weight"].shape[-1]
        x = F.conv2d(images, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=patch)
    grid = x.shape[-1]
    x = x.flatten(2).transpose(1, 2) + state["pos_embed"]
    angles = time[:, None].float() * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    t = linear(F.silu(linear(torch.cat([angles.cos(), angles.sin()], -1), "t_embedder.mlp.0")), "t_embedder.mlp.2")
    y = state["y_embedder.embedding_table.weight"][labels]
    c, table = F.silu(t + y), plain_table(grid)
    for number in range(DEPTH):
        if jit and number == START:
            x = torch.cat([y[:, None] + state["in_context_posemb"], x], 1)
            table = torch.cat([torch.zeros(CONTEXT, HEAD), table])
        block = f"blocks.{number}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(c, f"{block}.adaLN_modulation.1")[:, None].chunk(6, -1)
        q, k, v = linear(normed(x, f"{block}.norm1") * (1 + scale1) + shift1, f"{block}.attn.qkv").chunk(3, -1)
        q, k, v = (part.unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for part in (q, k, v))
        if f"{block}.attn.q_norm.weight" in state:
            q, k = normed(q, f"{block}.attn.q_norm"), normed(k, f"{block}.attn.k_norm")
        weights = (turn(q, table) @ turn(k, table).transpose(-1, -2) / math.sqrt(HEAD)).softmax(-1)
        x = x + gate1 * linear((weights @ v).transpose(1, 2).flatten(2), f"{block}.attn.proj")
        first, second = linear(normed(x, f"{block}.norm2") * (1 + scale2) + shift2, f"{block}.mlp.w12").chunk(2, -1)
        x = x + gate2 * linear(F.silu(first) * second, f"{block}.mlp.w3")
    shift, scale = linear(c, "final_layer.adaLN_modulation.1")[:, None].chunk(2, -1)
    x = linear(normed(x[:, -grid * grid :], "final_layer.norm_final") * (1 + scale) + shift, "final_layer.linear")
    x = x.view(len(x), grid, grid, patch, patch, -1)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), -1, grid * patch, grid * patch)


TIME, LABELS = torch.tensor([0.0, 0.417, 0.999]), torch.tensor([0, 3, CLASSES])  # the papers' time: 1 is data


def pictures(channels: int, side: int) -> torch.Tensor:
    return torch.randn(3, channels, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("options", [{}, {"patch": 2}, {"normed": True}, {"learn_sigma": True}], ids=str)
@torch.no_grad()
def test_imported_lightningdit_equals_the_plain_network_in_diffusers_convention(options):
    state = lightningdit_state(**options)
    model = rotary_model(state)
    assert isinstance(model, LightningDiTTransformer2DModel) and not model.training
    assert model.config.qk_norm == options.get("normed", False)
    images = pictures(6, SIDE)
    velocity = plain_network(state, images, TIME, LABELS)[:, :6]
    assert velocity.std() > 0.1
    found = model(images, 1000 * (1 - TIME), LABELS).sample
    torch.testing.assert_close(found, -velocity, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_imported_jit_equals_the_plain_network_in_diffusers_convention():
    state = jit_state()
    model = rotary_model(state)
    assert isinstance(model, JiTTransformer2DModel)
    assert (model.config.prediction_type, model.config.flow_path, model.context_start) == ("sample", "linear", START)
    images = pictures(3, 16)
    data = plain_network(state, images, TIME, LABELS)
    assert data.std() > 0.1
    torch.testing.assert_close(model(images, 1000 * (1 - TIME), LABELS).sample, data, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_noise_of_twice_the_deviation_is_a_path_with_plain_noise_to_the_caller():
    """Of 512 pixels: z = t data + (1 - t) 2 noise there, x = (1 - s) data + s noise here, with one time for each."""
    state = jit_state(patch=128, side=512)
    model = rotary_model(state)
    assert model.config.noise_scale == 2.0
    time = TIME[:, None, None, None]
    data, noise = pictures(3, 512), torch.randn(3, 3, 512, 512, generator=torch.Generator().manual_seed(1))
    expected = plain_network(state, time * data + (1 - time) * 2 * noise, TIME, LABELS)
    s = 2 * (1 - TIME) / (2 * (1 - TIME) + TIME)
    sample = (1 - s)[:, None, None, None] * data + s[:, None, None, None] * noise
    found = model(sample, 1000 * s, LABELS).sample
    torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-5)


def test_networks_of_the_published_code_are_known_by_their_names():
    assert is_rotary_state(lightningdit_state()) and is_rotary_state(jit_state())
    assert not is_rotary_state({"x_embedder.proj.weight": torch.zeros(1), "blocks.0.mlp.fc1.weight": torch.zeros(1)})


def changed(state, **others):
    return {**state, **{name.replace("__", "."): tensor for name, tensor in others.items()}}


def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: without(lightningdit_state(), "blocks.1.attn.qkv.bias"), r"missing \['blocks.1.to_qkv.bias'\]"),
        (lambda: without(lightningdit_state(), "final_layer.linear.weight"), r"missing \['proj_out.weight'\]"),
        (lambda: without(jit_state(), "blocks.2.norm2.weight"), r"missing \['blocks.2.norm2.weight'\]"),
        (lambda: changed(jit_state(), extra=torch.zeros(1)), r"unknown \['extra'\]"),
        (lambda: changed(jit_state(), blocks__0__mlp__w3__bias=torch.zeros(3)), r"other shapes \['blocks.0.mlp_out"),
        (lambda: without(jit_state(), "in_context_posemb"), "'in_context_posemb' is missing among"),
        (lambda: without(lightningdit_state(), "feat_rope.freqs_cos"), "'feat_rope.freqs_cos' is missing among"),
        (lambda: changed(lightningdit_state(), feat_rope__freqs_sin=torch.zeros(64, HEAD)), "freqs_sin is no table of"),
        (lambda: changed(lightningdit_state(), feat_rope__period=torch.zeros(64, HEAD)), "rope.period is no table of"),
        (lambda: changed(jit_state(), pos_embed=torch.zeros(4)), "no LightningDiT or JiT weights: a tensor has other"),
        (lambda: changed(jit_state(), x_embedder__proj1__weight=torch.zeros(6, 3, 0, 0)), "sample_size=0 is not"),
        (lambda: changed(lightningdit_state(), pos_embed=torch.zeros(1, 63, WIDTH)), "weights do not fit|is no table"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused_by_name(state, message):
    with pytest.raises(ValueError, match=message) as refusal:
        rotary_model(state())
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("make", [lightningdit_state, jit_state])
def test_any_tensor_of_any_other_shape_ends_in_one_line(make):
    state = make()
    for name in state:
        if name.startswith("blocks.") and not name.startswith("blocks.0."):
            continue
        for shape in ((), (0,), (5,), (2, 3), (0, 0), (1, 7, 3), (2, 3, 5, 5), (1, 0, 0, 0)):
            with pytest.raises(ValueError) as refusal:
                rotary_model({**state, name: torch.zeros(shape)})
            assert "\n" not in str(refusal.value), (name, shape)
        if name != "feat_rope.freqs_sin":  # which the cosines tell
            with pytest.raises(ValueError, match="missing"):
                rotary_model(without(state, name))


def test_tables_that_jit_may_store_are_checked_and_left_out():
    table = plain_table(4)
    tables = {"feat_rope.freqs_cos": table.cos(), "feat_rope.freqs_sin": table.sin(),
              "feat_rope_incontext.freqs_cos": torch.cat([torch.ones(CONTEXT, HEAD), table.cos()]),
              "feat_rope_incontext.freqs_sin": torch.cat([torch.zeros(CONTEXT, HEAD), table.sin()])}  # fmt: skip
    assert rotary_model({**jit_state(), **tables}).state_dict().keys() == rotary_model(jit_state()).state_dict().keys()
    with pytest.raises(ValueError, match=r"feat_rope_incontext\.freqs_cos is no table"):
        rotary_model({**jit_state(), **tables, "feat_rope_incontext.freqs_cos": table.cos()})


def convert(*arguments):
    convert_dit.main([str(argument) for argument in arguments])


def test_lightningdits_full_checkpoint_becomes_a_pipeline(tmp_path, capsys):
    ema = lightningdit_state()
    halved = {name: tensor if "freqs" in name else 0.5 * tensor for name, tensor in ema.items()}
    model = {f"module.{name}": tensor for name, tensor in halved.items()}
    torch.save({"model": model, "ema": ema, "opt": {}, "config": {"ckpt": None}}, tmp_path / "0080000.pt")
    for weights, factor in (("ema", -1.0), ("model", -0.5)):
        folder = tmp_path / weights
        convert(tmp_path / "0080000.pt", "--weights", weights, "--output-dir", folder, "--vae", "none")
        pipeline = DEMOPipeline.from_pretrained(folder)
        assert type(pipeline.transformer) is LightningDiTTransformer2DModel
        torch.testing.assert_close(pipeline.transformer.proj_out.bias, factor * ema["final_layer.linear.bias"])
        images = pipeline([1, 2], num_inference_steps=3, output_type="latent").images
        assert images.shape == (2, 6, SIDE, SIDE) and torch.isfinite(images).all()
    assert "4 blocks of 32 channels, patch 1, 5 classes, flow_prediction" in capsys.readouterr().out


def test_jits_full_checkpoint_becomes_a_pipeline_of_either_average(tmp_path):
    state = {f"net.{name}": tensor for name, tensor in jit_state().items()}
    content = {"model": {name: 0 * tensor for name, tensor in state.items()}, "model_ema1": state,
               "model_ema2": {name: 2 * tensor for name, tensor in state.items()}, "optimizer": {"state": {}},
               "epoch": 3, "args": argparse.Namespace(model="JiT-B/16")}  # fmt: skip
    torch.save(content, tmp_path / "checkpoint-last.pth")
    for weights, factor in (("ema", 1), ("ema2", 2), ("model", 0)):
        convert(tmp_path / "checkpoint-last.pth", "--weights", weights, "--output-dir", tmp_path / weights)
        pipeline = DEMOPipeline.from_pretrained(tmp_path / weights)
        assert type(pipeline.transformer) is JiTTransformer2DModel and pipeline.vae is None
        torch.testing.assert_close(pipeline.transformer.proj_out.bias, factor * jit_state()["final_layer.linear.bias"])
        assert type(pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    torch.save(state, tmp_path / "bare.pth")
    convert(tmp_path / "bare.pth", "--output-dir", tmp_path / "bare")


@torch.no_grad()
def test_even_steps_of_the_published_sampler_are_the_saved_schedulers(tmp_path):
    torch.save(jit_state(patch=128, side=512), tmp_path / "jit.pth")
    convert(tmp_path / "jit.pth", "--output-dir", tmp_path / "jit")
    pipeline = DEMOPipeline.from_pretrained(tmp_path / "jit")
    pipeline.scheduler.set_timesteps(sigmas=[1 - step / 10 for step in range(10)])
    seen = pipeline.transformer.seen_time(pipeline.scheduler.timesteps)
    torch.testing.assert_close(seen, torch.arange(10) / 10, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--objective", "dit", "--vae", "none"), "--objective dit: .*tensors tell what they are for; leave"),
        (("--prediction", "noise", "--vae", "none"), "--prediction noise: "),
        (("--flow-path", "vp", "--vae", "none"), "--flow-path vp: "),
        (("--num-heads", "2", "--vae", "none"), "--num-heads 2: "),
        (("--weights", "ema2", "--vae", "none"), "no 'model_ema2' weights in it, but ema"),
        ((), "--vae is needed: the network takes 6 channels, and stabilityai/sd-vae-ft-ema has 4"),
    ],
)  # fmt: skip
def test_options_that_the_file_contradicts_are_refused(arguments, message, tmp_path):
    torch.save({"ema": lightningdit_state()}, tmp_path / "lightning.pt")
    with pytest.raises(SystemExit, match=message):
        convert(tmp_path / "lightning.pt", "--output-dir", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("patch", "side", "deviation"), [(4, 16, 1.0), (128, 512, 2.0)])
@torch.no_grad()
def test_the_pipeline_draws_what_jits_own_sampler_draws(patch, side, deviation, tmp_path):
    """Euler's even steps in JiT's own time, from noise of its deviation in training (LTH14/JiT, denoiser.py)."""
    state, labels, steps = jit_state(patch, side), torch.tensor([1, 3]), 10
    torch.save(state, tmp_path / "jit.pth")
    convert(tmp_path / "jit.pth", "--output-dir", tmp_path / "jit")
    noise = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(5))
    expected = deviation * noise
    for step in range(steps):
        time = step / steps
        data = plain_network(state, expected, torch.full((2,), time), labels)
        expected = expected + (data - expected) / steps / max(1 - time, 0.05)
    pipeline = DEMOPipeline.from_pretrained(tmp_path / "jit")
    settings = {"num_inference_steps": steps, "guidance_scale": 1.0, "latents": noise, "output_type": "latent"}
    found = pipeline(labels.tolist(), **settings).images
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
