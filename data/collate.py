"""Rows to token arrays, and sequences to the tensors of one micro-batch.

A prompt is encoded once (`encode_prompt`); the samples of a group share it, and so share one pass of the vision tower
in each micro-batch. Positions are Qwen2.5-VL's M-RoPE: text advances all three axes together, an image of h x w tokens
spans h and w from where the text stopped, and the text after it goes on from the largest position + 1 (arXiv 2409.12191
section 2.1; equal to transformers' `get_rope_index`).

Two layouts, the same result: "packed" puts all sequences on one row, and restarting text positions separate them;
"padded" puts one sequence on each row, padded on the right, where causal attention never looks.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from .errors import UserError
from .schema import Message, Row, image_size, open_image


@dataclass(frozen=True, slots=True, eq=False)
class EncodedPrompt:
    """A prompt of P tokens, image tokens included."""

    id: str
    """Id of the row."""
    input_ids: np.ndarray
    """(P,) int64."""
    position_ids: np.ndarray
    """(3, P) int64, M-RoPE: temporal, height, width."""
    mm_token_type_ids: np.ndarray
    """(P,) int64, 0 text, 1 image."""
    pixel_values: np.ndarray | None
    """(n_patches, patch_dim) float32, all images of the prompt; None without images."""
    image_grid_thw: np.ndarray | None
    """(n_images, 3) int64, patches along time, height, width; None without images."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenSequence:
    """A prompt and one response to it."""

    prompt: EncodedPrompt
    response_ids: np.ndarray
    """(L,) int64, L >= 1."""

    def __len__(self) -> int:
        return len(self.prompt.input_ids) + len(self.response_ids)


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """What `Policy.forward` takes: B rows of T tokens with N response tokens to predict."""

    input_ids: torch.Tensor
    """(B, T) int64."""
    position_ids: torch.Tensor
    """(4, B, T) int64: text positions within the document, then M-RoPE."""
    pixel_values: torch.Tensor
    """(n_patches, patch_dim) float32, each image once; the dummy image in a batch without images."""
    image_grid_thw: torch.Tensor
    """(n_unique_images, 3) int64."""
    image_slots: torch.Tensor
    """(n_image_tokens,) int64, which of the B*T tokens are image tokens."""
    image_rows: torch.Tensor
    """(n_image_tokens,) int64, row of the tower's output that fills each slot."""
    target_positions: torch.Tensor
    """(N,) int64, which of the B*T hidden states predicts targets[i]."""
    targets: torch.Tensor
    """(N,) int64 response tokens, by sequence, then by position."""
    sequence_ids: torch.Tensor
    """(N,) int64, index in the list given to `collate` of each target's sequence."""
    num_dummy_images: int
    """1 when the tower's output has no slot and enters the loss with weight 0, else 0."""

    def to(self, device: torch.device | str) -> "MicroBatch":
        """The same batch with its tensors on `device`."""
        moved: dict[str, Any] = {f.name: value.to(device) for f in fields(self)
                                 if isinstance(value := getattr(self, f.name), torch.Tensor)}
        return replace(self, **moved)


def mrope_positions(mm_token_type_ids: np.ndarray, image_grid_thw: np.ndarray | None, merge_size: int) -> np.ndarray:
    """M-RoPE positions of one prompt.

    Args:
        mm_token_type_ids: (P,) integers, 0 text, 1 image.
        image_grid_thw: (n_images, 3) patches along time, height, width; None without images.
        merge_size: patches merged into one token along height and along width.
    Returns:
        (3, P) int64: temporal, height, width.
    """
    length = len(mm_token_type_ids)
    positions = np.empty((3, length), dtype=np.int64)
    start, offset = 0, 0  # index of the next token, and its position
    for t, h, w in (() if image_grid_thw is None else image_grid_thw.tolist()):
        h, w = h // merge_size, w // merge_size
        image = start + int(np.argmax(mm_token_type_ids[start:]))
        end = image + t * h * w
        assert mm_token_type_ids[image:end].all() and end <= length, "image tokens and image sizes disagree"
        positions[:, start:image] = np.arange(offset, offset + image - start)
        offset += image - start
        positions[:, image:end] = np.indices((t, h, w)).reshape(3, -1) + offset
        start, offset = end, offset + max(h, w)
    assert not mm_token_type_ids[start:].any(), "image tokens and image sizes disagree"
    positions[:, start:] = np.arange(offset, offset + length - start)
    return positions


def encode_prompt(row: Row, processor: Any, *, max_prompt_tokens: int, max_image_pixels: int,
                  system_prompt: str = "") -> EncodedPrompt:
    """Chat template with generation prompt, images processed, each image placeholder widened to its token count.

    Args:
        row: its `messages` hold as many image parts as it has images.
        processor: a `cosmo_rl.model.load.Processor`.
        max_prompt_tokens: budget in tokens, image tokens included.
        max_image_pixels: largest image accepted, in pixels.
        system_prompt: see `with_system`.
    Raises:
        UserError: the prompt is longer than the budget, the chat template does not give one placeholder per image, or
            an image cannot be read. Nothing is ever truncated.
    """
    ids, is_image = _chat_ids(row, processor, system_prompt)
    pixels, grid = None, None
    repeats = np.ones(len(ids), dtype=np.int64)
    if row.images:
        images = [open_image(source, max_image_pixels, f"row {row.id}") for source in row.images]
        features = processor.image_processor(images=images, return_tensors="np")
        pixels = np.ascontiguousarray(features["pixel_values"], dtype=np.float32)
        grid = np.asarray(features["image_grid_thw"], dtype=np.int64)
        repeats[is_image] = grid.prod(axis=1) // processor.merge_size**2
    _check_budget(row, int(repeats.sum()), int(repeats[is_image].sum()), max_prompt_tokens)
    types = np.repeat(is_image, repeats).astype(np.int64)
    return EncodedPrompt(row.id, np.repeat(ids, repeats), mrope_positions(types, grid, processor.merge_size), types,
                         pixels, grid)


def check_prompt(row: Row, processor: Any, *, max_prompt_tokens: int, system_prompt: str = "",
                 image_sizes: Sequence[tuple[int, int]] | None = None) -> tuple[int, int]:
    """The prompt's tokens, and how many of them are image tokens.

    Args: as `encode_prompt`.
        image_sizes: (width, height) of each image in pixels; None: from their headers, which are known to be readable.
    Raises: what `encode_prompt` would of the prompt's length.
    """
    ids, _ = _chat_ids(row, processor, system_prompt)
    patches = [processor.image_processor.get_number_of_image_patches(height, width)
               for width, height in image_sizes or map(image_size, row.images)]
    image_tokens = sum(patches) // processor.merge_size**2
    tokens = len(ids) - len(patches) + image_tokens
    _check_budget(row, tokens, image_tokens, max_prompt_tokens)
    return tokens, image_tokens


def with_system(messages: Sequence[Message], system_prompt: str) -> list[Message]:
    """The messages behind the system prompt; as they are where it is "" or they bring a system message themselves."""
    if not system_prompt or messages[0]["role"] == "system":
        return list(messages)
    return [{"role": "system", "content": system_prompt}, *messages]


def chat_text(row: Row, processor: Any, system_prompt: str) -> str:
    """What the chat template makes of the row, with the generation prompt; one placeholder per image.

    Raises:
        UserError: the template cannot render it; names the row.
    """
    try:
        return processor.chat_text(with_system(row.messages, system_prompt))
    except UserError as error:
        raise UserError(f"row {row.id}: {error}; change its `messages`, or the template") from error


def _chat_ids(row: Row, processor: Any, system_prompt: str) -> tuple[np.ndarray, np.ndarray]:
    """(tokens,) int64 of the chat, one placeholder per image, and which of them are placeholders."""
    text = chat_text(row, processor, system_prompt)
    ids = np.array(processor.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)
    is_image = ids == processor.image_token_id
    if is_image.sum() != len(row.images):
        raise UserError(f"row {row.id}: its chat holds {is_image.sum()} image placeholders for {len(row.images)} "
                        "images; write each image as an {\"type\": \"image\"} part and no placeholder as text")
    return ids, is_image


def _check_budget(row: Row, tokens: int, image_tokens: int, budget: int) -> None:
    if tokens > budget:
        raise UserError(f"row {row.id}: prompt of {tokens} tokens, {image_tokens} of them for images, is over the "
                        f"budget of {budget}; raise --data.max-prompt-tokens, lower --data.resize-pixels, or drop "
                        "the row")


def collate(sequences: Sequence[TokenSequence], *, layout: str, pad_id: int,
            dummy_image: tuple[np.ndarray, np.ndarray]) -> MicroBatch:
    """The micro-batch of `sequences`, on the CPU.

    Args:
        sequences: may be empty: then one pad token and no target, so that a rank without work still takes part.
        layout: "packed" or "padded".
        pad_id: token that fills the right of padded rows.
        dummy_image: (pixel_values, image_grid_thw) that the tower sees when no sequence has an image.
    """
    assert layout in ("packed", "padded"), layout
    lengths = [len(s) for s in sequences]
    width = (sum(lengths) if layout == "packed" else max(lengths, default=0)) or 1
    rows = len(sequences) if layout == "padded" and sequences else 1
    starts = np.cumsum([0, *lengths])[:-1] if layout == "packed" else np.arange(len(sequences)) * width

    input_ids = np.full(rows * width, pad_id, dtype=np.int64)
    # Right padding counts on, so that transformers sees one document per row and builds no mask.
    position_ids = np.tile(np.arange(width), (4, rows))
    pixels, grids, image_slots, image_rows = [], [], [], []
    first_row, num_rows = {}, 0  # of the tower's output: by prompt image array, and in all
    target_positions = []
    for sequence, start in zip(sequences, starts.tolist(), strict=True):
        prompt, length = sequence.prompt, len(sequence.response_ids)
        size = len(prompt.input_ids)
        middle, end = start + size, start + size + length
        input_ids[start:middle] = prompt.input_ids
        input_ids[middle:end] = sequence.response_ids
        position_ids[0, start:end] = np.arange(size + length)
        position_ids[1:, start:middle] = prompt.position_ids
        position_ids[1:, middle:end] = np.arange(length) + (prompt.position_ids.max() + 1)
        target_positions.append(np.arange(middle - 1, end - 1))
        if prompt.pixel_values is None or prompt.image_grid_thw is None:
            continue
        slots = np.flatnonzero(prompt.mm_token_type_ids) + start
        key = id(prompt.pixel_values)
        if key not in first_row:
            first_row[key] = num_rows
            num_rows += len(slots)
            pixels.append(prompt.pixel_values)
            grids.append(prompt.image_grid_thw)
        image_slots.append(slots)
        image_rows.append(np.arange(len(slots)) + first_row[key])
    if not pixels:
        pixels, grids = [dummy_image[0]], [dummy_image[1]]

    def join(parts: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts) if parts else np.empty(0, dtype=np.int64))

    return MicroBatch(
        input_ids=torch.from_numpy(input_ids).view(rows, width),
        position_ids=torch.from_numpy(position_ids).view(4, rows, width),
        pixel_values=join(pixels), image_grid_thw=join(grids),
        image_slots=join(image_slots), image_rows=join(image_rows),
        target_positions=join(target_positions), targets=join([s.response_ids for s in sequences]),
        sequence_ids=torch.from_numpy(np.repeat(np.arange(len(sequences)), [len(s.response_ids) for s in sequences])),
        num_dummy_images=int(not first_row),
    )


def plan_microbatches(lengths: Sequence[int], *, max_tokens: int, layout: str,
                      world_size: int) -> list[list[list[int]]]:
    """Which sequences go into which micro-batch of which rank.

    Args:
        lengths: tokens of each sequence, prompt included.
        max_tokens: budget of a micro-batch: its tokens when packed, its rows times the longest when padded.
        layout: "packed" or "padded".
        world_size: number of ranks.
    Returns:
        plan[rank][micro-batch] = indices into `lengths`; every rank has the same number of micro-batches (some may be
        empty), and all are about equally heavy. The number is the smallest possible when padded; packed, the smallest
        that a greedy split (longest first, into the lightest) finds. Depends on the arguments only.
    Raises:
        UserError: one sequence alone is over the budget.
    """
    assert layout in ("packed", "padded"), layout
    if not len(lengths):
        return [[] for _ in range(world_size)]
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if lengths[order[0]] > max_tokens:
        raise UserError(f"a sequence of {lengths[order[0]]} tokens does not fit into --batch.max-tokens {max_tokens}; "
                        "raise it, or lower --data.max-prompt-tokens or --rollout.max-new-tokens")
    split = _split_packed if layout == "packed" else _split_padded
    per_rank = max(1, -(-sum(lengths) // (world_size * max_tokens)))
    while (bins := split(lengths, order, world_size * per_rank, max_tokens)) is None:
        per_rank += 1

    bins.sort(key=lambda members: -sum(lengths[i] for i in members))
    shares = deal([sum(lengths[i] for i in members) for members in bins], world_size, per_rank)
    return [[bins[i] for i in share] for share in shares]


def deal(weights: Sequence[int], ranks: int, most: int) -> list[list[int]]:
    """Indices for each rank, ascending, at most `most`: the heaviest first, each to the lightest rank that has room."""
    out, loads = [list[int]() for _ in range(ranks)], [0] * ranks
    for i in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        rank = min((r for r in range(ranks) if len(out[r]) < most), key=lambda r: (loads[r], r))
        out[rank].append(i)
        loads[rank] += weights[i]
    return [sorted(share) for share in out]


def _split_packed(lengths: Sequence[int], order: list[int], count: int, max_tokens: int) -> list[list[int]] | None:
    """`count` bins, longest sequence first into the lightest bin; None if one overflows."""
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, b) for b in range(count)]
    for i in order:
        load, b = heap[0]
        if load + lengths[i] > max_tokens:
            return None
        heapq.heapreplace(heap, (load + lengths[i], b))
        bins[b].append(i)
    return [sorted(members) for members in bins]


def _split_padded(lengths: Sequence[int], order: list[int], count: int, max_tokens: int) -> list[list[int]] | None:
    """`count` runs of the sorted sequences, the dearest as cheap as can be; None if over `max_tokens`."""

    def runs(cost: int) -> list[list[int]]:
        parts: list[list[int]] = []
        for i in order:
            if parts and (len(parts[-1]) + 1) * lengths[parts[-1][0]] <= cost:
                parts[-1].append(i)
            else:
                parts.append([i])
        return parts

    if len(runs(max_tokens)) > count:
        return None
    low, high = lengths[order[0]], max_tokens
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(runs(middle)) <= count else (middle + 1, high)
    parts = [sorted(members) for members in runs(low)]
    return parts + [[] for _ in range(count - len(parts))]
