"""The rival's side of the suite `gpu`'s whole steps: transformers, peft and bitsandbytes.

    python scripts/bench_gpu_rival_steps.py [--dry-run]

Questions, a line of JSON each; decoding comes before training, because adapters stay on:

    {"run": "decode", "setting": ""}                 or "static": a static cache, compiled
    {"run": "train", "setting": "checkpointing"}     or "no checkpointing"

The same model as in scripts/bench_gpu_steps.py, of random weights that are made on the device and
quantized there one at a time: NF4, double quantization, bfloat16, the default (SDPA) attention.
Training is what the QLoRA recipe says: adapters on all linear layers, bitsandbytes' paged 32-bit
AdamW, non-reentrant checkpointing where it is on, no KV cache. Decoding is `generate`, greedy.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import bench_gpu_cases as cases
import bitsandbytes as bnb
import peft
import torch
import transformers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_GENERATIONS = 3


def main() -> None:
    """Answers until standard input ends."""
    bench = StepBench(cases.DRY_RUN if "--dry-run" in sys.argv[1:] else cases.FULL)
    for line in sys.stdin:
        try:
            answer = bench.answer(json.loads(line))
        except Exception as error:  # a row, not the end: above all, too little memory
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(answer), flush=True)


def random_model(sizes: cases.Sizes) -> transformers.PreTrainedModel:
    """A Llama whose linear layers, but for the head, are bitsandbytes' `Linear4bit`."""
    config = transformers.LlamaConfig(**sizes.model)
    with torch.device(DEVICE):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, quantized(module))
    model.is_loaded_in_4bit = True  # what from_pretrained would set, and peft looks for
    return model


def quantized(linear: torch.nn.Linear) -> bnb.nn.Linear4bit:
    """The layer in NF4 with double quantization; the dense weight is let go."""
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=torch.bfloat16,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    weight = bnb.nn.Params4bit(
        linear.weight.data,
        requires_grad=False,
        compress_statistics=True,
        quant_type="nf4",
        module=layer,
    )
    layer.weight = weight.to(DEVICE)
    linear.weight = None
    return layer


class StepBench:
    """The model, and what is done with it."""

    def __init__(self, sizes: cases.Sizes):
        """Builds the model on the device."""
        self._sizes = sizes
        self._model: Any = random_model(sizes)

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """The answer to one question of the module's text."""
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if question["run"] == "decode":
            report = self._decode(question["setting"])
        else:
            report = self._train(question["setting"])
        return report | {"peak_bytes": peak_bytes()}

    def _decode(self, setting: str) -> dict[str, Any]:
        sizes = self._sizes
        model = self._model.eval()
        generator = torch.Generator().manual_seed(0)
        shape = (1, sizes.prompt)
        prompt = torch.randint(1, sizes.model["vocab_size"], shape, generator=generator).to(DEVICE)
        options = {"do_sample": False, "use_cache": True, "pad_token_id": 0}
        options["attention_mask"] = torch.ones_like(prompt)
        if setting == "static":  # on a GPU, transformers then compiles the decoding step
            options["cache_implementation"] = "static"
        seconds: dict[int, list[float]] = {count: [] for count in sizes.new_tokens}
        for run in range(_GENERATIONS + 1):
            for count in sizes.new_tokens:
                synchronize()
                started = time.perf_counter()
                with torch.inference_mode():
                    new = model.generate(
                        prompt, max_new_tokens=count, min_new_tokens=count, **options
                    )
                synchronize()
                if new.shape[1] != sizes.prompt + count:
                    raise RuntimeError(f"{new.shape=} instead of {count} new tokens")
                if run:
                    seconds[count].append(time.perf_counter() - started)
        return {"seconds": seconds, "dtype": "bfloat16"}

    def _train(self, setting: str) -> dict[str, Any]:
        sizes = self._sizes
        if not isinstance(self._model, peft.PeftModel):
            lora = peft.LoraConfig(
                r=sizes.rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
            )
            self._model = peft.get_peft_model(self._model, lora)
            self._model.config.use_cache = False
        model = self._model.train()
        if setting == "checkpointing":
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        else:
            model.gradient_checkpointing_disable()
        trainable = [p for p in model.parameters() if p.requires_grad]
        # Paged memory is CUDA's; on a CPU there is only the same update without it.
        make = bnb.optim.PagedAdamW32bit if DEVICE == "cuda" else torch.optim.AdamW
        optimizer = make(trainable, lr=2e-4, betas=(0.9, 0.999), weight_decay=0.0)
        generator = torch.Generator().manual_seed(0)
        shape = (sizes.batch, sizes.length)
        tokens = torch.randint(1, sizes.model["vocab_size"], shape, generator=generator).to(DEVICE)
        seconds, losses = [], []
        for _ in range(sizes.step_warm_up + sizes.steps):
            synchronize()
            started = time.perf_counter()
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 0.3)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            synchronize()
            seconds.append(time.perf_counter() - started)
            losses.append(loss.item())
        seconds = seconds[sizes.step_warm_up :]
        speed = sizes.batch * sizes.length / statistics.median(seconds)
        return {
            "seconds": seconds,
            "losses": losses,
            "tokens_per_second": speed,
            "optimizer": type(optimizer).__name__,
            "trainable": sum(p.numel() for p in trainable),
        }


def synchronize() -> None:
    """Waits for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def peak_bytes() -> int | None:
    """The most device memory that was allocated since the question came."""
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None


if __name__ == "__main__":
    main()
