"""The main path with the newest releases of what pq depends on, in an environment of them: `make smoke-newest`.

    python eval/smoke_newest.py --locked .venv/bin/python

Converts the reference model with fireq.yaml, loads the result in transformers, generates with its INT4 KV cache (and
looks whether that cache was used), and measures its perplexity. First it prints what is newer than the lock files.

A failure is run again with the interpreter of the locked environment. Where that succeeds, the newer releases are to
blame: a warning names them and the exit code is 0, since what users of the lock install is sound. Where it fails too,
or where nothing is newer, the fault is pq's: the exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "eval" / "reference-model"
PROMPT = "The Python interpreter"
NEW_TOKENS = 24  # some, for the INT4 cache to grow step by step
LIMIT = 600
"""Seconds for a whole smoke: a release that makes it wait for ever is told like one that makes it fail."""


def locked_versions(folder: Path) -> dict[str, str]:
    """Version of each package in the lock files, of those meant for this interpreter and machine."""
    found: dict[str, str] = {}
    for file in sorted(folder.glob("*.txt")):
        text = file.read_text(encoding="utf-8")
        for line in re.findall(r"^([a-zA-Z0-9].*?) *\\?$", text, re.MULTILINE):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate():
                pinned = next(iter(requirement.specifier)).version
                found[canonicalize_name(requirement.name)] = pinned
    return found


def newer(locked: Mapping[str, str]) -> list[str]:
    """`name old -> new` for each installed package whose release is newer than the locked one."""
    lines = []
    for name, old in sorted(locked.items()):
        try:
            new = Version(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue  # a development tool, or what a GPU needs
        if Version(new.public) > Version(old):  # 2.13.0+cpu is no newer than 2.13.0
            lines.append(f"{name} {old} -> {new.public}")
    return lines


def convert(folder: Path) -> None:
    """Pack the reference model with the shipped recipe."""
    pq("convert", "--model", MODEL, "--recipe", "fireq", "--output", folder / "packed",
       "--nsamples", 8, "--seqlen", 128)  # fmt: skip


def generate(folder: Path) -> None:
    """Load the packed model in transformers and generate: its INT4 cache must be what holds the tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import quantize  # noqa: F401 - registers pq's format

    model = AutoModelForCausalLM.from_pretrained(folder / "packed", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "packed")
    tokens = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    made = model.generate(
        tokens, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True
    )
    caches = [value for value in made.values() if hasattr(value, "layers")]
    kinds = sorted({type(layer).__name__ for cache in caches for layer in cache.layers})
    held = caches[0].get_seq_length() if caches else 0
    print(f"  {made.sequences.shape[1]} tokens, {held} of them in layers of {', '.join(kinds)}")
    if not kinds or any("Int4" not in kind for kind in kinds):
        raise SystemExit(f"the model does not use its INT4 cache but {', '.join(kinds) or 'none'}")
    if held < NEW_TOKENS:
        raise SystemExit(
            f"the INT4 cache holds {held} tokens where {NEW_TOKENS} and more were made"
        )


def evaluate(folder: Path) -> None:
    """Perplexity of the packed model beside its parent's."""
    text = pq("eval", folder / "packed", "--baseline", MODEL, "--max-windows", 4, "--json")
    measured = json.loads(text)
    perplexity, parent = measured["perplexity"], measured["baseline_perplexity"]
    print(f"  perplexity {perplexity:.3f}, parent {parent:.3f}")
    if not (math.isfinite(perplexity) and perplexity < 1.2 * parent):
        raise SystemExit(f"perplexity {perplexity:.3f} is far from the parent's {parent:.3f}")


STEPS: dict[str, Callable[[Path], None]] = {
    "convert": convert,
    "load and generate": generate,
    "eval": evaluate,
}


def pq(*arguments: object) -> str:
    """Run the command with this interpreter; what it prints, or SystemExit with the end of its errors."""
    command = [sys.executable, "-m", "quantize", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        end = "\n".join((done.stderr + done.stdout).strip().splitlines()[-15:])
        raise SystemExit(f"pq {arguments[0]} ended with code {done.returncode}:\n{end}")
    return done.stdout


def take_steps() -> None:
    """Take all steps in this process; the first that fails ends it."""
    with tempfile.TemporaryDirectory() as folder:
        for name, step in STEPS.items():
            print(f"{name} …", flush=True)
            step(Path(folder))


def smoke(python: Path | str) -> bool:
    """Take all steps with an interpreter; whether they succeeded. Their output goes to ours."""
    command = [str(python), str(Path(__file__).resolve()), "--steps"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(command, env=environment, stderr=subprocess.STDOUT, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        print(f"not done in {LIMIT} seconds")
        return False
    return done.returncode == 0


def verdict(
    ahead: list[str], locked: Path | None, run: Callable[[Path | str], bool] = smoke
) -> int:
    """Run the smoke, find out who is to blame if it fails, say so; the exit code."""
    print(
        f"{len(ahead)} packages are newer than in .ci/locks/:"
        if ahead
        else "Nothing is newer than in .ci/locks/."
    )
    print("".join(f"  {line}\n" for line in ahead), flush=True, end="")
    if run(sys.executable):
        print("smoke-newest: passed")
        return 0
    if not ahead:
        print("smoke-newest: FAILED, and no package is newer than in .ci/locks/: the fault is pq's")
        return 1
    if locked is None:
        print(
            "smoke-newest: FAILED; with --locked PYTHON it could tell whether the newer releases are to blame"
        )
        return 1
    print("Once more with the locked releases, to see who is to blame:", flush=True)
    if not run(locked):
        print("smoke-newest: FAILED with the locked releases as well: the fault is pq's")
        return 1
    bar = "!" * 78
    names = "\n".join(f"!   {line}" for line in ahead)
    print(
        f"{bar}\n! smoke-newest: WARNING: pq works with the locked releases, not with newer ones.\n"
        f"! One of these broke it (its output stands above):\n{names}\n"
        "! pq says so to whoever has them (quantize/tested.json); mend it before the next `make lock`.\n"
        f"{bar}"
    )
    return 0


def main() -> None:
    """Compare versions, run the smoke, exit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--locked", type=Path, help="interpreter of the locked environment")
    parser.add_argument("--steps", action="store_true", help="take the steps here, with no verdict")
    args = parser.parse_args()
    if args.steps:
        take_steps()
    else:
        sys.exit(verdict(newer(locked_versions(ROOT / ".ci" / "locks")), args.locked))


if __name__ == "__main__":
    main()
