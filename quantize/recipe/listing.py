"""Recipes in a line each: scheme, what loads the output, calibration text, what we measured, purpose.

Read from the files alone: nothing here builds a stage, so that listing recipes loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import RecipeError
from quantize.files import strict_yaml
from quantize.files.problems import error_of
from quantize.formats.engines import HOPPER, LLAMA_CPP, READERS, TURING, VLLM, kernels_for
from quantize.recipe.aliases import ALIASES, Alias
from quantize.recipe.files import read_recipe, shipped_recipes
from quantize.recipe.measured import MODELS, measured

WIDTH = 80
_CACHE = "fireq-attention"
_SIXTEEN = 16
_TOKENS = (128, 2048)
"""Windows and their tokens where a recipe that reads text does not say."""
PURPOSES: Mapping[str, str] = {
    "w4a16": "4 bits, on any GPU",
    "w4a8": "faster prompts on Hopper",
    "w3a16": "the least loss, 3 bits",
    "w2a16": "the least loss, 2 bits",
    "w4a8kv4": "long contexts",
    "awq": "AWQ, to compare with",
    "fireq": "the INT4 cache too",
    "fireq-kv": "the INT4 cache alone",
    "fireq-linear": "4 bits with FP8 inputs",
    "fireq-paper": "FireQ as published",
    "fireq-paper-linear": "its linears, published",
    "fireq-sbvr": "bit vectors, INT4 cache",
    "gguf-q4_0": "CPUs, Macs; 4.5 bits",
    "gguf-q4_1": "CPUs, Macs; 5 bits",
    "gptq": "GPTQ, to compare with",
    "ladimo": "20 % less compute",
    "ladimo-fireq": "ladimo in 4 bits",
    "ladimo-sbvr": "ladimo in bit vectors",
    "rtn": "no text and no time",
    "sbvr": "the least loss, 4 bits",
    "sbvr-2bit": "the least loss, 2 bits",
    "sbvr-3bit": "the least loss, 3 bits",
}
"""Name → why to take it, in a few words; a recipe without an entry shows its description."""
CHOICES = ("w4a16", "w4a8", "w4a8kv4", "w3a16", "w2a16", "gguf-q4_0", "ladimo", "rtn")
"""Names to begin with."""
LEGEND = (
    "loads in: vLLM also transformers; vLLM* on H100 and H200 only, transformers anywhere; "
    "pq transformers after `import quantize`, vLLM with the plugin pq-vllm",
    "text: tokens of calibration; KLD: what we measured on a Llama of 6.8 million parameters, nats a "
    "token (0: as its parent), -: not measured",
)
"""What the columns mean."""


@dataclass(frozen=True)
class Listing:
    """What one recipe file says of itself, defaults not filled in; fields are keys of JSON."""

    name: str
    recipe: str
    """The file that an alias stands for; else the name."""
    settings: list[str]
    """Of an alias, as `--set` takes them."""
    scheme: str
    """W4A16KV4: bits of weights, of activations and, where it is not 16, of the cache."""
    format: str
    loads_in: str
    """vLLM, vLLM* (Hopper's GPUs only), pq (needs pq beside the engine), llama.cpp."""
    tokens: int
    """Of calibration text; 0: none is read."""
    kld: float | None
    """Measured by us on the first of `quantize.recipe.measured.MODELS`; None: not measured."""
    purpose: str
    methods: list[str]
    bits: list[int]
    """Bits that its stages state, in their order, each value once."""
    activations: list[str]
    """Numerics of the activations that its stages state, likewise."""
    description: str

    def cells(self) -> tuple[str, str, str, str, str, str]:
        """The line of a table: name, scheme, loads in, text, KLD, what for."""
        tokens = f"{self.tokens / 1000:.0f}k" if self.tokens else "-"
        kld = "-" if self.kld is None else f"{self.kld:.4f}"
        return self.name, self.scheme, self.loads_in, tokens, kld, self.purpose


HEADS = ("name", "scheme", "loads in", "text", "KLD", "what for")


def list_shipped() -> list[Listing]:
    """Return what each shipped recipe says of itself; RecipeError for one that is no recipe."""
    return [_listing(path) for path in shipped_recipes()]


def list_aliases() -> list[Listing]:
    """The same of the aliases whose recipes are there."""
    files = {path.stem: path for path in shipped_recipes()}
    return [_listing(files[alias.recipe], alias) for alias in ALIASES if alias.recipe in files]


def _listing(path: Path, alias: Alias | None = None) -> Listing:
    document = strict_yaml.load(read_recipe(path, str(path)), str(path))
    if document.problems:
        raise error_of(document.source, document.problems)
    name, settings = (path.stem, ()) if alias is None else (alias.name, alias.settings)
    found = measured(path.stem, settings).get(MODELS[0])
    try:
        data = document.data
        stages = [_set(stage, settings) for stage in data["stages"]]
        form = str(data.get("format", "compressed-tensors"))
        # Blocks have their bits in the name of their type: q4_0.
        bits = _distinct(stages, "bits") or [int(t[1]) for t in _distinct(stages, "type")]
        activations = _distinct(stages, "activations")
        methods = [str(stage["method"]) for stage in stages]
        description = str(data["description"])
        return Listing(
            name=name,
            recipe=path.stem,
            settings=list(settings),
            scheme=_scheme(methods, bits, "fp8" in activations),
            format=form,
            loads_in=_loads_in(form, bits[-1:], "fp8" in activations),
            tokens=_tokens(data, stages),
            kld=None if found is None else found.kld,
            purpose=PURPOSES.get(name, description),
            methods=methods,
            bits=bits,
            activations=activations,
            description=description,
        )
    except (KeyError, TypeError, AttributeError):
        remedy = f"`pq recipe validate {path.stem}` says why"
        raise RecipeError(f"{path}: is no recipe; {remedy}") from None


def _set(stage: Mapping[str, Any], settings: tuple[str, ...]) -> dict[str, Any]:
    """A stage with the settings of an alias, of those fields that it states."""
    changes = dict(setting.split("=", 1) for setting in settings)
    return {key: changes.get(key, value) for key, value in stage.items()}


def _distinct(stages: list[dict[str, Any]], field: str) -> list[Any]:
    """Return the values that stages give to `field`, in their order, each once."""
    return list(dict.fromkeys(stage[field] for stage in stages if field in stage))


def _scheme(methods: list[str], bits: list[int], fp8: bool) -> str:
    weights = bits[-1] if bits else _SIXTEEN
    return f"W{weights}A{8 if fp8 else _SIXTEEN}{'KV4' if _CACHE in methods else ''}"


@dataclass(frozen=True)
class _Packing:
    """As much of a scheme as the table of engines asks for."""

    bits: int
    fp8_activations: bool
    group_size: int | None = 128


def _loads_in(form: str, bits: list[int], fp8: bool) -> str:
    """The engine that serves the output, in a word."""
    readers = {reader.engine: reader for reader in READERS if reader.format == form}
    if LLAMA_CPP in readers:
        return LLAMA_CPP.name
    if any(reader.install == ("pq-quantize",) for reader in readers.values()):
        return "pq"
    packing: Any = _Packing(bits[0] if bits else _SIXTEEN, fp8)
    for where, word in ((TURING, VLLM.name), (HOPPER, f"{VLLM.name}*")):
        if any(not kernel.needs for kernel in kernels_for(VLLM, packing, hardware=(where,))):
            return word
    return "HF"


def _tokens(data: Mapping[str, Any], stages: list[dict[str, Any]]) -> int:
    """Tokens that calibration reads. Recipes that read none say nothing of them."""
    found = data.get("calibration")
    if not found:
        return 0
    return int(found.get("nsamples", _TOKENS[0])) * int(found.get("seqlen", _TOKENS[1]))
