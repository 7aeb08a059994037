#!/usr/bin/env bash
# Trains with N processes on this machine: launch/local_processes.sh N --config FILE [--workdir DIR] [...]
# Each process gets its part of CUDA_VISIBLE_DEVICES if that is set; on CPUs JAX_NUM_CPU_DEVICES says how many devices
# each one shows. Ends with 8 where one process says so, for then another was lost, else with the first exit code that is
# not 0; Ctrl-C stops all after the same step.
set -euo pipefail

if [[ $# -lt 1 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: $0 N --config FILE [--workdir DIR] [--config.KEY=VALUE ...]" >&2
  exit 2
fi
count=$1
shift

export JAX_COORDINATOR_ADDRESS="127.0.0.1:${PORT:-$((20000 + RANDOM % 20000))}" JAX_NUM_PROCESSES=$count
export MIXLN_JAX_SECRET=${MIXLN_JAX_SECRET:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')}
IFS=, read -r -a gpus <<<"${CUDA_VISIBLE_DEVICES:-}"
if ((${#gpus[@]} % count)); then
  echo "$0: ${#gpus[@]} GPUs (CUDA_VISIBLE_DEVICES) do not divide by $count processes" >&2
  exit 2
fi
share=$((${#gpus[@]} / count))

pids=()
trap 'caught=1; kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM HUP
for ((i = 0; i < count; i++)); do
  if ((share)); then
    mine=$(IFS=,; echo "${gpus[*]:i * share:share}")
    export CUDA_VISIBLE_DEVICES=$mine
  fi
  JAX_PROCESS_ID=$i "${PYTHON:-python}" -m mixln_jax.main "$@" &
  pids+=($!)
done

code=0
for pid in "${pids[@]}"; do
  ended=127 caught=1
  while ((caught)); do # a signal to this script ends `wait` early
    caught=0 now=0
    wait "$pid" || now=$?
    ((now == 127)) || ended=$now # 127: it was waited for before
  done
  if ((code == 0 || ended == 8)); then
    code=$ended
  fi
done
exit "$code"
