"""From text to micro-batches: tokenizer, preparation of .bin/.idx, blends of named domains, batches of a
rank."""
