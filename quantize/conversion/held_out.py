"""The look at an output's quality before it appears: a few windows of text that calibration did not
use, through the files that were written and through the parent."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from quantize.calibration.bos import bos_of
from quantize.calibration.fit import context_of
from quantize.calibration.tokens import TokenSet, evaluation_tokens, sha256_of
from quantize.conversion.plan import Plan
from quantize.conversion.request import Progress
from quantize.errors import DataError, PqError
from quantize.evaluation.held_out import look
from quantize.model.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

_SEQLEN = 512
"""Tokens of a window where a recipe has no calibration, whose windows would say."""
_CALIBRATION = "the calibration set, windows that calibration did not use"


_FAULTS = (
    ArithmeticError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a look may stumble over that is nobody's mistake of use."""


@dataclass(frozen=True)
class _Text:
    tokens: Tensor
    """[N, T] int64."""
    source: str


def look_at(
    plan: Plan, tokens: TokenSet | None, folder: Path, progress: Progress
) -> dict[str, Any] | None:
    """What pq.json says under `held_out`: figures, or under `not_measured` why there are none; None
    where no look was asked for.

    tokens: what the model was calibrated on. folder: where the output's files are now. Never raises
    because of what it finds: the conversion is done, and worth more than a look at it.
    """
    request = plan.request
    if not request.check_windows:
        return {"not_measured": request.unchecked} if request.unchecked else None
    try:
        text = _text(plan, tokens)
        found = look(
            folder,
            request.model,
            text.tokens,
            text.source,
            sha256_of(text.tokens),
            vocab=plan.shape.vocab,
            device=request.device,
            dtype=request.dtype,
            beyond=plan.format.engine_beyond,
            progress=progress,
        )
    except PqError as err:
        reason = (
            str(err).replace(str(folder), "the output").replace(str(request.model), "the parent")
        )
    except _FAULTS as err:
        log.exception("no look at held-out windows")
        first = (str(err).strip().splitlines() or [""])[0][:200]
        reason = f"{type(err).__name__}: {first}"
    else:
        log.info("held out: %s", found)
        return found.as_json()
    log.warning("quality was not measured: %s", reason)
    return {"not_measured": reason}


def windows_of_look(plan: Plan, tokens: TokenSet | None) -> tuple[int, int]:
    """Number and length [N, T] of the windows that a look will read."""
    N = plan.request.check_windows
    if tokens is None or tokens.held_out is None:
        return N, _seqlen(plan, tokens)
    return int(tokens.held_out.shape[0]), int(tokens.held_out.shape[1])


def _seqlen(plan: Plan, tokens: TokenSet | None) -> int:
    if tokens is not None:
        return int(tokens.tokens.shape[1])
    return min(_SEQLEN, context_of(plan.source.config) or _SEQLEN)


def _text(plan: Plan, tokens: TokenSet | None) -> _Text:
    """Windows that calibration set apart; where it has none, of the built-in text."""
    if tokens is not None and tokens.held_out is not None:
        return _Text(tokens.held_out, f"{tokens.source}: {_CALIBRATION}")
    tokenizer = load_tokenizer(plan.request.model)
    found = evaluation_tokens(
        tokenizer,
        dataset="builtin",
        seqlen=_seqlen(plan, tokens),
        max_windows=plan.request.check_windows,
        bos=bos_of(tokenizer, plan.recipe.calibration.bos),
    )
    if int(found.tokens.max()) >= plan.shape.vocab:
        raise DataError("the tokenizer has tokens that the model has no row for")
    return _Text(found.tokens, found.source)
