"""Two processes whose samples select different experts have the gradients of one process."""

from __future__ import annotations

import copy
import datetime
import os
import traceback
import warnings
from functools import partial

import pytest
import tiny
import torch
import torch.multiprocessing as mp
from torch import distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

CONFIG = tiny.square_config(3, num_layers=2, topk=1, resolution=4)
GRIDS = ((4, 4), (2, 2), (3, 3))
# Per rank its samples' experts. What goes wrong otherwise: a sum over ranks of which one has no addend, or a
# collective that only one of them enters.
ROUTINGS = {
    "different experts": ([[1, 0, 0], [1, 0, 0]], [[0, 1, 0], [0, 1, 0]]),
    "nothing on one rank": ([[1, 0, 1], [0, 1, 0]], [[0, 0, 0], [0, 0, 0]]),
    "nothing and no text on one rank": ([[0, 0, 0], [0, 0, 0]], [[1, 1, 1], [0, 0, 1]]),
}


def loss(module, rank, routing):
    base, experts, text = tiny.inputs(CONFIG, 4, GRIDS)
    part = slice(2 * rank, 2 * rank + 2)
    selected = torch.tensor(ROUTINGS[routing][rank]).bool()
    text = None if "no text" in routing and not selected.any() else text[part]
    return module(base[part], [f[part] for f in experts], selected, text, grids=GRIDS).square().mean()


def ddp(adapter, **options):
    return DDP(adapter, **options)


def fsdp2(adapter, parts):
    for part in parts(adapter):
        fully_shard(part)
    return fully_shard(adapter)


def fsdp1(adapter, parts, use_orig_params):
    wrap = partial(FSDP1, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    inner = set(parts(adapter))
    for parent in list(adapter.modules()):
        for name, child in list(parent.named_children()):
            if child in inner:
                setattr(parent, name, wrap(child))
    return wrap(adapter)


def root(adapter):
    return []


def blocks(adapter):
    return list(adapter.blocks)


def experts(adapter):
    lists = [m for block in adapter.blocks for m in (block.cross_attn, block.norm1, block.norm2)]
    return [module for modules in lists for module in modules]


def checkpointed(wrap, adapter):
    for block in adapter.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return wrap(adapter)


WRAPPERS = {
    "ddp": partial(ddp, find_unused_parameters=False),
    "ddp, unused parameters": partial(ddp, find_unused_parameters=True),
    "ddp, checkpointed": partial(checkpointed, ddp),
    "fsdp2 of the root": partial(fsdp2, parts=root),
    "fsdp2 of blocks": partial(fsdp2, parts=blocks),
    "fsdp2 of experts": partial(fsdp2, parts=experts),
    "fsdp2 of experts, checkpointed": partial(checkpointed, partial(fsdp2, parts=experts)),
    **{
        f"fsdp1 of {parts.__name__}, use_orig_params={orig}": partial(fsdp1, parts=parts, use_orig_params=orig)
        for parts in (root, blocks, experts)
        for orig in (True, False)
    },
}


def gradients(wrapped, adapter):
    """By name, whole; zeros for None."""
    if isinstance(wrapped, FSDP1):
        return change_by_a_step(wrapped)
    found = {}
    for name, p in adapter.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        found[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return found


def change_by_a_step(wrapped, rate=1024.0):
    """The gradients as an optimiser's step shows them: FSDP1 gives whole parameters, but not always whole gradients."""

    def whole():
        with FSDP1.summon_full_params(wrapped):
            return {n.replace("_fsdp_wrapped_module.", ""): p.clone() for n, p in wrapped.named_parameters()}

    kept = [p.detach().clone() for p in wrapped.parameters()]
    before = whole()
    torch.optim.SGD(wrapped.parameters(), rate).step()
    after = whole()
    with torch.no_grad():
        for p, old in zip(wrapped.parameters(), kept, strict=True):
            p.copy_(old)
    return {name: (before[name] - after[name]) / rate for name in before}


def truth(steps):
    """The mean over both ranks, in one process."""
    adapter = tiny.adapter(CONFIG)
    for routing in steps:
        for rank in (0, 1):
            (loss(adapter, rank, routing) / 2).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in adapter.named_parameters()}


def compare(wrapped, adapter, steps):
    found, expected = gradients(wrapped, adapter), truth(steps)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * max(gradient.abs().max(), 1e-2), name


def trains(wrap, rank):
    """Several steps, since DDP complains at the next one."""
    adapter = tiny.adapter(CONFIG)
    wrapped = wrap(adapter)
    for routing in ROUTINGS:
        wrapped.zero_grad()
        loss(wrapped, rank, routing).backward()
        compare(wrapped, adapter, [routing])


def accumulates(wrap, rank):
    adapter = tiny.adapter(CONFIG)
    wrapped = wrap(adapter)
    first, *_, last = ROUTINGS
    if isinstance(wrapped, DDP):
        with wrapped.no_sync():
            loss(wrapped, rank, first).backward()
    else:
        wrapped.set_requires_gradient_sync(False)
        loss(wrapped, rank, first).backward()
        wrapped.set_requires_gradient_sync(True)
    loss(wrapped, rank, last).backward()
    compare(wrapped, adapter, [first, last])


def infers(wrap, rank):
    adapter = tiny.adapter(CONFIG)
    wrapped = wrap(copy.deepcopy(adapter))
    with torch.no_grad():
        for routing in ROUTINGS:
            torch.testing.assert_close(loss(wrapped, rank, routing), loss(adapter, rank, routing))


def refuses(rank):
    adapter = fsdp2(tiny.adapter(CONFIG), root)
    adapter.idle_expert_gradients = False
    with pytest.raises(ValueError, match="idle_expert_gradients must be None or True where"):
        loss(adapter, rank, "different experts")


CASES = {
    **{f"train, {name}": partial(trains, wrap) for name, wrap in WRAPPERS.items()},
    **{
        f"accumulate, {name}": partial(accumulates, WRAPPERS[name])
        for name in ("ddp", "fsdp2 of the root", "fsdp2 of experts")
    },
    **{
        f"infer, {name}": partial(infers, WRAPPERS[name])
        for name in ("fsdp2 of blocks", "fsdp2 of experts", "fsdp1 of experts, use_orig_params=True")
    },
    "idle_expert_gradients=False": refuses,
}


def work(rank, folder):
    """Run all cases; each ends with one line in a file, so that a process that hangs can be seen."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=20))
    for i, case in enumerate(CASES.values()):
        try:
            case(rank)
            message = "passed"
        except BaseException:
            message = traceback.format_exc()
        with open(f"{folder}/{rank}.{i}", "w") as file:
            file.write(message)
        if message != "passed":
            break  # the other process may wait in a collective for ever: nothing behind would mean anything
    os._exit(0)


@pytest.fixture(scope="module")
def messages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    context = mp.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, str(folder)), daemon=True) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(90)
        process.kill()

    def message(rank, i):
        file = folder / f"{rank}.{i}"
        return file.read_text() if file.exists() else "did not end"

    return {name: [message(rank, i) for rank in (0, 1)] for i, name in enumerate(CASES)}


@pytest.mark.parametrize("name", CASES)
def test_two_processes(messages, name):
    for rank, message in enumerate(messages[name]):
        assert message == "passed", f"rank {rank}: {message}"


def test_zero_gradients_are_not_the_default_of_one_process():
    adapter = tiny.adapter(CONFIG)
    assert adapter.idle_expert_gradients is None
    loss(adapter, 0, "different experts").backward()
    assert adapter.blocks[0].cross_attn[1].proj.weight.grad is None


@pytest.mark.parametrize("called", [False, True], ids=["ops", "modules"])
def test_zero_gradients_of_one_process_that_asks(called):
    adapter = tiny.adapter(CONFIG)
    adapter.idle_expert_gradients = True
    if called:
        adapter.blocks[0].norm1[2].register_forward_hook(lambda *_: None)
    selected = torch.zeros(2, 3)
    for routing in (selected, torch.ones(2, 3), torch.eye(3)[:2]):
        adapter.zero_grad()
        base, features, text = tiny.inputs(CONFIG, 2, GRIDS)
        adapter(base, features, routing, text if routing.any() else None, grids=GRIDS).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())


def test_idle_expert_gradients_is_none_or_a_bool():
    adapter = tiny.adapter(CONFIG)
    adapter.idle_expert_gradients = "auto"
    with pytest.raises(ValueError, match="idle_expert_gradients must be None, True or False, got 'auto'"):
        loss(adapter, 0, "different experts")
