"""config.json of pq's own format: packed linears as in `compressed_tensors`, and
attention on an INT4 KV cache.

    {"quant_method": "pq", "version": 1, "config_groups": {…}, "ignore": […],
     "attention": null | {"kv_cache": KvScheme.as_json(), "query": "fp8" | null,
     "probabilities": "fp8" | null, "affine": true},
     "rotated_inputs": ["model.layers.0.mlp.down_proj", …],
     "routing": {"model.layers.0.mlp": {"policy": "threshold", "threshold": 0.25}, …},
     "experts": {"n": 8, "size": 128, "shared": 1024}}

Beside it stands a field that keeps transformers from loading the model without pq (`WEIGHTS_FIELD`).

`rotated_inputs` (absent: none) are linears, packed or not, whose inputs x [K] become x @ H_K before
anything else is done with them; `quantize.model.hadamard` says which matrix H_K is. `routing`
(absent: none) are Mixtures of Experts that do not route as the model's own fields say;
`quantize.formats.routing` has the policies. `experts` (absent: the model's class has its own) says that
every FFN in `routing` is a Mixture of Experts where the model's class has a dense FFN: n routed experts
of `size` hidden neurons and a shared one of `shared`, named below the FFN as in a `qwen2_moe`
checkpoint, with the dense FFN's activation.

Entries of config_groups are those of `IntScheme` (format pack-quantized) and `BitVecScheme` (format
bitvec). With attention, every block also has `model.layers.N.self_attn.kv.scale`, float32 [Hkv, d]:
the post-RoPE scale S (stored keys are K·S, queries Q/S). With `affine` (absent: false) it also has
`kv.key_shift` and `kv.value_shift` [Hkv, d], `kv.key_rotation` and `kv.value_rotation` [Hkv, d, d], all
float32: `quantize.kernels.attention.affine` says what they do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from quantize.formats.groups import config_groups, read_groups
from quantize.formats.output import Asking, Finished, OutputFormat, Section

if TYPE_CHECKING:
    from quantize.formats.routing import Policy
    from quantize.formats.scheme import AnyScheme

NATIVE = "pq"
WEIGHTS_FIELD = "transformers_weights"
"""Where config.json names a file of weights of its own. transformers, in all releases from 5.17 on, goes
on without a `quant_method` that it does not know, and fills what it then misses with random numbers;
a file here that is none it refuses, and says this text. pq's own loader takes the field away."""
_REFUSAL = (
    "none, since this model is in pq's own format, which must be known first: pip install "
    "pq-quantize, then `import quantize` before from_pretrained"
)
VERSION = 1
_KEYS = {"quant_method", "version", "config_groups", "ignore", "attention"}
_OPTIONAL = {"rotated_inputs", "routing", "experts"}
_ATTENTION_KEYS = {"kv_cache", "query", "probabilities"}
_EXPERTS_KEYS = {"n", "size", "shared"}


class Native(OutputFormat):
    """All that pq can make of a model; loads in transformers after `import quantize`."""

    name = NATIVE
    about = "also holds post-RoPE scales and the INT4 cache (loads in transformers after `import quantize`)"
    beside_section = MappingProxyType({WEIGHTS_FIELD: _REFUSAL})
    keeps_post_scales = True
    keeps_experts = True

    def problems(self, stages: Sequence[Asking]) -> Iterator[tuple[int, str, str]]:
        """It holds everything."""
        yield from ()

    def config_section(self, model: Finished) -> dict[str, Any] | None:
        """None for a model that attends, routes and stores its linears as its parent."""
        if not (model.schemes or model.attention or model.rotated_inputs or model.routing):
            return None
        return native_config(
            model.schemes,
            model.left_alone,
            model.attention,
            model.rotated_inputs,
            model.routing,
            model.experts,
        )

    def require_understood(self, section: Section) -> None:
        """ValueError for another version, and for fields that are unknown, missing or wrong."""
        require_understood(section)

    def reads_others(self, section: Section) -> bool:
        """Every loader of the format reads all of it."""
        return True

    def schemes(self, section: Section, linears: Sequence[str]) -> dict[str, AnyScheme]:
        """Scheme of every packed linear by full name."""
        return read_groups(section, linears, scheme_from_json)

    def attention(self, section: Section) -> Mapping[str, Any] | None:
        """The checked `attention` part."""
        return attention_of(section)

    def rotated_inputs(
        self,
        section: Section,
        linears: Collection[str] | None = None,
    ) -> tuple[str, ...]:
        """The checked `rotated_inputs` part."""
        return rotated_inputs_of(section, linears)

    def experts(self, section: Section) -> Mapping[str, int] | None:
        """The checked `experts` part."""
        return experts_of(section)

    def routing(self, section: Section) -> dict[str, Policy]:
        """The checked `routing` part."""
        return routing_of(section)


def native_config(
    schemes: Mapping[str, AnyScheme],
    left_alone: Sequence[str],
    attention: Mapping[str, Any] | None,
    rotated_inputs: Sequence[str] = (),
    routing: Mapping[str, Policy] = MappingProxyType({}),
    experts: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """quantization_config for linears by full module name → scheme; `left_alone`
    are linears that stay 16-bit.

    attention: None, or the keys kv_cache, query and probabilities as config.json holds them.
    rotated_inputs: full names of linears that rotate their inputs. routing: full name of an FFN
    with experts → how it routes, where that is not as the model's own fields say. experts: their sizes
    `n`, `size` and `shared`, where the model's class has dense FFNs.
    """
    optional = {
        "rotated_inputs": list(rotated_inputs),
        "routing": {name: policy.as_json() for name, policy in routing.items()},
        "experts": dict(experts or {}),
    }
    return {
        "quant_method": NATIVE,
        "version": VERSION,
        "config_groups": config_groups(schemes),
        "ignore": list(left_alone),
        "attention": None if attention is None else dict(attention),
    } | {key: value for key, value in optional.items() if value}


def require_understood(config: Mapping[str, Any]) -> None:
    """ValueError for a quantization_config that this release does not understand in full."""
    if config.get("quant_method") != NATIVE:
        raise ValueError(f"quant_method is {config.get('quant_method')!r}, expected '{NATIVE}'")
    version = config.get("version")
    if version != VERSION or isinstance(version, bool):
        raise ValueError(
            f"format version {version!r} is not known (known: {VERSION}); install a newer "
            "pq-quantize"
        )
    if unknown := sorted(set(config) - _KEYS - _OPTIONAL):
        raise ValueError(f"unknown field '{unknown[0]}'; install a newer pq-quantize")
    if missing := sorted(_KEYS - set(config)):
        raise ValueError(f"field '{missing[0]}' is missing")
    attention_of(config)
    rotated_inputs_of(config)
    experts_of(config)


def rotated_inputs_of(
    config: Mapping[str, Any], linears: Collection[str] | None = None
) -> tuple[str, ...]:
    """The checked `rotated_inputs` part: full names of the linears that rotate their inputs.

    linears: full names of those that may; None: not checked. ValueError for what is not understood.
    """
    found = config.get("rotated_inputs", [])
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ValueError("rotated_inputs must be a list of names of linears")
    if len(set(found)) != len(found):
        raise ValueError("rotated_inputs names a linear twice")
    if linears is not None and (strangers := sorted(set(found) - set(linears))):
        raise ValueError(f"rotated_inputs names {strangers[0]}, which is no linear of the model")
    return tuple(found)


def routing_of(config: Mapping[str, Any]) -> dict[str, Policy]:
    """The checked `routing` part: full names of FFNs with experts → how they route; the
    model says which may be named.

    ValueError for what is not understood.
    """
    from quantize.formats.routing import policy_from_json

    found = config.get("routing", {})
    if not isinstance(found, Mapping):
        raise ValueError("routing must map names of FFNs to policies")
    out: dict[str, Policy] = {}
    for name, facts in found.items():
        try:
            out[name] = policy_from_json(facts)
        except ValueError as err:
            raise ValueError(f"routing of {name}: {err}") from None
    return out


def experts_of(config: Mapping[str, Any]) -> Mapping[str, int] | None:
    """The checked `experts` part: sizes n, size and shared of the experts in the places of the dense
    FFNs that `routing` names; None where the model's own class has what experts there are.

    ValueError for what is not understood.
    """
    from quantize.formats.routing import TopK

    routing, found = routing_of(config), config.get("experts")
    if found is None:
        return None
    if not isinstance(found, Mapping) or set(found) != _EXPERTS_KEYS:
        raise ValueError(f"experts must have the fields {', '.join(sorted(_EXPERTS_KEYS))}")
    for key, value in found.items():
        if not _whole(value, 1, 1 << 20):
            raise ValueError(f"experts.{key} is {value!r}, expected a positive integer")
    if not routing:
        raise ValueError("experts without routing: no FFN has them")
    for name, policy in routing.items():
        if isinstance(policy, TopK) and policy.k > found["n"]:
            raise ValueError(
                f"routing sends tokens of {name} to {policy.k} of {found['n']} experts"
            )
    return found


def attention_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The checked `attention` part, None where attention is left alone; ValueError
    for what is not understood."""
    from quantize.formats.kv4 import KvScheme

    found = config.get("attention")
    if found is None:
        return None
    if not isinstance(found, Mapping) or set(found) - {"affine"} != _ATTENTION_KEYS:
        raise ValueError(
            f"attention must be null or have the fields {', '.join(sorted(_ATTENTION_KEYS))}"
        )
    for key in ("query", "probabilities"):
        if found[key] not in ("fp8", None):
            raise ValueError(f"attention.{key} is {found[key]!r}, expected 'fp8' or null")
    if not isinstance(found.get("affine", False), bool):
        raise ValueError(f"attention.affine is {found['affine']!r}, expected true or false")
    try:
        KvScheme.from_json(found["kv_cache"])
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise ValueError(f"attention.kv_cache: {err}") from None
    return found


def scheme_from_json(group: Mapping[str, Any]) -> AnyScheme:
    """The scheme of one entry of config_groups; ValueError for one that pq does not write."""
    from quantize.formats.bitvec import BitVecScheme
    from quantize.formats.packed_int import IntScheme

    return (
        BitVecScheme.from_json(group)
        if group.get("format") == "bitvec"
        else IntScheme.from_json(group)
    )


def packed_linears(config: Mapping[str, Any], linears: Sequence[str]) -> dict[str, AnyScheme]:
    """Scheme of every packed linear by full name; linears: full names of the
    model's linears that may be packed.

    ValueError for a scheme that pq does not write and for targets that are none of them.
    """
    try:
        schemes = read_groups(config, linears, scheme_from_json)
        targets = {
            target for group in config["config_groups"].values() for target in group["targets"]
        } - {"Linear"}
    except (KeyError, TypeError, AttributeError) as err:
        raise ValueError(f"config_groups cannot be read ({type(err).__name__}: {err})") from None
    if strangers := sorted(targets - set(linears), key=str):
        raise ValueError(f"config_groups targets {strangers[0]}, which is no linear of the model")
    for scheme in schemes.values():
        group = 1 if scheme.group_size is None else scheme.group_size
        if not _whole(scheme.bits, 2, 8) or not _whole(group, 1, 1 << 20):
            raise ValueError(
                f"{scheme.bits!r} bits in groups of {scheme.group_size!r} cannot be read"
            )
    return schemes


def _whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
