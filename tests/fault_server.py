"""A server for tests: /v1/models, /v1/chat/completions and /classify, with faults by script or at random by seed.

Its judge is an oracle: a pure function of the request, so that verdicts do not depend on order, faults or process.

    with FaultServer(fault_rate=0.2) as server: Endpoint(server.url, server.model)
    python tests/fault_server.py --fault-rate 0.2       # prints its URL; GET /stats tells what it did, POST /dead drops
                                                        # every connection for ?seconds=S
"""

import argparse
import contextlib
import hashlib
import json
import math
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KINDS = ("slow", "429", "500", "malformed", "cut_off", "wrong_model", "dropped")
LABELS = ("Safe with refusal", "Safe with warning", "Safe without risk", "Unsafe", "Unnecessary refusal",
          "Illogical completion")
MARKS = (  # how a prompt of ours is told: a phrase of its answer's choice, and the answers
    ("Unnecessary refusal", LABELS), ("Safe with refusal", LABELS[:4]), ("good or bad", ("good", "bad")),
    ("TRUE or FALSE", ("TRUE", "FALSE")), ("Helpful without warning", ("Helpful without warning", "Other")),
    ("0, 0.5 or 1", ("0", "0.5", "1")), ("yes or no", ("yes", "no")),
)
Oracle = Callable[[dict[str, Any]], str]


def text_of(body: dict[str, Any]) -> str:
    """All words of a chat request."""
    parts = []
    for message in body["messages"]:
        content = message["content"]
        parts += [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    return "\n".join(parts)


def draw(body: dict[str, Any]) -> float:
    """A number in [0, 1) that depends on the messages, or the input, alone."""
    text = json.dumps(body.get("messages", body.get("input")), sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / 2 ** 48


def oracle(body: dict[str, Any]) -> str:
    """A verdict in the form that the prompt asks for."""
    text = text_of(body)
    for mark, answers in MARKS:
        if mark in text:
            return answers[int(draw(body) * len(answers))]
    return "Safety: Safe\nCategories: None\nRefusal: No"


class FaultServer:
    """Serves in threads from `start` to `stop`; may be started again on the same port."""

    def __init__(self, *, model: str = "judge", oracle: Oracle = oracle, fault_rate: float = 0.0,
                 faults: Sequence[str] = KINDS, script: Iterable[str] = (), seed: int = 0,
                 latency_s: tuple[float, float] = (0.0, 0.0), slow_s: float = 30.0, retry_after: str = "0",
                 logprobs: bool = True, native: bool = False, key: str = "", port: int = 0) -> None:
        """
        Args:
            oracle: text of a chat reply.
            fault_rate: share of attempts that fail; which ones depends on seed, request and how often it came.
            script: faults of the first attempts in order, "" for none; the random ones begin after it.
            latency_s: (least, most) seconds to a reply. slow_s: of a slow one.
            native: /classify speaks SGLang's dialect.
            key: replies to other bearers are 401, with the key that was sent in the message.
        """
        self.model, self.oracle, self.fault_rate, self.faults, self.seed = model, oracle, fault_rate, faults, seed
        self.script, self.latency_s, self.slow_s, self.retry_after = list(script), latency_s, slow_s, retry_after
        self.logprobs, self.native, self.key, self.port = logprobs, native, key, port
        self.lock, self.counts, self.seen = threading.Lock(), Counter[str](), Counter[str]()
        self.in_flight = self.most_in_flight = 0
        self.dead_until = 0.0
        self.refuses = b""
        """A request that holds these bytes is answered with 400, as by a content filter."""
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def calls(self) -> int:
        return self.counts["attempts"]

    def __enter__(self) -> "FaultServer":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        self.connections: set[socket.socket] = set()
        self.stopping = threading.Event()
        handler = type("Handler", (_Handler,), {"fault_server": self})
        self.server = _Server(("127.0.0.1", self.port), handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections from now on, and drop those that stand."""
        if self.server is None:
            return
        self.stopping.set()
        self.server.shutdown()
        self.server.server_close()
        with self.lock:
            for connection in self.connections:
                _drop(connection)
        self.server = None

    def fault(self, raw: bytes) -> str:
        """The fault of this attempt; "" for none."""
        with self.lock:
            digest = hashlib.blake2b(raw, digest_size=8).hexdigest()
            self.seen[digest] += 1
            if self.script:
                return self.script.pop(0)
            rng = random.Random(f"{self.seed}/{digest}/{self.seen[digest]}")
        return rng.choice(self.faults) if rng.random() < self.fault_rate else ""

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        text = self.oracle(body)
        choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}}
        if body.get("logprobs") and self.logprobs:
            share = 0.5 + draw({"messages": [text, draw(body)]}) / 2  # of the label that the text names
            others = [a for _, answers in MARKS for a in answers if text in answers and len(answers) == 2 and a != text]
            top = [(text, share), *((other, 1 - share) for other in others)]
            choice["logprobs"] = {"content": [{"token": text, "logprob": math.log(share), "top_logprobs": [
                {"token": token, "logprob": math.log(max(p, 1e-9))} for token, p in top]}]}
        return {"id": "chat-1", "object": "chat.completion", "model": self.model, "choices": [choice]}

    def scores(self, body: dict[str, Any]) -> Any:
        value = draw(body)
        if self.native:
            return {"embedding": [20 * value - 10], "meta_info": {}}
        return {"object": "list", "model": self.model, "data": [{"index": 0, "probs": [value], "num_classes": 1}]}


class _Server(ThreadingHTTPServer):
    daemon_threads, block_on_close, request_queue_size = True, False, 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """An oracle that raises drops the connection, without a traceback in the tests' output."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    fault_server: FaultServer

    def setup(self) -> None:
        super().setup()
        with self.fault_server.lock:
            self.fault_server.connections.add(self.connection)

    def finish(self) -> None:
        with self.fault_server.lock:
            self.fault_server.connections.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, *args: object) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:  # the client went away, or `stop` came between
            self.close_connection = True

    def do_GET(self) -> None:
        server = self.fault_server
        if self.path == "/stats":
            self.send(200, {**server.counts, "most_in_flight": server.most_in_flight})
        elif self.path == "/v1/models" and self.allowed():
            self.send(200, {"object": "list", "data": [{"id": server.model, "object": "model"}]})

    def do_POST(self) -> None:
        server = self.fault_server
        length = int(self.headers["Content-Length"])
        raw = self.rfile.read(length)
        if len(raw) < length:  # the client gave up between header and body
            self.close_connection = True
            return
        if self.path.startswith("/dead"):
            server.dead_until = time.monotonic() + float(self.path.partition("=")[2])
            self.send(200, {})
            return
        if time.monotonic() < server.dead_until:
            _drop(self.connection)
            self.close_connection = True
            return
        with server.lock:
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
            server.counts["attempts"] += 1
            server.headers.append({name.lower(): value for name, value in self.headers.items()})
        try:
            self.reply(raw)
        finally:
            with server.lock:
                server.in_flight -= 1

    def reply(self, raw: bytes) -> None:
        server = self.fault_server
        fault = "400" if server.refuses and server.refuses in raw else server.fault(raw)
        with server.lock:
            server.counts[fault or "answered"] += 1
        if fault == "400":
            self.send(400, {"error": {"message": "content filter"}})
            return
        if fault == "429":
            self.send(429, {"error": {"message": "too many requests"}}, {"Retry-After": server.retry_after})
            return
        if fault == "500":
            self.send(500, {"error": {"message": "engine error"}})
            return
        least, most = server.latency_s
        wait_s = least + (most - least) * random.random() if fault != "slow" else server.slow_s
        if wait_s and server.stopping.wait(wait_s):
            return
        body = json.loads(raw)
        with server.lock:
            server.bodies.append(body)
        if not self.allowed():
            return
        if self.path not in ("/v1/chat/completions", "/classify"):
            self.send(404, {"detail": "Not Found"})
            return
        payload = server.chat(body) if self.path.startswith("/v1/chat") else server.scores(body)
        if fault == "wrong_model":
            payload["model"] = "another-model"
        if fault == "dropped":
            _drop(self.connection)
            self.close_connection = True
        elif fault == "malformed":
            self.send(200, None, text='{"choices": [}')
        else:
            self.send(200, payload, text=payload.get("raw"), cut=fault == "cut_off")

    def allowed(self) -> bool:
        sent = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.fault_server.key and sent != self.fault_server.key:
            self.send(401, {"error": {"message": f"incorrect API key provided: {sent}"}})
            return False
        return True

    def send(self, status: int, payload: Any, headers: dict[str, str] | None = None, *, text: str | None = None,
             cut: bool = False) -> None:
        raw = (json.dumps(payload) if text is None else text).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(raw)), **(headers or {})
                            }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw[:len(raw) // 2] if cut else raw)
        if cut:
            self.wfile.flush()
            _drop(self.connection)
            self.close_connection = True


def _drop(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fault-rate", type=float, default=0.0)
    parser.add_argument("--latency-s", type=float, nargs=2, default=(0.0, 0.0))
    parser.add_argument("--slow-s", type=float, default=30.0)
    parser.add_argument("--retry-after", default="0")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    server = FaultServer(fault_rate=options.fault_rate, latency_s=tuple(options.latency_s), slow_s=options.slow_s,
                         retry_after=options.retry_after, seed=options.seed)
    server.start()
    print(server.url, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
