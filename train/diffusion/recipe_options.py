"""Options of what may be added to the paper's recipe; all are off by default. docs/recipes.md explains each."""

from dataclasses import dataclass

from d_emo.common.options import goes_with, option, positive, require


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """Ingredients that came after DiT and SiT."""

    guide_block: int | None = option(
        None,
        "Internal guidance: train a second output head after so many blocks, which sampling steers away from (arXiv "
        "2512.24176). Default: none.",
    )
    guide_weight: float = option(0.5, "With --guide-block: weight of the second head's loss beside the first's.")

    dense_blocks: int | None = option(
        None,
        "Fuse the tokens after so many first blocks with those before so many last ones, which --drop-tokens needs "
        "(arXiv 2510.21986). Default: none, or those of --init-from.",
    )
    drop_tokens: bool = option(
        False, "Train the blocks between on one of each 2 x 2 tokens; go on with --init-from without it."
    )
    drop_pause: int = option(
        8, "With --drop-tokens: the first step of so many has all tokens, for BatchNorm's statistics."
    )

    def __post_init__(self):
        positive(self, "guide_block", "guide_weight", "dense_blocks")
        require(self.drop_pause >= 2, "drop_pause", self.drop_pause, "must be 2 or more")
        if self.drop_pause != RecipeOptions.drop_pause:
            goes_with(self, "drop_tokens", "drop_pause")
        if self.guide_weight != RecipeOptions.guide_weight:
            goes_with(self, "guide_block", "guide_weight")
