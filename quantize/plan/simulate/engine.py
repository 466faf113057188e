"""One engine: which requests it computes in each step, as vLLM 0.32's scheduler decides.

Running requests come first, each with its next token; what is left of the step's token budget goes to
prompts, the last of them in a chunk. A prompt is admitted when its blocks are free. Where a running
sequence needs a block and none is free, the one admitted last is thrown out and computed again from
its start. Steps between two events are alike but for the length of the sequences, so they are taken
at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from math import ceil

from quantize.plan.simulate.memory import Memory
from quantize.plan.simulate.policies import POLICIES, Fcfs, Queue, View
from quantize.plan.simulate.prefixes import Cached
from quantize.plan.simulate.setup import EngineSetup, Log
from quantize.plan.simulate.steps import IDLE, Steps

REQUESTS = 1 << 40
"""More than there are requests: one number orders by step, then by request."""


class Engine(Steps):
    """State of one engine. `start` decides a step or several alike ones; `end` is when they end."""

    __slots__ = (
        "_cap",
        "_decode",
        "_fits",
        "_grows",
        "_known",
        "_mixed",
        "_plain",
        "arrival",
        "busy_seconds",
        "costs",
        "decoding",
        "done",
        "finishing",
        "fresh",
        "held",
        "inputs",
        "log",
        "memory",
        "outputs",
        "partial",
        "place",
        "preempted",
        "queue",
        "resumed",
        "running",
        "setup",
        "starved",
        "step",
        "token_seconds",
        "waiting",
    )

    def __init__(
        self,
        setup: EngineSetup,
        memory: Memory,
        arrival: list[float],
        inputs: list[int],
        outputs: list[int],
        log: Log,
        place: int = 0,
    ) -> None:
        super().__init__()
        self.setup, self.memory, self.log, self.place = setup, memory, log, place
        self.costs = setup.costs
        self.arrival = arrival
        self.inputs, self.outputs = inputs, outputs
        """Shared with other engines: tokens to compute before the next token, tokens to give."""
        self.waiting: Queue = POLICIES[setup.policy](arrival, inputs)
        self._plain: deque[int] | None = None
        if isinstance(self.waiting, Fcfs) and not setup.drop:
            self._plain = self.waiting.queue
        self.queue = self.waiting if self._plain is None else self._plain
        """Whose length is that of `waiting`."""
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
        self.finishing: list[int] = []
        """Heap of (step after which a decoding request ends) · REQUESTS + request."""
        self.fresh: list[int] = []
        """Whose prompt ends with the step that runs."""
        self.starved = False
        """Idle with requests for which there is no memory."""
        self.busy_seconds = 0.0
        self.preempted = 0
        self._decode: Callable[[int, float], float] = self.costs.decode()
        self._mixed = self.costs.mix()
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

    def put(self, request: int) -> None:
        """Hand over a request. One that could never fit is dropped."""
        longest = self.inputs[request] + self.outputs[request] - 1
        if longest > self._fits:
            if not self.memory.could_hold(longest):
                self.log.dropped[request] = True
                return
            self._fits = longest
        self.log.load[self.place] += 1
        self.waiting.put(request)

    def start(self, now: float) -> None:
        """Decide what runs from `now` on; `end` is IDLE if there is nothing to."""
        p, steps, n = 0, 0, self.decoding
        if self.partial is not None or self.queue or self.resumed:
            if n and not self.memory.run(self.step, 1):
                self._make_room()
                n = self.decoding
            else:
                p, scores = self._prompts(now)
        elif n:
            steps = self._decode_steps()
            if not steps:
                self._make_room()
                n = self.decoding
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
            self.starved = bool(self.queue or self.resumed)
            self.end = IDLE
            return
        self.starved = False
        self._x, self._t, self._began = 0.0, now, now
        self.end = now + took

    def cut(self, now: float) -> None:
        """Let the steps end with the one that runs, since a request came."""
        if self.mixed or self.steps == 1:
            return
        self._progress(now)
        x = self._x
        steps = ceil(x - 1e-9) if x > 1.0 else 1
        if steps < self.steps:
            if self._grows:
                self.memory.shrink(self.step, steps, self.steps)
            self.steps = steps
            self.end = now + self._time(steps) - self._time(x)

    def finish(self) -> None:
        """Take the steps that end now."""
        now, log, memory = self.end, self.log, self.memory
        inputs, outputs = self.inputs, self.outputs
        self.busy_seconds += now - self._began
        self.step = step = self.step + self.steps
        self.held += self.decoding * self.steps
        finishing, above = self.finishing, (step + 1) * REQUESTS
        while finishing and finishing[0] < above:
            request = heappop(finishing) % REQUESTS
            log.finish[request] = now
            log.load[self.place] -= 1
            del self.running[request]
            self.decoding -= 1
            self.held -= inputs[request] + outputs[request] - 1
            memory.release(request, step)
        if not self.fresh:
            return
        first = log.first
        for request in self.fresh:
            if first[request] != first[request]:  # NaN: not one computed again
                first[request] = now + self.costs.first
            left = outputs[request] - 1
            if left:
                self.decoding += 1
                self.held += inputs[request]
                heappush(finishing, (step + left) * REQUESTS + request)
                memory.decode(request, inputs[request], step)
            else:
                log.finish[request] = now
                log.load[self.place] -= 1
                del self.running[request]
                memory.release(request, step)
        self.fresh.clear()

    def _decode_steps(self) -> int:
        """Steps until a sequence ends or memory does."""
        steps = self.finishing[0] // REQUESTS - self.step
        return self.memory.run(self.step, steps if steps < self._cap else self._cap)

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
            place = [key % REQUESTS for key in self.finishing].index(request)
            ends = self.finishing.pop(place) // REQUESTS
            heapify(self.finishing)
            given = self.outputs[request] - (ends - self.step)
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
        setup, admit, inputs = self.setup, self.memory.admit, self.inputs
        budget = setup.batched_tokens - self.decoding
        if budget < 0:
            budget = 0
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
        running, find = self.running, self._known
        room = setup.sequences - len(running)
        plain = self._plain
        chosen = self._chosen(now) if plain is None else plain
        for queue in (self.resumed, chosen) if self.resumed else (chosen,):
            while queue and room > 0 and tokens < budget:
                request = queue[0]
                own = inputs[request]
                if not admit(request, own, after):
                    return tokens, scores
                queue.popleft()
                if queue is not plain and queue is not self.resumed:
                    self.waiting.take(request)
                running[request] = None
                room -= 1
                known = 0
                if find is not None:
                    known = find(request)
                    if queue is not self.resumed:  # one thrown out finds itself
                        self.log.found[self.place] += known
                n = own - known
                if n > budget - tokens:
                    n = budget - tokens
                scores += n * (known + 0.5 * n)
                tokens += n
                if known + n == own:
                    self.fresh.append(request)
                else:
                    self.partial, self.done = request, known + n
        return tokens, scores

    def _chosen(self, now: float) -> deque[int]:
        """Waiting requests in the order in which the policy admits them; refused ones are gone."""
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
        self.log.load[self.place] -= len(refused)
        for request in refused:
            self.log.dropped[request] = True
        return order
