"""Shapes of a rung get kernels of their own."""

import pytest
import torch._dynamo

from megatron_sat.layers import compiled


def test_from_here_on_each_shape_is_compiled_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    config = torch._dynamo.config
    limit = next(name for name in ("recompile_limit", "cache_size_limit") if hasattr(config, name))
    with config.patch({"automatic_dynamic_shapes": True, limit: 8}):
        compiled.install()
        assert not config.automatic_dynamic_shapes
        assert getattr(config, limit) == compiled.SHAPES
        setattr(config, limit, 1000)
        compiled.install()
        assert getattr(config, limit) == 1000
