import ast
import json
import re
from dataclasses import fields, is_dataclass, replace

import pytest
from conftest import ROOT

from cosmo_rl.cpgd.config import (
    BatchConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    ObjectiveConfig,
    OptimConfig,
    RewardConfig,
    RolloutConfig,
    free_fields,
    identity,
    parse_judge,
)


@pytest.mark.parametrize("changes, message", [
    ({"steps": 0}, r"--steps is 0; give at least 1"),
    ({"rollout": RolloutConfig(group_size=1)}, r"--rollout\.group-size is 1; a group needs 2"),
    ({"rollout": RolloutConfig(temperature=0.0)}, r"--rollout\.temperature is 0\.0; give a finite value above 0"),
    ({"optim": OptimConfig(updates_per_rollout=129)}, r"updates-per-rollout is 129 and --rollout\.prompts is 128"),
    ({"optim": OptimConfig(updates_per_rollout=0)}, r"updates-per-rollout is 0 "),
    ({"objective": ObjectiveConfig(clip_eps_low=1.0)}, r"--objective\.clip-eps-low is 1\.0; give a value in \(0, 1\)"),
    ({"objective": ObjectiveConfig(clip_eps_high=0.0)}, r"--objective\.clip-eps-high is 0\.0"),
    ({"objective": ObjectiveConfig(clip_schedule=1.5)}, r"--objective\.clip-schedule is 1\.5"),
    ({"objective": ObjectiveConfig(name="ppo", drift="exact")}, r"exact needs --objective\.name cpgd, which is ppo"),
    ({"reward": RewardConfig(helpful=-1.0)}, r"must not be negative: .*helpful -1\.0"),
    ({"reward": RewardConfig(failure_budget=1.5)}, r"--reward\.failure-budget is 1\.5"),
    ({"optim": OptimConfig(learning_rate=0.0)}, r"--optim\.learning-rate is 0\.0"),
    ({"checkpoint": CheckpointConfig(every=0)}, r"--checkpoint\.every is 0"),
    ({"checkpoint": CheckpointConfig(keep=0)}, r"--checkpoint\.keep is 0"),
    ({"objective": ObjectiveConfig(drift="exact", entropy_coef=0.1)},
     r"exact has no entropy bonus, and --objective\.entropy-coef is 0\.1; give 0, or --objective\.drift sampled"),
    ({"objective": ObjectiveConfig(weight_cap=0.0)}, r"--objective\.weight-cap is 0\.0; give a finite value above 0"),
    ({"objective": ObjectiveConfig(drift_coef=-0.1)}, r"--objective\.drift-coef is -0\.1; give at least 0"),
    ({"objective": ObjectiveConfig(drift_clip=-1.0)}, r"--objective\.drift-clip is -1\.0"),
    ({"objective": ObjectiveConfig(drift_clip=float("nan"))}, r"--objective\.drift-clip is nan"),
    ({"objective": ObjectiveConfig(dual_clip=-1.0)}, r"--objective\.dual-clip is -1\.0"),
    ({"optim": OptimConfig(sft_batch=0)}, r"--optim\.sft-batch is 0; give at least 1"),
    ({"optim": OptimConfig(max_nonfinite=0)}, r"--optim\.max-nonfinite is 0"),
    ({"optim": OptimConfig(max_grad_norm=0.0)}, r"--optim\.max-grad-norm is 0\.0"),
    ({"optim": OptimConfig(warmup_steps=-1)}, r"--optim\.warmup-steps is -1"),
    ({"eval": EvalConfig(max_rows=-1)}, r"--eval\.max-rows is -1"),
    ({"eval": EvalConfig(every=-1)}, r"--eval\.every is -1"),
    ({"log": LogConfig(samples=-1)}, r"--log\.samples is -1"),
    ({"data": DataConfig(resize_pixels=0)}, r"--data\.resize-pixels is 0"),
    ({"data": DataConfig(max_prompt_tokens=0)}, r"--data\.max-prompt-tokens is 0"),
    ({"rollout": RolloutConfig(max_new_tokens=0)}, r"--rollout\.max-new-tokens is 0"),
    ({"rollout": RolloutConfig(batch_size=0)}, r"--rollout\.batch-size is 0"),
    ({"rollout": RolloutConfig(cache_gib=0.0)}, r"--rollout\.cache-gib is 0\.0; give a finite value above 0"),
    ({"rollout": RolloutConfig(cache_gib=float("inf"))}, r"--rollout\.cache-gib is inf; give a finite value above 0"),
    ({"rollout": RolloutConfig(canary_limit=-0.1)}, r"--rollout\.canary-limit is -0\.1; give at least 0"),
    ({"rollout": RolloutConfig(correction=0.5)}, r"--rollout\.correction is 0\.5; give 0 or a cap of at least 1, as 2"),
    ({"batch": BatchConfig(max_tokens=0)}, r"--batch\.max-tokens is 0"),
    *(({"rollout": RolloutConfig(engine="server", servers=(url,))}, rf"servers holds '{re.escape(url)}'; give URLs, as")
      for url in ("127.0.0.1:8000", "ftp://a", "http://", "http://a:port", "http://a:99999", "http://[::1")),
])
def test_bad_settings_are_named_with_their_values(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)


@pytest.mark.parametrize("entry", ["safety", "safety=", "safety=much", "=x"])
def test_bad_mix(entry):
    with pytest.raises(ValueError, match=rf"--data\.mix holds '{entry}'; write DOMAIN=SHARE"):
        DataConfig(mix=("general=1", entry))
    for share in ("-1", "inf", "nan"):
        with pytest.raises(ValueError, match=rf"'a={share}'; give a share of at least 0"):
            DataConfig(mix=(f"a={share}",))


def test_mix():
    assert DataConfig(mix=("safety=0.75", "general=0.25")).shares() == {"safety": 0.75, "general": 0.25}
    assert DataConfig(mix=("a=b=0.5",)).shares() == {"a=b": 0.5}
    assert DataConfig().shares() == {}
    with pytest.raises(ValueError, match=r"--data\.mix gives domain 'safety' two shares; give it one"):
        DataConfig(mix=("safety=0.3", "general=0.4", "safety=0.3"))


def test_hash_knows_every_setting_but_the_place():
    base = Config()
    assert len(base.hash()) == 16
    assert replace(base, run_dir="elsewhere", resume="never").hash() == base.hash()
    others = [replace(base, seed=1), replace(base, optim=OptimConfig(weight_decay=0.02)),
              replace(base, objective=ObjectiveConfig(drift_coef=0.02)),
              replace(base, rollout=RolloutConfig(prompts=64)), replace(base, data=DataConfig(mix=("a=1",)))]
    assert len({base.hash(), *(other.hash() for other in others)}) == 6
    assert json.loads(json.dumps(base.to_dict())) == base.to_dict()
    assert base.identity().keys() == base.to_dict().keys() - {"run_dir", "resume", "steps"}


def test_what_a_resumed_run_may_change():
    """A new field that is free is a decision: it moves nothing that is learnt from by more than rounding."""
    assert free_fields() == {
        "run_dir", "resume", "steps", "model.gradient_checkpointing", "model.attention", "model.liger",
        "model.export_dtype", "data.max_prompt_tokens", "data.max_image_pixels", "rollout.batch_size",
        "rollout.cache_gib", "rollout.canary_limit", "rollout.serve", "rollout.servers", "rollout.verify_every",
        "reward.judge_cache", "reward.failure_budget", "optim.max_nonfinite", "batch.layout", "batch.max_tokens",
        "checkpoint.every", "checkpoint.keep", "eval.every", "eval.guard", "eval.guard_drop",
        "log.tensorboard", "log.samples"}


@pytest.mark.parametrize("name", sorted(free_fields()))
def test_a_free_field_has_default_help_and_no_part_in_the_hash(name):
    base, other = Config().to_dict(), Config().to_dict()
    *groups, last = name.split(".")
    for settings in (base, other):
        for group in groups:
            settings = settings[group]
    settings[last] = "another"
    assert identity(base) == identity(other)
    default = Config().to_dict()
    assert type(default[groups[0]][last] if groups else default[last]) in (int, str, bool, float, list)


ADVICE = re.compile(r"(?:raise|lower|give|or) (?:a larger |a smaller |a lower )?--([a-z]+(?:[.-][a-z-]+)*)")
BEFORE_A_RUN = {"config.py", "recipes.py", "dryrun.py", "check.py"}
"""What they say is said before a run begins."""
BEFORE_A_STEP = {"data.path", "data.eval_path", "data.contaminated", "data.mix", "reward.function"}
"""Rows and rewards are read, all of them, before the first step, and until then no setting binds."""


def test_where_rollouts_are_made_ahead_checkpoints_and_measurements_say_which_are_fresh():
    for staleness, same in ((0, True), (1, False)):
        base = Config(rollout=RolloutConfig(engine="server", servers=("http://a",), staleness=staleness))
        for changes in ({"checkpoint": CheckpointConfig(every=51)}, {"eval": EvalConfig(every=10)}):
            assert (replace(base, **changes).hash() == base.hash()) is same
        assert replace(base, checkpoint=CheckpointConfig(keep=9)).hash() == base.hash()


def test_what_a_message_tells_to_raise_a_resumed_run_may_raise():
    """Every message of ours with such advice: one of the options that it names is free, or it says to start again."""
    known, found = free_fields(), set()
    for path in sorted(path for folder in ("cpgd", "data", "model") for path in (ROOT / folder).rglob("*.py")):
        for text in _texts(ast.parse(path.read_text())):
            advised = {name.replace("-", "_") for name in ADVICE.findall(text)} & _fields(Config)
            if advised and path.name not in BEFORE_A_RUN and "another --run-dir" not in text:
                found |= advised & known
                assert advised & known or advised <= BEFORE_A_STEP, f"{path.name}: {text}"
    assert {"reward.failure_budget", "data.max_prompt_tokens", "data.max_image_pixels", "eval.guard_drop",
            "model.attention"} <= found


def _texts(tree: ast.AST) -> list[str]:
    """Strings of the code, f-strings whole and with {} for their values."""
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    out = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            out.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            out.append("".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values))
    return out


def _fields(kind, prefix: str = "") -> set[str]:
    return {name for f in fields(kind) for name in (
        _fields(f.default_factory, f"{f.name}.") if is_dataclass(f.default_factory) else {prefix + f.name})}


def test_a_place_has_a_server_and_options():
    entry = parse_judge("helpful=http://h:1/v1, org/model ,key=JUDGE_KEY, in-flight=4,timeout=2.5,attempts=3,graded=no")
    assert (entry.judge, entry.server.url, entry.server.model) == ("helpful", "http://h:1", "org/model")
    assert entry.server.options == {"api_key_env": "JUDGE_KEY", "max_in_flight": 4, "timeout_s": 2.5, "attempts": 3}
    assert entry.graded is False and parse_judge("helpful=http://h,m,graded=yes").graded is True
    plain = parse_judge("scalar=http://h,m")
    assert (plain.server.options, plain.graded, plain.activation) == ({}, True, "none")
    assert parse_judge("scalar=http://h,m,activation=-10:10").activation == "-10:10"


@pytest.mark.parametrize("entry, message", [
    ("nobody=http://h,m", "there is no judge 'nobody'; use one of safework_safety, .* as NAME=URL,MODEL"),
    ("helpful", "judge helpful has no model after its URL; write URL,MODEL, and after them key=JUDGE_KEY"),
    ("helpful=http://h", "judge helpful has no model"), ("helpful=http://h,,key=K", "judge helpful has no model"),
    ("helpful=http://h,graded=no", "judge helpful has no model"), ("helpful=host:8000,m", "'host:8000' is no URL of a"),
    ("helpful=http://h,m,sk-swordfish", "part 3 is no NAME=VALUE; write .* key=JUDGE_KEY"),
    ("helpful=http://h,m,key=", "part 3 is no NAME=VALUE"),
    ("helpful=http://h,m,key=sk-swordfish", "key is the NAME of an environment variable, in capitals; .* key=JUDGE"),
    ("helpful=http://u:swordfish@h,m", "judge helpful: the URL holds a password or a query"),
    ("helpful=http://h,m,inflight=3", "judge helpful: there is no option 'inflight'; write .* in-flight=8"),
    ("helpful=http://h,m,in-flight=0", "in-flight is a whole number of at least 1, and not '0'; .* in-flight=8"),
    ("helpful=http://h,m,in-flight=2.5", "and not '2.5'"), ("helpful=http://h,m,attempts=-1", "attempts is .* '-1'"),
    ("helpful=http://h,m,timeout=0", "timeout is a number of seconds above 0, and not '0'"),
    ("helpful=http://h,m,timeout=nan", "not 'nan'"), ("helpful=http://h,m,timeout=inf", "not 'inf'"),
    ("helpful=http://h,m,graded=maybe", "graded is yes or no, and not 'maybe'"),
    ("general=http://h,m,graded=yes", "judge general: there is no option 'graded'"),
    ("helpful=http://h,m,activation=none", "judge helpful: there is no option 'activation'"),
    ("scalar=http://h,m,activation=2:1", "activation is none, sigmoid or LOW:HIGH, and not '2:1'"),
    ("scalar=http://h,m,timeout=1,timeout=1", "judge scalar: timeout is given twice"),
])
def test_an_entry_that_is_none_is_named_and_no_secret_repeated(entry, message):
    with pytest.raises(ValueError, match=message) as error:
        RewardConfig(judges=("safework_safety=http://h,m", entry))
    assert "swordfish" not in str(error.value)


@pytest.mark.parametrize("one, two", [("in-flight=4", "in-flight=5"), ("timeout=4", "timeout=5"),
                                      ("attempts=4", "attempts=5"), ("in-flight=4", "")])
def test_judges_of_one_server_agree_on_how_it_is_asked(one, two):
    with pytest.raises(ValueError, match="judge helpful and judge general share http://h .model m., but " + (
            rf"{one.split('=')[0]} is 4(\.0)? for one and (5(\.0)?|the default) for the other; give both the same")):
        RewardConfig(judges=(f"helpful=http://h,m,{one}", f"general=http://h/v1,m,{two}".rstrip(",")))
    for apart in ("http://i,m", "http://h,n", "http://h,m,key=KEY"):
        RewardConfig(judges=(f"helpful=http://h,m,{one}", f"general={apart},{two}".rstrip(",")))
    with pytest.raises(ValueError, match="judge helpful is named twice; name it once"):
        RewardConfig(judges=("helpful=http://h,m", "helpful=http://i,m"))


def test_a_server_may_move_and_its_verdicts_may_not():
    def judged(*judges, **more):
        return replace(Config(), reward=RewardConfig(judges=judges, **more))

    base = judged("helpful=http://h,m", "scalar=http://h,s,activation=0:4")
    moved = judged("scalar=http://i,s,activation=0:4,key=KEY", "helpful=https://j:9/v1,m,in-flight=1,timeout=9,attempts=2",
                   judge_cache="elsewhere")
    assert moved.hash() == base.hash() and moved.identity() == base.identity()
    assert base.identity()["reward"]["judges"] == {"helpful": {"model": "m", "graded": True},
                                                   "scalar": {"model": "s", "activation": "0:4"}}
    others = [
        judged("helpful=http://h,n", "scalar=http://h,s,activation=0:4"), judged("helpful=http://h,m"),
        judged("helpful=http://h,m,graded=no", "scalar=http://h,s,activation=0:4"),
        judged("helpful=http://h,m", "scalar=http://h,s,activation=0:5"),
        judged("helpful=http://h,m", "scalar=http://h,s,activation=0:4", judge_thinking=True),
    ]
    assert len({base.hash(), *(other.hash() for other in others)}) == 6


def test_fields_are_explained_and_few():
    """A docstring under each field, and fewer than 90 fields in all."""
    tree = ast.parse((ROOT / "cpgd" / "config.py").read_text())
    for node in (n for n in tree.body if isinstance(n, ast.ClassDef)):
        for at, statement in enumerate(node.body):
            if isinstance(statement, ast.AnnAssign) and "Config" not in ast.unparse(statement.annotation):
                below = node.body[at + 1] if at + 1 < len(node.body) else None
                explained = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                assert explained, f"{node.name}.{ast.unparse(statement.target)} has no docstring line"

    def count(kind) -> int:
        return sum(count(f.default_factory) if is_dataclass(f.default_factory) else 1 for f in fields(kind))

    assert 40 < count(Config) < 90
