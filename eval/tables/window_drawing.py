"""Which tokens a token of the block attends to, as a drawing: the picture of docs/explanation/block.md.

python eval/tables/window_drawing.py > docs/explanation/windows.svg

Nothing is drawn from a formula: a token sees what its result has a gradient of.
"""

import sys
from collections.abc import Iterator

import torch

from d_emo.common.command_line import CommandParser
from d_emo.common.commands import command
from d_emo.models import I2RMB, SpanningWindowAttention

# The grid and the window of D-EMOv2 at 256 x 256 pixels: latents of 32 x 32, patch 2.
SIDE, WINDOW = 16, 8
TOKEN = (5, 9)  # row and column
CELL, GAP, TOP = 14, 36, 62
PAPER, INK, FAINT, LINE = "#ffffff", "#263238", "#eceff1", "#90a4ae"
SEEN, ASKING = "#26a69a", "#ff5722"


def seen_from(module: torch.nn.Module, token: tuple[int, int], side: int = SIDE) -> torch.Tensor:
    """The tokens that one token's result depends on: (side, side), True or False."""
    grid = torch.randn(1, side, side, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grid.requires_grad_()
    module.double().eval()(grid)[0, token[0], token[1]].sum().backward()
    assert grid.grad is not None
    return grid.grad[0].abs().sum(dim=-1) > 0


def panels() -> list[tuple[str, torch.Tensor]]:
    """Each panel's title, and the tokens that `TOKEN` sees there."""
    torch.manual_seed(0)
    near = SpanningWindowAttention(16, 2, window_size=WINDOW, attention_type="neighborhood")
    far = SpanningWindowAttention(16, 2, window_size=WINDOW, attention_type="remote")
    local = I2RMB(16, 2, window_size=WINDOW, attention_type="none")
    whole = I2RMB(16, 2, window_size=WINDOW)
    return [
        ("Neighborhood window", seen_from(near, TOKEN)),
        ("Remote window", seen_from(far, TOKEN)),
        ("Depthwise 5 x 5", seen_from(local, TOKEN)),
        ("The whole block", seen_from(whole, TOKEN)),
    ]


def svg(shown: list[tuple[str, torch.Tensor]]) -> Iterator[str]:
    """The drawing's lines: panels in two columns, so that a narrow screen shows them large enough."""
    side = SIDE * CELL
    width = 2 * side + 3 * GAP
    rows = (len(shown) + 1) // 2
    height = rows * (side + TOP) + GAP // 2
    head = 'xmlns="http://www.w3.org/2000/svg" font-family="sans-serif"'
    yield f'<svg {head} viewBox="0 0 {width} {height}" fill="{INK}">'
    yield f'<rect width="{width}" height="{height}" rx="8" fill="{PAPER}"/>'
    for index, (title, seen) in enumerate(shown):
        left = GAP + (index % 2) * (side + GAP)
        top = TOP + (index // 2) * (side + TOP)
        asking = torch.zeros_like(seen)
        asking[TOKEN] = True
        yield f'<g transform="translate({left} {top})">'
        yield f'<text y="-26" font-size="17" font-weight="bold">{title}</text>'
        yield f'<text y="-8" font-size="13">sees {int(seen.sum())} of {seen.numel()} tokens</text>'
        yield from (cells(which, color) for which, color in ((~seen, FAINT), (seen & ~asking, SEEN), (asking, ASKING)))
        yield f'<rect width="{side}" height="{side}" stroke="{LINE}" fill="none"/></g>'
    yield "</svg>"


def cells(which: torch.Tensor, color: str) -> str:
    """The chosen tokens of a grid as squares."""
    square = f"h{CELL - 2}v{CELL - 2}h{2 - CELL}z"
    places = "".join(f"M{column * CELL + 1} {row * CELL + 1}{square}" for row, column in which.nonzero().tolist())
    return f'<path d="{places}" fill="{color}"/>'


@command("window_drawing")
def main(arguments: list[str]) -> None:
    """Print the drawing."""
    CommandParser("window_drawing", __doc__).parse_args(arguments)
    print("\n".join(svg(panels())))


if __name__ == "__main__":
    main(sys.argv[1:])
