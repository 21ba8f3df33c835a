"""Only what a user can mend is told in one line."""

from types import SimpleNamespace

import pytest
import runs

from cosmo_rl.cpgd import dryrun, rundir, trainer
from cosmo_rl.data.errors import UserError


def _bug(*args, **kwargs):
    return list(zip([1, 2], [3], strict=True))


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr(trainer, "RunDir", _bug)
    with pytest.raises(ValueError, match="zip"):
        trainer.main(runs.config())
    monkeypatch.setattr(dryrun, "load_processor", _bug)
    with pytest.raises(ValueError, match="zip"):
        dryrun.dry_run(runs.config())
    with pytest.raises(ValueError, match="zip") as caught:
        rundir.together(_bug)
    assert not isinstance(caught.value, UserError)


def test_what_a_user_can_mend_is_told_in_one_line(monkeypatch, caplog):
    def wrong(*args):
        raise UserError("the cause; the mend")

    monkeypatch.setattr(trainer, "RunDir", wrong)
    assert trainer.main(runs.config()) == 1
    assert caplog.messages == ["train.py: the cause; the mend"]
    monkeypatch.setattr(trainer, "RunDir", lambda *args: SimpleNamespace(finished=False))
    monkeypatch.setattr(trainer, "Trainer", wrong)
    assert trainer.main(runs.config()) == 1
