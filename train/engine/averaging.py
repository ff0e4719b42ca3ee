"""The exponential moving average of a run's weights and buffers, and the plain model that it is published as.

Under FSDP2 model and average are sharded alike, each process averaging its own shards; with LoRA both carry adapters.
For sampling and saving, the average is then written into a plain model of the same network; otherwise it is that model.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from d_emo.common import averaging, power_averages
from d_emo.train.engine.plan import OptimizationOptions
from d_emo.train.engine.sharding import shared_out, whole


class WeightAverage(averaging.WeightAverage):
    """The average of a run, whole or sharded.

    Args:
        model: the model, before it is sharded.
        options: decay and its warm-up, as any trainer's.
    """

    def __init__(self, model: torch.nn.Module, options: OptimizationOptions):
        super().__init__(model, options.ema_decay, options.ema_warmup)
        leave_out(self.module)

    @torch.no_grad()
    def update_parameters(self, model: torch.nn.Module, finite: torch.Tensor | None = None) -> None:
        """Add the model's values of this step."""
        self.move(_local_tensors(self.module), _local_tensors(model), finite)

    def shard_like(self, model: torch.nn.Module) -> None:
        """Shard the average over the processes as FSDP2 sharded the model; nothing happens to a whole one."""
        if not isinstance(model, FSDPModule):
            return
        mesh = next(p.device_mesh for p in model.parameters() if isinstance(p, DTensor))
        average: Any = self.module
        for block in average.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(average, mesh=mesh)

    @torch.no_grad()
    def ask(self, *inputs: Any, **options: Any) -> Any:
        """What the averaged model answers; every process must call this."""
        answer = self.module(*inputs, **options)
        if isinstance(self.module, FSDPModule):
            self.module.reshard()  # the root stays whole after a forward pass, and what is averaged are shards
        return answer

    def whole_state(self) -> dict[str, torch.Tensor]:
        """The module's state with every tensor whole; every process must call this."""
        return {name: whole(tensor) for name, tensor in self.module.state_dict().items()}

    @torch.no_grad()
    def load_whole_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over whole tensors, every one of them or, with adapters, those that are trained."""
        own = self.module.state_dict()
        for name, value in state.items():
            own[name].copy_(shared_out(value, own[name]))

    def write_into(self, plain: torch.nn.Module) -> None:
        """Put the average into a plain model: shards gathered, adapters merged. Every process must call this."""
        if plain is self.module:
            return
        if getattr(self.module, "peft_config", None):
            merged: Any = copy.deepcopy(self.module)
            merged.fuse_lora()
            merged.unload_lora()
            state = merged.state_dict()
        else:
            state = self.whole_state()
        plain.load_state_dict(state, strict=True)


class PowerAverage(WeightAverage):
    """An average of a run by a power of the step; see `power_averages`.

    Args:
        model: the model, before it is sharded.
        length: relative length.
    """

    def __init__(self, model: torch.nn.Module, length: float):
        averaging.WeightAverage.__init__(self, model, decay=0.0, warmup=False)
        leave_out(self.module)
        self.length, self.gamma = length, power_averages.exponent(length)

    def decay_at(self, step: int) -> float:
        """See `averaging.WeightAverage.decay_at`."""
        return power_averages.decay(step, self.gamma)


def leave_out(module: torch.nn.Module) -> None:
    """Take out of a module those parts that serve its training only (`training_only`), which are not averaged."""
    for name, part in list(module.named_modules()):
        if getattr(part, "training_only", False):
            parent, _, own = name.rpartition(".")
            delattr(module.get_submodule(parent), own)


def _local_tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers of what is averaged, of sharded ones this process's shard."""
    parts = [part for part in module.modules() if getattr(part, "training_only", False)]
    left = {id(tensor) for part in parts for tensor in (*part.parameters(), *part.buffers())}
    tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if id(tensor) not in left]
    return [t.to_local() if isinstance(t, DTensor) else t.detach() for t in tensors]
