#!/usr/bin/env bash
# A two-process script on one GPU: two "nodes" with one process each, NCCL's sockets between them.
#
#     PERCENT=20 benchmarks/shared_gpu.sh benchmarks/pipeline.py --vpp 1 2 --layers 4
#
# CUDA MPS lets both run at the same time, each on PERCENT of the multiprocessors (default 50). Fewer of them compute more slowly
# beside the same link: at 20 percent a link of 8 GB/s is to a process what one of 40 GB/s is to a whole GPU. NCCL takes both for
# ranks on hosts of their own (it refuses two ranks on one GPU of one host). MPS=0 does without it: the processes then take turns,
# results are right and times mean nothing.
set -euo pipefail
: "${PERCENT:=50}" "${MPS:=1}" "${MASTER_PORT:=29533}" "${PYTHON:=python}"
export NCCL_SOCKET_IFNAME=lo NCCL_IB_DISABLE=1
if ((MPS)); then
    CUDA_MPS_PIPE_DIRECTORY=$(mktemp -d)
    export CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY=$CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=$PERCENT
    nvidia-cuda-mps-control -d
    trap 'echo quit | nvidia-cuda-mps-control; rm -rf "$CUDA_MPS_PIPE_DIRECTORY"' EXIT
fi
for rank in 0 1; do
    NCCL_HOSTID=rank-$rank "$PYTHON" -m torch.distributed.run --nnodes 2 --nproc-per-node 1 --node-rank $rank \
        --master-addr 127.0.0.1 --master-port "$MASTER_PORT" "$@" &
    pids[rank]=$!
done
status=0
for pid in "${pids[@]}"; do
    wait "$pid" || status=$?
done
exit $status
