#!/bin/bash
# Train on whole nodes of 8 GPUs, one process for each GPU:
#
#     sbatch --nodes=2 launch/slurm_process_per_gpu.sh --config.data.batch_per_device=1
#
# What stands after the script's name goes to train.py. Submit from the repository's
# root, on a file system that all nodes share. docs/multi_node.md lists the variables;
# not yet run on a cluster.

#SBATCH --job-name=swinsmt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8   # as many as the GPUs of a node
#SBATCH --gres=gpu:8          # all GPUs of the node, seen by every process of it
#SBATCH --cpus-per-task=12    # the node's cores / 8
#SBATCH --exclusive           # whole nodes: see "Parts of a node" in the docs
#SBATCH --time=48:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append    # a job that is started again adds to its log
#SBATCH --signal=TERM@180     # before the time is up: the run saves and ends with 75
#SBATCH --requeue
# Not --gpus-per-task: a process would see one GPU, number 0, and look for its own number.

set -euo pipefail

CONFIG=${CONFIG:-configs/swin_smt_paper.py}
WORKDIR=${WORKDIR:-runs/$(basename "$CONFIG" .py)} # on the shared file system
DATA=${DATA:-data/store} # made by preprocess.py
PYTHON=${PYTHON:-.venv/bin/python}

# Compiled programs, kept between runs. Process 0 alone writes them, so a folder that all
# nodes share serves all of them from the second start on.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/jax}
# Share of the GPU's memory that JAX takes at once; NCCL and the CUDA context need the
# rest. Lower it if NCCL runs out of memory.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}
# srun does not take over --cpus-per-task by itself since SLURM 22.05.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-12}

mkdir -p "$JAX_COMPILATION_CACHE_DIR"

for argument in "$@"; do
    case $argument in --workdir=*) WORKDIR=${argument#*=} ;; esac
done
# An older mark of a run that does not get as far as to remove it asks for nothing.
rm -f "$WORKDIR/requeue"

# --kill-on-bad-exit: when one process fails, the others wait for it; end them at once.
# --gpu-bind=none: some sites bind a GPU to each process unless told not to.
status=0
srun --kill-on-bad-exit=1 --gpu-bind=none \
    "$PYTHON" train.py \
    --distributed=auto \
    --config="$CONFIG" \
    --workdir="$WORKDIR" \
    --config.data.root="$DATA" \
    --config.data.num_threads="$SRUN_CPUS_PER_TASK" \
    "$@" || status=$?
# The run leaves this file where a signal ended it after it was saved: the job waits for
# its turn again. The status says less: srun's is that of a process that it killed.
if [ -e "$WORKDIR/requeue" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
