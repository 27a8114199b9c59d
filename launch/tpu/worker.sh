#!/usr/bin/env bash
# Runs on each worker of a pod; launch/tpu/pod.sh calls it.
#
#   worker.sh install [HOST:/EXPORT]    create the Python environment and mount the NFS share of all workers
#   worker.sh start FLAGS               train in the background, with flags of launch/train.py; or evaluate, with `eval`
#                                       and flags of eval/run.py
#   worker.sh status [FLAGS]            print: not installed, not started, running, exited CODE, stopped (by `stop`),
#                                       lost (the machine restarted), or busy (it trains with other flags)
#   worker.sh stop                      save and stop
#   worker.sh end                       wait until a job that lost another worker ends; kill it after 120 seconds
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."

readonly STATE=$HOME/pangea_state ENVIRONMENT=$HOME/pangea_env SHARE=$HOME/pangea_share

install() {
  if is_running; then
    echo "worker.sh: training is running; stop it first" >&2
    exit 1
  fi
  mkdir -p "$STATE"
  # The Python of TPU VMs is too old.
  python3 -m pip install --quiet --user uv
  "$HOME/.local/bin/uv" venv --quiet --allow-existing --python 3.12 "$ENVIRONMENT"
  "$HOME/.local/bin/uv" pip install --quiet --python "$ENVIRONMENT" -r requirements.txt -r requirements-gcs.txt 'jax[tpu]'
  echo "${1:-}" >"$STATE/share"
  mount_share
  rm -f "$STATE/exit_code" "$STATE/pid" # of an earlier installation
  touch "$STATE/installed"
}

# Mounts the share and links the folders that configs name relative to the clone.
mount_share() {
  local source folder
  source=$(<"$STATE/share")
  [[ -n $source ]] || return 0
  command -v mount.nfs >/dev/null || sudo apt-get install -y -q nfs-common
  mkdir -p "$SHARE"
  mountpoint -q "$SHARE" || sudo mount -t nfs -o rw,hard "$source" "$SHARE"
  for folder in data checkpoints runs; do
    mkdir -p "$SHARE/$folder"
    if [[ -d $folder && ! -L $folder ]]; then # `ln` would put the link into the folder
      echo "worker.sh: ~/${PWD##*/}/$folder is a folder of this machine; move it away to use the share" >&2
      exit 1
    fi
    ln -sfn "$SHARE/$folder" "$folder"
  done
}

# It also checks the command line, because after a restart of the machine the id may belong to another process.
is_running() { [[ -f $STATE/pid ]] && grep -qs launch/ "/proc/$(<"$STATE/pid")/cmdline"; }

start() {
  if is_running; then
    echo "worker.sh: training is already running; stop it first" >&2
    exit 1
  fi
  mount_share
  rm -f "$STATE/exit_code" "$STATE/stopped" "$STATE/pid"
  printf '%q ' "$@" >"$STATE/flags"
  # In its own session, which outlives the connection that starts it.
  setsid nohup bash launch/tpu/worker.sh train "$@" </dev/null >>"$STATE/log.txt" 2>&1 &
  until [[ -f $STATE/pid ]]; do sleep 0.1; done
}

train() {
  local code=0 python program=launch/train.py
  if [[ ${1:-} == eval ]]; then
    program=eval/run.py
    shift
  fi
  "$ENVIRONMENT/bin/python" "$program" "$@" &
  python=$!
  echo "$python" >"$STATE/python_pid"
  echo $$ >"$STATE/pid" # of this shell, which lives until it has written the exit code
  wait "$python" || code=$?
  echo "$code" >"$STATE/exit_code.partial"
  mv "$STATE/exit_code.partial" "$STATE/exit_code"
}

status() {
  local known=true
  (($# == 0)) || [[ $(printf '%q ' "$@") == "$(cat "$STATE/flags" 2>/dev/null)" ]] || known=false
  if is_running; then
    if $known; then echo running; else echo busy; fi
  elif [[ -f $STATE/installed ]] && ! $known; then
    echo not started
  elif [[ -f $STATE/stopped ]]; then
    echo stopped
  elif [[ -f $STATE/exit_code ]]; then
    echo "exited $(<"$STATE/exit_code")"
  elif [[ -f $STATE/pid ]]; then
    echo lost
  elif [[ -f $STATE/installed ]]; then
    echo not started
  else
    echo not installed
  fi
}

stop() {
  is_running || return 0
  touch "$STATE/stopped"
  kill -TERM "$(<"$STATE/python_pid")"
}

end() {
  local second
  for ((second = 0; second < 120; second++)); do
    is_running || return 0
    sleep 1
  done
  kill -KILL "$(<"$STATE/python_pid")"
  while is_running; do sleep 1; done
}

case ${1:-} in
  install | start | status | stop | end | train) "$@" ;;
  *) echo "worker.sh: expected install, start, status, stop or end, got '${1:-}'" >&2 && exit 2 ;;
esac
