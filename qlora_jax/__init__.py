"""QLoRA for JAX and Flax: a frozen 4-bit base, LoRA adapters, any pytree."""
