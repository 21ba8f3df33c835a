"""A tiny untrained Qwen2.5-VL and a mixed batch of sequences for the model tests, without any shipped file."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cosmo_rl.data.collate import EncodedPrompt, MicroBatch, TokenSequence, collate, encode_prompt
from cosmo_rl.data.schema import Row
from cosmo_rl.model.load import Processor, load_model, load_processor
from cosmo_rl.model.policy import Policy, Update
from cosmo_rl.model.tiny import INIT_RANGE, build_tiny

TEXTS = ["what is this?", "a red circle", "sorry i can not help with that", "sure here is how", "user\n", "assistant\n"]
# Two images; none; one tall; one wide between texts.
SHAPES = (((64, 64), (40, 90)), (), ((32, 128),), ((96, 48),))


@functools.cache
def folder() -> Path:
    """A model folder whose weights are large enough for attention and images to matter in the 5th digit."""
    path = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    build_tiny(TEXTS * 20, 0, path)
    model = load_model(path)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.08 / INIT_RANGE)
    model.save_pretrained(path)
    return path


@functools.cache
def processor() -> Processor:
    return load_processor(folder())


def policy(*, freeze_vision: bool = False, **options) -> Policy:
    model = load_model(folder(), freeze_vision=freeze_vision)
    return Policy(model, suppressed_ids=processor().suppressed_ids, **options)


def row(number: int, shapes=()) -> Row:
    rng = np.random.default_rng(number)
    images = tuple(Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in shapes)
    content: list[dict[str, str]] = [{"type": "text", "text": "look " * number + "here "}]
    for _ in images:
        content += [{"type": "image"}, {"type": "text", "text": "what is this?"}]
    return Row(id=f"row-{number}", task="general", domain="general", messages=({"role": "user", "content": content},),
               images=images, source="test", licence="Apache-2.0")


@functools.cache
def prompts() -> tuple[EncodedPrompt, ...]:
    return tuple(encode_prompt(row(i, shapes), processor(), max_prompt_tokens=200, max_image_pixels=10**6)
                 for i, shapes in enumerate(SHAPES))


def sequences(group_size: int = 2) -> list[TokenSequence]:
    """`group_size` responses of 1 to 9 tokens to each of `prompts()`."""
    rng = np.random.default_rng(0)
    allowed = np.setdiff1d(np.arange(processor().vocab_size), processor().suppressed_ids)
    return [TokenSequence(prompt, rng.choice(allowed, rng.integers(1, 10)))
            for prompt in prompts() for _ in range(group_size)]


def batch(chosen: list[TokenSequence], layout: str) -> MicroBatch:
    return collate(chosen, layout=layout, pad_id=processor().pad_id, dummy_image=processor().dummy_image())


def cpgd_inputs(micro: MicroBatch, chosen: list[int], total_tokens: int) -> Update:
    """Made-up but fixed advantages and old log-probs of the sequences `chosen`, by position in `sequences()`."""
    old, advantages = [], []
    for number in chosen:
        rng = np.random.default_rng(100 + number)
        length = int((micro.sequence_ids == chosen.index(number)).sum())
        old.append(-6 + rng.standard_normal(length))
        advantages.append(np.full(length, rng.standard_normal()))
    empty = np.empty(0)
    return Update(
        batch=micro, members=chosen,
        old_logprobs=torch.from_numpy(np.concatenate([empty, *old])).float(),
        advantages=torch.from_numpy(np.concatenate([empty, *advantages])).float(),
        token_weights=torch.full((len(micro.targets),), 1 / total_tokens),
    )


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
