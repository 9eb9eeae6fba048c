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

mark=$$-$RANDOM$RANDOM
setsid bash "$EXAMPLES/left_behind.sh" "$mark" $$ </dev/null >/dev/null &
export MHC_LAUNCH=$mark
exec "${TORCHRUN[@]}" "${LAUNCHER[@]}" "$PRETRAIN_SCRIPT" "${ARGUMENTS[@]}"
