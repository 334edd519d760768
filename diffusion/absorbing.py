"""The forward process in which tokens turn into the mask.

Shapes: B batch, L length, K vocabulary. What works token by token is written for any
leading shape `...`: (B, L) or (n,).
"""

from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from data.tokenizers import vocabulary_with_mask
from diffusion.base import Diffusion, Draw, flat_positions, without_mask
from diffusion.estimators import noised_share
from models.flops import Passes


class AbsorbingState(Diffusion):
    """Each token turns into the mask with probability 1 - alpha_t.

    Reference: D3PM (arXiv:2107.03006), absorbing state; MDLM (arXiv:2406.07524).
    """

    has_score = True
    has_mask = True
    mask_index: int  # there always is one

    @staticmethod
    def vocabulary(tokenizer: Any) -> tuple[int, int]:
        return vocabulary_with_mask(tokenizer)

    @classmethod
    def passes(cls, config: DictConfig) -> Passes:
        """Only masks have a loss."""
        return super().passes(config)._replace(head=noised_share(config))

    def noise_tokens(
        self, shape: tuple[int, ...], generator: torch.Generator | None = None
    ) -> Tensor:
        device = self.device if generator is None else generator.device
        return torch.full(shape, self.mask_index, device=device)

    def scored_positions(self, is_noised: Tensor) -> Tensor | None:
        return flat_positions(is_noised)

    def posterior(
        self, x_theta: Tensor, *, xt: Tensor, alpha_t: Tensor, alpha_s: Tensor
    ) -> Tensor:
        """Revealed tokens stay; a mask stays with probability (1 - alpha_s) /
        (1 - alpha_t), else becomes a draw from x_theta without its mask entry."""
        stay = ((1 - alpha_s) / (1 - alpha_t))[..., None].to(x_theta.dtype)  # (..., 1)
        is_mask = self._is_mask(x_theta)
        tokens = x_theta.masked_fill(is_mask, 0)
        tokens = tokens / tokens.sum(dim=-1, keepdim=True)
        masked = torch.where(is_mask, stay, (1 - stay) * tokens)
        revealed = nn.functional.one_hot(xt, x_theta.shape[-1]).to(x_theta.dtype)
        return torch.where((xt == self.mask_index)[..., None], masked, revealed)

    def marginal(self, x0_probs: Tensor, alpha_s: Tensor) -> Tensor:
        alpha_s = alpha_s[..., None]
        noise = self._is_mask(x0_probs).to(x0_probs.dtype)
        return alpha_s * x0_probs + (1 - alpha_s) * noise

    def undecided(self, xt: Tensor) -> Tensor:
        return xt == self.mask_index

    def denoised(self, logits: Tensor, *, xt: Tensor, sigma: Tensor) -> Tensor:
        """At a mask; the scores of tokens are proportional to their probabilities."""
        return without_mask(logits, self.mask_index).log_softmax(dim=-1)

    def change_bound(self, xt: Tensor, *, alpha_t: Tensor, alpha_s: Tensor) -> Tensor:
        """A mask is revealed with probability (alpha_s - alpha_t) / (1 - alpha_t)."""
        return self.undecided(xt) * ((alpha_s - alpha_t) / (1 - alpha_t))

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
        return draw(x_theta, generator)

    def log_score(self, logits: Tensor, *, alpha_t: Tensor, sigma: Tensor) -> Tensor:
        """log p_t(y) / p_t(m) at masks, for tokens y, (..., K).

        k p(y) with k = alpha_t / (1 - alpha_t). The mask's own entry, which is 0,
        is not filled in.

        Args:
            logits: Of the head, (..., K).
            alpha_t, sigma: Levels that broadcast with (...).
        """
        log_p = self.process_logits(logits, xt=self._masks(logits), sigma=sigma)
        log_k = torch.log(alpha_t / (1 - alpha_t))[..., None]
        return log_p + log_k.to(log_p.dtype)

    def _masks(self, logits: Tensor) -> Tensor:
        """Noisy ids of tokens that are all masks, (..., K) -> (...)."""
        return torch.full(logits.shape[:-1], self.mask_index, device=logits.device)

    def _is_mask(self, like: Tensor) -> Tensor:
        """(K,) bool: the mask's entry of the vocabulary."""
        return torch.arange(like.shape[-1], device=like.device) == self.mask_index
