"""Training on a packed checkpoint: the same run as on the model it was made from."""

import pathlib
import shutil

import jax
import numpy as np
import pytest
import tiny_run

from qlora_jax import training
from qlora_jax.errors import ConfigError, TrainingError, WeightsError
from qlora_jax.packed_checkpoint import quantize_checkpoint
from qlora_jax.training.building import build_model, split_model


def train(config, workdir):
    report, _ = tiny_run.quiet_report()
    return training.train(config, workdir, report=report)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    model = tiny_run.write_model(folder / "model")
    config = tiny_run.tiny_config(model, tiny_run.write_data(folder / "data.jsonl"))
    quantize_checkpoint(model, folder / "ours", block_size=32)
    quantize_checkpoint(model, folder / "bnb", block_size=32, format="bitsandbytes")
    config.train.steps = 3
    train(config, folder / "begun")
    config.train.steps = 6
    return folder, config


def adapters(workdir):
    model, _ = training.load_trained(workdir)
    return jax.tree.leaves(split_model(model)[1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ours", "bnb"])
def test_a_run_goes_on_with_the_packed_model_bit_by_bit(material, tmp_path, kind):
    folder, config = material
    for name in ("model", kind):
        shutil.copytree(folder / "begun", tmp_path / name)
        config = config.copy_and_resolve_references()
        config.model.path = str(folder / name)
        assert train(config, tmp_path / name).steps == 6
    for a, b in zip(adapters(tmp_path / kind), adapters(tmp_path / "model"), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_another_model_is_refused(material, tmp_path):
    folder, config = material
    shutil.copytree(folder / "begun", tmp_path / "run")
    other = tiny_run.write_model(tmp_path / "other", seed=1)
    config = config.copy_and_resolve_references()
    config.model.path = str(quantize_checkpoint(other, tmp_path / "packed", block_size=32))
    with pytest.raises(TrainingError, match="was trained with other content"):
        train(config, tmp_path / "run")


@pytest.mark.parametrize("kind", ["ours", "bnb"])
def test_a_configuration_of_another_format_is_told_the_flags(material, kind):
    folder, config = material
    config = config.copy_and_resolve_references()
    config.model.path, config.model.block_size = str(folder / kind), 64
    with pytest.raises(ConfigError) as caught:
        build_model(config, dtype=np.dtype(np.float32))
    flags = "--config.model.quant_type=nf4 --config.model.block_size=32 "
    assert flags + "--config.model.double_quant=true" in str(caught.value)


def test_layers_left_in_16_bits_stay_so(material, tmp_path):
    folder, config = material
    config = config.copy_and_resolve_references()
    out = tmp_path / "some"
    quantize_checkpoint(folder / "model", out, block_size=32, where="layers/mlp/.*")
    config.model.path = str(out)
    model, _, _ = build_model(config, dtype=np.dtype(np.float32))
    assert model.layers.mlp.up_proj.kernel.get_value().quant_type == "nf4"
    q_proj = model.layers.self_attn.q_proj
    assert q_proj.rank == 4 and q_proj.kernel.dtype == np.float32


def test_damage_is_found_by_the_fingerprint(material, tmp_path):
    folder, config = material
    damaged = shutil.copytree(folder / "ours", tmp_path / "damaged")
    (file,) = pathlib.Path(damaged).glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-3000] ^= 1
    file.write_bytes(content)
    config = config.copy_and_resolve_references()
    config.model.path = str(damaged)
    with pytest.raises(WeightsError, match="it is damaged. Quantize the original model again"):
        build_model(config, dtype=np.dtype(np.float32))
