"""Whole runs of families that are not like Llama: trained, found again, asked and exported."""

import jax
import numpy as np
import pytest
import tiny_run
from family_models import write_folder

import qlora_jax as ql


@pytest.mark.slow
@pytest.mark.parametrize("case", ["gemma3", "phi3", "opt", "gpt_neox"])
def test_a_run_lowers_the_loss_and_answers_from_its_adapter(case, tmp_path):
    base = tiny_run.write_model(tmp_path / "base")
    write_folder(case, base)  # its own tokenizer stays
    config = tiny_run.tiny_config(base, tiny_run.write_data(tmp_path / "data.jsonl"))
    config.train.steps = 20
    report, text = tiny_run.quiet_report()
    result = ql.train(config, tmp_path / "run", report=report)
    assert result.heldout_after < result.heldout_before - 0.1, text.getvalue()
    model, tokenizer = ql.load_trained(tmp_path / "run")
    prompts = ["what is the sum of one and two", "it is"]
    replies = ql.generate(model, tokenizer, prompts, max_new_tokens=12)
    assert replies == ql.generate(model, tokenizer, prompts, max_new_tokens=12)
    ids = np.array([tokenizer.encode(prompts[0])])
    folder = ql.save_adapter(model, tmp_path / "adapter", base_model="x")
    plain, _ = ql.load_model(base, block_size=32, dtype=model.dtype)
    again = ql.load_adapter(plain, folder)
    np.testing.assert_allclose(again(ids), model(ids), rtol=0, atol=2e-2)
    assert jax.numpy.abs(model(ids) - plain(ids)).max() > 0.1
