"""Fine-tuning: what is taken over from a trained pipeline, what is new, what is refused."""

import re

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from helpers.diffusers_dit import diffusers_dit, dit_pipeline
from helpers.models import tiny_model
from helpers.paths import ROOT
from helpers.pipelines import tiny_pipeline
from helpers.training import run_here
from safetensors.torch import load_file

from d_emo import DEMOPipeline, create_model
from d_emo.images.digits import DIGIT_NAMES
from d_emo.train.diffusion import lora
from d_emo.train.diffusion.init_from import InitialWeights

FLOW = {"learn_sigma": False, "prediction_type": "flow_prediction"}
NAMES = {0: "tench, Tinca tinca", 1: "crane, bird", 2: "crane, machine"}


@pytest.fixture
def trained(tmp_path):
    pipeline = tiny_pipeline(flow=True)
    pipeline.save_pretrained(tmp_path / "trained")
    return tmp_path / "trained", pipeline.transformer.state_dict()


def build(folder, names, **task):
    initial = InitialWeights(str(folder))
    task = {"sample_size": 16, "in_channels": 3, "num_classes": len(names), **FLOW, **task}
    return initial.build(initial.config(task), names)


def test_the_same_task_takes_everything_over(trained):
    folder, state = trained
    torch.testing.assert_close(build(folder, NAMES).state_dict(), state, atol=0, rtol=0)


def test_other_classes_get_a_new_label_table_and_keep_the_row_without_class(trained):
    folder, state = trained
    found = build(folder, {0: "cat", 1: "dog", 2: "cow", 3: "hen"}).state_dict()
    for name, tensor in found.items():
        if name != "label_embed.weight":
            torch.testing.assert_close(tensor, state[name], atol=0, rtol=0)
    labels = found["label_embed.weight"]
    assert len(labels) == 5 and labels[0].std() > 0
    torch.testing.assert_close(labels[-1], state["label_embed.weight"][-1], atol=0, rtol=0)
    # Three other names for three classes are other classes, too.
    renamed = build(folder, {0: "cat", 1: "dog", 2: "cow"}).state_dict()["label_embed.weight"]
    assert (renamed[:3] - state["label_embed.weight"][:3]).abs().max() > 0.01


def test_another_resolution_gets_its_positions(trained):
    folder, state = trained
    model = build(folder, NAMES, sample_size=(24, 16))
    fresh = create_model("D-EMOv2-N-2", sample_size=(24, 16), hidden_size=32, num_layers=1)
    torch.testing.assert_close(model.pos_embed, fresh.pos_embed)
    assert model.pos_embed.shape != state["pos_embed"].shape
    assert model(torch.randn(1, 3, 24, 16), 500, torch.tensor([1])).sample.shape == (1, 3, 24, 16)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"in_channels": 4}, "in_channels 3, not 4"),
        ({"learn_sigma": True, "prediction_type": "epsilon"}, "learn_sigma False, not True; prediction_type"),
    ],
)
def test_another_network_is_refused(trained, task, message):
    with pytest.raises(ValueError, match=message):
        build(trained[0], NAMES, **task)


def test_the_remedy_names_the_bottleneck_of_the_patches(tmp_path):
    tiny_pipeline(flow=True, patch_bottleneck=5).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"patch_bottleneck 5, not 6\. .*: --patch-bottleneck 5 --objective sit"):
        build(tmp_path, NAMES, patch_bottleneck=6)


@pytest.mark.slow
def test_fine_tuning_from_the_command_line_and_resuming(capsys, tmp_path):
    common = ("--global-batch-size", 8, "--micro-batch-size", 8, "--sample-every", 0, "--report-to", "none")
    first = ("--config", ROOT / "train/configs/digits.yaml", "--output-dir", tmp_path / "first", "--max-train-steps", 2)
    assert run_here(capsys, *first, *common)[0] == 0
    second = ("--init-from", tmp_path / "first", "--lr-scheduler", "constant", "--output-dir", tmp_path / "second")
    code, printed = run_here(capsys, *second, "--max-train-steps", 2, *common)
    assert code == 0 and "model      first: 1,459,728 parameters" in printed, printed
    code, printed = run_here(capsys, *second, "--max-train-steps", 3, "--resume-from", "latest", *common)
    assert code == 0 and "resuming from" in printed, printed
    assert DEMOPipeline.from_pretrained(tmp_path / "second").transformer.config.patch_size == 4
    code, printed = run_here(capsys, "--init-from", "nowhere", "--output-dir", tmp_path / "third", *common)
    assert code != 0 and "--init-from nowhere: neither a pipeline folder" in printed
    third = ("--init-from", tmp_path / "first", "--objective", "dit", "--output-dir", tmp_path / "third")
    code, printed = run_here(capsys, *third, *common)
    assert code != 0 and "Train as it was trained: --objective sit --flow-path linear" in printed, printed


LORA = ("--global-batch-size", 8, "--sample-every", 0, "--report-to", "none", "--log-every", 1,
        "--learning-rate", "1e-2", "--ema-decay", "0.5", "--lr-scheduler", "constant", "--lora-rank", 2)  # fmt: skip


@pytest.fixture
def digits_base(tmp_path):
    """A pipeline for the digits with random weights, unlike a fresh one, which draws zeros."""
    model = tiny_model(in_channels=1, num_classes=10, **FLOW)
    pipeline = DEMOPipeline(model, FlowMatchEulerDiscreteScheduler(), id2label=dict(enumerate(DIGIT_NAMES)))
    pipeline.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def draw(pipeline, labels=(3, 5)):
    """Latents of a pipeline or of what lies in a folder."""
    if not isinstance(pipeline, DEMOPipeline):
        pipeline = DEMOPipeline.from_pretrained(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(list(labels), num_inference_steps=3, generator=generator, output_type="latent").images


def test_lora_trains_adapters_and_labels_only_and_saves_them_merged_and_apart(capsys, tmp_path, digits_base):
    run = tmp_path / "run"
    code, printed = run_here(capsys, *LORA, "--init-from", digits_base, "--output-dir", run, "--max-train-steps", 3)
    assert code == 0 and "trained, LoRA and labels" in printed, printed
    before = load_file(digits_base / "transformer" / "diffusion_pytorch_model.safetensors")
    after = load_file(run / "transformer" / "diffusion_pytorch_model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "label_embed.weight" in changed and "blocks.0.i2rmb.attn.to_qkv.weight" in changed
    expected = re.compile(r"label_embed\.weight|blocks\.\d+\.(modulation|i2rmb\.(attn\.to_qkv|proj_out))\.weight")
    assert all(expected.fullmatch(name) for name in changed)  # no BatchNorm statistics, no biases, no embeddings
    # Everything trained lies in the folder: on the base it draws the merged pictures, and comes off again.
    base = DEMOPipeline.from_pretrained(digits_base)
    plain = draw(base)
    base.load_lora_weights(run)
    torch.testing.assert_close(draw(base), draw(run), atol=1e-4, rtol=1e-4)
    assert (draw(run) - plain).abs().max() > 1e-3
    with pytest.raises(ValueError, match="carries adapters already"):
        base.load_lora_weights(run / "lora")
    base.unload_lora_weights()
    torch.testing.assert_close(draw(base), plain, atol=0, rtol=0)
    # By Diffusers' own means, as docs/training.md has it.
    base.transformer.load_lora_adapter(run / "lora", weight_name="pytorch_lora_weights.safetensors")
    beside = load_file(run / "lora" / "trained_beside.safetensors")
    base.transformer.load_state_dict(beside, strict=False)
    torch.testing.assert_close(draw(base), draw(run), atol=1e-4, rtol=1e-4)


def test_adapters_for_other_classes_bring_their_names_and_go_onto_their_own_base_only(tmp_path, digits_base):
    base = DEMOPipeline.from_pretrained(digits_base)
    tuned = InitialWeights(str(digits_base))
    task = {"sample_size": 24, "in_channels": 1, "num_classes": 2, **FLOW}
    model = tuned.build(tuned.config(task), {0: "cat", 1: "dog"})
    lora.add_lora(model, 2, 2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.eval()
    lora.save_adapters(model, tmp_path, {0: "cat", 1: "dog"}, "digits")
    expected = draw(DEMOPipeline(model, FlowMatchEulerDiscreteScheduler(), id2label=["cat", "dog"]), labels=["dog", 0])
    base.load_lora_weights(tmp_path)
    assert base.id2label == {0: "cat", 1: "dog"}
    assert expected.shape[-1] == 24
    torch.testing.assert_close(draw(base, labels=["dog", 0]), expected, atol=1e-4, rtol=1e-4)
    base.unload_lora_weights()
    assert base.id2label[9] == "nine" and draw(base).shape[-1] == 16
    other = DEMOPipeline(tiny_model(in_channels=1, num_classes=10, hidden_size=64, **FLOW), base.scheduler)
    with pytest.raises(ValueError, match=r"trained on another pipeline \(digits\): no layer"):
        other.load_lora_weights(tmp_path)
    base.transformer.proj_out.weight.data.mul_(1.5)
    with pytest.raises(ValueError, match="the last layer has other weights"):
        base.load_lora_weights(tmp_path)


def test_loading_no_adapters_is_never_silent(tmp_path, digits_base):
    base = DEMOPipeline.from_pretrained(digits_base)
    with pytest.raises(ValueError, match="no pytorch_lora_weights"):
        base.load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="carries no adapters"):
        base.unload_lora_weights()
    adapter = {"blocks.0.modulation.lora_A.weight": torch.randn(2, 32),
               "blocks.0.modulation.lora_B.weight": torch.randn(96, 2)}  # fmt: skip
    with pytest.raises(ValueError, match=r"no key begins with 'transformer'.*pass prefix=None"):
        base.transformer.load_lora_adapter(adapter)
    base.transformer.load_lora_adapter(adapter, prefix=None)


def test_lora_resumes_exactly(capsys, tmp_path, digits_base):
    options = (*LORA, "--init-from", digits_base, "--output-dir")
    assert run_here(capsys, *options, tmp_path / "straight", "--max-train-steps", 4)[0] == 0
    assert run_here(capsys, *options, tmp_path / "parts", "--max-train-steps", 2)[0] == 0
    more = ("--max-train-steps", 4, "--resume-from", "latest")
    assert run_here(capsys, *options, tmp_path / "parts", *more)[0] == 0
    for name in ("transformer/diffusion_pytorch_model", "lora/pytorch_lora_weights", "training_state/average"):
        paths = [tmp_path / run / "checkpoint-0000004" / f"{name}.safetensors" for run in ("straight", "parts")]
        torch.testing.assert_close(load_file(paths[0]), load_file(paths[1]), atol=0, rtol=0)


def test_an_unconditional_model_is_tuned_from_a_conditional_one(capsys, tmp_path, digits_base):
    options = (*LORA[:-2], "--init-from", digits_base, "--output-dir", tmp_path / "run", "--max-train-steps", 1)
    code, printed = run_here(capsys, *options, "--unconditional", True)
    assert code == 0, printed
    pipeline = DEMOPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.transformer.config.num_classes == 0
    null = load_file(digits_base / "transformer" / "diffusion_pytorch_model.safetensors")["label_embed.weight"][-1]
    torch.testing.assert_close(pipeline.transformer.label_embed.weight[0], null, atol=0.02, rtol=0)


def test_mistakes_about_lora_are_named(capsys, tmp_path):
    for options, message in (
        (("--lora-rank", 4), "--lora-rank 4: adapters belong to trained weights; name them with --init-from"),
        (("--lora-rank", 0, "--init-from", "x"), "--lora-rank 0: must be positive"),
    ):
        code, printed = run_here(capsys, *options, "--output-dir", tmp_path / "run")
        assert code != 0 and message in printed


def test_a_pipeline_of_diffusers_dit_is_a_start(tmp_path):
    dit_pipeline().save_pretrained(tmp_path)
    start = InitialWeights(str(tmp_path))
    task = {"sample_size": 16, "in_channels": 4, "num_classes": 2, "learn_sigma": True, "prediction_type": "epsilon",
            "flow_path": None}  # fmt: skip
    model = start.build(start.config(task), {0: "cat", 1: "dog"})
    assert model.config.timestep_freq_shift == 1 and model.label_embed.weight.shape == (3, 32)
    theirs = diffusers_dit().state_dict()
    assert torch.equal(model.proj_out.weight, theirs["proj_out_2.weight"])
    dit_pipeline().transformer.save_pretrained(tmp_path / "network")
    with pytest.raises(ValueError, match=r"--init-from .*no pipeline in it .* but a DiTTransformer2DModel"):
        InitialWeights(str(tmp_path / "network"))
