"""Makes the golden files of the encoder-decoder; needs torch and transformers.

    python tests/golden/make_t5.py

Writes `t5_<case>.safetensors`: a tiny random model (config, weights), source and target ids with
padding, logits (also in bfloat16), the loss, one gradient of it and the greedy continuation; and
`peft_t5`, an adapter of PEFT on the first model, with its logits. Needs peft, too.
"""

import copy
import json
import pathlib

import numpy as np
import peft
import safetensors.torch
import torch
import transformers

HERE = pathlib.Path(__file__).parent
SMALL = dict(
    vocab_size=64,
    d_model=32,
    d_kv=8,
    d_ff=24,
    num_layers=2,
    num_decoder_layers=3,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=16,
    decoder_start_token_id=0,
)
CASES = {
    # FLAN-T5 and T5 1.1, T5 1.0 (tied, scaled, ReLU), mT5.
    "gated": ("t5", dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "classic": ("t5", dict(feed_forward_proj="relu")),
    "mt5": ("mt5", dict(num_decoder_layers=2)),
}
SOURCE_LENGTHS = (23, 11)


def main() -> None:
    for name, (model_type, overrides) in CASES.items():
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(model_type, **{**SMALL, **overrides})
        config._attn_implementation = "eager"
        model = transformers.AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32).eval()
        tied = name == "classic"
        if not tied:  # transformers 5 ties new models; the published ones have heads of their own
            model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
        with torch.no_grad():
            for key, value in model.named_parameters():
                norm, bias = "norm" in key, "relative" in key
                value.normal_(1.0 if norm else 0.0, 1.0 if bias else 0.2)
        source = torch.randint(2, config.vocab_size, (2, max(SOURCE_LENGTHS)))
        mask = torch.tensor([[i < n for i in range(max(SOURCE_LENGTHS))] for n in SOURCE_LENGTHS])
        source, mask = source * mask, mask.long()
        target = torch.randint(2, config.vocab_size, (2, 21))
        out = model(input_ids=source, attention_mask=mask, labels=target)
        # The bias table is what all distances go through.
        out.loss.backward()
        with torch.no_grad():
            in_bfloat16 = copy.deepcopy(model).bfloat16()(
                input_ids=source, attention_mask=mask, labels=target
            )
            new = model.generate(
                input_ids=source,
                attention_mask=mask,
                max_new_tokens=24,
                do_sample=False,
                eos_token_id=None,
                use_cache=False,  # its cache has as many layers as the encoder
            )
        tensors = {k: v.contiguous().clone() for k, v in model.state_dict().items()}
        for key in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
            del tensors[key]
        if tied:
            del tensors["lm_head.weight"]
        gradient = model.encoder.block[1].layer[0].SelfAttention.q.weight.grad
        tensors |= {
            "golden.source": source.int(),
            "golden.source_mask": mask.int(),
            "golden.target": target.int(),
            "golden.logits": out.logits.detach(),
            "golden.logits_bfloat16": in_bfloat16.logits.float(),
            "golden.loss": out.loss.detach().reshape(1),
            "golden.greedy": new[:, 1:].int(),
            "golden.gradient_of_q": gradient.contiguous(),
        }
        values = config.to_dict()
        if not tied:
            values["tie_word_embeddings"] = False  # as the published files say it
            values.pop("scale_decoder_outputs", None)
        metadata = {"config": json.dumps(values), "transformers": transformers.__version__}
        safetensors.torch.save_file(tensors, HERE / f"t5_{name}.safetensors", metadata)
        if name == "gated":
            adapter(model, dict(input_ids=source, attention_mask=mask, labels=target))
        print(name, out.loss.item(), out.logits.abs().max().item(), new[0].tolist())


def adapter(model: torch.nn.Module, inputs: dict) -> None:
    """LoRA on every linear layer but the head."""
    config = peft.LoraConfig(
        task_type="SEQ_2_SEQ_LM",
        r=4,
        lora_alpha=4,
        target_modules=["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    )
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for key, value in adapted.named_parameters():
            if "lora_" in key:
                value.normal_(0.0, 0.1)
        logits = adapted.eval()(**inputs).logits
    adapted.save_pretrained(HERE / "peft_t5")
    (HERE / "peft_t5" / "README.md").unlink()
    np.savez_compressed(HERE / "peft_t5" / "logits.npz", logits=logits.numpy())


if __name__ == "__main__":
    main()
