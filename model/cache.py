"""The KV cache of a generate call: its bytes, known beforehand, and memory for all of it, allocated once."""

from typing import Any

import torch
from transformers import Cache, DynamicLayer


def cache_bytes(model_config: Any, dtype: torch.dtype) -> int:
    """Bytes that the KV cache takes of one token: keys and values of every layer.

    Args:
        model_config: a Qwen2_5_VLConfig.
        dtype: of the weights.
    """
    text = model_config.text_config
    channels = text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    return 2 * text.num_hidden_layers * channels * dtype.itemsize


class RoomyLayer(DynamicLayer):
    """One layer's keys and values in memory that is theirs from the start, handed out as views of its filled part.

    transformers' own layer copies all of them to append one token; its static one attends to the empty places too.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor, more: int) -> None:
        """
        Args:
            keys, values: (B, heads, filled, channels).
            rows: (R,) of B, which are taken. more: tokens to come.
        """
        super().__init__()
        self.lazy_initialization(keys, values)
        self.filled, shape = keys.shape[2], (len(rows), keys.shape[1], keys.shape[2] + more, keys.shape[3])
        self.room = [states.new_empty(shape) for states in (keys, values)]
        for room, states in zip(self.room, (keys, values), strict=True):
            torch.index_select(states, 0, rows, out=room[:, :, :self.filled])
        self._show()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any,
               **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        start, self.filled = self.filled, self.filled + key_states.shape[2]
        assert self.filled <= self.room[0].shape[2], "more tokens than there is room for"
        for room, states in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, start:self.filled] = states
        return self._show()

    def _show(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys, self.values = (room[:, :, :self.filled] for room in self.room)
        return self.keys, self.values


def roomy(cache: Cache, rows: torch.Tensor, more: int) -> Cache:
    """The cache of these rows of `cache`, which is emptied, with room for `more` tokens."""
    given: Any = cache.layers
    layers = []
    for layer in given:
        layers.append(RoomyLayer(layer.keys, layer.values, rows, more))
        layer.keys = layer.values = None  # or both caches would be there whole at the end
    return Cache(layers=layers)
