"""Alignment with a vision model: its formula, what teachers answer, where gradients go, what is saved and refused."""

import math

import pytest
import torch
from accelerate import Accelerator
from helpers.models import randomize, tiny_model
from helpers.paths import ROOT, TESTS
from helpers.processes import Trainer
from helpers.training import TINY, losses, train_to_the_end
from safetensors.torch import load_file
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from d_emo import DEMOPipeline
from d_emo.common.packaged import packaged
from d_emo.train.data.sources import load_source
from d_emo.train.diffusion.alignment import AlignedOutput, AlignTerm, add_projector, spatially_normalised
from d_emo.train.diffusion.config import parse_config
from d_emo.train.diffusion.plan import make_plan
from d_emo.train.diffusion.teacher import Teacher
from d_emo.train.diffusion.terms import Drawn


def plan_of(*arguments):
    """The plan of a run on the digits."""
    config = parse_config(["--config", str(ROOT / "train/configs/digits.yaml"), *map(str, arguments)])
    return make_plan(config, load_source(config.data), Accelerator(cpu=True))


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drawn_with(wanted, count=3):
    data, noise = draw(count, 4, 16, 16), draw(count, 4, 16, 16, seed=1)
    return Drawn(data, torch.tensor([0, 5, 10][:count]), noise, torch.linspace(0.1, 0.9, count), wanted)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A folder of a tiny vision transformer for images of 32 pixels: a class token and 4 x 4 patches."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    processor = ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]
    )
    processor.save_pretrained(folder)
    return folder


def test_the_loss_is_minus_the_cosine_with_features_normalised_over_the_image():
    given, wanted = draw(2, 3, 2, 5), draw(2, 3, 2, 5, seed=1) + 2
    term = AlignTerm(0.5, 2)(AlignedOutput(sample=given, projected=given), drawn_with(wanted, 2))
    total = 0.0
    for i in range(2):
        flat = wanted[i].reshape(6, 5).tolist()
        means = [sum(row[c] for row in flat) / 6 for c in range(5)]
        stds = [math.sqrt(sum((row[c] - means[c]) ** 2 for row in flat) / 5) for c in range(5)]
        for row, own in zip(flat, given[i].reshape(6, 5).tolist(), strict=True):
            target = [(row[c] - 0.6 * means[c]) / (stds[c] + 1e-6) for c in range(5)]
            dot = sum(a * b for a, b in zip(own, target, strict=True))
            total += dot / math.hypot(*own) / math.hypot(*target) / 12
    assert float(term) == pytest.approx(-0.5 * total, rel=1e-6, abs=1e-6)


def test_features_on_another_grid_are_resized_first():
    wanted = draw(2, 2, 2, 5)
    finer = wanted.repeat_interleave(4, 1).repeat_interleave(4, 2)
    output = AlignedOutput(sample=wanted, projected=draw(2, 2, 2, 5, seed=3))
    direct, resized = (AlignTerm(1.0, 1)(output, drawn_with(each, 2)) for each in (wanted, finer))
    # A triangle of twice a token's width, as of any antialiased shrinking, sees a little of the neighbours.
    assert abs(float(direct) - float(resized)) < 0.15
    flat = torch.ones(2, 4, 4, 5)
    assert float(AlignTerm(1.0, 1)(output, drawn_with(flat, 2)).isfinite())


def test_gradients_reach_projector_and_blocks_before_it_and_nothing_after():
    model = randomize(tiny_model(learn_sigma=False, prediction_type="flow_prediction", num_layers=3))
    add_projector(model, 7)
    drawn = drawn_with(draw(3, 4, 4, 7, seed=2))
    output = model(drawn.data, 1000 * drawn.time, drawn.labels, features_after=2)
    assert output.projected.shape == (*output.features.shape[:3], 7)
    AlignTerm(0.5, 2)(output, drawn).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            reached = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
            assert reached == (not name.startswith(("blocks.2.", "norm_out.", "proj_out."))), name


def test_the_projector_changes_no_answer_and_is_asked_only_for_features():
    model, inputs = randomize(tiny_model()).eval(), (draw(2, 4, 16, 16), torch.tensor([5.0, 7.0]), torch.tensor([1, 2]))
    before = model(*inputs).sample
    add_projector(model, 7)
    assert torch.equal(model(*inputs).sample, before) and torch.equal(model(*inputs, return_dict=False)[0], before)
    assert not hasattr(model(*inputs), "projected")


def test_a_vision_transformer_answers_with_its_patches(vit):
    teacher, images = Teacher(str(vit), (4, 4)), draw(2, 1, 32, 32).clamp(-1, 1)
    assert (teacher.side, teacher.shape) == (32, (4, 4, 12))
    seen = (images.expand(-1, 3, -1, -1) + 1) / 2
    seen = (seen - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    with torch.no_grad():
        expected = ViTModel.from_pretrained(vit, add_pooling_layer=False).eval()(seen).last_hidden_state
    torch.testing.assert_close(teacher.features(images), expected[:, 1:].reshape(2, 4, 4, 12), atol=1e-5, rtol=1e-5)
    # Its first column is the image's left edge.
    images[..., :8] += 0.5
    moved = (teacher.features(images) - expected[:, 1:].reshape(2, 4, 4, 12)).abs().mean((0, 1, 3))
    assert moved.argmax() == 0


def test_networks_in_stages_answer_with_the_deepest_that_is_fine_enough():
    shapes = {grid: Teacher("digits-classifier", (grid, grid)).shape for grid in (2, 4, 8, 64)}
    assert shapes == {2: (2, 2, 80), 4: (4, 4, 48), 8: (8, 8, 32), 64: (16, 16, 16)}


def test_timms_networks_teach_too(tmp_path, monkeypatch):
    import timm

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **more: create(name, pretrained=False, **more))
    assert Teacher("timm:vit_tiny_patch16_224", (16, 16)).shape == (14, 14, 192)
    assert Teacher("timm:resnet10t", (4, 4)).shape[0] > 1


def test_the_projector_is_in_the_state_and_in_nothing_that_is_saved_for_use(tmp_path, capsys):
    run = (*TINY, "--align", "digits-classifier", "--align-block", "2", "--max-train-steps", "2", "--output-dir")
    train_to_the_end(
        capsys, tmp_path / "log", *run, tmp_path / "run", "--snapshot-every", "1", "--checkpoint-every", "2"
    )
    state = load_file(tmp_path / "run/checkpoint-0000002/training_state/model.safetensors")
    assert {name for name in state if name.startswith("aligner.")} == {"aligner.weight", "aligner.bias"}
    optimizer = load_file(tmp_path / "run/checkpoint-0000002/training_state/optimizer.safetensors")
    assert optimizer["exp_avg/aligner.weight"].abs().max() > 0
    model = DEMOPipeline.from_pretrained(tmp_path / "run").transformer
    assert state.keys() - model.state_dict().keys() == {"aligner.weight", "aligner.bias"}
    for snapshot in (tmp_path / "run/snapshots").iterdir():
        assert not any("aligner" in name for name in load_file(snapshot))


class ShardedTrainer(Trainer):
    """The trainer under FSDP2."""

    script = TESTS / "helpers" / "fsdp_on_cpu.py"


@pytest.mark.slow
def test_a_sharded_projector_trains_as_a_whole_one(tmp_path, capsys):
    run = (*TINY, "--align", "digits-classifier", "--align-block", "2", "--micro-batch-size", "4")
    for processes in (1, 2):
        options = (*run, "--max-train-steps", "3", "--output-dir", tmp_path / str(processes))
        train_to_the_end(capsys, tmp_path / "log", *options, processes=processes, kind=ShardedTrainer)
    one, two = ([float(line.split(",")[1]) for line in losses(tmp_path / name)[1:]] for name in ("1", "2"))
    assert two == pytest.approx(one, rel=1e-5)


def test_the_plan_names_the_teacher_and_counts_what_it_holds():
    plain, aligned = plan_of().describe(), plan_of("--align", "digits-classifier").describe()
    expected = "with digits-classifier, 48 features of 4 x 4 places, images of 32 x 32, after block 4, weight 0.5"
    assert expected in aligned and "teacher" in aligned and "teacher" not in plain
    parameters = [text.split(" parameters")[0] for text in (plain, aligned)]
    assert parameters[0] == parameters[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--align", "digits-classifier", "--align-block", "7"], "--align-block 7: the network has 6 blocks"),
        (["--align", "nothing"], "--align nothing does not load .there is no such folder, and no packaged model but"),
        (["--align-weight", "2"], "--align-weight 2.0: it goes with --align"),
        (["--align", "digits-classifier", "--align-weight", "0"], "--align-weight 0.0: must be positive"),
        (["--align", "x", "--init-from", "y", "--lora-rank", "2"], "--align x: it shapes what a whole network learns"),
    ],
)
def test_what_cannot_be_aligned_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_of(*arguments)


def test_one_place_is_no_grid():
    with pytest.raises(ValueError, match="says one thing of a whole image of 32 pixels"):
        Teacher(str(packaged("digits-classifier")), (1, 1))


def test_normalisation_leaves_a_unit_deviation_and_some_of_the_mean():
    found = spatially_normalised(draw(2, 4, 4, 3) * 5 + 3)
    torch.testing.assert_close(found.std((1, 2)), torch.ones(2, 3), atol=1e-5, rtol=0)
    assert found.mean() > 0.1
