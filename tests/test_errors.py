"""Only what a user can mend is told in one line."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import runs
import torch

from cosmo_rl.cpgd.config import RewardConfig
from cosmo_rl.cpgd.rewards import ifeval
from cosmo_rl.cpgd.rewards.build import RowNeeds
from cosmo_rl.cpgd.run import dryrun
from cosmo_rl.cpgd.run import main as command
from cosmo_rl.data.errors import MissingPackage, UserError
from cosmo_rl.data.prepare.mini import general_rows
from cosmo_rl.model import parallel
from cosmo_rl.model.liger import use_liger


def _bug(*args, **kwargs):
    return list(zip([1, 2], [3], strict=True))


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "RunDir", _bug)
    with pytest.raises(ValueError, match="zip"):
        command.main(runs.config())
    monkeypatch.setattr(dryrun, "load_processor", _bug)
    with pytest.raises(ValueError, match="zip"):
        dryrun.dry_run(runs.config())
    with pytest.raises(ValueError, match="zip") as caught:
        parallel.together(_bug)
    assert not isinstance(caught.value, UserError)


def test_what_a_user_can_mend_is_told_in_one_line(monkeypatch, capsys):
    def wrong(*args):
        raise UserError("the cause; the mend")

    monkeypatch.setattr(command, "RunDir", wrong)
    assert command.main(runs.config()) == 1
    assert capsys.readouterr().err == "train.py: the cause; the mend\n"
    monkeypatch.setattr(command, "RunDir", lambda *args: SimpleNamespace(finished=False))
    monkeypatch.setattr(command, "Trainer", wrong)
    assert command.main(runs.config()) == 1


def test_a_package_that_is_missing_is_told_in_one_line(monkeypatch, capsys):
    """As an ImportError it would end with a traceback."""
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", None)
    monkeypatch.setattr(command, "RunDir", lambda *args: use_liger(torch.nn.Linear(1, 1)))
    assert command.main(runs.config()) == 1
    assert capsys.readouterr().err == "train.py: liger kernels need liger-kernel: pip install liger-kernel\n"
    error = MissingPackage("words")
    assert isinstance(error, ImportError) and isinstance(error, UserError) and str(error) == "words"


def test_no_row_is_blamed_for_a_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "if_verifiable.ifeval.instructions_registry", None)
    ifeval._registry.cache_clear()
    ifeval._checker.cache_clear()
    row = replace(general_rows("validation")[0], task="ifeval",
                  constraints=({"id": "punctuation:no_comma", "kwargs": {}},))
    with pytest.raises(MissingPackage, match=r"^task ifeval needs"):
        RowNeeds(RewardConfig()).problem(row)


def test_an_interrupt_is_one_line(monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "RunDir", interrupted)
    assert command.main(runs.config()) == 130
    assert capsys.readouterr().err == "train.py: interrupted; repeat the command to go on from the last checkpoint\n"
