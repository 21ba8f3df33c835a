import contextlib
import io
import json
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cosmo_rl.cpgd.run import metrics
from cosmo_rl.cpgd.run.metrics import MetricsWriter, ProgressView, Stderr, read_metrics, reward_stats
from cosmo_rl.data.errors import UserError
from cosmo_rl.data.terminal import printable


def sample(domain, reward, **terms) -> Any:
    return SimpleNamespace(row=SimpleNamespace(domain=domain), reward=reward, terms=terms)


def line(step, **more):
    return {
        "step": step, "iteration": step // 4, "loss": -0.1 * step, "grad_norm": 1 / 3, "lr": 1e-4, "reward": 0.5,
        "rewards": {"safety": {"reward": {"mean": 0.25, "std": 0.1, "saturated": 0.0}}},
        "seconds": {"update": 0.25}, "tokens_per_second": {"update": 1234.5}, **more,
    }


def test_reward_stats_by_hand():
    stats = reward_stats([
        (sample("safety", 1.0, format=1.0, helpful=0.0), sample("safety", 0.0, format=1.0)),
        (sample("safety", 0.5, format=0.0), sample("safety", 0.5, format=1.0),
         sample("safety", None, format=0.0)),  # failed: not a zero
        (sample("general", 1.0),),
        (sample("lost", None),),
    ])
    assert list(stats) == ["general", "safety"]
    assert stats["general"] == {"reward": {"mean": 1.0, "std": 0.0, "saturated": 1.0}}
    safety = stats["safety"]
    assert safety["reward"] == {"mean": 0.5, "std": pytest.approx(0.125**0.5), "saturated": 0.5}
    assert safety["format"] == {"mean": 0.75, "std": pytest.approx(0.1875**0.5), "saturated": 0.5}
    assert safety["helpful"] == {"mean": 0.0, "std": 0.0, "saturated": 1.0}


def test_saturation_is_to_one_millionth():
    near = sample("a", 0.9), sample("a", 0.9 + 9e-7)
    assert reward_stats([near])["a"]["reward"]["saturated"] == 1.0
    far = sample("a", 0.9), sample("a", 0.9 + 2e-6)
    assert reward_stats([far])["a"]["reward"]["saturated"] == 0.0


def test_rewind_and_go_on_is_bitwise_the_uninterrupted_file(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    writer = MetricsWriter(whole, tensorboard=False)
    writer.rewind(0)
    for step in range(1, 6):
        writer.append("metrics", line(step, drift=0.1 + 0.2 * step))
        writer.append("samples", {"step": step, "text": "caf\u00e9 \u2028 <b>\n"})

    writer = MetricsWriter(cut, tensorboard=False)
    writer.rewind(0)
    for step in range(1, 5):
        writer.append("metrics", line(step, drift=0.1 + 0.2 * step))
        writer.append("samples", {"step": step, "text": "caf\u00e9 \u2028 <b>\n"})
    with writer.path("metrics").open("a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    assert [row["step"] for row in read_metrics(writer.path("metrics"))] == [1, 2, 3, 4]
    writer = MetricsWriter(cut, tensorboard=False)
    writer.rewind(2)
    assert [row["step"] for row in read_metrics(writer.path("samples"))] == [1, 2]
    for step in range(3, 6):
        writer.append("metrics", line(step, drift=0.1 + 0.2 * step))
        writer.append("samples", {"step": step, "text": "caf\u00e9 \u2028 <b>\n"})
    writer.sync()
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert read_metrics(cut / "samples.jsonl")[4] == {"step": 5, "text": "caf\u00e9 \u2028 <b>\n"}


def test_rewind_to_zero_starts_anew(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    with pytest.raises(AssertionError, match="rewind"):
        writer.append("metrics", line(1))
    writer.rewind(0)
    writer.append("metrics", line(1))
    writer.rewind(0)
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_not_finite_is_null(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.rewind(0)
    writer.append("metrics", {"step": 1, "grad_norm": float("inf"), "rewards": {"a": [float("nan"), 1.5]}})
    text = writer.path("metrics").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "grad_norm": None, "rewards": {"a": [None, 1.5]}}


def test_bad_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not JSON"):
        read_metrics(path)
    assert read_metrics(tmp_path / "absent.jsonl") == []


@pytest.mark.parametrize("line", [
    b"nonsense", b"", b"\xff", b"[" * 100_000, b'{"step": 2, "a": ' + b"[" * 700 + b"]" * 700 + b"}",
    b'{"step": 2, "step": 3}', b"null", b"[]", b"2", b"{}", b'{"step": "2"}', b'{"step": 2.0}', b'{"step": true}',
    b'{"step": null}',
])
def test_a_line_that_is_none_is_named_and_not_dropped(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"^\S+metrics\.jsonl:2: no.*; restore the file or remove the line$"):
        MetricsWriter(tmp_path, tensorboard=False).rewind(3)
    assert len(path.read_bytes().split(b"\n")) == 4


@pytest.mark.parametrize(("steps", "said"), [
    (range(1, 13), ""), ([], "has no line of step 1-9, of 9 done"), ([1, 2, 4, 5, 9], "step 3, 6-8, of 9 done"),
    ([2, *range(5, 10)], "step 1, 3-4, of 9"), ([1, 2, 3, 3, *range(4, 10)], "twice or out of order"),
    ([2, 1, *range(3, 10)], "twice or out of order"),
])
def test_a_hole_is_told_on_resume(tmp_path, caplog, steps, said):
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in steps))
    MetricsWriter(tmp_path, tensorboard=False).rewind(9)
    assert said in caplog.text and bool(said) == bool(caplog.text)
    caplog.clear()
    MetricsWriter(tmp_path, tensorboard=False).rewind(-1)
    assert not caplog.text, "a new start"


def test_many_holes_are_told_shortly(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(2, 9001, 2)))
    MetricsWriter(tmp_path, tensorboard=False).rewind(9000)
    assert "step 1, 3, 5, 7, 9, 11, 13, 15, 17, 19 and 4490 more places, of 9000 done" in caplog.text


def test_sync_brings_every_file_there_is_to_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(metrics, "fsync", lambda path: synced.append(path.name))
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.rewind(0)
    synced.clear()
    writer.sync()
    assert synced == ["metrics.jsonl", "samples.jsonl"]
    writer.append("nonfinite", {"step": 1})
    writer.append("evals", {"step": 1})
    writer.sync()
    assert synced[2:] == ["metrics.jsonl", "samples.jsonl", "nonfinite.jsonl", "evals.jsonl"]


def test_full_disk_names_the_file(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.rewind(0)
    writer.path("metrics").unlink()
    writer.path("metrics").symlink_to("/dev/full")
    with pytest.raises(ValueError, match=r"cannot write \S+metrics\.jsonl: No space left on device; free space"):
        writer.append("metrics", line(1))


def test_tensorboard_is_cut_back_too(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=True)
    writer.rewind(0)
    for step in range(1, 5):
        writer.append("metrics", line(step))
    writer.close()
    writer = MetricsWriter(tmp_path, tensorboard=True)
    writer.rewind(2)
    writer.append("metrics", line(3, loss=7.0))
    writer.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, round(e.value, 6)) for e in board.Scalars("loss")] == [(1, -0.1), (2, -0.2), (3, 7.0)]
    assert [e.value for e in board.Scalars("rewards/safety/reward/mean")] == [0.25] * 3
    assert "step" not in board.Tags()["scalars"]


def test_progress_in_plain_lines():
    out = io.StringIO()
    view = ProgressView(8, title="stage 2", console=Console(file=out, width=40))
    view.update(line(3, loss=None, clip_fraction=0.0125, response_length=15.25))
    view.close()
    (text,) = out.getvalue().splitlines()
    assert text.startswith("stage 2  step 3/8  reward 0.5  (safety 0.25)  loss -  grad_norm 0.333")
    assert "clip_fraction 0.0125" in text and "response_length 15.2" in text and "update 1234 tokens/s" in text


def test_progress_on_a_terminal():
    out = io.StringIO()
    view = ProgressView(8, done=2, title="stage 2", console=Console(file=out, force_terminal=True, width=150))
    view.update(line(3, entropy=0.4321))
    view.close()
    text = out.getvalue()
    assert "3/8" in text and "safety" in text and "0.25" in text and "0.432" in text


HOSTILE = ["[/x]", "[bold]b", "a\x1b[2J", "two\nlines", "x" * 300, "\udc80", "[link=http://h]c", ":smile:", "caf\u00e9"]


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("domain", HOSTILE)
def test_any_name_of_a_domain_can_be_shown(domain, terminal):
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    view = ProgressView(8, title="stage 2", console=Console(file=out, force_terminal=terminal, width=100,
                                                            color_system=None))
    view.update(line(3, rewards={domain: {"reward": {"mean": 0.25}, "own": {"mean": 0.5}}}))
    view.close()
    out.seek(0)
    text = out.read()
    name = printable(domain)
    assert (name if len(name) <= 32 else f"{name[:29]}...") in text and "0.25" in text
    assert "\x1b[2J" not in text and "two\n" not in text


@pytest.mark.parametrize("width", [80, 79, 40, 200])
def test_numbers_are_whole_at_any_width(width):
    out = io.StringIO()
    view = ProgressView(8, title="stage 2", console=Console(file=out, force_terminal=True, width=width,
                                                            color_system=None))
    values = {"loss": -1.23e-04, "grad_norm": 1.23e-05, "lr": 1e-06, "clip_fraction": 2.5e-07, "drift": 1.23e-11,
              "entropy": 0.00123, "response_length": 8191.6}
    view.update(line(3, **values, tokens_per_second={"rollout": 123456.0, "update": 1.5e7}))
    view.close()
    text = out.getvalue()
    for whole in ("loss -0.000123", "grad_norm 1.23e-05", "lr 1e-06", "clip_fraction 2.5e-07", "drift 1.23e-11",
                  "entropy 0.00123", "response_length 8192", "rollout tokens/s 123456", "update tokens/s 1.5e+07"):
        assert whole in text, whole


@pytest.mark.parametrize("width", [80, 79, 60, 40])
@pytest.mark.parametrize("count", [1, 5, 6, 7, 12])
def test_reward_terms_are_whole_at_any_width(width, count):
    """More terms than fit side by side are shown below each other; a long name is folded."""
    out = io.StringIO()
    view = ProgressView(8, console=Console(file=out, force_terminal=True, width=width, color_system=None))
    terms = {f"a_term_of_mine_{i}": -1.23e-06 - i * 1e-08 for i in range(count)}
    view.update(line(3, rewards={"a long name of a domain": {k: {"mean": v} for k, v in terms.items()}}))
    view.close()
    assert [text for text in out.getvalue().split() if text.startswith("-1.")] == [f"{v:.3g}" for v in terms.values()]


def test_warnings_have_a_file_that_is_cut_back_too(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.rewind(0)
    writer.append("warnings")
    assert not writer.path("warnings").exists()
    writer.append("warnings", {"step": 1, "warning": "a"}, {"step": 1, "warning": "b"})
    writer.append("warnings", {"step": 3, "warning": "c"})
    writer.rewind(2)
    assert read_metrics(tmp_path / "warnings.jsonl") == [{"step": 1, "warning": "a"}, {"step": 1, "warning": "b"}]


def test_what_is_logged_goes_to_the_stderr_of_the_moment_and_steers_no_terminal(capsys):
    handler = Stderr()  # made before the progress bar puts its own stderr in place
    logger = logging.getLogger("a test of ours")
    logger.addHandler(handler)
    try:
        with contextlib.redirect_stderr(io.StringIO()) as later:
            logger.warning("domain %s\nsecond line", "[/x]\x1b[2J")
    finally:
        logger.removeHandler(handler)
    assert later.getvalue() == "domain [/x]\\x1b[2J\nsecond line\n" and capsys.readouterr().err == ""
