#!/bin/bash
# Trains over 8 hosts of 8 GPUs with Slurm, one process per GPU (docs/pods.md says why, and what else can be set):
#
#   sbatch configs/clusters/slurm.sh configs/qwen3-30b-a3b.yaml --run-dir /shared/runs/mine \
#       --set data.source=/shared/text --set data.tokenizer=/shared/tokenizer.json
#
# All that follows the script is passed to `moe-jax train`, which must be on PATH on every host. The run directory is on a
# disk that all hosts see. Nodes x GPUs per node is the number of the mesh's devices.
#SBATCH --job-name=moe-jax
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=1-00:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

restarts=${RESTARTS:-3}                               # after a process has died or stood still
export MOE_JAX_CACHE=${MOE_JAX_CACHE:-$PWD/.moe-jax-cache} # compiled programs, for all hosts and all restarts

# Five minutes before the time limit Slurm warns this shell. The processes save one step and end; the job then waits in the
# queue again, and goes on from that step.
time_is_up=
save_and_end() {
    time_is_up=yes
    scancel --signal=TERM "$SLURM_JOB_ID" # to the processes, not to this shell
}
trap save_and_end USR1

attempt=0
while [[ ! $time_is_up ]]; do
    srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 --wait=120 \
        moe-jax train "$@" --resume &
    step=$!
    wait "$step"
    code=$?
    if [[ $time_is_up ]]; then # the signal has ended that wait
        wait "$step"
    elif ((code == 0 || code == 2 || attempt++ == restarts)); then
        exit "$code" # done, or stopped by someone; a mistake, which another try would repeat; too many deaths
    else
        echo "moe-jax ended with exit code $code: restart $attempt of $restarts" >&2
        sleep 10
    fi
done
scontrol requeue "$SLURM_JOB_ID"
