"""Work as one CUDA graph: launched once, whatever it is made of."""

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def captured(work: Callable[[], T], warm_ups: int = 1) -> tuple[torch.cuda.CUDAGraph, T]:
    """The graph of some work, and what it answered, whose tensors every replay fills anew.

    Args:
        work: waits for nothing and keeps its tensors where they are. It is done `warm_ups` times beforehand, beside the
            usual stream, so that libraries and compilers have made what they make at a first call.
        warm_ups: from 1 on.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_ups):
            work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = work()
    return graph, answer
