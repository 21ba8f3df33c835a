"""`python tests/compiled.py 90`: compiles every launch of the four ops for sm_90, without a GPU, and prints JSON.

The ops run their own launch code on CPU tensors; each `kernel[grid](...)` in it is compiled by Triton as on the chip,
with the specialization that those arguments get there (divisible by 16, equal to 1), and not run.
"""

import json
import re
import subprocess
import sys
import tempfile
from functools import partial
from itertools import chain
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from cosmo_rl.kernels import cpgd_objective, launch, linear_cpgd, linear_kl, linear_logprob

MODULES = (cpgd_objective, linear_cpgd, linear_kl, linear_logprob)
CHIP = int(sys.argv[1])


class Driver:
    """What JITFunction.run asks of a driver before the launch itself."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CHIP, 32)


class Compiler:
    """Stands in for JITFunction.__getitem__; `found` has a row for every kernel that differs."""

    def __init__(self) -> None:
        self.case, self.found, self.seen = "", [], set()

    def __call__(self, function: JITFunction, grid):
        return lambda *args, **keywords: self.compile(function, args, keywords)

    def compile(self, function: JITFunction, args, keywords) -> None:
        row = {"kernel": function.__name__, "case": self.case,
               "constants": {name: value for name, value in keywords.items() if name.isupper()}}
        try:
            kernel = function.run(*args, grid=(1,), warmup=True, **keywords)
        except Exception as error:
            self.found.append(row | {"error": f"{type(error).__name__}: {error}"})
            return
        assert kernel is not None
        if id(kernel) not in self.seen:
            self.seen.add(id(kernel))
            ptx = kernel.asm["ptx"]
            self.found.append(row | resources(kernel.asm["cubin"]) | {
                "shared": kernel.metadata.shared, "wgmma": ptx.count("wgmma.mma_async"),
                "mma_sync": len(re.findall(r"^\s*mma\.sync", ptx, re.MULTILINE))})


def resources(cubin: bytes) -> dict[str, int]:
    """registers, stack and local bytes a thread; a spill is one of the latter two."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert numbers is not None, text
    return dict(zip(("registers", "stack", "local"), map(int, numbers.groups()), strict=True))


def forward(shape, dtype, biased):
    """linear_logprob and linear_kl with one head and with two; returns what `every_launch` goes on with."""
    n, d, v = shape
    hidden, weight = torch.randn(n, d).to(dtype).requires_grad_(), torch.randn(v, d).to(dtype).requires_grad_()
    targets, bias = torch.zeros(n, dtype=torch.int64), torch.zeros(v) if biased else None
    stats = linear_logprob.linear_logprob(hidden, weight, targets, bias=bias, temperature=0.7)
    frozen = weight.detach()
    kl, _ = (linear_kl.linear_kl(hidden.detach(), old, hidden, weight, bias=bias) for old in (frozen, frozen.clone()))
    return hidden, weight, targets, bias, stats, kl


def every_launch(shape, dtype, biased, *, all_flags=False) -> None:
    """The backward passes and linear_cpgd too; with the rarer flags of its kernels or without."""
    hidden, weight, targets, bias, stats, kl = forward(shape, dtype, biased)
    ones = torch.ones(shape[0])
    if all_flags:
        stats.logprobs.sum().backward(retain_graph=True)
        linear_cpgd.linear_cpgd(hidden, weight, targets, None, ones, ones, bias=bias)
        with torch.no_grad():
            linear_cpgd.linear_cpgd(hidden, weight, targets, ones, ones, ones, bias=bias)
    (stats.logprobs.sum() + stats.entropy.sum()).backward()
    kl.sum().backward()
    linear_cpgd.linear_cpgd(hidden, weight, targets, ones, ones, ones, bias=bias, clip_eps_low=ones, clip_eps_high=ones)


def main() -> None:
    compiler = Compiler()
    triton.runtime.driver.set_active(Driver())  # pyright: ignore[reportArgumentType]
    JITFunction.__getitem__ = lambda self, grid: compiler(self, grid)  # pyright: ignore[reportAttributeAccessIssue]
    launch.use_triton = lambda backend, device: True
    launch.capability = lambda device: divmod(CHIP, 10)
    # As a real vocabulary: some tiles to a split, and some splits or just one.
    launch.num_programs = lambda device: 1 if compiler.case.startswith("one split") else 3
    takes_tma = launch.takes_tma
    launch.takes_tma = lambda *tensors: "pointers" not in compiler.case and takes_tma(*tensors)
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    aligned = (256, 128, 4608)
    for case, run, *args in (
        ("aligned bfloat16", partial(every_launch, all_flags=True), aligned, bf16, True),
        ("aligned float16", every_launch, aligned, fp16, True),
        ("aligned float32", every_launch, aligned, fp32, True),
        ("one split bfloat16", forward, aligned, bf16, False),
        ("ragged bfloat16", forward, (3, 123, 507), bf16, True),
        ("uneven bfloat16", forward, (256, 72, 4608), bf16, True),
        ("ones bfloat16", every_launch, (1, 1, 1), bf16, True),
        ("pointers bfloat16", forward, aligned, bf16, True),
        ("pointers float32", forward, aligned, fp32, True),
    ):
        if CHIP >= 90 or "pointers" not in case:  # below, there is no other way
            compiler.case = case
            run(*args)
    for dtype, size, eps in ((fp32, 1600, 0.2), (fp32, 3, torch.ones(3)), (fp32, 1, 0.2), (torch.float64, 1600, 0.2)):
        compiler.case = f"objective {dtype} {size}"
        logprobs = torch.zeros(size, dtype=dtype)
        cpgd_objective.cpgd_objective(logprobs, logprobs, torch.ones(size), clip_eps_low=eps, clip_eps_high=eps)
    kernels = {value.__name__ for value in chain(*(vars(module).values() for module in MODULES))
               if isinstance(value, JITFunction) and value.__name__.endswith("_kernel")}
    json.dump({"found": compiler.found, "kernels": sorted(kernels)}, sys.stdout)


if __name__ == "__main__":
    main()
