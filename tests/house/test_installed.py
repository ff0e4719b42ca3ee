"""The wheel in a folder of its own, without the checkout: `d-emo`, and Accelerate's launcher on its modules."""

import os
import shutil
import subprocess
import sys

import pytest
from helpers.extras import needs
from helpers.paths import ROOT
from helpers.processes import offline_environment
from helpers.training import TINY

pytestmark = [pytest.mark.slow, needs("test-all", "build")]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """What pip makes of the wheel, in a folder that Python looks into first, and an empty folder to work in."""
    place = tmp_path_factory.mktemp("installed")
    source = place / "source"  # a copy, so that no build folder is left in the tree
    for name in ("d_emo", "pipelines", "train", "eval"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", place, source]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = place.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", place / "site", wheel]
    subprocess.run(pip, check=True, capture_output=True)
    (place / "work").mkdir()
    return place


def run(installed, *command: str) -> subprocess.CompletedProcess:
    """Run a command there."""
    environment = {**offline_environment(), "PYTHONPATH": str(installed / "site"), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = os.pathsep.join([str(installed / "site" / "bin"), os.environ["PATH"]])
    return subprocess.run(
        command, env=environment, cwd=installed / "work", capture_output=True, text=True, check=False, timeout=500
    )


def test_d_emo_is_on_the_path_and_is_the_installed_one(installed):
    listed = run(installed, "d-emo")
    assert listed.returncode == 0 and "train-classifier" in listed.stdout and not listed.stderr
    code = "import d_emo; print(d_emo.__file__)"
    assert run(installed, sys.executable, "-c", code).stdout.startswith(str(installed / "site"))


def test_accelerate_launches_the_trainer_and_d_emo_draws_with_what_it_wrote(installed):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m"]
    options = [*TINY, "--max-train-steps", "1", "--output-dir", "run"]
    trained = run(installed, *launch, "d_emo.train.train_dit", *options)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    words = ["--model", "run", "--labels", "3", "--num-images", "2", "--steps", "2", "--output", "grid.png"]
    drawn = run(installed, "d-emo", "sample", *words)
    assert (drawn.returncode, drawn.stdout) == (0, "2 images in grid.png\n"), drawn.stderr
    assert (installed / "work" / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_the_packages_configurations_are_found_there(installed):
    done = run(installed, "d-emo", "train", "--config", "train/configs/digits.yaml", "--dry-run", "true")
    assert done.returncode == 0, done.stderr
    assert not (installed / "work" / "runs").exists()
