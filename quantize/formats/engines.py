"""What serving engines multiply of what pq writes: one table, from which all lines about serving come.

Read in the source of vLLM 0.32 (`model_executor/kernels/linear` and `layers/fused_moe/oracle`) and,
where a row says CPU, tried on its CPU build; stock transformers was run.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantize.formats.scheme import AnyScheme

_BITS = frozenset(range(2, 9))
_GROUPS = frozenset({32, 64, 128, None})


@dataclass(frozen=True)
class Engine:
    """A program that loads checkpoints."""

    name: str
    version: str
    """The release that the rows were read in and tried with."""
    fuses: bool
    """Whether it makes one matrix of q, k and v, of gate and up, and of all routed experts, whose
    parts must be packed alike."""

    def __str__(self) -> str:
        return f"{self.name} {self.version}".rstrip()


@dataclass(frozen=True)
class Kernel:
    """What one kernel of an engine takes in format compressed-tensors, with bfloat16 around it."""

    engine: Engine
    name: str
    hardware: str
    """Where it runs, in words."""
    bits: frozenset[int]
    groups: frozenset[int | None] | None = None
    """Inputs that share a scale, None in it: whole rows; None: any."""
    fp8: bool = False
    """Whether inputs are rounded to E4M3 per token; else they stay 16-bit."""
    side: int = 1
    """What rows and inputs of a matrix, after fusing, are a multiple of."""
    experts: bool = True
    """Whether it takes routed experts."""
    needs: str | None = None
    """What must be installed beside the engine."""

    def takes(self, scheme: AnyScheme) -> bool:
        """Whether it multiplies linears packed so, sizes aside."""
        return (
            scheme.bits in self.bits
            and self.fp8 == scheme.fp8_activations
            and (self.groups is None or scheme.group_size in self.groups)
        )

    def fits(self, shape: tuple[int, int]) -> bool:
        """Whether it takes a matrix [N, K] of this size."""
        return not any(length % self.side for length in shape)


VLLM = Engine("vLLM", "0.32", fuses=True)
TRANSFORMERS = Engine("transformers", "5.24", fuses=False)

TURING = "NVIDIA GPUs since Turing"
AMPERE = "NVIDIA GPUs since Ampere"
ADA = "NVIDIA GPUs since Ada"
HOPPER = "H100 and H200"
CPU = "CPUs"
_SINCE = {TURING: 7.5, AMPERE: 8.0, ADA: 8.9}
_HOPPER = 9.0

PLUGIN = "pq-vllm"
"""pq's plugin for vLLM, a package of its own."""
EXPERTS_IN_VLLM = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma3ForCausalLM",
)
"""Classes in whose dense FFNs' places the plugin puts LaDiMo's experts."""

KERNELS: tuple[Kernel, ...] = (
    Kernel(VLLM, "Marlin", TURING, frozenset({4, 8}), _GROUPS),
    Kernel(VLLM, "Triton", TURING, frozenset({4}), _GROUPS | {256}, experts=False),
    Kernel(VLLM, "humming", TURING, _BITS, needs="the optional humming kernels"),
    # It asks for compute capability 9.0 exactly.
    Kernel(VLLM, "CUTLASS W4A8", HOPPER, frozenset({4}), frozenset({128}), fp8=True, side=128),
    # Experts are run only where the processor has AMX.
    Kernel(VLLM, "CPU", CPU, frozenset({4}), side=32, experts=False),
    Kernel(VLLM, "pq's own", ADA, frozenset({4}), fp8=True, experts=False, needs=PLUGIN),
    Kernel(VLLM, "pq's own", CPU, frozenset({4}), fp8=True, experts=False, needs=PLUGIN),
    # It unpacks when it loads, and rounds no inputs of routed experts.
    Kernel(TRANSFORMERS, "none", "any device", _BITS),
    Kernel(TRANSFORMERS, "none", "any device", _BITS, fp8=True, experts=False),
)


@dataclass(frozen=True)
class Reader:
    """That an engine reads checkpoints of a format; what it multiplies of them say its kernels."""

    engine: Engine
    format: str | None
    """The format's name; None: plain safetensors, nothing packed."""
    hardware: tuple[str, ...]
    install: tuple[str, ...] = ()
    """What pip must install beside the engine."""
    first: str | None = None
    """The line of Python that must come before it is used."""
    note: str | None = None
    """What else must be known."""
    by_kernel: bool = False
    """Whether it loads only what one of its kernels multiplies where it runs."""


LLAMA_CPP = Engine("llama.cpp", "", fuses=False)

READERS: tuple[Reader, ...] = (
    Reader(TRANSFORMERS, None, ("any device",)),
    Reader(TRANSFORMERS, "compressed-tensors", ("any device",), ("compressed-tensors",)),
    Reader(TRANSFORMERS, "pq", ("any device",), ("pq-quantize",), "import quantize"),
    Reader(VLLM, None, (TURING, HOPPER, CPU)),
    Reader(VLLM, "compressed-tensors", (TURING, HOPPER, CPU), by_kernel=True),
    Reader(VLLM, "pq", (AMPERE, CPU), (PLUGIN,)),
    Reader(LLAMA_CPP, "gguf", ("any device",)),
)
"""Engines in the order in which they are told of; an engine without a row for a format refuses it."""


def runs_on(where: str, capability: float) -> bool:
    """Whether a GPU of this compute capability is one of those that `where`, a name of this table,
    means."""
    if where == HOPPER:
        return capability == _HOPPER
    return where in _SINCE and capability >= _SINCE[where]


def kernels_for(
    engine: Engine, scheme: AnyScheme, routed: bool = False, hardware: Collection[str] = ()
) -> list[Kernel]:
    """The kernels of an engine that take linears packed so, in the order of the table.

    routed: whether these are routed experts. hardware: where they must run; empty: anywhere.
    """
    return [
        kernel
        for kernel in KERNELS
        if kernel.engine == engine
        and kernel.takes(scheme)
        and (kernel.experts or not routed)
        and (not hardware or kernel.hardware in hardware)
    ]
