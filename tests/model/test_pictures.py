"""The bundled pictures: what they are made of, and that two drawings are the same."""

from __future__ import annotations

import pytest

from mova import experts
from mova.demo.pictures import Picture, pictures

SIZES = {
    "chart": (640, 480),
    "page": (600, 800),
    "shapes": (512, 512),
    "scene": (800, 500),
    "plain": (640, 360),
}


@pytest.fixture(scope="module")
def drawn():
    return {p.name: p for p in pictures()}


def test_names_and_sizes(drawn):
    assert {name: p.image.size for name, p in drawn.items()} == SIZES
    assert len({width / height for width, height in SIZES.values()}) == 5
    assert all(p.image.mode == "RGB" for p in drawn.values())


def test_same_pixels_each_time(drawn):
    for again in pictures():
        assert again == drawn[again.name] and again.image is not drawn[again.name].image
        assert again.image.tobytes() == drawn[again.name].image.tobytes()


def test_experts_are_official_and_differ(drawn):
    official = {e.name for e in experts.OFFICIAL}
    assert all(set(p.experts) <= official for p in drawn.values())
    assert len({p.experts for p in drawn.values()}) == 5 and drawn["plain"].experts == ()


def test_questions(drawn):
    assert len({p.question for p in drawn.values()}) == 5
    assert all(p.question.endswith("?") for p in drawn.values())


def test_there_is_something_to_see(drawn):
    """Every picture has light and dark, and only the plain one has equal rows."""
    for name, picture in drawn.items():
        darkest, lightest = picture.image.convert("L").getextrema()
        assert lightest - darkest > 100, name
        row = picture.image.crop((0, 200, picture.image.width, 201)).getcolors()
        assert (row is not None and len(row) == 1) == (name == "plain")


@pytest.mark.parametrize(
    ("name", "place", "color"),
    [
        ("chart", (100, 300), (26, 143, 227)),  # a bar
        ("chart", (600, 20), (255, 255, 255)),
        ("shapes", (300, 320), (242, 193, 78)),  # the triangle
        ("shapes", (176, 350), (220, 79, 85)),  # a circle on it
        ("page", (20, 20), (251, 250, 246)),
    ],
)
def test_colours_where_they_belong(drawn, name, place, color):
    assert drawn[name].image.getpixel(place) == color


def test_unknown_expert(drawn):
    with pytest.raises(ValueError, match="name must be a registered expert"):
        Picture("own", drawn["page"].image, "Which?", ("vary", "unknown"))
