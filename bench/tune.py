"""Configurations of our kernels beside the shipped ones, on this GPU: what to ship is read off this table.

    python3 bench/gpu_gate.py --run bench/tune.py                       # all of it, 7B head, 8192 tokens
    python3 bench/gpu_gate.py --run bench/tune.py --kernels forward --heads 3b 7b --tokens 8192 32768

A configuration whose result differs from the shipped one's by more than rounding is named and not timed, one that does
not fit the chip is named too. Medians of 20 between CUDA events, as kernel_bench.py; rows go to
bench/results/tune-GPU.csv. In Triton's interpreter (TRITON_INTERPRET=1) it checks results and times nothing.
"""

import argparse
import csv
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import harness
import inputs
import torch
from triton.errors import TritonError

from cosmo_rl.kernels import gemm, launch, linear_cpgd, linear_kl, linear_logprob
from cosmo_rl.kernels.linear_logprob import Tiles

# Tiles (tokens, vocabulary, dim, warps, stages, group) and programs of a multiprocessor.
FORWARD = [((128, 256, 64, 8, 4, 16), 1), ((128, 256, 64, 8, 3, 16), 1), ((128, 256, 64, 8, 4, 8), 1),
           ((128, 256, 64, 8, 4, 32), 1), ((128, 256, 64, 8, 4, 64), 1), ((256, 128, 64, 8, 4, 16), 1),
           ((256, 128, 64, 8, 4, 8), 1), ((128, 256, 128, 8, 2, 16), 1), ((128, 128, 64, 4, 3, 16), 2),
           ((64, 256, 64, 4, 2, 16), 2)]
KL = [((128, 128, 64, 8, 4, 16), 1), ((128, 128, 64, 8, 3, 16), 1), ((128, 128, 64, 8, 4, 32), 1),
      ((64, 256, 64, 8, 4, 16), 1), ((64, 128, 64, 4, 3, 16), 2)]
# Inner rows of a chunk, and block and warps of the kernels over its rows.
CHUNKS = [(512, 4096, 8), (256, 4096, 8), (1024, 4096, 8), (512, 8192, 16), (512, 16384, 32), (512, 8192, 8)]
COLUMNS: tuple[str, ...] = (
    "date", "commit", "kernels", "gpu", "driver", "torch", "cuda", "triton", "head", "tokens", "kernel",
    "configuration", "status", "ms", "ms_p20", "ms_p80", "tflops")


def tile_settings(module: Any, name: str, configuration: tuple) -> list[tuple[Any, str, Any]]:
    """`configuration` of FORWARD or KL as replacements of the shipped one."""
    shape, per_sm = configuration
    shipped = launch.num_programs
    return [(module, name, lambda *_: Tiles(*shape)),
            (launch, "num_programs", lambda device: per_sm * shipped(device))]


def chunk_settings(configuration: tuple) -> list[tuple[Any, str, Any]]:
    """`configuration` of CHUNKS as replacements of the shipped one."""
    rows, block, warps = configuration
    return [(gemm, "INNER_ROWS", rows), (linear_cpgd, "ROW_BLOCK", block), (linear_cpgd, "ROW_WARPS", warps)]


def kernels(case: inputs.Case, backend: str | None) -> dict[str, tuple[list, Callable, Callable, int]]:
    """Name -> (configurations, their replacements, call that returns what to compare, GEMM units)."""
    old = case.old_policy

    @torch.no_grad()
    def forward():
        return linear_logprob.linear_logprob(case.hidden, case.weight, case.targets, backend=backend).logprobs

    @torch.no_grad()
    def kl(shared: bool):
        return linear_kl.linear_kl(old[0], case.weight if shared else old[1], case.hidden, case.weight, backend=backend)

    def cpgd():
        out = linear_cpgd.linear_cpgd(case.hidden, case.weight, case.targets, case.old_logprobs, case.advantages,
                                      case.token_weights, backend=backend)
        return torch.autograd.grad(out.loss, (case.hidden, case.weight))[0]

    return {"forward": (FORWARD, lambda c: tile_settings(linear_logprob, "forward_tiles", c), forward, 1),
            "kl-shared": (KL, lambda c: tile_settings(linear_kl, "kl_tiles", c), lambda: kl(True), 2),
            "kl": (KL, lambda c: tile_settings(linear_kl, "kl_tiles", c), lambda: kl(False), 2),
            "cpgd": (CHUNKS, chunk_settings, cpgd, 3)}


def measure(call: Callable, expected: torch.Tensor, watch: harness.Stopwatch, repeats: int) -> dict[str, Any]:
    """Columns of one configuration."""
    try:
        found = call()
    except TritonError as error:
        return {"status": f"does not compile or fit: {' '.join(str(error).split())[:200]}"}
    error = harness.relative_error(found, expected)
    if not error <= 1e-3:
        return {"status": f"relative error {error:.3g} against the shipped configuration"}
    if not repeats:
        return {"status": "ok, not timed"}
    times = watch.many(lambda: None, lambda _: call(), repeats)
    return {"status": "ok", "ms": times.median, "ms_p20": times.low, "ms_p80": times.high}


def main(arguments: list[str]) -> int:
    """0, or 1 if no configuration of a kernel was right."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", default=["forward", "cpgd", "kl-shared", "kl"])
    parser.add_argument("--heads", nargs="+", choices=inputs.HEADS, default=["7b"] if gpu else ["tiny"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192 if gpu else 40])
    parser.add_argument("--repeats", type=int, default=20 if gpu else 0)
    parser.add_argument("--deadline", type=float, default=float("inf"), help="start nothing more after so many s")
    options = parser.parse_args(arguments)
    if not gpu and not launch.INTERPRET:
        parser.error("no GPU here; TRITON_INTERPRET=1 checks the configurations without one")
    started, watch, machine = time.monotonic(), harness.Stopwatch(device), harness.environment(device)
    path = harness.ROOT / "bench" / "results" / f"tune-{harness.slug(machine['gpu'])}.csv" if gpu else None
    failed = False
    for head in options.heads:
        for tokens in options.tokens:
            case = inputs.make_case("peaked", head, tokens, torch.bfloat16 if gpu else torch.float32, device, 0)
            dim, vocab = inputs.HEADS[head]
            available = kernels(case, None if gpu else "triton")
            for name in options.kernels:
                configurations, settings, call, units = available[name]
                expected, right = call(), 0
                for configuration in configurations:
                    if time.monotonic() - started > options.deadline:
                        break
                    with ExitStack() as stack:
                        for setting in settings(configuration):
                            stack.enter_context(mock.patch.object(*setting))
                        row = measure(call, expected, watch, options.repeats)
                    if "ms" in row:
                        row["tflops"] = 2 * tokens * dim * vocab * units / row["ms"] / 1e9
                    right += row["status"].startswith("ok")
                    record(path, machine | {"head": head, "tokens": tokens, "kernel": name,
                                            "configuration": str(configuration)} | row)
                failed |= not right
    return int(failed)


def record(path: Path | None, row: dict[str, Any]) -> None:
    """Print a row, and append it to the results file."""
    numbers = f"{row['ms']:9.3f} ms {row['tflops']:6.1f} TFLOP/s" if "ms" in row else row["status"]
    print(f"{row['head']:4} {row['tokens']:>6} {row['kernel']:9} {row['configuration']:30} {numbers}", flush=True)
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow({name: f"{value:.5g}" if isinstance(value, float) else value for name, value in row.items()})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
