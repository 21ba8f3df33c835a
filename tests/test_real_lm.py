"""SmolLM2 as the text backbone of a Qwen2.5-VL folder: the same numbers, a folder and rows that train.py takes."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cosmo_rl.cpgd.rewards.format import split_thinking
from cosmo_rl.cpgd.rewards.task_aware import is_right, rules
from cosmo_rl.cpgd.run.dryrun import inspect
from cosmo_rl.cpgd.run.recipes import parse_command_line
from cosmo_rl.data.errors import MissingPackage
from cosmo_rl.data.index import load_rows
from cosmo_rl.model.load import load_model, load_processor

BENCH = Path(__file__).resolve().parent.parent / "bench"
TEXT = "The capital of France is Paris, and 17 + 25 ="


@pytest.fixture(scope="module")
def real_lm():
    sys.path.insert(0, str(BENCH))
    try:
        yield importlib.import_module("real_lm")
    finally:
        sys.path.remove(str(BENCH))
        sys.modules.pop("real_lm")


@pytest.fixture(scope="module")
def made(real_lm, tmp_path_factory):
    """(folder of model and rows, SmolLM2's tokens of TEXT, SmolLM2 itself)."""
    try:
        tokenizer, source = real_lm.read_smollm2()
    except MissingPackage as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("real-lm")
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    real_lm.make_rows(folder)
    real_lm.make_model(folder / "model", tokenizer, source)
    return folder, ids, source


@pytest.fixture(scope="module")
def loaded(made):
    """As the trainer loads them."""
    return load_processor(made[0] / "model"), load_model(made[0] / "model")


@torch.no_grad()
def test_text_has_the_logits_of_smollm2(made, loaded):
    _, ids, source = made
    processor, model = loaded
    assert processor.tokenizer(TEXT).input_ids == ids[0].tolist()
    expected = source(ids).logits
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert torch.equal(logits[..., :expected.shape[-1]], expected)
    assert processor.tokenizer.decode(logits[0, -1].argmax()) == " "


@torch.no_grad()
def test_text_positions_are_rope(made, loaded):
    _, ids, source = made
    positions = torch.arange(ids.shape[1])[None]
    hidden = torch.zeros(1, ids.shape[1], source.config.hidden_size)
    rotary = loaded[1].model.language_model.rotary_emb
    for ours, theirs in zip(rotary(hidden, positions[None].expand(3, -1, -1)),
                            source.model.rotary_emb(hidden, positions), strict=True):
        assert torch.equal(ours, theirs.expand_as(ours))


def test_the_head_is_the_embedding_and_the_rest_is_added(made, loaded):
    _, _, source = made
    processor, model = loaded
    embedding, known = model.get_input_embeddings().weight, source.config.vocab_size
    assert model.lm_head.weight is embedding and source.lm_head.weight is source.model.embed_tokens.weight
    assert len(processor.tokenizer) == known + 4 <= processor.vocab_size == len(embedding)
    assert set(range(known, len(embedding))) <= set(processor.suppressed_ids.tolist())
    layer = model.model.language_model.layers[0].self_attn
    assert not any(getattr(layer, name).bias.any() for name in ("q_proj", "k_proj", "v_proj"))
    assert not list((made[0] / "model").glob("*.bin")) and not list((made[0] / "model").glob("*.py"))


def test_a_prompt_is_short(loaded):
    text = loaded[0].chat_text([{"role": "user", "content": "Sort 52 17 83"}])
    assert text == "<|im_start|>user\nSort 52 17 83<|im_end|>\n<|im_start|>assistant\n"


def test_no_problem_is_in_two_files(real_lm, tmp_path):
    real_lm.make_rows(tmp_path)
    seen = set()
    for split, count in real_lm.SPLITS.items():
        rows = [json.loads(line) for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
        problems = {frozenset(row["prompt"].split()[1:]) for row in rows}
        assert len(rows) == len(problems) == count and not problems & seen
        seen |= problems
    assert real_lm.SPLITS["heldout"] >= 200


def test_the_imitated_replies_earn_everything(real_lm, tmp_path):
    real_lm.make_rows(tmp_path)
    rows = load_rows([str(tmp_path / "sft.jsonl")], max_image_pixels=1)
    parts = [split_thinking(row.chosen or "") for row in rows]
    assert all(parts)
    with rules() as task:
        assert all(map(is_right, task.outcomes((row, part[1]) for row, part in zip(rows, parts, strict=True) if part)))


def test_the_command_starts_each_run_once(real_lm, monkeypatch, tmp_path):
    """From the weights of one Stage 0, seeds and arms as asked; what it writes has no path of this machine."""
    started = []

    def train(arguments, folder, threads):
        config = parse_command_line([str(part) for part in arguments])
        started.append((folder.name, config.stage, config.seed, config.steps, config.model.path))
        return {"command": f"torchrun train.py --run-dir {folder}", "commit": "x", "seconds": 60, "cpu_seconds": 60}

    def measured(stage):
        gain = 0.4 if "grpo" in str(stage) else 0.2
        return {"before": {"general_accuracy": 0.1}, "after": {"general_accuracy": 0.1 + gain},
                "before_greedy": {"general_accuracy": 0}, "after_greedy": {"general_accuracy": 0},
                "curves": {"clip_fraction": [0.5]}}

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "preprocessor_config.json").touch()  # made before
    monkeypatch.setattr(real_lm, "train", train)
    monkeypatch.setattr(real_lm, "measured", measured)
    shown = []
    monkeypatch.setattr(real_lm, "show", shown.append)
    monkeypatch.setattr(sys, "argv", ["real_lm.py", "--runs", "cpgd:3", "grpo:0", "--steps", "8", "--folder",
                                      str(tmp_path), "--out", str(tmp_path / "out.json")])
    real_lm.main()
    start = str(tmp_path / "sft" / "stage0" / "hf")
    assert [run[:3] for run in started] == [("sft", 0, 0), ("cpgd-3", 1, 3), ("grpo-0", 1, 0)]
    assert [run[3:] for run in started[1:]] == [(8, start)] * 2
    written = (tmp_path / "out.json").read_text()
    assert str(tmp_path) not in written and json.loads(written)["runs"] == json.loads(
        json.dumps(shown[0]).replace(str(tmp_path), "runs/real-lm"))


def test_arms_differ_in_their_loss_alone(real_lm):
    configs = {arm: parse_command_line(["--stage", "1", *map(str, (*real_lm.RL, *options))])
               for arm, options in real_lm.ARMS.items()}
    same = {json.dumps(replace(config, objective=configs["cpgd"].objective).to_dict()) for config in configs.values()}
    assert len(same) == 1
    assert {(c.objective.weight, c.objective.aggregation) for c in configs.values()} == {("std", "group")}


@pytest.mark.parametrize("arm", ["sft", "cpgd", "grpo", "pg"])
def test_train_takes_folder_rows_and_options(real_lm, made, arm):
    folder = made[0]
    stage = (("--stage", 0, *real_lm.SFT) if arm == "sft" else ("--stage", 1, *real_lm.RL, *real_lm.ARMS[arm]))
    config = parse_command_line([str(part) for part in (
        *stage, "--model.path", folder / "model", "--data.path",
        folder / ("sft.jsonl" if arm == "sft" else "train.jsonl"), *real_lm.COMMON, "--data.eval-path",
        folder / "heldout.jsonl")])
    found = inspect(replace(config, run_dir=str(folder / "run")), load_processor(folder / "model"), 1)
    assert not found.rejected and not found.settings
    assert found.domains == ["general"] * real_lm.SPLITS["sft" if arm == "sft" else "train"]
    assert max(size.prompt + size.response for size in found.sizes) <= 40
