"""Two processes with batches of different kinds: the gradients are those of one process with both."""

from __future__ import annotations

import copy
import datetime
import os
import sys
import traceback
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import distributed
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from mova import MoVAConfig, MoVAForConditionalGeneration, MoVAProcessor
from mova.demo import small_config, small_model
from mova.encoders import VisionEncoder
from mova.ranks import runs_every_part
from mova_kernels import MoVAdapter

LIMIT = 60  # seconds that a collective, and half of what a process may take
EXPERTS = ("biomedclip", "dinov2")
TEXT, NOTHING, FIRST, SECOND = None, (), (0,), (1,)  # of a batch with one image: the experts; or no image at all
BATCHES = {
    "an expert and text alone": (FIRST, TEXT),
    "an expert and none": (FIRST, NOTHING),
    "different experts": (FIRST, SECOND),
    "none and text alone": (NOTHING, TEXT),
}


def tiny(free_text: bool) -> MoVAForConditionalGeneration:
    """The small model with two experts; the same weights in every process."""
    small = small_config()
    experts = [expert for expert in small.experts if expert["name"] in EXPERTS]
    sizes = {name: small.encoder_sizes[name] for name in (*EXPERTS, "clip")}
    torch.manual_seed(0)
    model = MoVAForConditionalGeneration(
        MoVAConfig(
            small.text_config,
            small.text_encoder_config,
            small.base,
            experts,
            sizes,
            adapter_heads=4,
            adapter_layers=1,
            num_routing_tokens=16,
            image_token_id=3,
            freeze_text_encoder=not free_text,
        )
    )
    with torch.no_grad():
        for parameter in model.adapter.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3)
    return model.eval()  # without dropout


def inputs(model, experts, seed):
    """A batch of one row, by hand: what comes out of the processor, without the time that it takes."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(4, 500, (1, 6), generator=generator)
    if experts is TEXT:
        return {"input_ids": words, "labels": words}
    image = torch.full((1, model.config.num_image_tokens), model.config.image_token_id)
    ids = torch.cat([image, words], 1)
    pool = model.config.pool
    batch = {
        "input_ids": ids,
        "labels": torch.where(ids == model.config.image_token_id, -100, ids),
        "pixel_values": torch.randn(model.base.blank().shape, generator=generator),
        "routing": torch.tensor([[e in experts for e in range(len(pool))]]),
        "expert_pixel_values": {
            pool[e].name: torch.randn(model.experts[pool[e].name].blank().shape, generator=generator) for e in experts
        },
    }
    if experts:
        batch |= {"question_ids": torch.tensor([[2, 7, 9]]), "question_mask": torch.ones(1, 3, dtype=torch.long)}
    return batch


def shard(model, classes):
    for module in reversed(list(model.modules())):
        if isinstance(module, classes) and module is not model:
            fully_shard(module)
    fully_shard(model)
    return model


def fsdp1(model, classes=()):
    policy = ModuleWrapPolicy(classes) if classes else None
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))


WRAPPERS = {
    "DDP": partial(DistributedDataParallel, find_unused_parameters=False),
    "DDP, unused parameters found": partial(DistributedDataParallel, find_unused_parameters=True),
    "FSDP1": fsdp1,
    "FSDP1, layers": lambda m: fsdp1(m, {LlamaDecoderLayer, BertLayer, type(m.adapter.blocks[0])}),
    "FSDP2": lambda m: shard(m, ()),
    "FSDP2, layers": lambda m: shard(m, (LlamaDecoderLayer, BertLayer, CLIPEncoderLayer, type(m.adapter.blocks[0]))),
    "FSDP2, parts": lambda m: shard(m, (LlamaDecoderLayer, MoVAdapter, VisionEncoder)),
}
FROZEN_TEXT = [(name, WRAPPERS[name]) for name in ("DDP", "FSDP2, layers")]  # wrappers for which it makes a difference


def gradients(model) -> dict[str, torch.Tensor]:
    """Whole gradients by their names in the model; those of zeros are as good as none."""

    def whole(parameter):
        grad = parameter.grad
        return grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone()

    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            found = {name: whole(p) for name, p in model.named_parameters() if p.grad is not None}
    else:
        found = {name: whole(p) for name, p in model.named_parameters() if p.grad is not None}
    plain = {name.replace("_fsdp_wrapped_module.", "").removeprefix("module."): grad for name, grad in found.items()}
    return {name: grad for name, grad in plain.items() if grad.any()}


def difference(found, expected) -> str | None:
    """What is wrong with these gradients; None: nothing.

    They may differ by 1e-5 of the largest of their parameter, and by the rounding of a true zero (biases of keys).
    """
    if found.keys() != expected.keys():
        return (
            f"missing {sorted(expected.keys() - found.keys())[:3]}, more {sorted(found.keys() - expected.keys())[:3]}"
        )
    far = {
        name: ((found[name] - grad).abs().max() / (grad.abs().max() + 1e-3)).item() for name, grad in expected.items()
    }
    worst = max(far, key=lambda name: far[name])
    return f"{worst} differs by {far[worst]:.1e}" if far[worst] > 1e-5 else None


def work(rank: int, folder: str) -> None:
    """A process: writes for every case what is wrong, into ``folder``."""
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", 2)
    for free_text in (True, False):
        plain = tiny(free_text)
        expected = {}
        for name, kinds in BATCHES.items():
            plain.zero_grad()
            sum(plain(**inputs(plain, kind, i)).loss / 2 for i, kind in enumerate(kinds)).backward()
            expected[name] = gradients(plain)
        plain.zero_grad()
        if not distributed.is_initialized():
            limit = datetime.timedelta(seconds=LIMIT)
            distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
        for wrapper, wrap in WRAPPERS.items() if free_text else FROZEN_TEXT:
            model = wrap(copy.deepcopy(plain))
            for name, kinds in BATCHES.items():
                model.zero_grad()
                try:
                    model(**inputs(plain, kinds[rank], rank)).loss.backward()
                    wrong = difference(gradients(model), expected[name])
                except Exception:
                    wrong = traceback.format_exc()
                if wrong:
                    Path(folder, f"{free_text}-{wrapper}-{name}-{rank}".replace(" ", "_")).write_text(wrong)
                    os._exit(1)  # the other process would wait
    Path(folder, f"done-{rank}").touch()
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="PyTorch was built without gloo")
def test_the_gradients_are_those_of_one_process(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, str(tmp_path)), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(2 * LIMIT)
    for process in processes:
        process.kill()
    found = {path.name: path.read_text() for path in tmp_path.iterdir() if path.name[:4] in ("True", "Fals")}
    assert not found, "\n".join(f"{name}: {text}" for name, text in found.items())
    assert {path.name for path in tmp_path.glob("done-*")} == {"done-0", "done-1"}, "a process has hung or died"


@pytest.mark.parametrize("free_text", [False, True], ids=["frozen text encoder", "trained text encoder"])
def test_under_zero2_gradients_come_in_an_order_that_does_not_depend_on_the_batch(free_text, monkeypatch):
    """DeepSpeed's ZeRO-2 adds up the gradients of all processes as they come; this stands in for its marks."""
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    monkeypatch.setattr("mova.image_features.runs_every_part", lambda _: True)
    model = tiny(free_text)
    order: list[str] = []
    for number, (name, parameter) in enumerate(model.named_parameters()):
        parameter.param_idx_in_group = number
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    orders = []
    for kind in (FIRST, SECOND, NOTHING, TEXT):
        order.clear()
        model(**inputs(model, kind, 0), use_cache=False).loss.backward()
        orders.append(list(order))
    assert set(orders[0]) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert orders[1] == orders[0] and orders[2] == orders[0] and orders[3] == orders[0]


def test_one_process_runs_nothing_for_others(monkeypatch):
    pipeline = small_model()
    monkeypatch.setattr(VisionEncoder, "forward", lambda *_: pytest.fail("text alone has run an encoder"))
    assert not runs_every_part(pipeline.model)
    processor: MoVAProcessor = pipeline.processor
    pipeline.model(**processor(text=[processor.conversation("hello", images=0)]))


@pytest.mark.parametrize("layer", [-1, -2, 1, 2])
def test_what_the_base_encoder_never_uses_is_not_trainable(layer):
    config = small_config()
    config.base["layer"] = layer
    model = MoVAForConditionalGeneration(config).train()
    model.base_features(model.base.blank()).sum().backward()
    assert {n for n, p in model.base.named_parameters() if p.requires_grad} == {
        n for n, p in model.base.named_parameters() if p.grad is not None
    }
