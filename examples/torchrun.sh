#!/usr/bin/env bash
# Train one of the paper's models: on each of NNODES nodes,
#     MASTER_ADDR=<first node> NODE_RANK=<0 to NNODES - 1> DATA_PATH=<prefix> TOKENIZER_MODEL=<tokenizer> examples/torchrun.sh 27b
# Every setting is an environment variable: README.md. DRY_RUN=1 checks them all and starts nothing.
set -euo pipefail
EXAMPLES=${EXAMPLES:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)}
SIZE=${1:-}
source "$EXAMPLES/arguments.sh"
check_files

: "${MASTER_PORT:=29500}" "${JOB_ID:=mhc-$SIZE}" "${NODE_RANK:=0}"
whole NODE_RANK 0
whole MASTER_PORT 1
((NODE_RANK < NNODES)) || fail "NODE_RANK=$NODE_RANK must be less than NNODES=$NNODES"
TORCHRUN=("$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$GPUS_PER_NODE" --max-restarts "$MAX_RESTARTS")
# Restarted workers would find the dead ones' addresses in torchrun's store (pytorch/pytorch#135712): a store for each attempt.
((MAX_RESTARTS == 0)) || export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
if ((NNODES == 1)); then
    TORCHRUN+=(--standalone)
else
    [[ -n ${MASTER_ADDR:-} || $DRY_RUN == 1 ]] ||
        fail "MASTER_ADDR is not set: with NNODES=$NNODES give the address of the node that has NODE_RANK=0"
    ((NODE_RANK == 0)) && host=true || host=false
    TORCHRUN+=(--rdzv-backend c10d --rdzv-id "$JOB_ID" --rdzv-endpoint "${MASTER_ADDR:-MASTER_ADDR}:$MASTER_PORT" --rdzv-conf "is_host=$host")
fi

if ((DRY_RUN)); then
    dry_run "${TORCHRUN[@]}"
    exit
fi
complete
mkdir -p "$CHECKPOINTS" || fail "CHECKPOINTS: can't make the folder $CHECKPOINTS"

# A rank that is killed leaves the processes that it had started, after its first save Megatron's helper for checkpoints. They never
# end, and hold this script's output open. Beside torchrun a shell waits for its end, and ends what is still there a little later.
export MHC_LAUNCH=$$-$RANDOM$RANDOM
left_behind() {
    local environment id
    for environment in $(grep -lsxz "MHC_LAUNCH=$MHC_LAUNCH" /proc/[0-9]*/environ); do
        id=${environment//[!0-9]/}
        [[ -d /proc/$id ]] && echo "$id" # not the search itself
    done
}
(
    set +e
    trap '' INT TERM HUP
    while kill -0 $$ 2>/dev/null; do sleep 1; done
    for signal in TERM KILL; do
        [[ -n $(left_behind) ]] && sleep 5
        ids=$(left_behind)
        [[ -z $ids ]] && break
        echo "mhc-megatron: SIG$signal to what the job has left behind:" $ids >&2
        kill -"$signal" $ids 2>/dev/null
    done
) </dev/null >/dev/null &
exec "${TORCHRUN[@]}" "${LAUNCHER[@]}" "$PRETRAIN_SCRIPT" "${ARGUMENTS[@]}"
