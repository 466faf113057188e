"""Whether a window of text begins with the tokenizer's BOS token.

Models that were trained with BOS in front of every text put an attention sink on it and are far
from themselves without one; others never saw one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from quantize.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Bos = Literal["auto", "always", "never"]
BOS: tuple[Bos, ...] = ("auto", "always", "never")


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself puts BOS in front of a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("x")["input_ids"])[:1] == [bos]


def bos_of(tokenizer: PreTrainedTokenizerBase, choice: Bos) -> int | None:
    """Return the id that each window begins with, or None.

    choice: auto does what the tokenizer does to a text, always and never say so.
    UsageError for always without a BOS token.
    """
    bos = tokenizer.bos_token_id
    if choice == "always" and bos is None:
        raise UsageError("bos always: the tokenizer has no BOS token; choose auto or never")
    return int(bos) if choice == "always" or (choice == "auto" and adds_bos(tokenizer)) else None
