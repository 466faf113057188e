"""A packed model against its parent: perplexity, KL divergence and agreement on the same windows.

Nothing is held whole: models are run one decoder block at a time over as many windows as a budget
of hidden states allows, and logits exist for a few positions at a time, so size of model, text and
vocabulary do not bound the run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from quantize.calibration.bos import Bos
from quantize.calibration.fit import say, warn_of_length, warn_of_tokenizer, warn_without_bos
from quantize.errors import DataError, ModelError
from quantize.evaluation.figures import Evaluation, Run
from quantize.evaluation.model import Model, Span
from quantize.evaluation.parents import ParentCache
from quantize.evaluation.protocols import Protocol, ProtocolName, Windows, windows_of
from quantize.evaluation.records import Records
from quantize.evaluation.sharing import require_alike, shared_windows
from quantize.evaluation.streamed import StreamedModel, open_model, windows_of_a_pass
from quantize.files.hub_origin import called, commit_of
from quantize.model.attention_cache import CacheNumerics
from quantize.model.dequantized import open_source
from quantize.model.linear import Numerics
from quantize.model.load import require_readable
from quantize.model.load_others import of_others
from quantize.model.tokenizer import load_tokenizer
from quantize.model.transformers_api import decoder_facts
from quantize.parallel.ranks import ALONE, Ranks

Progress = Callable[[str, int, int], None]
_Group = tuple[int, int, list[Span]]
"""First window, end, and the spans inside, which count windows from the first."""
LOGIT_BYTES = 1 << 26
"""Of the float32 logits compared at once; what is computed of them takes several times as much."""
_HIDDEN_BYTES = 1 << 29
"""Of the hidden states of one model held at once: blocks are loaded anew for each such group of
windows, so that less would read the model more often."""


@dataclass(frozen=True)
class Measured:
    """Figures and the per-token records they are made from."""

    figures: Evaluation
    records: Records


def evaluate(
    model: Path,
    baseline: Path | None,
    *,
    dataset: str = "builtin",
    text_field: str | None = None,
    chat_template: bool | None = None,
    seqlen: int = 512,
    max_windows: int | None = None,
    protocol: ProtocolName = "strided",
    context: int = 0,
    bos: Bos = "auto",
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    numerics: Numerics = "kernel",
    attention: CacheNumerics | None = None,
    progress: Progress = lambda what, done, total: None,
    ranks: Ranks = ALONE,
    parents: ParentCache | None = None,
) -> Evaluation:
    """Perplexity of one model, and its divergence from `baseline` where one is given; arguments are
    those of `measure`. Raises PqError subclasses."""
    measured = measure(
        [model],
        baseline,
        Protocol(protocol, seqlen, context),
        dataset=dataset,
        text_field=text_field,
        chat_template=chat_template,
        max_windows=max_windows,
        bos=bos,
        device=device,
        dtype=dtype,
        numerics=numerics,
        attention=attention,
        progress=progress,
        ranks=ranks,
        parents=parents,
    )
    return measured[0].figures


def measure(
    models: Sequence[Path],
    baseline: Path | None,
    protocol: Protocol,
    *,
    dataset: str = "builtin",
    text_field: str | None = None,
    chat_template: bool | None = None,
    max_windows: int | None = None,
    bos: Bos = "auto",
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    numerics: Numerics = "kernel",
    attention: CacheNumerics | None = None,
    progress: Progress = lambda what, done, total: None,
    ranks: Ranks = ALONE,
    parents: ParentCache | None = None,
) -> list[Measured]:
    """Measure several models against one baseline on the same windows in one run.

    dataset: "builtin", a file, a name of calib_data/ or a Hub set; the
    first model's tokenizer cuts it.
    text_field, chat_template: which column of rows is read, and whether through the first model's
    chat template; None: chats are, as they are recognized.
    attention: how the models (not the baseline) attend where their checkpoints do not say.
    max_windows: stop after so many windows (rolling: after so many times seqlen tokens).
    bos: whether strided windows begin with BOS; auto: where the first model's tokenizer adds it.
    ranks: divide the windows among themselves; all of them return what
    one process would, bit for bit.
    parents: where runs of parents are kept, for one process alone; None: nowhere.
    Raises PqError subclasses.
    """
    device = device or torch.device("cpu")
    with ranks.explain():
        vocab = _vocabulary(models, baseline)
        tokenizer = load_tokenizer(models[0])
        protocol = protocol.with_bos(tokenizer, bos)
        told = {
            "protocol": protocol.name,
            "numerics": numerics,
            "dtype": str(dtype),
            "attention": str(attention),
        }
        require_alike(ranks, device, [*models, *([baseline] if baseline else [])], told)
        windows = shared_windows(
            ranks,
            lambda: windows_of(
                protocol, tokenizer, dataset, max_windows, vocab, text_field, chat_template
            ),
        )
        if ranks.first:
            say(windows.notes)
            warn_of_tokenizer(tokenizer, vocab)
            warn_without_bos(tokenizer, bos)
            warn_of_length(windows.inputs.shape[1], open_source(models[0]).config)
        parent = None if baseline is None else open_model(baseline, device, dtype, numerics)
        if parents is not None and isinstance(parent, StreamedModel) and ranks.size == 1:
            assert baseline is not None
            parent.kept = parents.of(baseline, windows, protocol, dtype, device, numerics)
        opened = [open_model(folder, device, dtype, numerics, attention) for folder in models]
        records = records_of(opened, parent, windows, vocab, progress, ranks)
    name = None if baseline is None else called(baseline)
    kind = str(dtype).removeprefix("torch.")
    run = Run(name, protocol, numerics, kind, windows, tokenizer, commit_of(baseline))
    return [
        Measured(run.figures(folder, record, model, parent), record)
        for folder, model, record in zip(models, opened, records, strict=True)
    ]


def records_of(
    models: Sequence[Model],
    parent: Model | None,
    windows: Windows,
    vocab: int,
    progress: Progress = lambda what, done, total: None,
    ranks: Ranks = ALONE,
) -> list[Records]:
    """Records of each model, beside the parent's where there is one; vocab: logits of a token.

    UsageError where a model cannot read windows of this length.
    """
    everyone = [*models, *([parent] if parent else [])]
    for m in everyone:
        m.require_positions(windows.inputs.shape[1])
    window_bytes = max(m.hidden_bytes(windows.inputs.shape[1]) for m in everyone)
    groups = list(_groups(windows, vocab, window_bytes, ranks))
    records = [
        record.gather(ranks) for record in _records(models, parent, windows, groups, progress)
    ]
    for model in everyone:
        model.count_together(ranks)
    return records


def _records(
    models: Sequence[Model],
    parent: Model | None,
    windows: Windows,
    groups: Sequence[_Group],
    progress: Progress,
) -> list[Records]:
    """Records of each model on the windows of all groups."""
    records = [Records() for _ in models]
    everyone = [*models, *([parent] if parent else [])]
    total, done = len(groups) * sum(m.units for m in everyone), 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress("evaluating", done, total)

    progress("evaluating", 0, total)
    for start, end, spans in groups:
        inputs, targets = windows.inputs[start:end], windows.targets[start:end]
        theirs = parent.read(inputs, tick) if parent else None
        for model, record in zip(models, records, strict=True):
            ours = model.read(inputs, tick)
            parents = theirs(spans) if theirs else itertools.repeat(None)
            for (window, first, last), q, p in zip(spans, ours(spans), parents, strict=False):
                record.add(start + window, first, q, p, targets[window, first:last])
            del ours  # its hidden states go before the next model's come
    return records


def _vocabulary(models: Sequence[Path], baseline: Path | None) -> int:
    first, *others = [_vocabulary_of(folder) for folder in models]
    if baseline is not None:
        parents = _vocabulary_of(baseline)
        if first != parents:
            raise DataError(
                f"{models[0]} has {first} tokens and {baseline} {parents}; --baseline must be the "
                "model's parent"
            )
    if any(size != first for size in others):
        raise DataError(
            "the models have vocabularies of different sizes; compare conversions of one parent"
        )
    return first


def _vocabulary_of(folder: Path) -> int:
    source = open_source(folder)
    # before the tokenizer, which stumbles over a broken config.json in words of its own
    if not of_others(source):  # which transformers may read
        require_readable(source)
    size = decoder_facts(folder, source.config).get("vocab_size")
    if not isinstance(size, int) or size < 1:
        raise ModelError(
            f"{folder}/config.json: vocab_size is {size!r}, expected a positive integer"
        )
    return size


def _groups(windows: Windows, vocab: int, window_bytes: int, ranks: Ranks) -> Iterator[_Group]:
    """Yield the groups of this rank's windows: so many at once that their hidden states fit.

    Ranks have whole passes, as one process makes them: products of other
    shapes may differ in the last bit.
    """
    affordable = max(1, _HIDDEN_BYTES // max(1, window_bytes))
    together = min(affordable, windows_of_a_pass(windows.inputs.shape[1]))
    at_once = affordable // together * together
    share = math.ceil(math.ceil(len(windows.inputs) / together) / ranks.size) * together
    mine = range(len(windows.inputs))[ranks.rank * share : (ranks.rank + 1) * share]
    length = max(1, LOGIT_BYTES // (4 * vocab))
    spans = windows.spans()
    for start in mine[::at_once]:
        end = min(start + at_once, mine.stop)
        inside = [(w - start, f, e) for w, f, e in spans if start <= w < end]
        yield (
            start,
            end,
            [(w, i, min(i + length, e)) for w, f, e in inside for i in range(f, e, length)],
        )
