#!/usr/bin/env bash
# Three methods on two virtual devices, without a broker: the devices and the node run their own code, one after another.
set -euo pipefail
cd "$(dirname "$0")"
work=${1:-$(mktemp -d)}
models=$(python -c 'from edge_runtime.demo.model import path; print(path().parent)')

python rows.py "$work/rows"
edge-runtime study spec.toml --data "$work/rows" --models "$models" --out "$work/study" --workers 1
echo "table and pictures: $work/study"
