"""Time and peak memory of a piece of work."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from quantize.cost.units import gigabytes
from quantize.errors import RoomError

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _ARENA_MAX = -3, -1, -8  # of malloc.h
# bytes of a tensor that is taken from the system alone, and given back; less costs time
_FROM_THE_SYSTEM = 8 << 20


_before = [0]
"""Peak of the process before it was last forgotten."""


@dataclass
class Cost:
    """What a piece of work took."""

    seconds: float = 0.0
    peak_bytes: int | None = None
    """Most memory of the process meanwhile (of the GPU, where the work runs on one);
    None where it cannot be told."""


@contextmanager
def measure(device: torch.device) -> Iterator[Cost]:
    """Fill the yielded Cost when the block ends."""
    cost, started = Cost(), time.monotonic()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        _before[0] = peak_resident() or 0
        with suppress(OSError):  # Linux: forgets the process's peak
            Path("/proc/self/clear_refs").write_text("5")
    yield cost
    cost.seconds = time.monotonic() - started
    cost.peak_bytes = (
        torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")
    )


def peak_of(device: torch.device) -> int | None:
    """Most bytes so far of a GPU's memory, or of the process where that computes;
    None where it cannot be told."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident()


def resident() -> int:
    """Bytes of memory that the process takes now; 0 where it cannot be told."""
    return _status("VmRSS") or 0


def peak_resident() -> int | None:
    """Most bytes of memory that the process took so far; None where it cannot be told."""
    now = _status("VmHWM")
    return None if now is None else max(now, _before[0])


def available(device: torch.device) -> int:
    """Bytes of the memory of the device that nothing takes yet; 0 where it cannot be told."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free) + int(unused)
    free = _bytes_in("/proc/meminfo", "MemAvailable") or 0
    with suppress(OSError, ValueError):  # what a container may take, where there is a limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        taken = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free = min(free, max(0, limit - taken))
    return free


def require_below(limit: int | None, device: torch.device) -> None:
    """RoomError with what would have sufficed where the device's peak
    (`peak_of`) is above the limit."""
    peak = peak_of(device)
    if limit is None or peak is None or peak <= limit:
        return
    option = "--max-vram" if device.type == "cuda" else "--max-ram"
    raise RoomError(
        f"the conversion took {gigabytes(peak)}, more than the limit of {gigabytes(limit)} and "
        f"than was estimated; give {option} {gigabytes(peak + peak // 16)}"
    )


def _status(key: str) -> int | None:
    return _bytes_in("/proc/self/status", key)


def _bytes_in(table: str, key: str) -> int | None:
    """What a table of the kernel's says in kB; None where there is no such table or key."""
    with suppress(OSError, ValueError):
        for line in Path(table).read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return None


def give_back() -> None:
    """Return free memory to the system, where the C library can: it keeps what
    lies between pieces in use."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_little() -> None:
    """Let the C library (glibc) keep less free memory from now on: its own limits rise
    with what a program frees."""
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, _FROM_THE_SYSTEM)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _FROM_THE_SYSTEM)
        # each further one, of up to eight a core, keeps free memory of its own
        libc.mallopt(_ARENA_MAX, 2)
