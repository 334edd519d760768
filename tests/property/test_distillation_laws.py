"""Consistency distillation where the posterior is known: its fixed points, and what its
divergences are minimal at."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from distillation.dcd import Distillation
from distillation.divergences import DIVERGENCES, without_column
from distillation.teacher import Rounds
from models.head import Head, Precision, chunked_loss

B, K, L = 8000, 7, 8  # as many sequences as the loss may average over


@pytest.fixture
def beliefs(make_model, monkeypatch):
    """A model whose student and teacher believe what a function of (x, sigma) says:
    beliefs(function, *overrides), logits (B, L, K)."""

    def build(student, teacher, *overrides):
        sizes = (f"loader.global_batch_size={B}", f"loader.batch_size={B}")
        model = make_model("algo=distillation", *sizes, *overrides).double().train()
        eye = torch.eye(K, dtype=torch.float64)
        monkeypatch.setattr(model, "hidden", student)
        monkeypatch.setattr(model, "_head", lambda hidden: Head(hidden, eye, None))
        monkeypatch.setattr(
            model, "teacher_head", lambda x, sigma: Head(teacher(x, sigma), eye, None)
        )
        product = Precision(torch.float64, torch.float64)
        monkeypatch.setattr(model, "loss_precision", lambda: product)
        return model

    return build


def posterior(prior):
    """log p(x_0 | x_t) of each token for independent tokens with a known prior."""

    def logits(x, sigma):
        alpha = torch.exp(-sigma)[..., None]
        likelihood = alpha * F.one_hot(x, K).double() + (1 - alpha) / K  # of x_0 = y
        return (prior * likelihood).log().clamp(min=-1e6)

    return logits


@pytest.mark.parametrize("loss_type", Distillation.loss_types)
@pytest.mark.parametrize("step", [0, 25_000])
def test_zero_at_the_fixed_point(beliefs, place, loss_type, step):
    """Data of one sequence: what is believed of it does not depend on the noise, so the
    exact posterior is consistent between any two levels."""
    x0 = torch.full((B, L), 3)
    sure = F.one_hot(torch.tensor(3), K).double()
    model = beliefs(posterior(sure), posterior(sure), f"algo.loss_type={loss_type}")
    place(model, step=step)
    assert float(model.consistency(x0).nll.abs().max()) < 1e-12
    spread = 0.9 * sure + 0.1 / K
    model = beliefs(posterior(spread), posterior(sure), f"algo.loss_type={loss_type}")
    place(model, step=step)
    assert float(model.consistency(x0).nll.mean()) > 1e-3


def test_a_belief_without_noise_is_consistent(beliefs):
    """Whatever it is: a network that does not look at its input cannot be improved."""
    logits = torch.randn(K, dtype=torch.float64)
    constant = lambda x, sigma: logits.expand(*x.shape, K)  # noqa: E731
    model = beliefs(constant, constant)
    x0 = torch.randint(K, (B, L))
    assert float(model.consistency(x0).nll.abs().max()) < 1e-12


def test_a_clean_teacher_makes_the_student_the_posterior(beliefs, generator):
    """With s = 0 the teacher sees x_0. The forward divergence is then E[-log p(x_0)],
    minimal at p(x_0 | x_t): its value there is the entropy of x_0 given x_t, and its
    gradient 0, within 4 standard errors of 64 000 tokens.
    """
    prior = torch.tensor([0.3, 0.2, 0.2, 0.1, 0.1, 0.05, 0.05], dtype=torch.float64)
    sure = lambda x, sigma: 60.0 * F.one_hot(x, K).double()  # noqa: E731
    exact, seen = posterior(prior), {}

    def student(x, sigma):
        seen["x"], seen["sigma"] = x, sigma
        seen["logits"] = exact(x, sigma).log_softmax(-1).requires_grad_()
        return seen["logits"]

    # From the first step on dt is 1, so s = 0 for all.
    more = ("algo.T=1", "algo.loss_type=kl-fwd", "algo.curriculum.gamma_max=0")
    model = beliefs(student, sure, *more)
    x0 = torch.multinomial(prior, B * L, replacement=True, generator=generator)
    x0 = x0.view(-1, L)
    nll = model.consistency(x0)
    p = seen["logits"].detach().exp()
    entropy = -(p * p.log()).sum(-1)
    assert p.amax() < 0.95  # t = 1 leaves something to guess
    difference = (nll.nll - entropy).flatten()
    assert abs(difference.mean()) < 4 * difference.std() / len(difference) ** 0.5
    (grad,) = torch.autograd.grad(nll.total, seen["logits"])
    grad = grad.flatten(0, 1)
    z = grad.mean(0) / (grad.std(0) / len(grad) ** 0.5)
    assert z.abs().max() < 4
    assert grad.abs().mean() > 0.01  # single tokens do pull


def kl(log_q, log_p):
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


OF_TORCH = {
    "kl-fwd": kl,
    "kl-bwd": lambda log_q, log_p: kl(log_p, log_q),
    "mse": lambda *logs: F.mse_loss(*logs, reduction="none").mean(-1),
    "tvd-log": lambda *logs: F.l1_loss(*logs, reduction="none").sum(-1),
    "tvd-prob": lambda log_q, log_p: 1 - torch.minimum(log_q, log_p).exp().sum(-1),
}


@pytest.mark.parametrize("loss_type", DIVERGENCES)
def test_divergences_are_those_of_torch(loss_type, generator):
    """And 0 where student and teacher are one, above it elsewhere."""
    student, teacher = torch.randn(2, 5, K, dtype=torch.float64, generator=generator)
    ours = DIVERGENCES[loss_type](student, teacher)
    expected = OF_TORCH[loss_type](student.log_softmax(-1), teacher.log_softmax(-1))
    torch.testing.assert_close(ours, expected)
    assert bool((ours > 0).all())
    assert float(DIVERGENCES[loss_type](student, student + 3).abs().max()) < 1e-12


@pytest.mark.parametrize("loss_type", DIVERGENCES)
def test_gradients_of_the_chunked_divergence(loss_type, generator):
    """Of the student's hidden states, weight and bias: those of autograd through the
    plain formula, which gradcheck confirms."""
    shapes = [(5, 3), (K, 3), (K,)]
    tensors = [
        torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes * 2
    ]
    weights = torch.rand(5, dtype=torch.float64, generator=generator)
    student = [x.requires_grad_() for x in tensors[:3]]
    teacher = Head(*tensors[3:])

    def loss(*tensors, chunk=None):
        heads = [Head(*tensors), teacher]
        product = Precision(torch.float64, torch.float64)
        settings = {"precision": product, "chunk": chunk}
        return chunked_loss(heads, DIVERGENCES[loss_type], {}, weights, **settings)[0]

    assert gradcheck(loss, student)
    plain = torch.autograd.grad(loss(*student), student)
    for chunk in (1, 2, 5):
        ours = torch.autograd.grad(loss(*student, chunk=chunk), student)
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)


def test_gaps_stay_within_the_unit_interval(compose):
    """They double by rounds up to 1 and stay; linear ones stop at their maximum."""
    config = compose("algo=distillation", "algo.T=48", "algo.update_teacher_every=10")
    rounds = Rounds(config)
    gaps = [rounds.gap(step) for step in range(200)]
    assert gaps[:50:10] == [2**n / 48 for n in range(5)]
    assert max(gaps) == gaps[-1] == 32 / 48
    assert rounds.number(10**9) == 5
    config.algo.linear_growth_dt = True
    config.trainer.max_steps = 100
    rounds = Rounds(config)
    assert rounds.gap(0) == pytest.approx(0.001)
    assert rounds.gap(100) == rounds.gap(1000) == pytest.approx(0.25)
    assert rounds.number(1000) == 100


def test_the_teacher_does_not_drop_out(make_model, place):
    """In training mode, too: the same inputs give the same hidden states."""
    model = make_model("algo=distillation", "model.dropout=0.5").train()
    x, sigma = torch.randint(K, (4, L)), torch.ones(4, 1)
    one, two = (model.teacher_head(x, sigma).hidden for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(model.hidden(x, sigma), model.hidden(x, sigma))
    model.train(False).train(True)
    assert torch.equal(one, model.teacher_head(x, sigma).hidden)


def test_the_teacher_is_in_neither_weights_nor_parameters(make_model):
    """Nor in what an EMA or an optimiser sees; moves to types take it along."""
    student = make_model("algo=duo_base")
    model = make_model("algo=distillation")
    assert model.state_dict().keys() == student.state_dict().keys()
    assert len(list(model.parameters())) == len(list(student.parameters()))
    teacher = model.teacher_head(torch.zeros(1, L, dtype=torch.long), torch.ones(1, 1))
    assert not teacher.weight.requires_grad
    assert not teacher.hidden.requires_grad
    model.double()
    assert model.teacher_head(torch.zeros(1, L).long(), torch.ones(1, 1)).weight.dtype
    assert model.teacher.network.vocab_embed.embedding.dtype == torch.float64


@pytest.mark.parametrize("index", [0, 3, K - 1])
def test_a_column_is_left_out(index, generator):
    logits = torch.randn(2, 5, K, generator=generator)
    kept = [i for i in range(K) if i != index]
    assert torch.equal(without_column(logits, index), logits[..., kept])
