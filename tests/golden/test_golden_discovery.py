"""How the golden tests find cases, skip without them, and fail on wrong numbers."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from golden_cases import (
    COMMITTED,
    EXACT,
    ROOT,
    Case,
    find_cases,
    golden_dir,
    parameters,
    parse_tolerance,
)
from golden_replay import Replay
from safetensors.torch import load_file, save_file

HERE = ROOT / "tests" / "golden"


def run_pytest(folder, *arguments) -> subprocess.CompletedProcess:
    """Runs golden tests, but not these, on another folder of cases."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-vv"]
    ignored = f"--ignore={HERE / 'test_golden_discovery.py'}"
    return subprocess.run(
        [*command, ignored, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"GOLDEN_DIR": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def make_case(folder, name: str, **info) -> None:
    (folder / name).mkdir()
    with open(folder / name / "case.json", "w") as file:
        json.dump(info, file)


@pytest.mark.parametrize(
    "case", parameters(find_cases(golden_dir(), "noise", "eps")[:1], "noise*")
)
@pytest.mark.slow
def test_other_names_and_wrong_numbers(case, tmp_path):
    """In another folder, a case under another name runs and passes; a copy of it with
    one wrong number fails."""
    for name in ("noise_other", "noise_wrong"):
        shutil.copytree(case.folder, tmp_path / name)
    file = tmp_path / "noise_wrong" / "tensors.safetensors"
    tensors = load_file(file)
    tensors["alpha_f64_0"][0] += 0.001
    save_file(tensors, file)
    tests = "test_signal_level and f64"
    done = run_pytest(tmp_path, HERE / "test_golden_noise.py", "-k", tests)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "test_signal_level[noise_other-f64] PASSED" in done.stdout
    assert "test_signal_level[noise_wrong-f64] FAILED" in done.stdout
    assert "1 failed, 1 passed" in done.stdout


@pytest.mark.slow
def test_without_cases_all_is_skipped(tmp_path):
    """No folder: every test is skipped, none fails, and the reason names the folder."""
    folder = tmp_path / "nowhere"
    done = run_pytest(folder, HERE, "-rs")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " PASSED" not in done.stdout
    summary = done.stdout.splitlines()[-1]
    assert "skipped" in summary
    assert "passed" not in summary
    assert f"there is no folder {folder}" in done.stdout


def test_find_cases(tmp_path):
    """By the front of the name and by what a case holds."""
    make_case(tmp_path, "dit_b", tensors={"logits": {}}, values={"size": 3})
    make_case(tmp_path, "dit_a", tensors={"logits": {}})
    make_case(tmp_path, "my_dit", tensors={"logits": {}})
    (tmp_path / "dit_without_case_json").mkdir()

    def found(*args, **kwargs):
        return [case.name for case in find_cases(tmp_path, *args, **kwargs)]

    assert found("dit") == ["dit_a", "dit_b"]
    assert found("dit", "logits") == ["dit_a", "dit_b"]
    assert found("dit", "size") == ["dit_b"]
    assert found("dit", "nothing") == []
    ids = [parameter.id for parameter in parameters(find_cases(tmp_path), "any")]
    assert ids == ["dit_a", "dit_b", "my_dit"]


def test_no_case_is_one_skip_with_its_reason(tmp_path):
    """The reason tells a missing folder from a folder without such cases."""
    for folder, words in ((tmp_path, "no golden case"), (tmp_path / "x", "no folder")):
        (only,) = parameters([], "dit*", folder)
        (mark,) = only.marks
        assert mark.name == "skip"
        assert words in mark.kwargs["reason"]
        assert str(folder) in mark.kwargs["reason"]


def test_folder_of_cases(monkeypatch, tmp_path):
    """GOLDEN_DIR, absolute or relative to the repository; else ../shared/golden, if
    there is one; else what every clone has."""
    clone = tmp_path / "clone"
    monkeypatch.setattr("golden_cases.ROOT", clone)
    monkeypatch.setenv("GOLDEN_DIR", str(tmp_path))
    assert golden_dir() == tmp_path
    monkeypatch.setenv("GOLDEN_DIR", "some/cases")
    assert golden_dir() == clone / "some" / "cases"
    monkeypatch.setenv("GOLDEN_DIR", "")
    assert golden_dir() == COMMITTED
    monkeypatch.delenv("GOLDEN_DIR")
    assert golden_dir() == COMMITTED
    fuller = tmp_path / "shared" / "golden"
    fuller.mkdir(parents=True)
    assert golden_dir() == fuller


# ---------------------------------------------------------------- the committed cases

# Kinds of cases that are committed: the front of the name, and what is in them.
KINDS = [
    ("analytic", "t_dt"),
    ("data_detokenizers", "cases"),
    ("data_group_texts", "cases"),
    ("data_samplers", "samplers"),
    ("data_synthetic", "0/train"),
    ("data_tokenizers", "text8"),
    ("dimamba", "counts"),
    ("dimo", "masked_count_of_length_and_ratio"),
    ("distillation", "dt_schedules"),
    ("duo", "n_series_terms"),
    ("duo_curriculum", "step0_gamma_t"),
    ("duo_tau", "schedules"),
    ("duo_topk", "settings"),
    ("image", "fid"),
    ("integral", "file"),
    ("integral", "index"),
    ("loss", "eval_loss"),
    ("loss", "raw_logits"),
    ("mdlm_noise", "not_defined"),
    ("metrics", "batches_nll_sum_and_tokens"),
    ("noise", "eps"),
    ("nucleus", "log_probs"),
    ("optim", "halving"),
    ("optim", "param0"),
    ("posterior", "p_x0"),
    ("sampling", "gumbel"),
]
LIMIT = 1_500_000  # bytes of all files and folders, as `du -sb` counts them


def test_committed_cases_are_small():
    """What every clone has to download."""
    paths = [COMMITTED, *COMMITTED.rglob("*")]
    assert sum(path.lstat().st_size for path in paths) < LIMIT


@pytest.mark.parametrize(("kind", "holding"), KINDS)
def test_every_kind_is_committed(kind, holding):
    assert find_cases(COMMITTED, kind, holding)


def test_every_committed_case_runs():
    """Each is the argument of at least one test that is not skipped, unless it waits
    for later work."""
    done = run_pytest(COMMITTED, HERE, "--collect-only", "-q")
    assert done.returncode == 0, done.stdout + done.stderr
    cases = find_cases(COMMITTED)
    assert len(cases) == len(KINDS)
    for case in cases:
        waits = f"test_case_that_waits[{case}]" in done.stdout
        named = re.findall(rf"(test_\w+)\[(?:.*-)?{case}(?:-.*)?\]", done.stdout)
        tests = set(named) - {"test_case_that_waits"}
        assert bool(tests) != waits, f"{case}: waits {waits}, tests {tests}"


# ---------------------------------------------------------------- comparing


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("atol 2e-5, rtol 1e-4 (float32)", {"atol": 2e-5, "rtol": 1e-4}),
        ("rtol 1e-3", {"rtol": 1e-3}),
        ("atol 0.001 (see 1e-9)", {"atol": 0.001}),
        ("exact except for near ties", EXACT),
    ],
)
def test_tolerance_in_words(text, expected):
    assert parse_tolerance(text) == expected


def test_tolerance_of_a_tensor(tmp_path):
    """The most special pattern counts; types, parts of names and lists work."""
    tolerance = {"*": "atol 1", "*loss*": "atol 2", "a, b": "atol 3", "int64": "exact"}
    tensors = {"x": {"dtype": "int64"}}
    make_case(tmp_path, "any", tolerance=tolerance, tensors=tensors)
    case = Case(tmp_path / "any")
    names = ("y", "eval_loss", "0/b", "a/weight", "x")
    assert [case.tolerance(n).get("atol") for n in names] == [1, 2, 3, 3, 0]
    del case.info["tolerance"]["*"]
    with pytest.raises(AssertionError, match="no tolerance is stated for y"):
        case.tolerance("y")


def test_replay_is_strict():
    """Shapes, ranges, order and number of draws must be as recorded."""
    replay = Replay()
    replay.uniforms = [torch.zeros(2, dtype=torch.float64), torch.ones(2, 3)]
    replay.integers = [torch.tensor([0, 4])]
    with pytest.raises(AssertionError, match="not used"):
        replay.assert_all_used()
    assert replay.rand(2, dtype=torch.float64).dtype == torch.float64
    assert replay.rand(torch.Size([2, 3]), dtype=torch.float64).sum() == 6
    assert replay.randint(5, (2,)).tolist() == [0, 4]
    replay.assert_all_used()
    with pytest.raises(AssertionError, match="nothing is left"):
        replay.rand(2)
    replay.uniforms = [torch.zeros(3)]
    with pytest.raises(AssertionError, match=r"\(3,\) next"):
        replay.rand(2)
    replay.integers = [torch.tensor([0, 4])]
    with pytest.raises(AssertionError, match="outside"):
        replay.randint(4, (2,))
