"""A mistake, `--help` and `--cfg job` are answered before torch is imported."""

import os
import subprocess
import sys

import pytest
from command_line import ROOT

from cli.environment import SPINS, WAITING, share_cores

HEAVY = ("torch", "lightning", "transformers", "datasets", "numpy", "pyarrow", "scipy")
CODE = """
import os, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    status = end.code
else:
    status = 0
heavy = [name for name in %r if name in sys.modules]
sys.stderr.write(f"status {status}, imported {heavy}")
"""
CASES = {
    "help": (["--help"], 0, ""),
    "config": (["--cfg", "job"], 0, ""),
    "experiment": (["--cfg", "job", "experiment=demo_duo"], 0, ""),
    "key": (["trainer.max_stps=3"], 2, "Did you mean 'trainer.max_steps'?"),
    "algorithm": (["algo=mdml"], 2, "Did you mean 'mdlm'?"),
    "mode": (["mode=trian"], 2, "Did you mean 'train'?"),
    "data set": (["data.train=text9"], 2, "Did you mean 'text8'?"),
    "data config": (["data=text9"], 2, "'text8'"),
    "predictor": (["sampling.predictor=ancestrel"], 2, "Did you mean 'ancestral'?"),
    "backbone": (["algo.backbone=dti"], 2, "Did you mean 'dit'?"),
    "number": (["trainer.max_steps=0"], 2, "trainer.max_steps=0"),
    "flag": (["data.wrap=maybe"], 2, "data.wrap='maybe'"),
    "inert key": (["training.importance_sampling=True"], 2, "not implemented"),
    "checkpoint": (
        ["mode=ppl_eval", "eval.checkpoint_path=none.ckpt"],
        2,
        "eval.checkpoint_path='none.ckpt': there is no such file",
    ),
    "no checkpoint": (["mode=sample_eval"], 2, "eval.checkpoint_path is empty"),
    "first weights": (
        ["training.finetune_path=none.ckpt"],
        2,
        "training.finetune_path='none.ckpt': there is no such file",
    ),
    "corpus": (["data=text_files", "data.path=none.txt"], 2, "data.path='none.txt'"),
    "tokenizer": (
        ["data.tokenizer_name_or_path=./none"],
        2,
        "data.tokenizer_name_or_path='./none': there is no such folder",
    ),
    "table": (
        ["algo=duo", "algo.curriculum.integral_cache_path=none.pkl"],
        2,
        "there is no such file",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_nothing_heavy_is_imported(case, tmp_path):
    words, status, said = CASES[case]
    command = [sys.executable, "-c", CODE % (HEAVY,), str(ROOT / "main.py"), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    *lines, last = done.stderr.splitlines()
    assert last == f"status {status}, imported []", done.stderr
    assert said in "\n".join(lines)
    assert [x for x in lines if x.startswith("error: ")] == lines


@pytest.mark.parametrize("name", WAITING)
def test_the_environment_of_the_user_says_how_threads_wait(name, monkeypatch):
    for other in WAITING:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "1")
    before = dict(os.environ)
    share_cores()
    assert dict(os.environ) == before


def test_threads_that_wait_give_their_core_away(monkeypatch):
    """By default; that main.py calls this before torch is imported is tested above."""
    monkeypatch.setattr(os, "environ", {})
    share_cores()
    assert os.environ == {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": str(SPINS)}
