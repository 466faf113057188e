"""Packed linear layers that stay packed: what all layouts have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from quantize.formats.scheme import AnyScheme

_INTEGERS = {2: torch.int16, 4: torch.int32}

S = TypeVar("S", bound=AnyScheme)


class NativeLinear(nn.Module, Generic[S]):
    """y = x Ŵᵀ + b with Ŵ [N, K] stored as `scheme.layout` says.

    Tensors are those of the checkpoint, in their own dtypes whatever the model is
    cast to, and bias [N] or None.
    """

    weight_shape: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool, scheme: S) -> None:
        """Make an empty layer on the default device; ValueError for sizes
        that the scheme cannot hold."""
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        for suffix, (dtype, shape) in scheme.layout(out_features, in_features).items():
            setattr(self, suffix, constant(torch.empty(shape, dtype=dtype)))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)

    @abstractmethod
    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Decoded weight [last − first, K] of these output rows."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # A cast of the model must not round what codes are made of:
        # integers are moved and never cast.
        ours = {id(self._parameters[suffix]) for suffix in self.scheme.suffixes}

        def move(tensor: Tensor) -> Tensor:
            if id(tensor) in ours and tensor.is_floating_point():
                return fn(tensor.detach().view(_INTEGERS[tensor.itemsize])).view(tensor.dtype)
            return fn(tensor)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """Sizes and scheme, for printing the model."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {self.scheme}"


def constant(tensor: Tensor) -> nn.Parameter:
    """A parameter that is never trained; not a buffer, because loaders place and offload
    parameters like any weight."""
    return nn.Parameter(tensor, requires_grad=False)
