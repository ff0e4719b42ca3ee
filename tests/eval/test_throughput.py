"""The benchmark's own arithmetic and messages."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from helpers.extras import needs

from d_emo.eval import throughput
from d_emo.eval.benchmarks import side_by_side, subjects
from d_emo.eval.benchmarks.families import FAMILIES, Case, family_of
from d_emo.eval.benchmarks.peak_memory import PeakMemory
from d_emo.eval.benchmarks.published import published_score
from d_emo.eval.benchmarks.subjects import VARIANTS, Subject, check_name
from d_emo.eval.systems.names import KINDS


@pytest.fixture(autouse=True)
def small_product(monkeypatch):
    """The product beside the models takes no seconds."""
    monkeypatch.setattr(side_by_side, "PRODUCT_ON_CPU", (64, 64))


@pytest.mark.slow
def test_it_measures_models_in_turns_and_writes_table_json_and_plot(tmp_path, capsys):
    models = ["D-EMOv2-N-8@reference+checkpointed", "diffusers:DiT-N-8", "DiT-N-8"]
    arguments = ["--models", *models, "--batch", "2", "--latent", "16", "--depth", "1", "--repeats", "3"]
    throughput.main([*arguments, "--dtypes", "float32", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [(entry["model"], entry["case"]["job"]) for entry in results] == [
        (model, job) for job in ("forward", "train") for model in models
    ]
    assert all(len(entry["seconds"]) == 3 for entry in results)
    assert results[2]["ratio"] == 1
    assert results[5]["flops"] == 3 * results[2]["flops"] > 0
    assert (tmp_path / "ratios.png").stat().st_size > 1000
    assert (tmp_path / "table.md").read_text().count("\n") == 2 + len(results)
    assert "DiT-N-8" in capsys.readouterr().out


def measured(tmp_path, models, jobs, *more):
    """Results by job and model of a short run in float32."""
    throughput.main(["--models", *models, "--jobs", *jobs, "--dtypes", "float32", "--batch", "2", "--repeats", "2",
                     "--output", str(tmp_path), *more])  # fmt: skip
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    return {(entry["case"]["job"], entry["model"]): entry for entry in results}


RUN = ["--jobs", "forward", "--dtypes", "float32", "--latent", "16", "--depth", "1", "--repeats", "2"]


class Failing(Subject):
    """A subject that fails: as it is built at batch 2, in its third run at batch 3; at batch 4 somebody stops it."""

    def __init__(self, name, case, device):
        super().__init__(name, case, device)
        self.failing, self.runs = "checkpointed" in name, 0
        if self.failing and case.batch == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB | of 80")

    def run(self):
        self.runs += 1
        if self.failing and self.case.batch == 3 and self.runs == 3:
            raise RuntimeError("an illegal memory access")
        if self.case.batch == 4:
            raise KeyboardInterrupt
        super().run()


@pytest.mark.slow
def test_what_fails_is_a_line_and_the_rest_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(side_by_side, "Subject", Failing)
    models = ["--models", "D-EMOv2-N-8", "DiT-N-8@checkpointed", "DiT-N-8"]
    with pytest.raises(SystemExit) as ended:
        throughput.main([*models, *RUN, "--batch", "2", "3", "--output", str(tmp_path)])
    assert ended.value.code == "throughput: 2 of 6 lines could not be measured; the table says why."
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [entry["error"] and entry["error"].split(":")[0] for entry in results] == [
        None, "OutOfMemoryError", None, None, "RuntimeError", None]  # fmt: skip
    assert [entry["ratio"] is None for entry in results] == [False, True, False, False, True, False]
    table = (tmp_path / "table.md").read_text().splitlines()
    assert {line.count("|") for line in table} == {14}
    assert "not measured: OutOfMemoryError: CUDA out of memory" in table[3] and table[3] in capsys.readouterr().out
    assert (tmp_path / "ratios.png").stat().st_size > 1000


def test_without_its_baseline_a_model_has_no_ratio(tmp_path, monkeypatch):
    monkeypatch.setattr(side_by_side, "Subject", Failing)
    with pytest.raises(SystemExit):
        throughput.main(
            ["--models", "DiT-N-8", "DiT-N-8@checkpointed", *RUN, "--batch", "2", "--output", str(tmp_path)]
        )
    first, _ = json.loads((tmp_path / "results.json").read_text())["results"]
    assert first["ratio"] is None and first["seconds"] and first["error"] is None
    assert not (tmp_path / "ratios.png").exists()


def test_what_was_measured_is_written_before_the_next_case(tmp_path, monkeypatch):
    monkeypatch.setattr(side_by_side, "Subject", Failing)
    with pytest.raises(SystemExit) as ended:
        throughput.main(["--models", "DiT-N-8", *RUN, "--batch", "1", "4", "--output", str(tmp_path)])
    assert ended.value.code == 130
    (entry,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert entry["case"]["batch"] == 1 and (tmp_path / "table.md").read_text().count("\n") == 3


def test_models_are_built_where_they_run(monkeypatch):
    built = []
    family = family_of("DiT-N-8")

    def build(name, case):
        built.append(torch.empty(()).device.type)
        return family.build(name, case)

    monkeypatch.setattr(subjects, "family_of", lambda _: dataclasses.replace(family, build=build))
    Subject("DiT-N-8", Case("forward", "float32", "none", 1, 16, 1), torch.device("meta"))
    assert built[0] == "meta"


def test_every_case_is_compiled_for_its_own_size(monkeypatch):
    """Without a reset between them, PyTorch takes the second size of a block for a dynamic one."""
    dynamic = []

    def backend(graph, inputs):
        dynamic.append(any(isinstance(given, torch.SymInt) for given in inputs))
        return graph.forward

    monkeypatch.setattr(subjects, "compile_network", lambda model, way: model.compile_repeated_blocks(backend=backend))
    for batch in (2, 3):
        case = Case("forward", "float32", "blocks", batch, 16, 1)
        results, _ = side_by_side.measure(["DiT-N-8"], case, 2, torch.device("cpu"))
        assert results[0].error is None
    assert dynamic == [False, False]


def test_share_of_a_cards_peak(monkeypatch):
    monkeypatch.setattr(side_by_side, "device_name", lambda _: "NVIDIA A100-SXM4-40GB")
    case = Case("train", "bfloat16", "none", 1, 32, None)
    result = side_by_side.Result("DiT-S-2", case, flops=156 * 10**12, parameters=1, seconds=[1.0, 1.0])
    assert result.share_of_peak(torch.device("cpu")) == pytest.approx(0.5)
    in_float32 = dataclasses.replace(result, case=dataclasses.replace(case, dtype="float32"))
    assert in_float32.share_of_peak(torch.device("cpu")) is None


@pytest.mark.slow
@needs("export")
def test_networks_of_images_are_measured_beside_timms_torchvisions_and_onnxruntime(tmp_path, capsys):
    models = ["EMOv2-1M", "timm:test_efficientnet@onnx", "timm:test_efficientnet", "EMOv2-1M/deeplabv3",
              "torchvision:lraspp_mobilenet_v3_large"]  # fmt: skip
    results = measured(tmp_path, models, ["forward"], "--image", "64")
    assert [model for _, model in results] == models
    classifier, exported, timms, segmenter, _ = results.values()
    assert exported["flops"] == timms["flops"] > 0
    assert classifier["parameters"] == 1_460_844
    assert segmenter["parameters"] == 5_829_928  # with the auxiliary head, as in the published log
    printed = capsys.readouterr().out
    assert "| 1.46M |" in printed and "| 72.3 top-1, ImageNet, 224 |" in printed
    assert "| 34.6 mIoU, ADE20K, 512 |" in printed and "| 57.9 mIoU, COCO with VOC's 20 classes, 520 |" in printed


def test_clips_are_measured_with_their_frames(tmp_path, capsys):
    results = measured(tmp_path, ["V-EMOv2-1M"], ["forward"], "--image", "32")
    assert results["forward", "V-EMOv2-1M"]["flops"] > 0 and "4 frames of 32x32" in capsys.readouterr().out


@pytest.mark.slow
@needs("export")
def test_every_kind_of_system_runs_every_job_that_it_has(tmp_path):
    segmenters = ["U-EMOv2-5M", "EMOv2-1M/segformer@checkpointed", "transformers:segformer-b0",
                  "torchvision:deeplabv3_mobilenet_v3_large"]  # fmt: skip
    results = measured(tmp_path / "segmenters", segmenters, ["forward", "train"], "--image", "64")
    assert all(results["train", model]["flops"] == 3 * results["forward", model]["flops"] for model in segmenters)
    measured(tmp_path / "video", ["V-EMOv2-1M", "V-EMOv2-1M@onnx"], ["forward"], "--image", "32")
    measured(tmp_path / "checkpointed", ["V-EMOv2-1M@checkpointed", "V-EMOv2-1M"], ["train"], "--image", "32")
    measured(tmp_path / "classifier", ["EMOv2-1M@checkpointed", "EMOv2-1M"], ["train"], "--image", "32")
    measured(tmp_path / "exported", ["EMOv2-1M@onnx", "EMOv2-1M"], ["forward"], "--image", "64")
    detectors = [*(f"EMOv2-1M/{name}" for name in ("ssdlite", "retinanet", "mask_rcnn")),
                 "torchvision:ssdlite320_mobilenet_v3_large"]  # fmt: skip
    found = measured(tmp_path / "detectors", detectors, ["forward"], "--image", "320")
    assert found["forward", detectors[0]]["parameters"] == 2_409_088


def test_every_name_of_ours_has_a_family_and_every_family_what_it_promises():
    for kind in KINDS:
        for name in kind.names():
            assert family_of(name).given == ("clips" if kind.frames else "images")
    for family in FAMILIES:
        assert set(family.jobs) <= set(throughput.JOBS) and set(family.dtypes) <= set(throughput.DTYPES)
        assert set(family.variants) <= set(VARIANTS)
        assert ("checkpointed" in family.variants) == bool(family.checkpointing)


def test_scores_are_those_of_the_tables_and_of_torchvisions_weights():
    for name, side, expected in (
        ("EMOv2-5M", 224, "79.4 top-1, ImageNet, 224"),
        ("EMOv2-20M/pspnet", 512, "43.4 mIoU, ADE20K, 512"),
        ("EMOv2-5M/ssdlite", 320, "29.6 mAP, COCO, 320"),
        ("EMOv2-5M/ssdlite", 512, "34.8 mAP, COCO, 512"),
        ("EMOv2-5M/ssdlite", 448, "-"),
        ("EMOv2-50M/deeplabv3", 512, "-"),
        ("EMOv1-5M", 224, "78.4 top-1, ImageNet, 224"),
        ("EMOv1-5M/segformer", 512, "-"),
        ("V-EMOv2-5M", 160, "65.2 top-1, Kinetics-400, 160"),
        ("V-EMOv2-1M", 160, "-"),
        ("torchvision:deeplabv3_mobilenet_v3_large", 512, "60.3 mIoU, COCO with VOC's 20 classes, 520"),
        ("torchvision:ssdlite320_mobilenet_v3_large", 320, "21.3 mAP, COCO, 320"),
        ("transformers:segformer-b0", 512, "37.4 mIoU, ADE20K, 512"),
        ("timm:resnet18", 224, "-"),
        ("D-EMOv2-S-2", 32, "-"),
    ):
        assert published_score(name, side) == expected, name


@pytest.mark.parametrize(
    ("name", "jobs", "dtypes", "message"),
    [
        ("EMOv2-5M/segnet", ["forward"], ["float32"], "'EMOv2-5M/segnet' is unknown"),
        ("torchvision:resnet18", ["forward"], ["float32"], "of torchvision there are deeplabv3_mobilenet_v3_large, "),
        ("transformers:bert", ["forward"], ["float32"], "of transformers there are segformer-b0"),
        ("keras:net", ["forward"], ["float32"], "libraries are diffusers, timm, torchvision and transformers"),
        ("EMOv2-5M/retinanet", ["train"], ["float32"], "measured in forward only; add --jobs forward"),
        ("EMOv2-5M/ssdlite", ["forward"], ["bfloat16"], "measured in float32 only; add --dtypes float32"),
        ("EMOv2-5M/ssdlite@onnx", ["forward"], ["float32"], "has no @onnx; it has @reference"),
        ("torchvision:lraspp_mobilenet_v3_large@onnx", ["forward"], ["float32"], "has no @onnx; it has none"),
        ("V-EMOv2-5M", ["sample"], ["float32"], "--jobs sample takes diffusion models of this package only"),
    ],
)
def test_what_a_family_does_not_have_is_refused_in_one_line(name, jobs, dtypes, message):
    with pytest.raises(ValueError, match=message) as caught:
        check_name(name, jobs, dtypes)
    assert "\n" not in str(caught.value)


def test_flops_are_those_of_the_model():
    case = Case("forward", "float32", "none", 3, 32, None)
    subject = Subject("D-EMOv2-N-4", case, torch.device("cpu"))
    from d_emo import create_model
    from d_emo.models.flops import count_macs

    assert subject.flops == 2 * 3 * count_macs(create_model("D-EMOv2-N-4"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "DiT-Q-2"], "'DiT-Q-2' is unknown"),
        (["--models", "DiT-S-2@fast"], "'fast' is unknown; use reference or checkpointed"),
        (["--repeats", "1"], "--repeats: 1 is not a whole number from 2 on"),
        (["--batch", "0"], "--batch: 0 is not a whole number from 1 on"),
        (["--depth", "-1"], "--depth: -1 is not a whole number from 1 on"),
        (["--threads", "0"], "--threads: 0 is not a whole number from 1 on"),
        (["--output", "/dev/null"], "--output /dev/null is no folder"),
        (["--models", "timm:resnet18", "--jobs", "sample"], "models of this package only"),
        (["--models", "EMOv2-1M@onnx"], "add --jobs forward --dtypes float32"),
        (["--models", "EMOv2-1M", "DiT-S-2"], "networks of images and of latents cannot be measured side by side"),
        (["--models", "EMOv2-1M", "V-EMOv2-5M"], "networks of clips and of images cannot be measured side by side"),
        (["--models", "EMOv2-1M", "--depth", "2"], "--depth is for networks of latents; the models are of images"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        throughput.main(arguments)
    assert message in capsys.readouterr().err


def test_help_does_not_wait_for_pytorch():
    code = (
        "import sys\nfrom d_emo.eval import throughput\ntry: throughput.main(['--help'])\n"
        "finally: print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 0 and "--repeats" in answer.stdout and answer.stderr.strip() == "[]"


def test_peak_memory_sees_what_is_held_for_a_moment():
    with PeakMemory(torch.device("cpu")) as peak:
        torch.ones(50 * 2**18).sum()
    if peak.mib is None:
        pytest.skip("the system does not let a process reset its peak")
    assert 40 < peak.mib < 150
