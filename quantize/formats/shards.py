"""What one of several GPUs holds of packed tensors: some rows, or some whole groups of inputs.

A layer whose outputs are divided (q, k, v, gate, up) is cut by rows: any number of them. One whose
inputs are divided (o, down) is cut between groups; its products with the parts of the inputs add up
to that of the whole. The scales that a group needs are its own, so every part decodes to exactly
the part of the decoded whole. The factor of an FP8 row is derived from its largest scale: a part
has the same one, or another under which its scales are the same, where `quantize.formats.fp8.reloaded`
gives the scales back; else the factor must be kept (`quantize.kernels.int4.reference.Weight.part`).

A routed expert is cut as any layer, or given to one GPU whole (`span` of experts). Post-RoPE scales
go with their heads. An input that is rotated (`rotated_inputs`) must be whole before it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantize.formats.bitvec import BitVecScheme
from quantize.formats.packed_int import IntScheme, pack_codes, unpack_codes

if TYPE_CHECKING:
    from quantize.formats.scheme import AnyScheme

_WORD = 32  # bits of a word, and inputs of a run of planes


def span(length: int, unit: int, rank: int, ranks: int, what: str = "length") -> slice:
    """Which of so many rows, inputs, heads or experts one of several GPUs holds: as many as any other.

    unit: what stays together, such as a group or the channels of a head. what: its name, for the
    ValueError where they do not divide.
    """
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} of {ranks}")
    if length % (unit * ranks):
        units = f" in units of {unit}" if unit > 1 else ""
        raise ValueError(f"{what} {length}{units} does not divide among {ranks} GPUs")
    share = length // ranks
    return slice(rank * share, (rank + 1) * share)


def kv_heads(heads: int, rank: int, ranks: int) -> slice:
    """Key and value heads of a GPU; with more GPUs than heads several hold the same one.

    ValueError where neither divides the other.
    """
    if ranks <= heads:
        return span(heads, 1, rank, ranks, "key and value heads")
    copies = span(ranks, 1, 0, heads, "number of GPUs").stop
    return slice(rank // copies, rank // copies + 1)


def rows_of(tensors: Mapping[str, Tensor], scheme: AnyScheme, rows: slice) -> dict[str, Tensor]:
    """These output rows of a linear [N, K], as it is stored, by suffix; a bias goes with them.

    ValueError for rows that it does not have.
    """
    N, K = _shape(tensors)
    first, last = _inside(rows, N, "rows")
    whole = {"weight_lines", "weight_scales", "weight_shape"}  # a codebook is of all rows
    out = {
        suffix: tensor if suffix in whole else tensor[first:last]
        for suffix, tensor in tensors.items()
    }
    return out | {"weight_shape": _noted(last - first, K)}


def inputs_of(tensors: Mapping[str, Tensor], scheme: AnyScheme, inputs: slice) -> dict[str, Tensor]:
    """These inputs of a linear [N, K], as it is stored, by suffix; a bias is not among them, since
    one GPU alone may add it.

    ValueError for inputs that it does not have, and for a cut through a group.
    """
    N, K = _shape(tensors)
    first, last = _inside(inputs, K, "inputs")
    group = K if scheme.group_size is None else scheme.group_size
    own = scheme.group_size is not None
    if own and (first % group or (last % group and last != K)):
        raise ValueError(f"inputs {first} to {last} cut through a group of {group}")
    columns = slice(first // group, -(-last // group)) if own else slice(None)
    out = {"weight_shape": _noted(N, last - first)}
    if isinstance(scheme, BitVecScheme):
        # Groups are whole runs of 32 inputs, which take a word for each plane.
        runs = slice(first // _WORD * scheme.bits, -(-last // _WORD) * scheme.bits)
        out["weight_planes"] = tensors["weight_planes"][:, runs].contiguous()
        out["weight_index"] = tensors["weight_index"][:, columns].contiguous()
        return out | {name: tensors[name] for name in ("weight_lines", "weight_scales")}
    if not isinstance(scheme, IntScheme):
        raise ValueError(f"{type(scheme).__name__}: its inputs cannot be divided")
    out["weight_packed"] = _columns(tensors["weight_packed"], scheme.bits, K, first, last)
    return out | {"weight_scale": tensors["weight_scale"][:, columns].contiguous()}


def _columns(packed: Tensor, bits: int, K: int, first: int, last: int) -> Tensor:
    """Words of these columns of packed codes [N, K]."""
    if first * bits % _WORD or (last * bits % _WORD and last != K):
        return pack_codes(unpack_codes(packed, bits, K)[:, first:last], bits)
    return packed[:, first * bits // _WORD : -(-last * bits // _WORD)].contiguous()


def _shape(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    N, K = tensors["weight_shape"].tolist()
    return N, K


def _noted(N: int, K: int) -> Tensor:
    return torch.tensor([N, K], dtype=torch.int64)


def _inside(part: slice, length: int, what: str) -> tuple[int, int]:
    first, last, step = part.start, part.stop, part.step
    if step not in (None, 1) or not 0 <= first < last <= length:
        raise ValueError(f"{what} {first} to {last} of {length}")
    return first, last
