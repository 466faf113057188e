"""What an engine is told, and where it writes down what became of requests."""

from __future__ import annotations

from dataclasses import dataclass

from quantize.plan.simulate.costs import StepCosts
from quantize.plan.simulate.steps import IDLE


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

    def __init__(self, count: int, engines: int = 1) -> None:
        nan = float("nan")
        self.first = [nan] * count
        self.finish = [nan] * count
        self.dropped = [False] * count
        self.preempted = 0
        self.recomputed = 0
        """Tokens that were computed again."""
        self.found = [0] * engines
        """Tokens of new prompts that each engine took from its prefix cache."""
        self.load = [0] * engines
        """Requests that each engine has not answered."""
