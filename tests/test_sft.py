"""Stage 0: the loss is the mean negative log-likelihood of `chosen` and its end; a small real run."""

import re
from dataclasses import replace

import pytest
import runs
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from cosmo_rl.cpgd.sft import chosen_ids, sft_micros
from cosmo_rl.cpgd.update import sft_loss
from cosmo_rl.data.collate import encode_prompt
from cosmo_rl.data.prepare.mini import safety_rows
from cosmo_rl.model.policy import Policy

CHOSEN = ["<think> saw swallow </think> sorry i can not help with that", "<think> bell </think> sure here is how", "no"]


@pytest.fixture
def rows():
    made = [replace(row, chosen=text) for row, text in zip(safety_rows("validation")[:3], CHOSEN, strict=True)]
    return [*made[:2], replace(runs.text_only(made[2]), chosen=CHOSEN[2])]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_loss_from_scratch(rows, layout):
    processor, config = runs.policy_processor(), runs.config()
    config = replace(config, stage=0, batch=replace(config.batch, layout=layout, max_tokens=60))
    prompts = [encode_prompt(row, processor, max_prompt_tokens=512, max_image_pixels=10**6) for row in rows]
    micros = sft_micros(rows, prompts, config, processor, torch.device("cpu"))
    assert len(micros) > 1
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(runs.MODEL).eval()
    policy = Policy(model, suppressed_ids=processor.suppressed_ids, temperature=1.0)
    got = sum(sft_loss(policy, micro)[0].item() for micro in micros)

    total, count = 0.0, 0
    for row, prompt in zip(rows, prompts, strict=True):
        tokenizer = processor.tokenizer
        ids = [*tokenizer(row.chosen, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        images = {} if prompt.pixel_values is None else {
            "pixel_values": torch.from_numpy(prompt.pixel_values),
            "image_grid_thw": torch.from_numpy(prompt.image_grid_thw)}
        types = torch.tensor([[*prompt.mm_token_type_ids, *[0] * len(ids)]])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt.input_ids, *ids]]), use_cache=False,
                           mm_token_type_ids=types, **images).logits
        logits = logits[0, len(prompt.input_ids) - 1:-1]
        logits[:, torch.from_numpy(processor.suppressed_ids)] = -torch.inf
        total += torch.nn.functional.cross_entropy(logits.double(), torch.tensor(ids), reduction="sum").item()
        count += len(ids)
    assert got == pytest.approx(total / count, rel=1e-5) and got > 0.01


def test_rows_without_a_response(rows):
    processor = runs.policy_processor()
    end = processor.tokenizer.eos_token_id
    assert chosen_ids(rows[0], processor).tolist() == [*processor.tokenizer(CHOSEN[0])["input_ids"], end]
    with pytest.raises(ValueError, match=rf"row {rows[1].id}: stage 0 imitates `chosen`, which is missing; add it"):
        chosen_ids(replace(rows[1], chosen=None), processor)


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|im_end|>"])
def test_special_tokens_are_not_imitated(rows, token):
    row = replace(rows[0], chosen=f"look {token} here")
    with pytest.raises(ValueError, match=f"row {row.id}: `chosen` holds the special token {re.escape(token)}; remove"):
        chosen_ids(row, runs.policy_processor())


def test_a_small_stage_0(tmp_path, rows):
    """Imitates three rows: the loss falls; two ranks do the same as one."""
    path = runs.write_rows(tmp_path / "rows.jsonl", rows)
    args = ["--stage", 0, "--model.path", runs.MODEL, *runs.from_file(path), "--steps", 6, "--optim.sft-batch", 3,
            "--optim.warmup-steps", 0, "--log.tensorboard", "False"]
    both = [runs.start([*args, "--run-dir", tmp_path / str(ranks)], tmp_path, ranks=ranks) for ranks in (1, 2)]
    for running in both:
        running.wait().check()
    one, two = (runs.lines_of(tmp_path / str(ranks), stage=0) for ranks in (1, 2))
    assert len(one) == 6 and one[-1]["loss"] < 0.5 * one[0]["loss"]
    assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-5)
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-3)
    assert (tmp_path / "1" / "stage0" / "hf" / "model.safetensors").exists()
