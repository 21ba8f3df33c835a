"""Runs of train.py for the tests: real processes with their own exit codes, messages and deaths.

`start` forks them from a server that has imported torch and the trainer once (multiprocessing's forkserver): saves 5 s
a run; each child then executes train.py itself, as `python train.py ARGS` would. `torchrun` is the real launcher.
`rollout` is a recorded rollout of the shipped policy for tests inside the test process.
"""

import functools
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from conftest import ROOT

from cosmo_rl.cpgd.config import Config, ObjectiveConfig
from cosmo_rl.cpgd.rewards.build import RowNeeds, build_scorer
from cosmo_rl.cpgd.rollout.collect import Collector
from cosmo_rl.cpgd.rollout.hf import HFEngine
from cosmo_rl.cpgd.run.metrics import TIMING_FIELDS, read_metrics
from cosmo_rl.cpgd.run.recipes import recipe
from cosmo_rl.cpgd.update import BuildUpdates
from cosmo_rl.data.collate import EncodedPrompt, encode_prompt
from cosmo_rl.data.prepare.mini import general_rows, safety_rows
from cosmo_rl.model.load import load_model, load_processor
from cosmo_rl.model.policy import Policy
from cosmo_rl.model.tiny import TINY_PATH

MODEL = TINY_PATH
TEMPERATURE = 1.5
"""Of `rollout` and `policy`: the shipped policy is sure of itself, and unlikely tokens are wanted too."""
LIMIT_S = 120.0
"""Longest a run may take before it counts as hanging, in seconds."""

_CONTEXT: Any = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([
    "cosmo_rl.cpgd.run.main", "cosmo_rl.cpgd.run.recipes", "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "torch.utils.tensorboard", "torch._dynamo",
])


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@dataclass
class Done:
    """How a run ended."""

    codes: list[int]
    """Exit code of each rank; -9 for one that was killed."""
    out: list[str]
    """stdout of each rank."""
    err: list[str]
    """stderr of each rank."""

    @property
    def code(self) -> int:
        return self.codes[0]

    def check(self) -> "Done":
        assert set(self.codes) == {0}, f"exit codes {self.codes}:\n{chr(10).join(self.err)[-4000:]}"
        return self


def _child(target: Callable[..., object], args: tuple, environ: dict[str, str], threads: int, log: str) -> None:
    for name, number in (("out", 1), ("err", 2)):
        handle = os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
        os.close(handle)
    os.environ.update(environ)
    torch.set_num_threads(threads)
    target(*args)


def _train(args: list[str], before: Callable[[], object] | None) -> None:
    sys.argv = ["train.py", *args]
    if before is not None:
        before()
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


class Running:
    """Ranks of one run that were started together."""

    def __init__(self, target: Callable[..., object], args: tuple, ranks: int, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        port = str(free_port())
        self.logs = [folder / f"{time.monotonic_ns()}-{rank}" for rank in range(ranks)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            environ = {} if ranks == 1 else {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port}
            # one thread, whatever the number of ranks: sums then have the same order
            process = _CONTEXT.Process(target=_child, args=(target, args, environ, 1, str(log)))
            process.start()
            self.processes.append(process)

    def wait(self) -> Done:
        deadline = time.monotonic() + LIMIT_S
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0.1))
        hanging = [i for i, process in enumerate(self.processes) if process.exitcode is None]
        for process in self.processes:
            process.kill()
            process.join()
        read = lambda name: [Path(f"{log}.{name}").read_text(errors="replace") for log in self.logs]
        done = Done([process.exitcode for process in self.processes], read("out"), read("err"))
        assert not hanging, f"ranks {hanging} hang; stderr:\n{chr(10).join(done.err)[-4000:]}"
        return done


def start(args: Sequence[object], folder: Path, *, ranks: int = 1,
          before: Callable[[], object] | None = None) -> Running:
    """train.py ARGS in `ranks` processes, logs in `folder`; `before` (picklable) is called in each of them first."""
    return Running(_train, ([str(arg) for arg in args], before), ranks, folder)


def train(args: Sequence[object], folder: Path, **options) -> Done:
    """`start`, then wait for the end."""
    return start(args, folder, **options).wait()


def torchrun(args: Sequence[object], ranks: int = 2) -> subprocess.Popen:
    """The real launcher with the real train.py; stdout and stderr together in `.stdout`."""
    command = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", str(ranks), "--master-port",
               str(free_port()), str(ROOT / "train.py"), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def children(pid: int) -> list[int]:
    """Process ids of the direct children."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(condition: Callable[[], object], what: str, limit_s: float = LIMIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit_s:g} s for {what}"
        time.sleep(0.01)


def kill_when(target: str, lines: int, metrics: Path, after: bool = False) -> None:
    """SIGKILL this process at (or `after`) the first call of `MODULE:NAME` with `lines` lines in `metrics`."""
    module, _, name = target.partition(":")
    owner: Any = sys.modules[module]
    *path, name = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    real = getattr(owner, name)

    @functools.wraps(real)
    def wrapped(*args, **kwargs):
        due = metrics.exists() and metrics.read_text().count("\n") >= lines
        if due and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if due:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, wrapped)


def lines_of(run_dir: Path, stage: int = 2) -> list[dict]:
    """metrics.jsonl without the fields that may differ between two runs."""
    return [{key: value for key, value in line.items() if key not in TIMING_FIELDS}
            for line in read_metrics(run_dir / f"stage{stage}" / "metrics.jsonl")]


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    """The embedded rows as a JSON-lines file with PNG files beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for row in rows:
            images = []
            for number, image in enumerate(row.images):
                if isinstance(image, (str, Path)):
                    from PIL import Image

                    image = Image.open(image)
                image.save(path.parent / f"{row.id}-{number}.png")
                images.append(f"{row.id}-{number}.png")
            record = {"id": row.id, "task": row.task, "domain": row.domain, "messages": list(row.messages),
                      "images": images, "answer": row.answer, "tags": row.tags, "chosen": row.chosen,
                      "key_elements": list(row.key_elements), "source": row.source, "licence": row.licence}
            file.write(json.dumps(record) + "\n")
    return path


def text_only(row: Any) -> Any:
    """The row without its image."""
    text = row.messages[0]["content"][-1]["text"]
    return replace(row, id=f"{row.id}-text", images=(), messages=({"role": "user", "content": text},))


def small_rows() -> list[Any]:
    """12 safety rows, 9 general ones with and 3 without an image."""
    general = list(general_rows("validation")[:120:10])
    return [*safety_rows("validation")[:12], *general[:9], *map(text_only, general[9:])]


def from_file(rows: Path) -> list[object]:
    """Options that train on `rows`, as they come."""
    return ["--data.path", rows, "--data.mix"]


def held_rows() -> list[Any]:
    return [*safety_rows("validation")[-6:], *general_rows("validation")[-4:]]


def small(*options: object) -> list[object]:
    """Options of a small stage 2: 4 prompts x 4, 2 updates a rollout, 8 updates, a checkpoint after each rollout."""
    return ["--stage", 2, "--steps", 8, "--rollout.prompts", 4, "--rollout.group-size", 4, "--rollout.batch-size", 8,
            "--optim.updates-per-rollout", 2, "--optim.learning-rate", 5e-4, "--checkpoint.every", 2, *options]


@functools.cache
def policy_processor():
    return load_processor(MODEL, 56 * 56)


def policy(**options) -> Policy:
    """The shipped policy, not sharded."""
    return Policy(load_model(MODEL), suppressed_ids=policy_processor().suppressed_ids,
                  temperature=TEMPERATURE, **options)


def config(**changes) -> Config:
    """Preset tiny, stage 2, with 6 prompts x 4 and the objective's defaults."""
    base = recipe("tiny", 2)
    rollout = replace(base.rollout, prompts=6, group_size=4, batch_size=12, temperature=TEMPERATURE)
    return replace(base, rollout=rollout, **{"objective": ObjectiveConfig(), **changes})


def encode(row: Any) -> EncodedPrompt:
    return encode_prompt(row, policy_processor(), max_prompt_tokens=512, max_image_pixels=10**6)


def build(settings: Config, device: str = "cpu") -> BuildUpdates:
    return BuildUpdates(batch=settings.batch, objective=settings.objective, processor=policy_processor(),
                        aggregation=settings.objective.aggregation, device=torch.device(device))


def collector(rows: Sequence[Any], engine: Any, scorer: Any, settings: Config) -> Collector:
    """Draws `rows` in their order, once."""
    sampler: Any = SimpleNamespace(take=lambda n: list(range(n)), observe=lambda rates: None, replace=None)
    none: Any = None
    return Collector(settings, rows, sampler, engine, scorer, none, policy_processor(), encode, build(settings))


@functools.cache
def rollout() -> SimpleNamespace:
    """6 prompts (one of them without an image) x 4 responses of the shipped policy, with rewards and advantages."""
    settings = config()
    rows = [*safety_rows("validation")[:3], *general_rows("validation")[:40:20],
            text_only(general_rows("validation")[60])]
    needs = RowNeeds(settings.reward)
    assert not any(map(needs.problem, rows))
    engine = HFEngine(load_model(MODEL), policy_processor(), settings.rollout)
    scorer = build_scorer(settings.reward, needs)
    found = collector(rows, engine, scorer, settings).collect(0, {})
    scorer.close()
    prompts = [group[0].response.request.prompt for group in found.groups]
    return SimpleNamespace(rows=rows, prompts=prompts, rollout=found, samples=found.samples, engine=engine,
                           processor=policy_processor())
