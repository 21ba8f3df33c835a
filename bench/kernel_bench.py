"""Error, time and memory of our kernels and of every peer installed, over the LM heads of Qwen2.5-VL.

    python bench/kernel_bench.py                                   # all providers, both heads, all sizes
    python bench/kernel_bench.py --quick                           # two sizes, no backward alone, nothing slow
    python bench/kernel_bench.py --providers ours-cpgd verl gemms --heads 7b --tokens 32768

Errors come first: log-probs (KL), entropy, dX and dW against float64, into memory poisoned with NaN. What is over a
limit is not timed: LOGPROB_LIMIT nats on any log-prob or entropy, GRADIENT_LIMIT of relative Frobenius norm on dX, dW
or KL, or a NaN anywhere. Then CUDA events with the L2 cache emptied between calls, at least 20 of them: the bare
products and ours first, by turns, then the others in random order, all in one process. TFLOP/s are effective: useful
products over the vocabulary (1 forward, 2 backward, 3 both; KL 2, 2, 4) times 2 N V D, over the time; what a provider
computes twice does not count.
"""

import argparse
import csv
import itertools
import os
import random
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import harness
import inputs
import torch
from peers import ON_CPU, PROVIDERS, Forward, Outcome, Provider, Unavailable

LOGPROB_LIMIT, GRADIENT_LIMIT = 0.5, 3e-2
TURNS = 4
"""Rounds in which providers that are compared take their repeats."""
FIRST = ("gemms", "ours-cpgd", "ours-logprob", "ours-fold", "ours-kl")
MODES = ("forward", "backward", "both")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ERRORS = ("value_mean", "value_max", "entropy_max", "dhidden", "dweight")
"""Columns: mean and max nats of log-probs (KL; a mean alone), max nats of entropy, relative errors of gradients."""
COLUMNS = ("date", "commit", "kernels", "gpu", "driver", "torch", "cuda", "triton", "data", "entropy_p50",
           "entropy_p90", "head", "tokens", "vocab", "dim", "dtype", "provider", "version", "mode", "status", "reason",
           "ms", "ms_p20", "ms_p80", "repeats", "first_call_s", "peak_MiB", "units", "tflops", *ERRORS, "what")


class Wrong(Exception):
    """A provider is over a limit of the check; the message has the numbers, and `errors` are as of `check`."""

    def __init__(self, message: str, errors: dict[str, float]):
        super().__init__(message)
        self.errors = errors


def loss_scale(case: inputs.Case) -> float:
    """Float16 gradients of a token mean would round to 0: N as a loss scale, as a trainer would use one."""
    return float(case.shape[0]) if case.hidden.dtype == torch.float16 else 1.0


def gradients(case: inputs.Case, outcome: Outcome) -> tuple[torch.Tensor, ...]:
    """(dX, dW) of the scaled loss."""
    assert outcome.loss is not None
    return torch.autograd.grad(outcome.loss * loss_scale(case), (case.hidden, case.weight))


def check(provider: Provider, forward: Forward, case: inputs.Case, reference: harness.Reference,
          with_gradient: bool) -> dict[str, float]:
    """Errors (some of ERRORS) of the forward alone, or of the one that is differentiated and of its gradients, and
    `first_call_s`, which holds compilation and tuning.

    Raises:
        Wrong: an error is over its limit or NaN.
    """
    found: dict[str, float] = {}
    device = case.hidden.device
    harness.poison(device)
    harness.synchronize(device)
    started = time.perf_counter()
    with torch.set_grad_enabled(with_gradient):
        outcome = forward(case)
    grads = gradients(case, outcome) if with_gradient else ()
    harness.synchronize(device)
    seconds = time.perf_counter() - started
    if grads:
        dhidden, dweight = grads
        expected = reference.gradients(provider.coefs(case, reference).double() * loss_scale(case), provider.of_kl)
        found["dhidden"] = harness.relative_error(dhidden[reference.tokens], expected[0])
        found["dweight"] = harness.relative_error(dweight[reference.rows], expected[1])
        if not (dhidden.isfinite().all() and dweight.isfinite().all()):  # outside the slice too
            found["dhidden"] = float("nan")
    over = {name: (found[name], GRADIENT_LIMIT) for name in found}
    if outcome.values is not None:
        expected = reference.kl if provider.of_kl else reference.logprobs
        expected = expected if outcome.values.ndim else expected.mean()
        found["value_mean"], found["value_max"] = harness.absolute_error(outcome.values, expected)
        over["value_max"] = (found["value_max"], LOGPROB_LIMIT)
        if provider.of_kl:
            over["KL"] = (harness.relative_error(outcome.values, expected), GRADIENT_LIMIT)
    if outcome.entropy is not None:
        found["entropy_max"] = harness.absolute_error(outcome.entropy, reference.entropy)[1]
        over["entropy_max"] = (found["entropy_max"], LOGPROB_LIMIT)
    found["first_call_s"] = seconds
    reasons = [f"{name} {error:.3g}, limit {limit}" for name, (error, limit) in over.items() if not error <= limit]
    if reasons:
        raise Wrong(", ".join(reasons), found)
    return found


def steps(provider: Provider, forward: Forward, case: inputs.Case, mode: str):
    """(prepare, call) of a mode; only `call` is timed."""
    if provider.steps is not None:
        return provider.steps(case, mode)
    if mode == "forward":
        return lambda: None, torch.no_grad()(lambda _: forward(case))
    if mode == "backward":
        return lambda: forward(case), lambda outcome: gradients(case, outcome)
    return lambda: None, lambda _: gradients(case, forward(case))


class Timed(NamedTuple):
    """A provider's mode that passed its check; `row` takes its columns."""

    row: dict[str, Any]
    prepare: Callable[[], Any]
    call: Callable[[Any], Any]
    taken: list[float]
    """Milliseconds so far."""


def begin(row: dict[str, Any], provider: Provider, forward: Forward, case: inputs.Case, mode: str,
          watch: harness.Stopwatch, repeats: int, max_seconds: float) -> Timed | None:
    """Warm the mode and measure its memory; None if its repeats would take longer than `max_seconds`."""
    prepare, call = steps(provider, forward, case, mode)
    harness.release(watch.device)  # of what the check poisoned: one large block would be in the way
    watch.one(prepare, call)
    once = watch.one(prepare, call)
    if once * (repeats + TURNS * harness.WARMUP) > 1e3 * max_seconds:
        row |= {"status": "too slow", "reason": f"one call takes {once:.0f} ms; see --max-seconds {max_seconds:g}"}
        return None
    row["peak_MiB"] = watch.peak(prepare, call)
    return Timed(row, prepare, call, [])


def finish(timed: Timed, provider: Provider, case: inputs.Case, mode: str) -> None:
    """The columns of what was taken."""
    times, (tokens, vocab, dim), units = harness.Times.of(timed.taken), case.shape, provider.units[mode]
    timed.row.update({"status": "ok", "ms": times.median, "ms_p20": times.low, "ms_p80": times.high,
                      "repeats": times.repeats, "units": units,
                      "tflops": 2 * tokens * vocab * dim * units / times.median / 1e9})


@contextmanager
def told(row: dict[str, Any]) -> Iterator[None]:
    """What goes wrong inside is the row's status."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        row["status"] = "out of memory"
    except Exception as error:  # code of others may raise anything, and must not end the run: the row says what
        row |= {"status": "error", "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def measure(providers: Mapping[str, tuple[Provider, Forward]], case: inputs.Case, reference: harness.Reference,
            modes: list[str], watch: harness.Stopwatch, repeats: int = 20, max_seconds: float = float("inf"),
            late: Callable[[], str] = lambda: "") -> list[dict[str, Any]]:
    """A row for each mode of each provider, timed if it passes its check: in TURNS turns, A B A B, as a chip's clock
    drifts while it warms. Whatever goes wrong is a row too.

    late() gives the reason to start nothing more, or an empty string.
    """
    rows: list[dict[str, Any]] = []
    checked: dict[tuple[str, bool], dict[str, float] | Wrong] = {}
    for mode in modes:
        ready: dict[str, Timed] = {}
        for name, (provider, forward) in providers.items():
            if mode not in provider.modes:
                continue
            row: dict[str, Any] = {"provider": name, "version": provider.version(), "what": provider.what,
                                   "mode": mode}
            rows.append(row)
            if late():
                row |= {"status": "not run", "reason": late()}
                continue
            key = name, mode != "forward"
            with told(row):
                if provider.of_kl:
                    _ = case.old_policy, reference.kl  # inputs, not memory of the provider
                if provider.checked and key not in checked:
                    try:
                        checked[key] = check(provider, forward, case, reference, key[1])
                    except Wrong as wrong:
                        checked[key] = wrong.with_traceback(None)  # it would keep the gradients
                errors = checked.get(key, {})
                if isinstance(errors, Wrong):
                    row |= errors.errors | {"status": "failed check", "reason": str(errors)}
                    continue
                row |= errors
                timed = begin(row, provider, forward, case, mode, watch, repeats, max_seconds)
                if timed:
                    ready[name] = timed
            if row.get("status") in ("out of memory", "error") and not usable(watch.device):
                for open_ in ready.values():
                    open_.row.update(status="not run", reason=f"the CUDA context was lost in {name}")
                return rows
        turns = TURNS if len(ready) > 1 else 1
        for _ in range(turns):
            for name, timed in list(ready.items()):
                with told(timed.row):
                    timed.taken.extend(watch.samples(timed.prepare, timed.call, -(-repeats // turns)))
                if "status" in timed.row:  # it failed
                    del ready[name]
        for name, timed in ready.items():
            finish(timed, providers[name][0], case, mode)
    return rows


def usable(device: torch.device) -> bool:
    """False once a kernel has broken the CUDA context: nothing after it can run in this process."""
    try:
        harness.release(device)
        harness.synchronize(device)
    except RuntimeError:
        return False
    return True


class Results:
    """Rows, printed and written as they come."""

    def __init__(self, path: Path | None):
        self.rows: list[dict[str, Any]] = []
        self.path = path
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(",".join(COLUMNS) + "\n")
        elif path.read_text().split("\n", 1)[0] != ",".join(COLUMNS):
            raise ValueError(f"{path} has other columns than this version writes; move it away or give another --out")

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        print(line(row), flush=True)
        if self.path is not None:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                shown = {name: f"{value:.5g}" if isinstance(value, float) else value for name, value in row.items()}
                csv.writer(file).writerow([shown.pop(name, "") for name in COLUMNS])
                assert not shown, f"no column for {shown}"


def line(row: dict[str, Any]) -> str:
    """One row as text: where, milliseconds [20 %, 80 %], TFLOP/s, MiB, errors; or why there are none."""
    text = (f"{row.get('head', ''):4} {row.get('tokens', ''):>6} {row.get('data', ''):6} {row.get('mode', ''):8} "
            f"{row['provider']:23} ")
    if row["status"] == "ok":
        text += (f"{row['ms']:9.3f} [{row['ms_p20']:.3f}, {row['ms_p80']:.3f}] ms {row['tflops']:8.3g} TFLOP/s "
                 f"{row['peak_MiB']:7.0f} MiB ")
    else:
        text += f"{row['status']}: {row['reason']} " if row.get("reason") else f"{row['status']} "
    return text + "".join(f" {name} {row[name]:.1e}" for name in ERRORS if name in row)


def print_table(results: Results, device: torch.device) -> None:
    """The short table: the fastest first in each problem and mode, with the ratio to the GEMM line."""
    rows = [row for row in results.rows if "mode" in row]
    gemms = {(row["data"], row["head"], row["tokens"], row["mode"]): row["ms"] for row in rows
             if row["provider"] == "gemms" and row["status"] == "ok"}
    print(f"\n{'head':4} {'tokens':>6} {'data':6} {'mode':8} {'provider':23} {'ms':>9} {'/gemms':>6} {'TFLOP/s':>7} "
          f"{'MiB':>6} {'value':>7} {'dX':>7} {'dW':>7}")
    rows.sort(key=lambda row: (row["head"], row["tokens"], row["data"], MODES.index(row["mode"]), row.get("ms", 1e9)))
    for row in rows:
        where = (row["data"], row["head"], row["tokens"], row["mode"])
        start = f"{row['head']:4} {row['tokens']:>6} {row['data']:6} {row['mode']:8} {row['provider']:23} "
        if row["status"] != "ok":
            print(start + row["status"])
            continue
        ratio = f"{row['ms'] / gemms[where]:6.2f}" if where in gemms and row["provider"] != "ours-kl" else " " * 6
        errors = " ".join(f"{row[name]:7.1e}" if name in row else " " * 7 for name in
                          ("value_max", "dhidden", "dweight"))
        print(f"{start}{row['ms']:9.3f} {ratio} {row['tflops']:7.3g} {row['peak_MiB']:6.0f} {errors}")
    for row in results.rows:
        if row["status"] == "skipped":
            print(f"skipped {row['provider']}: {row['reason']}")
    if device.type != "cuda":
        print("CPU: these are not GPU numbers; they show only that the benchmark runs.")


def run_case(where: dict[str, Any], order: list[list[str]], ready: dict[str, Forward], results: Results,
             watch: harness.Stopwatch, options: argparse.Namespace, lost: str, started: float) -> str:
    """Measure the providers of `order` on one problem; returns why nothing can run any more, or an empty string."""
    late = lambda: "--deadline" if time.monotonic() - started > options.deadline else ""
    case = reference = None
    failed = lost or late()
    if not failed:
        try:
            case = inputs.make_case(where["data"], where["head"], where["tokens"], DTYPES[options.dtype], watch.device,
                                    options.seed)
            reference = harness.Reference(case)
        except torch.cuda.OutOfMemoryError:
            failed = "out of memory in the inputs"
    if case is not None and reference is not None:
        quantiles = case.entropy_quantiles()
        where = where | {"entropy_p50": quantiles["p50"], "entropy_p90": quantiles["p90"]}
        print(f"\n{where['head']}: {where['tokens']} tokens, D {where['dim']}, V {where['vocab']}, {options.dtype}, "
              f"{case.kind}: entropy " + ", ".join(f"{key} {value:.2f}" for key, value in quantiles.items()) + " nats",
              flush=True)
    for names in order:
        if failed or case is None or reference is None:
            for name in names:
                results.add(where | {"provider": name, "mode": options.modes[0], "status": "not run", "reason": failed})
            continue
        for row in measure({name: (PROVIDERS[name], ready[name]) for name in names}, case, reference, options.modes,
                           watch, options.repeats, options.max_seconds, late):
            results.add(where | row)
        if not usable(watch.device):
            failed = lost = f"the CUDA context was lost in {' or '.join(names)}"
    return lost


def order_of(names: Collection[str], shuffled: random.Random) -> list[list[str]]:
    """Which providers are measured together, in order: the products alone and ours by turns, so that a deadline takes
    no headline ratio; then the others, one by one, in random order.
    """
    first = [name for name in FIRST if name in names]
    rest = sorted(set(names) - set(first))
    return ([first] if first else []) + [[name] for name in shuffled.sample(rest, len(rest))]


def parse(arguments: list[str]) -> tuple[argparse.Namespace, torch.device]:
    """Options, filled with what fits the device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, metavar="NAME", help=" ".join(PROVIDERS))
    parser.add_argument("--heads", nargs="+", choices=inputs.HEADS, help="default: 7b 3b; without a GPU: tiny")
    parser.add_argument("--tokens", nargs="+", type=int, help="default: 8192 16384 32768 65536 30011")
    parser.add_argument("--modes", nargs="+", choices=MODES)
    parser.add_argument("--data", nargs="+", choices=inputs.KINDS, default=["peaked"])
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16; without a GPU: float32")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each mode, at least 20")
    parser.add_argument("--seed", type=int, default=0, help="of inputs and order")
    parser.add_argument("--out", type=Path, help="default: bench/results/kernel-GPU.csv; without a GPU: none")
    parser.add_argument("--quick", action="store_true", help="8192, 32768 tokens; forward, both; 15 s each")
    parser.add_argument("--max-seconds", type=float, help="skip a mode whose repeats would take longer")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="start no more providers after so many s")
    options = parser.parse_args(arguments)
    if options.repeats < 20 or min(options.tokens or [1]) < 1:
        parser.error("--repeats must be at least 20 and --tokens at least 1")
    gpu = device.type == "cuda"
    options.providers = options.providers or list(PROVIDERS if gpu else ON_CPU)
    options.heads = options.heads or (["7b", "3b"] if gpu else ["tiny"])  # a deadline takes the last
    options.tokens = options.tokens or (([8192, 32768] if options.quick else [8192, 16384, 32768, 65536, 30011])
                                        if gpu else [256, 100])
    options.modes = options.modes or (["forward", "both"] if options.quick else list(MODES))
    options.dtype = options.dtype or ("bfloat16" if gpu else "float32")
    options.max_seconds = options.max_seconds or (15.0 if options.quick else float("inf"))
    if options.out is None and gpu:
        options.out = harness.ROOT / "bench" / "results" / f"kernel-{harness.slug(torch.cuda.get_device_name())}.csv"
    if not options.quick:
        os.environ.setdefault("CCE_AUTOTUNE", "1")  # its best mode; read when it is imported, and minutes at each size
    return options, device


def main(arguments: list[str]) -> int:
    """0, or 1 if one of ours failed its check or raised, or the CUDA context was lost."""
    options, device = parse(arguments)
    started = time.monotonic()
    machine = harness.environment(device)
    print("  ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    results = Results(options.out)
    ready: dict[str, Forward] = {}
    for name in options.providers:
        try:
            ready[name] = PROVIDERS[name].start(device)
        except Unavailable as reason:
            results.add(machine | {"provider": name, "status": "skipped", "reason": " ".join(str(reason).split()),
                                   "version": PROVIDERS[name].version(), "what": PROVIDERS[name].what})
    watch, shuffled = harness.Stopwatch(device), random.Random(options.seed)
    lost = ""
    for kind, head, tokens in itertools.product(options.data, options.heads, options.tokens):
        dim, vocab = inputs.HEADS[head]
        where = machine | {"data": kind, "head": head, "tokens": tokens, "vocab": vocab, "dim": dim,
                           "dtype": options.dtype}
        order = order_of(ready, shuffled)
        # Nothing else keeps the case: its memory must be free for the next one.
        lost = run_case(where, order, ready, results, watch, options, lost, started)
    print_table(results, device)
    if results.path is not None:
        print(f"rows added to {results.path}")
    failed = [row for row in results.rows if row["status"] in ("failed check", "error")]
    return int(bool(lost) or any(PROVIDERS[row["provider"]].ours for row in failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
