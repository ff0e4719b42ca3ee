"""What a run's options say of the network that it trains."""

from typing import Any

from d_emo.common.options import require
from d_emo.models.variants import model_spec
from d_emo.train.diffusion.config import TrainConfig
from d_emo.train.diffusion.init_from import InitialWeights
from d_emo.train.diffusion.objectives import Objective

# Of a flow map's blocks, how many see the present time: 20 of 28 in decoupled MeanFlow (arXiv 2510.24474).
END_SHARE = (5, 7)


def network_config(
    config: TrainConfig, initial: InitialWeights | None, objective: Objective, shape: tuple[int, int], num_classes: int
) -> dict[str, Any]:
    """Overrides for `create_model`, or for the configuration that the run starts from.

    Args:
        config: the run's options.
        initial: what it starts from.
        objective: of the run.
        shape: channels and side of what the network sees.
        num_classes: of the data.

    Raises:
        ValueError: an option does not go with the network.
    """
    channels, side = shape
    found = {
        "sample_size": side,
        "in_channels": channels,
        "num_classes": num_classes,
        "learn_sigma": objective.learn_sigma,
        "prediction_type": objective.prediction_type,
        "flow_path": objective.flow_path,
        **_flow_map_config(config, initial, num_classes),
    }
    if config.model.patch_bottleneck is not None:
        found["patch_bottleneck"] = config.model.patch_bottleneck
    if config.recipe.guide_block is not None:
        found["guide_block"] = config.recipe.guide_block
        if config.model.lora_rank is not None and initial and initial.transformer.config.guide_block is None:
            raise ValueError(
                f"--guide-block {config.recipe.guide_block}: --lora-rank trains adapters beside frozen weights, so "
                "that the new head would stay as it is; start from a model that has one, or leave --lora-rank out."
            )
    return found


def depth_of(config: TrainConfig, initial: InitialWeights | None) -> int:
    """The number of the network's blocks."""
    if initial is None:
        return model_spec(config.model.model)[1].num_layers
    return int(initial.transformer.config.num_layers)


def patch_of(config: TrainConfig, initial: InitialWeights | None) -> int:
    """The side of the network's patches."""
    if initial is None:
        return model_spec(config.model.model)[2]
    return int(initial.transformer.config.patch_size)


def _flow_map_config(config: TrainConfig, initial: InitialWeights | None, num_classes: int) -> dict[str, Any]:
    """What the network's configuration says of a flow map, also that it is none.

    Raises:
        ValueError: guidance is wanted for a model without classes.
    """
    if config.optimization.objective != "flow-map":
        return {"end_block": None, "distilled_guidance": 1.0}
    options = config.flow_map
    require(
        num_classes > 0 or options.flow_map_guidance == 1,
        "flow_map_guidance",
        options.flow_map_guidance,
        "a model without classes has no guidance; leave it out",
    )
    stored = None if initial is None else initial.transformer.config.get("end_block")
    block = options.end_block or stored or max(1, depth_of(config, initial) * END_SHARE[0] // END_SHARE[1])
    return {"end_block": block, "distilled_guidance": options.flow_map_guidance}
