"""Asks a model behind an OpenAI-compatible endpoint, and tries again when that can help.

A rate limit (429), a fault of the server (5xx), a broken connection or no reply in time is tried
again after a pause that doubles each time, with jitter, so that many clients do not come back in
step; where the server says how long to wait (`Retry-After`), it is not asked earlier. Everything
else (a wrong key, an unknown model, an exhausted quota) ends the evaluation at once: it would go
wrong for every question.

The key is read from the environment. It goes into one header, to the host that was given (a
redirect is not followed), over plain http only to this machine, and into nothing that is written or
printed: what a server says of a request, which may repeat the key, is cleaned of it first.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import email.utils
import ipaddress
import os
import random
import urllib.parse
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

from qlora_jax.errors import ConfigError, EvaluationError

try:
    import httpx
except ImportError:  # the extra "judge"
    httpx = None

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_LONGEST_RETRY_AFTER_S = 600.0
_CONNECT_S = 20.0
# In an ordinary text a shorter one could stand by chance, and would damage it.
_SHORTEST_SECRET = 8
_TRANSIENT = {408, 409, 425, 429}
_NO_USE_TO_RETRY = {"insufficient_quota", "billing_hard_limit_reached"}


class JudgeReply(NamedTuple):
    """What came back.

    Attributes:
        text: all that was written.
        finish_reason: why it ended: "stop"; "length", cut off; "too_long", the endpoint refused a
            request that does not fit its model; or a word of the endpoint's own.
        prompt_tokens: as the endpoint counts; None where it does not.
        completion_tokens: as well.
    """

    text: str
    finish_reason: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where to ask.

    Attributes:
        url: up to and with `/v1`.
        key: sent as a bearer token; None: nothing is sent.
        timeout_s: of one request.
        attempts: of one request.
    """

    url: str
    key: str | None = dataclasses.field(default=None, repr=False)
    timeout_s: float = 300.0
    attempts: int = 6

    def clean(self, text: str) -> str:
        """The text without the key."""
        if self.key is None or len(self.key) < _SHORTEST_SECRET:
            return text
        return text.replace(self.key, "[key]")


def read_endpoint(
    url: str,
    *,
    key_variable: str | None = None,
    default_variable: str = "JUDGE_API_KEY",
    plain_http: bool = False,
    timeout_s: float = 300.0,
) -> Endpoint:
    """Checks an address, and reads the key for it.

    Args:
        url: of the endpoint, as OpenAI's clients take it: `https://api.openai.com/v1`.
        key_variable: the environment variable that holds the key; it must be set.
        default_variable: the one that may be set where none is named. Not OPENAI_API_KEY: that key
            is meant for one host, and must not go to another by default.
        plain_http: allows the key to be sent unencrypted to another machine.
        timeout_s: of one request.

    Raises:
        ConfigError: the address or the key cannot be used, or would be given away.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname
        usable = parts.scheme in ("http", "https") and host and (parts.port is None or parts.port)
    except ValueError:
        usable = False
    if not usable or parts.query or parts.fragment:
        raise ConfigError("the endpoint must be like https://api.openai.com/v1, without ? or #")
    if parts.username is not None or parts.password is not None:
        raise ConfigError("the endpoint has a user or a password in it; give the key in a variable")
    variable = key_variable or default_variable
    key = os.environ.get(variable, "").strip() or None
    if key_variable and key is None:
        raise ConfigError(f"the environment variable {key_variable} is not set")
    if key is not None:
        if not all("!" <= character <= "~" for character in key):
            raise ConfigError(f"what {variable} holds cannot be a key: it has blanks, or no ASCII")
        if parts.scheme == "http" and not _is_loopback(host) and not plain_http:
            raise ConfigError(
                f"the key in {variable} would go to {host} unencrypted; give an https:// address, "
                "or allow it with --plain_http"
            )
    return Endpoint(url.rstrip("/"), key, timeout_s)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class JudgeClient:
    """Requests to one endpoint.

    Args:
        endpoint: where to ask.
        on_retry: is told why a request is tried again.
        sleep: waits; for tests.

    Raises:
        ConfigError: httpx is not installed.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        on_retry: Callable[[str], None] = lambda _: None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ):
        if httpx is None:
            raise ConfigError(
                'a judge needs the extra judge; install it with: pip install "qlora-jax[judge]"'
            )
        self._endpoint, self._on_retry, self._sleep = endpoint, on_retry, sleep
        self._stopping = False
        headers = {} if endpoint.key is None else {"authorization": f"Bearer {endpoint.key}"}
        self._http = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(endpoint.timeout_s, connect=_CONNECT_S),
            limits=httpx.Limits(max_connections=None),
            # A proxy could not reach this machine.
            trust_env=not _is_loopback(urllib.parse.urlsplit(endpoint.url).hostname),
        )

    async def __aenter__(self) -> JudgeClient:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._http.aclose()

    def stop(self) -> None:
        """From now on nothing is tried again; what is under way may end."""
        self._stopping = True

    async def ask(self, body: Mapping[str, Any]) -> JudgeReply:
        """Sends a request for a chat completion.

        Args:
            body: as the endpoint wants it.

        Raises:
            EvaluationError: it was refused, or has failed too often.
        """
        pause = _FIRST_PAUSE_S
        for attempt in range(1, self._endpoint.attempts + 1):
            try:
                return await self._ask_once(body)
            except _Transient as fault:
                least = fault.retry_after_s
                if attempt == self._endpoint.attempts or self._stopping:
                    raise EvaluationError(
                        f"{self._endpoint.url} failed {attempt} times in a row, at last with: "
                        f"{fault}"
                    ) from None
                if least > _LONGEST_RETRY_AFTER_S:
                    raise EvaluationError(
                        f"{self._endpoint.url} asks to wait for {least:.0f} s ({fault})"
                    ) from None
                self._on_retry(str(fault))
            # Behind what the server asks for, too: all clients were told the same.
            await self._sleep(least + pause * random.uniform(0.5, 1))
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        raise AssertionError("at least one attempt is made")

    async def _ask_once(self, body: Mapping[str, Any]) -> JudgeReply:
        try:
            # httpx's limits are for each wait on the socket; a reply that drips has one, too.
            async with asyncio.timeout(self._endpoint.timeout_s):
                response = await self._http.post(
                    f"{self._endpoint.url}/chat/completions", json=dict(body)
                )
        except (httpx.TimeoutException, TimeoutError):
            raise _Transient(f"no reply in {self._endpoint.timeout_s:g} s") from None
        except httpx.TransportError as error:
            reason = self._endpoint.clean(str(error)) or type(error).__name__
            raise _Transient(f"the connection failed ({reason})") from None
        if response.status_code == 200:
            return self._read(response)
        code, message = self._read_error(response)
        said = f"HTTP {response.status_code}" + (f", {message}" if message else "")
        if "context_length" in code or "context length" in message.lower():
            return JudgeReply("", "too_long")
        retried = response.status_code in _TRANSIENT or response.status_code >= 500
        if retried and code not in _NO_USE_TO_RETRY:
            raise _Transient(said, _retry_after(response.headers.get("retry-after")))
        raise EvaluationError(f"{self._endpoint.url} refused the request: {said}")

    def _read(self, response: httpx.Response) -> JudgeReply:
        try:
            body = response.json()
            choice = body["choices"][0]
            text = choice["message"]["content"]
            if not isinstance(text, str | None):
                raise TypeError
            usage = body.get("usage")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise _Transient("a reply that is no chat completion") from None
        usage = usage if isinstance(usage, dict) else {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        counts = [count if isinstance(count, int) and count >= 0 else None for count in counts]
        reason = self._endpoint.clean(str(choice.get("finish_reason") or "stop"))
        return JudgeReply(self._endpoint.clean(text or ""), reason, *counts)

    def _read_error(self, response: httpx.Response) -> tuple[str, str]:
        """The code and the first 200 characters of the message, without the key."""
        try:
            error = response.json()["error"]
            code, message = str(error.get("code") or ""), str(error.get("message") or "")
        except (ValueError, KeyError, TypeError, AttributeError):
            code, message = "", " ".join(response.text.split())
        return code, self._endpoint.clean(message)[:200]


class _Transient(Exception):
    """What can go better the next time."""

    def __init__(self, message: str, retry_after_s: float = 0.0):
        super().__init__(message)
        self.retry_after_s = retry_after_s


def _retry_after(value: str | None) -> float:
    """Seconds to wait, of a header that holds seconds or a date; 0 where it holds neither.

    >>> _retry_after("1.5"), _retry_after("soon"), _retry_after("-3")
    (1.5, 0.0, 0.0)
    """
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            until = email.utils.parsedate_to_datetime(value)
        except ValueError:
            return 0.0
        now = datetime.datetime.now(until.tzinfo)
        seconds = (until - now).total_seconds()
    return max(0.0, seconds) if seconds == seconds else 0.0
