"""Networks that are tables, and a toy distillation to one step with them: two tokens,
so that everything can be enumerated.

Shapes: L length, K vocabulary with the mask, which is last.
"""

import itertools

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from distillation.teacher import Teacher
from models.network import Network

ABSENT = -30.0  # the logit of what has next to no probability


class Table(Network):
    """Any logits at any input: K^L rows of (L, K).

    Args:
        length: L.
        vocab_size: K.
    """

    def __init__(self, length: int, vocab_size: int) -> None:
        super().__init__()
        self.places = vocab_size ** torch.arange(length)
        self.rows = nn.Parameter(torch.zeros(vocab_size**length, length, vocab_size))
        self.eye = nn.Linear(vocab_size, vocab_size, bias=False)
        self.eye.requires_grad_(False).weight.copy_(torch.eye(vocab_size))

    @property
    def output_embedding(self) -> nn.Linear:
        return self.eye

    @property
    def input_embedding(self) -> Tensor:
        return self.eye.weight

    def forward(self, x: Tensor, sigma: Tensor | None = None) -> Tensor:
        return self.eye(self.trunk(x, sigma))

    def trunk(self, x, sigma=None, cache=None, labels=None) -> Tensor:
        return self.rows[(x * self.places).sum(dim=-1)]


def exact_denoiser(joint: Tensor) -> Table:
    """p(x_i | what is not masked) of a law of L tokens, (K - 1, ..., K - 1), at masks;
    at other tokens, which it carries over, no token is likelier than another."""
    L, K = joint.dim(), joint.shape[0] + 1
    table = Table(L, K)
    for state in itertools.product(range(K), repeat=L):
        known = tuple(slice(None) if x == K - 1 else slice(x, x + 1) for x in state)
        part = torch.zeros_like(joint)
        part[known] = joint[known]
        row = (torch.tensor(state) * table.places).sum()
        for i in range(L):
            others = [axis for axis in range(L) if axis != i]
            law = part.sum(dim=others)
            is_possible = law > 0
            logits = law.clamp(min=1e-30).log().where(is_possible, ABSENT)
            is_asked = state[i] == K - 1 and law.sum() > 0
            table.rows.data[row, i, : K - 1] = logits if is_asked else 0
    return table


def toy(make_model, stub_tokenizer, joint: Tensor, *overrides: str):
    """algo=dimo with a table each; generator and auxiliary model begin as the exact
    denoiser of the joint law, the teacher is that."""
    K = joint.shape[0] + 1
    settings = (
        "algo=dimo",
        f"model.length={joint.dim()}",
        "loader.global_batch_size=64",
        "algo.noise_emb_perturb=fix_0",
        "optim.lr=0.1",
        "algo.aux_lr=0.1",
    )
    tokenizer = stub_tokenizer(K - 1, 0)
    model = make_model(*settings, *overrides, tokenizer=tokenizer)
    OmegaConf.resolve(model.config)  # else parsed at every look
    exact = exact_denoiser(joint)
    model.backbone, model.aux = exact_denoiser(joint), exact_denoiser(joint)
    model.teacher = Teacher(model.backbone, model.config)
    model.teacher.take(exact.state_dict(), 0)
    return model.train()


def train_toy(model, place, steps: int) -> None:
    """Updates as training makes them."""
    optimizer = model.make_optimizer()
    x0 = torch.zeros(64, model.num_tokens, dtype=torch.long)
    batch = {"input_ids": x0, "attention_mask": torch.ones_like(x0)}
    for step in range(steps):
        place(model, step=step)
        optimizer.zero_grad(set_to_none=True)
        model.loss(batch).loss.backward()
        optimizer.step()


@torch.no_grad()
def law_of_samples(model) -> Tensor:
    """That of x ~ p_theta(. | x_init), enumerated over x_init, (K - 1, ..., K - 1)."""
    L, K = model.num_tokens, model.vocab_size
    num_masks = int(
        model.initial.with_masks(
            torch.zeros(1, L), torch.rand(1, L), model.initial.ratio.low
        )
        .eq(K - 1)
        .sum()
    )
    total, count = torch.zeros((K - 1,) * L), 0
    for state in itertools.product(range(K), repeat=L):
        if state.count(K - 1) == num_masks:
            hidden = model.generator_hidden(torch.tensor([state]))
            logits = model.generated_logits(model.logits_for_loss(hidden))
            p = logits.softmax(dim=-1)[0, :, : K - 1]  # (L, K - 1)
            product = p[0]
            for row in p[1:]:
                product = product[..., None] * row
            total, count = total + product, count + 1
    return total / count


def total_variation(p: Tensor, q: Tensor) -> float:
    return float((p - q).abs().sum() / 2)
