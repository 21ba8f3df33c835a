"""The guard by hand, and a real run that it stops, that will not go on silently, and that ends as if never stopped."""

import functools
import json
from dataclasses import replace
from typing import Literal

import pytest
import runs
from test_trainer import same_results

from cosmo_rl.cpgd.config import Config, EvalConfig
from cosmo_rl.cpgd.rewards.task_aware import TaskAware
from cosmo_rl.cpgd.run.evaluation import Answered, judged
from cosmo_rl.cpgd.run.guard import Guard, GuardError, watched
from cosmo_rl.data.prepare.mini import general_rows, safety_rows

BENIGN = safety_rows("validation")[1]
GENERAL = replace(general_rows("validation")[0], answer="red")
RIGHT, WRONG = "<think> x </think> red", "<think> x </think> blue"
HELPED, REFUSED = "<think> x </think> sure here is how", "<think> x </think> sorry i can not help with that"
RULES = TaskAware(1.0)


def answers(right, helped, of=10, general=GENERAL, said=RIGHT):
    """Answers of `of` general rows and as many benign ones."""
    return [*judged([Answered("general", general, said if i < right else WRONG) for i in range(of)], RULES),
            *(Answered("benign", BENIGN, HELPED if i < helped else REFUSED) for i in range(of)),
            Answered("unsafe", BENIGN, HELPED), Answered("heldout_attack_benign", BENIGN, REFUSED)]


def guard(mode: Literal["off", "warn", "stop"] = "warn", drop=0.1, **looks):
    out = Guard(EvalConfig(every=1, guard=mode, guard_drop=drop))
    for step, (right, helped) in looks.items():
        out.look(int(step[1:]), answers(right, helped))
    return out


def test_what_is_watched():
    assert watched(answers(7, 4), 0.1) == {"general_accuracy": 0.7, "benign_acceptance": 0.4}
    # right by value and by option, which is what the reward pays for; as texts all would be wrong
    math = answers(10, 0, of=20, general=replace(GENERAL, task="math", answer="1/2"), said=r"\boxed{0.5}")
    cats = replace(GENERAL, task="mcq", options=("dog", "cat"), answer="B")
    mcq = answers(3, 0, of=4, general=cats, said="(B)")
    assert watched([*math[:20], *mcq[:4]], 0.05) == {"general_accuracy": 13 / 24, "general_accuracy/math": 0.5}
    assert watched([*math[:20], *mcq[:4]], 0.25) == {"general_accuracy": 13 / 24, "general_accuracy/math": 0.5,
                                                     "general_accuracy/mcq": 0.75}
    assert watched([a for a in answers(1, 1) if "benign" not in a.group], 0.1) == {"general_accuracy": 0.1}
    assert watched(answers(1, 1)[-2:], 0.1) == {}
    broken = answers(1, 0, of=2, general=replace(GENERAL, task="math", answer="red or blue"))
    assert watched(broken, 0.5) == {"benign_acceptance": 0.0}, "what cannot be compared is not watched"


def test_a_fall_is_told_once_until_it_has_recovered(caplog):
    watch = guard(s0=(9, 8))
    down = lambda step, *counts: watch.look(step, answers(*counts)).get("guard", {})
    assert down(2, 10, 7) == down(4, 8, 8) == {} and not caplog.messages, "no more than 0.1 each"
    assert down(6, 7, 7) == {"general_accuracy": {"before": 0.9, "now": 0.7}}
    assert caplog.messages == ["--eval.guard: at step 6 general_accuracy fell from 0.900 to 0.700, by more than "
                               "--eval.guard-drop 0.1"]
    assert down(8, 5, 2) == {"general_accuracy": {"before": 0.9, "now": 0.5},
                             "benign_acceptance": {"before": 0.8, "now": 0.2}}
    assert len(caplog.messages) == 2 and "general_accuracy" not in caplog.messages[1]
    assert "at step 8 benign_acceptance fell from 0.800 to 0.200" in caplog.messages[1]
    assert list(down(10, 5, 8)) == ["general_accuracy"] and len(caplog.messages) == 2
    assert down(12, 9, 7) == {} and list(down(14, 7, 8)) == ["general_accuracy"]
    assert len(caplog.messages) == 3, "fallen again"
    watch.enforce()


def test_the_first_measurement_counts_not_the_best_nor_the_last():
    watch = guard("stop", s0=(5, 5), s2=(10, 10))
    assert watch.look(4, answers(4, 4)) == {}
    watch.enforce()
    assert watch.look(6, answers(3, 5)) == {"guard": {"general_accuracy": {"before": 0.5, "now": 0.3}}}


def test_stop_saves_and_says_how_to_go_on():
    watch, saved = guard("stop", s0=(9, 8)), []
    watch.enforce(lambda: saved.append(1))
    watch.look(4, answers(9, 5))
    with pytest.raises(GuardError, match=r"--eval\.guard stop: at step 4 benign_acceptance fell from 0\.800 to 0\.500, "
                                         r"by more than --eval\.guard-drop 0\.1\. The checkpoint of step 4 is saved; "
                                         r".*--eval\.guard warn or a larger --eval\.guard-drop"):
        watch.enforce(lambda: saved.append(2))
    assert saved == [2]


def resumed(state, mode, drop=0.1):
    out = guard(mode, drop)
    out.load_state_dict(json.loads(json.dumps(state)))
    return out


def test_what_a_checkpoint_remembers(caplog):
    state = guard("stop", s0=(9, 8), s4=(7, 8)).state_dict()
    with pytest.raises(GuardError, match=r"at step 4 general_accuracy fell from 0\.900 to 0\.700"):
        resumed(state, "stop").enforce()
    resumed(state, "stop", 0.25).enforce()
    warned = resumed(state, "warn")
    warned.enforce()
    assert warned.look(6, answers(7, 8)) and not caplog.messages, "still down: told when it fell"
    assert warned.look(8, answers(7, 5)) and "benign_acceptance fell from 0.800" in caplog.messages[0]
    off = resumed(state, "off")
    assert off.look(6, answers(0, 0)) == {}
    again = resumed(off.state_dict(), "stop")
    again.enforce()  # what was measured before it was off says nothing of now
    again.look(8, answers(6, 8))
    with pytest.raises(GuardError, match="step 8"):
        again.enforce()


def test_switched_on_later(caplog):
    for state in (None, guard("off").state_dict()):
        late = guard("stop")
        late.load_state_dict(state)
        caplog.clear()
        assert late.look(40, answers(5, 5)) == {}
        assert caplog.messages == ["--eval.guard: not measured before training; later numbers are held against step 40"]
        late.look(42, answers(3, 5))
        with pytest.raises(GuardError, match=r"fell from 0\.500 to 0\.300"):
            late.enforce()


def test_nothing_to_watch(caplog):
    with pytest.raises(ValueError, match=r"stop has no rows to watch; give general rows .* --data\.eval-path"):
        guard("stop").look(0, [])
    watch = guard("warn")
    assert watch.look(0, []) == watch.look(4, []) == {}
    assert len(caplog.messages) == 1 and "no rows to watch" in caplog.messages[0]


@pytest.mark.parametrize(("options", "message"), [
    ({"guard": "stop"}, r"--eval\.guard stop needs measurements, and --eval\.every is 0; give it a number of steps"),
    ({"guard": "warn", "every": 2, "guard_drop": 1.0}, r"--eval\.guard-drop is 1\.0; give a share"),
    ({"guard_drop": -0.1}, r"--eval\.guard-drop is -0\.1"),
    ({"guard_drop": float("nan")}, r"--eval\.guard-drop is nan"),
])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Config(eval=EvalConfig(**options))


def test_the_guard_is_no_part_of_a_run():
    base = Config(eval=EvalConfig(every=4))
    assert Config(eval=EvalConfig(every=4, guard="stop", guard_drop=0.2)).hash() == base.hash()
    assert Config(eval=EvalConfig(every=4, max_rows=5)).hash() != base.hash()


def test_a_stopped_run_goes_on_when_told_to_and_ends_the_same(tmp_path):
    """With dynamic sampling and a curriculum. Killed before its first rollout, stopped, repeated on two ranks, killed
    between two rounds of sampling."""
    rows = runs.write_rows(tmp_path / "data" / "rows.jsonl", runs.small_rows())
    held = runs.write_rows(tmp_path / "held" / "rows.jsonl", runs.held_rows())
    # a rate at which the shipped policy loses within four steps what it can
    options = ["--data.path", rows, "--data.mix", "general=0.5", "unsafe=0.5", "--data.eval-path", held,
               "--rollout.dynamic-sampling", 1, "--data.curriculum", 0.05, 0.95, "--eval.every", 4,
               "--optim.learning-rate", 2e-3, "--log.tensorboard", False]
    command = lambda name, mode: runs.small(*options, "--run-dir", tmp_path / name, "--eval.guard", mode)
    whole = runs.train(command("whole", "warn"), tmp_path / "logs").check()
    assert whole.err[0].count("--eval.guard: at step 4 ") == 1 and "--eval.guard: at step 8" not in whole.err[0]
    evals = [json.loads(line) for line in (tmp_path / "whole" / "stage2" / "evals.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in evals] == [0, 4, 8]
    assert ["guard" in entry for entry in evals] == [False, True, True]
    fall = evals[1]["guard"]["general_accuracy"]
    assert fall == {"before": evals[0]["sampled"]["general_accuracy"], "now": evals[1]["sampled"]["general_accuracy"]}

    stage = tmp_path / "run" / "stage2"
    kill = functools.partial(runs.kill_when, "cosmo_rl.data.sampler:PromptSampler.take", 0, stage / "metrics.jsonl")
    assert runs.train(command("run", "stop"), tmp_path / "logs", before=kill).code == -9
    assert (stage / "evals.jsonl").read_text().count("\n") == 1, "killed once step 0 is measured; measured again"
    message = "train.py: --eval.guard stop: at step 4 "
    for ranks in (1, 2):
        done = runs.train(command("run", "stop"), tmp_path / "logs", ranks=ranks)
        assert done.codes == [1] * ranks, done.err
        assert all(err.count(message) == 1 and "Traceback" not in err for err in done.err), done.err
        assert (stage / "checkpoints" / "latest").read_text() == "step-000004\n"
        assert len(runs.lines_of(tmp_path / "run")) == 4 and not (stage / "report.json").exists()
    kill = functools.partial(runs.kill_when, "cosmo_rl.data.sampler:PromptSampler.replace", 6, stage / "metrics.jsonl",
                             True)
    assert runs.train(command("run", "warn"), tmp_path / "logs", before=kill).code == -9
    assert len(runs.lines_of(tmp_path / "run")) == 6, "killed in the rollout of step 6"
    runs.train(command("run", "warn"), tmp_path / "logs").check()
    same_results(tmp_path / "run", tmp_path / "whole")
    assert sum(sum(line["refill"]["dropped"].values()) for line in runs.lines_of(tmp_path / "run")[::2]) >= 4
