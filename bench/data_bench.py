"""Seconds and peak memory of loading rows: 100,000 JSON lines over 10,000 distinct JPEGs, every image fully decoded.

    python bench/data_bench.py [--rows 100000] [--images 10000] [--cores 2]

Makes the rows and the images in a temporary folder (not timed), loads them in a fresh process held to `--cores`
cores, and writes bench/results/data.json. Peak memory is the largest resident set of that process, imports included.
The pictures are a gradient with noise and a few shapes, JPEG quality 85: 16 KiB, as a photograph of that size has.
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
import random, sys, time
started = time.perf_counter()
from cosmo_rl.data.index import load_rows
imported = time.perf_counter()
rows = load_rows([sys.argv[1]], max_image_pixels=16_777_216)
loaded = time.perf_counter()
drawn = random.Random(0).choices(range(len(rows)), k=20_000)
for i in drawn:
    rows[i]
drawing = time.perf_counter() - loaded
print(len(rows), imported - started, loaded - imported, drawing / len(drawn) * 1e6)
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


def load(path: Path, cores: int) -> dict:
    """`load_rows` in a fresh process on `cores` cores: rows, import_s, load_s, draw_us (of a row at random, read back
    from the file), total_s, peak_MiB."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", LOAD, str(path)], stdout=subprocess.PIPE, text=True, cwd=path.parent,
        preexec_fn=lambda: os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores]))
    assert process.stdout is not None
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)  # its usage alone; RUSAGE_CHILDREN would count earlier children too
    if status:
        sys.exit(f"data_bench: load_rows ended with status {os.waitstatus_to_exitcode(status)}")
    rows, imported, loaded, draw = out.split()
    return {"rows": int(rows), "import_s": round(float(imported), 2), "load_s": round(float(loaded), 2),
            "draw_us": round(float(draw), 1),
            "total_s": round(time.perf_counter() - started, 2), "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
            "peak_MiB": round(usage.ru_maxrss / 1024)}


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
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = make(Path(folder), options.rows, options.images)
        sizes = [image.stat().st_size for image in (Path(folder) / "images").iterdir()]
        result = {"rows": options.rows, "images": options.images, "side": SIDE, "cores": options.cores,
                  "image_KiB_mean": round(sum(sizes) / len(sizes) / 1024, 1), **load(path, options.cores), **machine()}
    assert result["rows"] == options.rows
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print("  ".join(f"{key} {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
