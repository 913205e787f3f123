"""Model files read one tensor at a time: safetensors (also in 4 bits) and GGUF.

* `open_checkpoint(path)`: a `Checkpoint` for a Hugging Face folder or a GGUF file
* `Checkpoint`: its configuration, names and shapes, and `read(name)`
* `PackedFormat`: how a weight is in 4 bits
* `StackedCheckpoint`: this project's own packed folder
* `Slot`: where one tensor goes in the model
"""

from qlora_jax.weights.checkpoint import Checkpoint, open_checkpoint
from qlora_jax.weights.names import Slot
from qlora_jax.weights.packed import PackedFormat
from qlora_jax.weights.stacked import StackedCheckpoint

__all__ = ["Checkpoint", "PackedFormat", "Slot", "StackedCheckpoint", "open_checkpoint"]
