"""FLAN-T5-XL (3B, encoder-decoder) on Alpaca: instruction and input to the encoder, loss on the
answer.

    python scripts/train.py --config=configs/flan_t5_xl.py --workdir=runs/flan_t5_xl

It takes 4.7 GiB: an RTX 4090 or another card of 24 GB. To see it compiled for one:

    python scripts/plan.py --config=configs/flan_t5_xl.py --device=rtx4090

The same with --config.model.path=google/flan-t5-xxl (11B) takes 11.9 GiB.
"""

from qlora_jax import config as base


def get_config():
    """Returns the base, which is the paper's recipe, with what is of this model and these data."""
    config = base.get_config()
    config.model.path = "google/flan-t5-xl"
    # What the model was trained in; float16 would work too, with its MLPs' output in float32.
    config.model.compute_dtype = "bfloat16"
    config.lora.dropout = 0.05
    config.data.name = "alpaca-clean"
    # The widths of the encoder's and of the decoder's rows.
    config.data.source_max_len = 384
    config.data.target_max_len = 256
    config.data.max_len = 640
    config.data.packing = False
    config.data.group_by_length = True
    config.train.batch_size = 4
    config.train.grad_accum = 4
    config.train.epochs = 3.0
    return config
