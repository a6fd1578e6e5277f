"""MoVAdapter.from_pretrained: dtypes, weights of either kind, and folders that are incomplete or damaged."""

from __future__ import annotations

import re

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from mova_kernels import MoVAdapter, MoVAdapterConfig


def saved(folder, dtype=torch.float32):
    adapter = tiny.adapter(dtype=dtype)
    adapter.save_pretrained(folder)
    return adapter.state_dict()


def assert_holds(adapter, state, dtype):
    for name, parameter in adapter.state_dict().items():
        assert parameter.dtype == dtype, name
        assert torch.equal(parameter, state[name].to(dtype)), name


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_stored_dtype_is_kept(tmp_path, stored):
    state = saved(tmp_path, stored)
    assert_holds(MoVAdapter.from_pretrained(tmp_path), state, stored)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype_converts(tmp_path, stored, wanted):
    state = saved(tmp_path, stored)
    assert_holds(MoVAdapter.from_pretrained(str(tmp_path), dtype=wanted), state, wanted)


def test_weights_in_a_pickle(tmp_path):
    state = saved(tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert_holds(MoVAdapter.from_pretrained(tmp_path), state, torch.float32)


def test_official_weights_in_bf16_with_tables_in_fp32(tmp_path):
    """The tables that official checkpoints repeat do not decide the dtype."""
    adapter = tiny.adapter()
    official = adapter.official_state_dict()
    save_file({k: v if ".rope." in k else v.bfloat16() for k, v in official.items()}, tmp_path / "model.safetensors")
    loaded = MoVAdapter.from_pretrained(tmp_path, config=tiny.CONFIG)
    assert_holds(loaded, adapter.state_dict(), torch.bfloat16)


def test_several_dtypes_need_a_choice(tmp_path):
    state = saved(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({k: v.bfloat16() if "norm" in k else v for k, v in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=r"dtype must be given .*got \['torch.bfloat16', 'torch.float32'\]"):
        MoVAdapter.from_pretrained(tmp_path)
    loaded = MoVAdapter.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_holds(loaded, state, torch.bfloat16)


class Code:
    def __reduce__(self):
        return (print, ("code of a pickle has run",))


def truncated(file):
    file.write_bytes(file.read_bytes()[:200])


def write(text):
    return lambda file: file.write_text(text)


# What happens to which file, and what the error has to name besides.
DAMAGE = {
    "no config": ("config.json", lambda file: file.unlink(), FileNotFoundError, "no config.json in"),
    "config: broken": ("config.json", write("{"), ValueError, "is not the config of an adapter"),
    "config: a list": ("config.json", write("[1]"), ValueError, "is not the config of an adapter"),
    "config: of another model": ("config.json", write('{"a": 1}'), ValueError, "is not the config of an adapter"),
    "config: a string": ("config.json", write('{"topk": "2"}'), ValueError, "topk must be an int, got '2'"),
    "config: no list": (
        "config.json", write('{"expert_channels": 3}'), ValueError, "expert_channels must be a sequence of integers",
    ),
    "no weights": ("model.safetensors", lambda file: file.unlink(), FileNotFoundError, "no model.safetensors and no "),
    "weights: truncated": ("model.safetensors", truncated, ValueError, "model.safetensors must be safetensors"),
    "weights: empty": ("model.safetensors", write(""), ValueError, "model.safetensors must be safetensors"),
    "pickle: empty": ("pytorch_model.bin", write(""), ValueError, "pytorch_model.bin must be"),
    "pickle: text": ("pytorch_model.bin", write("text"), ValueError, "pytorch_model.bin must be"),
    "pickle: code": (
        "pytorch_model.bin", lambda file: torch.save({"a": Code()}, file), ValueError, "pytorch_model.bin must be",
    ),
    "pickle: no tensors": (
        "pytorch_model.bin", lambda file: torch.save([1], file), ValueError, "must hold tensors by name",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_folders_are_refused(tmp_path, capsys, name):
    saved(tmp_path)
    file, damage, kind, message = DAMAGE[name]
    if file.endswith(".bin"):
        (tmp_path / "model.safetensors").unlink()
    damage(tmp_path / file)
    with pytest.raises(kind, match=re.escape(message)) as error:
        MoVAdapter.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "has run" not in capsys.readouterr().out


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="is neither a folder nor the name of a repository"):
        MoVAdapter.from_pretrained(tmp_path / "absent")


@pytest.mark.parametrize("arguments", [{"dtype": "bfloat16"}, {"dtype": torch.int8}, {"torch_dtype": torch.float16}])
def test_bad_arguments(tmp_path, arguments):
    saved(tmp_path)
    with pytest.raises(TypeError, match="dtype"):
        MoVAdapter.from_pretrained(tmp_path, **arguments)


def test_missing_and_unknown_weights_are_errors_unless_allowed(tmp_path):
    state = saved(tmp_path)
    file = tmp_path / "model.safetensors"
    changed = load_file(file)
    changed["more"] = changed.pop("blocks.1.norm4.bias")
    save_file(changed, file)
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*blocks\.1\.norm4\.bias.*Unexpected.*more"):
        MoVAdapter.from_pretrained(tmp_path)
    loaded = MoVAdapter.from_pretrained(tmp_path, strict=False)
    assert torch.equal(loaded.pos_embed, state["pos_embed"])


def test_expert_channels_of_a_config_are_a_sequence():
    with pytest.raises(TypeError, match="expert_channels must be a sequence of integers, got 8"):
        MoVAdapterConfig(expert_channels=8)
