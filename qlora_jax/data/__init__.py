"""Records, tokenizers, loss masks, packing and batches."""
