# NCCL over InfiniBand (or RoCE). Read before job.sh, or given to `lut-ds submit --setup`. Names of adapters are the cluster's:
# `ibstat -l` and `nvidia-smi topo -m` on a node show them.

# The adapters that carry data: all whose name starts so. Leave out those of the storage network (`^mlx5_4` excludes one).
export NCCL_IB_HCA=${NCCL_IB_HCA:-mlx5}
# The interface through which ranks find each other (TCP), not the one that carries data. `^` excludes; NCCL takes the first of
# the rest. Set the name itself where a node has several that cannot all reach the others.
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-^lo,docker,veth}
# GPU and adapter exchange data without the host where they share a PCIe switch (PXB); SYS would allow it across sockets.
export NCCL_NET_GDR_LEVEL=${NCCL_NET_GDR_LEVEL:-PXB}
# Retries before a link that drops packets ends the run: 2^22 x 4 us is about 17 s each, 7 times.
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}
export NCCL_IB_RETRY_CNT=${NCCL_IB_RETRY_CNT:-7}
# RoCE only: the GID of RoCE v2 and the class that the switches treat as lossless; `show_gids` lists them.
#export NCCL_IB_GID_INDEX=3 NCCL_IB_TC=106
# NVLink SHARP and the switches' own reduction, where both are installed; NCCL falls back silently where they are not.
#export NCCL_NVLS_ENABLE=1 NCCL_COLLNET_ENABLE=1
# UCX carries MPI, not NCCL: these ranks do not use it. If an MPI in the image still picks it up, keep it on the same adapters:
#export UCX_NET_DEVICES=mlx5_0:1

# A rank that ends makes the others end within seconds, not at the collective's timeout.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
export NCCL_DEBUG=${NCCL_DEBUG:-WARN} # INFO says which adapter and path each rank takes: worth one look on a new cluster
