"""What every benchmark of a kernel needs: where it ran, milliseconds, peak memory, and the error against float64."""

import datetime
import gc
import hashlib
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from inputs import Case

ROOT = Path(__file__).resolve().parent.parent
FLUSH_BYTES = 256 << 20
"""Written between two timed calls: several times the L2 cache of any chip."""
POISON_BYTES = 8 << 30
WARMUP = 3
SLICE = 512
"""Tokens whose dX is compared."""
WEIGHT_ROWS = 192
"""Vocabulary rows of targets, and as many others, whose dW is compared."""
TILE = (4096, 8192)
"""Tokens and vocabulary of a float64 tile of logits (256 MiB)."""


# Where

def environment(device: torch.device) -> dict[str, str]:
    """Date, commit, digest of kernels/, GPU, driver and versions, as columns of a results file."""
    digest = hashlib.sha1(b"".join(path.read_bytes() for path in sorted((ROOT / "kernels").rglob("*.py"))))
    commit = _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    if commit and _output("git", "-C", str(ROOT), "status", "--porcelain"):
        commit += "-dirty"
    on_gpu = device.type == "cuda"
    return {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"), "commit": commit or "unknown",
            "kernels": digest.hexdigest()[:10],
            "gpu": torch.cuda.get_device_name(device) if on_gpu else "none (CPU)",
            "driver": (_driver() or "unknown") if on_gpu else "", "torch": torch.__version__,
            "cuda": torch.version.cuda or "", "triton": _triton_version()}


def _output(*command: str) -> str:
    """Standard output of a command, empty if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _driver() -> str:
    answer = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if answer:
        return answer.splitlines()[0]
    try:
        import pynvml  # pyright: ignore[reportMissingImports]
    except ImportError:
        return ""
    pynvml.nvmlInit()
    return str(pynvml.nvmlSystemGetDriverVersion())


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__


def slug(name: str) -> str:
    """A GPU's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# How long, how much

class Times(NamedTuple):
    """Milliseconds of a call: median, 20 % and 80 % quantiles."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, taken: list[float]) -> "Times":
        low, median, high = np.quantile(taken, [0.2, 0.5, 0.8]).tolist()
        return cls(median, low, high, len(taken))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Times calls; between two of them it writes a buffer that empties the L2 cache."""

    def __init__(self, device: torch.device):
        self.device = device
        self.buffer = torch.empty(FLUSH_BYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device)

    def one(self, prepare: Callable[[], Any], call: Callable[[Any], Any]) -> float:
        """Milliseconds of call(prepare()), `prepare` not counted, as the host sees it: compilation included."""
        state = prepare()
        synchronize(self.device)
        started = time.perf_counter()
        call(state)
        synchronize(self.device)
        return 1e3 * (time.perf_counter() - started)

    def many(self, prepare: Callable[[], Any], call: Callable[[Any], Any], repeats: int) -> Times:
        """Median and quantiles over `repeats` calls; see `samples`."""
        return Times.of(self.samples(prepare, call, repeats))

    def samples(self, prepare: Callable[[], Any], call: Callable[[Any], Any], repeats: int) -> list[float]:
        """Milliseconds of `repeats` calls after WARMUP uncounted ones, between CUDA events on a GPU."""
        for _ in range(WARMUP):
            call(prepare())
        if self.device.type != "cuda":
            return [self.one(prepare, call) for _ in range(repeats)]
        pairs = []
        for turn in range(repeats):
            state = prepare()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.buffer.fill_(1 + turn % 100)
            start.record()
            result = call(state)
            stop.record()
            pairs.append((start, stop))
            del state, result  # the next `prepare` may need their memory
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(stop) for start, stop in pairs]

    def peak(self, prepare: Callable[[], Any], call: Callable[[Any], Any]) -> float:
        """MiB that prepare and call hold at most beyond what was allocated before; NaN without a GPU."""
        if self.device.type != "cuda":
            return float("nan")
        release(self.device)
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call(prepare())
        torch.cuda.synchronize(self.device)
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2 ** 20


def release(device: torch.device) -> None:
    """Give the memory that nothing uses back to the GPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def poison(device: torch.device) -> None:
    """Leave NaN (all bits set) in the memory that torch.empty hands out next: unwritten outputs then show.

    Without it they would hold the previous provider's right answer.
    """
    if device.type != "cuda":
        return
    release(device)
    free, _ = torch.cuda.mem_get_info(device)
    large = torch.empty(min(POISON_BYTES, int(0.8 * free)), dtype=torch.uint8, device=device).fill_(255)
    small = [torch.empty(1 << 19, dtype=torch.uint8, device=device).fill_(255) for _ in range(64)]  # their own pool
    del large, small


# How wrong

def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected|| in Frobenius norm, in float64; NaN if anything found is NaN."""
    found, expected = found.detach().double(), expected.double()
    return float((found - expected).norm() / expected.norm())


def absolute_error(found: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """(mean, max) of |found - expected|, in float64; NaN if anything found is NaN."""
    difference = (found.detach().double() - expected.double()).abs()
    return float(difference.mean()), float(difference.max())  # both keep NaN


class Reference:
    """Float64 log-probs, entropy and KL of all tokens of a case, and gradients of sum_i coefs_i * value_i on a slice.

    dX: all D columns of SLICE tokens, the last one among them; dW: rows of targets and others, over all tokens. Logits
    are formed by tiles, on the case's device.
    """

    def __init__(self, case: Case):
        self.case = case
        tokens, vocab, _ = case.shape
        device = case.hidden.device
        self.tokens = torch.linspace(0, tokens - 1, min(SLICE, tokens), device=device).long().unique()
        noise = torch.Generator(device).manual_seed(case.seed + 2)
        hit = case.targets.unique()
        hit = hit[torch.randperm(len(hit), generator=noise, device=device)[:WEIGHT_ROWS]]
        others = torch.randint(vocab, (WEIGHT_ROWS,), generator=noise, device=device)
        self.rows = torch.cat([hit, others, torch.tensor([vocab - 1], device=device)]).unique()
        with torch.no_grad():
            self._heads = [(case.hidden.detach(), case.weight.detach())]
            stats = self._fold(self._heads[0])
            self.lse, self.entropy = stats[0], stats[0] - stats[1]
            at_target = (self._heads[0][0].double() * self._heads[0][1][case.targets].double()).sum(dim=1)
            self.logprobs = at_target - self.lse

    def _tiles(self, *heads: tuple[torch.Tensor, torch.Tensor]) -> Iterator[tuple[slice, list[torch.Tensor]]]:
        """(tokens, float64 logits of those tokens under each head, for the next part of the vocabulary)."""
        for start in range(0, heads[0][0].shape[0], TILE[0]):
            part = slice(start, start + TILE[0])
            hidden = [h[part].double() for h, _ in heads]
            for first in range(0, heads[0][1].shape[0], TILE[1]):
                yield part, [torch.mm(h, w[first:first + TILE[1]].double().T)
                             for h, (_, w) in zip(hidden, heads, strict=True)]

    def _fold(self, *heads: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """(2, N): log-sum-exp of the first head's logits and their mean under its softmax, or with a second head the
        mean of first minus second.
        """
        size, device = heads[0][0].shape[0], heads[0][0].device
        peak = torch.full((size,), -1e300, dtype=torch.float64, device=device)
        mass, moment = torch.zeros((2, size), dtype=torch.float64, device=device)
        for part, (z, *other) in self._tiles(*heads):
            top = torch.maximum(peak[part], z.amax(dim=1))
            decay = (peak[part] - top).exp()
            e = (z - top[:, None]).exp()
            mass[part] = decay * mass[part] + e.sum(dim=1)
            moment[part] = decay * moment[part] + (e * (z - other[0] if other else z)).sum(dim=1)
            peak[part] = top
        return torch.stack([peak + mass.log(), moment / mass])

    @cached_property
    def _old(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-sum-exp of the old policy, KL(old || new)), (N,) each."""
        with torch.no_grad():
            lse, gap = self._fold(self.case.old_policy, self._heads[0])
            return lse, gap - lse + self.lse

    @property
    def kl(self) -> torch.Tensor:
        """KL(pi_old || pi_theta), (N,)."""
        return self._old[1]

    def gradients(self, coefs: torch.Tensor, of_kl: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(dX of self.tokens, dW of self.rows) for sum_i coefs_i * logprobs_i, or of the KL, coefs (N,) float64."""
        with torch.no_grad():
            hidden, weight = self._heads[0]
            targets = self.case.targets
            heads = [(self._heads[0], self.lse, 1.0 if of_kl else -1.0)]
            if of_kl:
                heads.append((self.case.old_policy, self._old[0], -1.0))
            dhidden = torch.zeros((len(self.tokens), hidden.shape[1]), dtype=torch.float64, device=hidden.device)
            for first in range(0, weight.shape[0], TILE[1]):
                cols = slice(first, first + TILE[1])
                dz = sum(sign * (torch.mm(h[self.tokens].double(), w[cols].double().T)
                                 - lse[self.tokens, None]).exp() for (h, w), lse, sign in heads)
                dhidden += torch.mm(dz * coefs[self.tokens, None], weight[cols].double())
            dweight = torch.zeros((len(self.rows), hidden.shape[1]), dtype=torch.float64, device=hidden.device)
            for start in range(0, hidden.shape[0], TILE[0]):
                part = slice(start, start + TILE[0])
                dz = sum(sign * (torch.mm(h[part].double(), w[self.rows].double().T) - lse[part, None]).exp()
                         for (h, w), lse, sign in heads)
                if not of_kl:
                    dz = dz + (targets[part, None] == self.rows)
                dweight += torch.mm((dz * coefs[part, None]).T, hidden[part].double())
            if not of_kl:
                dhidden += coefs[self.tokens, None] * weight[targets[self.tokens]].double()
            return dhidden, dweight
