"""Rollout by vLLM in the trainer's own processes, on the trainer's own GPUs: engine `vllm`.

The engine sleeps while the policy is trained: weights and KV cache are freed (level 2, for a sync brings all weights
anyway), and come back with the next sync. Ranks of one host may share an engine by tensor parallelism; such a group is
given the same requests, and its first rank answers for it. Trainer and vLLM must then agree on one torch and one
transformers: where they do not, engine `server` has an environment of its own. Requests, replies, the weights' names
and their comparison are those of the servers.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# vLLM is in no environment that is checked.

import importlib.util
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from cosmo_rl.data.collate import EncodedPrompt
from cosmo_rl.data.errors import MissingPackage, UserError
from cosmo_rl.data.schema import Row
from cosmo_rl.model.load import Processor
from cosmo_rl.model.parallel import rank, together, world

from ...config import DataConfig, RolloutConfig
from ..engine import Replica
from ..values import Request, Response
from .compare import Comparison
from .control import check_described
from .pixels import PIXELS, compare_pixels
from .sync import BUCKET_BYTES, Named
from .wire import Wire, mm_limits

WORKER = "cosmo_rl.cpgd.rollout.vllm.worker.cosmo_rl_worker.Worker"


class LocalEngine:
    """Samples with vLLM in process; see `cosmo_rl.cpgd.rollout.engine.Engine`. All ranks make it together."""

    def __init__(self, path: Path, processor: Processor, rollout: RolloutConfig, data: DataConfig, *,
                 device: torch.device, dtype: torch.dtype) -> None:
        """
        Args:
            path: model folder. device, dtype: of the weights that come by `sync`.
        Raises:
            MissingPackage: there is no vLLM in this environment.
            UserError: on every rank: vLLM refuses the model or its options, or the GPU is too small for it beside the
                policy.
        """
        self.processor, self.device, self.dtype = processor, device, str(dtype).removeprefix("torch.")
        self.wire, self.version, self.tag, self._syncs = Wire(processor, rollout), 0, "", 0
        words = ["--model", str(path), "--dtype", self.dtype, "--logprobs-mode", "processed_logprobs",
                 "--generation-config", "vllm", "--max-model-len",
                 str(data.max_prompt_tokens + rollout.max_new_tokens), "--mm-processor-kwargs", mm_limits(processor),
                 "--worker-extension-cls", WORKER, "--distributed-executor-backend", "external_launcher",
                 "--weight-transfer-config", '{"backend": "cosmo"}',
                 *(["--enable-sleep-mode"] if device.type == "cuda" else ["--enforce-eager"]),
                 *shlex.split(" ".join(rollout.serve))[1:]]
        self._asleep, self._engine, self._size = False, None, 1
        together(lambda: self._open(words))
        engine: Any = self._engine
        said = engine.collective_rpc("cosmo_describe")[0]  # the user's options come last, and win
        together(lambda: check_described("--rollout.engine vllm", said, processor, self.dtype, data, rollout))
        self.replica = Replica(index=rank() // self._size, count=max(1, world() // self._size),
                               leads=rank() % self._size == 0)
        self._comparison = Comparison(rollout.verify_every)

    def _open(self, words: list[str]) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise MissingPackage("--rollout.engine vllm needs vLLM beside this torch and transformers: pip install "
                                 "vllm; where versions differ, engine server (--rollout.serve PYTHON) has its own")
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
        for name, value in (("RANK", rank()), ("LOCAL_RANK", rank()), ("WORLD_SIZE", world()),
                            ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", 29500)):
            os.environ.setdefault(name, str(value))  # set by torchrun, else for a single process
        from vllm import SamplingParams
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.engine.llm_engine import LLMEngine

        self._sampling = SamplingParams
        try:
            args = EngineArgs.from_cli_args(EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(words))
            self._size = args.tensor_parallel_size
            if world() % self._size:
                raise UserError(f"--tensor-parallel-size {self._size} of --rollout.serve does not divide the {world()} "
                                "ranks; give a divisor, of one host's ranks")
            self._engine = LLMEngine.from_engine_args(args)
        except (ValueError, RuntimeError, SystemExit) as error:
            raise UserError(f"vLLM does not start in the trainer's process: {' '.join(str(error).split())[:400]}; its "
                            "options are --rollout.serve (as 'vllm --gpu-memory-utilization 0.4' where the GPU is too "
                            "small for both), and --rollout.engine server keeps it elsewhere") from error

    # -- weights ------------------------------------------------------------------------------------------------------

    def sync(self, weights: Callable[[], Iterable[Named]], version: int) -> None:
        """See `Engine.sync`.

        Raises:
            WeightsDiffer: the engine does not hold what it was given.
        """
        engine: Any = self._engine
        self._syncs += 1
        tag = f"{self._syncs}-step{version}"
        if self._asleep:
            engine.wake_up(["weights"])
        engine.collective_rpc("start_weight_update")
        self._comparison.begin()
        bucket: list[Named] = []
        for name, tensor in weights():
            tensor = tensor.detach().clone()
            self._comparison.add(name, tensor)
            bucket.append((name, tensor))
            if sum(t.nbytes for _, t in bucket) >= BUCKET_BYTES:
                engine.collective_rpc("cosmo_load", args=(bucket,))
                bucket = []
        engine.collective_rpc("cosmo_load", args=(bucket,))
        engine.collective_rpc("finish_weight_update")
        if self._asleep:
            engine.wake_up(["kv_cache"])
            self._asleep = False
        self._forget()
        engine.set_weight_version(tag)
        found = engine.collective_rpc("cosmo_digests", args=(self._comparison.names(),))
        together(lambda: self._comparison.check("vLLM", found))
        self._comparison.end()
        self.version, self.tag = version, tag

    def _forget(self) -> None:
        """Empty the caches of prefixes, pictures and their features."""
        engine: Any = self._engine
        engine.reset_prefix_cache()
        engine.reset_mm_cache()
        engine.reset_encoder_cache()

    def rest(self) -> bool:
        """Sleep: free weights and KV cache, which the next sync brings back."""
        if self.device.type == "cuda" and not self._asleep:
            assert self._engine
            self._engine.sleep(level=2)
            self._asleep = True
        return self._asleep

    def recover(self) -> None:
        """It dies with the trainer only."""

    # -- requests -----------------------------------------------------------------------------------------------------

    def stream(self, requests: Sequence[Request], *, greedy: bool = False,
               batch_size: int | None = None) -> Iterator[list[Response]]:
        """See `Engine.stream`; vLLM forms its batches itself. Greedy log-probs are those of temperature 1.

        Raises:
            ReplyError: see `Wire.read`.
        """
        engine: Any = self._engine
        by_id = {str(i): request for i, request in enumerate(requests)}
        prompts: dict[int, dict[str, Any]] = {}
        try:
            for key, request in by_id.items():
                prompt = prompts.setdefault(id(request.prompt), self.wire.local_prompt(request.prompt, self.tag))
                sampling = self.wire.sampling(request, greedy)
                sampling["logit_bias"] = {int(token): bias for token, bias in sampling["logit_bias"].items()}
                engine.add_request(key, prompt, self._sampling(**sampling))
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.finished:
                        yield [self.wire.read(by_id[output.request_id], _reply(output), self.tag, self.version)]
        finally:
            engine.abort_request(list(by_id))

    def check(self, samples: Iterable[tuple[Row, EncodedPrompt]]) -> None:
        """See `Engine.check`."""
        engine: Any = self._engine

        def look(row: Row, prompt: EncodedPrompt) -> None:
            request = Request(row=row, prompt=prompt, k=0, seed=0)
            self._forget()  # features that are there already would not be made again
            engine.collective_rpc("cosmo_watch_pixels", args=(PIXELS,))
            for _ in self.stream([request], greedy=True):
                pass
            seen = engine.collective_rpc("cosmo_pixels_seen")[0]
            compare_pixels(request, "vLLM", seen, self.processor, self.dtype)

        together(lambda: [look(*one) for one in samples])

    def close(self) -> None:
        """vLLM goes with the process."""
        self._engine = None


def _reply(output: Any) -> dict[str, Any]:
    """A RequestOutput in the words of the server's reply."""
    choice = output.outputs[0]
    return {
        "prompt_token_ids": list(output.prompt_token_ids or []),
        "choices": [{
            "token_ids": list(choice.token_ids), "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            "weight_versions": [{"version": span.version} for span in choice.weight_versions or []],
            "logprobs": {"content": [{"token_id": token, "logprob": found[token].logprob} for token, found in zip(
                choice.token_ids, choice.logprobs or [], strict=False) if token in found]}}]}
