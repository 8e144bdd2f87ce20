"""Checkpoints: what a run needs to go on, in megatron.core's distributed format."""
