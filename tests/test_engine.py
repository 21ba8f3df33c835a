"""Batches of a rollout: every request once, like lengths together, within the budget, work for every rank."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_cache import SIZES, published

from cosmo_rl.cpgd.rollout.engine import cache_fits, for_all_ranks, form_batches, generate
from cosmo_rl.cpgd.run.evaluation import call_size
from cosmo_rl.cpgd.run.recipes import recipe
from cosmo_rl.data.collate import deal
from cosmo_rl.model.cache import cache_bytes


def test_batches_hold_every_request_once_in_order_of_length():
    lengths = np.random.default_rng(0).integers(5, 40, 103).tolist()
    batches = form_batches(lengths, 16)
    assert sorted(i for batch in batches for i in batch) == list(range(103))
    assert [len(batch) for batch in batches] == [16] * 6 + [7]
    ordered = [lengths[i] for batch in batches for i in batch]
    assert ordered == sorted(ordered)


def test_equal_lengths_keep_the_order_of_the_requests():
    assert form_batches([7, 7, 3, 7], 2) == [[2, 0], [1, 3]]
    assert form_batches([], 4) == []


@pytest.mark.parametrize("room", [40, 90, 10**6])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_a_rank_that_gets_whole_batches_forms_the_same_ones(world_size, room):
    """Though it knows no more of the others than the size of its own largest one."""
    lengths, fits = np.random.default_rng(1).integers(5, 40, 50).tolist(), lambda n, longest: n * (longest + 3) <= room
    batches = form_batches(lengths, 8, fits)
    dealt = deal([sum(lengths[i] for i in batch) for batch in batches], world_size, 50)
    assert sorted(i for share in dealt for i in share) == list(range(len(batches)))
    for share in dealt:
        mine = [batches[i] for i in share]
        flat = [i for batch in mine for i in batch]
        again = form_batches([lengths[i] for i in flat], max(map(len, mine)), fits)
        assert [[flat[i] for i in batch] for batch in again] == mine


def test_a_batch_ends_where_the_next_request_does_not_fit():
    fits = lambda requests, longest: requests * longest <= 20
    assert form_batches([10, 5, 5, 30, 6, 5, 5, 40], 3, fits) == [[1, 2, 5], [6, 4], [0], [3], [7]]


def test_every_rank_has_work():
    """1,024 requests in calls of 64, on 64 ranks; on 16 or fewer the calls are what they are on one."""
    lengths = np.random.default_rng(2).integers(20, 900, 1024).tolist()
    form = lambda size: form_batches(lengths, size)
    for ranks in (1, 2, 16):
        assert for_all_ranks(form, 64, 1024, ranks) == form(64)
    for ranks, size, busy in ((17, 61, 17), (48, 22, 47), (64, 16, 64)):  # none could do with smaller ones
        batches = for_all_ranks(form, 64, 1024, ranks)
        assert batches == form(size) and len(batches) == busy
        assert sum(map(bool, deal([len(batch) for batch in batches], ranks, 64))) == busy
    assert for_all_ranks(lambda size: form_batches([9] * 3, size), 64, 3, 64) == [[0], [1], [2]]
    assert for_all_ranks(lambda size: form_batches([], size), 64, 0, 64) == []


@pytest.mark.parametrize("preset", SIZES)
def test_no_call_of_a_preset_is_over_its_budget(preset):
    """In rollouts and evaluation, whose 128 requests at 7B would take 112 GiB; short prompts go in full batches."""
    config, model_config = recipe(preset, 2), published(*SIZES[preset])
    rollout = config.rollout
    fits = cache_fits(rollout, model_config, torch.bfloat16)
    longest = config.data.max_prompt_tokens
    for size in (rollout.batch_size, call_size(config)):
        (most, *_) = form_batches([longest] * 300, size, fits)
        in_gib = (longest + rollout.max_new_tokens) * cache_bytes(model_config, torch.bfloat16) / 2**30
        assert len(most) * in_gib <= 32 < (len(most) + 1) * in_gib
    if preset == "7b":
        assert len(most) == 36 and len(form_batches([100] * 300, 64, fits)[0]) == 64


def test_what_an_engine_gives_in_any_order_comes_in_that_of_the_requests():
    class Backwards:
        def stream(self, requests, *, greedy, batch_size):
            assert greedy and batch_size == 2
            for request in reversed(requests):
                yield [SimpleNamespace(request=request)]

    requests: list[Any] = [SimpleNamespace(number=i) for i in range(5)]
    engine: Any = Backwards()
    found = generate(engine, requests, greedy=True, batch_size=2)
    assert [response.request for response in found] == requests and found[0].request is requests[0]


def test_a_batch_size_below_one_is_refused():
    with pytest.raises(ValueError, match="batch_size is 0; give at least 1"):
        form_batches([1], 0)
