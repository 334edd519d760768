"""The diffusion skeleton batch -> corrupt -> denoise -> loss. The forward processes are
in `absorbing.py` and `uniform.py`, the objectives in `algo.py`.

Shapes: B batch, L length, K vocabulary, D hidden size, N tokens of a batch. `alpha_t`,
`dalpha_t` are (B, 1), in float64 where the device has it; logits are float32. What
works token by token is written for any leading shape `...`: (B, L) or (n,).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor

from diffusion.blocks import Blocks, BlockWise
from diffusion.estimators import check_estimator, estimator_of, times_of
from diffusion.gaussian import SoftTokens
from models.attention import KVCache
from models.device import to_device, widened
from models.head import TokenNLL
from models.noise import build_noise
from sampling.prompts import Given
from training.scorable import Stratum, regret

GOLDEN = (math.sqrt(5) - 1) / 2  # of whose multiples the fractions lie evenly
NEG_INFINITY = -1e6  # finite, so that 0 * log 0 stays 0
# By `algo.compat`: whether labels are dropped in validation, too.
DROPS_LABELS_ALWAYS = {"paper": False, "reference": True}

# One token from each row of probabilities: (n, K), generator -> (n,).
Draw = Callable[[Tensor, torch.Generator | None], Tensor]


class Latent(NamedTuple):
    """A corrupted batch."""

    xt: Tensor  # noisy ids, (B, L)
    alpha_t: Tensor  # (B, 1); (B, L) with blocks
    dalpha_t: Tensor  # in the shape of alpha_t
    scored: Tensor | None = None  # flat positions with a loss, (N,); None: all B L
    inputs: SoftTokens | None = None  # what the network sees; None: xt
    is_noised: Tensor | None = None  # what may differ from x0, (B, L) bool on the host
    labels: Tensor | None = None  # that the network is told, (B,)
    block_size: int | Tensor | None = None  # as for `BlockWise.hidden_of`


class Diffusion(BlockWise):
    """Time, corruption and the negative ELBO of every diffusion model.

    A subclass supplies the forward process (`noise_tokens`, `posterior`), the
    parameterisation (`process_logits`) and the objective (`nll_per_token`). The last
    two work token by token, on any leading shape.
    """

    draws_whole_rows = False  # whether samplers have to draw from `posterior` itself
    takes_labels = True

    def __init__(self, config: DictConfig, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self.T: int = config.algo.T
        self.time_conditioning: bool = config.algo.time_conditioning
        self.ignore_bos: bool = config.algo.ignore_bos
        self.sampling_eps: float = config.training.sampling_eps
        low, high = config.training.get("time_range") or (0.0, 1.0)
        self.time_range: tuple[float, float] = (low, high)  # of training
        self.antithetic_sampling: bool = config.training.antithetic_sampling
        self.noise = build_noise(config.noise)  # of the reverse process, too
        estimator = estimator_of(config)
        self.levels = self.noise.log_uniform() if estimator else self.noise
        self.is_told_the_time = estimator == "change_of_variables"
        self.drops_labels_always: bool = DROPS_LABELS_ALWAYS[config.algo.compat]

    @classmethod
    def validate_config(cls, config: DictConfig) -> None:
        super().validate_config(config)
        check_estimator(config, build_noise(config.noise))

    def nll(
        self,
        x0: Tensor,
        weights: Tensor | None = None,
        batch_idx: int = 0,
        labels: Tensor | None = None,
    ) -> TokenNLL:
        """One-sample estimate of the negative ELBO of each token.

        Args:
            x0, weights, batch_idx: As in `trainer_base.TrainerBase.nll`.
            labels: Class of each sequence, (B,); None for models without classes.
        """
        blocks = self.sample_blocks(x0, batch_idx)
        if blocks is None:
            z = self.corrupt(x0, self.sample_t(len(x0), batch_idx), batch_idx)
        else:
            z = self.corrupt(x0, self.sample_block_t(blocks, batch_idx), batch_idx)
            z = z._replace(block_size=blocks.size)
        if labels is not None:
            z = z._replace(labels=self.with_dropout(labels, batch_idx))
        return self.nll_at(x0, z, weights)

    def nll_at(self, x0: Tensor, z: Latent, weights: Tensor | None = None) -> TokenNLL:
        """The terms of the negative ELBO of each token at corrupted tokens.

        Args:
            x0: Clean ids, (B, L).
            z: From `corrupt`.
            weights: As for `nll`.
        """
        sigma = self.sigma(z.alpha_t)
        x = z.xt if z.inputs is None else z.inputs
        return self.head_loss(
            self.hidden_of(x, x0, sigma, z.block_size, z.labels),
            self.nll_of_logits,
            weights,
            scored=z.scored,
            xt=z.xt,
            x0=x0,
            alpha_t=z.alpha_t,
            dalpha_t=z.dalpha_t,
            sigma=sigma,
        )

    def nll_given(self, x0: Tensor, known: Tensor, strata: Sequence[Stratum]) -> Tensor:
        """One draw of the bound of the reverse process in which known tokens stay.

            -log p(x_u | x_k) <= E_t E_{z ~ q(z | x_u)} sum_{i in u} loss_i(x_k, z, t)

        with k the known and u the unknown positions: what `sampling.prompt` samples
        from. Given strata 0 .. n - 1, times are as in `sample_t`. With blocks it is of
        the blocks' reverse processes, one after the other, each given all before it.
        """
        generators = [stratum.generator() for stratum in strata]
        drawn = [torch.rand((), dtype=torch.float64, generator=g) for g in generators]
        if self.antithetic_sampling:
            pairs = zip(drawn, strata, strict=True)
            drawn = [(x + s.index) / s.count for x, s in pairs]
        u = torch.stack(drawn)
        L, size = x0.shape[1], self.size_for(x0.shape[1])
        if size is not None:
            keys = torch.cat([self.block_keys(1, L, g) for g in generators])
            u = self.spread(u, Blocks(L, size, keys))
        z = self.corrupt(x0, self.times(u), known=known, generators=generators)
        z = z._replace(block_size=size)
        if z.scored is None:
            z = z._replace(scored=flat_positions(~known, x0.device))
        nll = self.nll_at(x0, z).nll
        return nll.masked_fill(to_device(known, x0.device), 0)

    def regret_given(
        self, x0: Tensor, known: Tensor, strata: Sequence[Stratum]
    ) -> Tensor:
        shape = (1, x0.shape[1])
        noise = torch.cat([self.noise_tokens(shape, s.generator()) for s in strata])
        device = x0.device
        xt = torch.where(to_device(known, device), x0, to_device(noise, device))
        alpha_1 = self.noise(torch.ones(len(x0), 1, dtype=torch.float64)).alpha_t
        sigma = self.sigma(widened(alpha_1, device))
        return self.head_loss(
            self.hidden_of(xt, x0, sigma, self.size_for(x0.shape[1])),
            self._token_regret,
            None,
            scored=flat_positions(~known, device),
            xt=xt,
            x0=x0,
            sigma=sigma,
        ).nll

    def _token_regret(
        self, logits: Tensor, *, xt: Tensor, x0: Tensor, sigma: Tensor
    ) -> Tensor:
        return regret(self.denoised(logits, xt=xt, sigma=sigma), x0)

    def valid_tokens(self, attention_mask: Tensor) -> Tensor:
        if not self.ignore_bos:
            return attention_mask
        return attention_mask.masked_fill(is_first(attention_mask), 0)

    # ---- time

    def sample_t(self, batch_size: int, batch_idx: int = 0) -> Tensor:
        """Times of this batch's rows, (B,) on the host, by their indices i.

            t_i = (1 - sampling_eps) u_i + sampling_eps

        with u_i of `uniforms`, in training those of a global batch. With T > 0, t moves
        up to the next multiple of 1/T.
        """
        rows = self.row_indices(batch_size, batch_idx)
        return self.times(self.uniforms("time", rows))

    def sample_block_t(self, blocks: Blocks, batch_idx: int = 0) -> Tensor:
        """Times of this batch's blocks, (B, L) by token, from the u of its rows."""
        rows = self.row_indices(len(blocks.keys), batch_idx)
        return self.times(self.spread(self.uniforms("time", rows), blocks))

    def uniforms(self, purpose: str, rows: range) -> Tensor:
        """Numbers u_i ~ U(0, 1) of rows i, float64 on the host.

        With `training.antithetic_sampling` those of `uniforms_in_training` and
        `uniforms_in_validation`, else independent ones.
        """
        if not self.antithetic_sampling:
            return self.row_stream(purpose, rows).uniform()
        if self.training:
            return self.uniforms_in_training(purpose, rows)
        return self.uniforms_in_validation(purpose, rows)

    def uniforms_in_training(self, purpose: str, rows: range) -> Tensor:
        """One number in each of the n parts of the unit interval, n the global batch.

        u_i = (v_i / n + i / n) mod 1,  v_i ~ U(0, 1)
        """
        n = self.config.loader.global_batch_size
        return (self.row_stream(purpose, rows).uniform() / n + index_of(rows) / n) % 1

    def uniforms_in_validation(self, purpose: str, rows: range) -> Tensor:
        """Points of a golden-ratio sequence, any run of which covers the unit interval
        evenly, however it is cut into batches and shared out to ranks.

            u_i = (v + i (sqrt(5) - 1) / 2) mod 1,  v ~ U(0, 1)

        Each u_i is uniform, so that the estimate of the bound has no bias.
        """
        v = self.row_stream(purpose, range(1)).uniform()
        return (v + index_of(rows) * GOLDEN) % 1

    def times(self, u: Tensor) -> Tensor:
        """Times that belong to uniform numbers in [0, 1), any shape; see `sample_t`.

        In training with `training.time_range` they are uniform in that range, of which
        what is below sampling_eps is left out.
        """
        low, high = self.time_range if self.training else (0.0, 1.0)
        low = max(low, self.sampling_eps)
        return times_of(u, low, high, self.T)

    # ---- corrupt

    def corrupt(
        self,
        x0: Tensor,
        t: Tensor,
        batch_idx: int = 0,
        *,
        known: Tensor | None = None,
        generators: Sequence[torch.Generator] = (),
    ) -> Latent:
        """Noisy tokens at times t on the host, with the schedule there.

        t is (B,), or (B, L) with a time of each token.

        All is drawn on the host: a seed gives the same tokens on every device, and
        which tokens have a loss is known without waiting for the device.

        With T > 0, dalpha_t is the backward difference T (alpha_t - alpha_s), s =
        t - 1/T, which turns the continuous-time weight into the discrete-time one.
        With an estimator of `diffusion.estimators` t is its uniform number.

        Args:
            x0: Clean ids, (B, L).
            t: Times.
            batch_idx: Position in the epoch, for what is drawn.
            known: Tokens that stay clean, (B, L) bool on the host.
            generators: Of each row's draws, on the host; none: those that belong to
                the row's index.
        """
        t = t[:, None] if t.ndim == 1 else t
        alpha_t, dalpha_t = self.levels(t)
        if self.T > 0:
            alpha_s = self.levels((t - 1 / self.T).clamp(min=0)).alpha_t
            dalpha_t = self.T * (alpha_t - alpha_s)
        B, L = x0.shape
        if generators:
            u = torch.cat([torch.rand((1, L), generator=g) for g in generators])
            of_rows: Iterable[torch.Generator] = generators
        else:
            stream = self.row_stream("noise", self.row_indices(B, batch_idx))
            u, of_rows = stream.uniform(L), stream.generators()
        is_noised = u < 1 - alpha_t  # (B, L)
        noise = torch.cat([self.noise_tokens((1, L), g) for g in of_rows])
        if self.ignore_bos:
            is_noised[:, 0] = False
        if known is not None:
            is_noised &= ~known
        scored = self.scored_positions(is_noised)
        device = x0.device
        return Latent(
            torch.where(to_device(is_noised, device), to_device(noise, device), x0),
            widened(alpha_t, device),
            widened(dalpha_t, device),
            None if scored is None else to_device(scored, device),
            is_noised=is_noised,
        )

    def q_xt(
        self, x0: Tensor, alpha_t: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draws x_t ~ q(x_t | x_0): noise with probability 1 - alpha_t, (B, L).

        Outside of training, on the device of x0. A process that does not replace
        tokens independently overrides this and `corrupt`.
        """
        u = torch.rand(x0.shape, device=x0.device, generator=generator)
        return torch.where(u < 1 - alpha_t, self.noise_tokens(x0.shape, generator), x0)

    def noise_tokens(
        self, shape: tuple[int, ...], generator: torch.Generator | None = None
    ) -> Tensor:
        """Token ids to put in place of clean ones, on the generator's device."""
        raise NotImplementedError

    def prior_sample(
        self, num_samples: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Token ids at t = 1, (B, L): noise alone."""
        return self.noise_tokens((num_samples, self.num_tokens), generator)

    def scored_positions(self, is_noised: Tensor) -> Tensor | None:
        """Flat positions of the tokens whose loss is not 0 for sure; None is all.

        Args:
            is_noised: (B, L) bool, on the host.
        """
        return None

    def with_dropout(self, labels: Tensor, batch_idx: int) -> Tensor:
        """Labels (B,) of which some are "no class", which guidance needs to be known.

        Each is dropped with probability `training.class_dropout_p`, in training only.
        NOTE(compat): in validation, too, with `algo.compat=reference`.
        """
        none = self.num_classes
        if none is None or not (self.training or self.drops_labels_always):
            return labels
        rows = self.row_indices(len(labels), batch_idx)
        u = self.row_stream("labels", rows).uniform()
        is_dropped = to_device(u < self.config.training.class_dropout_p, labels.device)
        return torch.where(is_dropped, torch.full_like(labels, none), labels)

    # ---- denoise

    def sigma(self, alpha_t: Tensor) -> Tensor:
        """Total noise -log(alpha_t), (B, 1), float32-safe near alpha_t = 1."""
        return -torch.log(alpha_t)

    def hidden(
        self,
        xt: Tensor | SoftTokens,
        sigma: Tensor,
        labels: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The backbone's hidden states, (B, L), (B, 1) and (B,) -> (B, L, D).

        With a cache, of clean blocks, xt are the tokens behind them.
        """
        told: dict[str, Any] = {"labels": labels, "cache": cache}
        told = {name: x for name, x in told.items() if x is not None}
        return self.network.trunk(xt, self.condition(sigma), **told)

    def forward(
        self, xt: Tensor, sigma: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """Denoiser output for noisy ids, (B, L), (B, 1) and (B,) -> (B, L, K).

        Log-probabilities of clean tokens; for SEDD, log-scores.
        """
        logits = self.logits_for_loss(self.hidden(xt, sigma, labels))
        return self.carry_over(self.process_logits(logits, xt=xt, sigma=sigma), xt)

    def process_logits(self, logits: Tensor, *, xt: Tensor, sigma: Tensor) -> Tensor:
        """The parameterisation at tokens that have a loss, (..., K).

        Args:
            logits: Of the head, (..., K).
            xt: Noisy ids, (...).
            sigma: Noise levels, broadcast with xt.
        """
        raise NotImplementedError

    def carry_over(self, output: Tensor, /, xt: Tensor) -> Tensor:
        """What `forward` knows without the network, (..., K): tokens that stay.

        Args:
            output: Of `process_logits`, (..., K).
            xt: Noisy ids, (...).
        """
        return output

    # ---- loss

    def nll_of_logits(
        self,
        logits: Tensor,
        *,
        xt: Tensor,
        x0: Tensor,
        alpha_t: Tensor,
        dalpha_t: Tensor,
        sigma: Tensor,
    ) -> Tensor:
        """`nll_per_token` of raw logits, (..., K) -> (...)."""
        output = self.process_logits(logits, xt=xt, sigma=sigma)
        return self.nll_per_token(
            output, xt=xt, x0=x0, alpha_t=alpha_t, dalpha_t=dalpha_t
        )

    def nll_per_token(
        self,
        output: Tensor,
        /,
        *,
        xt: Tensor,
        x0: Tensor,
        alpha_t: Tensor,
        dalpha_t: Tensor,
    ) -> Tensor:
        """The diffusion term of the negative ELBO, nats, (...).

        Args:
            output: Of `process_logits`, (..., K). A subclass calls it what it is:
                `log_x_theta` (log-probabilities of clean tokens) or `log_score`.
            xt, x0: Noisy and clean ids, (...).
            alpha_t, dalpha_t: Schedule and its time derivative, broadcast with xt.
        """
        raise NotImplementedError

    # ---- what samplers ask for

    def with_bos(self, given: Given) -> Given:
        """With `algo.ignore_bos` the first token is a clean bos, unless given."""
        if not self.ignore_bos:
            return given
        return given.starting_with(self.tokenizer.bos_token_id, ~given.known[:, 0])

    def undecided(self, xt: Tensor) -> Tensor:
        """Tokens that the reverse process may still change, (B, L) bool."""
        return torch.ones_like(xt, dtype=torch.bool)

    def denoised(self, logits: Tensor, *, xt: Tensor, sigma: Tensor) -> Tensor:
        """Log-probabilities of clean tokens where `undecided`, (..., K); arguments as
        for `process_logits`."""
        return self.process_logits(logits, xt=xt, sigma=sigma)

    def posterior(
        self, x_theta: Tensor, *, xt: Tensor, alpha_t: Tensor, alpha_s: Tensor
    ) -> Tensor:
        """q(x_s | x_t, x_theta) for s < t, normalised, (..., K).

        Args:
            x_theta: Probabilities of clean tokens, (..., K).
            xt: Noisy ids, (...).
            alpha_t, alpha_s: Signal levels that broadcast with xt, alpha_t <= alpha_s.
        """
        raise NotImplementedError

    def marginal(self, x0_probs: Tensor, alpha_s: Tensor) -> Tensor:
        """q(x_s) for x_0 ~ x0_probs, (..., K): noise with probability 1 - alpha_s.

        Args:
            x0_probs: (..., K).
            alpha_s: Signal levels, (...).
        """
        raise NotImplementedError

    # The same reverse step as a draw in two parts. A process that has no better one
    # than from the whole posterior leaves these as they are.

    def change_bound(self, xt: Tensor, *, alpha_t: Tensor, alpha_s: Tensor) -> Tensor:
        """Probability with which `changed` is to be asked, whatever the network says.

        Broadcasts with xt (B, L); alpha_t is (B, 1), alpha_s (B, 1) or (B, L).
        """
        return self.undecided(xt).to(alpha_t.dtype)

    def changed(
        self,
        x_theta: Tensor,
        *,
        xt: Tensor,
        alpha_t: Tensor,
        alpha_s: Tensor,
        draw: Draw,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Draws x_s for tokens that `change_bound` let through, (n, K) -> (n,).

        Args:
            x_theta: As for `posterior`, (n, K).
            xt, alpha_t, alpha_s: (n,).
            draw: Of one token from each row of probabilities.
            generator: For draws.
        """
        q_xs = self.posterior(x_theta, xt=xt, alpha_t=alpha_t, alpha_s=alpha_s)
        return draw(q_xs.to(x_theta.dtype), generator)


def flat_positions(where: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Positions in a flattened batch of what is true in (B, L) on the host, (N,)."""
    return to_device(where.flatten().nonzero().squeeze(-1), torch.device(device))


def index_of(rows: range) -> Tensor:
    """Indices of rows, (B,) float64 on the host."""
    return torch.tensor(rows, dtype=torch.float64)


def is_first(x: Tensor) -> Tensor:
    """Which positions of (B, L) are the first ones, (L,) bool."""
    return torch.arange(x.shape[1], device=x.device) == 0


def without_mask(logits: Tensor, mask_index: int) -> Tensor:
    """Logits whose mask entry has next to no probability, (..., K)."""
    is_mask = torch.arange(logits.shape[-1], device=logits.device) == mask_index
    return logits + torch.where(is_mask, NEG_INFINITY, 0.0).to(logits.dtype)
