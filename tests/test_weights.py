"""Weights out and in again: the engine's copy, and the folder on disk. Sharded policies are in test_parallel.py."""

import json
import shutil

import pytest
import tiny_case
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from cosmo_rl.model import weights
from cosmo_rl.model.load import load_model, load_processor
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


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_saved_folder_is_whole(tmp_path, dtype):
    policy, folder = moved_policy(), tmp_path / "stage" / "hf"
    save_pretrained(policy, tiny_case.processor(), folder, dtype)
    assert [p.name for p in folder.parent.iterdir()] == ["hf"]
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype or torch.float32).split(".")[1]
    assert_equal_weights(model, policy if dtype is None else policy.to(dtype))

    # Tokenizer and image processor as transformers itself finds them, and through ours.
    ours, prompt = load_processor(folder), "here what is this?"
    for tokenizer in (AutoTokenizer.from_pretrained(folder), ours.tokenizer):
        assert tokenizer(prompt)["input_ids"] == tiny_case.processor().tokenizer(prompt)["input_ids"]
        assert tokenizer.chat_template == tiny_case.processor().tokenizer.chat_template
    assert AutoImageProcessor.from_pretrained(folder).to_dict() == tiny_case.processor().image_processor.to_dict()
    assert ours.eos_ids == tiny_case.processor().eos_ids
    assert (folder / "generation_config.json").is_file()


def test_untied_head_is_saved(tmp_path):
    source = shutil.copytree(tiny_case.folder(), tmp_path / "untied")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(source)
    model.save_pretrained(source)
    policy = tiny_case.Policy(load_model(source), suppressed_ids=tiny_case.processor().suppressed_ids)
    with torch.no_grad():
        policy.model.lm_head.weight.add_(1.0)
    save_pretrained(policy, tiny_case.processor(), tmp_path / "hf")
    assert "lm_head.weight" in load_file(tmp_path / "hf" / "model.safetensors")
    assert_equal_weights(load_model(tmp_path / "hf"), policy)


def test_a_save_replaces_the_folder_or_leaves_it(tmp_path, monkeypatch):
    first, second, folder = moved_policy(1), moved_policy(2), tmp_path / "hf"
    save_pretrained(first, tiny_case.processor(), folder)

    def full_disk(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(weights.os, "fsync", full_disk)
        with pytest.raises(OSError, match=r"No space left.*--run-dir.*hf"):
            save_pretrained(second, tiny_case.processor(), folder)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    assert_equal_weights(load_model(folder), first)

    folder.rename(tmp_path / ".hf.old")  # killed between the two renames, and again before the next folder is whole
    with monkeypatch.context() as patch:
        patch.setattr(weights.os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space left"):
            save_pretrained(second, tiny_case.processor(), folder)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    assert_equal_weights(load_model(folder), first)

    (tmp_path / ".hf.new").mkdir()  # what a killed save leaves
    save_pretrained(second, tiny_case.processor(), folder)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    assert_equal_weights(load_model(folder), second)
