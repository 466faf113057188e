"""One model under examination, and what an examination of it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models import zoo

Row = dict[str, Any]
"""What is found out about one type, as JSON has it."""


@dataclass(frozen=True)
class Item:
    """One type under one of the two auto classes."""

    model_type: str
    image_text: bool

    def __str__(self) -> str:
        return self.model_type + (":image-text" if self.image_text else "")


class Subject:
    """The model of one type that checks look at; each sees what those before it left."""

    def __init__(self, item: Item, work: Path) -> None:
        self.item = item
        self.work = work
        """A folder that is removed after the last check."""
        self.model: PreTrainedModel = zoo.outline(item.model_type, image_text=item.image_text)

    @cached_property
    def folder(self) -> Path:
        """The model as a checkpoint."""
        return zoo.save(self.model, self.work / "model")

    @cached_property
    def loader(self) -> Any:
        """What stock transformers loads the checkpoint by: the auto class, or where that does not know
        what it has saved (the text decoder of Emu3) the model's own."""
        auto = zoo.loader_of(self.item.model_type, self.item.image_text)
        return auto if type(self.model.config) in auto._model_mapping else type(self.model)

    @cached_property
    def ids(self) -> Tensor:
        """Tokens that nothing was fitted on."""
        return zoo.tokens(seed=21)

    @cached_property
    def wanted(self) -> Tensor:
        """Logits of these tokens by transformers, [B, T, V] float32, from the checkpoint."""
        model = self.loader.from_pretrained(self.folder, dtype=torch.float32).eval()
        return zoo.logits(model, self.ids).float()

    def require_loaded(self) -> None:
        """ValueError where transformers does not load what it has saved (ShieldGemma 2 in 5.24), so
        that nothing can be held against it."""
        change = zoo.apart(zoo.logits(self.model, self.ids).float(), self.wanted)
        if not change < 1e-3:
            raise ValueError(f"transformers loads another model than it saved (by {change:.2g})")


Check = Callable[[Subject], Row]
"""Figures of a subject, with "ok": bool; what it raises is a failed check."""
