"""What a notebook asks for, each in one call: `compose`, `train`, `load`, and of what
is loaded `sample`, `score`, `evaluate`.

Overrides are the words of the command line, such as "algo=mdlm". A mistake raises
`ConfigError` with the line that the command line would print.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from checkpoints.locating import checkpoint_in
from cli.commandline import composed
from cli.known_keys import known_keys, unknown_key
from cli.quiet import keep_quiet
from cli.values import check_kinds, check_values
from utils import ConfigError, hydra_quoted, imported, one_line

if TYPE_CHECKING:  # what needs torch is imported where it is used
    from evaluation.scoring import Bound
    from trainer_base import TrainerBase


def compose(*overrides: str) -> DictConfig:
    """The config that `python main.py OVERRIDES` would have, to look at.

    Args:
        overrides: KEY=VALUE each.

    Raises:
        ConfigError: If there is no such key or choice.
    """
    with _mistakes():
        return composed(list(overrides))


def train(*overrides: str, folder: str | Path = ".") -> dict[str, float]:
    """Trains as `python main.py OVERRIDES` does, in this process.

    Args:
        overrides: KEY=VALUE each; relative paths in them mean the current folder.
        folder: Where checkpoints, logs and samples go; made if it is not there.

    Returns:
        The numbers of the last validation; nothing if there was none.

    Raises:
        ConfigError: With one line about a mistake.
    """
    with _mistakes():
        return _carried_out([*overrides, "mode=train"], folder)


def load(path: str | Path, *overrides: str, device: str | None = None) -> Trained:
    """The model of a checkpoint: a file of ours or of the published code, the folder of
    a run, a Hugging Face folder or hub id.

    Args:
        path: Of the checkpoint.
        overrides: KEY=VALUE each, where the file does not say what it is, or the model
            is to be used in another way.
        device: "cpu", "cuda", "cuda:1", "mps"; None: a GPU where there is one.

    Raises:
        ConfigError: If it cannot be read, or is of a plug-in that `overrides` do not
            name.
    """
    from evaluation.harness import load_model, to_device

    path = str(path)
    with _mistakes():
        path = checkpoint_in(path, "checkpoint")
        if os.path.exists(path):
            path = os.path.abspath(path)
        model = load_model(path, list(overrides))
        to_device(model, device)
    return Trained(path, model, overrides)


class Trained:
    """A trained model: what `load` gives.

    Args:
        path: Of its checkpoint.
        model: With its weights, on its device.
        overrides: Those it was loaded with.

    Attributes:
        model: The algorithm's module, with `backbone`, `noise`, `tokenizer`.
        config: Its config, which is read only.
    """

    def __init__(self, path: str, model: TrainerBase, overrides: Iterable[str]) -> None:
        self.path = path
        self.model = model
        self.config: DictConfig = model.config
        self._overrides = list(overrides)

    @property
    def tokenizer(self) -> Any:
        """Between texts and ids."""
        return self.model.tokenizer

    def sample(
        self,
        num_samples: int = 1,
        *,
        prompts: Sequence[str] = (),
        infill: Sequence[str] = (),
        seed: int = 1,
        show_progress: bool = False,
        **sampling: Any,
    ) -> list[Any]:
        """Draws samples with the weights that an evaluation uses.

        Args:
            num_samples: How many; with prompts, of each of them.
            prompts: Texts that samples begin with.
            infill: Texts with gaps, "The [MASK:3] sat."; instead of prompts.
            seed: Of all that is drawn: the same one gives the same samples.
            show_progress: Whether to show a bar over the steps.
            sampling: Keys of `sampling` for this call: steps, predictor, p_nucleus,
                save_trajectory, ...

        Returns:
            Texts; of a model of images tensors of bytes (3, H, W).

        Raises:
            ConfigError: If a setting is unknown or has no meaning for this model.
        """
        from evaluation.trajectories import check_size, save_trajectories
        from report.page_paths import check_page_path
        from sampling.recording import Recorder
        from sampling.registry import build_sampler

        with _mistakes():
            if num_samples < 1:
                raise ConfigError(f"num_samples={num_samples!r} is not at least 1.")
            config = self._with(sampling)
            sampler = build_sampler(config, type(self.model))
            length = sampler.length(self.model.num_tokens)
            starts = self._starts(config, length, prompts, infill)
        starts = [x for x in starts for _ in range(num_samples)] or [None] * num_samples
        page = config.sampling.save_trajectory
        if page is not None:
            page = os.path.abspath(page)
            check_page_path(page, "sampling.save_trajectory")
            check_size(len(starts), length, "num_samples")
        size, samples, recorded = config.loader.eval_batch_size, [], []
        generator = self.model.generator("notebook", seed)
        usual, self.model.sampler = self.model.sampler, sampler
        try:
            with self.model.eval_weights():
                for index in range(0, len(starts), size):
                    rows = starts[index : index + size]
                    recorder = None if page is None else Recorder()
                    drawn = self.model.generate_samples(
                        len(rows),
                        generator,
                        given=self._given(rows, length),
                        show_progress=show_progress,
                        recorder=recorder,
                    )
                    recorded += recorder.trajectories() if recorder else []
                    ids = drawn.up_to_end(drawn.tokens.cpu())
                    samples += list(self.tokenizer.batch_decode(ids))
        finally:
            self.model.sampler = usual
        if page is not None:
            config.seed = seed
            save_trajectories(page, self.model, config, self.path, recorded)
        return samples

    def score(
        self, texts: Sequence[str], *, num_draws: int = 32, batch_size: int = 8
    ) -> list[Bound]:
        """Minus the log-likelihood of each text, in nats, with its error: `nll`,
        `stderr`, `num_tokens`, `ppl`.

        Of a diffusion model it is the bound, a mean over draws of times and noise that
        depend on `seed` and on the text alone; of algo=ar it is exact.

        Args:
            texts: Each is scored behind bos, long ones in windows of `model.length`.
            num_draws: Of each text's bound.
            batch_size: Pairs of text and draw that the network sees at a time.

        Raises:
            ConfigError: If a text holds the mask token.
        """
        from evaluation.scoring import Scorer

        if isinstance(texts, str):
            texts = [texts]
        scorer = Scorer(self.model, batch_size=batch_size, num_draws=num_draws)
        with _mistakes():
            return scorer.bounds(texts)

    def evaluate(self, *overrides: str) -> dict[str, Any]:
        """The likelihood of held-out data, as `mode=ppl_eval` measures it.

        Args:
            overrides: KEY=VALUE each. Without a data set, as in "data=docstrings", it
                is that of the training, where the checkpoint tells it.

        Returns:
            nll (nats), bpd (bits) and ppl of a token with NAME_stderr, and how many
            rows and tokens were measured.

        Raises:
            ConfigError: With one line about a mistake.
        """
        path = f"eval.checkpoint_path={hydra_quoted(self.path)}"
        words = [*self._overrides, *overrides, "mode=ppl_eval", path]
        with _mistakes(), TemporaryDirectory() as folder:
            return _carried_out(words, folder)

    # ---- sampling

    def _with(self, sampling: dict[str, Any]) -> DictConfig:
        """The config with other keys of `sampling`, checked."""
        config = self.config.copy()
        OmegaConf.set_readonly(config, False)
        config.mode = "sample_eval"
        for name, value in sampling.items():
            key = f"sampling.{name.replace('__', '.')}"
            if key not in known_keys():
                raise ConfigError(unknown_key(key))
            value = str(value) if isinstance(value, Path) else value
            OmegaConf.update(config, key, value)
        check_kinds(config)
        check_values(config)
        return config

    def _starts(
        self, config: DictConfig, length: int, prompts: Sequence[str], infill: Any
    ) -> list[Any]:
        """What samples start from, one after the other; nothing if from nothing."""
        from sampling.prompts import check_prompts, read_prompts

        if prompts and infill:
            raise ConfigError("prompts and infill are both set; give one of them.")
        starts = []
        for key, texts in (("prompt", prompts), ("infill", infill)):
            for text in [texts] if isinstance(texts, str) else texts:
                asked = config.copy()
                asked.sampling[key] = text
                check_prompts(asked, self.model.is_autoregressive)
                starts += read_prompts(asked, self.tokenizer, length)
        return starts

    def _given(self, rows: list[Any], length: int) -> Any:
        from sampling.prompts import given_tokens

        if rows[0] is None:
            return None
        return given_tokens(rows, self.tokenizer.bos_token_id, length)


def _carried_out(words: list[str], folder: str | Path) -> dict[str, Any]:
    """What a mode returns, with its files in a folder."""
    config, here = composed(words), os.getcwd()
    os.makedirs(folder, exist_ok=True)
    with chdir(folder), warnings.catch_warnings():
        keep_quiet()
        return imported("main.carry_out")(config, here, words) or {}


@contextmanager
def _mistakes() -> Iterator[None]:
    """Mistakes that OmegaConf finds are mistakes like others."""
    try:
        yield
    except OmegaConfBaseException as error:
        raise ConfigError(one_line(str(error))) from None
