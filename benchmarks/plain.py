"""Training, evaluation and sampling as the papers write them, dense and eager: what
the benchmarks and the tests hold ours against.

Every formula works on whole (B, L, K) tensors, one-hot vectors included, the
optimiser is torch's default and the EMA loops over parameters. Nothing here is used
by the library.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def log_linear(t: Tensor, eps: float = 1e-3) -> tuple[Tensor, Tensor]:
    """alpha_t and its derivative, (B, 1)."""
    alpha_t = 1 - (1 - eps) * t[:, None]
    return alpha_t, torch.full_like(alpha_t, -(1 - eps))


def ar_nll(model, x0: Tensor) -> Tensor:
    logits = model.backbone(x0[:, :-1]).clone()
    logits[..., model.mask_index] += -1e6
    return -logits.log_softmax(-1).gather(-1, x0[:, 1:, None])[..., 0]


def mdlm_nll(model, x0: Tensor) -> Tensor:
    xt, alpha_t, dalpha_t = absorb(model, x0)
    log_p = subs(model.backbone(xt, _zeros(x0)), xt, model.mask_index)
    return dalpha_t / (1 - alpha_t) * log_p.gather(-1, x0[..., None])[..., 0]


def sedd_nll(model, x0: Tensor) -> Tensor:
    xt, alpha_t, dalpha_t = absorb(model, x0)
    sigma, K, m = -alpha_t.log(), model.vocab_size, model.mask_index
    log_score = model.backbone(xt, sigma[:, 0]) - sigma.expm1().log()[..., None]
    log_score = log_score - math.log(K - 1)
    log_score = log_score.scatter(-1, xt[..., None], 0.0)
    r = 1 / sigma.expm1()
    score = log_score.exp()
    entropy = score.sum(-1) - score[..., m] + r * (r.log() - 1)
    entropy = entropy - r * log_score.gather(-1, x0[..., None])[..., 0]
    return (xt == m) * (-dalpha_t / alpha_t) * entropy


def d3pm_nll(model, x0: Tensor) -> Tensor:
    T, m = model.T, model.mask_index
    t = ((_uniform(x0[:, 0]) * T).floor() + 1) / T
    alpha_t, _ = log_linear(t)
    xt = torch.where(_uniform(x0) < 1 - alpha_t, m, x0)
    log_p = model.backbone(xt, -alpha_t[:, 0].log()).log_softmax(-1)
    q = log_p.exp()[..., m]
    dt, t = 1 / T, (1 - alpha_t).clamp(0, 1 - 1e-4)
    s = (t - dt).clamp(min=1e-8)
    log_xt = torch.log(alpha_t * q / t + 1)
    term1 = dt / t * (log_xt - log_p.gather(-1, x0[..., None])[..., 0])
    term2 = (1 - dt / t) * (log_xt - torch.log((1 - s) * q / s + 1))
    clean = model.backbone(x0, _zeros(x0)).log_softmax(-1)
    reconstruction = -clean.gather(-1, x0[..., None])[..., 0]
    return reconstruction + T * (term1 + term2) * (xt == m)


def duo_base_nll(model, x0: Tensor) -> Tensor:
    K = model.vocab_size
    alpha_t, dalpha_t = log_linear(_uniform(x0[:, 0]) * 0.999 + 1e-3)
    noised = _uniform(x0) < 1 - alpha_t
    xt = torch.where(noised, torch.randint_like(x0, K), x0)
    log_p = model.backbone(xt, -alpha_t[:, 0].log()).log_softmax(-1)
    return uniform_state_nll(log_p, xt, x0, alpha_t, dalpha_t)


def uniform_state_nll(
    log_p: Tensor, xt: Tensor, x0: Tensor, alpha_t: Tensor, dalpha_t: Tensor
) -> Tensor:
    """The bound with its sum over the vocabulary written out, (B, L)."""
    K = log_p.shape[-1]
    alpha = alpha_t[..., None]
    xbar = K * alpha * F.one_hot(x0, K) + 1 - alpha  # (B, L, K)
    xbar_theta = K * alpha * log_p.exp() + 1 - alpha
    at_xt = xbar.gather(-1, xt[..., None])
    theta_at_xt = xbar_theta.gather(-1, xt[..., None])
    log_ratio = torch.log((theta_at_xt * xbar) / (xbar_theta * at_xt))
    first = K * (1 / at_xt - 1 / theta_at_xt)[..., 0]
    second = (xbar / at_xt * log_ratio).sum(-1)
    return dalpha_t / (K * alpha_t) * (first - second)


def absorb(model, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    alpha_t, dalpha_t = log_linear(_uniform(x0[:, 0]) * 0.999 + 1e-3)
    masked = _uniform(x0) < 1 - alpha_t
    return torch.where(masked, model.mask_index, x0), alpha_t, dalpha_t


def _uniform(like: Tensor) -> Tensor:
    return torch.rand(like.shape, device=like.device)


def _zeros(x0: Tensor) -> Tensor:
    return torch.zeros(len(x0), device=x0.device)


def subs(logits: Tensor, xt: Tensor, mask_index: int) -> Tensor:
    logits = logits.clone()
    logits[..., mask_index] += -1e6
    log_p = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
    revealed = (xt != mask_index)[..., None]
    log_p = torch.where(revealed, torch.full_like(log_p, -1e6), log_p)
    own = F.one_hot(xt, logits.shape[-1]).bool()
    return torch.where(revealed & own, torch.zeros_like(log_p), log_p)


NLL = {
    "ar": ar_nll,
    "mdlm": mdlm_nll,
    "sedd": sedd_nll,
    "d3pm": d3pm_nll,
    "duo_base": duo_base_nll,
}


class PlainStep:
    """One optimiser update: loss, backward, clip, AdamW, EMA."""

    def __init__(self, nll: Callable[..., Tensor], model) -> None:
        self.nll = nll
        self.model = model
        self.parameters = list(model.parameters())
        self.shadow = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=3e-4)

    def __call__(self, x0: Tensor) -> float:
        with self.model.autocast():
            loss = self.nll(self.model, x0).mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            for shadow, parameter in zip(self.shadow, self.parameters, strict=True):
                shadow -= (1 - 0.9999) * (shadow - parameter)
        return loss.item()
