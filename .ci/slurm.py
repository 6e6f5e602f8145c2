#!/usr/bin/env python3
"""Runs flows of MiniFlow on a real Slurm of one node, which it brings up, and ends again.

usage: slurm.py [NAME...] [--python EXE] [--list]

Needs root and Slurm, which it installs by apt where that is missing; else everything is skipped, in one line.  Its
daemons have a key, sockets, ports and a directory of their own, and know nothing of a Slurm that may be there.

Whatever a check does to engines, jobs and controller: each attempt of a task has begun once at the most, which it
tells by one O_APPEND write to a file `told`, and what the run's record says fits that.  In the end no job, no daemon
and no file is left.  A check that fails names the directory that it leaves.  The last line is "N passed, N failed, N
skipped"; the exit status is 0 only if nothing failed.
"""
import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

SOURCE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "miniflow.py")
PACKAGES = ["slurm-wlm", "slurm-wlm-basic-plugins", "slurm-client", "munge"]
PROGRAMS = ["slurmctld", "slurmd", "munged", "sbatch", "squeue", "scancel"]
PATIENCE_S = 120                        # what takes longer hangs
UP_S = 20                               # until the node is there
MANY = 300                              # jobs of the run that has many

CONFIG = """\
ClusterName=miniflow
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket
CryptoType=crypto/munge
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MailProg=/bin/true
KillWait=5
SlurmctldTimeout=30
SlurmdTimeout=30
Waittime=0
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 \
RealMemory={memory} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


class Skip(Exception):
    """There is no Slurm to be had."""


def wait_for(condition, what, seconds=PATIENCE_S):
    """Return the value of `condition` once it holds."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.02)


def install():
    """See that Slurm is there; raise Skip if it can't be."""
    def missing():
        return [name for name in PROGRAMS if not shutil.which(name)]

    if os.geteuid():
        raise Skip("slurmd needs root")
    if missing() and shutil.which("apt-get"):
        for words in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
            subprocess.run(["apt-get", "-q", "-o", "DPkg::Lock::Timeout=300", *words], stdin=subprocess.DEVNULL,
                           env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL)
    if missing():
        raise Skip(f"no {missing()[0]}, and apt does not give it")


def free_ports(count):
    """Return ports that nobody listens to."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Slurm:
    """The daemons of a cluster of one node, in a directory of their own."""

    def __init__(self, root):
        self.root, self.host = root, socket.gethostname().split(".")[0]
        self.env = {**{name: value for name, value in os.environ.items()
                       if not name.startswith(("SLURM_", "SBATCH_", "SQUEUE_", "SCANCEL_", "MINIFLOW_"))},
                    "SLURM_CONF": f"{root}/slurm.conf"}

    def up(self):
        """Start all daemons, and wait for the node."""
        for name in ("state", "spool", "munge"):
            os.mkdir(f"{self.root}/{name}", 0o755)
        os.chmod(self.root, 0o755)
        with open(f"{self.root}/munge/key", "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(os.urandom(1024))
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**21
        with open(f"{self.root}/slurm.conf", "w", encoding="utf-8") as file:
            file.write(CONFIG.format(host=self.host, root=self.root, ports=free_ports(2), cpus=os.cpu_count() or 1,
                                     memory=memory))
        place = f"{self.root}/munge"
        self.daemon("munged", "--force", f"--socket={place}/socket", f"--key-file={place}/key",
                    f"--pid-file={self.root}/munged.pid", f"--log-file={place}/log", f"--seed-file={place}/seed")
        self.start_controller()
        self.daemon("slurmd", "-c", "-f", self.env["SLURM_CONF"], "-N", self.host)
        self.wait_for_node()

    def daemon(self, *words):
        """Start a program that goes into the background; it would hold what it inherits, so that is nothing."""
        done = subprocess.run(words, env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, timeout=PATIENCE_S)
        assert done.returncode == 0, f"{words[0]}: {done.stderr.decode()}"

    def start_controller(self):
        """Start slurmctld."""
        self.daemon("slurmctld", "-f", self.env["SLURM_CONF"])

    def ask(self, *words, seconds=5):
        """Return what one of Slurm's programs prints; "" if it fails, or a dead controller keeps it waiting."""
        try:
            return subprocess.run(words, env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                  stderr=subprocess.DEVNULL, timeout=seconds).stdout.decode()
        except subprocess.TimeoutExpired:
            return ""

    def wait_for_node(self):
        """Wait until the node takes jobs."""
        def is_there():
            state = self.ask("sinfo", "-h", "-o", "%T")
            if state.startswith("down"):
                self.ask("scontrol", "update", f"nodename={self.host}", "state=resume")
            return state.startswith(("idle", "mixed", "allocated"))

        wait_for(is_there, "the node", UP_S)

    def pid(self, name):
        """Return the process of a daemon; None if it does not run."""
        try:
            with open(f"{self.root}/{name}.pid", encoding="ascii") as file:
                pid = int(file.read())
            os.kill(pid, 0)
        except (OSError, ValueError):
            return None
        return pid

    def end(self, name):
        """End a daemon; slurmd without a controller ignores SIGTERM."""
        pid = self.pid(name)
        for number in (signal.SIGTERM, signal.SIGKILL) if pid else ():
            try:
                os.kill(pid, number)
                wait_for(lambda: not self.pid(name), f"the end of {name}", 6)
                break
            except (AssertionError, ProcessLookupError):
                pass

    def down(self):
        """Cancel all jobs and end all daemons."""
        if self.pid("slurmctld"):
            self.ask("scancel", "--quiet", "-u", "root")
            wait_for(lambda: not self.ask("squeue", "-h"), "the end of all jobs", 30)
        for name in ("slurmd", "slurmctld", "munged"):
            self.end(name)


class Project:
    """A directory with one flow, f, which is run as run r."""

    def __init__(self, slurm, python, name, tasks, **fields):
        self.slurm, self.python = slurm, python
        self.path = os.path.join(slurm.root, "projects", name)
        os.makedirs(os.path.join(self.path, "flows"))
        flow = {"name": "f", "defaults": {"executor": "slurm"}, **fields, "tasks": tasks}
        with open(self.at("flows", "f.json"), "w", encoding="utf-8") as file:
            json.dump(flow, file)

    def at(self, *parts):
        """Return the path of a file of the project."""
        return os.path.join(self.path, *parts)

    def start(self, *words, **env):
        """Start a command of MiniFlow."""
        with open(self.at("said"), "ab") as said:
            return subprocess.Popen([self.python, SOURCE, *words], cwd=self.path, stdin=subprocess.DEVNULL, stdout=said,
                                    stderr=said, env={**self.slurm.env, "MINIFLOW_SLURM_POLL_S": "0.5",
                                                      "MINIFLOW_SLURM_CALL_S": "3", **env})

    def expect(self, process, code=0):
        """Wait for the end of a command, which is to be `code`."""
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"an engine hangs: {self.said()[-2000:]}") from None
        assert process.returncode == code, f"exit {process.returncode}, not {code}: {self.said()[-2000:]}"

    def run(self, code=0, **env):
        """Run the flow to its end."""
        self.expect(self.start("run", "f", "--run-id", "r", **env), code)

    def read(self, *parts):
        """Return the text of a file; "" if it is not there."""
        try:
            with open(self.at(*parts), encoding="utf-8") as file:
                return file.read()
        except FileNotFoundError:
            return ""

    def said(self):
        """Return what MiniFlow has said."""
        return self.read("said")

    def told(self):
        """Return the lines that tasks have written."""
        return self.read("told").splitlines()

    def wait_told(self, count, what="tasks to begin"):
        """Wait until tasks have written so many lines."""
        wait_for(lambda: len(self.told()) >= count, what)

    def wait_said(self, *texts):
        """Wait until MiniFlow has said all that."""
        wait_for(lambda: all(text in self.said() for text in texts), f"{texts} to be said")

    def go(self):
        """Let tasks go on that wait for it."""
        with open(self.at("go"), "w", encoding="ascii"):
            pass

    def tasks(self):
        """Return what the record says of each task."""
        return json.loads(self.read("miniflow_output", "runs", "r.json"))["tasks"]

    def ends(self):
        """Return status, reason and number of attempts of each task."""
        return {name: (t["status"], t["reason"], len(t["attempts"])) for name, t in self.tasks().items()}

    def check(self, expected):
        """Check how tasks have ended, and that no attempt has begun twice."""
        assert self.ends() == expected, f"{self.ends()} is not {expected}; {self.said()[-2000:]}"
        begun = [line for line in self.told() if line.startswith("begin")]
        assert len(begun) == len(set(begun)), f"begun twice: {begun}"


#: What tasks of the checks do: they tell of their begin, wait until they may go on, and tell of their end.
TELL = 'echo "begin $MINIFLOW_TASK $MINIFLOW_ATTEMPT" >>told; '
WAIT = 'while ! test -e go; do sleep 0.05; done; echo "end $MINIFLOW_TASK $MINIFLOW_ATTEMPT" >>told'
OK = ("success", None, 1)


def check_success(make):
    """Outputs, params, context and logs of jobs and processes of one flow."""
    project = make([
        {"id": "a", "command": TELL + "echo n=4 >$MINIFLOW_OUTPUT"},
        {"id": "b", "depends_on": ["a"], "executor": "local", "command": ["echo", "${{ tasks.a.outputs.n }}"]},
        {"id": "c", "depends_on": ["b"], "foreach": ["x\n", "'$(false)", "%j"], "args": ["${{ item }}"],
         "command": TELL + 'printf "%s|" "$1"; cat; cat "$MINIFLOW_CONTEXT" >&2', "stdin": "in ${{ params.p }}",
         "resources": {"cpus": 1, "memory_mb": 10, "time_s": 60, "partition": "main"}}], params={"p": "é"})
    project.run()
    project.check({"a": OK, "b": OK, "c": ("success", None, 0), "c[0]": OK, "c[1]": OK, "c[2]": OK})
    logs = [project.read("miniflow_output", "logs", "r", f"c[{n}].1.log") for n in range(3)]
    context = '{"params": {"p": "\\u00e9"}, "tasks": {"a": {"n": "4"}}, "ctx": {"p": "\\u00e9", "n": "4"}}'
    assert logs == [f"{item}|in é{context}" for item in ("x\n", "'$(false)", "%j")], logs


def check_paths(make):
    """Directories whose names mean something to Slurm, or to a shell."""
    project = make([{"id": "a", "command": TELL + "echo in; echo err >&2"}])
    for name in ("%j", "a b", "x\\%j\\n", "'$(false)\"", "é%%"):
        there = project.at(name)
        os.makedirs(there)
        shutil.copytree(project.at("flows"), os.path.join(there, "flows"))
        place, project.path = project.path, there
        project.run()
        assert project.read("miniflow_output", "logs", "r", "a.1.log") == "in\nerr\n", name
        project.path = place


def check_failures(make):
    """Exit codes, retries, timeouts, what can't start, and what sbatch refuses."""
    project = make([
        {"id": "again", "command": TELL + "test $MINIFLOW_ATTEMPT = 2", "max_retries": 2},
        {"id": "bad", "command": TELL + "exit 3", "max_retries": 1},
        {"id": "slow", "command": TELL + "sleep 600 & sleep 601", "timeout_s": 1, "grace_s": 1},
        {"id": "deaf", "command": TELL + "trap '' TERM; while :; do sleep 0.1; done", "timeout_s": 1, "grace_s": 1},
        {"id": "gone", "command": ["no-such-program"]},
        {"id": "nowhere", "command": "true", "resources": {"partition": "none"}, "max_retries": 1}])
    project.run(1)
    gone, nowhere = project.ends()["gone"][1], project.ends()["nowhere"][1]
    assert gone.startswith("cannot start: ") and "no-such-program" in gone, gone
    assert nowhere.startswith("cannot start: sbatch: ") and "partition" in nowhere, nowhere
    late = ("failed", "timeout after 1 s", 1)
    project.check({"again": ("success", None, 2), "bad": ("failed", "exit 3", 2), "slow": late, "deaf": late,
                   "gone": ("failed", gone, 1), "nowhere": ("failed", nowhere, 1)})


def check_cancel(make):
    """A cancelled run ends its running jobs with grace, and takes those that wait from the queue."""
    count = 4 * (os.cpu_count() or 1) + 4          # more than the node has room for
    project = make([{"id": f"t{n}", "command": "trap 'echo TERM >>told; exit' TERM; " + TELL + "sleep 600 & wait"}
                    for n in range(count)])
    process = project.start("run", "f", "--run-id", "r")
    project.wait_told(count - 4)
    wait_for(lambda: project.said().count("submitted") == count, "all submissions")
    began = time.monotonic()
    project.expect(project.start("cancel", "r"))
    project.expect(process, 143)
    took = time.monotonic() - began
    project.check(dict.fromkeys((f"t{n}" for n in range(count)), ("cancelled", "cancelled by SIGTERM", 1)))
    assert project.told().count("TERM") == count - 4, project.told()
    wait_for(lambda: not project.slurm.ask("squeue", "-h"), "an empty queue", 10)
    return f"{count} jobs in {took:.1f} s"


def check_killed(make):
    """Engines killed by SIGKILL at four moments: the jobs go on, and are taken up as they are."""
    project = make([{"id": "a", "command": TELL + WAIT + "; echo v=7 >$MINIFLOW_OUTPUT"},
                    {"id": "b", "command": TELL, "depends_on": []},
                    {"id": "c", "command": ["echo", "${{ tasks.a.outputs.v }}"], "depends_on": ["a", "b"]}])
    for seconds in (0.3, 0.5, 1.5, 3.0):
        process = project.start("run", "f", "--run-id", "r")
        time.sleep(seconds)
        process.kill()
        process.wait()
    project.wait_told(2)
    project.go()
    project.wait_told(3, "the end of a")
    project.expect(project.start("resume", "r"))
    project.check({"a": OK, "b": OK, "c": OK})


def check_kills(make):
    """Engines killed at random moments, one after another: no attempt begins twice, none runs beside another."""
    act = 'exec 9>>"held-$MINIFLOW_TASK"; flock -n 9 || echo overlap >>told; ' + TELL + "sleep 0.3"
    tasks = [{"id": f"t{n}", "command": act, "depends_on": [f"t{n - 6}"] if n > 5 else []} for n in range(24)]
    project, chance = make(tasks), random.Random(7)
    kills = 0
    while True:
        process = project.start("run", "f", "--run-id", "r", MINIFLOW_SLURM_POLL_S="0.1")
        try:
            process.wait(chance.uniform(0.1, 1.5))
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    project.expect(process)
    project.check({task["id"]: OK for task in tasks})
    assert sorted(project.told()) == sorted(f"begin {task['id']} 1" for task in tasks), project.told()
    return f"{kills} kills"


def check_abandoned(make):
    """The jobs of a run whose engine is gone can be cancelled."""
    project = make([{"id": "a", "command": TELL + "sleep 600"}, {"id": "b", "command": "true", "depends_on": ["a"]}])
    process = project.start("run", "f", "--run-id", "r")
    project.wait_told(1)
    process.kill()
    process.wait()
    project.expect(project.start("cancel", "r"))
    project.check({"a": ("cancelled", "cancelled by miniflow cancel", 1),
                   "b": ("cancelled", "cancelled by miniflow cancel", 0)})
    wait_for(lambda: not project.slurm.ask("squeue", "-h"), "an empty queue", 10)


def check_scancel(make):
    """A job that somebody else cancels, in the queue or while it runs, has failed, and is tried again."""
    project = make([{"id": "a", "command": TELL + "test $MINIFLOW_ATTEMPT = 2 || sleep 600", "max_retries": 1}])
    process = project.start("run", "f", "--run-id", "r")
    project.wait_told(1)
    project.slurm.ask("scancel", "-n", "mf:r")
    project.expect(process)
    project.check({"a": ("success", None, 2)})
    reason = project.tasks()["a"]["attempts"][0]["reason"]
    assert "Slurm" in reason, reason
    return reason


def check_controller(make):
    """A controller that hangs, and one that is gone: local tasks and jobs go on, and the run when it is back."""
    for pause, go_on in ((lambda slurm: os.kill(slurm.pid("slurmctld"), signal.SIGSTOP),
                          lambda slurm: os.kill(slurm.pid("slurmctld"), signal.SIGCONT)),
                         (lambda slurm: slurm.end("slurmctld"), lambda slurm: slurm.start_controller())):
        project = make([{"id": "a", "command": TELL + WAIT}, {"id": "b", "command": TELL, "depends_on": ["l"]},
                        {"id": "l", "executor": "local", "command": WAIT},
                        {"id": "m", "executor": "local", "command": "touch local", "depends_on": ["l"]}])
        process = project.start("run", "f", "--run-id", "r")
        project.wait_told(1)
        pause(project.slurm)
        try:
            project.wait_said("Slurm gives no answer")
            project.go()
            project.wait_said("success    m", "success    a")
            time.sleep(2)                          # in which b is not submitted
        finally:
            go_on(project.slurm)
            project.slurm.wait_for_node()
        project.expect(process)
        project.check({"a": OK, "b": OK, "l": OK, "m": OK})


def check_many(make):
    """Hundreds of jobs."""
    project = make([{"id": f"t{n}", "command": TELL} for n in range(MANY)])
    began = time.monotonic()
    project.run()
    took = time.monotonic() - began
    project.check({f"t{n}": OK for n in range(MANY)})
    assert len(project.told()) == MANY, len(project.told())
    return f"{MANY} jobs in {took:.1f} s, {MANY / took:.0f} a second"


CHECKS = {name[6:]: function for name, function in list(globals().items()) if name.startswith("check_")}


def make_check(name, slurm, python):
    """Make one check; print how it went, and tell whether well."""
    projects = []

    def make(tasks, **fields):
        projects.append(Project(slurm, python, f"{name}-{len(projects)}", tasks, **fields))
        return projects[-1]

    began = time.monotonic()
    try:
        figures = CHECKS[name](make)
    except Exception as exc:
        print(f"FAILED  slurm {name}: {type(exc).__name__}: {exc}; see {' '.join(p.path for p in projects)}")
        return False
    print(f"ok      slurm {name}: {figures or f'{time.monotonic() - began:.1f} s'}")
    return True


def parse_arguments():
    """Return the options that were typed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"a check: {', '.join(CHECKS)} (default: all)")
    parser.add_argument("--python", metavar="EXE", default=sys.executable, help="the Python that runs the engines")
    parser.add_argument("--list", action="store_true", help="list the checks")
    options = parser.parse_args()
    for name in options.names:
        if name not in CHECKS:
            parser.error(f"there is no check {name}; there are {', '.join(CHECKS)}")
    return options


def main():
    """Make the checks that are named, or all, and return the exit status."""
    options = parse_arguments()
    if options.list:
        print("\n".join(f"{name:12}{check.__doc__}" for name, check in CHECKS.items()))
        return 0
    sys.stdout.reconfigure(line_buffering=True)
    names = options.names or list(CHECKS)
    slurm = Slurm(os.path.realpath(tempfile.mkdtemp(prefix="miniflow-slurm-")))
    passed = 0
    try:
        install()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        slurm.up()
        passed = sum(make_check(name, slurm, options.python) for name in names)
    except Skip as exc:
        os.rmdir(slurm.root)
        print(f"skipped slurm: {exc}")
        print(f"0 passed, 0 failed, {len(names)} skipped")
        return 0
    finally:
        slurm.down()
        if passed == len(names):
            shutil.rmtree(slurm.root)
    print(f"{passed} passed, {len(names) - passed} failed, 0 skipped")
    return 0 if passed == len(names) else 1


if __name__ == "__main__":
    sys.exit(main())
