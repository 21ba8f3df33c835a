"""The last line of a command, on stderr and in what torchrun shows below its own traceback."""

import json
import sys

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from cosmo_rl.cpgd.run import ending, recipes
from cosmo_rl.cpgd.run.dryrun import dry_run
from cosmo_rl.cpgd.run.ending import fail, leave
from cosmo_rl.cpgd.run.recipes import parse_command


@pytest.fixture
def reply(tmp_path, monkeypatch):
    """Where torchrun wants a worker's error; no rank waits."""
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    monkeypatch.setattr(ending, "QUIET_S", 0.0)
    monkeypatch.setattr(recipes, "QUIET_S", 0.0)
    return path


def summary(path) -> str:
    """The end of torchrun's traceback, by torch's own classes."""
    return str(ChildFailedError("train.py", {0: ProcessFailure(0, 1, 1, str(path))}))


def last_words(path) -> str:
    line, border = summary(path).splitlines()[-2:]
    assert set(border) == {"="}, "nothing is below it"
    return line.removeprefix("  traceback : ")


def test_the_line_is_the_last_of_torchruns_summary(reply, capsys):
    assert fail("row r1: no answer; add it") == 1
    assert capsys.readouterr().err == "train.py: row r1: no answer; add it\n"
    assert last_words(reply) == "train.py: row r1: no answer; add it"


@pytest.mark.parametrize("text", ["two\nlines", "$dollar ${x}", "caf\u00e9", "[/x]", "x" * 5000, "\x1b[31mred\x1b[0m",
                                  "\u256d\u2500 boxed \u2500\u256e\n\u2502 why \u2502\n----------", "\udc80"])
def test_whatever_the_text_the_summary_has_one_line_of_it(reply, text):
    assert leave(f"train.py: {text}")
    line = last_words(reply)
    assert line.startswith("train.py: ") and len(line) <= ending.LONGEST
    assert "\x1b" not in line and "\u2500" not in line and "----" not in line


def test_a_rank_above_0_speaks_through_torchrun_alone(reply, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert fail("gone") == 1
    assert capsys.readouterr().err == "" and last_words(reply) == "train.py: gone"
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")  # another launcher: this may be the only one that knows
    assert fail("gone") == 1
    assert capsys.readouterr().err == "train.py: gone\n"


def test_without_torchrun_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in (None, ""):
        monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
        if name is not None:
            monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", name)
        assert not leave("words") and fail("words", "prog", 3) == 3
    assert capsys.readouterr().err == "prog: words\n" * 2 and not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_hides_nothing(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/dev/full")
    assert fail("words") == 1
    assert capsys.readouterr().err == "train.py: words\n"


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize(("args", "wanted"), [
    (["--objective.drift-coeff", "0.1"], "Perhaps you meant: --objective.drift-coef"),
    (["--steps", "many"], "--steps"), (["--objective.name", "dpo"], "cpgd"), (["--stage", "x"], "invalid int value"),
    (["--preset", "8b"], "unknown preset '8b'; choose one of"), (["--steps", "0"], "--steps is 0; give at least 1"),
])
def test_errors_of_the_command_line(reply, capsys, monkeypatch, rank, args, wanted):
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as ended:
        parse_command(args)
    out, err = capsys.readouterr()
    assert ended.value.code not in (0, None) and not out and bool(err) == (rank == "0")
    assert last_words(reply).startswith("train.py: ") and wanted in last_words(reply)


def test_help_is_no_error(reply, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_command(["--help"])
    assert not ended.value.code and "--objective.drift-coef" in capsys.readouterr().out and not reply.exists()


def test_a_dry_run_leaves_what_it_found(reply, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"id": "a", "task": "saftey", "prompt": "x"}) + "\n")
    args = ["--dry-run", "--data.path", str(rows), "--data.mix", "--run-dir", str(tmp_path / "run")]
    assert dry_run(parse_command(args).config) == 1
    assert last_words(reply).startswith("train.py: the dry run has rejected 1 rows or files; problem: no row is left")
    assert "rejected: 1" in capsys.readouterr().out
    reply.unlink()
    assert dry_run(parse_command(["--dry-run", "--model.path", "/nowhere"]).config) == 1
    assert last_words(reply).startswith("train.py: model folder /nowhere does not exist")


def test_a_bug_keeps_its_traceback_there(reply):
    """train.py is wrapped in torch's `record`."""
    import runpy

    from conftest import ROOT

    run = runpy.run_path(str(ROOT / "train.py"), run_name="not main")["run"]
    run.__wrapped__.__globals__["parse_command"] = lambda args: list(zip([1, 2], [3], strict=True))
    sys_argv, sys.argv = sys.argv, ["train.py"]
    try:
        with pytest.raises(ValueError, match="zip"):
            run()
    finally:
        sys.argv = sys_argv
    assert "Traceback (most recent call last)" in summary(reply) and "ValueError: zip()" in summary(reply)
