"""A test of the embedded data: does a trained model's result vanish when the images, or the texts, change places?

    python bench/shuffle_check.py --run-dir runs/tiny

Evaluates the stage's hf/ folder on the held-out rows as they are, with the images shuffled among the safety rows and
among the general rows, and with the texts shuffled; labels stay with their row. Sampled numbers, to
bench/results/shuffle.json.
"""

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

import torch

from cosmo_rl.cpgd.rollout.hf import HFEngine
from cosmo_rl.cpgd.run.evaluation import evaluate, numbers
from cosmo_rl.cpgd.run.recipes import recipe
from cosmo_rl.data.collate import encode_prompt
from cosmo_rl.data.prepare.mini import mini_suite
from cosmo_rl.data.schema import Row
from cosmo_rl.model.load import load_model, load_processor

RESULTS = Path(__file__).resolve().parent / "results" / "shuffle.json"


def shuffled(suite: dict[str, list[Row]], part: str) -> dict[str, list[Row]]:
    """The suite with `images` or `messages` permuted among unsafe and benign rows together, and among general rows."""
    out = {}
    for names in (("unsafe", "benign"), ("general",)):
        rows = [row for name in names for row in suite[name]]
        values = [getattr(row, part) for row in rows]
        random.Random(0).shuffle(values)
        moved = iter([replace(row, **{part: value}) for row, value in zip(rows, values, strict=True)])
        out |= {name: [next(moved) for _ in suite[name]] for name in names}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--stage", type=int, default=2)
    options = parser.parse_args()
    folder = options.run_dir / f"stage{options.stage}" / "hf"
    config = recipe("tiny", options.stage)
    processor = load_processor(folder, config.data.resize_pixels)
    engine = HFEngine(load_model(folder), processor, config.rollout)

    def encode(row: Row):
        return encode_prompt(row, processor, max_prompt_tokens=config.data.max_prompt_tokens,
                             max_image_pixels=config.data.max_image_pixels,
                             system_prompt=config.data.system_prompt)

    suite = {name: rows for name, rows in mini_suite("heldout").items() if name in ("unsafe", "benign", "general")}
    result = {}
    with torch.no_grad():
        for name, rows in (("as they are", suite), ("images shuffled", shuffled(suite, "images")),
                           ("texts shuffled", shuffled(suite, "messages"))):
            sampled, _ = evaluate(engine, rows, encode, processor, config)
            result[name] = {key: round(value, 4) for key, value in numbers(sampled).items()}
            print(name, result[name])
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
