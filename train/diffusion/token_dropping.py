"""Training on one of each 2 x 2 tokens in the middle blocks: which networks, which steps, which tokens."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from d_emo.common.options import require
from d_emo.models.kept_tokens import GROUP
from d_emo.models.variants import model_spec
from d_emo.train.data import stream
from d_emo.train.diffusion.config import TrainConfig
from d_emo.train.diffusion.init_from import InitialWeights
from d_emo.train.diffusion.network_config import depth_of, patch_of


def fusion_config(config: TrainConfig, initial: InitialWeights | None, side: int) -> dict[str, Any]:
    """What the network's configuration says of blocks that see all tokens, where the run is about them.

    Raises:
        ValueError: tokens are to be dropped of a network without a fusion, or of an odd grid.
    """
    recipe = config.recipe
    kind = type(initial.transformer) if initial else model_spec(config.model.model)[0]
    stored = initial.transformer.config.get("dense_blocks") if initial else None
    patch, wanted = patch_of(config, initial), recipe.dense_blocks
    require(
        wanted is None or "dense_blocks" in inspect.signature(kind).parameters,
        "dense_blocks",
        wanted,
        "D-EMOv2 and DiT can fuse tokens, other families not",
    )
    if recipe.drop_tokens:
        require(
            (wanted or stored) is not None, "drop_tokens", True, "it needs a network with --dense-blocks, such as 2"
        )
        require(config.optimization.objective != "flow-map", "drop_tokens", True, "flow maps are trained on all tokens")
        require(side // patch % 2 == 0, "drop_tokens", True, f"{side // patch} x {side // patch} tokens are no 2 x 2")
        dense, layers = int(wanted or stored or 0), depth_of(config, initial)
        for name, block in recipe.blocks_looked_after().items():
            rule = f"blocks {dense + 1} to {layers - dense} see a part of the tokens only; use 1 to {dense}"
            require(not dense < block <= layers - dense, name, block, rule)
    return {} if wanted is None else {"dense_blocks": wanted}


def draw_kept(
    config: TrainConfig, initial: InitialWeights | None, side: int, positions: Sequence[int]
) -> dict[str, torch.Tensor]:
    """ "kept", (B, h / 2, w / 2) whole numbers from 0 to 3; empty for a step that has all tokens.

    Args:
        config: of the run.
        initial: what it starts from, if not from fresh weights.
        side: of the image or latent.
        positions: of a micro batch, all of one step.
    """
    recipe, step = config.recipe, positions[0] // config.run.global_batch_size
    if not recipe.drop_tokens or step % recipe.drop_pause == 0:
        return {}
    half = side // patch_of(config, initial) // 2
    return {"kept": stream.choices(config.run.seed, "kept", positions, (half, half), GROUP)}
