"""An endpoint on 127.0.0.1 that says what a test wants it to say."""

import contextlib
import http.server
import json
import threading
import time


def completion(text, finish_reason="stop", usage=(100, 10)):
    """A status and a body as OpenAI's API sends them."""
    body = {"choices": [{"message": {"content": text}, "finish_reason": finish_reason}]}
    if usage:
        body["usage"] = dict(zip(("prompt_tokens", "completion_tokens"), usage, strict=True))
    return 200, body


def failure(status, message="no", code=None, **headers):
    """A status, a body and headers as OpenAI's API sends them."""
    return status, {"error": {"message": message, "code": code}}, headers


class StubJudge:
    """What it was asked, and what it answers.

    Attributes:
        answer: gives, for the number of a call (from 0) and its body, what `completion` or
            `failure` give; or bytes, sent as they are with status 200; or seconds to wait before
            the line is dropped.
        bodies: of all calls.
        headers: of all calls, their names in small letters.
        most: calls that were under way at a time.
    """

    def __init__(self, answer):
        self.answer = answer
        self.bodies, self.headers = [], []
        self.url = ""
        self.active = self.most = 0
        self.lock = threading.Lock()

    def handle(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        with self.lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.headers.append({k.lower(): v for k, v in handler.headers.items()})
            self.active += 1
            self.most = max(self.most, self.active)
        try:
            assert handler.path == "/v1/chat/completions"
            answer = self.answer(number, body)
        finally:
            with self.lock:
                self.active -= 1
        if isinstance(answer, float):
            time.sleep(answer)
            handler.close_connection = True
            return
        if isinstance(answer, bytes):
            status, content, headers = 200, answer, {}
        else:
            status, content, *headers = answer
            content = json.dumps(content).encode()
            headers = headers[0] if headers else {}
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("content-length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)


@contextlib.contextmanager
def judging(answer):
    """Serves; gives the judge."""
    judge = StubJudge(answer)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            # A client that has gone is no fault of the judge.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                judge.handle(self)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=[0.01], daemon=True)
    thread.start()
    judge.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)
