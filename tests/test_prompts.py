"""The system prompt: from the command line, before a row's messages, on a chat template, on the console, in hf/."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import runs
import torch

from cosmo_rl.cpgd import trainer
from cosmo_rl.cpgd.judges.judge import chat_judges
from cosmo_rl.cpgd.rewards.format import split_thinking
from cosmo_rl.cpgd.rollout.collect import encoder
from cosmo_rl.cpgd.run import dryrun
from cosmo_rl.cpgd.run.card import card, write_card
from cosmo_rl.cpgd.run.plan import row_size
from cosmo_rl.cpgd.run.recipes import PRESETS, THINK, parse_command, parse_command_line, recipe
from cosmo_rl.data import prompts
from cosmo_rl.data.collate import chat_text, check_prompt, encode_prompt, with_system
from cosmo_rl.data.errors import UserError
from cosmo_rl.data.prompts import check_system_prompt, introduce, read_prompt
from cosmo_rl.data.schema import RESERVED
from cosmo_rl.model import parallel
from cosmo_rl.model.load import load_processor

QWEN = (  # opens with a line of its own, as Qwen2.5-VL's does
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nYou are a helpful "
    "assistant.<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n")


@pytest.fixture
def processor() -> Any:
    """One whose chat template may be changed."""
    return load_processor(runs.MODEL)


def row(**changes):
    return replace(runs.small_rows()[0], **changes)


# -- read -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("content", "wanted"), [
    ("Think first.", "Think first."), ("\ufeffThink first.\r\nThen answer.\n\n", "Think first.\nThen answer."),
    ("\tThink\tfirst. \n", "Think\tfirst."), ("\u8bf7\u5148\u601d\u8003\u3002", "\u8bf7\u5148\u601d\u8003\u3002"),
    ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \U0001f469\u200d\U0001f52c",
     "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \U0001f469\u200d\U0001f52c"),
])
def test_a_file_gives_its_text(tmp_path, content, wanted):
    path = tmp_path / "think"
    path.write_bytes(content.encode())
    assert read_prompt(str(path)) == wanted
    assert read_prompt(wanted) == wanted


@pytest.mark.parametrize("text", [
    "Think.", "Think in <think>...</think>, and/or say so.", "\u5148<think>\u601d\u8003</think>\u3002", "x" * 5000,
    "a.b", "\u662f/\u5426", "think: first", "yes\nno", "C:\\prompts are paths", "use \\boxed{}", THINK,
])
def test_a_text_is_itself(text):
    assert read_prompt(text) == text
    assert read_prompt(f" {text}\n") == text
    assert read_prompt("") == ""


@pytest.mark.parametrize(("value", "message"), [
    (" \n", "the text is empty; fill it in, or give '' for no system prompt"),
    ("prompts/think.txt", "there is no file prompts/think.txt, or it cannot be reached; correct the path, or give the"),
    ("think.txt", "there is no file think.txt"), ("./think", "there is no file"), ("~/none/think", "there is no file"),
    ("prompt.jinja", "there is no file"), ("Think.TXT", "there is no file"), ("\u601d\u8003.txt", "there is no file"),
    ("C:\\think.md", "there is no file"), ("/", "/ is a folder or no regular file; give a file in it"),
    ("/dev/null", "/dev/null is a folder or no regular file"), (".", "is a folder"),
    *((f"Think. {token} Go on.", f"the text holds the reserved token {re.escape(token)}; remove it")
      for token in RESERVED),
    ("Think\x1b[31m first", r"holds '\\x1b' at character 6, a control character"), ("a\x00b", r"holds '\\x00' at"),
    ("a\x7fb", r"holds '\\x7f'"), ("caf\udce9", r"holds '\\udce9' at character 4, .* half a character"),
    ("a\rb", r"holds '\\r'"), ("a\u0085b", r"holds '\\x85'"),
])
def test_what_is_no_prompt_is_told_in_one_line(value, message):
    with pytest.raises(UserError, match=f"--data.system-prompt: .*{message}") as error:
        read_prompt(value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("content", "message"), [
    (b"", "the file .* is empty"), (b" \n\t\r\n", "the file .* is empty"), (b"\xef\xbb\xbf", "is empty"),
    (b"caf\xe9", r"is no UTF-8 text \(.*\); save it as UTF-8"),
    ("Think.".encode("utf-16"), "is no UTF-8 text"), ("Think.".encode("utf-16-le"), r"holds '\\x00' at character 2"),
    (b"\x89PNG\r\n\x1a\n", "is no UTF-8 text"), (b"<|im_start|>user", "the file .* holds the reserved token"),
    (b"see <|image_pad|>", "reserved token"), (b"x" * (prompts.MAX_BYTES + 1), "is longer than 1,048,576 characters"),
])
def test_a_file_that_holds_no_prompt_is_told_in_one_line(tmp_path, content, message):
    path = tmp_path / "think.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"--data.system-prompt: .*{message}") as error:
        read_prompt(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = tmp_path / "think.txt"
    path.write_text("Think.")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UserError, match=r"think\.txt cannot be read \(Permission denied\); give this user the right"):
        read_prompt(str(path))


def test_a_home_folder_and_a_fifo(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "think.txt").write_text("At home.")
    assert read_prompt("~/think.txt") == "At home."
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is a folder or no regular file"):
        read_prompt(str(tmp_path / "pipe"))


def test_the_config_holds_the_words_and_not_the_file(tmp_path):
    for number in ("1", "2"):
        (tmp_path / number).write_text("Think first.\n")
    one, two = (parse_command_line(["--data.system-prompt", str(tmp_path / number)]) for number in ("1", "2"))
    assert one.data.system_prompt == "Think first." and one.hash() == two.hash()
    assert parse_command(["--data.system-prompt", str(tmp_path / "1")]).config == one
    assert parse_command_line(["--data.system-prompt", "Think."]).hash() != one.hash()
    assert one.identity()["data"]["system_prompt"] == "Think first."
    assert parse_command_line(["--preset", "7b", "--data.system-prompt", ""]).data.system_prompt == ""


@pytest.mark.parametrize("parse", [parse_command, parse_command_line])
def test_a_bad_prompt_ends_the_command(parse, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--data.system-prompt", "no/such.txt"])
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith("train.py: --data.system-prompt: there is no file no/such.txt")


# -- the recipes ------------------------------------------------------------------------------------------------------

def test_full_presets_ask_for_what_format_pays():
    assert {recipe(preset, stage).data.system_prompt for preset in PRESETS[1:] for stage in range(3)} == {THINK}
    assert read_prompt(THINK) == THINK
    example = THINK[THINK.index("like this:") + len("like this:"):]
    assert split_thinking(example) == ("reasoning process here", "final thought and answer here.")
    assert not any(recipe("tiny", stage).data.system_prompt for stage in range(3))


# -- before a row -----------------------------------------------------------------------------------------------------

def test_a_rows_own_system_message_wins():
    user = {"role": "user", "content": "q"}
    own = {"role": "system", "content": "Own."}
    assert with_system([user], "Think.") == [{"role": "system", "content": "Think."}, user]  # type: ignore[list-item]
    assert with_system([own, user], "Think.") == [own, user]  # type: ignore[list-item]
    assert with_system([user], "") == [user]  # type: ignore[list-item]


def test_it_is_encoded_and_counted(processor):
    plain, system = row(), "think first"
    message: Any = {"role": "system", "content": system}
    limits: Any = {"max_prompt_tokens": 512}
    got = encode_prompt(plain, processor, max_image_pixels=10**6, system_prompt=system, **limits)
    written = replace(plain, messages=(message, *plain.messages))
    wanted = encode_prompt(written, processor, max_image_pixels=10**6, **limits)
    without = encode_prompt(plain, processor, max_image_pixels=10**6, **limits)
    assert got.input_ids.tolist() == wanted.input_ids.tolist() != without.input_ids.tolist()
    assert got.position_ids.tolist() == wanted.position_ids.tolist()
    own = encode_prompt(written, processor, max_image_pixels=10**6, system_prompt="another", **limits)
    assert own.input_ids.tolist() == wanted.input_ids.tolist()
    assert check_prompt(plain, processor, system_prompt=system, **limits)[0] == len(got.input_ids)
    config = runs.config()
    told = replace(config, data=replace(config.data, system_prompt=system))
    assert row_size(plain, told, processor).prompt - row_size(plain, config, processor).prompt == (
        len(got.input_ids) - len(without.input_ids)) > 0
    with pytest.raises(UserError, match=f"prompt of {len(got.input_ids)} tokens"):
        check_prompt(plain, processor, max_prompt_tokens=len(got.input_ids) - 1, system_prompt=system)
    assert plain.messages == runs.small_rows()[0].messages, "the row itself stays, and so what judges and reports see"


def test_training_and_evaluation_encode_with_it(processor):
    config = runs.config()
    config = replace(config, data=replace(config.data, system_prompt="think first"))
    got = encoder(config.data, processor)(row())
    assert "system\nthink first" in processor.tokenizer.decode(got.input_ids)


def test_judges_do_not_see_it():
    """They take the row's messages, and leave out even the system message that a row brings."""
    message: Any = {"role": "system", "content": "swordfish"}
    asked = row(messages=(message, *row().messages))
    for judge in chat_judges().values():
        assert "swordfish" not in str(judge.build(judge.rules, asked, "an answer"))


# -- on a chat template -----------------------------------------------------------------------------------------------

def test_it_stands_in_place_of_the_templates_own_line(processor):
    processor.tokenizer.chat_template = QWEN
    assert "You are a helpful assistant." in chat_text(row(), processor, "")
    text = chat_text(row(), processor, "Think.")
    assert text.startswith("<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\n") and "helpful" not in text
    check_system_prompt("Think.", processor, max_prompt_tokens=100)


@pytest.mark.parametrize("template", [
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }}{% endif %}{% endfor %}",
    "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
    "{% for m in messages %}{{ m['content'][:3] }}{% endfor %}",
])
def test_a_template_that_drops_or_changes_it_is_refused(processor, template):
    processor.tokenizer.chat_template = template
    with pytest.raises(UserError, match="the model's chat template leaves the system message out, or changes it"):
        check_system_prompt("Think first.", processor, max_prompt_tokens=100)
    check_system_prompt("", processor, max_prompt_tokens=100)


def test_special_tokens_and_lengths(processor):
    for token in ("<|box_start|>", "<|quad_end|>"):
        with pytest.raises(UserError, match=f"holds the special token {re.escape(token)}; remove it"):
            check_system_prompt(f"Look at {token}.", processor, max_prompt_tokens=100)
    with pytest.raises(UserError, match=r"alone is \d+ tokens, and --data.max-prompt-tokens is 20; shorten it"):
        check_system_prompt("think " * 50, processor, max_prompt_tokens=20)


# -- shown ------------------------------------------------------------------------------------------------------------

def test_the_prompts_are_shown_as_the_model_sees_them(processor):
    shown = introduce("Think\nfirst.", row(id="r\x1b1"), processor)
    lines = shown.split("\n")
    tokens = len(processor.tokenizer("Think\nfirst.")["input_ids"])
    assert lines[0] == f"system prompt (--data.system-prompt): {tokens} tokens"
    assert lines[1:3] == ["  Think", "  first."] and lines[3] == "first prompt (row r\\x1b1), as the model sees it:"
    assert "\n".join(line[2:] for line in lines[4:]) == chat_text(row(), processor, "Think\nfirst.").rstrip("\n")
    assert shown.count("<|image_pad|>") == 1, "not expanded"
    message: Any = {"role": "system", "content": "Own."}
    own = introduce("Think.", row(messages=(message, *row().messages)), processor)
    assert "with a system message of its own" in own and "  <|im_start|>system\n  Own.<|im_end|>" in own
    assert introduce("", row(), processor).startswith("system prompt (--data.system-prompt): none\nfirst prompt (row ")


def test_what_is_shown_is_safe_and_short(processor):
    assert "\n  caf\\xe9\n" in introduce("caf\xe9", row(), processor, "ascii")
    shown = introduce("a" * 1000 + "b" * 5000 + "c" * 500, row(), processor)
    assert "\n  " + "a" * 1000 + " [... 5,000 characters ...] " + "c" * 500 + "\n" in shown
    assert "\n  a\\x1b[2J\\r\\u202eb\\tc\n  d\n" in introduce("a\x1b[2J\r\u202eb\tc\nd", row(), processor)


def test_the_dry_run_shows_and_counts_it(tmp_path, capsys, monkeypatch):
    rows = [replace(r, id=f"r{i}") for i, r in enumerate(runs.small_rows()[:4])]
    message: Any = {"role": "system", "content": "Own."}
    rows[1] = replace(rows[1], messages=(message, *rows[1].messages))
    path = runs.write_rows(tmp_path / "rows.jsonl", rows)
    config = recipe("tiny", 2)
    config = replace(config, data=replace(config.data, path=(str(path),), mix=(), system_prompt="Think caf\xe9."))
    assert dryrun.dry_run(config) == 0
    out = capsys.readouterr().out
    assert "\n  Think caf\xe9.\nfirst prompt (row r0), as the model sees it:\n  <|im_start|>system\n  Think caf" in out
    assert "note: 1 rows have a system message of their own, which stands in place of --data.system-prompt" in out
    bad = replace(config, data=replace(config.data, system_prompt="Look <|box_start|>"))
    assert dryrun.dry_run(bad) == 1 and "train.py: --data.system-prompt holds" in capsys.readouterr().err


# -- hf/ --------------------------------------------------------------------------------------------------------------

def test_the_card_holds_the_prompt_word_for_word(tmp_path):
    config = recipe("7b", 2)
    text = card(config, tmp_path / "secret" / "Qwen2.5-VL-7B")
    assert "# cosmo-rl, stage 2: safety, value and general" in text and "started from `Qwen2.5-VL-7B`" in text
    assert f"```text\n{THINK}\n```" in text and "secret" not in text and "Preset 7b, 2400 optimizer steps" in text
    assert "Rewarded was the form `<think>...</think>`" in text
    assert "started from `stage1/hf`" in card(config, tmp_path / "stage1" / "hf")
    odd = replace(config, data=replace(config.data, system_prompt="Write\n````\ncode\n````"))
    assert "`````text\nWrite\n````\ncode\n````\n`````" in card(odd, tmp_path)
    plain = card(recipe("tiny", 2), tmp_path)
    assert "None: give no system message" in plain and "```" not in plain
    unformed = replace(config, reward=replace(config.reward, format=0.0))
    assert "No form was rewarded" in card(unformed, tmp_path) and "`chosen`" in card(recipe("7b", 0), tmp_path)
    write_card(tmp_path, config, tmp_path)
    assert (tmp_path / "README.md").read_text() == card(config, tmp_path)


def test_a_run_shows_records_and_exports_it(tmp_path):
    """Two ranks, from a file; the stage after it loads the exported folder."""
    path = runs.write_rows(tmp_path / "rows.jsonl", runs.small_rows())
    (tmp_path / "think.txt").write_text("Think in <think>...</think>.\n")
    command = [*runs.from_file(path), "--data.system-prompt", tmp_path / "think.txt", "--model.path", runs.MODEL]
    done = runs.train(runs.small(*command, "--steps", 2, "--run-dir", tmp_path / "run"), tmp_path / "logs", ranks=2)
    done.check()
    stage = tmp_path / "run" / "stage2"
    assert json.loads((stage / "config.json").read_text())["data"]["system_prompt"] == "Think in <think>...</think>."
    assert done.out[0].count("system prompt (--data.system-prompt): ") == 1 and "system prompt" not in done.out[1]
    assert "<|im_start|>system\n  Think in <think>...</think>.<|im_end|>" in done.out[0]
    assert "Think in <think>...</think>." in (stage / "hf" / "README.md").read_text()
    assert load_processor(stage / "hf").tokenizer.chat_template
    (tmp_path / "think.txt").write_text("Think twice.\n")
    again = runs.train(runs.small(*command, "--steps", 2, "--run-dir", tmp_path / "run"), tmp_path / "logs")
    assert again.code == 1 and "data.system_prompt is 'Think in" in again.err[0] and "Think twice" in again.err[0]


def test_ranks_that_read_different_prompts_stop(monkeypatch):
    """As where one host lacks the file, whose name is then taken for the prompt."""
    run: Any = SimpleNamespace(path=Path("run"), stage_dir=Path("run/stage2"))
    monkeypatch.setattr(parallel, "together", lambda action: [action(), "prompts/think"])
    with pytest.raises(UserError, match=r"--data\.system-prompt is not the same on all ranks; put its file on every"):
        trainer.Trainer(runs.config(), run, torch.device("cpu"))
