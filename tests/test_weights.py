"""Weights out and in again: the engine's copy, and the folder on disk. Sharded policies are in test_parallel.py."""

import json
import os
import shutil
from typing import Any

import published_folder
import pytest
import tiny_case
import torch
import transformers
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
)

from cosmo_rl.data.errors import UserError
from cosmo_rl.model.load import load_model, load_processor
from cosmo_rl.model.policy import Policy
from cosmo_rl.model.weights import full_state_dict, load_into, save_pretrained


def moved_policy(seed: int = 1):
    """A policy that is not the one in the folder."""
    policy = tiny_case.policy()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return policy


def assert_equal_weights(model, policy):
    expected = dict(policy.model.named_parameters())
    got = dict(model.named_parameters())
    assert got.keys() == expected.keys()
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


def test_load_into_copies_everything_and_keeps_the_tie():
    policy, model = moved_policy(), load_model(tiny_case.folder())
    names = [name for name, _ in full_state_dict(policy)]
    assert len(names) == len(set(names)) and "lm_head.weight" not in names, "a tied tensor goes once"
    load_into(model, full_state_dict(policy))
    assert_equal_weights(model, policy)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    with torch.no_grad():
        policy.model.lm_head.weight.zero_()
    assert model.lm_head.weight.abs().max() > 0, "a copy, not the same memory"


def test_load_into_is_strict():
    model = load_model(tiny_case.folder())
    items = list(full_state_dict(tiny_case.policy()))
    for bad, message in (
        (items[1:], "no weights for"), ([*items, items[0]], "came twice"), ([("x", items[0][1])], "not in the model"),
        ([(items[0][0], items[0][1][:1])], r"into"),
    ):
        with pytest.raises(AssertionError, match=message):
            load_into(model, bad)


def test_cast_before_it_leaves():
    assert {t.dtype for _, t in full_state_dict(tiny_case.policy(), torch.bfloat16)} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_folder_is_whole(tmp_path, dtype):
    policy, folder = moved_policy(), tmp_path / "stage" / "hf"
    save_pretrained(policy, tiny_case.processor(), folder, dtype)
    assert [p.name for p in folder.parent.iterdir()] == ["hf"]
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    assert_dtype(folder, dtype)
    assert_equal_weights(model, policy.to(dtype))

    # Tokenizer and image processor as transformers itself finds them, and through ours.
    ours, prompt = load_processor(folder), "here what is this?"
    for tokenizer in (AutoTokenizer.from_pretrained(folder), ours.tokenizer):
        assert tokenizer(prompt)["input_ids"] == tiny_case.processor().tokenizer(prompt)["input_ids"]
        assert tokenizer.chat_template == tiny_case.processor().tokenizer.chat_template
    if transformers.__version__ != "5.17.0":  # which wants torchvision for it
        assert AutoImageProcessor.from_pretrained(folder).to_dict() == tiny_case.processor().image_processor.to_dict()
    assert ours.eos_ids == tiny_case.processor().eos_ids
    assert (folder / "generation_config.json").is_file()


def assert_dtype(folder, dtype):
    """config.json says of every part what the tensors are."""
    name = str(dtype).removeprefix("torch.")
    config = json.loads((folder / "config.json").read_text())
    said = [part[key] for part in (config, config.get("text_config", {}), config["vision_config"])
            for key in ("dtype", "torch_dtype") if key in part]
    assert set(said) == {name}
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {dtype}


def test_a_frozen_tower_in_another_dtype_leaves_one_dtype(tmp_path):
    """As `shard` holds it: the tower in bfloat16, its merger and the language model as float32 masters."""
    policy = tiny_case.policy(freeze_vision=True)
    for parameter in policy.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    assert {p.dtype for p in policy.parameters()} == {torch.float32, torch.bfloat16}
    for dtype in (torch.float32, torch.bfloat16):
        save_pretrained(policy, tiny_case.processor(), tmp_path / "hf", dtype)
        assert_dtype(tmp_path / "hf", dtype)
        assert Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype="auto").dtype == dtype


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_mode_of_other_files(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        save_pretrained(tiny_case.policy(), tiny_case.processor(), tmp_path / "hf")
    finally:
        os.umask(before)
    found = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "hf").iterdir()}
    assert len(found) > 5 and set(found.values()) == {mode}, found


@pytest.mark.parametrize("tied", [True, False])
def test_an_export_is_the_published_folder_with_new_weights(tmp_path, tied):
    source, folder = published_folder.write(tmp_path / "hub", tied=tied), tmp_path / "hf"
    processor = load_processor(source, 56 * 56)  # --data.resize-pixels
    policy = Policy(load_model(source), suppressed_ids=processor.suppressed_ids)
    with torch.no_grad():
        policy.model.lm_head.weight[7] += 1.0
    came = {path.name: path.read_bytes() for path in source.iterdir() if "safetensors" not in path.name}
    shutil.rmtree(source)  # a run may outlive it
    save_pretrained(policy, processor, folder)

    config = json.loads(came.pop("config.json"))
    assert json.loads((folder / "config.json").read_text()) == {**config, "torch_dtype": "float32"}
    assert {path.name for path in folder.iterdir()} == {*came, "config.json", "model.safetensors"}
    assert [name for name, content in came.items() if (folder / name).read_bytes() != content] == []
    names = load_file(folder / "model.safetensors").keys()
    assert "visual.merger.mlp.0.weight" in names and "model.layers.0.mlp.up_proj.weight" in names, "the old names"
    assert ("lm_head.weight" in names) is not tied

    theirs: Any = AutoModelForImageTextToText.from_pretrained(folder)
    assert theirs.dtype == torch.float32
    assert_equal_weights(theirs, policy)
    assert_equal_weights(load_model(folder), policy)
    assert len(AutoTokenizer.from_pretrained(folder)) == published_folder.TOKENS
    again = load_processor(folder)
    assert again.eos_ids == processor.eos_ids and again.tokenizer.chat_template == processor.tokenizer.chat_template
    assert again.image_processor.size["longest_edge"] == 12_845_056
    assert again.files == {**processor.files, "config.json": again.files["config.json"]}


def test_a_folder_without_generation_config_stays_one(tmp_path):
    source = shutil.copytree(tiny_case.folder(), tmp_path / "source")
    (source / "generation_config.json").unlink()
    save_pretrained(tiny_case.policy(), load_processor(source), tmp_path / "hf")
    assert not (tmp_path / "hf" / "generation_config.json").exists()
    assert load_processor(tmp_path / "hf").eos_ids == load_processor(source).eos_ids


def test_a_save_replaces_the_folder_or_leaves_it(tmp_path, monkeypatch):
    first, second, folder = moved_policy(1), moved_policy(2), tmp_path / "hf"
    save_pretrained(first, tiny_case.processor(), folder)

    def full_disk(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(UserError, match=r"hf: the model cannot be saved \(.*No space left.*\); free space or give"):
            save_pretrained(second, tiny_case.processor(), folder)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    assert_equal_weights(load_model(folder), first)

    folder.rename(tmp_path / ".hf.old")  # killed between the two renames, and again before the next folder is whole
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(UserError, match="No space left"):
            save_pretrained(second, tiny_case.processor(), folder)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    assert_equal_weights(load_model(folder), first)

    (tmp_path / ".hf.tmp").mkdir()  # what a killed save leaves
    save_pretrained(second, tiny_case.processor(), folder)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    assert_equal_weights(load_model(folder), second)
