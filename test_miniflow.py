"""The tests of miniflow.py: python3 test_miniflow.py.

One class a section, in the same order; nothing to install.  What needs a tool that may be missing
(shellcheck, …) is skipped with a reason; with MINIFLOW_TEST_ALL=1 such a skip is a failure.
"""
import ast
import asyncio
import atexit
import bisect
import collections
import contextlib
import copy
import datetime
import errno
import functools
import glob
import http.client
import http.server
import inspect
import io
import itertools
import json
import os
import pickle
import py_compile
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import symtable
import sys
import tempfile
import textwrap
import threading
import time
import tokenize
import unittest
import zipfile
import zlib

import miniflow as mf

# A shell has its background jobs ignore these two.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGQUIT"):
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)

HERE = os.path.dirname(os.path.abspath(__file__))
ENGINE = os.path.join(HERE, "miniflow.py")
CASES = os.path.join(os.path.dirname(HERE), "shared", "cases", "flows")  # real graphs, where they are at hand
LINUX = sys.platform == "linux"

# From how many to how many seconds each kind of task in those graphs takes here, after published traces.
KINDS = {
    "blastall": (9, 10.2), "cat": (0.01, 0.02), "cat_blast": (0.03, 17), "split_fasta": (0.05, 3.2),
    "chr21": (2.1, 120), "fast2bfq": (0.03, 11), "fastqSplit": (1.3, 880), "filterContams": (0.07, 47),
    "map": (25, 120), "mapMerge": (1.6, 37), "pileup": (23, 100), "sol2sanger": (0.02, 29),
    "mAdd": (0.01, 23), "mBackground": (0.1, 110), "mBgModel": (0.4, 110), "mConcatFit": (0.1, 12),
    "mDiffFit": (0.003, 47), "mImgtbl": (0.01, 1.8), "mProject": (1, 1260), "mViewer": (0.01, 68),
    "sG1IterDecon": (0.09, 5.6), "wrapper_siftSTFByMisfit": (0.09, 1.4)}


# -- builders and fakes --

def task(id, *upstream, **fields):
    """Return the JSON of a task; it runs `true` unless told otherwise."""
    if not {"script", "command", "http", "wait_for", "flow"} & set(fields):
        fields["command"] = "true"
    return {"id": id, **({"depends_on": list(upstream)} if upstream else {}), **fields}


def flow_json(*tasks, **fields):
    """Return the JSON of a flow named f."""
    return {"name": "f", **fields, "tasks": list(tasks)}


def make(*tasks, **fields):
    """Return a checked Flow."""
    return mf.parse_flow(json.dumps(flow_json(*tasks, **fields)), "f.json")


def errors_of(text, **options):
    """Return the problems parse_flow finds in a flow file's text (or JSON value), without the file's name."""
    if not isinstance(text, (str, bytes)):
        text = json.dumps(text, indent=1)
    try:
        mf.parse_flow(text, "f.json", **options)
    except mf.FlowError as exc:
        return [re.sub(r"^f\.json:(\d+:\d+: )?", "", line) for line in exc.problems]
    return []


class SimWorld(mf.Simulated):
    """A simulated world that keeps a log, in which runs are cancelled and tasks may ignore SIGTERM."""

    def __init__(self, script=None, cancels=(), stubborn=()):
        super().__init__(lambda task, attempt: self.script.get(task, {}).get(attempt, (1, 0)))
        self.script, self.stubborn, self.cancels, self.log = script or {}, set(stubborn), sorted(cancels), []

    def start(self, run, action):
        self.log.append(f"{self.clock:g} start {action.task}")
        return super().start(run, action)

    def stop(self, run, action):
        self.log.append(f"{self.clock:g} {action.signal} {action.task}")
        return super().stop(run, action) if action.signal == "KILL" or action.task not in self.stubborn else []

    def wait(self, run, until):
        times = [end[0] for end in self.ends[:1]] + [until] * (until is not None)
        if self.cancels and self.cancels[0] <= max(self.clock, min(times, default=self.cancels[0])):
            self.clock = max(self.clock, self.cancels.pop(0))
            return [mf.CancelRequested(self.clock, "cancelled by SIGINT", 130, mf.was_cancelled(run))]
        return super().wait(run, until)


def simulate(flow, script=None, slots=4, left_out=None, world=None, durations=None, **options):
    """Run a Flow in a SimWorld; return the Run, the world and the journal (a list of events)."""
    run = mf.Run(mf.make_plan(flow, left_out or {}, durations or {}), "r")
    world = world or SimWorld(script, **options)
    journal = []
    steps = mf.drive(run, world, lambda events, happened: journal.extend(events), slots)
    events = None
    with contextlib.suppress(StopIteration):
        while True:
            events = world.wait(run, steps.send(events))
    return run, world, journal


def makespan(flow, seconds, slots, durations=None):
    """Return how long a run takes whose order is made by `durations`; None: in the order of declaration."""
    if durations is None:                      # the first priority is the highest
        flow = flow._replace(tasks=tuple(t._replace(priority=-n) for n, t in enumerate(flow.tasks)))
    script = {name: {1: (s, 0)} for name, s in seconds.items()}
    return simulate(flow, script, slots, durations=durations)[0].finished


def remembered(flow, durations, run_id="old", started=1.0, stem="f", status="success"):
    """Return a run of `flow` from which a later one learns `durations`."""
    run = mf.Run(mf.make_plan(flow, durations=durations), run_id, {}, started, stem)
    run.outcome, run.finished = status, started
    return run


def remember(store, *args, **options):
    """Leave a run on disk from which a later one learns how long tasks take."""
    run = remembered(*args, **options)
    store.prepare("runs")
    store.disk.put(store.files(run.id).state, mf.encode_state(run, {}, 1, mf.encode_definition(run.plan.flow)), False)


def ends(run):
    """Return how each task of a run stands."""
    return {name: task_run.status for name, task_run in run.tasks.items()}


@functools.lru_cache(None)
def compiled_engine():
    """Return the path of the engine as bytecode: compiling it takes longer than most of what is tried with it."""
    folder = tempfile.mkdtemp(prefix="miniflow-test-engine-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return py_compile.compile(ENGINE, os.path.join(folder, "miniflow.pyc"), doraise=True)


class Project:
    """A directory with flows and scripts in which commands are run, as a user would; a context manager."""

    def __init__(self, flows=None, scripts=None):
        self.flows, self.scripts = flows or {}, scripts or {}

    def __enter__(self):
        self.path = os.path.realpath(tempfile.mkdtemp(prefix="miniflow-test-"))
        for name in ("flows", "tasks"):
            os.mkdir(self.at(name))
        for name, flow in self.flows.items():
            self.write(f"flows/{name}.json",
                       flow if isinstance(flow, (str, bytes)) else json.dumps(flow, indent=1))
        for name, text in self.scripts.items():
            self.write(f"tasks/{name}", textwrap.dedent(text))
        return self

    def __exit__(self, *exc_info):
        shutil.rmtree(self.path, ignore_errors=True)

    def at(self, *parts):
        return os.path.join(self.path, *parts)

    def write(self, name, content):
        os.makedirs(os.path.dirname(self.at(name)), exist_ok=True)
        with open(self.at(name), "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))

    def read(self, name):
        with open(self.at(name), encoding="utf-8") as file:
            return file.read()

    def lines(self, name):
        return self.read(name).splitlines()

    def cli(self, *args, stdin=b"", **options):
        """Run a command in a process of its own; return its CompletedProcess, output as text."""
        done = subprocess.run([sys.executable, compiled_engine(), *args], cwd=self.path, input=stdin,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120, **options)
        done.stdout, done.stderr = (part.decode("utf-8", "replace") for part in (done.stdout, done.stderr))
        return done

    def start(self, *args, **options):
        """Start a command and return its Popen."""
        return subprocess.Popen([sys.executable, compiled_engine(), *args], cwd=self.path, stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)

    def main(self, *args):
        """Run a command in this process, which is quicker; return exit code, stdout and stderr."""
        streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)]
        saved, before = (sys.stdout, sys.stderr), os.getcwd()
        os.chdir(self.path)
        try:
            sys.stdout, sys.stderr = streams
            code = mf.main(list(args))
        except SystemExit as exc:              # argparse's --help and --version
            code = exc.code
        finally:
            sys.stdout, sys.stderr = saved
            os.chdir(before)
        return (code, *(stream.buffer.getvalue().decode("utf-8", "replace") for stream in streams))

    def run(self, name="f", **options):
        """Run a flow by the library, from the project's directory; return the Run."""
        before = os.getcwd()
        os.chdir(self.path)
        try:
            return mf.MiniFlow().run(name, **options)
        finally:
            os.chdir(before)

    def state(self, run_id):
        """Return the content of a run's RUN.json."""
        return json.loads(self.read(f"miniflow_output/runs/{run_id}.json"))

    def log(self, run_id, name, attempt=1):
        """Return the bytes of an attempt's log."""
        with open(self.at("miniflow_output", "logs", run_id, f"{name}.{attempt}.log"), "rb") as file:
            return file.read()


def one(*tasks, scripts=None, **fields):
    """Return a Project with one flow, f."""
    return Project({"f": flow_json(*tasks, **fields)}, scripts)


@contextlib.contextmanager
def mock_stdin(text):
    """Let sys.stdin hold `text`."""
    before, sys.stdin = sys.stdin, io.StringIO(text)
    try:
        yield
    finally:
        sys.stdin = before


def wait_for(condition, what, seconds=20):
    """Return the value of `condition` once it holds; fail after `seconds`, which no working machine needs."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"waited in vain for {what}")
        time.sleep(0.01)


def alive(pid):
    """Tell whether a process runs (a zombie does not)."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        if LINUX:
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# Texts that do something where they are taken for more than text.
TRICKY = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</script>", "]]>", "<!--", "&lt;b&gt;",
           "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "a\u202eb", "end", '"]', "#quot;", "`**b**`", "style x:#a;",
           "classDef x:#b;", "\\N", '\\"', "%%{init: {}}%%", "click t0 x", "</title></svg>", "{{x}}"]


class Screen:
    """A terminal, as far as a run needs one; anything else that it is sent is an error.

    Lines that are too long are broken, and broken anew where the terminal is made narrower, as terminals do.
    """

    def __init__(self, columns, rows=24):
        self.columns, self.rows, self.lines, self.at = columns, rows, [""], [0, 0]

    def resize(self, columns):
        above, self.columns = self.lines[:self.at[0]], columns
        self.lines = [line[n:n + columns] for line in self.lines for n in range(0, max(1, len(line)), columns)]
        self.at[0] = sum(max(1, -(-len(line) // columns)) for line in above)

    def feed(self, text):
        for mark, up, char in re.findall(r"(\x1b\[(\d*)[A-Za-z])|(.)", text, re.S):
            if mark[-1:] == "F":
                assert 0 < int(up) <= self.at[0], (mark, self.at)
                assert int(up) < self.rows, "what has scrolled out of sight can't be drawn over"
                self.at = [self.at[0] - int(up), 0]
            elif mark in ("\x1b[J", "\x1b[K"):
                self.lines[self.at[0]] = self.lines[self.at[0]][:self.at[1]]
                if mark == "\x1b[J":
                    del self.lines[self.at[0] + 1:]
            elif mark:
                assert mark[-1] == "m", mark
            elif char == "\r":
                self.at[1] = 0
            elif char == "\n":
                self.at = [self.at[0] + 1, self.at[1]]
                self.lines += [""] * (self.at[0] == len(self.lines))
            else:
                assert char.isprintable(), char
                self.put(char)

    def put(self, char):
        if self.at[1] == self.columns:
            self.at = [self.at[0] + 1, 0]
            self.lines += [""] * (self.at[0] == len(self.lines))
        row, column = self.at
        line = self.lines[row].ljust(column)
        self.lines[row], self.at[1] = line[:column] + char + line[column + 1:], column + 1


def on_terminal(project, *args, columns=80, rows=24, look=lambda screen: None, **env):
    """Run a command whose stdout and stderr are a terminal; return its exit code, the Screen, and all it wrote.

    `look` sees the screen after each piece, and may return another number of columns for it.
    """
    import fcntl
    import pty
    import struct
    import termios
    primary, secondary = pty.openpty()
    resize = lambda wide: fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", rows, wide, 0, 0))  # noqa
    resize(columns)
    env = {**{key: value for key, value in os.environ.items() if key != "NO_COLOR"}, "TERM": "xterm", **env}
    process = subprocess.Popen([sys.executable, ENGINE, *args], cwd=project.path, stdin=subprocess.DEVNULL,
                               stdout=secondary, stderr=secondary, env=env)
    screen, written, text = Screen(columns, rows), b"", b""
    while process.poll() is None or select.select([primary], [], [], 0)[0]:
        if select.select([primary], [], [], 0.05)[0]:
            text += os.read(primary, 65536)
            end = text.rfind(b"\n") + 1
            written, piece, text = written + text[:end], text[:end], text[end:]
            screen.feed(piece.decode())
            wide = look(screen)
            if wide and wide != screen.columns:
                resize(wide)
                screen.resize(wide)
    screen.feed(text.decode())
    os.close(primary)
    os.close(secondary)
    return process.returncode, screen, (written + text).decode()


def needs(tool, always=True):
    """Skip a test where `tool` is missing; with MINIFLOW_TEST_ALL=1 it must not be, but where not `always`."""
    if shutil.which(tool) or always and os.environ.get("MINIFLOW_TEST_ALL") == "1":
        return lambda function: function
    return unittest.skip(f"{tool} is not installed")


def random_flow(chance, size=9, conditions=True, **options):
    """Return a random Flow in shuffled order, and a SimWorld script for it."""
    tasks, script = [], {}
    for n in range(chance.randint(1, size)):
        fields = {"trigger_rule": chance.choice(list(mf.TRIGGER_RULES)), "max_retries": chance.randint(0, 2),
                  "backoff_s": chance.choice([0, 1, 5]), "jitter": chance.choice([0, 0.5]),
                  "priority": chance.randint(-1, 1), "allow_failure": chance.random() < 0.2,
                  "grace_s": chance.choice([0, 2])}
        if chance.random() < 0.4:
            fields["pool"] = chance.choice("pq")
        if chance.random() < 0.3:
            fields["timeout_s"] = 3
        if chance.random() < 0.2:
            fields["retry_on"] = chance.choice([[1], [2], ["timeout"], []])
        upstream = [f"t{k}" for k in range(n) if chance.random() < 0.35]
        if conditions and chance.random() < 0.3:
            words = ["run.id == 'r'", "run.id != 'r'", "run.id", "1 / 0 == 1"]
            words += [f"tasks.{up}.status in ['success', 'skipped']" for up in upstream]
            fields["if"] = chance.choice(words)
        if conditions and chance.random() < 0.2:
            fields.update(chance.choice([
                {"foreach": list(range(chance.randint(0, 3)))}, {"matrix": {"x": [1, 2], "y": ["a"]}},
                {"foreach": [1, 2], "if": "item > 1"}, {"foreach": "${{ run.id }}"}]))
            if chance.random() < 0.5:
                fields["max_parallel"] = 1
        tasks.append(task(f"t{n}", *upstream, **fields))
        script[f"t{n}"] = {k: (chance.randint(0, 6), chance.choice([0, 0, 1, 2])) for k in range(1, 9)}
    chance.shuffle(tasks)
    if conditions:
        options.update({name: {"command": "true", "grace_s": 1} for name in mf.HANDLERS if chance.random() < 0.2})
        options.update({"timeout_s": chance.randint(2, 30)} if chance.random() < 0.2 else {})
    return make(*tasks, fail_fast=chance.random() < 0.2, pools={"p": 1, "q": 2}, **options), script


class T01Errors(unittest.TestCase):

    def test_each_error_has_the_exit_code_that_the_reference_gives(self):
        codes = {mf.UsageError: 2, mf.NotFound: 3, mf.FlowNotFound: 3, mf.RunLocked: 4, mf.StateError: 74}
        for kind, code in codes.items():
            self.assertEqual(kind("x").exit_code, code, kind)
        self.assertEqual(mf.FlowError(["x"]).exit_code, 2)
        self.assertEqual(mf.FlowFailed("x", None).exit_code, 1)

    def test_errors_are_also_what_a_python_program_expects(self):
        self.assertTrue(issubclass(mf.FlowNotFound, FileNotFoundError))
        self.assertTrue(issubclass(mf.FlowError, ValueError))

    def test_values_in_messages_stay_on_one_line_and_short(self):
        text = mf.shown("a\nb\x1b" + "x" * 500)
        self.assertLessEqual(len(text), 60)
        self.assertNotIn("\n", text)
        self.assertNotIn("\x1b", text)


class T02Model(unittest.TestCase):

    def test_tuples_with_named_fields_are_what_the_standard_library_would_make(self):
        classes = [kind for kind in vars(mf).values() if isinstance(kind, type) and hasattr(kind, "_fields")]
        self.assertGreater(len(classes), 50)
        for kind in classes:
            defaults = kind._field_defaults
            like = collections.namedtuple(kind.__name__, kind._fields, defaults=list(defaults.values()))
            values = list(range(len(kind._fields)))
            with self.subTest(kind.__name__):
                self.assertEqual(like._field_defaults, defaults)
                for each in (like, kind):
                    told = inspect.signature(each).parameters
                    self.assertEqual({name: part.default for name, part in told.items()},
                                     {name: defaults.get(name, inspect.Parameter.empty) for name in kind._fields})
                this, other = (each(*values[:1], **dict(zip(kind._fields[1:], values[1:]))) for each in (kind, like))
                self.assertEqual((this, hash(this), this._asdict()), (other, hash(other), other._asdict()))
                self.assertEqual([getattr(this, name) for name in kind._fields], values)
                self.assertEqual(this._replace(**{kind._fields[-1]: "new"}), (*values[:-1], "new"))
                self.assertIs(type(kind._make(values)), kind)
                self.assertFalse(hasattr(this, "__dict__"))
                if "__repr__" not in vars(kind):
                    self.assertEqual(repr(this), repr(other))
                for again in (copy.copy(this), copy.deepcopy(this), pickle.loads(pickle.dumps(this))):
                    self.assertEqual((type(again), again), (kind, this))
                self.assertRaises(TypeError, this._replace, unknown=1)
                self.assertRaises(TypeError, kind, *values, 1)
                self.assertRaises(TypeError, kind, unknown=1)
                with self.assertRaises(AttributeError):
                    setattr(this, kind._fields[0], 1)

    def test_stored_words_are_never_renamed(self):
        self.assertEqual(mf.TASK_STATES, ("pending", "running", "retrying", "success", "cached", "skipped",
                                          "failed", "upstream_failed", "cancelled"))
        self.assertEqual(mf.RUN_STATES, ("running", "success", "failed", "cancelled", "interrupted"))
        self.assertEqual(list(mf.EVENTS), [
            "attempt_started", "attempt_spawned", "attempt_submitted", "attempt_deferred", "attempt_stopping",
            "attempt_ended", "task_admitted", "task_reading", "task_expanded", "task_settled", "cancel_requested",
        "run_finished"])

    def test_trigger_rules_mean_what_airflow_documents(self):
        """By whether the upstream holds a success, a skipped and a failed one.

        In the table, r runs, s is skipped, u upstream_failed.
        """
        columns = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)]
        table = {
            "all_success": "rsusuuu", "all_done": "rrrrrrr", "all_failed": "ssrssss",
            "one_success": "rsurrur", "one_failed": "ssrsrrr", "none_failed": "rruruuu",
            "none_failed_min_one_success": "rsuruuu", "none_skipped": "rsrsrss", "always": "rrrrrrr"}
        self.assertEqual(set(table), set(mf.TRIGGER_RULES))
        words = {"r": mf.RUNNING, "s": mf.SKIPPED, "u": mf.UPSTREAM_FAILED}
        for rule, row in table.items():
            for counts, letter in zip(columns, row):
                for factor in (1, 3):
                    with self.subTest(rule=rule, counts=counts, factor=factor):
                        up = mf.Counts(*(factor * n for n in counts))
                        self.assertEqual(mf.TRIGGER_RULES[rule](up), words[letter])

    def test_the_wait_doubles_up_to_its_limit_and_never_overflows(self):
        retry = mf.Retry(max_retries=10**6, backoff_s=0.5, max_backoff_s=60)
        self.assertEqual([retry.wait_s(n, 0) for n in (1, 2, 3, 4)], [0.5, 1, 2, 4])
        for attempt in (8, 100, 10**6):
            self.assertEqual(retry.wait_s(attempt, 0), 60)

    def test_jitter_makes_that_share_of_the_wait_random_and_the_same_for_the_same_run(self):
        retry = mf.Retry(backoff_s=10, jitter=0.3)
        self.assertAlmostEqual(retry.wait_s(1, 0), 7)
        self.assertAlmostEqual(retry.wait_s(1, 1), 10)
        chances = [mf.chance("run", "task", n) for n in range(1000)]
        self.assertEqual(chances, [mf.chance("run", "task", n) for n in range(1000)])
        self.assertTrue(all(0 <= c < 1 for c in chances))
        self.assertAlmostEqual(sum(chances) / 1000, 0.5, delta=0.05)


class T03JsonText(unittest.TestCase):

    BAD = [
        ('{"a": 1, "a": 2}', '1:10: a: given twice in one object; keep one'),
        ('{"a": NaN}', '1:7: a: NaN is not JSON; give a number, a string or null'),
        ('[1, -Infinity]', '1:5: [1]: -Infinity is not JSON; give a number, a string or null'),
        ('[1e999]', '1:2: [0]: 1e999 is too large for a number; give it as a string'),
        ('{"a": "\\ud800"}', '1:7: a: half of a surrogate pair in "\\ud800"; write the whole character'),
        ('["a\\u0000b"]', '1:2: [0]: a NUL character in "a\\u0000b"; remove it'),
        ('{"a": 1,}', '1:9: a comma before }; remove the comma'),
        ('[1 2]', '1:4: expected a comma or ], got "2]"'),
        ('{"a" 1}', '1:6: a: expected a colon, got "1}"'),
        ('{a: 1}', '1:2: expected a member\'s name in double quotes, got "a: 1}"'),
        ('["a', '1:2: [0]: a string that is not closed, or holds a control character or a bad escape: "a"'),
        ('["\\x"]', '1:2: [0]: a string that is not closed, or holds a control character or a bad escape: '
         '"\\\\x\\"]"'),
        ('{"a": tru}', '1:7: a: expected a JSON value, got "tru}"'),
        ('{"a":\n 01}', '2:2: a: expected a JSON value, got "01}"'),
        ('', '1:1: expected a JSON value, got the end of the text'),
        ('{} x', '1:4: "x" after the end of the JSON value; remove it'),
        ('[' + '9' * 400 + ']', '1:2: [0]: a number of more than 308 digits; give it as a string'),
        ('[' * 100, '1:65: nested deeper than 64 levels; flatten it'),
        ('[' * 65 + ']' * 65, '1:65: nested deeper than 64 levels; flatten it'),
    ]

    def problems(self, text):
        try:
            mf.parse_json(text, "x")
        except mf.FlowError as exc:
            return list(exc.problems)
        return []

    def test_each_way_to_be_wrong_is_named_with_line_and_column(self):
        for text, expected in self.BAD:
            with self.subTest(text=text[:40]):
                self.assertEqual(self.problems(text), ["x:" + expected])

    def test_bytes_that_are_not_utf8_are_named_by_their_place(self):
        self.assertEqual(self.problems(b'{\n "a": "\xff"}'),
                         ["x:2:8: byte 0xff is not UTF-8; save the file as UTF-8"])
        self.assertIn("is not UTF-8", self.problems('{"a": 1}'.encode("utf-16"))[0])

    def test_a_byte_order_mark_is_accepted(self):
        self.assertEqual(mf.parse_json(b'\xef\xbb\xbf{"a": 1}', "x").value, {"a": 1})

    def test_several_problems_are_reported_at_once(self):
        self.assertEqual(len(self.problems('{"a": NaN, "b": 1e999, "b": 2}')), 3)

    def test_both_readers_agree_on_random_text(self):
        """What json.loads under strict hooks takes and what the Reader takes is the same, by value too."""
        chance = random.Random(1)
        pieces = ['{', '}', '[', ']', ',', ':', '"a"', '"b"', '1', '-2.5', '1e3', 'true', 'null', 'NaN', ' ',
                  '\n', '"\\u00e9"', '"\\ud83d\\ude00"', '"\\ud83d"', '{"a":1}', '[1,2]', '"x":', '01', '"']
        sound = 0
        for _ in range(20000):
            text = "".join(chance.choice(pieces) for _ in range(chance.randint(1, 7)))
            reader = mf.Reader(text)
            try:
                value = json.loads(text, object_pairs_hook=mf._strict_object, parse_float=mf._strict_float,
                                   parse_constant=mf._strict_constant)
                lone = re.search(r"[\ud800-\udfff]", json.dumps(value, ensure_ascii=False))
            except ValueError:
                self.assertTrue(reader.problems, text)
            else:
                self.assertEqual(bool(lone), bool(reader.problems), text)
                self.assertEqual(value, reader.value)
                sound += 1
        self.assertGreater(sound, 300)

    def test_valid_surrogate_pairs_and_64_levels_are_fine(self):
        self.assertEqual(mf.parse_json('["\\ud83d\\ude00"]', "x").value, ["\U0001f600"])
        self.assertEqual(self.problems("[" * 64 + "]" * 64), [])

    def test_a_hundred_thousand_duplicate_keys_give_a_bounded_report(self):
        text = "{" + ",".join(['"a": 1'] * 100000) + "}"
        problems = self.problems(text)
        self.assertEqual(len(problems), mf.MAX_PROBLEMS + 1)
        self.assertEqual(problems[-1], "x: and 99899 more problems like these")

    def test_a_file_over_the_limit_is_refused_by_its_size(self):
        with self.assertRaises(mf.FlowError) as caught:
            mf.parse_json(b" " * 101, "x", 100)
        self.assertEqual(str(caught.exception), "x: 101 bytes, more than the 100 that are read; split it up")


class T04Values(unittest.TestCase):

    VALUES = mf.Values({"n": 3, "s": "x y", "o": {"k": [1, {"z": "deep"}]}, "a-b": "dash"}, {"rows": 7},
                       {"id": "r1", "scheduled_time": "T"}, {"HOME": "/h"},
                       lambda name: {"status": "success", "outputs": {"path": f"/{name}", "n": None}})

    def test_templates_give_the_value_that_their_path_leads_to(self):
        for text, expected in [
                ("plain", "plain"), ("${{ params.n }}", 3), ("${{params.n}}", 3),
                ("n=${{ params.n }}!", "n=3!"), ("${{ params.o }}", {"k": [1, {"z": "deep"}]}),
                ("<${{ params.o.k }}>", '<[1, {"z": "deep"}]>'), ("${{ params.o.k[1].z }}", "deep"),
                ("${{ params['a-b'] }}", "dash"), ("${{ params.a-b }}", "dash"),
                ('${{ params["o"]["k"][0] }}', 1), ("${{ ctx.rows }}", 7), ("${{ run.id }}", "r1"),
                ("${{ run.scheduled_time }}", "T"), ("${{ env.HOME }}", "/h"),
                ("${{ tasks.a.status }}", "success"),
                ("${{ tasks.a.outputs.path }}", "/a"), ("${{ tasks.a.b-c.outputs.path }}", "/a.b-c"),
                ("${{ tasks['x.outputs'].outputs.path }}", "/x.outputs"), ("${{ tasks.a.outputs.n }}", None),
                ("v${{ tasks.a.outputs.n }}", "vnull"), ("$${{ params.n }}", "${{ params.n }}"),
                ("$${{ ${{ params.n }} }}", "${{ 3 }}"), ("{{ params.n }} ${x} $(y) %s {0}", None),
                ("${{ params.s }}${{ params.s }}", "x yx y")]:
            with self.subTest(text=text):
                self.assertEqual(mf.render(text, self.VALUES),
                                 text if expected is None and "tasks" not in text else expected)

    def test_what_is_not_a_path_of_known_names_is_refused(self):
        for text, part in [
                ("${{ }}", "unknown name"), ("${{ foo.x }}", 'unknown name "foo"'),
                ("${{ parms.x }}", "did you mean params"),
                ("${{ params }}", "write params.NAME"), ("${{ params.x() }}", "is not a path"),
                ("${{ params.__class__.__init__.__globals__ }}", None), ("${{ 7*7 }}", "unknown name"),
                ("${{ params.x | upper }}", "is not a path"), ("${{ run.secret }}", "write run.id"),
                ("${{ tasks.a }}", "write tasks.ID.outputs"),
                ("${{ tasks.a.status.x }}", "write tasks.ID.outputs"), ("${{ env.A.B }}", "write env.NAME"),
                ("${{ params.x", "has no }}"), ("${{ params[-1] }}", "is not a path"),
                ("${{ params['x }}", "is not a path")]:
            with self.subTest(text=text):
                if part is None:
                    self.assertEqual(len(mf.refs(text)), 1)
                    with self.assertRaises(LookupError):
                        mf.render(text, self.VALUES)
                else:
                    with self.assertRaises(ValueError) as caught:
                        mf.refs(text)
                    self.assertIn(part, str(caught.exception))

    def test_a_missing_value_says_what_is_there_instead(self):
        with self.assertRaises(LookupError) as caught:
            mf.render("${{ tasks.a.outputs.rows }}", self.VALUES)
        self.assertEqual(caught.exception.args[0],
                         'tasks.a.outputs.rows: there is no "rows" in ["n", "path"]')

    def test_many_templates_in_one_string_cost_no_more_than_their_number(self):
        text = "${{ params.n }}" * 20000
        self.assertEqual(mf.render(text, self.VALUES), "3" * 20000)

    def test_param_text_is_converted_by_the_declared_type_or_that_of_the_default(self):
        param = mf.Param
        for declared, text, expected in [
                (param(), "5", "5"), (param(type="string"), "5", "5"), (param(type="integer"), "5", 5),
                (param(type="number"), "0.5", 0.5), (param(type="boolean"), "true", True),
                (param(type="array"), "[1]", [1]), (param(type="object"), '{"a": 1}', {"a": 1}),
                (param(default=3), "5", 5), (param(default=3), "0.5", 0.5), (param(default="x"), "5", "5"),
                (param(default=True), "false", False), (param(default=None), "5", "5")]:
            with self.subTest(declared=declared, text=text):
                self.assertEqual(mf.parse_param("x", text, declared), expected)
                self.assertIs(type(mf.parse_param("x", text, declared)), type(expected))

    def test_param_text_that_does_not_fit_is_refused_with_an_example(self):
        for kind in ("integer", "number", "boolean", "array", "object"):
            for text in ("x", "", "1.5x", "True", '{"a":1,"a":2}', "NaN"):
                with self.subTest(kind=kind, text=text), self.assertRaises(mf.UsageError) as caught:
                    mf.parse_param("x", text, mf.Param(type=kind))
                self.assertIn(f"got {json.dumps(text)}; give ", str(caught.exception))

    def test_params_are_completed_and_everything_wrong_is_reported_at_once(self):
        flow = make(task("a"), params={"date": {"type": "string", "required": True, "pattern": r"^\d{4}$"},
                                       "n": {"type": "integer", "default": 3, "min": 1, "max": 9},
                                       "mode": {"enum": ["fast", "slow"]}, "x": 1.5})
        self.assertEqual(mf.complete_params(flow, {"date": "2026"}), {"date": "2026", "n": 3, "x": 1.5})
        with self.assertRaises(mf.UsageError) as caught:
            mf.complete_params(flow, {"n": 10, "mode": "fat", "dat": "2026"})
        self.assertEqual(str(caught.exception).splitlines(), [
            "params.dat: flow f has no such param, did you mean date?",
            "params.date: is required; give --param date=VALUE",
            "params.n: expected an integer from 1 to 9, got 10",
            'params.mode: expected one of "fast", "slow", got "fat"'])
        with self.assertRaises(mf.UsageError) as caught:
            mf.complete_params(flow, {"date": "20x6", "n": True})
        self.assertEqual(len(str(caught.exception).splitlines()), 2)

    def test_a_param_that_a_task_needs_and_nobody_gave_is_an_error_before_anything_runs(self):
        flow = make(task("a", command=["echo", "${{ params.date }}"]))
        with self.assertRaises(mf.UsageError) as caught:
            mf.complete_params(flow, {})
        self.assertEqual(str(caught.exception),
                         "params.date: task a needs it and nobody gave it; give --param date=VALUE")
        self.assertEqual(mf.complete_params(flow, {"date": "x", "other": 1}), {"date": "x", "other": 1})

    def test_lengths_of_strings_and_arrays_are_bounded_by_min_and_max(self):
        flow = make(task("a"), params={"s": {"type": "string", "min": 2, "max": 3, "default": "ab"},
                                       "l": {"type": "array", "min": 1, "default": [1]}})
        for given in ({"s": "a"}, {"s": "abcd"}, {"l": []}):
            with self.subTest(given=given), self.assertRaises(mf.UsageError):
                mf.complete_params(flow, given)
        mf.complete_params(flow, {"s": "abc"})

    def test_the_message_names_the_length_that_was_asked_for(self):
        flow = make(task("a"), params={"s": {"type": "string", "max": 3}, "l": {"type": "array", "max": 1}})
        with self.assertRaises(mf.UsageError) as caught:
            mf.complete_params(flow, {"s": "abcd", "l": [1, 2]})
        self.assertEqual(str(caught.exception).splitlines(), [
            'params.s: expected a string of at most 3 characters, got "abcd"',
            "params.l: expected an array of at most 1 items, got [1, 2]"])

    def test_params_that_are_no_json_or_fit_no_process_are_refused(self):
        flow = make(task("a"))
        for given, part in [({"x": {1, 2}}, "is no JSON value"), ({"x": float("nan")}, "is no JSON value"),
                            ({1: 2}, "is no JSON value"), (["x"], "expected a mapping"), ("x=1", "expected a mapping"),
                            ({"x": ["a\0b"]}, "holds a NUL"), ({"x": "\ud800"}, "half a surrogate pair")]:
            with self.subTest(given=given), self.assertRaises(mf.UsageError) as caught:
                mf.complete_params(flow, given)
            self.assertIn(part, str(caught.exception))
        self.assertEqual(mf.complete_params(flow, {"x": "\udcff \\u0000"}), {"x": "\udcff \\u0000"})

    def test_a_step_fits_what_it_leads_into(self):
        for text in ("${{ params.s[0] }}", "${{ params.o.k['0'] }}", "${{ params.o.k.1 }}", "${{ params.n.x }}"):
            with self.subTest(text=text), self.assertRaises(LookupError):
                mf.render(text, self.VALUES)

    def test_params_of_an_enum_of_numbers_can_be_given_as_text(self):
        self.assertEqual(mf.parse_param("k", "2", mf.Param(enum=(1, 2))), 2)
        self.assertEqual(mf.parse_param("k", "2", mf.Param(enum=(1, "2"))), "2")

    def test_two_params_that_would_be_one_variable_are_refused(self):
        with self.assertRaises(mf.UsageError) as caught:
            mf.complete_params(make(task("a")), {"a-b": 1, "a_b": 2})
        self.assertIn("MINIFLOW_PARAM_A_B as well", str(caught.exception))


    def test_a_matrix_gives_the_combinations_that_github_gives(self):
        """The first two are the examples in the documentation of GitHub Actions."""
        fruits = {"fruit": ["apple", "pear"], "animal": ["cat", "dog"], "include": [
            {"color": "green"}, {"color": "pink", "animal": "cat"}, {"fruit": "apple", "shape": "circle"},
            {"fruit": "banana"}, {"fruit": "banana", "animal": "cat"}]}
        self.assertEqual(mf.matrix_combinations(fruits), [
            {"fruit": "apple", "animal": "cat", "color": "pink", "shape": "circle"},
            {"fruit": "apple", "animal": "dog", "color": "green", "shape": "circle"},
            {"fruit": "pear", "animal": "cat", "color": "pink"}, {"fruit": "pear", "animal": "dog", "color": "green"},
            {"fruit": "banana"}, {"fruit": "banana", "animal": "cat"}])
        systems = {"os": ["macos", "windows"], "version": [12, 14, 16], "environment": ["staging", "production"],
                   "exclude": [{"os": "macos", "version": 12, "environment": "production"},
                               {"os": "windows", "version": 16}]}
        found = mf.matrix_combinations(systems)
        self.assertEqual(len(found), 12 - 1 - 2)
        self.assertNotIn({"os": "macos", "version": 12, "environment": "production"}, found)
        self.assertEqual(found[0], {"os": "macos", "version": 12, "environment": "staging"})
        self.assertEqual(mf.matrix_combinations({"include": [{"a": 1}, {"b": 2}]}), [{"a": 1}, {"b": 2}])
        self.assertEqual(mf.matrix_combinations({"a": [1, True], "exclude": [{"a": True}]}), [{"a": 1}])
        self.assertEqual(mf.matrix_combinations({"a": [], "b": [1]}), [])
        with self.assertRaises(ValueError) as caught:
            mf.matrix_combinations({"a": list(range(10**4)), "exclude": [{"a": n} for n in range(2000)]})
        self.assertIn("2,000 entries of include and exclude for 10,000 combinations", str(caught.exception))
        self.assertEqual(mf.matrix_combinations({"a": [1], "exclude": [{"gone": 1}]}), [{"a": 1}])

    EXPRESSIONS = {
        # what is true, and (by a leading "not ") what is false
        "params.n == 3": True, "params.n != 3": False, "params.n == 3.0": True, "params.n in [1, 2]": False,
        "params['n'] == 3": True, 'params.s == "x y"': True, "'x' in params.s": True, "'y z' not in params.s": True,
        "params.o.k[0] == 1": True, "params.o.k[-1].z == 'deep'": True, "params.o['k'][1]['z'] == 'deep'": True,
        "params.o == {'k': [1, {'z': 'deep'}]}": True, "params.o.k == [1]": False, "'k' in params.o": True,
        "ctx.rows > 5 and ctx.rows < 10": True, "5 < ctx.rows < 10": True, "5 < ctx.rows < 7": False,
        "ctx.rows >= 7 and ctx.rows <= 7": True, "not ctx.rows == 7": False, "not (true and false)": True,
        "true or params.n / 0 == 1": True, "false and params.n / 0 == 1": False, "True": True, "False": False,
        "null == None": True, "null == false": False, "0 == false": False, "1 == true": False, "'' == null": False,
        "1 in [true]": False, "[1, [true]] == [1, [1]]": False, "1 + 2 * 3 == 7": True, "7 // 2 == 3": True,
        "7 / 2 == 3.5": True, "-7 % 3 == 2": True, "-params.n == -3": True, "+params.n == 3": True,
        "'a' + 'b' == 'ab'": True, "[1] + [2] == [1, 2]": True, "'a' < 'b'": True, "run.id == 'r1'": True,
        "env.HOME == '/h'": True, "tasks.t.status == 'success'": True, "tasks.t.outputs.path == '/t'": True,
        "tasks['a-b'].outputs.path == '/a-b'": True, "tasks.a.b.outputs.path == '/a.b'": True,
        "tasks.t.outputs == {'path': '/t', 'n': null}": True, "tasks.t.outputs.n == null": True,
        "params['a-b'] == 'dash'": True, "  1\n ==\n 1  ": True, "1 == 1 # so it is": True, "(1, 2) == [1, 2]": True,
        "{'a': 1}['a'] == 1": True, "[1, 2][params.n - 2] == 2": True, "params.o.k[params.n - 2]['z'] == 'deep'": True,
        "9007199254740993 == 9007199254740992": False, "1e308 < 2e308 - 1e308": None,
        "'\U0001f600' in '\U0001f600'": True,
    }

    def test_an_expression_has_the_value_that_its_text_says(self):
        for text, value in self.EXPRESSIONS.items():
            with self.subTest(text):
                if value is None:
                    with self.assertRaises(ValueError):
                        mf.holds(text, self.VALUES)
                else:
                    self.assertIs(mf.holds(text, self.VALUES), value)

    def test_a_text_in_an_expression_may_be_spelt_as_json_and_as_python_spell_it(self):
        values = self.VALUES._replace(params={"u": "\U0001f600", "s": "a/b", "q": "it's", "d": 'say "x"'})
        for text in ('params.u == "\\ud83d\\ude00"', 'params.s == "a\\/b"', 'params["s"] == "\\u0061/b"',
                     "params.q == 'it\\'s'", 'params.q == "it\'s"', "params['d'] == 'say \"x\"'",
                     'params.d == "say \\"x\\""', "params.u == '\U0001f600'",
                     "'' == \"\" and params.s in ('a/b', \"\")",
                     "params.s == 'a' + '/' + \"b\""):
            with self.subTest(text):
                self.assertIs(mf.holds(text, values), True)

    def test_an_expression_that_is_none_says_what_is_wrong(self):
        deep = "[" * 60 + "]" * 60 + " == 1"
        for text, what in {
                "": "is no expression", "1 +": "is no expression", "a b": "is no expression",
                "x = 1": "is no expression",
                "print(1)": "a call is not possible here", "params.n.bit_length() == 2": "a call is not possible",
                "__import__('os').system('id') == 0": "a call is not possible here",
                "param.n == 1": 'unknown name "param", did you mean params?',
                "rows == 1": 'unknown name "rows"; use one',
                "yes": 'unknown name "yes"', "1 if true else 2": "if … else is not possible", "lambda: 1": "a lambda",
                "[x for x in params.o.k] == 1": "ListComp of Python is not possible",
                "f'{params.n}' == '3'": "an f-string",
                "(n := 1) == 1": ":= is not possible", "2 ** 999999999 > 1": "** is not possible",
                "params.n is 3": "write ==",
                "params.o.k[0:1] == [1]": "a slice is not possible", "1 << 99999999 > 1": "LShift of Python",
                "~1 == 1": "Invert of Python", "b'x' == 'x'": "Constant of Python", "1j == 1": "Constant of Python",
                "... == 1": "Constant of Python", "{1, 2} == 1": "Set of Python", "{**params.o} == 1": "Dict of Python",
                "${{ params.n }} == 3": "an expression has no ${{ }}",
                "params == 1": "names no value; write params.NAME",
                "tasks.t == 1": "names no value; write tasks.ID.outputs", "run.name == 'x'": "names no value",
                "tasks.t.output.x == 1": "names no value", "9" * 2000 + " == 1": "a number is too large",
                "1e999 == 1": "a number is too large", "x" * 5000: "5,000 characters is too long",
                "(" * 900: "is no expression",
                "not " * 900 + "true": None, "-" * 3000 + "1 == 1": None, deep: "nested deeper", "1\0 == 1": None,
                "1 == 1; 2": "is no expression", "await params.n": None, "*params.o": None,
                "r'x' == 'x'": "is no text; write it in quotes", "u'x' == 'x'": "is no text",
                "'a' 'b' == 'ab'": "more than one text", '"a" "b" == 1': "is no string of JSON",
                "\"\"\"x\"\"\" == 'x'": "is no text", '"\\x41" == 1': "is no string of JSON",
                '"\\ud83d" == 1': "half of a surrogate pair", "'\\ud83d' == 1": "half of a surrogate pair",
                "{1: 2} == 1": "the keys of an object have to be strings",
                "\ud800 == 1": None}.items():
            with self.subTest(text[:40]), self.assertRaises(ValueError) as caught:
                mf.expression_refs(text)
            self.assertIn(what or "", str(caught.exception))
            self.assertLess(len(str(caught.exception)), 400)

    def test_an_expression_without_a_value_is_neither_true_nor_false(self):
        values = self.VALUES._replace(params={**self.VALUES.params, "big": "x" * 2**20, "many": [0] * 2**20,
                                              "huge": 10**1200, "t": True, "no": "false", "empty": []})
        for text, what in {
                "params.n": "3 is neither true nor false", "params.no": '"false" is neither true nor false',
                "not params.empty": "[] is neither", "params.t and params.n": "3 is neither", "null": "null is neither",
                "params.n < 'x'": "a number and a string", "params.n + 'x' == 1": "a number and a string",
                "params.s * 999999999 == ''": "a string and a number", "params.s % 3 == ''": "a string and a number",
                "'%999999999d' % params.n == ''": "a string and a number",
                "[0] * 999999999 == []": "an array and a number",
                "true + true == 2": "a boolean and a boolean", "-'x' == 1": "a number and a string",
                "params.o < params.o": "an object",
                "1 / 0 == 1": "division by zero", "1 % 0 == 1": "by zero", "params.n in 3": "a number can't hold it",
                "1 in 'abc'": "a string can't hold it", "params.gone == 1": 'there is no "gone"',
                "tasks.t.outputs.gone == 1": 'there is no "gone"', "ctx.gone == 1": 'there is no "gone"',
                "params.o.k[7] == 1": "there is no 7", "params.o.k['z'] == 1": 'there is no "z"',
                "params.o[params.n] == 1": "there is no 3", "params.o.k[params.t] == 1": "there is no true",
                "params.s[0] == 'x'": "there is no 0", "params.n.real == 3": 'there is no "real"',
                "params.s.upper == 1": 'there is no "upper"',
                "params.o.__class__ == 1": 'there is no "__class__"',
                "().__class__ == 1": 'there is no "__class__" in []',
                "params.big + params.big == ''": "too long", "params.many + params.many == []": "too long",
                "params.huge * params.huge == 1": "a number is too large", "params.huge / 1.5 > 1": "too large",
                "1e308 * 10 > 1": "a number is too large",
                "{params.n: 1} == 1": "keys of an object have to be strings"}.items():
            with self.subTest(text), self.assertRaises((LookupError, ValueError)) as caught:
                mf.holds(text, values)
            self.assertIn(what, str(caught.exception))
            self.assertLess(len(str(caught.exception)), 400)

    def test_an_expression_costs_no_more_than_its_length_and_the_values_that_it_looks_at(self):
        text = "true"
        for _ in range(40):
            text = f"true == ({text}) == true"
        self.assertIs(mf.holds(text, self.VALUES), True)
        self.assertLess(len(list(mf.parse_expression("1 < params.n < params.n < 9").refs())), 3)
        self.assertIs(mf.holds("1 < 2 < 1 < params.gone", self.VALUES), False, "not looked at any further")
        large = self.VALUES._replace(ctx={"b": "x" * 2**20})
        with self.assertRaises(ValueError) as caught:
            mf.holds(f"[{','.join(['ctx.b'] * 400)}] < 1", large)
        self.assertLess(len(str(caught.exception)), 200)
        with self.assertRaises(ValueError) as caught:
            mf.parse_expression("true # x\n and false")
        self.assertIn("several lines", str(caught.exception))
        flow = make(task("a", matrix={"n": list(range(400)), "c": ["${{ params.c }}"]}), params={"c": ""})
        with self.assertRaises(ValueError) as caught:
            mf.instances(flow.tasks[0], self.VALUES._replace(params={"c": "x" * 2**20}))
        self.assertIn("take more than", str(caught.exception))

    def test_random_expressions_are_refused_or_answered_soon_and_nothing_else(self):
        chance, words = random.Random(4), [
            "params.n", "params.s", "params.o", "ctx.rows", "tasks.t.outputs", "run.id", "true", "null", "1",
            "2.5", "'x'",
            "[", "]", "(", ")", "{", "}", ":", ",", ".", "==", "<", "in", "not", "and", "or", "+", "-", "*",
            "/", "//", "%",
            "**", "if", "else", "lambda", "__class__", "\n", "#", "\\", "é", "$", "for x in"]
        answers = collections.Counter()
        for _ in range(20000):
            text = " ".join(chance.choices(words, k=chance.randint(1, 9)))
            try:
                answers[mf.holds(text, self.VALUES)] += 1
            except (LookupError, ValueError):
                answers["refused"] += 1
        self.assertGreater(min(answers[True], answers[False]), 5, answers)


def times_of(line, zone=None, after="2026-11-21T00:00:00Z", count=5):
    """Return the next scheduled times of a cron line as text, without seconds."""
    found = mf.upcoming([mf.Schedule(cron=line, timezone=zone)], mf.parse_at(after, None))
    return [mf.scheduled_text(at)[:16] for at in itertools.islice(found, count)]


def has_zones():
    """Tell whether this system knows time zones."""
    with contextlib.suppress(ValueError):
        return bool(mf.find_zone("Europe/Berlin"))


needs_zones = unittest.skipUnless(has_zones() or os.environ.get("MINIFLOW_TEST_ALL") == "1",
                                  "this system has no time zone data")


def walls(zone, start, minutes):
    """Return each minute with what a clock on the wall shows, if for the second time, and what it has skipped."""
    rows, one = [], datetime.timedelta(minutes=1)
    before = datetime.datetime.fromtimestamp(start - 60, zone).replace(tzinfo=None, fold=0)
    for moment in range(start, start + 60 * minutes, 60):
        wall = datetime.datetime.fromtimestamp(moment, zone)
        twice, wall = wall.fold, wall.replace(tzinfo=None, fold=0)
        skipped = [before + n * one for n in range(1, (wall - before) // one)]
        rows.append((moment, wall, twice, skipped))
        before = wall
    return rows


class PlainCron:
    """A second reading of cron lines, for going through time minute by minute."""

    def __init__(self, line):
        self.texts = line.split()
        bounds = [(0, 59), (0, 23), (1, 31), (1, 12), (0, 6)]
        self.fields = [{n for n in range(low, high + 1) if self.fits(text, n, low)}
                       for text, (low, high) in zip(self.texts, bounds)]

    @staticmethod
    def fits(text, value, low):
        for part in text.split(","):
            span, _, step = part.partition("/")
            first, _, last = span.partition("-")
            start, end = (low, 60) if span == "*" else (int(first), int(last or (60 if step else first)))
            if start <= value <= end and (value - start) % int(step or 1) == 0:
                return True
        return False

    def shows(self, wall):
        minute, hour, day, month, weekday = self.fields
        if wall.minute not in minute or wall.hour not in hour or wall.month not in month:
            return False
        both = [wall.day in day, wall.isoweekday() % 7 in weekday]
        return all(both) if self.texts[2][0] == "*" or self.texts[4][0] == "*" else any(both)

    def times(self, rows):
        once, named = not re.search(r"[*/]", self.texts[0] + self.texts[1]), len(self.fields[1]) < 24
        return [time for time, wall, twice, skipped in rows if self.shows(wall) and not (twice and once)
                or named and any(map(self.shows, skipped))]


class T05Cron(unittest.TestCase):
    #: Time zones, and dates in UTC of which clocks change within three days.
    CHANGES = (("Europe/Berlin", "2026-03-28"), ("Europe/Berlin", "2026-10-24"), ("America/New_York", "2026-03-07"),
               ("America/New_York", "2026-10-31"), ("Australia/Lord_Howe", "2026-04-03"),
               ("Australia/Lord_Howe", "2026-10-02"), ("Africa/Casablanca", "2026-02-14"),
               ("Africa/Casablanca", "2026-03-21"), ("America/Havana", "2026-10-31"), ("UTC", "2028-02-28"),
               ("Pacific/Apia", "2011-12-29"), ("America/Goose_Bay", "2010-11-06"), ("Asia/Kolkata", "2026-12-30"))

    @staticmethod
    def random_line(chance):
        def field(low, high, star):
            if chance.random() < star:
                return chance.choice(["*", "*", f"*/{chance.randint(1, high)}"])
            first, last = sorted(chance.randint(low, high) for _ in range(2))
            step = chance.randint(1, min(9, high))
            return ",".join(chance.choice([str(first), f"{first}-{last}", f"{first}-{last}/{step}", f"{last}/{step}"])
                            for _ in range(chance.randint(1, 2)))
        return " ".join([field(0, 59, 0.4), field(0, 23, 0.4), field(1, 31, 0.7), field(1, 12, 0.9),
                         field(0, 6, 0.7)])

    @needs_zones
    def test_it_agrees_with_going_through_time_minute_by_minute(self):
        chance, asked = random.Random(9), 0
        for zone, date in self.CHANGES:
            start, zone = mf.parse_at(f"{date}T00:00:00Z", None), mf.find_zone(zone)
            rows = walls(zone, start, 3 * 1440)
            lines = ["* * * * *", "*/7 2 * * *", "30 2 * * *", "30 */2 * * *", "15,45 0-3 * * *", "0 0 * * *",
                     "30 23 * * *", "5-59/10 * * * *"]
            for line in lines + [self.random_line(chance) for _ in range(10)]:
                times = PlainCron(line).times(rows)
                if not times:
                    continue
                at = start - 1
                for expected in times[:30]:
                    at = mf.next_cron(mf.parse_cron(line), zone, at)
                    self.assertEqual(mf.scheduled_text(at), mf.scheduled_text(expected), (line, zone))
                for at in (chance.randint(start, times[-1] - 1) for _ in range(20)):
                    expected = times[bisect.bisect(times, at)]
                    self.assertEqual(mf.next_cron(mf.parse_cron(line), zone, at), expected, (line, zone, at))
                    asked += 1
        self.assertGreater(asked, 2000)

    def test_lines_mean_what_crontab_says(self):
        for line, first, second in (
                ("0 6 * * 1-5", "2026-11-23T06:00", "2026-11-24T06:00"),
                ("0 0 * * 5-7", "2026-11-22T00:00", "2026-11-27T00:00"),
                ("0 0 * * fri-sun", "2026-11-22T00:00", "2026-11-27T00:00"),
                ("0 0 * * FRI-SUN", "2026-11-22T00:00", "2026-11-27T00:00"),
                ("0 0 * * sun-mon", "2026-11-22T00:00", "2026-11-23T00:00"),
                ("0 0 * * 0", "2026-11-22T00:00", "2026-11-29T00:00"),
                ("0 0 * * 7", "2026-11-22T00:00", "2026-11-29T00:00"),
                ("0 0 * * */2", "2026-11-22T00:00", "2026-11-24T00:00"),         # Sunday, Tuesday, …
                ("0 0 13 * 5", "2026-11-27T00:00", "2026-12-04T00:00"),          # Fridays, and every 13th
                ("0 0 */13 * 2", "2026-12-01T00:00", "2027-04-27T00:00"),        # a star: 1, 14, 27 on Tuesdays
                ("0 0 29 2 *", "2028-02-29T00:00", "2032-02-29T00:00"),
                ("0 0 29 2 */7", "2032-02-29T00:00", "2060-02-29T00:00"),
                ("0 0 30 2 1", "2027-02-01T00:00", "2027-02-08T00:00"),
                ("0 0 31 * *", "2026-12-31T00:00", "2027-01-31T00:00"),
                ("20/15 * * * *", "2026-11-21T00:20", "2026-11-21T00:35"),
                ("5,1-3/2 0 1 JAN *", "2027-01-01T00:01", "2027-01-01T00:03"),
                ("  0\t0  1 * * ", "2026-12-01T00:00", "2027-01-01T00:00"),
                ("@hourly", "2026-11-21T01:00", "2026-11-21T02:00"),
                ("@daily", "2026-11-22T00:00", "2026-11-23T00:00"),
                ("@Midnight", "2026-11-22T00:00", "2026-11-23T00:00"),
                ("@weekly", "2026-11-22T00:00", "2026-11-29T00:00"),
                ("@monthly", "2026-12-01T00:00", "2027-01-01T00:00"),
                ("@yearly", "2027-01-01T00:00", "2028-01-01T00:00"),
                ("@annually", "2027-01-01T00:00", "2028-01-01T00:00")):
            with self.subTest(line):
                self.assertEqual(times_of(line, count=2), [first, second])

    @needs_zones
    def test_an_hour_that_is_skipped_runs_once_and_one_that_is_repeated_as_often_as_it_says(self):
        for line, after, expected in (
                ("30 2 * * *", "2026-03-28T12:00Z", ["29T01:00", "30T00:30"]),
                ("*/20 2 * * *", "2026-03-28T12:00Z", ["29T01:00", "30T00:00"]),
                ("0 2,3 * * *", "2026-03-28T12:00Z", ["29T01:00", "30T00:00"]),
                ("30 * * * *", "2026-03-29T00:00Z", ["29T00:30", "29T01:30"]),
                ("30 2 * * *", "2026-10-24T12:00Z", ["25T00:30", "26T01:30"]),
                ("30 */2 * * *", "2026-10-25T00:00Z", ["25T00:30", "25T01:30"]),
                ("30 * * * *", "2026-10-25T00:00Z", ["25T00:30", "25T01:30"]),
                ("*/30 2 * * *", "2026-10-25T00:00Z", ["25T00:30", "25T01:00"])):
            with self.subTest(line, after=after):
                self.assertEqual([text[8:] for text in times_of(line, "Europe/Berlin", after, 2)], expected)

    def test_a_line_that_is_wrong_says_what_where_and_what_is_right(self):
        for line, *expected in (
                ("60 * * * *", '"60" at column 1 is no minute; give 0 to 59'),
                ("0 24,25 * 13 8", '"24" at column 3 is no hour; give 0 to 23',
                 '"13" at column 11 is no month; give 1 to 12, or jan to dec',
                 '"8" at column 14 is no day of week; give 0 to 7, or sun to sat'),
                ("0 0 0 * *", '"0" at column 5 is no day of month; give 1 to 31'),
                ("0 0 1,,2 * *", "nothing stands beside a comma at column 7, in the field for day of month; "
                 "give 1 to 31"),
                ("*/0 * * * *", '"0" at column 3 is no step; give a number from 1'),
                ("*/x * * * *", '"x" at column 3 is no step; give a number from 1'),
                ("0 */90 * * *", "a step of 90 at column 5 is more than any hour and would leave 0 alone; write 0, "
                 "or give every_s instead of cron"),
                ("5-1 * * * *", '"5-1" at column 1 runs backwards; give two ranges: 5-59,0-1'),
                ("0 0 * * 5-0", '"5-0" at column 9 runs backwards; as the end of a week, Sunday is 7: 5-7'),
                ("0 0 * * sat-mon", '"sat-mon" at column 9 runs backwards; give two ranges: sat-6,0-mon'),
                ("-5 * * * *", '"" at column 1 is no minute; give 0 to 59'),
                ("٣ * * * *", '"\\u0663" at column 1 is no minute; give 0 to 59'),
                ("0 0 L * *", '"L" at column 5 is no day of month; give 1 to 31'),
                ("0 0 ? * 1", '"?" at column 5 is no day of month; give 1 to 31'),
                ("0 0 30 2 *", '"0 0 30 2 *" names a date that never comes: day 30 of month 2; give another day or '
                 "month"),
                ("0 0 31 4,jun */2", '"0 0 31 4,jun */2" names a date that never comes: day 31 of month 4,jun; give '
                 "another day or month"),
                ("* * * *", '"* * * *" has 4 fields; give five: minute, hour, day of month, month, day of week'),
                ("", '"" has 0 fields; give five: minute, hour, day of month, month, day of week'),
                ("@reboot", '"@reboot" names no time; start the flow where the system starts its services'),
                ("@every 5m", '"@every 5m" is no cron line; give every_s, in seconds, instead of cron'),
                ("@dayly", '"@dayly" is no cron line, did you mean @daily?'),
                ("0," * 600, f'"{"0," * 29}… has 1200 characters, more than 1000; give ranges and steps')):
            with self.subTest(line):
                with self.assertRaises(ValueError) as caught:
                    mf.parse_cron(line)
                self.assertEqual(str(caught.exception).split("\n"), expected)

    def test_no_line_takes_long(self):
        lines = ["*/0 * * * *", "0 0 30 2 *", "0 0 31 4 *", "0 0 29 2 1", "0 0 29 2 */7", "1-99999999 * * * *",
                 "*" * 5000, "5-1 * * * *", "60 * * * *", "@every 0s", "٣ * * * *", "59 23 31 12 *", "* * * * *",
                 "1/59 1/23 29 2 */7", ",".join(["*"] * 200) + " * * * *", "0-59 0-23 1-31 1-12 0-6"]
        slow = []
        for line, zone, date in itertools.product(lines, ["Europe/Berlin"] if has_zones() else [None],
                                                  ["2026-03-28T23:00Z", "2026-07-01T00:00Z"]):
            times = []
            for _ in range(3):                  # the machine may have had something else to do
                began = time.perf_counter()
                with contextlib.suppress(ValueError):
                    times_of(line, zone, date, 1)
                times.append(time.perf_counter() - began)
            slow += [(line, date, min(times))] if min(times) > 0.05 else []
        self.assertEqual(slow, [])

    @needs_zones
    def test_one_time_may_be_written_in_several_ways(self):
        for text, zone, expected in (
                ("2026-11-21T06:00", None, "2026-11-21T06:00:00Z"),
                ("2026-11-21 06:00:30Z", None, "2026-11-21T06:00:30Z"),
                ("2026-11-21t06:00z", "Asia/Kolkata", "2026-11-21T06:00:00Z"),
                ("2026-11-21T06:00:00+0530", None, "2026-11-21T00:30:00Z"),
                ("2026-11-21T06:00-01:00", None, "2026-11-21T07:00:00Z"),
                ("2026-11-21T06:00", "Europe/Berlin", "2026-11-21T05:00:00Z"),
                ("2026-03-29T02:30", "Europe/Berlin", "2026-03-29T01:00:00Z"),       # it is skipped
                ("2026-10-25T02:30", "Europe/Berlin", "2026-10-25T00:30:00Z")):      # it comes twice
            with self.subTest(text, zone=zone):
                self.assertEqual(mf.scheduled_text(mf.parse_at(text, mf.find_zone(zone))), expected)
        for text in ("", "06:00", "2026-11-21", "2026-02-30T06:00", "2026-11-21T25:00", "2026-11-21T06:00+99:00",
                     "2026-11-21T06:00:00.5Z", "1969-12-31T23:59Z", "9999-01-01T00:00", "٢026-11-21T06:00", "now"):
            with self.subTest(text):
                self.assertRaisesRegex(ValueError, "is no time; give one like 2027-01-31T06:00:00",
                                       mf.parse_at, text, mf.find_zone(None))

    def test_seconds_apart_are_the_same_for_everybody(self):
        for every_s, expected in ((3600, ["21T01:00:00Z", "21T02:00:00Z"]), (90, ["21T00:01:30Z", "21T00:03:00Z"]),
                                  (86400, ["22T00:00:00Z", "23T00:00:00Z"]),
                                  (7 * 86400, ["23T00:00:00Z", "30T00:00:00Z"])):              # Mondays
            found = mf.upcoming([mf.Schedule(every_s=every_s)], mf.parse_at("2026-11-21T00:00:00Z", None))
            self.assertEqual([mf.scheduled_text(at)[8:] for at in itertools.islice(found, 2)], expected)

    def test_times_of_several_schedules_come_in_order_and_once(self):
        found = mf.upcoming([mf.Schedule(cron="0 * * * *"), mf.Schedule(every_s=1800),
                             mf.Schedule(at="2026-11-21T00:10:00Z")], mf.parse_at("2026-11-21T00:00:00Z", None))
        self.assertEqual([mf.scheduled_text(at)[11:16] for at in itertools.islice(found, 5)],
                         ["00:10", "00:30", "01:00", "01:30", "02:00"])
        self.assertEqual([*mf.upcoming([mf.Schedule(at="2026-11-21T00:10:00Z")], 2**32)], [])

    def test_an_unknown_zone_is_named_and_where_there_are_none_that_is_said(self):
        code = (f"import sys; sys.path.insert(0, {HERE!r}); import miniflow\n"
                "try: miniflow.find_zone(sys.argv[1])\nexcept ValueError as exc: print(exc)")

        def said(zone, **env):
            return subprocess.run([sys.executable, "-S", "-c", code, zone], env={**os.environ, **env},
                                  stdout=subprocess.PIPE, check=True).stdout.decode().strip()

        self.assertEqual(said("Europe/Berlin", PYTHONTZPATH=""),
                         '"Europe/Berlin" is not known, as this system has no time zones (looked for in no '
                         "directory); install tzdata, or give UTC")
        self.assertEqual(said("UTC", PYTHONTZPATH=""), "")
        if has_zones():
            self.assertEqual(said("Europe/berlin"), 'no time zone "Europe/berlin", did you mean Europe/Berlin?')
            for zone in ("Nowhere", "../../etc/passwd", "/etc/passwd", "a\nb", "x" * 400, "Europe"):
                with self.assertRaises(ValueError) as caught:
                    mf.find_zone(zone)
                self.assertRegex(str(caught.exception),
                                 '^no time zone ".*(give one like Europe/Berlin, or UTC|did you mean)')


class T06Checking(unittest.TestCase):
    """Every message is read: a flow that is wrong in one way gives just that line."""

    BAD = [
        (flow_json(task("a"), task("a")), 'tasks[1].id: a is the id of tasks[0] already; rename one'),
        (flow_json(task("load"), task("b", "laod")),
         'tasks[1].depends_on[0]: no task "laod" in this flow, did you mean load?'),
        (flow_json(task("a"), task("b", "a", "a")),
         'tasks[1].depends_on[1]: a is listed twice; once is enough'),
        (flow_json(task("a", "c"), task("b", "a"), task("c", "b")),
         'tasks[0].depends_on: a cycle: a -> b -> c -> a; remove one of these dependencies'),
        (flow_json(task("a", "a")), 'tasks[0].depends_on: a cycle: a -> a; remove one of these dependencies'),
        (flow_json(task("a", pool="werehouse"), pools={"warehouse": 1}),
         'tasks[0].pool: the flow has no pool "werehouse", did you mean warehouse?'),
        (flow_json(task("a", pool="db")), 'tasks[0].pool: the flow has no pool "db"; it has none'),
        (flow_json(task("a", **{"if": "params.x = 1"})),
         'tasks[0].if: "params.x = 1" is no expression: invalid syntax'),
        (flow_json(task("a", **{"if": "parms.x == 1"})),
         'tasks[0].if: unknown name "parms", did you mean params?'),
        (flow_json(task("a", **{"if": "params.mode == 'x'"}), params={"mood": "y"}),
         'tasks[0].if: params.mode: the flow has no param "mode", did you mean mood?'),
        (flow_json(task("a"), task("b", **{"if": "tasks.a.status == 'success'"})),
         'tasks[1].if: tasks.a.status: a is not upstream of b; add "a" to its depends_on'),
        (flow_json(task("a"), on_failure={"id": "a", "command": "true"}),
         'on_failure.id: a is the id of tasks[0] already; rename one'),
        (flow_json(task("a"), **{"finally": {}}),
        'finally: the task does nothing; give one of script, command, http, wait_for, flow'),
        (flow_json(task("a"), **{"finally": {"command": "true", "depends_on": ["a"]}}),
         'finally.depends_on: unknown field; remove it (miniflow schema lists the fields)'),
        (flow_json(task("a"), on_success={"command": "true", "args": ["${{ tasks.b.status }}"]}),
         'on_success.args[0]: tasks.b.status: no task "b" in this flow'),
        (flow_json(task("a"), on_success=[1]), 'on_success: expected a task: an object, got [1]'),
        (flow_json(task("a", http={"url": "ftp://x/"})),
         'tasks[0].http.url: "ftp://x/" is no address; write http:// or https:// and a host'),
        (flow_json(task("a", http={"method": "GET"})), 'tasks[0].http: url is missing; give a non-empty string'),
        (flow_json(task("a", http={"url": "http://x", "json": 1, "body": "x"})),
         'tasks[0].http.body: beside json; give only one of them'),
        (flow_json(task("a", http={"url": "http://x", "headers": {"a b": "c"}})),
         'tasks[0].http.headers["a b"]: not a name of a header field'),
        (flow_json(task("a", http={"url": "http://x"}, args=[1])),
         'tasks[0].args: goes with script and command only; remove it'),
        (flow_json(task("a", wait_for={"poll_s": 3})),
         'tasks[0].wait_for: give one of file, url, command and seconds, not none of them'),
        (flow_json(task("a", wait_for={"file": "x", "seconds": 3})),
         'tasks[0].wait_for: give one of file, url, command and seconds, not file and seconds'),
        (flow_json(task("a", retry_on=[503])), 'tasks[0].retry_on[0]: expected an exit code from 1 to 255, got 503'),
        (flow_json(task("a"), timeout_s=0), 'timeout_s: expected a number from 0.001 to 315360000, got 0'),
        (flow_json(task("a", **{"if": True})), 'tasks[0].if: expected a string, got true'),
        (flow_json(task("a", foreach=[1], matrix={"x": [1]})),
         'tasks[0].matrix: beside foreach; give only one of them'),
        (flow_json(task("a", max_parallel=2)), 'tasks[0].max_parallel: goes with foreach or matrix only; remove it'),
        (flow_json(task("a", foreach="1, 2")), 'tasks[0].foreach: "1, 2" is not one template that gives an array; '
         'write ${{ … }} and nothing else, or an array'),
        (flow_json(task("a", foreach={"x": 1})), 'tasks[0].foreach: expected an array of at most 100,000 values, or a '
         'template that gives one, got {"x": 1}'),
        (flow_json(task("a", matrix={})), 'tasks[0].matrix: expected a non-empty object of arrays, got {}'),
        (flow_json(task("a", matrix={"x": 3})),
        'tasks[0].matrix.x: expected an array, or a template that gives one, got 3'),
        (flow_json(task("a", matrix={"x": list(range(400)), "y": list(range(400))})),
         'tasks[0].matrix: 160,000 combinations; at most 100,000'),
        (flow_json(task("a", matrix={"x": [1]}, args=["${{ matrix.y }}"])),
         'tasks[0].args[0]: matrix.y: the matrix has no "y"; it has x'),
        (flow_json(task("a", foreach=[1], args=["${{ matrix.y }}"])),
         "tasks[0].args[0]: matrix.y can't be used here; only params, ctx, run, env, tasks, item can"),
        (flow_json(task("a", args=["${{ item }}"])),
         "tasks[0].args[0]: item can't be used here; only params, ctx, run, env, tasks can"),
        (flow_json(task("a", foreach=["${{ item }}"])),
         "tasks[0].foreach[0]: item can't be used here; only params, ctx, run, env, tasks can"),
        (flow_json(task("a"), defaults={"foreach": [1]}),
         'defaults.foreach: unknown field; remove it (miniflow schema lists the fields)'),
        (flow_json(task("a"), pools={"db": 0}), 'pools.db: expected an integer of at least 1, got 0'),
        (flow_json(task("a", env={"1X": "y"})),
         'tasks[0].env.1X: not a name of a variable; use letters, digits and _'),
        (flow_json(task("a", env={"MINIFLOW_TASK": "y"})),
         'tasks[0].env.MINIFLOW_TASK: MiniFlow sets this variable itself; use another name'),
        (flow_json(task("a"), env={"MINIFLOW_PARAM_X": "y"}),
         'env.MINIFLOW_PARAM_X: MiniFlow sets this variable itself; use another name'),
        (flow_json(task("a", command="echo ${{ params.x }}")),
         'tasks[0].command: a template in a shell string would run its value as code; use '
         '$MINIFLOW_PARAM_NAME, an env entry, args ($1, $2, …) or an array command'),
        (flow_json(task("a", args={"--x": 1})),
         'tasks[0].args.--x: not a name of an option; write it without leading dashes and ='),
        (flow_json(task("a", retry_on=["ValueError"])),
         'tasks[0].retry_on[0]: expected an exit code from 1 to 255, "timeout", or with http a status, '
         'got "ValueError"'),
        (flow_json(task("a", args=["${{ params.dat }}"]), params={"date": ""}),
         'tasks[0].args[0]: params.dat: the flow has no param "dat", did you mean date?'),
        (flow_json(task("a"), env={"X": "${{ ctx.rows }}"}),
         "env.X: ctx.rows can't be used here; only params, run, env can"),
        (flow_json(task("a", args=["${{ oops }}"])),
         'tasks[0].args[0]: unknown name "oops" in ${{ oops }}; use one of params, ctx, run, env, tasks, item, matrix'),
        (flow_json(task("a"), task("b", args={"x": ["${{ tasks.a.status }}"]})),
         'tasks[1].args.x[0]: tasks.a.status: a is not upstream of b; add "a" to its depends_on'),
        (flow_json(task("a", args=["${{ tasks.a.status }}"])),
         'tasks[0].args[0]: tasks.a.status: a is not upstream of a; add "a" to its depends_on'),
        (flow_json(task("a"), task("b", "a", stdin="${{ tasks.q.outputs.x }}")),
         'tasks[1].stdin: tasks.q.outputs.x: no task "q" in this flow'),
        (flow_json(task("a"), params={"d": {"type": "string", "pattern": "("}}),
         'params.d.pattern: "(" is no regular expression: missing ), unterminated subpattern at position 0'),
        (flow_json(task("a"), params={"d": {"type": "integer", "pattern": "x"}}),
         'params.d.pattern: only a param of type string can have a pattern'),
        (flow_json(task("a"), params={"d": {"type": "integer", "min": 3, "max": 2}}),
         'params.d.min: 3 is more than max, 2'),
        (flow_json(task("a"), params={"d": {"type": "integer", "default": "x"}}),
         'params.d: the default does not fit: expected an integer, got "x"'),
        (flow_json(task("a"), params={"a-b": 1, "A_B": 2}),
         'params.A_B: a-b is MINIFLOW_PARAM_A_B as well; rename one'),
    ]

    def test_every_message_names_place_value_and_way_out(self):
        for flow, expected in self.BAD:
            with self.subTest(expected=expected):
                self.assertEqual(errors_of(flow), [expected])

    def test_all_problems_of_all_kinds_are_reported_in_the_order_of_the_file(self):
        text = """{
 "name": "f",
 "fial_fast": true,
 "params": {"n": {"type": "integer", "default": "x"}},
 "tasks": [
  {"id": "a", "command": "true", "depends_on": ["b"], "max_retries": -1},
  {"id": "b", "command": "true", "depends_on": ["a"], "depend_on": []},
  {"id": "c", "script": "gone.py", "args": ["${{ params.m }}"]},
  {"id": "c", "command": "echo ${{ params.n }}", "python": "python3"},
  {"id": "d"},
  {"command": "true"},
  7
 ]
}"""
        with self.assertRaises(mf.FlowError) as caught:
            mf.parse_flow(text, "flows/f.json", lambda path: f"there is no {path}")
        self.assertEqual(list(caught.exception.problems), [
            "flows/f.json:3:2: fial_fast: unknown field, did you mean fail_fast?",
            'flows/f.json:4:13: params.n: the default does not fit: expected an integer, got "x"',
            "flows/f.json:6:34: tasks[0].depends_on: a cycle: a -> b -> a; remove one of these dependencies",
            "flows/f.json:6:55: tasks[0].max_retries: expected an integer from 0 to 1000000, got -1",
            "flows/f.json:7:55: tasks[1].depend_on: unknown field, did you mean depends_on?",
            "flows/f.json:8:15: tasks[2].script: there is no gone.py",
            'flows/f.json:8:45: tasks[2].args[0]: params.m: the flow has no param "m"; it has n',
            "flows/f.json:9:4: tasks[3].id: c is the id of tasks[2] already; rename one",
            "flows/f.json:9:15: tasks[3].command: a template in a shell string would run its value as code; "
            "use $MINIFLOW_PARAM_NAME, an env entry, args ($1, $2, …) or an array command",
            "flows/f.json:9:50: tasks[3].python: goes with script only; remove it",
            "flows/f.json:10:3: tasks[4]: the task does nothing; give one of script, command, http, wait_for, flow",
            "flows/f.json:11:3: tasks[5]: id is missing; give a name of letters, digits, _, . and -, not "
            "starting with . or -, of at most 128 characters",
            "flows/f.json:12:3: tasks[6]: expected a task: an object, got 7"])

    def test_flaws_of_the_text_hide_no_error_of_the_flow(self):
        text = '{"name": "a", "name": "x", "tsks": 1, "tasks": [{"id": "a", "command": "true", "timeout_s": true}]}'
        self.assertEqual(errors_of(text), [
            "name: given twice in one object; keep one", "tsks: unknown field, did you mean tasks?",
            "tasks[0].timeout_s: expected a number from 0.001 to 315360000, got true"])

    def test_a_long_cycle_is_printed_in_part(self):
        tasks = [task(f"t{n}", f"t{(n + 1) % 5000}") for n in range(5000)]
        (problem,) = errors_of(flow_json(*tasks))
        self.assertIn(" -> (4986 more) -> ", problem)

    def test_a_variable_that_miniflow_sets_cant_be_read_as_one_from_outside(self):
        (problem,) = errors_of(flow_json(task("a", args=["${{ env.MINIFLOW_TASK }}"])))
        self.assertIn("MiniFlow sets this variable for the task itself; use params or run", problem)

    def test_the_upstream_of_templates_is_checked_for_more_tasks_than_one_go_takes(self):
        tasks = [task(f"t{n}", *([f"t{n - 1}"] if n else [])) for n in range(4200)]
        reads = "".join(f"${{{{ tasks.t{n}.status }}}}" for n in range(4200))
        self.assertEqual(errors_of(flow_json(*tasks, task("z", "t4199", stdin=reads))), [])
        (problem,) = errors_of(flow_json(*tasks, task("z", "t4198", stdin=reads)))
        self.assertIn("tasks.t4199.status: t4199 is not upstream of z", problem)

    def test_each_of_several_cycles_is_printed(self):
        problems = errors_of(flow_json(task("a", "b"), task("b", "a"), task("c", "d"), task("d", "c"),
                                       task("e", "a", "c")))
        self.assertEqual(len(problems), 2)
        self.assertIn("a -> b -> a", problems[0])
        self.assertIn("c -> d -> c", problems[1])

    def test_a_template_may_read_any_ancestor(self):
        make(task("a"), task("b", "a"), task("c", "b", args=["${{ tasks.a.outputs.x }}"]))

    def test_the_topological_order_breaks_ties_by_declaration(self):
        self.assertEqual(mf.topological_order({"z": ["a"], "y": [], "a": [], "x": ["y"]}),
                         ["y", "a", "z", "x"])
        for seed in range(200):
            chance = random.Random(seed)
            names = [f"n{k}" for k in range(chance.randint(1, 12))]
            upstream = {name: [other for other in names[:n] if chance.random() < 0.3]
                        for n, name in enumerate(names)}
            self.assertEqual(mf.topological_order(upstream), names)

    def test_what_an_inherited_field_does_wrong_is_shown_where_it_stands(self):
        text = json.dumps(flow_json(task("a"), task("b"), defaults={"env": {"X": "${{ oops }}"}}), indent=1)
        with self.assertRaises(mf.FlowError) as caught:
            mf.parse_flow(text, "f.json")
        self.assertEqual([line.split(": ")[1] for line in caught.exception.problems], ["defaults.env.X"])


class T07JsonFrontEnd(unittest.TestCase):

    BAD = [
        ([], "expected an object with name and tasks, got []"),
        ({"tasks": [task("a")]}, "name is missing; give a name of letters, digits, _, . and -, not starting "
         "with . or -, of at most 128 characters"),
        ({"name": "f"}, "tasks is missing; give a non-empty array of tasks"),
        ({"name": "f", "tasks": []}, "tasks: expected a non-empty array of tasks, got []"),
        ({"name": "f", "tasks": {}}, "tasks: expected a non-empty array of tasks, got {}"),
        (flow_json(task("a", max_retries="5")),
         'tasks[0].max_retries: expected an integer from 0 to 1000000, got "5"'),
        (flow_json(task("a", max_retries=True)),
         "tasks[0].max_retries: expected an integer from 0 to 1000000, got true"),
        (flow_json(task("a", max_retries=1.5)),
         "tasks[0].max_retries: expected an integer from 0 to 1000000, got 1.5"),
        (flow_json(task("a", timeout_s=0)),
         "tasks[0].timeout_s: expected a number from 0.001 to 315360000, got 0"),
        (flow_json(task("a", timeout_s=None)),
         "tasks[0].timeout_s: expected a number from 0.001 to 315360000, got null"),
        (flow_json(task("a", jitter=1.1)), "tasks[0].jitter: expected a number from 0 to 1, got 1.1"),
        (flow_json(task("a", trigger_rule="all")), "tasks[0].trigger_rule: expected one of " + ", ".join(
            json.dumps(rule) for rule in mf.TRIGGER_RULES) + ', got "all"'),
        (flow_json(task("a", command=[])),
         "tasks[0].command: expected a shell string, or a non-empty array of strings, got []"),
        (flow_json(task("a", command=["echo", 1])), "tasks[0].command[1]: expected a string, got 1"),
        (flow_json(task("a", args=[None])),
         "tasks[0].args[0]: expected a string, a number or a boolean, got null"),
        (flow_json(task("a", args={"x": {}})),
         "tasks[0].args.x: expected a string, a number, a boolean, null or an array of these, got {}"),
        (flow_json(task("a", env={"X": None})),
         "tasks[0].env.X: expected a string, a number or a boolean, got null"),
        (flow_json(task("a", retry_on=[0])),
         'tasks[0].retry_on[0]: expected an exit code from 1 to 255, "timeout", or with http a status, got 0'),
        (flow_json(task("-a")), 'tasks[0].id: expected a name of letters, digits, _, . and -, not starting '
         'with . or -, of at most 128 characters, got "-a"'),
        (flow_json(task("a", script="x.py", command="true")),
         "tasks[0].command: a second action beside script; give only one of script, command, "
         "http, wait_for, flow"),
        (flow_json(task("a"), params={"x": {"default": 1, "defualt": 2}}),
         "params.x.defualt: unknown field, did you mean default?"),
        (flow_json(task("a"), params={"x": {"type": "date"}}), 'params.x.type: expected one of "string", '
         '"integer", "number", "boolean", "array", "object", got "date"'),
        (flow_json(task("a"), max_parallel=0), "max_parallel: expected an integer from 1 to 100000, got 0"),
        (flow_json(task("a"), defaults={"id": "x"}),
         "defaults.id: unknown field; remove it (miniflow schema lists the fields)"),
    ]

    def test_every_message_names_place_value_and_way_out(self):
        for flow, expected in self.BAD:
            with self.subTest(expected=expected):
                self.assertEqual(errors_of(flow), [expected])

    def test_defaults_of_the_wrong_type_are_an_error_like_any_other(self):
        for value in (5, "a", [1], True, None):
            with self.subTest(value=value):
                self.assertEqual(errors_of(flow_json(task("a"), defaults=value)),
                                 [f"defaults: expected an object, got {json.dumps(value)}"])

    def test_names_that_could_leave_their_directory_are_refused(self):
        for name in ("../x", "a/b", ".", "..", "", "a\n", "x" * 129, "ａ", "-rf", "a b", "a\x00b"):
            with self.subTest(name=name):
                self.assertTrue(errors_of(flow_json(task(name))))
                self.assertTrue(errors_of({**flow_json(task("a")), "name": name}))

    def test_fields_that_do_not_exist_yet_are_unknown(self):
        for field in ("executor",):
            self.assertEqual(errors_of(flow_json(task("a"), **{field: {}}))[0][:len(field) + 15],
                             f"{field}: unknown field")

    def test_a_task_gets_defaults_with_env_merged_and_the_rest_replaced(self):
        flow = make(task("a", env={"X": "own"}, timeout_s=9), task("b"), task("c", script="x.py"),
                    defaults={"env": {"X": "1", "Y": "2"}, "timeout_s": 5, "python": "pypy",
                              "max_retries": 1})
        a, b, c = flow.tasks
        self.assertEqual((a.env, a.timeout_s, b.env, b.timeout_s),
                         ({"X": "own", "Y": "2"}, 9, {"X": "1", "Y": "2"}, 5))
        self.assertEqual((c.action.python, a.retry.max_retries), ("pypy", 1))

    def test_a_flow_survives_the_way_to_json_and_back(self):
        for seed in range(100):
            flow, _ = random_flow(random.Random(seed), params={
                "x": 1, "y": {"type": "string", "required": True}, "z": {"default": None}}, env={"A": 1})
            again = mf.parse_flow(json.dumps(mf.flow_to_json(flow)), "f.json")
            self.assertEqual(flow, again)

    def test_the_published_schema_has_every_field_of_the_tables(self):
        schema = mf.flow_schema()
        self.assertEqual(set(schema["properties"]), {field.name for field in mf.FLOW_FIELDS})
        self.assertEqual(set(schema["properties"]["tasks"]["items"]["properties"]),
                         {f.name for f in mf.TASK_FIELDS})
        json.dumps(schema)

    def test_the_readme_explains_every_field(self):
        with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
            readme = file.read()
        for field in mf.FLOW_FIELDS + mf.TASK_FIELDS + mf.PARAM_FIELDS:
            self.assertIn(f"`{field.name}`", readme)


    def test_a_schedule_may_be_a_line_an_object_or_an_array_and_comes_back_as_short_as_it_can(self):
        line, item = "0 6 * * 1-5", {"every_s": 60, "overlap": "queue"}
        for given, expected in ((line, line), ({"cron": line}, line), ([line], line), (item, item),
                                ([item, line], [item, line]), ({"at": "2027-01-01T06:00", "timezone": "UTC"},) * 2):
            flow = make(task("a"), schedule=given)
            self.assertEqual(mf.flow_to_json(flow)["schedule"], expected)
            self.assertEqual(mf.recorded_flow(json.loads(json.dumps(mf.flow_to_json(flow)))), flow)
        self.assertNotIn("schedule", mf.flow_to_json(make(task("a"))))

    def test_all_that_is_wrong_with_schedules_is_said_at_once(self):
        flow = flow_json(task("a", args=["${{ params.n }}"]), params={"n": {"type": "integer"}}, schedule=[
            "0 25 * * *", {"cron": "* * 31 2 *", "params": {"n": "x", "m": 1}, "timezone": "Nowhere"},
            {"every_s": 0, "overlap": "maybe", "timezone": "UTC", "params": {"n": 1}}, 7,
            {"every_s": 10, "jitter_s": 60, "timezone": "UTC", "params": {"n": 1}},
            {"at": "soon", "cron": "@daily", "params": {"n": 1}}, {"params": {"n": 1}, "jiter_s": 1},
            {"at": "2027-01-01T00:00Z", "timezone": "UTC", "params": {"n": 1}},
            {"every_s": 10, "params": {"n": 2}}, {"every_s": 10, "params": {"n": 3}}])
        self.assertEqual(errors_of(flow), [
            'schedule[0]: "25" at column 3 is no hour; give 0 to 23',
            "schedule[0]: task a needs it and nobody gave it; give n in the schedule's params",
            'schedule[1].cron: "* * 31 2 *" names a date that never comes: day 31 of month 2; give another day '
            "or month",
            'schedule[1].params.n: expected an integer, got "x"',
            "schedule[1].params.m: flow f has no such param; it has n",
            'schedule[1].timezone: no time zone "Nowhere"; give one like Europe/Berlin, or UTC',
            "schedule[2].every_s: expected an integer from 1 to 315360000, got 0",
            'schedule[2].overlap: expected one of "skip", "queue", "allow", got "maybe"',
            "schedule[3]: expected a cron line or an object, got 7",
            "schedule[3]: task a needs it and nobody gave it; give n in the schedule's params",
            "schedule[4].jitter_s: 60 is more than every_s, 10",
            "schedule[4].timezone: goes with cron and at only; remove it",
            "schedule[5]: give one of cron, every_s, at, not cron and at",
            'schedule[5].at: "soon" is no time; give one like 2027-01-31T06:00:00, with Z or +01:00 behind it or a '
            "timezone beside it",
            "schedule[6]: give one of cron, every_s, at, not none of them",
            "schedule[6].jiter_s: unknown field, did you mean jitter_s?",
            "schedule[7].timezone: at says its zone itself; remove one of them",
            "schedule[9]: the same times as schedule[8], whose runs they are; remove it"])
        for bad in (7, "", [], None, [[]], ["@daily"] * 101, {}, [{"cron": ["x"]}]):
            self.assertEqual(len(errors_of(flow_json(task("a"), schedule=bad))), 1, bad)
        with self.assertRaises(mf.FlowError) as caught:
            mf.parse_flow('{"name": "f", "tasks": [{"id": "a", "command": "true"}],\n'
                          ' "schedule": {"cron": "61 * * * *"}}', "f.json")
        self.assertEqual(str(caught.exception),
                         'f.json:2:15: schedule.cron: "61" at column 1 is no minute; give 0 to 59')


class T08PythonFrontEnd(unittest.TestCase):

    def wrong(self, function, **options):
        """Return what is said of a task that makes no sense, without the function's name."""
        with self.assertRaises((mf.FlowError, TypeError)) as caught:
            mf.task(**options)(function)
        return re.sub(r"(?m)^task \S+: ", "", str(caught.exception))

    def test_a_task_is_made_with_and_without_parentheses_and_is_still_the_function(self):
        def add(ctx):
            """Adds up.

            At length.
            """
            return {"sum": ctx["a"] + 1}

        for made in (mf.task(add), mf.task()(add), mf.task(name="add")(add)):
            self.assertEqual((made.name, made.__doc__, made({"a": 1})), ("add", add.__doc__, {"sum": 2}))
            self.assertEqual(made.task, mf.Task("add", mf.Function(f"{__name__}:{add.__qualname__}", "thread"),
                                                description="Adds up."))

    def test_options_that_several_functions_share_leave_each_its_own_description(self):
        def documented(ctx):
            """Does this."""

        def bare(ctx):
            pass

        retrying = mf.task(max_retries=1)
        self.assertEqual([retrying(function).task.description for function in (documented, bare)], ["Does this.", ""])

    def test_every_option_of_a_task_reaches_the_model(self):
        options = {"name": "n", "max_retries": 2, "backoff_s": 1, "max_backoff_s": 5, "jitter": 0.5, "timeout_s": 3,
                   "grace_s": 1, "tags": ("x", "y"), "description": "d", "trigger_rule": "all_done",
                   "allow_failure": True, "pool": "p", "priority": 4, "retry_on": [OSError, "timeout"]}
        made = mf.task(**options)(len).task
        self.assertEqual(made, mf.Task(
            "n", mf.Function("builtins:len", "thread"), retry=mf.Retry(2, 1, 5, 0.5, ("OSError", "timeout")),
            timeout_s=3, grace_s=1, tags=("x", "y"), description="d", trigger_rule="all_done", allow_failure=True,
            pool="p", priority=4))
        self.assertEqual(mf.task(retry_on=subprocess.CalledProcessError, name="n")(len).task.retry.retry_on,
                         ("subprocess.CalledProcessError",))

    def test_where_a_function_runs_is_told_by_what_it_is(self):
        async def coroutine(ctx):
            pass

        class Callable:
            async def __call__(self, ctx):
                pass

        kinds = [mf.task(name="n", **options)(function).task.action.kind for function, options in (
            (coroutine, {}), (Callable(), {}), (functools.partial(coroutine), {}), (len, {}),
            (os.path.basename, {"process": True}))]
        self.assertEqual(kinds, ["async", "async", "async", "thread", "process"])

    def test_options_that_make_no_sense_are_named_with_their_way_out(self):
        async def coroutine(ctx):
            pass

        for function, options, expected in (
                (len, {"max_retries": "3"}, "max_retries: expected an integer from 0 to 1000000, got \"3\""),
                (len, {"timeout_s": 0}, "timeout_s: expected a number from 0.001 to 315360000, got 0"),
                (len, {"trigger_rule": "all"}, "trigger_rule: expected one of "),
                (len, {"name": "a b"}, "id: expected a name of letters, digits, _, . and -"),
                (lambda ctx: None, {}, "id: expected a name of letters, digits, _, . and -"),
                (len, {"retry_on": [3]}, "retry_on: expected classes of exceptions or \"timeout\", got 3"),
                (lambda: None, {"name": "n"}, "it is called with one argument, its context, but takes others: "),
                (coroutine, {"process": True}, "process=True: an async function runs on the event loop; make it"),
                (lambda ctx: None, {"name": "n", "process": True}, "process=True: another process finds a function by "
                 "its name in its module"),
                (collections.Counter().update, {"process": True}, "process=True: a method would need its object"),
                (len, {"max_retrys": 1}, "@task has no option max_retrys, did you mean max_retries?"),
                (3, {}, "@task: expected a function, got 3")):
            with self.subTest(options=options):
                self.assertIn(expected, self.wrong(function, **options))

    def tasks(self, *names, **options):
        return [mf.task(name=name, **options)(len) for name in names]

    def test_edges_are_drawn_by_arrows_in_both_directions_and_with_lists(self):
        a, b, c, d = self.tasks(*"abcd")
        self.assertIs(a >> b, b)
        result = b >> [c, d]
        self.assertEqual(result, [c, d])
        e, f, g = self.tasks(*"efg")
        self.assertIs([c, d] >> e, e)
        self.assertEqual(f << [e, a], [e, a])
        g << f
        a >> b                                 # twice is once
        flow = mf.make_flow("w", [a, b, c, d, e, f, g])
        self.assertEqual({t.id: t.depends_on for t in flow.tasks}, {
            "a": (), "b": ("a",), "c": ("b",), "d": ("b",), "e": ("c", "d"), "f": ("e", "a"), "g": ("f",)})
        for wrong in (lambda: a >> len, lambda: a << 3, lambda: [a, 3] >> b):
            with self.assertRaises(TypeError) as caught:
                wrong()
            self.assertIn("expected a task or a list of tasks, got", str(caught.exception))

    def test_everything_wrong_with_a_workflow_is_said_at_once(self):
        a, b, c = self.tasks(*"abc")
        again, = self.tasks("a", pool="db")
        a >> b >> c >> b
        with self.assertRaises(mf.FlowError) as caught:
            mf.Workflow([b, c, again, again], name="w", max_concurrent_tasks=0)
        for line in ("workflow w: task b waits for a, which is not among the workflow's tasks; add it to them",
                     "workflow w: max_parallel: expected an integer from 1 to 100000, got 0"):
            self.assertIn(line, caught.exception.problems)
        with self.assertRaises(mf.FlowError) as caught:
            mf.Workflow([a, b, c, again], name="w")
        self.assertEqual(caught.exception.problems, (
            "workflow w: tasks[3].id: a is the id of tasks[0] already; rename one",
            "workflow w: tasks[1].depends_on: a cycle: b -> c -> b; remove one of these dependencies",
            'workflow w: tasks[3].pool: the flow has no pool "db"; it has none'))
        with self.assertRaises(mf.FlowError) as caught:
            mf.Workflow([], name="no good")
        self.assertIn("workflow no good: tasks: there are none; give at least one", caught.exception.problems)

    def test_edges_that_come_after_the_workflow_count_as_well(self):
        a, b = self.tasks(*"ab")
        workflow = mf.Workflow([a, b])
        a >> b
        self.assertEqual(workflow.flow.tasks[1].depends_on, ("a",))

    def test_a_json_flow_and_its_python_twin_have_equal_plans(self):
        for seed in range(50):
            flow, _ = random_flow(random.Random(seed), conditions=False)
            made = {t.id: mf.task(name=t.id, priority=t.priority, trigger_rule=t.trigger_rule, pool=t.pool,
                                  allow_failure=t.allow_failure, timeout_s=t.timeout_s, grace_s=t.grace_s,
                                  max_retries=t.retry.max_retries, backoff_s=t.retry.backoff_s,
                                  jitter=t.retry.jitter, description="")(len) for t in flow.tasks}
            for t in flow.tasks:
                [made[up] for up in t.depends_on] >> made[t.id]
            twin = mf.make_flow("f", list(made.values()), pools=dict(flow.pools), fail_fast=flow.fail_fast)
            one, other = mf.make_plan(flow), mf.make_plan(twin)
            for field in ("order", "rank", "downstream", "key", "left_out"):
                self.assertEqual(getattr(one, field), getattr(other, field))
            for t in flow.tasks:
                retry = t.retry._replace(retry_on=None)
                self.assertEqual(other.tasks[t.id], t._replace(action=other.tasks[t.id].action, retry=retry))

    def test_a_recorded_flow_of_functions_is_read_back_without_them(self):
        a, b = self.tasks("a", "b", tags=("x",), retry_on=OSError)
        a >> b
        flow = mf.make_flow("w", [a, b], description="d", pools={"p": 2})
        self.assertEqual(mf.recorded_flow(json.loads(json.dumps(mf.flow_to_json(flow)))), flow)
        with self.assertRaises(mf.FlowError):  # a flow file can't name a function
            mf.parse_flow(json.dumps(mf.flow_to_json(flow)), "f.json")


class T09Plan(unittest.TestCase):

    FLOW = make(task("a", tags=["x"]), task("b", "a"), task("c", "b", tags=["y"]), task("d", "a"),
                task("e", "d", "c"))

    def test_a_selection_leaves_out_what_it_says(self):
        for fields, kept in [
                ({}, "abcde"), ({"only": ("b",)}, "b"), ({"only": ("b", "d")}, "bd"),
                ({"from_": ("b",)}, "bce"), ({"until": ("c",)}, "abc"), ({"skip": ("d",)}, "abce"),
                ({"from_": ("b",), "until": ("c",)}, "bc"), ({"tags": ("y",)}, "abc"),
                ({"tags": ("x",)}, "a"), ({"tags": ("x", "y")}, "abc"),
                ({"tags": ("y",), "skip": ("a",)}, "bc")]:
            with self.subTest(fields=fields):
                self.assertEqual(mf.select(self.FLOW, mf.Selection(**fields)), set("abcde") - set(kept))

    def test_a_selection_of_what_is_not_there_or_of_nothing_is_an_error(self):
        with self.assertRaises(mf.NotFound) as caught:
            mf.select(self.FLOW, mf.Selection(only=("bb",)))
        self.assertEqual(str(caught.exception), 'flow f has no task "bb", did you mean b?')
        with self.assertRaises(mf.NotFound):
            mf.select(self.FLOW, mf.Selection(tags=("z",)))
        with self.assertRaises(mf.UsageError):
            mf.select(self.FLOW, mf.Selection(only=("b",), skip=("b",)))

    def test_ready_tasks_are_ordered_by_priority_then_work_behind_then_declaration(self):
        flow = make(task("short"), task("long1"), task("long2", "long1"), task("urgent", priority=5),
                    task("short2"))
        _, world, _ = simulate(flow, slots=1)
        self.assertEqual([line.split()[-1] for line in world.log],
                         ["urgent", "long1", "short", "long2", "short2"])

    def test_known_durations_count_as_work(self):
        flow = make(task("a"), task("b"), task("c"), task("d", "c"))
        for durations, order in (({}, "cabd"), ({"a": 1, "b": 10, "c": 1, "d": 2}, "bcda"),
                                 ({"a": 1, "b": 3, "c": 9, "d": 0}, "cbad")):
            _, world, _ = simulate(flow, slots=1, durations=durations)
            self.assertEqual("".join(line[-1] for line in world.log), order, durations)

    def by_key(self, durations, names="abcd", left_out=()):
        plan = mf.make_plan(make(*map(task, names)), dict.fromkeys(left_out, {}), durations)
        return "".join(sorted(names, key=plan.key.get))

    def test_a_task_without_history_counts_as_the_median_of_the_others(self):
        self.assertEqual(self.by_key({"a": 1, "b": 60, "c": 3600}), "cbda")
        self.assertEqual(self.by_key({"d": 60}), "abcd")
        self.assertEqual(self.by_key({"gone": 60, "d": 2, "c": 1}), "abdc")

    def test_what_chance_makes_of_a_duration_seldom_changes_the_order(self):
        for durations in ({"a": 0.9, "b": 1.1, "c": 1.3, "d": 1}, {"a": 0.001, "b": 0.01, "c": 0, "d": 0.15}):
            self.assertEqual(self.by_key(durations), "abcd")
        weights = [mf._weights("a", (), {"a": 2.0 ** n / 1000})["a"] for n in range(40)]
        self.assertEqual(weights[:8], [1] * 8)
        self.assertEqual(weights[8:], [2 ** n for n in range(1, 33)])

    def test_what_is_left_out_is_no_work(self):
        flow = make(task("a"), task("b"), task("c", "b"))
        plan = mf.make_plan(flow, {"c": {}}, {"a": 4, "b": 2, "c": 60})
        self.assertLess(plan.key["a"], plan.key["b"])


def ancestors(flow, name):
    upstream = {t.id: t.depends_on for t in flow.tasks}
    found, todo = set(), list(upstream[name])
    while todo:
        key = todo.pop()
        if key not in found:
            found.add(key)
            todo += upstream[key]
    return found


class T10EventsAndRun(unittest.TestCase):

    def test_a_task_sees_its_ancestors_merged_in_topological_order_whatever_the_timing(self):
        for seed in range(300):
            chance = random.Random(seed)
            names = [f"t{n}" for n in range(chance.randint(1, 12))]
            flow = make(*[task(name, *[up for up in names[:n] if chance.random() < 0.3])
                          for n, name in enumerate(names)])
            outputs = {name: {chance.choice("abcd"): f"{name}{k}" for k in range(chance.randint(0, 3))}
                       for name in names}
            order = mf.make_plan(flow).order
            world = SimWorld({name: {1: (chance.random(), 0)} for name in names})
            world.wait_plain = world.wait
            seen = {}

            def start(run, action, world=world, seen=seen):
                seen[action.task] = (run.ctx_of(action.task),
                                     list(run.outputs_of(run.tasks[action.task].scope)))
                return SimWorld.start(world, run, action)

            def wait(run, until, world=world, outputs=outputs):
                return [event._replace(output=outputs[event.task])
                        if isinstance(event, mf.AttemptEnded) else event
                        for event in world.wait_plain(run, until)]

            world.start, world.wait = start, wait
            run, _, _ = simulate(flow, slots=chance.randint(1, 4), world=world)
            for name in names:
                expected = {}
                above = [key for key in order if key in ancestors(flow, name)]
                for key in above:
                    expected.update(outputs[key])
                self.assertEqual(seen[name], (expected, [key for key in above if outputs[key]]))
            whole = {}
            for key in order:
                whole.update(outputs[key])
            self.assertEqual(run.ctx, whole)

    def test_a_chain_without_outputs_shares_one_scope(self):
        run, _, _ = simulate(make(*[task(f"t{n}", *([f"t{n - 1}"] if n else [])) for n in range(50)]))
        self.assertEqual({id(task_run.scope) for task_run in run.tasks.values()}, {id(mf.NO_SCOPE)})

    def test_the_inputs_of_a_task_name_where_each_key_comes_from(self):
        flow = make(task("a"), task("b", "a"), task("c", "b", args=["${{ ctx.k }} ${{ tasks.a.outputs.x }}"]))
        run = mf.Run(mf.make_plan(flow), "r")
        for name, output in (("a", {"k": 1, "x": 2}), ("b", {"k": 3})):
            run.apply(mf.AttemptStarted(1, name, 1))
            run.apply(mf.AttemptEnded(2, name, 1, mf.SUCCESS, output=output))
        self.assertEqual(mf.inputs_of(run, run.plan.tasks["c"]), {"k": "b", "x": "a"})

    def test_reasons_say_who_upstream_is_to_blame(self):
        flow = make(task("a"), task("b", "a"), task("c", "b", trigger_rule="none_failed"),
                    task("d", "a", trigger_rule="all_failed"), task("e", "d", trigger_rule="one_failed"))
        run, _, _ = simulate(flow, {"a": {1: (1, 3)}})
        self.assertEqual({name: (t.status, t.reason) for name, t in run.tasks.items()}, {
            "a": ("failed", "exit 3"), "b": ("upstream_failed", "upstream a failed"),
            "c": ("upstream_failed", "upstream b failed"), "d": ("success", None),
            "e": ("skipped", "trigger rule one_failed does not hold")})


class T11Scheduler(unittest.TestCase):

    def test_a_diamond_runs_both_arms_at_once(self):
        flow = make(task("a"), task("b", "a"), task("c", "a"), task("d", "b", "c"))
        _, world, _ = simulate(flow, {"b": {1: (5, 0)}, "c": {1: (2, 0)}})
        self.assertEqual(world.log, ["0 start a", "1 start b", "1 start c", "6 start d"])

    def test_slots_limit_the_attempts_at_once(self):
        _, world, _ = simulate(make(task("a"), task("b"), task("c")), {"a": {1: (3, 0)}}, slots=2)
        self.assertEqual(world.log, ["0 start a", "0 start b", "1 start c"])

    def test_a_start_that_nothing_came_of_yet_is_waited_for_and_takes_no_turn_of_its_own(self):
        class Counting(SimWorld):
            turns = 0

            def wait(self, run, until):
                self.turns += 1
                return super().wait(run, until)

        for slots, turns in ((1, 20), (None, 20)):
            _, world, _ = simulate(make(*[task(f"t{n}") for n in range(20)]), slots=slots, world=Counting())
            self.assertEqual(world.turns, turns)

    def test_a_failed_task_is_retried_with_backoff_and_holds_no_slot_meanwhile(self):
        flow = make(task("a", max_retries=3, backoff_s=10), task("b"))
        run, world, _ = simulate(flow, {"a": {1: (1, 1), 2: (1, 1)}}, slots=1)
        self.assertEqual(world.log, ["0 start a", "1 start b", "11 start a", "32 start a"])
        self.assertEqual((run.status, len(run.tasks["a"].attempts)), ("success", 3))

    def test_retry_on_lets_only_what_it_names_be_retried(self):
        for retry_on, code, attempts in [
                ([2], 1, 1), ([2], 2, 3), (["timeout"], 1, 1), ([137], -9, 3), ([], 1, 1)]:
            with self.subTest(retry_on=retry_on, code=code):
                run, _, _ = simulate(make(task("a", max_retries=2, retry_on=retry_on)),
                                     {"a": {n: (1, code) for n in (1, 2, 3)}})
                self.assertEqual(len(run.tasks["a"].attempts), attempts)

    def test_a_late_attempt_gets_term_then_kill_and_fails(self):
        flow = make(task("a", timeout_s=5, grace_s=2, max_retries=1, retry_on=["timeout"]))
        run, world, _ = simulate(flow, {"a": {1: (99, 0), 2: (1, 0)}}, stubborn=["a"])
        self.assertEqual(world.log, ["0 start a", "5 TERM a", "7 KILL a", "7 start a"])
        self.assertEqual(run.tasks["a"].attempts[0].reason, "timeout after 5 s")

    def test_a_clean_up_task_that_succeeds_never_hides_a_failure(self):
        run, _, _ = simulate(make(task("a"), task("b", "a"), task("clean", "b", trigger_rule="all_done")),
                             {"a": {1: (1, 1)}})
        self.assertEqual(ends(run), {"a": "failed", "b": "upstream_failed", "clean": "success"})
        self.assertEqual((run.status, run.reason), ("failed", "a failed"))

    def test_a_tolerated_failure_counts_as_success_and_as_a_warning(self):
        run, _, _ = simulate(make(task("a", allow_failure=True), task("b", "a")), {"a": {1: (1, 1)}})
        self.assertEqual((ends(run), run.status, run.warnings),
                         ({"a": "failed", "b": "success"}, "success", 1))

    def test_without_fail_fast_independent_branches_go_on_and_with_it_nothing_more_starts(self):
        tasks = [task("a"), task("b"), task("c", "b"), task("d", "a")]
        run, _, _ = simulate(make(*tasks), {"a": {1: (1, 1)}, "b": {1: (2, 0)}})
        self.assertEqual(ends(run), {"a": "failed", "b": "success", "c": "success", "d": "upstream_failed"})
        run, _, _ = simulate(make(*tasks, fail_fast=True), {"a": {1: (1, 1)}, "b": {1: (2, 0)}})
        self.assertEqual(ends(run), {"a": "failed", "b": "success", "c": "cancelled", "d": "cancelled"})
        self.assertEqual((run.tasks["c"].reason, run.status), ("fail_fast: a failed", "failed"))

    def test_an_attempt_that_was_deferred_counts_for_nothing_and_lowers_parallelism_for_a_while(self):
        class Tight(SimWorld):
            """A system that has means for two attempts at once until second 5."""

            def start(self, run, action):
                if self.clock < 5 and len(self.ends) >= 2:
                    return [mf.AttemptDeferred(self.clock, action.task, action.attempt, "can't start yet: EAGAIN")]
                return super().start(run, action)

        flow = make(*[task(f"t{n}", max_retries=0) for n in range(6)])
        run, world, journal = simulate(flow, slots=4, world=Tight({f"t{n}": {1: (2, 0)} for n in range(6)}))
        self.assertTrue(run.ok)
        self.assertEqual({len(t.attempts) for t in run.tasks.values()}, {1})
        deferred = [event for event in journal if isinstance(event, mf.AttemptDeferred)]
        self.assertTrue(2 <= len(deferred) <= 8, deferred)
        again = mf.Run(mf.make_plan(flow), "r")
        for event in journal:
            again.apply(mf.event_from_json(mf.event_to_json(event)))
        self.assertEqual(mf.run_to_json(again), mf.run_to_json(run))

    def test_a_pool_holds_back_its_own_tasks_and_no_others(self):
        flow = make(task("a", pool="db"), task("b", pool="db"), task("c", pool="db", priority=1), task("d"),
                    pools={"db": 1})
        run, world, _ = simulate(flow, slots=None)
        self.assertEqual(world.log, ["0 start c", "0 start d", "1 start a", "2 start b"])
        self.assertTrue(run.ok)

    def test_a_retry_that_waits_for_its_pool_does_not_keep_the_engine_awake(self):
        flow = make(task("a", pool="p", max_retries=1, backoff_s=1), task("b", pool="p"), pools={"p": 1})
        run, world, _ = simulate(flow, {"a": {1: (1, 1)}, "b": {1: (9, 0)}})
        self.assertEqual(world.log, ["0 start a", "1 start b", "10 start a"])
        run = mf.Run(mf.make_plan(flow), "r")
        for event in (mf.AttemptStarted(0, "a", 1), mf.AttemptEnded(1, "a", 1, "failed"),
                      mf.AttemptStarted(1, "b", 1)):
            run.apply(event)
        self.assertEqual((mf.due(run, 5, None), mf.next_wake(run, None)), ([], None))

    def test_cancel_stops_what_runs_and_settles_the_rest(self):
        run, world, _ = simulate(make(task("a"), task("b", "a")), {"a": {1: (99, 0)}}, cancels=[3])
        self.assertEqual((ends(run), run.status), ({"a": "cancelled", "b": "cancelled"}, "cancelled"))
        self.assertEqual(world.log, ["0 start a", "3 TERM a"])

    def test_a_second_cancel_kills_at_once(self):
        run, world, _ = simulate(make(task("a", grace_s=50)), {"a": {1: (99, 0)}},
                                 cancels=[3, 4], stubborn=["a"])
        self.assertEqual(world.log, ["0 start a", "3 TERM a", "4 KILL a"])
        self.assertEqual((run.cancel.exit_code, run.status), (130, "cancelled"))

    def test_a_second_signal_of_another_kind_does_not_make_a_cancelled_task_a_failed_one(self):
        run = mf.Run(mf.make_plan(make(task("a"))), "r")
        for event in (mf.AttemptStarted(1, "a", 1), mf.CancelRequested(2, "cancelled by SIGTERM", 143),
                      mf.AttemptStopping(2, "a", 1, "cancelled by SIGTERM"),
                      mf.CancelRequested(3, "cancelled by SIGINT", 130, True)):
            run.apply(event)
        self.assertEqual(mf.attempt_end(run, "a", 4, -9, run.tasks["a"].stopping, dict).status, "cancelled")
        self.assertEqual((run.cancel.exit_code, run.cancel.kill), (143, True))

    def test_a_task_runs_where_its_condition_holds_is_skipped_where_not_and_fails_where_nobody_can_tell(self):
        flow = make(task("a"), task("yes", "a", **{"if": "tasks.a.status == 'success'"}),
                    task("no", "a", **{"if": "tasks.a.status == 'failed'"}), task("after", "no"),
                    task("either", "no", "yes", trigger_rule="none_failed"),
                    task("odd", "a", **{"if": "tasks.a.outputs.rows > 0"}), task("below", "odd"),
                    task("tolerated", **{"if": "run.id"}, allow_failure=True), task("on", "tolerated"))
        run, world, journal = simulate(flow, slots=1)
        self.assertEqual(ends(run), {
            "a": "success", "yes": "success", "no": "skipped", "after": "skipped", "either": "success",
            "odd": "failed", "below": "upstream_failed", "tolerated": "failed", "on": "success"})
        self.assertEqual({name: t.reason for name, t in run.tasks.items() if t.reason}, {
            "no": "if is false", "after": "upstream no was skipped", "below": "upstream odd failed",
            "odd": 'if: tasks.a.outputs.rows: there is no "rows" in []',
            "tolerated": 'if: "r" is neither true nor false; compare it with something'})
        self.assertEqual((run.status, run.warnings), ("failed", 1))
        self.assertEqual([type(event).__name__ for event in journal if getattr(event, "task", "") == "yes"],
                         ["TaskAdmitted", "AttemptStarted", "AttemptEnded"])

    def test_a_task_runs_once_for_each_value_and_hands_on_what_its_instances_did_in_order(self):
        flow = make(task("a"), task("each", "a", foreach=["x", {"k": 1}, None], max_retries=1, max_parallel=2),
                    task("none", foreach=[]), task("below", "each", "none",
                    args=["${{ tasks.each.outputs.items[1].n }}"]))

        class Outputs(SimWorld):
            def wait(self, run, until):
                return [event._replace(output={"n": event.task}) if isinstance(event, mf.AttemptEnded) and event.status
                        == "success" else event for event in super().wait(run, until)]

        run, world, journal = simulate(flow, world=Outputs({"each[0]": {1: (3, 1), 2: (1, 0)}}), slots=9)
        self.assertEqual(world.log, ["0 start a", "1 start each[0]", "1 start each[1]", "2 start each[2]",
                                     "4 start each[0]", "5 start below"])
        self.assertEqual(run.tasks["each"].output, {"items": [{"n": f"each[{n}]"} for n in range(3)]})
        self.assertEqual(run.tasks["none"].output, {"items": []})
        self.assertEqual(journal[-2].task, "below")
        started = next(event for event in journal if isinstance(event, mf.AttemptStarted) and event.task == "below")
        self.assertEqual(started.inputs, {"items": "each"})
        self.assertEqual([run.tasks[f"each[{n}]"].each for n in range(3)],
                         [{"item": "x"}, {"item": {"k": 1}}, {"item": None}])
        self.assertEqual(ends(run), dict.fromkeys(run.tasks, "success"))
        self.assertEqual(len(run.tasks), 7)

    HANDLERS = {"on_success": {"command": "true"}, "on_failure": {"id": "alarm", "command": "true"},
                "finally": {"id": "clean", "command": "true", "args": ["${{ tasks.a.status }}"]}}

    def test_handlers_run_when_all_is_done_as_it_went(self):
        a, b = task("a"), task("b", "a")
        bad = {1: (1, 1)}
        for script, tasks, fields, status, ran in [
                ({}, [a, b], {}, "success", "a b on_success clean"), ({"b": bad}, [a, b], {}, "failed",
                "a b alarm clean"),
                ({"a": bad}, [a, b], {}, "failed", "a alarm clean"),
                ({"a": bad}, [a, b], {"fail_fast": True}, "failed", "a alarm clean"),
                ({"b": bad}, [a, task("b", allow_failure=True)], {}, "success", "a b on_success clean"),
                ({"on_success": bad}, [a, b], {}, "success", "a b on_success clean"),
                ({"b": bad, "alarm": bad}, [a, b], {}, "failed", "a b alarm clean"),
                ({"clean": bad}, [a, b], {}, "failed", "a b on_success clean"),
                ({"b": bad, "clean": bad}, [a, b], {}, "failed", "a b alarm clean"),
                ({}, [a, task("s", **{"if": "false"})], {}, "success", "a on_success clean"),
                ({"e[1]": bad}, [a, task("e", foreach=[1, 2])], {}, "failed", "a e[0] e[1] alarm clean")]:
            with self.subTest(script=script, status=status):
                run, world, journal = simulate(make(*tasks, **self.HANDLERS, **fields), script, slots=1)
                self.assertEqual((run.status, " ".join(line.split()[2] for line in world.log)), (status, ran))
                self.check_journal(run.plan.flow, run, journal, 1, {})
        self.assertEqual(ends(simulate(make(a, **self.HANDLERS), {"a": bad})[0]),
                         {"a": "failed", "on_success": "skipped", "alarm": "success", "clean": "success"})
        self.assertEqual(simulate(make(a, **self.HANDLERS))[0].tasks["alarm"].reason, "no task failed")

    def test_a_cancelled_run_is_still_tidied_up_unless_it_is_cancelled_twice(self):
        flow = make(task("a", grace_s=2), task("b", "a"), **self.HANDLERS)
        script = {"a": {1: (9, 0)}, "clean": {1: (5, 0)}}
        run, world, _ = simulate(flow, script, cancels=[1])
        self.assertEqual(world.log, ["0 start a", "1 TERM a", "1 start clean"])
        self.assertEqual(ends(run), {"a": "cancelled", "b": "cancelled", "on_success": "cancelled",
        "alarm": "cancelled",
                                     "clean": "success"})
        self.assertEqual((run.status, run.cancel.exit_code), ("cancelled", 130))
        run, world, _ = simulate(flow, script, cancels=[1, 2])
        self.assertEqual(world.log, ["0 start a", "1 TERM a", "1 start clean", "2 KILL clean"])
        self.assertEqual((run.status, run.tasks["clean"].status), ("cancelled", "cancelled"))
        run, world, _ = simulate(flow, script, cancels=[1, 1], stubborn=["a"])
        self.assertEqual((world.log, run.tasks["clean"].status), (["0 start a", "1 TERM a", "1 KILL a"], "cancelled"))

    def test_a_run_that_takes_too_long_fails_and_its_handlers_run(self):
        flow = make(task("a", grace_s=2), task("b", "a"), task("c"), timeout_s=4, **self.HANDLERS)
        run, world, _ = simulate(flow, {"a": {1: (99, 0)}, "alarm": {1: (30, 0)}}, stubborn=["a"])
        self.assertEqual(world.log, ["0 start a", "0 start c", "4 TERM a", "6 KILL a", "6 start alarm",
        "36 start clean"])
        self.assertEqual(ends(run), {"a": "cancelled", "b": "cancelled", "c": "success", "on_success": "cancelled",
                                     "alarm": "success", "clean": "success"})
        self.assertEqual({run.tasks[name].reason for name in ("a", "b", "on_success")}, {"run timeout"})
        self.assertEqual((run.status, run.reason, run.cancel.exit_code), ("failed", "run timeout", 1))
        again, world = mf.reopen(run, flow._replace(timeout_s=9)), SimWorld()
        world.clock = 1000.0
        steps, events = mf.drive(again, world, lambda events, happened: None, 9), None
        with contextlib.suppress(StopIteration):
            while True:
                events = world.wait(again, steps.send(events))
        self.assertEqual((again.status, again.cancel), ("success", None), "a resumed run has its time anew")
        self.assertEqual(simulate(make(task("a"), timeout_s=4))[0].status, "success")

    def test_the_time_of_a_run_is_for_its_tasks_and_its_end_is_nobodys_cancellation(self):
        late = {"clean": {1: (9, 0)}, "on_success": {1: (9, 0)}}
        run, world, _ = simulate(make(task("a"), timeout_s=4, **self.HANDLERS), late)
        self.assertEqual((run.status, world.log), ("success", ["0 start a", "1 start on_success", "10 start clean"]))
        run, world, _ = simulate(make(task("a", grace_s=9), timeout_s=4, **self.HANDLERS), {"a": {1: (99, 0)}},
                                 cancels=[5], stubborn=["a"])
        self.assertEqual(world.log, ["0 start a", "4 TERM a", "13 KILL a", "13 start clean"])
        self.assertEqual((run.status, run.cancel.exit_code), ("cancelled", 130))

    def test_a_task_ends_as_the_worst_of_its_instances(self):
        tasks = [task("each", foreach=[0, 1, 2, 3, 4]), task("below", "each"),
                 task("tolerant", foreach=[0, 1], allow_failure=True), task("on", "tolerant"),
                 task("some", foreach=[1, 2], **{"if": "item > 1"})]
        script = {f"{name}[{n}]": {1: (1, 1)} for name, n in [("each", 1), ("each", 2), ("each", 3), ("each", 4),
                                                              ("tolerant", 0)]}
        run, _, _ = simulate(make(*tasks), script)
        self.assertEqual({name: end for name, end in ends(run).items() if "[" not in name}, {
            "each": "failed", "below": "upstream_failed", "tolerant": "failed", "on": "success", "some": "success"})
        self.assertEqual(run.tasks["each"].reason, "4 of 5 failed: each[1], each[2], each[3] and 1 more")
        self.assertEqual((run.tasks["some[0]"].status, run.tasks["some"].output), ("skipped", {"items": [None, None]}))
        self.assertEqual((run.status, run.warnings), ("failed", 1))
        run, _, _ = simulate(make(*tasks, fail_fast=True), script, slots=1)
        self.assertEqual((run.tasks["each[1]"].status, run.tasks["each[2]"].status, run.tasks["each"].status),
                         ("failed", "cancelled", "cancelled"))

    def test_where_the_values_come_from_decides_when_the_task_runs_and_what_if_they_are_none(self):
        flow = make(task("a", foreach="${{ params.days }}"), task("b", foreach="${{ params.days[0] }}"),
                    task("c", foreach="${{ tasks.a.outputs.items }}", depends_on=["a"]),
                    task("d", matrix={"x": "${{ params.days }}", "y": [True]}),
                    task("e", matrix={"x": "${{ run.id }}"}), params={"days": ["mo", "${{ tu"]})
        run = mf.Run(mf.make_plan(flow), "r", {"days": ["mo", "${{ tu"]})
        world, steps, events = SimWorld(), None, None
        steps = mf.drive(run, world, lambda events, happened: None, 9)
        with contextlib.suppress(StopIteration):
            while True:
                events = world.wait(run, steps.send(events))
        self.assertEqual([run.tasks[name].status for name in "abcde"], ["success", "failed", "success",
        "success", "failed"])
        self.assertEqual(run.tasks["b"].reason, 'foreach: "mo" is a string, not an array')
        self.assertEqual(run.tasks["e"].reason, 'matrix: matrix.x: "r" is no array')
        self.assertEqual(run.tasks["a[1]"].each, {"item": "${{ tu"}, "a value is no template")
        self.assertEqual(run.tasks["d[1]"].each, {"matrix": {"x": "${{ tu", "y": True}})

    def test_a_resumed_run_runs_of_the_instances_those_that_did_not_end_well(self):
        flow = make(task("a"), task("each", "a", foreach=[0, 1, 2]), task("below", "each"))
        run, _, journal = simulate(flow, {"each[1]": {1: (1, 1)}})
        self.assertEqual(run.status, "failed")
        for old in (run, mf.run_from_json(json.loads(json.dumps(mf.run_to_json(run))))):
            again = mf.reopen(old, flow)
            world = SimWorld()
            steps, events = mf.drive(again, world, lambda events, happened: None, 9), None
            with contextlib.suppress(StopIteration):
                while True:
                    events = world.wait(again, steps.send(events))
            self.assertEqual((world.log, again.status), (["0 start each[1]", "1 start below"], "success"))
            self.assertEqual(again.tasks["each"].output, {"items": [None] * 3})
        run, _, _ = simulate(flow, {"each[1]": {1: (1, 1)}})
        other = make(task("a"), task("each", "a", foreach=[0, 1, 2, 3]), task("below", "each"))
        again = mf.reopen(run, other)
        self.assertEqual((again.tasks["each"].status, again.groups), ("pending", {}))

    def test_instances_that_are_made_anew_keep_the_attempts_of_those_before_them(self):
        flow = make(task("a"), task("each", "a", foreach=[0, 1, 2]))
        run, _, journal = simulate(flow, {"each[1]": {1: (1, 1)}})
        other = make(task("a", priority=1), task("each", "a", foreach=[0, 1, 2]))
        again = mf.reopen(run, other)
        for _ in range(2):                      # interrupted before it came to them
            text = json.dumps(mf.run_to_json(again))
            again = mf.reopen(mf.run_from_json(json.loads(text)), other)
        self.assertEqual((len(again.tasks), again.unsettled, again.status), (2, 2, "running"))
        world = SimWorld()
        steps, events = mf.drive(again, world, lambda events, happened: None, 9), None
        with contextlib.suppress(StopIteration):
            while True:
                events = world.wait(again, steps.send(events))
        self.assertEqual({name: (t.attempt, [a.status for a in t.attempts]) for name, t in again.tasks.items()}, {
            "a": (2, ["success"] * 2), "each": (0, []), "each[0]": (2, ["success"] * 2),
            "each[1]": (2, ["failed", "success"]), "each[2]": (2, ["success"] * 2)})
        self.assertEqual((again.status, again.earlier), ("success", {}))

    def test_the_attempts_of_an_instance_outlive_an_array_that_was_shorter_for_a_while(self):
        def after(old, items):
            flow = make(task("each", foreach=items), task("bad", "each"))
            run = mf.reopen(old, flow) if old else mf.Run(mf.make_plan(flow), "r")
            world = SimWorld(dict.fromkeys(["bad"], {n: (1, 1) for n in range(9)}))
            steps, events = mf.drive(run, world, lambda events, happened: None, 9), None
            with contextlib.suppress(StopIteration):
                while True:
                    events = world.wait(run, steps.send(events))
            return mf.run_from_json(json.loads(json.dumps(mf.run_to_json(run))))

        run = None
        for items in (["a", "b", "c"], ["a"], ["x", "y", "z"]):
            run = after(run, items)
        self.assertEqual([run.tasks[f"each[{n}]"].attempt for n in range(3)], [3, 2, 2])
        self.assertEqual(run.earlier, {})

    def test_the_end_of_a_task_with_instances_is_an_event_of_its_own(self):
        flow = make(task("each", foreach=[0, 1]), task("none", foreach=[]), task("bad", foreach=[0, 1, 2, 3, 4]))
        run, _, journal = simulate(flow, {f"bad[{n}]": {1: (1, 1)} for n in range(4)})
        self.assertEqual([(event.task, event.status, event.reason) for event in journal
                          if isinstance(event, mf.TaskSettled)],
                         [("none", "success", None), ("each", "success", None),
                          ("bad", "failed", "4 of 5 failed: bad[0], bad[1], bad[2] and 1 more")])
        self.assertEqual(run.tasks["each"].output, {"items": [None, None]})

    def test_a_run_with_instances_that_is_resumed_from_anywhere_ends_alike(self):
        for seed in range(150):
            flow = random_flow(random.Random(seed), 6)[0]._replace(fail_fast=False, timeout_s=None)
            whole, _, journal = simulate(flow)
            for cut in range(0, len(journal), 3):
                part = mf.Run(mf.make_plan(flow), "r")
                for event in journal[:cut]:
                    part.apply(event)
                again = mf.reopen(mf.run_from_json(json.loads(json.dumps(mf.run_to_json(part)))), flow)
                world = SimWorld()
                steps, events = mf.drive(again, world, lambda events, happened: None, 4), None
                with contextlib.suppress(StopIteration):
                    while True:
                        events = world.wait(again, steps.send(events))
                self.assertEqual({name: (t.status, t.output) for name, t in again.tasks.items()},
                                 {name: (t.status, t.output) for name, t in whole.tasks.items()}, (seed, cut))

    def test_a_condition_is_asked_once_and_not_before_the_trigger_rule_holds(self):
        asked = []

        class Asked(SimWorld):
            def ask(self, run, action):
                asked.append((self.clock, action.task))
                return super().ask(run, action)

        true = {"if": "true"}
        flow = make(task("a", max_retries=1, **true), task("b", "a", **true), task("c", "a", **true),
                    task("d", "a", trigger_rule="all_failed", **true))
        run, world, _ = simulate(flow, slots=1, world=Asked({"a": {1: (3, 1), 2: (1, 0)}}))
        self.assertEqual(asked, [(0, "a"), (4, "b"), (4, "c")])
        self.assertEqual(world.log, ["0 start a", "3 start a", "4 start b", "5 start c"])

    def test_what_is_left_out_counts_as_satisfied_with_its_outputs(self):
        flow = make(task("a"), task("b", "a"), task("c", "b", args=["${{ tasks.b.outputs.x }}"]))
        run, _, journal = simulate(flow, left_out={"a": {}, "b": {"x": 5}})
        self.assertEqual(ends(run), {"a": "skipped", "b": "skipped", "c": "success"})
        started = next(event for event in journal if isinstance(event, mf.AttemptStarted))
        self.assertEqual((run.tasks["b"].reason, run.ctx, started.inputs, run.status),
                         ("left out", {"x": 5}, {"x": "b"}, "success"))

    def test_due_and_next_wake_change_nothing(self):
        for seed in range(50):
            flow, script = random_flow(random.Random(seed))
            _, _, journal = simulate(flow, script)
            run = mf.Run(mf.make_plan(flow), "r")
            for event in journal:
                before = (mf.run_to_json(run), repr(run.queues.ready), list(run.retries), list(run.deadlines),
                          dict(run.barred), dict(run.asking))
                mf.due(run, event.at, 2)
                mf.next_wake(run, 2)
                self.assertEqual(before, (mf.run_to_json(run), repr(run.queues.ready), list(run.retries),
                                          list(run.deadlines), dict(run.barred), dict(run.asking)))
                run.apply(event)

    def test_3000_random_flows_end_keep_their_order_and_limits_and_replay_exactly(self):
        outcomes = set()
        for seed in range(3000):
            chance = random.Random(seed)
            flow, script = random_flow(chance)
            slots = chance.choice([1, 2, 3, 4, None])
            names = [t.id for t in flow.tasks]
            options = {"cancels": [chance.randint(0, 20)] if chance.random() < 0.2 else [],
                       "stubborn": [name for name in names if chance.random() < 0.3]}
            left_out = {name: {} for name in names if chance.random() < 0.05}
            run, _, journal = simulate(flow, script, slots, left_out, cancels=list(options["cancels"]),
                                       stubborn=options["stubborn"])
            outcomes.add(run.status)
            self.check_journal(flow, run, journal, slots, left_out)
            self.assertEqual(journal, simulate(flow, script, slots, left_out, **options)[2], seed)
        self.assertEqual(outcomes, {"success", "failed", "cancelled"})

    def check_journal(self, flow, run, journal, slots, left_out):
        live, again = set(), mf.Run(mf.make_plan(flow, left_out), "r")
        for event in journal:
            if isinstance(event, mf.AttemptStarted):
                self.assertNotIn(event.task, live)
                self.assertNotIn(event.task, left_out)
                live.add(event.task)
                self.assertLessEqual(len(live), slots or len(again.tasks))
                for pool, size in flow.pools.items():
                    self.assertLessEqual(sum(again.defs[name].pool == pool for name in live), size)
                for group in {again.group_of[name] for name in live & again.group_of.keys()}:
                    most = again.defs[group].max_parallel or len(again.tasks)
                    self.assertLessEqual(len(live & set(again.groups[group])), most)
                for up in again.defs[event.task].depends_on:
                    self.assertIn(again.tasks[up].status, mf.SETTLED)
            elif isinstance(event, mf.AttemptEnded):
                live.discard(event.task)
            again.apply(mf.event_from_json(json.loads(json.dumps(mf.event_to_json(event)))))
        self.assertFalse(live)
        self.assertTrue(all(task_run.status in mf.SETTLED for task_run in run.tasks.values()))
        self.assertEqual(mf.run_to_json(again), mf.run_to_json(run))
        for group, names in run.groups.items():
            found = [run.tasks[name].status for name in names]
            self.assertEqual(run.tasks[group].status, next(
                (end for end in ("cancelled", "failed") if end in found), "success"))
        tolerated = {name for name, definition in run.defs.items() if definition.allow_failure}
        bad = any(t.status in ("failed", "upstream_failed") and name not in tolerated
                  for name, t in run.tasks.items())
        expired = run.cancel and run.cancel.expired
        self.assertEqual(run.status, "failed" if expired else "cancelled" if run.cancel else
                         "failed" if bad else "success")

    def calls_per_task(self, flow, slots):
        """Return how many Python functions are called for each task: a cost that no machine changes."""
        run, calls = mf.Run(mf.make_plan(flow), "r"), itertools.count()
        world = SimWorld()
        steps, events = mf.drive(run, world, lambda events, happened: None, slots), None
        sys.setprofile(lambda frame, kind, arg: kind == "call" and next(calls))
        try:
            while True:
                events = world.wait(run, steps.send(events))
        except StopIteration:
            pass
        finally:
            sys.setprofile(None)
        self.assertTrue(run.ok)
        return next(calls) / len(flow.tasks)

    def test_the_cost_of_a_task_does_not_grow_with_the_flow(self):
        shapes = {
            "chain": lambda n: [task(f"t{k}", *([f"t{k - 1}"] if k else [])) for k in range(n)],
            "fan": lambda n: [task("root")] + [task(f"t{k}", "root") for k in range(n)] + [
                task("join", *[f"t{k}" for k in range(n)])]}
        for name, shape in shapes.items():
            with self.subTest(shape=name):
                few, many = (self.calls_per_task(make(*shape(n)), 4) for n in (200, 4000))
                self.assertLess(many, few * 1.2)

    # How long runs are that know how long tasks take, beside runs in the order of declaration.

    def shares(self, flow, seconds, chance, slots):
        """Return what makespans are of that in the order of declaration: with true, and with noisy durations."""
        noisy = {name: s * 2 ** chance.uniform(-1, 1) for name, s in seconds.items()}
        plain = makespan(flow, seconds, slots)
        return [makespan(flow, seconds, slots, known) / plain for known in (seconds, noisy)]

    def check_shares(self, shares, most):
        """Hold that knowing durations makes runs no longer on the whole, and none longer than `most`."""
        for column, mean in zip(zip(*shares), (1, 1.001)):
            self.assertLess(sum(column) / len(column), mean + 1e-9)
            self.assertLess(max(column), most)

    def test_on_real_graphs_runs_that_know_durations_are_no_longer_on_the_whole(self):
        if not os.path.isdir(CASES):
            self.skipTest("the graphs are not at hand")
        for name in sorted(os.listdir(CASES)):
            with open(os.path.join(CASES, name), encoding="utf-8") as file:
                flow = mf.parse_flow(file.read(), name)
            large = len(flow.tasks) > 200
            for slots in (4, 16) if large else (1, 2, 4, 8, 16):
                shares = []
                for seed in range(1 if large else 10):
                    chance = random.Random(seed)
                    seconds = {}
                    for t in flow.tasks:
                        low, high = KINDS[max((k for k in KINDS if re.match(f"{k}(?![a-z])", t.id)), key=len)]
                        seconds[t.id] = low * (high / low) ** chance.random()
                    shares.append(self.shares(flow, seconds, chance, slots))
                with self.subTest(name=name, slots=slots):
                    self.check_shares(shares, 1.1)

    def test_on_random_layers_runs_that_know_durations_are_no_longer_on_the_whole(self):
        for slots in (1, 2, 4, 8):
            shares = []
            for seed in range(60):
                chance = random.Random(seed)
                layers, n = [], 0
                for _ in range(chance.randint(2, 6)):
                    layers.append([f"t{k}" for k in range(n, n + chance.randint(1, 12))])
                    n += len(layers[-1])
                tasks = [task(name, *chance.sample(above, min(len(above), chance.randint(1, 3))))
                         for above, layer in zip([[], *layers], layers) for name in layer]
                chance.shuffle(tasks)
                seconds = {t["id"]: chance.paretovariate(1.2) for t in tasks}
                shares.append(self.shares(make(*tasks), seconds, chance, slots))
            with self.subTest(slots=slots):
                self.check_shares(shares, 1.15)


    def test_of_thousands_of_ready_tasks_few_start_in_one_go_and_none_is_forgotten(self):
        flow = make(*[task(f"t{n}") for n in range(2 * mf.AT_ONCE + 1)])
        run = mf.Run(mf.make_plan(flow), "r")
        for count in (mf.AT_ONCE, mf.AT_ONCE, 1, 0):
            actions = mf.due(run, 0, None)
            self.assertEqual(len(actions), count)
            for action in actions:
                run.apply(mf.fact(run, action, 0))
        self.assertEqual(len(run.running), len(flow.tasks))


def state_text(run, seq):
    """Return the text of RUN.json for a run as it stands."""
    return b"".join(mf.encode_state(run, None, seq, mf.encode_definition(run.plan.flow)))


def at(text):
    """Return a time of a day in 2026, written as 06:00 or 06:00:30, in seconds since 1970."""
    return mf.parse_at(f"2026-11-21T{text}Z", None)


class SimDaemon:
    """Takes turns on a clock of its own: of each run, how long it takes is known, and when it began."""

    def __init__(self, *schedules, seconds=0, now="00:00", flow="f"):
        self.schedules, self.seconds, self.flow = mf.make_schedules(list(schedules)), seconds, flow
        self.ledger, self.runs, self.started = mf.Ledger(), {}, []
        self.turn(now)

    def turn(self, now, dies=False):
        """Take a turn, which dies before it writes its Ledger down, or does not."""
        now = at(now) if isinstance(now, str) else now
        decision = mf.due_runs(self.flow, self.schedules, self.ledger, now,
                               lambda: any(began <= now < began + self.seconds for began in self.runs.values()),
                               self.runs.__contains__)
        for run in decision.starts:
            assert run.time not in self.runs, run
            self.runs[run.time] = now
            self.started.append(run)
        if not dies:
            self.ledger = decision.ledger
        return decision.wake

    def turns(self, first, last, step=60):
        for now in range(at(first), at(last) + 1, step):
            self.turn(now)
        return self.times()

    def times(self):
        return [mf.scheduled_text(run.time)[11:16] for run in self.started]


class T12DueRuns(unittest.TestCase):
    def test_a_flow_that_is_seen_for_the_first_time_owes_nothing_older(self):
        for catchup in mf.CATCHUPS:
            daemon = SimDaemon({"cron": "* * * * *", "catchup": catchup}, now="06:00:30")
            self.assertEqual((daemon.times(), daemon.turn("06:00:59")), ([], at("06:01")))
            daemon.turn("06:01")
            self.assertEqual(daemon.times(), ["06:01"])

    def test_what_was_missed_is_made_up_for_as_the_schedule_says(self):
        for catchup, back, expected in (
                ("none", "05:00:10", ["05:00"]), ("none", "05:01:00", ["05:00"]), ("none", "05:01:01", []),
                ("latest", "05:00:10", ["05:00"]), ("latest", "05:50", ["05:00"]), ("latest", "00:59", []),
                ("all", "05:00:10", ["01:00", "02:00", "03:00", "04:00", "05:00"]),
                ("all", "05:59", ["01:00", "02:00", "03:00", "04:00", "05:00"])):
            with self.subTest(catchup, back=back):
                daemon = SimDaemon({"cron": "0 * * * *", "catchup": catchup, "overlap": "allow"})
                daemon.turn(back)
                daemon.turn(back)
                self.assertEqual(daemon.times(), expected)
                daemon.turn("06:00:01")
                self.assertEqual(daemon.times(), expected + ["06:00"])

    def test_what_is_made_up_for_waits_while_the_flow_runs_and_is_never_skipped(self):
        for overlap in ("skip", "queue"):
            daemon = SimDaemon({"cron": "0 * * * *", "catchup": "all", "overlap": overlap}, seconds=300)
            self.assertEqual(daemon.turns("04:30", "04:59"), ["01:00", "02:00", "03:00", "04:00"])
            self.assertEqual(sorted(daemon.runs.values()), [at(f"04:{n}") for n in (30, 35, 40, 45)])
        daemon = SimDaemon({"cron": "0 * * * *", "catchup": "latest"}, {"every_s": 600}, seconds=420)
        self.assertEqual(daemon.turns("02:10", "02:19"), ["02:10", "02:00"])

    def test_a_time_that_comes_while_the_flow_runs_is_dealt_with_as_the_schedule_says(self):
        for overlap, expected in (
                ("skip", ["00:10", "00:40", "01:10"]), ("queue", ["00:10", "00:30", "00:50", "01:20"]),
                ("allow", ["00:10", "00:20", "00:30", "00:40", "00:50", "01:00", "01:10", "01:20"])):
            with self.subTest(overlap):
                daemon = SimDaemon({"cron": "*/10 * * * *", "overlap": overlap}, seconds=1500)
                self.assertEqual(daemon.turns("00:01", "01:29"), expected)
                began = sorted(daemon.runs.values())
                self.assertTrue(overlap == "allow" or all(b - a >= 1500 for a, b in zip(began, began[1:])))

    def test_what_waits_is_asked_for_soon_and_dropped_with_its_schedule(self):
        daemon = SimDaemon({"cron": "*/10 * * * *", "overlap": "queue"}, seconds=900)
        daemon.turns("00:10", "00:20")
        self.assertEqual((daemon.ledger.queued, daemon.turn("00:21")), (at("00:20"), at("00:21:01")))
        daemon.schedules = mf.make_schedules("@hourly")
        self.assertEqual((daemon.turn("00:30"), daemon.times()), (at("01:00"), ["00:10"]))

    def test_the_first_of_two_schedules_due_at_once_gives_the_params(self):
        daemon = SimDaemon({"cron": "0 * * * *", "params": {"n": 1}},
                           {"cron": "*/30 * * * *", "params": {"n": 2}, "jitter_s": 20}, seconds=1)
        daemon.turns("00:01", "02:05", 5)
        self.assertEqual([(mf.scheduled_text(run.time)[11:16], run.params["n"]) for run in daemon.started],
                         [("00:30", 2), ("01:00", 1), ("01:30", 2), ("02:00", 1)])

    def test_a_schedule_that_was_changed_owes_nothing_older_and_one_that_stays_goes_on(self):
        daemon = SimDaemon({"cron": "0 1 * * *", "catchup": "all"}, {"cron": "0 2 * * *", "catchup": "all"})
        daemon.schedules = mf.make_schedules([{"cron": "0 2 * * *", "catchup": "latest"},
                                              {"cron": "30 1 * * *", "catchup": "all"}])
        daemon.turn("03:00")
        self.assertEqual(daemon.times(), ["02:00"])

    def test_a_clock_that_jumps_neither_repeats_nor_loses_what_comes(self):
        for catchup, expected in (("none", ["01:00", "05:00"]), ("latest", ["01:00", "04:00", "05:00"])):
            daemon = SimDaemon({"cron": "0 * * * *", "catchup": catchup})
            daemon.turns("00:59", "01:05")
            daemon.turns("04:30", "05:05")      # forward
            self.assertEqual(daemon.times(), expected)
        daemon.turns("02:30", "03:05")          # and back: what the wrong clock started is not started again
        daemon.turns("03:50", "06:05")
        self.assertEqual(daemon.times(), ["01:00", "04:00", "05:00", "03:00", "06:00"])
        daemon = SimDaemon("*/10 * * * *")
        daemon.turn(at("00:35") + 20 * 365 * 86400)
        self.assertEqual(daemon.turns("00:09", "00:31"), ["00:10", "00:20", "00:30"])

    def test_a_clock_that_is_set_back_a_little_skips_what_it_has_skipped(self):
        daemon = SimDaemon("*/10 * * * *", seconds=601)
        daemon.turns("00:10", "00:20")
        daemon.turns("00:19:30", "00:21", 1)
        self.assertEqual(daemon.times(), ["00:10"])

    def test_a_jitter_is_the_same_for_everybody_and_keeps_the_scheduled_time(self):
        schedule = mf.Schedule(cron="* * * * *", jitter_s=600)
        found = [*itertools.islice(mf.starts("f", schedule, at("00:00")), 200)]
        self.assertEqual(found, sorted(found))
        self.assertEqual([*itertools.islice(mf.starts("f", schedule, found[99][0]), 50)], found[100:150])
        late = [start - time for start, time in found]
        self.assertTrue(min(late) >= 0 and max(late) < 600 and len(set(late)) > 100)
        self.assertNotEqual([*itertools.islice(mf.starts("g", schedule, at("00:00")), 200)], found)
        daemon = SimDaemon({"cron": "0 * * * *", "jitter_s": 1800})
        start = next(start for start, time in mf.starts("f", daemon.schedules[0], at("00:30")) if time > at("00:00"))
        daemon.turn(at("00:30"))
        daemon.started.clear()
        self.assertEqual((daemon.times(), daemon.turn(start - 1)), ([], start))
        daemon.turn(start)
        self.assertEqual(daemon.times(), ["01:00"])

    def test_a_long_absence_costs_little_and_starts_few_at_once(self):
        for schedule, count in (({"every_s": 1, "catchup": "latest"}, 1), ({"every_s": 1, "catchup": "all"}, 1),
                                ({"every_s": 1}, 1), ({"cron": "0 0 1 1 *", "catchup": "latest"}, 1),
                                ({"every_s": 60, "catchup": "all", "overlap": "allow"}, mf.MAX_STARTS)):
            with self.subTest(schedule):
                daemon = SimDaemon(schedule, seconds=10)
                began = time.perf_counter()
                daemon.turn(at("00:30") + 20 * 365 * 86400)
                self.assertLess(time.perf_counter() - began, 1)
                self.assertEqual(len(daemon.started), count)

    def test_whatever_turns_are_taken_and_die_each_time_that_is_due_starts_one_run(self):
        chance = random.Random(4)
        for case in range(60):
            schedules = [{"catchup": "all", "overlap": "allow", "jitter_s": chance.choice([0, 0, 100]), **when}
                         for when in chance.sample([{"every_s": 120}, {"cron": "*/7 * * * *"}, {"cron": "0 * * * *"},
                                                    {"at": "2026-11-21T00:47:11Z"}], chance.randint(1, 3))]
            daemon, now = SimDaemon(*schedules, flow=f"f{case}"), at("00:00")
            while now < at("02:00"):
                daemon.turn(now, dies=chance.random() < 0.3)
                now += chance.choice([1, 30, 60, 61, 900])
            for _ in range(20):
                daemon.turn("02:05")
            expected = [*itertools.takewhile(lambda time: time <= at("02:00"),
                                             mf.upcoming(daemon.schedules, at("00:00")))]
            found = [time for time in sorted(daemon.runs) if at("00:00") < time <= at("02:00")]
            self.assertEqual(found, expected, schedules)       # that it was started once SimDaemon sees itself


class T13State(unittest.TestCase):

    def journal_of(self, seed=7):
        flow, script = random_flow(random.Random(seed))
        run, _, journal = simulate(flow, script)
        return run, journal

    def test_what_is_remembered_is_right_though_another_thread_makes_it_forgotten(self):
        """A question in whose midst so many others are asked that it is forgotten."""
        remember = mf._remembering(str)

        class Question:
            looks, others_at = 0, 0

            def __hash__(self):
                self.looks += 1
                if self.looks == self.others_at:
                    list(map(remember, range(300)))
                return 7

            def __str__(self):
                return "answer"

        for look in range(1, 5):
            question = Question()
            remember(question)
            question.looks, question.others_at = 0, look
            self.assertEqual(remember(question), "answer")

    def test_times_survive_the_way_to_text_and_back(self):
        chance = random.Random(3)
        for _ in range(2000):
            at = round(chance.uniform(0, 4e9), 6)
            self.assertEqual(mf.parse_time(mf.format_time(at)), at)
        self.assertEqual(mf.format_time(1795299240.5), "2026-11-21T22:14:00.500000Z")
        self.assertIsNone(mf.format_time(None))

    def test_a_run_survives_the_way_to_its_file_and_back_at_every_event(self):
        for seed in range(60):
            flow, script = random_flow(random.Random(seed))
            run, _, journal = simulate(flow, script, cancels=[4] if seed % 5 == 0 else [])
            for cut in range(len(journal) + 1):
                part = mf.Run(mf.make_plan(flow), "r")
                for event in journal[:cut]:
                    part.apply(event)
                state = mf.decode_state(state_text(part, cut + 1))
                self.assertEqual(state["seq"], cut + 1)
                again = mf.run_from_json(state)
                self.assertEqual(mf.run_to_json(again), mf.run_to_json(part))
                for event in journal[cut:]:
                    again.apply(event)
                self.assertEqual(mf.run_to_json(again), mf.run_to_json(run))

    def test_a_changed_byte_anywhere_in_state_or_record_is_noticed(self):
        run, journal = self.journal_of()
        for content in (state_text(run, 5),
                        mf.encode_record(mf.event_to_json(journal[0]), 9)):
            self.assertIsNotNone(mf.decode_state(content))
            for at in range(len(content)):
                changed = bytearray(content)
                changed[at] ^= 1 << random.Random(at).randint(0, 7)
                self.assertIsNone(mf.decode_state(bytes(changed)), at)
                self.assertIsNone(mf.decode_state(content[:at]), at)

    def test_run_json_has_the_documented_keys_and_a_line_for_each_task(self):
        run, _ = self.journal_of()
        state = mf.run_to_json(run)
        self.assertLessEqual({"id", "flow", "status", "started", "finished", "duration_s", "params", "ctx",
                              "tasks", "miniflow", "definition"}, set(state))
        for members in state["tasks"].values():
            self.assertLessEqual({"status", "reason", "attempt", "started", "finished", "duration_s",
                                  "inputs", "output", "error", "log", "attempts"}, set(members))
            for attempt in members["attempts"]:
                self.assertLessEqual({"status", "reason", "started", "finished", "duration_s", "error",
                                      "log"}, set(attempt))
        lines = state_text(run, 1).decode().splitlines()
        for name in state["tasks"]:
            self.assertEqual(sum(line.startswith(f' "{name}": {{"status"') for line in lines), 1)

    def test_no_piece_of_a_state_grows_with_the_number_of_tasks(self):
        sizes = []
        for count in (1500, 6000):
            run = mf.Run(mf.make_plan(make(*[task(f"t{n:05}") for n in range(count)])), "r")
            for n in range(count):
                run.apply(mf.AttemptStarted(1.5, f"t{n:05}", 1, None, {}))
            pieces = list(mf.encode_state(run, None, 1, b""))
            sizes.append((max(map(len, pieces)), len(pieces)))
        self.assertEqual(sizes[0][0], sizes[1][0])
        self.assertEqual(sizes[1][1] - sizes[0][1], 4500 // 500)

    def test_the_first_record_of_a_journal_is_one_line_with_what_the_state_file_says(self):
        run, _ = self.journal_of()
        definition = mf.encode_definition(run.plan.flow)
        lines = b"".join(mf.encode_opened(run, {"pid": 1}, 8, definition)).splitlines(keepends=True)
        self.assertEqual(len(lines), 1)
        opened, state = mf.decode_record(lines[0]), mf.decode_state(state_text(run, 8))
        del state["crc"], opened["crc"]
        self.assertEqual(opened, {"event": "opened", "seq": 8, "state": {**state, "engine": {"pid": 1}}})

    def test_a_value_is_stored_where_it_was_made_and_in_the_context_and_nowhere_else(self):
        value = "x" * 100000
        flow = make(task("t0"), *[task(f"t{n}", f"t{n - 1}", args=["${{ ctx.big }}"]) for n in range(1, 300)])
        run = mf.Run(mf.make_plan(flow), "r")
        for n in range(300):
            run.apply(mf.AttemptStarted(n, f"t{n}", 1, None, mf.inputs_of(run, run.plan.tasks[f"t{n}"])))
            run.apply(mf.AttemptEnded(n, f"t{n}", 1, mf.SUCCESS, output=None if n else {"big": value}))
        content = state_text(run, 1)
        self.assertEqual(content.count(b"xxxxx" * 20000), 2)
        self.assertLess(len(content), 2 * 100000 + 300 * 1000)

    def test_what_changed_in_a_flow_is_named(self):
        old = make(task("a"), task("b"), task("c"))
        new = make(task("a"), task("b", max_retries=1), task("d"))
        self.assertEqual(mf.changed_tasks(old, new), {"b": "changed", "d": "added", "c": "removed"})
        self.assertEqual(mf.changed_tasks(old, make(task("a"), task("b"), task("c"), env={"X": 1})),
                         dict.fromkeys("abc", "changed"))
        self.assertEqual(mf.changed_tasks(old, old), {})

    def test_a_reopened_run_keeps_what_ended_well_and_runs_the_rest_and_its_downstream_again(self):
        flow = make(task("a"), task("b", "a", max_retries=1), task("c", "b"), task("d", "a"),
                    task("e", "c", "d", trigger_rule="all_done"))
        old, _, _ = simulate(flow, {"b": {1: (1, 1), 2: (1, 1)}})
        run = mf.reopen(old, flow)
        self.assertEqual(ends(run), {
            "a": "success", "d": "success", "b": "pending", "c": "pending", "e": "pending"})
        world = SimWorld({"b": {3: (1, 1)}})
        for _ in self.finish(run, world):
            pass
        self.assertTrue(run.ok)
        self.assertEqual([a.status for a in run.tasks["b"].attempts],
                         ["failed", "failed", "failed", "success"])
        self.assertEqual(len(run.tasks["a"].attempts), 1)
        self.assertEqual(len(run.tasks["e"].attempts), 2)

    def finish(self, run, world):
        steps, events = mf.drive(run, world, lambda events, happened: None, 4), None
        with contextlib.suppress(StopIteration):
            while True:
                events = world.wait(run, steps.send(events))
                yield events

    def test_an_interrupted_attempt_stays_in_the_record_and_uses_up_no_retry(self):
        flow = make(task("a", max_retries=1))
        run = mf.Run(mf.make_plan(flow), "r")
        run.apply(mf.AttemptStarted(1, "a", 1))
        again = mf.reopen(run, flow)
        for _ in self.finish(again, SimWorld({"a": {2: (1, 1)}})):
            pass
        self.assertTrue(again.ok)
        self.assertEqual([a.status for a in again.tasks["a"].attempts], ["interrupted", "failed", "success"])

    def test_changed_tasks_and_their_downstream_run_again(self):
        old, _, _ = simulate(make(task("a"), task("b", "a"), task("c")), {"c": {1: (1, 1)}})
        run = mf.reopen(old, make(task("a"), task("b", "a", env={"X": 1}), task("c"), task("d", "b")))
        self.assertEqual(ends(run), {"a": "success", "b": "pending", "c": "pending", "d": "pending"})

    def test_a_run_records_how_long_tasks_took_when_they_last_succeeded(self):
        flow = make(task("a"), task("b", "a", max_retries=1), task("c"), task("d", "c"), task("e"))
        run, _, _ = simulate(flow, {"a": {1: (3, 0)}, "b": {1: (9, 1), 2: (2, 0)}, "c": {1: (7, 1)}},
                             durations={"a": 5, "c": 6, "e": 0.5, "gone": 8}, left_out={"e": {}})
        known = {"a": 3, "b": 2, "c": 6, "e": 0.5}
        self.assertEqual(mf.known_durations(run), known)
        content = state_text(run, 1)
        self.assertEqual(mf.decode_durations(content), known)
        again = mf.run_from_json(mf.decode_state(content))
        self.assertEqual(mf.run_to_json(again), mf.run_to_json(run))
        self.assertEqual(mf.reopen(again, flow).plan, mf.reopen(run, flow).plan)
        self.assertEqual(mf.reopen(run, make(task("c"), task("f"))).plan.durations, {"c": 6})
        for at in range(0, len(content), 7):
            self.assertIsNone(mf.decode_durations(content[:at] + bytes([content[at] ^ 1]) + content[at + 1:]), at)
            self.assertIsNone(mf.decode_durations(content[:at]), at)

    def test_a_state_without_durations_is_read_too(self):
        state = mf.run_to_json(simulate(make(task("a")))[0])
        del state["durations"]
        self.assertEqual(mf.run_from_json(state).plan.durations, {})
        content = state_text(simulate(make(task("a")))[0], 1).split(b'"durations": ')
        body = (content[0] + content[1].partition(b"\n")[2]).partition(mf._CRC)[0]
        self.assertIsNone(mf.decode_durations(body + mf._CRC + b'%08x"}\n' % zlib.crc32(body)))

    def test_how_the_journal_is_cut_does_not_change_the_order_of_a_resumed_run(self):
        """Whether what was done is read from the view or from the journal, the rest has the same order."""
        chance = random.Random(3)
        flow, script = random_flow(chance, 20)
        durations = {t.id: 2.0 ** chance.randint(-3, 9) for t in flow.tasks if chance.random() < 0.6}
        run, _, journal = simulate(flow, script, durations=durations)
        for cut in range(0, len(journal), 5):
            part = mf.Run(mf.make_plan(flow, durations=durations), "r")
            for event in journal[:cut]:
                part.apply(event)
            view = mf.run_from_json(json.loads(json.dumps(mf.run_to_json(part))))
            self.assertEqual(mf.reopen(view, flow).plan.key, mf.reopen(part, flow).plan.key)


class T14Invocation(unittest.TestCase):

    def argv(self, args, **params):
        values = mf.Values(params, {}, {}, {}, lambda name: {})
        return mf.args_argv(args, values)

    def test_args_become_arguments_one_element_in_one_element_out(self):
        for args, expected in [
                ((), []), (("a b", "", "*", "$x", "'\"", "é", 5, 1.5, True),
                           ["a b", "", "*", "$x", "'\"", "é", "5", "1.5", "true"]),
                ({"k": "v", "key": "v", "n": 5, "long-one": 1.5},
                 ["-k", "v", "--key=v", "-n", "5", "--long-one=1.5"]),
                ({"v": True, "verbose": True, "q": False, "none": None}, ["-v", "--verbose"]),
                ({"x": [1, "a b"], "tag": ["p", "q"], "no": []},
                 ["-x", "1", "-x", "a b", "--tag=p", "--tag=q"]),
                ({"empty": ""}, ["--empty="]),
                (("${{ params.l }}", "n=${{ params.n }}"), ['["x", 1]', "n=3"]),
                ({"flag": "${{ params.yes }}", "off": "${{ params.no }}", "many": "${{ params.l }}"},
                 ["--flag", "--many=x", "--many=1"])]:
            with self.subTest(args=args):
                self.assertEqual(self.argv(args, l=["x", 1], n=3, yes=True, no=False), expected)

    def test_what_a_task_writes_is_read_as_json_or_as_github_does(self):
        for content, expected in [
                (b"", {}), (b"\n\n", {}), (b'{"a": [1, null]}', {"a": [1, None]}),
                (b' \n{"a": 1}\n', {"a": 1}), (b"\xef\xbb\xbf{}", {}),
                (b"a=1\nb=x=y\n", {"a": "1", "b": "x=y"}), (b"a=\r\n", {"a": ""}),
                (b"a<<EOF\nline 1\nline=2\nEOF\nb=2\n", {"a": "line 1\nline=2", "b": "2"}),
                (b"a<<E\nE\n", {"a": ""}), (b"a=x<<y\n", {"a": "x<<y"}), (b"a=1\na=2\n", {"a": "2"}),
                ("é=ü\n".encode(), {"é": "ü"})]:
            with self.subTest(content=content):
                self.assertEqual(mf.parse_output(content), expected)

    def test_anything_else_a_task_writes_is_refused_with_its_place(self):
        for content, part in [
                (b"[1]", 'line 1, "[1]", is neither a JSON object nor name=value'),
                (b"a=1\nfoo\n", 'line 2, "foo"'),
                (b'{"a": 1, "a": 2}', "output:1:10: a: given twice"), (b'{"a": NaN}', "NaN is not JSON"),
                (b'{"a": 1', "expected a comma or }"),
                (b"a<<EOF\nx\n", 'line 1 opens "a<<EOF", which no line "EOF" closes'),
                (b"=x\n", "line 1 has no name"), (b"\xff\xfe", "byte 0xff at 0 is not UTF-8"),
                (b"{}{}", "after the end")]:
            with self.subTest(content=content), self.assertRaises(ValueError) as caught:
                mf.parse_output(content)
            self.assertIn(part, str(caught.exception))

    def setting(self, **environ):
        return mf.Setting(environ, "/py", "/start", "/tasks", "/tmp/x", "tok", "/ctx", "/out")

    def invoke(self, flow, **environ):
        run = mf.Run(mf.make_plan(flow), "r1", {"a-b": [1], "s": "x"}, flow="stem")
        run.apply(mf.AttemptStarted(1, "t", 1))
        return mf.invoke(run, "t", self.setting(**environ))

    def test_the_environment_is_the_engines_then_the_flows_then_the_tasks_then_miniflows(self):
        flow = make(task("t", env={"B": "task ${{ env.B }}", "C": "${{ env.A }}", "N": 5, "Z": True}),
                    env={"A": "flow ${{ env.A }}", "B": "flow"})
        env = self.invoke(flow, A="engine", MINIFLOW_TASK="outer").env
        self.assertEqual({key: env[key] for key in "ABCNZ"},
                         {"A": "flow engine", "B": "task flow", "C": "flow engine", "N": "5", "Z": "true"})
        self.assertEqual({key: value for key, value in env.items() if len(key) > 1}, {
            "MINIFLOW_RUN_ID": "r1", "MINIFLOW_FLOW": "stem", "MINIFLOW_TASK": "t", "MINIFLOW_ATTEMPT": "1",
            "MINIFLOW_COOKIE": "tok/t/1",
            "MINIFLOW_PARAM_A_B": "[1]", "MINIFLOW_PARAM_S": "x", "MINIFLOW_CONTEXT": "/ctx",
            "MINIFLOW_OUTPUT": "/out", "GITHUB_OUTPUT": "/out", "TMP_DIR": "/tmp/x"})

    def test_each_kind_of_action_becomes_an_argument_vector(self):
        for fields, argv in [
                ({"script": "a/b.py", "args": [1]}, ("/py", "/tasks/a/b.py", "1")),
                ({"script": "b.py", "python": "pypy3"}, ("pypy3", "/tasks/b.py")),
                ({"script": "b.py", "python": "venv/bin/python"}, ("/start/venv/bin/python", "/tasks/b.py")),
                ({"command": "echo $1 $${{", "args": ["x y"]}, ("/bin/sh", "-c", "echo $1 ${{", "sh", "x y")),
                ({"command": ["echo", "${{ params.s }}"], "args": ["z"]}, ("echo", "x", "z"))]:
            with self.subTest(fields=fields):
                self.assertEqual(self.invoke(make(task("t", **fields))).argv, argv)

    def test_the_working_directory_is_relative_to_where_miniflow_was_started(self):
        self.assertEqual([self.invoke(make(task("t", **fields))).cwd for fields in (
            {}, {"cwd": "sub"}, {"cwd": "/abs"}, {"cwd": "${{ params.s }}"})],
            ["/start", "/start/sub", "/abs", "/start/x"])

    def test_the_end_of_an_attempt_is_told_by_its_exit_code_and_by_why_it_was_stopped(self):
        def end(code, stopping=None, cancel=None, output=dict):
            run = mf.Run(mf.make_plan(make(task("t"))), "r")
            run.apply(mf.AttemptStarted(1, "t", 1))
            if cancel:
                run.apply(mf.CancelRequested(1, cancel))
            if stopping:
                run.apply(mf.AttemptStopping(1, "t", 1, stopping))
            event = mf.attempt_end(run, "t", 2, code, stopping, output)
            return event.status, event.reason, event.code

        def bad():
            raise ValueError("output: line 1")

        self.assertEqual(end(0), ("success", None, None))
        self.assertEqual(end(3), ("failed", "exit 3", 3))
        self.assertEqual(end(-9), ("failed", "killed by signal 9", 137))
        self.assertEqual(end(0, "timeout after 5 s"), ("failed", "timeout after 5 s", "timeout"))
        self.assertEqual(end(0, "cancelled by X", "cancelled by X"), ("cancelled", "cancelled by X", None))
        self.assertEqual(end(1, None, "cancelled by X"), ("failed", "exit 1", 1))
        self.assertEqual(end(0, output=bad), ("failed", "bad output: output: line 1", None))


HOSTILE = ["", " ", "a b", "'", '"', "\\", "\\\\'", "$HOME", "$(touch PWN)", "`touch PWN`", "; touch PWN",
           "a[$(touch PWN)]", "x\ny", "\n", "trailing\n\n", "--flag", "-n", "*", "?", "~", "!!", "%s%d",
           "{a,b}", "é\U0001f600", "\x01\x7f\t", "${{x", "$${{ x }}", "&& false", "|| true", "#no", "\\n",
           "a\\", "${HOME}", "$'x'", "\u2028"]


class T15Jobs(unittest.TestCase):

    def plan(self, **fields):
        """Return a run whose task a has started."""
        run = mf.Run(mf.make_plan(make(task("a", executor="slurm", **fields))), "r")
        run.apply(mf.AttemptStarted(1, "a", 1))
        return run

    def test_a_job_keeps_its_own_time_which_does_not_begin_before_it_does(self):
        run = self.plan(timeout_s=3)
        self.assertEqual((run.deadlines, mf.next_wake(run, 1)), ([], None))
        run.apply(mf.AttemptSubmitted(2, "a", 1, "12"))
        self.assertEqual((run.deadlines, run.tasks["a"].attempts[-1].job), ([], "12"))

    def test_jobs_take_up_no_slot_and_have_a_limit_of_their_own(self):
        tasks = [task(f"s{n}", executor="slurm") for n in range(5)] + [task("a"), task("b")]
        run = mf.Run(mf.make_plan(make(*tasks)), "r")
        run.queues.limits[mf.JOBS] = 3
        self.assertEqual([start.task for start in mf.due(run, 0, 1)], ["s0", "s1", "s2", "a"])

    def test_what_only_waits_stays_beside_the_engine(self):
        flow = make(task("a"), task("b", wait_for={"seconds": 1}), task("c", executor="local"),
                    task("d", http={"url": "http://x"}), task("e", executor="slurm"))
        for executor, there in ((None, "e"), ("local", "e"), ("slurm", "ae")):
            flow = flow._replace(executor=executor)
            self.assertEqual("".join(t.id for t in flow.tasks if mf.executor_of(flow, t) == "slurm"), there)

    def test_the_limit_that_slurm_is_given_lies_beyond_our_own(self):
        for fields, minutes in (({}, None), ({"timeout_s": 1}, 3), ({"timeout_s": 60, "grace_s": 0}, 3),
                                ({"timeout_s": 61, "grace_s": 0}, 4), ({"resources": {"time_s": 61}}, 2),
                                ({"timeout_s": 900, "resources": {"time_s": 60}}, 1)):
            with self.subTest(fields):
                self.assertEqual(mf.job_minutes(make(task("a", executor="slurm", **fields)).tasks[0]), minutes)

    def test_resources_become_options_of_sbatch(self):
        resources = {"cpus": 2, "memory_mb": 300, "time_s": 90, "partition": "long,gpu", "gpus": 1}
        item = make(task("a", executor="slurm", resources=resources)).tasks[0]
        argv = mf.sbatch_argv("r", item, "a.1 x", "/o/a%j.log", "/somewhere else")
        for option in ("--cpus-per-task=2", "--mem=300", "--time=2", "--partition=long,gpu", "--gpus=1",
                       "--job-name=mf:r", "--comment=a.1 x", "--output=/o/a%%j.log", "--chdir=/somewhere else",
                       "--no-requeue", "--export=ALL"):
            self.assertIn(option, argv)
        self.assertIn("--output=/o\\\\x/%j", mf.sbatch_argv("r", item, "", "/o\\x/%j", "/"))

    def test_fields_of_jobs_are_checked(self):
        for fields, part in (
                ({"executor": "pbs"}, 'expected one of "local", "slurm"'),
                ({"executor": "slurm", "resources": {"cpu": 1}}, "resources.cpu: unknown field, did you mean cpus?"),
                ({"executor": "slurm", "resources": {"cpus": 0}}, "resources.cpus: expected"),
                ({"executor": "slurm", "resources": {"partition": "a b"}}, "expected the name of a partition"),
                ({"executor": "local", "resources": {"cpus": 1}}, "goes with executor slurm only; remove it"),
                ({"wait_for": {"seconds": 1}, "executor": "slurm"}, "goes with script and command only"),
                ({"flow": "g", "resources": {"cpus": 1}}, "goes with script and command only")):
            with self.subTest(fields):
                self.assertIn(part, "\n".join(errors_of(flow_json(task("a", **fields)))))
        flow = make(task("a"), task("b", executor="local"), task("c", wait_for={"seconds": 0}),
                    defaults={"executor": "slurm", "resources": {"cpus": 4}})
        self.assertEqual([(t.executor, t.resources) for t in flow.tasks],
                         [("slurm", {"cpus": 4}), ("local", {}), (None, {})])

    def test_a_python_function_cant_be_a_job(self):
        flow = make(task("a"))
        a = flow.tasks[0]._replace(action=mf.Function("m:f"), executor="slurm")
        self.assertIn("m:f is a Python function, which can't run on Slurm",
                      mf.check_flow(flow._replace(tasks=(a,)))[0].what)

    def test_a_submission_is_a_number_and_perhaps_a_cluster(self):
        for text, job in (("12\n", "12"), ("12;east\n", "12;east"), ("hello\n12\n", "12"), ("", None),
                          ("ok\n", None), ("12 jobs\n", None), ("Submitted batch job 12\n", None)):
            self.assertEqual(mf.parse_submitted(text), job, text)

    def test_what_sbatch_says_tells_whether_to_try_again(self):
        failed = "sbatch: error: Batch job submission failed: "
        for code, said, meaning in (
                (1, failed + "Invalid partition name specified", "refused"),
                (1, failed + "Requested time limit is invalid (missing or exceeds some limit)", "refused"),
                (1, failed + "Time limit specification required, but not provided", "refused"),
                (1, failed + "Unable to contact slurm controller (connect failure)", "no answer"),
                (1, failed + "Socket timed out on send/recv operation", "no answer"),
                (1, failed + "Job violates accounting/QOS policy (job submit limit, user's size)", "too many"),
                (None, "", "no answer"), (0, "what?", "no answer")):
            self.assertEqual(mf.judge_refusal(code, said), meaning, said)

    def test_only_our_jobs_are_read_from_the_queue_and_odd_lines_mean_that_nothing_is_known(self):
        mine, other = mf.job_comment("a[0]", 2, "/out"), mf.job_comment("a[0]", 2, "/elsewhere")
        text = f"7|RUNNING|{mine}\n8|PENDING|{other}\n9|TIMEOUT|(null)\n10|NODE_FAIL|b.1\n"
        self.assertEqual(mf.parse_queue(text, "/out"), [mf.Queued("7", "RUNNING", "a[0]", 2)])
        text = f"CLUSTER: east\nJOBID|STATE|COMMENT\n7|COMPLETED|{mine}\n\nCLUSTER: west\nJOBID|STATE|COMMENT\n"
        self.assertEqual(mf.parse_queue(text, "/out"), [mf.Queued("7;east", "COMPLETED", "a[0]", 2)])
        self.assertEqual([row.is_live for row in mf.parse_queue(text, "/out")], [False])
        for text in ("squeue: error", "7 RUNNING", "|RUNNING|x", "<html>"):
            with self.assertRaisesRegex(ValueError, "tells of no job"):
                mf.parse_queue(text, "/out")

    def test_the_end_that_a_job_leaves_is_judged_like_that_of_a_process(self):
        def told(code, why=None, **members):
            return {"code": code, "why": why, "began": 10, "ended": 20, **members}

        for fields, end, expected in (
                ({}, told(0), ("success", None, None)), ({}, told(3), ("failed", "exit 3", 3)),
                ({}, told(-9), ("failed", "killed by signal 9", 137)),
                ({"timeout_s": 4}, told(-15, "timeout"), ("failed", "timeout after 4 s", "timeout")),
                ({}, told(127, cannot="no such program"), ("failed", "cannot start: no such program", 127)),
                ({}, told(-15, "signal"), ("failed", "ended by Slurm: somebody has cancelled its job, or it was "
                                           "preempted", 143)),
                ({"resources": {"time_s": 10}}, told(-15, "signal"),
                 ("failed", "Slurm's time limit of 10 s is over", "timeout"))):
            found = mf.job_end(self.plan(**fields), "a", 30, end, dict)
            self.assertEqual((found.status, found.reason, found.code), expected)

    def test_a_job_that_was_through_before_it_was_told_to_stop_has_succeeded(self):
        run = self.plan()
        for event in (mf.CancelRequested(2, "cancelled by SIGTERM"),
                      mf.AttemptStopping(2, "a", 1, "cancelled by SIGTERM")):
            run.apply(event)
        ends = [mf.job_end(run, "a", 9, {"code": code, "why": why}, dict) for code, why in ((0, None), (-15, "signal"))]
        ends.append(mf.job_lost(run, "a", 9, "12", None))
        self.assertEqual([end.status for end in ends], ["success", "cancelled", "cancelled"])

    def test_a_running_job_stays_one_when_its_run_is_reopened(self):
        flow = make(task("a", executor="slurm"), task("b"), task("c", "a"), task("m", executor="slurm", foreach=[1, 2]))
        run = mf.Run(mf.make_plan(flow), "r")
        for event in (mf.AttemptStarted(1, "a", 1), mf.AttemptSubmitted(1, "a", 1, "12"), mf.AttemptStarted(1, "b", 1),
                      mf.TaskExpanded(1, "m", [{"item": 1}, {"item": 2}]), mf.AttemptStarted(2, "m[1]", 1)):
            run.apply(event)
        again = mf.reopen(mf.run_from_json(mf.run_to_json(run)), flow)
        self.assertEqual(ends(again), {"a": "running", "b": "pending", "c": "pending", "m": "running",
                                       "m[0]": "pending", "m[1]": "running"})
        self.assertEqual(list(again.running), ["a", "m[1]"])
        changed = make(task("a", executor="slurm", command="false"), *[mf.task_to_json(t) for t in flow.tasks[1:]])
        again = mf.reopen(run, changed)
        self.assertEqual((ends(again)["a"], again.tasks["a"].attempts[0].status), ("pending", "interrupted"))


class T16Text(unittest.TestCase):

    def test_control_characters_cannot_drive_the_terminal(self):
        for text, shown in [("\x1b]0;pwn\x07", "\\x1b]0;pwn\\x07"), ("\x1b[2J", "\\x1b[2J"),
                            ("\r[ok]", "\\x0d[ok]"), ("\x9b31m", "\\x9b31m"), ("a\u202eb", "a\\u202eb"),
                            ("tab\tnew\nline é", "tab\tnew\nline é")]:
            self.assertEqual(mf.safe(text), shown)
        self.assertEqual(mf.one_line(" a\n\tb\x00 "), "a b\\x00")

    def test_width_counts_columns_and_not_characters(self):
        for text, width in [("abc", 3), ("", 0), ("漢字", 4), ("e\u0301", 1), ("a\u200bb", 2), ("é", 1),
                            ("😀", 2)]:
            self.assertEqual(mf.width_of(text), width, text)
            self.assertEqual(mf.width_of(mf.padded(text, 6)), 6)
        for width in range(1, 9):
            for text in ("漢字漢字", "abcdefghij", "a漢b字c漢", "e\u0301" * 9):
                cut = mf.clip(text, width)
                self.assertLessEqual(mf.width_of(cut), width)
                self.assertTrue(cut == text or cut.endswith("…"), cut)
        rows = mf.format_table([("a", "b"), ("漢字", "x"), ("abcd", "y")]).splitlines()
        self.assertEqual([mf.width_of(row[:row.index(char)]) for row, char in zip(rows, "bxy")], [6, 6, 6])

    def test_long_lines_are_wrapped_where_there_are_blanks(self):
        text = mf.wrapped("one two three four five", 9, "  ")
        self.assertEqual(text, "one two\n  three\n  four\n  five")
        self.assertEqual(mf.wrapped("x" * 30, 9, "  "), "x" * 30)
        self.assertEqual(mf.wrapped("", 9, "  "), "")


class T17Exporters(unittest.TestCase):

    def test_what_a_task_does_is_told_on_one_line(self):
        for fields, told in (
                ({"script": "x.py"}, "script x.py"), ({"command": "echo a"}, "command echo a"),
                ({"command": ["echo", "a b"]}, "command echo a b"), ({"command": "a\nb"}, 'command "a\\nb"'),
                ({"command": "x" * 60}, f'command "{"x" * 48}…'), ({"flow": "g"}, "flow g"),
                ({"http": {"url": "http://h/", "method": "PUT"}}, 'http PUT "http://h/"'),
                ({"wait_for": {"seconds": 3}}, "wait_for seconds 3")):
            with self.subTest(fields):
                self.assertEqual(mf.describe_action(mf.make_task(task("a", **fields))), told)


class T19Graphs(unittest.TestCase):

    DIAMOND = (task("fetch"), task("clean", "fetch"), task("check", "fetch"), task("load", "clean", "check"))

    def random_plan(self, chance, size, edges=0.2):
        return mf.make_plan(make(*[task(f"t{n}", *[f"t{k}" for k in range(n) if chance.random() < edges])
                                   for n in range(size)]))

    def test_the_text_graph_is_a_picture_and_a_list(self):
        self.assertEqual(mf.to_text_graph(mf.make_plan(make(*self.DIAMOND))).splitlines(), [
            "f: 4 tasks, 3 levels", "", "      fetch", "    ┌───┴──┐",
            "    ▼      ▼", "  clean  check", "    └───┬──┘", "        ▼", "      load", "",
            "1", "   fetch  command true", "2",
            "   clean  command true  <- fetch", "   check  command true  <- fetch", "3",
            "   load   command true  <- clean, check"])

    def test_the_list_tells_conditions_rules_instances_and_handlers(self):
        flow = make(task("a"), task("b", "a", script="x.py", description="says\nb"),
                    task("c", "a", "b", trigger_rule="all_done", allow_failure=True, **{"if": "run.id != ''"}),
                    task("d", "a", foreach=[1], max_parallel=2), **{"finally": {"command": "true"}})
        text = mf.to_text_graph(mf.make_plan(flow), width=200)
        for line in ("   b        script x.py  <- a  (says b)",
                     "   c        command true  [if run.id != '', all_done, allow_failure]  <- a, b",
                     "   d        command true  [foreach, 2 at once]  <- a",
                     "after all", "   finally  command true  [finally]"):
            self.assertIn(f"\n{line}\n", text + "\n")
        self.assertIn("d[*]", text)

    def test_a_list_stands_alone_where_the_picture_would_be_too_wide(self):
        wide = mf.make_plan(make(task("a"), *[task(f"task_{n}", "a") for n in range(20)]))
        self.assertEqual(mf.to_text_graph(wide).splitlines()[1:3], ["1", "   a        command true"])
        self.assertIn("▼", mf.to_text_graph(wide, width=300))
        self.assertNotIn("▼", mf.to_text_graph(mf.make_plan(make(task("a"), task("b")))))

    def test_a_picture_in_ascii_has_nothing_else(self):
        plan = mf.make_plan(make(*self.DIAMOND))
        looks = {name: mf.Look(status) for name, status in zip(plan.order, mf.TASK_STATES)}
        self.assertTrue(mf.to_text_graph(plan, looks, mf.ASCII_GLYPHS).isascii())

    def traced(self, lines, labels):
        """Return who is connected with whom in a picture, by following its lines as an eye does."""
        bits = {char: n for n, char in enumerate(mf.GLYPHS.lines)}
        bits["│"] = 3
        where = {}                              # cell to the label that covers it
        for y, line in enumerate(lines):
            for found in re.finditer(r"t\d+", line):
                where.update({(x, y): found[0] for x in range(found.start(), found.end())})
        char = lambda x, y: lines[y][x] if 0 <= y < len(lines) and 0 <= x < len(lines[y]) else " "  # noqa: E731
        seen, found, todo = set(), set(), []
        for (x, y), name in where.items():
            if char(x, y + 1) == "▼" or bits.get(char(x, y + 1), 0) & 1:
                todo.append((name, x, y + 1, 1))
        steps = {1: (0, -1, 2), 2: (0, 1, 1), 4: (-1, 0, 8), 8: (1, 0, 4)}
        while todo:
            name, x, y, back = todo.pop()
            if (name, x, y, back) in seen:
                continue
            seen.add((name, x, y, back))
            if char(x, y) == "▼":
                found.add((name, where[min(((x + d, y + 1) for d in range(-9, 10) if (x + d, y + 1) in where),
                                           key=lambda cell: abs(cell[0] - x))]))
                continue
            bit = bits[char(x, y)]
            ways = [12 - back] if bit == 3 and back & 12 else [way for way in (2, 4, 8) if bit & way and way != back]
            for way in ways:
                dx, dy, other = steps[way]
                if (x + dx, y + dy) not in where:
                    todo.append((name, x + dx, y + dy, other))
        return found

    def test_following_the_lines_of_random_pictures_gives_the_edges_of_the_flow_and_no_others(self):
        drawn = 0
        for seed in range(400):
            chance = random.Random(seed)
            plan = self.random_plan(chance, chance.randint(2, 13), chance.choice([0.1, 0.2, 0.4]))
            lines = mf.draw_text(plan, {name: name for name in plan.order}, mf.GLYPHS, 100)
            if lines is not None:
                drawn += 1
                self.assertEqual(self.traced(lines, plan.order),
                                 {(up, t.id) for t in plan.flow.tasks for up in t.depends_on},
                                 (seed, "\n" + "\n".join(lines)))
                self.assertLessEqual(max(map(len, lines)), 100)
        self.assertGreater(drawn, 300)

    def test_boxes_keep_apart_and_lines_go_from_left_to_right(self):
        for seed in range(30):
            plan = self.random_plan(random.Random(seed), 40, 0.1)
            places = json.loads(json.dumps(mf.layout(plan)))
            boxes = list(places["tasks"].values())
            self.assertEqual(set(places["tasks"]), set(plan.order))
            for (x, y, wide, high), (x2, y2, wide2, high2) in itertools.combinations(boxes, 2):
                self.assertTrue(x + wide <= x2 or x2 + wide2 <= x or y + high <= y2 or y2 + high2 <= y)
            for x, y, wide, high in boxes:
                self.assertTrue(0 <= x and 0 <= y and x + wide <= places["width"] and y + high <= places["height"])
            for up, down, points in places["edges"]:
                self.assertEqual(points[::2], sorted(points[::2]))
                for name, x, y in ((up, *points[:2]), (down, *points[-2:])):
                    if name:
                        left, top, wide, high = places["tasks"][name]
                        self.assertEqual((x in (left, left + wide), y), (True, top + high / 2))

    def test_every_edge_is_drawn_be_it_by_a_joint(self):
        for seed in range(50):
            plan = self.random_plan(random.Random(seed), 30, 0.3)
            _, edges = mf._nodes_and_edges(plan, True)
            joints = collections.defaultdict(lambda: ([], []))
            direct = set()
            for up, down in edges:
                if isinstance(down, tuple):
                    joints[down][0].append(up)
                elif isinstance(up, tuple):
                    joints[up][1].append(down)
                else:
                    direct.add((up, down))
            through = {pair for ups, downs in joints.values() for pair in itertools.product(ups, downs)}
            self.assertEqual(direct | through, {(up, t.id) for t in plan.flow.tasks for up in t.depends_on})
            self.assertFalse(direct & through)

    def test_layers_that_all_wait_for_each_other_have_few_lines(self):
        layers = [[f"{letter}{n}" for n in range(100)] for letter in "abc"]
        plan = mf.make_plan(make(*[task(name, *up) for up, row in zip([[], *layers], layers) for name in row]))
        self.assertEqual(len(mf.layout(plan)["edges"]), 400)

    def test_sorting_the_layers_leaves_few_crossings(self):
        before = after = 0
        for seed in range(40):
            layers = mf.make_layers(self.random_plan(random.Random(seed), 25, 0.12), True)
            before += mf.count_crossings(layers)
            rows = [set(row) for row in layers.rows]
            mf.sort_layers(layers)
            after += mf.count_crossings(layers)
            self.assertEqual([set(row) for row in layers.rows], rows)
        self.assertLess(after, before / 2)
        tree = make(task("t1"), *[task(f"t{n}", f"t{n // 2}") for n in range(2, 64)])
        tree = mf.make_layers(mf.make_plan(tree), True)
        for row in tree.rows:
            random.Random(1).shuffle(row)
        mf.sort_layers(tree)
        self.assertEqual(mf.count_crossings(tree), 0)

    def test_a_line_over_very_many_layers_is_drawn_straight(self):
        chain = [task(f"t{n}", *([f"t{n - 1}"] if n else []), *(["t0"] if n == 99 else [])) for n in range(100)]
        plan = mf.make_plan(make(*chain))
        self.assertEqual([len(points) for up, down, points in mf.layout(plan)["edges"] if (up, down) == ("t0", "t99")],
                         [4])
        self.assertIsNone(mf.draw_text(plan, {name: name for name in plan.order}, mf.GLYPHS, 80))

    def test_the_cost_of_a_layout_grows_with_the_flow(self):
        def calls(size):
            chance = random.Random(1)
            plan = mf.make_plan(make(*[
                task(f"t{n}", *sorted({f"t{chance.randint(max(0, n - 60), n - 1)}" for _ in range(2) if n}))
                for n in range(size)]))
            count = itertools.count()
            sys.setprofile(lambda frame, kind, arg: kind in ("call", "c_call") and next(count))
            try:
                mf.layout(plan)
            finally:
                sys.setprofile(None)
            return next(count)
        self.assertLess(calls(1000), 6 * calls(250))

    def hostile_plan(self):
        """Return a plan and looks that have hostile texts wherever there is room for one."""
        tasks = [task("end")] + [
            task(f"t{n}", "end", description=text, command=f"echo {text}",
                 **{"if": "run.id != " + json.dumps(text)})
            for n, text in enumerate(TRICKY) if "{{" not in text]
        plan = mf.make_plan(make(*tasks, task("many", "t0", foreach=[1]), description=TRICKY[0],
                                 **{"finally": {"command": "true"}}))
        states, texts = itertools.cycle([*mf.TASK_STATES, "interrupted"]), itertools.cycle([*TRICKY, "\x00", "\ud800"])
        return plan, {name: mf.Look(status, text) for name, status, text in zip(plan.order, states, texts)}

    def told(self, plan, looks, name):
        """Return what has to stand in the box of a task."""
        return [mf.one_line(text) for text in mf._told_lines(plan.tasks[name], looks.get(name))]

    def test_mermaid_has_every_text_as_text(self):
        plan, looks = self.hostile_plan()
        head, *lines = mf.to_mermaid(plan, looks).splitlines()
        self.assertEqual(head, "flowchart LR")
        boxes, edges, styled = {}, set(), {}
        for line in lines:
            box = re.fullmatch(r"  t(\d+)(?:\[\[|\(\[|\{\{|\[)\"([^\"]*)\"(?:\]\]|\]\)|\}\}|\])", line)
            edge = re.fullmatch(r"  t(\d+) --> t(\d+)", line)
            style = re.fullmatch(r"  class ((?:t\d+,?)+) (\w+)|"
                                 r"  classDef \w+ fill:#\w{6},stroke:#\w{6},color:#\w{6}", line)
            if box:
                parts = box[2].split("<br/>")
                self.assertTrue(all(re.fullmatch(r"(?:[\w .\-]|#\d+;)*", part) for part in parts), line)
                boxes[plan.order[int(box[1])]] = [re.sub(r"#(\d+);", lambda m: chr(int(m[1])), part) for part in parts]
            elif edge:
                edges.add((plan.order[int(edge[1])], plan.order[int(edge[2])]))
            else:
                self.assertTrue(style, line)
                styled.update((plan.order[int(name[1:])], style[2]) for name in (style[1] or "").split(",") if name)
        self.assertEqual(boxes, {name: self.told(plan, looks, name) for name in plan.order})
        self.assertEqual(edges, {(up, t.id) for t in plan.flow.tasks for up in t.depends_on if not t.handler})
        self.assertEqual(styled, {name: look.status for name, look in looks.items()})

    def read_dot(self, text):
        """Return the label of each node and the edges of a graph in Graphviz's language."""
        token = re.compile(r'\s*("(?:[^"\\]|\\.)*"|->|[\w#]+|[{}\[\]=])', re.S)
        tokens, at = [], 0
        while text[at:].strip():
            found = token.match(text, at)
            self.assertTrue(found, text[at:at + 50])
            tokens.append(found[1])
            at = found.end()
        labels, edges, name = {}, set(), None
        for n, word in enumerate(tokens):
            if re.fullmatch(r"t\d+", word):
                name = word
                if tokens[n - 1] == "->":
                    edges.add((tokens[n - 2], word))
            elif word == "label":
                labels[name] = tokens[n + 2][1:-1]
        return labels, edges

    def test_graphviz_gets_every_text_as_text(self):
        plan, looks = self.hostile_plan()
        labels, edges = self.read_dot(mf.to_dot(plan, looks))
        plain = lambda part: re.sub(r"\\(.)", r"\1", part).replace("&amp;", "&")  # noqa: E731
        self.assertEqual({plan.order[int(name[1:])]: [plain(part) for part in re.split(r"(?<!\\)(?:\\\\)*\\n", label)]
                          for name, label in labels.items() if "\\\\" not in label},
                         {name: self.told(plan, looks, name) for name in plan.order
                          if "\\" not in "".join(self.told(plan, looks, name))})
        self.assertEqual({(plan.order[int(up[1:])], plan.order[int(down[1:])]) for up, down in edges},
                         {(up, t.id) for t in plan.flow.tasks for up in t.depends_on if not t.handler})

    @needs("dot", always=False)
    def test_graphviz_itself_shows_every_text_as_it_is(self):
        import xml.etree.ElementTree as ElementTree
        plan, looks = self.hostile_plan()
        drawn = subprocess.run(["dot", "-Tsvg"], input=mf.to_dot(plan, looks).encode(), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, timeout=60)
        self.assertEqual((drawn.returncode, drawn.stderr), (0, b""))
        texts = [text.text for text in ElementTree.fromstring(drawn.stdout).iter("{http://www.w3.org/2000/svg}text")]
        self.assertEqual(collections.Counter(" ".join(text.split()) for text in texts),
                         collections.Counter(line for name in plan.order for line in self.told(plan, looks, name)))

    def test_svg_is_sound_xml_with_every_text_as_text(self):
        import xml.etree.ElementTree as ElementTree
        plan, looks = self.hostile_plan()
        for given in ({}, looks):
            root = ElementTree.fromstring(mf.to_svg(plan, given))
            tags = {part.tag.rpartition("}")[2] for part in root.iter()}
            self.assertEqual(tags, {"svg", "title", "style", "rect", "path", "g", "text"})
            titles = [part.findtext("{*}title") for part in root.iter("{http://www.w3.org/2000/svg}g")]
            for name in plan.order:
                title = next(title for title in titles if title.split("\n")[0] == name)
                self.assertIn(mf.one_line(plan.tasks[name].description), title)
                self.assertTrue(all(char == "\n" or char.isprintable() for char in title), title)

    def test_every_state_has_a_look_in_every_picture(self):
        for state in (*mf.TASK_STATES, "interrupted"):
            self.assertIn(f".{state}", mf.STATE_STYLE.replace(",.", " ."))
            self.assertIn(state, mf._FILLS)
            self.assertEqual([len(glyphs.marks[state]) for glyphs in (mf.GLYPHS, mf.ASCII_GLYPHS)], [1, 1])

    def test_a_run_is_drawn_with_its_states(self):
        flow = make(task("a", max_retries=1), task("b", "a"), task("c", "b"), task("d", foreach=[1, 2]))
        run, _, _ = simulate(flow, {"a": {1: (1, 1)}, "b": {1: (2, 3)}})
        looks = mf.looks_of(run)
        self.assertEqual(looks, {
            "a": ("success", "2.00 s, 2 attempts"), "b": ("failed", "2.00 s, exit 3"),
            "c": ("upstream_failed", "upstream b failed"), "d": ("success", "1.00 s, 2 success")})
        self.assertIn("✓ a", mf.to_text_graph(run.plan, looks))
        running = mf.Run(run.plan, "r")
        running.apply(mf.AttemptStarted(0, "a", 1))
        self.assertEqual([mf.looks_of(running, live)["a"].status for live in (True, False)], ["running", "interrupted"])


def outputs_that_are_refused():
    """Return tasks whose output the engine does not take, and one, good, that hands something on."""
    said = {"nul": "{\\\"a\\\": \\\"x\\\\u0000y\\\"}", "deep": '{\\"a\\": ' + "[" * 70 + "]" * 70 + "}",
            "long": '{\\"a\\": ' + "9" * 400 + "}", "open": "n<<END", "good": "a=1"}
    return [*(task(name, command=f'printf %s "{text}" >"$MINIFLOW_OUTPUT"') for name, text in said.items()),
            task("large", command="head -c 17000000 /dev/zero | tr '\\0' x >$MINIFLOW_OUTPUT")]


def flow_with_instances_and_handlers(seed, size, least):
    """Return the tasks of a random flow as commands that end as told, some many times, and handlers."""
    shell = "shift $((MINIFLOW_ATTEMPT - 1)); exit $1"
    chance = random.Random(seed)
    flow, script = random_flow(chance, size, conditions=False)
    tasks = []
    for t in mf.flow_to_json(flow)["tasks"]:
        codes = [script[t["id"]][k][1] for k in range(1, 5)]
        t.update(backoff_s=0, jitter=0, command=shell, args=codes)
        for name in ("timeout_s", "pool"):
            t.pop(name, None)
        if chance.random() < 0.2:
            t.update(foreach=[1, 2][:chance.randint(least, 2)])
        tasks.append(t)
    return tasks, {name: {"command": shell, "args": [chance.choice([0, 1])]} for name in mf.HANDLERS
                   if chance.random() < 0.5}


class T20Bash(unittest.TestCase):

    def script(self, project, name="f", *args):
        code, out, err = project.main("run", name, "--dry-run", *args)
        self.assertEqual(code, 0, err)
        return out.strip()

    def start_script(self, project, path, *args, **env):
        process = subprocess.Popen(["bash", path, *args], cwd=project.path, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                                   env={**os.environ, "PYTHON": sys.executable, **env})
        self.addCleanup(lambda: process.poll() is None and process.terminate())
        return process

    def end_of_script(self, process):
        """Return the exit code of a script, its table of ends (end and attempts) and where its logs are."""
        out, err = process.communicate(timeout=60)
        logs = re.search(r"logs and ends\.tsv: (.*)", err.decode("utf-8", "replace"))
        self.assertTrue(logs, err)
        with open(os.path.join(logs[1], "ends.tsv"), "rb") as file:
            self.assertEqual(file.read(), out)
        self.reasons = {row[0]: row[3] for row in (line.split("\t") for line in out.decode().splitlines())}
        rows = [line.split("\t") for line in out.decode().splitlines()]
        return process.returncode, {row[0]: (row[1], int(row[2])) for row in rows}, logs[1]

    def run_script(self, project, path, *args, **env):
        return self.end_of_script(self.start_script(project, path, *args, **env))

    def table(self, run):
        return {name: (t.status, len(t.attempts)) for name, t in run.tasks.items()}

    def test_what_only_miniflow_can_do_is_refused_for_bash_by_name(self):
        flow = make(task("a", inputs=["x"]), task("b", http={"url": "http://x"}), task("c", wait_for={"seconds": 1}),
                    task("d", foreach=[1]), task("e", matrix={"x": [1]}), task("f", env={"UID": "1"}),
                    task("g", env={"mf_end": "1"}), task("h", **{"if": "params.x == '\x1b'"}),
                    params={"x": ""}, **{"finally": {"flow": "g"}})
        with self.assertRaises(mf.UsageError) as caught:
            mf.to_bash(mf.make_plan(flow), {"x": ""}, "tasks")
        self.assertEqual(re.findall(r"(?m)^task \w+: [^ ]+", str(caught.exception)), [
            "task a: inputs", "task b: http", "task c: wait_for", "task d: foreach:", "task e: matrix:",
            "task f: env.UID:", "task g: env.mf_end:", "task h: if:", "task finally: flow"])
        rest = {name: {} for name in "abcdefgh"}
        self.assertNotIn("task_1", mf.to_bash(mf.make_plan(flow._replace(tasks=flow.tasks[:-1]), rest), {}, "").text)

    def test_instances_and_conditions_are_shown_by_the_graph(self):
        flow = make(task("a", foreach=[1]), task("b", matrix={"x": [1]}))
        self.assertIn("a  command true  [foreach]\n   b  command true  [matrix]",
                      mf.to_text_graph(mf.make_plan(flow)))
        with one(task("a", **{"if": "params.x == '\x1b[31m'"})) as project:
            _, shown, _ = project.main("graph", "f")
            self.assertIn(r"[if params.x == '\x1b[31m']", shown)

    def test_a_task_of_the_script_sees_nothing_of_the_script_and_what_its_flow_sets(self):
        flow = {"id": "other", "io": "x", "v": "y", "flow": "z", "PYTHON": "python3"}
        own = {"n": "${{ run.id }}", "mask": "${{ env.HOME }}"}
        with one(task("a", command=["env", "-0"], env=own), env=flow, params={"p-q": 1}) as project:
            path = self.script(project)
            outer = set(re.findall(r"\b[a-z]\w*(?==)", project.read(path))) | {"up", "n", "at"}
            os.environ.update(dict.fromkeys(outer - {"mf_flow"}, "outer"))
            run = project.run()
            _, _, logs = self.run_script(project, path)
            for name in outer:
                os.environ.pop(name, None)
            with open(os.path.join(logs, "a.1.log"), "rb") as file:
                seen = dict(part.split(b"=", 1) for part in file.read().split(b"\0") if part)
            expected = dict(part.split(b"=", 1) for part in project.log(run.id, "a").split(b"\0") if part)
            apart = {b"OLDPWD", b"PWD", b"SHLVL", b"_", b"MINIFLOW_COOKIE"}
            ours = {name.encode() for name in outer if name.startswith("mf_")}
            self.assertEqual(set(seen) - apart, set(expected) - apart - ours)
            for name, value in flow.items():
                self.assertEqual(seen[name.encode()], value.encode())
            self.assertEqual((seen[b"MINIFLOW_PARAM_P_Q"], seen[b"up"]), (b"1", b"outer"))

    def test_the_script_and_the_engine_agree_on_directories_interpreters_and_variables(self):
        show = 'import json, os, sys; json.dump([os.getcwd(), sys.argv[1:], os.environ.get("X")], open(%r, "w"))'
        with Project(scripts={"s.py": ""}) as project:
            os.symlink(sys.executable, project.at("py"))
            os.mkdir(project.at("-"))
            project.write("tasks/s.py", show % project.at("seen.json"))
            for fields in ({"cwd": "-"}, {"cwd": "tasks", "python": "./py"}, {"cwd": "${{ params.d }}/tasks"},
                           {"env": {"X": "${{ env.Y }}"}}, {"env": {"PATH": "/nowhere", "X": "${{ ctx.d }}"}},
                           {"args": ["${{ env.UID_ }}"]}, {"args": ["x" * 60000] * 4}):
                project.write("flows/f.json", json.dumps(flow_json(
                    task("a", script="s.py", **fields), env={"Y": "a b", "UID_": "1", "PYTHON": "/bin/false"})))
                with self.subTest(fields=str(fields)[:60]):
                    seen = []
                    project.run(params={"d": project.path})
                    seen.append(project.read("seen.json"))
                    code, _, _ = self.run_script(project, self.script(project, "f", "--param", f"d={project.path}"))
                    seen.append(project.read("seen.json"))
                    self.assertEqual((code, seen[0]), (0, seen[1]))

    def test_the_same_flow_gives_the_same_bytes(self):
        plan = mf.make_plan(make(task("a"), task("b", "a", args={"x": "${{ params.p }}"})))
        self.assertEqual(mf.to_bash(plan, {"p": 1}, "/t"), mf.to_bash(plan, {"p": 1}, "/t"))

    @needs("shellcheck")
    def test_the_script_passes_bash_n_and_shellcheck_and_its_comments_hold_no_text_of_the_flow(self):
        with one(task("a", script="s.py", args=[v.replace("${{", "$${{") for v in HOSTILE],
                      env={"X": "${{ env.HOME }}"}, stdin="it's", description="FREE # $(text)"),
                 task("b", "a", max_retries=3, backoff_s=0.5, jitter=0.5, timeout_s=2, grace_s=0, pool="p",
                      retry_on=[1, "timeout"], args=["${{ tasks.a.outputs.x }}", "${{ tasks.a.status }}"],
                      trigger_rule="all_done", cwd="${{ run.id }}", stdin="${{ ctx.x }}"),
                 task("c", args={"l": "${{ params.l }}", "v": "${{ params.v }}"}), pools={"p": 2}, timeout_s=9,
                 scripts={"s.py": ""}, env={"Y": "${{ params.p }}"}, description="FREE\nrm -rf",
                 params={"p": "$(x)'", "l": [1], "v": True}, **{"finally": {"command": "true"}}) as project:
            for path in (self.script(project), self.script(project, "f", "--only", "b")):
                for tool in (["bash", "-n"], ["shellcheck"]):
                    done = subprocess.run([*tool, path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
                    self.assertEqual((done.returncode, done.stdout), (0, b""))
                self.assertNotIn("FREE", project.read(path))

    def random_script_flow(self, chance, **options):
        """Return the JSON of a flow whose tasks note that they start, with a SimWorld script for it."""
        flow, script = random_flow(chance, 8, conditions=False)
        tasks, fields = mf.flow_to_json(flow)["tasks"], {"pools": dict(flow.pools), **options}
        note = 'echo "$MINIFLOW_TASK" >>starts; shift $((MINIFLOW_ATTEMPT - 1)); sleep ${SLEEP:-0}; exit $1'
        fields.update({name: {"command": note, "args": ["0"]} for name in mf.HANDLERS if chance.random() < 0.3})
        for t in tasks:
            plan = script[t["id"]]
            t.update(backoff_s=0, command=note, args=[plan[k][1] for k in range(1, 5)])
            t.pop("timeout_s", None)
            slow = chance.random() < 0.08
            if slow:
                t.update(timeout_s=0.1, env={"SLEEP": "9"})
            script[t["id"]] = {k: (9 if slow else 0, code) for k, (_, code) in plan.items()}
        return flow_json(*tasks, **fields), {**script, **{name: {1: (0, 0)} for name in mf.HANDLERS}}

    def agree(self, seeds, slots, **options):
        """Hold scripts against the scheduler; a few run at a time."""
        running = collections.deque()

        def compare(seed, project, run, world, process):
            with self.subTest(seed=seed):
                code, table, _ = self.end_of_script(process)
                self.assertEqual(self.table(run), table)
                self.assertEqual({name: t.reason or "" for name, t in run.tasks.items()}, self.reasons)
                self.assertEqual(code, 0 if run.ok else 1)
                starts = project.read("starts").split() if os.path.exists(project.at("starts")) else []
                expected = [line.split()[2] for line in world.log if " start " in line]
                self.assertEqual(*(f(x) for x in (starts, expected) for f in [list if slots == 1 else sorted]))

        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        for seed in seeds:
            chance = random.Random(seed)
            flow, script = self.random_script_flow(chance, **{k: v(chance) for k, v in options.items()})
            parsed = mf.parse_flow(json.dumps(flow), "f.json")
            run, world, _ = simulate(parsed, script, slots)
            project = stack.enter_context(Project())
            project.write("f.sh", mf.to_bash(mf.make_plan(parsed), {}, "/t").text)
            process = self.start_script(project, "f.sh", f"-j{slots}")
            running.append((seed, project, run, world, process))
            if len(running) > 3:
                compare(*running.popleft())
        while running:
            compare(*running.popleft())

    def test_script_and_scheduler_do_the_same_in_the_same_order_with_one_slot(self):
        self.agree(range(120), 1, fail_fast=lambda chance: chance.random() < 0.3)

    def test_script_and_scheduler_end_alike_with_four_slots(self):
        self.agree(range(1000, 1080), 4)

    def test_engine_and_script_hand_on_the_same_outputs(self):
        """Every task's end, its attempts, what it sees, and the exit code."""
        for seed in range(12):
            chance = random.Random(seed)
            flow, script = random_flow(chance, 7, conditions=False)
            tasks = []
            for t in mf.flow_to_json(flow)["tasks"]:
                codes = [script[t["id"]][k][1] for k in range(1, 5)]
                seen = 'cp "$MINIFLOW_CONTEXT" seen-$WHO-$MINIFLOW_TASK; shift $((MINIFLOW_ATTEMPT - 1)); '
                writes = ('echo "{\\"$MINIFLOW_TASK\\": [$MINIFLOW_ATTEMPT], \\"last\\": \\"$MINIFLOW_TASK\\"}" '
                          '>$MINIFLOW_OUTPUT; ' if chance.random() < 0.6 else "")
                t.update(backoff_s=0.01, jitter=0, command=seen + writes + "exit $1", args=codes, grace_s=1)
                t.pop("timeout_s", None)
                tasks.append(t)
            left_out = ["--skip", chance.choice(tasks)["id"]] if len(tasks) > 1 and chance.random() < 0.3 else []
            with self.subTest(seed=seed), one(*tasks, pools=dict(flow.pools)) as project:
                seen = []
                for who in ("engine", "script"):
                    os.environ["WHO"] = who
                    if who == "engine":
                        code = project.main("run", "f", "-j2", "--run-id", "r", *left_out)[0]
                        state = project.state("r")["tasks"]
                        table = {name: (t["status"], len(t.get("attempts", ()))) for name, t in state.items()}
                    else:
                        code, table, _ = self.run_script(project, self.script(project, "f", *left_out))
                    seen.append((code, table, {name: json.loads(project.read(f"seen-{who}-{name}")) for name in table
                                               if os.path.exists(project.at(f"seen-{who}-{name}"))}))
                del os.environ["WHO"]
                self.assertEqual(*seen)

    def test_hostile_values_reach_the_tasks_of_the_script_byte_for_byte(self):
        show = ('import json, os, sys; json.dump([sys.argv[1:], os.environ["V"], os.environ["W"], '
                'sys.stdin.read(), os.environ["P"], json.load(open(os.environ["MINIFLOW_CONTEXT"]))["ctx"]], '
                'open("seen-%s.json" % os.environ["MINIFLOW_TASK"], "w"))')
        tasks, given = [], {}
        for n, value in enumerate(HOSTILE):
            literal, name = value.replace("${{", "$${{"), f"${{{{ params.p{n} }}}}"
            given[f"p{n}"] = value
            tasks.append(task(f"t{n}", command=[sys.executable, "-c", show, literal, name, f"x${{{{ env.IN{n} }}}}"],
                              args={"key": name, "k": literal, "mixed": "<" + name},
                              env={"V": literal, "W": f"${{{{ env.IN{n} }}}}", "P": name}, stdin=literal + name))
            os.environ[f"IN{n}"] = value
        self.addCleanup(lambda: [os.environ.pop(f"IN{n}") for n in range(len(HOSTILE))])
        words = [word for name, value in given.items() for word in ("--param", f"{name}={value}")]
        with one(*tasks, params={name: "" for name in given}) as project:
            for way in ("engine", "made", "given"):
                if way == "engine":
                    project.run(params=given)
                else:
                    path = self.script(project, "f", *(words if way == "made" else []))
                    code, _, _ = self.run_script(project, path, *(words if way == "given" else []))
                    self.assertEqual(code, 0)
                for n, value in enumerate(HOSTILE):
                    with self.subTest(value=value, way=way):
                        self.assertEqual(json.loads(project.read(f"seen-t{n}.json")), [
                            [value, value, "x" + value, f"--key={value}", "-k", value, f"--mixed=<{value}"],
                            value, value, value * 2, value, given])
                        os.unlink(project.at(f"seen-t{n}.json"))
            self.assertFalse(os.path.exists(project.at("PWN")))

    def embedded(self):
        """Return the functions of the script's Python program."""
        source = mf._BASH_PYTHON.partition("mf_py='")[2].rpartition("\nif verb")[0]
        names, argv = {}, sys.argv
        sys.argv = ["-c", "", ""]
        try:
            exec(compile(source, "mf_py", "exec"), names)
        finally:
            sys.argv = argv
        return names

    def test_the_script_reads_params_and_outputs_as_the_engine_does(self):
        ours = self.embedded()
        texts = ["", "a", "1", "-7", "1.5", "1e3", "1e999", "true", "false", "null", "NaN", "[1]", '["a"]', "[]", "{}",
                 '{"a": 1}', '{"a": 1, "a": 2}', " 3 ", "01", "[" * 65 + "]" * 65, "[" * 64 + "]" * 64, "9" * 400,
                 '"\\u0000"', '["\\ud800"]', '"x"', "ab", "abc", "2", "5", "\udce9"]
        params = {n: param for n, param in enumerate([
            {"type": kind} for kind in mf.PARAM_TYPES] + [
            1, 0.5, True, None, "x", [1], {"default": {"k": 1}}, {"enum": ["ab", "a"]}, {"enum": [1, 2]},
            {"type": "integer", "min": 2, "max": 4}, {"type": "string", "min": 1, "max": 2, "pattern": "^a"},
            {"type": "array", "min": 1}, {"type": "number", "max": 1.5}, {"type": "string", "enum": ["1"]}])}
        flow = make(task("a"), params={f"p{n}": {**param, **({} if "enum" in param or "default" in param else {
            "required": True})} if isinstance(param, dict) else param for n, param in params.items()})
        declared = json.loads(re.search(r"(?m)^mf_declared='(.*)'$", mf.to_bash(
            mf.make_plan(flow), {}, "").text)[1].replace("'\\''", "'"))

        def engine(name, text, param):
            given = {name: mf.parse_param(name, text, param)}
            return mf.complete_params(mf.Flow("f", (), params={name: param}), given)[name]

        for name, param in flow.params.items():
            for text in texts:
                found = []
                for read in (engine, ours["convert"]):
                    try:
                        value = read(name, text, param if read == engine else declared[name])
                        found.append((type(value), value))
                    except ValueError:
                        found.append("refused")
                with self.subTest(param=param, text=text):
                    self.assertEqual(*found)
        outputs = ['{"a": 1}', ' \n{"a": [null]}', '{"a": 1', '{"a": "\\ud800"}', "[1]", "a=1\nb=2\r\n", "a", "",
                   "a<<E\nx\ny\nE\n", "a<<E\nx\n", "=1", "<<E\nE", "a=b<<c", '{"a": 1e999}', '{"a": NaN}',
                   '{"a": %s}' % ("9" * 400)]
        for text in outputs:
            with tempfile.TemporaryDirectory() as folder, self.subTest(output=text):
                with open(f"{folder}/out", "w", newline="") as file:
                    file.write(text)
                ours["io"] = folder
                try:
                    ours["take"]("a", "1", f"{folder}/out")
                    found = ours["load"]("1.json")[1] if os.path.exists(f"{folder}/1.json") else {}
                except SystemExit:
                    found = "refused"
                try:
                    expected = mf.parse_output(text.encode())
                except ValueError:
                    expected = "refused"
                self.assertEqual(found, expected)

    def test_params_given_to_the_script_are_what_they_are_declared_to_be(self):
        values = {"v": (False, "true"), "l": ([1], '["a b", 2]'), "o": ({"k": [0]}, '{"k": [5]}'), "n": (3, "4"),
                  "x": (None, "true"), "s": ("", "'\n"), "f": (0.5, "1")}
        args = {"v": "${{ params.v }}", "long": ["${{ params.l }}", "${{ params.n }}", True, "${{ params.x }}"],
                "o": "${{ params.o.k }}", "f": "${{ params.f }}", "s": "${{ params.s }}", "c": "${{ ctx.v }}"}
        with one(task("a", command=["printf", "%s\\0"], args=args),
                 params={name: made for name, (made, _) in values.items()}) as project:
            path = self.script(project)
            for given in ({}, {name: text for name, (_, text) in values.items()}):
                words = [word for name, text in given.items() for word in ("--param", f"{name}={text}")]
                code, run_id, err = project.main("run", "f", *words)
                self.assertEqual(code, 0, err)
                code, _, logs = self.run_script(project, path, *words)
                with open(f"{logs}/a.1.log", "rb") as file:
                    self.assertEqual((code, file.read()), (0, project.log(run_id.strip(), "a")))

    def test_what_cant_be_given_to_the_script_is_told_at_once_with_exit_code_2(self):
        with one(task("a"), params={"n": 1, "day": {"type": "string", "pattern": "^2"}}) as project:
            path = self.script(project, "f", "--param", "day=2")
            for args, told in (
                    (["--param", "n=x", "--param=day=1", "--param", "z=1", "--param", "n"], [
                        '--param n: expected a number, got "x"', 'params.day: expected a string that matches ^2, '
                        'got "1"', "params.z: there is no such param; there is n, day",
                        '--param "n": expected NAME=VALUE']),
                    (["-j0"], ["-j '0': expected a number from 1 on"]), (["-j"], ["-j: its value is missing"]),
                    (["x"], ["'x': there is no such option; there are -j N and --param NAME=VALUE"])):
                with self.subTest(args=args):
                    process = self.start_script(project, path, *args, TMPDIR=project.at("tasks"))
                    out, err = process.communicate(timeout=20)
                    self.assertEqual((process.returncode, out, err.decode().splitlines()), (2, b"", told))
            self.assertEqual((os.listdir(project.at("tasks")), os.path.exists(project.at("miniflow_output/logs"))),
                             ([], False))

    def test_a_timeout_in_the_script_kills_the_whole_group_and_so_does_a_signal(self):
        hang = ("import subprocess, sys, os; p = subprocess.Popen(['sh', '-c', 'trap \"\" TERM; sleep 60 & wait; "
                "wait']); open('pids', 'w').write(str(p.pid)); p.wait()")
        with one(task("a", command=[sys.executable, "-c", hang], timeout_s=0.5, grace_s=0.3)) as project:
            path = self.script(project)
            code, table, _ = self.run_script(project, path)
            self.assertEqual((code, table, self.reasons["a"]), (1, {"a": ("failed", 1)}, "timeout after 0.5 s"))
            self.assertFalse(alive(int(project.read("pids"))))
        for number, expected in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)):
            with self.subTest(number=number), one(
                    task("a", command=[sys.executable, "-c", hang], grace_s=0.2), task("b", "a"),
                    task("c", command="exit 1", max_retries=5, backoff_s=9),
                    **{"finally": {"command": "true"}, "on_failure": {"command": "true"}}) as project:
                os.mkdir(project.at("tmp"))
                process = self.start_script(project, self.script(project), "-j2", TMPDIR=project.at("tmp"))
                pid = int(wait_for(lambda: os.path.exists(project.at("pids")) and project.read("pids"), "the task"))
                os.kill(process.pid, number)
                code, table, _ = self.end_of_script(process)
                self.assertEqual((code, {name: end for name, (end, _) in table.items()}), (expected, {
                    "a": "cancelled", "b": "cancelled", "c": "cancelled", "on_failure": "cancelled",
                    "finally": "success"}))
                self.assertEqual(self.reasons["b"], f"cancelled by {signal.Signals(number).name}")
                self.assertEqual((alive(pid), os.listdir(project.at("tmp"))), (False, []))

    def test_a_second_signal_kills_what_runs_at_once_and_finally_does_not_run(self):
        stubborn = "trap '' TERM; echo $$ >pid; sleep 60 & wait; wait"
        with one(task("a", command=stubborn, grace_s=60), **{"finally": {"command": "true"}}) as project:
            process = self.start_script(project, self.script(project))
            pid = int(wait_for(lambda: os.path.exists(project.at("pid")) and project.read("pid"), "the task"))
            process.terminate()
            with self.assertRaises(subprocess.TimeoutExpired):
                process.wait(0.5)
            process.terminate()
            code, table, _ = self.end_of_script(process)
            self.assertEqual((code, table), (143, {"a": ("cancelled", 1), "finally": ("cancelled", 0)}))
            self.assertFalse(alive(pid))

    def test_handlers_of_a_script_whose_time_is_over_run_except_on_success(self):
        handlers = {name: {"command": "true"} for name in mf.HANDLERS}
        with one(task("a", command="sleep 60"), task("b", "a"), timeout_s=0.4, **handlers) as project:
            run = project.run()
            code, table, _ = self.run_script(project, self.script(project))
            self.assertEqual((code, table), (1, self.table(run)))
            self.assertEqual(self.reasons, {name: t.reason or "" for name, t in run.tasks.items()})
            self.assertEqual((table["a"], table["on_success"], table["on_failure"], table["finally"]),
                             (("cancelled", 1), ("cancelled", 0), ("success", 1), ("success", 1)))

    def test_pools_slots_and_the_rest_of_a_group_hold_in_the_script(self):
        note = "echo + $MINIFLOW_TASK >>log; sleep 0.1; echo - $MINIFLOW_TASK >>log"
        tasks = [task(f"{pool}{n}", command=note, **({} if pool == "z" else {"pool": pool}))
                 for n in range(6) for pool in "xyz"]
        with one(*tasks, pools={"x": 1, "y": 2}) as project:
            code, _, _ = self.run_script(project, self.script(project), "-j", "5")
            running, most = collections.Counter(), collections.Counter()
            for mark, name in (line.split() for line in project.lines("log")):
                for of in (name[0], "all"):
                    running[of] += 1 if mark == "+" else -1
                    most[of] = max(most[of], running[of])
            self.assertEqual((code, most["x"], most["y"], most["all"]), (0, 1, 2, 5))
        with one(task("a", command="sleep 60 & echo $! >pid", grace_s=9), task("b", "a")) as project:
            began = time.monotonic()
            code, table, _ = self.run_script(project, self.script(project))
            self.assertEqual((code, table), (0, {"a": ("success", 1), "b": ("success", 1)}))
            self.assertFalse(alive(int(project.read("pid"))))
            self.assertLess(time.monotonic() - began, 8)

    def test_a_retry_of_the_script_waits_without_a_slot_or_a_pool(self):
        note = "echo $MINIFLOW_TASK >>log; "
        with one(task("a", command=note + "[ $MINIFLOW_ATTEMPT = 2 ]", max_retries=1, backoff_s=0.7, priority=9,
                      pool="p"), task("b", command=note, pool="p"), task("c", command=note), pools={"p": 1}) as project:
            code, table, _ = self.run_script(project, self.script(project), "-j1")
            self.assertEqual((code, table["a"], project.read("log").split()), (0, ("success", 2), list("abca")))

    def test_bad_output_and_what_cant_start_fail_the_task_in_the_script_too(self):
        with one(task("a", command="echo '[1]' > $MINIFLOW_OUTPUT", max_retries=1), task("b"),
                 task("c", "b", args=["${{ tasks.b.outputs.gone }}"], max_retries=2),
                 task("d", command=["no-such-command"], max_retries=2), task("e", cwd="nowhere", max_retries=2),
                 task("builtin", command=["cd", "/"], max_retries=2),
                 task("f", command=["/etc/passwd"], max_retries=2, retry_on=[126]),
                 task("g", "b", args=["${{ env.NOT_THERE }}"], max_retries=2),
                 task("h", command="kill -9 $$", max_retries=1, retry_on=[137])) as project:
            run = project.run()
            code, table, _ = self.run_script(project, self.script(project))
            self.assertEqual((code, table), (1, self.table(run)))
            self.assertEqual(self.reasons["c"], 'tasks.b.outputs.gone: there is no "gone"')
            self.assertEqual(self.reasons["d"], "cannot start: 'no-such-command' is not there")


class T21Make(unittest.TestCase):

    def export(self, project, *args):
        code, _, err = project.main("export", "f", "--to", "make", "-o", "f.mk", *args)
        self.assertEqual(code, 0, err)
        return err

    def make(self, project, *args, **env):
        """Run make; return its exit code, the table of ends, and what it said."""
        done = subprocess.run(["make", "-f", "f.mk", *args], cwd=project.path, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120,
                              env={**os.environ, "PYTHON": sys.executable, **env})
        try:
            rows = [line.split("\t") for line in project.lines("miniflow_output/make/f/ends.tsv")]
        except FileNotFoundError:
            rows = []
        return done.returncode, [(row[0], row[1], int(row[2])) for row in rows], done.stdout.decode("utf-8", "replace")

    def state(self, project):
        return {name: os.stat(os.path.join(place, name)).st_mtime_ns
                for place, _, names in os.walk(project.path) for name in names}

    def test_what_the_tour_has_beyond_make_and_bash_is_refused_by_name(self):
        problems = []
        plan = mf.make_plan(mf.read_flow(mf._TOUR_FLOW, problems))
        for to, most in ((mf.to_make, 12), (mf.to_bash, 8)):
            with self.assertRaises(mf.UsageError) as caught:
                to(plan, {"days": 2, "url": ""}, "/t")
            self.assertTrue(all(line.startswith(("task ", "timeout_s",
            "pools")) for line in str(caught.exception).split("\n")))
            self.assertGreaterEqual(len(str(caught.exception).split("\n")), most - 4)

    @needs("make")
    def test_output_that_the_engine_refuses_fails_the_task_of_the_makefile_too(self):
        with one(*outputs_that_are_refused()) as project:
            self.export(project)
            run = project.run()
            _, table, _ = self.make(project, "-j2")
            self.assertEqual({name: end for name, end, _ in table},
                             {name: found.status for name, found in run.tasks.items()})
            self.assertEqual([name for name, end, _ in table if end == "success"], ["good"])

    @needs("make")
    def test_clean_and_a_relative_python_keep_to_their_own_directory(self):
        with one(task("a", script="t.py", cwd="wd"), scripts={"t.py": "print(1)"}) as project:
            for name in ("wd/x", "other/miniflow_output/make/f/a.done", "bin/x"):
                project.write(name, "")
            os.symlink(sys.executable, project.at("bin/py"))
            self.export(project)
            self.assertEqual(self.make(project, PYTHON="bin/py")[0], 0)
            self.assertEqual(self.make(project, "clean", CDPATH=project.at("other"))[0], 0)
            self.assertTrue(os.path.exists(project.at("other/miniflow_output/make/f/a.done")))
            self.assertFalse(os.path.exists(project.at("miniflow_output/make/f")))

    @needs("make")
    def test_engine_and_make_end_alike_over_random_flows(self):
        """Every task's end, its attempts, what it saw, and whether all is well."""
        command = ('[ -z "$SLEEP" ] || exec sleep 3; cp "$MINIFLOW_CONTEXT" "seen-$WHO-$MINIFLOW_TASK"; '
                   'echo "$MINIFLOW_TASK $MINIFLOW_ATTEMPT"; [ "$MINIFLOW_TASK" = t1 ] || echo '
                   '"{\\"$MINIFLOW_TASK\\": $MINIFLOW_ATTEMPT, \\"last\\": \\"$MINIFLOW_TASK\\"}" >"$MINIFLOW_OUTPUT"; '
                   'shift $((MINIFLOW_ATTEMPT - 1)); exit $1')
        for seed in range(5):
            chance = random.Random(seed)
            tasks = []
            for n in range(chance.randint(2, 7)):
                upstream = [f"t{k}" for k in range(n) if chance.random() < 0.35]
                tolerant = all(t.get("allow_failure") for t in tasks if t["id"] in upstream)
                fields = {"max_retries": chance.randint(0, 2), "backoff_s": 0.02, "jitter": chance.choice([0, 0.5]),
                          "allow_failure": tolerant and chance.random() < 0.5, "grace_s": 1,
                          "trigger_rule": chance.choice(["all_success", "none_failed"]),
                          "args": [chance.choice([0, 0, 0, 1, 2]) for _ in range(4)]}
                if chance.random() < 0.15:
                    fields.update(timeout_s=0.4, env={"SLEEP": "3"})
                if chance.random() < 0.3:
                    fields["retry_on"] = chance.choice([[1], [2], ["timeout"], []])
                tasks.append(task(f"t{n}", *upstream, command=command, **fields))
            chance.shuffle(tasks)
            with self.subTest(seed=seed), one(*tasks, params={"p": 1}) as project:
                self.export(project)
                code, table, said = self.make(project, "-j4", WHO="make")
                os.environ["WHO"] = "engine"
                run = project.run(max_parallel=4)
                del os.environ["WHO"]
                self.assertEqual(sorted(table), sorted((name, t.status, len(t.attempts))
                                                       for name, t in run.tasks.items() if t.attempts), said)
                self.assertEqual(code == 0, run.ok)
                for name, t in run.tasks.items():
                    paths = [project.at(f"seen-{who}-{name}") for who in ("engine", "make")]
                    self.assertEqual(*[json.load(open(path)) if os.path.exists(path) else None for path in paths])
                    if os.path.exists(paths[0]):
                        log = [f"{name} 1"] + [line for n in range(2, len(t.attempts) + 1)
                                               for line in (f"--- attempt {n}", f"{name} {n}")]
                        self.assertEqual(project.lines(f"miniflow_output/make/f/{name}.log"), log)

    @needs("make")
    def test_hostile_values_reach_tasks_and_make_byte_for_byte(self):
        show = ('import json, os, sys; json.dump([sys.argv[1:], sys.stdin.read(), {k: v for k, v in '
                'os.environ.items() if k[0] in "VW" or k.startswith("MINIFLOW_PARAM")}], open("seen.json", "w"))')
        values = [value for value in HOSTILE] + ["endef", "\tx", "a\n\tb\nendef\n", "a \\\n b", "$(shell touch PWN)",
                                                 "${shell touch PWN}", "%", "a:b", "x;y", "$$", "#", "define x",
                                                 "\n\n\\", "'\n'", " lead", "trail ", "\r\n", "$(mf_dir)", "q" * 5000]
        literals = [value.replace("${{", "$${{") for value in values]
        params = {f"p{n}": {"type": "string", "default": value} for n, value in enumerate(values)}
        templates = [f"${{{{ params.p{n} }}}}" for n in range(len(values))]
        with one(task("a", command=[sys.executable, "-c", show, *literals[:-1], *templates[:-1]],
                      args={"k": literals[:-1], "key": templates[:-1]},
                      env={**{f"V{n}": value for n, value in enumerate(literals[:-1])},
                           **{f"W{n}": f"x{value}" for n, value in enumerate(templates)}},
                      stdin="".join(literals[:-1] + templates)), params=params) as project:
            self.export(project)
            given = [f"p{n}={value}" for n, value in enumerate(values[::-1]) if value == value.lstrip()]
            for args in ([], given, [os.fsdecode(b"p7=\xff\xfe")]):
                words = [word for value in args for word in ("--param", value)]
                self.assertEqual(project.main("run", "f", *words)[0], 0)
                expected = json.loads(project.read("seen.json"))
                os.unlink(project.at("seen.json"))
                code, _, said = self.make(project, *args)
                self.assertEqual(code, 0, said)
                seen = json.loads(project.read("seen.json"))
                self.assertEqual(seen[0], expected[0])
                self.assertEqual(seen, expected)
            self.assertFalse(os.path.exists(project.at("PWN")))

    @needs("make")
    def test_another_make_goes_on_and_make_knows_what_is_to_be_done(self):
        with one(task("a", command="echo a >> ran"), task("b", "a", command="echo b >> ran; test -e go"),
                 task("c", "b", command="echo c $MINIFLOW_PARAM_LIMIT >> ran"), task("d", command="echo d >> ran"),
                 params={"limit": {"type": "integer", "default": 3, "min": 1}}) as project:
            self.export(project)
            before = self.state(project)
            code, _, said = self.make(project, "-n")
            self.assertEqual((code, self.state(project)), (0, before), said)
            self.assertEqual(re.findall("mf_id=(.)", said), ["a", "b", "c", "d"])
            steps = [
                ((), 2, "a b d"), ((), 2, "b"), (("-q",), 1, ""), ("go", 0, "b c3"), ((), 0, ""), (("-q",), 0, ""),
                (("-n",), 0, ""), (("-n", "limit=5"), 0, ""), (("limit=5", "-j2"), 0, "a b c5 d"),
                (("limit=5",), 0, ""),
                (("limit=0",), 2, ""), (("limit=x",), 2, ""), (("limt=5",), 2, ""), (("limit=5",), 0, ""),
                ("change b", 0, "b c3"), ("order", 0, "a b c3 d e"), (("clean",), 0, ""), ((), 0, "a b c3 d e")]
            self.make(project, "-n", "limit=5")
            for args, code, ran in steps:
                project.write("ran", "")
                if args == "go":
                    project.write("go", "")
                elif isinstance(args, str):
                    flow = json.loads(project.read("flows/f.json"))
                    if args == "order":
                        flow["tasks"].append(task("e", command="echo e >> ran"))
                    else:
                        self.make(project)     # with the default limit
                        project.write("ran", "")
                        flow["tasks"][1]["command"] = "echo b >> ran"
                    project.write("flows/f.json", json.dumps(flow))
                    self.export(project)
                with self.subTest(args=args, ran=ran):
                    got, _, said = self.make(project, *(args if isinstance(args, tuple) else ()))
                    self.assertEqual((got, sorted(project.read("ran").replace(" ", "").split())),
                                     (code, ran.split()), said)
                    if args == ("limit=0",):
                        self.assertIn('param limit: expected an integer of at least 1, got "0"', said)
                    if args == ("limt=5",):
                        self.assertIn("limt: no param that make can set; it can set limit", said)

    @needs("make")
    def test_a_task_sees_nothing_of_make_and_what_the_engine_gives_it(self):
        flow = {"id": "other", "io": "x", "PYTHON": "python3"}
        own = {"n": "${{ run.id }}", "when": "${{ run.scheduled_time }}", "mask": "${{ env.HOME }}",
               "s": "${{ tasks.z.status }}", "o": "${{ tasks.y.outputs.n[1] }}"}
        with one(task("z", command="false", allow_failure=True), task("y", command="echo '{\"n\": [1, \"a b\"]}' "
                                                                      "> $MINIFLOW_OUTPUT; umask"),
                 task("a", "z", "y", command=["env", "-0"], env=own, cwd="tasks"), env=flow,
                 params={"low": "1", "BIG": 2}) as project:
            self.assertIn("note: make can't set params.BIG; for another value, export the flow again\n",
                          self.export(project))
            run = project.run()
            code, _, said = self.make(project, "low=a b")
            self.assertEqual(code, 0, said)
            with open(project.at("miniflow_output/make/f/a.log"), "rb") as file:
                seen = dict(part.split(b"=", 1) for part in file.read().split(b"\0") if part)
            expected = dict(part.split(b"=", 1) for part in project.log(run.id, "a").split(b"\0") if part)
            apart = {b"OLDPWD", b"PWD", b"SHLVL", b"_", b"MINIFLOW_COOKIE", b"SHELL"}
            self.assertEqual(set(seen) - apart, set(expected) - apart | ({b"PYTHON"} - set(expected)))
            for name, value in {**flow, "s": "failed", "o": "a b", "MINIFLOW_PARAM_LOW": "a b"}.items():
                self.assertEqual(seen[name.encode()], value.encode(), name)
            self.assertEqual(seen[b"n"], seen[b"MINIFLOW_RUN_ID"])
            self.assertEqual(project.read("miniflow_output/make/f/y.log").encode(), project.log(run.id, "y"))

    @needs("make")
    def test_a_timeout_kills_the_whole_group_and_so_does_a_signal(self):
        hang = ("import subprocess, sys, os; p = subprocess.Popen(['sleep', '60']); "
                "open('part', 'w').write(str(p.pid)); os.rename('part', 'pids'); p.wait()")
        with one(task("a", command=[sys.executable, "-c", hang], timeout_s=0.5, grace_s=0.5)) as project:
            self.export(project)
            code, table, said = self.make(project)
            self.assertEqual((code, table), (2, [("a", "failed", 1)]))
            self.assertIn("timeout after 0.5 s", said)
            self.assertFalse(alive(int(project.read("pids"))))
        with contextlib.ExitStack() as stack:
            started = []
            for name in ("SIGINT", "SIGTERM"):
                project = stack.enter_context(one(task("a", command=[sys.executable, "-c", hang], grace_s=0)))
                self.export(project)
                started.append((name, project, subprocess.Popen(
                    ["make", "-f", "f.mk"], cwd=project.path, stdin=subprocess.DEVNULL, start_new_session=True,
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)))
            pids = [int(wait_for(lambda at=project.at("pids"): os.path.exists(at) and open(at).read(), "the task"))
                    for _, project, _ in started]
            for name, _, process in started:
                os.killpg(process.pid, getattr(signal, name))
            for _, project, process in started:
                self.assertNotEqual(process.wait(30), 0)
                self.assertFalse(os.path.exists(project.at("miniflow_output/make/f/a.done")))
            wait_for(lambda: not any(map(alive, pids)), "the end of the tasks")

    @needs("make")
    def test_clean_removes_what_make_made_and_nothing_else(self):
        with one(task("a", command="echo x > $TMP_DIR/x")) as project:
            self.export(project)
            before = self.state(project)
            self.assertEqual(self.make(project)[0], 0)
            self.assertEqual(self.make(project, "clean")[0], 0)
            self.assertEqual(self.state(project), before)
            self.assertEqual(os.listdir(project.at("miniflow_output/make")), [])
            self.assertEqual(self.make(project, "clean")[0], 0)
            self.make(project)
            project.write("miniflow_output/make/f/mine.txt", "")
            self.assertEqual(self.make(project, "clean")[0], 0)
            self.assertEqual(os.listdir(project.at("miniflow_output/make/f")), ["mine.txt"])
            for place in ("a b", "a:b", "a%b", "$(shell touch PWN)", "a(b", "a*"):
                code, _, said = self.make(project, MINIFLOW_OUTPUT_DIR=place)
                self.assertEqual(code, 2)
                self.assertIn("MINIFLOW_OUTPUT_DIR: make can't have a file there: " + place, said)
            self.assertEqual(self.make(project, MINIFLOW_OUTPUT_DIR=project.at("else,where"))[0], 0)
            self.assertTrue(os.path.exists(project.at("else,where/make/f/a.done")))
            self.assertFalse(os.path.exists(project.at("PWN")))

    @needs("make")
    def test_a_thousand_tasks_are_no_burden(self):
        with one(*[task(f"t{n}", *([f"t{n // 2}"] if n else [])) for n in range(1000)]) as project:
            self.export(project)
            code, _, said = self.make(project, "-n")
            self.assertEqual((code, said.count("mf_engine")), (0, 1000))

    @needs("shellcheck")
    def test_the_programs_in_a_makefile_pass_shellcheck(self):
        plan = mf.make_plan(make(
            task("a", script="s.py", args=[v.replace("${{", "$${{") for v in HOSTILE], stdin="it's", max_retries=2,
                 retry_on=[1], cwd="${{ run.id }}", timeout_s=1, env={"X": "${{ env.HOME }}"}),
            task("b", "a", args=["${{ tasks.a.outputs.x }}", "${{ tasks.a.status }}", "${{ params.p }}"]),
            params={"p": "$(x)'", "B": "x"}))
        text = mf.to_make(plan, {"p": "$(x)'", "B": "x"}, "/t").text
        found = dict(re.findall(r"(?ms)^define mf_(\w+)\n(.*?)\nendef$", text))
        for names in (("task_a", "engine_text"), ("task_b", "attempt_text"), ("begin_text",), ("clean_text",)):
            program = "\n".join(["#!/usr/bin/env bash", "# shellcheck disable=SC2016,SC2034,SC2093,SC2154,SC2317,"
                                 "SC1003,SC1112,SC2329", *(found[name] for name in names)])
            done = subprocess.run(["shellcheck", "-"], input=program.encode(), stdout=subprocess.PIPE)
            self.assertEqual((done.returncode, done.stdout.decode()), (0, ""), names)

    def test_what_make_cant_do_is_named_and_refused_all_at_once(self):
        flow = make(task("a", trigger_rule="all_done"), task("b", http={"url": "http://x"}), task("c", pool="p"),
                    task("d", pool="p"), task("e", foreach=[1]), task("g", **{"if": "true"}), task("h", inputs=["x"]),
                    task("i", args=["x" * 100001]), task("j", env={"UID": "1"}), task("k", pool="q"),
                    task("l", "k", allow_failure=True), task("m", "l"),
                    **{"finally": {"command": "true"}}, timeout_s=9, pools={"p": 1, "q": 1})
        with self.assertRaises(mf.UsageError) as caught:
            mf.to_make(mf.make_plan(flow), {}, "tasks")
        self.assertEqual([re.split(": make|: with|: its|: bash|: http", line)[0]
                          for line in str(caught.exception).splitlines()],
                         ["timeout_s", "task a: trigger_rule all_done", "task e: foreach", "task g: if",
                          "task h: inputs and outputs", "task l: allow_failure", "task finally: finally",
                          "pools.p", "task b", "task i", "task j: env.UID"])
        self.assertIn("params: they take more than", self.problem({"p": "x" * 100001}))

    def problem(self, params):
        with self.assertRaises(mf.UsageError) as caught:
            mf.to_make(mf.make_plan(make(task("a"))), params, "tasks")
        return str(caught.exception)

    def test_what_make_does_otherwise_is_told_and_the_same_flow_gives_the_same_bytes(self):
        plan = mf.make_plan(make(task("a", priority=1), task("b", "a", args={"x": "${{ params.p }}"}), max_parallel=2,
                                 fail_fast=True, params={"p": 1, "q": True, "mf_x": "y"}))
        exported = mf.to_make(plan, {"p": 1, "q": True, "mf_x": "y"}, "/t")
        self.assertEqual(exported, mf.to_make(plan, {"p": 1, "q": True, "mf_x": "y"}, "/t"))
        self.assertEqual(exported.losses, (
            "max_parallel is not in the Makefile; call make with -j2",
            "priority has no effect: make starts ready tasks in its own order",
            "make can't set params.q, params.mf_x; for another value, export the flow again"))
        self.assertNotIn("keep-going", exported.text)
        self.assertEqual(mf.to_make(mf.make_plan(make(task("a"))), {"x": 5, "y": "s"}, "/t").losses,
                         ("make can't set params.x; for another value, export the flow again",))


#: So much of Airflow as an exported DAG file needs: DAGs and tasks that are only noted, and a run of them.
FAKE_AIRFLOW = {
    "__init__": """
        DAGS = []
        class DAG:
            def __init__(self, **options):
                self.options, self.tasks = options, {}
                DAGS.append(self)
            def __enter__(self):
                return self
            def __exit__(self, *exc_info):
                pass
        """,
    "exceptions": "class AirflowException(Exception): pass\nclass AirflowFailException(AirflowException): pass\n",
    "models/baseoperator": """
        import logging, airflow
        class BaseOperator:
            log = logging.getLogger("task")
            def __init__(self, *, task_id, trigger_rule, retries, **options):
                assert set(options) <= {"retry_delay", "retry_exponential_backoff", "max_retry_delay", "doc",
                                        "priority_weight", "weight_rule"}, options
                self.task_id, self.trigger_rule, self.retries, self.upstream = task_id, trigger_rule, retries, []
                self.dag_id = airflow.DAGS[-1].options["dag_id"]
                assert airflow.DAGS[-1].tasks.setdefault(task_id, self) is self
            def set_upstream(self, tasks):
                self.upstream += [task.task_id for task in tasks]
            def execute(self, context):
                pass
        """,
    "models/param": "class Param:\n    def __init__(self, default, **schema):\n        self.value = default\n",
    "operators/empty": "from airflow.models.baseoperator import BaseOperator as EmptyOperator",
    "timetables/trigger": "def CronTriggerTimetable(cron, *, timezone):\n    return [cron, timezone]\n",
    "run": """
        import datetime, json, runpy, sys, types
        import airflow, miniflow
        from airflow.exceptions import AirflowException, AirflowFailException
        runpy.run_path(sys.argv[1])
        dag, = airflow.DAGS
        ends, handed_on = {}, {}
        params = {name: param.value for name, param in dag.options["params"].items()}
        now = datetime.datetime.now(datetime.timezone.utc)
        rules = {**miniflow.TRIGGER_RULES,
                 "all_skipped": lambda up: "skipped" if up.success or up.failed else "running"}

        class Instance:
            try_number = 0
            def xcom_pull(self, task_ids):
                return handed_on.get(task_ids)

        def attempts(task, instance):
            for instance.try_number in range(1, task.retries + 2):
                try:
                    output = task.execute({"params": params, "ti": instance, "dag_run": types.SimpleNamespace(
                        run_id="r", logical_date=now)})
                except AirflowFailException:
                    break
                except AirflowException:
                    continue
                handed_on[task.task_id] = json.loads(json.dumps(output))
                return "success"
            return "failed"

        for name in miniflow.topological_order({task.task_id: task.upstream for task in dag.tasks.values()}):
            task, above = dag.tasks[name], [ends[up][0] for up in dag.tasks[name].upstream]
            counts = miniflow.Counts(above.count("success"), above.count("skipped"),
                                     sum(end.endswith("failed") for end in above))
            verdict, instance = rules[task.trigger_rule](counts) if above else "running", Instance()
            ends[name] = attempts(task, instance) if verdict == "running" else verdict, instance.try_number
        below = {up for task in dag.tasks.values() for up in task.upstream}
        red = any(ends[name][0].endswith("failed") for name in ends.keys() - below)
        print(json.dumps([red, ends]))
        """}


class T22Airflow(unittest.TestCase):

    def dag(self, project, *args):
        code, _, err = project.main("export", "f", "--to", "airflow", "-o", project.at("dag.py"), *args)
        self.assertEqual(code, 0, err)
        return err

    def run_dag(self, project):
        """Run the exported DAG with the airflow above; return whether it is red, and each task's end and attempts."""
        for name, text in FAKE_AIRFLOW.items():
            project.write(f"airflow/{name}.py", textwrap.dedent(text))
        for name in ("models", "operators", "timetables"):
            project.write(f"airflow/{name}/__init__.py", "")
        path = os.pathsep.join([project.path, HERE])
        done = subprocess.run([sys.executable, "-m", "airflow.run", project.at("dag.py")], cwd=project.path,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120,
                              env={**os.environ, "PYTHONPATH": path, "PYTHON": sys.executable})
        self.assertEqual(done.returncode, 0, done.stderr.decode("utf-8", "replace"))
        return json.loads(done.stdout)

    def test_output_that_the_engine_refuses_fails_the_task_in_airflow_too(self):
        with one(*outputs_that_are_refused()) as project:
            run = project.run()
            self.dag(project)
            _, found = self.run_dag(project)
            self.assertEqual({name: found[name][0] for name in run.tasks},
                             {name: task_run.status for name, task_run in run.tasks.items()})

    def test_a_schedule_carries_over_and_what_does_not_is_named(self):
        daily = {"cron": "@daily", "timezone": "Europe/Berlin", "catchup": "all", "overlap": "allow"}
        caught = "schedule[0].catchup: all is not known there; it is none"
        for schedule, airflow, argo, losses in (
                (daily, ["schedule=CronTriggerTimetable('0 0 * * *', timezone='Europe/Berlin')", "catchup=True"],
                 {"schedules": ["0 0 * * *"], "timezone": "Europe/Berlin", "concurrencyPolicy": "Allow"},
                 ([], [caught])),
                ("5 4 * * 1-5", ["schedule=CronTriggerTimetable('5 4 * * 1-5', timezone='UTC')", "catchup=False",
                                 "max_active_runs=1"],
                 {"schedules": ["5 4 * * 1-5"], "timezone": "UTC", "concurrencyPolicy": "Forbid"},
                 (["schedule[0].overlap: skip is not known there; it is queue"], [])),
                ({"every_s": 90, "overlap": "queue", "catchup": "latest", "jitter_s": 1},
                 ["schedule=timedelta(seconds=90)", "catchup=False", "max_active_runs=1"], None,
                 (["schedule[0].jitter_s: left out; runs start at the time itself",
                   "schedule[0].catchup: latest is not known there; it is none"],
                  ["schedule[0]: left out; there is one, by cron, and the first counts"])),
                ([daily, {"at": "2030-01-01T00:00Z"}], [], {}, (["schedule[1]: left out; there is one, by cron or "
                 "every_s, and the first counts"], [caught, "schedule[1]: left out; there is one, by cron, and "
                                                   "the first counts"]))):
            problems = []
            flow = mf.read_flow(flow_json(task("a"), schedule=schedule), problems)
            self.assertEqual(problems + mf.check_flow(flow), [])
            plan = mf.make_plan(flow)
            dag, manifest = mf.to_airflow(plan, {}, "/t"), mf.to_argo(plan, {}, "/t")
            for line in airflow:
                self.assertIn(f"    {line},\n", dag.text)
            if argo is not None:
                found = json.loads(manifest.text)
                self.assertEqual((found["kind"], {key: found["spec"][key] for key in argo}), ("CronWorkflow", argo))
            self.assertEqual(([loss for loss in dag.losses if "schedule" in loss],
                              [loss for loss in manifest.losses if "schedule" in loss]), losses)

    def test_what_only_miniflow_can_do_is_refused_for_airflow_by_name(self):
        flow = make(task("a", **{"if": "params.x == 1"}), task("b", http={"url": "http://x"}),
                    task("c", wait_for={"seconds": 1}), task("d", foreach="${{ params.x }}"), task("e"),
                    task("g", "e", command=["true", "${{ tasks.e.status }}"]), params={"x": 1})
        with self.assertRaises(mf.UsageError) as caught:
            mf.to_airflow(mf.make_plan(flow), {"x": 1}, "/t")
        self.assertEqual([re.sub(r"(is|show|how) .*", "", line) for line in str(caught.exception).splitlines()], [
            "task a: if: params.x == 1 ", "task b: http ", "task c: wait_for ", "task d: foreach: its values ",
            "task g: tasks.e.status: "])

    def test_what_airflow_does_otherwise_is_named_on_stderr_and_in_the_head_of_the_file(self):
        with one(task("a", max_retries=3, backoff_s=1), task("b", max_retries=1, backoff_s=1, pool="p"),
                 task("c", foreach=[1], max_parallel=1), task("d", inputs=["x"]), fail_fast=True, timeout_s=9,
                 pools={"p": 1}, secrets=["TOKEN"]) as project:
            named = [line[len("note: "):] for line in self.dag(project).splitlines()]
            self.assertEqual([line.split(":")[0] for line in named], [
                "task a", "task b", "task c", "task d", "fail_fast", "timeout_s of the flow", "secrets"])
            head = project.read("dag.py").split("from __future__")[0]
            self.assertEqual([line for line in named if f"# {line}\n" not in head], [])
            self.assertIn("\n    dagrun_timeout=timedelta(seconds=9.0),\n", project.read("dag.py"))

    def test_the_same_flow_gives_the_same_dag_and_all_of_the_flow_in_it_are_literals(self):
        values = [value.replace("${{", "$${{") for value in HOSTILE]
        plan = mf.make_plan(make(task("a", args=values, env={"X": values[-1]}, description="\n'''\"\"\"{{"),
                                 task("b", "a", args={"x": "${{ params.p }}"}), description="'\n"))
        text = mf.to_airflow(plan, {"p": HOSTILE}, "/t'\n").text
        self.assertEqual(text, mf.to_airflow(plan, {"p": HOSTILE}, "/t'\n").text)
        with_block = next(node for node in ast.parse(text).body if isinstance(node, ast.With))
        calls = {node.func.id for node in ast.walk(with_block) if isinstance(node, ast.Call)
                 and isinstance(node.func, ast.Name)}
        names = {node.id for node in ast.walk(with_block) if isinstance(node, ast.Name)}
        self.assertEqual(calls, {"DAG", "MiniFlowTask", "Watcher", "Param", "Value", "datetime", "timedelta"} & names)
        self.assertEqual(names - calls, {"tasks", "timezone"})

    def test_every_task_of_a_random_flow_ends_as_with_miniflow_and_red_is_red(self):
        for seed in range(8):
            tasks, handlers = flow_with_instances_and_handlers(seed, 7, 0)
            with self.subTest(seed=seed), one(*tasks, **handlers) as project:
                run = project.run()
                self.dag(project)
                red, found = self.run_dag(project)
                self.assertEqual(red, not run.ok)
                for name, state in run.tasks.items():
                    if name in run.groups:     # what stands for it has not run
                        state = (state.status.replace("failed", "upstream_failed").replace("upstream_up", "up"),)
                        found[name] = found[name][:1]
                    else:
                        name, state = re.sub(r"\[(\d+)\]$", r".\1", name), (state.status, len(state.attempts))
                    self.assertEqual((name, *found[name]), (name, *state))

    def test_hostile_values_and_outputs_reach_the_tasks_of_the_dag_byte_for_byte(self):
        values = [value.replace("${{", "$${{") for value in HOSTILE]
        with one(task("a", script="see.py", args=values, stdin="".join(values), cwd="tasks",
                      env={f"V{n}": value for n, value in enumerate(values)}),
                 task("options", script="see.py", args={"n": "${{ params.n }}", "all": ["${{ params.p }}", 2],
                                                        "yes": True, "no": None, "text": "${{ env.V }}-"}),
                 task("lines", command="printf 'a=1\nb<<E\nx\ny\nE\n' >$MINIFLOW_OUTPUT; exit $1", args=[0]),
                 task("each", script="see.py", foreach=["a", {"b": [1]}], args=["${{ item }}"]),
                 task("down", "a", "lines", "each", script="see.py",
                      args=["${{ tasks.lines.outputs.b }}", "${{ ctx.last[0] }}!", "${{ tasks.each.outputs.items }}"]),
                 task("missing", "a", script="see.py", args=["${{ ctx.nothing }}"], max_retries=2),
                 task("bad", command="echo '[1]' >$MINIFLOW_OUTPUT", max_retries=1),
                 task("none", command=["no-such-program"], max_retries=2),
                 task("slow", command="sleep 60 & wait", timeout_s=0.2, grace_s=0.2, max_retries=1),
                 task("retry", command="exit 3", retry_on=[4], max_retries=3),
                 env={"V": "${{ params.p }}{{"}, params={"p": HOSTILE, "n": {"type": "integer", "default": 3}},
                 scripts={"see.py": """
                     import json, os, sys
                     own = [name for name in os.environ if name[:1] == "V" or name.startswith("MINIFLOW_PARAM_")]
                     own += ["MINIFLOW_TASK", "MINIFLOW_ATTEMPT", "MINIFLOW_FLOW"]
                     with open(os.environ["MINIFLOW_CONTEXT"]) as file:
                         seen = [sys.argv[1:], sys.stdin.read(), os.getcwd(), json.load(file)]
                     seen += [{name: os.environ[name] for name in own}, os.path.isdir(os.environ["TMP_DIR"])]
                     with open(os.path.join(os.environ["WHERE"], os.environ["MINIFLOW_TASK"]), "w") as file:
                         json.dump(seen, file)
                     with open(os.environ["MINIFLOW_OUTPUT"], "w") as file:
                         json.dump({"last": [os.environ["MINIFLOW_TASK"]]}, file)
                     """}) as project:
            seen = []
            for run in (project.run, lambda: (self.dag(project), self.run_dag(project))[1]):
                os.environ["WHERE"] = project.at(f"seen{len(seen)}")
                os.mkdir(os.environ["WHERE"])
                ran = run()
                seen.append({name: json.loads(project.read(f"seen{len(seen)}/{name}"))
                             for name in os.listdir(os.environ.pop("WHERE"))})
            self.assertEqual(sorted(seen[0]), ["a", "down", "each[0]", "each[1]", "options"])
            self.assertEqual(*seen)
            ended = {name: end for name, end in ran[1].items() if name in ("missing", "bad", "none", "slow", "retry")}
            self.assertEqual(ended, {"missing": ["failed", 1], "bad": ["failed", 2], "none": ["failed", 1],
                                     "slow": ["failed", 2], "retry": ["failed", 1]})


class ArgoWorld:
    """Runs the manifest of a Workflow as Argo does: substitutions, expressions, retries, the verdict by leaves."""

    def __init__(self, manifest, place):
        spec, self.place = manifest["spec"], place
        self.templates = {template["name"]: template for template in spec["templates"]}
        self.words = {"workflow.name": "w-1", **{f"workflow.parameters.{each['name']}": each["value"]
                                                 for each in spec["arguments"]["parameters"]}}
        self.ends, self.attempts = {}, {}
        status = self.dag(self.templates["main"]["dag"]["tasks"])
        self.words["workflow.status"] = status
        for step in itertools.chain.from_iterable(self.templates.get("exit", {"steps": []})["steps"]):
            left, operator, right = self.fill(step.get("when", "a == a")).split()
            if (left == right) is (operator == "=="):
                self.ends[step["name"]] = self.run(step["template"])
                if self.ends[step["name"]] == "Failed" and "continueOn" not in step:
                    status = "Failed"
        self.status = status

    def fill(self, text):
        return re.sub(r"\{\{(.*?)\}\}", lambda match: self.words[match[1]], text)

    def dag(self, tasks):
        """Run the tasks in the order in which expressions allow it; return what becomes of the DAG."""
        named = {task["name"]: dict.fromkeys(re.findall(r"([a-z0-9-]+)\.[A-Z]", task.get("depends", "")))
                 for task in tasks}
        by_name, branch = {task["name"]: task for task in tasks}, {}
        for name in mf.topological_order({name: list(up) for name, up in named.items()}):
            logic = re.sub(r"([a-z0-9-]+)\.([A-Z][a-z]+)", lambda match: str(self.ends[match[1]] == match[2]),
                           by_name[name].get("depends", "True"))
            for word, python in (("&&", " and "), ("||", " or "), ("!", " not ")):
                logic = logic.replace(word, python)
            self.ends[name] = self.run(by_name[name]["template"]) if eval(logic, {}) else "Omitted"
            above = {branch[up] for up in named[name]}
            branch[name] = self.ends[name] if self.ends[name] != "Omitted" else \
                "Failed" if "Failed" in above else "Succeeded"
        leaves = by_name.keys() - {up for each in named.values() for up in each}
        return "Failed" if "Failed" in {branch[name] for name in leaves} else "Succeeded"

    def run(self, name):
        """Run the container of a template, again where it says so; return what becomes of it."""
        template, attempt = self.templates[name], 0
        retry = template.get("retryStrategy", {"limit": "0"})
        while True:
            self.words["retries"] = str(attempt)
            self.attempts[name] = attempt + 1
            container = json.loads(re.sub(r"\{\{(.*?)\}\}", lambda match: json.dumps(self.words[match[1]])[1:-1],
                                          json.dumps(template["container"])))
            env = {each["name"]: each["value"].replace("$$", "$") for each in container["env"]}
            done = subprocess.run([word.replace("$$", "$") for word in container["command"]], cwd=self.place,
                                  env={**os.environ, **env}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, timeout=60)
            wanted = retry.get("expression", f"in [{done.returncode}]").split(" in ")[-1].replace("in ", "")
            if not done.returncode:
                return "Succeeded"
            if attempt >= int(retry["limit"]) or done.returncode not in json.loads(wanted):
                return "Failed"
            attempt += 1


class T23Argo(unittest.TestCase):

    def manifest(self, project, *args):
        code, out, err = project.main("export", "f", "--to", "argo", *args)
        self.assertEqual(code, 0, err)
        return json.loads(out)

    def test_what_argo_cant_express_is_refused_by_name(self):
        flow = make(task("a", **{"if": "params.p == 1"}), task("b", http={"url": "http://x"}),
                    task("c", "a", args=["${{ tasks.a.outputs.x }}"]), task("d", args={"x": "${{ params.l }}"}),
                    task("j", args=["${{ env['x}; touch PWN #'] }}"]),
                    task("e", args=["${{ params.o.x }}"]), task("g", foreach=[]), task("h", env={"X": "${{ ctx.x }}"}),
                    task("i", args=["${{ run.scheduled_time }}"]),
                    params={"p": "$(x)", "l": True, "o": {"x": 1}})
        with self.assertRaises(mf.UsageError) as caught:
            mf.to_argo(mf.make_plan(flow), {"p": "$(x)", "l": True, "o": {"x": 1}}, "/t")
        self.assertEqual([re.sub(r" (is|shows) .*", "", line) for line in str(caught.exception).splitlines()], [
            "params.p: $( in \"$(x)\"", "task a: if: params.p == 1", "task b: http", "task c: tasks.a.outputs.x",
            "task d: args.x: whether params.l", "task j: env.x}; touch PWN #: sh can't read a variable of that name; "
            "use letters, digits and _", "task e: params.o.x", "task g: foreach", "task h: ctx.x",
            "task i: run.scheduled_time"])

    def test_what_argo_does_otherwise_is_named_on_stderr_and_in_an_annotation(self):
        with one(task("a", script="s.py", priority=1, pool="p", backoff_s=1, jitter=0.5, inputs=["x"]),
                 task("b", foreach=[1], max_parallel=1), fail_fast=True, secrets=["TOKEN"], pools={"p": 1},
                 scripts={"s.py": ""}) as project:
            code, out, err = project.main("export", "f", "--to", "argo")
            named = [line[len("note: "):] for line in err.splitlines()]
            self.assertEqual(json.loads(out)["metadata"]["annotations"]["miniflow/differs"].splitlines(), named)
            self.assertEqual([re.split(": |, | are | names ", line)[0] for line in named], [
                "the parameter image", "scripts", "outputs", "task a", "task a", "task a", "task a", "task b",
                "fail_fast", "secrets"])

    def test_names_are_dns_labels_and_expressions_all_their_own(self):
        ids = ["A", "a", "a_", "1", "in", "not", "x" * 128, "x" * 127 + "y", "_", "main", "exit", "watcher"]
        flow = make(*map(task, ids), task("end", *ids, foreach=[1, 2]))
        manifest = json.loads(mf.to_argo(mf.make_plan(flow), {"image": "x", "a b": 1, "a_b": 2}, "/t").text)
        names = [template["name"] for template in manifest["spec"]["templates"]]
        self.assertEqual(len(names), len(set(names)))
        self.assertEqual([name for name in names if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", name)], [])
        self.assertEqual([each["name"] for each in manifest["spec"]["arguments"]["parameters"]],
                         ["image", "a_b", "a_b-2", "image-2"])

    def test_the_same_flow_gives_the_same_manifest_and_limits_carry_over(self):
        flow = make(task("a", max_retries=2, backoff_s=0.5, max_backoff_s=9, retry_on=[3, "timeout"], timeout_s=2.5),
                    max_parallel=3, timeout_s=60, params={"p": {"enum": ["a", "b"], "default": "a"}})
        text = mf.to_argo(mf.make_plan(flow), {"p": "a"}, "/t").text
        self.assertEqual(text, mf.to_argo(mf.make_plan(flow), {"p": "a"}, "/t").text)
        spec = json.loads(text)["spec"]
        self.assertEqual((spec["parallelism"], spec["activeDeadlineSeconds"]), (3, 60))
        self.assertEqual(spec["arguments"]["parameters"][0], {"name": "p", "value": "a", "enum": ["a", "b"]})
        self.assertEqual(spec["templates"][1]["retryStrategy"], {
            "limit": "2", "retryPolicy": "Always", "backoff": {"duration": "0.5s", "factor": "2", "cap": "9s"},
            "expression": "asInt(lastRetry.exitCode) in [3, 124, 137]"})
        self.assertIn("exec timeout -k 5 2.5 /bin/sh -c 'true' sh", spec["templates"][1]["container"]["command"][2])

    def test_every_task_of_a_random_flow_ends_as_with_miniflow_and_red_is_red(self):
        """Where Argo says Omitted, MiniFlow says why: skipped or upstream_failed."""
        for seed in range(12):
            tasks, handlers = flow_with_instances_and_handlers(seed, 9, 1)
            with self.subTest(seed=seed), one(*tasks, **handlers) as project:
                run = project.run()
                found = ArgoWorld(self.manifest(project), project.path)
                self.assertEqual(found.status, "Succeeded" if run.ok else "Failed")
                for name, state in run.tasks.items():
                    task_of, label = run.defs[name], re.sub(r"[^a-z0-9]+", "-", name).strip("-")
                    if task_of.many is None:   # what stands for instances is no task of Argo's
                        end = {"success": "Succeeded", "failed": "Succeeded" if task_of.allow_failure else "Failed"}
                        not_run = None if task_of.handler else "Omitted"
                        self.assertEqual((name, found.ends.get(label), found.attempts.get(label, 0)),
                                         (name, end.get(state.status, not_run), len(state.attempts)))

    def test_hostile_values_reach_the_tasks_of_the_manifest_byte_for_byte(self):
        show = ("import json, os, sys\n"
                "own = {n: v for n, v in sorted(os.environ.items()) if n[:2] in ('V_', 'W_') or "
                "n.startswith('MINIFLOW_PARAM_')}\n"
                "with open(os.environ['WHERE'] + '/' + os.environ['MINIFLOW_TASK'], 'w') as file:\n"
                "    json.dump([sys.argv[1:], sys.stdin.read(), os.getcwd(), own, os.environ['MINIFLOW_ATTEMPT'],\n"
                "               os.path.isdir(os.environ['TMP_DIR'])], file)")
        hostile = HOSTILE + ["{{ x }}", "{{{{", "$$", "$$$(HOME)", "{{workflow.name}}", "$("]
        values = [value.replace("${{", "$${{") for value in hostile]
        program = [sys.executable, "-c", show.replace("${{", "$${{")]
        with one(task("a", command=program, args=values, stdin="".join(values), cwd="tasks",
                      env={f"V_{n}": value for n, value in enumerate(values)}),
                 task("b", command=program, env={"V_": "${{ env.W_ }}!"}, allow_failure=True, max_retries=1,
                      args=["${{ params.p }}", "x${{ env.IN }}", "${{ env.W_ }}", "${{ params.n }}"]),
                 task("c", command=program, args={"p": "${{ params.p }}", "n": "${{ params.n }}", "yes": True,
                                                  "no": None, "several": ["x", "${{ params.p }}"]}),
                 task("d", script="d.py", foreach=["it's", {"x": 1}, True], args={"item": "${{ item }}"}, timeout_s=30),
                 task("e", command="echo \"$1 {{ $(echo x) $((1+1))\" >$WHERE/e; [ $$ -gt 1 ]", args=["$1"]),
                 env={"W_": "${{ params.p }}{{"}, scripts={"d.py": show},
                 params={"p": "it's {x} \"q\"\n$HOME `x` \\", "n": {"type": "integer", "default": 3}}) as project:
            os.environ["IN"] = "a b'"
            seen = []
            for run in (project.run, lambda: ArgoWorld(self.manifest(project), project.path).status):
                os.environ["WHERE"] = project.at(f"seen{len(seen)}")
                os.mkdir(os.environ["WHERE"])
                run()
                seen.append({name: project.read(f"seen{len(seen)}/{name}")
                             for name in os.listdir(os.environ.pop("WHERE"))})
            del os.environ["IN"]
            self.assertEqual(sorted(seen[0]), ["a", "b", "c", "d[0]", "d[1]", "d[2]", "e"])
            self.assertEqual(*seen)
            texts = re.findall(r"\{\{.*?\}\}", json.dumps(self.manifest(project)["spec"]["templates"]))
            self.assertEqual(set(texts), {"{{workflow.parameters.image}}", "{{workflow.parameters.p}}", "{{retries}}",
                                          "{{workflow.parameters.n}}", "{{workflow.name}}"})

    def test_a_schedule_stays_behind_and_is_named(self):
        exported = mf.EXPORTERS["bash"](mf.make_plan(make(task("a"), schedule="@daily")), {}, "/t")
        self.assertEqual(exported.losses, ("schedule: it runs once, when it is started",))
        self.assertEqual(mf.EXPORTERS["bash"](mf.make_plan(make(task("a"))), {}, "/t")[:2], (exported.text, ()))


class T24Simulation(unittest.TestCase):

    def forecast(self, flow, durations=None, outputs=None, slots=4, **options):
        plan = mf.make_plan(flow, durations=durations or {})
        world = mf.Forecast(plan, durations or {}, outputs or {}, **options)
        return mf.simulate(mf.Run(plan, "r"), world, slots), world.assumed

    def test_a_run_is_as_long_as_its_durations_make_it(self):
        flow = make(task("a"), task("b", "a"), task("c", "a"), task("d", "b", "c"))
        durations = {"a": 1, "b": 5, "c": 2, "d": 0.5}
        for slots, seconds in ((1, 8.5), (2, 6.5), (None, 6.5)):
            run, assumed = self.forecast(flow, durations, slots=slots)
            self.assertEqual((run.finished, run.status, assumed), (seconds, "success", {}))

    def test_what_no_run_has_told_is_assumed_and_named(self):
        flow = make(task("a"), task("b"), task("c"), task("sleep", wait_for={"seconds": 7}))
        run, assumed = self.forecast(flow, {"a": 3, "b": 9})
        self.assertEqual(assumed, {"c": "it takes 9.00 s"})
        self.assertEqual(run.tasks["sleep"].finished, 7)
        self.assertEqual(self.forecast(make(task("a")))[0].finished, 1)

    def test_conditions_and_instances_follow_the_outputs_of_earlier_runs(self):
        each = "${{ tasks.a.outputs.list }}"
        flow = make(task("a"), task("b", "a", **{"if": "tasks.a.outputs.n > 1"}), task("c", "a", foreach=each))
        run, assumed = self.forecast(flow, {"a": 1}, {"a": {"n": 1, "list": [1, 2, 3]}})
        self.assertEqual((ends(run)["b"], len(run.groups["c"]), list(assumed)), ("skipped", 3, ["c"]))
        run, assumed = self.forecast(flow, {"a": 1, "b": 1, "c[0]": 1, "c[1]": 3})
        self.assertEqual((ends(run)["b"], len(run.groups["c"])), ("success", 2))
        self.assertRegex(assumed["b"], "^its condition is true \\(if: ")
        self.assertRegex(assumed["c"], "^it has 2 instances \\(foreach: ")

    def test_a_failing_task_is_retried_with_its_backoff_and_stops_what_needs_it(self):
        flow = make(task("a", max_retries=2, backoff_s=10), task("b", "a"), task("c", "a", trigger_rule="all_done"),
                    task("d"), on_failure={"command": "true"}, on_success={"command": "true"})
        run, _ = self.forecast(flow, {"a": 2}, failing=["a"])
        self.assertEqual(ends(run), {"a": "failed", "b": "upstream_failed", "c": "success", "d": "success",
                                     "on_success": "skipped", "on_failure": "success"})
        self.assertEqual([attempt.started for attempt in run.tasks["a"].attempts], [0, 12, 34])
        self.assertEqual((run.status, run.tasks["a"].finished), ("failed", 36))
        run, _ = self.forecast(make(task("a", foreach=[1, 2])), failing=["a[1]"])
        self.assertEqual(ends(run), {"a": "failed", "a[0]": "success", "a[1]": "failed"})

    def test_a_late_attempt_is_stopped_as_in_a_run(self):
        run, _ = self.forecast(make(task("a", timeout_s=5)), {"a": 60})
        self.assertEqual((run.tasks["a"].reason, run.finished), ("timeout after 5 s", 5))

    def test_a_seed_draws_durations_from_half_to_twice_and_always_the_same(self):
        flow = make(*[task(f"t{n}") for n in range(50)])
        draw = lambda seed: [t.finished for t in self.forecast(flow, {f"t{n}": 10 for n in range(50)}, slots=99,  # noqa
                                                                seed=seed)[0].tasks.values()]
        self.assertEqual(draw(1), draw(1))
        self.assertNotEqual(draw(1), draw(2))
        self.assertTrue(all(5 <= seconds <= 20 for seconds in draw(1)))
        self.assertTrue(min(draw(1)) < 7 < 14 < max(draw(1)))

    def test_random_flows_end_as_the_simulated_world_of_these_tests_has_them_end(self):
        for seed in range(300):
            chance = random.Random(seed)
            flow, _ = random_flow(chance)
            seconds = {t.id: chance.randint(1, 9) for t in flow.tasks}
            failing = [t.id for t in flow.tasks if chance.random() < 0.2]
            plan = mf.make_plan(flow)
            world = mf.Forecast(plan, seconds, {}, failing)
            world.ask = lambda run, action, world=world: mf.Simulated.ask(world, run, action)
            script = {}
            for t in flow.tasks:
                for name in (t.id, *(f"{t.id}[{n}]" for n in range(9))):
                    script[name] = dict.fromkeys(range(1, 9), (seconds[t.id], int(t.id in failing)))
            one = mf.simulate(mf.Run(plan, "r"), world, 2)
            other, _, _ = simulate(flow, script, 2)
            self.assertEqual((ends(one), one.finished), (ends(other), other.finished), seed)


class FaultyDisk(mf.Disk):
    """A Disk of which call number `at` (and, if `lasting`, each after it) fails with `error`; `calls` counts them."""

    def __init__(self, at=0, error=errno.ENOSPC, lasting=False):
        self.at, self.error, self.lasting, self.calls = at, error, lasting, 0


for _name in ("open", "write", "sync", "sync_dir", "replace", "unlink", "truncate", "make_dir"):
    def _faulty(self, *args, _call=getattr(mf.Disk, _name), **options):
        self.calls += 1
        if self.calls == self.at or self.lasting and 0 < self.at < self.calls:
            raise OSError(self.error, os.strerror(self.error), str(args[0]))
        return _call(self, *args, **options)
    setattr(FaultyDisk, _name, _faulty)


class RecordingDisk(mf.Disk):
    """A Disk that remembers what it was asked for, and so what a power cut may leave of it.

    What was written is safe after the sync of its file; before, any part of it may be there, as it was written,
    as zeros, or cut.  What happened to names is safe after the sync of their directory, and happens in order.
    """

    def __init__(self):
        self.log, self._inode, self._names, self._fresh = [], {}, {}, itertools.count()

    def open(self, path, flags, mode=0o600):
        fd = super().open(path, flags, mode)
        if path not in self._names:
            self._names[path] = next(self._fresh)
            self.log.append(("create", path, self._names[path]))
        self._inode[fd] = self._names[path]
        return fd

    def write(self, fd, content):
        super().write(fd, content)
        self.log.append(("write", self._inode[fd], bytes(content)))

    def truncate(self, fd, size):
        super().truncate(fd, size)
        self.log.append(("truncate", self._inode[fd], size))

    def sync(self, fd):
        super().sync(fd)
        self.log.append(("sync", self._inode[fd]))

    def sync_dir(self, path):
        super().sync_dir(path)
        self.log.append(("sync_dir",))

    def replace(self, old, new):
        super().replace(old, new)
        self._names[new] = self._names.pop(old)
        self.log.append(("rename", old, new))

    def unlink(self, path):
        super().unlink(path)
        if self._names.pop(path, None) is not None:
            self.log.append(("unlink", path))

    def after_power_cut(self, cut, chance, least):
        """Return the files that a cut after `cut` calls may leave, by path; with `least` as few as may be."""
        names, safe_names, written, safe = [], 0, {}, {}
        for call in self.log[:cut]:
            if call[0] in ("create", "rename", "unlink"):
                names.append(call)
            elif call[0] == "sync_dir":
                safe_names = len(names)
            elif call[0] == "sync":
                safe[call[1]] = len(written.get(call[1], []))
            else:
                written.setdefault(call[1], []).append(call)
        files = {}
        for call in names[:safe_names if least else chance.randint(safe_names, len(names))]:
            if call[0] == "create":
                files[call[1]] = call[2]
            elif call[0] == "rename":
                files[call[2]] = files.pop(call[1])
            else:
                del files[call[1]]
        return {path: self._content(written.get(inode, []), safe.get(inode, 0), chance, least)
                for path, inode in files.items()}

    def _content(self, calls, safe, chance, least):
        """Return what may be left of a file of which the first `safe` calls are safe."""
        content = b""
        way = 0 if least else chance.randrange(4)
        for number, (name, _, value) in enumerate(calls):
            if name == "truncate":
                content = content[:value]
            elif number < safe or way == 1 or way == 2 and chance.random() < 0.5:
                content += value
            elif way == 2:
                content += bytes(len(value))
            elif way == 3:
                return content + value[:chance.randrange(len(value) + 1)]
            else:
                return content
        return content


class T25Disk(unittest.TestCase):

    def setUp(self):
        self.path = os.path.realpath(tempfile.mkdtemp(prefix="miniflow-test-"))
        self.addCleanup(shutil.rmtree, self.path, ignore_errors=True)

    def test_a_file_is_replaced_as_a_whole_or_not_at_all(self):
        path, counter = os.path.join(self.path, "f"), FaultyDisk()
        counter.put(path, b"old", True)
        for at in range(1, counter.calls + 1):
            counter.put(path, b"old", False)
            with self.assertRaises(OSError):
                FaultyDisk(at).put(path, b"new", True)
            self.assertIn(mf.read_file(path), (b"old", b"new"))
        self.assertEqual(os.listdir(self.path), ["f"])

    def test_directories_are_made_private_with_those_above_the_outermost(self):
        disk, path = mf.Disk(), os.path.join(self.path, "a", "b", "c")
        disk.make_dir(path, outermost=True, durable=True)
        disk.make_dir(path, outermost=True)
        self.assertEqual(os.stat(path).st_mode & 0o777, 0o700)
        with self.assertRaises(FileNotFoundError):
            disk.make_dir(os.path.join(self.path, "x", "y"))
        link = os.path.join(self.path, "link")
        os.symlink(path, link)
        disk.make_dir(link, outermost=True)
        for target in (link, ENGINE):
            with self.assertRaises(NotADirectoryError):
                disk.make_dir(target)

    def test_state_is_not_put_where_others_could_change_it(self):
        with one(task("a")) as project:
            os.mkdir(project.at("open"))
            os.chmod(project.at("open"), 0o777)
            code, _, err = project.main("run", "f", "-o", "open")
            self.assertEqual(code, 74)
            self.assertIn("open: can't be used for state: everybody may write there (mode 777); "
                          "give another directory by -o", err)
            self.assertEqual(os.listdir(project.at("open")), [])
            os.chmod(project.at("open"), 0o775)
            self.assertEqual(project.main("run", "f", "-o", "open")[0], 0)

    def test_the_directory_of_another_user_is_refused(self):
        found = os.stat(self.path)
        strange = os.stat_result((*found[:4], found.st_uid + 1, *found[5:]))
        for uid, refused in ((found.st_uid + 2, True), (found.st_uid + 1, False), (0, False)):
            saved, os.geteuid = os.geteuid, lambda uid=uid: uid
            try:
                mf.Disk()._check_dir(self.path, strange)
                self.assertFalse(refused)
            except PermissionError as exc:
                self.assertTrue(refused)
                self.assertIn(f"it belongs to another user, uid {found.st_uid + 1}", str(exc))
            finally:
                os.geteuid = saved

    def test_a_file_system_on_which_all_files_have_one_mode_is_no_reason_to_refuse(self):
        class NoModes(mf.Disk):
            def _has_modes(self, path):
                return False
        os.chmod(self.path, 0o777)
        NoModes().make_dir(self.path)
        with self.assertRaises(PermissionError):
            mf.Disk().make_dir(self.path)
        self.assertEqual(os.listdir(self.path), [])


class T26Locks(unittest.TestCase):
    """Every test is made with the system's locks and, as on some network file systems, without."""

    WITHOUT = """
        import errno, os, sys
        sys.path.insert(0, {here!r}); import miniflow
        def no_lock(fd, shared=False):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        if {without}: miniflow.try_lock = no_lock
        """

    def program(self, without, code="sys.exit(miniflow.main())"):
        """Return the arguments that run MiniFlow in a process of its own, with or without locks."""
        text = self.WITHOUT.format(here=HERE, without=without)
        return [sys.executable, "-c", textwrap.dedent(text) + textwrap.dedent(code)]

    def both(self):
        for without in (False, True):
            with self.subTest(without=without):
                yield without

    def no_locks(self, without):
        """Take the locks away from this process, too, until the returned function is called."""
        def no_lock(fd, shared=False):
            raise OSError(errno.ENOLCK, "no locks")
        saved = mf.try_lock
        mf.try_lock = no_lock if without else saved
        return lambda: setattr(mf, "try_lock", saved)

    def race(self, project, without, *arguments):
        """Start six engines for one run at once; when five have been turned away, let the task of the sixth end."""
        racers = [subprocess.Popen([*self.program(without), *arguments], cwd=project.path, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE) for _ in range(6)]
        wait_for(lambda: [racer.poll() for racer in racers].count(None) < 2, "the end of five")
        project.write("go", "")
        errors = [racer.communicate()[1].decode() for racer in racers]
        self.assertEqual(sorted(racer.returncode for racer in racers), [0, 4, 4, 4, 4, 4], errors)
        return racers, errors

    def test_of_many_racers_for_one_run_one_makes_it_and_the_others_are_told_who(self):
        for without in self.both():
            for _ in range(1):
                with one(task("a", command="echo $PPID >> ran; until test -e go; do sleep 0.05; done")) as project:
                    racers, errors = self.race(project, without, "run", "f", "--run-id", "r")
                    winner = project.read("ran").strip()
                    for racer, text in zip(racers, errors):
                        self.assertRegex(text, rf"run r is being run by process {winner} on host \S+ since 20\S+Z; "
                                         if racer.returncode else "success")
                    self.assertEqual(os.listdir(project.at("miniflow_output/runs")), ["r.json"])
                    self.assertIs("has no locks, so this file has to do" in "".join(errors), without)

    def test_the_lock_of_a_killed_engine_is_taken_over_by_one(self):
        for without in self.both():
            with one(task("a", command="echo $$ >> ran; until test -e go; do sleep 0.05; done")) as project:
                engine = subprocess.Popen([*self.program(without), "run", "f", "--run-id", "r"], cwd=project.path,
                                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                wait_for(lambda: os.path.exists(project.at("ran")), "the task")
                restore = self.no_locks(without)
                try:
                    self.assertEqual(json.loads(project.main("show", "r", "--json")[1])["status"], "running")
                    engine.kill()
                    engine.communicate()
                    self.assertEqual(json.loads(project.main("show", "r", "--json")[1])["status"], "interrupted")
                finally:
                    restore()
                self.race(project, without, "resume", "r")
                self.assertEqual(len(project.lines("ran")), 2)
                self.assertEqual(os.listdir(project.at("miniflow_output/runs")), ["r.json"])

    def test_a_loser_waits_until_the_winner_has_said_who_it_is(self):
        with one(task("a")) as project:
            store = mf.Store(project.at("out"))
            store.prepare("runs")
            path = store.files("r").lock
            for content in (b"", json.dumps({**mf.this_engine(0), "pid": 2**22 + 1, "ticks": 1}).encode()):
                lock = store.lock("r", mf.this_engine(0))
                with open(path, "wb") as file:
                    file.write(content)
                teller = threading.Timer(0.5, project.write, ("out/runs/r.lock", json.dumps(mf.this_engine(0))))
                teller.start()
                with self.assertRaises(mf.RunLocked) as caught:
                    store.lock("r", mf.this_engine(0))
                self.assertIn(f"is being run by process {os.getpid()} ", str(caught.exception))
                teller.join()
                lock.release(remove=True)

    def test_a_forked_child_does_not_hold_the_lock(self):
        code = """
            store = miniflow.Store("out")
            store.prepare("runs")
            lock = store.lock("r", miniflow.this_engine(0))
            if os.fork():
                os._exit(0)
            os.write(1, bytes([10]))
            os.read(0, 1)
            """
        with one(task("a")) as project:
            parent = subprocess.Popen(self.program(False, code), cwd=project.path, stdin=subprocess.PIPE,
                                      stdout=subprocess.PIPE)
            self.assertEqual(parent.stdout.readline(), b"\n")
            parent.wait()
            store = mf.Store(project.at("out"))
            self.assertIsNone(store.owner("r"))
            store.lock("r", mf.this_engine(0)).release(remove=True)
            parent.stdin.close()
            parent.stdout.close()

    def test_where_there_are_no_locks_another_hosts_engine_is_gone_only_if_one_says_so(self):
        restore = self.no_locks(True)
        self.addCleanup(restore)
        with one(task("a")) as project:
            store = mf.Store(project.at("miniflow_output"))
            store.prepare("runs")
            there = {**mf.this_engine(0), "host": "elsewhere"}
            other = store.lock("r", there)
            self.assertTrue(other.is_weak)
            with self.assertRaises(mf.RunLocked) as caught:
                mf.Journal(store, "r")
            self.assertIn("on host elsewhere", str(caught.exception))
            mine = store.lock("r", mf.this_engine(0), force=True)
            other.release(remove=True)         # it comes back, and finds that the run is not its own any more
            self.assertEqual(store.owner("r")["host"], mf.this_engine(0)["host"])
            mine.release(remove=False)
            self.assertEqual(os.listdir(store.runs), [])

    def test_an_owner_that_was_replaced_meanwhile_is_put_back(self):
        """Two engines see the file of a dead one; the slower one renames what is by then the quicker one's."""
        restore = self.no_locks(True)
        self.addCleanup(restore)
        with one(task("a")) as project:
            store, dead = mf.Store(project.at("out")), {**mf.this_engine(0), "boot": "an earlier one"}
            store.prepare("runs")
            store.lock("r", dead)
            quick = mf.this_engine(0)

            class Slow(mf.Disk):
                def replace(self, old, new):
                    if ".stale-" in new:
                        os.unlink(old)
                        mf.Store(store.path).lock("r", quick)
                    super().replace(old, new)

            with self.assertRaises(mf.RunLocked):
                mf.Store(store.path, Slow()).lock("r", mf.this_engine(0))
            self.assertEqual(store.owner("r"), quick)
            self.assertEqual(os.listdir(store.runs), ["r.owner"])

    def test_on_windows_a_byte_beyond_the_content_is_locked(self):
        calls = []

        class Msvcrt:
            LK_NBLCK = 2

            @staticmethod
            def locking(fd, mode, count):
                calls.append((os.lseek(fd, 0, os.SEEK_CUR), mode, count))
                if len(calls) > 1:
                    raise OSError(errno.EACCES, "locked")

        saved = os.name, sys.modules.get("msvcrt")
        with tempfile.TemporaryFile() as file:
            try:
                os.name, sys.modules["msvcrt"] = "nt", Msvcrt
                self.assertEqual((mf.try_lock(file.fileno()), mf.try_lock(file.fileno())), (True, False))
            finally:
                os.name = saved[0]
                del sys.modules["msvcrt"]
            self.assertEqual(file.tell(), 0)
        self.assertEqual(calls, [(2**30, 2, 1)] * 2)


class T27Store(unittest.TestCase):

    FLOW = make(task("a"), task("b", "a"))

    def setUp(self):
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None         # where fsync costs nothing
        self.path = tempfile.mkdtemp(prefix="miniflow-test-", dir=memory)
        self.addCleanup(shutil.rmtree, self.path, ignore_errors=True)

    def store(self, disk=None):
        return mf.Store(os.path.join(self.path, "out"), disk)

    def events(self):
        return simulate(self.FLOW)[2]

    def write_run(self, store, until=None, run_id="r", finish=True):
        """Carry a run through the store as an engine does, up to event number `until`; return the Run."""
        journal = mf.Journal(store, run_id)
        run = mf.Run(mf.make_plan(self.FLOW), run_id, started=1)
        try:
            journal.begin(run)
            for n, event in enumerate(self.events()[:until]):
                journal.append([event])
                run.apply(event)
                journal.idle(run, float(n))
            if finish and until is None:
                journal.finish(run)
        finally:
            journal.close()
        return run

    def test_a_finished_run_leaves_one_file_and_it_says_what_happened(self):
        store = self.store()
        run = self.write_run(store)
        self.assertEqual(os.listdir(store.runs), ["r.json"])
        loaded = store.load("r")
        self.assertEqual((mf.run_to_json(loaded.run), loaded.status, loaded.live),
                         (mf.run_to_json(run), "success", False))
        self.assertEqual(store.summary("r")["status"], "success")

    def test_a_run_whose_engine_is_gone_is_interrupted_whatever_its_file_says(self):
        store = self.store()
        for until in range(len(self.events()) - 1):
            self.write_run(store, until, f"r{until}")
            self.assertEqual(store.load(f"r{until}").status, "interrupted")
            self.assertEqual(store.summary(f"r{until}")["status"], "interrupted")

    def test_a_journal_cut_at_any_byte_loads_as_a_prefix(self):
        store = self.store()
        self.write_run(store, finish=False)
        files = store.files("r")
        content = mf.read_file(files.journal)
        os.unlink(files.state)
        states = [mf.run_to_json(run) for run in self.prefixes()]
        first = content.index(b"\n") + 1
        for cut in range(len(content)):
            with open(files.journal, "wb") as file:
                file.write(content[:cut])
            if cut < first:
                with self.assertRaises(mf.StateError):
                    store.load("r")
            else:
                loaded = store.load("r")
                whole = content[:cut].count(b"\n") - 1
                self.assertEqual(mf.run_to_json(loaded.run), states[whole])
                self.assertEqual(len(loaded.damage), cut - content.rindex(b"\n", 0, cut) - 1)

    def prefixes(self):
        run = mf.Run(mf.make_plan(self.FLOW), "r", started=1)
        yield run
        for event in self.events():
            run.apply(event)
            yield run

    def prefixes_json(self):
        return [mf.run_to_json(run) for run in self.prefixes()]

    def test_a_fault_at_any_call_of_the_disk_loses_nothing_that_was_acknowledged(self):
        """The disk fails at call n, once or from then on; then it is sound again, and the run is read."""
        counter = FaultyDisk()
        self.write_run(self.store(counter))
        self.assertGreater(counter.calls, 20)
        saved, mf.STALL_S = mf.STALL_S, 0.0
        self.addCleanup(setattr, mf, "STALL_S", saved)
        states, errors = self.prefixes_json(), 0
        for at, error, lasting in itertools.product(range(1, counter.calls + 1),
                                                    (errno.ENOSPC, errno.EIO, errno.EROFS), (False, True)):
            with self.subTest(at=at, error=errno.errorcode[error], lasting=lasting):
                shutil.rmtree(self.path)
                os.mkdir(self.path)
                done, failed = self.acknowledged(self.store(FaultyDisk(at, error, lasting)))
                errors += failed
                if not self.store().exists("r"):
                    self.assertEqual(done, 0)
                    continue
                # A record that could be neither acknowledged nor taken back may stand.
                self.assertIn(mf.run_to_json(self.store().load("r").run), states[done:done + 2])
        self.assertGreater(errors, 50)

    def acknowledged(self, store):
        """Carry a run through as an engine does; return how many events were acknowledged, and if it ended early."""
        done, journal = 0, None
        try:
            journal = mf.Journal(store, "r", "full")
            run = mf.Run(mf.make_plan(self.FLOW), "r", started=1)
            journal.begin(run)
            for n, event in enumerate(self.events()):
                journal.append([event])
                run.apply(event)
                done += 1
                journal.idle(run, float(n))
            journal.finish(run)
        except mf.StateError as exc:
            self.assertRegex(str(exc), "No space left on device|Input/output error|Read-only file system|replaced")
            return done, True
        finally:
            if journal:
                journal.close()
        return done, False

    WIDE = make(task("a"), task("b", "a"), task("c", "a"), task("d", "b", "c"))

    def session(self, store, tell, durability="full"):
        """Carry run r of WIDE to its end, or on to it, as an engine does, in a simulated world."""
        journal = mf.Journal(store, "r", durability)
        if store.exists("r"):
            last = store.load("r")
            run = last.run if last.run.outcome else mf.reopen(last.run, self.WIDE)
        else:
            last, run = None, mf.Run(mf.make_plan(self.WIDE), "r", started=1)
        journal.begin(run, last)
        world, events = SimWorld(), None
        world.clock = float(run.plan.rank["d"])

        def record(events, happened):
            journal.append(events, happened)
            for event in events:
                if isinstance(event, mf.AttemptStarted):
                    tell(f"begin {event.task} {event.attempt}")
                elif isinstance(event, mf.AttemptEnded):
                    tell(f"end {event.task} {event.attempt}")

        steps = mf.drive(run, world, record, 2)
        with contextlib.suppress(StopIteration):
            while True:
                until = steps.send(events)
                journal.idle(run, world.now())
                events = world.wait(run, until)
        journal.finish(run)

    def check_told(self, told):
        """Hold what sessions told of the attempts against what they promise; return the successes in it."""
        ended, begun = {}, {}
        for word, name, attempt in map(str.split, told):
            if word == "begin":
                self.assertNotIn(name, ended, f"{name} was a success and runs again: {told}")
                self.assertLessEqual(set(self.WIDE_UP[name]), set(ended), told)
                self.assertGreater(int(attempt), begun.get(name, 0), told)
                begun[name] = int(attempt)
            else:
                self.assertEqual(begun[name], int(attempt))
                ended[name] = int(attempt)
        return ended

    WIDE_UP = {task.id: task.depends_on for task in WIDE.tasks}
    CALLS = ("open", "write", "fsync", "replace", "unlink", "ftruncate", "close", "mkdir", "fchmod", "chmod")

    def in_a_child(self, action, at):
        """Make a session in a forked child whose call number `at` to the system goes by `action`; 0: none.

        Returns its exit code, 77 if it was killed, and what it told of attempts.
        """
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            code = 70
            try:
                code = self.child_session(action, at, writer)
            finally:
                os._exit(code)
        os.close(writer)
        with open(reader) as file:
            told = file.read().splitlines()
        return os.WEXITSTATUS(os.waitpid(child, 0)[1]), told

    def child_session(self, action, at, writer):
        """Make a session with a fault and return the exit code."""
        write, calls, doomed = os.write, itertools.count(1), []

        def tell(text):
            write(writer, text.encode() + b"\n")
            if doomed:
                os._exit(77)                   # right after the first record behind the torn one

        def patched(name, call):
            def fault(*args, **options):
                if next(calls) != at:
                    return call(*args, **options)
                if action == "kill":
                    os._exit(77)
                if action == "short" and name == "write":
                    return call(args[0], args[1][:len(args[1]) // 2])
                if action in ("kill half way", "short and full") and name == "write":
                    call(args[0], args[1][:len(args[1]) // 2])
                    if action == "kill half way":
                        os._exit(77)
                    doomed.append(True)
                    raise OSError(errno.ENOSPC, "no space")
                if isinstance(action, int):
                    raise OSError(action, os.strerror(action))
                return call(*args, **options)
            return fault

        for name in self.CALLS:
            setattr(os, name, patched(name, getattr(os, name)))
        time.sleep = lambda seconds: None      # a full disk has space again at once
        try:
            self.session(self.store(), tell)
        except mf.StateError:
            return 74
        return 0 if next(calls) > at else 99            # 99: there is no call of that number

    def test_a_fault_at_any_call_to_the_system_in_a_real_process_loses_nothing(self):
        """Killed, killed in the middle of a write, short writes, errors; then another engine goes on."""
        points = 0
        for action in ("kill", "kill half way", "short", "short and full", errno.ENOSPC, errno.EIO):
            codes = set()
            for at in itertools.count(1):
                shutil.rmtree(self.path)
                os.mkdir(self.path)
                with self.subTest(action=action, at=at):
                    code, told = self.in_a_child(action, at)
                    if code == 99:
                        break
                    codes.add(code)
                    acknowledged = self.check_told(told)
                    if self.store().exists("r"):
                        tasks = self.store().load("r").run.tasks
                        done = {name for name in tasks if tasks[name].status == "success"}
                        self.assertLessEqual(set(acknowledged), done)
                        # What was killed between writing its record and telling of it has ended all the same.
                        told += [f"end {name} {tasks[name].attempt}" for name in sorted(done - set(acknowledged))]
                    code, more = self.in_a_child("nothing", 0)
                    self.assertEqual(code, 0)
                    self.assertEqual(set(self.check_told(told + more)), set("abcd"))
                    loaded = self.store().load("r")
                    self.assertEqual(loaded.status, "success")
                    left = [name for name in os.listdir(self.store().runs) if ".bad-" not in name]
                    self.assertEqual(left, ["r.json"])
                    points += 1
            self.assertLessEqual(codes, {0, 74, 77})
            self.assertNotIn(codes, ({0}, {74}) if action == "kill" else ({70},))
        self.assertGreater(points, 300)

    def test_a_power_cut_at_any_moment_leaves_a_possible_state_and_full_loses_nothing(self):
        """Every state of the disk that a power cut may leave, as far as fsync has not forbidden it, is read."""
        for durability in mf.DURABILITIES:
            self.path = os.path.join(self.path, durability)
            os.mkdir(self.path)
            read = self.cut_everywhere(durability)
            self.assertGreater(read["read"], 900, read)

    def cut_everywhere(self, durability):
        """Cut the power after each call of a session, and count how many of the states left could be read."""
        disk, marks = RecordingDisk(), []      # marks: how much had been called by then, what was told
        store = self.store(disk)
        self.session(store, lambda text: marks.append((len(disk.log), text)), durability)
        chance, read = random.Random(7), collections.Counter()
        for cut in range(len(disk.log) + 1):
            told = [text for at, text in marks if at <= cut]
            for trial in range(30):
                files = disk.after_power_cut(cut, chance, least=not trial)
                read[self.check_cut(store, files, told, durability)] += 1
        return read

    def check_cut(self, store, files, told, durability):
        """Read the run from `files` alone; return whether it was read, or had not been acknowledged yet."""
        shutil.rmtree(store.runs)
        os.mkdir(store.runs)
        for path, content in files.items():
            with open(path, "wb") as file:
                file.write(content)
        try:
            run = store.load("r").run
        except (mf.NotFound, mf.StateError):
            self.assertEqual(told, [], "a run that had begun is not there any more")
            return "not there"
        done = {name for name, task_run in run.tasks.items() if task_run.status == "success"}
        for name in done:
            self.assertLessEqual(set(self.WIDE_UP[name]), done)
        self.assertLessEqual(done, set(self.check_told(told)) | self.in_flight(told))
        if durability == "full":
            self.assertLessEqual(set(self.check_told(told)), done)
        again = mf.reopen(run, self.WIDE) if not run.outcome else run
        self.assertLessEqual(done, {name for name in again.tasks if again.tasks[name].status == "success"})
        return "read"

    def in_flight(self, told):
        """Return the tasks that had begun: the record of their end may be on disk and not told of yet."""
        return {text.split()[1] for text in told if text.startswith("begin")}

    def test_commands_that_only_read_change_nothing(self):
        with one(task("a", command="echo line"), task("b", "a")) as project:
            self.assertEqual(project.main("list")[0], 0)
            self.assertFalse(os.path.exists(project.at("miniflow_output")))
            project.main("run", "f", "--run-id", "done")
            self.write_run(mf.Store(project.at("miniflow_output")), 2)
            with open(project.at("miniflow_output/runs/r.jsonl"), "ab") as file:
                file.write(b'{"torn')
            project.write("miniflow_output/runs/junk.json", "{}")
            project.write("miniflow_output/runs/r.json.tmp", "left over")

            def tree():
                return {(path, name, os.lstat(os.path.join(path, name)).st_mtime_ns,
                         os.lstat(os.path.join(path, name)).st_ino, os.lstat(os.path.join(path, name)).st_size)
                        for path, folders, names in os.walk(project.at("miniflow_output"))
                        for name in folders + names}

            before = tree()
            for arguments in (["runs"], ["runs", "--json"], ["show", "r"], ["show", "done"], ["show", "junk"], ["list"],
                              ["logs", "done"], ["logs", "r"], ["validate", "f"], ["graph", "f"], ["cancel", "r"],
                              ["clean", "--keep", "0", "--dry-run"], ["show", "last", "--json"]):
                project.main(*arguments)
                self.assertEqual(tree(), before, arguments)

    def test_durations_are_those_of_the_newest_run_of_the_flow_that_has_ended(self):
        store, flow = self.store(), make(task("a"))

        def known():
            return store.durations("f", store.ids()).get("a")

        self.assertIsNone(known())
        remember(store, flow, {"a": 1}, "f-20260101T000000Z-0000", 10)
        remember(store, flow, {"a": 2}, "f-20260102T000000Z-0000", 20)
        self.assertEqual(known(), 2)
        remember(store, flow, {"a": 3}, "mine", 30)
        self.assertEqual(known(), 3)
        remember(store, flow, {"a": 4}, "yours", 25)
        self.assertEqual(known(), 3)
        remember(store, flow, {"a": 5}, "g", 40, stem="g")
        remember(store, flow, {"a": 6}, "g-20260103T000000Z-0000", 50, stem="g")
        remember(store, flow, {"a": 7}, "goes_on", 60, status=None)
        self.assertEqual(known(), 3)
        remember(store, flow, {"a": 8}, "f-20260104T000000Z-0000", 70, status="failed")
        self.assertEqual(known(), 8)
        for junk in (b"", b"{}", b"[" * 5000, b'{"flow": "f"}', b'{"flow": "f", "status": "failed",\n', b"\xff"):
            with open(os.path.join(store.runs, "zz.json"), "wb") as file:
                file.write(junk)
            self.assertEqual(known(), 8, junk)
        with open(store.files("f-20260104T000000Z-0000").state, "r+b") as file:
            file.seek(-30, os.SEEK_END)
            file.write(b"#")
        self.assertEqual(known(), 3)
        os.unlink(os.path.join(store.runs, "zz.json"))
        os.symlink("mine.json", os.path.join(store.runs, "zz.json"))
        os.mkdir(os.path.join(store.runs, "con.json"))
        self.assertEqual(known(), 3)

    def test_a_new_run_reads_few_of_the_files_of_a_long_history(self):
        store, flow, read = self.store(), make(task("a")), []
        reader = mf.read_file
        self.addCleanup(setattr, mf, "read_file", reader)
        mf.read_file = lambda path, limit=-1, follow=True: read.append((path, limit)) or reader(path, limit, follow)
        for n in range(300):
            remember(store, flow, {"a": n + 1}, f"f-20260101T{n:06}Z-0000", n)
            remember(store, flow, {"a": 1000}, f"g-20260101T{n:06}Z-0000", n, stem="g")
            remember(store, flow, {"a": 2000}, f"build{n:03}", n, stem="h")
        self.assertEqual(store.durations("f", store.ids()), {"a": 300})
        whole = [path for path, limit in read if limit == -1]
        self.assertEqual(whole, [store.files("f-20260101T000299Z-0000").state])
        self.assertLessEqual(len(read), 33)

    def test_a_store_in_memory_knows_the_durations_of_the_run_that_ended_last(self):
        store, flow = mf.MemoryStore(), make(task("a"))
        for run_id, seconds, stem, status in (("x", 1, "f", "success"), ("y", 2, "f", "failed"),
                                              ("z", 3, "g", "success"), ("w", 4, "f", None)):
            store.save(remembered(flow, {"a": seconds}, run_id, stem=stem, status=status), {})
        self.assertEqual(store.durations("f", store.ids()), {"a": 2})
        store.save(remembered(flow, {"a": 5}, "x"), {})
        self.assertEqual(store.durations("f", store.ids()), {"a": 5})
        store.remove("x")
        store.remove("y")
        self.assertEqual(store.durations("f", store.ids()), {})

    def test_a_disk_that_has_space_again_lets_the_run_go_on(self):
        notes, store = [], self.store(FaultyDisk())
        journal = mf.Journal(store, "r")
        journal.note = notes.append
        run = mf.Run(mf.make_plan(self.FLOW), "r", started=1)
        journal.begin(run)
        for event in self.events():
            store.disk.at = store.disk.calls + 1
            journal.append([event])
            run.apply(event)
        store.disk.at = 0
        journal.finish(run)
        self.assertEqual(mf.run_to_json(store.load("r").run), self.prefixes_json()[-1])
        self.assertEqual(len(notes), len(self.events()))
        self.assertIn("No space left on device; waiting up to 60 s for space", notes[0])

    def test_what_could_not_be_brought_to_the_medium_is_written_anew(self):
        notes, store = [], self.store(FaultyDisk(error=errno.EIO))
        journal = mf.Journal(store, "r", "full")
        journal.note = notes.append
        run = mf.Run(mf.make_plan(self.FLOW), "r", started=1)
        journal.begin(run)
        before = os.stat(store.files("r").journal).st_ino
        for n, event in enumerate(self.events()):
            store.disk.at = store.disk.calls + 2 if n == 2 else 0       # its sync
            journal.append([event])
            run.apply(event)
        self.assertNotEqual(os.stat(store.files("r").journal).st_ino, before)
        self.assertEqual(mf.run_to_json(store.load("r").run), self.prefixes_json()[-1])
        self.assertIn("Input/output error; going on in a new file", notes[0])
        journal.close()

    def test_a_fresh_journal_has_once_what_the_run_had_taken_in_when_the_old_one_failed(self):
        for happened in (0, 1, 2):
            shutil.rmtree(self.path)
            store = self.store(FaultyDisk(error=errno.EIO))
            journal = mf.Journal(store, "r", "full")
            run = mf.Run(mf.make_plan(self.FLOW), "r", started=1)
            journal.begin(run)
            events = self.events()[:2]
            for event in events[:happened]:
                run.apply(event)
            store.disk.at = store.disk.calls + 2                    # its sync
            journal.append(events, happened)
            self.assertEqual(mf.run_to_json(store.load("r").run), self.prefixes_json()[2])
            journal.close()

    def test_an_engine_whose_run_was_taken_over_notices_before_anything_else_happens(self):
        for quiet in (False, True):
            shutil.rmtree(self.path)
            store = self.store()
            first = mf.Journal(store, "r")
            run = mf.Run(mf.make_plan(self.FLOW), "r", started=1)
            first.begin(run)
            first.idle(run, 100.0)
            os.unlink(store.files("r").lock)    # somebody "cleans up"
            second = mf.Journal(store, "r")     # it has the lock, and has not put its own journal there yet
            with self.assertRaises(mf.StateError) as caught:
                if quiet:
                    first.idle(run, 103.0)
                else:
                    time.sleep(mf._TRUST_S)
                    first.append(self.events()[:1])
            self.assertIn("another engine may have taken the run over", str(caught.exception))
            second.begin(mf.reopen(store.load("r").run, self.FLOW), store.load("r"))
            first.close(remove=True)
            self.assertTrue(store.owner("r"), "the first has removed the lock of the second")
            second.close()

    def test_5000_mutations_of_the_files_give_a_true_state_or_a_clear_error(self):
        store, chance = self.store(), random.Random(11)
        self.write_run(store, finish=False)
        files = store.files("r")
        sound = {path: mf.read_file(path) for path in (files.journal, files.state)}
        states, outcomes = self.prefixes_json(), {"state": 0, "error": 0}
        for _ in range(5000):
            for path, content in sound.items():
                if chance.random() < 0.8:
                    content = self.mutated(chance, content)
                if content is None:
                    store.disk.unlink(path)
                else:
                    with open(path, "wb") as file:
                        file.write(content)
            try:
                self.assertIn(mf.run_to_json(store.load("r").run), states)
                outcomes["state"] += 1
            except (mf.StateError, mf.NotFound):
                outcomes["error"] += 1
        self.assertGreater(min(outcomes.values()), 500, outcomes)

    def mutated(self, chance, content):
        """Return `content` with some bytes changed, cut, doubled, swapped or zeroed, or None for no file at all."""
        if chance.random() < 0.05:
            return None
        at, to = sorted(chance.randrange(len(content) + 1) for _ in range(2))
        middle = content[at:to]
        return content[:at] + chance.choice([
            b"", middle * 2, bytes(len(middle)), middle[::-1], os.urandom(len(middle)),
            bytes([middle[0] ^ 1 << chance.randrange(8)]) + middle[1:] if middle else b"\n"]) + content[to:]

    def test_the_state_file_is_rewritten_when_its_turn_comes_and_its_definition_is_encoded_once(self):
        encoded, original = [], mf.task_to_json
        self.addCleanup(setattr, mf, "task_to_json", original)
        mf.task_to_json = lambda task: encoded.append(task.id) or original(task)
        journal = mf.Journal(self.store(), "r")
        run = mf.Run(mf.make_plan(self.FLOW), "r")
        journal.begin(run)
        written, now = [mf.read_file(journal.files.state)], 10.0
        for event in self.events():
            journal.append([event])
            run.apply(event)
            due = journal.idle(run, now)
            self.assertEqual(mf.read_file(journal.files.state), written[-1])
            self.assertGreater(due, now)
            now += 3600
            journal.idle(run, now)
            written.append(mf.read_file(journal.files.state))
        self.assertEqual([mf.decode_state(text)["seq"] for text in written], [*range(1, len(self.events()) + 2)])
        journal.finish(run)
        self.assertEqual(encoded, [task.id for task in self.FLOW.tasks])

    def test_what_was_written_within_a_moment_of_the_last_sync_is_synced_soon_after(self):
        disk = FaultyDisk()
        journal = mf.Journal(self.store(disk), "r")
        run = mf.Run(mf.make_plan(self.FLOW), "r")
        journal.begin(run)
        journal.append(self.events()[:1])
        journal.idle(run, 10.0)
        journal.append(self.events()[1:2])
        self.assertAlmostEqual(journal.idle(run, 10.1), 10.2)
        calls = disk.calls
        self.assertEqual(journal.idle(run, 11.0), 12.0)
        self.assertGreater(disk.calls, calls)
        journal.close()

    def test_damage_is_reported_and_nothing_is_replaced_by_an_empty_state(self):
        store = self.store()
        self.write_run(store)
        path = store.files("r").state
        for content in (b"", b"{}", mf.read_file(path)[:-5],
                        mf.read_file(path).replace(b"success", b"sucsess")):
            with open(path, "wb") as file:
                file.write(content)
            with self.assertRaises(mf.StateError) as caught:
                store.load("r")
            self.assertIn(path, str(caught.exception))
            self.assertEqual(mf.read_file(path), content)
            self.assertEqual(store.summary("r")["status"], "damaged")
            with self.assertRaises(mf.StateError):
                mf.open_again(store, "r", None, None, mf.Order("."), self.fail)
            self.assertEqual(mf.read_file(path), content)

    def test_a_sound_record_that_makes_no_sense_is_damage_and_no_crash(self):
        """As a newer version, or somebody with a checksum at hand, may leave one."""
        store = self.store()
        for n, members in enumerate(({"event": "future_event", "at": mf.format_time(1)}, {"event": "opened"}, {},
                                     {"event": "attempt_ended", "at": mf.format_time(1), "task": "zz", "attempt": 1,
                                      "status": "success"}, {"event": "run_finished", "at": "noon", "status": "x"})):
            self.write_run(store, 2, f"r{n}")
            with open(store.files(f"r{n}").journal, "ab") as file:
                file.write(mf.encode_record(members, 4))
            with self.subTest(members=members):
                self.assertIn(store.summary(f"r{n}")["status"], ("damaged", "interrupted"))
        self.assertEqual(len(store.history()), 5)

    def test_the_state_of_another_run_is_not_taken_for_this_ones(self):
        store = self.store()
        self.write_run(store)
        shutil.copy(store.files("r").state, store.files("copy").state)
        self.assertEqual(store.summary("copy")["status"], "damaged")
        with self.assertRaises(mf.StateError) as caught:
            store.load("copy")
        self.assertIn("copy.json: the state of run r; nothing was changed", str(caught.exception))

    def test_files_are_private_under_any_umask(self):
        for mask in (0, 0o077, 0o777):
            old = os.umask(mask)
            try:
                store = mf.Store(os.path.join(self.path, f"out{mask}"))
                self.write_run(store, 2)
                self.write_run(store, None, "done")
            finally:
                os.umask(old)
            for folder, _, names in os.walk(store.path):
                self.assertEqual(os.stat(folder).st_mode & 0o777, 0o700)
                for name in names:
                    self.assertEqual(os.stat(os.path.join(folder, name)).st_mode & 0o777, 0o600, name)

    def test_no_symbolic_link_below_the_output_directory_is_followed(self):
        victim = os.path.join(self.path, "victim")
        with open(victim, "w") as file:
            file.write("untouched")
        store = self.store()
        store.prepare("runs")
        files = store.files("r")
        for path in (files.journal + ".tmp", files.state + ".tmp"):
            os.symlink(victim, path)
        self.write_run(store)
        os.symlink(victim, store.files("q").lock)
        with self.assertRaises(mf.StateError):
            mf.Journal(store, "q")
        with open(victim) as file:
            self.assertEqual(file.read(), "untouched")
        os.symlink(victim, store.files("s").state)
        self.assertIn("symbolic link", store.summary("s")["reason"])
        os.mkdir(os.path.join(self.path, "elsewhere"))
        os.symlink(os.path.join(self.path, "elsewhere"), os.path.join(store.path, "logs"))
        with self.assertRaises(mf.StateError):
            store.prepare("logs", "r")

    def test_run_ids_that_are_no_names_are_refused(self):
        for run_id in ("../x", "a/b", "", ".", "-rf", "a.json", "x" * 129, "a\0b", "CON", "nul", "ａ", "a\n",
                       "C:\\x"):
            with self.subTest(run_id=run_id), self.assertRaises(mf.UsageError):
                self.store().files(run_id)

    def test_made_ids_sort_by_time_and_are_run_ids(self):
        store = self.store()
        ids = [store.new_id("my.flow", at) for at in (0, 1e9, 1.8e9)]
        self.assertEqual(ids, sorted(ids))
        self.assertRegex(ids[-1], r"^my_flow-20270115T080000Z-[0-9a-f]{4}$")
        for run_id in ids + [store.new_id("-" * 3, 0), store.new_id("é" * 200, 0)]:
            store.files(run_id)

    def test_of_many_racers_for_one_run_one_wins_and_the_others_are_told_who(self):
        store = self.store()
        first = mf.Journal(store, "r")
        first.begin(mf.Run(mf.make_plan(self.FLOW), "r"))
        with self.assertRaises(mf.RunLocked) as caught:
            mf.Journal(store, "r")
        self.assertRegex(str(caught.exception),
                         rf"^run r is being run by process {os.getpid()} on host \S+ since 20\S+Z; ")
        self.assertTrue(store.owner("r"))
        self.assertEqual(store.load("r").status, "running")
        first.close()
        self.assertFalse(store.owner("r"))
        mf.Journal(store, "r").close()

    def test_somebody_who_only_looks_does_not_keep_an_engine_out(self):
        store = self.store()
        self.write_run(store, 2)
        looker = subprocess.Popen([sys.executable, "-c", textwrap.dedent(f"""
            import sys, time; sys.path.insert(0, {HERE!r}); import miniflow
            store, end = miniflow.Store({store.path!r}), time.monotonic() + 3
            print(flush=True)
            while time.monotonic() < end: store.owner("r")
            """)], stdout=subprocess.PIPE)
        looker.stdout.readline()
        for _ in range(200):
            mf.Journal(store, "r").close()
        looker.kill()
        looker.communicate()

    def test_a_torn_tail_is_kept_aside_when_the_run_is_resumed(self):
        with one(task("a")) as project:
            store = mf.Store(project.at("miniflow_output"))
            self.write_run(store, 2)
            with open(store.files("r").journal, "ab") as file:
                file.write(b'{"event":"attempt_en')
            notes = []
            order = mf.Order(project.at("tasks"))
            run = mf.run_to_end(mf.open_again(store, "r", None, None, order, notes.append), store, None, order)
            self.assertTrue(run.ok)
            self.assertIn("20 bytes at the end of", notes[0])
            kept = [name for name in os.listdir(store.runs) if ".bad-" in name]
            self.assertEqual([mf.read_file(os.path.join(store.runs, name)) for name in kept],
                             [b'{"event":"attempt_en'])


def children(pid):
    """Return the processes whose parent is `pid`."""
    found = []
    for name in os.listdir("/proc"):
        fields = mf.process_stat(name) if name.isdigit() else []
        if fields and int(fields[1]) == pid:
            found.append(int(name))
    return found


@unittest.skipUnless(LINUX, "posix_spawn is used on Linux")
class T28Spawn(unittest.TestCase):
    """Each test is made both ways: by posix_spawn, and by Popen, which another directory asks for."""

    def both(self, *argv, keep=(), env=None):
        """Return exit code and output of a command that was started both ways, which have to agree."""
        seen = []
        for cwd in (os.getcwd(), "/"):
            with tempfile.TemporaryFile() as out, open(os.devnull) as null:
                files = (null.fileno(), out.fileno(), out.fileno())
                process = mf.spawn(argv, {**os.environ, **(env or {})}, cwd, files, keep)
                mf.wait_for(process.poll, 20)
                out.seek(0)
                seen.append((process.returncode, out.read()))
        masks = re.compile(rb"0*180000000|0{16}")             # signals 32 and 33 are the C library's own
        self.assertEqual(*[(code, masks.sub(b"none", out)) for code, out in seen])
        return seen[0]

    def test_a_file_that_is_no_program_does_not_keep_one_further_on_from_being_found(self):
        with Project() as project:
            for folder, text in (("first", "garbage"), ("second", "#!/bin/sh\necho found\n")):
                project.write(f"{folder}/prog", text)
                os.chmod(project.at(folder, "prog"), 0o755)
            path = f"{project.at('first')}:{project.at('second')}"
            project.write("flows/f.json", json.dumps(flow_json(
                task("a", command=["prog"]), task("b", command=["prog"], cwd=project.at("first")), env={"PATH": path})))
            self.assertEqual(project.main("run", "f", "--run-id", "r")[0], 0)
            self.assertEqual([project.log("r", name) for name in "ab"], [b"found\n"] * 2)

    def test_an_exit_code_is_that_of_the_program_or_of_its_signal(self):
        for command, code in (("exit 0", 0), ("exit 7", 7), ("kill -9 $$", -9), ("kill -TERM $$", -15)):
            self.assertEqual(self.both("sh", "-c", command), (code, b""))

    def test_nothing_is_open_but_what_is_given(self):
        reader, writer = os.pipe()
        kept = os.open(os.devnull, os.O_RDONLY)
        self.addCleanup(lambda: [os.close(fd) for fd in (reader, writer, kept)])
        os.set_inheritable(writer, True)
        listing = "import os; print(*[fd for fd in range(300) if os.path.exists(f'/proc/self/fd/{fd}')])"
        code, out = self.both(sys.executable, "-c", listing, keep=[kept])
        self.assertEqual((code, list(map(int, out.split()))), (0, [0, 1, 2, kept]))
        self.assertEqual([os.get_inheritable(fd) for fd in (kept, writer)], [False, True])

    def test_it_leads_a_session_and_has_the_signals_of_a_new_process(self):
        show = "echo $(cut -d' ' -f5,6 /proc/$$/stat | tr ' ' '\\n' | grep -cx $$); grep Sig[BI] /proc/self/status"
        code, out = self.both("sh", "-c", show)
        self.assertEqual((code, out.split()[0]), (0, b"2"))
        self.assertEqual([int(mask, 16) & ~(3 << 31) for mask in out.split()[2::2]], [0, 0])

    def test_a_program_is_looked_up_in_its_own_path(self):
        with Project() as project:
            project.write("own", "#!/bin/sh\necho found")
            os.chmod(project.at("own"), 0o755)
            self.assertEqual(self.both("own", env={"PATH": project.path}), (0, b"found\n"))

    def test_what_cannot_start_is_told_alike(self):
        with Project() as project:
            project.write("plain", "no program")
            project.write("odd", "no program")
            os.chmod(project.at("odd"), 0o755)
            for argv, number in ((["no-such-program"], errno.ENOENT), ([project.at("gone")], errno.ENOENT),
                                 ([project.at("plain")], errno.EACCES), ([project.path], errno.EACCES),
                                 ([project.at("odd")], errno.ENOEXEC),
                                 (["true", "x" * 2**18], errno.E2BIG)):
                for cwd in (os.getcwd(), "/"):
                    with open(os.devnull) as null, self.assertRaises(OSError) as caught:
                        mf.spawn(argv, os.environ, cwd, (null.fileno(),) * 3)
                    self.assertEqual(caught.exception.errno, number, argv[0])
                    self.assertIn(argv[0], str(caught.exception))
            for argv, env in ((["true", "a\0b"], {}), (["true"], {"A": "a\0b"}), (["true"], {"A=B": "c"})):
                for cwd in (os.getcwd(), "/"):
                    with open(os.devnull) as null, self.assertRaises(ValueError):
                        mf.spawn(argv, {**os.environ, **env}, cwd, (null.fileno(),) * 3)

    def test_the_start_time_is_the_one_that_proc_tells(self):
        with open(os.devnull) as null:
            for _ in range(50):
                process = mf.spawn(["true"], os.environ, os.getcwd(), (null.fileno(),) * 3)
                self.assertEqual(process.ticks, mf.start_ticks(process.pid))
                mf.wait_for(process.poll, 20)

    def test_a_program_with_threads_starts_processes_too(self):
        done = threading.Event()
        thread = threading.Thread(target=done.wait)
        thread.start()
        try:
            self.assertEqual(self.both("echo", "x"), (0, b"x\n"))
        finally:
            done.set()
            thread.join()


@unittest.skipUnless(LINUX, "without /proc nobody can tell whose a process is")
class T29Orphans(unittest.TestCase):

    STUBBORN = """
        import os, signal, subprocess, sys, time
        if len(sys.argv) == 1:                 # a child in the group, and one that has left it and closed its files
            subprocess.Popen([sys.executable, __file__, "child"])
            subprocess.Popen([sys.executable, __file__, "escaped"], start_new_session=True, stdin=subprocess.DEVNULL,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        fd = os.open("pids", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(fd, b"%d\\n" % os.getpid())
        time.sleep(120)
        """

    def pids(self, project, count):
        def all_there():
            return os.path.exists(project.at("pids")) and len(project.lines("pids")) >= count
        wait_for(all_there, f"{count} processes")
        return [int(line) for line in project.lines("pids")]

    def test_a_killed_engine_leaves_no_process_of_its_tasks(self):
        for _ in range(4):
            with one(*[task(f"t{n}", script="s.py") for n in range(5)], max_parallel=5,
                     scripts={"s.py": self.STUBBORN}) as project:
                process = project.start("run", "f", "--run-id", "r")
                pids = self.pids(project, 15)
                process.kill()
                process.communicate()
                wait_for(lambda pids=pids: not any(map(alive, pids)), "the end of all of them", 10)
                self.assertEqual(json.loads(project.main("runs", "--json")[1])[0]["status"], "interrupted")

    def test_an_engine_killed_again_and_again_repeats_no_success_and_keeps_the_order(self):
        """Tasks tell of their begin and end with one O_APPEND write each; what they tell is the oracle."""
        for seed in range(6):
            chance = random.Random(seed)
            names = [f"t{n}" for n in range(8)]
            upstream = {name: [up for up in names[:n] if chance.random() < 0.3] for n, name in enumerate(names)}
            tell = "echo begin $MINIFLOW_TASK >> told; sleep 0.05; echo end $MINIFLOW_TASK >> told"
            with one(*[task(name, *upstream[name], command=tell) for name in names]) as project:
                for _ in range(4):
                    process = project.start("run", "f", "--run-id", "r", "-j", "3")
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.communicate(timeout=chance.uniform(0.15, 0.5))
                    process.kill()
                    process.communicate()
                while project.main("run", "f", "--run-id", "r")[0]:
                    pass                       # a third interruption in a row fails a task once
                ended, running = set(), set()
                for word, name in map(str.split, project.lines("told")):
                    if word == "begin":
                        self.assertLessEqual(set(upstream[name]), ended)
                        running.add(name)
                    else:
                        ended.add(name)
                self.assertEqual(ended, set(names))
                for task_run in project.state("r")["tasks"].values():
                    self.assertEqual([a["status"] for a in task_run["attempts"]].count("success"), 1)

    def test_a_watchdog_that_was_killed_is_replaced(self):
        with one(task("a", script="s.py"), task("b", command="sleep 0.5"), task("c", "b", command="sleep 60"),
                 max_parallel=3, scripts={"s.py": self.STUBBORN}) as project:
            process = project.start("run", "f", "--run-id", "r")
            pids = self.pids(project, 3)
            first = [pid for pid in children(process.pid) if b"-S" in mf.read_file(f"/proc/{pid}/cmdline")]
            self.assertEqual(len(first), 1)
            os.kill(first[0], signal.SIGKILL)
            journal = "miniflow_output/runs/r.jsonl"
            wait_for(lambda: re.search('attempt_spawned.*"task":"c"', project.read(journal)), "task c")
            process.kill()
            process.communicate()
            wait_for(lambda: not any(map(alive, pids)), "the end of all of them", 10)

    def test_a_watchdog_that_cant_live_keeps_no_run_from_its_end(self):
        code = f"""
            import sys
            sys.path.insert(0, {HERE!r}); import miniflow
            sys.executable = sys.argv[1]
            print(miniflow.MiniFlow().run("f").status)
            """
        with one(*[task(f"t{n}", command="sleep 0.05") for n in range(20)]) as project:
            for executable in ("/bin/true", "/no/such/python"):
                done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), executable], cwd=project.path,
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
                self.assertEqual((done.stdout, done.stderr), (b"success\n", b""))

    def test_a_timeout_ends_what_has_left_the_group(self):
        with one(task("a", script="s.py", timeout_s=1, grace_s=0.3), scripts={"s.py": self.STUBBORN}) as project:
            self.assertEqual(project.run().tasks["a"].reason, "timeout after 1 s")
            self.assertEqual([alive(pid) for pid in self.pids(project, 3)], [False] * 3)

    def killed_with_its_watchdog(self, project):
        """Start the project's flow, kill engine and watchdog, and return the processes of its task."""
        process = project.start("run", "f", "--run-id", "r")
        wait_for(lambda: os.path.exists(project.at("pids")), "the task")
        wait_for(lambda: "attempt_spawned" in project.read("miniflow_output/runs/r.jsonl"), "its record")
        for pid in [pid for pid in children(process.pid) if b"-S" in mf.read_file(f"/proc/{pid}/cmdline")]:
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.communicate()
        return [int(line) for line in project.lines("pids")]

    def test_resume_never_runs_a_task_beside_what_is_left_of_it(self):
        """Whether it shows by its process, by its log, or by its cookie alone; as --on-orphan says."""
        plain = "test -e ready; again=$?; echo $$ >> pids; test $again = 0 || exec sleep 60"
        closed = "exec >/dev/null 2>&1; " + plain
        left = f"setsid sh -c '{plain}' >/dev/null 2>&1 & sleep 0.1; kill -9 $$"
        for command in (plain, closed, left):
            with self.subTest(command=command), one(task("a", command=command, grace_s=1)) as project:
                pids = self.killed_with_its_watchdog(project)
                self.assertTrue(any(map(alive, pids)))
                project.write("ready", "")
                code, _, err = project.main("resume", "r", "--on-orphan", "fail")
                self.assertEqual(code, 4)
                self.assertRegex(err, "task a still runs, though its engine is gone: it (is|left) process")
                self.assertTrue(any(map(alive, pids)))
                _, _, err = project.main("resume", "r")
                self.assertIn("it is ended", err)
                self.assertFalse(any(map(alive, pids)))
                self.assertEqual(project.state("r")["tasks"]["a"]["attempts"][0]["status"], "interrupted")

    def test_a_daemon_without_any_mark_is_found_by_the_log_that_it_holds(self):
        left = "env -i setsid sh -c 'echo $$ >> pids; exec sleep 60' & sleep 0.1; exec sleep 60"
        with one(task("a", command=f"test -e ready || {{ {left}; }}", grace_s=0.5)) as project:
            pid, = self.killed_with_its_watchdog(project)
            project.write("ready", "")
            self.assertTrue(alive(pid))
            self.assertEqual(project.main("resume", "r")[0], 0)
            self.assertFalse(alive(pid))

    def test_a_fifo_in_the_place_of_a_file_is_not_waited_for(self):
        with one(task("a")) as project:
            project.main("run", "f", "--run-id", "r")
            os.mkfifo(project.at("miniflow_output/runs/r.lock"))
            self.assertEqual(project.main("show", "r")[0], 0)
            path = project.at("fifo")
            os.mkfifo(path)
            self.assertFalse(mf.Orphan("a", mf.Attempt(0), "x", path, 0).log_is_locked())

    def test_resume_can_wait_for_what_is_left(self):
        with one(task("a", command="echo begin >> pids; sleep 1.5; echo end >> pids")) as project:
            process = project.start("run", "f", "--run-id", "r")
            wait_for(lambda: os.path.exists(project.at("miniflow_output/runs/r.jsonl"))
                     and "attempt_spawned" in project.read("miniflow_output/runs/r.jsonl"), "its record")
            for pid in [pid for pid in children(process.pid) if b"-S" in mf.read_file(f"/proc/{pid}/cmdline")]:
                os.kill(pid, signal.SIGKILL)
            process.kill()
            process.communicate()
            self.assertEqual(project.main("resume", "r", "--on-orphan", "wait")[0], 0)
            self.assertEqual(project.lines("pids"), ["begin", "end", "begin", "end"])

    def test_a_run_of_another_host_is_refused_unless_that_is_gone(self):
        with one(task("a", command="echo $$ >> pids; test -e ready || exec sleep 60")) as project:
            for pid in self.killed_with_its_watchdog(project):
                os.kill(pid, signal.SIGKILL)
            project.write("ready", "")
            path = project.at("miniflow_output/runs/r.jsonl")
            lines = mf.read_file(path).splitlines(keepends=True)
            opened = mf.decode_record(lines[0])
            opened["state"]["engine"]["host"] = "elsewhere"
            lines[0] = mf.encode_record({"event": "opened", "state": opened["state"]}, opened["seq"])
            os.unlink(project.at("miniflow_output/runs/r.json"))
            with open(path, "wb") as file:
                file.write(b"".join(lines))
            code, _, err = project.main("resume", "r")
            self.assertEqual(code, 4)
            self.assertIn("run r was being run on host elsewhere, where its tasks may still run", err)
            self.assertEqual(project.main("resume", "r", "--force-host")[0], 0)

    def test_an_outer_run_finds_the_processes_of_a_run_within_it(self):
        with one(task("in", command=f"exec {sys.executable} {ENGINE} run g", timeout_s=2, grace_s=0.2),
                 scripts={"s.py": self.STUBBORN}) as project:
            project.write("flows/g.json", json.dumps(flow_json(task("a", script="s.py", grace_s=60))))
            self.assertEqual(project.run().status, "failed")
            wait_for(lambda: not any(alive(pid) for pid in self.pids(project, 3)), "the end of all of them", 10)

    def test_a_task_that_was_interrupted_three_times_in_a_row_fails_and_is_tried_again_after_that(self):
        flow = make(task("a", max_retries=1), task("b", "a"))
        run = mf.Run(mf.make_plan(flow), "r")
        for number in (1, 2, 3):
            self.assertEqual(run.tasks["a"].status, "pending")
            run.apply(mf.AttemptStarted(number, "a", number))
            run = mf.reopen(run, flow)
        self.assertEqual((run.tasks["a"].status, run.tasks["a"].reason),
                         ("failed", "interrupted 3 times in a row: it may be what ends the engine"))
        self.assertEqual(mf.due(run, 9, 1), [mf.Settle("b", "upstream_failed", "upstream a failed")])
        again = mf.reopen(run, flow)
        self.assertEqual(mf.due(again, 9, 1), [mf.Start("a", 4)])

# -- scripts, for the template interpreter --

def row(text, code=0, **options):
    """Return a script and the exit code that it has; None: that is told by Python alone."""
    text = text if isinstance(text, bytes) else textwrap.dedent(text).lstrip("\n").encode()
    return dict({"args": [], "env": {}, "stdin": None, "cwd": False, "beside": {}, "at": None, "link": None,
                 "forked": True, "vague": None, "since": (3, 9)}, text=text, code=code, **options)


def zipped(**files):
    """Return a zip file."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name, text in files.items():
            file.writestr(name + ".py", text)
    return content.getvalue()


# What a script finds.
FOUND = {
    "main": row("""
        'the doc'
        import __main__, sys
        print(__name__, __file__, __spec__, __doc__, __package__, __builtins__, __main__.__dict__ is globals())
        print(type(__loader__), __loader__.name, __loader__.path, __loader__.get_source("__main__"))
        print(sys.modules["__main__"], sys.modules["__main__"] is __main__)
        """),
    "globals": row("def f(): pass\nx: int = 1\nprint(list(globals()), dir(), __annotations__)"),
    "no_annotations": row("print(list(globals()), globals().get('__annotations__', 0))"),
    "name_is_main": row("def main(): print('main')\nif __name__ == '__main__': main()"),
    "argv": row("import sys; print(ascii(sys.argv), type(sys.argv))",
                args=["", " ", "-x", "--", "*", "é\n\t\\", "${HOME}", "a=b", "-c"]),
    "orig_argv": row("import sys; print(sys.orig_argv)", args=["-v", "x y"], since=(3, 10)),
    "path": row("import sys; print(sys.path)"),
    "path_of_a_link": row("import sys; print(sys.path[0], __file__)", link="elsewhere/real.py"),
    "link_finds_helpers_beside_the_real_file": row("import link_helper", link="elsewhere/real2.py",
                                                   beside={"elsewhere/link_helper.py": "print(__file__)"}),
    "flags": row("""
        import sys
        print(sys.flags, sys.warnoptions, sys._xoptions, sys.executable, sys.prefix, sys.exec_prefix)
        print(sys.dont_write_bytecode, sys.getrecursionlimit(), sys.getswitchinterval(), sys.pycache_prefix)
        print(sys.meta_path, sys.path_hooks, sys.gettrace(), sys.getprofile(), sys.getfilesystemencoding())
        print(sys.excepthook is sys.__excepthook__, sys.displayhook, sys.breakpointhook, sys.unraisablehook)
        """, vague="0x[0-9a-f]+"),
    "names_in_sys": row("import builtins, sys; print(sorted(vars(sys)), sorted(vars(builtins)))"),
    "process": row("""
        import os, threading
        print(os.getpgrp() == os.getpid() == os.getsid(0) == threading.get_native_id(), os.get_blocking(0))
        try: open("/dev/tty")
        except OSError as exc: print(exc)
        print(os.umask(0o22), os.path.basename(os.getcwd()), os.nice(0), os.sched_getaffinity(0))
        import fcntl, resource
        print([resource.getrlimit(n) for n in range(16)], resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime)
        print([(fcntl.fcntl(fd, fcntl.F_GETFD), hex(fcntl.fcntl(fd, fcntl.F_GETFL))) for fd in (0, 1, 2)])
        wanted = "Umask:", "Threads:", "SigB", "SigP", "SigC", "Shd", "Cap", "NoNewPrivs:", "Seccomp", "Name:"
        print(*[line for line in open("/proc/self/status") if line.startswith(wanted)])
        print(open("/proc/self/cmdline").read().rstrip("\\0").replace("\\0", " "), os.readlink("/proc/self/exe"))
        print(open("/proc/self/comm").read(), open("/proc/self/oom_score_adj").read())
        """, args=["a b", "c"]),
    "open_files": row("""
        import os
        print(sorted(os.listdir("/proc/self/fd")), os.readlink("/proc/self/fd/0"))
        print([os.get_inheritable(fd) for fd in range(3)], os.path.samestat(os.fstat(1), os.fstat(2)))
        """),
    "working_directory": row("import os; print(os.path.basename(os.getcwd()), os.listdir())", cwd=True),
    "streams": row("""
        import sys
        for file in sys.stdin, sys.stdout, sys.stderr:
            print(file.name, file.mode, file.encoding, file.errors, file.line_buffering, file.write_through,
                  file.fileno(), file.isatty(), file.newlines, file.buffer, file.closed)
        print(sys.stdout is sys.__stdout__, sys.stdin.buffer.raw)
        """),
    "threads": row("""
        import threading
        print(threading.main_thread(), threading.current_thread().ident == threading.main_thread().ident)
        print(threading.active_count(), threading.enumerate())
        """, vague=r"\d{9,}"),
    "signals": row("""
        import faulthandler, signal
        print([(n, signal.getsignal(n)) for n in sorted(signal.valid_signals())], signal.sigpending())
        print(signal.pthread_sigmask(signal.SIG_BLOCK, []), signal.getitimer(0), signal.set_wakeup_fd(-1))
        print(faulthandler.is_enabled())
        """),
    "gc": row("import gc; print(gc.isenabled(), gc.get_threshold(), gc.get_debug(), gc.garbage, gc.callbacks)"),

    "environment": row("""
        import os
        print([(k, os.environ[k]) for k in os.environ if not k.startswith(("MINIFLOW_", "GITHUB_OUTPUT", "TMP_DIR"))])
        print(list(os.environ) == list(map(os.fsdecode, os.environb)), ascii(os.environ["ODD"]))
        """, env={"AAA": "1", "ZED": "é"}),
    "order_of_the_environment": row("import os; print(list(os.environ))", env={"MY": "1"}),
    "environment_of_a_child": row("import os; os.system('/usr/bin/env -0 | tr \"\\\\0\" \"\\\\n\" | cut -d= -f1')",
                                  env={"MY": "1"}, vague="(?m)^_$"),
    "environment_of_an_executed_program": row("""
        import os, sys
        os.execv(sys.executable, [sys.executable, "-c", "import os; print(list(os.environ), os.environ['MY'])"])
        """, env={"MY": "1"}),
    "cookie": row("""
        import os
        cookie = os.environb[b"MINIFLOW_COOKIE"]
        print(cookie.split(b"/")[1:], (b"\\0MINIFLOW_COOKIE=%s\\0" % cookie) in open("/proc/self/environ", "rb").read())
        """),
    "own_variables": row("""
        import os
        print(os.environ["MINIFLOW_TASK"], os.environ["MINIFLOW_ATTEMPT"], os.path.exists(os.environ["TMP_DIR"]))
        """),
    "time_zone": row("import time; print(time.tzname, time.timezone, time.localtime(0))", env={"TZ": "Asia/Tokyo"}),
    "no_time_zone": row("import time; print(time.tzname, time.timezone, time.localtime(0))"),
    "python_variables": row("import sys; print(sys.flags.optimize)", env={"PYTHONOPTIMIZE": "2"}, forked=False),
    "locale": row("""
        import locale
        print(locale.setlocale(locale.LC_ALL), locale.getpreferredencoding(), locale.localeconv())
        """),
    "other_locale": row("import sys; print(sys.stdout.encoding)", env={"LC_ALL": "C"}, forked=False),
}

# How it ends.
ENDS = {
    **{f"exit_{n}": row(f"import sys; sys.exit({code})", expected) for n, (code, expected) in enumerate([
        ("", 0), ("None", 0), ("0", 0), ("3", 3), ("255", 255), ("256", 0), ("257", 1), ("-1", 255), ("True", 1),
        ("False", 0), ("''", 1), ("'ünïcode text'", 1), ("object", 1), ("(1, 2)", 1), ("2.5", 1), ("b'x'", 1),
        ("2**31", None), ("2**63", None), ("-2**70", None), ("[]", 1), ("'\\udc80'", 1)])},
    "raise_exit": row("raise SystemExit", 0),
    "raise_exit_of_several": row("raise SystemExit(1, 2)", 1),
    "raise_an_exit_of_ones_own": row("""
        class Leave(SystemExit):
            def __str__(self): return "leaving"
        raise Leave(7)
        """, 7),
    "exit_whose_text_fails": row("""
        class Bad:
            def __str__(self): raise ValueError("no text")
        raise SystemExit(Bad())
        """, 1),
    "exit_by_an_int_of_ones_own": row("""
        class Code(int): pass
        raise SystemExit(Code(4))
        """, 4),
    **{f"gone_with_{place}": row(f"""
        import sys
        class Finder:
            def __call__(self, path): raise ImportError
            def find_spec(self, *args): return None
            def __str__(self): return "/nowhere"
            def __del__(self): print("gone", self.name, flush=True)
        finder = Finder()
        finder.name = "finder"
        sys.{place}.append(finder)
        del finder
        """, 0) for place in ("meta_path", "path_hooks", "path", "argv")},
    **{f"{place}_outlives_no_library": row(f"""
        import builtins, json, os, sys, weakref
        class Finder:
            def __init__(self, name): self.name, self.json = name, json
            def __call__(self, path): raise ImportError
            def find_spec(self, *args): return None
            def __del__(self): print(self.name, os.path.join("a", "b"), json.dumps([1]), sys.meta_path is None)
        class Plain:
            def __call__(self, path): raise ImportError
            def find_spec(self, *args): return None
        one, two, builtins.b = Finder("finder"), Plain(), Finder("builtin")
        watch = weakref.ref(two, lambda ref: print("weak gone", flush=True))
        sys.{place} += [one, two]
        del one, two
        """, None) for place in ("meta_path", "path_hooks")},
    "without_a_path": row("import sys; del sys.path, sys.path_hooks, sys.meta_path", 0),
    "exit_of_site": row("exit(6)", 6),
    "quit_of_site": row("quit('bye')", 1),
    "exit_within_finally": row("""
        import sys
        def f():
            try: sys.exit(5)
            finally: print("finally")
        f()
        """, 5),
    "exit_at_once": row("import os; print('lost'); os._exit(9)", 9),
    "an_exception": row("def f(x):\n    return 1 / x\n\nprint('before')\nf(\n  0)\n", 1),
    "a_chained_exception": row("""
        try:
            try: {}["key"]
            except KeyError as exc: raise ValueError("second\\nline") from exc
        except ValueError:
            raise RuntimeError("third")
        """, 1),
    "an_exception_from_none": row("try: 1/0\nexcept Exception: raise OSError(2, 'no', 'file') from None", 1),
    "an_exception_with_notes": row("e = ValueError('x'); e.add_note('a note'); raise e", 1, since=(3, 11)),
    "a_group": row("raise ExceptionGroup('g', [ValueError(1), TypeError(2)])", 1, since=(3, 11)),
    "an_exception_with_a_text_of_its_own": row("""
        class Mine(Exception):
            def __str__(self): return "mine: %s" % (self.args,)
        raise Mine(1)
        """, 1),
    "an_exception_without_text": row("""
        class Mine(Exception):
            def __str__(self): raise RuntimeError
        raise Mine(1)
        """, 1),
    "an_exception_from_deep": row("def f(n): f(n - 1) if n else nil\nf(50)", 1),
    "too_deep": row("def f(): f()\nf()", 1, vague=r"repeated \d+"),
    "a_hint": row("import sys\nvalue = 1\nprint(valeu)", 1),
    "a_hint_of_an_attribute": row("import json\njson.dmups", 1),
    "a_missing_module": row("import no_such_module", 1),
    "an_exception_in_a_library": row("import json\njson.loads('[')", 1),
    "an_exception_in_a_helper": row("import helping\nhelping.f()", 1, beside={"helping.py": "def f():\n    1/0"}),
    "an_exception_at_import": row("import failing", 1, beside={"failing.py": "1/0"}),
    "a_syntax_error_in_a_helper": row("import wrong", 1, beside={"wrong.py": "x = = 1"}),
    "an_exception_in_text": row("exec('x = 1\\n1/0')", 1),
    "an_exception_in_code_of_text": row("exec(compile('1/0', 'text', 'exec'))", 1),
    "a_syntax_error_in_code_of_text": row("eval('1 +')", 1),
    "an_exception_without_traceback": row("import sys\nsys.tracebacklimit = 0\n1/0", 1),
    "an_exception_with_another_traceback": row("""
        def f():
            try: 1/0
            except Exception as exc: return exc
        e = f()
        raise e.with_traceback(None)
        """, 1),
    "a_system_error_text": row("assert 1 == 2, 'ünequal \\udc80'", 1),
    "last_exception": row("""
        import atexit, sys, traceback
        def tell():
            print(sys.last_type, sys.last_value, getattr(sys, "last_exc", 0))
            traceback.print_tb(sys.last_traceback)
            traceback.print_exception(sys.last_type, sys.last_value, sys.last_value.__traceback__)
        atexit.register(tell)
        1/0
        """, 1),
    "a_hook": row("""
        import sys, traceback
        def hook(kind, exc, trace):
            print("hook", kind, exc, trace is exc.__traceback__)
            traceback.print_tb(trace)
            while trace: print(trace.tb_lineno, trace.tb_frame.f_code.co_name); trace = trace.tb_next
        sys.excepthook = hook
        def f(): 1/0
        f()
        """, 1),
    "a_hook_that_passes_on": row("""
        import sys
        sys.excepthook = lambda *args: (print("hook", flush=True), sys.__excepthook__(*args))
        1/0
        """, 1),
    "a_hook_that_fails": row("""
        import sys
        def hook(*args): raise ValueError("hook")
        sys.excepthook = hook
        1/0
        """, 1),
    "a_hook_that_exits": row("""
        import sys
        def hook(*args): sys.exit(5)
        sys.excepthook = hook
        1/0
        """, 5),
    "no_hook": row("import sys\ndel sys.excepthook\n1/0", 1),
    "a_hook_that_is_none": row("import sys\nsys.excepthook = None\n1/0", 1),
    "a_hook_and_an_exit": row("import sys\nsys.excepthook = print\nsys.exit(3)", 3),
    "a_hook_and_an_interrupt": row("import sys\nsys.excepthook = lambda *a: print(a[0])\nraise KeyboardInterrupt", -2),
    "an_interrupt": row("raise KeyboardInterrupt", -2),
    "an_interrupt_of_its_own": row("class Mine(KeyboardInterrupt): pass\nraise Mine('x')", 1),
    "interrupted": row("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(30)", -2),
    "interrupted_and_caught": row("""
        import os, signal, time
        try: os.kill(os.getpid(), signal.SIGINT); time.sleep(30)
        except KeyboardInterrupt: print("caught")
        """),
    "interrupted_with_atexit": row("""
        import atexit, os, signal, time
        atexit.register(print, "atexit")
        os.kill(os.getpid(), signal.SIGINT); time.sleep(30)
        """, -2),
    **{f"killed_by_{name}": row(f"import os, signal, sys; print('out', flush=True); sys.stdout.write('lost')\n"
                                f"os.kill(os.getpid(), signal.{name})", -getattr(signal, name))
       for name in ("SIGTERM", "SIGKILL", "SIGSEGV", "SIGHUP", "SIGUSR1", "SIGALRM", "SIGXCPU")},
    "aborted": row("import os; os.abort()", -6),
    "a_handler": row("""
        import os, signal
        signal.signal(signal.SIGTERM, lambda number, frame: print(number, frame.f_lineno))
        os.kill(os.getpid(), signal.SIGTERM)
        """),
    "a_broken_pipe": row("""
        import os
        reader, writer = os.pipe(); os.close(reader)
        os.write(writer, b"x")
        """, 1),
    "atexit": row("""
        import atexit
        @atexit.register
        def first(): print("first")
        atexit.register(print, "second")
        @atexit.register
        def third(): atexit.register(print, "registered late"); 1/0
        atexit.unregister(print); atexit.register(print, "last")
        """, vague="0x[0-9a-f]+"),
    "atexit_that_leaves": row("import atexit, os\natexit.register(os._exit, 7)\nprint('lost')", 7),
    "atexit_that_exits": row("import atexit, sys\natexit.register(sys.exit, 7)\nprint('kept')"),
    "atexit_after_a_failure": row("import atexit\natexit.register(print, 'atexit')\n1/0", 1),
    "atexit_cleared": row("import atexit\natexit.register(print, 'never')\natexit._clear()"),
    "atexit_that_imports": row("""
        import atexit
        @atexit.register
        def end():
            import decimal, json, sys
            print(json.dumps([1]), decimal.Decimal(1), "json" in sys.modules, "os" in sys.modules)
        """),
    "del_of_globals": row("""
        class Loud:
            def __init__(self, name): self.name = name
            def __del__(self): print("del", self.name)
        a, b = Loud("a"), Loud("b")
        _c = Loud("_c")
        Loud.shared = Loud("of the class")
        """),
    "del_of_circles": row("""
        class Loud:
            def __init__(self, name): self.name, self.me = name, self
            def __del__(self): print("del", self.name)
        a = Loud("a")
        Loud("b")
        """),
    "del_that_imports": row("""
        class Loud:
            def __del__(self):
                import json, os, sys
                print(json.dumps([1]), os.getpid() > 0, sys.modules.get("json") is J, json is J)
        import json as J
        x = Loud()
        """, vague="0x[0-9a-f]+"),
    "del_after_an_exit": row("""
        import sys
        class Loud:
            def __del__(self): print("del")
        x = Loud()
        sys.exit(4)
        """, 4),
    "del_of_a_frame_that_exits": row("""
        import sys
        class Loud:
            def __del__(self): print("del")
        def f():
            x = Loud()
            sys.exit(4)
        f()
        """, 4),
    "del_after_a_failure": row("""
        class Loud:
            def __del__(self): print("del")
        def f():
            x = Loud()
            1/0
        f()
        """, 1),
    "del_that_fails": row("class Loud:\n    def __del__(self): 1/0\nx = Loud()", vague="0x[0-9a-f]+"),
    "del_in_a_library": row("""
        import json, os, sys
        class Loud:
            def __init__(self, name): self.name = name
            def __del__(self): print("del", self.name)
        json.loud, os.environ.loud, sys.loud = Loud("json"), Loud("environ"), Loud("sys")
        """),
    "del_in_modules_of_its_own": row("""
        import sys, types
        class Loud:
            def __init__(self, name): self.name = name
            def __del__(self): print("del", self.name)
        module = types.ModuleType("mine"); module.x = Loud("in a module")
        sys.modules["mine"] = module
        del module, Loud
        """),
    "finalize": row("""
        import weakref
        class Thing: pass
        thing = Thing()
        weakref.finalize(thing, print, "finalized")
        """),
    "unflushed_files": row("""
        import builtins, json, keeping, os, sys
        a = open("a", "w"); a.write("a")
        keeping.file = open("b", "w"); keeping.file.write("b")
        json.file = open("c", "w"); json.file.write("c")
        class Thing: file = open("d", "w")
        Thing.file.write("d")
        def f(file=open("e", "w")): pass
        f.__defaults__[0].write("e"); f.me = f
        sys.file = open("f", "w"); sys.file.write("f")
        builtins.file = open("g", "w"); builtins.file.write("g")
        os.path.file = open("h", "wb"); os.path.file.write(b"h")
        json.decoder.JSONDecoder.file = open("i", "w"); json.decoder.JSONDecoder.file.write("i")
        """, cwd=True, beside={"keeping.py": ""}),
    "unflushed_files_after_a_failure": row("a = open('a', 'w'); a.write('a')\ndef f():\n  b = open('b', 'w'); "
                                           "b.write('b'); 1/0\nf()", 1, cwd=True),
    "a_generator": row("""
        def f():
            try: yield 1
            finally: print("finally")
        g = f(); next(g)
        import json
        json.g = f(); next(json.g)
        """),
    "a_coroutine_that_nobody_awaits": row("async def f(): pass\nx = f()\nf()"),
    "threads_that_go_on": row("""
        import threading, time
        def f(): time.sleep(0.05); print("thread", threading.main_thread().is_alive())
        threading.Thread(target=f).start()
        print("main")
        """),
    "threads_that_do_not": row("""
        import threading, time
        def f():
            try: time.sleep(30)
            finally: print("never")
        threading.Thread(target=f, daemon=True).start()
        """),
    "a_thread_that_fails": row("import threading\nt = threading.Thread(target=lambda: 1/0); t.start(); t.join()"),
    "a_thread_that_exits": row("import sys, threading\nthreading.Thread(target=sys.exit, args=(3,)).start()"),
    "a_thread_with_a_hook": row("""
        import threading
        threading.excepthook = lambda args: print(args.exc_type, args.thread.name)
        threading.Thread(target=lambda: 1/0, name="t").start()
        """),
    "a_thread_after_a_failure": row("""
        import threading, time
        threading.Thread(target=lambda: (time.sleep(0.05), print("thread"))).start()
        1/0
        """, 1),
    "an_interrupt_while_threads_are_joined": row("""
        import os, signal, threading, time
        def f(): time.sleep(0.05); os.kill(os.getpid(), signal.SIGINT); time.sleep(0.05)
        threading.Thread(target=f).start()
        """, None),
}

# What it writes and reads, and the processes that it makes.
DOES = {
    "order_of_the_streams": row("""
        import os, sys
        print("1"); print("2", file=sys.stderr); print("3", flush=True); os.write(1, b"4\\n"); print("5")
        sys.stderr.write("6"); os.system("echo 7")
        """),
    "much_output": row("import sys\nfor n in range(30000): print('line', n)\nsys.stderr.write('x' * 100000)"),
    "binary_output": row("import sys; sys.stdout.buffer.write(bytes(range(256)))"),
    "output_that_cannot_be_encoded": row("print('\\udc80')", None),
    "stdout_closed": row("import sys\nprint(1); sys.stdout.close()"),
    "stdout_closed_then_used": row("import sys\nsys.stdout.close()\nprint(1)", 1),
    "stderr_closed": row("import sys\nsys.stderr.close()\n1/0", 1, vague="(address|refcount|type) +: .*"),
    "no_stderr": row("import sys\nsys.stderr = None\n1/0", 1, vague="(address|refcount|type) +: .*"),
    "no_stdout": row("import sys\nsys.stdout = None\nprint(1)"),
    "stdout_deleted": row("import sys\ndel sys.stdout, sys.stderr\n1/0", 1,
                          vague="(address|refcount|type) +: .*"),
    "stdout_replaced": row("import io, sys\nsys.stdout = io.StringIO()\nprint(1)"),
    "stdout_replaced_by_a_file": row("import sys\nsys.stdout = open('a', 'w')\nprint(1)", cwd=True),
    "stdout_that_fails": row("""
        import sys
        class Out:
            def write(self, text): return len(text)
            def flush(self): raise OSError("no flush")
        sys.stdout = Out()
        """, None, vague="0x[0-9a-f]+"),
    "fd_1_closed": row("import os\nprint(1); os.close(1)", 120),
    "fds_closed": row("import os\nos.closerange(0, 9)\nprint(1)", 120),
    "a_full_device": row("import os\nos.dup2(os.open('/dev/full', os.O_WRONLY), 1)\nprint(1)", 120),
    "a_full_device_and_an_exit": row("import os, sys\nos.dup2(os.open('/dev/full', os.O_WRONLY), 1)\nprint(1)\n"
                                     "sys.exit(3)", 120),
    "a_full_device_and_a_failure": row("import os\nos.dup2(os.open('/dev/full', os.O_WRONLY), 1)\nprint(1)\n1/0",
                                       None),
    "a_full_device_for_messages": row("import os\nos.dup2(os.open('/dev/full', os.O_WRONLY), 2)\n1/0", None),
    "no_input": row("import sys; print(repr(sys.stdin.read()), sys.stdin.isatty(), sys.stdin.name)"),
    "input_at_its_end": row("print('before')\ninput('prompt ')", 1),
    "some_input": row("import os, sys; print(input('prompt ')); print(sys.stdin.readline()); print(os.read(0, 9))\n"
                      "print(list(sys.stdin))", stdin="one\ntwo\nthree\n"),
    "binary_input": row("import sys; print(sys.stdin.buffer.read(3), sys.stdin.buffer.read())", stdin="é\n\x01x"),
    "input_of_a_child": row("import subprocess\nsubprocess.run('cat')", stdin="passed on\n"),
    "stdin_closed": row("import sys\nsys.stdin.close()\nprint(sys.stdin.closed)\ninput()", 1),
    "fork": row("""
        import os
        print("before")
        pid = os.fork()
        if pid: print(os.waitpid(pid, 0)[1])
        print("parent" if pid else "child")
        """),
    "fork_with_atexit": row("""
        import atexit, os, sys
        atexit.register(lambda: print("atexit", "parent" if pid else "child"))
        class Loud:
            def __del__(self): print("del")
        loud = Loud()
        pid = os.fork()
        if pid: print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        else: sys.exit(3)
        """),
    "fork_and_a_failure": row("""
        import os, sys
        sys.stderr.flush()
        pid = os.fork()
        if not pid: 1/0
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        """),
    "fork_and_a_signal": row("""
        import os
        pid = os.fork()
        if not pid: raise KeyboardInterrupt
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        """),
    "fork_in_a_thread": row("""
        import os, threading, warnings
        warnings.simplefilter("ignore")
        def f():
            pid = os.fork()
            if not pid: print("child", threading.main_thread() is threading.current_thread()); os._exit(0)
            os.waitpid(pid, 0)
        thread = threading.Thread(target=f); thread.start(); thread.join()
        """),
    "subprocess": row("""
        import subprocess, sys
        print(subprocess.run([sys.executable, "-c", "import sys; print(sys.argv, sys.path[0], input())", "x"],
                             input="in\\n", stdout=subprocess.PIPE, encoding="utf-8"))
        subprocess.run("echo to the log; exit 3", shell=True, check=True)
        """, 1),
    "ignored_signals_of_a_child": row("import os; os.system('grep -E ^Sig[BPC].*: /proc/self/status')"),
    "itself_again": row("import os, sys\nif len(sys.argv) < 3: os.execv(sys.executable, [sys.executable, *sys.argv, "
                        "'again'])\nprint(sys.argv[1:])", args=["x"]),
    **{f"multiprocessing_{method}": row(f"""
        import multiprocessing, os, sys
        class Thing:
            def __init__(self, n): self.n = n
        def work(thing):
            return __name__, Thing(thing.n + 1), multiprocessing.current_process().name[:5]
        def fail(): raise ValueError("in a child")
        if __name__ == "__main__":
            context = multiprocessing.get_context({method!r})
            with context.Pool(1) as pool:
                for name, thing, process in pool.map(work, [Thing(1), Thing(2)]): print(name, thing.n, process)
            child = context.Process(target=sys.exit, args=(5,)); child.start(); child.join()
            print(child.exitcode, multiprocessing.parent_process())
        """) for method in ("fork", "spawn", "forkserver")},
    "multiprocessing_that_fails": row("""
        import multiprocessing
        def fail(): raise ValueError("in a child")
        if __name__ == "__main__":
            child = multiprocessing.get_context("fork").Process(target=fail); child.start(); child.join()
            queue = multiprocessing.SimpleQueue(); queue.put(child.exitcode); print(queue.get())
        """),
    "pools": row("""
        import concurrent.futures, multiprocessing
        def square(n): return n * n
        if __name__ == "__main__":
            with concurrent.futures.ThreadPoolExecutor() as pool: print(list(pool.map(square, range(4))))
            context = multiprocessing.get_context("fork")
            with concurrent.futures.ProcessPoolExecutor(1, context) as pool: print(list(pool.map(square, range(4))))
            concurrent.futures.ThreadPoolExecutor(1).submit(print, "not waited for")
        """),
}

# Its text, and what it imports.
IMPORTS = {
    "source": row("""
        import inspect, linecache, sys
        def f(x):
            'doc'
            return x                           # and a comment
        class C: pass
        print(inspect.getsource(f), inspect.getfile(f), inspect.getsourcelines(f)[1], inspect.getmodule(f))
        print(inspect.getfile(sys.modules["__main__"]), linecache.getline(__file__, 1), f.__code__.co_filename)
        print(inspect.currentframe().f_lineno, inspect.currentframe().f_globals is globals())
        """),
    "deletes_itself": row("import os\nos.unlink(__file__)\nprint(__file__)\ndef f(): 1/0\nf()", 1),
    "syntax_error": row("print('never')\nx = = 1\n", 1),
    "indentation": row("if 1:\n    x = 1\n  y = 2\n", 1),
    "tabs": row("if 1:\n\tx = 1\n        y = 2\n", 1),
    "old_print": row("print 'x'", 1),
    "unclosed": row("print(", 1),
    "return_outside": row("return 1", 1),
    "syntax_warning": row("x = 1 is 1\nprint(x)"),
    "invalid_escape": row("print('\\d')"),
    "empty": row(""),
    "comment_alone": row("# nothing"),
    "no_newline_at_the_end": row("print(1)\n# end"),
    "windows_lines": row(b"print(1)\r\nprint('''a\r\nb''')\r\n1/0\r\n", 1),
    "form_feed": row("\x0cprint(1)\n"),
    "shebang": row("#!/usr/bin/env python3\nprint(1)"),
    "bom": row(b"\xef\xbb\xbfprint('\xc3\xa9')\n1/0", 1),
    "bom_and_another_cookie": row(b"\xef\xbb\xbf# coding: latin-1\nprint(1)", 1),
    "latin_1": row(b"# coding: latin-1\nx = '\xe9'\nprint(ascii(x)); raise ValueError('\xe9') # \xe9\n", 1),
    "unknown_encoding": row(b"# coding: no-such\nprint(1)", 1),
    "bad_utf_8": row(b"print('before')\nx = '\xe9'\n", 1),
    "a_nul": row(b"print(1)\0\nprint(2)", None),
    "a_nul_in_a_text": row(b"x = '\0'", None),
    "binary": row(bytes(range(256)), 1),
    "a_future": row("from __future__ import annotations\ndef f(x: no_such): pass\nprint(f.__annotations__)"),
    "no_future_of_the_template": row("def f(x: int): pass\nprint(f.__annotations__, f.__code__.co_flags)"),
    "helpers": row("""
        import helper_a, package_a.inner, helper_a as again
        from package_a import *
        print(helper_a.__file__, package_a.inner.__name__, again is helper_a)
        """, beside={"helper_a.py": "import sys; print(__name__, sys.argv)", "package_a/__init__.py": "",
                     "package_a/inner.py": "from . import __path__; print(len(__path__))"}),
    "relative_import": row("from . import x", 1),
    "resources": row("""
        import importlib.resources
        print(importlib.resources.files("with_data").joinpath("data.txt").read_text())
        """, beside={"with_data/__init__.py": "", "with_data/data.txt": "some data"}),
    **{f"hidden_{name}": row(f"import {name}; print({name}.__file__)\nimport logging, email.utils", 0,
                             beside={f"{name}.py": f"print('mine'); from {other} import *"},
                             at=f"in_{name}/main.py")
       for name, other in (("decimal", "_pydecimal"), ("heapq", "_heapq"), ("linecache", "traceback"))},
    "hidden_json": row("import json; print(json.mine)", beside={"json.py": "mine = 1"},
                       at="in_json/main.py"),
    "hidden_re": row("import re; print(re.__file__)", beside={"re/__init__.py": "mine = 1"},
                     at="in_re/main.py"),
    "hidden_datetime": row("import datetime", 1, beside={"datetime.py": "1/0"},
                           at="in_datetime/main.py"),
    "not_hidden_json": row("import json; print(json.__file__)", beside={"json/data.txt": ""},
                           at="in_none/main.py"),
    "hidden_os": row("import os; print(os.__file__)", beside={"os.py": "1/0"}, at="in_os/main.py"),
    "reload": row("import importlib, json, os; print(importlib.reload(json) is json, importlib.reload(os) is os)"),
    "itself_as_a_module": row("import sys, os\nif __name__ == '__main__':\n  import itself_as_a_module\n"
                              "print(__name__)", at="itself_as_a_module.py"),
    "run_path": row("import runpy; print(runpy.run_path(__file__.replace('run_path', 'empty')).keys())"),
    "pickle": row("""
        import collections, dataclasses, enum, pickle
        @dataclasses.dataclass
        class Thing: n: int
        class Colour(enum.Enum): RED = 1
        Pair = collections.namedtuple("Pair", "a b")
        print(pickle.loads(pickle.dumps([Thing(1), Colour.RED, Pair(1, 2)])), Thing.__module__, Pair.__module__)
        print(pickle.dumps(Thing(1)))
        """),
    "warnings": row("""
        import warnings
        print(warnings.filters)
        def old(): warnings.warn("old", DeprecationWarning)
        for _ in range(2): old()
        warnings.warn("mine"); warnings.warn("pending", PendingDeprecationWarning)
        warnings.warn("above", DeprecationWarning, stacklevel=2)
        import warning_helper
        """, beside={"warning_helper.py": "import warnings; warnings.warn('hidden', DeprecationWarning)\n"
                                          "warnings.warn('of the importer', DeprecationWarning, stacklevel=2)"}),
    "warnings_above": row("import warnings; warnings.warn('above', stacklevel=2); warnings.warn('x', stacklevel=9)"),
    "warnings_as_errors": row("import warnings\nwarnings.simplefilter('error')\nwarnings.warn('x')", 1),
    "resource_warning": row("import warnings\nwarnings.simplefilter('always')\nopen('/dev/null')"),
    "logging": row("""
        import logging
        logging.basicConfig(level="INFO", format="%(levelname)s %(module)s %(lineno)d %(funcName)s %(message)s")
        logging.info("told"); logging.getLogger("x").warning("too")
        try: 1/0
        except Exception: logging.exception("failed")
        handler = logging.FileHandler("a.log"); logging.getLogger().addHandler(handler); logging.error("kept")
        """, cwd=True),
    "memory_handler": row("""
        import logging.handlers
        target = logging.StreamHandler()
        handler = logging.handlers.MemoryHandler(100, target=target)
        logging.getLogger().addHandler(handler); logging.error("at the end")
        """),
    "asyncio": row("""
        import asyncio, signal, sys
        async def main():
            process = await asyncio.create_subprocess_exec(sys.executable, "-c", "print(1)", stdout=-1)
            print(await process.communicate(), process.returncode)
            print(await asyncio.gather(asyncio.sleep(0.01, "a"), asyncio.to_thread(str, 5)))
            asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, print, "signal")
            signal.raise_signal(signal.SIGUSR1); await asyncio.sleep(0)
        asyncio.run(main())
        async def fail(): 1/0
        asyncio.run(fail())
        """, 1),
    "sqlite": row("""
        import sqlite3
        with sqlite3.connect("a.db") as db: db.execute("create table t (x)"); db.execute("insert into t values (1)")
        print(db.execute("select * from t").fetchall())
        """, cwd=True),
    "decimal": row("import decimal; print(decimal.getcontext(), decimal.Decimal(1) / 3)"),
    "argparse": row("import argparse; argparse.ArgumentParser().parse_args()", 2, args=["--no-such"]),
    "unittest": row("""
        import unittest
        class T(unittest.TestCase):
            def test(self): self.assertEqual(1, 2)
        unittest.main()
        """, 1, vague="[0-9.]+s"),
    "doctest": row("'''\n>>> 1 + 1\n3\n'''\nimport doctest; print(doctest.testmod())"),
    "tempfile": row("""
        import os, tempfile
        with tempfile.NamedTemporaryFile() as file: print(os.path.exists(file.name), tempfile.gettempdir())
        kept = tempfile.TemporaryDirectory(); open(kept.name + "/x", "w").close()
        """, vague=r"/tmp\w{8}'|id='\w+"),
    "uuid": row("import uuid; print(uuid.uuid1().version, uuid.uuid4().version, uuid.uuid3(uuid.NAMESPACE_DNS, 'x'))"),
    "ctypes": row("import ctypes; print(ctypes.CDLL(None).getpid() == __import__('os').getpid())"),
    "sockets": row("import socket; print(socket.getdefaulttimeout(), socket.socketpair())", vague=r"fd=\d+"),
    "profile": row("import cProfile; cProfile.run('sum([1])')", vague=r"[0-9.]+"),
    "faulthandler": row("import faulthandler, os; faulthandler.enable(); print(faulthandler.is_enabled())"),
    "frames": row("import sys; print(sys._getframe().f_lineno, sys._getframe().f_code.co_name)"),
    "a_module_that_is_taken_out": row("""
        import re, sys
        del sys.modules["re"]
        class Report:
            def __init__(self): self.file = open("a", "w")
        r = Report()
        r.me = r
        r.file.write("data")
        """, cwd=True),
    "modules_that_are_let_go": row("""
        import collections, datetime, functools, json, re, select, socket, sys
        class Loud:
            def __del__(self):
                print(re.sub("a", "b", "a"), json.dumps({"x": 1}), datetime.date(2020, 1, 2), sys.path is not None)
                print(re.compile("[x-z]+").findall("axyz"), socket.AF_UNIX, functools.reduce(max, [1, 2]))
        loud = Loud(); loud.me = loud
        """),
    "modules_cleared": row("import json, sys\njson.file = open('a', 'w'); json.file.write('a')\nprint(1)\n"
                           "sys.modules.clear()", cwd=True),
    "builtins_replaced": row("import builtins\nprint(1)\nbuiltins.any = builtins.list = builtins.getattr = None"),
    "a_library_module_replaced": row("import json, sys, types\nsys.modules['json'] = types.ModuleType('json')\n"
                                     "import json as other; print(other is json, json.dumps([1]))"),
    "working_directory_changed": row("import os; os.chdir('/'); import chdir_helper",
                                     beside={"chdir_helper.py": "import os; print(os.getcwd(), __file__)"}),
    "exit_in_del": row("import sys\nclass Loud:\n    def __del__(self): sys.exit(5)\nx = Loud(); del x\n"
                       "y = Loud()", vague="0x[0-9a-f]+"),
    "collector_that_keeps_all": row("import gc; gc.set_debug(gc.DEBUG_SAVEALL); gc.disable(); gc.unfreeze()\n"
                                    "class Loud:\n    def __del__(self): print('del')\nx = Loud(); x.me = x; del x"),
    "lru_cache": row("""
        import functools
        class Loud:
            def __del__(self): print("del")
        @functools.lru_cache(None)
        def f(): return Loud()
        f()
        """),
    "thread_local": row("""
        import contextvars, threading
        class Loud:
            def __init__(self, name): self.name = name
            def __del__(self): print("del", self.name)
        local = threading.local(); local.x = Loud("local")
        var = contextvars.ContextVar("v"); var.set(Loud("var"))
        """),
    "zip": row(zipped(__main__="import zipped_helper; print(__name__, __file__)", zipped_helper="print(1)")),
}


@unittest.skipUnless(LINUX, "scripts are forked on Linux alone")
class T30TemplateInterpreter(unittest.TestCase):

    #: The environment of all, which has something that no flow can set.
    ENV = {**{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
           "ODD": "\udcff =\n", "EMPTY": ""}

    def path_of(self, name, row):
        """Return where a script lies; no other imports it by mistake."""
        return row["at"] or f"{name}-script.py"

    def lay_out(self, project, rows):
        """Write the scripts, as they are before one of them runs."""
        for name, row in rows.items():
            project.write(f"tasks/{row['link'] or self.path_of(name, row)}", row["text"])
            if row["link"] and not os.path.islink(project.at("tasks", self.path_of(name, row))):
                os.symlink(row["link"], project.at("tasks", self.path_of(name, row)))
            for helper, text in row["beside"].items():
                project.write(os.path.join("tasks", os.path.dirname(row["at"] or ""), helper), text)

    def by_hand(self, project, name, row):
        """Run a script as a user would: its exit code and its output."""
        env = {**self.ENV, "MINIFLOW_PARAM_WAY": "hand", "MINIFLOW_RUN_ID": "hand", "MINIFLOW_FLOW": "f",
               "TMP_DIR": project.path, **row["env"], "MINIFLOW_COOKIE": f"token/{name}/1", "MINIFLOW_TASK": name,
               "MINIFLOW_ATTEMPT": "1", "MINIFLOW_CONTEXT": "none", "MINIFLOW_OUTPUT": "none", "GITHUB_OUTPUT": "none"}
        script = project.at("tasks", self.path_of(name, row))
        def append(path, flags):
            return os.open(path, flags | os.O_NOFOLLOW, 0o600)

        with tempfile.TemporaryFile() as source, open(os.devnull, "rb") as null, open(
                project.at("hand." + name), "ab", opener=append) as log:
            source.write(os.fsencode(row["stdin"] or ""))
            source.seek(0)
            process = subprocess.Popen(
                [sys.executable, script, *row["args"]], env=env, start_new_session=True, stdout=log, stderr=log,
                stdin=source if row["stdin"] else null,
                cwd=project.at("hand", name) if row["cwd"] else project.path)
            code = process.wait(timeout=60)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            return code, mf.read_file(log.name)

    def files(self, folder):
        """Return the content of all files of a directory."""
        found = {}
        for name in os.listdir(folder) if os.path.isdir(folder) else ():
            with open(os.path.join(folder, name), "rb") as file:
                found[name] = file.read()
        return found

    def flow(self, rows):
        """Return a flow with a task for each script."""
        def fields(name, row):
            found = {"script": self.path_of(name, row), "args": row["args"], "env": row["env"]}
            if row["stdin"]:
                found["stdin"] = row["stdin"]
            return {**found, "cwd": f"${{{{ params.way }}}}/{name}"} if row["cwd"] else found

        return json.dumps(flow_json(*[task(name, **fields(name, row)) for name, row in rows.items()],
                                    params={"way": "hand"}))

    def check(self, rows, *ways):
        """Run scripts by hand, forked, and maybe started anew; all has to be the same."""
        from concurrent.futures import ThreadPoolExecutor
        rows = {name: row for name, row in rows.items() if sys.version_info >= row["since"]}
        with Project({"f": self.flow(rows)}) as project:
            for way in ("hand", *ways):
                for name in rows:
                    os.makedirs(project.at(way, name))
            self.lay_out(project, rows)
            with ThreadPoolExecutor(4) as pool:
                by_hand = dict(zip(rows, pool.map(lambda name: self.by_hand(project, name, rows[name]), rows)))
            for way in ways:
                self.lay_out(project, rows)
                done = project.cli("run", "f", "--run-id", way, "--param", f"way={way}", "--output", "quiet", "-j", "3",
                                   *(["--no-fork"] if way == "none" else []), env=self.ENV)
                self.assertFalse(done.stderr.startswith("error"), done.stderr)
                tasks = project.state(way)["tasks"]
                for name, row in rows.items():
                    with self.subTest(name, way=way):
                        self.compare(project, name, row, way, tasks[name], by_hand[name])

    def compare(self, project, name, row, way, state, by_hand):
        """Hold what a task did against what its script did by hand."""
        def clear(output):
            output = output.decode("utf-8", "backslashreplace")
            return re.sub(row["vague"], "*", output) if row["vague"] else output

        code, output = by_hand
        if row["code"] is not None:
            self.assertEqual(code, row["code"], output)
        self.assertEqual(clear(project.log(way, name)), clear(output))
        self.assertEqual(state["reason"], mf.describe_exit(code)[0] if code else None)
        self.assertEqual(self.files(project.at(way, name)), self.files(project.at("hand", name)))
        attempt, = state["attempts"]
        self.assertIs(attempt.get("forked", False), way == "fork" and row["forked"])

    def test_a_script_finds_what_it_would_find_by_hand(self):
        self.check(FOUND, "fork", "none")

    def test_a_script_ends_as_it_would_by_hand(self):
        self.check(ENDS, "fork")

    def test_a_script_does_what_it_would_do_by_hand(self):
        self.check(DOES, "fork", "none")

    def test_a_script_is_compiled_and_imports_as_by_hand(self):
        self.check(IMPORTS, "fork")

    def several(self, text, count=6, first="", scripts=None, **fields):
        """Return a Project whose tasks t0, t1, … run one script, t0 another one if told so."""
        tasks = [task(f"t{n}", script="first.py" if first and not n else "s.py", args=[str(n)]) for n in range(count)]
        return one(*tasks, scripts={"s.py": text, "first.py": first, **(scripts or {})}, **fields)

    def forked(self, project, run_id="r"):
        """Return which attempts of a run were forked, in the order of the tasks."""
        return [attempt.get("forked", False) for state in project.state(run_id)["tasks"].values()
                for attempt in state["attempts"] if state["log"]]

    def run_cli(self, project, *args, code=0, **options):
        """Run the flow f as run r, in a process of its own if there are options; return what it wrote to stderr."""
        if options:
            done = project.cli("run", "f", "--run-id", "r", *args, **options)
            returned, said = done.returncode, done.stderr
        else:
            returned, _, said = project.main("run", "f", "--run-id", "r", *args)
        self.assertEqual(returned, code, said)
        return said

    def template_of(self, engine):
        """Return the process of an engine's template."""
        return [pid for pid in children(engine) if b"(template of miniflow)" in mf.read_file(f"/proc/{pid}/cmdline")]

    COUNTED = "import os\nfd = os.open('imports', os.O_WRONLY | os.O_CREAT | os.O_APPEND)\nos.write(fd, b'imported\\n')"

    def test_what_is_preloaded_is_imported_once_for_all_scripts(self):
        for args, count in (([], 1), (["--no-fork"], 6)):
            with self.subTest(args), self.several(
                    "import counted; print(counted.__file__)", preload=["counted", "json"],
                    scripts={"counted.py": self.COUNTED}) as project:
                self.run_cli(project, *args)
                self.assertEqual(project.lines("imports"), ["imported"] * count)
                self.assertEqual({project.log("r", f"t{n}") for n in range(6)},
                                 {os.fsencode(project.at("tasks/counted.py")) + b"\n"})
                self.assertEqual(self.forked(project), [not args] * 6)

    def test_three_scripts_are_enough_for_a_template_where_something_is_preloaded(self):
        for count, preload, forked in ((2, ["json"], False), (3, ["json"], True), (5, [], False), (6, [], True)):
            with self.subTest(count=count), self.several("", count, preload=preload) as project:
                self.run_cli(project)
                self.assertEqual(self.forked(project), [forked] * count)

    def test_where_a_module_cannot_be_preloaded_a_note_says_so_once_and_scripts_run_anew(self):
        thread = "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()"
        for text, part in (
                (None, "ModuleNotFoundError: No module named 'broken'"), ("1/0", "ZeroDivisionError: division by zero"),
                (thread, "something that was imported has started threads or tracing"),
                ("import sys; sys.settrace(print)", "threads or tracing"), ("import sys; sys.exit(3)", "exit 3"),
                ("import os; os._exit(0)", "exit 0"), ("import os; os.kill(os.getpid(), 9)", "killed by signal 9"),
                ("x = = 1", "SyntaxError: invalid syntax"), ("import os; os.closerange(3, 99)", "")):
            with self.subTest(text), self.several("print('done')", 3, preload=["broken"],
                                                  scripts={"broken.py": text} if text else {}) as project:
                said = self.run_cli(project)
                self.assertEqual(said.count("scripts are started without a template of "), 1, said)
                self.assertIn(part, said)
                self.assertEqual(self.forked(project), [False] * 3)
                self.assertEqual({project.log("r", f"t{n}") for n in range(3)}, {b"done\n"})

    def test_site_packages_that_start_threads_are_noted_and_scripts_run_anew(self):
        with self.several("print('done')") as project:
            project.write("site/sitecustomize.py", "import threading\nthreading.Thread("
                                                   "target=threading.Event().wait, daemon=True).start()\n")
            said = self.run_cli(project, env={**os.environ, "PYTHONPATH": project.at("site")})
            self.assertIn("has started threads or tracing", said)
            self.assertEqual(self.forked(project), [False] * 6)

    def test_what_a_preloaded_module_prints_is_in_nobodys_log(self):
        with self.several("print('mine')", preload=["loud"], scripts={
                "loud.py": "import atexit\nprint('loud')\natexit.register(print, 'at the end of each')"}) as project:
            self.run_cli(project)
            self.assertEqual({project.log("r", f"t{n}") for n in range(6)}, {b"mine\nat the end of each\n"})

    def test_scripts_draw_different_random_numbers_where_the_module_is_preloaded(self):
        with self.several("import random, uuid, tempfile; print(random.random(), uuid.uuid4(), tempfile.mktemp())",
                          preload=["random", "uuid", "tempfile"]) as project:
            self.run_cli(project)
            drawn = [project.log("r", f"t{n}").split() for n in range(6)]
            self.assertEqual([len(set(column)) for column in zip(*drawn)], [6, 6, 6])

    def test_variables_that_python_reads_when_it_starts_keep_a_script_from_being_forked(self):
        names = ["PYTHONUTF8", "PYTHONX", "LD_LIBRARY_PATH", "LC_TIME", "LANG", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES",
                 "HOME", "COVERAGE_RCFILE"]
        tasks = [*[task(name, script="s.py", env={name: "1"}) for name in names],
                 *[task(f"t{n}", script="s.py", env={"OTHER": "1", "TZ": "UTC", "PATH": "/bin"}) for n in range(6)]]
        with one(*tasks, scripts={"s.py": ""}) as project:
            self.run_cli(project)
            self.assertEqual(self.forked(project), [False] * len(names) + [True] * 6)
        with self.several("", env={"PYTHONHASHSEED": "1"}) as project:
            self.run_cli(project)
            self.assertEqual(self.forked(project), [False] * 6)

    def test_arguments_that_are_too_long_for_a_request_arrive(self):
        lengths = [10, 9_000, 50_000, 100_000, 131_000, 50]
        with one(*[task(f"t{n}", script="s.py", args=["x" * length, "é"]) for n, length in enumerate(lengths)],
                 scripts={"s.py": "import sys; print(len(sys.argv[1]), sys.argv[2])"}) as project:
            self.run_cli(project)
            self.assertEqual(self.forked(project), [True, True, True, False, False, True])
            self.assertEqual([project.log("r", f"t{n}").decode() for n in range(6)],
                             [f"{length} é\n" for length in lengths])

    def test_forking_can_be_switched_off_and_show_tells_how_a_process_began(self):
        for args, value, forked in (([], "", True), ([], "0", True), ([], "1", False), (["--no-fork"], "", False)):
            with self.subTest(args, value=value), self.several("") as project:
                self.run_cli(project, *args, env={**os.environ, "MINIFLOW_NO_FORK": value})
                self.assertEqual(self.forked(project), [forked] * 6)
                shown = project.main("show", "r")[1]
                self.assertEqual((shown.count("forked\n"), shown.count("started\n")), (6, 0) if forked else (0, 6))

    KILL_IT = """
        import os, signal, time
        while '"pid":%%d' %% os.getpid() not in open("miniflow_output/runs/r.jsonl").read().replace(" ", ""):
            time.sleep(0.01)                   # until the engine has heard of us
        with open(f"/proc/{os.getppid()}/cmdline") as file:
            assert "(template of miniflow)" in file.read()
        os.kill(os.getppid(), signal.SIG%s)
        """

    def test_a_template_that_is_killed_costs_the_exit_code_of_what_runs_and_no_more(self):
        wait = "while os.getppid() == parent: time.sleep(0.01)\nopen('went on', 'w').close()"
        first = "import os\nparent = os.getppid()" + textwrap.dedent(self.KILL_IT % "KILL") + wait
        with self.several("print('done')", first=first, max_parallel=1) as project:
            said = self.run_cli(project, code=1)
            self.assertEqual(said.count("scripts are started without a template of "), 1, said)
            self.assertIn("killed by signal 9", said)
            states = list(project.state("r")["tasks"].values())
            self.assertEqual([state["status"] for state in states], ["failed"] + ["success"] * 5)
            self.assertIn("exit code lost", states[0]["reason"])
            self.assertTrue(os.path.exists(project.at("went on")))
            self.assertEqual(self.forked(project), [True] + [False] * 5)

    def test_a_template_that_is_killed_while_many_are_asked_for_loses_none_of_them(self):
        """What it had been asked for and had not told of runs all the same, once."""
        with self.several("import os; os.write(os.open('ran', os.O_WRONLY | os.O_APPEND | os.O_CREAT), b'x')", 40,
                          first=self.KILL_IT % "KILL", max_parallel=20) as project:
            self.run_cli(project, code=1)
            states = project.state("r")["tasks"]
            lost = [name for name, state in states.items() if state["status"] == "failed"]
            self.assertEqual({states[name]["reason"].split(":")[0] for name in lost}, {"exit code lost"})
            self.assertGreaterEqual(len(project.read("ran")), 39 - len(lost))
            self.assertLessEqual(len(project.read("ran")), 39)

    def test_a_template_that_hangs_is_given_up(self):
        saved = mf.ANSWER_S
        self.addCleanup(setattr, mf, "ANSWER_S", saved)
        mf.ANSWER_S = 4.0                      # no start takes so long
        stop = 'kill -STOP $(cat template)'
        first = "import os\nopen('template', 'w').write(str(os.getppid()))" + textwrap.dedent(self.KILL_IT % "CONT")
        with one(task("first", script="first.py"), task("stop", "first", command=stop),
                 *[task(f"t{n}", "stop", script="s.py") for n in range(5)],
                 scripts={"s.py": "print('done')", "first.py": first}) as project:
            code, _, said = project.main("run", "f", "--run-id", "r")
            self.assertEqual(code, 0, said)
            self.assertEqual(said.count("scripts are started without a template of "), 1, said)
            self.assertEqual(self.forked(project), [True] + [False] * 6)
            self.assertFalse(alive(int(project.read("template"))))

    def test_an_interpreter_that_is_no_python_is_run_as_it_is(self):
        for program, output in (("/bin/echo", None), ("/bin/true", b""), ("/bin/cat", b"print('done')")):
            tasks = [task(f"t{n}", script="s.py", python=program) for n in range(6)]
            with self.subTest(program), one(*tasks, scripts={"s.py": "print('done')"}) as project:
                said = self.run_cli(project)
                self.assertIn(f"scripts are started without a template of {program}: ", said)
                self.assertEqual({project.log("r", f"t{n}") for n in range(6)},
                                 {os.fsencode(project.at("tasks/s.py")) + b"\n" if output is None else output})
        with one(*[task(f"t{n}", script="s.py", python="/no/such/python") for n in range(6)],
                 scripts={"s.py": ""}) as project:
            self.run_cli(project, code=1)
            self.assertIn("cannot start: ", project.state("r")["tasks"]["t0"]["reason"])

    def test_each_interpreter_has_a_template_of_its_own_unless_it_is_a_script(self):
        text = "import sys; print(sys.flags, sys.executable, sys.prefix, getattr(sys, 'orig_argv', 0), sys.warnoptions)"
        pythons = {"t": sys.executable, "link": "./bin/python", "script": "bin/wrapper", "named": "python-of-mine"}
        tasks = [task(f"{name}{n}", script="s.py", python=python) for name, python in pythons.items() for n in range(6)]
        with one(*tasks, scripts={"s.py": text}) as project:
            project.write("bin/wrapper", f'#!/bin/sh\nexport WRAPPED=1\nexec {sys.executable} -X dev -W error "$@"\n')
            os.chmod(project.at("bin/wrapper"), 0o755)
            for name in "python", "python-of-mine":
                os.symlink(os.path.realpath(sys.executable), project.at("bin", name))
            env = {**os.environ, "PATH": project.at("bin") + ":" + os.environ["PATH"]}
            self.run_cli(project, env=env)
            self.assertEqual(self.forked(project), [True] * 12 + [False] * 6 + [True] * 6)
            for name, python in pythons.items():
                python = os.path.normpath(project.at(python)) if python[1:4] == "/bi" or name == "script" else python
                python = project.at("./bin/python") if name == "link" else python
                by_hand = subprocess.check_output([python, project.at("tasks/s.py")], env=env)
                self.assertEqual({project.log("r", f"{name}{n}") for n in range(6)}, {by_hand})

    def test_what_a_template_has_no_means_for_is_made_later(self):
        """A preloaded module stands for a system that can't fork, or has no room for files, now and then."""
        fork = """
            import errno, os
            real, calls = os.fork, []
            def fork():
                calls.append(0)
                if len(calls) % 3 == 2: raise BlockingIOError(errno.EAGAIN, "no")
                return real()
            os.fork = fork
            """
        files = """
            import os, socket
            real, calls = socket.recv_fds, []
            def recv_fds(*args):
                text, fds, flags, address = real(*args)
                calls.append(0)
                if text and len(calls) % 3 == 2:
                    os.close(fds.pop())
                    flags |= socket.MSG_CTRUNC
                return text, fds, flags, address
            socket.recv_fds = recv_fds
            """
        for text, why in ((fork, "Resource temporarily unavailable"), (files, "Too many open files")):
            with self.subTest(why), self.several("print('done')", preload=["failing"], max_parallel=3,
                                                 scripts={"failing.py": text}) as project:
                said = self.run_cli(project)
                self.assertIn(why, said)
                self.assertEqual({project.log("r", f"t{n}") for n in range(6)}, {b"done\n"})
                self.assertEqual(self.forked(project), [True] * 6)

    def test_few_open_files_are_enough_for_many_scripts(self):
        """One that the engine has itself lies above the limit."""
        with self.several("print('done')", 60, max_parallel=50) as project, open(os.devnull) as null:
            high = os.dup2(null.fileno(), 200)
            done = subprocess.run(["/bin/sh", "-c", 'ulimit -n 24; exec "$@"', "sh", sys.executable, ENGINE, "run", "f",
                                   "--run-id", "r"], cwd=project.path, pass_fds=[high],
                                  stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            os.close(high)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertEqual(self.forked(project), [True] * 60)
            self.assertEqual({project.log("r", f"t{n}") for n in range(60)}, {b"done\n"})

    def test_a_python_path_that_hides_the_library_or_is_relative_is_seen_as_by_hand(self):
        env = {**os.environ, "PYTHONPATH": "mine"}
        with self.several("import datetime; print(datetime.__file__)") as project:
            project.write("mine/datetime.py", "from _datetime import *")
            said = self.run_cli(project, env=env)
            self.assertIn("mine/datetime.py hides a module of Python", said)
            self.assertEqual({project.log("r", f"t{n}") for n in range(6)},
                             {os.fsencode(project.at("mine/datetime.py")) + b"\n"})
        tasks = [task(f"t{n}", script="s.py", **({"cwd": "sub"} if n % 2 else {})) for n in range(6)]
        with one(*tasks, scripts={"s.py": "import which; print(which.__file__)"}) as project:
            project.write("mine/which.py", "")
            project.write("sub/mine/which.py", "")
            self.run_cli(project, env=env)
            self.assertEqual(self.forked(project), [True, False] * 3)
            self.assertEqual([project.log("r", f"t{n}").decode() for n in range(6)],
                             [project.at("mine/which.py") + "\n", project.at("sub/mine/which.py") + "\n"] * 3)

    def test_a_forked_script_is_ended_by_its_timeout(self):
        wait = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)"
        tasks = [*[task(f"t{n}", script="s.py") for n in range(5)],
                 task("slow", "t0", script="first.py", timeout_s=1, grace_s=0.1)]
        with one(*tasks, scripts={"s.py": "", "first.py": wait}) as project:
            self.run_cli(project, code=1)
            self.assertEqual(project.state("r")["tasks"]["slow"]["reason"], "timeout after 1 s")
            self.assertEqual(self.forked(project), [True] * 6)

    def leaving(self, project):
        """Start a flow of which the first script leaves things behind; return engine, template and the rest."""
        engine = project.start("run", "f", "--run-id", "r")
        wait_for(lambda: os.path.exists(project.at("pids")) and len(project.lines("pids")) == 3, "three processes")
        wait_for(lambda: '"attempt_spawned"' in project.read("miniflow_output/runs/r.jsonl"), "the record")
        return engine, self.template_of(engine.pid), [int(line) for line in project.lines("pids")]

    def stubborn(self):
        return self.several("", first=T29Orphans.STUBBORN.replace("len(sys.argv) == 1", "sys.argv[1] == '0'"))

    def test_a_cancelled_run_leaves_neither_template_nor_scripts_nor_what_left_their_group(self):
        with self.stubborn() as project:
            flow = json.loads(project.read("flows/f.json"))
            flow["tasks"][0]["grace_s"] = 0.2
            project.write("flows/f.json", json.dumps(flow))
            engine, template, pids = self.leaving(project)
            self.assertEqual(len(template), 1)
            engine.terminate()
            engine.communicate(timeout=60)
            self.assertEqual(engine.returncode, 143)
            self.assertEqual([pid for pid in template + pids if alive(pid)], [])

    def test_a_killed_engine_leaves_neither_template_nor_scripts(self):
        with self.stubborn() as project:
            engine, template, pids = self.leaving(project)
            engine.kill()
            engine.communicate()
            wait_for(lambda: not any(map(alive, template + pids)), "the end of all of them", 10)

    def test_resume_finds_a_forked_script_that_outlived_engine_watchdog_and_template(self):
        text = """
            import os, time
            again = os.path.exists("go")
            open("pids", "a").write("1\\n2\\n%d\\n" % os.getpid())
            time.sleep(0 if again else 60)
            """
        with self.several("", first=text) as project:
            engine, template, pids = self.leaving(project)
            os.kill(engine.pid, signal.SIGSTOP)              # or it would start another watchdog
            for pid in (*children(engine.pid), *template, engine.pid):
                os.kill(pid, signal.SIGKILL)
            engine.communicate()
            project.write("go", "")
            self.assertTrue(alive(pids[-1]))
            code, _, err = project.main("resume", "r", "--on-orphan", "fail")
            self.assertEqual(code, 4)
            self.assertIn(f"task t0 still runs, though its engine is gone: it is process {pids[-1]}", err)
            self.assertEqual(project.main("resume", "r")[0], 0)
            self.assertFalse(alive(pids[-1]))

    def test_a_run_within_a_forked_script_marks_its_tasks_for_both(self):
        """The inner engine is a process of its own, or the forked script itself."""
        inner = """
            import os
            cookie = os.environb[b"MINIFLOW_COOKIE"]
            with open("/proc/self/environ", "rb") as file:
                assert b"\\0MINIFLOW_COOKIE=%s\\0" % cookie in b"\\0" + file.read()
            os.write(os.open("cookies", os.O_WRONLY | os.O_APPEND | os.O_CREAT), cookie + b"\\n")
            """
        outer = [f"import subprocess as s, sys\ns.run([sys.executable, {ENGINE!r}, 'run', 'inner'], check=True)",
                 f"import sys\nsys.path.insert(0, {HERE!r})\nimport miniflow as m\nassert m.MiniFlow().run('inner').ok"]
        flows = {"f": flow_json(*[task(f"t{n}", script=f"outer{n % 2}.py") for n in range(6)], max_parallel=1),
                 "inner": flow_json(*[task(f"i{n}" * 30, script="inner.py") for n in range(6)])}
        with Project(flows, {"inner.py": inner, "outer0.py": outer[0], "outer1.py": outer[1]}) as project:
            self.run_cli(project)
            self.assertEqual(self.forked(project), [True] * 6)
            cookies = [line.split(":") for line in project.lines("cookies")]
            self.assertEqual({len(parts) for parts in cookies}, {2})
            self.assertEqual({outer.split("/")[1] for outer, _ in cookies}, {f"t{n}" for n in range(6)})
            self.assertEqual({inner.split("/")[1] for _, inner in cookies}, {f"i{n}" * 30 for n in range(6)})


class T31Freshness(unittest.TestCase):

    def test_a_task_runs_only_where_something_has_changed_and_says_what(self):
        """The rules are doit's: it has not succeeded, what it reads has changed, was added or has gone, what it
        makes is not there, or what it is itself has changed."""
        flow = flow_json(
            task("first", command="echo n=1 >>$MINIFLOW_OUTPUT; cat >/dev/null"),
            task("t", "first", script="t.py", args=["x"], env={"E": "1"}, inputs=["in/*.csv"],
            outputs=["out/${{ params.p }}"]),
            task("below", "t", command=["echo", "${{ tasks.t.outputs.rows }}"]), params={"p": "a"})
        script = ("import glob, json, os\nos.makedirs('out', exist_ok=True)\nopen('ran', 'a').write('x')\n"
                  "open('out/' + os.environ['MINIFLOW_PARAM_P'], 'w').write('made')\n"
                  "json.dump({'rows': len(glob.glob('in/*.csv'))}, open(os.environ['MINIFLOW_OUTPUT'], 'w'))\n")

        def change(**fields):
            flow["tasks"][1].update(fields)
            project.write("flows/f.json", json.dumps(flow))

        def edit(name, text, keep_time=False):
            before = os.stat(project.at(name)).st_mtime_ns if keep_time else 0
            project.write(name, text)
            if keep_time:
                os.utime(project.at(name), ns=(before, before))

        def same():
            """Nothing."""

        options = []
        with Project({"f": flow}, {"t.py": script}) as project:
            project.write("in/a.csv", "1")
            steps = [
                ("it has not succeeded yet", same), (None, same),
                ("input in/a.csv has changed", lambda: edit("in/a.csv", "22")),
                (None, lambda: os.utime(project.at("in/a.csv"))), (None, lambda: edit("in/a.csv", "22")),
                ("input in/a.csv has changed", lambda: edit("in/a.csv", "33", True)),
                ("input in/b.csv is new", lambda: edit("in/b.csv", "1")), (None, lambda: edit("in/c.txt", "1")),
                ("input in/b.csv is gone", lambda: os.unlink(project.at("in/b.csv"))),
                ("output out/a is not there", lambda: os.unlink(project.at("out/a"))),
                (None, lambda: edit("out/a", "other")),
                ("its script has changed", lambda: edit("tasks/t.py", script + "# more\n")),
                ("its arguments have changed", lambda: change(args=["y"])),
                ("its environment has changed", lambda: change(env={"E": "2"})),
                (None, lambda: change(description="other", max_retries=1, timeout_s=9)),
                ("the params have changed", lambda: options.append("--param=p=b")), (None, same),
                ("what its upstream hands on has changed",
                 lambda: (flow["tasks"][0].update(command="echo n=2 >>$MINIFLOW_OUTPUT"), change())),
                ("it is forced to", lambda: options.append("--force")), (None, lambda: options.pop())]
            for n, (reason, what) in enumerate(steps):
                with self.subTest(n=n, reason=reason):
                    what()
                    ran = project.read("ran") if os.path.exists(project.at("ran")) else ""
                    code, _, err = project.main("run", "f", "--run-id", f"r{n}", *options)
                    self.assertEqual(code, 0, err)
                    state = project.state(f"r{n}")["tasks"]
                    self.assertEqual(state["t"]["status"], "success" if reason else "cached")
                    self.assertEqual(len(project.read("ran")) - len(ran), 1 if reason else 0)
                    self.assertEqual(state["below"]["status"], "success")
                    self.assertEqual(project.log(f"r{n}", "below"), b"%d\n" % state["t"]["output"]["rows"])

    def test_explain_says_why_in_words_and_runs_and_writes_nothing(self):
        tasks = [task("a", inputs=["in"], outputs=["out"], command="cp in out"), task("b", "a", inputs=["out"]),
                 task("none", foreach=[]), task("behind", "none", "each", inputs=["in"]),
                 task("each", foreach=["x", "y"], outputs=["${{ item }}"], command="touch $1", args=["${{ item }}"]),
                 task("no", inputs=[], **{"if": "false"}), task("plain", "b"), task("skipped", "no")]

        def explain(*options):
            code, out, err = project.main("run", "f", "--explain", *options)
            self.assertEqual((code, err), (0, ""))
            return dict(line.split("  ", 1) for line in out.splitlines())

        with one(*tasks) as project:
            project.write("in", "1")
            self.assertEqual(explain(), {
                "none": "success: it has no instances", "behind": "perhaps: each comes before it",
                "a": "run: it has not succeeded yet", "b": "perhaps: a comes before it",
                "plain": "perhaps: b comes before it",
                "each": "run: some of its instances run", "each[0]": "run: it has not succeeded yet",
                "each[1]": "run: it has not succeeded yet", "no": "skipped: if is false",
                "skipped": "skipped: upstream no was skipped"})
            self.assertFalse(os.path.exists(project.at("miniflow_output")))
            self.assertEqual(project.main("run", "f")[0], 0)
            before = sorted(os.listdir(project.at("miniflow_output", "runs")))
            self.assertEqual(explain(), {
                "none": "success: it has no instances", "behind": "cached: nothing has changed",
                "a": "cached: nothing has changed", "b": "cached: nothing has changed",
                "plain": "run: it has neither inputs nor outputs", "each": "cached: none of it runs",
                "each[0]": "cached: nothing has changed", "each[1]": "cached: nothing has changed",
                "no": "skipped: if is false", "skipped": "skipped: upstream no was skipped"})
            os.unlink(project.at("y"))
            self.assertEqual(explain()["each[1]"], "run: output y is not there")
            self.assertEqual(explain("--force")["a"], "run: it is forced to")
            self.assertEqual(explain("--only", "b"), {**dict.fromkeys(
                ["a", "none", "behind", "each", "no", "plain", "skipped"],
            "left out"),
                                                      "b": "cached: nothing has changed"})
            project.write("in", "2")
            self.assertEqual(explain()["a"], "run: input in has changed")
            self.assertEqual(sorted(os.listdir(project.at("miniflow_output", "runs"))), before)

    def test_what_an_interrupted_task_has_left_is_never_taken_for_good(self):
        half = "echo half >out; test -e go || kill -9 $PPID; test -e ok || exit 3; echo whole >out"
        with one(task("a", inputs=["in"], outputs=["out"], command=half)) as project:
            project.write("in", "1")
            self.assertEqual(project.cli("run", "f", "--run-id", "killed").returncode, -9)
            self.assertEqual(project.main("run", "f", "--explain")[1], "a  run: it did not end well in run killed\n")
            project.write("go", "")
            self.assertEqual(project.main("run", "f", "--run-id", "failed")[0], 1)
            self.assertEqual(project.main("run", "f", "--explain")[1], "a  run: it did not end well in run failed\n")
            project.write("ok", "")
            self.assertEqual(project.main("resume", "failed")[0], 0)
            self.assertEqual(project.read("out"), "whole\n")
            self.assertEqual(project.main("run", "f", "--explain")[1], "a  cached: nothing has changed\n")
            for broken in ("{", "[]", '{"inputs": []}', '{"inputs": {"in": 3}, "at": 1}', '{"inputs": {}, "at": "x"}'):
                project.write("miniflow_output/cache/f/a.json", broken)
                self.assertEqual(project.main("run", "f", "--explain")[1], "a  run: it has not succeeded yet\n")

    def test_large_inputs_are_read_while_the_engine_goes_on(self):
        tasks = [task("t", command="sleep 60", timeout_s=0.2, allow_failure=True), task("a", inputs=["huge"]),
                 task("gone", inputs=["big"], allow_failure=True)]
        with one(*tasks) as project:
            for name, size in (("huge", 400), ("big", 100)):
                with open(project.at(name), "wb") as file:
                    file.truncate(size * 2**20)
                os.utime(project.at(name), (1, 1))
            found = []
            for n in range(2):
                code, out, err = project.main("run", "f", "--run-id", f"r{n}", "--output", "json")
                self.assertEqual(code, 0, err)
                found.append([json.loads(line) for line in out.splitlines()])
            self.assertEqual([sorted(event["task"] for event in events if event["event"] == "task_reading")
                              for events in found], [["a", "gone"], []])
            self.assertEqual([project.state("r1")["tasks"][name]["status"] for name in ("a", "gone")], ["cached"] * 2)
            stopping = next(event["at"] for event in found[0] if event["event"] == "attempt_stopping")
            started = next(event["at"] for event in found[0] if event["event"] == "attempt_started")
            self.assertLess(mf.parse_time(stopping) - mf.parse_time(started), 10)

    def test_what_is_read_is_followed_by_links_and_into_directories(self):
        with one(task("a", inputs=["lnk", "dir"]), task("s", script="link.py", outputs=["o"]),
                 task("none", inputs=["tpyo/*.csv"])) as project:
            for name in ("target", "dir/x", "dir/deep/y", "o"):
                project.write(name, "1")
            project.write("tasks/real.py", "")
            os.symlink("target", project.at("lnk"))
            os.symlink("real.py", project.at("tasks/link.py"))
            self.assertEqual(project.main("run", "f")[0], 0)

            def explained():
                return dict(line.split("  ", 1) for line in project.main("run", "f", "--explain")[1].splitlines())

            self.assertEqual(explained(), {"a": "cached: nothing has changed", "s": "cached: nothing has changed",
                                           "none": "cached: nothing has changed; no file matches tpyo/*.csv"})
            for change, said in ((lambda: project.write("target", "2"), "input lnk has changed"),
                                 (lambda: project.write("dir/deep/y", "2"), "input dir/deep/y has changed"),
                                 (lambda: project.write("dir/z", ""), "input dir/z is new")):
                change()
                self.assertEqual(explained()["a"], "run: " + said)
                project.main("run", "f")

    def test_half_a_file_of_another_run_is_never_taken_for_good(self):
        make_it = "echo half >big; while test -e wait-$MINIFLOW_PARAM_W; do sleep 0.02; done; echo full >big"
        with one(task("a", outputs=["big"], command=make_it), params={"w": ""}) as project:
            project.write("wait-x", "")
            first = project.start("run", "f", "--run-id", "first", "--param", "w=x")
            wait_for(lambda: os.path.exists(project.at("big")), "the first half")
            self.assertEqual(project.main("run", "f", "--run-id", "second")[0], 0)
            first.kill()
            first.communicate()
            project.write("big", "half")
            self.assertEqual(project.main("run", "f", "--explain")[1], "a  run: it did not end well in run first\n")
            self.assertEqual(project.main("run", "f", "--run-id", "third")[0], 0)
            self.assertEqual(project.main("run", "f", "--explain")[1], "a  cached: nothing has changed\n")

    def test_names_of_files_that_hold_a_secret_are_not_recorded(self):
        with one(task("a", inputs=["in-${{ env.TOK }}"], outputs=["out-${{ env.TOK }}"], cwd="d-${{ env.TOK }}",
                      command="touch out-$TOK"), secrets=["TOK"]) as project:
            project.write("d-s3cretvalue/in-s3cretvalue", "")
            done = project.cli("run", "f", env={**os.environ, "TOK": "s3cretvalue"})
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertNotIn("s3cret", project.read("miniflow_output/cache/f/a.json"))

    def test_a_task_that_does_not_make_its_outputs_fails(self):
        with one(task("a", outputs=["out", "other*"], command="echo >out", max_retries=1),
                 task("b", inputs=["gone/${{ params.x }}"]), task("c", inputs=["${{ tasks.b.outputs.no }}"],
                 depends_on=["b"]),
                 params={"x": "*"}) as project:
            code, _, _ = project.main("run", "f", "--run-id", "r")
            state = project.state("r")["tasks"]
            self.assertEqual((code, state["a"]["reason"], len(state["a"]["attempts"])),
                             (1, "output other* is not there, although the task has succeeded", 2))
            self.assertEqual((state["b"]["status"], state["c"]["status"]), ("success", "failed"))
            self.assertIn('cannot start: tasks.b.outputs.no: there is no "no"', state["c"]["reason"])


class T32Processes(unittest.TestCase):

    def test_the_end_of_a_task_is_its_exit_code(self):
        with one(task("ok"), task("bad", command="exit 3"), task("killed", command="kill -9 $$"),
                 task("gone", command=["no-such-program"]), task("dir", cwd="no-such-dir"),
                 task("nul", command=["/tmp"])) as project:
            run = project.run()
            reasons = {name: task_run.reason for name, task_run in run.tasks.items()}
            self.assertEqual({name: reasons[name] for name in ("ok", "bad", "killed")},
                             {"ok": None, "bad": "exit 3", "killed": "killed by signal 9"})
            for name, part in (("gone", "no-such-program"), ("dir", "no-such-dir"),
                               ("nul", "Permission denied")):
                self.assertRegex(reasons[name], f"^cannot start: .*{part}")

    def test_a_program_that_cannot_start_is_not_tried_again_unless_asked(self):
        with one(task("a", command=["no-such-program"], max_retries=2),
                 task("b", command=["no-such-program"], max_retries=2, retry_on=[127])) as project:
            run = project.run()
            self.assertEqual([len(run.tasks[name].attempts) for name in "ab"], [1, 3])

    def test_arguments_environment_and_input_arrive_byte_for_byte(self):
        show = ("import json, os, sys; "
                "json.dump([sys.argv[1:], os.environ['V'], sys.stdin.read()], open('seen.json', 'w'))")
        values = [value.replace("${{", "$${{") for value in HOSTILE]
        with one(task("a", script="show.py", args=values, env={"V": "".join(values)}, stdin="".join(values)),
                 scripts={"show.py": show}) as project:
            self.assertTrue(project.run().ok)
            self.assertEqual(json.loads(project.read("seen.json")),
                             [HOSTILE, "".join(HOSTILE), "".join(HOSTILE)])

    def test_a_param_never_runs_as_code_in_a_shell_task(self):
        for value in HOSTILE:
            with self.subTest(value=value), one(
                    task("a", command='printf %s "$MINIFLOW_PARAM_P" > seen; printf %s "$1" >> seen',
                         args=["${{ params.p }}"])) as project:
                self.assertTrue(project.run(params={"p": value}).ok)
                with open(project.at("seen"), "rb") as file:
                    self.assertEqual(file.read().decode(), value * 2)
                self.assertFalse(os.path.exists(project.at("PWN")))

    def test_standard_output_and_error_go_to_the_log_in_order_and_as_bytes(self):
        with one(task("a", command=r"printf 'out\377\000'; printf 'err\n' >&2; printf last")) as project:
            run = project.run()
            self.assertEqual(project.log(run.id, "a"), b"out\xff\x00err\nlast")

    def test_a_task_sees_no_file_of_the_engine(self):
        reader, writer = os.pipe()
        os.set_inheritable(writer, True)
        with one(task("a", command=["ls", "/proc/self/fd"])) as project:
            run = project.run()
            os.close(reader)
            os.close(writer)
            if LINUX:                          # 3 is what ls itself reads the directory by
                self.assertEqual(project.log(run.id, "a").split(), [b"0", b"1", b"2", b"3"])

    @unittest.skipUnless(LINUX, "zombies that nobody reaps are made with a Linux call")
    def test_a_zombie_that_nobody_reaps_keeps_no_run_waiting(self):
        code = f"""
            import ctypes, subprocess, sys
            assert ctypes.CDLL(None).prctl(36, 1) == 0         # orphans come to us, and we reap none
            sys.exit(subprocess.call([sys.executable, {ENGINE!r}, "run", "f"]))
            """
        with one(task("a", command="sleep 60 & true", grace_s=0.1)) as project:
            done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=project.path, timeout=60,
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            self.assertEqual(done.returncode, 0)

    def test_a_failure_stays_one_where_the_engine_was_started_with_sigchld_ignored(self):
        with one(task("a", command="exit 3")) as project:
            process = project.start("run", "f", preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN))
            process.communicate(timeout=60)
            self.assertEqual(process.returncode, 1)

    @unittest.skipUnless(hasattr(os, "waitid"), "who took an exit code can't be told on this system")
    def test_an_exit_code_that_somebody_else_took_is_never_a_success(self):
        with open(os.devnull) as null:
            files = (null.fileno(),) * 3
            for cwd in (os.getcwd(), "/"):     # posix_spawn, Popen
                process = mf.spawn(["true"], os.environ, cwd, files)
                os.waitpid(process.pid, 0)
                self.assertEqual(process.poll(), mf.LOST_EXIT)
        self.assertIn("exit code lost", mf.describe_exit(mf.LOST_EXIT)[0])

    def test_a_task_gets_one_sigterm_and_is_judged_by_how_its_leader_ended(self):
        count = """
            import signal, sys, time
            def term(*args): open("terms", "a").write("TERM\\n")
            signal.signal(signal.SIGTERM, term)
            open("ready", "w").close()
            end = time.monotonic() + 1.5
            while time.monotonic() < end: time.sleep(0.05)
            """
        wait = "while ! test -e ready; do sleep 0.02; done"
        with one(task("late", command=f"python3 tasks/c.py & {wait}; wait", timeout_s=0.8, grace_s=20),
                 task("left", command=f"python3 tasks/c.py & {wait}; exit 0", timeout_s=0.8, grace_s=20),
                 max_parallel=1, scripts={"c.py": count}) as project:
            run = project.run()
            self.assertEqual([(t.status, t.reason) for t in run.tasks.values()],
                             [("failed", "timeout after 0.8 s"), ("success", None)])

    def test_signals_are_heard_while_there_is_always_something_to_do(self):
        with one(*[task(f"t{n}", command=["/no/such/program"]) for n in range(4000)]) as project:
            process = project.start("run", "f", "--run-id", "r", "--output", "json")
            process.stdout.readline()
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
            self.assertEqual(process.returncode, 130)
            self.assertIn("cancelled", {t["status"] for t in project.state("r")["tasks"].values()})

    def test_a_disk_that_is_full_for_the_files_of_an_attempt_is_waited_for_and_then_a_clear_error(self):
        saved = mf.STALL_S
        self.addCleanup(setattr, mf, "STALL_S", saved)
        for times, stall in ((2, 60.0), (10**9, 1.5)):
            with one(task("a", command="echo x=1 > $MINIFLOW_OUTPUT"), task("b", "a")) as project:
                mini = mf.MiniFlow(project.at("flows"), project.at("tasks"), project.at("out"))
                mf.STALL_S, left = stall, [times]

                class Full(mf.Disk):
                    def put(self, path, content, durable, left=left):
                        if "context-" in path and "context-1" not in path and left[0]:
                            left[0] -= 1
                            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
                        super().put(path, content, durable)

                mini.store.disk = Full()
                if times == 2:
                    self.assertEqual([len(t.attempts) for t in mini.run("f").tasks.values()], [1, 1])
                else:
                    with self.assertRaises(mf.StateError) as caught:
                        mini.run("f")
                    self.assertRegex(str(caught.exception), "context-[0-9].json: no attempt can be started: No space")

    def test_what_is_tidied_up_under_a_run_is_made_again_and_no_task_is_blamed(self):
        tidy = "rm -rf miniflow_output/logs \"$TMP_DIR\""
        with one(task("a", command=tidy), task("b", "a", command="echo x > $TMP_DIR/x && echo y"),
                 task("c", "b", command="true")) as project:
            run = project.run(run_id="r")
            self.assertEqual(run.status, "success")
            self.assertEqual(project.log("r", "b"), b"y\n")

    def test_a_working_directory_that_vanishes_is_no_bug(self):
        tasks = task("a", command="rmdir ../gone", cwd="../flows"), task("b", "a", command="exit 3", cwd="/")
        with one(*tasks) as project:
            os.mkdir(project.at("gone"))
            done = subprocess.run([sys.executable, ENGINE, "-f", "../flows", "-o", project.at("out"), "run", "f"],
                                  cwd=project.at("gone"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            self.assertNotIn(b"Traceback", done.stderr)
            self.assertEqual(done.returncode, 1)

    @unittest.skipUnless(LINUX, "a watchdog is found by its file in /proc")
    def test_a_watchdog_that_is_stopped_or_killed_is_replaced(self):
        for word in ("STOP", "KILL"):
            kill = f"kill -{word} $(pgrep -P $PPID python)"
            with one(task("a", command=kill), *[task(f"t{n}", "a") for n in range(60)],
                     task("z", "a", command="sleep 5 & echo $! > pid; wait"), max_parallel=4) as project:
                process = project.start("run", "f", "--run-id", "r", "--output", "quiet")
                pid = int(wait_for(lambda: os.path.exists(project.at("pid")) and project.read("pid").strip(), "z"))
                if word == "KILL":
                    time.sleep(2.5)            # nothing starts or ends meanwhile
                    process.kill()
                    process.communicate()
                    wait_for(lambda pid=pid: not alive(pid), "the end of the task", 3)
                else:
                    self.assertEqual(process.communicate(timeout=60)[1], b"")
                    self.assertEqual(process.returncode, 0)

    def test_the_time_of_a_task_counts_from_its_process_not_from_a_full_disk(self):
        run = mf.Run(mf.make_plan(make(task("a", timeout_s=2))), "r")
        run.apply(mf.AttemptStarted(0, "a", 1))
        run.apply(mf.AttemptSpawned(30, "a", 1, 7))
        self.assertEqual((mf.due(run, 31, 1), mf.next_wake(run, 1)), ([], 32))
        self.assertEqual(mf.due(run, 32, 1), [mf.Stop("a", 1, "timeout after 2 s", "TERM")])

    @unittest.skipUnless(LINUX, "the limit is set by a Linux call")
    def test_an_engine_without_means_for_more_puts_tasks_back_and_loses_none(self):
        """Few open files: what can't start now starts when others have ended, and no retry is used up."""
        code = f"""
            import resource, sys
            sys.path.insert(0, {HERE!r}); import miniflow, subprocess, threading, select
            resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))
            run = miniflow.MiniFlow().run("f", run_id="r", max_parallel=40)
            print(run.status, max(len(t.attempts) for t in run.tasks.values()))
            """
        with one(*[task(f"t{n}", command=["sleep", "0.3"]) for n in range(30)]) as project:
            done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=project.path, timeout=100,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            self.assertEqual((done.stdout, done.stderr), (b"success 1\n", b""))

    def test_context_files_that_nobody_needs_any_more_are_removed(self):
        tasks = [task(f"t{n}", *([f"t{n - 1}"] if n else []), command=f"echo k{n}=v > $MINIFLOW_OUTPUT")
                 for n in range(90)]
        with one(*tasks, task("count", "t89", command="ls $(dirname $MINIFLOW_OUTPUT) > seen")) as project:
            self.assertTrue(project.run().ok)
            kept = [name for name in project.lines("seen") if name.startswith("context-")]
            self.assertLess(len(kept), 70)

    def test_every_attempt_has_a_log_also_one_that_could_not_start(self):
        with one(task("a", command=["no-such-program"]),
                 task("b", args=["${{ env.NO_SUCH_VARIABLE }}"])) as project:
            run = project.run()
            self.assertEqual([project.log(run.id, name) for name in "ab"], [b"", b""])

    def test_standard_input_is_empty(self):
        with one(task("a", command="cat")) as project:
            self.assertTrue(project.run().ok)

    def test_a_timeout_kills_the_whole_group_of_a_stubborn_task(self):
        with one(task("a", script="a.py", timeout_s=0.5, grace_s=0.3), scripts={"a.py": """
                import os, signal, subprocess, sys, time
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                child = subprocess.Popen(["sleep", "60"])
                open("pids", "w").write(f"{os.getpid()} {child.pid}")
                time.sleep(60)
                """}) as project:
            run = project.run()
            self.assertEqual((run.tasks["a"].status, run.tasks["a"].reason),
                             ("failed", "timeout after 0.5 s"))
            self.assertEqual([alive(int(pid)) for pid in project.read("pids").split()], [False, False])

    def test_a_task_that_takes_term_ends_without_waiting_for_the_grace_to_pass(self):
        with one(task("a", command=["sleep", "60"], timeout_s=0.2, grace_s=3600)) as project:
            self.assertEqual(project.run().tasks["a"].reason, "timeout after 0.2 s")

    def test_what_a_task_leaves_in_its_group_does_not_survive_it(self):
        for trap in ("", "trap '' TERM; "):
            with self.subTest(trap=trap), one(
                    task("a", command=f"({trap}echo $BASHPID >/dev/null; exec sleep 60) & echo $! > pid",
                         grace_s=0.2)) as project:
                self.assertTrue(project.run().ok)
                self.assertFalse(alive(int(project.read("pid"))))

    def test_a_run_gives_its_tasks_what_the_reference_promises(self):
        with one(task("a", command='echo "{\\"rows\\": 5}" > $MINIFLOW_OUTPUT'),
                 task("b", "a", command='echo "name=value" > $GITHUB_OUTPUT'),
                 task("c", "b", script="c.py"), scripts={"c.py": """
            import json, os
            env = {k: v for k, v in os.environ.items() if k.startswith(("MINIFLOW", "GITHUB_O", "TMP_D"))}
            assert not os.path.exists(env["MINIFLOW_OUTPUT"]) and os.path.isdir(env["TMP_DIR"])
            open(os.path.join(env["TMP_DIR"], "scratch"), "w").close()
            json.dump([env, json.load(open(env["MINIFLOW_CONTEXT"])), os.getcwd()], open("seen.json", "w"))
            """}) as project:
            run = project.run(params={"p": [1, "x"]})
            env, context, cwd = json.loads(project.read("seen.json"))
            self.assertEqual(context, {"params": {"p": [1, "x"]},
                                       "tasks": {"a": {"rows": 5}, "b": {"name": "value"}},
                                       "ctx": {"p": [1, "x"], "rows": 5, "name": "value"}})
            self.assertEqual((env["MINIFLOW_RUN_ID"], env["MINIFLOW_FLOW"], env["MINIFLOW_TASK"],
                              env["MINIFLOW_ATTEMPT"], env["MINIFLOW_PARAM_P"], cwd),
                             (run.id, "f", "c", "1", '[1, "x"]', project.path))
            self.assertEqual(env["GITHUB_OUTPUT"], env["MINIFLOW_OUTPUT"])
            self.assertFalse(os.path.exists(env["TMP_DIR"]))
            self.assertEqual(run.ctx, context["ctx"])

    def test_output_that_cannot_be_used_fails_the_task_and_says_why(self):
        for command, part in [("echo '[1]' > $MINIFLOW_OUTPUT", "is neither a JSON object nor"),
                              ("mkdir $MINIFLOW_OUTPUT", "not a regular file"),
                              ("mkfifo $MINIFLOW_OUTPUT", "not a reg"),
                              ("head -c 17000000 /dev/zero > $MINIFLOW_OUTPUT", "more than 16777216 bytes")]:
            with self.subTest(command=command), one(task("a", command=command)) as project:
                run = project.run()
                self.assertEqual(run.status, "failed")
                self.assertIn(part, run.tasks["a"].reason)

    def test_a_template_without_a_value_fails_the_task_without_a_retry(self):
        with one(task("a"), task("b", "a", args=["${{ tasks.a.outputs.rows }}"], max_retries=3),
                 task("c", args=["${{ env.NO_SUCH_VARIABLE }}"])) as project:
            run = project.run()
            self.assertEqual((run.tasks["b"].reason, len(run.tasks["b"].attempts)),
                             ('tasks.a.outputs.rows: there is no "rows" in []', 1))
            self.assertIn('env.NO_SUCH_VARIABLE: there is no "NO_SUCH_VARIABLE"; set it',
                          run.tasks["c"].reason)

    def test_the_first_signal_stops_the_run_and_the_exit_code_tells_which_it_was(self):
        for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
            with self.subTest(signal=number), one(
                    task("a", command="echo $$ > pid; sleep 60"), task("b", "a")) as project:
                process = project.start("run", "f", "--run-id", "r")
                pid = int(wait_for(lambda: os.path.exists(project.at("pid")) and project.read("pid").strip(),
                                   "the task"))
                process.send_signal(number)
                _, err = process.communicate(timeout=60)
                self.assertEqual(process.returncode, code, err)
                state = project.state("r")
                self.assertEqual((state["status"], state["tasks"]["a"]["status"],
                                  state["tasks"]["b"]["status"]), ("cancelled",) * 3)
                self.assertFalse(alive(pid))

    def test_a_second_signal_kills_at_once(self):
        with one(task("a", script="a.py", grace_s=3600), scripts={"a.py": """
                import os, signal, time
                signal.signal(signal.SIGTERM, lambda *args: open("term", "w").close())
                open("pid", "w").write(str(os.getpid()))
                while True: time.sleep(1)
                """}) as project:
            process = project.start("run", "f", "--run-id", "r")
            wait_for(lambda: os.path.exists(project.at("pid")) and project.read("pid"), "the task")
            process.send_signal(signal.SIGINT)
            wait_for(lambda: os.path.exists(project.at("term")), "SIGTERM")
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
            self.assertEqual((process.returncode, project.state("r")["status"]), (130, "cancelled"))
            self.assertFalse(alive(int(project.read("pid"))))

    def test_what_sigkill_does_not_end_is_given_up_by_name_and_never_run_beside(self):
        """A kernel that does not end a process is made of signals that go astray."""
        saved = os.killpg, mf.send_signal, mf.UNKILLABLE_S
        self.addCleanup(lambda: (setattr(os, "killpg", saved[0]), setattr(mf, "send_signal", saved[1]),
                                 setattr(mf, "UNKILLABLE_S", saved[2])))
        with one(task("a", command="echo $$ >> pids; test -e go || exec sleep 60", timeout_s=0.3, grace_s=0.1,
                      max_retries=3, retry_on=["timeout"]), task("b", "a"), task("c")) as project:
            os.killpg, mf.send_signal, mf.UNKILLABLE_S = lambda group, number: None, lambda pids, word: None, 0.3
            run = project.run(run_id="r")
            pid = int(project.read("pids"))
            self.assertEqual(ends(run), {"a": "failed", "b": "upstream_failed", "c": "success"})
            self.assertEqual(run.tasks["a"].reason,
                             f"timeout after 0.3 s; unkillable: process {pid} is given up")
            self.assertTrue(alive(pid))
            os.killpg, mf.send_signal, mf.UNKILLABLE_S = saved
            project.write("go", "")
            if LINUX:
                code, _, err = project.main("resume", "r", "--on-orphan", "fail")
                self.assertEqual(code, 4)
                self.assertIn(f"task a still runs, though its engine is gone: it is process {pid}", err)
                self.assertEqual(project.main("resume", "r")[0], 0)
                self.assertFalse(alive(pid))
            else:
                os.kill(pid, signal.SIGKILL)

    def test_what_a_task_leaves_and_sigkill_does_not_end_is_said_and_keeps_no_run(self):
        saved = os.killpg, mf.UNKILLABLE_S
        self.addCleanup(lambda: (setattr(os, "killpg", saved[0]), setattr(mf, "UNKILLABLE_S", saved[1])))
        with one(task("a", command="sleep 60 & echo $! > pid", grace_s=0.1)) as project:
            os.killpg, mf.UNKILLABLE_S = lambda group, number: None, 0.2
            run = project.run()
            self.assertEqual((run.status, run.tasks["a"].error),
                             ("success", "unkillable: some of its processes are given up"))
            os.kill(int(project.read("pid")), signal.SIGKILL)

    def test_a_cancelled_task_that_sigkill_does_not_end_is_cancelled(self):
        run = mf.Run(mf.make_plan(make(task("a"))), "r")
        for event in (mf.AttemptStarted(1, "a", 1), mf.CancelRequested(2, "cancelled by SIGTERM"),
                      mf.AttemptStopping(2, "a", 1, "cancelled by SIGTERM")):
            run.apply(event)
        end = mf.attempt_unkillable(run, "a", 9, "cancelled by SIGTERM", "process 7")
        self.assertEqual((end.status, end.reason),
                         ("cancelled", "cancelled by SIGTERM; unkillable: process 7 is given up"))

    @needs("unshare")
    def test_as_the_first_process_of_a_container_it_reaps_and_hears_sigterm(self):
        """The orphans of a task that left its group come to PID 1, whose signals have no default action."""
        left = "for n in 1 2 3; do (setsid sleep 0.1 >/dev/null 2>&1 &); done"
        unshare = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
        if os.geteuid():
            unshare.insert(1, "--map-root-user")
        zombies = "for n in /proc/[0-9]*/stat; do read a b c d < $n && test $c != Z || echo $b; done"
        with one(task("a", command=left), task("b", "a", command="sleep 2.5"), task("c", "b", command=zombies),
                 task("d", "c", command="echo > ready; exec sleep 60")) as project:
            process = subprocess.Popen([*unshare, sys.executable, ENGINE, "run", "f", "--run-id", "r"],
                                       cwd=project.path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            wait_for(lambda: process.poll() is not None or os.path.exists(project.at("ready")), "the last task", 30)
            self.assertEqual(project.log("r", "c"), b"", process.poll() and process.communicate())
            engine, = children(process.pid)
            os.kill(engine, signal.SIGTERM)
            process.communicate(timeout=30)
            self.assertEqual(process.returncode, 143)
            self.assertEqual(project.state("r")["status"], "cancelled")

    def test_a_terminal_that_is_closed_ends_the_run_and_its_tasks(self):
        import pty
        with one(task("a", command="echo $$ > pid; exec sleep 60")) as project:
            child, primary = pty.fork()
            if not child:
                try:
                    os.chdir(project.path)
                    os.execv(sys.executable, [sys.executable, ENGINE, "run", "f", "--run-id", "r"])
                finally:
                    os._exit(1)
            pid = int(wait_for(lambda: os.path.exists(project.at("pid")) and project.read("pid").strip(), "it"))
            os.close(primary)
            self.assertEqual(os.WEXITSTATUS(os.waitpid(child, 0)[1]), 129)
            self.assertFalse(alive(pid))
            self.assertEqual(project.state("r")["tasks"]["a"]["reason"], "cancelled by SIGHUP")

    def test_output_of_any_size_and_of_any_bytes_passes_the_engine_by(self):
        """100 MB of all bytes; what the engine takes of memory is that of a task without output."""
        code = """
            import sys
            block = bytes(range(256)) * 4096
            for n in range(int(sys.argv[1])):
                sys.stdout.buffer.write(block)
            """
        peaks = []
        for blocks in (0, 100):
            with one(task("a", script="s.py", args=[str(blocks)]), scripts={"s.py": code}) as project:
                process = project.start("run", "f", "--run-id", "r", "--output", "quiet")
                process.stdout.close()
                process.stderr.close()
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = status
                self.assertEqual(status, 0)
                log = project.at("miniflow_output", "logs", "r", "a.1.log")
                self.assertEqual(os.path.getsize(log), blocks * 2**20)
                with open(log, "rb") as file:
                    self.assertIn(file.read(256), (b"", bytes(range(256))))
                peaks.append(usage.ru_maxrss)
                self.assertEqual(project.main("show", "r")[0], 0)
        self.assertLess(peaks[1], peaks[0] * 1.2)

    def test_a_hangup_is_ignored_under_nohup(self):
        with one(task("a", command="touch started; sleep 0.7")) as project:
            process = project.start("run", "f",
                                    preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
            wait_for(lambda: os.path.exists(project.at("started")), "the task")
            process.send_signal(signal.SIGHUP)
            process.communicate(timeout=60)
            self.assertEqual(process.returncode, 0)

    def test_a_run_in_a_thread_leaves_signals_alone_and_works(self):
        import threading
        with one(task("a")) as project:
            before, found = signal.getsignal(signal.SIGINT), []
            thread = threading.Thread(target=lambda: found.append(project.run()))
            thread.start()
            thread.join(60)
            self.assertTrue(found[0].ok)
            self.assertIs(signal.getsignal(signal.SIGINT), before)

    def test_without_pidfds_ends_are_seen_all_the_same(self):
        """As on macOS, where SIGCHLD tells, and in a thread there, where nobody does."""
        code = f"""
            import os, sys, threading
            sys.path.insert(0, {HERE!r})
            if hasattr(os, "pidfd_open"): del os.pidfd_open
            import miniflow
            def go(): assert miniflow.MiniFlow().run("f").ok
            go(); thread = threading.Thread(target=go); thread.start(); thread.join()
            """
        with one(task("a"), task("b", "a", command="sleep 0.1 & true")) as project:
            done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=project.path,
                                  stderr=subprocess.PIPE, timeout=60)
            self.assertEqual((done.returncode, done.stderr), (0, b""))

    def test_tasks_really_run_at_once_and_never_more_than_allowed(self):
        meet = ("import os, sys, time; open('here-' + sys.argv[1], 'w').close(); "
                "end = time.monotonic() + 20\n"
                "while not os.path.exists('here-' + sys.argv[2]): "
                "assert time.monotonic() < end; time.sleep(0.01)")
        with one(task("a", command=[sys.executable, "-c", meet, "1", "2"]),
                 task("b", command=[sys.executable, "-c", meet, "2", "1"])) as project:
            self.assertTrue(project.run(max_parallel=2).ok)
        count = ("n=$(ls live 2>/dev/null | wc -l); mkdir -p live; touch live/$$; "
                 "ls live | wc -l >> seen; sleep 0.05; rm live/$$")
        with one(*[task(f"t{n}", command=count) for n in range(12)], max_parallel=3) as project:
            self.assertTrue(project.run().ok)
            self.assertLessEqual(max(map(int, project.read("seen").split())), 3)

    def test_a_power_cut_that_took_the_record_of_an_attempt_keeps_its_log(self):
        with one(task("a", command="echo new")) as project:
            project.write("miniflow_output/logs/r/a.1.log", "old")
            os.chmod(project.at("miniflow_output"), 0o700)
            self.assertTrue(project.run(run_id="r").ok)
            self.assertEqual((project.log("r", "a"), project.read("miniflow_output/logs/r/a.1.log.lost")),
                             (b"new\n", "old"))


def run_workflow(*tasks, store=None, run_id=None, ctx=None, **options):
    """Run tasks as a workflow in memory; return the final context."""
    return mf.Workflow(list(tasks), **options).run_sync(run_id, store or mf.MemoryStateStore(), ctx)


def failure(*tasks, **options):
    """Run tasks as a workflow that fails; return the FlowFailed."""
    try:
        raise AssertionError(f"it succeeded: {run_workflow(*tasks, **options)}")
    except mf.FlowFailed as exc:
        return exc


FAKE_SLURM = r"""
import json, os, signal, subprocess, sys, time
name, argv, root = os.path.basename(sys.argv[0]), sys.argv[1:], os.environ["FAKE_SLURM"]

def at(*parts):
    return os.path.join(root, *map(str, parts))

def put(path, text):
    with open(path + ".part", "w") as file:
        file.write(text)
    os.rename(path + ".part", path)

def get(*parts):
    try:
        with open(at(*parts)) as file:
            return file.read()
    except FileNotFoundError:
        return ""

def option(job, start):
    return next((word[len(start):] for word in json.loads(get(job, "argv")) if word.startswith(start)), "")

def fail(text):
    sys.exit(f"{name}: error: {text}")

def live(job):
    return get(job, "state") in ("PENDING", "RUNNING", "COMPLETING")

def carry_out(job):
    while get("hold") and get(job, "state") == "PENDING":
        time.sleep(0.02)
    if get(job, "state") != "PENDING":
        return
    put(at(job, "state"), "RUNNING")
    with open(option(job, "--output=").replace("%%", "%"), "ab") as log:
        script = subprocess.Popen([at(job, "script")], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                  cwd=next(filter(os.path.isdir, [option(job, "--chdir="), "/tmp"])),
                                  env={**os.environ, "SLURM_JOB_ID": job})
        put(at(job, "pid"), str(script.pid))
        code = script.wait()
        cancelled = get(job, "state") == "COMPLETING"
        put(at(job, "state"), "CANCELLED" if cancelled else "FAILED" if code else "COMPLETED")

with open(at("calls"), "a") as file:
    file.write(json.dumps([name, *argv]) + "\n")
mode = get("mode-" + name)
if mode == "hang":
    time.sleep(60)
elif mode == "odd":
    print("what?")
    sys.exit()
elif mode == "down":
    fail("Unable to contact slurm controller (connect failure)")
elif mode == "refuse":
    fail("Batch job submission failed: Invalid partition name specified")
if name == "sbatch":
    jobs = [entry for entry in os.listdir(root) if entry.isdigit()]
    if mode == "limit" and any(map(live, jobs)):
        fail("Batch job submission failed: Job violates accounting/QOS policy (job submit limit)")
    number = 1 + len(jobs)
    while True:
        try:
            os.mkdir(at(number))
            break
        except FileExistsError:
            number += 1
    job = str(number)
    put(at(job, "argv"), json.dumps(argv))
    put(at(job, "script"), sys.stdin.read())
    os.chmod(at(job, "script"), 0o700)
    put(at(job, "state"), "gone" if mode == "lose" else "PENDING")
    if mode != "lose" and not os.fork():
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for fd in 0, 1, 2:
            os.dup2(null, fd)
        carry_out(job)
        os._exit(0)
    if mode == "made, no answer":
        time.sleep(60)
    if mode == "made, timed out":
        fail("Batch job submission failed: Socket timed out on send/recv operation")
    print(job + (";east" if mode == "cluster" else ""))
elif name == "squeue":
    if "-M" in argv:
        print("CLUSTER: " + argv[argv.index("-M") + 1] + "\nJOBID|STATE|COMMENT")
    for job in sorted(entry for entry in os.listdir(root) if entry.isdigit()):
        if get(job, "state") not in ("", "gone") and option(job, "--job-name=") == argv[argv.index("-n") + 1]:
            print(job, get(job, "state"), option(job, "--comment="), sep="|")
else:
    for job in (word for word in argv if word.isdigit()):
        state, number = get(job, "state"), signal.SIGTERM
        for word in argv:
            number = getattr(signal, "SIG" + word[9:]) if word.startswith("--signal=") else number
        if "--batch" not in argv and live(job):
            put(at(job, "state"), "CANCELLED" if state == "PENDING" else "COMPLETING")
        if state == "RUNNING" and get(job, "pid"):
            os.kill(int(get(job, "pid")), number)
"""


class FakeCluster(Project):
    """A project on a machine with a Slurm that is not one, and of which each program can be given a mode."""

    def __init__(self, *tasks, scripts=None, **fields):
        super().__init__({"f": flow_json(*tasks, **{"defaults": {"executor": "slurm"}, **fields})}, scripts)

    def __enter__(self):
        super().__enter__()
        for name in ("sbatch", "squeue", "scancel"):
            self.write(f"bin/{name}", f"#!{sys.executable} -IS\n{FAKE_SLURM}")
            os.chmod(self.at("bin", name), 0o755)
        os.mkdir(self.at("slurm"))
        self.env = {**{name: value for name, value in os.environ.items() if not name.startswith("MINIFLOW_")},
                    "PATH": f"{self.at('bin')}:{os.environ['PATH']}", "FAKE_SLURM": self.at("slurm"),
                    "MINIFLOW_SLURM_POLL_S": "0.2", "MINIFLOW_SLURM_CALL_S": "10"}
        return self

    def __exit__(self, *exc_info):
        self.mode(sbatch="", squeue="", scancel="")
        self.write("slurm/hold", "")
        for job in self.jobs():
            subprocess.run([self.at("bin", "scancel"), "--signal=INT", "--batch", job], env=self.env)
            subprocess.run([self.at("bin", "scancel"), job], env=self.env)
        wait_for(lambda: not {"RUNNING", "COMPLETING"} & set(self.jobs().values()), "the end of all jobs")
        super().__exit__(*exc_info)

    def mode(self, **modes):
        for name, mode in modes.items():
            self.write(f"slurm/mode-{name}", mode)

    def jobs(self):
        """Return the jobs and their states."""
        found = {}
        for name in sorted(filter(str.isdigit, os.listdir(self.at("slurm"))), key=int):
            with contextlib.suppress(FileNotFoundError):       # it is being made
                found[name] = self.read(f"slurm/{name}/state")
        return found

    def calls(self, name):
        """Return the arguments of each call of a program."""
        lines = self.lines("slurm/calls") if os.path.exists(self.at("slurm/calls")) else []
        return [call[1:] for call in map(json.loads, lines) if call[0] == name]

    def begin(self, *args):
        """Start a command, which can be waited for by finish()."""
        return self.start(*args, env=self.env)

    def finish(self, process, code=0):
        out, error = process.communicate(timeout=60)
        assert process.returncode == code, (process.returncode, error.decode())
        return error.decode()

    def run(self, *args, code=0):
        """Run flow f as run r; return what was said."""
        return self.finish(self.begin("run", "f", "--run-id", "r", *args), code)

    def kill(self, process):
        process.send_signal(signal.SIGKILL)
        process.communicate()

    def reasons(self, run_id="r"):
        return {name: (t["status"], t["reason"]) for name, t in self.state(run_id)["tasks"].items()}

    def side(self):
        """Return what tasks have written to the file named side."""
        return self.lines("side") if os.path.exists(self.at("side")) else []

    def wait_side(self, *lines):
        wait_for(lambda: self.side() == list(lines), f"{lines} in side")


@unittest.skipUnless(LINUX, "Slurm runs on Linux")
class T33Slurm(unittest.TestCase):

    def setUp(self):
        """So long tasks sleep that are to be ended, and nobody else on the machine."""
        self.nap = f"60.{int.from_bytes(os.urandom(6), 'big')}"

    def test_jobs_and_processes_of_one_flow_hand_on_outputs_logs_and_params(self):
        with FakeCluster(
                task("a", command='echo "$MINIFLOW_PARAM_P" $SLURM_JOB_ID; echo n=4 > $MINIFLOW_OUTPUT'),
                task("b", "a", executor="local", command=["echo", "${{ tasks.a.outputs.n }}"]),
                task("c", "b", script="c.py", args=["${{ item }}"], foreach=[1, 2], resources={"cpus": 3}),
                params={"p": "x"}, scripts={"c.py": """
                    import json, os, sys
                    ctx = json.load(open(os.environ["MINIFLOW_CONTEXT"]))["ctx"]
                    print(sys.argv[1], ctx, os.path.isdir(os.environ["TMP_DIR"]))
                    """}) as project:
            self.assertIn("2 at once, 2 jobs at once", project.run("-j2", "--param", "p=y"))
            self.assertEqual([project.log("r", name).decode() for name in ("a", "b", "c[1]")],
                             ["y 1\n", "4\n", "2 {'p': 'y', 'n': '4'} True\n"])
            self.assertEqual(project.jobs(), dict.fromkeys("123", "COMPLETED"))
            self.assertIn("--cpus-per-task=3", project.calls("sbatch")[-1])
            told = project.cli("show", "r").stdout
            self.assertRegex(told, r"(?m)^a +success +1 +\S+ s +job 1$")
            self.assertRegex(told, r"(?m)^b +success +1 +\S+ s +started$")

    def test_failures_are_retried_and_timeouts_reach_grandchildren(self):
        with FakeCluster(
                task("bad", command="exit 3", max_retries=1),
                task("slow", command=f"sleep {self.nap} & wait", timeout_s=0.3),
                task("gone", command=["no-such-program"], max_retries=1),
                task("dir", cwd="no-such-dir"),
                task("left", command=f"sleep {self.nap} & exit 0", grace_s=0.2),
                task("deaf", command=f"trap '' TERM; sleep {self.nap} & wait; wait", timeout_s=0.3, grace_s=0.2),
                task("odd", command="echo x > $MINIFLOW_OUTPUT")) as project:
            project.run(code=1)
            found = project.reasons()
            self.assertRegex(found.pop("gone")[1], "^cannot start: .*no-such-program")
            self.assertRegex(found.pop("dir")[1], "^cannot start: .*no-such-dir")
            self.assertRegex(found.pop("odd")[1], "^bad output: ")
            self.assertEqual(found, {
                "bad": ("failed", "exit 3"), "slow": ("failed", "timeout after 0.3 s"), "left": ("success", None),
                "deaf": ("failed", "timeout after 0.3 s")})
            attempts = {name: len(t["attempts"]) for name, t in project.state("r")["tasks"].items()}
            self.assertEqual((attempts["bad"], attempts["gone"]), (2, 1))
            self.assertEqual(running(self.nap.encode()), [])

    def test_arguments_environment_and_input_arrive_byte_for_byte(self):
        show = "import json, os, sys; json.dump([sys.argv[1:], os.environ['V'], sys.stdin.read()], open('seen', 'w'))"
        values = [value.replace("${{", "$${{") for value in HOSTILE]
        with FakeCluster(task("a", script="show.py", args=values, env={"V": "".join(values)}, stdin="".join(values)),
                         task("b", command='printf %s "$MINIFLOW_PARAM_P" "$1" > b', args=["${{ params.p }}"]),
                         params={"p": ""}, scripts={"show.py": show}) as project:
            project.run("--params", json.dumps({"p": "".join(HOSTILE)}))
            self.assertEqual(json.loads(project.read("seen")), [HOSTILE, "".join(HOSTILE), "".join(HOSTILE)])
            with open(project.at("b"), "rb") as file:
                self.assertEqual(file.read().decode(), "".join(HOSTILE) * 2)
            self.assertFalse(os.path.exists(project.at("PWN")))

    def test_cancelling_ends_running_jobs_with_grace_and_queued_ones_at_once(self):
        with FakeCluster(
                task("a", command="trap 'echo TERM >> side; exit 0' TERM; echo a > side; sleep 60 & wait"),
                task("b", wait_for={"command": ["test", "-e", "side"], "poll_s": 0.05}), task("c", "b")) as project:
            process = project.begin("run", "f", "--run-id", "r")
            project.wait_side("a")
            project.write("slurm/hold", "yes")
            wait_for(lambda: project.jobs().get("2") == "PENDING", "the second job")
            self.assertEqual(project.cli("cancel", "r", env=project.env).stdout, "r cancelled\n")
            project.finish(process, 143)
            self.assertEqual(project.side(), ["a", "TERM"])
            self.assertEqual({name: status for name, (status, _) in project.reasons().items()},
                             {"a": "cancelled", "b": "success", "c": "cancelled"})
            self.assertEqual(project.jobs()["2"], "CANCELLED")

    def test_a_second_signal_kills_what_does_not_heed_the_first(self):
        with FakeCluster(task("a", command="trap '' TERM; echo $$ > side; while :; do sleep 0.1; done",
                              grace_s=60)) as project:
            process = project.begin("run", "f", "--run-id", "r")
            pid = int(wait_for(project.side, "the job")[0])
            for _ in range(2):
                process.send_signal(signal.SIGINT)
                wait_for(lambda: len(project.calls("scancel")) or process.poll(), "scancel")
            project.finish(process, 130)
            self.assertFalse(alive(pid))

    def test_jobs_outlive_their_engine_and_are_taken_up_as_they_are(self):
        command = "echo {0} >> side; while ! test -e go; do sleep 0.05; done; echo {0}=1 > $MINIFLOW_OUTPUT"
        with FakeCluster(task("a", command=command.format("a")), task("b", command="echo b >> side", pool="p"),
                         task("c", "a", "b", command=["echo", "${{ tasks.a.outputs.a }}"]), pools={"p": 1}) as project:
            process = project.begin("run", "f", "--run-id", "r")
            wait_for(lambda: sorted(project.side()) == ["a", "b"], "both jobs")
            self.kill_unseen(project, process)
            project.write("go", "")
            wait_for(lambda: set(project.jobs().values()) == {"COMPLETED"}, "the end of all jobs")
            self.assertRegex(project.cli("show", "r").stdout, "(?m)^a +running +1 +- +job [12]$")
            project.finish(project.begin("resume", "r"))
            self.assertEqual(sorted(project.side()), ["a", "b"])
            self.assertEqual([len(t["attempts"]) for t in project.state("r")["tasks"].values()], [1, 1, 1])
            self.assertEqual(project.log("r", "c"), b"1\n")

    def kill_unseen(self, project, process):
        """Kill an engine and its watchdog does what it does; the jobs are not its business."""
        project.kill(process)
        wait_for(lambda: not running(project.path.encode() + b"/miniflow_output/tmp/r/work"), "the watchdog's end")

    def test_a_job_whose_number_was_never_recorded_is_found_by_name(self):
        with FakeCluster(task("a", command="echo a >> side; while ! test -e go; do sleep 0.05; done")) as project:
            project.mode(sbatch="made, no answer")
            process = project.begin("run", "f", "--run-id", "r")
            project.wait_side("a")
            project.kill(process)
            project.mode(sbatch="")
            process = project.begin("resume", "r", "--output", "json")
            wait_for(lambda: b'"attempt_submitted"' in process.stdout.readline(), "the job's number")
            project.write("go", "")
            project.finish(process)
            self.assertEqual((project.side(), list(project.jobs())), (["a"], ["1"]))
            self.assertEqual(project.state("r")["tasks"]["a"]["attempts"][0]["job"], "1")

    def test_an_engine_that_dies_before_it_records_what_it_knows_loses_nothing(self):
        """At its number, at its end, and at the end of its task's downstream."""
        code = f"""
            import os, sys
            sys.path.insert(0, {HERE!r})
            import miniflow

            class Deadly(miniflow.Disk):
                def write(self, fd, content):
                    if sys.argv[1].encode() in bytes(content) and b'"event":"opened"' not in bytes(content):
                        os._exit(9)
                    super().write(fd, content)

            mini = miniflow.MiniFlow()
            mini.store.disk = Deadly()
            mini.run("f", run_id="r")
            """
        for part in ('"attempt_submitted"', '"attempt_ended"', '"task":"b"'):
            with self.subTest(part), FakeCluster(
                    task("a", command="echo a >> side; echo n=4 > $MINIFLOW_OUTPUT"),
                    task("b", "a", command=["echo", "${{ tasks.a.outputs.n }}"])) as project:
                done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), part], cwd=project.path,
                                      env=project.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60)
                self.assertEqual(done.returncode, 9)
                wait_for(project.side, "the job")
                project.finish(project.begin("resume", "r"))
                self.assertEqual((project.side(), project.log("r", "b")), (["a"], b"4\n"))
                self.assertEqual(ends_of(project.state("r")), dict.fromkeys("ab", ("success", 1)))

    def test_a_job_whose_record_a_power_cut_took_runs_once(self):
        for held in ("yes", ""):               # it waits; it has begun
            with self.subTest(held), FakeCluster(
                    task("a", command="echo a >> side; while ! test -e go; do sleep 0.05; done")) as project:
                project.write("slurm/hold", held)
                process = project.begin("run", "f", "--run-id", "r")
                wait_for(project.jobs if held else project.side, "the job")
                project.kill(process)
                journal = project.read("miniflow_output/runs/r.jsonl").partition('{"event":"attempt_started"')[0]
                project.write("miniflow_output/runs/r.jsonl", journal)
                os.unlink(project.at("miniflow_output/runs/r.json"))
                process = project.begin("resume", "r")
                if held:
                    wait_for(lambda: len(project.jobs()) > 1, "another job")
                project.write("slurm/hold", "")
                project.write("go", "")
                project.finish(process)
                self.assertEqual((project.side(), len(project.jobs())), (["a"], 2 if held else 1))
                self.assertEqual(ends_of(project.state("r")), {"a": ("success", 1)})

    def test_an_attempt_runs_once_however_many_jobs_were_made_of_it(self):
        for mode in ("made, timed out", "made, no answer"):
            with self.subTest(mode), FakeCluster(task("a", command="echo a >> side")) as project:
                project.env["MINIFLOW_SLURM_CALL_S"] = "1"
                project.write("slurm/hold", "yes")
                project.mode(sbatch=mode, squeue="odd")        # so that nobody knows of the job
                process = project.begin("run", "f", "--run-id", "r")
                wait_for(project.jobs, "a job")
                subprocess.run([project.at("bin", "sbatch"), *project.calls("sbatch")[0]], env=project.env,
                               input=project.read("slurm/1/script").encode(), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, timeout=60) if mode == "made, timed out" else None
                project.mode(sbatch="", squeue="")
                project.write("slurm/hold", "")
                project.finish(process)
                wait_for(lambda: "RUNNING" not in project.jobs().values(), "the end of all jobs")
                self.assertEqual(project.side(), ["a"])

    def test_a_controller_that_does_not_answer_neither_ends_a_job_nor_holds_up_the_rest(self):
        with FakeCluster(
                task("a", command="echo a >> side; while ! test -e go; do sleep 0.05; done"),
                task("l", executor="local", command="while ! test -e go; do sleep 0.05; done"),
                task("m", "l", executor="local")) as project:
            project.env.update(MINIFLOW_SLURM_POLL_S="0.04", MINIFLOW_SLURM_CALL_S="1")
            process = project.begin("run", "f", "--run-id", "r")
            project.wait_side("a")
            for mode in ("hang", "down", "odd"):
                project.mode(sbatch=mode, squeue=mode, scancel=mode)
                before = len(project.calls("squeue"))
                wait_for(lambda before=before: len(project.calls("squeue")) > before + 1, "calls")
            project.write("go", "")
            told = project.finish(process)
            self.assertEqual(told.count("Slurm gives no answer"), 1)
            self.assertEqual(set(project.reasons().values()), {("success", None)})
            self.assertEqual((project.side(), list(project.jobs())), (["a"], ["1"]))

    def test_what_could_not_be_submitted_is_when_the_controller_answers_again(self):
        with FakeCluster(task("a", command="echo a >> side")) as project:
            project.mode(sbatch="down", squeue="down")
            process = project.begin("run", "f", "--run-id", "r")
            wait_for(lambda: len(project.calls("squeue")) > 2, "squeue to be asked again")
            project.mode(sbatch="", squeue="")
            told = project.finish(process)
            self.assertEqual(project.side(), ["a"])
            for part in ("Slurm takes no job now", "Slurm gives no answer", "Slurm answers again"):
                self.assertEqual(told.count(part), 1, told)

    def test_a_refused_submission_fails_and_a_limit_is_waited_for(self):
        with FakeCluster(task("a", max_retries=3, resources={"partition": "none"})) as project:
            project.mode(sbatch="refuse")
            self.assertIn("cannot start: sbatch: sbatch: error: Batch job submission failed: Invalid partition",
                          project.run(code=1))
            self.assertEqual(len(project.calls("sbatch")), 1)
        with FakeCluster(*[task(f"t{n}", command="sleep 0.3") for n in range(3)]) as project:
            project.mode(sbatch="limit")
            self.assertIn("Slurm takes no job now", project.run())
            self.assertEqual([len(t["attempts"]) for t in project.state("r")["tasks"].values()], [1, 1, 1])

    def test_a_job_that_is_lost_is_tried_again_and_does_not_run_when_it_turns_up(self):
        with FakeCluster(task("a", command="echo $MINIFLOW_ATTEMPT >> side", max_retries=1)) as project:
            project.mode(sbatch="lose")
            process = project.begin("run", "f", "--run-id", "r")
            wait_for(project.jobs, "a job")
            project.mode(sbatch="")
            told = project.finish(process)
            self.assertIn("lost by Slurm: job 1 is not there any more, and has left no end", told)
            self.assertEqual(project.side(), ["2"])
            late = subprocess.run([project.at("slurm/1/script")], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
            self.assertEqual((late.returncode != 0, project.side()), (True, ["2"]))

    def test_a_job_that_slurm_ended_says_so(self):
        with FakeCluster(task("a", command=f"echo a > side; exec sleep {self.nap}")) as project:
            process = project.begin("run", "f", "--run-id", "r")
            project.wait_side("a")
            os.kill(int(project.read("slurm/1/pid")), signal.SIGKILL)          # as for want of memory
            wait_for(lambda: project.jobs()["1"] == "FAILED", "the job's end")
            project.write("slurm/1/state", "OUT_OF_MEMORY")
            self.assertIn("lost by Slurm: job 1 is OUT_OF_MEMORY, and has left no end", project.finish(process, 1))
            for pid in running(self.nap.encode()):
                os.kill(pid, signal.SIGKILL)

    def test_a_cluster_that_sbatch_names_is_the_one_that_is_asked(self):
        with FakeCluster(task("a", command=f"echo a > side; exec sleep {self.nap}")) as project:
            project.mode(sbatch="cluster")
            process = project.begin("run", "f", "--run-id", "r")
            wait_for(lambda: ["-M", "east"] in [call[:2] for call in project.calls("squeue")], "squeue -M east")
            project.wait_side("a")
            process.send_signal(signal.SIGTERM)
            project.finish(process, 143)
            self.assertEqual(project.calls("scancel")[0][1:3], ["-M", "east"])

    def test_the_jobs_of_a_run_without_an_engine_can_be_cancelled(self):
        with FakeCluster(task("a", command=f"echo a >> side; exec sleep {self.nap}"), task("b", "a")) as project:
            process = project.begin("run", "f", "--run-id", "r")
            project.wait_side("a")
            project.kill(process)
            done = project.cli("cancel", "r", env=project.env)
            self.assertEqual((done.returncode, done.stdout), (0, "r cancelled\n"), done.stderr)
            self.assertEqual(project.reasons(), dict.fromkeys("ab", ("cancelled", "cancelled by miniflow cancel")))
            self.assertEqual(running(self.nap.encode()), [])

    def test_a_job_of_a_task_that_has_changed_ends_before_it_runs_again(self):
        with FakeCluster(task("a", command="echo begin >> side; trap 'sleep 0.5; echo end >> side; exit' TERM; "
                                           "sleep 60 & wait")) as project:
            process = project.begin("run", "f", "--run-id", "r")
            project.wait_side("begin")
            project.kill(process)
            project.write("flows/f.json", json.dumps(flow_json(task("a", executor="local"))))
            self.assertIn("a may still be job 1 of slurm", project.finish(project.begin("resume", "r"), 4))
            project.write("flows/f.json", json.dumps(flow_json(
                task("a", executor="slurm", command="echo again >> side"))))
            self.assertIn("task a was changed", project.finish(project.begin("resume", "r")))
            self.assertEqual(project.side(), ["begin", "end", "again"])

    def test_the_executor_of_a_run_is_kept_and_its_jobs_are_bounded(self):
        with FakeCluster(*[task(f"t{n}", command="sleep 0.1; test -e go") for n in range(3)], defaults={}) as project:
            self.assertEqual(project.finish(project.begin("run", "f", "--run-id", "l"), 1).count("submitted"), 0)
            project.env["MINIFLOW_SLURM_JOBS"] = "2"
            events = [json.loads(line) for line in project.cli(
                "run", "f", "--run-id", "r", "--executor", "slurm", "--output", "json", env=project.env
                ).stdout.splitlines()]
            steps = [{"attempt_started": 1, "attempt_ended": -1}.get(event["event"], 0) for event in events]
            self.assertEqual(max(itertools.accumulate(steps)), 2)
            project.write("go", "")
            self.assertEqual(project.finish(project.begin("resume", "r")).count("submitted"), 3)

    def test_what_is_needed_is_asked_for_before_anything_runs(self):
        with FakeCluster(task("a")) as project:
            bare = {**project.env, "PATH": "/usr/bin:/bin"}
            if not shutil.which("sbatch", path=bare["PATH"]):
                done = project.cli("run", "f", "--run-id", "r", env=bare)
                self.assertEqual(done.returncode, 2)
                self.assertIn("task a is to run on Slurm, and there is no sbatch in PATH", done.stderr)
            done = project.cli("run", "f", env={**project.env, "MINIFLOW_SLURM_POLL_S": "soon"})
            self.assertEqual(done.returncode, 2)
            self.assertIn('MINIFLOW_SLURM_POLL_S="soon": expected a number from 0.01', done.stderr)
            project.write("flows/py.py", textwrap.dedent("""
                from miniflow import Workflow, task
                @task
                def a(ctx): pass
                workflow = Workflow([a])
                """))
            done = project.cli("run", "py", "--executor", "slurm", env=project.env)
            self.assertEqual(done.returncode, 2)
            self.assertIn("task a is a Python function, which can't run on Slurm", done.stderr)
            self.assertEqual(project.cli("runs").stdout, "")

    def test_neither_a_job_nor_its_files_hold_what_they_should_not(self):
        with FakeCluster(task("a", command="env > side; exit 1", env={"E": "flow"})) as project:
            project.env.update(SBATCH_WAIT="1", SLURM_JOB_ID="77", SQUEUE_STATES="CD", E="engine", KEPT="yes")
            project.run(code=1)
            found = dict(line.split("=", 1) for line in project.side() if "=" in line)
            self.assertEqual((found["E"], found["KEPT"], found["SLURM_JOB_ID"]), ("flow", "yes", "1"))
            self.assertFalse({"SBATCH_WAIT", "SQUEUE_STATES", "MINIFLOW_COOKIE"} & found.keys())
            self.assertEqual(os.listdir(project.at("miniflow_output/tmp/r/io")), [])

    def test_the_flow_of_the_readme_runs(self):
        with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
            text = re.search(r'(?s)```json\n(\{\n  "name": "sweep".*?)```', file.read())[1]
        flow = json.loads(text.replace("sleep $1; ", ""))
        with FakeCluster(*flow["tasks"], defaults=flow["defaults"]) as project:
            project.run()
            self.assertEqual(project.log("r", "report"), b'[{"mean": "7"}, {"mean": "14"}]\n')
            self.assertEqual(len(project.jobs()), 3)

    def test_scripts_and_makefiles_say_that_they_leave_the_executor_out(self):
        with FakeCluster(task("a")) as project:
            for language in ("bash", "make"):
                code, _, error = project.main("export", "f", "--to", language)
                self.assertEqual((code, error.count("note: task a: executor slurm is left out")), (0, 1))


def ends_of(state):
    """Return how the tasks of a recorded run have ended, and after how many attempts."""
    return {name: (t["status"], len(t["attempts"])) for name, t in state["tasks"].items()}


def running(part):
    """Return the processes whose command line has `part` in it."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/cmdline", "rb") as file:
            if part in file.read():
                found.append(int(name))
    return found


class T34Functions(unittest.TestCase):

    def program(self, text, *args, **options):
        """Run a Python program beside miniflow.py, in a directory of its own; return its CompletedProcess."""
        project = one(task("unused"))
        project.__enter__()
        self.addCleanup(project.__exit__)
        self.project = project
        project.write("program.py", textwrap.dedent(text))
        env = {**os.environ, "PYTHONPATH": HERE, **options.pop("env", {})}
        process = subprocess.Popen([sys.executable, "program.py", *args], cwd=project.path, env=env, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
        self.addCleanup(process.kill)
        return process

    def test_tasks_that_wait_run_all_at_once_and_of_those_that_do_not_few_are_held_in_memory(self):
        count = 3 * mf.AT_ONCE
        for waits in (False, True):
            calls, most, everybody = [], [], []

            async def work(ctx, waits=waits, calls=calls, most=most, everybody=everybody):
                calls.append(0)
                if len(calls) % 100 == 0:
                    most.append(len(asyncio.all_tasks()))
                if waits and len(calls) == count:
                    everybody[0].set()
                if waits:
                    await everybody[0].wait()

            async def run_all(work=work, everybody=everybody):
                everybody.append(asyncio.Event())
                tasks = [mf.task(name=f"t{n}")(work) for n in range(count)]
                await mf.Workflow(tasks).run("r", mf.MemoryStateStore())

            asyncio.run(run_all())
            self.assertEqual(len(calls), count)
            if waits:
                self.assertGreater(max(most), count)
            else:
                self.assertLess(max(most), 2 * mf.AT_ONCE)

    def test_waiting_for_the_same_time_again_sets_no_further_timer(self):
        timers = []

        async def main():
            loop = asyncio.get_running_loop()
            call_at = loop.call_at
            loop.call_at = lambda *args, **options: timers.append(args[0]) or call_at(*args, **options)
            tasks = [mf.task(name=f"t{n}")(lambda ctx: None) for n in range(300)]
            with tempfile.TemporaryDirectory() as path:
                await mf.Workflow(tasks).run("r", mf.JSONStateStore(path))

        asyncio.run(main())
        self.assertLess(len(timers), 100)

    def test_the_example_of_the_readme(self):
        process = self.program("""
            import asyncio
            from miniflow import Workflow, task, JSONStateStore

            @task(max_retries=2, backoff_s=0.5)
            async def fetch_data(ctx):
                return {"items": [1, 2, 3, 4, 5]}

            @task()
            def transform_data(ctx):
                return {"total": sum(ctx["items"])}

            async def main():
                fetch_data >> transform_data
                workflow = Workflow([fetch_data, transform_data], name="demo")
                result = await workflow.run("my_run_001", JSONStateStore("./data"), {"user": "demo"})
                print(result)

            asyncio.run(main())
            """)
        out, err = process.communicate()
        self.assertEqual((out, err), ("{'user': 'demo', 'items': [1, 2, 3, 4, 5], 'total': 15}\n", ""))
        with open(self.project.at("data/runs/my_run_001.json")) as file:
            state = json.load(file)
        self.assertEqual((state["status"], state["tasks"]["transform_data"]["inputs"]),
                         ("success", {"items": "fetch_data"}))
        self.assertEqual(os.listdir(self.project.at("data/runs")), ["my_run_001.json"])

    def test_a_task_sees_its_ancestors_whatever_the_timing_and_the_parallelism(self):
        """Random graphs, kinds, sleeps and limits against an oracle that merges in topological order."""
        for seed in range(25):
            chance, seen = random.Random(seed), {}
            names = [f"t{n}" for n in range(chance.randint(2, 12))]
            upstream = {name: [up for up in names[:n] if chance.random() < 0.35] for n, name in enumerate(names)}
            outputs = {name: {chance.choice("xyz"): f"of {name}", name: [1]} for name in names}
            waits = {name: chance.choice([0, 0, 0.002, 0.01]) for name in names}
            kinds = {name: chance.random() < 0.6 for name in names}

            def make_one(name, seen=seen, outputs=outputs, waits=waits, kinds=kinds):
                def body(ctx):
                    seen[name] = json.loads(json.dumps(ctx))
                    for value in ctx.values():
                        if isinstance(value, list):
                            value.append("spoilt")
                    ctx["z"] = "spoilt"
                    return outputs[name]

                async def coroutine(ctx):
                    await asyncio.sleep(waits[name])
                    return body(ctx)

                def plain(ctx):
                    time.sleep(waits[name])
                    return body(ctx)
                return mf.task(name=name)(coroutine if kinds[name] else plain)

            made = {name: make_one(name) for name in names}
            for name in names:
                [made[up] for up in upstream[name]] >> made[name]
            shuffled = chance.sample(names, len(names))
            order = mf.make_plan(mf.make_flow("w", [made[name] for name in shuffled])).order
            above = {}
            for name in names:
                above[name] = set(upstream[name]).union(*(above[up] for up in upstream[name]))
            finals = []
            for limit in (None, 1, 2, 5):
                finals.append(run_workflow(*(made[name] for name in shuffled), ctx={"x": "initial"},
                                           max_concurrent_tasks=limit))
                for name in names:
                    expected = {"x": "initial"}
                    for up in order:
                        expected.update(outputs[up] if up in above[name] else {})
                    self.assertEqual(seen.pop(name), expected, (seed, limit, name))
            expected = {"x": "initial"}
            for name in order:
                expected.update(outputs[name])
            self.assertEqual(finals, [expected] * 4)

    def test_a_json_flow_and_its_python_twin_end_alike(self):
        """Random flows with retries, rules, tolerated failures and pools: commands here, functions there."""
        for seed in range(8):
            flow, script = random_flow(random.Random(seed), 8, conditions=False)
            tasks, made, tries = mf.flow_to_json(flow)["tasks"], {}, collections.Counter()
            for t in tasks:
                for field in ("retry_on", "timeout_s", "jitter"):
                    t.pop(field, None)
                codes = [script[t["id"]][n][1] for n in range(1, 5)]
                t.update(command=f"set -- {' '.join(map(str, codes))}; shift $((MINIFLOW_ATTEMPT - 1)); exit $1",
                         backoff_s=0)

                def function(ctx, name=t["id"], codes=codes, tries=tries):
                    tries[name] += 1
                    if codes[tries[name] - 1]:
                        raise ValueError(name)

                options = {name: t[name] for name in t if name not in ("id", "command", "depends_on")}
                made[t["id"]] = mf.task(name=t["id"], **options)(function)
            for t in tasks:
                [made[up] for up in t.get("depends_on", ())] >> made[t["id"]]
            fields = {"pools": dict(flow.pools), "fail_fast": flow.fail_fast}
            store = mf.MemoryStateStore()
            with contextlib.suppress(mf.FlowFailed):
                mf.Workflow(list(made.values()), max_concurrent_tasks=1, **fields).run_sync("r", store)
            with one(*tasks, **fields) as project:
                run = project.run(max_parallel=1)
            twin = store.get_run("r")
            self.assertEqual((run.status, {name: (t.status, len(t.attempts)) for name, t in run.tasks.items()}),
                             (twin["status"], {name: (t["status"], len(t["attempts"]))
                                               for name, t in twin["tasks"].items()}), seed)

    def test_plain_functions_run_at_once_as_many_as_there_are_cpus_and_block_no_loop(self):
        gate, ticks, most = threading.Barrier(mf.usable_cpus()), [], [0, 0]

        @mf.task
        async def ticking(ctx):
            for _ in range(20):
                await asyncio.sleep(0.001)
                ticks.append(True)

        def plain(ctx):
            most[0] += 1
            most[1] = max(most)
            gate.wait(10)                      # nobody passes before as many as that are here
            wait_for(lambda: len(ticks) == 20, "the loop, which nobody blocks", 10)
            most[0] -= 1

        plains = [mf.task(name=f"p{n}")(plain) for n in range(2 * mf.usable_cpus())]
        run_workflow(ticking, *plains)
        self.assertEqual(most[1], mf.usable_cpus())
        self.assertLess(max(b - a for a, b in zip(ticks, ticks[1:])), 0.09)

    def test_nothing_waits_for_a_level_to_be_complete(self):
        order = []

        async def slow(ctx):
            while "below" not in order:
                await asyncio.sleep(0.001)

        async def fast(ctx):
            pass

        async def below(ctx):
            order.append("below")

        slow, fast, below = map(mf.task, (slow, fast, below))
        fast >> below
        run_workflow(slow, fast, below)
        self.assertEqual(order, ["below"])

    def test_retries_are_steered_by_classes_and_from_within(self):
        tries = collections.Counter()

        def failing(name, exc, **options):
            def function(ctx):
                tries[name] += 1
                raise exc
            return mf.task(name=name, max_retries=2, **options)(function)

        class Mine(OSError):
            pass

        exc = failure(failing("a", ValueError("x")), failing("b", ValueError("x"), retry_on=OSError),
                      failing("c", Mine("x"), retry_on=[OSError]), failing("d", mf.NoRetry("enough")),
                      failing("e", mf.RetryError("again"), retry_on=[OSError]),
                      failing("f", mf.NoRetry(), retry_on=OSError))
        self.assertEqual(tries, {"a": 3, "b": 1, "c": 3, "d": 1, "e": 3, "f": 1})
        tasks = exc.run.tasks
        self.assertEqual([tasks[name].reason for name in "ad"], ["ValueError: x", "miniflow.NoRetry: enough"])
        self.assertEqual(exc.__cause__.args, ("x",))
        self.assertIsInstance(exc.__cause__, ValueError)
        self.assertIn("raise exc\nValueError: x\n", tasks["a"].error)
        self.assertNotIn(f'"{ENGINE}"', tasks["a"].error)
        self.assertEqual([a.status for a in tasks["a"].attempts], ["failed"] * 3)

    def test_a_failure_leaves_no_sibling_running_unseen(self):
        async def main():
            done = []

            @mf.task
            async def bad(ctx):
                raise KeyError("x")

            @mf.task
            async def good(ctx):
                await asyncio.sleep(0.05)
                done.append(True)

            with self.assertRaises(mf.FlowFailed) as caught:
                await mf.Workflow([bad, good]).run(store=mf.MemoryStateStore())
            self.assertEqual((done, ends(caught.exception.run)), ([True], {"bad": "failed", "good": "success"}))
            self.assertEqual(asyncio.all_tasks(), {asyncio.current_task()})
        asyncio.run(main())

    def test_a_timeout_cancels_what_is_async_and_gives_up_a_thread(self):
        heard, gate = [], threading.Event()

        @mf.task(timeout_s=0.05)
        async def heeding(ctx):
            try:
                await asyncio.sleep(60)
            finally:
                heard.append("heeding")

        @mf.task(timeout_s=0.05, grace_s=0.1)
        async def deaf(ctx):
            while not gate.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0.01)

        @mf.task(timeout_s=0.05, max_retries=3)
        def thread(ctx):
            gate.wait(60)

        tasks = failure(heeding, deaf, thread).run.tasks
        gate.set()
        self.assertEqual(heard, ["heeding"])
        self.assertEqual({name: (t.reason, len(t.attempts)) for name, t in tasks.items()}, {
            "heeding": ("timeout after 0.05 s", 1),
            "deaf": ("timeout after 0.05 s; given up: it goes on although it was cancelled", 1),
            "thread": ("timeout after 0.05 s; given up: nothing can stop its thread", 1)})
        exc = failure(heeding)
        self.assertIsInstance(exc.__cause__, TimeoutError)

    def test_cancelling_whoever_awaits_cancels_the_run_and_leaves_nothing(self):
        store, heard, gate = mf.MemoryStateStore(), [], threading.Event()
        self.addCleanup(gate.set)

        async def sleeping(ctx):
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                heard.append("cancelled")
                await asyncio.sleep(0.01)      # time to tidy up
                heard.append("tidy")
                raise

        async def main():
            tasks = [mf.task(sleeping), mf.task(name="thread")(lambda ctx: gate.wait(60)), mf.task(name="next")(len)]
            tasks[0] >> tasks[2]
            running = asyncio.ensure_future(mf.Workflow(tasks).run("r", store))
            await asyncio.sleep(0.05)
            running.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await running
            self.assertEqual(asyncio.all_tasks(), {asyncio.current_task()})
        asyncio.run(main())
        self.assertEqual(heard, ["cancelled", "tidy"])
        run = store.get_run("r")
        self.assertEqual((run["status"], {name: t["status"] for name, t in run["tasks"].items()}), (
            "cancelled", dict.fromkeys(["sleeping", "thread", "next"], "cancelled")))
        self.assertEqual(run["tasks"]["thread"]["reason"], "cancelled; given up: nothing can stop its thread")

    def test_a_cancel_at_any_turn_of_the_loop_leaves_nothing_and_the_run_goes_on_from_there(self):
        async def step(ctx):
            for _ in range(3):
                await asyncio.sleep(0)
            return {"x": 1}

        async def cancelled_after(turns):
            store, tasks = mf.MemoryStateStore(), [mf.task(name=f"t{n}")(step) for n in range(3)]
            tasks[0] >> [tasks[1], tasks[2]]
            running = asyncio.ensure_future(mf.Workflow(tasks).run("r", store))
            for _ in range(turns):
                await asyncio.sleep(0)
            running.cancel()
            ended = (await asyncio.gather(running, return_exceptions=True))[0]
            self.assertEqual(asyncio.all_tasks(), {asyncio.current_task()})
            run = store.get_run("r")
            if run is None or isinstance(ended, dict):
                return "not begun" if run is None else "ended"
            self.assertEqual((type(ended), run["status"]), (asyncio.CancelledError, "cancelled"))
            self.assertEqual(await mf.Workflow(tasks).run("r", store), {"x": 1})
            return "cancelled"

        outcomes = [asyncio.run(cancelled_after(turns)) for turns in range(30)]
        self.assertEqual(list(dict.fromkeys(outcomes)), ["not begun", "cancelled", "ended"])

    def test_a_second_cancel_gives_up_at_once(self):
        async def deaf(ctx):
            while True:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0.01)
                if stop:
                    return

        stop, store = [], mf.MemoryStateStore()

        async def main():
            running = asyncio.ensure_future(mf.Workflow([mf.task(grace_s=60)(deaf)]).run("r", store))
            for _ in range(2):
                await asyncio.sleep(0.05)
                running.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await asyncio.wait_for(running, 10)
            stop.append(True)
        asyncio.run(main())
        self.assertIn("given up", store.get_run("r")["tasks"]["deaf"]["reason"])

    def test_signals_end_run_sync_as_they_end_a_command(self):
        text = """
            import asyncio, sys
            from miniflow import *

            @task
            async def sleeping(ctx):
                print("ready", flush=True)
                try:
                    await asyncio.sleep(60)
                finally:
                    print("tidy", flush=True)

            Workflow([sleeping]).run_sync("r")
            """
        for number, code in ((signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
            process = self.program(text)
            self.assertEqual(process.stdout.readline(), "ready\n")
            process.send_signal(number)
            out, err = process.communicate(timeout=30)
            self.assertEqual((out, process.returncode), ("tidy\n", code), err)
            with open(self.project.at("data/runs/r.json")) as file:
                state = json.load(file)
            self.assertEqual((state["status"], state["tasks"]["sleeping"]["reason"]),
                             ("cancelled", f"cancelled by {number.name}"))

    def test_what_a_task_raises_never_stops_the_loop(self):
        for exc, text in ((SystemExit(3), "SystemExit: 3"), (KeyboardInterrupt(), "KeyboardInterrupt"),
                          (asyncio.CancelledError(), "CancelledError"), (BaseException("b"), "BaseException: b")):
            async def coroutine(ctx, exc=exc):
                raise exc

            def plain(ctx, exc=exc):
                raise exc

            tasks = failure(mf.task(coroutine), mf.task(plain)).run.tasks
            self.assertTrue(tasks["coroutine"].reason.endswith(text), tasks["coroutine"].reason)
            self.assertTrue(tasks["plain"].reason.endswith(text))

    def test_what_cant_be_handed_on_is_named_with_task_and_key(self):
        async def coroutine(ctx):
            pass

        for value, expected in (
                ([1], "bad output: it returned a list; return a dict or None"),
                ({1: 2}, "bad output: it returned the key 1, a int; keys have to be strings"),
                ({"rate": float("nan")}, "bad output: it returned 'rate': nan is no JSON number; return None or"),
                ({"deep": [{"x": float("inf")}]}, "bad output: it returned 'deep': inf is no JSON number")):
            exc = failure(mf.task(name="t")(lambda ctx, value=value: value))
            self.assertTrue(exc.run.tasks["t"].reason.startswith(expected), exc.run.tasks["t"].reason)
            self.assertIsInstance(exc.__cause__, ValueError)
        pending = coroutine({})
        exc = failure(mf.task(name="t")(lambda ctx: pending))
        pending.close()
        self.assertEqual(exc.run.tasks["t"].reason,
                         "bad output: it returned a coroutine; declare the function async")

    def test_what_json_cant_hold_passes_in_memory_and_is_made_again_if_a_resume_needs_it(self):
        made, fail, seen = [], [True], []

        def make(ctx):
            made.append(object())
            return {"handle": made[-1], "pair": (1, 2), "number": 7}

        def use(ctx):
            seen.append((ctx["handle"], ctx["pair"], ctx["number"]))
            if fail:
                raise RuntimeError("not yet")

        with tempfile.TemporaryDirectory() as path, self.assertLogs("miniflow", "WARNING") as logs:
            store = mf.JSONStateStore(path)
            make, other, use, last = mf.task(make), mf.task(name="other")(lambda ctx: {"o": 1}), mf.task(use), mf.task(
                name="last")(lambda ctx: {"own": {1, 2}})
            make >> use >> last
            other >> use
            self.assertEqual(failure(make, other, use, last, store=store, run_id="r").run.tasks["use"].inputs,
                             {"handle": "make", "pair": "make", "number": "make"})
            record = store.get_task("r", "make")
            self.assertEqual((record["output"], record["unsaved"]),
                             ({"number": 7}, {"handle": "object", "pair": "tuple"}))
            fail.clear()
            result = run_workflow(make, other, use, last, store=store, run_id="r")
            self.assertEqual(result, {"handle": made[1], "pair": (1, 2), "number": 7, "o": 1, "own": {1, 2}})
            self.assertEqual(seen, [(made[0], (1, 2), 7), (made[1], (1, 2), 7)])
            run = store.get_run("r")
            self.assertEqual({name: t["attempt"] for name, t in run["tasks"].items()},
                             {"make": 2, "other": 1, "use": 2, "last": 1})
            self.assertEqual(run["ctx"], {"number": 7, "o": 1})
            again = run_workflow(make, other, use, last, store=store, run_id="r")
            self.assertEqual(again, {"number": 7, "o": 1})
        self.assertEqual(len(made), 2)
        self.assertEqual(sum("has succeeded already" in line for line in logs.output), 1)
        self.assertIn("what only memory held is not there any more: handle (object), pair (tuple), own (set)",
                      logs.output[-1])

    def test_a_run_goes_on_where_it_failed_and_refuses_another_context(self):
        ran, fail = [], [True]

        def bad(ctx):
            ran.append("bad")
            if fail:
                raise OSError("no")
            return {"b": ctx["a"] + ctx["start"]}

        store = mf.MemoryStateStore()
        first, second = mf.task(name="first")(lambda ctx: ran.append("first") or {"a": 1}), mf.task(bad)
        first >> second
        failure(first, second, store=store, run_id="r", ctx={"start": 10})
        with self.assertRaises(mf.UsageError) as caught:
            run_workflow(first, second, store=store, run_id="r", ctx={"start": 11})
        self.assertIn("run r exists and keeps its own params, of which start is 10", str(caught.exception))
        fail.clear()
        self.assertEqual(run_workflow(first, second, store=store, run_id="r"), {"start": 10, "a": 1, "b": 11})
        with self.assertLogs("miniflow"):
            same = run_workflow(first, second, store=store, run_id="r", ctx={"start": 10})
        self.assertEqual((same, ran), ({"start": 10, "a": 1, "b": 11}, ["first", "bad", "bad"]))

    def test_a_killed_program_is_started_again_and_repeats_no_success(self):
        text = """
            import sys, time
            from miniflow import *

            def step(n):
                def function(ctx):
                    with open("told", "a") as file: print(n, file=file)
                    time.sleep(0.1)
                    return {f"k{n}": n}
                return task(name=f"s{n}")(function)

            if __name__ == "__main__":
                steps = [step(n) for n in range(12)]
                for a, b in zip(steps, steps[3:]): a >> b
                print(sorted(Workflow(steps).run_sync("r").items()))
            """
        process = self.program(text)
        project = self.project
        wait_for(lambda: os.path.exists(project.at("told")) and len(project.lines("told")) > 4, "some tasks")
        process.kill()
        process.communicate()
        with open(project.at("data/runs/r.jsonl")) as file:
            done = re.findall(r'"attempt_ended".*?"task":"(s\d+)".*"status":"success"', file.read())
        env = {**os.environ, "PYTHONPATH": HERE}
        out = subprocess.run([sys.executable, "program.py"], cwd=project.path, env=env, stdout=subprocess.PIPE).stdout
        self.assertEqual(out.decode(), f"{sorted((f'k{n}', n) for n in range(12))}\n")
        told = collections.Counter(project.lines("told"))
        self.assertGreater(len(done), 0)
        for name in done:
            self.assertEqual(told[name[1:]], 1, told)
        self.assertLessEqual(max(told.values()), 2)

    def test_many_workflows_at_once_within_each_other_and_with_shared_tasks(self):
        shared = mf.task(name="shared")(lambda ctx: {"shared": ctx["n"]})
        store = mf.MemoryStateStore()

        async def inner(ctx):
            tasks = [mf.task(name=f"part_{i}")(lambda ctx, i=i: {f"p{i}": ctx["n"] * i}) for i in range(3)]
            result = await mf.Workflow([shared, *tasks]).run(store=store, initial_ctx={"n": ctx["n"]})
            return {"sum": sum(result[f"p{i}"] for i in range(3))}

        async def main():
            workflow = mf.Workflow([shared, mf.task(inner)])
            return await asyncio.gather(*(workflow.run(store=store, initial_ctx={"n": n}) for n in range(20)))

        self.assertEqual(asyncio.run(main()), [{"n": n, "shared": n, "sum": 3 * n} for n in range(20)])
        self.assertEqual(len(store.list_runs("success")), 40)

    def test_of_two_at_once_with_the_same_id_one_is_told_who_the_other_is(self):
        async def main(store):
            @mf.task
            async def sleeping(ctx):
                await asyncio.sleep(0.1)
            workflow = mf.Workflow([sleeping])
            return await asyncio.gather(workflow.run("r", store), workflow.run("r", store), return_exceptions=True)

        with tempfile.TemporaryDirectory() as path:
            for store in (mf.MemoryStateStore(), mf.JSONStateStore(path)):
                results = asyncio.run(main(store))
                self.assertEqual([type(result) for result in results], [dict, mf.RunLocked])
                self.assertIn("run r is being run by", str(results[1]))

    def test_run_sync_where_a_loop_runs_says_what_to_do(self):
        async def main():
            with self.assertRaises(mf.UsageError) as caught:
                run_workflow(mf.task(name="a")(len))
            self.assertIn("use: await workflow.run", str(caught.exception))
        asyncio.run(main())

    def test_run_sync_works_in_a_thread(self):
        results = []
        thread = threading.Thread(target=lambda: results.append(run_workflow(mf.task(name="a")(lambda ctx: {"a": 1}))))
        thread.start()
        thread.join(30)
        self.assertEqual(results, [{"a": 1}])

    def test_an_initial_context_that_cant_be_recorded_is_refused(self):
        for ctx, expected in (({"c": object()}, "initial_ctx['c']: JSON can't hold a object as it is; make such a"),
                              ({1: 2}, "initial_ctx[1]: keys have to be strings"), ([], "initial_ctx: expected a dict"),
                              ({"n": float("nan")}, "initial_ctx['n']: nan is no JSON number")):
            with self.assertRaises(mf.UsageError) as caught:
                run_workflow(mf.task(name="a")(len), ctx=ctx)
            self.assertIn(expected, str(caught.exception))

    def test_a_large_value_is_in_the_record_where_it_was_made_and_in_the_context(self):
        with tempfile.TemporaryDirectory() as path:
            source = mf.task(name="source")(lambda ctx: {"big": "x" * 100000})
            readers = [mf.task(name=f"r{n}")(lambda ctx: {"n": len(ctx["big"])}) for n in range(300)]
            source >> readers
            run_workflow(source, *readers, store=mf.JSONStateStore(path), run_id="r")
            self.assertLess(os.path.getsize(os.path.join(path, "runs", "r.json")), 200000 + 300 * 800)

    def test_the_cost_of_a_task_does_not_grow_with_the_workflow(self):
        def calls_per_task(size, shape):
            tasks = [mf.task(name=f"t{n}")(answer) for n in range(size)]
            if shape == "chain":
                for a, b in zip(tasks, tasks[1:]):
                    a >> b
            elif shape == "layers":
                for n in range(20, size, 20):
                    tasks[n - 20:n] >> tasks[n]
                    for other in tasks[n + 1:n + 20]:
                        tasks[n - 20:n] >> other
            workflow, calls = mf.Workflow(tasks), itertools.count()
            sys.setprofile(lambda frame, kind, arg: kind == "call" and next(calls))
            try:
                workflow.run_sync(store=mf.MemoryStateStore())
            finally:
                sys.setprofile(None)
            return next(calls) / size

        async def answer(ctx):
            return {"n": 1}

        for shape in ("fan", "chain", "layers"):
            few, many = calls_per_task(200, shape), calls_per_task(2000, shape)
            self.assertLess(many, few * 1.15, shape)

    PROCESS = """
        import os, sys, time
        from miniflow import *

        @task(process=True)
        def where(ctx):
            print("in", os.getpid(), ctx["n"], sys.stdin.read())
            return {"pid": os.getpid(), "twice": ctx["n"] * 2}

        @task(process=True, max_retries=1)
        def bad(ctx):
            print("to the log")
            raise LookupError("no such thing")

        @task(process=True, timeout_s=1.5, grace_s=0.2)
        def slow(ctx):
            print(os.getpid(), file=open("pid", "w"))
            import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(60)

        @task(process=True)
        def gone(ctx): os._exit(0)

        @task(process=True)
        def killed(ctx): os.kill(os.getpid(), 9)

        @task(process=True)
        def leaving(ctx): sys.exit("bye")

        @task(process=True)
        def unsendable(ctx): return {"ok": 1, "set": {1}}

        @task
        def maker(ctx): return {"lock": open}

        @task(process=True)
        def taker(ctx): pass

        @task
        def after(ctx): return {"main": os.getpid()}

        if __name__ == "__main__":
            where >> after
            maker >> taker
            tasks = [where, after]
            if len(sys.argv) > 1:
                tasks += [bad, slow, gone, killed, leaving, unsendable, maker, taker]
            print(sorted(Workflow(tasks).run_sync("r", initial_ctx={"n": 4})))
        """

    def test_a_function_with_process_true_runs_in_a_process_of_its_own(self):
        process = self.program(self.PROCESS)
        out, err = process.communicate()
        self.assertEqual((out, err), ("['main', 'n', 'pid', 'twice']\n", ""))
        state = mf.JSONStateStore(self.project.at("data")).get_run("r")
        pid = state["ctx"]["pid"]
        self.assertEqual((state["ctx"]["main"], state["ctx"]["twice"]), (process.pid, 8))
        self.assertNotEqual(pid, process.pid)
        with open(self.project.at("data", state["tasks"]["where"]["log"])) as file:
            self.assertEqual(file.read(), f"in {pid} 4 \n")
        self.assertEqual(state["tasks"]["where"]["inputs"], {})
        self.assertFalse(os.path.exists(self.project.at("data/tmp/r")))

    def test_each_end_of_a_process_wakes_the_run(self):
        """Also where the descriptor of the next process has the number of the last one, and nothing else happens."""
        process = self.program("""
            import time
            from miniflow import *

            @task(process=True)
            def a(ctx): return {"a": 1}
            @task(process=True)
            def b(ctx): return {"b": ctx["a"] + 1}
            @task(process=True, max_retries=2)
            def c(ctx): raise ValueError("c")

            if __name__ == "__main__":
                a >> b >> c
                try:
                    Workflow([a, b, c]).run_sync(store=MemoryStateStore(), initial_ctx={"large": "x" * 300000})
                except FlowFailed as exc:
                    print(len(exc.run.tasks["c"].attempts), exc.__cause__)
            """)
        out, err = process.communicate(timeout=60)
        self.assertEqual(err, "")
        self.assertTrue(out.startswith("3 Traceback"), out)

    def test_what_was_given_up_and_still_runs_is_not_run_beside(self):
        gate, ran, store = threading.Event(), [], mf.MemoryStateStore()

        @mf.task(timeout_s=0.05)
        def slow(ctx):
            ran.append(True)
            if len(ran) == 1:
                gate.wait(60)

        exc = failure(slow, store=store, run_id="r")
        self.assertIsInstance(exc.__cause__, TimeoutError)
        with self.assertRaises(mf.RunLocked) as caught:
            run_workflow(slow, store=store, run_id="r")
        self.assertIn("task slow was given up and still runs in this program", str(caught.exception))
        run_workflow(slow, store=store, run_id="another")
        gate.set()
        wait_for(lambda: all(thread.name[:9] != "miniflow-" for thread in threading.enumerate()),
                 "the end of the thread")
        run_workflow(slow, store=store, run_id="r")
        self.assertEqual(len(ran), 3)

    def test_a_thread_whose_call_ends_takes_the_next_turn(self):
        takers, taken = collections.Counter(), mf.Turns.take

        def take(turns):
            takers[threading.current_thread() is threading.main_thread()] += 1
            taken(turns)

        def work(ctx):
            self.assertIsNot(threading.current_thread(), threading.main_thread())
            return {str(len(ctx)): 1}

        tasks = [mf.task(name=f"t{n}")(work) for n in range(200)]
        mf.Turns.take = take
        self.addCleanup(setattr, mf.Turns, "take", taken)
        run_workflow(*tasks)
        self.assertGreater(takers[False], 5 * takers[True], takers)

    def short_until(self, then, count=2, others=(), **options):
        """Return a workflow in which 20 calls of a function were short when `count` more are submitted at once.

        `then` makes those, of which the first is for the thread that has submitted them all; the last one has
        options.
        """
        self.have_cpus(count)
        self.let_be_short(0.02)
        calls = itertools.count()

        def work(ctx):
            number = next(calls) - 20
            return then(number) if number >= 0 else None

        before = [mf.task(name=f"before{n}")(work) for n in range(20)]
        after = [mf.task(name=f"after{n}", **(options if n == count - 1 else {}))(work) for n in range(count)]
        below = mf.task(name="below")(lambda ctx: then("below"))
        for one, other in zip(before, [*before[1:], after]):
            one >> other
        after[0] >> below
        return mf.Workflow([*before, *after, below, *others])

    def let_be_short(self, seconds):
        """Let calls of so many seconds be short: a machine may have other things to do."""
        self.addCleanup(setattr, mf, "_SHORT_S", mf._SHORT_S)
        mf._SHORT_S = seconds

    def without_a_lookout(self):
        """Let nobody see that a call waits."""
        self.addCleanup(setattr, mf, "_LOOKOUT_S", mf._LOOKOUT_S)
        mf._LOOKOUT_S = 60

    def have_cpus(self, count):
        """Let so many plain functions run at once."""
        self.addCleanup(setattr, mf, "usable_cpus", mf.usable_cpus)
        mf.usable_cpus = lambda: count

    def counted(self, owner, name):
        """Return a list that grows with each call of a method."""
        calls, method = [], getattr(owner, name)
        self.addCleanup(setattr, owner, name, method)
        setattr(owner, name, lambda *args: (calls.append(1), method(*args))[1])
        return calls

    def test_calls_that_are_short_are_made_by_one_thread_and_share_turns(self):
        turns, orders, made = self.counted(mf.Turns, "take"), self.counted(mf.Threads, "_tell"), []
        self.have_cpus(8)
        run_workflow(*[mf.task(name=f"t{n}")(lambda ctx, n=n: made.append(n)) for n in range(2000)])
        self.assertEqual(len(made), 2000)
        self.assertLess(len(turns), 1000)      # an eighth of the tasks, once it is known that they are short
        self.assertLess(len(orders), 500)

    def test_a_call_that_was_short_until_now_keeps_no_other_waiting(self):
        gate, passed = threading.Barrier(2), []                     # nobody passes before both are here

        def then(who):
            if who != "below":
                passed.append(gate.wait(10))

        self.short_until(then).run_sync(store=mf.MemoryStateStore())
        self.assertEqual(sorted(passed), [0, 1])

    def test_others_are_called_upon_when_a_call_was_not_short_after_all(self):
        self.without_a_lookout()
        gate, passed = threading.Barrier(3), []

        def then(who):
            if who == 0:
                time.sleep(10 * mf._SHORT_S)
            elif who != "below":
                passed.append(gate.wait(10))

        self.short_until(then, 4).run_sync(store=mf.MemoryStateStore())
        self.assertEqual(sorted(passed), [0, 1, 2])

    def test_the_end_of_a_short_call_is_taken_in_though_the_next_one_is_long(self):
        async def nothing(ctx):
            pass

        self.addCleanup(setattr, mf.Alarm, "set", mf.Alarm.set)
        mf.Alarm.set = lambda self, seconds: None                   # what the clock wakes comes in time by luck
        for others in ((), (mf.task(nothing),)):
            gate, passed = threading.Event(), []

            def then(who, gate=gate, passed=passed):
                if who == "below":
                    gate.set()
                elif who == 1:
                    passed.append(gate.wait(10))

            self.short_until(then, others=others).run_sync(store=mf.MemoryStateStore())
            self.assertEqual(passed, [True])

    def test_a_call_whose_time_is_short_waits_for_no_other(self):
        self.without_a_lookout()
        gate = threading.Event()
        self.addCleanup(gate.set)
        flow = self.short_until(lambda who: gate.wait(10) and None if who == 0 else gate.set(), timeout_s=0.5)
        flow.run_sync(store=mf.MemoryStateStore())

    def test_functions_are_told_apart_by_their_code_also_within_others(self):
        def logged(function):
            @functools.wraps(function)
            def call(*args):
                return function(*args)
            return call

        class Odd:
            def __getattr__(self, name):
                raise LookupError(name)

        def made(value):
            return lambda ctx: value

        code = mf._code_id
        self.assertNotEqual(code(logged(max)), code(logged(min)))
        self.assertEqual(code(logged(logged(made(1)))), code(made(2)))
        self.assertEqual(code(functools.partial(made, 1)), code(made))
        self.assertEqual(code(self.id), code(self.id))
        odd = Odd()
        self.assertEqual(code(odd), id(odd))

    def pool(self, *functions, go_on=lambda: False):
        """Return threads, a call for each function, and where they come to when they have ended."""
        ended = collections.deque()
        calls = [mf.Call(f"call{n}", lambda ctx, function=function: function() and None, mf.ContextDict({}, {}), True)
                 for n, function in enumerate(functions)]
        threads = mf.Threads(ended, go_on, lambda: None)
        self.addCleanup(threads.close)
        return threads, calls, ended

    def submit_from_a_turn(self, threads, *calls):
        """Submit calls as a thread does that goes on with the run."""
        threads.goes_on = True
        for call in calls:
            threads.submit(call)
        threads.goes_on = False

    def test_what_waits_for_any_thread_keeps_no_end_from_being_taken_in(self):
        self.let_be_short(60)
        submitted, taken_in, passed = threading.Event(), threading.Event(), []
        threads, calls, ended = self.pool(lambda: submitted.wait(10), lambda: passed.append(taken_in.wait(10)),
                                          go_on=lambda: taken_in.set() or False)
        threads._has_lookout = True            # so that ends may be held
        self.submit_from_a_turn(threads, calls[0])
        threads._tell(threads._HELP)
        threads._waiting.append(calls[1])      # as long as its own thread has not come
        submitted.set()
        wait_for(lambda: len(ended) == 2, "both calls")
        self.assertEqual(passed, [True])

    def test_a_call_that_a_thread_has_kept_is_made_though_that_thread_takes_turn_after_turn(self):
        made, passed = threading.Event(), []

        def go_on():
            if not passed:
                passed.append(None)
                self.submit_from_a_turn(threads, calls[1])
                passed[0] = made.wait(10)
            return True

        threads, calls, ended = self.pool(lambda: None, made.set, go_on=go_on)
        threads.submit(calls[0])
        wait_for(lambda: len(ended) == 2 and passed[0] is not None, "both calls")
        self.assertEqual(passed, [True])

    def test_a_thread_that_could_not_be_started_is_not_counted_upon(self):
        gate, both, passed = threading.Event(), threading.Barrier(2), []
        threads, calls, ended = self.pool(lambda: gate.wait(10), *[lambda: passed.append(both.wait(10))] * 2)
        threads.submit(calls[0])
        start = threading.Thread.start
        self.addCleanup(setattr, threading.Thread, "start", start)

        def refuse(thread):
            raise RuntimeError("can't start new thread")

        threading.Thread.start = refuse
        self.assertFalse(threads._try_tell(threads._HELP))
        threading.Thread.start = start
        gate.set()
        wait_for(lambda: threads._idle, "the first call")
        for call in calls[1:]:
            threads.submit(call)
        wait_for(lambda: len(ended) == 3, "the two others")
        self.assertEqual(sorted(passed), [0, 1])

    def test_the_loop_is_free_for_others_though_calls_end_all_the_time(self):
        append, order = mf.MemoryJournal.append, []

        def slow(*args):
            time.sleep(0.003)                  # while others end
            append(*args)

        self.addCleanup(setattr, mf.MemoryJournal, "append", append)
        mf.MemoryJournal.append = slow
        self.have_cpus(8)

        async def early(ctx):
            while len(order) < 20:
                await asyncio.sleep(0)
            order.append("early")

        run_workflow(mf.task(early), *[mf.task(name=f"t{n}")(lambda ctx: order.append(time.sleep(0.001)))
                                       for n in range(400)])
        self.assertLess(order.index("early"), 200)

    def test_a_call_that_outlives_a_failed_engine_is_not_run_beside(self):
        gate, began, append, store = threading.Event(), [], mf.MemoryJournal.append, mf.MemoryStateStore()

        def fail_once_begun(*args):
            if began:
                raise mf.StateError("no more")
            append(*args)

        self.addCleanup(setattr, mf.MemoryJournal, "append", append)
        mf.MemoryJournal.append = fail_once_begun
        long = mf.task(name="long")(lambda ctx: began.append(True) or gate.wait(10) and None)
        short = mf.task(name="short")(lambda ctx: wait_for(lambda: began, "the long one") and None)
        waits = mf.task(name="waits")(lambda ctx: None)
        self.have_cpus(2)
        with self.assertRaises(mf.StateError):
            run_workflow(long, short, waits, store=store, run_id="r")
        mf.MemoryJournal.append = append
        with self.assertRaises(mf.RunLocked):
            run_workflow(long, short, waits, store=store, run_id="r")
        gate.set()
        wait_for(lambda: not any(thread.name[:9] == "miniflow-" for thread in threading.enumerate()), "its end")
        run_workflow(long, short, waits, store=store, run_id="r")
        self.assertEqual(len(began), 2)

    def test_what_was_given_up_and_has_ended_is_forgotten_by_two_at_once(self):
        strays = mf.Strays()

        class Ended:
            future = None

            @property
            def is_over(self):
                strays._calls.clear()          # by another thread
                return True

        run = mf.Run(mf.make_plan(make(task("a"))), "r")
        strays.add("here", run, mf.Call("a", len, mf.ContextDict({}, {}), True))
        strays._calls["here", "r", "a"] = Ended()
        strays.check("here", run)
        self.assertEqual(strays._calls, {})

    def test_threads_that_were_told_to_end_are_told_nothing_more(self):
        gate = threading.Event()
        threads, calls, ended = self.pool(lambda: gate.wait(10))
        threads.submit(calls[0])
        threads.close()
        threads._tell(threads._HELP)           # as a lookout might that is just about to
        gate.set()
        wait_for(lambda: all(thread.name[:9] != "miniflow-" for thread in threading.enumerate()),
                 "the end of all threads")

    def cancel_once_begun(self, gate, began, store, error):
        """Cancel a run of two calls that wait at a gate as soon as one is there; let go of its threads then."""
        flow = self.short_until(lambda who: began.append(who) or gate.wait(60) and None)

        async def main():
            running = asyncio.ensure_future(flow.run("r", store))
            while not began:
                await asyncio.sleep(0.01)
            running.cancel()
            with self.assertRaises(error):
                await running

        asyncio.run(main())
        gate.set()
        wait_for(lambda: all(thread.name[:9] != "miniflow-" for thread in threading.enumerate()),
                 "the end of the threads")

    def test_a_call_that_no_thread_has_begun_with_is_never_made_once_the_run_is_cancelled(self):
        self.without_a_lookout()
        gate, began, store = threading.Event(), [], mf.MemoryStateStore()

        self.cancel_once_begun(gate, began, store, asyncio.CancelledError)
        self.assertEqual(began, [0])
        tasks = store.get_run("r")["tasks"]
        self.assertEqual({name: tasks[name]["reason"] for name in ("after0", "after1")}, {
            "after0": "cancelled; given up: nothing can stop its thread", "after1": "cancelled"})

    def test_a_call_that_no_thread_has_begun_with_is_never_made_once_the_engine_has_failed(self):
        self.without_a_lookout()
        gate, began, append = threading.Event(), [], mf.MemoryJournal.append

        def fail_once_begun(*args):
            append(*args)
            if began:
                raise mf.StateError("no more")

        self.addCleanup(setattr, mf.MemoryJournal, "append", append)
        mf.MemoryJournal.append = fail_once_begun

        self.cancel_once_begun(gate, began, mf.MemoryStateStore(), mf.StateError)
        self.assertEqual(began, [0])

    def test_when_the_engine_fails_what_waits_for_a_thread_is_not_called(self):
        self.have_cpus(16)
        append, turns, late, failed = mf.MemoryJournal.append, itertools.count(), [], []

        def fail_once(*args):
            if next(turns) == 20:
                failed.append(True)
                raise mf.StateError("no more")
            append(*args)

        self.addCleanup(setattr, mf.MemoryJournal, "append", append)
        mf.MemoryJournal.append = fail_once
        with self.assertRaises(mf.StateError):
            run_workflow(*[mf.task(name=f"t{n}")(lambda ctx, n=n: late.extend(failed)) for n in range(300)])
        wait_for(lambda: all(thread.name[:9] != "miniflow-" for thread in threading.enumerate()),
                 "the end of the threads")
        self.assertLess(len(late), 5)          # one may just be about to begin

    def test_the_loop_keeps_time_for_what_a_thread_has_started(self):
        gate, began = threading.Event(), time.monotonic()
        self.addCleanup(gate.set)
        first = mf.task(name="first")(lambda ctx: None)
        slow = mf.task(name="slow", timeout_s=0.2)(lambda ctx: gate.wait(60) and None)
        first >> slow
        exc = failure(first, slow)
        self.assertIn("timeout after 0.2 s", exc.run.tasks["slow"].reason)
        self.assertLess(time.monotonic() - began, 30)

        tries = []

        @mf.task(max_retries=1, backoff_s=0.1)
        def again(ctx):
            tries.append(time.monotonic())
            if len(tries) == 1:
                raise ValueError

        first = mf.task(name="first")(lambda ctx: None)
        first >> again
        run_workflow(first, again)
        self.assertGreaterEqual(tries[1] - tries[0], 0.1)

    def test_what_fails_in_the_turn_of_a_thread_ends_the_run(self):
        with Project() as project:
            store = mf.JSONStateStore(project.at("data"))
            lock = project.at("data/runs/r.lock")
            first = mf.task(name="first")(lambda ctx: (os.unlink(lock), time.sleep(0.1)) and None)
            ran = []
            then = mf.task(name="then")(lambda ctx: ran.append(True))
            first >> then
            with self.assertRaises(mf.StateError) as caught:
                run_workflow(first, then, store=store, run_id="r")
            self.assertIn("another engine may have taken the run over", str(caught.exception))
            self.assertEqual(ran, [])

    def test_arguments_of_the_wrong_kind_are_named(self):
        async def main():
            with one(task("a")) as project:
                project.write("flows/py.py", "from miniflow import *\nworkflow = Workflow([task(name='a')(len)])")
                with self.assertRaises(mf.UsageError) as caught:
                    project.run("py", run_id="r")
                self.assertIn("MiniFlow.run can't wait where an event loop runs already", str(caught.exception))
                self.assertFalse(os.path.exists(project.at("miniflow_output")))

        sys.modules.setdefault("miniflow", mf)
        asyncio.run(main())
        workflow = mf.Workflow([mf.task(name="a")(len)])
        for arguments, expected in (({"run_id": 5}, "5 is no run id"), ({"run_id": "a/b"}, '"a/b" is no run id'),
                                    ({"store": "data"}, "store: expected a JSONStateStore or a MemoryStateStore, got")):
            with self.assertRaises(mf.UsageError) as caught:
                workflow.run_sync(**{"store": mf.MemoryStateStore(), **arguments})
            self.assertIn(expected, str(caught.exception))
        for tasks in ([len], "ab", {"a": len}, [[]]):
            with self.assertRaises(TypeError) as caught:
                mf.Workflow(tasks)
            self.assertIn("expected a task or a list of tasks", str(caught.exception))
        for options in ({"pools": ["x"]}, {"tags": "abc"}):
            with self.assertRaises(mf.FlowError):
                mf.Workflow(workflow.tasks, **options)

    def test_odd_exceptions_and_values_are_a_failure_of_their_task_alone(self):
        class Mute(Exception):
            def __str__(self):
                raise RuntimeError("no text")

        class Proxy:
            def __getattr__(self, name):
                raise KeyError(name)

        class Rude(dict):
            def items(self):
                raise OSError("no items")

        class Key:
            def __hash__(self):
                return 1

            def __repr__(self):
                raise OSError("no repr")

        def returning(value):
            return lambda ctx: value

        def raising(exc):
            def function(ctx):
                raise exc
            return function

        async def closing(ctx):
            raise GeneratorExit

        odd = [raising(Mute()), raising(SyntaxError("m", ("f", 3, "text", 5))), returning(Proxy()),
               returning(Rude(a=1)), returning({Key(): 1}), closing]
        tasks = [mf.task(name=f"odd{n}")(function) for n, function in enumerate(odd)]
        after = mf.task(name="after")(len)
        tasks[-1] >> after
        exc = failure(*tasks, mf.task(name="good")(lambda ctx: {"g": 1}), after)
        self.assertEqual(ends(exc.run), {**{f"odd{n}": "failed" for n in range(len(odd))}, "good": "success",
                                         "after": "upstream_failed"})
        self.assertEqual(exc.run.tasks["odd5"].reason, "GeneratorExit")

    def test_a_process_never_calls_another_function_than_was_meant(self):
        process = self.program("""
            import functools
            from miniflow import *

            tasks = []
            for i in range(3):
                @task(name=f"t{i}", process=True)
                def work(ctx, i=i): return {f"i{i}": i}
                tasks.append(work)

            def plain(ctx): return {"decorated": False}
            @functools.wraps(plain)
            def wrapper(ctx): return {"decorated": True}
            tasks.append(task(name="wrapped", process=True)(wrapper))

            if __name__ == "__main__":
                try:
                    Workflow(tasks).run_sync(store=MemoryStateStore())
                except FlowFailed as exc:
                    print({name: t.reason and t.reason[:44] for name, t in exc.run.tasks.items()})
            """)
        out, err = process.communicate(timeout=60)
        self.assertEqual((ast.literal_eval(out), err), ({
            "t0": "cannot start: work in module __main__ is not", "t1": "cannot start: work in module __main__ is not",
            "t2": None, "wrapped": "cannot start: plain in module __main__ is no"}, ""))

    def test_what_a_store_gives_is_a_copy(self):
        store = mf.MemoryStateStore()
        run_workflow(mf.task(name="a")(lambda ctx: {"s": [1]}), store=store, run_id="r")
        store.get_run("r")["ctx"]["s"].append(2)
        self.assertEqual(store.get_run("r")["ctx"], {"s": [1]})

    def test_a_signal_in_the_last_turn_is_heard_as_well(self):
        process = self.program("""
            import time
            from miniflow import *

            @task
            async def blocking(ctx):
                print("ready", flush=True)
                time.sleep(1)

            for _ in range(3):
                Workflow([blocking]).run_sync(store=MemoryStateStore())
            """)
        self.assertEqual(process.stdout.readline(), "ready\n")
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
        self.assertEqual((out, process.returncode), ("", -signal.SIGINT))

    def test_a_store_in_memory_is_used_by_many_threads_at_once(self):
        store, results = mf.MemoryStateStore(), []
        threads = [threading.Thread(target=lambda n=n: results.append(
            run_workflow(mf.task(name="a")(lambda ctx: {"n": ctx["k"]}), store=store, ctx={"k": n}))) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        self.assertEqual(sorted(result["n"] for result in results), list(range(8)))
        self.assertFalse(store.store.has_folder)

    def test_what_goes_wrong_in_a_process_of_a_function_is_told(self):
        process = self.program(self.PROCESS, "all")
        _, err = process.communicate()
        self.assertEqual(process.returncode, 1)
        self.assertIn("miniflow.FlowFailed: run r: failed", err)
        store = mf.JSONStateStore(self.project.at("data"))
        tasks = store.get_run("r")["tasks"]
        self.assertEqual({name: (t["reason"], t["attempt"]) for name, t in tasks.items() if t["status"] == "failed"}, {
            "bad": ("LookupError: no such thing", 2), "slow": ("timeout after 1.5 s", 1),
            "gone": ("it ended without an answer", 1), "killed": ("killed by signal 9", 1),
            "leaving": ("SystemExit: bye", 1),
            "unsendable": ("bad output: it returned 'set', a set, which can't be sent from one process to another; "
                           "return what JSON can hold, or leave out process=True", 1),
            "taker": ("cannot start: 'lock' of its context is a builtin_function_or_method, which can't be sent to "
                      "another process; hand on what JSON can hold, or leave out process=True", 1)})
        self.assertFalse(alive(int(self.project.read("pid"))))
        self.assertRegex(tasks["bad"]["error"], r'File ".*program.py", line \d+, in bad')
        with open(self.project.at("data", tasks["bad"]["log"])) as file:
            text = file.read()
        self.assertIn("to the log\n", text)
        self.assertIn("LookupError: no such thing", text)

    def test_a_program_without_a_guard_does_not_start_itself_again(self):
        text = self.PROCESS.replace('if __name__ == "__main__":', "if True:")
        process = self.program(text)
        _, err = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 1)
        tasks = mf.JSONStateStore(self.project.at("data")).get_run("r")["tasks"]
        self.assertIn('put what starts a workflow under if __name__ == "__main__":', tasks["where"]["reason"])

    def test_a_function_from_a_session_without_a_file_cant_be_sent(self):
        code = textwrap.dedent("""
            from miniflow import *
            def f(ctx): pass
            Workflow([task(process=True)(f)]).run_sync(store=MemoryStateStore())
            """)
        done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": HERE}, text=True,
                              stderr=subprocess.PIPE)
        self.assertIn("its function is not in a file, so another process can't import it", done.stderr)

    def test_a_vendored_copy_works_with_processes_too(self):
        with one(task("unused")) as project:
            project.write("pkg/__init__.py", "")
            project.write("pkg/_vendor/__init__.py", "")
            shutil.copy(ENGINE, project.at("pkg", "_vendor", "miniflow.py"))
            project.write("pkg/job.py", textwrap.dedent("""
                import os
                from pkg._vendor.miniflow import task, Workflow
                @task(process=True)
                def part(ctx): return {"other": os.getpid() != ctx["pid"]}
                """))
            project.write("program.py", textwrap.dedent("""
                import os
                from pkg.job import part
                from pkg._vendor.miniflow import Workflow, MemoryStateStore
                print(Workflow([part]).run_sync(store=MemoryStateStore(), initial_ctx={"pid": os.getpid()})["other"])
                """))
            env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            done = subprocess.run([sys.executable, "program.py"], cwd=project.path, env=env, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            self.assertEqual((done.stdout, done.stderr), ("True\n", ""))

    def test_plain_values_are_copied_and_all_else_is_told_apart(self):
        for value in (None, True, 1, 1.5, "x", "\ud800", [1, [2]], {"a": {"b": []}}, 10**500):
            self.assertEqual(mf.json_copy(value), value)
            self.assertEqual(json.loads(json.dumps(value)), value)
        nested = []
        nested.append(nested)
        for value in ((1,), {1: 2}, {1}, b"x", object(), collections.OrderedDict(), 10**5000, nested, [{"a": (1,)}],
                      type("Str", (str,), {})("x"), signal.SIGINT):
            with self.assertRaises(TypeError):
                mf.json_copy(value)

    def test_every_way_to_read_a_context_is_noted(self):
        ways = {"": lambda c: None, "a": lambda c: c["a"], "b": lambda c: c.get("b"), "c": lambda c: c.pop("c"),
                "d": lambda c: "d" in c or c.setdefault("d"), "abcd": lambda c: {**c}}
        for keys, way in ways.items():
            ctx = mf.ContextDict(dict.fromkeys("abcd", 1), "abcd")
            way(ctx)
            self.assertEqual(ctx.read, set(keys))
        for way in (dict, list, lambda c: c.items(), lambda c: c.values(), json.dumps, lambda c: c.copy(),
                    lambda c: c.popitem(), lambda c: (lambda **options: options)(**c)):
            ctx = mf.ContextDict(dict.fromkeys("abcd", 1), "abcd")
            way(ctx)
            self.assertEqual(ctx.read, set("abcd"), way)


class T35Runner(unittest.TestCase):

    def test_a_failed_run_is_resumed_and_repeats_nothing_that_succeeded(self):
        with one(task("a", command="echo a >> ran"), task("b", "a", command="echo b >> ran; test -e ready"),
                 task("c", "b", command="echo c >> ran")) as project:
            run = project.run(run_id="r")
            self.assertEqual(run.status, "failed")
            self.assertEqual(project.main("resume", "r")[0], 1)
            project.write("ready", "")
            code, out, _ = project.main("resume", "last")
            self.assertEqual((code, out), (0, "r\n"))
            self.assertEqual(project.lines("ran"), ["a", "b", "b", "b", "c"])
            state = project.state("r")
            self.assertEqual([a["status"] for a in state["tasks"]["b"]["attempts"]],
                             ["failed", "failed", "success"])
            self.assertEqual(state["tasks"]["b"]["log"], "logs/r/b.3.log")

    def test_a_run_that_succeeded_is_returned_as_it_stands_with_a_note(self):
        with one(task("a", command="echo a >> ran")) as project:
            project.run(run_id="r")
            before = project.read("miniflow_output/runs/r.json")
            for args in (("resume", "r"), ("run", "f", "--run-id", "r")):
                code, _, err = project.main(*args)
                self.assertEqual((code, err), (0, "run r has succeeded already; nothing is done\n"))
            self.assertEqual(project.lines("ran"), ["a"])
            self.assertEqual(project.read("miniflow_output/runs/r.json"), before)
            self.assertEqual(os.listdir(project.at("miniflow_output/runs")), ["r.json"])

    def test_a_run_that_succeeded_needs_its_flow_no_more(self):
        with one(task("a")) as project:
            project.main("run", "f", "--run-id", "r")
            project.write("flows/f.json", "broken")
            self.assertEqual(project.main("resume", "r")[0], 0)
            project.write("flows/f.json", json.dumps(flow_json(task("a", command="exit 1"))))
            project.main("run", "f", "--run-id", "q")
            os.unlink(project.at("flows/f.json"))
            os.symlink("nowhere", project.at("flows/f.json"))
            code, _, err = project.main("resume", "q")
            self.assertEqual(code, 1)
            self.assertIn("is gone; going on by the definition that the run recorded", err)
            self.assertEqual(project.main("run", project.at("flows/f.json"), "--run-id", "last")[0], 3)

    def test_a_run_cant_be_called_last(self):
        with one(task("a")) as project:
            code, _, err = project.main("run", "f", "--run-id", "last")
            self.assertEqual((code, err), (2, "run id last stands for the newest run; give another\n"))

    def test_a_run_goes_on_by_the_file_that_it_was_last_given(self):
        with one(task("a", command="exit 1")) as project:
            project.main("run", "f", "--run-id", "r")
            os.mkdir(project.at("f2"))
            project.write("f2/f.json", json.dumps(flow_json(task("a", command="test -e ready"), task("b"))))
            self.assertEqual(project.main("-f", "f2", "run", "f", "--run-id", "r")[0], 1)
            project.write("ready", "")
            code, _, err = project.main("resume", "r")
            self.assertEqual((code, "removed" in err), (0, False))

    def test_resume_keeps_the_params_and_refuses_others(self):
        with one(task("a", command="echo $MINIFLOW_PARAM_P >> ran; test -e ready")) as project:
            project.main("run", "f", "--run-id", "r", "--param", "p=first")
            code, _, err = project.main("run", "f", "--run-id", "r", "--param", "p=second")
            self.assertEqual(code, 2)
            self.assertIn("run r exists and keeps its own params", err)
            project.write("ready", "")
            self.assertEqual(project.main("resume", "r")[0], 0)
            self.assertEqual(project.lines("ran"), ["first", "first"])

    def test_a_changed_flow_is_named_and_its_changed_tasks_run_again(self):
        with one(task("a", command="echo a >> ran"), task("b", "a", command="echo b >> ran"),
                 task("c", command="exit 1")) as project:
            project.run(run_id="r")
            project.write("flows/f.json", json.dumps(flow_json(
                task("a", command="echo A >> ran"), task("b", "a", command="echo b >> ran"))))
            code, _, err = project.main("resume", "r")
            self.assertEqual(code, 0)
            self.assertIn("task a was changed since run r began; it runs again, and so does its downstream",
                          err)
            self.assertIn("task c was removed since run r began", err)
            self.assertEqual(project.lines("ran"), ["a", "b", "A", "b"])

    def test_a_killed_engine_leaves_an_interrupted_run_that_can_be_resumed(self):
        with one(task("a", command="echo a >> ran"),
                 task("b", "a", command="echo b >> ran; test -e ready || sleep 60"),
                 task("c", "b")) as project:
            process = project.start("run", "f", "--run-id", "r")
            journal = "miniflow_output/runs/r.jsonl"
            wait_for(lambda: os.path.exists(project.at("ran")) and "b" in project.lines("ran")
                     and re.search('attempt_spawned.*"task":"b"', project.read(journal)), "task b")
            process.kill()
            process.communicate()
            state = json.loads(project.main("show", "r", "--json")[1])
            self.assertEqual(state["status"], "interrupted")
            pid = state["tasks"]["b"]["attempts"][0]["pid"]
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            wait_for(lambda: not alive(pid), "the end of the task")
            project.write("ready", "")
            self.assertEqual(project.main("resume", "r")[0], 0)
            self.assertEqual(project.lines("ran"), ["a", "b", "b"])
            self.assertEqual([a["status"] for a in project.state("r")["tasks"]["b"]["attempts"]],
                             ["interrupted", "success"])

    def test_a_run_is_gone_on_with_only_by_its_own_flow_and_selection(self):
        flows = {"one": flow_json(task("a", command="test -e ready")), "two": flow_json(task("b"))}
        with Project(flows) as project:
            project.main("run", "one", "--run-id", "r")
            for args, part in ((("two",), "run r is one of flow one, not of two"),
                               (("one", "--only", "a"), "run r exists and keeps its own selection of tasks")):
                code, _, err = project.main("run", *args, "--run-id", "r")
                self.assertEqual(code, 2)
                self.assertIn(part, err)
            self.assertEqual(list(project.state("r")["tasks"]), ["a"])

    def test_resume_finds_the_flow_of_the_run_from_anywhere(self):
        with one(task("a", command="test -e ready")) as first, one(task("z")) as second:
            first.main("run", "f", "--run-id", "r")
            second.write("ready", "")
            code, _, err = second.main("-o", first.at("miniflow_output"), "resume", "r")
            self.assertEqual((code, err.count("was removed")), (0, 0))
            self.assertEqual(list(first.state("r")["tasks"]), ["a"])

    def test_what_is_left_out_counts_with_the_outputs_of_its_last_success(self):
        with one(task("a", command='echo "{\\"x\\": \\"$MINIFLOW_PARAM_P\\"}" > $MINIFLOW_OUTPUT'),
                 task("b", "a", command=["sh", "-c", "echo $0 >> ran", "${{ tasks.a.outputs.x }}"])
                 ) as project:
            for value in ("one", "two"):
                self.assertTrue(project.run(params={"p": value}).ok)
            self.assertEqual(project.main("run", "f", "--only", "b", "--param", "p=three")[0], 0)
            self.assertEqual(project.lines("ran"), ["one", "two", "two"])

    def test_a_run_id_that_differs_from_another_by_case_only_is_refused(self):
        with one(task("a")) as project:
            project.run(run_id="Run")
            self.assertEqual(project.main("run", "f", "--run-id", "run")[0], 2)

    def test_a_full_disk_is_one_clear_error_and_leaves_no_process(self):
        with one(task("a", command="echo $$ > pid; sleep 60"), task("b", command="sleep 0.3"),
                 task("c", "b")) as project:
            disk = FaultyDisk(lasting=True)
            saved, mf.STALL_S = mf.STALL_S, 0.5
            self.addCleanup(setattr, mf, "STALL_S", saved)
            mini = mf.MiniFlow(project.at("flows"), project.at("tasks"), project.at("out"))
            mini.store.disk = disk
            disk.at = 10**9

            class Full(mf.Watcher):
                def observe(self, event):
                    if isinstance(event, mf.AttemptEnded):
                        disk.at = disk.calls + 1
            os.chdir(project.path)
            self.addCleanup(os.chdir, HERE)
            with self.assertRaises(mf.StateError) as caught:
                source, order = mini.source("f"), mf.Order(project.at("tasks"), 2)
                opened = mf.open_new(mini.store, source, None, order, run_id="r")
                mf.run_to_end(opened, mini.store, source, order, Full())
            self.assertRegex(str(caught.exception),
                             "state can't be written: No space left on device; .* miniflow resume r$")
            self.assertFalse(alive(int(project.read("pid"))))
            os.chdir(HERE)

    def test_real_workflow_graphs_run_to_success(self):
        if not os.path.isdir(CASES):
            self.skipTest("the graphs are not at hand")
        names = sorted(os.listdir(CASES))
        for name in names:
            with open(os.path.join(CASES, name), encoding="utf-8") as file:
                flow = mf.parse_flow(file.read(), name)
            run, _, _ = simulate(flow, slots=8)
            self.assertTrue(run.ok)
            if len(flow.tasks) < 110:
                with Project() as project:
                    shutil.copy(os.path.join(CASES, name), project.at("flows/f.json"))
                    self.assertTrue(project.run().ok)

    def test_a_chain_of_5000_and_a_fan_of_2000_run_without_recursion_errors(self):
        run, _, _ = simulate(make(*[task(f"t{n}", *([f"t{n - 1}"] if n else [])) for n in range(5000)]))
        self.assertTrue(run.ok)
        with one(task("root"), *[task(f"t{n}", "root", command=["true"]) for n in range(300)],
                 task("join", *[f"t{n}" for n in range(300)])) as project:
            self.assertTrue(project.run().ok)

    def test_with_one_slot_the_order_is_always_the_same(self):
        flow, _ = random_flow(random.Random(5), 30)
        tasks = mf.flow_to_json(flow)["tasks"]
        for t in tasks:
            t.update(command=f"echo {t['id']} >> ran", max_retries=0)
        orders = []
        for _ in range(2):
            with one(*tasks, pools=dict(flow.pools)) as project:
                project.run(max_parallel=1)
                orders.append(project.lines("ran"))
        self.assertEqual(*orders)

    def started(self, project, *args):
        """Run a command and return the tasks in the order in which they ran."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(project.at("ran"))
        project.main(*args)
        return "".join(project.read("ran").split())

    def test_the_order_follows_from_the_flow_and_its_history_alone(self):
        tasks = [task(name, command=f"echo {name} >> ran") for name in "abcdef"]
        for _ in range(2):
            with one(*tasks) as project:
                store = mf.Store(project.at("miniflow_output"))
                self.assertEqual(self.started(project, "run", "f", "-j", "1", "--run-id", "z"), "abcdef")
                shutil.rmtree(store.path)
                remember(store, make(*tasks), {"a": 4, "b": 4, "c": 60, "d": 60, "e": 8})
                self.assertEqual(self.started(project, "run", "f", "-j", "1"), "cdefab")

    def test_a_resumed_run_keeps_its_order_whatever_ran_since(self):
        tasks = [task("a", command="test -e ready"),
                 *[task(name, "a", command=f"echo {name} >> ran") for name in "bcd"]]
        with one(*tasks) as project:
            store, flow = mf.Store(project.at("miniflow_output")), make(*tasks)
            remember(store, flow, {"b": 1, "c": 4, "d": 16})
            project.main("run", "f", "-j", "1", "--run-id", "r")
            remember(store, flow, {"b": 16, "c": 4, "d": 1}, "zz", 2e9)
            project.write("ready", "")
            self.assertEqual(self.started(project, "resume", "r", "-j", "1"), "dcb")
            self.assertEqual(self.started(project, "run", "f", "-j", "1"), "bcd")

    def test_a_workflow_of_functions_learns_from_its_earlier_runs_too(self):
        ran, store = [], mf.MemoryStateStore()

        def made(name):
            async def function(ctx):
                ran.append(name)
            return mf.task(name=name)(function)

        workflow = mf.Workflow([made(name) for name in "abc"])
        store.store.save(remembered(workflow.flow, {"a": 1, "b": 4, "c": 16}, stem=workflow.flow.name), {})
        workflow.run_sync(store=store)
        self.assertEqual("".join(ran), "cba")

    def test_a_generated_script_does_not_depend_on_history(self):
        tasks = [task("a"), task("b")]
        with one(*tasks) as project:
            remember(mf.Store(project.at("miniflow_output")), make(*tasks), {"a": 1, "b": 60})
            code, out, _ = project.main("run", "f", "--dry-run")
            self.assertEqual(code, 0)
            self.assertEqual(project.main("export", "f", "--to", "bash")[1], project.read(out.strip()))
            self.assertIn("mf_order='1 2'", project.read(out.strip()))


class T36Reporting(unittest.TestCase):

    def test_a_failed_task_shows_its_last_lines_and_where_the_rest_is(self):
        with one(task("a", command="for i in $(seq 30); do echo line $i; done; printf '\\033[2Jend\\n'; "
                                   "exit 4")) as project:
            code, _, err = project.main("run", "f", "--run-id", "r")
            self.assertEqual(code, 1)
            shown = re.findall(r"^    \| (.*)$", err, re.M)
            self.assertEqual(shown, [f"line {n}" for n in range(12, 31)] + ["\\x1b[2Jend"])
            self.assertRegex(err, r"(?m)^    log: miniflow_output/logs/r/a\.1\.log \(\d+ bytes more\)$")
            self.assertIn("to go on with it: miniflow resume r", err)

    def test_each_style_of_output_says_what_it_should(self):
        with one(task("a", command="echo hello; echo there >&2"),
                 task("b", "a", command="printf partial; exit 2")) as project:
            talk = {style: project.main("run", "f", "--output", style) for style in mf.OUTPUTS}
            for style, (code, out, _) in talk.items():
                self.assertEqual(code, 1)
                self.assertEqual(out.count("\n"), 1 if style != "json" else 7)
            self.assertRegex(talk["progress"][2],
                             r"(?s)start      a\n.*success    a \(.*failed     b: exit 2")
            self.assertIn("a | hello\na | there\n", talk["prefix"][2])
            self.assertIn("b | partial\n", talk["prefix"][2])
            self.assertIn("    | hello\n    | there\n", talk["group"][2])
            self.assertNotIn("start", talk["quiet"][2])
            self.assertIn("failed     b: exit 2", talk["quiet"][2])
            events = [json.loads(line) for line in talk["json"][1].splitlines()]
            self.assertEqual([(event["event"], event["task"], event["status"]) for event in events], [
                ("attempt_started", "a", "running"), ("attempt_spawned", "a", "running"),
                ("attempt_ended", "a", "success"),
                ("attempt_started", "b", "running"), ("attempt_spawned", "b", "running"),
                ("attempt_ended", "b", "failed"),
                ("run_finished", None, "failed")])
            self.assertEqual({event["run"] for event in events}, {events[0]["run"]})

    def test_a_log_without_end_or_lines_costs_no_memory_to_show(self):
        with Project() as project:
            with open(project.at("log"), "wb") as file:
                file.truncate(300 * 2**20)
            place = [0, b""]
            shown = list(mf.follow_lines(project.at("log"), place, True))
            self.assertEqual(shown[0], f"({299 * 2**20} bytes left out)")
            self.assertEqual((len(shown), place), (1 + 2**20 // mf.SHOWN_LINE, [300 * 2**20, b""]))

    def live(self, flow, durations=None, slots=None, started=0, finished=(), now=0):
        """Return a Live that looks on while the first tasks of a flow run, and others have ended."""
        live = mf.Live(mf.Store("x"))
        live.put = lambda stream, text: None
        run = mf.Run(mf.make_plan(flow, durations=durations or {}), "r", started=0)
        live.begin(run, slots)
        for name in [t.id for t in flow.tasks[:started]]:
            events = [mf.AttemptStarted(now, name, 1), mf.AttemptEnded(now, name, 1, "success")]
            for event in events[:1 + (name in finished)]:
                run.apply(event)
                live.observe(event)
        return live

    def on_screen(self, live, screen):
        """Let a Live draw on a Screen, in colours."""
        live.colour, live.widths, live.lines = True, [], []
        live.size, live.write = lambda: (screen.columns, 24), lambda text: screen.feed(text.replace("\n", "\r\n"))
        live.put = lambda stream, text: mf.Live.put(live, live.stream, text)

    def shown(self, live, *args):
        """Return the lines of a live part as text."""
        return ["".join(text for _, text in parts) for parts in live.picture(*args)]

    def test_the_live_part_fits_the_terminal_and_counts(self):
        names = ["t" * 60 + str(n) for n in range(20)]
        live = self.live(make(*map(task, names)), started=15, finished=names[:1])
        for columns in (1, 5, 10, 20, 40, 80, 200):
            for rows in (2, 5, 10, 24):
                lines = self.shown(live, 7, columns, rows)
                self.assertLess(len(lines), max(rows, 3), (columns, rows))
                self.assertTrue(all(mf.width_of(line) < max(columns, 2) for line in lines), (columns, lines))
        self.assertIn("1/20 done, 14 running, 1 success, 7.0 s", lines[-1])
        self.assertIn("  and 2 more", self.shown(live, 7, 80, 24))

    def test_what_is_left_is_told_where_earlier_runs_tell_it(self):
        flow = make(task("a"), task("b"), task("c", "a"), task("d", foreach=[1, 2]), on_failure={"command": "true"})
        every = {"a": 30, "b": 30, "c": 20, "d[0]": 5, "d[1]": 5}
        for durations, slots, now, told in (
                ({}, 2, 10, None), (every, 1, 10, "about 1 min 10 s left"), (every, 2, 10, "about 40.0 s left"),
                (every, None, 10, "about 40.0 s left"), ({"a": 30, "b": 30}, 2, 10, "at least 20.0 s left"),
                (every, None, 90, "about 20.0 s left"), ({"a": 30, "b": 30}, 2, 90, None)):
            with self.subTest(durations=durations, slots=slots, now=now):
                bar = self.shown(self.live(flow, durations, slots, started=2), now, 120, 24)[-1]
                self.assertEqual(next(iter(re.findall("(?:about|at least) .* left", bar)), None), told, bar)
        live = self.live(flow, every, 2, started=2, finished=["a", "b"], now=30)
        self.assertIn("about 20.0 s left", self.shown(live, 30, 120, 24)[-1])
        self.assertIn("a  10.0 s of about 30.0 s", self.shown(self.live(flow, every, 1, started=1), 10, 80, 24)[0])

    def test_progress_counts_what_the_run_counts(self):
        for seed in range(100):
            flow, script = random_flow(random.Random(seed))
            progress, run, world = None, mf.Run(mf.make_plan(flow), "r"), SimWorld(script)
            progress = mf.Progress(run, 2)
            steps, events = mf.drive(run, world, lambda events, happened: None, 2, progress.observe), None
            with contextlib.suppress(StopIteration):
                while True:
                    events = world.wait(run, steps.send(events))
                    counted = collections.Counter(t.status for t in run.tasks.values() if t.status in mf.SETTLED)
                    if not events:
                        self.assertEqual(progress.ended, counted, seed)
                        self.assertEqual(progress.retrying, {name for name, t in run.tasks.items()
                                                             if t.status == "retrying"}, seed)
            self.assertEqual(progress.ended, collections.Counter(t.status for t in run.tasks.values()), seed)
            self.assertAlmostEqual(progress.work, 0)

    def test_progress_of_a_resumed_run_counts_what_is_left_of_it(self):
        flow = make(task("each", foreach=[1, 2, 3]), task("b", "each"))
        durations = {"each[0]": 5, "each[1]": 7, "each[2]": 9, "b": 2}
        old, _, _ = simulate(flow, {"each[1]": {1: (1, 1)}}, durations=durations)
        run, world = mf.reopen(old, flow), SimWorld()
        progress = mf.Progress(run, 1)
        self.assertEqual((progress.left(0), progress.ended, progress.unknown), (9, {"success": 2}, set()))
        steps, events = mf.drive(run, world, lambda events, happened: None, 1, progress.observe), None
        with contextlib.suppress(StopIteration):
            while True:
                events = world.wait(run, steps.send(events))
        self.assertEqual((progress.work, progress.left(world.clock), progress.ended), (0, None, {"success": 5}))

    def test_hostile_texts_reach_no_terminal_as_they_are(self):
        """The screen takes text that can be printed, colours, and what the live part erases; nothing else."""
        tasks = [task(f"t{n}", command=["sh", "-c", 'printf "%s\\n" "$1"; exit 1', "sh", text + "\x9b2J\r\x07\x08"],
                      description=text, **{"if": f"run.id != {json.dumps(text)}"}) for n, text in enumerate(TRICKY)]
        with one(*[t for t in tasks if "{{" not in t["if"]], task("z", http={"url": "http://127.0.0.1:9/\u202e"}),
                 description="\x1b[2J") as project:
            for args in (["run", "f", "--run-id", "r"], ["show", "r"], ["logs", "r"], ["graph", "--run", "r"],
                         ["simulate", "f"], ["run", "f", "--output", "prefix"], ["report", "r", "-o", "-"]):
                with self.subTest(args):
                    _, screen, text = on_terminal(project, *args, columns=100, rows=50)
                    self.assertNotIn("\u202e", text)
                    self.assertTrue(any(screen.lines))

    def test_a_terminal_gets_a_live_part_and_it_is_gone_at_the_end(self):
        seen = set()
        with one(task("a", command="sleep 0.3"), task("b", "a", command="echo why; exit 3"), max_parallel=2) as project:
            code, screen, text = on_terminal(project, "run", "f", "--run-id", "r",
                                             look=lambda screen: seen.update(line.strip() for line in screen.lines))
            self.assertEqual(code, 1)
            self.assertTrue(any(re.fullmatch(r"▶ a  0\.\d s", line) for line in seen), seen)
            self.assertTrue(any(re.search("0/2 done, 1 running", line) for line in seen), seen)
            self.assertRegex(text, r"\x1b\[31mfailed   \x1b\[0m  b: exit 3")
            self.assertRegex("\n".join(screen.lines), r"(?x) \A run\ r:\ 2\ tasks,\ 2\ at\ once\n \S+\ \ success\ .*\n"
                             r"\S+\ \ failed\ \ \ \ \ b:\ exit\ 3.*\n \ +\|\ why\n \ +log:.*\n"
                             r"run\ r:\ failed\ .*\n to\ go\ on\ with\ it:.*\n r\n \Z")

    def test_nothing_stays_of_the_live_part_where_the_terminal_changes_its_size(self):
        for seed in range(200):
            chance = random.Random(seed)
            flow = make(*[task("t" * chance.randint(1, 70) + str(n)) for n in range(12)])
            live, screen, now, told = self.live(flow, started=9), Screen(80, rows=200), 0.0, []
            self.on_screen(live, screen)
            for n in range(chance.randint(2, 12)):
                if chance.random() < 0.5:
                    told.append(f"told {n} " + "x" * chance.choice([0, 1, 30, 72, 73, 74, 200]))
                    live.tell(told[-1])
                now += chance.choice([0.01, 0.2])
                live.refresh(now)
                self.assertTrue(all(len(line) <= screen.columns for line in screen.lines))
                if live.next_draw == now + 0.1:
                    screen.resize(chance.randint(15, 120))
            live.end(live.run)
            shown = "".join(screen.lines).replace(" ", "")
            self.assertEqual(shown[:shown.index("runr:")], "".join(told).replace(" ", ""), seed)
            self.assertNotIn("done,", shown)

    def test_a_terminal_without_colours_or_characters_gets_none(self):
        with one(task("a", command="sleep 0.2")) as project:
            _, _, text = on_terminal(project, "run", "f", NO_COLOR="1", PYTHONIOENCODING="ascii")
            self.assertNotRegex(text, r"\x1b\[\d*m")
            self.assertTrue(text.isascii())
            self.assertIn("> a  0.", text)
            _, _, text = on_terminal(project, "run", "f", TERM="dumb")
            self.assertNotIn("\x1b", text)
            self.assertIn("start      a", text)

    def test_what_functions_print_stands_above_the_live_part(self):
        with Project() as project:
            project.write("flows/f.py", """if True:
                import sys, time
                from miniflow import Workflow, task
                @task()
                def a(ctx):
                    for n in range(3):
                        print("line", n)
                        print("to stderr", n, file=sys.stderr)
                        time.sleep(0.15)
                    print("no newline", end="")
                workflow = Workflow([a])
                """)
            code, screen, text = on_terminal(project, "run", "f", "--run-id", "r")
            self.assertEqual(code, 0)
            self.assertIn("1 running", text)
            self.assertEqual(screen.lines[1:7], [line for n in range(3) for line in (f"line {n}", f"to stderr {n}")])
            self.assertIn("no newline", "".join(screen.lines))
            self.assertNotIn("running", "".join(screen.lines))

    def test_ten_thousand_tasks_are_drawn_ten_times_a_second_at_most(self):
        live, drawn = self.live(make(*[task(f"t{n}") for n in range(10000)]), {"t0": 1}, started=8), []
        live.write = drawn.append
        count = itertools.count()
        sys.setprofile(lambda frame, kind, arg: kind == "call" and next(count))
        try:
            for n in range(1000):
                live.refresh(n / 1000)
        finally:
            sys.setprofile(None)
        self.assertLessEqual(len(drawn), 11)
        self.assertLess(max(map(len, drawn)), 2000)
        self.assertLess(next(count), 11 * 400 + 1000, "a draw looks at what runs, never at all tasks")

    def test_a_gantt_chart_shows_attempts_to_scale(self):
        flow = make(task("a", max_retries=1, backoff_s=2), task("b", "a"))
        run, _, _ = simulate(flow, {"a": {1: (4, 1), 2: (2, 0)}, "b": {1: (2, 0)}})
        self.assertEqual(mf.format_gantt(run, mf.ASCII_GLYPHS, 25).splitlines(), [
            "a * xxxx..##      8.00 s", "b *         ##    2.00 s"])
        many, _, _ = simulate(make(*[task(f"t{n}") for n in range(99)]), {"t50": {1: (9, 0)}}, slots=99)
        lines = mf.format_gantt(many, mf.GLYPHS, 60, most=10).splitlines()
        self.assertEqual((len(lines), lines[-1]), (11, "and 89 tasks that took less time"))
        self.assertTrue(any(line.startswith("t50 ") for line in lines))

    def test_the_critical_path_is_what_decided_the_end(self):
        run, _, _ = simulate(make(task("a"), task("b", "a"), task("c", "a"), task("d", "b", "c")),
                             {"c": {1: (9, 0)}})
        self.assertEqual(mf.critical_path(run), ["a", "c", "d"])
        flow = make(task("a"), task("b"), task("c", "b"), task("d", "a", "c", trigger_rule="all_done"))
        run, _, _ = simulate(flow, {"b": {1: (9, 1)}})
        self.assertEqual((ends(run)["c"], mf.critical_path(run)), ("upstream_failed", ["b", "d"]))

    def test_a_reader_that_goes_away_never_ends_a_run(self):
        with one(*[task(f"t{n}") for n in range(20)]) as project:
            reader, writer = os.pipe()
            process = subprocess.Popen(
                [sys.executable, ENGINE, "run", "f", "--run-id", "r", "--output", "json"],
                cwd=project.path, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer)
            os.close(writer)
            os.read(reader, 1)
            os.close(reader)
            process.wait(60)
            self.assertEqual(project.state("r")["status"], "success")


class T39Report(unittest.TestCase):

    def report(self, flow, script=None, change=lambda run: None, durations=None):
        """Return the page of a simulated run of a flow."""
        run, _, _ = simulate(flow, script)
        change(run)
        with tempfile.TemporaryDirectory() as path:
            return mf.to_report(mf.Loaded(run, 1, False, {}, b""), mf.Store(path), 0)

    def read(self, page):
        """Return the tags with their attributes, and the text, of a page, as a parser of HTML reads it."""
        import html.parser
        tags, texts, inside = [], [], []

        class Parser(html.parser.HTMLParser):
            def handle_starttag(self, tag, attrs):
                tags.append((tag, dict(attrs)))
                inside.append(tag)

            def handle_endtag(self, tag):
                while inside and inside.pop() != tag:
                    pass

            def handle_data(self, data):
                if not inside or inside[-1] not in ("script", "style"):
                    texts.append(data)

        parser = Parser()
        parser.feed(page)
        parser.close()
        return tags, " ".join(" ".join(texts).split())

    def test_the_bars_of_many_attempts_have_their_numbers(self):
        page = self.report(make(task("a", max_retries=24)), {"a": {n: (1, 1) for n in range(1, 25)}})
        numbers = re.findall(r"<title>a, attempt ([0-9]+): \w+", page)
        self.assertEqual(list(map(int, numbers)), list(range(26 - mf.REPORT_ATTEMPTS, 26)))

    def test_the_time_axis_of_an_interrupted_run_reaches_to_the_last_that_is_known(self):
        def interrupt(run):
            for at, name in ((10.0, "a"), (50.0, "b")):
                task_run = run.tasks[name]
                task_run.status, task_run.finished, attempt = "running", None, task_run.attempts[-1]
                attempt.status, attempt.started, attempt.finished = "running", at, None
            run.outcome = run.finished = None

        page = self.report(make(task("a"), task("b")), change=interrupt)
        ticks = re.search("<div class=ticks>(.*?)</div>", page)[1]
        self.assertEqual(re.findall("<span>(.*?)</span>", ticks), ["0", "10.0 s", "20.0 s", "30.0 s", "40.0 s"])
        self.assertEqual(re.findall(r'<rect class="interrupted" x="([0-9.]+)"', page), ["0.0", "998.0"])

    def test_a_report_tells_all_about_a_run(self):
        flow = make(task("fetch", description="gets it", max_retries=1), task("load", "fetch"), task("after", "load"),
                    task("each", foreach=["x", "y"]), description="nightly", version="7", params={"day": "monday"})
        run, _, _ = simulate(flow, {"fetch": {1: (1, 5)}, "load": {1: (2, 3)}})
        run.params, run.tasks["fetch"].output = {"day": "monday"}, {"rows": 41}
        with tempfile.TemporaryDirectory() as path:
            page = mf.to_report(mf.Loaded(run, 1, False, {}, b""), mf.Store(path), 0)
        tags, text = self.read(page)
        for told in ("f failed", "nightly", "version 7", "load failed", "exit 3", "exit 5", "upstream load failed",
                     "gets it", "each[1]", "critical path: fetch → load", '"rows": 41', '"day": "monday"', "foreach"):
            self.assertIn(told, text)
        self.assertEqual(len([1 for tag, attrs in tags if tag == "details"]), 6)
        self.assertEqual([attrs["id"] for tag, attrs in tags if tag == "details" and "open" in attrs], ["d1"])
        targets = {attrs["id"] for _, attrs in tags if "id" in attrs}
        links = {attrs["href"] for tag, attrs in tags if tag == "a"}
        self.assertEqual({link[1:] for link in links} - targets, set())

    def test_a_report_asks_for_nothing_outside_itself_and_runs_only_what_is_known(self):
        import base64
        import hashlib
        page = self.report(make(task("a")))
        tags, _ = self.read(page)
        self.assertFalse({tag for tag, _ in tags} & {"img", "iframe", "object", "embed", "form", "base"})
        for tag, attrs in tags:
            self.assertEqual([name for name in attrs if name.startswith("on") or name == "style"], [], tag)
            for name in ("src", "href", "xlink:href", "action"):
                self.assertRegex(attrs.get(name) or "#", "^(#|data:,$)", tag)
        self.assertNotRegex(page.replace("http://www.w3.org/2000/svg", ""), r"https?:|url\(|@import")
        policy = next(attrs["content"] for tag, attrs in tags if attrs.get("http-equiv") == "Content-Security-Policy")
        self.assertIn("default-src 'none'", policy)
        self.assertNotIn("unsafe", policy)
        for tag in ("script", "style"):
            text, = re.findall(f"(?s)<{tag}>(.*?)</{tag}>", page)
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            self.assertIn(f"{tag}-src 'sha256-{digest}'", policy)

    def test_whatever_comes_from_a_flow_or_a_log_is_text(self):
        tricky = [text for text in TRICKY if "{{" not in text]
        tasks = [task(f"t{n}", description=text, command=["printf", "%s", text],
                      **{"if": "run.id != " + json.dumps(text)}) for n, text in enumerate(tricky)]
        flow = flow_json(*tasks, task("z", command="cat tricky >&2; exit 1"), description=tricky[0], tags=tricky)
        plain = self.read(self.report(make(*[task(t["id"], **{"if": "true"}) for t in tasks], task("z"))))[0]
        with Project({"f": flow}) as project:
            project.write("tricky", "\n".join(tricky))
            code, _, err = project.main("run", "f", "--run-id", "r", "--params", json.dumps({"p": tricky}))
            self.assertEqual(code, 1, err)
            code, out, err = project.main("report", "r")
            self.assertEqual((code, out), (0, "r.html\n"), err)
            page = project.read("r.html")
        tags, text = self.read(page)
        self.assertLessEqual({tag for tag, _ in tags}, {tag for tag, _ in plain} | {"pre"})
        self.assertEqual([n for n, (tag, _) in enumerate(tags) if tag == "script"][1:], [])
        self.assertTrue(all(char.isprintable() or char == "\n" for char in page))
        for one in tricky:
            self.assertGreaterEqual(text.count(" ".join(mf.safe(one).split())), 2, one)

    def test_secrets_are_masked_in_a_report(self):
        secret = "s3cret<&>\"'pass"
        with one(task("a", command="printf '%s\\n' \"$KEY\"; printf '{\"k\": \"%s\"}' plain > $MINIFLOW_OUTPUT; "
                                   "echo \"$KEY\" >&2; exit 1", description=f"uses {secret}"),
                 secrets=["KEY"]) as project:
            done = project.cli("run", "f", "--run-id", "r", env={**os.environ, "KEY": secret})
            self.assertEqual(done.returncode, 1)
            done = project.cli("report", "r", "-o", "-", env={**os.environ, "KEY": secret})
            _, text = self.read(done.stdout)
            self.assertNotIn("s3cret", done.stdout)
            self.assertIn("uses ***", text)
            self.assertIn("*** ***", text)

    def test_a_report_of_ten_thousand_tasks_stays_small(self):
        flow = make(*[task(f"t{n}") for n in range(10_000)], task("end", *[f"t{n}" for n in range(10_000)]))
        page = self.report(flow, {"t77": {1: (1, 1)}})
        self.assertLess(len(page), 5e6)
        tags, text = self.read(page)
        self.assertEqual(len([1 for tag, _ in tags if tag == "details"]), mf.REPORT_DETAILS)
        self.assertIn("10001 tasks are too many for a picture", text)
        self.assertIn("1 tasks more are left out", text)

    def test_long_values_and_logs_are_cut(self):
        with one(task("a", command="head -c 300000 /dev/zero | tr '\\0' x; printf '{\"k\": \"%0200000d\"}' 7 > "
                                   "$MINIFLOW_OUTPUT")) as project:
            project.main("run", "f", "--run-id", "r", "--param", "p=" + "y" * 90_000)
            page = project.main("report", "r", "-o", "-")[1]
            self.assertLess(len(page), 40_000)
            self.assertIn("characters more", page)

    def test_every_state_and_a_run_that_goes_on_can_be_told(self):
        def change(run):
            for state, task_run in zip((*mf.TASK_STATES, "interrupted"), run.tasks.values()):
                task_run.status = state
        page = self.report(make(*[task(f"t{n}") for n in range(10)]), change=change)
        for state in (*mf.TASK_STATES[:1], *mf.TASK_STATES[2:], "interrupted"):
            self.assertIn(f'<td class="state {state}">{state}</td>', page)
        run = mf.Run(mf.make_plan(make(task("a"), task("b"))), "r")
        run.apply(mf.AttemptStarted(5, "a", 1))
        for live, status in ((True, "running"), (False, "interrupted")):
            page = mf.to_report(mf.Loaded(run, 1, live, {}, b""), mf.Store("none"), 65)
            self.assertIn(f'<td class="state {status}">{status}</td>', page)
        self.assertIn("No attempt has begun", mf.to_report(
            mf.Loaded(mf.Run(run.plan, "r"), 1, True, {}, b""), mf.Store("none"), 65))


class Served:
    """A `miniflow serve` of a project on a port of its own, to be asked; a context manager."""

    def __init__(self, project, *args, token="tok", constants=(), env=(), host="127.0.0.1"):
        self.project, self.token, self.host = project, token, host
        code = (f"import sys; sys.path.insert(0, {HERE!r})\nimport miniflow\n"
                + "".join(f"miniflow.{name} = {value}\n" for name, value in dict(constants).items())
                + "sys.exit(miniflow.main(sys.argv[1:]))")
        env = {**os.environ, **dict(env), **({"MINIFLOW_TOKEN": token} if token else {})}
        self.process = subprocess.Popen([sys.executable, "-c", code, "serve", "--port", "0", *args], cwd=project.path,
                                        env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE)
        self.address = self.process.stdout.readline().decode().strip()
        found = re.fullmatch(r"http://(.+):(\d+)/(?:#token=(.+))?", self.address)
        assert found, (self.address, self.process.stderr.read())
        self.port, self.token = int(found[2]), found[3] or token

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()

    def ask(self, method, path, body=None, **headers):
        """Return the status, the headers and the body (JSON decoded) of an answer."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=30)
        with contextlib.closing(connection):
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, {
                "Authorization": f"Bearer {self.token}", **({"Content-Type": "application/json"} if content else {}),
                **{name.replace("_", "-"): value for name, value in headers.items()}})
            answer = connection.getresponse()
            text = answer.read()
        return answer.status, dict(answer.getheaders()), (
            json.loads(text) if answer.headers["Content-Type"] == "application/json" else text)

    def get(self, path):
        """Return the body of an answer that has to be a good one."""
        status, _, value = self.ask("GET", path)
        assert status == 200, (path, status, value)
        return value

    def start(self, flow, run_id, **params):
        """Start a run."""
        status, headers, value = self.ask("POST", "/api/v1/runs", {"flow": flow, "params": params, "run_id": run_id})
        assert (status, headers.get("Location")) == (201, f"/api/v1/runs/{run_id}"), (status, value)

    def ended(self, run_id):
        """Return the status of a run once it has ended."""
        return wait_for(lambda: [status for status in [self.get(f"/api/v1/runs/{run_id}")["status"]]
                                 if status != "running"], f"the end of run {run_id}")[0]

    def raw(self, content, seconds=20):
        """Send bytes as they are; return all that comes back."""
        with socket.create_connection((self.host, self.port), timeout=seconds) as sock:
            with contextlib.suppress(OSError):
                sock.sendall(content)
            return b"".join(iter(lambda: sock.recv(65536), b""))


def events_in(content):
    """Return the (id, data) of the server-sent events in a text."""
    return [((re.findall(r"(?m)^id: (.*)$", part) or [None])[0], json.loads(re.search(r"(?m)^data: (.*)$", part)[1]))
            for part in content.decode().split("\n\n") if "data: " in part]


class T44Web(unittest.TestCase):

    GOOD = (("Host", "127.0.0.1:8080"), ("Authorization", "Bearer tok"))

    def web(self, project):
        """Return what answers requests for a project, without a socket."""
        mini = mf.MiniFlow(project.at("flows"), project.at("tasks"), project.at("miniflow_output"))
        return mf.Web(mini, "tok", mf.own_hosts("127.0.0.1", "127.0.0.1", 8080))

    def ask(self, web, method, target, headers=(), body=b"", **more):
        """Return the status and the value of an answer; `headers` take the place of those of the same name."""
        given = list(headers) + [(n.replace("_", "-"), v) for n, v in more.items()]
        names = {name.lower() for name, _ in given}
        if body and "content-length" not in names:
            given += [("Content-Length", str(len(body)))]
        if method == "POST" and "content-type" not in names:
            given += [("Content-Type", "application/json")]
        given += [pair for pair in self.GOOD if pair[0].lower() not in names]
        response = mf.respond(web, mf.Request(method, target, [pair for pair in given if pair[1] is not None],
                                              io.BytesIO(body).read))
        content = response.body if isinstance(response.body, bytes) else b"".join(response.body)
        return response, json.loads(content) if response.kind == "application/json" else content

    def tree(self, project):
        return sorted(os.path.join(folder, name) for folder, _, names in os.walk(project.path) for name in names)

    def test_every_attack_is_refused_on_every_route(self):
        attacks = [
            ("evil host", [("Host", "evil.example:8080")], {421}),
            ("host of another port", [("Host", "127.0.0.1:8081")], {421}),
            ("host without a port", [("Host", "localhost")], {421}),
            ("rebinding", [("Host", "evil.example:8080"), ("Origin", "http://evil.example:8080")], {421}),
            ("no host", [("Host", None)], {421}),
            ("two hosts", [("Host", "127.0.0.1:8080"), ("Host", "evil.example:8080")], {400}),
            ("evil origin", [("Origin", "http://evil.example")], {403}),
            ("origin of a file", [("Origin", "null")], {403}),
            ("https of ours", [("Origin", "https://127.0.0.1:8080")], {403}),
            ("another site", [("Sec-Fetch-Site", "cross-site")], {403}),
            ("another port of this host", [("Sec-Fetch-Site", "same-site")], {403}),
            ("no token", [("Authorization", None)], {401}),
            ("wrong token", [("Authorization", "Bearer toke")], {401}),
            ("prefix of the token", [("Authorization", "Bearer to")], {401}),
            ("another scheme", [("Authorization", "Basic tok")], {401}),
            ("token that is no ASCII", [("Authorization", "Bearer t\xf6k")], {401}),
            ("two tokens", [("Authorization", "Bearer tok"), ("Authorization", "Bearer tok")], {401}),
            ("negative length", [("Content-Length", "-1")], {400}),
            ("length in words", [("Content-Length", "abc")], {400}),
            ("signed length", [("Content-Length", "+5")], {400}),
            ("Arabic length", [("Content-Length", "\u0663")], {400}),
            ("two lengths", [("Content-Length", "5"), ("Content-Length", "6")], {400}),
            ("list of lengths", [("Content-Length", "5, 5")], {400}),
            ("huge length", [("Content-Length", str(10**12))], {413}),
            ("chunked", [("Transfer-Encoding", "chunked")], {411}),
        ]
        with one(task("a")) as project:
            project.run(run_id="r")
            web, before = self.web(project), self.tree(project)
            for one_route in mf.ROUTES:
                target = one_route.path.format(flow="f", run="r", task="a")
                for name, headers, wanted in attacks:
                    if wanted == {401} and one_route.is_open:
                        continue
                    with self.subTest(route=target, method=one_route.method, attack=name):
                        response, told = self.ask(web, one_route.method, target, headers, b'{"flow": "f"}')
                        self.assertIn(response.status, wanted)
                        self.assertEqual(set(told), {"error", "problems"})
                        self.assertNotIn("tok", told["error"].replace("token", "").replace("TOKEN", ""))
                for method in ("DELETE", "PUT", "PATCH", "OPTIONS", "TRACE", "FOO"):
                    response, _ = self.ask(web, method, target)
                    self.assertEqual(response.status, 405)
                    self.assertIn(one_route.method, response.headers["Allow"])
                self.assertEqual(self.ask(web, one_route.method, target + "?x=" + "y" * 70_000)[0].status, 414)
                if one_route.method == "POST":
                    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "json"):
                        response, _ = self.ask(web, "POST", target, [("Content-Type", kind)], b'{"flow": "f"}')
                        self.assertEqual(response.status, 415)
            self.assertEqual(self.tree(project), before)

    def test_ids_from_attackers_reach_no_file(self):
        ids = ["../x", "..%2fx", "%2e%2e/x", "%2e%2e%2fr", "..%252fx", "/etc/passwd", "%2fetc%2fpasswd", "C:%5Cx",
               "a%00b",
               ".", "..", "", "CON", "r.json", "x" * 300, "%EF%BD%81", "-rf", "r%0d%0aX:%201", "%ff", "r/../r",
               "r%2f..%2fr"]
        with one(task("a", command="echo secret")) as project:
            project.run(run_id="r")
            project.write("x", "x")
            web, before = self.web(project), self.tree(project)
            for text in ids:
                for target in (f"/api/v1/runs/{text}", f"/api/v1/flows/{text}", f"/api/v1/runs/r/tasks/{text}",
                               f"/api/v1/runs/{text}/tasks/a/log", f"/api/v1/runs/r/tasks/{text}/log", f"/{text}",
                               f"/api/v1/runs/{text}/events"):
                    if target in ("/", "/api/v1/runs/r/tasks/", "/api/v1/runs/", "/api/v1/flows/"):
                        continue
                    with self.subTest(target=target):
                        response, told = self.ask(web, "GET", target)
                        self.assertIn(response.status, (400, 404), told)
                        self.assertIsInstance(told["error"], str)
                for body in ({"flow": text}, {"flow": "f", "run_id": text}):
                    if body.get("run_id") or "flow" in body:
                        response, told = self.ask(web, "POST", "/api/v1/runs", (), json.dumps(body).encode())
                        self.assertIn(response.status, (400, 404), (body, told))
            self.assertEqual(self.tree(project), before)

    def test_bodies_and_queries_that_make_no_sense_are_refused_with_a_reason(self):
        with Project({"f": flow_json(task("a"), params={"n": {"type": "integer", "max": 3}}),
                      "bad": '{"name": "bad"}'}) as project:
            web = self.web(project)
            for body, status, words in [
                    (b"{", 400, "JSON"), (b"[1]", 400, "object"), (b'"f"', 400, "object"), (b"\xff", 400, "JSON"),
                    (b'{"flow": "f", "flow": "f"}', 400, "flow"), (b'{"flow": NaN}', 400, "NaN"),
                    (b"[" * 100_000, 400, "JSON"), (b"{}", 400, "flow is missing"), (b'{"flow": 1}', 400, "a string"),
                    (b'{"flow": "f", "parms": {}}', 400, "did you mean params?"),
                    (b'{"flow": "f", "params": [1]}', 400, "object"),
                    (b'{"flow": "f", "params": {"n": 4}}', 422, "at most 3"),
                    (b'{"flow": "f", "params": {"m": 4}}', 422, "no such param"),
                    (b'{"flow": "bad"}', 422, "tasks"), (b'{"flow": "ff"}', 404, "did you mean f?")]:
                with self.subTest(body=body[:60]):
                    response, told = self.ask(web, "POST", "/api/v1/runs", (), body)
                    self.assertEqual(response.status, status, told)
                    self.assertIn(words, " ".join([told["error"], *told["problems"]]))
            for query, words in [("limit=0", "limit"), ("limit=x", "limit"), ("limit=1001", "1000"),
                                 ("offset=-1", "offset"),
                                 ("status=red", "one of"), ("limt=1", "did you mean limit?"), ("flow=%ff", "read"),
                                 ("&".join(["a=1"] * 50), "read"), ("limit=" + "9" * 5000, "limit")]:
                with self.subTest(query=query[:40]):
                    response, told = self.ask(web, "GET", "/api/v1/runs?" + query)
                    self.assertEqual(response.status, 400, told)
                    self.assertIn(words, told["error"])
            self.assertEqual(self.ask(web, "POST", "/api/v1/runs", [("Content-Length", None)])[0].status, 411)
            self.assertEqual(self.ask(web, "POST", "/api/v1/runs", [("Content-Length", "9")], b"{}")[0].status, 400)
            self.assertEqual(web.store.ids(), [])

    def test_a_bug_is_a_500_without_a_traceback(self):
        with one(task("a")) as project:
            web = self.web(project)
            web.history = None
            with contextlib.redirect_stderr(io.StringIO()) as told:
                response, value = self.ask(web, "GET", "/api/v1/runs")
            self.assertEqual(response.status, 500)
            self.assertNotIn("NoneType", json.dumps(value))
            self.assertIn("NoneType", told.getvalue())

    def test_every_answer_carries_the_safe_headers_and_html_in_json_is_escaped(self):
        evil = "<script>alert(1)</script>"
        with one(task("a", description=evil), description=evil) as project:
            project.run(run_id="r")
            web = self.web(project)
            for target in ("/", "/app.css", "/app.js", "/icon.svg", "/healthz", "/nowhere", "/api/v1/flows",
                           "/api/v1/runs/r",
                           "/api/v1/runs/r/tasks/a", "/api/v1/runs/r/tasks/a/log", "/metrics"):
                response, _ = self.ask(web, "GET", target)
                for name in ("Content-Security-Policy", "X-Content-Type-Options", "Referrer-Policy", "Cache-Control"):
                    self.assertIn(name, response.headers, target)
                self.assertNotIn("unsafe-inline", response.headers["Content-Security-Policy"])
                self.assertFalse({name.lower() for name in response.headers} & {"server",
                                                                                "access-control-allow-origin"})
                if response.kind == "application/json":
                    self.assertNotIn(b"<", response.body)
            log = self.ask(web, "GET", "/api/v1/runs/r/tasks/a/log")[0]
            self.assertEqual(log.kind, "text/plain; charset=utf-8")
            self.assertTrue(log.headers["Content-Security-Policy"].startswith("sandbox"))

    def test_which_hosts_are_this_server(self):
        name = socket.gethostname().lower()
        for host, address, good, bad in [
                ("127.0.0.1", "127.0.0.1", ["127.0.0.1:80", "localhost:80", "LOCALHOST:80", "[::1]:80", "localhost",
                                            "[::1]"],
                 ["", ":80", "127.0.0.1:81", "10.0.0.1:80", "evil:80", "127.0.0.1.evil:80", "localhost:80:80", "[::1",
                  name + "x:80"]),
                ("0.0.0.0", "0.0.0.0", ["10.0.0.1:80", "[fe80::1]:80", f"{name}:80", "127.0.0.1"],
                 ["evil:80", "10.0.0.1:81"]),
                ("flows.lan", "10.0.0.7", ["flows.lan:80", "10.0.0.7:80", "127.0.0.1:80"],
                 ["10.0.0.8:80", "evil.lan:80"]),
                ("::1", "::1", ["[::1]:80", "localhost:80"], ["::1:80", "[::2]:80"])]:
            is_own = mf.own_hosts(host, address, 80)
            self.assertEqual([given for given in good if not is_own(given)], [], host)
            self.assertEqual([given for given in bad if is_own(given)], [], host)

    def test_openapi_names_every_route_and_how_it_is_asked(self):
        with one(task("a")) as project:
            _, told = self.ask(self.web(project), "GET", "/api/v1/openapi.json")
        self.assertEqual({(method.upper(), path) for path, item in told["paths"].items() for method in item},
                         {(one_route.method, one_route.path) for one_route in mf.ROUTES})
        start = told["paths"]["/api/v1/runs"]["post"]
        self.assertLessEqual({"201", "401", "404", "409", "422"}, set(start["responses"]))
        self.assertEqual(set(start["requestBody"]["content"]["application/json"]["schema"]["properties"]),
                         {"flow", "params", "run_id"})
        names = [item["operationId"] for path in told["paths"].values() for item in path.values()]
        self.assertEqual(len(names), len(set(names)))
        log = told["paths"]["/api/v1/runs/{run}/tasks/{task}/log"]["get"]["parameters"]
        self.assertEqual([p["name"] for p in log], ["run", "task", "attempt", "offset", "limit"])

    def test_the_page_asks_only_for_what_there_is_and_knows_every_state(self):
        parts = mf.page_parts()
        asked = re.findall(r"/api/[^\"?\s]*?(?=[`\"?])", parts["script"])
        self.assertGreater(len(asked), 8)
        for text in asked:
            path = re.sub(r"\$\{[^}]*\}", "x", text)
            self.assertTrue([found for found in mf.ROUTES if re.fullmatch(re.sub(r"{\w+}", "[^/]+", found.path), path)],
                            text)
        for state in mf.TASK_STATES + mf.RUN_STATES:
            self.assertRegex(parts["style"], rf"\.s-{state} {{\s*--c: var\(--{state}\)")
            self.assertEqual(len(re.findall(rf"\s--{state}: #", parts["style"])), 2, state)      # light and dark
        for word in ("start", "cancel", "resume", "log", "Gantt"):
            self.assertIn(word, parts["script"])
        self.assertEqual(set(re.findall(r"\w+://[^\"\s)]*", mf.PAGE)), {"http://www.w3.org/2000/svg"})
        self.assertEqual(re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function|srcdoc",
                                    mf.PAGE), [])
        self.assertEqual(re.findall(r"<[^>]*\s(?:style|on\w+)=", parts["html"]), [])
        self.assertEqual(set(re.findall(r'(?:src|href)="([^"#]+)"', parts["html"])), {"app.css", "app.js", "icon.svg"})

    def test_parts_of_a_log_never_show_a_secret_wherever_they_begin_and_end(self):
        words = ["hunter2", "p\u00e4sswort"]
        content = ("a hunter2b p\u00e4sswort\nhunter2hunter2\x00 hunt " + "hunter2"[:5]).encode()
        before, mf.hidden[:] = mf.hidden[:], words
        try:
            with tempfile.TemporaryFile() as file:
                file.write(content)
                whole = mf.bytes_shown(file, 0, len(content))
                self.assertEqual(whole, mf.without_hidden(content))
                for start in range(len(content) + 1):
                    for end in range(start, len(content) + 1):
                        part = mf.bytes_shown(file, start, min(end, len(content) - 10))
                        self.assertFalse(re.search(b"unte|ter2|ssw|ort", part), (start, end, part))
                    rest = mf.bytes_shown(file, 0, start) + mf.bytes_shown(file, start, len(content))
                    self.assertEqual(rest, whole, start)
                self.assertEqual(mf.unfinished_secret(file, len(content)), 5)
                self.assertEqual(mf.unfinished_secret(file, 3), 1)
        finally:
            mf.hidden[:] = before

    def test_a_log_is_read_from_any_byte_on(self):
        with one(task("a", command="seq 1 2000; exit 1", max_retries=1)) as project:
            project.run(run_id="r")
            web, whole = self.web(project), project.log("r", "a", 2)
            size = len(whole)
            for query, wanted in [("", whole), ("offset=100", whole[100:]), ("offset=-7", whole[-7:]),
                                  ("offset=-99999999", whole),
                                  ("offset=5&limit=20", whole[5:25]), (f"offset={size}", b""), ("offset=99999999", b""),
                                  ("attempt=1", project.log("r", "a", 1)), ("limit=1", whole[:1])]:
                with self.subTest(query=query):
                    response, content = self.ask(web, "GET", "/api/v1/runs/r/tasks/a/log?" + query)
                    self.assertEqual((response.status, content), (200, wanted))
                    self.assertEqual((response.headers["X-Log-Size"], response.headers["X-Log-Ended"]),
                                     (str(size), "true"))
            self.assertEqual(self.ask(web, "GET", "/api/v1/runs/r/tasks/a/log?attempt=3")[0].status, 404)
            secret = project.at("secret")
            project.write("secret", "secret")
            os.replace(project.at("miniflow_output/logs/r/a.1.log"), project.at("kept"))
            os.symlink(secret, project.at("miniflow_output/logs/r/a.1.log"))
            self.assertEqual(self.ask(web, "GET", "/api/v1/runs/r/tasks/a/log?attempt=1")[0].status, 404)
            os.rename(project.at("miniflow_output/logs/r"), project.at("elsewhere"))
            os.symlink(project.at("elsewhere"), project.at("miniflow_output/logs/r"))
            self.assertEqual(self.ask(web, "GET", "/api/v1/runs/r/tasks/a/log")[0].status, 404)

    def test_a_run_that_is_followed_is_told_whole_and_from_any_event_on(self):
        """Over journals that are whole, cut anywhere, begun anew, and gone."""
        with one(task("a"), task("b", "a", command="exit 1"), task("c", "b")) as project:
            with project.start("run", "f", "--run-id", "r"), contextlib.ExitStack() as stack:
                store = mf.Store(project.at("miniflow_output"))
                wait_for(lambda: store.exists("r"), "the run")
                follower = mf.Follower(store, "r")
                stack.callback(follower.close)
                told = []
                wait_for(lambda: told.extend(map(lambda event: (follower.told, event), follower.news()))
                         or follower.run and follower.run.outcome, "its end")
            seqs = [seq for seq, _ in told]
            self.assertEqual(seqs, list(range(seqs[0], seqs[0] + len(seqs))))
            self.assertIsNone(told[0][1])
            self.assertIsInstance(told[-1][1], mf.RunFinished)
            self.assertEqual(ends(follower.run), {name: t["status"] for name, t in project.state("r")["tasks"].items()})
            late = mf.Follower(store, "r")
            self.assertEqual(([*late.news()], late.told), ([None], seqs[-1]))
            self.assertEqual([*mf.Follower(store, "r", seqs[-1]).news()], [])

    def test_a_journal_that_comes_in_pieces_is_read_event_by_event(self):
        plan = mf.make_plan(make(task("a"), task("b", "a")))
        run, _, journal = simulate(plan.flow)
        begun = mf.Run(plan, "r")
        lines = [b"".join(mf.encode_opened(begun, {}, 1, mf.encode_definition(plan.flow)))]
        lines += [mf.encode_record(mf.event_to_json(event), n) for n, event in enumerate(journal, 2)]
        with tempfile.TemporaryDirectory() as path:
            store = mf.Store(path)
            store.prepare("runs")
            journal_path, content = store.files("r").journal, b"".join(lines)
            for after in range(-1, len(lines) + 1):
                follower, told = mf.Follower(store, "r", after), []
                for end in range(0, len(content) + 1, 41):
                    with open(journal_path, "wb" if not end else "r+b") as file:
                        file.write(content[:end])
                    told += [follower.told for _ in follower.news()]
                with open(journal_path, "r+b") as file:
                    file.write(content)
                told += [follower.told for _ in follower.news()]
                self.assertEqual(told, list(range(max(1, after + 1), len(lines) + 1)), after)
                self.assertEqual(ends(follower.run), ends(run))
                store.disk.put(journal_path, b"".join(mf.encode_opened(begun, {}, 90, mf.encode_definition(plan.flow))),
                               False)
                self.assertEqual([(event, follower.told) for event in follower.news()], [(None, 90)])
                follower.close()
                os.unlink(journal_path)

    @unittest.skipUnless(LINUX, "asks for /proc")
    def test_runs_are_started_watched_cancelled_and_resumed_over_http(self):
        slow = flow_json(task("a", command="echo to-$MINIFLOW_PARAM_WHOM; test -z \"$MINIFLOW_TOKEN\""),
                         task("b", "a", command="test -e go || { echo waits; sleep 60; }"),
                         params={"whom": {"required": True}})
        with Project({"slow": slow, "quick": flow_json(task("x"))}) as project, Served(project) as served:
            served.start("slow", "r", whom="you")
            wait_for(lambda: b"waits" in (served.ask("GET", "/api/v1/runs/r/tasks/b/log")[2] or b""), "the log of b")
            self.assertEqual(served.get("/api/v1/runs/r/tasks/a/log"), b"to-you\n")
            for method, path, body, status, words in [
                    ("POST", "/api/v1/runs", {"flow": "slow", "params": {"whom": "me"}, "run_id": "r"}, 409,
                     "run r exists"),
                    ("POST", "/api/v1/runs/r/resume", {}, 409, "is being run by process"),
                    ("POST", "/api/v1/runs", {"flow": "slow"}, 422, "params"),
                    ("POST", "/api/v1/runs/none/cancel", {}, 404, "no run none")]:
                told = served.ask(method, path, body)
                self.assertEqual(told[0], status, told)
                self.assertIn(words, told[2]["error"])
            engine = served.get("/api/v1/runs/r")["engine"]["pid"]
            self.assertEqual(os.getsid(engine), engine)
            self.assertEqual(served.ask("POST", "/api/v1/runs/r/cancel", {})[0], 202)
            self.assertEqual(served.ended("r"), "cancelled")
            self.assertEqual(served.ask("POST", "/api/v1/runs/r/cancel", {})[0], 409)
            project.write("go", "")
            self.assertEqual(served.ask("POST", "/api/v1/runs/r/resume")[0], 202)
            self.assertEqual(served.ended("r"), "success")
            self.assertEqual(served.ask("POST", "/api/v1/runs/last/resume", {})[0], 200)
            for n in range(3):
                served.start("quick", f"q{n}")
                served.ended(f"q{n}")
            listed = served.get("/api/v1/runs?limit=2&offset=1")
            self.assertEqual(([run["id"] for run in listed["runs"]], listed["total"]), (["q1", "q0"], 4))
            self.assertEqual(served.get("/api/v1/runs?flow=quick&status=success")["total"], 3)
            self.assertEqual(served.get("/api/v1/runs?flow=slow")["runs"][0]["tasks"], {"success": 2})
            tasks = served.get("/api/v1/runs/r/tasks")
            self.assertEqual([(t["id"], t["status"], len(t["attempts"])) for t in tasks["tasks"]],
                             [("a", "success", 1), ("b", "success", 2)])
            self.assertEqual(served.get("/api/v1/runs/r/tasks/b")["definition"]["depends_on"], ["a"])
            metrics = served.get("/metrics").decode()
            for line in ('miniflow_runs{status="success"} 4', 'miniflow_tasks{status="success"} 5',
                         'miniflow_run_duration_seconds_count{flow="quick",status="success"} 3',
                         'miniflow_http_requests_total{method="POST",route="/api/v1/runs",status="201"} 4'):
                self.assertIn(line + "\n", metrics)
            served.process.send_signal(signal.SIGTERM)
            self.assertEqual(served.process.wait(10), 0)

    def test_events_are_told_as_they_come_and_go_on_after_the_last_one_seen(self):
        with one(task("a"), task("b", "a", command="while test ! -e go; do sleep 0.02; done")) as project, \
                Served(project) as served:
            everything = socket.create_connection(("127.0.0.1", served.port), timeout=20)
            with everything:
                everything.sendall(f"GET /api/v1/events HTTP/1.0\r\nHost: localhost:{served.port}\r\n"
                                   "Authorization: Bearer tok\r\n\r\n".encode())
                seen = everything.recv(4096)
                while b": events" not in seen:
                    seen += everything.recv(4096)
                served.start("f", "r")
                reply = []
                reader = threading.Thread(target=lambda: reply.append(served.ask("GET", "/api/v1/runs/r/events")))
                reader.start()
                wait_for(lambda: served.get("/api/v1/runs/r/tasks/b")["status"] == "running", "b")
                project.write("go", "")
                reader.join(20)
                while b"run_finished" not in seen:
                    more = everything.recv(65536)
                    self.assertTrue(more, (seen[-500:], served.process.poll()))
                    seen += more
            status, headers, content = reply[0]
            self.assertEqual((status, headers["Content-Type"]), (200, "text/event-stream"))
            told = events_in(content)
            self.assertTrue(all({"run", "task", "status"} <= set(data) for _, data in told))
            self.assertEqual([told[0][1]["event"], told[-1][1]["event"], told[-1][1]["status"]],
                             ["state", "run_finished", "success"])
            self.assertEqual({(data["task"], data["status"]) for _, data in events_in(seen.partition(b"\r\n\r\n")[2])
                              if data["task"]}, {(name, state) for name in "ab" for state in ("running", "success")})
            last = told[-1][0]
            self.assertEqual(served.ask("GET", "/api/v1/runs/r/events", Last_Event_ID=last)[0], 204)
            again = events_in(served.ask("GET", "/api/v1/runs/r/events", Last_Event_ID="9999")[2])
            self.assertEqual([(data["event"], data["task"], data["status"]) for _, data in again], [
                ("state", None, "success"), ("attempt_started", "a", "running"), ("attempt_ended", "a", "success"),
                ("attempt_started", "b", "running"), ("attempt_ended", "b", "success"),
                ("run_finished", None, "success")])

    def test_streams_of_events_have_a_limit_of_their_own(self):
        with one(task("a")) as project, Served(project, constants={"MAX_STREAMS": 2}) as served:
            ask = (f"GET /api/v1/events HTTP/1.0\r\nHost: localhost:{served.port}\r\n"
                   "Authorization: Bearer tok\r\n\r\n").encode()
            with contextlib.ExitStack() as stack:
                for _ in range(2):
                    sock = stack.enter_context(socket.create_connection(("127.0.0.1", served.port), timeout=20))
                    sock.sendall(ask)
                    self.assertIn(b" 200 ", sock.recv(4096))
                self.assertIn(b" 429 ", served.raw(ask))
                self.assertEqual(served.get("/healthz"), {"status": "ok"})
            wait_for(lambda: b"miniflow_http_streams 0" in served.get("/metrics"), "those who went to be noticed", 5)

    @unittest.skipUnless(LINUX, "asks for /proc")
    def test_runs_outlive_the_server_however_it_dies(self):
        with one(task("a", command="while test ! -e go; do sleep 0.02; done; echo done")) as project:
            for number, name in enumerate(("SIGKILL", "SIGTERM", "SIGINT")):
                with Served(project) as served:
                    served.start("f", f"r{number}")
                    served.process.send_signal(getattr(signal, name))
                    self.assertEqual(served.process.wait(10), {"SIGKILL": -9, "SIGTERM": 0, "SIGINT": 130}[name])
            self.assertEqual({head["status"] for head in mf.Store(project.at("miniflow_output")).history()},
                             {"running"})
            project.write("go", "")
            for number in range(3):
                wait_for(lambda number=number: project.state(f"r{number}")["status"] == "success", "the run")
                self.assertEqual(project.log(f"r{number}", "a"), b"done\n")

    def test_what_is_no_http_or_too_much_of_it_is_answered_or_closed(self):
        with one(task("a")) as project, Served(project) as served:
            host = f"Host: 127.0.0.1:{served.port}\r\n".encode()
            for name, content, wanted in [
                    ("70 kB of address", b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n" + host + b"\r\n", b" 414 "),
                    ("10 kB of address", b"GET /" + b"x" * 10_000 + b" HTTP/1.1\r\n" + host + b"\r\n", b" 414 "),
                    ("120 headers", b"GET / HTTP/1.1\r\n" + host + b"".join(b"X-%d: 1\r\n" % n
                                                                            for n in range(120)) + b"\r\n", b" 431 "),
                    ("a header of 100 kB", b"GET / HTTP/1.1\r\n" + host + b"X: " + b"y" * 100_000 + b"\r\n\r\n",
                     b" 431 "),
                    ("headers of 1 MB", b"GET / HTTP/1.1\r\n" + host + b"".join(b"X-%d: %s\r\n" % (n, b"y" * 60_000)
                                                                                for n in range(20)), b" 431 "),
                    ("huge length", b"POST / HTTP/1.1\r\n" + host + b"Content-Length: 100000000000\r\n\r\n", b" 413 "),
                    ("negative length", b"POST /api/v1/runs HTTP/1.1\r\n" + host + b"Content-Length: -1\r\n\r\n",
                     b" 400 "),
                    ("two lengths", b"POST / HTTP/1.1\r\n" + host + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
                     b" 400 "),
                    ("chunked", b"POST / HTTP/1.1\r\n" + host
                     + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", b" 411 "),
                    ("garbage", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b" 400 "),
                    ("an unknown method", b"FOO / HTTP/1.1\r\n" + host + b"\r\n", b" 501 "),
                    ("an unknown version", b"GET / HTTP/9.9\r\n" + host + b"\r\n", b" 505 "),
                    ("a whole address", b"GET http://evil/ HTTP/1.1\r\n" + host + b"\r\n", b" 400 "),
                    ("a line in a header", b"GET /healthz HTTP/1.1\r\n" + host + b"Bad header\r\n\r\n", b" "),
                    ("nothing", b"\r\n\r\n", b""), ("HEAD", b"HEAD / HTTP/1.1\r\n" + host + b"\r\n", b" 200 ")]:
                with self.subTest(name):
                    told = served.raw(content)
                    self.assertIn(wanted, told.partition(b"\r\n")[0])
                    self.assertNotRegex(told, b"(?i)traceback|\r\nserver:|python")
                    if name == "HEAD":
                        self.assertTrue(told.endswith(b"\r\n\r\n"))
            self.assertEqual(served.get("/healthz"), {"status": "ok"})
            served.process.terminate()
            self.assertEqual(served.process.communicate(timeout=10)[1], b"")

    def test_a_client_that_drips_is_cut_off_and_a_crowd_of_idle_ones_keeps_nobody_out(self):
        with one(task("a")) as project, Served(project, constants={"READ_S": 1.5, "_SILENT_S": 0.3}) as served:
            began = time.monotonic()
            for head in (b"GET / HTTP/1.1\r\nX: ", f"POST /api/v1/runs HTTP/1.0\r\nHost: localhost:{served.port}\r\n"
                         "Authorization: Bearer tok\r\nContent-Type: application/json\r\n"
                         "Content-Length: 900\r\n\r\n".encode()):
                with socket.create_connection(("127.0.0.1", served.port), timeout=0.1) as sock:
                    sock.sendall(head)
                    told = None
                    while told is None:
                        with contextlib.suppress(socket.timeout):
                            with contextlib.suppress(ConnectionError):
                                sock.sendall(b"y")
                            told = sock.recv(100)
                            self.assertTrue(told == b"" or b" 408 " in told, told)
            self.assertLess(time.monotonic() - began, 8)
            with contextlib.ExitStack() as stack:
                idle = [stack.enter_context(socket.create_connection(("127.0.0.1", served.port), timeout=20))
                        for _ in range(200)]
                self.assertEqual(served.get("/healthz"), {"status": "ok"})
                for sock in idle:                  # sooner or later each is told that there is no room, or just closed
                    told = sock.recv(1000)
                    self.assertTrue(told == b"" or b" 503 " in told, told)

    def test_where_it_listens_and_who_gets_the_token(self):
        with one(task("a")) as project:
            env = {name: value for name, value in os.environ.items() if name != "MINIFLOW_TOKEN"}
            for args, words in [(("--host", "0.0.0.0"), "MINIFLOW_TOKEN"), (("--host", "::"), "MINIFLOW_TOKEN"),
                                (("--host", "no.such.host.invalid"), "give an address"),
                                (("--port", "x"), "port number"),
                                (("--port", "70000"), "port number")]:
                done = project.cli("serve", *args, env=env)
                self.assertEqual(done.returncode, 2, done.stderr)
                self.assertIn(words, done.stderr)
            done = project.cli("serve", env={**env, "MINIFLOW_TOKEN": "two words"})
            self.assertEqual((done.returncode, "MINIFLOW_TOKEN" in done.stderr), (2, True))
            with Served(project, token=None) as served:                # made here, and told in the fragment
                self.assertGreater(len(served.token), 40)
                self.assertEqual(served.ask("GET", "/api/v1/runs")[0], 200)
                self.assertEqual(served.ask("GET", "/api/v1/runs", Authorization="Bearer x")[0], 401)
                done = project.cli("serve", "--port", str(served.port), env=env)
                self.assertEqual(done.returncode, 2)
                self.assertIn("can't listen there", done.stderr)
            with Served(project, "--host", "localhost") as served:       # the user's own is not printed
                self.assertNotIn("tok", served.address)
            if socket.has_ipv6:
                with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
                    with Served(project, "--host", "::1", host="::1") as served:
                        self.assertTrue(served.address.startswith("http://[::1]:"))
                        self.assertEqual(served.get("/healthz"), {"status": "ok"})

    def test_secrets_are_in_no_answer(self):
        flow = flow_json(task("a", command="echo \"key is $API_KEY.\"; echo \"x=$API_KEY\" > $MINIFLOW_OUTPUT"),
                         task("b", command="echo $API_KEY; exit 3"), secrets=["API_KEY"],
                         env={"OTHER": "${{ env.API_KEY }}"})
        with Project({"f": flow}) as project, Served(project, env={"API_KEY": "hunter2hunter2"}) as served:
            served.start("f", "r")
            served.ended("r")
            self.assertEqual(served.get("/api/v1/runs/r/tasks/a/log"), b"key is ***.\n")
            self.assertEqual(served.get("/api/v1/runs/r/tasks/a/log?offset=12"), b".\n")
            for path in ("/api/v1/runs/r", "/api/v1/runs/r/tasks", "/api/v1/runs/r/tasks/a", "/api/v1/flows/f",
                         "/api/v1/flows",
                         "/api/v1/runs/r/events", "/metrics",
                         *(f"/api/v1/runs/r/tasks/a/log?offset={n}&limit=6" for n in range(25))):
                self.assertFalse(re.search("hunt|nter2", str(served.get(path))), path)
            status, _, told = served.ask("POST", "/api/v1/runs", {"flow": "f", "params": {"x": "hunter2hunter2"}})
            self.assertEqual((status, "hunter2" in json.dumps(told)), (422, False))

    def test_flows_are_told_with_their_runs_and_a_flow_in_python_hurts_nobody(self):
        with Project({"good": flow_json(task("a"), params={"n": 1}),
                      "bad": '{"name": "bad", "tasks": [{}]}'}) as project:
            project.write("flows/exits.py", "import os\nos._exit(3)\n")
            project.write("flows/py.py", "from miniflow import task, Workflow\nprint('noise')\n@task\ndef step(ctx):\n"
                          "    return {'n': 1}\nworkflow = Workflow([step], name='py')\n")
            with Served(project) as served:
                served.start("good", "r1")
                self.assertEqual(served.ended("r1"), "success")
                flows = {flow["name"]: flow for flow in served.get("/api/v1/flows")["flows"]}
                self.assertEqual(set(flows), {"bad", "exits", "good", "py"})
                self.assertEqual((flows["good"]["last_run"]["id"], flows["good"]["last_run"]["tasks"]),
                                 ("r1", {"success": 1}))
                self.assertIn("exit code 3", flows["exits"]["error"][0])
                self.assertEqual((flows["py"]["tasks"], flows["py"]["error"]), (1, None))
                self.assertEqual(served.get("/api/v1/flows?limit=1&offset=2")["flows"][0]["name"], "good")
                self.assertEqual([t["id"] for t in served.get("/api/v1/flows/py")["definition"]["tasks"]], ["step"])
                self.assertFalse(served.get("/api/v1/flows/bad/validate")["valid"])
                told = served.ask("POST", "/api/v1/flows/good/validate", {"params": {"m": 1}})[2]
                self.assertEqual((told["valid"], "no such param" in told["problems"][0]), (False, True))
                self.assertTrue(served.ask("POST", "/api/v1/flows/good/validate", {"params": {"n": 2}})[2]["valid"])
                served.start("py", "p1")
                self.assertEqual(served.ended("p1"), "success")
                project.write("flows/good.json", json.dumps(flow_json(task("a"), task("b"))))
                self.assertEqual(served.get("/api/v1/flows/good")["tasks"], 2)

    def test_a_flow_that_takes_its_time_to_be_imported_keeps_nobody_else_waiting(self):
        with Project({"f": flow_json(task("a"))}) as project:
            project.write("flows/slow.py", "import os, time\nopen('began', 'a').write('x')\n"
                          "while not os.path.exists('go'):\n    time.sleep(0.01)\nraise SystemExit(3)\n")
            web = self.web(project)
            old, there = os.getcwd(), []
            os.chdir(project.path)
            self.addCleanup(os.chdir, old)
            asking = threading.Thread(target=lambda: there.append(self.ask(web, "GET", "/api/v1/flows/slow")[0]))
            asking.start()
            wait_for(lambda: os.path.exists("began"), "the import")
            self.assertEqual(self.ask(web, "GET", "/healthz")[0].status, 200)
            self.assertEqual(self.ask(web, "GET", "/api/v1/flows/f")[0].status, 200)
            self.assertTrue(asking.is_alive())
            project.write("go", "")
            asking.join(30)
            self.assertEqual((there[0].status, project.read("began")), (200, "x"))
            self.ask(web, "GET", "/api/v1/flows/slow")
            self.assertEqual(project.read("began"), "x", "what can't be imported is not tried each time")

    def test_of_two_requests_for_one_run_one_makes_it_and_the_other_is_refused(self):
        with Project({"f": flow_json(task("a"), params={"q": 0})}) as project:
            web, told = self.web(project), []
            asked = [threading.Thread(target=lambda n=n: told.append((self.ask(
                web, "POST", "/api/v1/runs", body=json.dumps({"flow": "f", "run_id": "r", "params": {"q": n}}).encode()
                )[0].status, n))) for n in range(3)]
            for thread in asked:
                thread.start()
            for thread in asked:
                thread.join(60)
            self.assertEqual(sorted(status for status, _ in told), [201, 409, 409])
            wait_for(lambda: project.main("show", "r", "--json")[0] == 0, "the run")
            shown = json.loads(project.main("show", "r", "--json")[1])
            self.assertEqual(shown["params"], {"q": next(n for status, n in told if status == 201)})

    def test_a_scheduled_flow_in_python_can_neither_end_the_server_nor_read_its_token(self):
        with Project({"f": flow_json(task("a", command="env"), schedule={"every_s": 1})}) as project:
            project.write("flows/evil.py", "# schedule\nimport os\nos._exit(7)\n")
            with Served(project, token="tok1234567") as served:
                log = project.at("miniflow_output", "logs")
                wait_for(lambda: glob.glob(os.path.join(log, "f-*", "a.1.log")), "a scheduled run")
                self.assertIsNone(served.process.poll())
            for path in glob.glob(os.path.join(log, "f-*", "a.1.log")):
                with open(path, encoding="utf-8", errors="replace") as file:
                    self.assertNotIn("tok1234567", file.read())

    def test_an_interrupted_and_a_damaged_run_are_listed_as_what_they_are(self):
        with one(task("a", command="sleep 60")) as project, Served(project) as served:
            served.start("f", "r")
            wait_for(lambda: served.get("/api/v1/runs/r")["tasks"]["a"]["status"] == "running", "a")
            os.kill(served.get("/api/v1/runs/r")["engine"]["pid"], signal.SIGKILL)
            self.assertEqual(served.ended("r"), "interrupted")
            self.assertEqual(served.get("/api/v1/runs?status=interrupted")["total"], 1)
            told = events_in(served.get("/api/v1/runs/r/events"))
            self.assertEqual((told[-1][1]["status"], told[-1][1]["tasks"]), ("interrupted", {"a": "running"}))
            project.write("miniflow_output/runs/bad.json", "{}")
            self.assertEqual({run["id"]: run["status"] for run in served.get("/api/v1/runs")["runs"]},
                             {"r": "interrupted", "bad": "damaged"})
            status, _, told = served.ask("GET", "/api/v1/runs/bad")
            self.assertEqual((status, "nothing was changed" in told["error"]), (500, True))


class T40Library(unittest.TestCase):

    def test_a_store_lists_finds_and_removes_runs(self):
        def step(ctx):
            if ctx.get("fail"):
                raise ValueError("asked to")
            return {"n": 1}

        with tempfile.TemporaryDirectory() as path:
            for store in (mf.JSONStateStore(path), mf.MemoryStateStore()):
                workflow = mf.Workflow([mf.task(step)], name="demo")
                self.assertEqual((store.list_runs(), store.get_run("a"), store.get_task("a", "step")), ([], None, None))
                workflow.run_sync("a", store)
                time.sleep(0.01)
                with self.assertRaises(mf.FlowFailed):
                    workflow.run_sync("b", store, {"fail": True})
                self.assertEqual([run["id"] for run in store.list_runs()], ["b", "a"])
                self.assertEqual([run["id"] for run in store.list_runs("failed")], ["b"])
                self.assertLessEqual({"id", "flow", "status", "started", "finished", "duration_s", "params", "ctx",
                                      "tasks", "miniflow", "definition"}, set(store.get_run("a")))
                self.assertEqual(store.get_task("a", "step")["output"], {"n": 1})
                self.assertEqual((store.get_task("a", "no"), store.get_run("../x")), (None, None))
                with self.assertRaises(mf.UsageError):
                    store.list_runs("good")
                self.assertEqual((store.cleanup_old_runs(days=1), len(store.list_runs())), (0, 2))
                self.assertEqual((store.delete_run("a"), store.delete_run("a"), store.delete_run("../x")),
                                 (True, False, False))
                self.assertEqual((store.cleanup_old_runs(days=0), store.list_runs()), (1, []))

    def test_without_a_store_runs_are_kept_below_data(self):
        with one(task("unused")) as project:
            before = os.getcwd()
            os.chdir(project.path)
            try:
                mf.Workflow([mf.task(name="a")(lambda ctx: {"a": 1})]).run_sync("r")
            finally:
                os.chdir(before)
            self.assertEqual(os.listdir(project.at("data/runs")), ["r.json"])
            self.assertEqual(json.loads(project.main("show", "r", "-o", "data", "--json")[1])["ctx"], {"a": 1})
            self.assertEqual(project.main("resume", "r", "-o", "data")[0], 0)

    def test_a_workflow_shows_its_graph(self):
        a, b = (mf.task(name=name)(len) for name in "ab")
        a >> b
        text = mf.Workflow([a, b], name="demo").visualize()
        self.assertIn("b  function builtins:len  <- a", text)
        self.assertRegex(text, r"(?m)^  a\n  [▼v]\n  b$")

    def test_a_program_lists_and_runs_flows_as_the_readme_shows(self):
        with Project({"b": flow_json(task("x", command="exit 1")),
                      "a": flow_json(task("x", command="echo hi")), "bad": "{"}) as project:
            mini = mf.MiniFlow(flows_dir=project.at("flows"), tasks_dir=project.at("tasks"),
                               output_dir=project.at("out"))
            self.assertEqual(mini.list_flows(), ["a", "b", "bad"])
            path = mini.execute_flow("a", dry_run=True)
            self.assertIsInstance(path, str)
            self.assertEqual(os.path.dirname(path), project.at("out", "scripts"))
            self.assertFalse(os.path.exists(project.at("out", "runs")))
            self.assertTrue(os.path.exists(mini.execute_flow("a", {"any": 1})))
            self.assertEqual(len(os.listdir(project.at("out", "runs"))), 1)
            with self.assertRaises(mf.FlowFailed) as caught:
                mini.execute_flow("b")
            self.assertEqual(caught.exception.run.tasks["x"].reason, "exit 1")
            with self.assertRaises(FileNotFoundError):
                mini.execute_flow("nope")
            with self.assertRaises(ValueError):
                mini.execute_flow("bad")

    def test_run_returns_the_run_whether_it_succeeded_or_not(self):
        with one(task("a", command='echo "{\\"n\\": 1}" > $MINIFLOW_OUTPUT'),
                 task("b", command="exit 2")) as project:
            run = project.run(run_id="r")
            self.assertEqual(
                (run.ok, run.status, run.id, run.ctx, run.tasks["a"].status, run.tasks["b"].reason),
                (False, "failed", "r", {"n": 1}, "success", "exit 2"))

    def test_arguments_that_make_no_sense_are_refused(self):
        with one(task("a")) as project:
            for options in ({"max_parallel": 0}, {"max_parallel": -1}, {"max_parallel": "x"}, {"max_parallel": True},
                            {"run_id": 5}, {"params": [1]}):
                with self.subTest(options=options), self.assertRaises(mf.UsageError):
                    project.run(**options)

    def test_scripts_have_to_lie_below_the_tasks_directory(self):
        with Project(scripts={"ok.py": "", "sub/deep.py": ""}) as project:
            project.write("out.py", "")
            os.symlink(project.at("out.py"), project.at("tasks/link.py"))
            os.symlink(project.at("tasks/ok.py"), project.at("tasks/inner.py"))
            check = mf.script_checker(project.at("tasks"))
            for path in ("ok.py", "sub/deep.py", "sub/../ok.py", "inner.py"):
                self.assertIsNone(check(path))
            for path in ("../out.py", "link.py", project.at("out.py"), project.at("tasks/ok.py"), ".."):
                self.assertIn("outside the tasks directory", check(path))
            self.assertIn("did you mean ok.py?", check("okk.py"))
            self.assertIn("is not a file", check("sub"))


class DyingDisk(mf.Disk):
    """A Disk that kills its process at call number `at`."""

    def __init__(self, at):
        self.left = at

    def call(self):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


for _name in ("open", "write", "replace", "unlink", "truncate", "make_dir"):
    def _dying(self, *args, _call=getattr(mf.Disk, _name), **options):
        self.call()
        return _call(self, *args, **options)
    setattr(DyingDisk, _name, _dying)


class DyingStore(mf.Store):
    """A Store of a DyingDisk that may die of a look, too: so between the start of an engine and its run."""

    looks = 0

    def exists(self, run_id):
        self.looks += 1
        if self.looks <= 3:                    # how often it looks until the run is there differs
            self.disk.call()
        return super().exists(run_id)


class T41Daemon(unittest.TestCase):
    RAN = task("x", command="echo $MINIFLOW_RUN_ID >> ran")

    @contextlib.contextmanager
    def scheduled(self, *tasks, flows=None, **fields):
        """Give a project with a flow f, its Scheduler, its notes, and a clock that stands an hour ago."""
        with Project({"f": flow_json(*(tasks or [self.RAN]), **fields), **(flows or {})}) as project:
            before, clock, notes = os.getcwd(), [int(time.time()) // 3600 * 3600 - 3600], []
            os.chdir(project.path)
            try:
                yield project, mf.Scheduler(mf.MiniFlow(), lambda: clock[0], notes.append), notes, clock
            finally:
                os.chdir(before)
                locks = project.at("miniflow_output", "runs", "*.lock")
                wait_for(lambda: not any(map(os.path.isfile, glob.glob(locks))), "the ends of the runs")

    @staticmethod
    def ended(project, run_id):
        """Wait for the end of a run and return its state."""
        def state():
            with contextlib.suppress(OSError, ValueError):
                found = project.state(run_id)
                return found if found["status"] != "running" else None
        return wait_for(state, f"the end of {run_id}")

    def test_a_broken_flow_is_read_again_when_it_changes_or_after_a_while(self):
        with Project({"f": flow_json(task("a", script="late.py"), schedule={"every_s": 1})}) as project:
            mini = mf.MiniFlow(project.at("flows"), project.at("tasks"), project.at("miniflow_output"))
            notes, read, path = [], [], project.at("flows/f.json")

            def load(path, flow):
                read.append(flow)
                return mf.load_flow(path, flow, project.at("tasks")).flow

            scheduler = mf.Scheduler(mini, note=notes.append, load=load)
            for _ in range(3):
                self.assertIsNone(scheduler._schedules("f", path))
            self.assertEqual((len(read), len(notes)), (1, 1))
            project.write("tasks/late.py", "")
            saved, mf.AGAIN_S = mf.AGAIN_S, 0.0
            self.addCleanup(setattr, mf, "AGAIN_S", saved)
            project.write("flows/f.json", project.read("flows/f.json") + "\n")
            self.assertEqual(scheduler._schedules("f", path)[0].every_s, 1)
            os.unlink(project.at("tasks/late.py"))
            project.write("flows/f.json", project.read("flows/f.json") + "\n")
            self.assertIsNone(scheduler._schedules("f", path))
            project.write("tasks/late.py", "")
            self.assertIsNotNone(scheduler._schedules("f", path), "the file is the same, and time has passed")

    def test_ten_ticks_at_once_start_one_run_for_a_time_that_is_due(self):
        due = int(time.time()) + 3
        with one(self.RAN, params={"n": 1}, schedule={"at": mf.scheduled_text(due), "params": {"n": 2}}) as project:
            self.assertEqual(project.cli("tick").stdout, "")   # seen for the first time
            wait_for(lambda: time.time() >= due, "the time")
            ticks = [project.start("tick") for _ in range(10)]
            done = [tick.communicate(timeout=60) + (tick.returncode,) for tick in ticks]
            run_id = f"f-{re.sub('[-:]', '', mf.scheduled_text(due))}"
            self.assertEqual(sorted(done), sorted([(b"", b"", 0)] * 9 + [(f"{run_id}\n".encode(), b"", 0)]))
            state = self.ended(project, run_id)
            self.assertEqual((state["status"], state["params"], state["scheduled_time"]),
                             ("success", {"n": 2}, mf.format_time(due)))
            self.assertEqual(project.lines("ran"), [run_id])
            self.assertIn(f"run {run_id}: success", project.read(f"miniflow_output/logs/{run_id}/engine.log"))
            self.assertEqual(os.listdir(project.at("miniflow_output", "runs")), [f"{run_id}.json"])

    def test_a_tick_killed_at_any_point_leaves_what_the_next_one_finishes_and_no_run_comes_twice(self):
        with self.scheduled(schedule={"every_s": 60, "overlap": "allow"}) as (project, scheduler, _, clock):
            scheduler.turn()
            expected, died, point = [], True, 0
            while died:
                point += 1
                clock[0] += 60
                expected.append(mf.scheduled_id("f", clock[0]))
                pid = os.fork()
                if not pid:
                    with contextlib.suppress(BaseException):
                        mini = mf.MiniFlow()
                        mini.store = DyingStore("miniflow_output", DyingDisk(point))
                        mf.Scheduler(mini, lambda: clock[0]).turn()
                        os._exit(0)
                    os._exit(1)
                status = os.waitpid(pid, 0)[1]
                self.assertIn(status, (0, signal.SIGKILL))
                died = status != 0
                scheduler.turn()
                self.assertEqual(scheduler.due(), [])
            self.assertGreater(point, 12)
            for run_id in expected:
                self.assertEqual(self.ended(project, run_id)["status"], "success")
            wait_for(lambda: not glob.glob("miniflow_output/runs/*.lock"), "the ends of the engines")
            self.assertEqual(sorted(project.lines("ran")), expected)

    def test_a_disk_that_fails_at_any_call_delays_a_run_and_neither_loses_nor_doubles_it(self):
        with self.scheduled(schedule={"every_s": 60, "overlap": "allow"}) as (project, scheduler, _, clock):
            scheduler.turn()
            expected, point = [], 0
            disk = FaultyDisk()
            while disk.calls >= point:
                point += 2
                clock[0] += 60
                expected.append(mf.scheduled_id("f", clock[0]))
                disk = FaultyDisk(point)
                mini = mf.MiniFlow()
                mini.store = mf.Store("miniflow_output", disk)
                with contextlib.suppress(mf.StateError, OSError):
                    mf.Scheduler(mini, lambda: clock[0], list().append).turn()
                self.assertEqual((scheduler.turn().failed, scheduler.due()), ((), []))
            self.assertGreater(point, 10)
            for run_id in expected:
                self.assertEqual(self.ended(project, run_id)["status"], "success")
            self.assertEqual(sorted(project.lines("ran")), expected)

    def test_an_engine_for_a_run_that_is_there_does_nothing_even_if_that_has_failed(self):
        with one(task("x", command="echo >> ran; exit 3")) as project:
            words = [sys.executable, "-c", mf.SCHEDULED_PROGRAM, ENGINE, "1795219200", "-f", "flows", "-t", "tasks",
                     "-o", "miniflow_output", "run", project.at("flows/f.json"), "--run-id", "r"]
            codes = [subprocess.run(words, cwd=project.path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
                     for _ in range(2)]
            self.assertEqual([done.returncode for done in codes], [1, 2])
            self.assertEqual(codes[1].stderr, b"run r has been started already\n")
            self.assertEqual(len(project.lines("ran")), 1)
            self.assertEqual(project.state("r")["scheduled_time"], "2026-11-21T00:00:00.000000Z")

    def test_a_broken_flow_is_named_once_and_stops_no_other(self):
        broken = {"name": "g", "schedule": "61 * * * *", "tasks": [task("a")]}
        flows = {"broken": broken, "other": '{"name": '}
        with self.scheduled(schedule={"every_s": 60, "overlap": "allow"}, flows=flows) as (
                project, scheduler, notes, clock):
            for _ in range(3):
                started = scheduler.turn().started
                clock[0] += 60
            self.assertEqual(len(started), 1)
            self.assertEqual(notes, ['flow broken can\'t be scheduled: flows/broken.json:3:2: schedule: "61" at '
                                     "column 1 is no minute; give 0 to 59"])
            project.write("flows/broken.json", json.dumps({**broken, "schedule": {"every_s": 60}}))
            scheduler.turn()
            clock[0] += 60
            self.assertEqual([run_id.partition("-")[0] for run_id in scheduler.turn().started], ["broken", "f"])

    def test_what_waits_is_started_by_the_end_of_the_run_and_goes_on_no_further(self):
        with self.scheduled(task("x", command="until [ -e go ]; do sleep 0.02; done"),
                            schedule={"every_s": 60, "overlap": "queue"}) as (project, scheduler, _, clock):
            started = []
            for _ in range(5):
                started += scheduler.turn().started
                clock[0] += 60
            self.assertEqual(len(started), 1)
            waits = mf.scheduled_id("f", clock[0] - 60)
            self.assertEqual(scheduler.due(), [])
            self.assertFalse(os.path.exists(f"miniflow_output/runs/{waits}.json"))
            project.write("go", "")
            self.assertEqual(self.ended(project, waits)["status"], "success")
            wait_for(lambda: not glob.glob("miniflow_output/runs/*.lock"), "the end of the engine")
            self.assertEqual(sorted(row["id"] for row in json.loads(project.cli("runs", "--json").stdout)),
                             sorted([*started, waits]))

    def test_a_run_that_cannot_be_made_is_told_and_tried_again(self):
        with self.scheduled(schedule={"every_s": 60}) as (project, scheduler, notes, clock):
            scheduler.turn()
            clock[0] += 60
            run_id = mf.scheduled_id("f", clock[0])
            os.mkdir(f"miniflow_output/runs/{run_id}.lock")
            self.assertEqual(scheduler.turn()[:2], ((), (run_id,)))
            self.assertEqual(notes, [f"run {run_id} is not there: its engine ended with exit code 74; see "
                                     + project.at("miniflow_output", "logs", run_id, "engine.log")])
            os.rmdir(f"miniflow_output/runs/{run_id}.lock")
            self.assertEqual(scheduler.turn()[:2], ((run_id,), ()))

    def test_a_damaged_record_starts_nothing_and_is_left_as_it_is(self):
        with one(self.RAN, schedule="* * * * *") as project:
            for content in ("{", '{"format": 2, "flows": {}}',
                            '{"format": 1, "flows": {"f": {"seen": {"a": "?"}}}}'):
                project.write("miniflow_output/schedule.json", content)
                done = project.cli("tick")
                self.assertEqual((done.returncode, done.stdout), (74, ""))
                self.assertRegex(done.stderr, r"schedule.json: it is damaged \(.*\); nothing was started; restore it")
                self.assertEqual(project.read("miniflow_output/schedule.json"), content)

    def test_asking_what_is_due_starts_nothing_and_list_tells_what_comes(self):
        with self.scheduled(schedule={"cron": "@hourly", "catchup": "latest"}) as (project, scheduler, _, clock):
            scheduler.turn()
            clock[0] += 3700
            expected = [mf.scheduled_id("f", clock[0] - 100)]
            record = project.read("miniflow_output/schedule.json")
            self.assertEqual((scheduler.due(), scheduler.due()), (expected, expected))
            now = time.time()
            code, out, _ = project.main("tick", "--dry-run")
            self.assertEqual((code, out), (0, f"{mf.scheduled_id('f', int(now) // 3600 * 3600)}\n"))
            self.assertEqual(project.read("miniflow_output/schedule.json"), record)
            self.assertEqual(os.listdir("miniflow_output/runs"), [])
            row, = json.loads(project.main("list", "--json")[1])
            hours = [mf.scheduled_text(int(now) // 3600 * 3600 + 3600 * n) for n in range(1, 6)]
            self.assertEqual((row["schedule"], row["next"]), ({"cron": "@hourly", "catchup": "latest"}, hours))
            self.assertIn(hours[0], project.main("list")[1])

    def test_ids_are_those_of_one_flow_and_time_and_can_be_ids(self):
        ids = [mf.scheduled_id(flow, 0) for flow in ("etl", "a.b", "a_b", "x" * 128, "x" * 127 + "y")]
        self.assertEqual(ids[0], "etl-19700101T000000Z")
        self.assertEqual(len(set(ids)), 5)
        for run_id in ids:
            mf.check_run_id(run_id)

    def test_a_loop_takes_turns_until_it_is_told_to_stop_and_says_once_what_is_wrong(self):
        with self.scheduled(schedule={"every_s": 5}) as (project, scheduler, notes, clock):
            clock[0] += 3595
            waits = []

            def rest(seconds):
                waits.append(seconds)
                clock[0] += int(seconds)
                if len(waits) == 2:
                    project.write("miniflow_output/schedule.json", "{")
                if len(waits) == 4:
                    os.remove("miniflow_output/schedule.json")
                return len(waits) == 6

            mf.schedule_loop(scheduler, rest, lambda: clock[0], notes.append)
            self.assertEqual(waits, [5, 5, mf.LOOK_S, mf.LOOK_S, 5, 5])
            self.assertEqual(len([note for note in notes if "it is damaged" in note]), 1)
            self.assertGreaterEqual(len(glob.glob("miniflow_output/runs/*.json")), 1)

    def test_a_flow_in_python_may_have_a_schedule(self):
        with self.scheduled() as (project, scheduler, notes, clock):
            project.write("flows/p.py", "from miniflow import Workflow, task\n@task\ndef a(ctx): pass\n"
                          "workflow = Workflow([a], schedule=[{'every_s': 60}, '0 6 * * *'])\n")
            scheduler.turn()
            clock[0] += 60
            run_id, = scheduler.turn().started
            self.assertEqual(self.ended(project, run_id)["status"], "success", notes)
        with self.assertRaises(mf.FlowError) as caught:
            mf.Workflow([mf.task(lambda ctx: None, name="a")], name="w", schedule="0 25 * * *")
        self.assertEqual(str(caught.exception), 'workflow w: schedule.cron: "25" at column 3 is no hour; give 0 to 23')


class T46Bundle(unittest.TestCase):

    def project(self, **fields):
        """Return a Project whose flow f has a script with a neighbour, data, a package, and a flow within it."""
        project = Project({
            "f": flow_json(task("a", script="in/a.py", args=["${{ params.p }}"]), task("b", "a", flow="g"),
                           params={"p": "x"}, **fields),
            "g": {"name": "g", "tasks": [task("c", command="echo '{\"c\": 1}' > $MINIFLOW_OUTPUT"),
                                         task("d", "c", script="top.py")]},
            "other": flow_json(task("z"))}, {
            "in/a.py": """
                import json, os, sys
                import near
                from pack import deep
                here = os.path.dirname(os.path.abspath(__file__))
                assert sys.path[0] == here, sys.path
                with open(os.path.join(here, "..", "data.txt")) as file, open("seen.json", "w") as seen:
                    json.dump([near.N, deep.N, file.read(), sys.argv[1:]], seen)
                if not os.path.exists("go"): sys.exit(3)
                """,
            "in/near.py": "N = 1", "in/pack/__init__.py": "", "in/pack/deep.py": "N = 2", "data.txt": "d\n",
            "top.py": "import os; open('top', 'w').close()", ".env": "PASSWORD=x", ".git/config": "",
            "__pycache__/x.pyc": ""})
        return project

    def bundle(self, project, name="f"):
        code, out, err = project.main("bundle", name)
        self.assertEqual((code, out), (0, name + ".pyz\n"), err)
        return err

    def start(self, project, *args, file="f.pyz", cwd="", python=("-I",), **env):
        """Start a bundle with next to no environment; return its Popen."""
        os.makedirs(project.at(cwd), exist_ok=True)
        env = {"PATH": os.environ["PATH"], "XDG_CACHE_HOME": project.at("cache"), **env}
        return subprocess.Popen([sys.executable, *python, project.at(file), *args], cwd=project.at(cwd), env=env,
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def ended(self, process):
        out, err = process.communicate(timeout=60)
        return process.returncode, out.decode(), err.decode()

    def go(self, project, *args, **options):
        """Run a bundle; return exit code, stdout and stderr."""
        return self.ended(self.start(project, *args, **options))

    def unpacked(self, project):
        """Return the directory to which a bundle was unpacked."""
        (name,) = os.listdir(project.at("cache/miniflow"))
        return project.at("cache/miniflow", name)

    def test_the_same_flow_gives_the_same_bytes_also_from_within_a_bundle(self):
        with self.project() as project:
            err = self.bundle(project)
            with open(project.at("f.pyz"), "rb") as file:
                content = file.read()
            self.assertIn("left out, as their names begin with a dot: .env, .git\n9 files, ", err)
            os.utime(project.at("tasks/top.py"), (1, 1))
            self.bundle(project)
            self.assertEqual(self.go(project, "bundle", "-o", "again.pyz")[:2], (0, "again.pyz\n"))
            for name in ("f.pyz", "again.pyz"):
                with open(project.at(name), "rb") as file:
                    self.assertEqual(file.read(), content)
            self.assertEqual(os.stat(project.at("f.pyz")).st_mode & 0o777, 0o755)
            with zipfile.ZipFile(project.at("f.pyz")) as archive:
                self.assertEqual(archive.namelist(), sorted(archive.namelist()))
                self.assertNotIn("flows/other.json", archive.namelist())
                self.assertIsNone(archive.testzip())

    def test_a_bundle_runs_where_there_is_nothing_but_python(self):
        with self.project() as project:
            self.bundle(project)
            os.mkdir(project.at("ro"))
            os.rename(project.at("f.pyz"), project.at("ro/f.pyz"))
            os.chmod(project.at("ro"), 0o555)
            shutil.rmtree(project.at("flows"))
            shutil.rmtree(project.at("tasks"))
            project.write("empty/go", "")
            for args in ((), ("-o", "out"), ("--no-fork",)):
                code, out, err = self.go(project, "run", *args, "--param", "p=a b", file="ro/f.pyz", cwd="empty")
                self.assertEqual(code, 0, err)
                self.assertEqual(json.loads(project.read("empty/seen.json")), [1, 2, "d\n", ["a b"]])
                os.unlink(project.at("empty/top"))
            self.assertEqual(sorted(os.listdir(project.at("empty"))), ["go", "miniflow_output", "out", "seen.json"])
            self.assertEqual(os.listdir(project.at("ro")), ["f.pyz"])
            for args, said in ((["list"], "f "), (["validate"], "g.json: ok"), (["graph"], "a  script in/a.py"),
                               (["show", "last"], "of flow f"), (["logs", "last"], "==> a"), (["runs"], "success"),
                               (["export", "g", "--to", "bash"], "#!/usr"), (["run", "g"], "g-"), (["--help"], None),
                               (["--version"], f"miniflow {mf.__version__}"), (["run", "h"], None)):
                code, out, err = self.go(project, *args, file="ro/f.pyz", cwd="empty")
                self.assertEqual(code, 3 if args == ["run", "h"] else 0, err)
                self.assertIn(said or "", out, args)

    def test_a_run_goes_on_where_the_directory_is_gone_and_with_a_newer_bundle(self):
        with self.project() as project:
            self.bundle(project)
            self.assertEqual(self.go(project, "run", "--run-id", "r", cwd="e")[0], 1)
            shutil.rmtree(project.at("cache"))
            code, _, err = self.go(project, "resume", "r", cwd="e")
            self.assertEqual(code, 1, err)
            self.assertNotIn("gone", err)
            flow = json.loads(project.read("flows/f.json"))
            project.write("flows/f.json", json.dumps({**flow, "tasks": [*flow["tasks"], task("new", "b")]}))
            project.write("tasks/in/near.py", "N = 5")
            project.write("e/go", "")
            self.bundle(project)
            code, _, err = self.go(project, "resume", "last", cwd="e")
            self.assertEqual(code, 0, err)
            self.assertIn("task new was added", err)
            self.assertEqual(json.loads(project.read("e/seen.json"))[0], 5)

    def test_a_newer_bundle_resumes_flows_within_flows_by_what_it_holds_of_them(self):
        flows = {"f": flow_json(task("s", flow="g")), "g": flow_json(task("s", flow="h"), name="g"),
                 "h": flow_json(task("a", command="false"), name="h")}
        with Project(flows) as project:
            self.bundle(project)
            os.mkdir(project.at("e"))
            self.assertEqual(self.go(project, "run", "--run-id", "r", cwd="e")[0], 1)
            project.write("flows/h.json", json.dumps(flow_json(task("a", command="true"), name="h")))
            self.bundle(project)
            code, _, err = self.go(project, "resume", "r", cwd="e")
            self.assertEqual(code, 0, err)

    def test_several_starts_at_once_and_one_that_is_killed_do_no_harm(self):
        kill = ("import os, runpy, signal, sys\n"
                "left, real = [int(sys.argv[2])], os.replace\n"
                "def replace(*names):\n"
                "    left[0] -= 1\n"
                "    left[0] < 0 and os.kill(os.getpid(), signal.SIGKILL)\n"
                "    real(*names)\n"
                "os.replace, sys.argv = replace, [sys.argv[1], 'list']\n"
                "runpy.run_path(sys.argv[0], run_name='__main__')\n")
        with self.project() as project:
            self.bundle(project)
            for n in (0, 1, 3, 4):             # of what is lacking yet
                done = subprocess.run([sys.executable, "-c", kill, project.at("f.pyz"), str(n)],
                                      env={"XDG_CACHE_HOME": project.at("cache")}, stderr=subprocess.PIPE)
                self.assertEqual(done.returncode, -signal.SIGKILL, done.stderr)
            self.assertEqual(self.go(project, "validate", cwd="e")[0], 0)
            shutil.rmtree(project.at("cache"))
            project.write("e/go", "")
            for process in [self.start(project, "run", cwd="e") for _ in range(4)]:
                code, _, err = self.ended(process)
                self.assertEqual(code, 0, err)
            self.assertEqual(len(os.listdir(self.unpacked(project))), 4)     # the parts are gone; __pycache__

    def test_what_is_not_as_it_should_be_is_put_anew(self):
        with self.project() as project:
            self.bundle(project)
            self.go(project, "list")
            folder = self.unpacked(project)
            script = os.path.join(folder, "tasks", "top.py")
            self.assertEqual({os.stat(os.path.join(place, name)).st_mode & 0o077
                              for place, folders, files in os.walk(project.at("cache/miniflow/"))
                              for name in files if "__pycache__" not in place}, {0})
            before = project.read("tasks/top.py")
            for change in (lambda: os.unlink(script), lambda: project.write(script, "x"), lambda: project.write(
                    script, ""), lambda: (os.unlink(script), os.symlink(project.at("tasks/top.py"), script))):
                change()
                self.assertEqual(self.go(project, "list")[0], 0)
                self.assertFalse(os.path.islink(script))
                self.assertEqual(project.read(script), before)

    def test_a_directory_that_others_may_change_is_not_used(self):
        with self.project() as project:
            self.bundle(project)

            def spoil(name, mode):
                os.makedirs(project.at(name), exist_ok=True)
                os.chmod(project.at(name), mode)
            for n, (spoilt, mode) in enumerate((("place", 0o777), ("place", 0o770), (".", 0o777), ("place", None),
                                                (self.key(project), 0o702))):
                place = project.at(f"{n}/place")
                os.mkdir(project.at(str(n)))
                if mode:
                    spoil(os.path.join(str(n), spoilt), mode)
                else:
                    os.symlink(project.at("tasks"), place)
                with self.subTest(spoilt=spoilt, mode=mode):
                    code, out, err = self.go(project, "list", MINIFLOW_BUNDLE_DIR=place)
                    self.assertEqual((code, out), (74, ""))
                    self.assertIn("it is no directory" if mode is None else "others may change what is there", err)
                    self.assertIn("f.pyz can't be unpacked; name a directory of yours by MINIFLOW_BUNDLE_DIR\n", err)
            os.mkdir(project.at("sticky"))
            os.chmod(project.at("sticky"), 0o1777)
            for env in ({"MINIFLOW_BUNDLE_DIR": project.at("sticky/mine")},
                        {"XDG_CACHE_HOME": project.at("f.pyz"), "TMPDIR": project.at("sticky")}):
                self.assertEqual(self.go(project, "list", **env, python=())[0], 0)
            self.assertEqual(len(os.listdir(project.at("sticky"))), 2)

    def key(self, project):
        """Return where a bundle will be unpacked below its place."""
        self.go(project, "list")
        return "place/" + os.path.basename(self.unpacked(project))

    def test_a_damaged_bundle_and_one_with_names_that_lead_elsewhere_are_refused(self):
        with self.project() as project:
            self.bundle(project)
            with open(project.at("f.pyz"), "rb") as file:
                content = file.read()
            project.write("f.pyz", content.replace(b"PASSWORD", b"PASSW0RD").replace(b"N = 2", b"N = 3"))
            self.assertEqual(self.go(project, "list")[::2], (
                1, f"{project.at('f.pyz')}: damaged at tasks/in/pack/deep.py; copy it again\n"))
            for name in ("../x", "/x", "a//x", "a/./x", "c:x", "a\\x", "a\0x", ""):
                program = f"{mf.BUNDLE_PROGRAM}start('k', 'f', [({name!a}, 0o644, 0)])\n"
                project.write("f.pyz", mf._zipped({"__main__.py": (program.encode(), 0o644)}))
                code, _, err = self.go(project, "list")
                self.assertEqual((code, err), (
                    1, f"{project.at('f.pyz')}: holds {name!r}, which is no name for a file of a bundle\n"))

    def test_what_cant_travel_is_refused_and_named_all_at_once(self):
        with self.project() as project:
            os.symlink("/etc/passwd", project.at("tasks/out"))
            os.symlink("in", project.at("tasks/link"))
            os.symlink("top.py", project.at("tasks/inner.py"))
            os.symlink("nowhere", project.at("tasks/broken"))
            project.write("tasks/a:b", "")
            os.mkfifo(project.at("tasks/pipe"))
            code, out, err = project.main("bundle", "f")
            self.assertEqual((code, out), (2, ""))
            for name, what in (("out", "a symbolic link to \"/etc/passwd\""), ("link", "a symbolic link to "),
                               ("a:b", "not every system can have"), ("pipe", "it is not a regular file"),
                               ("broken", "can't be read")):
                self.assertRegex(err, f'(?m)^"{re.escape(project.at("tasks", name))}": .*{what}')
                os.unlink(project.at("tasks", name))
            self.bundle(project)
            code, _, err = project.main("bundle", "f", "-o", "tasks/f.pyz")
            self.assertEqual((code, err), (2, f'-o "tasks/f.pyz": lies in {project.at("tasks")}, which goes into the '
                                              "bundle; put it elsewhere\n"))
            self.assertEqual(project.main("bundle", "f", "-o", "no/f.pyz")[0], 2)
            self.assertEqual(project.main("bundle", "nothing")[0], 3)
            with open(project.at("tasks/large"), "wb") as file:
                file.truncate(mf.MAX_BUNDLE)
            self.assertIn("large\": with it the bundle has more than 100 MB", project.main("bundle", "f")[2])
            project.write("flows/f.json", json.dumps(flow_json(task("a"))))
            self.assertIn("2 files, ", self.bundle(project))    # no script, so no tasks directory

    def test_what_has_not_changed_need_not_run_in_a_newer_bundle(self):
        with one(task("a", script="a.py", inputs=["in"]), task("b", script="b.py", inputs=["in"]),
                 scripts={"a.py": "", "b.py": ""}) as project:
            for name, ends in (("", ["success", "success"]), ("pass", ["cached", "success"])):
                project.write("tasks/b.py", name)
                self.bundle(project)
                self.assertEqual(self.go(project, "run", "--run-id", "r" + name, cwd="e")[0], 0)
                tasks = json.loads(project.read(f"e/miniflow_output/runs/r{name}.json"))["tasks"]
                self.assertEqual([tasks["a"]["status"], tasks["b"]["status"]], ends)

    @unittest.skipUnless(LINUX, "process=True is known to work in a bundle on Linux")
    def test_a_flow_in_python_brings_its_neighbours(self):
        with Project() as project:
            project.write("flows/py.py", textwrap.dedent("""
                from miniflow import Workflow, task
                import _near

                @task(process=True)
                def a(ctx):
                    return {"n": _near.N + 1}

                @task
                async def b(ctx):
                    return {"m": ctx["n"] + 1}
                a >> b
                workflow = Workflow([a, b])
                """))
            project.write("flows/_near.py", "N = 1")
            self.bundle(project, "py")
            code, _, err = self.go(project, "run", "--run-id", "r", file="py.pyz", cwd="e", python=())
            self.assertEqual(code, 0, err)
            self.assertEqual(json.loads(project.read("e/miniflow_output/runs/r.json"))["ctx"], {"n": 2, "m": 3})


class T47CommandLine(unittest.TestCase):

    def test_every_promise_of_an_exit_code(self):
        with Project({"good": flow_json(task("a")), "red": flow_json(task("a", command="exit 1")),
                      "bad": "{"}) as project:
            for args, code in [
                    ((), 2), (("--version",), 0), (("--help",), 0), (("run", "--help"), 0), (("rum",), 2),
                    (("run",), 2), (("run", "good"), 0), (("run", "red"), 1), (("run", "bad"), 2),
                    (("run", "nope"), 3), (("run", "./x"), 3), (("run", "good", "-j", "0"), 2),
                    (("run", "good", "-j", "x"), 2), (("run", "good", "--bogus"), 2),
                    (("run", "good", "--only", "zz"), 3), (("run", "good", "--run-id", "../x"), 2),
                    (("run", "good", "--params", "[1]"), 2), (("run", "good", "--params", "nofile"), 2),
                    (("run", "good", "--param", "x"), 2), (("-l", "LOUD", "list"), 2),
                    (("show", "nope"), 3), (("show", "../x"), 2), (("logs", "last", "zz"), 3),
                    (("resume", "nope"), 3), (("validate",), 2), (("validate", "good"), 0),
                    (("validate", "nope"), 3), (("graph", "nope"), 3), (("-f", "nowhere", "list"), 3),
                    (("clean",), 2), (("export", "good"), 2), (("export", "good", "--to", "cobol"), 2),
                    (("schema",), 0), (("list",), 0), (("runs",), 0)]:
                with self.subTest(args=args):
                    got, out, err = project.main(*args)
                    self.assertEqual(got, code, err)
                    self.assertNotIn("Traceback", err)
                    if code:
                        self.assertTrue(err.strip())

    def test_an_option_that_names_nothing_does_not_mean_everything(self):
        with one(task("a", command="touch ran")) as project:
            for option in ("--only", "--tags", "--from"):
                code, _, err = project.main("run", "f", option, "")
                self.assertEqual(code, 2)
                self.assertIn("names nothing", err)
            self.assertFalse(os.path.exists(project.at("ran")))

    def test_after_two_dashes_everything_is_literal(self):
        with one(task("a")) as project:
            code, _, err = project.main("run", "--", "--help")
            self.assertEqual((code, err.split(" in ")[0]), (3, 'no flow "--help"'))
            self.assertEqual(project.main("runs", "nope")[0], 3)
            self.assertEqual(project.main("clean", "--older-than", "nan")[0], 2)

    @unittest.skipUnless(os.path.exists("/dev/full"), "there is no /dev/full")
    def test_streams_that_are_closed_or_full_are_no_bug_and_end_no_run(self):
        with one(task("a")) as project:
            def shell(line):
                return subprocess.run(["/bin/sh", "-c", f"{sys.executable} {ENGINE} {line}"], cwd=project.path,
                                      stderr=subprocess.PIPE, stdout=subprocess.PIPE, timeout=60)
            for line, code in (("list >/dev/full", 74), ("schema >/dev/full", 74), ("run f >/dev/full", 0),
                               ("run f --output json >/dev/full", 0), ("run f <&- >&- 2>&-", 0), ("list >&-", 0),
                               ("run f -p - <&-", 2)):
                with self.subTest(line=line):
                    done = shell(line)
                    self.assertEqual(done.returncode, code, done.stderr)
                    self.assertNotIn(b"Traceback", done.stderr)
            heads = json.loads(project.main("runs", "--json")[1])
            self.assertEqual([head["status"] for head in heads], ["success"] * 3)

    def test_what_is_plainly_right_is_read_as_argparse_reads_it(self):
        words = ["a", "b,c", "k=v", "2", "0", "1.5", "", "-", "--", "-1", "-x", "json", "bash", "failed", "kill",
                 "-j2", "--jobs=2", "-h", "--limit", "--out", "a b"]
        chance, plain = random.Random(7), 0
        for name in mf.COMMANDS:
            arguments = mf.arguments_of(name)
            parser = arguments.parser()
            flags = list(parser._option_string_actions)
            for _ in range(400):
                typed = [chance.choice(flags if chance.random() < 0.4 else words) for _ in range(chance.randrange(6))]
                try:
                    found = arguments.read(typed)
                except (LookupError, ValueError):
                    continue
                plain += 1
                with self.subTest(name=name, typed=typed):
                    self.assertEqual(found, vars(parser.parse_args(typed)))
        self.assertGreater(plain, 500)

    def test_help_of_every_command_has_an_example(self):
        with Project() as project:
            for name in mf.COMMANDS:
                self.assertIn("example:\n  miniflow ", project.main(name, "--help")[1])
            self.assertEqual(project.main("--version")[1], f"miniflow {mf.__version__}\n")

    def test_global_options_are_taken_before_and_after_the_command_and_from_the_environment(self):
        with Project() as project:
            project.write("ff/x.json", json.dumps(flow_json(task("a"))))
            for args in (("-f", "ff", "-o", "oo", "run", "x"), ("run", "-f", "ff", "x", "-o", "oo"),
                         ("run", "x", "--flows-dir", "ff", "--output-dir=oo"),
                         ("-f", "wrong", "run", "x", "-f", "ff", "-o", "oo")):
                self.assertEqual(project.main(*args)[0], 0)
            self.assertEqual(len(os.listdir(project.at("oo/runs"))), 4)
            os.environ["MINIFLOW_FLOWS_DIR"] = "ff"
            try:
                self.assertEqual(project.main("validate", "x")[0], 0)
            finally:
                del os.environ["MINIFLOW_FLOWS_DIR"]
            self.assertFalse(os.path.exists(project.at("miniflow_output")))

    def test_a_letter_means_what_the_command_says_after_it_and_the_global_before_it(self):
        with one(task("a")) as project:
            self.assertEqual(project.main("-o", "oo", "export", "f", "--to", "bash", "-o", "x.sh")[0], 0)
            self.assertTrue(os.access(project.at("x.sh"), os.X_OK))
            self.assertEqual(subprocess.run(["bash", "-n", project.at("x.sh")]).returncode, 0)

    def test_params_come_in_every_form(self):
        seen = ("import json, os; json.dump(json.load(open(os.environ['MINIFLOW_CONTEXT']))['params'], "
                "open('seen.json', 'w'))")
        with one(task("a", command=[sys.executable, "-c", seen]),
                 params={"n": {"type": "integer"}, "s": "x"}) as project:
            project.write("p.json", '{"n": 3}')
            for args, expected, stdin in [
                    ((), {"s": "x"}, b""), (("--params", '{"n": 1, "s": "y"}'), {"n": 1, "s": "y"}, b""),
                    (("-p", "p.json"), {"n": 3, "s": "x"}, b""),
                    (("-p", "-"), {"n": 4, "s": "x"}, b'{"n": 4}'),
                    (("--param", "n=5", "--param", "s=a=b"), {"n": 5, "s": "a=b"}, b""),
                    (("-p", "p.json", "--param", "n=6"), {"n": 6, "s": "x"}, b""),
                    (("--param", "s="), {"s": ""}, b"")]:
                with self.subTest(args=args):
                    done = project.cli("run", "f", *args, stdin=stdin)
                    self.assertEqual(done.returncode, 0, done.stderr)
                    self.assertEqual(json.loads(project.read("seen.json")), expected)
            for args, part in [(("-p", '{"n": 1, "n": 2}'), "--params:1:10: n: given twice"),
                               (("--param", "n=x"), '--param n: expected an integer, got "x"; give 7'),
                               (("--param", "m=1"), "params.m: flow f has no such param"),
                               (("-p", '{"n": 1.5}'), "params.n: expected an integer, got 1.5")]:
                with self.subTest(args=args):
                    code, _, err = project.main("run", "f", *args)
                    self.assertEqual(code, 2)
                    self.assertIn(part, err)

    def test_a_broken_flow_beside_good_ones_stops_none_of_them(self):
        with Project({"bad": '{"name": 3}', "good": flow_json(task("a"), description="fine")}) as project:
            code, out, _ = project.main("list")
            self.assertEqual(code, 0)
            self.assertRegex(
                out, r"(?m)^bad +- +- +- +broken: flows/bad\.json:1:1: tasks is missing.* \(and 1 more\)$")
            self.assertRegex(out, r"(?m)^good \(f\) +1 +- +- +fine$")
            rows = json.loads(project.main("list", "--json")[1])
            self.assertEqual([row["name"] for row in rows], ["bad", "good"])
            self.assertEqual(len(rows[0]["error"]), 2)
            self.assertEqual(project.main("run", "good")[0], 0)
            code, out, err = project.main("validate")
            self.assertEqual((code, out), (2, "./flows/good.json: ok, 1 tasks\n"))
            self.assertIn("error: flows/bad.json:1:2: name: expected a name", err)
            self.assertIn("warning: ./flows/good.json: its name is f; it is run as good", err)

    def test_nothing_runs_when_validation_fails(self):
        with one(task("a", command="touch ran"), task("b", "zz")) as project:
            self.assertEqual(project.main("run", "f")[0], 2)
            self.assertEqual(sorted(os.listdir(project.path)), ["flows", "tasks"])

    def test_a_flow_can_be_named_by_its_path(self):
        with one(task("a")) as project:
            os.rename(project.at("flows/f.json"), project.at("mine.json"))
            self.assertEqual(project.main("run", "mine.json", "--run-id", "r")[0], 0)
            self.assertEqual(project.state("r")["flow"], "mine")
            self.assertEqual(project.main("run", "./mine.json", "-o", project.at("o"))[0], 0)

    INNER = flow_json(
        task("one",
        command="echo said=$MINIFLOW_PARAM_NAME >>$MINIFLOW_OUTPUT; env >env; test ! -e \"bad-$MINIFLOW_PARAM_NAME\""),
        task("two", "one", command="echo up >>up; test ! -e slow || exec sleep 60"),
        name="inner", params={"name": {"type": "string", "required": True}, "other": 1})

    def test_a_secret_is_neither_shown_nor_stored_and_reaches_who_needs_it(self):
        secret = 'pä"ss\\w0rd\nline two\n}'
        flow = flow_json(
            task("make",
            command="printf '%s' \"$TOKEN\"; python3 -c \"import json,os; json.dump({'t': os.environ['TOKEN'], "
                                 "'n': 1}, open(os.environ['MINIFLOW_OUTPUT'], 'w'))\""),
            task("use", "make", command="printf '%s' \"$T\" >got; test -e ok",
            env={"T": "${{ tasks.make.outputs.t }}"}),
            task("fail", command="printf '%s' \"$TOKEN\" >&2; exit 3", allow_failure=True),
            task("reason", command=["./no-${{ env.TOKEN }}"], allow_failure=True),
            task("each", foreach=["${{ env.TOKEN }}"], allow_failure=True), secrets=["TOKEN", "ABSENT"])

        def everything(project):
            for folder, _, names in os.walk(project.at("miniflow_output")):
                for name in names if "/logs/" not in folder else ():
                    with open(os.path.join(folder, name), "rb") as file:
                        yield folder + name, file.read().decode("utf-8", "replace")

        forms = [secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], "line two", "w0rd"]
        with Project({"f": flow}) as project:
            env = {**os.environ, "TOKEN": secret, "ABSENT": ""}
            shown = []
            for args in (["run", "f", "--run-id", "r"], ["run", "f", "--run-id", "j", "--output", "json"],
                         ["run", "f", "--run-id", "p", "--output", "prefix"], ["show", "r"], ["show", "r", "--json"],
                         ["logs", "r", "make"], ["logs", "r"], ["runs", "--json"]):
                done = project.cli(*args, env=env)
                shown.append((args, done.stdout + done.stderr))
            self.assertEqual(project.read("got"), secret)
            self.assertEqual(project.log("r", "make").decode(), secret, "its own log is its own")
            self.assertIn("***", dict((args[0], text) for args, text in shown)["logs"])
            for where, text in [*shown, *everything(project)]:
                for form in forms:
                    self.assertNotIn(form, text, where)
            state = project.state("r")["tasks"]
            self.assertEqual(state["make"]["output"], {"t": "***", "n": 1})
            self.assertIn("a value holds a secret", state["each"]["reason"])
            project.write("ok", "")
            os.unlink(project.at("got"))
            done = project.cli("resume", "r", env=env)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertEqual(project.read("got"), secret)
            self.assertEqual(len(project.state("r")["tasks"]["make"]["attempts"]), 2, "what was masked is made again")
            done = project.cli("run", "f", "--param", f"x=a{secret}b", env=env)
            self.assertEqual(done.returncode, 2)
            self.assertIn("params.x: it holds the value of a secret", done.stderr)

    def test_a_secret_that_is_a_number_leaves_json_what_it_is(self):
        flow = flow_json(task("a", command="echo '{\"pin\": 86753091}' >$MINIFLOW_OUTPUT"), secrets=["PIN"])
        with Project({"f": flow}) as project:
            env = {**os.environ, "PIN": "86753091"}
            self.assertEqual(project.cli("run", "f", "--run-id", "r", env=env).returncode, 0)
            shown = json.loads(project.cli("show", "r", "--json", env=env).stdout)
            self.assertEqual(shown["tasks"]["a"]["output"], {"pin": "***"})

    def test_a_grace_of_a_flow_within_a_flow_is_kept(self):
        for grace, kept in ((None, 15), (5, 5), (15, 15)):
            fields = {} if grace is None else {"grace_s": grace}
            flow = make(task("a", flow="other", **fields))
            self.assertEqual((flow.tasks[0].grace_s, mf.recorded_flow(mf.flow_to_json(flow))), (kept, flow))

    def test_a_secret_is_found_across_the_blocks_of_a_log(self):
        mf.hidden[:] = ["secret"]
        self.addCleanup(mf.hidden.clear)
        text = b"xsecretsecre" * 3 + b"t se"
        for size in range(1, 20):
            blocks = [text[n:n + size] for n in range(0, len(text), size)]
            self.assertEqual(b"".join(mf._overlapping(blocks)), text.replace(b"secret", b"***"))
        self.assertEqual(mf.secret_texts(["A", "B", "C"], {"A": "ab", "B": "", "C": "x\nlonger\n"}),
                         ("x%0Alonger%0A", "x\\nlonger\\n", "x%0Alonger", "x\nlonger\n", "x\\nlonger", "x\nlonger",
                          "longer"))

    def test_a_flow_within_a_flow_is_a_run_of_its_own_that_hands_on_its_context(self):
        outer = flow_json(
            task("sub", flow="inner", params={"name": "${{ params.who }}"}),
            task("each", foreach=["x", "y"], flow="inner", params={"name": "${{ item }}", "other": [1]}),
            task("after", "sub", "each", command=["echo", "${{ tasks.sub.outputs.said }}",
            "${{ tasks.each.outputs.items }}"]),
            name="outer", params={"who": "a; b", "secret": 1})
        with Project({"outer": outer, "inner": self.INNER}) as project:
            project.write("bad-y", "")
            code, _, _ = project.main("run", "outer", "--run-id", "o")
            state = project.state("o")["tasks"]
            self.assertEqual((code, state["each[1]"]["status"], state["each[0]"]["status"]), (1, "failed", "success"))
            self.assertRegex(state["each[1]"]["reason"], r"^run o-each_1_-[0-9a-f]{12}: failed \(one failed\)$")
            self.assertNotIn("MINIFLOW_PARAM_SECRET", project.read("env"))
            runs = {head["id"]: head["status"] for head in json.loads(project.main("runs", "--json")[1])}
            self.assertEqual(sorted(runs.values()), ["failed", "failed", "success", "success"])
            os.unlink(project.at("bad-y"))
            self.assertEqual(project.main("resume", "o")[0], 0)
            self.assertEqual({head["id"]: head["status"] for head in json.loads(project.main("runs", "--json")[1])},
                             dict.fromkeys(runs, "success"))
            self.assertEqual(project.log("o", "after").decode(), "a; b " + json.dumps(
                [{"name": name, "other": [1], "said": name} for name in "xy"]) + "\n")

    def test_a_flow_within_a_flow_runs_again_where_its_upstream_has(self):
        outer = flow_json(task("prep", command="echo one >data"), task("sub", "prep", flow="in"),
                          task("check", "sub", command=["test", "${{ tasks.sub.outputs.v }}", "=", "two"]),
                          name="outer")
        inner = flow_json(task("read", command="echo v=$(cat data) >>$MINIFLOW_OUTPUT"), name="in")
        with Project({"outer": outer, "in": inner}) as project:
            self.assertEqual(project.main("run", "outer", "--run-id", "r")[0], 1)
            outer["tasks"][0]["command"] = "echo two >data"
            project.write("flows/outer.json", json.dumps(outer))
            self.assertEqual(project.main("resume", "r")[0], 0)
            long = "n" * 115
            outer["name"] = long
            project.write(f"flows/{long}.json", json.dumps(outer))
            self.assertEqual([project.main("run", long)[0] for _ in range(2)], [0, 0])
            runs = [head["flow"] for head in json.loads(project.main("runs", "--json")[1])]
            self.assertEqual(runs.count("in"), 4)
        secret = flow_json(task("sub", flow="in", params={"x": "${{ env.TOK }}"}), name="outer", secrets=["TOK"])
        with Project({"outer": secret, "in": {**inner, "params": {"x": ""}}}) as project:
            done = project.cli("run", "outer", env={**os.environ, "TOK": "s3cretvalue99"})
            self.assertEqual(done.returncode, 1)
            self.assertIn("a param holds a secret", done.stderr)

    def test_flows_within_flows_may_share_flows_and_are_not_endlessly_deep(self):
        many = {f"f{n}": flow_json(task("a", flow=f"f{n + 1}"), task("b", flow=f"f{min(n + 2, 17)}"), name=f"f{n}")
                for n in range(16)}
        ends = {name: flow_json(task("a"), name=name) for name in ("f16", "f17")}
        deep = {f"d{n}": flow_json(task("a", flow=f"d{n + 1}"), name=f"d{n}") for n in range(60)}
        with Project({**many, **ends, **deep, "d60": flow_json(task("a"), name="d60"),
                      "file": flow_json(task("a", flow="f0.json"), name="file")}) as project:
            calls = [mf.parse_flow]
            count = itertools.count()
            self.addCleanup(setattr, mf, "parse_flow", calls[0])
            mf.parse_flow = lambda *args: (next(count), calls[0](*args))[1]
            self.assertEqual(project.main("validate", "f0")[0], 0)
            self.assertEqual(next(count), 18)
            code, _, err = project.main("validate", "d0")
            self.assertEqual(code, 2)
            self.assertIn("flows within flows, more than 20 deep", err)
            self.assertIn("is the name of a file", project.main("validate", "file")[2])

    def test_the_run_of_a_flow_within_a_flow_names_its_parent_and_takes_its_options(self):
        outer = flow_json(task("sub", flow="inner"), task("after", "sub", command="test -e ok"), name="outer")
        inner = flow_json(task("cached", outputs=["made"], command="echo $MINIFLOW_PARAM_P >made"),
                          task("bad", "cached", command="test -e ok"), name="inner", params={"p": "a"})
        with Project({"outer": outer, "inner": inner}) as project:
            self.assertEqual(project.main("run", "outer", "--run-id", "o", "--durability", "off", "-j", "3")[0], 1)
            heads = json.loads(project.main("runs", "--json")[1])
            self.assertEqual({head["flow"]: head["parent"] for head in heads},
                             {"outer": None, "inner": {"run": "o", "task": "sub"}})
            inner_id = next(head["id"] for head in heads if head["parent"])
            self.assertIn("part of run o, task sub\n", project.main("show", inner_id)[1])
            self.assertIn("run o of flow outer", project.main("show", "last")[1])
            self.assertIn(f"run {inner_id}: 2 tasks, 3 at once", project.log("o", "sub").decode())
            inner["params"]["p"] = "b"          # a run that is gone on with keeps its params
            project.write("flows/inner.json", json.dumps(inner))
            project.write("ok", "")
            self.assertEqual(project.main("resume", "last")[0], 0, project.log("o", "sub"))
            self.assertEqual((project.state(inner_id)["status"], project.read("made")), ("success", "a\n"))
            ends = []
            for n, more in enumerate(([], [], ["--force"])):
                self.assertEqual(project.main("run", "outer", "--run-id", f"n{n}", *more)[0], 0)
                heads = json.loads(project.main("runs", "inner", "--json")[1])
                ends.append(project.state(heads[0]["id"])["tasks"]["cached"]["status"])
            self.assertEqual(ends, ["success", "cached", "success"])

    def test_what_decides_over_a_task_sees_its_own_environment(self):
        env = {"WHICH": "${{ params.which }}", "LATE": "${{ tasks.bad.outputs.no }}", "EACH": "${{ item }}"}
        with one(task("bad", command="exit 1", allow_failure=True),
                 task("if", "bad", env={**env, "EACH": "1"}, **{"if": "env.WHICH == 'b'"}),
                 task("each", "bad", env={"LIST": "${{ params.list }}"}, foreach=["${{ env.LIST }}", 2],
                      command=["echo", "${{ item }}"]),
                 task("file", env={"WHICH": "${{ params.which }}"}, outputs=["out-${{ env.WHICH }}"],
                      command="touch out-$WHICH"),
                 params={"which": "a", "list": [1]}) as project:
            code, _, err = project.main("run", "f", "--run-id", "r")
            self.assertEqual(code, 0, err)
            found = project.state("r")["tasks"]
            self.assertEqual((found["if"]["status"], found["if"]["reason"]), ("skipped", "if is false"))
            self.assertEqual([found[name]["each"]["item"] for name in ("each[0]", "each[1]")], ["[1]", 2])
            self.assertTrue(os.path.exists(project.at("out-a")))
            code, out, _ = project.main("logs", "r", "each")
            self.assertEqual((code, out), (0, "==> each[0], attempt 1 <==\n[1]\n==> each[1], attempt 1 <==\n2\n"))
            self.assertEqual(project.main("logs", "r", "each", "-f")[1], "each[0] | [1]\neach[1] | 2\n")

    def test_a_secret_that_a_message_cuts_in_two_is_not_shown_in_part(self):
        secrets = mf.secret_texts(["T"], {"T": "s3cret=value=="})
        self.assertIn("s3cret=value", secrets)
        for cut in range(len("s3cret=value==")):
            text = f'expected one, got "{"s3cret=value=="[:cut]}…"; in {"x" * cut}…'
            shown = mf.masked(text, secrets)
            self.assertEqual(shown, text if cut < 4 else f'expected one, got "***…"; in {"x" * cut}…')
        mf.hidden[:] = ["secret"]
        self.addCleanup(mf.hidden.clear)
        with Project() as project:
            for before in (*range(mf.SHOWN_LINE - 8, mf.SHOWN_LINE + 24), 3 * mf.SHOWN_LINE):
                project.write("log", "x" * before + "secret" + "y" * 30)
                shown = list(mf.follow_lines(project.at("log"), [0, b""], True))
                self.assertEqual("".join(shown), "x" * before + "***" + "y" * 30)
            for size in range(20):              # what is shown begins in the middle of the log
                for end, shows in ((2**20, lambda: list(mf.follow_lines(project.at("log"), [0, b""], True))[1:]),
                                   (2**16, lambda: mf.log_tail(project.at("log"))[0])):
                    project.write("log", "z" * 9 + "secret" * (end // 6 + 3) + "w" * size)
                    left = "".join(shows()).replace("*", "").replace("w", "")
                    self.assertEqual(left, "", size)

    def test_a_run_of_all_constructs_that_failed_or_died_at_any_point_is_resumed_to_the_same_end(self):
        point = ("name=$1; shift; if test \"$(cat die 2>&1)\" = \"$name\"; then rm die; kill -9 $PPID; sleep 60; fi; "
                 "if test \"$(cat fail 2>&1)\" = \"$name\"; then rm fail; exit 3; fi; "
                 "for word; do echo \"$word\" >>\"$MINIFLOW_OUTPUT\"; done")
        def at(name, *depends_on, says=(), **fields):
            return task(fields.pop("id", name), *depends_on, command=["sh", "-c", point, "sh", name, *says], **fields)

        outer = flow_json(
            at("start", says=["n=2"]),
            at("each-${{ item }}", "start", id="each", foreach=["a", "${{ tasks.start.outputs.n }}"],
               says=["v=${{ item }}"], max_parallel=1),
            at("not", "start", **{"if": "tasks.start.outputs.n == '3'"}), at("after", "not",
            trigger_rule="none_failed"),
            at("made", "each", says=["list=${{ tasks.each.outputs.items }}"], outputs=["made"],
            env={"X": "${{ run.id }}"}),
            task("sub", "start", flow="inner", params={"p": "${{ tasks.start.outputs.n }}"}),
            at("join", "sub", "made", "after", says=["got=${{ tasks.sub.outputs.inner }}"]), name="outer",
            **{"finally": at("last", id="last"), "on_success": at("good", id="good")})
        inner = flow_json(at("first", says=["x=1"]), at("inner", "first", says=["inner=${{ params.p }}"]),
                          name="inner", params={"p": ""})
        with Project({"outer": outer, "inner": inner}) as project:
            project.write("made", "")

            def ends(run_id):
                return {name: (found["status"], found["output"]) for name,
                found in project.state(run_id)["tasks"].items()}

            self.assertEqual(project.main("run", "outer", "--run-id", "whole")[0], 0)
            expected = ends("whole")
            self.assertEqual(expected["join"], ("success", {"got": "2"}))
            for n, name in enumerate(["start", "each-a", "each-2", "after", "made", "first", "inner", "join", "last",
                                      "good"]):
                for how in ("die", "fail") if name != "good" else ("die",):     # whose failure decides nothing
                    with self.subTest(name, how=how):
                        project.write(how, name)
                        args = ("run", "outer", "--run-id", f"{how}{n}")
                        code = project.cli(*args).returncode if how == "die" else project.main(*args)[0]
                        self.assertEqual(code, -9 if how == "die" and name not in ("first", "inner") else 1)
                        self.assertFalse(os.path.exists(project.at(how)))
                        code, _, err = project.main("resume", f"{how}{n}")
                        self.assertEqual((code, ends(f"{how}{n}")), (0, expected), err)

    def test_clean_takes_the_run_of_a_flow_within_a_flow_with_the_run_that_it_is_a_part_of(self):
        outer = flow_json(task("sub", flow="inner", foreach=[1, 2]), name="outer")
        inner = flow_json(task("deep", flow="innermost"), task("a", command="test -e go"), name="inner")
        with Project({"outer": outer, "inner": inner, "innermost": flow_json(task("a"), name="innermost")}) as project:
            for n in range(2):
                self.assertEqual(project.main("run", "outer", "--run-id", f"o{n}")[0], 1)
            project.main("run", "inner", "--run-id", "own")
            before = json.loads(project.main("runs", "--json")[1])
            self.assertEqual(len(before), 12)
            gone = project.main("clean", "--keep", "1")[1].splitlines()
            self.assertEqual((len(gone), gone[-1]), (5, "outer o0"))
            left = json.loads(project.main("runs", "--json")[1])
            self.assertEqual({head["parent"]["run"] for head in left if head["parent"]} - {head["id"] for head in left},
                             set())
            self.assertEqual(mf.JSONStateStore(project.at("miniflow_output")).cleanup_old_runs(0), 7)

    def test_a_flow_within_a_flow_hides_the_secrets_of_the_flow_around_it_and_says_why_it_could_not_start(self):
        outer = flow_json(task("s", flow="inner"), task("n", flow="needs", params={"n": "${{ params.x }}"},
                                                        allow_failure=True),
                          name="outer", secrets=["TOK"], params={"x": "abc"})
        inner = flow_json(task("a", command="echo k=$TOK >>$MINIFLOW_OUTPUT; touch out", outputs=["out"]),
                          task("b", "a", command="test -e go"), name="inner")
        needs = flow_json(task("a"), name="needs", params={"n": {"type": "integer"}})
        with Project({"outer": outer, "inner": inner, "needs": needs}) as project:
            env = {**os.environ, "TOK": "s3cretvalue"}
            self.assertEqual(project.cli("run", "outer", "--run-id", "o", env=env).returncode, 1)
            self.assertIn("expected an integer, got", project.state("o")["tasks"]["n"]["reason"])
            inner_id = next(head["id"] for head in json.loads(project.main("runs", "inner", "--json")[1]))
            self.assertNotIn("s3cret", project.cli("show", inner_id, "--json", env=env).stdout)
            project.write("go", "")
            self.assertEqual(project.cli("resume", inner_id, env=env).returncode, 0)
            for folder, _, names in os.walk(project.at("miniflow_output")):
                for name in names:
                    with open(os.path.join(folder, name), encoding="utf-8", errors="replace") as file:
                        self.assertNotIn("s3cret", file.read(), folder + name)
            done = project.cli("run", "outer", "--run-id", "as3cretvalue", env=env)
            self.assertEqual((done.returncode, "it holds the value of a secret" in done.stderr), (2, True))

    def test_a_text_that_no_path_can_hold_is_reported_and_stops_no_other_flow(self):
        with Project({"ok": flow_json(task("a"), name="ok")}) as project:
            project.write("flows/bad.json", '{"name":"bad","tasks":[{"id":"a","script":"a\\ud800b.py"}]}')
            project.write("flows/port.json", json.dumps(flow_json(
                task("a", http={"url": "http://x:70000/y"}), task("b", wait_for={"url": "https://x:0"}),
                task("c", script="x.py", python="${{ params.x }}"), name="port")))
            self.assertEqual(project.main("list")[0], 0)
            self.assertIn("half of a surrogate pair", project.main("validate", "bad")[2])
            err = project.main("validate", "port")[2]
            for said in ("port 70000 is not from 1 to 65535", "port 0 is not", "tasks[2].python: takes no template"):
                self.assertIn(said, err)
            err = project.main("run", "ok", "--params", '{bad ' + "x" * 30)[2]
            self.assertIn('got "bad xxxxxxxx…', err)

    def test_show_tells_the_params_and_what_they_take(self):
        params = {"days": {"type": "integer", "default": 2, "min": 1, "max": 7, "description": "how \x1b[31mmany"},
                  "x": "a\nb", "c": {"enum": ["p", 1], "default": 1}}
        with one(task("a"), params=params) as project:
            project.main("run", "f", "--run-id", "r", "--param", "days=3")
            self.assertEqual([line.split(None, 2) for line in project.main("show", "r")[1].splitlines()[3:7]], [
                ["param", "value", "takes"], ["days", "3", "an integer from 1 to 7: how \\x1b[31mmany"],
                ["x", '"a\\nb"'], ["c", "1", 'one of "p", 1']])
            self.assertEqual(json.loads(project.main("list", "--json")[1])[0]["params"]["days"], params["days"])

    def test_a_flow_within_a_flow_ends_and_goes_on_with_it(self):
        outer = flow_json(task("sub", flow="inner", params={"name": "n"}), name="outer")
        for number, status in ((signal.SIGTERM, "cancelled"), (signal.SIGKILL, "interrupted")):
            with self.subTest(number), Project({"outer": outer, "inner": self.INNER}) as project:
                project.write("slow", "")
                engine = project.start("run", "outer", "--run-id", "o")
                wait_for(lambda: os.path.exists(project.at("up")), "the task of the inner flow")
                engine.send_signal(number)
                engine.communicate(timeout=60)

                def runs():
                    return {head["flow"]: head["status"] for head in json.loads(project.main("runs", "--json")[1])}

                wait_for(lambda: runs()["inner"] in ("cancelled", "interrupted"), "the end of the inner run")
                self.assertEqual(runs()["outer"], status)
                os.unlink(project.at("slow"))
                self.assertEqual(project.main("resume", "o")[0], 0)
                self.assertEqual(runs(), {"outer": "success", "inner": "success"})
                inner = next(head["id"] for head in json.loads(project.main("runs",
                "--json")[1]) if head["flow"] == "inner")
                tasks = project.state(inner)["tasks"]
                self.assertEqual((tasks["one"]["attempt"], tasks["two"]["attempt"]), (1, 2))

    def test_flows_within_flows_are_checked_before_anything_runs(self):
        flows = {"a": flow_json(task("x", flow="b"), task("y", flow="c"), task("z", flow="inner", params={"nam": 1}),
                                task("w", flow="bad"), task("v", flow="inner"), task("p", flow="../a"), name="a"),
                 "b": flow_json(task("x", flow="a"), name="b"), "inner": self.INNER,
                 "bad": flow_json(task("x", "gone"), name="bad"), "fine": flow_json(task("x", flow="inner", params={
                     "name": "${{ run.id }}"}), task("y", command="true", params={}), name="fine")}
        with Project(flows) as project:
            code, _, err = project.main("validate", "a")
            self.assertEqual(code, 2)
            for line, said in zip(err.splitlines(), [
                    "tasks[0].flow: flow b is invalid: flows/b.json:6:4: tasks[0].flow: a flow that runs itself: "
                    "a -> b -> a; take it out of one of them", 'tasks[1].flow: no flow "c" in ./flows',
                    "tasks[2].params: flow inner requires name; give it in params",
                    "tasks[2].params.nam: flow inner has no such param, did you mean name?",
                    "tasks[3].flow: flow bad is invalid: flows/bad.json:",
                    "tasks[4].flow: flow inner requires name; give it",
                    "tasks[5].flow: expected"]):
                self.assertIn(said, line)
            self.assertIn("tasks[1].params: goes with flow only; remove it", project.main("validate", "fine")[2])

    def serve(self):
        """Return the address of a web server that says what it was asked, and the list of that."""
        asked = []

        class Answers(http.server.BaseHTTPRequestHandler):
            def answer(self):
                length = int(self.headers.get("Content-Length") or 0)
                asked.append((self.command, self.path, dict(self.headers), self.rfile.read(length)))
                kind, _, rest = self.path[1:].partition("?")[0].partition("/")
                status, head, body = 200, {}, b"text \xc3\xbc"
                if kind == "status":
                    status = int(rest) if rest.isdigit() else 200 if len(asked) > 2 else 503
                elif kind == "json":
                    head, body = {"Content-Type": "application/json"}, b'{"n": [1, 2], "h": null}'
                elif kind == "bom":
                    head, body = {"Content-Type": "application/json"}, b"\xef\xbb\xbf{}"
                elif kind == "bad":
                    head, body = {"Content-Type": "application/json"}, b"{"
                elif kind in ("to", "308"):
                    status, head = 308 if kind == "308" else 302, {"Location": rest}
                elif kind == "large":
                    body = b"x" * (mf.MAX_ANSWER + 1)
                elif kind == "short":
                    head = {"Content-Length": "100"}
                elif kind == "latin":
                    head, body = {"Content-Type": "text/plain; charset=latin-1"}, b"\xfc"
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), "X-Two": "a", **head}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PUT = answer

            def log_message(self, *args):
                """Say nothing."""

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        return f"http://127.0.0.1:{server.server_port}", asked

    def test_a_request_hands_on_its_answer_or_says_why_there_is_none(self):
        place, asked = self.serve()
        free = socket.socket()
        free.bind(("127.0.0.1", 0))
        self.addCleanup(free.close)
        closed = f"http://127.0.0.1:{free.getsockname()[1]}/"
        asks = {
            "get": ({"url": place + "/x/${{ params.odd }}?q=${{ params.odd }}"}, {"text": "text ü"}),
            "json": ({"url": "${{ params.place }}/json", "expect_status": [200, 201]}, {"json": {"n": [1, 2],
            "h": None}}),
            "post": ({"url": place + "/p", "json": {"a": ["${{ params.odd }}", 1]},
            "headers": {"X-Own": "${{ params.odd }}"}},
                     {"text": "text ü"}),
            "put": ({"url": place + "/p", "method": "PUT", "body": "ü ${{ params.odd }}"}, {"text": "text ü"}),
            "saved": ({"url": place + "/json", "save": "out.json"}, {"file": "out.json", "bytes": 24}),
            "latin": ({"url": place + "/latin"}, {"text": "ü"}), "moved": ({"url": f"{place}/to/{place}/json"}, None),
            "other": ({"url": place + "/status/404", "expect_status": 404}, {"text": "text ü"}),
            "gone": ({"url": place + "/status/404?secret=1"}, "GET %s/status/404: HTTP 404 Not Found" % place),
            "file": ({"url": place + "/to/file:///etc/passwd"},
            ": HTTP 302 Found"),
            "closed": ({"url": closed}, "Connection refused"), "large": ({"url": place + "/large"},
            "longer than 2097152 bytes"),
            "short": ({"url": place + "/short"}, "ended early"), "cut": ({"url": place + "/short",
            "save": "cut"}, "ended early"),
            "bad": ({"url": place + "/bad"}, "Expecting"), "header": ({"url": place,
            "headers": {"X": "${{ params.crlf }}"}}, "header"),
            "user": ({"url": closed.replace("//", "//ada:pw@")}, "GET " + closed),
            "signed": ({"url": place.replace("//", "//ada:p%40w@") + "/signed"}, {"text": "text ü"}),
            "iri": ({"url": place + "/p/ü ö?x=é&y=%41"}, {"text": "text ü"}), "bom": ({"url": place + "/bom"},
            {"json": {}}),
            "stays": ({"url": f"{place}/to/x", "expect_status": [302, 303]}, {"text": "text ü"}),
            "fifo": ({"url": place + "/json", "save": "fifo"}, {"file": "fifo", "bytes": 24}),
            "linked": ({"url": place + "/json", "save": "linked"}, {"file": "linked", "bytes": 24}),
            "port": ({"url": "${{ params.place }}0"}, "the address or a header is not valid"),
            "to user": ({"url": f"{place}/to/{place.replace('//', '//ada:pw@')}/signed"}, {"text": "text ü"}),
            "again": ({"url": f"{place}/308/{place}/p/again", "method": "PUT", "body": "once more"},
            {"text": "text ü"}),
            "scheme": ({"url": "${{ params.scheme }}"}, "unknown url type"),
            "turns": ({"url": place + "/to//to/x"}, "HTTP")}
        with one(*[task(name.replace(" ", "_"), http=ask, allow_failure=True, max_retries=int(name == "port"))
                   for name, (ask, _) in asks.items()]) as project:
            os.mkfifo(project.at("fifo"))
            reader = subprocess.Popen(["timeout", "60", "cat", project.at("fifo")], stdout=subprocess.PIPE)
            project.write("real", "old")
            os.chmod(project.at("real"), 0o640)
            os.symlink("real", project.at("linked"))
            code, _, err = project.main("run", "f", "--run-id", "r", "--params", json.dumps({
                "odd": "a b&c/../ü", "place": place, "crlf": "x\r\nY: z", "scheme": "file:///etc/passwd"}))
            self.assertEqual(code, 0, err)
            tasks = {name.replace("_", " "): found for name, found in project.state("r")["tasks"].items()}
            self.assertEqual(len(tasks["port"]["attempts"]), 1)
            self.assertEqual((reader.communicate()[0], project.read("real"), os.path.islink(project.at("linked")),
                              os.stat(project.at("real")).st_mode & 0o777, os.path.exists(project.at("fifo"))),
                             (b'{"n": [1, 2], "h": null}', '{"n": [1, 2], "h": null}', True, 0o640, True))
            for name, (_, expected) in asks.items():
                with self.subTest(name):
                    if isinstance(expected, str):
                        self.assertEqual(tasks[name]["status"], "failed")
                        self.assertIn(expected, tasks[name]["reason"])
                        self.assertNotIn("secret", tasks[name]["reason"])
                        self.assertNotIn("pw", tasks[name]["reason"])
                    else:
                        self.assertEqual(tasks[name]["status"], "success", tasks[name]["reason"])
                        output = dict(tasks[name]["output"])
                        self.assertEqual((output.pop("status"), output.pop("headers")["x-two"]),
                                         ({"other": 404, "stays": 302}.get(name, 200), "a"))
                        self.assertEqual(output, expected or {"json": {"n": [1, 2], "h": None}})
            self.assertEqual(project.read("out.json"), '{"n": [1, 2], "h": null}')
            self.assertEqual([name for name in os.listdir(project.path) if "cut" in name], [])
        seen = {path: (method, head, body) for method, path, head, body in asked}
        quoted = "a%20b%26c%2F..%2F%C3%BC"
        self.assertIn(f"/x/{quoted}?q={quoted}", seen)
        self.assertIn("/p/%C3%BC%20%C3%B6?x=%C3%A9&y=%41", seen)
        self.assertEqual([head["Authorization"] for _, path, head, _ in asked if path == "/signed"],
                         ["Basic YWRhOnBAdw==", "Basic YWRhOnB3"])
        self.assertEqual((seen["/p/again"][0], seen["/p/again"][2]), ("PUT", b"once more"))
        posted = [(method, json.loads(body), head["Content-Type"], head["X-Own"]) for method, path, head, body in asked
                  if method == "POST"]
        self.assertEqual(posted, [("POST", {"a": ["a b&c/../ü", 1]}, "application/json", "a b&c/../ü")])
        self.assertEqual([body.decode() for method, path, _, body in asked if path == "/p" and method == "PUT"],
                         ["ü a b&c/../ü"])

    def test_a_request_that_is_stopped_leaves_no_half_of_a_file(self):
        slow = socket.socket()
        slow.bind(("127.0.0.1", 0))
        slow.listen()
        self.addCleanup(slow.close)
        with one(task("a", http={"url": f"http://127.0.0.1:{slow.getsockname()[1]}/", "save": "out"})) as project:
            engine = project.start("run", "f")
            asking, _ = slow.accept()
            self.addCleanup(asking.close)
            asking.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 99\r\n\r\nhalf")
            wait_for(lambda: [name for name in os.listdir(project.path) if name.endswith(".part")], "the first half")
            engine.send_signal(signal.SIGTERM)
            engine.communicate(timeout=30)
            self.assertEqual([name for name in os.listdir(project.path) if name.startswith("out")], [])

    def test_a_request_is_retried_by_its_status_and_takes_no_credentials_elsewhere(self):
        place, asked = self.serve()
        secret = {"Authorization": "Basic x"}
        with one(task("a", http={"url": place + "/status/twice"}, max_retries=5, retry_on=[503]),
                 task("b", "a", http={"url": place + "/status/500"}, max_retries=5, retry_on=[503], allow_failure=True),
                 task("c", "b", http={"url": f"{place}/to/{place.replace('127.0.0.1', 'localhost')}/json",
                 "headers": secret}),
                 ) as project:
            code, _, err = project.main("run", "f", "--run-id", "r")
            self.assertEqual(code, 0, err)
            self.assertEqual([len(t["attempts"]) for t in project.state("r")["tasks"].values()], [3, 1, 1])
            self.assertIn("GET http://127.0.0.1", project.main("logs", "r", "a")[1])
        self.assertEqual([head.get("Authorization") for _, _, head, _ in asked[-2:]], ["Basic x", None])
        opener = {"__name__": "opener"}
        with mock_stdin('{"url": "x"}'):
            exec(compile(mf._OPENER, "opener", "exec"), opener)
        request = opener["urllib"].request.Request("https://a/")
        with self.assertRaises(OSError) as caught:
            opener["Redirects"]().redirect_request(request, None, 302, "Found", {}, "http://a/")
        self.assertIn("it redirects to http://a/, which is not followed", str(caught.exception))

    def test_what_waits_takes_up_no_slot_and_ends_when_it_has_what_it_waits_for(self):
        place, _ = self.serve()
        tasks = [task("file", wait_for={"file": "in/${{ params.odd }}*.csv", "poll_s": 0.05}),
                 task("url", wait_for={"url": place + "/status/later", "poll_s": 0.05}),
                 task("command", wait_for={"command": ["sh", "-c",
                 "echo x=1 >>\"$MINIFLOW_OUTPUT\"; test -e \"$1\"", "sh",
                                                       "${{ params.odd }}"], "poll_s": 0.05}),
                 task("seconds", wait_for={"seconds": "${{ params.s }}"}),
                 task("no", wait_for={"seconds": "${{ params.odd }}"}, max_retries=3, allow_failure=True),
                 task("never", wait_for={"file": "never", "poll_s": 0.05}, timeout_s=3, allow_failure=True),
                 task("odd", wait_for={"command": ["./not-there"]}, max_retries=3, allow_failure=True),
                 task("wrong", wait_for={"url": "${{ params.odd }}"}, max_retries=3, allow_failure=True)]
        feed = "sleep 0.4; mkdir in; echo >'in/*[a] 1.csv'; echo >in/other.csv; echo >'*[a]'"
        with one(*tasks, task("feed", command=feed)) as project:
            code, _, err = project.main("run", "f", "--run-id", "r", "-j", "1", "--param", "odd=*[a]",
            "--param", "s=0.3")
            self.assertEqual(code, 0, err)
            found = project.state("r")["tasks"]
            self.assertEqual({name: len(found[name]["attempts"]) for name in ("no", "odd", "wrong")},
                             {"no": 1, "odd": 1, "wrong": 1}, "what is wrong stays so")
            self.assertEqual(found["no"]["reason"], 'wait_for.seconds: expected a number of seconds, got "*[a]"')
            self.assertEqual(found["file"]["output"], {"files": ["in/*[a] 1.csv"]})
            self.assertEqual(found["url"]["output"], {"status": 200})
            self.assertEqual(found["command"]["output"], {"x": "1"})
            self.assertEqual((found["seconds"]["status"], found["never"]["reason"]), ("success", "timeout after 3 s"))
            self.assertEqual(found["odd"]["reason"], "cannot start: ./not-there: No such file or directory")
            self.assertIn("not yet: no file matches never", project.main("logs", "r", "never")[1])

    def test_handlers_run_after_a_timeout_a_signal_and_a_kill(self):
        handlers = {name: {"command": f"echo {name} >>ran"} for name in mf.HANDLERS}
        slow = task("a", command="test -e go || { echo up >up; exec sleep 60; }")
        with Project({"late": flow_json(slow, name="late", timeout_s=0.4, **handlers),
                      "f": flow_json(slow, task("b", "a"), **handlers)}) as project:
            code, _, err = project.main("run", "late", "--run-id", "late")
            self.assertEqual((code, project.read("ran").split()), (1, ["on_failure", "finally"]), err)
            self.assertIn("run timeout: stopping what runs\n", err)
            self.assertIn("run late: failed (run timeout): 2 success, 2 cancelled", err)
            for name, number, code in (("int", signal.SIGINT, 130), ("kill", signal.SIGKILL, -9)):
                for file in ("up", "ran"):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(project.at(file))
                engine = project.start("run", "f", "--run-id", name)
                wait_for(lambda: os.path.exists(project.at("up")), "the task")
                engine.send_signal(number)
                engine.communicate(timeout=30)
                self.assertEqual(engine.returncode, code)
                self.assertEqual(os.path.exists(project.at("ran")) and project.read("ran").split(),
                                 ["finally"] if code == 130 else False)
            project.write("go", "")
            for name, ran in (("kill", ["on_success", "finally"]), ("late", ["on_success", "finally"])):
                project.write("ran", "")
                self.assertEqual(project.main("resume", name)[0], 0)
                self.assertEqual(project.read("ran").split(), ran)

    def test_instances_run_with_their_values_and_a_killed_run_goes_on_with_those_that_lack(self):
        values = ["a b", "$(id)", "ü", {"k": [1]}, ""]
        with one(task("each", foreach=values, command="printf %s \"$1$MINIFLOW_TASK\"; test -e go || kill -9 $PPID",
                      args=["${{ item }}"], max_parallel=1),
                 task("below", "each")) as project:
            self.assertEqual(project.cli("run", "f", "--run-id", "r", "-j", "2").returncode, -9)
            project.write("go", "")
            code, _, err = project.main("resume", "r")
            self.assertEqual(code, 0, err)
            state = project.state("r")["tasks"]
            self.assertEqual({name: t["status"] for name, t in state.items()},
                             dict.fromkeys(["each", "below", *(f"each[{n}]" for n in range(5))], "success"))
            self.assertEqual([t["attempt"] for name, t in state.items() if "[" in name], [2, 1, 1, 1, 1])
            for n, value in enumerate(values):
                text = value if isinstance(value, str) else json.dumps(value)
                with open(project.at("miniflow_output", state[f"each[{n}]"]["log"]), encoding="utf-8") as file:
                    self.assertEqual(file.read(), f"{text}each[{n}]")
            _, shown, _ = project.main("show", "r")
            self.assertRegex(shown, r"(?s)\neach  .*\neach\[0\] .*\neach\[4\] .*\nbelow .*critical path: each -> below")

    def test_ten_thousand_instances_cost_ten_times_what_a_thousand_cost(self):
        calls = {}
        for count in (1000, 10000):
            flow = make(task("a", foreach=list(range(count))))
            calls[count] = self.count_calls(simulate, flow, slots=2)
        self.assertLess(calls[10000], 12 * calls[1000])

    @staticmethod
    def count_calls(function, *args, **options):
        """Return how many Python functions `function` calls."""
        calls = itertools.count()
        sys.setprofile(lambda frame, kind, argument: kind == "call" and next(calls))
        try:
            function(*args, **options)
        finally:
            sys.setprofile(None)
        return next(calls)

    def test_the_flows_of_the_readme_run(self):
        with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
            readme = file.read()
        flows = {flow["name"]: flow for text in re.findall(r"(?s)```json\n(.*?)```", readme)
                 if '"tasks": [' in text for flow in [json.loads(text)]}
        del flows["etl"]                        # it shows what a flow with errors looks like
        del flows["sweep"]                      # it is for Slurm, and run with the tests of that
        script = re.search(r"(?ms)^And its script, `tasks/greet.py`:\n\n```python\n(.*?)```", readme)[1]
        with Project(flows, {"greet.py": script}) as project:
            for name in flows:
                with self.subTest(name):
                    code, _, err = project.main("run", name, "--run-id", name)
                    self.assertEqual(code, 0, err)
            release = project.state("release")["tasks"]
        self.assertGreaterEqual(len(flows), 4)
        self.assertEqual({name: task["status"] for name, task in release.items()},
                         {"count": "success", "load": "success", "approve": "skipped", "report": "success"})

    def test_a_dry_run_prints_a_scripts_path_and_the_plan_and_runs_nothing(self):
        with one(task("a", command="touch ran"), task("b", "a", max_retries=2)) as project:
            code, out, err = project.main("run", "f", "--dry-run")
            self.assertEqual(code, 0)
            self.assertTrue(os.path.isfile(out.strip()))
            self.assertRegex(err, r"(?m)^2  b +command true +a +retries 2$")
            self.assertFalse(os.path.exists(project.at("ran")))
            self.assertFalse(os.path.exists(project.at("miniflow_output/runs")))

    def test_history_is_listed_newest_first_and_filtered(self):
        with Project({"a": flow_json(task("x")), "b": flow_json(task("x", command="exit 1"))}) as project:
            for n, name in enumerate("abab"):
                project.main("run", name, "--run-id", f"r{n}")
            ids = [row["id"] for row in json.loads(project.main("runs", "--json")[1])]
            self.assertEqual(ids, ["r3", "r2", "r1", "r0"])
            self.assertEqual([row["id"] for row in json.loads(project.main("runs", "a", "--json")[1])],
                             ["r2", "r0"])
            self.assertEqual([row["id"] for row in json.loads(project.main(
                "runs", "--status", "failed", "--limit", "1", "--json")[1])], ["r3"])
            self.assertRegex(project.main("runs")[1], r"(?m)^r3 +b +failed +20\S+ +\S+ s +x failed$")

    def test_show_tells_tasks_reasons_and_the_critical_path(self):
        with one(task("a"), task("b", "a", command="exit 7", max_retries=1), task("c", "b")) as project:
            project.main("run", "f", "--run-id", "r")
            out = project.main("show", "last")[1]
            self.assertRegex(out, r"(?m)^run r of flow f: failed \(b failed\)$")
            self.assertRegex(out, r"(?m)^b +failed +2 +\S+ s +started +exit 7$")
            self.assertRegex(out, r"(?m)^c +upstream_failed +0 +- +- +upstream b failed$")
            self.assertIn("critical path: a -> b", out)
            self.assertEqual(json.loads(project.main("show", "r", "--json")[1])["tasks"],
                             project.state("r")["tasks"])

    def test_logs_are_shown_by_task_and_attempt(self):
        with one(task("a", command="echo try $MINIFLOW_ATTEMPT; test $MINIFLOW_ATTEMPT = 2", max_retries=3),
                 task("b", "a")) as project:
            project.main("run", "f", "--run-id", "r")
            self.assertEqual(project.main("logs", "r", "a")[1], "try 2\n")
            self.assertEqual(project.main("logs", "r", "a", "--attempt", "1")[1], "try 1\n")
            self.assertEqual(project.main("logs", "r")[1],
                             "==> a, attempt 2 <==\ntry 2\n==> b, attempt 1 <==\n")
            self.assertEqual(project.main("logs", "r", "b", "--attempt", "2")[0], 3)

    def test_cancel_stops_a_run_from_another_terminal(self):
        stubborn = "trap '' TERM; echo $$ > pid; while :; do sleep 0.1; done"
        with one(task("a", command=stubborn, grace_s=0.3), task("b", "a")) as project:
            process = project.start("run", "f", "--run-id", "r")
            wait_for(lambda: os.path.exists(project.at("pid")) and project.read("pid"), "the task")
            self.assertEqual(project.main("cancel", "last")[:2], (0, "r cancelled\n"))
            process.communicate(timeout=60)
            self.assertEqual(process.returncode, 143)
            self.assertFalse(alive(int(project.read("pid"))))
            code, out, err = project.main("cancel", "r")
            self.assertEqual((code, out, err), (0, "r cancelled\n", "run r does not run: it is cancelled\n"))
            self.assertEqual(project.main("cancel", "nope")[0], 3)

    @unittest.skipUnless(LINUX, "a watchdog that finds what has left its group needs /proc")
    def test_cancel_ends_a_run_whose_engine_hears_nothing(self):
        saved, mf.CANCEL_S = mf.CANCEL_S, 0.3
        try:
            with one(task("a", command="echo $$ > pid; sleep 60", grace_s=0)) as project:
                process = project.start("run", "f", "--run-id", "r")
                pid = int(wait_for(lambda: os.path.exists(project.at("pid")) and project.read("pid").strip(), "it"))
                process.send_signal(signal.SIGSTOP)
                code, out, err = project.main("cancel", "r")
                self.assertEqual((code, out), (0, "r interrupted\n"))
                self.assertIn("still goes on, 0.3 s after SIGTERM", err)
                process.communicate(timeout=60)
                wait_for(lambda: not alive(pid), "the end of the task", 10)
        finally:
            mf.CANCEL_S = saved

    def test_a_log_that_is_a_symbolic_link_by_now_is_not_shown(self):
        with one(task("a")) as project:
            project.main("run", "f", "--run-id", "r")
            log = project.at("miniflow_output/logs/r/a.1.log")
            os.unlink(log)
            project.write("victim", "secret")
            os.symlink(project.at("victim"), log)
            for arguments in (["logs", "r"], ["logs", "r", "a"], ["logs", "-f", "r"]):
                _, out, err = project.main(*arguments)
                self.assertNotIn("secret", out + err)
            self.assertNotIn("secret", str(mf.log_tail(log)))

    def test_logs_can_be_followed_to_the_end_of_the_run(self):
        with one(task("a", command="echo one; sleep 0.5; printf two"), task("b", "a", command="echo three")) as project:
            run = project.start("run", "f", "--run-id", "r")
            wait_for(lambda: os.path.exists(project.at("miniflow_output/logs/r/a.1.log")), "the log")
            followers = [project.start("logs", "r", *task_id, "-f") for task_id in ((), ("a",))]
            shown = [follower.communicate(timeout=60)[0].decode() for follower in followers]
            self.assertEqual(shown, ["a | one\na | two\nb | three\n", "one\ntwo\n"])
            run.communicate(timeout=60)

    def test_clean_removes_what_it_says_and_nothing_else(self):
        with Project({"a": flow_json(task("x")), "b": flow_json(task("x"))}) as project:
            for n in range(3):
                project.main("run", "a", "--run-id", f"a{n}")
            project.main("run", "b", "--run-id", "b0")
            for _ in range(2):
                project.main("run", "a", "--dry-run")
            project.write("miniflow_output/scripts/mine.txt", "")
            self.assertEqual(project.main("clean", "--keep", "1", "--older-than", "1")[1], "")
            plan = project.main("clean", "--keep", "1", "--dry-run")[1]
            self.assertEqual(len(os.listdir(project.at("miniflow_output/runs"))), 4)
            self.assertEqual(project.main("clean", "--keep", "1")[1], plan)
            self.assertEqual([line.split()[1] for line in plan.splitlines()][:2], ["a1", "a0"])
            self.assertEqual(sorted(os.listdir(project.at("miniflow_output/runs"))), ["a2.json", "b0.json"])
            self.assertEqual(sorted(os.listdir(project.at("miniflow_output/logs"))), ["a2", "b0"])
            self.assertEqual(len(os.listdir(project.at("miniflow_output/scripts"))), 2)

    def test_clean_removes_nothing_outside_of_the_output_directory(self):
        for name in ("scripts", "logs", "runs", "tmp"):
            with one(task("a")) as project:
                project.main("run", "f", "--run-id", "r")
                project.main("run", "f", "--dry-run")
                shutil.rmtree(project.at("miniflow_output", name), ignore_errors=True)
                project.write("victim/r/x.sh", "")
                project.write("victim/x.sh", "")
                project.write("victim/r.json", "{}")
                os.symlink("../victim", project.at("miniflow_output", name))
                code, _, err = project.main("clean", "--keep", "0")
                self.assertEqual((code, sorted(os.listdir(project.at("victim")))), (74, ["r", "r.json", "x.sh"]))
                self.assertIn(f"{name}: is there and is not a directory; nothing was removed", err)
        with one(task("a")) as project:
            project.write("miniflow_output/scripts", "")
            code, _, err = project.main("clean", "--keep", "0")
            self.assertEqual((code, "Traceback" in err), (74, False))

    @needs("unshare")
    def test_cancel_never_signals_a_process_that_is_not_the_engine(self):
        """In a container the engine has another number; whose it is outside must not matter."""
        bystander = subprocess.Popen(["sleep", "60"])
        self.addCleanup(bystander.wait)
        self.addCleanup(bystander.kill)
        with one(task("a", command="echo > ready; exec sleep 60")) as project:
            store = mf.Store(project.at("miniflow_output"))
            journal = mf.Journal(store, "r")
            self.addCleanup(journal.close)
            journal.begin(mf.Run(mf.make_plan(make(task("a"))), "r"))
            for change, code in (({"pids": 1}, 2), ({"ticks": 1}, 1), ({"boot": "x"}, 2)):
                owner = {**journal.engine, "pid": bystander.pid, "ticks": mf.start_ticks(bystander.pid), **change}
                with open(store.files("r").lock, "w") as file:
                    json.dump(owner, file)
                saved, mf.CANCEL_S = mf.CANCEL_S, 0.1
                try:
                    self.assertEqual(project.main("cancel", "r")[0], code, change)
                finally:
                    mf.CANCEL_S = saved
                self.assertIsNone(bystander.poll())

    def test_clean_never_removes_a_run_that_goes_on(self):
        with one(task("a", command="touch here; sleep 60")) as project:
            process = project.start("run", "f", "--run-id", "r")
            wait_for(lambda: os.path.exists(project.at("here")), "the task")
            self.assertEqual(project.main("clean", "--keep", "0")[1], "")
            code, _, err = project.main("resume", "r")
            self.assertEqual(code, 4)
            self.assertRegex(
                err, rf"^run r is being run by process {process.pid} on host \S+ since \S+; wait for it")
            process.terminate()
            process.communicate(timeout=60)
            self.assertEqual(process.returncode, 143)

    def test_init_makes_an_example_that_works_and_overwrites_nothing(self):
        with Project() as project:
            self.assertEqual(project.main("init", "demo")[0], 0)
            done = subprocess.run([sys.executable, ENGINE, "run", "hello", "--run-id", "r"],
                                  cwd=project.at("demo"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            self.assertEqual(done.returncode, 0, done.stderr)
            with open(project.at("demo/miniflow_output/logs/r/count.1.log")) as file:
                self.assertEqual(file.read(), "greeted: 1\n")
            self.assertEqual(project.main("init", "demo")[0], 2)
            done = [subprocess.run([sys.executable, ENGINE, "run", "tour", "--run-id", name], cwd=project.at("demo"),
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE) for name in "tu"]
            self.assertEqual([run.returncode for run in done], [0, 0], done)
            with open(project.at("demo/miniflow_output/runs/u.json")) as file:
                tasks = json.load(file)["tasks"]
            self.assertEqual({end: sum(found["status"] == end for found in tasks.values()) for end in mf.SETTLED}, {
                "success": 14, "cached": 1, "skipped": 3, "failed": 1, "upstream_failed": 0, "cancelled": 0})

    def test_the_tour_shows_all_that_a_flow_can_say(self):
        tour = mf._TOUR_FLOW
        used = {name for found in (*tour["tasks"], *(tour.get(name, {}) for name in mf.HANDLERS)) for name in found}
        self.assertEqual({field.name for field in mf.TASK_FIELDS} - used, {
            "script", "tags", "env", "cwd", "python", "stdin", "max_backoff_s", "jitter", "timeout_s", "grace_s",
            "executor", "resources"})
        self.assertEqual({field.name for field in mf.FLOW_FIELDS} - tour.keys(), {
            "$schema", "version", "tags", "max_parallel", "fail_fast", "preload", "secrets", "on_success",
            "schedule"})                       # it runs when somebody asks for it

    def test_the_sample_flow_makes_a_real_report(self):
        with Project() as project:
            for name in ("flows", "tasks"):
                shutil.rmtree(project.at(name))
                shutil.copytree(os.path.join(HERE, name), project.at(name))
            done = project.cli("run", "sample_flow", "--param", "days=10")
            self.assertEqual(done.returncode, 0, done.stderr)
            report = json.loads(project.read("sample_output/report.json"))
            counts = report["readings"]
            self.assertEqual(counts["fetched"], 10 * 24 * 3)
            self.assertEqual(counts["used"] + counts["missing"] + counts["impossible"], counts["fetched"])
            self.assertGreater(counts["missing"], 0)
            self.assertEqual(report["warmest_station"], "old_town")

    def test_an_unreadable_flow_or_state_is_one_clear_error(self):
        with one(task("a")) as project:
            project.write("flows/latin.json", b'{"name": "\xe9"}')
            code, _, err = project.main("run", "latin")
            self.assertEqual((code, err), (
                2, "error: flows/latin.json:1:11: byte 0xe9 is not UTF-8; save the file as UTF-8\n"))
            os.mkdir(project.at("flows/dir.json"))
            code, _, err = project.main("run", "dir")
            self.assertEqual((code, err), (
                2, "error: flows/dir.json: can't be read: it is not a regular file\n"))
            project.write("file", "")
            code, _, err = project.main("run", "f", "-o", "file")
            self.assertEqual(code, 74)
            self.assertIn("can't be used for state", err)
            self.assertEqual(project.main("list")[0], 0)

    def test_a_bug_ends_with_70_a_traceback_and_a_line_that_asks_to_report_it(self):
        @mf.command("crash", "", "")
        def crash(options):
            raise RuntimeError("boom")
        try:
            with Project() as project:
                code, _, err = project.main("crash")
                self.assertEqual(code, 70)
                self.assertIn("RuntimeError: boom", err)
                self.assertIn("this is a bug in MiniFlow", err)
        finally:
            del mf.COMMANDS["crash"]


    PYTHON = """
        import os
        import asyncio
        from miniflow import Workflow, task

        @task(max_retries=0)
        async def a(ctx):
            await asyncio.sleep(0.01)
            return {"n": int(ctx.get("n", 1)) + 1}

        @task(process=True)
        def b(ctx):
            print("in b", ctx["n"])
            return {"m": ctx["n"] * 10}

        @task
        def c(ctx):
            if not os.path.exists("ready"):
                raise RuntimeError("not ready")

        a >> b >> c
        workflow = Workflow([a, b, c], description="in Python")
        """

    def python_flow(self, text=None):
        """Return a Project with a JSON flow f and a flow in Python, py."""
        project = one(task("a"))
        project.__enter__()
        self.addCleanup(project.__exit__)
        project.write("flows/py.py", textwrap.dedent(text or self.PYTHON))
        return project

    def test_a_flow_in_python_is_run_and_gone_on_with_like_any_other(self):
        project = self.python_flow()
        done = project.cli("run", "py", "--run-id", "r", "--param", "n=4")
        self.assertEqual((done.returncode, done.stdout), (1, "r\n"), done.stderr)
        self.assertRegex(done.stderr, "failed +c: RuntimeError: not ready")
        state = project.state("r")
        self.assertEqual((state["params"], state["ctx"], state["tasks"]["c"]["inputs"]),
                         ({"n": "4"}, {"n": 5, "m": 50}, {}))
        self.assertEqual(state["definition"]["tasks"][1],
                         {"id": "b", "function": "py:b", "depends_on": ["a"], "kind": "process"})
        for command, expected in (
                (("list",), "py    3      -     failed 2026"), (("validate", "py"), "py.py: ok, 3 tasks"),
                (("graph", "py"), "function py:b  <- a"), (("runs", "py"), "r    py    failed"),
                (("show", "r"), "c     failed   1"), (("logs", "r"), "==> b, attempt 1 <==\nin b 5\n"),
                (("logs", "r", "b"), "in b 5\n")):
            done = project.cli(*command)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertIn(expected, done.stdout)
        self.assertIn("task a of run r ran within its program", project.cli("logs", "r", "a").stderr)
        project.write("ready", "")
        done = project.cli("resume", "r")
        self.assertEqual((done.returncode, done.stdout), (0, "r\n"), done.stderr)
        self.assertEqual([len(t["attempts"]) for t in project.state("r")["tasks"].values()], [1, 1, 2])
        run = project.run("py", params={"n": 1})
        self.assertEqual((run.status, run.ctx), ("success", {"n": 2, "m": 20}))

    def test_a_signal_cancels_a_flow_in_python(self):
        project = self.python_flow(self.PYTHON.replace("asyncio.sleep(0.01)", "asyncio.sleep(60)"))
        process = project.start("run", "py", "--run-id", "r")
        journal = project.at("miniflow_output/runs/r.jsonl")
        wait_for(lambda: os.path.exists(journal) and "attempt_started" in project.read(journal), "task a")
        self.assertEqual(project.main("cancel", "r")[:2], (0, "r cancelled\n"))
        process.communicate()
        self.assertEqual((process.returncode, project.state("r")["tasks"]["a"]["reason"]),
                         (143, "cancelled by SIGTERM"))

    def test_a_workflow_is_found_by_its_name_or_made_by_a_function(self):
        made = textwrap.dedent(self.PYTHON).replace("workflow = Workflow(", "def create_workflow(): return Workflow(")
        self.assertEqual(self.python_flow(made).cli("validate", "py").returncode, 0)
        for text, expected in (
                ("x = 1", "flows/py.py: it has neither a workflow nor a function create_workflow(); give it: workflow"),
                ("workflow = 3", "flows/py.py: it has as workflow a int, which is no Workflow of this MiniFlow"),
                ("\n1 / 0", "flows/py.py:2: ZeroDivisionError: division by zero"),
                ("def f(:", "flows/py.py:1: SyntaxError: "),
                ("import sys\nsys.exit(3)", "flows/py.py:2: SystemExit: 3"),
                ("class B(BaseException):\n  def __str__(self): return 1 / 0\nraise B",
                 "flows/py.py:3: <class 'miniflow_flow_py.B'>, which can't say what it is"),
                ("import nothing_like_this", "flows/py.py:1: ModuleNotFoundError: No module named 'nothing_like_this'"),
                (textwrap.dedent(self.PYTHON) + "workflow.run_sync()",
                 "flows/py.py: it is being imported to find its workflow; put what runs it under if __name__ == "),
                (textwrap.dedent(self.PYTHON).replace("[a, b, c]", "[b, c]"),
                 "flows/py.py: workflow workflow: task b waits for a, which is not among the workflow's tasks")):
            with self.subTest(text=text[:20]):
                project = self.python_flow(text)
                done = project.cli("validate", "py")
                self.assertEqual((done.returncode, done.stdout), (2, ""))
                self.assertIn(expected, done.stderr)
                self.assertIn("broken: flows/py.py", project.cli("list").stdout)

    def test_a_flow_in_python_may_print_when_it_is_imported_and_hides_no_module(self):
        project = self.python_flow("print('hello')" + textwrap.dedent(self.PYTHON))
        names = ["json", "queue", "traceback", "asyncio", "logging"]
        for name in names:
            shutil.copy(project.at("flows/py.py"), project.at(f"flows/{name}.py"))
        done = project.cli("list", "--json")
        self.assertEqual([row["name"] for row in json.loads(done.stdout)], sorted(["f", "py", *names]), done.stderr)
        project.write("ready", "")
        for name in ("queue", "traceback", "py"):
            self.assertEqual(project.cli("run", name).returncode, 0)

    def test_two_flows_of_one_name_are_told_apart_by_their_paths(self):
        project = self.python_flow()
        os.rename(project.at("flows/py.py"), project.at("flows/f.py"))
        done = project.cli("run", "f")
        self.assertEqual(done.returncode, 2)
        self.assertIn("flows/f.json and ./flows/f.py have the same name; rename one, or give its path", done.stderr)
        self.assertEqual(project.cli("run", "flows/f.json").returncode, 0)
        project.write("ready", "")
        self.assertEqual(project.cli("run", "flows/f.py").returncode, 0)

    def test_what_only_a_program_has_is_gone_on_with_by_that_program(self):
        project = self.python_flow()
        project.cli("run", "py", "--run-id", "r")
        os.unlink(project.at("flows/py.py"))
        done = project.cli("resume", "r")
        self.assertEqual(done.returncode, 2)
        self.assertIn("py.py, which is gone; start that again, with this run id", done.stderr)
        self.assertEqual(project.cli("show", "r").returncode, 0)

    def test_a_function_cant_be_exported_to_bash(self):
        project = self.python_flow()
        done = project.cli("export", "py", "--to", "bash")
        self.assertEqual((done.returncode, done.stdout), (2, ""))
        self.assertIn("task a: py:a is a Python function; bash runs scripts and commands", done.stderr)

    def test_the_sample_in_python_runs(self):
        with one(task("a")) as project:
            shutil.copy(os.path.join(HERE, "flows", "sample_python.py"), project.at("flows"))
            done = project.cli("run", "sample_python", "--param", "days=3", "--run-id", "r")
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertEqual(project.state("r")["ctx"]["mean"], {"harbour": 7.5, "hill": 4.5})
            self.assertIn("mean temperatures: {'harbour': 7.5, 'hill': 4.5}", done.stdout)


class T99CommandLineOfPictures(unittest.TestCase):

    def test_graph_prints_a_flow_or_a_run_in_each_format(self):
        with one(task("a"), task("b", "a", command="exit 1")) as project:
            project.main("run", "f", "--run-id", "r")
            for args, told in ((["f"], "b  command exit 1  <- a"), (["--run", "r"], "✗ b  failed, 0.0"),
                               (["--run", "last", "--format", "mermaid"], "class t1 failed"),
                               (["f", "--format", "dot"], "t0 -> t1"), (["f", "--format", "svg"], "</svg>")):
                code, out, _ = project.main("graph", *args)
                self.assertEqual(code, 0)
                self.assertIn(told, out)
            for args in ([], ["f", "--run", "r"]):
                self.assertEqual(project.main("graph", *args)[0], 2)
            self.assertEqual([project.main("graph", *args)[0] for args in (["g"], ["--run", "x"])], [3, 3])
            plain = project.cli("graph", "f", env={**os.environ, "PYTHONIOENCODING": "ascii"})
            self.assertIn("  a\n  v\n  b\n", plain.stdout)

    def test_a_graph_is_as_wide_as_its_terminal(self):
        with one(task("a"), *[task(f"a_long_name_of_a_task_{n}", "a") for n in range(4)]) as project:
            for columns, drawn in ((80, False), (140, True)):
                _, screen, _ = on_terminal(project, "graph", "f", columns=columns)
                self.assertEqual("▼" in "".join(screen.lines), drawn)

    def test_report_writes_one_file_and_prints_its_path(self):
        with one(task("a")) as project:
            project.main("run", "f", "--run-id", "r")
            self.assertEqual(project.main("report", "last", "-o", "x.html")[:2], (0, "x.html\n"))
            self.assertIn("</html>", project.read("x.html"))
            self.assertEqual(project.main("report", "nope")[0], 3)
            code, _, err = project.main("report", "r", "-o", "no/such/x.html")
            self.assertEqual((code, err), (2, '-o "no/such/x.html": can\'t be written: No such file or directory\n'))

    def test_simulate_compares_numbers_and_writes_nothing(self):
        tasks = [task(f"t{n}") for n in range(4)]
        with one(*tasks, task("end", *[t["id"] for t in tasks])) as project:
            given = [word for n in range(4) for word in ("--duration", f"t{n}=3")] + ["--duration", "end=1.5"]
            code, out, _ = project.main("simulate", "f", "-j", "1", "2", "4", *given)
            self.assertEqual((code, os.listdir(project.path).sort()), (0, None))
            self.assertFalse(os.path.exists(project.at("miniflow_output")))
            self.assertRegex(out, r"(?m)^1        13\.5 s  100%  success\n2        7\.50 s  90%   success\n"
                                  r"4        4\.50 s")
            self.assertIn("critical path (*): t0 -> end", out)
            for words in (["-j", "1", "2", "f"], ["-j", "1,2", "f"], ["f", "-j", "1", "-j", "2"],
                          ["-j", "1,2", "--", "f"]):
                made = json.loads(project.main("simulate", "--json", *given, *words)[1])["runs"]
                self.assertEqual([(run["jobs"], run["makespan_s"]) for run in made], [(1, 13.5), (2, 7.5)], words)

    def test_simulate_knows_earlier_runs_and_params_and_tells_what_a_failure_does(self):
        with one(task("a", command="sleep 0.2", max_retries=1, backoff_s=60), task("b", "a"),
                 task("c", **{"if": "params.deep"}), params={"deep": {"type": "boolean", "required": True}}) as project:
            project.main("run", "f", "--param", "deep=false")
            self.assertEqual(project.main("simulate", "f")[0], 2)
            code, out, _ = project.main("simulate", "f", "--param", "deep=false", "--fail", "a", "--json", "-j", "2")
            made = json.loads(out)
            run = made["runs"][0]
            self.assertEqual(({name: t["status"] for name, t in run["tasks"].items()}, run["status"], made["assumed"]),
                             ({"a": "failed", "b": "upstream_failed", "c": "skipped"}, "failed", {}))
            first, second = run["tasks"]["a"]["attempts"]
            self.assertTrue(0.2 <= first["finished_s"] < 3)
            self.assertAlmostEqual(second["started_s"], first["finished_s"] + 60)
            out = project.main("simulate", "f", "--param", "deep=true", "--fail", "a")[1]
            self.assertIn("failed: a (2 attempts)\nupstream_failed: b\n", out)
            self.assertIn("assumed: it takes ", out)
            self.assertEqual(len(os.listdir(project.at("miniflow_output/runs"))), 1)

    def test_simulate_says_what_is_wrong(self):
        with one(task("a"), task("each", foreach=[1, 2])) as project:
            for words, code, told in (
                    ([], 2, "give the name of a flow"), (["f", "-j", "x"], 2, '-j "x": expected a positive number'),
                    (["f", "-j", "0"], 2, '-j "0": expected'), (["f", "--fail", "b"], 3, 'has no task "b"'),
                    (["f", "--fail", "each[1]"], 0, ""), (["f", "--fail", "a[1]"], 3, 'no task "a[1]"'),
                    (["f", "--duration", "a"], 2, '--duration "a": expected TASK=SECONDS'),
                    (["f", "--duration", "a=-1"], 2, "expected TASK=SECONDS"),
                    (["f", "--duration", "b=1"], 3, 'has no task "b"'), (["g"], 3, "")):
                with self.subTest(words=words):
                    got, _, err = project.main("simulate", *words)
                    self.assertEqual(got, code)
                    self.assertIn(told, err)

    def test_a_flow_of_functions_is_simulated_without_a_call(self):
        with Project() as project:
            project.write("flows/f.py", "from miniflow import Workflow, task\n@task()\ndef a(ctx):\n    1 / 0\n"
                                        "workflow = Workflow([a])\n")
            code, out, _ = project.main("simulate", "f")
            self.assertEqual((code, "all at once: success after 1.00 s" in out), (0, True), out)


class T99HouseRules(unittest.TestCase):
    """What keeps the file readable."""

    @classmethod
    def setUpClass(cls):
        with open(ENGINE, encoding="utf-8") as file:
            cls.text = file.read()
        cls.tree = ast.parse(cls.text)
        cls.line = cls.text[:cls.text.index("## THE LINE")].count("\n") + 1
        cls.banners = re.findall(r"(?m)^# == (.*)$", cls.text)

    def bound(self):
        where = {}
        for node in self.tree.body:
            names = [node.name] if hasattr(node, "name") else [
                t.id for t in getattr(node, "targets", [getattr(node, "target", None)])
                if isinstance(t, ast.Name)]
            for name in names:
                where.setdefault(name, node.lineno)
        return where

    def test_a_section_mentions_only_names_bound_above_it(self):
        where, ends_at = self.bound(), {}
        for node in self.tree.body:
            if hasattr(node, "name"):
                ends_at[node.name] = node.end_lineno         # of the last definition, where there are overloads
        late = [(table.get_name(), name) for table in symtable.symtable(self.text, ENGINE, "exec").get_children()
                for name in self.globals_used(table) if where.get(name, 0) > ends_at.get(table.get_name(), 10**9)]
        self.assertEqual(late, [])

    def globals_used(self, table):
        """Return the names of the module that a function or class, or what is within it, refers to."""
        own = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global() and symbol.is_referenced()}
        return own.union(*map(self.globals_used, table.get_children()))

    def test_nothing_above_the_line_touches_the_outside(self):
        outside = {"os", "time", "signal", "sys", "subprocess", "socket", "open", "print", "input", "random",
                   "threading", "shutil", "select", "stat", "errno"}
        used = [(node.lineno, node.id) for node in ast.walk(self.tree)
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
                and node.id in outside and node.lineno < self.line]
        now = [node.lineno for node in ast.walk(self.tree) if isinstance(node, ast.Attribute)
               and node.attr in ("now", "today", "utcnow") and node.lineno < self.line
               and not (isinstance(node.value, ast.Name) and node.value.id == "world")]
        self.assertEqual((used, now), ([], []))

    def test_contents_banners_and_all_agree(self):
        contents = re.findall(r"(?m)^ +(\d+\. [A-Z].*)$", ast.get_docstring(self.tree, clean=False))
        self.assertEqual(contents, self.banners)
        self.assertEqual([int(banner.split(".")[0]) for banner in self.banners],
                         list(range(1, len(self.banners) + 1)))
        starts = [self.text[:self.text.index(f"# == {banner}")].count("\n") + 1 for banner in self.banners]
        where, section, claimed = self.bound(), "", []
        for line in self.text[self.text.index("__all__ = ["):].split("]")[0].splitlines()[1:]:
            if line.strip().startswith("#"):
                section = line.strip("# ").strip()
            for name in re.findall(r'"(\w+)"', line):
                claimed.append(name)
                index = max(n for n, start in enumerate(starts) if start < where[name])
                self.assertEqual(self.banners[index].split(":")[0], section, name)
        self.assertEqual(claimed, mf.__all__)

    def test_functions_and_classes_stay_small(self):
        lengths = {node.name: node.end_lineno - node.lineno + 1 for node in ast.walk(self.tree)
                   if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
        self.assertEqual([name for name, length in lengths.items() if length > 60], [])
        ordered = sorted(lengths.values())
        self.assertLessEqual(ordered[len(ordered) // 2], 10)
        self.assertLessEqual(ordered[len(ordered) * 9 // 10], 30)
        self.assertEqual([node.name for node in self.tree.body if isinstance(node, ast.ClassDef)
                          and node.end_lineno - node.lineno + 1 > 250], [])

    def test_public_names_have_a_docstring_of_which_the_first_line_is_a_sentence(self):
        for node in self.tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                text = ast.get_docstring(node)
                self.assertTrue(text, node.name)
                self.assertIn(text.splitlines()[0][-1], ".;:?", node.name)

    def test_comments_and_docstrings_are_a_sixth_to_a_third_of_the_lines(self):
        """Texts in other languages, which are constants of many lines, count as neither code nor comment."""
        with open(ENGINE, "rb") as file:
            told = {token.start[0] for token in tokenize.tokenize(file.readline)
                    if token.type == tokenize.COMMENT}
        texts = set()
        for node in ast.walk(self.tree):
            documented = isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module))
            if documented and ast.get_docstring(node) is not None:
                told.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                texts.update(range(node.lineno + 1, node.end_lineno + 1))
        written = {n for n, line in enumerate(self.text.splitlines(), 1) if line.strip()} - texts
        share = len(told & written) / len(written)
        self.assertTrue(1 / 6 <= share <= 1 / 3, share)

    def test_no_line_is_wider_than_110_columns_and_120_here(self):
        for path, width in ((ENGINE, 110), (os.path.abspath(__file__), 120)):
            with open(path, encoding="utf-8") as file:
                self.assertEqual([n for n, line in enumerate(file, 1) if len(line) > width + 1], [], path)

    def test_errors_carry_their_value(self):
        """Most raises of the user's errors are built from the offending value."""
        raises = [node for node in ast.walk(self.tree)
                  if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
        with_value = [node for node in raises if any(
            isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)
            for arg in node.exc.args for part in ast.walk(arg))]
        self.assertGreaterEqual(len(with_value) / len(raises), 0.8)

    def test_only_the_standard_library_is_imported(self):
        known = getattr(sys, "stdlib_module_names", None)
        if known is None:
            return                             # 3.9 does not tell what its library holds; a newer Python does
        for path in (ENGINE, os.path.abspath(__file__)):
            with open(path, encoding="utf-8") as file:
                tree = ast.parse(file.read())
            names = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import)
                     for alias in node.names}
            names |= {node.module.split(".")[0] for node in ast.walk(tree)
                      if isinstance(node, ast.ImportFrom) and node.module}
            self.assertEqual(names - set(known) - {"miniflow"}, set())

    def test_starting_up_imports_nothing_slow(self):
        """What some command needs and Python itself does not load at its start, other commands do not pay for."""
        slow = {"argparse", "asyncio", "concurrent.futures", "contextlib", "ctypes", "dataclasses", "datetime",
                "difflib", "fcntl", "gettext", "hashlib", "http.server", "inspect", "locale", "logging",
                "multiprocessing", "random", "select", "shutil", "signal", "socket", "subprocess", "tempfile",
                "textwrap", "threading", "traceback", "typing", "urllib.request", "zlib"}
        with one(task("a", args=["${{ run.id }}"])) as project:
            for words, banned in ((["--version"], slow | {"enum", "functools", "json", "re"}), (["list"], slow)):
                code = (f"import sys; sys.path.insert(0, {HERE!r}); before = set(sys.modules)\n"
                        f"import miniflow, os\ntry: miniflow.main({words!r})\nexcept SystemExit: pass\n"
                        f"print(sorted({banned!r} & (sys.modules.keys() - before)), file=sys.stderr)")
                done = subprocess.run([sys.executable, "-S", "-c", code], cwd=project.path, stdout=subprocess.PIPE,
                                      stderr=subprocess.PIPE)
                self.assertEqual((done.stderr, bool(done.stdout)), (b"[]\n", True), words)

    def test_the_licence_and_the_picture_travel_with_the_file(self):
        self.assertIn("Permission is hereby granted, free of charge", mf.__doc__)


class _Result(unittest.TextTestResult):
    """Counts what passed as well."""

    passed = 0

    def addSuccess(self, test):
        super().addSuccess(test)
        self.passed += 1


def each_test(suite):
    """Yield the tests of a suite, however deep they are."""
    for item in suite:
        if isinstance(item, unittest.TestSuite):
            yield from each_test(item)
        else:
            yield item


def run_some(tests, numbers, answers):
    """Run tests, of which the numbers come two bytes each, and write down what became of them."""
    result = _Result(unittest.runner._WritelnDecorator(open(os.devnull, "w")), True, 0)
    for number in iter(lambda: os.read(numbers, 2), b""):
        test, mark = tests[int.from_bytes(number, "big")], result.passed
        failures, skips = len(result.failures) + len(result.errors), len(result.skipped)
        unittest.TestSuite([test])(result)
        told = result.failures + result.errors
        what = "F" if len(told) > failures else "s" if len(result.skipped) > skips else "."
        assert what != "." or result.passed > mark, test.id()
        text = "\n".join(f"{case.id()}\n{trace}" for case, trace in told[failures:]) or "".join(
            f"{case.id()}: {reason}\n" for case, reason in result.skipped[skips:])
        answers.write(json.dumps([test.id(), what, text]) + "\n")
        answers.flush()
        result.failures, result.errors = [], []
        sys.stderr.write(what)
        sys.stderr.flush()


def run_in_parallel(tests):
    """Run tests in processes, as most of them wait for something; return the lines that they wrote down."""
    compiled_engine()                           # once for all of them
    reader, writer = os.pipe()
    files, workers = [], []
    for _ in range(min(8, 2 * (os.cpu_count() or 1))):
        files.append(tempfile.TemporaryFile("w+"))
        workers.append(os.fork())
        if not workers[-1]:
            code = 1
            try:
                os.close(writer)
                run_some(tests, reader, files[-1])
                code = 0
            finally:
                os._exit(code)
    os.close(reader)
    for number in range(len(tests)):
        os.write(writer, number.to_bytes(2, "big"))
    os.close(writer)
    died = [pid for pid in workers if os.waitpid(pid, 0)[1]]
    found = []
    for file in files:
        file.seek(0)
        found += [json.loads(line) for line in file]
    missing = {test.id() for test in tests} - {name for name, _, _ in found}
    return found + [[name, "F", f"{name}: its process {died} died"] for name in missing]


def run_all():
    """Run all tests and end with a line of counts; return the exit code."""
    if len(sys.argv) > 1 or not hasattr(os, "fork"):
        result = unittest.main(exit=False, testRunner=unittest.TextTestRunner(resultclass=_Result)).result
        passed, skipped = result.passed, len(result.skipped)
        failed = (len({test.id().split(" ")[0] for test, _ in result.failures + result.errors})
                  + len(result.unexpectedSuccesses))
    else:
        tests = list(each_test(unittest.defaultTestLoader.loadTestsFromModule(sys.modules["__main__"])))
        found = run_in_parallel(tests)
        passed, failed, skipped = ([what for _, what, _ in found].count(mark) for mark in ".Fs")
        sys.stderr.write("\n" + "".join(f"{text}\n" for _, what, text in sorted(found) if what != "."))
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    sys.exit(run_all())
