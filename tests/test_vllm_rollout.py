"""The engine `server` with a real vLLM on the CPU (`make test-vllm`): it agrees with the trainer, faults planted in it
stop the run, and what dies comes back. Its worker is tests/vllm_faults/planted.py.

The shipped policy is sure of itself: an honest engine is some 5e-6 nats a token from the trainer.
"""

import math
import os
import re
import signal
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from conftest import ROOT
from PIL import Image
from vllm_server import ENVIRONMENT

from cosmo_rl.cpgd.config import DataConfig, RolloutConfig
from cosmo_rl.cpgd.rollout.collect import sample
from cosmo_rl.cpgd.rollout.engine import generate
from cosmo_rl.cpgd.rollout.hf import HFEngine
from cosmo_rl.cpgd.rollout.values import Request
from cosmo_rl.cpgd.rollout.vllm import wire
from cosmo_rl.cpgd.rollout.vllm.compare import WeightsDiffer
from cosmo_rl.cpgd.rollout.vllm.control import ServerDown
from cosmo_rl.cpgd.rollout.vllm.server import ServerEngine
from cosmo_rl.cpgd.rollout.vllm.wire import ReplyError, Wire
from cosmo_rl.data.collate import TokenSequence, collate, encode_prompt
from cosmo_rl.data.schema import Row
from cosmo_rl.model.load import load_model, load_processor
from cosmo_rl.model.policy import Policy

pytestmark = pytest.mark.vllm

LAUNCH = (f"VLLM_CPU_KVCACHE_SPACE=1 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 VLLM_CACHE_ROOT={ENVIRONMENT / 'cache'} "
          "{more} " + str(ENVIRONMENT / "bin" / "python"))
FAULTS = f"PYTHONPATH={ROOT / 'cpgd/rollout/vllm/worker'}:{ROOT / 'tests/vllm_faults'}"
PROCESSOR = load_processor(runs.MODEL, 28 * 28 * 64)
ROLLOUT = RolloutConfig(engine="server", serve=(LAUNCH.format(more=FAULTS) + " --worker-extension-cls planted.Worker",),
                        max_new_tokens=24, temperature=0.8, verify_every=1)
LIMIT = 1e-4
"""Nats between engine and trainer, in float32."""
SIZES = ([], [(56, 56)], [(150, 40)], [(90, 61), (200, 120)], [(56, 84), (84, 56), (31, 333)])
"""(width, height) of the pictures of the prompts; few of them can be left as they are."""


@pytest.fixture(scope="module")
def opened(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    engine = ServerEngine(runs.MODEL, PROCESSOR, ROLLOUT, DataConfig(max_prompt_tokens=512), device=torch.device("cpu"),
                          dtype=torch.float32, folder=folder)
    try:
        yield engine
    finally:
        engine.close()
        if request.session.testsfailed:
            log = (folder / "vllm0.log").read_text(errors="replace").splitlines()[-60:]
            request.config.pluginmanager.getplugin("terminalreporter").write_line("\n".join(log))


@pytest.fixture
def model():
    return load_model(runs.MODEL)


@pytest.fixture
def engine(opened, model, monkeypatch):
    """It is honest, and has the shipped weights."""
    opened.wire = Wire(PROCESSOR, ROLLOUT)
    with suppress(ServerDown):  # after a test that failed: another is started
        plant(opened, "")
    opened.sync(model.named_parameters, 0)
    return opened


def plant(engine, fault):
    engine._servers[0].rpc("plant", fault)


def asked(per=2, sizes=SIZES):
    """`per` requests of a prompt for each of SIZES."""
    noise, found = np.random.default_rng(7), []
    for number, shapes in enumerate(sizes):
        images = tuple(Image.fromarray(noise.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in shapes)
        content = [{"type": "text", "text": "see "}, *({"type": "image"} for _ in images),
                   {"type": "text", "text": "what colour is it?"}]
        row = Row(id=f"p{number}", task="general", domain="general", messages=({"role": "user", "content": content},),
                  images=images, source="test", licence="Apache-2.0")
        prompt = encode_prompt(row, PROCESSOR, max_prompt_tokens=512, max_image_pixels=10**6)
        found += [Request(row=row, prompt=prompt, k=k, seed=100 * number + k) for k in range(per)]
    return found


REQUESTS = asked()


@torch.no_grad()
def gaps(model, responses, temperature=ROLLOUT.temperature):
    """|trainer - engine| log-prob of every token, a row a response."""
    policy = Policy(model, suppressed_ids=PROCESSOR.suppressed_ids, temperature=temperature)
    batch = collate([TokenSequence(r.request.prompt, r.ids) for r in responses], layout="packed",
                    pad_id=PROCESSOR.pad_id, dummy_image=PROCESSOR.dummy_image())
    logprobs = policy(batch).logprobs
    return [np.abs(logprobs[batch.sequence_ids == i].numpy() - r.logprobs) for i, r in enumerate(responses)]


def worst(model, responses, **options):
    return max(gap.max() for gap in gaps(model, responses, **options))


@torch.no_grad()
def change(model, seed, only="", by=0.01):
    """Every tensor a little, as an update would."""
    noise = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if only in name:
            parameter += torch.randn(parameter.shape, generator=noise) * by * parameter.std().clamp(min=0.01)


def ids(responses):
    return [response.ids.tolist() for response in responses]


# -- agreement --------------------------------------------------------------------------------------------------------

def test_engine_and_trainer_agree_before_and_after_ten_updates(engine, model):
    hf, before = HFEngine(load_model(runs.MODEL), PROCESSOR, ROLLOUT), []
    for version in range(11):
        if version:
            change(model, version)
            engine.sync(model.named_parameters, version)
        responses = generate(engine, REQUESTS)
        assert {r.version for r in responses} == {version}
        assert worst(model, responses) < LIMIT
        if version in (0, 10):
            hf.sync(model.named_parameters, version)
            greedy = generate(engine, REQUESTS, greedy=True)
            assert worst(model, greedy, temperature=1.0) < LIMIT
            assert [r.text for r in greedy] == [r.text for r in generate(hf, REQUESTS, greedy=True)]
            before.append(ids(greedy))
    assert before[0] != before[1]  # so the updates did change something


def test_a_seed_is_a_response_in_any_company(engine, model):
    """More prompt tokens than vLLM computes at a time, in another order, alone, with pictures in its caches and not."""
    many = asked(30)
    assert sum(len(r.prompt.input_ids) for r in many) > 4096
    first = generate(engine, many)
    assert worst(model, first) < LIMIT
    assert ids(generate(engine, many[::-1])) == ids(first)[::-1]
    engine.recover()
    assert ids(generate(engine, many[:3])) == ids(first)[:3]
    for start in range(0, len(many), 30):
        assert len(set(map(tuple, ids(first[start:start + 30])))) > 1
    assert {r.finish_reason for r in first} == {"stop", "length"}


def test_every_picture_shape_is_checked(engine):
    engine.check((r.row, r.prompt) for r in asked(1))


def test_pictures_that_prompts_share_are_looked_at_in_each(engine, caplog):
    """Features kept of one prompt, or of a picture's first place, would leave the tower without work for the next."""
    row = asked(1)[3].row
    first, second = row.images

    def probe(*images):
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": "what colour is it?"}]
        shown = replace(row, images=images, messages=({"role": "user", "content": content},))
        return shown, encode_prompt(shown, PROCESSOR, max_prompt_tokens=512, max_image_pixels=10**6)

    engine.check([probe(first), probe(first, second), probe(second, second), probe(second)])
    assert "unseen" not in caplog.text


# -- planted faults: weights and versions -----------------------------------------------------------------------------

@pytest.mark.parametrize(("fault", "named"), [
    ("never:q_proj", r"6 of \d+ tensors compared after a sync, as model\.language_model\.layers\.0\.self_attn\.q_proj"),
    ("never:norm", r"11 of \d+ tensors compared after a sync, as model\.visual\.blocks\.0\.norm1\.weight"),
    ("never:visual.merger.mlp", r"as model\.visual\.merger\.mlp"),
    ("bit:model.language_model.layers.1.self_attn.k_proj.weight",
     r"1 of \d+ tensors compared after a sync, as model\.language_model\.layers\.1\.self_attn\.k_proj\.weight \("),
    ("bit:model.language_model.embed_tokens.weight",
     r"2 of \d+ tensors compared after a sync, as model\.language_model\.embed_tokens\.weight \("),
    ("bit:model.visual.blocks.0.attn.qkv.bias", r"1 of \d+ tensors compared .* as model\.visual\.blocks\.0\.attn\.qkv"),
])
def test_weights_that_did_not_arrive(engine, model, fault, named):
    change(model, 1)
    plant(engine, fault)
    with pytest.raises(WeightsDiffer, match=rf"computes with other weights than the trainer in .*{named}"):
        engine.sync(model.named_parameters, 1)
    plant(engine, "")
    engine.sync(model.named_parameters, 1)
    assert worst(model, generate(engine, REQUESTS)) < LIMIT


def test_a_layer_is_found_when_it_is_its_turn(engine, model, monkeypatch):
    """Between comparisons of all, one layer of each kind: a fault in one is found within as many syncs as layers."""
    engine.sync(model.named_parameters, 0)  # all, if the group is new
    monkeypatch.setattr(engine._sync.comparison, "verify_every", 10**6)
    plant(engine, "bit:model.language_model.layers.1.mlp.down_proj.weight")
    layers = len(model.model.language_model.layers)
    with pytest.raises(WeightsDiffer, match=r"1 of \d+ tensors .* as model\.language_model\.layers\.1\.mlp\.down_proj",
                       ) as told:
        for version in range(layers):
            engine.sync(model.named_parameters, version)
    compared = re.search(r"1 of (\d+) tensors", str(told.value))
    assert compared and int(compared[1]) < len(list(model.named_parameters())) / 1.5


def test_a_sync_left_out(engine, model, monkeypatch):
    monkeypatch.setattr(engine._sync, "send", lambda weights, tag: None)
    old = engine.tag
    engine.sync(model.named_parameters, 7)
    with pytest.raises(ReplyError, match=rf"sampled by weights '{old}', and '{engine.tag}' \(step 7\) was asked for"):
        generate(engine, REQUESTS)
    with pytest.raises(ReplyError, match="sampled by weights"):
        engine.check([(REQUESTS[0].row, REQUESTS[0].prompt)])


def test_another_program_writes_to_the_server(engine):
    server = engine._servers[0]
    for path, body in (("/pause", None), ("/start_weight_update", None),
                       ("/finish_weight_update", {"weight_version": "stranger"}), ("/resume", None)):
        server.post(path, body)
    with pytest.raises(ReplyError, match=r"by weights 'stranger', .*: another program has written to the server"):
        generate(engine, REQUESTS)


def test_weights_of_nan_are_told(engine, model):
    with torch.no_grad():
        model.model.language_model.norm.weight[0] = math.nan
    engine.sync(model.named_parameters, 1)
    with pytest.raises(ReplyError, match=r"has the log-prob .*: its weights give NaN or infinite logits"):
        generate(engine, REQUESTS)


# -- planted faults: what is sampled ----------------------------------------------------------------------------------

class Keeping:
    """A server that is not told to empty its caches."""

    def __init__(self, server):
        self.real = server.post

    def __call__(self, path, body=None):
        return self.real("/pause?mode=abort&clear_cache=false" if path == "/pause" else path, body)


@pytest.mark.parametrize(("kept", "constant", "right"), [(True, False, True), (False, True, True), (True, True, False)],
                         ids=["caches kept", "one tag", "both"])
def test_features_of_an_older_tower(engine, model, monkeypatch, kept, constant, right):
    """Caches are emptied, and their keys name the weights: each alone is enough, and it is seen where both fail."""
    if constant:
        monkeypatch.setattr(engine.wire, "prompt", lambda prompt, tag: Wire.prompt(engine.wire, prompt, "constant"))
    engine.sync(model.named_parameters, 1)
    generate(engine, REQUESTS)
    if kept:
        monkeypatch.setattr(engine._servers[0], "post", Keeping(engine._servers[0]))
    change(model, 1, only="visual", by=0.1)
    engine.sync(model.named_parameters, 2)
    means = [gap.mean() for gap in gaps(model, generate(engine, REQUESTS))]
    if right:
        assert max(means) < LIMIT / 10
    else:
        assert max(means[:2]) < LIMIT / 10 and min(means[4:]) > LIMIT  # a picture of 4 tokens tells little


@pytest.mark.parametrize(("fault", "harmless"), [("positions:lost", 2), ("positions:swapped", 4), ("pixels:1.01", 4)])
def test_positions_and_pixels_of_other_kinds(engine, model, fault, harmless):
    """Far beyond what float32 explains; `harmless`: text, and one square picture of four tokens, do not tell."""
    plant(engine, fault)
    means = [gap.mean() for gap in gaps(model, generate(engine, REQUESTS))]
    assert max(means[:2]) < LIMIT / 10 and min(means[harmless:]) > LIMIT


@pytest.mark.parametrize("setting", [{"min_tokens": 24}, {"top_p": 0.9}, {"temperature": 0.7}, {"top_k": 3},
                                     {"repetition_penalty": 1.05}], ids=str)
def test_sampling_of_another_kind(engine, model, monkeypatch, setting):
    """As a generation_config.json would have it: the log-probs are of what was sampled, so they show it."""
    sampling = engine.wire.sampling
    monkeypatch.setattr(engine.wire, "sampling", lambda *args: sampling(*args) | setting)
    means = [gap.mean() for gap in gaps(model, generate(engine, REQUESTS))]
    assert max(means) > 10 * LIMIT


def test_pixels_of_another_kind_stop_the_run_at_its_start(engine, monkeypatch):
    probe = [(REQUESTS[4].row, REQUESTS[4].prompt)]
    plant(engine, "pixels:1.01")
    with pytest.raises(ReplyError, match=r"request p2#0: pixels that http\S+ sees are up to \S+ from the trainer's"):
        engine.check(probe)
    plant(engine, "")
    honest = wire.pictures
    small = lambda prompt, processor: [p.resize((p.width // 2, p.height // 2)).resize(p.size)
                                       for p in honest(prompt, processor)]
    monkeypatch.setattr(wire, "pictures", small)
    with pytest.raises(ReplyError, match="it resamples or normalises pictures in another way"):
        engine.check(probe)
    monkeypatch.setattr(wire, "pictures", honest)
    engine.check(probe)


def test_another_resize_limit(engine, monkeypatch):
    """As if the server had resized: what it then returns names the picture, the numbers and the option."""
    honest = wire.pictures
    large = lambda prompt, processor: [p.resize((p.width + 28, p.height)) for p in honest(prompt, processor)]
    with monkeypatch.context() as patch:
        patch.setattr(wire, "pictures", large)
        body = engine.wire.prompt(REQUESTS[2].prompt, engine.tag)
    monkeypatch.setattr(engine.wire, "prompt", lambda prompt, tag: body)
    with pytest.raises(ReplyError, match=r"request p1#0: .* has 6 image tokens where the trainer has 4 \(pictures of "
                                         r"56x56 pixels\): .* start it with --mm-processor-kwargs '\{.*\}'"):
        engine.check([(REQUESTS[2].row, REQUESTS[2].prompt)])


# -- what dies --------------------------------------------------------------------------------------------------------

class Killing:
    """A scorer that kills a process at the first response."""

    def __init__(self, pid):
        self.pid = pid

    def submit(self, responses):
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            self.pid = 0
        return Future()


def engine_core(served):
    """The process of vLLM's engine, a child of the one that listens."""
    found = [pid for pid in runs.children(served._process.pid)
             if "EngineCor" in Path(f"/proc/{pid}/comm").read_text()]
    assert len(found) == 1
    return found[0]


def test_killed_in_mid_generation(engine, model, monkeypatch):
    """Its engine: another is started, takes the weights, and is asked for the lost requests alone."""
    requests, rounds = asked(60), []
    want = ids(generate(engine, requests))
    ask_all = engine._ask_all
    monkeypatch.setattr(engine, "_ask_all", lambda part, *args: rounds.append(part) or ask_all(part, *args))
    first, scorer = engine.tag, Killing(engine_core(engine._served[0]))
    responses, pending = sample(engine, requests, ROLLOUT, lambda *_: True, scorer, {})
    assert not scorer.pid and ids(responses) == want and {r.version for r in responses} == {0}
    assert [r.request for r in responses] == requests
    whole, lost = rounds
    assert len(whole) == len(requests) and 0 < len(lost) < len(requests)
    assert sorted(i for part, _ in pending for i in part) == list(range(len(requests)))  # each scored once
    assert engine.tag != first and worst(model, responses) < LIMIT


# -- whole runs -------------------------------------------------------------------------------------------------------

def of_marker(marker: str) -> list[int]:
    """Processes with this in their environment, which the dead that nobody has buried yet have no more."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if marker.encode() in (path / "environ").read_bytes().split(b"\0"):
                found.append(int(path.name))
    return found


def command(folder: Path, marker: str) -> list[object]:
    """8 updates in 4 rollouts; its servers, and what they start, have `marker` in their environment."""
    rows = runs.write_rows(folder / "data" / "rows.jsonl", runs.small_rows())
    held = runs.write_rows(folder / "held" / "rows.jsonl", runs.held_rows())
    return runs.small(*runs.from_file(rows), "--data.eval-path", held, "--run-dir", folder / "run",
                      "--rollout.engine", "server", "--rollout.serve", LAUNCH.format(more=marker))


def steps(folder: Path) -> list[dict]:
    metrics = folder / "run" / "stage2" / "metrics.jsonl"
    return runs.lines_of(folder / "run") if metrics.exists() else []


def check_steps(lines: list[dict], last: int) -> None:
    """None lost, none doubled, each of them something."""
    assert [line["step"] for line in lines] == list(range(1, last + 1))
    for line in lines:
        assert math.isfinite(line["loss"]) and line["response_tokens"] > 0 and 0 < line["grad_norm"] < math.inf
        assert 0 <= line["reward"] <= 1 and line["rewards"]


@pytest.fixture
def patient(monkeypatch):
    """Two starts of a server on busy cores take longer than other runs."""
    monkeypatch.setattr(runs, "LIMIT_S", 400.0)


def test_a_run_whose_server_is_killed(tmp_path, patient):
    """With all its processes, between two syncs: the run goes on to its end, and leaves none."""
    running = runs.start(command(tmp_path, "RUN_OF_TEST=one"), tmp_path / "logs")
    try:
        over = lambda: running.processes[0].exitcode is not None
        runs.wait_until(lambda: len(steps(tmp_path)) >= 2 or over(), "step 2", runs.LIMIT_S)
        for pid in of_marker("RUN_OF_TEST=one"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    except AssertionError:
        running.processes[0].kill()
        raise
    done = running.wait().check()
    check_steps(steps(tmp_path), 8)
    assert done.err[0].count("is gone (its log: ") == 1, done.err[0]
    assert not of_marker("RUN_OF_TEST=one")
    assert (tmp_path / "run" / "stage2" / "report.json").exists()


def test_a_launcher_killed_leaves_no_server(tmp_path, patient):
    """Of two ranks, both of which ask the server."""
    launcher = runs.torchrun(command(tmp_path, "RUN_OF_TEST=two"))
    try:
        runs.wait_until(lambda: len(steps(tmp_path)) >= 3 or launcher.poll() is not None, "step 3", runs.LIMIT_S)
        assert launcher.poll() is None, launcher.communicate()[0]
        assert len(of_marker("RUN_OF_TEST=two")) >= 2
    finally:
        launcher.kill()
        launcher.wait()
    runs.wait_until(lambda: not of_marker("RUN_OF_TEST=two"), "the servers to die", 15)
    lines = steps(tmp_path)
    check_steps(lines, len(lines))
