"""Ports of this machine."""

import socket


def free_port() -> int:
    """One that nobody listens on, another at each call."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
