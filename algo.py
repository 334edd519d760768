"""One class per objective; the mathematics only. The shared steps (time, corrupt,
denoise, reduce) are in `diffusion/base.py` and `trainer_base.py`.

Objectives work token by token: `...` is (B, L) where samplers ask, and (n,), a chunk of
tokens, in the loss. Work over K is in the dtype of the logits, the rest in that of
alpha_t (float64 where there is one), which keeps the losses exact where 1 - alpha_t or
alpha_t is tiny.

Shapes: B batch, L length, K vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from data.tokenizers import vocabulary_with_mask
from diffusion.absorbing import AbsorbingState
from diffusion.base import NEG_INFINITY, Latent, flat_positions, is_first, without_mask
from diffusion.curriculum import Curriculum
from diffusion.estimators import estimator_of
from diffusion.uniform import UniformState
from models.attention import KVCache
from models.device import widened
from models.flops import Passes
from models.head import LossOfLogits, TokenNLL
from sampling.prompts import Given
from trainer_base import TrainerBase
from training.scorable import Stratum, regret
from utils import ConfigError


class AR(TrainerBase):
    """Autoregressive model: cross entropy of each token given those before it."""

    parameterization = "ar"
    is_autoregressive = True
    mask_index: int

    @staticmethod
    def vocabulary(tokenizer: Any) -> tuple[int, int]:
        return vocabulary_with_mask(tokenizer)

    @classmethod
    def passes(cls, config: DictConfig) -> Passes:
        """The last token of a row is predicted, and predicts nothing."""
        share = 1 - 1 / config.model.length
        return Passes(trunk=share, head=share)

    def nll(
        self, x0: Tensor, weights: Tensor | None = None, batch_idx: int = 0
    ) -> TokenNLL:
        """-log p(x_i | x_<i) for positions 1 .. L - 1, nats, (B, L - 1)."""
        hidden = self.backbone.trunk(x0[:, :-1])
        return self.head_loss(hidden, self.nll_of_logits, weights, x0=x0[:, 1:])

    def nll_of_logits(self, logits: Tensor, *, x0: Tensor) -> Tensor:
        """Cross entropy of raw logits with clean tokens, (..., K) -> (...)."""
        return -pick(self.process_logits(logits), x0)

    def nll_given(self, x0: Tensor, known: Tensor, strata: Sequence[Stratum]) -> Tensor:
        """-log p(x_i | x_<i), exact; what is right of a token does not change it."""
        return self._given(self.nll_of_logits, x0, known)

    def regret_given(
        self, x0: Tensor, known: Tensor, strata: Sequence[Stratum]
    ) -> Tensor:
        return self._given(self._token_regret, x0, known)

    def _given(self, token_loss: LossOfLogits, x0: Tensor, known: Tensor) -> Tensor:
        """A loss of the unknown tokens behind the first, 0 elsewhere, (B, L)."""
        hidden = self.backbone.trunk(x0[:, :-1])
        scored = flat_positions(~known[:, 1:], x0.device)
        loss = self.head_loss(hidden, token_loss, None, scored=scored, x0=x0[:, 1:])
        return F.pad(loss.nll, (1, 0))

    def _token_regret(self, logits: Tensor, *, x0: Tensor) -> Tensor:
        return regret(self.process_logits(logits), x0)

    def valid_tokens(self, attention_mask: Tensor) -> Tensor:
        return attention_mask[:, 1:]

    def process_logits(self, logits: Tensor) -> Tensor:
        """Next-token log-probabilities, never the mask, (..., K)."""
        return without_mask(logits, self.mask_index).log_softmax(dim=-1)

    def hidden(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """Hidden states of tokens x that follow those of the cache, (B, l, D)."""
        return self.backbone.trunk(x, cache=cache)

    def next_token(self, x: Tensor) -> Tensor:
        """Log-probabilities of the token after x, (B, l) -> (B, K)."""
        return self.process_logits(self.logits_for_loss(self.hidden(x)[:, -1]))

    def prior_sample(
        self, num_samples: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Bos everywhere, (B, L); a sampler overwrites all but the first."""
        shape = (num_samples, self.num_tokens)
        return torch.full(shape, self.tokenizer.bos_token_id, device=self.device)

    def with_bos(self, given: Given) -> Given:
        """The first token is bos."""
        every = torch.ones_like(given.known[:, 0])
        return given.starting_with(self.tokenizer.bos_token_id, every)


class MDLM(AbsorbingState):
    """Masked diffusion with the SUBS parameterisation.

    Reference: MDLM (arXiv:2406.07524), section 3.
    """

    parameterization = "subs"
    is_discrete_time = True
    has_estimators = True
    has_blocks = True
    loss_types: tuple[str, ...] = ("elbo", "low_var")

    @classmethod
    def validate_config(cls, config: DictConfig) -> None:
        super().validate_config(config)
        estimator = estimator_of(config)
        if config.algo.get("loss_type") == "low_var" and estimator is not None:
            raise ConfigError(
                f"training.{estimator}=True draws times by their weight in the bound, "
                "and algo.loss_type=low_var has no weights; choose "
                f"algo.loss_type=elbo, or training.{estimator}=False."
            )

    def nll_at(self, x0: Tensor, z: Latent, weights: Tensor | None = None) -> TokenNLL:
        """The bound of each token; with `algo.loss_type=low_var` training minimises

            E_t E_{x_t} sum_{i: x_t^i = mask} -log p_theta(x_0^i | x_t) / L

        in its place, by weights in the total that undo those of the bound. The losses
        of tokens, of which train/nll is made, stay those of the bound.

        Reference: arXiv:2602.15014, the low-variance objective.
        """
        if self.training and self.config.algo.get("loss_type") == "low_var":
            unweighted = ((1 - z.alpha_t) / -z.dalpha_t).float()  # (B, 1)
            weights = unweighted.expand(x0.shape) * (1 if weights is None else weights)
        return super().nll_at(x0, z, weights)

    def process_logits(self, logits: Tensor, *, xt: Tensor, sigma: Tensor) -> Tensor:
        return without_mask(logits, self.mask_index).log_softmax(dim=-1)

    def carry_over(self, log_x_theta: Tensor, /, xt: Tensor) -> Tensor:
        return carry_over(log_x_theta, xt, self.mask_index)

    def nll_per_token(
        self,
        log_x_theta: Tensor,
        *,
        xt: Tensor,
        x0: Tensor,
        alpha_t: Tensor,
        dalpha_t: Tensor,
    ) -> Tensor:
        """Weighted cross entropy at masked positions, 0 elsewhere.

            loss = dalpha_t / (1 - alpha_t) * log p_theta(x_0 | x_t)

        dalpha_t <= 0, so each term is >= 0. With T > 0, dalpha_t is a difference and
        the sum is the discrete-time bound.
        """
        loss = dalpha_t / (1 - alpha_t) * pick(log_x_theta, x0)
        return torch.where(xt == self.mask_index, loss, 0.0)


class SEDDAbsorb(AbsorbingState):
    """Score entropy; the network gives log p_t(y) / p_t(x_t), not log p(x_0 | x_t).

    Reference: SEDD (arXiv:2310.16834), score entropy with an absorbing state.
    """

    parameterization = "score"
    has_blocks = True

    def process_logits(self, logits: Tensor, *, xt: Tensor, sigma: Tensor) -> Tensor:
        """log s(y) = logits - log(e^sigma - 1) - log(K - 1) for y != x_t."""
        K = logits.shape[-1]
        offset = torch.log(torch.expm1(sigma)) + math.log(K - 1)
        return logits - offset[..., None].to(logits.dtype)

    def carry_over(self, log_score: Tensor, /, xt: Tensor) -> Tensor:
        """log s(x_t) = 0."""
        return log_score.scatter(-1, xt[..., None], 0.0)

    def nll_per_token(
        self,
        log_score: Tensor,
        /,
        *,
        xt: Tensor,
        x0: Tensor,
        alpha_t: Tensor,
        dalpha_t: Tensor,
    ) -> Tensor:
        """Score entropy at masked positions, 0 elsewhere.

            loss = dsigma (sum_{y != m} s(y) - r log s(x_0) + r (log r - 1))

        with r = 1 / (e^sigma - 1) = alpha_t / (1 - alpha_t) the true score of x_0 and
        dsigma = -dalpha_t / alpha_t.
        """
        r = alpha_t / (1 - alpha_t)
        dsigma = -dalpha_t / alpha_t
        total = without_mask(log_score, self.mask_index).exp().sum(dim=-1)
        entropy = total - r * pick(log_score, x0) + r * (r.log() - 1)
        return torch.where(xt == self.mask_index, dsigma * entropy, 0.0)

    def log_score(self, logits: Tensor, *, alpha_t: Tensor, sigma: Tensor) -> Tensor:
        return self.process_logits(logits, xt=self._masks(logits), sigma=sigma)


class D3PMAbsorb(AbsorbingState):
    """Discrete-time absorbing diffusion over T steps, mean parameterisation.

    Reference: D3PM (arXiv:2107.03006); the bound as in MDLM (arXiv:2406.07524).
    """

    is_discrete_time = True
    has_subs_masking = True
    has_blocks = True

    def __init__(self, config: DictConfig, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self.subs_masking: bool = config.algo.subs_masking

    @classmethod
    def as_published(cls) -> type["D3PMAbsorb"]:
        return D3PMAsPublished if cls is D3PMAbsorb else cls

    @classmethod
    def validate_config(cls, config: DictConfig) -> None:
        super().validate_config(config)
        if config.algo.T == 0:
            raise ConfigError("algo.T=0: algo=d3pm is discrete-time; give T > 0.")
        if config.noise.type != "log-linear":
            raise ConfigError(
                f"noise={config.noise.type}: algo=d3pm is defined for noise=log-linear."
            )
        if config.algo.compat == "reference" and not issubclass(cls, D3PMAsPublished):
            raise ConfigError(
                f"algo.compat=reference: {cls.__name__} samples as the paper says; "
                "derive it from algo.D3PMAsPublished, or choose algo.compat=paper."
            )

    @classmethod
    def passes(cls, config: DictConfig) -> Passes:
        """The last term of the bound takes clean tokens through the network."""
        trunk, head = super().passes(config)
        return Passes(trunk + 1, head + 1)

    def process_logits(self, logits: Tensor, *, xt: Tensor, sigma: Tensor) -> Tensor:
        if self.subs_masking:
            logits = without_mask(logits, self.mask_index)
        return logits.log_softmax(dim=-1)

    def nll_per_token(
        self,
        log_x_theta: Tensor,
        *,
        xt: Tensor,
        x0: Tensor,
        alpha_t: Tensor,
        dalpha_t: Tensor,
    ) -> Tensor:
        """T times the KL term of one step at masked positions, 0 elsewhere.

            t = 1 - alpha_t, s = t - dt, dt = 1 / T, q = p(m)
            term1 = dt / t * (log(alpha_t q / t + 1) - log p(x_0))
            term2 = s / t * (log(alpha_t q / t + 1) - log(alpha_s q / s + 1))
            loss = T (term1 + term2)

        term2 tends to 0 with s, its value at the first time of the grid.

        NOTE(compat): the reference takes alpha_s = t - dt for 1 - (t - dt), which
        makes its loss unbounded below; there is no switch back to that.
        """
        dt = 1 / self.T
        t = (1 - alpha_t).clamp(0.0, 1 - 1e-4)
        s = (t - dt).clamp(min=0.0)
        alpha_s = 1 - s
        # (1 - eps) of the schedule puts the first t slightly below dt.
        safe_s = torch.where(s > 0, s, 1.0)
        q = log_x_theta[..., self.mask_index].exp().to(alpha_t.dtype)  # (B, L)
        log_xt = torch.log1p(alpha_t * q / t)
        term1 = dt / t * (log_xt - pick(log_x_theta, x0))
        term2 = (1 - dt / t) * (log_xt - torch.log1p(alpha_s * q / safe_s))
        loss = self.T * (term1 + torch.where(s > 0, term2, 0.0))
        return torch.where(xt == self.mask_index, loss, 0.0)

    def nll_at(self, x0: Tensor, z: Latent, weights: Tensor | None = None) -> TokenNLL:
        diffusion = super().nll_at(x0, z, weights)
        reconstruction = self.reconstruction_nll(x0, weights, z.labels, z.block_size)
        return TokenNLL(*map(torch.add, diffusion, reconstruction))

    def reconstruction_nll(
        self,
        x0: Tensor,
        weights: Tensor | None = None,
        labels: Tensor | None = None,
        block_size: int | Tensor | None = None,
    ) -> TokenNLL:
        """-log p_theta(x_0 | x_0 as input, t = 0), for every token."""
        sigma = x0.new_zeros(len(x0), 1, dtype=torch.float32)
        hidden = self.hidden_of(x0, x0, sigma, block_size, labels)
        return self.head_loss(hidden, self._reconstruction, weights, x0=x0)

    def _reconstruction(self, logits: Tensor, *, x0: Tensor) -> Tensor:
        sigma = logits.new_zeros(x0.shape)
        return -pick(self.process_logits(logits, xt=x0, sigma=sigma), x0)


class D3PMAsPublished(D3PMAbsorb):
    """D3PM with the reverse process of the published samples: `algo.compat=reference`.

    NOTE(compat): the reference draws revealed tokens anew at every step and leaves rows
    of the posterior unnormalised where p has mass on the mask.
    """

    draws_whole_rows = True

    def posterior(
        self, x_theta: Tensor, *, xt: Tensor, alpha_t: Tensor, alpha_s: Tensor
    ) -> Tensor:
        stay = ((1 - alpha_s) / (1 - alpha_t))[..., None].to(x_theta.dtype)
        masked = torch.where(self._is_mask(x_theta), stay, (1 - stay) * x_theta)
        return torch.where((xt == self.mask_index)[..., None], masked, x_theta)

    def undecided(self, xt: Tensor) -> Tensor:
        return torch.ones_like(xt, dtype=torch.bool)

    def denoised(self, logits: Tensor, *, xt: Tensor, sigma: Tensor) -> Tensor:
        return self.process_logits(logits, xt=xt, sigma=sigma)


class DUO_BASE(UniformState):
    """Uniform-state diffusion trained on its Rao-Blackwellised bound.

    Reference: UDLM (arXiv:2412.10193); DUO (arXiv:2506.10892), section on the
    uniform-state NELBO.
    """

    has_blocks = True

    def process_logits(self, logits: Tensor, *, xt: Tensor, sigma: Tensor) -> Tensor:
        return logits.log_softmax(dim=-1)

    def nll_per_token(
        self,
        log_x_theta: Tensor,
        *,
        xt: Tensor,
        x0: Tensor,
        alpha_t: Tensor,
        dalpha_t: Tensor,
    ) -> Tensor:
        """The continuous-time bound, from three numbers per token.

            xbar(y) = K alpha_t x_0(y) + 1 - alpha_t,   xbar_theta likewise with p
            loss = dalpha_t / (K alpha_t) * [ K / xbar(xt) - K / xbar_theta(xt)
              - sum_y xbar(y) / xbar(xt) log(xbar_theta(xt) xbar(y)
                                             / (xbar_theta(y) xbar(xt))) ]

        With c = K alpha_t / (1 - alpha_t) and u(y) = log(1 + c p(y)), so that
        xbar_theta(y) = (1 - alpha_t) e^u(y), and D = sum_y u(y) - K u(xt), this is

            x0 == xt: K / (1 - alpha_t) (1 / (1 + c) - e^-u(xt))
                      + (D + (K - 1) log(1 + c)) / (1 + c)
            x0 != xt: K / (1 - alpha_t) (1 - e^-u(xt))
                      + D + c (u(x0) - u(xt)) - (1 + c) log(1 + c)

        inside the bracket. No 1 - alpha_t is subtracted from anything of size 1, so
        float32 logits are enough at both ends of the schedule.
        """
        K = log_x_theta.shape[-1]
        # Above 0 where alpha_t rounds to 1: the loss, times dalpha_t, tends to 0 there.
        noise = (1 - alpha_t).clamp(min=torch.finfo(alpha_t.dtype).eps)  # (B, 1)
        c = K * alpha_t / noise
        log_c = c.log()
        # u = softplus(log c + log p); past the threshold softplus(z) = z to rounding.
        shifted = log_x_theta + log_c[..., None].to(log_x_theta.dtype)
        u_sum = F.softplus(shifted, threshold=40).sum(dim=-1)  # (B, L)
        u_xt = F.softplus(log_c + pick(log_x_theta, xt), threshold=40)
        u_x0 = F.softplus(log_c + pick(log_x_theta, x0), threshold=40)
        D = u_sum - K * u_xt
        log1p_c = torch.log1p(c)
        same = K / noise * (1 / (1 + c) - torch.exp(-u_xt)) + (
            D + (K - 1) * log1p_c
        ) / (1 + c)
        other = (
            -K / noise * torch.expm1(-u_xt) + D + c * (u_x0 - u_xt) - (1 + c) * log1p_c
        )
        return dalpha_t / (K * alpha_t) * torch.where(x0 == xt, same, other)


class DUO(DUO_BASE):
    """`DUO_BASE` with a curriculum of soft inputs in training, until a step.

    Reference: DUO (arXiv:2506.10892), the curriculum. The loss is the uniform-state
    bound at x_t = argmax w_t and at the alpha_t of the transformation operator; it is
    no bound of the likelihood while the input is soft.
    """

    has_blocks = False  # the curriculum draws whole rows at one time

    def __init__(self, config: DictConfig, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self.curriculum = Curriculum(config, self.vocab_size)

    @classmethod
    def validate_config(cls, config: DictConfig) -> None:
        super().validate_config(config)
        Curriculum.validate_config(config)

    @classmethod
    def needs_soft_inputs(cls, config: DictConfig) -> bool:
        return config.mode == "train" and config.algo.curriculum.end > 0

    @classmethod
    def passes(cls, config: DictConfig) -> Passes:
        if cls.needs_soft_inputs(config):
            raise ConfigError(
                f"training.flops={config.training.flops}: what soft inputs take is not "
                "counted; choose algo=duo_base, or give trainer.max_steps instead."
            )
        return super().passes(config)

    def corrupt(
        self, x0: Tensor, t: Tensor, batch_idx: int = 0, **given: Any
    ) -> Latent:
        step = self.global_step
        if not self.training or self.curriculum.is_over(step):
            return super().corrupt(x0, t, batch_idx, **given)
        is_clean = is_first(x0) if self.ignore_bos else None
        rows = self.row_indices(len(x0), batch_idx)
        seeds = self.row_stream("latent", rows).seeds()
        soft = self.curriculum.draw(x0, t, step, seeds, is_clean)
        alpha_t, dalpha_t = self.curriculum.operator(t[:, None])
        return Latent(
            soft.xt,
            widened(alpha_t, x0.device),
            widened(dalpha_t, x0.device),
            inputs=soft,
        )

    def train_results(self) -> dict[str, Tensor]:
        log10_tau = self.curriculum.log10_tau_at(self.global_step - 1)
        return super().train_results() | {"trainer/log10_tau": torch.tensor(log10_tau)}


# ---------------------------------------------------------------- shared formulas


def pick(values: Tensor, index: Tensor) -> Tensor:
    """values[..., index], (B, L, K) and (B, L) -> (B, L)."""
    return values.gather(-1, index[..., None]).squeeze(-1)


def carry_over(log_x_theta: Tensor, xt: Tensor, mask_index: int) -> Tensor:
    """Log-probabilities with those of revealed tokens replaced by certainty."""
    carried = torch.full_like(log_x_theta, NEG_INFINITY)
    carried = carried.scatter(-1, xt[..., None], 0.0)
    return torch.where((xt == mask_index)[..., None], log_x_theta, carried)
