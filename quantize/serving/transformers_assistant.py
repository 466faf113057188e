"""Policies of speculation lengths in transformers' assisted generation, through its own parts.

`generate(custom_generate=…)` is given a function that runs transformers' assisted decoding with
another generator of candidates: a subclass of its own, which asks the policy how many tokens to draft
and tells it what became of them. Checking and sampling stay transformers'.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.candidate_generator import AssistedCandidateGenerator
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from quantize.errors import ModelError, UsageError
from quantize.serving.speculation.policy import Policy, Round, Signal, Speculation

Watch = Callable[[Round], None]
_MODE = "_assisted_decoding"
_FACTORY = "_get_candidate_generator"


class PolicyCandidateGenerator(AssistedCandidateGenerator):  # type: ignore[misc]
    """transformers' generator of candidates, its lengths settled by a policy."""

    def __init__(self, speculation: Speculation, watch: Watch | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.speculation, self.watch = speculation, watch
        self.assistant_confidence_threshold = 0.0
        self.generation_config.assistant_confidence_threshold = 0.0
        sampled = self.generation_config.do_sample
        chosen = self.generation_config.temperature
        self.temperature = float(1.0 if chosen is None else chosen) if sampled else 0.0
        self.signals: list[Signal] = []
        self.log_q: Tensor | None = None

    def get_candidates(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Draft as many tokens as the policy says."""
        self.signals, self.log_q = [], None
        self.num_assistant_tokens = self.speculation.length()
        ids, logits = super().get_candidates(input_ids, **kwargs)
        if logits is not None:
            # processed as the parent's are: what is compared is what is sampled from
            self.log_q = torch.log_softmax(logits[0].float(), -1)
            self.signals = signals_of(self.log_q)
        return ids, logits

    def update_candidate_strategy(
        self, input_ids: Tensor, scores: Tensor, num_matches: int
    ) -> None:
        """Tell the policy what the parent accepted. scores [1, drafted + 1, V]: the parent's."""
        if self.log_q is None:
            step = Round(0, 0, temperature=self.temperature)
        else:
            drafted = len(self.log_q)
            log_p = torch.log_softmax(scores[0, :drafted].float(), -1).to(self.log_q.device)
            V = min(log_p.shape[-1], self.log_q.shape[-1])
            terms = log_p[:, :V].exp() * (log_p[:, :V] - self.log_q[:, :V])
            # tokens that a processor forbids have probability 0: 0 · ∞ is nothing here
            kl = terms.nan_to_num(nan=0.0).sum(-1).clamp_min(0)
            step = Round(drafted, int(num_matches), self.signals, kl.tolist(), self.temperature)
        self.speculation.learn(step)
        if self.watch is not None:
            self.watch(step)

    def _prepare_generation_args(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        given: dict[str, Any] = super()._prepare_generation_args(*args, **kwargs)
        ends = _PolicyEnds(self.speculation)
        return given | {"stopping_criteria": StoppingCriteriaList([ends])}


class _PolicyEnds(StoppingCriteria):  # type: ignore[misc]
    """Ends a draft where the policy says so."""

    def __init__(self, speculation: Speculation) -> None:
        self.speculation = speculation
        self.signals: list[Signal] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        last = torch.log_softmax(scores[-1].float(), -1)
        self.signals += signals_of(last)
        ended = not self.speculation.goes_on(self.signals)
        return torch.full((len(input_ids),), ended, device=input_ids.device)


def signals_of(log_q: Tensor) -> list[Signal]:
    """Log-probabilities [n, V] → what policies are told of each."""
    q = log_q.exp()
    entropy = -(q * log_q).nan_to_num(nan=0.0).sum(-1)
    two = q.topk(min(2, q.shape[-1]), -1).values
    second = two[:, -1] if two.shape[-1] > 1 else torch.zeros_like(two[:, 0])
    rows = torch.stack([entropy, two[:, 0], two[:, 0] - second], -1).tolist()
    return [Signal(*row) for row in rows]


class Assisted:
    """What `generate(custom_generate=…)` takes: assisted generation by a draft under a policy."""

    def __init__(self, draft: Any, policy: Policy, watch: Watch | None = None) -> None:
        self.draft, self.policy, self.watch = draft, policy, watch

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """Called by `generate`; batch 1. UsageError for beams, ModelError for a release of
        transformers whose assisted generation is built otherwise."""
        if (generation_config.num_beams or 1) > 1:
            raise UsageError("assisted generation follows one sequence; set num_beams to 1")
        kind = type(model)
        if not (hasattr(kind, _MODE) and hasattr(kind, _FACTORY)):
            raise ModelError(
                f"{kind.__name__} of this transformers has no {_MODE} or {_FACTORY}, which lengths "
                "of drafts go through; install a release that pq was tested with"
            )
        speculation = self.policy.start()
        draft, watch = self.draft, self.watch

        def factory(**given: Any) -> PolicyCandidateGenerator:
            names = (
                "input_ids",
                "generation_config",
                "model_kwargs",
                "inputs_tensor",
                "logits_processor",
            )
            kept = {name: given[name] for name in names if name in given}
            return PolicyCandidateGenerator(speculation, watch, assistant_model=draft, **kept)

        # transformers chooses the generator in a method of the model: one with another method, the
        # rest shared, so that calls of the same model elsewhere are left alone
        stand_in = copy.copy(model)
        object.__setattr__(stand_in, _FACTORY, factory)
        return getattr(stand_in, _MODE)(
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            assistant_model=draft,
            **model_kwargs,
        )


def generated(
    model: Any,
    prompt: Sequence[int],
    count: int,
    draft: Any,
    policy: Policy,
    temperature: float,
) -> tuple[list[int], list[Round]]:
    """Up to `count` tokens after a prompt, written by assisted generation, and its steps. Sampling
    draws from torch's global generator."""
    steps: list[Round] = []
    ids = torch.tensor([list(prompt)], device=model.device)
    how: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        how |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        custom_generate=Assisted(draft, policy, steps.append),
        max_new_tokens=count,
        **how,
    )
    return out[0, len(prompt) :].tolist(), steps
