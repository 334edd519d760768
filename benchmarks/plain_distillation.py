"""Losses of distillations as the papers write them: distributions of whole batches,
(B, L, K), of student and teacher, and noise for every entry of the vocabulary.

Nothing here is used by the library.
"""

import torch
from torch import Tensor

from benchmarks.plain_curriculum import latents
from diffusion.base import without_mask
from distillation.initial import Perturbed


def distillation_nll(model, x0: Tensor) -> Tensor:
    """KL of whole (B, L, K) distributions, one shared noise."""
    dt = model.rounds.gap(0)
    t = (torch.rand(len(x0)) + dt).clamp(max=1)
    eps = torch.randn(*x0.shape, model.vocab_size, device=x0.device)
    sides = []
    for time in (t, t - dt):
        gamma = model.operator.gammas.gamma(time).to(x0.device)
        alpha = model.operator(time[:, None].double()).alpha_t.float().to(x0.device)
        sides.append((latents(x0, gamma, eps).argmax(-1), -alpha[:, 0].log()))
    with torch.no_grad():
        log_teacher = model.teacher.network(*sides[1]).log_softmax(-1)
    log_student = model.backbone(*sides[0]).log_softmax(-1)
    return (log_student.exp() * (log_student - log_teacher)).sum(-1)


def sdtt_nll(model, x0: Tensor) -> Tensor:
    """KL at masked tokens between the student and rows of targets; (N,)."""
    mask, D, B = model.mask_index, model.step_size, len(x0)
    t = (torch.rand(1) + torch.arange(B) / B)[:, None].to(x0.device) % 1
    xt = torch.where(torch.rand(x0.shape, device=x0.device) < t, mask, x0)
    sigma = torch.zeros(B, device=x0.device)
    with torch.no_grad():
        x, target = xt, None
        for k in range(model.num_distill_steps):
            move_t = (t - k * D).clamp(min=1e-5)[..., None]
            move_s = (move_t - D).clamp(min=0)
            logits = without_mask(model.teacher.network(x, sigma), mask)
            log_p = logits.log_softmax(-1)
            weights = log_p.exp() * (move_t - move_s)
            weights[..., mask] = move_s[..., 0]
            noise = 1e-10 - (torch.rand_like(weights) + 1e-10).log()
            drawn = torch.where(x == mask, (weights / noise).argmax(-1), x)
            target = torch.zeros_like(log_p) if target is None else target
            newly = drawn != x
            target[newly], x = log_p[newly], drawn
        left = x == mask
        target[left] = log_p[left]
    masked = xt == mask
    logits = without_mask(model.backbone(xt, sigma), mask)
    log_q, target = logits.log_softmax(-1)[masked], target[masked]
    return (log_q.exp() * (log_q - target)).sum(-1)


def dimo_loss(model, x0: Tensor) -> Tensor:
    """The squared difference of the generator's logits, and the cross entropy of the
    auxiliary model; a scalar."""
    mask, K, B = model.mask_index, model.vocab_size, len(x0)
    level, ratio = model.perturbation.level(0), model.initial.ratio.low
    sigma = torch.zeros(B, device=x0.device)

    def samples() -> tuple[Tensor, Tensor]:
        masked = masks_of(torch.full((B, 1), ratio, device=x0.device), x0)
        ids = torch.where(masked, mask, torch.randint_like(x0, K - 1))
        width = model.backbone.input_embedding.shape[1]
        noise = torch.randn(*x0.shape, width, device=x0.device)
        z = without_mask(model.backbone(Perturbed(ids, noise, level), sigma), mask)
        weights = z.detach().softmax(-1)
        race = weights / (1e-10 - (torch.rand_like(weights) + 1e-10).log())
        return z, race.argmax(-1)

    z, x = samples()
    masked = masks_of(torch.rand(B, 1, device=x0.device), x0)
    xt = torch.where(masked, mask, x)
    with torch.no_grad():
        p_psi, p_phi = (
            without_mask(network(xt, sigma), mask).softmax(-1)
            for network in (model.aux, model.teacher.network)
        )
        target = z - (p_psi - p_phi) * masked[..., None]
    generator = 0.5 * (z - target).square().sum() / B
    with torch.no_grad():
        _, x = samples()
    masked = masks_of(torch.rand(B, 1, device=x0.device), x0)
    logits = model.aux(torch.where(masked, mask, x), sigma)
    log_p = without_mask(logits, mask).log_softmax(-1)
    nll = -log_p.gather(-1, x[..., None])[..., 0]
    return generator + (nll * masked).sum() / masked.sum()


def masks_of(ratio: Tensor, like: Tensor) -> Tensor:
    """That share of each row, (B, 1) -> (B, L) bool."""
    u = torch.rand(like.shape, device=like.device)
    return u.argsort(-1) < (ratio * like.shape[1]).round().clamp(min=1)


NLL = {"distillation": distillation_nll, "sdtt": sdtt_nll, "dimo": dimo_loss}
