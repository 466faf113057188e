"""A packed model against its parent: perplexity, KL divergence and agreement on the same windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantize.arch import Shape
from quantize.calib import check_vocab, evaluation_tokens
from quantize.checkpoint import Checkpoint
from quantize.errors import DataError, ModelError
from quantize.linear import Numerics
from quantize.load import bits_per_weight, load_model
from quantize.skeleton import load_tokenizer

Progress = Callable[[str, int, int], None]
_LOGIT_TOKENS = 4096  # tokens whose logits are compared at once


@dataclass(frozen=True)
class Evaluation:
    """Figures of one comparison; field names are the keys of `pq eval --json`."""

    protocol: str
    """strided-N: one continuous token stream, no BOS, windows of N tokens without overlap, N − 1 predictions each."""
    data: str
    numerics: str
    tokens: int
    perplexity: float
    baseline_perplexity: float | None
    kld_mean: float | None
    kld_p99: float | None
    top1_agreement: float | None
    bits_per_weight: float | None


@dataclass
class _Totals:
    nll: float = 0.0
    baseline_nll: float = 0.0
    agree: int = 0
    predictions: int = 0
    kld: list[Tensor] = field(default_factory=list)


def evaluate(
    model: Path,
    baseline: Path | None,
    *,
    dataset: str = "builtin",
    seqlen: int = 512,
    max_windows: int | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    numerics: Numerics = "kernel",
    progress: Progress = lambda what, done, total: None,
) -> Evaluation:
    """Strided perplexity of `model`, and its divergence from `baseline` where one is given.

    KL divergence is KL(baseline ‖ model) in nats, over every predicted position. Raises PqError subclasses.
    """
    device = device or torch.device("cpu")
    ours = load_model(model, device, dtype, numerics)
    parent = None if baseline is None else load_model(baseline, device, dtype, numerics)
    _same_vocabulary(model, baseline)
    text = evaluation_tokens(load_tokenizer(model), dataset=dataset, seqlen=seqlen, max_windows=max_windows)
    check_vocab(text.tokens, Shape.of(Checkpoint(model).config).vocab)

    totals = _Totals()
    batches = torch.split(text.tokens, max(1, _LOGIT_TOKENS // seqlen))
    for done, windows in enumerate(batches):
        progress("evaluating", done, len(batches))
        _compare(ours, parent, windows.to(device), totals)
    progress("evaluating", len(batches), len(batches))
    kld = torch.cat(totals.kld) if totals.kld else None
    n = totals.predictions
    return Evaluation(
        protocol=f"strided-{seqlen}",
        data=text.source,
        numerics=numerics,
        tokens=n,
        perplexity=_perplexity(totals.nll / n, model),
        baseline_perplexity=None if parent is None else _perplexity(totals.baseline_nll / n, model),
        kld_mean=None if kld is None else float(kld.double().mean()),
        kld_p99=None if kld is None else float(_quantile(kld, 0.99)),
        top1_agreement=None if kld is None else totals.agree / n,
        bits_per_weight=bits_per_weight(ours),
    )


def _same_vocabulary(model: Path, baseline: Path | None) -> None:
    if baseline is None:
        return
    ours, parents = (Shape.of(Checkpoint(folder).config).vocab for folder in (model, baseline))
    if ours != parents:
        raise DataError(f"{model} has {ours} tokens and {baseline} {parents}; --baseline must be the model's parent")


@torch.no_grad()
def _compare(ours: nn.Module, parent: nn.Module | None, windows: Tensor, totals: _Totals) -> None:
    targets = windows[:, 1:].flatten()
    for log_q, log_p, wanted in _log_probabilities(ours, parent, windows, targets):
        totals.nll += float(F.nll_loss(log_q, wanted, reduction="sum"))
        totals.predictions += len(wanted)
        if log_p is not None:
            totals.baseline_nll += float(F.nll_loss(log_p, wanted, reduction="sum"))
            totals.agree += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            # Rounding can make a divergence of equal distributions slightly negative.
            totals.kld.append(F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).clamp_min(0).cpu())


def _log_probabilities(
    ours: nn.Module, parent: nn.Module | None, windows: Tensor, targets: Tensor
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Yield (ours [P, V], parent's [P, V], targets [P]) for one window after another, in float32."""
    q = ours(windows, use_cache=False).logits
    p = None if parent is None else parent(windows, use_cache=False).logits
    T = windows.shape[1] - 1
    for i in range(windows.shape[0]):
        log_p = None if p is None else p[i, :-1].float().log_softmax(-1)
        yield q[i, :-1].float().log_softmax(-1), log_p, targets[i * T : (i + 1) * T]


def _quantile(values: Tensor, q: float) -> Tensor:
    # torch.quantile refuses more than 16 million values.
    return values.sort().values[min(len(values) - 1, math.ceil(q * len(values)) - 1)]


def _perplexity(mean_nll: float, model: Path) -> float:
    if not math.isfinite(mean_nll):
        raise ModelError(f"{model}: its logits are not finite")
    return math.exp(mean_nll) if mean_nll < 700 else math.inf
