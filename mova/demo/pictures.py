"""Five pictures drawn by code, each with a question and the experts that help: for demos without a data set."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from PIL import Image, ImageDraw, ImageFilter, ImageFont

from ..experts import resolve

SCALE = 2  # pictures are drawn larger and then reduced, which smooths the edges
INK, GREY, PAPER = "#24292f", "#808a94", "#ffffff"
BLUE, ORANGE, GREEN, RED, VIOLET = "#1a8fe3", "#e8973a", "#35a37c", "#dc4f55", "#8468c4"


@dataclass(frozen=True)
class Picture:
    """A picture, a question about it, and the experts that help to answer it.

    Args:
        name: one word.
        image: PIL image, RGB.
        question: a question about it.
        experts: the names of the experts that help to answer it, the most helpful first; may be empty.

    Raises:
        ValueError: an expert is not registered.
    """

    name: str
    image: Image.Image = field(repr=False, compare=False)
    question: str
    experts: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.experts:
            resolve(self.experts)


def pictures() -> list[Picture]:
    """Draw a chart, a page of text, shapes, a scene, and a picture that needs no expert, of five aspect ratios.

    Each call draws them again. The pixels are the same for the same version of Pillow.
    """
    return [
        Picture("chart", _chart(), "In which year did imports exceed exports?", ("deplot", "pix2struct")),
        Picture("page", _page(), "What does the second section of the page advise?", ("vary", "pix2struct")),
        Picture("shapes", _shapes(), "How many circles overlap the yellow triangle?", ("sam", "codetr")),
        Picture("scene", _scene(), "How many trees stand to the left of the house?", ("dinov2", "codetr", "sam")),
        Picture("plain", _plain(), "Which colour is at the top of this picture?", ()),
    ]


class _Canvas:
    """A drawing whose coordinates are pixels of the finished picture."""

    def __init__(self, width: int, height: int, color: str = PAPER) -> None:
        self.size = width, height
        self.image = Image.new("RGB", (width * SCALE, height * SCALE), color)
        self.draw = ImageDraw.Draw(self.image)

    def rectangle(self, left: float, top: float, right: float, bottom: float, color: str, radius: float = 0) -> None:
        box = _scaled((left, top, right, bottom))
        # Pillow includes the last pixel.
        self.draw.rounded_rectangle((*box[:2], box[2] - 1, box[3] - 1), radius * SCALE, fill=color)

    def circle(self, x: float, y: float, radius: float, color: str) -> None:
        self.draw.ellipse(_scaled((x - radius, y - radius, x + radius, y + radius)), fill=color)

    def polygon(self, points: Sequence[tuple[float, float]], color: str) -> None:
        self.draw.polygon([_scaled(p) for p in points], fill=color)

    def line(self, points: Sequence[tuple[float, float]], color: str, width: float = 1) -> None:
        self.draw.line([_scaled(p) for p in points], fill=color, width=round(width * SCALE), joint="curve")

    def text(self, x: float, y: float, words: str, size: float, color: str = INK, anchor: str = "la") -> None:
        self.draw.text((x * SCALE, y * SCALE), words, fill=color, font=_font(size), anchor=anchor)

    def gradient(self, top: int, bottom: int, colors: Sequence[str]) -> None:
        """Draw a vertical gradient through evenly spaced colours."""
        ramp = Image.new("RGB", (1, len(colors)))
        for y, color in enumerate(colors):
            ramp.paste(color, (0, y, 1, y + 1))
        size = self.size[0] * SCALE, (bottom - top) * SCALE
        half = 0.5  # from the middle of the first colour to that of the last
        self.image.paste(
            ramp.resize(size, Image.Resampling.BILINEAR, (0, half, 1, len(colors) - half)), (0, top * SCALE)
        )

    def shadow(self, draw: Callable[[_Canvas], object], blur: float, strength: float) -> None:
        """Draw a blurred shadow of the shape that ``draw`` paints in black on a white canvas."""
        other = _Canvas(*self.size)
        draw(other)
        mask = other.image.convert("L").filter(ImageFilter.GaussianBlur(blur * SCALE))
        mask = mask.point(lambda v: round((255 - v) * strength))
        self.image.paste(Image.new("RGB", self.image.size, "#1c2b3a"), mask=mask)

    def finished(self, grain: float = 0) -> Image.Image:
        """Return the drawing in its final size, with this share of noise."""
        image = self.image.resize(self.size, Image.Resampling.BOX)
        noise = Image.frombytes("L", self.size, random.Random(0).randbytes(math.prod(self.size)))
        return Image.blend(image, noise.convert("RGB"), grain)


def _chart() -> Image.Image:
    canvas = _Canvas(640, 480)
    left, right, bottom, step = 78, 612, 408, 52
    years, exports, imports = range(2019, 2025), (31, 38, 35, 44, 47, 55), (24, 27, 33, 49, 41, 43)
    canvas.text(left, 22, "Trade of the port of Lindhaven", 24)
    canvas.text(left, 54, "billion euros per year", 15, GREY)
    for i in range(7):
        height = bottom - i * step
        canvas.line([(left, height), (right, height)], "#e4e8ec" if i else GREY)
        canvas.text(left - 12, height, f"{10 * i}", 15, GREY, "rm")
    place = (right - left) / len(years)
    centres = [left + place * (i + 0.5) for i in range(len(years))]
    for x, year, value in zip(centres, years, exports, strict=True):
        canvas.rectangle(x - 25, bottom - value * step / 10, x + 25, bottom, BLUE, 3)
        canvas.text(x, bottom - 16, f"{value}", 16, PAPER, "mm")
        canvas.text(x, bottom + 20, f"{year}", 16, INK, "mm")
    points = [(x, bottom - value * step / 10) for x, value in zip(centres, imports, strict=True)]
    canvas.line(points, ORANGE, 4)
    for x, y in points:
        canvas.circle(x, y, 8, PAPER)
        canvas.circle(x, y, 6, ORANGE)
    canvas.text((left + right) / 2, 456, "year", 15, GREY, "mm")
    for x, words, color in ((424, "exports", BLUE), (522, "imports", ORANGE)):
        canvas.rectangle(x, 58, x + 14, 72, color, 3)
        canvas.text(x + 21, 65, words, 16, INK, "lm")
    return canvas.finished()


HEADING = "Keeping a garden through a dry summer"
SECTIONS = (
    (
        "1. Water early",
        "Most of the water that is given at noon is gone before a root can find it. Begin at sunrise, when the soil is "
        "still cool, and pour slowly: a bed that gets twenty litres twice a week does better than one that gets five "
        "litres every day, because the roots follow the moisture down.",
    ),
    (
        "2. Cover the soil",
        "A layer of straw, leaves or cut grass, as thick as a hand is wide, keeps the ground below it up to eight "
        "degrees cooler. It also spares you half of the weeding. Leave a ring free around every stem, or snails will "
        "move in and stay.",
    ),
    (
        "3. Choose what lasts",
        "Sage, thyme, lavender and stonecrop come from hills where it rains only in winter. Plant them in autumn, give "
        "them one good soaking, and they ask for nothing more. Beans and lettuce want shade from two in the afternoon; "
        "a net or a row of maize to the west will do.",
    ),
    (
        "4. Catch the rain",
        "One square metre of roof collects six hundred litres in a year. A barrel of 300 litres below the pipe of a "
        "garden shed is full after two thunderstorms, and its water is as warm as the tomatoes like it.",
    ),
)


def _page() -> Image.Image:
    canvas = _Canvas(600, 800, "#fbfaf6")
    left, right, y = 64, 536, 58.0
    canvas.text(left, y, "THE GARDENER'S LETTER", 13, "#9a3b3b")
    canvas.text(right, y, "No. 27", 13, GREY, "ra")
    canvas.line([(left, y + 26), (right, y + 26)], "#9a3b3b", 1.5)
    y += 46
    canvas.text(left, y, HEADING, 25)
    y += 58
    for heading, paragraph in SECTIONS:
        canvas.text(left, y, heading, 18, "#9a3b3b")
        y += 30
        for line in _wrapped(paragraph, 15, right - left):
            canvas.text(left, y, line, 15)
            y += 22
        y += 24
    canvas.line([(left, 740), (right, 740)], "#d8d4c8")
    canvas.text((left + right) / 2, 758, "4", 13, GREY, "ma")
    return canvas.finished()


def _shapes() -> Image.Image:
    canvas = _Canvas(512, 512, "#f4efe6")
    triangle = [(256, 92), (418, 376), (94, 376)]
    star = [
        (404 + r * math.sin(i * math.pi / 5), 122 - r * math.cos(i * math.pi / 5)) for i, r in enumerate((58, 25) * 5)
    ]
    hexagon = [(112 + 56 * math.cos(i * math.pi / 3), 118 + 56 * math.sin(i * math.pi / 3)) for i in range(6)]
    shapes: list[tuple[Callable[..., object], str]] = [
        (partial(_Canvas.polygon, points=triangle), "#f2c14e"),
        (partial(_Canvas.polygon, points=star), VIOLET),
        (partial(_Canvas.polygon, points=hexagon), GREEN),
        (partial(_Canvas.rectangle, left=318, top=330, right=452, bottom=450, radius=14), BLUE),
        (partial(_Canvas.circle, x=176, y=350, radius=74), RED),
        (partial(_Canvas.circle, x=268, y=218, radius=46), ORANGE),
        (partial(_Canvas.circle, x=58, y=242, radius=26), "#2f6f8f"),
        (partial(_Canvas.rectangle, left=224, top=424, right=286, bottom=466, radius=21), "#e58fb1"),
    ]
    for shape, color in shapes:
        canvas.shadow(partial(_moved, shape), 7, 0.35)
        shape(canvas, color=color)
    return canvas.finished()


def _moved(shape: Callable[..., object], canvas: _Canvas) -> None:
    shape(canvas, color="#000000")
    canvas.image.paste(canvas.image.copy(), (0, 6 * SCALE))
    canvas.image.paste("#ffffff", (0, 0, canvas.image.width, 6 * SCALE))


def _scene() -> Image.Image:
    canvas = _Canvas(800, 500)
    canvas.gradient(0, 360, ("#3f86c9", "#7fb4df", "#c9dfe8", "#fbe3bd", "#fbd09a"))
    for radius, color in ((64, "#fde6b6"), (50, "#fff0c9"), (38, "#fffbe9")):
        canvas.circle(610, 176, radius, color)
    for x, y, size in ((150, 92, 1.0), (392, 58, 0.75), (700, 84, 0.6)):
        for dx, dy, radius in ((-42, 6, 18), (-16, -4, 26), (16, 0, 22), (42, 7, 15)):
            canvas.circle(x + dx * size, y + dy * size, radius * size, "#f6f9fb")
    canvas.polygon(_ridge(270, 34, 0.011, 0.4), "#8fb0b8")
    canvas.polygon(_ridge(315, 28, 0.013, 2.2), "#6f9f86")
    canvas.polygon(_ridge(362, 16, 0.009, 4.6), "#548f55")
    canvas.polygon([(452, 398), (478, 398), (560, 500), (424, 500)], "#d9c29a")
    _house(canvas)
    for x, y, size in ((120, 398, 1.25), (226, 380, 0.95), (298, 402, 1.15), (668, 388, 1.0), (742, 408, 1.3)):
        _tree(canvas, x, y, size)
    flowers = random.Random(1)
    for _ in range(90):
        left, top = flowers.uniform(0, 800), flowers.uniform(425, 498)
        if not 400 < left < 580:
            canvas.circle(left, top, flowers.uniform(1.2, 2.8), flowers.choice(("#f6e27a", "#f4f4f0", "#e59a9a")))
    return canvas.finished(grain=0.07)


def _ridge(height: float, rise: float, frequency: float, phase: float) -> list[tuple[float, float]]:
    waves = [
        (x, height - rise * (math.sin(frequency * x + phase) + 0.35 * math.sin(2.7 * frequency * x + phase)))
        for x in range(0, 808, 8)
    ]
    return [(0, 500), *waves, (800, 500)]


def _house(canvas: _Canvas) -> None:
    canvas.rectangle(520, 196, 544, 240, "#8a4a3c")
    canvas.rectangle(400, 290, 610, 400, "#f3e6cf")
    canvas.rectangle(400, 392, 610, 402, "#8d8578")
    canvas.polygon([(380, 296), (428, 222), (582, 222), (630, 296)], "#b5523f")
    canvas.rectangle(448, 330, 482, 400, "#6b4630", 3)
    canvas.circle(475, 367, 2.5, "#f2c14e")
    for x in (408, 500, 556):
        canvas.rectangle(x, 322, x + 34, 360, "#ffffff", 2)
        canvas.rectangle(x + 3, 325, x + 31, 357, "#86b7d6")
        canvas.rectangle(x + 16, 325, x + 18, 357, "#ffffff")
        canvas.rectangle(x + 3, 340, x + 31, 342, "#ffffff")


def _tree(canvas: _Canvas, x: float, foot: float, size: float) -> None:
    canvas.rectangle(x - 6 * size, foot - 46 * size, x + 6 * size, foot, "#6a4a33", 2)
    for dx, dy, radius, color in (
        (-22, -62, 26, "#2f6b3f"), (22, -62, 26, "#2f6b3f"), (0, -86, 32, "#3b7d4a"), (-8, -94, 18, "#4f935a"),
    ):  # fmt: skip
        canvas.circle(x + dx * size, foot + dy * size, radius * size, color)


def _plain() -> Image.Image:
    canvas = _Canvas(640, 360)
    canvas.gradient(0, 360, ("#2b2d5b", "#6b4a86", "#c8698b", "#f4a27c", "#fbd9a0"))
    return canvas.finished()


def _wrapped(words: str, size: float, width: float) -> list[str]:
    """Break words into lines of at most ``width`` pixels."""
    lines = [""]
    for word in words.split():
        longer = f"{lines[-1]} {word}".strip()
        if _font(size).getlength(longer) <= width * SCALE:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _font(size: float) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size * SCALE)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow must have been built with FreeType"
    return font


def _scaled(numbers: Sequence[float]) -> tuple[float, ...]:
    return tuple(n * SCALE for n in numbers)
