# NCCL over AWS EFA (p4d, p4de, p5). Read before job.sh, or given to `lut-ds submit --setup`.
# It needs the aws-ofi-nccl plugin on the library path, as AWS's images have it; without it NCCL falls back to TCP, silently:
# look for "NET/OFI" in the log with NCCL_DEBUG=INFO, and at the bandwidth that the run prints before its first step.

export FI_PROVIDER=efa
export FI_EFA_USE_DEVICE_RDMA=1 # GPU memory straight to the adapter; p4d needs it said, p5 does it anyway
export FI_EFA_FORK_SAFE=1       # data loading forks
# The interface through which ranks find each other (TCP), not the one that carries data.
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-^lo,docker,veth}
# The plugin chooses NCCL_PROTO and NCCL_ALGO for the instance type: leave them unset.

# A rank that ends makes the others end within seconds, not at the collective's timeout.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
