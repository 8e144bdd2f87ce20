"""Megatron's layers, able to compute with a part of their neurons: thin subclasses, dense parameters."""
