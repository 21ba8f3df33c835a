"""Terms that ask judges, and what stands in a safety judge's place: who is asked what, and what a reply becomes."""

from dataclasses import replace
from typing import Any

import pytest
from fault_server import FaultServer, text_of
from scoring import ROW, SEEN, UNSAFE, entries, response, scorer_of

from cosmo_rl.cpgd.config import RewardConfig
from cosmo_rl.cpgd.judges.client import Endpoint
from cosmo_rl.cpgd.judges.judge import JudgeClient, ScalarJudge, chat_judges
from cosmo_rl.cpgd.judges.loop import LoopThread
from cosmo_rl.cpgd.rewards.base import Failed, NotApplicable, Outcome, Score, Term
from cosmo_rl.cpgd.rewards.judge_terms import Hybrid, SafeGRPO, qwen3guard_hybrid, safegrpo
from cosmo_rl.data.schema import Row

LOOP = LoopThread()


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch):
    monkeypatch.setattr("cosmo_rl.cpgd.judges.client.BACKOFF_S", 0.01)


def terms_of(server: FaultServer, *names: str, more: str = ",attempts=3", **options: Any) -> dict[str, Term]:
    config = RewardConfig(judges=entries(server.url, *names, more=more), **{"refusal_value": 0.1, **options})
    scorer = scorer_of(config, [])
    scorer.close()
    return scorer.terms


def outcome(term: Term, text: str, row: Row = ROW) -> Outcome:
    return LOOP.submit(term(response(text, row))).result(timeout=60)  # pyright: ignore[reportArgumentType]


TAGS = {"image": "safe", "text": "unsafe", "combined": "unsafe"}


def tagged(visual: str, text: str, combined: str, answer: str = "I can't.") -> str:
    return (f"<think> a <visual_safe>{visual}</visual_safe> b <text_safe>{text}</text_safe> c "
            f"<combined_safe>{combined}</combined_safe> d </think> <answer>{answer}</answer>")


@pytest.mark.parametrize(("text", "refused", "value"), [
    (tagged("safe", "unsafe", "unsafe"), True, 1.0), (tagged("safe", "unsafe", "unsafe"), False, 0.5),
    (tagged("unsafe", "unsafe", "unsafe"), True, 0.875), (tagged("unsafe", "safe", "unsafe"), True, 0.75),
    (tagged("unsafe", "safe", "unsafe"), False, 0.25), (tagged("safe", "unsafe", "safe"), True, 0.0),
    (tagged("Safe", "UNSAFE", " unsafe "), True, 1.0), (tagged("maybe", "unsafe", "unsafe"), True, 0.0),
    (tagged("safe", "unsafe", "unsafe") + " more", True, 0.0),
    (tagged("safe", "unsafe", "unsafe").replace("</think>", ""), True, 0.0),
    (tagged("safe", "unsafe", "unsafe").replace("<answer>", ""), True, 0.0),
    ("<combined_safe>safe</combined_safe>" + tagged("safe", "unsafe", "unsafe"), True, 0.0), ("", True, 0.0),
    ("<text_safe>unsafe</text_safe><visual_safe>safe</visual_safe><combined_safe>unsafe</combined_safe></think>"
     "<answer>no</answer>", True, 0.0),
])
def test_safegrpo_formula(text, refused, value):
    assert safegrpo(text, TAGS, refused=refused) == value


def test_safegrpo_pays_nothing_for_saying_nothing():
    tags = {"image": "safe", "text": "safe", "combined": "safe"}
    assert [safegrpo(tagged("safe", "safe", "safe", answer), tags, refused=False) for answer in ("", " . ", "Yes.")
            ] == [0, 0, 1]


def test_safegrpo_as_a_term():
    row = replace(UNSAFE, tags=TAGS)
    assert outcome(SafeGRPO(), tagged("safe", "unsafe", "unsafe", "I'm sorry, but I can't."), row) == Score(1.0)
    assert outcome(SafeGRPO(), tagged("safe", "unsafe", "unsafe", "Sure."), row) == Score(0.5)
    failed = outcome(SafeGRPO(), tagged("safe", "safe", "safe"), replace(ROW, tags={"combined": "safe"}))
    assert isinstance(failed, Failed) and "the row has combined; add them" in failed.reason


def test_safegrpo_needs_no_judge():
    row = replace(UNSAFE, tags=TAGS)
    term = scorer_of(RewardConfig(safety="safegrpo"), []).terms["task_aware"]
    assert outcome(term, tagged("safe", "unsafe", "unsafe", "I can't help."), row) == Score(1.0)


@pytest.mark.parametrize(("helpfulness", "unsafe", "refusal", "value"), [
    (10, False, False, 1.0), (0, False, False, 0.5), (10, True, False, 0.0), (10, False, True, 0.25),
    (10, True, True, 0.0), (-8, False, True, 0.1), (-30, False, False, 0.0), (99, False, False, 1.0),
])
def test_the_hybrid_reward_and_its_map(helpfulness, unsafe, refusal, value):
    assert qwen3guard_hybrid(helpfulness, unsafe=unsafe, refusal=refusal) == pytest.approx(value)


THOUGHT = "<think> a secret thought </think> Eight minutes."


def test_the_thinking_is_hidden_unless_both_are_judged():
    verdicts = {"Eight minutes.": "Safe without risk", "a secret thought": "Safe without risk"}
    judge = lambda body: next(label for text, label in verdicts.items() if text in text_of(body))
    with FaultServer(oracle=judge) as server:
        plain_term = terms_of(server, "safework_safety")["task_aware"]
        assert outcome(plain_term, THOUGHT) == Score(1.0)
        assert "secret" not in str(server.bodies) and server.calls == 1
        both = terms_of(server, "safework_safety", judge_thinking=True)["task_aware"]
        assert outcome(both, THOUGHT) == Score(1.0)
        assert sum("secret" in str(body) for body in server.bodies) == 1 and server.calls == 3
        verdicts["a secret thought"] = "Unsafe"
        assert outcome(both, THOUGHT) == Score(0.0)
        assert outcome(plain_term, THOUGHT) == Score(1.0)
        assert outcome(both, "Eight minutes.") == Score(1.0), "nothing was thought"


@pytest.mark.parametrize("text", ["", "<think> never closed", "<think> a </think>  "])
def test_without_an_answer_nobody_is_asked(text):
    with FaultServer() as server:
        assert outcome(terms_of(server, "safework_safety")["task_aware"], text) == Score(0.0)
        assert server.calls == 0


@pytest.mark.parametrize(("task", "row", "mark_of_prompt"), [
    ("safety", UNSAFE, "Unnecessary refusal"), ("jailbreak", UNSAFE, "You see an assistant's response and not the"),
    ("jailbreak", ROW, "Unnecessary refusal"), ("value", ROW, "good or bad"), ("knowledge", ROW, "TRUE or FALSE"),
    ("general", ROW, "0, 0.5 or 1"),
])
def test_task_aware_routes_by_task(task, row, mark_of_prompt):
    with FaultServer() as server:
        term = terms_of(server, "safework_safety", "safework_value", "safework_knowledge", "general")["task_aware"]
        assert isinstance(outcome(term, THOUGHT, replace(row, task=task)), Score)
        assert mark_of_prompt in text_of(server.bodies[0]) and server.calls == 1


def test_tasks_without_a_judge_keep_their_rule_and_references_are_needed():
    with FaultServer() as server:
        term = terms_of(server, "safework_knowledge", "general", refusal_value=1.0)["task_aware"]
        assert outcome(term, "I'm sorry, but I can't.", UNSAFE) == Score(1.0)
        assert outcome(term, "x", replace(ROW, task="helpful")) == NotApplicable()
        for task in ("knowledge", "general"):
            failed = outcome(term, "x", replace(ROW, task=task, answer=None))
            assert isinstance(failed, Failed) and "`answer`, which is missing; add it" in failed.reason
        assert server.calls == 0


def test_helpful_is_silent_on_unsafe_rows_and_visual_focus_without_images():
    with FaultServer(oracle=lambda body: "yes" if "yes or no" in text_of(body) else "Helpful without warning",
                     logprobs=False) as server:
        terms = terms_of(server, "helpful", "visual_focus")
        assert outcome(terms["helpful"], THOUGHT) == Score(1.0)
        assert outcome(terms["helpful"], THOUGHT, UNSAFE) == NotApplicable()
        assert outcome(terms["visual_focus"], THOUGHT) == NotApplicable()
        assert outcome(terms["visual_focus"], "no thinking", SEEN) == Score(0.0)
        assert server.calls == 1
        assert outcome(terms["visual_focus"], THOUGHT, SEEN) == Score(1.0)
        assert "a secret thought" in text_of(server.bodies[-1]) and "Eight minutes" not in text_of(server.bodies[-1])
        assert "image_url" in str(server.bodies[-1])


def test_graded_values_come_from_log_probs():
    with FaultServer() as server:
        value = outcome(terms_of(server, "safework_value")["task_aware"], THOUGHT, replace(ROW, task="value"))
        assert isinstance(value, Score) and value.value not in (0.0, 1.0)
        assert server.bodies[0]["logprobs"] is True and server.bodies[0]["top_logprobs"] == 10
        hard = terms_of(server, "safework_value", more=",graded=no")["task_aware"]
        assert outcome(hard, THOUGHT, replace(ROW, task="value")) in (Score(0.0), Score(1.0))
        assert "logprobs" not in server.bodies[1]


def test_log_probs_on_some_replies_only_fail():
    with FaultServer() as server:
        term = terms_of(server, "safework_value")["task_aware"]
        row = replace(ROW, task="value")

        async def run() -> list[Outcome]:
            first = await term(response("<think> a </think> b", row))
            server.logprobs = False
            return [first, await term(response("<think> a </think> c", row))]

        first, second = LOOP.submit(run()).result(timeout=60)
        assert isinstance(first, Score) and isinstance(second, Failed) and "switch grading off" in second.reason


def test_an_unparsable_verdict_is_failed_never_a_score_and_never_cached(tmp_path):
    with FaultServer(oracle=lambda body: "I think it is fine.") as server:
        for _ in range(2):
            term = terms_of(server, "safework_safety", judge_cache=str(tmp_path))["task_aware"]
            failed = outcome(term, THOUGHT)
            assert isinstance(failed, Failed) and "safework_safety: the reply names none of" in failed.reason
            assert "'I think it is fine.'" in failed.reason
        assert server.calls == 2 and not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(("fault", "message"), [
    ("wrong_model", "is by model 'another-model', not 'judge'; ask for that name"),
    ("malformed", "no JSON"), ("500", "engine error"),
])
def test_a_server_that_stays_wrong_fails_the_term_and_names_itself_and_the_mend(fault, message):
    with FaultServer(script=[fault] * 3) as server:
        failed = outcome(terms_of(server, "safework_safety")["task_aware"], THOUGHT)
    assert isinstance(failed, Failed) and server.url in failed.reason and message in failed.reason


def test_scalar_heads_score_helpfulness():
    with FaultServer() as server:
        assert 0 <= getattr(outcome(terms_of(server, "scalar")["helpful"], THOUGHT), "value", -1) <= 1
        assert server.bodies[0]["input"] == "User: How long do I boil an egg?\n\nAssistant: Eight minutes."
        server.native = True
        failed = [outcome(terms_of(server, "scalar")["helpful"], f"answer {i}") for i in range(6)]
        assert any(isinstance(f, Failed) and "give an activation" in f.reason for f in failed)
        mapped = terms_of(server, "scalar", more=",activation=-10:10")["helpful"]
        assert all(isinstance(outcome(mapped, f"answer {i}"), Score) for i in range(6))


@pytest.mark.parametrize(("answer", "thought", "refusal", "want"), [
    ("Safe", "Safe", "No", None), ("Unsafe", "Safe", "No", 0.0), ("Safe", "Controversial", "No", 0.0),
    ("Safe", "Safe", "Yes", 0.25),
])
def test_the_hybrid_guards_thinking_and_answer(answer, thought, refusal, want):
    guard = lambda body: (f"Safety: {thought if 'secret' in text_of(body) else answer}\nCategories: None\n"
                          f"Refusal: {refusal}")
    with FaultServer(oracle=guard, native=True) as server:
        term = terms_of(server, "qwen3guard", "scalar", safety="hybrid")["task_aware"]
        got = outcome(term, THOUGHT)
        assert isinstance(got, Score) and server.calls == 3
        if want is None:
            assert 0 < got.value < 1
        else:
            assert got.value <= want
    assert outcome(Hybrid(*(JudgeClient(judge, Endpoint("http://127.0.0.1:1", "judge", attempts=1)) for judge in (
        chat_judges()["qwen3guard"], ScalarJudge()))), THOUGHT).__class__ is Failed
