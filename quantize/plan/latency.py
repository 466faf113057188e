"""How long one step of an engine takes: a roofline with the host's time on top.

A step takes max(bytes / bandwidth, operations / rate), and beside it what the host and the
launches cost: a time a layer, more with several GPUs or a prompt in the batch, and a time a running
sequence. Constants were fitted by `eval/latency_fit.py` to measured TTFT and TPOT of vLLM; its
errors on rows it did not see are `ERRORS`, and every figure is given as a range by them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from quantize.plan.gpus import Gpu
from quantize.plan.served import ServedModel


@dataclass(frozen=True)
class Constants:
    """What is fitted. Times in seconds."""

    memory: float
    """Share of the memory's peak rate."""
    compute: float
    """Share of the peak of multiplications."""
    layer: float
    """Of each layer in each step."""
    layer_tp: float
    """Of each layer in each step, with more than one GPU, beside what goes over the link."""
    layer_prefill: float
    """Of each layer in a step that holds tokens of a prompt."""
    sequence: float
    """Of each running sequence in each step."""
    first: float
    """Of each layer, once a request, in front of its first token."""
    link: float = 0.7
    """Share of the link's peak. Not fitted: all rows are of NVLink, where it hardly shows."""


CONSTANTS = Constants(
    memory=0.921,
    compute=0.617,
    layer=62.2e-6,
    layer_tp=10.5e-6,
    layer_prefill=15.3e-6,
    sequence=56.1e-6,
    first=1.15e-3,
)
"""Of vLLM on H100, H200 and B200; eval/results/latency.json has how they were found."""


@dataclass(frozen=True)
class Estimate:
    """A figure and the range that four of five measurements fell in."""

    low: float
    mid: float
    high: float

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(self.low + other.low, self.mid + other.mid, self.high + other.high)

    def times(self, factor: float) -> Estimate:
        """The figure and its range, scaled; factor ≥ 0."""
        return Estimate(self.low * factor, self.mid * factor, self.high * factor)


@dataclass(frozen=True)
class Error:
    """Measured over predicted, on rows that the fit did not see."""

    low: float
    """10th percentile."""
    high: float
    """90th."""
    median: float
    """Of |predicted − measured| / measured."""
    mean: float

    def around(self, mid: float) -> Estimate:
        """The range around a prediction."""
        return Estimate(mid * self.low, mid, mid * self.high)


ERRORS = {
    "tpot": Error(0.898, 1.169, 0.045, 0.111),
    "ttft": Error(0.531, 1.367, 0.251, 0.401),
}
"""On the half of vLLM's rows that the fit did not see (166 of eval/results/latency.json)."""


@dataclass(frozen=True)
class Batch:
    """What one step computes."""

    prefill_tokens: int = 0
    """Of prompts."""
    prefill_context: float = 0.0
    """Tokens that a prompt's token attends to, in the mean over them: half of a prompt that is
    computed at once, and more of one of which a part was before."""
    decode_sequences: int = 0
    """That get their next token."""
    decode_context_total: float = 0.0
    """Tokens that those hold, together."""


@dataclass(frozen=True)
class StepTime:
    """step_seconds of one model, GPU and tp, for many batches."""

    model: ServedModel
    gpu: Gpu
    tp: int
    constants: Constants = CONSTANTS

    @cached_property
    def bandwidth(self) -> float:
        """Bytes a second that are reached."""
        return self.gpu.bandwidth_tb * 1e12 * self.constants.memory

    @cached_property
    def rate(self) -> float:
        """Operations a second of all GPUs that matrices reach."""
        return self.gpu.tflops(self.model.compute) * 1e12 * self.constants.compute * self.tp

    @cached_property
    def attention_rate(self) -> float:
        """The same of attention, which engines compute in 16 bits."""
        return self.gpu.bf16_tflops * 1e12 * self.constants.compute * self.tp

    @cached_property
    def host(self) -> float:
        """Seconds of a step of decoding, beside what each sequence adds."""
        c = self.constants
        return self.model.layers * (c.layer + (c.layer_tp if self.tp > 1 else 0.0))

    @cached_property
    def link_token(self) -> float:
        """Seconds over the link of each token: two sums over all GPUs a layer, of 16 bits, in a
        ring: 2 (tp − 1) / tp of the bytes through each link."""
        if self.tp == 1:
            return 0.0
        volume = 2 * self.model.layers * 2 * self.model.hidden * 2 * (self.tp - 1) / self.tp
        return volume / (self.gpu.link_gb * 1e9 * self.constants.link)

    def seconds(self, batch: Batch) -> float:
        """Time of one step; see `step_seconds`."""
        m, n = self.model, batch.decode_sequences
        tokens = batch.prefill_tokens + n
        if not tokens:
            return 0.0
        context = batch.decode_context_total / n if n else 0.0
        moved = m.read_bytes(self.tp, tokens) + n * m.kv_bytes(context, self.tp)
        matrices = 2.0 * (m.parameters_per_token * tokens + m.head_parameters * n)
        scores = batch.prefill_tokens * m.attention_flops(batch.prefill_context)
        scores += n * m.attention_flops(context, decode=True)
        compute = matrices / self.rate + scores / self.attention_rate
        c = self.constants
        host = self.host + c.sequence * n
        if batch.prefill_tokens:
            host += m.layers * c.layer_prefill
        return max(moved / self.bandwidth, compute) + self.link_token * tokens + host


def step_seconds(
    model: ServedModel, gpu: Gpu, tp: int, batch: Batch, constants: Constants = CONSTANTS
) -> float:
    """Seconds of one step of a batch on `tp` GPUs; 0 for an empty one.

    The mean of the range; `ERRORS["tpot"].around(…)` gives that.
    """
    return StepTime(model, gpu, tp, constants).seconds(batch)


def first_token_seconds(model: ServedModel, constants: Constants = CONSTANTS) -> float:
    """What a request's first token waits beside its steps: tokenizer, server, first schedule."""
    return model.layers * constants.first
