"""Sparsity-Accelerated Training of large language models on megatron.core."""
