"""Seconds and peak memory of loading rows: 100,000 JSON lines over 10,000 distinct JPEGs, every image fully decoded.

    python bench/data_bench.py [--rows 100000] [--images 10000] [--cores 2] [--ranks 2]

Makes the rows and the images in a temporary folder (not timed), has the rank of a host that reads load them in a fresh
process held to `--cores` cores, then the other ranks what it wrote down, and writes bench/results/data.json. Peak
memory is the largest resident set of the first process, imports included; `ranks_cpu_s` holds each rank's CPU seconds,
imports included, and `ranks_parsed` and `ranks_opened` how many rows and images it read. The pictures are a gradient
with noise and a few shapes, JPEG quality 85: 16 KiB, as a photograph of that size has.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "data.json"
SIDE = 224
WORDS = ("is", "there", "any", "red", "blue", "small", "large", "round", "shape", "picture", "left", "of", "the", "how")
LOAD = """
import json, random, resource, sys, time
from pathlib import Path
started = time.perf_counter()
from cosmo_rl.data import index
imported = time.perf_counter()
counts = {"parse_row": 0, "opened": 0}
def counted(name, real):
    def call(*args):
        counts[name] += 1
        return real(*args)
    return call
for name in counts:
    setattr(index, name, counted(name, getattr(index, name)))
path, rank = Path(sys.argv[2]), int(sys.argv[3])
if rank == 0:
    rows = index.load_rows([sys.argv[1]], max_image_pixels=16_777_216)
    path.write_bytes(rows.dump({}))
else:
    rows, _ = index.Index.load(path)
loaded = time.perf_counter()
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"rows": len(rows), "import_s": round(imported - started, 2), "load_s": round(loaded - imported, 2),
                  "cpu_s": round(used.ru_utime + used.ru_stime, 2), "parsed": counts["parse_row"],
                  "opened": counts["opened"], "peak_MiB": round(used.ru_maxrss / 1024)}))
drawn = random.Random(0).choices(range(len(rows)), k=20_000)
loaded = time.perf_counter()
for i in drawn:
    rows[i]
print(round((time.perf_counter() - loaded) / len(drawn) * 1e6, 1))
"""


def picture(seed: int) -> Image.Image:
    """A SIDE x SIDE picture; equal seeds give equal pixels."""
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 255, (2, 2, 3))
    ramp = np.linspace(0, 1, SIDE)[:, None]
    left, right = (corners[0, i] * (1 - ramp) + corners[1, i] * ramp for i in (0, 1))
    pixels = left[:, None] * (1 - ramp[None]) + right[:, None] * ramp[None] + rng.normal(0, 12, (SIDE, SIDE, 1))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for x, y, size, *colour in rng.integers((0, 0, 10, 0, 0, 0), (SIDE, SIDE, 90, 256, 256, 256), (6, 6)).tolist():
        pen.ellipse([x, y, x + size, y + size // 2], fill=tuple(colour))
    return image


def make(folder: Path, rows: int, images: int) -> Path:
    """`rows` JSON lines in `folder`, each with one of `images` pictures; the row file."""
    (folder / "images").mkdir()
    for i in range(images):
        picture(i).save(folder / "images" / f"{i:06}.jpg", quality=85)
    rng = random.Random(0)
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for i in range(rows):
            task = "safety" if i % 2 else "general"
            row = {"id": f"bench:{i}", "task": task, "domain": task,
                   "prompt": " ".join(rng.choices(WORDS, k=30)) + "?", "images": [f"images/{i % images:06}.jpg"],
                   "answer": rng.choice(WORDS), "tags": {"image": "safe", "text": "safe", "combined": "safe"},
                   "chosen": " ".join(rng.choices(WORDS, k=60)), "source": "bench", "licence": "CC0"}
            file.write(json.dumps(row) + "\n")
    return folder / "rows.jsonl"


def load(path: Path, cores: int, rank: int) -> dict:
    """The rows on `cores` cores in a fresh process, as this rank of a host gets them: rows, import_s, load_s, cpu_s,
    peak_MiB, parsed, opened, draw_us (of a row at random, read back from the file), total_s."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(path), str(path.parent / "rows.npz"), str(rank)], stdout=subprocess.PIPE,
        text=True, cwd=path.parent, check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores]))
    found, draw = done.stdout.splitlines()
    return {**json.loads(found), "draw_us": float(draw), "total_s": round(time.perf_counter() - started, 2)}


def machine() -> dict:
    """What the numbers were taken on."""
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.machine())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True,
                            check=False).stdout.strip()
    return {"cpu": cpu, "cores_there": os.cpu_count(), "load_average": round(os.getloadavg()[0], 2), "commit": commit,
            "python": platform.python_version(), **{name: version(name) for name in ("pillow", "pyarrow", "datasets")}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = make(Path(folder), options.rows, options.images)
        sizes = [image.stat().st_size for image in (Path(folder) / "images").iterdir()]
        ranks = [load(path, options.cores, rank) for rank in range(options.ranks)]
        result = {"rows": options.rows, "images": options.images, "side": SIDE, "cores": options.cores,
                  "image_KiB_mean": round(sum(sizes) / len(sizes) / 1024, 1), **ranks[0],
                  **{f"ranks_{name}": [rank[name] for rank in ranks] for name in ("cpu_s", "parsed", "opened")},
                  **machine()}
    assert result["rows"] == options.rows
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print("  ".join(f"{key} {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
