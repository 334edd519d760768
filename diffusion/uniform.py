"""The forward process in which tokens turn into any token.

Shapes: B batch, L length, K vocabulary. What works token by token is written for any
leading shape `...`: (B, L) or (n,).
"""

from typing import Any

import torch
from torch import Tensor

from data.tokenizers import largest_id
from diffusion.base import Diffusion, Draw


class UniformState(Diffusion):
    """Each token becomes a uniform draw over all K with probability 1 - alpha_t.

    What a network learns here, x_theta, is the leave-one-out denoiser, to a factor of
    each position,

        x_theta(v) = p(x_0^i = v | x_t without position i),

    for which `posterior` is the true reverse process. It is not p(x_0^i = v | x_t).

    Reference: D3PM (arXiv:2107.03006), uniform; UDLM (arXiv:2412.10193); leave-one-out:
    arXiv:2605.22765.
    """

    has_leave_one_out = True

    @staticmethod
    def vocabulary(tokenizer: Any) -> tuple[int, None]:
        return max(len(tokenizer), largest_id(tokenizer) + 1), None

    def noise_tokens(
        self, shape: tuple[int, ...], generator: torch.Generator | None = None
    ) -> Tensor:
        device = self.device if generator is None else generator.device
        return torch.randint(self.vocab_size, shape, device=device, generator=generator)

    def posterior(
        self, x_theta: Tensor, *, xt: Tensor, alpha_t: Tensor, alpha_s: Tensor
    ) -> Tensor:
        """A mixture, with p = x_theta and alpha_ts = alpha_t / alpha_s:

        [ (K alpha_t p[xt] + alpha_ts - alpha_t) onehot(xt)
          + (alpha_s - alpha_t) p + (1 - alpha_ts) (1 - alpha_s) / K ]
        / (K alpha_t p[xt] + 1 - alpha_t)
        """
        K = x_theta.shape[-1]
        alpha_t, alpha_s = (a[..., None].to(x_theta.dtype) for a in (alpha_t, alpha_s))
        alpha_ts = alpha_t / alpha_s  # (..., 1)
        p_xt = x_theta.gather(-1, xt[..., None])  # (..., 1)
        stay = K * alpha_t * p_xt + alpha_ts - alpha_t
        mixture = (alpha_s - alpha_t) * x_theta + (1 - alpha_ts) * (1 - alpha_s) / K
        mixture = mixture.scatter_add(-1, xt[..., None], stay)
        return mixture / (K * alpha_t * p_xt + 1 - alpha_t)

    def marginal(self, x0_probs: Tensor, alpha_s: Tensor) -> Tensor:
        """alpha_s p + (1 - alpha_s) / K.

        With p leave-one-out at x_s it is the law of a token given all others,
        p(x_s^i | x_s without position i).
        """
        alpha_s = alpha_s[..., None]
        return alpha_s * x0_probs + (1 - alpha_s) / x0_probs.shape[-1]

    def denoiser_of(self, log_loo: Tensor, *, xt: Tensor, alpha_t: Tensor) -> Tensor:
        """log p(x_0 = v | x_t) from the leave-one-out denoiser, (..., K).

            p(v | x_t) ~ LOO(v) (K alpha_t [v = x_t] + 1 - alpha_t)

        so that the entry at x_t moves by log(1 + K alpha_t / (1 - alpha_t)).

        Args:
            log_loo: log p(x_0 = v | x_t without this position), (..., K), up to a
                constant of each row: what the network gives.
            xt: Noisy ids, (...).
            alpha_t: Signal levels that broadcast with xt.
        """
        shift = self._evidence(log_loo, alpha_t).expand(xt.shape)[..., None]
        return log_loo.scatter_add(-1, xt[..., None], shift).log_softmax(dim=-1)

    def leave_one_out_of(
        self, log_denoiser: Tensor, *, xt: Tensor, alpha_t: Tensor
    ) -> Tensor:
        """log p(x_0 = v | x_t without this position), (..., K), from the denoiser."""
        shift = self._evidence(log_denoiser, alpha_t).expand(xt.shape)[..., None]
        return log_denoiser.scatter_add(-1, xt[..., None], -shift).log_softmax(dim=-1)

    @staticmethod
    def _evidence(like: Tensor, alpha_t: Tensor) -> Tensor:
        """log(1 + K alpha_t / (1 - alpha_t)): what x_t itself says for v = x_t."""
        noise = (1 - alpha_t).clamp(min=torch.finfo(alpha_t.dtype).eps)
        return torch.log1p(like.shape[-1] * alpha_t / noise).to(like.dtype)

    def change_bound(self, xt: Tensor, *, alpha_t: Tensor, alpha_s: Tensor) -> Tensor:
        """The mixture's weight apart from staying, over its smallest total.

            (alpha_s - alpha_t + (1 - alpha_ts) (1 - alpha_s)) / (1 - alpha_t)

        The total K alpha_t p[xt] + 1 - alpha_t needs the network only for p[xt], by
        which `changed` thins what the bound lets through.
        """
        denoise, noise = self._change_weights(alpha_t, alpha_s)
        return (denoise + noise) / (1 - alpha_t)

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
        K = x_theta.shape[-1]
        p_xt = x_theta.gather(-1, xt[:, None]).squeeze(-1)
        changes = (1 - alpha_t) / (K * alpha_t * p_xt + 1 - alpha_t)
        denoise, noise = self._change_weights(alpha_t, alpha_s)
        u = torch.rand(
            (2, *xt.shape), dtype=alpha_t.dtype, device=xt.device, generator=generator
        )
        is_noise = u[0] * (denoise + noise) >= denoise
        new = torch.where(
            is_noise, self.noise_tokens(xt.shape, generator), draw(x_theta, generator)
        )
        return torch.where(u[1] < changes, new, xt)

    @staticmethod
    def _change_weights(alpha_t: Tensor, alpha_s: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of a draw from x_theta and of a uniform draw in the posterior."""
        return alpha_s - alpha_t, (1 - alpha_t / alpha_s) * (1 - alpha_s)
