"""Attention on pages: what the twin of contiguous records computes, whatever pages a sequence has."""

from __future__ import annotations

import pytest
import torch
from interpreted import GPU, INTERPRETED, run_interpreted
from torch import Tensor

from quantize.formats.fp8 import quantize_activations
from quantize.formats.kv4 import KvNumerics, KvScheme, fake_quantize
from quantize.kernels.attention.paged import attend_pages, attend_pages_reference, store_pages
from quantize.kernels.attention.reference import attend, over_scale, visible

DEVICES = ["cpu"] if INTERPRETED else [GPU]
SCHEMES = [
    KvScheme(),
    KvScheme(32, symmetric=False),
    KvScheme(32, scale_dtype="e4m3"),
]


class Sequences:
    """Random sequences, the last tokens of each new, in pages that were dealt out at random."""

    def __init__(self, lengths: list[int], new: list[int], d: int, scheme: KvScheme) -> None:
        self.H, self.Hkv, self.size = 4, 2, 16
        self.lengths, self.new, self.d, self.scheme = lengths, new, d, scheme
        self.S = torch.rand(self.Hkv, d) + 0.5
        self.keys = [torch.randn(L, self.Hkv, d) for L in lengths]
        self.values = [torch.randn(L, self.Hkv, d) for L in lengths]
        self.query = torch.randn(sum(new), self.H, d)
        most = max(-(-L // self.size) for L in lengths)
        order = torch.randperm(len(lengths) * most + 3)
        self.table = order[: len(lengths) * most].view(len(lengths), most).int()
        # What nobody wrote is NaN in every reading, and cells are longer than records.
        room = 2 * scheme.record_bytes(d) + 6
        self.pages = torch.full((len(order), self.Hkv, self.size, room), 255, dtype=torch.uint8)
        self.starts = torch.tensor([0, *new]).cumsum(0).int()

    def slots(self, b: int) -> Tensor:
        t = torch.arange(self.lengths[b])
        return self.table[b, t // self.size].long() * self.size + t % self.size

    def wanted(self, numerics: KvNumerics, window: int | None) -> Tensor:
        out = []
        for b, (L, T) in enumerate(zip(self.lengths, self.new, strict=True)):
            k = fake_quantize(self.keys[b] * self.S, self.scheme).transpose(0, 1)[None]
            v = fake_quantize(self.values[b], self.scheme).transpose(0, 1)[None]
            q = over_scale(
                self.query[self.starts[b] : self.starts[b + 1]].transpose(0, 1)[None], self.S
            )
            q = quantize_activations(q) if numerics.fp8_query else q
            seen = visible(T, L, (True, window, None, None), q.device)
            out.append(attend(q, k, v, seen, 0.2, numerics.fp8_probabilities)[0].transpose(0, 1))
        return torch.cat(out)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label(64))
@pytest.mark.skipif(INTERPRETED, reason="these are the twin's")
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("fp8", [True, False])
def test_pages_hold_what_sequences_would(scheme: KvScheme, window: int | None, fp8: bool):
    held = Sequences([5, 48, 33, 1], [5, 1, 7, 1], 64, scheme)
    numerics = KvNumerics(scheme, fp8, fp8)
    for b in (2, 0, 3, 1):
        store_pages(held.keys[b], held.values[b], held.S, scheme, held.pages, held.slots(b))
    out = torch.full_like(held.query, torch.nan)
    lengths = torch.tensor(held.lengths).int()
    facts = (held.table, held.starts, lengths, out)
    attend_pages(held.query, held.pages, held.S, numerics, 0.2, *facts, window=window)
    torch.testing.assert_close(out, held.wanted(numerics, window), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(INTERPRETED, reason="this is the child process")
def test_kernels_in_the_interpreter():
    run_interpreted(__file__)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label(64))
def test_kernels_store_the_very_bytes(scheme: KvScheme, device: str):
    held = Sequences([19], [19], 64, scheme)
    slots = held.slots(0)
    slots[3] = -1
    wanted, found = held.pages.clone(), held.pages.to(device)
    quiet = torch.float64  # which no kernel takes
    store_pages(held.keys[0].to(quiet), held.values[0].to(quiet), held.S, scheme, wanted, slots)
    states = (held.keys[0].to(device), held.values[0].to(device), held.S.to(device))
    store_pages(*states, scheme, found, slots.to(device))
    assert torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("scheme", "window", "bounds"),
    [(SCHEMES[0], None, True), (SCHEMES[1], 40, True), (SCHEMES[2], None, False)],
    ids=["plain", "window", "unbounded"],
)
def test_kernels_attend_as_the_twin(
    scheme: KvScheme, window: int | None, bounds: bool, device: str
):
    """Sequences that decode, begin, and are cut into pieces, in one launch; and one that is nothing yet."""
    held = Sequences([70, 5, 40, 0], [1, 5, 20, 0], 64, scheme)
    for b in range(3):
        store_pages(held.keys[b], held.values[b], held.S, scheme, held.pages, held.slots(b))
    lengths, numerics = torch.tensor(held.lengths).int(), KvNumerics(scheme)
    wanted = torch.full_like(held.query, torch.nan)
    facts = (held.table, held.starts, lengths)
    attend_pages_reference(
        held.query, held.pages, held.S, numerics, 0.2, *facts, wanted, window=window, whole_top=True
    )
    found = torch.full_like(held.query, torch.nan, device=device)
    most = {"most_new": 20, "most_tokens": 70} if bounds else {}
    given = (held.query.to(device), held.pages.to(device), held.S.to(device), numerics, 0.2)
    attend_pages(*given, *(t.to(device) for t in facts), found, window=window, **most)
    torch.testing.assert_close(found.cpu(), wanted, rtol=2e-3, atol=2e-3)


def test_padding_is_not_stored():
    held = Sequences([20], [20], 64, KvScheme())
    before = held.pages.clone()
    slots = held.slots(0)
    slots[7:] = -1
    store_pages(held.keys[0], held.values[0], held.S, held.scheme, held.pages, slots)
    changed = (held.pages != before).any(-1).any(1).flatten().nonzero().flatten()
    assert sorted(changed.tolist()) == sorted(slots[:7].tolist())
