"""What one step of an engine costs, as a few numbers that a simulator can add up quickly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from quantize.plan.gpus import Gpu
from quantize.plan.latency import CONSTANTS, Batch, Constants, StepTime, first_token_seconds
from quantize.plan.served import ServedModel

SATURATED = 1024
"""Tokens of a step beyond which one more reads no more weights worth counting."""


@dataclass(frozen=True)
class StepCosts:
    """Seconds of a step of `p` prompt tokens and `n` decoding sequences that hold `c` tokens.

    On the GPU max(weights[p + n] + decoding[n] + kv·c, token·(p + n) + head·n + attention·(a + c))
    + link·(p + n), with `a` the tokens that the prompts' tokens attend to, together; on the host
    host + sequence·n, and `prefill` more if p > 0.
    """

    weights: Sequence[float]
    """By tokens of the step; the last holds for more."""
    decoding: Sequence[float] = (0.0,)
    """By decoding sequences, where a step's time was measured; the last holds for more."""
    kv: float = 0.0
    token: float = 0.0
    head: float = 0.0
    attention: float = 0.0
    link: float = 0.0
    host: float = 0.0
    sequence: float = 0.0
    prefill: float = 0.0
    first: float = 0.0
    """Before a request's first token, beside its steps."""
    windows: tuple[tuple[float, float, int], ...] = ()
    """(kv, attention, window) of layers that look back no further; `kv` and `attention` above
    are of the others."""
    stretch: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())
    """How many times longer the GPU's part takes where 1, 2, … engines share it: of a step with
    prompt tokens, and without. Beyond the last in proportion to it; where empty as many times as
    engines."""

    def decode(self) -> Callable[[int, float], float]:
        """The GPU's part of a step without prompts, as a function of (n, c)."""
        return self._decode

    @cached_property
    def _decode(self) -> Callable[[int, float], float]:
        last = max(len(self.weights), len(self.decoding)) - 1
        weights = [
            self.weights[min(n, len(self.weights) - 1)]
            + self.decoding[min(n, len(self.decoding) - 1)]
            for n in range(last + 1)
        ]
        kv, attention = self.kv, self.attention
        token, link = self.token + self.head, self.link

        def plain(n: int, c: float) -> float:
            moved = weights[n if n < last else last] + kv * c
            work = token * n + attention * c
            return (moved if moved > work else work) + link * n

        def windowed(n: int, c: float) -> float:
            moved, work = self._windowed(n, c)
            moved += weights[min(n, last)] + kv * c
            return max(moved, token * n + attention * c + work) + link * n

        return windowed if self.windows else plain

    def mix(self) -> Callable[[int, float, int, float], float]:
        """`mixed` as a function that looks nothing up."""
        if self.windows:
            return self.mixed
        weights, decoding, kv, link = self.weights, self.decoding, self.kv, self.link
        token, head, attention = self.token, self.head, self.attention
        last, most = len(weights) - 1, len(decoding) - 1

        def plain(p: int, a: float, n: int, c: float) -> float:
            tokens = p + n
            moved = weights[tokens if tokens < last else last] + kv * c
            moved += decoding[n if n < most else most]
            work = token * tokens + head * n + attention * (a + c)
            return (moved if moved > work else work) + link * tokens

        return plain

    def mixed(self, p: int, a: float, n: int, c: float) -> float:
        """The GPU's part of a step with prompt tokens."""
        tokens = p + n
        moved = self.weights[min(tokens, len(self.weights) - 1)] + self.kv * c
        moved += self.decoding[min(n, len(self.decoding) - 1)]
        work = self.token * tokens + self.head * n + self.attention * (a + c)
        if self.windows:
            more, scores = self._windowed(n, c)
            moved += more
            work += scores + self._windowed(p, a)[1]
        return max(moved, work) + self.link * tokens

    def _windowed(self, n: int, c: float) -> tuple[float, float]:
        """Bytes' and scores' seconds of layers with a window, each sequence at the mean context."""
        mean = c / n if n else 0.0
        moved = work = 0.0
        for kv, attention, window in self.windows:
            seen = n * min(mean, window)
            moved += kv * seen
            work += attention * seen
        return moved, work

    def host_seconds(self, p: int, n: int) -> float:
        """The host's part of a step."""
        return self.host + self.sequence * n + (self.prefill if p else 0.0)

    def seconds(self, p: int, a: float, n: int, c: float) -> float:
        """A whole step of an engine that has its GPU for itself."""
        return self.mixed(p, a, n, c) + self.host_seconds(p, n)

    def factors(self, engines: int) -> tuple[list[float], list[float]]:
        """`stretch` for up to `engines` engines on one GPU; index 0 is unused."""
        made = []
        for known in self.stretch:
            each = known[-1] / len(known) if known else 1.0
            far = [each * m for m in range(len(known) + 1, engines + 1)]
            made.append([1.0, *known, *far])
        return made[0], made[1]


def model_costs(
    model: ServedModel, gpu: Gpu, tp: int, constants: Constants = CONSTANTS
) -> StepCosts:
    """Costs that agree with `latency.step_seconds` for a model on `tp` GPUs."""
    step = StepTime(model, gpu, tp, constants)
    bandwidth, rate = step.bandwidth, step.attention_rate
    longest = SATURATED if model.routed else 1
    weights = [model.read_bytes(tp, tokens) / bandwidth for tokens in range(longest + 1)]
    per_score = 2.0 * model.heads * (model.score_dim or 2 * model.head_dim) / rate
    kv = attention = 0.0
    windows: dict[int, tuple[float, float]] = {}
    fixed = 0.0
    for layer in model.kv:
        moved = layer.bytes_per_token(tp) / bandwidth
        work = per_score if layer.heads else 0.0
        fixed += layer.fixed_bytes / tp / bandwidth
        if layer.window is None:
            kv, attention = kv + moved, attention + work
        else:
            before = windows.get(layer.window, (0.0, 0.0))
            windows[layer.window] = (before[0] + moved, before[1] + work)
    if fixed:  # a state is read once for each sequence, so it goes with the tokens of a step
        room = range(len(weights), SATURATED + 1)
        weights += [weights[-1] for _ in room]
        weights = [w + fixed * n for n, w in enumerate(weights)]
    return StepCosts(
        weights=weights,
        kv=kv,
        token=2.0 * model.parameters_per_token / step.rate,
        head=2.0 * model.head_parameters / step.rate,
        attention=attention,
        link=step.link_token,
        host=step.host,
        sequence=constants.sequence,
        prefill=model.layers * constants.layer_prefill,
        first=first_token_seconds(model, constants),
        windows=tuple((a, b, w) for w, (a, b) in sorted(windows.items())),
    )


@dataclass(frozen=True)
class TableStep(StepTime):
    """Steps whose costs were measured, in the place of the roofline."""

    costs: StepCosts | None = None

    def seconds(self, batch: Batch) -> float:
        """Time of one step; see `latency.step_seconds`."""
        if self.costs is None or not batch.prefill_tokens + batch.decode_sequences:
            return super().seconds(batch)
        scores = batch.prefill_tokens * batch.prefill_context
        return self.costs.seconds(
            batch.prefill_tokens, scores, batch.decode_sequences, batch.decode_context_total
        )


def costs_of(step: StepTime) -> StepCosts:
    """What a simulator adds up for the steps of a model."""
    if isinstance(step, TableStep) and step.costs is not None:
        return step.costs
    return model_costs(step.model, step.gpu, step.tp, step.constants)
