"""Options of flow maps, which draw in a few steps; docs/recipes.md explains them."""

from dataclasses import dataclass

from d_emo.common.options import option, positive, require, require_each


@dataclass(frozen=True, kw_only=True)
class FlowMapOptions:
    """With --objective flow-map: sampling in a few steps."""

    end_block: int | None = option(
        None,
        "flow-map: number of blocks that see the present time; those after it see the time to jump to. Default: that "
        "of --init-from, else 5 of 7.",
    )
    flow_map_share: float = option(0.5, "flow-map: share of samples that go on training the flow itself.")
    flow_map_split: float = option(
        0.5, "flow-map: where a jump is cut in two, whose sum it learns, as the first one's share of the way."
    )
    flow_map_guidance: float = option(
        1.0, "flow-map: guidance that is trained into the weights, so that sampling needs none. 1.0 is none."
    )

    def __post_init__(self):
        positive(self, "end_block")
        require_each(
            self, ("flow_map_share", "flow_map_split"), lambda value: 0 < value < 1, "must be above 0 and below 1"
        )
        require(self.flow_map_guidance >= 1, "flow_map_guidance", self.flow_map_guidance, "must be 1 (none) or more")
