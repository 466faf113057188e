"""Notices that another process of a launch failed or died, whatever this one is doing.

Rank 0 holds a connection to every other rank. Who fails says so; of who dies the system
closes the connection. Rank 0 passes the news on. Collectives alone would not do: NCCL's wait
for the dead until a time limit.
"""

from __future__ import annotations

import json
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

from quantize.errors import LostError, PqError, StoppedError

# seconds in which a rank may fail by itself, from the same cause as the one that told of it
_SETTLE = 3.0
# seconds to learn whom an error of communication is about; a busy machine takes some
_TO_EXPLAIN = 60.0
# seconds to leave by an exception before the process is abandoned: files are closed in less, and a
# call that waits for the lost rank never returns
_UNWIND = 10.0
# seconds for a connection once all ranks are there: a busy machine may be slow, and what takes
# longer is taken for lost
_TO_CONNECT = 300.0
# exit codes that a rank tells of itself (docs/troubleshooting.md)
_FAILED = 1
_OUT_OF_MEMORY = 8
_INTERRUPTED = 130
# seconds, seconds, probes: a machine that vanished is noticed after 90 s; sooner would take a short
# break of the network for a loss
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}


@dataclass(frozen=True)
class _News:
    """How a rank ended."""

    rank: int
    code: int | None
    """Exit code; None for one that did not say why."""
    text: str

    def error(self, remedy: str) -> LostError:
        if self.code is None:
            return LostError(f"rank {self.rank} no longer answers; {remedy}")
        return LostError(f"rank {self.rank} failed: {self.text}", self.code)


class Watch:
    """Connections between rank 0 and the others. As a context manager it tells the
    others how this rank ended."""

    def __init__(
        self, rank: int, size: int, token: str, remedy: str, abandon: Callable[[LostError], None]
    ) -> None:
        self._rank, self._size, self._token, self._remedy, self._abandon = (
            rank,
            size,
            token,
            remedy,
            abandon,
        )
        self._peers: dict[int, socket.socket] = {}
        self._server: socket.socket | None = None
        self._news: _News | None = None
        self._lock = threading.Lock()
        self._known = threading.Event()
        self._left = threading.Event()

    def listen(self, host: str) -> int:
        """Let the others connect (rank 0) → the port."""
        family, address = _resolve(host, 0)
        local = address.startswith("127.") or address == "::1"
        self._server = socket.create_server(
            (address if local else "", 0), family=family, backlog=self._size
        )
        return int(self._server.getsockname()[1])

    def connect(self, host: str, port: int) -> None:
        """Meet: rank 0 takes the connections that the others make to its port."""
        if self._server is None:
            self._peers[0] = socket.create_connection((host, port), timeout=_TO_CONNECT)
            self._send(0, {"token": self._token, "rank": self._rank})
        else:
            self._server.settimeout(_TO_CONNECT)
            with self._server:
                while len(self._peers) < self._size - 1:
                    self._admit(self._server.accept()[0])
        for peer, connection in self._peers.items():
            connection.settimeout(None)
            _keep_alive(connection)
            threading.Thread(target=self._listen_to, args=(peer, connection), daemon=True).start()

    def _admit(self, connection: socket.socket) -> None:
        connection.settimeout(_TO_CONNECT)
        hello: Any = None
        with suppress(OSError, ValueError), connection.makefile("rb") as file:
            hello = json.loads(file.readline(256))
        if isinstance(hello, dict) and hello.get("token") == self._token:
            self._peers[int(hello["rank"])] = connection
        else:  # no process of this launch
            connection.close()

    def __enter__(self) -> Watch:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR1, self._raise)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._left.set()
        if isinstance(err, LostError):
            return
        if err is None or isinstance(err, StoppedError):  # which all of them leave by
            news: dict[str, Any] = {"over": True}
        else:
            news = {"rank": self._rank, "code": _exit_code(err), "text": _line(err)}
        for peer in self._peers:
            self._send(peer, news)

    def ignore(self) -> None:
        """Let no news disturb this rank from now on."""
        self._left.set()

    @contextmanager
    def explain(self) -> Iterator[None]:
        """Turn what torch.distributed raises where another rank is gone into
        the LostError that names it."""
        try:
            yield
        except RuntimeError as err:
            if (
                self._known.wait(_TO_EXPLAIN if _of_communication(err) else _SETTLE)
                and self._news is not None
            ):
                raise self._news.error(self._remedy) from err
            raise

    def _listen_to(self, peer: int, connection: socket.socket) -> None:
        with suppress(OSError, ValueError), connection.makefile("rb") as file:
            for line in file:
                said = json.loads(line)
                if "over" in said:
                    return
                self._hear(_News(said["rank"], said["code"], said["text"]))
        self._hear(_News(peer, None, ""))

    def _hear(self, news: _News) -> None:
        with self._lock:
            if self._news is not None or self._left.is_set():
                return
            self._news = news
            for peer in self._peers:
                if self._rank == 0 and peer != news.rank:
                    self._send(peer, {"rank": news.rank, "code": news.code, "text": news.text})
        self._known.set()
        if self._left.wait(_SETTLE):
            return
        main = threading.main_thread().ident
        if main is not None and signal.getsignal(signal.SIGUSR1) == self._raise:
            signal.pthread_kill(main, signal.SIGUSR1)
        if not self._left.wait(_UNWIND):
            self._abandon(news.error(self._remedy))

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if self._news is not None and not self._left.is_set():
            raise self._news.error(self._remedy)

    def _send(self, peer: int, message: dict[str, Any]) -> None:
        with suppress(OSError):
            self._peers[peer].sendall(json.dumps(message).encode() + b"\n")


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, str]:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return family, str(address[0])


def _keep_alive(connection: socket.socket) -> None:
    """Let the system notice a machine that is gone without a word."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _of_communication(err: RuntimeError) -> bool:
    """Whether the error says that another rank was not reached; gloo has no
    class of its own for that."""
    return isinstance(err, dist.DistError) or "gloo" in str(err).lower()


def _exit_code(err: BaseException) -> int:
    if isinstance(err, PqError):
        return err.exit_code
    if isinstance(err, SystemExit):
        return err.code if isinstance(err.code, int) else _FAILED
    if isinstance(err, KeyboardInterrupt):
        return _INTERRUPTED
    return (
        _OUT_OF_MEMORY if isinstance(err, MemoryError) or "out of memory" in str(err) else _FAILED
    )


def _line(err: BaseException) -> str:
    if isinstance(err, (SystemExit, KeyboardInterrupt)):
        return "it was interrupted"
    return (str(err).strip().splitlines() or [type(err).__name__])[0]
