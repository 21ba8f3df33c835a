"""A real run whose rewards come from judges: asked while sampling goes on, the same on two ranks, stopped when dead."""

# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportAttributeAccessIssue=false

import pytest
import runs
from fault_server import FaultServer

from cosmo_rl.cpgd import collect
from cosmo_rl.cpgd.collect import Verdicts, sample_groups
from cosmo_rl.cpgd.rewards.base import Score
from cosmo_rl.data.mini import general_rows, safety_rows


@pytest.fixture
def rows(tmp_path):
    return runs.write_rows(tmp_path / "rows.jsonl", [*safety_rows("validation")[:3], *general_rows("validation")[:3]])


def judged(server, *more):
    names = ("safework_safety", "helpful", "general")
    return ["--reward.judges", *(f"{name}={server.url},{server.model}" for name in names),
            "--reward.judge-attempts", 3, *more]


def test_judges_reward_a_run_on_one_and_two_ranks(tmp_path, rows):
    with FaultServer() as server:
        both = [runs.start(runs.small(*runs.from_file(rows), *judged(server), "--run-dir", tmp_path / str(ranks)),
                           tmp_path / "logs", ranks=ranks) for ranks in (1, 2)]
        for running in both:
            running.wait().check()
        assert server.calls > 0
    one, two = (runs.lines_of(tmp_path / str(ranks)) for ranks in (1, 2))
    assert one[0]["rewards"] == two[0]["rewards"]
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


def test_bad_judges(tmp_path, rows):
    cases = {
        ("helpfull=http://x,m",): "there is no judge 'helpfull'",
        ("helpful=http://x",): "judge helpful has 1 parts after the =; write helpful=URL,MODEL",
    }
    for judges, wanted in cases.items():
        done = runs.train(runs.small(*runs.from_file(rows), "--reward.judges", *judges, "--run-dir", tmp_path / "run"),
                          tmp_path / "logs")
        assert done.code == 1 and wanted in done.err[0] and "Traceback" not in done.err[0], done.err[0]
    done = runs.train(runs.small(*runs.from_file(rows), "--reward.safety", "hybrid", "--run-dir", tmp_path / "run"),
                      tmp_path / "logs")
    assert done.code == 1 and "the hybrid reward needs the judges qwen3guard and scalar" in done.err[0], done.err[0]


def test_judging_begins_before_sampling_ends(monkeypatch):
    """The first batch is with the judges while the last one is still to be sampled."""
    record, config = runs.rollout(), runs.config()
    order = []

    class Judging:
        def submit(self, samples):
            order.append("ask")
            done = runs.SimpleNamespace(result=lambda: [{"helpful": Score(1.0)} for _ in samples])
            return done

    generate = record.engine.generate
    monkeypatch.setattr(record.engine, "generate", lambda *a, **k: (order.append("sample"), generate(*a, **k))[1])
    monkeypatch.setattr(collect, "form_batches", lambda lengths, _: [list(range(8)), list(range(8, len(lengths)))])
    verdicts = Verdicts(Judging())
    samples = sample_groups(record.engine, record.rows, record.prompts, record.processor, config, step=0,
                            judge=verdicts.ask)
    assert order == ["sample", "ask", "sample", "ask"], order
    assert sorted(verdicts.collect()) == list(range(len(samples))), "every sample has its verdict"
