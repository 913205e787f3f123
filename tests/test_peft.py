"""Adapters of PEFT: its logits and its very files, what is refused, and whole folders only."""

import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from llama_models import GOLDEN, golden_tiny, random_model, tiny_config
from tiny_run import quiet_report, write_data, write_model
from tiny_run import tiny_config as run_config

import qlora_jax as ql
from qlora_jax.errors import ConfigError, UserError, WeightsError
from qlora_jax.weights.peft_config import PeftConfig

ROOT = pathlib.Path(__file__).parents[1]
CASES = ("llama2", "llama3", "mistral", "qwen2", "qwen2_windowed", "qwen3")
DORA = ("dora_llama3", "dora_qwen3")
# Those whose layers of a projection are alike, so that PEFT's own bytes come back.
ALIKE = ("llama2", "llama3", "mistral", "qwen2", "dora_llama3")
LAYER = "base_model.model.model.layers.0.self_attn."


def tiny_base(case):
    return golden_tiny(case.removeprefix("dora_"))


def golden_folder(case):
    return GOLDEN / f"peft_{case}"


def test_all_golden_folders_are_used():
    used = [golden_folder(case) for case in CASES + DORA]
    # peft_t5 belongs to the tests of T5.
    assert sorted(GOLDEN.glob("peft_*")) == sorted([*used, GOLDEN / "peft_t5"])


@pytest.mark.parametrize("case", CASES + DORA)
def test_logits_are_those_of_peft(case):
    model, ids, _ = tiny_base(case)
    golden = np.load(golden_folder(case) / "logits.npz")
    adapted = ql.load_adapter(model, golden_folder(case))
    np.testing.assert_allclose(model(ids), golden["base"], atol=1e-4)
    np.testing.assert_allclose(adapted(ids), golden["adapted"], atol=1e-4)
    assert np.abs(golden["adapted"] - golden["base"]).max() > 1


@pytest.mark.parametrize("case", ALIKE)
def test_what_peft_wrote_comes_back_to_the_byte(case, tmp_path):
    adapted = ql.load_adapter(tiny_base(case)[0], golden_folder(case))
    out = ql.save_adapter(adapted, tmp_path / "out", base_model="owner/name")
    assert sorted(file.name for file in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    weights = (golden_folder(case) / "adapter_model.safetensors").read_bytes()
    assert (out / "adapter_model.safetensors").read_bytes() == weights
    theirs = PeftConfig.from_json(read_config(golden_folder(case)), golden_folder(case))
    ours = PeftConfig.from_json(read_config(out), out)
    for name in ("use_rslora", "use_dora", "dropout"):
        assert getattr(ours, name) == getattr(theirs, name)
    layers = [f"model.layers.{i}.self_attn.{x}_proj" for i in range(2) for x in "qkvo"]
    layers += [f"model.layers.{i}.mlp.{x}_proj" for i in range(2) for x in ("gate", "up", "down")]
    for name in [*layers, "lm_head"]:
        assert ours.targets(name) == theirs.targets(name), name
        if ours.targets(name):
            assert ours.rank_of(name) == theirs.rank_of(name), name
            assert ours.alpha_of(name) == theirs.alpha_of(name), name
    assert read_config(out)["base_model_name_or_path"] == "owner/name"


@pytest.mark.parametrize("case", CASES + DORA)
def test_out_and_in_again_is_the_same_to_the_byte(case, tmp_path):
    model, ids, _ = tiny_base(case)
    first = ql.load_adapter(model, golden_folder(case))
    a = ql.save_adapter(first, tmp_path / "a", base_model="x")
    second = ql.load_adapter(model, a)
    b = ql.save_adapter(second, tmp_path / "b", base_model="x")
    for file in a.iterdir():
        assert file.read_bytes() == (b / file.name).read_bytes()
    np.testing.assert_array_equal(first(ids), second(ids))


def read_config(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def test_the_config_that_is_written_whole(tmp_path):
    model = ql.apply_qlora(
        random_model(tiny_config()), where=".*/[qk]_proj", rank=4, alpha=8, rngs=nnx.Rngs(0)
    )
    model = ql.apply_qlora(
        model,
        where=".*/down_proj",
        rank=2,
        alpha=2.5,
        dropout=0.25,
        quant_type=None,
        rngs=nnx.Rngs(1),
    )
    assert read_config(ql.save_adapter(model, tmp_path / "out", base_model="owner/name")) == {
        "alpha_pattern": {"down_proj": 2.5},
        "base_model_name_or_path": "owner/name",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 8,
        "lora_dropout": 0.25,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "rank_pattern": {"down_proj": 2},
        "target_modules": ["down_proj", "k_proj", "q_proj"],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def test_projections_with_and_without_rslora_keep_their_scaling(tmp_path):
    base = random_model(tiny_config())
    model = ql.apply_qlora(
        base, where=".*/q_proj", rank=4, use_rslora=True, quant_type=None, rngs=nnx.Rngs(0)
    )
    model = ql.apply_qlora(model, where=".*/v_proj", rank=4, quant_type=None, rngs=nnx.Rngs(1))
    fill_b(model)
    again = ql.load_adapter(base, ql.save_adapter(model, tmp_path / "out", base_model="x"))
    ids = jnp.arange(6)[None]
    np.testing.assert_allclose(again(ids), model(ids), rtol=1e-6)
    assert again.layers.self_attn.q_proj.alpha == 32.0


def fill_b(model):
    """Gives B values, so that the adapter does something."""
    generator = np.random.default_rng(1)
    for _, node in nnx.iter_graph(model):
        if isinstance(node, ql.QLoRALinear) and node.rank:
            b = node.lora_b.get_value()
            node.lora_b = nnx.LoRAParam(jnp.asarray(generator.normal(0, 0.3, b.shape), b.dtype))


def test_a_quantized_base_keeps_its_codes_and_dropout_is_off(tmp_path):
    model, ids, _ = golden_tiny("llama3")
    quantized = ql.quantize_model(model, block_size=32)
    adapted = ql.load_adapter(quantized, golden_folder("llama3"))
    kernel = adapted.layers.mlp.up_proj.kernel.get_value()
    jax.tree.map(
        np.testing.assert_array_equal, kernel, quantized.layers.mlp.up_proj.kernel.get_value()
    )
    assert adapted.layers.mlp.up_proj.dropout == 0.1
    np.testing.assert_array_equal(adapted(ids), adapted(ids))
    assert np.abs(adapted(ids) - quantized(ids)).max() > 1


def test_differing_layers_are_padded_and_scaled():
    """layers.0: r 4, alpha 6; layers.1: r 7, alpha 9. One stack of rank 7 holds both."""
    adapted = ql.load_adapter(golden_tiny("qwen3")[0], golden_folder("qwen3"))
    tensors = safetensors.numpy.load_file(golden_folder("qwen3") / "adapter_model.safetensors")
    linear = adapted.layers.self_attn.q_proj
    assert (linear.rank, linear.alpha) == (7, 6 / 4 * 7)
    a, b = linear.lora_a.get_value(), linear.lora_b.get_value()
    np.testing.assert_array_equal(a[0, :, :4], tensors[f"{LAYER}q_proj.lora_A.weight"].T)
    np.testing.assert_array_equal(a[0, :, 4:], 0)
    np.testing.assert_array_equal(b[0, :4], tensors[f"{LAYER}q_proj.lora_B.weight"].T)
    name = f"{LAYER}q_proj.lora_B.weight".replace("layers.0", "layers.1")
    np.testing.assert_allclose(b[1], tensors[name].T * ((9 / 7) / (6 / 4)), rtol=1e-6)
    # o_proj has none in layers.0
    np.testing.assert_array_equal(adapted.layers.self_attn.o_proj.lora_a.get_value()[0], 0)
    assert adapted.layers.self_attn.o_proj.lora_a.get_value()[1].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes_stay(dtype, tmp_path):
    base = random_model(tiny_config())
    model = ql.apply_qlora(base, rank=2, quant_type=None, lora_dtype=dtype, rngs=nnx.Rngs(0))
    fill_b(model)
    again = ql.load_adapter(base, ql.save_adapter(model, tmp_path / "out", base_model="x"))
    for name in ("lora_a", "lora_b"):
        ours, theirs = (getattr(m.layers.mlp.down_proj, name).get_value() for m in (model, again))
        assert ours.dtype == theirs.dtype == dtype
        np.testing.assert_array_equal(ours, theirs)


def test_layers_without_dora_keep_the_magnitudes_of_their_base():
    adapted = ql.load_adapter(tiny_base("dora_qwen3")[0], golden_folder("dora_qwen3"))
    linear = adapted.layers.self_attn.q_proj
    magnitudes = linear.lora_magnitude.get_value()
    assert magnitudes.dtype == jnp.float32  # in the file bfloat16, which holds no norm exactly
    norms = jnp.linalg.norm(linear.kernel.get_value(), axis=-2)
    np.testing.assert_allclose(magnitudes[1], norms[1], rtol=1e-6)
    assert np.abs(magnitudes[0] / norms[0] - 1).max() > 0.3


def test_dora_in_some_layers_only_is_refused(tmp_path):
    options = dict(rank=2, quant_type=None, rngs=nnx.Rngs(0))
    model = ql.apply_qlora(random_model(tiny_config()), where=".*/q_proj", **options)
    model = ql.apply_qlora(model, where=".*/v_proj", use_dora=True, **options)
    with pytest.raises(ConfigError, match="v_proj has an adapter of DoRA and .*q_proj one of LoRA"):
        ql.save_adapter(model, tmp_path / "out", base_model="x")
    model.layers.self_attn.q_proj.add_magnitude()
    assert read_config(ql.save_adapter(model, tmp_path / "out", base_model="x"))["use_dora"]


@pytest.fixture
def adapter(tmp_path):
    return pathlib.Path(shutil.copytree(golden_folder("qwen2"), tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "kind 'IA3'.*merge_and_unload"),
        ({"peft_type": "PREFIX_TUNING"}, "kind 'PREFIX_TUNING'"),
        ({"peft_type": None}, "kind None"),
        ({"use_dora": True}, "4 tensors are missing(.|\n)*lora_magnitude_vector"),
        ({"use_dora": 1}, "use_dora is 1, expected is true or false"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save.*merge_and_unload"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias='all'.*merge_and_unload"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out.*Conv1D"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"use_qalora": True}, "QALoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "block-diagonal"),
        ({"kasa_config": {"beta": 1}}, "KaSA"),
        ({"monteclora_config": {"a": 1}}, "MonteCLoRA"),
        ({"alora_invocation_tokens": [1]}, "Activated LoRA"),
        ({"arrow_config": {"top_k": 1}}, "Arrow"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4.*path_initial_model"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"task_type": "SEQ_CLS"}, "SEQ_CLS.*CAUSAL_LM"),
        ({"use_new_thing": True}, "use_new_thing=True, which is not known"),
        ({"r": 0}, "r is 0, expected is a whole number of at least 1"),
        ({"r": True}, "r is True"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"use_rslora": 1}, "use_rslora is 1"),
        ({"target_modules": None}, "target_modules is None"),
        ({"target_modules": []}, r"target_modules is \[\]"),
        ({"target_modules": "(q_proj"}, "a regular expression"),
        ({"target_modules": ["c_attn"]}, "names no linear layer"),
        ({"layers_to_transform": ["a"]}, "layers_to_transform is"),
        ({"rank_pattern": {"q_proj": 1.5}}, r"rank_pattern\['q_proj'\] is 1.5"),
        ({"alpha_pattern": [1]}, "alpha_pattern is"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "4 tensors are missing"),
        ({"target_modules": ["q_proj"]}, "4 are unknown"),
        ({"layers_to_transform": 1}, "4 are unknown"),
        ({"r": 5}, r"8 do not fit(.|\n)*bfloat16\[3, 32\], must be \[5, 32\]"),
        ({"rank_pattern": {"layers.0.self_attn.q_proj": 2}}, "2 do not fit"),
    ],
)
def test_configurations_that_are_refused(adapter, change, message):
    config = read_config(adapter) | change
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=message):
        ql.load_adapter(golden_tiny("qwen2")[0], adapter)


def test_a_new_key_that_is_off_is_no_reason_to_refuse(adapter):
    config = read_config(adapter) | {"use_new_thing": False, "new_config": None}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert ql.load_adapter(golden_tiny("qwen2")[0], adapter).layers.self_attn.q_proj.rank == 3


Q, K = f"{LAYER}q_proj.lora_A.weight", f"{LAYER}k_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({Q: None}, f"1 tensors are missing(.|\n)*{Q}"),
        ({K: np.zeros((3, 32), np.float32)}, f"1 are unknown(.|\n)*{K}"),
        ({Q: np.zeros((32, 3), np.float32)}, r"1 do not fit(.|\n)*\[32, 3\], must be \[3, 32\]"),
        ({Q: np.zeros((3, 32), np.int8)}, r"int8\[3, 32\], must be .* float32, float16, bfloat16"),
        ({Q: np.full((3, 32), np.nan, np.float32)}, f"{Q} holds NaN or infinity"),
        (
            {"base_model.model.lm_head.weight": np.zeros((2, 2), np.float32)},
            "more than LoRA matrices: base_model.model.lm_head.weight.*save_embedding_layers=False",
        ),
        (
            {f"{LAYER}q_proj.lora_magnitude_vector": np.zeros(2, np.float32)},
            "1 are unknown(.|\n)*lora_magnitude_vector",
        ),
        (
            {"base_model.model.model.embed_tokens.lora_embedding_A": np.zeros(2, np.float32)},
            "1 are unknown(.|\n)*lora_embedding_A",
        ),
    ],
)
def test_tensors_that_are_refused(adapter, changes, message):
    file = adapter / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file) | changes
    safetensors.numpy.save_file({k: v for k, v in tensors.items() if v is not None}, file)
    with pytest.raises(WeightsError, match=message):
        ql.load_adapter(golden_tiny("qwen2")[0], adapter)


def test_files_that_are_refused(adapter, tmp_path):
    model = golden_tiny("qwen2")[0]
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(WeightsError, match="cut off"):
        ql.load_adapter(model, adapter)
    weights.unlink()
    with pytest.raises(WeightsError, match="has no adapter_model.safetensors"):
        ql.load_adapter(model, adapter)
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x02}.")
    with pytest.raises(WeightsError, match="adapter_model.bin, a pickle file.*save_pretrained"):
        ql.load_adapter(model, adapter)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"adapter_config\.json"):
        ql.load_adapter(model, adapter)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(WeightsError, match="is no PEFT adapter"):
        ql.load_adapter(model, adapter)
    with pytest.raises(WeightsError, match="Give that folder"):
        ql.load_adapter(model, adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="does not exist"):
        ql.load_adapter(model, tmp_path / "nowhere")


def test_models_that_are_refused(adapter, tmp_path):
    with pytest.raises(WeightsError, match="do not fit"):  # another base
        ql.load_adapter(random_model(tiny_config(qkv_bias=True)), adapter)
    adapted = ql.load_adapter(golden_tiny("qwen2")[0], adapter)
    with pytest.raises(ConfigError, match="has adapters already"):
        ql.load_adapter(adapted, golden_folder("qwen2_windowed"))
    with pytest.raises(ConfigError, match="has no adapter"):
        ql.save_adapter(golden_tiny("qwen2")[0], tmp_path / "out", base_model="x")
    other = ql.apply_qlora(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), where=".*", rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="has no name in PEFT"):
        ql.save_adapter(other, tmp_path / "out", base_model="x")
    assert not (tmp_path / "out").exists()


def test_a_folder_is_written_whole_or_not_at_all(adapter, tmp_path, monkeypatch):
    model = ql.load_adapter(golden_tiny("qwen2")[0], adapter)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(WeightsError, match="not empty. Give a new folder"):
        ql.save_adapter(model, adapter, base_model="x")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(WeightsError, match="No space left on device.*nothing was left"):
            ql.save_adapter(model, tmp_path / "out", base_model="x")
    linear = model.layers.self_attn.v_proj
    linear.lora_b = nnx.LoRAParam(linear.lora_b.get_value().at[1, 0, 0].set(jnp.nan))
    with pytest.raises(WeightsError, match="layers.1.self_attn.v_proj.lora_B.weight holds NaN"):
        ql.save_adapter(model, tmp_path / "out", base_model="x")
    assert sorted(tmp_path.rglob("*")) == before


def run(*command):
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["scripts/export.py", "--workdir={tmp}", "--out={tmp}/out"], "holds no run"),
        (["scripts/export.py", "--workdir={tmp}"], "--out is needed"),
        (["scripts/generate.py", "--workdir=x", "--adapter=y", "--prompt=a"], "onto a --model"),
    ],
)
def test_mistakes_end_with_one_message_and_code_2(tmp_path, command, message):
    done = run(*(part.format(tmp=tmp_path) for part in command))
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_goes_out_and_answers_the_same(tmp_path):
    model_path = write_model(tmp_path / "model")
    config = run_config(model_path, write_data(tmp_path / "data.jsonl"))
    config.train.steps, config.model.compute_dtype = 2, "float32"
    ql.train(config, tmp_path / "run", report=quiet_report()[0])
    out = tmp_path / "out"
    done = run("scripts/export.py", f"--workdir={tmp_path / 'run'}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert read_config(out)["base_model_name_or_path"] == str(model_path)
    trained, _ = ql.load_trained(tmp_path / "run")
    base, _ = ql.load_model(model_path, block_size=32)
    again = ql.load_adapter(base, out)
    ids = jnp.arange(8)[None]
    np.testing.assert_array_equal(again(ids), trained(ids))
    assert np.abs(again(ids) - base(ids)).max() > 1e-3
    flags = [f"--model={model_path}", "--prompt=what is the sum of one and two"]
    done = run("scripts/generate.py", *flags, f"--adapter={out}", "--max_new_tokens=4")
    assert done.returncode == 0, done.stderr
