"""The other side of the benchmark: transformers, peft and bitsandbytes.

`scripts/bench.py` runs this file with a Python that has those packages; it needs nothing of this
project. Everything is set as these libraries do it best: the default (SDPA) attention, no KV cache
in training, no upcast of the embedding, non-reentrant checkpointing.

    bench_rival.py prepare --gguf=FILE --model=DIR       the model as a Hugging Face folder, once
    bench_rival.py train --model=DIR --tokens=FILE.npy --dtype=bfloat16 [--checkpointing]
    bench_rival.py dequantize                            answers requests on standard input
    bench_rival.py decode --model=DIR --prompts=FILE.npy --new_tokens=32 [--nf4]
    bench_rival.py quantize --model=DIR --layers=2       linear layers of the first layers, to NF4

Results are lines of JSON on standard output; of `train` the same as from scripts/bench_ours.py.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import pathlib
import sys
import time

import bitsandbytes as bnb
import numpy as np
import peft
import torch
import transformers
from safetensors import safe_open

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def peak_rss() -> int:
    """The most memory this process ever had resident, in bytes (Linux)."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def report(**result: object) -> None:
    """Prints one line of JSON."""
    print(json.dumps(result), flush=True)


def prepare(gguf: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes a GGUF model as float32 safetensors, so that both sides quantize the same numbers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # Reading a GGUF marks the model as quantized, and saving would refuse it.
    model.hf_quantizer = None
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(folder)


def load(folder: pathlib.Path, dtype: torch.dtype, rank: int, checkpointing: bool):
    """The model in NF4 with double quantization and adapters on all linear layers."""
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map="cpu", quantization_config=quantization
    )
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding.weight.data_ptr() != head.weight.data_ptr():
        raise RuntimeError("the head was not loaded as the embedding it is tied to")
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lora = peft.LoraConfig(
        r=rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, lora)
    model.config.use_cache = False
    return model.train()


def train(args: argparse.Namespace) -> None:
    """One line a step; the optimizer is that of `qlora_jax.config`."""
    tokens = torch.from_numpy(np.load(args.tokens).astype(np.int64))
    model = load(args.model, getattr(torch, args.dtype), args.rank, args.checkpointing)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=2e-4, betas=(0.9, 0.999), weight_decay=0.0)
    for index, batch in enumerate(tokens[: args.steps]):
        started, cpu_started = time.perf_counter(), time.process_time()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 0.3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        report(
            step=index,
            seconds=time.perf_counter() - started,
            cpu_seconds=time.process_time() - cpu_started,
            loss=loss.item(),
            peak_rss=peak_rss(),
        )


def decode(args: argparse.Namespace) -> None:
    """A line a repeat, as from scripts/bench_decode_ours.py; plain weights without `--nf4`."""
    dtype = getattr(torch, args.dtype)
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.model,
        dtype=dtype,
        device_map="cpu",
        quantization_config=quantization if args.nf4 else None,
    ).eval()

    def generate(batch: torch.Tensor, count: int) -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            found = model.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        if found.shape[1] != batch.shape[1] + count:
            raise RuntimeError(f"{found.shape=} instead of {count} new tokens")
        return time.perf_counter() - started

    for path in args.prompts:
        prompts = torch.from_numpy(np.load(path).astype(np.int64))
        for repeat, batch in enumerate(prompts):
            cpu_started = time.process_time()
            seconds = generate(batch, args.new_tokens)
            cpu_seconds = time.process_time() - cpu_started
            report(
                batch=len(batch),
                repeat=repeat,
                seconds=seconds,
                cpu_seconds=cpu_seconds,
                first=generate(batch, 1),
                peak_rss=peak_rss(),
            )


def serve_dequantize() -> None:
    """Answers `{"shape": [out, in], "dtype": "float32", "repeats": 20}` with the seconds of each.

    A line each, so that the asking process can take turns with its own measurement.
    """
    cases = {}
    for line in sys.stdin:
        request = json.loads(line)
        key = (*request["shape"], request["dtype"])
        if key not in cases:
            generator = torch.Generator().manual_seed(0)
            weight = torch.randn(request["shape"], generator=generator)
            cases[key] = bnb.functional.quantize_4bit(
                weight.to(getattr(torch, request["dtype"])),
                blocksize=64,
                compress_statistics=True,
                quant_type="nf4",
            )
        packed, state = cases[key]
        samples = []
        for _ in range(request["repeats"]):
            started = time.perf_counter()
            bnb.functional.dequantize_4bit(packed, state)
            samples.append(time.perf_counter() - started)
        report(seconds=samples)


def quantize(folder: pathlib.Path, layers: int) -> None:
    """One line: reading the linear layers of the first layers and quantizing them.

    Each packed weight is kept, as a loader would.
    """
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    kept, nbytes = [], 0
    started, cpu_started = time.perf_counter(), time.process_time()
    for name, file in weight_map.items():
        if "_proj." not in name or int(name.split(".")[2]) >= layers:
            continue
        with safe_open(folder / file, "pt") as shard:
            weight = shard.get_tensor(name)
        nbytes += weight.nbytes
        kept.append(
            bnb.functional.quantize_4bit(
                weight, blocksize=64, compress_statistics=True, quant_type="nf4"
            )
        )
    report(
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu_started,
        bytes=nbytes,
        peak_rss=peak_rss(),
    )


def main() -> None:
    """Does one of the jobs above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    jobs = ["prepare", "train", "decode", "dequantize", "quantize", "versions"]
    parser.add_argument("job", choices=jobs)
    parser.add_argument("--gguf", type=pathlib.Path)
    parser.add_argument("--model", type=pathlib.Path)
    parser.add_argument("--tokens", type=pathlib.Path)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--prompts", type=pathlib.Path, action="append")
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--nf4", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if args.job == "prepare":
        prepare(args.gguf, args.model)
    elif args.job == "train":
        train(args)
    elif args.job == "decode":
        decode(args)
    elif args.job == "dequantize":
        serve_dequantize()
    elif args.job == "quantize":
        quantize(args.model, args.layers)
    else:
        report(**{name: importlib.metadata.version(name) for name in PACKAGES})


if __name__ == "__main__":
    main()
