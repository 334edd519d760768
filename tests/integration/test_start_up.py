"""A mistake, `--help` and `--cfg job` are answered before torch is imported."""

import json
import os
import subprocess
import sys

import pytest
from command_line import ROOT

from cli.environment import SPINS, WAITING, share_cores

HEAVY = ("torch", "lightning", "transformers", "datasets", "numpy", "pyarrow", "scipy")
# Forks a process for each command line, from one that has imported what main.py does.
CODE = """
import json, os, runpy, sys
path, folder, cases, heavy = (sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:]))
sys.path.insert(0, os.path.dirname(path))
import main
for name, words in cases.items():
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        continue
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}.{kind}", os.O_WRONLY | os.O_CREAT), number)
    sys.argv = [path, *words]
    status = 0
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        status = end.code
    found = [name for name in heavy if name in sys.modules]
    sys.stderr.write(f"status {status}, imported {found}")
    sys.stderr.flush()
    os._exit(0)
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
    "inert key": (["model.tie_word_embeddings=True"], 2, "not implemented"),
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


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """A folder of what each command line prints, one file of errors for each case."""
    folder = tmp_path_factory.mktemp("answers")
    cases = {case: words for case, (words, _, _) in CASES.items()}
    command = [sys.executable, "-c", CODE, str(ROOT / "main.py"), str(folder)]
    command += [json.dumps(cases), json.dumps(HEAVY)]
    subprocess.run(command, cwd=folder, check=True)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_nothing_heavy_is_imported(case, answers):
    _, status, said = CASES[case]
    errors = (answers / f"{case}.err").read_text()
    *lines, last = errors.splitlines()
    assert last == f"status {status}, imported []", errors
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
