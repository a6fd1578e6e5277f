"""The demo: a small model learns five drawn pictures by heart, and answers all of them in one batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import trange

from ..experts import BASE, OFFICIAL
from ..pipeline import MoVAPipeline
from ..processing_mova import IMAGE_TOKEN, MoVAProcessor
from ..routing import prompts
from ..visualize import routing_figure
from .pictures import Picture, pictures
from .small_model import small_model

ANSWERS = {
    "chart": "In 2022.",
    "page": "To cover the soil.",
    "shapes": "Two circles.",
    "scene": "Three trees.",
    "plain": "Dark blue.",
}


def run(output: Path) -> None:
    """Answer the questions about the five drawn pictures in one batch, print the answers, and draw ``output``."""
    started = time.perf_counter()
    shown = pictures()
    images, questions = [p.image for p in shown], [p.question for p in shown]
    texts = [prompts(p.question, OFFICIAL).router.text for p in shown]
    pipeline = small_model([*texts, *questions, *ANSWERS.values()])
    pool = [expert.name for expert in pipeline.processor.pool]
    print(f"A small model with random weights: {BASE.name}, {len(pool)} experts, adapter, language model.")
    print("Its language model learns the routes and the answers of five drawn pictures by heart ...", flush=True)
    loss = learn(pipeline, shown, [ANSWERS[p.name] for p in shown])
    print(f"... loss {loss:.3f} after {time.perf_counter() - started:.0f} s. All five in one batch:\n")

    answers = pipeline.answer(images, questions, max_new_tokens=24)
    for picture, answer in zip(shown, answers, strict=True):
        used = ", ".join(answer.route.experts) or "no expert"
        print(f"{picture.name:7} {picture.question}\n        router: {answer.route.answer} -> {used}: {answer.text}")
    gates, tokens = torch.stack([a.gates for a in answers]), torch.stack([a.tokens for a in answers])
    chosen, said = [a.route.experts for a in answers], [a.text for a in answers]
    routing_figure(images, questions, chosen, gates, pool, tokens, said).savefig(output)
    print(f"\n{output} shows what each block of the adapter made of them ({time.perf_counter() - started:.0f} s).")


def learn(pipeline: MoVAPipeline, shown: Sequence[Picture], answers: Sequence[str], steps: int = 150) -> float:
    """Train the language model alone to route and answer these pictures by heart; returns the last loss."""
    model, processor = pipeline.model, pipeline.processor
    asked = [prompts(p.question, processor.pool) for p in shown]
    images, questions = [p.image for p in shown], [p.question for p in shown]
    base = model.base_features(processor(images, [IMAGE_TOKEN] * len(shown))["pixel_values"]).detach()
    seen = (model.routing_tokens(base).detach(), pipeline.fuse(images, questions, [p.experts for p in shown]).tokens)
    told = ([p.router.answer(x.experts) for p, x in zip(asked, shown, strict=True)], answers)
    said = ([p.router.text for p in asked], [p.answer for p in asked])
    batches = [
        (_labelled(processor, texts, targets, tokens.shape[1]), tokens)
        for texts, targets, tokens in zip(said, told, seen, strict=True)
    ]
    optimizer = torch.optim.AdamW(model.language_model.parameters(), lr=3e-3)
    loss = torch.zeros(())
    for _ in trange(steps, unit="step", leave=False, disable=None):
        optimizer.zero_grad()
        loss = torch.stack([model(**inputs, image_features=tokens).loss for inputs, tokens in batches]).sum()
        loss.backward()
        optimizer.step()
        if loss < 0.05:
            break
    return loss.item()


def _labelled(
    processor: MoVAProcessor, texts: Sequence[str], answers: Sequence[str], image_tokens: int
) -> dict[str, torch.Tensor]:
    """Tokenize conversations with their answers; the labels cover the answers alone."""
    end = processor.tokenizer.eos_token
    whole = [f"{processor.conversation(text)} {answer}{end}" for text, answer in zip(texts, answers, strict=True)]
    inputs = processor.tokenize(whole, image_tokens)
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, answer in enumerate(answers):
        length = len(processor.tokenizer(f" {answer}{end}", add_special_tokens=False)["input_ids"])
        labels[row, -length:] = inputs["input_ids"][row, -length:]
    return {**inputs, "labels": labels}
