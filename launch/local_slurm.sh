#!/bin/bash
# local_slurm.sh DIR CMD...   A real, throw-away Slurm cluster on this machine for the life of CMD; exit status is CMD's.
# For trying sbatch scripts and for tests. Needs slurmctld, slurmd, the Slurm client and iproute2 (Debian package names).
# Every node is its own network+uts+pid+mount namespace on a private bridge.  Root not needed, systemd not
# needed, munge not needed; everything dies with this process, ports never clash, no file outside DIR changes.
# env: NODES=2 GPUS=8 CPUS=32 PROCTRACK=proctrack/linuxproc SLURM_PREFIX=<dpkg -x tree> SLURM_EXTRA=<slurm.conf lines>
# inside CMD:  local-slurm-node crash|start NODE
set -euo pipefail
PFX=${SLURM_PREFIX:-} LIB=/usr/lib/$(uname -m)-linux-gnu
export PATH=${PFX:+$PFX/usr/bin:$PFX/usr/sbin:}$PATH:/usr/sbin:/sbin
[ -z "$PFX" ] || export LD_LIBRARY_PATH=$PFX$LIB:$PFX$LIB/slurm-wlm
NODES=${NODES:-2} GPUS=${GPUS:-8} NET=10.233.7
if [ "${LOCAL_SLURM_STAGE:-0}" = 0 ]; then
  user=(); [ "$(id -u)" = 0 ] || user=(--user --map-current-user --keep-caps)
  export LOCAL_SLURM_STAGE=1 LOCAL_SLURM_DIR; LOCAL_SLURM_DIR=$(realpath -m "$1"); shift
  exec unshare "${user[@]}" --net --mount --uts --ipc --pid --fork --kill-child --mount-proc bash "$0" "$@"
fi
R=$LOCAL_SLURM_DIR; unset LOCAL_SLURM_STAGE; export SLURM_CONF=$R/slurm.conf
rm -rf "$R"/{state,log,run,dev,etc,bin,spool.*}; mkdir -p "$R"/{state,log,run,dev,etc,bin}; chmod 700 "$R/state"
mount -t tmpfs tmpfs /run; mkdir /run/netns; hostname ctl; ip link set lo up
ip link add br0 type bridge; ip addr add $NET.1/24 dev br0; ip link set br0 up
for i in $(seq 0 $((GPUS - 1))); do ln -s /dev/null "$R/dev/gpu$i"; done      # File= has to be a device node
echo "Name=gpu File=$R/dev/gpu[0-$((GPUS - 1))]" >"$R/gres.conf"
echo "CgroupPlugin=cgroup/v1" >"$R/cgroup.conf"                               # skip autodetection
{ echo "127.0.0.1 localhost"; echo "$NET.1 ctl"; for i in $(seq "$NODES"); do echo "$NET.$((10 + i)) node$i"; done; } >"$R/etc/hosts"
mount --bind "$R/etc/hosts" /etc/hosts
cat >"$SLURM_CONF" <<X
ClusterName=lab
SlurmctldHost=ctl($NET.1)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=10
StateSaveLocation=$R/state
SlurmdSpoolDir=$R/spool.%n
SlurmctldPidFile=$R/run/slurmctld.pid
SlurmdPidFile=$R/run/slurmd.%n.pid
SlurmctldLogFile=$R/log/slurmctld.log
SlurmdLogFile=$R/log/slurmd.%n.log
ProctrackType=${PROCTRACK:-proctrack/linuxproc}
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
ReturnToService=2
KillWait=3
SlurmdTimeout=120
SlurmctldTimeout=120
MessageTimeout=60
TCPTimeout=10
InactiveLimit=0
MinJobAge=3600
JobRequeue=1
GresTypes=gpu
${PFX:+PluginDir=$PFX$LIB/slurm-wlm}
NodeName=node[1-$NODES] CPUs=${CPUS:-32} RealMemory=64000 Gres=gpu:$GPUS
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
${SLURM_EXTRA:-}
X
for i in $(seq "$NODES"); do mkdir "$R/spool.node$i"; done
cat >"$R/bin/local-slurm-node" <<X
#!/bin/bash
# local-slurm-node start|crash NODE
case \$1 in
start) setsid nsenter --net=/run/netns/\$2 unshare --uts --pid --mount --fork --kill-child --mount-proc bash -c '
         hostname \$0; mount -t tmpfs tmpfs /dev/shm; slurmd ${PFX:+-d $PFX/usr/sbin/slurmstepd} -D -N \$0 & wait \$!' \$2 </dev/null >>$R/log/\$2.out 2>&1 &
       echo \$! >$R/run/\$2.ns ;;                       # bash stays as the node's init: slurmd would not reap
crash) kill -9 \$(<$R/run/\$2.ns) ;;                    # power failure: all the node's processes die
esac
X
chmod +x "$R/bin/local-slurm-node"; PATH=$R/bin:$PATH
for i in $(seq "$NODES"); do
  ip netns add "node$i"; ip link add "v$i" type veth peer name eth0 netns "node$i"; ip link set "v$i" master br0 up
  ip -n "node$i" addr add "$NET.$((10 + i))/24" dev eth0; ip -n "node$i" link set eth0 up; ip -n "node$i" link set lo up
done
slurmctld -c
for i in $(seq "$NODES"); do local-slurm-node start "node$i"; done
for _ in $(seq 3000); do
  [ "$(sinfo -h -N -t idle -o %N 2>/dev/null | sort -u | wc -l)" = "$NODES" ] && { "$@"; exit $?; }; sleep .1
done
echo "local_slurm: cluster did not come up, see $R/log" >&2; exit 1
