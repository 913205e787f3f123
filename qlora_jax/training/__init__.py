"""Fine-tuning: one compiled step, and a whole run around it.

The step alone, for an own loop: `make_train_step`, `init_state`, `evaluate_loss` (step.py). A run
from a configuration: `train` (run.py); what it left: `load_trained`. The other files are the parts
of a run: building the model, its data, the loop, the work directory, the model card.
"""

from qlora_jax.training.building import choose_compute_dtype as choose_compute_dtype
from qlora_jax.training.result import TrainResult as TrainResult
from qlora_jax.training.run import train as train
from qlora_jax.training.step import TrainState as TrainState
from qlora_jax.training.step import compile_step as compile_step
from qlora_jax.training.step import evaluate_loss as evaluate_loss
from qlora_jax.training.step import init_state as init_state
from qlora_jax.training.step import make_train_step as make_train_step
from qlora_jax.training.step import next_token_loss as next_token_loss
from qlora_jax.training.trained import load_trained as load_trained
