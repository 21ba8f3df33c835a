"""The providers of the kernel benchmark: ours, plain torch, the GEMM line, and the peers, imported at first use.

Each computes, for N response tokens, log-probs (or KL) and the gradients of one weighted sum of them. Peers are called
through their public functions in the fastest mode they have for per-token losses; none of their code is here.

Written from liger-kernel 0.8.5, cut-cross-entropy 25.1.1, quack-kernels 0.6.5, verl 0.9.1 and trl 1.16.0. What passed
the check without a GPU: liger-grpo, trl and compile on a CPU; cce and verl (without TMA) in Triton's interpreter, in
float16. liger-scaled-ce and quack were only imported, their signatures read; nothing here says that they run.
"""

import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from harness import Reference
from inputs import Case

from cosmo_rl.kernels.linear_cpgd import linear_cpgd
from cosmo_rl.kernels.linear_kl import linear_kl
from cosmo_rl.kernels.linear_logprob import linear_logprob

GEMM_ROWS = 8192
"""Tokens whose logits the GEMM line holds at once (2.5 GB at Qwen's vocabulary)."""
UNITS = {"forward": 1, "backward": 2, "both": 3}
KL_UNITS = {"forward": 2, "backward": 2, "both": 4}
"""Useful work of a mode; 1 is 2 N V D operations, one product over the vocabulary."""


class Unavailable(Exception):
    """A provider that is absent or does not run here; the message says why."""


class Outcome(NamedTuple):
    """What a forward returns: a () loss that differentiates, and per-token values where the provider has them."""

    loss: torch.Tensor | None = None
    values: torch.Tensor | None = None
    """(N,) log-probs or KL, or their () mean, in nats."""
    entropy: torch.Tensor | None = None
    """(N,), nats."""


Forward = Callable[[Case], Outcome]


def policy_gradient(case: Case, _: Reference | None = None) -> torch.Tensor:
    """d loss / d log-prob of sum_i w_i A_i (-log-prob_i), (N,): the loss of every provider but three."""
    return -case.advantages * case.token_weights


def mean_nll(case: Case, _: Reference | None = None) -> torch.Tensor:
    """d loss / d log-prob of the mean of -log-prob, (N,)."""
    return -case.token_weights


def mean_kl(case: Case, _: Reference | None = None) -> torch.Tensor:
    """d loss / d KL of the mean KL, (N,)."""
    return case.token_weights


def cpgd(case: Case, reference: Reference) -> torch.Tensor:
    """d loss / d log-prob of the CPGD loss at its default settings, (N,) float64, from the float64 log-probs."""
    log_ratio = reference.logprobs - case.old_logprobs.double()
    advantages, ratio = case.advantages.double(), log_ratio.exp()
    clipped = ((advantages > 0) & (ratio > 1.2)) | ((advantages < 0) & (ratio < 0.8))
    slope = 0.01 * (ratio - 1).clamp(max=2.0) - advantages.masked_fill(clipped, 0.0)
    return case.token_weights.double() * slope


@dataclass(frozen=True)
class Provider:
    """One line of the table."""

    name: str
    what: str
    """What is computed and compared, for the results file."""
    load: Callable[[], Forward]
    """Imports the package and returns the forward; may raise Unavailable, or anything a peer's import raises."""
    package: str = ""
    """Import name, empty for what is always there."""
    pip: str = ""
    modes: tuple[str, ...] = ("forward", "backward", "both")
    units: dict[str, int] = field(default_factory=lambda: UNITS)
    of_kl: bool = False
    """Its values are KL(old || new), not log-probs."""
    coefs: Callable[[Case, Any], torch.Tensor] = policy_gradient
    checked: bool = True
    """False for the GEMM line, which computes nothing that could be right."""
    steps: Callable[[Case, str], tuple[Callable, Callable]] | None = None
    """(prepare, call) of a mode where these are not the forward and autograd's backward."""
    needs_cuda: bool = False

    @property
    def ours(self) -> bool:
        return self.name.startswith("ours")

    def version(self) -> str:
        try:
            return importlib.metadata.version(self.pip.split("==")[0]) if self.pip else ""
        except importlib.metadata.PackageNotFoundError:
            return "unknown"

    def start(self, device: torch.device) -> Forward:
        """The forward, imported now.

        Raises:
            Unavailable: not installed, not importable, or not for this device; the message says which.
        """
        if self.package and importlib.util.find_spec(self.package) is None:
            raise Unavailable(f"{self.package} is not installed (pip install {self.pip})")
        if self.needs_cuda and device.type != "cuda":
            raise Unavailable("it needs a GPU")
        try:
            return self.load()
        except Unavailable:
            raise
        except Exception as error:  # an import of others' code may raise anything (quack: TypeError)
            if not self.package:
                raise
            raise Unavailable(f"it cannot be imported: {type(error).__name__}: {error}") from error


def _per_token(function: Callable[[Case], tuple[torch.Tensor, torch.Tensor | None]]) -> Forward:
    """The forward of a provider of differentiable log-probs (and entropy)."""
    def forward(case: Case) -> Outcome:
        logprobs, entropy = function(case)
        return Outcome((policy_gradient(case) * logprobs).sum(), logprobs, entropy)

    return forward


# Plain torch, and the line of products alone

def _plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.linear(hidden, weight).float().log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]


def _load_torch() -> Forward:
    return _per_token(lambda case: (_plain(case.hidden, case.weight, case.targets), None))


def _load_compile() -> Forward:
    torch._dynamo.config.recompile_limit = 64  # one compilation a shape and grad mode
    compiled = torch.compile(_plain, dynamic=False)
    return _per_token(lambda case: (compiled(case.hidden, case.weight, case.targets), None))


def _gemm_steps(case: Case, mode: str) -> tuple[Callable, Callable]:
    """1 (forward), 2 (backward) or 3 products, over chunks of tokens; buffers are allocated in `prepare`."""
    hidden, weight = case.hidden.detach(), case.weight.detach()
    tokens = hidden.shape[0]
    rows = min(GEMM_ROWS, tokens)

    def prepare():
        logits = torch.mm(hidden[:rows], weight.T)  # of real data: zeros would run faster
        return logits, torch.empty_like(hidden), torch.empty_like(weight)

    def call(buffers):
        logits, dhidden, dweight = buffers
        for start in range(0, tokens, rows):
            part = slice(start, min(start + rows, tokens))
            chunk = logits[:part.stop - start]
            if mode != "backward":
                torch.mm(hidden[part], weight.T, out=chunk)
            if mode == "forward":
                continue
            torch.mm(chunk, weight, out=dhidden[part])
            if start:
                dweight.addmm_(chunk.T, hidden[part])
            else:
                torch.mm(chunk.T, hidden[part], out=dweight)

    return prepare, call


# Ours

def _load_logprob() -> Forward:
    def function(case: Case):
        stats = linear_logprob(case.hidden, case.weight, case.targets)
        return stats.logprobs, stats.entropy

    return _per_token(function)


def _load_cpgd() -> Forward:
    def forward(case: Case) -> Outcome:
        out = linear_cpgd(case.hidden, case.weight, case.targets, case.old_logprobs, case.advantages,
                          case.token_weights)
        return Outcome(out.loss, out.logprobs, out.entropy)

    return forward


def _load_kl() -> Forward:
    def forward(case: Case) -> Outcome:
        kl = linear_kl(*case.old_policy, case.hidden, case.weight)
        return Outcome((mean_kl(case) * kl).sum(), kl)

    return forward


# Peers

def _load_liger_grpo() -> Forward:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    def forward(case: Case) -> Outcome:
        tokens = case.hidden.shape[0]
        # One token a sequence, as its advantages are per sequence; all in one chunk, as each chunk costs a float32 dW.
        # Without old log-probs the ratio is 1, and "dapo" divides by the number of tokens: the common loss.
        loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="dapo", chunk_size=tokens)
        mask = torch.ones((tokens, 1), device=case.hidden.device)
        return Outcome(loss(case.hidden[:, None], case.weight, case.targets[:, None], mask, case.advantages)[0])

    return forward


def _load_liger_scaled_ce(entropy: bool) -> Forward:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise Unavailable("its CuTe DSL kernels need compute capability 9.0 (elsewhere Liger falls back to torch)")
    os.environ.setdefault("LIGER_SCALED_CE_SM90_VALIDATE_TARGETS", "0")  # the check waits for the device
    from liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90 import LigerFusedScaledCrossEntropySM90Function

    def function(case: Case):
        out = LigerFusedScaledCrossEntropySM90Function.apply(case.hidden, case.weight, case.targets, 1.0, -100, 1,
                                                             entropy)
        return (-out[0], out[1]) if entropy else (-out, None)

    return _per_token(function)


def _load_cce(filter_eps: str | None) -> Forward:
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    return _per_token(lambda case: (-linear_cross_entropy(
        case.hidden, case.weight, case.targets, reduction="none", filter_eps=filter_eps, impl="cce"), None))


def _load_quack() -> Forward:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy  # pyright: ignore[reportMissingImports]

    def forward(case: Case) -> Outcome:
        loss = chunked_linear_cross_entropy(case.hidden, case.weight, case.targets, chunk_size=4096)
        return Outcome(loss, -loss)

    return forward


def _without_init(*names: str) -> None:
    """Enter the packages `names` into sys.modules without running their __init__.py, which imports a whole trainer."""
    spec = importlib.util.find_spec(names[0].split(".")[0])
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable(f"{names[0]} is not a package")
    folder = Path(spec.submodule_search_locations[0])
    for name in names:
        if name not in sys.modules:
            bare = importlib.machinery.ModuleSpec(name, None, is_package=True)
            bare.submodule_search_locations = [str(folder.joinpath(*name.split(".")[1:]))]
            sys.modules[name] = importlib.util.module_from_spec(bare)


def _load_verl() -> Forward:
    _without_init("verl", "verl.utils")
    function: Any = importlib.import_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
    return _per_token(lambda case: function(case.hidden, case.weight, case.targets, 1.0, "none"))


def _load_trl(outputs: tuple[str, ...]) -> Forward:
    _without_init("trl", "trl.kernels", "trl.trainer")
    # Its backward asks trl.trainer.utils, which imports all trainers, for a context that is null without ZeRO-3.
    utils = types.ModuleType("trl.trainer.utils")
    utils.maybe_gather_lm_head_ctx = lambda *_: nullcontext()  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules.setdefault("trl.trainer.utils", utils)
    function: Any = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    # 32768 is the width of vocabulary that its trainers use.
    return _per_token(lambda case: function.apply(
        case.hidden, case.weight, None, case.targets, 1.0, 32768, None, 1.0, outputs)[:2])


_COMMON = "log-probs; gradients of the policy-gradient sum"
PROVIDERS = {provider.name: provider for provider in (
    Provider("torch", f"F.linear, float32 log_softmax; {_COMMON}", _load_torch),
    Provider("compile", f"torch.compile of the same, static shapes; {_COMMON}", _load_compile),
    Provider("gemms", "1, 2 or 3 products alone, nothing to compare: what nothing dense beats",
             lambda: lambda case: Outcome(), checked=False, steps=_gemm_steps),
    Provider("ours-logprob", f"linear_logprob, two phases, log-probs and entropy; {_COMMON}", _load_logprob),
    Provider("ours-cpgd", "linear_cpgd, gradients formed in the forward: log-probs, entropy, gradients of its own loss",
             _load_cpgd, modes=("both",), coefs=cpgd),
    Provider("ours-fold", "linear_cpgd without gradient (cuBLAS chunks and a fold): log-probs, entropy", _load_cpgd,
             modes=("forward",)),
    Provider("ours-kl", "linear_kl of two heads: KL, gradients of its mean", _load_kl, units=KL_UNITS, of_kl=True,
             coefs=mean_kl),
    Provider("liger-grpo", "fused GRPO, one chunk, ratio 1, no log-probs out: gradients of the policy-gradient sum",
             _load_liger_grpo, "liger_kernel", "liger-kernel==0.8.5", modes=("both",)),
    Provider("liger-scaled-ce", f"SM90 scaled CE, no entropy; {_COMMON}", lambda: _load_liger_scaled_ce(False),
             "liger_kernel", "liger-kernel==0.8.5", needs_cuda=True),
    Provider("liger-scaled-ce-entropy", f"SM90 scaled CE with entropy; {_COMMON}", lambda: _load_liger_scaled_ce(True),
             "liger_kernel", "liger-kernel==0.8.5", needs_cuda=True),
    Provider("cce", f"filtered gradients (its default); {_COMMON}", lambda: _load_cce("high"),
             "cut_cross_entropy", "cut-cross-entropy==25.1.1", needs_cuda=True),
    Provider("cce-unfiltered", f"filter_eps=None; {_COMMON}", lambda: _load_cce(None),
             "cut_cross_entropy", "cut-cross-entropy==25.1.1", needs_cuda=True),
    Provider("quack", "mean NLL only, no per-token weights: its mean, gradients of the mean NLL", _load_quack,
             "quack", "quack-kernels==0.6.5", modes=("forward", "both"), coefs=mean_nll, needs_cuda=True),
    Provider("verl", f"Triton kernels, entropy always; {_COMMON}", _load_verl, "verl", "verl==0.9.1", needs_cuda=True),
    Provider("trl", f"chunked log-probs, no entropy; {_COMMON}", lambda: _load_trl(()), "trl", "trl==1.16.0"),
    Provider("trl-entropy", f"chunked log-probs with entropy; {_COMMON}", lambda: _load_trl(("entropy",)),
             "trl", "trl==1.16.0"),
)}
ON_CPU = ("torch", "gemms", "ours-logprob", "ours-cpgd", "ours-fold", "ours-kl")
