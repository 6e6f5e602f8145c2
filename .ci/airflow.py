"""Holds MiniFlow's trigger rules and its export against a real Airflow: python3 .ci/airflow.py PYTHON [DIRECTORY].

PYTHON is one in whose venv Airflow 2.10 or 3 is installed.  Flows, green and red, run with MiniFlow and, exported,
with Airflow: every task has to end alike, see the same values and be tried as often.  All other flows that there
are here have to load.

The rules by themselves: graphs in which tasks succeed, fail, are skipped,
fail and are tolerated, and fan out run with both engines, and the end of every task is compared.  Three things
may differ, and do; anything else fails:

- early: Airflow settles an all_success task at the first upstream that did not succeed, so that a skip which
  comes before a failure decides; MiniFlow waits for all upstream tasks.
- instances: Airflow's rules count the instances of a fan-out, MiniFlow's the fan-out as one task, which has
  failed if one of its instances has and else succeeded.
- follows: what is downstream of such a task.

An exported fan-out has a task that stands for it, so that of these three only the first is left.

What Airflow keeps goes below DIRECTORY, by default a temporary one.  Exit status 1 if anything failed.
"""
import contextlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
REPO = os.path.dirname(HERE)
# Airflow's own Python would take this file for Airflow itself.
sys.path[:] = [place for place in sys.path if os.path.abspath(place) != HERE]

RULES = ("all_success", "all_done", "all_failed", "one_success", "one_failed", "none_failed",
         "none_failed_min_one_success", "none_skipped", "always")
ENDS = {"success": "true", "failed": "false", "tolerated": "false", "skipped": "true"}


# ---- the graphs: {id: (upstream, rule, what becomes of it if it runs)}; a list makes a fan-out

def table():
    """Every rule on every pair of ends, and on one of each.

    Of two upstream tasks the one that can make Airflow decide early ends last.
    """
    graph = {"f0": ((), "all_success", "failed"), "r": ((), "all_success", "success"),
             "s0": (("r",), "all_success", "success"), "u": (("f0",), "all_success", "success")}
    for letter, end in zip("sfkt", ("success", "failed", "skipped", "tolerated")):
        graph[letter] = (("s0",), "all_success", end)
    for rule in RULES:
        graph[f"{rule}-"] = ((), rule, "success")
        for size in (1, 2):
            for up in itertools.combinations("sfkut", size):
                graph[f"{rule}-{''.join(up)}"] = (up, rule, "success")
        graph[f"{rule}-sfkut"] = (tuple("sfkut"), rule, "success")
    return graph


def early():
    """A skip that comes long before a failure, and what follows."""
    return {"k": ((), "all_success", "skipped"), "a": ((), "all_success", "success"),
            "b": (("a",), "all_success", "success"), "f": (("b",), "all_success", "failed"),
            "x": (("k", "f"), "all_success", "success"), "y": (("x",), "none_failed", "success")}


def fan_outs():
    """Every rule below a fan-out of which all instances succeed, or some, or none."""
    graph = {}
    for name, ends in (("s", "ss"), ("m", "sf"), ("f", "ff")):
        graph[name] = ((), "all_success", [{"s": "success", "f": "failed"}[end] for end in ends])
        graph.update({f"{rule}-{name}": ((name,), rule, "success") for rule in RULES})
    return graph


def made(seed, ends=("success",) * 4 + ("failed", "failed", "tolerated", "skipped")):
    """A random graph."""
    chance, graph = random.Random(seed), {}
    for n in range(chance.randint(5, 11)):
        upstream = tuple(name for name in graph if chance.random() < 0.35)
        end = chance.choice(ends)
        if chance.random() < 0.15:
            end = [chance.choice(["success", "failed"]) for _ in range(2)]
        graph[f"t{n}"] = (upstream, chance.choice(RULES), end)
    return graph


def all_graphs():
    """All graphs as one."""
    parts = {"table": table(), "early": early(), "fan": fan_outs(), **{f"made{n}": made(n) for n in range(12)}}
    return {f"{part}.{name}": ([f"{part}.{up}" for up in upstream], rule, end)
            for part, graph in parts.items() for name, (upstream, rule, end) in graph.items()}


# ---- MiniFlow

def as_flow(name, graph):
    """Return the JSON of a flow whose tasks end as a graph says."""
    tasks = []
    for task, (upstream, rule, end) in graph.items():
        fields = {"id": task, "depends_on": upstream, "trigger_rule": rule}
        if isinstance(end, list):
            fields.update(foreach=end, command=["test", "${{ item }}", "=", "success"])
        else:
            fields.update(command=ENDS[end], allow_failure=end == "tolerated")
            fields.update({"if": "false"} if end == "skipped" else {})
        tasks.append(fields)
    return {"name": name, "tasks": tasks}


def miniflow(place, *words):
    """Run MiniFlow's command line in a directory; return its CompletedProcess."""
    return subprocess.run([sys.executable, os.path.join(REPO, "miniflow.py"), *words], cwd=place,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=600)


def miniflow_ends(graph):
    """Return the end of every task as MiniFlow has it; instances are id[0], id[1]."""
    with tempfile.TemporaryDirectory() as place:
        os.mkdir(os.path.join(place, "flows"))
        with open(os.path.join(place, "flows", "rules.json"), "w") as file:
            json.dump(as_flow("rules", graph), file)
        done = miniflow(place, "run", "rules", "--run-id", "r", "--output", "quiet")
        assert done.returncode == 1, done.stderr.decode()
        with open(os.path.join(place, "miniflow_output", "runs", "r.json")) as file:
            return {name: task["status"] for name, task in json.load(file)["tasks"].items()}


# ---- Airflow

RULES_DAG = '''
import datetime, json
try:
    from airflow.sdk import DAG
    from airflow.providers.standard.operators.empty import EmptyOperator
    from airflow.providers.standard.operators.python import PythonOperator
except ImportError:
    from airflow import DAG
    from airflow.operators.empty import EmptyOperator
    from airflow.operators.python import PythonOperator
from airflow.exceptions import AirflowSkipException


def act(end):
    if end == "skipped":
        raise AirflowSkipException
    if end != "success":
        raise RuntimeError(end)


with DAG("rules", schedule=None, start_date=datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone.utc)):
    seen_as = {}
    for name, (upstream, rule, end) in json.loads(GRAPH).items():
        if isinstance(end, list):
            task = PythonOperator.partial(task_id=name, python_callable=act, trigger_rule=rule).expand(
                op_args=[[each] for each in end])
        else:
            task = PythonOperator(task_id=name, python_callable=act, op_args=[end], trigger_rule=rule)
        task.set_upstream([seen_as[up] for up in upstream])
        seen_as[name] = task
        if end == "tolerated":     # counts as a success, but where it is skipped
            seen_as[name] = EmptyOperator(task_id=name + ".tolerated", trigger_rule="none_skipped")
            seen_as[name].set_upstream(task)
'''


def within_airflow(folder, place, names):
    """Print what Airflow says of the DAGs of a directory, as a line of JSON; executed by its Python."""
    import inspect
    try:
        from airflow.dag_processing.dagbag import DagBag
    except ImportError:
        from airflow.models.dagbag import DagBag
    more = {"include_examples": False} if "include_examples" in inspect.signature(DagBag.__init__).parameters else {}
    bag, found = DagBag(folder, **more), {}
    for name in names:
        os.environ["WHERE"] = os.path.join(place, "theirs-" + name)
        run = bag.dags[name].test(run_conf={})
        found[name] = {"state": str(run.state), "ends": {
            task.task_id + (f"[{task.map_index}]" if task.map_index >= 0 else ""): str(task.state)
            for task in run.get_task_instances()}}
    print("\n" + json.dumps({"errors": bag.import_errors, "dags": sorted(bag.dags), "runs": found}))


# ---- exported flows

SEE = r'''
import json, os, sys
attempt, name = os.environ["MINIFLOW_ATTEMPT"], os.environ["MINIFLOW_TASK"]
own = ("MINIFLOW_FLOW", "MINIFLOW_TASK", "MINIFLOW_ATTEMPT")
seen = {"argv": sys.argv[1:], "cwd": os.getcwd(), "stdin": sys.stdin.read(),
        "env": {key: value for key, value in os.environ.items()
                if key in own or key.startswith(("FLOW_", "TASK_", "MINIFLOW_PARAM_"))},
        "context": json.load(open(os.environ["MINIFLOW_CONTEXT"]))}
assert os.path.isdir(os.environ["TMP_DIR"])
assert not os.path.exists(os.environ["MINIFLOW_OUTPUT"])
with open(os.path.join(os.environ["WHERE"], name + "." + attempt), "w") as file:
    json.dump(seen, file, indent=1, sort_keys=True)
with open(os.environ["MINIFLOW_OUTPUT"], "w") as file:
    json.dump({name: attempt, "last": [name]}, file)
codes = os.environ.get("TASK_CODES", "0").split()
sys.exit(int(codes[min(int(attempt), len(codes)) - 1]))
'''

HOSTILE = ["", " ", "a b", "'", '"', "\\", "\\\\'", "$HOME", "$(touch PWN)", "`touch PWN`", "x\ny", "trailing\n\n",
           "--flag", "*", "%s%d", "{a}", "é\U0001f600", "\x01\x7f\t", "$${{x", "{{ ds }}", "{% raw %}", "{# x", "x.sh",
           "a\\", "\'\'\'", '"""', "#no", "\u2028"]


def green():
    """A flow of all that carries over, which succeeds."""
    see = {"script": "see.py"}
    return {"name": "green", "description": "{{ ds }} '\n\" \\", "tags": ["x"], "max_parallel": 2, "timeout_s": 600,
            "schedule": {"cron": "30 6 * * 1-5", "timezone": "Europe/Berlin", "catchup": "all"},
            "env": {"FLOW_A": "${{ params.p }}{{", "FLOW_HOME": "${{ env.HOME }}"},
            "params": {"p": "it's {{ x }} \"q\"\n", "n": {"type": "integer", "default": 3, "min": 1}, "a": [1, "é"]},
            "tasks": [
        {"id": "args", **see, "args": HOSTILE, "stdin": "\n".join(HOSTILE), "priority": 3,
         "env": {f"TASK_{n}": text for n, text in enumerate(HOSTILE)}},
        {"id": "options", **see, "args": {"n": "${{ params.n }}", "all": ["${{ params.a }}", "x"], "yes": True,
                                          "no": False, "text": "${{ env.FLOW_A }}-"}, "cwd": "sub"},
        {"id": "again", **see, "env": {"TASK_CODES": "3 4 0"}, "max_retries": 2, "retry_on": [3, 4]},
        {"id": "lines", "command": "printf 'a=1\\nb<<E\\nx\\ny\\nE\\n' >$MINIFLOW_OUTPUT; echo {{ ds }}; echo \"$1\"",
         "args": ["{{ ds }}"]},
        {"id": "tolerated", **see, "env": {"TASK_CODES": "5"}, "allow_failure": True},
        {"id": "down.sh", **see, "depends_on": ["args", "options", "again", "lines", "tolerated"],
         "args": ["${{ tasks.lines.outputs.b }}", "${{ ctx.last }}", "${{ ctx.last[0] }}", "${{ tasks.args.outputs }}"],
         "timeout_s": 60, "grace_s": 1},
        {"id": "each", **see, "foreach": ["a", {"b": 1}], "args": ["${{ item }}"], "depends_on": ["lines"]},
        {"id": "none", **see, "foreach": []},
        {"id": "matrix", **see, "matrix": {"x": [1, 2], "y": ["z"]}, "args": ["${{ matrix.x }}", "${{ matrix.y }}"]},
        {"id": "gather", **see, "depends_on": ["each", "matrix", "none"], "args": ["${{ tasks.each.outputs.items }}"]}],
            "on_success": see, "on_failure": see, "finally": {**see, "id": "last"}}


def red():
    """A flow that fails, although its last tasks succeed."""
    see = {"script": "see.py"}
    return {"name": "red", "fail_fast": False, "tasks": [
        {"id": "slow", "command": ["sleep", "60"], "timeout_s": 0.5, "max_retries": 1, "retry_on": ["timeout"]},
        {"id": "once", **see, "env": {"TASK_CODES": "3 0"}, "max_retries": 1, "retry_on": [4]},
        {"id": "output", "command": "echo '[1]' >$MINIFLOW_OUTPUT"},
        {"id": "missing", **see, "args": ["${{ ctx.nowhere }}"]},
        {"id": "nothing", "command": ["no-such-program"]},
        {"id": "each", "command": ["test", "${{ item }}", "=", "1"], "foreach": [1, 2]},
        {"id": "tolerated", **see, "depends_on": ["once"], "allow_failure": True},
        {"id": "after", **see, "depends_on": ["tolerated"]},
        {"id": "below", **see, "depends_on": ["each"]},
        {"id": "one", **see, "depends_on": ["each", "slow"], "trigger_rule": "one_success"},
        {"id": "all", **see, "depends_on": ["each", "slow"], "trigger_rule": "all_failed"},
        {"id": "clean", **see, "depends_on": ["slow", "once", "output"], "trigger_rule": "all_done"}],
            "on_success": see, "on_failure": see, "finally": see}


def flows_here():
    """Yield the paths of the flows that are here beside those made."""
    for folder in (os.path.join(REPO, "flows"), os.path.join(REPO, "..", "shared", "cases", "flows")):
        if os.path.isdir(folder):
            yield from sorted(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".json"))


class Airflow:
    """An installed Airflow, with a directory for what it keeps and another for DAG files."""

    def __init__(self, python, home):
        self.python, self.home, self.dags = python, home, os.path.join(home, "dags")
        os.makedirs(self.dags, exist_ok=True)
        self.env = {**os.environ, "AIRFLOW_HOME": home, "AIRFLOW__CORE__DAGS_FOLDER": self.dags,
                    "AIRFLOW__CORE__LOAD_EXAMPLES": "False", "AIRFLOW__CORE__UNIT_TEST_MODE": "False",
                    "PATH": os.path.dirname(python) + os.pathsep + os.environ["PATH"]}
        self.execute("-m", "airflow", "db", "migrate")

    def execute(self, *words):
        """Execute Airflow's Python with these words; return what it printed."""
        done = subprocess.run([self.python, *words], env=self.env, cwd=self.home, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600)
        output = done.stdout.decode("utf-8", "replace")
        assert done.returncode == 0, output[-10000:]
        return output

    def version(self):
        """Return Airflow's version."""
        return self.execute("-c", "import airflow; print(airflow.__version__)").split()[-1]

    def run(self, names, place):
        """Load the DAG files and run some of the DAGs, from `place`; return what within_airflow() says."""
        output = self.execute(os.path.abspath(__file__), "within", self.dags, place, *names)
        return json.loads(output.strip().splitlines()[-1])


# ---- what differs

def kinds(graph, name, ends):
    """Return the ends that the rule of a task looks at, as Airflow counts them."""
    found = []
    for up in graph[name][0]:
        instances = [ends[key] for key in (f"{up}[0]", f"{up}[1]") if key in ends]
        found += instances or [ends.get(up + ".tolerated", ends.get(up))]
    return found


def judged(rule, ends, runs_to):
    """Return the end that MiniFlow's rule gives a task whose upstream ended so."""
    sys.path.insert(0, REPO)
    import miniflow
    if not ends:
        return runs_to
    counts = miniflow.Counts(ends.count("success"), ends.count("skipped"), sum(end.endswith("failed") for end in ends))
    verdict = miniflow.TRIGGER_RULES[rule](counts)
    return runs_to if verdict == "running" else verdict


def difference(graph, name, ours, theirs):
    """Return which of the differences that there may be is why a task ended otherwise; None: none of them."""
    upstream, rule, end = graph[name]
    seen = kinds(graph, name, theirs)
    found = theirs.get(name, theirs.get(f"{name}[0]"))
    if rule == "all_success" and found == "skipped" and any(state.endswith("failed") for state in seen):
        return "early"
    runs_to = found if isinstance(end, list) else "failed" if end == "tolerated" else end
    if judged(rule, seen, runs_to) != found:
        return None
    return "instances" if any(isinstance(graph[up][2], list) for up in upstream) else "follows"


def compare_rules(graph, theirs):
    """Print how many tasks end alike, and what differs; return whether nothing does that should not."""
    ours, counts, bad = miniflow_ends(graph), dict.fromkeys(("alike", "early", "instances", "follows"), 0), []
    for name, (_, _, end) in graph.items():
        instances = [key for key in theirs if isinstance(end, list) and key.startswith(f"{name}[")]
        # Where a fan-out does not run, MiniFlow makes no instances of it.
        why = "alike" if all(ours.get(key, ours[name]) == theirs[key] for key in instances or [name]) else \
            difference(graph, name, ours, theirs)
        if why:
            counts[why] += 1
        else:
            bad.append(name)
    for name in bad:
        print(f"{name}: {ours[name]} with MiniFlow, {theirs.get(name)} with Airflow: {graph[name]}, "
              f"upstream {kinds(graph, name, theirs)}")
    print("rules: " + ", ".join(f"{count} {word}" for word, count in counts.items()) + f", {len(bad)} wrong")
    # Were it not so, what the header says of the differences would not be true.
    known = ours["early.x"], theirs["early.x"], ours["fan.all_failed-m"], theirs["fan.all_failed-m"]
    return not bad and known == ("upstream_failed", "skipped", "success", "skipped")


def seen_in(place):
    """Return the content of the files of a directory."""
    found = {}
    for name in os.listdir(place):
        with open(os.path.join(place, name)) as file:
            found[name] = json.load(file)
    return found


def as_airflow(ends, tasks):
    """Return MiniFlow's ends under Airflow's names; what stands for a fan-out has not run itself."""
    return {re.sub(r"\[(\d+)\]$", r".\1", name):
            "upstream_failed" if end == "failed" and "foreach" in tasks.get(name, ()) else end
            for name, end in ends.items()}


class Project:
    """A directory of flows that run with both engines."""

    def __init__(self, place, flows):
        self.place, self.flows = place, flows
        for name in ("flows", "tasks", "sub", *(f"{who}-{flow}" for who in ("ours", "theirs") for flow in flows)):
            os.mkdir(os.path.join(place, name))
        with open(os.path.join(place, "tasks", "see.py"), "w") as file:
            file.write(SEE)
        for name, flow in flows.items():
            with open(os.path.join(place, "flows", name + ".json"), "w") as file:
                json.dump(flow, file)

    def export(self, flow, folder):
        """Export a flow, by name or path, to a DAG file; return the name of the DAG."""
        file = os.path.join(folder, os.path.splitext(os.path.basename(flow))[0] + ".py")
        tasks = os.path.join(REPO if os.path.exists(flow) else self.place, "tasks")
        done = miniflow(self.place, "-t", tasks, "export", flow, "--to", "airflow", "-o", file)
        assert done.returncode == 0, done.stderr.decode()
        with open(flow if os.path.exists(flow) else os.path.join(self.place, "flows", flow + ".json")) as file:
            return json.load(file)["name"]

    def difference(self, name, theirs):
        """Yield what a flow does otherwise with Airflow."""
        os.environ["WHERE"] = os.path.join(self.place, "ours-" + name)
        done = miniflow(self.place, "run", name, "--run-id", name, "--output", "quiet", "-j", "2")
        with open(os.path.join(self.place, "miniflow_output", "runs", name + ".json")) as file:
            run = json.load(file)
        tasks = {task["id"]: task for task in self.flows[name]["tasks"]}
        ours = as_airflow({task: state["status"] for task, state in run["tasks"].items()}, tasks)
        if (run["status"], done.returncode) != (theirs["state"], int(theirs["state"] != "success")):
            yield f"{name}: {run['status']} with MiniFlow, {theirs['state']} with Airflow"
        for task in ours:
            if ours[task] != theirs["ends"].get(task):
                yield f"{name}.{task}: {ours[task]} with MiniFlow, {theirs['ends'].get(task)} with Airflow"
        seen = [seen_in(os.path.join(self.place, f"{who}-{name}")) for who in ("ours", "theirs")]
        for file in sorted({*seen[0], *seen[1]}):
            pair = [each.get(file, {}) for each in seen]
            for key in sorted({*pair[0], *pair[1]}):
                if pair[0].get(key) != pair[1].get(key):
                    yield f"{name}: {key} of {file}: {pair[0].get(key)} with MiniFlow, {pair[1].get(key)} with Airflow"


def compare_exported(project, runs):
    """Print what the flows of a project do otherwise with Airflow; return whether they do nothing otherwise."""
    bad = [line for name in project.flows for line in project.difference(name, runs[name])]
    print("\n".join(bad + [f"exported flows: {len(project.flows)} run, {len(bad)} differences"]))
    return not bad and {runs[name]["state"] for name in project.flows} == {"success", "failed"}


def main(python, home=None):
    """Compare; return the exit status."""
    with contextlib.ExitStack() as stack:
        airflow = Airflow(python, os.path.abspath(home or stack.enter_context(tempfile.TemporaryDirectory())))
        print(f"Airflow {airflow.version()}", flush=True)
        graph = all_graphs()
        with open(os.path.join(airflow.dags, "rules.py"), "w") as file:
            file.write(f"GRAPH = {json.dumps(graph)!r}\n{RULES_DAG}")
        unasked = ("success",) * 3 + ("failed", "tolerated")        # as an `if` can't be exported
        flows = {f"made{n}": as_flow(f"made{n}", made(n, unasked)) for n in (20, 21)}
        flows.update(green=green(), red=red())
        project = Project(stack.enter_context(tempfile.TemporaryDirectory()), flows)
        names = {project.export(flow, airflow.dags) for flow in (*flows, *flows_here())}
        found = airflow.run(["rules", *flows], project.place)
        assert not found["errors"], found["errors"]
        assert names | {"rules"} == set(found["dags"]), found["dags"]
        print(f"loaded: {len(names)} exported flows")
        same = [compare_rules(graph, found["runs"]["rules"]["ends"]), compare_exported(project, found["runs"])]
        return 0 if all(same) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["within"]:
        within_airflow(sys.argv[2], sys.argv[3], sys.argv[4:])
    elif 2 <= len(sys.argv) <= 3:
        sys.exit(main(*sys.argv[1:]))
    else:
        sys.exit(__doc__)
