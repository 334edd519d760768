"""Where a page may be written. Imports nothing heavy: it is asked at the start."""

from typing import Any

from utils import ConfigError, path_exists


def check_page_path(path: Any, key: str) -> None:
    """Refuses what no page can be written to.

    Raises:
        ConfigError: If it does not end in .html, or something is there.
    """
    if not str(path).endswith(".html"):
        raise ConfigError(
            f"{key}={path!r} does not end in .html: a page for a browser is written."
        )
    if path_exists(str(path)):
        raise ConfigError(
            f"{key}={path!r} exists; it is not overwritten. Move it away or give "
            "another path."
        )
