"""Model cards: valid for the Hub, true of the run, and with an example that works as it is printed."""

import re
import shlex
from types import SimpleNamespace

import PIL.Image
import pytest
import yaml
from helpers.training import TINY, run_here
from huggingface_hub import ModelCard

from d_emo.models.variants import FAMILIES
from d_emo.train import train_classifier
from d_emo.train.classification.config import parse_classifier_config
from d_emo.train.diffusion.config import parse_config
from d_emo.train.diffusion.model_card import WORKS
from d_emo.train.engine.cards import CITATIONS, PRIVATE_OPTIONS, base_name, hub_id, training_command

SIT = [argument if argument != "dit" else "sit" for argument in TINY]
DIFFUSION = [*SIT, "--max-train-steps", "2", "--checkpoint-every", "1", "--sample-every", "2", "--sample-steps", "2",
             "--samples-per-class", "1", "--resolution", "16", "--vae", "none"]  # fmt: skip
CLASSIFIER = ["--model", "EMOv2-1M", "--resolution", "32", "--global-batch-size", "8", "--max-train-steps", "2",
              "--report-to", "none", "--num-workers", "0", "--validation-share", "0.3", "--validate-every", "1",
              "--auto-augment", "none"]  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a folder of pictures, in which paths are relative."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(('barn "owl"', "cat")):
        (tmp_path / "my pets" / name).mkdir(parents=True)
        for index in range(6):
            PIL.Image.new("RGB", (20, 16), (number * 90, index * 40, 7)).save(
                tmp_path / "my pets" / name / f"{index}.png"
            )
    PIL.Image.new("RGB", (40, 40)).save(tmp_path / "photo.jpg")
    return tmp_path


def read(path):
    """A card as the Hub's client reads it, and its blocks of code by language."""
    card = ModelCard(path.read_text(encoding="utf-8"))
    return card, dict(re.findall(r"```(\w+)\n(.*?)```", card.text, flags=re.DOTALL))


def command_of(card):
    (command,) = re.findall(r"```bash\n(accelerate launch .*?)\n```", card.text)
    return shlex.split(command)


def public(config):
    return {name: value for name, value in config.flat().items() if name not in PRIVATE_OPTIONS}


def test_every_family_has_its_papers():
    assert WORKS.keys() == FAMILIES.keys()
    assert {work for works in WORKS.values() for work in works} <= CITATIONS.keys()


def test_a_pipelines_card(here, capsys):
    arguments = [*DIFFUSION, "--train-data-dir", "my pets"]
    code, printed = run_here(capsys, *arguments, "--output-dir", "runs/pets", "--license", "cc-by-4.0")
    assert code == 0, printed
    card, blocks = read(here / "runs/pets/README.md")
    assert card.data.license == "cc-by-4.0" and card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "unconditional-image-generation" and "D-EMOv2-N-8" in card.data.tags
    assert "# pets: D-EMOv2-N-8 on my pets" in card.text and 'barn "owl", cat' in card.text
    assert "pip install d-emo" in card.text and "@inproceedings{ma2024sit" in blocks["bibtex"]
    assert re.search(r"2 steps took \d+:\d\d on \d+ cores of .*, with d_emo [\d.]+\S*, torch [\d.]+", card.text)
    for folder in (here / "runs/pets", here / "runs/pets/checkpoint-0000002"):
        card, blocks = read(folder / "README.md")
        assert "![Samples, one class a row](picture.png)" in card.text
        assert (
            PIL.Image.open(folder / "picture.png").size
            == PIL.Image.open(here / "runs/pets/samples/step-0000002.png").size
        )
        assert "# pets:" in card.text
    exec(blocks["python"], {})
    assert PIL.Image.open("image.png").size == (16, 16)
    assert "picture.png" not in (here / "runs/pets/checkpoint-0000001/README.md").read_text()  # nothing was drawn yet
    words = command_of(card)
    assert words[:4] == ["accelerate", "launch", "-m", "d_emo.train.train_dit"]
    assert public(parse_config(words[4:])) == public(parse_config(list(map(str, arguments))))
    # A run that starts from it has a name and a size of its own, and says where it began.
    more = [
        "--train-data-dir",
        "my pets",
        "--init-from",
        "runs/pets/checkpoint-0000002",
        "--output-dir",
        here / "tuned",
    ]
    code, printed = run_here(capsys, *DIFFUSION, *more, "--sample-every", "0")
    assert code == 0, printed
    card, _ = read(here / "tuned/README.md")
    assert "# tuned: D-EMOv2-N-8 on my pets" in card.text and "fine-tuned from pets/checkpoint-0000002" in card.text
    assert "D-EMOv2-N-8" in card.data.tags and "checkpoint-0000002" not in card.data.tags
    assert card.data.license is None and "No licence of the weights was named" in card.text


def test_a_classifiers_card(here, capsys):
    arguments = [*CLASSIFIER, "--train-data-dir", here / "my pets"]
    code, printed = run_here(capsys, *arguments, "--output-dir", "runs/c", main=train_classifier.main)
    assert code == 0, printed
    assert re.search(r'step 2/2: validation top-1 .*, hardest (barn "owl"|cat) \d+\.\d%', printed)
    card, blocks = read(here / "runs/c/README.md")
    (result,) = [result for result in card.data.eval_results if result.metric_name == "top-1 accuracy"]
    assert card.data.pipeline_tag == result.task_type == "image-classification"
    table = (here / "runs/c/validation.csv").read_text().splitlines()
    assert result.metric_value == pytest.approx(float(table[-1].split(",")[1]), abs=1e-4)
    assert "![Loss and accuracy while training](picture.png)" in card.text and (here / "runs/c/picture.png").is_file()
    exec(blocks["python"], {})
    assert "'label': 'cat'" in capsys.readouterr().out
    words = command_of(card)
    assert "my pets" in words and not any(str(here) in word for word in words)  # nobody's folders are published
    changed = [word if word != "my pets" else str(here / "my pets") for word in words]
    assert public(parse_classifier_config(changed[4:])) == public(parse_classifier_config(list(map(str, arguments))))


def test_only_names_of_the_hub_become_links(here):
    assert hub_id("lab/model") == "lab/model" and hub_id(None) is None
    (here / "lab/model").mkdir(parents=True)
    for name in ("lab/model", "model", "runs/a/b", "/srv/a", "s3://a/b", "a/b-{0..1}.tar"):
        assert hub_id(name) is None, name
    assert base_name("lab/other") == "lab/other" and base_name(str(here / "runs/pets")) == "pets"
    assert base_name("/srv/pets/checkpoint-0000002") == "pets/checkpoint-0000002"


@pytest.mark.parametrize("license", ["Apache License 2.0", "MIT"])
def test_licences_are_spelt_like_the_hubs(license):
    with pytest.raises(ValueError, match=r"--license .*: the Hub spells licences like apache-2\.0"):
        parse_config(["--license", license])


def test_the_head_survives_any_name(here):
    from d_emo.train.engine.cards import card_head

    head = card_head({"tags": ["a: b", "# c", "é"]}, "t")
    assert yaml.safe_load("\n".join(head[1 : head.index("---", 1)])) == {"tags": ["a: b", "# c", "é"]}


@pytest.mark.parametrize("parse", [parse_config, parse_classifier_config])
def test_the_command_of_a_run_that_was_continued_and_changed_can_be_typed(parse):
    """What belongs to a continuation (--resume-from, --allow-change) is no part of how the model is made."""
    config = parse([
        "--train-data-dir", "pets", "--learning-rate", "0.25", "--resume-from", "runs/pets/checkpoint-0000002",
        "--allow-change", "learning_rate",
    ])  # fmt: skip
    words = shlex.split(training_command(SimpleNamespace(config=config), "d_emo.train.x"))[4:]
    assert public(parse(words)) == public(config) and config.optimization.learning_rate == 0.25
