"""A page of a figure, laid out in inches; the colours of the experts; checks that both figures share."""

from __future__ import annotations

import colorsys
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .._checks import check
from ..experts import OFFICIAL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

# Lengths are in inches, text sizes in points. A figure is 10 inches wide, and readable when shown 900 pixels wide.
WIDTH, DPI, MARGIN, GAP = 10.0, 200, 0.2, 0.25
INK, GREY, PALE = "#24292f", "#6e7781", "#d8dee4"
OFFICIAL_COLORS = ("#1a7fd0", "#b0487a", "#c96f16", "#23885f", "#7058bf", "#c43d43", "#66801f")
MIDDLE = "center_baseline"
CHIP, CHIP_GAP = 0.21, 0.1  # the height of the chips and the space between them
MOST_LINES, MOST_PIXELS = 5, 800  # of a question or an answer; of an image's longer side


class Page:
    """A figure that is laid out in inches from its top left corner; its size is set at the end."""

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
        """Add axes without ticks, in a thin frame."""
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
        """Show an image as large as the box allows, centred horizontally; returns its lower edge."""
        scale = min(width / image.width, height / image.height)
        w, h = image.width * scale, image.height * scale
        self.axes(x + (width - w) / 2, y, w, h).imshow(reduced(image), aspect="auto")
        return y + h

    def paragraph(self, words: str, x: float, y: float, width: float, size: float, **style: Any) -> float:
        pitch = size * 1.35 / 72
        for line in self.lines(words, width, size, style.get("weight", "normal")):
            self.text(x, y, line, size, **style)
            y += pitch
        return y

    def chips(self, names: Sequence[str], colors: Mapping[str, str], x: float, y: float, width: float) -> float:
        """Draw the names as coloured labels, as many in a line as fit; returns their lower edge."""
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
        """Break words into at most MOST_LINES lines; an ellipsis stands for the rest."""
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
        """Cut words to the width; an ellipsis stands for the rest."""
        if self.width(words, size, weight) <= width:
            return words
        return words[: self.fitting(words, width - self.width("…", size, weight), size, weight)].rstrip() + "…"

    def fitting(self, words: str, width: float, size: float, weight: str) -> int:
        """Count the characters of ``words`` that fit into ``width``; at least one."""
        lengths = range(1, len(words) + 1)
        return max(1, bisect_right(lengths, width, key=lambda n: self.width(words[:n], size, weight)))

    def width(self, words: str, size: float, weight: str = "normal") -> float:
        from matplotlib.font_manager import FontProperties

        font = FontProperties(size=size, weight=weight)
        return self.renderer.get_text_width_height_descent(words, font, False)[0] / DPI


def expert_colors(names: Sequence[str]) -> dict[str, str]:
    """Give each expert a colour that is dark enough for white text; those of the official experts are fixed."""
    official = dict(zip((e.name for e in OFFICIAL), OFFICIAL_COLORS, strict=True))
    others = [name for name in names if name not in official]
    found = {name: official[name] for name in names if name in official}
    for i, name in enumerate(others):
        hue = (0.52 + i * (5**0.5 - 1) / 2) % 1  # steps of the golden section never repeat a hue
        rgb = colorsys.hls_to_rgb(hue, (0.26, 0.37, 0.31)[i % 3], (0.5, 0.62)[i % 2])
        found[name] = "#" + "".join(f"{round(255 * c):02x}" for c in rgb)
    return found


def reduced(image: Image) -> Image:
    """Return a copy in RGB with sides of at most MOST_PIXELS."""
    image = image.convert("RGB")
    image.thumbnail((MOST_PIXELS, MOST_PIXELS))
    return image


def check_image(argument: str, image: object) -> None:
    from PIL import Image

    check(isinstance(image, Image.Image), argument, "must be a PIL image", type(image).__name__, TypeError)


def check_shape(argument: str, tensor: object, shape: tuple[int | str, ...]) -> None:
    """Raise unless ``tensor`` has this shape; strings stand for dimensions of any size."""
    check(isinstance(tensor, Tensor), argument, "must be a tensor", type(tensor).__name__, TypeError)
    assert isinstance(tensor, Tensor)
    fits = tensor.dim() == len(shape) and all(
        isinstance(want, str) or want == have for want, have in zip(shape, tensor.shape, strict=True)
    )
    check(fits, argument, f"must have shape ({', '.join(map(str, shape))})", tuple(tensor.shape))
