"""Conversions beside those of other tools: time, memory and accuracy on one model and text, in turn.

    make bench-peers [PEERS="--model DIR --calibration FILE --text FILE"]

The other tools, pinned below, get environments of their own in .venv-peers (Python 3.11, network). Every tool runs as a
process of its own on the same windows of tokens with the same threads; rounds alternate, and the medians of their
ratios to each round's llm-compressor and AutoRound are printed and kept with the machine and all versions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantize.calibration.tokens import evaluation_tokens
from quantize.model.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = Path(__file__).resolve().parent / "peers"
TORCH = "torch==2.13.0"
PEERS = {"llmcompressor": "llmcompressor==0.14.0", "autoround": "auto-round==0.16.1"}
"""Environment → what is installed in it; one for both does not resolve."""


@dataclass
class Tool:
    """One way to convert the model, and what it took."""

    name: str
    command: list[str]
    """Ends in the output folder's place, {out}."""
    environment: dict[str, str] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    """Seconds of all cores together."""
    peak: list[int] = field(default_factory=list)
    """Bytes resident at most."""
    quality: dict[str, Any] = field(default_factory=dict)

    def run(self, output: Path, threads: int) -> None:
        """Convert once; ends the benchmark with the tool's own last lines where it fails."""
        shutil.rmtree(output, ignore_errors=True)
        for beside in output.parent.glob(f"{output.name}.*"):
            shutil.rmtree(beside, ignore_errors=True) if beside.is_dir() else beside.unlink()
        asked = [part.format(out=output) for part in self.command]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)} | self.environment
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # all from compiled modules, as installed
        log = output.with_suffix(".log")
        with log.open("w") as file:
            started = time.perf_counter()
            process = subprocess.Popen(
                asked, env=environment, cwd=output.parent, stdout=file, stderr=subprocess.STDOUT
            )
            _, status, used = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - started
        if status:
            last = "\n".join(log.read_text().splitlines()[-8:])
            sys.exit(f"{self.name} failed, all of it in {log}:\n{last}")
        self.seconds.append(seconds)
        self.processor.append(used.ru_utime + used.ru_stime)
        self.peak.append(used.ru_maxrss * 1024)


def environment(folder: Path, name: str, python: str) -> Path:
    """The Python of a peer's environment, which is made where it is missing."""
    made = folder / name / "bin" / "python"
    if not (folder / name / ".ready").exists():
        subprocess.run([python, "-m", "venv", "--clear", str(folder / name)], check=True)
        for wanted in (TORCH, PEERS[name]):
            subprocess.run([str(made), "-m", "pip", "install", "--quiet", wanted], check=True)
        (folder / name / ".ready").touch()
    return made


def versions(python: Path | str, packages: list[str]) -> str:
    """Versions of packages as an interpreter finds them, in words."""
    ask = (
        "import importlib.metadata as m, json, sys; "
        "print(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"
    )
    out = subprocess.run(
        [str(python), "-c", ask, *packages], check=True, capture_output=True, text=True
    )
    found: dict[str, str] = json.loads(out.stdout)
    return ", ".join(f"{package} {version}" for package, version in found.items())


def pq(*arguments: str) -> list[str]:
    """The command line of this checkout's pq."""
    return [sys.executable, "-m", "quantize", *arguments]


def quality(output: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Perplexity and divergence of a converted model from its parent."""
    asked = pq("eval", str(output), "--baseline", str(args.model), "--dataset", str(args.text))
    asked += ["--seqlen", str(args.seqlen), "--max-windows", str(args.windows), "--json"]
    asked += ["--device", "cpu", "--dtype", "float32"]
    out = subprocess.run(
        asked,
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    found: dict[str, Any] = json.loads(out.stdout)
    return found


def table(results: dict[str, Any]) -> str:
    """The rows of a results file as a table."""
    peers = list(results["rows"][0]["ratios"])
    lines = [
        "| tool | time | "
        + " | ".join(f"× {peer}" for peer in peers)
        + " | peak memory | KLD | perplexity |"
    ]
    lines.append("|---" + "|---:" * (len(peers) + 4) + "|")
    for row in results["rows"]:
        ratios = " | ".join(f"{row['ratios'][peer]:.2f}" for peer in peers)
        lines.append(
            f"| {row['tool']} | {row['seconds']:.0f} s | {ratios} | {row['peak_gb']:.2f} GB | "
            f"{row['kld']:.5f} ± {row['kld_error']:.5f} | {row['perplexity']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print one line a tool and keep the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "eval" / "reference-model")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--text", default="builtin")
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=80, help="of AutoRound")
    parser.add_argument("--recipes", nargs="*", default=["gptq", "fireq-linear", "fireq", "sbvr"])
    parser.add_argument(
        "--python", default="python3.11", help="that the peers' environments are of"
    )
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv-peers")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "peers")
    parser.add_argument("--output", type=Path, default=ROOT / "eval" / "results" / "peers.json")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.model = args.model.resolve()
    for text in ("calibration", "text"):
        if (path := Path(getattr(args, text))).exists():
            setattr(args, text, path.resolve())
    pythons = {name: environment(args.environments, name, args.python) for name in PEERS}
    tokens = evaluation_tokens(
        load_tokenizer(args.model),
        dataset=str(args.calibration),
        seqlen=args.seqlen,
        max_windows=args.nsamples,
    ).tokens
    windows = args.work.resolve() / "windows.json"
    windows.write_text(json.dumps(tokens.tolist()))
    given = (str(args.model), str(windows), "{out}")
    tools = [
        Tool(
            "llm-compressor GPTQ W4A16",
            [str(pythons["llmcompressor"]), str(SCRIPTS / "run_llmcompressor.py"), *given],
        ),
        Tool(
            f"AutoRound W4A16, {args.iterations} iterations",
            [
                *(str(pythons["autoround"]), str(SCRIPTS / "run_autoround.py"), *given),
                str(args.iterations),
            ],
        ),
    ]
    convert = ["--dataset", str(args.calibration), "--nsamples", str(args.nsamples)]
    convert += ["--seqlen", str(args.seqlen), "--device", "cpu"]
    for recipe in args.recipes:
        asked = pq("convert", "-m", str(args.model), "-r", recipe, "-o", "{out}", *convert)
        ours = {"PYTHONPATH": str(ROOT), "PQ_NO_VERSION_NOTICE": "1"}
        tools.append(Tool(f"pq {recipe}", asked, ours))
        if recipe == "fireq-linear":
            tools.append(
                Tool(f"pq {recipe}, 16-bit inputs", [*asked, "--set", "activations=none"], ours)
            )
    for round_ in range(args.rounds):
        for number, tool in enumerate(tools):
            output = args.work.resolve() / f"tool{number}"
            tool.run(output, args.threads)
            if not round_:
                tool.quality = quality(output, args)
            print(f"round {round_ + 1}: {tool.name} {tool.seconds[-1]:.1f} s", flush=True)
        keep(args, tools, pythons)
    for row in json.loads(args.output.read_text())["rows"]:
        print(
            f"{row['tool']:<36} {row['seconds']:7.1f} s {row['peak_gb']:5.2f} GB  KLD {row['kld']:.5f}  "
            + "  ".join(f"{ratio:.2f} x {name}" for name, ratio in row["ratios"].items())
        )


def keep(args: argparse.Namespace, tools: list[Tool], pythons: dict[str, Path]) -> None:
    """Write the results file; after each round, so that a stopped run keeps what it measured."""
    peers = {"llm-compressor GPTQ": tools[0], "AutoRound": tools[1]}
    rows = [
        {
            "tool": tool.name,
            "seconds": statistics.median(tool.seconds),
            "processor_seconds": statistics.median(tool.processor),
            "peak_gb": statistics.median(tool.peak) / 1e9,
            "rounds": len(tool.seconds),
            "ratios": {
                name: statistics.median(
                    ours / theirs for ours, theirs in zip(tool.seconds, peer.seconds, strict=True)
                )
                for name, peer in peers.items()
            },
            "kld": tool.quality["kld_mean"],
            "kld_error": tool.quality["kld_stderr"],
            "perplexity": tool.quality["perplexity"],
        }
        for tool in tools
    ]
    common = ["torch", "transformers", "compressed-tensors"]
    results = {
        "protocol": f"{args.nsamples} x {args.seqlen} tokens of {Path(args.calibration).name}, the same for all; "
        f"whole processes with {args.threads} threads, tools in turn; KLD on {args.windows} windows of "
        f"{Path(args.text).name} in float32",
        "model": args.model.name,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} threads",
        "versions": {
            "with pq": versions(sys.executable, ["torch", "transformers"]),
            "in llm-compressor's environment": versions(
                pythons["llmcompressor"], ["llmcompressor", *common]
            ),
            "in AutoRound's": versions(pythons["autoround"], ["auto-round", *common[:2]]),
        },
        "rows": rows,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
