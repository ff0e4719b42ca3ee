"""Which mean and deviation normalise a run's latents: what is named, taken over, found, or refused; and going on."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers.autoencoders import tiny_autoencoder
from helpers.made import write_pictures
from helpers.models import tiny_model
from helpers.pipelines import dit_scheduler
from helpers.training import losses, run_here, train_to_the_end

from d_emo import DEMOPipeline
from d_emo.common.digests import weights_digest
from d_emo.images.autoencoders import latent_space, open_vae, space_of
from d_emo.images.latent_statistics import read_statistics
from d_emo.pipelines.decoding import REMEMBERED_LATENTS
from d_emo.train import encode_latents
from d_emo.train.data.sources import load_source
from d_emo.train.diffusion.config import parse_config
from d_emo.train.diffusion.plan import make_plan
from d_emo.train.engine.checkpoints import write_manifest

pytestmark = pytest.mark.usefixtures("uncounted_plans")
COMMON = ("--model", "D-EMOv2-N-8", "--global-batch-size", 4, "--checkpoint-every", 2, "--log-every", 1, "--report-to",
          "none", "--sample-every", 0, "--num-workers", 0, "--learning-rate", "1e-3", "--ema-decay", "0.5", "--kernels",
          "reference")  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Pictures, autoencoders, latents with and without statistics, by name."""
    root = tmp_path_factory.mktemp("made")
    write_pictures(root / "pictures", side=32, count=3)
    tiny_autoencoder(scaling_factor=1.0, shift_factor=None).save_pretrained(root / "vae")
    tiny_autoencoder(scaling_factor=1.0, shift_factor=None, seed=1).save_pretrained(root / "other-weights")
    tiny_autoencoder("AsymmetricAutoencoderKL", scaling_factor=1.0).save_pretrained(root / "other-class")
    for name, measured in (("measured", "true"), ("plain", "false")):
        encode_latents.main([
            "--train-data-dir", str(root / "pictures"), "--vae", str(root / "vae"), "--resolution", "32",
            "--output-dir", str(root / name), "--num-workers", "0", "--statistics", measured,
        ])  # fmt: skip
    return root


@pytest.fixture(scope="module")
def measured_space(made):
    return read_statistics(made / "measured" / "statistics.json").latent_space


@pytest.fixture(scope="module")
def trained(made, tmp_path_factory):
    """Two steps on measured latents; the pipeline and its checkpoint."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    from d_emo.train import train_dit

    words = (*COMMON, "--latents", made / "measured", "--vae", made / "vae", "--output-dir", folder)
    train_dit.main([str(word) for word in (*words, "--max-train-steps", 2)])
    return folder


def planned(*words):
    config = parse_config([str(word) for word in (*COMMON, *words, "--max-train-steps", 2)])
    return make_plan(config, load_source(config.data), Accelerator(cpu=True))


def refusal(*words):
    with pytest.raises(ValueError) as refused:
        planned(*words)
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_latents_are_normalised_by_what_was_measured_on_them(made, measured_space):
    plan = planned("--latents", made / "measured", "--vae", made / "vae")
    assert plan.space == measured_space and plan.space.measured_on == "pictures"
    line = next(line for line in plan.describe().splitlines() if line.startswith("  statistics "))
    assert "measured on pictures (--latents " in line
    assert line.endswith("; the autoencoder's own: mean 0, deviation 1")
    assert f"({measured_space.describe()}), 4 x 16 x 16" in plan.describe()


def test_none_stands_for_the_autoencoders_own(made):
    plan = planned("--latents", made / "measured", "--vae", made / "vae", "--latent-statistics", "none")
    assert plan.space == latent_space(plan.vae) and plan.scale == "" and "statistics" not in plan.describe()
    assert plan.identity()["latent_statistics"] == "none"
    assert planned("--latents", made / "plain", "--vae", made / "vae").space == plan.space


@pytest.mark.parametrize("file", ["", "statistics.json"])
def test_statistics_that_are_named_serve_images_that_are_encoded_on_the_fly(made, measured_space, file):
    words = ("--train-data-dir", made / "pictures", "--vae", made / "vae", "--resolution", 32)
    plan = planned(*words, "--latent-statistics", made / "measured" / file)
    assert plan.space == measured_space and "(--latent-statistics " in plan.scale
    other = planned("--latents", made / "plain", "--vae", made / "vae", "--latent-statistics", made / "measured" / file)
    assert other.space == measured_space


def test_an_autoencoder_that_a_pipeline_carries_brings_its_statistics(made, trained, measured_space):
    data = ("--train-data-dir", made / "pictures", "--resolution", 32)
    plan = planned(*data, "--vae", trained)
    assert plan.space == measured_space and f"(the pipeline --vae {trained})" in plan.scale
    assert planned(*data, "--vae", trained / "vae").scale == ""


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (("--vae", "{vae}", "--latent-statistics", "{nowhere}"), ["--latent-statistics", "there are no statistics"]),
        (("--vae", "{vae}", "--latent-statistics", "{plain}"), ["--latent-statistics", "there are no statistics"]),
        (
            ("--vae", "{other-class}", "--latent-statistics", "{measured}"),
            ["--latent-statistics", "autoencoder AsymmetricAutoencoderKL -> AutoencoderKL"],
        ),
        (
            ("--vae", "{other-weights}", "--latent-statistics", "{measured}"),
            ["--latent-statistics", "measured with another AutoencoderKL than --vae"],
        ),
        (("--vae", "none", "--latent-statistics", "{measured}"), ["--latent-statistics", "this run is on pixels"]),
    ],
)
def test_statistics_that_do_not_fit_are_refused_by_name(made, words, messages):
    places = [word.format_map({path.name: path for path in made.iterdir()} | {"nowhere": "nowhere"}) for word in words]
    message = refusal("--train-data-dir", made / "pictures", "--resolution", 32, *places)
    assert all(part in message for part in messages), message


def test_training_from_the_pipeline_takes_its_statistics_over(made, trained, measured_space, tmp_path):
    data = ("--init-from", trained, "--train-data-dir", made / "pictures", "--resolution", 32)
    plan = planned(*data, "--vae", made / "vae")
    assert plan.space == measured_space and f"(--init-from {trained})" in plan.scale
    assert planned(*data, "--vae", made / "vae", "--latent-statistics", made / "measured").space == measured_space
    message = refusal(*data, "--vae", made / "vae", "--latent-statistics", "none")
    assert "--latent-statistics none (mean 0, deviation 1)" in message and "was trained with mean" in message
    message = refusal(*data, "--vae", made / "other-class")
    assert f"--init-from {trained} was trained on other latents" in message and "--vae auto." in message
    assert "autoencoder AutoencoderKL -> AsymmetricAutoencoderKL" in message


def test_by_default_weights_bring_their_autoencoder_and_resolution(made, trained, measured_space):
    pictures = ("--init-from", trained, "--train-data-dir", made / "pictures")
    plan = planned(*pictures)
    assert plan.space == measured_space and plan.resolution == 32 and plan.latent_shape == (4, 16, 16)
    assert plan.identity()["vae_digest"] == weights_digest(open_vae(str(made / "vae")))
    assert not any(parameter.requires_grad for parameter in plan.vae.parameters())
    assert f"  latents of {trained} (AutoencoderKL" in plan.describe()
    assert planned(*pictures, "--resolution", 16).latent_shape == (4, 8, 8)
    assert planned("--init-from", trained, "--latents", made / "plain").space == measured_space
    assert "--objective dit --vae auto." in refusal(*pictures, "--vae", "none", "--resolution", 32)


def test_latents_bring_the_autoencoder_that_made_them(made):
    plan = planned("--latents", made / "plain")
    assert weights_digest(plan.vae) == weights_digest(open_vae(str(made / "vae")))
    assert f"latents of {made / 'vae'} (AutoencoderKL" in plan.describe()


def test_weights_whose_autoencoder_is_not_with_them_ask_for_it(made, trained, tmp_path):
    DEMOPipeline.from_pretrained(trained, vae=None).save_pretrained(tmp_path / "bare")
    words = ("--init-from", tmp_path / "bare", "--train-data-dir", made / "pictures", "--resolution", 32)
    assert "was saved without the AutoencoderKL that it was trained with; name that: --vae" in refusal(*words)
    assert planned(*words, "--vae", made / "vae").space == planned(*words[:1], trained, *words[2:]).space


def test_a_run_from_weights_in_half_precision_goes_on_by_their_statistics(made, tmp_path):
    """Flux2's are among the autoencoder's weights, where half precision rounds them; such a run keeps `none`."""
    vae = tiny_autoencoder("AutoencoderKLFlux2")
    model = tiny_model(in_channels=16, sample_size=8, num_classes=3)
    pipeline = DEMOPipeline(model, dit_scheduler(), vae=vae)
    exact = pipeline.latent_space
    pipeline.to(dtype=torch.bfloat16).save_pretrained(tmp_path)
    words = ("--init-from", tmp_path, "--train-data-dir", made / "pictures")
    plan = planned(*words)
    assert plan.space == exact != latent_space(plan.vae)
    again = planned(*words, "--latent-statistics", plan.identity()["latent_statistics"])
    assert again.space == exact and again.identity() == plan.identity()


@pytest.mark.parametrize(("scale", "doubted"), [(0.18215, True), (1.0, False), (0.5, False)])
def test_a_scale_that_a_folder_has_by_default_alone_is_said_aloud(made, tmp_path, capsys, scale, doubted):
    tiny_autoencoder("AutoencoderKL per channel", scaling_factor=scale).save_pretrained(tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    if doubted:
        del config["scaling_factor"]
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    data = ("--train-data-dir", made / "pictures", "--vae", tmp_path / "vae", "--resolution", 32)
    note = "  note       the autoencoder has latents_std and scaling_factor=0.18215 besides"
    remedies = ('"scaling_factor": 1.0 in its config.json', "--statistics true")
    assert (note in planned(*data).describe()) == doubted
    if not doubted:
        return
    for measured in ("false", "true"):
        encode_latents.main([str(word) for word in (*data, "--output-dir", tmp_path / measured, "--num-workers", 0,
                                                    "--statistics", measured)])  # fmt: skip
        printed = capsys.readouterr().out
        assert all((text in printed) == (measured == "false") for text in (note, *remedies))
    assert note not in planned("--latents", tmp_path / "true", "--vae", tmp_path / "vae").describe()


def test_weights_that_were_trained_without_statistics_go_on_without(made, trained, tmp_path):
    """Beside latents that have some."""
    pipeline = DEMOPipeline.from_pretrained(trained)
    own = latent_space(tiny_autoencoder(scaling_factor=1.0, shift_factor=None))
    delattr(pipeline.transformer, REMEMBERED_LATENTS)
    DEMOPipeline(pipeline.transformer, pipeline.scheduler, pipeline.vae).save_pretrained(tmp_path / "plain")
    words = ("--init-from", tmp_path / "plain", "--vae", made / "vae")
    plan = planned(*words, "--latents", made / "measured")
    assert plan.space == own and plan.scale == ""
    message = refusal(*words, "--latents", made / "plain", "--latent-statistics", made / "measured")
    assert "was trained with mean 0, deviation 1" in message


def test_on_the_fly_and_from_latents_give_the_same_losses_and_the_pipeline_decodes_by_them(
    capsys, made, measured_space, tmp_path
):
    data = ("--train-data-dir", made / "pictures", "--resolution", 32, "--latent-statistics", made / "measured")
    found = {}
    for name, words in (("cached", ("--latents", made / "measured")), ("on the fly", data)):
        folder = tmp_path / name
        train_to_the_end(capsys, tmp_path / "log", *COMMON, *words, "--vae", made / "vae", "--output-dir", folder,
                         "--max-train-steps", 3)  # fmt: skip
        found[name] = [float(line.split(",")[1]) for line in losses(folder)[1:]]
    assert len(found["cached"]) == 3
    np.testing.assert_allclose(found["cached"], found["on the fly"], rtol=1e-5)
    pipeline = DEMOPipeline.from_pretrained(tmp_path / "cached")
    assert pipeline.latent_space == measured_space
    latents = torch.randn(1, 4, 16, 16)
    expected = pipeline.vae.decode(
        latents * torch.tensor(measured_space.std)[:, None, None] + torch.tensor(measured_space.mean)[:, None, None]
    ).sample
    decoded = torch.from_numpy(pipeline._decode(latents, "np", None)) * 2 - 1
    torch.testing.assert_close(decoded, expected.clamp(-1, 1).permute(0, 2, 3, 1), atol=1e-5, rtol=0)


@pytest.fixture
def begun(made, tmp_path):
    """Latents without statistics, and a run of two steps on them."""
    shutil.copytree(made / "plain", tmp_path / "latents")
    from d_emo.train import train_dit

    words = (*COMMON, "--latents", tmp_path / "latents", "--vae", made / "vae", "--output-dir", tmp_path / "run")
    train_dit.main([str(word) for word in (*words, "--max-train-steps", 2)])
    return tmp_path / "run"


def go_on(capsys, run, *words):
    arguments = (*COMMON, "--output-dir", run, "--resume-from", "latest", "--max-train-steps", 3, *words)
    return run_here(capsys, *arguments)


@pytest.mark.parametrize("old", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "of an older version"])
def test_a_run_that_began_without_statistics_goes_on_without(capsys, made, begun, tmp_path, old):
    shutil.copy(made / "measured" / "statistics.json", tmp_path / "latents")
    if old:
        checkpoint = begun / "checkpoint-0000002"
        for path in (begun / "run.json", checkpoint / "run.json"):
            content = json.loads(path.read_text())
            assert content.pop("latent_statistics") == "none" and content.pop("latent_space")
            path.write_text(json.dumps(content))
        (checkpoint / "manifest.json").unlink()
        write_manifest(checkpoint, {"step": 2, "processes": 1, "sharded": False})
    code, printed = go_on(capsys, begun)
    assert code == 0, printed
    assert DEMOPipeline.from_pretrained(begun).latent_space.measured_on == ""


@pytest.mark.slow
def test_a_run_does_not_go_on_with_other_statistics(capsys, made, begun, trained, tmp_path):
    code, printed = go_on(capsys, begun, "--latent-statistics", made / "measured")
    assert code != 0 and "latent_space" in printed and "measured on pictures" in printed
    shutil.copytree(trained, tmp_path / "measured")
    code, printed = go_on(capsys, tmp_path / "measured", "--latent-statistics", "none")
    assert code != 0 and "latent_space" in printed and "--init-from" in printed
    code, printed = go_on(
        capsys, tmp_path / "measured", "--latent-statistics", "none", "--allow-change", "latent_space"
    )
    assert code != 0 and "latent_space" in printed
    code, printed = go_on(capsys, tmp_path / "measured")
    assert code == 0, printed


def test_a_damaged_description_of_the_named_pipeline_is_refused(made, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    index = tmp_path / "run" / "model_index.json"
    content = json.loads(index.read_text())
    assert space_of(content["latent_space"]).measured_on
    index.write_text(json.dumps({**content, "latent_space": {"autoencoder": "word"}}))
    message = refusal("--train-data-dir", made / "pictures", "--resolution", 32, "--vae", tmp_path / "run")
    assert "--vae" in message and "model_index.json is damaged" in message


def test_latents_by_another_scale_in_the_configuration_are_refused(made, tmp_path):
    """The weights are the same; only config.json differs."""
    shutil.copytree(made / "vae", tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.5}))
    message = refusal("--latents", made / "plain", "--vae", tmp_path / "vae")
    assert "the latents were made by" in message and "std 1 -> 2" in message


def test_measured_spaces_count_as_the_autoencoders(made, measured_space):
    """What a pipeline compares on loading: everything but mean and deviation."""
    own = latent_space(tiny_autoencoder(scaling_factor=1.0, shift_factor=None))
    assert not measured_space.differences(own) and measured_space.differences(replace(own, channels=8, mean=(0,)))
