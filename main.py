"""Entry point: compose the config, check it, do what `mode` says.

    python main.py mode=train|ppl_eval|sample_eval|... key=value ...

A mistake of the user's ends with one line and exit status 2, before any heavy work;
anything else that raises is a fault of the code and keeps its traceback.

Only Hydra and the config are imported here. What a mode needs is imported when it
runs, so that a mistake, `--help` and `--cfg job` do not wait for torch.
"""

import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cli.again import command_again
from cli.checks import check, refuse_two_lengths
from cli.commandline import arguments, explain, find_inputs, missing_key, no_choice
from cli.environment import print_plainly, share_cores, tell_nobody
from cli.known_keys import refuse_unread
from cli.paths import (
    DRAWING,
    check_writable,
    no_folder,
    not_permitted,
    permission_line,
    place_outputs,
    refuse_finished,
    refuse_shared,
    unusable,
)
from cli.plugins import import_named, import_plugins, with_settings
from cli.quiet import keep_quiet, show_once
from cli.signals import ending_on_signals, was_left_alone, what_is_kept
from cli.stated import take_over_as_given, take_over_from
from report.sweep import REFUSED, is_sweep
from utils import (
    CONFIGS,
    ConfigError,
    NotFinite,
    RunStopped,
    SignalReceived,
    choose,
    fail,
    first_line,
    imported,
    one_line,
    register_resolvers,
    stopped_by,
)

if TYPE_CHECKING:
    from training.agreement import Agreement

LESS_MEMORY = (
    "This is out of memory: lower loader.batch_size, loader.eval_batch_size, or the "
    "size of the model."
)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# ---------------------------------------------------------------- modes


def train(config: DictConfig) -> dict[str, Any]:
    """Trains, resuming from `checkpointing.resume_ckpt_path` if it exists."""
    from training.agreement import Agreement
    from training.holding import holding
    from training.processes import is_first

    agreement = Agreement(config)
    with ExitStack() as stack:
        if is_first(config):
            folder = config.checkpointing.save_dir
            with agreement.collecting():
                stack.enter_context(holding(folder, "checkpointing.save_dir"))
        return _train(config, agreement)


def _train(config: DictConfig, agreement: "Agreement") -> dict[str, float]:
    from lightning.pytorch.callbacks import LearningRateMonitor

    from checkpoints.reading import read_checkpoint
    from cli.settle import prepare
    from data.marks import tokenizer_mark
    from data.tokenizers import get_tokenizer
    from dataloader import DataModule, check_limit
    from evaluation.likelihood import report_likelihood
    from evaluation.samples import load_judge
    from models.flops import compute_of
    from report.compute import report_compute, save_compute
    from report.console import report_files, report_samples
    from report.grid import write_grid
    from training.callbacks import CheckpointFiles, RunEnd, without_missing
    from training.identity import refuse_other_data, refuse_other_settings
    from training.loggers import build_loggers
    from training.resume import KEY, check_state, find_checkpoint, with_all_it_needs
    from training.sample_logging import SampleLogging
    from training.trainer import build_trainer

    algorithm = prepare(config)
    finetune = config.training.finetune_path
    trusted = tuple(config.checkpointing.trusted_classes)
    resumed = weights = None
    with agreement.collecting():
        resumed = find_checkpoint(config)
        if algorithm.needs_weights and not (finetune or resumed):
            raise ConfigError(
                f"training.finetune_path is empty: algo={config.algo.name} starts from "
                "a trained checkpoint."
            )
        if resumed:
            refuse_other_settings(resumed, config)
        if finetune:
            weights = read_checkpoint(finetune, "training.finetune_path", trusted)
    tokenizer = get_tokenizer(config)
    model = algorithm(config, tokenizer)  # first: it may refuse the vocabulary
    with agreement.collecting():
        if weights:
            model.load_weights(weights, "training.finetune_path")
        if resumed:
            resumed = with_all_it_needs(resumed, model)
            model.check_weights(resumed.checkpoint, KEY)
            check_state(resumed, model)
    compute = None
    if config.training.flops is not None:
        compute = compute_of(config, model.backbone, algorithm.passes(config))
        report_compute(config, compute)
    data = DataModule(config, tokenizer, model.mask_index)
    marks = {
        "tokenizer": tokenizer_mark(tokenizer),
        "train": data.load_training().mark(),
        "valid": data.load("valid").mark(),
    }
    check_limit(config, len(data.load("valid")))
    with agreement.collecting():
        if resumed:
            refuse_other_data(resumed, config, marks)
    agreement.begin(resumed, marks)
    is_judged = config.eval.compute_generative_perplexity
    judge = load_judge(config, algorithm) if is_judged else None
    samples = SampleLogging(judge, write_grid)
    loggers = build_loggers(config)
    chosen = OmegaConf.select(config, "callbacks", default={})  # of callbacks=[]
    callbacks = [hydra.utils.instantiate(node) for node in chosen.values()]
    if not loggers:  # this callback refuses to run without one
        callbacks = [c for c in callbacks if not isinstance(c, LearningRateMonitor)]
    callbacks = without_missing(callbacks, algorithm.bound)
    last = f"{config.checkpointing.save_dir}/checkpoints/last.ckpt"
    trainer = build_trainer(
        config,
        callbacks=[samples, *callbacks, RunEnd(last), agreement],
        logger=loggers,
        plugins=[CheckpointFiles(resumed, trusted)],
    )
    path = None if resumed is None else resumed.path
    del resumed  # the trainer has it until it has read it
    trainer.fit(model, datamodule=data, ckpt_path=path, weights_only=True)
    if model.global_step and not model.is_validated:  # a finished run that goes on
        model.validation_due = True
        trainer.validate(model, datamodule=data, verbose=False)
    results = report_likelihood(config, model, data)
    if compute is not None:
        save_compute(config, compute, results)
    report_samples(samples.texts[: config.sampling.num_sample_log])
    report_files(config, trainer)
    return results


def prepare_data(config: DictConfig) -> dict[str, Any]:
    """Packs the data set's splits into the cache and prints their fingerprints."""
    from cli.settle import prepare
    from data.registry import packed_splits
    from data.tokenizers import get_tokenizer
    from dataloader import DataModule
    from report.console import report_lines

    prepare(config)
    data = DataModule(config, get_tokenizer(config), mask_index=None)
    lines = {
        split: f"{config.data[split]}: {data.load(split).fingerprint().line()}"
        for split in packed_splits(config)
    }
    report_lines(lines)
    return lines


def inspect(config: DictConfig) -> dict[str, str]:
    """Prints what a checkpoint is, and the commands for it; builds nothing."""
    from checkpoints.about import describe, describe_network
    from checkpoints.reading import read_evaluated
    from cli.uses import commands
    from report.console import report_lines, say

    path, checkpoint = config.eval.checkpoint_path, read_evaluated(config)
    lines = {**describe(checkpoint), **describe_network(checkpoint)}
    report_lines({"file": str(path), **lines})
    for line in commands(checkpoint, str(path), config.plugins):
        say(line)
    return lines


def export_folder(config: DictConfig) -> dict[str, str]:
    """Writes a checkpoint as a Hugging Face folder."""
    from checkpoints.export import export
    from cli.settle import algorithm_class
    from report.console import report_lines

    lines = export(config, algorithm_class)
    report_lines(lines)
    return lines


def of_module(path: str) -> Callable[[DictConfig], Any]:
    """A mode that is a function, whose module is imported when it runs."""
    return lambda config: imported(path)(config)


MODES: dict[str, Callable[[DictConfig], Any]] = {
    "train": train,
    "ppl_eval": of_module("evaluation.likelihood.ppl_eval"),
    "sample_eval": of_module("evaluation.samples.sample_eval"),
    "fid_eval": of_module("evaluation.images.fid_eval"),
    "prepare_data": prepare_data,
    "inspect": inspect,
    "export": export_folder,
    "report": of_module("report.mode.report"),
    "view": of_module("report.view.view"),
}
WITHOUT_TORCH = ("view",)  # modes


# ---------------------------------------------------------------- entry point


def carry_out(
    config: DictConfig, folder: str, words: Sequence[str] | None = None
) -> dict[str, Any] | None:
    """Completes and checks a composed config, and does what its mode says.

    Args:
        config: Changed in place.
        folder: Where the command was given; what a run writes goes to the one where it
            is called.
        words: KEY=VALUE of which it was composed; None: those of Hydra's job.

    Raises:
        ConfigError: With one line about a mistake of the user's.
    """
    hydra = HydraConfig.get() if HydraConfig.initialized() else None
    import_plugins(config.plugins, folder)
    with_settings(config)
    mode = choose(MODES, config.mode, "mode")
    place_outputs(config, folder)
    find_inputs(config, folder)
    if hydra is not None and is_sweep(hydra):
        refuse_shared(config, hydra.job.num)
    refuse_unread(config)
    if config.mode in DRAWING:
        refuse_finished(config.eval.generated_samples_path)
    if words is None:
        take_over_as_given(config)
    else:
        take_over_from(config, words)
    task = list(hydra.overrides.task) if words is None and hydra is not None else words
    refuse_two_lengths(config, task or ())
    check(config)
    check_writable(config)
    if config.mode in WITHOUT_TORCH:
        return mode(config)
    settle = imported("cli.settle.settle")  # from here on with torch
    if hydra is not None:
        show_once()
    settle(config)
    return mode(config)


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")
def run(config: DictConfig) -> dict[str, Any] | None:
    """One job; what it returns is for the summary of a sweep."""
    try:
        is_job = HydraConfig.initialized()
        folder = HydraConfig.get().runtime.cwd if is_job else os.getcwd()
        return carry_out(config, folder)
    except RunStopped as error:
        if isinstance(error, NotFinite) and _is_first():
            return _refused(str(error), error.status)
        return _stopped(f"{error}{_again(config, error.can_go_on)}", error.status)
    except SignalReceived as error:
        if error.number == signal.SIGUSR1:
            imported("training.callbacks.requeue")()
        end = stopped_by(error, what_is_kept(config.mode))
        return _stopped(f"{end}{_again(config, True)}", end.status)
    except (MemoryError, RuntimeError) as error:
        if _is_out_of_memory(error):
            return fail(f"{first_line(error)}. {LESS_MEMORY}", 1)
        trainer = config.trainer
        processes = trainer.devices * trainer.num_nodes
        if isinstance(error, MemoryError) or not was_left_alone(error, processes):
            raise
        line = imported("training.lifelines.LEFT_ALONE")
        is_told = imported("training.processes.is_first_of_node")()
        return _stopped(f"{line}{_again(config, True)}", 1, is_told)
    except OSError as error:
        if refusal := not_permitted(error) or unusable(error, config):
            return _refused(permission_line(refusal, config))
        if error.errno not in NO_SPACE:
            raise
        there = "Checkpoints that were written are as they were"
        return fail(f"{error}. {there}{_again(config, True)}", 1)
    except (ConfigError, OmegaConfBaseException) as error:
        return _refused(missing_key(error) or str(error))


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether there was not as much memory as was asked for, by Python or torch."""
    is_torchs = "allocate memory" in str(error) or "out of memory" in str(error)
    return isinstance(error, MemoryError) or is_torchs


def _stopped(line: str, status: int, is_told: bool | None = None) -> NoReturn:
    """What a run ends with that has several processes; the first one says it.

    Args:
        line: What it says.
        status: Of the process.
        is_told: Whether this one does; None: if it is the first.
    """
    if not (_is_first() if is_told is None else is_told):
        sys.exit(status)
    fail(line, status)


def _is_first() -> bool:
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    return not getattr(rank_zero_only, "rank", 0)


def _refused(line: str, status: int = 2) -> dict[str, str]:
    """What a mistake ends with: this process, or one job of a sweep."""
    if HydraConfig.initialized() and is_sweep(HydraConfig.get()):
        return {REFUSED: one_line(line)}  # the other jobs go on
    return fail(line, status)


def _again(config: DictConfig, can_go_on: bool) -> str:
    """The end of a line that says how a stopped run goes on."""
    command = command_again(config) if can_go_on else ""
    where = " on every node, by what started it" if config.trainer.num_nodes > 1 else ""
    return f". The command that goes on{where}: {command}" if command else ""


def main() -> Any:
    """The command line: what every job of it shares, then the jobs."""
    share_cores()
    tell_nobody()
    keep_quiet()
    print_plainly()
    register_resolvers()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # lets errors reach us
    try:
        import_named(sys.argv[1:], os.getcwd())
        sys.argv[1:] = arguments(sys.argv[1:])
        with ending_on_signals():
            return run()
    except ConfigError as error:  # of the words, before there was a config
        return fail(str(error))
    except SignalReceived as error:  # before there was a config
        end = stopped_by(error, "nothing was begun")
        return fail(str(end), end.status)
    except HydraException as error:
        return fail(explain(error))
    except (OSError, ValueError) as error:  # Hydra makes the folder of a run
        for explained in (no_choice, no_folder):
            if line := explained(sys.argv[1:], error):
                return fail(line)
        if refusal := not_permitted(error):
            return fail(permission_line(refusal))
        raise


if __name__ == "__main__":
    main()
