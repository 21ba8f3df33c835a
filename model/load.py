"""A Qwen2.5-VL folder on disk to a model and its processor: local files, safetensors only, never remote code.

The processor is composed here from the tokenizer and transformers' PIL image processor: AutoProcessor for Qwen2.5-VL
demands torchvision, whose wheel does not load beside a CPU build of torch.
"""

import json
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import import_utils

from cosmo_rl.data.errors import MissingPackage, UserError

from .liger import use_liger
from .tiny import TINY_PATH as TINY_PATH

_FILES = ("config.json", "tokenizer.json", "preprocessor_config.json")


@dataclass(frozen=True)
class Processor:
    """Tokenizer and image processor of one model, and what follows from them."""

    tokenizer: PreTrainedTokenizerBase
    image_processor: Qwen2VLImageProcessorPil
    config: Any
    """The model's Qwen2_5_VLConfig."""
    eos_ids: tuple[int, ...]
    """Tokens that end a response."""

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
        UserError: the folder or one of its files is missing or broken.
    """
    folder = _check_folder(path, with_weights)
    config = _load_config(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        limit: dict[str, Any] = {} if resize_pixels is None else {"max_pixels": resize_pixels}
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True, **limit)
        generation = folder / "generation_config.json"
        eos = json.loads(generation.read_text()).get("eos_token_id") if generation.exists() else None
    except (OSError, ValueError) as error:  # a JSON error is a ValueError
        raise UserError(f"model folder {folder}: tokenizer or image processor is broken ({error}); "
                         "copy it again") from error
    if not tokenizer.chat_template:
        raise UserError(f"model folder {folder}: the tokenizer has no chat template; add chat_template.jinja")
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
        raise UserError(f"model folder {folder}: eos token {tokenizer.eos_token}, pad token {tokenizer.pad_token}; "
                         "set both in tokenizer_config.json")
    eos_ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [] if eos is None else [eos])}
    return Processor(tokenizer, image_processor, config, tuple(sorted(eos_ids)))


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
    folder = _check_folder(path, with_weights=True)
    config = _load_config(folder)
    check_attention(attention)
    dropout = config.text_config.attention_dropout
    if dropout:
        raise UserError(f"model folder {folder}: attention_dropout is {dropout}; set it to 0 in config.json "
                         "(sampling and training must agree on every probability)")
    try:
        loaded: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, config=config, dtype=dtype, attn_implementation=attention, use_safetensors=True,
            local_files_only=True, output_loading_info=True)
        model, info = loaded
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"model folder {folder}: its weights cannot be loaded ({error}); "
                         "copy *.safetensors again") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(f"model folder {folder}: {len(missing)} tensors are missing, the first is {missing[0]}; "
                         "the copy is incomplete: copy *.safetensors again")
    if freeze_vision:
        model.model.visual.requires_grad_(False)
        model.model.visual.merger.requires_grad_(True)
    if liger:
        use_liger(model)
    patches = model.model.visual.patch_embed
    patches.forward = partial(embed_patches, patches)
    return model


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


def empty_model(config: Any) -> Qwen2_5_VLForConditionalGeneration:
    """The model of a Qwen2_5_VLConfig without any weights (on the meta device): its parameters have shapes only."""
    with torch.device("meta"):
        return Qwen2_5_VLForConditionalGeneration(config)


def _check_folder(path: str | Path, with_weights: bool) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist; give a local Hugging Face folder with --model.path")
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if with_weights and not list(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise UserError(f"model folder {folder} lacks {', '.join(missing)}; copy or download the whole model again")
    return folder


def _load_config(folder: Path) -> Any:
    try:
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
        if kind != "qwen2_5_vl":
            raise UserError(f"model_type is {kind}, and only qwen2_5_vl can be trained here")
        return Qwen2_5_VLConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise UserError(f"model folder {folder}: config.json cannot be used ({error}); "
                         "give a Qwen2.5-VL folder") from error
