"""The scorer: begun while sampling goes on, with faults, without a server; one frozen Sample a response."""

import threading
import time
from dataclasses import replace
from typing import Any

import pytest
from fault_server import FaultServer
from scoring import ROW, SEEN, UNSAFE, entries, response, scored, scorer_of

from cosmo_rl.cpgd.config import RewardConfig
from cosmo_rl.cpgd.judges.client import EndpointError
from cosmo_rl.cpgd.rewards.base import Evidence, Failed, NotApplicable, RewardBudgetError, Score, check_budget
from cosmo_rl.cpgd.rewards.build import RowNeeds, build_scorer
from cosmo_rl.cpgd.rewards.function import UserFunction
from cosmo_rl.cpgd.rewards.scorer import Scorer
from cosmo_rl.cpgd.rollout.values import Response
from cosmo_rl.data.errors import UserError

FOUR = ("safework_safety", "safework_value", "safework_knowledge", "helpful")


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch):
    monkeypatch.setattr("cosmo_rl.cpgd.judges.client.BACKOFF_S", 0.01)


def rollout(count: int) -> list[Response]:
    rows = (ROW, replace(UNSAFE, task="jailbreak"), replace(ROW, task="value"), replace(SEEN, task="knowledge"))
    return [response(f"<think> thought {i} </think> answer {i}", rows[i % len(rows)]) for i in range(count)]


def rewards(server: FaultServer, responses: list[Response], more: str = "", **options: Any) -> list[float]:
    config = RewardConfig(judges=entries(server.url, *FOUR, more=more), format=0.0, visual_focus=0.0, **options)
    scorer = build_scorer(config, RowNeeds(config), patience_s=0.2)
    samples = scored(scorer, responses)
    scorer.close()
    check_budget([s.failure for s in samples if s.reward is None], len(samples), 0.1)
    return [s.reward for s in samples if s.reward is not None]


def test_faults_change_no_reward():
    samples = rollout(60)
    with FaultServer() as server:
        want = rewards(server, samples)
    with FaultServer(fault_rate=0.2, slow_s=60.0) as server:  # on a loaded machine good replies take long too
        assert rewards(server, samples, ",timeout=30,attempts=20") == want
    assert len(want) == 60 and len(set(want)) > 20


def test_judging_goes_on_while_the_trainer_samples():
    samples = rollout(24)
    with FaultServer(latency_s=(0.3, 0.3)) as server:
        judging = scorer_of(RewardConfig(judges=entries(server.url, *FOUR)), [])
        judging.verify()
        started = time.monotonic()
        futures = []
        for start in range(0, 24, 8):
            futures.append(judging.submit(samples[start:start + 8]))
            assert time.monotonic() - started < 0.3, "submitting does not wait"
        deadline = time.monotonic() + 30
        while not all(future.done() for future in futures) and time.monotonic() < deadline:
            sum(range(10_000))  # the trainer's own work
        waited = time.monotonic()
        outcomes = [found for future in futures for found in future.result(timeout=1)]
        assert time.monotonic() - waited < 0.2 and len(outcomes) == 24
        assert outcomes == judging.submit(samples).result(timeout=60)
        left = judging.submit(rollout(8))
        judging.close()
        assert left.cancelled() or left.done()


def test_a_dead_server_stops_the_run_within_its_budget_and_the_next_run_goes_on(tmp_path):
    samples = rollout(60)
    with FaultServer() as server:
        want = rewards(server, samples)
        requests = dict(server.seen)
        server.seen.clear()
        rewards(server, samples[:30], judge_cache=str(tmp_path))
        judged = dict(server.seen)
        server.stop()
        with pytest.raises(RewardBudgetError, match=r"the reward failed for 30 of 60 responses .* taken for dead"):
            rewards(server, samples, judge_cache=str(tmp_path))
        server.start()
        server.seen.clear()
        assert rewards(server, samples, judge_cache=str(tmp_path)) == want
        left = requests.keys() - judged.keys()
        assert 0 < len(left) < len(requests)
        assert server.seen.keys() == left, "what was judged is not judged again"


def test_verify_tells_of_every_server():
    with FaultServer(model="other") as server:
        scorer = scorer_of(RewardConfig(judges=(*entries(server.url, "helpful"),
                                                *entries("http://127.0.0.1:1", "general", more=",attempts=1"))), [])
        with pytest.raises(EndpointError, match=r"does not serve this model but other.* \| .*ConnectError") as error:
            scorer.verify()
    assert isinstance(error.value, UserError), "which `together` tells to all ranks"
    scorer.close()


class Said:
    """A term that says what it is told, by the text of a response."""

    def __init__(self, **outcomes):
        self.outcomes, self.threads = outcomes, set()

    async def __call__(self, response):
        self.threads.add(threading.current_thread())
        return self.outcomes[response.text]


def test_one_frozen_sample_of_a_response_and_its_outcomes():
    terms = {"a": Said(x=Score(1.0), y=Score(0.5), z=NotApplicable()),
             "b": Said(x=Score(0.0), y=Failed("no judge"), z=NotApplicable())}
    scorer = Scorer(terms, {"a": 1.0, "b": 3.0})
    asked = [response(text, ROW) for text in "xyz"]
    x, y, z = scored(scorer, asked)
    assert (x.response, x.row, x.reward, x.terms, x.failure) == (asked[0], ROW, 0.25, {"a": 1.0, "b": 0.0}, "")
    assert (y.reward, y.terms, y.failure) == (None, {"a": 0.5}, "b: no judge")
    assert z.reward is None and z.terms == {} and z.failure.startswith("no term applies")
    assert terms["a"].threads == terms["b"].threads != {threading.current_thread()}, "one loop, in a thread of its own"
    assert not scorer.needs_policy and scorer.function is None and scorer.function_digest == "" and scorer.taken() == {}
    scorer.verify()
    scorer.close()
    scorer.close()


def test_contrast_alone_waits_for_the_policy():
    scorer = scorer_of(RewardConfig(visual_focus_mode="contrast", task_aware=0.0), [SEEN])
    one = response("<think> a </think> b", SEEN)
    (outcomes,) = scorer.submit([one]).result(timeout=60)
    assert scorer.needs_policy and outcomes == {"format": Score(1.0), "helpful": Score(0.0)}
    sample = scorer.sample(one, outcomes, Evidence(-0.25, -0.75))
    assert list(sample.terms.items()) == [("format", 1.0), ("visual_focus", 0.5), ("helpful", 0.0)]
    assert sample.reward == pytest.approx((0.1 + 0.2 * 0.5) / 0.5)
    assert scorer.sample(one, outcomes).failure.startswith("visual_focus: contrast needs finite log-probs")
    assert scorer.sample(response("b", ROW), outcomes).terms == {"format": 1.0, "helpful": 0.0}, "no image"


def test_a_plain_function_blocks_its_caller_and_no_judge(tmp_path):
    """Called in the trainer's thread, one response after the other, while the judges' calls go out."""
    seen = []

    def score(row, text):
        seen.append((text, threading.current_thread() is threading.main_thread()))
        if text == "x":
            deadline = time.monotonic() + 30
            while not other.threads and time.monotonic() < deadline:
                time.sleep(0.01)
            assert other.threads, "the other term was not asked while this one worked"
        return 0.5

    other = Said(x=Score(1.0), y=Score(0.0))
    function = UserFunction(score, path=tmp_path / "f.py", digest="0")
    scorer = Scorer({"a": other, "function": function}, {"a": 1.0, "function": 1.0})
    future = scorer.submit([response(text, ROW) for text in "xy"])
    assert seen == [("x", True), ("y", True)], "it is done when submit returns"
    assert future.result(timeout=60) == [{"a": Score(1.0), "function": Score(0.5)},
                                         {"a": Score(0.0), "function": Score(0.5)}]
    assert scorer.function is function and scorer.function_digest == "0"
    scorer.close()


def test_an_interrupt_of_a_plain_function_goes_on_and_the_scorer_closes(tmp_path):
    def score(row, text):
        raise KeyboardInterrupt

    scorer = Scorer({"function": UserFunction(score, path=tmp_path / "f.py", digest="0")}, {"function": 1.0})
    with pytest.raises(KeyboardInterrupt):
        scorer.submit([response("x", ROW)])
    started = time.monotonic()
    scorer.close()
    assert time.monotonic() - started < 3


def test_a_bug_of_a_term_is_no_failure():
    scorer = Scorer({"a": Said()}, {"a": 1.0})
    with pytest.raises(KeyError):
        scorer.submit([response("x", ROW)]).result(timeout=60)
    scorer.close()
