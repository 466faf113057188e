"""The figures of one evaluation, made from its per-token records."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from quantize.errors import ModelError
from quantize.evaluation.model import Model
from quantize.evaluation.protocols import Protocol, Windows
from quantize.evaluation.records import Estimate, Records
from quantize.files.hub_origin import called, commit_of

_WORST = 20  # tokens that are kept by themselves: as many as a person reads
# tokens of context shown around one of the worst tokens: what a line or two of a report hold
_BEFORE = 32
_AFTER = 8


@dataclass(frozen=True)
class Evaluation:
    """Figures of one comparison; field names are the keys of `pq eval --json`.
    Log-likelihoods in nats per token."""

    model: str
    baseline: str | None
    protocol: str
    """See quantize/evaluation/protocols.py."""
    data: str
    data_sha256: str
    """Of the tokens."""
    numerics: str
    kv_cache: str
    """`16-bit`, or how keys and values are rounded."""
    dtype: str
    windows: int
    context: int
    tokens: int
    """Predictions."""
    perplexity: float
    baseline_perplexity: float | None
    nll_stderr: float | None
    delta_nll: float | None
    """Mean NLL(model) − NLL(baseline), paired by token."""
    delta_nll_stderr: float | None
    kld_mean: float | None
    """KL(baseline ‖ model)."""
    kld_stderr: float | None
    kld_median: float | None
    kld_p90: float | None
    kld_p99: float | None
    kld_p999: float | None
    top1_agreement: float | None
    top1_stderr: float | None
    bits_per_weight: float | None
    word_perplexity: float | None
    """With byte_perplexity and bits_per_byte: rolling protocol only."""
    byte_perplexity: float | None
    bits_per_byte: float | None
    baseline_word_perplexity: float | None
    baseline_byte_perplexity: float | None
    baseline_bits_per_byte: float | None
    by_position: dict[str, Any] = field(repr=False)
    """start, nll, baseline_nll, kld: means over stretches of the window."""
    worst: list[dict[str, Any]] = field(repr=False)
    """Tokens of the largest KL divergence in their context."""
    activated_parameters: float | None = None
    """Parameters that a token is multiplied with, on average; the embedding table's are not."""
    baseline_activated_parameters: float | None = None
    experts_visited: dict[str, float] | None = None
    """Block with experts → mean number of routed ones that a token visits;
    None where there are none."""
    bos_token_id: int | None = None
    """The BOS token that each strided window begins with; None without one."""
    bytes_per_token: float | None = None
    """Bytes of the stored weights that a token is multiplied with, on average; None: not told."""
    baseline_bytes_per_token: float | None = None
    activation_bits: tuple[int, ...] = (16,)
    """Bits that inputs of linears are rounded to, all kinds that there are; 16: no rounding."""
    kv_bits: float = 16.0
    """Stored bits of a cached key or value, scales counted."""
    model_commit: str | None = None
    """With baseline_commit: that of a model on the Hub; None for a local folder."""
    baseline_commit: str | None = None
    kld_histogram: dict[str, Any] | None = field(default=None, repr=False)
    """edges, counts: of the tokens' divergences, see `Records.histogram`."""


@dataclass(frozen=True)
class Run:
    """What all models of one run have in common."""

    baseline: str | None
    protocol: Protocol
    numerics: str
    dtype: str
    windows: Windows
    tokenizer: Any
    baseline_commit: str | None = None

    def figures(
        self, folder: Path, records: Records, model: Model, parent: Model | None
    ) -> Evaluation:
        """Figures of one model; ModelError when its logits, or the baseline's, were not finite."""
        baseline, windows = self.baseline, self.windows
        nll = records.mean(records["nll"])
        if not math.isfinite(nll.mean):
            raise ModelError(f"{folder}: its logits are not finite")
        against = baseline is not None
        theirs = records.mean(records["baseline_nll"]) if against else None
        if theirs and not math.isfinite(theirs.mean):
            raise ModelError(f"{baseline}: its logits are not finite")
        nothing = Estimate(math.nan, None)
        delta = records.mean(records["nll"] - records["baseline_nll"]) if against else nothing
        kld = records.mean(records["kld"]) if against else nothing
        top1 = (
            records.mean((records["top1"] == records["baseline_top1"]).double())
            if against
            else nothing
        )

        def quantile(q: float) -> float | None:
            return records.quantile("kld", q) if against else None

        return Evaluation(
            model=called(folder),
            baseline=baseline,
            protocol=self.protocol.name,
            data=windows.source,
            data_sha256=windows.sha256,
            numerics=self.numerics,
            kv_cache=model.kv_cache,
            dtype=self.dtype,
            windows=len(windows.inputs),
            context=self.protocol.context,
            tokens=len(records),
            perplexity=_exp(nll.mean),
            baseline_perplexity=_exp(theirs.mean) if theirs else None,
            nll_stderr=nll.stderr,
            delta_nll=delta.mean if against else None,
            delta_nll_stderr=delta.stderr,
            kld_mean=kld.mean if against else None,
            kld_stderr=kld.stderr,
            kld_median=quantile(0.5),
            kld_p90=quantile(0.9),
            kld_p99=quantile(0.99),
            kld_p999=quantile(0.999),
            top1_agreement=top1.mean if against else None,
            top1_stderr=top1.stderr,
            bits_per_weight=model.bits_per_weight,
            **_by_text("", nll.mean * len(records), windows),
            **_by_text("baseline_", theirs.mean * len(records) if theirs else None, windows),
            by_position=records.by_position(),
            worst=[
                _in_context(records, row, windows, self.tokenizer) for row in records.worst(_WORST)
            ],
            activated_parameters=model.activated_parameters,
            baseline_activated_parameters=parent.activated_parameters if parent else None,
            experts_visited=dict(model.experts_visited) or None,
            bytes_per_token=model.bytes_per_token,
            baseline_bytes_per_token=parent.bytes_per_token if parent else None,
            activation_bits=model.activation_bits,
            kv_bits=model.kv_bits,
            model_commit=commit_of(folder),
            baseline_commit=self.baseline_commit,
            kld_histogram=records.histogram("kld") if against else None,
            bos_token_id=int(self.tokenizer.bos_token_id) if self.protocol.bos else None,
        )


def _by_text(prefix: str, nll: float | None, windows: Windows) -> dict[str, float | None]:
    """Perplexity per word and per byte of a text whose tokens have this total NLL."""
    if nll is None or not windows.words or not windows.utf8_bytes:
        names = ("word_perplexity", "byte_perplexity", "bits_per_byte")
        return dict.fromkeys(f"{prefix}{name}" for name in names)
    return {
        f"{prefix}word_perplexity": _exp(nll / windows.words),
        f"{prefix}byte_perplexity": _exp(nll / windows.utf8_bytes),
        f"{prefix}bits_per_byte": nll / windows.utf8_bytes / math.log(2),
    }


def _in_context(records: Records, row: int, windows: Windows, tokenizer: Any) -> dict[str, Any]:
    """One token with the text around it and what both models would have said."""
    window, position = int(records["window"][row]), int(records["position"][row])
    read, wanted = windows.inputs[window], windows.targets[window]
    # Targets beyond the window's last input are not part of it; inputs beyond
    # its last target are padding.
    after = wanted[position : position + _AFTER]

    def text(ids: Tensor) -> str:
        return str(tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))

    return {
        "window": window,
        "position": position,
        "before": text(read[max(0, position - _BEFORE) : position]),
        "token": text(records["token"][row : row + 1]),
        "after": text(after[after >= 0]),
        "kld": float(records["kld"][row]),
        "nll": float(records["nll"][row]),
        "baseline_nll": float(records["baseline_nll"][row]),
        "top1": text(records["top1"][row : row + 1]),
        "baseline_top1": text(records["baseline_top1"][row : row + 1]),
    }


def _exp(mean_nll: float) -> float:
    return math.exp(mean_nll) if mean_nll < 700 else math.inf
