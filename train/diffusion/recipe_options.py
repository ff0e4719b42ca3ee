"""Options of what may be added to the paper's recipe; all are off by default. docs/recipes.md explains each."""

from dataclasses import dataclass

from d_emo.common.options import goes_with, option, positive


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """Ingredients that came after DiT and SiT."""

    guide_block: int | None = option(
        None,
        "Internal guidance: train a second output head after so many blocks, which sampling steers away from (arXiv "
        "2512.24176). Default: none.",
    )
    guide_weight: float = option(0.5, "With --guide-block: weight of the second head's loss beside the first's.")

    def __post_init__(self):
        positive(self, "guide_block", "guide_weight")
        if self.guide_weight != RecipeOptions.guide_weight:
            goes_with(self, "guide_block", "guide_weight")
