"""Fitted codebooks against float64 references: assignment, refit, the errors that are reached, and hostile weights."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantize.formats.bitvec import BitVec, index_dtype
from quantize.methods.sbvr.assign import DIRECT, Axis, Codebook, Groups
from quantize.methods.sbvr.fit import assign, fit, fit_codebook, round_codes
from quantize.methods.sbvr.train import refit


def gaussian(N: int, K: int, seed: int = 0) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


def relative(w: Tensor, quantized: Tensor, importance: Tensor | None = None) -> float:
    share = torch.ones(w.shape[1]) if importance is None else importance
    error, size = (((w - quantized).double() ** 2 * share).sum(), (w.double() ** 2 * share).sum())
    return float(error / size)


def through_the_layout(weight: BitVec) -> Tensor:
    return BitVec.from_tensors(weight.tensors(), weight.scheme()).unpack()


def group_errors(
    w: Tensor, codebook: Codebook, group_size: int, importance: Tensor | None = None
) -> Tensor:
    """Σ importance·(w − nearest level)² under every line, one by one in float64: [N, G, L]."""
    share = (
        torch.ones(w.shape[1], dtype=torch.float64) if importance is None else importance.double()
    )
    nearest = torch.stack(
        [(w.double()[..., None] - line).abs().amin(-1) ** 2 for line in codebook.levels.double()],
        -1,
    )
    return torch.stack(
        [part.sum(1) for part in (nearest * share[:, None]).split(group_size, dim=1)], 1
    )


def some_codebook(bits: int, bias: bool, S: int, Z: int, seed: int = 0) -> Codebook:
    generator = torch.Generator().manual_seed(seed)
    lines = torch.randn(S, bits + bias, generator=generator)
    lines[:, bits:] = -lines[:, :bits].sum(1, keepdim=True) / 2
    scales = 0.5 + 1.5 * torch.rand(Z, generator=generator) if Z > 1 else torch.ones(1)
    size = Codebook(lines, torch.ones(1), bits).levels.square().mean(1, keepdim=True).sqrt()
    return Codebook((1.25 * lines / size).half().float(), scales, bits)


# How close it gets


@pytest.mark.parametrize(
    ("bits", "bias", "most"),
    [
        (4, False, 0.0074),
        (4, True, 0.0072),
        (3, False, 0.0300),
        (3, True, 0.0288),
        (2, False, 0.1215),
        (2, True, 0.108),
    ],
)
def test_a_gaussian_weight_reaches_its_target(bits: int, bias: bool, most: float):
    w = gaussian(512, 1024)
    weight = fit(w, bits, 128, bias=bias, kind="lines")
    assert relative(w, through_the_layout(weight)) <= most
    assert weight.bits_per_weight == pytest.approx(
        bits + (8 * 4096 + 256 * (bits + bias) * 16 + 32) / w.numel()
    )


def test_errors_hold_on_a_weight_much_larger_than_the_sample():
    w = gaussian(2048, 2048)  # 32768 groups
    assert (
        relative(w, fit(w, 2, 128, bias=True, lines=16, kind="lines").unpack()) < 0.1145
    )  # measured 0.1130


@pytest.mark.parametrize("bias", [False, True])
def test_errors_fall_with_bits(bias: bool):
    w = gaussian(32, 512)
    errors = [relative(w, fit(w, bits, 128, bias=bias, lines=16).unpack()) for bits in range(2, 9)]
    assert all(finer < 0.4 * coarser for coarser, finer in itertools.pairwise(errors)), errors


def test_auto_chooses_what_errs_less():
    flat = gaussian(256, 512)
    uneven = gaussian(256, 512) * torch.logspace(-1, 1, 256)[:, None]
    for w in (flat, uneven):
        lines, shapes, auto = (
            relative(w, fit(w, 4, 64, bias=False, lines=64, kind=kind).unpack())
            for kind in ("lines", "shapes", "auto")
        )
        assert auto <= 1.01 * min(lines, shapes)


def test_shapes_times_scales_suit_rows_of_different_size():
    w = gaussian(512, 512) * torch.logspace(-1, 1, 512)[:, None]
    free, many = (
        fit(w, 4, 64, bias=False, lines=n, kind=c) for n, c in ((16, "lines"), (1 << 14, "shapes"))
    )
    assert len(many.scales) * len(many.lines) > DIRECT
    assert int(many.index.max()) > 255
    assert relative(w, through_the_layout(many)) < 0.7 * relative(w, free.unpack())


# Assignment and codes


@pytest.mark.parametrize(
    ("bits", "bias", "S", "Z"),
    [(2, True, 40, 1), (4, False, 64, 1), (4, True, 8, 8), (7, False, 12, 1), (3, True, 90, 16)],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_assign_finds_the_best_line(bits: int, bias: bool, S: int, Z: int, weighted: bool):
    w, codebook = gaussian(24, 300), some_codebook(bits, bias, S, Z)
    importance = (
        torch.rand(300, generator=torch.Generator().manual_seed(1)) ** 3 if weighted else None
    )
    index = assign(w, codebook, 64, importance)
    assert (index.dtype, tuple(index.shape)) == (torch.int32, (24, 5))
    errors = group_errors(w, codebook, 64, importance)
    chosen, best = errors.gather(2, index.long()[..., None])[..., 0], errors.amin(2)
    # Of over a thousand lines (the last case) only those near a group's rms are looked at.
    total, each = (1.1, 2.0) if codebook.size > DIRECT else (1.001, 1.1)
    assert chosen.sum() <= total * best.sum()
    assert (chosen <= each * best).all()


@given(
    seed=st.integers(0, 1 << 20), bits=st.integers(2, 8), bias=st.booleans(), size=st.floats(-4, 4)
)
@settings(max_examples=25, deadline=None)
def test_of_two_lines_the_better_is_always_taken(seed: int, bits: int, bias: bool, size: float):
    w, codebook = (
        10**size * gaussian(5, 200, seed),
        some_codebook(bits, bias, 2, 1, seed).times(10**size),
    )
    errors = group_errors(w, codebook, 128)
    chosen = errors.gather(2, assign(w, codebook, 128).long()[..., None])[..., 0]
    assert (chosen <= errors.amin(2) * (1 + 1e-5)).all()


def test_zeros_are_assigned_under_any_cache():
    for codebook in (some_codebook(4, False, 90, 16), some_codebook(4, False, 90, 16).times(0.0)):
        index = assign(torch.zeros(4, 256), codebook, 128)
        assert torch.equal(codebook.levels[index.long()].abs().amin(-1), torch.zeros(4, 2))


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_codes_are_nearest(bits: int):
    w, codebook = gaussian(6, 150), some_codebook(bits, True, 9, 2)
    index = torch.randint(
        0, 18, (6, 3), generator=torch.Generator().manual_seed(0), dtype=torch.int32
    )
    codes = round_codes(w, codebook, index, 64)
    own = codebook.levels[index.long()].repeat_interleave(64, 1)[:, :150].double()
    distances = (w.double()[..., None] - own).abs()
    taken = distances.gather(2, codes.long()[..., None])[..., 0]
    assert codes.dtype == torch.uint8
    torch.testing.assert_close(taken, distances.amin(2), rtol=0, atol=1e-6)


def test_a_histogram_keeps_mass_and_nearly_the_mean():
    x, share = 3 * gaussian(50, 64), torch.rand(50, 64, generator=torch.Generator().manual_seed(2))
    axis = Axis.over(float(x.abs().max()), 4, x.device)
    histogram = axis.histogram(x, share)
    torch.testing.assert_close(histogram.sum(1), share.sum(1))
    torch.testing.assert_close(histogram @ axis.points, (share * x).sum(1), atol=0.15, rtol=0)
    assert bool((histogram >= -1e-6).all())


# Refit


@pytest.mark.parametrize("bias", [False, True])
def test_refit_is_the_least_squares_solution(bias: bool):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 8, (2, 400), generator=generator)
    x, share = (
        torch.randn(2, 400, generator=generator).double(),
        torch.rand(2, 400, generator=generator).double(),
    )
    counts = torch.zeros(2, 8, dtype=torch.float64).scatter_add_(1, codes, share)
    sums = torch.zeros(2, 8, dtype=torch.float64).scatter_add_(1, codes, share * x)
    codebook = refit(Codebook(torch.zeros(2, 3 + bias), torch.ones(1), 3), counts, sums)
    for line in range(2):
        masks = torch.stack(
            [(codes[line] >> k & 1).double() for k in range(3)] + [torch.ones(400).double()] * bias,
            1,
        )
        root = share[line].sqrt()
        wanted = torch.linalg.lstsq(masks * root[:, None], (root * x[line])[:, None]).solution[:, 0]
        torch.testing.assert_close(
            codebook.lines[line].double(), wanted, rtol=1e-3, atol=1e-4
        )  # float16


def test_refit_of_shapes_and_scales_never_errs_more():
    generator = torch.Generator().manual_seed(3)
    codebook = some_codebook(4, False, 3, 5)
    codes = torch.randint(0, 16, (15, 500), generator=generator)
    x = (
        codebook.levels.gather(1, codes) + 0.3 * torch.randn(15, 500, generator=generator)
    ).double()
    counts = torch.zeros(15, 16, dtype=torch.float64).scatter_add_(1, codes, torch.ones_like(x))
    sums = torch.zeros(15, 16, dtype=torch.float64).scatter_add_(1, codes, x)
    errors = []
    for _ in range(4):
        errors.append(float((x - codebook.levels.double().gather(1, codes)).square().sum()))
        codebook = refit(codebook, counts, sums)
    assert errors[1] < errors[0]
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(errors))


def test_coefficients_without_data_stay():
    codebook = some_codebook(3, False, 2, 1)
    counts = torch.zeros(2, 8, dtype=torch.float64)
    counts[0, 1] = 4.0  # only the code that adds c_0 alone
    new = refit(codebook, counts, 2.5 * counts)
    assert torch.equal(new.lines[1], codebook.lines[1])
    torch.testing.assert_close(
        new.lines[0], torch.cat([torch.tensor([2.5]), codebook.lines[0, 1:]]), rtol=0, atol=1e-3
    )


def test_training_moves_every_way_of_error_down():
    w = gaussian(64, 512)
    codebook, index = fit_codebook(w, 3, 128, bias=True, lines=8, kind="lines")
    least = float(group_errors(w, codebook, 128).amin(2).sum())
    for k in range(4):
        for step in (-0.03, 0.03):
            lines = codebook.lines.clone()
            lines[:, k] += step
            moved = Codebook(lines, codebook.scales, 3)
            assert (
                float(group_errors(w, moved, 128).gather(2, index.long()[..., None]).sum()) > least
            )


# What must not matter


def test_beyond_the_last_input_nothing_counts():
    generator = torch.Generator().manual_seed(0)
    w = torch.randint(1, 5, (8, 130), generator=generator).float()  # exactly 1 + {0, 1} + 2·{0, 1}
    weight = fit(w, 2, 128, bias=True, lines=1)
    torch.testing.assert_close(weight.unpack(), w, rtol=0, atol=4e-3)


def test_importance_lowers_the_error_where_it_lies():
    w = gaussian(64, 512)
    importance = torch.where(torch.arange(512) % 4 == 0, 50.0, 0.5)
    plain = fit(w, 3, 128, bias=True, lines=64, kind="lines").unpack()
    weighted = fit(w, 3, 128, bias=True, lines=64, kind="lines", importance=importance).unpack()
    assert relative(w, weighted, importance) < 0.9 * relative(w, plain, importance)
    assert relative(w, weighted) > relative(w, plain)
    assert torch.equal(
        weighted,
        fit(w, 3, 128, bias=True, lines=64, kind="lines", importance=3 * importance).unpack(),
    )


def test_inputs_that_never_matter_still_get_a_sensible_line():
    w = gaussian(16, 512)
    importance = (torch.arange(512) < 256).float()
    error = (
        (fit(w, 4, 128, bias=False, lines=16, importance=importance).unpack() - w)[:, 256:]
        .square()
        .mean()
    )
    assert error < 0.03
    assert torch.equal(
        assign(w, some_codebook(4, False, 9, 1), 128, torch.zeros(512)),
        assign(w, some_codebook(4, False, 9, 1), 128),
    )


@given(power=st.integers(-60, 60), seed=st.integers(0, 100))
@settings(max_examples=8, deadline=None)
def test_a_power_of_two_changes_only_the_scales(power: int, seed: int):
    w = gaussian(8, 256, seed)
    one, other = (fit(x, 3, 64, bias=True, lines=8) for x in (w, w * 2.0**power))
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.index, other.index)
    assert torch.equal(one.lines, other.lines)
    assert torch.equal(one.scales * 2.0**power, other.scales)


def test_a_seed_fixes_everything():
    w = gaussian(64, 512)
    first, again, other = (
        fit(x, 4, 128, bias=False, lines=16, seed=seed)
        for x, seed in ((w, 1), (w.double(), 1), (w, 2))
    )
    assert all(
        torch.equal(getattr(first, key), getattr(again, key))
        for key in ("codes", "index", "lines", "scales")
    )
    assert not torch.equal(first.lines, other.lines)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_their_float32_values(dtype: torch.dtype):
    w = gaussian(16, 256).to(dtype)
    assert torch.equal(
        fit(w, 3, 128, bias=False, lines=8).codes, fit(w.float(), 3, 128, bias=False, lines=8).codes
    )


# The budget


@pytest.mark.parametrize("kind", ["lines", "shapes", "auto"])
@pytest.mark.parametrize("overhead", [0.08, 0.13, 0.3])
def test_index_and_cache_stay_within_the_overhead(kind: str, overhead: float):
    weight = fit(gaussian(64, 512), 4, 128, bias=True, lines=1024, kind=kind, max_overhead=overhead)  # type: ignore[arg-type]
    assert weight.bits_per_weight - 4 <= overhead
    if overhead < 0.2:  # the wider index alone would take 0.125
        assert index_dtype(len(weight.lines) * len(weight.scales)) == torch.uint8
    if kind == "lines" and overhead < 0.2:  # one more line would not fit
        assert weight.bits_per_weight - 4 + 5 * 16 / (64 * 512) > overhead


def test_an_overhead_below_one_line_is_refused():
    with pytest.raises(ValueError, match="not even one line"):
        fit(gaussian(8, 128), 4, 128, bias=False, max_overhead=0.1)


def test_more_lines_than_groups_are_never_stored():
    assert len(fit(gaussian(3, 256), 2, 128, bias=False, kind="lines").lines) == 6


# Hostile weights


def outlier(size: float) -> Tensor:
    w = gaussian(32, 512)
    w[3, 7] = size
    return w


HOSTILE = {
    "zeros": torch.zeros(4, 256),
    "rows of zeros": torch.cat([torch.zeros(2, 300), gaussian(2, 300)]),
    "constant rows": torch.arange(1.0, 9)[:, None].expand(8, 300),
    "outlier": outlier(1e6),
    "far outlier": outlier(-1e30),
    "tiny": 1e-6 * gaussian(32, 512),
    "tinier": 1e-30 * gaussian(32, 512),
    "subnormal": 1e-40 * gaussian(8, 512),
    "large": 1e4 * gaussian(32, 512),
    "huge": 1e37 * gaussian(32, 512),
    "uneven rows": gaussian(64, 512) * torch.logspace(-3, 2, 64)[:, None],
    "heavy tails": gaussian(64, 512) / (0.05 + gaussian(64, 512, 1).abs()),
    "one weight": gaussian(1, 1),
    "few weights": gaussian(5, 65),
}


@pytest.mark.parametrize(
    ("name", "bias", "kind", "lines"),
    [
        (name, bias, kind, 16)
        for name in HOSTILE
        for bias, kind in ((False, "lines"), (True, "shapes"))
    ]
    + [
        (name, False, "shapes", 4096) for name in ("zeros", "uneven rows", "outlier", "few weights")
    ],
)
def test_hostile_weights_stay_finite_and_close(name: str, bias: bool, kind: str, lines: int):
    w = HOSTILE[name]
    weight = fit(w, 4, 128, bias=bias, kind=kind, lines=lines)  # type: ignore[arg-type]
    quantized = through_the_layout(weight)
    assert quantized.isfinite().all()
    assert weight.lines.isfinite().all()
    largest = w.abs().max().clamp_min(1e-45)
    if name == "zeros":
        assert torch.equal(quantized, w)
    else:
        assert relative(w / largest, quantized / largest) < (
            0.08 if name == "heavy tails" else 0.03
        )


@given(
    N=st.integers(1, 6),
    K=st.integers(1, 300),
    group_size=st.sampled_from([64, 128, 256]),
    bits=st.integers(2, 8),
    bias=st.booleans(),
    lines=st.integers(1, 20),
    kind=st.sampled_from(["auto", "lines", "shapes"]),
    size=st.integers(-8, 8),
)
@settings(max_examples=30, deadline=None)
def test_any_shape_is_stored_and_read_back(
    N: int, K: int, group_size: int, bits: int, bias: bool, lines: int, kind: str, size: int
):
    w = 10.0**size * gaussian(N, K, seed=K)
    weight = fit(w, bits, group_size, bias=bias, lines=lines, kind=kind)  # type: ignore[arg-type]
    assert torch.equal(through_the_layout(weight), weight.unpack())
    assert len(weight.lines) * len(weight.scales) <= lines
    assert relative(w, weight.unpack()) < {2: 0.3, 3: 0.1}.get(bits, 0.04)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": torch.full((2, 128), math.nan)}, "not finite"),
        ({"w": torch.full((2, 128), math.inf)}, "not finite"),
        ({"w": torch.zeros(0, 128)}, "empty"),
        ({"bits": 9}, "9 bit planes"),
        ({"group_size": 100}, "group size 100"),
        ({"lines": 0}, "0 lines"),
        ({"lines": 1 << 17}, "131072 lines"),
        ({"kind": "best"}, "codebook best"),
        ({"importance": torch.ones(5)}, "importance"),
        ({"importance": -torch.ones(128)}, "importance"),
        ({"importance": torch.full((128,), math.nan)}, "importance"),
    ],
)
def test_what_cannot_be_fitted_is_refused(change: dict[str, object], message: str):
    arguments: dict[str, object] = {
        "w": gaussian(2, 128),
        "bits": 4,
        "group_size": 128,
        "bias": False,
    }
    with pytest.raises(ValueError, match=message):
        fit(**(arguments | change))  # type: ignore[arg-type]


def test_groups_are_taken_from_the_right_places():
    w = gaussian(7, 200)
    groups = Groups.of(w, 64, None)
    x, share = groups.pick(torch.tensor([3, 9]))  # the short group of row 0, the second of row 2
    torch.testing.assert_close(x[0][share[0] > 0] * groups.unit, w[0, 192:])
    torch.testing.assert_close(x[1] * groups.unit, w[2, 64:128])
    seen = torch.cat([x[share > 0] for _, x, share in groups.pieces(1 << 17)])
    torch.testing.assert_close(seen * groups.unit, w.flatten())
