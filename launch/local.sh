#!/usr/bin/env bash
# Several processes of one run on this machine (CPU; bash 5.1 or newer): launch/local.sh N ssljax train --config ... --workdir ...
# Each process prints with its rank in front. When one fails, all are stopped, and its exit status is returned. A run that was
# told to stop and saved (status 75), or that lost a process (76), is started again, unless this script was told to stop itself.
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: $0 N command ...   (N processes; the command is a ssljax train line)" >&2
  exit 2
fi
processes=$1
shift

export JAX_PLATFORMS=cpu
pids=() told=
trap 'kill -KILL "${pids[@]}" 2>/dev/null || true' EXIT
trap 'told=1; kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT

while true; do
  port=${PORT:-$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
  pids=() status=0
  for ((rank = 0; rank < processes; rank++)); do
    "$@" --coordinator "127.0.0.1:$port" --processes "$processes" --process "$rank" > >(sed -u "s/^/[$rank] /") 2>&1 &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do running[pid]=1; done
  while ((${#running[@]})); do
    code=0
    wait -n -p ended "${!running[@]}" || code=$?
    [[ -n ${ended:-} ]] || continue # a signal to this script ended the wait
    unset "running[$ended]"
    if ((code && !status)); then
      status=$code
      # The others notice by themselves and say why; those that cannot are killed.
      (sleep "${GRACE:-20}" && kill -KILL "${!running[@]}" 2>/dev/null) >/dev/null 2>&1 &
    fi
  done
  if [[ -n $told ]] || ((status != 75 && status != 76)); then
    exit "$status"
  fi
  echo "status $status: starting again"
done
