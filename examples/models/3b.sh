# The paper's 3B model (arXiv 2512.24880, table 5): 2.97B parameters, 612M active.
: "${NUM_LAYERS:=12}" "${TRAIN_STEPS:=30000}" "${GLOBAL_BATCH:=320}" "${LEARNING_RATE:=8.6e-4}"
: "${PP:=1}" "${VPP:=1}" "${EP:=8}" "${MICRO_BATCH:=5}"
MODEL=(
    --hidden-size 1280
    --num-attention-heads 16
    --num-experts 64
    --moe-ffn-hidden-size 896
    --moe-shared-expert-intermediate-size 1792 # 2 shared experts
    --ffn-hidden-size 7168                     # the dense layer; not in the paper, see arguments.sh
)
