#!/usr/bin/env python3
"""Kills engines of MiniFlow, really, and checks that nothing is lost and nothing is left behind.

usage: torture.py [NAME...] [--python EXE] [--list]

The tasks of every run are the oracle: each tells of its begin and end with one O_APPEND write each to a file `told`,
and holds a lock of its own as long as anything of it lives.  Whatever was done to the engines, in the end

- no two attempts of one task have overlapped, and none has begun twice;
- a task whose success an engine has told of has not begun again;
- a task has begun only after all its upstream had ended;
- the run is a success, its record fits what the tasks told, and journal and RUN.json say the same;
- no process is left, and no file but RUN.json and what was kept of a torn journal.

What does not hold leaves its directory behind, which is named.  The last line is "N passed, N failed, N skipped"; the
exit status is 0 only if nothing failed.
"""
import argparse
import concurrent.futures
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from typing import NamedTuple

SOURCE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "miniflow.py")
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
SHOWN = 10                              # kinds of violations that are shown
GIVEN_UP = 20                           # violations after which killing at random makes no sense any more
PATIENCE_S = 60                         # what takes longer hangs
KILL_AFTER_S = (0.02, 0.4)              # since an engine that has been loaded began
RANDOM_KILLS, LEFT_KILLS, NEW_RACES, RESUMED_RACES, RACERS = 200, 40, 50, 20, 6
LEFT_S = 6.0                            # on a machine that has other things to do as well
MAX_RSS_MB = 60
KILL, KILLED = "signal=KILL", -signal.SIGKILL      # what strace does, and what comes of it

#: A task: `act.sh SECONDS FAIL STUBBORN`; one that is to fail does so once, a stubborn one ignores SIGTERM.
ACT_SCRIPT = "import subprocess, sys; sys.exit(subprocess.call(['sh', 'act.sh', *sys.argv[1:]]))"
ACT = """
[ -z "$3" ] || trap '' TERM
exec 9>>"held-$MINIFLOW_TASK"
flock -n 9 || echo "overlap $MINIFLOW_TASK $MINIFLOW_ATTEMPT" >>told
echo "begin $MINIFLOW_TASK $MINIFLOW_ATTEMPT" >>told
sleep "$1" || exit
[ -z "$2" ] || [ -e "failed-$MINIFLOW_TASK" ] || { : >"failed-$MINIFLOW_TASK"; exit 3; }
echo "end $MINIFLOW_TASK $MINIFLOW_ATTEMPT" >>told
"""

#: A task of many processes: a child, a child's child, one that has left and closed its files, two that ignore SIGTERM.
CROWD = """
sleep 60 &
(sleep 60 & exec sleep 60) &
setsid sleep 60 <&- >&- 2>&- &
(trap '' TERM; sleep 60; sleep 60) &
wait
"""
CROWD_SIZE = 7

#: An engine that does all it can before it says so by closing the pipe GATE, and waits until its stdin is closed.
GATED = """
import argparse, fcntl, os, select, shutil, subprocess, sys, threading
sys.path.insert(0, sys.argv[1])
import miniflow
os.close(int(sys.argv[2]))
sys.stdin.read()
if sys.argv[3] == "scheduled":
    del sys.argv[2:4]
    sys.exit(miniflow.run_scheduled())
sys.exit(miniflow.main(sys.argv[3:]))
"""

#: Prints the exit status and the peak memory of a command in kB, with as little memory of its own as can be.
MEASURE = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(status, usage.ru_maxrss)
"""

#: Writes so many blocks of all bytes there are.
FLOOD = """
import sys
block = bytes(range(256)) * 4096
for _ in range(int(sys.argv[1])):
    sys.stdout.buffer.write(block)
"""
BLOCK = 1 << 20

#: What a resumed engine says that is no error.
NOTES = r"\d+ bytes at the end of .* are torn|run r has succeeded already"
#: Why a run may have failed: what may well end the engine is not tried for ever, and what can't be read is no output.
POISONED, UNREAD = r"interrupted \d+ times in a row", "bad output: output: "


class Violation(Exception):
    """Something that was promised does not hold."""


class Skipped(Exception):
    """A check can't be made here."""


def require(holds, problem):
    """Raise Violation unless something holds."""
    if not holds:
        raise Violation(problem)


def describe(exc):
    """Return what to say of a violation, or of an error of this program."""
    return str(exc) if isinstance(exc, Violation) else repr(exc)


# ---- engines and what they leave behind

class Lab:
    """What all checks share: the engine, as it was when they began, and a place for projects."""

    def __init__(self, python, root):
        self.python, self.root = python, root
        self.code = os.path.join(root, "code", "miniflow.pyc")         # compiling takes longer than all else
        source = shutil.copy(SOURCE, root)
        subprocess.run([python, "-c", "import py_compile, sys; py_compile.compile(*sys.argv[1:], doraise=True)",
                        source, self.code], check=True)
        sys.path.insert(0, root)
        sys.dont_write_bytecode = True
        import miniflow
        self.miniflow = miniflow
        self.traces = shutil.which("strace") is not None and can_trace()
        self._numbers = itertools.count(1)

    def place(self):
        """Return where a new directory may be."""
        return os.path.join(self.root, f"project-{next(self._numbers)}")

    def engine(self, *args, gate=None):
        """Return the command that is `miniflow ARGS`, at once or once its `gate` is opened."""
        code = [self.code] if gate is None else ["-c", GATED, os.path.dirname(self.code), str(gate)]
        return [self.python, "-S", "-E", *code, *args]

    def has(self, tool):
        """Tell whether a program is there, and of use."""
        return self.traces if tool == "strace" else shutil.which(tool) is not None


def can_trace():
    """Tell whether strace may look at processes that are not its own children."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process, \
            subprocess.Popen(["strace", "-o", os.devnull, "-p", str(process.pid)], stderr=subprocess.PIPE) as tracer:
        said = tracer.stderr.readline()
        process.stdin.close()
    return b"attached" in said


def at_call(paths, call, fault, when=1):
    """Return the options by which strace makes a `fault` at call number `when` of a kind."""
    return on_paths(paths) + ["-e", f"trace={call}", "-e", f"inject={call}:{fault}:when={when}"]


def on_paths(paths):
    """Return the options by which strace looks at these paths only, if there are any."""
    return [word for path in paths for word in ("-P", path)]


class Ended(NamedTuple):
    """How an engine ended."""

    code: int
    stderr: str

    def __str__(self):
        return f"exit {self.code}: {self.stderr[-600:].strip()}"


def run_args(durability="normal", run_id="r"):
    """Return the arguments that run a run or go on with it."""
    return ("run", "f", "--run-id", run_id, "-j", "2", "--output", "json", "--durability", durability)


def living(place, tasks_only=False):
    """Return the living processes that were started below `place`, all of them or those of tasks only."""
    found, marks = [], [b"TORTURED=" + os.fsencode(place) + b"/"] + [b"MINIFLOW_COOKIE="] * tasks_only
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            with open(f"/proc/{name}/environ", "rb") as file:
                words = file.read().split(b"\0")
            if all(any(word.startswith(mark) for word in words) for mark in marks):
                found.append(int(name))
    return found


def check_gone(place, seconds, tasks_only=False):
    """See that no process is left `seconds` from now; return how long it took."""
    began = time.monotonic()
    while True:
        left, took = living(place, tasks_only), time.monotonic() - began
        if not left:
            return took
        require(took < seconds, f"{len(left)} processes are left after {seconds:g} s: {left[:10]}")
        time.sleep(0.02)


def kill_all(place):
    """Kill all processes that were started below `place`."""
    for pid in living(place):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class Project:
    """A directory with one flow, f, and one run of it, and what is known of the tasks that engines told of."""

    def __init__(self, lab, tasks, script=ACT, path=None, run_id="r", **fields):
        self.lab, self.tasks, self.run_id, self.fields = lab, tasks, run_id, fields
        self.acknowledged = {}          # task -> the attempt whose success was told of
        self.path = path or lab.place()
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("MINIFLOW_")}
        self.env["TORTURED"] = self.path + "/"
        os.makedirs(self.at("flows"))
        self.write("flows/f.json", json.dumps({"name": "f", "tasks": tasks, **fields}))
        self.write("act.sh", script)
        self.write("tasks/act.py", ACT_SCRIPT)
        self.write("told", "")

    def copy(self):
        """Return another project in the same state; no process may be left of this one."""
        other = Project(self.lab, self.tasks, run_id=self.run_id, **self.fields)
        shutil.copytree(self.path, other.path, dirs_exist_ok=True)
        other.acknowledged.update(self.acknowledged)
        return other

    def remove(self):
        """Remove it from the disk."""
        shutil.rmtree(self.path)

    def at(self, name):
        """Return the path of a file."""
        return os.path.join(self.path, name)

    def read(self, name):
        """Return what is in a file."""
        with open(self.at(name), encoding="utf-8") as file:
            return file.read()

    def write(self, name, text):
        """Write a file."""
        os.makedirs(os.path.dirname(self.at(name)), exist_ok=True)
        with open(self.at(name), "w", encoding="utf-8") as file:
            file.write(text)

    def told(self):
        """Return what the tasks told, as words of lines."""
        return [line.split() for line in self.read("told").splitlines()]

    def start(self, *args, name="", gate=None):
        """Start an engine, by default on the run, its output into files; with a `gate` it waits there."""
        command = self.lab.engine(*(args or run_args(run_id=self.run_id)), gate=gate)
        with open(self.at("out" + name), "wb") as out, open(self.at("err" + name), "wb") as err:
            return subprocess.Popen(command, cwd=self.path, env=self.env, stdout=out, stderr=err,
                                    stdin=subprocess.DEVNULL if gate is None else subprocess.PIPE,
                                    pass_fds=() if gate is None else (gate,))

    def start_gated(self, names, *args):
        """Start engines that have done all they can before they begin; to close their stdin lets them begin."""
        ready, gate = os.pipe()
        try:
            engines = [self.start(*args, name=name, gate=gate) for name in names]
        finally:
            os.close(gate)
        with open(ready, "rb") as file:
            file.read()                 # until all have closed the gate
        return engines

    def wait(self, process, name=""):
        """Wait for the end of an engine, and take note of what it acknowledged."""
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise Violation(f"an engine took more than {PATIENCE_S} s") from None
        for line in self.read("out" + name).splitlines(keepends=True):
            event = json.loads(line) if line.endswith("}\n") else {}
            if event.get("event") == "attempt_ended" and event["status"] == "success":
                self.acknowledged.setdefault(event["task"], event["attempt"])
        return Ended(process.returncode, self.read("err" + name))

    def run(self, *args):
        """Run an engine to its end."""
        return self.wait(self.start(*args))

    def traced(self, trace, *args):
        """Run an engine to its end under the eyes, and hands, of strace, the lines of which it returns too."""
        engine, = self.start_gated([""], *args)
        with self.tracer(engine, trace):
            ended = self.wait(engine)
        return ended, self.read("strace")

    @contextlib.contextmanager
    def tracer(self, engine, trace):
        """Look at an engine by strace, and open its gate, if any; wait for the end of all that is traced."""
        command = ["strace", "-y", "-o", self.at("strace"), "-p", str(engine.pid), *trace]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            said = process.stderr.readline()
            if engine.stdin:
                engine.stdin.close()
            try:
                yield
            except BaseException:
                kill_all(self.path)     # or strace would wait for them
                raise
        require("attached" in said, said.strip())

    def finish(self, replay):
        """Bring the run to its success, with `replay` by way of an engine that is killed when all is written."""
        if replay:
            ended, _ = self.traced(at_call([self.record(".jsonl")], "unlink", KILL))
            if ended.code == KILLED:
                self.check_replay()
        for _ in range(8):
            ended = self.run()
            if ended.code == 0:
                return
            require(ended.code == 1, f"going on with the run: {ended}")
            self.check_failed(POISONED)
        raise Violation("the run does not come to its success")

    # -- the oracle --

    def record(self, end):
        """Return the path of a file of the run's record."""
        return self.at(f"miniflow_output/runs/{self.run_id}{end}")

    def state(self):
        """Return what RUN.json says."""
        return json.loads(self.read(self.record(".json")))

    def journal(self):
        """Return what the journal says, nothing if there is none yet."""
        with contextlib.suppress(FileNotFoundError):
            return self.read(self.record(".jsonl"))
        return ""

    def check_replay(self):
        """See that the journal alone and RUN.json alone say the same, once all is written."""
        found = []
        for gone in (self.run_id + ".json", self.run_id + ".jsonl"):
            copy = self.at(f"without-{gone}")
            shutil.copytree(self.at("miniflow_output/runs"), os.path.join(copy, "runs"))
            os.unlink(os.path.join(copy, "runs", gone))
            loaded = self.lab.miniflow.Store(copy).load(self.run_id)
            found.append({"seq": loaded.seq, **self.lab.miniflow.run_to_json(loaded.run)})
            shutil.rmtree(copy)
        differ = [name for name, value in found[0].items() if found[1][name] != value]
        require(not differ, f"journal and RUN.json differ in {differ}")

    def check_failed(self, why):
        """See that the run failed for no other reason than `why`."""
        reasons = [task["reason"] for task in self.state()["tasks"].values() if task["status"] == "failed"]
        require(reasons and all(re.match(why, reason) for reason in reasons), f"the run failed: {reasons}")

    def check(self, tidy=True):
        """See that everything holds; `tidy` False: an error was made of what only tidies up."""
        problems = self.told_problems() + self.record_problems() + self.leftovers(tidy)
        require(not problems, "; ".join(problems))
        check_gone(self.path, 5.0, tasks_only=True)

    def told_problems(self):
        """Return what is wrong with what the tasks told.

        Attempts of a task begin in the order of their numbers and after its success there is none, so a task that
        began again after its success was acknowledged shows by its number.
        """
        upstream = {task["id"]: task.get("depends_on", ()) for task in self.tasks}
        problems, last, numbers = [], {}, {}
        for word, task, number in self.told():
            if word == "overlap":
                problems.append(f"{task}: attempt {number} runs beside another one")
                continue
            if word == "begin":
                if int(number) <= numbers.get(task, 0):
                    problems.append(f"{task}: attempt {number} begins after attempt {numbers[task]}")
                if int(number) > self.acknowledged.get(task, int(number)):
                    problems.append(f"{task}: attempt {number} begins though {self.acknowledged[task]} succeeded")
                problems += [f"{task} begins before {up} has ended" for up in upstream[task] if last.get(up) != "end"]
                numbers[task] = int(number)
            last[task] = word
        return problems

    def record_problems(self):
        """Return what is wrong with the record of the run, which should be that of a success."""
        loaded, state = self.lab.miniflow.Store(self.at("miniflow_output")).load(self.run_id), self.state()
        if (loaded.status, state["status"]) != ("success", "success"):
            return [f"the run is {state['status']}"]
        problems, ends = [], {(task, int(number)) for word, task, number in self.told() if word == "end"}
        for name, task in state["tasks"].items():
            logs = [attempt["log"] for attempt in task["attempts"]]
            ways = [attempt["status"] for attempt in task["attempts"]]
            wanted = [f"logs/{self.run_id}/{name}.{n}.log" for n in range(1, len(ways) + 1)]
            if logs != wanted or task["attempt"] != len(ways):
                problems.append(f"{name}: the attempts have gaps: {task['attempt']} {logs}")
            if ways.count("success") != 1 or ways[-1] != "success" or task["status"] != "success":
                problems.append(f"{name} is {task['status']}, its attempts {ways}")
            if (name, len(ways)) not in ends:
                problems.append(f"{name}: attempt {len(ways)} is recorded as success and has not ended")
            told = self.acknowledged.get(name, len(ways))
            if told != len(ways):
                problems.append(f"{name}: attempt {told} was said to be a success, now it is {len(ways)}")
        return problems

    def leftovers(self, tidy):
        """Return which files are left that should not be."""
        names = [name for name in os.listdir(self.at("miniflow_output/runs"))
                 if name != f"{self.run_id}.json" and (
                     name.endswith(".tmp") or not name.startswith(f"{self.run_id}.jsonl.bad-"))]
        names += [name for name in (f"tmp/{self.run_id}", "schedule.lock", "schedule.json.tmp")
                  if tidy and os.path.exists(self.at(f"miniflow_output/{name}"))]
        return [f"left over: {name}" for name in names]


class Report:
    """What a check has found; shared by threads."""

    def __init__(self):
        self.violations, self._lock = [], threading.Lock()     # label and text of each
        self.counts, self.figures = Counter(), {"processes": [], "seconds": []}

    def count(self, what, number=1):
        """Count something that was done."""
        with self._lock:
            self.counts[what] += number

    def figure(self, what, value):
        """Note a figure of one of many."""
        self.figures[what].append(value)

    @contextlib.contextmanager
    def watch(self, project, label):
        """Take note of a violation, or of anything unforeseen, and of where; remove the project if all is well."""
        try:
            yield
        except Exception as exc:
            kill_all(project.path)
            self.violations.append((f"{label} (kept: {project.path})", describe(exc)))
        else:
            project.remove()


def in_parallel(work, jobs, workers):
    """Do `work` on each of the jobs; what it raises is raised."""
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(work, jobs):
            pass


def act(name, *upstream, seconds=0.01, fails=False, stubborn=False, script=False):
    """Return a task that tells of itself, as a command or as a Python script, which may be forked."""
    words = [str(seconds), "fails" * fails, "stubborn" * stubborn]
    action = {"script": "act.py", "args": words} if script else {"command": ["sh", "act.sh", *words]}
    return {"id": name, **action, "depends_on": list(upstream), "max_retries": 2 * fails}


# ---- syscalls

#: Calls that change nothing that outlives the engine, so that to die at one of them is to die at the next other one.
READS = frozenset(["access", "fcntl", "fstat", "getdents64", "ioctl", "lseek", "lstat", "newfstatat", "poll", "pread64",
                   "read", "readlink", "stat", "statx"])
VOLATILE = READS | {"close", "flock"}
#: The calls of which there are more or fewer with another durability, and those between which these come.
DURABLE = frozenset(["write", "fsync", "fdatasync", "rename", "unlink"])
SMALL = [act("a"), act("b", fails=True), act("c", "a", "b"), act("d", "a")]

def state_paths(project):
    """Return the paths of all that an engine on SMALL may write."""
    names = ["", "logs", "logs/r", "tmp", "tmp/r", "tmp/r/io", "tmp/r/work", "runs", "runs/r.lock",
             "runs/r.json", "runs/r.json.tmp", "runs/r.jsonl", "runs/r.jsonl.tmp"]
    names += [f"tmp/r/io/context-{n}.json{end}" for n in range(1, 6) for end in ("", ".tmp")]
    names += [name.format(task["id"], n) for task in SMALL for n in range(1, 5)
              for name in ("logs/r/{}.{}.log", "tmp/r/io/{}.{}.out")]
    return [os.path.join(project.path, "miniflow_output", name).rstrip("/") for name in names]


class Scene(NamedTuple):
    """Where faults are made: on what an engine is run, and how."""

    name: str
    make: object                        # returns a project
    durability: str

    def trace(self, options):
        """Return what strace says of an engine; `options` gives its options for a project."""
        project = self.make()
        _, log = project.traced(options(project), *run_args(self.durability))
        project.remove()
        return log

    def calls(self):
        """Return the names of the calls by which an engine changes state, most frequent first."""
        log = self.trace(lambda project: on_paths(state_paths(project)) + ["-e", "trace=%file,%desc"])
        return [name for name, _ in Counter(re.findall(r"^(\w+)\(", log, re.M)).most_common() if name not in READS]

    def calls_on(self, part):
        """Return name and number, of its kind, of the calls on paths that have `part` in their name."""
        numbers, found = Counter(), []
        for line in self.trace(lambda project: ["-s", "0"]).splitlines():
            name = line.partition("(")[0]
            numbers[name] += 1
            if part in line and name not in VOLATILE:
                found.append((name, numbers[name]))
        return found


def interrupted(lab, durability):
    """Return a project whose engine was killed when about half was done, the last line of its journal torn."""
    project = Project(lab, SMALL)
    journal = project.record(".jsonl")
    ended, _ = project.traced(at_call([journal], "write", KILL, 6), *run_args(durability))
    require(ended.code == KILLED, f"the engine was not killed: {ended}")
    check_gone(project.path, 5.0)
    with open(journal, "ab") as file:
        file.write(b'{"event":"attempt_en')
    return project


def meet(report, scene, fault, call, when, paths=state_paths):
    """Let an engine meet a fault, and see that nothing comes of it; return whether it did meet it."""
    project, hit = scene.make(), False
    with report.watch(project, f"{scene.name}, {scene.durability}: {fault} at {call} {when}"):
        ended, log = project.traced(at_call(paths(project), call, fault, when), *run_args(scene.durability))
        hit = ended.code == KILLED or "(INJECTED)" in log
        if hit and fault == KILL:
            require(ended.code == KILLED, str(ended))
            project.finish(replay=when % 3 == 0)
            project.check()
        else:
            require_clear_error(project, ended)
    report.count("kills" if fault == KILL else "errors", hit)
    return hit


def sweep(report, scene, fault, call):
    """Make a fault at every call of one kind, one engine each, until an engine meets none."""
    for when in itertools.count(1):
        if not meet(report, scene, fault, call, when):
            return


def require_clear_error(project, ended):
    """See that an engine took an error of the disk well, or said clearly that it could not."""
    if ended.code == 74:
        lines = [line for line in ended.stderr.splitlines() if not re.match(NOTES, line)]
        require(len(lines) == 1, f"expected one line of error: {ended}")
        check_gone(project.path, 1.0)
        project.finish(replay=False)
    elif ended.code == 1:
        project.check_failed(UNREAD)
        project.finish(replay=False)
    else:
        require(ended.code == 0, str(ended))
    project.check(tidy=ended.code != 0)


def check_syscalls(lab, report):
    """Kill engines, and give them errors, at every call by which they change state."""
    jobs = []
    for durability in ("normal", "full"):
        left = interrupted(lab, durability)
        scenes = [Scene("a new run", lambda: Project(lab, SMALL), durability),
                  Scene("a resumed run", left.copy, durability)]
        calls = scenes[0].calls()
        kills = [call for call in calls if call not in VOLATILE and (durability == "normal" or call in DURABLE)]
        jobs += [(sweep, report, scene, KILL, call) for scene in scenes for call in kills]
    jobs += [(sweep, report, scenes[0], fault, call) for fault in ("error=EIO", "error=ENOSPC") for call in calls]
    jobs += [(meet, report, scenes[1], fault, call, when, lambda project: ())
             for call, when in scenes[1].calls_on(".bad-") for fault in (KILL, "error=EIO")]
    in_parallel(lambda job: job[0](*job[1:]), jobs, CPUS)
    return "{kills} kills and {errors} errors"


# ---- schedule

DUE_S = 3                               # from when a schedule is first seen until its one time
SCHEDULED = "scheduled"                 # what GATED takes for the engine that a tick starts
FOLDERS = ("-f", "flows", "-t", "tasks", "-o", "miniflow_output")


def check_schedule(lab, report):
    """Kill ticks, and the engines that they start, at every call by which they change state."""
    at = int(time.time()) + DUE_S
    owed = Project(lab, SMALL, run_id=time.strftime("f-%Y%m%dT%H%M%SZ", time.gmtime(at)),
                   schedule={"at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))})
    require(owed.run("tick").code == 0 and not owed.told(), "the schedule was not seen, or began too early")
    time.sleep(max(0.0, at + 0.1 - time.time()))
    run_id = owed.run_id
    tick = Victim("ticks", ("tick",), ["runs", "logs", "schedule.lock", "schedule.json", "schedule.json.tmp",
                                       f"logs/{run_id}", f"logs/{run_id}/engine.log"])
    start = Victim("ticks at a start", ("tick",), [])
    engine = Victim("engines", (SCHEDULED, str(at), *FOLDERS, "run", "flows/f.json", "--run-id", run_id), [
        f"runs/{run_id}{end}" for end in (".lock", ".json", ".json.tmp", ".jsonl", ".jsonl.tmp")], True)
    jobs = [(sweep_schedule, report, owed, victim, call) for victim in (tick, start, engine)
            for call in victim.calls(owed)]
    in_parallel(lambda job: job[0](*job[1:]), jobs, CPUS)
    return "kills of {ticks} ticks, of {ticks at a start} at the start of an engine, of {engines} engines"


class Victim(NamedTuple):
    """What is killed when it has to do with the schedule: its arguments, and the paths that are looked at, if any."""

    name: str
    args: tuple
    paths: list
    is_engine: bool = False

    def trace(self, project):
        """Return the options by which strace looks at it."""
        paths = [os.path.join(project.path, "miniflow_output", name) for name in self.paths]
        return on_paths(paths) or ["-e", "trace=%process"]

    def calls(self, owed):
        """Return the names of the calls that it makes, and see that all is well when it is left alone."""
        project = owed.copy()
        ended, log = project.traced(self.trace(project), *self.args)
        require(ended.code == 0, str(ended))
        wait_until_run(project)
        project.run("tick")
        project.check()
        project.remove()
        return sorted(set(re.findall(r"^(\w+)\(", log, re.M)) - VOLATILE - {"exit_group"})


def sweep_schedule(report, owed, victim, call):
    """Kill at each call of one kind, each in a project of its own; see that what is owed begins once, and ends."""
    for when in itertools.count(1):
        project = owed.copy()
        with report.watch(project, f"{victim.name}: {KILL} at {call} {when}"):
            ended, _ = project.traced([*victim.trace(project), "-e", f"trace={call}",
                                       "-e", f"inject={call}:{KILL}:when={when}"], *victim.args)
            hit = ended.code == KILLED
            report.count(victim.name, hit)
            require(hit or ended.code == 0, str(ended))
            ended = project.run("tick")
            require(ended.code == 0, f"the next tick: {ended}")
            wait_until_run(project)
            if victim.is_engine:        # whose run was begun or not, and tidied up or not
                project.finish(replay=False)
            before = project.told()
            require(project.run("tick").code == 0 and project.told() == before, "what was done is done again")
            project.check()
        if not hit:
            return


def wait_until_run(project):
    """Wait until no process of a project is left, of which the last one is the engine of a run."""
    check_gone(project.path, PATIENCE_S)
    require(any(map(os.path.exists, map(project.record, (".json", ".jsonl")))), "what was due has not begun")


# ---- random

def check_random(lab, report):
    """Kill engines at random times, on random graphs."""
    seeds = itertools.count(1)

    def work(_):
        while report.counts["kills"] < RANDOM_KILLS and len(report.violations) < GIVEN_UP:
            killed_at_random(lab, report, next(seeds))
    in_parallel(work, range(2 * CPUS), 2 * CPUS)
    return "{kills} kills of {runs} runs"


def random_graph(chance):
    """Return 10 to 12 tasks, each upstream of some later ones."""
    names, script = [f"t{n}" for n in range(chance.randint(10, 12))], chance.random() < 0.5
    return [act(name, *[up for up in names[:n] if chance.random() < 0.25],
                seconds=round(chance.uniform(0.01, 0.09), 3), fails=chance.random() < 0.15,
                stubborn=chance.random() < 0.3, script=script)
            for n, name in enumerate(names)]


def killed_at_random(lab, report, seed):
    """Make a run through some kills, each engine followed at once by the next."""
    chance = random.Random(seed)
    project = Project(lab, random_graph(chance))
    with report.watch(project, f"seed {seed}"):
        names = [f"-{n}" for n in range(5)]
        engines = project.start_gated(names)
        for engine, name in zip(engines, names):
            engine.stdin.close()
            time.sleep(chance.uniform(*KILL_AFTER_S))
            engine.kill()
            ended = project.wait(engine, name)
            report.count("kills", ended.code == KILLED)
            if ended.code == 1:
                project.check_failed(POISONED)
            elif ended.code != KILLED:
                require(ended.code == 0, str(ended))
                break
        for engine in engines:          # those that still wait at their gates
            engine.kill()
            engine.wait()
        project.finish(replay=lab.traces)
        project.check()
    report.count("runs")


# ---- left

#: The calls by which an engine starts processes, and those between which it tells of them.
STARTS = frozenset(["clone", "clone3", "fork", "pidfd_open", "pipe2", "vfork", "write"])
LONG = [{"id": name, "command": "sleep 60"} for name in "ab"]
EXEC_DELAY_S = 0.4


def check_left(lab, report):
    """Kill engines with many processes, and engines that are just starting some."""
    jobs = [(crowd_left, lab, report, number) for number in range(LEFT_KILLS)]
    if lab.traces:
        brief = Project(lab, [{**task, "command": "true"} for task in LONG])
        _, log = brief.traced([])
        brief.remove()
        log = log[:log.index("attempt_spawned")]
        counts = Counter(name for name in re.findall(r"^(\w+)\(", log, re.M) if name in STARTS)
        jobs += [(start_left, lab, report, call, when) for call in counts for when in range(1, counts[call] + 1)]
        jobs += [(exec_left, lab, report)]
    in_parallel(lambda job: job[0](*job[1:]), jobs, CPUS)
    counts = report.figures["processes"]
    return (f"{len(counts)} kills with {min(counts, default=0)} to {max(counts, default=0)} processes, "
            f"{len(jobs) - LEFT_KILLS} at their start; "
            f"the last was gone after {max(report.figures['seconds'], default=0):.2f} s")


def crowd_left(lab, report, number):
    """Kill an engine when all of its tasks' processes are there, or at a random moment before."""
    tasks = [act(f"t{n}", script=number % 2 > 0) for n in range(40)]
    project = Project(lab, tasks, CROWD)
    with report.watch(project, f"kill {number}"):
        engine = project.start("run", "f", "--run-id", "r", "-j", "40", "--output", "json")
        if number % 4:
            wait_for(lambda: len(living(project.path, tasks_only=True)) >= len(tasks) * CROWD_SIZE, engine)
        else:
            time.sleep(random.Random(number).uniform(0.2, 0.6))
        report.figure("processes", len(living(project.path, tasks_only=True)))
        engine.kill()
        project.wait(engine)
        report.figure("seconds", check_gone(project.path, LEFT_S))


def start_left(lab, report, call, when):
    """Kill an engine at one of the calls by which it starts its tasks."""
    project = Project(lab, LONG)
    with report.watch(project, f"{KILL} at {call} {when}"):
        project.traced(at_call([], call, KILL, when))
        report.figure("seconds", check_gone(project.path, LEFT_S))


def exec_left(lab, report):
    """Kill an engine when it has made a process that takes its time to become that of a task."""
    project = Project(lab, [*LONG, {"id": "c", "command": "sleep 60", "depends_on": ["d"]},
                            {"id": "d", "command": "sleep 0.5"}])
    with report.watch(project, "an execve that takes its time"):
        engine = project.start("run", "f", "--run-id", "r", "-j", "4")
        wait_for(lambda: re.search('attempt_spawned.*"task":"d"', project.journal()), engine)
        with project.tracer(engine, ["-f", "-e", "trace=execve",        # of the processes that it makes from now on
                                     "-e", f"inject=execve:delay_enter={int(EXEC_DELAY_S * 1e6)}"]):
            wait_for(lambda: re.search('attempt_started.*"task":"c"', project.journal()), engine)
            time.sleep(EXEC_DELAY_S / 2)
            engine.kill()
            project.wait(engine)
            report.figure("seconds", check_gone(project.path, LEFT_S))


def wait_for(condition, engine):
    """Wait until something holds, which `engine` brings about; raise Violation if it does not come to that."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        require(engine.poll() is None, f"the engine has ended: {engine.returncode}")
        require(time.monotonic() < end, f"waited {PATIENCE_S} s in vain")
        time.sleep(0.01)


# ---- racers

#: What the losers of a race are told.
LOCKED = r"run r is being run by process (\d+) on host (\S+) since (20\S+Z); "
DONE = "run r has succeeded already"
NAMES = [f"-{n}" for n in range(RACERS)]


def check_racers(lab, report):
    """Let engines race for one run, one race after another."""
    for number in range(NEW_RACES):
        new_race(lab, report, number)
    for number in range(RESUMED_RACES):
        resumed_race(lab, report, number)
    return (f"{{races}} races of {RACERS}, {RESUMED_RACES} of them for a run whose engine was killed; "
            "{locked} were told who is at work, {done} that all is done")


def race(project, report, engines):
    """Let engines that are ready race for run r, and see that one wins."""
    for engine in engines:
        engine.stdin.close()
    winners, idlers, owners = [], [], []
    for engine, name in zip(engines, NAMES):
        ended = project.wait(engine, name)
        locked = re.match(LOCKED, ended.stderr)
        if ended.code == 0 and DONE not in ended.stderr:
            winners.append(engine.pid)
        elif ended.code == 4 and locked:
            owners.append(int(locked[1]))
        else:
            require(ended.code == 0, f"a racer: {ended}")
            idlers.append(engine.pid)
    report.count("locked", len(owners))
    report.count("done", len(idlers))
    report.count("races")
    require(len(winners) == 1 and set(owners) <= set(winners + idlers),
            f"{winners} did the work, {idlers} saw it done, and the others named {set(owners)}")


def begun(project):
    """Return the tasks that have begun, in this order."""
    return [task for word, task, _ in project.told() if word == "begin"]


def new_race(lab, report, number):
    """Let engines race for a new run."""
    seconds = random.Random(number).choice([0.01, 0.05, 0.2])
    project = Project(lab, [act("a", seconds=seconds), act("b", "a", seconds=seconds), act("c", seconds=seconds)])
    with report.watch(project, f"new race {number}"):
        race(project, report, project.start_gated(NAMES))
        project.check()
        require(sorted(begun(project)) == ["a", "b", "c"], f"began: {begun(project)}")


def resumed_race(lab, report, number):
    """Let engines race for a run whose engine has just been killed."""
    seconds = random.Random(number).choice([0.05, 0.2, 0.4])
    project = Project(lab, [act("a"), act("b", "a", seconds=seconds), act("c", "b", seconds=seconds)])
    with report.watch(project, f"resumed race {number}"):
        engines = project.start_gated(NAMES, "resume", "r", "--output", "json")
        first = project.start()
        wait_for(lambda: "b" in begun(project), first)
        first.kill()
        project.wait(first)
        before = len(begun(project))
        race(project, report, engines)
        project.check()
        again = begun(project)[before:]
        require(len(again) == len(set(again)), f"began after the kill: {again}")


# ---- output

def check_output(lab, report):
    """Run a task with much output."""
    disk = tempfile.mkdtemp(prefix="miniflow-torture-")
    try:
        blocks = min(2 << 30, shutil.disk_usage(disk).free // 2) // BLOCK
        if blocks < 256:
            raise Skipped(f"less than 512 MB are left in {tempfile.gettempdir()}")
        task = {"id": "a", "command": [lab.python, "-S", "-E", "-c", FLOOD, str(blocks)]}
        return flood(Project(lab, [task], path=os.path.join(disk, "project")), blocks)
    finally:
        shutil.rmtree(disk)


def flood(project, blocks):
    """Run a task that writes so many blocks, look at its log, and return what that took."""
    command = project.lab.engine("run", "f", "--run-id", "r", "--output", "prefix")
    measured = subprocess.run([project.lab.python, "-S", "-E", "-c", MEASURE, *command], cwd=project.path,
                              env=project.env, stdout=subprocess.PIPE, check=True).stdout.split()
    status, peak = int(measured[0]), int(measured[1]) / 1024
    require(status == 0, f"the run ended with status {status}")
    require(peak < MAX_RSS_MB, f"the engine took {peak:.0f} MB of memory")
    size = os.path.getsize(project.at("miniflow_output/logs/r/a.1.log"))
    require(size == blocks * BLOCK, f"the log has {size} bytes")
    _, show_s = head_of(project, "show", "r")
    head, logs_s = head_of(project, "logs", "r")
    require(head == (bytes(range(256)) * 4)[:1000], f"the log is {head}")
    require(max(show_s, logs_s) < 2, f"show took {show_s:.1f} s, logs {logs_s:.1f} s")
    return f"{blocks} MB written, {peak:.0f} MB of memory taken, shown in {max(show_s, logs_s):.2f} s"


def head_of(project, *args):
    """Return the first 1000 bytes that a command prints, and how long that took."""
    began = time.monotonic()
    done = subprocess.run(["sh", "-c", '"$@" | head -c 1000', "sh", *project.lab.engine(*args)], cwd=project.path,
                          env=project.env, stdout=subprocess.PIPE, check=True)
    return done.stdout, time.monotonic() - began


# ---- all checks

class Check(NamedTuple):
    """A check, and the programs that it needs."""

    title: str
    make: object                        # takes lab and report, returns figures
    tools: tuple


CHECKS = {
    "syscalls": Check("kills and errors at every syscall", check_syscalls, ("strace", "flock")),
    "schedule": Check("kills of ticks and what they start", check_schedule, ("strace", "flock")),
    "random": Check("kills at random times", check_random, ("flock",)),
    "left": Check("nothing left of killed engines", check_left, ("setsid",)),
    "racers": Check(f"{RACERS} racers for one run", check_racers, ("flock",)),
    "output": Check("a task with much output", check_output, ()),
}


def make_check(name, lab):
    """Make one check, print how it went, and return "passed", "failed" or "skipped"."""
    check, report, began = CHECKS[name], Report(), time.monotonic()
    try:
        missing = [tool for tool in check.tools if not lab.has(tool)]
        if missing or not os.path.exists("/proc/self/environ"):
            raise Skipped(f"it needs {' and '.join(missing) or '/proc'}")
        figures = check.make(lab, report).format_map(report.counts)
        check_gone(lab.root, 5.0)
    except Skipped as exc:
        print(f"skipped {name}: {exc}", flush=True)
        return "skipped"
    except Exception as exc:
        report.violations.append((name, describe(exc)))
        figures = "stopped"
    seconds, count = time.monotonic() - began, len(report.violations)
    print(f"{'FAILED ' if count else 'ok     '} {check.title}: {figures}, {count} violations, {seconds:.0f} s")
    show(report.violations)
    sys.stdout.flush()
    return "failed" if count else "passed"


def show(violations):
    """Print violations, of those that differ in numbers only the first."""
    alike = {}
    for label, text in violations:
        alike.setdefault(re.sub(r"\d+", "#", text), []).append(f"{label}: {text}")
    for texts in list(alike.values())[:SHOWN]:
        print(f"    {len(texts)} times: {texts[0]}")
    if len(alike) > SHOWN:
        print(f"    and {len(alike) - SHOWN} more kinds")


def parse_arguments():
    """Return the options that were typed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"a check: {', '.join(CHECKS)} (default: all)")
    parser.add_argument("--python", metavar="EXE", default=sys.executable, help="the Python that runs the engines")
    parser.add_argument("--list", action="store_true", help="list the checks")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in CHECKS]
    if unknown:
        parser.error(f"there is no check {unknown[0]}; there are {', '.join(CHECKS)}")
    return options


def main():
    """Make the checks that are named, or all, and return the exit status."""
    options = parse_arguments()
    if options.list:
        print("\n".join(f"{name:10}{check.title}" for name, check in CHECKS.items()))
        return 0
    memory = "/dev/shm" if "TMPDIR" not in os.environ and os.access("/dev/shm", os.W_OK) else None
    root = tempfile.mkdtemp(prefix="miniflow-torture-", dir=memory)         # where fsync costs nothing, if it can be
    lab = Lab(real_python(options.python), root)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: leave(root, number))
    ends = Counter(make_check(name, lab) for name in options.names or CHECKS)
    if not ends["failed"]:
        shutil.rmtree(root)
    print(f"{ends['passed']} passed, {ends['failed']} failed, {ends['skipped']} skipped")
    return 1 if ends["failed"] else 0


def leave(root, number):
    """End at once, at a signal, and leave no engine behind."""
    while living(root):
        kill_all(root)
    os._exit(128 + number)


def real_python(python):
    """Return the program that `python` stands for, past shims and links of pyenv's and of venvs."""
    return subprocess.run([python, "-c", "import os, sys; print(os.path.realpath(sys.executable))"], check=True,
                          stdout=subprocess.PIPE, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
