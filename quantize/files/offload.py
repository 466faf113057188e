"""Where tensors wait that nothing is being computed with: hidden states in a file,
weights in files or on the host.

Files have no name: they are gone with the process, however it ends.
"""

from __future__ import annotations

import copy
import ctypes
import mmap
import os
import tempfile
from collections.abc import Iterable, MutableSequence
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from quantize.files.disk import report_errors

Place = Literal["device", "host", "disk"]
"""Where hidden states are kept between two blocks; on a CPU, `device` and `host` are the same."""

_HOME = "_pq_home"
# weights of a matrix that is worth being put away: smaller ones would cost time and spare little
_LEAST = 1 << 16
_AT_ONCE = 1 << 30  # bytes of one write; Linux takes no more than 2 GiB


class Spilled(MutableSequence[Tensor]):
    """Hidden states in a file; each is mapped into memory when it is asked for,
    and for as long as it is held.

    A batch that takes the place of another must not be larger.
    OutputError where the disk is full.
    """

    def __init__(self, folder: Path, batches: Iterable[Tensor]) -> None:
        self.folder = folder
        with report_errors(folder):
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - lives as long as this
        self._slots: list[tuple[int, int]] = []  # where, and how many bytes
        self._shapes: list[tuple[torch.Size, torch.dtype]] = []
        self._end = 0
        for batch in batches:
            self.append(batch)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> MutableSequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | MutableSequence[Tensor]:
        """The batch in host memory; a list for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        shape, dtype = self._shapes[index]
        if not shape.numel():
            return torch.empty(shape, dtype=dtype)
        size = shape.numel() * dtype.itemsize
        view = mmap.mmap(
            self._file.fileno(), size, offset=self._slots[index][0], access=mmap.ACCESS_COPY
        )
        return torch.frombuffer(view, dtype=dtype).view(shape)

    def __setitem__(self, index: Any, value: Any) -> None:
        plain = value.detach().cpu().contiguous()
        data = memoryview(plain.flatten().view(torch.uint8).numpy())
        at, room = self._slots[index]
        if len(data) > room:
            raise ValueError(f"a batch of {len(data)} bytes, there is room for {room}")
        with report_errors(self.folder):
            while data:
                written = os.pwrite(self._file.fileno(), data[:_AT_ONCE], at)
                data, at = data[written:], at + written
        self._shapes[index] = (plain.shape, plain.dtype)

    def __delitem__(self, index: Any) -> None:
        del self._slots[index], self._shapes[index]

    def __len__(self) -> int:
        return len(self._slots)

    def insert(self, index: int, value: Tensor) -> None:
        """Add a batch, with room for what it has now."""
        grain = mmap.ALLOCATIONGRANULARITY  # mappings begin at multiples of it
        room = -(-value.numel() * value.element_size() // grain) * grain
        self._slots.insert(index, (self._end, room))
        self._shapes.insert(index, (value.shape, value.dtype))
        self._end += room
        self[index] = value


class OnHost(list[Tensor]):
    """Hidden states in host memory, wherever they were computed."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        super().__init__(batch.cpu() for batch in batches)

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(index, value.cpu())


def place_states(
    batches: Iterable[Tensor], place: Place, folder: Path | None
) -> MutableSequence[Tensor]:
    """Hidden states [B, T, D] of all batches, kept at `place`; folder: where files go."""
    if place == "disk":
        assert folder is not None
        return Spilled(folder, batches)
    return OnHost(batches) if place == "host" else list(batches)


class Parking:
    """Puts the matrices of a block away while they are not needed: from a CPU's memory into files,
    from another device into host memory.

    Weights in files are mapped, so that they stay what they were to all that reads them; what a
    linear read of them leaves the memory when it has been called.
    """

    def __init__(self, device: torch.device, folder: Path) -> None:
        self.device, self._folder = device, folder if device.type == "cpu" else None
        self._new: dict[int, _Home] = {}

    def put(self, tensor: Tensor) -> Tensor:
        """A matrix that is to be part of a block, put away before the next one is read;
        other tensors are placed."""
        if tensor.dim() != 2 or tensor.numel() < _LEAST:
            return tensor.to(self.device)
        home = _Home(tensor, self._folder)
        home.leave()
        self._new[home.tensor.data_ptr()] = home
        return home.tensor

    def away(self, *modules: nn.Module | None) -> None:
        """Put all matrices of the modules away."""
        for module in (
            inner for outer in modules if outer is not None for inner in outer.modules()
        ):
            weight = _matrix(module)
            if weight is None:
                continue
            home: _Home | None = getattr(weight, _HOME, None)
            if home is None or not home.has(weight.data):
                home = self._new.pop(weight.data_ptr(), None) or _Home(weight.data, self._folder)
                setattr(weight, _HOME, home)
                if home.mapped and _leave not in module._forward_hooks.values():
                    module.register_forward_hook(_leave)
            weight.data = home.tensor
            home.leave()

    def back(self, module: nn.Module) -> None:
        """Bring the matrices of the module back to the device."""
        for inner in module.modules():
            weight = _matrix(inner)
            home: _Home | None = getattr(weight, _HOME, None)
            if weight is not None and home is not None and weight.device != self.device:
                home.placed = home.tensor.to(self.device)
                weight.data = home.placed


class _Home:
    """Where one matrix waits."""

    def __init__(self, weight: Tensor, folder: Path | None) -> None:
        self.mapped = folder is not None
        self.placed: Tensor | None = None if self.mapped else weight
        self.tensor = weight.cpu() if folder is None else _in_file(weight, folder)

    def has(self, weight: Tensor) -> bool:
        """Whether these are the weights that wait here, and not others that took their place."""
        known = [self.tensor] if self.placed is None else [self.tensor, self.placed]
        return any(
            weight.data_ptr() == tensor.data_ptr() and weight.dtype == tensor.dtype
            for tensor in known
        )

    def leave(self) -> None:
        """Free the memory that is not the home's own."""
        self.placed = None
        if self.mapped:
            size = self.tensor.numel() * self.tensor.element_size()
            ctypes.CDLL(None).madvise(
                ctypes.c_void_p(self.tensor.data_ptr()), ctypes.c_size_t(size), mmap.MADV_DONTNEED
            )


def shared_copy(module: nn.Module) -> nn.Module:
    """A deep copy whose matrices share their memory with those of the module,
    until either gets another."""
    memo: dict[int, Any] = {}
    for inner in module.modules():
        weight = _matrix(inner)
        if weight is not None:
            memo[id(weight)] = nn.Parameter(weight.data, requires_grad=False)
            if hasattr(weight, _HOME):
                setattr(memo[id(weight)], _HOME, getattr(weight, _HOME))
    copied: nn.Module = copy.deepcopy(module, memo)
    return copied


def _matrix(module: nn.Module) -> nn.Parameter | None:
    weight = module._parameters.get("weight")
    return weight if weight is not None and weight.dim() == 2 and weight.numel() >= _LEAST else None


def _leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    # Forward hook: the pages that the product has read.
    weight = module._parameters.get("weight")
    home: _Home | None = getattr(weight, _HOME, None)
    if weight is not None and home is not None and home.has(weight.data):
        home.leave()


def _in_file(weight: Tensor, folder: Path) -> Tensor:
    """A copy of the weight in a mapped file that has no name any more."""
    size = weight.numel() * weight.element_size()
    with report_errors(folder):
        handle, name = tempfile.mkstemp(dir=folder)
        try:
            # a write to a mapping that the disk has no room for would kill us
            os.posix_fallocate(handle, 0, size)
            mapped = torch.from_file(name, shared=True, size=weight.numel(), dtype=weight.dtype)
        finally:
            os.close(handle)
            os.unlink(name)
    return mapped.view(weight.shape).copy_(weight)
