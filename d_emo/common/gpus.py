"""GPUs by name, with what their data sheets say: for plans, and for the share of a peak that a benchmark reaches."""

import re
from dataclasses import dataclass

from d_emo.common.messages import shown

# GPUs of a machine, where a plan does not know better.
PER_MACHINE = 8


@dataclass(frozen=True)
class Gpu:
    """A card.

    Attributes:
        name: as plans are asked for it.
        memory: bytes that PyTorch finds on it.
        bandwidth: of its memory, bytes a second.
        bfloat16, tf32: FLOP/s of dense products with sums in float32.
        link: bytes a second that it sends to another one of its machine.
        network: bytes a second that it sends to another machine: not the card's, but what such machines are usually
            built with.
    """

    name: str
    memory: float
    bandwidth: float
    bfloat16: float
    tf32: float
    link: float
    network: float


_GIB = 2**30
# NVIDIA's data sheets: H100 SXM, H200 SXM, A100 SXM (80 and 40 GB), and the Ada architecture's paper for the GeForce;
# of products half the figure for sparse ones. Links: half the sum of both directions of NVLink or PCIe 4.0. Memory:
# what PyTorch says that such cards have. Networks: one port of 400, 200 or 12.5 Gb/s a card.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H100", 79.2 * _GIB, 3.35e12, 989.4e12, 494.7e12, 450e9, 50e9),
        Gpu("H200", 139.8 * _GIB, 4.8e12, 989.4e12, 494.7e12, 450e9, 50e9),
        Gpu("A100", 79.2 * _GIB, 2.039e12, 312e12, 156e12, 300e9, 25e9),
        Gpu("A100-40GB", 39.4 * _GIB, 1.555e12, 312e12, 156e12, 300e9, 25e9),
        Gpu("RTX4090", 23.5 * _GIB, 1.008e12, 165.2e12, 82.6e12, 32e9, 1.5625e9),
    )
}
# In the full names of cards that are slower than the ones of the table.
_SLOWER = ("PCIe", "NVL", "H100L")


@dataclass(frozen=True)
class Fleet:
    """Equal GPUs, `PER_MACHINE` of them in each machine."""

    count: int
    gpu: Gpu

    @property
    def machines(self) -> int:
        """How many machines they fill."""
        return -(-self.count // PER_MACHINE)

    @property
    def share_of_network(self) -> float:
        """Bytes a second that each GPU can send to the next one of a ring through all of them."""
        return self.gpu.link if self.machines == 1 else self.gpu.network

    def describe(self) -> str:
        """For people."""
        return f"{self.count} x {self.gpu.name}" + (f" in {self.machines} machines" if self.machines > 1 else "")


def parse_fleet(text: str) -> Fleet:
    """What "64xH100" names; "H100" is one.

    Raises:
        ValueError: no count from 1 on, or a card that is not in the table.
    """
    match = re.fullmatch(r"(?:(\d+)\s*[xX*]\s*)?(.*\S)\s*", text.strip())
    count, name = (match[1], match[2]) if match else (None, "")
    gpu = {_plain(known): gpu for known, gpu in GPUS.items()}.get(_plain(name))
    if gpu is None or (count is not None and not 1 <= int(count) <= 10**6):
        raise ValueError(f"{shown(text)} names no GPUs; write a number, x and one of {', '.join(GPUS)}: 64xH100.")
    return Fleet(int(count or 1), gpu)


def _plain(name: str) -> str:
    """A card's name without what people leave out: NVIDIA, GeForce, RTX, spaces, and 80GB, which is the usual A100."""
    name = re.sub(r"[\s_-]|nvidia|geforce|rtx", "", name.casefold())
    return re.sub(r"(sxm\d?)?80gb(hbm\d)?$", "", name) or name


def peak_flops(card: str) -> float | None:
    """The peak of a card in bfloat16, by the full name that its driver gives; None where it is not in the table.

    An A100 has one peak in all its forms; H100s and H200s have lower ones than the table's in some.
    """
    if any(mark in card for mark in _SLOWER) and "A100" not in card:
        return None
    return next((gpu.bfloat16 for name, gpu in GPUS.items() if name in card), None)
