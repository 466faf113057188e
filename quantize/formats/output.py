"""What an output format answers for: limits, part of config.json, tensors, files and reader.

A format is one file in this folder and one name in `quantize/formats/registry.py`. Recipes ask
formats what they can hold before anything heavy is loaded: modules of formats import torch, and
what needs it, only inside functions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from quantize.files.checkpoint import Checkpoint
    from quantize.files.encoding import Encoding
    from quantize.formats.routing import Policy
    from quantize.formats.scheme import AnyScheme, Packed
    from quantize.formats.vllm import Unserved

Section = Mapping[str, Any]
"""config.json's quantization_config."""


class Asking(Protocol):
    """A stage of a recipe, as far as formats look at it."""

    kind: ClassVar[Any]
    """restructure, smooth, cache or encode."""

    @property
    def blocks_field(self) -> str | None:
        """The field that asks for llama.cpp's blocks."""

    @property
    def native_field(self) -> str | None:
        """The field that asks for what only pq's own format can hold."""


@dataclass(frozen=True)
class Finished:
    """What a loader must be told of a converted model, by full module names."""

    schemes: Mapping[str, AnyScheme]
    """Every packed linear."""
    left_alone: Sequence[str]
    """Linears and routers that stay 16-bit."""
    attention: Mapping[str, Any] | None = None
    """The keys kv_cache, query and probabilities; None where attention is left alone."""
    rotated_inputs: Sequence[str] = ()
    """Linears that rotate their inputs."""
    routing: Mapping[str, Policy] = field(default_factory=dict)
    """FFNs with experts that do not route as the model's own fields say."""
    called: Callable[[str], Sequence[str]] = lambda name: (name,)
    """Full name of a linear → all names by which loaders other than pq look for it."""
    experts: Mapping[str, int] | None = None
    """Sizes `n`, `size` and `shared` of the experts of these FFNs, where the model's class has dense
    ones in their places; None: its own."""


class OutputFormat(ABC):
    """One way to write a model. The default of each part is that of plain safetensors."""

    name: ClassVar[str]
    """The recipe's `format`, and config.json's quant_method."""
    about: ClassVar[str]
    """What it is for, after its name, for the editor's help."""
    library: ClassVar[str] = "transformers"
    """Which library's the Hub takes a model of this format to be (`library_name`)."""
    shared: ClassVar[bool] = False
    """Whether other tools write it too, in more ways than pq reads."""
    served: ClassVar[bool] = False
    """Whether vLLM reads it at all, so that `unserved` says what it does not take."""
    copies: ClassVar[int] = 1
    """How often the tensors stand on the disk while the last of them is written."""
    keeps_post_scales: ClassVar[bool] = False
    """Whether attention's post-RoPE scales are stored, and so may be fitted."""
    keeps_blocks: ClassVar[bool] = False
    """Whether weights may be in llama.cpp's blocks, the embedding's among them."""
    beside_section: ClassVar[Mapping[str, str]] = {}
    """Fields of config.json that stand beside quantization_config, for loaders that pass over what
    they do not know in it."""
    engine_beyond: ClassVar[str] = ""
    """What the engine of the format does beside what pq computes when it evaluates an output."""
    keeps_experts: ClassVar[bool] = False
    """Whether experts may stand where the model's class has a dense FFN."""

    # What it can hold

    def problems(self, stages: Sequence[Asking]) -> Iterator[tuple[int, str, str]]:
        """Yield (index, field, text) for each stage that asks for what the format cannot hold."""
        for index, stage in enumerate(stages):
            if stage.native_field is not None:
                text = "needs 'format: pq', no other loader can do this; add it or turn this off"
                yield index, stage.native_field, text
            elif stage.blocks_field is not None:
                text = (
                    "needs 'format: gguf', whose blocks these are; set it, or take another method"
                )
                yield index, stage.blocks_field, text

    def model_problems(
        self,
        facts: Mapping[str, Any],
        tensors: Collection[str],
        packed: Mapping[str, tuple[int, int]],
        folder: Path,
    ) -> Iterator[str]:
        """Why a model cannot be written so, a line each, before any work.

        facts: config.json with all defaults of the model's class filled in. tensors: full names of
        all. packed: [N, K] of the linears that a recipe encodes. folder: the source's, with its
        tokenizer.
        """
        yield from ()

    def model_notes(self, facts: Mapping[str, Any]) -> list[str]:
        """What becomes otherwise of a model written so, in lines for people. facts: as above."""
        return []

    def losses(
        self,
        attention: bool,
        experts: Collection[AnyScheme | None],
        unloadable: Sequence[str] = (),
    ) -> list[str]:
        """What the format does not hold, or its loaders do not make of it, in lines for people.

        attention: whether a recipe has attention on an INT4 cache. experts: schemes of all routed
        experts, None for those that stay 16-bit; empty where there are none. unloadable: why stock
        transformers does not load the model with these linears packed; empty where it does.
        """
        return []

    def unserved(
        self,
        schemes: Mapping[str, AnyScheme],
        shapes: Mapping[str, tuple[int, int]],
        fused: Collection[tuple[str, ...]],
        routed: Collection[tuple[str, ...]] = (),
    ) -> list[Unserved]:
        """What vLLM, for which the format may be meant, would refuse.

        schemes: of packed linears. shapes: [N, K] of all. fused: those that share an input. routed:
        all linears of one block's routed experts.
        """
        return []

    # What is written

    def packed(self, weight: Packed) -> tuple[Packed, dict[str, Any]]:
        """A packed linear as the format holds it, and facts about what that took, for the
        provenance. ValueError for what it cannot hold."""
        return weight, {}

    def tensors(
        self,
        packed: Mapping[str, Packed],
        plain: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """The tensors of one part of the model, a block or what stands outside them, as stored.

        packed: its packed linears [N, K] by full name. plain: all its other tensors by full name,
        biases of packed linears and post-RoPE scales among them.
        """
        out: dict[str, Tensor] = {}
        for name, weight in packed.items():
            out |= {f"{name}.{suffix}": tensor for suffix, tensor in weight.tensors().items()}
        return out | dict(plain)

    @abstractmethod
    def config_section(self, model: Finished) -> dict[str, Any] | None:
        """config.json's quantization_config; None where any loader gets the model right without."""

    def side_files(self, found: Sequence[Path]) -> Sequence[Path]:
        """Those of the source's other files (tokenizer, licence) that go with the output."""
        return found

    def encoding(self, parts: int) -> Encoding:
        """How the tensors of a model in so many parts become files; one for each output."""
        from quantize.files.shards import Shards

        return Shards(parts)

    # What is read

    def open(self, folder: Path, section: Section) -> Checkpoint:
        """A checkpoint of this format by the names and dtypes of safetensors; ModelError or
        ValueError for one that cannot be read."""
        from quantize.files.checkpoint import Checkpoint

        return Checkpoint(folder)

    def recognizes(self, section: Section) -> bool:
        """Whether quantization_config is one of this format."""
        return bool(section.get("quant_method") == self.name)

    def require_understood(self, section: Section) -> None:  # noqa: B027 - most refuse nothing
        """ValueError for a section of this format that this release does not understand in full."""

    def reads_others(self, section: Section) -> bool:
        """Whether pq reads all that a section of this format asks for, though others wrote it.

        ValueError, KeyError, TypeError or AttributeError for what cannot be read.
        """
        return False

    def schemes(self, section: Section, linears: Sequence[str]) -> dict[str, AnyScheme]:
        """Scheme of every packed linear by full name.

        linears: full names of those that may be packed.
        ValueError, KeyError, TypeError or AttributeError for what cannot be read.
        """
        return {}

    def attention(self, section: Section) -> Mapping[str, Any] | None:
        """How attention works on an INT4 cache; ValueError for what is not understood."""
        return None

    def rotated_inputs(
        self,
        section: Section,
        linears: Collection[str] | None = None,
    ) -> tuple[str, ...]:
        """Full names of linears that rotate inputs; ValueError for what is none of `linears`."""
        return ()

    def experts(self, section: Section) -> Mapping[str, int] | None:
        """Sizes of the experts that stand in the places of dense FFNs, those that `routing` names;
        None without any. ValueError for what is not understood."""
        return None

    def routing(self, section: Section) -> dict[str, Policy]:
        """FFNs with experts → how they route, where that is not as the model's own fields say.

        ValueError for what is not understood.
        """
        return {}
