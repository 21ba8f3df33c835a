"""What is built from settings and rows: who decides what, and which rows and settings could never be scored."""

import json
from dataclasses import replace

import pytest
from scoring import entries, scorer_of

from cosmo_rl.cpgd.config import RewardConfig
from cosmo_rl.cpgd.rewards.build import RowNeeds, build_scorer
from cosmo_rl.cpgd.rewards.visual_focus import Elements
from cosmo_rl.cpgd.run.recipes import recipe
from cosmo_rl.data.prepare.mini import general_rows, safety_rows
from cosmo_rl.data.schema import Row

AT = "=http://127.0.0.1:1,m"


def row(task="general", **fields):
    return Row(id="r1", task=task, domain="d", messages=({"role": "user", "content": "q"},), source="test",
               licence="Apache-2.0", **fields)


def test_build_drops_terms_without_weight():
    scorer = scorer_of(RewardConfig(helpful=0.0, visual_focus_mode="contrast"), [row(answer="red")])
    assert scorer.weights == {"format": 0.1, "visual_focus": 0.2, "task_aware": 1.0}
    assert list(scorer.weights) == ["format", "visual_focus", "task_aware"]
    assert list(scorer.terms) == ["format", "task_aware"] and scorer.needs_policy
    assert not scorer_of(RewardConfig(), [row(answer="red")]).needs_policy


def test_build_takes_every_task():
    rows = [row(answer="red"), row("knowledge", answer="red"), row("value", answer="red"), row("math", answer="4 m"),
            row("mcq", answer="red", options=("red", "blue")), row("helpful"), row("safety", tags={"combined": "safe"}),
            row("ifeval", constraints=({"id": "punctuation:no_comma", "kwargs": {}},))]
    problems = lambda rows, **more: [bool(RowNeeds(RewardConfig(**more)).problem(row)) for row in rows]
    assert not any(problems(rows)) and problems([row("value"), row("math", answer="4+")]) == [True, True]
    assert problems([row("value")], judges=("safework_value=http://127.0.0.1:9,m",)) == [False]


@pytest.mark.parametrize(("config", "rows", "message"), [
    (RewardConfig(), [row(answer="red"), row("value")], "row r1: .* no reward rule for task value without `answer`; "
     "add it, name judge safework_value in --reward.judges, or set --reward.task-aware 0"),
    (RewardConfig(), [row("knowledge")], "row r1: task knowledge is rewarded against `answer`, which is missing"),
    (RewardConfig(), [row("math")], "row r1: task math is rewarded against `answer`, which is missing"),
    (RewardConfig(), [row("math", answer="4"), row("math", answer="4+")], "row r1: `answer` '4[+]': math-verify"),
    (RewardConfig(), [row("mcq", answer="C", options=("red", "blue"))], "row r1: `answer` 'C' does not name exactly"),
    (RewardConfig(), [row("ifeval", constraints=({"id": "x"},))], "row r1: there is no constraint 'x'"),
    (RewardConfig(), [row()], "row r1: task general is rewarded against `answer`, which is missing"),
    (RewardConfig(refusal_value=1.5), [], r"--reward.refusal-value is 1.5; give a value in \[0, 1\]"),
    (RewardConfig(format=0, visual_focus=0, helpful=0, task_aware=0), [], "every reward weight is 0"),
])
def test_build_refuses_what_could_never_be_scored(config, rows, message):
    with pytest.raises(ValueError, match=message):
        scorer_of(config, rows)
    if rows:
        assert "task_aware" not in scorer_of(RewardConfig(task_aware=0.0), rows).terms


@pytest.mark.parametrize(("names", "safety", "message"), [
    (("safework_safety", "qwen3guard"), "judge", "several judges, safework_safety, qwen3guard; name one"),
    (("qwen3guard",), "hybrid", "needs the judges qwen3guard and scalar, not qwen3guard"),
    (("helpful", "scalar"), "judge", "helpfulness has two judges, helpful and scalar; name one"),
])
def test_judges_that_do_not_fit_are_refused(names, safety, message):
    with pytest.raises(ValueError, match=message):
        RowNeeds(RewardConfig(judges=entries("http://h", *names), safety=safety))


def test_the_hybrid_reward_wants_raw_scores():
    both = RewardConfig(judges=("qwen3guard=http://h,m", "scalar=http://h,m,activation=sigmoid"), safety="hybrid")
    with pytest.raises(ValueError, match="takes raw scores, and judge scalar has activation=sigmoid; drop it"):
        RowNeeds(both)


def test_the_tasks_that_no_judge_takes_are_known():
    rows = [*safety_rows("validation")[:2], general_rows("validation")[0]]
    reward = recipe("7b", 2).reward
    for judges, ruled in (((), {"safety", "general"}), (("safework_safety" + AT,), {"general"})):
        needs = RowNeeds(replace(reward, judges=judges))
        assert not any(map(needs.problem, rows)) and needs.ruled == ruled


def test_one_rank_looks_at_the_rows_and_the_others_load_what_it_found():
    config = RewardConfig(function_tasks=(), judges=("general=http://127.0.0.1:1,m",))
    rows = [row(answer="red", key_elements=("cup", "Knife")), row("math", answer="4", key_elements=("cup",)),
            row("helpful")]
    first, second = RowNeeds(config), RowNeeds(config)
    assert [first.problem(one) for one in rows] == ["", "", ""]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.tasks == {"general", "math", "helpful"} and second.ruled == {"math", "helpful"}
    for needs in (first, second):
        scorer = build_scorer(config, needs)
        elements = scorer.terms["visual_focus"]
        assert isinstance(elements, Elements) and elements.vocabulary == {("cup",), ("knife",)}
        scorer.close()


def test_judges_are_asked_for_terms_with_a_weight_alone():
    clients = lambda **weights: set(scorer_of(RewardConfig(judges=entries("http://127.0.0.1:1", "helpful"), **weights),
                                              []).clients)
    assert clients() == {"helpful"} and clients(helpful=0.0) == set()
