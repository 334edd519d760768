"""What modules of the user's own bring: networks, data sets, samplers, noise schedules,
algorithms, metrics.

`plugins=[my_module]` imports them before any table is asked; in each a line such as
`@sampler("mine")` enters a class under the name that the command line then chooses.
Nothing but the command line says what is imported: a checkpoint only names plug-ins.

The functions for plug-ins are those of `duo`, too; docs/extending.md has an example of
each.
"""

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf

from cli.known_keys import forget, known_keys
from data.registry import DATASETS, DatasetSpec, Source
from metrics.registry import METRICS, Metric
from models.registry import BACKBONES, BackboneSpec
from sampling.registry import ALIASES, SAMPLERS
from utils import ADDED, CONFIGS, ConfigError, choices_of, first_line, imported

C = TypeVar("C", bound=type[Any])
S = TypeVar("S", bound=Source)
M = TypeVar("M", bound=Metric)

# ---------------------------------------------------------------- importing them

# Where a run's first process has found its plug-ins: others may begin elsewhere.
FOLDER = "DUO_PLUGINS_FOLDER"


def import_named(words: Iterable[str], folder: str) -> None:
    """Imports the plug-ins of a command line, before there is a config.

    Args:
        words: KEY=VALUE of the command line.
        folder: Where the command was given, in which modules are found, too.

    Raises:
        ConfigError: As `import_plugins`.
    """
    for word in words:
        key, _, _ = word.lstrip("+").partition("=")
        if key == "plugins":
            import_plugins(_value(word), folder)


def _value(word: str) -> Any:
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException:
        return ()  # Hydra says it better
    if override.is_sweep_override():
        raise ConfigError(
            f"{word}: plug-ins are those of the whole sweep; give a list in brackets."
        )
    return override.value()


def import_plugins(names: Any, folder: str) -> None:
    """Imports plug-ins, once in a process.

    Args:
        names: The value of `plugins`: names of modules, or one.
        folder: In which modules are found, after all other places of Python's.

    Raises:
        ConfigError: If one cannot be found or imported, in one line.
    """
    if isinstance(names, str):
        names = [names]
    if not isinstance(names, list | ListConfig | tuple):
        raise ConfigError(f"plugins={names!r} is no list of modules: plugins=[NAME].")
    if names:
        folders = [os.path.realpath(folder), os.environ.get(FOLDER, "")]
        sys.path += [x for x in folders if x and x not in sys.path]
        os.environ.setdefault(FOLDER, folders[0])
    for name in names:
        _import(name, folder)


def _import(name: Any, folder: str) -> None:
    where = f"plugins=[{name}]"
    if not isinstance(name, str) or not all(x.isidentifier() for x in name.split(".")):
        raise ConfigError(
            f"{where}: {name!r} is no name of a module; give that of a file of this "
            "folder without its .py, or of an installed module."
        )
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if not f"{name}.".startswith(f"{missing}."):
            raise _failed(where, error) from None
        raise ConfigError(
            f"{where}: there is no module {missing} in {folder}, nor anywhere else on "
            f"Python's path; {_cure(name)}."
        ) from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except (Exception, SystemExit) as error:
        raise _failed(where, error) from error
    first = Path(folder, *name.split("."))
    own = [x for x in (first.with_suffix(".py"), first / "__init__.py") if x.exists()]
    found = getattr(module, "__file__", None)
    if own and not (found and any(os.path.samefile(found, x) for x in own)):
        raise ConfigError(
            f"{where}: the name is taken, by {found or 'a module of Python'}, so "
            f"{own[0]} is not found; give that file another name."
        )


def _cure(name: str) -> str:
    if name.endswith(".py"):
        return f"give the name without .py: plugins=[{name.removesuffix('.py')}]"
    return "go to its folder, or name that in PYTHONPATH"


def _failed(where: str, error: BaseException) -> ConfigError:
    """What went wrong in a module, with the last line of the user's own."""
    at = ""
    frames = traceback.extract_tb(error.__traceback__)
    own = [x for x in frames if not x.filename.startswith(("<frozen", __file__))]
    own = [x for x in own if importlib.__file__ != x.filename]
    if own and not isinstance(error, SyntaxError):  # which says it by itself
        at = f" ({own[-1].filename}, line {own[-1].lineno})"
    reason = first_line(error)
    return ConfigError(
        f"{where} cannot be imported: {type(error).__name__}: {reason}{at}."
    )


# ---------------------------------------------------------------- what they bring


def backbone(name: str, **settings: Any) -> Callable[[C], C]:
    """Enters a class of networks: `algo.backbone=NAME model=NAME`.

    The class has what `models.registry.Backbone` asks for; `models.network.Network` is
    its base, but for `from_config` and `trunk`.

    Args:
        name: Of the class on the command line.
        settings: Keys of `model` with their defaults; `length` is 1024 unless given.
    """

    def enter(network: C) -> C:
        base = imported("models.network.Network")
        lacking = [x for x in ("from_config", "trunk") if _lacks(network, x, base)]
        if not issubclass(network, base) or lacking:
            need = " and ".join(lacking) if issubclass(network, base) else base.__name__
            raise ConfigError(
                f"backbone {name!r}: {network.__name__} lacks {need}; derive it from "
                "models.network.Network, with from_config and trunk."
            )
        node = {"name": name, "type": name, "length": 1024} | settings
        spec = BackboneSpec(network, name)
        _enter("backbone", BACKBONES, name, spec, "model", node)
        return network

    return enter


def _lacks(network: type[Any], method: str, base: type[Any]) -> bool:
    """Whether a method is not there, or is the base's, which does nothing."""
    ours, bases = (inspect.getattr_static(x, method, None) for x in (network, base))
    return ours is None or ours is bases


def dataset(name: str, **settings: Any) -> Callable[[S], S]:
    """Enters a function that gives texts (`data.registry.Source`): `data=NAME`.

    Args:
        name: Of the data set, for training and validation.
        settings: Keys of `data` with their defaults, its own or common ones such as
            tokenizer_name_or_path.
    """

    def enter(source: S) -> S:
        def load(config: DictConfig, tokenizer: Any, split: str) -> Any:
            rows_of = imported("data.loading.load_source")
            return rows_of(source, config, tokenizer, split)

        node = _extending("_base", {"train": name} | settings)
        spec = DatasetSpec(load, has_rows=False)
        _enter("data set", DATASETS, name, spec, "data", node)
        return source

    return enter


def sampler(name: str, **settings: Any) -> Callable[[C], C]:
    """Enters a subclass of `sampling.sampler.Sampler`: `sampling.predictor=NAME`.

    Args:
        name: Of the sampler.
        settings: Keys of `sampling.NAME` with their defaults.
    """

    def enter(kind: C) -> C:
        _derived(kind, "sampling.sampler.Sampler", f"sampler {name!r}")
        is_known = settings and f"sampling.{name}" in known_keys()
        is_own = name in ADDED.get("sampling", {})
        if name in ALIASES or (is_known and not is_own):
            raise _taken("sampler or key sampling.", name)
        _enter("sampler", SAMPLERS, name, (kind,), "sampling", settings or None)
        return kind

    return enter


def schedule(name: str, **settings: Any) -> Callable[[C], C]:
    """Enters a subclass of `models.noise.Noise`: `noise=NAME`.

    Args:
        name: Of the schedule.
        settings: Keys of `noise` with their defaults, by names of the arguments of its
            constructor; those with a default of their own need not be named.
    """

    def enter(kind: C) -> C:
        _derived(kind, "models.noise.Noise", f"schedule {name!r}")
        node: dict[str, Any] = {"type": name}
        for key, parameter in inspect.signature(kind).parameters.items():
            value = settings.get(key, parameter.default)
            if value is parameter.empty:
                raise ConfigError(
                    f"schedule {name!r}: {key} of {kind.__name__} has no default; "
                    "give it one, there or as a setting."
                )
            node[key] = value
        if unknown := sorted(settings.keys() - node.keys()):
            raise ConfigError(
                f"schedule {name!r}: {kind.__name__} has no argument {unknown[0]!r}."
            )
        schedules = imported("models.noise.SCHEDULES")
        _enter("schedule", schedules, name, kind, "noise", node)
        return kind

    return enter


def algorithm(name: str, extends: str, **settings: Any) -> Callable[[C], C]:
    """Enters a subclass of an algorithm: `algo=NAME`.

    Args:
        name: Of the algorithm.
        extends: The algorithm, of `configs/algo/` or a plug-in, whose settings it has.
        settings: Keys of `algo` with their defaults, where they are other ones.
    """

    def enter(kind: C) -> C:
        _derived(kind, "trainer_base.TrainerBase", f"algorithm {name!r}")
        if extends not in choices_of("algo"):
            raise ConfigError(
                f"algorithm {name!r}: extends={extends!r} is none of "
                f"{', '.join(choices_of('algo'))}."
            )
        target = f"{kind.__module__}.{kind.__qualname__}"
        node = _extending(extends, {"_target_": target, "name": name} | settings)
        _enter("algorithm", {}, name, kind, "algo", node)
        return kind

    return enter


def metric(name: str) -> Callable[[M], M]:
    """Enters a function that gives a number of each sample (`metrics.registry.Metric`).

    It is measured wherever samples are, under its name.
    """

    def enter(function: M) -> M:
        if not name.isidentifier() or name in MEASURED:
            raise ConfigError(
                f"metric {name!r}: give a name of letters, digits and _ that no other "
                "number of samples has."
            )
        _enter("metric", METRICS, name, function)
        return function

    return enter


# Other names in the JSON of samples.
MEASURED = (
    *("nll", "num_tokens", "generative_ppl", "entropy", "distinct_1", "distinct_2"),
    *("distinct_3", "evaluations", "ngram_ppl", "ngram_nll", "mauve", "num_samples"),
    *("samples_per_second", "seconds", "devices", "generated_seqs", "complete"),
    *("checkpoint", "settings", "labels", "prompts", "sequence_lengths", "gen_ppl"),
    *("data", "draws", "held_out", "images", "picture"),
)

_ENTERED: dict[tuple[str, str], Any] = {}  # by plug-ins, which may enter theirs again


def _enter(
    kind: str,
    table: dict[str, Any],
    name: str,
    entry: Any,
    group: str = "",
    node: dict[str, Any] | None = None,
) -> None:
    """Puts something into its table and, with a group, into the config.

    Args:
        kind: What it is called in messages.
        table: Of its kind.
        name: On the command line.
        entry: Of the table.
        group: Of the config.
        node: What a file `configs/GROUP/NAME.yaml` would hold.
    """
    is_another = name in table and _ENTERED.get((kind, name)) is not table[name]
    if is_another or (CONFIGS / group / f"{name}.yaml").exists():
        raise _taken(kind, name)
    if node is not None:
        try:
            OmegaConf.create(node)
        except ValueError as error:
            raise ConfigError(f"{kind} {name!r}: {first_line(error)}") from None
        ADDED.setdefault(group, {})[name] = node
        if group != "sampling":  # which is no group; see `with_settings`
            ConfigStore.instance().store(name=name, node=node, group=group)
        forget()
    table[name] = _ENTERED[kind, name] = entry


def as_added(word: str) -> str:
    """KEY=VALUE of a sampler's setting as Hydra wants a key that no file has."""
    name = word.partition("=")[0].partition(".")[2].partition(".")[0]
    is_own = word.startswith("sampling.") and name in ADDED.get("sampling", {})
    return f"+{word}" if is_own else word


def with_settings(config: DictConfig) -> None:
    """Gives a config the settings of samplers, where it has none yet."""
    for name, settings in ADDED.get("sampling", {}).items():
        given = OmegaConf.select(config, f"sampling.{name}") or {}
        node = OmegaConf.merge(settings, given)
        OmegaConf.update(config, f"sampling.{name}", node, force_add=True)


def _extending(base: str, content: dict[str, Any]) -> dict[str, Any]:
    return {"defaults": [base, "_self_"]} | content


def _taken(kind: str, name: str) -> ConfigError:
    return ConfigError(f"there is a {kind} {name!r} already; give another name.")


def _derived(kind: type[Any], base: str, what: str) -> None:
    if not issubclass(kind, imported(base)):
        raise ConfigError(f"{what}: {kind.__name__} does not derive from {base}.")
