#!/usr/bin/env bash
# Several processes of one run on this machine (CPU): launch/local.sh N ssljax train --config ... --workdir ...
# Each process prints with its rank in front; the exit status is that of the first process that failed, and then all are stopped.
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: $0 N command ...   (N processes; the command is a ssljax train line)" >&2
  exit 2
fi
processes=$1
shift

export JAX_PLATFORMS=cpu
port=${PORT:-$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT
for ((rank = 0; rank < processes; rank++)); do
  "$@" --coordinator "127.0.0.1:$port" --processes "$processes" --process "$rank" > >(sed -u "s/^/[$rank] /") 2>&1 &
  pids+=($!)
done
for ((i = 0; i < processes; i++)); do
  wait -n "${pids[@]}"
done
