"""What a model folder must hold, looked at before a library reads it: each fault is one line that names the file.

Weights are *.safetensors, as model.safetensors or as the shards that model.safetensors.index.json names; nothing else
is read for weights, in the folder or outside of it.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from cosmo_rl.data.errors import UserError
from cosmo_rl.data.terminal import printable

NEEDED = ("config.json", "tokenizer.json", "preprocessor_config.json")
SIDE_FILES = (
    *NEEDED, "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "chat_template.json",
    "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "processor_config.json",
    "video_preprocessor_config.json",
)
"""All that may lie beside the weights and belongs to the model."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F64", "F32", "F16", "BF16")

BROKEN = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError, AssertionError,
          MemoryError, ImportError, StrictDataclassError, SafetensorError, TemplateError)
"""What transformers, tokenizers and Jinja raise of a file that is not what they expect; to be caught around their calls
only."""


@contextmanager
def reading(folder: Path, what: str, mend: str) -> Iterator[None]:
    """Turn what a library raises of the user's file into one line.

    Raises:
        UserError: "model folder FOLDER: WHAT (the library's words); MEND".
    """
    try:
        yield
    except UserError:
        raise
    except BROKEN as error:
        raise UserError(f"model folder {folder}: {what} ({told(error)}); {mend}") from error
    except Exception as error:
        if type(error) is not Exception:  # which is what tokenizers raises, in Rust
            raise
        raise UserError(f"model folder {folder}: {what} ({told(error)}); {mend}") from error


def told(error: BaseException) -> str:
    """The error in one line of about 300 characters, control characters escaped: the words may be the file's."""
    words = printable(" ".join(str(error).split()))
    if not words or isinstance(error, LookupError):  # a KeyError is the bare key
        words = f"{type(error).__name__} {words}".strip()
    return words if len(words) <= 300 else f"{words[:300]}..."


def read_object(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in the file; raises UserError if it is none."""
    with reading(folder, f"{name} cannot be read", "copy it again"):
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise UserError(f"model folder {folder}: {name} holds a {type(content).__name__}, not an object; copy it again")
    return content


def side_files(folder: Path) -> dict[str, bytes]:
    """Content of all that lies beside the weights, by name: an export is written when the folder may be gone."""
    with reading(folder, "a file cannot be read", "make it readable"):
        return {name: (folder / name).read_bytes() for name in SIDE_FILES if (folder / name).is_file()}


def check_folder(path: str | Path, with_weights: bool) -> Path:
    """The folder, whose files are there.

    Raises:
        UserError: one is missing, or the folder holds an adapter.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist; give a local Hugging Face folder with --model.path")
    if (folder / "adapter_config.json").exists():  # transformers would follow it to the model that it names
        raise UserError(f"model folder {folder}: adapter_config.json makes it an adapter to another model; merge them "
                        "(peft's merge_and_unload) and give the merged folder")
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if with_weights and not list(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise UserError(f"model folder {folder} lacks {', '.join(missing)}; copy or download the whole model again")
    if with_weights:
        _check_weights(folder)
    return folder


def _check_weights(folder: Path) -> None:
    """Every shard is there, and every tensor is of a float type and comes once."""
    held: dict[str, str] = {}
    for file in [WEIGHTS] if (folder / WEIGHTS).is_file() else _shards(folder):
        with reading(folder, f"{file} cannot be loaded", "copy it again"), safe_open(folder / file, "pt") as tensors:
            dtypes = {name: str(tensors.get_slice(name).get_dtype()) for name in tensors.keys()}  # noqa: SIM118
        for name, dtype in dtypes.items():
            if dtype not in DTYPES:
                raise UserError(f"model folder {folder}: tensor {name[:80]!r} in {file} is {dtype}, as of a quantised "
                                f"model; give the folder of the unquantised one ({', '.join(DTYPES)})")
            if name in held:
                raise UserError(f"model folder {folder}: tensor {name[:80]!r} is in {held[name]} and in {file}; copy "
                                f"*.safetensors and {INDEX} again")
            held[name] = file


def _shards(folder: Path) -> list[str]:
    """Names of the shards, all of them in the folder itself."""
    again = f"copy {INDEX} again"
    if not (folder / INDEX).is_file():
        found = sorted(path.name for path in folder.glob("*.safetensors"))
        raise UserError(f"model folder {folder} has {found[0]}, but neither {WEIGHTS} nor {INDEX}; copy or download "
                        "the whole model again")
    index = read_object(folder, INDEX)
    for name in ("metadata", "weight_map"):
        if not isinstance(index.get(name), dict):
            raise UserError(f"model folder {folder}: {INDEX} has no object `{name}`; {again}")
    for tensor, file in index["weight_map"].items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or set(file) & set("/\\\0"):
            raise UserError(f"model folder {folder}: {INDEX} puts {tensor[:80]!r} into {str(file)[:80]!r}; only "
                            f"*.safetensors without a path are read: {again}")
    shards = sorted(set(index["weight_map"].values()))
    with reading(folder, f"{INDEX} names a shard that cannot be found", again):
        missing = [file for file in shards if not (folder / file).is_file()]
    if missing or not shards:
        named = ", ".join(missing[:3]) + ", ..." * (len(missing) > 3) or "*.safetensors"
        raise UserError(f"model folder {folder} lacks {named} of the {len(shards)} shards in {INDEX}; copy or download "
                        "the whole model again")
    return shards


def load_config(folder: Path) -> Any:
    """The Qwen2_5_VLConfig.

    Raises:
        UserError: config.json is broken, of another kind of model, of a quantised one, or names other weights.
    """
    raw, wrong = read_object(folder, "config.json"), f"model folder {folder}: config.json"
    if raw.get("model_type") != "qwen2_5_vl":
        raise UserError(f"{wrong} cannot be used (model_type is {str(raw.get('model_type'))[:80]}, and only qwen2_5_vl "
                        "can be trained here); give a Qwen2.5-VL folder")
    for part in (raw, raw.get("text_config"), raw.get("vision_config")):
        for name in ("quantization_config", "compression_config"):
            if isinstance(part, dict) and part.get(name):
                method = part[name].get("quant_method") if isinstance(part[name], dict) else part[name]
                raise UserError(f"{wrong} has a {name} ({str(method)[:80]}), and quantised weights cannot be trained; "
                                "give the folder of the unquantised model")
    if raw.get("transformers_weights"):
        raise UserError(f"{wrong} sets transformers_weights to {str(raw['transformers_weights'])[:80]!r}; remove that "
                        f"line: weights are read from {WEIGHTS}, or the shards in {INDEX}")
    with reading(folder, "config.json cannot be used", "give a Qwen2.5-VL folder"):
        config = Qwen2_5_VLConfig.from_pretrained(folder, local_files_only=True)
        empty_model(config)
    text: Any = config.text_config
    vision: Any = config.vision_config
    mrope, pairs = text.rope_parameters.get("mrope_section"), text.hidden_size // text.num_attention_heads // 2
    token = vision.patch_size * vision.spatial_merge_size
    for right, problem in (  # what would fail in the first forward only
        (isinstance(mrope, list) and all(type(size) is int and size > 0 for size in mrope) and sum(mrope) == pairs,
         f"mrope_section is {str(mrope)[:80]}; give whole numbers with the sum {pairs}, half the size of a head"),
        (vision.hidden_size % vision.num_heads == 0,
         f"the tower has hidden_size {vision.hidden_size} and num_heads {vision.num_heads}; give a divisor of it"),
        (vision.window_size >= token, f"window_size is {vision.window_size}; give at least one token's {token} pixels"),
        (vision.out_hidden_size == text.hidden_size,
         f"the tower has out_hidden_size {vision.out_hidden_size}; give hidden_size, {text.hidden_size}"),
        (text.attention_dropout == 0, f"attention_dropout is {text.attention_dropout}; set it to 0 (sampling and "
         "training must agree on every probability)"),
    ):
        if not right:
            raise UserError(f"{wrong} cannot be used: {problem}")
    return config


def empty_model(config: Any) -> Qwen2_5_VLForConditionalGeneration:
    """The model of a Qwen2_5_VLConfig without any weights (on the meta device): its parameters have shapes only."""
    with torch.device("meta"):
        return Qwen2_5_VLForConditionalGeneration(config)
