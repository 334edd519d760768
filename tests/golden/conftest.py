"""Golden tests: our numbers beside those of the reference implementation.

The folder of cases is the environment variable GOLDEN_DIR; without it,
`../shared/golden` beside the repository; without that, the cases that every clone has,
`cases/`. Kinds that are not in the folder are skipped.
"""

import pytest
import torch
from golden_replay import Replay


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """The networks are tiny: threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def replay(monkeypatch):
    """Recorded draws for torch.rand and torch.randint; all of them must be used."""
    recorded = Replay()
    monkeypatch.setattr("torch.rand", recorded.rand)
    monkeypatch.setattr("torch.randint", recorded.randint)
    yield recorded
    recorded.assert_all_used()
