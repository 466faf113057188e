"""The machine that a benchmark runs on: its ceilings, how calls are timed there, and
what must be right first."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from quantize.bench.speed.record import Record
from quantize.bench.speed.rows import Ceilings, Row, Spread
from quantize.cost.stopwatch import device_name, take_turns, versions, watch
from quantize.errors import QualityError

Call = Callable[[], object]
Calls = Sequence[Call]

LIMIT = 3e-2
"""Of the norm of the result: what a kernel may be off by. Tensor cores add E4M3
products with 14 bits, so long sums may be off by a hundredth or two; a group of inputs
that is wrong shows as a tenth."""
CHAIN_LIMIT = 6e-2
"""For kernels one after the other: values beside a border of E4M3 may fall on
either side of it in between."""
_PEER_LIMIT = 0.1  # E4M3 weights and activations rounded per row are off by 0.04
# bytes; operands beside each other fill more, so that none is read from a cache (an H200's: 50 MiB)
_CACHES = 1 << 27
# calls of a round: operands so small that these stay in the cache are read from it in a model, too
_MOST = 64
# bytes copied for the ceiling of the memory, far more than a GPU's caches hold; elsewhere the
# tables are for trying a run out, so that little is enough
_COPIED = {"cuda": 1 << 30}
_COPIED_ELSEWHERE = 1 << 24
# rows and columns of the product for the ceiling of arithmetic: it must keep all of a GPU busy;
# elsewhere it only has to be quick
_SQUARE = {"cuda": 8192}
_SQUARE_ELSEWHERE = 256


class Stand:
    """A device with its ceilings, which are measured when it is made. `cache_bytes`: what
    copies of operands exceed."""

    def __init__(self, device: torch.device, rounds: int = 20, cache_bytes: int = _CACHES) -> None:
        self.device = device
        self.rounds = rounds
        self._cache_bytes = cache_bytes
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.plain = "bf16" if device.type == "cuda" else "float32"
        """What torch's own products are called."""
        self.notes: list[str] = []
        """What was left out so far, and why."""
        self.ceilings = self._ceilings()

    def record(self) -> Record:
        """An empty record of this machine, which gets the notes that are still to come."""
        where = device_name(self.device), torch.get_num_threads(), versions()
        return Record(*where, self.rounds, self.ceilings, self.notes)

    def note(self, text: str) -> None:
        """Add to the notes what is not there yet."""
        if text not in self.notes:
            self.notes.append(text)

    def random(self, *shape: int) -> Tensor:
        """Normally distributed numbers in the dtype of activations."""
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def copies(self, held: int) -> int:
        """How many operands of so many bytes take turns."""
        return min(_MOST, self._cache_bytes // max(1, held) + 1)

    def clock(self, calls: Mapping[str, Calls]) -> dict[str, Spread]:
        """Seconds of a call of each name. All calls of a name make a round; names take turns."""
        found = take_turns([watch(of_one, self.device) for of_one in calls.values()], self.rounds)
        each = zip(calls.items(), found, strict=True)
        return {
            name: _spread([s / len(of_one) for s in seconds]) for (name, of_one), seconds in each
        }

    def row(
        self,
        what: str,
        shape: str,
        M: int,
        size: int,
        time: Spread,
        moved: int,
        flops: int,
        peers: dict[str, Spread],
        precision: str = "fp8",
        tokens: int = 0,
    ) -> Row:
        """A row with its parts of the ceilings."""
        ceiling = self.ceilings.matmul.get(precision)
        compute = flops / time.seconds / ceiling if ceiling else None
        bandwidth = moved / time.seconds / self.ceilings.copy
        return Row(
            what, shape, M, size, time, moved, flops, precision, bandwidth, compute, peers, tokens
        )

    def working(
        self, makers: Mapping[str, Callable[[], Calls]], expected: Tensor
    ) -> dict[str, Calls]:
        """Calls of the peers that run here and compute what is expected; a note says
        why the others are left out."""
        out: dict[str, Calls] = {}
        for name, make in makers.items():
            try:
                calls = make()
                watch(calls[:1], self.device)  # also shows whether a graph can hold it
                off = distance(calls[0](), expected)
            except Exception as err:  # whatever another library raises for a machine or shape that it does not know
                self.note(f"{name}: left out ({_line(err)})")
                continue
            if off <= _PEER_LIMIT:
                out[name] = calls
            else:
                self.note(f"{name}: left out (off by {off:.1e} of the result)")
        return out

    def _ceilings(self) -> Ceilings:
        size = _COPIED.get(self.device.type, _COPIED_ELSEWHERE)
        source = torch.zeros(size, dtype=torch.uint8, device=self.device)
        target = torch.zeros_like(source)
        n = _SQUARE.get(self.device.type, _SQUARE_ELSEWHERE)
        x, w = self.random(n, n), self.random(n, n)
        found = self.clock(
            {"copy": [lambda: target.copy_(source)], self.plain: [partial(F.linear, x, w)]}
        )
        matmul = {self.plain: 2 * n**3 / found[self.plain].seconds}
        a, b, one = (
            x.to(torch.float8_e4m3fn),
            w.to(torch.float8_e4m3fn),
            torch.ones((), device=self.device),
        )
        fp8 = partial(
            torch._scaled_mm,
            a,
            b.T,
            scale_a=one,
            scale_b=one,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        calls = self.working({"fp8 ceiling": lambda: [fp8]}, F.linear(x, w))
        if calls:
            matmul["fp8"] = 2 * n**3 / self.clock(calls)["fp8 ceiling"].seconds
        return Ceilings(2 * size / found["copy"].seconds, matmul)


def distance(found: object, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    assert isinstance(found, Tensor)
    return float((found.double() - expected).norm() / expected.double().norm())


def require_close(found: Tensor, expected: Tensor, what: str, limit: float = LIMIT) -> None:
    """QualityError where the result is off by more than the limit, by its norm or,
    twice that, in any one place."""
    off = distance(found, expected)
    most = float((found.double() - expected).abs().max() / expected.abs().max())
    if not (off <= limit and most <= 2 * limit):
        raise QualityError(
            f"{what}: off by {off:.1e} of the result and by {most:.1e} of its largest value in "
            f"one place (limits {limit:.0e}, {2 * limit:.0e}), so it is not timed; run the tests "
            "of quantize/kernels"
        )


def _spread(seconds: Sequence[float]) -> Spread:
    return Spread(statistics.median(seconds), min(seconds), max(seconds))


def _line(err: Exception) -> str:
    return (str(err).strip().splitlines() or [type(err).__name__])[0][:120]
