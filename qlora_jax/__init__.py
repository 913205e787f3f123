"""QLoRA for JAX and Flax: a frozen 4-bit base, LoRA adapters as the only trainable pytree.

    import qlora_jax as ql

The 4-bit operations on bare arrays are in `pallas_kernels`.
"""

# Any array, any pytree
from qlora_jax.quantized import QuantizedTensor as QuantizedTensor
from qlora_jax.quantized import dequantize as dequantize
from qlora_jax.quantized import matmul as matmul
from qlora_jax.quantized import quantize as quantize
from qlora_jax.quantized import quantize_params as quantize_params

# LoRA as pure functions
from qlora_jax.lora import MergeError as MergeError
from qlora_jax.lora_init import init_lora as init_lora
from qlora_jax.weight_inits import init_from_weight as init_from_weight
from qlora_jax.weight_inits import subtract as subtract
from qlora_jax.lora import lora_matmul as lora_matmul
from qlora_jax.lora import lora_scaling as lora_scaling
from qlora_jax.lora import merge_lora as merge_lora

# Any Flax NNX model (Flax Linen: qlora_jax.flax_linen)
from qlora_jax.flax_nnx import QLoRALinear as QLoRALinear
from qlora_jax.flax_nnx import QuantizedParam as QuantizedParam
from qlora_jax.flax_nnx import apply_qlora as apply_qlora
from qlora_jax.linear_layers import linear_paths as linear_paths
from qlora_jax.flax_nnx import merge_model as merge_model
from qlora_jax.flax_nnx import quantize_model as quantize_model
from qlora_jax.flax_nnx import set_dropout_keys as set_dropout_keys
from qlora_jax.flax_nnx import without_adapters as without_adapters
from qlora_jax.vocabulary import quantize_vocabulary as quantize_vocabulary

# Optimizers (the rest is optax)
from qlora_jax.optim import adamw8bit as adamw8bit
from qlora_jax.optim import paged as paged

# A whole run
from qlora_jax.config import get_config as get_config
from qlora_jax.config import load_config as load_config
from qlora_jax.estimating import estimate as estimate
from qlora_jax.export import export_merged as export_merged
from qlora_jax.generation import Engine as Engine
from qlora_jax.generation import generate as generate
from qlora_jax.generation import stream as stream
from qlora_jax.loading import load_model as load_model
from qlora_jax.packed_checkpoint import quantize_checkpoint as quantize_checkpoint
from qlora_jax.peft import load_adapter as load_adapter
from qlora_jax.peft import save_adapter as save_adapter
from qlora_jax.planning import Plan as Plan
from qlora_jax.planning import plan as plan
from qlora_jax.training import TrainResult as TrainResult
from qlora_jax.training import load_trained as load_trained
from qlora_jax.training import train as train

# Talk to it (a server: qlora_jax.serving)
from qlora_jax.chat import Chat as Chat
from qlora_jax.chat_models import load_engine as load_engine

# Which model is better, by judges' verdicts
from qlora_jax.evaluation import bradley_terry as bradley_terry
from qlora_jax.evaluation import compare_raters as compare_raters
from qlora_jax.evaluation import elo_ratings as elo_ratings
from qlora_jax.evaluation import read_ratings as read_ratings

# What goes wrong by the user's hand
from qlora_jax.errors import UserError as UserError
