#!/usr/bin/env bash
# ViT-Tiny on CIFAR-10 with Pre-LN and with Mix-LN from the same seeds: configs/vit_ti_cifar10.py, and the table of both.
# usage, from the repository root: benchmarks/cifar10.sh TRAIN TEST [OUT=runs/cifar10] [--config.KEY=VALUE ...]
# TRAIN and TEST are zip files or folders with a folder of images for each class. SEEDS="0 1 2" trains each placement
# three times. The same command goes on after a stop, and nothing is downloaded.
set -euo pipefail
(( $# >= 2 )) || { sed -n '3,5s/^# //p' "$0" >&2; exit 2; }
train=$1 test=$2 out=runs/cifar10
shift 2
if [[ ${1:---} != --* ]]; then out=$1; shift; fi
runs=()
for seed in ${SEEDS:-0}; do
  for placement in pre mix; do
    runs+=("$out/${placement}_$seed")
    python3 -m mixln_jax.main --config configs/vit_ti_cifar10.py --workdir "${runs[-1]}" --config.data.path="$train" \
      --config.data.validation_path="$test" --config.model.norm_position="$placement" --config.seed="$seed" \
      --config.data.seed="$seed" "$@"
  done
done
python3 -m mixln_jax.report "${runs[@]}" --out "$out/report"
