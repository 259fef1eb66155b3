#!/usr/bin/env bash
# Which model fits, for three budgets of this machine and for a board that is not here. Nothing is trained.
set -euo pipefail
cd "$(dirname "$0")"
models=$(python -c 'from edge_runtime.demo.model import path; print(path().parent)')

for budget in 1GiB 640MiB 520MiB; do
    edge-runtime plan --fleet fleet.toml --models "$models" --budget "$budget"
done
edge-runtime plan --fleet fleet.toml --models "$models" --board jetson-orin-nano-8gb
