"""A small OpenAI-compatible server in a thread of the test, in vLLM's JSON form, that can misbehave as planned."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.helpers import completion_wrong_answers, completion_wrong_requests  # noqa: F401  (they register faults)
from tests.helpers.completion_answers import Completer, Refusal
from tests.helpers.completion_faults import FAULTS
from tests.helpers.models import random_llama

Json = dict[str, Any]
Plan = str | Sequence[str | None] | Mapping[int, str] | Callable[[int], str | None] | None


class CompletionServer:
    """Serves a model at ``url``; ``stop`` closes the port and every connection, ``start`` serves on it again.

    plan: the fault (a name in FAULTS) of each completion request, by its number from 0: one name for all requests, a
    list for the first ones, a dict, or a function of the number; None: no fault.
    key: which requests must have; None: none.  other: a second model, for the fault of wrong weights.
    slow: seconds that slow answers take.  defaults: sampling parameters of requests that do not give them.

    ``requests`` has the JSON of every completion request, ``visits`` the path and the headers of every request, and
    ``most_at_once`` the largest number of completion requests that were answered at the same time.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        plan: Plan = None,
        *,
        name: str = "model",
        key: str | None = None,
        context: int | None = None,
        other: Any = None,
        slow: float = 0.3,
        port: int = 0,
        **defaults: Any,
    ) -> None:
        self.completer = Completer(model, tokenizer, name, context, **defaults)
        self.other = None if other is None else Completer(other, tokenizer, name, context, **defaults)
        self.plan, self.key, self.slow, self.port = plan, key, slow, port
        self.requests: list[Json] = []
        self.visits: list[tuple[str, dict[str, str]]] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.RLock()
        self.stopped = threading.Event()
        self.connections: set[socket.socket] = set()
        self.http: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        """The --base_url of this server, without /v1."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> "CompletionServer":
        """Serve; a second time on the same port."""
        self.stopped.clear()
        self.http = Http(("127.0.0.1", self.port), Handler)
        self.http.owner, self.port = self, self.http.server_port
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Close the port and every connection, as a server that dies."""
        with self.lock:
            http, self.http = self.http, None
        if http is None:
            return
        self.stopped.set()
        http.shutdown()
        http.server_close()
        with self.lock:
            for connection in self.connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def fault(self, number: int) -> str | None:
        """Return the name of the fault of the request with this number."""
        if self.plan is None or isinstance(self.plan, str):
            return self.plan
        if callable(self.plan):
            return self.plan(number)
        if isinstance(self.plan, Mapping):
            return self.plan.get(number)
        return self.plan[number] if number < len(self.plan) else None

    @contextmanager
    def counted(self, request: Json) -> Iterator[int]:
        """Note a request, and yield its number."""
        with self.lock:
            number = len(self.requests)
            self.requests.append(request)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            yield number
        finally:
            with self.lock:
                self.at_once -= 1


class Http(ThreadingHTTPServer):
    """The HTTP server of a CompletionServer (``owner``)."""

    daemon_threads = True
    request_queue_size = 128
    owner: CompletionServer

    def handle_error(self, *_: Any) -> None:
        """Print nothing about clients that hang up."""


class Handler(BaseHTTPRequestHandler):
    """One connection; ``asked`` is the JSON of the current request and ``number`` its number."""

    protocol_version = "HTTP/1.1"
    server: Http

    def setup(self) -> None:
        super().setup()
        with self.owner.lock:
            self.owner.connections.add(self.connection)

    def finish(self) -> None:
        with self.owner.lock:
            self.owner.connections.discard(self.connection)
        super().finish()

    @property
    def owner(self) -> CompletionServer:
        return self.server.owner

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self.visit()
        completer = self.owner.completer
        served = {"id": completer.name, "object": "model", "created": int(time.time()), "owned_by": "vllm"}
        answers = {
            "/health": None,
            "/version": {"version": "0.0.test"},
            "/v1/models": {
                "object": "list",
                "data": [served | {"root": completer.name, "parent": None, "max_model_len": completer.context}],
            },
        }
        if self.path == "/v1/models" and not self.authorized():
            self.send(401, {"error": "Unauthorized"})
        elif self.path in answers:
            self.send(200, answers[self.path])
        else:
            self.send(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        self.visit()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path != "/v1/completions":
            self.send(404, {"detail": "Not Found"})
            return
        self.asked = json.loads(body)
        with self.owner.counted(self.asked) as self.number:
            fault = self.owner.fault(self.number)
            if not self.authorized():
                self.send(401, {"error": "Unauthorized"})
            elif fault is not None:
                FAULTS[fault].act(self)
            else:
                self.send_completion(self.asked)

    def visit(self) -> None:
        with self.owner.lock:
            self.owner.visits.append((self.path, dict(self.headers)))

    def authorized(self) -> bool:
        return self.owner.key is None or self.headers.get("Authorization") == f"Bearer {self.owner.key}"

    def send_completion(
        self,
        request: Json,
        changed: Callable[[Json], Any] = lambda answer: answer,
        completer: Completer | None = None,
    ) -> None:
        """Answer a request. changed: what is sent instead of the right answer; completer: another model's."""
        try:
            answer = (completer or self.owner.completer).answer(request)
        except Refusal as refusal:
            self.send(refusal.status, refusal.body)
        else:
            self.send(200, changed(answer))

    def send(self, status: int, content: Any, headers: Mapping[str, str] | None = None) -> None:
        """Answer with JSON; a text is sent as it is, as HTML, and None as an empty body."""
        kind = "text/html" if isinstance(content, str) else "application/json"
        data = b"" if content is None else (content if isinstance(content, str) else json.dumps(content)).encode()
        self.begin(status, {"Content-Type": kind, "Content-Length": str(len(data))} | dict(headers or {}))
        self.wfile.write(data)

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """Send the status and the headers."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def hang_up(self) -> None:
        """Close the connection at once."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def completion_servers(model: Any, tokenizer: Any) -> Iterator[Callable[..., CompletionServer]]:
    """Yield a function that starts a server with this plan and other options; at the end all are stopped."""
    servers = []

    def started(plan: Plan = None, **options: Any) -> CompletionServer:
        other = random_llama(model.config.vocab_size)
        servers.append(CompletionServer(model, tokenizer, plan, other=other, slow=0.05, **options).start())
        return servers[-1]

    try:
        yield started
    finally:
        for server in servers:
            server.stop()
