"""`algo.loss_type=low_var`: training minimises the plain cross entropy of masked
tokens; the bound stays what is reported and validated.
"""

import pytest
import torch
import torch.nn.functional as F
from chunking import random_batch

LOW = ("algo=mdlm", "algo.loss_type=low_var")


def plain(model, batch):
    """Dense: the masked tokens' cross entropies over the number of valid ones, and the
    bound of each row, from logits of all tokens."""
    x0 = batch["input_ids"]
    z = model.corrupt(x0, model.sample_t(len(x0)))
    logits = model.backbone(z.xt, model.condition(model.sigma(z.alpha_t))).double()
    is_mask_id = torch.arange(logits.shape[-1]) == model.mask_index
    log_p = logits.masked_fill(is_mask_id, -torch.inf).log_softmax(-1)
    nll = F.nll_loss(log_p.transpose(1, 2), x0, reduction="none")
    masked = (z.xt == model.mask_index) & (batch["attention_mask"] > 0)
    loss = nll[masked].sum() / batch["attention_mask"].sum()
    bound = -z.dalpha_t / (1 - z.alpha_t) * nll.masked_fill(~masked, 0)
    return loss, bound.sum(dim=-1)


@pytest.mark.parametrize("noise", ["log-linear", "cosine"])
@pytest.mark.parametrize("chunk", ["null", "3"])
def test_gradients_are_those_of_the_plain_cross_entropy(
    make_model, place, noise, chunk
):
    """And the rows' losses, of which train/nll is made, those of the bound."""
    precision = ("training.loss_precision=float64", f"training.loss_chunk={chunk}")
    model = make_model(*LOW, f"noise={noise}", *precision).double().train()
    place(model, step=3)
    batch = random_batch(model, B=4)
    batch["attention_mask"][0, 5:] = 0
    ours = model.loss(batch)
    names, weights = zip(*model.named_parameters(), strict=True)
    mine = torch.autograd.grad(ours.loss, weights)
    loss, rows = plain(model, batch)
    theirs = torch.autograd.grad(loss, weights)
    torch.testing.assert_close(ours.loss.double(), loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.nlls.double(), rows, rtol=1e-6, atol=1e-9)
    for name, a, b in zip(names, mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8, msg=name)


def test_validation_has_the_bound(make_model):
    """The same numbers as with algo.loss_type=elbo, its loss included."""
    found = []
    for overrides in (LOW, LOW[:1]):
        model = make_model(*overrides)
        found.append(model.loss(random_batch(model, B=4)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_training_reports_the_bound(make_model, place):
    """Of the same weights and draws train/nll is the same, trainer/loss is not."""
    found = {}
    for name, overrides in {"low_var": LOW, "elbo": LOW[:1]}.items():
        model = make_model(*overrides).train()
        place(model, step=5)
        found[name] = model.loss(random_batch(model, B=4))
    low, elbo = found["low_var"], found["elbo"]
    assert torch.equal(low.nlls, elbo.nlls)
    assert float(low.loss.detach()) < 0.9 * float(elbo.loss.detach())
