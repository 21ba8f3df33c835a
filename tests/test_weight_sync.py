"""Weights into vLLM servers and the servers themselves, without vLLM: what is compared, how a server is started, ends,
and is told wrong. tests/test_vllm_rollout.py has a real one."""

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import runs
import torch
import torch.distributed as dist
from conftest import ROOT

from cosmo_rl.cpgd.config import DataConfig, RolloutConfig
from cosmo_rl.cpgd.rollout.vllm import control as answers
from cosmo_rl.cpgd.rollout.vllm import serve, sync
from cosmo_rl.cpgd.rollout.vllm.compare import chosen, same, sha256, shard
from cosmo_rl.cpgd.rollout.vllm.control import Control, ServerDown
from cosmo_rl.cpgd.rollout.vllm.serve import WORKER, Served, command
from cosmo_rl.cpgd.rollout.vllm.server import ServerEngine
from cosmo_rl.cpgd.rollout.vllm.sync import WeightSync
from cosmo_rl.data.errors import UserError
from cosmo_rl.model.load import load_model

# -- what is compared -------------------------------------------------------------------------------------------------


def test_every_kind_at_each_turn_and_every_layer_in_its_turn():
    names = [name for name, _ in load_model(runs.MODEL).named_parameters()]
    kinds = {re.sub(r"\.\d+\.", ".N.", name) for name in names}
    layers = {re.search(r"layers\.(\d+)", name)[1] for name in names if ".layers." in name}
    assert len(layers) > 1 and len(kinds) < len(names) - len(layers)
    for turn in range(5):
        found = chosen(names, turn)
        assert len(found) == len(kinds) and {re.sub(r"\.\d+\.", ".N.", name) for name in found} == kinds
    assert set().union(*(chosen(names, turn) for turn in range(8))) == set(names)
    assert chosen(names, 3) == chosen(iter(names), 3)


def held(tensor, dim, size, parts=None):
    """What each of `size` workers holds: an equal part along `dim`, of which there may be fewer than workers."""
    parts = parts or size
    pieces = [tensor] * size if dim is None else tensor.chunk(parts, dim)
    return [[sha256(piece), list(piece.shape), None] for piece in
            (pieces[rank if dim is None else rank * parts // size] for rank in range(size))]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("shape", "dim", "heads"), [((8, 6), 0, None), ((8, 6), 1, None), ((8,), 0, None),
                                                     ((8, 6), None, None), ((8, 6), 0, 2), ((8,), 0, 2)],
                         ids=["columns", "rows", "bias", "replicated", "key heads", "bias of key heads"])
def test_each_worker_holds_its_part(size, shape, dim, heads):
    """With 2 key heads, 4 workers hold one in pairs."""
    if dim == 1 and shape[1] % size:
        shape = (8, 8)
    tensor = torch.randn(shape)
    parts = held(tensor, dim, size, heads and min(heads, size))
    for rank in range(size):
        assert same(tensor, [parts[rank]], rank, size)
        changed = tensor.clone()
        digest, mine, _ = parts[rank]
        part = shard(changed, mine, None, rank, size)
        last = (-1,) * part.ndim
        part[last] = torch.nextafter(part[last], torch.tensor(9.0))  # the last bit of the last weight that it holds
        assert sha256(part) != digest and not same(changed, [parts[rank]], rank, size)
        for other in range(size):
            if parts[other][0] != digest:
                assert not same(tensor, [parts[other]], rank, size)  # another worker's part
    if heads and size == 4:
        assert parts[0] == parts[1] != parts[2] == parts[3]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_vocabulary_that_no_number_of_workers_divides(size):
    """vLLM pads it: the last worker holds less, another says where its own rows begin."""
    tensor, per = torch.randn(10, 3), -(-10 // size)
    starts = range(0, 10, per)
    for rank, start in enumerate(starts):
        part = tensor[start:start + per]
        assert same(tensor, [[sha256(part), list(part.shape), start]], rank, size)
        for other in starts:
            if other != start:
                assert not same(tensor, [[sha256(part), list(part.shape), other]], rank, size)


@pytest.mark.parametrize("size", [1, 2])
def test_a_fused_qkv_is_three_parts_of_each_worker(size):
    """As the tower's: q, k and v, each split over the workers."""
    fused = torch.randn(12, 5)
    for rank in range(size):
        parts = [[sha256(part), list(part.shape), None] for part in
                 (piece.chunk(size)[rank] for piece in fused.chunk(3))]
        assert same(fused, parts, rank, size)
        assert not same(fused, [parts[1], parts[0], parts[2]], rank, size)
        assert not same(fused.roll(4, 0), parts, rank, size)


def test_what_no_worker_can_hold():
    tensor = torch.randn(8, 6)
    digest = sha256(tensor)
    assert not same(tensor, None, 0, 1)
    for shape in ([8], [8, 6, 1], [4, 3], [3, 6], [0, 6], [16, 6]):
        assert not same(tensor, [[digest, shape, None]], 0, 2), shape
    assert not same(tensor, [[digest, [4, 6], None]], 0, 1)  # half of it, and one worker alone
    assert not same(tensor, [[sha256(tensor[4:]), [4, 6], 6]], 1, 2)  # beyond its end
    assert not same(tensor, [[sha256(tensor.bfloat16()), [8, 6], None]], 0, 1)  # cast
    assert same(torch.tensor([0.0, 1.0]), [[sha256(torch.tensor([-0.0, 1.0])), [2], None]], 0, 1)


def test_the_worker_and_the_trainer_hash_alike():
    """The worker's file imports vLLM: its function is taken out of it."""
    source = (WORKER / "cosmo_rl_worker.py").read_text()
    scope = {"torch": torch, "hashlib": __import__("hashlib")}
    exec(source[source.index("def digest("):], scope)
    for tensor in (torch.randn(4, 3).t(), torch.randn(7).bfloat16(), torch.tensor([-0.0, 0.0]), torch.randn(3, 1)[:0]):
        assert scope["digest"](tensor) == sha256(tensor)
    assert sha256(torch.zeros(2)) != sha256(torch.zeros(3))


# -- the command ------------------------------------------------------------------------------------------------------

def test_a_launch_says_it_all_in_one_string(tmp_path):
    environ, words = command(f"CUDA_VISIBLE_DEVICES=6,7 A='b c=d' EMPTY= {sys.executable} --dtype half --x 'y z'",
                             tmp_path, 81, ["--dtype", "float32"])
    assert environ == {**serve.ENVIRON, "CUDA_VISIBLE_DEVICES": "6,7", "A": "b c=d", "EMPTY": ""}
    assert words[0] == sys.executable and words[words.index("--model") + 1] == str(tmp_path)
    assert words[words.index("--port") + 1] == "81" and words[words.index("--host") + 1] == "127.0.0.1"
    assert words[-6:] == ["--dtype", "float32", "--dtype", "half", "--x", "y z"]  # the user's come later, and win
    assert command(f"PYTHONPATH=/a:/b {sys.executable}", tmp_path, 81)[0]["PYTHONPATH"] == "/a:/b"


def test_a_program_keeps_its_links(tmp_path, monkeypatch):
    """A virtual environment is where its python lies, which is a link."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    assert command("bin/python", tmp_path, 81)[1][0] == str(tmp_path / "bin" / "python")


@pytest.mark.parametrize(("launch", "named"), [("", "nothing"), ("A=b", "nothing"), ("A=b no/python -x", "no/python"),
                                               (".", r"\."), ("README.md", "README.md")])
def test_no_program(launch, named, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=rf"^--rollout.serve '{re.escape(launch)}': {named} is no program; give the "
                                        r"python of an environment with vLLM, as \.venv-vllm/bin/python$"):
        command(launch, tmp_path, 81)


def test_a_launch_that_no_shell_would_read(tmp_path):
    with pytest.raises(UserError, match="No closing quotation; write it as for a shell"):
        command(f"{sys.executable} 'open", tmp_path, 81)


def test_the_program_shows_its_command_and_becomes_it(tmp_path):
    python = fake_vllm(tmp_path, "print('became', sys.argv[1:])")
    line = [sys.executable, "-m", "cosmo_rl.cpgd.rollout.vllm.serve", f"A=b {python} --x y", str(tmp_path), "--port",
            "123", "--dtype", "float16"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    shown, became = done.stdout.splitlines()
    assert " A=b " in shown and f"PYTHONPATH={WORKER}" in shown and "VLLM_SERVER_DEV_MODE=1" in shown
    for words in (shown, became.replace("', '", " ")):
        assert "--port 123" in words and "--dtype float16 --x y" in words and "--enable-scale-out" in words
    done = subprocess.run([*line[:3], "nowhere/python", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: --rollout.serve 'nowhere/python'")
    assert "Traceback" not in done.stderr


# -- a server that is started -----------------------------------------------------------------------------------------

LISTEN = """
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
class Health(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *args): pass
import subprocess
child = subprocess.Popen([real, "-c", f"import sys, time; sys.path.insert(0, {worker!r}); import sitecustomize; "
                          "time.sleep(600)"], start_new_session=False)
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Health).serve_forever()
"""
"""Answers at /health, and has a child, as vLLM has its engine."""


def fake_vllm(folder: Path, body: str) -> Path:
    """A python for --rollout.serve that runs `body` instead of vLLM, with the worker's sitecustomize before it."""
    script = folder / "fake.py"
    script.write_text(f"import os, sys\nreal, worker = {sys.executable!r}, {str(WORKER)!r}\n"
                      f"sys.path.insert(0, worker)\nimport sitecustomize\n{body}\n")
    python = folder / "python"
    python.write_text(f"#!/bin/sh\nexec {sys.executable} {script} \"$@\"\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return python


def of_group(group: int) -> list[int]:
    """Living processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(its) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


def test_a_server_starts_answers_and_ends_with_its_children(tmp_path):
    served = Served(str(fake_vllm(tmp_path, LISTEN)), tmp_path, tmp_path / "logs" / "a.log", [])
    assert not served.running and not served.control.alive()
    try:
        served.start()
        served.wait()
        assert served.running and served.control.alive()
        group = served._process.pid
        runs.wait_until(lambda: len(of_group(group)) == 2, "its child", 10)
        served.start()  # again: what was there is ended first
        served.wait()
        assert served._process.pid != group and served.control.alive()
        runs.wait_until(lambda: not of_group(group), "the first to die", 5)
        group = served._process.pid
    finally:
        served.stop()
    assert not served.running and not served.control.alive()
    runs.wait_until(lambda: not of_group(group), "all to die", 5)
    served.stop()


def test_a_server_that_does_not_heed_sigterm_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "ENDS_S", 0.3)
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + LISTEN
    served = Served(str(fake_vllm(tmp_path, deaf)), tmp_path, tmp_path / "a.log", [])
    served.start()
    served.wait()
    group = served._process.pid
    served.stop()
    runs.wait_until(lambda: not of_group(group), "all to die", 5)


@pytest.mark.parametrize(("body", "words"), [
    ("print('starting'); raise ImportError('No module named vllm: x')", "ImportError: No module named vllm: x"),
    ("print('ValueError: bad --dtype: half'); print('goodbye'); sys.exit(1)", "ValueError: bad --dtype: half"),
    ("print('goodbye'); sys.exit(0)", "goodbye"), ("sys.exit(3)", "it wrote nothing")])
def test_a_server_that_ends_before_it_is_ready(tmp_path, body, words):
    """As where there is no vLLM in the environment: its own last words, and the place of the rest."""
    served = Served(str(fake_vllm(tmp_path, body)), tmp_path, tmp_path / "a.log", [])
    served.start()
    with pytest.raises(UserError, match=f"ended before it was ready: {re.escape(words)} .*all of it in .*a.log"):
        served.wait()
    served.stop()
    assert not served.running


def test_a_server_that_is_never_ready(tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "START_S", 0.2)
    served = Served(str(fake_vllm(tmp_path, "import time; print('loading', flush=True); time.sleep(600)")), tmp_path,
                    tmp_path / "a.log", [])
    served.start()
    group = served._process.pid
    try:
        with pytest.raises(UserError, match=r"was not ready within 0\.2 s"):
            served.wait()
    finally:
        served.stop()
    runs.wait_until(lambda: not of_group(group), "all to die", 5)


def _start_and_wait(launch: str, folder: str) -> None:
    served = Served(launch, Path(folder), Path(folder) / "a.log", [])
    served.start()
    served.wait()
    (Path(folder) / "pid.tmp").write_text(str(served._process.pid))
    (Path(folder) / "pid.tmp").rename(Path(folder) / "pid")
    signal.pause()


def test_no_process_is_left_by_a_trainer_that_was_killed(tmp_path):
    running = runs.Running(_start_and_wait, (str(fake_vllm(tmp_path, LISTEN)), str(tmp_path)), 1,
                           tmp_path / "logs")
    pid = tmp_path / "pid"
    runs.wait_until(lambda: pid.exists() or running.processes[0].exitcode is not None, "the server", 30)
    group = int(pid.read_text())
    runs.wait_until(lambda: len(of_group(group)) == 2, "its child", 10)
    running.processes[0].kill()
    assert running.wait().code == -signal.SIGKILL
    runs.wait_until(lambda: not of_group(group), "the server and its child to die", 10)


def test_a_server_sees_nothing_of_torchrun_and_of_our_python(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "PYTHONHOME",
                 "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("KEPT", "yes")
    served = Served("A=b " + str(fake_vllm(tmp_path, "print(sorted(os.environ))")), tmp_path, tmp_path / "a.log", [])
    names = set(served._environ)
    served.control.close()
    assert {"KEPT", "A", "COSMO_RL_PARENT", "PYTHONPATH", "VLLM_SERVER_DEV_MODE"} <= names
    assert not names & {"RANK", "WORLD_SIZE", "MASTER_ADDR", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "PYTHONHOME",
                        "OMP_NUM_THREADS"}


# -- a server's answers -----------------------------------------------------------------------------------------------

class Fake:
    """Answers by script: path -> (status, body) or a function of the request's body; counts what it was asked."""

    def __init__(self, answers, health=200):
        self.answers, self.health, self.asked = dict(answers), health, []

    def __enter__(self):
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length) or b"null")
                fake.asked.append((self.path, body))
                found = fake.health if self.path == "/health" else fake.answers.get(self.path, 404)
                found = found(body) if callable(found) else found
                status, told = found if isinstance(found, tuple) else (found, b"")
                told = told if isinstance(told, bytes) else json.dumps(told).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(told)))
                self.end_headers()
                self.wfile.write(told)

            do_GET = do_POST = answer

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


SAID = {"model": "Qwen2_5_VLForConditionalGeneration", "dtype": "float32", "vocab_size": 640, "max_model_len": 48,
        "logprobs_mode": "processed_logprobs", "gpu": ""}
"""What an honest server says of itself, to a run of 32 prompt tokens and 16 new ones."""


@contextmanager
def control(answers, health=200):
    with Fake(answers, health) as fake:
        found = Control(fake.url + "/")
        yield found, fake
        found.close()


def test_an_honest_server_is_met():
    with control({"/collective_rpc": (200, {"results": [SAID, SAID]}), "/pause": 200}) as (server, fake):
        server.meet()
        assert server.workers == [SAID, SAID] and server.alive() and server.post("/pause", {"a": 1}) is None
        born = server.born
        server.meet()
        assert server.born > born >= 0
        assert fake.asked[0] == ("/collective_rpc", {"method": "cosmo_describe", "args": []})
        assert fake.asked[1:3] == [("/health", None), ("/pause", {"a": 1})]


@pytest.mark.parametrize(("answer", "health", "kind", "message"), [
    (404, 200, UserError, r"/collective_rpc: it is no vLLM server of 0\.32 or newer, or lacks VLLM_SERVER_DEV_MODE=1"),
    ((500, {"error": "no\nmethod"}), 200, UserError, r'/collective_rpc answers 500: \{"error": "no\\nmethod"\}; start'),
    (500, 503, ServerDown, r"/collective_rpc: 500, and its engine has died"),
    ((503, b"x"), 500, ServerDown, r"/collective_rpc: 503, and its engine has died"),
    (400, 503, UserError, r"/collective_rpc answers 400: nothing more; start"),
    ((200, b"<html>"), 200, UserError, r"/collective_rpc answers something that is not JSON; start"),
    ((200, b""), 200, UserError, r"cosmo_describe returns None; start"),
    ((200, {"results": 3}), 200, UserError, r"cosmo_describe returns \{'results': 3\}; start"),
    ((200, ["results"]), 200, UserError, r"cosmo_describe returns \['results'\]; start"),
])
def test_answers_that_are_none(answer, health, kind, message):
    with control({"/collective_rpc": answer}, health) as (server, fake), pytest.raises(kind, match=message) as caught:
        server.meet()
    assert fake.url in str(caught.value) and "\n" not in str(caught.value)
    if kind is UserError:
        assert str(caught.value).endswith("`python -m cosmo_rl.cpgd.rollout.vllm.serve`, which shows the whole command")


def test_nobody_listens_or_hangs_up():
    with control({}) as (server, fake):
        pass
    again = Control(fake.url)
    assert not again.alive()
    with pytest.raises(ServerDown, match=rf"^{fake.url}: ConnectError"):
        again.meet()
    again.close()
    with socket.create_server(("127.0.0.1", 0)) as rude:
        threading.Thread(target=lambda: [rude.accept()[0].close() for _ in range(2)], daemon=True).start()
        server = Control(f"http://127.0.0.1:{rude.getsockname()[1]}")
        assert not server.alive()
        with pytest.raises(ServerDown):
            server.meet()
        server.close()


# -- the engine, before the first rollout -----------------------------------------------------------------------------

def opened(urls=(), serve=(), folder=Path("."), dtype=torch.float32):
    rollout = RolloutConfig(engine="server", servers=tuple(urls), serve=tuple(serve), max_new_tokens=16)
    return ServerEngine(runs.MODEL, runs.policy_processor(), rollout, DataConfig(max_prompt_tokens=32),
                        device=torch.device("cpu"), dtype=dtype, folder=folder)


@pytest.fixture
def nothing_left():
    """No thread of the engine's is there afterwards, and no child of this process."""
    before = set(threading.enumerate()), set(runs.children(os.getpid()))
    yield
    threads = lambda: {t for t in set(threading.enumerate()) - before[0] if t.name == "endpoint-loop"}
    runs.wait_until(lambda: not threads() and set(runs.children(os.getpid())) <= before[1], "threads and children", 5)


@pytest.mark.parametrize(("said", "message"), [
    ({"model": "Qwen2ForCausalLM"}, "has model Qwen2ForCausalLM, and the run Qwen2_5_VLForConditionalGeneration; serve "
                                    "the run's own model folder"),
    ({"vocab_size": 151936}, "has vocab_size 151936, and the run 640; serve the run's own model folder"),
    ({"dtype": "bfloat16"}, "has dtype bfloat16, and the run float32; give it --dtype float32"),
    ({"logprobs_mode": "raw_logprobs"}, "has logprobs_mode raw_logprobs, and the run processed_logprobs; give it "
                                        "--logprobs-mode processed_logprobs"),
    ({"max_model_len": 47}, "takes 47 tokens, and --data.max-prompt-tokens 32 with --rollout.max-new-tokens 16 needs "
                            "48; give it --max-model-len 48"),
])
def test_a_server_of_something_else(said, message, nothing_left):
    honest, other = (200, {"results": [SAID]}), (200, {"results": [SAID | said]})
    with Fake({"/collective_rpc": honest}) as one, Fake({"/collective_rpc": other}) as two:
        opened([one.url]).close()
        with pytest.raises(UserError) as caught:
            opened([one.url, two.url])
        assert str(caught.value) == f"{two.url} {message}"
        assert {path for path, _ in two.asked} == {"/collective_rpc"}  # nothing was changed on it


@pytest.mark.parametrize("workers", [[], [{}], ["x"], [None]], ids=repr)
def test_a_server_that_says_nothing_of_itself(workers, nothing_left):
    with Fake({"/collective_rpc": (200, {"results": workers})}) as fake, pytest.raises(UserError, match=fake.url):
        opened([fake.url])


def test_a_wrong_url(nothing_left):
    with Fake({}) as fake, pytest.raises(UserError, match=f"{fake.url} has no /collective_rpc: it is no vLLM server"):
        opened([fake.url])
    with pytest.raises(UserError, match=f"--rollout.servers: nothing answers at {fake.url}: ConnectError.*; start it"):
        opened([fake.url])
    with pytest.raises(UserError, match=r"--rollout\.servers: nothing answers at"):
        opened(["http://no.such.host.invalid:8000"])


def test_no_vllm_in_the_environment(tmp_path, nothing_left):
    """The second of two servers ends at once: the first does not stay."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    good, bad = fake_vllm(tmp_path / "a", LISTEN), fake_vllm(tmp_path / "b", "import vllm.nothing")
    with pytest.raises(UserError, match="ended before it was ready: ModuleNotFoundError: No module named 'vllm'"):
        opened(serve=[str(good), str(bad)], folder=tmp_path / "logs")
    with pytest.raises(UserError, match="nowhere is no program"):
        opened(serve=[str(good), "nowhere"], folder=tmp_path / "logs")


def test_a_port_in_use(tmp_path, monkeypatch, nothing_left):
    """Somebody takes it between the choice and the start: it is not taken for our server."""
    with Fake({"/collective_rpc": (200, {"results": [SAID]})}) as other:
        monkeypatch.setattr(serve, "free_port", lambda: other.server.server_port)
        with pytest.raises(UserError, match=f"port {other.server.server_port}, .* was taken by another program"):
            opened(serve=[str(fake_vllm(tmp_path, LISTEN))], folder=tmp_path)


def test_a_server_outlives_the_thread_that_started_it(tmp_path):
    """As the one that samples ahead, which starts a dead server again and then ends: the kernel asks for threads."""
    served = Served(str(fake_vllm(tmp_path, LISTEN)), tmp_path, tmp_path / "a.log", [])
    thread = threading.Thread(target=lambda: (served.start(), served.wait()))
    thread.start()
    thread.join()
    try:
        time.sleep(0.5)
        assert served.running and served.control.alive()
        group = served._process.pid
        assert len(of_group(group)) == 2
    finally:
        served.stop()
    runs.wait_until(lambda: not of_group(group), "all to die", 5)


# -- a sync -----------------------------------------------------------------------------------------------------------

class Member(Fake):
    """A server that takes weights over gloo, and says what it has; if it `dies`, then when an update begins."""

    def __init__(self):
        self.weights, self.dies, self.group, self.version, self.compared = {}, False, None, "", []
        super().__init__({"/init_weight_transfer_engine": self.join, "/update_weights": self.update,
                          "/start_weight_update": self.start, "/finish_weight_update": self.finish,
                          "/collective_rpc": self.rpc, "/pause": 200, "/resume": 200})

    def join(self, body):
        info = body["init_info"]
        timeout = timedelta(seconds=info["timeout_s"])
        store = dist.PrefixStore(info["prefix"], dist.TCPStore(info["host"], info["port"], is_master=False,
                                                               timeout=timeout, wait_for_workers=False))
        self.group = dist.ProcessGroupGloo(store, info["rank_offset"], info["world_size"], timeout)
        return 200

    def start(self, body):
        if self.dies:
            self.group, self.health = None, 503
        return 200

    def update(self, body):
        if self.group is None:
            return 500
        info = body["update_info"]
        buffer = torch.empty(info["nbytes"], dtype=torch.uint8)
        try:
            self.group.broadcast([buffer], dist.BroadcastOptions()).wait()
        except RuntimeError as error:
            return 500, str(error).encode()
        parts = buffer.view(torch.float32).split([torch.Size(shape).numel() for shape in info["shapes"]])
        self.weights |= dict(zip(info["names"], parts, strict=True))
        return 200

    def finish(self, body):
        self.version = body["weight_version"]
        return 200

    def rpc(self, body):
        if body["method"] == "cosmo_describe":
            return 200, {"results": [SAID]}
        self.compared.append(body["args"][0])
        held = {name: [[sha256(self.weights[name]), list(self.weights[name].shape), None]] for name in body["args"][0]}
        return 200, {"results": [{"tp_rank": 0, "tp_size": 1, "tensors": held}]}

    def back(self):
        """As another process."""
        self.health, self.dies, self.weights = 200, False, {}


def weights_of(seed):
    noise = torch.Generator().manual_seed(seed)
    return {f"layers.{i}.{kind}": torch.randn(5, generator=noise) for i in range(4) for kind in "ab"}


@pytest.fixture
def members(monkeypatch):
    monkeypatch.setattr(sync, "BUCKET_BYTES", 40)  # two tensors
    monkeypatch.setattr(sync, "TIMEOUT_S", 30.0)
    with Member() as one, Member() as two:
        controls = [Control(one.url), Control(two.url)]
        for server in controls:
            server.meet()
        yield WeightSync(controls, torch.device("cpu"), verify_every=100), one, two
        for server in controls:
            server.close()


def test_weights_arrive_and_are_compared(members):
    sender, *both = members
    for turn in range(3):
        weights = weights_of(turn)
        sender.send(weights.items(), f"tag{turn}")
        for member in both:
            assert member.version == f"tag{turn}" and member.weights.keys() == weights.keys()
            assert all(torch.equal(member.weights[name], tensor) for name, tensor in weights.items())
            assert len(member.compared[-1]) == (2 if turn else 8)
    assert both[0].compared[1] != both[0].compared[2]  # another layer
    sender.servers[0].meet()  # it may be another process
    sender.send(weights_of(5).items(), "tag5")
    assert len(both[0].compared[-1]) == 8


@pytest.mark.parametrize("which", [0, 1])
def test_a_server_that_dies_in_a_sync(members, which):
    """The other is not left waiting for what no longer comes, and a second try finds both."""
    sender, *both = members
    sender.send(weights_of(0).items(), "tag0")
    both[which].dies = True
    started = time.monotonic()
    with pytest.raises(ServerDown):
        sender.send(iter(weights_of(1).items()), "tag1")
    assert time.monotonic() - started < 10
    both[which].back()
    sender.send(weights_of(1).items(), "tag2")
    assert {member.version for member in both} == {"tag2"} and {len(member.compared[-1]) for member in both} == {8}
    assert both[0].weights.keys() == both[1].weights.keys() == weights_of(1).keys()


@pytest.mark.parametrize(("health", "kind"), [(200, UserError), (503, ServerDown)])
def test_a_complaint_of_anothers_death(members, health, kind):
    """The one that lives cannot take weights because the other is gone: that is worth another try."""
    sender, one, two = members
    sender.send(weights_of(0).items(), "tag0")
    one.answers["/start_weight_update"], two.health = (500, b"connection closed by peer"), health
    with pytest.raises(kind, match="connection closed by peer"):
        sender.send(weights_of(1).items(), "tag1")


def test_a_server_of_the_users_is_waited_for(monkeypatch, caplog, nothing_left):
    """Before any rank gathers weights: to NCCL a rank that waits longer than ten minutes is dead."""
    with Fake({"/collective_rpc": (200, {"results": [SAID]})}) as fake:
        engine, read = opened([fake.url]), []
        monkeypatch.setattr(engine._sync, "send", lambda weights, tag: read.extend(weights))
        monkeypatch.setattr(answers, "POLL_S", 0.05)
        fake.health = 503
        back = threading.Timer(0.5, lambda: setattr(fake, "health", 200))
        back.start()

        def weights():
            assert fake.health == 200
            return [("a", torch.zeros(1))]

        engine.sync(weights, 3)
        assert len(read) == 1 and engine.version == 3 and f"{fake.url} does not answer; waiting for it" in caplog.text
        monkeypatch.setattr(answers, "BACK_S", 0.2)
        fake.health = 503
        with pytest.raises(UserError, match=rf"{fake.url} did not come back within 0\.2 s; start it again"):
            engine.sync(weights, 4)
        engine.close()
