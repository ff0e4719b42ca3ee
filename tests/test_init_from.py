"""Fine-tuning: what is taken over from a trained pipeline, what is new, what is refused."""

import pytest
import torch
from conftest import ROOT, run_here, tiny_pipeline

from d_emo import DEMOPipeline, create_model
from d_emo.train.init_from import InitialWeights

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


def test_fine_tuning_from_the_command_line_and_resuming(capsys, tmp_path):
    common = ("--global-batch-size", 8, "--micro-batch-size", 8, "--sample-every", 0, "--report-to", "none")
    first = ("--config", ROOT / "train/configs/digits.yaml", "--output-dir", tmp_path / "first", "--max-train-steps", 2)
    assert run_here(capsys, *first, *common)[0] == 0
    second = ("--init-from", tmp_path / "first", "--objective", "sit", "--output-dir", tmp_path / "second")
    code, printed = run_here(capsys, *second, "--max-train-steps", 2, *common)
    assert code == 0 and "model      first: 1,459,728 parameters" in printed, printed
    code, printed = run_here(capsys, *second, "--max-train-steps", 3, "--resume-from", "latest", *common)
    assert code == 0 and "resuming from" in printed, printed
    assert DEMOPipeline.from_pretrained(tmp_path / "second").transformer.config.patch_size == 4
    code, printed = run_here(capsys, "--init-from", "nowhere", "--output-dir", tmp_path / "third", *common)
    assert code != 0 and "--init-from nowhere: neither a pipeline folder" in printed
    code, printed = run_here(capsys, "--init-from", tmp_path / "first", "--output-dir", tmp_path / "third", *common)
    assert code != 0 and "Choose --objective and --vae as it was trained" in printed
