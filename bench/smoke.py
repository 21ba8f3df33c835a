"""Every op once, small, on this GPU (or in Triton's interpreter), against the reference: is anything worth timing here?

    python3 bench/gpu_gate.py --run bench/smoke.py
    python3 bench/gpu_gate.py --run bench/smoke.py --forward 8192 3584 152064    # linear_logprob twice, for a profiler
"""

import argparse
import sys
from collections.abc import Callable

import harness
import torch

from cosmo_rl.kernels.cpgd_objective import cpgd_objective
from cosmo_rl.kernels.linear_cpgd import linear_cpgd
from cosmo_rl.kernels.linear_kl import linear_kl
from cosmo_rl.kernels.linear_logprob import linear_logprob

LIMIT = 2e-2
"""Relative error of a result or a gradient in bfloat16; a wrong tile gives other numbers altogether."""


def ops(device: torch.device) -> dict[str, Callable[[str], list[torch.Tensor]]]:
    """Op -> backend -> its results and the gradients of one loss of them."""
    tokens, dim, vocab = (600, 512, 5000) if device.type == "cuda" else (40, 32, 300)
    noise = torch.Generator(device).manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=noise, device=device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # the interpreter's bfloat16 products are wrong
    hidden, old, weight = draw(tokens, dim).to(dtype), draw(tokens, dim).to(dtype), (4 * draw(vocab, dim) / dim**0.5)
    weight = weight.to(dtype)
    targets = torch.randint(vocab, (tokens,), generator=noise, device=device)
    advantages, weights, before = draw(tokens), draw(tokens).abs(), -5 + draw(tokens)

    def graded(make: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, list[torch.Tensor]]]):
        leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        loss, values = make(*leaves)
        return [*(value.detach() for value in values), *torch.autograd.grad(loss, leaves)]

    def logprob(backend: str):
        def make(h, w):
            stats = linear_logprob(h, w, targets, backend=backend)
            return (weights * (stats.logprobs + 0.3 * stats.entropy)).sum(), [*stats]
        return graded(make)

    def cpgd(backend: str):
        def make(h, w):
            out = linear_cpgd(h, w, targets, before, advantages, weights, backend=backend)
            return out.loss, [out.logprobs, out.entropy, out.drift]
        return graded(make)

    def kl(backend: str):
        def make(h, w):
            values = linear_kl(old, weight, h, w, backend=backend)
            return (weights * values).sum(), [values]
        return graded(make)

    def objective(backend: str):
        leaf = (before + 0.3 * advantages).requires_grad_()
        terms = cpgd_objective(leaf, before, advantages, backend=backend)
        return [terms.loss.detach(), terms.drift, *torch.autograd.grad(terms.loss.sum(), leaf)]

    return {"linear_logprob": logprob, "linear_cpgd": cpgd, "linear_kl": kl, "cpgd_objective": objective}


def main(arguments: list[str]) -> int:
    """0 if every op agrees with the reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forward", nargs=3, type=int, metavar=("N", "D", "V"), help="only linear_logprob, twice")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print("  ".join(f"{key} {value}" for key, value in harness.environment(device).items()), flush=True)
    if options.forward:
        tokens, dim, vocab = options.forward
        hidden = torch.randn(tokens, dim, device=device, dtype=torch.bfloat16)
        weight = torch.randn(vocab, dim, device=device, dtype=torch.bfloat16).mul_(4 / dim**0.5)
        for _ in range(2):
            linear_logprob(hidden, weight, torch.zeros(tokens, dtype=torch.int64, device=device), backend="triton")
        harness.synchronize(device)
        return 0
    failed = False
    for name, run in ops(device).items():
        errors = [harness.relative_error(a, b) for a, b in zip(run("triton"), run("torch"), strict=True)]
        right = all(error <= LIMIT for error in errors)  # NaN is not
        failed |= not right
        print(f"{name:15} {'ok' if right else 'WRONG'}: relative errors " + ", ".join(f"{e:.1e}" for e in errors),
              flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
