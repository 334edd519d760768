"""DUO's curriculum and its operator as the papers write them: dense
(B, L, K) latents, one-hot vectors, adaptive quadrature point by point.

Nothing here is used by the library.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.integrate import quad
from scipy.special import log_ndtr
from torch import Tensor

from benchmarks.plain import uniform_state_nll


def latents(x0: Tensor, gamma: Tensor, eps: Tensor) -> Tensor:
    """gauss_alpha onehot(x0) + gauss_sigma eps, (B, L, K)."""
    gauss_alpha, gauss_sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
    onehot = F.one_hot(x0, eps.shape[-1]).float()
    return gauss_alpha[:, None, None] * onehot + gauss_sigma[:, None, None] * eps


def duo_nll(model, x0: Tensor) -> Tensor:
    """The curriculum: a softmax over all K, or over the largest `top_k` of it."""
    curriculum, K = model.curriculum, model.vocab_size
    t = torch.rand(len(x0))
    alpha_t, dalpha_t = (
        x.float().to(x0.device) for x in curriculum.operator(t[:, None])
    )
    gamma = curriculum.operator.gammas.gamma(t).to(x0.device)
    eps = torch.randn(*x0.shape, K, device=x0.device)
    w = latents(x0, gamma, eps)
    weights = (w / 10 ** curriculum.log10_tau_at(0)).softmax(-1)
    embedding = model.backbone.vocab_embed.embedding
    if curriculum.is_dense:
        soft = weights @ embedding
    else:
        top = weights.topk(curriculum.top_k)
        soft = (top.values[..., None] * embedding[top.indices]).sum(-2)
    xt = w.argmax(-1)
    hidden = model.backbone.trunk(Embedded(soft), -alpha_t[:, 0].log())
    log_p = model.backbone.head(hidden).log_softmax(-1)
    return uniform_state_nll(log_p, xt, x0, alpha_t, dalpha_t)


class Embedded:
    """Embeddings that are there already."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def embed(self, embedding: Tensor) -> Tensor:
        return self.rows


NLL = {"duo": duo_nll}


def operator_at(gamma: float, vocab_size: int) -> tuple[float, float]:
    """P and dP/dgamma at one gamma by adaptive quadrature."""
    s = math.exp(-gamma / 2)

    def density(z: float) -> float:
        log_density = (vocab_size - 1) * log_ndtr(z) - (z - s) ** 2 / 2
        return np.exp(log_density) / math.sqrt(2 * math.pi)

    def slope(z: float) -> float:
        return -s / 2 * (z - s) * density(z)

    options = {"epsabs": 1e-12, "epsrel": 1e-10, "limit": 200}
    return tuple(quad(f, s - 12, s + 12, **options)[0] for f in (density, slope))
