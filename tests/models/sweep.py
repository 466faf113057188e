"""Put every type of the installed transformers to a list of checks, each in a process of its own.

    PYTHONPATH=tests:. python -m models.sweep out.json            # all types, two at a time
    PYTHONPATH=tests:. python -m models.sweep out.json llama gpt2 # these
    PYTHONPATH=tests:. python -m models.sweep out.json --law      # as `make test-models`
    PYTHONPATH=tests:. python -m models.sweep out.json --shard 1/4 --check models.checks:causal

A crash, a hang or an exhausted memory costs one type its row, and no other. The file is written anew
after every row, so that a sweep that is cut short leaves what it has found.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGE_TEXT,
)

from models import zoo
from models.shrink import default_config
from models.subject import Check, Item, Row, Subject


def all_items() -> list[Item]:
    """Every type of both auto classes."""
    return [Item(name, False) for name in CAUSAL] + [Item(name, True) for name in IMAGE_TEXT]


def examine(item: Item, checks: Iterable[Check], only: str | None = None) -> Row:
    """The row of one type, in this process. only: the kind of model that is put to the checks."""
    row: Row = {"type": item.model_type, "auto": "image-text" if item.image_text else "causal"}
    status = "does not build"
    try:
        with tempfile.TemporaryDirectory(prefix="zoo-") as work:
            subject = Subject(item, Path(work))
            row["class"] = type(subject.model).__name__
            status = "takes more than text"
            zoo.liven(subject.model)
            row |= {"kind": kind(subject), "status": "builds", "checks": {}}
            row["parameters"] = sum(p.numel() for p in subject.model.parameters())
            if checks and only in (None, row["kind"]):
                status = "is not loaded as it was saved"
                subject.require_loaded()
            for check in checks if only in (None, row["kind"]) else ():
                row["checks"][check.__name__] = outcome(check, subject)
    except Exception as error:
        row |= {"status": status, "why": line_of(error), "where": place_of(error)}
    return row


def kind(subject: Subject) -> str:
    """What a model is by what it does; its own default configuration decides, nobody's use of it."""
    config = default_config(subject.item.model_type)
    if getattr(config, "is_encoder_decoder", False):
        return "decoder of an encoder-decoder"
    before, after = zoo.causality(subject.model)
    return "decoder-only" if before < 1e-4 < after else "not causal"


def outcome(check: Check, subject: Subject) -> Row:
    start = time.monotonic()
    try:
        figures = check(subject)
    except Exception as error:
        figures = {"ok": False, "why": line_of(error), "where": place_of(error)}
    return figures | {"seconds": round(time.monotonic() - start, 2)}


def line_of(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def place_of(error: BaseException) -> str:
    """File and line where an error arose, below the packages' folder."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.filename.rpartition('site-packages/')[2]}:{last.lineno}"


def sweep(
    items: Sequence[Item],
    checks: Sequence[Check],
    out: Path,
    workers: int = 2,
    limit: float = 120.0,
    tell: Callable[[str], None] = lambda line: None,
    only: str | None = None,
) -> list[Row]:
    """Examine all items, each in a fork that ends after `limit` seconds, and write their rows to
    `out`. only: as `examine`."""
    rows: dict[Item, Row] = {}
    waiting = list(items)
    running: dict[int, tuple[Item, float, Path]] = {}
    with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
        while waiting or running:
            while waiting and len(running) < workers:
                item = waiting.pop(0)
                place = Path(folder) / str(item)
                running[fork(item, checks, place, only)] = (item, time.monotonic(), place)
            for pid, (item, start, place) in list(running.items()):
                done, state = os.waitpid(pid, os.WNOHANG)
                seconds = time.monotonic() - start
                if not done and seconds < limit:
                    continue
                if not done:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                del running[pid]
                rows[item] = result(item, place, state if done else None)
                rows[item]["seconds"] = round(seconds, 2)
                tell(f"{len(rows)}/{len(items)} {item}: {summary(rows[item])}")
                write(out, [rows[i] for i in items if i in rows])
            time.sleep(0.01)
    return [rows[item] for item in items]


def fork(item: Item, checks: Sequence[Check], place: Path, only: str | None = None) -> int:
    """Start the examination of an item in a copy of this process → its id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        log = os.open(f"{place}.log", os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        row = examine(item, checks, only)
        Path(f"{place}.json").write_text(json.dumps(row), encoding="utf-8")
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def result(item: Item, place: Path, state: int | None) -> Row:
    """What a fork left, or why it left nothing; state: as waitpid gives it, None after the limit."""
    try:
        row: Row = json.loads(Path(f"{place}.json").read_text(encoding="utf-8"))
        return row
    except (OSError, ValueError):
        log = Path(f"{place}.log")
        lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        why = "took too long" if state is None else f"ended with {os.waitstatus_to_exitcode(state)}"
        return {
            "type": item.model_type,
            "auto": "image-text" if item.image_text else "causal",
            "status": "hangs" if state is None else "crashes",
            "why": f"{why}; {lines[-1] if lines else 'it said nothing'}"[:300],
        }


def summary(row: Row) -> str:
    failed = [name for name, figures in row.get("checks", {}).items() if not figures["ok"]]
    if row["status"] != "builds":
        return f"{row['status']}: {row['why']}"
    return f"{row['kind']}, {row['seconds']} s, " + (
        f"not {', '.join(failed)}" if failed else "all checks hold"
    )


def write(out: Path, rows: Sequence[Row]) -> None:
    """Put a file of rows in the place of an earlier one, whole."""
    part = out.with_name(f"{out.name}.part")
    head = {"transformers": transformers.__version__, "torch": str(torch.__version__)}
    part.write_text(json.dumps(head | {"rows": list(rows)}, indent=1), encoding="utf-8")
    part.replace(out)


def named(name: str) -> Check:
    """`module:function` → the function."""
    module, _, function = name.partition(":")
    found: Check = getattr(importlib.import_module(module), function)
    return found


def main() -> None:
    from models.checks import CHECKS

    parser = argparse.ArgumentParser(description="Examine all types of models.")
    parser.add_argument("out", type=Path, help="the JSON file to write")
    parser.add_argument("types", nargs="*", help="these only; TYPE:image-text is the other class")
    parser.add_argument("--shard", default="1/1", help="I/N: every Nth type, from the Ith")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for one type")
    parser.add_argument("--check", action="append", type=named, help="module:function, repeatable")
    parser.add_argument("--only", help="the kind of model to check, such as decoder-only")
    parser.add_argument(
        "--law", action="store_true", help="the checks of models.law, of decoder-only types"
    )
    told = parser.parse_intermixed_args()
    if told.law:
        told.check, told.only = importlib.import_module("models.law").CHECKS, "decoder-only"
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    items = [i for i in all_items() if not told.types or str(i) in told.types]
    if told.types:  # in the order in which they are told
        items.sort(key=lambda item: told.types.index(str(item)))
    first, count = map(int, told.shard.split("/"))
    # Imported once, before the forks.
    importlib.import_module("conftest")
    sweep(
        items[first - 1 :: count],
        told.check or CHECKS,
        told.out,
        told.workers,
        told.limit,
        lambda line: print(line, flush=True),  # noqa: T201
        told.only,
    )


if __name__ == "__main__":
    main()
