"""GPUs by name, with what their data sheets say: for plans, and for the share of a peak that a benchmark reaches."""

import re
from dataclasses import dataclass

from d_emo.common.messages import shown

# GPUs of a machine, where a plan does not know better.
PER_MACHINE = 8
# GPUs of a plan.
MOST = 10**6


@dataclass(frozen=True)
class Gpu:
    """A card.

    Attributes:
        name: as plans are asked for it.
        memory: bytes that PyTorch finds on it.
        bandwidth: of its memory, bytes a second.
        bfloat16, tf32: FLOP/s of dense products with sums in float32.
        link: bytes a second that it sends to another one of its machine.
        network: bytes a second of a port to another machine; such machines are usually built with one port a card.
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
    def ring(self) -> float:
        """Bytes a second that rings through all GPUs move from each to the next.

        Rings leave a machine by all of its ports, one each, so that together they go as fast as the ports of the
        machine with the fewest, if links are not slower. (Measured elsewhere with NVIDIA's nccl-tests: 96 GB/s on
        machines with four ports of 25 GB/s, its issue 119.)
        """
        if self.machines == 1:
            return self.gpu.link
        fewest = self.count % PER_MACHINE or PER_MACHINE
        return min(self.gpu.link, fewest * self.gpu.network)

    def describe(self) -> str:
        """For people."""
        return f"{self.count} x {self.gpu.name}" + (f" in {self.machines} machines" if self.machines > 1 else "")


def parse_fleet(text: str) -> Fleet:
    """What "64xH100" names; "H100" is one.

    Raises:
        ValueError: no count from 1 to a million, or a card that is not in the table.
    """
    match = re.fullmatch(r"(?:(\d{1,7})\s*[xX*]\s*)?(.*\S)\s*", text.strip())
    count, gpu = (int(match[1] or 1), find_gpu(match[2])) if match else (1, None)
    if gpu is None or not 1 <= count <= MOST:
        known = ", ".join(GPUS)
        raise ValueError(f"{shown(text)} names no GPUs; write a number up to {MOST:,}, x and one of {known}: 64xH100.")
    return Fleet(count, gpu)


def find_gpu(name: str) -> Gpu | None:
    """The card of a name, as people or drivers write it; None for others, slower forms of the table's among them."""
    return _BY_PLAIN_NAME.get(_plain(name))


def peak_flops(card: str) -> float | None:
    """The peak of a card in bfloat16, by the full name that its driver gives; None where it is not known.

    An A100 has one peak in all its forms.
    """
    gpu = GPUS["A100"] if re.search(r"\bA100\b", card) else find_gpu(card)
    return None if gpu is None else gpu.bfloat16


def _plain(name: str) -> str:
    """A card's name without what people leave out: NVIDIA, GeForce, RTX, SXM, spaces, and 80GB, the usual A100's."""
    joined = re.sub(r"[\s_-]|nvidia|geforce|rtx|sxm\d?", "", name.casefold())
    return re.sub(r"80gb(hbm\d)?$", "", joined)


_BY_PLAIN_NAME = {_plain(name): gpu for name, gpu in GPUS.items()}
