#!/usr/bin/env bash
# Measures everything of docs/benchmarks.md that needs a GPU of 80 GB or more, in at most ten minutes: training steps of
# the 7B, the attention kernel, and decoding.
#
#   benchmarks/on_gpu.sh [FOLDER]      # results go to FOLDER, by default runs/on_gpu
#
# Needs jax[cuda13] and requirements.txt in .venv (or VENV=PATH). A part that fails or takes too long does not stop the
# others; the exit code is the number of such parts.
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

python=${VENV:-.venv}/bin/python
out=${1:-runs/on_gpu}
failed=0
mkdir -p "$out"

part() { # name, most seconds, module and its flags
  local name=$1 seconds=$2
  shift 2
  echo "== $name: python -m $*"
  if ! timeout "$seconds" "$python" -m "$@" 2>"$out/$name.err" | tee "$out/$name.txt"; then
    echo "on_gpu.sh: $name failed; see $out/$name.err" >&2
    failed=$((failed + 1))
  fi
}

export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
finetune=configs/pangea_7b_finetune.py
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv | tee "$out/device.txt"
part attention 60 benchmarks.attention
part decode 120 benchmarks.decode --alone --repetitions=3
part lora 130 benchmarks.mfu --config=$finetune:lora=16 --steps=5 --config.pipeline.rows=2 --config.accumulation=1
part finetune 150 benchmarks.mfu --config=$finetune --steps=5 --config.optimizer.name=adafactor \
  --config.pipeline.rows=1 --config.keep=products
part pretrain 130 benchmarks.mfu --config=configs/pangea_7b_pretrain.py --steps=5 --config.pipeline.rows=4 \
  --config.keep=products
exit "$failed"
