#!/usr/bin/env bash
# Everything that a CUDA machine can tell, in one command, offline. It goes on past a part that fails.
#     tools/gpu_check.sh [DIRECTORY]     default: benchmarks/results/<device>
# Leaves environment.json, summary.json, benchmarks.json, the demo's chart and a log per part; exits 1 if a part failed.
set -uo pipefail
cd "$(dirname "$0")/.."

device=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | tr ' /' '--')
out=${1:-benchmarks/results/${device:?no CUDA device: nvidia-smi names none}}
mkdir -p "$out"
parts=() failed=()

part() { # name, command...
  local name=$1 start=$SECONDS status=passed
  shift
  timeout 240 "$@" > "$out/$name.log" 2>&1 || { status=failed; failed+=("$name"); }
  parts+=("\"$name\": {\"status\": \"$status\", \"seconds\": $((SECONDS - start))}")
  printf '%-12s %s\n' "$name" "$status"
}

part build python3 -m pip install -e . --no-build-isolation --no-deps
part environment bash -c "python3 -m mova_kernels --json > '$out/environment.json'"
part tests python3 -m pytest tests/test_gpu.py
part demo python3 -m mova_kernels demo --device cuda --output "$out"
part benchmarks python3 -m pytest benchmarks/ --benchmark-only --benchmark-json "$out/benchmarks.json"

commit=$(git rev-parse HEAD 2>/dev/null || echo unknown)
printf '{"commit": "%s", "date": "%s", "parts": {%s}}\n' "$commit" "$(date -u +%F)" "$(IFS=,; echo "${parts[*]}")" \
  > "$out/summary.json"
[ -s "$out/demo.log" ] && cat "$out/demo.log"
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]} (see $out/*.log)"
  exit 1
fi
