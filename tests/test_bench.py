"""The kernel benchmark without a GPU: it runs, refuses wrong providers, names absent ones, has the inputs it states."""

import csv
import importlib
import os
import random
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cosmo_rl.kernels import linear_kl
from cosmo_rl.kernels.linear_logprob import Tiles

BENCH = Path(__file__).resolve().parent.parent / "bench"
CPU = torch.device("cpu")


@pytest.fixture
def bench(monkeypatch):
    """The modules of bench/, which are scripts: their folder is on the path for them alone."""
    monkeypatch.syspath_prepend(str(BENCH))
    names = ("inputs", "harness", "peers", "kernel_bench", "gpu_gate", "tune")
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in names:
        sys.modules.pop(name)


@pytest.fixture
def case(bench):
    return bench.inputs.make_case("peaked", "tiny", 64, torch.float32, CPU)


def test_runs_on_a_cpu_names_absent_providers_and_writes_only_where_asked(tmp_path):
    before = sorted(BENCH.rglob("*.csv"))
    out = tmp_path / "rows.csv"
    done = subprocess.run(
        [sys.executable, BENCH / "kernel_bench.py", "--tokens", "40", "--modes", "forward", "both", "--providers",
         "ours-logprob", "ours-fold", "torch", "gemms", "verl", "--out", out], capture_output=True, text=True,
        timeout=120, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})  # no GPU, anywhere
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.rindex("/gemms"):]
    assert "not GPU numbers" in table and "skipped verl: " in table
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    timed = {(row["provider"], row["mode"]) for row in rows if row["status"] == "ok"}
    assert timed == {(name, mode) for name in ("ours-logprob", "torch", "gemms") for mode in ("forward", "both")} | {
        ("ours-fold", "forward")}
    for row in rows:
        if row["status"] != "ok":
            continue
        assert float(row["ms_p20"]) <= float(row["ms"]) <= float(row["ms_p80"]) and int(row["repeats"]) >= 20
        if row["provider"] != "gemms":
            assert float(row["value_max"]) < 1e-4, row
        if row["mode"] == "both" and row["provider"] != "gemms":
            assert float(row["dhidden"]) < 1e-5 and float(row["dweight"]) < 1e-5, row
    assert sorted(BENCH.rglob("*.csv")) == before


@pytest.mark.parametrize("fault, reason", [
    (lambda logp: logp + 0.6, "value_max"), (lambda logp: logp * 1.05, "dhidden"),
    (lambda logp: torch.where(torch.arange(len(logp)) == 3, float("nan"), logp), "nan")])
def test_a_wrong_provider_is_not_timed(bench, case, monkeypatch, fault, reason):
    right = bench.peers._load_torch()

    def forward(case):
        logprobs = fault(right(case).values)
        return bench.peers.Outcome((bench.peers.policy_gradient(case) * logprobs).sum(), logprobs)

    monkeypatch.setattr(bench.kernel_bench, "begin", lambda *_: pytest.fail("it was timed"))
    provider = bench.peers.Provider("wrong", "", lambda: forward)
    (row,) = bench.kernel_bench.measure({"wrong": (provider, forward)}, case, bench.harness.Reference(case), ["both"],
                                        bench.harness.Stopwatch(CPU))
    assert row["status"] == "failed check" and reason in row["reason"], row


@pytest.mark.parametrize("error, status", [(torch.cuda.OutOfMemoryError("full"), "out of memory"),
                                           (KeyError("theirs"), "error")])
def test_a_provider_that_raises_is_a_row(bench, case, error, status):
    def forward(case):
        raise error

    provider = bench.peers.Provider("raises", "", lambda: forward)
    rows = bench.kernel_bench.measure({"raises": (provider, forward)}, case, bench.harness.Reference(case),
                                      ["forward", "both"], bench.harness.Stopwatch(CPU))
    assert [row["status"] for row in rows] == [status] * 2


@pytest.mark.parametrize("source, reason", [
    (None, r"a_peer is not installed \(pip install a-peer==1\)"), ("import no_such_module", "No module named"),
    ("raise TypeError('no semantic key')", "TypeError: no semantic key")])
def test_an_absent_or_broken_peer_is_named(bench, tmp_path, monkeypatch, source, reason):
    if source is not None:
        (tmp_path / "a_peer.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    provider = bench.peers.Provider("peer", "", lambda: importlib.import_module("a_peer"), "a_peer", "a-peer==1")
    with pytest.raises(bench.peers.Unavailable, match=reason):
        provider.start(CPU)


def test_a_gradient_that_is_not_asked_for_in_the_slice_must_be_finite_too(bench, case):
    reference = bench.harness.Reference(case)
    outside = next(i for i in range(case.shape[1]) if i not in reference.rows.tolist())
    right = bench.peers._load_torch()

    def forward(case):
        # The gradient of one row of weight is NaN: 0 * inf in the backward.
        hole = torch.where(torch.arange(case.shape[1]) == outside, 0.0, 1.0)[:, None]
        poisoned = (case.weight.sum(dim=1, keepdim=True) * (1 - hole)).abs().sum()
        outcome = right(case)
        return outcome._replace(loss=outcome.loss + 0.0 * (poisoned - poisoned.detach()).sqrt())

    provider = bench.peers.Provider("holes", "", lambda: forward)
    with pytest.raises(bench.kernel_bench.Wrong, match="dhidden nan"):
        bench.kernel_bench.check(provider, forward, case, reference, True)


def test_reference_is_the_definition(bench, case):
    """Against dense float64 autograd, log-probs and KL."""
    reference = bench.harness.Reference(case)
    hidden, weight = (t.detach().double().requires_grad_() for t in (case.hidden, case.weight))
    logp = (hidden @ weight.T).log_softmax(dim=1)
    at_target = logp.gather(1, case.targets[:, None])[:, 0]
    torch.testing.assert_close(reference.logprobs, at_target.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(reference.entropy, -(logp.exp() * logp).sum(dim=1).detach(), rtol=0, atol=1e-12)
    old = (case.old_policy[0].double() @ case.old_policy[1].double().T).log_softmax(dim=1)
    kl = (old.exp() * (old - logp)).sum(dim=1)
    torch.testing.assert_close(reference.kl, kl.detach(), rtol=0, atol=1e-12)
    assert reference.tokens[-1] == 63 and set(case.targets.tolist()) <= set(reference.rows.tolist())
    for of_kl, values in ((False, at_target), (True, kl)):
        coefs = torch.randn(64, dtype=torch.float64)
        dhidden, dweight = torch.autograd.grad((coefs * values).sum(), (hidden, weight), retain_graph=True)
        found = reference.gradients(coefs, of_kl)
        torch.testing.assert_close(found[0], dhidden[reference.tokens], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found[1], dweight[reference.rows], rtol=1e-9, atol=1e-12)


def test_error_measures(bench):
    expected = torch.tensor([3.0, 4.0])
    assert bench.harness.relative_error(torch.tensor([3.0, 4.5]), expected) == pytest.approx(0.1)
    assert bench.harness.absolute_error(torch.tensor([3.0, 4.5]), expected) == (0.25, 0.5)
    bad = torch.tensor([3.0, float("nan")])
    assert bench.harness.relative_error(bad, expected) != bench.harness.relative_error(bad, expected)
    assert all(error != error for error in bench.harness.absolute_error(bad, expected))


def test_stopwatch_counts_the_call_and_not_its_preparation(bench):
    clock = iter(range(1000))
    bench.harness.time = SimpleNamespace(perf_counter=lambda: next(clock) * 1e-3)
    calls = []
    times = bench.harness.Stopwatch(CPU).many(lambda: calls.append("p") or len(calls), calls.append, 20)
    assert times.repeats == 20 and times.median == pytest.approx(1.0)
    assert len(calls) == 2 * (20 + bench.harness.WARMUP)


def test_inputs_are_deterministic_and_peaked(bench):
    make = bench.inputs.make_case
    one, two, other = (make("peaked", "tiny", 700, torch.float32, CPU, seed) for seed in (1, 1, 2))
    for name in ("hidden", "weight", "targets", "advantages", "old_logprobs", "entropy"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
        assert not torch.equal(getattr(one, name), getattr(other, name)), name
    assert all(map(torch.equal, one.old_policy, two.old_policy))
    quantiles = one.entropy_quantiles()
    assert 0.3 < quantiles["p50"] < 0.9 and 1.6 < quantiles["p90"] < 2.5, quantiles
    assert make("flat", "tiny", 200, torch.float32, CPU).entropy_quantiles()["p50"] > 2
    assert make("iid", "tiny", 200, torch.float32, CPU).entropy_quantiles()["p50"] > 7
    # Sampled from the model: the mean surprise is the mean entropy.
    logp = (one.hidden @ one.weight.T).log_softmax(dim=1).gather(1, one.targets[:, None])[:, 0].detach()
    assert float((-logp).mean()) == pytest.approx(float(one.entropy.mean()), rel=0.15)
    assert float((one.old_logprobs - logp).std()) == pytest.approx(0.05, rel=0.1)


def test_tune_refuses_a_configuration_that_is_wrong(bench, case, interpreter, monkeypatch, capsys):
    # The interpreter takes as long for a tile of the shipped shape as for one 16 times as wide.
    monkeypatch.setattr(linear_kl, "kl_tiles", lambda *_: Tiles(16, 1024, 64, num_warps=4, num_stages=2))
    monkeypatch.setattr(bench.tune, "KL", [((16, 512, 64, 4, 2, 16), 1), ((32, 1024, 64, 4, 2, 16), 2)])
    assert bench.tune.main(["--kernels", "kl"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.endswith("ok, not timed") for line in lines)
    _, _, call, _ = bench.tune.kernels(case, "triton")["kl"]
    expected = call()
    found = bench.tune.measure(lambda: 1.1 * call(), expected, None, 20)
    assert found == {"status": "relative error 0.1 against the shipped configuration"}
    nan = bench.tune.measure(lambda: call() * float("nan"), expected, None, 20)
    assert "nan" in nan["status"]


def test_gate_without_a_gpu_says_so(bench, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.gpu_gate.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().out


def test_gate_makes_checkout_and_wheels_importable(bench, tmp_path, monkeypatch):
    (tmp_path / "checkout" / "wheels").mkdir(parents=True)
    for name in bench.gpu_gate.FOLDERS:
        (tmp_path / "checkout" / name).symlink_to(BENCH.parent / name)
    with zipfile.ZipFile(tmp_path / "checkout" / "wheels" / "made_up-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("made_up/__init__.py", "value = 3\n")
        wheel.writestr("made_up.pth", "import sys; sys.made_up = 4\n")
    monkeypatch.setattr(bench.gpu_gate, "ROOT", tmp_path / "checkout")
    (tmp_path / "made").mkdir()
    environment = bench.gpu_gate.prepare(tmp_path / "made")
    code = "import sys, made_up, cosmo_rl.kernels as k; print(made_up.value, sys.made_up, list(k.__path__)[0])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["3", "4", str(tmp_path / "made" / "cosmo_rl" / "kernels")], done.stderr
    assert environment["HF_HUB_OFFLINE"] == "1"


def gate_of(bench, folder, log, **changed):
    return bench.gpu_gate.Gate("a-gpu", folder, dict(os.environ), log, **{"rehearsal": False, **changed})


@pytest.mark.parametrize("deaf", [False, True])
def test_gate_ends_a_step_that_hangs(bench, tmp_path, monkeypatch, deaf):
    """It is interrupted first, to tell what it knows, as pytest does; no child of it is left."""
    script = tmp_path / "script.py"
    script.write_text(f"""import signal, subprocess, time
child = subprocess.Popen(["sleep", "60"])
print("started", child.pid, flush=True)
{"signal.signal(signal.SIGINT, signal.SIG_IGN)" if deaf else ""}
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("what it knows", flush=True)
""")
    monkeypatch.setattr(bench.gpu_gate, "GRACE_S", 1)
    with open(tmp_path / "log", "w") as log, pytest.raises(bench.gpu_gate.Failed, match="killed after 1 s"):
        gate_of(bench, tmp_path, log).run(str(script), limit=1.0)
    text = (tmp_path / "log").read_text()
    assert "started" in text and ("what it knows" in text) != deaf
    child, stop = Path("/proc") / text.split("started ")[1].split()[0] / "stat", time.monotonic() + 20
    while child.exists() and child.read_text().split()[2] != "Z" and time.monotonic() < stop:
        time.sleep(0.05)
    assert time.monotonic() < stop


def test_gate_gives_a_step_what_the_ones_before_it_left(bench, tmp_path, monkeypatch):
    """What a step found is at $OUT before the next one is begun, and a second call loses nothing of the first."""
    given, gate, out = {}, bench.gpu_gate, tmp_path / "out"

    def step(name):
        def run(gate, limit):
            given[name] = limit
            (tmp_path / f"tune-{gate.name}.csv").write_text(f"rows of {name}")
            assert name == "one" or (out / "tune-a-gpu.csv").read_text() == "rows of one"
            return f"{name} ran"

        return run

    def refuse(*_):
        raise bench.gpu_gate.Skipped("no such thing here")

    steps = {"one": (step("one"), 100.0), "two": (step("two"), 60.0), "three": (refuse, 5.0)}
    monkeypatch.setattr(gate, "STEPS", steps)
    monkeypatch.setattr(gate, "BUDGET_S", 200.0)
    monkeypatch.setattr(gate, "RESULTS", tmp_path)
    monkeypatch.setattr(gate, "gpu_name", lambda: "A GPU")
    out.mkdir()
    monkeypatch.setenv("OUT", str(out))
    assert gate.main(["--steps", "one", "two"]) == 0
    assert given["one"] == pytest.approx(140, abs=5) and given["two"] == pytest.approx(200, abs=5)
    assert gate.main(["--steps", "three"]) == 0
    log = (out / "gate-a-gpu.log").read_text()
    assert "one ran" in log and "skipped: no such thing here" in log and log.count("=== ") == 2
    assert (out / "tune-a-gpu.csv").read_text() == "rows of two"
    assert sum(limit for _, limit in importlib.reload(gate).STEPS.values()) <= gate.BUDGET_S


def test_gate_rehearses_the_commands_that_it_will_run(bench, tmp_path, monkeypatch, capsys):
    """Without a GPU: small, in the interpreter, and nothing of it stands among the results."""
    before = sorted(BENCH.rglob("results/*"))
    monkeypatch.delenv("OUT", raising=False)
    assert bench.gpu_gate.main(["--rehearse", "--steps", "smoke", "kl"]) == 0
    said = capsys.readouterr().out
    assert "linear_cpgd     ok" in said and "ours-kl" in said and "kl       passed" in said
    assert sorted(BENCH.rglob("results/*")) == before


def test_what_is_compared_is_timed_by_turns(bench, case, monkeypatch):
    """A B A B, and a provider that fails in a turn leaves the others theirs."""
    order = []

    def forward(name):
        def run(case):
            order.append(name)
            if name == "c" and order.count("c") > 20:
                raise RuntimeError("late")
            return bench.peers._load_torch()(case)

        return run

    monkeypatch.setattr(bench.harness, "WARMUP", 0)
    providers = {name: (bench.peers.Provider(name, "", lambda: None), forward(name)) for name in "abc"}
    rows = bench.kernel_bench.measure(providers, case, bench.harness.Reference(case), ["forward"],
                                      bench.harness.Stopwatch(CPU), repeats=20)
    assert [row["status"] for row in rows] == ["ok", "ok", "error"] and "late" in rows[2]["reason"]
    assert [row.get("repeats") for row in rows] == [20, 20, None]
    assert "".join(order).endswith("c" + 3 * "aaaaabbbbbccccc" + "aaaaabbbbbccc"), order  # three of c are the check's


def test_the_products_and_ours_come_first(bench):
    names = ["verl", "torch", "ours-cpgd", "trl", "gemms"]
    orders = {tuple(map(tuple, bench.kernel_bench.order_of(names, random.Random(seed)))) for seed in range(20)}
    assert {order[0] for order in orders} == {("gemms", "ours-cpgd")}
    assert {frozenset(order[1:]) for order in orders} == {frozenset({("verl",), ("torch",), ("trl",)})}
    assert len(orders) > 3


def test_gate_names_what_cannot_be_imported(bench):
    found = bench.gpu_gate.unimportable({"json": "json", "no_such_module": "its-package"}, dict(os.environ))
    assert found == ["its-package (ModuleNotFoundError: No module named 'no_such_module')"]


def test_gate_counts_tests(bench, tmp_path, monkeypatch):
    """A test step is passed only if a test ran and none failed."""
    def outcome(status: int, suite: str) -> str:
        gate = SimpleNamespace(folder=tmp_path, environment={}, rehearsal=False, say=lambda *_: None,
                               run=lambda *_, limit: (tmp_path / "alone.xml").write_text(
                                   f"<testsuites><testsuite {suite}/></testsuites>") and status)
        return bench.gpu_gate.tests(marked="alone", several=False)(gate, 1.0)

    assert outcome(0, 'tests="5" failures="0" errors="0" skipped="2"') == "3 passed, 0 failed, 2 skipped"
    for status, suite in ((1, 'tests="5" failures="1"'), (0, 'tests="5" skipped="5"'), (5, 'tests="0"'),
                          (2, 'tests="1"')):
        with pytest.raises(bench.gpu_gate.Failed):
            outcome(status, suite)
