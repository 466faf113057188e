"""What an evaluation found, as `quantize.evaluate` returns it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantize.api.html import figure, table
from quantize.evaluation.figures import Evaluation
from quantize.evaluation.task_comparison import TaskScore
from quantize.evaluation.task_results import TaskRun


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation found."""

    model: str
    baseline: str | None
    figures: Evaluation | None
    """Perplexity, and the divergence from the baseline; None where only tasks were run."""
    tasks: TaskRun | None
    """Scores of tasks; None where none were run."""
    scores: list[TaskScore]
    """Those scores beside the baseline's."""
    saved_in: Path | None
    """Folder of the results."""
    baseline_commit: str | None
    """That of a baseline on the Hub."""

    @property
    def perplexity(self) -> float | None:
        """Of the model."""
        return self.figures.perplexity if self.figures else None

    @property
    def kld_mean(self) -> float | None:
        """Mean KL(baseline ‖ model), nats per token."""
        return self.figures.kld_mean if self.figures else None

    @property
    def top1_agreement(self) -> float | None:
        """Share of tokens whose likeliest successor is the baseline's."""
        return self.figures.top1_agreement if self.figures else None

    def _repr_html_(self) -> str:
        rows, found = [], self.figures
        if found:
            rows += [
                ["perplexity", figure(found.baseline_perplexity, 4), figure(found.perplexity, 4)],
                ["KLD mean", "", figure(found.kld_mean, 5, found.kld_stderr)],
                ["KLD p99", "", figure(found.kld_p99, 4)],
                ["same top-1", "", figure(found.top1_agreement, 4, found.top1_stderr)],
                ["bits per weight", "", figure(found.bits_per_weight, 3)],
                ["KV cache", "16-bit" if self.baseline else "", found.kv_cache],
            ]
        for task, metrics in (self.tasks.tasks if self.tasks else {}).items():
            theirs = {s.metric: s.baseline for s in self.scores if s.task == task}
            rows += [
                [f"{task}: {metric}", figure(theirs.get(metric), 4), figure(facts["value"], 4)]
                for metric, facts in metrics.items()
            ]
        of = f" on {found.data}" if found else ""
        return table(f"{self.model}{of}", rows, ["", self.baseline or "", self.model])
