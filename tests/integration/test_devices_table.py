"""The table of `make devices-table`: its cells are equal to rounding, and it says so
where they are not."""

import os
import re
import subprocess
import sys

import pytest
from command_line import ROOT

from benchmarks.devices_table import COLUMNS, FIRST, ONE, Difference, names_of, report

ABOUT = {"minutes": "1", "commit": "abc", "steps": "30"}
OTHERS = [name for name in COLUMNS if name != ONE]


@pytest.mark.slow
def test_two_algorithms_of_the_table(tmp_path):
    """Few updates; a teacher and its student would be two more."""
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "benchmarks" / "devices_table.py"),
            *("--algorithms", "ar,duo", "--by-command", "ar", "--steps", "5"),
            *("--output", str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "devices.md").read_text()
    assert "Of weights no cell is above it." in text
    rows = re.findall(r"^\| (ar|duo) \| (.+) \|$", text, re.M)
    assert len(rows) == 4
    for _, cells in rows:
        *equal, changed = map(float, cells.split(" | "))
        assert max(equal) <= 1e-5 < changed


def test_a_cell_above_the_limit_is_named(tmp_path):
    cells = {name: Difference(1e-7, 0.0) for name in OTHERS}
    cells[FIRST] = Difference(1e-2, 0.1)
    assert "no cell is above it" in report({"duo": cells}, ABOUT, tmp_path)
    cells["2 nodes"] = Difference(2e-5, 0.0)
    text = report({"duo": cells}, ABOUT, tmp_path)
    assert "above it: duo, 2 nodes." in text
    assert (tmp_path / "devices.md").read_text() == text


def test_the_table_has_every_algorithm_and_teachers_first():
    names = names_of("")
    assert {x.stem for x in (ROOT / "configs" / "algo").glob("*.yaml")} <= set(names)
    assert names.index("mdlm") < names.index("sdtt")
    assert names_of("dimo") == ["mdlm", "dimo"]
