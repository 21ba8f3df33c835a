"""Seconds, peak memory and held-out numbers of the demo, a row a seed, to bench/results/demo.csv.

    python bench/demo_bench.py --seeds 0 1 2

Runs `torchrun train.py --stage 2` as a user would, each seed in a fresh run directory; installation is not counted.
"""

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from cosmo_rl.cpgd.run.evaluation import MEASURES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "demo.csv"


def run(seed: int, stage: int, folder: Path, extra: list[str]) -> dict:
    """One run of the demo; its CSV row. Peak memory is that of the largest process, in MiB."""
    command = [Path(sys.executable).with_name("torchrun"), ROOT / "train.py", "--stage", stage, "--seed", seed,
               "--run-dir", folder, *extra]
    started = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)  # its usage counts the workers, and no earlier run
    if status:
        sys.exit(f"{' '.join(map(str, command))}: exit status {os.waitstatus_to_exitcode(status)}")
    seconds = time.perf_counter() - started
    report = json.loads((folder / f"stage{stage}" / "report.json").read_text())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True,
                            check=False)
    row = {"stage": stage, "seed": seed, "total_s": round(seconds, 1), "training_s": report["seconds"],
           "peak_MiB": round(usage.ru_maxrss / 1024), "cpu": platform.processor() or platform.machine(),
           "cores": os.cpu_count(), "torch": version("torch"), "transformers": version("transformers"),
           "commit": commit.stdout.strip()}
    for when in ("before", "after"):
        row |= {f"{when}_{name}": round((report[when] or {}).get(name, float("nan")), 4)
                for name in MEASURES if name in report["after"]}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options, extra = parser.parse_known_args()
    rows = []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(run(seed, options.stage, Path(folder) / "run", extra))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with open(options.out, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
