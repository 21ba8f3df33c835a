"""The client of a judge's server under every fault: what is retried, what is refused, what is cached, what is told."""

import asyncio
import base64
import contextlib
import gc
import gzip
import io
import json
import logging
import math
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fault_server import KINDS, FaultServer
from PIL import Image

from cosmo_rl.cpgd.judges import client, replies
from cosmo_rl.cpgd.judges import loop as loop_module
from cosmo_rl.cpgd.judges.client import Endpoint, EndpointDown, EndpointError, Pace, data_uri
from cosmo_rl.cpgd.judges.loop import LoopThread
from cosmo_rl.cpgd.judges.replies import AttemptError, ChatReply, DiskCache
from cosmo_rl.data.errors import MissingPackage
from cosmo_rl.data.schema import RowError

SECRET = "sk-swordfish-1234567890"
ASK = [{"role": "user", "content": "good or bad"}]


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch):
    monkeypatch.setattr(client, "BACKOFF_S", 0.01)


def use(server: FaultServer | str, action: Callable[[Endpoint], Coroutine[Any, Any, Any]], **options: Any) -> Any:
    """`action` on an endpoint of the server, in a loop of its own."""
    async def run() -> Any:
        url, model = (server, "judge") if isinstance(server, str) else (server.url, server.model)
        endpoint = Endpoint(url, options.pop("model", model), **{"timeout_s": 5.0, **options})
        try:
            return await action(endpoint)
        finally:
            await endpoint.aclose()

    return asyncio.run(run())


def asks(count: int = 1, **options: Any) -> Callable[[Endpoint], Coroutine[Any, Any, list[ChatReply]]]:
    """Many different questions at once."""
    async def action(endpoint: Endpoint) -> list[ChatReply]:
        return list(await asyncio.gather(*(
            endpoint.chat([{"role": "user", "content": f"good or bad {i}"}], max_tokens=4, **options)
            for i in range(count))))

    return action


async def ask(endpoint: Endpoint) -> ChatReply:
    return await endpoint.chat(ASK, max_tokens=4)


KIND_OF = {"slow": "timeout", "429": "http_429", "500": "http_500", "malformed": "no_json", "cut_off": "connection",
           "wrong_model": "other_model", "dropped": "connection"}


def no_opening(counts: dict[str, int]) -> dict[str, int]:
    return {"opened": 0} if "opened" in counts else {}


@pytest.mark.parametrize("fault", KINDS)
def test_each_fault_is_retried_and_leaves_no_trace(fault):
    with FaultServer() as server:
        want = use(server, ask)
        server.script = [fault, fault]
        counts = {}

        async def action(endpoint: Endpoint) -> ChatReply:
            reply = await ask(endpoint)
            counts.update(endpoint.counts)
            return reply

        assert use(server, action, timeout_s=0.2 if fault == "slow" else 5.0) == want
        assert server.counts[fault] == 2
        assert counts == {"calls": 1, "answered": 1, "retried": 2, KIND_OF[fault]: 2, **no_opening(counts)}


def test_random_faults_change_no_reply():
    with FaultServer() as server:
        want = use(server, asks(50))
    with FaultServer(fault_rate=0.4, slow_s=3.0) as server:
        assert use(server, asks(50), timeout_s=1.5, attempts=20) == want
        assert all(server.counts[fault] for fault in KINDS), server.counts


@pytest.mark.parametrize(("fault", "message"), [
    ("slow", "no reply within 0.1 s"), ("429", "HTTP 429 'too many requests'"), ("500", "HTTP 500 'engine error'"),
    ("malformed", "the reply is no JSON: '{\"choices\": [}'"), ("cut_off", "RemoteProtocolError"),
    ("wrong_model", "the reply is by model 'another-model', not 'judge'; ask for that name, or serve"),
    ("dropped", "see that the server runs and that the URL is right"),
])
def test_a_fault_that_stays_is_an_error_that_names_endpoint_cause_and_mend(fault, message):
    with FaultServer(script=[fault] * 9) as server, pytest.raises(EndpointError) as error:
        use(server, ask, attempts=3, timeout_s=0.1 if fault == "slow" else 5.0)
    text = str(error.value)
    assert text.startswith(f"{server.url} (model judge): 3 attempts failed, the last: ") and message in text
    assert server.calls == 3


@pytest.mark.parametrize(("oracle", "message"), [
    (lambda body: 1 / 0, "see that the server runs"), (lambda body: ["a", "list"], "the reply is no chat completion"),
])
def test_a_reply_of_another_format_is_named(oracle, message):
    with FaultServer(oracle=oracle) as server, pytest.raises(EndpointError, match=message):
        use(server, ask, attempts=2)


@pytest.mark.parametrize("payload", [
    {}, [], "text", 1, None, {"model": "judge"}, {"model": "judge", "choices": []},
    {"model": "judge", "choices": [{"message": {}}]}, {"model": "judge", "choices": [{"message": {"content": 3}}]},
    {"choices": [{"message": {"content": "good"}}]},
    *({"model": "judge", "choices": [{"message": {"content": content}}]} for content in ({}, [], 0, False)),
    *({"model": "judge", "choices": [{"message": {"content": "good"}, "logprobs": {"content": [
        {"token": "good", "top_logprobs": [{"token": "good", "logprob": logprob}]}]}}]}
      for logprob in (3.0, "nan", "-0.1", True, None, math.inf, math.nan, 10 ** 400)),
    {"model": "judge", "choices": [{"message": {"content": "half a character: \ud800"}}]},
])
def test_no_other_json_passes_for_a_chat_completion(payload):
    with FaultServer() as server:
        server.chat = lambda body: {"raw": json.dumps(payload)}
        with pytest.raises(EndpointError, match=r"is no chat completion|is by model|is no JSON: '.*(NaN|Infinity)"):
            use(server, ask, attempts=1)


@pytest.mark.parametrize("text", ["NaN", '{"model": NaN}', "[Infinity]", "[-Infinity]", "", "<html>", "{'a': 1}",
                                  "[" * 100_000, "[" * 700 + "]" * 700, "1" * 5000, "[" * 65 + "]" * 65,
                                  '{"a":' * 65 + "1" + "}" * 65,
                                  '{"model": "judge", "model": "judge"}', '[{"a": {"b": 1, "b": 2}}]'])
def test_what_is_no_json_is_refused(text):
    with FaultServer() as server:
        server.chat = lambda body: {"raw": text}
        with pytest.raises(EndpointError, match="the reply is no JSON"):
            use(server, ask, attempts=1)


def test_json_may_be_as_deep_as_a_row():
    with FaultServer() as server:
        server.chat = lambda body: {"raw": GOOD.decode()[:-1] + ', "more": ' + '{"a":' * 63 + "1" + "}" * 64}
        assert use(server, ask).text == "good"


def test_a_reply_that_does_not_end_is_left(monkeypatch):
    monkeypatch.setattr(replies, "MAX_REPLY_BYTES", 100_000)
    with FaultServer() as server:
        server.chat = lambda body: {"raw": "[" + "1," * 2_000_000}
        with pytest.raises(EndpointError, match="the reply is longer than 100000 bytes"):
            use(server, ask, attempts=1)


def bomb(times: int = 3, size: int = 1 << 26) -> bytes:
    """`size` zeros, gzipped so often."""
    packed = bytes(size)
    for _ in range(times):
        packed = gzip.compress(packed)
    return packed


@contextlib.contextmanager
def replying_server(reply: bytes | Iterable[bytes], seen: list[bytes]) -> Iterator[str]:
    """URL of a server that answers each request with these bytes, and then closes."""
    ended = threading.Event()

    def serve() -> None:
        while not ended.is_set():
            with contextlib.suppress(OSError):  # the client had enough, or the listener was closed
                connection, _ = listener.accept()
                with connection:
                    seen.append(connection.recv(1 << 16))
                    for part in [reply] if isinstance(reply, bytes) else reply:
                        connection.sendall(part)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            ended.set()
            listener.shutdown(socket.SHUT_RDWR)


def replying(reply: bytes | Iterable[bytes], action: Callable[[Endpoint], Coroutine[Any, Any, Any]], **options) -> Any:
    with replying_server(reply, []) as url:
        return use(url, action, **options)


def http(status: str = "200 OK", body: bytes = b"", *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]).encode() + body


GOOD = json.dumps({"model": "judge", "data": [{"id": "judge", "probs": [0.5]}],
                   "choices": [{"message": {"content": "good"}}]}).encode()
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
WAYS = {"chat": ask, "classify": lambda endpoint: endpoint.classify("text"), "verify": Endpoint.verify}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("coding", ["gzip", "gzip, gzip, gzip", "deflate", "br", "zstd", "GZIP", "identity, gzip", "x"])
def test_a_compressed_reply_is_refused_before_it_is_decoded(way, coding, monkeypatch):
    """64 MiB in 150 bytes; the decoder of httpx is never made."""
    decoder = httpx2.Response._get_content_decoder
    monkeypatch.setattr(httpx2.Response, "_get_content_decoder",
                        lambda response: 1 / 0 if "content-encoding" in response.headers else decoder(response))
    with pytest.raises(EndpointError, match=r"the reply is in Content-Encoding '.*switch compression off"):
        replying(http("200 OK", bomb() if "zip" in coding else b"x", f"Content-Encoding: {coding}"), WAYS[way],
                 attempts=1)


@pytest.mark.parametrize("way", WAYS)
def test_a_reply_as_it_is_is_taken(way):
    replying(http("200 OK", GOOD, "Content-Type: text/html; charset=utf-16", "Content-Encoding: Identity"), WAYS[way])


@pytest.mark.parametrize(("reply", "message"), [
    (http("401 No", bomb(), "Content-Encoding: gzip"), r"HTTP 401 '\(in Content-Encoding gzip\)'; name the "),
    (http("204 No Content"), "HTTP 204 ''; give the base URL"),
    (http("200 OK", b"<html>", "Content-Type: text/html"), "the reply is no JSON: '<html>'; give the base URL"),
    (http("200 OK", b"data: {}\n\n", "Content-Type: text/event-stream"), "the reply is no JSON"),
    (http("302 Found", b"", "Location: http://[bad"), "HTTP 302 .*give the URL that it leads to"),
    (http("302 Found", b"", "Location: file:///etc/passwd"), "HTTP 302 .*give the URL that it leads to"),
    (http("200 OK", GOOD, *(f"X-{i}: {'y' * 1000}" for i in range(200))), "RemoteProtocolError"),
    (http("200 OK", GOOD, "X: " + "y" * 200_000), "RemoteProtocolError"),
    (http("200 OK", GOOD, "Content-Length: 7"), "RemoteProtocolError"),
    (http("999 What", GOOD), "HTTP 999|RemoteProtocolError"),
    (http("400 No", b'{"error": {"message": ' + b"[" * 900 + b"]" * 900 + b"}}"), r"HTTP 400 '\{\"error"),
    (b"\x16\x03\x01\x02\x00", "RemoteProtocolError"), (b"", "RemoteProtocolError"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n" + bomb(), "RemoteProtocolError"),
    (CHUNKED + b"ffffffffffffffff\r\n" + GOOD, "RemoteProtocolError"), (CHUNKED + b"-1\r\n", "RemoteProtocolError"),
    (CHUNKED + b"1;" + b"x" * 200_000 + b"\r\n", "RemoteProtocolError"),
])
def test_a_hostile_reply_is_a_failed_call(reply, message):
    reset = message.replace("RemoteProtocolError", "(RemoteProtocolError|ReadError)")  # it hangs up at any moment
    with pytest.raises(EndpointError, match=reset):
        replying(reply, ask, attempts=1)


@pytest.mark.parametrize(("part", "message"), [
    (b"1\r\nx\r\n" * 1000, "longer than 500 bytes"),  # chunks of one byte, without end
    (b"HTTP/1.1 100 Continue\r\n\r\n", r"no reply within 0\.3 s"),
    (b" ", r"no reply within 0\.3 s|RemoteProtocolError"),  # of the status line
])
def test_a_reply_that_never_ends_is_left(monkeypatch, part, message):
    monkeypatch.setattr(replies, "MAX_REPLY_BYTES", 500)

    def parts() -> Iterator[bytes]:
        yield CHUNKED if b"x" in part else b""
        while True:
            yield part

    with pytest.raises(EndpointError, match=message):
        replying(parts(), ask, attempts=1, timeout_s=0.3)


class Redirecting(BaseHTTPRequestHandler):
    """Sends every request elsewhere."""

    elsewhere = ""

    def do_POST(self) -> None:
        self.send_response(307)
        self.send_header("Location", self.elsewhere + self.path)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


def test_no_redirect_takes_the_key_elsewhere(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    with FaultServer() as other:
        monkeypatch.setattr(Redirecting, "elsewhere", other.url)
        server = ThreadingHTTPServer(("127.0.0.1", 0), Redirecting)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            with pytest.raises(EndpointError, match=r"HTTP 307 .*give the URL that it leads to"):
                use(f"http://127.0.0.1:{server.server_address[1]}", ask, api_key_env="JUDGE_KEY")
        finally:
            server.shutdown()
            server.server_close()
        assert other.calls == 0


@pytest.mark.parametrize(("body", "said"), [
    (b"[" * 100_000, "[[["), (b'{"error": {"message": "a"}}', "a'; see its message"),
    (b'{"detail": "b"}', "b'; see its message"), (b'{"message": "c"}', "c'; see its message"),
    (b"d", "d'; see its message"), (b'{"error": {"code": 3}}', "{\"error\": {\"code\": 3}}'; see its message"),
])
def test_a_refusal_is_told_in_the_server_s_words(body, said):
    with pytest.raises(EndpointError, match=re.escape(f"HTTP 418 '{said}")):
        replying(http("418 No", body), ask)


def test_an_empty_reply_is_a_reply():
    with FaultServer(oracle=lambda body: None) as server:  # type: ignore[arg-type, return-value]
        assert use(server, ask).text == ""


@pytest.mark.parametrize(("path", "status", "message"), [
    ("/nowhere", 404, "HTTP 404 'Not Found'; give the base URL of an OpenAI-compatible server"),
    ("", 401, "HTTP 401 .* name the environment variable that holds this server's key"),
])
def test_other_statuses_are_refusals_and_not_retried(path, status, message):
    with FaultServer(key="" if path else "other") as server, pytest.raises(EndpointError, match=message):
        use(server.url + path, ask)
    assert server.calls == 1


def test_the_pause_that_a_server_asks_for_is_kept(monkeypatch):
    """In seconds, or as a date by the clock that set it, which need not be ours; what is neither is no pause."""
    ahead = datetime.now(UTC) + timedelta(hours=5)
    until, now = (format_datetime(ahead + timedelta(seconds=s), usegmt=True) for s in (2, 1))
    monkeypatch.setattr(BaseHTTPRequestHandler, "date_time_string", lambda self: now)
    for told in ("1", until):
        with FaultServer(script=["429"], retry_after=told) as server:
            started = time.monotonic()
            use(server, ask)
            assert time.monotonic() - started >= 1.0 and server.calls == 2
    for told in ("soon", "-3", now, f"Mon, 01 Jan {'9' * 20} 00:00:00 GMT", "1 \u00e9", "inf", "nan"):
        with FaultServer(script=["429"], retry_after=told) as server:
            started = time.monotonic()
            use(server, ask)
            assert time.monotonic() - started < 1.0 and server.calls == 2
    for told in ("86400", "9" * 400):  # more than anybody waits
        with FaultServer(script=["429"], retry_after=told) as server, pytest.raises(
                EndpointError, match=rf"1 attempts failed, .* HTTP 429 .* a pause of {told[:20]}.* s: try again"):
            use(server, ask)


def test_the_waits_between_attempts_are_ours(monkeypatch):
    """openai's own begin at half a second, and their jitter draws from the state that checkpoints keep."""
    monkeypatch.setattr("openai._base_client.random", lambda: 1 / 0)
    for fault in ("500", "429", "malformed"):
        with FaultServer(script=[fault] * 6) as server:
            started = time.monotonic()
            use(server, ask)
            assert time.monotonic() - started < 4.0 and server.calls == 7


def test_waits_double_from_a_quarter_second_and_end_within_what_openai_keeps(monkeypatch):
    monkeypatch.setattr(client, "BACKOFF_S", 0.25)
    tries, most = client._Tries(), []
    for told in [0.0] * 9 + [100.0, 119.9, 120.0, 121.0, 1e9]:
        tries.failing(AttemptError("http_429", "", "", told))
        waits = [tries.wait_s for _ in range(300)]
        assert min(waits) >= told and (told > 110 or max(waits) - min(waits) > 0.5 * min(0.25 * 2 ** len(most), 16.0))
        most.append(max(waits))
    assert all(wait <= 0.25 * 2 ** n for n, wait in enumerate(most[:7])) and max(most[:9]) <= 16.0
    assert max(most[:12]) <= 120.0 and most[12:] == [121.0, 1e9]


def test_only_cuts_give_a_call_more_time(monkeypatch):
    monkeypatch.setattr(client, "PACE_FLOOR_S", 0.3)

    async def action(endpoint: Endpoint) -> float:
        endpoint.pace = paced(60.0, [0.01] * 40)
        started = time.monotonic()
        await ask(endpoint)
        return time.monotonic() - started

    with FaultServer(script=["500"] * 4 + ["slow"]) as server:
        assert use(server, action, timeout_s=60.0) < 0.3 * 2 ** 3 and server.counts["slow"] == 1


def test_the_number_in_flight_is_bounded():
    with FaultServer(latency_s=(0.01, 0.03)) as server:
        use(server, asks(60), max_in_flight=5)
        assert server.most_in_flight == 5


# -- pace -------------------------------------------------------------------------------------------------------------

def test_a_call_that_hangs_is_cut_when_the_usual_time_is_known(monkeypatch):
    monkeypatch.setattr(client, "PACE_FLOOR_S", 0.3)
    with FaultServer(script=["slow", "slow"]) as server:  # hang before anything is known
        started = time.monotonic()
        use(server, asks(60), timeout_s=60.0)
        assert time.monotonic() - started < 20 and server.counts["slow"] == 2


def test_a_server_that_slows_down_is_waited_for_and_not_taken_for_dead(monkeypatch):
    monkeypatch.setattr(client, "PACE_FLOOR_S", 0.05)
    opened = []

    async def action(endpoint: Endpoint) -> list[ChatReply]:
        endpoint.pace = paced(60.0, [0.01] * 40)
        replies = await asks(40)(endpoint)
        opened.append(endpoint.breaker.opened)
        assert endpoint.counts["retried"] >= 20, "the first attempts were cut"
        return replies

    with FaultServer(latency_s=(0.5, 0.6)) as server:
        assert len(use(server, action, timeout_s=60.0, breaker_failures=5, patience_s=0.0)) == 40
    assert opened == [None]


def paced(timeout_s: float, *runs: list[float]) -> Pace:
    """After replies that took so many seconds."""
    pace = Pace(timeout_s)
    for seconds in runs:
        for one in seconds:
            pace.replied(one)
    return pace


def test_limits_follow_the_latest_replies_and_grow_with_cuts():
    assert paced(60.0).limit(0) == 60.0
    pace = paced(60.0, [2.0] * 40)
    assert [pace.limit(cuts) for cuts in range(5)] == [4.0, 8.0, 16.0, 32.0, 60.0] and pace.limit(math.inf) == 60.0
    assert paced(60.0, [2.0] * 40, [0.1] * 300).limit(0) == 1.0


def test_requests_that_always_take_longer_are_not_cut():
    assert paced(60.0, [8.0 if number % 40 == 0 else 0.5 for number in range(256)]).limit(0) == 16.0
    told = paced(60.0, [8.0 if number == 0 else 0.5 for number in range(256)])
    assert told.limit(0) == 1.0, "one of many that took so long tells nothing"


# -- breaker ----------------------------------------------------------------------------------------------------------

def test_a_dead_server_opens_the_breaker_and_a_living_one_closes_it():
    async def action(endpoint: Endpoint) -> None:
        replies = await asks(8)(endpoint)
        server.stop()
        started = time.monotonic()
        failed = await asyncio.gather(*(endpoint.chat([{"role": "user", "content": f"good or bad {i}"}], max_tokens=4)
                                        for i in range(100)), return_exceptions=True)
        assert time.monotonic() - started < 3
        assert all(isinstance(error, EndpointDown) for error in failed)
        assert "taken for dead after" in str(failed[-1]) and "start the server again" in str(failed[-1])
        assert server.url in str(failed[-1])
        server.start()
        for _ in range(50):  # a probe goes through every 0.1 s
            await asyncio.sleep(0.05)
            found = await asyncio.gather(asks(8)(endpoint), return_exceptions=True)
            if found == [replies]:
                return
        raise AssertionError("the breaker did not close")

    with FaultServer() as server:
        use(server, action, breaker_failures=20, probe_every_s=0.1, patience_s=0.2, max_in_flight=16)


def test_calls_wait_for_a_server_that_is_away_for_a_moment():
    with FaultServer() as server:
        want = use(server, asks(50))

        async def action(endpoint: Endpoint) -> list[ChatReply]:
            server.stop()
            running = asyncio.create_task(asks(50)(endpoint))
            while endpoint.breaker.opened is None:
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.3)
            assert endpoint.breaker.opened is not None and not running.done()
            server.start()
            return await running

        assert use(server, action, breaker_failures=10, probe_every_s=0.1, patience_s=5.0) == want


def test_random_faults_and_rate_limits_do_not_open_it():
    opened = []

    async def action(endpoint: Endpoint) -> None:
        await asks(50)(endpoint)
        opened.append(endpoint.breaker.opened)

    with FaultServer(fault_rate=0.2, faults=("500", "dropped")) as server:
        use(server, action, breaker_failures=20, patience_s=0.0)
    with FaultServer(script=["429"] * 40) as server:
        use(server, action, breaker_failures=20, patience_s=0.0)
    assert opened == [None, None]


@pytest.mark.parametrize("in_flight", [1, 4])
def test_a_server_that_hangs_is_given_up_too(in_flight):
    with FaultServer(script=["slow"] * 99) as server, pytest.raises(EndpointDown, match=r"no reply within 0\.1 s"):
        use(server, asks(6), max_in_flight=in_flight, timeout_s=0.1, breaker_failures=3, probe_every_s=0.05,
            patience_s=0.3)


def test_one_probe_at_a_time_passes_an_open_breaker():
    async def action(endpoint: Endpoint) -> list[int]:
        calls = []
        for _ in range(3):
            found = await asyncio.gather(*(asks(1)(endpoint) for _ in range(20)), return_exceptions=True)
            assert all(isinstance(error, EndpointDown) for error in found)
            calls.append(server.calls)
            await asyncio.sleep(0.4)
        server.script.clear()
        while endpoint.breaker.opened is not None:
            await asyncio.gather(asks(1)(endpoint), return_exceptions=True)
            await asyncio.sleep(0.02)
        await asks(20)(endpoint)
        return calls

    with FaultServer(script=["500"] * 999) as server:
        first, second, third = use(server, action, max_in_flight=4, breaker_failures=4, probe_every_s=0.4,
                                   patience_s=0.0)
    assert 4 <= first <= 7 and second == first + 1 and third == second + 1


def test_a_server_that_comes_back_slow_closes_the_breaker(monkeypatch):
    """Each probe is of another call, so that none would wait longer than the one before."""
    monkeypatch.setattr(client, "PACE_FLOOR_S", 0.05)

    async def action(endpoint: Endpoint) -> int:
        endpoint.pace = paced(60.0, [0.01] * 40)
        for _ in range(3):
            endpoint.breaker.failed("x")
        assert endpoint.breaker.opened is not None
        for tries in range(20):
            endpoint.breaker._next_probe = 0.0  # the next call is a probe
            try:
                await endpoint.chat([{"role": "user", "content": f"good or bad {tries}"}], max_tokens=4)
            except EndpointDown:
                continue
            assert endpoint.breaker.opened is None
            return tries
        raise AssertionError("the breaker stayed open")

    with FaultServer(latency_s=(0.3, 0.3)) as server:
        assert use(server, action, timeout_s=30.0, breaker_failures=3, patience_s=0.0) == 0


def test_a_busy_server_closes_the_breaker():
    async def action(endpoint: Endpoint) -> None:
        for _ in range(3):
            endpoint.breaker.failed("x")
        endpoint.breaker._next_probe = 0.0  # the next call is a probe
        assert (await ask(endpoint)).text in ("good", "bad")

    with FaultServer(script=["429", "429"]) as server:
        use(server, action, breaker_failures=3, patience_s=0.0)
        assert server.calls == 3


def test_openings_and_seconds_are_counted():
    async def action(endpoint: Endpoint) -> tuple[dict[str, int], float]:
        await asks(3)(endpoint)
        server.stop()
        await asyncio.gather(*(ask(endpoint) for _ in range(9)), return_exceptions=True)
        return dict(endpoint.counts), endpoint.seconds

    with FaultServer(latency_s=(0.1, 0.1)) as server:
        counts, seconds = use(server, action, breaker_failures=4, patience_s=0.0, probe_every_s=99.0)
    assert counts["opened"] == 1 and counts["connection"] == counts["retried"] >= 4
    assert (counts["calls"], counts["answered"], counts["failed"]) == (12, 3, 9) and 0.3 <= seconds < 30


def test_a_call_that_is_cancelled_gives_its_place_back():
    async def action(endpoint: Endpoint) -> ChatReply:
        for _ in range(3):
            hanging = asyncio.create_task(ask(endpoint))
            await asyncio.sleep(0.1)
            hanging.cancel()
            await asyncio.gather(hanging, return_exceptions=True)
        assert not endpoint.pace._running
        return await ask(endpoint)

    with FaultServer(script=["slow"] * 3) as server:
        assert use(server, action, max_in_flight=1).text in ("good", "bad")


# -- cache ------------------------------------------------------------------------------------------------------------

def test_a_cached_call_asks_nobody(tmp_path):
    with FaultServer() as server:
        want = use(server, asks(5), cache_dir=tmp_path)
        calls = server.calls
    assert calls == 5
    again = use(server.url, asks(5), cache_dir=tmp_path)  # the server is gone
    assert [reply.text for reply in again] == [reply.text for reply in want] and all(reply.cached for reply in again)
    assert sorted(len(path.relative_to(tmp_path).parts) for path in tmp_path.rglob("*.json")) == [2] * 5


def test_whatever_determines_the_verdict_is_in_the_key(tmp_path):
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    shown = lambda image: [{"role": "user", "content": [{"type": "text", "text": "yes or no"},
                                                        {"type": "image", "image": image}]}]
    calls: list[dict[str, Any]] = [
        {"messages": ASK}, {"messages": [{"role": "user", "content": "good or bad?"}]}, {"messages": shown(red)},
        {"messages": shown(blue)}, {"messages": ASK, "max_tokens": 5}, {"messages": ASK, "temperature": 0.5},
        {"messages": ASK, "top_logprobs": 3}, {"messages": ASK, "prompt_hash": "x"},
    ]

    async def action(endpoint: Endpoint) -> None:
        for call in calls * 2:
            await endpoint.chat(**{"max_tokens": 4, **call})

    with FaultServer() as server:
        use(server, action, cache_dir=tmp_path)
        assert server.calls == len(calls)
        server.model = "judge-2"
        use(server, action, cache_dir=tmp_path)
        assert server.calls == 2 * len(calls)
        use(server, action, cache_dir=tmp_path, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
        assert server.calls == 3 * len(calls)
        assert server.bodies[-1]["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b'{"key": "another", "reply": 1}', None])
def test_a_corrupt_entry_is_deleted_and_asked_again(tmp_path, content):
    with FaultServer() as server:
        use(server, ask, cache_dir=tmp_path)
        path, = tmp_path.rglob("*.json")
        good = path.read_bytes()
        path.write_bytes(json.dumps({"key": path.stem, "reply": {"odd": 1}}).encode() if content is None else content)
        assert not use(server, ask, cache_dir=tmp_path).cached and server.calls == 2
        assert json.loads(path.read_bytes()) == json.loads(good)


def test_only_kept_replies_are_cached_and_failures_never(tmp_path):
    with FaultServer(script=["500"] * 3) as server:
        with pytest.raises(EndpointError):
            use(server, ask, cache_dir=tmp_path, attempts=3)
        use(server, asks(1, keep=lambda reply: False), cache_dir=tmp_path)
        assert not list(tmp_path.rglob("*.json"))
        use(server, asks(1), cache_dir=tmp_path)
        assert use(server, asks(1, keep=lambda reply: False), cache_dir=tmp_path)[0].cached is False
        assert server.calls == 6 and not list(tmp_path.rglob("*.json"))


def test_processes_share_the_cache(tmp_path):
    code = (
        "import asyncio, sys\n"
        "from cosmo_rl.cpgd.judges.client import Endpoint\n"
        "assert 'openai' not in sys.modules, 'it takes a second, and most runs have no judge'\n"
        "async def main():\n"
        "    e = Endpoint(sys.argv[1], 'judge', cache_dir=sys.argv[2])\n"
        "    ask = lambda i: e.chat([{'role': 'user', 'content': f'good or bad {i % 40}'}], max_tokens=4)\n"
        "    print([r.text for r in await asyncio.gather(*map(ask, range(80)))])\n"
        "asyncio.run(main())\n")
    with FaultServer() as server:
        want = [reply.text for reply in use(server, asks(40))] * 2
        before = server.calls
        workers = [subprocess.Popen([sys.executable, "-c", code, server.url, str(tmp_path)], stdout=subprocess.PIPE,
                                    text=True) for _ in range(2)]
        outputs = [worker.communicate(timeout=60)[0] for worker in workers]
        assert outputs == [f"{want}\n"] * 2 and server.calls - before <= 2 * 80
        calls = server.calls
        use(server, asks(40), cache_dir=tmp_path)
        assert server.calls == calls
    assert len(list(tmp_path.rglob("*.json"))) == 40 and not list(tmp_path.rglob(".*"))


def test_a_cache_folder_that_is_a_file_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"the cache .*file cannot be written \(.*\); free space, or give a folder"):
        DiskCache(tmp_path / "file")


def test_a_cache_that_cannot_be_written_is_told(tmp_path):
    cache = DiskCache(tmp_path)
    cache.folder = Path("/proc/self")  # where not even root can make a folder
    with pytest.raises(ValueError, match="the cache /proc/self cannot be written"):
        cache.put("ab" * 20, {})


def test_a_cache_that_cannot_be_read_is_told(tmp_path):
    cache = DiskCache(tmp_path)
    cache.path("ab" * 20).mkdir(parents=True)  # where not even root can read a file
    with pytest.raises(ValueError, match=r"the cache .* cannot be read \(Is a directory\)"):
        cache.get("ab" * 20)
    with pytest.raises(ValueError, match=r"the cache .* cannot be written \(Is a directory\)"):
        cache.drop("ab" * 20)
    with pytest.raises(ValueError, match="cannot be written"):
        cache.put("ab" * 20, {})
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "nothing half written is left"


def test_a_cache_entry_that_is_nested_too_deep_is_corrupt(tmp_path):
    cache = DiskCache(tmp_path)
    cache.put("ab" * 20, 1)
    for depth in (65, 500, 100_000):
        cache.path("ab" * 20).write_text(f'{{"key": "{"ab" * 20}", "reply": {"[" * depth}{"]" * depth}}}')
        assert cache.get("ab" * 20) is None and not list(tmp_path.rglob("*.json"))


def test_a_reply_that_the_server_gave_up_is_asked_again():
    given_up = {"model": "judge", "choices": [{"finish_reason": "abort", "message": {"content": "go"}}]}
    with FaultServer() as server:
        good, replies = server.chat, [given_up]
        server.chat = lambda body: replies.pop() if replies else good(body)
        assert use(server, ask).text in ("good", "bad") and server.calls == 2


# -- the key ----------------------------------------------------------------------------------------------------------

def test_the_key_is_sent_and_shown_nowhere(tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setenv("JUDGE_KEY", f" {SECRET}\n")
    told: list[str] = []
    with caplog.at_level(logging.DEBUG), FaultServer(key=SECRET) as server:
        options = {"api_key_env": "JUDGE_KEY", "cache_dir": tmp_path, "attempts": 2}
        assert use(server, ask, **options).text in ("good", "bad")
        use(server, lambda endpoint: endpoint.verify(), **options)
        # A server that repeats the key in replies, and in refusals.
        server.oracle = lambda body: f"good {SECRET}"
        told.append(repr(use(server, asks(1), **options)))
        server.key = "another key"
        server.script = ["500", "500", "", ""]
        for _ in range(2):
            with pytest.raises(EndpointError) as error:
                use(server, asks(3), **{**options, "cache_dir": None})
            told.append("".join(traceback.format_exception(error.value)))
        endpoint = Endpoint(server.url, "judge", api_key_env="JUDGE_KEY")
        told += [repr(endpoint), str(endpoint), repr(endpoint.breaker), str(endpoint.counts)]
    assert "incorrect API key provided: [key]" in "".join(told)
    told += [caplog.text, *capfd.readouterr(), *(path.read_text() for path in tmp_path.rglob("*") if path.is_file())]
    assert SECRET not in "".join(told)


def test_a_key_that_a_server_repeats_in_other_characters_is_not_kept(tmp_path, monkeypatch):
    """JSON may write a slash as two characters, and any character by its number."""
    key = "sk/swordfish/123"
    monkeypatch.setenv("JUDGE_KEY", key)
    reply = json.dumps({"model": "judge", "choices": [{"message": {"content": f"good {key}"}, key: [key]}]})
    with FaultServer(key=key) as server:
        server.chat = lambda body: {"raw": reply.replace("/", "\\/").replace("w", "\\u0077")}
        said = use(server, ask, api_key_env="JUDGE_KEY", cache_dir=tmp_path).text
    assert said == "good [key]"
    kept, = (json.loads(path.read_text()) for path in tmp_path.rglob("*.json"))
    assert key not in str(kept)


def test_nothing_that_openai_finds_in_the_environment_is_sent(monkeypatch):
    for name, value in {"API_KEY": "sk-env", "ADMIN_KEY": "sk-env", "ORG_ID": "sk-env", "PROJECT_ID": "sk-env",
                        "BASE_URL": "http://127.0.0.1:1/sk-env", "WEBHOOK_SECRET": "sk-env",
                        "CUSTOM_HEADERS": "Authorization: Bearer sk-env\nX-Own: sk-env\nCookie: sk-env"}.items():
        monkeypatch.setenv(f"OPENAI_{name}", value)
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    with FaultServer(script=["500"]) as server:
        use(server, ask)
        use(server, ask, api_key_env="JUDGE_KEY")
        for headers, own in zip(server.headers, ({}, {}, {"authorization": f"Bearer {SECRET}"}), strict=True):
            assert headers.pop("host") == server.url[7:] and int(headers.pop("content-length"))
            assert headers == {"content-type": "application/json", "accept-encoding": "identity",
                               "user-agent": "cosmo-rl", **own}


@pytest.mark.parametrize(("name", "value"), [("HTTP_PROXY", f"foo://me:{SECRET}@x"), ("ALL_PROXY", "bar://x"),
                                             ("SSL_CERT_FILE", "/nowhere")])
def test_a_proxy_that_cannot_be_used_is_told_without_its_password(monkeypatch, name, value):
    for one in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(one, raising=False)
        monkeypatch.delenv(one.lower(), raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(EndpointError, match="in the environment cannot be used; correct it") as error:
        use("https://h" if "SSL" in name else "http://h", ask, attempts=1)
    assert SECRET not in "".join(traceback.format_exception(error.value))


def test_a_server_s_cookies_are_not_sent_back():
    async def action(endpoint: Endpoint) -> None:
        await asyncio.gather(ask(endpoint), endpoint.verify(), endpoint.classify("text"))

    seen: list[bytes] = []
    with replying_server(http("200 OK", GOOD, "Set-Cookie: a=b; Path=/"), seen) as url:
        use(url, action)
    assert len(seen) == 3 and not any(b"cookie" in request.lower() for request in seen)


def test_without_openai_the_error_names_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MissingPackage, match="asked through openai: pip install openai"):
        Endpoint("http://h", "judge")


def test_requests_are_not_logged_line_by_line(caplog):
    with caplog.at_level(logging.INFO), FaultServer() as server:
        use(server, asks(3))
    assert caplog.text == ""


@pytest.mark.parametrize(("name", "value", "message"), [
    ("JUDGE_KEY", None, "JUDGE_KEY holds no key for http://h; export it"),
    ("JUDGE_KEY", "  ", "JUDGE_KEY holds no key"), ("JUDGE_KEY", "a key", "JUDGE_KEY holds no key"),
    (SECRET, None, "given by the NAME of an environment variable"),
])
def test_a_key_that_cannot_be_had_is_an_error_without_it(monkeypatch, name, value, message):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message) as error:
        Endpoint("http://h", "judge", api_key_env=name)
    assert SECRET not in str(error.value) and "a key" not in str(error.value)


@pytest.mark.parametrize("options", [{"max_in_flight": 0}, {"attempts": 0}, {"timeout_s": 0.0}])
def test_numbers_that_allow_no_call_are_refused(options):
    with pytest.raises(ValueError, match="give at least 1, at least 1, more than 0"):
        Endpoint("http://h", "judge", **options)


# -- models, scores, pictures, loop -----------------------------------------------------------------------------------

def test_verify_asks_which_models_are_served():
    with FaultServer(model="qwen") as server:
        use(server, lambda endpoint: endpoint.verify())
        with pytest.raises(EndpointError, match="the server does not serve this model but qwen; ask for one of these"):
            use(server, lambda endpoint: endpoint.verify(), model="judge")
        server.model = "\x1b[31m" + "\ud800" + "x" * 999
        with pytest.raises(EndpointError) as error:
            use(server, lambda endpoint: endpoint.verify(), model="judge")
        assert str(error.value).isprintable() and len(str(error.value)) < 500
    with pytest.raises(EndpointError, match=r"2 attempts failed, the last: ConnectError .*see that the server runs"):
        use(server, lambda endpoint: endpoint.verify(), attempts=2)


@pytest.mark.parametrize("native", [False, True])
def test_scores_in_both_dialects(native, tmp_path):
    async def action(endpoint: Endpoint) -> list[tuple[float, ...]]:
        return [await endpoint.classify("a text"), await endpoint.classify("a text"), await endpoint.classify("other")]

    with FaultServer(native=native, script=["500", "malformed"]) as server:
        first, again, other = use(server, action, cache_dir=tmp_path)
        assert first == again != other and len(first) == 1 and server.calls == 4
        assert (0 <= first[0] < 1) is not native or native


@pytest.mark.parametrize("payload", [
    {}, [], {"model": "judge", "data": []}, {"model": "judge", "data": [{"probs": []}]}, {"embedding": []},
    {"embedding": ["x"]}, {"embedding": [1e999]}, "embedding", None, {"embedding": ["0.5"]}, {"embedding": [True]},
    {"embedding": [10 ** 400]}, {"embedding": [math.nan]}, {"model": "judge", "data": [{"probs": [None]}]},
])
def test_no_other_json_passes_for_scores(payload):
    with FaultServer() as server:
        server.scores = lambda body: {"raw": json.dumps(payload)}
        with pytest.raises(EndpointError, match=r"is no list of scores|is no JSON: '.*(NaN|Infinity)"):
            use(server, WAYS["classify"], attempts=1)


def test_pictures_are_sent_as_they_are_where_servers_agree_on_them(tmp_path):
    image = Image.effect_noise((40, 30), 50).convert("RGB")
    files = {}
    for name, options in {"a.png": {}, "a.jpg": {}, "a.bmp": {}, "big.png": {}}.items():
        files[name] = tmp_path / name
        (image.resize((400, 300)) if name == "big.png" else image).save(files[name], **options)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    image.convert("RGBA").save(tmp_path / "clear.png")

    def decoded(source: Any, limit: int = 10_000) -> tuple[str, bytes, Image.Image]:
        head, _, data = data_uri(source, limit).partition(";base64,")
        raw = base64.b64decode(data)
        return head, raw, Image.open(io.BytesIO(raw))

    for name in ("a.png", "a.jpg"):
        assert decoded(str(files[name]))[1] == files[name].read_bytes()
        assert decoded(files[name].read_bytes())[1] == files[name].read_bytes()
    assert decoded(str(files["a.jpg"]))[0] == "data:image/jpeg"
    assert decoded(str(files["a.bmp"]))[2].tobytes() == decoded(image)[2].tobytes() == image.tobytes()
    assert decoded(str(tmp_path / "turned.jpg"))[2].size == (30, 40)
    assert decoded(str(tmp_path / "clear.png"))[2].mode == "RGB"
    assert decoded(str(files["big.png"]))[2].size == (115, 86)
    with pytest.raises(RowError, match=r"gone\.png does not exist"):
        data_uri(str(tmp_path / "gone.png"))


def test_a_picture_reaches_the_server_and_is_encoded_once(monkeypatch):
    made = []
    monkeypatch.setattr(client, "data_uri", lambda *args: made.append(args) or data_uri(*args))
    image = Image.new("RGB", (8, 8), "red")

    async def action(endpoint: Endpoint) -> None:
        content = lambda i: [{"type": "image", "image": image}, {"type": "text", "text": f"yes or no {i}"}]
        await asyncio.gather(*(endpoint.chat([{"role": "user", "content": content(i)}], max_tokens=4)
                               for i in range(20)))

    with FaultServer() as server:
        use(server, action)
    sent = {body["messages"][0]["content"][0]["image_url"]["url"] for body in server.bodies}
    assert sent == {data_uri(image)} and len(made) == 1


def test_a_thread_makes_calls_while_synchronous_code_goes_on():
    with FaultServer(latency_s=(0.2, 0.2)) as server:
        loop, endpoint = LoopThread(), Endpoint(server.url, "judge")
        started = time.monotonic()
        future = loop.submit(asks(3)(endpoint))
        assert time.monotonic() - started < 0.1 and not future.done()
        assert len(future.result(timeout=10)) == 3
        hanging = loop.submit(asyncio.sleep(60))
        loop.submit(endpoint.aclose()).result(timeout=10)
        loop.close()
        loop.close()
        assert hanging.cancelled() and not loop._thread.is_alive()
        errors = LoopThread()
        with pytest.raises(httpx2.InvalidURL):
            errors.submit(_raising()).result(timeout=10)
        errors.close()


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_a_task_that_ends_the_interpreter_ends_no_other(error):
    """Its loop would end, and what the others were to give would never come."""
    async def ending() -> None:
        await asyncio.sleep(0.1)
        raise error(3)

    async def gathering() -> None:
        await asyncio.gather(ending(), asyncio.sleep(60))

    loop = LoopThread()
    waiting = loop.submit(asyncio.sleep(0.3, "well"))
    for coroutine in (ending(), gathering()):
        with pytest.raises(error):
            loop.submit(coroutine).result(timeout=10)
    assert waiting.result(timeout=10) == loop.submit(asyncio.sleep(0, "well")).result(timeout=10) == "well"
    loop.close()
    assert loop._loop.is_closed()


@pytest.mark.filterwarnings("ignore:coroutine")
def test_a_thread_that_does_not_end_holds_nobody_up(monkeypatch):
    monkeypatch.setattr(loop_module, "CLOSE_S", 0.2)
    loop, release = LoopThread(), threading.Event()

    async def blocking() -> None:
        release.wait(60)

    loop.submit(blocking())
    started = time.monotonic()
    loop.close()
    assert time.monotonic() - started < 5
    release.set()
    loop._thread.join(timeout=10)
    del loop
    gc.collect()


def test_what_is_to_run_last_runs_after_all_is_cancelled():
    loop, order = LoopThread(), []

    async def hanging() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            order.append("cancelled")

    async def last() -> None:
        order.append("last")

    loop.submit(hanging())
    loop.submit(asyncio.sleep(0)).result(timeout=10)
    loop.close(last)
    assert order == ["cancelled", "last"]


async def _raising() -> None:
    raise httpx2.InvalidURL("x")


def test_a_reply_that_ended_at_its_limit_says_so():
    for why in ("length", "stop"):
        reply = {"model": "judge", "choices": [{"finish_reason": why, "message": {"content": "0"}}]}
        assert replying(http("200 OK", json.dumps(reply).encode()), ask).cut is (why == "length")
