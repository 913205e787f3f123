"""A Hugging Face Hub on this machine: the part of its HTTP interface that its client asks for."""

import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves repositories.

    Attributes:
        repositories: by `models/owner/name` or `datasets/owner/name`: the contents of the files by
            name, or the pair (status, error code) that every request is answered with.
        served: the names of files whose contents were sent.
    """

    def __init__(self, repositories):
        self.repositories, self.served = repositories, []

    @contextlib.contextmanager
    def running(self):
        """Yields the address of the server."""
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def _handler(self):
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_HEAD(self):
                self.answer(with_body=False)

            def do_GET(self):
                self.answer(with_body=True)

            def answer(self, with_body):
                status, headers, body = hub.answer(self.path, with_body)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if with_body:
                    self.wfile.write(body)

        return Handler

    def answer(self, path, with_body):
        """Status, headers and body for a path."""
        parts = urllib.parse.unquote(urllib.parse.urlsplit(path).path).strip("/").split("/")
        if api := parts[0] == "api":
            parts = parts[1:]
        if parts[0] not in ("models", "datasets"):
            parts = ["models", *parts]
        files = self.repositories.get("/".join(parts[:3]))
        if files is None:
            return 401, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if isinstance(files, tuple):
            return files[0], {"X-Error-Code": files[1]}, b"{}"
        revision = parts[4] if len(parts) > 4 else "main"
        if revision not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if api:
            return 200, {"Content-Type": "application/json"}, self.listing(parts, files)
        name = "/".join(parts[5:])
        if name not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
        if with_body:
            self.served.append(name)
        etag = hashlib.sha1(files[name]).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, files[name]

    def listing(self, parts, files):
        """A repository's description, or its tree."""
        if len(parts) > 3 and parts[3] == "tree":
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                for name, data in files.items()
            ]
            return json.dumps(tree).encode()
        siblings = [{"rfilename": name} for name in files]
        return json.dumps({"id": "x", "sha": COMMIT, "siblings": siblings, "tags": []}).encode()
