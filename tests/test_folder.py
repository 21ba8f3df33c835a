"""Model folders that are broken, foreign or hostile: each is refused in one line that names the file."""

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny_case
import torch
from safetensors.torch import load_file, save_file

from cosmo_rl.data.errors import UserError
from cosmo_rl.model import folder as module
from cosmo_rl.model.load import load_model, load_processor

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(tiny_case.folder(), tmp_path / "model")


@pytest.fixture
def sharded(copy):
    """In two shards behind an index, as published."""
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    weight_map = {name: (A, B)[i % 2] for i, name in enumerate(tensors)}
    for file in (A, B):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, copy / file,
                  metadata={"format": "pt"})
    (copy / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return copy


def refused(load, folder, pattern):
    with pytest.raises(UserError, match=pattern) as caught:
        load(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def edit(path: Path, **changes):
    """Set fields of a JSON file, in the object that has them, else at the top."""
    content = json.loads(path.read_text())
    for name, value in changes.items():
        parts = [content, *(part for part in content.values() if isinstance(part, dict))]
        next((part for part in parts if name in part), content)[name] = value
    path.write_text(json.dumps(content))


def test_shards_load_as_one_file_does(sharded):
    expected, got = load_model(tiny_case.folder()).state_dict(), load_model(sharded).state_dict()
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in expected)


def test_shards_may_be_links_as_in_a_snapshot_of_the_hub(sharded, tmp_path):
    for file in (A, B, INDEX):
        (sharded / file).rename(tmp_path / f"blob-{file}.bin")
        (sharded / file).symlink_to(tmp_path / f"blob-{file}.bin")
    load_model(sharded)


@pytest.mark.parametrize("file", [
    "pytorch_model.bin", "../outside.safetensors", "/outside.safetensors", "sub/x.safetensors", "..\\x.safetensors",
    "x.safetensors\0", "x.SAFETENSORS", "x.safetensors.bin", "", None, 5, ["x.safetensors"], {},
], ids=repr)
def test_an_index_names_only_safetensors_without_a_path(sharded, monkeypatch, file):
    """And no pickle is read, whatever it names."""
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    torch.save({}, sharded / "pytorch_model.bin")
    for outside in (sharded.parent / "outside.safetensors", sharded / "sub" / "x.safetensors"):
        outside.parent.mkdir(exist_ok=True)
        shutil.copy(sharded / A, outside)
    content = json.loads((sharded / INDEX).read_text())
    content["weight_map"][next(iter(content["weight_map"]))] = file
    (sharded / INDEX).write_text(json.dumps(content))
    refused(load_model, sharded, r"index\.json puts .*only \*\.safetensors without a path are read")


@pytest.mark.parametrize("text, pattern", [
    ("{", "index.json cannot be read"), ("[]", "index.json holds a list"), ("null", "holds a NoneType"),
    ("{}", "has no object `metadata`"), ('{"metadata": {}}', "has no object `weight_map`"),
    ('{"weight_map": {"a": "b.safetensors"}}', "has no object `metadata`"),
    ('{"metadata": null, "weight_map": {}}', "has no object `metadata`"),
    ('{"metadata": {}, "weight_map": []}', "has no object `weight_map`"),
    ('{"metadata": {}, "weight_map": {}}', r"lacks \*\.safetensors of the 0 shards"),
    ('{"metadata": {}, "weight_map": {"a": "none.safetensors"}}', "lacks none.safetensors of the 1 shards"),
    ('{"metadata": {}, "weight_map": {"a": "' + "n" * 5000 + '.safetensors"}}', "shard that cannot be found"),
    ("[" * 100_000, "index.json cannot be read"),
])
def test_a_broken_index(sharded, text, pattern):
    (sharded / INDEX).write_text(text)
    refused(load_model, sharded, pattern)


def test_shards_that_are_missing_foreign_or_at_odds_with_the_index(sharded):
    tensors = load_file(sharded / B)
    name = next(iter(tensors))
    (sharded / A).rename(sharded / "other.safetensors")
    refused(load_model, sharded, f"lacks {A} of the 2 shards")
    (sharded / A).mkdir()
    refused(load_model, sharded, f"lacks {A} of the 2 shards")
    (sharded / A).rmdir()
    (sharded / A).symlink_to("/dev/zero")  # would never end
    refused(load_model, sharded, f"lacks {A} of the 2 shards")
    (sharded / A).unlink()
    torch.save({}, sharded / A)  # a pickle by another name
    refused(load_model, sharded, f"{A} cannot be loaded")
    save_file({**load_file(sharded / "other.safetensors"), name: tensors[name]}, sharded / A)
    refused(load_model, sharded, rf"tensor '{name}' is in {A} and in {B}")
    (sharded / INDEX).unlink()
    refused(load_model, sharded, f"has {A}, but neither model.safetensors nor {INDEX}")


def test_other_weights_in_the_folder_are_never_read(copy, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    (copy / "pytorch_model.bin.index.json").write_text('{"metadata": {}, "weight_map": {"a": "pytorch_model.bin"}}')
    torch.save({}, copy / "pytorch_model.bin")
    load_model(copy)
    (copy / "model.safetensors").rename(copy / "x.safetensors")
    refused(load_model, copy, "has x.safetensors, but neither")
    (copy / "x.safetensors").rename(copy / "model.safetensors")
    (copy / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    refused(load_model, copy, r"adapter_config\.json makes it an adapter.*merge")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int32])
def test_quantised_tensors(copy, dtype):
    tensors = load_file(copy / "model.safetensors")
    name = next(name for name in tensors if "up_proj.weight" in name)
    save_file({**tensors, name: tensors[name].to(dtype)}, copy / "model.safetensors")
    refused(load_model, copy, rf"tensor '{name}' in model\.safetensors is [IUF]\d.*quantised")


def test_tensors_that_the_config_has_no_place_for(copy):
    edit(copy / "config.json", num_hidden_layers=2, layer_types=["full_attention"] * 2)
    refused(load_model, copy, r"12 tensors have no place in the model .*layers\.2\.")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite(copy, value):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][3] = value
    save_file(tensors, copy / "model.safetensors")
    refused(load_model, copy, r"tensor model\.language_model\.norm\.weight holds a number that is not finite; copy")


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_head_beside_one_of_its_own(copy, equal):
    tensors = load_file(copy / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    head = embedding.clone()
    head[3, 5] += 0 if equal else 0.01
    save_file({**tensors, "lm_head.weight": head}, copy / "model.safetensors")
    if equal:
        model = load_model(copy)
        assert model.lm_head.weight is model.get_input_embeddings().weight
    else:
        refused(load_model, copy, r"tie_word_embeddings is true in config\.json, and lm_head\.weight is not the embed")
        edit(copy / "config.json", tie_word_embeddings=False)
        assert torch.equal(load_model(copy).lm_head.weight, head)


@pytest.mark.parametrize("change, pattern", [
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, r"quantization_config \(awq\).*unquantised"),
    ({"quantization_config": "fp8"}, r"quantization_config \(fp8\)"),
    ({"compression_config": {"quant_method": "compressed-tensors"}}, r"compression_config \(compressed-tensors\)"),
    ({"transformers_weights": "adapter_model.bin"}, "sets transformers_weights to 'adapter_model.bin'; remove"),
    ({"model_type": None}, "model_type is None"), ({"model_type": ["qwen2_5_vl"]}, "model_type is "),
    ({"attention_dropout": 0.1}, r"attention_dropout is 0\.1"), ({"attention_dropout": None}, "dropout is None"),
    ({"hidden_size": "128"}, "hidden_size"), ({"num_attention_heads": 0}, "config.json cannot be used"),
    ({"vision_config": 5}, "config.json cannot be used"), ({"text_config": []}, "config.json cannot be used"),
    ({"hidden_act": "gelu_of_mine"}, "KeyError 'gelu_of_mine'"), ({"vocab_size": -1}, "config.json cannot be used"),
    ({"eos_token_id": "151645"}, "eos_token_id"), ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ({"rope_parameters": None}, "mrope_section is None; give whole numbers with the sum 16"),
    ({"mrope_section": [4, 6, 7]}, r"mrope_section is \[4, 6, 7\]"), ({"rope_parameters": "mrope"}, "cannot be used"),
    ({"num_heads": 3}, "hidden_size 128 and num_heads 3"), ({"window_size": 3}, "window_size is 3; give at least"),
    ({"out_hidden_size": 64}, "out_hidden_size 64; give hidden_size, 128"), ({"depth": -1}, "have no place"),
    ({"pad_token_id": 10_000}, "config.json cannot be used"), ({"attn_implementation": "abc"}, "cannot be used"),
], ids=str)
def test_a_config_that_cannot_be_used(copy, change, pattern):
    raw = json.loads((copy / "config.json").read_text())
    name = next(iter(change))
    place = next((part for part in ("text_config", "vision_config") if name in raw[part] and name != "model_type"), "")
    if "mrope_section" in change:
        raw["text_config"]["rope_parameters"] |= change
    else:
        (raw[place] if place else raw).update(change)
    (copy / "config.json").write_text(json.dumps(raw))
    refused(load_model, copy, pattern)


@pytest.mark.parametrize("text", ["[]", '"qwen2_5_vl"', "null", "{", "", "\ufeff{}", "\\x", '{"a": ' * 100_000])
def test_a_config_that_is_no_json_object(copy, text):
    (copy / "config.json").write_text(text)
    refused(load_processor, copy, r"config\.json (cannot be|holds a|can)")


def test_a_file_that_cannot_be_read(copy):
    (copy / "generation_config.json").write_bytes(b"\xff\xfe")
    refused(load_processor, copy, r"generation_config\.json cannot be read")
    (copy / "generation_config.json").unlink()
    os.mkfifo(copy / "chat_template.json")  # no file: nobody waits for it
    load_processor(copy)


def test_only_a_library_s_error_is_taken_for_the_user_s():
    with pytest.raises(UserError, match=r"model folder f: x is broken \(KeyError 'a'\); mend"), \
            module.reading(Path("f"), "x is broken", "mend"):
        raise KeyError("a")
    with pytest.raises(UserError, match=r"\(of Rust\)"), module.reading(Path("f"), "x", "mend"):
        raise Exception("of Rust")
    with pytest.raises(UserError, match=r"^as it is$"), module.reading(Path("f"), "x", "mend"):
        raise UserError("as it is")
    with pytest.raises(KeyboardInterrupt), module.reading(Path("f"), "x", "mend"):
        raise KeyboardInterrupt
    assert module.told(ValueError("\x1b[2Jgone")) == "\\x1b[2Jgone"
    long = module.told(ValueError("a\n b" * 1000))
    assert len(long) == 303 and "\n" not in long and long.startswith("a ba b")
