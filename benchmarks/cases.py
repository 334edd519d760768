"""What the benchmarks time: a step of training, evaluation or sampling of an algorithm,
by the library (`ours`) or by the formulas of `plain.py` (`plain`).

Every maker takes the algorithm, the variant and the benchmark's arguments, and returns
a function without arguments.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import hydra
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from benchmarks import plain, plain_curriculum, plain_distillation, plain_sampling
from cli.settle import algorithm_class
from data.pixels import PixelTokenizer
from sampling import psi

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def compose(*overrides: str):
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = hydra.compose("config", list(overrides))
    OmegaConf.resolve(config)  # as main.py does
    return config


def build(name: str, args: argparse.Namespace, *overrides: str, **sizes: int):
    """A model of the benchmark's size on its device."""
    size = {**vars(args), **sizes}
    config = compose(
        f"algo={name}",
        "data=synthetic",
        f"model={args.model}",
        f"model.length={size['length']}",
        f"model.hidden_size={size['hidden_size']}",
        f"model.n_blocks={size['blocks']}",
        f"model.n_heads={size['heads']}",
        "model.dropout=0",
        f"loader.global_batch_size={size['batch_size']}",
        f"trainer.accelerator={args.device}",
        f"trainer.precision={args.precision}",
        f"training.compile={args.compile}",
        f"training.loss_compile={args.loss_compile}",
        f"training.loss_chunk={args.loss_chunk}",
        *overrides,
    )
    tokenizer = SizedTokenizer(
        vocab_size=size["vocab_size"], mask_token_id=None, bos_token_id=0
    )
    torch.manual_seed(0)
    model = algorithm_class(config)(config, tokenizer).to(args.device)
    if hasattr(model, "teacher"):
        model.teacher.take(model.backbone.state_dict(), 0)
    shape = (size["batch_size"], size["length"])
    x0 = torch.randint(size["vocab_size"], shape, device=args.device)
    return model, x0


class SizedTokenizer(SimpleNamespace):
    def __len__(self) -> int:
        return self.vocab_size


class LossOf(nn.Module):
    """A model whose call is its loss, as the wrappers of `torch.nn.parallel` want."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x0: Tensor) -> Tensor:
        batch = {"input_ids": x0, "attention_mask": torch.ones_like(x0)}
        with self.model.autocast():
            return self.model.loss(batch).loss


class OurStep:
    """One optimiser update through the library's own loss and EMA."""

    def __init__(self, model, wrap=lambda module: module) -> None:
        self.model = model
        self.loss = wrap(LossOf(model))
        self.optimizer = model.make_optimizer()
        self.ema = model.make_ema()

    def __call__(self, x0: Tensor) -> None:
        loss = self.loss(x0)
        self.optimizer.zero_grad()
        self.backward(loss)
        self.clip()
        self.optimizer.step()
        self.ema.update(self.model.averaged_parameters())

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)


def update_of(
    model, x0: Tensor, variant: str, nll: Callable[..., Tensor]
) -> Callable[[], object]:
    """An update of a model on a batch of ids; `plain` by the losses that nll gives."""
    step = updater_of(model, variant, nll)
    return lambda: step(x0)


def updater_of(
    model, variant: str, nll: Callable[..., Tensor]
) -> Callable[[Tensor], object]:
    """The same on any batch of ids."""
    return OurStep(model) if variant == "ours" else plain.PlainStep(nll, model)


def train_step(name: str, variant: str, args, **sizes) -> Callable[[], object]:
    model, x0 = build(name, args, **sizes)
    return update_of(model.train(), x0, variant, plain.NLL[name])


def evaluation(name: str, variant: str, args) -> Callable[[], object]:
    model, x0 = build(name, args)
    return evaluation_of(model, x0, variant, plain.NLL[name])


def evaluation_of(
    model, x0: Tensor, variant: str, nll: Callable[..., Tensor]
) -> Callable[[], object]:
    """The losses of a batch of ids, without gradients; `plain` those that nll gives."""
    model.eval()
    batch = {"input_ids": x0, "attention_mask": torch.ones_like(x0)}

    @torch.no_grad()
    def step() -> object:
        with model.autocast():
            return model.loss(batch) if variant == "ours" else nll(model, x0)

    return step


class SamplingCase(NamedTuple):
    """A row of the table of samplers."""

    algorithm: str
    predictor: str
    batch: int = 0  # 0: --sample-batch
    steps: float = 1  # times --sampling-steps
    length: int = 1  # times --length

    def num_steps(self, args: argparse.Namespace) -> int:
        return max(1, round(self.steps * args.sampling_steps))


SAMPLING = (
    SamplingCase("duo_base", "ancestral"),
    SamplingCase("duo_base", "psi"),
    SamplingCase("mdlm", "ancestral"),
    SamplingCase("mdlm", "ancestral_cache", batch=1, steps=4),
    SamplingCase("mdlm", "ancestral_cache", batch=16, steps=0.25),
    SamplingCase("mdlm", "psi"),
    SamplingCase("mdlm", "first_hitting"),
    SamplingCase("mdlm", "confidence"),
    SamplingCase("mdlm", "entropy_bound"),
    SamplingCase("sedd", "analytic"),
    SamplingCase("ar", "ancestral", length=2),
)


def sampling(
    case: SamplingCase, variant: str, args, num_steps: int | None = None
) -> Callable[[], object]:
    """A batch of samples.

    Args:
        case: What is sampled.
        variant: plain or ours.
        args: The benchmark's arguments.
        num_steps: None takes the case's.
    """
    if num_steps is None:
        num_steps = case.num_steps(args)
    modes = [f"sampling.psi.{phase}_mode=constant-0.5" for phase in psi.PHASES]
    predictor = (f"sampling.predictor={case.predictor}", *modes)
    length = case.length * args.length
    model, _ = build(case.algorithm, args, *predictor, length=length)
    model.eval()
    batch = case.batch or args.sample_batch
    if variant == "ours":
        return lambda: model.generate_samples(batch, num_steps=num_steps)
    return lambda: plain_sampling.sample(case.predictor, model, batch, num_steps)


def loss_alone(name: str, variant: str, args, **sizes) -> Callable[[], object]:
    """Corruption, head and loss with their gradients, without trunk and optimiser."""
    model, x0 = build(name, args, **sizes)
    width = model.backbone.output_embedding.weight.shape[1]
    hidden = torch.randn(*x0.shape, width, device=args.device, requires_grad=True)
    return _loss_of(model, x0, hidden, variant, plain.NLL[name])


def _loss_of(
    model, x0: Tensor, hidden: Tensor, variant: str, nll: Callable[..., Tensor]
) -> Callable[[], object]:
    """A loss of hidden states (B, L, D), with gradients, as of any trunk."""
    model.backbone.trunk = lambda x, *_, **__: hidden[:, : x.shape[1]]

    def step() -> None:
        model.zero_grad()
        hidden.grad = None
        with model.autocast():
            if variant == "ours":
                loss = model.nll(x0).total
            else:
                loss = nll(model, x0).sum()
        loss.backward()

    return step


IMAGE_ALGORITHMS = ("duo_base", "mdlm")


def build_images(name: str, args: argparse.Namespace, batch_size: int | None = None):
    """A U-Net without classes, and images of 32 x 32 random pixels."""
    batch_size = args.image_batch if batch_size is None else batch_size
    levels = args.image_levels
    config = compose(
        f"algo={name}",
        "algo.backbone=unet",
        "data=cifar10",
        "data.num_classes=null",
        "model=unet",
        f"model.ch={args.channels}",
        f"model.ch_mult={[1] + [2] * (levels - 1)}",
        f"model.num_scales={levels}",
        f"model.num_res_blocks={args.res_blocks}",
        "model.dropout=0",
        f"loader.global_batch_size={batch_size}",
        f"trainer.accelerator={args.device}",
        f"trainer.precision={args.precision}",
        f"training.compile={args.compile}",
        f"training.loss_compile={args.loss_compile}",
        f"training.loss_chunk={args.loss_chunk}",
    )
    torch.manual_seed(0)
    model = algorithm_class(config)(config, PixelTokenizer()).to(args.device)
    shape = (batch_size, config.model.length)
    return model, torch.randint(256, shape, device=args.device)


def image_step(name: str, variant: str, args, **sizes: int) -> Callable[[], object]:
    """A train step of a U-Net."""
    model, x0 = build_images(name, args, **sizes)
    return update_of(model.train(), x0, variant, plain.NLL[name])


def image_loss(name: str, variant: str, args, **sizes: int) -> Callable[[], object]:
    """Corruption, head and loss with their gradients, without the U-Net's trunk."""
    model, x0 = build_images(name, args, **sizes)
    hidden = torch.rand(*x0.shape, 2, device=args.device, requires_grad=True)
    return _loss_of(model, x0, hidden, variant, plain.NLL[name])


def image_samples(
    name: str, variant: str, args, num_steps: int | None = None
) -> Callable[[], object]:
    """A batch of images."""
    model, _ = build_images(name, args)
    model.eval()
    batch, steps = args.image_batch, num_steps or max(1, args.sampling_steps // 2)
    if variant == "ours":
        return lambda: model.generate_samples(batch, num_steps=steps)
    return lambda: plain_sampling.sample("ancestral", model, batch, steps)


class CurriculumCase(NamedTuple):
    """A row of the table of soft inputs, or of that of distillations."""

    label: str
    algorithm: str
    overrides: tuple[str, ...] = ()

    @property
    def nll(self) -> Callable[..., Tensor]:
        """The plain losses of tokens, or their mean."""
        return (plain_curriculum.NLL | plain_distillation.NLL)[self.algorithm]


def soft(mode: str, log10_tau: float, *more: str) -> tuple[str, ...]:
    taus = (
        f"algo.curriculum.gumbel_tau_log10_{x}={log10_tau}" for x in ("start", "end")
    )
    return (f"algo.curriculum.mode={mode}", *taus, *more)


CURRICULUM = (
    CurriculumCase("duo, simple, tau = 1e-1", "duo", soft("simple", -1)),
    CurriculumCase("duo, simple, tau = 1e-3", "duo", soft("simple", -3)),
    CurriculumCase(
        "duo, poly9, top_k = 32", "duo", soft("poly9", -3, "algo.curriculum.top_k=32")
    ),
)
DISTILLATION = (
    CurriculumCase("DCD, kl-bwd", "distillation"),
    CurriculumCase("SDTT, kl-bwd, two steps of the teacher", "sdtt"),
    CurriculumCase("DI[M]O, generator and auxiliary model", "dimo"),
)
TRAINING = CURRICULUM + DISTILLATION


def curriculum_model(case: CurriculumCase, args, **sizes: int):
    """A model in training mode, and clean ids."""
    sizes = {"batch_size": args.curriculum_batch} | sizes
    model, x0 = build(case.algorithm, args, *case.overrides, **sizes)
    return model.train(), x0


def curriculum_step(
    index: str, variant: str, args, **sizes: int
) -> Callable[[], object]:
    """A train step of `TRAINING[index]`."""
    case = TRAINING[int(index)]
    model, x0 = curriculum_model(case, args, **sizes)
    return update_of(model, x0, variant, case.nll)


def scored_tokens(name: str, model, x0: Tensor) -> int:
    """Tokens whose logits a train step needs."""
    if name == "ar":
        return x0.numel() - len(x0)
    scored = model.corrupt(x0, model.sample_t(len(x0))).scored
    drawn = x0.numel() if scored is None else len(scored)
    return drawn + (x0.numel() if name == "d3pm" else 0)


def trunk_tokens(name: str, x0: Tensor) -> int:
    """Tokens that a train step takes through the trunk; D3PM's last term, too."""
    return (2 if name == "d3pm" else 1) * x0.numel()
