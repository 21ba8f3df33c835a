"""Everything that needs a GPU, in one command of under 9 minutes, the most valuable figures first.

    make gpu                                        # or: python3 bench/gpu_gate.py
    python3 bench/gpu_gate.py --steps peers train   # a second call, for what the first one left out
    python3 bench/gpu_gate.py --run bench/kernel_bench.py --heads 7b --providers ours-cpgd gemms
    python3 bench/gpu_gate.py --rehearse            # without a GPU: the same commands, small, in Triton's interpreter

    smoke      every op once, against the reference: a broken machine costs 15 s
    headline   ours and the bare products, by turns: 7B at 8,192 tokens, 3B, 7B at 32,768
    tune       other tile shapes beside the shipped ones
    tests      the tests marked gpu, on eight processes; then those of memory, offsets and waits, alone
    peers      verl, TRL and CCE at the 7B head
    kl         the exact KL
    train      eight optimizer steps of the tiny preset
    profile    Nsight Compute's full set of one launch of the forward
    grpo       Liger's GRPO loss, and what needs CuTe

It takes the machine's own python3 and installs nothing. The folders of the checkout become importable as cosmo_rl.*
through links in a temporary folder; wheels in the git-ignored folder wheels/ are unpacked beside them. The network is
not used. What is printed is added to bench/results/gate-GPU.log too; after each step log, tables and the training
run's metrics.jsonl are copied to the folder $OUT if that is set. Where torch and transformers are there already, these
fill wheels/ (5 MB) for the run, and for the peers without CuTe:

    pip download --no-deps --only-binary=:all: --python-version 3.12 -d wheels tyro typeguard docstring-parser \\
        easy-vqa liger-kernel==0.8.5 cut-cross-entropy==25.1.1 verl==0.9.1 trl==1.16.0

Exit status: 0 if no step failed (a skipped step is named, and is not a pass), 1 if one failed, 2 without a GPU.
"""

import argparse
import datetime
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
from collections.abc import Callable, Sequence
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
TABLE_S = 16
"""Half of it is kept of a benchmark's time for the measurement in progress and the table."""
LEAST_S = 12
"""A step with less left is not begun."""
PROCESSES = 8
"""That compile and run tests side by side."""
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


class Gate:
    """One call: where its children run, and where their output goes."""

    def __init__(self, name: str, folder: Path, environment: dict[str, str], log: TextIO, *, rehearsal: bool) -> None:
        self.name, self.folder, self.environment, self.log, self.rehearsal = name, folder, environment, log, rehearsal

    def say(self, text: str, end: str = "\n") -> None:
        for stream in (sys.stdout, self.log):
            stream.write(text + end)
            stream.flush()

    def run(self, *arguments: str, limit: float) -> int:
        """`command` of this python."""
        return self.command([sys.executable, *arguments], limit)

    def command(self, command: list[str], limit: float) -> int:
        """Exit status of a command whose output goes to the screen and to the log.

        Raises:
            Failed: it ran longer than `limit` seconds, and was interrupted, then killed with all its children.
        """
        self.say(f"$ {' '.join(command)}")
        # A shell's background jobs ignore it, and their children would inherit that.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            process = subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE,
                                       stderr=subprocess.STDOUT, start_new_session=True)
        finally:
            signal.signal(signal.SIGINT, before)
        assert process.stdout is not None
        output = process.stdout
        os.set_blocking(output.fileno(), False)

        def relay(seconds: float) -> None:
            stop = time.monotonic() + seconds
            while process.poll() is None and time.monotonic() < stop:
                waiting.select(timeout=0.5)
                self.say((output.read() or b"").decode(errors="replace"), end="")

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
                self.say((output.read() or b"").decode(errors="replace"), end="")
        return process.returncode

    def bring_back(self) -> None:
        """Copy what this GPU's results are to $OUT, after each step: a later one may be cut off."""
        if os.environ.get("OUT"):
            self.log.flush()
            for file in RESULTS.glob(f"*-{self.name}.*"):
                shutil.copy(file, os.environ["OUT"])


Step = Callable[[Gate, float], str]
"""What it found, within so many seconds; raises Failed or Skipped."""


def unimportable(modules: dict[str, str], environment: dict[str, str]) -> list[str]:
    """Distribution and error of each of `modules` (import name: distribution) that a child cannot import."""
    found = []
    for name, distribution in modules.items():  # imported, not only found: each needs packages of its own
        done = subprocess.run([sys.executable, "-P", "-c", f"import {name}"], env=environment, capture_output=True,
                              text=True)
        if done.returncode:
            found.append(f"{distribution} ({(done.stderr.splitlines() or ['no message'])[-1]})")
    return found


def tests(*options: str, marked: str, several: bool) -> Step:
    """The tests marked gpu and `marked`, where `several`, on PROCESSES of them if pytest-xdist is there."""

    def step(gate: Gate, limit: float) -> str:
        report, files = gate.folder / f"{marked.replace(' ', '-')}.xml", ["tests/test_gpu.py", *options]
        environment = gate.environment
        if several:
            if gate.rehearsal:
                files += ["-k", "objective"]  # the interpreter takes many minutes for the others
            elif absent := unimportable({**NEEDED, "liger_kernel": "liger-kernel"}, environment):
                gate.say(f"tests/test_liger.py is left out; not importable: {', '.join(absent)}")
            else:
                files.append("tests/test_liger.py")
            if unimportable({"xdist": "pytest-xdist"}, environment):
                gate.say("pytest-xdist is not importable: one test after the other")
            else:
                files += ["-n", str(PROCESSES)]
        status = gate.run("-m", "pytest", "-q", "-m", f"gpu and {marked}", *files, "-p", "no:cacheprovider",
                          "--durations=10", f"--junitxml={report}", limit=limit)
        if not report.exists():
            raise Failed(f"pytest ended with status {status} and no report")
        counts = [int(suite.get(name, 0)) for suite in ElementTree.parse(report).iter("testsuite")
                  for name in ("tests", "failures", "errors", "skipped")]
        total, failures, errors, skipped = (sum(counts[i::4]) for i in range(4))
        found = f"{total - failures - errors - skipped} passed, {failures + errors} failed, {skipped} skipped"
        if status not in (0, 5) or failures or errors:
            raise Failed(f"{found}, status {status}")
        if total == skipped and not gate.rehearsal:  # there is a GPU: they should have run
            raise Failed(f"no test ran ({found})")
        return found

    return step


def bench(*runs: Sequence[str], providers: Sequence[str]) -> Step:
    """kernel_bench.py once for each of `runs` (its options), one after the other; a peer may take the context along."""

    def step(gate: Gate, limit: float) -> str:
        stop, failed = time.monotonic() + limit, []
        for number, options in enumerate(runs):
            left = (stop - time.monotonic()) / (len(runs) - number)
            if left < TABLE_S:
                raise Failed(f"no time left for {' '.join(options)}")
            small = ["--providers", *(name for name in providers if name in ON_CPU), "--tokens", "40", "--out",
                     str(gate.folder / "rows.csv")]
            real = ["--providers", *providers, *options, "--max-seconds", "15"]
            status = gate.run("bench/kernel_bench.py", "--modes", "forward", "both", "--deadline",
                              str(round(left - TABLE_S / 2)), *(small if gate.rehearsal else real), limit=left)
            failed += [" ".join(options)] if status else []
            gate.bring_back()
        if failed:
            raise Failed(f"one of ours failed its check, or the CUDA context was lost: {', '.join(failed)}")
        return "rows are in the results file; a peer that could not run is named there"

    return step


def smoke(gate: Gate, limit: float) -> str:
    """Every op once, small, against the reference."""
    if status := gate.run("bench/smoke.py", limit=limit):
        raise Failed(f"status {status}")
    return "every op agrees with the reference"


def tune(gate: Gate, limit: float) -> str:
    """The table of configurations; it stops by itself."""
    kernels = ["kl"] if gate.rehearsal else ["forward", "cpgd", "kl-shared"]
    if status := gate.run("bench/tune.py", "--kernels", *kernels, "--deadline", str(round(limit - TABLE_S / 2)),
                          limit=limit):
        raise Failed(f"status {status}: no configuration of a kernel was right")
    return "rows are in the results file"


def train(gate: Gate, limit: float) -> str:
    """Eight optimizer steps of the tiny preset on the GPU; the report reads a few rows of each group only."""
    if missing := unimportable(NEEDED, gate.environment):
        raise Skipped(f"not importable: {', '.join(missing)}")
    metrics = gate.folder / "run" / "stage2" / "metrics.jsonl"
    # By its address: the name of a machine without a network may resolve to nothing, after a long wait.
    status = gate.run("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node",
                      "1", "train.py", "--stage", "2", "--steps", "8", "--run-dir", str(gate.folder / "run"),
                      "--eval.max-rows", "8", limit=limit)
    lines = metrics.read_text().count("\n") if metrics.exists() else 0
    if lines and not gate.rehearsal:
        shutil.copy(metrics, RESULTS / f"train-{gate.name}.jsonl")
    if status or lines != 8:
        raise Failed(f"status {status}, {lines} of 8 lines in metrics.jsonl")
    return "8 optimizer steps"


def profile(gate: Gate, limit: float) -> str:
    """Counters of one launch of the forward at the 7B head; the clocks stay as they are."""
    profiler = shutil.which("ncu")
    if profiler is None:
        raise Skipped("ncu is not on the PATH")
    target = RESULTS / f"ncu-{gate.name}.txt"
    status = gate.command([profiler, "--set", "full", "--clock-control", "none", "--kernel-name",
                           "regex:_partial_stats_kernel", "--launch-skip", "1", "--launch-count", "1", "--log-file",
                           str(target), sys.executable, "bench/smoke.py", "--forward", "8192", "3584", "152064"], limit)
    if status or not target.exists() or "_partial_stats_kernel" not in target.read_text():
        raise Failed(f"status {status}, and no section on the kernel in {target.name}")
    return f"counters are in {target.name}"


OURS = ("gemms", "ours-cpgd", "ours-logprob", "ours-fold")
ON_CPU = (*OURS, "ours-kl", "torch")
# Seconds for each, beside what the steps before it left. Peers come in processes of their own, so that none of them can
# take our numbers along.
STEPS: dict[str, tuple[Step, float]] = {
    "smoke": (smoke, 25.0),
    "headline": (bench(("--heads", "7b", "--tokens", "8192"), ("--heads", "3b", "--tokens", "8192"),
                       ("--heads", "7b", "--tokens", "32768"), providers=OURS), 75.0),
    "tune": (tune, 75.0),
    "tests": (tests(marked="not alone", several=True), 100.0),
    "alone": (tests(marked="alone", several=False), 45.0),
    "peers": (bench(("--heads", "7b", "--tokens", "8192"), providers=("gemms", "ours-cpgd", "verl", "trl", "cce")),
              70.0),
    "kl": (bench(("--heads", "7b", "--tokens", "8192"), providers=("gemms", "ours-kl")), 30.0),
    "train": (train, 50.0),
    "profile": (profile, 25.0),
    "grpo": (bench(("--heads", "7b", "--tokens", "8192"),
                   providers=("gemms", "liger-scaled-ce", "quack", "liger-grpo")), 30.0),
}


def gpu_name() -> str:
    """Name of the GPU; empty without one, or without torch."""
    if importlib.util.find_spec("torch") is None:
        return ""
    import torch
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: the steps, small, in the interpreter")
    parser.add_argument("--run", nargs=argparse.REMAINDER, help="run this script with these options instead")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    gpu = gpu_name()
    if options.rehearse:
        gpu = "rehearsal"
    elif not gpu:
        print("gpu_gate: no CUDA device (or no torch) here; nothing was run, and nothing is said about the GPU")
        return 2
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        results = folder if options.rehearse else RESULTS
        results.mkdir(parents=True, exist_ok=True)
        # Added to: what an earlier call found must not be lost.
        with open(results / f"gate-{name}.log", "a", encoding="utf-8") as log:
            environment = prepare(folder)
            if options.rehearse:
                environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "TEST_GPU_DEVICE": "cpu"}
            gate = Gate(name, folder, environment, log, rehearsal=options.rehearse)
            gate.say(f"\n=== {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M:%S} UTC, {gpu}: "
                     f"gpu_gate.py {' '.join(arguments)}")
            try:
                if options.run:
                    return gate.run(*options.run, limit=BUDGET_S)
                return walk(gate, options.steps, started)
            except Failed as reason:  # of --run
                gate.say(f"gpu_gate: {reason}")
                return 1
            finally:
                gate.bring_back()


def walk(gate: Gate, names: list[str], started: float) -> int:
    """Run the steps in order, each in its own time and what those before it left; 1 if one failed."""
    summary, failed = [], False
    for number, name in enumerate(names):
        later = sum(STEPS[other][1] for other in names[number + 1:])
        limit = BUDGET_S - (time.monotonic() - started) - later
        gate.say(f"\n== {name} (at most {limit:.0f} s)")
        began = time.monotonic()
        try:
            if limit < LEAST_S:
                raise Skipped("no time left")
            found = f"passed: {STEPS[name][0](gate, limit)}"
        except Skipped as reason:
            found = f"skipped: {reason}"
        except Failed as reason:
            found, failed = f"failed: {reason}", True
        summary.append(f"{name:8} {found} ({time.monotonic() - began:.0f} s)")
        gate.bring_back()
    gate.say(f"\n== {gate.name}")
    for line in summary:
        gate.say(line)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
