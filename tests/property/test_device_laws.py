"""On a device that is not the host, with no GPU at hand: steps of training, evaluation
and sampling keep their tensors on it, never wait for it but where docs/performance.md
says so, and give the numbers of the CPU.

The device is that of `accelerator.py`. Algorithms and samplers are those of the
registries.
"""

import collections
import re

import pytest
import torch
from accelerator import DEVICE, StandIn
from chunking import padded, random_batch
from command_line import ROOT
from steps import Update, moved
from tiny import ALGORITHMS

from benchmarks import bench, cases
from models.device import to_device
from sampling.prompts import Given
from sampling.registry import SAMPLERS, samplers_of
from training.scorable import Stratum
from utils import register_resolvers

NOISED = "sampling.psi.{}_mode=constant-0.5"
PSI = tuple(NOISED.format(phase) for phase in ("high", "middle", "low"))

# ---------------------------------------------------------------- training


def check_update(make_model, *overrides, batch=random_batch):
    models = [make_model(*overrides) for _ in range(2)]
    check_equal(*models, batch(models[0]))


def check_equal(model, other, inputs):
    """Two updates on the device, of which the second is watched, and two on the CPU."""
    right = Update(other, inputs)
    right()
    expected = right()
    with StandIn() as device:
        model.to(DEVICE)
        update = Update(model, moved(inputs, DEVICE))
        update()
        with device.watched():
            loss = update()
    torch.testing.assert_close(loss.numbers, expected, rtol=1e-4, atol=1e-6)
    for x, y in zip(update.kept(), right.kept(), strict=True):
        torch.testing.assert_close(x.numbers, y.detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, "auto"])
def test_an_update_stays_on_the_device(make_model, algo_name, chunk):
    check_update(make_model, f"algo={algo_name}", f"training.loss_chunk={chunk}")


def labelled(model):
    return random_batch(model) | {"labels": torch.tensor([0, 1, 1, 0])}


def padded_batch(model):
    return padded(random_batch(model))


ALONE = "eval.generate_samples=False"
DIMAMBA = ("algo.backbone=dimamba", "model=tiny-dimamba")


@pytest.mark.parametrize(
    ("batch", "overrides"),
    [
        (padded_batch, ("algo=ar", "data.wrap=False", "loader.batch_size=2")),
        (padded_batch, ("algo=mdlm", "data.wrap=False", "loader.batch_size=2")),
        (labelled, ("algo=mdlm", "data.num_classes=2", "training.class_dropout_p=0.5")),
        (labelled, ("algo=duo", "data.num_classes=2", "training.class_dropout_p=0.5")),
        (random_batch, ("algo=mdlm", *DIMAMBA)),
        (random_batch, ("algo=duo", *DIMAMBA)),
        (random_batch, ("algo=duo_base", "training.activation_checkpointing=True")),
        (random_batch, ("algo=mdlm", "training.importance_sampling=True")),
        (random_batch, ("algo=mdlm", "training.change_of_variables=True")),
        (random_batch, ("algo=mdlm", "algo.ignore_bos=True")),
        (random_batch, ("algo=d3pm", "algo.T=10")),
        (random_batch, ("algo=duo", "algo.curriculum.mode=poly9")),
        (random_batch, ("algo=duo", "algo.curriculum.mode=series")),
        (random_batch, ("algo=duo", "algo.curriculum.gumbel_tau_log10_start=-3")),
        (random_batch, ("algo=duo_base", "algo.compat=reference")),
        (random_batch, ("algo=distillation", "algo.loss_type=kl-fwd")),
        (random_batch, ("algo=sdtt", "algo.sampling_mode=analytic")),
        (random_batch, ("algo=sdtt", "algo.distill_mode=mse")),
        (random_batch, ("algo=dimo", "algo.init_tokens=data")),
        (random_batch, ("algo=dimo", "algo.init_tokens=unigram")),
        (random_batch, ("algo=dimo", "algo.aux_soft_weight=0.5")),
        (random_batch, ("algo=mdlm", "training.loss_precision=float64")),
        (random_batch, ("algo=mdlm", "training.loss_chunk=null")),
        (random_batch, ("algo=duo", "training.loss_chunk=null")),
        (random_batch, ("algo=mdlm", "algo.block_size=2", ALONE)),
        (random_batch, ("algo=sedd", "algo.block_size=[4,2]", ALONE)),
        (random_batch, ("algo=d3pm", "algo.block_size=4", ALONE)),
        (random_batch, ("algo=duo_base", "algo.block_size=[1,2]", ALONE)),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, tuple) else x.__name__,
)
def test_other_settings_stay_on_the_device(make_model, batch, overrides):
    check_update(make_model, *overrides, batch=batch)


@pytest.mark.parametrize("name", cases.IMAGE_ALGORITHMS)
def test_images_stay_on_the_device(name):
    """A U-Net with its head without a matrix."""
    register_resolvers()
    args = bench.parse(["--channels", "8", "--image-levels", "2", "--image-batch", "2"])
    models = [cases.build_images(name, args)[0] for _ in range(2)]
    check_equal(*models, random_batch(models[0], 2))


# ---------------------------------------------------------------- evaluation


def test_an_evaluation_stays_on_the_device(make_model, algo_name):
    """With EMA weights, as validations have them."""
    model, other = (make_model(f"algo={algo_name}") for _ in range(2))
    batch = random_batch(model)
    with torch.no_grad():
        other.validation_step(batch, 1)
    with StandIn() as device:
        model.to(DEVICE)
        batch = moved(batch, DEVICE)
        model.ema = model.make_ema()
        with device.watched(), model.eval_weights(), torch.no_grad():
            model.validation_step(batch, 1)
        sums = model.valid_likelihood.sums()
    expected = other.valid_likelihood.sums()
    torch.testing.assert_close(sums.numbers, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("score", ["nll_given", "regret_given"])
def test_scores_stay_on_the_device(make_model, algo_name, score):
    """Of a text whose first half is given; what is given is known to the host."""
    model = make_model(f"algo={algo_name}")
    x0 = random_batch(model)["input_ids"]
    known = torch.arange(x0.shape[1]).expand(x0.shape) < 4
    strata = [Stratum(seed) for seed in range(len(x0))]
    with torch.no_grad():
        expected = getattr(model, score)(x0, known, strata)
    with StandIn() as device:
        model.to(DEVICE)
        x0 = x0.to(DEVICE)
        with device.watched(), torch.no_grad():
            found = getattr(model, score)(x0, known, strata)
    torch.testing.assert_close(found.numbers, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- sampling

# Every sampler of the registry with every algorithm that it fits.
PAIRS = [
    (predictor, name)
    for predictor in SAMPLERS
    for name, algorithm in ALGORITHMS.items()
    if any(sampler.fits(algorithm) for sampler in samplers_of(predictor))
]
STEPS = 3
GIVEN = torch.full((3, 8), 3), torch.arange(24).view(3, 8) % 9 == 2
# First hitting takes L = 8 steps; a block is a call of its sampler.
LIMITS = {"call": 1, "step": 8 + 1, "block": 1}


def documented_waits() -> dict[str, str]:
    """Places at which samplers wait -> how often, from the table of the docs."""
    text = (ROOT / "docs" / "performance.md").read_text()
    rows = re.findall(r"^\| `(\S+\.py:\S+)` \| once a (\w+) \|", text, re.M)
    return dict(rows)


def check_samples(make_model, *overrides, calls=1, **options):
    """On the device as on the CPU, with no more waits than the docs say."""
    model = make_model(f"sampling.steps={STEPS}", *overrides)
    seeded = torch.Generator().manual_seed(3)
    expected = model.generate_samples(3, generator=seeded, **options)
    allowed = documented_waits()
    with StandIn() as device:
        model.to(DEVICE)
        seeded = torch.Generator(DEVICE).manual_seed(3)
        with device.watched(*allowed) as waits:
            samples = model.generate_samples(3, generator=seeded, **options)
    assert torch.equal(samples.tokens.numbers, expected.tokens)
    assert torch.equal(samples.evaluations.numbers, expected.evaluations)
    for place, number in collections.Counter(x.place for x in waits).items():
        assert number <= calls * LIMITS[allowed[place]], f"{place}: {number} waits"


@pytest.mark.parametrize(("predictor", "name"), PAIRS)
def test_a_sampler_waits_where_the_docs_say(make_model, predictor, name, monkeypatch):
    """Exact draws and published ones, whole rows and nuclei."""
    monkeypatch.setattr("sampling.categorical.NUCLEUS_CANDIDATES", 3)  # of K = 7
    base = (f"algo={name}", f"sampling.predictor={predictor}")
    # Of nothing but masks all entropies are equal, and rounding would choose the order.
    options = {"given": Given(*GIVEN)} if predictor == "entropy_bound" else {}
    check_samples(make_model, *base, **options)
    published = ("sampling.use_float64=False", "sampling.p_nucleus=0.9")
    check_samples(make_model, *base, *published, **options)


@pytest.mark.parametrize(
    ("overrides", "options"),
    [
        (("algo=duo_base", "sampling.predictor=psi", *PSI), {}),
        (("algo=mdlm", "sampling.predictor=psi", *PSI), {}),
        (("algo=duo_base", "sampling.noise_removal=greedy"), {}),
        (("algo=mdlm", "algo.ignore_bos=True"), {}),
        (("algo=dimo", "sampling.refine_steps=2"), {}),
        (("algo=dimo", "algo.init_tokens=data"), {}),
        (("algo=dimo", "algo.init_tokens=unigram"), {}),
        (
            ("algo=mdlm", "data.num_classes=2", "sampling.guid_weight=2"),
            {"labels": torch.tensor([0, 1, 1])},
        ),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, tuple) else "",
)
def test_other_samples_wait_where_the_docs_say(make_model, overrides, options):
    check_samples(make_model, *overrides, **options)


def test_windows_wait_as_often_as_calls(make_model):
    stride = ("sampling.stride_length=4", "sampling.num_strides=1")
    check_samples(make_model, "algo=mdlm", "sampling.semi_ar=True", *stride, calls=2)


@pytest.mark.parametrize(
    "overrides",
    [
        ("algo=mdlm", "sampling.num_blocks=6", "sampling.stop_at_eos=True"),
        ("algo=duo_base", "sampling.num_blocks=6"),
        ("algo=mdlm", "sampling.block_cache=False"),
    ],
    ids="-".join,
)
def test_blocks_wait_as_often_as_calls(make_model, overrides):
    check_samples(make_model, *overrides, "algo.block_size=2", calls=6)


def test_the_docs_name_waits_that_there_are():
    """Functions that exist; the tests above find whether they are all."""
    for place in documented_waits():
        file, function = place.split(":")
        assert f"def {function.split('.')[-1]}(" in (ROOT / file).read_text()


# ---------------------------------------------------------------- what is seen


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: bool((x > 0).any()),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: (x > 0).nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: torch.equal(x, x),
        lambda x: x.unique(),
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: torch.ones(3).to(x.device),
        lambda x: x.clone().copy_(torch.ones(x.shape)),
        lambda x: x[torch.zeros(2, dtype=torch.long)],
    ],
)
def test_the_stand_in_sees_what_waits(make_model, monkeypatch, waiting):
    check_seen(make_model("algo=mdlm"), monkeypatch, waiting)


def test_the_stand_in_sees_into_every_loss(make_model, algo_name, monkeypatch):
    check_seen(make_model(f"algo={algo_name}"), monkeypatch, lambda x: x.sum().item())


def check_seen(model, monkeypatch, waiting):
    """In the loss of a token, from where it would be easiest to overlook."""
    names = ("divergence", "token_surrogate", "nll_of_logits")
    name = next(name for name in names if hasattr(model, name))
    token_loss = getattr(model, name)

    def careless(*logits, **inputs):
        waiting(logits[0].detach())
        return token_loss(*logits, **inputs)

    monkeypatch.setattr(model, name, careless)
    with StandIn() as device:
        model.to(DEVICE)
        update = Update(model, moved(random_batch(model), DEVICE))
        line = r"waits for the device at tests/property/test_device_laws\.py:\d+, in "
        with device.watched(), pytest.raises(AssertionError, match=line):
            update()


@pytest.mark.parametrize(
    "mixed",
    [
        lambda x: x + torch.ones(3, 3),
        lambda x: x @ torch.ones(3, 3),
        lambda x: torch.where(torch.ones(3, 3, dtype=torch.bool), x, 0),
        lambda x: torch.cat([x, torch.ones(1, 3)]),
        lambda x: x.index_select(0, torch.zeros(2, dtype=torch.long)),
        lambda x: x.lerp_(torch.ones(3, 3), 0.5),
        lambda x: torch.rand(3, device=x.device, generator=torch.Generator()),
        lambda x: torch.rand(3, generator=torch.Generator(x.device)),
        lambda x: x.normal_(generator=torch.Generator()),
    ],
)
def test_the_stand_in_sees_two_devices(mixed):
    with StandIn():
        x = torch.ones(3, 3, device=DEVICE)
        with pytest.raises(AssertionError, match=r"test_device_laws\.py:\d+, in "):
            mixed(x)


@pytest.mark.parametrize(
    "fine",
    [
        lambda x: x + torch.tensor(2.0),
        lambda x: 2 * x.t(),
        lambda x: to_device(torch.ones(3), x.device) + x,
        lambda x: torch.full((2,), 3.0, device=x.device),
        lambda x: x.masked_fill(x > 2, 1.0),
        lambda x: torch.rand(3, device=x.device, generator=torch.Generator(x.device)),
        lambda x: x[torch.arange(2, device=x.device)],
    ],
)
def test_the_stand_in_lets_pass_what_does_not_wait(fine):
    with StandIn() as device:
        x = torch.ones(3, 3, device=DEVICE)
        with device.watched():
            assert fine(x).device == DEVICE
