"""What was measured at every predicted token, and the figures made from it."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantize.model.logits import log_probs

if TYPE_CHECKING:
    from quantize.parallel.ranks import Ranks

_DECADE = (
    4  # bins of the histogram of divergences in a factor of ten: a chart's width for eight of them
)
_LEAST, _MOST = -6, 2  # its ends, powers of ten in nats: a rounding error, and the worst there is
_BINS = 32  # of the curves by position: what a chart's width shows, and still many tokens in each


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens and its standard error, windows taken as the independent units."""

    mean: float
    stderr: float | None


@dataclass
class Records:
    """Per-token columns, grown span by span; all [P] on the CPU. KL divergence and NLL in nats."""

    columns: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(
        self, window: int, first: int, logits: Tensor, parent: Tensor | None, targets: Tensor
    ) -> None:
        """Measure logits [P, V], and a parent's, against the tokens [P] that follow
        positions first, first + 1, …"""
        P = len(targets)
        targets = targets.to(logits.device)
        found: dict[str, Tensor] = {
            "window": torch.full((P,), window, dtype=torch.int32),
            "position": torch.arange(first + 1, first + 1 + P, dtype=torch.int32),
            "token": targets.int(),
        }
        if parent is None:
            wanted = logits.gather(1, targets[:, None])[:, 0].float()
            found["nll"] = logits.float().logsumexp(-1) - wanted
        else:
            log_q, log_p = log_probs(logits), log_probs(parent)
            found["nll"] = -log_q.gather(1, targets[:, None])[:, 0]
            found["baseline_nll"] = -log_p.gather(1, targets[:, None])[:, 0]
            found["top1"], found["baseline_top1"] = log_q.argmax(-1).int(), log_p.argmax(-1).int()
            # Rounding can make a divergence of equal distributions slightly negative.
            found["kld"] = log_p.exp().mul_(log_p.sub_(log_q)).sum(-1).clamp_min_(0)
        for name, values in found.items():
            self.columns.setdefault(name, []).append(values.cpu())

    def __getitem__(self, name: str) -> Tensor:
        """One column [P], concatenated."""
        parts = self.columns[name]
        if len(parts) > 1:
            self.columns[name] = parts = [torch.cat(parts)]
        return parts[0]

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def __len__(self) -> int:
        return len(self["token"])

    def gather(self, ranks: Ranks) -> Records:
        """Records of all ranks, which measure consecutive windows each: rank 0's come first."""
        columns: dict[str, list[Tensor]] = {}
        for source in range(ranks.size):
            mine = {name: self[name] for name in self.columns} if source == ranks.rank else None
            for name, values in ranks.tensors(mine, source).items():
                columns.setdefault(name, []).append(values)
        return Records(columns)

    def mean(self, values: Tensor) -> Estimate:
        """Mean of a column [P]; its error from the spread of the windows' sums (tokens of one
        window are not independent): SE² = W / (W − 1) · Σ_w (Σ_{i∈w} x_i − x̄·n_w)² / n².
        """
        windows = self["window"].long()
        n_windows = int(windows.max()) + 1
        sums = torch.zeros(n_windows, dtype=torch.float64).index_add_(0, windows, values.double())
        counts = torch.bincount(windows, minlength=n_windows).double()
        mean = float(values.double().mean())
        W = int((counts > 0).sum())
        if W < 2:
            return Estimate(mean, None)
        spread = float((sums - mean * counts).square().sum())
        return Estimate(mean, math.sqrt(W / (W - 1) * spread) / len(values))

    def quantile(self, name: str, q: float) -> float:
        """The smallest value that at least the fraction q of the tokens does not exceed."""
        values = self[name].sort().values  # torch.quantile refuses more than 16 million values
        return float(values[min(len(values) - 1, max(0, math.ceil(q * len(values)) - 1))])

    def by_position(self) -> dict[str, list[float] | list[int] | None]:
        """Mean NLL and KL divergence over at most 32 equal stretches of the window."""
        position = self["position"].long() - 1
        width = max(1, math.ceil((int(position.max()) + 1) / _BINS))
        bins = position // width
        counts = torch.bincount(bins).double()
        used = counts > 0

        def curve(name: str) -> list[float] | None:
            if name not in self:
                return None
            sums = torch.zeros(len(counts), dtype=torch.float64).index_add_(
                0, bins, self[name].double()
            )
            return [float(v) for v in sums[used] / counts[used]]

        starts = [int(b) * width + 1 for b in used.nonzero().flatten()]
        return {
            "start": starts,
            "nll": curve("nll"),
            "baseline_nll": curve("baseline_nll"),
            "kld": curve("kld"),
        }

    def histogram(self, name: str) -> dict[str, list[float] | list[int]]:
        """Counts of a column's values between edges, a quarter of a power of ten apart from 1e-6 to
        100; what lies beyond is counted at the ends."""
        steps = torch.arange(_LEAST * _DECADE, _MOST * _DECADE + 1, dtype=torch.float64)
        edges = torch.pow(10.0, steps / _DECADE)
        values = self[name].double().clamp(float(edges[0]), float(edges[-1]) * (1 - 1e-12))
        bins = torch.bucketize(values, edges, right=True) - 1
        counts = torch.bincount(bins, minlength=len(edges) - 1)
        return {"edges": [float(edge) for edge in edges], "counts": counts.tolist()}

    def worst(self, count: int) -> list[int]:
        """Rows of the largest KL divergences, the largest first."""
        return self["kld"].topk(min(count, len(self))).indices.tolist() if "kld" in self else []

    def save(self, path: Path) -> None:
        """Write the columns as parquet."""
        # importlib, since pyarrow's types are not checked; lazily, since it is slow to import.
        pyarrow, parquet = (
            importlib.import_module(name) for name in ("pyarrow", "pyarrow.parquet")
        )
        table: Any = pyarrow.table({name: self[name].numpy() for name in self.columns})
        parquet.write_table(table, path, compression="zstd")
