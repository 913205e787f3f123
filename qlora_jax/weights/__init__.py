"""Model files read one tensor at a time: safetensors and GGUF.

* `open_checkpoint(path)`: a `Checkpoint` for a Hugging Face folder or a GGUF file
* `Checkpoint`: its configuration, names and shapes, and `read(name)`
* `Slot`: where one tensor goes in the model
"""

from qlora_jax.weights.checkpoint import Checkpoint, open_checkpoint
from qlora_jax.weights.names import Slot

__all__ = ["Checkpoint", "Slot", "open_checkpoint"]
