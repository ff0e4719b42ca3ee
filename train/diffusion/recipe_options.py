"""Options of what may be added to the paper's recipe; all are off by default. docs/recipes.md explains each."""

from dataclasses import dataclass

from d_emo.common.options import below_one, goes_with, option, positive, require, zero_or_more


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """Ingredients that came after DiT and SiT."""

    guide_block: int | None = option(
        None,
        "Internal guidance: train a second output head after so many blocks, which sampling steers away from (arXiv "
        "2512.24176). Default: none.",
    )
    guide_weight: float = option(0.5, "With --guide-block: weight of the second head's loss beside the first's.")
    contrastive: float = option(
        0.0,
        "sit, for velocity and data: push predictions away from other samples' velocities, with this weight, 0.05 in "
        "arXiv 2506.05350. Default: none.",
    )
    dispersive: float = option(
        0.0,
        "Push the samples of a micro batch apart inside of the network, with this weight, 0.25 in the code of arXiv "
        "2506.09027. Default: none.",
    )
    dispersive_block: int = option(3, "With --dispersive: the number of blocks after which they are pushed apart.")
    align: str | None = option(
        None,
        "Align the network's tokens with this vision model's features of the clean image: a folder or Hub id of "
        "transformers, a packaged model, or timm:NAME (arXiv 2410.06940, 2512.10794). With --latents its features "
        "have to lie there, by --align of encode_latents. Default: none.",
    )
    align_block: int = option(4, "With --align: the number of blocks after which tokens are aligned.")
    align_weight: float = option(0.5, "With --align: its weight in the loss.")

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
        positive(self, "guide_block", "guide_weight", "align_block", "align_weight", "dispersive_block", "dense_blocks")
        zero_or_more(self, "dispersive")
        require(self.drop_pause >= 2, "drop_pause", self.drop_pause, "must be 2 or more")
        goes_with(self, "drop_tokens", "drop_pause")
        goes_with(self, "guide_block", "guide_weight")
        below_one(self, "contrastive")
        goes_with(self, "align", "align_block", "align_weight")
        goes_with(self, "dispersive", "dispersive_block")
        require(
            not self.dispersive or self.align is None or self.dispersive_block == self.align_block,
            "dispersive_block",
            self.dispersive_block,
            f"with --align both look after one block; name that of --align-block, {self.align_block}",
        )

    def blocks_looked_after(self) -> dict[str, int]:
        """Of terms that are on, the options that name the block after which they look at tokens."""
        found = {"align_block": self.align is not None, "dispersive_block": self.dispersive > 0}
        return {name: getattr(self, name) for name, on in found.items() if on}

    def check_objective(self, objective: str, prediction: str) -> None:
        """Refuse what has no meaning for an objective and what its network predicts.

        Raises:
            ValueError: something has none.
        """
        require(
            not self.contrastive or (objective == "sit" and prediction in ("velocity", "data")),
            "contrastive",
            self.contrastive,
            f"it compares velocities, of --objective sit with --prediction velocity or data, not {objective}'s "
            f"{'noise' if objective == 'dit' else 'jumps' if objective == 'flow-map' else prediction}",
        )
