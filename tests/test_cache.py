"""The KV cache of a call: its bytes by hand, and memory that is filled, never moved."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, Qwen2_5_VLConfig

from cosmo_rl.model.cache import cache_bytes, roomy

SIZES = {"3b": (36, 2048, 16, 2), "7b": (28, 3584, 28, 4), "72b": (80, 8192, 64, 8)}
"""Layers, hidden size, heads and key heads of the text models."""


def published(layers, hidden, heads, keys) -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(text_config={"num_hidden_layers": layers, "hidden_size": hidden,
                                         "num_attention_heads": heads, "num_key_value_heads": keys})


def test_bytes_of_a_token():
    by_hand = {"3b": 2 * 36 * 2 * 128 * 2, "7b": 2 * 28 * 4 * 128 * 2, "72b": 2 * 80 * 8 * 128 * 2}
    assert {name: cache_bytes(published(*size), torch.bfloat16) for name, size in SIZES.items()} == by_hand
    assert cache_bytes(published(*SIZES["7b"]), torch.float32) == 2 * by_hand["7b"]


def states(seed, rows, tokens) -> Any:
    return tuple(torch.randn(rows, 2, tokens, 8, generator=torch.Generator().manual_seed(seed + i)) for i in (0, 50))


def test_it_holds_what_a_growing_one_does_and_stays_where_it_is():
    rows = torch.tensor([2, 0, 0, 1, 2])
    growing, filled = caches = [DynamicCache(), DynamicCache()]
    for cache in caches:
        for layer in range(3):
            cache.update(*states(layer, 3, 5), layer)
    growing.batch_select_indices(rows)
    cache: Any = roomy(filled, rows, 4)
    assert all(keys is values is None for keys, values, _ in filled), "the first one is given up"
    assert len(cache) == 3 and cache.get_seq_length() == 5
    places = [layer.keys.data_ptr() for layer in cache.layers]
    for step in range(4):
        for layer in range(3):
            new = states(10 * step + layer + 3, 5, 1)
            for found, wanted in zip(cache.update(*new, layer), growing.update(*new, layer), strict=True):
                assert torch.equal(found, wanted)
            assert cache.get_mask_sizes(1, layer) == growing.get_mask_sizes(1, layer)
    assert cache.get_seq_length() == 9 and [layer.keys.data_ptr() for layer in cache.layers] == places
    with pytest.raises(AssertionError, match="more tokens than there is room for"):
        cache.update(*states(0, 5, 1), 0)  # beyond what was asked for
