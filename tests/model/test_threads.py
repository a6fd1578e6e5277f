"""Several threads around one pipeline, one model, one pool: each gets what it would get alone."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tiny
import torch

from mova import FeatureCache, MoVAPipeline, VisionEncoder, experts
from mova._lock import Lock
from mova.demo import small_model
from mova.demo.pictures import pictures
from mova.inspection import attention_maps, recorded

NAMES = [expert.name for expert in experts.OFFICIAL]
PICTURES = pictures()


@pytest.fixture
def pipeline() -> MoVAPipeline:
    return small_model()


@pytest.fixture
def often() -> Iterator[None]:
    """Threads take turns far more often than they do by default."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def together(*calls: Callable[[], Any]) -> list[Any]:
    """The results of all calls, each in a thread of its own."""
    with ThreadPoolExecutor(len(calls)) as threads:
        return [future.result() for future in [threads.submit(call) for call in calls]]


def ask(pipeline: MoVAPipeline, k: int) -> tuple[torch.Tensor, str]:
    """The gates and the text of the k-th of fourteen requests."""
    picture = PICTURES[k % 5]
    chosen = [NAMES[k % 7], NAMES[(k + 2) % 7]]
    (answer,) = pipeline.answer([picture.image], [picture.question], experts=chosen, max_new_tokens=2)
    return answer.gates, answer.text


@pytest.fixture
def with_lora(pipeline) -> MoVAPipeline:
    """A routing LoRA that changes what the language model says."""
    from peft import LoraConfig

    torch.manual_seed(0)
    sizes = {"r": 8, "lora_alpha": 64, "target_modules": ["q_proj", "v_proj", "up_proj"]}
    pipeline.model.add_routing_lora(LoraConfig(init_lora_weights=False, **sizes))
    return pipeline


@pytest.fixture
def routing(with_lora) -> Iterator[None]:
    """Another thread routes all the time."""
    ended = threading.Event()
    other = MoVAPipeline(with_lora.model, with_lora.processor)

    def route() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the random router names nothing
            while not ended.is_set():
                other.route([PICTURES[1].image], [PICTURES[1].question])

    thread = threading.Thread(target=route)
    thread.start()
    yield
    ended.set()
    thread.join()


def test_84_requests_of_6_threads_have_the_gates_and_texts_of_one_thread(pipeline, often):
    alone = [ask(pipeline, k) for k in range(14)]
    pipeline.clear()
    requests = list(range(14)) * 6
    with ThreadPoolExecutor(6) as threads:
        for k, (gates, text) in zip(requests, threads.map(lambda k: ask(pipeline, k), requests), strict=True):
            torch.testing.assert_close(gates, alone[k][0])
            assert text == alone[k][1]


def test_two_pipelines_of_one_model_in_two_threads(pipeline, often):
    alone = [ask(pipeline, k) for k in range(6)]
    other = MoVAPipeline(pipeline.model, pipeline.processor, cache_bytes=0)
    found = together(lambda: [ask(pipeline, k) for k in range(6)], lambda: [ask(other, k) for k in range(6)])
    for results in found:
        for (gates, text), (expected, said) in zip(results, alone, strict=True):
            torch.testing.assert_close(gates, expected)
            assert text == said


def test_an_answer_is_without_the_routing_lora_while_another_thread_routes(with_lora, often, request):
    alone = [ask(with_lora, k) for k in range(5)]
    request.getfixturevalue("routing")
    for k in range(5):
        assert ask(with_lora, k)[1] == alone[k][1]


def test_a_forward_is_without_the_routing_lora_while_another_thread_routes(with_lora, often, request):
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        alone = with_lora.model(ids).logits
        with with_lora.model.routing_pass():
            assert (with_lora.model(ids).logits - alone).abs().max() > 1e-3
        request.getfixturevalue("routing")
        for _ in range(20):
            torch.testing.assert_close(with_lora.model(ids).logits, alone)


def test_an_expert_that_two_threads_ask_first_is_loaded_once(saved_model, monkeypatch):
    pool = MoVAPipeline.from_pretrained(str(saved_model)).model.experts
    load, loads = VisionEncoder.load, []

    def slowly(*args: Any, **kwargs: Any) -> VisionEncoder:
        time.sleep(0.05)
        loads.append(args)
        return load(*args, **kwargs)

    monkeypatch.setattr(VisionEncoder, "load", slowly)
    first, second = together(lambda: pool["sam"], lambda: pool["sam"])
    assert first is second and len(loads) == 1


def test_texts_of_several_threads_are_padded_each_in_its_own_way(pipeline, often):
    processor = pipeline.processor
    texts = [["a", "b" * (k + 2)] for k in range(6)]
    calls = [lambda k=k: [processor(text=texts[k], max_length=k + 1) for _ in range(30)] for k in range(6)]
    alone = [processor(text=texts[k], max_length=k + 1)["input_ids"] for k in range(6)]
    for found, expected in zip(together(*calls), alone, strict=True):
        assert all(torch.equal(inputs["input_ids"], expected) for inputs in found)


@pytest.fixture
def disturbed() -> Any:
    """An adapter whose every forward has one of another thread, of other samples, in its midst."""
    adapter, mine = tiny.adapter(), threading.get_ident()
    base, features, text = tiny.inputs()

    def disturb(*_: Any) -> None:
        if threading.get_ident() == mine:
            other = [feature.flip(0) for feature in features]
            arguments = base.flip(0), other, torch.ones_like(tiny.ROUTING), text.flip(0)
            together(lambda: adapter(*arguments, grids=tiny.GRIDS))

    for block in adapter.blocks:
        block.gate.register_forward_pre_hook(disturb)
    return adapter


def test_recorded_has_the_gates_of_its_own_thread(disturbed):
    adapter = tiny.adapter()
    base, features, text = tiny.inputs()
    gates = []
    for each in (adapter, disturbed):
        with torch.no_grad(), recorded(each) as record:
            each(base, features, tiny.ROUTING, text, grids=tiny.GRIDS)
        gates.append(record.gates)
    assert torch.equal(*gates)


def test_what_another_thread_runs_is_not_recorded():
    adapter = tiny.adapter()
    base, features, text = tiny.inputs()
    with recorded(adapter) as record:
        together(lambda: adapter(base, features, tiny.ROUTING, text, grids=tiny.GRIDS))
    with pytest.raises(RuntimeError, match="nothing is recorded"):
        record.gates  # noqa: B018


def test_attention_maps_are_of_their_own_thread(disturbed):
    base, features, text = tiny.inputs()
    arguments = base, features, tiny.ROUTING, text, (2, 3)
    expected = attention_maps(tiny.adapter(), *arguments, grids=tiny.GRIDS)
    found = attention_maps(disturbed, *arguments, grids=tiny.GRIDS)
    for row, wanted in zip(found, expected, strict=True):
        assert row.keys() == wanted.keys() and all(torch.equal(row[e], wanted[e]) for e in row)


class Slow:
    """A key whose look-up lets other threads run."""

    def __hash__(self) -> int:
        time.sleep(1e-3)
        return 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slow)


def test_a_cache_counts_a_tensor_once_that_several_threads_put():
    cache = FeatureCache(1000)
    together(*[lambda: cache.put(Slow(), torch.zeros(4)) for _ in range(8)])
    assert (cache.bytes, len(cache)) == (16, 1)


def test_a_copy_of_a_model_has_a_lock_of_its_own(pipeline):
    with pipeline.model.lock:  # which the copy's thread would wait for
        twin = copy.deepcopy(pipeline)
        assert twin.lock is not pipeline.lock and twin.model.experts.lock is not pipeline.model.experts.lock
        (found,) = together(lambda: ask(twin, 3))
    assert found[1] == ask(pipeline, 3)[1]


def test_a_lock_is_pickled_as_a_free_one():
    lock = Lock()
    with lock:
        again = pickle.loads(pickle.dumps(lock))

    def take() -> bool:
        with again:
            return True

    assert together(take) == [True]
