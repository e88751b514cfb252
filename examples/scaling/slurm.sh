#!/bin/bash
# Chains over the GPUs of several nodes: one task a node, which starts a process for each GPU.
# From the folder of this file: sbatch slurm.sh [options of chains.py]
#SBATCH --job-name=chains
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# A run that is told to stop writes a checkpoint; put back in the queue, it is resumed.
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail
# sbatch runs a copy of this file from elsewhere.
cd "$SLURM_SUBMIT_DIR"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$head:29500" \
    --rdzv-id "$SLURM_JOB_ID" \
    chains.py "$@"
