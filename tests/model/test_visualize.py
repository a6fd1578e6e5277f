"""What the figures show: texts that do not touch, bars as wide as the weights, maps where they belong."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from matplotlib.colors import to_hex, to_rgb
from PIL import Image

from mova import experts
from mova.inspection import attention_maps, recorded
from mova.visualize import attention_figure, routing_figure
from mova.visualize.page import MOST_LINES, MOST_PIXELS, OFFICIAL_COLORS, expert_colors
from mova.visualize.routing import TRACK

ROOT = Path(__file__).resolve().parents[2]
POOL = list(experts.names())
CHOSEN = [["sam", "codetr"], [], ["deplot"]]
GATES = torch.zeros(3, 2, 7)
GATES[0, 0, POOL.index("sam")], GATES[0, 0, POOL.index("codetr")] = 0.25, 0.75
GATES[0, 1, POOL.index("codetr")] = GATES[2, :, POOL.index("deplot")] = 1
QUESTIONS = ["What outlines the shape?", "Is $5 more than $3?", "How much?"]


def images(count=3):
    return [Image.new("RGB", ((60, 40), (40, 60), (50, 50))[i % 3], (200, 10 * i, 30)) for i in range(count)]


def words(figure):
    """All text, line by line and top down."""
    return [t.get_text() for t in figure.texts]


def check_texts(figure):
    """No two texts touch, none leaves the figure."""
    renderer = figure.canvas.get_renderer()
    boxes = [t.get_window_extent(renderer).padded(-1) for t in figure.texts]
    for a, b in itertools.combinations(range(len(boxes)), 2):
        assert not boxes[a].overlaps(boxes[b]), (words(figure)[a], words(figure)[b])
    for box, text in zip(boxes, words(figure), strict=True):
        assert box.x0 > 0 and box.y0 > 0 and box.x1 < figure.bbox.x1 and box.y1 < figure.bbox.y1, text


def check_axes(figure):
    """No two axes touch, none leaves the figure."""
    boxes = [a.get_position() for a in figure.axes]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(0 < b.x0 < b.x1 < 1 and 0 < b.y0 < b.y1 < 1 for b in boxes)


def test_routing_figure_says_everything():
    figure = routing_figure(images(), QUESTIONS, CHOSEN, GATES, POOL, answers=["Its edge.", "Yes.", "Two."])
    found = words(figure)
    assert len(figure.axes) == 6
    for text in ("What outlines the", "Is $5 more than $3?", "How much?", "Its edge.", "Yes.", "Two.", "no expert"):
        assert any(text in line for line in found), text
    assert [found.count(name) for name in POOL] == [int(n in ("sam", "codetr", "deplot")) for n in POOL]
    assert found.count("block 1") == found.count("block 2") == 3
    assert [t for t in found if "%" in t] == ["25%", "codetr 75%", "codetr 100%", "deplot 100%", "deplot 100%"]
    assert not any(t.get_parse_math() for t in figure.texts), "dollars are no formula"
    assert "question, chosen experts, answer" in found and "fused tokens (PCA)" not in found
    check_texts(figure)
    check_axes(figure)


def test_bars_have_the_weights():
    figure = routing_figure(images(), QUESTIONS, CHOSEN, GATES.bfloat16(), POOL)
    bars = [[(p.get_x(), p.get_width(), to_hex(p.get_facecolor())) for p in a.patches] for a in figure.axes[1::2]]
    track = (0, 1, TRACK)
    sam, codetr, deplot = (OFFICIAL_COLORS[POOL.index(n)] for n in ("sam", "codetr", "deplot"))
    assert bars[0] == [track, (0, 0.25, sam), (0.25, 0.75, codetr), track, (0, 1, codetr)]
    assert bars[1] == [track, track]
    assert bars[2] == [track, (0, 1, deplot)] * 2


def test_images_keep_their_shape_and_colour():
    wide = Image.new("RGBA", (3000, 1000), (10, 200, 30, 255))
    figure = routing_figure([wide, *images(2)], QUESTIONS, CHOSEN, GATES, POOL)
    colors = ((10, 200, 30), (200, 0, 30), (200, 10, 30))
    for axes, aspect, color in zip(figure.axes[::2], (3, 1.5, 2 / 3), colors, strict=True):
        box = axes.get_position()
        assert box.width * figure.get_figwidth() / box.height / figure.get_figheight() == pytest.approx(aspect)
        pixels = np.asarray(axes.images[0].get_array())
        assert max(pixels.shape) <= MOST_PIXELS and (pixels == color).all()


def test_token_map_is_the_first_component():
    tokens = torch.randn(3, 16, 10) + 5
    tokens[2] = 0.5  # no component at all
    figure = routing_figure(images(), QUESTIONS, CHOSEN, GATES, POOL, tokens.bfloat16())
    assert len(figure.axes) == 9 and "fused tokens (PCA)" in words(figure)
    for sample, axes in zip(tokens.bfloat16().double(), figure.axes[2::3], strict=True):
        u, s, _ = torch.linalg.svd(sample - sample.mean(0))
        component = u[:, 0] * s[0]
        shown = torch.from_numpy(np.asarray(axes.images[0].get_array())).flatten()
        sign = torch.sign(shown @ component)
        torch.testing.assert_close(shown, sign * component, atol=1e-9, rtol=1e-6)
        assert shown.abs().max() == shown.max()
    assert (shown == 0).all()


NAMES26 = [*(f"expert-{i}" if i % 3 else f"a-rather-long-name-{i}" for i in range(19)), *POOL]
LONG = ["How much is it, all in all? " * 20, "x" * 400, "Short?", ""]


@pytest.mark.parametrize(("rows", "layers", "with_tokens"), [(1, 1, True), (4, 12, False), (16, 3, True)])
def test_nothing_touches(rows, layers, with_tokens):
    chosen = [NAMES26[: (26, 3, 1, 0)[i % 4]] for i in range(rows)]
    gates = torch.rand(rows, layers, 26) * torch.tensor([[n in c for n in NAMES26] for c in chosen])[:, None]
    gates = gates / gates.sum(2, keepdim=True).clamp(min=1e-9)
    questions = [LONG[i % 4] for i in range(rows)]
    tokens = torch.randn(rows, 9, 4) if with_tokens else None
    figure = routing_figure(images(rows), questions, chosen, gates, NAMES26, tokens, answers=questions)
    assert len(figure.axes) == rows * (3 if with_tokens else 2)
    assert figure.get_figwidth() == 10
    assert set(NAMES26) <= set(words(figure))
    check_texts(figure)
    check_axes(figure)


def test_long_names_and_texts_are_cut():
    name = "n" * 80
    figure = routing_figure(images(1), [LONG[0]], [[name]], torch.ones(1, 1, 1), [name], answers=["Yes."])
    found = words(figure)
    chip = next(t for t in found if t.startswith("nn"))
    assert chip.endswith("…") and len(chip) < 80
    question = found[found.index("gate weights") + 1 : found.index(chip)]
    assert len(question) == MOST_LINES and question[-1].endswith("…")
    assert LONG[0].startswith(" ".join(question)[:-1])
    check_texts(figure)
    check_texts(attention_figure(images(1)[0], {name: torch.ones(4, 4)}, (0, 0)))


def test_colours():
    colors = expert_colors(NAMES26)
    assert len(set(colors.values())) == 26
    assert {n: colors[n] for n in POOL} == dict(zip(POOL, OFFICIAL_COLORS, strict=True))
    assert expert_colors(["sam", "own"])["sam"] == colors["sam"]
    for name, color in colors.items():
        channels = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
        luminance = np.dot([0.2126, 0.7152, 0.0722], channels)
        assert 1.05 / (luminance + 0.05) > 3, f"white on {name}'s {color} is hard to read"


def test_attention_figure():
    weights = torch.zeros(4, 4)
    weights[1, 2], weights[3, 0] = 0.75, 0.25
    maps = {"sam": weights, "own": torch.full((4, 4), 1 / 16)}
    figure = attention_figure(images()[0], maps, (1, 3))
    assert words(figure) == ["query", "row 1, column 3", "sam", "peak 12.0x mean", "own", "peak 1.0x mean"]
    assert len(figure.axes) == 3
    check_texts(figure)
    check_axes(figure)
    query, sam, own = figure.axes
    square = np.asarray(query.images[0].get_array())
    assert square.shape == (60, 60, 3)
    assert (square[10:50] == (200, 0, 30)).all() and (square[:10] == experts.BASE.pad_color).all()
    for axes in figure.axes:
        assert all(line.get_xydata().tolist() == [[3.5, 1.5]] for line in axes.lines) and len(axes.lines) == 2
        assert axes.get_xlim() == (0, 4) and axes.get_ylim() == (4, 0)
        assert all(tuple(i.get_extent()) == (0, 4, 4, 0) for i in axes.images)
    overlay = np.asarray(sam.images[1].get_array())
    assert overlay.shape == (4, 4, 4) and to_hex(overlay[0, 0, :3]) == OFFICIAL_COLORS[-1]
    np.testing.assert_allclose(overlay[..., 3] / overlay[1, 2, 3], weights / 0.75)
    assert np.ptp(np.asarray(own.images[1].get_array())[..., 3]) == 0


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 2, 1), (3, 4, 1), (4, 4, 2), (26, 4, 7)])
def test_panels_wrap(count, columns, rows):
    figure = attention_figure(images()[1], {n: torch.rand(6, 6).bfloat16() for n in NAMES26[:count]}, [5, 0])
    corners = {(round(a.get_position().x0, 6), round(a.get_position().y0, 6)) for a in figure.axes}
    assert len(figure.axes) == len(corners) == count + 1
    assert len({x for x, _ in corners}) == columns and len({y for _, y in corners}) == rows
    check_texts(figure)
    check_axes(figure)


def test_of_an_adapter():
    """What mova.inspection finds is what the figures take."""
    adapter, pool = tiny.adapter(), POOL[:3]
    base, features, text = tiny.inputs()
    chosen = [[name for name, on in zip(pool, row, strict=True) if on] for row in tiny.ROUTING.tolist()]
    with recorded(adapter) as record:
        tokens = adapter(base, features, tiny.ROUTING, text, grids=tiny.GRIDS)
    figure = routing_figure(images(4), ["What?"] * 4, chosen, record.gates, pool, tokens)
    bars = figure.axes[1].patches
    weights = [p.get_width() for p in bars if to_hex(p.get_facecolor()) == OFFICIAL_COLORS[0]]
    assert weights == pytest.approx(record.gates[0, :, 0].tolist())
    maps = attention_maps(adapter, base, features, tiny.ROUTING, text, (1, 4), grids=tiny.GRIDS)
    figure = attention_figure(images()[0], {pool[e]: m for e, m in maps[3].items()}, (1, 4))
    assert [t for t in words(figure) if t in POOL] == [POOL[0], POOL[2]]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_saved(tmp_path, suffix):
    path = tmp_path / f"figure.{suffix}"
    routing_figure(images(), QUESTIONS, CHOSEN, GATES, POOL).savefig(path)
    if suffix == "svg":
        assert "<svg" in path.read_text()
    else:
        with Image.open(path) as image:
            assert image.width == 2000
            colors = {color for _, color in image.convert("RGB").getcolors(1 << 20)}
        assert {(255, 255, 255), (200, 0, 30), (200, 10, 30), (200, 20, 30)} <= colors


def test_no_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=re.escape('pip install "mova-kernels[demo]"')):
        routing_figure(images(), QUESTIONS, CHOSEN, GATES, POOL)


def test_imports_no_matplotlib_until_it_draws_and_never_pyplot():
    code = (
        "import sys, torch; from PIL import Image; from mova import inspection, visualize\n"
        "assert 'matplotlib' not in sys.modules\n"
        "visualize.attention_figure(Image.new('RGB', (4, 4)), {'sam': torch.ones(2, 2)}, (0, 0))\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


ROUTING = {"images": images(), "questions": QUESTIONS, "experts": CHOSEN, "gates": GATES, "pool": POOL}
BAD_ROUTING = {
    "images: none": ({"images": []}, ValueError, "images must not be empty"),
    "images: type": ({"images": ["a.png"] * 3}, TypeError, "images[0] must be a PIL image, got 'str'"),
    "questions: length": ({"questions": QUESTIONS[:2]}, ValueError, "questions must have 3 entries"),
    "questions: string": ({"questions": "abc"}, TypeError, "questions must be a list or tuple, got 'str'"),
    "questions: entry": ({"questions": ["a", "b", None]}, TypeError, "questions[2] must be a string, got None"),
    "answers: length": ({"answers": []}, ValueError, "answers must have 3 entries"),
    "experts: length": ({"experts": [["sam"]]}, ValueError, "experts must have 3 entries"),
    "experts: unknown": ({"experts": [["own"], [], []]}, ValueError, "experts must be in the pool"),
    "pool: empty": ({"pool": []}, ValueError, "pool must not be empty"),
    "gates: type": ({"gates": [[[1]]]}, TypeError, "gates must be a tensor, got 'list'"),
    "gates: shape": ({"gates": GATES[..., 1:]}, ValueError, "gates must have shape (3, num_layers, 7), got (3, 2, 6)"),
    "gates: range": ({"gates": 2 * GATES}, ValueError, "gates must be from 0 to 1"),
    "gates: NaN": ({"gates": GATES / 0}, ValueError, "gates must be from 0 to 1"),
    "tokens: shape": ({"tokens": torch.ones(2, 4, 3)}, ValueError, "tokens must have shape (3, T, C)"),
    "tokens: square": ({"tokens": torch.ones(3, 5, 3)}, ValueError, "tokens must lie on a square grid"),
    "tokens: NaN": ({"tokens": torch.ones(3, 4, 3) / 0}, ValueError, "tokens must be finite"),
}
ATTENTION = {"image": images()[0], "maps": {"sam": torch.ones(4, 4), "vary": torch.ones(4, 4)}, "point": (1, 2)}
BAD_ATTENTION = {
    "image": ({"image": None}, TypeError, "image must be a PIL image"),
    "maps: type": ({"maps": [torch.ones(4, 4)]}, TypeError, "maps must map names to tensors, got 'list'"),
    "maps: empty": ({"maps": {}}, ValueError, "maps must not be empty"),
    "maps: keys": ({"maps": {0: torch.ones(4, 4)}}, TypeError, "maps must have names for keys, got [0]"),
    "maps: rank": ({"maps": {"sam": torch.ones(16)}}, ValueError, "maps['sam'] must have shape (R, R)"),
    "maps: square": ({"maps": {"sam": torch.ones(4, 3)}}, ValueError, "maps['sam'] must have shape (4, 4)"),
    "maps: other": ({"maps": {"sam": torch.ones(4, 4), "vary": torch.ones(5, 5)}}, ValueError, "maps['vary'] must"),
    "maps: zero": ({"maps": {"sam": torch.zeros(4, 4)}}, ValueError, "maps['sam'] must be finite, from 0, not all 0"),
    "maps: NaN": ({"maps": {"sam": torch.ones(4, 4) / 0 * 0}}, ValueError, "maps['sam'] must be finite"),
    "point: type": ({"point": 3}, TypeError, "point must be (row, column)"),
    "point: outside": ({"point": (4, 0)}, ValueError, "point[0] must be from 0 to 3, got 4"),
}


@pytest.mark.parametrize("case", BAD_ROUTING)
def test_bad_routing_figure(case):
    changed, error, message = BAD_ROUTING[case]
    with pytest.raises(error, match=re.escape(message)):
        routing_figure(**{**ROUTING, **changed})


@pytest.mark.parametrize("case", BAD_ATTENTION)
def test_bad_attention_figure(case):
    changed, error, message = BAD_ATTENTION[case]
    with pytest.raises(error, match=re.escape(message)):
        attention_figure(**{**ATTENTION, **changed})
