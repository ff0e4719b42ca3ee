"""The model card of a saved classifier: what it is, how it was trained, how well it does."""

import json
from typing import Any

from d_emo.train.classification.plan import TIMM, ClassifierPlan
from d_emo.train.engine import cards
from d_emo.train.engine.cards import Circumstances
from d_emo.train.engine.validation_log import read_validation

# What a reader wants first; run.json has everything.
SHOWN = ("init_from", "model_config", "epochs", "global_batch_size", "learning_rate", "weight_decay", "warmup_epochs",
         "max_grad_norm", "ema_decay", "crop", "crop_interpolation", "auto_augment", "random_erasing", "mixup",
         "cutmix", "label_smoothing", "teacher", "teacher_weight", "mixed_precision", "seed")  # fmt: skip


def classifier_card(plan: ClassifierPlan, circumstances: Circumstances) -> str:
    """A README.md in the Hub's format for the averaged weights of a run at a step."""
    options, names = plan.config.model, list(plan.source.id2label.values())
    of_timm = options.model.startswith(TIMM) and not options.init_from
    model = "EMOv2" if options.init_from else plan.model_name
    start = f", fine-tuned from {cards.base_name(options.init_from)}" if options.init_from else ""
    validation = [row for row in read_validation(plan.output_dir) if row["step"] <= circumstances.step]
    header = cards.card_metadata(plan, [model], "transformers", "image-classification")
    scores = ["No validation image was named, so nothing was scored."]
    if validation and plan.validation is not None:
        header["model-index"] = [_result(circumstances.name, plan.validation.name, validation[-1])]
        scores = [
            f"Averaged weights on {plan.validation.name}, {plan.validation.describe_size()}:",
            "",
            "| step | top-1 | top-5 | loss |",
            "|---|---|---|---|",
            *(
                f"| {row['step']:,.0f} | {row['top1']:.2%} | {row['top5']:.2%} | {row['loss']:.4f} |"
                for row in validation[-5:]
            ),
        ]
    settings = {**plan.config.flat(), "init_from": options.init_from and cards.base_name(options.init_from)}
    lines = [
        *cards.card_head(header, f"{circumstances.name}: {model} on {plan.source.name}"),
        f"Classifies {plan.resolution} x {plan.resolution} images: {model}{start}, trained with d_emo. "
        f"This folder holds the **averaged** weights after {circumstances.step:,} of "
        f"{plan.max_train_steps:,} steps.",
        "",
        *cards.card_picture(circumstances.picture, "Loss and accuracy while training"),
        *cards.usage([
            *([] if of_timm else ["import d_emo  # makes transformers know EMOv2"]),
            "from transformers import pipeline",
            "",
            f'classify = pipeline("image-classification", {json.dumps(circumstances.weights)})',
            'print(classify("photo.jpg"))',
        ]),
        f"Data: {plan.source.name}, {plan.source.describe_size()}, {len(names)} classes ({cards.class_list(names)}), "
        f"{'' if plan.flip else 'not '}mirrored at random.",
        "",
        *scores,
        "",
        *cards.settings_table(settings, SHOWN),
        "",
        *cards.how_it_was_trained(plan, "d_emo.train.train_classifier", circumstances, ("torch", "transformers")),
        *cards.licence(plan, "The data"),
        *([] if of_timm else cards.citation("EMOv2")),
    ]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def _result(name: str, dataset: str, row: dict[str, float]) -> dict[str, Any]:
    """The last scores, as the Hub's evaluation table reads them."""
    return {
        "name": name,
        "results": [{
            "task": {"type": "image-classification"},
            "dataset": {"name": dataset, "type": dataset.split(",")[0]},
            "metrics": [
                {"type": "accuracy", "name": "top-1 accuracy", "value": round(row["top1"], 4)},
                {"type": "accuracy", "name": "top-5 accuracy", "value": round(row["top5"], 4)},
            ],
        }],
    }  # fmt: skip
