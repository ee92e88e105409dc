"""Faults of a completion server, each with a name in FAULTS, so that tests can be parametrized over them.

A fault is planted for some requests by the plan of a CompletionServer. ``expected`` is what a good client does:

"retry"   ask again; if the next answer is right, the results are those of a server without faults
"refuse"  stop with one message at once, because asking again cannot help
"accept"  use the answer, which is right although it looks unusual
"parity"  nothing: the answer has the right form, and only a comparison with the model itself shows that it is wrong

This file has the faults of time, status and connection, completion_wrong_answers.py those of the content, and
completion_wrong_requests.py those of servers that answer another request.
"""

import json
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import formatdate
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from tests.helpers.completion_server import Handler

Expected = Literal["retry", "refuse", "accept", "parity"]
Reads = Literal["both", "text", "likelihoods"]
NEVER = 120.0  # seconds after which an answer that never comes ends, at the latest


@dataclass(frozen=True)
class Fault:
    """How a request is answered. expected: of a client, see above; reads: which requests the fault disturbs."""

    act: Callable[["Handler"], None]
    expected: Expected
    reads: Reads = "both"


FAULTS: dict[str, Fault] = {}


def fault(expected: Expected, reads: Reads = "both") -> Callable[[Any], Any]:
    """Register the decorated function, which answers the current request of a handler, under its name."""

    def registered(act: Callable[["Handler"], None]) -> Callable[["Handler"], None]:
        FAULTS[act.__name__] = Fault(act, expected, reads)
        return act

    return registered


def names(*expected: Expected, reads: Literal["text", "likelihoods"]) -> list[str]:
    """Return the names of the faults with these expectations that disturb requests of this sort."""
    return [name for name, entry in FAULTS.items() if entry.expected in expected and entry.reads in ("both", reads)]


def patience(name: str) -> list[str]:
    """Return options with which a client meets a fault soon, and still waits for right answers on a slow machine."""
    return ["--request_timeout=3", "--concurrency=1"] if name in ("never_answers", "trickles") else []


def error(handler: "Handler", status: int, message: str, **headers: str) -> None:
    """Answer with an error in the JSON form of the API."""
    body = {"error": {"message": message, "type": "InternalServerError", "param": None, "code": status}}
    handler.send(status, body, {name.replace("_", "-"): value for name, value in headers.items()})


# --- time


@fault("accept")
def slow(handler):
    """The right answer, late."""
    time.sleep(handler.owner.slow)
    handler.send_completion(handler.asked)


@fault("retry")
def never_answers(handler):
    """The connection stays open without an answer until the client or the server gives up."""
    handler.owner.stopped.wait(NEVER)
    handler.hang_up()


@fault("retry")
def trickles(handler):
    """One byte of the right answer at a time, so each read succeeds but the answer never ends."""
    data = json.dumps(handler.owner.completer.answer(handler.asked)).encode()
    handler.begin(200, {"Content-Type": "application/json", "Content-Length": str(len(data))})
    for byte in data:
        handler.wfile.write(bytes([byte]))
        if handler.owner.stopped.wait(handler.owner.slow):
            break


# --- status codes


@fault("retry")
def status_500(handler):
    """An exception in the server."""
    error(handler, 500, "EngineCore encountered an issue. See stack trace (above) for the root cause.")


@fault("retry")
def status_502(handler):
    """A proxy does not reach the server and answers with its own page."""
    handler.send(502, "<html><head><title>502 Bad Gateway</title></head><body>nginx</body></html>")


@fault("retry")
def status_503(handler):
    """The server is not ready; an empty body."""
    handler.send(503, None)


@fault("retry")
def status_504(handler):
    """A proxy has waited too long."""
    handler.send(504, "<html><body>504 Gateway Time-out</body></html>")


@fault("retry")
def status_429(handler):
    """Too many requests; come again in a second."""
    error(handler, 429, "Rate limit reached", Retry_After="1")


@fault("retry")
def status_429_until_a_date(handler):
    """Too many requests; come again at a date, which is now."""
    error(handler, 429, "Rate limit reached", Retry_After=formatdate(time.time(), usegmt=True))


@fault("retry")
def status_429_without_time(handler):
    """Too many requests, without Retry-After."""
    error(handler, 429, "Rate limit reached")


@fault("refuse")
def status_401(handler):
    """The key is missing or wrong."""
    handler.send(401, {"error": "Unauthorized"})


@fault("refuse")
def status_403(handler):
    """The key does not permit this model."""
    error(handler, 403, "You do not have access to this model")


@fault("refuse")
def unknown_model(handler):
    """The model name is not served."""
    handler.send_completion(handler.asked | {"model": "another-model"})


@fault("refuse")
def context_too_long(handler):
    """The server has a smaller context than the model."""
    handler.send_completion(handler.asked | {"prompt": [1] * handler.owner.completer.context})


@fault("refuse")
def unknown_field(handler):
    """The server does not know a field of the request."""
    error(handler, 400, "[{'type': 'extra_forbidden', 'loc': ('body', 'return_token_ids'), 'msg': 'Extra inputs'}]")


@fault("refuse")
def no_such_path(handler):
    """Another server, which has no /v1/completions."""
    handler.send(404, {"detail": "Not Found"})


@fault("refuse")
def redirect(handler):
    """A login page in front of the server: the key must not be sent there."""
    handler.send(307, None, {"Location": f"{handler.owner.url}/login"})


# --- connections


@fault("retry")
def cut_before(handler):
    """The connection closes without an answer."""
    handler.hang_up()


@fault("retry")
def reset(handler):
    """The connection is reset."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True
    handler.connection.close()


@fault("retry")
def cut_in_headers(handler):
    """The connection closes within the headers."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Ty")
    handler.hang_up()


@fault("retry")
def cut_in_body(handler):
    """The connection closes in the middle of the right answer."""
    data = json.dumps(handler.owner.completer.answer(handler.asked)).encode()
    handler.begin(200, {"Content-Type": "application/json", "Content-Length": str(len(data))})
    handler.wfile.write(data[: len(data) // 2])
    handler.hang_up()


@fault("retry")
def dies(handler):
    """The server ends; until its ``start``, connections are refused."""
    handler.owner.stop()
