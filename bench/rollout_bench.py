"""Tokens per second of the vLLM engine and of the hf engine: the same model, requests and responses' lengths.

    python bench/rollout_bench.py --model DIR --serve .venv-vllm/bin/python

Each prompt is sampled `--group` times, responses end by themselves or at `--max-new-tokens`; seeds are the same for
both engines. Batch sizes: the hf engine runs once with each of `--hf-batch`, and its best counts; vLLM batches up to
`--vllm-seqs` sequences. Beside the speed stands how far vLLM's log-probs are from the trainer's own for the tokens that
it has sampled, and before all, whether both see the same in prompts with pictures. To bench/results/rollout.json.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from PIL import Image

from cosmo_rl.cpgd.config import BatchConfig, DataConfig, ObjectiveConfig, RolloutConfig
from cosmo_rl.cpgd.rollout.collect import encoder
from cosmo_rl.cpgd.rollout.engine import Engine, generate
from cosmo_rl.cpgd.rollout.engines import open_engine
from cosmo_rl.cpgd.rollout.values import Request, Response, request_seed
from cosmo_rl.cpgd.update import BuildUpdates
from cosmo_rl.data.collate import TokenSequence
from cosmo_rl.data.schema import Row
from cosmo_rl.model.load import Processor, load_model, load_processor
from cosmo_rl.model.policy import Policy
from cosmo_rl.model.weights import full_state_dict

RESULTS = Path(__file__).parent / "results" / "rollout.json"
SUBJECTS = ("a lighthouse", "the water cycle", "bread", "a bicycle", "the moon", "a honest mistake", "chess", "rain")
ASKS = ("Explain {} in one sentence.", "Write a short story about {}.", "List five facts about {}.", "What is {}?",
        "Give one word that goes with {}.", "Write a poem about {}.", "Describe {} to a child.",
        "Why do people like {}? Answer briefly.")


def requests_of(processor: Processor, data: DataConfig, prompts: int, group: int) -> list[Request]:
    """Of texts that call for one word or for many."""
    encode, out = encoder(data, processor), []
    for i in range(prompts):
        text = ASKS[i % len(ASKS)].format(SUBJECTS[i // len(ASKS) % len(SUBJECTS)])
        row = Row(id=f"p{i}", task="general", domain="general", messages=({"role": "user", "content": text},),
                  source="bench", licence="Apache-2.0")
        prompt = encode(row)
        out += [Request(row=row, prompt=prompt, k=k, seed=request_seed(0, 1, 0, row.id, k)) for k in range(group)]
    return out


def measured(engine: Engine, requests: list[Request], batch_size: int) -> tuple[dict[str, Any], list[Response]]:
    """Seconds and tokens per second of one rollout."""
    started = time.perf_counter()
    responses = [r for part in engine.stream(requests, batch_size=batch_size) for r in part]
    seconds = time.perf_counter() - started
    lengths = np.array([len(r.ids) for r in responses])
    assert len(responses) == len(requests)
    return {"seconds": round(seconds, 1), "tokens": int(lengths.sum()),
            "tokens_per_second": round(float(lengths.sum() / seconds), 1),
            "lengths": {"min": int(lengths.min()), "median": float(np.median(lengths)), "max": int(lengths.max())},
            "cut_off": int(sum(r.finish_reason == "length" for r in responses))}, responses


@torch.no_grad()
def gaps(policy: Policy, responses: list[Response], processor: Processor) -> dict[str, float]:
    """|trainer - engine| log-prob of the tokens of some responses, nats."""
    build = BuildUpdates(batch=BatchConfig(max_tokens=2048), objective=ObjectiveConfig(), aggregation="token",
                         processor=processor, device=torch.device("cpu"))
    sequences = [TokenSequence(r.request.prompt, r.ids) for r in responses]
    found = []
    for update in build(sequences, [0.0] * len(sequences), list(range(len(sequences))), len(sequences)):
        ours, owner = policy(update.batch).logprobs.numpy(), update.batch.sequence_ids.numpy()
        for place, member in enumerate(update.members):
            found.append(np.abs(ours[owner == place] - responses[member].logprobs))
    tokens = np.concatenate(found)
    return {"mean": float(tokens.mean()), "p99": float(np.quantile(tokens, 0.99)), "max": float(tokens.max()),
            "tokens": len(tokens)}


def seen_alike(engine: Engine, hf: Engine, policy: Policy, processor: Processor, data: DataConfig) -> list[dict]:
    """Prompts with none to three pictures of different shapes, before and after ten updates of all weights: the gap of
    the log-probs, and whether greedy responses begin with the same 24 tokens as the hf engine's."""
    noise, encode, requests = np.random.default_rng(0), encoder(data, processor), []
    for i in range(8):
        pictures = tuple(Image.fromarray(noise.integers(0, 255, (*noise.integers(56, 140, 2), 3), dtype=np.uint8))
                         for _ in range(i % 4))
        content = [*[{"type": "image"}] * len(pictures), {"type": "text", "text": f"What is here? What is {i} + 7?"}]
        row = Row(id=f"q{i}", task="general", domain="general", messages=({"role": "user", "content": content},),
                  images=pictures, source="bench", licence="Apache-2.0")
        requests.append(Request(row=row, prompt=encode(row), k=0, seed=i))
    found, weights = [], partial(full_state_dict, policy)
    torch.manual_seed(0)
    for update in range(11):
        if update:
            for parameter in policy.parameters():
                parameter.data.add_(torch.randn_like(parameter) * 0.003 * parameter.data.std())
        engine.sync(weights, update)
        if update not in (0, 10):
            continue
        hf.sync(weights, update)
        engine.check((request.row, request.prompt) for request in requests)
        texts = [[r.ids[:24].tolist() for r in generate(sampler, requests, greedy=True)] for sampler in (engine, hf)]
        found.append({"updates": update, "pictures": [len(r.row.images) for r in requests],
                      "gap": gaps(policy, generate(engine, requests), processor),
                      "greedy_equal": sum(a == b for a, b in zip(*texts, strict=True)), "of": len(requests)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a Qwen2.5-VL, as bench/real_lm.py makes one")
    parser.add_argument("--serve", default=".venv-vllm/bin/python", help="as --rollout.serve of train.py")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--hf-batch", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--vllm-seqs", type=int, default=256)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()

    processor, data = load_processor(args.model), DataConfig(max_prompt_tokens=512)
    policy = Policy(load_model(args.model), suppressed_ids=processor.suppressed_ids).eval()
    weights = partial(full_state_dict, policy)
    requests = requests_of(processor, data, args.prompts, args.group)
    out: dict[str, Any] = {
        **harness.environment(torch.device("cpu")), "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(), "threads": torch.get_num_threads(), "load_before": round(os.getloadavg()[0], 2),
        "model": args.model.name, "requests": len(requests), "max_new_tokens": args.max_new_tokens}

    with tempfile.TemporaryDirectory() as folder:
        def opened(**options: Any) -> Engine:
            options = {"max_new_tokens": args.max_new_tokens, "cache_gib": 1e3} | options
            rollout = RolloutConfig(**options)
            return open_engine(args.model, processor, rollout, data, device=torch.device("cpu"), dtype=torch.float32,
                               folder=Path(folder))

        engine = opened(engine="server", serve=(f"{args.serve} --max-num-seqs {args.vllm_seqs}",))
        try:
            out["agreement"] = seen_alike(engine, opened(max_new_tokens=24), policy, processor, data)
            print(json.dumps(out["agreement"]), flush=True)
            out["vllm"], responses = measured(engine, requests, len(requests))
            out["vllm"]["max_num_seqs"] = args.vllm_seqs
        finally:
            engine.close()
        out["vllm"]["gap"] = gaps(policy, responses[:: max(1, len(responses) // 64)], processor)
        print(json.dumps(out["vllm"]), flush=True)
        engine = opened()
        engine.sync(weights, 0)
        out["hf"] = []
        for batch_size in args.hf_batch:
            entry, _ = measured(engine, requests, batch_size)
            out["hf"].append({"batch_size": batch_size} | entry)
            print(json.dumps(out["hf"][-1]), flush=True)
    best = max(entry["tokens_per_second"] for entry in out["hf"])
    out["vllm_over_hf"] = round(out["vllm"]["tokens_per_second"] / best, 2)
    print(f"vLLM {out['vllm']['tokens_per_second']:g} tokens/s, hf {best:g} tokens/s: {out['vllm_over_hf']} x")
    args.out.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
