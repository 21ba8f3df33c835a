"""--dry-run: every bad row by reason, the numbers that training would meet, no weights, nothing written."""

# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportCallIssue=false

import io
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import runs
import torch
from rich.console import Console
from transformers import Qwen2_5_VLForConditionalGeneration

from cosmo_rl.cpgd.config import Config
from cosmo_rl.cpgd.run import dryrun, plan
from cosmo_rl.cpgd.run.dryrun import Findings, inspect, show
from cosmo_rl.cpgd.run.footprint import by_phase, count_parameters
from cosmo_rl.cpgd.run.recipes import recipe
from cosmo_rl.cpgd.update import BuildUpdates
from cosmo_rl.data.collate import TokenSequence, encode_prompt
from cosmo_rl.data.prepare.mini import mini_rows, safety_rows
from cosmo_rl.data.sampler import PromptSampler
from cosmo_rl.data.terminal import printable
from cosmo_rl.model.tiny import TINY_PATH

PARAMETERS = count_parameters(runs.policy_processor().config, True)


@pytest.fixture
def rows(tmp_path):
    return runs.write_rows(tmp_path / "data" / "rows.jsonl", runs.small_rows())


def settings(path, stage: int = 2, **data) -> Config:
    base = recipe("tiny", stage)
    return replace(base, data=replace(base.data, path=(str(path),), mix=(), **data))


def look(config: Config, world_size: int = 1) -> Findings:
    return inspect(config, runs.policy_processor(), world_size)


def shown(found: Findings, config: Config, encoding: str = "utf-8") -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    show(found, config, TINY_PATH, 1, Console(file=file, width=100, markup=False, highlight=False, emoji=False))
    file.seek(0)
    return file.read()


def spoil(path, changes: dict[int, dict]) -> None:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for i, change in changes.items():
        records[i] |= change
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_bad_rows_are_told_by_reason_without_weights(tmp_path, rows):
    """As users call it, on two ranks, with a model folder that holds no weights."""
    model = tmp_path / "model"
    shutil.copytree(TINY_PATH, model, ignore=shutil.ignore_patterns("*.safetensors"))
    assert not list(model.glob("*.safetensors"))
    image = json.loads(rows.read_text().splitlines()[0])["images"][0]
    for i in (3, 7, 8, 10):
        (rows.parent / f"cut{i}.png").write_bytes((rows.parent / image).read_bytes()[:60])
    long = {"messages": [{"role": "user", "content": "how " * 600}], "images": []}
    spoil(rows, {1: {"task": "saftey"}, 2: {"images": ["none.png"]}, 5: {"task": "value", "answer": None},
                 11: long, 12: {"id": json.loads(rows.read_text().splitlines()[0])["id"]},
                 **{i: {"images": [f"cut{i}.png"]} for i in (3, 7, 8, 10)}})
    done = runs.train(["--dry-run", "--stage", 2, *runs.from_file(rows), "--model.path", model, "--run-dir",
                       tmp_path / "run"], tmp_path / "logs", ranks=2)
    assert done.codes == [1, 0] and done.out[1] == "" and "Traceback" not in "".join(done.err), done
    text = " ".join(done.out[0].split())
    assert "rejected: 9, for 6 reasons" in text
    assert f"4 field `images[0]`: {rows.parent / 'cut3.png'} is corrupt or cut off" in text
    assert f"at: {rows}:4, {rows}:8, {rows}:9, ..." in text and f"{rows}:11" not in text
    for told, line in (("field `task`: unknown task 'saftey'", 2), ("none.png does not exist", 3),
                       ("there is no reward rule for task value", 6), ("is over the budget of 512", 12),
                       ("field `id`: ", 13)):
        assert told in text and f"at: {rows}:{line} " in text + " ", told
    assert "15 rows" in text and "2 ranks" in text and not (tmp_path / "run").exists()
    assert max(map(len, done.out[0].splitlines())) <= 100


def test_each_problem_of_a_row_is_told_and_the_row_counted_once(rows):
    spoil(rows, {1: {"task": "saftey", "solution": "x", "answer": None}, 2: {"task": "saftey", "messages": None},
                 3: {"options": ["", "a", ""]}})
    config = settings(rows)
    text = " ".join(shown(look(config), config).split())
    assert "rejected: 3, for 4 reasons" in text
    for told in ("2 field `task`: unknown task 'saftey'", "1 field `solution`: there is no such field",
                 "mend: did you mean `answer`?", "1 field `messages`: is missing", "1 field `options[0]`: is empty"):
        assert told in text, text


def test_no_weights_are_read_where_there_are_some(rows, monkeypatch):
    monkeypatch.setattr(Qwen2_5_VLForConditionalGeneration, "from_pretrained",
                        lambda *_, **__: pytest.fail("weights were read"))
    assert dryrun.dry_run(settings(rows)) == 0


def test_good_rows_give_the_numbers_of_training(rows, monkeypatch):
    """The fullest micro-batch is the one that training builds from responses at their longest."""
    monkeypatch.setattr(dryrun, "ITERATIONS", 1)
    processor, all_rows = runs.policy_processor(), runs.small_rows()
    prompts = [encode_prompt(row, processor, max_prompt_tokens=512, max_image_pixels=10**6) for row in all_rows]
    for layout, budget, updates in (("padded", 700, 3), ("packed", 900, 1)):
        config = settings(rows)
        config = replace(config, rollout=replace(config.rollout, prompts=10, group_size=4, max_new_tokens=7),
                         optim=replace(config.optim, updates_per_rollout=updates),
                         batch=replace(config.batch, layout=layout, max_tokens=budget))
        found = look(config)
        assert not found.rejected and not found.settings
        assert [(size.prompt, size.image) for size in found.sizes] == [
            (len(prompt.input_ids), prompt.mm_token_type_ids.sum()) for prompt in prompts]
        drawn = PromptSampler([row.domain for row in all_rows], {}, config.seed).take(10)
        build = BuildUpdates(batch=config.batch, objective=config.objective, aggregation="token", processor=processor,
                             device=torch.device("cpu"))
        micros = []
        for part in np.array_split(drawn, updates):
            sequences = [TokenSequence(prompts[i], np.full(7, 100)) for i in part for _ in range(4)]
            micros += build(sequences, [0.0] * len(sequences), np.repeat(np.arange(len(part)), 4).tolist(), len(part))
        fullest = max(micros, key=lambda micro: micro.batch.input_ids.numel())
        assert found.load.tokens == fullest.batch.input_ids.numel() <= budget
        same = [micro for micro in micros if micro.batch.input_ids.numel() == found.load.tokens]
        assert (found.load.targets, found.load.sequences) in [(len(m.batch.targets), len(m.members)) for m in same]
        assert found.load.patches in [0 if m.batch.num_dummy_images else len(m.batch.pixel_values) for m in same]
        assert look(config, world_size=2).load.tokens <= found.load.tokens


def test_the_fullest_micro_batch_is_the_one_that_takes_the_most(rows):
    """A text of a token more than a prompt with an image must not hide the image's patches."""
    text = {"messages": [{"role": "user", "content": "how " * 20}], "images": []}
    spoil(rows, {0: text})
    config = settings(rows)
    config = replace(config, rollout=replace(config.rollout, prompts=24, group_size=2, max_new_tokens=4),
                     model=replace(config.model, freeze_vision=False),
                     batch=replace(config.batch, layout="packed", max_tokens=40))
    found = look(config)
    longest = max(found.sizes)
    assert longest.image == 0 and found.load.sequences == 1
    assert found.load.patches > 0 and found.load.tokens < longest.prompt + longest.response
    assert "tower activations" in [term.name for term in found.terms]


def test_a_problem_may_quote_a_semicolon_of_the_row(rows):
    spoil(rows, {0: {"task": "math", "answer": "x; \\frac{"}})
    told = next(one for one in look(settings(rows)).rejected if "math-verify" in one.problem)
    assert told.problem.startswith("`answer` 'x; ") and told.mend.startswith("write it as LaTeX")
    faults = plan.Faults()
    faults.reject("f:1", "it has no mend")
    assert faults.rejected[0].mend == "correct or drop the row"


def test_stage_0_counts_the_tokens_of_chosen(rows):
    processor = runs.policy_processor()
    spoil(rows, {i: {"chosen": "sure " * (i + 1)} for i in range(20)})
    found = look(settings(rows, stage=0))
    assert len(found.sizes) == 20 and len(found.rejected) == 4
    assert [size.response for size in found.sizes] == [
        len(processor.tokenizer("sure " * (i + 1), add_special_tokens=False)["input_ids"]) + 1 for i in range(20)]
    assert {one.problem for one in found.rejected} == {"stage 0 imitates `chosen`, which is missing"}
    text = shown(found, settings(rows, stage=0))
    assert "chosen" in text and "drop the row" in text


def test_rows_of_an_evaluation_set(tmp_path, rows):
    held = runs.write_rows(tmp_path / "held" / "rows.jsonl", safety_rows("validation")[:1])
    found = look(settings(rows, evaluation_sets=(f"siuo={held}",)))
    assert found.rejected and all("it is in evaluation set siuo" in one.problem for one in found.rejected)
    assert len(found.sizes) == 24 - len(found.rejected)
    kept = look(settings(rows, evaluation_sets=(f"siuo={held}",), contaminated="report"))
    told = [note for note in kept.notes if "it is in evaluation set siuo" in note]
    assert not kept.rejected and len(kept.sizes) == 24 and len(told) == len(found.rejected)
    spoil(held, {0: {"task": "poetry"}})  # a bad evaluation row is told too
    assert [one.field for one in look(settings(rows, evaluation_sets=(f"siuo={held}",))).rejected] == ["task"]


def test_evaluation_rows_are_short_enough(tmp_path, rows):
    held = runs.write_rows(tmp_path / "held" / "rows.jsonl", runs.held_rows())
    config = settings(rows, eval_path=(str(held),))
    assert not look(config).rejected
    long = {"messages": [{"role": "user", "content": "how " * 600}], "images": []}
    spoil(held, {1: long, 3: long})
    found = look(config)
    assert {one.where for one in found.rejected} == {f"{held}:2", f"{held}:4"} and len(found.sizes) == 24
    assert all("is over the budget of 512" in one.problem for one in found.rejected)
    assert len({one.mend for one in found.rejected}) == 1, "one reason"
    first = replace(config, eval=replace(config.eval, max_rows=1))
    assert [one.where for one in look(first).rejected] == [f"{held}:2"], "no evaluation reads the other"


def test_a_guard_has_rows_to_watch(tmp_path, rows):
    held = runs.write_rows(tmp_path / "held" / "rows.jsonl", runs.held_rows())
    wanted = "has no rows to watch; give general rows with an answer or benign safety rows with --data.eval-path"

    def guarded(guard, **data):
        config = settings(rows, **data)
        return look(replace(config, eval=replace(config.eval, every=1, guard=guard)))

    found = guarded("stop")
    assert found.settings == [f"--eval.guard stop {wanted}"] and not found.rejected and found.load
    assert dryrun.dry_run(replace(settings(rows), eval=replace(settings(rows).eval, every=1, guard="stop"))) == 1
    found = guarded("warn")
    assert not found.settings and f"--eval.guard warn {wanted}" in found.notes
    assert not guarded("stop", eval_path=(str(held),)).settings
    runs.write_rows(held, [row for row in runs.held_rows() if row.tags and row.tags["combined"] == "unsafe"])
    assert guarded("stop", eval_path=(str(held),)).settings, "unsafe rows are not watched"


@pytest.mark.parametrize(("change", "wanted"), [
    (lambda c: replace(c, data=replace(c.data, mix=("safty=1",))), "names domain 'safty', which no row has"),
    (lambda c: replace(c, reward=replace(c.reward, format=0, visual_focus=0, helpful=0, task_aware=0)),
     "every reward weight is 0"),
    (lambda c: replace(c, data=replace(c.data, max_prompt_tokens=2)), "no row is left to train on"),
])
def test_what_is_wrong_beside_the_rows_is_told(rows, change, wanted, capsys):
    config = change(settings(rows))
    found = look(config)
    assert len(found.settings) == 1 and wanted in found.settings[0]
    assert dryrun.dry_run(config) == 1 and wanted in " ".join(capsys.readouterr().out.split())


def test_other_errors_are_one_line(rows, capsys):
    config = settings(rows)
    assert dryrun.dry_run(replace(config, model=replace(config.model, path="/nowhere"))) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("train.py: model folder /nowhere does not exist") and err.count("\n") == 1


def test_shares_lengths_and_bars(rows):
    config = settings(rows)
    found = look(config)
    text = shown(found, config)
    lines = [line.split() for line in text.splitlines()]
    assert ["general", "12", "50.0%", "general", "12"] in lines and ["unsafe", "4", "16.7%", "safety", "4"] in lines
    mixed = replace(config, data=replace(config.data, mix=("general=1", "unsafe=3")))
    lines = [line.split() for line in shown(look(mixed), mixed).splitlines()]
    assert ["general", "12", "25.0%", "general", "12"] in lines and ["unsafe", "4", "75.0%", "safety", "4"] in lines
    assert ["safe_text", "4", "0.0%", "safety", "4"] in lines
    lengths = np.array([size.prompt for size, task in zip(found.sizes, found.tasks, strict=True) if task == "general"])
    line = next(line for line in text.splitlines() if line.startswith("general") and " prompt " in line).split()
    assert line[2:6] == [f"{x:,.0f}" for x in (lengths.min(), np.median(lengths), np.percentile(lengths, 95),
                                               lengths.max())]
    assert "ESTIMATED" in text and "masters, gradients, Adam" in text and "rejected: 0" in text
    plain = shown(found, config, "ascii")
    assert plain.isascii() and max(map(len, plain.splitlines())) <= 100 >= max(map(len, text.splitlines()))
    assert dryrun._bars(np.array([0, 1, 50, 100]), False) == " .=@"


def test_the_embedded_data_passes(monkeypatch):
    """The rows of validation, which are of the same make and fewer."""
    monkeypatch.setattr(plan, "embedded_rows", lambda config: mini_rows(config.stage, "validation")[::5])
    for stage in (0, 1, 2):
        config = recipe("tiny", stage)
        config = replace(config, data=replace(config.data, mix=config.data.mix if stage else ()),
                         eval=replace(config.eval, every=1, guard="stop", max_rows=20))
        found = look(config)
        assert not found.rejected and not found.settings and found.load.tokens <= config.batch.max_tokens
        assert set(config.data.shares()) == set(found.shares) and "rejected: 0" in shown(found, config)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="preset 7b has no embedded data"):
        look(recipe("7b", 2))


def test_what_no_rule_can_measure_and_what_words_would_reward_is_told(tmp_path, rows):
    held = tmp_path / "held" / "rows.jsonl"
    runs.write_rows(held, [replace(row, id=f"held-{i}") for i, row in enumerate(runs.held_rows())])
    spoil(held, {6: {"task": "value", "answer": None}, 7: {"task": "math", "answer": r"\\frac{"}})
    config = settings(rows, eval_path=(str(held),))
    notes = look(config).notes
    assert notes[0].startswith("evaluation: 2 rows are not measured, as no rule can use them; the first: row held-6: ")
    assert "row held-7: `answer`" in notes[0] and len(notes) == 2
    assert notes[1].startswith("WARNING: rewarded by word rules: Task-Aware of safety rows, Helpful of all rows ")
    assert not look(settings(rows, stage=0)).notes, "nothing is rewarded"
    assert not look(replace(recipe("tiny", 1), data=replace(recipe("tiny", 1).data, eval_path=()))).notes
def test_flash_attention_that_is_missing_is_refused(rows, capsys):
    """In one line with both mends, however narrow the terminal is."""
    config = settings(rows)
    config = replace(config, model=replace(config.model, attention="flash_attention_2"))
    assert dryrun.dry_run(config) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "flash" in line]
    assert line == ("problem: --model.attention flash_attention_2 is not installed (or sees no GPU); install it with `"
                    "pip install flash-attn --no-build-isolation`, or give --model.attention sdpa")
    assert not look(settings(rows)).settings


def test_liger_that_cannot_run_is_refused(rows):
    config = settings(rows)
    found = look(replace(config, model=replace(config.model, liger="on")))
    assert len(found.settings) == 1 and "--model.liger on needs" in found.settings[0]


@pytest.fixture
def held(tmp_path):
    return runs.write_rows(tmp_path / "held" / "rows.jsonl", runs.held_rows())


def with_memory(monkeypatch, num_bytes: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=num_bytes))


def test_an_evaluation_that_cannot_fit_is_refused(rows, held, monkeypatch):
    """Its largest call is that of the held-out rows, twice as many as of a rollout."""
    config = settings(rows, eval_path=(str(held),))
    config = replace(config, rollout=replace(config.rollout, batch_size=2, prompts=4, group_size=2),
                     batch=replace(config.batch, max_tokens=100))
    found = look(config)
    calls = dryrun._calls(found, config, runs.policy_processor(), PARAMETERS)
    groups = {name: len(prompts) for name, prompts in found.asked.items()}
    assert sum(groups.values()) == 10 and calls["evaluation"].requests == max(groups.values()) > 1
    assert calls["evaluation"].prompt_tokens == max(p.prompt for prompts in found.asked.values() for p in prompts)
    assert calls["evaluation"].patches > 0 and not found.settings
    sizes = by_phase(found.terms)
    assert sizes["evaluation"] > sizes["rollout"]
    of_phase = lambda config, phase: [text for text in look(config).settings if text.startswith(f"the {phase} takes")]
    with_memory(monkeypatch, sizes["evaluation"] - 1)
    (problem,) = of_phase(config, "evaluation")
    assert "an estimated 0.0 GiB of a rank's memory, and this GPU has 0.0; lower --rollout.cache-gib or" in problem
    single = replace(config, rollout=replace(config.rollout, batch_size=1))
    assert not of_phase(single, "evaluation"), "the mend works"
    assert not of_phase(config, "rollout") and len(of_phase(config, "update")) == 1
    with_memory(monkeypatch, sizes["evaluation"])
    assert not of_phase(config, "evaluation")
    assert "evaluation" not in by_phase(look(settings(rows)).terms), "without rows there is none"


def test_without_a_gpu_what_no_gpu_could_hold_is_refused(rows, monkeypatch):
    config = settings(rows)
    monkeypatch.setattr(dryrun, "LARGEST_GPU", by_phase(look(config).terms)["always"] - 1)
    (problem,) = look(config).settings
    assert "what always lies there takes" in problem and "the largest GPU has" in problem and "--model.dtype" in problem


def test_an_evaluation_beyond_the_models_positions_is_refused(rows, held):
    config = settings(rows, eval_path=(str(held),))
    longest = max(p.prompt for prompts in look(config).asked.values() for p in prompts)
    limit = lambda new: replace(config, rollout=replace(config.rollout, max_new_tokens=new))
    assert not look(limit(2048 - longest)).rejected
    found = look(limit(2049 - longest))
    assert found.rejected and all(one.where.startswith(f"{held}:") for one in found.rejected)
    assert "are beyond the model's 2048 positions" in found.rejected[0].problem
    assert found.rejected[0].mend == "lower --rollout.max-new-tokens, or drop the row"


@pytest.mark.parametrize("domain", ["[/x]", "[bold]b", "a\x1b[2Jb", "two\nlines", ":smile:"])
def test_any_name_of_a_domain_can_be_shown(rows, domain):
    spoil(rows, {i: {"domain": domain} for i in range(5)} | {6: {"task": f"poem {domain}"}})
    config = settings(rows)
    text = shown(look(config), config)
    assert printable(domain) in text and "\x1b" not in text
    assert any(line.split()[-1:] and line.startswith(printable(domain)) for line in text.splitlines())
