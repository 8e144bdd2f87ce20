"""Llama-like models out of Megatron's parts and the sparse layers, their shapes and their cost."""
