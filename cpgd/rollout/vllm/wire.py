"""A request for vLLM's POST /inference/v1/generate, and its reply as a `Response`: both checked, no network here.

What is trained on is what is sent: token ids, not text, and pictures made back from the very pixel values that the
trainer's tower sees (already resized: vLLM's own resizing is off). Every picture's uuid and the cache salt carry the
weight version, so that features or prefixes of older weights are out of reach instead of reset. vLLM expands the
placeholders itself and returns the prompt's ids, which must be ours again.

Never `min_tokens`: it masks the end token before the softmax, and log-probs then differ by nats.
"""

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from cosmo_rl.data.collate import EncodedPrompt
from cosmo_rl.data.errors import UserError
from cosmo_rl.model.load import Processor

from ...config import RolloutConfig
from ..values import Request, Response

SUPPRESS = -100.0
"""Logit bias, vLLM's lowest: with it a token has e^-100 of its probability; one that comes all the same is an error."""


class ReplyError(UserError):
    """A reply that cannot be trained on: the run stops."""


def pictures(prompt: EncodedPrompt, processor: Processor) -> list[Image.Image]:
    """Each picture of a prompt as the image processor left it before it cut patches: RGB, at its resized size."""
    if prompt.pixel_values is None or prompt.image_grid_thw is None:
        return []
    made: Any = processor.image_processor
    merge, patch, frames = made.merge_size, made.patch_size, made.temporal_patch_size
    values, found, start = unnormalised(prompt.pixel_values, processor), [], 0
    for _, height, width in prompt.image_grid_thw.tolist():
        count = height * width
        blocks = values[start:start + count].reshape(
            height // merge, width // merge, merge, merge, 3, frames, patch, patch)[..., 0, :, :]
        found.append(Image.fromarray(np.ascontiguousarray(
            blocks.transpose(0, 2, 5, 1, 3, 6, 4).reshape(height * patch, width * patch, 3))))
        start += count
    return found


def unnormalised(patches: np.ndarray, processor: Processor) -> np.ndarray:
    """The bytes, (n, patch_dim) uint8, of which the image processor made these (n, patch_dim) float32."""
    made: Any = processor.image_processor
    mean, std = (np.array(values)[None, :, None] for values in (made.image_mean, made.image_std))
    channels = patches.reshape(len(patches), 3, -1)
    return np.rint((channels * std + mean) / made.rescale_factor).clip(0, 255).astype(np.uint8).reshape(patches.shape)


def collapsed(prompt: EncodedPrompt, merge_size: int) -> list[int]:
    """The prompt's ids with one placeholder a picture, as vLLM takes them."""
    keep = prompt.mm_token_type_ids == 0
    if prompt.image_grid_thw is not None:
        starts = np.cumsum([0, *(prompt.image_grid_thw.prod(axis=1) // merge_size**2)[:-1]])
        keep[np.flatnonzero(~keep)[starts]] = True
    return prompt.input_ids[keep].tolist()


class Wire:
    """Builds the requests of a run and reads their replies."""

    def __init__(self, processor: Processor, rollout: RolloutConfig) -> None:
        self.processor, self.rollout = processor, rollout
        self.suppressed = frozenset(processor.suppressed_ids.tolist())
        self.bias = {str(token): SUPPRESS for token in sorted(self.suppressed)}

    def prompt(self, prompt: EncodedPrompt, tag: str) -> dict[str, Any]:
        """What the requests of one prompt share.

        Args:
            tag: names the weights; another after every sync.
        """
        body: dict[str, Any] = {"token_ids": collapsed(prompt, self.processor.merge_size), "return_token_ids": True,
                                "cache_salt": tag}
        parts = []
        for place, picture in enumerate(pictures(prompt, self.processor)):
            buffer = io.BytesIO()
            picture.save(buffer, "PNG", compress_level=1)
            url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
            parts.append({"type": "image_url", "url": url, "uuid": self._name(place, picture, tag)})
        return body | ({"content_parts": parts} if parts else {})

    def local_prompt(self, prompt: EncodedPrompt, tag: str) -> dict[str, Any]:
        """The same for vLLM in this process."""
        found = pictures(prompt, self.processor)
        shown = {"multi_modal_data": {"image": found},
                 "multi_modal_uuids": {"image": [self._name(*each, tag) for each in enumerate(found)]}}
        return {"prompt_token_ids": collapsed(prompt, self.processor.merge_size), "cache_salt": tag,
                **(shown if found else {})}

    @staticmethod
    def _name(place: int, picture: Image.Image, tag: str) -> str:
        """By its place too: vLLM's tower is given each of a prompt's pictures, and what it is given can be compared."""
        digest = hashlib.sha256(picture.tobytes()).hexdigest()[:32]
        return f"{place}-{digest}-{picture.width}x{picture.height}-{tag}"

    def sampling(self, request: Request, greedy: bool) -> dict[str, Any]:
        """Every setting that vLLM would otherwise take from generation_config.json or from its own defaults."""
        return {
            "temperature": 0.0 if greedy else self.rollout.temperature, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
            "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0, "n": 1,
            "max_tokens": self.rollout.max_new_tokens, "stop_token_ids": list(self.processor.eos_ids),
            "ignore_eos": False, "logprobs": 0, "logit_bias": self.bias, "seed": request.seed, "detokenize": False,
        }

    def read(self, request: Request, reply: Mapping[str, Any], tag: str, version: int) -> Response:
        """The response in a reply.

        Raises:
            ReplyError: it is of other weights or another prompt, or something in it does not fit; names request, value
                and likely cause.
        """
        def refuse(what: str) -> ReplyError:
            return ReplyError(f"request {request.id}: the vLLM server's reply {what}")

        try:
            choice = reply["choices"][0]
            ids, content = choice["token_ids"], (choice["logprobs"] or {}).get("content") or []
            spans = [span["version"] for span in choice["weight_versions"] or []]
            prompt_ids, reason = reply["prompt_token_ids"], choice["finish_reason"]
            named = [entry["token_id"] for entry in content]
            logprobs = np.array([entry["logprob"] for entry in content], dtype=np.float32)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise refuse(f"has no {error}; the server must be vLLM 0.32 or newer") from error
        self._check_prompt(request, prompt_ids or [], refuse)
        if set(spans) != {tag}:
            raise refuse(f"was sampled by weights {', '.join(map(repr, spans)) or 'of no version'}, and {tag!r} "
                         f"(step {version}) was asked for: another program has written to the server, or it was "
                         "restarted; give each run servers of its own")
        if not ids or len(content) != len(ids):
            raise refuse(f"has {len(ids or [])} tokens and {len(content)} log-probs")
        if named != ids:
            raise refuse("has log-probs of other tokens than its own")
        if banned := self.suppressed & set(ids):
            token = self.processor.tokenizer.convert_ids_to_tokens(min(banned))
            raise refuse(f"holds {token}, which may never be sampled")
        fits = np.isfinite(logprobs) & (logprobs > -9000) & (logprobs <= 1e-4)
        if not fits.all():
            raise refuse(f"has the log-prob {logprobs[~fits][0]:g}: its weights give NaN or infinite logits")
        eos = self.processor.eos_ids
        if reason not in ("stop", "length") or (reason == "stop") != (ids[-1] in eos) or set(ids[:-1]) & set(eos):
            raise refuse(f"ends by {reason!r} ({choice.get('stop_reason')!r}) with token {ids[-1]}, and {eos} end one")
        if reason == "length" and len(ids) != self.rollout.max_new_tokens:
            raise refuse(f"was cut after {len(ids)} tokens, and --rollout.max-new-tokens is "
                         f"{self.rollout.max_new_tokens}; start the server with a larger --max-model-len")
        return Response(request=request, ids=np.array(ids, dtype=np.int64), logprobs=logprobs, finish_reason=reason,
                        text=str(self.processor.tokenizer.decode(ids, skip_special_tokens=True)), version=version)

    def _check_prompt(self, request: Request, ids: Sequence[int], refuse: Any) -> None:
        prompt = request.prompt
        if list(ids) == prompt.input_ids.tolist():
            return
        image = self.processor.image_token_id
        theirs, ours = list(ids).count(image), int((prompt.mm_token_type_ids == 1).sum())
        if theirs != ours:
            sizes = ", ".join(f"{w}x{h}" for w, h in (p.size for p in pictures(prompt, self.processor)))
            raise refuse(f"has {theirs} image tokens where the trainer has {ours} (pictures of {sizes} pixels): the "
                         "server resizes pictures by other limits; start it with --mm-processor-kwargs "
                         f"'{mm_limits(self.processor)}'")
        raise refuse(f"is to another prompt ({len(ids)} tokens, {len(prompt.input_ids)} were sent): the server serves "
                     "another model or tokenizer")


def mm_limits(processor: Processor) -> str:
    """Value of --mm-processor-kwargs with which vLLM leaves pictures as they come: a second time the trainer's limits
    may give another size, where they are near each other. (vLLM takes its room from them all the same.)"""
    size: Any = processor.image_processor.size
    return f'{{"min_pixels": {size.shortest_edge}, "max_pixels": {size.longest_edge}, "do_resize": false}}'

