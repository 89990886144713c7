"""Tensors of a folder, one at a time."""

import pytest
import torch
from published_folders import write_shards

from aki.models import checkpoint_files
from aki.models.checkpoint_files import TensorFiles

TENSORS = {
    "a": torch.arange(35.0).view(7, 5),
    "b": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "c": torch.tensor(1.0),
    "d": torch.arange(7, dtype=torch.float16),
}


@pytest.fixture
def files(tmp_path):
    write_shards(tmp_path, TENSORS, 3)
    return TensorFiles(tmp_path)


def test_what_is_there(files):
    assert files.shapes == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    assert files.dtypes == {name: tensor.dtype for name, tensor in TENSORS.items()}
    assert files.largest == max(path.stat().st_size for path in files.folder.glob("*.safetensors"))


def test_reading(files):
    assert all(torch.equal(files.read(name), tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("at_once", [1, 20, 40, 60, 1000])
@pytest.mark.parametrize(("name", "rows"), [("a", 7), ("a", 6), ("a", 1), ("d", 5)])
def test_rows_are_copied_a_few_at_a_time(files, monkeypatch, at_once, name, rows):
    monkeypatch.setattr(checkpoint_files, "_COPIED_AT_ONCE", at_once)
    out = torch.full((rows, *TENSORS[name].shape[1:]), -1, dtype=TENSORS[name].dtype)
    files.copy_rows(name, out)
    assert torch.equal(out, TENSORS[name][:rows])
