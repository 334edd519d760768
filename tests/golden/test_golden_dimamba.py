"""The bidirectional Mamba backbone and its selective scan, beside the reference's.

Known errors of the reference, none of which is repeated: its modes of conditioning
other than adaLN have no residual connections, and dropout is 0.1 whatever is asked for.
"""

import pytest
import torch
import torch.nn.functional as F
from golden_cases import Case, approx, for_cases
from golden_models import composed
from omegaconf import OmegaConf
from torch import Tensor

from models.dimamba import DiMamba, Mamba
from models.registry import build_backbone
from models.scan import Chunk, selective_scan

TYPES = {"f32": torch.float32, "f64": torch.float64}
CHUNKS = [None, Chunk(1, 1), Chunk(3, 2), Chunk(4, 1), Chunk(64, 64)]


def network_of(case: Case, kind: str) -> DiMamba:
    """The case's network with its weights, in evaluation mode."""
    config = composed("algo=mdlm", "algo.backbone=dimamba", "model=tiny-dimamba")
    OmegaConf.set_struct(config, False)  # their config may have keys that ours lacks
    config = OmegaConf.merge(config, {"model": case.config.model})
    network = build_backbone(config, case.values["vocab_size"])
    network.load_state_dict(case.group("weights/"), strict=True)
    return network.to(TYPES[kind]).eval()


def kinds(case: Case, name: str) -> list[str]:
    """In which types the case has a tensor."""
    found = [kind for kind in TYPES if f"{name}_{kind}" in case.stated]
    assert found
    return found


# ---------------------------------------------------------------- the network


@for_cases("dimamba", holding="weights/*")
def test_weights_are_those_that_the_case_lists(case):
    """Names and shapes of the state dict; order of the parameters, as in the EMA."""
    entries = case.stated["weights/*"]["entries"]
    network = network_of(case, "f32")
    ours = {
        name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        for name, tensor in network.state_dict().items()
    }
    assert ours == entries
    order = [name for name, _ in network.named_parameters()]
    assert order == case.values["parameter_order"]


@for_cases("dimamba", holding="logits_f64")
def test_logits(case):
    """Of whole sequences, without time conditioning, and of a single token."""
    x, sigma = case["x"], case["sigma"]
    inputs = {
        "logits": (x, sigma),
        "logits_sigma0": (x, torch.zeros_like(sigma)),
        "logits_length1": (x[:, :1], sigma),
    }
    for name, (ids, level) in inputs.items():
        for kind in kinds(case, name):
            with torch.no_grad():
                logits = network_of(case, kind)(ids, level.to(TYPES[kind]))
            case.check(f"{name}_{kind}", logits)


@for_cases("dimamba", holding="hidden_out_f64")
def test_parts_of_the_network(case):
    """Conditioning vector, the first mixer and its directions, the first block."""
    network = network_of(case, "f64")
    block = network._trunk.layers[0]
    seen = {}
    block.mixer.register_forward_hook(
        lambda _, args, out: seen.update(mixer0_in=args[0], mixer0_out=out)
    )
    block.register_forward_hook(lambda _, args, out: seen.update(block0_out=out))
    with torch.no_grad():
        sigma = case["sigma"].double()
        seen["hidden_out"] = network.trunk(case["x"], sigma)
        u = seen["mixer0_in"]
        seen["mixer0_fwd_out"] = direction(block.mixer.mamba_fwd, u)
        seen["mixer0_rev_out"] = direction(block.mixer.mamba_rev, u.flip(1))
        seen["sigma_embedding"] = F.silu(network.sigma_map(sigma))
    for name, ours in seen.items():
        case.check(f"{name}_f64", ours)


def direction(mamba: Mamba, u: Tensor) -> Tensor:
    """The output of one direction alone, (B, L, D)."""
    x, z = mamba.in_proj(u).chunk(2, dim=-1)
    return mamba.out_proj(mamba.states(x) * F.silu(z))


@for_cases("dimamba", holding="grad_probe")
def test_gradients(case):
    """Norms for every parameter, and some gradients as a whole."""
    for kind in kinds(case, "logits"):
        network, dtype = network_of(case, kind), TYPES[kind]
        logits = network(case["x"], case["sigma"].to(dtype))
        (logits * case["grad_probe"].to(dtype)).sum().backward()
        grads = {name: p.grad for name, p in network.named_parameters()}
        limits = case.tolerance(f"grad_norms_{kind}")
        norms = case.values[f"grad_norms_{kind}"]
        assert norms.keys() == grads.keys()
        for name, norm in norms.items():
            assert float(grads[name].norm()) == approx(norm, limits), name
        for name in case.group(f"grad_{kind}/"):
            case.check(f"grad_{kind}/{name}", grads[name])


@for_cases("dimamba", holding="counts")
def test_number_of_parameters(case):
    """At the published size, on the meta device; shared ones are counted once."""
    for row in case.values["counts"]:
        with torch.device("meta"):
            network = DiMamba(
                vocab_size=row["vocab_size"],
                hidden_size=row["hidden_size"],
                cond_dim=row["cond_dim"],
                n_blocks=row["n_blocks"],
                dropout=0.1,
            )
        state, layer = network.state_dict().values(), network._trunk.layers[0]
        assert size(network.parameters()) == row["unique"]
        assert len(state) == row["state_dict_entries"]
        assert size(state) == row["state_dict_numbers"]
        assert size(layer.parameters()) == row["per_layer"]
        assert size(network.sigma_map.parameters()) == row["sigma_map"]


def size(tensors) -> int:
    return sum(tensor.numel() for tensor in tensors)


# ---------------------------------------------------------------- the scan alone

INPUTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def fronts(case: Case) -> list[str]:
    """What stands before the names of the inputs of a scan."""
    return [name.split("/")[0] for name in case.stated if name.endswith("/u")]


def gated(u, delta, A, B, C, D, z, delta_bias, chunk):
    """Outputs before and after the gate, (B, E, L), by our scan."""
    step = F.softplus(delta + delta_bias[:, None])
    y = selective_scan(u.mT, step.mT, A, B.mT, C.mT, chunk).mT + D[:, None] * u
    return y, y * F.silu(z)


@pytest.mark.parametrize("chunk", CHUNKS)
@for_cases("dimamba", holding="plain/u")
def test_scan(case, chunk):
    """Outputs and gradients, on ordinary inputs and on extreme decays."""
    assert fronts(case)
    for front in fronts(case):
        inputs = {
            name: case[f"{front}/{name}"].double().requires_grad_() for name in INPUTS
        }
        y, out = gated(**inputs, chunk=chunk)
        case.check(f"{front}/out_f64", out)
        case.check(f"{front}/y_before_gate_f64", y)
        (out * case[f"{front}/grad_probe"]).sum().backward()
        for name, tensor in inputs.items():
            case.check(f"{front}/grad_{name}_f64", tensor.grad)
        narrow = {name: case[f"{front}/{name}"] for name in INPUTS}
        case.check(f"{front}/out_f32", gated(**narrow, chunk=chunk)[1])


@pytest.mark.parametrize("chunk", CHUNKS)
@for_cases("dimamba", holding="plain/last_state_f64")
def test_last_state(case, chunk):
    """Read out by an output that is one state of every channel."""
    for front in fronts(case):
        inputs = {name: case[f"{front}/{name}"].double() for name in INPUTS}
        inputs["D"] = torch.zeros_like(inputs["D"])
        for n, golden in enumerate(case[f"{front}/last_state_f64"].unbind(-1)):
            inputs["C"] = torch.zeros_like(inputs["C"])
            inputs["C"][:, n] = 1
            y, _ = gated(**inputs, chunk=chunk)
            limits = case.tolerance(f"{front}/last_state_f64")
            torch.testing.assert_close(y[..., -1], golden, **limits)


@for_cases("dimamba", holding="conv/x")
def test_convolution(case):
    """Causal, each channel apart, then silu."""
    weight = case["conv/weight"].double()
    mamba = Mamba(16, "torch", 1).double()
    mamba.conv1d = torch.nn.Conv1d(*weight.shape[:1] * 2, 4, groups=len(weight))
    mamba.conv1d.load_state_dict({"weight": weight, "bias": case["conv/bias"]})
    with torch.no_grad():
        out = mamba.double().convolved(case["conv/x"].double().mT)
    case.check("conv/out_f64", out.mT)
