"""Gaussian latents of tokens: what DUO's curriculum feeds and what its distillation
compares.

    w = gauss_alpha onehot(x_0) + gauss_sigma eps,  eps ~ N(0, I_K)

`TopLatents` draws the few largest entries of w alone, `DenseLatents` all of them, a few
tokens at a time; neither holds a (B, L, K) tensor. `argmax_pair` draws the argmax at
two noise levels that share eps.

Shapes: B batch, L length, K vocabulary, k kept entries, D hidden size. Levels and
temperatures broadcast with (B, L).

Reference: DUO (arXiv:2506.10892); the top-k form is of its second chapter
(arXiv:2602.21185).
"""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import ndtr
from torch import Tensor
from torch.special import erfcx, log_ndtr, ndtri

from models.device import to_device, wide_dtype, widened
from models.head import auto_chunk_size
from models.registry import SoftInput
from training.row_streams import RowStream

_TOP_SIZES = (16, 32, 64, 128, 256)  # numbers of entries that may stand for all
_NEGLIGIBLE = -17.0  # log of a share of the softmax below float32 rounding
_UNLIKELY = 1e-12


class SoftTokens(SoftInput, Protocol):
    """A soft network input, and the discrete one that it stands for."""

    @property
    def xt(self) -> Tensor:
        """argmax of the latent, (B, L)."""
        ...


class Levels(NamedTuple):
    """Of a Gaussian diffusion; each broadcasts with (B, L)."""

    gauss_alpha: Tensor
    gauss_sigma: Tensor
    tau: Tensor  # temperature of the softmax

    def expand(self, shape: torch.Size) -> "Levels":
        return Levels(*(level.expand(shape) for level in self))


# ---------------------------------------------------------------- all entries


class DenseLatents:
    """All K entries, whose noise is drawn again whenever it is needed.

    A chunk is of whole rows, or a part of one: so no row's noise depends on others.

    Args:
        x0: Clean ids, (B, L).
        levels: Of each token.
        vocab_size: K.
        seeds: Of each row's noise, (B,).
    """

    def __init__(
        self, x0: Tensor, levels: Levels, vocab_size: int, seeds: Sequence[int]
    ) -> None:
        self.x0 = x0
        self.levels = Levels(*(x.flatten().float() for x in levels.expand(x0.shape)))
        self.vocab_size = vocab_size
        self.seeds = seeds
        self.chunks = _chunks(x0.shape, auto_chunk_size(vocab_size, x0.device.type))
        parts = [self.latents(i).argmax(dim=-1) for i in range(len(self.chunks))]
        self.xt = torch.cat(parts).view_as(x0)

    def embed(self, embedding: Tensor) -> Tensor:
        return _DenseAverage.apply(embedding, self).unflatten(0, self.x0.shape)

    def latents(self, index: int) -> Tensor:
        """w of a chunk's tokens, (n, K) float32."""
        rows = self.chunks[index]
        x0 = self.x0.flatten()[rows, None]
        gauss_alpha, gauss_sigma, _ = (level[rows, None] for level in self.levels)
        eps = self.noise(index, (len(x0), self.vocab_size))
        return eps.mul_(gauss_sigma).scatter_add_(1, x0, gauss_alpha)

    def noise(self, index: int, shape: tuple[int, int]) -> Tensor:
        """The same standard normal draws each time."""
        device, L = self.x0.device, self.x0.shape[1]
        eps, generator = torch.empty(shape, device=device), torch.Generator(device)
        row, first = divmod(self.chunks[index].start, L)
        for seed, part in zip(self.seeds[row:], eps.split(L), strict=False):
            part.normal_(generator=generator.manual_seed((seed + first) % 2**63))
        return eps

    def weights(self, index: int) -> Tensor:
        """softmax(w / tau) of a chunk's tokens, (n, K)."""
        tau = self.levels.tau[self.chunks[index], None]
        return self.latents(index).div_(tau).softmax(dim=-1)


def _chunks(shape: torch.Size, size: int) -> list[slice]:
    """Parts of a flattened batch (B, L) of at most `size` tokens: whole rows, or parts
    of one."""
    (B, L), width = shape, max(size // shape[1], 1) * shape[1]
    return [
        slice(row + start, row + min(start + size, width, B * L - row))
        for row in range(0, B * L, width)
        for start in range(0, width, size if size < L else width)
    ]


class _DenseAverage(torch.autograd.Function):
    """softmax(w / tau) @ embedding, chunk by chunk in both directions, (N, D)."""

    @staticmethod
    def forward(ctx: Any, embedding: Tensor, latents: DenseLatents) -> Tensor:
        ctx.latents, ctx.shape = latents, embedding.shape
        parts = [
            latents.weights(i).to(embedding.dtype) @ embedding
            for i in range(len(latents.chunks))
        ]
        return torch.cat(parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.new_zeros(ctx.shape)
        for i, rows in enumerate(ctx.latents.chunks):
            weights = ctx.latents.weights(i).to(grad.dtype)
            total.addmm_(weights.T, grad[rows])
        return total, None


# ---------------------------------------------------------------- the largest ones


class TopDraws(NamedTuple):
    """Randomness of `TopLatents`."""

    u: Tensor  # uniform, for the order statistics, (B, L, k) float64
    eps: Tensor  # standard normal, for the clean token, (B, L)
    slots: Tensor  # draw j uniform on 0, ..., K - 1 - k + j, (B, L, k)
    order: Tensor  # a permutation of the k ids, (B, L, k)

    @classmethod
    def draw(
        cls,
        shape: torch.Size,
        vocab_size: int,
        k: int,
        generators: Iterable[torch.Generator],
        device: torch.device,
    ) -> "TopDraws":
        """Draws of rows (B, L), each by its own generator on the device."""
        options: dict[str, Any] = {"dtype": wide_dtype(device), "device": device}
        uniform = torch.empty((shape[0], 3, shape[1], k), **options)
        eps = torch.empty(shape, **options)
        for *row, generator in zip(uniform, eps, generators, strict=False):
            row[0].uniform_(generator=generator)
            row[1].normal_(generator=generator)
        u, v, w = uniform.unbind(dim=1)
        highest = torch.arange(vocab_size - k, vocab_size, **options)
        return cls(u, eps, (v * highest).long(), w.argsort(dim=-1))


@dataclass(frozen=True, eq=False)
class TopLatents:
    """The k largest of the K entries, and how much of the softmax they are."""

    xt: Tensor  # (B, L)
    ids: Tensor  # (B, L, k)
    weights: Tensor  # softmax(w / tau) there; what is missing to 1 is dropped

    smallest_k: ClassVar[int] = 1

    @classmethod
    def of(
        cls, draws: TopDraws, x0: Tensor, levels: Levels, vocab_size: int
    ) -> "TopLatents":
        """
        The K - 1 entries other than that of x_0 are iid, so the k largest of them are
        order statistics and their ids a uniform draw without replacement. The entry of
        x_0 takes the place of the k-th if it is larger. The smaller of these two is
        known; the K - 1 - k entries below the k-th count with their expectation.

        Args:
            draws: Randomness.
            x0: Clean ids, (B, L).
            levels: Of each token.
            vocab_size: K.
        """
        gauss_alpha, gauss_sigma, tau = (level[..., None] for level in levels)
        K = vocab_size
        z = cls.normals(draws.u, K - 1)
        others = gauss_sigma * z  # (B, L, k), descending
        own = gauss_alpha + gauss_sigma * draws.eps[..., None]  # (B, L, 1)
        kth = others[..., -1:]

        ids = cls.tokens(draws, K - 1)
        ids = ids + (ids >= x0[..., None])  # of tokens other than x_0
        is_x0 = cls.is_x0(own, others)
        xt = torch.where(is_x0, x0[..., None], ids[..., :1]).squeeze(-1)

        entries = torch.cat([others[..., :-1], torch.maximum(own, kth)], dim=-1) / tau
        log_rest = cls.log_rest(own, others, z, gauss_sigma / tau, tau, K)
        log_total = torch.logaddexp(entries.logsumexp(-1, keepdim=True), log_rest)
        last = torch.where(own > kth, x0[..., None], ids[..., -1:])
        ids = torch.cat([ids[..., :-1], last], dim=-1)
        return cls(xt, ids, (entries - log_total).exp())

    @classmethod
    def normals(cls, u: Tensor, count: int) -> Tensor:
        """The k largest of `count` standard normal draws, descending, (B, L, k)."""
        return top_normals(u, count)

    @classmethod
    def tokens(cls, draws: TopDraws, count: int) -> Tensor:
        """Ids of the k largest among 0, ..., count - 1, (B, L, k)."""
        return distinct(draws.slots, count).gather(-1, draws.order)

    @classmethod
    def is_x0(cls, own: Tensor, others: Tensor) -> Tensor:
        """Whether x_t is x_0, (B, L, 1), from the entries."""
        return own > others[..., :1]

    @classmethod
    def log_rest(
        cls,
        own: Tensor,
        others: Tensor,
        z: Tensor,
        scale: Tensor,
        tau: Tensor,
        vocab_size: int,
    ) -> Tensor:
        """Log of what the entries that are not kept add to the softmax, (B, L, 1).

        Args:
            own: The entry of x_0, (B, L, 1).
            others: The k largest others, descending, (B, L, k).
            z: Their noise.
            scale: gauss_sigma / tau, (B, L, 1).
            tau: (B, L, 1).
            vocab_size: K.
        """
        num_below = vocab_size - 1 - others.shape[-1]
        log_count = math.log(num_below) if num_below else -math.inf
        return torch.logaddexp(
            torch.minimum(own, others[..., -1:]) / tau,
            log_count + log_mean_exp_below(z[..., -1:], scale),
        )

    def embed(self, embedding: Tensor) -> Tensor:
        rows = F.embedding_bag(
            self.ids.flatten(0, 1),
            embedding,
            per_sample_weights=self.weights.flatten(0, 1).to(embedding.dtype),
            mode="sum",
        )
        return rows.unflatten(0, self.ids.shape[:2])


class PublishedTopLatents(TopLatents):
    """The soft inputs of published runs: `algo.compat=reference`.

    NOTE(compat): in the published code x_t is x_0 wherever x_0 is among the top k, also
    if another entry is larger, so that the loss does not belong to its alpha_t; the
    ids' order is not uniform; the noise is rounded; and where x_0 is kept, the known
    k-th entry counts with an expectation.
    """

    smallest_k: ClassVar[int] = 2  # the expectation needs the one before the last

    @classmethod
    def normals(cls, u: Tensor, count: int) -> Tensor:
        return rounded_top_normals(u, count)

    @classmethod
    def tokens(cls, draws: TopDraws, count: int) -> Tensor:
        return distinct(draws.slots, count)

    @classmethod
    def is_x0(cls, own: Tensor, others: Tensor) -> Tensor:
        return own > others[..., -1:]

    @classmethod
    def log_rest(
        cls,
        own: Tensor,
        others: Tensor,
        z: Tensor,
        scale: Tensor,
        tau: Tensor,
        vocab_size: int,
    ) -> Tensor:
        log_rest = super().log_rest(own, others, z, scale, tau, vocab_size)
        log_count = math.log(vocab_size - others.shape[-1])
        log_expected = log_mean_exp_below(z[..., -2:-1], scale) + log_count
        return torch.where(own > others[..., -1:], log_expected, log_rest)


# By `algo.compat`.
TOP_LATENTS = {"paper": TopLatents, "reference": PublishedTopLatents}


def top_normals(u: Tensor, count: int) -> Tensor:
    """The k largest of `count` standard normal draws, descending, (..., k).

        log U_(j) = sum_{i <= j} log(u_i) / (count - i + 1),  z_j = Phi^-1(U_(j))

    Args:
        u: Uniform draws, (..., k).
        count: At least k.
    """
    log_U = _log_order_statistics(u, count)
    z = ndtri(log_U.exp())
    return torch.where(log_U > -0.5, -ndtri(-torch.expm1(log_U)), z)  # no digits lost


def rounded_top_normals(u: Tensor, count: int) -> Tensor:
    """`top_normals` with U, which is close to 1, rounded to its type as published."""
    return ndtri(_log_order_statistics(u, count).exp())


def _log_order_statistics(u: Tensor, count: int) -> Tensor:
    """log U_(j) of the k largest of `count` uniform draws, (..., k)."""
    left = count - torch.arange(u.shape[-1], dtype=u.dtype, device=u.device)
    u = u.clamp(min=torch.finfo(u.dtype).tiny)
    return (u.log() / left).cumsum(dim=-1)


def distinct(slots: Tensor, count: int) -> Tensor:
    """k distinct numbers of 0, ..., count - 1: every set alike, not every order.

    Robert Floyd's algorithm (Communications of the ACM 30(9), 1987): draw j, or its
    upper bound if that number is there already.

    Args:
        slots: Draw j uniform on 0, ..., count - k + j, (..., k).
        count: At least k.
    """
    ids, k = slots.clone(), slots.shape[-1]
    for j in range(1, k):
        is_there = (ids[..., :j] == ids[..., j : j + 1]).any(dim=-1)
        ids[..., j].masked_fill_(is_there, count - k + j)
    return ids


def log_mean_exp_below(z: Tensor, scale: Tensor) -> Tensor:
    """log E[exp(scale Z) | Z < z] of a standard normal Z.

        exp(scale^2 / 2) Phi(z - scale) / Phi(z)

    Where z < scale with Phi(x) = exp(-x^2 / 2) erfcx(-x / sqrt 2) / 2, so that scale^2,
    which may be large, cancels on paper.
    """
    below = (scale - z).clamp(min=0)
    scaled = scale * z - z**2 / 2 + torch.log(erfcx(below / math.sqrt(2)) / 2)
    plain = scale**2 / 2 + log_ndtr(z - scale)
    return torch.where(z < scale, scaled, plain) - log_ndtr(z)


@functools.lru_cache(maxsize=1)  # asked at every step, mostly for one temperature
def enough(vocab_size: int, ratio: float) -> int | None:
    """How many of the largest entries are all of softmax(w / tau) to float32 rounding.

    The k-th entry and those below it are negligible if it lies delta = ratio (log K +
    17) below the largest, in units of gauss_sigma. It does not only if k - 1 of the
    other N - 1 lie within delta of the largest of N = K - 1,

        int N phi(x) Phi(x)^(N-1) P(Bin(N - 1, q(x)) >= k - 1) dx,
        q(x) = 1 - Phi(x - delta) / Phi(x),

    of which Chernoff's bound has to be below 1e-12.

    Args:
        vocab_size: K.
        ratio: tau / gauss_sigma.

    Returns:
        The number k, or None if it takes more than 256 or than there are.
    """
    N = vocab_size - 1
    x, dx = np.linspace(-6, 9, 1500, retstep=True)
    density = N * np.exp((N - 1) * np.log(ndtr(x)) - x**2 / 2) / math.sqrt(2 * math.pi)
    delta = ratio * (math.log(vocab_size) - _NEGLIGIBLE)
    mean = np.maximum((N - 1) * (1 - ndtr(x - delta) / ndtr(x)), 1e-300)
    for k in _TOP_SIZES:
        log_bound = (k - 1) * (1 + np.log(mean / (k - 1))) - mean
        bound = np.exp(np.where(mean < k - 1, log_bound, 0))
        if k < N and (density * bound).sum() * dx < _UNLIKELY:
            return k
    return None


# ---------------------------------------------------------------- two noise levels


def argmax_pair(
    x0: Tensor,
    later: Levels,
    earlier: Levels,
    vocab_size: int,
    stream: RowStream,
) -> tuple[Tensor, Tensor]:
    """argmax w_t and argmax w_s for one eps, (B, L) each.

    Of the entries other than that of x_0 the largest is the same at both levels; so the
    draws are its noise (a maximum of K - 1), its id and the noise of x_0.

    Args:
        x0: Clean ids, (B, L).
        later, earlier: Levels at t and at s, on the device of x0.
        vocab_size: K.
        stream: Of the rows.
    """
    L, device = x0.shape[1], x0.device
    largest = top_normals(stream.uniform(L, 1), vocab_size - 1).squeeze(-1)
    eps = stream.normal(L)
    other = to_device(stream.integers(vocab_size - 1, L), device)
    eps, largest = widened(eps, device), widened(largest, device)
    return pair_of(x0, later, earlier, eps, largest, other + (other >= x0))


def pair_of(
    x0: Tensor,
    later: Levels,
    earlier: Levels,
    eps: Tensor,
    largest: Tensor,
    other: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same from what is drawn, (B, L) each.

    Args:
        x0, later, earlier: As for `argmax_pair`.
        eps: Noise of x_0.
        largest: Largest noise of the other tokens.
        other: Its id.
    """
    xt, xs = (
        torch.where(
            level.gauss_alpha + level.gauss_sigma * eps > level.gauss_sigma * largest,
            x0,
            other,
        )
        for level in (later, earlier)
    )
    return xt, xs
