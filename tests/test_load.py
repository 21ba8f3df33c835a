"""Folders that load, and folders that must not."""

import json
import shutil
import sys
from typing import Any

import numpy as np
import published_folder
import pytest
import tiny_case
import torch
from close import assert_no_worse
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from cosmo_rl.data.collate import TokenSequence, collate, encode_prompt
from cosmo_rl.data.errors import UserError
from cosmo_rl.model.load import load_model, load_processor, unfilled_model
from cosmo_rl.model.policy import Policy
from cosmo_rl.model.weights import load_into


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return published_folder.write(tmp_path_factory.mktemp("hub") / "Qwen2.5-VL")


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


def test_resize_pixels_below_what_the_model_sees():
    with pytest.raises(UserError, match=r"at least 3136 pixels .*at most 784 are allowed \(--data\.resize-pixels"):
        load_processor(tiny_case.folder(), 784)


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


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_is_filled_is_the_loaded_one(copy, dtype, tied):
    """Without its folder, once the config is read: every buffer, what is shared, and what comes out, bit for bit."""
    if not tied:
        change(copy / "config.json", tie_word_embeddings=False)
        weights = load_file(copy / "model.safetensors")
        head = {"lm_head.weight": 2 * weights["model.embed_tokens.weight"]}
        save_file(weights | head, copy / "model.safetensors", {"format": "pt"})
    loaded: Any = load_model(copy, dtype=dtype)
    config = load_processor(copy).config
    before = config.to_dict()
    shutil.rmtree(copy)
    model: Any = unfilled_model(config, device=torch.device("cpu"), dtype=dtype)
    assert config.to_dict() == before and not model.training
    assert all(p.isnan().all() and p.dtype == dtype for p in model.parameters())
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    load_into(model, ((name, p.detach()) for name, p in loaded.named_parameters()))
    buffers = dict(model.named_buffers())
    assert {name.rsplit(".", 2)[-2] for name in buffers} == {"rotary_emb", "rotary_pos_emb"} and len(buffers) == 4
    for name, buffer in loaded.named_buffers():
        found = buffers.pop(name)
        assert found.dtype == buffer.dtype == torch.float32 and torch.equal(found, buffer) and buffer.any(), name
    assert not buffers
    assert {name: p.shape for name, p in model.state_dict().items()} == {
        name: p.shape for name, p in loaded.state_dict().items()}
    sequences = [TokenSequence(prompt, np.arange(20, 24)) for prompt in tiny_case.prompts()]
    batch = collate(sequences, layout="padded", pad_id=0, dummy_image=tiny_case.processor().dummy_image())
    rows = [Policy(each, suppressed_ids=np.empty(0, dtype=np.int64))(batch).logprobs for each in (model, loaded)]
    assert torch.equal(*rows) and rows[0].isfinite().all() and len(rows[0]) == 16


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


def test_tensor_of_another_size(copy, capfd):
    path = copy / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "layers.1.mlp.up_proj" in name)
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    capfd.readouterr()
    with pytest.raises(UserError, match=r"1 tensors have another shape .*layers\.1\.mlp\.up_proj.*383, 128.*384, 128"):
        load_model(copy)
    assert "REPORT" not in capfd.readouterr().err, "told in one line"


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


def change(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_published_folder(published):
    processor = load_processor(published)
    tokens = published_folder.ADDED_IDS
    assert len(processor.tokenizer) == published_folder.TOKENS == 151_665 < processor.vocab_size == 151_936
    assert processor.template == "chat_template.json" and "image_pad" in processor.tokenizer.chat_template
    assert processor.eos_ids == (tokens["<|endoftext|>"], tokens["<|im_end|>"])
    suppressed = set(processor.suppressed_ids.tolist())
    assert tokens["<tool_call>"] not in suppressed and tokens["<|image_pad|>"] in suppressed
    assert set(range(151_665, 151_936)) <= suppressed
    assert processor.files["preprocessor_config.json"] == (published / "preprocessor_config.json").read_bytes()
    assert processor.files.keys() >= {"vocab.json", "merges.txt", "chat_template.json", "generation_config.json"}


def test_published_weights_give_transformers_own_logprobs(published, tmp_path):
    """By their old names, in shards, out of a flat config; tied and untied; rows with and without pictures."""
    untied = published_folder.write(tmp_path / "untied", tied=False, shards=3)
    for folder in (published, untied):
        processor = load_processor(published, 112 * 56)
        policy = Policy(load_model(folder), suppressed_ids=np.empty(0, dtype=np.int64))
        theirs: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        ids = np.array([100, 200, 300, 151_657, 151_645])
        for i, shapes in enumerate(tiny_case.SHAPES):
            prompt = encode_prompt(tiny_case.row(i, shapes), processor, max_prompt_tokens=200, max_image_pixels=10**6)
            batch = collate([TokenSequence(prompt, ids)], layout="packed", pad_id=processor.pad_id,
                            dummy_image=processor.dummy_image())
            whole, types = (torch.from_numpy(np.concatenate(pair))[None] for pair in (
                (prompt.input_ids, ids), (prompt.mm_token_type_ids, 0 * ids)))
            pictures = {} if prompt.pixel_values is None else {
                "pixel_values": torch.from_numpy(prompt.pixel_values),
                "image_grid_thw": torch.from_numpy(prompt.image_grid_thw)}
            theirs.model.rope_deltas = None
            with torch.no_grad():
                logits = theirs(input_ids=whole, mm_token_type_ids=types, use_cache=False, **pictures).logits[0]
                expected = logits[-1 - len(ids):-1].log_softmax(-1)[np.arange(len(ids)), ids]
                got = policy(batch).logprobs
            torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("eos, told", [
    ("151645", r"eos_token_id '151645'; give the numbers of tokens, below \d+$"),
    ("<|im_end|>", r"eos_token_id '<\|im_end\|>'; .*below \d+ \(\d+ for <\|im_end\|>\)"),
    (["<|im_end|>"], "give the numbers"), ([True], "give the numbers"), (1.0, "give the numbers"),
    (-1, "give the numbers"), (10**9, "give the numbers"), ({"id": 1}, "give the numbers"), ([[1]], "give the numbers"),
    ("", "give the numbers"),
], ids=repr)
def test_eos_ids_are_numbers_of_tokens(copy, eos, told):
    change(copy / "generation_config.json", eos_token_id=eos)
    with pytest.raises(UserError, match=told):
        load_processor(copy)


def test_a_generation_config_that_transformers_would_not_save(copy):
    """Nobody samples by it; the export copies it."""
    change(copy / "generation_config.json", do_sample=False, temperature=0.7, num_beams="x")
    load_processor(copy)
    assert load_model(copy).generation_config.temperature != 0.7


@pytest.mark.parametrize("name, fields, told", [
    ("preprocessor_config.json", {"patch_size": 16}, "has patch_size 16, and config.json 14"),
    ("preprocessor_config.json", {"merge_size": 1}, "has merge_size 1, and config.json 2"),
    ("preprocessor_config.json", {"temporal_patch_size": "2"}, "temporal_patch_size|cannot be used"),
    ("preprocessor_config.json", {"image_mean": [0.5]}, "preprocessor_config.json cannot be used for a picture"),
    ("preprocessor_config.json", {"image_std": 0}, "all finite"),
    ("preprocessor_config.json", {"size": {"height": 56, "width": 56}}, "cannot be used|for the pixels"),
    ("preprocessor_config.json", {"size": {"shortest_edge": "abc", "longest_edge": 3136}}, "for the pixels|cannot be"),
    ("preprocessor_config.json", {"size": {"shortest_edge": 0, "longest_edge": 3136}}, "for the pixels|cannot be"),
    ("preprocessor_config.json", {"size": {"shortest_edge": 10**10, "longest_edge": 3136}},  # 30 GB if tried
     "at least 10000000000 pixels of a picture, and at most 3136 are allowed"),
    ("tokenizer_config.json", {"model_max_length": "abc"}, "its tokenizer cannot be used"),
    ("tokenizer_config.json", {"eos_token": None}, "eos token None"),
    ("tokenizer_config.json", {"pad_token": None}, "pad token None"),
    ("tokenizer_config.json", {"eos_token": 5}, "its tokenizer is broken"),
    ("tokenizer.json", {"model": {}}, "its tokenizer is broken"), ("tokenizer.json", {"model": None}, "is broken"),
    ("tokenizer.json", {"added_tokens": 5}, "its tokenizer is broken"),
    ("config.json", {"image_token_id": 10**6}, r"has image_token_id 1000000, and tokenizer\.json \d+ tokens"),
    ("config.json", {"vision_start_token_id": -1}, "has vision_start_token_id -1"),
    ("config.json", {"image_token_id": 3}, "it drops, moves or changes|placeholders"),
], ids=str)
def test_files_that_are_broken_or_do_not_fit_together(copy, name, fields, told):
    change(copy / name, **fields)
    with pytest.raises(UserError, match=told) as caught:
        load_processor(copy)
    assert "\n" not in str(caught.value)


def test_code_in_the_folder_is_not_run(copy):
    (copy / "x.py").write_text("raise SystemExit('it ran')")
    for name, auto in (("tokenizer_config.json", {"AutoTokenizer": ["x.Y", "x.Y"]}),
                       ("config.json", {"AutoConfig": "x.Y", "AutoModelForImageTextToText": "x.Y"}),
                       ("preprocessor_config.json", {"AutoImageProcessor": "x.Y", "AutoProcessor": "x.Y"})):
        change(copy / name, auto_map=auto)
    unfilled_model(load_processor(copy).config, device=torch.device("cpu"), dtype=torch.float32)
    load_model(copy)


def test_a_tokenizer_of_a_larger_model(copy):
    raw = json.loads((copy / "config.json").read_text())
    raw["text_config"]["vocab_size"] = 20
    raw["text_config"] |= {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    (copy / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"has \d+ tokens, and config\.json a vocab_size of 20"):
        load_processor(copy)


def test_no_chat_template(copy):
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        load_processor(copy)
