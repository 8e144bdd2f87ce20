#!/usr/bin/env bash
#SBATCH --job-name=sat-llama2-7b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --time=48:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
# Continual pre-training of Llama-2-7B with the paper's settings, on 32 GPUs (docs/launching.md):
#
#     MODEL=imported DATA="zh=data/zh" SAVE=runs/zh sbatch examples/pretrain_llama2_7b.sh [settings of pretrain_sat.py]
#     DRY_RUN=1 examples/pretrain_llama2_7b.sh       # says configuration, plan, memory, commands; needs nothing of that
#
# The variables, and the ways to start without Slurm: examples/launch/library.sh.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ -f "$here/launch/library.sh" ] || here=${SLURM_SUBMIT_DIR:-.}/examples # sbatch runs a copy of this file
[ -f "$here/launch/library.sh" ] || { echo "pretrain_llama2_7b.sh: run sbatch in the repository's root" >&2; exit 2; }
# shellcheck source=/dev/null
. "$here/launch/library.sh"
train "$here/configs/llama2_7b.yaml" "$@"
