"""Plain Flax NNX models; they know nothing of quantization or of adapters.

The decoders of Llama, SmolLM2, Mistral, Qwen2, Qwen3, Gemma 2 and 3, Phi-3, OPT and GPT-NeoX:
  `llama.Llama`, `config.LlamaConfig`, `kv_cache.KVCache`.
The encoder-decoders of T5, FLAN-T5 and mT5:
  `t5.T5`, `t5_config.T5Config`, `t5.T5Cache`.
Either, from a `config.json`:
  `kinds.read_shape`, `kinds.abstract_model`.
"""
