"""Images are read completely and turned into the square, normalised input of each vision expert."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from ._checks import check
from .experts import VisionExpert

_BAND = 1 << 19  # values of a padded image in memory at once; more than the 128 that NumPy sums without halving


def open_image(image: Image.Image | str | os.PathLike[str] | bytes) -> Image.Image:
    """Return the image as RGB, completely decoded and turned upright; an animation gives its first frame.

    Other modes are converted by PIL's ``convert("RGB")``, so transparency and colour profiles are ignored, as in the
    official code. There are two differences from it: 16-bit grey is scaled to 8 bits, while PIL clips nearly all of it
    to white, and an EXIF orientation is followed, so that the model sees a photograph as people see it. A PIL image
    that still has the orientation tag is turned, too.

    Args:
        image: a PIL image, which is not changed, the path of a file, or the content of one.

    Raises:
        TypeError: ``image`` has another type.
        FileNotFoundError: there is no such file. Other errors of reading it (OSError) pass through.
        ValueError: the content is not an image, or the image is broken, truncated or empty, exceeds PIL's limit for
            decompression bombs, or has a 32-bit mode and values outside 0 to 255, since its white is unknown.
    """
    known = isinstance(image, Image.Image | str | os.PathLike | bytes)
    check(known, "image", "must be a PIL image, a path or bytes", type(image), TypeError)
    name = f"{len(image)} bytes" if isinstance(image, bytes) else repr(image)
    if isinstance(image, str | os.PathLike):
        try:
            image = Path(image).read_bytes()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"image must be a file that exists, got {name}") from error
    try:
        image = Image.open(BytesIO(image)) if isinstance(image, bytes) else image
        image.load()
        image = ImageOps.exif_transpose(image)
    # Decoders raise OSError, SyntaxError, struct.error, DecompressionBombError and others for broken files.
    except Exception as error:
        reason = "not a known format" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"image must be one that can be decoded in full, got {name} ({reason})") from error
    check(min(image.size) > 0, "image", "must have pixels", image.size)
    if image.mode.startswith("I;16"):
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        values = np.asarray(image)
        low, high = float(values.min()), float(values.max())
        check(low >= 0 and high <= 255, "image", f"must be from 0 to 255 in mode {image.mode}", (low, high))
    return image.convert("RGB")


def image_key(image: Image.Image) -> str:
    """Return the cache key of an RGB image, 64 hex digits: images of equal size and pixels have equal keys.

    Raises:
        TypeError, ValueError: not a PIL image in mode RGB with pixels.
    """
    _check_rgb(image)
    digest = hashlib.blake2b(repr(image.size).encode(), digest_size=32)
    digest.update(image.tobytes())
    return digest.hexdigest()


def square(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    """Pad an RGB image to a square of its longer side, filled with ``color``; the image is centred and not resized.

    An odd pixel goes to the right or below, as in the official code (``image_aspect_ratio`` "pad").

    Raises:
        TypeError, ValueError: not a PIL image in mode RGB with pixels, or the square would be above PIL's limit for
            decompression bombs (twice ``PIL.Image.MAX_IMAGE_PIXELS``), which the padding of a thin strip can reach.
    """
    padded = _Padded(image, color)
    return Image.fromarray(padded.rows(0, padded.side))


def prepare(image: Image.Image, expert: VisionExpert) -> Tensor:
    """Turn an RGB image into the input of ``expert``; experts with the same ``view`` get the same input.

    The image is padded to a square with ``pad_color``. With a ``std`` it is resized (PIL's bicubic) to S x S, S =
    ``image_size``, scaled to 0 to 1 and normalised, bit by bit as CLIPImageProcessor and BitImageProcessor of
    transformers do it. Without a ``std`` it is normalised by the mean and the deviation of the padded image before it
    is resized (bilinear, antialiased), as Pix2StructImageProcessor does. That processor computes the grid from the size
    of the image and gets 44 x 44 for one square in seven; here the grid is always the expert's.

    The whole square is never in memory: it is resized in bands of rows, with the same bits as a result. So a strip of
    1 x 9000 takes less than 200 MB.

    Args:
        image: from :func:`open_image`.
        expert: determines how the image is prepared.

    Returns:
        fp32, on the CPU: (3, S, S); for ``patches`` (h * w, 2 + 3 * (S / h) * (S / w)), for the (h, w) ``grid`` row by
        row: the row and the column of a patch, both from 1, then its pixels row by row, each with its three colours.

    Raises:
        TypeError, ValueError: an argument is of another type, or as for :func:`square`.
    """
    check(isinstance(expert, VisionExpert), "expert", "must be a VisionExpert", expert, TypeError)
    padded, size = _Padded(image, expert.pad_color), expert.image_size
    if expert.std is None:
        result = _bilinear(padded, size)
    else:
        # transformers multiplies in fp64, too, before it rounds to fp32.
        scaled: np.ndarray = (_bicubic(padded, size) * (1 / 255)).astype(np.float32)
        scaled = (scaled - np.array(expert.mean, np.float32)) / np.array(expert.std, np.float32)
        result = torch.from_numpy(scaled).permute(2, 0, 1)
    return _patches(result, expert.grid) if expert.patches else result.contiguous()


class PreparedImage:
    """An image and its prepared forms for the encoders; each form is made when it is first needed, and kept.

    Args:
        source: as for :func:`open_image`.

    Attributes:
        image: the RGB image.
        key: its :func:`image_key`.
    """

    def __init__(self, source: Image.Image | str | os.PathLike[str] | bytes) -> None:
        self.image = open_image(source)
        self.key = image_key(self.image)
        self._views: dict[tuple, Tensor] = {}

    def view(self, expert: VisionExpert) -> Tensor:
        """Return the input of ``expert`` as :func:`prepare` makes it; experts with the same view share the tensor."""
        if expert.view not in self._views:
            self._views[expert.view] = prepare(self.image, expert)
        return self._views[expert.view]


class _Padded:
    """An RGB image that is padded to a square of its longer side; rows of the square are made on demand."""

    def __init__(self, image: Image.Image, color: tuple[int, ...]) -> None:
        _check_rgb(image)
        is_color = isinstance(color, tuple) and len(color) == 3 and all(c in range(256) for c in color)
        check(is_color, "color", "must be three ints from 0 to 255", color)
        width, height = image.size
        self.side = max(width, height)
        limit = 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else math.inf
        rule = f"must have at most {limit} pixels when padded to a square"
        check(self.side * self.side <= limit, "image", rule, image.size)
        self._pixels, self._color = np.asarray(image), color
        self._top, self._left = (self.side - height) // 2, (self.side - width) // 2

    def rows(self, start: int, stop: int) -> np.ndarray:
        """(stop - start, side, 3) uint8."""
        height, width, _ = self._pixels.shape
        result = np.empty((stop - start, self.side, 3), np.uint8)
        result[0] = self._color
        result[1:] = result[0]  # copying rows is much faster than setting pixels
        first, last = max(start, self._top), min(stop, self._top + height)
        if first < last:
            columns = slice(self._left, self._left + width)
            result[first - start : last - start, columns] = self._pixels[first - self._top : last - self._top]
        return result

    def bands(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield all rows from top to bottom in bands: the slice of each band, and its :meth:`rows`."""
        height = max(1, _BAND // (3 * self.side))
        for start in range(0, self.side, height):
            stop = min(start + height, self.side)
            yield slice(start, stop), self.rows(start, stop)

    def mean_and_deviation(self) -> tuple[np.floating, np.floating]:
        """Return mean and deviation of all values in fp32, bit by bit as NumPy computes them for the whole square."""
        count = 3 * self.side**2
        mean = np.float32(np.float64(self._sum(0, count)) / count)
        return mean, np.sqrt(np.float32(np.float64(self._sum(0, count, mean)) / count))

    def _sum(self, start: int, count: int, mean: np.floating | None = None) -> np.floating:
        """Sum ``count`` values from ``start`` on, or their squared distances from ``mean``.

        The order is NumPy's, which adds the sums of two halves; the length of the first half is a multiple of eight.
        """
        if count > _BAND:
            half = count // 2 // 8 * 8
            return self._sum(start, half, mean) + self._sum(start + half, count - half, mean)
        row = 3 * self.side
        first, last = start // row, -(-(start + count) // row)
        values = self.rows(first, last).reshape(-1)[start - first * row :][:count].astype(np.float32)
        if mean is not None:
            values -= mean
            values *= values
        return values.sum()


def _bicubic(padded: _Padded, size: int) -> np.ndarray:
    """Resize the square to (size, size, 3) uint8 as PIL does: first along the rows, with rounding, then the columns."""
    narrow = np.empty((padded.side, size, 3), np.uint8)
    for where, rows in padded.bands():
        narrow[where] = np.asarray(Image.fromarray(rows).resize((size, len(rows)), Image.Resampling.BICUBIC))
    return np.asarray(Image.fromarray(narrow).resize((size, size), Image.Resampling.BICUBIC))


def _bilinear(padded: _Padded, size: int) -> Tensor:
    """Resize the normalised square to (3, size, size) fp32 as PyTorch does: first along the rows, then the columns."""

    def resize(image: Tensor, height: int, width: int) -> Tensor:
        return F.interpolate(image[None], (height, width), mode="bilinear", align_corners=False, antialias=True)[0]

    mean, deviation = padded.mean_and_deviation()
    deviation = max(deviation, np.float64(1 / math.sqrt(3 * padded.side**2)))
    narrow = torch.empty(3, padded.side, size, dtype=torch.float32, device="cpu")
    for where, rows in padded.bands():
        pixels = rows.astype(np.float32)
        pixels -= mean
        pixels /= deviation
        narrow[:, where] = resize(torch.from_numpy(pixels).permute(2, 0, 1), len(rows), size)
    return torch.cat([resize(columns, size, columns.shape[2]) for columns in narrow.split(64, dim=2)], dim=2)


def _patches(image: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cut (3, S, S) into patches (h * w, 2 + 3 * (S / h) * (S / w)), each behind its row and column."""
    h, w = grid
    channels, side, _ = image.shape
    pixels = image.reshape(channels, h, side // h, w, side // w).permute(1, 3, 2, 4, 0).reshape(h * w, -1)
    ids = torch.cartesian_prod(*(torch.arange(1, n + 1, dtype=image.dtype, device=image.device) for n in grid))
    return torch.cat([ids, pixels], dim=1)


def _check_rgb(image: Image.Image) -> None:
    check(isinstance(image, Image.Image), "image", "must be a PIL image", type(image), TypeError)
    check(image.mode == "RGB", "image", "must be in mode RGB (mova.images.open_image makes it so)", image.mode)
    check(min(image.size) > 0, "image", "must have pixels", image.size)
