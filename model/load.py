"""A Qwen2.5-VL folder on disk to a model and its processor: local files, safetensors only, never remote code.

The processor is composed here from the tokenizer and transformers' PIL image processor: AutoProcessor for Qwen2.5-VL
demands torchvision, whose wheel does not load beside a CPU build of torch.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from PIL import Image
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import import_utils

from cosmo_rl.data.errors import MissingPackage, UserError

from .folder import BROKEN, check_folder, load_config, read_object, reading, side_files, told
from .liger import use_liger
from .template import check_template, choose_template, read_jinja


@dataclass(frozen=True)
class Processor:
    """Tokenizer and image processor of one model, and what follows from them."""

    tokenizer: PreTrainedTokenizerBase
    image_processor: Qwen2VLImageProcessorPil
    config: Any
    """The model's Qwen2_5_VLConfig."""
    eos_ids: tuple[int, ...]
    """Tokens that end a response."""
    template: str = "its chat template"
    """Name of the file that the chat template is from."""
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    """All files of the model folder but its weights, as they came: an export holds the same."""

    @property
    def image_token_id(self) -> int:
        """Placeholder that stands for one image token."""
        return self.config.image_token_id

    @property
    def merge_size(self) -> int:
        """Patches merged into one token along height and along width."""
        return self.config.vision_config.spatial_merge_size

    @property
    def vocab_size(self) -> int:
        """Rows of the model's head, which may be more than the tokenizer's tokens."""
        return self.config.text_config.vocab_size

    @property
    def pad_id(self) -> int:
        """Token that fills padded rows."""
        return cast(int, self.tokenizer.pad_token_id)

    @cached_property
    def suppressed_ids(self) -> np.ndarray:
        """(n,) int64, sorted: tokens that may never be sampled, and that log-probs leave out of the vocabulary.

        All special tokens but those that end a response (a sampled image placeholder would have no image), and the rows
        of the head that have no token.
        """
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        special |= {self.config.image_token_id, self.config.video_token_id, self.config.vision_start_token_id,
                    self.config.vision_end_token_id, *range(len(self.tokenizer), self.vocab_size)}
        return np.array(sorted(special - set(self.eos_ids)), dtype=np.int64)

    def chat_text(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The chat as text, up to where the answer begins; pictures are placeholders.

        Raises:
            UserError: the template fails on it.
        """
        try:
            return cast(str, self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True))  # pyright: ignore[reportArgumentType]
        except BROKEN as error:
            raise UserError(f"{self.template} fails: {told(error)}") from error

    def dummy_image(self) -> tuple[np.ndarray, np.ndarray]:
        """Pixel values (merge_size**2, patch_dim) float32 and grid (1, 3) int64 of a grey image of one token."""
        vision, side = self.config.vision_config, self.merge_size
        patch_dim = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return np.zeros((side * side, patch_dim), dtype=np.float32), np.array([[1, side, side]], dtype=np.int64)


def load_processor(path: str | Path, resize_pixels: int | None = None, *, with_weights: bool = True) -> Processor:
    """The processor of the model folder `path`.

    Args:
        resize_pixels: images are resized to at most this many pixels; None: as the folder says.
        with_weights: the folder must hold the weights too, though they are not read here.
    Raises:
        UserError: the folder or one of its files is missing or broken, they do not fit together, or the chat template
            does not write pictures and words as they are (see `template.check_template`).
    """
    folder = check_folder(path, with_weights)
    config, jinja = load_config(folder), read_jinja(folder)
    with reading(folder, "its tokenizer is broken", "copy tokenizer.json and tokenizer_config.json again"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with reading(folder, "preprocessor_config.json cannot be used", "copy it again"):
        limit: dict[str, Any] = {} if resize_pixels is None else {"max_pixels": resize_pixels}
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True, **limit)
    eos_ids = _eos_ids(folder, tokenizer)
    _check_tokens(folder, tokenizer, config)
    template, tokenizer.chat_template = choose_template(folder, tokenizer, jinja)
    processor = Processor(tokenizer, image_processor, config, eos_ids, template, side_files(folder))
    check_template(folder, template, processor)
    _check_pictures(folder, processor)
    return processor


def _eos_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Those of tokenizer and generation_config.json, sorted."""
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
        raise UserError(f"model folder {folder}: eos token {tokenizer.eos_token}, pad token {tokenizer.pad_token}; "
                        "set both in tokenizer_config.json")
    name = "generation_config.json"
    given = read_object(folder, name).get("eos_token_id") if (folder / name).exists() else None
    eos = given if isinstance(given, list) else [] if given is None else [given]
    for one in eos:
        if type(one) is not int or not 0 <= one < len(tokenizer):
            known = tokenizer.get_vocab().get(one) if isinstance(one, str) else None
            raise UserError(f"model folder {folder}: {name} has eos_token_id {str(given)[:80]!r}; give the numbers of "
                            f"tokens, below {len(tokenizer)}" + f" ({known} for {one})" * (known is not None))
    return tuple(sorted({cast(int, tokenizer.eos_token_id), *eos}))


def _check_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
    """Tokenizer and config.json are of one model."""
    if len(tokenizer) > config.text_config.vocab_size:
        raise UserError(f"model folder {folder}: tokenizer.json has {len(tokenizer)} tokens, and config.json a "
                        f"vocab_size of {config.text_config.vocab_size}; copy both again, from one model")
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        token = getattr(config, name)
        if not 0 <= token < len(tokenizer):
            raise UserError(f"model folder {folder}: config.json has {name} {token}, and tokenizer.json "
                            f"{len(tokenizer)} tokens; copy both again, from one model")


def _check_pictures(folder: Path, processor: Processor) -> None:
    """The image processor makes the patches that the tower takes."""
    vision, made = processor.config.vision_config, processor.image_processor
    wrong, mend = f"model folder {folder}: preprocessor_config.json", "copy it and config.json again, from one model"
    for name in ("patch_size", "temporal_patch_size", "merge_size"):
        wanted = getattr(vision, "spatial_merge_size" if name == "merge_size" else name)
        if getattr(made, name) != wanted:
            raise UserError(f"{wrong} has {name} {getattr(made, name)}, and config.json {wanted}; {mend}")
    size: Any = made.size
    if not (type(size.shortest_edge) is type(size.longest_edge) is int and size.shortest_edge > 0):
        raise UserError(f"{wrong} has {dict(size)} for the pixels of a picture; give two whole numbers above 0 as "
                        "min_pixels and max_pixels")
    if size.shortest_edge > size.longest_edge:
        raise UserError(f"{wrong} wants at least {size.shortest_edge} pixels of a picture, and at most "
                        f"{size.longest_edge} are allowed (--data.resize-pixels, else max_pixels there); raise that, "
                        "or lower min_pixels")
    with reading(folder, "preprocessor_config.json cannot be used for a picture", mend):
        picture = Image.new("RGB", (96, 64))
        features = made(images=[picture], return_tensors="np")
        patches, grid = np.asarray(features["pixel_values"]), features["image_grid_thw"][0]
        count = made.get_number_of_image_patches(picture.height, picture.width)
    wanted = int(grid.prod()), processor.dummy_image()[0].shape[1]
    if patches.shape != wanted or count != wanted[0] or not np.isfinite(patches.astype(np.float64)).all():
        raise UserError(f"{wrong} makes {patches.shape} numbers of a picture, where the model takes {wanted}, all "
                        f"finite; {mend}")


def load_model(path: str | Path, *, dtype: torch.dtype = torch.float32, attention: str = "sdpa",
               freeze_vision: bool = False, liger: bool = False) -> Qwen2_5_VLForConditionalGeneration:
    """The model in folder `path`, on the CPU, in eval mode.

    Args:
        dtype: of the weights held in memory (the trainer holds float32 masters, whatever it computes in).
        attention: "sdpa" or "flash_attention_2".
        freeze_vision: switch gradients off for the vision tower, but not for its merger.
        liger: see `cosmo_rl.model.liger.use_liger`.
    Raises:
        UserError: the folder, a file or a tensor is missing or broken, or the folder holds another kind of model.
        MissingPackage: see `check_attention`.
    """
    folder = check_folder(path, with_weights=True)
    config = load_config(folder)
    check_attention(attention)
    with reading(folder, "its weights cannot be loaded", "copy config.json and *.safetensors again"), _told_below():
        loaded: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, config=config, dtype=dtype, attn_implementation=attention, use_safetensors=True,
            local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True,
            generation_config=GenerationConfig())  # the folder's own is not for us, and may be one that cannot be saved
        model, info = loaded
    for names, problem in ((info["missing_keys"], "are missing"),
                           (info["unexpected_keys"], "have no place in the model that config.json describes"),
                           (info["mismatched_keys"], "have another shape than config.json gives them")):
        if names:
            first = str(min(names))[:200]
            raise UserError(f"model folder {folder}: {len(names)} tensors {problem}, the first is {first}; the "
                            "copy is incomplete or mixed: copy config.json and *.safetensors again")
    if config.tie_word_embeddings and model.lm_head.weight is not model.get_input_embeddings().weight:
        raise UserError(f"model folder {folder}: tie_word_embeddings is true in config.json, and lm_head.weight is not "
                        "the embedding; set it to false if the head is its own, or remove that tensor")
    if bad := next((name for name, parameter in model.named_parameters() if not parameter.isfinite().all()), None):
        raise UserError(f"model folder {folder}: tensor {bad} holds a number that is not finite; copy *.safetensors "
                        "again, or start from weights before they diverged")
    if freeze_vision:
        model.model.visual.requires_grad_(False)
        model.model.visual.merger.requires_grad_(True)
    return _with_kernels(model, liger)


def unfilled_model(config: Any, *, device: torch.device, dtype: torch.dtype, attention: str = "sdpa",
                   liger: bool = False) -> Qwen2_5_VLForConditionalGeneration:
    """A model on `device` as `load_model` makes it, but for its weights, which are NaN until they are copied in.

    Nothing is read from disk, and nothing of it is ever on another device.

    Args:
        config: a Qwen2_5_VLConfig, as that of a Processor. The others are those of `load_model`, which checks them.
    """
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(
            deepcopy(config), dtype=dtype, attn_implementation=attention, trust_remote_code=False)
    model.to_empty(device=device)
    model.tie_weights()  # each tensor has been given memory of its own
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    for module in model.modules():
        if list(module.buffers(recurse=False)):  # rotary frequencies are in no checkpoint: loading makes them so too
            model._init_weights(module)
    return _with_kernels(model.eval(), liger)


def _with_kernels(model: Any, liger: bool) -> Qwen2_5_VLForConditionalGeneration:
    """The model, some of its modules with another forward."""
    if liger:
        use_liger(model)
    patches = model.model.visual.patch_embed
    patches.forward = partial(embed_patches, patches)
    return model


@contextmanager
def _told_below() -> Iterator[None]:
    """Without transformers' table of tensors: what is in it is an error of ours, in one line."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(before)


def check_attention(attention: str) -> None:
    """Raise MissingPackage unless this machine has it: "sdpa" or "flash_attention_2"."""
    if attention == "flash_attention_2" and not import_utils.is_flash_attn_2_available():
        # Left to itself, transformers takes a kernel from the hub where the `kernels` package is installed.
        raise MissingPackage(f"--model.attention {attention} is not installed (or sees no GPU); install it with "
                             "`pip install flash-attn --no-build-isolation`, or give --model.attention sdpa")


def embed_patches(module: Any, pixels: torch.Tensor) -> torch.Tensor:
    """The tower's patch embedding, (n_patches, patch_dim) -> (n_patches, D), as the product that it is.

    CUDA tensors only: there cuDNN runs its Conv3d in tf32 or many times slower, and in some releases has no bfloat16
    gradient of it (pytorch issues 166643, 174051). Others take the Conv3d itself.
    """
    if not pixels.is_cuda:
        return type(module).forward(module, pixels)
    weight = module.proj.weight.flatten(1)
    return nn.functional.linear(pixels.view(-1, weight.shape[1]).to(weight.dtype), weight)
