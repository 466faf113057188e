"""What is emitted, before vLLM's own configuration class; minutes, and only where vLLM is installed."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from drafts import REFERENCE, rounded

from quantize.draft.emit import lengths_by_batch, speculative_config
from quantize.draft.pays import Pay
from quantize.draft.replay import Interval

ROOT = Path(__file__).resolve().parents[2]
ENGINE = Path(os.environ.get("PQ_VLLM", ROOT / ".venv-vllm")) / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not ENGINE.exists(),
        reason=f"no vLLM at {ENGINE}; make test-vllm makes one, PQ_VLLM names another",
    ),
]

_ASK = """
import json, sys
from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup as dense
found = []
for asked in json.loads(sys.argv[2]):
    config = SpeculativeConfig(
        **asked,
        target_model_config=ModelConfig(model=sys.argv[1], dtype="bfloat16"),
        target_parallel_config=ParallelConfig(),
    )
    ranges = config.num_speculative_tokens_per_batch_size
    found.append({
        "method": config.method,
        "tokens": config.num_speculative_tokens,
        "sampled": config.draft_sample_method,
        "lengths": ranges and dense(ranges, 256, config.num_speculative_tokens),
        "rates": config.synthetic_acceptance_rates,
    })
print("FOUND " + json.dumps(found))
"""


def test_vllm_takes_what_is_emitted(tmp_path: Path):
    draft = rounded(tmp_path / "w4", 4)
    paid = [Pay(b, 0.5, g, Interval(1.2), True) for b, g in ((1, 5), (8, 5), (32, 3), (128, 0))]
    ranges, most = lengths_by_batch(paid)
    configs = [
        speculative_config(draft, most, by_batch=ranges),
        speculative_config(None, 4),
        speculative_config(draft, 2, synthetic=[0.91234, 0.8]),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [str(ENGINE), "-c", _ASK, str(REFERENCE), json.dumps(configs)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd="/",
    )
    line = next(x for x in done.stdout.splitlines() if x.startswith("FOUND "))
    model, lookup, synthetic = json.loads(line.removeprefix("FOUND "))
    assert (model["method"], model["tokens"], model["sampled"]) == (
        "draft_model",
        5,
        "probabilistic",
    )
    assert [model["lengths"][b] for b in (1, 8, 9, 32, 33, 256)] == [5, 5, 3, 3, 1, 1]
    assert (lookup["method"], lookup["tokens"]) == ("ngram", 4)
    assert synthetic["rates"] == [0.9123, 0.8]
