"""Running a file of kernel tests in Triton's interpreter, which must be chosen before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")],
)
needs_gpu = pytest.mark.skipif(
    INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device"
)


def run_interpreted(file: str) -> None:
    """Run the tests of a file once more, in a child process whose kernels are interpreted."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    if (
        "only 0-dimensional arrays can be converted" in done.stdout
    ):  # as by Triton 3.6 with NumPy 2.4
        pytest.skip("this Triton's interpreter does not work with this NumPy")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def activations(M: int, K: int, dtype: torch.dtype, device: str) -> Tensor:
    """Rows of different sizes, with outliers, between NaN that belongs to no row."""
    generator = torch.Generator().manual_seed(M + K)
    x = torch.randn(M, K, generator=generator) * torch.logspace(-2, 1, M)[:, None]
    x[:, ::17] *= 20
    around = torch.full((M + 2, K + 70), float("nan"), dtype=dtype, device=device)
    around[1:-1, 3 : K + 3] = x.to(dtype)
    return around[1:-1, 3 : K + 3]
