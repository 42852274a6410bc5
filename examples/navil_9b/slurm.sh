#!/usr/bin/env bash
# One phase on 8 nodes of 8 GPUs:   sbatch slurm.sh stage1_1.toml [section.field=value ...]
# Submitted again after a time limit or a lost node, it goes on from the newest checkpoint.
#SBATCH --job-name=navil
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --output=slurm-%j.log
set -euo pipefail

host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# One host thread a GPU feeds the loader and the kernels; more would fight over the cores.
export OMP_NUM_THREADS=1
# A rank that waits for a dead one fails instead of spinning; our watchdog reports who did not arrive.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
# The interface that the nodes share for the rendezvous; NCCL finds InfiniBand by itself.
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-^lo,docker0}

# SIGTERM, 5 minutes before the limit, reaches the ranks: they save and leave.
srun torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node 8 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$host:29500" \
    --max-restarts 0 \
    -m navil_megatron.pretrain "$@"
