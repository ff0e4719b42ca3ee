"""Training on a GPU, rehearsed on a CPU: equal draws, weights that come back and go on."""

import csv
import dataclasses
from pathlib import Path

import pytest
import torch
from helpers.paths import ROOT
from safetensors.torch import save_file

from d_emo.eval.benchmarks.gpu import pair, quality, weights
from d_emo.eval.benchmarks.gpu.graph_training import GraphTraining, Recipe
from d_emo.eval.benchmarks.gpu.pictures import load_pictures
from d_emo.eval.benchmarks.gpu.results import read_results
from d_emo.eval.benchmarks.gpu.train import TINY_NETWORK
from d_emo.eval.benchmarks.gpu.train import main as train
from d_emo.eval.benchmarks.gpu.weights import chosen, load_into, read_groups, read_network_state, write_groups
from d_emo.train.diffusion.objectives import FlowObjective

CPU = torch.device("cpu")
RECIPE = Recipe(model="D-EMOv2-Ti-2", overrides=TINY_NETWORK, batch=8)
KEPT_MODEL = ROOT / "eval" / "benchmarks" / "gpu" / "cifar10_ti2"


@pytest.fixture(scope="module")
def pictures(picture_table):
    """The table's pictures."""
    return load_pictures(picture_table, CPU)


def losses(folder: Path) -> list[tuple[int, float]]:
    """Steps and losses that were written."""
    with (folder / "loss.csv").open() as file:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]


def test_networks_see_the_same_batches_and_noise_in_turns_or_alone(pictures, tmp_path, monkeypatch):
    seen = []

    def recorded(self, network, data, labels, noise, times):
        seen.append((data.sum().item(), labels.tolist(), noise.sum().item(), times.tolist()))
        return losses_of(self, network, data, labels, noise, times)

    losses_of = FlowObjective.losses
    monkeypatch.setattr(FlowObjective, "losses", recorded)
    fast = dataclasses.replace(RECIPE, learning_rate=0.05, warmup=1)
    alone = GraphTraining(fast, pictures, tmp_path / "alone")
    alone.train(60, steps=4)
    first, seen[:] = list(seen), []
    ours = GraphTraining(fast, pictures, tmp_path / "ours")
    theirs = GraphTraining(dataclasses.replace(fast, model="DiT-Ti-2"), pictures, tmp_path / "theirs")
    for _ in range(2):
        ours.train(60, steps=2)
        theirs.train(60, steps=2)
    assert len(first) == 4 and seen[0:2] + seen[4:6] == seen[2:4] + seen[6:8] == first
    assert len({batch[0] for batch in first}) == 4  # and every step others
    assert losses(tmp_path / "ours") == losses(tmp_path / "alone") != losses(tmp_path / "theirs")


def test_averages_are_compared_on_the_same_draws_and_training_goes_on_with_its_own(pictures, tmp_path, monkeypatch):
    seen = []

    def recorded(self, network, data, labels, noise, times):
        seen.append((data.sum().item(), noise.sum().item(), times.tolist()))
        return losses_of(self, network, data, labels, noise, times)

    losses_of = FlowObjective.losses
    monkeypatch.setattr(FlowObjective, "losses", recorded)
    for seed in (0, 1):
        training = GraphTraining(dataclasses.replace(RECIPE, seed=seed), pictures, tmp_path / str(seed))
        training.train(60, steps=1)
        training.average_loss(2)
        training.train(60, steps=1)
    assert seen[1:3] == seen[5:7] and seen[1] != seen[2] and seen[0] != seen[4]
    alone = GraphTraining(RECIPE, pictures, tmp_path / "alone")
    del seen[4:]
    alone.train(60, steps=2)
    assert seen[4:] == [seen[0], seen[3]]


def test_a_changed_network_is_not_saved(pictures, tmp_path):
    training = GraphTraining(dataclasses.replace(RECIPE, change=lambda network: None), pictures, tmp_path)
    with pytest.raises(ValueError, match="it was changed and could not be made again"):
        training.save()


def test_the_average_follows_with_a_warm_up(pictures, tmp_path):
    training = GraphTraining(dataclasses.replace(RECIPE, warmup=1, learning_rate=0.05), pictures, tmp_path)
    name, parameter = next((name, p) for name, p in training.trained.items() if p.ndim > 1)
    mean = dict(training.average.module.named_parameters())[name].clone()
    for step in (1, 2, 3):
        training.train(60, steps=1)
        decay = (1 + step) / (10 + step)
        mean = decay * mean + (1 - decay) * parameter.detach()
    torch.testing.assert_close(dict(training.average.module.named_parameters())[name], mean)
    assert not torch.equal(mean, parameter)


def test_the_rate_warms_up_and_cools_down(pictures, tmp_path):
    training = GraphTraining(dataclasses.replace(RECIPE, warmup=10, cooldown=True), pictures, tmp_path)

    def rate(step, done):
        training.step = step
        training._set_rate(done)
        return float(training.optimizer.param_groups[0]["lr"])

    assert [rate(0, 0.0), rate(4, 0.0), rate(50, 0.5), rate(50, 0.875), rate(50, 1.0)] == pytest.approx(
        [5e-5, 2.5e-4, 5e-4, 2.5e-4, 0.0]
    )


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """A run of 4 steps and its folder."""
    folder = tmp_path_factory.mktemp("trained")
    training = GraphTraining(RECIPE, pictures, folder)
    training.train(60, steps=4)
    assert training.save() == ["ema", "raw", "m", "v"]
    return training, folder


def test_a_run_goes_on_with_weights_moments_and_losses(trained, pictures, tmp_path):
    before, folder = trained
    after = GraphTraining(RECIPE, pictures, tmp_path, resume=folder)
    assert after.step == 4 and after.with_moments and after.state["runs"] == 1
    for name, parameter in after.trained.items():
        torch.testing.assert_close(parameter, before.trained[name], rtol=1e-3, atol=1e-6)
        own, was = (run.optimizer.state[run.trained[name]] for run in (after, before))
        torch.testing.assert_close(own["exp_avg_sq"], was["exp_avg_sq"], rtol=2e-2, atol=1e-12)
        torch.testing.assert_close(own["exp_avg"], was["exp_avg"], rtol=1e-2, atol=1e-12)
    assert after.average.n_averaged == before.average.n_averaged == 5
    for own, was in zip(after.average.state_dict().values(), before.average.state_dict().values(), strict=True):
        torch.testing.assert_close(own, was, rtol=1e-3, atol=1e-6)
    after.train(60, steps=2)
    after.save()
    assert losses(tmp_path)[:4] == losses(folder) and losses(tmp_path)[-1][0] == 6
    state = read_network_state(tmp_path)
    assert (state["step"], state["images"], state["runs"]) == (6, 48, 2)


def test_without_moments_the_rate_warms_up_again(trained, pictures, tmp_path):
    _, folder = trained
    groups = {name: group for name, group in read_groups(folder).items() if name in ("ema", "raw")}
    write_groups(tmp_path, groups, 1e9)
    (tmp_path / "state.json").write_bytes((folder / "state.json").read_bytes())
    training = GraphTraining(RECIPE, pictures, tmp_path / "next", resume=tmp_path)
    assert not training.with_moments and training.step == 4
    training.train(60, steps=1)
    assert float(training.optimizer.param_groups[0]["lr"]) == pytest.approx(RECIPE.learning_rate / RECIPE.warmup)


def test_a_loss_that_is_no_number_ends_the_run_and_nothing_is_saved(pictures, tmp_path, monkeypatch):
    training = GraphTraining(RECIPE, pictures, tmp_path)
    losses_of = FlowObjective.losses
    monkeypatch.setattr(FlowObjective, "losses", lambda *given: {"loss": losses_of(*given)["loss"] * float("nan")})
    training.train(60, steps=40)
    assert training.step == 2
    with pytest.raises(ValueError, match="the loss is not a number at step 2; nothing is saved"):
        training.save()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.csv"]


# ---- files -----------------------------------------------------------------------------------------------------------


def of(**bytes_each: int) -> dict[str, dict[str, torch.Tensor]]:
    return {name: {"x": torch.zeros(count, dtype=torch.uint8)} for name, count in bytes_each.items()}


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (100, ["ema", "raw", "m", "v"]),
        (35, ["ema", "raw"]),  # one of the moments would fit, and be of no use
        (15, ["ema"]),
        (5, ["ema"]),
        (0, []),
    ],
)
def test_moments_are_kept_both_or_not_at_all(budget, expected):
    assert chosen(of(ema=10, raw=10, m=10, v=10), budget) == expected
    assert "v" not in chosen(of(ema=10, raw=10, v=10), 100)


def test_weights_come_back_in_files_of_a_size(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "FILE_BYTES", 5000)
    groups = {"ema": {str(n): torch.full((300,), float(n)) for n in range(10)}, "raw": of(raw=4000)["raw"]}
    (tmp_path / "weights-7.safetensors").write_bytes(b"an older run's")
    assert write_groups(tmp_path, groups, 1e9) == ["ema", "raw"]
    files = sorted(tmp_path.iterdir())
    assert len(files) == 5 and all(path.stat().st_size < 6000 for path in files)
    found = read_groups(tmp_path)
    assert found["ema"].keys() == groups["ema"].keys() and torch.equal(found["ema"]["7"], groups["ema"]["7"])


def test_what_is_no_run_is_refused_in_one_line(tmp_path, pictures, picture_table, trained):
    with pytest.raises(ValueError, match="there are no averaged weights"):
        read_groups(tmp_path)
    save_file({"weight": torch.zeros(2)}, tmp_path / "weights-0.safetensors")
    with pytest.raises(ValueError, match="weight is in no group"):
        read_groups(tmp_path)
    with pytest.raises(ValueError, match=r"there is no state\.json"):
        read_network_state(tmp_path)
    with pytest.raises(ValueError, match=r"another network's: .* and 1 more differ"):
        load_into(torch.nn.Linear(2, 2), {})
    with pytest.raises(SystemExit) as ended:
        train(
            ["--tiny", "--data", str(picture_table), "--output-dir", str(tmp_path / "out"), "--resume", str(tmp_path)]
        )
    assert str(ended.value.code).startswith("train: --resume ") and "\n" not in str(ended.value.code)


def test_train_leaves_losses_weights_state_and_samples(tmp_path, picture_table, capsys):
    train(["--tiny", "--data", str(picture_table), "--output-dir", str(tmp_path), "--seconds", "60", "--limit", "60"])
    names = ["loss.csv", "samples.png", "state.json", "weights-0.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert "step 4; saved: ema, raw, m, v" in capsys.readouterr().out


def test_no_time_for_training_is_time_for_saving(tmp_path, picture_table):
    train(["--tiny", "--data", str(picture_table), "--output-dir", str(tmp_path), "--seconds", "60", "--limit", "1"])
    assert read_network_state(tmp_path)["step"] == 0 and (tmp_path / "loss.csv").is_file()


@pytest.mark.slow
def test_a_pair_is_rehearsed(tmp_path, picture_table):
    pair.main(["--tiny", "--data", str(picture_table), "--output-dir", str(tmp_path), "--seconds", "200"])
    assert [step for step, _ in losses(tmp_path / "DiT-Ti-2")] == [2, 4]
    assert losses(tmp_path / "DiT-Ti-2")[0][1] == pytest.approx(losses(tmp_path / "D-EMOv2-Ti-2")[0][1], rel=1e-3)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) <= 8


def test_quality_trains_every_model_at_every_rate():
    words = ["--data", __file__, "--output-dir", "x", "--cooldown", "--compile"]
    one, two = (quality.recipes(quality.parse([*words, *more])) for more in ((), ("--learning-rate", "1e-3", "2e-3")))
    assert [*one] == ["D-EMOv2-Ti-2", "DiT-Ti-2"]
    assert {name: (recipe.model, recipe.learning_rate) for name, recipe in two.items()} == {
        "D-EMOv2-Ti-2-0.001": ("D-EMOv2-Ti-2", 1e-3),
        "D-EMOv2-Ti-2-0.002": ("D-EMOv2-Ti-2", 2e-3),
        "DiT-Ti-2-0.001": ("DiT-Ti-2", 1e-3),
        "DiT-Ti-2-0.002": ("DiT-Ti-2", 2e-3),
    }
    assert all(recipe.cooldown and recipe.compile for recipe in two.values())


@pytest.mark.slow
def test_compiled_blocks_train_as_the_others(pictures, tmp_path):
    fast = dataclasses.replace(RECIPE, learning_rate=0.05, warmup=1)
    for name in (False, True):
        GraphTraining(dataclasses.replace(fast, compile=name), pictures, tmp_path / str(name)).train(300, steps=4)
    plain, compiled = (losses(tmp_path / name) for name in ("False", "True"))
    assert [loss for _, loss in compiled] == pytest.approx([loss for _, loss in plain], abs=1e-4)
    assert plain[0] != plain[1]


@pytest.mark.slow
def test_quality_is_rehearsed(tmp_path, picture_table):
    words = ["--tiny", "--data", str(picture_table), "--output-dir", str(tmp_path), "--turns", "2"]
    quality.main([*words, "--seconds", "400", "--scoring-seconds", "150"])
    scored = [line for line in read_results(tmp_path / "results.jsonl") if line["kind"] == "quality"]
    assert [line["ok"] for line in scored] == [True, True] and all(line["scores"]["fid"] > 0 for line in scored)
    assert (tmp_path / "DiT-Ti-2" / "scores.json").is_file()


# ---- the model that the next chance goes on from ---------------------------------------------------------------------


def test_the_kept_model_loads_and_knows_noise():
    files = [path for path in KEPT_MODEL.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 26e6
    assert max(path.stat().st_size for path in files) <= 16 * 2**20
    state, groups = read_network_state(KEPT_MODEL), read_groups(KEPT_MODEL)
    assert state["kept"] == list(groups) == ["ema", "raw"]
    from d_emo import create_model

    flow = {"learn_sigma": False, "prediction_type": "flow_prediction", "flow_path": "linear"}
    model = create_model(state["model"], sample_size=32, in_channels=3, num_classes=10, **flow).eval()
    noise = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for group in ("ema", "raw"):
        load_into(model, groups[group])
        with torch.no_grad():
            velocity = model(noise, torch.full((4,), 1000.0), torch.tensor([0, 3, 8, 10])).sample
        # At pure noise the velocity is the noise less the mean picture: near the noise, where a fresh network is at 0.
        assert torch.nn.functional.cosine_similarity(velocity.flatten(1), noise.flatten(1)).min() > 0.8
