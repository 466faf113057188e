"""Seconds of calls on a CPU or a GPU, measured in turns."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import time
from collections.abc import Callable, Sequence

import torch

Watch = Callable[[], float]
"""Makes some calls once and returns the seconds they took."""


class Compared:
    """A time beside that of what it is to beat."""

    seconds: float
    plain_seconds: float

    @property
    def speedup(self) -> float:
        """How many times faster than what it is compared with."""
        return self.plain_seconds / self.seconds


def watch(
    calls: Sequence[Callable[[], object]], device: torch.device, as_graph: bool = True
) -> Watch:
    """Make all calls once, to warm up, and return what times them together, without gradients.

    On CUDA they are replayed as one graph between two events, or, where they wait for the host (not
    `as_graph`), made anew between two synchronizations.
    """
    if device.type == "cuda" and as_graph:
        return _graph_watch(calls, device)

    @torch.no_grad()
    def seconds() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        for call in calls:
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    seconds()
    return seconds


def take_turns(watches: Sequence[Watch], rounds: int) -> list[list[float]]:
    """Seconds of each watch in each round. One follows the other, so that what else
    the machine does meets all."""
    found = [[seconds() for seconds in watches] for _ in range(rounds)]
    return [list(of_one) for of_one in zip(*found, strict=True)]


@torch.no_grad()
def _graph_watch(calls: Sequence[Callable[[], object]], device: torch.device) -> Watch:
    with torch.cuda.device(device):
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        # compilation and libraries' workspaces must not fall into the graph
        with torch.cuda.stream(side):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
    held = graph, calls  # the graph reads tensors that only the calls keep

    def seconds() -> float:
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            held[0].replay()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3

    return seconds


def device_name(device: torch.device) -> str:
    """What the device is called, for records."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of what computes, for records."""
    found = {"torch": str(torch.__version__)}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["triton"] = importlib.metadata.version("triton")
    return found
