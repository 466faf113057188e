"""One engine: which requests it computes in each step, as vLLM 0.32's scheduler decides.

Running requests come first, each with its next token; what is left of the step's token budget goes to
prompts, the last of them in a chunk. A prompt is admitted when its blocks are free. Where a running
sequence needs a block and none is free, the one admitted last is thrown out and computed again from
its start. Steps between two events are alike but for the length of the sequences, so they are taken
at once.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, sqrt

from quantize.plan.simulate.costs import StepCosts
from quantize.plan.simulate.memory import Memory
from quantize.plan.simulate.policies import POLICIES, Fcfs, Queue, View
from quantize.plan.simulate.prefixes import Cached

IDLE = float("inf")


@dataclass(frozen=True)
class EngineSetup:
    """An engine and what it runs on."""

    costs: StepCosts
    gpus: tuple[int, ...] = (0,)
    model: int = 0
    batched_tokens: int = 8192
    """Tokens of one step, vLLM's max_num_batched_tokens."""
    sequences: int = 256
    """Running at once, max_num_seqs."""
    policy: str = "fcfs"
    ttft: float = IDLE
    """Goal, seconds, which policies that know deadlines work for."""
    prefill_token: float = 0.0
    """Seconds a token of a prompt takes, which they reckon with; 0: from `costs`."""
    drop: bool = False
    """Whether requests that cannot meet `ttft` any more are refused."""


class Log:
    """What happened to every request; times in seconds, NaN where it did not happen."""

    def __init__(self, count: int) -> None:
        nan = float("nan")
        self.first = [nan] * count
        self.finish = [nan] * count
        self.dropped = [False] * count
        self.preempted = 0
        self.recomputed = 0
        """Tokens that were computed again."""


class Engine:
    """State of one engine. `start` decides a step or several alike ones; `end` is when they end."""

    def __init__(
        self,
        setup: EngineSetup,
        memory: Memory,
        arrival: list[float],
        inputs: list[int],
        outputs: list[int],
        log: Log,
    ) -> None:
        self.setup, self.memory, self.log = setup, memory, log
        self.costs = setup.costs
        self.arrival = arrival
        self.inputs, self.outputs = inputs, outputs
        """Shared with other engines: tokens to compute before the next token, tokens to give."""
        self.waiting: Queue = POLICIES[setup.policy](arrival, inputs)
        self._plain: deque[int] | None = None
        if isinstance(self.waiting, Fcfs) and not setup.drop:
            self._plain = self.waiting.queue
        self._queue = self.waiting if self._plain is None else self._plain
        self.resumed: deque[int] = deque()
        self.running: dict[int, None] = {}
        """Admitted requests, in that order; a partial prompt is the last."""
        self.partial: int | None = None
        self.done = 0
        """Tokens of `partial` that are computed."""
        self.decoding = 0
        self.held = 0
        """Tokens that decoding sequences hold."""
        self.step = 0
        self.finishing: list[tuple[int, int]] = []
        self.finish_step: dict[int, int] = {}
        self.fresh: list[int] = []
        """Whose prompt ends with the step that runs."""
        self.end = IDLE
        self.mixed = False
        self.steps = 0
        self.starved = False
        """Idle with requests for which there is no memory."""
        self.busy_seconds = 0.0
        self.preempted = 0
        self.load = 0
        """Requests it has not answered."""
        self.factor = 1.0
        self._decode: Callable[[int, float], float] = self.costs.decode()
        self._mixed = self.costs.mix()
        self._began = self._x = self._t = self._g = self._slope = self._h = 0.0
        self.token_seconds = setup.prefill_token or self._per_token()
        self._cap = memory.longest_run
        self._grows = bool(memory.pools)
        """Whether steps take blocks of their own; else they follow from the step."""
        self._fits = 0
        """Tokens of the longest request that is known to fit."""
        self._known = memory.known if isinstance(memory, Cached) else None

    def _per_token(self) -> float:
        n = self.setup.batched_tokens
        return self.costs.seconds(n, n * n / 2, 0, 0.0) / n

    @property
    def idle(self) -> bool:
        """Whether no step runs."""
        return self.end == IDLE

    def put(self, request: int) -> None:
        """Hand over a request. One that could never fit is dropped."""
        longest = self.inputs[request] + self.outputs[request] - 1
        if longest > self._fits:
            if not self.memory.could_hold(longest):
                self.log.dropped[request] = True
                return
            self._fits = longest
        self.load += 1
        self.waiting.put(request)

    def start(self, now: float) -> None:
        """Decide what runs from `now` on; `end` is IDLE if there is nothing to."""
        p, n = 0, self.decoding
        asks = self.partial is not None or self._queue or self.resumed
        # Without prompts the steps that there is memory for tell whether there is for one.
        steps = self._decode_steps() if n and not asks else 0
        if n and not steps and self.memory.run(self.step, 1) == 0:
            self._make_room()
            n = self.decoding
        elif asks:
            p, scores = self._prompts(now)
        costs = self.costs
        if p:
            self.mixed, self.steps = True, 1
            if n and self._grows:
                self.memory.grow(self.step, 1)
            self._g, self._slope = self._mixed(p, scores, n, self.held), 0.0
            self._h = costs.host + costs.sequence * n + costs.prefill
            took = self.factor * self._g + self._h
        elif n:
            self.mixed = False
            self.steps = steps = steps or self._decode_steps()
            if self._grows:
                self.memory.grow(self.step, steps)
            decode = self._decode
            self._g = g = decode(n, self.held)
            slope = 0.0
            if steps > 1:
                slope = (decode(n, self.held + n * (steps - 1)) - g) / (steps - 1)
            self._slope = slope
            self._h = h = costs.host + costs.sequence * n
            took = steps * (self.factor * (g + slope * (steps - 1) * 0.5) + h)
        else:
            self.starved = bool(self._queue or self.resumed)
            self.end = IDLE
            return
        self.starved = False
        self._x, self._t, self._began = 0.0, now, now
        self.end = now + took

    def _time(self, x: float) -> float:
        """Seconds of the first `x` steps of those decided."""
        gpu = self._g * x + self._slope * x * (x - 1.0) * 0.5
        return self.factor * gpu + self._h * x

    def _progress(self, now: float) -> None:
        """Bring the steps done, as a fraction, up to `now`."""
        elapsed = now - self._t
        if elapsed > 0.0:
            y = (self._time(self._x) if self._x else 0.0) + elapsed
            a = self.factor * self._slope * 0.5
            b = self.factor * (self._g - self._slope * 0.5) + self._h
            x = (2.0 * y) / (b + sqrt(b * b + 4.0 * a * y)) if a > 0.0 else y / b
            self._x, self._t = min(x, float(self.steps)), now

    def cut(self, now: float) -> None:
        """Let the steps end with the one that runs, since a request came."""
        if self.mixed or self.steps <= 1:
            return
        self._progress(now)
        steps = max(1, ceil(self._x - 1e-9))
        if steps < self.steps:
            if self._grows:
                self.memory.shrink(self.step, steps, self.steps)
            self.steps = steps
            self.end = now + self._time(steps) - self._time(self._x)

    def share(self, now: float, factor: float) -> None:
        """Change how many times longer the GPU's part takes, since others began or ended."""
        if factor == self.factor:
            return
        if self.end != IDLE:
            self._progress(now)
            self.factor = factor
            self.end = now + self._time(self.steps) - self._time(self._x)
        self.factor = factor

    def finish(self) -> None:
        """Take the steps that end now."""
        now, log = self.end, self.log
        self.busy_seconds += now - self._began
        self.step = step = self.step + self.steps
        self.held += self.decoding * self.steps
        finishing = self.finishing
        while finishing and finishing[0][0] <= step:
            when, request = heapq.heappop(finishing)
            if self.finish_step.get(request) != when:
                continue  # thrown out since
            log.finish[request] = now
            del self.finish_step[request], self.running[request]
            self.decoding -= 1
            self.load -= 1
            tokens = self.inputs[request] + self.outputs[request] - 1
            self.held -= tokens
            self.memory.release(request, step, tokens)
        for request in self.fresh:
            if log.first[request] != log.first[request]:  # NaN: not one computed again
                log.first[request] = now + self.costs.first
            left = self.outputs[request] - 1
            if left == 0:
                log.finish[request] = now
                self.load -= 1
                del self.running[request]
                self.memory.release(request, step, self.inputs[request])
                continue
            self.decoding += 1
            self.held += self.inputs[request]
            self.finish_step[request] = step + left
            heapq.heappush(finishing, (step + left, request))
            self.memory.decode(request, self.inputs[request], step)
        self.fresh.clear()

    def _decode_steps(self) -> int:
        """Steps until a sequence ends or memory does."""
        finishing = self.finishing
        while self.finish_step.get(finishing[0][1]) != finishing[0][0]:
            heapq.heappop(finishing)
        return self.memory.run(self.step, min(finishing[0][0] - self.step, self._cap))

    def _make_room(self) -> None:
        """Throw out sequences until each that is left can take its next token."""
        while self.decoding and not self.memory.run(self.step, 1):
            self._throw_out(next(reversed(self.running)))

    def _throw_out(self, request: int) -> None:
        del self.running[request]
        self.log.preempted += 1
        self.preempted += 1
        if request == self.partial:
            self.memory.release(request, self.step, self.done)
            self.partial = None
            self.log.recomputed += self.done
        else:
            given = self.outputs[request] - (self.finish_step.pop(request) - self.step)
            tokens = self.inputs[request] + given - 1
            self.memory.release(request, self.step, tokens)
            self.decoding -= 1
            self.held -= tokens
            # What it has said is a prompt when it comes again, and the last of it gave no entry.
            self.inputs[request] += given
            self.outputs[request] -= given
            self.log.recomputed += self.inputs[request] - 1
        self.resumed.appendleft(request)

    def _prompts(self, now: float) -> tuple[int, float]:
        """Fill the step with prompts: (tokens, tokens that they attend to, together)."""
        setup, memory, inputs = self.setup, self.memory, self.inputs
        budget = max(0, setup.batched_tokens - self.decoding)
        tokens, scores, after = 0, 0.0, self.step + 1
        if self.partial is not None:
            request = self.partial
            n = min(budget, inputs[request] - self.done)
            scores += n * (self.done + 0.5 * n)
            tokens += n
            self.done += n
            if self.done == inputs[request]:
                self.fresh.append(request)
                self.partial = None
            if tokens == budget:
                return tokens, scores
        room = setup.sequences - len(self.running)
        for queue in (self.resumed, self._chosen(now)):
            while queue and room > 0 and tokens < budget:
                request = queue[0]
                if not memory.admit(request, inputs[request], after):
                    return tokens, scores
                queue.popleft()
                if queue is not self.resumed:
                    self.waiting.take(request)
                self.running[request] = None
                room -= 1
                known = self._known(request) if self._known is not None else 0
                n = min(budget - tokens, inputs[request] - known)
                scores += n * (known + 0.5 * n)
                tokens += n
                if known + n == inputs[request]:
                    self.fresh.append(request)
                else:
                    self.partial, self.done = request, known + n
        return tokens, scores

    def _chosen(self, now: float) -> deque[int]:
        """Waiting requests in the order in which the policy admits them; refused ones are gone."""
        if self._plain is not None:
            return self._plain
        if not self.waiting:
            return deque()
        setup = self.setup
        view = View(
            now,
            setup.ttft,
            self.token_seconds,
            self.decoding + (self.inputs[self.partial] if self.partial is not None else 0),
            setup.drop,
        )
        order, refused = self.waiting.choose(view)
        self.load -= len(refused)
        for request in refused:
            self.log.dropped[request] = True
        return order
