"""One reverse step q(x_s | x_t, p) from given clean distributions p.

Known error of the reference, absorbing state: at revealed tokens it returns p itself,
so all but MDLM, whose p is one-hot there, draw revealed tokens anew at every step; and
rows are not normalised where p has mass on the mask. Ours keeps revealed tokens and
takes the mask out of p. `algo.compat=reference` gives D3PM the old rows back, because
published samples were made with them.
"""

import torch
import torch.nn.functional as F
from golden_cases import Case, close, for_cases
from golden_models import build
from torch import Tensor


def model_of(case: Case, **settings):
    return build(case, weights=None, model__n_blocks=1, **settings)


def steps(case: Case) -> list[tuple[int, str, Tensor, Tensor]]:
    """(index, recorded name, alpha_s, alpha_t) of every recorded posterior.

    `posterior_to_0` is the step to alpha_s = 1. Signal levels are float32 there.
    """
    column = torch.ones(len(case["xt"]), 1)
    found = []
    for index, (alpha_s, alpha_t) in enumerate(case.values["alpha_pairs_s_t"]):
        levels = (("posterior", alpha_s), ("posterior_to_0", 1.0))
        found += [(index, n, a * column, alpha_t * column) for n, a in levels]
    return found


def normalised(case: Case, golden: Tensor) -> Tensor:
    """The recorded rows (B, L, K) with both errors of the reference undone.

    Revealed tokens stay. At a mask, p loses its mass on the mask: tokens are divided
    by 1 - p[m]; the mask's own probability is right as it is.
    """
    mask = case.values["mask_index"]
    if mask is None:
        return golden
    is_mask = torch.arange(golden.shape[-1]) == mask
    rest = 1 - case["p_x0"][..., mask : mask + 1]
    at_mask = torch.where(is_mask, golden, golden / rest)
    revealed = F.one_hot(case["xt"], golden.shape[-1]).to(golden.dtype)
    return torch.where((case["xt"] == mask)[..., None], at_mask, revealed)


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
    xt, p = case["xt"], case["p_x0"]
    for index, name, alpha_s, alpha_t in steps(case):
        ours = model.posterior(p, xt=xt, alpha_t=alpha_t, alpha_s=alpha_s)
        golden, name = case[f"{index}/{name}"], f"{index}/{name}"
        limits = case.tolerance(name)
        close(ours, normalised(case, golden), f"{case}: {name}", **limits)
        if is_sound(case):
            case.check(name, ours)
        assert (ours >= 0).all()
        one = torch.ones(xt.shape)
        close(ours.sum(dim=-1), one, f"{case}: sums of {name}", atol=1e-6)
        if model.mask_index is not None:
            revealed = xt != model.mask_index
            assert torch.equal(ours.argmax(dim=-1)[revealed], xt[revealed])
            assert (ours.amax(dim=-1)[revealed] == 1).all()


@for_cases("posterior", holding="kappas")
def test_posterior_is_the_mixture_at_kappa_one(case):
    """The psi sampler's mixture is the posterior where kappa is 1."""
    model = model_of(case)
    assert 1.0 in case.values["kappas"]
    for index, name, alpha_s, alpha_t in steps(case):
        if name == "posterior":
            xt, p = case["xt"], case["p_x0"]
            ours = model.posterior(p, xt=xt, alpha_t=alpha_t, alpha_s=alpha_s)
            golden = case[f"{index}/mix_1.0"]
            limits = case.tolerance(f"{index}/mix_1.0")
            close(ours, normalised(case, golden), f"{case}: {index}", **limits)


@for_cases("posterior", holding="p_x0", where=is_sound)
def test_row_sums(case):
    """Where the reference makes no error its row sums are ours too: 1."""
    model = model_of(case)
    sums = [
        model.posterior(case["p_x0"], xt=case["xt"], alpha_t=t, alpha_s=s).sum(dim=-1)
        for _, name, s, t in steps(case)
        if name == "posterior"
    ]
    K = case["p_x0"].shape[-1]
    limits = {"atol": K * case.tolerance("row_sums")["atol"]}  # a sum of K numbers
    close(torch.stack(sums), case["row_sums"], f"{case}: row_sums", **limits)


@for_cases("posterior", holding="p_x0", where=lambda case: not is_sound(case))
def test_reference_redraws_revealed_tokens(case):
    """The recorded rows at revealed tokens are p, not the token that is there, and
    rows at masks sum to less than 1; so as they are they are not ours."""
    model = model_of(case)
    revealed = case["xt"] != model.mask_index
    sums = []
    for index, name, alpha_s, alpha_t in steps(case):
        golden = case[f"{index}/{name}"]
        close(golden[revealed], case["p_x0"][revealed], f"{index}", atol=1e-7)
        ours = model.posterior(
            case["p_x0"], xt=case["xt"], alpha_t=alpha_t, alpha_s=alpha_s
        )
        assert not torch.allclose(ours[revealed], golden[revealed], atol=1e-3)
        if name == "posterior":
            sums.append(golden.sum(dim=-1))
    case.check("row_sums", torch.stack(sums))
    if (~revealed).any():
        assert (case["row_sums"][:, ~revealed] < 1 - 1e-6).any()


@for_cases("posterior", holding="p_x0", where=lambda c: c.config.algo.name == "d3pm")
def test_d3pm_compat(case):
    """algo.compat=reference gives the recorded rows and row sums as they are."""
    model = model_of(case, algo__compat="reference")
    sums = []
    for index, name, alpha_s, alpha_t in steps(case):
        ours = model.posterior(
            case["p_x0"], xt=case["xt"], alpha_t=alpha_t, alpha_s=alpha_s
        )
        case.check(f"{index}/{name}", ours)
        if name == "posterior":
            sums.append(ours.sum(dim=-1))
    case.check("row_sums", torch.stack(sums))
