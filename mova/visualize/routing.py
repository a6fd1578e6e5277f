"""The figure of what the router picked and how the adapter's gates weighed it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._checks import check
from ..experts import VisionExpert
from ..routing import member_names, pool_names
from .page import GAP, GREY, MARGIN, MIDDLE, WIDTH, Page, check_image, check_shape, expert_colors

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

TRACK = "#eef1f4"
IMAGE, IMAGE_HEIGHT, BARS, BLOCK_LABEL, TOKENS = 2.1, 1.8, 2.35, 0.6, 1.5  # widths of the columns, one height
BAR = 0.32  # the distance from one bar to the next


def routing_figure(
    images: Sequence[Image],
    questions: Sequence[str],
    experts: Sequence[Iterable[str | VisionExpert]],
    gates: Tensor,
    pool: Sequence[str | VisionExpert],
    tokens: Tensor | None = None,
    answers: Sequence[str] | None = None,
) -> Figure:
    """Draw one row for each image: question, chosen experts, their weights in each block, fused tokens, answer.

    An expert has one colour throughout a figure; official experts have the same colour in all figures.

    Args:
        images: B PIL images.
        questions: B strings, which are cut after the fifth line, as answers are. matplotlib's ``font.family`` must have
            their characters.
        experts: the chosen experts of each image, in the order in which they are shown.
        gates: (B, num_layers, N) weights from 0 to 1, of any dtype and device, as ``mova.inspection.recorded`` gives.
        pool: the N experts in the order of ``gates``.
        tokens: (B, T, C) fused tokens on a square grid, T = R * R. The figure shows each token's score on the first
            principal component of its sample; the sign makes the score of largest magnitude positive.
        answers: B strings.

    Returns:
        the figure, 10 inches wide and as high as necessary.

    Raises:
        ImportError: matplotlib is missing.
        TypeError, ValueError: an argument has a wrong type, length, shape or range, or an expert is not in the pool.
    """
    page = Page()
    names = pool_names(pool)
    _check_list("images", images)
    check(len(images) > 0, "images", "must not be empty", images)
    for i, image in enumerate(images):
        check_image(f"images[{i}]", image)
    for argument, strings in (("questions", questions), ("answers", answers)):
        if strings is not None:
            _check_list(argument, strings, len(images))
            for i, string in enumerate(strings):
                check(isinstance(string, str), f"{argument}[{i}]", "must be a string", string, TypeError)
    _check_list("experts", experts, len(images))
    chosen = [list(dict.fromkeys(member_names(e, names))) for e in experts]
    check_shape("gates", gates, (len(images), "num_layers", len(names)))
    gates = gates.detach().double().cpu()
    check(((gates >= 0) & (gates <= 1)).all(), "gates", "must be from 0 to 1", gates.aminmax())
    components = [_component(sample) for sample in _grids(tokens, len(images))] if tokens is not None else None

    colors = expert_colors(names)
    bars = WIDTH - MARGIN - BARS - (TOKENS + GAP if components is not None else 0)  # the left edge of the bars
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


def _draw_bars(page: Page, x: float, y: float, weights: Mapping[str, Tensor], colors: Mapping[str, str]) -> None:
    """Draw a bar for each block, divided by the weights (num_layers,) of the experts."""
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


def _grids(tokens: Tensor, num_samples: int) -> Tensor:
    """Return tokens (B, T, C) as grids (B, R, R, C) in fp64 on the CPU."""
    check_shape("tokens", tokens, (num_samples, "T", "C"))
    side = math.isqrt(tokens.shape[1])
    check(side * side == tokens.shape[1] > 0, "tokens", "must lie on a square grid", tuple(tokens.shape))
    tokens = tokens.detach().double().cpu()
    check(tokens.isfinite().all(), "tokens", "must be finite", "NaN or infinity")
    return tokens.unflatten(1, (side, side))


def _component(grid: Tensor) -> Tensor:
    """Project a grid (R, R, C) on its first principal component; returns (R, R)."""
    centred = grid.flatten(0, 1)
    centred = centred - centred.mean(0)
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    scores = vectors[:, -1] * values[-1].clamp(min=0).sqrt()
    return (scores * scores[scores.abs().argmax()].sign()).reshape(grid.shape[:2])


def _check_list(argument: str, values: object, length: int | None = None) -> None:
    check(isinstance(values, list | tuple), argument, "must be a list or tuple", type(values).__name__, TypeError)
    assert isinstance(values, list | tuple)
    check(length in (None, len(values)), argument, f"must have {length} entries, one for each image", len(values))
