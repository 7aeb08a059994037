#!/usr/bin/env bash
# What only an accelerator can show, in one call: the quickstart there, bitwise resume, and speed of a paper recipe.
# usage, from the repository root: benchmarks/accelerator.sh [OUT=runs/accelerator] [DEVICE=gpu] [RECIPE=llama_130m] [STEPS=60]
set -euo pipefail
out=${1:-runs/accelerator} device=${2:-gpu} recipe=${3:-llama_130m} steps=${4:-60}
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

echo "== speed of $recipe"
for placement in pre mix sandwich; do
  for accumulate in 1 4; do
    echo "-- $placement, accumulate $accumulate"
    "${train[@]}" --config "configs/$recipe.py" --config.data.source=stdlib --config.data.tokenizer=bytes \
      --config.data.mode=concat --config.eval.tokens=10000 --config.num_steps="$steps" \
      --config.model.norm_position="$placement" --config.accumulate="$accumulate" \
      --workdir "$out/$recipe-$placement-$accumulate" | grep -E '^step' | tail -n 2 || echo "failed"
  done
done
