#!/usr/bin/env python3
"""Measures MiniFlow against its peers, in the same minutes on the same machine, and prints ratios.

usage: python3 .ci/bench.py [--quick] [--rounds N] [--only ROW …] [--json FILE] [--peers DIR] [--keep DIR]

Each row of the table is one piece of work.  MiniFlow and every peer that is found do it in turn, A B C A B C, each
from an empty directory, and the medians count.  A machine is never twice the same, so only the ratios of one
run say anything.  MiniFlow runs as it does when installed: byte-compiled, from an interpreter without other
packages, with state, journal and a log for each task; the scripts run in that interpreter for everybody.
What a contestant prints goes into a file.

Peers are looked for on PATH.  With --peers DIR those that pip can install are installed into a venv there.
The exit status is 0 unless somebody crashed or did not do the work; it never depends on a time.
Only the standard library is used.
"""
import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

ROOT = Path(__file__).resolve().parent.parent
PIP_PEERS = ["doit", "luigi", "snakemake", "dask", "rust-just", "go-task-bin"]
SLOW_MODULES = ["decimal", "xml.etree.ElementTree", "http.client", "email.message", "logging.handlers", "asyncio",
                "unittest", "csv", "sqlite3", "urllib.request", "tarfile", "zipfile", "difflib", "statistics"]

#: Runs a command and tells what it took.  It is a process of its own, and a small one, as the memory of whoever
#: starts a process is counted as that process's.
STOPWATCH = """
import os, sys, time
out = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
begin = time.perf_counter()
pid = os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ, file_actions=[
    (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0), (os.POSIX_SPAWN_DUP2, out, 1),
    (os.POSIX_SPAWN_DUP2, out, 2), (os.POSIX_SPAWN_CLOSE, out)])
_, status, usage = os.wait4(pid, 0)
print(time.perf_counter() - begin, usage.ru_utime + usage.ru_stime, usage.ru_maxrss, status)
"""

Graph = Dict[str, List[str]]


class Measure(NamedTuple):
    """What one command took; `size` is that of the run's state where it is asked for."""

    seconds: float
    cpu_seconds: float
    megabytes: float
    size: int = 0


class Contestant(NamedTuple):
    """Who does a piece of work, how, and how to see that it was done."""

    name: str
    argv: List[str]
    done: Callable[[Path], bool]
    prepare: Callable[[Path], None] = lambda place: None
    size: Callable[[Path], int] = lambda place: 0


class Row(NamedTuple):
    """A piece of work: MiniFlow's contestant first, then those it is held against.

    `wanted` says for a peer what is promised at least and what is aimed at: how many times as fast MiniFlow is, or,
    with `costs`, how many times the peer's time it takes at most.
    """

    name: str
    work: str
    contestants: List[Contestant]
    wanted: Dict[str, Sequence[float]] = {}
    costs: bool = False
    megabytes: Sequence[float] = ()
    size: bool = False


# ---- the work

def independent(count: int) -> Graph:
    """Tasks that wait for nothing."""
    return {f"t{number}": [] for number in range(count)}


def layered(count: int, layers: int) -> Graph:
    """Layers of tasks that wait for one to three of the layer before."""
    chance, width, graph = random.Random(42), count // layers, {}
    for layer in range(layers):
        for number in range(layer * width, (layer + 1) * width):
            before = range((layer - 1) * width, layer * width)
            few = chance.sample(before, chance.randint(1, min(3, width))) if layer else []
            graph[f"t{number}"] = [f"t{other}" for other in sorted(few)]
    return graph


def write(path: Path, text: str) -> None:
    """Write a file, and the directories that it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


class Bench:
    """The directory, the interpreter and the peers that all rows share."""

    def __init__(self, place: Path, peers: Optional[Path], no_peers: bool) -> None:
        self.place = place
        path = os.environ.get("PATH", os.defpath)
        if peers:
            path = f"{install_peers(peers) / 'bin'}{os.pathsep}{path}"
        self.path = "" if no_peers else path
        self.python, self.miniflow = install_miniflow(place / "python")
        self.env = {name: value for name, value in os.environ.items()
                    if not name.startswith(("MINIFLOW_", "PYTHON", "MAKE"))}
        self.env.update(PATH=path, LUIGI_CONFIG_PATH=os.devnull)

    def find(self, name: str) -> Optional[str]:
        """Where a peer's command is, if it is there and wanted."""
        return shutil.which(name, path=self.path)

    def versions(self) -> Dict[str, str]:
        """Who takes part, and in which version."""
        ask = {"make": ["--version"], "ninja": ["--version"], "parallel": ["--version"], "doit": ["--version"],
               "snakemake": ["--version"], "just": ["--version"], "task": ["--version"],
               "luigi": ["luigi"], "dask": ["dask"]}
        found = {}
        for name, argv in ask.items():
            command = self.find(name)
            if command and argv == [name]:
                argv = ["-c", f"from importlib.metadata import version; print(version('{name}'))"]
                command = self.python_of(command)
            if command:
                said = subprocess.run([command, *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                      env=self.env)
                found[name] = next(iter(said.stdout.splitlines()), "?")
        return found

    def python_of(self, script: str) -> str:
        """The interpreter that a Python command runs in."""
        first = Path(script).read_text(errors="replace").splitlines()[0]
        return first[2:].strip()

    def measure(self, contestant: Contestant, place: Path) -> Measure:
        """Let a contestant do the work once, and see that it was done."""
        output = place / "printed"
        output.unlink(missing_ok=True)
        contestant.prepare(place)
        said = subprocess.run([self.python, "-I", "-S", "-c", STOPWATCH, str(output), *contestant.argv], cwd=place,
                              env=self.env, stdout=subprocess.PIPE, text=True, check=True)
        seconds, cpu, kilobytes, status = said.stdout.split()
        if status != "0" or not contestant.done(place):
            last = "\n".join(output.read_text(errors="replace").splitlines()[-15:])
            raise SystemExit(f"{contestant.name} has not done the work in {place} (status {status}):\n{last}")
        return Measure(float(seconds), float(cpu), int(kilobytes) / 1024, contestant.size(place))


def install_miniflow(place: Path) -> List[str]:
    """Install MiniFlow as pip would into an interpreter that has nothing else; return both commands."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    python = place / "bin/python"
    packages = next(place.glob("lib/python*/site-packages"))
    shutil.copy(ROOT / "miniflow.py", packages)
    subprocess.run([python, "-m", "compileall", "-q", packages], check=True)
    command = place / "bin/miniflow"
    write(command, f"#!{python}\nimport sys\nfrom miniflow import main\nif __name__ == '__main__':\n"
                   "    sys.exit(main())\n")
    command.chmod(0o755)
    return [str(python), str(command)]


def install_peers(place: Path) -> Path:
    """Make a venv with the peers that pip can install, unless it is there."""
    if not (place / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        for peer in PIP_PEERS:
            if subprocess.run([place / "bin/pip", "install", "-q", peer]).returncode:
                print(f"{peer} can't be installed", file=sys.stderr)
        (place / "complete").touch()
    return place


# ---- processes: MiniFlow, make and all who run commands

def put_aside(*names: str) -> Callable[[Path], None]:
    """Something that puts aside what the time before has left: ext4 is slow where much was just removed."""
    def prepare(place: Path) -> None:
        for name in names:
            for path in place.glob(name):
                path.rename(Path(tempfile.mkdtemp(prefix="aside-", dir=place)) / path.name)
        (place / "logs").mkdir(exist_ok=True)
    return prepare


def has_files(pattern: str, count: int, content: Optional[str] = None) -> Callable[[Path], bool]:
    """Something that tells whether so many files are there, with that content."""
    def done(place: Path) -> bool:
        files = list(place.glob(pattern))
        return len(files) == count and (content is None or all(file.read_text() == content for file in files))
    return done


def flow_json(graph: Graph, commands: Dict[str, str], preload: Sequence[str]) -> str:
    """The graph as a flow of MiniFlow's."""
    tasks = []
    for name, upstream in graph.items():
        script = commands[name].partition(" scripts/")[2]
        action = {"script": script} if script else {"command": [commands[name]]}
        tasks.append({"id": name, **action, **({"depends_on": upstream} if upstream else {})})
    return json.dumps({"name": "bench", **({"preload": list(preload)} if preload else {}), "tasks": tasks})


def process_row(bench: Bench, name: str, work: str, graph: Graph, script: str = "", preload: Sequence[str] = (),
                wanted: Optional[Dict[str, Sequence[float]]] = None, costs: bool = False,
                megabytes: Sequence[float] = (), peers: Sequence[str] = ()) -> Row:
    """A row of commands: `true`, or a Python script each with the text of `script`."""
    place, count = bench.place / name, len(graph)
    commands = {task: f"{bench.python} scripts/{task}.py" if script else "true" for task in graph}
    for task in graph if script else ():
        write(place / f"scripts/{task}.py", script)
    (place / "logs").mkdir(parents=True, exist_ok=True)
    write(place / "flows/bench.json", flow_json(graph, commands, preload))
    logs = has_files("data/logs/*/*.log", count, "hi\n" if script else "")
    run = [bench.miniflow, "-o", "data", "--tasks-dir", "scripts", "run", "bench", "-j", "2"]
    contestants = [Contestant("miniflow", run, logs, put_aside("data"))]
    if script:
        contestants.append(Contestant("miniflow --no-fork", [*run, "--no-fork"], logs, put_aside("data")))
    made = has_files("logs/*.log", count, "hi\n" if script else "")
    for peer, prepare in PEERS.items():
        command = bench.find(peer)
        if command and (not peers or peer in peers):
            contestants.append(prepare(place, command, graph, commands, made))
    return Row(name, work, contestants, wanted or {}, costs, megabytes)


PEERS: Dict[str, Callable[..., Contestant]] = {}


def peer(function: Callable[..., Contestant]) -> Callable[..., Contestant]:
    """Enter a function that writes the graph for a peer and returns how that is run."""
    PEERS[function.__name__.rpartition("_")[2]] = function
    return function


@peer
def for_make(place: Path, command: str, graph: Graph, commands: Dict[str, str], made: Callable[[Path], bool]
             ) -> Contestant:
    """make -j2, each command with a log of its own."""
    names = " ".join(graph)
    rules = [f"{task}: {' '.join(upstream)}\n\t@{commands[task]} >logs/{task}.log 2>&1\n"
             for task, upstream in graph.items()]
    write(place / "bench.mk", f".PHONY: all {names}\nall: {names}\n{''.join(rules)}")
    return Contestant("make", [command, "-f", "bench.mk", "-j2"], made, put_aside("logs"))


@peer
def for_ninja(place: Path, command: str, graph: Graph, commands: Dict[str, str], made: Callable[[Path], bool]
              ) -> Contestant:
    """ninja -j2, each command with a log of its own."""
    rules = [f"build {task}: r {' '.join(upstream)}\n  c = {commands[task]}\n" for task, upstream in graph.items()]
    write(place / "bench.ninja", "builddir=.ninja\nrule r\n  command = $c >logs/$out.log 2>&1\n"
                                 f"{''.join(rules)}default {' '.join(graph)}\n")
    return Contestant("ninja", [command, "-f", "bench.ninja", "-j2"], made, put_aside("logs", ".ninja"))


@peer
def for_parallel(place: Path, command: str, graph: Graph, commands: Dict[str, str], made: Callable[[Path], bool]
                 ) -> Contestant:
    """GNU parallel, which knows no dependencies."""
    write(place / "commands", "".join(f"{commands[task]} >logs/{task}.log 2>&1\n" for task in graph))
    return Contestant("parallel", [command, "--will-cite", "-j2", "-a", "commands"], made, put_aside("logs"))


@peer
def for_doit(place: Path, command: str, graph: Graph, commands: Dict[str, str], made: Callable[[Path], bool]
             ) -> Contestant:
    """doit -n 2 with a log of its own for each action."""
    write(place / "graph.json", json.dumps({task: [upstream, commands[task]] for task, upstream in graph.items()}))
    write(place / "dodo.py", """\
import json
def task_w():
    for name, (upstream, command) in json.load(open("graph.json")).items():
        yield {"name": name, "actions": ["%s >logs/%s.log 2>&1" % (command, name)],
               "task_dep": ["w:" + other for other in upstream]}
""")
    return Contestant("doit", [command, "-n", "2"], made, put_aside("logs", ".doit.db*"))


@peer
def for_luigi(place: Path, command: str, graph: Graph, commands: Dict[str, str], made: Callable[[Path], bool]
              ) -> Contestant:
    """luigi with its local scheduler and two workers; a task is done when its log is there."""
    write(place / "graph.json", json.dumps({task: [upstream, commands[task]] for task, upstream in graph.items()}))
    write(place / "work.py", """\
import json, subprocess, luigi
GRAPH = json.load(open("graph.json"))
class Work(luigi.Task):
    name = luigi.Parameter()
    def requires(self):
        return [Work(name=other) for other in GRAPH[self.name][0]]
    def output(self):
        return luigi.LocalTarget("logs/%s.log" % self.name)
    def run(self):
        with open("logs/%s.log" % self.name, "wb") as log:
            subprocess.run(GRAPH[self.name][1].split(), stdout=log, stderr=log, check=True)
class All(luigi.WrapperTask):
    def requires(self):
        return [Work(name=name) for name in GRAPH]
if __name__ == "__main__":
    luigi.build([All()], local_scheduler=True, workers=2, log_level="WARNING") or exit(1)
""")
    python = Path(command).read_text(errors="replace").splitlines()[0][2:].strip()
    return Contestant("luigi", [python, "work.py"], made, put_aside("logs"))


@peer
def for_snakemake(place: Path, command: str, graph: Graph, commands: Dict[str, str], made: Callable[[Path], bool]
                  ) -> Contestant:
    """snakemake -c2: one rule whose inputs are looked up in the graph."""
    write(place / "graph.json", json.dumps({task: [upstream, commands[task]] for task, upstream in graph.items()}))
    write(place / "Snakefile", """\
import json
GRAPH = json.load(open("graph.json"))
rule all:
    input: expand("logs/{name}.log", name=list(GRAPH))
rule work:
    input: lambda wildcards: ["logs/%s.log" % other for other in GRAPH[wildcards.name][0]]
    output: "logs/{name}.log"
    params: command=lambda wildcards: GRAPH[wildcards.name][1]
    shell: "{params.command} >{output} 2>&1"
""")
    return Contestant("snakemake", [command, "-c2", "--quiet", "all"], made, put_aside("logs", ".snakemake"))


@peer
def for_just(place: Path, command: str, graph: Graph, commands: Dict[str, str], made: Callable[[Path], bool]
             ) -> Contestant:
    """just, whose [parallel] starts everything at once."""
    recipes = [f"[parallel]\n{task}: {' '.join(upstream)}\n    @{commands[task]} >logs/{task}.log 2>&1\n"
               for task, upstream in graph.items()]
    write(place / "justfile", f"[parallel]\nall: {' '.join(graph)}\n{''.join(recipes)}")
    return Contestant("just", [command, "-f", "justfile", "all"], made, put_aside("logs"))


@peer
def for_task(place: Path, command: str, graph: Graph, commands: Dict[str, str], made: Callable[[Path], bool]
             ) -> Contestant:
    """go-task with two at a time."""
    tasks = [f"  {task}:\n    run: once\n    deps: {json.dumps(upstream)}\n"
             f"    cmds: [{json.dumps(commands[task] + f' >logs/{task}.log 2>&1')}]\n"
             for task, upstream in graph.items()]
    write(place / "Taskfile.yml", "version: '3'\nsilent: true\ntasks:\n  default:\n"
                                  f"    deps: {json.dumps(list(graph))}\n{''.join(tasks)}")
    return Contestant("task", [command, "-t", "Taskfile.yml", "-C", "2"], made, put_aside("logs"))


# ---- functions: MiniFlow, asyncio.gather and all who call Python

FUNCTIONS = {
    "miniflow": """\
from miniflow import JSONStateStore, Workflow, task
{kind} work(ctx):
    return {{"key": 1}}
tasks = [task(name="t%06d" % number)(work) for number in range({count})]
Workflow(tasks, name="bench").run_sync(store=JSONStateStore("data"))
""",
    "asyncio.gather": """\
import asyncio
async def work(ctx):
    return {{"key": 1}}
async def all_of_them():
    return await asyncio.gather(*(work({{}}) for number in range({count})))
assert asyncio.run(all_of_them()) == [{{"key": 1}}] * {count}
""",
    "a loop": """\
def work(ctx):
    return {{"key": 1}}
assert [work({{}}) for number in range({count})] == [{{"key": 1}}] * {count}
""",
    "doit": """\
import sys
from doit.cmd_base import ModuleTaskLoader
from doit.doit_cmd import DoitMain
def work():
    return {{"key": 1}}
def task_work():
    for number in range({count}):
        yield {{"name": "t%d" % number, "actions": [work]}}
sys.exit(DoitMain(ModuleTaskLoader({{"task_work": task_work}})).run(["-v", "0"]))
""",
    "dask": """\
import dask
def work(number):
    return {{"key": 1}}
calls = [dask.delayed(work, pure=False)(number) for number in range({count})]
assert dask.compute(*calls, scheduler="threads", num_workers=2) == ({{"key": 1}},) * {count}
""",
}


def recorded(count: int) -> Callable[[Path], bool]:
    """Something that tells whether the newest run has succeeded with so many tasks."""
    def done(place: Path) -> bool:
        file = next(place.glob("data/runs/*.json"))
        run = json.loads(file.read_text())
        return run["status"] == "success" and len(run["tasks"]) == count
    return done


def state_size(place: Path) -> int:
    """How many bytes the record of the run takes."""
    return next(place.glob("data/runs/*.json")).stat().st_size


def function_row(bench: Bench, name: str, work: str, count: int, kind: str, peers: Sequence[str],
                 wanted: Dict[str, Sequence[float]], costs: bool = False) -> Row:
    """A row of functions that return a dict of one key."""
    place = bench.place / name
    contestants = []
    for who in ("miniflow", *peers):
        python, command = bench.python, bench.find(who)
        if who in ("doit", "dask"):
            if not command:
                continue
            python = bench.python_of(command)
        script = place / f"{who.replace(' ', '_')}_.py"
        write(script, FUNCTIONS[who].format(count=count, kind=kind))
        contestants.append(Contestant(who, [python, str(script)],
                                      recorded(count) if who == "miniflow" else lambda place: True,
                                      put_aside("data", ".doit.db*")))
    return Row(name, work, contestants, wanted, costs)


# ---- starting up, and growing

def start_rows(bench: Bench) -> List[Row]:
    """What a command costs that does nothing."""
    place = bench.place / "start"
    write(place / "flows/one.json", json.dumps({"name": "one", "tasks": [{"id": "one", "command": ["true"]}]}))
    bare = Contestant("python -c pass", [bench.python, "-c", "pass"], lambda place: True)
    rows = []
    for words in (["--version"], ["list"]):
        ours = Contestant("miniflow", [bench.miniflow, *words], lambda place: True)
        rows.append(Row("start" + words[0].strip("-"), f"`miniflow {words[0]}` against `python3 -c pass`",
                        [ours, bare], {"python -c pass": (2.5, 2)}, costs=True))
        (bench.place / rows[-1].name).mkdir(exist_ok=True)
        shutil.copytree(place, bench.place / rows[-1].name, dirs_exist_ok=True)
    return rows


def growth_rows(bench: Bench, small: int) -> List[Row]:
    """What ten times as many tasks cost: a flow to validate, and one of functions to run."""
    rows = []
    limit = (12, 10)
    text = "{} {:,} tasks against {:,}"
    contestants = []
    for count in (small * 10, small):
        place = bench.place / f"validate/{count}"
        graph = layered(count, 100)
        write(place / "flows/bench.json", flow_json(graph, dict.fromkeys(graph, "true"), ()))
        contestants.append(Contestant(f"{count:,} tasks", [bench.miniflow, "--flows-dir", f"{count}/flows", "validate",
                                                           "bench"], lambda place: True))
    rows.append(Row("validate", text.format("`validate`", small * 10, small), contestants,
                    {contestants[1].name: limit}, costs=True))
    contestants = []
    for count in (small * 10, small):
        script = bench.place / f"grow/{count}_.py"
        write(script, FUNCTIONS["miniflow"].format(count=count, kind="async def"))
        contestants.append(Contestant(f"{count:,} tasks", [bench.python, str(script)], recorded(count),
                                      put_aside("data"), state_size))
    rows.append(Row("grow", text.format("run of", small * 10, small) + ", and the size of RUN.json", contestants,
                    {contestants[1].name: limit}, costs=True, size=True,
                    megabytes=(500, 300) if small == 10_000 else ()))
    return rows


def make_rows(bench: Bench, quick: bool) -> List[Row]:
    """All rows; with `quick` small ones."""
    few = 10 if quick else 1
    light = "import sys, json, os\nprint('hi')\n"
    heavy = f"import {', '.join(SLOW_MODULES)}\n{light}"
    scripts, fan, layers, functions = 200 // few, 1000 // few, 2000 // few, 10_000 // few
    return [
        process_row(bench, "scripts", f"{scripts} Python scripts, two at a time", independent(scripts), light,
                    wanted={"make": (5, 7)}),
        process_row(bench, "preload", f"{scripts} scripts that import slow modules named in `preload`",
                    independent(scripts), heavy, SLOW_MODULES, wanted={"make": (15, 30)}, peers=["make"]),
        process_row(bench, "fan", f"{fan:,} independent no-ops", independent(fan), wanted={
            "make": (1.3, 1.0), "doit": (1.5, 2), "luigi": (10, 15), "snakemake": (30, 60)}),
        process_row(bench, "layers", f"{layers:,} no-ops in 20 layers", layered(layers, 20), wanted={
            "make": (1.3, 1.0), "doit": (1.5, 2), "luigi": (10, 15), "snakemake": (30, 60)},
            megabytes=() if quick else (25, 16)),
        *start_rows(bench),
        function_row(bench, "async", f"{functions:,} async functions", functions, "async def",
                     ["asyncio.gather", "dask"], {"asyncio.gather": (10, 5)}, costs=True),
        function_row(bench, "sync", f"{functions:,} plain functions", functions, "def", ["doit", "dask", "a loop"],
                     {"doit": (1.5, 3)}),
        *growth_rows(bench, 10_000 // few),
    ]


# ---- the table

#: Against these MiniFlow promises to take at most so many times as long; against the others to be faster.
COSTS = {"make"}


def verdicts(row: Row, medians: Dict[str, Measure]) -> List[Dict[str, Any]]:
    """The row held against each peer: ratio, what is promised, what is aimed at."""
    ours = medians[row.contestants[0].name]
    found: List[Dict[str, Any]] = []

    def enter(against: str, ratio: float, wanted: Sequence[float], costs: bool, unit: str = "") -> None:
        met = [(ratio <= limit if costs else ratio >= limit) for limit in wanted]
        found.append({"against": against, "ratio": round(ratio, 3), "costs": costs, "unit": unit,
                      "at_least": wanted[0] if wanted else None, "aim": wanted[1] if wanted else None,
                      "met": "aim" if all(met) and met else "yes" if met and met[0] else "NO" if met else ""})

    for contestant in row.contestants[1:]:
        theirs = medians[contestant.name]
        wanted = row.wanted.get(contestant.name, ())
        costs = row.costs or row.name in ("fan", "layers") and contestant.name in COSTS
        enter(contestant.name, ours.seconds / theirs.seconds if costs else theirs.seconds / ours.seconds, wanted, costs)
        if row.size:
            enter(f"{contestant.name}, RUN.json", ours.size / theirs.size, wanted, True)
    if row.megabytes:
        enter("memory", ours.megabytes, row.megabytes, True, " MB")
    return found


def table(rows: List[Dict[str, Any]]) -> str:
    """The results as lines of text."""
    lines = []
    for row in rows:
        lines.append(f"\n{row['name']}: {row['work']}")
        for name, measure in row["medians"].items():
            lines.append(f"    {name:<20} {measure['seconds']:>9.3f} s {measure['cpu_seconds']:>9.3f} s CPU "
                         f"{measure['megabytes']:>7.1f} MB")
        for verdict in row["verdicts"]:
            unit = verdict["unit"] or (" times its cost" if verdict["costs"] else " times as fast")
            promise = "" if verdict["at_least"] is None else \
                f"   promised {verdict['at_least']:g}, aim {verdict['aim']:g}: {verdict['met']}"
            lines.append(f"    against {verdict['against']:<22} {verdict['ratio']:>8.2f}{unit}{promise}")
    return "\n".join(lines)


def parse(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the work, once; under a minute")
    parser.add_argument("--rounds", type=int, help="how often each does the work (default 3; quick: 1)")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="only these rows")
    parser.add_argument("--json", metavar="FILE", help="write the results there as well")
    parser.add_argument("--peers", metavar="DIR", type=Path, help="install peers into a venv there, and use them")
    parser.add_argument("--no-peers", action="store_true", help="MiniFlow and the interpreter alone")
    parser.add_argument("--keep", metavar="DIR", type=Path, help="work in this directory and leave it")
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Measure, print and write down."""
    options = parse(argv)
    place = Path(options.keep or tempfile.mkdtemp(prefix="miniflow-bench-")).resolve()
    try:
        bench = Bench(place, options.peers, options.no_peers)
        versions = {"Python": platform.python_version(), "cores": str(len(os.sched_getaffinity(0))),
                    "system": platform.platform(), **bench.versions()}
        print("\n".join(f"{name}: {version}" for name, version in versions.items()))
        results: List[Dict[str, Any]] = []
        for row in make_rows(bench, options.quick):
            if options.only and row.name not in options.only:
                continue
            taken: Dict[str, List[Measure]] = {contestant.name: [] for contestant in row.contestants}
            for _ in range(options.rounds or (1 if options.quick else 3)):
                for contestant in row.contestants:
                    taken[contestant.name].append(bench.measure(contestant, bench.place / row.name))
            medians = {name: Measure(*(statistics.median(column) for column in zip(*measures)))
                       for name, measures in taken.items()}
            results.append({"name": row.name, "work": row.work, "verdicts": verdicts(row, medians),
                            "medians": {name: median._asdict() for name, median in medians.items()}})
            print(table(results[-1:]), flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps({"versions": versions, "rows": results}, indent=2) + "\n")
    finally:
        if not options.keep:
            shutil.rmtree(place, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
