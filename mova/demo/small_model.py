"""Every part of the model at a small size with random weights; needs no files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertConfig, BertTokenizer, LlamaConfig, PreTrainedTokenizerFast

from ..configuration_mova import MoVAConfig
from ..experts import BASE, OFFICIAL, VisionExpert
from ..modeling_mova import MoVAForConditionalGeneration
from ..pipeline import MoVAPipeline
from ..processing_mova import IMAGE_TOKEN, MoVAProcessor

_SPECIAL = ["<pad>", "<s>", "</s>", IMAGE_TOKEN]  # the first tokens of the tokenizer
_VIT = {"num_hidden_layers": 2, "num_attention_heads": 2}
# Encoder -> the fields of its VisionExpert that differ from the released one, and its sizes as fields of its config.
_SMALL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clip": (
        {"image_size": 112, "input_size": 112, "grid": (16, 16), "native_grid": (16, 16), "channels": 64},
        {"image_size": 112, "patch_size": 7, "hidden_size": 64, "intermediate_size": 128, **_VIT},
    ),
    "dinov2": (
        {"image_size": 112, "input_size": 70, "grid": (10, 10), "native_grid": (10, 10), "channels": 48},
        {"image_size": 70, "patch_size": 7, "hidden_size": 48, **_VIT},
    ),
    "vary": (
        {"image_size": 128, "input_size": 128, "grid": (8, 8), "native_grid": (8, 8), "channels": 32},
        {
            "image_size": 128,
            "patch_size": 8,
            "hidden_size": 32,
            "window_size": 7,
            "global_attn_indexes": [1],
            "output_channels": 16,
            **_VIT,
        },
    ),
    "codetr": (
        {"image_size": 128, "input_size": 160, "grid": (7, 7), "native_grid": (10, 10), "channels": 24},
        {
            "image_size": 160,
            "patch_size": 16,
            "hidden_size": 32,
            "window_size": 5,
            "global_attn_indexes": [1],
            "output_channels": 24,
            **_VIT,
        },
    ),
    "pix2struct": (
        {"image_size": 96, "input_size": 96, "grid": (12, 12), "native_grid": (12, 12), "channels": 48},
        {"patch_size": 8, "hidden_size": 48, "patch_embed_hidden_size": 192, "d_ff": 64, "d_kv": 24, **_VIT},
    ),
    "deplot": (
        {"image_size": 96, "input_size": 96, "grid": (12, 12), "native_grid": (12, 12), "channels": 32},
        {"patch_size": 8, "hidden_size": 32, "patch_embed_hidden_size": 192, "d_ff": 64, "d_kv": 16, **_VIT},
    ),
    "biomedclip": (
        {"image_size": 112, "input_size": 32, "grid": (4, 4), "native_grid": (4, 4), "channels": 32},
        {"image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64, **_VIT},
    ),
    "sam": (
        {"image_size": 128, "input_size": 128, "grid": (16, 16), "native_grid": (16, 16), "channels": 24},
        {
            "image_size": 128,
            "patch_size": 8,
            "hidden_size": 32,
            "window_size": 7,
            "global_attn_indexes": [1],
            "output_channels": 24,
            **_VIT,
        },
    ),
}


def small_config(text_config: Any = None, vocabulary: int = 512) -> MoVAConfig:
    """Make a config of all seven experts and the base encoder at toy sizes, with a given or a small language model."""
    if text_config is None:
        text_config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
    text_encoder = BertConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    return MoVAConfig(
        text_config,
        text_encoder,
        base=_small(BASE),
        experts=[_small(expert) for expert in OFFICIAL],
        encoder_sizes={name: sizes for name, (_, sizes) in _SMALL.items()},
        adapter_heads=4,
        adapter_layers=3,
        num_routing_tokens=16,
        image_token_id=_SPECIAL.index(IMAGE_TOKEN),
    )


def small_model(texts: Sequence[str] = (), *, text_config: Any = None, seed: int = 0) -> MoVAPipeline:
    """Make a pipeline with random weights, which are the same for the same arguments.

    A new adapter adds nothing to the base tokens, so its zero weights are made random here.

    Args:
        texts: the texts on which the tokenizer is trained, in addition to single bytes.
        text_config: config of another language model, whose vocabulary must hold the tokenizer's.
        seed: the seed of the weights.
    """
    tokenizer = _tokenizer(texts, 512)
    config = small_config(text_config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MoVAForConditionalGeneration(config)
        with torch.no_grad():
            for parameter in model.adapter.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.3)
    return MoVAPipeline(model, MoVAProcessor.for_config(config, tokenizer, _question_tokenizer()))


def _small(expert: VisionExpert) -> VisionExpert:
    return replace(expert, **_SMALL[expert.name][0])


def _tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of at most ``size`` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=size, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


def _question_tokenizer() -> BertTokenizer:
    """Make a tokenizer of BERT's kind with letters as its words."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789:?.,"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)})
