"""The exponential moving average of a model's weights and buffers; the trainers' own is built on it."""

from collections.abc import Callable, Sequence

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from d_emo.common.ranges import Real

DECAY = Real(0, 1, "0.9999 is usual, 0.999 for short runs", below=True)


class WeightAverage(AveragedModel):
    """Averages parameters and buffers, starting at the model's own values; in eval mode, without gradients.

    `module` is the averaged model: sample from it, save it. `state_dict` and `load_state_dict` continue a run. Buffers
    count: with averaged weights and unaveraged BatchNorm statistics a D-EMOv2 draws noise.

    Args:
        model: what is trained, in float32.
        decay: share of the average that stays at an update, in [0, 1). After n updates a share of decay^n of the first
            weights is left, unless there is a warm-up.
        warmup: let the decay grow as (1 + n) / (10 + n) up to `decay`, for runs that are shorter than 1 / (1 - decay)
            times a few.

    Raises:
        ValueError: no model, a decay out of range, or half-precision weights, in which small changes are rounded away.
    """

    def __init__(self, model: torch.nn.Module, decay: float = 0.9999, warmup: bool = True):
        if not isinstance(model, torch.nn.Module):
            raise ValueError(
                f"model is a {type(model).__name__}; pass the model itself, not its parameters: buffers are "
                "averaged, too."
            )
        DECAY.check(decay, "decay")
        half = sorted({str(p.dtype) for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)})
        if half:
            raise ValueError(
                f"the model's weights are {', '.join(half)}, where an average would not move; keep them in float32 and "
                "train under torch.autocast."
            )
        super().__init__(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        self.decay, self.warmup = decay, warmup
        # Marks the copy as the first term; otherwise the first update would copy instead of averaging.
        self.n_averaged.fill_(1)
        self.requires_grad_(False).eval()

    def update(self, model: torch.nn.Module) -> None:
        """Add the model's values of now; call it after each optimizer step.

        Raises:
            ValueError: it is not the model whose average this is.
        """
        if not isinstance(model, torch.nn.Module):
            raise ValueError(f"model is a {type(model).__name__}; pass the model itself, as at the start.")
        own, given = ([tensor.shape for tensor in _tensors(module)] for module in (self.module, model))
        if own != given:
            raise ValueError("model is not of the kind whose average this is: its tensors are others.")
        self.update_parameters(model)

    @torch.no_grad()
    def update_parameters(self, model: torch.nn.Module, finite: torch.Tensor | None = None) -> None:
        """Add the model's values of now; nothing is read from the device.

        Args:
            model: the model.
            finite: a truth value on the device; where it is false, the average stays as it is. None for true.
        """
        self.move(_tensors(self.module), _tensors(model), finite)

    def move(
        self, averages: Sequence[torch.Tensor], values: Sequence[torch.Tensor], finite: torch.Tensor | None
    ) -> None:
        """Move averages towards values, in place, and count that."""
        decay = self.decay_at(int(self.n_averaged))
        for floating in (True, False):  # what runs on many tensors at once takes one kind of them
            pairs = [(a, v) for a, v in zip(averages, values, strict=True) if a.is_floating_point() == floating]
            if not pairs:
                continue
            olds, news = ([tensor.detach() for tensor in part] for part in zip(*pairs, strict=True))
            if finite is None:
                get_ema_multi_avg_fn(decay)(olds, news, self.n_averaged)
            elif floating:
                steps = torch._foreach_sub(news, olds)
                torch._foreach_mul_(steps, finite * (1 - decay))
                torch._foreach_add_(olds, steps)
            else:
                old, new = (torch.cat([tensor.flatten() for tensor in part]) for part in (olds, news))
                moved = torch.where(finite, old * decay + new * (1 - decay), old)  # one launch for all of them
                for tensor, piece in zip(olds, moved.split([tensor.numel() for tensor in olds]), strict=True):
                    tensor.copy_(piece.view_as(tensor))
        self.n_averaged += 1

    def decay_at(self, step: int) -> float:
        """Share of the average that stays at a step, from 1 on."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> "WeightAverage":
        """PyTorch's, but that the number of updates stays on the processor, where it is asked for at every one."""
        moved = super()._apply(fn, recurse)
        moved.n_averaged = moved.n_averaged.cpu()
        return moved


def _tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]
