"""Launches of several processes that work together, forked, because starting Python anew takes longer than that."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from resumed import files_of, whole

from quantize import cli
from quantize.conversion.loop import Request, convert
from quantize.parallel.launch import join

REMEDY = "start again"
HANGS = 1800.0
"""Seconds after which a test gives up on processes. Nothing is measured by it: a busy machine may take minutes."""


HELD = """
import sys, time
from pathlib import Path
from quantize.cli import main
from quantize.conversion.conversion import Conversion

go, real = Path(sys.argv.pop(1)), Conversion.block

def block(*arguments):
    while not go.exists():
        time.sleep(0.01)
    return real(*arguments)

Conversion.block = block
main()
"""
"""A script: `pq`, which waits before each block until the file in front of its arguments is there."""


@dataclass(frozen=True)
class Launch:
    """Running processes, by rank, and the files of what they say on stderr."""

    ids: list[int]
    said: list[Path]

    def wait(self, seconds: float = HANGS) -> list[int]:
        """Exit codes by rank, those of signals negative; TimeoutError, and no process left, if they hang."""
        codes: dict[int, int] = {}
        until = time.monotonic() + seconds
        while len(codes) < len(self.ids):
            for rank, number in enumerate(self.ids):
                if rank not in codes:
                    ended, status = os.waitpid(number, os.WNOHANG)
                    if ended:
                        codes[rank] = os.waitstatus_to_exitcode(status)
            if time.monotonic() > until:
                for rank in set(range(len(self.ids))) - codes.keys():
                    os.kill(self.ids[rank], signal.SIGKILL)
                    os.waitpid(self.ids[rank], 0)
                raise TimeoutError(f"of {len(self.ids)} ranks these ended: {codes}; {self.texts()}")
            time.sleep(0.01)
        return [codes[rank] for rank in range(len(self.ids))]

    def texts(self) -> list[str]:
        """What each rank said on stderr so far, but for the line that a conversion begins with."""
        lines = (path.read_text().splitlines(keepends=True) for path in self.said)
        return [
            "".join(line for line in said if not line.startswith("pq: converts ")) for said in lines
        ]


def launch(size: int, work: Callable[[int], None], folder: Path) -> Launch:
    """Start ranks that call `work` with their number; what they say goes to files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    said = [folder / f"said-{rank}" for rank in range(size)]
    ids = []
    for rank in range(size):
        number = os.fork()
        if not number:
            try:
                several = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
                os.environ.update(
                    {name: str(value) for name, value in several.items()} if size > 1 else {}
                )
                os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
                handle = os.open(said[rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(handle, 2)
                sys.stderr = os.fdopen(2, "w", buffering=1)
                # Makes torch's pool anew, which is lost in a fork; threads that do so at once would fail.
                torch.set_num_threads(torch.get_num_threads())
                os._exit(_code(lambda rank=rank: work(rank)))  # type: ignore[misc]
            finally:
                os._exit(99)
        ids.append(number)
    return Launch(ids, said)


def _code(work: Callable[[], None]) -> int:
    try:
        work()
    except SystemExit as left:
        return 0 if left.code is None else int(str(left.code))
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 98
    return 0


def together(size: int, asked: Request, folder: Path) -> None:
    """Convert by the library with several ranks."""

    def work(rank: int) -> None:
        with join(REMEDY, lambda err: os._exit(97)) as ranks:
            convert(replace(asked, ranks=ranks))

    running = launch(size, work, folder)
    assert running.wait() == [0] * size, running.texts()


def same(asked: Request, tmp_path: Path, sizes: tuple[int, ...] = (2, 3)) -> None:
    """Compare every byte, and see that the other ranks leave nothing."""
    expected = whole(asked)
    for size in sizes:
        ours = replace(asked, output=tmp_path / f"out{size}")
        together(size, ours, tmp_path / f"said{size}")
        found = files_of(ours.output)
        assert found.keys() == expected.keys()
        assert not [name for name, content in expected.items() if found[name] != content]
    written = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert written == {"whole"} | {f"{kind}{size}" for size in sizes for kind in ("out", "said")}


def pq(
    size: int,
    arguments: Sequence[object],
    folder: Path,
    before: Callable[[int], None] | None = None,
) -> Launch:
    """Start `pq` with several ranks; before: called in each of them first."""

    def work(rank: int) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["pq", *map(str, arguments)]
        if before is not None:
            before(rank)
        cli.main()

    return launch(size, work, folder)
