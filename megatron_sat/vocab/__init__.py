"""New pieces for an old tokenizer, and new rows for its model, with proofs that nothing else changed."""
