"""Whether two models mean the same by their token ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantize.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REMEDY = (
    "a draft must share its parent's ids; engines can translate text between vocabularies (vLLM: "
    "use_heterogeneous_vocab, transformers: assistant_tokenizer), which pq does not measure"
)


@dataclass(frozen=True)
class SharedIds:
    """What the tokenizers of a parent and a draft have in common."""

    shared: int
    """Ids that both know, all by the same token."""
    only_parent: int
    only_draft: int

    @property
    def note(self) -> str:
        """What to say of ids that one of them lacks; empty where they are equal."""
        if not self.only_parent and not self.only_draft:
            return ""
        return (
            f"tokenizers agree on {self.shared} ids; {self.only_parent} are the parent's alone, "
            f"{self.only_draft} the draft's"
        )


def compare_ids(
    parent: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase, folder: Path
) -> SharedIds:
    """Compare by ids; ModelError where an id means two things, or few are shared.

    folder: of the draft, for messages.
    """
    theirs, ours = _by_id(parent), _by_id(draft)
    both = theirs.keys() & ours.keys()
    odd = sorted(index for index in both if theirs[index] != ours[index])
    if odd:
        first = odd[0]
        raise ModelError(
            f"{folder}: its tokenizer is not the parent's: {len(odd)} of {len(both)} ids differ, the "
            f"first {first} ({ours[first]!r}, the parent's {theirs[first]!r}); {_REMEDY}"
        )
    found = SharedIds(len(both), len(theirs) - len(both), len(ours) - len(both))
    if 2 * found.shared < len(theirs):
        raise ModelError(
            f"{folder}: its tokenizer knows {found.shared} of the parent's {len(theirs)} ids; "
            f"{_REMEDY}"
        )
    return found


def _by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items()}
