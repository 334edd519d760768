import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def unused_tcp_port() -> int:
    return free_port()


@pytest.fixture
def unused_tcp_ports() -> Callable[[], int]:
    """Gives another one at each call."""
    return free_port
