#!/usr/bin/env bash
# Trains on one machine with GPUs, in a single process for all of them. It starts the process again after a crash (a
# GPU that fell off the bus, a lost file system), but not after an error of training itself.
#
#   launch/gpu/node.sh [--restarts=5] [--dry_run] FLAGS OF launch/train.py
#
# CUDA_VISIBLE_DEVICES selects GPUs, VENV another environment than .venv. The exit code is that of launch/train.py.
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
set -m # its own process group, in which Ctrl-C is not ignored
tell() { # signal, exit code if no process is there
  signalled=true
  kill "-$1" "$child" 2>/dev/null || exit "$2"
}

for ((attempt = 0; ; attempt++)); do
  "$python" launch/train.py "$@" &
  child=$!
  trap 'tell TERM 143' TERM
  trap 'tell INT 130' INT
  trap 'tell TERM 143' HUP # the terminal has gone
  while true; do # a signal ends `wait` before training has ended
    signalled=false code=0
    wait "$child" || code=$?
    $signalled || break
  done
  case $code in
    # Done; an error that would come again (1, 2); stopped by Ctrl-C or by SIGTERM.
    0 | 1 | 2 | 130 | 143) exit "$code" ;;
  esac
  ((attempt < restarts)) || exit "$code"
  echo "node.sh: training ended with $code; restart $((attempt + 1)) of $restarts continues from the last checkpoint" >&2
done
