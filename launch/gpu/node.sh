#!/usr/bin/env bash
# Trains on one machine with GPUs, in one process for all GPUs. It starts the process again after a crash, such as a
# lost GPU or file system, but not after an error in training itself.
#
#   launch/gpu/node.sh [--restarts=5] [--dry_run] FLAGS OF launch/train.py
#
# CUDA_VISIBLE_DEVICES selects the GPUs. VENV replaces .venv. The exit code is the one of launch/train.py.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."

restarts=5 dry_run=false
while (($#)); do
  case $1 in
    --restarts=*) restarts=${1#*=} ;;
    --dry_run) dry_run=true ;;
    -h | --help) sed -n '2,/^set -/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
    *) break ;;
  esac
  shift
done
(($#)) || { echo "node.sh: give the flags of launch/train.py, such as --config=configs/sample.py" >&2 && exit 2; }
python=${VENV:-.venv}/bin/python
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}

printf '%q ' "$python" launch/train.py "$@"
echo
! $dry_run || exit 0
[[ -x $python ]] || { echo "node.sh: no Python in ${VENV:-.venv}; see docs/training.md" >&2 && exit 2; }

# Passes SIGTERM and Ctrl-C on to training, which saves and stops.
set -m # training gets its own process group, in which it does not ignore Ctrl-C
tell() { # signal, exit code if training is not running
  signalled=true
  kill "-$1" "$child" 2>/dev/null || exit "$2"
}

for ((attempt = 0; ; attempt++)); do
  "$python" launch/train.py "$@" &
  child=$!
  trap 'tell TERM 143' TERM
  trap 'tell INT 130' INT
  trap 'tell TERM 143' HUP # the terminal was closed
  while true; do # a signal ends `wait` before training has ended
    signalled=false code=0
    wait "$child" || code=$?
    $signalled || break
  done
  case $code in
    # Done; an error that would happen again (1, 2); stopped by Ctrl-C or by SIGTERM.
    0 | 1 | 2 | 130 | 143) exit "$code" ;;
  esac
  ((attempt < restarts)) || exit "$code"
  echo "node.sh: training ended with $code; restart $((attempt + 1)) of $restarts continues from the last checkpoint" >&2
done
