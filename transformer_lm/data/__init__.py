"""From a source to batches: corpora, cleaning, tokenizer training, packed rows, batches."""
