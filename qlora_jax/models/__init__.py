"""Plain Flax NNX models; they know nothing of quantization or of adapters.

The decoder family of Llama, SmolLM2, Mistral, Qwen2 and Qwen3:
  `llama.Llama`, `config.LlamaConfig`, `attention.KVCache`.
"""
