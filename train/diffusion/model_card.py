"""The model card that goes with every saved pipeline: what it is, how it was trained, which weights it holds."""

import json
from dataclasses import asdict

from d_emo.eval.fid.report import load_entries
from d_emo.eval.fid.scoring import summary
from d_emo.models.variants import FAMILIES, MODELS
from d_emo.train.diffusion.config import WSD
from d_emo.train.diffusion.plan import Plan
from d_emo.train.engine import cards
from d_emo.train.engine.cards import Circumstances

# What a reader wants first; run.json has everything.
SHOWN = (
    "objective",
    "init_from",
    "lora_rank",
    "global_batch_size",
    "optimizer",
    "learning_rate",
    "lr_scheduler",
    "lr_cooldown",
    "lr_cooldown_share",
    "weight_decay",
    "no_weight_decay",
    "class_dropout_prob",
    "ema_decay",
    "ema_warmup",
    "mixed_precision",
    "min_snr_gamma",
    "flow_path",
    "prediction",
    "loss_weighting",
    "time_sampling",
    "time_shift",
    "patch_bottleneck",
    "guide_block",
    "guide_weight",
    "contrastive",
    "dispersive",
    "dispersive_block",
    "align",
    "align_block",
    "align_weight",
    "dense_blocks",
    "drop_tokens",
    "drop_pause",
    "end_block",
    "flow_map_share",
    "flow_map_split",
    "flow_map_guidance",
    "seed",
)
# The papers of each family, the network's own first.
WORKS = {"D-EMOv2": ("EMOv2", "DiT"), "DiT": ("DiT",), "LightningDiT": ("LightningDiT", "DiT"), "JiT": ("JiT", "DiT")}
# Those of each objective.
OBJECTIVES: dict[str, tuple[str, ...]] = {"dit": (), "sit": ("SiT",), "flow-map": ("SiT", "DMF")}


def model_card(plan: Plan, circumstances: Circumstances) -> str:
    """A README.md in the Hub's format for the averaged weights of a run at a step."""
    options, names = plan.config, list(plan.source.id2label.values())
    model, objective = architecture(plan), options.optimization.objective
    tags = ["class-conditional"] if names else []
    header = cards.card_metadata(plan, [*tags, model, objective], "diffusers", "unconditional-image-generation")
    label, space = (
        json.dumps(names[0], ensure_ascii=False) if names else "",
        "pixels" if plan.space is None else f"latents ({plan.space.describe()})",
    )
    start = f", fine-tuned from {cards.base_name(options.model.init_from)}" if options.model.init_from else ""
    kind = "Class-conditional" if names else "Unconditional"
    settings = {
        **options.flat(),
        "init_from": options.model.init_from and cards.base_name(options.model.init_from),
        "align": options.recipe.align and cards.base_name(options.recipe.align),
        "time_shift": plan.objective.time_shift,
        **(dict.fromkeys(asdict(options.flow_map)) if objective != "flow-map" else {}),
        "end_block": plan.model_config["end_block"],
        "contrastive": options.recipe.contrastive or None,
        **({} if options.recipe.dispersive else {"dispersive": None, "dispersive_block": None}),
        **({"align_block": None, "align_weight": None} if options.recipe.align is None else {}),
        **{name: plan.model_config.get(name) for name in ("guide_block", "dense_blocks")},
        **({"guide_weight": None} if plan.model_config.get("guide_block") is None else {}),
        **({} if options.recipe.drop_tokens else {"drop_tokens": None, "drop_pause": None}),
        **({} if options.optimization.lr_scheduler == WSD else {"lr_cooldown": None, "lr_cooldown_share": None}),
    }
    call = [label] * bool(label) + ["internal_guidance=1.4"] * (plan.model_config.get("guide_block") is not None)
    works = (*WORKS[next(family for family in FAMILIES if model.startswith(family))], *OBJECTIVES[objective])
    lines = [
        *cards.card_head(header, f"{circumstances.name}: {model} on {plan.source.name}"),
        f"{kind} generation of {plan.resolution} x {plan.resolution} images: {model} on {space}{start}, trained with "
        "d_emo.",
        f"This folder holds the **averaged** weights and BatchNorm statistics after {circumstances.step:,} of "
        f"{plan.max_train_steps:,} steps.",
        "",
        *cards.card_picture(circumstances.picture, "Samples, one class a row" if names else "Samples"),
        *cards.usage([
            "from d_emo import DEMOPipeline",
            "",
            f'pipe = DEMOPipeline.from_pretrained({json.dumps(circumstances.weights)})',
            f"image = pipe({', '.join(call)}).images[0]",
            'image.save("image.png")',
        ]),
        f"Data: {plan.source.name}, {plan.source.describe_size()}, {len(names) or 'no'} classes"
        + (f" ({cards.class_list(names)})" if names else "")
        + f", {'' if plan.flip else 'not '}mirrored at random.",
        "",
        *cards.settings_table(settings, SHOWN),
        "",
        *_scores(plan, circumstances.step),
        "",
        *cards.how_it_was_trained(plan, "d_emo.train.train_dit", circumstances, ("torch", "diffusers")),
        *cards.licence(plan, "The data"),
        *cards.citation(*works),
    ]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def architecture(plan: Plan) -> str:
    """The network's name among this package's, also where it came with --init-from; else its family's."""
    if plan.initial is None:
        return plan.model_name
    network = plan.initial.transformer
    own = network.config
    for name, (model_class, size, patch) in MODELS.items():
        sizes = (size.num_layers, size.hidden_size, size.num_attention_heads, patch)
        if type(network) is model_class and sizes == (
            own.num_layers, own.hidden_size, own.num_attention_heads, own.patch_size
        ):  # fmt: skip
            return name
    return next(family for family, model_class in FAMILIES.items() if isinstance(network, model_class))


def _scores(plan: Plan, step: int) -> list[str]:
    """What was scored on the way, up to this step."""
    entries = load_entries(plan.output_dir / "fid", plan.model_name)
    lines = [f"| {entry.step:,} | {summary(entry.scores)} |" for entry in entries if (entry.step or 0) <= step]
    if not lines:
        return ["No FID was computed while it trained."]
    return ["Scores while training (quick protocol, not comparable with published figures):", "", "| step | scores |",
            "|---|---|", *lines]  # fmt: skip
