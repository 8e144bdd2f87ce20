"""SAT inside a training with Hugging Face's transformers: `sparsify`, and a callback for its Trainer."""

from megatron_sat.hf.callback import SatCallback
from megatron_sat.hf.model import SparseModel, sparsify

__all__ = ["SatCallback", "SparseModel", "sparsify"]
