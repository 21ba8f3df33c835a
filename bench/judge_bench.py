"""1,000 judged responses, with a server that fails 20 % of the attempts and with one that does not.

    python bench/judge_bench.py

Runs tests/fault_server.py, whose judge is a pure function of the request, in a process of its own. Three parts, all to
bench/results/judges.json:

    faults   the same 1,000 responses with and without faults; rewards must be equal, throughput at least 0.7 of it
    dead     the server dies in the middle: how long until the run stops, and with which reason
    resume   it is back: the same command again; what was judged comes from the disk cache
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from PIL import Image

from cosmo_rl.cpgd.config import RewardConfig
from cosmo_rl.cpgd.rewards.base import RewardBudgetError, check_budget
from cosmo_rl.cpgd.rewards.build import RowNeeds, build_scorer
from cosmo_rl.cpgd.rollout.values import Request, Response
from cosmo_rl.data.collate import EncodedPrompt
from cosmo_rl.data.schema import Row

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "judges.json"
JUDGES = ("safework_safety", "safework_value", "safework_knowledge", "helpful")
BUDGET = 0.1


@dataclass
class Run:
    """One pass over the responses."""

    rewards: list[float | None]
    seconds: float
    calls: dict[str, int]
    server: dict[str, int]
    stopped: str = ""


@contextmanager
def serving(*args: object) -> Iterator[str]:
    """URL of a fault server."""
    process = subprocess.Popen([sys.executable, str(ROOT / "tests" / "fault_server.py"), *map(str, args)],
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def responses(count: int) -> list[Response]:
    """Responses to four kinds of rows, every fourth with a picture; benign rows are judged by Helpful too."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (112, 112, 3), np.uint8))
    prompt = EncodedPrompt("p", np.arange(3), np.zeros((3, 3), np.int64), np.zeros(3, np.int64), None, None)
    out = []
    for i in range(count):
        task, combined = (("safety", "safe"), ("jailbreak", "unsafe"), ("value", "safe"), ("knowledge", "safe"))[i % 4]
        content = [*([{"type": "image"}] if i % 4 == 3 else []), {"type": "text", "text": f"question {i // 8}"}]
        row = Row(id=f"r{i // 8}", task=task, domain=task, messages=({"role": "user", "content": content},),
                  images=(image,) if i % 4 == 3 else (), answer="eight", tags={"combined": combined}, source="bench",
                  licence="Apache-2.0")
        text = f"<think> thought {i} </think> answer {i}. " + "Some more words. " * 20
        out.append(Response(request=Request(row=row, prompt=prompt, k=i % 8, seed=0), ids=np.array([1]), text=text,
                            logprobs=np.zeros(1, np.float32), finish_reason="stop", version=0))
    return out


def run(url: str, sampled: list[Response], cache_dir: Path, options: argparse.Namespace) -> Run:
    """Score all responses as the trainer would, then look at the budget."""
    how = f"{url},judge,in-flight={options.in_flight},timeout={options.timeout_s}"
    reward = RewardConfig(judges=tuple(f"{name}={how}" for name in JUDGES), judge_cache=str(cache_dir), format=0.0,
                          visual_focus=0.0, helpful=0.2, task_aware=1.0)
    scorer = build_scorer(reward, RowNeeds(reward), patience_s=options.patience_s)
    endpoint = scorer.clients["helpful"].endpoint  # of all of them
    before = httpx2.get(f"{url}/stats").json()
    started = time.perf_counter()
    outcomes = scorer.submit(sampled).result()
    seconds = time.perf_counter() - started
    scorer.close()
    samples = list(map(scorer.sample, sampled, outcomes))
    after = httpx2.get(f"{url}/stats").json()
    server = {name: after[name] - before.get(name, 0) for name in after if name != "most_in_flight"}
    stopped = ""
    try:
        check_budget([f"{s.id}: {s.failure}" for s in samples if s.reward is None], len(samples), BUDGET)
    except RewardBudgetError as error:
        stopped = str(error)
    return Run([s.reward for s in samples], seconds, dict(endpoint.counts), server, stopped)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--fault-rate", type=float, default=0.2)
    parser.add_argument("--latency-s", type=float, nargs=2, default=(0.3, 0.9), help="of a good reply")
    parser.add_argument("--timeout-s", type=float, default=60.0, help="longest wait, as in training")
    parser.add_argument("--slow-s", type=float, default=30.0, help="to a slow reply, one of the faults")
    parser.add_argument("--in-flight", type=int, default=16)
    parser.add_argument("--patience-s", type=float, default=5.0, help="wait for a dead server, of the part `dead`")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    samples = responses(options.count)
    latency = ("--latency-s", *options.latency_s)

    pairs = []
    for seed in range(options.repeats):
        found = []
        for rate in (0.0, options.fault_rate):
            with tempfile.TemporaryDirectory() as folder, serving(
                    "--fault-rate", rate, "--slow-s", options.slow_s, "--seed", seed, *latency) as url:
                found.append(run(url, samples, Path(folder), options))
        calm, faulty = found
        pairs.append({
            "seed": seed, "equal_rewards": calm.rewards == faulty.rewards and None not in calm.rewards,
            "different_rewards": len(set(calm.rewards)), "throughput_ratio": round(calm.seconds / faulty.seconds, 3),
            "responses_per_second": [round(options.count / part.seconds, 1) for part in found],
            "calls": faulty.calls, "attempts_by_fault": faulty.server})
        print(pairs[-1])

    with tempfile.TemporaryDirectory() as folder, serving(*latency) as url:
        cache = Path(folder)
        want = run(url, samples, cache / "whole", options)
        half = run(url, samples[:options.count // 2], cache / "part", options)
        httpx2.post(f"{url}/dead?seconds={2 * options.patience_s + 5}")
        dead = run(url, samples, cache / "part", options)
        httpx2.post(f"{url}/dead?seconds=0")
        back = run(url, samples, cache / "part", options)
    died = {"seconds_to_stop": round(dead.seconds, 2), "patience_s": options.patience_s,
            "failed_responses": dead.rewards.count(None), "budget": BUDGET, "calls": dead.calls, "said": dead.stopped}
    resumed = {"equal_rewards": back.rewards == want.rewards, "calls": back.calls, "answered_before": half.calls,
               "stopped": back.stopped}
    result: dict[str, Any] = {
        "settings": {**vars(options), "out": None, "judges": JUDGES}, "faults": pairs, "dead": died, "resume": resumed,
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                    "load": os.getloadavg(), "python": platform.python_version(), "openai": version("openai")}}
    print(died, resumed, sep="\n")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    good = all(pair["equal_rewards"] and pair["throughput_ratio"] >= 0.7 for pair in pairs)
    if not (good and dead.stopped and resumed["equal_rewards"]):
        sys.exit("judge_bench: a promise does not hold; see above")


if __name__ == "__main__":
    main()
