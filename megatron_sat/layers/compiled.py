"""What torch compiles, it compiles for the shapes of each rung.

Megatron compiles SwiGLU and the like. By itself torch takes a second shape for one of many to come and compiles for any
shape; such a kernel is several times slower (SwiGLU's backward at half the channels: 1.56 ms where the dense one takes
0.67, H100). A run has few shapes, one a rung, so each gets its own kernel.
"""

import torch._dynamo

SHAPES = 64
"""Kernels of one function that may be compiled before torch stops compiling it."""


def install() -> None:
    """Compile for each shape from here on. For training: who meets shapes without end must not call it."""
    config = torch._dynamo.config
    config.automatic_dynamic_shapes = False
    for name in ("recompile_limit", "cache_size_limit"):  # torch 2.7 renamed it
        if hasattr(config, name):
            setattr(config, name, max(getattr(config, name), SHAPES))
