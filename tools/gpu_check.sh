#!/usr/bin/env bash
# Everything that a CUDA machine can tell, in one command, offline, in under nine minutes: see tools/gpu_check.py.
#     tools/gpu_check.sh [DIRECTORY]     default: benchmarks/results/<device>
cd "$(dirname "$0")/.." && exec python3 tools/gpu_check.py "$@"
