"""Inputs of the kernel benchmark: heads, hidden states and targets whose entropy looks like that of an RL policy.

Why not noise: independent normal logits of standard deviation 1 have an entropy near ln V, at which block filters (CCE)
look falsely good and tile rules falsely bad. Three kinds:

    peaked  median entropy 0.3 to 0.9 nats, 90 % quantile 1.6 to 2.5, as of a policy in RL: the kind to quote
    flat    the same at temperature 2
    iid     standard normal hidden states, weights of standard deviation 1 / sqrt(D): what others' benchmarks use

Everything is built on the device, by chunks of tokens and of vocabulary, from one seed; N x V never exists. The bits
depend on the kind of device and on the version of torch, as its random numbers do.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch

KINDS = ("peaked", "flat", "iid")
HEADS = {"3b": (2048, 151_936), "7b": (3584, 152_064), "tiny": (128, 2_000)}
"""(D, V) of Qwen2.5-VL's heads, and of one for CPUs."""
WEIGHT_STD = 0.02
CLUSTERS = 512
MAX_COMPONENTS = 20
MEDIAN_ENTROPY, ENTROPY_SPREAD = 0.55, 1.0
"""Peaked rows draw a log-normal entropy: median in nats, and standard deviation of its logarithm (90 %: 1.98)."""
PEAK, BACKGROUND_STD, MEAN_STD = (18.0, 26.0), 1.5, 4.0
"""Of the logits, in nats: range of the first component's, spread of the rest, spread of what a row adds to all."""
POLICY_NOISE = 0.1
"""Relative noise on the hidden states that makes the old policy of the KL."""
TILE_ELEMENTS = 1 << 26
"""Elements of a float32 tile of logits or of weight (256 MiB)."""


@dataclass(frozen=True)
class Case:
    """One problem: N tokens, dimension D, vocabulary V. `hidden` and `weight` are leaves that want a gradient.

    hidden (N, D), weight (V, D): `dtype`; targets (N,) int64; all others (N,) float32, log-probs and entropy in nats.
    """

    kind: str
    head: str
    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    advantages: torch.Tensor
    """Standard normal."""
    old_logprobs: torch.Tensor
    """Log-probs plus noise of 0.05 nats."""
    token_weights: torch.Tensor
    """1 / N, the normaliser of a token mean."""
    entropy: torch.Tensor
    """Of each token, as built."""
    seed: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, V, D)."""
        return self.hidden.shape[0], self.weight.shape[0], self.hidden.shape[1]

    @cached_property
    def old_policy(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden (N, D), weight (V, D)) near, but not equal to, those in training; built at first use."""
        noise = torch.Generator(self.hidden.device).manual_seed(self.seed + 1)
        with torch.no_grad():
            hidden, weight = (torch.cat([_shaken(rows, noise) for rows in tensor.split(8192)])
                              for tensor in (self.hidden, self.weight))
        return hidden, weight

    def entropy_quantiles(self) -> dict[str, float]:
        """Entropy in nats at 10, 50 and 90 %."""
        at = torch.tensor([0.1, 0.5, 0.9], device=self.entropy.device)
        return dict(zip(("p10", "p50", "p90"), self.entropy.quantile(at).tolist(), strict=True))


def _shaken(rows: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
    drawn = torch.randn(rows.shape, generator=noise, device=rows.device)
    scale = POLICY_NOISE * rows.float().square().mean(dim=1, keepdim=True).sqrt()
    return (rows.float() + scale * drawn).to(rows.dtype)


def make_case(kind: str, head: str, tokens: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Case:
    """Build the case of `kind` for `tokens` tokens of a head named in HEADS; equal arguments give equal tensors."""
    if kind not in KINDS:
        raise ValueError(f"data is {kind!r}; give one of {KINDS}")
    if head not in HEADS:
        raise ValueError(f"head is {head!r}; give one of {tuple(HEADS)}")
    dim, vocab = HEADS[head]
    noise = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        weight = _iid_weight(vocab, dim, dtype, noise) if kind == "iid" else _peaked_weight(vocab, dim, dtype, noise)
        hidden = torch.empty((tokens, dim), dtype=dtype, device=device)
        targets = torch.empty(tokens, dtype=torch.int64, device=device)
        logprobs, entropy = torch.empty((2, tokens), device=device)
        rows = max(1, min(1024, TILE_ELEMENTS // vocab))
        for start in range(0, tokens, rows):
            part = slice(start, min(start + rows, tokens))
            hidden[part] = _hidden_rows(kind, part.stop - start, weight, noise)
            targets[part], logprobs[part], entropy[part] = _sample(hidden[part], weight, noise)
        advantages = torch.randn(tokens, generator=noise, device=device)
        old = logprobs + 0.05 * torch.randn(tokens, generator=noise, device=device)
    return Case(kind, head, hidden.requires_grad_(), weight.requires_grad_(), targets, advantages, old,
                torch.full((tokens,), 1.0 / tokens, device=device), entropy, seed)


def _normal(shape: tuple[int, ...], noise: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=noise, device=noise.device)


def _iid_weight(vocab: int, dim: int, dtype: torch.dtype, noise: torch.Generator) -> torch.Tensor:
    weight = torch.empty((vocab, dim), dtype=dtype, device=noise.device)
    for rows in weight.split(8192):
        rows.copy_(_normal(tuple(rows.shape), noise) * dim ** -0.5)
    return weight


def _peaked_weight(vocab: int, dim: int, dtype: torch.dtype, noise: torch.Generator) -> torch.Tensor:
    """Rows that share a mean (it shifts all logits of a token) and the centre of one of CLUSTERS clusters."""
    mean, centres = _normal((1, dim), noise), _normal((CLUSTERS, dim), noise)
    weight = torch.empty((vocab, dim), dtype=dtype, device=noise.device)
    for rows in weight.split(8192):
        cluster = torch.randint(CLUSTERS, (rows.shape[0],), generator=noise, device=noise.device)
        own = _normal(tuple(rows.shape), noise)
        rows.copy_(WEIGHT_STD * (0.5 * mean + 0.5 * centres[cluster] + 0.7 * own))
    return weight


def _hidden_rows(kind: str, rows: int, weight: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
    """(rows, D) float32.

    A peaked row is a mixture of 2 to MAX_COMPONENTS rows of weight, drawn by Zipf's law (ids of a BPE vocabulary are
    roughly sorted by frequency), plus noise. The first would give its own row a logit of PEAK, the others less; gaps
    and scale are fitted so that the entropy of the row is the one drawn for it.
    """
    vocab, dim = weight.shape
    if kind == "iid":
        return _normal((rows, dim), noise)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=noise, device=noise.device)

    first = min(50.0, vocab / 20)  # Zipf's law with an offset, or one id would be in every second row
    ids = (first * (uniform(rows, MAX_COMPONENTS) * math.log(1 + vocab / first)).exp() - first).long()
    ids.clamp_(0, vocab - 1)
    again = (ids[:, :, None] == ids[:, None, :]).tril(-1).any(dim=2)
    goal = MEDIAN_ENTROPY * (ENTROPY_SPREAD * _normal((rows,), noise)).exp()
    count = (goal.exp() * (2 + 4 * uniform(rows))).round().clamp_(2, MAX_COMPONENTS)  # ln(count) bounds the entropy
    peak = PEAK[0] + (PEAK[1] - PEAK[0]) * uniform(rows)
    gaps = 0.3 + 0.7 * uniform(rows, MAX_COMPONENTS)
    gaps[:, 0] = 0.0
    # Without the shared mean, or many components would lift all logits of the row to where bfloat16 steps by 1.
    mean = weight[:8192].float().mean(dim=0)
    top = BACKGROUND_STD / (WEIGHT_STD * dim ** 0.5) * _normal((rows, dim), noise)
    top += MEAN_STD * _normal((rows, 1), noise) * mean / mean.square().sum()
    lower = torch.zeros_like(top)
    for component in range(MAX_COMPONENTS):
        row = weight[ids[:, component]].float() - mean
        row *= ((component < count) & ~again[:, component])[:, None] / row.square().sum(dim=1, keepdim=True)
        top += peak[:, None] * row
        lower += gaps[:, component, None] * row
    scale, gap = _fit(_logits(top, weight), _logits(lower, weight), goal, peak)
    hidden = scale[:, None] * (top - gap[:, None] * lower)
    return hidden / 2 if kind == "flat" else hidden


def _logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(rows, V) float32."""
    if weight.is_cuda and weight.dtype != torch.float32:
        return torch.mm(hidden.to(weight.dtype), weight.T, out_dtype=torch.float32)
    out = hidden.new_empty((hidden.shape[0], weight.shape[0]), dtype=torch.float32)
    step = max(1, TILE_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        cols = slice(start, start + step)
        torch.mm(hidden.float(), weight[cols].float().T, out=out[:, cols])
    return out


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    logp = logits.log_softmax(dim=1)
    return -(logp.exp() * logp).sum(dim=1)


def _fit(top: torch.Tensor, lower: torch.Tensor, goal: torch.Tensor, peak: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(scale, gap), (rows,) each, for which softmax(scale * (top - gap * lower)) has the entropy `goal`.

    One number is bisected: from -1 to 0 the scale grows from 0.1 to 1 without gaps, from 0 to 1 the gaps grow to
    `peak`. Both sharpen the row.
    """
    low, high = torch.full_like(goal, -1.0), torch.ones_like(goal)
    for _ in range(13):
        middle = (low + high) / 2
        scale, gap = (1 + 0.9 * middle).clamp(max=1), middle.clamp(min=0) * peak
        flat = _entropy(scale[:, None] * (top - gap[:, None] * lower)) > goal
        low, high = torch.where(flat, middle, low), torch.where(flat, high, middle)
    return scale, gap


def _sample(hidden: torch.Tensor, weight: torch.Tensor, noise: torch.Generator) -> tuple[torch.Tensor, ...]:
    """(targets drawn from the model itself, their log-probs, entropy), (rows,) each, of hidden in its final dtype."""
    logp = _logits(hidden, weight).log_softmax(dim=1)
    entropy = -(logp.exp() * logp).sum(dim=1)
    race = torch.empty_like(logp).exponential_(generator=noise)  # argmax of p / Exp(1) is a draw from p
    targets = (logp.exp() / race).argmax(dim=1)
    return targets, logp.gather(1, targets[:, None])[:, 0], entropy
