"""lm_eval's own command over checkpoints of ours, with a local task and no network."""

import json
import os
import subprocess
import sys

import pytest
from command_line import ROOT
from exported import save_tiny
from nursery import ENV

from evaluation import harness

DOCS = [
    {"start": "return the", "ends": [" value", " zqzqz"], "gold": 0},
    {"start": "raise an", "ends": [" error", " qzqzq"], "gold": 0},
]
HEAD = """
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
"""
TASKS = {
    "choose": """
doc_to_text: "{{start}}"
doc_to_choice: "{{ends}}"
doc_to_target: gold
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "read": """
doc_to_text: ""
doc_to_target: "{{start}}{{ends[0]}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
    "write": """
doc_to_text: "{{start}}"
doc_to_target: "{{ends[0]}}"
generation_kwargs: {until: ["z"], max_gen_toks: 6}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}
KINDS = {
    "choose": "multiple_choice",
    "read": "loglikelihood_rolling",
    "write": "generate_until",
}


@pytest.fixture
def tasks(tmp_path):
    """A folder with the tasks, beside which checkpoints go."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    for task, body in TASKS.items():
        head = HEAD.format(task=f"our_{task}", data=data, kind=KINDS[task])
        (folder / f"{task}.yaml").write_text(head + body)
    return folder


def evaluate(tasks, *arguments, status=0):
    """Runs the harness beside the folder of tasks; checks its status."""
    env = os.environ | ENV | {"HF_HOME": str(tasks.parent / "hub")}
    env["PYTHONPATH"] = os.pathsep.join(
        [
            str(ROOT),
            env["PYTHONPATH"],
            *os.environ.get("PYTHONPATH", "").split(os.pathsep),
        ]
    )
    done = subprocess.run(
        [sys.executable, "-m", "evaluation.harness", *arguments],
        cwd=tasks.parent,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def test_every_kind_of_task_through_the_command(tasks):
    """A table of results, and a JSON with the numbers of the scorer."""
    pytest.importorskip("lm_eval", reason=harness.INSTALL)
    save_tiny(tasks.parent / "last.ckpt", "algo=mdlm", "data=docstrings")
    done = evaluate(
        tasks,
        "--model_args",
        "checkpoint=last.ckpt,num_draws=3,device=cpu,overrides=sampling.steps=2",
        *("--tasks", "our_choose,our_read,our_write", "--include_path", "tasks"),
        *("--batch_size", "8", "--output_path", "out", "--log_samples"),
    )
    rows = [line.split("|") for line in done.stdout.splitlines() if "our_" in line]
    assert [row[1].strip() for row in rows] == ["our_choose", "our_read", "our_write"]
    assert not {"config_tree.txt", "outputs"} & set(os.listdir(tasks.parent))

    given = {"checkpoint": str(tasks.parent / "last.ckpt"), "num_draws": 3}
    given |= {"device": "cpu", "batch_size": 8}
    scorer = harness.load(harness.Arguments.parse(given))
    texts = [doc["start"] + doc["ends"][0] for doc in DOCS]
    nats = -sum(scorer.score_whole(texts))
    (path,) = (tasks.parent / "out").rglob("results_*.json")
    results = json.loads(path.read_text())["results"]
    bits = nats / sum(map(len, texts)) / 0.6931471805599453
    assert results["our_read"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
    (path,) = (tasks.parent / "out").rglob("samples_our_choose_*.jsonl")
    logged = [json.loads(line) for line in path.read_text().splitlines()]
    for doc, sample in zip(DOCS, logged, strict=True):
        scores = scorer.score([(doc["start"], end) for end in doc["ends"]])
        got = [float(value) for ((value, _),) in sample["resps"]]
        expected = [score.log_likelihood for score in scores]
        assert got == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_a_mistake_is_one_line(tasks):
    pytest.importorskip("lm_eval", reason=harness.INSTALL)
    done = evaluate(
        tasks,
        *("--model_args", "checkpoint=no.ckpt", "--tasks", "our_read"),
        *("--include_path", "tasks"),
        status=2,
    )
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last == "error: checkpoint='no.ckpt': there is no such file."
