"""How plans of mixtures of experts are compared with the parent."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantize.methods.ladimo import search
from quantize.methods.ladimo.search import Searcher


@pytest.mark.parametrize(("most", "every"), [(1 << 29, 1), (50 * 40, 3)])
@pytest.mark.parametrize("at_once", [1 << 24, 3 * 50])
def test_divergences_are_those_of_whole_rows(
    monkeypatch: pytest.MonkeyPatch, most: int, every: int, at_once: int
):
    draw = torch.Generator().manual_seed(torch.seed() % 2**31)
    head = torch.randn(50, 8, generator=draw)
    monkeypatch.setattr(search, "_LOGITS", most)
    monkeypatch.setattr(search, "_LOGITS_AT_ONCE", at_once)
    seen = []

    def log_probs(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden.shape[0] * hidden.shape[1])
        return (hidden @ head.T).log_softmax(-1)

    parent = [torch.randn(windows, 20, 8, generator=draw) for windows in (3, 2)]
    plans = [
        [states + 0.1 * torch.randn(states.shape, generator=draw) for states in parent]
        for _ in range(2)
    ]
    model: Any = SimpleNamespace(log_probs=log_probs)
    nothing: Any = None
    searcher = Searcher(model, nothing, nothing, adaptive=True, seed=0)
    found = searcher._kls(parent, plans)
    assert max(seen) <= max(1, at_once // 50)
    for kl, plan in zip(found, plans, strict=True):
        wanted = []
        for ours, theirs in zip(parent, plan, strict=True):
            p, q = (
                (states.reshape(-1, 8)[::every].double() @ head.double().T).log_softmax(-1)
                for states in (ours, theirs)
            )
            wanted.append((p.exp() * (p - q)).sum(-1))
        assert kl == pytest.approx(float(torch.cat(wanted).mean()), rel=1e-4)
