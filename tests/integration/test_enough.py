"""A checkpoint is enough for the real command line: the folder of a run is evaluated as
in its training, and the commands that inspect prints work when they are copied."""

import json
import subprocess
from itertools import pairwise

import pytest
from command_line import TINY, run

# Beside what the checkpoint says.
QUIET = ("logger=none", "+trainer.enable_progress_bar=False")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run of settings that are not the usual ones, on its own text."""
    folder = tmp_path_factory.mktemp("enough")
    (folder / "corpus.txt").write_text("to be or not to be, that is it. " * 300)
    done = run(
        *(x for x in TINY if not x.startswith(("data", "algo"))),
        *("algo=mdlm", "algo.time_conditioning=True", "noise=cosine", "seed=3"),
        *("data=text_files", "data.path=corpus.txt", "data.valid_fraction=0.2"),
        *("data.tokenizer_name_or_path=bytes", "data.num_proc=1", *QUIET),
        *("trainer.max_steps=2", "trainer.val_check_interval=2"),
        *("eval.generate_samples=False", "hydra.run.dir=runs/one"),
        cwd=folder,
    )
    assert "val/ppl" in done.stdout
    return folder


def test_a_folder_of_a_run_is_evaluated_as_in_training(trained):
    more = ("mode=ppl_eval", "eval.checkpoint_path=runs/one", "seed=3")
    run(*more, *QUIET, "hydra.run.dir=evaluated", cwd=trained)
    record = json.loads((trained / "evaluated" / "likelihood.json").read_text())
    assert (record["algo"], record["data"]["valid"]) == ("mdlm", "text_files")
    assert record["data"]["tokenizer"] == "bytes"
    assert record["checkpoint"]["path"].endswith("runs/one/checkpoints/last.ckpt")


@pytest.mark.parametrize(
    ("word", "theirs"),
    [("noise=log-linear", "noise=cosine"), ("experiment=eval_owt_sedd", "algo=mdlm")],
)
def test_a_contradiction_is_one_line(trained, word, theirs):
    more = ("mode=ppl_eval", "eval.checkpoint_path=runs/one", word)
    done = run(*more, "hydra.run.dir=refused", cwd=trained, status=2)
    (line,) = done.stderr.strip().splitlines()
    assert theirs in line
    assert "eval.differing=[" in line


def test_commands_of_inspect_work_when_copied(trained):
    words = ("mode=inspect", "eval.checkpoint_path=runs/one", "hydra.run.dir=looked")
    lines = run(*words, cwd=trained).stdout.splitlines()
    commands = {x.strip(" :"): y.strip() for x, y in pairwise(lines) if "main.py" in y}
    assert commands.keys() == {"to evaluate it", "to sample from it"}
    for name, command in commands.items():
        place = name.replace(" ", "-")
        more = f"hydra.run.dir={place} sampling.steps=2 {' '.join(QUIET)}"
        subprocess.run(
            f"{command.replace('sampling.steps=64', '')} {more}",
            shell=True,
            check=True,
            capture_output=True,
            cwd=trained,
        )
    assert (trained / "to-evaluate-it" / "likelihood.json").exists()
    assert (trained / "to-sample-from-it" / "samples.json").exists()
