"""The model card of a saved video classifier: what it is, how it was trained, how well it does."""

import json

from d_emo.train.engine import cards
from d_emo.train.engine.cards import Circumstances
from d_emo.train.engine.score_cards import ACCURACY, model_index, validation_lines
from d_emo.train.video.plan import VideoPlan

# What a reader wants first; run.json has everything.
SHOWN = ("init_from", "model_config", "frames", "resolution", "epochs", "global_batch_size", "learning_rate",
         "weight_decay", "no_weight_decay", "max_grad_norm", "ema_decay", "crop", "crop_scale_min", "rand_augment",
         "rand_augment_magnitude", "rand_augment_probability", "label_smoothing", "mixed_precision",
         "seed")  # fmt: skip


def video_card(plan: VideoPlan, circumstances: Circumstances) -> str:
    """A README.md in the Hub's format for the averaged weights of a run at a step."""
    options, names, start = plan.config.model, list(plan.source.id2label.values()), plan.start
    model = "V-EMOv2" if options.init_from else plan.model_name
    base = f", fine-tuned from {cards.base_name(options.init_from)}" if options.init_from else ""
    task = "video-classification"
    header = {
        **cards.card_metadata(plan, [model], "transformers", task),
        **model_index(plan, circumstances, task, ACCURACY),
    }
    how = ", one clip and the middle crop of each"
    settings = {
        **plan.config.flat(),
        "init_from": options.init_from and cards.base_name(options.init_from),
        "frames": start.frames,
        "resolution": start.resolution,
    }
    side = start.resolution
    lines = [
        *cards.card_head(header, f"{circumstances.name}: {model} on {plan.source.name}"),
        f"Classifies videos by {start.frames} frames of {side} x {side}: {model}{base}, trained with d_emo. This "
        f"folder holds the **averaged** weights after {circumstances.step:,} of {plan.max_train_steps:,} steps.",
        "",
        *cards.card_picture(circumstances.picture, "Loss and accuracy while training"),
        *cards.usage([
            "import d_emo  # makes transformers know V-EMOv2; videos need PyAV: pip install 'd-emo[video]'",
            "from transformers import pipeline",
            "",
            f'classify = pipeline("video-classification", {json.dumps(circumstances.weights)})',
            'print(classify("clip.mp4"))',
        ]),
        f"Data: {plan.source.name}, {plan.source.describe_size()}, {len(names)} classes ({cards.class_list(names)}), "
        f"{'' if plan.config.data.random_flip else 'not '}mirrored at random.",
        "",
        *validation_lines(plan, circumstances, ACCURACY, how, "video"),
        "",
        *cards.settings_table(settings, SHOWN),
        "",
        *cards.how_it_was_trained(plan, "d_emo.train.train_video_classifier", circumstances, ("torch", "transformers")),
        *cards.licence(plan, "The data"),
        *cards.citation("EMOv2"),
    ]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"
