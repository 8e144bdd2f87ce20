"""The method as mathematics on tensors: neurons, importance, selection, schedule. torch only, no Megatron."""
