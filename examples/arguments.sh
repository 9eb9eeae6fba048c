# Sourced by torchrun.sh and slurm.sh: settings from the environment -> checked -> the Megatron command line.
#
# The models are those of table 5 of the paper (arXiv 2512.24880). Three things are not in it and were derived from its
# parameter counts, which they reproduce to every printed digit: queries without a low-rank step (no --q-lora-rank), a
# dense first layer as wide as the 8 experts that are active elsewhere, and "active" counting the output layer, not the
# embedding.

# fail MESSAGE: say what is wrong with which variable, and stop.
fail() {
    echo "mhc-megatron: $*" >&2
    exit 2
}

# whole VARIABLE LOWEST: the variable is a whole number >= LOWEST.
whole() {
    [[ ${!1} =~ ^(0|[1-9][0-9]*)$ ]] && ((${!1} >= $2)) || fail "$1 must be a whole number >= $2, got '${!1}'"
}

# one_of VARIABLE CHOICE...
one_of() {
    local name=$1 choice
    shift
    for choice; do [[ ${!name} == "$choice" ]] && return; done
    fail "$name must be one of: $*; got '${!name}'"
}

# count_chunks LAYOUT: of a --pipeline-model-parallel-layout, as Megatron reads it: (X)*N and |*N are repeated.
count_chunks() {
    local rest=$1 repeated i
    while [[ $rest =~ ^(.*)\(([^()]+)\)\*([0-9]+)(.*)$ || $rest =~ ^(.*)(\|)\*([0-9]+)(.*)$ ]]; do
        repeated=
        for ((i = 0; i < BASH_REMATCH[3]; i++)); do repeated+=${BASH_REMATCH[2]}; done
        rest=${BASH_REMATCH[1]}$repeated${BASH_REMATCH[4]}
    done
    rest=${rest//[^|]/}
    echo $((${#rest} + 1))
}

# words ARRAY TEXT: split at spaces and line ends. Quotes and backslashes are characters like any other.
words() {
    read -r -d '' -a "$1" <<<"$2" || true # it wants a zero byte at the end, and finds none
}

[[ -n ${SIZE:-} ]] || fail "name a model: $0 3b | 9b | 27b"
[[ -f $EXAMPLES/models/$SIZE.sh ]] ||
    fail "no model '$SIZE': there is $(cd "$EXAMPLES/models" && echo *.sh | sed 's/\.sh//g') in $EXAMPLES/models"
asked_vpp=${VPP:-}
# shellcheck source=models/27b.sh
source "$EXAMPLES/models/$SIZE.sh"

# --- Settings and their defaults: 8 nodes of 8 H100-80GB. README.md has the list. ---------------------------------------
: "${PYTHON:=python}" "${CPU:=0}" "${DRY_RUN:=0}"
: "${NNODES:=8}" "${GPUS_PER_NODE:=8}" "${TP:=1}" "${CP:=1}" "${ETP:=1}" "${PIPELINE_LAYOUT:=}"
: "${MICROBATCH_GROUP:=$PP}"
: "${SEQ_LEN:=4096}" "${VOCAB_SIZE:=129280}"
: "${MODE:=mhc}" "${STREAMS:=4}" "${SINKHORN_ITERATIONS:=20}" "${MHC_INIT:=preserve}" "${MHC_BACKEND:=auto}"
: "${PIPELINE_COMM:=auto}" "${PIPELINE_TRANSPORT:=auto}" "${MONITOR_INTERVAL:=100}"
: "${RECOMPUTE:=none}" "${MHC_RECOMPUTE:=auto}" "${GRADIENT_ACCUMULATION_FUSION:=0}"
: "${MOCK_DATA:=0}" "${DATA_PATH:=}" "${SPLIT:=99,1,0}" "${TOKENIZER_TYPE:=HuggingFaceTokenizer}" "${TOKENIZER_MODEL:=}"
: "${CHECKPOINTS:=$PWD/checkpoints/$SIZE-$MODE}" "${SAVE_INTERVAL:=500}" "${DATA_CACHE:=$CHECKPOINTS/data-cache}"
: "${LOG_INTERVAL:=10}" "${EVAL_INTERVAL:=1000}" "${EVAL_ITERS:=10}" "${TENSORBOARD:=}" "${EXIT_AFTER_MINUTES:=}"
: "${TIMEOUT_MINUTES:=10}" "${MAX_RESTARTS:=0}" "${EXTRA_ARGS:=}"
: "${PRETRAIN_SCRIPT:=${MEGATRON:+$MEGATRON/pretrain_gpt.py}}"

for name in NNODES GPUS_PER_NODE TP CP PP VPP EP ETP MICRO_BATCH GLOBAL_BATCH SEQ_LEN NUM_LAYERS TRAIN_STEPS VOCAB_SIZE \
    MICROBATCH_GROUP STREAMS SINKHORN_ITERATIONS SAVE_INTERVAL LOG_INTERVAL EVAL_INTERVAL TIMEOUT_MINUTES; do
    whole "$name" 1
done
whole EVAL_ITERS 0
whole MONITOR_INTERVAL 0
whole MAX_RESTARTS 0
[[ -z $EXIT_AFTER_MINUTES ]] || whole EXIT_AFTER_MINUTES 1
[[ $LEARNING_RATE =~ ^([0-9]+\.?|[0-9]*\.[0-9]+)([eE][-+]?[0-9]+)?$ && ${LEARNING_RATE%%[eE]*} =~ [1-9] ]] || fail "LEARNING_RATE must be a positive number, got '$LEARNING_RATE'"
one_of MODE residual hc mhc
one_of MHC_INIT preserve paper
one_of MHC_BACKEND auto triton reference
one_of PIPELINE_COMM auto wide split wide-stock
one_of PIPELINE_TRANSPORT auto nccl copy-engine
one_of RECOMPUTE none selective full
one_of MHC_RECOMPUTE auto 0 1
for name in CPU DRY_RUN MOCK_DATA GRADIENT_ACCUMULATION_FUSION; do one_of "$name" 0 1; done

# The paper warms up for 2000 steps; a shorter run for a tenth of it.
((TRAIN_STEPS >= 20000)) && warmup=2000 || warmup=$((TRAIN_STEPS / 10))
: "${WARMUP_STEPS:=$warmup}"
whole WARMUP_STEPS 0
((WARMUP_STEPS < TRAIN_STEPS)) || fail "WARMUP_STEPS=$WARMUP_STEPS must be less than TRAIN_STEPS=$TRAIN_STEPS"

# --- Layout ------------------------------------------------------------------------------------------------------------
WORLD_SIZE=$((NNODES * GPUS_PER_NODE))
((WORLD_SIZE % (TP * CP * PP) == 0)) ||
    fail "$NNODES nodes x $GPUS_PER_NODE GPUs = $WORLD_SIZE are not a multiple of TP x CP x PP = $TP x $CP x $PP;" \
        "change NNODES, GPUS_PER_NODE or one of the three"
((WORLD_SIZE % (ETP * EP * PP) == 0)) ||
    fail "$NNODES nodes x $GPUS_PER_NODE GPUs = $WORLD_SIZE are not a multiple of ETP x EP x PP = $ETP x $EP x $PP;" \
        "lower EP=$EP or PP=$PP"
DP=$((WORLD_SIZE / (TP * CP * PP)))
for ((i = 0; i < ${#MODEL[@]}; i++)); do [[ ${MODEL[i]} == --num-experts ]] && experts=${MODEL[i + 1]}; done
((experts % EP == 0)) || fail "$experts experts are not divisible by EP=$EP; choose a divisor of $experts"
((GLOBAL_BATCH % (MICRO_BATCH * DP) == 0)) ||
    fail "GLOBAL_BATCH=$GLOBAL_BATCH is not a multiple of MICRO_BATCH x data-parallel size = $MICRO_BATCH x $DP"
microbatches=$((GLOBAL_BATCH / (MICRO_BATCH * DP)))

PIPELINE=(--pipeline-model-parallel-size "$PP")
if [[ -n $PIPELINE_LAYOUT ]]; then
    [[ $PIPELINE_LAYOUT =~ ^[EtmL0-9\|\(\)*,]+$ ]] ||
        fail "PIPELINE_LAYOUT=$PIPELINE_LAYOUT is no layout: E, t, m and L (embedding, layers, MTP, loss), | between chunks, *N, ()"
    chunks=$(count_chunks "$PIPELINE_LAYOUT")
    ((chunks % PP == 0)) || fail "PIPELINE_LAYOUT=$PIPELINE_LAYOUT has $chunks chunks, not a multiple of PP=$PP"
    VPP=$((chunks / PP))
    [[ -z $asked_vpp || $asked_vpp == "$VPP" ]] ||
        fail "PIPELINE_LAYOUT=$PIPELINE_LAYOUT has $VPP chunks for each of PP=$PP stages, but VPP=$asked_vpp; leave VPP out"
    PIPELINE+=(--pipeline-model-parallel-layout "$PIPELINE_LAYOUT")
else
    if ((NUM_LAYERS % (PP * VPP) != 0)); then
        # Megatron can count the embedding and the loss as a layer each.
        (((NUM_LAYERS + 2) % (PP * VPP) == 0)) ||
            fail "NUM_LAYERS=$NUM_LAYERS can't be split into PP x VPP = $PP x $VPP equal chunks, nor can NUM_LAYERS + 2 (with" \
                "the embedding and the loss); change PP or VPP, or set PIPELINE_LAYOUT (--pipeline-model-parallel-layout)"
        PIPELINE+=(--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split)
    fi
    ((VPP == 1)) || PIPELINE+=(--num-virtual-stages-per-pipeline-rank "$VPP")
fi
((VPP > 1 || MICROBATCH_GROUP == PP)) ||
    fail "MICROBATCH_GROUP=$MICROBATCH_GROUP is of an interleaved pipeline: set VPP to 2 or more, or leave it out"
if ((VPP > 1)); then
    ((PP > 1)) || fail "VPP=$VPP needs a pipeline: set PP to 2 or more, or VPP=1"
    ((MICROBATCH_GROUP != PP || microbatches % PP == 0)) ||
        fail "VPP=$VPP needs a number of microbatches that is a multiple of PP=$PP; GLOBAL_BATCH=$GLOBAL_BATCH makes $microbatches"
    rest=$((microbatches % MICROBATCH_GROUP))
    ((MICROBATCH_GROUP >= PP && MICROBATCH_GROUP <= microbatches && (rest == 0 || rest >= PP))) ||
        fail "MICROBATCH_GROUP=$MICROBATCH_GROUP must be from PP=$PP to the $microbatches microbatches, and must not leave a last" \
            "group of fewer than PP"
    # Groups larger than PP leave transfers of the warm-up time, which this flag then uses.
    ((MICROBATCH_GROUP == PP)) || PIPELINE+=(
        --microbatch-group-size-per-virtual-pipeline-stage "$MICROBATCH_GROUP" --overlap-p2p-communication-warmup-flush
    )
fi

# --- Data and tokenizer ------------------------------------------------------------------------------------------------
blend=()
if ((MOCK_DATA)); then
    DATA=(--mock-data)
    TOKENIZER_TYPE=NullTokenizer
else
    words blend "$DATA_PATH" # one prefix, or weight prefix weight prefix ...
    [[ -n ${blend[*]} ]] ||
        fail "DATA_PATH is not set: the path prefix of a Megatron indexed dataset (PREFIX.bin, PREFIX.idx), or MOCK_DATA=1"
    DATA=(--data-path "${blend[@]}" --split "$SPLIT" --data-cache-path "$DATA_CACHE")
fi
case $TOKENIZER_TYPE in
NullTokenizer) TOKENIZER=(--tokenizer-type NullTokenizer --vocab-size "$VOCAB_SIZE") ;; # the data are token numbers already
*)
    [[ -n $TOKENIZER_MODEL ]] ||
        fail "TOKENIZER_MODEL is not set: the file, folder or Hugging Face name of a $TOKENIZER_TYPE; TOKENIZER_TYPE=NullTokenizer" \
            "needs none"
    TOKENIZER=(--tokenizer-type "$TOKENIZER_TYPE" --tokenizer-model "$TOKENIZER_MODEL")
    ;;
esac

# check_files: data and tokenizer are there. Only where they will be read: a batch script may run outside of the nodes' container.
check_files() {
    local prefix suffix
    for prefix in "${blend[@]}"; do
        [[ ! $prefix =~ ^[0-9.]+$ ]] || continue
        for suffix in bin idx; do
            [[ -f $prefix.$suffix ]] ||
                fail "DATA_PATH: $prefix.$suffix does not exist; give the prefix of PREFIX.bin and PREFIX.idx, or MOCK_DATA=1"
            [[ -s $prefix.$suffix ]] || fail "DATA_PATH: $prefix.$suffix is empty; make the dataset again"
        done
    done
    [[ $TOKENIZER_TYPE != NullTokenizer ]] || return 0
    # Another Hugging Face tokenizer is a name.
    if [[ $TOKENIZER_TYPE != HuggingFaceTokenizer || $TOKENIZER_MODEL == /* || $TOKENIZER_MODEL == .* ]]; then
        [[ -e $TOKENIZER_MODEL ]] || fail "TOKENIZER_MODEL: $TOKENIZER_MODEL does not exist"
    fi
}

# --- What the sizes have in common ---------------------------------------------------------------------------------------
MODEL+=(
    --num-layers "$NUM_LAYERS" --moe-layer-freq "[0]*1+[1]*$((NUM_LAYERS - 1))"
    --seq-length "$SEQ_LEN" --max-position-embeddings "$SEQ_LEN" --padded-vocab-size "$VOCAB_SIZE"
    --multi-latent-attention --kv-lora-rank 512 --qk-head-dim 128 --qk-pos-emb-head-dim 64 --v-head-dim 128
    --position-embedding-type rope --rope-type rope --rotary-base 10000 --no-rope-fusion
    --normalization RMSNorm --norm-epsilon 1e-20 --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --hidden-dropout 0 --attention-dropout 0 --init-method-std 0.02
    --moe-router-topk 6 --moe-router-score-function sigmoid --moe-router-dtype fp32
    --moe-router-load-balancing-type none --moe-router-enable-expert-bias --moe-router-bias-update-rate 1e-3
    --moe-token-dispatcher-type alltoall
)
# The paper lowers the rate to 0.316 of its peak after 80 % of the steps and to 0.1 after 90 %. Megatron has no steps; nearest:
# constant, then to 0.1 along 1 - sqrt(t) over the last 20 % (0.36 at 90 %).
TRAINING=(
    --micro-batch-size "$MICRO_BATCH" --global-batch-size "$GLOBAL_BATCH" --train-iters "$TRAIN_STEPS"
    --optimizer adam --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-20 --weight-decay 0.1 --clip-grad 1.0
    --lr "$LEARNING_RATE" --min-lr "$(awk "BEGIN { print $LEARNING_RATE / 10 }")" --lr-warmup-iters "$WARMUP_STEPS"
    --lr-decay-style WSD --lr-decay-iters "$TRAIN_STEPS" --lr-wsd-decay-style minus_sqrt
    --lr-wsd-decay-iters "$(((TRAIN_STEPS + 4) / 5))"
    --use-distributed-optimizer --seed 1234 --num-workers 2
    --log-interval "$LOG_INTERVAL" --log-throughput --eval-interval "$EVAL_INTERVAL" --eval-iters "$EVAL_ITERS"
    --distributed-timeout-minutes "$TIMEOUT_MINUTES"
)
LAYOUT=(
    --tensor-model-parallel-size "$TP" --context-parallel-size "$CP"
    --expert-model-parallel-size "$EP" --expert-tensor-parallel-size "$ETP" "${PIPELINE[@]}"
)
((TP == 1)) || LAYOUT+=(--sequence-parallel)

# A save that fails leaves the one before: Megatron names the new one in latest_checkpointed_iteration.txt last.
SAVING=(--save "$CHECKPOINTS" --load "$CHECKPOINTS" --save-interval "$SAVE_INTERVAL" --ckpt-format torch_dist)
[[ -z $EXIT_AFTER_MINUTES ]] || SAVING+=(--exit-duration-in-mins "$EXIT_AFTER_MINUTES")
[[ -z $TENSORBOARD ]] || SAVING+=(--tensorboard-dir "$TENSORBOARD")

LAUNCHER=(-m mhc_megatron pretrain)
if ((CPU)); then
    LAUNCHER+=(--cpu)
    HOST=() # from the package: see `complete`
else
    # The norm of the KV latent (DeepSeek's). Megatron 0.19 then norms the query projection's input as well; its local modules
    # (CPU) can't do it without a low-rank step.
    MODEL+=(--qk-layernorm)
    HOST=(
        --bf16 --transformer-impl transformer_engine --moe-grouped-gemm --moe-permute-fusion --no-persist-layer-norm
        --overlap-grad-reduce --overlap-param-gather --cross-entropy-loss-fusion
        --no-create-attention-mask-in-dataloader
    )
    # The fusion needs NVIDIA's apex for the output layer.
    ((GRADIENT_ACCUMULATION_FUSION)) || HOST+=(--no-gradient-accumulation-fusion)
fi
case $RECOMPUTE in
selective) HOST+=(--recompute-granularity selective --recompute-modules core_attn moe_act mla_up_proj) ;;
full) HOST+=(--recompute-granularity full --recompute-method uniform --recompute-num-layers 1) ;;
esac

MHC=()
if [[ $MODE != residual ]]; then
    MHC=(
        --enable-mhc --mhc-mode "$MODE" --mhc-num-streams "$STREAMS" --mhc-sinkhorn-iterations "$SINKHORN_ITERATIONS"
        --mhc-init "$MHC_INIT" --mhc-init-alpha 0.01 --mhc-backend "$MHC_BACKEND"
        --mhc-pipeline-comm "$PIPELINE_COMM" --mhc-pipeline-transport "$PIPELINE_TRANSPORT" --mhc-monitor-interval "$MONITOR_INTERVAL"
    )
    # Off where it has no effect: without the Triton kernels and under full recompute.
    if [[ $MHC_RECOMPUTE == auto ]]; then
        [[ $CPU == 1 || $RECOMPUTE == full || $MHC_BACKEND == reference || STREAMS -gt 8 ]] && MHC_RECOMPUTE=0 || MHC_RECOMPUTE=1
    fi
    ((MHC_RECOMPUTE)) && MHC+=(--mhc-recompute)
fi

# complete: the training script and ARGUMENTS. Needs Python, so slurm.sh leaves it to the nodes, where a container may have it.
complete() {
    "$PYTHON" -c 'import mhc_megatron' 2>/dev/null ||
        fail "'$PYTHON' has no mhc_megatron: pip install it, or name another interpreter with PYTHON"
    # Stock Megatron, without a word of mHC; it comes with the package and needs no Megatron-LM checkout.
    [[ -n $PRETRAIN_SCRIPT ]] ||
        PRETRAIN_SCRIPT=$("$PYTHON" -c 'from mhc_megatron import quickstart; print(quickstart.__path__[0])')/train.py
    [[ -f $PRETRAIN_SCRIPT ]] || fail "no training script at $PRETRAIN_SCRIPT: correct PRETRAIN_SCRIPT or MEGATRON"
    local cpu=() extra
    ((CPU == 0)) ||
        mapfile -t cpu < <("$PYTHON" -c 'from mhc_megatron.cpu import MEGATRON_ARGUMENTS; print(*MEGATRON_ARGUMENTS, sep="\n")')
    words extra "$EXTRA_ARGS" # last: of a repeated argument the last one counts
    ARGUMENTS=(
        "${MODEL[@]}" "${TRAINING[@]}" "${LAYOUT[@]}" "${HOST[@]}" "${cpu[@]}" "${DATA[@]}" "${TOKENIZER[@]}" "${SAVING[@]}"
        "${MHC[@]}" "${extra[@]}"
    )
}

# Megatron asks for the first under TP or CP; the last ends a rank whose peer has died.
((TP == 1 && CP == 1)) || export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}

# dry_run COMMAND...: the command, Megatron's own checks of its arguments without a GPU, and the plan.
dry_run() {
    complete
    echo "$SIZE as $MODE on $NNODES nodes x $GPUS_PER_NODE: TP $TP, CP $CP, PP $PP, VPP $VPP, EP $EP, data-parallel $DP," \
        "$microbatches microbatches of $MICRO_BATCH x $SEQ_LEN tokens"
    echo
    printf '%q ' "$@" "${LAUNCHER[@]}" "$PRETRAIN_SCRIPT" "${ARGUMENTS[@]}"
    printf '\n\n'
    # The Megatron that the script will import: the one beside it, if there is one.
    local beside
    beside=$(cd "$(dirname "$PRETRAIN_SCRIPT")" && pwd -P)
    [[ ! -d $beside/megatron ]] || export PYTHONPATH=$beside${PYTHONPATH:+:$PYTHONPATH}
    "$PYTHON" -m mhc_megatron check --world-size "$WORLD_SIZE" "${ARGUMENTS[@]}"
    echo
    # It covers what runs on GPUs: Transformer Engine's modules.
    local status=0
    ((CPU)) || "$PYTHON" -m mhc_megatron plan --world-size "$WORLD_SIZE" --gpus-per-node "$GPUS_PER_NODE" "${ARGUMENTS[@]}" || status=$?
    ((status == 3)) || return "$status"
    echo "The arguments are accepted, but not covered by the planner (above): whether they fit into memory is not known."
}
