"""Pre-train a Llama-like model or GPT-2, or go on with it, with sparsity-accelerated steps, on megatron.core.

    torchrun --nproc-per-node 8 pretrain_sat.py <Megatron-LM's flags> --sat-schedule ladder --sat-omission-rate 0.5 ...

`--help` lists every flag; `--config FILE.yaml` takes the same keys. Without a GPU the same command runs on the CPU.
"""

import sys

from megatron_sat import cpu, log

log.quiet_libraries()
cpu.install()  # before anything of megatron is imported; nothing with a GPU

from megatron_sat.pretrain import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
