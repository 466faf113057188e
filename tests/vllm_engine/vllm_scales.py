"""Run inside vLLM's environment, as a script: what vLLM's own function makes of bfloat16 group scales.

    vllm_scales.py SCALES.safetensors OUT.safetensors

For each tensor [N, G] `x` of the file: `x.codes` [N, G], E4M3 as float32, and `x.factor` [N, 1].
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import load_file, save_file


class OnGpu(torch.Tensor):
    """A tensor that says that it lies on a GPU, for which alone the function is meant."""

    is_cuda = True


def main() -> None:
    """Run as a script."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
    from vllm.model_executor.layers.quantization.utils.quant_utils import (
        GroupShape,
        convert_bf16_scales_to_fp8,
    )

    out = {}
    with set_current_vllm_config(VllmConfig()):
        rounding = QuantFP8(static=False, group_shape=GroupShape.PER_TOKEN)
    for name, scale in load_file(sys.argv[1]).items():
        codes, factor = convert_bf16_scales_to_fp8(
            lambda x: rounding.forward_native(x.as_subclass(torch.Tensor)),
            scale.as_subclass(OnGpu),
        )
        out[f"{name}.codes"] = codes.float().contiguous()
        out[f"{name}.factor"] = factor.float().contiguous()
    save_file(out, sys.argv[2])


if __name__ == "__main__":
    main()
