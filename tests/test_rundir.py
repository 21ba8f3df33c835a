import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from cosmo_rl.cpgd.config import Config, ObjectiveConfig
from cosmo_rl.cpgd.run.ending import LONGEST
from cosmo_rl.cpgd.run.rundir import RunDir
from cosmo_rl.data.disk import replace_file
from cosmo_rl.data.errors import UserError
from cosmo_rl.model.parallel import together

CONFIG = Config()


def test_new_stage_keeps_its_settings(tmp_path):
    run = RunDir(tmp_path / "a" / "b", 2, CONFIG)
    assert run.stage_dir == tmp_path / "a" / "b" / "stage2"
    assert not run.finished
    assert json.loads((run.stage_dir / "config.json").read_text()) == CONFIG.to_dict()
    run.close()
    RunDir(tmp_path / "a" / "b", 2, replace(CONFIG, run_dir="elsewhere", resume="never")).close()


def test_default_path_names_the_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = RunDir("", 0, CONFIG)
    assert run.stage_dir.resolve() == tmp_path / "runs" / "tiny" / "stage0"
    run.close()


def test_other_settings_are_all_named(tmp_path):
    RunDir(tmp_path, 2, CONFIG).close()
    (tmp_path / "stage2" / "metrics.jsonl").write_text('{"step": 1}\n')
    other = replace(CONFIG, seed=7, objective=ObjectiveConfig(drift_coef=0.5))
    with pytest.raises(ValueError, match=r"objective\.drift_coef is 0\.01 there and 0\.5 here; seed is 0 there and 7 "):
        RunDir(tmp_path, 2, other)
    RunDir(tmp_path, 1, other).close()  # another stage of the same run may differ
    RunDir(tmp_path, 2, CONFIG).close()  # and the refused try left no lock


@pytest.mark.parametrize("trained", [
    "metrics.jsonl", "checkpoints/step-000002/state.json", "report.json", "hf/config.json"])
def test_settings_bind_once_a_step_is_taken(tmp_path, trained):
    """A first try that stopped over bad input may be repeated with the mended option."""
    RunDir(tmp_path, 2, CONFIG).close()
    stage = tmp_path / "stage2"
    for name in ("before.json", "metrics.jsonl", "init/config.json"):  # measured, and made, with the old settings
        (stage / name).parent.mkdir(exist_ok=True)
        (stage / name).write_text("")
    other = replace(CONFIG, seed=7)
    RunDir(tmp_path, 2, other).close()
    assert json.loads((stage / "config.json").read_text()) == other.to_dict()
    assert sorted(path.name for path in stage.iterdir()) == ["config.json", "metrics.jsonl"]
    (stage / trained).parent.mkdir(parents=True, exist_ok=True)
    (stage / trained).write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="seed is 7 there and 0 here"):
        RunDir(tmp_path, 2, CONFIG)


def test_never_refuses_what_is_there(tmp_path):
    RunDir(tmp_path, 2, CONFIG, "never").close()
    with pytest.raises(ValueError, match=r"--resume never: .*stage2 is not empty \(config\.json\); give another"):
        RunDir(tmp_path, 2, CONFIG, "never")


def test_foreign_and_damaged_folders(tmp_path):
    (tmp_path / "stage2").mkdir()
    (tmp_path / "stage2" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"thesis\.tex.* has no config\.json"):
        RunDir(tmp_path, 2, CONFIG)
    assert (tmp_path / "stage2" / "thesis.tex").exists()
    (tmp_path / "stage2" / "config.json").write_text('{"seed": ')
    with pytest.raises(ValueError, match=r"config\.json is damaged .* give another --run-dir"):
        RunDir(tmp_path, 2, CONFIG)


FREED = replace(CONFIG, steps=200, rollout=replace(CONFIG.rollout, batch_size=8),
                checkpoint=replace(CONFIG.checkpoint, keep=5), reward=replace(CONFIG.reward, failure_budget=0.5))
CHANGES = ["checkpoint.keep 2 -> 5", "reward.failure_budget 0.1 -> 0.5", "rollout.batch_size 64 -> 8",
           "steps 100 -> 200"]


def trained(folder, config=CONFIG):
    """A stage in which a step was taken."""
    RunDir(folder, 2, config).close()
    (folder / "stage2" / "metrics.jsonl").write_text('{"step": 1}\n')
    return folder / "stage2" / "config.json"


def test_what_may_change_is_kept_once_the_run_goes_on(tmp_path, caplog):
    caplog.set_level("INFO")
    saved = trained(tmp_path)
    run = RunDir(tmp_path, 2, replace(FREED, run_dir=str(tmp_path)))
    assert run.changed == CHANGES
    assert json.loads(saved.read_text()) == CONFIG.to_dict(), "the resume may still be refused"
    run.adopt(FREED)
    assert json.loads(saved.read_text()) == FREED.to_dict()
    assert caplog.messages == [f"settings changed since the last start: {', '.join(CHANGES)}; the learning rate "
                               "now falls to step 200"]
    run.close()
    again = RunDir(tmp_path, 2, FREED)
    again.adopt(FREED)
    assert not again.changed and len(caplog.messages) == 1, "said once"
    again.close()


def test_without_other_steps_nothing_is_said_of_the_learning_rate(tmp_path, caplog):
    caplog.set_level("INFO")
    trained(tmp_path)
    other = replace(CONFIG, model=replace(CONFIG.model, attention="flash_attention_2"))
    run = RunDir(tmp_path, 2, other)
    run.adopt(other)
    run.close()
    assert caplog.messages == ["settings changed since the last start: model.attention 'sdpa' -> 'flash_attention_2'"]


def test_long_settings_leave_room_for_the_mend(tmp_path):
    """As two system prompts: torchrun's summary shows one line of some length."""
    prompted = lambda text: replace(CONFIG, data=replace(CONFIG.data, system_prompt=text * 700))
    RunDir(tmp_path, 2, prompted("a")).close()
    (tmp_path / "stage2" / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=r"data\.system_prompt is 'a+ \[\.\.\. 552 characters \.\.\.\] a+' there and 'b+"
                                        r".*another --run-dir, or remove the folder$") as caught:
        RunDir(tmp_path, 2, prompted("b"))
    assert len(str(caught.value)) < LONGEST


def test_a_free_setting_does_not_carry_another_along(tmp_path):
    saved = trained(tmp_path)
    with pytest.raises(ValueError, match=r"other settings: seed is 0 there and 7 here\. Repeat"):
        RunDir(tmp_path, 2, replace(FREED, seed=7))
    assert json.loads(saved.read_text()) == CONFIG.to_dict()


def test_finished_when_the_report_is_there(tmp_path):
    RunDir(tmp_path, 2, CONFIG).close()
    replace_file(tmp_path / "stage2" / "report.json", '{"steps": 100}')
    run = RunDir(tmp_path, 2, replace(CONFIG, log=replace(CONFIG.log, samples=0)))
    assert run.finished
    run.close()
    for steps in (99, 200):
        with pytest.raises(ValueError, match=rf"is finished after 100 steps, and --steps is {steps}; give --steps 100 "
                                             r".*--model\.path .*stage2/hf"):
            RunDir(tmp_path, 2, replace(CONFIG, steps=steps))
    RunDir(tmp_path, 2, CONFIG).close()  # and the refused tries left no lock


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "7"])
def test_a_damaged_report_is_named(tmp_path, content):
    RunDir(tmp_path, 2, CONFIG).close()
    (tmp_path / "stage2" / "report.json").write_text(content)
    with pytest.raises(UserError, match=r"report\.json is damaged .* restore it, or remove it to have it made anew"):
        RunDir(tmp_path, 2, CONFIG)


def test_cannot_write(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to run directory .*file/run: Not a directory.*another"):
        RunDir(tmp_path / "file" / "run", 2, CONFIG)


def test_lock_names_its_holder_and_waits(tmp_path):
    first = RunDir(tmp_path, 2, CONFIG)
    started = time.monotonic()
    with pytest.raises(ValueError, match=rf"in use by process {os.getpid()} on \S+ \(waited 0\.3 s\)"):
        RunDir(tmp_path, 0, CONFIG, wait_s=0.3)
    assert 0.25 < time.monotonic() - started < 5
    timer = threading.Timer(0.5, first.close)
    timer.start()
    RunDir(tmp_path, 2, CONFIG, wait_s=10).close()
    timer.join()


def test_lock_ends_with_its_process(tmp_path):
    """SIGKILL leaves no lock behind."""
    code = f"""
        import time
        from cosmo_rl.cpgd.config import Config
        from cosmo_rl.cpgd.run.rundir import RunDir
        run = RunDir({str(tmp_path)!r}, 2, Config())
        print("held", flush=True)
        time.sleep(60)
    """
    holder = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"in use by process {holder.pid} "):
            RunDir(tmp_path, 2, CONFIG, wait_s=0)
    finally:
        holder.kill()
        holder.communicate()
    RunDir(tmp_path, 2, CONFIG, wait_s=0).close()


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux only")
@pytest.mark.parametrize("under_torchrun", [True, False])
def test_workers_die_with_a_killed_launcher(under_torchrun):
    """In their own session, as torchrun starts them; a run without launcher must outlive the shell that started it."""
    worker = "import time; from cosmo_rl.cpgd.run.process import die_with_parent as d; d(); print('up'); time.sleep(60)"
    launcher = f"""
        import subprocess, sys, time
        command = [sys.executable, "-u", "-c", {worker!r}]
        child = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE)
        child.stdout.readline()
        print(child.pid, flush=True)
        time.sleep(60)
    """
    environment = {k: v for k, v in os.environ.items() if k != "TORCHELASTIC_RUN_ID"}
    if under_torchrun:
        environment["TORCHELASTIC_RUN_ID"] = "none"
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(launcher)], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.kill()
    process.communicate()
    deadline = time.monotonic() + (10 if under_torchrun else 0.7)
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    survived = _alive(child)
    if survived:
        os.kill(child, signal.SIGKILL)
    assert survived != under_torchrun


def _alive(pid: int) -> bool:
    """Running, not a zombie that nobody has collected."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_together_alone():
    assert together(lambda: 3) == [3]
    with pytest.raises(ValueError, match="mine"):
        together(lambda: int("mine"))


def _two_ranks(rank: int, folder: str, out) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    said = []
    said.append(together(lambda: rank * 10))
    for action in (
        lambda: together(lambda: _fail("only rank 1") if rank == 1 else None),
        lambda: RunDir(f"{folder}/held", 2, Config(), wait_s=0.2),
        lambda: RunDir(f"{folder}/free", 2, Config()).finished,
        lambda: RunDir(f"{folder}/free", 2, Config(seed=1), wait_s=0.2),
    ):
        try:
            said.append(action())
        except ValueError as error:
            said.append(str(error))
    out[rank] = said
    dist.destroy_process_group()


def _fail(text: str) -> None:
    raise UserError(text)


def test_two_ranks_hear_one_verdict(tmp_path):
    """What rank 0 alone can see stops both, and an error of rank 1 too; nobody is left waiting."""
    held = RunDir(tmp_path / "held", 2, CONFIG)
    with mp.Manager() as manager:
        out = manager.dict()
        mp.spawn(_two_ranks, (str(tmp_path), out), nprocs=2)
        first, second = out[0], out[1]
    held.close()
    assert first == second
    assert first[0] == [0, 10]
    assert first[1] == "only rank 1"
    assert f"in use by process {os.getpid()}" in first[2]
    assert first[3] is False
    assert "free is in use" in first[4]
