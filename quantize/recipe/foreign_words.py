"""Fields that other tools have and pq calls otherwise, has not, or needs not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SYMMETRIC = "zero points have no like in pq, whose integers are symmetric"
_CALIBRATION = "it is calibration.{}"

_WORDS: Mapping[str, str] = {
    **dict.fromkeys(("w_bit", "num_bits", "wbits", "nbits", "weight_bits"), "it is bits"),
    **dict.fromkeys(("q_group_size", "groupsize", "w_group_size"), "it is group_size"),
    **dict.fromkeys(
        ("damp_percent", "dampening_frac", "percdamp"), "it is damping, in gptq, fireq and sbvr"
    ),
    **dict.fromkeys(("targets", "modules", "target_modules"), "it is layers"),
    **dict.fromkeys(("modules_to_not_convert", "exclude_modules", "exclude"), "it is ignore"),
    **dict.fromkeys(
        ("num_calibration_samples", "num_samples", "calib_size"), _CALIBRATION.format("nsamples")
    ),
    **dict.fromkeys(("max_seq_length", "max_seq_len", "max_length"), _CALIBRATION.format("seqlen")),
    **dict.fromkeys(("true_sequential", "sequential_update"), "always so; remove it"),
    **dict.fromkeys(("block_size", "blocksize"), "it changes speed alone; remove it"),
    "scheme": "bits, group_size and activations say it: W4A16 is bits: 4, activations: none",
    "strategy": "group_size says it, -1 being a whole row (channel)",
    "modifiers": "they are stages: a list, each with its method",
}
"""Field of another tool → what pq has for it."""


def foreign_word(name: str, value: Any, in_stage: bool) -> str | None:
    """What a field of another tool is in pq, as a remedy; None for a name that no tool is known for.

    in_stage: whether it stands in a stage that rounds weights.
    """
    if in_stage and name in ("symmetric", "sym"):
        return "always so; remove it" if value is True else f"{SYMMETRIC}; remove it"
    if in_stage and name == "zero_point":
        return f"{SYMMETRIC}; remove it" if value is True else "always so; remove it"
    if in_stage and name in ("actorder", "act_order", "desc_act"):
        return f"it is order: {order_of(value).get('order', 'activation')}, in gptq"
    return _WORDS.get(name)


def order_of(value: Any) -> dict[str, str]:
    """gptq's `order` for the column order of another tool; empty where that says nothing.

    Orders that permute groups as well ("group") become the one that leaves groups in place, which
    kernels read without an index.
    """
    if value == "unset":
        return {}
    return {"order": "activation" if value and value != "false" else "natural"}


def damping_of(value: Any) -> dict[str, Any]:
    """gptq's `damping`; empty where nothing is given that it takes."""
    given = isinstance(value, int | float) and 0 < value <= 1 and not isinstance(value, bool)
    return {"damping": value} if given else {}
