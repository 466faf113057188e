"""Everything worth doing on a GPU that is lent for minutes: `make gpu-session OUT=DIR` (9 minutes at most).

    python eval/gpu_session.py --output DIR [--list] [--limit 540]

Steps run one after the other, each in a process group of its own with a time limit of its own: the
kernels' tests on the device, checkpoints of all formats and `pq verify --kernels` on them, then
speed at the shapes of Llama-3-8B. What a step prints goes to DIR/NN-name.log as it comes, figures to
DIR/NAME.json and .svg, and DIR/session.json says after each step how it ended: a session that is
cut short keeps what it has.

Speed is not measured where correctness failed. Where a test was merely too slow it is: the
benchmarks compare each kernel with its twin before they time it.

Exit codes: 0 all steps ended well, 1 some did not, 3 there is no usable GPU (or Python packages are
missing), and nothing was run. (Under make, each of the last two is make's own 2.)
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "eval" / "reference-model"
RECIPES = ("fireq", "sbvr", "fireq-sbvr", "ladimo-fireq", "rtn")
"""Together they write every packed layout: integers, bit vectors, INT4 caches, experts, compressed-tensors."""
SHAPES = ("6144x4096", "4096x4096", "14336x4096", "4096x14336")
"""Outputs x inputs of Llama-3-8B's linears: q, k and v together; o; gate and up; down."""
NEEDED = (
    *("torch", "triton", "transformers", "compressed_tensors", "safetensors", "scipy"),
    *("pydantic", "yaml", "typer", "rich", "matplotlib", "pytest", "xdist", "hypothesis"),
)
"""What the steps import; `datasets` and `lm_eval` are not among it."""
NO_GPU = 3
GRACE = 3.0
"""Seconds between asking a step to end and ending it."""
TAIL = 2000
"""Characters of each log that session.json repeats."""


@dataclass(frozen=True)
class Step:
    """One thing to do."""

    name: str
    command: tuple[str, ...]
    limit: float
    """Seconds."""
    kind: str = "correctness"
    """correctness, preparation (of what another step checks) or speed."""


@dataclass
class Outcome:
    """How a step ended."""

    name: str
    kind: str
    status: str
    """ok, failed, timed out, skipped or stopped."""
    seconds: float = 0.0
    reason: str = ""
    tail: str = ""
    """The end of what it printed."""


def session_steps(output: Path, work: Path) -> list[Step]:
    """What there is to do; the limits come to nine minutes. work: a folder for checkpoints."""
    python, me = sys.executable, str(Path(__file__).resolve())
    pq = (python, "-m", "quantize")
    shapes = [word for shape in SHAPES for word in ("--shape", shape)]

    def bench(what: str, limit: float, name: str, *options: str) -> Step:
        figures = output / name
        results = ("--output", f"{figures}.json", "--picture", f"{figures}.svg")
        return Step(name, (*pq, "bench", what, *options, *results), limit, "speed")

    tests = ("-q", "-n", "8", "--dist", "load", "-m", "gpu", "-p", "no:cacheprovider")
    return [
        Step("kernel-tests", (python, "-m", "pytest", *tests, *gpu_tests()), 120),
        Step("convert", (python, me, "--convert", str(work)), 60, "preparation"),
        Step("verify", (python, me, "--verify", str(work)), 60),
        bench("kernels", 110, "int4-fp8", *shapes),
        Step("sbvr", (*pq, "bench", "multiply", "--device", "cuda", "--json"), 30, "speed"),
        bench("decode", 40, "decode-attention", "--layers", "0"),
        bench("prefill", 50, "prefill", "--ffn", "14336x4096"),
        bench("decode", 70, "decode-model", "--context", "1024", "--layers", "32"),
    ]


def gpu_tests() -> list[str]:
    """Test files that hold tests for a GPU: others would only be collected, with all that they import."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = re.compile(r"mark\.gpu\b|\bimport interpreted|from \S*interpreted import")
    return [str(f) for f in files if marked.search(f.read_text(encoding="utf-8"))]


# Running steps


class Session:
    """Runs steps in order and keeps DIR/session.json true after each."""

    def __init__(self, output: Path, limit: float) -> None:
        self.output, self.limit = output, limit
        self.started = time.monotonic()
        self.outcomes: list[Outcome] = []
        self.stopped = False
        self._group: int | None = None

    def run(self, steps: Sequence[Step]) -> bool:
        """Run them all, or say why not; whether all ended well."""
        self.output.mkdir(parents=True, exist_ok=True)
        before = {
            number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            for number, step in enumerate(steps, start=1):
                reason = self._obstacle(step)
                log = self.output / f"{number:02}-{step.name}.log"
                outcome = Outcome(step.name, step.kind, "skipped", reason=reason)
                if not reason:
                    outcome = self._take(step, log)
                self.outcomes.append(outcome)
                self._write()
                print(line(outcome), flush=True)
        finally:
            for known, handler in before.items():
                signal.signal(known, handler)
        return all(outcome.status == "ok" for outcome in self.outcomes)

    def _obstacle(self, step: Step) -> str:
        if self.stopped:
            return "the session was stopped"
        if self.limit - (time.monotonic() - self.started) < 1:
            return f"the session's {self.limit:.0f} seconds are over"
        failed = [o for o in self.outcomes if o.status == "failed" and o.kind == "correctness"]
        if step.kind == "speed" and failed:
            return f"{failed[0].name} failed"
        return ""

    def _take(self, step: Step, log: Path) -> Outcome:
        left = self.limit - (time.monotonic() - self.started)
        limit = min(step.limit, left)
        began = time.monotonic()
        path = os.environ.get("PYTHONPATH")
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{path}" if path else str(ROOT),
            "PYTHONUNBUFFERED": "1",  # what is printed before a limit is reached stands in the log
        }
        with log.open("wb") as stream:
            try:
                process = subprocess.Popen(
                    step.command,
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as err:
                reason = f"{step.command[0]}: {err.strerror}"
                return Outcome(step.name, step.kind, "failed", reason=reason)
            self._group = process.pid
            if self.stopped:  # the signal came while the step was being started
                signal_group(process.pid, signal.SIGKILL)
            try:
                code = process.wait(limit)
                status, reason = ("ok", "") if code == 0 else ("failed", f"exit code {code}")
            except subprocess.TimeoutExpired:
                status, reason = "timed out", f"after {limit:.0f} seconds"
            finally:
                self._group = None
                end_group(process)
        if self.stopped:
            status, reason = "stopped", "by a signal"
        seconds = round(time.monotonic() - began, 1)
        return Outcome(step.name, step.kind, status, seconds, reason, tail(log))

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        if self._group is not None:
            signal_group(self._group, signal.SIGKILL)

    def _write(self) -> None:
        facts = {
            "seconds": round(time.monotonic() - self.started, 1),
            "steps": [asdict(outcome) for outcome in self.outcomes],
        }
        whole = self.output / "session.json.part"
        whole.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        whole.replace(
            self.output / "session.json"
        )  # at every moment one or the other is there, whole


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a step with all that it started, gently where it lets us: a benchmark may be writing its figures."""
    if process.poll() is None:
        signal_group(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    signal_group(process.pid, signal.SIGKILL)  # children that outlived it as well
    process.wait()


def signal_group(group: int, number: int) -> None:
    """Send a signal to all processes of a group, if any is left."""
    with suppress(ProcessLookupError):
        os.killpg(group, number)


def tail(log: Path) -> str:
    """The last characters of a log."""
    return log.read_bytes()[-4 * TAIL :].decode(errors="replace")[-TAIL:]


def line(outcome: Outcome) -> str:
    """One row of the closing table."""
    return f"{outcome.name:<18} {outcome.status:<10} {outcome.seconds:>7.1f} s  {outcome.reason}".rstrip()


# Steps of this file's own


def in_parallel(commands: dict[str, Sequence[str]]) -> dict[str, int]:
    """Run commands side by side (the model is tiny: most of a run is imports); their exit codes."""
    running = {name: subprocess.Popen(command, cwd=ROOT) for name, command in commands.items()}
    codes = {name: process.wait() for name, process in running.items()}
    for name, code in codes.items():
        print(f"{name}: {'ok' if code == 0 else f'exit code {code}'}", flush=True)
    return codes


def convert_all(work: Path, device: str = "cuda") -> bool:
    """Convert the reference model with a recipe of each layout."""
    pq = (sys.executable, "-m", "quantize", "convert", "--model", str(MODEL), "--device", device)
    sizes = ("--nsamples", "16", "--seqlen", "256")
    codes = in_parallel(
        {name: (*pq, "--recipe", name, "--output", str(work / name), *sizes) for name in RECIPES}
    )
    return not any(codes.values())


def verify_all(work: Path, device: str = "cuda") -> bool:
    """Run the kernels on each checkpoint that is there. False if one is wrong, or none is there."""
    there = [name for name in RECIPES if (work / name).is_dir()]
    for name in sorted(set(RECIPES) - set(there)):
        print(f"{name}: not verified, for it was not converted")
    pq = (sys.executable, "-m", "quantize", "verify", "--kernels", "--device", device)
    codes = in_parallel({name: (*pq, str(work / name)) for name in there})
    return bool(codes) and not any(codes.values())


# The command


def obstacle() -> str:
    """Why no session can be held here; empty where it can."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return f"{sys.executable} lacks {', '.join(missing)}: install them or give another PYTHON="
    program = (
        "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if done.returncode:
        return f"torch cannot be imported: {done.stderr.strip().splitlines()[-1]}"
    if not done.stdout.strip():
        return "there is no GPU that torch can use on this machine"
    print(f"GPU: {done.stdout.strip()}", flush=True)
    return ""


def main() -> None:
    """Hold the session, or take one of its steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("out/gpu"), help="folder for all results"
    )
    parser.add_argument("--limit", type=float, default=540, help="seconds for all steps together")
    parser.add_argument("--list", action="store_true", help="print the steps and run nothing")
    parser.add_argument("--convert", type=Path, metavar="DIR", help="take only this step")
    parser.add_argument("--verify", type=Path, metavar="DIR", help="take only this step")
    args = parser.parse_args()
    if args.convert or args.verify:
        sys.exit(not (convert_all(args.convert) if args.convert else verify_all(args.verify)))
    output = args.output.resolve()
    if args.list:
        for number, step in enumerate(session_steps(output, Path("WORK")), start=1):
            print(
                f"{number:02} {step.name} ({step.kind}, {step.limit:.0f} s): {' '.join(step.command)}"
            )
        return
    if reason := obstacle():
        print(f"gpu-session: {reason}; nothing was run", file=sys.stderr)
        sys.exit(NO_GPU)
    with tempfile.TemporaryDirectory() as work:
        session = Session(output, args.limit)
        good = session.run(session_steps(output, Path(work)))
    print("", *map(line, session.outcomes), f"all of it in {output}", sep="\n")
    sys.exit(not good)


if __name__ == "__main__":
    main()
