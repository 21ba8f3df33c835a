"""The command that asks each judge five labelled probes before a run."""

import subprocess
import sys

import pytest
from fault_server import FaultServer, text_of
from rich.console import Console

from cosmo_rl.cpgd.rewards import check
from cosmo_rl.cpgd.rewards.check import CheckOptions, main, probes
from cosmo_rl.cpgd.rewards.judged import NAMES
from cosmo_rl.cpgd.rewards.judges import ScalarJudge, judges
from cosmo_rl.data import endpoint as endpoint_module

CHAT = sorted(judges())


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch):
    monkeypatch.setattr(endpoint_module, "BACKOFF_S", 0.01)
    monkeypatch.setattr(check, "Console", lambda: Console(width=200))


def knowing(*names: str, wrong: int = 0):
    """An oracle that knows the probes of these judges, and gets the first `wrong` of each wrong."""
    known = {}
    for name in names:
        judge = judges()[name]
        for number, probe in enumerate(probes(name)):
            text = text_of({"messages": judge.build(judge.rules, probe.row, probe.response, probe.thinking)})
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
        assert main(CheckOptions(judges=(f"{served}={server.url},judge",))) == 0


def test_scalar_probes_are_pairs(capsys):
    assert all(probe.worse and not probe.labels for probe in probes("scalar"))
    better = {ScalarJudge().text(probe.row, probe.response) for probe in probes("scalar")}
    with FaultServer() as server:
        server.scores = lambda body: {"model": "judge", "data": [{"probs": [0.9 if body["input"] in better else 0.2]}]}
        assert main(CheckOptions(judges=(f"scalar={server.url},judge",))) == 0
        # A softmax over one class: always 1, and no judge at all.
        server.scores = lambda body: {"model": "judge", "data": [{"probs": [1.0]}]}
        assert main(CheckOptions(judges=(f"scalar={server.url},judge",))) == 1
    text = capsys.readouterr().out
    assert "5/5" in text and "0/5" in text and "probe 0: 1.0 for the better response, 1.0 for the worse one" in text


def test_the_table_tells_judge_model_latency_and_agreement(capsys):
    with FaultServer(oracle=knowing("helpful", "general", wrong=2), logprobs=False) as server:
        assert main(CheckOptions(judges=(f"helpful={server.url},judge", f"general={server.url},judge"))) == 0
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if "helpful" in line)
    assert all(part in row for part in ("judge", server.url, "ok", "3/5", " s ")), row
    assert "helpful: probe 0: the reply names none of Helpful without warning, Other: 'neither of them'" in text


def test_a_judge_that_agrees_on_fewer_than_three_fails_the_check(capsys):
    with FaultServer(oracle=knowing("general", wrong=3)) as server:
        assert main(CheckOptions(judges=(f"general={server.url},judge",))) == 1
    assert "failed" in (text := capsys.readouterr().out) and "2/5" in text


@pytest.mark.parametrize(("model", "message"), [
    ("judge", "3 attempts failed, the last: ConnectError"), ("other", "does not serve this model but judge; ask for"),
])
def test_a_judge_that_is_not_there_fails_the_check(capsys, model, message):
    with FaultServer() as server:
        if model == "judge":
            server.stop()
        assert main(CheckOptions(judges=(f"helpful={server.url},{model}",))) == 1
    text = capsys.readouterr().out
    assert "0/5" in text and message in text and text.count(message) == 1


@pytest.mark.parametrize(("judge", "message"), [
    ("nobody=http://h,m", "check: there is no judge 'nobody'"),
    ("scalar=http://h,m,NO_SUCH_KEY", "NO_SUCH_KEY holds no key"),
])
def test_bad_options_are_named(capsys, judge, message):
    assert main(CheckOptions(judges=(judge,))) == 1
    assert message in capsys.readouterr().out
    assert main(CheckOptions(judges=())) == 1


def test_the_command():
    with FaultServer(oracle=knowing("visual_focus"), logprobs=False) as server:
        done = subprocess.run([sys.executable, "-m", "cosmo_rl.cpgd.rewards.check", "--judges",
                               f"visual_focus={server.url},judge"], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "5/5" in done.stdout
        assert sum("image_url" in str(body) for body in server.bodies) == 5


def test_every_judge_a_user_may_name_has_probes():
    assert all(len(probes(name)) == 5 for name in NAMES)
    with pytest.raises(ValueError, match="no probes for judge 'nobody'"):
        probes("nobody")
