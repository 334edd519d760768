"""The reverse process of one call of a sampler: which positions may change, the network
evaluated only where it is asked for, and how often that was.

Shapes: B batch, L length, K vocabulary, D hidden size, n tokens of a chunk, G = 1 or 2
conditions: a class or none, or both.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from models.device import to_device, wide_dtype, widened
from models.head import draw_chunk_size
from sampling.denoiser import Denoiser
from utils import NotFinite

if TYPE_CHECKING:
    from sampling.recording import Recorder

T = TypeVar("T")
# Hidden states of noisy ids (M, L) at levels (M, 1), with labels (M,) or None, of some
# rows of the batch (M / G,).
Network = Callable[[Tensor, Tensor, "Tensor | None", Tensor], Tensor]


class Samples(NamedTuple):
    """What a sampler returns."""

    tokens: Tensor  # ids, (B, L)
    evaluations: Tensor  # of the network, for each sequence, (B,)
    lengths: Tensor | None = None  # tokens before the end, all eos, (B,); None: L

    def up_to_end(self, x: Tensor) -> Tensor | list[Tensor]:
        """What belongs to each sequence of values of all tokens, (B, L)."""
        if self.lengths is None:
            return x
        ends = self.lengths.tolist()
        return [row[:end] for row, end in zip(x, ends, strict=True)]

    def to_host(self) -> "Samples":
        lengths = None if self.lengths is None else self.lengths.cpu()
        return Samples(self.tokens.cpu(), self.evaluations.cpu(), lengths)


class Step(NamedTuple):
    """From one time of the grid to the next."""

    alpha_t: Tensor  # (B, 1)
    alpha_s: Tensor  # (B, 1)
    kappa: float = 1.0  # weight of the posterior, for `Psi`

    def to(self, like: Tensor) -> "Step":
        """Scalars of the host as (B, 1) on the device of `like`, (B, L)."""
        alpha_t, alpha_s = (
            widened(x, like.device).expand(len(like), 1)
            for x in (self.alpha_t, self.alpha_s)
        )
        return Step(alpha_t, alpha_s, self.kappa)


class Tokens(NamedTuple):
    """A chunk of positions with the head's logits."""

    rows: Tensor  # sequence of each token, (n,)
    columns: Tensor  # position of each token, (n,)
    logits: Tensor  # (n, K)
    xt: Tensor  # (n,)
    alpha_t: Tensor  # (n,)
    sigma: Tensor  # (n,)
    without_class: Tensor | None = None  # logits (n, K) to guide those above by

    def each(self) -> list["Tokens"]:
        """With the logits under each condition: the class, then none."""
        if self.without_class is None:
            return [self]
        return [self, self._replace(logits=self.without_class)]

    def pick(self, x: Tensor) -> Tensor:
        """Values of x (B, L) or (B, 1) at these tokens, (n,)."""
        return x[self.rows, self.columns if x.shape[1] > 1 else 0]


class Chain:
    """The reverse process of one call: the model, what may change, the network's
    evaluations so far.

    Args:
        model: A diffusion model on its device, in evaluation mode.
        free: Positions that may change, (B, L) bool.
        generator: On the model's device; None uses torch's global one.
        remembers: Whether hidden states of sequences that have not changed since are
            used again; only where the network does not know the time.
        show_progress: Whether `progress` shows a bar.
        conditions: Labels (B,) that the network is told, None being no class; of two,
            which are evaluated as one batch, the first is guided by the second.
        recorder: Told of what is drawn and of every step.
        network: In place of the model's hidden states.
    """

    def __init__(
        self,
        model: Denoiser,
        free: Tensor,
        generator: torch.Generator | None,
        remembers: bool = False,
        show_progress: bool = False,
        conditions: tuple[Tensor | None, ...] = (None,),
        recorder: "Recorder | None" = None,
        network: Network | None = None,
    ) -> None:
        self.model = model
        self.free = free
        self.generator = generator
        self.show_progress = show_progress
        self.evaluations = torch.zeros_like(free[:, 0], dtype=torch.long)
        self.conditions = conditions
        self.recorder = recorder
        self.network = network
        size = draw_chunk_size(model.vocab_size, model.device.type)
        self.chunk = max(1, size // len(conditions))
        self._are_finite = torch.ones((), dtype=torch.bool, device=free.device)
        self._remembers = remembers
        self._seen: tuple[Tensor, Tensor] | None = None  # (xt, hidden)

    @property
    def is_guided(self) -> bool:
        """Whether there are two laws of every token, to be mixed."""
        return len(self.conditions) > 1

    def forget_labels(self) -> None:
        """From here on the network is told no class."""
        self.conditions, self._seen = (None,), None

    def uniform(self, shape: tuple[int, ...]) -> Tensor:
        """U[0, 1) in the widest float of the device."""
        device = self.model.device
        dtype = wide_dtype(device)
        return torch.rand(shape, dtype=dtype, device=device, generator=self.generator)

    def gumbel(self, shape: tuple[int, ...]) -> Tensor:
        """Standard Gumbel noise, -log(-log u), finite."""
        u = self.uniform(shape)
        return -(-u.clamp(min=torch.finfo(u.dtype).tiny).log()).log()

    def tokens(self, xt: Tensor, alpha_t: Tensor, where: Tensor) -> Iterator[Tokens]:
        """Evaluates the sequences with a position in `where`, (B, L) bool, and the
        head at these positions."""
        asked = self.asked(where)
        of_host = asked.any(dim=-1).nonzero().squeeze(-1)
        if not len(of_host):
            return
        wanted, local, columns = (
            to_device(x, xt.device)
            for x in (of_host, *asked[of_host].nonzero(as_tuple=True))
        )
        sigma = self.model.sigma(alpha_t)
        hidden = self._hidden(xt, sigma, wanted)  # (b, G, L, D)
        for part in torch.arange(len(local), device=xt.device).split(self.chunk):
            rows = wanted[local[part]]
            logits = [
                self.model.logits_for_loss(hidden[local[part], g, columns[part]])
                for g in range(hidden.shape[1])
            ]
            for x in logits:
                self.note_logits(x)
            yield Tokens(
                rows,
                columns[part],
                logits[0],
                xt[rows, columns[part]],
                alpha_t[rows, 0],
                sigma[rows, 0],
                *logits[1:],
            )

    def note_logits(self, logits: Tensor) -> None:
        """Keeps in mind, on the device, whether logits (n, K) are finite."""
        self._are_finite = self._are_finite & logits.amax(dim=-1).isfinite().all()

    def asked(self, where: Tensor) -> Tensor:
        """Positions (B, L) on the host, with which comes whether logits were finite:
        the one time that a step waits for the device.

        Raises:
            NotFinite: As `check_finite`.
        """
        answer = torch.cat([where.flatten(), self._are_finite[None]]).cpu()
        self._refuse_unless(answer[-1])
        return answer[:-1].view(where.shape)

    def check_finite(self) -> None:
        """Waits for the device.

        Raises:
            NotFinite: If any logits so far were not finite.
        """
        self._refuse_unless(self._are_finite)

    def _refuse_unless(self, are_finite: Tensor) -> None:
        if not are_finite:
            raise NotFinite(
                "The logits of the network are not finite, so there are no samples: "
                "its weights are of a run that has diverged, or trainer.precision is "
                "too narrow for them."
            )

    def replace(
        self,
        xt: Tensor,
        alpha_t: Tensor,
        where: Tensor,
        new: Callable[[Tokens], Tensor],
    ) -> Tensor:
        """xt with what `new` makes of the tokens in `where`, (B, L)."""
        xs = xt.clone()
        for tokens in self.tokens(xt, alpha_t, where):
            x = xs[tokens.rows, tokens.columns] = new(tokens)
            if self.recorder is not None:
                self.recorder.drew(tokens, x)
        return xs

    def note(self, xt: Tensor) -> Tensor:
        """x_t after a step, of which a recorder is told."""
        if self.recorder is not None:
            self.recorder.note(xt)
        return xt

    def progress(self, steps: Iterable[T]) -> Iterable[T]:
        is_off = None if self.show_progress else True  # None: where nobody sees a bar
        return tqdm(steps, "sampling", leave=False, disable=is_off)

    def _hidden(self, xt: Tensor, sigma: Tensor, wanted: Tensor) -> Tensor:
        """Hidden states of the wanted sequences, (b, G, L, D)."""
        if not self._remembers:
            return self._evaluate(xt, sigma, wanted)
        seen, stale = self._seen, wanted
        if seen is not None:
            stale = wanted[(seen[0][wanted] != xt[wanted]).any(dim=-1)]
        if seen is None or len(stale):
            fresh = self._evaluate(xt, sigma, stale)
            if seen is None:
                hidden = fresh.new_empty(len(xt), *fresh.shape[1:])
                seen = self._seen = torch.full_like(xt, -1), hidden
            seen[0][stale], seen[1][stale] = xt[stale], fresh
        return seen[1][wanted]

    def _evaluate(self, xt: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        """Hidden states of some sequences under each of G conditions, (b, G, L, D)."""
        G = len(self.conditions)
        self.evaluations[rows] += G
        told = [None if labels is None else labels[rows] for labels in self.conditions]
        labels = (
            None if told[0] is None else torch.cat([x for x in told if x is not None])
        )
        inputs = xt[rows].repeat(G, 1), sigma[rows].repeat(G, 1), labels
        if self.network is None:
            hidden = self.model.hidden(*inputs)
        else:
            hidden = self.network(*inputs, rows)
        return hidden.unflatten(0, (G, -1)).transpose(0, 1)
