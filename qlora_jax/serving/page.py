"""The files of the page, as they lie in the package: read once, served from memory.

There is no path to join and so none to climb: a request either has exactly one of these paths, or
gets 404.
"""

import hashlib
import importlib.resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}


def page_routes() -> list[Route]:
    """A route for each file: `index.html` at `/`, every other at its own name."""
    folder = importlib.resources.files("qlora_jax.serving") / "page"
    files = [file for file in folder.iterdir() if file.name.rpartition(".")[2] in _TYPES]
    return [_route(file.name, file.read_bytes()) for file in files]


def _route(name: str, content: bytes) -> Route:
    # A new version of the package is seen at once, and the same one is not sent twice.
    headers = {
        "etag": f'"{hashlib.sha256(content).hexdigest()[:16]}"',
        "cache-control": "no-cache",
    }
    media_type = _TYPES[name.rpartition(".")[2]]

    async def endpoint(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["etag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    return Route("/" if name == "index.html" else f"/{name}", endpoint, methods=["GET"])
