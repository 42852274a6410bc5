#!/usr/bin/env bash
# One phase on 8 nodes of 8 GPUs:   sbatch slurm.sh stage1_1.toml [section.field=value ...]
# A lost node or the time limit puts the job back into the queue, and it goes on from its newest checkpoint. What dies
# and what happens then: docs/multi_node.md.
#SBATCH --job-name=navil
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@600
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail

host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# One host thread a GPU feeds the loader and the kernels; more would fight over the cores.
export OMP_NUM_THREADS=1
# The interface that the nodes share for the rendezvous; NCCL finds InfiniBand by itself.
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-^lo,docker0}
# After SIGTERM torchrun kills its ranks 30 seconds later if not told otherwise (torch >= 2.12): a save takes longer.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=540
# Each round of a rendezvous makes its own store: what an earlier one left would mislead ranks that start again.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# 10 minutes before the limit this shell alone is told (B:). It passes SIGTERM on to the ranks, which save and leave.
# Not SIGTERM to this shell: that is what scancel sends, and a job that was cancelled must not come back.
limit_is_near=
trap 'limit_is_near=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

# Ranks that fail or hang start again in place, 3 times; when an agent ends all the same, so does the step.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node 8 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$host:29500" \
    --max-restarts 3 \
    -m navil_megatron.pretrain "$@" &
status=0
wait $! || status=$?
if [[ -n $limit_is_near ]]; then  # the trap ended the wait, and the ranks are saving
    status=0
    wait $! || status=$?
fi
# torchrun ends with 1 when it was asked to stop; 0 says that the last step was done.
if [[ -n $limit_is_near && $status != 0 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
