"""Which engines take a checkpoint as it is, and what they lack, told from its headers and one table."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.errors import PqError
from quantize.files.checkpoint import Checkpoint
from quantize.files.headers import Header, noted_shapes, tensor_headers
from quantize.formats.engines import (
    ADA,
    AMPERE,
    CPU,
    EXPERTS_IN_VLLM,
    HOPPER,
    PLUGIN,
    READERS,
    TRANSFORMERS,
    TURING,
    VLLM,
    Reader,
    kernels_for,
)
from quantize.formats.registry import DEFAULT, format_in, schemes_in
from quantize.formats.vllm import unserved
from quantize.model.roles import role_by_name
from quantize.model.storage import storage_of

if TYPE_CHECKING:
    from quantize.formats.scheme import AnyScheme

_PACKED = (".weight_packed", ".weight_planes")
_SIDE_BY_SIDE = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}
_LATENT = {"q_a_proj": "qkv_a", "kv_a_proj_with_mqa": "qkv_a"}
"""Linears of which vLLM makes one matrix where they stand below one module."""
_EXPERT = re.compile(r"(?P<home>.*\.experts)\.\d+\.[^.]+")


@dataclass(frozen=True)
class Loading:
    """Whether an engine takes a checkpoint on some hardware."""

    engine: str
    where: str
    loads: bool
    install: tuple[str, ...] = ()
    """What pip must install beside the engine."""
    notes: tuple[str, ...] = ()
    """Why it does not load, or what else to know."""
    first: str | None = None
    """The line of Python that must come before it is used."""


@dataclass(frozen=True)
class Loadings:
    """What a checkpoint is, and all that was found about engines; fields are keys of JSON."""

    format: str
    """plain, compressed-tensors, pq, gguf, or another tool's name for its own."""
    model_type: str
    architecture: str
    dtype: str | None
    """What floats config.json names."""
    fp8: bool
    """Whether some linears round their inputs to FP8."""
    options: dict[str, tuple[str, ...]]
    """Engine → options of its command that the checkpoint needs on a GPU."""
    engines: tuple[Loading, ...]

    @property
    def distinct(self) -> tuple[Loading, ...]:
        """Without Hopper's GPUs where those are like all others."""
        kept = []
        for found in self.engines:
            usual = dataclasses.replace(found, where=TURING)
            if found.where != HOPPER or usual not in self.engines:
                kept.append(found)
        return tuple(kept)

    @property
    def line(self) -> str:
        """The short form: `loads in: …`."""
        alike: dict[tuple[str, tuple[str, ...]], list[Loading]] = {}
        for found in self.engines:
            if found.loads:
                alike.setdefault((found.engine, found.install), []).append(found)
        parts = []
        for (engine, install), places in alike.items():
            offered = [found for found in self.engines if found.engine == engine]
            extra = f" with {' and '.join(install)}" if install else ""
            wheres = [place.where for place in places]
            if TURING in wheres:  # of which those of Hopper are some
                wheres = [where for where in wheres if where != HOPPER]
            where = "" if len(places) == len(offered) else f" on {_listed(wheres)}"
            parts.append(f"{engine}{extra}{where}")
        return f"loads in: {'; '.join(parts) or 'nothing that pq knows'}"


@dataclass(frozen=True)
class _Own:
    """What only pq's own format has."""

    cache: bool = False
    """Whether attention works on an INT4 cache."""
    experts: bool = False
    """Whether experts stand in a class that has none."""


def loads_line(folder: Path) -> str:
    """Which engines take a checkpoint as it is, in one line that begins with `loads in: `."""
    try:
        return loadings(folder).line
    except PqError as err:
        return f"loads in: not told ({err})"


def loadings(folder: Path) -> Loadings:
    """What engines make of a checkpoint, plain or packed, by pq or by others.

    ModelError for a folder that is no readable checkpoint.
    """
    if gguf := sorted(folder.glob("*.gguf")):
        return _of_format("gguf", {}, notes=(f"file {gguf[0].name}",))
    source = Checkpoint(folder)
    headers = tensor_headers(source)
    section = source.config.get("quantization_config")
    if not section:
        return _of_format(None, source.config)
    form = format_in(section)
    names = [n.removesuffix(s) for n in headers for s in _PACKED if n.endswith(s)]
    try:
        if form is None or not form.reads_others(section):
            raise ValueError("written by another tool")
        schemes = schemes_in(section, names)
        own = _Own(bool(form.attention(section)), bool(form.experts(section)))
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        return _foreign(section, source.config, str(err))
    shapes = _shapes(source, headers, section)
    return _of_format(form.name, source.config, schemes, shapes, own=own)


def loadings_as(
    form: str, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]]
) -> Loadings:
    """The same of an output that is not there yet.

    form: the name of its format. config: its config.json. shapes: [N, K] of all its linears by full
    name.
    """
    section = config.get("quantization_config")
    known = None if section is None else format_in(section)
    if section is None or known is None:
        # What pq's own format and llama.cpp's files hold may be known only once it is encoded; of
        # the other, nothing packed makes a plain model.
        return _of_format(None if form == DEFAULT else form, config)
    own = _Own(bool(known.attention(section)), bool(known.experts(section)))
    # llama.cpp's blocks are there only once they are encoded, and decide nothing.
    schemes = {} if known.keeps_blocks else schemes_in(section, [*shapes])
    return _of_format(form, config, schemes, shapes, own=own)


def _of_format(
    form: str | None,
    config: Mapping[str, Any],
    schemes: Mapping[str, AnyScheme] | None = None,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    notes: tuple[str, ...] = (),
    own: _Own | None = None,
) -> Loadings:
    schemes, shapes, own = schemes or {}, shapes or {}, own or _Own()
    engines: list[Loading] = []
    for engine in dict.fromkeys(reader.engine for reader in READERS):
        reader = next((r for r in READERS if (r.engine, r.format) == (engine, form)), None)
        if reader is None:
            name = "plain safetensors" if form is None else f"format {form}"
            hint = "; pq's format: gguf writes what it reads" if engine.name == "llama.cpp" else ""
            engines.append(Loading(str(engine), "any device", False, (), (f"no {name}{hint}",)))
        elif reader.by_kernel:
            engines += _in_vllm(reader, schemes, shapes)
        elif reader.install == (PLUGIN,):
            engines += _in_plugin(reader, _architecture(config), own)
        else:
            told: tuple[str, ...] = () if reader.note is None else (reader.note,)
            if engine == TRANSFORMERS and reader.first is None and schemes:
                told += _in_transformers(schemes, shapes)
            loads = not any(note.startswith("not ") for note in told)
            for where in reader.hardware:
                engines.append(
                    Loading(str(engine), where, loads, reader.install, told + notes, reader.first)
                )
    fp8 = any(scheme.fp8_activations for scheme in schemes.values())
    options: dict[str, tuple[str, ...]] = {}
    if own.cache:
        options[VLLM.name] = ("--attention-backend CUSTOM",)
    return _named(form or "plain", config, fp8, engines, options)


def _in_plugin(reader: Reader, name: str, own: _Own) -> list[Loading]:
    """pq's own format in vLLM, which pq's plugin reads."""
    lacks: tuple[str, ...] = ()
    if own.experts and name not in EXPERTS_IN_VLLM:
        known = ", ".join(EXPERTS_IN_VLLM)
        lacks = (f"{PLUGIN} puts LaDiMo's experts into {known} alone, this is {name}",)
    out = []
    for where in reader.hardware:
        # Attention on the INT4 cache multiplies E4M3.
        needs_ada = where == AMPERE and own.cache
        notes = lacks or (("with --attention-backend CUSTOM",) if needs_ada else ())
        out.append(
            Loading(
                str(reader.engine), ADA if needs_ada else where, not lacks, reader.install, notes
            )
        )
    return out


def _named(
    form: str,
    config: Mapping[str, Any],
    fp8: bool,
    engines: Iterable[Loading],
    options: dict[str, tuple[str, ...]] | None = None,
) -> Loadings:
    dtype = config.get("dtype", config.get("torch_dtype"))
    return Loadings(
        format=form,
        model_type=str(config.get("model_type", "unknown")),
        architecture=_architecture(config),
        dtype=dtype if isinstance(dtype, str) else None,
        fp8=fp8,
        options=options or {},
        engines=tuple(engines),
    )


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else "unknown"


def _in_vllm(
    reader: Reader, schemes: Mapping[str, AnyScheme], shapes: Mapping[str, tuple[int, int]]
) -> list[Loading]:
    """By hardware, with the lines that a conversion says as well."""
    lines = unserved(schemes, shapes, _side_by_side(shapes), _experts(shapes))
    out = []
    for where in reader.hardware:
        why = tuple(line.what for line in lines if where in line.hardware)
        notes = why
        if where == HOPPER and any(scheme.fp8_activations for scheme in schemes.values()):
            notes = (*why, "in bfloat16")
        out.append(Loading(str(reader.engine), where, not why, reader.install, notes))
    return out + _off_hopper(reader, schemes, out)


def _off_hopper(
    reader: Reader, schemes: Mapping[str, AnyScheme], found: Iterable[Loading]
) -> list[Loading]:
    """Where pq's plugin multiplies what needs FP8 inputs, which vLLM alone does on one generation."""
    served = {one.where for one in found if one.loads}
    if HOPPER not in served or TURING in served:
        return []
    places = [
        where
        for where in (ADA, CPU)
        if all(kernels_for(VLLM, x, hardware=(where,)) for x in schemes.values())
    ]
    return [Loading(str(reader.engine), where, True, (PLUGIN,)) for where in places]


def _in_transformers(schemes: Mapping[str, AnyScheme], names: Iterable[str]) -> tuple[str, ...]:
    """What it makes of routed experts without pq. names: of all linears."""
    routed = {schemes.get(name) for name in names if _EXPERT.fullmatch(name)}
    if len(routed) > 1 or None in routed:
        return ("not with experts that are not all packed alike",)
    if any(scheme and not kernels_for(TRANSFORMERS, scheme, routed=True) for scheme in routed):
        return ("it runs routed experts with 16-bit inputs",)
    return ()


def _foreign(section: Any, config: Mapping[str, Any], why: str) -> Loadings:
    """Of others' formats pq has no table: their tools say where these load."""
    method = section.get("quant_method") if isinstance(section, dict) else None
    name = str(method or "unknown")
    notes = (f"not told of what others write as {name} ({why}); ask the tool that wrote it",)
    return _named(name, config, False, [Loading("any engine", "any device", False, (), notes)])


def _shapes(
    source: Checkpoint, headers: Mapping[str, Header], section: Any
) -> dict[str, tuple[int, int]]:
    """[N, K] of all linears by full name, packed or not."""
    stored = storage_of(headers, section, noted_shapes(source, headers))
    return {name: found.shape for name, found in stored.items() if found.shape is not None}


def _side_by_side(names: Iterable[str]) -> list[tuple[str, ...]]:
    sets: dict[tuple[str, str], list[str]] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        kind = _SIDE_BY_SIDE.get(role_by_name(name)) or _LATENT.get(last)
        if kind is not None:
            sets.setdefault((parent, kind), []).append(name)
    return [tuple(found) for found in sets.values() if len(found) > 1]


def _experts(names: Iterable[str]) -> list[tuple[str, ...]]:
    sets: dict[str, list[str]] = {}
    for name in names:
        if found := _EXPERT.fullmatch(name):
            sets.setdefault(found["home"], []).append(name)
    return [tuple(found) for found in sets.values()]


def _listed(parts: Iterable[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last
