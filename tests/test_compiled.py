"""Loading the compiled libraries, and choosing an instruction set."""

from __future__ import annotations

import importlib.util

import pytest

from mova_kernels import _compiled

if _compiled.cpu_reason() is not None:
    pytest.skip(str(_compiled.cpu_reason()), allow_module_level=True)


def test_instruction_set_is_never_replaced_silently(isa, monkeypatch):
    with pytest.raises(ValueError, match=r'must be one of base.*got "sse9"'):
        _compiled.set_cpu_isa("sse9")
    assert _compiled.cpu_isa() == isa
    for missing in {"base", "avx2", "avx512", "avx512_bf16"} - set(_compiled.cpu_isas()):
        with pytest.raises((RuntimeError, ValueError), match=missing):
            _compiled.set_cpu_isa(missing)
    monkeypatch.setenv("MOVA_CPU_ISA", "sse9")
    spec = importlib.util.spec_from_file_location("mova_kernels.second_import", _compiled.__file__)
    with pytest.raises(ValueError, match="sse9"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_missing_library(monkeypatch, tmp_path):
    monkeypatch.setattr(_compiled, "_DIRECTORY", tmp_path)
    assert "is missing" in _compiled._load("cpu")


def test_cuda_says_why():
    reason = _compiled.cuda_reason()
    if reason is None:
        pytest.skip("CUDA is available")
    assert reason


def test_a_library_of_another_abi_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(_compiled, "ABI_VERSION", _compiled.ABI_VERSION + 1)
    with pytest.raises(ImportError, match=r'has ABI version \d+, mova_kernels needs \d+: re-run "pip install -e \."'):
        _compiled._load("cpu")
