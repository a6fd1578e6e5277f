"""JSON lines of the command line: items are read, worked on in batches, and written with their results or errors."""

from __future__ import annotations

import json
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from tqdm import tqdm

from ._checks import check
from .images import open_image
from .routing import selection

BAD_INPUT = (ValueError, OSError)
_NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:")


@dataclass
class Item:
    """One line of the input. Its ``fields`` are written back with the result.

    ``image`` is set when it has been opened, ``error`` when the item has failed. The path of the image is relative to
    ``folder``.
    """

    fields: dict[str, Any]
    error: str | None = None
    image: Image | None = None
    folder: Path = Path()

    def open(self, pool: Sequence[str]) -> None:
        """Open the image and check the other fields; experts must be in ``pool``. A failure sets ``error``."""
        if self.error is not None:
            return
        try:
            for name in ("image", "question"):
                value = self.fields.get(name)
                check(isinstance(value, str) and value.strip(), name, "must be a string that is not empty", value)
                value.encode()  # type: ignore[union-attr]  # JSON can hold half a surrogate pair, which is an error
            experts = self.fields.get("experts")
            selection("none" if experts is None else experts, pool)
            _check_no_url(self.fields["image"])
            self.image = open_image(str(self.folder / self.fields["image"]))
        except Exception as error:
            self.error = _reason(error)


def read_items(images: Sequence[str], questions: Sequence[str], jsonl: Path | None, experts: Any) -> list[Item]:
    """Make the items of the command line's images and questions, or of a file of JSON lines.

    Args:
        images, questions: as many of one as of the other, or one alone for all of the other.
        jsonl: the file, instead of images and questions; ``-`` is standard input.
        experts: the experts of items that name none; None: they stay without.
    """
    if jsonl is not None:
        check(not images and not questions, "jsonl", "must be without image and question", str(jsonl))
        is_input = str(jsonl) == "-"
        lines = (sys.stdin.buffer.read() if is_input else jsonl.read_bytes()).splitlines()
        folder = Path() if is_input else jsonl.parent
        items = [_item(line, number, folder) for number, line in enumerate(lines, 1) if line.strip()]
    else:
        check(images, "image", "or jsonl must be given", list(images))
        check(questions, "question", "must be given", list(questions))
        for image in images:
            _check_no_url(image)
            is_pattern = re.search(r"[*?[]", image) and not Path(image).exists()
            rule = "must be a file: no file matches this pattern, which the shell hands on as it is"
            check(not is_pattern, "image", rule, image)
        count = max(len(images), len(questions))
        fits = len(images) in (1, count) and len(questions) in (1, count)
        check(fits, "question", f"must be 1 or {len(images)}, one for each image", len(questions))
        pairs = zip([*images] * (count // len(images)), [*questions] * (count // len(questions)), strict=True)
        items = [Item({"image": image, "question": question}) for image, question in pairs]
    if experts is not None:
        for item in items:
            item.fields.setdefault("experts", experts)
    return items


def _item(line: bytes, number: int, folder: Path) -> Item:
    try:
        fields = json.loads(line)
        check(isinstance(fields, dict), "a line", "must be a JSON object", fields)
        json.dumps(fields)  # fails if the line is nested too deeply to be written again
    except (ValueError, RecursionError) as error:  # json's own errors are ValueErrors
        return Item({"line": number}, f"line {number} cannot be read: {error}")
    fields.pop("error", None)  # the line may be the result of an earlier run that failed
    if "question" not in fields and "text" in fields:
        fields["question"] = fields["text"]
    return Item(fields, folder=folder)


def write_results(
    items: Sequence[Item],
    batch_size: int,
    run: Callable[[Sequence[Item]], list[dict[str, Any]]],
    *,
    pool: Sequence[str],
    make_room: Callable[[], None],
    output: Path | None,
    progress: bool,
) -> int:
    """Write a JSON line for each item, in order, as soon as its batch is done.

    Args:
        items: of :func:`read_items`.
        batch_size: the number of items in a call of ``run``.
        run: returns the fields to add to each item of a batch.
        pool: the names of the experts that an item may ask for.
        make_room: is called when memory did not suffice.
        output: the file to write; None: standard output.
        progress: whether to show a progress bar on a terminal.

    Returns:
        The number of items whose line has an error.
    """
    failed = 0
    with ExitStack() as stack:
        out = sys.stdout
        if output is not None:
            out = stack.enter_context(output.open("w", encoding="utf-8", errors="backslashreplace"))
        bar = stack.enter_context(tqdm(total=len(items), unit="image", disable=None if progress else True))
        for start in range(0, len(items), batch_size):
            batch = items[start : start + batch_size]
            for item in batch:
                item.open(pool)
            results = iter(_results([item for item in batch if item.error is None], run, make_room))
            for item in batch:
                result = next(results) if item.error is None else {"error": item.error}
                item.image = None
                failed += "error" in result
                with bar.external_write_mode(out):
                    print(json.dumps({**item.fields, **result}, ensure_ascii=False), file=out, flush=True)
                bar.update()
    if failed:
        print(f'mova: {failed} of {len(items)} failed, see "error" in their lines', file=sys.stderr)
    return failed


def _results(
    batch: Sequence[Item], run: Callable[[Sequence[Item]], list[dict[str, Any]]], make_room: Callable[[], None]
) -> list[dict[str, Any]]:
    """Return the results of a batch. If it fails, both halves are tried, so that one bad item does not fail the others.

    ``make_room`` is called when memory did not suffice.
    """
    try:
        return run(batch) if batch else []
    except Exception as error:
        reason, lacks_memory = _reason(error), _lacks_memory(error)
        if len(batch) == 1 and not lacks_memory and not isinstance(error, BAD_INPUT):  # perhaps a bug
            tqdm.write("".join(traceback.format_exception(error)), file=sys.stderr, end="")
    # Not inside the except block: there the error still holds the memory of the interrupted computation.
    if lacks_memory:
        make_room()
    if len(batch) == 1:
        return [{"error": reason}]
    middle = len(batch) // 2
    return [result for half in (batch[:middle], batch[middle:]) for result in _results(half, run, make_room)]


def _check_no_url(image: str) -> None:
    check(not _URL.match(image), "image", "must be a file of this machine, so download it first", image[:200])


def _lacks_memory(error: Exception) -> bool:
    is_one = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return is_one or any(words in str(error).lower() for words in _NO_MEMORY)


def _reason(error: Exception) -> str:
    """Describe an error in one line; errors other than those of bad input are described with their class."""
    said = " ".join(str(error).split())
    if _lacks_memory(error):
        return f"out of memory: a shorter question or fewer experts need less ({said[:200] or type(error).__name__})"
    return said if isinstance(error, (*BAD_INPUT, TypeError)) and said else f"{type(error).__name__}: {said}"
