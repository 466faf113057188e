"""One block's FFN turned into a mixture of experts and taught, with what it is
compared with on held-out tokens."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from quantize.methods.ladimo.budget import neurons_for
from quantize.methods.ladimo.dense import Ffn
from quantize.methods.ladimo.distill import Training, distill, refit_down
from quantize.methods.ladimo.lesson import Lesson
from quantize.methods.ladimo.pruning import prune
from quantize.methods.ladimo.routing import Budget, profile
from quantize.methods.ladimo.split import Construction, Layout
from quantize.methods.ladimo.student import Student
from quantize.methods.ladimo.trial import Start
from quantize.parallel.ranks import ALONE, Ranks

Teaching = Literal["none", "least-squares", "distill"]

_LESSONS: Mapping[Teaching, tuple[Teaching, ...]] = {
    "none": (),
    "least-squares": ("least-squares",),
    "distill": ("least-squares", "distill"),
}


# Tokens that the other splits are ranked on, which are only told about: on all of them they would
# take longer than the one that is taught.
_COMPARED = 8192


@dataclass(frozen=True)
class Teacher:
    """How FFNs are converted."""

    layout: Layout
    construction: Construction
    teaching: Teaching
    adaptive: bool
    training: Training
    stored: torch.dtype
    """What the weights are rounded to in the end."""
    ranks: Ranks = ALONE
    """The processes that teach together."""

    def teach(self, ffn: Ffn, lesson: Lesson, mean: float) -> tuple[Student, dict[str, Any]]:
        """The converted FFN with `mean` routed experts a token on average, and facts about it.

        `ffn_error` is the relative squared error on held-out tokens; `untrained_error`,
        `random_error` and `pruned_error` those of the same split without training, of a random one,
        and of static pruning to a dense FFN of equally many activated parameters; `split_errors`
        those of every construction, others than this one's made on a sample of the tokens.
        """
        seed = self.training.seed
        start = Start.of(ffn, lesson.train, self.layout, self.construction, seed)
        budget = Budget.plain(mean)
        student = copy.deepcopy(start.student(budget, start.router(budget, seed)))
        splits = self._constructions(ffn, lesson, mean, lesson.held_out.error(student))
        student, taught, losses = self._teach(student, lesson)
        student.round(self.stored)
        errors = self._settle(student, lesson, mean)
        facts = {
            "policy": self._best(errors),
            "policy_errors": errors,
            "ffn_error": errors[self._best(errors)],
            "untrained_error": splits[self.construction],
            "taught": taught,
            "random_error": splits["random"],
            "split_errors": splits,
            "pruned_error": self._pruned_error(ffn, lesson, mean),
            "losses": [float(f"{loss:.4g}") for loss in losses[:: max(1, len(losses) // 100)]],
        }
        return student, facts | profile(student.scores(lesson.held_out.x), student.policy)

    def _teach(self, student: Student, lesson: Lesson) -> tuple[Student, Teaching, list[float]]:
        """The student as far as teaching lowers the error on held-out tokens,
        how far that is, and losses."""
        done: Teaching = "none"
        losses: list[float] = []
        for teaching in _LESSONS[self.teaching]:
            tried = copy.deepcopy(student)
            if teaching == "distill":
                losses = distill(tried, lesson.train, self.training, self.ranks)
            else:
                refit_down(tried, lesson.train)
            if lesson.held_out.error(tried) < lesson.held_out.error(student):
                student, done = tried, teaching
        return student, done, losses

    def _settle(self, student: Student, lesson: Lesson, mean: float) -> dict[str, float]:
        """Choose the policy that has the least error on held-out tokens (LaDiMo's
        stage 2). Returns all errors.

        Where only a fixed number of experts can be held, the
        threshold's error says what that costs.
        """
        scores = student.scores(lesson.train.x)
        policies = {"threshold": Budget(mean, True).policy(scores)}
        if mean == round(mean) > 0:
            policies["top-k"] = Budget(mean, False).policy(scores)
        errors = {}
        for name, policy in policies.items():
            student.policy = policy
            errors[name] = lesson.held_out.error(student)
        student.policy = policies[self._best(errors)]
        return errors

    def _best(self, errors: Mapping[str, float]) -> str:
        return min(errors, key=lambda name: errors[name]) if self.adaptive else "top-k"

    def _constructions(
        self, ffn: Ffn, lesson: Lesson, mean: float, chosen: float
    ) -> dict[str, float]:
        """Errors of all splits with fitted routers and no training, and of the
        published one without shared expert.

        chosen: that of this construction, which is not made anew.
        """
        alone = Layout(-(-self.layout.neurons // self.layout.size), self.layout.size, 0)
        kinds: dict[str, tuple[Construction, Layout]] = {
            name: (name, self.layout) for name in get_args(Construction)
        }
        if alone.neurons == self.layout.neurons:
            kinds["contiguous, none shared"] = ("contiguous", alone)
        errors: dict[str, float] = {self.construction: chosen}
        seen = lesson.train.sample(_COMPARED)
        for name, (construction, layout) in kinds.items():
            if name == self.construction:
                continue
            # Neurons that a token meets are as many in all.
            visits = mean + (self.layout.shared - layout.shared) / layout.size
            budget = Budget.plain(visits)
            start = Start.of(ffn, seen, layout, construction, self.training.seed)
            errors[name] = lesson.held_out.error(
                start.student(budget, start.router(budget, self.training.seed))
            )
        return errors

    def _pruned_error(self, ffn: Ffn, lesson: Lesson, mean: float) -> float:
        found = prune(ffn, lesson.train.x, neurons_for(ffn.down.shape[0], self.layout, mean))
        kept = Ffn(ffn.gate[found.kept], ffn.up[found.kept], ffn.down[:, found.kept], ffn.act)
        return lesson.held_out.error(lambda x: kept(x) + found.bias)
