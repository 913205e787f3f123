"""Merged models through the real libraries: transformers, bitsandbytes and llama.cpp.

Run it where transformers and bitsandbytes are installed (Python 3.11, CPU build of torch); it calls
this project with another Python. With a GGUF file of SmolLM2 it goes through that model, too, and
with a Python that has llama-cpp-python, llama.cpp answers from what we wrote.

    python tests/golden/round_trip_export.py --ours=.venv/bin/python \\
        --gguf=SmolLM2-135M-Instruct.Q4_1.gguf --llama_cpp=llamacpp/bin/python

It writes export.json: the logits that transformers computes from our folders, which
tests/test_merging.py compares with ours. It ends with an error unless

* transformers' logits of merged folders (tiny Llama, Qwen2, Phi-3 and SmolLM2), also of one in NF4
  of bitsandbytes, are within 1e-3 of ours,
* its tokenizer gives our ids, and its chat template our text,
* llama.cpp tokenizes as we do, predicts as we do, and names the capital of France.
"""

import argparse
import json
import os
import pathlib
import subprocess
import tempfile

import bitsandbytes
import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
TINY = ("llama3", "qwen2", "phi3")
TEXT = json.loads((HERE / "loading.json").read_text())
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
# Arguments: a folder, the case, the ids or "". Writes the base, its merged forms and our logits.
OURS = """
import json, pathlib, sys
sys.path.insert(0, "tests")
import adapted_models, jax.numpy as jnp, numpy as np
import qlora_jax as ql
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.export import _packed
from qlora_jax.loading import read_tokenizer
from qlora_jax.merged_files import write_4bit_folder, write_gguf_file, write_hf_folder
from qlora_jax.merging import MergedCheckpoint
from qlora_jax.weights import open_checkpoint

folder, case, ids, question = sys.argv[1:]
folder, ids = pathlib.Path(folder), np.array(json.loads(ids))
if case.endswith(".gguf"):
    base = pathlib.Path(case)
    model = adapted_models.adapt(ql.load_model(base)[0], scale=0.01)
else:
    model, base = adapted_models.adapted(folder, case)
source = open_checkpoint(base)
tokenizer = read_tokenizer(source)
np.save(folder / "adapted.npy", model(ids))
merged = MergedCheckpoint(model, source, dtype=jnp.bfloat16)
write_hf_folder(merged, folder / "hf", tokenizer, file_bytes=200_000_000)
np.save(folder / "hf.npy", ql.load_model(folder / "hf", quant_type=None)[0](ids))
if case.endswith(".gguf"):
    packed = _packed(model)
    write_4bit_folder(merged, folder / "bnb", tokenizer, format="bitsandbytes", packed=packed)
    np.save(folder / "bnb.npy", ql.load_model(folder / "bnb")[0](ids))
    exact = MergedCheckpoint(model, source)
    write_gguf_file(exact, folder / "model.gguf", tokenizer, dtype="f16")
    np.save(folder / "gguf.npy", ql.load_model(folder / "model.gguf", quant_type=None)[0](ids))
    prompt = tokenizer.apply_chat_template(json.loads(question), add_generation_prompt=True)
    (folder / "prompt.json").write_text(json.dumps([prompt, tokenizer.encode(prompt)]))
"""
# Arguments: a file, the text, its ids, the messages, where to write the logits.
LLAMA_CPP = """
import json, sys
import numpy as np
from llama_cpp import Llama

path, text, ids, messages, out = sys.argv[1:]
ids = json.loads(ids)
model = Llama(path, n_ctx=512, logits_all=True, verbose=False)
assert model.tokenize(text.encode(), add_bos=False) == ids
answer = model.create_chat_completion(json.loads(messages), temperature=0, max_tokens=20)
print("  llama.cpp answers:", answer["choices"][0]["message"]["content"])
assert "Paris" in answer["choices"][0]["message"]["content"]
model.reset()
model.eval(ids)
np.save(out, np.array(model.scores[: len(ids)]))
"""


def logits(folder: pathlib.Path, ids: list[int]) -> np.ndarray:
    """What transformers computes in float32.

    4-bit weights are decoded by bitsandbytes first: its own product on a CPU is less exact.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight, state = module.weight.data, module.weight.quant_state
            state.dtype = torch.float32  # else it rounds what it decodes to bfloat16
            dense = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            decoded = bitsandbytes.functional.dequantize_4bit(weight, state)
            dense.weight.data = decoded.float().clone()
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, dense)
    with torch.no_grad():
        return torch.nn.Module.float(model)(torch.tensor([ids])).logits.numpy()[0]


def report(what: str, theirs: np.ndarray, ours: pathlib.Path, limit: float) -> None:
    """Prints the largest difference."""
    error = np.abs(np.load(ours)[0] - theirs).max()
    print(f"{what}: logits differ by {error:.1e}")
    assert error < limit, (error, limit)


def ours(python: str, folder: pathlib.Path, case: str, ids: list[int]) -> None:
    """Lets this project write its files."""
    folder.mkdir()
    command = [python, "-c", OURS, str(folder), case, json.dumps([ids]), json.dumps(QUESTION)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    subprocess.run(command, cwd=ROOT, env=env, check=True)


def smollm2(args: argparse.Namespace, folder: pathlib.Path) -> float:
    """SmolLM2 through all three; returns the loss of a text that transformers computes."""
    ids = TEXT["ids"]
    ours(args.ours, folder, str(args.gguf), ids)
    found = logits(folder / "hf", ids)
    report("SmolLM2, merged folder", found, folder / "hf.npy", 1e-3)
    report("SmolLM2, in NF4 again", logits(folder / "bnb", ids), folder / "bnb.npy", 1e-3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "hf")
    options = dict(tokenize=False, add_generation_prompt=True)
    prompt = tokenizer.apply_chat_template(QUESTION, **options)
    encoded = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert [prompt, encoded] == json.loads((folder / "prompt.json").read_text())
    assert tokenizer(TEXT["text"], add_special_tokens=False)["input_ids"] == ids
    if args.llama_cpp:
        out = folder / "llama_cpp.npy"
        arguments = [str(folder / "model.gguf"), TEXT["text"], json.dumps(ids)]
        arguments += [json.dumps(QUESTION), str(out)]
        subprocess.run([args.llama_cpp, "-c", LLAMA_CPP, *arguments], check=True)
        # llama.cpp multiplies float16 weights with activations in float16.
        report("SmolLM2, GGUF in llama.cpp", np.load(out), folder / "gguf.npy", 0.3)
    log_probs = torch.log_softmax(torch.tensor(found[:-1]), dim=-1)
    return -float(log_probs[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].mean())


def main() -> None:
    """Goes through the models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ours", required=True, help="a Python that has this project's packages")
    parser.add_argument("--gguf", type=pathlib.Path, help="SmolLM2 as a GGUF file")
    parser.add_argument("--llama_cpp", help="a Python that has llama-cpp-python")
    args = parser.parse_args()
    golden = {"tiny": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        for case in TINY:
            ids = np.random.default_rng(0).integers(0, 20, 8).tolist()
            ours(args.ours, folder / case, case, ids)
            found = logits(folder / case / "hf", ids)
            report(f"tiny {case}, merged folder", found, folder / case / "hf.npy", 1e-3)
            golden["tiny"][case] = {"ids": ids, "logits": found.round(5).tolist()}
        if args.gguf:
            golden["smollm2_loss"] = smollm2(args, folder / "smollm2")
            print(f"SmolLM2: the text has a loss of {golden['smollm2_loss']:.5f}")
    (HERE / "export.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
