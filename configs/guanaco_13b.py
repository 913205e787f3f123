"""Guanaco-13B: LLaMA-13B on OASST1, as the authors of QLoRA trained it.

    python scripts/train.py --config=configs/guanaco_13b.py --workdir=runs/guanaco_13b

It takes 11.9 GiB: an RTX 3090 or another card of 24 GB. To see it compiled for one:

    python scripts/plan.py --config=configs/guanaco_13b.py --device=rtx3090
"""

from qlora_jax import config as base


def get_config():
    """Returns the base, which is the paper's recipe, with what is of this model and these data."""
    config = base.get_config()
    config.model.path = "huggyllama/llama-13b"
    config.model.compute_dtype = "bfloat16"
    config.lora.dropout = 0.05
    # Conversations with loss on both sides, one a row.
    config.data.name = "oasst1"
    config.data.packing = False
    config.data.group_by_length = True
    config.optimizer.learning_rate = 2e-4
    config.train.steps = 1875
    config.eval.every = 187
    return config
