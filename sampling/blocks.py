"""The sampler of block diffusion: block after block, each by the sampler of
`sampling.predictor`, given the clean ones before it.

Shapes: B batch, L length, L' tokens of a block, D hidden size, G conditions, M = G B.
"""

from typing import cast

import torch
from omegaconf import DictConfig
from torch import Tensor

from models.attention import KVCache
from sampling.denoiser import BlockDenoiser, Model
from sampling.prompts import Given
from sampling.recording import Recorder
from sampling.reverse_process import Chain, Samples
from sampling.sampler import Sampler
from utils import ConfigError


class BlockByBlock:
    """Blocks from left to right: each begins as noise, takes all steps of a sampler,
    and is then clean for those after it.

        x^b ~ p(x^b | x^(<b)),  b = 1 .. N

    A block sees at most the L - L' tokens before it, which is what training shows to
    the last block of a row: those that are further to the left are as if they were not
    there, and what is left begins at position 0. So texts may be longer than L.

    Args:
        sampler: Draws a block.
        block_size: L'.
        num_blocks: N; None: as many as a row of the model has.
        is_cached: Whether the network sees a clean block once and keeps its keys and
            values, instead of at every evaluation. Samples are the same.
        stops_at_eos: Whether a sequence ends at its first eos behind the first token
            and all that is given. From there on it is eos, and `Samples.lengths` says
            where that begins. A sequence that has ended leaves the batch.

    Reference: BD3-LM (arXiv:2503.09573), section 3; with uniform noise
    arXiv:2606.02241.
    """

    def __init__(
        self,
        sampler: Sampler,
        block_size: int,
        num_blocks: int | None,
        is_cached: bool = True,
        stops_at_eos: bool = False,
    ) -> None:
        self.sampler = sampler
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.is_cached = is_cached
        self.stops_at_eos = stops_at_eos

    @classmethod
    def validate_config(cls, config: DictConfig, block_size: int) -> None:
        """Refuses settings that make no sense block by block.

        Args:
            config: The run's config.
            block_size: L'.
        """
        sampling = config.sampling
        if sampling.semi_ar:
            raise ConfigError(
                "sampling.semi_ar=True is for models without blocks; with algo."
                f"block_size={block_size} longer texts are sampling.num_blocks=N."
            )
        if sampling.noise_removal in ("none", False):
            raise ConfigError(
                f"sampling.noise_removal={sampling.noise_removal!r} would leave noise "
                f"in what the next block of algo.block_size={block_size} is given; "
                "choose ancestral or greedy."
            )
        number = sampling.num_blocks
        if number not in (None, 1) and block_size >= config.model.length:
            raise ConfigError(
                f"sampling.num_blocks={number}: no block of algo.block_size="
                f"{block_size} would see the one before it, as model.length="
                f"{config.model.length} has room for one; the only values are null and "
                "1."
            )

    def length(self, num_tokens: int) -> int:
        """Tokens of a sample of a model of `num_tokens`."""
        if self.num_blocks is None:
            return num_tokens
        return self.num_blocks * self.block_size

    def draw_dtype(self, device: torch.device) -> torch.dtype:
        return self.sampler.draw_dtype(device)

    @torch.no_grad()
    def __call__(
        self,
        model: Model,
        num_samples: int,
        *,
        num_steps: int | None = None,
        given: Given | None = None,
        generator: torch.Generator | None = None,
        show_progress: bool = False,
        labels: Tensor | None = None,
        recorder: Recorder | None = None,
    ) -> Samples:
        """Draws samples; arguments as for `Sampler`, `given` of (B, N L'), `num_steps`
        of each block.

        What is drawn for a sequence depends on the seed and on the sequences that are
        in its batch at that time.
        """
        denoiser, size = cast(BlockDenoiser, model), self.block_size
        length, device = self.length(model.num_tokens), model.device
        if given is None:
            given = Given.nothing(num_samples, length, device)
        given = model.with_bos(given.to(device))
        tokens, may_end = given.tokens.clone(), _behind_what_is_known(given.known)
        evaluations = torch.zeros_like(tokens[:, 0])
        lengths = torch.full_like(evaluations, length)
        conditions = self.sampler.conditions(model, labels)
        context = Context(denoiser, size, conditions, self.is_cached)
        if recorder is not None:
            recorder.begin_samples(tokens, given.known)
        there = torch.arange(num_samples, device=device)  # sequences that go on
        are_known = given.known.unflatten(1, (-1, size)).all(dim=2).all(dim=0)
        for index, is_known in enumerate(are_known.tolist()):
            if is_known:
                continue
            start = index * size
            block = slice(start, start + size)
            evaluations[there] += context.see(tokens[there, :start])
            part = Given(*(x[there, block] for x in given))
            if recorder is not None:
                recorder.move(start, there)
            told = num_steps, generator, show_progress, recorder
            x, asked = self.draw(context, part, *told)
            tokens[there, block] = x
            evaluations[there] += asked
            if not self.stops_at_eos:
                continue
            is_end = (x == denoiser.eos_index) & may_end[there, block]
            end = start + is_end.int().argmax(dim=-1)
            lengths[there] = torch.where(is_end.any(dim=-1), end, length)
            stay = self.going_on(is_end)
            if not len(stay):
                break
            if len(stay) < len(there):
                there = there[stay]
                context.select(stay)
        if self.stops_at_eos:
            is_over = torch.arange(length, device=device) >= lengths[:, None]
            tokens = tokens.masked_fill(is_over, denoiser.eos_index)
        if recorder is not None:
            recorder.end_samples(tokens)
        return Samples(tokens, evaluations, lengths if self.stops_at_eos else None)

    def draw(
        self,
        context: "Context",
        given: Given,
        num_steps: int | None,
        generator: torch.Generator | None,
        show_progress: bool,
        recorder: Recorder | None,
    ) -> tuple[Tensor, Tensor]:
        """A block behind a context, given parts of it: its ids (b, L'), and how often
        the network was evaluated for each sequence, (b,)."""
        model = context.model
        chain = Chain(
            model,
            ~given.known,
            generator,
            self.sampler.remembers(model),
            show_progress,
            context.conditions,
            recorder,
            None if context.is_empty else context.hidden,
        )
        xt = given.put(model.noise_tokens(tuple(given.tokens.shape), generator))
        return self.sampler.denoise(chain, xt, num_steps)

    @staticmethod
    def going_on(is_end: Tensor) -> Tensor:
        """The rows of (B, L') without an end, (b,)."""
        return (~is_end.any(dim=-1)).nonzero().squeeze(-1)


def _behind_what_is_known(known: Tensor) -> Tensor:
    """Positions behind the first one and behind all known ones, (B, L) bool."""
    position = torch.arange(known.shape[1], device=known.device)
    return position > (known * position).amax(dim=-1, keepdim=True)


class Context:
    """The clean tokens before a block, as the network sees them.

    Args:
        model: A diffusion model that sees blocks.
        block_size: L'.
        conditions: As for `Chain`.
        is_cached: Whether keys and values of clean tokens are kept.
    """

    def __init__(
        self,
        model: BlockDenoiser,
        block_size: int,
        conditions: tuple[Tensor | None, ...],
        is_cached: bool,
    ) -> None:
        self.model = model
        self.block_size = block_size
        self.conditions = conditions
        self.is_cached = is_cached
        self._begin = 0  # of the window
        self._tokens = torch.zeros(0, 0, dtype=torch.long)  # those in it, (B, l)
        self._cache = self._empty()

    @property
    def is_empty(self) -> bool:
        return self._tokens.shape[1] == 0

    def see(self, tokens: Tensor) -> int:
        """Takes in all that there is before the next block, (B, l), and returns how
        often the network was evaluated for it.

        A window that has moved is seen anew: its tokens saw some that are gone.
        """
        begin = max(0, tokens.shape[1] + self.block_size - self.model.num_tokens)
        if begin > self._begin:
            self._cache = self._empty()
        self._begin, self._tokens = begin, tokens[:, begin:]
        new = self._tokens[:, self._cache.length :]
        if not self.is_cached or not new.shape[1]:
            return 0
        G = len(self.conditions)
        told = [labels for labels in self.conditions if labels is not None]
        sigma = self.model.clean_sigma(G * len(new))
        labels = torch.cat(told) if told else None
        self.model.hidden(new.repeat(G, 1), sigma, labels, self._cache)
        self._cache.keep(new.shape[1])
        return G

    def hidden(
        self, xt: Tensor, sigma: Tensor, labels: Tensor | None, rows: Tensor
    ) -> Tensor:
        """Hidden states of a noisy block behind them, (M, L', D).

        Args:
            xt: Of some sequences under each of the conditions, (M, L').
            sigma: Noise levels, (M, 1).
            labels: Classes, (M,) or None.
            rows: Which sequences these are, (M / G,).
        """
        is_as_told = (labels is None) == (self.conditions[0] is None)
        if self.is_cached and is_as_told:
            return self.model.hidden(xt, sigma, labels, self._of(rows))
        G = len(xt) // len(rows)
        whole = torch.cat([self._tokens[rows].repeat(G, 1), xt], dim=1)
        size = self.block_size
        hidden = self.model.hidden_of(whole, whole, sigma, size, labels)
        return hidden[:, -size:]

    def select(self, rows: Tensor) -> None:
        """Only these sequences (b,) are left."""
        if self._cache.length:
            self._cache.select(self._under_each(rows))
        self.conditions = tuple(x if x is None else x[rows] for x in self.conditions)

    def _of(self, rows: Tensor) -> KVCache:
        if len(rows) == len(self._tokens):
            return self._cache
        return self._cache.of(self._under_each(rows))

    def _under_each(self, rows: Tensor) -> Tensor:
        """Rows of sequences in the cache, where each condition has its own, (M,)."""
        B = len(self._tokens)
        return torch.cat([rows + g * B for g in range(len(self.conditions))])

    def _empty(self) -> KVCache:
        return KVCache(self.model.num_tokens, self.block_size)
