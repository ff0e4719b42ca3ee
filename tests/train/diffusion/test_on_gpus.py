"""Plans for GPUs that are not here, from the command line."""

import re

import pytest
from helpers.autoencoders import tiny_autoencoder
from helpers.data import photo
from helpers.training import run_here

from d_emo.models import create_model
from d_emo.models.flops import count_parameters
from d_emo.train.diffusion.on_gpus import checkpoints_kept
from d_emo.train.engine import checkpoints

DIGITS = ["--dry-run", "true", "--micro-batch-size", "4", "--global-batch-size", "512"]


def lines(capsys, *arguments):
    """What a plan says, by topic."""
    code, printed = run_here(capsys, *DIGITS, *arguments)
    assert code == 0, printed
    return {line.split()[0]: line[13:] for line in printed.splitlines() if line.startswith("  ")}


def test_a_plan_says_what_a_run_takes_there(capsys, tmp_path):
    said = lines(capsys, "--on", "64xH100", "--compile", "true", "--output-dir",
                 str(tmp_path / "out"), "--max-train-steps", "5000")  # fmt: skip
    assert said["gpus"].startswith("64 x H100 in 8 machines")
    assert said["batch"].startswith("512 = 64 process(es) x 2 accumulated x 4")
    assert said["kernels"].startswith("Triton") and "bfloat16" in said["precision"]
    assert re.match(
        r"0% of a GPU's 79 GiB; up to [\d,]+ images at once; up to [\d,]+ images at once with --grad", said["fits"]
    )
    assert "with FSDP2 0% of" in said["fits"] and "BatchNorm sees 4 images at once" in said["fits"]
    rate, each, computing, waiting, exchange = (float(value.replace(",", "")) for value in re.match(
        r"([\d,]+) images/s, ([\d,]+) a GPU; of a step ([\d.]+) ms are computing, by a roofline of its operators, and "
        r"([\d.]+) ms waiting for gradients, which take ([\d.]+) ms at 400 GB/s from GPU to GPU", said["speed"]
    ).groups())  # fmt: skip
    assert rate == pytest.approx(512 / (computing + waiting) * 1e3, rel=0.02) and each == pytest.approx(
        rate / 64, rel=0.02
    )
    # N-4's gradients in float32, twice 63 of 64 parts
    values = count_parameters(create_model("D-EMOv2-N-4", in_channels=1, sample_size=16, num_classes=10))
    assert exchange == pytest.approx(1e3 * 2 * 63 / 64 * 4 * values / 400e9, rel=0.05)
    assert "5,000 steps" in said["length"] and re.search(r"\d (s|min) of such steps$", said["length"])
    reading = float(re.match(r"([\d,]+) images/s a machine \(a core", said["reading"])[1].replace(",", ""))
    assert reading == pytest.approx(rate / 8, rel=0.02)
    assert "launches are the limit, which are guessed" in said["speed"]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_measured_step_is_taken_where_the_run_is_one_of_them(capsys, tmp_path):
    """S-2 at batch 256 on latents of 4 x 32 x 32, with what encoding takes besides."""
    for label in ("one", "two"):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        photo().save(tmp_path / "pictures" / label / "0.png")
    vae = tiny_autoencoder(latent_channels=4)
    vae.save_pretrained(tmp_path / "vae")
    side = 32 * 2 ** (len(vae.config.block_out_channels) - 1)
    ways = ["--train-data-dir", tmp_path / "pictures", "--vae", tmp_path / "vae", "--resolution", side,
            "--model", "D-EMOv2-S-2", "--on", "H100", "--mixed-precision", "bf16", "--compile", "true"]  # fmt: skip
    said = lines(capsys, *ways, "--micro-batch-size", "256", "--global-batch-size", "256")
    assert "4 x 32 x 32" in said["space"]
    computing = float(re.search(r"of a step ([\d.]+) ms are computing, measured on one GPU$", said["speed"])[1])
    assert 58.59 < computing < 61
    assert "waiting" not in said["speed"] and "FSDP2" not in said["fits"]
    reference = lines(capsys, *ways, "--micro-batch-size", "256", "--kernels", "reference")
    assert "by a roofline" in reference["speed"] and "plain PyTorch" in reference["kernels"]


@pytest.mark.slow
def test_a_launch_configuration_for_fsdp_is_planned_as_such(capsys, monkeypatch):
    """As `accelerate launch --config_file train/configs/accelerate/fsdp2.yaml` says it to its processes."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    said = lines(capsys, "--on", "8xH100", "--mixed-precision", "bf16")
    assert "waiting for weights and gradients" in said["speed"] and "FSDP2" not in said["fits"]


@pytest.mark.slow
def test_a_recipes_micro_batch_is_no_more_than_a_gpus_share(capsys):
    code, said = run_here(capsys, "--dry-run", "true", "--on", "8xH100")
    assert code == 0 and "64 = 8 process(es) x 1 accumulated x 8" in said


@pytest.mark.parametrize(
    "more",
    [[], pytest.param(["--optimizer", "muon", "--snapshot-every", "1"], marks=pytest.mark.slow)],
    ids=["plain", "more state"],
)
def test_a_planned_checkpoint_is_as_large_as_a_real_one(capsys, tmp_path, more):
    """Within 5%: headers, cards and random numbers come on top of tensors."""
    ways = ["--model", "D-EMOv2-N-4", "--global-batch-size", "8", "--micro-batch-size", "8", "--max-train-steps", "1",
            "--checkpoint-every", "1", "--report-to", "none", "--sample-every", "0", *more]  # fmt: skip
    planned = re.match(r"([\d.]+) MiB every 1 steps", lines(capsys, *ways, "--on", "H100")["checkpoint"])[1]
    code, output = run_here(capsys, *ways, "--output-dir", tmp_path / "run")
    assert code == 0, output
    files = [path for path in (tmp_path / "run" / "checkpoint-0000001").rglob("*") if path.is_file()]
    assert float(planned) == pytest.approx(sum(path.stat().st_size for path in files) / 2**20, rel=0.05)


def test_checkpoints_are_counted_as_they_are_kept(tmp_path):
    """Against the folders that pruning leaves."""
    for number, case in enumerate(
        [(10, 3, None, None), (10, 3, 2, None), (12, 3, 1, 6), (40, 1, 2, 5), (2, 5, 3, None)]
    ):
        steps, every, last, also = case
        folder = tmp_path / str(number)
        for step in [*range(every, steps, every), steps]:
            checkpoints.checkpoint_path(folder, step).mkdir(parents=True)
            checkpoints.prune_checkpoints(folder, last, also)
        assert checkpoints_kept(*case) == len(checkpoints.list_checkpoints(folder)), case


@pytest.mark.slow
def test_norms_that_do_not_learn_from_a_batch_are_not_worried_about(capsys):
    few = ["--on", "8xH100", "--micro-batch-size", "2", "--global-batch-size", "16"]
    assert "BatchNorm sees 2 images at once" in lines(capsys, *few, "--model", "D-EMOv2-N-8")["fits"]
    assert "BatchNorm" not in lines(capsys, *few, "--model", "DiT-N-8")["fits"]


@pytest.mark.slow
def test_what_is_done_before_a_step_and_muons_products_are_counted(capsys):
    def computing(*more):
        said = lines(capsys, "--model", "DiT-N-8", "--on", "H100", "--objective", "sit", *more)
        return float(re.search(r"of a step ([\d,.]+) ms", said["speed"])[1].replace(",", ""))

    plain = computing()
    assert computing("--objective", "flow-map") > 1.2 * plain  # two more forward passes of three passes' work
    assert computing("--optimizer", "muon") >= plain


@pytest.mark.slow
def test_what_does_not_fit_is_named_with_what_would(capsys):
    said = lines(capsys, "--on", "RTX4090", "--model", "D-EMOv2-S-2", "--micro-batch-size", "4096",
                 "--global-batch-size", "4096", "--mixed-precision", "no")  # fmt: skip
    assert said["fits"].startswith("DOES NOT FIT: ") and re.search(r"up to [1-9]\d* images at once;", said["fits"])
    assert said["precision"].startswith("float32, products in TF32; --mixed-precision bf16 is faster")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--on", "64xH100"], "--on 64xH100: it is for plans; add --dry-run true"),
        (
            ["--on", "64xB200", "--dry-run", "true"],
            "--on '64xB200' names no GPUs; write a number up to 1,000,000, x and",
        ),
        (
            ["--compile", "true", "--compile-mode", "graphs", "--gradient-checkpointing", "true"],
            "--compile-mode graphs: --gradient-checkpointing computes block by block again; use --compile-mode blocks",
        ),
        (["--on", "3xH100", "--dry-run", "true"], "--global-batch-size 64 cannot be shared by 3 processes"),
    ],
)
def test_what_cannot_be_planned_ends_with_one_line(capsys, arguments, message):
    code, said = run_here(capsys, *arguments)
    assert code and message in said and "\n" not in said
