"""What the server does not do, for whom, and how much of it: each limit is tried."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from running_server import client, running, wait_until

from qlora_jax import serving
from qlora_jax.errors import ConfigError
from qlora_jax.serving.server import TOKEN_VARIABLE

TOKEN = "correct-horse-battery-staple"
ASK = {"prompt": "x", "max_tokens": 1}


@pytest.fixture(scope="module")
def url():
    limits = serving.Limits(body_bytes=2000, body_s=0.3)
    with running(limits=limits) as (url, _):
        yield url


@pytest.fixture
def http(url):
    with client(url) as http:
        yield http


@pytest.fixture(scope="module")
def guarded():
    access = serving.Access(local=False, token=TOKEN, names=frozenset({"box.example"}))
    with running(access=access) as (url, _), client(url) as http:
        yield http


def raw(url, request):
    """Sends bytes as they are, and returns what comes back."""
    with socket.create_connection(url[7:].split(":"), timeout=10) as connection:
        connection.sendall(request)
        answer = b""
        while part := connection.recv(65536):
            answer += part
        return answer


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.nip.example", "10.0.0.7", "a@localhost"]
)
@pytest.mark.parametrize("path", ["/", "/v1/models", "/v1/completions", "/health"])
def test_a_rebound_name_is_not_answered(http, host, path):
    response = http.get(path, headers={"host": host})
    assert (response.status_code, response.json()["error"]["code"]) == (421, "host_not_allowed")


def test_two_hosts_or_none_are_not_answered(url):
    answer = raw(url, b"GET / HTTP/1.0\r\n\r\n")
    assert b" 421 " in answer.split(b"\r\n")[0]
    twice = b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
    assert raw(url, twice).split(b"\r\n")[0].split(b" ")[1] in (b"400", b"421")


@pytest.mark.parametrize(
    "host", ["localhost:{}", "127.0.0.1:{}", "[::1]:{}", "LOCALHOST", "127.0.0.2:{}"]
)
def test_names_of_this_machine_are(http, host):
    host = host.format(http.base_url.port)
    assert http.get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:1", "file://"])
def test_pages_of_others_may_not_use_it(http, origin):
    response = http.post("/v1/completions", json=ASK, headers={"origin": origin})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "origin_not_allowed")
    preflight = {"origin": origin, "access-control-request-method": "POST"}
    response = http.options("/v1/completions", headers=preflight)
    assert response.status_code == 403
    assert not any(name.startswith("access-control") for name in response.headers)


def test_its_own_page_may(url, http):
    assert http.post("/v1/completions", json=ASK, headers={"origin": url}).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "json"])
def test_only_json_is_taken(http, kind):
    headers = {"content-type": kind} if kind else {}
    response = http.post("/v1/completions", content=json.dumps(ASK), headers=headers)
    assert response.status_code == 415


def test_uploads_have_no_address(http):
    response = http.post("/v1/completions", files={"file": b"x"})
    assert response.status_code == 415
    assert http.put("/v1/models", json={}).status_code == 405
    assert http.post("/v1/files", json={}).status_code == 404


@pytest.mark.parametrize(
    "path", ["/../setup.cfg", "/%2e%2e/app.py", "/page/index.html", "/v1/models/tiny", "//app.js"]
)
def test_paths_lead_nowhere_else(url, path):
    host = url[7:]
    request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    assert b" 404 " in raw(url, request.encode()).split(b"\r\n")[0]


@pytest.mark.parametrize("path", ["/", "/health", "/nothing", "/v1/models"])
def test_every_answer_has_the_headers(http, path):
    headers = http.get(path).headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert "server" not in headers


def test_errors_have_the_headers_too(http):
    response = http.get("/", headers={"host": "evil.example"})
    assert "default-src 'none'" in response.headers["content-security-policy"]


def test_a_long_body_is_refused_by_its_length_and_while_it_comes(url, http):
    long = {"prompt": "x" * 3000}
    response = http.post("/v1/completions", json=long)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")

    def pieces():
        yield b'{"prompt": "'
        for _ in range(30):
            yield b"x" * 100
        yield b'"}'

    headers = {"content-type": "application/json"}
    response = http.post("/v1/completions", content=pieces(), headers=headers)
    assert response.status_code == 413


def test_a_body_that_does_not_come_is_not_waited_for(url):
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {url[7:]}\r\nConnection: close\r\n"
        "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    )
    started = time.monotonic()
    assert b" 408 " in raw(url, head.encode()).split(b"\r\n")[0]
    assert time.monotonic() - started < 5


def test_more_connections_than_allowed_are_refused():
    with running(connections=3) as (url, _):
        address = url[7:].split(":")
        open_ones = [socket.create_connection(address) for _ in range(3)]
        request = f"GET /health HTTP/1.1\r\nHost: {url[7:]}\r\nConnection: close\r\n\r\n".encode()
        assert b" 503 " in raw(url, request).split(b"\r\n")[0]
        for connection in open_ones:
            connection.close()
        wait_until(lambda: b" 200 " in raw(url, request).split(b"\r\n")[0])


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/v1/completions", "/nothing"])
@pytest.mark.parametrize("given", [None, "Bearer wrong", "Bearer", f"Basic {TOKEN}", "Bearer \xff"])
def test_without_the_token_there_is_nothing(guarded, path, given):
    headers = {} if given is None else {"authorization": given.encode("latin-1")}
    response = guarded.get(path, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer" and TOKEN not in response.text


def test_a_token_in_the_address_is_none(guarded):
    assert guarded.get(f"/v1/models?token={TOKEN}").status_code == 401


def test_with_the_token_there_is_everything(guarded):
    headers = {"authorization": f"Bearer {TOKEN}"}
    assert guarded.get("/v1/models", headers=headers).status_code == 200
    assert guarded.post("/v1/completions", json=ASK, headers=headers).status_code == 200


def test_the_page_and_the_health_need_no_token(guarded):
    assert guarded.get("/").status_code == guarded.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("host", "status"), [("10.0.0.7", 200), ("box.example:80", 200), ("evil.example", 421)]
)
def test_bound_to_the_network_digits_and_given_names_are_answered(guarded, host, status):
    assert guarded.get("/health", headers={"host": host}).status_code == status


@pytest.mark.parametrize(
    ("host", "token", "message"),
    [
        ("0.0.0.0", None, "can be reached from other machines: a token is needed"),
        ("192.168.1.5", None, "a token is needed"),
        ("::", None, "a token is needed"),
        ("0.0.0.0", "short", "at least 16"),
        ("127.0.0.1", "short", "at least 16"),
    ],
)
def test_the_network_needs_a_token(host, token, message):
    environment = {} if token is None else {TOKEN_VARIABLE: token}
    with pytest.raises(ConfigError, match=message) as error:
        serving.read_access(host, [], environment)
    assert "short" not in str(error.value)


def test_the_token_is_in_no_representation():
    access = serving.read_access("0.0.0.0", ["Box.Example"], {TOKEN_VARIABLE: TOKEN})
    assert access.token == TOKEN and TOKEN not in repr(access)
    assert access.names == {"box.example"}


def test_a_port_that_is_taken_is_said(url):
    with pytest.raises(ConfigError, match=r"cannot listen at 127.0.0.1 port \d+: Address already"):
        serving.bind("127.0.0.1", int(url.rpartition(":")[2])).listen()


def test_sigterm_lets_a_reply_end_and_takes_no_other():
    program = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from fake_engine import FakeEngine\n"
        "from qlora_jax import serving\n"
        "engine = FakeEngine(step_s=0.05)\n"
        "service = serving.Service(engine, engine.tokenizer, base_name='tiny')\n"
        "bound = serving.bind('127.0.0.1', 0)\n"
        "print(serving.url(bound), flush=True)\n"
        "serving.run(serving.Server(serving.create_app(service), service), bound)\n"
    )
    environment = {**os.environ, TOKEN_VARIABLE: TOKEN}
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    )
    url = process.stdout.readline().strip()
    with client(url) as http:
        for _ in range(200):
            if process.poll() is None and _is_up(url):
                break
            time.sleep(0.05)
        ask = {**ASK, "max_tokens": 14, "stream": True, "temperature": 0}
        with http.stream("POST", "/v1/completions", json=ask) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and '"finish_reason":"stop"' in rest[-2]
    _, log = process.communicate(timeout=20)
    assert process.returncode == 0
    assert TOKEN not in log and "Traceback" not in log
    with pytest.raises(OSError):
        socket.create_connection(url[7:].split(":"), timeout=1)


def _is_up(url):
    try:
        socket.create_connection(url[7:].split(":"), timeout=1).close()
    except OSError:
        return False
    return True
