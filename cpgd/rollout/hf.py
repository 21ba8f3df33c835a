"""Rollout by transformers' `generate`, from an unsharded copy of the policy: no collective while sampling.

A batch is left-padded. The vision tower and the prompt run once per distinct prompt, and the KV cache is then copied to
the K requests that share it, into memory for the longest response that never grows. M-RoPE positions are passed
explicitly, so `generate` neither reads nor writes the model's `rope_deltas` (stale after another batch) and needs no
mm_token_type_ids. A response is drawn by inverse CDF,

    token_t = min{v : sum_{j<=v} p_t(j) > u_t},     u_t = t-th number of Philox(request.seed),

so a request meets the same noise in any batch; its logits may still differ in the last bits between batches.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    Qwen2_5_VLForConditionalGeneration,
)

from cosmo_rl.data.collate import EncodedPrompt
from cosmo_rl.data.errors import UserError
from cosmo_rl.data.schema import Row
from cosmo_rl.model.cache import roomy
from cosmo_rl.model.load import Processor
from cosmo_rl.model.weights import load_into

from ..config import RolloutConfig
from .engine import Replica, alone, cache_fits, form_batches
from .values import Request, Response


class HFEngine:
    """Samples with `generate`; see `cosmo_rl.cpgd.rollout.engine.Engine`."""

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, processor: Processor, rollout: RolloutConfig) -> None:
        """
        Args:
            model: the engine's own copy, unsharded; its weights are overwritten by `sync`.
            processor: tokenizer, pad_id, eos_ids and suppressed_ids are read. A suppressed token is never sampled:
                probability 0, outside the normaliser of the log-probs.
            rollout: temperature, max_new_tokens, batch_size and cache_gib are read.
        """
        suppressed = set(processor.suppressed_ids.tolist())
        vision = {model.config.image_token_id, model.config.video_token_id}
        assert vision <= suppressed, "a sampled vision placeholder breaks the next forward"
        assert processor.eos_ids and not suppressed & set(processor.eos_ids), "no response could end"
        self.model = model.eval().requires_grad_(False)
        # generate() fills unset options from the folder's generation_config: repetition_penalty 1.05 in Qwen2.5-VL's.
        self.model.generation_config = GenerationConfig(
            do_sample=False, use_cache=True, max_new_tokens=rollout.max_new_tokens, pad_token_id=processor.pad_id,
            eos_token_id=list(processor.eos_ids),
        )
        self.rollout, self.tokenizer = rollout, processor.tokenizer
        self.fits = cache_fits(rollout, model.config, model.dtype)
        self.pad_id = processor.pad_id
        self.eos_ids = np.array(processor.eos_ids)
        self.suppressed = torch.from_numpy(processor.suppressed_ids).to(model.device)
        self.version = 0

    @property
    def replica(self) -> Replica:
        return alone()

    def sync(self, weights: Callable[[], Iterable[tuple[str, torch.Tensor]]], version: int) -> None:
        """Copy the policy's full tensors in; nothing computed from the old ones is kept between calls."""
        load_into(self.model, weights())
        self.version = version

    def check(self, samples: Iterable[tuple[Row, EncodedPrompt]]) -> None:
        """It is given the trainer's own ids, positions and pixels."""

    def rest(self) -> bool:
        """Its model stays: no cache outlives a call."""
        return False

    def recover(self) -> None:
        """It dies with the trainer only."""

    def stream(self, requests: Sequence[Request], *, greedy: bool = False,
               batch_size: int | None = None) -> Iterator[list[Response]]:
        """One response per request, a batch at a time; see `Engine.stream`.

        Raises:
            UserError: the weights give NaN or infinite logits; names the first prompt.
        """
        lengths = [len(r.prompt.input_ids) for r in requests]
        for batch in form_batches(lengths, batch_size or self.rollout.batch_size, self.fits):
            yield self._generate_batch([requests[i] for i in batch], greedy)
        torch.cuda.empty_cache()  # the KV caches' many sizes would stay reserved: nothing left for NCCL's buffers

    def close(self) -> None:
        """Nothing is held beyond the model."""

    @torch.no_grad()
    def _generate_batch(self, requests: list[Request], greedy: bool) -> list[Response]:
        prompts = list({id(r.prompt): r.prompt for r in requests}.values())
        row = {id(prompt): i for i, prompt in enumerate(prompts)}
        rows = torch.tensor([row[id(r.prompt)] for r in requests], device=self.model.device)
        ids, mask, positions = _left_pad(prompts, self.pad_id, self.model.device)
        cache = roomy(self._prefill(prompts, ids, mask, positions), rows, self.rollout.max_new_tokens)
        sampler = _Sampler(
            None if greedy else _uniforms(requests, self.rollout.max_new_tokens).to(self.model.device),
            self.rollout.temperature, self.suppressed,
        )
        output = self.model.generate(  # pyright: ignore[reportAttributeAccessIssue] (transformers' own typing)
            input_ids=ids[rows], attention_mask=mask[rows], position_ids=positions[:, rows], past_key_values=cache,
            logits_processor=LogitsProcessorList([sampler]),
        )
        tokens = output[:, ids.shape[1]:].cpu().numpy()
        logprobs = torch.stack(sampler.logprobs, dim=1).cpu().numpy()
        ends = [self._end(r, t, p) for r, t, p in zip(requests, tokens, logprobs, strict=True)]
        texts = self.tokenizer.batch_decode([t[:e].tolist() for t, e in zip(tokens, ends, strict=True)],
                                            skip_special_tokens=True)
        return [
            Response(request=r, ids=t[:e].astype(np.int64), logprobs=p[:e].astype(np.float32), text=text,
                     finish_reason="stop" if t[e - 1] in self.eos_ids else "length", version=self.version)
            for r, t, p, e, text in zip(requests, tokens, logprobs, ends, texts, strict=True)
        ]

    def _prefill(self, prompts: list[EncodedPrompt], ids: torch.Tensor, mask: torch.Tensor,
                 positions: torch.Tensor) -> Cache:
        """KV cache of every prompt but its last token, which `generate` needs to run itself."""
        pixels = [torch.from_numpy(p.pixel_values) for p in prompts if p.pixel_values is not None]
        grids = [torch.from_numpy(p.image_grid_thw) for p in prompts if p.image_grid_thw is not None]
        output = self.model.model(
            input_ids=ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[..., :-1], use_cache=True,
            past_key_values=DynamicCache(),  # of a sliding window too all is kept; its mask hides what is past it
            pixel_values=torch.cat(pixels).to(self.model.device) if pixels else None,
            image_grid_thw=torch.cat(grids).to(self.model.device) if grids else None,
        )
        return output.past_key_values

    def _end(self, request: Request, tokens: np.ndarray, logprobs: np.ndarray) -> int:
        """Tokens of a response: up to its first eos, or all."""
        ends = np.flatnonzero(np.isin(tokens, self.eos_ids))
        length = int(ends[0]) + 1 if len(ends) else len(tokens)
        if not np.isfinite(logprobs[:length]).all():
            raise UserError(
                f"prompt {request.prompt.id}: weights of version {self.version} give NaN or infinite logits; start "
                "again in another --run-dir with a lower --optim.learning-rate, from weights before the run diverged"
            )
        return length


class _Sampler(LogitsProcessor):
    """Picks each row's next token itself, then leaves it as the only one for generate's argmax; keeps its log-prob."""

    def __init__(self, uniforms: torch.Tensor | None, temperature: float, suppressed: torch.Tensor) -> None:
        self.uniforms = uniforms  # (B, max_new_tokens) float64 in [0, 1); None: greedy
        self.temperature = temperature
        self.suppressed = suppressed
        self.logprobs: list[torch.Tensor] = []  # one (B,) float32 per step

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.div(self.temperature).index_fill_(1, self.suppressed, -torch.inf)
        logprobs = scores.log_softmax(-1)  # (B, V) float32
        if self.uniforms is None:
            token = logprobs.argmax(-1, keepdim=True)
        else:
            cdf = logprobs.exp().cumsum(-1, dtype=torch.float64)
            threshold = self.uniforms[:, len(self.logprobs), None] * cdf[:, -1:]
            # A suppressed token does not raise the cdf, so it is never the first above; the clamp is for NaN alone.
            token = torch.searchsorted(cdf, threshold, right=True).clamp_(max=scores.shape[1] - 1)
        self.logprobs.append(logprobs.gather(1, token).squeeze(1))
        return scores.fill_(-torch.inf).scatter_(1, token, 0.0)


def _uniforms(requests: list[Request], count: int) -> torch.Tensor:
    """(B, count) float64 in [0, 1), each row a function of its request's seed alone."""
    rows = [np.random.Generator(np.random.Philox(key=r.seed)).random(count) for r in requests]
    # u = 1 - 2**-53 times a total could round up to the total, beyond every token.
    return torch.from_numpy(np.minimum(np.stack(rows), 1 - 2.0**-52))


def _left_pad(prompts: list[EncodedPrompt], pad_id: int,
              device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids (B, P), attention mask (B, P) and M-RoPE positions (3, B, P), all int64; padding on the left."""
    longest = max(len(p.input_ids) for p in prompts)
    ids = np.full((len(prompts), longest), pad_id, dtype=np.int64)
    mask = np.zeros((len(prompts), longest), dtype=np.int64)
    positions = np.zeros((3, len(prompts), longest), dtype=np.int64)
    for i, prompt in enumerate(prompts):
        start = longest - len(prompt.input_ids)
        # generate() counts on from the last column, right only after a text token.
        assert len(prompt.input_ids) > 1 and prompt.mm_token_type_ids[-1] == 0, "a prompt ends in text"
        ids[i, start:] = prompt.input_ids
        mask[i, start:] = 1
        positions[:, i, start:] = prompt.position_ids
    ids, mask, positions = (torch.from_numpy(array).to(device) for array in (ids, mask, positions))
    return ids, mask, positions
