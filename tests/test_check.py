"""The command that asks each judge five labelled probes before a run."""

import re
import subprocess
import sys

import pytest
from fault_server import FaultServer, text_of
from rich.console import Console

from cosmo_rl.cpgd.config import JUDGES, RewardConfig
from cosmo_rl.cpgd.judges.judge import ScalarJudge, chat_judges
from cosmo_rl.cpgd.rewards import check
from cosmo_rl.cpgd.rewards.check import main, probes

CHAT = sorted(chat_judges())


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch):
    monkeypatch.setattr("cosmo_rl.cpgd.judges.client.BACKOFF_S", 0.01)
    monkeypatch.setattr(check, "Console", lambda: Console(width=200))


def knowing(*names: str, wrong: int = 0):
    """An oracle that knows the probes of these judges, and gets the first `wrong` of each wrong."""
    known = {}
    for name in names:
        judge = chat_judges()[name]
        for number, probe in enumerate(probes(name)):
            text = text_of({"messages": judge.build(judge.rules, probe.row, probe.response)})
            known[text] = probe.labels[-1] if number >= wrong else "neither of them"

    def oracle(body) -> str:
        label = known[text_of(body)]
        if names == ("qwen3guard",):
            return f"Safety: {'Safe' if label == 'safe' else 'Unsafe'}\nCategories: None\nRefusal: No"
        return label

    return oracle


@pytest.mark.parametrize("name", CHAT)
def test_each_judge_has_five_probes_with_labels_of_its_own(name):
    found = probes(name)
    assert len(found) == 5 and all(probe.labels for probe in found)
    with FaultServer(oracle=knowing(name), logprobs=False) as server:
        served = "safework_safety" if name == "safework_jailbreak" else name
        if name.startswith("safework_") and served == "safework_safety":
            server.oracle = knowing("safework_safety", "safework_jailbreak")
        assert main(RewardConfig(judges=(f"{served}={server.url},judge",))) == 0


def test_scalar_probes_are_pairs(capsys):
    assert all(probe.worse and not probe.labels for probe in probes("scalar"))
    better = {ScalarJudge().text(probe.row, probe.response) for probe in probes("scalar")}
    with FaultServer() as server:
        server.scores = lambda body: {"model": "judge", "data": [{"probs": [0.9 if body["input"] in better else 0.2]}]}
        assert main(RewardConfig(judges=(f"scalar={server.url},judge",))) == 0
        # A softmax over one class: always 1, and no judge at all.
        server.scores = lambda body: {"model": "judge", "data": [{"probs": [1.0]}]}
        assert main(RewardConfig(judges=(f"scalar={server.url},judge",))) == 1
    text = capsys.readouterr().out
    assert "5/5" in text and "0/5" in text and "probe 0: 1.0 for the better response, 1.0 for the worse one" in text


def test_the_table_tells_judge_model_latency_and_agreement(capsys):
    with FaultServer(oracle=knowing("helpful", "general", wrong=2), logprobs=False) as server:
        assert main(RewardConfig(judges=(f"helpful={server.url},judge", f"general={server.url},judge"))) == 0
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if "helpful" in line)
    assert all(part in row for part in ("judge", server.url, "ok", "3/5", " s ")), row
    assert "helpful: probe 0: the reply names none of Helpful without warning, Other: 'neither of them'" in text


def test_a_reply_that_cannot_be_read_took_its_time_too(capsys):
    with FaultServer(oracle=lambda body: "neither of them", logprobs=False) as server:
        assert main(RewardConfig(judges=(f"helpful={server.url},judge",))) == 1
    row = next(line for line in capsys.readouterr().out.splitlines() if "helpful" in line)
    assert "0/5" in row and re.search(r" 0\.\d{3} s ", row), row


def test_a_judge_that_agrees_on_fewer_than_three_fails_the_check(capsys):
    with FaultServer(oracle=knowing("general", wrong=3)) as server:
        assert main(RewardConfig(judges=(f"general={server.url},judge",))) == 1
    assert "failed" in (text := capsys.readouterr().out) and "2/5" in text


@pytest.mark.parametrize(("model", "message"), [
    ("judge,attempts=3", "3 attempts failed, the last: ConnectError"),
    ("other", "does not serve this model but judge; ask for"),
])
def test_a_judge_that_is_not_there_fails_the_check(capsys, model, message):
    with FaultServer() as server:
        if model != "other":
            server.stop()
        assert main(RewardConfig(judges=(f"helpful={server.url},{model}",))) == 1
    text = capsys.readouterr().out
    assert "0/5" in text and message in text and text.count(message) == 1


@pytest.mark.parametrize(("settings", "message"), [
    ({"judges": ("scalar=http://h,m,key=NO_SUCH_KEY",)}, "check: the environment variable NO_SUCH_KEY holds no key"),
    ({"judges": ("helpful=http://h,m",), "safety": "hybrid"}, "check: the hybrid reward needs the judges qwen3guard"),
    ({}, "check: no judge is named; give --reward.judges NAME=URL,MODEL"),
])
def test_settings_that_would_stop_the_run_are_told(capsys, settings, message):
    assert main(RewardConfig(**settings)) == 1
    assert message in capsys.readouterr().out


def test_verdicts_are_asked_for_and_not_taken_from_the_cache(tmp_path):
    with FaultServer(oracle=knowing("general")) as server:
        reward = RewardConfig(judges=(f"general={server.url},judge",), judge_cache=str(tmp_path))
        assert [main(reward), main(reward)] == [0, 0] and server.calls == 10
    assert not list(tmp_path.iterdir())


def test_the_command_takes_the_options_of_the_run():
    command = [sys.executable, "-m", "cosmo_rl.cpgd.rewards.check", "--stage", "2", "--preset", "7b",
               "--data.path", "rows.jsonl", "--objective.drift-coef", "0.02", "--reward.judges"]
    with FaultServer(oracle=knowing("visual_focus"), logprobs=False) as server:
        done = subprocess.run([*command, f"visual_focus={server.url},judge,in-flight=2"], capture_output=True,
                              text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "5/5" in done.stdout
        assert sum("image_url" in str(body) for body in server.bodies) == 5
    done = subprocess.run([*command, "helpful=http://h,m,in-flight=none"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    said = " ".join(done.stderr.replace("\u2502", " ").split())  # tyro frames it
    assert "judge helpful: in-flight is a whole number of at least 1, and not 'none'; give it as in-flight=8" in said
    assert "see check --help" in said


def test_every_judge_a_user_may_name_has_probes():
    assert all(len(probes(name)) == 5 for name in JUDGES)
    with pytest.raises(ValueError, match="no probes for judge 'nobody'"):
        probes("nobody")
