"""The policy: micro-batch -> vision tower -> language model -> head, as one module that is only ever called.

Two things keep several ranks in step under FSDP: every forward runs the tower (on a dummy image with weight 0 when the
batch has none), and everything that touches a parameter happens inside `forward`. Positions are always passed, with the
text positions in front: transformers reads packed documents off them, but only while `use_cache` is False.

Suppressed tokens get a bias of -1e30, so that they take no probability in training, as in sampling. (Not -inf: the
entropy of an impossible token would be 0 * inf.)
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.modeling_layers import GradientCheckpointingLayer

from cosmo_rl.data.collate import MicroBatch
from cosmo_rl.kernels.linear_cpgd import CPGDOutput, linear_cpgd
from cosmo_rl.kernels.linear_kl import linear_kl
from cosmo_rl.kernels.linear_logprob import TokenStats, linear_logprob

SUPPRESSED_BIAS = -1e30


@dataclass(slots=True, kw_only=True, eq=False)
class Update:
    """A micro-batch and what its loss takes, by the kernels' names; per-token tensors are (N,), on the policy's device.

    The batch stays on the host until the policy runs it: the pixels of a whole rollout would fill a GPU.
    """

    batch: MicroBatch
    members: list[int]
    """Index of each of its sequences in the optimizer step."""
    token_weights: torch.Tensor
    """float32, the global normaliser included."""
    advantages: torch.Tensor
    """float32."""
    clip_eps_low: float | torch.Tensor = 0.2
    """Float or float32."""
    clip_eps_high: float | torch.Tensor = 0.2
    """Float or float32."""
    drift_coef: float = 0.01
    drift_clip: float = 2.0
    old_logprobs: torch.Tensor | None = None
    """float32, nats, set by `fill_old_logprobs`; None: the policy is still the one that sampled, the ratio is 1."""
    old_hidden: torch.Tensor | None = None
    """(N, D) states of the old policy at the targets, set by `fill_old_logprobs`: the drift is then over the whole
    vocabulary, in place of the sampled one."""
    old_weight: torch.Tensor | None = None
    """(V, D), head of the old policy, set with `old_hidden`."""


class LMHead(nn.Module):
    """The kernels with temperature and suppressed tokens filled in; it owns no weight, so tied weights stay tied."""

    bias: torch.Tensor

    def __init__(self, vocab_size: int, suppressed_ids: np.ndarray, temperature: float) -> None:
        """
        Args:
            vocab_size: rows of the head's weight, V.
            suppressed_ids: (n,) int64, tokens of probability 0.
            temperature: > 0, of log-probs and entropies alike.
        """
        super().__init__()
        bias = torch.zeros(vocab_size)
        bias[torch.from_numpy(suppressed_ids)] = SUPPRESSED_BIAS
        self.register_buffer("bias", bias, persistent=False)
        self.temperature = temperature

    def forward(self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
                cpgd: Update | None = None) -> TokenStats | CPGDOutput:
        """Log-probs of `targets`, or with `cpgd` its objective.

        Args:
            hidden: (N, D), states that predict `targets`; N may be 0.
            weight: (V, D), same dtype and device.
            targets: (N,) int64, none of them suppressed.
            cpgd: with `old_hidden`, drift_coef * sum_i token_weights_i * KL_i replaces the sampled drift in the loss,
                and KL the output's `drift`.
        """
        options = {"temperature": self.temperature, "bias": self.bias}
        if cpgd is None:
            return linear_logprob(hidden, weight, targets, **options)
        exact = cpgd.old_hidden is not None
        output = linear_cpgd(
            hidden, weight, targets, cpgd.old_logprobs, cpgd.advantages, cpgd.token_weights,
            clip_eps_low=cpgd.clip_eps_low, clip_eps_high=cpgd.clip_eps_high,
            drift_coef=0.0 if exact else cpgd.drift_coef, drift_clip=cpgd.drift_clip, **options)
        if cpgd.old_hidden is None or cpgd.old_weight is None:
            return output
        kl = linear_kl(cpgd.old_hidden, cpgd.old_weight, hidden, weight, **options)
        drift = cpgd.drift_coef * (cpgd.token_weights * kl).sum()
        return output._replace(loss=output.loss + drift, drift=kl.detach())


class Policy(nn.Module):
    """A Qwen2.5-VL that answers a `MicroBatch` with log-probs or with the CPGD objective."""

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, *, suppressed_ids: np.ndarray,
                 temperature: float = 1.0, gradient_checkpointing: bool = True) -> None:
        """
        Args:
            model: taken over, not copied.
            suppressed_ids: (n,) int64, tokens of probability 0; see `Processor.suppressed_ids`.
            temperature: of sampling, log-probs and entropies.
            gradient_checkpointing: recompute decoder layers and vision blocks in the backward pass.
        """
        super().__init__()
        self.model = model.train()  # in eval mode, as load_model returns it, no layer is ever recomputed
        self.head = LMHead(model.lm_head.weight.shape[0], suppressed_ids, temperature)
        # Nothing in a layer draws random numbers (load_model refuses dropout), so their state need not be kept.
        recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        layers: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        for layer in layers:
            layer.gradient_checkpointing = gradient_checkpointing
            layer._gradient_checkpointing_func = recompute

    def forward(self, batch: MicroBatch, *, cpgd: Update | None = None, return_hidden: bool = False,
                ) -> TokenStats | CPGDOutput | tuple[TokenStats | CPGDOutput, torch.Tensor]:
        """Log-probs and entropies of the batch's targets, or the CPGD objective on them.

        Args:
            batch: on any device, moved to that of the weights; may have no target.
            cpgd: the update that `batch` is of; without, the result is a TokenStats.
            return_hidden: return also the (N, D) hidden states that predict the targets.
        """
        body, batch = self.model.model, batch.to(self.head.bias.device)
        image_tokens = body.visual(batch.pixel_values, grid_thw=batch.image_grid_thw).pooler_output
        embeds = body.language_model.embed_tokens(batch.input_ids)
        if batch.num_dummy_images:
            embeds = embeds + 0.0 * image_tokens.sum()
        else:
            image_tokens = image_tokens.index_select(0, batch.image_rows).to(embeds.dtype)
            embeds = embeds.flatten(0, 1).index_copy(0, batch.image_slots, image_tokens).view_as(embeds)
        states = body.language_model(
            inputs_embeds=embeds, position_ids=batch.position_ids, use_cache=False).last_hidden_state
        hidden = states.flatten(0, 1).index_select(0, batch.target_positions)
        output = self.head(hidden, self.model.lm_head.weight, batch.targets, cpgd)
        return (output, hidden) if return_hidden else output
