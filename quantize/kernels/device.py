"""Where Triton kernels run, and with which numbers. Importing this needs no Triton."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What activations may be."""
_TRITON = importlib.util.find_spec("triton") is not None


def runs_on(device: torch.device) -> bool:
    """Whether Triton kernels run there: on NVIDIA devices, or anywhere in its interpreter."""
    # AMD's matrix units may flush the subnormals of bits.
    found = device.type == "cuda" and torch.version.hip is None
    return _TRITON and (found or _in_interpreter())


def has_kernel(x: Tensor) -> bool:
    """Whether a Triton kernel can take x: it runs there, and x has a dtype of `DTYPES`."""
    return x.dtype in DTYPES and runs_on(x.device)


def runs_fp8_on(device: torch.device) -> bool:
    """Whether kernels with E4M3 run there: as `runs_on`, on Ada, Hopper or newer devices."""
    return runs_on(device) and (device.type != "cuda" or _knows_e4m3(device))


def has_fp8_kernel(x: Tensor) -> bool:
    """Whether a kernel with E4M3 can take x: `runs_fp8_on` for what every token does."""
    return has_kernel(x) and (not x.is_cuda or _noted_e4m3(x.device))


def _knows_e4m3(device: torch.device) -> bool:
    # Tensor cores multiply E4M3 from compute capability 8.9 on.
    return torch.cuda.get_device_capability(device) >= (8, 9)


# Beside the function itself, because torch.compile does not trace a cache.
_noted_e4m3 = functools.cache(_knows_e4m3)


def _in_interpreter() -> bool:
    # Triton's interpreter takes tensors on the CPU.
    return os.environ.get("TRITON_INTERPRET") == "1"
