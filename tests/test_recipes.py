import pytest

from cosmo_rl.cpgd.run import ending, recipes
from cosmo_rl.cpgd.run.recipes import PRESETS, mixture, parse_command_line, recipe
from cosmo_rl.data.prepare.mini import mini_rows


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_recipe(preset, stage):
    config = recipe(preset, stage)
    assert (config.preset, config.stage) == (preset, stage)
    assert parse_command_line(["--preset", preset, "--stage", str(stage)]) == config
    if preset != "tiny" and stage:  # what the paper gives: arXiv 2505.12504
        assert (config.rollout.prompts, config.rollout.group_size, config.optim.learning_rate) == (128, 8, 1e-6)


def test_the_default_is_tiny_stage_2():
    assert parse_command_line([]) == recipe("tiny", 2)


@pytest.mark.parametrize("stage", [1, 2])
def test_tiny_mixes_domains_that_its_rows_have(stage):
    assert recipe("tiny", stage).data.shares().keys() <= {row.domain for row in mini_rows(stage)}


@pytest.mark.parametrize("preset", PRESETS[1:])
def test_stage_2_keeps_a_share_of_stage_1_and_the_safety_tasks(preset):
    shares = recipe(preset, 2).data.shares()
    assert sum(shares.values()) == pytest.approx(1)
    assert sum(shares[name] for name in recipe(preset, 1).data.shares()) == pytest.approx(0.5)
    assert {"safety", "jailbreak", "value"} <= shares.keys()


def test_the_recipes_own_mixture_goes_by_the_domains_there_are(caplog):
    config = recipe("7b", 2)
    assert mixture(config, ["safety", "math", "safety"]) == {"safety": 0.2, "math": 0.1}
    assert "no rows for general, helpful, ifeval, jailbreak, knowledge, mcq, value" in caplog.text
    with pytest.raises(ValueError, match=r"stage 2 has no share for domain birds, trees of the rows; give --data\.mix"):
        mixture(config, ["safety", "trees", "birds"])
    given = parse_command_line(["--preset", "7b", "--data.mix", "birds=1", "moon=2"])
    assert mixture(given, ["birds"]) == {"birds": 1.0, "moon": 2.0}  # the sampler refuses what is missing
    assert mixture(parse_command_line(["--preset", "7b", "--data.mix"]), ["birds"]) == {}
    assert mixture(recipe("7b", 0), ["birds"]) == {}
    assert mixture(recipe("tiny", 1), ["other"]) == {"general": 1.0}


def test_options_override_single_fields():
    config = parse_command_line([
        "--stage=1", "--seed", "7", "--steps", "3", "--run-dir", "there", "--resume", "never",
        "--objective.drift-coef", "0.02", "--objective.name", "cpgd", "--data.path", "a.jsonl", "b.parquet",
        "--data.mix", "safety=0.5", "general=0.5", "--model.gradient-checkpointing", "True",
        "--optim.betas", "0.8", "0.9",
    ])
    base = recipe("tiny", 1)
    assert (config.stage, config.seed, config.steps, config.run_dir, config.resume) == (1, 7, 3, "there", "never")
    assert config.objective.drift_coef == 0.02 and config.objective.clip_eps_low == base.objective.clip_eps_low
    assert config.data.path == ("a.jsonl", "b.parquet") and config.data.mix == ("safety=0.5", "general=0.5")
    assert config.model.gradient_checkpointing and config.optim.betas == (0.8, 0.9)
    assert config.optim.learning_rate == base.optim.learning_rate != recipe("3b", 1).optim.learning_rate
    assert parse_command_line(["--data.mix"]).data.mix == ()


@pytest.mark.parametrize("args, message", [
    (["--preset", "8b"], "unknown preset '8b'; choose one of tiny, 3b, 7b, 72b"),
    (["--stage", "3"], "unknown stage 3; choose 0 (SFT), 1 (general) or 2 (safety, value, general)"),
])
def test_unknown_recipe(args, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_command_line(args)
    assert caught.value.code == 1 and capsys.readouterr().err == f"train.py: {message}\n"


@pytest.mark.parametrize("args", [["--preset", "8b"], ["--no-such"], ["--steps", "0"], ["--stage", "two"], ["--seed"]])
def test_only_rank_0_complains(args, capsys, monkeypatch):
    for module in (ending, recipes):
        monkeypatch.setattr(module, "QUIET_S", 0.0)
    for number in ("1", "0"):
        monkeypatch.setenv("RANK", number)
        with pytest.raises(SystemExit) as caught:
            parse_command_line(args)
        told = capsys.readouterr()
        told = told.out + told.err
        assert caught.value.code not in (0, None) and bool(told) == (number == "0")


def test_help_names_every_field_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_command_line(["--help"])
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    assert all(text in shown for text in ("--objective.drift-coef", "--rollout.canary-limit", "alpha, weight of the"))
