"""Passes through a decoder layer that stand still on the way: one pass a block instead of one for
every group of linears.

What a linear gets is known when the forward pass has come to it. The pass waits there, in a
greenlet of its own, until the linear is encoded, and goes on through what took its place. All that
came before is kept as the layer's own code keeps it: in local variables of functions that have not
returned. So nothing is computed twice, and nothing need be known of how a layer computes.

Passes through a layer that stays as it is, such as the parent's, may go on in a thread of their own
meanwhile (`HeldPasses.go_ahead`).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from quantize.threads import Beside


class HeldPasses:
    """Passes of batches through one layer, each standing before one of its modules.

    forward: runs a layer on hidden states [B, T, D] → [B, T, D]. recorded: names of modules whose
    inputs are kept from the pass, since a later one's are looked at together with them. most: how
    many passes may stand at once; the others are run from the start whenever something is asked of
    them, which gives the same. threads: of the CPU, with which those that may stand go on beside the caller
    (`go_ahead`); 0: they do not. The layer must be the same all the time then.
    """

    def __init__(
        self,
        forward: Callable[[nn.Module, Tensor], Tensor],
        layer: nn.Module,
        recorded: Collection[str],
        most: int,
        threads: int = 0,
    ) -> None:
        self.layer = layer
        self._forward = forward
        self._recorded = frozenset(recorded)
        self._most = most
        self._standing: dict[int, _Held] = {}
        """By the identity of the hidden states, which the passes keep alive."""
        self._names: dict[nn.Module, str] | None = None
        """Of all modules, as they are now; None: not known yet."""
        self._direct: dict[tuple[str, str], bool] = {}
        """Whether the second of two modules gets what the first returns, as it is."""
        self._beside = Beside(threads) if threads and most else None
        """Where standing passes run, from their first step to the last: greenlets stay in their thread."""
        self._coming: dict[int, Future[None]] = {}
        """Passes that go on there, by the identity of the hidden states."""

    def __del__(self) -> None:
        # A pass that stands still and what it stands in hold each other: without this they would
        # wait for the garbage collector, which knows nothing of gigabytes.
        for held in self._standing.values():
            if self._beside is None:
                held.stop()
            else:
                self._beside.leave(held.stop)

    def __len__(self) -> int:
        return len(self._standing)

    def inputs(self, hidden: Tensor, names: Sequence[str]) -> tuple[Tensor, ...]:
        """What enters the named modules [..., K] when `hidden` [B, T, D] goes through the layer.

        Names in the order in which they are run; all but the last are among the recorded ones. The
        pass stands before the last one then, where there is room.
        """
        *before, name = names
        held = self._come_to(hidden, name)
        found = (*(held.seen[other] for other in before), held.input)
        self._keep(hidden, held)
        return found

    def results(self, hidden: Tensor, names: Sequence[str]) -> tuple[Tensor, ...]:
        """As `inputs`, but of the last module what it returns [..., N].

        It is computed once: the pass goes on with it.
        """
        *before, name = names
        held = self._come_to(hidden, name)
        out = held.result()
        found = (*(held.seen[other] for other in before), out)
        self._keep(hidden, held)
        return found

    def outputs(self, hidden: Tensor, source: str, name: str) -> Tensor:
        """What enters `name` [..., K], as `inputs` has it, where that may be what comes out of the
        module `source`.

        Where the first batch shows that it is, the others stand before the source, so that it may
        be changed without a pass from the start.
        """
        standing = self._standing.get(id(hidden))
        if standing is not None and standing.at == name:
            return standing.input
        if self._direct.get((source, name)):
            held = self._come_to(hidden, source)
            self._keep(hidden, held)
            out: Tensor = self.layer.get_submodule(source)(held.input)
            return out
        made: list[Tensor] = []
        hook = self.layer.get_submodule(source).register_forward_hook(
            lambda module, args, out: made.append(out)
        )
        try:
            held = self._come_to(hidden, name)
        finally:
            hook.remove()
        self._direct[source, name] = any(_same(out, held.input) for out in made)
        self._keep(hidden, held)
        return held.input

    def go_ahead(self, stream: Iterable[Tensor], name: str | None) -> None:
        """Let passes of these hidden states go on beside the caller until they come to `name`, those that have
        not begun too, where there is room; None: those that stand, to the end. Nothing happens where passes
        do not run beside it.

        What is asked of a pass waits for it alone.
        """
        if self._beside is None:
            return
        for hidden in stream:
            held = self._standing.get(id(hidden))
            if held is None and name is not None and len(self._standing) < self._most:
                held = self._standing[id(hidden)] = self._begin(hidden)
            if held is None or id(hidden) in self._coming or held.ended:
                continue
            if name is None or name not in (*held.passed, held.at):
                self._coming[id(hidden)] = self._beside.begin(partial(self._go_here, held, name))

    def settle(self) -> None:
        """Wait until no pass goes on beside the caller."""
        for key in list(self._coming):
            self._arrive(key)

    def _arrive(self, key: int) -> None:
        coming = self._coming.pop(key, None)
        if coming is not None and coming.exception() is not None:
            # It begins again where something is asked of it, and what went wrong is raised there.
            del self._standing[key]

    def _come_to(self, hidden: Tensor, name: str) -> _Held:
        """The pass of these hidden states, standing before `name`."""
        self._arrive(id(hidden))
        held = self._standing.pop(id(hidden), None)
        if held is not None and name not in (*held.passed, held.at):
            self._go(held, name)
        elif held is None or held.at != name:
            if held is not None:
                held.do(held.stop)
            held = self._begin(hidden)
            self._go(held, name)
        if held.at != name:
            raise KeyError(f"a pass through the layer does not come to {name}")
        return held

    def _begin(self, hidden: Tensor) -> _Held:
        stays = len(self._standing) < self._most
        return _Held(self._forward, self.layer, hidden, self._beside if stays else None)

    def _keep(self, hidden: Tensor, held: _Held) -> None:
        if len(self._standing) < self._most:
            self._standing[id(hidden)] = held
        else:
            held.do(held.stop)

    def finish(self, hidden: Tensor) -> Tensor:
        """What `hidden` [B, T, D] becomes in the layer as it is now."""
        self._arrive(id(hidden))
        held = self._standing.pop(id(hidden), None)
        if held is None:
            self.settle()
            return self._forward(self.layer, hidden)
        if not held.ended:
            self._go(held, None)
        return held.output

    def changed(self, names: Collection[str]) -> None:
        """Give up the passes that have come through one of these modules; all without a name.

        Called after modules were changed or others took their places.
        """
        self.settle()
        self._names = None
        for key, held in list(self._standing.items()):
            if not names or not held.passed.isdisjoint(names):
                del self._standing[key]
                held.do(held.stop)

    def _go(self, held: _Held, name: str | None) -> None:
        """Let a pass go on until it comes to the module `name`; None: to its end."""
        if held.beside is None:
            self.settle()  # two that run would each change what the other one comes to
        held.do(partial(self._go_here, held, name))

    def _go_here(self, held: _Held, name: str | None) -> None:
        """`_go`, in the thread that the pass is bound to."""
        if self._names is None:
            self._names = {module: full for full, module in self.layer.named_modules()}
        # Without a reference to us: frames that stand still keep the hook that was called last.
        names, recorded = self._names, self._recorded

        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            full = names.get(module)
            if full is not None:
                held.passed.add(full)
                if full in recorded:
                    held.seen[full] = args[0]

        # A hook for all modules there are: on each of them it would be copied with the layer.
        hook = register_module_forward_pre_hook(note)
        module = None if name is None else self.layer.get_submodule(name)
        own = None if module is None else vars(module).get("forward")
        if module is not None and name is not None:
            module.forward = partial(held.stand, name, module.forward)
        try:
            held.go_on()
        finally:
            hook.remove()
            if module is not None:
                del module.forward
                if own is not None:
                    module.forward = own


class _Held:
    """One batch on its way through a layer."""

    def __init__(
        self,
        forward: Callable[[nn.Module, Tensor], Tensor],
        layer: nn.Module,
        hidden: Tensor,
        beside: Beside | None = None,
    ) -> None:
        self.beside = beside
        """Runs it; None: whoever asks."""
        self.at: str | None = None
        """The module that the pass stands before."""
        self.passed: set[str] = set()
        """Modules that it has come to, but for this one."""
        self.seen: dict[str, Tensor] = {}
        """Inputs of recorded modules."""
        self.input: Tensor
        """Of the module that it stands before."""
        self.output: Tensor
        """Of the layer."""
        self.ended = False
        """Whether it has come to the layer's end."""
        self._made: Tensor | None = None
        """What the module that it stands before returns, if that was asked for."""
        self._layer = layer
        self._forward, self._hidden = forward, hidden
        self._thread: greenlet | None = None
        """Bound to the thread of the interpreter that it is made in,"""
        self._home = 0
        """which is this one."""

    def do(self, job: Callable[[], None]) -> None:
        """Do what concerns the pass in the thread that it is bound to, and wait for it."""
        if self.beside is None:
            job()
        else:
            self.beside.do(job)

    def go_on(self) -> None:
        """Let the pass go on until it stands again or ends."""
        if self._thread is None:
            self._thread, self._home = greenlet(self._run), threading.get_ident()
        self._thread.switch()

    def _run(self) -> None:
        self.output = self._forward(self._layer, self._hidden)
        self.ended = True

    def stand(
        self, name: str, forward: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """The `forward` of the module `name`: waits, then calls what is in its place by then.

        forward: its own, for whoever else calls it meanwhile.
        """
        if getcurrent() is not self._thread:
            return forward(x, *args, **kwargs)
        self.at, self.input = name, x
        self.passed.discard(name)
        getcurrent().parent.switch()
        self.at = None
        del self.input
        self.passed.add(name)
        if self._made is not None:
            made, self._made = self._made, None
            return made
        # Not the module itself: what its hooks do to inputs was done before it was come to.
        return self._layer.get_submodule(name).forward(x, *args, **kwargs)

    def result(self) -> Tensor:
        """What the linear that it stands before returns; a change of it comes too late from now on."""
        assert self.at is not None
        if self._made is None:
            self._made = self._layer.get_submodule(self.at).forward(self.input)
            self.passed.add(self.at)
        return self._made

    def stop(self) -> None:
        """End the pass where it stands."""
        # A greenlet is false once it has ended; a process that ends takes all of them with it.
        if not self._thread or sys.is_finalizing():
            return
        # Where the collector comes here in another thread, greenlet ends it in its own, later.
        if threading.get_ident() == self._home:
            # The garbage collector may come here in the midst of another pass, which is to go on then.
            self._thread.parent = getcurrent()
            self._thread.throw()


def _same(out: Any, entering: Tensor) -> bool:
    return (
        isinstance(out, Tensor)
        and out.data_ptr() == entering.data_ptr()
        and (out.numel(), out.shape[-1]) == (entering.numel(), entering.shape[-1])
    )
