"""Fine-tune a Llama-like model on instructions with sparsity-accelerated steps, on megatron.core.

    torchrun --nproc-per-node 8 finetune_sat.py <settings of pretrain_sat.py> --sat-preset paper-sft

It is pretrain_sat.py with --sft: samples are windows of whole examples that tools/prepare_sft.py made, and loss is
taken on responses alone (docs/sft.md). Without a GPU the same command runs on the CPU.
"""

import sys

from megatron_sat import cpu, log

log.quiet_libraries()
cpu.install()  # before anything of megatron is imported; nothing with a GPU

from megatron_sat.pretrain import main

if __name__ == "__main__":
    sys.exit(main(["--sft", *sys.argv[1:]]))
