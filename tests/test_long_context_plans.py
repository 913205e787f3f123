"""Long rows on a GPU: the recipe, and compiled plans."""

import json

import pytest
from cuda_wheels import needs_cuda_wheels
from tiny_run import REPOSITORY

from qlora_jax import config as config_lib
from qlora_jax import planning
from qlora_jax.errors import UserError
from qlora_jax.targets import attention_workspace, compile_for, find_target

GIB = 2**30
RECIPE = REPOSITORY / "configs" / "llama3_8b_long.py"


@pytest.mark.parametrize(
    ("card", "tokens"), [(None, 262144), ("rtx4090", 262144), ("h100", 1048576)]
)
def test_the_recipe(card, tokens):
    config = config_lib.load_config(RECIPE if card is None else f"{RECIPE}:{card}")
    config_lib.validate(config)
    assert config.data.max_len == tokens and config.lora.rank == 16
    assert config.train.batch_size == config.train.grad_accum == 1
    assert config.model.remat == "offload" and not config.data.packing


def test_the_recipe_of_an_unknown_card():
    with pytest.raises(UserError, match="t4.*rtx4090, h100"):
        config_lib.load_config(f"{RECIPE}:t4")


SMALL = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


def plan_small(tmp_path, **fields):
    """A small model on one row of 20480 tokens, compiled for an RTX 4090."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    config = config_lib.load_config(RECIPE)
    config.model.path, config.data.max_len, config.model.sequence_chunk = str(tmp_path), 20480, 2048
    config.update_from_flattened_dict(fields)
    target = find_target("rtx4090")
    run = planning.abstract_run(config, target)
    return compile_for(run.step, run.state, run.frozen, run.batch, target=target)


@needs_cuda_wheels
def test_a_long_row_on_a_gpu(tmp_path):
    """cuDNN's attention twice forward and once backward, no mask, layer inputs on the host."""
    row = 20480 * 256 * 2
    long = plan_small(tmp_path)
    assert "20480,20480]" not in long.text
    assert long.text.count('"__cudnn$fmhaSoftmax"') == 2
    assert long.text.count('"__cudnn$fmhaSoftmaxBackward"') == 1
    assert long.host_bytes == 3 * row
    # Six arrays like a row, and what the chunks hold.
    temporaries = long.memory_analysis().temp_size_in_bytes
    assert temporaries < 12 * row
    whole = plan_small(tmp_path, **{"model.sequence_chunk": 0, "model.remat": "full"})
    assert whole.host_bytes == 0 and "20480,20480]" not in whole.text
    assert whole.memory_analysis().temp_size_in_bytes > 1.5 * temporaries


@needs_cuda_wheels
@pytest.mark.slow
@pytest.mark.parametrize(("card", "gib", "host_gib"), [("rtx4090", 19.3, 64), ("h100", 59.2, 256)])
def test_the_recipe_fits_its_card_and_does_not_grow(card, gib, host_gib):
    """Llama-3.1-8B: 262144 tokens in 24 GB, 1048576 in 80 GB."""
    config = config_lib.load_config(f"{RECIPE}:{card}")
    plan = planning.plan(config, card, suggest=False)
    assert plan.fits
    assert plan.peak_bytes <= gib * GIB
    assert plan.host_bytes == host_gib * GIB


def test_attention_asks_cudnn_for_no_more_than_counted():
    """One key head of the H100 recipe: dQ in float32, dK and dV of four query heads, the sums."""
    tokens = 2**20
    call = (
        f"%bwd = (bf16[1,4,{tokens},128]{{3,1,2,0}}, bf16[1,1,{tokens},128]{{3,1,2,0}}, "
        f"bf16[1,1,{tokens},128]{{3,1,2,0}}, u8[0]{{0}}) custom-call(%a, %b), "
        'custom_call_target="__cudnn$fmhaSoftmaxBackward"'
    )
    expected = 4 * tokens * 128 * 4 + 2 * 4 * tokens * 128 * 2 + 4 * tokens * 4
    assert attention_workspace(call) == expected
    assert attention_workspace("ROOT %x = f32[] add(%a, %b)") == 0
