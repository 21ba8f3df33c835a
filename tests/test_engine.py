"""Batches of a rollout: every request once, like lengths together, the same batches on any number of ranks."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cosmo_rl.cpgd.rollout.engine import form_batches, generate


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


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_rank_that_gets_whole_batches_forms_the_same_ones(world_size):
    lengths = np.random.default_rng(1).integers(5, 12, 50).tolist()
    batches = form_batches(lengths, 8)
    for rank in range(world_size):
        mine = batches[rank::world_size]
        flat = [i for batch in mine for i in batch]
        assert [[flat[i] for i in batch] for batch in form_batches([lengths[i] for i in flat], 8)] == mine


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
