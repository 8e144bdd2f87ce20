"""Before megatron is imported: the CPU plays the GPU, and one thread so that ranks can be forked."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")  # transformers reads weights in threads: no OpenMP pool in forks

import torch

from megatron_sat import cpu

cpu.install()
torch.set_num_threads(1)  # no OpenMP pool may exist before a fork
