"""Models in and out of Hugging Face's format, with the proof that they stayed the same."""
