#!/usr/bin/env bash
# A broker, a node and two devices as processes of their own, on this machine. State and rows lie in a folder of their own.
set -euo pipefail
cd "$(dirname "$0")"
work=${1:-$(mktemp -d)}
models=$(python -c 'from edge_runtime.demo.model import path; print(path().parent)')
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

python rows.py "$work"

# the broker takes a free port, and prints its address once it listens
coproc BROKER { exec edge-runtime broker --port 0 --state "$work/broker" --json; }
read -r -t 60 listening <&"${BROKER[0]}"
broker=$(python -c 'import json, sys; print(json.loads(sys.argv[1])["url"])' "$listening")

edge-runtime aggregator --broker "$broker" --fleet fleet.toml --state "$work/node" --until-finished &
node=$!

for device in kitchen workshop; do
    edge-runtime agent --broker "$broker" --fleet two-devices --id "$device" \
        --data "$work/$device.jsonl" --state "$work/$device-state" \
        --models "$models" --threads 1 --until-finished &
done

wait "$node"                       # the node ends when both devices have reported the last version
edge-runtime status --broker "$broker" --fleet two-devices
echo "adapters for PEFT: $work/kitchen-state/adapter $work/workshop-state/adapter"
