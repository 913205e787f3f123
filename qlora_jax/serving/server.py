"""Runs the application on a socket until SIGTERM or Ctrl-C, and lets what is under way end.

The socket is bound before a model is loaded: a port that is taken is said at once. On SIGTERM no
new connection is taken, `/health` says that the server is stopping, replies under way have
`GRACE_S` seconds to end, and what is left is cancelled. The process then ends with code 0.
"""

import os
import signal
import socket

import uvicorn
from starlette.types import ASGIApp

from qlora_jax.errors import ConfigError
from qlora_jax.serving.guard import Access, is_loopback
from qlora_jax.serving.service import Service

TOKEN_VARIABLE = "QLORA_JAX_TOKEN"
GRACE_S = 20
_SHORTEST_TOKEN = 16
_KEEP_ALIVE_S = 15


def read_access(host: str, names: list[str], environment: dict[str, str] | None = None) -> Access:
    """Who may speak to a server at an address.

    Args:
        host: the address to bind.
        names: more names that clients may call it by.
        environment: where the token is, `os.environ` if None. It is never a flag: command lines
            are seen by every user of a machine.

    Returns:
        The rules.

    Raises:
        ConfigError: others can reach the address and there is no token, or it is easily guessed.

    >>> read_access("0.0.0.0", [], {})
    Traceback (most recent call last):
    qlora_jax.errors.ConfigError: --host=0.0.0.0 can be reached from other machines: ...
    """
    token = (os.environ if environment is None else environment).get(TOKEN_VARIABLE)
    local = is_loopback(host)
    hint = f'for example: export {TOKEN_VARIABLE}="$(openssl rand -hex 24)"'
    if token is None and not local:
        raise ConfigError(
            f"--host={host} can be reached from other machines: a token is needed, which clients "
            f"send as 'Authorization: Bearer …'. Put one into the environment, {hint}"
        )
    if token is not None and (len(token) < _SHORTEST_TOKEN or not token.isascii()):
        raise ConfigError(
            f"{TOKEN_VARIABLE} needs at least {_SHORTEST_TOKEN} ASCII characters, {hint}"
        )
    return Access(local=local, token=token, names=frozenset(name.lower() for name in names))


def bind(host: str, port: int) -> socket.socket:
    """Binds a TCP socket.

    Args:
        host: an address or name.
        port: 0 takes any that is free.

    Returns:
        The socket.

    Raises:
        ConfigError: the address is not of this machine, or the port is taken.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {host} port {port}: {error.strerror}; choose others with --host and "
            "--port (0 takes any free port)"
        ) from None
    return bound


def url(bound: socket.socket) -> str:
    """The address of a bound socket, to be opened in a browser."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn's server, which tells the service when it begins to stop."""

    def __init__(self, app: ASGIApp, service: Service, *, connections: int = 256):
        """Prepares a server.

        Args:
            app: of `create_app`.
            service: the same as the application's.
            connections: how many may be open at once; more get 503.
        """
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                lifespan="on",
                ws="none",
                limit_concurrency=connections,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=GRACE_S,
            )
        )
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Lets what is under way end."""
        self._service.draining = True
        await super().shutdown(sockets)


def run(server: Server, bound: socket.socket) -> None:
    """Serves until a signal comes.

    Args:
        server: not yet started.
        bound: of `bind`.
    """
    # uvicorn raises the signal again when all is done; then the end is an orderly one.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server.run(sockets=[bound])
