"""`pq verify --kernels`: the kernels on a checkpoint's own tensors, in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import CPU
from damage import checks_of

from quantize.verification import verify

Maker = Callable[..., Path]

RUN = "from quantize.cli import run; run()"
WRONG = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import quantize.kernels.{module} as module
launch = module.{function}
module.{function} = lambda *args: launch(*args) * 1.01
"""


def pq(folder: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-c",
        before + RUN,
        "verify",
        str(folder),
        "--kernels",
        "--blocks",
        "1",
    ]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        command, env=env | {"COLUMNS": "200"}, capture_output=True, text=True, check=False
    )


def test_without_kernels_the_check_says_what_to_do(
    converted: Maker, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = verify(converted("fireq", "llama"), device=CPU, kernels=True)
    assert result.ok
    assert "TRITON_INTERPRET=1" in (checks_of(result)["kernels"].skipped_reason or "")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize(
    ("recipe", "layers", "module", "function"),
    [("fireq", 8, "int4.launch", "multiply"), ("sbvr", 7, "bitvec.launch", "multiply")],
)
def test_kernels_run_on_the_tensors_of_a_checkpoint(
    recipe: str, layers: int, module: str, function: str, converted: Maker
):
    folder = converted(recipe, "llama")
    sound = pq(folder)
    assert sound.returncode == 0, sound.stderr
    assert f"kernels compute {layers} layers as their twins do" in sound.stdout
    wrong = pq(folder, WRONG.format(module=module, function=function))
    assert wrong.returncode == 7
    assert "a kernel differs from its twin" in wrong.stdout
