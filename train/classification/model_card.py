"""The model card of a saved classifier: what it is, how it was trained, how well it does."""

from d_emo.train.classification.plan import ClassifierPlan
from d_emo.train.classification.validation_log import read_validation
from d_emo.train.engine.cards import card_head, class_list, settings_table

# What a reader wants first; run.json has everything.
SHOWN = ("init_from", "model_config", "epochs", "global_batch_size", "learning_rate", "weight_decay", "warmup_epochs",
         "max_grad_norm", "ema_decay", "crop", "auto_augment", "random_erasing", "mixup", "cutmix", "label_smoothing",
         "teacher", "teacher_weight", "mixed_precision", "seed")  # fmt: skip


def classifier_card(plan: ClassifierPlan, step: int) -> str:
    """A README.md in the Hub's format for the averaged weights of a run at a step."""
    header = {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": ["d_emo", plan.model_name],
    }
    names = list(plan.source.id2label.values())
    validation = [row for row in read_validation(plan.output_dir) if row["step"] <= step]
    scores = ["No validation image was named, so nothing was scored."]
    if validation and plan.validation is not None:
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
    imports = (
        ["import d_emo  # makes transformers know EMOv2"] if not plan.config.model.model.startswith("timm:") else []
    )
    lines = [
        *card_head(header, f"{plan.model_name} on {plan.source.name}"),
        f"Classifies {plan.resolution} x {plan.resolution} images, trained with d_emo. This folder holds the "
        f"**averaged** weights after {step:,} of {plan.max_train_steps:,} steps.",
        "",
        "```python",
        *imports,
        "from transformers import pipeline",
        "",
        'pipeline("image-classification", "FOLDER_OR_HUB_ID")("photo.jpg")',
        "```",
        "",
        f"Data: {plan.source.name}, {plan.source.describe_size()}, {len(names)} classes ({class_list(names)}), "
        f"{'' if plan.flip else 'not '}mirrored at random.",
        "",
        *scores,
        "",
        *settings_table(plan.config.flat(), SHOWN),
    ]
    return "\n".join(lines).rstrip() + "\n"
