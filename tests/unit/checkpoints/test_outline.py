"""What a checkpoint says of itself is read without its weights and without torch."""

import subprocess
import sys

import pytest
import torch
from command_line import ROOT
from golden_cases import golden_dir
from refusals import refused
from released import write_released

from checkpoints.outline import read_about
from checkpoints.reading import read_checkpoint

KEY = "eval.checkpoint_path"
CONTENT = {
    "state_dict": {
        "backbone.vocab_embed.embedding": torch.zeros(7, 4),
        "backbone.head": torch.nn.Parameter(torch.ones(3)),
        "teacher.x": torch.zeros(2),
    },
    "hyper_parameters": {"config": {"algo": {"name": "mdlm"}, "model": {"length": 8}}},
    "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}}],
    "identity": {"settings": {}, "course": {}, "data": {}},
}


@pytest.mark.parametrize("is_zip", [True, False])
def test_it_says_what_the_whole_file_says(tmp_path, is_zip):
    path = str(tmp_path / "last.ckpt")
    torch.save(CONTENT, path, _use_new_zipfile_serialization=is_zip)
    about, whole = read_about(path, KEY), read_checkpoint(path, KEY)
    assert about.config == whole.config == CONTENT["hyper_parameters"]["config"]
    assert about.shapes == whole.shapes
    assert about.is_own
    assert about.weights is None


@pytest.mark.parametrize(
    "path", sorted(golden_dir().glob("checkpoint_*/checkpoint.ckpt"))
)
def test_files_of_the_published_code(path):
    about, whole = read_about(str(path), KEY), read_checkpoint(str(path), KEY)
    assert about.config == whole.config
    assert about.shapes == whole.shapes
    assert not about.is_own


def test_folders(tmp_path):
    write_released(tmp_path / "duo", "DUO", vocab_size=9, length=8)
    about = read_about(str(tmp_path / "duo"), KEY)
    whole = read_checkpoint(str(tmp_path / "duo"), KEY)
    assert about.config == whole.config
    assert {k: tuple(x) for k, x in about.shapes.items()} == whole.shapes


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save(CONTENT, path)
    whole = path.read_bytes()
    for content in (b"", b"PK\x03\x04", whole[: len(whole) // 2], b"\x80\x02K\x01."):
        path.write_bytes(content)
        refused(lambda: read_about(str(path), KEY), KEY, "cannot be read safely")
    torch.save([1], path)
    refused(lambda: read_about(str(path), KEY), "it holds a list")


def test_torch_is_not_imported(tmp_path):
    torch.save(CONTENT, tmp_path / "last.ckpt")
    write_released(tmp_path / "duo", "DUO", vocab_size=9, length=8)
    code = f"""
import sys
from checkpoints.outline import read_about
import cli.stated, cli.uses
for name in ("last.ckpt", "duo"):
    assert read_about(f"{tmp_path}/{{name}}", "x").config
found = [x for x in ("torch", "lightning", "transformers", "numpy") if x in sys.modules]
assert not found, found
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
