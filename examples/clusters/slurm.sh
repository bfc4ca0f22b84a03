#!/bin/bash
# One task a node, with all of its GPUs: `sbatch examples/clusters/slurm.sh RUN --model ... --fsdp`.
# With a task a GPU instead (--ntasks-per-node=8), each computes on the GPU of its own number.
#SBATCH --job-name=jhessians
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=jhessians-%j.log

set -euo pipefail

# The tasks find each other through SLURM's own variables. RUN lies on a disk that all nodes share.
# A node that fails ends the others within a minute (--kill-on-bad-exit does it for srun's part),
# and the job, begun again, goes on with what was saved.
srun --kill-on-bad-exit=1 --label jhessians compute "$@" --resume
