"""Makes mmlu.json: log-probabilities of the four letters that transformers computes.

    python tests/golden/make_mmlu.py SmolLM2-135M-Instruct.Q4_1.gguf QUESTIONS.json DEV_FOLDER

In an environment with torch, transformers and gguf. Each subject's first question, without and with
five solved ones; the prompts are written here, without the project's code.
"""

import csv
import hashlib
import json
import pathlib
import sys

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

LETTERS = "ABCD"


def solved(folder: pathlib.Path, subject: str) -> str:
    """Five solved questions as the authors of MMLU write them."""
    text = ""
    with (folder / f"{subject}_dev.csv").open() as file:
        for row in csv.DictReader(file):
            text += row["question"]
            for i, letter in enumerate(LETTERS):
                text += f"\n{letter}. {row[f'choice{i}']}"
            text += f"\nAnswer: {LETTERS[int(row['answer'])]}\n\n"
    return text


def main(gguf: pathlib.Path, questions: pathlib.Path, dev: pathlib.Path) -> None:
    """Writes mmlu.json beside this script."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers does not read which pre-tokenizer a GGUF file names; this is SmolLM2's own.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    letters = [tokenizer(f"Answer: {x}", add_special_tokens=False).input_ids[-1] for x in LETTERS]
    first: dict[str, dict] = {}
    for line in questions.read_text().splitlines():
        record = json.loads(line)
        first.setdefault(record["subject"], record)
    found = {}
    for subject, record in sorted(first.items()):
        header, _, question = record["input"].partition("\n\n")
        prompts = [record["input"], f"{header}\n\n{solved(dev, subject)}{question}"]
        rows = []
        for prompt in prompts:
            ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
            with torch.no_grad():
                logits = model(ids[:, -2048:], logits_to_keep=1).logits[0, -1]
            logprobs = torch.log_softmax(logits.float(), dim=-1)[letters]
            rows.append([round(x, 5) for x in logprobs.tolist()])
        digest = hashlib.sha256(prompts[1].encode()).hexdigest()[:16]
        found[subject] = {
            "prompt": digest,
            "tokens": ids.shape[1],
            "shots0": rows[0],
            "shots5": rows[1],
        }
        print(subject, ids.shape[1], flush=True)
    text = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in found.items())
    pathlib.Path(__file__).with_name("mmlu.json").write_text("{" + text + "}\n")


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:]))
