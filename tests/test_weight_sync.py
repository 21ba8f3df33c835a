"""Weights into vLLM servers and the servers themselves, without vLLM: what is compared, how a server is started, ends,
and is told wrong. tests/test_vllm_rollout.py has a real one."""

# pyright: reportOptionalSubscript=false, reportArgumentType=false, reportOptionalMemberAccess=false

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
from concurrent.futures import ThreadPoolExecutor
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
from cosmo_rl.cpgd.rollout.engine import Lost
from cosmo_rl.cpgd.rollout.vllm import compare, serve, sync
from cosmo_rl.cpgd.rollout.vllm import control as control_module
from cosmo_rl.cpgd.rollout.vllm.compare import WeightsDiffer, chosen, same, sha256, shard
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
        "logprobs_mode": "processed_logprobs", "gpu": "", "data_parallel_size": 1, "pipeline_parallel_size": 1}
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


# -- a whole sync, without vLLM ---------------------------------------------------------------------------------------

class Workers(Fake):
    """A server of `size` workers that join the group, take the buckets, and hold parts along dimension 0."""

    def __init__(self, size=1, **answers):
        said = SAID | {"born": f"{id(self)}"}
        super().__init__({"/pause": 200, "/resume": 200, "/start_weight_update": 200,
                          "/finish_weight_update": 200, "/init_weight_transfer_engine": self.join,
                          "/update_weights": self.take, "/collective_rpc": self.rpc} | answers)
        self.size, self.said, self.held, self.groups, self.sizes = size, said, {}, [], []

    def each(self, action):
        try:
            with ThreadPoolExecutor(self.size) as pool:
                list(pool.map(action, range(self.size)))
        except RuntimeError as error:  # torch's: another member did not come
            return 500, {"error": str(error)}
        return 200, {}

    def join(self, body):
        info, self.groups = body["init_info"], [None] * self.size
        assert info["transport"] == "gloo" and info["port"] > 0

        def one(i):
            timeout = timedelta(seconds=info["timeout_s"])
            store = dist.PrefixStore(info["prefix"], dist.TCPStore(info["host"], info["port"], is_master=False,
                                                                   timeout=timeout, wait_for_workers=False))
            self.groups[i] = dist.ProcessGroupGloo(store, info["rank_offset"] + i, info["world_size"], timeout)

        return self.each(one)

    def take(self, body):
        info = body["update_info"]
        self.sizes.append(info["nbytes"])

        def one(i):
            buffer, start = torch.empty(info["nbytes"], dtype=torch.uint8), 0
            self.groups[i].broadcast([buffer], dist.BroadcastOptions()).wait()
            for name, dtype, shape in zip(info["names"], info["dtypes"], info["shapes"], strict=True):
                dtype = getattr(torch, dtype)
                end = start + dtype.itemsize * torch.Size(shape).numel()
                whole = buffer[start:end].clone().view(dtype).view(shape)
                self.held[name, i] = whole.chunk(self.size)[i]
                start = end

        return self.each(one)

    def rpc(self, body):
        if body["method"] == "cosmo_describe":
            return 200, {"results": [self.said] * self.size}
        digests = lambda i, name: [[sha256(self.held[name, i]), list(self.held[name, i].shape), None]]
        return 200, {"results": [
            {"tp_rank": i, "tp_size": self.size,
             "tensors": {name: digests(i, name) if (name, i) in self.held else None for name in body["args"][0]}}
            for i in range(self.size)]}


def weights(count=7):
    for i in range(count):
        yield f"layers.{i}.a", torch.randn(4, 3)
        yield f"layers.{i}.b", torch.randn(6).bfloat16()
    yield "scale", torch.randn(2)


def syncing(servers, verify_every=1):
    controls = [Control(server.url) for server in servers]
    for one in controls:
        one.meet()
    return WeightSync(controls, torch.device("cpu"), verify_every)


def paths(server):
    return [path for path, body in server.asked if path != "/health" and (body or {}).get("method") != "cosmo_describe"]


@pytest.mark.parametrize("bucket", [1, 100, 10**6])
def test_all_tensors_reach_all_workers_of_all_servers(monkeypatch, bucket):
    monkeypatch.setattr(sync, "BUCKET_BYTES", bucket)
    with Workers(2) as one, Workers() as two:
        sending = syncing([one, two])
        for turn in range(2):
            sent = dict(weights())
            sending.send(sent.items(), f"tag{turn}")
            for name, tensor in sent.items():
                for server in (one, two):
                    for i in range(server.size):
                        part = tensor.chunk(server.size)[i]
                        assert torch.equal(server.held[name, i], part) and server.held[name, i].dtype == tensor.dtype
        assert sum(one.sizes) == 2 * (7 * (48 + 12) + 8) and one.sizes == two.sizes
        assert len(one.sizes) == 2 * {1: 15, 100: 4, 10**6: 1}[bucket]
        began, *rest = paths(one)
        buckets = ["/update_weights"] * (len(one.sizes) // 2)
        once = ["/start_weight_update", *buckets, "/finish_weight_update", "/collective_rpc", "/resume"]
        assert [began, *rest] == ["/pause", "/init_weight_transfer_engine", *once, "/pause", *once]  # one group
        assert [body for path, body in one.asked if path == "/finish_weight_update"] == [
            {"weight_version": "tag0"}, {"weight_version": "tag1"}]
        sending.leave()


def test_a_worker_of_one_server_differs(monkeypatch):
    """It is named, with its part; the servers do not sample again by such weights."""
    with Workers() as one, Workers(2) as two:
        sending = syncing([one, two])
        real = two.answers["/update_weights"]

        def spoiled(body):
            found = real(body)
            two.held["layers.3.a", 1][0, 0] += 1
            return found

        two.answers["/update_weights"] = spoiled
        with pytest.raises(WeightsDiffer, match=rf"^{two.url} .* 1 of 15 tensors .* as layers\.3\.a \(worker 1 of 2"):
            sending.send(weights(), "tag")
        assert "/resume" not in paths(one) + paths(two)
        sending.leave()


def test_a_tensor_that_a_server_does_not_have():
    with Workers() as server:
        sending = syncing([server])
        real = server.answers["/update_weights"]
        server.answers["/update_weights"] = lambda body: (real(body), server.held.pop(("scale", 0)))[0]
        with pytest.raises(WeightsDiffer, match="as scale"):
            sending.send(weights(), "tag")
        sending.leave()


def test_a_tied_head_is_compared_though_it_is_sent_once():
    embedding, asked = torch.randn(4, 2), []
    with Workers() as server:
        sending = syncing([server])
        server.answers["/collective_rpc"] = lambda body: asked.extend(body["args"][0]) or server.rpc(body)
        with pytest.raises(WeightsDiffer, match=r"as lm_head\.weight"):
            sending.send([(compare.EMBEDDING, embedding)], "tag")
        assert asked == [compare.EMBEDDING, compare.HEAD] and (compare.HEAD, 0) not in server.held
        sending.leave()


@pytest.mark.parametrize("path", ["/pause", "/init_weight_transfer_engine", "/start_weight_update", "/update_weights",
                                  "/finish_weight_update", "/collective_rpc", "/resume"])
@pytest.mark.parametrize("dies", [True, False], ids=["dies", "refuses"])
def test_a_server_that_fails_at_any_step(monkeypatch, path, dies):
    """Nothing hangs, though the other server and this process wait in the group; then all is sent again.

    Where it answers instead of coming to the group, the others wait for their timeout: one that is really gone breaks
    its connections.
    """
    monkeypatch.setattr(sync, "TIMEOUT_S", 3.0)
    started = time.monotonic()
    with Workers() as one, Workers() as two:
        sending = syncing([one, two])
        honest, two.answers[path] = two.answers[path], (500, {"error": "no"})
        two.health = 503 if dies else 200
        with pytest.raises(ServerDown if dies else UserError, match=rf"{two.url}{path}"):
            sending.send(weights(), "tag")
        assert time.monotonic() - started < 10
        two.answers[path], two.health = honest, 200
        if dies:
            sending.servers[1].meet()  # it was started again
            sending.send(weights(), "again")
            assert paths(two)[-1] == "/resume" and one.held.keys() == two.held.keys()
        sending.leave()


@pytest.mark.parametrize("which", [0, 1])
def test_a_server_whose_connections_break(monkeypatch, which):
    """The other waits in the group for what no longer comes: it is not left there until its timeout."""
    monkeypatch.setattr(sync, "TIMEOUT_S", 30.0)
    with Workers() as one, Workers() as two:
        sending, dying = syncing([one, two]), (one, two)[which]

        def die(body):
            dying.groups, dying.health = [None], 503
            return 200

        dying.answers["/start_weight_update"] = die
        started = time.monotonic()
        with pytest.raises(ServerDown):
            sending.send(weights(), "tag")
        assert time.monotonic() - started < 10
        dying.answers["/start_weight_update"], dying.health = 200, 200
        sending.servers[which].meet()
        sending.send(weights(), "again")
        assert len(one.held) == len(two.held) == 15
        sending.leave()


def test_a_complaint_of_anothers_death():
    """The one that lives cannot take weights because the other is gone: that is worth another try."""
    with Workers(**{"/start_weight_update": (500, b"closed by peer")}) as one, Workers() as two:
        sending = syncing([one, two])
        with pytest.raises(UserError, match="closed by peer"):
            sending.send(weights(), "tag")
        two.health = 503
        with pytest.raises(ServerDown, match=rf"{two.url} has died in a sync .*closed by peer"):
            sending.send(weights(), "tag")


def test_a_new_server_is_compared_whole():
    with Workers() as one, Workers() as two:
        sending, compared = syncing([one, two], 100), []
        one.answers["/collective_rpc"] = lambda body: compared.append(len(body["args"][0])) or one.rpc(body)
        for turn in range(4):
            if turn == 2:
                sending.servers[1].meet()  # it may be another process
            sending.send(weights(), "tag")
        assert compared == [15, 3, 15, 3]
        sending.leave()


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
    ({"data_parallel_size": 2}, "has data_parallel_size 2, and the run 1; give it --data-parallel-size 1"),
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


def test_a_server_of_the_users_is_waited_for(monkeypatch, caplog, nothing_left):
    """Before any rank gathers weights: to NCCL a rank that waits longer than ten minutes is dead."""
    with Fake({"/collective_rpc": (200, {"results": [SAID]})}) as fake:
        engine, read = opened([fake.url]), []
        monkeypatch.setattr(engine._sync, "send", lambda weights, tag: read.extend(weights))
        monkeypatch.setattr(control_module, "POLL_S", 0.05)
        fake.health = 503
        back = threading.Timer(0.5, lambda: setattr(fake, "health", 200))
        back.start()

        def policy():
            assert fake.health == 200
            return [("a", torch.zeros(1))]

        engine.sync(policy, 3)
        assert len(read) == 1 and engine.version == 3 and f"{fake.url} does not answer; waiting for it" in caplog.text
        monkeypatch.setattr(control_module, "BACK_S", 0.2)
        fake.health = 503
        with pytest.raises(UserError, match=rf"{fake.url} did not come back within 0\.2 s; start it again"):
            engine.sync(policy, 4)
        engine.close()


def test_why_requests_are_lost_is_said_once(caplog, nothing_left):
    requests = [s.response.request for s in runs.rollout().samples]
    answers = {"/collective_rpc": (200, {"results": [SAID]})}
    with Fake(answers | {"/inference/v1/generate": (500, b"no room\nfor it")}) as one, Fake(answers) as two:
        engine = opened([one.url, two.url])
        two.answers["/inference/v1/generate"] = (503, b"engine dead")
        with pytest.raises(Lost):
            list(engine.stream(requests))
        told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert sorted(re.sub(r"request \S+:", "request:", line) for line in told) == sorted([
            f"WARNING: request: {one.url} answers 500: no room for it",
            f"WARNING: request: {two.url} answers 503: engine dead"])
        engine.close()
