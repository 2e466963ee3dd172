#!/bin/bash
# A preset on SLURM: a Ray cluster inside one allocation, 2 nodes with 4 GPUs each. Needed: the repository with its .venv
# (`make train`) and the runs on a disk that all nodes see. Sized by arithmetic, not run: docs/cluster.md has the sums.
#   sbatch configs/cluster/slurm.sh configs/presets/dialogue_qwen2.5_3b.yaml
#   sbatch --constraint=a100_80gb configs/cluster/slurm.sh configs/presets/dialogue_llama3_8b.yaml
#SBATCH --job-name=r2m
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --mem=240G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=r2m-%j.log
# A minute before the end of its time the job is put back into the line. The run goes on from its newest checkpoint then.
#SBATCH --signal=B:USR1@60
set -euo pipefail

config=${1:?name a config, for example configs/presets/dialogue_qwen2.5_3b.yaml}
shift
home=${R2M_HOME:-$SLURM_SUBMIT_DIR}
shared=${R2M_SHARED:-$home}
port=$((20000 + SLURM_JOB_ID % 20000))
export PATH="$home/.venv/bin:$PATH" OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error
export HF_HOME="${HF_HOME:-$shared/huggingface}" R2M_CACHE="${R2M_CACHE:-$shared/r2m-cache}"
cd "$home"

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')

# `--block` keeps each step of the job alive as long as its Ray. A node of a preemptible partition would get the label spot.
start=(--num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="$SLURM_GPUS_ON_NODE" --labels="ray.io/market-type=${R2M_MARKET:-on-demand}" --block)
srun --nodes=1 --ntasks=1 --nodelist="$head" \
  ray start --head --node-ip-address="$address" --port="$port" --include-dashboard=false "${start[@]}" &
others=$((SLURM_JOB_NUM_NODES - 1))
if ((others > 0)); then
  # shellcheck disable=SC2016  # the shell of each node expands this
  srun --nodes="$others" --ntasks="$others" --exclude="$head" \
    bash -c 'until (: < "/dev/tcp/$1/$2") 2> /dev/null; do sleep 1; done; exec ray start --address="$1:$2" "${@:3}"' \
    _ "$address" "$port" "${start[@]}" &
fi

# shellcheck disable=SC2317,SC2329  # the trap below calls it
requeue() {
  echo "the time of the job ends: it is put back into the line"
  kill -TERM "$run" && wait "$run" || true
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}
export RAY_ADDRESS=$address:$port
until (: < "/dev/tcp/$address/$port") 2> /dev/null; do sleep 1; done
gpus=$((SLURM_GPUS_ON_NODE * SLURM_JOB_NUM_NODES))
r2m train "$config" cluster.gpus="$gpus" cluster.wait=600 checkpoint.every=5 run.output_dir="$shared/runs" \
  logging.live=false "$@" --resume-if-exists &
run=$!
trap requeue USR1
status=0
wait "$run" || status=$?
exit "$status"
