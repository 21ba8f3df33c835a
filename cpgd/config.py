"""The settings of one run, as frozen dataclasses: read by every module, parsed from the command line by tyro.

A docstring line under each field gives its meaning, unit and, where ours differs, the paper's value.
"authors' code" is the public training code behind arXiv 2505.12504.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Literal


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    path: str = ""
    """Folder of a Qwen2.5-VL; empty: the previous stage's hf/ in the run directory, else the preset's own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; master weights and gradient reduction stay float32."""
    freeze_vision: bool = False
    """Keep the vision tower (not its merger) fixed, as the papers do; replicated instead of sharded then."""
    gradient_checkpointing: bool = True
    """Recompute decoder layers in the backward pass."""
    attention: Literal["sdpa", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers."""
    liger: Literal["auto", "on", "off"] = "auto"
    """Liger's RMSNorm, SwiGLU and M-RoPE kernels; auto: on CUDA, where liger-kernel is installed."""


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
    max_prompt_tokens: int = 4096
    """Longest prompt in tokens, image tokens included; a longer one is an error, never truncated."""
    max_image_pixels: int = 16_777_216
    """Largest image accepted, in pixels (width x height), against decompression bombs."""
    resize_pixels: int = 1_003_520
    """Images are resized to at most this many pixels (Qwen's 28 x 28 x 1280)."""

    def __post_init__(self) -> None:
        self.shares()
        self.named_sets()

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
            name, _, share = entry.partition("=")
            try:
                out[name] = float(share)
            except ValueError as error:
                raise ValueError(f"--data.mix holds {entry!r}; write DOMAIN=SHARE, as safety=0.75") from error
            _require(0 <= out[name] < float("inf"), f"--data.mix holds {entry!r}; give a share of at least 0")
        return out


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    prompts: int = 128
    """Prompts per rollout (iteration)."""
    group_size: int = 8
    """Responses per prompt, K in the paper."""
    temperature: float = 1.0
    """Sampling temperature; log-probs and entropies are taken at the same temperature."""
    max_new_tokens: int = 4096
    """Longest response in tokens."""
    batch_size: int = 64
    """Requests per generate call; formed over all ranks, so that results do not depend on their number."""
    canary_limit: float = 0.5
    """Largest mean |log-prob difference| of engine and trainer on one response, nats; beyond it the run stops."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    name: Literal["cpgd", "grpo", "ppo", "reinforce_pp", "rloo"] = "cpgd"
    """Policy objective; the others stand beside CPGD for comparison."""
    clip_eps_low: float = 0.2
    """Lower clip of the ratio, 1 - eps (not in the paper; authors' code 0.2)."""
    clip_eps_high: float = 0.2
    """Upper clip of the ratio, 1 + eps (not in the paper; authors' code 0.2)."""
    clip_schedule: float = 1.0
    """lambda of the tight-to-loose clip: eps_i = lambda*eps + (1-lambda)*eps*i/|y|; 1 is the constant clip."""
    dual_clip: float = 3.0
    """grpo only: upper bound of the ratio for negative advantages (paper 3.0); 0 switches it off."""
    drift: Literal["sampled", "exact"] = "sampled"
    """Policy drift: k3 on the sampled tokens (paper), or exact KL(pi_old || pi_theta) over the vocabulary."""
    drift_coef: float = 0.01
    """alpha, weight of the drift in cpgd, the only objective with one (not in the paper; authors' code 0.01)."""
    drift_clip: float = 2.0
    """c, bound on the drift's gradient coefficient (not in the paper; authors' code 2.0); no part in `exact`."""
    weight: Literal["std", "clip_filter", "equal"] = "std"
    """w(x) of cpgd, grpo and ppo: 1/std of the group, the clip-filter-like weight, or 1."""
    weight_cap: float = 3.0
    """c_w, cap of the clip-filter-like weight (not in the paper; authors' code 3.0)."""
    aggregation: Literal["group", "sequence", "token"] = "group"
    """Token mean per group, then mean over prompts (paper); per sequence (authors' code as run); over all tokens."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus in nats (neither paper has one)."""


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
    """Judges as NAME=URL,MODEL or NAME=URL,MODEL,KEY_VARIABLE; a task or term whose judge is named is judged by it."""
    judge_thinking: bool = False
    """Judge the thinking too, in a call of its own, and multiply the two values."""
    judge_cache: str = ""
    """Folder of verdicts, shared by runs; empty: none is kept."""
    judge_in_flight: int = 32
    """Calls to one server at a time."""
    judge_timeout: float = 60.0
    """Seconds that one attempt of a call may take."""
    judge_attempts: int = 8
    """Attempts of a call before it has failed."""
    refusal_value: float = 1.0
    """Task-Aware value of a plain refusal on an unsafe row (SafeWork-R1's code 0.1, with a warning worth 1)."""
    failure_budget: float = 0.1
    """Largest share of responses of one rollout whose reward may fail before the run stops."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    learning_rate: float = 1e-6
    """Peak learning rate of AdamW (paper 1e-6)."""
    min_lr_ratio: float = 0.1
    """Floor of the cosine as a share of the peak (authors' code 0.1)."""
    warmup_steps: int = 0
    """Linear warm-up in optimizer steps (authors' code 0)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW betas (authors' code)."""
    eps: float = 1e-8
    """AdamW epsilon."""
    weight_decay: float = 0.01
    """Decoupled weight decay (authors' code 1e-2)."""
    max_grad_norm: float = 1.0
    """Global gradient norm clip (authors' code 1.0)."""
    updates_per_rollout: int = 8
    """Optimizer steps per rollout (authors' code 8); with 1 neither clip nor drift ever acts."""
    sft_batch: int = 128
    """Rows per optimizer step in stage 0."""
    max_nonfinite: int = 3
    """Consecutive steps skipped for non-finite gradients before the run stops."""


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    layout: Literal["packed", "padded"] = "packed"
    """Micro-batches as one packed row, or as right-padded rows (faster where attention has no varlen kernel)."""
    max_tokens: int = 16_384
    """Token budget of a micro-batch per rank, prompt and padding included."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 50
    """Optimizer steps between checkpoints; RL stages round up to the end of a rollout."""
    keep: int = 2
    """Checkpoints kept."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    every: int = 0
    """Optimizer steps between evaluations on the validation split (or eval_path), to evals.jsonl; 0: none."""
    split: Literal["heldout", "validation"] = "heldout"
    """Embedded split of the report; recipes are tuned on `validation` only."""
    max_rows: int = 0
    """At most this many rows per group in the report; 0: all."""
    batch_size: int = 256
    """Requests per generate call in evaluation."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    tensorboard: bool = True
    """Write TensorBoard event files beside metrics.jsonl."""
    samples: int = 8
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
    run_dir: str = ""
    """Run directory; empty: runs/PRESET."""
    steps: int = 100
    """Optimizer steps of this stage."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue from the latest checkpoint of the same config; never: refuse a folder that is not empty."""
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
        r, o, w, p = self.rollout, self.objective, self.reward, self.optim
        for option, value, least in (
            ("steps", self.steps, 1), ("data.max-prompt-tokens", self.data.max_prompt_tokens, 1),
            ("data.resize-pixels", self.data.resize_pixels, 1), ("rollout.max-new-tokens", r.max_new_tokens, 1),
            ("rollout.batch-size", r.batch_size, 1), ("objective.dual-clip", o.dual_clip, 0),
            ("objective.drift-coef", o.drift_coef, 0), ("objective.drift-clip", o.drift_clip, 0),
            ("optim.warmup-steps", p.warmup_steps, 0), ("optim.sft-batch", p.sft_batch, 1),
            ("optim.max-nonfinite", p.max_nonfinite, 1), ("batch.max-tokens", self.batch.max_tokens, 1),
            ("checkpoint.every", self.checkpoint.every, 1), ("checkpoint.keep", self.checkpoint.keep, 1),
            ("eval.every", self.eval.every, 0), ("eval.max-rows", self.eval.max_rows, 0),
            ("eval.batch-size", self.eval.batch_size, 1), ("log.samples", self.log.samples, 0),
        ):
            _require(value >= least, f"--{option} is {value}; give at least {least}")
        for option, value in (
            ("rollout.temperature", r.temperature), ("rollout.canary-limit", r.canary_limit),
            ("objective.clip-eps-high", o.clip_eps_high), ("objective.weight-cap", o.weight_cap),
            ("optim.learning-rate", p.learning_rate), ("optim.max-grad-norm", p.max_grad_norm),
        ):
            _require(value > 0, f"--{option} is {value}; give a value above 0")
        _require(r.group_size >= 2 or self.stage == 0,
                 f"--rollout.group-size is {r.group_size}; a group needs 2 responses for a baseline")
        _require(1 <= p.updates_per_rollout <= r.prompts,
                 f"--optim.updates-per-rollout is {p.updates_per_rollout} and --rollout.prompts is {r.prompts}; "
                 "each update takes whole groups, so give at most as many updates as prompts")
        _require(0 < o.clip_eps_low < 1, f"--objective.clip-eps-low is {o.clip_eps_low}; give a value in (0, 1)")
        _require(0 <= o.clip_schedule <= 1, f"--objective.clip-schedule is {o.clip_schedule}; give a value in [0, 1]")
        _require(o.drift == "sampled" or o.name == "cpgd",
                 f"--objective.drift {o.drift} needs --objective.name cpgd, which is {o.name}")
        _require(o.drift == "sampled" or o.entropy_coef == 0,
                 f"--objective.drift {o.drift} has no entropy bonus, and --objective.entropy-coef is {o.entropy_coef}; "
                 "give 0, or --objective.drift sampled")
        _require(min(w.format, w.visual_focus, w.helpful, w.task_aware) >= 0,
                 f"reward weights must not be negative: format {w.format}, visual_focus {w.visual_focus}, "
                 f"helpful {w.helpful}, task_aware {w.task_aware}")
        _require(w.judge_in_flight >= 1 and w.judge_attempts >= 1 and w.judge_timeout > 0,
                 f"--reward.judge-in-flight is {w.judge_in_flight}, judge-attempts {w.judge_attempts}, judge-timeout "
                 f"{w.judge_timeout}; give at least 1, at least 1, and a time above 0")
        _require(0 <= w.failure_budget <= 1, f"--reward.failure-budget is {w.failure_budget}; give a share in [0, 1]")

    def to_dict(self) -> dict:
        """Nested plain dict, JSON-ready."""
        return json.loads(json.dumps(asdict(self)))

    def identity(self) -> dict:
        """The fields that a resumed run must share: all but the place of the run and how it resumes."""
        plain = self.to_dict()
        for name in ("run_dir", "resume"):
            del plain[name]
        return plain

    def hash(self) -> str:
        """blake2b over `identity()`, 16 hex digits."""
        return hashlib.blake2b(json.dumps(self.identity(), sort_keys=True).encode(), digest_size=8).hexdigest()
