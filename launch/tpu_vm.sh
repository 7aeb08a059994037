#!/usr/bin/env bash
# A run on a TPU VM slice, from creation to deletion, with gcloud.
set -euo pipefail

usage() {
  cat <<EOF
usage: $0 [--dry-run] COMMAND NAME [ARGUMENTS]

  create  NAME TYPE   a slice, such as v5litepod-16 (SPOT=1: may be pre-empted; VERSION: its software, which
                      otherwise follows from the type: v2, v3, v4, v5litepod, v5p, v6e)
  install NAME        copies this checkout to all workers and installs it with jax[tpu];
                      with BUCKET=name the bucket is mounted on every worker as ~/bucket
  start   NAME --config FILE --workdir DIR [--config.KEY=VALUE ...]
                      trains on all workers, in ~/mixln_jax, again after exit 8, 75 and 134;
                      DIR has to be a folder that all workers see, such as ../bucket/runs/mix1b
  tail    NAME        follows the log of worker 0
  stop    NAME        stops all workers after the same step, with everything saved
  delete  NAME        deletes the slice

ZONE (default us-central1-a) and PROJECT (default: gcloud's own) say where. --dry-run prints the commands of gcloud.
EOF
}

dry=
if [[ ${1:-} == --dry-run ]]; then
  dry=1
  shift
fi
if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  usage
  exit 0
fi
command=${1:-} name=${2:-}
case $command in
  create) least=3 most=3 ;;
  start) least=4 most=1000 ;;
  install | tail | stop | delete) least=2 most=2 ;;
  *) least=1000 most=0 ;;
esac
if [[ ! $name =~ ^[a-z] || ($command == start && " $* " != *" --workdir"[\ =]*) ]]; then
  least=1000
fi
if (($# < least || $# > most)); then
  usage >&2
  exit 2
fi
shift 2
where=(--zone="${ZONE:-us-central1-a}" ${PROJECT:+--project="$PROJECT"})

tpu() {
  local words=(gcloud compute tpus tpu-vm "$@" "${where[@]}")
  if [[ $dry ]]; then
    printf '%q ' "${words[@]}"
    echo
  else
    "${words[@]}"
  fi
}

on_all() { tpu ssh "$name" --worker=all --command="$1"; }

case $command in
  create)
    case $1 in # as in cloud.google.com/tpu/docs/runtimes, 2026-11-27
      v[234]-*) version=tpu-ubuntu2204-base ;;
      v5litepod-* | v5e-*) version=v2-alpha-tpuv5-lite ;;
      v5p-*) version=v2-alpha-tpuv5 ;;
      v6e-*) version=v2-alpha-tpuv6e ;;
      *) version= ;;
    esac
    version=${VERSION:-$version}
    if [[ ! $version ]]; then
      echo "$0: which software a $1 needs is not known here (known are v2-, v3-, v4-, v5litepod-, v5p- and v6e-):" \
        "set VERSION (gcloud compute tpus tpu-vm versions list)" >&2
      exit 2
    fi
    tpu create "$name" --accelerator-type="$1" --version="$version" ${SPOT:+--spot}
    ;;
  install)
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    tar -czf "$folder/mixln_jax.tgz" -C "$(dirname "$0")/.." mixln_jax configs launch requirements.txt pyproject.toml README.md
    tpu scp "$folder/mixln_jax.tgz" "$name:" --worker=all
    # shellcheck disable=SC2016
    on_all 'mkdir -p mixln_jax && tar -xzf mixln_jax.tgz -C mixln_jax && cd mixln_jax &&
      python=$(command -v python3.12 || command -v python3.11 ||
        { sudo apt-get -qq update && sudo apt-get -qq install -y python3.11-venv && command -v python3.11; } | tail -n 1) &&
      $python -m venv .venv && .venv/bin/pip install -q "jax[tpu]" -r requirements.txt gcsfs'
    if [[ ${BUCKET:-} ]]; then
      on_all "mkdir -p bucket && gcsfuse --implicit-dirs $(printf %q "$BUCKET") bucket"
    fi
    ;;
  start)
    # Each worker runs by itself, so that a lost connection stops nothing; JAX on a TPU VM finds the other workers.
    on_all "cd mixln_jax && PATH=\$PWD/.venv/bin:\$PATH nohup launch/again.sh python -m mixln_jax.main \
$(printf '%q ' "$@")>> train.log 2>&1 < /dev/null & echo started"
    ;;
  tail) tpu ssh "$name" --worker=0 --command='tail -n 50 -F mixln_jax/train.log' ;;
  stop) on_all "pkill -TERM -f '[a]gain.sh python -m mixln_jax'" ;;
  delete) tpu delete "$name" --quiet ;;
esac
