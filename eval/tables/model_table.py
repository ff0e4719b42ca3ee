"""The table of model sizes, counted.

    python eval/tables/model_table.py                       # the README's table
    python eval/tables/model_table.py --pattern "D-EMOv2-*"

Parameters include the fixed positions and the label table; multiply-adds (MACs) are those of matrix products and
convolutions for one forward pass of one 32 x 32 x 4 latent, 1,000 classes, learned variance.
"""

import argparse
import sys

import torch

from d_emo import create_model, list_models
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


def main(arguments: list[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pattern", default="*-2", help="Shell pattern of model names.")
    names = list_models(parser.parse_args(arguments).pattern)
    if not names:
        sys.exit("model_table: no model matches --pattern; see d_emo.list_models().")
    print("| model | blocks x channels | parameters | GMACs | size from |")
    print("|---|---|---|---|---|")
    for name in names:
        print(table_row(name))


if __name__ == "__main__":
    main(sys.argv[1:])
