"""`pq convert --resume`: signals, exit codes, the log, and what is said on stderr."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ModelMaker
from processes import HANGS, HELD
from resumed import BLOCKS, files_of, model_of

from quantize.cli.common import stop_on_signals
from quantize.conversion import loop as convert_module
from quantize.files.resume import StateFolder

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Shells start what runs in the background with SIGINT ignored, which a conversion then does, too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def command(tiny: ModelMaker, text_file: Path, tmp_path: Path) -> list[object]:
    model = [
        "--model",
        model_of(tiny, "gptq"),
        "--output",
        tmp_path / "out",
        "--device",
        "cpu",
        "--recipe",
        "gptq",
    ]
    return ["convert", *model, "--dataset", text_file, "--nsamples", 6, "--seqlen", 32]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_block(
    pq: Call,
    command: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
):
    usual = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        real = convert_module.Conversion.block

        def block(self: Any, index: int, streams: Any) -> Any:
            os.kill(os.getpid(), number)
            return real(self, index, streams)

        patched.setattr(convert_module.Conversion, "block", block)
        code, out, err = pq(*command)
    assert (code, out) == (75, "")
    assert f"pq: stopped after block 1 of {BLOCKS}; the same command goes on from there" in err
    assert signal.getsignal(signal.SIGINT) == usual
    assert not (tmp_path / "out").exists()
    code, _, err = pq(*command, "--resume", "required")
    assert code == 0
    assert "pq: goes on after block 1, from what" in err
    log = (tmp_path / "out.log").read_text()
    assert (
        log.index("stopped: stopped after block 1")
        < log.index("goes on after block 1")
        < log.index("summary")
    )
    assert (
        pq("convert", *command[1:4], tmp_path / "other", *command[5:], "--resume", "never")[0] == 0
    )
    assert files_of(tmp_path / "out") == files_of(tmp_path / "other")
    assert not list(tmp_path.glob("*.work"))


def test_an_ignored_signal_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert not stop()


def test_a_second_signal_stops_at_once():
    with stop_on_signals() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_says_what_is_kept(
    pq: Call, command: list[object], monkeypatch: pytest.MonkeyPatch
):
    real = convert_module.Conversion.block

    def block(self: Any, index: int, streams: Any) -> Any:
        if index == 2:
            raise KeyboardInterrupt
        return real(self, index, streams)

    monkeypatch.setattr(convert_module.Conversion, "block", block)
    code, _, err = pq(*command)
    assert code == 130
    assert "pq: 2 blocks are kept in" in err


def test_refusals_of_the_command(
    pq: Call, command: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert pq(*command, "--resume", "maybe")[::2] == (
        2,
        "pq: error: --resume maybe: choose auto, required, never\n",
    )
    assert pq(*command, "--resume", "required")[0] == 2
    with StateFolder(tmp_path / "out.work", "auto"):
        code, _, err = pq(*command)
    assert code == 6
    assert "is at work there; wait until it is done" in err
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = pq(*command)
    assert code == 2
    assert err.startswith(
        "pq: error: the other processes of the launch were not met at $MASTER_ADDR:$MASTER_PORT ("
    )


def test_the_command_survives_signals(pq: Call, tiny: ModelMaker, text_file: Path, tmp_path: Path):
    sizes = ["--dataset", text_file, "--nsamples", 6, "--seqlen", 32, "--device", "cpu"]
    told = ["-m", model_of(tiny, "gptq"), "-r", "gptq", *sizes]
    script = tmp_path / "held.py"
    script.write_text(HELD)

    def started(go: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, script, go, "convert", *told, "-o", tmp_path / "out"]
        process = subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE)
        while not (tmp_path / "out.work" / "lock").exists() and process.poll() is None:
            time.sleep(0.01)
        return process

    process = started(tmp_path / "go")
    process.send_signal(signal.SIGTERM)
    (tmp_path / "go").touch()
    _, said = process.communicate(timeout=HANGS)
    assert process.returncode == 75, said
    assert (
        f"pq: stopped after block 1 of {BLOCKS}; the same command goes on from there"
        in said.decode()
    )
    assert {path.name for path in tmp_path.iterdir()} == {"out.log", "out.work", "go", "held.py"}
    (tmp_path / "out.work" / "lock").unlink(missing_ok=True)
    process = started(tmp_path / "never")
    process.kill()
    process.communicate(timeout=HANGS)
    assert process.returncode == -signal.SIGKILL
    assert pq("convert", *told, "-o", tmp_path / "out", "--resume", "required")[0] == 0
    assert pq("convert", *told, "-o", tmp_path / "once", "--resume", "never")[0] == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "once")
    assert not list(tmp_path.glob("*.work"))
