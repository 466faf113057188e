"""Groups that give way, together with what else a conversion does: resuming, restructuring, a target of
bits, a gate."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conversion.test_group_sizes import ODD, difference, entries, logits, request, stock
from resumed import files_of
from rows import ARCHITECTURES

from quantize.conversion.estimate import estimate
from quantize.conversion.loop import convert
from quantize.conversion.serving import fused
from quantize.errors import StoppedError
from quantize.evaluation import evaluate
from quantize.inspect.inspection import inspect
from quantize.model.load import load_model
from quantize.verification import verify

CPU = torch.device("cpu")
Maker = Callable[..., Path]
TWO_BLOCKS = ODD | {"num_hidden_layers": 2}
UNEVEN = ODD | {"hidden_size": 104, "num_attention_heads": 4, "intermediate_size": 176}
"""As near as transformers' own product of experts comes: its rows are of whole 16 bytes."""


@pytest.mark.parametrize(
    "body", ["stages: [{method: gptq}]", "stages: [{method: fireq, sweeps: 1}]"]
)
def test_a_stopped_conversion_of_whole_rows_goes_on_to_the_same_bytes(
    tiny: Maker, text_file: Path, tmp_path: Path, body: str
):
    once = request(tiny("llama", **TWO_BLOCKS), tmp_path / "once", text_file, body)
    summary = convert(once)
    again = replace(once, output=tmp_path / "again", work=tmp_path / "work", resume="auto")
    for _ in range(2):
        with pytest.raises(StoppedError):
            convert(again, stop=lambda: True)
    resumed = convert(again)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "once")
    assert (resumed.adapted, resumed.unserved) == (summary.adapted, summary.unserved)
    assert resumed.bits_per_weight == summary.bits_per_weight


@pytest.mark.parametrize(
    "stages", ["{method: rtn}", "{method: gptq}", "{method: fireq, sweeps: 0}"]
)
def test_experts_that_were_a_dense_ffn(tiny: Maker, text_file: Path, tmp_path: Path, stages: str):
    quick = "policy: top-k, mean_experts: 1.0, shared: 48, experts: 4, steps: 2, batch_tokens: 32"
    model, out = tiny("llama", **UNEVEN), tmp_path / "out"
    body = f"stages: [{{method: ladimo, {quick}}}, {stages}]"
    summary = convert(request(model, out, text_file, body))
    routed = {entry for name, entry in entries(out).items() if ".experts." in name}
    assert routed == {("channel", None, False)}  # transformers makes one tensor of them
    assert not summary.lost
    assert difference(stock(out), logits(load_model(out, CPU, torch.float32, "stock"))) < 0.01
    checked = verify(out, model)
    assert checked.ok, checked.first_failure
    args = {"dataset": str(text_file), "seqlen": 32, "max_windows": 2}
    assert evaluate(out, model, **args).kld_mean < 10


@pytest.mark.parametrize("method", ["{method: rtn}", "{method: fireq, sweeps: 0}"])
def test_a_target_on_whole_rows(tiny: Maker, text_file: Path, tmp_path: Path, method: str):
    """Rows of 100 and 172 codes end within a word, which counts."""
    model = tiny("llama", **TWO_BLOCKS | {"intermediate_size": 256})
    asked = request(model, tmp_path / "out", text_file, f"stages: [{method}]")
    asked = replace(asked, target_bpw=6.0)
    told = estimate(asked, timed=False)
    summary = convert(asked)
    assert summary.promoted
    assert 5 < summary.bits_per_weight <= 6
    totals = inspect(tmp_path / "out").totals
    assert totals.quantized_bits_per_weight == pytest.approx(summary.bits_per_weight)
    allocation = json.loads((tmp_path / "out/pq.json").read_text())["allocation"]
    assert allocation["bits_per_weight"] == pytest.approx(summary.bits_per_weight)
    assert told.output == pytest.approx(totals.tensor_bytes, abs=20_000)
    found = entries(tmp_path / "out")
    for together in fused(ARCHITECTURES["llama"], found):
        assert len({found[name] for name in together}) == 1, together
    ours = logits(load_model(tmp_path / "out", CPU, torch.float32, "stock"))
    assert difference(stock(tmp_path / "out"), ours) < 1e-5
    assert verify(tmp_path / "out", model).ok
