"""Our model class in lm-eval, with a task of our own that needs no network."""

import json

import numpy as np
import pytest
import tiny_run

from qlora_jax.generation import generate
from qlora_jax.loading import load_model

lm_eval = pytest.importorskip("lm_eval.api.model", reason="needs lm-eval with its dependencies")

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: {kind}
test_split: test
doc_to_text: "{{{{question}}}}"
{more}
"""


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    from qlora_jax.evaluation.lm_eval_model import LmEvalModel

    folder = tiny_run.write_model(tmp_path_factory.mktemp("model"))
    return LmEvalModel(*load_model(folder, quant_type="nf4", block_size=32), max_len=64)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def instance(*arguments):
    from lm_eval.api.instance import Instance

    return Instance("loglikelihood", {}, arguments, 0)


def test_likelihoods_are_those_of_the_scorer_also_of_empty_and_long_contexts(lm):
    asked = [("what is", " the sum"), ("", "one two"), ("one " * 100, "two")]
    found = lm.loglikelihood([instance(*pair) for pair in asked])
    encode = lm._tokenizer.encode
    pairs = [
        (encode("what is"), encode("the sum")),
        ([lm.prefix_token_id], encode("one two")),
        (encode("one " * 100)[-64:], encode("two")),
    ]
    wanted = lm._scorer.log_likelihoods(pairs)
    np.testing.assert_allclose([total for total, _ in found], [w.total for w in wanted], rtol=1e-5)
    text = "one two three four " * 40
    (rolling,) = lm.loglikelihood_rolling([instance(text)])
    parts, row = [], [lm.prefix_token_id, *encode(text)]
    for start in range(0, len(row) - 1, 64):  # the last window has the context that it has room for
        end = min(start + 64, len(row) - 1)
        begin = max(0, end - 64)
        parts.append((row[begin : start + 1], row[start + 1 : end + 1]))
    total = sum(one.total for one in lm._scorer.log_likelihoods(parts))
    assert rolling == pytest.approx(total, rel=1e-5)


def test_replies_end_where_the_task_says(lm):
    prompts = ["what is the sum of one and two", "three and four"]
    whole = generate(lm._model, lm._tokenizer, prompts, max_new_tokens=12)
    settings = {"until": ["\n\n\n"], "max_gen_toks": 12, "do_sample": False}
    assert lm.generate_until([instance(prompt, settings) for prompt in prompts]) == whole
    word = whole[0].split()[-1]
    (cut,) = lm.generate_until([instance(prompts[0], {**settings, "until": word})])
    assert cut == whole[0].partition(word)[0]


def test_a_task_of_ones_own_runs_offline(lm, tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    data = tmp_path / "data.json"
    rows = [{"question": "what is one and", "choices": ["two", "sum of it"], "answer": 0}] * 3
    data.write_text("\n".join(map(json.dumps, rows)))
    more = 'doc_to_choice: "{{choices}}"\ndoc_to_target: answer\nmetric_list: [{metric: acc}]'
    task = TASK.format(name="tiny_choice", data=data, kind="multiple_choice", more=more)
    (tmp_path / "task.yaml").write_text(task)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = simple_evaluate(lm, tasks=["tiny_choice"], task_manager=manager)
    encode = lm._tokenizer.encode
    pairs = [(encode(rows[0]["question"]), encode(choice)) for choice in rows[0]["choices"]]
    a, b = (one.total for one in lm._scorer.log_likelihoods(pairs))
    assert results["results"]["tiny_choice"]["acc,none"] == float(a >= b)
