"""Images: opening whatever comes, and the experts' inputs against the processors of transformers."""

from __future__ import annotations

import random
import re
import sys
import warnings
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import BitImageProcessorPil, CLIPImageProcessorPil, Pix2StructImageProcessorPil

from mova import VisionExpert, experts, images
from mova.images import PreparedImage, image_key, open_image, prepare, square

OFFICIAL = {e.name: e for e in (experts.BASE, *experts.OFFICIAL)}
PIX2STRUCT = OFFICIAL["pix2struct"]
GREY = (0.5, 0.5, 0.5)


def noise(width, height, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def smooth(width, height):
    return noise(4, 3).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, form="png", **options):
    content = BytesIO()
    image.save(content, form, **options)
    return content.getvalue()


def same(a, b):
    return a.mode == b.mode and a.size == b.size and a.tobytes() == b.tobytes()


def test_every_kind_of_source(tmp_path):
    image = noise(5, 3)
    file = tmp_path / "image.png"
    file.write_bytes(encoded(image))
    for source in (image, file, str(file), file.read_bytes(), Image.open(file)):
        opened = open_image(source)
        assert same(opened, image) and opened is not source
    frames = encoded(image.quantize(), "gif", save_all=True, append_images=[noise(5, 3, 1).quantize()])
    assert same(open_image(frames), image.quantize().convert("RGB"))


MODES = {  # a pixel, and what it is in RGB
    "1": (1, (255, 255, 255)),
    "L": (100, (100, 100, 100)),
    "LA": ((100, 0), (100, 100, 100)),
    "P": (0, (9, 8, 7)),
    "RGBA": ((9, 8, 7, 0), (9, 8, 7)),
    "RGBX": ((9, 8, 7, 0), (9, 8, 7)),
    "CMYK": ((0, 255, 255, 0), (255, 0, 0)),
    "YCbCr": ((100, 128, 128), (100, 100, 100)),
    "HSV": ((0, 0, 100), (100, 100, 100)),
    "I": (200, (200, 200, 200)),
    "F": (200.0, (200, 200, 200)),
    "I;16": (100 * 257, (100, 100, 100)),
    "I;16B": (65535, (255, 255, 255)),
}


@pytest.mark.parametrize("mode", MODES)
def test_mode(mode):
    image = Image.new(mode, (3, 2), MODES[mode][0])
    if mode == "P":
        image.putpalette([9, 8, 7])
        assert open_image(encoded(image, transparency=0)).getpixel((0, 0)) == (9, 8, 7)
    opened = open_image(image)
    assert opened.mode == "RGB" and opened.getcolors() == [(6, MODES[mode][1])]
    assert image.mode == mode, "the caller's image was changed"


@pytest.mark.parametrize("form", ["png", "tiff"])
def test_16_bit_grey_is_scaled_where_pil_clips(form):
    values = np.array([[0, 128, 129, 255, 257, 32768, 65534, 65535]], dtype=np.uint16)
    image = Image.fromarray(values)
    assert image.convert("L").tobytes() == bytes([0, 128, 129, 255, 255, 255, 255, 255])
    assert open_image(encoded(image, form)).getchannel("G").tobytes() == bytes([0, 0, 1, 1, 1, 128, 255, 255])


@pytest.mark.parametrize("tag", range(1, 9))
def test_orientation_is_followed_once(tag):
    stored = smooth(40, 24)
    exif = Image.Exif()
    exif[0x0112] = tag
    opened = open_image(encoded(stored, exif=exif))
    image = np.asarray(stored)
    upright = {
        1: image,
        2: image[:, ::-1],
        3: image[::-1, ::-1],
        4: image[::-1],
        5: image.swapaxes(0, 1),
        6: image.swapaxes(0, 1)[:, ::-1],
        7: image.swapaxes(0, 1)[::-1, ::-1],
        8: image.swapaxes(0, 1)[::-1],
    }[tag]
    assert np.array_equal(opened, upright)
    assert same(open_image(opened), opened)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_bad_exif_is_no_bad_image():
    for exif in (
        b"x",
        b"Exif\0\0x",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0",
    ):
        assert open_image(encoded(noise(5, 3), "jpeg", exif=exif)).size == (5, 3)


@pytest.mark.parametrize("form", ["png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm"])
def test_truncated(form, tmp_path):
    whole = encoded(noise(40, 40), form)
    assert open_image(whole).size == (40, 40)
    file = tmp_path / "half"
    file.write_bytes(whole[: len(whole) // 2])
    message = f"image must be one that can be decoded in full, got {str(file)!r} ("
    with pytest.raises(ValueError, match=re.escape(message)):
        open_image(str(file))


def test_ones_own_image_is_decoded_here(tmp_path):
    file = tmp_path / "half.png"
    file.write_bytes(encoded(noise(40, 40))[:2000])
    with Image.open(file) as image:
        with pytest.raises(ValueError, match=re.escape("image must be one that can be decoded in full, got <PIL.")):
            open_image(image)
    with pytest.raises(ValueError, match=re.escape("image must be one that can be decoded in full, got <PIL.")):
        open_image(image)  # closed, and never decoded


@pytest.mark.parametrize("form", ["png", "jpeg", "gif", "webp"])
def test_damaged_bytes_are_an_image_or_a_value_error(form):
    rng = random.Random(form)
    whole = encoded(smooth(20, 20), form)
    failed = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(200):
            damaged = bytearray(whole)
            for _ in range(3):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            try:
                assert open_image(bytes(damaged)).mode == "RGB"
            except ValueError as error:
                assert str(error).startswith("image must ")
                failed += 1
    assert failed


SOURCES = {
    "empty": (b"", ValueError, "image must be one that can be decoded in full, got 0 bytes (not a known format)"),
    "text": (
        b"an image",
        ValueError,
        "image must be one that can be decoded in full, got 8 bytes (not a",
    ),
    "missing": (Path("nowhere.png"), FileNotFoundError, "image must be a file that exists, got PosixPath('nowhere."),
    "folder": (".", OSError, ""),
    "no pixels": (Image.new("L", (0, 5)), ValueError, "image must have pixels, got (0, 5)"),
    "array": (np.zeros((2, 2, 3)), TypeError, "image must be a PIL image, a path or bytes, got <class 'numpy.nd"),
    "None": (None, TypeError, "image must be a PIL image, a path or bytes, got <class 'NoneType'>"),
    "32 bits": (Image.new("I", (2, 2), 256), ValueError, "image must be from 0 to 255 in mode I, got (256.0, 256.0)"),
    "negative": (Image.new("F", (2, 2), -1), ValueError, "image must be from 0 to 255 in mode F, got (-1.0, -1.0)"),
    "nan": (Image.new("F", (2, 2), float("nan")), ValueError, "image must be from 0 to 255 in mode F, got (nan"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_bad_source(name):
    source, kind, message = SOURCES[name]
    with pytest.raises(kind, match=re.escape(message) or None):
        open_image(source)


def test_decompression_bomb(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(ValueError, match=r"image must be one that can be decoded in full, got .* bytes \(Image s"):
        open_image(encoded(noise(11, 10)))
    assert square(noise(10, 1), (0, 0, 0)).size == (10, 10)
    with pytest.raises(ValueError, match=r"image must have at most 100 pixels when padded to a square, got \(11, 1\)"):
        square(noise(11, 1), (0, 0, 0))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert square(noise(11, 1), (0, 0, 0)).size == (11, 11)


def test_key_is_of_the_pixels(tmp_path):
    image = noise(6, 4)
    key = image_key(image)
    assert re.fullmatch("[0-9a-f]{64}", key)
    for form in ("png", "bmp", "tiff", "ppm"):
        assert image_key(open_image(encoded(image, form))) == key
    rgba = image.copy()
    rgba.putalpha(3)
    assert image_key(open_image(rgba)) == key
    changed = image.copy()
    changed.putpixel((5, 3), tuple(c ^ 1 for c in image.getpixel((5, 3))))
    reshaped = Image.frombytes("RGB", (4, 6), image.tobytes())
    assert len({key, *map(image_key, (changed, reshaped, image.transpose(Image.Transpose.ROTATE_180)))}) == 4


@pytest.mark.parametrize("size", [(1, 1), (5, 5), (5, 2), (2, 5), (7, 4), (4, 7), (1, 1000), (1000, 1)])
def test_square(size):
    image, (width, height) = noise(*size), size
    side = max(size)
    expected = np.full((side, side, 3), (1, 2, 3), dtype=np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    expected[top : top + height, left : left + width] = np.asarray(image)
    padded = square(image, (1, 2, 3))
    assert padded is not image and np.array_equal(padded, expected)


SIZES = [(1, 1), (2, 1), (640, 480), (300, 401), (672, 672), (720, 720), (1, 1000), (1000, 1), (1100, 900)]
# Squares of which the processor of transformers makes 44 x 44 patches.
ODD_SIZES = [(7, 7), (14, 3), (223, 224), (448, 448), (896, 500)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["clip", "dinov2", "sam"])
def test_pixels_are_those_of_transformers(name, size):
    kind = BitImageProcessorPil if name == "dinov2" else CLIPImageProcessorPil
    expert = OFFICIAL[name]
    side, mean, std = expert.image_size, list(expert.mean), list(expert.std)
    processor = kind(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_mean=mean, image_std=std
    )
    for image in (noise(*size), smooth(*size)):
        truth = processor(square(image, expert.pad_color), return_tensors="pt")["pixel_values"][0]
        result = prepare(image, expert)
        assert result.dtype == torch.float32 and result.shape == (3, side, side) and result.is_contiguous()
        assert torch.equal(result, truth)


@pytest.mark.parametrize("size", SIZES + ODD_SIZES)
def test_t31_patches_are_those_of_transformers_but_always_45_by_45(size):
    ids = torch.tensor([(row, column) for row in range(1, 46) for column in range(1, 46)], dtype=torch.float32)
    for image in (noise(*size), smooth(*size), Image.new("RGB", size, (90, 90, 90))):
        padded = square(image, PIX2STRUCT.pad_color)
        result = prepare(image, PIX2STRUCT)
        assert result.dtype == torch.float32 and result.shape == (2025, 770)
        assert torch.equal(result[:, :2], ids)
        official = Pix2StructImageProcessorPil(max_patches=2025)
        truth = official(padded, return_tensors="pt")["flattened_patches"][0]
        if size in ODD_SIZES:
            assert truth[:, :2].amax(0).tolist() == [44, 44]
            # One patch more to give away, and its square root is no longer rounded to below 45.
            official = Pix2StructImageProcessorPil(max_patches=2026)
            truth = official(padded, return_tensors="pt")["flattened_patches"][0, :2025]
        # The same to the bit on x86 with torch 2.13; other builds may resize in another order of summation.
        torch.testing.assert_close(result, truth, rtol=0, atol=1e-5)


def whole_square(image, expert):
    """What the encoder is given, made of the whole padded square at once."""
    padded, size = square(image, expert.pad_color), (expert.image_size, expert.image_size)
    if expert.std is not None:
        values = (np.asarray(padded.resize(size, Image.Resampling.BICUBIC)) * (1 / 255)).astype(np.float32)
        values = (values - np.array(expert.mean, np.float32)) / np.array(expert.std, np.float32)
        return torch.from_numpy(values).permute(2, 0, 1)
    values = np.asarray(padded).astype(np.float32)
    values = (values - values.mean()) / max(values.std(), 1 / values.size**0.5)
    batch = torch.from_numpy(values).permute(2, 0, 1)[None]
    return F.interpolate(batch, size, mode="bilinear", align_corners=False, antialias=True)[0]


# Below, at and above the size of the encoder; strips; odd sides, whose bands end with fewer rows.
BANDED = [(1, 1), (3, 2), (64, 64), (64, 20), (20, 64), (1, 301), (301, 1), (97, 131), (250, 249), (3, 900), (900, 3)]


@pytest.mark.parametrize("size", BANDED)
@pytest.mark.parametrize("band", [256, 5000, 1 << 19])  # less than a row, some rows, most of it
def test_bands_are_the_whole_square_to_the_bit(size, band, monkeypatch):
    monkeypatch.setattr(images, "_BAND", band)
    image = noise(*size)
    for name in ("sam", "pix2struct"):
        expert = replace(OFFICIAL[name], image_size=64, input_size=64, grid=(4, 4), patches=False, resize=None)
        assert torch.equal(prepare(image, expert), whole_square(image, expert))


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limit of the address space")
@pytest.mark.parametrize("size", [(1, 9000), (9000, 1), (1080, 9000)])
@pytest.mark.parametrize("name", ["sam", "clip", "dinov2", "deplot"])
def test_a_strip_takes_less_than_200_mb(size, name):
    import resource

    image = Image.new("RGB", size, "teal")
    prepare(noise(2, 2), OFFICIAL[name])  # whatever is loaded with the first image
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 200 * 10**6, before[1]))
    try:
        assert prepare(image, OFFICIAL[name]).isfinite().all()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_patches_row_by_row():
    """Of other shapes, too, and with a std, each value at its place."""
    own = VisionExpert("own", "x", 12, GREY, GREY, (2, 3), 8, patches=True)
    image = noise(12, 12)
    result = prepare(image, own)
    assert result.shape == (6, 2 + 6 * 4 * 3)
    assert result[:, :2].tolist() == [[1, 1], [1, 2], [1, 3], [2, 1], [2, 2], [2, 3]]
    content = torch.from_numpy(np.array(image)).float() / 127.5 - 1
    patch = content[6:, 4:8].reshape(-1)
    torch.testing.assert_close(result[4, 2:], patch, rtol=0, atol=1e-6)
    whole = prepare(image, replace(own, std=None, patches=False))
    assert whole.shape == (3, 12, 12) and whole.is_contiguous()
    assert abs(whole.mean()) < 1e-6 and abs(whole.std(correction=0) - 1) < 1e-6


def test_one_colour_is_finite():
    for color in ((0, 0, 0), (255, 255, 255), PIX2STRUCT.pad_color):
        for size in ((1, 1), (500, 500)):
            assert all(prepare(Image.new("RGB", size, color), e).isfinite().all() for e in OFFICIAL.values())


def test_t33_one_view_is_one_input():
    image = noise(50, 30)
    inputs = {}
    for e in OFFICIAL.values():
        inputs.setdefault(e.view, []).append(prepare(image, e))
    assert sorted(map(len, inputs.values())) == [1, 2, 2, 3]
    assert all(torch.equal(x, group[0]) for group in inputs.values() for x in group)


def test_default_device_and_dtype_are_not_asked():
    image = noise(9, 9)
    expected = prepare(image, PIX2STRUCT)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert torch.equal(prepare(image, PIX2STRUCT), expected)
    finally:
        torch.set_default_dtype(torch.float32)


IMAGE = noise(2, 2)
CALLS = {
    "key: type": (image_key, ("x.png",), TypeError, "image must be a PIL image, got <class 'str'>"),
    "key: mode": (image_key, (Image.new("L", (2, 2)),), ValueError, "image must be in mode RGB (mova.images.open_ima"),
    "square: size": (square, (Image.new("RGB", (0, 2)), (0, 0, 0)), ValueError, "image must have pixels, got (0, 2)"),
    "square: one": (square, (IMAGE, 3), ValueError, "color must be three ints from 0 to 255, got 3"),
    "square: 256": (
        square,
        (IMAGE, (0, 0, 256)),
        ValueError,
        "color must be three ints from 0 to 255, got (0, 0, 256)",
    ),
    "prepare: name": (prepare, (IMAGE, "sam"), TypeError, "expert must be a VisionExpert, got 'sam'"),
    "prepare: mode": (prepare, (Image.new("RGBA", (2, 2)), PIX2STRUCT), ValueError, "image must be in mode RGB (mova."),
}


@pytest.mark.parametrize("name", CALLS)
def test_bad_call(name):
    call, arguments, kind, message = CALLS[name]
    with pytest.raises(kind, match=re.escape(message)):
        call(*arguments)


def test_experts_with_the_same_view_share_what_is_made():
    image = PreparedImage(Image.new("RGB", (30, 20), "teal"))
    vary, sam, deplot = (experts.get(name) for name in ("vary", "sam", "deplot"))
    assert image.view(vary) is image.view(sam)
    assert torch.equal(image.view(sam), prepare(image.image, sam))
    assert image.view(deplot).shape == (2025, 770)
    assert image.key == image_key(image.image)
