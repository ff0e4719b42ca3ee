"""A prepared pickle, or code, in any place where a stranger's file may lie: nothing of it runs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import pickles
from helpers.commands import outcome
from helpers.training import TINY

from d_emo.common.commands import explanation, one_line
from d_emo.eval import evaluate_classifier, evaluate_fid
from d_emo.train import convert_dit, convert_emov2, train_classifier, train_dit

Write = Callable[[Path, Path], None]
RESUME = [*TINY, "--max-train-steps", "2", "--resume-from", "latest", "--output-dir"]


class Place(NamedTuple):
    """Where a pickle lies.

    Attributes:
        file: of it, in a folder of the test's.
        writes: the forms in which it lies there, one after the other.
        read: reads the place, given the folder.
        prepare: brings what belongs around the file.
        without: files that would be read in its place.
        fails: whether reading ends with a line; what is not read is passed over.
        ours: whether the line is this package's.
    """

    file: str
    writes: tuple[Write, ...]
    read: Callable[[Path], None]
    prepare: Callable[[Path, dict[str, Path]], None] = lambda folder, made: None
    without: tuple[str, ...] = ()
    fails: bool = True
    ours: bool = True


FORMS = tuple(pickles.FORMS.values())
# Where each costs a run of a trainer.
TWO = (pickles.raw, pickles.by_torch)


def copied(name: str) -> Callable[[Path, dict[str, Path]], None]:
    return lambda folder, made: shutil.copytree(made[name], folder / name) and None


def resume(folder: Path) -> None:
    """Go on from a checkpoint whose manifest agrees with what lies there."""
    from d_emo.train.engine.checkpoints import write_manifest

    checkpoint = folder / "trained" / "checkpoint-0000001"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").unlink()
    del manifest["files"]
    write_manifest(checkpoint, manifest)
    train_dit.main([*RESUME, str(folder / "trained")])


def open_pipeline(folder: Path) -> None:
    from d_emo.pipelines import open_pipeline

    open_pipeline(str(folder / "pipeline"))


def open_vae(folder: Path) -> None:
    from d_emo.images.autoencoders import open_vae

    open_vae(str(folder / "vae"))


def classify(folder: Path) -> None:
    evaluate_classifier.main(["--model", str(folder / "classifier"), "--output-dir", str(folder / "out")])


def learn_from(teacher: str) -> Callable[[Path], None]:
    def train(folder: Path) -> None:
        from helpers.classifiers import TINY

        train_classifier.main([
            *TINY, "--max-train-steps", "1", "--output-dir", str(folder / "out"), "--teacher", teacher.format(folder),
        ])  # fmt: skip

    return train


def import_dit(folder: Path) -> None:
    convert_dit.main([str(folder / "dit.pt"), "--objective", "dit", "--vae", "none", "--output-dir", str(folder / "o")])


def import_emov2(folder: Path) -> None:
    convert_emov2.main([str(folder / "emov2.pth"), "--output-dir", str(folder / "o")])


def evaluate(samples: str, *more: str) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        words = [word.format(folder) for word in ("--samples", samples, *more)]
        evaluate_fid.main([*words, "--output-dir", str(folder / "out"), "--cache-dir", str(folder / "cache")])

    return run


def train_on(*source: str) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        named = [word.format(folder) for word in source]
        train_dit.main([*TINY, "--max-train-steps", "1", "--vae", "none", *named, "--output-dir", str(folder / "out")])

    return run


def train_on_latents(folder: Path) -> None:
    train_dit.main([*TINY, "--max-train-steps", "1", "--latents", str(folder / "latents"), "--vae",
                    str(folder / "vae"), "--output-dir", str(folder / "out")])  # fmt: skip


def latents_and_vae(folder: Path, made: dict[str, Path]) -> None:
    copied("latents")(folder, made)
    copied("vae")(folder, made)


def load_adapters(folder: Path) -> None:
    from helpers.pipelines import tiny_pipeline

    tiny_pipeline().load_lora_weights(str(folder / "lora"))


def timm_checkpoint(folder: Path) -> None:
    import timm

    import d_emo.timm_models  # noqa: F401

    timm.create_model("emov2_1m", checkpoint_path=str(folder / "checkpoint.pth"))


def read_names(folder: Path) -> None:
    from d_emo.images.labels import read_class_names

    read_class_names(str(folder / "names.json"))


def options_file(path: Path, marker: Path) -> None:
    path.write_text(f"seed: !!python/object/apply:builtins.open ['{marker}', 'w']\n")


def module_in_model_index(path: Path, marker: Path) -> None:
    """A pipeline whose parts are to be imported from a file beside it."""
    index = json.loads(path.read_text())
    index["transformer"] = ["prepared", "Prepared"]
    index["_class_name"] = ["prepared", "Prepared"]
    path.write_text(json.dumps(index))
    for name in ("prepared.py", "pipeline.py", "transformer/prepared.py"):
        (path.parent / name).write_text(f"open({str(marker)!r}, 'w')\nclass Prepared: pass\n")


def module_in_config(path: Path, marker: Path) -> None:
    """A classifier whose class is to be imported from a file beside it."""
    config = json.loads(path.read_text())
    config["auto_map"] = {"AutoConfig": "prepared.Prepared", "AutoModelForImageClassification": "prepared.Prepared"}
    config["model_type"] = "prepared"
    path.write_text(json.dumps(config))
    (path.parent / "prepared.py").write_text(f"open({str(marker)!r}, 'w')\nclass Prepared: pass\n")


def dataset_script(path: Path, marker: Path) -> None:
    path.write_text(f"open({str(marker)!r}, 'w')\n")


def parquet(path: Path, marker: Path) -> None:
    """Columns of pickles where pictures and labels are expected."""
    import pickle

    import datasets

    content = pickle.dumps(pickles.Prepared(marker))
    datasets.Dataset.from_dict({"image": [content] * 4, "label": [content] * 4}).to_parquet(path)


STATE = "trained/checkpoint-0000001/training_state"
WEIGHTS = "diffusion_pytorch_model"
FID = ("--reference", "{}/reference.npz", "--features", "pixels")
UNVERIFIED = ("--reference", "digits", "--features", "inception", "--inception-weights", "{}/inception.pth",
              "--unverified-inception")  # fmt: skip


def samples(folder: Path, made: dict[str, Path]) -> None:
    shutil.copy(made["samples.npz"], folder / "samples.npz")


trained = copied("trained")
PLACES = {
    "a checkpoint's custom state": Place(f"{STATE}/custom_checkpoint_0.pkl", TWO, resume, trained, fails=False),
    "a checkpoint's schedule": Place(f"{STATE}/scheduler.bin", TWO, resume, trained, fails=False),
    "a checkpoint's random state": Place(
        f"{STATE}/random_states_0.pkl", TWO, resume, trained, (f"{STATE}/random-0.json",)
    ),
    "a checkpoint's optimizer": Place(f"{STATE}/optimizer.bin", TWO, resume, trained,
                                      (f"{STATE}/optimizer.safetensors", f"{STATE}/optimizer.json")),
    "a checkpoint's weights": Place(f"{STATE}/model.safetensors", TWO, resume, trained),
    "a checkpoint's weights as .bin": Place(f"{STATE}/pytorch_model.bin", TWO, resume, trained,
                                            (f"{STATE}/model.safetensors",)),
    "a sharded checkpoint's metadata": Place(f"{STATE}/pytorch_model_fsdp_0/.metadata", (pickles.raw,), resume, trained,
                                             (f"{STATE}/model.safetensors",)),
    "a checkpoint's average": Place(f"trained/checkpoint-0000001/transformer/{WEIGHTS}.bin", TWO, resume, trained,
                                    (f"trained/checkpoint-0000001/transformer/{WEIGHTS}.safetensors",)),
    "a transformer's .bin": Place(f"pipeline/transformer/{WEIGHTS}.bin", FORMS, open_pipeline, copied("pipeline"),
                                  (f"pipeline/transformer/{WEIGHTS}.safetensors",)),
    "a transformer's .safetensors": Place(f"pipeline/transformer/{WEIGHTS}.safetensors", FORMS, open_pipeline,
                                          copied("pipeline")),
    "a VAE's .bin": Place(f"vae/{WEIGHTS}.bin", FORMS, open_vae, copied("vae"), (f"vae/{WEIGHTS}.safetensors",)),
    "code beside a pipeline": Place("pipeline/model_index.json", (module_in_model_index,), open_pipeline,
                                    copied("pipeline")),
    "a classifier's .bin": Place("classifier/pytorch_model.bin", FORMS, classify, copied("classifier"),
                                 ("classifier/model.safetensors",)),
    "code beside a classifier": Place("classifier/config.json", (module_in_config,), classify, copied("classifier")),
    "a teacher's .bin": Place("classifier/pytorch_model.bin", TWO, learn_from("{}/classifier"), copied("classifier"),
                              ("classifier/model.safetensors",)),
    "a teacher of timm's": Place("classifier/pytorch_model.bin", TWO, learn_from("timm:local-dir:{}/classifier"),
                                 copied("classifier"), ("classifier/model.safetensors",)),
    "timm's checkpoint_path": Place("checkpoint.pth", FORMS, timm_checkpoint, ours=False),
    "a published DiT": Place("dit.pt", FORMS, import_dit),
    "a published EMOv2": Place("emov2.pth", FORMS, import_emov2),
    "Inception's weights": Place("inception.pth", FORMS, evaluate("{}/samples.npz", *UNVERIFIED), samples),
    "samples": Place("samples.npz", (pickles.as_archive("arr_0"),), evaluate("{}/samples.npz", *FID)),
    "a reference's pictures": Place("reference.npz", (pickles.as_archive("arr_0"), *FORMS),
                                    evaluate("{}/samples.npz", *FID), samples),
    "a reference's statistics": Place("reference.npz", (pickles.as_archive("mu", "sigma"),),
                                      evaluate("{}/samples.npz", *FID), samples),
    "latents": Place("latents/latents-000000000.npy", (pickles.as_array, *FORMS), train_on_latents, latents_and_vae),
    "labels of latents": Place("latents/labels.npy", (pickles.as_array, *FORMS), train_on_latents, latents_and_vae),
    "adapters": Place("lora/pytorch_lora_weights.safetensors", FORMS, load_adapters),
    "adapters as .bin": Place("lora/pytorch_lora_weights.bin", FORMS, load_adapters),
    "tar shards": Place("train.tar", (pickles.as_shard,), train_on("--dataset", "{}/train.tar"), fails=False),
    "a table": Place("train.parquet", (parquet,), train_on("--dataset", "{}/train.parquet")),
    "a data set's script": Place("data/data.py", (dataset_script,), train_on("--dataset", "{}/data")),
    "a data set's pickle": Place("data/train.pkl", FORMS, train_on("--dataset", "{}/data")),
    "a file of options": Place("run.yaml", (options_file, *FORMS), train_on("--config", "{}/run.yaml")),
    "class names": Place("names.json", FORMS, read_names),
}  # fmt: skip


@pytest.fixture(scope="session")
def with_run(made, tmp_path_factory):
    """What is made, and a run with a checkpoint."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train_dit.main([*TINY, "--max-train-steps", "1", "--output-dir", str(folder)])
    return {**made, "trained": folder}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PLACES)
def test_nothing_of_a_prepared_file_runs(name, with_run, tmp_path, capsys, monkeypatch):
    place, marker = PLACES[name], tmp_path / "it-ran"
    monkeypatch.setenv("D_EMO_CACHE", str(tmp_path / "cache"))
    for number, write in enumerate(place.writes):
        folder = tmp_path / str(number)
        folder.mkdir()
        place.prepare(folder, with_run)
        for path in place.without:
            (folder / path).unlink()
        (folder / place.file).parent.mkdir(parents=True, exist_ok=True)
        write(folder / place.file, marker)
        said = said_by(place, folder, capsys)
        assert not marker.exists(), f"{write}: it ran"
        assert "Traceback" not in said and len(one_line(said)) == len(said), f"{write}: {said}"
        assert bool(said) or not place.fails, f"{write}: read as if nothing were wrong"
        shutil.rmtree(folder)


def said_by(place: Place, folder: Path, capsys: pytest.CaptureFixture) -> str:
    """The line that reading ends with; empty where it goes well."""

    def main(arguments: list[str]) -> None:
        try:
            place.read(folder)
        except Exception as error:  # of a function, not of a command
            line = explanation(error) if place.ours else "a line of another library's"
            assert line is not None, f"{type(error).__name__}: {error}"
            raise SystemExit(one_line(line)) from error

    result = outcome(main, [], capsys)
    assert result.kind in ("done", "refused"), result.message
    return result.message


def test_the_prepared_pickle_does_run_where_pickles_are_loaded(tmp_path):
    """Or the tests above would prove nothing."""
    import pickle

    import numpy as np
    import torch

    for number, (write, load) in enumerate([
        (pickles.raw, lambda path: pickle.loads(path.read_bytes())),
        (pickles.bare, lambda path: pickle.loads(path.read_bytes())),
        (pickles.by_torch, lambda path: torch.load(path, weights_only=False)),
        (pickles.by_old_torch, lambda path: torch.load(path, weights_only=False)),
        (pickles.as_array, lambda path: np.load(path, allow_pickle=True)),
        (pickles.as_archive("a"), lambda path: np.load(path, allow_pickle=True)["a"]),
    ]):  # fmt: skip
        marker = tmp_path / f"marker-{number}"
        write(tmp_path / str(number), marker)
        load(tmp_path / str(number))
        assert marker.exists()
