#!/bin/bash
# Two machines with eight GPUs each under Slurm:
#   sbatch recipes/accelerate/slurm.sh ppo RECIPE [key=value ...]
#   LAUNCH=recipes/accelerate/two_nodes_ddp.yaml sbatch recipes/accelerate/slurm.sh grpo RECIPE
# Where a job is requeued or resubmitted, it goes on from the newest checkpoint. Slurm sends SIGTERM a minute
# before the time is up, and launchers kill 30 s later: until then the run has to reach the end of the rollout, the scoring
# or the updates under way, and to write its checkpoint; else what came after run.checkpoint_every is lost.
#SBATCH --job-name=llmrl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@60
#SBATCH --requeue
set -euo pipefail

LAUNCH=${LAUNCH:-recipes/accelerate/two_nodes_zero3.yaml}
HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export LAUNCH HOST
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# One launcher a machine; each reads its own number where it runs.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c '
    exec accelerate launch --config_file "$LAUNCH" --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * 8)) \
        --machine_rank "$SLURM_NODEID" --main_process_ip "$HOST" -m llmrl "$@"
' llmrl "$@"
