"""Makes the golden files of the decoder; needs torch, transformers and gguf.

    python tests/golden/make_llama.py path/to/SmolLM2-135M-Instruct.Q4_1.gguf

Writes `llama_<case>.safetensors` (a tiny random model of each family: config, weights, ids, logits)
and `smollm2.safetensors` (logits and greedy continuations of the real model, weights dequantized to
float32).
"""

import json
import pathlib
import sys

import safetensors.torch
import torch
import transformers

HERE = pathlib.Path(__file__).parent
SMALL = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
CASES = {
    "llama2": ("llama", dict(num_key_value_heads=4, rms_norm_eps=1e-5)),
    "llama3": ("llama", dict(rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True)),
    "llama_biased": (
        "llama",
        dict(
            attention_bias=True,
            mlp_bias=True,
            head_dim=16,
            rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=4.0),
        ),
    ),
    "mistral": ("mistral", dict(sliding_window=5)),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen2_windowed": (
        "qwen2",
        dict(use_sliding_window=True, sliding_window=4, max_window_layers=1),
    ),
    "qwen3": ("qwen3", dict(head_dim=16, num_key_value_heads=1)),
}
PROMPTS = [
    "The capital of France is",
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "user", "content": "Write one sentence about the sea."}],
]


def tiny(name: str, model_type: str, overrides: dict) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**SMALL, **overrides})
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            # Norm scales around one, biases and matrices large enough that every part matters.
            value.normal_(1.0 if "norm" in key else 0.0, 0.2)
        ids = torch.randint(0, config.vocab_size, (2, 20))
        logits = model(ids).logits
    tensors = {k: v for k, v in model.state_dict().items()}
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    tensors = {k: v.contiguous() for k, v in tensors.items()}
    tensors |= {"golden.ids": ids.int(), "golden.logits": logits}
    metadata = {"config": json.dumps(config.to_dict()), "transformers": transformers.__version__}
    safetensors.torch.save_file(tensors, HERE / f"llama_{name}.safetensors", metadata)
    print(name, "logits up to", logits.abs().max().item())


def smollm2(path: pathlib.Path) -> None:
    kwargs = dict(gguf_file=path.name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **kwargs)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, dtype=torch.float32, attn_implementation="eager", **kwargs
    ).eval()
    tensors, records = {}, []
    for i, prompt in enumerate(PROMPTS):
        text = prompt
        if not isinstance(prompt, str):
            text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(ids).logits[0]
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=40,
                do_sample=False,
                eos_token_id=[0, 2],
                pad_token_id=2,
            )
        new = out[0, ids.shape[1] :].tolist()
        tensors[f"{i}.ids"] = ids[0].int()
        tensors[f"{i}.logits_every_64th"] = logits[:, ::64].contiguous()
        tensors[f"{i}.logsumexp"] = torch.logsumexp(logits, dim=-1)
        tensors[f"{i}.argmax"] = logits.argmax(dim=-1).int()
        reply = tokenizer.decode(new, skip_special_tokens=True)
        records.append({"prompt": prompt, "text": text, "new_ids": new, "reply": reply})
        print(repr(reply))
    metadata = {"records": json.dumps(records), "transformers": transformers.__version__}
    safetensors.torch.save_file(tensors, HERE / "smollm2.safetensors", metadata)


if __name__ == "__main__":
    for name, (model_type, overrides) in CASES.items():
        tiny(name, model_type, overrides)
    smollm2(pathlib.Path(sys.argv[1]).resolve())
