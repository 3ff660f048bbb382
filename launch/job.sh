# The body of every batch script here: starts the ranks, passes a warning on to them, and requeues the job until it is done.
#
# launch/*.sbatch source this file; `lut-ds submit` writes it into the script that it makes. Set before:
#   arguments       array: pretrain RECIPE section.key=value ... run.dir=DIR
#   python          interpreter that has lut_ds, on every node (default: .venv/bin/python)
#   launcher        srun (default: a task is a rank), torchrun or deepspeed (a task is a node's agent), or
#                   deepspeed-slurm (DeepSpeed's own Slurm launcher)
#   ranks_per_node  default: what --ntasks-per-node says
#   srun_options    array: more options of srun, such as a container's
#   stop_signal     what the ranks are told to stop with (default USR1); one of the recipe's stop signals
#   task_log        what a task of an array prints to, which is linked from its run's folder
#   max_restarts    restarts of this job for any reason (default 500)
#   max_faults      faults in a row without a new checkpoint in between (default 3)
#
# Exit codes of lut-ds: 0 done; 1 fault; 2 bad input, where a restart would end the same; 3 stopped with a checkpoint.
set -uo pipefail

: "${python:=.venv/bin/python}" "${launcher:=srun}" "${stop_signal:=USR1}" "${max_restarts:=500}" "${max_faults:=3}"
: "${ranks_per_node:=${SLURM_NTASKS_PER_NODE:-1}}"
declare -p srun_options >/dev/null 2>&1 || srun_options=()
restarts=${SLURM_RESTART_COUNT:-0} # not set on the first start
# One task of an array has the number of the whole array as SLURM_JOB_ID: signals to that number, and its requeue, are everyone's.
job=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

say() { echo "[$(date '+%F %T')] job $job, start $((restarts + 1)): $*" >&2; }

run_dir=
for word in "${arguments[@]}"; do [[ $word == run.dir=* ]] && run_dir=${word#run.dir=}; done
[ -n "$run_dir" ] || { say "add run.dir=DIR to the arguments: the job keeps its notes there"; exit 2; }
notes=$run_dir/submit # the job's own files; the nodes share the folder
mkdir -p "$notes" || exit 2
[ -z "${task_log:-}" ] || ln -sfr "$task_log" "$notes/" || say "no link to $task_log in $notes"
export LUT_DS_EXIT_FILE=$notes/exit-$SLURM_JOB_ID # rank 0's exit code: launchers give 1, or that of a rank they killed
fault_file=$notes/faults-$SLURM_JOB_ID

# Where the ranks meet. Slurm's own port range starts at 60001, the system's for clients at 32768; two jobs that share a node differ.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
export python launcher ranks_per_node stop_signal hostfile=$notes/hostfile-$SLURM_JOB_ID
cpus=${SLURM_CPUS_PER_TASK:-1}

start_ranks() {
  # --kill-on-bad-exit: or a rank that fails leaves the others waiting. Numbers are those of this start: a job that was resized
  # while it waited keeps the numbers of its submission in other variables.
  local srun=(srun --kill-on-bad-exit=1 --nodes="$SLURM_NNODES" "${srun_options[@]}")
  local agent=("${srun[@]}" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpus-per-task=$((cpus * ranks_per_node)))
  srun+=(--ntasks=$((SLURM_NNODES * ranks_per_node)) --ntasks-per-node="$ranks_per_node" --cpus-per-task="$cpus")
  # An agent must ignore the signal, or it dies of it and leaves its ranks behind; the ranks set a handler of their own.
  case $launcher in
  srun)
    # shellcheck disable=SC2016  # $0 is for the other shell
    "${srun[@]}" "$python" -m lut_ds "${arguments[@]}" ;;
  torchrun)
    # shellcheck disable=SC2016
    "${agent[@]}" bash -c 'trap "" "$stop_signal"; exec "$python" -m torch.distributed.run --nnodes "$SLURM_NNODES" \
      --node-rank "$SLURM_NODEID" --nproc-per-node "$ranks_per_node" --master-addr "$MASTER_ADDR" \
      --master-port "$MASTER_PORT" --max-restarts 0 -m lut_ds "$@"' agent "${arguments[@]}" ;;
  deepspeed)
    write_hostfile
    # shellcheck disable=SC2016
    LOCAL_WORLD_SIZE=$ranks_per_node "${agent[@]}" bash -c 'trap "" "$stop_signal"; exec "$python" -m deepspeed.launcher.runner \
      --hostfile "$hostfile" --no_ssh --node_rank "$SLURM_NODEID" --master_addr "$MASTER_ADDR" \
      --master_port "$MASTER_PORT" --no_local_rank --module lut_ds "$@"' agent "${arguments[@]}" ;;
  deepspeed-slurm)
    write_hostfile
    "$python" -m deepspeed.launcher.runner --hostfile "$hostfile" --launcher slurm --no_ssh_check --force_multi \
      --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" --no_local_rank \
      --launcher_args "$(printf '%q ' "${srun[@]:1}")" \
      "$("$python" -c 'import importlib.util as u; print(u.find_spec("lut_ds.__main__").origin)')" "${arguments[@]}" ;;
  *) say "launcher: expected srun, torchrun, deepspeed or deepspeed-slurm, found $launcher"; return 2 ;;
  esac
}

write_hostfile() { scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=$ranks_per_node/" >"$hostfile"; }

# --signal=B:USR1@180 reaches this shell alone; the ranks are told here. A preemption sends SIGTERM to the ranks themselves. Not
# trapped: SIGCONT, which Slurm sends beside a signal and which would hide it.
interrupted=
stop_ranks() {
  interrupted=$1
  say "SIG$1: the ranks are to save and stop"
  scancel --signal="$stop_signal" "$job" # all steps, not this shell
}
trap 'stop_ranks USR1' USR1
trap 'stop_ranks USR2' USR2
trap 'stop_ranks TERM' TERM

about_job() { scontrol show job -o "$job"; }
newest() { cat "$run_dir/checkpoints/latest" 2>/dev/null; }

again() {
  if [ "$restarts" -ge "$max_restarts" ]; then
    say "not requeued: $restarts restarts are the limit (max_restarts); submit the script again to go on"; exit "$code"
  fi
  # A cancelled job must end, and one that Slurm itself requeues needs no help.
  if ! about_job | grep -q ' JobState=RUNNING '; then
    say "not requeued here: the job was cancelled, or Slurm itself requeues it"; exit "$code"
  fi
  say "$1; requeued"
  scontrol requeue "$job" || say "scontrol requeue failed; submit the script again to go on"
  exit "$code"
}

fault() { # counts faults without a new checkpoint in between; a run that gets further each time may fail as often as it likes
  local where="" count=0
  [ ! -f "$fault_file" ] || read -r count where <"$fault_file"
  [ "$where" = "$(newest)" ] || count=0
  count=$((count + 1))
  echo "$count $(newest)" >"$fault_file"
  if [ "$count" -ge "$max_faults" ]; then
    say "exit $code: fault $count in a row at checkpoint '$(newest)'; not requeued. The last lines above say why"; exit "$code"
  fi
  again "exit $code: fault $count of at most $max_faults at checkpoint '$(newest)'"
}

say "$SLURM_NNODES node(s) ($SLURM_JOB_NODELIST) x $ranks_per_node rank(s), $launcher, $run_dir, checkpoint '$(newest)', meeting at $MASTER_ADDR:$MASTER_PORT"
rm -f "$LUT_DS_EXIT_FILE"
start_ranks &
ranks=$!
while kill -0 "$ranks" 2>/dev/null; do wait "$ranks"; done # a trapped signal ends `wait` early
wait "$ranks"
code=$?
reason=
[ ! -s "$LUT_DS_EXIT_FILE" ] || read -r code reason <"$LUT_DS_EXIT_FILE"
rm -f "$LUT_DS_EXIT_FILE"

case $code in
0) rm -f "$fault_file" "$hostfile"; say "done"; exit 0 ;;
2) say "exit 2: bad input, see above; not requeued"; exit 2 ;;
3) # the file RUN/stop is a person's wish that the run ends
  case $reason in "stop file"*) say "stopped by the stop file with checkpoint '$(newest)'; not requeued"; exit 3 ;; esac
  again "stopped with checkpoint '$(newest)'" ;;
*) # the ranks listen to signals only once they have started: an early one just ends them
  if [ -n "$interrupted" ]; then again "exit $code, ended by SIG$interrupted before the first step"
  elif about_job | grep -q ' PreemptTime=[0-9]'; then again "exit $code, preempted before the first step"
  else fault; fi ;;
esac
