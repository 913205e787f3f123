"""A server for a base and its adapters: OpenAI's API, a page to chat and compare, and a game.

service = Service(engine, tokenizer, base_name="llama")
run(Server(create_app(service), service), bind("127.0.0.1", 8000))
"""

from qlora_jax.serving.app import create_app as create_app
from qlora_jax.serving.game import Game as Game
from qlora_jax.serving.game import check_playable as check_playable
from qlora_jax.serving.guard import Access as Access
from qlora_jax.serving.scheduler import Scheduler as Scheduler
from qlora_jax.serving.server import Server as Server
from qlora_jax.serving.server import bind as bind
from qlora_jax.serving.server import read_access as read_access
from qlora_jax.serving.server import run as run
from qlora_jax.serving.server import url as url
from qlora_jax.serving.service import Limits as Limits
from qlora_jax.serving.service import Service as Service
from qlora_jax.serving.stored import read_stored as read_stored
from qlora_jax.serving.votes import Votes as Votes
