"""The page about a training loop of one's own: its code is run, and what it saves draws digits."""

import numpy as np
import pytest
import torch
from helpers.pipelines import images, tiny_pipeline
from helpers.tutorials import blocks
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from d_emo import DEMOPipeline, WeightAverage


def run_the_page(steps: int) -> dict:
    """Execute the page's code with fewer steps; its variables."""
    code = "\n".join(block.code for block in blocks("own_loop") if block.language == "python")
    shortened = code.replace("STEPS, BATCH, FOLDER = 1000, 128,", f"STEPS, BATCH, FOLDER = {steps}, 64,")
    assert f"= {steps}, 64," in shortened
    variables: dict = {}
    exec(compile(shortened, "own_loop.md", "exec"), variables)
    return variables


@pytest.mark.slow
def test_the_page_saves_a_pipeline_that_draws_what_it_was_asked_for_and_averages_buffers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "own_digits"
    variables = run_the_page(250)
    assert_buffers_are_averaged(variables)
    assert (folder / "three.png").is_file()
    pipe = DEMOPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.id2label[3] == "three"
    drawn = pipe(range(10), num_images_per_label=8, num_inference_steps=20, output_type="np",
                 generator=torch.Generator().manual_seed(0)).images  # fmt: skip
    digits = load_digits()
    reader = SVC(gamma=0.001).fit(digits.images.reshape(-1, 64), digits.target)
    read = reader.predict((drawn[..., 0] * 16).reshape(-1, 64))
    noise = reader.predict(np.random.default_rng(0).uniform(0, 16, (80, 64)))
    wanted = np.repeat(np.arange(10), 8)
    assert (noise == wanted).mean() < 0.3
    assert (read == wanted).mean() > 0.6


def assert_buffers_are_averaged(variables: dict) -> None:
    """The average's statistics have moved, to near the model's."""
    own, averaged = (dict(variables[name].named_buffers()) for name in ("model", "average"))
    name = next(name for name in own if name.endswith("running_mean"))
    average = averaged[f"module.{name}"]
    assert average.abs().max() > 0 and not torch.equal(average, own[name])
    # Near the model's own, far from where it began.
    assert (average - own[name]).abs().mean() < 0.5 * own[name].abs().mean()


def test_an_average_is_that_of_its_formula_for_weights_and_buffers():
    model = torch.nn.BatchNorm2d(2).double()
    plain = WeightAverage(model, decay=0.9, warmup=False)
    warm = WeightAverage(model, decay=0.9)
    expected_plain = expected_warm = 0.0
    for step in range(1, 20):
        for tensor in (model.weight.data, model.running_mean):
            tensor.fill_(step)
        start = 1.0 if step == 1 else None
        expected_plain = 0.9 * (expected_plain if start is None else 0.0) + 0.1 * step
        decay = min(0.9, (1 + step) / (10 + step))
        expected_warm = decay * (expected_warm if start is None else 0.0) + (1 - decay) * step
        plain.update(model)
        warm.update(model)
        assert plain.module.running_mean[0].item() == pytest.approx(expected_plain, rel=1e-9)
        assert warm.module.running_mean[0].item() == pytest.approx(expected_warm, rel=1e-9)
    # The weight began at 1 and the mean at 0: what is left of the beginning is decay^n.
    assert plain.module.weight[0].item() == pytest.approx(expected_plain + 0.9**19, rel=1e-9)
    assert not plain.training and not any(p.requires_grad for p in plain.parameters())


def test_an_average_continues_from_its_state():
    model = torch.nn.Linear(3, 2)
    first = WeightAverage(model, decay=0.5)
    with torch.no_grad():
        model.weight.add_(1)
    first.update(model)
    second = WeightAverage(torch.nn.Linear(3, 2), decay=0.5)
    second.load_state_dict(first.state_dict())
    for average in (first, second):
        average.update(model)
    torch.testing.assert_close(second.state_dict(), first.state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: WeightAverage(m.parameters()), "pass the model itself"),
        (lambda m: WeightAverage(m, decay=1.0), r"decay=1.0 is not a number from 0 and below 1"),
        (lambda m: WeightAverage(m, decay=float("nan")), "decay=nan"),
        (lambda m: WeightAverage(m, decay="0.9"), "decay='0.9'"),
        (lambda m: WeightAverage(m.bfloat16()), "bfloat16, where an average would not move"),
        (lambda m: WeightAverage(m).update(m.parameters()), "pass the model itself"),
        (lambda m: WeightAverage(m).update(torch.nn.Linear(2, 3)), "its tensors are others"),
    ],
)
def test_mistakes_about_averages_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(torch.nn.Linear(3, 2))


def test_diffusers_average_loses_the_statistics_and_saving_and_loading_say_so(tmp_path):
    from diffusers.training_utils import EMAModel

    from d_emo import DEMOTransformer2DModel

    pipeline = tiny_pipeline()
    model = pipeline.transformer
    average = EMAModel(model.parameters(), model_cls=DEMOTransformer2DModel, model_config=model.config)
    with pytest.warns(UserWarning, match="is being saved with trained weights, but 2 of 2 BatchNorm layers"):
        average.save_pretrained(tmp_path / "average")
    with pytest.warns(UserWarning, match=r"was saved with trained weights.*WeightAverage averages buffers"):
        loaded = DEMOTransformer2DModel.from_pretrained(tmp_path / "average")
    ours = WeightAverage(model)
    ours.module.save_pretrained(tmp_path / "ours")
    kept = DEMOTransformer2DModel.from_pretrained(tmp_path / "ours")
    expected = images(pipeline)
    pipeline.transformer = kept
    torch.testing.assert_close(images(pipeline), expected)
    pipeline.transformer = loaded
    assert (images(pipeline) - expected).abs().max() > 0.05
