"""One stage of a run: rows -> rollout -> updates -> checkpoint, and the report at the end.

    main(config)      what train.py calls
    Trainer.run       the loop: `_sft_iteration` in stage 0, `_rl_iteration` in stages 1 and 2
"""

import logging
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from cosmo_rl.data.errors import UserError
from cosmo_rl.data.prompts import check_system_prompt, introduce
from cosmo_rl.data.sampler import PromptSampler
from cosmo_rl.model.liger import wants_liger
from cosmo_rl.model.load import load_model, load_processor
from cosmo_rl.model.parallel import agree, on_main, rank, shard, together
from cosmo_rl.model.policy import Policy, Update
from cosmo_rl.model.weights import full_state_dict, save_pretrained

from .config import Config
from .rewards.build import RowNeeds, build_scorer
from .rewards.scorer import Scorer
from .rewards.word_rules import CAUTION, by_words
from .rollout.ahead import Rollouts
from .rollout.collect import Clock, Collector, encoder, probes, prompts_of, timed
from .rollout.engines import open_engine
from .run.canary import Canary, check_advantages, check_versions
from .run.card import write_card
from .run.checkpoint import check_state, load_latest, restore, save
from .run.journal import Journal
from .run.measure import Measurements
from .run.metrics import MetricsWriter, judges_took, rollout_summary, step_line
from .run.plan import model_fingerprint, plan, prompt_files, start_path
from .run.recipes import mixture
from .run.report import finish_report
from .run.rundir import RunDir
from .run.watch import Watch
from .update import (
    BuildUpdates,
    Reading,
    StepResult,
    learning_rate,
    make_optimizer,
    optimizer_step,
    prepare,
    rl_loss,
    sft_loss,
    sft_updates,
    split_updates,
)

logger = logging.getLogger(__name__)


class Trainer:
    """A stage in progress. Every method is called by all ranks together."""

    def __init__(self, config: Config, run: RunDir, device: torch.device) -> None:
        self.config, self.run_dir, self.device = config, run, device
        path = self.start = start_path(config, run)
        processor = self.processor = load_processor(path, config.data.resize_pixels)
        data = config.data
        together(lambda: check_system_prompt(data.system_prompt, processor, max_prompt_tokens=data.max_prompt_tokens))
        agree(data.system_prompt, "--data.system-prompt is not the same on all ranks; put its file on every host")
        self.plan = plan(config, processor, run.stage_dir)
        self.scorer = self._open_scorer(self.plan.needs) if self.plan.needs else None
        self.function_digest = self.scorer.function_digest if self.scorer else ""
        agree(self.function_digest, "the file of --reward.function, or a module beside it, is not the same on all "
                                    "ranks; copy one version to every host")
        self.model_fingerprint = model_fingerprint(path)
        self.sampler = PromptSampler(self.plan.domains, mixture(config, self.plan.domains), config.seed,
                                     data.curriculum)
        self.watch = Watch()
        self.canary = Canary(config.rollout, config.model.dtype)

        self.dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.model.dtype]
        options = {"attention": config.model.attention, "liger": wants_liger(config.model.liger, device)}
        freeze_vision = config.model.freeze_vision
        self.policy = shard(
            Policy(load_model(path, freeze_vision=freeze_vision, **options), suppressed_ids=processor.suppressed_ids,
                   temperature=config.rollout.temperature, gradient_checkpointing=config.model.gradient_checkpointing),
            device=device, dtype=self.dtype, freeze_vision=freeze_vision)
        self.optimizer = make_optimizer(self.policy, config.optim)
        self.engine = open_engine(path, processor, config.rollout, data, device=device, dtype=self.dtype,
                                  folder=run.stage_dir, **options)
        self.encode = encoder(data, processor)
        self.build = BuildUpdates(batch=config.batch, objective=config.objective, processor=processor, device=device,
                                  aggregation=config.objective.aggregation if config.stage else "token")
        self.loss_fn = rl_loss(config.objective) if config.stage else sft_loss
        self.rollouts = self.scorer and Rollouts(
            Collector(config, self.plan.rows, self.sampler, self.engine, self.scorer, self.policy, processor,
                      self.encode, self.build), self._sync, config.rollout.staleness)
        self.metrics = MetricsWriter(run.stage_dir, config.log.tensorboard)  # used on rank 0 only
        self.journal = Journal(self.metrics, config.steps, f"stage {config.stage}")
        self.measurements = Measurements(config, self.plan.eval_rows, self.engine, self.encode, processor, self._sync,
                                         run.stage_dir, self.metrics)
        self.step, self.iteration, self.skipped_in_row, self.trained_s = 0, 0, 0, 0.0  # until `_resume`
        self.saved_at, self.synced = 0, None  # steps of the last checkpoint, and of the weights that the engine has

    def _open_scorer(self, needs: RowNeeds) -> Scorer:
        """The scorer of this rank; its judges answer, or nothing is loaded for them."""
        found: list[Scorer] = []
        together(lambda: found.append(build_scorer(self.config.reward, needs)))
        on_main(found[0].verify)
        return found[0]

    # -- the run ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train from the latest checkpoint to the last step, then write hf/ and the report."""
        config, folder = self.config, self.run_dir.stage_dir
        other_reward = self._resume()
        on_main(lambda: self.run_dir.adopt(config))
        ruled = by_words(config, self.plan.needs.ruled) if self.plan.needs else []
        if ruled:
            logger.warning("WARNING: rewarded by word rules: %s: %s", ", ".join(ruled), CAUTION)
        if rank() == 0:
            print(introduce(config.data.system_prompt, self.plan.rows[0], self.processor, sys.stdout.encoding),
                  flush=True)
        on_main(lambda: self.metrics.rewind(self.step or -1))  # a try without a checkpoint may have measured step 0
        if other_reward and self.step < config.steps:  # as when it failed, and our own error said to mend it
            self.journal.warn(self.step + 1, [
                f"{config.reward.function}, or a module beside it, is not what it was at the checkpoint: rewards are "
                "by the new one from here on"])
        self._sync()
        self.engine.check(probes(self.plan.rows, self.encode))
        self.measurements.before(self.step, self._save)
        self._train()
        save_pretrained(self.policy, self.processor, self.run_dir.hf, getattr(torch, config.model.export_dtype))
        on_main(lambda: write_card(self.run_dir.hf, config, self.start))
        logger.info("saved to %s", self.run_dir.hf)
        self.measurements.after(self.step)
        on_main(lambda: self.metrics.close())
        on_main(lambda: finish_report(folder, config, seconds=self.trained_s, by_words=ruled,
                                      left_out=self.measurements.left_out))

    def close(self) -> None:
        """Give up what is not scored yet, and what samples; however the run has ended."""
        self.engine.close()
        if self.scorer:
            self.scorer.close()

    def _train(self) -> None:
        """The iterations that are left, with their checkpoints."""
        config, self.saved_at = self.config, self.step
        self.journal.open(self.step)
        try:
            while self.step < config.steps:
                started, before = time.perf_counter(), self.step
                (self._rl_iteration if config.stage else self._sft_iteration)()
                self.trained_s += time.perf_counter() - started
                self.measurements.between(before, self.step, self._save)
                if self.step - self.saved_at >= config.checkpoint.every and self.step < config.steps:
                    self._save()
            self._save()
        finally:
            self.journal.close()

    def _resume(self) -> bool:
        """Go on from the latest checkpoint, if there is one; whether the user's reward function was another there."""
        folder, guard = self.run_dir.checkpoints, self.measurements.guard
        state = load_latest(folder, self.policy, self.optimizer)
        if state is None:
            return False
        check_state(state, folder, steps=self.config.steps, fingerprint=self.plan.fingerprint,
                    model_fingerprint=self.model_fingerprint,
                    model_files=f"{', '.join(prompt_files(self.start))} of {self.start}")
        restore(state, folder, sampler=self.sampler, guard=guard, watch=self.watch, canary=self.canary)
        self.step, self.iteration = state["step"], state["iteration"]
        self.skipped_in_row, self.trained_s = state["skipped_in_row"], state["trained_s"]
        guard.enforce()
        logger.info("resumed at step %d", self.step)
        return state.get("function_digest", "") != self.function_digest

    def _save(self) -> None:
        on_main(lambda: self.metrics.sync())
        state = {"iteration": self.iteration, "skipped_in_row": self.skipped_in_row, "trained_s": self.trained_s,
                 "sampler": self.sampler.state_dict(), "guard": self.measurements.guard.state_dict(),
                 "watch": self.watch.state_dict(), "canary": self.canary.state_dict(),
                 "rows_fingerprint": self.plan.fingerprint, "model_fingerprint": self.model_fingerprint,
                 "function_digest": self.function_digest, "config": self.config.to_dict(),
                 "config_hash": self.config.hash()}
        save(self.run_dir.checkpoints, self.step, self.policy, self.optimizer, state, self.config.checkpoint.keep)
        self.saved_at = self.step

    def _rest(self) -> None:
        """The engine makes room for training."""
        if self.engine.rest():
            self.synced = None

    def _sync(self) -> None:
        """Give the engine the policy's weights, if it does not have them."""
        if self.synced == self.step:
            return
        self.synced = None  # until it is done
        self.engine.sync(partial(full_state_dict, self.policy, dtype=self.dtype), self.step)
        self.synced = self.step

    # -- stage 0 ------------------------------------------------------------------------------------------------------

    def _sft_iteration(self) -> None:
        clock: Clock = {}
        self._rest()  # it has been checked, and measures between
        with timed(clock, "data"):
            prompts = prompts_of(self.plan.rows, self.sampler.take(self.config.optim.sft_batch), self.encode)
            updates = sft_updates(prompts, self.build)
        with timed(clock, "update"):
            result = self._optimizer_step(updates)
        self._finish_step(result, [row.id for row, _ in prompts], {}, clock)
        self.journal.warn(self.step, self.watch.updated([result], entropy=False))
        self.iteration += 1

    # -- stages 1 and 2 -----------------------------------------------------------------------------------------------

    def _rl_iteration(self) -> None:
        config, clock = self.config, Clock()
        assert self.scorer and self.rollouts
        after = self.step + config.optim.updates_per_rollout  # no rollout is under way at a checkpoint or a measurement
        ends = (after >= config.steps or after - self.saved_at >= config.checkpoint.every
                or self.measurements.due(self.step, after))
        rollout = self.rollouts.next(self.step, clock, None if ends else after)
        self._rest()
        fresh = rollout.version == self.step
        check_versions(rollout)
        check_advantages(rollout)
        told = rollout_summary(rollout) | judges_took(self.scorer)
        self.journal.samples(rollout, config.log.samples, self.step + 1)
        self.journal.warn(self.step + 1, self.watch.rollout(rollout, config.rollout.max_new_tokens))

        parts = split_updates(rollout, config.optim.updates_per_rollout)[:config.steps - self.step]
        if not parts:
            raise UserError(f"every reward of the rollout at step {self.step} failed: {rollout.samples[0].failure}")
        with timed(clock, "old_logprobs"):
            plans, read = prepare(self.policy, rollout, parts, self.step, self.build, self.dtype,
                                  config.rollout.correction)
        results: list[StepResult] = []
        for part, updates in zip(parts, plans, strict=True):
            with timed(clock, "update"):
                result = self._optimizer_step(updates)
            if fresh and not results:
                if updates[0].old_logprobs is None:  # read by the step itself, at the policy that sampled
                    read.insert(0, Reading(part.samples, updates, result.stats))
                with timed(clock, "old_logprobs"):
                    told |= self.canary.check(rollout, read, self.step + 1)
            self._finish_step(result, [s.id for s in part.samples], told, clock, rollout.sampled_tokens)
            clock, told = {}, {name: value for name, value in told.items() if name != "judging"}
            results.append(result)
        self.journal.warn(self.step, self.watch.updated(results))
        self.iteration += 1

    def _optimizer_step(self, updates: Sequence[Update]) -> StepResult:
        optim = self.config.optim
        return optimizer_step(self.policy, self.optimizer, updates, self.loss_fn,
                              learning_rate(self.step, self.config.steps, optim), optim.max_grad_norm)

    def _finish_step(self, result: StepResult, ids: list[str], told: dict[str, Any], clock: Clock,
                     sampled: int = 0) -> None:
        """Count the step, write its line; stop after too many skipped ones. `sampled`: tokens of the whole rollout."""
        self.step += 1
        self.skipped_in_row = 0 if result.finite else self.skipped_in_row + 1
        line = {"step": self.step, "iteration": self.iteration} | step_line(result, told, clock, sampled)
        self.journal.step(line, ids)
        if self.skipped_in_row >= self.config.optim.max_nonfinite:
            raise UserError(
                f"gradients were not finite in {self.skipped_in_row} steps in a row (--optim.max-nonfinite), the last "
                f"at step {self.step}; the samples are named in {self.metrics.path('nonfinite')}: raise "
                "--optim.max-nonfinite to go on, or start again without them or with a lower --optim.learning-rate, in "
                "another --run-dir")
