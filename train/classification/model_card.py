"""The model card of a saved classifier: what it is, how it was trained, how well it does."""

import json

from d_emo.train.classification.plan import TIMM, ClassifierPlan
from d_emo.train.engine import cards
from d_emo.train.engine.cards import Circumstances
from d_emo.train.engine.score_cards import ACCURACY, model_index, validation_lines

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
    task = "image-classification"
    header = {
        **cards.card_metadata(plan, [model], "transformers", task),
        **model_index(plan, circumstances, task, ACCURACY),
    }
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
        *validation_lines(plan, circumstances, ACCURACY),
        "",
        *cards.settings_table(settings, SHOWN),
        "",
        *cards.how_it_was_trained(plan, "d_emo.train.train_classifier", circumstances, ("torch", "transformers")),
        *cards.licence(plan, "The data"),
        *([] if of_timm else cards.citation("EMOv2")),
    ]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"
