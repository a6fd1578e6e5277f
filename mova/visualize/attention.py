"""The figure of where one token of an image looks in each expert."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._checks import check, check_whole
from ..experts import BASE
from .page import GAP, GREY, INK, MARGIN, Page, check_image, check_shape, expert_colors, reduced

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

PANEL, TITLE, PER_ROW = 2.2125, 0.25, 4


def attention_figure(image: Image, maps: Mapping[str, Tensor], point: tuple[int, int]) -> Figure:
    """Draw where a token looked: the image with the token marked, then each expert's attention map over the image.

    The image is padded to a square, as the encoders see it. Each map is scaled to its own peak; the title says how many
    times the mean the peak is.

    Args:
        image: PIL image.
        maps: name to (R, R) attention over the grid, of any float dtype and device. ``mova.inspection.attention_maps``
            returns such maps by the expert's index.
        point: (row, column) of the token in cells of the grid.

    Returns:
        the figure, up to four panels wide.

    Raises:
        ImportError: matplotlib is missing.
        TypeError, ValueError: an argument has a wrong type, shape or range.
    """
    page = Page()
    check_image("image", image)
    check(isinstance(maps, Mapping), "maps", "must map names to tensors", type(maps).__name__, TypeError)
    check(len(maps) > 0, "maps", "must not be empty", maps)
    names = list(maps)
    check(all(isinstance(n, str) for n in names), "maps", "must have names for keys", names, TypeError)
    check_shape(f"maps[{names[0]!r}]", maps[names[0]], ("R", "R"))
    side = len(maps[names[0]])
    for name, weights in maps.items():
        check_shape(f"maps[{name!r}]", weights, (side, side))
        peak = float(weights.max())
        check(0 < peak < math.inf and weights.min() >= 0, f"maps[{name!r}]", "must be finite, from 0, not all 0", peak)
    check(isinstance(point, tuple | list) and len(point) == 2, "point", "must be (row, column)", point, TypeError)
    for i, cell in enumerate(point):
        check_whole(f"point[{i}]", cell)
        check(0 <= cell < side, f"point[{i}]", f"must be from 0 to {side - 1}", cell)
    square, colors = _square(image), expert_colors(names)
    faded = square.convert("L").point(lambda v: 130 + v * 125 // 255).convert("RGB")

    extent = (0, side, side, 0)
    where = f"row {point[0]}, column {point[1]}"
    for i, (title, note, color) in enumerate([("query", where, INK), *((n, "", colors[n]) for n in names)]):
        x, y = MARGIN + i % PER_ROW * (PANEL + GAP), MARGIN + TITLE + i // PER_ROW * (PANEL + GAP + TITLE)
        axes = page.axes(x, y, PANEL, PANEL)
        axes.imshow(faded if i else square, extent=extent)
        if i:
            heat = maps[title].detach().double().cpu()
            note = f"peak {heat.max() / heat.mean():.1f}x mean"
            axes.imshow(_tinted(color, heat / heat.max()), extent=extent, interpolation="bilinear")
        title = page.cut(title, PANEL - page.width(note, 9) - 0.12, 11, "bold")
        page.text(x, y - 0.08, title, 11, color=color, weight="bold", va="baseline")
        page.text(x + PANEL, y - 0.08, note, 9, color=GREY, ha="right", va="baseline")
        for ring, width in (("white", 3.2), (INK, 1.4)):
            axes.plot(point[1] + 0.5, point[0] + 0.5, "o", markersize=9, mec=ring, mew=width, mfc="none")
        axes.set_xlim(0, side)
        axes.set_ylim(side, 0)
    columns, rows = min(PER_ROW, len(names) + 1), math.ceil((len(names) + 1) / PER_ROW)
    return page.finished(2 * MARGIN + columns * (PANEL + GAP) - GAP, 2 * MARGIN + rows * (PANEL + GAP + TITLE) - GAP)


def _square(image: Image) -> Image:
    """Pad an image to a square as for the base encoder."""
    from PIL import Image

    side = max(image.size)
    square = Image.new("RGB", (side, side), BASE.pad_color)
    square.paste(image.convert("RGB"), ((side - image.width) // 2, (side - image.height) // 2))
    return reduced(square)


def _tinted(color: str, opacity: Tensor) -> Any:
    """Turn opacities (R, R) in [0, 1] into pixels (R, R, 4) of one colour."""
    rgb = torch.tensor([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)], dtype=opacity.dtype)
    return torch.cat([rgb.expand(*opacity.shape, 3), 0.9 * opacity[..., None]], -1).numpy()
