"""Records, tokenizers, loss masks, packing and batches.

From a file to a batch:

    records = load_records("train.jsonl")
    train, heldout = split(records, eval_fraction=0.1, seed=0)
    examples = tokenize_records(train, tokenizer, max_len=512)
    batches = BatchIterator(examples, batch_size=1, seq_len=512, grad_accum=16, seed=0)

or, for what is large, or read more than once,

    found = load_tokenized("train.jsonl", "auto", tokenizer, cache_dir=folder, max_len=512)
    examples = Examples([found.table])
    train, heldout = map(examples.take, split(range(len(examples)), eval_fraction=0.1, seed=0))
"""
# ruff: noqa: I001 (the order is that of the table of contents, not the alphabet)

# Reading: files of one's own, and the published sets by name
from qlora_jax.data.formats import Record as Record
from qlora_jax.data.records import load_records as load_records
from qlora_jax.data.report import DataReport as DataReport
from qlora_jax.data.sets import SETS as SETS
from qlora_jax.data.sets import InstructionSet as InstructionSet
from qlora_jax.data.tfds_oasst import build_oasst as build_oasst

# Several sets, duplicates, overlap
from qlora_jax.data.mixture import parse_mixture as parse_mixture
from qlora_jax.data.mixture import repeat as repeat
from qlora_jax.data.overlap import drop_duplicates as drop_duplicates
from qlora_jax.data.overlap import measure_overlap as measure_overlap

# Tokens and loss masks
from qlora_jax.data.chat_formats import CHAT_FORMATS as CHAT_FORMATS
from qlora_jax.data.chat_formats import ChatFormat as ChatFormat
from qlora_jax.data.masking import Example as Example
from qlora_jax.data.masking import tokenize_records as tokenize_records
from qlora_jax.data.tokenizer import Tokenizer as Tokenizer
from qlora_jax.data.token_cache import load_tokenized as load_tokenized

# Batches
from qlora_jax.data.batches import Batch as Batch
from qlora_jax.data.batches import BatchIterator as BatchIterator
from qlora_jax.data.batches import eval_batches as eval_batches
from qlora_jax.data.example_arrays import Examples as Examples
from qlora_jax.data.row_order import split as split

# Looking at it
from qlora_jax.data.display import colored_tokens as colored_tokens
from qlora_jax.data.stats import DataStats as DataStats
from qlora_jax.data.stats import summarize as summarize
