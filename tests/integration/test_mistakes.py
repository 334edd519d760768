"""A user's mistake costs one line and exit status 2, and nothing is written."""

import json

import pytest
from command_line import TINY, run

MISTAKES = {
    "algorithm": (["algo=mdml"], ["algo='mdml'", "'mdlm'", "duo_base"]),
    "curriculum": (
        ["algo=duo", "data=synthetic", "algo.curriculum.integral_cache_path=no.pkl"],
        ["algo.curriculum.integral_cache_path='no.pkl'", "null needs none"],
    ),
    "data": (["data=text9"], ["data='text9'", "'text8'"]),
    "data out of reach": (
        ["data=lm1b", "data.tokenizer_name_or_path=bytes"],
        ["data.train='lm1b' cannot be loaded", "data.source=FOLDER"],
    ),
    "data that are nowhere": (
        ["data=lm1b", "data.source=/nowhere"],
        ["data.source='/nowhere'", "matches no file"],
    ),
    "predictor": (
        ["sampling.predictor=psii"],
        ["sampling.predictor='psii'", "ancestral"],
    ),
    "backbone": (["algo.backbone=ditt"], ["algo.backbone='ditt'", "dit"]),
    "key": (["trainer.max_step=9"], ["trainer.max_step", "trainer.max_steps"]),
    "mode": (["mode=trian"], ["mode='trian'", "train", "ppl_eval"]),
    "batch": (["loader.batch_size=3"], ["loader.global_batch_size=16", "3"]),
    "checkpoint": (
        ["mode=ppl_eval", "eval.checkpoint_path=/no/such.ckpt"],
        ["eval.checkpoint_path='/no/such.ckpt'", "no such file"],
    ),
    "data path": (
        ["data=text_files", "data.path=/no/such/*.txt"],
        ["data.path='/no/such/*.txt'", "matches no file"],
    ),
    "discrete time": (["algo=sedd", "algo.T=10"], ["algo.T=10", "algo=sedd"]),
    "empty data": (["data.num_train=0"], ["data.train='synthetic'", "empty"]),
    "fsdp on a Mac": (
        ["strategy=fsdp", "trainer.accelerator=mps"],
        ["trainer.accelerator='mps'", "strategy=ddp"],
    ),
    "number": (["model.length=ten"], ["model.length='ten'"]),
    "inert key": (
        ["model.tie_word_embeddings=True"],
        ["model.tie_word_embeddings=True", "False"],
    ),
    "estimator": (
        ["algo=mdlm", "noise=cosine", "training.importance_sampling=True"],
        ["training.importance_sampling=True", "noise=cosine", "log-linear"],
    ),
    "ends of the noise": (
        ["algo=mdlm", "noise=linear", "noise.sigma_min=0.5", "noise.sigma_max=0.2"],
        ["noise.sigma_min=0.5", "noise.sigma_max=0.2"],
    ),
    "setting of another noise": (
        ["algo=mdlm", "noise=linear", "noise.eps=1e-3"],
        ["noise.eps"],
    ),
    "hub out of reach": (
        ["data.tokenizer_name_or_path=no-such-tokenizer"],
        ["data.tokenizer_name_or_path='no-such-tokenizer'", "text8"],
    ),
    "judge out of reach": (
        ["eval.compute_generative_perplexity=True"],
        ["eval.gen_ppl_eval_model_name_or_path='gpt2-large'", "null"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line(name, tmp_path):
    overrides, expected = MISTAKES[name]
    base = list(TINY)
    if any(override.startswith("data=") for override in overrides):
        base = [x for x in base if not x.startswith("data")]  # of data=synthetic
    done = run(*base, *overrides, "hydra.run.dir=run", cwd=tmp_path, status=2)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    for part in expected:
        assert part in errors[0]
    assert "Traceback" not in done.stderr + done.stdout
    assert not list(tmp_path.rglob("*.ckpt"))


def test_samples_are_never_overwritten(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps("precious"))
    (tmp_path / "last.ckpt").touch()  # the file is refused before this one is read
    done = run(
        *TINY,
        "mode=sample_eval",
        "eval.checkpoint_path=last.ckpt",
        f"eval.generated_samples_path={path}",
        "hydra.run.dir=run",
        cwd=tmp_path,
        status=2,
    )
    assert f"eval.generated_samples_path='{path}'" in done.stderr
    assert json.loads(path.read_text()) == "precious"
