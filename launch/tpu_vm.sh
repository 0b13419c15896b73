#!/usr/bin/env bash
# Runs one command on every worker of a TPU-VM slice:
#   launch/tpu_vm.sh NAME ZONE ssljax train --config configs/clip.py:paper --workdir gs://bucket/runs/clip
# Copies this checkout to the workers, installs it with the tpu extra, and starts the command everywhere; jax finds the others by itself.
# A worker whose command was told to stop and saved (status 75), or lost another (76), starts it again. When maintenance or preemption
# takes the slice itself, systemd sends SIGTERM first; run this line again when the slice is back: it resumes.
set -euo pipefail

if [[ $# -lt 3 ]]; then
  echo "usage: $0 NAME ZONE command ..." >&2
  exit 2
fi
name=$1 zone=$2
shift 2
root=$(git rev-parse --show-toplevel)

on_all() { gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "$1"; }

archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git -C "$root" archive --format=tar.gz --output "$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$name:ssljax.tar.gz" --zone "$zone" --worker=all
on_all "mkdir -p ssljax && tar -xzf ssljax.tar.gz -C ssljax && python3 -m venv venv && venv/bin/pip install -q -e 'ssljax[tpu]'"
command="cd ssljax && PATH=\$HOME/venv/bin:\$PATH $(printf '%q ' "$@")"
on_all "while true; do ($command); status=\$?; [ \$status = 75 ] || [ \$status = 76 ] || exit \$status; sleep 10; done"
