#!/usr/bin/env bash
# One rank under srun: what torchrun would say in the environment, from what Slurm says there. No torchrun in between, so
# the signal that Slurm sends before the time is over (#SBATCH --signal) reaches the rank itself.
set -euo pipefail
for name in SLURM_PROCID SLURM_LOCALID SLURM_NTASKS MASTER_ADDR MASTER_PORT; do
    [ -n "${!name:-}" ] || { echo "slurm_rank.sh: $name must be set, as srun and library.sh do; use sbatch" >&2; exit 2; }
done
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
# 8, or 8(x4): tasks on this host
tasks=${SLURM_STEP_TASKS_PER_NODE:-${SLURM_TASKS_PER_NODE:-$SLURM_NTASKS}}
export LOCAL_WORLD_SIZE=${tasks%%[(,]*}
exec "$@"
