"""Packaged models that classify: trained by the classification trainer, scored on the digits that it held out."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor

from d_emo import EMOv2ForImageClassification
from d_emo.eval import evaluate_classifier
from d_emo.eval.classification import command as evaluation
from d_emo.images.digits import digits_source
from d_emo.images.source import held_out
from d_emo.train.classification import trainer
from d_emo.train.classification.config import parse_classifier_config
from d_emo.train.packing.card import score_table

MARK = "config.json"
USAGE = (
    "import d_emo",
    "from transformers import pipeline",
    "",
    'classify = pipeline("image-classification", str(d_emo.packaged("{name}")))',
    'print(classify("three.png"))',
)


@dataclass(frozen=True)
class Reader:
    """A classifier with what prepares its pictures, as the trainer saved them; alone, a model would get a usual one."""

    model: EMOv2ForImageClassification
    processor: Any

    def save_pretrained(self, folder: Path) -> None:
        """Write both into a folder."""
        self.processor.save_pretrained(folder)
        self.model.save_pretrained(folder)


def load(folder: str) -> Reader:
    """A folder's classifier in float32."""
    model = EMOv2ForImageClassification.from_pretrained(folder).eval()
    return Reader(model, AutoImageProcessor.from_pretrained(folder))


def train(arguments: list[str]) -> None:
    """The trainer, with the arguments of its command."""
    trainer.run(parse_classifier_config(arguments, ""))


def measure(run: Path, packed: Path, shown_as: str) -> list[str]:
    """Scores of the model in float16 beside the one that it was made of, as lines of a card.

    Args:
        run: folder with the model in float32; what is written besides goes into its `evaluation`.
        packed: folder in float16, which gets a picture.
        shown_as: what commands call the latter.
    """
    scores = {}
    for folder, output in {run: run / "evaluation" / "float32", packed: run / "evaluation" / "float16"}.items():
        evaluation.run(evaluate_classifier.parse(["--model", str(folder), "--output-dir", str(output)]))
        scores[folder] = json.loads((output / "report.json").read_text(encoding="utf-8"))
    shutil.copy(run / "evaluation" / "float16" / "confusion.png", packed)
    difference = (_probabilities(run) - _probabilities(packed)).abs().max().item()
    rows = {
        name: [f"{scores[folder][key]:{form}}" for folder in (packed, run)]
        for name, key, form in (("top-1", "top1", ".2%"), ("top-5", "top5", ".2%"), ("cross-entropy", "loss", ".4f"))
    }
    return [
        f"The {scores[packed]['images']} digits that were held out from training:",
        "",
        "```bash",
        f"python -m d_emo.eval.evaluate_classifier --model {shown_as} --output-dir evaluation",
        "```",
        "",
        *score_table(rows),
        "",
        f"Standard error of the top-1: {scores[packed]['top1_standard_error']:.2%}. On these digits no probability of "
        f"any class differs by more than {difference:.4f} between the two.",
        "",
        "![What is taken for what](confusion.png)",
    ]


@torch.no_grad()
def _probabilities(folder: Path) -> torch.Tensor:
    """(N, K) of the digits held out."""
    source = held_out(digits_source())[1]
    reader = load(str(folder))
    pictures = [source.read(index).convert("RGB") for index in range(source.size)]
    return reader.model(**reader.processor(pictures, return_tensors="pt")).logits.softmax(dim=1)
