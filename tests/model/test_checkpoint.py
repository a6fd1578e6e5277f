"""Weight files: whole, in shards, of all formats; damaged and hostile ones are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mova.checkpoint import read_state

ONE, TWO = torch.ones(1), torch.full((2, 2), 2.0, dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Path(".")


def names(path):
    return sorted(read_state(Path(path)))


def test_one_file():
    save_file({"a": ONE, "b": TWO}, "x.safetensors")
    state = read_state(Path("x.safetensors"))
    assert state.keys() == {"a", "b"} and torch.equal(state["b"], TWO) and state["b"].dtype == torch.bfloat16
    for wrapper in ("state_dict", "model", "module"):
        torch.save({wrapper: {"a": TWO}, "epoch": 3}, "x.pth")
        assert torch.equal(read_state(Path("x.pth"))["a"], TWO)
    torch.save({"a": TWO}, "old.pth", _use_new_zipfile_serialization=False)  # which cannot be mapped into memory
    assert torch.equal(read_state(Path("old.pth"))["a"], TWO)


def test_tensors_are_mapped_into_memory():
    """A later change of the file shows: nothing is read before it is asked."""
    noise = torch.randn(1 << 16)
    save_file({"a": noise}, "x.safetensors")
    torch.save({"a": noise}, "x.bin")
    for file in (Path("x.safetensors"), Path("x.bin")):
        tensor = read_state(file)["a"]
        start = file.read_bytes().index(noise.numpy().tobytes())
        with file.open("r+b") as opened:
            opened.seek(start + 8)
            opened.write(ONE.numpy().tobytes())
        assert tensor[2] == 1 and torch.equal(tensor[3:], noise[3:])


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_directory(directory, suffix):
    def save(state, name):
        save_file(state, name) if suffix == "safetensors" else torch.save(state, name)

    stem = "model" if suffix == "safetensors" else "pytorch_model"
    with pytest.raises(FileNotFoundError, match="no weights"):
        read_state(directory)
    save({"a": ONE}, f"{stem}-1.{suffix}")
    save({"b": TWO}, f"{stem}-2.{suffix}")
    assert names(directory) == ["a", "b"]
    save({"b": TWO}, f"{stem}-copy.{suffix}")
    with pytest.raises(ValueError, match=r"source must have each name in one file, got \['b'\]"):
        read_state(directory)
    index = {"weight_map": {"a": f"{stem}-1.{suffix}", "b": f"{stem}-2.{suffix}"}}
    Path(f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    assert names(directory) == ["a", "b"]
    Path(f"{stem}-2.{suffix}").unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"no {stem}-2.{suffix} in")):
        read_state(directory)


def test_safetensors_are_preferred(directory):
    save_file({"a": ONE}, "model.safetensors")
    torch.save({"b": ONE}, "pytorch_model.bin")
    assert names(directory) == ["a"]


class Opens:
    def __reduce__(self):
        return open, ("ran", "w")


FILES = {
    "code.bin": {"x": Opens()},
    "list.bin": [ONE],
    "nested.bin": {"x": {"y": ONE}},
    "empty.bin": {},
    "pointer.safetensors": b"version https://git-lfs.github.com/spec/v1",
    "pointer.bin": b"version https://git-lfs.github.com/spec/v1",
    "nothing.bin": b"",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("zipped", [True, False])
def test_refused(name, zipped):
    content = FILES[name]
    if isinstance(content, bytes):
        Path(name).write_bytes(content)
    else:
        torch.save(content, name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=f"source must .*, got '{name}'"):
        read_state(Path(name))
    assert not Path("ran").exists()
