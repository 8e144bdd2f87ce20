"""Llama-like models and GPT-2 out of Megatron's parts and the sparse layers, their shapes and their cost."""
