"""Laws of the times t that a batch is trained or evaluated at."""

import math

import pytest
import torch

N = 24  # global batch: 2 nodes x 2 devices x 3 accumulated batches of 2
SHARDED = (
    "trainer.num_nodes=2",
    "trainer.devices=2",
    f"loader.global_batch_size={N}",
    "loader.batch_size=2",
)
WHOLE = (f"loader.global_batch_size={N}", "trainer.devices=1")


@pytest.fixture
def model_of(make_model, diffusion_name):
    """A training model in continuous time, where the algorithm has one."""

    def build(*overrides):
        model = make_model(f"algo={diffusion_name}", *overrides).train()
        model.T = 0
        return model

    return build


def shards(model, place, step=0):
    """Times of all micro-batches and ranks, in the order of the global batch."""
    times = []
    for micro in range(3):  # an update; batch_idx counts them over the epoch
        for rank in range(4):
            place(model, rank=rank, step=step)
            times.append(model.sample_t(2, batch_idx=3 * step + micro))
    return torch.cat(times)


def test_one_time_in_each_of_n_intervals(model_of):
    """u_i in [i / n, (i + 1) / n): a global batch covers the unit interval evenly."""
    model = model_of(*WHOLE)
    t = model.sample_t(N)
    eps = model.sampling_eps
    u = (t - eps) / (1 - eps)
    first = torch.arange(N, dtype=torch.float64) / N
    assert t.dtype == torch.float64
    assert bool((u >= first - 1e-12).all())
    assert bool((u < first + 1 / N + 1e-12).all())


@pytest.mark.parametrize("antithetic", [True, False])
def test_shards_partition_the_global_grid(model_of, place, antithetic):
    """Micro-batch by micro-batch, node by node, device by device: one process's n."""
    choice = f"training.antithetic_sampling={antithetic}"
    whole, sharded = model_of(*WHOLE, choice), model_of(*SHARDED, choice)
    assert sharded.config.trainer.accumulate_grad_batches == 3
    place(whole, step=5)
    expected = whole.sample_t(N)
    assert expected.unique().numel() == N
    assert torch.equal(shards(sharded, place, step=5), expected)


def test_a_short_last_batch_takes_the_first_of_its_times(model_of):
    model = model_of(*WHOLE)
    assert torch.equal(model.sample_t(5), model.sample_t(N)[:5])


def test_training_times_depend_on_step_and_seed_only(model_of, place):
    model, other_seed = model_of(*SHARDED), model_of(*SHARDED, "seed=2")
    first = shards(model, place, step=1)
    assert torch.equal(shards(model, place, step=1), first)
    assert not torch.equal(shards(model, place, step=2), first)
    assert not torch.equal(shards(other_seed, place, step=1), first)


def test_published_orders_deal_rows_out_one_by_one(model_of, place):
    """With algo.compat=reference rank r has the rows r, r + W, ... of a micro-batch."""
    published = "algo.compat=reference"
    whole, sharded = model_of(*WHOLE, published), model_of(*SHARDED, published)
    times = []
    for micro in range(3):
        ranks = []
        for rank in range(4):
            place(sharded, rank=rank)
            ranks.append(sharded.sample_t(2, batch_idx=micro))
        times.append(torch.stack(ranks, dim=1).flatten())
    place(whole)
    assert torch.equal(torch.cat(times), whole.sample_t(N))


def test_evaluation_times_do_not_depend_on_the_step(model_of, place):
    """Every validation of a run sees the same times."""
    model = model_of(*SHARDED).eval()
    place(model, step=1)
    first = model.sample_t(7, batch_idx=2)
    place(model, step=9)
    assert torch.equal(model.sample_t(7, batch_idx=2), first)
    assert not torch.equal(model.sample_t(7, batch_idx=3), first)
    place(model, rank=1, step=9)
    assert not torch.equal(model.sample_t(7, batch_idx=2), first)


@pytest.mark.parametrize("antithetic", [True, False])
def test_evaluation_times_are_of_rows(model_of, place, antithetic):
    """However many ranks there are, and whatever the size of batches is."""
    choice = f"training.antithetic_sampling={antithetic}"
    found = []
    for devices, size in ((1, 24), (1, 4), (2, 3), (4, 2)):
        sizes = (f"trainer.devices={devices}", f"loader.eval_batch_size={size}")
        sizes += ("loader.global_batch_size=24", "loader.eval_global_batch_size=24")
        model = model_of(choice, *sizes).eval()
        times = []
        for batch_idx in range(24 // (devices * size)):
            for rank in range(devices):
                place(model, rank=rank)
                times.append(model.sample_t(size, batch_idx))
        found.append(torch.cat(times))
    for other in found[1:]:
        assert torch.equal(other, found[0])


@pytest.mark.parametrize(("size", "batch_idx"), [(5, 0), (100, 999), (4096, 3)])
def test_any_run_of_evaluation_times_is_even(model_of, place, batch_idx, size):
    """Golden-ratio points: n of them differ from the uniform law by less than
    3 / n + log(n) / n, against 0.9 / sqrt(n) of independent ones."""
    model = model_of(*WHOLE, f"loader.eval_batch_size={size}").eval()
    place(model)
    u = (model.sample_t(size, batch_idx) - model.sampling_eps).sort().values
    u = u / (1 - model.sampling_eps)
    grid = torch.arange(size, dtype=torch.float64) / size
    distance = float(torch.maximum(u - grid, grid + 1 / size - u).max())
    assert distance < (3 + math.log(size)) / size


@pytest.mark.parametrize("antithetic", [True, False])
def test_times_stay_above_sampling_eps(model_of, antithetic):
    """t in [eps, 1), and close to both ends among many draws."""
    model = model_of(
        "loader.global_batch_size=20000",
        "training.sampling_eps=0.25",
        f"training.antithetic_sampling={antithetic}",
    )
    t = model.sample_t(20000)
    assert 0.25 <= t.min() < 0.251
    assert 0.999 < t.max() < 1
    # 5 sigma of the mean of independent uniform draws
    assert float(t.mean()) == pytest.approx(0.625, abs=5 * 0.75 / (12 * 20000) ** 0.5)


@pytest.mark.parametrize("T", [1, 7, 1000])
def test_discrete_times_are_multiples_of_1_over_T(model_of, T):
    """All of 1/T, 2/T, ..., 1, as long as sampling_eps is below 1/T."""
    model = model_of("loader.global_batch_size=20000", "training.sampling_eps=1e-6")
    model.T = T
    t = model.sample_t(20000)
    steps = (t * T).round()
    torch.testing.assert_close(steps / T, t, rtol=0, atol=1e-12)
    assert steps.min() == 1
    assert steps.max() == T
    assert steps.unique().numel() == T


def test_noise_differs_between_rows_and_updates_but_replays(model_of, place, laws):
    """A function of the update and of a row's index, not of where else it is."""
    model = model_of(*SHARDED)
    x0 = laws.clean(model)[:1].expand(8, 64)
    t = torch.full((8,), 0.5, dtype=torch.float64)

    def noised(rank, step, batch_idx):
        place(model, rank=rank, step=step)
        return model.corrupt(x0, t, batch_idx).xt

    base = noised(0, 3, 9)
    assert torch.equal(noised(0, 3, 9), base)
    assert torch.equal(noised(0, 3, 12), base)  # the first micro-batch of its update
    for place_in_run in ((1, 3, 9), (0, 4, 9), (0, 3, 10)):
        assert not torch.equal(noised(*place_in_run), base)
    for row in base[1:]:
        assert not torch.equal(row, base[0])


def test_discrete_time_replaces_the_derivative_by_a_difference(make_model):
    """dalpha_t = T (alpha_t - alpha_(t - 1/T)), with alpha_0 at the first time."""
    model = make_model("algo=mdlm", "algo.T=4", "noise=cosine")
    t = torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64)
    z = model.corrupt(torch.zeros(3, 8, dtype=torch.long), t)
    alpha = model.noise(torch.tensor([[0, 0.25, 0.5, 0.75, 1.0]]).double()).alpha_t[0]
    expected = 4 * torch.stack(
        [alpha[1] - alpha[0], alpha[2] - alpha[1], alpha[4] - alpha[3]]
    )
    torch.testing.assert_close(z.dalpha_t[:, 0], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(z.alpha_t[:, 0], alpha[[1, 2, 4]], rtol=0, atol=1e-12)
