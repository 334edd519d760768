"""The transformer backbone, bidirectional and causal, beside the reference's."""

import torch
import torch.nn.functional as F
from golden_cases import FORWARD, Case, close, for_cases
from golden_models import composed
from omegaconf import OmegaConf

from diffusion.gaussian import TopLatents
from models.dit import DIT
from models.registry import build_backbone


def backbone(case: Case) -> DIT:
    """The case's network with its weights, in evaluation mode."""
    theirs = case.config
    config = composed(f"algo={'ar' if theirs.causal_attention else 'mdlm'}")
    OmegaConf.set_struct(config, False)  # their config may have keys that ours lacks
    config = OmegaConf.merge(config, theirs)
    network = build_backbone(config, theirs.vocab_size)
    network.load_state_dict(case.group("weights/"), strict=True)
    return network.eval()


@for_cases("dit", holding="logits")
def test_weights_are_those_that_the_case_lists(case):
    """Names, order, shapes and types of the state dict; order is that of the EMA."""
    entries = case.stated["weights/*"]["entries"]
    ours = {
        name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        for name, tensor in backbone(case).state_dict().items()
    }
    assert list(ours.items()) == list(entries.items())


@for_cases("dit", holding="logits")
def test_logits(case):
    """Token ids to logits; `head` after `trunk` is `forward`."""
    network = backbone(case)
    sigma = case.tensors.get("sigma")
    with torch.no_grad():
        logits = network(case["x"], sigma)
        hidden = network.trunk(case["x"], sigma)
        in_two = network.head(hidden)
    case.check("logits", logits)
    assert hidden.shape == (*case["x"].shape, case.config.model.hidden_size)
    close(in_two, logits, "head(trunk(x)) and forward(x)", rtol=1e-6, atol=1e-6)


@for_cases("dit", holding="logits_short")
def test_shorter_sequence(case):
    """A prefix shorter than the configured length. Causal attention makes its logits
    the first part of the whole sequence's; bidirectional attention does not."""
    length = case["logits_short"].shape[1]
    assert length < case["x"].shape[1]
    with torch.no_grad():
        logits = backbone(case)(case["x"][:, :length], case.tensors.get("sigma"))
    case.check("logits_short", logits)
    is_prefix = torch.allclose(logits, case["logits"][:, :length], atol=1e-4)
    assert is_prefix == case.config.causal_attention


@for_cases("dit", holding="logits_sigma0")
def test_sigma_zero(case):
    """What a model without time conditioning sees; sigma must matter otherwise."""
    with torch.no_grad():
        logits = backbone(case)(case["x"], torch.zeros_like(case["sigma"]))
    case.check("logits_sigma0", logits)
    assert not torch.allclose(logits, case["logits"], atol=1e-3)


@for_cases("dit", holding="logits_soft")
def test_soft_input(case):
    """Real-valued input whose softmax mixes the embedding rows."""
    with torch.no_grad():
        logits = backbone(case)(case["x_soft"], case["sigma"])
    case.check("logits_soft", logits)


@for_cases("dit", holding="logits_topk")
def test_weighted_ids(case):
    """k embedding rows with float64 weights that do not sum to one."""
    ids, weights = case["topk_indices"], case["topk_weights"]
    with torch.no_grad():
        logits = backbone(case)(TopLatents(ids[..., 0], ids, weights), case["sigma"])
    case.check("logits_topk", logits)


@for_cases("dit", holding="timestep_features")
def test_noise_embedding(case):
    """Sinusoidal features of sigma, cosines first, and the conditioning vector."""
    network = backbone(case)
    with torch.no_grad():
        features = network.sigma_map.features(case["sigma"])
        embedding = F.silu(network.sigma_map(case["sigma"]))
    case.check("timestep_features", features, default=FORWARD)
    case.check("sigma_embedding", embedding, default=FORWARD)


@for_cases("dit", holding="rotary_cos")
def test_rotary_tables(case):
    """cos and sin of position times frequency, half-split layout."""
    cos, sin = backbone(case).rotary_emb(case["rotary_cos"].shape[0])
    case.check("rotary_cos", cos, default=FORWARD)
    case.check("rotary_sin", sin, default=FORWARD)


@for_cases("dit", holding="block0_out")
def test_first_block(case):
    """Hidden state after the first block: order of shift, scale and gate."""
    network = backbone(case)
    outputs = []
    network.blocks[0].register_forward_hook(lambda *call: outputs.append(call[-1]))
    with torch.no_grad():
        network(case["x"], case["sigma"])
    case.check("block0_out", outputs[0], default=FORWARD)


@for_cases("dit", holding="grad_probe")
def test_gradients(case):
    """Derivatives of sum(logits * grad_probe) with respect to parameters."""
    network = backbone(case)
    (network(case["x"], case["sigma"]) * case["grad_probe"]).sum().backward()
    parameters = dict(network.named_parameters())
    recorded = case.group("grad/")
    assert recorded
    for name in recorded:
        case.check(f"grad/{name}", parameters[name].grad)
