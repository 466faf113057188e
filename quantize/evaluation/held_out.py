"""How far a conversion is from its parent, on a few windows of text and told in a word.

It is a look, not a measurement: some thousand tokens of the text that calibration drew from. `pq
eval` measures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantize.errors import ModelError
from quantize.evaluation.protocols import UNSCORED, Windows
from quantize.evaluation.records import Records
from quantize.evaluation.run import Progress, records_of
from quantize.evaluation.streamed import open_model

SIZES: tuple[tuple[float, str], ...] = (
    (0.001, "next to nothing: the parent's own numerics differ by as much"),
    (0.01, "hard to tell from the parent"),
    (0.03, "small: seen in scores of hard tasks at most"),
    (0.1, "noticeable: hard tasks lose some points"),
    (0.3, "large: expect worse answers"),
    (1.0, "very large: much of what the parent knew is lost"),
    (math.inf, "broken: the output says other things than the parent"),
)
"""Mean KL divergence per token in nats, below which it is called so: the one table of such words."""


def size_of(kld: float) -> str:
    """What a mean KL divergence amounts to, in words."""
    return next((words for limit, words in SIZES if kld < limit), SIZES[-1][1])


@dataclass(frozen=True)
class HeldOut:
    """Figures of such a look; field names are the keys of `held_out` in pq.json."""

    text: str
    """Which text, for people."""
    sha256: str
    """Of its tokens as little-endian int64."""
    windows: int
    seqlen: int
    tokens: int
    """Predictions."""
    kld_mean: float
    """KL(parent ‖ output), nats a token."""
    kld_stderr: float | None
    kld_p99: float
    top1_agreement: float
    perplexity: float
    parent_perplexity: float
    dtype: str
    measured: str
    """What was computed, and what of the engine that serves the output is not in it."""

    def as_json(self) -> dict[str, Any]:
        """All fields, and the size in words."""
        return asdict(self) | {"size": size_of(self.kld_mean)}


def look(
    folder: Path,
    parent: Path,
    tokens: Tensor,
    text: str,
    sha256: str,
    *,
    vocab: int,
    device: torch.device,
    dtype: torch.dtype,
    beyond: str = "",
    progress: Progress = lambda what, done, total: None,
) -> HeldOut:
    """Compare a finished checkpoint with its parent on token windows [N, T], each predicting all its
    tokens but the first. Both are streamed block by block; neither is ever in memory whole.

    vocab: logits of a token. beyond: what the engine does beside that is not computed here.
    Raises what opening a checkpoint raises, and ModelError where logits are not finite.
    """
    targets = torch.full_like(tokens, UNSCORED)
    targets[:, :-1] = tokens[:, 1:]
    windows = Windows(tokens, targets, text, sha256)
    output = open_model(folder, device, dtype, "kernel")
    source = open_model(parent, device, dtype, "kernel")
    (records,) = records_of(
        [output],
        source,
        windows,
        vocab,
        lambda what, done, total: progress("checking", done, total),
    )
    return _figures(records, windows, str(dtype).removeprefix("torch."), output.kv_cache, beyond)


def _figures(records: Records, windows: Windows, dtype: str, kv_cache: str, beyond: str) -> HeldOut:
    nll, parents = records.mean(records["nll"]), records.mean(records["baseline_nll"])
    for name, found in (("the output's", nll.mean), ("the parent's", parents.mean)):
        if not math.isfinite(found):
            raise ModelError(f"{name} logits are not finite on {windows.source}")
    kld = records.mean(records["kld"])
    same = (records["top1"] == records["baseline_top1"]).double()
    cache = "" if kv_cache == "16-bit" else f", {kv_cache} cache"
    return HeldOut(
        text=windows.source,
        sha256=windows.sha256,
        windows=len(windows.inputs),
        seqlen=windows.inputs.shape[1],
        tokens=len(records),
        kld_mean=kld.mean,
        kld_stderr=kld.stderr,
        kld_p99=records.quantile("kld", 0.99),
        top1_agreement=float(same.mean()),
        perplexity=_exp(nll.mean),
        parent_perplexity=_exp(parents.mean),
        dtype=dtype,
        measured=f"the written files with their kernels' numerics{cache}"
        + (f"; {beyond}" if beyond else ""),
    )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def sentence(found: Mapping[str, Any]) -> str:
    """What pq.json's `held_out` says, in one line for people."""
    if reason := found.get("not_measured"):
        return f"quality was not measured: {reason}"
    error = "" if found["kld_stderr"] is None else f" ± {found['kld_stderr']:.1g}"
    return (
        f"KL divergence from the parent {found['kld_mean']:.3g}{error} ({found['size']}); same "
        f"first choice for {100 * found['top1_agreement']:.1f} % of {found['tokens']} tokens"
    )
