"""Vision experts as data: the purpose of each, its input image, its output tokens; and the registry of experts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ._checks import check, check_int, check_whole

if TYPE_CHECKING:
    from torch import nn

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class VisionExpert:
    """A vision encoder as the rest of the pipeline sees it.

    An image is prepared in two steps. First it is padded to a square with ``pad_color``, so that the grids of all
    experts cover the same area, resized to ``image_size`` and normalised; experts with the same ``view`` share the
    result. Then ``resize`` brings it to ``input_size``, in fp32, with half-pixel centres and without antialiasing.

    Args:
        name: up to 100 lower-case letters, digits, ``_`` and ``-``, a letter first; not ``all`` or ``none``, which
            select experts.
        description: one line that tells the router for which images and questions the expert is good.
        image_size: side in pixels of the square image that preparation makes.
        mean: three numbers from 0 to 1; also the colour of the padding.
        std: three positive numbers; None normalises each image by its own mean and deviation (Pix2Struct).
        grid: (h, w) of the output tokens.
        channels: width of the output tokens.
        input_size: side in pixels of the encoder's input; None is ``image_size``.
        resize: ``"bilinear"`` or ``"nearest"`` from ``image_size`` to ``input_size``; None if they are the same.
        native_grid: the encoder's own grid, if it is resampled bilinearly to ``grid``; None is ``grid``.
        layer: index into the hidden states (0 is the embedding), without a final norm; None is the encoder's own
            output, behind its final norm or its neck.
        prefix_tokens: how many leading tokens (CLS) are dropped.
        patches: the encoder takes h * w flattened patches with their row and column, both from 1, instead of pixels.
        checkpoint: the origin of the weights, for the reader.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field breaks its rule; the message names the field, the rule and the value.
    """

    name: str
    description: str
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float] | None
    grid: tuple[int, int]
    channels: int
    input_size: int = None  # type: ignore[assignment]  # None is replaced below, as for native_grid
    resize: str | None = None
    native_grid: tuple[int, int] = None  # type: ignore[assignment]
    layer: int | None = None
    prefix_tokens: int = 0
    patches: bool = False
    checkpoint: str = ""

    def __post_init__(self) -> None:
        for field in ("name", "description", "checkpoint"):
            check(isinstance(getattr(self, field), str), field, "must be a string", getattr(self, field), TypeError)
        check(
            re.fullmatch("[a-z][a-z0-9_-]{0,99}", self.name) and self.name not in ("all", "none"),
            "name",
            "must be up to 100 lower-case letters, digits, _ and -, a letter first, and neither all nor none",
            self.name,
        )
        check(
            self.description.strip() and len(self.description.splitlines()) == 1,
            "description",
            "must be one line of text",
            self.description,
        )
        for field, smallest in (("image_size", 1), ("channels", 1), ("prefix_tokens", 0)):
            check_int(field, getattr(self, field), smallest)
        if self.input_size is None:
            object.__setattr__(self, "input_size", self.image_size)
        check_int("input_size", self.input_size, 1)
        self._set_grid("grid")
        if self.native_grid is None:
            object.__setattr__(self, "native_grid", self.grid)
        self._set_grid("native_grid")
        self._set_colors("mean", lambda x: 0 <= x <= 1, "from 0 to 1")
        if self.std is not None:
            self._set_colors("std", lambda x: 0 < x < math.inf, "above 0")
        same = self.input_size == self.image_size
        check(
            self.resize is None if same else self.resize in ("bilinear", "nearest"),
            "resize",
            f"must be {None if same else 'bilinear or nearest'} from image_size {self.image_size} to input_size "
            f"{self.input_size}",
            self.resize,
        )
        if self.layer is not None:
            check_whole("layer", self.layer)
        check(isinstance(self.patches, bool), "patches", "must be a bool", self.patches, TypeError)
        check(
            not self.patches or all(self.image_size % side == 0 for side in self.grid),
            "grid",
            f"must divide image_size {self.image_size} into patches",
            self.grid,
        )

    # Lists (from JSON) become tuples, so that an expert stays hashable.
    def _set_grid(self, field: str) -> None:
        value = getattr(self, field)
        check(isinstance(value, list | tuple), field, "must be (h, w)", value, TypeError)
        check(len(value) == 2, field, "must be (h, w)", value)
        for i, side in enumerate(value):
            check_int(f"{field}[{i}]", side, 1)
        object.__setattr__(self, field, tuple(value))

    def _set_colors(self, field: str, fits, rule: str) -> None:
        value = getattr(self, field)
        numbers = isinstance(value, list | tuple) and all(isinstance(x, int | float) for x in value)
        check(numbers, field, "must be three numbers", value, TypeError)
        check(len(value) == 3 and all(fits(x) for x in value), field, f"must be three numbers {rule}", value)
        object.__setattr__(self, field, tuple(map(float, value)))

    @property
    def pad_color(self) -> tuple[int, ...]:
        """The 8-bit RGB colour with which an image is padded to a square."""
        return tuple(int(255 * x) for x in self.mean)

    @property
    def view(self) -> tuple:
        """A value that is equal for two experts exactly if preparation makes the same input for both."""
        return self.image_size, self.mean, self.std, self.grid if self.patches else None

    @property
    def num_tokens(self) -> int:
        """The number of output tokens; for ``patches`` also the number of input patches."""
        return self.grid[0] * self.grid[1]


_REGISTRY: dict[str, VisionExpert] = {}
_BUILDERS: dict[str, Callable[..., nn.Module]] = {}


def register(
    expert: VisionExpert, build: Callable[..., nn.Module] | None = None, *, replace: bool = False
) -> VisionExpert:
    """Make ``expert`` known by its name, and return it.

    Args:
        expert: the expert as data.
        build: ``build(**sizes)`` makes its backbone, see :class:`mova.encoders.VisionEncoder`; None keeps the builder
            that the name has. It is also called under ``torch.device("meta")``, where tensors hold no values.
        replace: whether it may replace a registered expert of the same name.

    Raises:
        TypeError: ``expert`` is not a VisionExpert, or ``build`` is not callable.
        ValueError: the name is taken.
    """
    check(isinstance(expert, VisionExpert), "expert", "must be a VisionExpert", expert, TypeError)
    check(build is None or callable(build), "build", "must be callable", build, TypeError)
    free = replace or expert.name not in (*_REGISTRY, BASE.name)
    check(free, "expert", "must have a name that is not registered yet (or replace=True)", expert.name)
    _REGISTRY[expert.name] = expert
    if build is not None:
        set_builder(expert.name, build)
    return expert


def set_builder(name: str, build: Callable[..., nn.Module]) -> None:
    """Give an expert the function that makes its backbone, see :func:`register`."""
    _BUILDERS[name] = build


def builder(name: str) -> Callable[..., nn.Module]:
    """Return the function that makes this expert's backbone from sizes.

    The official experts and ``clip`` have theirs from :mod:`mova.encoders`.

    Raises:
        ValueError: there is no such function.
    """
    check(isinstance(name, str), "name", "must be a string", name, TypeError)
    rule = "must be of an expert with a builder: register it with experts.register(expert, build)"
    check(name in _BUILDERS, "name", rule, name)
    return _BUILDERS[name]


def get(name: str) -> VisionExpert:
    """Return the expert of this name.

    Raises:
        ValueError: no expert is registered under it; the message lists the registered names.
    """
    check(isinstance(name, str), "name", "must be a string", name, TypeError)
    check(name in _REGISTRY, "name", f"must be a registered expert ({', '.join(_REGISTRY)})", name)
    return _REGISTRY[name]


def names() -> tuple[str, ...]:
    """Return all registered names: the official seven in their order, then the user's own."""
    return tuple(_REGISTRY)


def resolve(experts: Iterable[str | VisionExpert]) -> tuple[VisionExpert, ...]:
    """Look up experts that are given by name; VisionExperts are returned as they are. The order stays.

    Raises:
        TypeError: ``experts`` is a string or not iterable.
        ValueError: a name is unknown or repeated, or ``experts`` is empty.
    """
    is_list = isinstance(experts, Iterable) and not isinstance(experts, str)
    check(is_list, "experts", "must be a sequence of names or VisionExperts", experts, TypeError)
    found = tuple(e if isinstance(e, VisionExpert) else get(e) for e in experts)
    given = [e.name for e in found]
    check(given, "experts", "must not be empty", given)
    check(len(set(given)) == len(given), "experts", "must not repeat a name", given)
    return found


# The released experts in the order of the official code, which the letters of the official prompt and the columns of
# the official adapter follow; the paper orders its letters differently. The mean and deviation of the 1024-pixel image
# are those of Vary's own code: the released preprocessor file was not available. If it differs, it is right. Layer -2
# of CLIP and DINOv2 is select_layer in the official config; dataclasses.replace changes it.
BASE = VisionExpert(
    "clip", "The base encoder, which sees every image.", 672, CLIP_MEAN, CLIP_STD, (48, 48), 1024,
    layer=-2, prefix_tokens=1, checkpoint="openai/clip-vit-large-patch14-336",
)  # fmt: skip
OFFICIAL = (
    VisionExpert(
        "dinov2", "Tells apart objects and their parts and says where they are in photographs.",
        672, IMAGENET_MEAN, IMAGENET_STD, (37, 37), 1536, input_size=518, resize="bilinear",
        layer=-2, prefix_tokens=1, checkpoint="dinov2-giant",
    ),
    VisionExpert(
        "vary", "Reads pages densely filled with printed text, and the figures among it.",
        1024, CLIP_MEAN, CLIP_STD, (32, 32), 512, checkpoint="Vary vision vocabulary",
    ),
    VisionExpert(
        "codetr", "Finds and counts objects of everyday scenes, small and crowded ones too.",
        1024, CLIP_MEAN, CLIP_STD, (37, 37), 256, input_size=1280, resize="nearest", native_grid=(80, 80),
        checkpoint="Co-DETR",
    ),
    VisionExpert(
        "pix2struct", "Understands scans, screenshots and infographics: their words and their layout.",
        720, CLIP_MEAN, None, (45, 45), 1536, patches=True, checkpoint="google/pix2struct-large",
    ),
    VisionExpert(
        "deplot", "Recovers the numbers behind plots, bar charts and other diagrams.",
        720, CLIP_MEAN, None, (45, 45), 768, patches=True, checkpoint="google/deplot",
    ),
    VisionExpert(
        "biomedclip", "Knows medical pictures: radiographs, scans, microscopy.",
        672, CLIP_MEAN, CLIP_STD, (14, 14), 768, input_size=224, resize="bilinear", prefix_tokens=1,
        checkpoint="microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
    ),
    VisionExpert(
        "sam", "Draws exact outlines: which pixels belong to one object or region.",
        1024, CLIP_MEAN, CLIP_STD, (64, 64), 256, checkpoint="SAM ViT-H",
    ),
)  # fmt: skip
for _expert in OFFICIAL:
    register(_expert)
