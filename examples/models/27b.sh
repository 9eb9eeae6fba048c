# The paper's 27B model (arXiv 2512.24880, table 5): 27.0B parameters, 4.14B active.
# 30 layers, the embedding and the loss are 32 units: 2 to each of PP x VPP = 16 chunks.
: "${NUM_LAYERS:=30}" "${TRAIN_STEPS:=50000}" "${GLOBAL_BATCH:=1280}" "${LEARNING_RATE:=4.0e-4}"
: "${PP:=4}" "${VPP:=4}" "${EP:=8}" "${MICRO_BATCH:=2}"
MODEL=(
    --hidden-size 2560
    --num-attention-heads 32
    --num-experts 72
    --moe-ffn-hidden-size 1536
    --moe-shared-expert-intermediate-size 3072 # 2 shared experts
    --ffn-hidden-size 12288                    # the dense layer; not in the paper, see arguments.sh
)
