"""`eval.likelihood=chain_rule` through the command line."""

import json
import math

import pytest
import torch
from command_line import TINY, run

from cli.settle import algorithm_class
from data.tokenizers import get_tokenizer


@pytest.fixture
def checkpoint(compose, tmp_path) -> str:
    """An override that names random weights."""
    config = compose(*TINY, "algo=mdlm", tiny=False)
    torch.manual_seed(0)
    model = algorithm_class(config)(config, get_tokenizer(config))
    with torch.no_grad():
        model.backbone.output_embedding.weight.normal_()
    path = tmp_path / "random.ckpt"
    torch.save({"state_dict": model.state_dict()}, path)
    return f"eval.checkpoint_path={path}"


def test_the_chain_rule_stands_beside_the_bound(checkpoint, tmp_path):
    """In a random order its mean is the bound's, of a network that knows no time; the
    file says what it is."""
    done = run(
        *(*TINY, "mode=ppl_eval", "algo=mdlm", checkpoint, "hydra.run.dir=run"),
        *("eval.likelihood=chain_rule", "eval.results_path=likelihood.json"),
        cwd=tmp_path,
    )
    assert "chain rule, ppl" in done.stdout
    said = json.loads((tmp_path / "likelihood.json").read_text())
    assert said["estimator"].startswith("bound (NELBO) in continuous time, by Monte")
    assert (said["precision"], said["data"]["wrap"]) == ("32", True)
    rule = said["chain_rule"]
    assert rule["estimator"] == "chain rule in one random order a row, exact"
    assert (rule["order"], rule["block"]) == ("random", 1)
    assert rule["ppl"] == pytest.approx(math.exp(rule["nll"]))
    error = math.hypot(rule["nll_stderr"], said["nll_stderr"])
    assert abs(rule["nll"] - said["nll"]) < 4 * error
    assert 0 < rule["nll_stderr"] < said["nll_stderr"]
