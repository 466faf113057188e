"""`pq draft`: one rollout of the parent, one pass of each draft, and everything by replay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from quantize.calibration.bos import Bos
from quantize.calibration.fit import say, warn_of_length
from quantize.draft.figures import GAMMAS, Domain, Sampling, length_of, sampling_of
from quantize.draft.lookup import replay_lookup
from quantize.draft.prompts import PromptSet, prompts_of
from quantize.draft.rollout import Rollout, roll_out
from quantize.draft.tokenizers import SharedIds, compare_ids
from quantize.draft.trace import Trace, trace
from quantize.errors import ModelError, UsageError
from quantize.evaluation.model import Model
from quantize.evaluation.streamed import open_model
from quantize.files.hub_origin import called
from quantize.model.attention import KvNumerics
from quantize.model.attention_cache import CacheNumerics
from quantize.model.dequantized import open_source
from quantize.model.linear import Numerics
from quantize.model.load import load_model, require_readable
from quantize.model.tokenizer import load_tokenizer
from quantize.model.transformers_api import decoder_facts
from quantize.model.transformers_generate import stop_tokens

Progress = Callable[[str, int, int], None]
LOOKUP = "n-gram lookup"
CACHE = "parent on INT4 KV"


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    datasets: tuple[str, ...] = ("builtin",)
    prompts: int = 32
    """Of each data set."""
    prompt_tokens: int = 64
    tokens: int = 128
    """Most that the parent writes after each prompt."""
    temperatures: tuple[float, ...] = (0.0, 1.0)
    gammas: tuple[int, ...] = GAMMAS
    seed: int = 0
    bos: Bos = "auto"
    text_field: str | None = None
    chat_template: bool | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    numerics: Numerics = "kernel"
    attention: CacheNumerics | None = None
    """How drafts attend where they do not say."""
    kv_int4: bool = False
    """Whether to run the parent itself on an INT4 cache as one more draft: what the cache alone
    costs."""

    def __post_init__(self) -> None:
        if not self.temperatures or any(t < 0 for t in self.temperatures):
            raise UsageError("temperatures must be 0 (greedy) or above, at least one of them")
        if not self.gammas or any(g < 1 for g in self.gammas):
            raise UsageError("lengths to replay must be at least 1")


@dataclass(frozen=True)
class DraftFigures:
    """One draft."""

    name: str
    sampling: tuple[Sampling, ...]
    """One for each temperature."""
    bits_per_weight: float | None = None
    kv_cache: str = "16-bit"
    shared_ids: SharedIds | None = None
    folder: Path | None = None
    """None for prompt lookup."""
    same_vocabulary: bool = True
    """Whether config.json gives the parent's vocab_size, which vLLM asks for."""
    context: int | None = None
    """Tokens that config.json says it reads at once; None where it does not, and for prompt lookup."""

    def at(self, temperature: float) -> Sampling:
        """The figures at one temperature."""
        return next(s for s in self.sampling if s.temperature == temperature)


@dataclass(frozen=True)
class Measurement:
    """A parent and its drafts."""

    parent: str
    settings: Settings
    drafts: tuple[DraftFigures, ...]
    sources: tuple[str, ...]
    sha256: str
    """Of the prompts' tokens; empty for saved rollouts."""
    vocab: int
    rollouts: tuple[Rollout, ...] = field(repr=False)
    traces: tuple[tuple[Trace, ...], ...] = field(repr=False)
    """[drafts][temperatures], prompt lookup not among them."""
    context: int | None = None
    """See `DraftFigures.context`."""


def measure(
    parent: Path,
    drafts: Sequence[Path],
    settings: Settings | None = None,
    *,
    names: Sequence[str] | None = None,
    saved: Sequence[Rollout] | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Measurement:
    """Measure drafts against their parent, prompt lookup beside them. Raises PqError subclasses.

    names: what to call the drafts. saved: rollouts of this parent instead of new ones.
    """
    how = settings or Settings()
    tokenizer = load_tokenizer(parent)
    facts = [_facts(folder) for folder in (parent, *drafts)]
    shared = [compare_ids(tokenizer, load_tokenizer(folder), folder) for folder in drafts]
    vocab = min(vocab for vocab, _ in facts)
    if saved is None:
        prompts = prompts_of(
            tokenizer,
            how.datasets,
            how.prompts,
            how.prompt_tokens,
            bos=how.bos,
            text_field=how.text_field,
            chat_template=how.chat_template,
        )
        say(prompts.notes)
        longest = max(len(prompt.ids) for prompt in prompts.prompts) + how.tokens
        warn_of_length(longest, open_source(parent).config)
        rollouts = _rollouts(parent, prompts, tokenizer, vocab, how, progress)
        sources, sha256 = prompts.sources, prompts.sha256
    else:
        rollouts, sources, sha256 = list(saved), ("a saved rollout",), ""
        how = replace(how, temperatures=tuple(rollout.temperature for rollout in rollouts))
    theirs = open_model(parent, how.device, how.dtype, how.numerics)
    opened = [open_model(f, how.device, how.dtype, how.numerics, how.attention) for f in drafts]
    called_so = list(names or map(called, drafts))
    folders = list(drafts)
    if how.kv_int4:
        opened.append(open_model(parent, how.device, how.dtype, how.numerics, KvNumerics()))
        called_so.append(CACHE)
        folders.append(parent)
        shared.append(compare_ids(tokenizer, tokenizer, parent))
        facts.append(facts[0])
    traces = trace(theirs, opened, rollouts, vocab, progress)
    figures = [
        _figures(
            name, folder, model, found, ids, tokenizer, how.gammas, size == facts[0][0], context
        )
        for name, folder, model, found, ids, (size, context) in zip(
            called_so, folders, opened, traces, shared, facts[1:], strict=True
        )
    ]
    figures.append(DraftFigures(LOOKUP, tuple(_lookup(r, how.gammas) for r in rollouts)))
    return Measurement(
        called(parent),
        how,
        tuple(figures),
        sources,
        sha256,
        vocab,
        tuple(rollouts),
        tuple(map(tuple, traces)),
        facts[0][1],
    )


def _rollouts(
    parent: Path,
    prompts: PromptSet,
    tokenizer: Any,
    vocab: int,
    how: Settings,
    progress: Progress,
) -> list[Rollout]:
    model = load_model(parent, how.device, how.dtype, how.numerics)
    eos = tokenizer.eos_token_id
    stop = stop_tokens(parent, None if eos is None else int(eos))
    return [
        roll_out(
            model,
            prompts.prompts,
            how.tokens,
            temperature,
            seed=how.seed,
            stop=stop,
            vocab=vocab,
            device=how.device,
            progress=progress,
        )
        for temperature in how.temperatures
    ]


def _figures(
    name: str,
    folder: Path,
    model: Model,
    traces: Sequence[Trace],
    ids: SharedIds,
    tokenizer: Any,
    gammas: Sequence[int],
    same_vocabulary: bool,
    context: int | None,
) -> DraftFigures:
    return DraftFigures(
        name,
        tuple(sampling_of(found, tokenizer, gammas) for found in traces),
        model.bits_per_weight,
        model.kv_cache,
        ids,
        folder,
        same_vocabulary,
        context,
    )


def _lookup(rollout: Rollout, gammas: Sequence[int]) -> Sampling:
    """Prompt lookup, of which nothing is known but what is accepted."""
    names = [prompt.domain for prompt in rollout.prompts]
    domains = []
    for name in dict.fromkeys(names):
        kept = [i for i, n in enumerate(names) if n == name]
        part = Rollout(
            rollout.temperature,
            tuple(rollout.prompts[i] for i in kept),
            tuple(rollout.tokens[i] for i in kept),
        )
        lengths = tuple(length_of(replay_lookup(part, g), None) for g in gammas)
        domains.append(Domain(name, len(kept), part.count, None, None, lengths))
    return Sampling(
        rollout.temperature,
        len(rollout.tokens),
        rollout.count,
        None,
        None,
        None,
        None,
        tuple(length_of(replay_lookup(rollout, g), None) for g in gammas),
        tuple(domains),
    )


def _facts(folder: Path) -> tuple[int, int | None]:
    """Size of the vocabulary, and tokens read at once where config.json says."""
    source = open_source(folder)
    require_readable(source)
    facts = decoder_facts(folder, source.config)
    size, context = facts.get("vocab_size"), facts.get("max_position_embeddings")
    if not isinstance(size, int) or size < 1:
        raise ModelError(
            f"{folder}/config.json: vocab_size is {size!r}, expected a positive integer"
        )
    return size, context if isinstance(context, int) and context > 0 else None
