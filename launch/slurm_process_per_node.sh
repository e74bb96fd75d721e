#!/bin/bash
# Train on nodes of 8 GPUs, one process for each node, which drives all its GPUs:
#
#     sbatch --nodes=2 launch/slurm_process_per_node.sh --config.data.batch_per_device=1
#
# What stands after the script's name goes to train.py. Submit from the repository's
# root, on a file system that all nodes share. docs/multi_node.md lists the variables;
# not yet run on a cluster.

#SBATCH --job-name=swinsmt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8          # for part of a node: fewer, and GPUS_PER_NODE the same
#SBATCH --cpus-per-task=96    # the node's cores
#SBATCH --time=48:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append    # a job that is started again adds to its log
#SBATCH --signal=TERM@180     # before the time is up: the run saves and ends with 75
#SBATCH --requeue

set -euo pipefail

CONFIG=${CONFIG:-configs/swin_smt_paper.py}
WORKDIR=${WORKDIR:-runs/$(basename "$CONFIG" .py)} # on the shared file system
DATA=${DATA:-data/store} # made by preprocess.py
PYTHON=${PYTHON:-.venv/bin/python}
GPUS_PER_NODE=${GPUS_PER_NODE:-8} # of this job, the same on every node
NUM_THREADS=${NUM_THREADS:-32}    # that read and cut crops, for all GPUs of the node

# Compiled programs, kept between runs. Process 0 alone writes them, so a folder that all
# nodes share serves all of them from the second start on.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/jax}
# Share of the GPU's memory that JAX takes at once; NCCL and the CUDA context need the
# rest. Lower it if NCCL runs out of memory.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}
# srun does not take over --cpus-per-task by itself since SLURM 22.05.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-96}

mkdir -p "$JAX_COMPILATION_CACHE_DIR"

# Without --local_device_ids the process would take the first GPU alone. They count from
# 0 among the GPUs that the process sees, whichever GPUs of the node these are.
DEVICE_IDS=$(seq -s, 0 $((GPUS_PER_NODE - 1)))

for argument in "$@"; do
    case $argument in --workdir=*) WORKDIR=${argument#*=} ;; esac
done
# An older mark of a run that does not get as far as to remove it asks for nothing.
rm -f "$WORKDIR/requeue"

# --kill-on-bad-exit: when one process fails, the others wait for it; end them at once.
status=0
srun --kill-on-bad-exit=1 \
    "$PYTHON" train.py \
    --distributed=auto \
    --local_device_ids="$DEVICE_IDS" \
    --config="$CONFIG" \
    --workdir="$WORKDIR" \
    --config.data.root="$DATA" \
    --config.data.num_threads="$NUM_THREADS" \
    "$@" || status=$?
# The run leaves this file where a signal ended it after it was saved: the job waits for
# its turn again. The status says less: srun's is that of a process that it killed.
if [ -e "$WORKDIR/requeue" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
