"""Guanaco-65B: LLaMA-65B on OASST1, as the authors of QLoRA trained it.

    python scripts/train.py --config=configs/guanaco_65b.py --workdir=runs/guanaco_65b

It takes 46.7 GiB of an A6000 (48 GB); 1.5 GiB of the optimizer's state then lies in
the host's memory. To see it compiled for one:

    python scripts/plan.py --config=configs/guanaco_65b.py --device=a6000
"""

from qlora_jax import config as base


def get_config():
    """Returns the base, which is the paper's recipe, with what is of this model and these data."""
    config = base.get_config()
    config.model.path = "huggyllama/llama-65b"
    config.model.compute_dtype = "bfloat16"
    config.lora.dropout = 0.05
    # Conversations with loss on both sides, one a row.
    config.data.name = "oasst1"
    config.data.packing = False
    config.data.group_by_length = True
    config.optimizer.learning_rate = 1e-4
    config.train.steps = 1875
    config.eval.every = 187
    return config
