"""The trainer with FSDP2 on CPUs, for tests: Accelerate turns FSDP on for accelerators only, PyTorch's own takes CPUs.

Run as a script under torchrun; its arguments are the trainer's.
"""

import os
import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

plain_init = AcceleratorState.__init__


def sharding_init(self, *args, **kwargs):
    """Accelerate's state, then what it does where it turns FSDP on."""
    plain_init(self, *args, **kwargs)
    plugin = kwargs.get("fsdp_plugin")
    if plugin is not None:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = plugin


if __name__ == "__main__":
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
                      FSDP_STATE_DICT_TYPE="SHARDED_STATE_DICT", FSDP_RESHARD_AFTER_FORWARD="true")  # fmt: skip
    AcceleratorState.__init__ = sharding_init
    from d_emo.train.train_dit import main

    main(sys.argv[1:])
