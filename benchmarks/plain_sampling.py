"""Every sampler as a textbook would write it, to hold ours against.

Each step forms whole (B, L, K) float64 probabilities and draws with noise for every
entry; AR runs over the whole prefix for every token. Nothing here is used by the
library.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.plain import log_linear, subs


@torch.no_grad()
def sample(predictor: str, model, num_samples: int, num_steps: int) -> Tensor:
    """Token ids, (B, L), from t = 1 to t = 1e-5."""
    if model.is_autoregressive:
        return _autoregressive(model, num_samples)
    return PREDICTORS[predictor](model, num_samples, num_steps)


def _ancestral(model, num_samples: int, num_steps: int) -> Tensor:
    xt = _prior(model, num_samples)
    for alpha_t, alpha_s in _levels(model, num_steps):
        xt = _draw(
            _posterior(model, _denoise(model, xt, alpha_t), xt, alpha_t, alpha_s)
        )
    return xt


def _ancestral_cache(model, num_samples: int, num_steps: int) -> Tensor:
    """The prediction is used again if no token of the whole batch changed."""
    xt, p = _prior(model, num_samples), None
    for alpha_t, alpha_s in _levels(model, num_steps):
        if p is None:
            p = _denoise(model, xt, alpha_t)
        xs = _draw(_posterior(model, p, xt, alpha_t, alpha_s))
        p = p if torch.equal(xs, xt) else None
        xt = xs
    return xt


def _psi(model, num_samples: int, num_steps: int, kappa: float = 0.5) -> Tensor:
    xt, K, m = _prior(model, num_samples), model.vocab_size, model.mask_index
    for alpha_t, alpha_s in _levels(model, num_steps):
        p = _denoise(model, xt, alpha_t)
        posterior = _posterior(model, p, xt, alpha_t, alpha_s)
        clean = _posterior(model, p, xt, alpha_t, torch.ones_like(alpha_s))
        noised = alpha_s * clean
        if m is None:
            noised = noised + (1 - alpha_s) / K
        else:
            noised[..., m] += (1 - alpha_s).squeeze()
        xt = _draw(kappa * posterior + (1 - kappa) * noised)
    return xt


def _analytic(model, num_samples: int, num_steps: int) -> Tensor:
    xt, K, m = _prior(model, num_samples), model.vocab_size, model.mask_index
    for alpha_t, alpha_s in _levels(model, num_steps):
        sigma = -alpha_t.log().float()
        with model.autocast():
            logits = model.backbone(xt, sigma[0].expand(num_samples)).float()
        log_score = logits - sigma.expm1().log() - torch.log(torch.tensor(K - 1.0))
        score = log_score.scatter(-1, xt[..., None], 0.0).double().exp()
        exp_d = alpha_s / alpha_t
        staggered = exp_d * score
        staggered[..., m] += ((1 - exp_d) * score.sum(-1)).squeeze()
        transition = F.one_hot(xt, K) / exp_d + (1 - 1 / exp_d) * (xt == m)[..., None]
        xt = _draw((staggered * transition).clamp(min=0))
    return xt


def _first_hitting(model, num_samples: int, num_steps: int) -> Tensor:
    """A token at a time, with the network and the head over all positions."""
    xt, rows = _prior(model, num_samples), torch.arange(num_samples)
    mass = torch.ones(num_samples, 1, dtype=torch.float64, device=model.device)
    for left in range(model.num_tokens, 0, -1):
        mass = mass * torch.rand_like(mass) ** (1 / left)
        x0 = _draw(_denoise(model, xt, 1 - mass[:1]))
        masked = (xt == model.mask_index).double()
        position = masked.multinomial(1)[:, 0]
        xt[rows, position] = x0[rows, position]
    return xt


def _confidence(model, num_samples: int, num_steps: int) -> Tensor:
    """The surest of the masks, as many as the schedule says."""
    xt, left = _prior(model, num_samples), model.num_tokens
    levels = list(_levels(model, num_steps))
    for index, (alpha_t, alpha_s) in enumerate(levels, start=1):
        expected = float((1 - alpha_s) / (1 - levels[0][0])) * model.num_tokens
        stay = round(expected) if index < num_steps else 0
        p = _denoise(model, xt, alpha_t)
        x0 = _draw(p)
        score = p.gather(-1, x0[..., None])[..., 0]
        score[xt != model.mask_index] = -torch.inf
        surest = score.topk(left - stay).indices
        xt, left = xt.scatter(1, surest, x0.gather(1, surest)), stay
    return xt


def _entropy_bound(model, num_samples: int, num_steps: int, gamma=0.1) -> Tensor:
    """Masks by their entropy, as long as the sum of those before is below gamma."""
    xt, m = _prior(model, num_samples), model.mask_index
    while (masked := xt == m).any():
        left = masked.double().mean().clamp(max=1 - 1e-3)
        p = _denoise(model, xt, 1 - left[None, None])
        x0, H = _draw(p), torch.special.entr(p).sum(-1)
        H, order = H.masked_fill(~masked, torch.inf).sort(-1)
        within = H.cumsum(-1) - H <= gamma
        within[:, 0] = True
        reveals = torch.zeros_like(masked).scatter(1, order, within) & masked
        xt = torch.where(reveals, x0, xt)
    return xt


PREDICTORS = {
    "ancestral": _ancestral,
    "ancestral_cache": _ancestral_cache,
    "psi": _psi,
    "analytic": _analytic,
    "first_hitting": _first_hitting,
    "confidence": _confidence,
    "entropy_bound": _entropy_bound,
}


def _autoregressive(model, num_samples: int) -> Tensor:
    x = torch.zeros(num_samples, 1, dtype=torch.long, device=model.device)
    for _ in range(model.num_tokens - 1):
        with model.autocast():
            logits = model.backbone(x)[:, -1].float()
        logits[..., model.mask_index] += -1e6
        x = torch.cat([x, _draw(logits.double().softmax(-1))[:, None]], dim=1)
    return x


# ---------------------------------------------------------------- parts


def _prior(model, num_samples: int) -> Tensor:
    shape = (num_samples, model.num_tokens)
    if model.mask_index is None:
        return torch.randint(model.vocab_size, shape, device=model.device)
    return torch.full(shape, model.mask_index, device=model.device)


def _levels(model, num_steps: int):
    times = torch.linspace(1, 1e-5, num_steps + 1, dtype=torch.float64)
    levels = (log_linear(t[None].to(model.device))[0] for t in times)  # (1, 1)
    return pairwise(levels)


def _denoise(model, xt: Tensor, alpha_t: Tensor) -> Tensor:
    """p(x_0 | x_t), float64, (B, L, K)."""
    with model.autocast():
        sigma = -alpha_t[0].log().float().expand(len(xt))
        logits = model.backbone(xt, sigma).float()
    if model.mask_index is None:
        return logits.double().softmax(-1)
    return subs(logits, xt, model.mask_index).double().exp()


def _posterior(
    model, p: Tensor, xt: Tensor, alpha_t: Tensor, alpha_s: Tensor
) -> Tensor:
    K, m = p.shape[-1], model.mask_index
    current = F.one_hot(xt, K).double()
    if m is not None:
        probs = p * (alpha_s - alpha_t) / (1 - alpha_t)
        probs[..., m] = ((1 - alpha_s) / (1 - alpha_t)).squeeze()
        return torch.where((xt != m)[..., None], current, probs)
    alpha_ts = alpha_t / alpha_s
    numerator = (
        K * alpha_t * p * current
        + (alpha_ts - alpha_t) * current
        + (alpha_s - alpha_t) * p
        + (1 - alpha_ts) * (1 - alpha_s) / K
    )
    at_xt = p.gather(-1, xt[..., None])
    return numerator / (K * alpha_t * at_xt + 1 - alpha_t)


def _draw(probs: Tensor) -> Tensor:
    noise = 1e-10 - (torch.rand_like(probs) + 1e-10).log()
    return (probs / noise).argmax(-1)
