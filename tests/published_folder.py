"""A tiny, random Qwen2.5-VL folder in the layout that the hub publishes, which is not the one transformers now saves.

config.json is flat (the text model's fields beside vision_config), tensors have their old names, weights lie in shards
behind an index, the head has more rows than the tokenizer has tokens, the tokenizer's own template is for text and
tools, and the template with pictures lies in chat_template.json, which AutoTokenizer does not read.
"""

# Configs take keywords that their type hints do not name.
# pyright: reportCallIssue=false

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from cosmo_rl.model.tiny import SPECIAL_TOKENS, SPLIT

FIRST_ADDED = 151_643
ADDED = (*SPECIAL_TOKENS, "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
         "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")
TOKENS = FIRST_ADDED + len(ADDED)
"""151,665 of them, as published."""
IM_END, ENDOFTEXT = FIRST_ADDED + 2, FIRST_ADDED

_TURN = "<|im_start|>{{ message['role'] }}\n"
_SYSTEM = ("{% if loop.first and message['role'] != 'system' %}"
           "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}")
_ANSWER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

IMAGE_TEMPLATE = (
    "{% set count = namespace(value=0) %}{% for message in messages %}" + _SYSTEM + _TURN +
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "{% set count.value = count.value + 1 %}{% if add_vision_id %}Picture {{ count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}" + _ANSWER)
"""Of chat_template.json: content is a string or parts."""
TEXT_TEMPLATE = (
    "{%- if tools %}{{- '<|im_start|>system\n# Tools\n' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endif %}{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + "
    "message.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}")
"""Of tokenizer_config.json: content is added to strings, so that parts end in a TypeError."""


def write(folder: Path, *, tied: bool = True, shards: int = 2, jinja: bool = False, seed: int = 0) -> Path:
    """Write the folder; returns it.

    Args:
        tied: as 3B, whose head is its embedding; else as 7B and 72B.
        shards: number of *.safetensors; 1: model.safetensors without an index.
        jinja: the template with pictures in chat_template.jinja, as newer folders have it, and no chat_template.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(tied)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {
        "bos_token_id": ENDOFTEXT, "pad_token_id": ENDOFTEXT, "do_sample": True,
        "eos_token_id": [IM_END, ENDOFTEXT], "repetition_penalty": 1.05, "temperature": 1e-6,
        "transformers_version": "4.49.0"})
    _write_json(folder / "preprocessor_config.json", {
        "min_pixels": 3136, "max_pixels": 12_845_056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"})
    if jinja:
        (folder / "chat_template.jinja").write_text(IMAGE_TEMPLATE)
    else:
        _write_json(folder / "chat_template.json", {"chat_template": IMAGE_TEMPLATE})
    _write_tokenizer(folder)
    _write_weights(folder, tensors(folder, tied=tied, seed=seed), shards)
    return folder


def _config(tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0,
        "bos_token_id": ENDOFTEXT, "eos_token_id": IM_END, "vision_start_token_id": ADDED_IDS["<|vision_start|>"],
        "vision_end_token_id": ADDED_IDS["<|vision_end|>"], "vision_token_id": ADDED_IDS["<|vision_pad|>"],
        "image_token_id": ADDED_IDS["<|image_pad|>"], "video_token_id": ADDED_IDS["<|video_pad|>"],
        "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 64,
        "max_position_embeddings": 128_000, "max_window_layers": 70, "model_type": "qwen2_5_vl",
        "num_attention_heads": 2, "num_hidden_layers": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0, "sliding_window": 32_768, "tie_word_embeddings": tied, "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2", "use_cache": True, "use_sliding_window": False,
        "vision_config": {
            "depth": 2, "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
            "in_chans": 3, "out_hidden_size": 32, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
            "window_size": 112, "fullatt_block_indexes": [1], "tokens_per_second": 2, "temporal_patch_size": 2},
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vocab_size": 151_936 if tied else 152_064,
    }


ADDED_IDS = {token: FIRST_ADDED + i for i, token in enumerate(ADDED)}


def tensors(folder: Path, *, tied: bool, seed: int) -> dict[str, torch.Tensor]:
    """Random bfloat16 weights for the config.json in `folder`, by their old names."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_pretrained(folder))
        found = {}
        for name, parameter in model.named_parameters():  # a tied head comes once, as the embedding
            old = name.removeprefix("model.") if name.startswith("model.visual.") else name.replace(
                "model.language_model.", "model.")
            size = 0.2 if parameter.ndim > 1 else 0.02  # so that pictures and positions matter in the 5th digit
            scale = parameter.ndim == 1 and name.endswith("weight")  # of a norm
            found[old] = (size * torch.randn(parameter.shape) + scale).to(torch.bfloat16)
    assert ("lm_head.weight" in found) is not tied
    return found


def _write_weights(folder: Path, weights: dict[str, torch.Tensor], shards: int) -> None:
    names = list(weights)
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i * len(names) // shards:(i + 1) * len(names) // shards]
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in weights.values())
    _write_json(folder / "model.safetensors.index.json",
                {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))})


def _write_tokenizer(folder: Path) -> None:
    """A byte-level BPE: bytes, a few words with their merges, and tokens that no text can reach."""
    vocab = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for word in ("system", "user", "assistant", "\u0120the", "\u0120is", "\u0120a", "think", "answer"):
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append(f"{word[:end - 1]} {word[end - 1]}")
    vocab |= {f"\u0120unused{i}": i for i in range(len(vocab), FIRST_ADDED)}
    special = {token: i < len(SPECIAL_TOKENS) for i, token in enumerate(ADDED)}
    added = [{"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": special[token]} for token, i in ADDED_IDS.items()]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    _write_json(folder / "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}, byte_level]},
        "post_processor": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                  "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "vocab": vocab,
                  "merges": merges}})
    _write_json(folder / "vocab.json", vocab)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", {
        "add_bos_token": False, "add_prefix_space": False,
        "added_tokens_decoder": {str(entry.pop("id")): entry for entry in added},
        "additional_special_tokens": [token for token in SPECIAL_TOKENS if token != "<|endoftext|>"],
        "bos_token": None, "chat_template": TEXT_TEMPLATE, "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>", "errors": "replace", "model_max_length": 131_072, "pad_token": "<|endoftext|>",
        "split_special_tokens": False, "tokenizer_class": "Qwen2Tokenizer", "unk_token": None})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
