"""Likelihoods of texts and continuations of prompts under a trained model: what
downstream tasks ask for (`harness.py`), with no knowledge of the tool that asks.

A text is scored as a row: bos, what is known of it, what is scored; no eos, at its own
length. All numbers are in nats.

Shapes: B batch, L length.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby, islice
from typing import NamedTuple

import torch
from torch import Tensor

from data.progress import progress
from metrics.samples import mean_and_error
from models.device import to_device
from sampling.prompts import Prompt, given_tokens
from trainer_base import TrainerBase
from training.scorable import Stratum
from utils import ConfigError, NotFinite

log = logging.getLogger(__name__)


class Row(NamedTuple):
    """What the network sees of a text."""

    ids: tuple[int, ...]  # bos first
    num_known: int  # tokens at the beginning that are not scored, bos among them


class Score(NamedTuple):
    """Of a continuation."""

    log_likelihood: float  # nats; a lower bound where the model has only one
    is_greedy: bool  # whether every token is the model's first choice


class Bound(NamedTuple):
    """Of a whole text: -log p, or the bound above it where the model has only that."""

    nll: float  # nats, of the whole text
    stderr: float | None  # of the draws of times and noise; None where it is exact
    num_tokens: int

    @property
    def ppl(self) -> float:
        """Perplexity of a token; NaN of a text without any."""
        return math.exp(self.nll / self.num_tokens) if self.num_tokens else math.nan


class Request(NamedTuple):
    """A text to write."""

    prompt: str
    stops: tuple[str, ...] = ()  # the text ends before the first of them
    num_tokens: int = 256  # most tokens after the prompt


class Scorer:
    """Scores texts, whatever the batch size the same, and continues them.

    Of a model with a bound, a text's is the mean over n = `num_draws` draws of times
    and noise, t_j from part j of n equal parts of (0, 1), as in a validation:

        log p(y | c) >= E [ -1/n sum_j sum_{i in y} loss_i(c, z_j, t_j) ]

    with z_j ~ q(z | y, t_j).

    Noise is drawn for each text and draw from a generator of its own, seeded by the
    run's seed and the tokens; so neither batch size nor order nor the other texts
    change a number, apart from rounding.

    Args:
        model: On its device, with its weights.
        batch_size: Most rows in an evaluation of the network; rows are pairs of text
            and draw.
        num_draws: n; an exact likelihood needs one, and takes no more.
        suffix_only: Whether a continuation y is scored by the bound of log p(y | c)
            above, with the context c clean. False: by the difference of two bounds,
            of log p(c, y) and log p(c) given bos. That is no bound itself, but orders
            continuations of one context as the bound of log p(c, y) does.
    """

    def __init__(
        self,
        model: TrainerBase,
        *,
        batch_size: int = 32,
        num_draws: int = 32,
        suffix_only: bool = True,
    ) -> None:
        self.model = model
        self.tokenizer = model.tokenizer
        self.batch_size = batch_size
        self.num_draws = 1 if model.is_autoregressive else num_draws
        self.suffix_only = suffix_only
        self._said: set[str] = set()

    # ---- texts

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        """Scores continuations, (context, continuation) each.

        Where both do not fit into `model.length`, the context loses its beginning. A
        continuation that does not fit by itself is scored in windows, each given what
        fits of the text before it.

        Raises:
            ConfigError: If a text holds the mask token.
        """
        windows = []
        for context, continuation in pairs:
            before, ids = self.encode_pair(context, continuation)
            if len(before) + len(ids) > self.room:
                self._say(
                    "length",
                    f"some texts are longer than model.length={self.room + 1}; the "
                    "beginnings of their contexts are left out",
                )
            windows.append(self.windows(before, ids))
        rows = dict.fromkeys(row for text in windows for row in text)
        parts = {row: self._parts(row) for row in rows}
        nll = self.nll(part for pair in parts.values() for part in pair)
        greedy = self.greedy(rows)
        scores = []
        for text in windows:
            pairs_of = [parts[row] for row in text]
            total = sum(nll[context] - nll[whole] for context, whole in pairs_of)
            scores.append(Score(float(total), all(greedy[row] for row in text)))
        return scores

    def score_whole(self, texts: Sequence[str]) -> list[float]:
        """Log-likelihoods (bounds) of whole texts given bos, in nats.

        Long ones in disjoint windows: bos and `model.length` - 1 tokens each, every
        token scored once. The last window is filled up from the left with tokens that
        are known.

        Raises:
            ConfigError: If a text holds the mask token.
        """
        return [-bound.nll for bound in self.bounds(texts)]

    def bounds(self, texts: Sequence[str]) -> list[Bound]:
        """`score_whole` with its error: that of a mean over draws, which is too large
        where they are spread evenly over time."""
        windows = [self.windows([], self.encode(text)) for text in texts]
        rows = (row for rows in windows for row in rows)
        draws = self._draws(rows, "harness/nll", self.model.nll_given, self.num_draws)
        bounds = []
        for rows_of in windows:
            errors = [mean_and_error(draws[row])[1] or 0.0 for row in rows_of]
            bounds.append(
                Bound(
                    float(sum(map(mean_of, (draws[row] for row in rows_of)))),
                    None if self.num_draws == 1 else math.hypot(*errors),
                    sum(len(row.ids) - row.num_known for row in rows_of),
                )
            )
        return bounds

    def write(self, requests: Sequence[Request]) -> list[str]:
        """Continues prompts with the configured sampler, prompts unchanged.

        Samples are of the model's whole length, of which the first `num_tokens` after
        the prompt are taken, up to an eos. A long prompt loses its beginning; where
        `num_tokens` would leave it less than half of the length, fewer are written.
        A batch has one generator, so samples depend on `batch_size`.

        Raises:
            ConfigError: If a prompt holds the mask token.
        """
        model, texts = self.model, []
        length = model.sampler.length(model.num_tokens)
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        for batch in _batches(progress(requests, "writing"), self.batch_size):
            prompts, sizes = [], []
            for request in batch:
                ids, size = self._fit(request, length - 1)
                prompts.append(Prompt(request.prompt, ids))
                sizes.append(size)
            key = _digest([prompt.ids for prompt in prompts])
            with self._evaluation():
                samples = model.generate_samples(
                    len(batch),
                    model.generator("harness/write", key),
                    given=given_tokens(prompts, bos, length),
                )
            rows = samples.tokens.tolist()
            for row, request, prompt, size in zip(
                rows, batch, prompts, sizes, strict=True
            ):
                start = 1 + len(prompt.ids)
                ids = row[start : start + size]
                ids = ids[: ids.index(eos)] if eos in ids else ids
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                texts.append(cut(text, request.stops))
        return texts

    # ---- rows

    @property
    def room(self) -> int:
        """Tokens of a row beside bos."""
        return self.model.num_tokens - 1

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens.

        Raises:
            ConfigError: If the mask is among them, which has no likelihood.
        """
        if not text:
            return []
        tokenizer = self.tokenizer
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        mask, unknown = self.model.mask_index, tokenizer.unk_token_id
        if mask is not None and mask in ids:
            raise ConfigError(f"The text {text[:80]!r} holds the mask token.")
        if unknown is not None and unknown in ids and tokenizer.unk_token not in text:
            self._say(
                "unknown",
                f"the tokenizer does not know all of {text[:80]!r} and of other texts; "
                "what it does not know is scored as the token of the unknown",
            )
        return ids

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], ...]:
        """Token ids of both parts of a text, as the tokenizer cuts the whole.

        Blanks at the end of the context belong to the continuation, as tokenizers
        join them with the word behind.
        """
        stripped = context.rstrip()
        blanks = context[len(stripped) :]
        before = self.encode(stripped)
        return before, self.encode(stripped + blanks + continuation)[len(before) :]

    def windows(self, context: list[int], ids: list[int]) -> list[Row]:
        """Rows that score each of `ids` once, each given as much as fits before it."""
        everything, rows = context + ids, []
        for start in range(len(context), len(everything), self.room):
            end = min(start + self.room, len(everything))
            row = everything[max(0, end - self.room) : end]
            bos = self.tokenizer.bos_token_id
            rows.append(Row((bos, *row), 1 + len(row) - (end - start)))
        return rows

    def _parts(self, row: Row) -> tuple[Row, Row]:
        """Context and whole, whose difference is log p(continuation | context)."""
        num_known = row.num_known if self.suffix_only else 1
        return Row(row.ids[: row.num_known], num_known), Row(row.ids, num_known)

    def _fit(self, request: Request, room: int) -> tuple[list[int], int]:
        """The end of a prompt that is kept, and how many tokens are to follow."""
        ids = self.encode(request.prompt)
        kept = min(len(ids), max(room - request.num_tokens, room // 2))
        size = min(request.num_tokens, room - kept)
        if kept < len(ids) or size < request.num_tokens:
            self._say(
                "room",
                f"prompts and {request.num_tokens} tokens after them do not always fit "
                f"into samples of {room + 1}; beginnings of prompts are left out, or "
                "fewer tokens written",
            )
        return ids[len(ids) - kept :], size

    # ---- numbers of rows

    def nll(self, rows: Iterable[Row]) -> dict[Row, float]:
        """-log p of each row's unknown tokens given its known ones, or its bound."""
        nll = self.model.nll_given
        draws = self._draws(rows, "harness/nll", nll, self.num_draws)
        return {row: mean_of(values) for row, values in draws.items()}

    def greedy(self, rows: Iterable[Row]) -> dict[Row, bool]:
        """Whether each of a row's unknown tokens is the model's first choice."""
        draws = self._draws(rows, "harness/greedy", self.model.regret_given, 1)
        return {row: regret == 0 for row, (regret,) in draws.items()}

    @torch.no_grad()
    def _draws(
        self,
        rows: Iterable[Row],
        purpose: str,
        function: Callable[[Tensor, Tensor, Sequence[Stratum]], Tensor],
        count: int,
    ) -> dict[Row, list[float]]:
        """Sums over tokens of a function of the model, each draw's.

        Args:
            rows: Each is evaluated once; one without unknown tokens is 0.
            purpose: Of the noise.
            function: `nll_given` or `regret_given`.
            count: Draws of each row.
        """
        draws: dict[Row, list[float]] = {row: [] for row in rows}
        asked = [row for row in draws if row.num_known < len(row.ids)]
        asked.sort(key=lambda row: len(row.ids), reverse=True)
        pairs = ((row, index) for row in asked for index in range(count))
        bar = progress(None, purpose, total=len(asked) * count)
        with self._evaluation(), bar:
            for batch in self._batches(pairs):
                strata = [
                    Stratum(self.model.seed(purpose, _digest(row), index), index, count)
                    for row, index in batch
                ]
                x0, known = _tensors([row for row, _ in batch])
                x0 = to_device(x0, self.model.device)
                values = function(x0, known, strata).cpu().double().sum(dim=-1)
                if not values.isfinite().all():
                    raise NotFinite(
                        "The likelihood of a text is not finite, so there are no "
                        "scores: the weights are of a run that has diverged, or "
                        "trainer.precision is too narrow for them."
                    )
                for (row, _), value in zip(batch, values.tolist(), strict=True):
                    draws[row].append(value)
                bar.update(len(batch))
        return {row: values or [0.0] for row, values in draws.items()}

    def _batches(
        self, pairs: Iterable[tuple[Row, int]]
    ) -> Iterator[list[tuple[Row, int]]]:
        """Rows that the network can see together.

        Where attention goes in both directions padding would change the numbers, so
        all rows of a batch have the same length.
        """
        ragged = self.model.is_autoregressive
        for _, group in groupby(pairs, lambda pair: ragged or len(pair[0].ids)):
            yield from _batches(group, self.batch_size)

    def _evaluation(self) -> ExitStack:
        """EMA weights, evaluation mode and the run's precision."""
        with ExitStack() as stack:
            stack.enter_context(self.model.eval_weights())
            stack.enter_context(self.model.autocast())
            return stack.pop_all()

    def _say(self, about: str, message: str) -> None:
        """Warns, once about each thing."""
        if about not in self._said:
            self._said.add(about)
            log.warning(message)


def cut(text: str, stops: Iterable[str]) -> str:
    """A text up to the first of some strings; empty strings do not count."""
    ends = [text.index(stop) for stop in stops if stop and stop in text]
    return text[: min(ends, default=len(text))]


def mean_of(values: Sequence[float]) -> float:
    """Their mean."""
    return sum(value / len(values) for value in values)


def _batches(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def _tensors(rows: list[Row]) -> tuple[Tensor, Tensor]:
    """(ids, known), (B, L) each, on the host; padding on the right is known."""
    length = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    known = torch.ones_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        known[i, row.num_known : len(row.ids)] = False
    return ids, known


def _digest(content: object) -> int:
    """A number that tells contents apart, the same in every process."""
    text = repr(content).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")
