"""Makes sets.json: token ids and loss masks of the fixtures in tests/sets, without qlora_jax.

Run in an environment with transformers 5 (no GPU, no network):

    python tests/golden/make_sets.py SmolLM2-135M-Instruct.Q4_1.gguf

The mappings are written down once more here, as sources and targets, from what artidoro/qlora's
`qlora.py` does (`extract_alpaca_dataset`, `format_dataset`, `DataCollatorForCausalLM`); the ids are
those of transformers' tokenizer (put right as in make_tokenizer.py), and the sets that go through
the model's chat template are rendered by transformers. Three ways for each set:

    paper      BOS and source, target and EOS, cut at 24 and 16 tokens at their ends
    default    source, target and EOS, loss as the authors have it
    assistant  of the dialogues only: loss on the answers, and on the marker that follows one

A mask is written as the lengths of its runs, the first of which has no loss.
"""

import csv
import itertools
import json
import pathlib
import re
import sys

from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

SETS = pathlib.Path(__file__).parents[1] / "sets"
SOURCE_MAX_LEN, TARGET_MAX_LEN = 24, 16


def lines(name):
    return [json.loads(line) for line in (SETS / name).read_text("utf-8").splitlines()]


def document(name):
    return json.loads((SETS / name).read_text("utf-8"))


def alpaca(record):
    head = "Below is an instruction that describes a task"
    tail = "Write a response that appropriately completes the request.\n\n"
    instruction = f"### Instruction:\n{record['instruction']}\n\n"
    if record.get("input", "") != "":
        further = ", paired with an input that provides further context. "
        middle = f"### Input:\n{record['input']}\n\n"
        return head + further + tail + instruction + middle + "### Response: ", record["output"]
    return head + ". " + tail + instruction + "### Response: ", record["output"]


def flan(rationale):
    pairs = []
    with (SETS / "flan_v2.tsv").open(encoding="utf-8", newline="") as file:
        for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            question, answer, why = (cell.replace("\\n", "\n") for cell in row)
            pairs.append((question, f"{why} The answer is {answer}." if rationale else answer))
    return pairs


def self_instruct():
    for record in lines("self-instruct.jsonl"):
        if "prompt" in record:
            yield record["prompt"], re.sub(r"<\|endoftext\|>$", "", record["completion"])
        for item in record.get("instances", []):
            middle = item["input"] + "\n\n" if item["input"] else ""
            source = record["instruction"].strip() + "\n\n" + middle + "Output:"
            yield source, " " + item["output"].strip()


def unnatural(reformulations):
    for record in lines("unnatural-instructions.jsonl"):
        more = (record.get("reformulations") or []) if reformulations else []
        for item in record["instances"] + more:
            yield item["instruction_with_input"], item["output"]


def chip2(record):
    question, answer, *_ = record["text"].split("\n<bot>: ")
    return question.replace("<human>: ", ""), answer


def best_path(record):
    message, text, answered = record["prompt"], "", ""
    while message:
        if message["role"] == "prompter":
            text += "### Human: " + message["text"]
        else:
            text += "### Assistant: " + message["text"]
            answered = text
        replies = [reply for reply in message.get("replies", []) if not reply.get("deleted")]
        ranked = sorted(replies, key=lambda r: 99 if r.get("rank") is None else r["rank"])
        message = ranked[0] if ranked else None
    return answered


PAIRS = {
    "alpaca": [alpaca(record) for record in document("alpaca.json")],
    "flan_v2": flan(rationale=False),
    "flan_v2_cot": flan(rationale=True),
    "self-instruct": list(self_instruct()),
    "unnatural-instructions": list(unnatural(reformulations=True)),
    "unnatural-instructions-core": list(unnatural(reformulations=False)),
    "chip2": [chip2(record) for record in lines("chip2.jsonl")],
    "longform": [(record["input"], record["output"]) for record in document("longform.json")],
}
DIALOGUES = {
    "oasst1": (
        [record["text"] for record in lines("oasst1.jsonl")],
        "### Human:",
        "### Assistant:",
    ),
    "oasst1_trees": (
        [best_path(record) for record in lines("oasst1_trees.jsonl")],
        "### Human:",
        "### Assistant:",
    ),
    "hh-rlhf": (
        [record["chosen"] for record in lines("hh-rlhf.jsonl")],
        "\n\nHuman:",
        "\n\nAssistant:",
    ),
}


def dolly(record):
    context = record.get("context") or record.get("input") or ""
    question = record["instruction"] + ("\n\n" + context if context else "")
    return [question, record.get("response", record.get("output"))]


def turns(record):
    if "data" in record:
        return record["data"]
    found = record.get("conversations") or record["messages"]
    return [
        (item.get("from") or item["role"], item.get("value") or item["content"]) for item in found
    ]


CHATS = {
    "dolly": [dolly(record) for record in lines("dolly.jsonl")],
    "sharegpt": [turns(record) for record in document("sharegpt.json")],
    "ultrachat": [turns(record) for record in lines("ultrachat.jsonl")],
}


def main(gguf):
    """Writes sets.json beside this script."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    bos, eos = tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")

    def ids(text):
        return tokenizer.encode(text, add_special_tokens=False) if text else []

    def example(*parts):
        """Parts are (ids, has loss); the first token never has."""
        tokens = [token for part, _ in parts for token in part]
        mask = [int(loss) for part, loss in parts for _ in part]
        mask[0] = 0
        runs, last = [], 1
        for value, group in itertools.groupby(mask):
            runs += [0] if not runs and value else []
            runs.append(len(list(group)))
            last = value
        assert sum(runs) == len(tokens) and last in (0, 1)
        return [tokens, runs]

    def paper(source, target):
        source = ([bos] + ids(source))[:SOURCE_MAX_LEN]
        return example((source, False), ((ids(target) + [eos])[:TARGET_MAX_LEN], True))

    def answers(text, human, assistant):
        """Loss on each answer, the human's marker after it, and EOS at the very end."""
        parts, learning = [], False
        pattern = f"({re.escape(human)}|{re.escape(assistant)})"
        pieces = re.split(pattern, text)
        current = pieces[0]
        for marker, body in zip(pieces[1::2], pieces[2::2], strict=True):
            if learning:  # this marker follows an answer
                if marker == human:
                    parts.append((ids(current + marker), True))
                    current = ""
                else:
                    parts.append((ids(current), True))
                    current = marker
            else:
                current += marker
            learning = marker == assistant and bool(body.strip())
            if learning:
                parts.append((ids(current), False))
                current = body
            else:
                current += body
        if learning:
            parts.append((ids(current) + [eos], True))
        return example(*parts)

    def chat(items):
        roles = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
        pairs = [
            item if isinstance(item, tuple) else (("user", "assistant")[i % 2], item)
            for i, item in enumerate(items)
        ]
        messages = [{"role": roles.get(role, role), "content": text} for role, text in pairs]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        parts, header = [], "<|im_start|>assistant\n"
        for i, piece in enumerate(text.split(header)):
            answer, end, rest = piece.partition("<|im_end|>") if i else ("", "", piece)
            parts += [(ids(answer + end), True)] if i else []
            last = i == text.count(header)
            parts += [] if last else [(ids(rest + header), False)]
        return example(*parts)

    golden = {}
    for name, pairs in PAIRS.items():
        golden[name] = {
            "paper": [paper(*pair) for pair in pairs],
            "default": [example((ids(a), False), (ids(b) + [eos], True)) for a, b in pairs],
        }
    for name, (texts, human, assistant) in DIALOGUES.items():
        golden[name] = {
            "paper": [paper("", text) for text in texts],
            "default": [example((ids(text) + [eos], True)) for text in texts],
            "assistant": [answers(text, human, assistant) for text in texts],
        }
    for name, chats in CHATS.items():
        golden[name] = {"default": [chat(items) for items in chats]}
    paragraphs = re.split(r"\n\n+", (SETS / "text.txt").read_text("utf-8").strip("\n"))
    golden["text"] = {"default": [example((ids(text) + [eos], True)) for text in paragraphs]}
    out = pathlib.Path(__file__).with_name("sets.json")
    out.write_text(json.dumps(golden, separators=(",", ":")) + "\n")
    counts = {name: len(ways["default"]) for name, ways in golden.items()}
    print(f"{out}: {counts}")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
