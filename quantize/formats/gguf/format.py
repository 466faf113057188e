"""The `gguf` format: one file for llama.cpp, and config.json beside it for pq's own reader.

config.json's part: {"quant_method": "gguf", "version": 1, "file": "model.gguf", "config_groups": {…},
"ignore": […]}; an entry of config_groups is `BlockScheme.as_json`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.formats.gguf.families import BY_ARCHITECTURE, context, family_of, problems
from quantize.formats.groups import config_groups, read_groups
from quantize.formats.output import Asking, Finished, OutputFormat, Section

if TYPE_CHECKING:
    from torch import Tensor

    from quantize.files.checkpoint import Checkpoint
    from quantize.files.encoding import Encoding
    from quantize.formats.scheme import AnyScheme, Packed

GGUF = "gguf"
VERSION = 1
FILE = "model.gguf"
_KEYS = {"quant_method", "version", "file", "config_groups", "ignore"}
_TYPES = {"q4_0": 2, "q4_1": 3, "q8_0": 7}
"""Types of blocks → `general.file_type` (`llama_ftype`), of a file whose blocks are mostly such."""
_MOSTLY_F16 = 1
_GROUP = 32


class Gguf(OutputFormat):
    """Blocks of 32, in the one file that llama.cpp, Ollama and LM Studio load."""

    name = GGUF
    about = "loads in llama.cpp (Q4_0, Q4_1 and Q8_0 blocks)"
    library = "gguf"
    engine_beyond = "llama.cpp rounds inputs of blocks to 8 bits too, which is not in it"
    keeps_blocks = True
    copies = 2

    def problems(self, stages: Sequence[Asking]) -> Iterator[tuple[int, str, str]]:
        """No cache of ours, no FP8, no groups that blocks do not divide, nothing of format pq."""
        for index, stage in enumerate(stages):
            if stage.kind == "cache":
                yield index, "method", "llama.cpp has no INT4 cache of this kind; remove the stage"
            elif stage.native_field is not None:
                text = "llama.cpp cannot do this; set format to pq, or turn this off"
                yield index, stage.native_field, text
            elif getattr(stage, "fp8", False):
                text = "llama.cpp has no FP8 activations; set activations to none"
                yield index, "activations", text
            group = getattr(stage, "group_size", _GROUP)
            if stage.kind == "encode" and group != -1 and group % _GROUP:
                text = f"blocks have {_GROUP} inputs; set group_size to a multiple of them"
                yield index, "group_size", text

    def model_problems(
        self,
        facts: Mapping[str, Any],
        tensors: Collection[str],
        packed: Mapping[str, tuple[int, int]],
        folder: Path,
    ) -> Iterator[str]:
        """What llama.cpp does not run as it is here, and blocks that do not divide inputs."""
        from quantize.files.gguf.encoding import require_writer
        from quantize.formats.gguf.tokenizer import tokenizer_metadata

        require_writer()
        try:
            family = family_of(facts)
        except ValueError as err:
            yield str(err)
            return
        yield from problems(facts)
        yield from (
            f"tensor {name} has no place in llama.cpp's {family.architecture}"
            for name in tensors
            if family.tensor(name) is None
        )
        for name, (_, K) in packed.items():
            if K % _GROUP:
                yield f"{name}: {K} inputs are no multiple of the block {_GROUP}; add it to ignore"
        try:
            tokenizer_metadata(folder, facts)
        except (ValueError, KeyError, TypeError, AttributeError) as err:
            yield (
                str(err) if isinstance(err, ValueError) else f"its tokenizer.json is broken ({err})"
            )

    def model_notes(self, facts: Mapping[str, Any]) -> list[str]:
        """A context that is shorter than the parent's."""
        _, why = context(facts)
        return [why] if why else []

    def packed(self, weight: Packed) -> tuple[Packed, dict[str, Any]]:
        """Integer groups become blocks with the same codes; ValueError for what cannot."""
        from quantize.formats.gguf.blocks import export
        from quantize.formats.packed_int import PackedInt

        if not isinstance(weight, PackedInt):
            return weight, {}
        made = export(weight)
        facts = {"scales": made.scales, "rounded": made.rounded, "change": made.change}
        return made.blocks, {"float16_scales": facts}

    def losses(
        self,
        attention: bool,
        experts: Collection[AnyScheme | None],
        unloadable: Sequence[str] = (),
    ) -> list[str]:
        """Nothing that `problems` did not refuse."""
        return []

    def config_section(self, model: Finished) -> dict[str, Any] | None:
        """Also of a model without packed linears, whose tensors are all in the one file."""
        return {
            "quant_method": GGUF,
            "version": VERSION,
            "file": FILE,
            "config_groups": config_groups(model.schemes, model.called),
            "ignore": list(model.left_alone),
        }

    def encoding(self, parts: int) -> Encoding:
        """One file, put together when all parts are there."""
        from quantize.files.gguf.encoding import GgufFile

        return GgufFile(parts, describe)

    def require_understood(self, section: Section) -> None:
        """ValueError for another version, and for fields that are unknown, missing or wrong."""
        version = section.get("version")
        if version != VERSION or isinstance(version, bool):
            raise ValueError(
                f"format version {version!r} is not known (known: {VERSION}); install a newer "
                "pq-quantize"
            )
        if set(section) != _KEYS:
            odd = sorted(set(section) ^ _KEYS)[0]
            raise ValueError(f"field '{odd}' is unknown or missing")
        if section["file"] != FILE:
            raise ValueError(f"file is {section['file']!r}, expected {FILE!r}")

    def reads_others(self, section: Section) -> bool:
        """pq alone writes such a part of config.json."""
        return True

    def schemes(self, section: Section, linears: Sequence[str]) -> dict[str, AnyScheme]:
        """Scheme of every packed linear by full name."""
        from quantize.formats.gguf.blocks import BlockScheme

        return dict(read_groups(section, linears, BlockScheme.from_json))

    def open(self, folder: Path, section: Section) -> Checkpoint:
        """The file by transformers' names."""
        from quantize.files.gguf.checkpoint import GgufCheckpoint
        from quantize.formats.gguf.blocks import PackedBlocks, nearest_q8

        self.require_understood(section)
        groups = section["config_groups"].values()
        targets = {str(name) for group in groups for name in group["targets"]}
        ignored = {str(name) for name in section["ignore"]}
        everything = "Linear" in targets
        outside = {"model.embed_tokens", "lm_head"} - targets

        def reblock(tensor: Tensor, kind: str) -> Tensor:
            if kind != "q8_0":
                raise ValueError(f"{kind} is no type of an embedding")
            return nearest_q8(tensor).unpack()

        return GgufCheckpoint(
            folder,
            _Packed(targets, ignored | outside, everything),
            BY_ARCHITECTURE.get,
            lambda data, kind: PackedBlocks.from_bytes(data, kind).unpack(),
            reblock,
        )


class _Packed(Collection[str]):
    """Names of the linears that config.json says are in blocks."""

    def __init__(self, targets: set[str], ignored: set[str], everything: bool) -> None:
        self._targets, self._ignored, self._everything = targets, ignored, everything

    def __contains__(self, name: object) -> bool:
        return name not in self._ignored and (self._everything or name in self._targets)

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)


def describe(
    folder: Path, facts: Mapping[str, Any]
) -> tuple[Any, dict[str, Any], dict[str, Tensor]]:
    """What a file says beside a checkpoint's tensors: the family, the metadata, and RoPE's factors.

    folder: with the tokenizer. facts: config.json with all defaults. ValueError for a model that is
    not written.
    """
    import torch

    from quantize.formats.gguf.families import metadata, rope_factors
    from quantize.formats.gguf.tokenizer import tokenizer_metadata

    if problem := next(problems(facts), None):
        raise ValueError(problem)
    told: dict[str, Any] = {
        "general.name": str(facts["model_type"]),
        "general.quantization_version": 2,
        "general.file_type": _file_type(facts),
    }
    told |= metadata(facts) | tokenizer_metadata(folder, facts)
    factors = rope_factors(facts)
    more = {} if factors is None else {"rope_freqs.weight": torch.tensor(factors)}
    return family_of(facts), told, more


def _file_type(facts: Mapping[str, Any]) -> int:
    """What most linears are, for those who look."""
    groups = facts.get("quantization_config", {}).get("config_groups", {}).values()
    sizes = {group["format"]: len(group["targets"]) for group in groups}
    return _TYPES[max(sizes, key=lambda kind: sizes[kind])] if sizes else _MOSTLY_F16
