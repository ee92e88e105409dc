"""Requests to a server with OpenAI's completions API: retried while it may recover, else refused with one message."""

import os
import random
import threading
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

import httpx

from lora_one.errors import RunError, UsageError

T = TypeVar("T")
KEY = "OPENAI_API_KEY"  # environment variable with the server's key
ATTEMPTS = 8  # of a request, over about a minute of waiting
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds
TEMPORARY = {408, 409, 425, 429}  # and all from 500
SHOWN = 200  # characters of an unexpected answer in a message


class Unusable(Exception):
    """An answer that cannot be used, but the next one may be."""


class Connection:
    """A server's address, with the key of the environment; safe to use from several threads.

    base_url: with or without /v1 at its end.  timeout: seconds that one request may take.
    Raises UsageError: not an address, or the key cannot be sent.
    """

    def __init__(self, base_url: str, timeout: float):
        self.root = root_of(base_url)
        self.stopping = threading.Event()
        key = given_key()
        host = urlsplit(self.root).hostname
        self.timeout = timeout
        self.client = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0)),
            limits=httpx.Limits(max_connections=None),
            trust_env=host not in ("localhost", "127.0.0.1", "::1"),  # a proxy does not know this machine
        )

    def get(self, path: str, read: Callable[[Any], T], attempts: int = ATTEMPTS) -> T:
        """Return ``read`` of the JSON at a path, relative to the root."""
        return self.ask("GET", path, None, read, attempts)

    def post(self, path: str, payload: dict[str, Any], read: Callable[[Any], T], attempts: int = ATTEMPTS) -> T:
        """Return ``read`` of the JSON that answers the payload."""
        return self.ask("POST", path, payload, read, attempts)

    def ask(self, method: str, path: str, payload: Any, read: Callable[[Any], T], attempts: int) -> T:
        """Send a request until its answer can be read.

        Raises RunError: the server refuses it, or ``attempts`` answers could not be used.
        """
        for attempt in range(attempts):
            wait = None
            try:
                response = self.sent(method, path, payload)
                wait = asked_wait(response)
                refuse(response, self.root)
                return read(response.json())
            except Unusable as error:
                reason = str(error)
            except (httpx.TransportError, httpx.DecodingError) as error:
                reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
                reason = f"an answer of another form, {error!r:.{SHOWN}}"
            if attempt + 1 < attempts:
                doubled = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.75, 1.25)
                self.stopping.wait(doubled if wait is None else wait)
            if self.stopping.is_set():
                break
        raise RunError(
            f"the server at {self.root} does not answer as it should, after {attempt + 1} attempts ({reason}): check "
            "it, or start it again, and run the same command again to continue"
        )

    def sent(self, method: str, path: str, payload: Any) -> httpx.Response:
        """Send a request and return the whole answer. Raises Unusable: it takes longer than the time-out in all."""
        end = time.monotonic() + self.timeout
        with self.client.stream(method, urljoin(f"{self.root}/", path), json=payload) as response:
            parts = []
            for part in response.iter_bytes():
                parts.append(part)
                if time.monotonic() > end:
                    raise Unusable(f"it is not complete after {self.timeout:g} seconds")
            return httpx.Response(response.status_code, headers=kept(response.headers), content=b"".join(parts))

    def close(self) -> None:
        """End the connections: requests in flight fail, and no further attempt is made."""
        self.stopping.set()
        self.client.close()


def given_key() -> str | None:
    """Return the key of the environment without white space around it; None: there is none.

    Raises UsageError: it has characters that a header cannot have; the message does not show it.
    """
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UsageError(f"the environment variable {KEY} has characters that a key cannot have: set it again")
    return key or None


def root_of(base_url: str) -> str:
    """Return the address of the API, which ends in /v1. Raises UsageError: not an address, or one with a password."""
    try:
        parts = urlsplit(base_url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of a port that is not a number, or of brackets
        usable = False
    if not usable:
        raise UsageError(f"--base_url={base_url} is not an address: pass one such as http://127.0.0.1:8000")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UsageError(
            f"--base_url has more than an address: pass only http(s)://host:port, and the key in the environment "
            f"variable {KEY}"
        )
    root = base_url.rstrip("/")
    return root if root.endswith("/v1") else f"{root}/v1"


def kept(headers: httpx.Headers) -> dict[str, str]:
    """Return the headers that are read here; the content is decoded already."""
    return {name: headers[name] for name in ("Content-Type", "Location", "Retry-After") if name in headers}


def asked_wait(response: httpx.Response) -> float | None:
    """Return the seconds that the server asks to wait, at most LONGEST_WAIT; None: it does not say."""
    given = response.headers.get("Retry-After", "")
    try:
        seconds = float(given) if given.isdigit() else parsedate_to_datetime(given).timestamp() - time.time()
    except ValueError:
        return None
    return min(LONGEST_WAIT, max(0.0, seconds))


def refuse(response: httpx.Response, root: str) -> None:
    """Raise RunError for an answer that a repetition would not change, Unusable for one that it may change."""
    status, text = response.status_code, said(response)
    if status in (401, 403):
        if given_key() is not None:
            raise RunError(f"the server at {root} refuses the key in {KEY} ({status}): correct this variable")
        raise RunError(f"the server at {root} wants a key ({status}): set the environment variable {KEY}")
    if 300 <= status < 400:
        place = response.headers.get("Location", "another address")
        raise RunError(f"the server at {root} sends to {place}: pass that server as --base_url")
    if status >= 500 or status in TEMPORARY:
        raise Unusable(f"status {status}: {text}")
    if "html" in response.headers.get("Content-Type", ""):
        raise RunError(
            f"{root} answers with a web page ({status}) and is not a server with OpenAI's completions API: correct "
            "--base_url, or start one with scripts/serve.sh"
        )
    if status >= 400:
        raise RunError(f"the server at {root} refuses a request ({status}): {text}")


def said(response: httpx.Response) -> str:
    """Return the error message of an answer, or the beginning of its text."""
    try:
        body = response.json()
        found = body.get("error", body)
        text = found.get("message", str(found)) if isinstance(found, dict) else str(found)
    except (ValueError, AttributeError):
        text = response.text
    text, key = " ".join(text.split()), given_key()
    return (text if key is None else text.replace(key, "<the key>"))[:SHOWN] or "no message"
