"""With which token the texts of a batch of tasks are made equally long."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from quantize.calibration.fit import warn_of_padding


class Padding:
    """Lets a tokenizer pad with a token that the model's embedding of `vocab` rows has a row for.

    own: the pad token that it came with. lm-eval takes that one, also where it lies beyond the
    embedding, or adds one, which may lie beyond.
    """

    def __init__(self, own: int | None, tokenizer: Any, vocab: int) -> None:
        self._own = own
        self._tokenizer = tokenizer
        self._told = False
        pad = tokenizer.pad_token_id
        if pad is None or not 0 <= pad < vocab:
            named = (tokenizer.eos_token_id, tokenizer.bos_token_id, 0)
            tokenizer.pad_token_id = next(
                token for token in named if token is not None and 0 <= token < vocab
            )

    def tell(self, mask: Tensor) -> None:
        """Say once, when texts are first padded, that it is with another token than the
        tokenizer's own. mask [B, T]: 0 where they are."""
        used = self._tokenizer.pad_token_id
        if not self._told and used != self._own and not mask.bool().all():
            warn_of_padding(self._own, used)
            self._told = True
