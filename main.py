"""Entry point: compose the config, check it, do what `mode` says.

    python main.py mode=train|ppl_eval|sample_eval|... key=value ...

A mistake of the user's ends with one line and exit status 2, before any heavy work;
anything else that raises is a fault of the code and keeps its traceback.
"""

import errno
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from lightning.pytorch.callbacks import LearningRateMonitor, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import export
import report
import resume
import sweep
from algo import algorithm_class
from checkpoints import adopt_network, describe, read_checkpoint
from checks import check_batches, check_devices, check_values
from corpora import find_files, read_texts
from dataloader import DataModule
from display import (
    report_config,
    report_files,
    report_likelihood,
    report_lines,
    report_samples,
    report_sampling,
)
from evaluations import check_path, origin
from generation import Drawing, SampleFile, settings_of, summarise, without_marks
from metrics import GenerativePerplexity, mauve_score, require_mauve
from models import validate_backbone
from ngrams import NGramModel
from prompts import check_prompts, read_prompts
from samplers import build_sampler
from saving import CheckpointFiles, RunEnd
from tokenization import get_tokenizer
from trainer_base import TrainerBase
from utils import (
    ConfigError,
    RunStopped,
    choose,
    did_you_mean,
    fail,
    find_inputs,
    hydra_quoted,
    keep_freed_memory,
    one_line,
    register_resolvers,
    require,
    unknown_value,
    uses_cuda,
)

log = logging.getLogger(__name__)

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# ---------------------------------------------------------------- modes


def train(config: DictConfig) -> dict[str, float]:
    """Trains, resuming from `checkpointing.resume_ckpt_path` if it exists."""
    algorithm = prepare(config, splits=("train", "valid"))
    finetune = config.training.finetune_path
    resumed = resume.find_checkpoint(config)
    if algorithm.needs_weights and not (finetune or resumed):
        raise ConfigError(
            f"training.finetune_path is empty: algo={config.algo.name} starts from a "
            "trained checkpoint."
        )
    trusted = tuple(config.checkpointing.trusted_classes)
    if finetune:
        weights = read_checkpoint(finetune, "training.finetune_path", trusted)
    tokenizer = get_tokenizer(config)
    model = algorithm(config, tokenizer)  # first: it may refuse the vocabulary
    if finetune:
        model.load_weights(weights, "training.finetune_path")
    if resumed:
        model.check_weights(resumed.checkpoint, resume.KEY)
    data = DataModule(config, tokenizer, model.mask_index)
    data.load_training()
    data.load("valid")
    if config.eval.compute_generative_perplexity:
        model.judge = load_judge(config, algorithm)
    loggers = build_loggers(config)
    callbacks = [hydra.utils.instantiate(c) for c in config.callbacks.values()]
    if not loggers:  # this callback refuses to run without one
        callbacks = [c for c in callbacks if not isinstance(c, LearningRateMonitor)]
    last = f"{config.checkpointing.save_dir}/checkpoints/last.ckpt"
    trainer = build_trainer(
        config,
        callbacks=[*callbacks, RunEnd(last)],
        logger=loggers,
        plugins=[CheckpointFiles(resumed, trusted)],
    )
    path = None if resumed is None else resumed.path
    del resumed  # the trainer has it until it has read it
    trainer.fit(model, datamodule=data, ckpt_path=path, weights_only=True)
    if model.validation_due:  # the run was stopped in its last one
        trainer.validate(model, datamodule=data, verbose=False)
    report_likelihood(config, model, data)
    report_samples(model.valid_texts[: config.sampling.num_sample_log])
    report_files(config, trainer)
    return model.valid_results


def ppl_eval(config: DictConfig) -> dict[str, float]:
    """Prints val/nll, val/bpd and val/ppl of a checkpoint, with standard errors, and
    writes them to `eval.results_path`."""
    algorithm = prepare(config, splits=("valid",))
    check_path(config.eval.results_path, "eval.results_path")
    checkpoint = read_evaluated(config)
    tokenizer = get_tokenizer(config)
    model = algorithm(config, tokenizer)
    model.load_weights(checkpoint, "eval.checkpoint_path")
    data = DataModule(config, tokenizer, model.mask_index)
    data.load("valid")
    trainer = build_trainer(config, callbacks=[], logger=build_loggers(config))
    trainer.validate(model, datamodule=data, verbose=False)
    report_likelihood(config, model, data, checkpoint)
    return model.valid_results


def sample_eval(config: DictConfig) -> dict[str, Any]:
    """Draws samples from a checkpoint, judges them, writes them as JSON."""
    order = config.eval.ngram_order
    algorithm = prepare(config, splits=("train",) if order else ())
    file = SampleFile(config.eval.generated_samples_path, settings_of(config))
    if num_done := file.check():
        log.info("going on with %s: %d batches are there", file.path, num_done)
    checkpoint = read_evaluated(config)
    references = mauve_references(config)
    judge = load_judge(config, algorithm)
    tokenizer = get_tokenizer(config)
    model = algorithm(config, tokenizer)
    model.load_weights(checkpoint, "eval.checkpoint_path")
    prompts = read_prompts(config, tokenizer, model.sampler.length(model.num_tokens))
    ngrams = None
    if order:
        rows = DataModule(config, tokenizer, model.mask_index).load("train").ids
        ngrams = NGramModel(rows, order, model.vocab_size)
    drawing = Drawing(model, file, judge, prompts, ngrams)
    trainer = build_trainer(config, callbacks=[], logger=[])
    log.info("categorical draws in %s", model.sampler.draw_dtype(device_of(config)))
    file.begin()
    try:
        with model.eval_weights():
            trainer.predict(drawing, return_predictions=False)
    except BaseException:
        file.interrupt()
        raise
    trainer.strategy.barrier()  # every rank's batches are there
    about = origin(config, checkpoint, model.ema is not None)
    return finish_samples(drawing, references, about)


@rank_zero_only
def finish_samples(
    drawing: Drawing, references: list[str], about: dict[str, Any]
) -> dict[str, Any]:
    """The whole JSON, `about` the checkpoint included, and a report of it."""
    file, judge, config = drawing.file, drawing.judge, drawing.model.config
    batches = file.batches()
    texts = [text for batch in batches for text in batch["generated_seqs"]]
    results = summarise(batches)
    if references and judge is not None:
        file.write({"complete": False})  # before what may take long
        plain = [without_marks(text, drawing.model.tokenizer) for text in texts]
        features = (judge.features(x) for x in (references, plain))
        results["mauve"] = mauve_score(*features, seed=config.seed)
    file.write(results | {"checkpoint": about, "complete": True})
    file.close()
    report_samples(texts[: config.sampling.num_sample_log])
    report_sampling(config, results)
    return results


def prepare_data(config: DictConfig) -> dict[str, Any]:
    """Packs the data set's splits into the cache and prints their fingerprints."""
    splits = DataModule.packed_splits(config)
    prepare(config, splits)
    data = DataModule(config, get_tokenizer(config), mask_index=None)
    lines = {
        split: f"{config.data[split]}: {data.load(split).fingerprint().line()}"
        for split in splits
    }
    report_lines(lines)
    return lines


def inspect(config: DictConfig) -> dict[str, str]:
    """Prints what a checkpoint is; builds nothing."""
    path = config.eval.checkpoint_path
    lines = describe(read_evaluated(config))
    report_lines({"file": str(path), **lines})
    return lines


def export_folder(config: DictConfig) -> dict[str, str]:
    """Writes a checkpoint as a Hugging Face folder."""
    lines = export.export(config)
    report_lines(lines)
    return lines


MODES = {
    "train": train,
    "ppl_eval": ppl_eval,
    "sample_eval": sample_eval,
    "prepare_data": prepare_data,
    "inspect": inspect,
    "export": export_folder,
    "report": report.report,
}


# ---------------------------------------------------------------- checks


def settle(config: DictConfig) -> None:
    """Completes, checks and resolves the config, in place, and seeds the process."""
    validate_backbone(config)
    adopt_network(config)
    check_values(config)
    OmegaConf.resolve(config)
    lightning.seed_everything(config.seed, workers=True, verbose=False)


def prepare(config: DictConfig, splits: tuple[str, ...]) -> type[TrainerBase]:
    """The algorithm's class, once everything that can be refused early has been.

    Args:
        config: The run's config; printed and saved if nothing is wrong with it.
        splits: Splits of the data that the mode reads.
    """
    algorithm = algorithm_class(config)
    algorithm.validate_config(config)
    DataModule.validate_config(config, splits)
    check_devices(config)
    check_batches(config)
    check_prompts(config, algorithm.is_autoregressive)
    logger_names(config)
    report_config(config)
    return algorithm


# ---------------------------------------------------------------- building blocks


def read_evaluated(config: DictConfig) -> dict[str, Any]:
    """The checkpoint that `eval.checkpoint_path` names."""
    trusted = config.checkpointing.trusted_classes
    return read_checkpoint(config.eval.checkpoint_path, "eval.checkpoint_path", trusted)


def build_trainer(
    config: DictConfig,
    *,
    callbacks: list[lightning.Callback],
    logger: list[Logger],
    plugins: Sequence[Any] = (),
) -> lightning.Trainer:
    """The Lightning trainer of every mode."""
    alone = config.trainer.devices * config.trainer.num_nodes == 1
    if alone and config.strategy._target_.endswith(".DDPStrategy"):
        strategy = "auto"  # one process needs no process group; Apple GPUs have none
    else:
        strategy = hydra.utils.instantiate(config.strategy)
    precision = str(config.trainer.precision)
    if config.trainer.get("enable_progress_bar", True):
        callbacks = [*callbacks, ProgressBar(refresh_rate=10)]
    if SLURMEnvironment.detect():  # RunEnd does what its own handlers would
        plugins = [*plugins, SLURMEnvironment(auto_requeue=False)]
    every = config.trainer.val_check_interval
    if type(every) is int and config.trainer.check_val_every_n_epoch is None:
        every *= config.trainer.accumulate_grad_batches  # Lightning counts batches
    return hydra.utils.instantiate(
        config.trainer,
        plugins=list(plugins),
        val_check_interval=every,
        precision={"bf16": "bf16-mixed", "16": "16-mixed"}.get(precision, precision),
        default_root_dir=os.getcwd(),
        strategy=strategy,
        callbacks=callbacks,
        logger=logger,
        use_distributed_sampler=False,
        _convert_="all",
    )


class ProgressBar(TQDMProgressBar):
    """Ends where the run does, also where its epoch has no end."""

    @property
    def total_train_batches(self) -> int | float:
        trainer = self.trainer
        if trainer.max_steps < 0:
            return super().total_train_batches
        of_run = trainer.max_steps * trainer.accumulate_grad_batches
        return min(super().total_train_batches, of_run)


def build_loggers(config: DictConfig) -> list[Logger]:
    """The loggers that `logger` and the command line ask for."""
    return [LOGGERS[name](config) for name in logger_names(config)]


def logger_names(config: DictConfig) -> list[str]:
    """Names of `logger`; giving any wandb key on the command line adds wandb."""
    names = config.logger if isinstance(config.logger, ListConfig) else [config.logger]
    names = [name for name in names if name not in (None, "none")]
    for name in names:
        require(name, LOGGERS, "logger")
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    asked = any(re.match(r"\+*wandb\.", override) for override in overrides)
    return names + ["wandb"] * (asked and "wandb" not in names)


def csv_logger(config: DictConfig) -> Logger:
    """CSV files under `checkpointing.save_dir`/csv."""
    return CSVLogger(config.checkpointing.save_dir, name="csv")


def wandb_logger(config: DictConfig) -> Logger:
    """Weights & Biases; offline if asked to, or if this machine has no account."""
    import wandb

    settings = OmegaConf.to_container(config.wandb, resolve=True)
    if settings["name"] is None:  # the default id is made from the name
        settings["id"] = None
    offline = settings.pop("offline", False)
    if not offline and "WANDB_MODE" not in os.environ and not wandb.api.api_key:
        log.info("no wandb account on this machine: logging offline")
        offline = True
    return WandbLogger(
        save_dir=config.checkpointing.save_dir,
        config=OmegaConf.to_container(config, resolve=True),
        offline=offline,
        **settings,
    )


LOGGERS = {"csv": csv_logger, "wandb": wandb_logger}


def load_judge(
    config: DictConfig, algorithm: type[TrainerBase]
) -> GenerativePerplexity | None:
    """The model that scores samples, or None where it is off or cannot be had.

    Raises:
        ConfigError: If it cannot be had, but is asked for: by
            `eval.compute_generative_perplexity` or `eval.mauve_references`.
    """
    name = config.eval.gen_ppl_eval_model_name_or_path
    if name is None:
        return None
    try:
        return GenerativePerplexity(
            name,
            batch_size=config.eval.perplexity_batch_size,
            max_length=build_sampler(config, algorithm).length(config.model.length),
            device=device_of(config),
        )
    except ConfigError as error:
        wanted = config.eval.mauve_references is not None
        if wanted or config.eval.compute_generative_perplexity:
            raise
        log.warning("%s Going on without it.", error)
        return None


def mauve_references(config: DictConfig) -> list[str]:
    """Texts of `eval.mauve_references`; none if it is not set."""
    path, key = config.eval.mauve_references, "eval.mauve_references"
    if path is None:
        return []
    if config.eval.gen_ppl_eval_model_name_or_path is None:
        raise ConfigError(
            f"{key}={path!r} needs eval.gen_ppl_eval_model_name_or_path, whose hidden "
            "states are compared."
        )
    require_mauve()
    texts = read_texts(find_files(path, key), key, "text", config.data.cache_dir)
    if ".txt" in Path(path).suffixes:  # one a line
        texts = [line for text in texts for line in text.splitlines() if line.strip()]
    return texts


def device_of(config: DictConfig) -> torch.device:
    """The device of `trainer.accelerator` for work outside of a trainer."""
    accelerator = config.trainer.accelerator
    if uses_cuda(accelerator):
        return torch.device("cuda")
    apple = accelerator in ("auto", "mps") and torch.backends.mps.is_available()
    return torch.device("mps" if apple else "cpu")


# ---------------------------------------------------------------- entry point


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
def run(config: DictConfig) -> dict[str, Any] | None:
    """One job; what it returns is for the summary of a sweep."""
    try:
        mode = choose(MODES, config.mode, "mode")
        is_job = HydraConfig.initialized()
        find_inputs(config, HydraConfig.get().runtime.cwd if is_job else os.getcwd())
        settle(config)
        return mode(config)
    except RunStopped as error:
        if rank_zero_only.rank:  # one rank says it
            sys.exit(error.status)
        return fail(str(error), error.status)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        return fail(f"{error}. Checkpoints that were written are as they were.", 1)
    except (ConfigError, OmegaConfBaseException) as error:
        if HydraConfig.initialized() and sweep.is_sweep(HydraConfig.get()):
            return {sweep.REFUSED: one_line(str(error))}  # the other jobs go on
        return fail(str(error))


def explain(error: HydraException) -> str:
    """Hydra's complaint about the command line as one line with the choices."""
    configs = Path(__file__).parent / "configs"
    if found := re.search(r"Could not find '([^']+)/([^'/]+)'", str(error)):
        group, value = found.groups()
        names = (path.stem for path in (configs / group).glob("*.yaml"))
        choices = [name for name in names if not name.startswith("_")]
        return unknown_value(group, value, choices)
    if found := re.search(r"Could not override '([^']+)'", str(error)):
        key = found[1]
        known = config_keys(configs)
        if key in known:
            group = key.split(".")[0]
            return f"{key} is a key of another {group}=..., not of the chosen one."
        hint = did_you_mean(key, known)
        return f"Unknown key {key}.{hint} To add a new key, write +{key}=..."
    return str(error)


def config_keys(configs: Path) -> set[str]:
    """Every dotted key of every config file."""

    def dotted(prefix: str, node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            for key, value in node.items():
                yield from dotted(f"{prefix}.{key}" if prefix else str(key), value)
        yield prefix

    return {
        key
        for path in configs.rglob("*.yaml")
        for key in dotted(
            ".".join(path.parent.relative_to(configs).parts),
            OmegaConf.to_container(OmegaConf.load(path)),
        )
    }


_QUOTED = re.compile(r"""'([^'\\]|\\.)*'|"([^"\\]|\\.)*\"""")


def quoted(argument: str) -> str:
    """A prompt on the command line as Hydra wants it, so that it may hold anything."""
    key, is_pair, text = argument.partition("=")
    if not is_pair or key.lstrip("+") not in ("sampling.prompt", "sampling.infill"):
        return argument
    if text in ("null", "") or _QUOTED.fullmatch(text):
        return argument
    return f"{key}={hydra_quoted(text)}"


def arguments(argv: list[str]) -> list[str]:
    """The command line as Hydra wants it: a sweep's flag in front, prompts quoted."""
    flags = [argument for argument in argv if argument in ("-m", "--multirun")]
    rest = [argument for argument in argv if argument not in flags]
    return flags[:1] + [quoted(argument) for argument in rest]


def main() -> Any:
    sys.argv[1:] = arguments(sys.argv[1:])
    register_resolvers()
    keep_freed_memory()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # lets errors reach us
    try:
        return run()
    except HydraException as error:
        return fail(explain(error))


if __name__ == "__main__":
    main()
