"""Downstream tasks of EleutherAI's lm-evaluation-harness, on checkpoints of ours.

    python -m evaluation.harness --model_args checkpoint=last.ckpt --tasks TASK

The command line is lm_eval's own, with `--model discrete_diffusion` put in. lm_eval is
optional and imported only here, when a command runs. What is computed is in
`scoring.py` and docs/downstream_tasks.md.
"""

import logging
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from checkpoints.about import missing_plugins, own_algorithms
from checkpoints.checkpoint import Checkpoint
from checkpoints.locating import checkpoint_in
from checkpoints.reading import read_checkpoint
from cli.commandline import composed
from cli.environment import print_plainly, tell_nobody
from cli.known_keys import refuse_unread
from cli.quiet import keep_quiet, show_once
from cli.settle import algorithm_class, check_batches, check_devices, settle
from cli.stated import said, take, without
from data.tokenizers import PIXELS, get_tokenizer
from evaluation.scoring import Request, Scorer
from models.device import device_of, keep_freed_memory
from sampling.prompts import check_prompts
from trainer_base import TrainerBase
from utils import CONFIGS, ConfigError, RunStopped, fail, first_line, require

log = logging.getLogger(__name__)

NAME = "discrete_diffusion"
DEFAULT_DEVICE = "cuda:0"  # lm_eval's, whether or not the machine has one
INSTALL = "pip install lm_eval==0.4.13"


@dataclass(frozen=True)
class Arguments:
    """`--model_args` of the command line."""

    checkpoint: str = ""  # .ckpt of ours or of the authors, export folder, or hub id
    overrides: str = ""  # of the config, as for main.py, with blanks or ; in between
    tokenizer: str | None = None  # data.tokenizer_name_or_path
    seed: int | None = None
    device: str | None = None  # cpu, cuda, cuda:1, mps; None: trainer.accelerator's
    batch_size: int = 1  # rows (text and draw) in an evaluation of the network
    num_draws: int = 32  # of each text's bound
    suffix_only: bool = True  # see scoring.Scorer
    max_gen_toks: int = 256  # where a task does not say

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> "Arguments":
        """Checks names and values.

        Raises:
            ConfigError: If a name is unknown, or a value of the wrong kind.
        """
        names = [field.name for field in fields(cls)]
        for name in given:
            require(name, names, "--model_args")
        result = cls(**given)
        for name in ("checkpoint", "tokenizer", "overrides", "device"):
            value = getattr(result, name)
            if value is not None:  # the command line makes numbers of digits
                text: dict[str, Any] = {name: str(value)}
                result = replace(result, **text)
        if str(result.batch_size).isdecimal():  # --batch_size arrives as text
            result = replace(result, batch_size=int(result.batch_size))
        for name in ("batch_size", "num_draws", "max_gen_toks", "seed"):
            value = getattr(result, name)
            low = 0 if name == "seed" else 1
            is_whole = type(value) is int and value >= low
            if not is_whole and (name, value) != ("seed", None):
                raise ConfigError(
                    f"{name}={value!r} is not a whole number of at least {low}."
                )
        require(result.suffix_only, (True, False), "suffix_only")
        if not result.checkpoint:
            raise ConfigError(
                "checkpoint is empty: give --model_args checkpoint=FILE, a folder or "
                "a hub id."
            )
        return result

    def all_overrides(self) -> list[str]:
        """Overrides of the config, those of other arguments included.

        Raises:
            ConfigError: If a quotation mark has no partner.
        """
        try:
            overrides = shlex.split(self.overrides.replace(";", " "))
        except ValueError as error:
            raise ConfigError(f"overrides={self.overrides!r}: {error}.") from None
        if self.tokenizer is not None:
            overrides.append(f"data.tokenizer_name_or_path='{self.tokenizer}'")
        if self.seed is not None:
            overrides.append(f"seed={self.seed}")
        if self.device is not None:
            kind = self.device.split(":")[0]
            overrides.append(f"trainer.accelerator={kind}")
        return overrides


# ---------------------------------------------------------------- the model


def load(arguments: Arguments) -> Scorer:
    """The model of a checkpoint, on its device.

    Config: the checkpoint's algorithm, network, schedule and tokenizer; anything that
    `overrides` name is as they say, the rest as in configs/.

    Raises:
        ConfigError: If anything that was asked for cannot be had.
    """
    model = load_model(arguments.checkpoint, arguments.all_overrides())
    name = model.config.data.tokenizer_name_or_path
    if name in PIXELS:
        raise ConfigError(
            f"checkpoint={arguments.checkpoint!r} is a model of images "
            f"(data.tokenizer_name_or_path={name}), and the tasks are of text."
        )
    to_device(model, arguments.device)
    return Scorer(
        model,
        batch_size=arguments.batch_size,
        num_draws=arguments.num_draws,
        suffix_only=arguments.suffix_only,
    )


def to_device(model: TrainerBase, device: str | None) -> None:
    """Puts a model on a device; None: on that of `trainer.accelerator`.

    Raises:
        ConfigError: If there is no such device.
    """
    try:
        model.to(device or device_of(model.config))
    except RuntimeError as error:
        raise ConfigError(f"device={device!r}: {first_line(error)}") from None


def load_model(path: str, overrides: list[str]) -> TrainerBase:
    """The model of a checkpoint, on the CPU, as `load`.

    Args:
        path: Of the checkpoint.
        overrides: Of the config.
    """
    config, path = compose(overrides), checkpoint_in(path, "checkpoint")
    trusted = config.checkpointing.trusted_classes
    checkpoint = read_checkpoint(path, "checkpoint", trusted)
    config = complete(overrides, checkpoint)
    config.eval.checkpoint_path = path
    algorithm = algorithm_class(config)
    settle(config)
    algorithm.validate_config(config)
    check_devices(config)
    check_batches(config)
    check_prompts(config, algorithm.is_autoregressive)
    model: TrainerBase = algorithm(config, get_tokenizer(config))
    model.load_weights(checkpoint, "eval.checkpoint_path")
    return model


def compose(overrides: list[str]) -> DictConfig:
    """The config as main.py composes it for mode=ppl_eval.

    Raises:
        ConfigError: If there is no such key or choice, or it is not for here, or
            nothing would read it.
    """
    for key in ("mode", "eval.checkpoint_path"):
        if key in _keys(overrides):
            raise ConfigError(f"overrides: {key} has no meaning here; leave it out.")
    try:
        config = composed(["mode=ppl_eval", *overrides])
    except ConfigError as error:
        given = " ".join(overrides)
        raise ConfigError(f"overrides={given!r}: {error}") from None
    refuse_unread(config)
    return config


def complete(overrides: list[str], checkpoint: Checkpoint) -> DictConfig:
    """The config with what the checkpoint says, where overrides do not.

    Raises:
        ConfigError: If neither says which algorithm it is.
    """
    config = compose(overrides)
    given = said(overrides, [CONFIGS])
    name = checkpoint.setting("algo.name")
    if "algo" not in given.groups and name not in own_algorithms():
        what = "no algorithm" if name is None else f"algo={name}, which is not here"
        raise ConfigError(
            f"The checkpoint states {what}: give it by overrides='algo=...'."
            f"{missing_plugins(checkpoint, config)}"
        )

    def other(choices: list[str]) -> DictConfig:
        return compose([*choices, *without(overrides, choices)])

    take(config, checkpoint, given, other, "the checkpoint", refuses=False)
    return config


def _keys(overrides: Iterable[str]) -> set[str]:
    """What overrides name: groups and keys."""
    return {override.split("=")[0].lstrip("+~") for override in overrides}


# ---------------------------------------------------------------- the adapter

# Of a task's generation_kwargs: those that are followed, in lm_eval's spellings.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def request_of(prompt: str, settings: Mapping[str, Any], default: int) -> Request:
    """What to write, from a prompt and a task's generation_kwargs.

    Args:
        prompt: The text to continue.
        settings: `until` and one of LENGTHS count.
        default: Tokens to write if `settings` do not say.
    """
    until = settings.get("until") or ()
    lengths = [int(settings[name]) for name in LENGTHS if settings.get(name)]
    stops = (until,) if isinstance(until, str) else tuple(until)
    return Request(prompt, stops, min(lengths, default=default))


def register() -> Callable[[], None]:
    """Makes `discrete_diffusion` known to lm_eval.

    Returns:
        lm_eval's command.

    Raises:
        ConfigError: If lm_eval is not installed.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise ConfigError(
            f"the harness needs lm_eval, which is optional ({error}): {INSTALL}"
        ) from None

    @register_model(NAME)
    class DiscreteDiffusion(LM):
        """`Scorer` as lm_eval wants it; arguments as in `Arguments`."""

        def __init__(self, **given: Any) -> None:
            super().__init__()
            self.arguments = Arguments.parse(given)
            self.scorer = load(self.arguments)
            self._device = self.scorer.model.device

        @classmethod
        def create_from_arg_obj(
            cls, arg_dict: dict[str, Any], additional_config: dict | None = None
        ) -> "DiscreteDiffusion":
            """The arguments' own batch_size and device come before the command's."""
            extra = additional_config or {}
            extra = {name: x for name, x in extra.items() if x is not None}
            if extra.get("device") == DEFAULT_DEVICE and not names_device(sys.argv):
                del extra["device"]
            return cls(**{**extra, **arg_dict})

        def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
            scores = self.scorer.score([request.args for request in requests])
            return [(score.log_likelihood, score.is_greedy) for score in scores]

        def loglikelihood_rolling(self, requests: list) -> list[float]:
            return self.scorer.score_whole([request.args[0] for request in requests])

        def generate_until(self, requests: list) -> list[str]:
            default = self.arguments.max_gen_toks
            asked: list[tuple[str, dict[str, Any]]] = [r.args for r in requests]
            self._report_unused({key for _, settings in asked for key in settings})
            return self.scorer.write(
                [request_of(prompt, settings, default) for prompt, settings in asked]
            )

        def apply_chat_template(self, *args: Any, **kwargs: Any) -> str:
            raise ConfigError("--apply_chat_template: these models have no template.")

        @property
        def tokenizer_name(self) -> str:
            name = self.scorer.model.config.data.tokenizer_name_or_path
            return str(name).replace("/", "__")

        def _report_unused(self, keys: set[str]) -> None:
            unused = sorted(keys - {"until", *LENGTHS})
            if unused:
                log.warning(
                    "generation_kwargs %s of the tasks are not followed: samples are "
                    "drawn as sampling.* of the overrides says",
                    ", ".join(unused),
                )

    return cli_evaluate


def names_device(argv: list[str]) -> bool:
    """Whether a command names a device, however short the flag is written."""
    flags = (word.split("=")[0] for word in argv)
    return any(len(x) > 3 and "--device".startswith(x) for x in flags)


def command_line(argv: list[str]) -> list[str]:
    """lm_eval's command line, with our model where it names none."""
    names = {argument.split("=")[0] for argument in argv}
    is_other = not argv or argv[0] in ("ls", "validate", "-h", "--help")
    if is_other or names & {"--model", "-M", "--config", "-C"}:
        return argv
    return [*argv, "--model", NAME]


def main() -> None:
    tell_nobody()
    keep_quiet()
    keep_freed_memory()
    print_plainly()
    show_once()
    try:
        evaluate = register()
        sys.argv[1:] = command_line(sys.argv[1:])
        evaluate()
    except RunStopped as error:
        fail(str(error), error.status)
    except (ConfigError, OmegaConfBaseException) as error:
        fail(str(error))


if __name__ == "__main__":
    main()
