"""Which rows are measured when, by hand; the numbers of whole runs are in test_trainer.py and test_guard.py."""

from types import SimpleNamespace
from typing import Any, Literal

import pytest

from cosmo_rl.cpgd.config import Config, DataConfig, EvalConfig
from cosmo_rl.cpgd.run import measure
from cosmo_rl.cpgd.run.measure import Measurements
from cosmo_rl.data.errors import UserError

WATCHING = {"every": 4, "guard": "warn"}


@pytest.fixture
def told(monkeypatch):
    """What is asked for and written, in order, with an engine that answers each suite by its name."""
    told: list[Any] = []
    monkeypatch.setattr(measure, "eval_suite", lambda config, split, rows, left_out=None: (
        {"general": [split] if rows is None else rows}))
    monkeypatch.setattr(measure, "evaluate", lambda engine, suite, *_: told.append(suite["general"][0]) or ([], []))
    monkeypatch.setattr(measure, "write_measured", lambda folder, when, *_: told.append(when))
    return told


def measurements(told, folder, data=(), stage: Literal[0, 2] = 2, **settings):
    metrics: Any = SimpleNamespace(append=lambda name, line: told.append((name, line["step"])))
    nothing: Any = None
    config = Config(stage=stage, eval=EvalConfig(**settings), data=DataConfig(eval_path=data))
    rows: Any = list(data) or None
    return Measurements(config, rows, nothing, nothing, nothing, lambda: told.append("sync"), folder, metrics)


def test_one_evaluation_serves_report_and_guard(told, tmp_path):
    """At a step, of the same rows: before the first update and after the last one."""
    here = measurements(told, tmp_path, data=("own",), **WATCHING)
    here.before(0, lambda: None)
    for earlier, step in ((0, 3), (3, 5), (5, 7), (7, 12)):
        here.between(earlier, step, lambda: None)
    here.after(12)
    assert told == ["sync", "own", "before", ("evals", 0), "sync", "own", ("evals", 5), "sync", "own", ("evals", 12),
                    "after"]


def test_of_the_embedded_data_the_validation_split_is_watched(told, tmp_path):
    here = measurements(told, tmp_path, **WATCHING)
    here.before(0, lambda: None)
    assert told == ["sync", "heldout", "before", "sync", "validation", ("evals", 0)]


def test_without_rows_the_engine_gets_no_weights(told, tmp_path):
    here = measurements(told, tmp_path, **WATCHING)
    here.suite = here.watched = {}
    here.before(0, lambda: None)
    here.after(2)
    assert told == [("evals", 0)]


@pytest.mark.parametrize("settings", [{"stage": 0}, {"every": 4}, {}])
def test_before_training(told, tmp_path, settings):
    """Stage 0 starts from weights that say nothing; without the guard nothing is watched then."""
    measurements(told, tmp_path, **settings).before(0, lambda: None)
    assert told == ([] if "stage" in settings else ["sync", "heldout", "before"])


def test_a_run_that_goes_on_has_its_first_numbers(told, tmp_path):
    here = measurements(told, tmp_path, **WATCHING)
    with pytest.raises(UserError, match=rf"^{tmp_path} has a checkpoint at step 6 but no measurement from before"):
        here.before(6, lambda: None)
    (tmp_path / "before.json").write_text('{"sampled": {}}')
    here.before(6, lambda: None)
    assert told == []
