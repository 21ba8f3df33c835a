"""Folders that load, and folders that must not."""

import json
import shutil
import sys
from typing import Any

import numpy as np
import pytest
import tiny_case
import torch
from close import assert_no_worse
from safetensors.torch import load_file, save_file

from cosmo_rl.model.load import load_model, load_processor


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(tiny_case.folder(), tmp_path / "model")


def test_processor_facts():
    processor = tiny_case.processor()
    token = processor.tokenizer.convert_tokens_to_ids
    assert processor.eos_ids == (token("<|im_end|>"),)
    assert processor.pad_id == token("<|endoftext|>")
    assert processor.image_token_id == token("<|image_pad|>")
    assert len(processor.tokenizer) < processor.vocab_size, "the case should have rows of the head without a token"
    special = set(processor.tokenizer.all_special_ids) - set(processor.eos_ids)
    tokenless = set(range(len(processor.tokenizer), processor.vocab_size))
    assert set(processor.suppressed_ids.tolist()) == special | tokenless


def test_every_eos_of_the_generation_config_ends_a_response(copy):
    endoftext = tiny_case.processor().pad_id
    path = copy / "generation_config.json"
    both = [tiny_case.processor().eos_ids[0], endoftext]
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": both}))
    processor = load_processor(copy)
    assert endoftext in processor.eos_ids and endoftext not in processor.suppressed_ids


def test_resize_pixels_bounds_the_image_tokens(copy):
    path = copy / "preprocessor_config.json"  # the shipped tiny size is fixed; a real folder has a range
    path.write_text(json.dumps({**json.loads(path.read_text()), "size": {"shortest_edge": 256, "longest_edge": 10**6}}))
    image: Any = tiny_case.row(0, [(224, 112)]).images
    grids = [load_processor(copy, limit).image_processor(images=list(image), return_tensors="np")["image_grid_thw"][0]
             for limit in (None, 224 * 112, 112 * 56)]
    assert [g.tolist() for g in grids] == [[1, 8, 16], [1, 8, 16], [1, 4, 8]]


def test_dummy_image_is_one_token():
    pixels, grid = tiny_case.processor().dummy_image()
    model = load_model(tiny_case.folder())
    tower = model.model.visual(torch.from_numpy(pixels), grid_thw=torch.from_numpy(grid))
    assert tower.pooler_output.shape[0] == 1 and torch.isfinite(tower.pooler_output).all()
    assert pixels.dtype == np.float32 and grid.dtype == np.int64


def test_freeze_vision_leaves_the_merger_trainable():
    model = load_model(tiny_case.folder(), freeze_vision=True)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if ".visual." in name and ".merger." not in name}
    assert frozen and not model.training


def test_dtype():
    assert {p.dtype for p in load_model(tiny_case.folder(), dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_missing_folder(tmp_path):
    for load in (load_model, load_processor):
        with pytest.raises(ValueError, match=r"nowhere does not exist.*--model.path"):
            load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json", "model.safetensors"])
def test_missing_file(copy, name):
    (copy / name).unlink()
    torch.save({}, copy / "pytorch_model.bin")  # a pickle is no substitute
    with pytest.raises(ValueError, match=rf"lacks .*{name.split('.')[-1]}.*again"):
        load_model(copy)


def test_half_written_weights(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"cannot be loaded.*copy"):
        load_model(copy)


def test_missing_tensor(copy):
    path = copy / "model.safetensors"
    tensors = load_file(path)
    del tensors[next(name for name in tensors if "layers.1.mlp.up_proj" in name)]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 tensors are missing.*layers\.1\.mlp\.up_proj.*incomplete"):
        load_model(copy)


def test_tensor_of_another_size(copy):
    path = copy / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "layers.1.mlp.up_proj" in name)
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(copy)


@pytest.mark.parametrize("change, message", [
    ({"model_type": "qwen2_vl"}, "model_type is qwen2_vl"),
    (None, "config.json cannot be used"),
])
def test_bad_config(copy, change, message):
    path = copy / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}) if change else path.read_text()[:50])
    with pytest.raises(ValueError, match=message):
        load_model(copy)


def test_a_config_that_contradicts_itself(copy):
    path = copy / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["layer_types"] = ["full_attention"] * (config["text_config"]["num_hidden_layers"] + 1)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json cannot be used [\s\S]*layer_types"):
        load_model(copy)


def test_dropout_is_refused(copy):
    path = copy / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["attention_dropout"] = 0.1
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"attention_dropout is 0.1"):
        load_model(copy)


def test_flash_attention_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # where it is installed, too
    monkeypatch.setattr("transformers.utils.import_utils.is_flash_attn_2_available", lambda: False)
    with pytest.raises(ValueError, match=r"flash_attention_2 is not installed .*pip install flash-attn.* sdpa"):
        load_model(tiny_case.folder(), attention="flash_attention_2")


def test_no_kernel_from_the_hub_in_place_of_flash_attention(monkeypatch):
    monkeypatch.setattr("transformers.utils.import_utils.is_flash_attn_2_available", lambda: False)
    monkeypatch.setattr("transformers.modeling_utils.is_kernels_available", lambda: True)
    asked = []
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", lambda *a, **_: asked.append(a))
    with pytest.raises(ValueError, match="flash_attention_2 is not installed"):
        load_model(tiny_case.folder(), attention="flash_attention_2")
    assert not asked


class OnCuda(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = property(lambda self: True)  # pyright: ignore[reportAssignmentType]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patches_are_embedded_alike_by_convolution_and_product(dtype):
    module = load_model(tiny_case.folder(), dtype=dtype).model.visual.patch_embed
    pixels = torch.randn(8, module.proj.weight[0].numel(), generator=torch.Generator().manual_seed(0))
    found, convolved = {}, []
    module.proj.register_forward_hook(lambda *_: convolved.append(1))
    for name, given in (("convolution", pixels), ("product", pixels.as_subclass(OnCuda))):
        module.proj.weight.grad = None
        out = module(given).as_subclass(torch.Tensor)
        out.float().square().sum().backward()
        found[name] = out, module.proj.weight.grad
    weight = module.proj.weight.detach().flatten(1).double()
    embedded = pixels.to(dtype).double() @ weight.T
    exact = embedded, (2 * embedded.T @ pixels.to(dtype).double()).view_as(module.proj.weight)
    for ours, theirs, truth in zip(found["product"], found["convolution"], exact, strict=True):
        assert ours.dtype == dtype
        assert_no_worse(ours, theirs, truth, atol=0.0)
    assert len(convolved) == 1, "two different operators"


def test_no_chat_template(copy):
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        load_processor(copy)
