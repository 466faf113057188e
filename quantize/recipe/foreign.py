"""Recipes and settings files of other tools: whose they are, and what means the same to pq."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantize.files.yaml_scalars import is_text
from quantize.recipe.foreign_words import SYMMETRIC, damping_of, order_of

Facts = Mapping[str, Any]
_SCHEMES: Mapping[str, tuple[int, int]] = {"W4A16": (4, 128), "W8A16": (8, -1)}
"""Schemes of llm-compressor that pq has → bits and group."""
_ROUNDERS = ("GPTQModifier", "AWQModifier", "QuantizationModifier")


@dataclass
class Foreign:
    """A file of another tool."""

    tool: str
    stages: list[dict[str, Any]] = field(default_factory=list)
    """Stages of pq that do the same; empty where nothing does."""
    calibration: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What is not the same, each with what is nearest."""

    def lines(self) -> Iterator[str]:
        """What to tell, the recipe of pq among it, as YAML that can be copied into a file."""
        if not self.stages:
            yield f"a file of {self.tool}, which pq does not read; nothing here does the same"
        else:
            recipe: dict[str, Any] = {"description": f"from {self.tool}"}
            recipe |= {"calibration": self.calibration} if self.calibration else {}
            same = "nearest" if self.notes else "the same"
            told = _flow(recipe | {"stages": self.stages})
            yield f"a file of {self.tool}, which pq does not read; {same} for pq: {told}"
        yield from self.notes


def foreign(data: Any) -> Foreign | None:
    """Whose file this is, given what it holds; None for one that may be meant for pq."""
    if not isinstance(data, dict) or isinstance(data.get("stages"), list):
        return None
    if modifiers := _modifiers(data):
        return _llm_compressor(modifiers)
    if "architectures" in data or "model_type" in data:
        section = data.get("quantization_config")
        inner = foreign(section) if isinstance(section, dict) else None
        return inner or Foreign("transformers (a model's config.json)")
    found = next((read for knows, read in _READERS if knows(data)), None)
    return None if found is None else found(data)


def _modifiers(data: Facts, depth: int = 3) -> dict[str, Facts]:
    """llm-compressor's modifiers by name, however they are wrapped in stages."""
    out: dict[str, Facts] = {}
    for key, value in data.items():
        if key.endswith("Modifier"):
            out[key] = value if isinstance(value, dict) else {}
        elif isinstance(value, dict) and depth and key.endswith(("_stage", "_modifiers")):
            out |= _modifiers(value, depth - 1)
    return out


def _llm_compressor(modifiers: Mapping[str, Facts]) -> Foreign:
    out = Foreign(f"llm-compressor ({', '.join(modifiers)})")
    for name, facts in modifiers.items():
        if name not in _ROUNDERS:
            out.notes.append(f"{name} has no like in pq; 'awq' and 'cas' are stages that smooth")
            continue
        for group in _groups(facts, out):
            shared = _patterns(facts, group)
            if name == "GPTQModifier":
                weights = group["weights"]
                order = weights.get("actorder", facts.get("actorder", "unset"))
                extra = order_of(order) | damping_of(facts.get("dampening_frac"))
                out.stages.append({"method": "gptq", **_sizes(weights, out), **extra, **shared})
            else:
                _rounded(out, _sizes(group["weights"], out), shared, name == "AWQModifier")
    return _without_activations(out)


def _groups(facts: Facts, out: Foreign) -> Iterator[dict[str, Any]]:
    """Groups of linears with their weights as compressed-tensors describes them."""
    groups = facts.get("config_groups")
    if isinstance(groups, dict):
        for group in groups.values():
            if isinstance(group, dict) and isinstance(group.get("weights"), dict):
                if group.get("input_activations"):
                    out.notes.append(_ACTIVATIONS)
                yield group
        return
    scheme = str(facts.get("scheme", ""))
    plain = scheme.removesuffix("_ASYM")
    if plain not in _SCHEMES:
        out.notes.append(
            f"scheme {scheme or 'unset'}: pq has W4A16, W8A16 and, in 'fireq', W4A8-FP8"
        )
        return
    bits, group_size = _SCHEMES[plain]
    symmetric = plain == scheme
    yield {"weights": {"num_bits": bits, "group_size": group_size, "symmetric": symmetric}}


def _patterns(facts: Facts, group: Facts) -> dict[str, Any]:
    """Which linears, where these are not all."""
    targets = _listed(group.get("targets", facts.get("targets")))
    ignore = _listed(facts.get("ignore"))
    chosen = {"layers": targets} if targets and targets != ["Linear"] else {}
    return chosen | ({"ignore": ignore} if ignore else {})


def _sizes(weights: Facts, out: Foreign) -> dict[str, Any]:
    """Bits and group of weights that compressed-tensors describes."""
    if weights.get("symmetric") is False:
        _note(out, SYMMETRIC)
    if weights.get("type", "int") != "int":
        _note(out, f"weights of type {weights['type']}: pq's are integers or bit vectors")
    whole = weights.get("strategy") in ("channel", "tensor")
    group = -1 if whole else weights.get("group_size")
    return {"bits": weights.get("num_bits", 4), "group_size": -1 if group is None else group}


def _rounded(out: Foreign, sizes: dict[str, Any], shared: Facts, smooth: bool) -> None:
    """Add stages that round, after AWQ's search where that is asked for."""
    if smooth and not any(stage["method"] == "awq" for stage in out.stages):
        out.stages.insert(0, {"method": "awq", **sizes})
    out.stages.append({"method": "rtn", **sizes, **({"clip": "mse"} if smooth else {}), **shared})


def _gptq(data: Facts) -> Foreign:
    out = Foreign("GPTQModel or AutoGPTQ")
    extra = order_of(data.get("desc_act", "unset")) | damping_of(data.get("damp_percent"))
    out.stages.append({"method": "gptq", **_flat(data, out), **extra})
    if data.get("dynamic"):
        _note(out, "dynamic: other settings for some linears are stages of their own, with layers")
    return out


def _flat(data: Facts, out: Foreign) -> dict[str, Any]:
    """Bits and group as most tools write them, side by side."""
    if data.get("sym") is False or data.get("zero_point") is True:
        _note(out, SYMMETRIC)
    bits = data.get("bits", data.get("w_bit", 4))
    group = data.get("group_size", data.get("q_group_size", 128))
    left = _listed(data.get("modules_to_not_convert"))
    ignore = [f"*{name}*" for name in left]
    sizes = {"bits": bits, "group_size": -1 if group in (None, 0) else group}
    return sizes | ({"ignore": ignore} if ignore else {})


def _awq(data: Facts) -> Foreign:
    out = Foreign("AutoAWQ")
    sizes = _flat(data, out)
    shared = {"ignore": sizes.pop("ignore")} if "ignore" in sizes else {}
    _rounded(out, sizes, shared, smooth=True)
    return out


def _auto_round(data: Facts) -> Foreign:
    out = Foreign("AutoRound")
    given = {key: data[key] for key in ("nsamples", "seqlen") if isinstance(data.get(key), int)}
    out.calibration.update(given)
    out.stages.append({"method": "fireq", "activations": "none", **_flat(data, out)})
    _note(out, "AutoRound learns its rounding by signed gradients; 'fireq' finds one by descent")
    return out


def _compressed_tensors(data: Facts) -> Foreign:
    out = Foreign("compressed-tensors (a checkpoint's quantization_config)")
    for group in _groups({"config_groups": data.get("config_groups", {})}, out):
        _rounded(out, _sizes(group["weights"], out), _patterns(data, group), smooth=False)
    _note(out, "it says how weights are stored, not how they were found: 'gptq' or 'fireq' for rtn")
    return _without_activations(out)


def _modelopt(data: Facts) -> Foreign:
    out = Foreign("NVIDIA ModelOpt")
    section = data.get("quantization", data)
    section = section if isinstance(section, dict) else {}
    algorithm = str(section.get("quant_algo", "")).upper()
    ignore = _listed(section.get("exclude_modules"))
    if algorithm in ("W4A16_AWQ", "INT4_AWQ"):
        sizes = {"bits": 4, "group_size": section.get("group_size", 128)}
        _rounded(out, sizes, {"ignore": ignore} if ignore else {}, smooth=True)
    else:
        shown = algorithm or "its quant_cfg"
        _note(out, f"{shown}: pq has W4A16, W8A16 and, in 'fireq', W4A8-FP8")
    if section.get("kv_cache_quant_algo"):
        _note(out, "kv_cache_quant_algo: pq's INT4 cache is the stage 'fireq-attention'")
    return out


def _bitsandbytes(data: Facts) -> Foreign:
    out = Foreign("bitsandbytes")
    bits = 8 if data.get("load_in_8bit") else 4
    out.stages.append({"method": "rtn", "bits": bits})
    _note(out, "NF4 and FP4 codes have no like in pq, whose 4 bits are integers in groups")
    return out


def _without_activations(out: Foreign) -> Foreign:
    """No stages where activations are rounded in a way that pq does not have."""
    if _ACTIVATIONS in out.notes:
        out.stages.clear()
    return out


def _note(out: Foreign, text: str) -> None:
    if text not in out.notes:
        out.notes.append(text)


def _listed(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [str(one) for one in value] if isinstance(value, Sequence) else []


def _flow(value: Any) -> str:
    """Data as YAML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, str) and re.fullmatch("[A-Za-z][A-Za-z_-]*", value) and is_text(value):
        return value
    return json.dumps(value, ensure_ascii=False)


def _names(*keys: str, method: Sequence[str] = ()) -> Callable[[Facts], bool]:
    """Whether a file has one of these keys, or says that it is of one of these methods."""
    return lambda data: bool(set(keys) & set(data)) or data.get("quant_method") in method


_ACTIVATIONS = (
    "input_activations: pq rounds activations in 'fireq' alone, to FP8 with 4-bit weights in groups "
    "of 128"
)
_READERS: Sequence[tuple[Callable[[Facts], bool], Callable[[Facts], Foreign]]] = (
    (_names("autoround_version", "iters", method=("auto-round", "intel/auto-round")), _auto_round),
    (_names("desc_act", "damp_percent", "true_sequential", method=("gptq",)), _gptq),
    (_names("w_bit", "q_group_size", "zero_point", method=("awq",)), _awq),
    (_names("config_groups", method=("compressed-tensors",)), _compressed_tensors),
    (_names("quant_algo", "quant_cfg", "producer", method=("modelopt",)), _modelopt),
    (_names("load_in_4bit", "load_in_8bit", method=("bitsandbytes",)), _bitsandbytes),
)
"""How files are told apart → who reads them; the first that knows a file takes it."""
