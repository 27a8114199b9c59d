#!/usr/bin/env bash
# A Cloud TPU pod from the request to the last log line, by the Google Cloud CLI (gcloud) and bash 4.4 or later.
#
#   launch/tpu/pod.sh VERB --name=NAME --zone=ZONE [OPTIONS] [-- FLAGS OF launch/train.py]
#
#   create    queue a request for the pod           wait      until it is there
#   install   copy this clone to all workers        run       start training on all workers
#   watch     run it to the end: whatever of create, wait, install and run is missing, again after a preemption
#   status    the request's state and the job's     logs      fetch the log of every worker
#   stop      save and stop training                delete    give the pod back
#
#   --type=v5litepod-16    accelerator type: v5litepod-16, v5p-128, v6e-64, ... (create, watch)
#   --runtime=VERSION      of the TPU VM; by default the one that belongs to the type
#   --slices=1             pods joined over the data centre network
#   --spot | --reserved    cheaper and preemptible, or of a reservation; else on demand
#   --project=PROJECT      default: that of `gcloud config`
#   --share=HOST:/EXPORT   an NFS export (Filestore) that holds data/, checkpoints/ and runs/ for all workers
#   --logs=runs/NAME-logs  where `logs` writes
#   --poll=60              seconds between two looks
#   --restarts=50          `watch` gives up after so many
#   --dry_run              print every command, execute none
#
# docs/training.md goes through it step by step. Exit codes of `watch`: 0 trained to the end, 1 training failed, or a
# step three times in a row, or there were too many restarts, 2 a wrong command line, 143 somebody has called `stop`.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# Below the home of the user on every worker.
readonly CLONE=pangea_jax STATE=pangea_state
readonly WORKER=$CLONE/launch/tpu/worker.sh
readonly EXIT_ERROR=1 EXIT_PREEMPTED=143 # of launch/common.py

die() {
  echo "pod.sh: $*" >&2
  exit 2
}

usage() { sed -n '2,/^set -/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

parse() {
  verb=${1:-}
  shift || true
  name='' zone='' project='' type='' runtime='' slices=1 tier='' share='' logs='' poll=60 restarts=50 dry_run=false
  flags=()
  while (($#)); do
    case $1 in
      --name=*) name=${1#*=} ;;
      --zone=*) zone=${1#*=} ;;
      --project=*) project=${1#*=} ;;
      --type=*) type=${1#*=} ;;
      --runtime=*) runtime=${1#*=} ;;
      --slices=*) slices=${1#*=} ;;
      --spot | --reserved) tier=$1 ;;
      --share=*) share=${1#*=} ;;
      --logs=*) logs=${1#*=} ;;
      --poll=*) poll=${1#*=} ;;
      --restarts=*) restarts=${1#*=} ;;
      --dry_run) dry_run=true ;;
      --)
        shift
        flags=("$@")
        break
        ;;
      *) die "unknown option $1; launch/tpu/pod.sh --help shows all" ;;
    esac
    shift
  done
  [[ -n $name && -n $zone ]] || die "$verb needs --name=NAME and --zone=ZONE"
  [[ $slices =~ ^[1-9][0-9]*$ && $restarts =~ ^[0-9]+$ && $poll =~ ^[0-9]+$ ]] ||
    die "--slices, --restarts and --poll take numbers"
  logs=${logs:-runs/$name-logs}
  place=(--zone="$zone")
  [[ -z $project ]] || place+=(--project="$project")
  nodes=("$name")
  if ((slices > 1)); then
    nodes=()
    for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
  fi
}

# Prints a command as it could be typed.
show() {
  local line
  printf -v line '%q ' "$@"
  echo "${line% }" >&3
}

execute() {
  show "$@"
  $dry_run || "$@"
}

# For a command whose output is wanted; a dry run takes the first argument for it.
ask() {
  local assumed=$1
  shift
  show "$@"
  if $dry_run; then echo "$assumed"; else "$@"; fi
}

runtime_of() {
  case $1 in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v4-*) echo tpu-ubuntu2204-base ;;
    *) die "give --runtime=VERSION for the type $1 (gcloud compute tpus versions list --zone=$zone)" ;;
  esac
}

state() {
  local said
  if said=$(ask "${1:-ACTIVE}" gcloud compute tpus queued-resources describe "$name" "${place[@]}" \
    --format='value(state.state)' 2>&1); then
    echo "${said##*$'\n'}"
  elif [[ $said == *NOT_FOUND* ]]; then
    echo MISSING
  else
    echo "$said" >&2
    echo UNKNOWN
  fi
}

# A shell command on the workers of every slice at the same time: training waits until all have begun.
on_workers() {
  local command=$1 node pids=()
  shift
  for node in "${nodes[@]}"; do
    execute gcloud compute tpus tpu-vm ssh "$node" "${place[@]}" --worker=all --command="$command" "$@" &
    pids+=($!)
  done
  wait_for "${pids[@]}"
}

wait_for() {
  local pid code=0
  for pid in "$@"; do wait "$pid" || code=$?; done
  return "$code"
}

do_create() {
  [[ -n $type ]] || die "create needs --type, such as v5litepod-16"
  local version size=(--node-id="$name")
  version=${runtime:-$(runtime_of "$type")} || exit
  ((slices == 1)) || size=(--node-count="$slices" --node-prefix="$name")
  execute gcloud compute tpus queued-resources create "$name" "${place[@]}" \
    --accelerator-type="$type" --runtime-version="$version" "${size[@]}" ${tier:+"$tier"}
}

do_wait() {
  local now
  while true; do
    now=$(state)
    case $now in
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING | MISSING)
        echo "pod.sh: the request $name is $now; 'gcloud compute tpus queued-resources describe $name' says why" >&2
        return 1
        ;;
    esac
    echo "$name: $now" >&2
    sleep "$poll"
  done
}

do_install() {
  local archive=${TMPDIR:-/tmp}/$name.tar.gz node pids=()
  # As it lies here, uncommitted changes included.
  execute tar -czf "$archive" --exclude=__pycache__ configs eval launch pangea_jax requirements.txt || return
  for node in "${nodes[@]}"; do
    execute gcloud compute tpus tpu-vm scp "$archive" "$node:$CLONE.tar.gz" "${place[@]}" --worker=all &
    pids+=($!)
  done
  wait_for "${pids[@]}" || return
  execute rm -f "$archive"
  on_workers "mkdir -p $CLONE && tar -xzf $CLONE.tar.gz -C $CLONE && bash $WORKER install ${share@Q}"
}

do_run() {
  ((${#flags[@]})) || die "$verb needs the flags of launch/train.py after --, such as -- --config=configs/sample.py"
  on_workers "bash $WORKER start ${flags[*]@Q}"
}

# What `worker.sh status` says, of one worker: when one process of a job fails, all end.
job() {
  ask 'exited 0' gcloud compute tpus tpu-vm ssh "${nodes[0]}" "${place[@]}" --worker=0 \
    --command="if [ -f $WORKER ]; then bash $WORKER status ${flags[*]@Q}; else echo not installed; fi" || echo unreachable
}

do_status() {
  echo "request: $(state)"
  echo "job: $(job)"
}

# A step of `watch`. It fails while a pod is being taken away, or gcloud has no network, and is then tried again
# when `watch` has looked how things stand; three in a row are an error that would come again.
failures=0
try() {
  if "$@"; then
    failures=0
    return
  fi
  failures=$((failures + 1))
  if ((failures == 3)); then
    echo "pod.sh: $name: that failed three times in a row; the same command goes on once it is put right" >&2
    exit "$EXIT_ERROR"
  fi
  sleep "$poll"
  return 1
}

do_watch() {
  ((${#flags[@]})) || die "watch needs the flags of launch/train.py after --"
  if $dry_run; then # what happens where nothing fails
    do_create && do_wait && do_install && do_run && do_status
    return
  fi
  local requests=0 starts=0 there=false now is
  while ((requests <= restarts + 1 && starts <= restarts + 1)); do
    now=$(state)
    case $now in
      MISSING | UNKNOWN) ;;
      *) there=true ;;
    esac
    case $now in
      ACTIVE)
        is=$(job)
        case $is in
          running | unreachable) sleep "$poll" ;;
          'not installed') try do_install || true ;;
          stopped)
            if ((starts)); then
              echo "$name: training was stopped; the same command goes on" >&2
              return "$EXIT_PREEMPTED"
            fi
            ! try do_run || starts=1
            ;;
          'exited 0')
            echo "$name: trained to the end; 'pod.sh delete' gives the pod back" >&2
            return
            ;;
          busy)
            echo "pod.sh: $name trains something else; stop that first" >&2
            return 1
            ;;
          "exited $EXIT_ERROR" | 'exited 2') # it would come again
            echo "pod.sh: training has $is; 'pod.sh logs' fetches what it said" >&2
            return 1
            ;;
          *) # not started, lost, asked to stop by a maintenance, or crashed as when another machine is gone
            starts=$((starts + 1))
            try on_workers "bash $WORKER end" && try do_run || true
            ;;
        esac
        ;;
      MISSING)
        # Once it has been there, somebody has deleted it.
        ! $there || { echo "pod.sh: the request $name is gone" >&2 && return 1; }
        requests=$((requests + 1))
        try do_create || true
        ;;
      FAILED | SUSPENDED) # such a request never gets a pod again
        ! try do_delete || there=false
        ;;
      *) sleep "$poll" ;;
    esac
  done
  echo "pod.sh: $restarts restarts, and not at the end" >&2
  return 1
}

do_logs() {
  local node
  for node in "${nodes[@]}"; do
    execute mkdir -p "$logs/$node"
    execute gcloud compute tpus tpu-vm ssh "$node" "${place[@]}" --worker=all \
      --command="cat $STATE/log.txt" --output-directory="$logs/$node"
  done
  echo "the logs are in $logs" >&2
}

do_stop() { on_workers "bash $WORKER stop"; }

do_delete() {
  execute gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
}

main() {
  case ${1:-} in
    -h | --help | '') usage && exit ;;
    create | wait | install | run | watch | status | logs | stop | delete) ;;
    *) die "unknown verb $1; launch/tpu/pod.sh --help shows all" ;;
  esac
  parse "$@"
  exec 3>&1
  "do_$verb"
}

main "$@"
