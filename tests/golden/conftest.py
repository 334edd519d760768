"""Golden tests: our numbers beside those of the reference implementation.

The folder of cases is the environment variable GOLDEN_DIR; without it,
`../shared/golden` beside the repository; without that, the cases that every clone has,
`cases/`. Kinds that are not in the folder are skipped.
"""

import functools

import pytest
import torch
from golden_replay import Replay

from diffusion.base import Diffusion
from training.row_streams import RowStream


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """The networks are tiny: threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def replay(monkeypatch):
    """Recorded draws for torch.rand, torch.randint and draws by row; all of them must
    be used."""
    recorded = Replay()
    rows = {"uniform": recorded.row_uniform, "integers": recorded.row_integers}
    for name, given in rows.items():
        method = functools.partialmethod(
            lambda stream, f, *args: f(stream, *args), given
        )
        monkeypatch.setattr(RowStream, name, method)
    monkeypatch.setattr(
        Diffusion, "uniforms_in_validation", recorded.published_uniforms
    )
    monkeypatch.setattr("torch.rand", recorded.rand)
    monkeypatch.setattr("torch.randint", recorded.randint)
    yield recorded
    recorded.assert_all_used()
