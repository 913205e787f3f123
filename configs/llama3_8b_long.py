"""Llama-3.1-8B on one very long row: 256k tokens in 24 GB, or a million in 80 GB.

Which of them is said behind the colon; rtx4090 is the default:

    python scripts/plan.py --config=configs/llama3_8b_long.py:rtx4090 --device=rtx4090
    python scripts/plan.py --config=configs/llama3_8b_long.py:h100 --device=h100

    XLA_PYTHON_CLIENT_MEM_FRACTION=.95 XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB=80 \
        python scripts/train.py --config=configs/llama3_8b_long.py:rtx4090 --workdir=runs/long \
        --config.model.path=/models/Llama-3.1-8B --config.data.path=books.jsonl

| argument | tokens | card | its memory, planned | pinned memory of the host |
| --- | --- | --- | --- | --- |
| rtx4090 | 262,144 | RTX 4090, 24 GB | 19.3 GiB | 64 GiB |
| h100 | 1,048,576 | H100, 80 GB | 59.2 GiB | 256 GiB |

The inputs of the layers wait in the host's memory for the backward pass. XLA takes no more than
64 GB of it, and 75 % of the card's, unless the two variables say so (h100: LIMIT_GB=280). The
data are JSON lines with a long `text` each. Llama 3.1 was trained on up to 131,072 tokens.
"""

from qlora_jax import config as base
from qlora_jax.errors import ConfigError

# Tokens in a row, and how many of them a layer is computed for at a time.
_CARDS = {"rtx4090": (2**18, 4096), "h100": (2**20, 8192)}


def get_config(card: str = "rtx4090"):
    """Returns the base with one row a step, nothing that takes a place for each pair of tokens."""
    if card not in _CARDS:
        raise ConfigError(f"there is no recipe for {card!r}; give one of {', '.join(_CARDS)}")
    config = base.get_config()
    config.model.path = "meta-llama/Llama-3.1-8B"
    config.data.path = "books.jsonl"
    config.data.format = "text"
    config.data.train_on = "all"
    config.data.max_len, config.model.sequence_chunk = _CARDS[card]
    config.data.packing = False
    config.model.remat = "offload"
    config.lora.rank = 16
    config.train.grad_accum = 1
    config.train.log_every = 1
    # The held-out loss of one row takes a quarter of a step; a reply would read a whole row first.
    config.data.eval_fraction = 0.0
    config.sample.enabled = False
    return config
