"""The peak of memory while a model is merged, written and measured, as the loader's is tested."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from synthetic_checkpoint import CONFIG, hf_shapes, write_checkpoint

# Prints the peak, and the bytes of the model with its adapters. As in test_loading, the peak
# includes the interpreter and all libraries, but not what the `cuda` extra adds.
MEASURE = """
import pathlib, sys, types
sys.modules["triton"] = sys.modules["jax_triton"] = None
sys.modules["jax_plugins"] = types.ModuleType("jax_plugins")
sys.modules["jax_plugins"].__path__ = []
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from qlora_jax.divergence import compare, predict, predict_in_memory
from qlora_jax.flax_nnx import apply_qlora
from qlora_jax.loading import load_model
from qlora_jax.merged_files import write_hf_folder
from qlora_jax.merging import MergedCheckpoint
from qlora_jax.metrics import host_memory
from qlora_jax.streaming import StreamedModel
from qlora_jax.weights import open_checkpoint
base, out = map(pathlib.Path, sys.argv[1:])
model, tokenizer = load_model(base, dtype=jnp.bfloat16)
model = apply_qlora(model, rank=4, quant_type=None, rngs=nnx.Rngs(0))
held = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
merged = MergedCheckpoint(model, open_checkpoint(base), dtype=jnp.bfloat16)
write_hf_folder(merged, out, tokenizer, file_bytes=500_000_000)
ids = np.arange(32, dtype=np.int32).reshape(1, 32)
batch = dict(tokens=ids, loss_mask=ids * 0 + 1, segment_ids=ids * 0 + 1, positions=ids)
adapted = predict_in_memory(model, [batch])
streamed = StreamedModel(open_checkpoint(out), jnp.bfloat16)
figures = compare(adapted, predict(streamed.model, streamed.hidden_states, [batch]))
print(host_memory()[1], held, figures.kl)
"""


@pytest.mark.slow
def test_peak_memory_of_merging_a_large_model(tmp_path):
    """The 4-bit model; embedding, head and a layer of the merged one; two tensors; Python, JAX."""
    config = CONFIG | dict(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=64,
    )
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    try:
        total = write_checkpoint(base, config, shard_bytes=500_000_000)
        sizes = {name: 2 * int(np.prod(shape)) for name, shape in hf_shapes(config).items()}
        layer = sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))
        vocabulary = sizes["model.embed_tokens.weight"] + sizes["lm_head.weight"]
        largest = max(sizes.values())
        run = subprocess.run(
            [sys.executable, "-c", MEASURE, str(base), str(out)],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            cwd=pathlib.Path(__file__).parents[1],
            check=True,
            capture_output=True,
            text=True,
        )
        peak, held, kl = map(float, run.stdout.split())
        over = peak - held - layer - vocabulary - 2 * largest
        print(f"{total=:,} {held=:,.0f} {layer=:,} {vocabulary=:,} {peak=:,.0f} {over=:,.0f}")
        assert kl < 1e-2
        assert peak < total and over < 600e6
    finally:
        for file in tmp_path.rglob("*.safetensors"):
            file.unlink()
