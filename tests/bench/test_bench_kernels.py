"""`pq bench kernels`, `decode` and `prefill` on the CPU and tiny shapes: what is measured, refused and printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import CPU
from speeds import HEADS, MEASURES, SIZES, figure, shrink, wrong
from torch import Tensor
from typer.testing import CliRunner, Result

from quantize.bench.speed import attention, linears, llama, run
from quantize.bench.speed.attention import Heads
from quantize.bench.speed.stand import Stand
from quantize.cli import app
from quantize.cli.bench_speed import show
from quantize.errors import OutputError, PqError, QualityError, UsageError
from quantize.kernels.attention import api as attention_kernels
from quantize.kernels.fp8 import api as fp8
from quantize.kernels.int4 import api as int4


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch):
    shrink(monkeypatch)


@pytest.fixture
def here(small: None) -> Stand:
    return Stand(CPU, rounds=2, cache_bytes=0)


def test_every_kind_meets_every_batch(here: Stand):
    rows = list(MEASURES["kernels"](here))
    kinds = ["folded", "exact", "W4A16", "folded from x"]
    fronts = ["gated folded", "gated exact", "gated W4A16"]
    wanted = [(kind, "256x128", M) for M in (1, 3) for kind in kinds]
    wanted += [(kind, "2x256x128", M) for M in (1, 3, 5) for kind in fronts]
    wanted += [(name, "128", M) for M in (1, 3) for name in ("round", "norm + round")]
    assert [(row.what, row.shape, row.M) for row in rows] == wanted
    product = rows[4]
    assert product.bytes == 256 * 64 + 256 * 2 + 3 * (128 + 4) + 3 * 256 * 4
    assert product.flops == 2 * 3 * 256 * 128
    assert product.precision == "fp8"
    assert rows[2].precision == "float32"
    for row in rows:
        assert 0 < row.time.fastest <= row.time.seconds <= row.time.slowest
        assert row.bandwidth == pytest.approx(row.bytes / row.time.seconds / here.ceilings.copy)
        assert all(
            row.ratios[name] == row.peers[name].seconds / row.time.seconds > 0 for name in row.peers
        )
    assert set(rows[0].peers) == {"float32", "torch fp8"}
    rate = rows[2].flops / rows[2].time.seconds
    assert rows[2].compute == pytest.approx(rate / here.ceilings.matmul["float32"])


def test_decoding_and_prefill_have_their_rows(here: Stand):
    rows = list(MEASURES["decode"](here))
    assert [(row.what, row.M) for row in rows] == [
        ("attention", 1), ("append", 1), ("attention", 2), ("append", 2), ("model", 1), ("model", 2)
    ]  # fmt: skip
    assert rows[2].bytes == 2 * 2 * 2 * 20 * 34 + 2 * (2 * 4 * 64 * 4)
    assert rows[2].flops == 4 * 2 * 4 * 20 * 64
    assert rows[5].as_json()["tokens_per_second"]["pq"] == 2 / rows[5].time.seconds
    linear = sum(N * K for N, K in SIZES.shapes)
    assert linear == 512 * 128 + 128 * 256 + 3 * 128 * 256
    assert rows[5].flops == 2 * 2 * (100 * 128 + 2 * linear) + 2 * 4 * 2 * 4 * 9 * 64
    names = [(row.what, row.shape, row.M) for row in MEASURES["prefill"](here)]
    assert names == [
        ("attention INT4 KV", "70 tokens", 1),
        ("attention FP8 KV", "70 tokens", 1),
        ("store", "70 tokens", 1),
        ("FFN", "256x128", 7),
    ]


def test_llama_is_as_large_as_it_is():
    sizes = llama.Sizes()
    assert 32 * sum(N * K for N, K in sizes.shapes) == 6_979_321_856  # embeddings and norms aside
    assert {(N, K) for N, K in sizes.shapes} <= set(run.SHAPES) | {(4096, 4096)}


def test_operands_take_turns_until_no_cache_holds_them(
    here: Stand, monkeypatch: pytest.MonkeyPatch
):
    assert Stand(CPU, 1, 1000).copies(300) == 4
    assert Stand(CPU, 1, 1 << 40).copies(1) == 64
    assert here.copies(300) == 1
    seen: list[dict[str, int]] = []
    monkeypatch.setattr(here, "_cache_bytes", 3 * 128 * 128 // 2)
    clock = here.clock
    monkeypatch.setattr(
        here,
        "clock",
        lambda calls: (seen.append({n: len(c) for n, c in calls.items()}), clock(calls))[1],
    )
    list(linears.time_linears(here, [(128, 128)], [1]))
    assert seen == [
        {"folded": 4, "exact": 4, "W4A16": 4, "folded from x": 4, "float32": 1, "torch fp8": 2}
    ]


@pytest.mark.parametrize("factor", [3.0, float("nan")])
@pytest.mark.parametrize(
    ("module", "name", "section", "message"),
    [
        (int4, "multiply_codes", "kernels", "INT4 product folded 256x128, 1 rows: off by"),
        (
            int4,
            "multiply_gated_codes",
            "kernels",
            "INT4 FFN front gated folded 2x256x128, 1 rows: off by",
        ),
        (int4, "multiply_gated_codes", "prefill", "INT4 FFN 256 x 128, 7 rows: off by"),
        (
            attention_kernels,
            "attend_records",
            "decode",
            "decode attention, 20 tokens, batch 1: off by",
        ),
        (
            attention_kernels,
            "attend_records",
            "prefill",
            "prefill attention INT4 KV, 70 tokens: off by",
        ),
        (attention_kernels, "attend_fp8", "prefill", "prefill attention FP8 KV, 70 tokens: off by"),
    ],
)
def test_what_is_wrong_is_not_timed(
    here: Stand,
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    name: str,
    section: str,
    message: str,
    factor: float,
):
    monkeypatch.setattr(module, name, wrong(getattr(module, name), factor))
    with pytest.raises(QualityError, match=message) as caught:
        list(MEASURES[section](here))
    assert "\n" not in str(caught.value)


def test_a_model_whose_parts_do_not_fit_is_not_timed(here: Stand, monkeypatch: pytest.MonkeyPatch):
    model = partial(llama.time_model, here, SIZES, 1, [9], [2])
    append = attention_kernels.append_records

    def elsewhere(key: Tensor, value: Tensor, *facts: Any) -> None:
        # One token of ten: a key elsewhere alone may go unseen, a value of the wrong sign and size
        # does not.
        append(key.flip(-1), -4 * value.flip(-1), *facts)

    monkeypatch.setattr(attention_kernels, "append_records", elsewhere)
    with pytest.raises(QualityError, match="block with INT4 weights, batch 2, 9 tokens"):
        list(model())
    with pytest.raises(QualityError, match="appending 1 tokens"):
        list(attention.time_decode(here, [20], [1], HEADS))
    monkeypatch.undo()
    quantize = fp8.quantize_tokens

    def half(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        codes, scale = quantize(*arguments, **options)
        return codes, scale * 1.1

    monkeypatch.setattr(fp8, "quantize_tokens", half)
    with pytest.raises(QualityError, match="round to E4M3"):
        list(linears.time_rounding(here, [128], [2]))


def test_peers_that_fail_or_are_wrong_are_left_out(here: Stand):
    x = torch.randn(4, 4)

    def fails() -> Any:
        raise RuntimeError("no such machine\nand more")

    makers = {"right": lambda: [lambda: x], "wrong": lambda: [lambda: 2 * x], "fails": fails}
    for _ in range(2):
        assert list(here.working(makers, x.double())) == ["right"]
    assert here.notes == [
        "wrong: left out (off by 1.0e+00 of the result)",
        "fails: left out (no such machine)",
    ]


def test_targets_are_of_the_lowest_figure(here: Stand, capsys: pytest.CaptureFixture[str]):
    record = here.record()
    assert record.targets() == []
    record.sections = {
        "kernels": [
            figure("folded", 1, 10, 2.5),
            figure("folded", 16, 99, 3.2, 0.8),
            figure("folded", 1, 99, 3.1, 0.7),
        ],
        "decode": [
            figure("attention", 1, 32768, 2.6),
            figure("attention", 1, 1024, 0.1),
            figure("model", 1, 1024, 2.4),
        ],
        "prefill": [
            figure("attention INT4 KV", 1, 64, 1.0),
            figure("FFN", 16384, 9, 1.23),
            figure("FFN", 7, 9, 0.1),
        ],
    }
    record.sections["kernels"] += [figure("exact", 1, 999, 0.1), figure("folded", 2048, 99, 1.5)]
    assert [(t.wanted, t.found, t.met) for t in record.targets()] == [
        (2.0, 2.5, True),
        (3.0, 3.1, True),
        (0.75, 0.7, False),
        (1.4, 1.5, True),
        (1.24, 1.23, False),
        (1.0, 1.0, True),
        (2.5, 2.6, True),
        (2.5, 2.4, False),
    ]
    show(record)
    missed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missed")]
    assert (
        missed[0]
        == "missed: decode linears, largest shapes, of the copy's bandwidth: 0.70, wanted 0.75"
    )
    assert len(missed) == 3
    assert len(record.as_json()["targets"]) == 8


def pq(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments, "--device", "cpu", "--rounds", "1"])


COMMANDS = {
    "kernels": ("kernels", "--shape", "128x256", "--batch", "2", "--ffn-rows", "3"),
    "decode": (
        "decode",
        "--context",
        "20",
        "--batch",
        "2",
        "--layers",
        "1",
        "--model-context",
        "9",
    ),
    "prefill": ("prefill", "--tokens", "20", "--ffn", "256x128", "--ffn-rows", "3"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_print_and_write(name: str, tmp_path: Path):
    results, picture = tmp_path / "in" / "results.json", tmp_path / "roof.svg"
    shown = pq(*COMMANDS[name], "--output", str(results), "--picture", str(picture))
    assert shown.exit_code == 0, shown.output
    for part in (name, "of copy", "of matmul", "x float32", "copy"):
        assert part in shown.stdout
    written = json.loads(results.read_text())
    assert list(written["sections"]) == [name]
    assert written["versions"]["torch"] == torch.__version__
    assert set(written["ceilings"]["matmul"]) == {"float32", "fp8"}
    assert "fp8 ceiling" in picture.read_text()
    printed = json.loads(pq(*COMMANDS[name], "--json").stdout)
    keys = [
        (row["what"], row["shape"], row["M"], row["bytes"]) for row in printed["sections"][name]
    ]
    assert keys == [
        (row["what"], row["shape"], row["M"], row["bytes"]) for row in written["sections"][name]
    ]


@pytest.mark.parametrize(
    ("arguments", "kind", "named"),
    [
        (("kernels", "--shape", "128"), UsageError, "--shape 128"),
        (("kernels", "--shape", "128x100"), UsageError, "multiples of 128"),
        (("prefill", "--ffn", "100x128"), UsageError, "100x128"),
        (("decode", "--picture", "roof.jpeg"), UsageError, "--picture roof.jpeg"),
        (
            (*COMMANDS["prefill"], "--output", "{}/a/b.json"),
            OutputError,
            "b.json: cannot be written",
        ),
        (
            (*COMMANDS["prefill"], "--picture", "{}/a/b.svg"),
            OutputError,
            "b.svg: cannot be written",
        ),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...], kind: type[PqError], named: str, tmp_path: Path
):
    (tmp_path / "a").touch()
    result = pq(*(argument.format(tmp_path) for argument in arguments))
    assert isinstance(result.exception, kind)
    assert named in str(result.exception)
    assert "\n" not in str(result.exception)


def test_kernels_are_right_in_the_interpreter():
    pytest.importorskip("triton")
    code = """
import torch
from quantize.bench.speed import linears
from quantize.bench.speed import llama
from quantize.bench.speed import stand
from quantize.bench.speed.attention import Heads
here = stand.Stand(torch.device("cpu"), 1, 0)
rows = [*linears.time_linears(here, [(128, 128)], [1]), *linears.time_ffn(here, [(128, 128)], [2])]
rows += llama.time_model(here, llama.Sizes(128, 128, 100, Heads(2, 1, 64)), 1, [9], [2])
print(len(rows))
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "6"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_everything_is_replayed_on_a_gpu():
    here = Stand(torch.device("cuda"), 3)
    assert here.ceilings.copy > 1e10
    rows = list(run.kernels(here, [(1024, 4096)], (1, 64), (128,)))
    sizes = llama.Sizes(512, 1024, 1000, Heads(8, 2, 128))
    rows += llama.time_model(here, sizes, 2, [200], [2])
    rows += attention.time_prefill(here, [300], Heads())
    assert all("bf16" in row.peers or "eager" in row.peers for row in rows), here.notes
    assert all(0 < row.bandwidth < 2 for row in rows)
