"""The head and its loss in chunks, by itself: derivatives against finite differences,
several heads, sizes, and what is refused. Its settings: `test_losses_settings.py`.
With whole models: `tests/property/test_chunked_loss_laws.py`.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

from models.head import FEW_ROWS, Head, Precision, chunked_loss, logits_of

WIDE = Precision(torch.float64, torch.float64)
N, D = 5, 3


def random_head(generator, K, bias=True, dtype=torch.float64, n=N):
    hidden, weight, b = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((n, D), (K, D), (K,))
    )
    return Head(hidden, weight, b if bias else None)


def requiring(head, needed):
    """The head's own leaves, of which `needed` ask for a gradient."""
    return Head(
        *(
            None if x is None else x.clone().requires_grad_(flag)
            for x, flag in zip(head.tensors, needed, strict=True)
        )
    )


def cross_entropy(logits, *, target):
    return F.cross_entropy(logits, target, reduction="none")


# ---------------------------------------------------------------- derivatives


class Again(torch.autograd.Function):
    """`chunked_loss` whose backward starts anew each time, which gradcheck needs."""

    @staticmethod
    def forward(ctx, loss, *tensors):
        ctx.loss = loss
        ctx.save_for_backward(*tensors)
        with torch.no_grad():
            return loss(*tensors)

    @staticmethod
    def backward(ctx, grad):
        needed = ctx.needs_input_grad[1:]
        leaves = [
            x.detach().requires_grad_(flag)
            for x, flag in zip(ctx.saved_tensors, needed, strict=True)
        ]
        with torch.enable_grad():
            total = ctx.loss(*leaves)
        wanted = [x for x in leaves if x.requires_grad]
        found = iter(torch.autograd.grad(total, wanted, grad))
        return None, *(next(found) if x.requires_grad else None for x in leaves)


def token_losses(model, laws, generator):
    """The model's token losses with inputs (N,): name -> (loss, inputs)."""
    clean = laws.clean(model)
    x0 = clean[torch.randint(len(clean), (1, N), generator=generator)]
    if model.is_autoregressive:
        return {"nll_of_logits": (model.nll_of_logits, {"x0": x0[0]})}
    t = torch.linspace(0.2, 0.9, N, dtype=torch.float64)[:, None]
    alpha_t, dalpha_t = (x[:, 0] for x in model.noise(t))
    noised = torch.rand(1, N, generator=generator) < 0.7
    xt = torch.where(noised, model.noise_tokens((1, N), generator), x0)
    if model.mask_index is None:
        assert (xt != x0).any()
    else:
        assert 0 < noised.sum() < N
    inputs = {"xt": xt[0], "x0": x0[0], "alpha_t": alpha_t, "dalpha_t": dalpha_t}
    inputs["sigma"] = model.sigma(alpha_t)
    losses = {"nll_of_logits": (model.nll_of_logits, inputs)}
    if hasattr(model, "reconstruction_nll"):
        losses["reconstruction"] = (model._reconstruction, {"x0": x0[0]})
    return losses


@pytest.mark.parametrize("chunk", [1, 2, N, 9])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_finite_differences(
    make_model, algo_name, laws, generator, chunk, bias
):
    """Of every algorithm's token losses, for whatever part of the head asks."""
    model = make_model(f"algo={algo_name}")
    weights = torch.rand(N, dtype=torch.float64, generator=generator)
    for loss, inputs in token_losses(model, laws, generator).values():

        def total(*tensors, loss=loss, inputs=inputs):
            return chunked_loss(
                [Head(*tensors) if bias else Head(*tensors, None)],
                loss,
                inputs,
                weights,
                precision=WIDE,
                chunk=chunk,
            )[0]

        head = random_head(generator, model.vocab_size)
        head = head[: 3 if bias else 2]
        for needed in itertools.product((True, False), repeat=len(head)):
            if not any(needed):
                continue
            leaves = [
                x.clone().requires_grad_(flag)
                for x, flag in zip(head, needed, strict=True)
            ]
            assert torch.autograd.gradcheck(
                lambda *x, total=total: Again.apply(total, *x), leaves, atol=1e-6
            )


def test_a_loss_is_differentiated_once(generator):
    """A second backward would add up scaled gradients; it is refused in words."""
    head = requiring(random_head(generator, 7), (True,) * 3)
    target = {"target": torch.arange(N)}
    options = {"precision": WIDE, "chunk": 2}
    total, _ = chunked_loss([head], cross_entropy, target, torch.ones(N), **options)
    total.backward(retain_graph=True)
    before = [x.grad.clone() for x in head.tensors]
    with pytest.raises(RuntimeError, match="differentiated only once"):
        total.backward()
    assert all(map(torch.equal, before, (x.grad for x in head.tensors)))


# ---------------------------------------------------------------- several heads


def kl(p_logits, q_logits):
    """KL(p || q) of each row."""
    p, q = p_logits.log_softmax(dim=-1), q_logits.log_softmax(dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1)


def forward_kl(student, teacher):
    return kl(teacher, student)


def gradients_of(heads, needed, loss, weights, chunk):
    """Total, losses and gradients (None where not needed) of fresh leaves.

    Args:
        chunk: None is written out here, without `losses`.
    """
    leaves = [requiring(head, flags) for head, flags in zip(heads, needed, strict=True)]
    if chunk is None:
        nll = loss(*(F.linear(*head.tensors) for head in leaves))
        total = (weights * nll).sum()
    else:
        total, nll = chunked_loss(
            leaves, loss, {}, weights, precision=WIDE, chunk=chunk
        )
        assert not nll.requires_grad
    total.backward()
    return total, nll, [x.grad for head in leaves for x in head.tensors]


NEEDED = {
    "student": [(True,) * 3, (False,) * 3],
    "teacher": [(False,) * 3, (True,) * 3],
    "both": [(True,) * 3, (True,) * 3],
    "parts": [(False, True, False), (True, False, False)],
}


@pytest.mark.parametrize("loss", [forward_kl, kl], ids=["forward", "backward"])
@pytest.mark.parametrize("needed", NEEDED.values(), ids=NEEDED.keys())
@pytest.mark.parametrize("chunk", [1, 2, N, 9])
def test_a_students_and_a_teachers_logits(generator, loss, needed, chunk):
    """Both divergences as plain autograd has them; who asks for no gradient gets
    none, and a teacher that asks gets its own."""
    heads = [random_head(generator, 7), random_head(generator, 7)]
    weights = torch.rand(N, dtype=torch.float64, generator=generator)
    plain = gradients_of(heads, needed, loss, weights, None)
    got = gradients_of(heads, needed, loss, weights, chunk)
    torch.testing.assert_close(got[:2], plain[:2], rtol=1e-12, atol=1e-14)
    flags = [flag for flags in needed for flag in flags]
    assert [x is not None for x in got[2]] == flags
    for ours, theirs in zip(got[2], plain[2], strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-14)


def test_a_teacher_without_gradient_costs_no_gradient(generator):
    """Nor does anyone, where gradients are off; the losses are the same."""
    heads = [random_head(generator, 7), random_head(generator, 7)]
    student = requiring(heads[0], (True,) * 3)
    teacher = requiring(heads[1], (False,) * 3)
    given = []

    def loss(student, teacher):
        given.append((student.requires_grad, teacher.requires_grad))
        return kl(student, teacher)

    arguments = ([student, teacher], loss, {}, torch.ones(N))
    total, nll = chunked_loss(*arguments, precision=WIDE, chunk=2)
    with torch.no_grad():
        other, same = chunked_loss(*arguments, precision=WIDE, chunk=2)
    assert given == [(True, False)] * 3 + [(False, False)] * 3
    assert torch.equal(total, other)
    assert torch.equal(nll, same)


@pytest.mark.parametrize("chunk", [2, 9])
def test_heads_that_share_their_weight(generator, chunk):
    """One map for two hidden states: its gradient is the sum of both."""
    one, two = random_head(generator, 7), random_head(generator, 7)
    weight, bias = (x.clone().requires_grad_() for x in one.tensors[1:])
    hidden = [x.hidden.clone().requires_grad_() for x in (one, two)]
    leaves = [weight, bias, *hidden]
    heads = [Head(x, weight, bias) for x in hidden]
    weights = torch.rand(N, dtype=torch.float64, generator=generator)
    total, _ = chunked_loss(heads, kl, {}, weights, precision=WIDE, chunk=chunk)
    plain = (weights * kl(*(F.linear(*head.tensors) for head in heads))).sum()
    got, expected = (torch.autograd.grad(x, leaves) for x in (total, plain))
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-14)


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize("chunk", [1, 3])
def test_no_tokens(generator, chunk):
    """A sum over nothing: 0, and gradients of 0 for all that ask."""
    head = requiring(random_head(generator, 7, n=0), (True,) * 3)
    total, nll = chunked_loss(
        [head],
        cross_entropy,
        {"target": torch.zeros(0, dtype=torch.long)},
        torch.zeros(0),
        precision=WIDE,
        chunk=chunk,
    )
    total.backward()
    assert total.item() == 0
    assert nll.shape == (0,)
    for x in head.tensors:
        assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("chunk", [1, 2, 3, 9])
def test_no_more_than_a_chunk_of_logits_at_a_time(generator, chunk):
    """Each row once, in order, in pieces of the chunk's size; the last may be less."""
    seen = []

    def loss(logits, *, target):
        seen.append((len(logits), target.tolist()))
        return cross_entropy(logits, target=target)

    head = requiring(random_head(generator, 7), (True,) * 3)
    target = {"target": torch.arange(N)}
    chunked_loss([head], loss, target, torch.ones(N), precision=WIDE, chunk=chunk)
    assert [i for _, part in seen for i in part] == list(range(N))
    assert all(n == chunk for n, _ in seen[:-1])
    assert seen[-1][0] == (N % chunk or chunk if chunk < N else N)


@pytest.mark.parametrize("num_rows", [1, 2, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("has_bias", [True, False])
def test_logits_of_few_rows_are_those_of_a_linear_map(generator, num_rows, has_bias):
    """The product with the vocabulary first gives the same values and gradients."""
    head = random_head(generator, 50, has_bias, n=num_rows)
    head = requiring(head, (True, True, True))
    hidden, weight, bias = head.tensors
    logits = logits_of(head, WIDE)
    expected = F.linear(hidden, weight, bias)
    assert logits.is_contiguous()
    torch.testing.assert_close(logits, expected)
    probe = torch.randn(num_rows, 50, generator=generator, dtype=torch.float64)
    grads = torch.autograd.grad((logits * probe).sum(), (hidden, weight))
    slow = torch.autograd.grad((expected * probe).sum(), (hidden, weight))
    torch.testing.assert_close(grads, slow)
