"""What a gate file says: its settings, and entries with what each must reach."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from quantize.evaluation.protocols import Bos, ProtocolName
from quantize.files.strict_yaml import Document
from quantize.gate.checks import Check
from quantize.model.linear import Numerics
from quantize.recipe.recipe import Recipe

DtypeName = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Entry:
    """A recipe or a checkpoint, and what it must reach."""

    name: str
    recipe: Recipe | None
    """With the file's calibration and the entry's `set` applied; None for a checkpoint."""
    checks: tuple[Check, ...]
    protocol: str | None = None
    """Name of the one under which the checks' values were measured."""
    checkpoint: str | None = None
    """Folder, from the gate file's, or Hub id, as the file has it; None for a recipe."""

    @property
    def place(self) -> tuple[str, str]:
        """Where it stands in the file."""
        return ("recipes" if self.checkpoint is None else "checkpoints", self.name)


@dataclass(frozen=True)
class Settings:
    """How every entry of a file is measured."""

    protocol: ProtocolName = "strided"
    dataset: str = "builtin"
    text_field: str | None = None
    chat_template: bool | None = None
    seqlen: int = 512
    max_windows: int | None = None
    context: int = 0
    numerics: Numerics = "kernel"
    bos: Bos = "auto"
    dtype: DtypeName = "float32"
    """What is computed in."""


@dataclass(frozen=True)
class GateFile:
    """A gate file, checked."""

    path: Path
    model: Path | None
    """The parent's folder, from the gate file's; where there is none, `document` has a Hub id."""
    evaluation: Settings
    tasks: tuple[str, ...]
    task_limit: int | None
    entries: tuple[Entry, ...]
    document: Document = field(repr=False)
