"""Words of the command line that are no settings, and what was meant by them."""

import os

from cli.hints import key_hint
from cli.known_keys import known_keys
from utils import CONFIGS, ConfigError, choices_of

MODES = (
    *("train", "ppl_eval", "sample_eval", "fid_eval", "report", "prepare_data"),
    *("inspect", "export", "view"),
)
# Hydra's flags, and those of them behind which a word of their own may stand.
FLAGS = (
    *("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r"),
    *("--multirun", "-m", "--shell-completion", "-sc"),
)
WITH_WORD = (
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name"),
    *("-cn", "--config-dir", "-cd", "--experimental-rerun", "--info", "-i"),
)
CHECKPOINTS = (".ckpt", ".pt", ".safetensors")


def refuse_words(argv: list[str]) -> None:
    """Refuses what is neither KEY=VALUE nor a flag of Hydra's.

    Raises:
        ConfigError: With what was probably meant.
    """
    is_of_flag = False
    for word in argv:
        flag, is_pair, _ = word.partition("=")
        if is_of_flag and not word.startswith("-"):
            is_of_flag = False
        elif word.startswith("-"):
            if flag not in FLAGS + WITH_WORD:
                raise ConfigError(_no_flag(word))
            is_of_flag = flag in WITH_WORD and not is_pair
        elif word.startswith("="):
            raise ConfigError(f"{word!r} has no key: write KEY=VALUE without blanks.")
        elif not is_pair and not word.startswith("~"):
            raise ConfigError(_no_pair(word))


def _no_flag(word: str) -> str:
    name, is_pair, value = word.lstrip("-").partition("=")
    name = name.replace("-", "_")
    if name not in known_keys() and name not in groups():
        return (
            f"Unknown flag {word}.{_hint(name)} Settings are KEY=VALUE, without dashes."
        )
    return f"Unknown flag {word}: write {name}={value if is_pair else 'VALUE'}."


def _no_pair(word: str) -> str:
    name = word.rstrip(":,").lstrip("+")
    meant = [f"mode={name}"] if name in MODES else []
    meant = meant or [
        f"{group}={name}" for group in groups() if name in choices_of(group)
    ]
    if meant:
        return f"{word!r} is no setting: write {' or '.join(meant)}."
    if name in known_keys() or name in groups():
        return f"{word!r} has no value: write {name}=VALUE, without blanks."
    if name.endswith(CHECKPOINTS) or os.path.isdir(name):
        return (
            f"{word!r} is no setting: write mode=ppl_eval or mode=sample_eval and "
            f"eval.checkpoint_path={name}."
        )
    if os.path.isfile(name):
        return f"{word!r} is no setting: write data=text_files data.path={name}."
    return f"{word!r} is no setting.{_hint(name)} Settings are KEY=VALUE."


def _hint(name: str) -> str:
    return key_hint(name, (x for x in known_keys() if not x.startswith("hydra")))


def groups() -> list[str]:
    """Folders of configs of which one is chosen."""
    return sorted(path.name for path in CONFIGS.iterdir() if path.is_dir())
