"""Everything that needs a GPU, in one command of under 9 minutes: the GPU tests, a short kernel benchmark, a short run.

    make gpu                        # or: python3 bench/gpu_gate.py
    python3 bench/gpu_gate.py --run bench/kernel_bench.py --heads 7b --providers ours-cpgd gemms

It takes the machine's own python3 and installs nothing. The folders of the checkout become importable as cosmo_rl.*
through links in a temporary folder; wheels in the git-ignored folder wheels/ are unpacked beside them. The network is
not used. What is printed goes to bench/results/gate-GPU.log too, and with the tables to the folder $OUT if that is set.
Where torch and transformers are there already, these fill wheels/ (5 MB) for the run, and for the peers without CuTe:

    pip download --no-deps --only-binary=:all: --python-version 3.12 -d wheels tyro typeguard docstring-parser \\
        easy-vqa liger-kernel==0.8.5 cut-cross-entropy==25.1.1 verl==0.9.1 trl==1.16.0

Exit status: 0 if no step failed (a skipped step is named, and is not a pass), 1 if one failed, 2 without a GPU.
"""

import argparse
import importlib.util
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
FOLDERS = ("kernels", "cpgd", "model", "data")
BUDGET_S = 525
"""Of all steps together; what is over is killed. What a step leaves is there for the next ones."""
GRACE_S = 5
"""Between interrupt and kill: pytest then tells what has failed so far."""
TABLE_S = 40
"""Kept of a benchmark's time for the measurement in progress and the table."""
NEEDED = {"tyro": "tyro", "easy_vqa": "easy-vqa"}
"""Import name and distribution of what train.py needs beyond torch and transformers."""


class Skipped(Exception):
    """A step that cannot run here; the message says why."""


class Failed(Exception):
    """A step that did not pass; the message says why."""


def prepare(folder: Path) -> dict[str, str]:
    """The environment of a child: cosmo_rl.* and the wheels importable, no network, output unbuffered."""
    package = folder / "cosmo_rl"
    package.mkdir()
    for name in FOLDERS:
        (package / name).symlink_to(ROOT / name, target_is_directory=True)
    # By this name: quack-kernels takes what lies elsewhere for the user's own code, and fails to import.
    site = folder / "site-packages"
    site.mkdir()
    for wheel in sorted((ROOT / "wheels").glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    if any(site.glob("*.pth")):  # python reads them in its own folders only
        (folder / "sitecustomize.py").write_text(f"import site\nsite.addsitedir({str(site)!r})\n")
    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(site), *inherited]), "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def run(command: list[str], environment: dict[str, str], limit: float, log: TextIO) -> int:
    """Exit status of a command whose output goes to the screen and to `log`.

    Raises:
        Failed: it ran longer than `limit` seconds, and was interrupted, then killed with all its children.
    """
    say(f"$ {' '.join(command)}", log)
    # A shell's background jobs ignore it, and their children would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   start_new_session=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.stdout is not None
    output = process.stdout
    os.set_blocking(output.fileno(), False)

    def relay(seconds: float) -> None:
        stop = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < stop:
            waiting.select(timeout=0.5)
            say((output.read() or b"").decode(errors="replace"), log, end="")

    with selectors.DefaultSelector() as waiting:
        waiting.register(output, selectors.EVENT_READ)
        try:
            relay(limit)
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                relay(GRACE_S)
                raise Failed(f"killed after {limit:.0f} s")
        finally:
            with suppress(ProcessLookupError):  # the last of them has ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            say((output.read() or b"").decode(errors="replace"), log, end="")
    return process.returncode


def say(text: str, log: TextIO, end: str = "\n") -> None:
    for stream in (sys.stdout, log):
        stream.write(text + end)
        stream.flush()


def unimportable(modules: dict[str, str], environment: dict[str, str]) -> list[str]:
    """Distribution and error of each of `modules` (import name: distribution) that a child cannot import."""
    found = []
    for name, distribution in modules.items():  # imported, not only found: each needs packages of its own
        done = subprocess.run([sys.executable, "-P", "-c", f"import {name}"], env=environment, capture_output=True,
                              text=True)
        if done.returncode:
            found.append(f"{distribution} ({(done.stderr.splitlines() or ['no message'])[-1]})")
    return found


def test_step(environment: dict[str, str], limit: float, folder: Path, log: TextIO) -> str:
    """The tests marked gpu, that of Liger's layers where the trainer would take them; no test that ran is no pass."""
    report, files = folder / "tests.xml", ["tests/test_gpu.py"]
    if absent := unimportable({**NEEDED, "liger_kernel": "liger-kernel"}, environment):
        say(f"tests/test_liger.py is left out; not importable: {', '.join(absent)}", log)
    else:
        files.append("tests/test_liger.py")
    status = run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", *files, "-p", "no:cacheprovider",
                  "--durations=10", f"--junitxml={report}"], environment, limit, log)
    if not report.exists():
        raise Failed(f"pytest ended with status {status} and no report")
    counts = [int(suite.get(name, 0)) for suite in ElementTree.parse(report).iter("testsuite")
              for name in ("tests", "failures", "errors", "skipped")]
    total, failures, errors, skipped = (sum(counts[i::4]) for i in range(4))
    found = f"{total - failures - errors - skipped} passed, {failures + errors} failed, {skipped} skipped"
    if status not in (0, 5) or failures or errors:
        raise Failed(f"{found}, status {status}")
    if total == skipped:  # there is a GPU: they should have run
        raise Failed(f"no test ran ({found})")
    return found


def bench_step(providers: tuple[str, ...]) -> Callable[[dict[str, str], float, Path, TextIO], str]:
    def step(environment: dict[str, str], limit: float, _: Path, log: TextIO) -> str:
        status = run([sys.executable, "bench/kernel_bench.py", "--quick", "--deadline", str(round(limit - TABLE_S)),
                      "--providers", *providers], environment, limit, log)
        if status:
            raise Failed(f"status {status}: one of ours failed its check, or the CUDA context was lost")
        return "rows are in the results file; a peer that could not run is named there"

    return step


def train_step(environment: dict[str, str], limit: float, folder: Path, log: TextIO) -> str:
    """Eight optimizer steps of the tiny preset on the GPU; the report reads a few rows of each group only."""
    if missing := unimportable(NEEDED, environment):
        raise Skipped(f"not importable: {', '.join(missing)}")
    metrics = folder / "run" / "stage2" / "metrics.jsonl"
    # By its address: the name of a machine without a network may resolve to nothing, after a long wait.
    status = run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
                  "--nproc-per-node", "1", "train.py", "--stage", "2", "--steps", "8", "--run-dir",
                  str(folder / "run"), "--eval.max-rows", "8"], environment, limit, log)
    lines = metrics.read_text().count("\n") if metrics.exists() else 0
    if os.environ.get("OUT") and lines:
        shutil.copy(metrics, os.environ["OUT"])
    if status or lines != 8:
        raise Failed(f"status {status}, {lines} of 8 lines in metrics.jsonl")
    return "8 optimizer steps"


# Seconds for each, beside what the steps before it left. The peers come in a process of their own, so that none of them
# can take our numbers along.
OURS = ("ours-logprob", "ours-cpgd", "ours-fold", "ours-kl", "gemms", "torch")
PEERS = ("gemms", "ours-logprob", "ours-cpgd", "verl", "trl", "cce", "liger-scaled-ce", "quack", "liger-grpo")
STEPS = {"tests": (test_step, 170.0), "bench": (bench_step(OURS), 140.0), "peers": (bench_step(PEERS), 115.0),
         "train": (train_step, 85.0)}


def gpu_name() -> str:
    """Name of the GPU; empty without one, or without torch."""
    if importlib.util.find_spec("torch") is None:
        return ""
    import torch
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--run", nargs=argparse.REMAINDER, help="run this script with these options instead")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    gpu = gpu_name()
    if not gpu:
        print("gpu_gate: no CUDA device (or no torch) here; nothing was run, and nothing is said about the GPU")
        return 2
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"gate-{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.log"
    summary, failed = [], False
    with tempfile.TemporaryDirectory() as temporary, open(path, "w", encoding="utf-8") as log:
        folder = Path(temporary)
        environment = prepare(folder)
        if options.run:
            try:
                return run([sys.executable, *options.run], environment, BUDGET_S, log)
            except Failed as reason:
                print(f"gpu_gate: {reason}")
                return 1
            finally:
                bring_back()
        for number, name in enumerate(options.steps):
            step = STEPS[name][0]
            later = sum(STEPS[other][1] for other in options.steps[number + 1:])
            limit = BUDGET_S - (time.monotonic() - started) - later
            say(f"\n== {name} (at most {limit:.0f} s)", log)
            began = time.monotonic()
            try:
                if limit < TABLE_S + 5:
                    raise Skipped("no time left")
                found = f"passed: {step(environment, limit, folder, log)}"
            except Skipped as reason:
                found = f"skipped: {reason}"
            except Failed as reason:
                found, failed = f"failed: {reason}", True
            summary.append(f"{name:6} {found} ({time.monotonic() - began:.0f} s)")
            bring_back()
        say("\n== " + gpu, log)
        for line in summary:
            say(line, log)
    bring_back()
    return int(failed)


def bring_back() -> None:
    """Copy log and tables to $OUT, after each step: a later one may be cut off."""
    if os.environ.get("OUT"):
        for file in [*RESULTS.glob("gate-*.log"), *RESULTS.glob("kernel-*.csv")]:
            shutil.copy(file, os.environ["OUT"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
