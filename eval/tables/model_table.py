"""The table of model sizes, counted.

    python eval/tables/model_table.py                       # that of docs/reference/models.md
    python eval/tables/model_table.py --pattern "LightningDiT-*-1" "JiT-*-16"     # that of docs/baselines.md

Parameters include the fixed positions and the label table; multiply-adds (MACs) are those of matrix products and
convolutions for one forward pass, 1,000 classes, of what a family was published for: one 32 x 32 x 4 latent with
learned variance (D-EMOv2, DiT), one 16 x 16 x 32 latent (LightningDiT), one picture of 256 x 256 pixels (JiT).
"""

import sys

import torch

from d_emo import create_model, list_models
from d_emo.common.command_line import CommandParser
from d_emo.common.commands import command
from d_emo.models.flops import count_macs, count_parameters
from d_emo.models.variants import model_spec


def table_row(name: str) -> str:
    """One line of the Markdown table."""
    _, size, _ = model_spec(name)
    with torch.device("meta"):
        model = create_model(name)
    heads = f"{size.num_layers} x {size.hidden_size}, {size.num_attention_heads} heads"
    source = "paper" if size.published else "ours"
    return f"| {name} | {heads} | {count_parameters(model):,} | {count_macs(model) / 1e9:.3f} | {source} |"


@command("model_table")
def main(arguments: list[str]) -> None:
    """Print the table."""
    parser = CommandParser("model_table", __doc__)
    parser.add_argument(
        "--pattern", nargs="+", default=["D-EMOv2-*-2", "DiT-*-2"], help="Shell patterns of model names."
    )
    options = parser.parse_args(arguments)
    names = []
    for pattern in options.pattern:
        if not (matching := list_models(pattern)):
            raise ValueError(f"--pattern {pattern}: no model matches; see d_emo.list_models().")
        names += matching
    print("| model | blocks x channels | parameters | GMACs | size from |")
    print("|---|---|---|---|---|")
    for name in names:
        print(table_row(name))


if __name__ == "__main__":
    main(sys.argv[1:])
