"""The vision experts as data: the official ones against the published figures, one's own, and bad input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

import mova
from mova import VisionExpert, experts

ROOT = Path(__file__).resolve().parents[2]
CODE_ORDER = ("dinov2", "vary", "codetr", "pix2struct", "deplot", "biomedclip", "sam")
# The table of the vision towers: prepared image, what the encoder sees and how it gets there, tokens, width.
TABLE = {
    "clip": (672, 672, None, 2304, 1024),
    "dinov2": (672, 518, "bilinear", 1369, 1536),
    "vary": (1024, 1024, None, 1024, 512),
    "codetr": (1024, 1280, "nearest", 1369, 256),
    "pix2struct": (720, 720, None, 2025, 1536),
    "deplot": (720, 720, None, 2025, 768),
    "biomedclip": (672, 224, "bilinear", 196, 768),
    "sam": (1024, 1024, None, 4096, 256),
}
PIXELS_PER_TOKEN = {"clip": 14, "dinov2": 14, "vary": 32}  # and 16, Vary has one more convolution of stride 2
OFFICIAL = {expert.name: expert for expert in (experts.BASE, *experts.OFFICIAL)}
OWN = {
    "name": "own",
    "description": "Reads sheet music.",
    "image_size": 384,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "grid": (24, 24),
    "channels": 768,
}


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(experts, "_REGISTRY", dict(experts._REGISTRY))


def test_the_package_is_tested_not_this_folder():
    assert Path(mova.__file__) == ROOT / "mova" / "__init__.py"


def test_import_registers_the_auto_classes_and_loads_no_extra():
    code = (
        "import mova, sys; from transformers import AutoConfig;"
        "assert type(AutoConfig.for_model('mova')) is mova.MoVAConfig;"
        "sys.exit(str({'matplotlib', 'peft', 'tyro'} & set(sys.modules) or ''))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert not result.stderr.strip(), result.stderr


@pytest.mark.parametrize("name", TABLE)
def test_official_expert(name):
    e = OFFICIAL[name]
    assert (e.image_size, e.input_size, e.resize, e.num_tokens, e.channels) == TABLE[name]
    assert [e.input_size // PIXELS_PER_TOKEN.get(name, 16)] * 2 == list(e.native_grid)


def test_order_is_that_of_the_code_not_of_the_paper():
    assert experts.names() == CODE_ORDER
    assert tuple(e.name for e in experts.OFFICIAL) == CODE_ORDER


def test_golden_file_has_the_same_dimensions():
    """It feeds the adapter Co-DETR's 80 x 80 tokens, as the paper has it, before the code reduces them to 37 x 37."""
    meta = json.loads(bytes(np.load(ROOT / "testing" / "data" / "official_dims.npz")["meta"]))
    assert [e.channels for e in experts.OFFICIAL] == meta["expert_channels"]
    assert [e.native_grid for e in experts.OFFICIAL] == [(side, side) for side in meta["expert_grids"]]


def test_layers():
    """CLIP and DINOv2 give a hidden state, the others their final norm or neck; ViTs with a CLS token lose it."""
    assert {n for n, e in OFFICIAL.items() if e.layer == -2} == {"clip", "dinov2"}
    assert {n for n, e in OFFICIAL.items() if e.layer is None} == set(OFFICIAL) - {"clip", "dinov2"}
    assert {n for n, e in OFFICIAL.items() if e.prefix_tokens == 1} == {"clip", "dinov2", "biomedclip"}
    assert {n for n, e in OFFICIAL.items() if e.native_grid != e.grid} == {"codetr"}


def test_t31_t33_four_prepared_images_serve_eight_encoders():
    views = {}
    for name, e in OFFICIAL.items():
        views.setdefault(e.view, set()).add(name)
    groups = [{"clip", "biomedclip"}, {"dinov2"}, {"vary", "codetr", "sam"}, {"pix2struct", "deplot"}]
    assert list(views.values()) == groups
    assert (
        {n for n, e in OFFICIAL.items() if e.patches} == {n for n, e in OFFICIAL.items() if e.std is None} == groups[3]
    )


def test_padding_is_the_truncated_mean():
    assert {e.pad_color for n, e in OFFICIAL.items() if n != "dinov2"} == {(122, 116, 104)}
    assert OFFICIAL["dinov2"].pad_color == (123, 116, 103)


def test_descriptions_differ_and_name_no_model():
    lines = [e.description for e in experts.OFFICIAL]
    assert len(set(lines)) == 7
    assert not any(
        re.search("dino|vary|detr|pix2|plot:|clip|sam|segment anything", line, re.IGNORECASE) for line in lines
    )


def test_own_expert():
    expert = VisionExpert(
        name="music",
        description="Reads sheet music.",
        image_size=384,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        grid=(24, 24),
        channels=768,
    )
    assert experts.register(expert) is expert is experts.get("music")
    assert experts.names() == (*CODE_ORDER, "music")
    assert (expert.input_size, expert.native_grid, expert.num_tokens) == (384, (24, 24), 576)
    assert replace(expert, patches=True).view != expert.view
    prompt = mova.routing_prompt("Which key?", ["sam", "music"])
    assert "B. Reads sheet music.\n" in prompt.text
    assert mova.parse_routing("B", prompt.pool) == ("music",)


def test_replaced_expert_keeps_its_place():
    changed = experts.register(replace(experts.get("vary"), mean=(0.5, 0.5, 0.5)), replace=True)
    assert experts.get("vary") is changed and experts.names() == CODE_ORDER


def test_survives_json_and_hashing():
    for e in OFFICIAL.values():
        again = VisionExpert(**json.loads(json.dumps(asdict(e))))
        assert again == e and hash(again) == hash(e) and again.view == e.view


def test_resolve():
    own = VisionExpert(**OWN)
    assert experts.resolve(["sam", own]) == (OFFICIAL["sam"], own)


FIELDS = {
    "name: type": ({"name": 3}, TypeError, "name must be a string, got 3"),
    "name: capital": ({"name": "SAM"}, ValueError, "name must be up to 100 lower-case letters, digits, _"),
    "name: long": ({"name": "a" * 101}, ValueError, "name must be up to 100"),
    "name: newline": ({"name": "sam\n"}, ValueError, "name must be up to"),
    "name: all": ({"name": "all"}, ValueError, "neither all nor none, got 'all'"),
    "description: empty": ({"description": " "}, ValueError, "description must be one line of text, got ' '"),
    "description: lines": ({"description": "a\nb"}, ValueError, "description must be one line of text, got 'a\\nb'"),
    "image_size: zero": ({"image_size": 0}, ValueError, "image_size must be at least 1, got 0"),
    "image_size: float": ({"image_size": 384.0}, TypeError, "image_size must be an int, got 384.0"),
    "channels: bool": ({"channels": True}, TypeError, "channels must be an int, got True"),
    "prefix_tokens": ({"prefix_tokens": -1}, ValueError, "prefix_tokens must be at least 0, got -1"),
    "grid: one side": ({"grid": 24}, TypeError, "grid must be (h, w), got 24"),
    "grid: three": ({"grid": (24, 24, 1)}, ValueError, "grid must be (h, w), got (24, 24, 1)"),
    "grid: zero": ({"grid": (24, 0)}, ValueError, "grid[1] must be at least 1, got 0"),
    "native_grid": ({"native_grid": (24, 1.5)}, TypeError, "native_grid[1] must be an int, got 1.5"),
    "mean: type": ({"mean": 0.5}, TypeError, "mean must be three numbers, got 0.5"),
    "mean: text": ({"mean": ("0.5",) * 3}, TypeError, "mean must be three numbers, got ('0.5', '0.5', '0.5')"),
    "mean: bytes": ({"mean": (122, 116, 104)}, ValueError, "mean must be three numbers from 0 to 1, got (122, 116"),
    "std: zero": ({"std": (0.5, 0.5, 0)}, ValueError, "std must be three numbers above 0, got (0.5, 0.5, 0)"),
    "std: nan": ({"std": (0.5, 0.5, float("nan"))}, ValueError, "std must be three numbers above 0"),
    "resize: missing": (
        {"input_size": 224},
        ValueError,
        "resize must be bilinear or nearest from image_size 384 to input_size 224, got None",
    ),
    "resize: unknown": (
        {"input_size": 224, "resize": "bicubic"},
        ValueError,
        "resize must be bilinear or nearest from",
    ),
    "resize: needless": (
        {"resize": "nearest"},
        ValueError,
        "resize must be None from image_size 384 to input_size 384",
    ),
    "layer": ({"layer": "last"}, TypeError, "layer must be an int, got 'last'"),
    "patches: type": ({"patches": 16}, TypeError, "patches must be a bool, got 16"),
    "patches: grid": (
        {"patches": True, "grid": (45, 45)},
        ValueError,
        "grid must divide image_size 384 into patches, got (45, 45)",
    ),
}


@pytest.mark.parametrize("name", FIELDS)
def test_bad_field(name):
    fields, kind, message = FIELDS[name]
    with pytest.raises(kind, match=re.escape(message)):
        VisionExpert(**{**OWN, **fields})


CALLS = {
    "the base encoder's name": (
        experts.register,
        replace(OFFICIAL["sam"], name="clip"),
        ValueError,
        "expert must have a name that is not registered yet (or replace=True), got 'clip'",
    ),
    "unknown": (experts.get, "dino", ValueError, "name must be a registered expert (dinov2, vary, codetr, "),
    "no name": (experts.get, None, TypeError, "name must be a string, got None"),
    "repeated": (experts.register, OFFICIAL["sam"], ValueError, "expert must have a name that is not registered yet"),
    "no expert": (experts.register, "sam", TypeError, "expert must be a VisionExpert, got 'sam'"),
    "one string": (
        experts.resolve,
        "sam",
        TypeError,
        "experts must be a sequence of names or VisionExperts, got 'sam'",
    ),
    "nothing": (experts.resolve, [], ValueError, "experts must not be empty, got []"),
    "twice": (
        experts.resolve,
        ["sam", OFFICIAL["sam"]],
        ValueError,
        "experts must not repeat a name, got ['sam', 'sam']",
    ),
    "unknown in a list": (experts.resolve, ["sam", "dino"], ValueError, "name must be a registered expert (dinov2, "),
}


@pytest.mark.parametrize("name", CALLS)
def test_bad_call(name):
    call, argument, kind, message = CALLS[name]
    with pytest.raises(kind, match=re.escape(message)):
        call(argument)
    assert experts.names() == CODE_ORDER
