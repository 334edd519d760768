"""Long training on synthetic data, whose entropy is known exactly: AR reaches it, and
no diffusion bound falls below it. Numbers of one run are in benchmarks/README.md."""

import pytest
from command_line import ALGORITHMS, logged, run

from data.synthetic import synthetic_entropy

LENGTH, VOCAB_SIZE, STEPS = 32, 256, 1500
# Largest val/nll after STEPS updates, in units of the entropy.
AT_MOST = {"ar": 1.03, "mdlm": 1.15, "sedd": 1.15, "d3pm": 1.15, "duo_base": 1.5}


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_likelihood_approaches_the_entropy(algorithm, tmp_path):
    """AR within 3 % of the entropy after 1500 steps of 64 sequences. Bounds: above
    it beyond sampling error (4 standard errors), and near it."""
    run(
        f"algo={algorithm}",
        "data=synthetic",
        "data.num_train=50_000",
        "data.num_valid=2048",
        "model=tiny",
        f"model.length={LENGTH}",
        "model.hidden_size=128",
        "model.n_blocks=2",
        "model.n_heads=4",
        "model.dropout=0",
        "loader.global_batch_size=64",
        "loader.eval_global_batch_size=256",
        "lr_scheduler=cosine_decay_warmup",
        "optim.lr=3e-3",
        "training.ema=0.99",
        f"trainer.max_steps={STEPS}",
        f"trainer.val_check_interval={STEPS // 2}",
        "trainer.accelerator=cpu",
        "eval.generate_samples=False",
        "hydra.run.dir=run",
        cwd=tmp_path,
        timeout=1800,
    )
    nll = logged(tmp_path / "run", "val/nll")[-1]
    stderr = logged(tmp_path / "run", "val/nll_stderr")[-1]
    scored = LENGTH - (algorithm == "ar")
    entropy = synthetic_entropy(LENGTH, VOCAB_SIZE) / scored
    assert nll > entropy - 4 * stderr
    assert nll < AT_MOST.get(algorithm, 3) * entropy
