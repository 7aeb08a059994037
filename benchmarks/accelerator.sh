#!/usr/bin/env bash
# What only an accelerator can show, in one call of about nine minutes at most: the quickstart there, bitwise resume, and
# the train step's speed, whose tables come last.
# usage, from the repository root: benchmarks/accelerator.sh [OUT=runs/accelerator] [DEVICE=gpu]
set -euo pipefail
out=${1:-runs/accelerator} device=${2:-gpu}
mkdir -p "$out"
train=(python3 -m mixln_jax.main --config.device="$device")

echo "== quickstart"
time "${train[@]}" --config configs/quickstart.py --workdir "$out/quickstart"

echo "== resume: a run stopped by SIGTERM and continued against one that was not"
exact=(--config configs/quickstart.py --config.num_steps=200 --config.deterministic=True --config.checkpoint.every=50)
"${train[@]}" "${exact[@]}" --workdir "$out/whole" > "$out/whole.log"
"${train[@]}" "${exact[@]}" --workdir "$out/stopped" > "$out/stopped.log" &
until grep -q 'step  *80/' "$out/stopped.log" || ! kill -0 $!; do sleep 0.05; done
kill -TERM $! || true
wait $! || echo "exit $?"
"${train[@]}" "${exact[@]}" --workdir "$out/stopped" >> "$out/stopped.log"
python3 - "$out" <<'PYTHON'
import json, pathlib, sys

def lines(name):
    read = map(json.loads, pathlib.Path(sys.argv[1], name, 'metrics.jsonl').read_text().splitlines())
    return [{key: value for key, value in line.items() if not key.startswith('perf/')} for line in read]

print('bitwise equal:', lines('whole') == lines('stopped'))
PYTHON

echo "== speed, against Hugging Face where torch and transformers are installed"
ours=(python3 -m benchmarks.train_step --device "$device") speed=("${ours[@]}")
python3 -c 'import torch, transformers' 2> /dev/null && speed+=(--against) || echo "they are not: ours alone"
"${speed[@]}" --cases llama_130m:32x256 llama_130m:8x1024 --total 120 --seconds 20 --out "$out/130m" || true
"${speed[@]}" --cases llama_1b:4x1024 llama_1b:8x256 --placements pre --total 60 --seconds 20 --out "$out/1b" || true
tables=("$out"/130m/*.md "$out"/1b/*.md)
if [ "$device" = gpu ] && (( SECONDS < 400 )); then
  "${ours[@]}" --cases llama_130m:8x1024 --placements pre --seconds 20 --out "$out/variants" --with \
    model.attention=blocks model.scan_unroll=1 model.remat=dots \
    XLA_FLAGS=--xla_gpu_deterministic_ops=true XLA_FLAGS=--xla_gpu_enable_triton_gemm=false && tables+=("$out"/variants/*.md) || true
else
  echo "variants are left out: they are for gpu, and before 400 s; $SECONDS s are gone"
fi
cat "${tables[@]}"
