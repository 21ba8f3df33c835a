"""The policy: micro-batch -> vision tower -> language model -> head, as one module that is only ever called.

Two things keep several ranks in step under FSDP: every forward runs the tower (on a dummy image with weight 0 when the
batch has none), and everything that touches a parameter happens inside `forward`. Positions are always passed, with the
text positions in front: transformers reads packed documents off them, but only while `use_cache` is False.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.modeling_layers import GradientCheckpointingLayer

from cosmo_rl.data.collate import MicroBatch
from cosmo_rl.kernels.linear_cpgd import CPGDOutput
from cosmo_rl.kernels.linear_logprob import TokenStats

from .head import CPGDInputs, ExactDrift, LMHead


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

    def forward(
        self, batch: MicroBatch, *, cpgd: CPGDInputs | None = None, exact: ExactDrift | None = None,
        return_hidden: bool = False,
    ) -> TokenStats | CPGDOutput | tuple[TokenStats | CPGDOutput, torch.Tensor]:
        """Log-probs and entropies of the batch's targets, or the CPGD objective on them.

        Args:
            batch: on any device, moved to that of the weights; may have no target.
            cpgd, exact: see `LMHead.forward`; without `cpgd` the result is a TokenStats.
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
        output = self.head(hidden, self.model.lm_head.weight, batch.targets, cpgd, exact)
        return (output, hidden) if return_hidden else output
