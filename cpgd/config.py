"""The settings of one run, as frozen dataclasses: read by every module, parsed from the command line by tyro.

A docstring line under each field gives its meaning, unit and, where ours differs, the paper's value.
"authors' code" is the public training code behind arXiv 2505.12504. Fields made by `free` are those that a resumed run
may change: steps, and what moves no number that it learns from by more than rounding. A field's bound stands beside its
default, rules over several fields in `check` of what holds them; all are checked once a Config is whole.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from cosmo_rl.data.errors import UserError
from cosmo_rl.data.schema import TASKS

from .judges.spec import ACTIVATION, GRADED, Option, Server, check_shared, parse_server

T = TypeVar("T")


Bound = tuple[Callable[[Any], bool], str]
"""Whether it holds of a value, and what is wanted, in words after "give"."""


def at_least(least: int) -> Bound:
    """Of a number."""
    return lambda value: value >= least, f"at least {least}"


POSITIVE: Bound = (lambda value: 0 < value < math.inf, "a finite value above 0")


def bounded(default: T, bound: Bound) -> T:
    """A field with this default, whose value is checked."""
    return field(default=default, metadata={"bound": bound})


def free(default: T, bound: Bound | None = None) -> T:
    """A field with this default that a resumed run may change: it is no part of the run's identity."""
    return field(default=default, metadata={"free": True, "bound": bound})


def _check_bounds(settings: Any, group: str = "") -> None:
    for entry in fields(settings):
        value, bound = getattr(settings, entry.name), entry.metadata.get("bound")
        if is_dataclass(value):
            _check_bounds(value, f"{entry.name}.")
        elif bound:
            holds, wanted = bound
            _require(holds(value), f"--{group}{entry.name.replace('_', '-')} is {value}; give {wanted}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of its port, or of half a bracket
        return False


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    path: str = ""
    """Folder of a Qwen2.5-VL; empty: the previous stage's hf/ in the run directory, else the preset's own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; master weights and gradient reduction stay float32."""
    freeze_vision: bool = False
    """Keep the vision tower (not its merger) fixed, as the papers do; replicated instead of sharded then."""
    gradient_checkpointing: bool = free(True)
    """Recompute decoder layers in the backward pass."""
    attention: Literal["sdpa", "flash_attention_2"] = free("sdpa")
    """Attention implementation of transformers."""
    liger: Literal["auto", "on", "off"] = free("auto")
    """Liger's RMSNorm, SwiGLU and M-RoPE kernels; auto: on CUDA, where liger-kernel is installed."""
    export_dtype: Literal["float32", "bfloat16"] = free("float32")
    """Dtype of the weights in hf/; float32: the masters, from which the next stage should start."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    path: tuple[str, ...] = ()
    """Row files (JSON lines, parquet) or saved Hugging Face datasets; empty: the embedded data of the stage."""
    eval_path: tuple[str, ...] = ()
    """Held-out rows for the report; empty: the embedded held-out split, or none when `path` is given."""
    evaluation_sets: tuple[str, ...] = ()
    """Evaluation sets as NAME=FILE; training rows that are in one, or in `eval_path`, are reported and dropped."""
    contaminated: Literal["drop", "report"] = "drop"
    """What happens to training rows that are in an evaluation set."""
    mix: tuple[str, ...] = ()
    """Share of each domain in every rollout, as safety=0.75 general=0.25; empty: as the rows come."""
    curriculum: tuple[float, float] = (0.0, 1.0)
    """Rows whose last pass rate lies outside LOW HIGH are passed over for one epoch; 0 1: none (data/sampler.py)."""
    max_prompt_tokens: int = free(4096, at_least(1))
    """Longest prompt in tokens, image tokens included; a longer one is an error, never truncated."""
    max_image_pixels: int = free(16_777_216)
    """Largest image accepted, in pixels (width x height), against decompression bombs."""
    resize_pixels: int = bounded(1_003_520, at_least(1))
    """Images are resized to at most this many pixels (Qwen's 28 x 28 x 1280)."""
    system_prompt: str = ""
    """Text, or a file that holds it, before each row without a system message; empty: the chat template's own."""

    def __post_init__(self) -> None:
        self.shares()
        self.named_sets()

    def check(self) -> None:
        low, high = self.curriculum
        _require(0 <= low < high <= 1,
                 f"--data.curriculum is {low} {high}; give two pass rates, 0 <= LOW < HIGH <= 1")

    def named_sets(self) -> dict[str, list[str]]:
        """Row files of each evaluation set, `eval_path` among them."""
        found: dict[str, list[str]] = {"eval_path": list(self.eval_path)} if self.eval_path else {}
        for entry in self.evaluation_sets:
            name, _, path = entry.partition("=")
            _require(bool(name and path), f"--data.evaluation-sets holds {entry!r}; write NAME=FILE")
            found.setdefault(name, []).append(path)
        return found

    def shares(self) -> dict[str, float]:
        """`mix` by domain."""
        out: dict[str, float] = {}
        for entry in self.mix:
            name, _, share = entry.rpartition("=")  # a domain's name may hold a =
            _require(name not in out, f"--data.mix gives domain {name!r} two shares; give it one")
            try:
                out[name] = float(share)
            except ValueError as error:
                raise UserError(f"--data.mix holds {entry!r}; write DOMAIN=SHARE, as safety=0.75") from error
            _require(0 <= out[name] < float("inf"), f"--data.mix holds {entry!r}; give a share of at least 0")
        return out


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    engine: Literal["hf", "server", "vllm"] = "hf"
    """What samples: transformers' generate, vLLM servers, or vLLM in the trainer's processes (docs/rollout.md)."""
    servers: tuple[str, ...] = free(())
    """URLs of vLLM servers that run already, for `engine` server; each for this run alone."""
    serve: tuple[str, ...] = free(())
    """vLLM servers to start, watch, end: each "NAME=VALUE ... PYTHON [options of vLLM]", as .venv-vllm/bin/python. For
    `engine` vllm "vllm [options]", as "vllm --gpu-memory-utilization 0.4"."""
    verify_every: int = free(20, at_least(1))
    """Syncs between comparisons of all weights' checksums with the servers'; between them one layer's, in turn."""
    staleness: Literal[0, 1] = 0
    """1: vLLM servers sample the next rollout while the policy is trained on this one, so that it is one rollout older
    than the weights it meets; none is sampled ahead over a checkpoint or a measurement."""
    prompts: int = 128
    """Prompts per rollout (iteration)."""
    group_size: int = 8
    """Responses per prompt, K in the paper."""
    temperature: float = bounded(1.0, POSITIVE)
    """Sampling temperature; log-probs and entropies are taken at the same temperature."""
    max_new_tokens: int = bounded(4096, at_least(1))
    """Longest response in tokens."""
    batch_size: int = free(64, at_least(1))
    """Requests per generate call at most, in evaluation twice that. Calls are formed over all ranks, and smaller where
    there are more ranks than calls: up to then results do not depend on the number of ranks. Of another size they
    differ in the last bits of logits, so that now and then another token is drawn."""
    cache_gib: float = free(32.0, POSITIVE)
    """KV cache of a generate call at most, in training and evaluation, in GiB: longer prompts make smaller calls."""
    dynamic_sampling: int = bounded(0, at_least(0))
    """Most rounds in which prompts with equal rewards are replaced by others of their domain (DAPO); 0: none."""
    overlong: Literal["keep", "filter", "punish"] = "keep"
    """Responses that max_new_tokens cuts off: trained on as others; left out of the loss; or, with those that come near
    it, rewarded less. The last two are DAPO's filter and soft punishment: rewards/overlong.py."""
    canary_limit: float = free(0.0, at_least(0))
    """Largest mean |log-prob difference| of engine and trainer on one response, nats; beyond it the run stops. 0: by
    dtype and by the noise of the first rollout (cpgd/run/canary.py)."""
    correction: float = bounded(0.0, (lambda value: value == 0 or value >= 1, "0 or a cap of at least 1, as 2"))
    """Cap of importance weights pi / pi_engine on the policy term, for engines of other rounding, as in bfloat16 (Yao
    et al. 2025, see arXiv:2510.26788); 0: none. One more forward of a rollout's first update."""

    def check(self) -> None:
        given = [*self.servers, *(self.serve if self.engine != "vllm" else ())]
        _require(bool(given) == (self.engine == "server"),
                 f"--rollout.engine is {self.engine}, and --rollout.servers and --rollout.serve name "
                 f"{', '.join(given) or 'no server'}; engine server takes the URLs of some that run, or what to start")
        _require(self.staleness == 0 or self.engine == "server",
                 f"--rollout.staleness is {self.staleness}, and --rollout.engine {self.engine} samples in the "
                 "trainer's own process; give it 0, or --rollout.engine server")
        _require(self.staleness == 0 or self.correction == 0,
                 f"--rollout.staleness is {self.staleness} and --rollout.correction {self.correction}; its ratios are "
                 "to the engine's log-probs already, so give one of the two")
        if self.engine == "vllm":
            _require(len(self.serve) <= 1 and all(launch.split()[:1] == ["vllm"] for launch in self.serve),
                     f"--rollout.serve is {' '.join(map(repr, self.serve))}, and --rollout.engine vllm takes one "
                     '"vllm [options]", as "vllm --gpu-memory-utilization 0.4"')
        for url in self.servers:
            _require(_is_url(url), f"--rollout.servers holds {url!r}; give URLs, as http://127.0.0.1:8000")
        _require(len(set(self.servers)) == len(self.servers), f"--rollout.servers names a server twice: {self.servers}")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    name: Literal["cpgd", "grpo", "ppo", "reinforce_pp", "rloo"] = "cpgd"
    """Policy objective; the others stand beside CPGD for comparison."""
    clip_eps_low: float = bounded(0.2, (lambda value: 0 < value < 1, "a value in (0, 1)"))
    """Lower clip of the ratio, 1 - eps (not in the paper; authors' code 0.2)."""
    clip_eps_high: float = bounded(0.2, POSITIVE)
    """Upper clip of the ratio, 1 + eps (not in the paper; authors' code 0.2)."""
    clip_schedule: float = bounded(1.0, (lambda value: 0 <= value <= 1, "a value in [0, 1]"))
    """lambda of the tight-to-loose clip: eps_i = lambda*eps + (1-lambda)*eps*i/|y|; 1 is the constant clip."""
    dual_clip: float = bounded(3.0, at_least(0))
    """grpo only: upper bound of the ratio for negative advantages (paper 3.0); 0 switches it off."""
    drift: Literal["sampled", "exact"] = "sampled"
    """Policy drift: k3 on the sampled tokens (paper), or exact KL(pi_old || pi_theta) over the vocabulary."""
    drift_coef: float = bounded(0.01, at_least(0))
    """alpha, weight of the drift in cpgd, the only objective with one (not in the paper; authors' code 0.01)."""
    drift_clip: float = bounded(2.0, at_least(0))
    """c, bound on the drift's gradient coefficient (not in the paper; authors' code 2.0); no part in `exact`."""
    weight: Literal["std", "clip_filter", "equal"] = "std"
    """w(x) of cpgd, grpo and ppo: 1/std of the group, the clip-filter-like weight, or 1."""
    weight_cap: float = bounded(3.0, POSITIVE)
    """c_w, cap of the clip-filter-like weight (not in the paper; authors' code 3.0)."""
    aggregation: Literal["group", "sequence", "token"] = "group"
    """Token mean per group, then mean over prompts (paper); per sequence (authors' code as run); over all tokens."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus in nats (neither paper has one)."""

    def check(self) -> None:
        _require(self.drift == "sampled" or self.name == "cpgd",
                 f"--objective.drift {self.drift} needs --objective.name cpgd, which is {self.name}")
        _require(self.drift == "sampled" or self.entropy_coef == 0,
                 f"--objective.drift {self.drift} has no entropy bonus, and --objective.entropy-coef is "
                 f"{self.entropy_coef}; give 0, or --objective.drift sampled")


JUDGES: dict[str, dict[str, Option]] = {
    "safework_safety": {}, "safework_value": GRADED, "safework_knowledge": GRADED, "helpful": GRADED, "general": {},
    "visual_focus": GRADED, "qwen3guard": {}, "llama_guard_4": GRADED, "scalar": ACTIVATION,
}
"""The judges that a user may name, with the options that each takes beside those of its server."""


@dataclass(frozen=True, kw_only=True)
class JudgeEntry:
    """Where a judge is served and how it is asked: one entry of `RewardConfig.judges`."""

    judge: str
    """One of JUDGES."""
    server: Server
    """Judges with one URL, model and key share an endpoint."""
    graded: bool = True
    """Ask for log-probs: the probability of the good label instead of 0 or 1."""
    activation: str = "none"
    """Of a scalar head's output: none, sigmoid or LOW:HIGH."""

    def identity(self) -> dict:
        """What its verdicts depend on."""
        return {"model": self.server.model} | {name: getattr(self, name) for name in JUDGES[self.judge]}


def parse_judge(entry: str) -> JudgeEntry:
    """The JudgeEntry of "NAME=URL,MODEL[,OPTION=VALUE...]"; raises UserError as `parse_server` does."""
    judge, _, rest = entry.partition("=")
    _require(judge in JUDGES, f"there is no judge {judge[:40]!r}; use one of {', '.join(JUDGES)}, as NAME=URL,MODEL")
    server = parse_server(rest, f"judge {judge}", JUDGES[judge])
    return JudgeEntry(judge=judge, server=server, **server.more)


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    format: float = 0.1
    """Weight of the Format term (COSMO-RL's weights are unpublished)."""
    visual_focus: float = 0.2
    """Weight of the Visual-Focus term (ours: the formula is unpublished)."""
    helpful: float = 0.2
    """Weight of the Helpful term."""
    task_aware: float = 1.0
    """Weight of the Task-Aware term."""
    visual_focus_mode: Literal["elements", "contrast"] = "elements"
    """Coverage of key elements in the thinking, or log-prob gain of the answer over a blank image."""
    safety: Literal["judge", "safegrpo", "hybrid"] = "judge"
    """Task-Aware on safety and jailbreak rows: by the safety judge named, else by rule; as SafeGRPO; as Qwen3Guard."""
    judges: tuple[str, ...] = ()
    """Judges as NAME=URL,MODEL[,OPTION=VALUE...]; options: key, in-flight, timeout, attempts, activation, graded."""
    judge_thinking: bool = False
    """Judge the thinking too, in a call of its own, and multiply the two values."""
    judge_cache: str = free("")
    """Folder of verdicts, shared by runs; empty: none is kept."""
    refusal_value: float = 1.0
    """Task-Aware value of a plain refusal on an unsafe row (SafeWork-R1's code 0.1, with a warning worth 1)."""
    function: str = ""
    """FILE:NAME of a function of your own, (row, response) -> float in [0, 1]; see cpgd/rewards/function.py."""
    function_weight: float = 1.0
    """Weight of its term."""
    function_tasks: tuple[str, ...] = ()
    """Tasks of the rows that it scores; empty: all."""
    failure_budget: float = free(0.1, (lambda value: 0 <= value <= 1, "a share in [0, 1]"))
    """Largest share of responses of one rollout whose reward may fail before the run stops."""

    def __post_init__(self) -> None:
        self.judge_entries()
        file, _, name = self.function.rpartition(":")
        _require(not self.function or bool(file and name.isidentifier()),
                 f"--reward.function is {self.function!r}; write FILE:NAME, as my_reward.py:score")
        _require(not self.function_tasks or bool(self.function),
                 "--reward.function-tasks is given without --reward.function; give it FILE:NAME")
        for task in self.function_tasks:
            _require(task in TASKS, f"--reward.function-tasks holds {task!r}; give some of {', '.join(TASKS)}")

    def check(self) -> None:
        weights = {"format": self.format, "visual_focus": self.visual_focus, "helpful": self.helpful,
                   "task_aware": self.task_aware, "function": self.function_weight}
        told = ", ".join(f"{name} {weight}" for name, weight in weights.items())
        _require(all(0 <= weight < float("inf") for weight in weights.values()),
                 f"reward weights must be finite and must not be negative: {told}")

    def judge_entries(self) -> list[JudgeEntry]:
        """`judges`, read.

        Raises:
            UserError: an entry is wrong, a judge is named twice, or two of one server ask it in different ways.
        """
        found: dict[str, JudgeEntry] = {}
        for entry in map(parse_judge, self.judges):
            _require(entry.judge not in found, f"judge {entry.judge} is named twice; name it once")
            found[entry.judge] = entry
        check_shared({f"judge {name}": entry.server for name, entry in found.items()})
        return list(found.values())


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    learning_rate: float = bounded(1e-6, POSITIVE)
    """Peak learning rate of AdamW (paper 1e-6)."""
    min_lr_ratio: float = 0.1
    """Floor of the cosine as a share of the peak (authors' code 0.1)."""
    warmup_steps: int = bounded(0, at_least(0))
    """Linear warm-up in optimizer steps (authors' code 0)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW betas (authors' code)."""
    eps: float = 1e-8
    """AdamW epsilon."""
    weight_decay: float = 0.01
    """Decoupled weight decay (authors' code 1e-2)."""
    max_grad_norm: float = bounded(1.0, POSITIVE)
    """Global gradient norm clip (authors' code 1.0)."""
    updates_per_rollout: int = 8
    """Optimizer steps per rollout (authors' code 8); with 1 neither clip nor drift ever acts."""
    sft_batch: int = bounded(128, at_least(1))
    """Rows per optimizer step in stage 0."""
    max_nonfinite: int = free(3, at_least(1))
    """Consecutive steps skipped for non-finite gradients before the run stops."""


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    layout: Literal["packed", "padded"] = free("packed")
    """Micro-batches as one packed row, or as right-padded rows (faster where attention has no varlen kernel)."""
    max_tokens: int = free(16_384, at_least(1))
    """Token budget of a micro-batch per rank, prompt and padding included. Another split of an update into
    micro-batches changes its sums in their last bits."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = free(50, at_least(1))
    """Optimizer steps between checkpoints; RL stages round up to the end of a rollout."""
    keep: int = free(2, at_least(1))
    """Checkpoints kept."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    every: int = free(0, at_least(0))
    """Optimizer steps between evaluations on the validation split (or eval_path), to evals.jsonl; 0: none."""
    split: Literal["heldout", "validation"] = "heldout"
    """Embedded split of the report; recipes are tuned on `validation` only."""
    max_rows: int = bounded(0, at_least(0))
    """At most this many rows per group in the report; 0: all."""
    guard: Literal["off", "warn", "stop"] = free("off")
    """What a fall of general accuracy or benign acceptance, measured every `every` steps, leads to: run/guard.py."""
    guard_drop: float = free(0.05, (lambda value: 0 <= value < 1, "a share of at least 0, below 1"))
    """Largest fall below the first measurement that the guard lets pass, absolute."""

    def check(self) -> None:
        _require(self.guard == "off" or self.every > 0,
                 f"--eval.guard {self.guard} needs measurements, and --eval.every is 0; give it a number of steps")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    tensorboard: bool = free(True)
    """Write TensorBoard event files beside metrics.jsonl."""
    samples: int = free(8, at_least(0))
    """Sampled responses written to samples.jsonl per iteration."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """One stage of one run. `recipes.py` builds it; the command line overrides single fields."""

    stage: Literal[0, 1, 2] = 2
    """0: SFT cold start, 1: general reasoning, 2: safety, value and general together."""
    preset: Literal["tiny", "3b", "7b", "72b"] = "tiny"
    """Size of model and recipe."""
    seed: int = 0
    """Seed of sampling, data order and initialisation."""
    run_dir: str = free("")
    """Run directory; empty: runs/PRESET."""
    steps: int = free(100, at_least(1))
    """Optimizer steps of this stage; a resumed run may change it, and its learning rate then falls to the new end."""
    resume: Literal["auto", "never"] = free("auto")
    """auto: continue from the latest checkpoint; never: refuse a folder that is not empty. What cannot change what is
    learnt (sizes of batches, limits, logging) may be given anew, steps too; another setting is refused."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        _check_bounds(self)
        for part in (self.data, self.rollout, self.objective, self.reward, self.eval):
            part.check()
        rollout, updates = self.rollout, self.optim.updates_per_rollout
        _require(rollout.group_size >= 2 or self.stage == 0,
                 f"--rollout.group-size is {rollout.group_size}; a group needs 2 responses for a baseline")
        _require(1 <= updates <= rollout.prompts,
                 f"--optim.updates-per-rollout is {updates} and --rollout.prompts is {rollout.prompts}; each update "
                 "takes whole groups, so give at most as many updates as prompts")
        _require(not rollout.dynamic_sampling or self.objective.name != "reinforce_pp",
                 f"--rollout.dynamic-sampling is {rollout.dynamic_sampling}, and --objective.name reinforce_pp learns "
                 "from prompts with equal rewards too, since it compares with the whole rollout; give 0")
        told = ("--rollout.staleness is 1, and the policy that sampled, which {} needs, is gone when "
                "its rollout comes; give it 0")
        _require(rollout.staleness == 0 or self.objective.drift == "sampled", told.format("--objective.drift exact"))
        _require(rollout.staleness == 0 or self.reward.visual_focus_mode == "elements",
                 told.format("--reward.visual-focus-mode contrast"))
        low, high = self.data.curriculum
        _require((low, high) == (0, 1) or self.stage > 0,
                 f"--data.curriculum is {low} {high}, and stage 0 samples nothing that could pass; give 0 1")

    def to_dict(self) -> dict:
        """Nested plain dict, JSON-ready."""
        return json.loads(json.dumps(asdict(self)))

    def identity(self) -> dict:
        """The fields that a resumed run must share; see the function of this name."""
        return identity(self.to_dict())

    def hash(self) -> str:
        """blake2b over `identity()`, 16 hex digits."""
        return hashlib.blake2b(json.dumps(self.identity(), sort_keys=True).encode(), digest_size=8).hexdigest()


def free_fields(kind: type = Config, prefix: str = "") -> set[str]:
    """Names of the fields made by `free`, as "rollout.batch_size"."""
    found: set[str] = set()
    for entry in fields(kind):
        name = prefix + entry.name
        if is_dataclass(entry.default_factory):
            found |= free_fields(entry.default_factory, f"{name}.")
        elif entry.metadata.get("free"):
            found.add(name)
    return found


def identity(settings: dict) -> dict:
    """Of `Config.to_dict()`, which is changed, the fields that a resumed run must share.

    All but those made by `free`; of its judges what the verdicts depend on, by name: servers may move, and be asked in
    another way. Of a reward function its name: the file may move, and checkpoints know its content. Where rollouts are
    made ahead, steps between checkpoints and measurements too: none is made over these, so they say which are fresh.
    """
    ahead = settings["rollout"].get("staleness")
    for name in free_fields() - ({"checkpoint.every", "eval.every"} if ahead else set()):
        group, _, last = name.rpartition(".")
        (settings[group] if group else settings).pop(last, None)
    reward = settings["reward"]
    if "function" in reward:
        reward["function"] = reward["function"].rpartition(":")[2]
    reward["judges"] = {entry.judge: entry.identity() for entry in map(parse_judge, reward["judges"])}
    return settings
