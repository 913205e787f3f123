"""Text from a model.

- `batches.generate`, `generate_ids`: a list of prompts, all replies at the end;
- `engine.Engine`: requests that come and go, replies that are shown while they grow;
- `streaming.stream`: one reply of an engine, piece by piece.
"""

from qlora_jax.generation.batches import encode_prompt as encode_prompt
from qlora_jax.generation.batches import generate as generate
from qlora_jax.generation.batches import generate_ids as generate_ids
from qlora_jax.generation.engine import Engine as Engine
from qlora_jax.generation.requests import Delta as Delta
from qlora_jax.generation.requests import Request as Request
from qlora_jax.generation.streaming import stream as stream
from qlora_jax.sampling import Sampling as Sampling
