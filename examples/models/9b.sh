# The paper's 9B model (arXiv 2512.24880, table 5): 9.18B parameters, 1.66B active.
: "${NUM_LAYERS:=18}" "${TRAIN_STEPS:=50000}" "${GLOBAL_BATCH:=512}" "${LEARNING_RATE:=5.9e-4}"
: "${PP:=2}" "${VPP:=3}" "${EP:=8}" "${MICRO_BATCH:=2}"
MODEL=(
    --hidden-size 1920
    --num-attention-heads 24
    --num-experts 64
    --moe-ffn-hidden-size 1280
    --moe-shared-expert-intermediate-size 2560 # 2 shared experts
    --ffn-hidden-size 10240                    # the dense layer; not in the paper, see arguments.sh
)
