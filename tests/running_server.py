"""A real server on a real socket, in a thread of the test's process."""

import contextlib
import threading
import time

import httpx
from fake_engine import FakeEngine

from qlora_jax import serving


@contextlib.contextmanager
def running(
    engine=None, *, access=None, limits=None, votes=None, stored=(), draw=None, connections=256
):
    """Serves a fake engine; gives the address, and the service."""
    engine = engine or FakeEngine()
    service = serving.Service(engine, engine.tokenizer, base_name="tiny", limits=limits)
    chance = {} if draw is None else {"draw": draw}
    game = votes and serving.Game(service, serving.Votes(votes), stored, **chance)
    bound = serving.bind("127.0.0.1", 0)
    app = serving.create_app(service, access=access, game=game)
    server = serving.Server(app, service, connections=connections)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
        assert thread.is_alive()
    try:
        yield serving.url(bound), service
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()


def client(url, **options):
    """A client for it that never asks a proxy."""
    return httpx.Client(base_url=url, trust_env=False, timeout=20, **options)


def wait_until(condition, seconds=10.0):
    """Waits for what another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
