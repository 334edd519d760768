"""`mode=view`: saved trajectories side by side, in one page. Needs no torch."""

from omegaconf import DictConfig, ListConfig

from report.formats import print_files, screen
from report.mode import named
from report.page_paths import check_page_path
from report.trajectory import (
    MOST_PAGES,
    MOST_TOKENS,
    Shown,
    read_page,
    write_page,
)
from utils import ConfigError

KEY, OUT = "view.paths", "view.out"


def view(config: DictConfig) -> dict[str, int]:
    """Reads the pages of `view.paths` and writes `view.out`.

    Returns:
        How many runs stand side by side.

    Raises:
        ConfigError: If a page cannot be read, there are none or too many, or something
            is at the new one's place.
    """
    value = config.view.paths
    paths = list(value) if isinstance(value, ListConfig) else [value]
    if not paths or not all(isinstance(x, str) and x for x in paths):
        raise ConfigError(
            f"{KEY}={paths!r}: mode=view needs the pages that sampling.save_trajectory "
            f"has written, as in {KEY}=[a.html,b.html] or {KEY}=['NAME=a.html']."
        )
    check_page_path(config.view.out, OUT)
    shown: list[Shown] = []
    for entry in paths:
        name, path = named(entry)
        runs = read_page(path, KEY)
        shown += [x._replace(title=name or x.title) for x in runs]
    if len(shown) > MOST_PAGES:
        raise ConfigError(
            f"{KEY} has {len(shown)} runs: a page shows {MOST_PAGES} side by side."
        )
    if sum(len(x.first) for one in shown for x in one.samples) > MOST_TOKENS:
        raise ConfigError(
            f"{KEY}: all samples together have more than {MOST_TOKENS} tokens; save "
            "fewer of them, or show fewer pages."
        )
    write_page(config.view.out, shown)
    print_files(screen(), "page", [config.view.out])
    return {"runs": len(shown)}
