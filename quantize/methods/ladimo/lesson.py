"""What an FFN is taught, and how its outputs are judged: as the residual stream sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantize.block.post_norm import PostNorm
from quantize.methods.ladimo.dense import Ffn

if TYPE_CHECKING:
    from quantize.block.block import Block

# One token of so many is not trained on: enough of them to compare errors by, at the cost of little
# to learn from.
_HELD_OUT = 16


@dataclass(frozen=True)
class Outlet:
    """The norm that an FFN's outputs go through before they are added to the residual stream."""

    norm: PostNorm
    dense: Ffn
    """The FFN before it is changed: the norm divides by the size of its outputs."""

    @classmethod
    def of(cls, block: Block, dense: Ffn) -> Outlet | None:
        """That of a block's FFN; None where it has none, or one of another kind."""
        name = block.arch.post_norms.get(block.arch.of_role("down"))
        if name is None:
            return None
        norm = PostNorm.of(block.module.get_submodule(name), len(dense.down))
        return None if norm is None else cls(norm, dense)

    def after(self, z: Tensor) -> Tensor:
        """What is added to the stream for outputs z [M, D]."""
        return self.norm.gains * z / self.norm.sizes(z)

    def shares(self, x: Tensor) -> Tensor:
        """What an error in the outputs for inputs x [M, D] counts behind the norm, squared [M]."""
        return self.norm.sizes(self.dense(x))[:, 0] ** -2

    def before(self, x: Tensor, y: Tensor) -> Tensor:
        """The outputs [M, D] for inputs x that the norm makes y [M, D] of, were the sizes of the
        dense FFN's to stay."""
        z = self.dense(x)
        return z + self.norm.before(y - self.after(z), self.norm.sizes(z))


@dataclass(frozen=True)
class Lesson:
    """Inputs x [M, D] of an FFN and what it should add to the residual stream for them,
    y [M, D]; the last tokens only measure."""

    x: Tensor
    y: Tensor
    outlet: Outlet | None = None
    """None: the outputs are added as they are."""

    @property
    def train_tokens(self) -> int:
        """Tokens to learn from."""
        return len(self.x) - len(self.x) // _HELD_OUT

    @property
    def train(self) -> Lesson:
        """The part to learn from."""
        return self.part(slice(self.train_tokens))

    @property
    def held_out(self) -> Lesson:
        """The part to measure on; that to learn from where there are too few of others."""
        first = self.train_tokens
        return self.train if first == len(self.x) else self.part(slice(first, None))

    def pieces(self) -> Iterator[Lesson]:
        """So many tokens at once that hidden activations stay small (`Ffn.pieces`)."""
        for x, y in zip(Ffn.pieces(self.x), Ffn.pieces(self.y), strict=True):
            yield replace(self, x=x, y=y)

    def split(self, parts: int) -> list[Lesson]:
        """So many parts of consecutive tokens, as equal as they can be."""
        pairs = zip(self.x.tensor_split(parts), self.y.tensor_split(parts), strict=True)
        return [replace(self, x=x, y=y) for x, y in pairs]

    def part(self, chosen: slice | Tensor) -> Lesson:
        """That of chosen tokens, a slice or int64 [m]."""
        return replace(self, x=self.x[chosen], y=self.y[chosen])

    def sample(self, most: int) -> Lesson:
        """As many tokens at most, spread over all."""
        return self.part(slice(None, None, -(-len(self.x) // most)))

    def lost(self, outputs: Tensor) -> Tensor:
        """Squared errors [M, D] of what outputs [M, D] add to the stream."""
        sent = outputs if self.outlet is None else self.outlet.after(outputs)
        return (sent - self.y).square()

    @torch.no_grad()
    def error(self, ffn: Callable[[Tensor], Tensor]) -> float:
        """Squared error of what an FFN adds to the stream, relative to the targets."""
        lost = sum(float(one.lost(ffn(one.x)).double().sum()) for one in self.pieces())
        return lost / max(float(self.y.double().square().sum()), 1e-300)

    def importance(self) -> Tensor | None:
        """What a squared error in the FFN's own outputs counts, per token [M], with the mean 1;
        None: the same for all."""
        if self.outlet is None:
            return None
        shares = self.outlet.shares(self.x)
        return shares / shares.mean()

    def seen(self, ffn: Ffn) -> Ffn:
        """The FFN with each output in the units that it has in the stream."""
        if self.outlet is None:
            return ffn
        return replace(ffn, down=ffn.down * self.outlet.norm.gains[:, None])

    def wanted(self) -> Tensor:
        """The FFN's own outputs [M, D] that add up to the targets."""
        return self.y if self.outlet is None else self.outlet.before(self.x, self.y)

    def minus(self, constant: Tensor) -> Lesson:
        """The lesson of an FFN whose outputs get a constant [D] beside; not behind a norm."""
        assert self.outlet is None
        return replace(self, y=self.y - constant)
