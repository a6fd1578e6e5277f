"""``python -m mova_kernels`` and its demo, as a user runs them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mova_kernels import _compiled, backends, info


def command(*arguments: str, directory: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mova_kernels", *arguments], capture_output=True, text=True, cwd=directory, timeout=120
    )


def check_sections(sections: dict) -> None:
    assert set(sections) == {"versions", "cpu", "cuda", "native", "environment", "backends"}
    assert {"mova_kernels", "python", "torch", "triton", "huggingface_hub", "os"} == set(sections["versions"])
    assert "cpu, float32" in sections["backends"]
    for answers in sections["backends"].values():
        assert set(answers) == set(backends.ops())
        for op, answer in answers.items():
            assert list(answer.values()).count("runs") == 1, op
            assert all(answer.values()), f"{op}: every other backend has a reason"


def test_collect_has_every_section():
    check_sections(info.collect())


def test_a_failing_probe_shows_its_error_and_hides_nothing(monkeypatch):
    def fail():
        raise OSError("no such library")

    monkeypatch.setattr(_compiled, "cpu_isas", fail)
    monkeypatch.setattr(_compiled, "build_info", fail)
    sections = info.collect()
    assert sections["cpu"]["instruction sets"] == sections["native"]["build"] == "OSError: no such library"
    check_sections(sections)


def test_json_is_what_collect_returns():
    ran = command("--json")
    assert ran.returncode == 0, ran.stderr
    check_sections(json.loads(ran.stdout))


def test_text_names_every_op_and_version(capsys, monkeypatch):
    from mova_kernels import __main__

    monkeypatch.setattr(sys, "argv", ["mova_kernels"])
    __main__.main()
    text = capsys.readouterr().out
    for name in (*backends.ops(), "torch", "cpu library", "cuda library"):
        assert re.search(rf"^ *{name}( |$)", text, re.MULTILINE), name


def test_quick_demo_prints_and_draws(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    ran = command("demo", "--quick", "--device", "cpu", "--dtype", "fp32", "--output", str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    for experts in ("DINOv2.*Co-DETR.*SAM", "Vary.*Pix2Struct", "BiomedCLIP", "none"):
        assert re.search(rf"^ +\d  {experts}", ran.stdout, re.MULTILINE), experts
    difference = re.search(r"Largest difference .* (\S+) of the largest magnitude", ran.stdout)
    effect = re.search(r"output of sample 1 changes by (\S+) of it", ran.stdout)
    assert difference and float(difference[1]) < 1e-4
    assert effect and float(effect[1]) > 0.1, "the comparison proves something only if the experts matter"
    assert (tmp_path / "mova-demo.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert "</svg>" in (tmp_path / "mova-demo.svg").read_text()
    assert "100%" in ran.stderr, "a progress bar"


def test_demo_without_its_extra_names_it(monkeypatch):
    from mova_kernels import __main__

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["mova_kernels", "demo", "--quick"])
    with pytest.raises(SystemExit, match=r"pip install .mova-kernels\[demo\]"):
        __main__.main()


@pytest.mark.parametrize("option", [("--dtype", "fp8"), ("--device", "abacus"), ("--device", "meta")])
def test_demo_rejects_what_it_cannot_do(option, capsys, monkeypatch):
    from mova_kernels import __main__

    monkeypatch.setattr(sys, "argv", ["mova_kernels", "demo", *option])
    with pytest.raises(SystemExit) as stop:
        __main__.main()
    assert stop.value.code == 2
    assert option[0] in capsys.readouterr().err
