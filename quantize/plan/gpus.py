"""The GPUs that a plan may name, with what their makers state of them and where that was read."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from quantize.errors import UsageError

AIC = "ai-dynamo/aiconfigurator 095f58a, systems/{}.yaml"
NVIDIA = "NVIDIA's data sheet of the {}"
ARCHITECTURE = "NVIDIA's {} architecture paper; tensor rates with 32-bit accumulation"


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU. Rates are dense peaks; what an engine reaches of them stands in `latency`."""

    name: str
    memory_gib: float
    """2³⁰ bytes, as CUDA tells programs, which is less than the label says: engines take their share
    of this. From messages of PyTorch and vLLM in public issues."""
    bandwidth_tb: float
    """10¹² bytes a second of its memory."""
    bf16_tflops: float
    """10¹² operations a second; a multiplication and an addition are two."""
    fp8_tflops: float | None
    """None where it multiplies no FP8."""
    source: str
    fp4_tflops: float | None = None
    link_gb: float = 32.0
    """10⁹ bytes a second to another GPU of its node, in one direction: NVLink, or PCIe."""
    capability: float = 8.0
    """Of CUDA, by which engines choose their kernels."""

    @property
    def memory_bytes(self) -> int:
        """All of its memory."""
        return int(self.memory_gib * 2**30)

    def tflops(self, compute: str) -> float:
        """Peak for operands in bf16, fp8, int8 or fp4; that of the next wider ones it has, where it
        lacks them: engines unpack such weights and multiply in 16 bits. All of these GPUs multiply
        INT8 at twice the rate of bf16."""
        if compute == "int8":
            return 2 * self.bf16_tflops
        rates = {"fp4": self.fp4_tflops, "fp8": self.fp8_tflops, "bf16": self.bf16_tflops}
        if compute not in rates:
            raise ValueError(f"compute is one of int8, {', '.join(rates)}, not {compute!r}")
        wider = list(rates)[list(rates).index(compute) :]
        return next(rate for name in wider if (rate := rates[name]) is not None)

    def multiplies(self, compute: str) -> bool:
        """Whether it has units for such operands."""
        return {"fp4": self.fp4_tflops, "fp8": self.fp8_tflops}.get(compute, 0.0) is not None


GPUS: tuple[Gpu, ...] = (
    Gpu("a100-40-sxm", 39.5, 1.555, 312, None, NVIDIA.format("A100"), None, 300, 8.0),
    Gpu("a100-80-sxm", 79.2, 2.039, 312, None, AIC.format("a100_sxm"), None, 300, 8.0),
    Gpu("a100-80-pcie", 79.2, 1.935, 312, None, AIC.format("a100_pcie"), None, 32, 8.0),
    Gpu("h100-sxm", 79.2, 3.35, 989, 1978, AIC.format("h100_sxm"), None, 450, 9.0),
    Gpu("h100-pcie", 79.2, 2.0, 756, 1513, AIC.format("h100_pcie"), None, 64, 9.0),
    Gpu("h200-sxm", 139.8, 4.8, 989, 1978, AIC.format("h200_sxm"), None, 450, 9.0),
    Gpu("b200-sxm", 178.4, 7.7, 2250, 4500, AIC.format("b200_sxm"), 9000, 900, 10.0),
    Gpu("l4", 22.1, 0.30, 121, 242, AIC.format("l4"), None, 32, 8.9),
    Gpu("l40s", 44.4, 0.864, 362, 733, AIC.format("l40s"), None, 32, 8.9),
    Gpu("rtx-pro-6000", 95.0, 1.79, 468, 936, AIC.format("rtx_pro_6000"), 1872, 64, 12.0),
    Gpu("rtx-4090", 23.5, 1.008, 165, 330, ARCHITECTURE.format("Ada"), None, 32, 8.9),
    Gpu("rtx-5090", 31.4, 1.792, 209, 419, ARCHITECTURE.format("Blackwell"), 838, 64, 12.0),
)
_ALIASES = {
    "a100": "a100-80-sxm",
    "a100-80": "a100-80-sxm",
    "a100-40": "a100-40-sxm",
    "h100": "h100-sxm",
    "h200": "h200-sxm",
    "b200": "b200-sxm",
    "4090": "rtx-4090",
    "5090": "rtx-5090",
    "rtx-6000-pro": "rtx-pro-6000",
}
_WORDS = re.compile(r"\b(nvidia|geforce|tesla|gb|80gb|hbm3e?)\b")


def gpu_named(name: str) -> Gpu:
    """The GPU of a name such as `h100`, `H100 SXM` or `rtx_4090`.

    UsageError with the nearest names for one that the table lacks.
    """
    plain = re.sub(r"[\s_-]+", "-", _WORDS.sub(" ", name.lower().replace("_", " "))).strip("-")
    plain = _ALIASES.get(plain, plain)
    table = {gpu.name: gpu for gpu in GPUS}
    if plain in table:
        return table[plain]
    known = [*table, *_ALIASES]
    near = difflib.get_close_matches(plain, known, n=3, cutoff=0.5)
    shown = f"nearest: {', '.join(near)}" if near else f"known: {', '.join(table)}"
    raise UsageError(f"GPU {name!r} is not in the table; {shown}")
