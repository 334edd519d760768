"""The extractor of `eval.fid_features`, from its file."""

import hashlib
import pickle
from functools import partial

import pytest
import torch
from refusals import refused
from safetensors.torch import save_file
from torch import nn

from evaluation.extractor import is_script, read_extractor
from metrics.inception import KEY, Inception


class Colours(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=[2, 3])


@pytest.fixture
def script(tmp_path) -> str:
    path = str(tmp_path / "colours.pt")
    torch.jit.script(Colours()).save(path)
    return path


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Of the Inception network: ones and zeros."""
    with torch.device("meta"):
        shapes = {k: x.shape for k, x in Inception().state_dict().items()}
    return {
        name: torch.full(shape, float(name.endswith(("bn.weight", "var"))))
        for name, shape in shapes.items()
        if "num_batches" not in name
    }


def sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def test_a_script(script):
    """Its name does not matter; the hash is that of the file."""
    found = read_extractor(script)
    assert (found.path, found.kind) == (script, "TorchScript")
    assert found.sha256 == sha256(script)
    x = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    features, logits = found.network(x)
    assert logits is None
    torch.testing.assert_close(features, x.float().mean(dim=(2, 3)))
    assert not found.network.training


FORMS = {
    "pth": lambda x, path: torch.save(x, path),
    "old.pth": lambda x, path: torch.save(
        x, path, _use_new_zipfile_serialization=False
    ),
    "nested.pt": lambda x, path: torch.save({"state_dict": x}, path),
    "safetensors": save_file,
}


@pytest.mark.parametrize("form", FORMS)
def test_weights(weights, form, tmp_path):
    """Of every form in which they are spread, read as data."""
    path = str(tmp_path / f"inception.{form}")
    FORMS[form](weights, path)
    assert not is_script(path)
    found = read_extractor(path)
    assert found.kind == "Inception"
    assert found.sha256 == sha256(path)
    assert torch.equal(found.network.fc.weight, weights["fc.weight"])
    state = found.network.state_dict()
    assert {name for name in state if "num_batches" not in name} == set(weights)


class Bomb:
    def __reduce__(self):
        return open, ("exploded", "w")


def damages(tmp_path) -> dict[str, bytes]:
    """What may lie where weights are looked for."""
    files = [tmp_path / f"{number}.pt" for number in range(3)]
    torch.save({"weight": torch.zeros(3)}, files[0])
    torch.jit.script(Colours()).save(str(files[1]))
    torch.save({"weight": Bomb()}, files[2])
    other, script, archive = (file.read_bytes() for file in files)
    return {
        "nothing": b"",
        "noise": b"\x00\x01" * 50,
        "text": b"weights",
        "other weights": other,
        "half a script": script[:300],
        "a pickle that runs code": pickle.dumps(Bomb()),
        "an archive that runs code": archive,
    }


DAMAGES = (
    *("nothing", "noise", "text", "other weights", "half a script"),
    *("a pickle that runs code", "an archive that runs code"),
)


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_what_is_no_extractor_is_refused(name, suffix, tmp_path, monkeypatch):
    """In one line, and nothing that is in it is done."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(damages(tmp_path)[name])
    refused(partial(read_extractor, str(path)), KEY)
    assert not (tmp_path / "exploded").exists()
