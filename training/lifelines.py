"""Every process of a run holds a connection to the first one, by which each learns at
once that another one has ended, and within a minute that its machine is gone.

Exchanges between devices need not end when a process dies: those of GPUs wait for
minutes, and nothing answers for a machine without power. A connection that a process
leaves without a word is closed by its kernel; where no kernel answers any more, those
of the others notice. A process that is stopped, or has much to do, is not mistaken for
one that is dead.
"""

import contextlib
import os
import secrets
import selectors
import socket
import threading
import weakref
from collections.abc import Callable

from utils import fail

GRACE = 10.0  # seconds that a process has for ending by itself, in order
# Of the kernels: how long a connection is idle before they ask, how long and how often
# they wait for an answer; 40 seconds in all.
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 6, "TCP_KEEPCNT": 5}
ENDS, LOST = b"e", b"l"  # in order; another process is lost
LEFT_ALONE = "another process of this run has ended, and this one with it"


class Lifeline:
    """The connections of a process; a thread watches them.

    Args:
        end: Ends the process when another one is lost and it did not end by itself.
    """

    def __init__(self, end: Callable[[], None]) -> None:
        self._end = end
        self._is_over = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._wake, wakes = socket.socketpair()
        self._selector.register(wakes, selectors.EVENT_READ)
        self._wakes = wakes
        self._listener: socket.socket | None = None
        self._token = b""
        self._connections: set[socket.socket] = set()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        _open.add(self)

    def listen(self) -> str:
        """Begins as the first process.

        Returns:
            What `connect` is told on the others.
        """
        self._token = secrets.token_hex(16).encode()
        self._listener = socket.create_server(("", 0), backlog=4096)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread.start()
        return f"{self._listener.getsockname()[1]} {self._token.decode()}"

    def connect(self, host: str, told: str) -> None:
        """Begins as another process.

        Args:
            host: Of the first process.
            told: What its `listen` has returned.

        Raises:
            OSError: If there is no connection; the process then has no lifeline.
        """
        port, token = told.split()
        connection = socket.create_connection((host, int(port)), timeout=30)
        connection.sendall(token.encode())
        self._add(connection)
        self._thread.start()

    def close(self, is_in_order: bool) -> None:
        """Watches no more.

        Args:
            is_in_order: Whether the others go on, or end by themselves, too.
        """
        if self._is_over.is_set():
            return
        self._is_over.set()
        with contextlib.suppress(OSError):
            self._wake.send(b".")
        if self._thread.is_alive():
            self._thread.join()
        for connection in self._connections:
            _send(connection, ENDS if is_in_order else LOST)
        self.forget()

    def forget(self) -> None:
        """Closes what a child of this process has of it; the process has its own."""
        self._is_over.set()
        sockets = (self._wake, self._wakes, self._listener, *self._connections)
        for one in sockets:
            if one is not None:
                one.close()

    def _add(self, connection: socket.socket) -> None:
        connection.settimeout(5)  # to send; whoever is watched is read when it is ready
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):  # the kernel's own otherwise
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._connections.add(connection)
        self._selector.register(connection, selectors.EVENT_READ, connection)

    # ---- in the thread

    def _watch(self) -> None:
        while not self._is_over.is_set():
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    self._accept(self._listener)
                elif key.data is not None and self._is_lost(key.data):
                    return self._answer()
        return None

    def _accept(self, listener: socket.socket) -> None:
        """Takes a process of the run, and nobody else."""
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            connection.settimeout(5)
            said = connection.recv(len(self._token), socket.MSG_WAITALL)
            if secrets.compare_digest(said, self._token):
                self._add(connection)
            else:
                connection.close()

    def _is_lost(self, connection: socket.socket) -> bool:
        """Whether what has come is bad news; that a process ends in order is none."""
        try:
            said = connection.recv(1)
        except OSError:
            said = b""
        if said == ENDS:
            self._selector.unregister(connection)
            self._connections.discard(connection)
            connection.close()
        return said != ENDS

    def _answer(self) -> None:
        """Tells the others, and ends this process if it does not end by itself."""
        for connection in self._connections:
            _send(connection, LOST)
        if not self._is_over.wait(GRACE):
            self._end()


def _send(connection: socket.socket, word: bytes) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(word)


_open: weakref.WeakSet[Lifeline] = weakref.WeakSet()


def _forget() -> None:
    """A child of this process, such as a data worker, is no process of the run."""
    for lifeline in list(_open):
        lifeline.forget()


os.register_at_fork(after_in_child=_forget)


def end_alone(is_told: bool, folder: str) -> None:
    """Ends this process, wherever its main thread is.

    Args:
        is_told: Whether it says so.
        folder: `checkpointing.save_dir`, if it trains; else nothing.
    """
    where = f". Its command goes on with checkpointing.save_dir={folder}"
    try:
        if is_told:
            fail(f"{LEFT_ALONE}{where if folder else ''}", 1)
    except SystemExit:
        pass
    finally:
        os._exit(1)
