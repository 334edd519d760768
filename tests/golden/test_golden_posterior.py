"""One reverse step q(x_s | x_t, p) from given clean distributions p, and its mixture
with a prediction of x_0 that is noised again, the psi sampler's.

Known errors of the reference, absorbing state: at revealed tokens it returns p itself,
so all but MDLM, whose p is one-hot there, draw revealed tokens anew at every step; and
rows are not normalised where p has mass on the mask. Ours keeps revealed tokens and
takes the mask out of p. `algo.compat=reference` gives D3PM the old rows back, because
published samples were made with them.

Another follows from the first: at revealed tokens the prediction of x_0 may be the
mask, and noising sets its probability to 1 - alpha_s instead of adding that. No
published sample mixes such rows, so there is no switch back.
"""

import re

import torch
import torch.nn.functional as F
from golden_cases import Case, close, for_cases
from golden_models import build
from torch import Tensor


def model_of(case: Case, **settings):
    return build(case, weights=None, model__n_blocks=1, **settings)


def posterior_steps(case: Case) -> dict[str, tuple[Tensor, Tensor]]:
    """(alpha_s, alpha_t) of every recorded posterior, (B, 1) each, by its name.

    `posterior_to_0` is the step to alpha_s = 1. Signal levels are float32 there.
    """
    column = torch.ones(len(case["xt"]), 1)
    found = {}
    for index, (alpha_s, alpha_t) in enumerate(case.values["alpha_pairs_s_t"]):
        found[f"{index}/posterior_to_0"] = (column, alpha_t * column)
        found[f"{index}/posterior"] = (alpha_s * column, alpha_t * column)
    return found


def posteriors(case: Case, model) -> dict[str, Tensor]:
    """Ours for every recorded posterior, by its name, (B, L, K) each."""
    return {
        name: model.posterior(
            case["p_x0"], xt=case["xt"], alpha_t=alpha_t, alpha_s=alpha_s
        )
        for name, (alpha_s, alpha_t) in posterior_steps(case).items()
    }


def mixtures(case: Case, model, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the psi sampler makes of posteriors, by its recorded name, (B, L, K) each:

        renoised  = q(x_s), x_0 ~ posterior_to_0
        mix_kappa = kappa posterior + (1 - kappa) renoised

    Args:
        rows: Posteriors, by their names.
    """
    found = {}
    for index, (alpha_s, _) in enumerate(case.values["alpha_pairs_s_t"]):
        column = torch.full((len(case["xt"]), 1), alpha_s)
        renoised = model.marginal(rows[f"{index}/posterior_to_0"], column)
        found[f"{index}/renoised"] = renoised
        for kappa in case.values["kappas"]:
            mixture = kappa * rows[f"{index}/posterior"] + (1 - kappa) * renoised
            found[f"{index}/mix_{kappa}"] = mixture
    return found


def row_sums(rows: dict[str, Tensor]) -> Tensor:
    """Sums over the vocabulary of each step's posterior, (steps, B, L)."""
    kept = [x.sum(dim=-1) for name, x in rows.items() if name.endswith("/posterior")]
    return torch.stack(kept)


def expected(case: Case, name: str) -> Tensor:
    """Recorded rows of a posterior (B, L, K), with both errors of the reference undone
    if it made them.

    Revealed tokens stay. At a mask, p loses its mass on the mask: tokens are divided
    by 1 - p[m]; the mask's own probability is right as it is.
    """
    golden, mask = case[name], case.values["mask_index"]
    if is_sound(case):
        return golden
    is_mask = torch.arange(golden.shape[-1]) == mask
    rest = 1 - case["p_x0"][..., mask : mask + 1]
    at_mask = torch.where(is_mask, golden, golden / rest)
    revealed = F.one_hot(case["xt"], golden.shape[-1]).to(golden.dtype)
    return torch.where((case["xt"] == mask)[..., None], at_mask, revealed)


def expected_mixture(case: Case, name: str, undo: bool = True) -> Tensor:
    """Recorded `renoised` or `mix_kappa` (B, L, K), with what its reference lost.

    These are linear in the posteriors: what is missing in a posterior is missing in
    them, times its weight. What noising forgets of the mask is always given back.

    Args:
        undo: Whether to undo the errors of the posteriors, too.
    """
    index, kind = name.split("/")
    alpha_s = case.values["alpha_pairs_s_t"][int(index)][0]
    kappa = 0.0 if kind == "renoised" else float(kind.removeprefix("mix_"))
    now, clean = f"{index}/posterior", f"{index}/posterior_to_0"
    right = expected if undo else Case.__getitem__
    in_now = right(case, now) - case[now]
    in_clean = right(case, clean) - noised_from(case, clean)
    return case[name] + kappa * in_now + (1 - kappa) * alpha_s * in_clean


def noised_from(case: Case, name: str) -> Tensor:
    """The recorded posterior to 0 as the reference's noising takes it: no mask."""
    mask = case.values["mask_index"]
    if mask is None:
        return case[name]
    return case[name].index_fill(-1, torch.tensor(mask), 0)


def is_sound(case: Case) -> bool:
    """Whether all recorded rows are distributions that keep revealed tokens: uniform
    states, and MDLM's one-hot predictions."""
    mask = case.values["mask_index"]
    if mask is None:
        return True
    revealed = case["xt"] != mask
    kept = case["p_x0"].gather(-1, case["xt"][..., None]).squeeze(-1)
    return bool((kept[revealed] == 1).all() and (case["p_x0"][..., mask] < 1e-12).all())


@for_cases("posterior", holding="p_x0")
def test_posterior(case):
    """Ours are the recorded rows with the reference's two errors undone, which for
    MDLM and uniform states means as they are; and they are distributions."""
    model = model_of(case)
    xt = case["xt"]
    for name, ours in posteriors(case, model).items():
        close(ours, expected(case, name), f"{case}: {name}", **case.tolerance(name))
        assert (ours >= 0).all()
        one = torch.ones(xt.shape)
        close(ours.sum(dim=-1), one, f"{case}: sums of {name}", atol=1e-6)
        if model.mask_index is not None:
            revealed = xt != model.mask_index
            assert torch.equal(ours.argmax(dim=-1)[revealed], xt[revealed])
            assert (ours.amax(dim=-1)[revealed] == 1).all()


@for_cases("posterior", holding="kappas")
def test_mixture(case):
    """Forward noising of a distribution, and the psi sampler's mixture at every kappa:
    the recorded rows with the reference's errors undone, and distributions."""
    model = model_of(case)
    rows = mixtures(case, model, posteriors(case, model))
    recorded = {name for name in case.stated if re.search(r"/(mix_|renoised)", name)}
    assert recorded == set(rows)
    for name, ours in rows.items():
        golden = expected_mixture(case, name)
        close(ours, golden, f"{case}: {name}", **case.tolerance(name))
        assert (ours >= 0).all()
        one = torch.ones(case["xt"].shape)
        close(ours.sum(dim=-1), one, f"{case}: sums of {name}", atol=1e-6)


@for_cases("posterior", holding="row_sums", where=is_sound)
def test_row_sums(case):
    """Where the reference makes no error its row sums are ours too: 1."""
    ours = row_sums(posteriors(case, model_of(case)))
    K = case["p_x0"].shape[-1]
    limits = {"atol": K * case.tolerance("row_sums")["atol"]}  # a sum of K numbers
    close(ours, case["row_sums"], f"{case}: row_sums", **limits)


@for_cases("posterior", holding="row_sums", where=lambda case: not is_sound(case))
def test_reference_redraws_revealed_tokens(case):
    """The recorded rows at revealed tokens are p, not the token that is there, and
    rows at masks sum to less than 1; so as they are they are not ours."""
    revealed = case["xt"] != case.values["mask_index"]
    model = model_of(case)
    rows = posteriors(case, model)
    for name, ours in rows.items():
        golden = case[name]
        p = case["p_x0"][revealed]
        close(golden[revealed], p, f"{case}: {name}", **case.tolerance(name))
        assert not torch.allclose(ours, golden, atol=1e-3)
    for name, ours in mixtures(case, model, rows).items():
        assert not torch.allclose(ours, case[name], atol=1e-5)
    case.check("row_sums", row_sums({name: case[name] for name in rows}))
    on_mask = case["p_x0"][~revealed][:, case.values["mask_index"]]
    assert (case["row_sums"] < 1 - 1e-6).any() == (on_mask > 1e-3).any()


@for_cases(
    "posterior", holding="row_sums", where=lambda c: c.config.algo.name == "d3pm"
)
def test_d3pm_compat(case):
    """algo.compat=reference gives the recorded rows and row sums as they are, and the
    mixtures but for what noising forgets of the mask."""
    model = model_of(case, algo__compat="reference")
    rows = posteriors(case, model)
    for name, ours in rows.items():
        case.check(name, ours)
    for name, ours in mixtures(case, model, rows).items():
        golden = expected_mixture(case, name, undo=False)
        close(ours, golden, f"{case}: {name}", **case.tolerance(name))
    case.check("row_sums", row_sums(rows))
