"""What stands between the network and the application: who may speak to it, and what a page may do.

A server on 127.0.0.1 is reachable by every web page that its user opens. Three checks keep those
out, before any route is looked up:

- **Host.** A page of an attacker whose name is made to resolve to 127.0.0.1 (DNS rebinding) is of
  the same origin as this server, to the browser. What gives it away is its name in `Host`: only
  names for this machine are taken. An address in digits cannot be rebound.
- **Origin.** A browser sends it with whatever a page sends by script; it must be this server's own.
- **Content-Type.** What is sent must be JSON, which a page of another origin may not send without
  asking first (a preflight), and that is refused.

A token, where there is one, is compared in constant time and asked for everywhere but for the page
itself, which holds no secret, and `/health`. The headers keep the page's scripts to this server's
files, and the page out of others' frames.
"""

import dataclasses
import hmac
import ipaddress
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qlora_jax.serving.errors import ApiError

_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_CSP = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # no text can become markup, by mistake either
        "trusted-types 'none'",
    ]
)
SECURITY_HEADERS = {
    "content-security-policy": _CSP,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


def is_loopback(host: str) -> bool:
    """Whether an address to bind can be reached from this machine only.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclasses.dataclass(frozen=True)
class Access:
    """Who may speak to the server.

    Attributes:
        local: whether it is bound to a loopback address.
        token: what clients have to send as `Authorization: Bearer …`; None: nothing.
        names: more names that `Host` may have.
    """

    local: bool = True
    token: str | None = dataclasses.field(default=None, repr=False)
    names: frozenset[str] = frozenset()

    def check(self, method: str, path: str, headers: Headers, *, is_open: bool) -> None:
        """Raises ApiError unless a request may pass.

        Args:
            method: of HTTP.
            path: of the request.
            headers: of the request.
            is_open: whether the path is given to those without the token, too.
        """
        hosts = headers.getlist("host")
        name = _host_name(hosts[0]) if len(hosts) == 1 else None
        if name is None or not self._knows(name):
            raise ApiError(
                421,
                "this server does not answer to that Host; use http://127.0.0.1 or http://localhost"
                " with its port, or start it with --allowed_host=NAME",
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != hosts[0].lower():
            raise ApiError(
                403, "pages of another origin may not use this server", code="origin_not_allowed"
            )
        if self.token is not None and not is_open:
            self._check_token(headers.get("authorization", ""))
        if method == "POST":
            _check_json(headers.get("content-type", ""))

    def _knows(self, name: str) -> bool:
        if name in self.names or name in _LOOPBACK_NAMES:
            return True
        return is_loopback(name) if self.local else _is_address(name)

    def _check_token(self, authorization: str) -> None:
        scheme, _, given = authorization.partition(" ")
        same = hmac.compare_digest(given.strip().encode(), self.token.encode())
        if scheme.lower() != "bearer" or not same:
            raise ApiError(
                401,
                "a token is needed: send it as 'Authorization: Bearer …' (api_key of an OpenAI "
                "client)",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )


def _host_name(host: str) -> str | None:
    """The name in a Host header, without the port; None if it is not one.

    >>> _host_name("LOCALHOST:8000"), _host_name("[::1]:8000"), _host_name("a@b"), _host_name("")
    ('localhost', '::1', None, None)
    """
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port  # raises where it is not a number
    except ValueError:
        return None
    return parts.hostname if host and parts.netloc == host and "@" not in host else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _check_json(content_type: str) -> None:
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(
            415,
            f"Content-Type must be application/json, got {content_type[:80]!r}",
            code="unsupported_media_type",
        )


class Guard:
    """ASGI middleware that applies an `Access`, and puts the headers on every answer."""

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        open_paths: frozenset[str],
        count: Callable[[int, str], None] = lambda status, path: None,
    ):
        """Wraps an application.

        Args:
            app: what is protected.
            access: who may speak to it.
            open_paths: what is given without the token.
            count: is told the status and path of every answer.
        """
        self.app = app
        self.access = access
        self.open_paths = open_paths
        self.count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers it with an error."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # no websockets here
            await send({"type": "websocket.close", "code": 1008})
            return

        path, method = scope["path"], scope["method"]

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(SECURITY_HEADERS)
                headers.setdefault("cache-control", "no-store")
                self.count(message["status"], path)
            await send(message)

        try:
            headers = Headers(scope=scope)
            self.access.check(method, path, headers, is_open=path in self.open_paths)
        except ApiError as error:
            await error.response()(scope, receive, send_with_headers)
            return
        await self.app(scope, receive, send_with_headers)
