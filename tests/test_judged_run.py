"""A real run whose rewards come from judges: asked while sampling goes on, the same on two ranks, stopped when dead."""

# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportAttributeAccessIssue=false

import functools
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import runs
from fault_server import FaultServer
from scoring import response

from cosmo_rl.cpgd.config import RewardConfig
from cosmo_rl.cpgd.rewards.base import Score
from cosmo_rl.cpgd.rewards.build import RowNeeds, build_scorer
from cosmo_rl.cpgd.rollout.collect import sample
from cosmo_rl.cpgd.rollout.engine import alone
from cosmo_rl.cpgd.run import main
from cosmo_rl.cpgd.run.metrics import judges_took, read_metrics
from cosmo_rl.cpgd.trainer import Trainer
from cosmo_rl.data.errors import UserError
from cosmo_rl.data.prepare.mini import general_rows, safety_rows


@pytest.fixture
def rows(tmp_path):
    return runs.write_rows(tmp_path / "rows.jsonl", [*safety_rows("validation")[:3], *general_rows("validation")[:3]])


def judged(server, *more):
    names = ("safework_safety", "helpful", "general")
    return ["--reward.judges", *(f"{name}={server.url},{server.model},attempts=3" for name in names), *more]


def took(run_dir):
    """What the judges took, of each iteration; only its first line tells it."""
    lines = read_metrics(run_dir / "stage2" / "metrics.jsonl")
    first = [line for before, line in zip([{}, *lines], lines, strict=False)
             if line["iteration"] != before.get("iteration")]
    assert [line for line in lines if "judging" in line] == first
    assert all(set(line["judging"]) == {"safework_safety+helpful+general"} for line in first)
    return [line["judging"]["safework_safety+helpful+general"] for line in first]


def test_judges_reward_a_run_on_one_and_two_ranks(tmp_path, rows):
    with FaultServer(script=["500"] * 2) as server:
        both = [runs.start(runs.small(*runs.from_file(rows), *judged(server), "--run-dir", tmp_path / str(ranks)),
                           tmp_path / "logs", ranks=ranks) for ranks in (1, 2)]
        for running in both:
            running.wait().check()
        told = [sum((Counter(line) for line in took(tmp_path / str(ranks))), Counter()) for ranks in (1, 2)]
        assert sum(counts["answered"] + counts["retried"] for counts in told) == server.calls
    one, two = (runs.lines_of(tmp_path / str(ranks)) for ranks in (1, 2))
    assert one[0]["rewards"] == two[0]["rewards"]
    assert told[0]["calls"] == told[1]["calls"] == told[0]["answered"] > 0 and told[0]["failed"] == 0
    assert sum(counts["http_500"] for counts in told) == sum(counts["retried"] for counts in told) == 2
    assert all(counts["seconds"] > 0 and counts["opened"] == 0 for counts in told)
    terms = one[0]["rewards"]
    # The oracle draws labels at random: by rule the shipped policy would have most general rows right, or all wrong.
    assert {"task_aware", "helpful"} <= set(terms["general"])


def test_a_dead_judge_stops_the_run_and_the_run_goes_on_when_it_is_back(tmp_path, rows):
    server = FaultServer()
    server.start()
    command = runs.small(*runs.from_file(rows), *judged(server), "--checkpoint.every", 1, "--run-dir", tmp_path / "run",
                         "--reward.judge-cache", tmp_path / "cache")
    server.stop()
    dead = runs.train(command, tmp_path / "logs")
    assert dead.code == 1 and server.url in dead.err[0] and "Traceback" not in dead.err[0], dead.err[0]
    server.start()
    try:
        runs.train(command, tmp_path / "logs").check()
    finally:
        server.stop()


def test_a_run_goes_on_with_a_judge_that_moved_and_not_with_another_one(tmp_path, rows):
    """Killed after its first checkpoint. Verdicts are a function of the request, so that all must come out equal."""
    command = lambda server, run, cache="cache": runs.small(
        *runs.from_file(rows), *judged(server, "--reward.judge-cache", tmp_path / cache), "--run-dir", tmp_path / run)
    metrics = tmp_path / "run" / "stage2" / "metrics.jsonl"
    with FaultServer() as first:
        kill = functools.partial(runs.kill_when, "cosmo_rl.cpgd.update:clip_grad_norm", 3, metrics)
        assert runs.train(command(first, "run"), tmp_path / "logs", before=kill).code == -9
    with FaultServer() as second, FaultServer(model="another") as other:
        refused = runs.train(command(other, "run"), tmp_path / "logs")
        assert refused.code == 1 and "Traceback" not in refused.err[0] and other.calls == 0, refused.err[0]
        assert ("belongs to a run with other settings: reward.judges.general.model is 'judge' there and 'another' here"
                in refused.err[0]), refused.err[0]
        moved = command(second, "run", "another cache")
        runs.train([part if not str(part).endswith("attempts=3") else f"{part},timeout=9,in-flight=3"
                    for part in moved], tmp_path / "logs").check()
        calls = second.calls
        runs.train(command(second, "whole"), tmp_path / "logs").check()
    assert calls > 0 and runs.lines_of(tmp_path / "run") == runs.lines_of(tmp_path / "whole")
    assert took(tmp_path / "whole")[0]["cached"] > 0, "the first rollout was judged before"


def test_the_judges_are_closed_when_a_run_fails(monkeypatch):
    closed = []

    class Failing(Trainer):
        def __init__(self, *args):
            self.scorer = self.engine = SimpleNamespace(close=lambda: closed.append(True))

        def run(self):
            raise UserError("swordfish")

    monkeypatch.setattr(main, "Trainer", Failing)
    monkeypatch.setattr(main, "RunDir", lambda *args: SimpleNamespace(finished=False))
    assert main.main(runs.config()) == 1 and closed == [True, True]


def test_what_the_judges_took_is_told_by_endpoint_and_since_the_last_time():
    asked = [response(s.response.text, replace(s.row, answer="x")) for s in runs.rollout().samples[:8]]
    with FaultServer(script=["500", "429"]) as server, FaultServer() as another:
        config = RewardConfig(judges=(
            f"safework_safety={server.url},judge", f"helpful={another.url},judge", f"general={server.url},judge"))
        scorer = build_scorer(config, RowNeeds(config))
        scorer.submit(asked).result(timeout=60)
        first = judges_took(scorer)["judging"]
        again = judges_took(scorer)["judging"]
        scorer.close()
        scorer.close()
    assert set(first) == {"safework_safety+general", "helpful"}
    counts = first["safework_safety+general"]
    assert counts["calls"] == counts["answered"] == server.calls - 2 and counts["retried"] == 2
    assert counts["http_500"] == counts["http_429"] == 1
    assert counts["opened"] == counts["cached"] == counts["failed"] == 0
    assert first["helpful"]["calls"] == another.calls
    assert all(value == 0 for counts in again.values() for value in counts.values())


def test_bad_judges(tmp_path, rows):
    """What test_config.py and test_build.py hold of settings, as two ranks tell it: once, without a key or a trace."""
    done = runs.train(runs.small(*runs.from_file(rows), "--reward.judges", "helpful=http://x,m,sk-swordfish",
                                 "--run-dir", tmp_path / "run"), tmp_path / "logs", ranks=2)
    said = " ".join(done.err[0].replace("\u2502", " ").split())  # tyro frames it
    assert 0 not in done.codes and said.count("judge helpful: part 3 is no NAME=VALUE") == 1, done.err[0]
    assert "Traceback" not in said and "swordfish" not in said and not done.err[1] and not (tmp_path / "run").exists()
    done = runs.train(runs.small(*runs.from_file(rows), "--reward.safety", "hybrid", "--run-dir", tmp_path / "run"),
                      tmp_path / "logs")
    assert done.code == 1 and "the hybrid reward needs the judges qwen3guard and scalar" in done.err[0], done.err[0]


def test_judging_begins_before_sampling_ends():
    """The first batch is with the judges while the last one is still to be sampled."""
    requests = [s.response.request for s in runs.rollout().samples]
    order = []

    class Engine:
        replica = alone()

        def stream(self, requests, batch_size):
            for start in range(0, len(requests), batch_size):
                order.append("sample")
                yield [response("<think> a </think> b", one.row, request=one) for one in
                       requests[start:start + batch_size]]

    class Scorer:
        def submit(self, responses):
            order.append("ask")
            return SimpleNamespace(result=lambda: [{"helpful": Score(1.0)} for _ in responses])

    _, pending = sample(Engine(), requests, runs.config().rollout, lambda requests, longest: True, Scorer(), {})
    assert order == ["sample", "ask", "sample", "ask"], order
    assert sorted(i for indices, _ in pending for i in indices) == list(range(len(requests)))
