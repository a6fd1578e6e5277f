"""The command line: ``mova answer``, ``route``, ``convert``, ``info`` and ``demo``."""

# No "from __future__ import annotations": tyro reads the annotations at run time.
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import TextStreamer
from transformers.utils import logging

from ._checks import check, check_int
from .batch import BAD_INPUT, Item, read_items, write_results
from .configuration_mova import MoVAConfig
from .convert import add_experts, from_official_checkpoint, to_official_checkpoint, to_public_checkpoint
from .demo import run as run_demo
from .info import print_known_experts, print_model, print_versions
from .pipeline import MoVAPipeline
from .routing import selection
from .visualize import routing_figure

DONE, SOME_FAILED, FAILED, INTERRUPTED, NO_READER = 0, 1, 2, 130, 141  # exit codes
_FIGURES = (".png", ".svg", ".pdf")

Repeated = tyro.conf.UseAppendAction
OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH")]
OptionalString = Annotated[str | None, tyro.conf.arg(metavar="STR")]
Images = Annotated[tuple[str, ...], Repeated, tyro.conf.arg(metavar="PATH")]  # a Path makes "http:/" of "http://"
Dtype = Literal["auto", "bfloat16", "float16", "float32"]


def answer(
    model: str,
    image: Images = (),
    question: Annotated[tuple[str, ...], Repeated] = (),
    jsonl: OptionalPath = None,
    output: OptionalPath = None,
    experts: tuple[str, ...] = (),
    suffix: str = "",
    batch_size: int = 8,
    max_new_tokens: int = 128,
    num_beams: int = 1,
    device: OptionalString = None,
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
    items = read_items(image, question, jsonl, wanted)
    pipeline = _pipeline(model, device, dtype)
    pool = [expert.name for expert in pipeline.processor.pool]
    selection(wanted or "none", pool)  # a bad value for all items is one error, not one in every line

    def run(batch: Sequence[Item]) -> list[dict[str, Any]]:
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

    how: dict[str, Any] = {"pool": pool, "make_room": pipeline.clear, "output": output, "progress": not stream}
    failed = write_results(items, 1 if stream else batch_size, run, **how)
    return SOME_FAILED if failed else DONE


def route(
    model: str,
    image: Images = (),
    question: Annotated[tuple[str, ...], Repeated] = (),
    jsonl: OptionalPath = None,
    output: OptionalPath = None,
    batch_size: int = 8,
    device: OptionalString = None,
    dtype: Dtype = "auto",
    figure: OptionalPath = None,
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
    items = read_items(image, question, jsonl, None)
    pipeline = _pipeline(model, device, dtype)
    pool = [expert.name for expert in pipeline.processor.pool]
    drawn: list[tuple[Any, ...]] = []

    def run(batch: Sequence[Item]) -> list[dict[str, Any]]:
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

    failed = write_results(items, batch_size, run, pool=pool, make_room=pipeline.clear, output=output, progress=True)
    if figure is not None and drawn:
        images, questions, chosen, gates, tokens = zip(*drawn, strict=True)
        routing_figure(images, questions, chosen, torch.stack(gates), pool, torch.stack(tokens)).savefig(figure)
    return SOME_FAILED if failed else DONE


def convert(
    output: Path,
    official: OptionalPath = None,
    expert: tuple[str, ...] = (),
    code: OptionalPath = None,
    text_encoder: OptionalString = None,
    skip: tuple[str, ...] = (),
    back: OptionalPath = None,
) -> int:
    """Convert the official checkpoint, or single experts' own ones, into this library's layout; or back.

    Args:
        output: The new model's directory; with expert alone, a model's directory too, or one for the experts.
        official: The official checkpoint's directory.
        expert: name=path of an expert's own checkpoint (a file, or a directory of them), in the place of what the
            official one holds, or to add it to the model in output; with back its name, to write it alone.
        code: Your copy of the official code: its routing prompt and system prompt go into the model.
        text_encoder: Directory or hub name of the BERT whose tokenizer the official model uses; default what its
            config says.
        skip: Experts to leave out; the model does not use them until they are added by expert.
        back: A model of this library, to write as the official checkpoint that it was made from; or experts of it, to
            write under the names of their authors' files, as name.safetensors.
    """
    of_official = code is not None or text_encoder is not None or skip
    if back is not None:
        check(not (official or of_official), "back", "must be alone with output and expert", str(back))
        if not expert:
            to_official_checkpoint(back, output)
        for name in expert:
            to_public_checkpoint(back, name, output / f"{name}.safetensors")
        return DONE
    check(official or expert, "official", "or expert or back must be given", None)
    check(official or not of_official, "code", "text_encoder and skip must be given with official only", None)
    own: dict[str, Path] = {}
    for pair in expert:
        name, _, path = pair.partition("=")
        check(name and path, "expert", "must be name=path", pair)
        own[name] = Path(path)
    if official is not None:
        from_official_checkpoint(official, output, code=code, text_encoder=text_encoder, skip=skip, own=own)
    else:
        add_experts(output, own)
    return DONE


def info(model: OptionalString = None) -> int:
    """Show versions and the known experts; or, of a model, its parts, its experts and what of them is on disk.

    Args:
        model: Directory or hub repository (owner/name) of a model.
    """
    config = None if model is None else _config(model)
    print_versions()
    if model is None or config is None:
        print_known_experts()
    else:
        print_model(model, config)
    return DONE


def demo(output: Path = Path("mova-demo.png")) -> int:
    """Run every part on drawn images with a small model of random weights, and draw what happened; needs no files.

    Args:
        output: The picture (PNG, SVG or PDF).
    """
    _check_figure("output", output)
    torch.set_num_threads(1)  # the matrices are small: on busy cores a second thread slows them down
    run_demo(output)
    return DONE


def main(args: Sequence[str] | None = None) -> None:
    """The entry point of ``mova``; ends the process.

    The exit code is 0; 1 if some lines have an error; 2 if nothing could be done; 130 if it was interrupted.

    Args:
        args: Those of the command line; default the process's own.
    """
    commands: dict[str, Callable[..., int]] = {f.__name__: f for f in (answer, route, convert, info, demo)}
    about = "Ask a MoVA model about images, and see which of its vision experts it uses."
    if isinstance(sys.stdout, TextIOWrapper):
        # JSON lines are UTF-8; half a surrogate pair cannot be encoded, so it is written as an escape.
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        _check_words(sys.argv[1:] if args is None else args)
        with _quiet():
            code = tyro.extras.subcommand_cli_from_dict(commands, prog="mova", description=about, args=args)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:  # as in "mova answer ... | head -1"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes it at exit
        code = NO_READER
    except (*BAD_INPUT, ImportError) as error:
        print(f"mova: {error}", file=sys.stderr)
        code = FAILED
    sys.exit(code)


class _Streamer(TextStreamer):
    """Writes to standard error, for standard output holds the JSON lines."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print(text, end="\n" if stream_end else "", file=sys.stderr, flush=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Show only errors of transformers, no progress bars, and each warning as one line without its source."""

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
    except (SafetensorError, *BAD_INPUT) as error:
        raise ValueError(f"the model in {model} cannot be loaded: {error}") from error
    pipeline.model.to(device)
    return pipeline


def _check_words(args: Sequence[str]) -> None:
    """Raise if an option has more words than it takes; the message names the usual causes."""
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


def _check_target(argument: str, path: Path | None) -> None:
    """Raise if a file cannot be written, before the work starts."""
    if path is not None:
        is_free = path.parent.is_dir() and not path.is_dir()
        check(is_free, argument, "must be a file in a directory that exists", str(path))


def _check_figure(argument: str, path: Path | None) -> None:
    _check_target(argument, path)
    if path is not None:
        check(path.suffix.lower() in _FIGURES, argument, f"must end in one of {', '.join(_FIGURES)}", str(path))
        if find_spec("matplotlib") is None:
            raise ImportError('figures need matplotlib: pip install "mova-kernels[demo]"')
