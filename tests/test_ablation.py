"""The ablation command: which runs it starts, from which weights, and what it makes of their numbers."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from cosmo_rl.cpgd.config import Config
from cosmo_rl.cpgd.run.recipes import parse_command_line

BENCH = Path(__file__).resolve().parent.parent / "bench"
NUMBERS = {"safe_rate": 0.9, "benign_acceptance": 0.8, "benign_refusal_rate": 0.15, "general_accuracy": 0.85,
           "unseen_attack_safe_rate": 0.7, "unseen_attack_benign_acceptance": 0.6}


@pytest.fixture
def ablation(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("ablation")
    sys.modules.pop("ablation")


def test_every_arm_is_the_recipe_but_for_what_it_leaves_out(ablation, monkeypatch, tmp_path):
    configs: list[Config] = []

    def train(arguments, log, threads):
        config = parse_command_line([str(part) for part in arguments])  # options that train.py takes
        configs.append(config)
        folder = Path(config.run_dir) / f"stage{config.stage}"
        folder.mkdir(parents=True)
        numbers = NUMBERS | {"safe_rate": 0.7} if not config.reward.helpful else NUMBERS
        (folder / "report.json").write_text(json.dumps({"after": numbers}))

    monkeypatch.setattr(ablation, "train", train)
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["ablation.py", "--seeds", "3", "4", "--steps", "80", "--folder",
                                      str(tmp_path / "runs"), "--out", str(out), "--jobs", "1"])  # tyro has no locks
    ablation.main()
    assert [config.stage for config in configs].count(0) == 1
    stage2 = [config for config in configs if config.stage == 2]
    assert sorted({config.seed for config in stage2}) == [3, 4] and len(stage2) == 2 * (4 * 1 + 2 * 2)
    total = {}
    for config in stage2:
        arm = Path(config.run_dir).parent.name
        total[arm] = total.get(arm, 0) + config.steps
        assert (config.eval.split, config.eval.max_rows) == ("heldout", 320)
        assert config.reward.helpful == (0 if arm.startswith("no_helpful") else 0.2)
        assert config.reward.visual_focus == (0 if arm.startswith("no_visual_focus") else 0.2)
        second = config.run_dir.endswith("/1")
        image_now = arm.startswith("image_then_text") != second
        if "then" in arm:
            assert ("safe_image" in config.data.shares()) == image_now
            assert ("safe_text" in config.data.shares()) == (not image_now)
        origin = {"no_stage1": str(tmp_path / "runs" / "stage0" / "stage0" / "hf")}.get(arm.rpartition("-")[0], "")
        assert config.model.path == (f"{config.run_dir[:-1]}0/stage2/hf" if second else origin)
    assert total == {f"{arm}-{seed}": 80 for arm in ablation.ARMS for seed in (3, 4)}
    written = json.loads(out.read_text())
    assert written["numbers"]["no_helpful"]["unsafe_completion"] == pytest.approx([0.3, 0.3])
    assert written["numbers"]["joint"]["balance"] == pytest.approx([0.85, 0.85])
    assert written["numbers"]["joint"]["attack_benign"] == [0.6, 0.6]
    outcomes = {(claim["arm"], claim["column"]): claim["outcome"] for claim in written["claims"]}
    assert outcomes["no_helpful", "unsafe_completion"] == "as the paper"
    assert outcomes["no_visual_focus", "benign_refusal"] == "undecided"  # no difference


def test_a_claim_needs_every_seed(ablation):
    runs = lambda *rates: [NUMBERS | {"benign_refusal_rate": rate} for rate in rates]
    outcome = lambda arm: next(claim for claim in ablation.verdicts(ablation.measured(
        {"joint": runs(0.1, 0.1, 0.1), "no_visual_focus": arm})) if claim["column"] == "benign_refusal")
    assert outcome(runs(0.2, 0.15, 0.12))["outcome"] == "as the paper"
    assert outcome(runs(0.05, 0.06, 0.09))["outcome"] == "against it"
    mixed = outcome(runs(0.3, 0.15, 0.07))
    assert mixed["outcome"] == "undecided" and mixed["seeds_agreeing"] == 2
    assert mixed["difference"] == pytest.approx((0.2 + 0.05 - 0.03) / 3)


def test_a_run_that_fails_ends_the_command(ablation, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["ablation.py", "--arms", "joint", "no_helpful", "--seeds", "0", "--folder",
                                      str(tmp_path / "runs"), "--out", str(tmp_path / "out.json"), "--steps", "0"])
    with pytest.raises(SystemExit, match=r"--steps 0 .*exit status 1; see .*joint-0"):
        ablation.main()
    assert "--steps is 0" in (tmp_path / "runs" / "joint-0" / "0.log").read_text()
    assert not (tmp_path / "out.json").exists()
