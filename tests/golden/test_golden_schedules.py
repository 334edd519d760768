"""The psi sampler's times and kappas.

Known errors of the reference, and what ours does instead:

* profiles `...-inv` turn a signal level into a time with an inverse schedule that
  ignores eps; ours is the time at which the schedule has that level, 1 / (1 - eps)
  times the reference's;
* max-rescale-ETA multiplies by ETA twice; ours is ReMDM's
  sigma_t = ETA min(1, (1 - alpha_s) / alpha_t). `PublishedPsiSchedule`, which is
  `algo.compat=reference`, gives the reference's;
* a phase of exactly one time fails in modes that follow the schedule; ours gives it
  the kappa of a phase's last time, 1.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from golden_cases import Case, close, for_cases
from golden_models import inverse_of_reference
from omegaconf import OmegaConf
from torch import Tensor

from models.noise import SCHEDULES, Noise
from sampling.psi import PHASES, PSI_SCHEDULES, KappaRule, PsiSchedule

Row = dict[str, Any]
PROFILE = ("time_profile", "high_frac", "middle_frac")
PLAIN = ["pure-posterior"] * len(PHASES)
FAILS = "the reference fails"  # in place of a tensor's name


def rows_of(case: Case) -> list[Row]:
    assert case.values["rows"]
    return case.values["rows"]


def sequences(row: Row, fails: bool = False) -> Iterator[tuple[list[str], str]]:
    """(mode of each phase, name of the recorded kappas) of a row's sequences.

    Args:
        fails: Those without a record, instead.
    """
    for modes, name in row["kappas"].items():
        if name.startswith(FAILS) == fails:
            yield modes.split("|"), name


def schedule(row: Row, modes: list[str], rescales_twice: bool = True) -> PsiSchedule:
    config = {key: row[key] for key in PROFILE}
    for phase, mode in zip(PHASES, modes, strict=True):
        config[f"{phase}_mode"] = mode
    kind = PSI_SCHEDULES["reference" if rescales_twice else "paper"]
    return kind(OmegaConf.create(config))


def times(row: Row, noise: Noise) -> Tensor:
    """Our time grid of a row, (steps + 1,); the modes do not matter for it."""
    return schedule(row, PLAIN).times(noise, row["steps"], row["eps"])


def noise_of(case: Case, row: Row) -> Noise:
    """The row's schedule; its eps is the published one if the case states none."""
    return SCHEDULES[row["noise"]](case.setting("noise.eps", 1e-3))


def as_reference(case: Case, row: Row) -> Noise:
    """The row's schedule, with the reference's inverse."""
    noise = noise_of(case, row)
    noise.inverse = inverse_of_reference(row["noise"])
    return noise


def alphas_of(case: Case, row: Row) -> Tensor:
    """Signal levels of the row's time grid, (steps + 1,) float64."""
    noise = as_reference(case, row)
    return noise(times(row, noise)).alpha_t


def kappas(
    case: Case, row: Row, modes: list[str], rescales_twice: bool = True
) -> Tensor:
    """Our kappas at the row's times, (steps + 1,) float64."""
    found = schedule(row, modes, rescales_twice).kappas(alphas_of(case, row))
    return torch.tensor(found, dtype=torch.float64)


# ---------------------------------------------------------------- times


@for_cases("sampling", holding="rows")
def test_times(case):
    """Every recorded time grid, given the reference's inverse schedule."""
    for row in rows_of(case):
        ours = times(row, as_reference(case, row))
        assert ours.dtype == torch.float64
        case.check(f"{row['id']}/t", ours)


@for_cases("sampling", holding="rows")
def test_times_of_exact_inverse(case):
    """With our inverse a plateau given as a signal level has just that level; its
    recorded time is (1 - eps) times ours. Other profiles do not ask for the inverse."""
    for row in rows_of(case):
        noise = noise_of(case, row)
        name, ours = f"{row['id']}/t", times(row, noise)
        profile, is_inverse, _ = row["time_profile"].partition("-inv")
        if not is_inverse:
            case.check(name, ours)
            continue
        sizes = schedule(row, PLAIN).phase_sizes(row["steps"])
        golden, plateau = (x.split(sizes)[1].double() for x in (case[name], ours))
        level = torch.full_like(plateau, float(profile.rpartition("-")[2]))
        close(noise(plateau).alpha_t, level, f"{case}: {name}", atol=1e-12)
        limits = case.tolerance(name)
        close(plateau, golden / (1 - noise.eps), f"{case}: {name}", **limits)
        if (plateau * noise.eps > 2 * limits.get("atol", 0)).any():
            with pytest.raises(AssertionError):
                case.check(name, ours)


# ---------------------------------------------------------------- kappas


@for_cases("sampling", holding="rows")
def test_kappas(case):
    """Every recorded sequence, in modes of all kinds.

    Ours are float64, the recorded ones float32: near t = 0 their 1 - alpha_s has few
    digits left, but kappa is there 1 - 1 / alpha_t or cut off at 0, so the stated
    tolerance holds throughout.
    """
    checked = 0
    for row in rows_of(case):
        for modes, name in sequences(row):
            ours, golden = kappas(case, row, modes), case[name]
            what = f"{case}: {name}, {modes}"
            limits = case.tolerance(name)
            close(ours, golden, what, **limits)
            assert ((ours >= 0) & (ours <= 1)).all(), what
            checked += 1
    assert checked


@for_cases("sampling", holding="rows")
def test_rescaling_of_the_paper(case):
    """max-rescale-ETA of our default is kappa = 1 - sigma_t / (1 - alpha_s) with
    sigma_t = ETA min(1, (1 - alpha_s) / alpha_t); recorded is the same with ETA in
    place of the 1 inside, and they differ."""
    found, differing = 0, 0
    for row in rows_of(case):
        alphas = alphas_of(case, row)
        for modes, name in sequences(row):
            if len(set(modes)) > 1 or not modes[0].startswith("max-rescale"):
                continue
            eta = float(modes[0].rpartition("-")[2])
            sizes = schedule(row, modes).phase_sizes(row["steps"])
            limits = case.tolerance(name)
            for largest, twice in ((1.0, False), (eta, True)):
                phases = (rescaled(x, eta, largest) for x in alphas.split(sizes))
                law, ours = torch.cat(list(phases)), kappas(case, row, modes, twice)
                close(ours, law, f"{case}: {name}, {modes}", atol=1e-12)
                if twice:
                    close(law, case[name], f"{case}: {name}, {modes}", **limits)
                else:
                    off = (ours - case[name].double()).abs().max()
                    found += 1
                    differing += bool(off > 10 * limits.get("atol", 0))
    if not found:
        pytest.skip(f"{case} has no sequence of max-rescale alone")
    assert differing


def rescaled(alphas: Tensor, eta: float, largest: float) -> Tensor:
    """Kappas of a phase, (n,): sigma_t = eta min(largest, (1 - alpha_s) / alpha_t)."""
    alpha_t, alpha_s = alphas[:-1], alphas[1:]
    sigma_t = eta * ((1 - alpha_s) / alpha_t).clamp(max=largest)
    kappa = (1 - sigma_t / (1 - alpha_s)).clamp(min=0)
    return torch.cat([kappa, kappa.new_ones(min(1, len(alphas)))])


@for_cases("sampling", holding="rows")
def test_phase_of_one_time(case):
    """Where the reference fails a phase has one time. Ours gives it kappa = 1, as to
    the last time of a longer phase, and it has no say in the other phases."""
    for row in rows_of(case):
        for modes, _ in sequences(row, fails=True):
            sizes = schedule(row, modes).phase_sizes(row["steps"])
            ours = kappas(case, row, modes)
            assert len(ours) == row["steps"] + 1
            plain = list(modes)
            for phase, kappa in enumerate(ours.split(sizes)):
                follows = KappaRule.parse(modes[phase], "mode").follows_schedule
                if follows and sizes[phase] == 1:
                    assert float(kappa) == 1
                    plain[phase] = PLAIN[phase]
            assert plain != modes, f"row {row['id']}: {modes} fails for another reason"
            assert torch.equal(ours, kappas(case, row, plain))
