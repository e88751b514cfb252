#!/bin/bash
# Chains over the processes of one machine: torchrun.sh [processes] [options of chains.py]
set -euo pipefail
processes=${1:-2}
shift || true
# Threads of all processes share the machine's cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec torchrun --standalone --nproc-per-node "$processes" "$(dirname "$0")/chains.py" "$@"
