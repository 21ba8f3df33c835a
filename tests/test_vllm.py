"""The judges' client against a real vLLM server (`make test-vllm`).

It serves the shipped policy, no judge: what it says is no verdict, unless the server holds it to the labels (vLLM's
structured output). Beside it a classification head with random weights.
"""

# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportAttributeAccessIssue=false

import asyncio
import os
import subprocess
import sys
from dataclasses import replace

import httpx2
import numpy as np
import pytest
import runs
import torch
from scoring import response
from vllm_server import START_S, VllmServer, save_head

from cosmo_rl.cpgd.judges.client import Endpoint, EndpointDown, EndpointError, Rejected
from cosmo_rl.cpgd.judges.judge import JudgeClient, ScalarJudge, chat_judges
from cosmo_rl.cpgd.rewards import build
from cosmo_rl.cpgd.rewards.base import Failed, Score
from cosmo_rl.cpgd.rewards.judge_terms import Grounded, JudgeTerm
from cosmo_rl.cpgd.run.metrics import read_metrics
from cosmo_rl.data.collate import encode_prompt
from cosmo_rl.data.prepare.mini import general_rows, safety_rows
from cosmo_rl.model.load import load_model

pytestmark = pytest.mark.vllm

SEEN = replace(general_rows("validation")[0], answer="red")
ROWS = (SEEN, runs.text_only(SEEN))
ANSWER, THINKING = "It is a red circle.", "There is one shape, and it is red."
SAID = {
    "safework_safety": ("Safe with refusal", "Unsafe"), "safework_jailbreak": ("Safe with refusal", "Unsafe"),
    "safework_value": ("good", "bad"), "safework_knowledge": ("TRUE", "FALSE"),
    "helpful": ("Helpful without warning", "Other"), "general": ("0", "0.5", "1"), "visual_focus": ("yes", "no"),
    "qwen3guard": ("Safety: Safe\nCategories: None\nRefusal: No", "Safety: Unsafe\nCategories: None\nRefusal: No"),
    "llama_guard_4": ("safe", "unsafe"),
}
"""What a trained judge would say."""


@pytest.fixture(scope="module")
def servers(request, tmp_path_factory):
    """(chat server, pooling server, the head that the latter serves)."""
    folder = tmp_path_factory.mktemp("vllm")
    head = save_head(folder / "head")
    both = (VllmServer("tiny", runs.MODEL, folder), VllmServer("head", folder / "head", folder, "--runner", "pooling"))
    try:
        for server in both:
            server.start()
        for server in both:
            server.wait()
        picture = {"role": "user", "content": [{"type": "image", "image": SEEN.images[0]}]}
        use(both[0], lambda endpoint: endpoint.chat([picture], max_tokens=1), timeout_s=START_S)  # the first takes long
        yield *both, head
    finally:
        for server in both:
            server.stop()
        if request.session.testsfailed:
            reporter = request.config.pluginmanager.getplugin("terminalreporter")
            for server in both:
                reporter.write_line(f"\n-- end of {server.name}.log\n{server.last_words()}")


@pytest.fixture
def chat(servers):
    return servers[0]


@pytest.fixture
def pooling(servers):
    return servers[1]


def use(server, action, *, model="", **options):
    """(result of `action` on an endpoint of the server, the endpoint's counts)"""

    async def run():
        endpoint = Endpoint(server.url, model or server.name, **options)
        try:
            return await action(endpoint), dict(endpoint.counts)
        finally:
            await endpoint.aclose()

    return asyncio.run(run())


def ask(text, **options):
    return lambda endpoint: endpoint.chat([{"role": "user", "content": text}], **{"max_tokens": 4, **options})


def held_to(labels):
    return {"structured_outputs": {"choice": list(labels)}}


def outcomes_of(judge, server, **options):
    """What the judge's term makes of ROWS, and the endpoint's counts."""

    async def action(endpoint):
        client = JudgeClient(judge, endpoint)
        term = Grounded(client) if judge.name == "visual_focus" else JudgeTerm(client)
        rows = ROWS[:1] if judge.name == "visual_focus" else ROWS
        return await asyncio.gather(*(term(response(f"<think>{THINKING}</think>{ANSWER}", row)) for row in rows))

    return use(server, action, **options)


# -- calls ------------------------------------------------------------------------------------------------------------

def test_a_served_model_is_verified_and_another_is_not(chat):
    use(chat, lambda endpoint: endpoint.verify())
    with pytest.raises(EndpointError, match="does not serve this model but tiny; ask for"):
        use(chat, lambda endpoint: endpoint.verify(), model="other")


@pytest.mark.parametrize("row", ROWS, ids=("picture", "text"))
def test_log_probs_are_those_of_our_own_forward(chat, row):
    """So picture, chat template and log-probs went through HTTP and the server as they are."""
    content = row.messages[0]["content"]
    if row.images:
        content = [{"type": "image", "image": row.images[0]}, content[1]]
    reply, counts = use(chat, lambda endpoint: endpoint.chat(
        [{"role": "user", "content": content}], max_tokens=2, top_logprobs=10))
    assert counts == {"calls": 1, "answered": 1}
    prompt = encode_prompt(row, runs.load_processor(runs.MODEL), max_prompt_tokens=2048, max_image_pixels=10**6)
    shown = {} if prompt.pixel_values is None else {
        "pixel_values": torch.tensor(prompt.pixel_values), "image_grid_thw": torch.tensor(prompt.image_grid_thw)}
    with torch.no_grad():
        logits = load_model(runs.MODEL)(
            input_ids=torch.tensor(prompt.input_ids)[None], position_ids=torch.tensor(prompt.position_ids)[:, None],
            mm_token_type_ids=torch.tensor(prompt.mm_token_type_ids)[None], **shown).logits
    want = logits[0, -1].log_softmax(-1).topk(10).values
    got = [logprob for _, logprob in reply.top]
    np.testing.assert_allclose(got, want, atol=1e-3)


def test_a_seed_repeats_a_sample(chat):
    say = lambda seed: use(chat, ask("a shape", max_tokens=24, temperature=2.0, seed=seed))[0].text
    assert say(1) == say(1)
    assert len({say(seed) for seed in range(2, 6)}) > 1


def bad_picture(endpoint):
    url = {"url": "data:image/png;base64,AAAA"}
    return endpoint.chat([{"role": "user", "content": [{"type": "image_url", "image_url": url}]}], max_tokens=1)


@pytest.mark.parametrize(("action", "model", "kind", "message"), [
    (ask("egg"), "other", EndpointError, "HTTP 404 'The model `other` does not exist"),
    (ask("egg " * 3000), "", Rejected, "HTTP 400 \"This model's maximum context length is 2048 tokens"),
    (ask("egg", top_logprobs=30), "", Rejected, "HTTP 400 'Requested sample logprobs of 30"),
    (bad_picture, "", Rejected, "HTTP 400 'Failed to load image"),
    (lambda endpoint: endpoint.classify("egg"), "", EndpointError, "HTTP 404 'Not Found'"),
], ids=("model", "long", "logprobs", "picture", "path"))
def test_errors_are_told_and_not_retried(chat, action, model, kind, message):
    async def both(endpoint):
        with pytest.raises(EndpointError) as caught:
            await action(endpoint)
        return caught.value, dict(endpoint.counts), endpoint.breaker.failures

    error, counts, failures = use(chat, both, model=model)[0]
    assert type(error) is kind and message in str(error), error
    assert counts["failed"] == 1 and not counts.get("retried") and not failures
    use(chat, ask("egg"))


def test_no_more_calls_are_in_flight_than_allowed(chat):
    async def action(endpoint):
        calls = asyncio.gather(*(ask(f"egg {i}", max_tokens=32)(endpoint) for i in range(64)))
        loads = []
        async with httpx2.AsyncClient(timeout=60.0) as http:
            while not calls.done():
                loads.append((await http.get(f"{chat.url}/load")).json()["server_load"])
                await asyncio.sleep(0.01)
        return await calls, loads

    (replies, loads), counts = use(chat, action, max_in_flight=8)
    assert len(replies) == 64 and counts["answered"] == 64
    assert 4 <= max(loads) <= 8, loads


# -- judges -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", chat_judges())
def test_nonsense_is_a_failure_and_never_a_score(chat, name):
    judge = chat_judges()[name]
    outcomes, counts = outcomes_of(judge, chat)
    assert all(isinstance(found, Failed) and found.reason.startswith(f"{name}: ") for found in outcomes), outcomes
    assert counts == {"calls": len(outcomes), "answered": len(outcomes)}, "the server took every request"


@pytest.mark.parametrize("name", chat_judges())
def test_a_judge_held_to_its_labels_gives_scores(chat, name):
    judge = replace(chat_judges()[name], max_tokens=64)  # to the tiny tokenizer a label is many tokens
    outcomes, _ = outcomes_of(judge, chat, extra_body=held_to(SAID[name]))
    assert all(isinstance(found, Score) for found in outcomes), outcomes


@pytest.mark.parametrize("name", [name for name, judge in chat_judges().items() if judge.top_logprobs])
def test_probability_of_the_good_label(chat, name):
    judge = replace(chat_judges()[name], max_tokens=64)
    messages = judge.build(judge.rules, SEEN, ANSWER)
    reply, _ = use(chat, lambda endpoint: endpoint.chat(
        messages, max_tokens=judge.max_tokens, top_logprobs=judge.top_logprobs), extra_body=held_to(SAID[name]))
    good, bad = (sum(float(np.exp(logprob)) for token, logprob in reply.top if label.startswith(token))
                 for label in SAID[name])
    assert abs(good + bad - 1) < 1e-3, "nothing else was possible"
    verdict = judge.read(reply)
    assert verdict.probability == pytest.approx(good, abs=1e-3)
    assert verdict.label == SAID[name][0 if good > bad else 1]


# -- a scalar head ----------------------------------------------------------------------------------------------------

def test_scalar_head(servers):
    _, server, head = servers
    tokenizer = runs.load_processor(runs.MODEL).tokenizer
    values = {}
    for activation, extra_body in (("none", {}), ("sigmoid", {"use_activation": False})):
        judge = ScalarJudge(activation=activation)
        outcomes, counts = outcomes_of(judge, server, extra_body=extra_body)
        assert counts == {"calls": 2, "answered": 2}
        values[activation] = [found.value for found in outcomes]
    texts = [ScalarJudge().text(row, ANSWER) for row in ROWS]
    with torch.no_grad():
        want = [head(**tokenizer(text, return_tensors="pt")).logits.sigmoid().item() for text in texts]
    np.testing.assert_allclose(values["none"], want, atol=1e-4)
    np.testing.assert_allclose(values["sigmoid"], want, atol=1e-4)


def test_a_judge_at_the_wrong_kind_of_server_fails(chat, pooling):
    for judge, server in ((ScalarJudge(), chat), (chat_judges()["helpful"], pooling)):
        outcomes, _ = outcomes_of(judge, server)
        assert all(isinstance(found, Failed) and "HTTP 404" in found.reason for found in outcomes), outcomes


# -- commands ---------------------------------------------------------------------------------------------------------

def test_the_check_fails_judges_that_judge_nothing(chat, pooling):
    done = subprocess.run(
        [sys.executable, "-m", "cosmo_rl.cpgd.rewards.check", "--reward.judges", f"general={chat.url},tiny",
         f"visual_focus={chat.url},tiny", f"scalar={pooling.url},head"],
        capture_output=True, text=True, timeout=300, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stdout + done.stderr
    for name in ("general", "visual_focus"):
        line = next(line for line in done.stdout.splitlines() if name in line)
        assert "failed" in line and "0/5" in line, line
    assert any("scalar" in line and "/5" in line and " s " in line for line in done.stdout.splitlines()), done.stdout


def hold_general_to_marks():
    """In the run's own process: what the command line has no option for."""
    opened = build.open_judges

    def open_judges(config, **options):
        clients = opened(config, **options)
        clients["general"].endpoint.extra_body |= held_to(SAID["general"])
        return clients

    build.open_judges = open_judges


def test_a_judged_run(tmp_path, chat, pooling):
    """Helpful by the head, general rows by the chat model: with marks the run ends well, without them it stops."""
    rows = runs.write_rows(tmp_path / "rows.jsonl", [*safety_rows("validation")[:2], *general_rows("validation")[:2]])
    command = runs.small(*runs.from_file(rows), "--steps", 4, "--reward.judges", f"general={chat.url},tiny",
                         f"scalar={pooling.url},head,in-flight=4")
    runs.train([*command, "--run-dir", tmp_path / "marks"], tmp_path / "logs", before=hold_general_to_marks).check()
    line = read_metrics(tmp_path / "marks" / "stage2" / "metrics.jsonl")[0]
    for took in (line["judging"]["general"], line["judging"]["scalar"]):
        assert took["answered"] == took["calls"] > 0, took
    assert line["failed"] == 0
    sixteen = 16 * line["rewards"]["general"]["helpful"]["mean"]
    assert abs(sixteen - round(sixteen)) > 1e-3, "the head's probabilities, not the rule's zeros and ones"
    done = runs.train([*command, "--run-dir", tmp_path / "none"], tmp_path / "logs")
    assert done.code == 1 and "more than the budget of 10.0%" in done.err[0] and "general: " in done.err[0], done.err[0]
    assert "Traceback" not in done.err[0]


# -- a server's death -------------------------------------------------------------------------------------------------

def test_a_killed_server_fails_calls_or_delays_them_until_it_is_back(chat):
    """SIGKILL in the midst of 200 calls, half of them by a client that waits for the server's return."""

    async def action():
        hasty = Endpoint(chat.url, chat.name, max_in_flight=8, attempts=3, breaker_failures=8, patience_s=1.0,
                         probe_every_s=0.5)
        patient = Endpoint(chat.url, chat.name, max_in_flight=8, patience_s=START_S)
        calls = {endpoint: asyncio.gather(*(ask(f"egg {i}", max_tokens=8)(endpoint) for i in range(100)),
                                          return_exceptions=True) for endpoint in (hasty, patient)}
        while min(endpoint.counts["answered"] for endpoint in calls) < 10:
            await asyncio.sleep(0.005)
        chat.kill()
        found = await asyncio.wait_for(calls[hasty], 60)
        failed = [error for error in found if isinstance(error, BaseException)]
        assert 0 < len(failed) < 100 and {type(error) for error in failed} <= {EndpointError, EndpointDown}, failed
        assert any(isinstance(error, EndpointDown) for error in failed) and hasty.counts["failed"] == len(failed)
        assert not calls[patient].done()
        await asyncio.to_thread(runs.wait_until, chat.group_is_gone, "the dead server's processes", 30.0)
        chat.start()
        await asyncio.to_thread(chat.wait)
        late = await asyncio.wait_for(calls[patient], 120)
        assert not any(isinstance(reply, BaseException) for reply in late) and patient.counts["answered"] == 100
        await ask("egg")(hasty)
        assert hasty.breaker.opened is None
        for endpoint in calls:
            await endpoint.aclose()

    asyncio.run(action())
