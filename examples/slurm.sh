#!/usr/bin/env bash
# Train one of the paper's models under Slurm, from the folder that holds examples/:
#     DATA_PATH=<prefix> TOKENIZER_MODEL=<tokenizer> sbatch --nodes 8 examples/slurm.sh 27b
# Every setting is an environment variable: README.md. DRY_RUN=1 bash examples/slurm.sh 27b checks them all, without Slurm.
#SBATCH --job-name=mhc
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
# sbatch runs a copy of this file: the examples are where it was submitted from.
if [[ -n ${SLURM_JOB_ID:-} ]]; then
    EXAMPLES=${EXAMPLES:-$SLURM_SUBMIT_DIR/examples}
    [[ -f $EXAMPLES/arguments.sh ]] ||
        { echo "mhc-megatron: no arguments.sh in $EXAMPLES: submit from the folder above examples/, or set EXAMPLES" >&2; exit 2; }
    export NNODES=$SLURM_JOB_NUM_NODES
    gpus=${SLURM_GPUS_PER_NODE:-8} # a number, or type:number
    export GPUS_PER_NODE=${GPUS_PER_NODE:-${gpus##*:}}
else
    EXAMPLES=${EXAMPLES:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)}
fi
export EXAMPLES
SIZE=${1:-}
: "${REQUEUE:=1}"
source "$EXAMPLES/arguments.sh"
one_of REQUEUE 0 1

# One task a node: each starts torchrun for its GPUs. A task that fails takes the others with it, so that the job ends at once
# instead of waiting for a communication timeout.
SRUN=(srun --nodes "$NNODES" --ntasks-per-node 1 --kill-on-bad-exit=1 --cpu-bind=none)
words srun_args "${SRUN_ARGS:-}"
SRUN+=("${srun_args[@]}")
if ((DRY_RUN)); then
    check_files
    dry_run "${SRUN[@]}" "$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$GPUS_PER_NODE" ...
    exit
fi
[[ -n ${SLURM_JOB_ID:-} ]] || fail "not under Slurm: submit it with sbatch --nodes $NNODES $0 $SIZE"

# The iteration of the newest checkpoint; 0 without one, and of one that is not of a run ("release").
latest() {
    local iteration=
    read -r iteration 2>/dev/null <"$CHECKPOINTS/latest_checkpointed_iteration.txt" || true
    [[ $iteration =~ ^[0-9]+$ ]] && echo "$((10#$iteration))" || echo 0
}

# Slurm itself requeues at a node's failure or preemption (#SBATCH --requeue).
((REQUEUE)) || scontrol update "JobId=$SLURM_JOB_ID" Requeue=0 ||
    echo "mhc-megatron: REQUEUE=0: Slurm may still requeue this job when a node fails, unless submitted with --no-requeue" >&2

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts%%$'\n'*} MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))} JOB_ID=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
export CHECKPOINTS
before=$(latest)
status=0
"${SRUN[@]}" bash -c 'NODE_RANK=$SLURM_NODEID exec bash "$EXAMPLES/torchrun.sh" "$0"' "$SIZE" || status=$?
after=$(latest)

# Back into the queue if there is more to train and this run got as far as a new checkpoint: one that did not would fail again.
if ((after < TRAIN_STEPS && after > before && REQUEUE)); then
    echo "mhc-megatron: exit status $status at iteration $after of $TRAIN_STEPS; requeued to go on from there"
    scontrol requeue "$SLURM_JOB_ID" ||
        echo "mhc-megatron: Slurm does not requeue it (sbatch --no-requeue?): submit it again to go on" >&2
fi
exit "$status"
