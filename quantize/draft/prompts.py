"""What a parent is asked to go on from: the starts of texts, and chats up to the answer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantize.calibration import text_sources
from quantize.calibration.bos import Bos, bos_of
from quantize.calibration.chats import Chat
from quantize.calibration.notes import Notes
from quantize.calibration.tokens import CHARACTERS_PER_TOKEN, evaluation_tokens
from quantize.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_APART = 8
"""Prompts of one running text begin at least so many prompt lengths apart where it is long enough:
neighbours say much the same, and intervals take prompts as independent."""
_MOST_CHATS = 4096
"""Rows of a set of chats that are looked at for prompts."""
ANSWER = "assistant"


@dataclass(frozen=True)
class Prompt:
    """Tokens that a model is to go on from."""

    domain: str
    """The data set."""
    ids: tuple[int, ...]


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one or more data sets."""

    prompts: tuple[Prompt, ...]
    sources: tuple[str, ...]
    """For people: which texts these are."""
    sha256: str
    """Of the tokens."""
    notes: Notes = ()


def prompts_of(
    tokenizer: PreTrainedTokenizerBase,
    datasets: Sequence[str],
    count: int,
    length: int,
    *,
    bos: Bos = "auto",
    text_field: str | None = None,
    chat_template: bool | None = None,
) -> PromptSet:
    """Up to `count` prompts of each data set: `length` tokens of text, or a chat up to its last
    answer through the tokenizer's template, at whatever length.

    datasets: as `pq eval --dataset` takes them, each a domain of the report.
    Raises DataError where a set gives none.
    """
    prompts: list[Prompt] = []
    sources: list[str] = []
    notes: Notes = ()
    for dataset in datasets:
        domain = text_sources.name_of(dataset)
        found = _chats(tokenizer, dataset, domain, count, text_field, chat_template)
        if found is None:
            found = _texts(
                tokenizer, dataset, domain, count, length, bos, text_field, chat_template
            )
        mine, source, said = found
        prompts += mine
        sources.append(source)
        notes = (*notes, *said)
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(" ".join(map(str, prompt.ids)).encode() + b"\n")
    return PromptSet(tuple(prompts), tuple(sources), digest.hexdigest(), notes)


_Found = tuple[list[Prompt], str, Notes]


def _texts(
    tokenizer: PreTrainedTokenizerBase,
    dataset: str,
    domain: str,
    count: int,
    length: int,
    bos: Bos,
    text_field: str | None,
    chat_template: bool | None,
) -> _Found:
    text = evaluation_tokens(
        tokenizer,
        dataset=dataset,
        seqlen=length,
        max_windows=count * _APART,
        bos=bos_of(tokenizer, bos),
        text_field=text_field,
        chat_template=chat_template,
    )
    rows = text.tokens.tolist()
    apart = max(1, len(rows) // count)
    chosen = rows[::apart][:count]
    return [Prompt(domain, tuple(row)) for row in chosen], text.source, text.notes


def _chats(
    tokenizer: PreTrainedTokenizerBase,
    dataset: str,
    domain: str,
    count: int,
    text_field: str | None,
    chat_template: bool | None,
) -> _Found | None:
    """Prompts of a set of chats; None for other texts and where no template is to be used."""
    if chat_template is False or not getattr(tokenizer, "chat_template", None):
        return None
    limit = CHARACTERS_PER_TOKEN * _MOST_CHATS
    text = text_sources.load(dataset, "evaluation", text_field, limit)
    rows: list[Chat] = [row for row in text.rows[:_MOST_CHATS] if isinstance(row, Chat)]
    if chat_template and text.packing != "stream":
        rows = [
            row if isinstance(row, Chat) else Chat([{"role": "user", "content": row}])
            for row in text.rows[:_MOST_CHATS]
        ]
    if not rows:
        return None
    prompts: list[Prompt] = []
    reason = "no chat has a turn before an answer"
    for chat in rows:
        asked = _before_answer(chat)
        if not asked:
            continue
        try:
            written = tokenizer.apply_chat_template(
                asked, tools=chat.tools, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # templates raise what they like
            reason = f"the chat template refuses them ({str(error).splitlines()[0][:120]})"
            continue
        ids = tokenizer(str(written), add_special_tokens=False, verbose=False)["input_ids"]
        prompts.append(Prompt(domain, tuple(ids)))
        if len(prompts) == count:
            break
    if not prompts:
        raise DataError(f"{text.source}: no prompt can be made of its chats: {reason}")
    return prompts, f"{text.source} (chat template, answers asked for)", text.notes


def _before_answer(chat: Chat) -> list[dict[str, object]]:
    """The messages before the last answer; all where the chat ends with a question."""
    roles = [message["role"] for message in chat.messages]
    last = len(roles) - 1 - roles[::-1].index(ANSWER) if ANSWER in roles else len(roles)
    return list(chat.messages[:last])
