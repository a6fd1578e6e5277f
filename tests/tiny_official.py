"""An official checkpoint at a tiny size: names, shapes, fields and files.

Written down here and in tiny_experts, not taken from the code under test.
"""

from __future__ import annotations

import json

import tiny_experts
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertTokenizer, PreTrainedTokenizerFast

NAMES = ("clip", "dinov2", "vary", "codetr", "pix2struct", "deplot", "biomedclip", "sam")  # the official order
EXPERTS = NAMES[1:]
TOWERS = tuple(tiny_experts.tiny(name)[0] for name in NAMES)
SIZES = {name: tiny_experts.tiny(name)[1] for name in NAMES}
CHANNELS = [tower.channels for tower in TOWERS[1:]]
WIDTH, TEXT, WORDS, LLM, HEAD_CHANNELS = 16, 24, 60, 32, 8
ADAPTER, BERT = "model.mm_projector.", "model.mm_projector.text_encoder.bert."
TOWER = "model.vision_tower.vision_tower_"


def both(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def adapter_shapes(side, layers):
    c, hidden = WIDTH, int(WIDTH * 8 / 3)
    shapes = {"pos_embed": (1, side * side, c)}
    for i in range(layers):
        block = f"blocks.{i}"
        attentions = {f"{block}.cross_attn.{j}": width for j, width in enumerate(CHANNELS)}
        for name, width in {**attentions, f"{block}.self_attn": c}.items():
            shapes |= {f"{name}.q_proj.weight": (c, c)}
            shapes |= {f"{name}.k_proj.weight": (c, width), f"{name}.v_proj.weight": (c, width)}
            shapes |= both(f"{name}.inner_attn_ln", c) | both(f"{name}.proj", c, c)
        for j, width in enumerate(CHANNELS):
            shapes |= both(f"{block}.norm1.{j}", c) | both(f"{block}.norm2.{j}", width)
        shapes |= both(f"{block}.mlp.w1", hidden, c) | both(f"{block}.mlp.w2", hidden, c)
        shapes |= both(f"{block}.mlp.ffn_ln", hidden) | both(f"{block}.mlp.w3", c, hidden)
        shapes |= both(f"{block}.norm3", c) | both(f"{block}.norm4", c)
        shapes |= both(f"{block}.gate.0", c, TEXT + c) | both(f"{block}.gate.2", len(CHANNELS), c)
    shapes |= both("mlp.0", LLM, c) | both("mlp.2", LLM, LLM)
    for i in (0, 2):
        stage = f"downsample.{i}.b1"
        shapes |= {f"{stage}.conv1.conv.weight": (c, c, 1, 1), f"{stage}.conv2.conv.weight": (c, 1, 3, 3)}
        shapes |= {f"{stage}.conv3.conv.weight": (c, c, 1, 1)}
        shapes |= both(f"{stage}.conv1.bn", c) | both(f"{stage}.conv2.bn", c) | both(f"{stage}.conv3.bn", c)
        shapes |= both(f"{stage}.se.fc1", c // 4, c, 1, 1) | both(f"{stage}.se.fc2", c, c // 4, 1, 1)
    return shapes


def adapter_tables(side, layers=2):
    """The rotary tables, as the official code computes them, once for each attention."""
    frequencies = 1.0 / (10000 ** (torch.arange(0, HEAD_CHANNELS // 2, 2).float() / (HEAD_CHANNELS // 2)))
    angles = torch.einsum("i,j->ij", torch.arange(side) / side * side, frequencies).repeat_interleave(2, -1)
    rows, columns = angles[:, None].expand(-1, side, -1), angles[None].expand(side, -1, -1)
    whole = torch.cat([rows, columns], -1).view(side * side, HEAD_CHANNELS)
    owners = [f"cross_attn.{j}" for j in range(len(CHANNELS))] + ["self_attn"]
    return {
        f"blocks.{i}.{owner}.rope.freqs_{name}": table.clone()
        for i in range(layers)
        for owner in owners
        for name, table in (("cos", whole.cos()), ("sin", whole.sin()))
    }


def bert_shapes(layers=2):
    c, hidden, e = TEXT, 40, "embeddings"
    shapes = {f"{e}.word_embeddings.weight": (WORDS, c), f"{e}.position_embeddings.weight": (512, c)}
    shapes |= {f"{e}.token_type_embeddings.weight": (2, c)} | both(f"{e}.LayerNorm", c)
    for i in range(layers):
        layer = f"encoder.layer.{i}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= both(f"{layer}.attention.{name}", c, c)
        shapes |= both(f"{layer}.attention.output.LayerNorm", c) | both(f"{layer}.output.LayerNorm", c)
        shapes |= both(f"{layer}.intermediate.dense", hidden, c) | both(f"{layer}.output.dense", c, hidden)
    return shapes


def llama_shapes(rows, layers=2):
    c, hidden, keys = LLM, 48, LLM // 2
    shapes = {"model.embed_tokens.weight": (rows, c), "lm_head.weight": (rows, c), "model.norm.weight": (c,)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        for name, out in (("q", c), ("k", keys), ("v", keys), ("o", c)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (out, c)
        shapes |= {f"{layer}.mlp.gate_proj.weight": (hidden, c), f"{layer}.mlp.up_proj.weight": (hidden, c)}
        shapes |= {f"{layer}.mlp.down_proj.weight": (c, hidden)}
        shapes |= {f"{layer}.input_layernorm.weight": (c,), f"{layer}.post_attention_layernorm.weight": (c,)}
    return shapes


def official_state(rows, side=5, layers=2, llama=2, bert=2, dtype=torch.bfloat16):
    random = torch.Generator().manual_seed(0)
    shapes = llama_shapes(rows, llama)
    shapes |= {ADAPTER + key: shape for key, shape in adapter_shapes(side, layers).items()}
    shapes |= {BERT + key: shape for key, shape in bert_shapes(bert).items()}
    state = {key: 0.2 * torch.randn(shape, generator=random) for key, shape in shapes.items()}
    state |= {ADAPTER + key: table for key, table in adapter_tables(side, layers).items()}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for i, name in enumerate(NAMES):
            state |= {f"{TOWER}{i}.{key}": value for key, value in tiny_experts.official_state(name).items()}
        positions = f"{TOWER}0.vision_model.embeddings.position_embedding.weight"
        state[positions] = torch.randn(1 + side * side, WIDTH)
    return {key: value.to(dtype) for key, value in state.items()}


def official_config(rows, side=5, **changes):
    """The fields that the official code writes, and those of Llama."""
    return {
        "architectures": ["MovaLlamaForCausalLM"], "model_type": "mova_llama", "torch_dtype": "bfloat16",
        "transformers_version": "4.37.2", "vocab_size": rows, "hidden_size": LLM, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "rope_scaling": None,
        "attention_bias": False, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
        "expert_channels": CHANNELS, "image_feat_size": side, "num_projector_layers": 2, "num_routing_tokens": 1,
        "topk": 2, "mm_hidden_size": WIDTH, "mm_projector_type": "mov_adapter", "mm_vision_select_layer": -2,
        "mm_projector_freeze_text_encoder": False, "mm_projector_text_encoder": "bert-large-uncased",
        "mm_patch_merge_type": "flat", "mm_vision_select_feature": "patch", "mm_use_im_patch_token": False,
        "mm_vision_tower": [f"/checkpoints/{name}" for name in NAMES], "image_aspect_ratio": "pad",
        "ft_vision_tower": True, "use_mm_proj": True, "use_cache": True, "tokenizer_padding_side": "right", **changes,
    }  # fmt: skip


def llama_tokenizer(directory, adds_bos=False):
    """Byte-level BPE with the special tokens of Llama 3; returns how many tokens it has."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(["What is in the picture? " * 3], trainer)
    if adds_bos:
        one = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)])
        tokenizer.post_processor = one
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1])
    fast.save_pretrained(directory)
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}))
    return len(fast)


def question_tokenizer(directory):
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters), ":", "?", "."]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(directory)
    assert len(words) == WORDS


def write(directory, state, config, shards=1):
    """Weights as safetensors, with an index if in shards, and the config."""
    directory.mkdir(exist_ok=True)
    keys = sorted(state)
    names = {key: f"model-{1 + i % shards:05}-of-{shards:05}.safetensors" for i, key in enumerate(keys)}
    for name in set(names.values()):
        save_file({key: state[key] for key in keys if names[key] == name}, directory / name, {"format": "pt"})
    if shards > 1:
        index = {"metadata": {}, "weight_map": names}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config, indent=1))
