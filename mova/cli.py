"""The command line: ``mova answer``, ``route``, ``convert``, ``info`` and ``demo``."""

# No "from __future__ import annotations": tyro reads the annotations at run time.
import json
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from PIL.Image import Image
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import TextStreamer
from transformers.utils import logging

from . import experts as known
from ._checks import check, check_int
from .configuration_mova import MoVAConfig
from .convert import convert
from .demo import run as run_demo
from .images import open_image
from .pipeline import MoVAPipeline
from .routing import selection
from .routing_lora import ROUTING_LORA
from .visualize import routing_figure

DONE, SOME_FAILED, FAILED, INTERRUPTED, NO_READER = 0, 1, 2, 130, 141  # the exit codes
_FIGURES = (".png", ".svg", ".pdf")
_BAD_INPUT = (ValueError, OSError)
_NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:")

Repeated = tyro.conf.UseAppendAction
File = Annotated[Path | None, tyro.conf.arg(metavar="PATH")]
Images = Annotated[tuple[str, ...], Repeated, tyro.conf.arg(metavar="PATH")]  # a Path would make "http:/" of "http://"
Dtype = Literal["auto", "bfloat16", "float16", "float32"]


def answer(
    model: str,
    image: Images = (),
    question: Annotated[tuple[str, ...], Repeated] = (),
    jsonl: File = None,
    output: File = None,
    experts: tuple[str, ...] = (),
    suffix: str = "",
    batch_size: int = 8,
    max_new_tokens: int = 128,
    num_beams: int = 1,
    device: Annotated[str | None, tyro.conf.arg(metavar="STR")] = None,
    dtype: Dtype = "auto",
    stream: bool = False,
) -> int:
    """Answer questions about images, one JSON line for each.

    A line has "answer", "experts" (which were used) and "router" (its words), or "error"; and what came in.

    Args:
        model: Directory or hub repository (owner/name) of a model.
        image: The file of an image; --image several times for several.
        question: About the image in the same place; one is asked about all images, and one image all questions.
        jsonl: Lines with "image", "question" (or "text") and, if wanted, "experts"; "-" is standard input. A relative
            path of an image is relative to the file that holds the line (of standard input, to the current folder).
        output: Where the lines go; default standard output.
        experts: Use these instead of asking the router; or "all" or "none" alone.
        suffix: Appended to every question, such as "Answer with one word."
        batch_size: How many are answered together.
        max_new_tokens: Length of an answer.
        num_beams: Beams of the search.
        device: Where the model computes; default the GPU, if there is one.
        dtype: Of the weights; "auto" is as stored.
        stream: Show each answer on standard error as it is written, one question at a time.
    """
    for name, value in (("batch-size", batch_size), ("max-new-tokens", max_new_tokens), ("num-beams", num_beams)):
        check_int(name, value, 1)
    check(num_beams == 1 or not stream, "stream", "must be without num-beams", num_beams)
    _check_target("output", output)
    wanted: Any = experts[0] if experts in (("all",), ("none",)) else list(experts) or None
    items = _items(image, question, jsonl, wanted)
    pipeline = _pipeline(model, device, dtype)
    pool = _pool(pipeline)
    selection(wanted or "none", pool)  # what all items have is wrong once, not in every line

    def run(batch: Sequence[_Item]) -> list[dict[str, Any]]:
        generate: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": num_beams}
        if stream:
            generate["streamer"] = _Streamer(pipeline.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        answers = pipeline.answer(
            [item.image for item in batch],
            [item.fields["question"] for item in batch],
            experts=[item.fields.get("experts") for item in batch],
            suffix=suffix,
            **generate,
        )
        return [{"answer": a.text, "experts": list(a.route.experts), "router": a.route.answer} for a in answers]

    return _each(items, 1 if stream else batch_size, run, pipeline, output, progress=not stream)


def route(
    model: str,
    image: Images = (),
    question: Annotated[tuple[str, ...], Repeated] = (),
    jsonl: File = None,
    output: File = None,
    batch_size: int = 8,
    device: Annotated[str | None, tyro.conf.arg(metavar="STR")] = None,
    dtype: Dtype = "auto",
    figure: File = None,
) -> int:
    """Say which experts the router picks and how the adapter weighs them, one JSON line for each image and question.

    A line has "router" (its words), "letters" (what it was offered), "experts" (what it picked) and "gates" (expert to
    its weight in each block), or "error"; and what came in.

    Args:
        model: Directory or hub repository (owner/name) of a model.
        image: The file of an image; --image several times for several.
        question: About the image in the same place; one is asked about all images, and one image all questions.
        jsonl: Lines with "image" and "question" (or "text"); "-" is standard input. A relative path of an image is
            relative to the file that holds the line (of standard input, to the current folder).
        output: Where the lines go; default standard output.
        batch_size: How many are routed together.
        device: Where the model computes; default the GPU, if there is one.
        dtype: Of the weights; "auto" is as stored.
        figure: Also draw all of them into this file (PNG, SVG or PDF).
    """
    check_int("batch-size", batch_size, 1)
    _check_target("output", output)
    _check_figure("figure", figure)
    items = _items(image, question, jsonl, None)
    pipeline = _pipeline(model, device, dtype)
    pool = _pool(pipeline)
    drawn: list[tuple[Any, ...]] = []

    def run(batch: Sequence[_Item]) -> list[dict[str, Any]]:
        images, questions = [item.image for item in batch], [item.fields["question"] for item in batch]
        routes = pipeline.route(images, questions)
        fusion = pipeline.fuse(images, questions, [r.experts for r in routes])
        if figure is not None:
            chosen = [r.experts for r in routes]
            drawn.extend(zip(images, questions, chosen, fusion.gates, fusion.tokens, strict=True))
        return [
            {
                "router": r.answer,
                "letters": dict(r.letters),
                "experts": list(r.experts),
                "gates": {name: [round(x, 4) for x in gates[:, pool.index(name)].tolist()] for name in r.experts},
            }
            for r, gates in zip(routes, fusion.gates, strict=True)
        ]

    code = _each(items, batch_size, run, pipeline, output)
    if figure is not None and drawn:
        images, questions, chosen, gates, tokens = zip(*drawn, strict=True)
        routing_figure(images, questions, chosen, torch.stack(gates), pool, torch.stack(tokens)).savefig(figure)
    return code


def info(model: Annotated[str | None, tyro.conf.arg(metavar="STR")] = None) -> int:
    """Show versions and the known experts; or, of a model, its parts, its experts and what of them is on disk.

    Args:
        model: Directory or hub repository (owner/name) of a model.
    """
    config = None if model is None else _config(model)
    for package in ("mova-kernels", "torch", "transformers", "peft", "triton"):
        try:
            print(f"{package:14} {version(package)}")
        except PackageNotFoundError:
            print(f"{package:14} not installed")
    print("which kernels run here and why: python -m mova_kernels\n")
    if model is None or config is None:
        _print_experts([(expert, "") for expert in (known.BASE, *map(known.get, known.names()))])
        return DONE
    adapter, text, source = config.adapter_config, config.text_config, Path(config.expert_path or model)
    print(f"model          {model}: {_on_disk(Path(model))}")
    print(f"language model {text.model_type}, {text.num_hidden_layers} layers, width {text.hidden_size}")
    print(f"adapter        {adapter.num_layers} blocks, width {adapter.in_channels}, top {adapter.topk}, ", end="")
    print(f"{config.num_image_tokens} image tokens, {config.num_routing_tokens} for the router")
    print(f"routing LoRA   {'yes' if (Path(model) / ROUTING_LORA).is_dir() else 'no'}")
    print(f"experts        in {source / 'experts'}\n")
    weights = [(expert, _on_disk(source, f"experts/{expert.name}")) for expert in config.pool]
    _print_experts([(config.base_expert, "in model"), *weights])
    return DONE


def demo(output: Path = Path("mova-demo.png")) -> int:
    """Run every part on drawn images with a small model of random weights, and draw what happened; needs no files.

    Args:
        output: The picture (PNG, SVG or PDF).
    """
    _check_figure("output", output)
    torch.set_num_threads(1)  # small matrices: where the cores are busy, a second thread makes it slower
    run_demo(output)
    return DONE


def main(args: Sequence[str] | None = None) -> None:
    """The entry point of ``mova``; ends the process.

    The exit code is 0; 1 if some lines have an error; 2 if nothing could be done; 130 if it was interrupted.

    Args:
        args: Those of the command line; default the process's own.
    """
    commands: dict[str, Callable[..., int]] = {
        "answer": answer,
        "route": route,
        "convert": convert,
        "info": info,
        "demo": demo,
    }
    about = "Ask a MoVA model about images, and see which of its vision experts it uses."
    if isinstance(sys.stdout, TextIOWrapper):
        # JSON lines are UTF-8; half a surrogate pair, which has none, stays the escape that it came as.
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        _check_words(sys.argv[1:] if args is None else args)
        with _quiet():
            code = tyro.extras.subcommand_cli_from_dict(commands, prog="mova", description=about, args=args)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:  # as in "mova answer ... | head -1"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end of the process
        code = NO_READER
    except (*_BAD_INPUT, ImportError) as error:
        print(f"mova: {error}", file=sys.stderr)
        code = FAILED
    sys.exit(code)


@dataclass
class _Item:
    """A line of the input: its ``fields``, which come back, and the ``image``, once it is opened; or an ``error``.

    The path of the image is relative to ``folder``.
    """

    fields: dict[str, Any]
    error: str | None = None
    image: Image | None = None
    folder: Path = Path()

    def open(self, pool: Sequence[str]) -> None:
        """Open the image and check the rest; experts must be in ``pool``."""
        if self.error is not None:
            return
        try:
            for name in ("image", "question"):
                value = self.fields.get(name)
                check(isinstance(value, str) and value.strip(), name, "must be a string that is not empty", value)
                value.encode()  # type: ignore[union-attr]  # half a surrogate pair, which JSON can hold, is an error
            experts = self.fields.get("experts")
            selection("none" if experts is None else experts, pool)
            _check_no_url(self.fields["image"])
            self.image = open_image(str(self.folder / self.fields["image"]))
        except Exception as error:
            self.error = _reason(error)


class _Streamer(TextStreamer):
    """Writes to standard error: standard output has the lines."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print(text, end="\n" if stream_end else "", file=sys.stderr, flush=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Of transformers only errors and no progress bars; warnings as one line, without the line of the source."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        tqdm.write(f"mova: {message}", file=sys.stderr)

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _config(model: str) -> MoVAConfig:
    is_name = Path(model).is_dir() or re.fullmatch(r"[\w.-]+/[\w.-]+", model)
    check(is_name, "model", "must be a directory that exists or a hub repository (owner/name)", model)
    kind = MoVAConfig.get_config_dict(model)[0].get("model_type")
    check(kind == MoVAConfig.model_type, "model", f"must be of the type {MoVAConfig.model_type}", kind)
    return MoVAConfig.from_pretrained(model)


def _pipeline(model: str, device: str | None, dtype: Dtype) -> MoVAPipeline:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device must be one of this machine, got {device!r} ({error})") from error
    _config(model)
    has_processor = not Path(model).is_dir() or (Path(model) / "processor_config.json").is_file()
    check(has_processor, "model", "must have its processor beside it (processor.save_pretrained)", model)
    try:
        pipeline = MoVAPipeline.from_pretrained(model, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    except (SafetensorError, *_BAD_INPUT) as error:
        raise ValueError(f"the model in {model} cannot be loaded: {error}") from error
    pipeline.model.to(device)
    return pipeline


def _pool(pipeline: MoVAPipeline) -> list[str]:
    return [expert.name for expert in pipeline.processor.pool]


def _items(images: Sequence[str], questions: Sequence[str], jsonl: Path | None, experts: Any) -> list[_Item]:
    """What to do, where ``experts`` is the value of lines that have none."""
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
        items = [_Item({"image": image, "question": question}) for image, question in pairs]
    if experts is not None:
        for item in items:
            item.fields.setdefault("experts", experts)
    return items


def _item(line: bytes, number: int, folder: Path) -> _Item:
    try:
        fields = json.loads(line)
        check(isinstance(fields, dict), "a line", "must be a JSON object", fields)
        json.dumps(fields)  # what is nested too deeply to be written again
    except (ValueError, RecursionError) as error:  # json's own included
        return _Item({"line": number}, f"line {number} cannot be read: {error}")
    fields.pop("error", None)  # of an earlier run, whose lines are tried again
    if "question" not in fields and "text" in fields:
        fields["question"] = fields["text"]
    return _Item(fields, folder=folder)


def _check_words(args: Sequence[str]) -> None:
    """Raise where an option has more words than it takes, and say why that happens."""
    if not args or args[0] not in ("answer", "route"):
        return
    option, left = args[0], 0
    for word in args[1:]:
        if word.startswith("-") and word != "-":
            option, is_assigned, _ = word.partition("=")
            left = 0 if is_assigned else 1
        elif option != "--experts":
            rule = "must have one word" if option.startswith("-") else "must have options alone"
            cure = (
                "quote what has spaces, write --image before each image (a pattern such as *.png becomes many words), "
                "or list them in a file for --jsonl"
            )
            check(left > 0, option, f"{rule}: {cure}", word)
            left -= 1


def _check_no_url(image: str) -> None:
    check(not _URL.match(image), "image", "must be a file of this machine, so download it first", image[:200])


def _each(
    items: Sequence[_Item],
    batch_size: int,
    run: Callable[[Sequence[_Item]], list[dict[str, Any]]],
    pipeline: MoVAPipeline,
    output: Path | None,
    progress: bool = True,
) -> int:
    """Write a line for each item, in order, as soon as its batch is done."""
    failed, pool = 0, _pool(pipeline)
    with ExitStack() as stack:
        out = sys.stdout
        if output is not None:
            out = stack.enter_context(output.open("w", encoding="utf-8", errors="backslashreplace"))
        bar = stack.enter_context(tqdm(total=len(items), unit="image", disable=None if progress else True))
        for start in range(0, len(items), batch_size):
            batch = items[start : start + batch_size]
            for item in batch:
                item.open(pool)
            results = iter(_results([item for item in batch if item.error is None], run, pipeline.clear))
            for item in batch:
                result = next(results) if item.error is None else {"error": item.error}
                item.image = None
                failed += "error" in result
                with bar.external_write_mode(out):
                    print(json.dumps({**item.fields, **result}, ensure_ascii=False), file=out, flush=True)
                bar.update()
    if failed:
        print(f'mova: {failed} of {len(items)} failed, see "error" in their lines', file=sys.stderr)
    return SOME_FAILED if failed else DONE


def _results(
    batch: Sequence[_Item], run: Callable[[Sequence[_Item]], list[dict[str, Any]]], make_room: Callable[[], None]
) -> list[dict[str, Any]]:
    """The results of a batch; if it fails, of each of its halves, so that a bad item takes no other with it.

    ``make_room`` is called where memory did not suffice.
    """
    try:
        return run(batch) if batch else []
    except Exception as error:
        reason, lacks_memory = _reason(error), _lacks_memory(error)
        if len(batch) == 1 and not lacks_memory and not isinstance(error, _BAD_INPUT):  # a bug, perhaps: where is it?
            tqdm.write("".join(traceback.format_exception(error)), file=sys.stderr, end="")
    # Out of the except, for the error holds the memory of what it interrupted.
    if lacks_memory:
        make_room()
    if len(batch) == 1:
        return [{"error": reason}]
    middle = len(batch) // 2
    return [result for half in (batch[:middle], batch[middle:]) for result in _results(half, run, make_room)]


def _lacks_memory(error: Exception) -> bool:
    is_one = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return is_one or any(words in str(error).lower() for words in _NO_MEMORY)


def _reason(error: Exception) -> str:
    """An error in one line, by its kind too where it is none of ours."""
    said = " ".join(str(error).split())
    if _lacks_memory(error):
        return f"out of memory: a shorter question or fewer experts need less ({said[:200] or type(error).__name__})"
    return said if isinstance(error, (*_BAD_INPUT, TypeError)) and said else f"{type(error).__name__}: {said}"


def _check_target(argument: str, path: Path | None) -> None:
    """A file that cannot be written is found before the work, not after it."""
    if path is not None:
        is_free = path.parent.is_dir() and not path.is_dir()
        check(is_free, argument, "must be a file in a directory that exists", str(path))


def _check_figure(argument: str, path: Path | None) -> None:
    _check_target(argument, path)
    if path is not None:
        check(path.suffix.lower() in _FIGURES, argument, f"must end in one of {', '.join(_FIGURES)}", str(path))
        if find_spec("matplotlib") is None:
            raise ImportError('figures need matplotlib: pip install "mova-kernels[demo]"')


def _on_disk(root: Path, part: str = "") -> str:
    if not root.is_dir():
        return "not on disk"
    files = list((root / part).glob("*.safetensors"))
    return f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB" if files else "missing"


def _print_experts(rows: Sequence[tuple[known.VisionExpert, str]]) -> None:
    """A table; a row has an encoder and where its weights are, which no row may have."""
    column = max(len(weights) for _, weights in rows)
    heading = f"{'weights'[:column]:{column}}"
    print(f"{'encoder':12} {'image':>5} {'seen':>5} {'grid':>8} {'width':>6}  {heading}  what it is for")
    for expert, weights in rows:
        grid = "{} x {}".format(*expert.grid)
        sizes = f"{expert.image_size:>5} {expert.input_size:>5} {grid:>8} {expert.channels:>6}"
        print(f"{expert.name:12} {sizes}  {weights:{column}}  {expert.description}")
