#!/usr/bin/env bash
# Runs a training command again while it ends with 75 (stopped, all saved), 8 (another process lost) or 134 (aborted by
# JAX in the same instant): launch/again.sh python -m mixln_jax.main --config FILE ... At most TRIES times (100), PAUSE
# seconds (10) apart. A TERM to this script stops the command and does not run it again.
set -uo pipefail

if (($# == 0)); then
  echo "usage: $0 COMMAND [ARGUMENT ...]" >&2
  exit 2
fi
pid='' stopped=0
trap 'stopped=1 caught=1; [[ $pid ]] && kill -TERM "$pid" 2>/dev/null' INT TERM HUP
for ((try = 1; ; try++)); do
  "$@" &
  pid=$!
  code=127 caught=1
  while ((caught)); do # a signal to this script ends `wait` early
    caught=0
    wait "$pid"
    ended=$?
    ((ended == 127)) || code=$ended # 127: it was waited for before
  done
  case $code in
    8 | 75 | 134) ;;
    *) exit "$code" ;;
  esac
  if ((stopped || try >= ${TRIES:-100})); then
    exit "$code"
  fi
  echo "$0: exit $code; once more in ${PAUSE:-10} s ($try)" >&2
  sleep "${PAUSE:-10}" &
  pid=$!
  ((stopped)) || wait "$pid"
  if ((stopped)); then
    kill "$pid" 2>/dev/null
    exit "$code"
  fi
done
