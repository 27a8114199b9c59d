#!/usr/bin/env bash
# Trains on a Cloud TPU pod, from the request for the pod to the end of training. It needs gcloud and bash 4.4 or later.
#
#   launch/tpu/pod.sh VERB --name=NAME --zone=ZONE [OPTIONS] [-- FLAGS OF launch/train.py | -- eval FLAGS OF eval/run.py]
#
#   create    request the pod                       wait      wait until the pod is there
#   install   copy this clone to all workers        run       start training on all workers
#   watch     do every step above that is missing, also after a preemption, until training ends
#   status    print request, cost and job           logs      fetch the log of every worker
#   stop      save and stop training                delete    give the pod back
#
#   --type=v5litepod-16    accelerator type: v5litepod-16, v5p-128, v6e-64, ... (create, watch)
#   --runtime=VERSION      software version of the TPU VM; the default depends on the type
#   --slices=1             number of pods, joined over the data centre network
#   --spot | --reserved    a cheaper pod that can be preempted, or one from a reservation; the default is on demand
#   --project=PROJECT      the default is the project of `gcloud config`
#   --share=HOST:/EXPORT   an NFS export that holds data/, checkpoints/ and runs/ for all workers, if not in a bucket
#   --logs=runs/NAME-logs  folder that `logs` writes to
#   --poll=60              seconds between two checks
#   --restarts=50          `watch` gives up after this many restarts
#   --dry_run              print every command and execute none
#
# Flags of gcloud, as --FLAG or --FLAG=VALUE, are passed on unchanged, and gcloud reports those that it does not know:
#   to every ssh and scp   --tunnel-through-iap and --batch-size=N (then it is `gcloud alpha`), --internal-ip, --plain,
#                          --ssh-key-*=X, --strict-host-key-checking=X, --force-key-file-overwrite;
#                          --ssh-flag=X to ssh only, --scp-flag=X to scp only
#   to every command       --account=X, --billing-project=X, --configuration=X, --impersonate-service-account=X
#   to the request         all others (create, watch), such as --network=X, --subnetwork=X, --internal-ips,
#                          --service-account=X, --labels=KEY=VALUE, --reservation-host-project=X
#
# docs/training.md explains every step. Exit codes of `watch`: 0 if training is done; 1 if training failed, a command
# failed three times in a row, or there were too many restarts; 2 for a wrong command line; 143 after `pod.sh stop`.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# Folders in the user's home on every worker.
readonly CLONE=pangea_jax STATE=pangea_state
readonly WORKER=$CLONE/launch/tpu/worker.sh
readonly EXIT_ERROR=1 EXIT_PREEMPTED=143 # of launch/common.py

say() { echo "pod.sh: $*" >&2; }

die() {
  say "$@"
  exit 2
}

usage() { sed -n '2,/^set -/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

parse() {
  verb=$1
  shift
  name='' zone='' project='' type='' runtime='' slices=1 tier='' share='' logs='' poll=60 restarts=50 dry_run=false
  flags=() track=() everywhere=() connect=() ssh=() scp=() request=()
  while (($#)); do
    case $1 in
      --name=* | --zone=* | --project=* | --type=* | --runtime=* | --slices=* | --share=* | --logs=* | --poll=* | --restarts=*)
        local option=${1%%=*}
        printf -v "${option#--}" %s "${1#*=}"
        ;;
      --spot | --reserved) tier=$1 ;;
      --dry_run) dry_run=true ;;
      --help) usage && exit ;;
      --account=* | --billing-project=* | --configuration=* | --impersonate-service-account=*) everywhere+=("$1") ;;
      --tunnel-through-iap | --batch-size=*) # the general release of `tpu-vm ssh` has neither
        track=(alpha)
        connect+=("$1")
        ;;
      --internal-ip | --plain | --ssh-key-*=* | --strict-host-key-checking=* | --force-key-file-overwrite)
        connect+=("$1")
        ;;
      --ssh-flag=*) ssh+=("$1") ;;
      --scp-flag=*) scp+=("$1") ;;
      --)
        shift
        flags=("$@")
        break
        ;;
      --*) request+=("$1") ;;
      *) die "expected an option such as --type=v5p-8, got $1; launch/tpu/pod.sh --help lists all options" ;;
    esac
    shift
  done
  [[ -n $name && -n $zone ]] || die "$verb needs --name=NAME and --zone=ZONE"
  [[ $slices =~ ^[1-9][0-9]*$ && $restarts =~ ^[0-9]+$ && $poll =~ ^[0-9]+$ ]] ||
    die "--slices must be 1 or more; --restarts and --poll must be 0 or more"
  if [[ $verb == run || $verb == watch ]] && ((${#flags[@]} == 0)); then
    die "$verb needs the flags of launch/train.py after --, such as -- --config=configs/sample.py; or eval and those of eval/run.py"
  fi
  if ((${#request[@]})); then
    [[ $verb == create || $verb == watch ]] ||
      die "$verb does not know ${request[*]}; only create and watch pass on flags with the request"
    say "passed on to gcloud with the request: ${request[*]}"
  fi
  logs=${logs:-runs/$name-logs}
  place=(--zone="$zone" ${project:+--project="$project"} "${everywhere[@]}")
  nodes=("$name")
  if ((slices > 1)); then mapfile -t nodes < <(seq -f "$name-%.0f" 0 $((slices - 1))); fi
}

# Prints a command, ready to copy, and executes it except in a dry run.
execute() {
  local line
  printf -v line '%q ' "$@"
  echo "${line% }" >&3
  $dry_run || "$@"
}

# Prints fields of the request.
describe() {
  execute gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format="value($1)"
}

# Prints the state of the request: ACTIVE, MISSING, UNKNOWN (gcloud failed), or another state of Cloud TPU.
state() {
  local said
  if said=$(describe state.state 2>&1); then
    if $dry_run; then echo ACTIVE; else echo "${said##*$'\n'}"; fi
  elif [[ $said == *NOT_FOUND* ]]; then
    echo MISSING
  else
    echo "$said" >&2
    echo UNKNOWN
  fi
}

# Prints the on-demand list price of a chip-hour in dollars, as of 2025, where it is known:
# https://cloud.google.com/tpu/pricing
price() {
  case ${type%-*}@$zone in
    v5litepod@us-south1-*) echo 1.416 ;;
    v5litepod@us-*) echo 1.20 ;;
    v5litepod@europe-west4-*) echo 1.56 ;;
    v5p@us-south1-*) echo 4.779 ;;
    v5p@us-*) echo 4.20 ;;
    v5p@europe-west4-*) echo 4.2525 ;;
    v6e@us-*) echo 2.70 ;;
    v6e@europe-west4-*) echo 2.97 ;;
  esac
}

# Says what the pod costs.
cost() {
  local each chips=${type##*-} until="You pay from ACTIVE until 'pod.sh delete'."
  each=$(price)
  if [[ "$tier ${request[*]}" == *--reserv* ]]; then
    echo "$slices x $type: the reservation decides the price. The pod holds its chips until 'pod.sh delete'."
  elif [[ -z $each || ! $chips =~ ^[1-9][0-9]*$ ]]; then
    echo "$slices x ${type:-unknown type}: price unknown in $zone, see https://cloud.google.com/tpu/pricing. $until"
  else
    # v5p and older types count cores, two a chip.
    [[ $type != v5p-* ]] || chips=$((chips / 2))
    chips=$((chips * slices))
    echo "$slices x $type: $chips chips, $(LC_ALL=C awk "BEGIN { printf \"%.2f\", $chips * $each }") dollars an hour" \
      "on demand ($each a chip, list price of 2025); spot is cheaper, and its price varies. $until"
  fi
}

# Prints the `worker.sh status` of one worker. One is enough, because all processes of a job end when one fails.
job() {
  execute gcloud "${track[@]}" compute tpus tpu-vm ssh "${nodes[0]}" "${place[@]}" "${connect[@]}" "${ssh[@]}" \
    --worker=0 --command="if [ -f $WORKER ]; then bash $WORKER status ${flags[*]@Q}; else echo not installed; fi" ||
    echo unreachable
}

# Runs a command for all slices at the same time, because training waits until every slice has started.
on_slices() {
  local node pid pids=() code=0
  for node in "${nodes[@]}"; do
    "$1" "$node" "${@:2}" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
  return "$code"
}

ssh_all() { # slice, shell command, more flags
  execute gcloud "${track[@]}" compute tpus tpu-vm ssh "$1" "${place[@]}" "${connect[@]}" "${ssh[@]}" --worker=all \
    --command="$2" "${@:3}"
}

copy_all() { # slice, file
  execute gcloud "${track[@]}" compute tpus tpu-vm scp "$2" "$1:$CLONE.tar.gz" "${place[@]}" "${connect[@]}" \
    "${scp[@]}" --worker=all
}

do_create() {
  [[ -n $type ]] || die "create needs --type, such as v5litepod-16"
  local size=(--node-id="$name")
  if [[ -z $runtime ]]; then
    case $type in
      v6e-*) runtime=v2-alpha-tpuv6e ;;
      v5p-*) runtime=v2-alpha-tpuv5 ;;
      v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
      v4-*) runtime=tpu-ubuntu2204-base ;;
      *) die "give --runtime=VERSION for the type $type (gcloud compute tpus versions list --zone=$zone)" ;;
    esac
  fi
  ((slices == 1)) || size=(--node-count="$slices" --node-prefix="$name")
  say "$(cost)"
  execute gcloud compute tpus queued-resources create "$name" "${place[@]}" \
    --accelerator-type="$type" --runtime-version="$runtime" "${size[@]}" ${tier:+"$tier"} "${request[@]}"
}

do_wait() {
  local now
  while now=$(state) && [[ $now != ACTIVE ]]; do
    case $now in
      FAILED | SUSPENDED | SUSPENDING | MISSING)
        say "the request $name is $now; 'gcloud compute tpus queued-resources describe $name' gives the reason"
        return 1
        ;;
    esac
    echo "$name: $now" >&2
    sleep "$poll"
  done
}

do_install() {
  local archive=${TMPDIR:-/tmp}/$name.tar.gz
  # This includes uncommitted changes.
  execute tar -czf "$archive" --exclude=__pycache__ configs eval launch pangea_jax requirements.txt requirements-gcs.txt || return
  on_slices copy_all "$archive" || return
  execute rm -f "$archive"
  on_slices ssh_all "mkdir -p $CLONE && tar -xzf $CLONE.tar.gz -C $CLONE && bash $WORKER install ${share@Q}"
}

do_run() { on_slices ssh_all "bash $WORKER start ${flags[*]@Q}"; }

# Ends the rest of the job on all workers, then starts it on all workers.
restart() { on_slices ssh_all "bash $WORKER end" && do_run; }

do_status() {
  local now kind='' reservation=''
  now=$(state)
  echo "request: $now"
  if [[ $now != MISSING && $now != UNKNOWN ]]; then
    read -r kind reservation < <(describe 'tpu.nodeSpec[0].node.acceleratorType,reservationName') || true
    if [[ $kind == v* ]]; then type=$kind tier=${reservation:+--reserved}; fi
    echo "cost: $(cost)"
  fi
  echo "job: $(job)"
}

# Does one step of `watch`. A step fails during a preemption or while the network is down; then `watch` looks again and
# repeats it. After three failures in a row, another try would fail, too.
failures=0
try() {
  if "$@"; then
    failures=0
    return
  fi
  failures=$((failures + 1))
  if ((failures == 3)); then
    say "$name: this failed three times in a row; correct it, and the same command continues"
    exit "$EXIT_ERROR"
  fi
  sleep "$poll"
  return 1
}

do_watch() {
  if $dry_run; then # print the commands of a run without failures
    do_create && do_wait && do_install && do_run && do_status
    return
  fi
  local requests=0 starts=0 seen=false now
  while true; do
    now=$(state)
    case $now in
      ACTIVE) seen=true && watch_job ;;
      MISSING)
        # Somebody deleted the request.
        ! $seen || { say "the request $name is gone" && return 1; }
        ((requests <= restarts)) || give_up # the first request does not count as a restart
        requests=$((requests + 1))
        try do_create || true
        ;;
      FAILED | SUSPENDED) # such a request never gets a pod again
        ! try do_delete || seen=false
        ;;
      UNKNOWN) sleep "$poll" ;;
      *) seen=true && sleep "$poll" ;;
    esac
  done
}

give_up() {
  say "$name: gave up after $restarts restarts"
  exit "$EXIT_ERROR"
}

# Looks once at the job on an existing pod. Exits when nothing is left to do.
watch_job() {
  local now
  now=$(job)
  case $now in
    running | unreachable) sleep "$poll" ;;
    'not installed') try do_install || true ;;
    stopped)
      if ((starts)); then
        say "$name: training was stopped; the same command continues it"
        exit "$EXIT_PREEMPTED"
      fi
      ! try do_run || starts=1
      ;;
    'exited 0')
      say "$name: the job is done; the pod costs until 'pod.sh delete' gives it back"
      exit 0
      ;;
    busy)
      say "$name trains with other flags; stop that first"
      exit 1
      ;;
    "exited $EXIT_ERROR" | 'exited 2') # it would fail again
      say "the job has $now; 'pod.sh logs' fetches the reason"
      exit 1
      ;;
    *) # not started, lost, stopped for maintenance, or crashed because another machine was lost
      ((starts <= restarts)) || give_up
      starts=$((starts + 1))
      try restart || true
      ;;
  esac
}

do_logs() {
  local node folder code=0
  [[ $logs == /* ]] || logs=$PWD/$logs
  for node in "${nodes[@]}"; do
    folder=$logs/$node
    execute mkdir -p "$folder"
    # gcloud 528 writes to the folder None of the working directory instead of the given one.
    (
      $dry_run || { cd "$folder" && ln -sfn . None; }
      ssh_all "$node" "cat $STATE/log.txt" --output-directory="$folder"
    ) || code=$?
    $dry_run || rm -f "$folder/None"
  done
  ((code == 0)) || return "$code"
  echo "the logs are in $logs" >&2
}

do_stop() { on_slices ssh_all "bash $WORKER stop"; }

do_delete() {
  execute gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
}

case ${1:-} in
  -h | --help | '') usage && exit ;;
  create | wait | install | run | watch | status | logs | stop | delete) ;;
  *) die "unknown verb $1; launch/tpu/pod.sh --help lists all verbs" ;;
esac
parse "$@"
exec 3>&1
"do_$verb"
