# NCCL over plain Ethernet (TCP). Read before job.sh, or given to `lut-ds submit --setup`. Slow: ViT-L in bf16 sends about
# 0.6 GB a step and rank; raise the accumulation (a smaller train.micro_batch) before adding nodes.

export NCCL_IB_DISABLE=1 # do not look for adapters that are there but not connected
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-^lo,docker,veth}
# One TCP stream rarely fills 25 Gb/s or more: threads times sockets, at most 64.
export NCCL_SOCKET_NTHREADS=${NCCL_SOCKET_NTHREADS:-4} NCCL_NSOCKS_PERTHREAD=${NCCL_NSOCKS_PERTHREAD:-4}
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
