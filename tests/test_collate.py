"""Prompts against transformers' own positions; micro-batches against what they must predict; the plan's promises."""

import io
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import tiny_case
import torch
from PIL import Image

from cosmo_rl.data.collate import TokenSequence, check_prompt, deal, encode_prompt, mrope_positions, plan_microbatches
from cosmo_rl.model.load import load_model

LAYOUTS = ("packed", "padded")


@pytest.mark.parametrize("segments", [
    [5],
    [3, (1, 4, 4), 7],
    [(1, 2, 2), 1],  # image first
    [2, (1, 6, 10), 1, (1, 12, 4), 1, (1, 2, 2), 9],  # later text goes on from the larger side
    [4, (1, 4, 4)],  # image last
], ids=str)
def test_positions_equal_transformers(segments):
    types = np.concatenate([np.zeros(s) if isinstance(s, int) else np.ones(s[1] * s[2] // 4) for s in segments])
    grids = np.array([s for s in segments if not isinstance(s, int)], dtype=np.int64).reshape(-1, 3)
    model: Any = load_model(tiny_case.folder()).model
    expected, _ = model.get_rope_index(
        torch.zeros(1, len(types), dtype=torch.long), torch.from_numpy(types[None]).int(), torch.from_numpy(grids))
    got = mrope_positions(types.astype(np.int64), grids if len(grids) else None, 2)
    np.testing.assert_array_equal(got, expected[:, 0].numpy())


def test_encode_expands_each_placeholder():
    processor = tiny_case.processor()
    row: Any = tiny_case.row(0, tiny_case.SHAPES[0])
    prompt = encode_prompt(row, processor, max_prompt_tokens=200, max_image_pixels=10**6)
    pixels = processor.image_processor(images=list(row.images), return_tensors="np")
    np.testing.assert_array_equal(prompt.pixel_values, pixels["pixel_values"])
    np.testing.assert_array_equal(prompt.image_grid_thw, pixels["image_grid_thw"])

    images = "".join("<|vision_start|>" + "<|image_pad|>" * (h * w // 4) + "<|vision_end|>what is this?"
                     for _, h, w in pixels["image_grid_thw"])
    text = f"<|im_start|>user\nhere {images}<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.input_ids.tolist() == processor.tokenizer(text)["input_ids"]
    np.testing.assert_array_equal(prompt.mm_token_type_ids, prompt.input_ids == processor.image_token_id)


def test_encode_refuses_what_does_not_fit():
    processor = tiny_case.processor()
    row: Any = tiny_case.row(3, tiny_case.SHAPES[3])
    length = len(encode_prompt(row, processor, max_prompt_tokens=200, max_image_pixels=10**6).input_ids)
    encode_prompt(row, processor, max_prompt_tokens=length, max_image_pixels=10**6)
    with pytest.raises(ValueError, match=rf"row-3.*{length} tokens.*budget of {length - 1}.*max-prompt-tokens"):
        encode_prompt(row, processor, max_prompt_tokens=length - 1, max_image_pixels=10**6)
    with pytest.raises(ValueError, match=rf"row-3.*{length} tokens.*budget of {length - 1}.*max-prompt-tokens"):
        check_prompt(row, processor, max_prompt_tokens=length - 1)
    row.messages[0]["content"][0]["text"] = "<|image_pad|>"
    for refuse in (lambda: encode_prompt(row, processor, max_prompt_tokens=200, max_image_pixels=10**6),
                   lambda: check_prompt(row, processor, max_prompt_tokens=200)):
        with pytest.raises(ValueError, match=r"row-3.*2 image placeholders for 1 images"):
            refuse()


@pytest.mark.parametrize("size", [(56, 56), (31, 200), (640, 480), (9, 9)])
def test_length_from_the_header_is_the_length(size):
    processor = tiny_case.processor()
    row: Any = tiny_case.row(0, tiny_case.SHAPES[0])
    images = tuple(Image.new("RGB", size) for _ in row.images)
    buffer = io.BytesIO()
    images[0].save(buffer, "PNG")
    for sources in (images, (buffer.getvalue(), *images[1:])):
        row = replace(row, images=sources)
        prompt = encode_prompt(row, processor, max_prompt_tokens=10**6, max_image_pixels=10**6)
        assert check_prompt(row, processor, max_prompt_tokens=10**6) == (
            len(prompt.input_ids), prompt.mm_token_type_ids.sum())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_collate_predicts_every_response_token(layout):
    sequences = tiny_case.sequences()
    batch = tiny_case.batch(sequences, layout)
    flat = batch.input_ids.flatten()
    assert torch.equal(flat[batch.target_positions + 1], batch.targets)
    assert batch.targets.tolist() == [t for s in sequences for t in s.response_ids]
    assert batch.sequence_ids.tolist() == [i for i, s in enumerate(sequences) for _ in s.response_ids]
    assert batch.input_ids.numel() == (sum(map(len, sequences)) if layout == "packed"
                                       else len(sequences) * max(map(len, sequences)))

    # Each document as it would be alone: the first of its last P-1+L positions predicts the first response token.
    positions = batch.position_ids.flatten(1)
    for i, s in enumerate(sequences):
        end = int(batch.target_positions[batch.sequence_ids == i][-1]) + 2
        document = slice(end - len(s), end)
        assert flat[document].tolist() == [*s.prompt.input_ids, *s.response_ids]
        assert positions[0, document].tolist() == list(range(len(s)))
        types = np.concatenate([s.prompt.mm_token_type_ids, np.zeros(len(s.response_ids), dtype=np.int64)])
        expected = mrope_positions(types, s.prompt.image_grid_thw, 2)
        np.testing.assert_array_equal(positions[1:, document].numpy(), expected)
    if layout == "padded":  # also over the padding: no restart, so transformers builds no mask
        assert (batch.position_ids[0] == torch.arange(batch.input_ids.shape[1])).all()


def test_to_moves_every_tensor():
    batch = tiny_case.batch(tiny_case.sequences(), "packed").to("meta")
    values = {f.name: getattr(batch, f.name) for f in fields(batch)}
    assert values.pop("num_dummy_images") == 0 and all(v.device.type == "meta" for v in values.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_collate_sends_each_image_through_the_tower_once(layout):
    prompts: Any = tiny_case.prompts()
    first, _, tall, _ = prompts
    one = np.array([5])
    batch = tiny_case.batch([TokenSequence(p, one) for p in (first, tall, first, tall, first)], layout)
    assert batch.num_dummy_images == 0
    assert torch.equal(batch.pixel_values, torch.from_numpy(np.concatenate([first.pixel_values, tall.pixel_values])))
    a, b = (int(p.mm_token_type_ids.sum()) for p in (first, tall))
    assert batch.image_rows.tolist() == [*range(a), *range(a, a + b)] * 2 + [*range(a)]
    slots = (batch.input_ids.flatten() == tiny_case.processor().image_token_id).nonzero()[:, 0]
    assert torch.equal(batch.image_slots, slots)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [0, 1])
def test_collate_without_images_takes_the_dummy(layout, count):
    pixels, grid = tiny_case.processor().dummy_image()
    batch = tiny_case.batch([TokenSequence(tiny_case.prompts()[1], np.array([5, 6]))] * count, layout)
    assert batch.num_dummy_images == 1
    assert torch.equal(batch.pixel_values, torch.from_numpy(pixels)) and batch.image_grid_thw.tolist() == grid.tolist()
    assert len(batch.image_slots) == len(batch.image_rows) == 0
    assert len(batch.targets) == len(batch.target_positions) == 2 * count and batch.input_ids.numel() > 0


def cost(lengths, members, layout):
    chosen = [lengths[i] for i in members]
    return sum(chosen) if layout == "packed" else len(chosen) * max(chosen, default=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("seed", range(4))
def test_plan_keeps_its_promises(layout, world_size, seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 200, rng.integers(1, 120)).tolist()
    arguments = {"max_tokens": 600, "layout": layout, "world_size": world_size}
    plan = plan_microbatches(lengths, **arguments)
    assert plan == plan_microbatches(lengths, **arguments)
    bins = [members for rank in plan for members in rank]
    assert len(plan) == world_size and len({len(rank) for rank in plan}) == 1
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert max(cost(lengths, members, layout) for members in bins) <= 600
    loads = [sum(lengths[i] for members in rank for i in members) for rank in plan]
    assert sum(loads) == sum(lengths)
    if layout == "packed" and len(lengths) >= world_size:
        assert max(loads) - min(loads) <= max(lengths)
        assert len(bins) <= world_size * (sum(lengths) // (600 - max(lengths)) // world_size + 1)


def test_plan_fills_one_microbatch_if_it_can():
    assert plan_microbatches([10, 20, 30], max_tokens=60, layout="packed", world_size=1) == [[[0, 1, 2]]]
    assert plan_microbatches([10, 20, 30], max_tokens=90, layout="padded", world_size=1) == [[[0, 1, 2]]]
    # 2 runs of similar length, not [30, 30, 30] + [1]
    assert plan_microbatches([30, 1, 30, 1], max_tokens=90, layout="padded", world_size=2) == [[[0, 2]], [[1, 3]]]
    assert plan_microbatches([7], max_tokens=9, layout="packed", world_size=2) == [[[0]], [[]]]
    assert plan_microbatches([], max_tokens=9, layout="packed", world_size=2) == [[], []]


def test_plan_gives_the_heavier_microbatch_to_the_lighter_rank():
    plan = plan_microbatches([30] * 4 + [1] * 4, max_tokens=60, layout="padded", world_size=2)
    assert plan == [[[0, 1], [4, 5, 6, 7]], [[2, 3], []]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_plan_names_a_sequence_beyond_the_budget(layout):
    with pytest.raises(ValueError, match=r"601 tokens.*--batch.max-tokens 600.*max-new-tokens"):
        plan_microbatches([5, 601], max_tokens=600, layout=layout, world_size=1)


def test_shares_are_even_in_tokens():
    """Round robin, as the batches come, would give one rank 50 and the other 96; these have 74 and 72."""
    assert deal([4, 4, 6, 8, 10, 30, 30, 54], 2, 8) == [[1, 2, 4, 7], [0, 3, 5, 6]]
    tokens = np.random.default_rng(3).integers(1, 1000, 200).tolist()
    loads = [sum(tokens[i] for i in share) for share in deal(tokens, 16, 200)]
    assert max(loads) - min(loads) < 0.02 * max(loads)
    assert deal([5] * 5, 3, 5) == [[0, 3], [1, 4], [2]] and deal([], 2, 0) == [[], []]
    assert deal([9, 1, 1, 1], 2, 2) == [[0, 3], [1, 2]], "no more than two each"
