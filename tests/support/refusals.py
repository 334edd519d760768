"""What every refusal of a user's mistake has to be."""

from collections.abc import Callable

import pytest

from utils import ConfigError


def refused(call: Callable[[], object], *parts: str) -> None:
    """The call ends in a ConfigError of one line that holds all parts."""
    with pytest.raises(ConfigError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text
