"""Figures of what a MoVA model chose and where it looked. They need matplotlib, and no display."""

from __future__ import annotations

import colorsys
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._checks import check, check_whole
from .experts import BASE, OFFICIAL, VisionExpert
from .routing import _members, _names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

# Lengths are inches and sizes of text points: a figure is 10 inches wide, to be read when that is 900 pixels.
WIDTH, DPI, MARGIN, GAP = 10.0, 200, 0.2, 0.25
INK, GREY, PALE, TRACK = "#24292f", "#6e7781", "#d8dee4", "#eef1f4"
OFFICIAL_COLORS = ("#1a7fd0", "#b0487a", "#c96f16", "#23885f", "#7058bf", "#c43d43", "#66801f")
IMAGE, IMAGE_HEIGHT, BARS, BLOCK_LABEL, TOKENS = 2.1, 1.8, 2.35, 0.6, 1.5  # columns of routing_figure
MIDDLE = "center_baseline"
BAR, CHIP, CHIP_GAP = 0.32, 0.21, 0.1  # the pitch of the bars; height of the chips and what is between them
MOST_LINES, MOST_PIXELS = 5, 800  # of a question or an answer; of an image's longer side
PANEL, TITLE, PER_ROW = 2.2125, 0.25, 4  # of attention_figure


def routing_figure(
    images: Sequence[Image],
    questions: Sequence[str],
    experts: Sequence[Iterable[str | VisionExpert]],
    gates: Tensor,
    pool: Sequence[str | VisionExpert],
    tokens: Tensor | None = None,
    answers: Sequence[str] | None = None,
) -> Figure:
    """One row per image: the question, the chosen experts, their weights in each block, and what came of them.

    An expert has one colour throughout a figure; the official ones have theirs in every figure.

    Args:
        images: B PIL images.
        questions: B strings, cut behind the fifth line, as answers are. matplotlib's ``font.family`` must have their
            characters.
        experts: per image those that were chosen, in the order to show them in.
        gates: (B, num_layers, N) weights from 0 to 1, of any dtype and device, as ``mova.inspection.recorded`` gives.
        pool: the N experts in the order of ``gates``.
        tokens: (B, T, C) fused tokens on a square grid, T = R * R; shown is each token's part in the first principal
            component of its sample, with the sign that makes the entry of largest magnitude positive.
        answers: B strings.

    Returns:
        the figure, 10 inches wide, as high as it needs to be.

    Raises:
        ImportError: matplotlib is missing.
        TypeError, ValueError: an argument of the wrong type, length, shape or range, or an expert outside the pool.
    """
    page = _Page()
    names = _names(pool)
    _check_list("images", images)
    check(len(images) > 0, "images", "must not be empty", images)
    for i, image in enumerate(images):
        _check_image(f"images[{i}]", image)
    for argument, strings in (("questions", questions), ("answers", answers)):
        if strings is not None:
            _check_list(argument, strings, len(images))
            for i, string in enumerate(strings):
                check(isinstance(string, str), f"{argument}[{i}]", "must be a string", string, TypeError)
    _check_list("experts", experts, len(images))
    chosen = [list(dict.fromkeys(_members(e, names))) for e in experts]
    _check_shape("gates", gates, (len(images), "num_layers", len(names)))
    gates = gates.detach().double().cpu()
    check(((gates >= 0) & (gates <= 1)).all(), "gates", "must be from 0 to 1", gates.aminmax())
    components = [_component(sample) for sample in _grids(tokens, len(images))] if tokens is not None else None

    colors = _colors(names)
    bars = WIDTH - MARGIN - BARS - (TOKENS + GAP if components is not None else 0)  # where the columns begin
    text = MARGIN + IMAGE + GAP
    room = bars - BLOCK_LABEL - GAP - text
    headings = [(text, "question, chosen experts" + (", answer" if answers is not None else ""))]
    headings.append((bars, "gate weights"))
    if components is not None:
        headings.append((WIDTH - MARGIN - TOKENS, "fused tokens (PCA)"))
    for x, heading in headings:
        page.text(x, 0.22, heading, 8.5, color=GREY)
    top = 0.55
    for i, image in enumerate(images):
        if i:
            page.rule(top - GAP / 2)
        bottoms = [page.image(image, MARGIN, top, IMAGE, IMAGE_HEIGHT)]
        y = page.paragraph(questions[i], text, top, room, 11, weight="bold")
        y = page.chips(chosen[i], colors, text, y + 0.1, room)
        if answers is not None:
            y = page.paragraph(answers[i], text, y + 0.1, room, 10)
        bottoms += [y, top + BAR * gates.shape[1]]
        order = dict.fromkeys([*chosen[i], *names])
        _draw_bars(page, bars, top, {n: gates[i, :, names.index(n)] for n in order}, colors)
        if components is not None:
            axes = page.axes(WIDTH - MARGIN - TOKENS, top, TOKENS, TOKENS)
            axes.imshow(components[i].numpy(), cmap="viridis")
            bottoms.append(top + TOKENS)
        top = max(bottoms) + GAP
    return page.finished(WIDTH, top - GAP + MARGIN)


def attention_figure(image: Image, maps: Mapping[str, Tensor], point: tuple[int, int]) -> Figure:
    """Where a token looked: the image with the token marked, then a panel per expert with its map over the image.

    The image is padded to a square, as the encoders see it. Each map is scaled to its own peak, which stands
    above it as a multiple of the mean.

    Args:
        image: PIL image.
        maps: name to (R, R) attention over the grid, of any float dtype and device, as one sample of
            ``mova.inspection.attention_maps`` has it by the expert's index.
        point: (row, column) of the token in cells of the grid.

    Returns:
        the figure, up to four panels wide.

    Raises:
        ImportError: matplotlib is missing.
        TypeError, ValueError: an argument of the wrong type, shape or range.
    """
    page = _Page()
    _check_image("image", image)
    check(isinstance(maps, Mapping), "maps", "must map names to tensors", type(maps).__name__, TypeError)
    check(len(maps) > 0, "maps", "must not be empty", maps)
    names = list(maps)
    check(all(isinstance(n, str) for n in names), "maps", "must have names for keys", names, TypeError)
    _check_shape(f"maps[{names[0]!r}]", maps[names[0]], ("R", "R"))
    side = len(maps[names[0]])
    for name, weights in maps.items():
        _check_shape(f"maps[{name!r}]", weights, (side, side))
        peak = float(weights.max())
        check(0 < peak < math.inf and weights.min() >= 0, f"maps[{name!r}]", "must be finite, from 0, not all 0", peak)
    check(isinstance(point, tuple | list) and len(point) == 2, "point", "must be (row, column)", point, TypeError)
    for i, cell in enumerate(point):
        check_whole(f"point[{i}]", cell)
        check(0 <= cell < side, f"point[{i}]", f"must be from 0 to {side - 1}", cell)
    square, colors = _square(image), _colors(names)
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


class _Page:
    """A figure laid out in inches from its top left corner, of a size that is known at the end."""

    def __init__(self) -> None:
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
            from matplotlib.transforms import Affine2D
        except ImportError as error:
            raise ImportError('figures need matplotlib: pip install "mova-kernels[demo]"') from error
        self.figure = Figure(dpi=DPI, facecolor="white")
        self.renderer = FigureCanvasAgg(self.figure).get_renderer()
        self.from_top = Affine2D()
        self.inches = self.from_top + self.figure.dpi_scale_trans
        self.boxes: list[tuple[Axes, tuple[float, float, float, float]]] = []

    def finished(self, width: float, height: float) -> Figure:
        self.figure.set_size_inches(width, height)
        self.from_top.scale(1, -1).translate(0, height)
        for axes, (x, y, w, h) in self.boxes:
            axes.set_position((x / width, 1 - (y + h) / height, w / width, h / height))
        return self.figure

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Axes without ticks, in a thin frame."""
        axes = self.figure.add_axes((0, 0, 1, 1), xticks=[], yticks=[])
        axes.set_aspect("auto")
        axes.spines[:].set(color=PALE, linewidth=0.8)
        self.boxes.append((axes, (x, y, width, height)))
        return axes

    def text(self, x: float, y: float, words: str, size: float, **style: Any) -> None:
        style = {"va": "top", "color": INK, **style}
        self.figure.text(x, y, words, size=size, transform=self.inches, parse_math=False, **style)

    def rule(self, y: float) -> None:
        from matplotlib.lines import Line2D

        line = Line2D([MARGIN, WIDTH - MARGIN], [y, y], color=PALE, linewidth=0.8, transform=self.inches)
        self.figure.add_artist(line)

    def image(self, image: Image, x: float, y: float, width: float, height: float) -> float:
        """As large as fits into the box, in the middle of its width; returns where it ends."""
        scale = min(width / image.width, height / image.height)
        w, h = image.width * scale, image.height * scale
        self.axes(x + (width - w) / 2, y, w, h).imshow(_reduced(image), aspect="auto")
        return y + h

    def paragraph(self, words: str, x: float, y: float, width: float, size: float, **style: Any) -> float:
        pitch = size * 1.35 / 72
        for line in self.lines(words, width, size, style.get("weight", "normal")):
            self.text(x, y, line, size, **style)
            y += pitch
        return y

    def chips(self, names: Sequence[str], colors: Mapping[str, str], x: float, y: float, width: float) -> float:
        """The names as coloured labels, as many in a line as fit."""
        from matplotlib.patches import FancyBboxPatch

        left = x
        for name in names or ["no expert"]:
            label = self.cut(name, width - 0.18, 9, "bold")
            wide = self.width(label, 9, "bold") + 0.18
            if x > left and x + wide > left + width:
                x, y = left, y + CHIP + CHIP_GAP
            style = {"facecolor": colors[name], "linewidth": 0} if names else {"facecolor": "none", "edgecolor": GREY}
            box = f"round,pad=0,rounding_size={CHIP / 2}"
            self.figure.add_artist(FancyBboxPatch((x, y), wide, CHIP, box, transform=self.inches, **style))
            style = {"color": "white", "weight": "bold"} if names else {"color": GREY}
            self.text(x + wide / 2, y + CHIP / 2, label, 9, ha="center", va=MIDDLE, **style)
            x += wide + CHIP_GAP
        return y + CHIP

    def lines(self, words: str, width: float, size: float, weight: str) -> list[str]:
        """At most MOST_LINES; an ellipsis stands for what is left out."""
        rest = " ".join(words.split())
        lines: list[str] = []
        while rest:
            last = len(lines) == MOST_LINES - 1
            end = self.fitting(rest, width, size, weight)
            if end < len(rest) and last:
                return [*lines, self.cut(rest, width, size, weight)]
            if end < len(rest) and " " in rest[: end + 1]:
                end = rest.rindex(" ", 0, end + 1)
            lines.append(rest[:end])
            rest = rest[end:].lstrip()
        return lines

    def cut(self, words: str, width: float, size: float, weight: str) -> str:
        """``words``, or as many of their characters as fit, and an ellipsis."""
        if self.width(words, size, weight) <= width:
            return words
        return words[: self.fitting(words, width - self.width("…", size, weight), size, weight)].rstrip() + "…"

    def fitting(self, words: str, width: float, size: float, weight: str) -> int:
        """How many characters of ``words`` fit into ``width``; at least one."""
        lengths = range(1, len(words) + 1)
        return max(1, bisect_right(lengths, width, key=lambda n: self.width(words[:n], size, weight)))

    def width(self, words: str, size: float, weight: str = "normal") -> float:
        from matplotlib.font_manager import FontProperties

        font = FontProperties(size=size, weight=weight)
        return self.renderer.get_text_width_height_descent(words, font, False)[0] / DPI


def _draw_bars(page: _Page, x: float, y: float, weights: Mapping[str, Tensor], colors: Mapping[str, str]) -> None:
    """A bar per block, divided by the weights (num_layers,) of each expert in turn."""
    num_layers = len(next(iter(weights.values())))
    axes = page.axes(x, y, BARS, BAR * num_layers)
    axes.set(xlim=(0, 1), ylim=(num_layers, 0))
    axes.spines[:].set_visible(False)
    for block in range(num_layers):
        middle, begin = block + 0.36, 0.0
        page.text(x - 0.08, y + BAR * middle, f"block {block + 1}", 8.5, color=GREY, ha="right", va=MIDDLE)
        axes.barh(middle, 1, height=0.72, color=TRACK)
        for name, weight in ((n, float(w[block])) for n, w in weights.items() if w[block] > 0):
            axes.barh(middle, weight, left=begin, height=0.72, color=colors[name], edgecolor="white", linewidth=0.5)
            for label in (f"{name} {weight:.0%}", f"{weight:.0%}"):
                if page.width(label, 8, "bold") + 0.08 < weight * BARS:
                    x_label = x + BARS * (begin + weight / 2)
                    page.text(x_label, y + BAR * middle, label, 8, color="white", weight="bold", ha="center", va=MIDDLE)
                    break
            begin += weight


def _colors(names: Sequence[str]) -> dict[str, str]:
    """Fixed ones for official experts, far apart and dark enough for white text for the others, in their order."""
    official = dict(zip((e.name for e in OFFICIAL), OFFICIAL_COLORS, strict=True))
    others = [name for name in names if name not in official]
    found = {name: official[name] for name in names if name in official}
    for i, name in enumerate(others):
        hue = (0.52 + i * (5**0.5 - 1) / 2) % 1  # the golden section never comes back to where it was
        rgb = colorsys.hls_to_rgb(hue, (0.26, 0.37, 0.31)[i % 3], (0.5, 0.62)[i % 2])
        found[name] = "#" + "".join(f"{round(255 * c):02x}" for c in rgb)
    return found


def _grids(tokens: Tensor, num_samples: int) -> Tensor:
    """(B, T, C) -> (B, R, R, C) in fp64 on the host."""
    _check_shape("tokens", tokens, (num_samples, "T", "C"))
    side = math.isqrt(tokens.shape[1])
    check(side * side == tokens.shape[1] > 0, "tokens", "must lie on a square grid", tuple(tokens.shape))
    tokens = tokens.detach().double().cpu()
    check(tokens.isfinite().all(), "tokens", "must be finite", "NaN or infinity")
    return tokens.unflatten(1, (side, side))


def _component(grid: Tensor) -> Tensor:
    """(R, R, C) -> (R, R): the projection on the first principal component."""
    centred = grid.flatten(0, 1)
    centred = centred - centred.mean(0)
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    scores = vectors[:, -1] * values[-1].clamp(min=0).sqrt()
    return (scores * scores[scores.abs().argmax()].sign()).reshape(grid.shape[:2])


def _reduced(image: Image) -> Image:
    """A copy in RGB, of at most MOST_PIXELS a side."""
    image = image.convert("RGB")
    image.thumbnail((MOST_PIXELS, MOST_PIXELS))
    return image


def _square(image: Image) -> Image:
    """Padded as for the base encoder."""
    from PIL import Image

    side = max(image.size)
    square = Image.new("RGB", (side, side), BASE.pad_color)
    square.paste(image.convert("RGB"), ((side - image.width) // 2, (side - image.height) // 2))
    return _reduced(square)


def _tinted(color: str, opacity: Tensor) -> Any:
    """(R, R) in [0, 1] -> (R, R, 4) of one colour."""
    rgb = torch.tensor([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)], dtype=opacity.dtype)
    return torch.cat([rgb.expand(*opacity.shape, 3), 0.9 * opacity[..., None]], -1).numpy()


def _check_list(argument: str, values: object, length: int | None = None) -> None:
    check(isinstance(values, list | tuple), argument, "must be a list or tuple", type(values).__name__, TypeError)
    assert isinstance(values, list | tuple)
    check(length in (None, len(values)), argument, f"must have {length} entries, one for each image", len(values))


def _check_image(argument: str, image: object) -> None:
    from PIL import Image

    check(isinstance(image, Image.Image), argument, "must be a PIL image", type(image).__name__, TypeError)


def _check_shape(argument: str, tensor: object, shape: tuple[int | str, ...]) -> None:
    """``tensor`` must have this shape; strings are free dimensions."""
    check(isinstance(tensor, Tensor), argument, "must be a tensor", type(tensor).__name__, TypeError)
    assert isinstance(tensor, Tensor)
    fits = tensor.dim() == len(shape) and all(
        isinstance(want, str) or want == have for want, have in zip(shape, tensor.shape, strict=True)
    )
    check(fits, argument, f"must have shape ({', '.join(map(str, shape))})", tuple(tensor.shape))
