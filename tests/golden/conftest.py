"""Golden tests: our numbers beside those of the reference implementation.

The folder of cases is the environment variable GOLDEN_DIR, by default
`../shared/golden` beside the repository. Without it every test here is skipped.
"""

import pytest
from golden_replay import Replay


@pytest.fixture
def replay(monkeypatch):
    """Recorded draws for torch.rand and torch.randint; all of them must be used."""
    recorded = Replay()
    monkeypatch.setattr("torch.rand", recorded.rand)
    monkeypatch.setattr("torch.randint", recorded.randint)
    yield recorded
    recorded.assert_all_used()
