"""The command line: ``mova answer``, ``route``, ``convert``, ``info`` and ``demo``."""

# No "from __future__ import annotations": tyro reads the annotations at run time. Imports stay in the commands, so that
# --help is quick.
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import tyro

from ._checks import check

Repeated = tyro.conf.UseAppendAction


def answer(
    model: str,
    image: Annotated[tuple[Path, ...], Repeated] = (),
    question: Annotated[tuple[str, ...], Repeated] = (),
    jsonl: Path | None = None,
    output: Path | None = None,
    experts: tuple[str, ...] = (),
    suffix: str = "",
    batch_size: int = 8,
    max_new_tokens: int = 128,
    num_beams: int = 1,
    device: str = "cpu",
    dtype: str = "auto",
    stream: bool = False,
) -> int:
    """Answer questions about images, one JSON line for each.

    Args:
        model: Directory or hub repository of a model.
        image: An image; several times for several.
        question: The question about the image in the same place, or one for all images.
        jsonl: Lines with "image" and "question" (or "text"), optionally "experts"; "-" is standard input. Other
            fields come back.
        output: Where the lines go; default standard output.
        experts: Use these instead of asking the router; "all" or "none" alone.
        suffix: Appended to every question, such as "Answer with one word."
        batch_size: How many are answered together.
        max_new_tokens: Length of an answer.
        num_beams: Beams of the search.
        device: Where the model computes.
        dtype: "auto" (as stored), "bfloat16", "float16" or "float32".
        stream: Show each answer as it is written (on standard error), one question at a time.
    """
    pipeline = _pipeline(model, device, dtype)

    def run(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        generate: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": num_beams}
        if stream:
            from transformers import TextStreamer

            generate["streamer"] = TextStreamer(
                pipeline.processor.tokenizer, skip_prompt=True, skip_special_tokens=True
            )
        answers = pipeline.answer(
            [item["image"] for item in batch],
            [item["question"] for item in batch],
            experts=[item.get("experts") for item in batch],
            suffix=suffix,
            **generate,
        )
        return [{"answer": a.text, "experts": list(a.route.experts), "router": a.route.answer} for a in answers]

    items = _items(image, question, jsonl, experts)
    return _each(items, 1 if stream else batch_size, run, output)


def route(
    model: str,
    image: Annotated[tuple[Path, ...], Repeated] = (),
    question: Annotated[tuple[str, ...], Repeated] = (),
    jsonl: Path | None = None,
    output: Path | None = None,
    batch_size: int = 8,
    device: str = "cpu",
    dtype: str = "auto",
    figure: Path | None = None,
) -> int:
    """Say which experts the router picks and how the adapter weighs them, one JSON line for each image and question.

    A line has "router" (its words), "letters" (what it was offered), "experts" (what it picked) and "gates" (expert to
    its weight in each block).

    Args:
        model: Directory or hub repository of a model.
        image: An image; several times for several.
        question: The question about the image in the same place, or one for all images.
        jsonl: Lines with "image" and "question" (or "text"); "-" is standard input.
        output: Where the lines go; default standard output.
        batch_size: How many are routed together.
        device: Where the model computes.
        dtype: "auto" (as stored), "bfloat16", "float16" or "float32".
        figure: Also draw them into this file (PNG, SVG or PDF; all in one picture).
    """
    pipeline = _pipeline(model, device, dtype)
    pool = [expert.name for expert in pipeline.model.config.pool]
    drawn: list[tuple[Any, ...]] = []

    def run(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        from .images import open_image

        images = [open_image(item["image"]) for item in batch]
        questions = [item["question"] for item in batch]
        routes = pipeline.route(images, questions)
        fusion = pipeline.fuse(images, questions, [r.experts for r in routes])
        if figure is not None:
            drawn.extend(zip(images, questions, routes, fusion.gates, fusion.tokens, strict=True))
        return [
            {
                "router": r.answer,
                "letters": dict(r.letters),
                "experts": list(r.experts),
                "gates": {name: [round(x, 4) for x in gates[:, pool.index(name)].tolist()] for name in r.experts},
            }
            for r, gates in zip(routes, fusion.gates, strict=True)
        ]

    code = _each(_items(image, question, jsonl, ()), batch_size, run, output)
    if figure is not None and drawn:
        import torch

        from .visualize import routing_figure

        images, questions, routes, gates, tokens = zip(*drawn, strict=True)
        picture = routing_figure(
            images, questions, [r.experts for r in routes], torch.stack(gates), pool, torch.stack(tokens)
        )
        picture.savefig(figure)
    return code


def info(model: str | None = None) -> int:
    """Show versions and what runs where; and, of a model, its parts and experts.

    Args:
        model: Directory or hub repository of a model.
    """
    from importlib.metadata import PackageNotFoundError, version

    for package in ("mova-kernels", "torch", "transformers", "peft", "triton"):
        try:
            print(f"{package:14} {version(package)}")
        except PackageNotFoundError:
            print(f"{package:14} not installed")
    print("which kernels run here and why: python -m mova_kernels\n")
    from . import experts

    shown: Sequence[experts.VisionExpert] = [experts.BASE, *map(experts.get, experts.names())]
    if model is not None:
        from transformers import AutoConfig

        from .configuration import MoVAConfig

        config = AutoConfig.from_pretrained(model)
        check(isinstance(config, MoVAConfig), "model", "must be a model of this library", config.model_type)
        shown = [config.base_expert, *config.pool]
        adapter = config.adapter_config
        text = config.text_config
        print(f"language model {text.model_type}, {text.num_hidden_layers} layers, width {text.hidden_size}")
        print(f"adapter        {adapter.num_layers} blocks, width {adapter.in_channels}, top {adapter.topk}, ", end="")
        print(f"{config.num_image_tokens} image tokens, {config.num_routing_tokens} for the router")
        print(f"experts        {config.expert_path or 'with the model'}\n")
    print(f"{'encoder':12} {'image':>5} {'seen':>5} {'grid':>8} {'width':>6}  what it is for")
    for expert in shown:
        grid = "{} x {}".format(*expert.grid)
        sizes = f"{expert.image_size:>5} {expert.input_size:>5} {grid:>8} {expert.channels:>6}"
        print(f"{expert.name:12} {sizes}  {expert.description}")
    return 0


def demo(output: Path = Path("mova-demo.png")) -> int:
    """Run every part on drawn images with a small model of random weights, and draw what happened; needs no files.

    Args:
        output: The picture (PNG, SVG or PDF).
    """
    from .demo import run

    return run(output)


def main() -> None:
    """The entry point of ``mova``."""
    from .convert import convert

    commands: dict[str, Callable[..., int]] = {
        "answer": answer,
        "route": route,
        "convert": convert,
        "info": info,
        "demo": demo,
    }
    try:
        code = tyro.extras.subcommand_cli_from_dict(commands, prog="mova", description=__doc__)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        print(f"mova: {error}", file=sys.stderr)
        code = 1
    sys.exit(code)


def _pipeline(model: str, device: str, dtype: str) -> Any:
    import torch

    from .pipeline import MoVAPipeline

    known = ("auto", "bfloat16", "float16", "float32")
    check(dtype in known, "dtype", f"must be one of {', '.join(known)}", dtype)
    loaded = MoVAPipeline.from_pretrained(model, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    loaded.model.to(device)
    return loaded


def _items(
    images: Sequence[Path], questions: Sequence[str], jsonl: Path | None, experts: Sequence[str]
) -> list[dict[str, Any]]:
    """What to do; an item that cannot be read has an "error"."""
    check((jsonl is None) != (not images), "image", "or jsonl must be given", list(map(str, images)))
    if jsonl is None:
        asked = list(questions) * (len(images) if len(questions) == 1 else 1)
        check(len(asked) == len(images), "question", f"must be 1 or {len(images)}, one for each image", len(questions))
        items: list[dict[str, Any]] = [{"image": str(i), "question": q} for i, q in zip(images, asked, strict=True)]
    else:
        text = sys.stdin.read() if str(jsonl) == "-" else jsonl.read_text(encoding="utf-8")
        items = [_item(line) for line in text.splitlines() if line.strip()]
    if experts:
        wanted: Any = experts[0] if list(experts) in (["all"], ["none"]) else list(experts)
        items = [{"experts": wanted, **item} for item in items]
    return items


def _item(line: str) -> dict[str, Any]:
    try:
        item = json.loads(line)
        check(isinstance(item, dict), "line", "must be a JSON object", line)
        if "question" not in item and "text" in item:
            item["question"] = item["text"]
        for key in ("image", "question"):
            check(isinstance(item.get(key), str), "line", f"must have a string {key!r}", line)
        return item
    except ValueError as error:  # json's own included
        return {"error": str(error)}


def _each(
    items: Sequence[dict[str, Any]],
    batch_size: int,
    run: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
    output: Path | None,
) -> int:
    """Write a line for each item, in order; 1 if any of them has an error."""
    from tqdm import tqdm

    check(batch_size >= 1, "batch-size", "must be at least 1", batch_size)
    failed = 0
    with ExitStack() as stack:
        out = sys.stdout if output is None else stack.enter_context(output.open("w", encoding="utf-8"))
        bar = stack.enter_context(tqdm(total=len(items), unit="image", disable=None))
        for start in range(0, len(items), batch_size):
            batch = items[start : start + batch_size]
            for item, result in zip(batch, _results(batch, run), strict=True):
                failed += "error" in result
                print(json.dumps({**item, **result}, ensure_ascii=False), file=out, flush=True)
                bar.update()
    if failed:
        print(f"mova: {failed} of {len(items)} failed; their lines have an error", file=sys.stderr)
    return int(failed > 0)


def _results(
    batch: Sequence[dict[str, Any]], run: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
) -> Iterator[dict[str, Any]]:
    """The results of a batch; if it fails, of each item by itself, so that a bad one takes no other with it."""
    good = [item for item in batch if "error" not in item]
    try:
        results = iter(run(good) if good else [])
    except (ValueError, TypeError, OSError) as error:
        if len(good) > 1:
            for item in batch:
                yield from _results([item], run)
            return
        results = iter([{"error": str(error)}])
    for item in batch:
        yield {"error": item["error"]} if "error" in item else next(results)
