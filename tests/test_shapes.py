"""The built-in shapes against the parameters that the models' makers count."""

import pytest
from flax import nnx

from qlora_jax.models.llama import Llama
from qlora_jax.models.shapes import model_shape


def parameters(name: str, *, embeddings: bool) -> int:
    shape = model_shape(name)
    model = nnx.eval_shape(lambda: Llama(shape, rngs=nnx.Rngs(0)))
    sizes = {path: leaf.size for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    return sum(
        size
        for path, size in sizes.items()
        if embeddings or path[0] not in ("embed_tokens", "embed_positions", "lm_head")
    )


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # Gemma 2's report (arXiv 2408.00118), table 2
        ("google/gemma-2-2b", 2_024_517_888),
        ("google/gemma-2-9b", 8_324_201_984),
        ("google/gemma-2-27b", 26_047_480_320),
        # the model card of Pythia
        ("EleutherAI/pythia-70m", 18_915_328),
        ("EleutherAI/pythia-160m", 85_056_000),
        ("EleutherAI/pythia-410m", 302_311_424),
        ("EleutherAI/pythia-1b", 805_736_448),
        ("EleutherAI/pythia-1.4b", 1_208_602_624),
        ("EleutherAI/pythia-2.8b", 2_517_652_480),
        ("EleutherAI/pythia-6.9b", 6_444_163_072),
        ("EleutherAI/pythia-12b", 11_327_027_200),
    ],
)
def test_parameters_beside_the_embeddings_are_as_published(name, count):
    assert parameters(name, embeddings=False) == count


@pytest.mark.parametrize(
    ("name", "millions", "embeddings"),
    [
        # Gemma 3's report (arXiv 2503.19786), table 1, without embeddings
        ("google/gemma-3-1b-pt", 698, False),
        ("google/gemma-3-4b-pt", 3209, False),
        ("google/gemma-3-12b-pt", 10759, False),
        ("google/gemma-3-27b-pt", 25600, False),
        # parameters of the files on the Hugging Face Hub
        ("microsoft/Phi-3-mini-4k-instruct", 3821, True),
        ("microsoft/phi-4", 14660, True),
    ],
)
def test_parameters_in_millions_are_as_published(name, millions, embeddings):
    assert round(parameters(name, embeddings=embeddings) / 1e6) == millions


@pytest.mark.parametrize("size", ["125m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b"])
def test_opt_has_the_parameters_of_its_name(size):
    count, unit = parameters(f"facebook/opt-{size}", embeddings=True), size[-1]
    billions = float(size[:-1]) / (1000 if unit == "m" else 1)
    assert abs(count / 1e9 / billions - 1) < 0.02
