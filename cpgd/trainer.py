"""One stage of a run: rows -> rollout -> rewards -> advantages -> updates -> checkpoint, and the report at the end.

    main(config)      what train.py calls
    Trainer.run       the loop: `_sft_iteration` in stage 0, `_rl_iteration` in stages 1 and 2
"""

import logging
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import groupby, islice
from typing import Any

import torch
import transformers
from torch.distributed.tensor import DTensor

from cosmo_rl.data.collate import EncodedPrompt, encode_prompt
from cosmo_rl.data.errors import UserError
from cosmo_rl.data.prompts import check_system_prompt, introduce
from cosmo_rl.data.sampler import PromptSampler
from cosmo_rl.data.schema import Row
from cosmo_rl.model.liger import wants_liger
from cosmo_rl.model.load import load_model, load_processor
from cosmo_rl.model.parallel import close_distributed, init_distributed, on_main, rank, shard, together
from cosmo_rl.model.policy import Policy
from cosmo_rl.model.weights import full_state_dict, save_pretrained

from .batch import Sample
from .collect import Verdicts, fill_advantages, gather_evidence, judges_took, sample_groups, score, split_updates
from .config import Config
from .rewards.build import build_rewards
from .rewards.function import function_digest
from .rewards.task_aware import TaskAware
from .rewards.word_rules import CAUTION, by_words
from .rollout.hf import HFEngine
from .run.card import write_card
from .run.checkpoint import load_latest, save
from .run.ending import fail
from .run.evaluation import Answered, eval_suite, evaluate, not_compared, numbers
from .run.guard import Guard
from .run.metrics import MetricsWriter, ProgressView, Stderr, rollout_summary, sample_lines, tokens_per_second
from .run.plan import model_fingerprint, plan, prompt_files, start_path
from .run.recipes import mixture
from .run.report import finish_report, read_measured, write_measured
from .run.rundir import RunDir
from .run.watch import Watch
from .selection import pass_rates, select
from .sft import sft_micros
from .update import (
    StepResult,
    check_canary,
    fill_old_logprobs,
    learning_rate,
    optimizer_step,
    rl_loss,
    rl_micros,
    sft_loss,
)

logger = logging.getLogger(__name__)
_STATE = {"iteration": int, "skipped_in_row": int, "trained_s": float | int, "sampler": dict, "guard": dict | None,
          "watch": dict | None, "fingerprint": str, "model_fingerprint": str}
"""What a checkpoint's state holds, that a resume needs."""


class Trainer:
    """A stage in progress. Every method is called by all ranks together."""

    _answered: tuple[int, object, tuple[list[Answered], list[Answered]]] | None = None
    """The latest evaluation: its step, its rows and what `_answers` returned."""

    def __init__(self, config: Config, run: RunDir, device: torch.device) -> None:
        self.config, self.run_dir, self.device = config, run, device
        path = self.start = start_path(config, run)
        self.processor = load_processor(path, config.data.resize_pixels)
        data = config.data
        together(lambda: check_system_prompt(data.system_prompt, self.processor,
                                             max_prompt_tokens=data.max_prompt_tokens))
        self.plan = plan(config, self.processor, run.stage_dir)
        self.rows, self.fingerprint, names = self.plan.rows, self.plan.fingerprint, self.plan.domains
        together(self._load)
        self._agree()
        self.sampler = PromptSampler(names, mixture(config, names), config.seed, config.data.curriculum)
        self.guard, self.watch = Guard(config.eval), Watch()
        if self.judging:
            on_main(self.judging.verify)

        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.model.dtype]
        options = {"attention": config.model.attention, "liger": wants_liger(config.model.liger, device)}
        self.policy = shard(
            Policy(load_model(path, freeze_vision=config.model.freeze_vision, **options),
                   suppressed_ids=self.processor.suppressed_ids, temperature=config.rollout.temperature,
                   gradient_checkpointing=config.model.gradient_checkpointing),
            device=device, dtype=dtype, freeze_vision=config.model.freeze_vision)
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            [p for p in self.policy.parameters() if p.requires_grad], lr=optim.learning_rate, betas=optim.betas,
            eps=optim.eps, weight_decay=optim.weight_decay,
            fused=device.type == "cuda")  # in one kernel; the default on CUDA holds a copy of the masters in a step
        self.dtype = dtype
        sampler: Any = load_model(path, dtype=dtype, **options)
        self.engine = HFEngine(sampler.to(device), self.processor, config.rollout)
        self.loss_fn = rl_loss(config)
        self.step, self.iteration, self.skipped_in_row, self.trained_s = 0, 0, 0, 0.0
        self.other_reward = False

    def _load(self) -> None:
        """Rewards, which may fail on one host only; nothing is returned that would go to other ranks."""
        self.judging, self.function_digest = None, ""
        if self.config.stage > 0:
            assert self.plan.needs is not None
            self.rewards, self.judging, self.reward_weights = build_rewards(self.config.reward, self.plan.needs)
            self.function_digest = function_digest(self.rewards)

    def _agree(self) -> None:
        """What each rank has read of its host's files is the same on all.

        Raises:
            UserError: it is not, as where one host lacks the file, whose name is then taken for the prompt.
        """
        if len(set(together(lambda: self.config.data.system_prompt))) > 1:
            raise UserError("--data.system-prompt is not the same on all ranks; put its file on every host")
        if len(set(together(lambda: self.function_digest))) > 1:
            raise UserError("the file of --reward.function, or a module beside it, is not the same on all ranks; copy "
                            "one version to every host")

    # -- the run ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train from the latest checkpoint to the last step, then write hf/ and the report."""
        config, folder = self.config, self.run_dir.stage_dir
        load = lambda paths: self.plan.eval_rows
        suite: dict[str, Sequence[Row]] = {}
        left_out: list[str] = []
        together(lambda: suite.update(eval_suite(config, config.eval.split, load, left_out)))
        if left_out:
            logger.warning("evaluation: %d rows of --data.eval-path are not measured, as no rule can use them; the "
                           "first: %s", len(left_out), left_out[0])
        if config.eval.every:
            self.watched: dict[str, Sequence[Row]] = suite
            if not config.data.eval_path:  # else the rows are the same
                self.watched = {}
                together(lambda: self.watched.update(eval_suite(config, "validation", load)))
        self._resume()
        on_main(lambda: self.run_dir.adopt(config))
        ruled = self._by_words()
        if rank() == 0:
            print(introduce(config.data.system_prompt, self.rows[0], self.processor, sys.stdout.encoding), flush=True)
        self.metrics = MetricsWriter(folder, config.log.tensorboard)  # used on rank 0 only, as the view
        on_main(lambda: self.metrics.rewind(self.step or -1))  # a try without a checkpoint may have measured step 0
        if self.other_reward and self.step < config.steps:  # as when it failed, and our own error said to mend it
            self._tell(self.step + 1, [f"{config.reward.function}, or a module beside it, is not what it was at the "
                                       "checkpoint: rewards are by the new one from here on"])
        if suite and config.stage > 0:
            if not self.step:  # again, if it is there: a try without a checkpoint may have had another model
                self._measure(suite, "before")
            elif not read_measured(folder, "before"):
                raise UserError(f"{folder} has a checkpoint at step {self.step} but no measurement from before "
                                "training; remove the folder and start the stage again")
        if config.eval.guard != "off" and not self.step:
            self._watch()
        self._train()
        try:
            save_pretrained(self.policy, self.processor, self.run_dir.hf, getattr(torch, config.model.export_dtype))
        except OSError as error:  # raised on all ranks
            raise UserError(f"{self.run_dir.hf}: {error.strerror}") from error
        on_main(lambda: write_card(self.run_dir.hf, config, self.start))
        logger.info("saved to %s", self.run_dir.hf)
        if suite:
            self._measure(suite, "after")
        self.engine.close()
        on_main(lambda: self.metrics.close())
        on_main(lambda: finish_report(folder, config, seconds=self.trained_s, by_words=ruled, left_out=left_out))

    def _train(self) -> None:
        """The iterations that are left, with their checkpoints."""
        config, since_saved = self.config, self.step
        if rank() == 0:
            self.view = ProgressView(config.steps, self.step, f"stage {config.stage}")
        try:
            while self.step < config.steps:
                started = time.perf_counter()
                before = self.step
                (self._sft_iteration if config.stage == 0 else self._rl_iteration)()
                self.trained_s += time.perf_counter() - started
                every = config.eval.every
                if every and self.step // every > before // every:
                    self._watch()
                if self.step - since_saved >= config.checkpoint.every and self.step < config.steps:
                    self._save()
                    since_saved = self.step
            self._save()
        finally:
            if rank() == 0:
                self.view.close()  # or an error message is drawn over

    def _resume(self) -> None:
        state = load_latest(self.run_dir.checkpoints, self.policy, self.optimizer)
        self.model_fingerprint = model_fingerprint(self.start)
        if state is None:
            return
        other = lambda names: UserError(
            f"state.json of the checkpoint in {self.run_dir.checkpoints} is without {names} as this version writes it: "
            "continue with the version that wrote it, or give another --run-dir")
        if wrong := [name for name, kind in _STATE.items() if not isinstance(state.get(name), kind)]:
            raise other(", ".join(wrong))
        saved = f"the checkpoint in {self.run_dir.checkpoints} was made with fingerprint"
        if state["fingerprint"] != self.fingerprint:
            raise UserError(f"the data changed: {saved} {state['fingerprint']}, the rows now have {self.fingerprint}; "
                            "restore the data or give another --run-dir")
        if state["model_fingerprint"] != self.model_fingerprint:
            raise UserError(f"the model folder changed: {saved} {state['model_fingerprint']}, "
                            f"{', '.join(prompt_files(self.start))} of {self.start} now have "
                            f"{self.model_fingerprint}; restore them or give another --run-dir")
        self.other_reward = state.get("function_digest", "") != self.function_digest
        self.step, self.iteration = state["step"], state["iteration"]
        if self.step > self.config.steps:
            raise UserError(f"--steps is {self.config.steps}, and step {self.step} is done in "
                            f"{self.run_dir.checkpoints}; give at least {self.step}, or another --run-dir")
        self.skipped_in_row, self.trained_s = state["skipped_in_row"], state["trained_s"]
        part = "sampler"
        try:
            self.sampler.load_state_dict(state[part])
            self.guard.load_state_dict(state.get(part := "guard"))
            self.watch.load_state_dict(state.get(part := "watch"))
        except (KeyError, TypeError, AttributeError) as error:
            raise other(part) from error
        self.guard.enforce()
        logger.info("resumed at step %d", self.step)

    def _save(self) -> None:
        on_main(lambda: self.metrics.sync())
        state = {"iteration": self.iteration, "skipped_in_row": self.skipped_in_row, "trained_s": self.trained_s,
                 "sampler": self.sampler.state_dict(), "guard": self.guard.state_dict(),
                 "watch": self.watch.state_dict(),
                 "fingerprint": self.fingerprint, "model_fingerprint": self.model_fingerprint,
                 "function_digest": self.function_digest,
                 "config": self.config.to_dict(), "config_hash": self.config.hash()}
        save(self.run_dir.checkpoints, self.step, self.policy, self.optimizer, state, self.config.checkpoint.keep)

    def _measure(self, suite: dict[str, Sequence[Row]], when: str) -> None:
        sampled, greedy = self._answers(suite)
        on_main(lambda: write_measured(self.run_dir.stage_dir, when, sampled, greedy, _shown(sampled, suite)))

    def _watch(self) -> None:
        """Numbers on the validation rows, to evals.jsonl."""
        sampled, greedy = self._answers(self.watched)
        line = {"step": self.step, "sampled": numbers(sampled), "greedy": numbers(greedy)}
        line |= self.guard.look(self.step, sampled)
        on_main(lambda: self.metrics.evaluated(line))
        self.guard.enforce(self._save)

    def _answers(self, suite: dict[str, Sequence[Row]]) -> tuple[list[Answered], list[Answered]]:
        """A sampled and a greedy answer to each row, of the policy as it is."""
        if not suite:
            return [], []
        if self._answered and self._answered[0] == self.step and self._answered[1] is suite:
            return self._answered[2]  # the report's rows are watched too: at the first and last step by one evaluation
        self._sync()
        sampled, greedy = evaluate(self.engine, suite, self._encode, self.processor, self.config)
        if problems := not_compared(sampled):
            logger.warning("evaluation: %d of %d answers could not be compared, and are neither right nor wrong; the "
                           "first: %s", len(problems), len(sampled), problems[0])
        self._answered = (self.step, suite, (sampled, greedy))
        return sampled, greedy

    def _by_words(self) -> list[str]:
        """The rewards that word rules give; told loudly, as they cannot judge free text."""
        task_aware = self.rewards.get("task_aware") if self.config.stage else None
        ruled = by_words(self.config, task_aware.asked if isinstance(task_aware, TaskAware) else ())
        if ruled:
            logger.warning("WARNING: rewarded by word rules: %s: %s", ", ".join(ruled), CAUTION)
        return ruled

    def _sync(self) -> None:
        self.engine.sync(full_state_dict(self.policy, dtype=self.dtype), self.step)

    def _encode(self, row: Row) -> EncodedPrompt:
        data = self.config.data
        return encode_prompt(row, self.processor, max_prompt_tokens=data.max_prompt_tokens,
                             max_image_pixels=data.max_image_pixels, system_prompt=data.system_prompt)

    def _encoded(self, numbers: Sequence[int]) -> tuple[list[Row], list[EncodedPrompt]]:
        found: list[tuple[Row, EncodedPrompt]] = []

        def read() -> None:  # a row or an image may be readable on one host only
            for i in numbers:
                row = self.rows[i]
                found.append((row, self._encode(row)))

        together(read)
        return [row for row, _ in found], [prompt for _, prompt in found]

    # -- stage 0 ------------------------------------------------------------------------------------------------------

    def _sft_iteration(self) -> None:
        clock: dict[str, float] = defaultdict(float)
        with _timed(clock, "data"):
            rows, prompts = self._encoded(self.sampler.take(self.config.optim.sft_batch))
            micros = sft_micros(rows, prompts, self.config, self.processor, self.device)
        with _timed(clock, "update"):
            result = optimizer_step(self.policy, self.optimizer, micros, sft_loss, self._rate(),
                                    self.config.optim.max_grad_norm)
        self._finish_step(result, [row.id for row in rows], {}, clock)
        self._tell(self.step, self.watch.updated([result], entropy=False))
        self.iteration += 1

    # -- stages 1 and 2 -----------------------------------------------------------------------------------------------

    def _rl_iteration(self) -> None:
        config = self.config
        clock: dict[str, float] = defaultdict(float)
        with _timed(clock, "rollout"):
            self._sync()
        selection = select(self.sampler.take(config.rollout.prompts), partial(self._attempt, clock),
                           self.sampler.replace, config.rollout.dynamic_sampling)
        samples = selection.samples
        fill_advantages(samples, config)
        rewards, took = rollout_summary(selection.first) | selection.counts, judges_took(self.judging)
        sampled = sum(len(s.response.ids) for s in selection.sampled)
        on_main(lambda: self.metrics.samples(sample_lines(samples, config.log.samples, self.step + 1)))
        self._tell(self.step + 1, self.watch.rollout(samples, selection.first, config.rollout.max_new_tokens))

        updates = split_updates(samples, config.rollout.prompts, config.optim.updates_per_rollout)
        updates = [(part, count) for part, count in updates if part][:config.steps - self.step]
        if not updates:
            raise UserError(f"every reward of the rollout at step {self.step} failed: {samples[0].failure}")
        with _timed(clock, "old_logprobs"):
            plans = [rl_micros(part, count, config, self.processor, self.device) for part, count in updates]
            # The first update meets the policy that sampled: its ratio is 1 by definition.
            later = [micro for micros in plans[1:] for micro in micros]
            exact = config.objective.drift == "exact" and config.objective.name == "cpgd"
            fill_old_logprobs(self.policy, later, config, self._head_copy() if exact else None)
            for (part, _), micros in zip(updates[1:], plans[1:], strict=True):
                old = [micro.old_logprobs for micro in micros if micro.old_logprobs is not None]
                check_canary(part, micros, old, config.rollout.canary_limit)
        results: list[StepResult] = []
        for index, ((part, _), micros) in enumerate(zip(updates, plans, strict=True)):
            with _timed(clock, "update"):
                result = optimizer_step(self.policy, self.optimizer, micros, self.loss_fn, self._rate(),
                                        config.optim.max_grad_norm)
            if index == 0:
                check_canary(part, micros, result.logprobs, config.rollout.canary_limit)
            self._finish_step(result, [s.id for s in part], rewards | took, clock, sampled)
            clock, took = defaultdict(float), {}
            results.append(result)
        self._tell(self.step, self.watch.updated(results))
        self.iteration += 1

    def _attempt(self, clock: dict[str, float], numbers: Sequence[int], earlier: Sequence[Sample]) -> list[Sample]:
        """Scored samples of these rows; `earlier` ones are of the same rollout."""
        config = self.config
        with _timed(clock, "data"):
            rows, prompts = self._encoded(numbers)
        with _timed(clock, "rollout"):
            verdicts = self.judging and Verdicts(self.judging)
            samples = sample_groups(self.engine, rows, prompts, self.processor, config, self.step,
                                    judge=verdicts and verdicts.ask, earlier=earlier)
        with _timed(clock, "reward"):
            evidence = None
            if any(fn.needs_policy for fn in self.rewards.values()):
                evidence = gather_evidence(self.policy, samples, config, self.processor, self.device)
            score(samples, self.rewards, self.reward_weights, config.reward.failure_budget, evidence,
                  verdicts and verdicts.collect(), earlier)
        self.sampler.observe(pass_rates(numbers, samples))
        return samples

    def _head_copy(self) -> torch.Tensor:
        weight = self.policy.model.lm_head.weight.detach()
        return (weight.full_tensor() if isinstance(weight, DTensor) else weight).to(self.dtype, copy=True)

    # -- one optimizer step -------------------------------------------------------------------------------------------

    def _rate(self) -> float:
        return learning_rate(self.step, self.config.steps, self.config.optim)

    def _tell(self, step: int, said: Sequence[str]) -> None:
        def write() -> None:
            self.metrics.warned([{"step": step, "warning": text} for text in said])
            for text in said:
                logger.warning("step %d: %s", step, text)

        on_main(write)

    def _finish_step(self, result: StepResult, ids: list[str], rewards: dict[str, Any],
                     clock: dict[str, float], sampled: int = 0) -> None:
        """Count the step, write its line; stop after too many skipped ones. `sampled`: tokens of the whole rollout."""
        rate = self._rate()
        self.step += 1
        self.skipped_in_row = 0 if result.finite else self.skipped_in_row + 1
        line = {
            "step": self.step, "iteration": self.iteration, "loss": result.loss, "grad_norm": result.grad_norm,
            "lr": rate, "skipped": not result.finite, **rewards, "clip_fraction": result.clip_fraction,
            "drift": result.drift, "entropy": result.entropy, "response_tokens": result.response_tokens,
            "seconds": {k: round(v, 4) for k, v in clock.items()},
            "tokens_per_second": tokens_per_second(clock, result.response_tokens, sampled),
        }

        def write() -> None:
            if not result.finite:
                self.metrics.skipped({"step": self.step, "grad_norm": str(result.grad_norm), "samples": ids})
            self.metrics.line(line)
            self.view.update(line)

        on_main(write)
        if self.skipped_in_row >= self.config.optim.max_nonfinite:
            raise UserError(
                f"gradients were not finite in {self.skipped_in_row} steps in a row (--optim.max-nonfinite), the last "
                f"at step {self.step}; the samples are named in {self.metrics.skipped_path}: raise "
                "--optim.max-nonfinite to go on, or start again without them or with a lower --optim.learning-rate, in "
                "another --run-dir")


def _shown(answered: Sequence[Answered], suite: Mapping[str, Sequence[Row]], each: int = 6) -> list[Answered]:
    """The first few of every group, for the report's table, with their images."""
    groups = groupby(answered, key=lambda a: a.group)
    return [replace(a, row=suite[group][i]) for group, members in groups for i, a in enumerate(islice(members, each))]


@contextmanager
def _timed(clock: dict[str, float], phase: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    clock[phase] += time.perf_counter() - started


def main(config: Config) -> int:
    """Run one stage on this rank; returns the exit status. User errors are printed once, without a traceback."""
    logging.basicConfig(level=logging.INFO if int(os.environ.get("RANK", "0")) == 0 else logging.ERROR,
                        format="%(message)s", handlers=[Stderr()])
    transformers.utils.logging.disable_progress_bar()
    try:
        device = init_distributed()
        run = RunDir(config.run_dir, config.stage, config, config.resume)
        if run.finished:
            if rank() == 0:
                logger.info("stage %d is finished in %s", config.stage, run.stage_dir)
                finish_report(run.stage_dir, config, seconds=None)
                if run.changed:
                    logger.warning("not done, as the stage is finished: %s; remove %s and repeat the command to have "
                                   "hf/ and the report made anew", ", ".join(run.changed),
                                   run.stage_dir / "report.json")
        else:
            trainer = Trainer(config, run, device)
            try:
                trainer.run()
            finally:
                if trainer.judging:
                    trainer.judging.close()
    except (UserError, OSError) as error:
        return fail(error)
    except KeyboardInterrupt:
        return fail("interrupted; repeat the command to go on from the last checkpoint", status=130)
    close_distributed()
    return 0
