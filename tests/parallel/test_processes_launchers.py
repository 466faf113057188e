"""The launchers that people use: accelerate and torchrun."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ModelMaker
from processes import HANGS, HELD
from resumed import files_of, model_of

LAUNCHERS = {
    "accelerate": [
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--main_process_port",
    ],
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "--master-port"],
}


def command(
    launcher: str, model: Path, text: Path, output: Path, held: Path | None = None
) -> list[str]:
    """held: a file that each block waits for."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    start = [sys.executable, "-m", *LAUNCHERS[launcher], port] if launcher else [sys.executable]
    told = ["-m", model, "-r", "rtn", "-o", output, "--dataset", text, "--device", "cpu", "--json"]
    run = ["-m", "quantize"]
    if held:
        script = held.with_suffix(".py")
        script.write_text(HELD)
        run = [str(script), str(held)]
    return [*start, *run, "convert", *map(str, told), "--nsamples", "6", "--seqlen", "32"]


def is_at_work(output: Path) -> bool:
    lock = output.with_name(f"{output.name}.work") / "lock"
    return lock.exists() and bool(lock.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher(tiny: ModelMaker, text_file: Path, tmp_path: Path, launcher: str):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for name in ("", launcher):
        told = command(name, model_of(tiny, "rtn"), text_file, tmp_path / (name or "alone"))
        done = subprocess.run(
            told, env=environment, check=True, capture_output=True, text=True, timeout=HANGS
        )
        assert done.stdout.count('"quantized_linears"') == 1
    assert files_of(tmp_path / launcher) == files_of(tmp_path / "alone")


@pytest.mark.slow
def test_a_launcher_is_told_to_stop(tiny: ModelMaker, text_file: Path, tmp_path: Path):
    go = tmp_path / "go"
    told = command("torchrun", model_of(tiny, "rtn"), text_file, tmp_path / "out", held=go)
    process = subprocess.Popen(
        told, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True
    )
    while not is_at_work(tmp_path / "out") and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.stderr
    said = ""
    for line in process.stderr:
        said += line
        if "stops when the block under way is done" in line:
            go.touch()
    process.wait(HANGS)
    assert process.returncode != 0
    assert "pq: stopped after block" in said
    done = subprocess.run(
        [*command("", model_of(tiny, "rtn"), text_file, tmp_path / "out"), "--resume", "required"],
        check=False,
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_launcher_that_loses_a_process(tiny: ModelMaker, text_file: Path, tmp_path: Path):
    """It sends SIGTERM to the others, which leave at once instead of at the end of the block."""
    model, output = model_of(tiny, "rtn"), tmp_path / "out"
    told = command("torchrun", model, text_file, output, held=tmp_path / "never")
    process = subprocess.Popen(
        told, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True
    )
    while not is_at_work(output) and process.poll() is None:
        time.sleep(0.01)
    os.kill(int((tmp_path / "out.work" / "lock").read_text()), signal.SIGKILL)
    _, said = process.communicate(timeout=HANGS)
    assert process.returncode != 0
    assert "pq: rank 0 no longer answers; the same command goes on" in said
    subprocess.run(
        command("accelerate", model, text_file, output),
        check=True,
        capture_output=True,
        timeout=HANGS,
    )
    subprocess.run(
        command("", model, text_file, tmp_path / "once"),
        check=True,
        capture_output=True,
        timeout=HANGS,
    )
    assert files_of(output) == files_of(tmp_path / "once")
