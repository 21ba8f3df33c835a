"""What a stage takes of one GPU's memory, estimated from config.json before any weight is loaded.

W ranks, b bytes of --model.dtype; of the model D hidden, I intermediate, Q and K query and key channels (heads times
head size), L layers, V vocabulary; of the tower the same letters with a v. In bytes:

    masters, gradients, Adam      (4 + 4 + 8) / W of each trainable parameter: float32, sharded by FSDP2
    frozen tower                  b of each parameter that takes no gradient: replicated
    engine copy                   b of each parameter: the hf engine is not sharded; vLLM counts its own, elsewhere or
                                  by its --gpu-memory-utilization
    old head                      b V D with --objective.drift exact
  update
    gathered                      (2 b) root + (2 b + b + 4) largest layer: copies and gradients in b, two layers'
                                  copies (one is prefetched), and one layer's gradient in float32 to be reduced
    text activations              per token and layer  A = b (4 D + 4 Q + 2 K + 4 I) + 8 D  that autograd keeps (two
                                  norms keep float32 inputs), of all layers, or with gradient checkpointing of one,
                                  and b D of each; (b + 4) D of the last norm
    tower activations             the same per patch, with 6 b Dv of the merger and b times the channels of a patch
                                  in place of the norm; of a frozen tower one block's and the merger's
    attention mask                (1 + b) T^2 of a packed row of T tokens with sdpa: bool, and as numbers for its kernel
    head                          4 V D float32 gradient of the head, b N D for the N response tokens, and the chunks of
                                  kernels/gemm.py: 4 inner V + b outer V + 4 outer D
  rollout, and evaluation, each for its largest generate call
    KV cache                      2 b L K for each token of that call, all at the longest
    expanded KV                   2 b Q for each of these tokens with sdpa, in one layer: padding needs a mask, and
                                  with one, keys and values are copied for every query head
    prefill                       b (2 D + 3 I) for each prompt token of that call, each prompt once
    pixels                        4 times the channels of a patch, and b (2 Dv + 3 Iv), for each patch of its images
    sampler                       24 V for each request: logits, log-probs and cumulated probabilities
The peak is what always lies there and the largest phase. Left out: the caching allocator's slack, NCCL's buffers and
the CUDA context, together often 10% and 1 to 2 GiB.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from cosmo_rl.kernels.gemm import plan_chunks
from cosmo_rl.model.cache import cache_bytes
from cosmo_rl.model.folder import empty_model

from ..config import Config


@dataclass(frozen=True, slots=True)
class Parameters:
    """How many there are, as `model.parallel.shard` deals them out."""

    trainable: int
    frozen: int
    """Those of a frozen tower, without its merger."""
    root: int
    """Of `trainable`, those gathered together for a whole forward and backward: all outside of layers and blocks."""
    layer: int
    """Of the largest layer or block that is gathered alone."""


class Load(NamedTuple):
    """A micro-batch in numbers."""

    tokens: int
    """Padding included."""
    targets: int
    """Response tokens."""
    patches: int
    """Of its images, each once."""
    sequences: int


NOTHING = Load(0, 0, 0, 0)


class Calls(NamedTuple):
    """The largest generate call of a phase."""

    requests: int
    prompts: int
    """Different ones among the requests."""
    prompt_tokens: int
    """Of the longest prompt."""
    patches: int = 0
    """Of the images of all prompts."""


class Term(NamedTuple):
    """One line of the estimate."""

    phase: str
    """always, update, rollout or evaluation."""
    name: str
    how: str
    num_bytes: int


def count_parameters(model_config: Any, freeze_vision: bool) -> Parameters:
    """Of a Qwen2_5_VLConfig: exact, from the shapes of an empty model."""
    model: Any = empty_model(model_config)
    total = _size(model)
    visual, text = model.model.visual, model.model.language_model
    frozen = _size(visual) - _size(visual.merger) if freeze_vision else 0
    blocks = [_size(block) for block in [*text.layers, *([] if freeze_vision else visual.blocks)]]
    return Parameters(total - frozen, frozen, total - frozen - sum(blocks), max(blocks))


def footprint(model_config: Any, parameters: Parameters, config: Config, load: Load,
              calls: Mapping[str, Calls], world_size: int) -> list[Term]:
    """The terms of the module's formula, for the fullest micro-batch and the largest generate calls.

    Args:
        model_config: a Qwen2_5_VLConfig.
        load: of the fullest micro-batch.
        calls: of "rollout" and "evaluation", where there is one.
    """
    text, vision = model_config.text_config, model_config.vision_config
    dtype = getattr(torch, config.model.dtype)
    b = dtype.itemsize
    hidden, vocab, layers = text.hidden_size, text.vocab_size, text.num_hidden_layers
    keys = hidden // text.num_attention_heads * text.num_key_value_heads
    every = parameters.trainable + parameters.frozen
    sampled_here = config.rollout.engine == "hf"
    layer = kept_by_layer(b, hidden, hidden, keys, text.intermediate_size)
    block = kept_by_layer(b, vision.hidden_size, vision.hidden_size, vision.hidden_size, vision.intermediate_size)
    checkpointing, sdpa = config.model.gradient_checkpointing, config.model.attention == "sdpa"
    layers_kept = (layers * b * hidden + layer if checkpointing else layers * layer) + (b + 4) * hidden
    channels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    blocks_kept = 6 * b * vision.hidden_size + (
        block if config.model.freeze_vision else
        b * channels + (vision.depth * b * vision.hidden_size + block if checkpointing else vision.depth * block))
    outer, inner = plan_chunks(max(load.targets, 1), vocab, b)
    terms = [
        Term("always", "masters, gradients, Adam", f"16 x {parameters.trainable:,} / {world_size}",
             16 * parameters.trainable // world_size),
        Term("always", "frozen tower", f"{b} x {parameters.frozen:,}", b * parameters.frozen),
        Term("always", "engine copy", f"{b} x {every:,}", b * every * sampled_here),
        Term("always", "old head", f"{b} x {vocab:,} x {hidden:,}",
             b * vocab * hidden if config.stage and config.objective.drift == "exact" else 0),
        Term("update", "gathered", f"{2 * b} x {parameters.root:,} + {3 * b + 4} x {parameters.layer:,}",
             2 * b * parameters.root + (3 * b + 4) * parameters.layer),
        Term("update", "text activations", f"{load.tokens:,} tokens x {layers_kept:,}", load.tokens * layers_kept),
        Term("update", "tower activations", f"{load.patches:,} patches x {blocks_kept:,}", load.patches * blocks_kept),
        Term("update", "attention mask", f"{1 + b} x {load.tokens:,}^2",
             (1 + b) * load.tokens**2 if sdpa and config.batch.layout == "packed" else 0),
        Term("update", "head", f"{vocab:,} x {hidden:,}, {load.targets:,} response tokens by {outer:,}",
             4 * vocab * hidden + b * load.targets * hidden
             + 4 * inner * vocab + b * outer * vocab + 4 * outer * hidden),
    ]
    prefill = b * (2 * hidden + 3 * text.intermediate_size)
    pixels = 4 * channels + b * (2 * vision.hidden_size + 3 * vision.intermediate_size)
    cached = cache_bytes(model_config, dtype)
    for phase, call in calls.items() if sampled_here else ():
        length = call.prompt_tokens + config.rollout.max_new_tokens
        terms += [
            Term(phase, "KV cache", f"{call.requests:,} x {length:,} tokens x {cached:,}",
                 call.requests * length * cached),
            Term(phase, "expanded KV", f"{call.requests:,} x {length:,} tokens x {2 * b * hidden:,}",
                 call.requests * length * 2 * b * hidden if sdpa and keys < hidden else 0),
            Term(phase, "prefill", f"{call.prompts:,} x {call.prompt_tokens:,} tokens x {prefill:,}",
                 call.prompts * call.prompt_tokens * prefill),
            Term(phase, "pixels", f"{call.patches:,} patches x {pixels:,}", call.patches * pixels),
            Term(phase, "sampler", f"{call.requests:,} x {24 * vocab:,}", call.requests * 24 * vocab),
        ]
    return [term for term in terms if term.num_bytes]


def by_phase(terms: Sequence[Term]) -> dict[str, int]:
    """Bytes of each phase with what always lies there; `always` is that alone."""
    total = {phase: sum(term.num_bytes for term in terms if term.phase == phase)
             for phase in dict.fromkeys(["always", *(term.phase for term in terms)])}
    return {phase: num_bytes + (total["always"] if phase != "always" else 0) for phase, num_bytes in total.items()}


def peak(terms: Sequence[Term]) -> int:
    """Bytes: what always lies there, and the largest phase."""
    return max(by_phase(terms).values())


def kept_by_layer(b: int, hidden: int, queries: int, keys: int, intermediate: int) -> int:
    """Bytes that autograd keeps of one token in one layer."""
    return b * (4 * hidden + 4 * queries + 2 * keys + 4 * intermediate) + 8 * hidden


def _size(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
