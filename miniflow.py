#!/usr/bin/env python3
"""MiniFlow: a workflow engine in one file, with nothing but Python's standard library.

Copy this file beside your scripts.  Write a flow as JSON (flows/NAME.json), put the scripts it names into
tasks/, and run it:

    python3 miniflow.py init            a working example to start from
    python3 miniflow.py run sample_flow

The same from Python: `from miniflow import MiniFlow`; flows of Python functions: `from miniflow import task,
Workflow`.  The README has the whole reference.


How it is built
---------------

    flows/etl.json --parse_flow--.                                              .--> terminal
    flows/etl.py, @task, >> ------+--> Flow --make_plan--> Plan --> Run ---------+--> journal (disk)
                       make_flow      |                     |      ^  |          '--> web page, API
                                 check_flow          exporters, |  | due(run, now, slots)
                                                graph, simulate |  v
                                                        apply(event) + drive --> Start, Stop, Settle, Finish
                                                                  ^      |
                                                                  '--- World (processes; Slurm; functions)

Five types, five tenses.  A Flow is what the author wrote.  A Plan is what will happen.  An Event is a fact:
it is appended to the journal first, then it is true.  A Run is the sum of its events and changes through
apply() alone, so that replaying the journal rebuilds it exactly.  An Action is what is due now.

Two laws, both held by tests.  A section mentions only names bound above it.  And one line crosses the file:
nothing above it touches the clock, the disk, processes, the network, the environment or chance, so that all
of it can be tested in microseconds, simulated and replayed.

Contents
--------

     1. ERRORS: what can go wrong, by whose fault, with which exit code?
     2. MODEL: what did the author write?
     3. JSON TEXT: what does this text say, and where exactly is it wrong?
     4. VALUES: what do params and ${{ templates }} stand for?
     5. CRON: given a schedule and a time, when next?
     6. CHECKING: what is wrong with the meaning of a flow?
     7. JSON FRONT END: how does a flow become JSON, and JSON a flow?
     8. PYTHON FRONT END: how do functions become a flow?
     9. PLAN: in which order will what happen?
    10. EVENTS AND RUN: what has happened, and what does it add up to?
    11. SCHEDULER: given a run and the time, what should be done now?
    12. DUE RUNS: given schedules and the time, which runs should start?
    13. STATE: how is a run written down, and read back?
    14. INVOCATION: what exactly is executed for an attempt, and what did it hand on?
    15. JOBS: what is an attempt to a cluster, and what does the cluster say of it?
    16. TEXT: how is a value made fit to be seen?
    17. EXPORTERS: how does a plan look in other languages?
    18. LAYERS: where does each task of a plan stand in a picture?
    19. GRAPHS: how does a plan look as a picture?
    20. BASH: how does a flow run where there is no MiniFlow?
    21. MAKE: how does a flow run where there is make?
    22. AIRFLOW: how does a flow run where there is Airflow?
    23. ARGO: how does a flow run on Kubernetes?
    24. SIMULATION: what would a run do, and how long would it take?
    --- the line: all above is pure ---
    25. DISK: how does a byte get onto the disk, and stay there?
    26. LOCKS: which one engine may work on a run?
    27. STORE: where do runs live, and how do they survive?
    28. SPAWN: how does a process begin with nothing of ours but what it is given?
    29. ORPHANS: which processes belong to an attempt, and who ends them when its engine is gone?
    30. TEMPLATE INTERPRETER: how does a Python script begin without a start of Python?
    31. FRESHNESS: which tasks need not run, as nothing that they are made of has changed?
    32. PROCESSES: how are attempts started, watched and ended?
    33. SLURM: how do attempts run as jobs of a cluster?
    34. FUNCTIONS: how are Python functions called, and what becomes of what they return?
    35. RUNNER: how is one run driven to its end?
    36. REPORTING: how is it told to a person?
    37. TERMINAL: how does a run look while it goes on?
    38. SUMMARIES: how is it told what a run did, or would do?
    39. REPORT: how does a run become one page that stands for itself?
    40. LIBRARY: what does a Python program use?
    41. DAEMON: how is what is due started, exactly once?
    42. FOLLOWING: what happens in runs, as seen from outside their engines?
    43. PAGE: the web page
    44. WEB: what is the answer to a request?
    45. SERVER: how do requests come in, and how do answers go out?
    46. BUNDLE: how does a flow travel, with all that it needs, in one file?
    47. COMMAND LINE: what can be typed?


Licence (MIT)
-------------

Copyright (c) 2026 the MiniFlow authors

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without
limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the
Software, and to permit persons to whom the Software is furnished to do so, subject to the following
conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions
of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED
TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL
THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF
CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER
DEALINGS IN THE SOFTWARE.
"""
from __future__ import annotations

# What everything uses.
from collections import deque, namedtuple
from collections.abc import Mapping
from itertools import chain, islice

# What is used below the line.
import errno
import gc
import os
import stat
import sys
import time

# A start costs what is imported, so no start pays for what it does not use.  What a few functions need
# (argparse, subprocess, difflib, …) they import; what many need is imported when it is first asked for.
# Types are for the reader and for those who check them: typing alone costs a third of Python's own start, and
# each of its NamedTuples three times one of collections, which does not look at the types.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import datetime
    import heapq
    import json
    import re
    import signal
    import zlib
    from typing import (
        IO, Any, Callable, Collection, Coroutine, Deque, Dict, FrozenSet, Generator, Iterable, Iterator, List,
        NamedTuple, Optional, Sequence, Set, Tuple, Type, Union, overload,
    )
else:
    class _Later:
        """Stands for a module until something of it is asked for, as `lazy import` does in PEP 810."""

        def __init__(self, name):
            self.__name__ = name

        def __getattr__(self, name):
            module = globals()[self.__name__] = __import__(self.__name__)
            return getattr(module, name)

    datetime, heapq, json, re, signal, zlib = map(
        _Later, ("datetime", "heapq", "json", "re", "signal", "zlib"))

    class _Record(tuple):
        """What all tuples with named fields have in common."""

        __slots__ = ()

        @classmethod
        def _make(cls, values):
            return cls(*values)

        def _replace(self, **changes):
            made = tuple.__new__(type(self), map(changes.pop, self._fields, self))
            if changes:
                raise TypeError(f"{type(self).__name__} has no field {next(iter(changes))}")
            return made

        __replace__ = _replace

        def _asdict(self):
            return dict(zip(self._fields, self))

        def __repr__(self):
            fields = ", ".join(f"{name}={value!r}" for name, value in zip(self._fields, self))
            return f"{type(self).__name__}({fields})"

        def __getnewargs__(self):
            return tuple(self)

    class _FromFields(type):
        """Makes of a class statement with annotations what typing.NamedTuple makes of it.

        collections.namedtuple compiles a constructor for each class, which took a quarter of a start.  Here
        all that have as many fields share the code of one, in which only the names differ.
        """

        getters = namedtuple("Getters", [f"field{n}" for n in range(30)])
        codes = {}

        def __new__(cls, name, bases, body):
            annotations = body["__annotations__"]
            fields = tuple(annotations)
            defaults = {field: body[field] for field in fields if field in body}
            if len(fields) not in cls.codes:
                values = "".join(f"_{n}, " for n in range(len(fields)))
                cls.codes[len(fields)] = eval(f"lambda _cls, {values}: _new(_cls, ({values}))").__code__
            code = cls.codes[len(fields)].replace(co_name="__new__", co_varnames=("_cls", *fields))
            new = type(cls.__new__)(code, {"_new": tuple.__new__}, None, tuple(defaults.values()))
            new.__annotations__, new.__qualname__ = annotations, f"{name}.__new__"
            body.update(zip(fields, map(vars(cls.getters).get, cls.getters._fields)), __new__=new,
                        __slots__=(), _fields=fields, _field_defaults=defaults, __match_args__=fields)
            return type(name, (_Record,), body)

    NamedTuple = type.__new__(_FromFields, "NamedTuple", (), {})

__version__ = "0.1.0"

__all__ = [
    # 1. ERRORS
    "MiniFlowError", "UsageError", "FlowError", "NotFound", "FlowNotFound", "FlowFailed", "RunLocked",
    "StateError", "RetryError", "NoRetry",
    # 2. MODEL
    "Flow", "Task", "Schedule", "Script", "Command", "Function", "Retry", "Param",
    # 6. CHECKING
    "check_flow",
    # 7. JSON FRONT END
    "parse_flow", "flow_schema",
    # 8. PYTHON FRONT END
    "task", "FunctionTask", "make_flow",
    # 9. PLAN
    "Plan", "Selection", "make_plan",
    # 10. EVENTS AND RUN
    "Run", "TaskRun", "Attempt",
    # 11. SCHEDULER
    "due", "next_wake", "drive",
    # 40. LIBRARY
    "MiniFlow", "Workflow", "StateStore", "JSONStateStore", "MemoryStateStore",
    # 47. COMMAND LINE
    "main",
]


# ============================================================================
# == 1. ERRORS: what can go wrong, by whose fault, with which exit code?
# ============================================================================
# Every error that a user can cause or mend is a MiniFlowError: one message that says where, what (with the
# value) and what would be right.  Only main() turns one into text and an exit code.  Anything else that is
# raised is a bug in MiniFlow, ends with exit code 70 and shows its traceback.  A task that fails is an event,
# not an error.

class MiniFlowError(Exception):
    """The base of every error that a user can cause or mend; shown as text, never as a traceback."""

    exit_code = 1


class UsageError(MiniFlowError, ValueError):
    """The command line or an argument asks for something that makes no sense."""

    exit_code = 2


class FlowError(MiniFlowError, ValueError):
    """A flow is invalid; `problems` holds all that is wrong with it, a line each, with its place."""

    exit_code = 2

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems: Tuple[str, ...] = tuple(problems)
        super().__init__("\n".join(self.problems))


class NotFound(MiniFlowError, LookupError):
    """There is no such flow, run or task."""

    exit_code = 3


class FlowNotFound(NotFound, FileNotFoundError):
    """There is no flow of that name."""


class FlowFailed(MiniFlowError):
    """A run did not end in success; `run` is the Run."""

    def __init__(self, message: str, run: Any) -> None:
        super().__init__(message)
        self.run = run


class RunExists(UsageError):
    """A run of that id was made by somebody else a moment ago."""


class RunLocked(MiniFlowError):
    """Another engine is working on the run."""

    exit_code = 4


class StateError(MiniFlowError):
    """State can't be written, or can't be read (EX_IOERR of sysexits.h)."""

    exit_code = 74


class RetryError(Exception):
    """Raised by a Python task: try again, whatever retry_on says, as long as max_retries allows it."""


class NoRetry(Exception):
    """Raised by a Python task: another attempt would make no sense."""


def near(name: str, names: Collection[str]) -> str:
    """Return ", did you mean X?" for the closest of `names`, or nothing; of thousands none is looked for."""
    import difflib
    close = difflib.get_close_matches(name, list(names), 1) if len(names) <= 2000 else []
    return f", did you mean {close[0]}?" if close else ""


def shown(value: Any, width: int = 60) -> str:
    """Return `value` as JSON text for a message: ASCII, on one line, cut to `width`."""
    text, told = "", value[:width] if isinstance(value, str) else value
    for piece in json.JSONEncoder(default=repr).iterencode(told):
        text += piece[:width + 1]
        if len(text) > width:                  # of a large value no more is written than is shown
            return text[:width - 1] + "…"
    return text + ("…" if isinstance(value, str) and len(value) > width else "")


# ============================================================================
# == 2. MODEL: what did the author write?
# ============================================================================
# Plain immutable values, the same whichever front end made them.  A Flow holds Tasks; a Task has one action,
# says what it waits for (`depends_on` and a trigger rule) and when a failure of it is tried again (Retry).
#
# They are NamedTuples: importing dataclasses would cost every start of the program 10 ms.  Templates stay in
# them as the text that the author wrote, so that a Flow can be compared with another and written down again.
#
# Stored words (statuses, trigger rules) are never renamed: they stand in the files of runs long past.  They
# are plain strings and no enum for the same reason: what is in memory is what is in the file.

PENDING, RUNNING, RETRYING = "pending", "running", "retrying"
SUCCESS, CACHED, SKIPPED = "success", "cached", "skipped"
FAILED, UPSTREAM_FAILED, CANCELLED = "failed", "upstream_failed", "cancelled"
INTERRUPTED = "interrupted"  # of a run or an attempt whose engine died; never an end of a task

#: Every state of a task.
TASK_STATES = (PENDING, RUNNING, RETRYING, SUCCESS, CACHED, SKIPPED, FAILED, UPSTREAM_FAILED, CANCELLED)
#: The states that a task does not leave.
SETTLED = frozenset(TASK_STATES[3:])
#: Every state of a run.
RUN_STATES = (RUNNING, SUCCESS, FAILED, CANCELLED, INTERRUPTED)

#: The value of a param that has no default.
MISSING: Any = type("MISSING", (), {"__repr__": lambda self: "MISSING", "__slots__": ()})()


class Counts(NamedTuple):
    """How the upstream of a task ended: how many of each kind."""

    success: int
    skipped: int
    failed: int


#: Trigger rule -> what becomes of a task once all its upstream has settled: it runs, or ends as named.
#: Airflow's meanings (airflow.ti_deps.deps.trigger_rule_dep); a task without upstream always runs.
TRIGGER_RULES: Dict[str, Callable[[Counts], str]] = {
    "all_success": lambda up: UPSTREAM_FAILED if up.failed else SKIPPED if up.skipped else RUNNING,
    "all_done": lambda up: RUNNING,
    "all_failed": lambda up: SKIPPED if up.success or up.skipped else RUNNING,
    "one_success": lambda up: RUNNING if up.success else UPSTREAM_FAILED if up.failed else SKIPPED,
    "one_failed": lambda up: RUNNING if up.failed else SKIPPED,
    "none_failed": lambda up: UPSTREAM_FAILED if up.failed else RUNNING,
    "none_failed_min_one_success":
        lambda up: UPSTREAM_FAILED if up.failed else RUNNING if up.success else SKIPPED,
    "none_skipped": lambda up: SKIPPED if up.skipped else RUNNING,
    "always": lambda up: RUNNING,
}

#: Fields of a flow with a task each that comes after all others, and what has to be for it to run.
HANDLERS: Dict[str, Callable[[Counts], str]] = {
    "on_success": lambda up: SKIPPED if up.failed else RUNNING,
    "on_failure": lambda up: RUNNING if up.failed else SKIPPED,
    "finally": lambda up: RUNNING,
}


class Param(NamedTuple):
    """One declared param of a flow: what may be given for it."""

    type: Optional[str] = None
    default: Any = MISSING
    required: bool = False
    enum: Optional[Tuple[Any, ...]] = None
    min: Optional[float] = None
    max: Optional[float] = None
    pattern: Optional[str] = None
    description: str = ""


class Script(NamedTuple):
    """An action: a Python file below the tasks directory."""

    path: str
    args: Any = ()                             # a tuple, or a dict of options
    python: Optional[str] = None
    stdin: Optional[str] = None


class Command(NamedTuple):
    """An action: a shell string, or an argument vector that no shell sees."""

    command: Union[str, Tuple[str, ...]]
    args: Any = ()
    stdin: Optional[str] = None


class Http(NamedTuple):
    """An action: a request to a web server; `request` has the members of HTTP_FIELDS."""

    request: Mapping[str, Any]
    args: Tuple[()] = ()
    stdin: None = None


class WaitFor(NamedTuple):
    """An action: to wait until something is there; `condition` has the members of WAIT_FIELDS."""

    condition: Mapping[str, Any]
    args: Tuple[()] = ()
    stdin: None = None


class SubFlow(NamedTuple):
    """An action: another flow of the same directory, with params of its own."""

    flow: str
    params: Mapping[str, Any] = {}
    args: Tuple[()] = ()
    stdin: None = None


class Function(NamedTuple):
    """An action: a Python function, known as module:name, which is called with the task's context.

    `kind` is where it runs: on the event loop (async), in a thread, or in a process of its own.
    """

    name: str
    kind: str = "async"

    @property
    def args(self) -> Tuple[()]:
        """A function has no arguments but its context."""
        return ()

    @property
    def stdin(self) -> None:
        """A function has no standard input of its own."""
        return None


if TYPE_CHECKING:
    Action = Union[Script, Command, Http, WaitFor, SubFlow, Function]


#: The field of a flow file, or of the record of a run, that holds each action.
ACTION_WORDS = {Script: "script", Command: "command", Http: "http", WaitFor: "wait_for", SubFlow: "flow",
                Function: "function"}
#: Actions that are programs of ours: such a process says why it failed.
TELLING = (Http, WaitFor, SubFlow)
#: Where attempts run: beside the engine, or as jobs of a cluster.
LOCAL, SLURM = "local", "slurm"


def chance(*names: Any) -> float:
    """Return a number from 0 to 1 that looks random and is always the same for the same names."""
    return zlib.crc32("\0".join(map(str, names)).encode()) / 2**32


class Retry(NamedTuple):
    """When a failed attempt is followed by another, and after how long; times in seconds."""

    max_retries: int = 0
    backoff_s: float = 0
    max_backoff_s: float = 3600
    jitter: float = 0
    retry_on: Optional[Tuple[Union[int, str], ...]] = None

    def wait_s(self, attempt: int, chance: float) -> float:
        """Return the wait after failed attempt `attempt` (from 1); `chance` (0 to 1) is for the jitter."""
        wait = min(float(self.max_backoff_s), self.backoff_s * 2.0 ** min(attempt - 1, 64))
        return wait * (1 - self.jitter) + wait * self.jitter * chance

    def covers(self, code: Union[int, str, None], final: bool) -> bool:
        """Tell whether a failure with `code` is retried; a `final` one only where retry_on names it."""
        if code == RetryError.__name__:
            return True
        if self.retry_on is None:
            return not final
        return code in self.retry_on


class Task(NamedTuple):
    """One node of a flow."""

    id: str
    action: Action
    depends_on: Tuple[str, ...] = ()
    env: Mapping[str, Any] = {}
    cwd: Optional[str] = None
    retry: Retry = Retry()
    timeout_s: Optional[float] = None
    grace_s: float = 5
    trigger_rule: str = "all_success"
    condition: Optional[str] = None            # `if` in the flow file
    foreach: Union[None, str, Tuple[Any, ...]] = None               # one instance for each of these values
    matrix: Optional[Mapping[str, Any]] = None # one instance for each combination
    max_parallel: Optional[int] = None         # of the instances
    inputs: Optional[Tuple[str, ...]] = None   # patterns of files; with one of these it runs only where
    outputs: Optional[Tuple[str, ...]] = None  # something has changed since it last succeeded
    allow_failure: bool = False
    priority: int = 0
    pool: Optional[str] = None
    executor: Optional[str] = None             # where it runs; None: as the run says
    resources: Mapping[str, Any] = {}          # what a job of it needs
    tags: Tuple[str, ...] = ()
    description: str = ""
    handler: Optional[str] = None              # which one of HANDLERS it is, if it is one

    @property
    def asks(self) -> bool:
        """True if more than its upstream decides whether it runs, or how often."""
        return self.condition is not None or self.many is not None or self.may_be_cached

    @property
    def may_be_cached(self) -> bool:
        """True if it need not run where nothing has changed."""
        return self.inputs is not None or self.outputs is not None

    @property
    def many(self) -> Optional[str]:
        """The field that makes instances of the task, if there is one."""
        return "foreach" if self.foreach is not None else "matrix" if self.matrix is not None else None


def instance_id(task_id: str, number: int) -> str:
    """Return the id of an instance of a task; they are counted from 0."""
    return f"{task_id}[{number}]"


#: The fields of a schedule that say when, of which it has one.
WHEN_FIELDS = ("cron", "every_s", "at")


class Schedule(NamedTuple):
    """When a flow is run by itself, with which params, and what is done about times that were missed."""

    cron: Optional[str] = None
    every_s: Optional[int] = None
    at: Optional[str] = None
    timezone: Optional[str] = None             # None: UTC
    catchup: str = "none"
    overlap: str = "skip"
    params: Mapping[str, Any] = {}
    jitter_s: float = 0


#: What becomes of scheduled times that were missed, and of those that come while the flow runs.
CATCHUPS, OVERLAPS = ("none", "latest", "all"), ("skip", "queue", "allow")


class Flow(NamedTuple):
    """A definition: tasks and how they hang together.  `params` is None where any param is taken."""

    name: str
    tasks: Tuple[Task, ...]
    description: str = ""
    version: str = ""
    tags: Tuple[str, ...] = ()
    params: Optional[Mapping[str, Param]] = None
    env: Mapping[str, Any] = {}
    max_parallel: Optional[int] = None
    pools: Mapping[str, int] = {}
    fail_fast: bool = False
    timeout_s: Optional[float] = None
    secrets: Tuple[str, ...] = ()              # environment variables whose values are never shown
    preload: Tuple[str, ...] = ()              # modules that Python scripts find imported already
    schedule: Tuple[Schedule, ...] = ()
    executor: Optional[str] = None             # of a run: where tasks run that don't say; in no flow file


def executor_of(flow: Flow, task: Task) -> str:
    """Return where attempts of `task` run; programs of ours, which only wait, stay beside the engine."""
    if not isinstance(task.action, (Script, Command)):
        return LOCAL
    return task.executor or flow.executor or LOCAL


def add_handlers(tasks: Sequence[Task], handlers: Mapping[str, Task]) -> Tuple[Task, ...]:
    """Return `tasks` and behind them the `handlers` of a flow, each of which waits for all that come before.

    What on_success and on_failure do themselves never decides how a run ends.
    """
    found = list(tasks)
    for field in HANDLERS:
        if field in handlers:
            tolerant = handlers[field].allow_failure or field != "finally"
            found.append(handlers[field]._replace(handler=field, trigger_rule=field, allow_failure=tolerant))
    names = list(dict.fromkeys(task.id for task in found))
    return tuple(task._replace(depends_on=tuple(
        name for name in names if name != task.id and (task.handler == "finally" or name not in late)))
        if task.handler else task
        for late in [{task.id for task in found if task.handler}] for task in found)


# ============================================================================
# == 3. JSON TEXT: what does this text say, and where exactly is it wrong?
# ============================================================================
# Two readers that agree.  json.loads, made strict by hooks, reads what is right at C speed.  Only when it
# refuses, or when something later turns out to be wrong, does the Reader go through the text slowly, tell
# everything that is wrong at once, and say at which line and column a member stands.  Strict means more than
# RFC 8259 asks: no duplicate keys, no NaN or Infinity (also not as 1e999), no lone surrogates, no NUL,
# nothing nested deeper than MAX_DEPTH, no number of more than MAX_DIGITS digits.

MAX_DEPTH = 64
MAX_DIGITS = 308
MAX_BYTES = 32 * 2**20
BYTE_ORDER_MARK = "\ufeff"                    # which some editors write before a text
MAX_PROBLEMS = 100

if TYPE_CHECKING:
    Path = Tuple[Union[str, int], ...]


class Problem(NamedTuple):
    """Something wrong at `path` of a document: what it is, and what would be right."""

    path: Path
    what: str


def format_path(path: Path) -> str:
    """Return `path` the way JSON tools write it: tasks[2].env.HOME."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        elif re.fullmatch(r"[A-Za-z0-9_$-]+", step):
            text += f".{step}" if text else step
        else:
            text += f"[{shown(step)}]"
    return text


_SPACE = r"[ \t\n\r]*"
_STRING = r'"(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*"'
_NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?"
_WORD = r"[A-Za-z_+-]*[A-Za-z0-9_]*"
_WORDS = {"true": True, "false": False, "null": None}


class _Halt(Exception):
    """The text can't be read any further."""


class Reader:
    """Reads JSON text slowly and strictly: `value`, all `problems`, the `places` of `wanted` paths."""

    def __init__(self, text: str, wanted: FrozenSet[Path] = frozenset()) -> None:
        self.text, self.at, self.wanted = text, 0, wanted
        self.problems: List[Tuple[int, Path, str]] = []
        self.places: Dict[Path, int] = {}
        self.value: Any = None
        self.halted = False
        try:
            self.value = self._read((), 0)
            self._skip()
            if self.at < len(text):
                self._halt((), f"{shown(text[self.at:self.at + 60], 12)} after the end of the JSON value; "
                               "remove it")
        except _Halt:
            self.halted = True

    def _skip(self) -> str:
        """Go on to the next token; return its first character, or nothing at the end."""
        self.at = re.compile(_SPACE).match(self.text, self.at).end()  # type: ignore[union-attr]
        return self.text[self.at:self.at + 1]

    def _note(self, at: int, path: Path, what: str) -> None:
        """Remember a problem and go on."""
        self.problems.append((at, path, what))

    def _halt(self, path: Path, what: str) -> None:
        """Remember a problem behind which nothing can be understood."""
        self._note(self.at, path, what)
        raise _Halt

    def _read(self, path: Path, depth: int) -> Any:
        """Read the value at `path`."""
        char = self._skip()
        if path in self.wanted:
            self.places.setdefault(path, self.at)
        if depth >= MAX_DEPTH and char in ("{", "["):
            self._halt((), f"nested deeper than {MAX_DEPTH} levels; flatten it")
        if char == "{":
            return self._object(path, depth)
        if char == "[":
            return self._array(path, depth)
        if char == '"':
            return self._string(path)
        return self._scalar(path)

    def _object(self, path: Path, depth: int) -> Dict[str, Any]:
        members: Dict[str, Any] = {}
        self.at += 1
        if self._skip() == "}":
            self.at += 1
            return members
        while True:
            if self._skip() != '"':
                self._halt(path, self._expected("a member's name in double quotes"))
            at = self.at
            name = self._string(path)
            if path + (name,) in self.wanted:
                self.places.setdefault(path + (name,), at)
            if name in members:
                self._note(at, path + (name,), "given twice in one object; keep one")
            if self._skip() != ":":
                self._halt(path + (name,), self._expected("a colon"))
            self.at += 1
            members[name] = self._read(path + (name,), depth + 1)
            if not self._more(path, "}"):
                return members

    def _array(self, path: Path, depth: int) -> List[Any]:
        items: List[Any] = []
        self.at += 1
        if self._skip() == "]":
            self.at += 1
            return items
        while True:
            items.append(self._read(path + (len(items),), depth + 1))
            if not self._more(path, "]"):
                return items

    def _more(self, path: Path, end: str) -> bool:
        """Read what follows a member or an item; tell whether another one does."""
        char = self._skip()
        if char not in (",", end) or not char:
            self._halt(path, self._expected(f"a comma or {end}"))
        self.at += 1
        if char == "," and self._skip() == end:
            self._halt(path, f"a comma before {end}; remove the comma")
        return char == ","

    def _string(self, path: Path) -> str:
        """Read a string; the standard library decodes its escapes."""
        match = re.compile(_STRING).match(self.text, self.at)
        if not match:
            rest = self.text[self.at + 1:].split("\n")[0]
            self._halt(path, f"a string that is not closed, or holds a control character or a bad escape: "
                             f"{shown(rest, 40)}")
        assert match
        text: str = json.loads(match[0])
        if any("\ud800" <= char <= "\udfff" for char in text):
            self._note(self.at, path, f"half of a surrogate pair in {shown(text)}; write the whole character")
        if "\0" in text:
            self._note(self.at, path, f"a NUL character in {shown(text)}; remove it")
        self.at = match.end()
        return text

    def _scalar(self, path: Path) -> Any:
        """Read a number, true, false or null."""
        at, number = self.at, re.compile(_NUMBER).match(self.text, self.at)
        word = re.compile(_WORD).match(self.text, self.at)
        assert word
        if number and number.end() >= word.end():
            self.at = number.end()
            if len(number[0]) > MAX_DIGITS:
                self._note(at, path, f"a number of more than {MAX_DIGITS} digits; give it as a string")
                return 0
            value = json.loads(number[0])
            if value in (float("inf"), float("-inf")):
                self._note(at, path, f"{number[0]} is too large for a number; give it as a string")
            return value
        if word[0] in _WORDS:
            self.at = word.end()
            return _WORDS[word[0]]
        if word[0].lstrip("+-") in ("NaN", "Infinity"):
            self.at = word.end()
            self._note(at, path, f"{word[0]} is not JSON; give a number, a string or null")
            return 0
        self._halt(path, self._expected("a JSON value"))

    def _expected(self, what: str) -> str:
        """Return what to say where something else should stand."""
        rest = self.text[self.at:self.at + 60].split("\n")[0]
        end = "line" if self.at < len(self.text) else "text"
        return f"expected {what}, got {shown(rest, 14) if rest else 'the end of the ' + end}"


def _strict_object(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    """For json.loads: an object, unless a key comes twice in it."""
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("duplicate keys")
    return members


def _strict_float(text: str) -> float:
    """For json.loads: a number with a fraction or an exponent, unless it is too large for a float."""
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is infinite")
    return value


def _strict_constant(name: str) -> Any:
    """For json.loads: NaN and the infinities, which are no JSON."""
    raise ValueError(f"{name} is not JSON")


_SUSPECT = r"\\u(?:0000|[dD][89a-fA-F])|[0-9]{%d}" % MAX_DIGITS
_IN_STRINGS = r'(?s)"(?:[^"\\]|\\.)*"'


def _is_shallow(text: str) -> bool:
    """Tell whether `text` is nested at most MAX_DEPTH deep, without reading it: brackets outside strings."""
    depth = deepest = 0
    for char in re.sub(r"[^\[\]{}]+", "", re.sub(_IN_STRINGS, "", text)):
        depth += 1 if char in "[{" else -1
        deepest = max(deepest, depth)
    return deepest <= MAX_DEPTH


def _format_rows(where: str, text: str, rows: List[Tuple[int, Path, str]]) -> List[str]:
    """Return rows of (offset, path, what) as lines, in the order of the text, at most MAX_PROBLEMS."""
    lines = []
    rows = sorted(set(rows), key=lambda row: (row[0], row[2]))
    for at, path, what in rows[:MAX_PROBLEMS]:
        line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
        lines.append(f"{where}:{line}:{column}: {format_path(path)}{': ' if path else ''}{what}")
    if len(rows) > MAX_PROBLEMS:
        lines.append(f"{where}: and {len(rows) - MAX_PROBLEMS} more problems like these")
    return lines


class Document(NamedTuple):
    """A JSON text, where it came from, the value it stands for, and what is wrong with the text itself."""

    where: str
    text: str
    value: Any
    flaws: Tuple[Tuple[int, Path, str], ...] = ()

    def error(self, problems: Iterable[Problem] = ()) -> FlowError:
        """Return a FlowError with a line for each flaw and problem: file:line:column: path: what."""
        found = list(problems)
        paths = {problem.path: self._known(problem.path) for problem in found}
        places = Reader(self.text, frozenset(paths.values())).places if found else {}
        rows = [(places.get(paths[p.path], 0), paths[p.path], p.what) for p in found]
        return FlowError(_format_rows(self.where, self.text, rows + list(self.flaws)))

    def _known(self, path: Path) -> Path:
        """Return `path`, or where its value really stands: in `defaults`, or the nearest member around it."""
        inherited = ("defaults",) + path[2:]
        if len(path) > 2 and path[0] == "tasks" and not self._holds(path) and self._holds(inherited):
            return inherited
        while path and not self._holds(path):
            path = path[:-1]
        return path

    def _holds(self, path: Path) -> bool:
        """Tell whether the document has a value at `path`."""
        value = self.value
        for step in path:
            try:
                value = value[step]
            except (KeyError, IndexError, TypeError):
                return False
        return True


def _decode(content: bytes, where: str) -> str:
    """Return UTF-8 as text, less a byte order mark; raise FlowError with the place of a byte that is none."""
    try:
        return content.decode().removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as exc:
        line = content.count(b"\n", 0, exc.start) + 1
        column = exc.start - content.rfind(b"\n", 0, exc.start)
        raise FlowError([f"{where}:{line}:{column}: byte 0x{content[exc.start]:02x} is not UTF-8; "
                         "save the file as UTF-8"]) from None


def read_json(content: Union[bytes, str], where: str, limit: int = MAX_BYTES) -> Document:
    """Read JSON strictly; raise FlowError, with all that is wrong, if it can't be read to its end."""
    if len(content) > limit:
        raise FlowError([f"{where}: {len(content)} bytes, more than the {limit} that are read; split it up"])
    if isinstance(content, bytes):
        content = _decode(content, where)
    if not re.search(_SUSPECT, content) and _is_shallow(content):
        try:
            return Document(where, content, json.loads(content, object_pairs_hook=_strict_object,
                                                       parse_float=_strict_float,
                                                       parse_constant=_strict_constant))
        except (ValueError, RecursionError):
            pass                                # the Reader finds out what and where
    reader = Reader(content)
    document = Document(where, content, reader.value, tuple(reader.problems))
    if reader.halted:
        raise document.error()
    return document


def parse_json(content: Union[bytes, str], where: str, limit: int = MAX_BYTES) -> Document:
    """Read JSON strictly; raise FlowError with every problem and its place if it is not sound."""
    document = read_json(content, where, limit)
    if document.flaws:
        raise document.error()
    return document


# -- schemas: a subset of JSON Schema, checked here and published by flow_schema() --

if TYPE_CHECKING:
    Schema = Dict[str, Any]

_TYPES: Dict[str, Callable[[Any], bool]] = {
    "string": lambda v: isinstance(v, str),
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool),
    "boolean": lambda v: isinstance(v, bool),
    "array": lambda v: isinstance(v, list),
    "object": lambda v: isinstance(v, dict),
    "null": lambda v: v is None,
}


def describe_schema(schema: Schema) -> str:
    """Return what `schema` accepts, in words: "an integer of at least 0"."""
    if "title" in schema:
        return str(schema["title"])
    if "anyOf" in schema:
        return " or ".join(describe_schema(branch) for branch in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(shown(v) for v in schema["enum"])
    if "type" not in schema:
        return "any JSON value"
    kind = schema["type"]
    words = f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
    if kind == "array" and "items" in schema:
        words += " of which each is " + describe_schema(schema["items"])
    for low, high, unit in (("minimum", "maximum", ""), ("minLength", "maxLength", " characters"),
                            ("minItems", "maxItems", " items")):
        if low in schema and high in schema:
            words += f" from {schema[low]} to {schema[high]}{unit}"
        elif low in schema or high in schema:
            bound = "least" if low in schema else "most"
            words += f" of at {bound} {schema.get(low, schema.get(high))}{unit}"
    if "pattern" in schema:
        words += f" that matches {schema['pattern']}"
    return words


def accepts(schema: Schema, value: Any) -> bool:
    """Tell whether `value` itself, leaving aside what is inside it, is what `schema` describes."""
    if "anyOf" in schema:
        return any(accepts(branch, value) for branch in schema["anyOf"])
    if "type" in schema and not _TYPES[schema["type"]](value):
        return False
    if "enum" in schema and not any(value == v and isinstance(value, bool) == isinstance(v, bool)
                                    for v in schema["enum"]):
        return False
    if isinstance(value, str):
        return bool(len(value) >= schema.get("minLength", 0)
                and len(value) <= schema.get("maxLength", len(value))
                and ("pattern" not in schema or re.search(schema["pattern"], value) is not None))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return bool(schema.get("minimum", value) <= value <= schema.get("maximum", value))
    if isinstance(value, list):
        return bool(schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)))
    return not isinstance(value, dict) or len(value) >= schema.get("minProperties", 0)


def check_schema(schema: Schema, value: Any, path: Path, problems: List[Problem]) -> None:
    """Append to `problems` whatever about `value`, at `path`, is not as `schema` says."""
    if not accepts(schema, value):
        problems.append(Problem(path, f"expected {describe_schema(schema)}, got {shown(value)}"))
        return
    if not isinstance(value, (list, dict)):
        return
    while "anyOf" in schema:
        schema = next(branch for branch in schema["anyOf"] if accepts(branch, value))
    if isinstance(value, list):
        for n, item in enumerate(value if "items" in schema else ()):
            check_schema(schema["items"], item, path + (n,), problems)
        return
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    for name, member in value.items():
        if name in known or isinstance(others, dict):
            check_schema(known.get(name, others), member, path + (name,), problems)
        elif others is False:
            hint = near(name, known) if len(problems) < MAX_PROBLEMS else ""
            problems.append(Problem(path + (name,), "unknown field" + (
                hint or "; remove it (miniflow schema lists the fields)")))
    for name in schema.get("required", ()):
        if name not in value:
            problems.append(Problem(path, f"{name} is missing; give {describe_schema(known[name])}"))


# ============================================================================
# == 4. VALUES: what do params and ${{ templates }} stand for?
# ============================================================================
# A template is a path of names, nothing more: there is nothing in it that could be executed.  It is looked up
# when an attempt starts, and its value goes on as data: into one element of an argument vector, one variable,
# one file name.  It never reaches a shell's text, where it would become code; check_flow refuses it there.
#
# The expression of an `if` is read by Python's own parser, of whose tree a white list is taken over into a
# tree of our own; what is evaluated is that.  There are no calls and no attributes of Python's in it and no
# operator that makes much out of little; and nothing is taken for true or false but true and false.

_TEMPLATE = r"(?s)\$\$\{\{|\$\{\{(.*?)\}\}|\$\{\{"
_STEP = r"""\.([A-Za-z0-9_-]+)|\[([0-9]{1,9})\]|\["([^"\\]*)"\]|\['([^'\\]*)'\]"""
_ROOT = r"[A-Za-z_][A-Za-z0-9_]*"

#: What a template may begin with, and what has to follow.
ROOTS = {"params": "params.NAME", "ctx": "ctx.KEY", "run": "run.id or run.scheduled_time", "env": "env.NAME",
         "tasks": "tasks.ID.outputs, tasks.ID.outputs.KEY or tasks.ID.status",
         "item": "item, item.KEY or item[0]", "matrix": "matrix.NAME"}
#: What differs between the instances of one task.
EACH_ROOTS = ("item", "matrix")
_RUN_KEYS = ("id", "scheduled_time")


class Ref(NamedTuple):
    """What one ${{ … }} refers to: a path whose first step is one of ROOTS."""

    path: Path

    @property
    def text(self) -> str:
        """The reference as the author may have written it."""
        return format_path(self.path)


def _normal_path(path: List[Union[str, int]], source: str) -> Path:
    """Join the id of a task that holds dots, and see that the path says what its root needs."""
    root = path[0]
    if root == "item":
        return tuple(path)
    if root == "tasks":
        end = next((n for n in range(2, len(path)) if path[n] in ("outputs", "status")), None)
        if end is not None and all(isinstance(s, str) for s in path[1:end]):
            whole = ("tasks", ".".join(str(s) for s in path[1:end]), *path[end:])
            if whole[2] == "outputs" or len(whole) == 3:
                return whole
    elif len(path) > 1 and isinstance(path[1], str):
        if root in ("params", "ctx", "matrix") or len(path) == 2 and (root == "env" or path[1] in _RUN_KEYS):
            return tuple(path)
    raise ValueError(f"${{{{ {source[:60]} }}}} names no value; write {ROOTS[str(root)]}")


def parse_ref(text: str) -> Ref:
    """Read the inside of a template; raise ValueError that says what would be right."""
    source = text.strip()
    root = re.match(_ROOT, source)
    if not root or root[0] not in ROOTS:
        name = root[0] if root else source
        raise ValueError(f"unknown name {shown(name)} in ${{{{ {source[:60]} }}}}"
                         + (near(name, ROOTS) or f"; use one of {', '.join(ROOTS)}"))
    path: List[Union[str, int]] = [root[0]]
    at = root.end()
    while at < len(source):
        step = re.compile(_STEP).match(source, at)
        if not step:
            raise ValueError(f"{shown(source[at:])} in ${{{{ {source[:60]} }}}} is not a path; "
                             "write .name, [0] or [\"name\"]")
        path.append(int(step[2]) if step[2] else
                    next(s for s in (step[1], step[3], step[4]) if s is not None))
        at = step.end()
    return Ref(_normal_path(path, source))


def parse_template(text: str) -> Tuple[Union[str, Ref], ...]:
    """Split `text` into literal strings and Refs; raise ValueError for a template that can't be read."""
    parts: List[Union[str, Ref]] = []
    at = 0
    for match in re.finditer(_TEMPLATE, text):
        parts.append(text[at:match.start()])
        if match[0] == "$${{":
            parts.append("${{")
        elif match[1] is None:
            raise ValueError(f"{shown(text[match.start():])} has no }}}}; close it, "
                             f"or write $${{{{ for ${{{{ itself")
        else:
            parts.append(parse_ref(match[1]))
        at = match.end()
    parts.append(text[at:])
    return tuple(part for part in parts if part != "")


def refs(text: Any) -> List[Ref]:
    """Return what the templates in `text` refer to; raise ValueError for one that can't be read."""
    if not isinstance(text, str) or "${{" not in text:
        return []
    return [part for part in parse_template(text) if isinstance(part, Ref)]


def to_text(value: Any) -> str:
    """Return `value` as a task gets it: a string as it is, everything else as its JSON text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


class Values(NamedTuple):
    """All that templates may read, for one attempt; `tasks` gives a task's status and outputs by its id."""

    params: Mapping[str, Any]
    ctx: Mapping[str, Any]
    run: Mapping[str, Any]
    env: Mapping[str, str]
    tasks: Callable[[str], Mapping[str, Any]]
    item: Any = None
    matrix: Mapping[str, Any] = {}


def lookup(ref: Ref, values: Values) -> Any:
    """Return the value of `ref`; raise LookupError that says what is there instead."""
    root, path = str(ref.path[0]), ref.path[1:]
    value: Any = values.tasks(str(path[0])) if root == "tasks" else getattr(values, root)
    for step in path[1:] if root == "tasks" else path:
        found = isinstance(value, Mapping if isinstance(step, str) else (list, tuple))
        try:
            value = value[step] if found else None
        except (KeyError, IndexError):
            found = False
        if not found:
            there = shown(sorted(value), 200) if isinstance(value, Mapping) and root != "env" else ""
            raise LookupError(f"{ref.text}: there is no {shown(step)}"
                              + (f" in {there}" if there else "")
                              + ("; set it, or give it in env" if root == "env" else ""))
    return value


def _is_template(text: str) -> bool:
    """Tell whether a string is one template and nothing else, which keeps the type of its value."""
    try:
        parts = parse_template(text)
    except ValueError:
        return True                             # reported as what it is
    return len(parts) == 1 and isinstance(parts[0], Ref)


def render(text: Any, values: Values) -> Any:
    """Return `text` with its templates replaced; one that stands alone keeps its value's type."""
    if not isinstance(text, str) or "${{" not in text:
        return text
    parts = parse_template(text)
    if len(parts) == 1 and isinstance(parts[0], Ref):
        return lookup(parts[0], values)
    return "".join(part if isinstance(part, str) else to_text(lookup(part, values)) for part in parts)


# -- expressions --

def _remembering(answer: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return `answer` with a memory of what it was asked last, by whichever thread.

    functools, which has such a thing, is not there at a start.
    """
    answers: Dict[Any, Any] = {}

    def remember(question: Any) -> Any:
        known = answers.get(question, answers)
        if known is answers:
            if len(answers) > 100:
                answers.clear()
            known = answers[question] = answer(question)
        return known
    return remember


MAX_EXPRESSION = 4000                          # characters
_MAX_EXPRESSION_DEPTH = 50
_MAX_MADE = 2**20                              # characters or elements of what + joins
_MAX_BITS = 2**12                              # of a whole number
_COMPARISONS = {"Eq": "==", "NotEq": "!=", "Lt": "<", "LtE": "<=", "Gt": ">", "GtE": ">=", "In": "in",
                "NotIn": "not in"}
_ARITHMETIC = {"Add": "+", "Sub": "-", "Mult": "*", "Div": "/", "FloorDiv": "//", "Mod": "%"}
_CONSTANTS = {"true": True, "false": False, "null": None}
_REFUSED = {"Call": "a call", "IfExp": "if … else", "Lambda": "a lambda", "JoinedStr": "an f-string",
            "NamedExpr": ":=", "Pow": "**", "Is": "is (write ==)", "IsNot": "is not (write !=)",
            "Slice": "a slice", "Starred": "*", "Await": "await"}


class Expression(NamedTuple):
    """A node of an expression: what it does ("value", "ref", "and", "==", …) with which parts."""

    kind: str
    parts: Tuple[Any, ...]

    def refs(self) -> Iterator[Ref]:
        """Yield what the names in it refer to."""
        for part in self.parts:
            if isinstance(part, Ref):
                yield part
            elif isinstance(part, Expression):
                yield from part.refs()


def _kind(value: Any) -> str:
    """Return what JSON calls the type of a value; numbers are one type."""
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "an array",
             tuple: "an array"}
    return "null" if value is None else kinds.get(type(value), "an object")


def _bounded(value: Any) -> Any:
    """Return what an operator has made; raise ValueError if there is too much of it, or it is no number."""
    if type(value) is int and value.bit_length() > _MAX_BITS or type(value) is float and value - value != 0:
        raise ValueError("a number is too large")
    if isinstance(value, (str, list)) and len(value) > _MAX_MADE:
        raise ValueError(f"{_kind(value)} of {len(value):,} is too long; at most {_MAX_MADE:,}")
    return value


def _text_of(literal: str, value: str) -> str:
    """Return what a literal of Python's stands for here: "…" is read as JSON, '…' as Python does."""
    if literal[0] not in "\"'" or literal[:3] in ('\"\"\"', "\'\'\'"):
        raise ValueError(f"{shown(literal)} is no text; write it in quotes, as in JSON")
    if literal[0] == '"':
        try:
            value = json.loads(literal)
        except ValueError:
            raise ValueError(f"{shown(literal)} is no string of JSON") from None
    elif "'" in literal[1:-1].replace("\\'", "") or not literal.endswith("'"):
        raise ValueError(f"{shown(literal)} is more than one text; join texts with +")
    try:
        return value.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise ValueError(f"{shown(literal)} holds half of a surrogate pair; write the whole "
                         "character") from None


def _path_of(node: Any) -> Optional[List[Union[str, int]]]:
    """Return the path that a tree of names, attributes and constant indexes writes; None: it is no path."""
    steps: List[Union[str, int]] = []
    while type(node).__name__ in ("Attribute", "Subscript"):
        if type(node).__name__ == "Attribute":
            steps.append(node.attr)
        else:
            index: Any = node.slice.value if type(node.slice).__name__ == "Constant" else None
            if type(index) not in (str, int):
                return None
            steps.append(index)
        node = node.value
    return [node.id, *reversed(steps)] if type(node).__name__ == "Name" else None


def _read_path(path: List[Union[str, int]]) -> Expression:
    """Return the node of a path."""
    root = str(path[0])
    if root in _CONSTANTS and len(path) == 1:
        return Expression("value", (_CONSTANTS[root],))
    if root not in ROOTS:
        raise ValueError(f"unknown name {shown(root)}" + (
            near(root, ROOTS) or f"; use one of {', '.join(ROOTS)}, and quotes around text"))
    return Expression("ref", (Ref(_normal_path(path, format_path(tuple(path)))),))


def _read_node(node: Any, depth: int = 0) -> Expression:
    """Take a node of Python's tree over into ours; raise ValueError for what is not on the white list."""
    kind = type(node).__name__
    def read(part: Any) -> Expression:
        return _read_node(part, depth + 1)

    if depth > _MAX_EXPRESSION_DEPTH:
        raise ValueError(f"it is nested deeper than {_MAX_EXPRESSION_DEPTH} levels")
    path = _path_of(node)
    if path:
        return _read_path(path)
    if kind == "Constant" and (node.value is None or type(node.value) in (bool, int, float, str)):
        return Expression("value", (_bounded(node.value),))
    if kind == "Subscript" and type(node.slice).__name__ != "Slice":
        return Expression("index", (read(node.value), read(node.slice)))
    if kind == "Attribute":                    # of what an index that is worked out leads to
        return Expression("index", (read(node.value), Expression("value", (node.attr,))))
    if kind in ("List", "Tuple"):
        return Expression("array", tuple(map(read, node.elts)))
    if kind == "Dict" and None not in node.keys:
        if any(type(key).__name__ == "Constant" and type(key.value) is not str for key in node.keys):
            raise ValueError("the keys of an object have to be strings")
        return Expression("object", tuple(map(read, chain(*zip(node.keys, node.values)))))
    if kind == "BoolOp":
        return Expression(type(node.op).__name__.lower(), tuple(map(read, node.values)))
    operator = type(getattr(node, "op", None)).__name__
    if kind == "UnaryOp" and operator in ("Not", "USub", "UAdd"):
        return Expression(operator, (read(node.operand),))
    if kind == "BinOp" and operator in _ARITHMETIC:
        return Expression(_ARITHMETIC[operator], (read(node.left), read(node.right)))
    words = [type(op).__name__ for op in getattr(node, "ops", ())]
    if kind == "Compare" and set(words) <= _COMPARISONS.keys():
        operators = [_COMPARISONS[word] for word in words]
        return Expression("chain", (read(node.left), *chain(*zip(operators, map(read, node.comparators)))))
    what = next((_REFUSED[name] for name in (kind, operator, *words, type(getattr(node, "slice", 0)).__name__)
                 if name in _REFUSED), f"{operator if kind.endswith('Op') else kind} of Python")
    raise ValueError(f"{what} is not possible here; there are names, JSON values, [ ], comparisons, in, "
                     "and, or, not, + - * / // %")


@_remembering
def parse_expression(text: str) -> Expression:
    """Read the expression of an `if`; raise ValueError that says what is wrong with it."""
    if "${{" in text:
        raise ValueError("an expression has no ${{ }}; write the names as they are: params.x == 1")
    if "#" in text and "\n" in text.strip():
        raise ValueError("an expression of several lines can't hold a #, which would hide the rest of its "
                         "line")
    if len(text) > MAX_EXPRESSION:
        raise ValueError(f"an expression of {len(text):,} characters is too long; at most {MAX_EXPRESSION:,}")
    import ast
    import warnings
    source = text.strip().replace("\n", " ")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")    # of what looks odd to Python
            tree = ast.parse(source, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as exc:
        what = exc.msg if isinstance(exc, SyntaxError) else str(exc)
        raise ValueError(f"{shown(text)} is no expression: {what}") from None
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = _text_of(str(ast.get_source_segment(source, node)), node.value)
    return _read_node(tree.body)


def expression_refs(text: str) -> List[Ref]:
    """Return what the names in an expression refer to; raise ValueError for one that can't be read."""
    return list(parse_expression(text).refs())


def _same(left: Any, right: Any) -> bool:
    """Tell whether two JSON values are the same; true is not 1."""
    kind = _kind(left)
    if kind != _kind(right):
        return False
    if kind == "an array":
        return len(left) == len(right) and all(map(_same, left, right))
    if kind == "an object":
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    return bool(left == right)


def _contains(whole: Any, part: Any) -> bool:
    """Tell whether a string, array or object has a part, element or key."""
    if isinstance(whole, str) and isinstance(part, str):
        return part in whole
    if isinstance(whole, (list, tuple)):
        return any(_same(item, part) for item in whole)
    if isinstance(whole, Mapping):
        return isinstance(part, str) and part in whole
    raise ValueError(f"{shown(part)} in {shown(whole)}: {_kind(whole)} can't hold it")


def _item(whole: Any, index: Any) -> Any:
    """Return an element of an array or a member of an object."""
    try:
        if type(index) is int and isinstance(whole, (list, tuple)):
            return whole[index]
        if isinstance(index, str) and isinstance(whole, Mapping):
            return whole[index]
    except (KeyError, IndexError):
        pass
    raise ValueError(f"there is no {shown(index)} in {shown(whole)}")


_COMPARE: Dict[str, Callable[[Any, Any], bool]] = {
    "==": _same, "!=": lambda a, b: not _same(a, b), "in": lambda a, b: _contains(b, a),
    "not in": lambda a, b: not _contains(b, a), "index": _item}
_ORDER: Dict[str, Callable[[Any, Any], bool]] = {
    "<": lambda a, b: a < b, "<=": lambda a, b: a <= b, ">": lambda a, b: a > b, ">=": lambda a, b: a >= b}
_COUNT: Dict[str, Callable[[Any, Any], Any]] = {
    "+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a / b,
    "//": lambda a, b: a // b, "%": lambda a, b: a % b}


def _apply(operator: str, left: Any, right: Any) -> Any:
    """Return what a binary operator makes of two values; raise ValueError if it fits them not."""
    if operator in _COMPARE:
        return _COMPARE[operator](left, right)
    kinds = {_kind(left), _kind(right)}
    joins = operator == "+" and kinds in ({"a string"}, {"an array"})
    if not (kinds == {"a number"} or joins or operator in _ORDER and kinds == {"a string"}):
        raise ValueError(f"{shown(left)} {operator} {shown(right)}: {_kind(left)} and {_kind(right)}")
    if joins and len(left) + len(right) > _MAX_MADE:
        raise ValueError(f"what + makes is too long; at most {_MAX_MADE:,}")
    try:
        return _bounded((_ORDER.get(operator) or _COUNT[operator])(
            *((list(left), list(right)) if kinds == {"an array"} else (left, right))))
    except (ZeroDivisionError, OverflowError) as exc:
        raise ValueError(f"{shown(left)} {operator} {shown(right)}: {exc}") from None


def _truth(value: Any) -> bool:
    """Return a boolean; raise ValueError for any other value, as nothing else means true or false here."""
    if type(value) is not bool:
        raise ValueError(f"{shown(value)} is neither true nor false; compare it with something")
    return value


def evaluate(node: Expression, values: Values) -> Any:
    """Return the value of an expression; raise LookupError or ValueError if it has none."""
    kind, parts = node
    if kind == "value":
        return parts[0]
    if kind == "ref":
        return lookup(parts[0], values)
    if kind in ("and", "or"):
        return next((found for part in parts for found in [_truth(evaluate(part, values))]
                     if found is (kind == "or")), kind == "and")
    if kind == "chain":                        # a < b < c: each part is evaluated once, as far as needed
        left = evaluate(parts[0], values)
        for operator, part in zip(parts[1::2], parts[2::2]):
            right = evaluate(part, values)
            if not _apply(operator, left, right):
                return False
            left = right
        return True
    found = [evaluate(part, values) for part in parts]
    if kind == "array":
        return found
    if kind == "object":
        if not all(isinstance(key, str) for key in found[::2]):
            raise ValueError("the keys of an object have to be strings")
        return dict(zip(found[::2], found[1::2]))
    if kind == "Not":
        return not _truth(found[0])
    if len(found) == 1:
        return _apply("-" if kind == "USub" else "+", 0, found[0])
    return _apply(kind, *found)


def holds(text: str, values: Values) -> bool:
    """Tell whether the expression of an `if` is true; raise LookupError or ValueError if it can't be told."""
    return _truth(evaluate(parse_expression(text), values))


# -- tasks and their instances --

def asks_each(task: Task) -> bool:
    """Tell whether the `if` of a task is for each of its instances to be asked."""
    return task.condition is not None and any(
        ref.path[0] in EACH_ROOTS for ref in expression_refs(task.condition))


def instance_of(task: Task, name: str, condition: Optional[str]) -> Task:
    """Return `task` as its instance `name`, with that condition."""
    return task._replace(id=name, foreach=None, matrix=None, max_parallel=None, condition=condition)


def refs_at(path: Path, text: Any) -> List[Ref]:
    """Return what the names in a string refer to that templates() has found at `path`; raise ValueError."""
    return expression_refs(text) if path == ("if",) else refs(text)


def _strings(value: Any, path: Path) -> Iterator[Tuple[Path, str]]:
    """Yield every string in a JSON value, with its path."""
    if isinstance(value, str):
        yield path, value
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(
        value, (list, tuple)) else ()
    for key, item in members:
        yield from _strings(item, path + (key,))


def render_all(value: Any, values: Values) -> Any:
    """Return a JSON value with the templates in all of its strings replaced."""
    if isinstance(value, Mapping):
        return {key: render_all(item, values) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [render_all(item, values) for item in value]
    return render(value, values)


MAX_INSTANCES = 100_000
MAX_EACH = 64 * 2**20                          # characters in the values of all instances of a task


def matrix_combinations(matrix: Mapping[str, Any]) -> List[Dict[str, Any]]:
    """Return the combinations of a matrix in order, the last name changing fastest.

    `exclude` takes away those that have all of what one of its entries says.  Then what an entry of
    `include` says is added to each combination of which it changes nothing of the matrix itself; where there
    is none, it is one more combination.  These are the rules of GitHub Actions
    (jobs.<job_id>.strategy.matrix).
    """
    axes = {name: values for name, values in matrix.items() if name not in ("include", "exclude")}
    size = 1
    for name, values in axes.items():
        if not isinstance(values, list):
            raise ValueError(f"matrix.{name}: {shown(values)} is no array")
        size *= len(values)
    if size > MAX_INSTANCES:
        raise ValueError(f"{size:,} combinations; at most {MAX_INSTANCES:,}")
    found: List[Dict[str, Any]] = [{}] if axes else []
    for name, values in axes.items():
        found = [{**each, name: value} for each in found for value in values]
    entries = len(matrix.get("exclude", ())) + len(matrix.get("include", ()))
    if len(found) * entries > 100 * MAX_INSTANCES:
        raise ValueError(f"{entries:,} entries of include and exclude for {len(found):,} combinations are "
                         "too many; write fewer of either")
    found = [each for each in found if not any(
        all(name in each and _same(each[name], value) for name, value in entry.items())
        for entry in matrix.get("exclude", ()))]
    added: List[Dict[str, Any]] = []
    for entry in matrix.get("include", ()):
        fit = [each for each in found if all(name not in axes or _same(each[name], value)
                                             for name, value in entry.items())]
        for each in fit:
            each.update(entry)
        if not fit:
            added.append(dict(entry))
    return found + added


def instances(task: Task, values: Values) -> List[Dict[str, Any]]:
    """Return what each instance of `task` has for item or matrix; raise LookupError or ValueError."""
    found: List[Dict[str, Any]]
    if task.matrix is not None:
        found = [{"matrix": each} for each in matrix_combinations(render_all(task.matrix, values))]
    else:
        items = render_all(task.foreach, values)
        if not isinstance(items, (list, tuple)):
            raise ValueError(f"{shown(items)} is {_kind(items)}, not an array")
        found = [{"item": item} for item in items]
    if len(found) > MAX_INSTANCES:
        raise ValueError(f"{len(found):,} instances; at most {MAX_INSTANCES:,}")
    size = 0
    for each in found:                         # they are recorded
        size += sum(len(text) for _, text in _strings(each, ()))
        if size > MAX_EACH:
            raise ValueError(f"the values of its instances take more than {MAX_EACH:,} characters; hand on "
                             "the paths of files")
    return found


def templates(task: Task) -> Iterator[Tuple[Path, str]]:
    """Yield every string of `task` in which names are looked up, with its path below the task."""
    if task.condition is not None:
        yield ("if",), task.condition
    if task.asks:
        for field in ("inputs", "outputs", "foreach", "matrix"):
            yield from _strings(getattr(task, field), (field,))
    action = task.action
    if isinstance(action, Command) and not isinstance(action.command, str):
        for n, word in enumerate(action.command):
            yield ("command", n), word
    if isinstance(action, (Http, WaitFor)):
        yield from _strings(action[0], (ACTION_WORDS[type(action)],))
    if isinstance(action, SubFlow):
        yield from _strings(action.params, ("params",))
    args = action.args
    for key, value in args.items() if isinstance(args, dict) else enumerate(args):
        for n, item in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(item, str):
                yield (("args", key, n) if isinstance(value, list) else ("args", key)), item
    for name, value in task.env.items():
        if isinstance(value, str):
            yield ("env", name), value
    for field, text in (("cwd", task.cwd), ("stdin", action.stdin)):
        if text is not None:
            yield (field,), text


# -- secrets --

MASK = "***"
SHORTEST_SECRET = 4                            # what is shorter is found everywhere, and hides nothing


def _url_part(value: str) -> str:
    from urllib.parse import quote
    return quote(value, safe="", errors="surrogatepass")


def secret_texts(names: Iterable[str], environ: Mapping[str, str]) -> Tuple[str, ...]:
    """Return the texts in which the values of environment variables may show, the longest first."""
    texts = set()
    for value in filter(None, map(environ.get, names)):
        for text in (value, value.strip(), value.rstrip("="), *(line.strip() for line in value.splitlines())):
            if len(text) >= SHORTEST_SECRET:
                texts |= {_url_part(text), text, json.dumps(text)[1:-1],
                          json.dumps(text, ensure_ascii=False)[1:-1],
                          repr(text)[1:-1]}
    return tuple(sorted(texts, key=lambda text: (-len(text), text)))


def _masked_cut(text: str, secret: str) -> str:
    """Return `text` with the beginning of a secret replaced that stands where a message was cut off."""
    parts = text.split("…")
    for n, part in enumerate(parts[:-1]):
        begin = next((size for size in range(min(len(part), len(secret)), SHORTEST_SECRET - 1, -1)
                      if part.endswith(secret[:size])), 0)
        parts[n] = part[:len(part) - begin] + MASK if begin else part
    return "…".join(parts)


def masked(value: Any, secrets: Sequence[str]) -> Any:
    """Return a JSON value with each of `secrets` in its strings replaced by ***."""
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, MASK)
            value = _masked_cut(value, secret) if "…" in value else value
        return value
    if isinstance(value, Mapping):
        return {masked(key, secrets): masked(item, secrets) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [masked(item, secrets) for item in value]
    return MASK if type(value) in (int, float) and str(value) in secrets else value


# -- params --

PARAM_TYPES = ("string", "integer", "number", "boolean", "array", "object")


def param_schema(param: Param) -> Schema:
    """Return the JSON Schema of what may be given for `param`."""
    schema: Schema = {}
    for word in ("type", "pattern"):
        if getattr(param, word) is not None:
            schema[word] = getattr(param, word)
    if param.enum is not None:
        schema["enum"] = list(param.enum)
    lengths = {"string": ("minLength", "maxLength"), "array": ("minItems", "maxItems")}
    low, high = lengths.get(param.type or "", ("minimum", "maximum"))
    if param.min is not None:
        schema[low] = param.min
    if param.max is not None:
        schema[high] = param.max
    return schema


def _same_kind(param: Param) -> str:
    """Return the declared type, else that of the default or of all `enum` values: they say as much."""
    if param.type:
        return param.type
    examples = param.enum or (param.default,)
    return next((kind for kind in ("boolean", "number", "array", "object")
                 if all(_TYPES[kind](example) for example in examples)), "string")


def parse_param(name: str, text: str, param: Param) -> Any:
    """Convert the text of --param NAME=TEXT as `param` declares; raise UsageError if it does not fit."""
    kind = _same_kind(param)
    if kind == "string":
        return text
    try:
        value = parse_json(text.strip(), name).value
    except FlowError:
        value = MISSING
    if value is MISSING or not _TYPES[kind](value):
        example = {"integer": "7", "number": "0.5", "boolean": "true or false", "array": '["a", 1]',
                   "object": '{"a": 1}'}[kind]
        raise UsageError(f"--param {name}: expected {describe_schema({'type': kind})}"
                         f"{'' if param.type else f' like {shown((param.enum or (param.default,))[0])}'}, "
                         f"got {shown(text)}; give {example}")
    return value


def _unset_params(flow: Flow, params: Mapping[str, Any], way: str) -> List[str]:
    """Return a message for each param that a template needs and that has no value."""
    missing: Dict[str, str] = {}
    sources = [("env", refs(text)) for text in flow.env.values()]
    sources += [(f"task {task.id}", refs_at(*found)) for task in flow.tasks for found in templates(task)]
    for place, found in sources:
        for name in (str(ref.path[1]) for ref in found if ref.path[0] == "params"):
            required = flow.params is not None and name in flow.params and flow.params[name].required
            if name not in params and not required:
                missing.setdefault(name, place)
    return [f"params.{name}: {place} needs it and nobody gave it; give {way.format(name)}"
            for name, place in missing.items()]


def param_variable(name: str) -> str:
    """Return the part of an environment variable's name that stands for param `name`."""
    return re.sub(r"[^A-Z0-9_]", "_", name.upper())


def _clashing(names: Iterable[str]) -> List[Tuple[str, str]]:
    """Return the pairs of names that would be one environment variable."""
    seen: Dict[str, str] = {}
    return [(seen[v], name) for name in names for v in [param_variable(name)]
            if seen.setdefault(v, name) != name]


def _unfit_values(given: Any) -> List[str]:
    """Return a message for each param that is no JSON, or that no process could be given."""
    if not isinstance(given, Mapping):
        return [f"params: expected a mapping of names to values, got {shown(given)}"]
    problems = []
    for name, value in given.items():
        try:
            text = json.dumps(value, ensure_ascii=False, allow_nan=False) + name
        except (TypeError, ValueError, RecursionError) as exc:
            problems.append(f"params.{name}: {shown(value)} is no JSON value: {exc}")
            continue
        nul = "\0" in name or re.search(r"(?<!\\)(?:\\\\)*\\u0000", text)
        if nul or any("\ud800" <= char <= "\udbff" for char in text):
            problems.append(f"params.{name}: {shown(value)} holds a NUL or half a surrogate pair; remove it")
    return problems


def complete_params(flow: Flow, given: Mapping[str, Any], way: str = "--param {}=VALUE") -> Dict[str, Any]:
    """Return the params of a run: `given` and the defaults; raise UsageError with all that does not fit.

    `way` is how a param that lacks can be given.
    """
    problems = _unfit_values(given)
    if problems:
        raise UsageError("\n".join(problems))
    declared = flow.params
    if declared is None:
        declared = {name: Param() for name in given}
    for name in given:
        if name not in declared:
            problems.append(f"params.{name}: flow {flow.name} has no such param"
                            + (near(name, declared) or f"; it has {', '.join(declared) or 'none'}"))
    result: Dict[str, Any] = {}
    for name, param in declared.items():
        value = given.get(name, param.default)
        if value is MISSING:
            if param.required:
                problems.append(f"params.{name}: is required; give {way.format(name)}")
            continue
        found: List[Problem] = []
        check_schema(param_schema(param), value, ("params", name), found)
        problems += [f"{format_path(p.path)}: {p.what}" for p in found]
        result[name] = value
    problems += _unset_params(flow, result, way)
    for first, second in _clashing(result):
        problems.append(f"params.{second}: {first} is MINIFLOW_PARAM_{param_variable(first)} as well; "
                        "rename one")
    if problems:
        raise UsageError("\n".join(problems))
    return result


# ============================================================================
# == 5. CRON: given a schedule and a time, when next?
# ============================================================================
# A time is whole seconds since 1970.  A cron line is matched against what a clock on the wall shows in its
# time zone, and what the wall shows becomes a time by these rules, which are Vixie cron's where it has any:
#
#   an hour that the wall skips    counts once, at the moment that it is skipped; not for a line that names
#                                  all hours, which runs in the next one anyway
#   an hour that it shows twice    counts once, the first time; twice for a line with a star or a step in its
#                                  minutes or hours
#   two day fields                 both have to fit if one of them begins with a star, else one of them
#
# Time is not gone through minute by minute.  Dates that fit are found by month and day; on most of them what
# the wall shows becomes a time by arithmetic, and where clocks change the minutes of an hour or two are
# looked up one by one.  So no line takes longer than some milliseconds, and one that names no date that ever
# comes is found out from its fields alone.
#
# Time zones are read from the disk by zoneinfo, which this side of the line could not do by itself.  They are
# taken for what they are: tables that come with the system as those of unicodedata come with Python, the same
# at every look.  To hand them in from below would put a parameter on all that reads a flow, for nothing.

LATE_S = 60                                    # what starts later than this has been missed
MAX_CRON = 1000                                # characters
_LAST_YEAR = 9990
_MONDAY = 345600                               # 1970-01-05, from which every_s counts


class CronField(NamedTuple):
    """One of the five fields of a cron line: `largest` is the largest number that it takes."""

    name: str
    low: int
    high: int
    largest: int
    names: Mapping[str, int] = {}

    @property
    def takes(self) -> str:
        """What can be written in it, in words."""
        names = list(self.names)
        return f"{self.low} to {self.largest}" + (f", or {names[0]} to {names[-1]}" if names else "")


_CRON_FIELDS = (
    CronField("minute", 0, 59, 59), CronField("hour", 0, 23, 23), CronField("day of month", 1, 31, 31),
    CronField("month", 1, 12, 12, {name: n for n, name in enumerate(
        "jan feb mar apr may jun jul aug sep oct nov dec".split(), 1)}),
    CronField("day of week", 0, 6, 7, {name: n for n, name in enumerate(
        "sun mon tue wed thu fri sat".split())}))
CRON_WORDS = {"@hourly": "0 * * * *", "@daily": "0 0 * * *", "@midnight": "0 0 * * *",
              "@weekly": "0 0 * * 0", "@monthly": "0 0 1 * *", "@yearly": "0 0 1 1 *",
              "@annually": "0 0 1 1 *"}
_DAYS_OF = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


class Cron(NamedTuple):
    """A cron line that has been read; weekdays count from 0, Sunday."""

    minutes: Tuple[int, ...]
    hours: Tuple[int, ...]
    days: FrozenSet[int]
    months: FrozenSet[int]
    weekdays: FrozenSet[int]
    either: bool                               # one of the two day fields is enough
    repeats: bool                              # it counts twice what the wall shows twice

    def has_date(self, day: datetime.date) -> bool:
        """Tell whether it names a date."""
        fits = day.day in self.days, day.isoweekday() % 7 in self.weekdays
        return day.month in self.months and (any(fits) if self.either else all(fits))

    def dates(self, day: datetime.date) -> Iterator[datetime.date]:
        """Yield the dates that it names, from `day` on."""
        one = datetime.timedelta(days=1)
        while day.year < _LAST_YEAR:
            if day.month not in self.months:
                day = (day.replace(day=28) + 4 * one).replace(day=1)
                continue
            if self.has_date(day):
                yield day
            day += one


def _cron_number(text: str, field: CronField, at: int) -> int:
    """Return the number that `text`, at column `at` of a cron line, stands for; raise ValueError."""
    name = text.lower()
    number = field.names.get(name, int(text) if re.fullmatch("[0-9]{1,9}", text) else -1)
    if not field.low <= number <= field.largest:
        raise ValueError(f"{shown(text)} at column {at} is no {field.name}; give {field.takes}")
    return number


def _cron_part(part: str, field: CronField, at: int) -> range:
    """Return what one part of a field's list names: *, a, a-b, and each with /n; raise ValueError."""
    body, slash, step = part.partition("/")
    first, dash, last = body.partition("-")
    start, end = field.low, field.high
    if body != "*":
        start = _cron_number(first, field, at)
        if dash:
            end = _cron_number(last, field, at + len(first) + 1)
            if last.lower() == "sun" and start:
                end = 7                        # fri-sun: by its name, Sunday ends a week as well
            if end < start and start > field.high:
                raise ValueError(f"{shown(body)} at column {at} runs backwards; as the begin of a week, "
                                 f"Sunday is {field.low}: {field.low}-{last}")
            if end < start:
                raise ValueError(f"{shown(body)} at column {at} runs backwards; " + (
                    f"as the end of a week, Sunday is 7: {first}-7" if field.largest > field.high and not end
                    else f"give two ranges: {first}-{field.high},{field.low}-{last}"))
        else:
            end = max(start, field.high) if slash else start
    if not slash:
        return range(start, end + 1)
    at += len(body) + 1
    if not re.fullmatch("[0-9]{1,9}", step) or int(step) < 1:
        raise ValueError(f"{shown(step)} at column {at} is no step; give a number from 1")
    if int(step) > field.largest:
        raise ValueError(f"a step of {step} at column {at} is more than any {field.name} and would leave "
                         f"{start} alone; write {start}, or give every_s instead of cron")
    return range(start, end + 1, int(step))


def _cron_field(text: str, field: CronField, at: int) -> FrozenSet[int]:
    """Return the numbers that a field names; raise ValueError."""
    found: Set[int] = set()
    for part in text.split(","):
        if not part:
            raise ValueError(f"nothing stands beside a comma at column {at}, in the field for {field.name}; "
                             f"give {field.takes}")
        found.update(_cron_part(part, field, at))
        at += len(part) + 1
    return frozenset(n % 7 for n in found) if field.largest > field.high else frozenset(found)


def _cron_fields(line: str) -> List[Tuple[str, int]]:
    """Return the five fields of a line, each with its column from 1; raise ValueError."""
    text = line.strip(" \t")
    if len(line) > MAX_CRON:
        raise ValueError(f"{shown(line)} has {len(line)} characters, more than {MAX_CRON}; "
                         "give ranges and steps")
    if text.startswith("@"):
        word = text.lower()
        if word not in CRON_WORDS:
            raise ValueError(f"{shown(text)} " + (
                "names no time; start the flow where the system starts its services" if word == "@reboot" else
                "is no cron line; give every_s, in seconds, instead of cron" if word.startswith("@every") else
                "is no cron line" + (near(word, CRON_WORDS) or f"; there are {', '.join(CRON_WORDS)}")))
        line = CRON_WORDS[word]
    fields = [(match[0], match.start() + 1) for match in re.finditer(r"[^ \t]+", line)]
    if len(fields) != 5:
        raise ValueError(f"{shown(line)} has {len(fields)} fields; "
                         "give five: minute, hour, day of month, month, day of week")
    return fields


@_remembering
def parse_cron(line: str) -> Cron:
    """Read a cron line; raise ValueError with all that is wrong with it, a line each."""
    fields, found, problems = _cron_fields(line), [], []
    for (text, at), field in zip(fields, _CRON_FIELDS):
        try:
            found.append(_cron_field(text, field, at))
        except ValueError as exc:
            problems.append(str(exc))
    if problems:
        raise ValueError("\n".join(problems))
    minutes, hours, days, months, weekdays = found
    either = not any(fields[n][0].startswith("*") for n in (2, 4))
    if not either and min(days) > max(_DAYS_OF[month - 1] for month in months):
        raise ValueError(f"{shown(line)} names a date that never comes: day {fields[2][0]} of month "
                         f"{fields[3][0]}; give another day or month")
    return Cron(tuple(sorted(minutes)), tuple(sorted(hours)), days, months, weekdays, either,
                any(sign in fields[n][0] for sign in "*/" for n in (0, 1)))


def plain_cron(line: str) -> str:
    """Return a cron line in five fields, for those who may not know words such as @daily."""
    return CRON_WORDS.get(line.strip().lower(), line)


@_remembering
def find_zone(name: Optional[str]) -> datetime.tzinfo:
    """Return the time zone of that name, UTC for None; raise ValueError."""
    if name in (None, "UTC"):
        return datetime.timezone.utc           # needs no data
    import zoneinfo
    try:
        return zoneinfo.ZoneInfo(str(name))
    except (ValueError, LookupError, OSError):
        known = zoneinfo.available_timezones()
    if not known:
        raise ValueError(f"{shown(name)} is not known, as this system has no time zones (looked for in "
                         f"{', '.join(zoneinfo.TZPATH) or 'no directory'}); install tzdata, or give UTC")
    raise ValueError(f"no time zone {shown(name)}"
                     + (near(str(name), known) or "; give one like Europe/Berlin, or UTC"))


def _moment(wall: datetime.datetime) -> int:
    """Return the time at which a clock on the wall shows this."""
    return round(wall.timestamp())


def _change(low: int, high: int, zone: datetime.tzinfo) -> int:
    """Return when, after `low` and not after `high`, the clocks changed to what they are at `high`."""
    def offset(at: int) -> Any:
        return datetime.datetime.fromtimestamp(at, zone).utcoffset()

    late = offset(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if offset(middle) == late else (middle, high)
    return high


def _both(wall: datetime.datetime) -> Tuple[int, int]:
    """Return when a clock on the wall shows this for the first and for the second time.

    They are the same but where clocks change; what is skipped has the second before the first.
    """
    return _moment(wall), _moment(wall.replace(fold=1))


def _moments(wall: datetime.datetime, repeats: bool, makes_up: bool) -> Tuple[int, ...]:
    """Return when a wall clock shows this: once, twice, or never, for which the clocks' change stands in."""
    first, second = _both(wall)
    if first == second:
        return (first,)
    if first < second:
        return (first, second) if repeats else (first,)
    assert wall.tzinfo
    return (_change(second, first, wall.tzinfo),) if makes_up else ()


def _has_change(day: datetime.date, zone: datetime.tzinfo) -> bool:
    """Tell whether the clocks may change on a date, or with its end."""
    start = datetime.datetime(day.year, day.month, day.day, tzinfo=zone)
    return start.utcoffset() != (start + datetime.timedelta(days=1)).replace(fold=1).utcoffset()


def _first_on(day: datetime.date, cron: Cron, zone: datetime.tzinfo, after: int) -> Optional[int]:
    """Return the first time later than `after` that a line names on a date that it names."""
    if not _has_change(day, zone):
        midnight = _moment(datetime.datetime(day.year, day.month, day.day, tzinfo=zone))
        hours = (midnight + hour * 3600 for hour in cron.hours)
        return next((at for hour_at in hours if hour_at + 3540 > after
                     for at in (hour_at + minute * 60 for minute in cron.minutes) if at > after), None)
    found, makes_up = None, len(cron.hours) < 24    # type: Optional[int], bool
    for hour in cron.hours:
        wall = datetime.datetime(day.year, day.month, day.day, hour, tzinfo=zone)
        if max(_both(wall.replace(minute=59))) <= after:
            continue
        if found is not None and min(_both(wall)) > found:
            break                              # so is all that the wall shows later
        times = [at for minute in cron.minutes
                 for at in _moments(wall.replace(minute=minute), cron.repeats, makes_up) if at > after]
        found = min(times + ([] if found is None else [found]), default=None)
    return found


def next_cron(cron: Cron, zone: datetime.tzinfo, after: int) -> Optional[int]:
    """Return the first time later than `after` that a line names in a time zone; None: it never comes.

    Where clocks go back over midnight, a date begins before the one before it is over for good: so the day
    before is looked at, too, and the two after one with a change.
    """
    yesterday = datetime.datetime.fromtimestamp(after, zone).date() - datetime.timedelta(days=1)
    found, until = None, None                  # type: Optional[int], Optional[datetime.date]
    for day in cron.dates(yesterday):
        if until and day > until:
            break
        at = _first_on(day, cron, zone, after)
        if at is not None:
            found = at if found is None else min(at, found)
            until = until or day + datetime.timedelta(days=2 * _has_change(day, zone))
    return found


_AT = r"([0-9]{4})-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}(:[0-9]{2})?(Z|[+-][0-9]{2}:?[0-5][0-9])?"


def has_own_zone(text: str) -> bool:
    """Tell whether a time in ISO 8601 says in which zone it is."""
    match = re.fullmatch(_AT, text.upper().replace(" ", "T"))
    return bool(match and match[3])


def parse_at(text: str, zone: datetime.tzinfo) -> int:
    """Return a time in ISO 8601, which is one in `zone` unless it says another; raise ValueError."""
    iso = text.upper().replace(" ", "T")
    match = re.fullmatch(_AT, iso)
    try:
        if not match or not 1970 <= int(match[1]) < _LAST_YEAR:
            raise ValueError(text)
        own = (match[3] or "").replace("Z", "+00:00").replace(":", "")
        wall = datetime.datetime.fromisoformat(iso[:match.start(3)] if own else iso)
        if own:                                # which Python 3.9 reads in one form only
            sign, hours, minutes = int(own[0] + "1"), int(own[1:3]), int(own[3:])
            zone = datetime.timezone(sign * datetime.timedelta(hours=hours, minutes=minutes))
    except ValueError:
        raise ValueError(f"{shown(text)} is no time; give one like 2027-01-31T06:00:00, "
                         "with Z or +01:00 behind it or a timezone beside it") from None
    return _moments(wall.replace(tzinfo=zone), False, True)[0]


def next_time(schedule: Schedule, after: int) -> Optional[int]:
    """Return the first scheduled time later than `after`, or None; the schedule has been checked."""
    if schedule.cron is not None:
        return next_cron(parse_cron(schedule.cron), find_zone(schedule.timezone), after)
    if schedule.every_s is not None:
        return after + schedule.every_s - (after - _MONDAY) % schedule.every_s
    assert schedule.at is not None
    at = parse_at(schedule.at, find_zone(schedule.timezone))
    return at if at > after else None


def upcoming(schedules: Iterable[Schedule], after: int) -> Iterator[int]:
    """Yield the scheduled times later than `after`, each once, in order."""
    each = list(schedules)
    while True:
        times = [at for at in (next_time(schedule, after) for schedule in each) if at is not None]
        if not times:
            return
        after = min(times)
        yield after


def scheduled_text(at: int) -> str:
    """Return a scheduled time as 2026-11-21T06:00:00Z."""
    return datetime.datetime.fromtimestamp(at, datetime.timezone.utc).isoformat()[:19] + "Z"


# ============================================================================
# == 6. CHECKING: what is wrong with the meaning of a flow?
# ============================================================================
# The shape of a flow (fields, types) is each front end's business and is checked from its table of fields.
# What the fields mean together is checked here, once, for all front ends, and everything that is wrong is
# found at once.
#
# Every check yields Problems whose path is that of the flow file.  Costs are linear in tasks and edges, also
# where everything is wrong: hints for misspelt names, which are dear, stop when more than MAX_PROBLEMS have
# been found.  Whether a template may read a task is found by one search downwards from each task that is
# read, bounded by the last reader in topological order; a search upwards from each reader would be quadratic.

_VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"
_OPTION = r"[A-Za-z0-9_][A-Za-z0-9_.:-]*"
#: Variables that every attempt gets from MiniFlow, and that a flow therefore can't set.
OWN_VARIABLES = ("MINIFLOW_RUN_ID", "MINIFLOW_FLOW", "MINIFLOW_TASK", "MINIFLOW_ATTEMPT", "MINIFLOW_CONTEXT",
                 "MINIFLOW_OUTPUT", "MINIFLOW_COOKIE", "GITHUB_OUTPUT", "TMP_DIR")


def _is_own_variable(name: str) -> bool:
    """Tell whether MiniFlow itself sets the environment variable."""
    return name in OWN_VARIABLES or name.startswith("MINIFLOW_PARAM_")


def topological_order(upstream: Mapping[str, Sequence[str]]) -> List[str]:
    """Return the keys, each after its upstream, ties by their order; those in or behind a cycle lack.

    This is Kahn's algorithm with a heap.  graphlib would give the ties no order that the author can foresee.
    """
    number = {key: n for n, key in enumerate(upstream)}
    waits, downstream = dict.fromkeys(upstream, 0), {}          # type: Dict[str, int], Dict[str, List[str]]
    for key, up in upstream.items():
        for name in set(up) & number.keys() if up else ():
            waits[key] += 1
            downstream.setdefault(name, []).append(key)
    keys, order = list(upstream), []
    ready = [n for n, count in enumerate(waits.values()) if not count]        # sorted, and so a heap
    while ready:
        key = keys[heapq.heappop(ready)]
        order.append(key)
        for name in downstream.get(key, ()):
            waits[name] -= 1
            if not waits[name]:
                heapq.heappush(ready, number[name])
    return order


def find_cycles(upstream: Mapping[str, Sequence[str]]) -> List[List[str]]:
    """Return cycles that share no key, each from one of its keys downstream round to the same key again."""
    left = dict.fromkeys(upstream)
    for key in topological_order(upstream):
        del left[key]
    cycles: List[List[str]] = []
    seen: Set[str] = set()
    for start in left:
        walk: Dict[str, None] = {}
        key = start
        while key not in walk and key not in seen:
            walk[key] = None
            key = next(name for name in upstream[key] if name in left)
        if key in walk:
            steps = list(walk)
            cycles.append([key] + steps[:steps.index(key):-1] + [key])
        seen.update(walk)
    return cycles


def _place(flow: Flow, number: int) -> Path:
    """Return where in the flow file task `number` is."""
    handler = flow.tasks[number].handler
    return (handler,) if handler else ("tasks", number)


def _check_graph(flow: Flow) -> Iterator[Problem]:
    """Yield what is wrong with ids and dependencies: twice the same, unknown ones, cycles."""
    first: Dict[str, int] = {}
    for n, task in enumerate(flow.tasks):
        if first.setdefault(task.id, n) != n:
            yield Problem(_place(flow, n) + ("id",), f"{task.id} is the id of "
                          f"{format_path(_place(flow, first[task.id]))} already; rename one")
    unknown = 0
    for n, task in enumerate(task for task in flow.tasks if not task.handler):
        for k, name in enumerate(task.depends_on):
            place: Path = ("tasks", n, "depends_on", k)
            if name not in first:
                unknown += 1
                hint = near(name, first) if unknown <= MAX_PROBLEMS else ""
                yield Problem(place, f"no task {shown(name)} in this flow{hint}")
            elif name in task.depends_on[:k]:
                yield Problem(place, f"{name} is listed twice; once is enough")
    for cycle in find_cycles({task.id: task.depends_on for task in flow.tasks}):
        steps = cycle if len(cycle) <= 20 else cycle[:10] + [f"({len(cycle) - 15} more)"] + cycle[-5:]
        yield Problem(("tasks", first[cycle[0]], "depends_on"),
                      f"a cycle: {' -> '.join(steps)}; remove one of these dependencies")


def _check_env(env: Mapping[str, Any], path: Path) -> Iterator[Problem]:
    """Yield what is wrong with the names of environment variables."""
    for name in env:
        if not re.fullmatch(_VARIABLE, name):
            yield Problem(path + (name,), "not a name of a variable; use letters, digits and _")
        elif _is_own_variable(name):
            yield Problem(path + (name,), "MiniFlow sets this variable itself; use another name")


def _check_url(url: Optional[str], path: Path) -> Iterator[Problem]:
    """Yield what is wrong with an address, as far as it shows without the values of templates."""
    if url is None or url.startswith("${{"):
        return
    if not re.match(r"https?://[^/?#]", url):
        yield Problem(path, f"{shown(url)} is no address; write http:// or https:// and a host")
    port = re.match(r"https?://[^/?#$]*:(\d{1,9})(?:[/?#]|$)", url)
    if port and not 0 < int(port[1]) < 65536:
        yield Problem(path, f"{shown(url)}: port {port[1]} is not from 1 to 65535")


def _check_http(request: Mapping[str, Any], path: Path) -> Iterator[Problem]:
    """Yield what is wrong with a request."""
    yield from _check_url(request.get("url"), path + ("url",))
    if "json" in request and "body" in request:
        yield Problem(path + ("body",), "beside json; give only one of them")
    for name, value in request.get("headers", {}).items():
        if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
            yield Problem(path + ("headers", name), "not a name of a header field")
        elif re.search(r"[\0\r\n]", value):
            yield Problem(path + ("headers", name), f"{shown(value)} has a line break or a NUL in it")


def _check_action(task: Task, path: Path) -> Iterator[Problem]:
    """Yield what is wrong with what a task executes."""
    action = task.action
    if isinstance(action, Command) and isinstance(action.command, str):
        if any(match[0] != "$${{" for match in re.finditer(_TEMPLATE, action.command)):
            yield Problem(path + ("command",), "a template in a shell string would run its value as code; "
                          "use $MINIFLOW_PARAM_NAME, an env entry, args ($1, $2, …) or an array command")
    if isinstance(action, Script) and "${{" in (action.python or ""):
        yield Problem(path + ("python",), "takes no template; write tasks of their own, or a command")
    if isinstance(action, Function) and task.executor == SLURM:
        yield Problem(path + ("executor",), f"{action.name} is a Python function, which can't run on Slurm; "
                      "make it a script, or leave out executor")
    if not isinstance(action, Http):
        for n, code in enumerate(task.retry.retry_on or ()):
            if isinstance(code, int) and code > 255:
                yield Problem(path + ("retry_on", n), f"expected an exit code from 1 to 255, got {code}")
    else:
        yield from _check_http(action.request, path + ("http",))
    if isinstance(action, WaitFor):
        given = [name for name in action.condition if name != "poll_s"]
        if len(given) != 1:
            yield Problem(path + ("wait_for",), "give one of file, url, command and seconds, "
                          f"not {' and '.join(given) or 'none of them'}")
        yield from _check_url(action.condition.get("url"), path + ("wait_for", "url"))
    if isinstance(action.args, dict):
        for key in action.args:
            if not re.fullmatch(_OPTION, key):
                yield Problem(path + ("args", key), "not a name of an option; "
                              "write it without leading dashes and =")


def _check_pools(flow: Flow) -> Iterator[Problem]:
    """Yield the pools that tasks name and the flow lacks."""
    for n, task in enumerate(flow.tasks):
        if task.pool is not None and task.pool not in flow.pools:
            hint = near(task.pool, flow.pools) or f"; it has {', '.join(flow.pools) or 'none'}"
            yield Problem(_place(flow, n) + ("pool",), f"the flow has no pool {shown(task.pool)}{hint}")


def _check_ref(ref: Ref, flow: Flow, roots: Iterable[str]) -> Optional[str]:
    """Return what is wrong with `ref` by itself, if anything."""
    root = str(ref.path[0])
    if root not in roots:
        return f"{ref.text} can't be used here; only {', '.join(roots)} can"
    if root == "env" and _is_own_variable(str(ref.path[1])):
        return f"{ref.text}: MiniFlow sets this variable for the task itself; use params or run"
    if root == "params" and flow.params is not None and ref.path[1] not in flow.params:
        name = str(ref.path[1])
        return (f"{ref.text}: the flow has no param {shown(name)}"
                + (near(name, flow.params) or f"; it has {', '.join(flow.params) or 'none'}"))
    return None


def _check_upstream_refs(flow: Flow, wanted: Dict[str, List[Tuple[int, Path, Ref]]]) -> Iterator[Problem]:
    """Check that each task read by a template is upstream of its reader.

    The tasks that are read get a bit each, and each task the bits of all that is upstream of it, in one go
    down the flow for 4,096 of them at a time.
    """
    upstream = {task.id: task.depends_on for task in flow.tasks}
    order = topological_order(upstream) if wanted else []
    names = list(wanted)
    for start in range(0, len(names), 4096):
        bits = {name: 1 << n for n, name in enumerate(names[start:start + 4096])}
        above: Dict[str, int] = {}
        for key in order:
            mask = 0
            for up in upstream[key]:
                mask |= above.get(up, 0) | bits.get(up, 0)
            above[key] = mask
        for name in bits:
            for n, place, ref in wanted[name]:
                reader = flow.tasks[n].id
                if name not in upstream:
                    yield Problem(place, f"{ref.text}: no task {shown(name)} in this flow"
                                         + near(name, upstream))
                elif reader in above and not above[reader] & bits[name]:
                    yield Problem(place, f"{ref.text}: {name} is not upstream of {reader}; "
                                         f"add {shown(name)} to its depends_on")


def _check_text(text: Any, flow: Flow, place: Path, roots: Iterable[str],
                path: Path = ()) -> Iterator[Problem]:
    """Yield what is wrong with the names in one string, of which each begins with one of `roots`."""
    try:
        found = refs_at(path, text)
    except ValueError as exc:
        yield Problem(place, str(exc))
        return
    for ref in found:
        what = _check_ref(ref, flow, roots)
        if what:
            yield Problem(place, what)


def _roots_for(task: Task, path: Path) -> List[str]:
    """Return what names in the string at `path` of a task may begin with."""
    there = {"foreach": "item", "matrix": "matrix"}.get(task.many or "") if path[0] != task.many else None
    return [root for root in ROOTS if root not in EACH_ROOTS or root == there]


def _check_instances(task: Task, path: Path) -> Iterator[Problem]:
    """Yield what is wrong with the fields that make instances of a task."""
    if not task.many:
        if task.max_parallel is not None:
            yield Problem(path + ("max_parallel",), "goes with foreach or matrix only; remove it")
        return
    if task.foreach is not None and task.matrix is not None:
        yield Problem(path + ("matrix",), "beside foreach; give only one of them")
    if isinstance(task.foreach, str) and not _is_template(task.foreach):
        yield Problem(path + ("foreach",), f"{shown(task.foreach)} is not one template that gives an array; "
                      "write ${{ … }} and nothing else, or an array")
    matrix = task.matrix or {}
    for name, values in matrix.items():
        if isinstance(values, str) and not _is_template(values):
            yield Problem(path + ("matrix", name), f"{shown(values)} is not one template that gives an array")
    if not any(isinstance(values, str) for values in matrix.values()):
        try:
            matrix_combinations(matrix)
        except ValueError as exc:
            yield Problem(path + ("matrix",), str(exc))
    names = {*matrix, *chain.from_iterable(matrix.get("include", ()))} - {"include", "exclude"}
    for place, text in templates(task) if matrix else ():
        try:
            found = refs_at(place, text)
        except ValueError:
            continue                            # reported with the rest of the string
        for ref in found:
            if ref.path[0] == "matrix" and ref.path[1] not in names:
                yield Problem(path + place, f"{ref.text}: the matrix has no {shown(ref.path[1])}"
                              + (near(str(ref.path[1]), names) or f"; it has {', '.join(sorted(names))}"))


def _check_templates(flow: Flow) -> Iterator[Problem]:
    """Yield what is wrong with all templates of a flow."""
    for name, value in flow.env.items():
        yield from _check_text(value, flow, ("env", name), ("params", "run", "env"))
    wanted: Dict[str, List[Tuple[int, Path, Ref]]] = {}
    for n, task in enumerate(flow.tasks):
        for path, text in templates(task):
            place: Path = _place(flow, n) + path
            problems = list(_check_text(text, flow, place, _roots_for(task, path), path))
            yield from problems
            for ref in refs_at(path, text) if not problems else ():
                if ref.path[0] == "tasks":
                    wanted.setdefault(str(ref.path[1]), []).append((n, place, ref))
    yield from _check_upstream_refs(flow, wanted)


def _check_params(params: Mapping[str, Param]) -> Iterator[Problem]:
    """Yield what is wrong with the declarations of params, their defaults among them."""
    for name, param in params.items():
        place: Path = ("params", name)
        if param.pattern is not None:
            try:
                re.compile(param.pattern)
            except re.error as exc:
                yield Problem(place + ("pattern",), f"{shown(param.pattern)} is no regular expression: {exc}")
                continue
            if param.type != "string":
                yield Problem(place + ("pattern",), "only a param of type string can have a pattern")
        if param.min is not None and param.max is not None and param.min > param.max:
            yield Problem(place + ("min",), f"{shown(param.min)} is more than max, {shown(param.max)}")
        if param.default is not MISSING:
            problems: List[Problem] = []
            check_schema(param_schema(param), param.default, place, problems)
            yield from (Problem(p.path, f"the default does not fit: {p.what}") for p in problems)
    for first, second in _clashing(params):
        yield Problem(("params", second), f"{first} is MINIFLOW_PARAM_{param_variable(first)} as well; "
                          "rename one")


def _check_times(schedule: Schedule) -> Iterator[Problem]:
    """Yield what is wrong with when a schedule says, at a path within it."""
    given = [name for name in WHEN_FIELDS if getattr(schedule, name) is not None]
    if len(given) != 1:
        yield Problem((), f"give one of {', '.join(WHEN_FIELDS)}, "
                          f"not {' and '.join(given) or 'none of them'}")
    own = schedule.at is not None and has_own_zone(schedule.at)
    if schedule.timezone is not None and (own or given == ["every_s"]):
        yield Problem(("timezone",), "at says its zone itself; remove one of them" if own else
                      "goes with cron and at only; remove it")
    readers: Tuple[Tuple[str, Callable[[], Any]], ...] = (
        ("timezone", lambda: find_zone(schedule.timezone)),
        ("cron", lambda: parse_cron(schedule.cron) if schedule.cron is not None else None),
        ("at", lambda: parse_at(schedule.at, find_zone(None)) if schedule.at is not None else None))
    for name, reader in readers:
        try:
            reader()
        except ValueError as exc:
            yield from (Problem((name,), line) for line in str(exc).split("\n"))
    if schedule.every_s is not None and schedule.jitter_s > schedule.every_s:
        yield Problem(("jitter_s",), f"{shown(schedule.jitter_s)} is more than every_s, {schedule.every_s}")


def _check_schedules(flow: Flow) -> Iterator[Problem]:
    """Yield what is wrong with the schedules of a flow, and with what they give to its params."""
    first: Dict[Tuple[Any, ...], int] = {}
    for n, schedule in enumerate(flow.schedule):
        place: Path = ("schedule", n) if len(flow.schedule) > 1 else ("schedule",)
        yield from (Problem(place + found.path, found.what) for found in _check_times(schedule))
        when = schedule[:4]                    # what WHEN_FIELDS say, and the time zone
        if first.setdefault(when, n) != n:
            yield Problem(place, f"the same times as schedule[{first[when]}], whose runs they are; remove it")
        try:
            complete_params(flow, schedule.params, "{} in the schedule's params")
        except UsageError as exc:
            for line in str(exc).split("\n"):
                name, _, what = line[len("params."):].partition(": ")
                yield Problem(place + ("params", name), what)
        except ValueError:
            pass                               # a template that can't be read, reported as what it is


def check_flow(flow: Flow) -> List[Problem]:
    """Return all that is wrong with the meaning of `flow`; an empty list means that it can run."""
    problems = list(_check_params(flow.params or {}))
    problems += _check_env(flow.env, ("env",))
    for n, task in enumerate(flow.tasks):
        place = _place(flow, n)
        problems += _check_action(task, place)
        problems += _check_instances(task, place)
        problems += _check_env(task.env, place + ("env",))
    problems += _check_graph(flow)
    problems += _check_pools(flow)
    problems += _check_templates(flow)
    problems += _check_schedules(flow)
    return problems


# ============================================================================
# == 7. JSON FRONT END: how does a flow become JSON, and JSON a flow?
# ============================================================================
# The tables below are the one place where a field of the flow file is defined: reading, checking, writing and
# the published schema all follow them.
#
# A field is reported and left out where it is wrong, and the rest of its task is made all the same: so the
# meaning of what is right can be checked in the same go, and no error hides another.  A task without a sound
# action gets a stand-in that no run will ever see, because a flow with problems never leaves parse_flow.

class Field(NamedTuple):
    """One field of the flow file."""

    name: str
    schema: Schema
    doc: str
    required: bool = False


_NAME: Schema = {"type": "string", "pattern": r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$(?!\n)", "maxLength": 128,
                 "title": "a name of letters, digits, _, . and -, not starting with . or -, "
                          "of at most 128 characters"}
_STR: Schema = {"type": "string"}
_STRS: Schema = {"type": "array", "items": _STR, "title": "an array of strings"}
_TEXT: Schema = {"type": "string", "minLength": 1, "title": "a non-empty string"}
_ALONE: Schema = {"type": "string", "pattern": r"^\$\{\{[^}]*\}\}$"}           # one template and no more
_PATTERNS: Schema = {"type": "array", "items": _TEXT, "title": "an array of patterns of files"}
_BOOL: Schema = {"type": "boolean"}
_SECONDS: Schema = {"type": "number", "minimum": 0, "maximum": 315360000}
_LIMIT: Schema = {"type": "number", "minimum": 0.001, "maximum": 315360000}
_VALUE: Schema = {"anyOf": [_STR, {"type": "number"}, _BOOL], "title": "a string, a number or a boolean"}
_ENV: Schema = {"type": "object", "additionalProperties": _VALUE, "title": "an object of strings",
                "propertyNames": {"pattern": r"^[A-Za-z_][A-Za-z0-9_]*$"}}
_OPTIONS: Schema = {"type": "object", "additionalProperties": {
    "anyOf": [_STR, {"type": "number"}, _BOOL, {"type": "null"}, {"type": "array", "items": _VALUE}],
    "title": "a string, a number, a boolean, null or an array of these"}}
_ARGS: Schema = {"anyOf": [{"type": "array", "items": _VALUE}, _OPTIONS], "title": "an array or an object"}
_COMMAND: Schema = {"anyOf": [{"type": "string", "minLength": 1},
                              {"type": "array", "items": _STR, "minItems": 1}],
                    "title": "a shell string, or a non-empty array of strings"}
_FOREACH: Schema = {"anyOf": [{"type": "array", "maxItems": MAX_INSTANCES}, _STR],
                    "title": f"an array of at most {MAX_INSTANCES:,} values, or a template that gives one"}
_ENTRY: Schema = {"type": "object", "minProperties": 1, "title": "a non-empty object"}
_ENTRIES: Schema = {"type": "array", "items": _ENTRY, "title": "an array of objects"}
_AXIS: Schema = {"anyOf": [{"type": "array"}, _STR], "title": "an array, or a template that gives one"}
_MATRIX: Schema = {"type": "object", "minProperties": 1, "additionalProperties": _AXIS,
                   "properties": {"include": _ENTRIES, "exclude": _ENTRIES},
                   "title": "a non-empty object of arrays"}
_RETRY_ON: Schema = {"type": "array", "items": {
    "anyOf": [{"type": "integer", "minimum": 1, "maximum": 599}, {"type": "string", "enum": ["timeout"]}],
    "title": "an exit code from 1 to 255, \"timeout\", or with http a status"}}

PARAM_FIELDS = (
    Field("type", {"type": "string", "enum": list(PARAM_TYPES)}, "what kind of value it takes"),
    Field("default", {}, "its value where none is given"),
    Field("required", _BOOL, "true: a run can't start without it"),
    Field("enum", {"type": "array", "minItems": 1, "title": "a non-empty array"},
          "the values that it may have"),
    Field("min", {"type": "number"}, "the least number, or length of a string or array"),
    Field("max", {"type": "number"}, "the largest number, or length of a string or array"),
    Field("pattern", _STR, "a regular expression that a string must match somewhere"),
    Field("description", _STR, "shown to whoever starts the flow"),
)

def object_schema(fields: Sequence[Field], without: Iterable[str] = ()) -> Schema:
    """Return the JSON Schema of an object that has `fields`, less those named in `without`."""
    kept = [field for field in fields if field.name not in without]
    schema: Schema = {"type": "object", "additionalProperties": False, "properties": {
        field.name: {**field.schema, "description": field.doc} for field in kept}}
    required = [field.name for field in kept if field.required]
    return {**schema, "required": required} if required else schema


_STATUS: Schema = {"type": "integer", "minimum": 100, "maximum": 599}
HTTP_FIELDS = (
    Field("url", _TEXT, "where to; http and https only", required=True),
    Field("method", {"type": "string", "pattern": r"^[A-Z]+$", "title": "a method in capitals"},
          "GET, or POST with a body, unless it is given"),
    Field("headers", {"type": "object", "additionalProperties": _STR, "title": "an object of strings"},
          "header fields"),
    Field("json", {}, "a body that is sent as JSON"),
    Field("body", _STR, "a body that is sent as it is"),
    Field("expect_status", {"anyOf": [_STATUS, {"type": "array", "items": _STATUS, "minItems": 1}],
                            "title": "a status from 100 to 599, or an array of them"},
          "the status that is a success; 200 to 299 unless it is given"),
    Field("save", _TEXT, "a file for the body of the answer, relative to cwd"),
)
WAIT_FIELDS = (
    Field("file", _TEXT, "a pattern that a file matches, relative to cwd"),
    Field("url", _TEXT, "an address that answers with 200 to 299"),
    Field("command", {"type": "array", "items": _STR, "minItems": 1, "title": "a non-empty array of strings"},
          "a command that ends with exit code 0"),
    Field("seconds", {"anyOf": [_SECONDS, _ALONE], "title": "seconds, or a template that gives them"},
          "so many seconds"),
    Field("poll_s", {"anyOf": [_LIMIT, _ALONE], "title": "seconds, or a template that gives them"},
          "seconds between two looks; default 5"),
)
ACTION_FIELDS = (
    Field("script", {"type": "string", "minLength": 1,
                     "title": "a path of a Python file below the tasks directory"},
          "Python file below the tasks directory, to be run"),
    Field("command", _COMMAND, "a string for /bin/sh -c, or an array that is run without a shell"),
    Field("http", object_schema(HTTP_FIELDS), "a request to a web server"),
    Field("wait_for", object_schema(WAIT_FIELDS), "something to wait for"),
    Field("flow", _NAME, "another flow of the directory, as a run of its own"),
)
SCHEDULE_FIELDS = (
    Field("cron", _TEXT, "five fields: minute, hour, day of month, month, day of week; or a word, as @daily"),
    Field("every_s", {"type": "integer", "minimum": 1, "maximum": 315360000},
          "so many seconds apart, counted from Monday, 1970-01-05T00:00:00Z"),
    Field("at", _TEXT, "one time, as 2027-01-31T06:00:00"),
    Field("timezone", _TEXT, "where the clocks of cron and at hang, as Europe/Berlin; default: UTC"),
    Field("catchup", {"type": "string", "enum": list(CATCHUPS)},
          "which of the times that were missed are made up for; default: none"),
    Field("overlap", {"type": "string", "enum": list(OVERLAPS)},
          "what becomes of a time that comes while the flow runs; default: skip"),
    Field("params", {"type": "object"}, "params of its runs"),
    Field("jitter_s", {"type": "number", "minimum": 0, "maximum": 3600},
          "a run starts up to so many seconds after its time"),
)

RESOURCE_FIELDS = (
    Field("cpus", {"type": "integer", "minimum": 1, "maximum": 1000000}, "CPUs for the task"),
    Field("memory_mb", {"type": "integer", "minimum": 1, "maximum": 2**40}, "memory, in MiB"),
    Field("time_s", _LIMIT, "seconds that the job may take, which Slurm rounds up to minutes"),
    Field("partition", {"type": "string", "pattern": r"^[A-Za-z0-9_.+,-]+$(?!\n)",
                        "title": "the name of a partition, or several with commas between them"},
          "the partition, or partitions, that it may run in"),
    Field("gpus", {"type": "integer", "minimum": 1, "maximum": 1000000}, "GPUs for the task"),
)

TASK_FIELDS = (
    Field("id", _NAME, "the task's name, unique in the flow", required=True),
    *ACTION_FIELDS,
    Field("description", _STR, "shown by graph"),
    Field("tags", _STRS, "run --tags takes the tasks with a tag and what they need"),
    Field("depends_on", _STRS, "ids of the tasks that it waits for"),
    Field("params", {"type": "object"}, "params of the other flow"),
    Field("args", _ARGS, "arguments: an array as it is, or an object of options"),
    Field("env", _ENV, "environment variables"),
    Field("cwd", _STR, "working directory, relative to where MiniFlow was started"),
    Field("python", _TEXT, "the interpreter for script"),
    Field("stdin", _STR, "text for standard input, which is empty otherwise"),
    Field("max_retries", {"type": "integer", "minimum": 0, "maximum": 1000000}, "attempts after the first"),
    Field("backoff_s", _SECONDS, "seconds before attempt 2, doubled before each further one"),
    Field("max_backoff_s", _SECONDS, "the longest wait between attempts, in seconds"),
    Field("jitter", {"type": "number", "minimum": 0, "maximum": 1}, "the share of the wait that is random"),
    Field("retry_on", _RETRY_ON, "exit codes, or \"timeout\", that are retried; default: all"),
    Field("timeout_s", _LIMIT, "seconds that an attempt may take"),
    Field("grace_s", _SECONDS, "seconds between SIGTERM and SIGKILL"),
    Field("trigger_rule", {"type": "string", "enum": list(TRIGGER_RULES)},
          "how its upstream must have ended"),
    Field("if", _STR, "an expression; where it is false, the task is skipped"),
    Field("inputs", _PATTERNS, "files that it reads: it runs where one of them has changed"),
    Field("outputs", _PATTERNS, "files that it makes: it runs where one of them is not there"),
    Field("foreach", _FOREACH, "one instance for each value of this array"),
    Field("matrix", _MATRIX, "one instance for each combination of the values of these arrays"),
    Field("max_parallel", {"type": "integer", "minimum": 1, "maximum": 100000}, "instances at once"),
    Field("allow_failure", _BOOL, "true: its failure counts as success"),
    Field("priority", {"type": "integer", "minimum": -1000000, "maximum": 1000000}, "higher starts first"),
    Field("pool", _STR, "name of a pool of the flow, of which only so many tasks run at once"),
    Field("executor", {"type": "string", "enum": [LOCAL, SLURM]},
          "where it runs: local, beside MiniFlow, or as a job of slurm; default: as run --executor says"),
    Field("resources", object_schema(RESOURCE_FIELDS), "what it needs as a job of slurm"),
)
#: Fields that `defaults` can't give, and those that fit one action only.
_NOT_INHERITED = frozenset(["id", "depends_on", "foreach", "matrix", "max_parallel"]
                           + [field.name for field in ACTION_FIELDS])
_FOR_ACTION = {"python": ("script",), "args": ("script", "command"), "stdin": ("script", "command"),
               "executor": ("script", "command"), "resources": ("script", "command"),
               "params": ("flow",), **dict.fromkeys(["inputs", "outputs"], ("script", "command", "http"))}
#: Members of Flow that are made of their fields, not these themselves.
_MADE_MEMBERS = ("params", "tasks", "schedule")
#: Fields that are members of Task as they stand.
_PLAIN_FIELDS = frozenset(Task._fields) - {"action", "retry", "handler"}
#: Members of Task whose field has a name that Python keeps for itself.
_FIELD_OF = {"condition": "if"}
_MEMBER_OF = {field: member for member, field in _FIELD_OF.items()}


_PARAM_SCHEMA = object_schema(PARAM_FIELDS)
_LONG_FORM = ("type", "default", "required", "enum")    # an object with one of these declares a param
_TASK_SCHEMA = object_schema(TASK_FIELDS)
_DEFAULTS_SCHEMA = object_schema(TASK_FIELDS, _NOT_INHERITED)
_HANDLER_SCHEMA = {**object_schema(TASK_FIELDS, ["depends_on", "trigger_rule"]), "required": [],
                   "title": "a task: an object"}
_SCHEDULE: Schema = {"anyOf": [_TEXT, object_schema(SCHEDULE_FIELDS)], "title": "a cron line or an object"}
_SCHEDULES: Schema = {
    "anyOf": [*_SCHEDULE["anyOf"], {"type": "array", "items": _SCHEDULE, "minItems": 1, "maxItems": 100}],
    "title": "a cron line, an object, or an array of up to 100 of these"}

FLOW_FIELDS = (
    Field("$schema", {}, "ignored; for editors"),
    Field("name", _NAME, "the flow's name", required=True),
    Field("description", _STR, "what the flow is for"),
    Field("version", _STR, "the flow's own version"),
    Field("tags", _STRS, "shown by list and graph"),
    Field("params", {"type": "object"}, "name to default value, or to a declaration"),
    Field("env", _ENV, "environment variables of every task"),
    Field("defaults", _DEFAULTS_SCHEMA, "fields that every task inherits"),
    Field("max_parallel", {"type": "integer", "minimum": 1, "maximum": 100000}, "tasks at once"),
    Field("pools", {"type": "object", "additionalProperties": {"type": "integer", "minimum": 1},
                    "propertyNames": {"pattern": _NAME["pattern"], "maxLength": 128},
                    "title": "an object of whole numbers from 1"},
          "name to the number of its tasks that may run at once"),
    Field("fail_fast", _BOOL, "true: start nothing more after the first failure"),
    Field("preload", {"type": "array", "items": {"type": "string", "pattern": r"^[^\W\d]\w*(\.[^\W\d]\w*)*$",
                                                 "title": "the name of a Python module"},
                      "title": "an array of names of Python modules"},
          "Python modules that are imported once for all Python scripts"),
    Field("timeout_s", _LIMIT, "seconds that the whole run may take"),
    Field("schedule", _SCHEDULES, "when it is run by itself: a cron line, an object, or an array of these"),
    Field("secrets", {"type": "array", "items": {"type": "string", "pattern": r"^[A-Za-z_][A-Za-z0-9_]*$",
                                                 "title": "the name of an environment variable"},
                      "title": "an array of names of environment variables"},
          "environment variables whose values are shown and stored as ***"),
    Field("on_success", _HANDLER_SCHEMA, "a task that runs when all others have ended and none has failed"),
    Field("on_failure", _HANDLER_SCHEMA, "a task that runs when all others have ended and one has failed"),
    Field("finally", _HANDLER_SCHEMA, "a task that runs last, however the others ended"),
    Field("tasks", {"type": "array", "minItems": 1, "items": _TASK_SCHEMA,
                    "title": "a non-empty array of tasks"},
          "the tasks", required=True),
)
_FLOW_SCHEMA = object_schema(FLOW_FIELDS)


def flow_schema() -> Schema:
    """Return the JSON Schema (draft 2020-12) of the flow file, for editors."""
    schema = object_schema(FLOW_FIELDS)
    long_form = {"type": "object", "anyOf": [{"required": [word]} for word in _LONG_FORM]}
    schema["properties"]["params"]["additionalProperties"] = {"if": long_form, "then": _PARAM_SCHEMA}
    when = {**_SCHEDULE["anyOf"][1], "oneOf": [{"required": [word]} for word in WHEN_FIELDS]}
    each = {**_SCHEDULE, "anyOf": [_TEXT, when]}
    schema["properties"]["schedule"]["anyOf"] = [*each["anyOf"], {**_SCHEDULES["anyOf"][2], "items": each}]
    task = schema["properties"]["tasks"]["items"] = dict(_TASK_SCHEMA)
    task["oneOf"] = [{"required": [field.name]} for field in ACTION_FIELDS]
    task["dependentSchemas"] = {name: {"anyOf": [{"required": [action]} for action in actions]}
                                for name, actions in _FOR_ACTION.items()}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "MiniFlow flow", **schema}


def _sound(schema: Schema, raw: Mapping[str, Any], path: Path, problems: List[Problem]) -> Dict[str, Any]:
    """Check the object `raw` and return its sound members, so that checking can go on with them."""
    found: List[Problem] = []
    check_schema(schema, raw, path, found)
    problems += found
    bad = {problem.path[len(path)] for problem in found if len(problem.path) > len(path)}
    return {name: value for name, value in raw.items() if name not in bad}


def _make_params(raw: Any, problems: List[Problem]) -> Optional[Dict[str, Param]]:
    """Return the declared params of the raw `params`; what is wrong with their shape goes to `problems`."""
    if not isinstance(raw, dict):
        return None
    params = {}
    for name, value in raw.items():
        if isinstance(value, dict) and value.keys() & set(_LONG_FORM):
            value = _sound(_PARAM_SCHEMA, value, ("params", name), problems)
            if "enum" in value:
                value = {**value, "enum": tuple(value["enum"])}
            params[name] = Param(**value)
        else:
            params[name] = Param(default=value)
    return params


def make_schedules(raw: Any) -> Tuple[Schedule, ...]:
    """Return the schedules of the sound field `schedule`."""
    return tuple(Schedule(cron=each) if isinstance(each, str) else Schedule(**each)
                 for each in (raw if isinstance(raw, (list, tuple)) else [raw]))


def _read_schedules(raw: Any, problems: List[Problem]) -> Tuple[Schedule, ...]:
    """Return what is sound of the raw `schedule`; what is wrong with its shape goes to `problems`."""
    found: List[Problem] = []
    check_schema(_SCHEDULES, raw, ("schedule",), found)
    problems += found
    bad = {problem.path for problem in found}
    if ("schedule",) in bad:
        return ()
    schedules = []
    for n, each in enumerate(raw if isinstance(raw, list) else [raw]):
        place: Path = ("schedule", n) if isinstance(raw, list) else ("schedule",)
        members: Dict[str, Any] = {} if place in bad else {"cron": each} if isinstance(each, str) else each
        sound = {name: value for name, value in members.items() if place + (name,) not in bad}
        if not sound.keys() & set(WHEN_FIELDS) and (place in bad or members.keys() & set(WHEN_FIELDS)):
            sound["at"] = f"9000-01-01T00:{n // 60:02}:{n % 60:02}"        # stands in for what was reported
        schedules.append(Schedule(**sound))
    return tuple(schedules)


def _frozen(value: Any) -> Any:
    """Return an array as a tuple, anything else as it is."""
    return tuple(value) if isinstance(value, list) else value


#: The grace of a task that is a flow, unless it is given: its own tasks have one, too.
SUBFLOW_GRACE_S = 15


def make_task(fields: Mapping[str, Any]) -> Task:
    """Make a Task from sound fields of the flow file, one action among them."""
    if "if" in fields:
        fields = {_MEMBER_OF.get(name, name): value for name, value in fields.items()}

    def pick(names: Collection[str]) -> Dict[str, Any]:
        return {name: _frozen(value) for name, value in fields.items() if name in names}

    action: Action
    if "function" in fields:                    # only in the record of a run
        action = Function(fields["function"], **pick(("kind",)))
    elif "script" in fields:
        action = Script(fields["script"], **pick(("args", "python", "stdin")))
    elif "http" in fields:
        action = Http(fields["http"])
    elif "wait_for" in fields:
        action = WaitFor(fields["wait_for"])
    elif "flow" in fields:
        action = SubFlow(fields["flow"], **pick(("params",)))
        fields = {"grace_s": SUBFLOW_GRACE_S, **fields}
    else:
        action = Command(_frozen(fields["command"]), **pick(("args", "stdin")))
    members, retry = pick(_PLAIN_FIELDS), pick(Retry._fields)
    if retry:
        members["retry"] = Retry(**retry)
    return Task(action=action, **members)


def _read_task(raw: Any, place: Path, defaults: Dict[str, Any], problems: List[Problem],
               schema: Schema = _TASK_SCHEMA) -> Optional[Task]:
    """Make a Task of the raw one at `place`; what is wrong is appended to `problems` and left out."""
    if not isinstance(raw, dict):
        return None                             # reported with the array of tasks
    fields = _sound(schema, raw, place, problems)
    given = [field.name for field in ACTION_FIELDS if field.name in raw]
    names = ", ".join(field.name for field in ACTION_FIELDS)
    if not given:
        problems.append(Problem(place, f"the task does nothing; give one of {names}"))
    elif len(given) > 1:
        problems.append(Problem(place + (given[1],), f"a second action beside {given[0]}; "
                                f"give only one of {names}"))
    for name, owners in _FOR_ACTION.items():
        if name in raw and not set(owners) & set(given):
            problems.append(Problem(place + (name,), f"goes with {' and '.join(owners)} only; remove it"))
    if "id" not in fields:
        return None
    inherited = {name: value for name, value in defaults.items()
                 if set(_FOR_ACTION.get(name, given)) & set(given)}
    if "env" in inherited and "env" in fields:
        fields["env"] = {**inherited["env"], **fields["env"]}
    fields = {**inherited, **fields}
    if fields.get("executor") == LOCAL and fields.pop("resources", None) and "resources" in raw:
        problems.append(Problem(place + ("resources",), f"goes with executor {SLURM} only; remove it"))
    if not fields.keys() & {field.name for field in ACTION_FIELDS}:
        fields["command"] = "exit 70"            # stands in for what was reported, so that checking can go on
    return make_task(fields)


def read_flow(raw: Any, problems: List[Problem]) -> Optional[Flow]:
    """Make a Flow from the JSON value `raw`, and append all that is wrong with its shape to `problems`."""
    if not isinstance(raw, dict):
        problems.append(Problem((), f"expected an object with name and tasks, got {shown(raw)}"))
        return None
    whole = {**_FLOW_SCHEMA, "properties": {**_FLOW_SCHEMA["properties"], "tasks": {
        "type": "array", "minItems": 1, "items": {"type": "object", "title": "a task: an object"},
        "title": "a non-empty array of tasks"},
        "schedule": {}, **dict.fromkeys(HANDLERS, {"type": "object", "title": "a task: an object"})}}
    fields = _sound(whole, raw, (), problems)
    given = raw.get("defaults")
    defaults = _sound(_DEFAULTS_SCHEMA, given, ("defaults",), []) if isinstance(given, dict) else {}
    raw_tasks = raw.get("tasks")
    tasks = [_read_task(task, ("tasks", n), defaults, problems)
             for n, task in enumerate(raw_tasks if isinstance(raw_tasks, list) else [])]
    if None in tasks:                            # keep the numbers of the others: they are their places
        blank = Task("", Command("exit 70"))
        tasks = [task or blank._replace(id=f" {n}") for n, task in enumerate(tasks)]
    simple = {name: _frozen(fields[name]) for name in Flow._fields
              if name in fields and name not in _MADE_MEMBERS}
    simple.setdefault("name", "unnamed")
    handlers = {name: _read_task({"id": name, **fields[name]}, (name,), defaults, problems, _HANDLER_SCHEMA)
                for name in HANDLERS if name in fields}
    return Flow(tasks=add_handlers([task for task in tasks if task],
                                   {name: task for name, task in handlers.items() if task}),
                params=_make_params(fields.get("params"), problems),
                schedule=_read_schedules(fields["schedule"], problems) if "schedule" in fields else (),
                **simple)


def parse_flow(content: Union[bytes, str], where: str,
               script_problem: Callable[[str], Optional[str]] = lambda path: None,
               flow_problem: Callable[[SubFlow], Iterable[Problem]] = lambda action: ()) -> Flow:
    """Read a flow file; raise FlowError with all that is wrong with it, each with its place in `where`.

    `script_problem` tells what is wrong with a script's path, which only somebody who sees the disk can know,
    and `flow_problem` what is wrong with a task that is another flow.
    """
    document = read_json(content, where)
    problems: List[Problem] = []
    flow = read_flow(document.value, problems)
    if flow:
        problems += check_flow(flow)
        for n, task in enumerate(flow.tasks):
            what = script_problem(task.action.path) if isinstance(task.action, Script) else None
            if what:
                problems.append(Problem(_place(flow, n) + ("script",), what))
            if isinstance(task.action, SubFlow):
                problems += [Problem(_place(flow, n) + found.path, found.what)
                             for found in flow_problem(task.action)]
    if problems or document.flaws or not flow:
        raise document.error(problems)
    return flow


def _unusual(part: Any) -> Dict[str, Any]:
    """Return the members of a NamedTuple that have a default and are not at it."""
    usual = part._field_defaults
    return {name: value for name, value in zip(part._fields, part)
            if name in usual and value is not usual[name] and value != usual[name]}


def task_to_json(task: Task) -> Dict[str, Any]:
    """Return the fields of `task` as in a flow file, without those that have their default value."""
    action, members = task.action, _unusual(task)
    members.pop("retry", None)
    if isinstance(action, SubFlow):            # which has another default
        members["grace_s"] = task.grace_s
    return {"id": task.id, ACTION_WORDS[type(action)]: action[0],
            **{_FIELD_OF.get(name, name): value for name, value in members.items()}, **_unusual(action),
            **_unusual(task.retry)}


def schedules_to_json(schedules: Sequence[Schedule]) -> Any:
    """Return the field `schedule` in its shortest form: a cron line alone, an object, or an array."""
    found = [members["cron"] if [*members] == ["cron"] else members for members in map(_unusual, schedules)]
    return found[0] if len(found) == 1 else found


def flow_to_json(flow: Flow) -> Dict[str, Any]:
    """Return `flow` as the JSON value of a flow file, with defaults spread over the tasks."""
    members = _unusual(flow)
    if flow.params is not None:
        members["params"] = {name: _unusual(param) or {"required": False}
                             for name, param in flow.params.items()}
    if flow.schedule:
        members["schedule"] = schedules_to_json(flow.schedule)
    for task in flow.tasks:
        if task.handler:
            fields = task_to_json(task)
            for name in ("depends_on", "trigger_rule", "handler"):
                fields.pop(name, None)
            members[task.handler] = fields
    return {"name": flow.name, **members,
            "tasks": [task_to_json(task) for task in flow.tasks if not task.handler]}


def recorded_flow(value: Mapping[str, Any]) -> Flow:
    """Return the Flow that flow_to_json wrote down; nothing is checked again."""
    simple = {name: _frozen(value[name]) for name in Flow._fields
              if name in value and name not in _MADE_MEMBERS}
    params = _make_params(value.get("params"), [])
    handlers = {name: make_task(value[name]) for name in HANDLERS if name in value}
    return Flow(tasks=add_handlers(list(map(make_task, value["tasks"])), handlers), params=params,
                schedule=make_schedules(value["schedule"]) if "schedule" in value else (), **simple)


# ============================================================================
# == 8. PYTHON FRONT END: how do functions become a flow?
# ============================================================================
# @task makes a FunctionTask of a function: it holds the same Task that a flow file would give, and the tasks
# that >> put before it.  make_flow() takes tasks that hang together and returns a checked Flow; from there on
# nobody knows which front end it came from.  The functions themselves are no part of the Flow, which has
# their names only, so that it can be written down and compared.

#: Begins the name of the module that a flow in Python becomes, which so hides no other module.
FLOW_MODULE = "miniflow_flow_"


def class_name(cls: type) -> str:
    """Return the name by which retry_on knows a class of exceptions: module.Name, for builtins Name."""
    module = "miniflow" if cls.__module__ == __name__ else cls.__module__
    return cls.__qualname__ if module == "builtins" else f"{module}.{cls.__qualname__}"


def _retry_names(retry_on: Any) -> Optional[Tuple[str, ...]]:
    """Return `retry_on` as names: a class of exceptions or "timeout", or several of them."""
    if retry_on is None:
        return None
    names = []
    for item in retry_on if isinstance(retry_on, (list, tuple, set, frozenset)) else (retry_on,):
        if isinstance(item, type) and issubclass(item, BaseException):
            names.append(class_name(item))
        elif item == "timeout":
            names.append(item)
        else:
            raise ValueError(f"retry_on: expected classes of exceptions or \"timeout\", got {item!r}")
    return tuple(names)


def _plain(function: Any) -> Any:
    """Return the function within a functools.partial, or one within the other."""
    while hasattr(function, "func"):
        function = function.func
    return function


def _is_async(function: Callable[..., Any]) -> bool:
    """Tell whether calling `function` gives a coroutine; raise ValueError if it doesn't take one argument."""
    import inspect
    code: Any = getattr(function, "__code__", None)
    if type(function) is type(_plain) and not function.__dict__ and not code.co_kwonlyargcount \
            and code.co_argcount == 1:
        return bool(code.co_flags & inspect.CO_COROUTINE)     # a signature takes twenty times as long
    call = _plain(function)
    try:
        inspect.signature(function).bind({})
    except TypeError as exc:
        raise ValueError(f"it is called with one argument, its context, but takes others: {exc}") from None
    except ValueError:
        pass                                    # a builtin that does not tell
    return inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(type(call).__call__)


def _function_kind(function: Callable[..., Any], process: bool) -> str:
    """Return where `function` is to run; raise ValueError if it can't."""
    import inspect
    is_async = _is_async(function)
    if is_async and process:
        raise ValueError("process=True: an async function runs on the event loop; make it a plain one")
    name = getattr(function, "__qualname__", "<partial>")
    if process and inspect.ismethod(function) and not isinstance(function.__self__, type):
        raise ValueError("process=True: a method would need its object, which can't be sent to another "
                         "process; use a function")
    if process and ("<" in name or not getattr(function, "__module__", None)):
        raise ValueError(f"process=True: another process finds a function by its name in its module, and "
                         f"{name} can't be found that way; define it at the top level of a module")
    return "async" if is_async else "process" if process else "thread"


def each_task(tasks: Any) -> List[Any]:
    """Return a task, or each of several; raise TypeError for anything else."""
    found = list(tasks) if isinstance(tasks, (list, tuple)) else [tasks]
    for item in found:
        if not hasattr(item, "upstream"):
            raise TypeError(f"expected a task or a list of tasks, got {item!r}; "
                            "decorate the function with @task")
    return found


class FunctionTask:
    """A task made of a Python function by @task; called, it is that function."""

    def __init__(self, function: Callable[..., Any], task: Task) -> None:
        self.function, self.task = function, task
        self.upstream: Dict[FunctionTask, None] = {}
        self.__doc__ = function.__doc__
        self.__wrapped__ = function
        self.__name__ = task.id

    @property
    def name(self) -> str:
        """The task's name, unique in a workflow."""
        return self.task.id

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.function(*args, **options)

    def __repr__(self) -> str:
        return f"<task {self.name}>"

    def __rshift__(self, downstream: Any) -> Any:
        """a >> b, a >> [b, c]: they wait for a; returns what stands on the right."""
        for task in each_task(downstream):
            task.upstream[self] = None
        return downstream

    def __lshift__(self, upstream: Any) -> Any:
        """b << a, b << [a, c]: b waits for them; returns what stands on the right."""
        for task in each_task(upstream):
            self.upstream[task] = None
        return upstream

    def __rrshift__(self, upstream: Any) -> FunctionTask:
        """[a, b] >> c: c waits for all of them."""
        self.__lshift__(upstream)
        return self

    def __rlshift__(self, downstream: Any) -> FunctionTask:
        """[b, c] << a: they wait for a."""
        self.__rshift__(downstream)
        return self


_TASK_SCHEMAS = {field.name: field.schema for field in TASK_FIELDS}


def _make_function_task(function: Callable[..., Any], name: Optional[str], retry_on: Any, process: bool,
                        options: Dict[str, Any]) -> FunctionTask:
    """Make a FunctionTask; raise FlowError with all that is wrong with it."""
    fields = {"id": name if name is not None else getattr(function, "__name__", "<no name>"), **options}
    problems: List[Problem] = []
    for field, value in fields.items():
        shape = list(value) if isinstance(value, tuple) else value
        check_schema(_TASK_SCHEMAS[field], shape, (field,), problems)
    lines = [f"{format_path(problem.path)}: {problem.what}" for problem in problems]
    kind, names = "thread", None
    try:
        kind = _function_kind(function, process)
        names = _retry_names(retry_on)
    except ValueError as exc:
        lines.append(str(exc))
    if lines:
        where = f"{getattr(function, '__module__', '?')}:{getattr(function, '__qualname__', function)!s}"
        raise FlowError(f"task {where}: {line}" for line in lines)
    plain = _plain(function)
    module = getattr(plain, "__module__", None) or "?"
    module = module[len(FLOW_MODULE):] if module.startswith(FLOW_MODULE) else module
    full_name = f"{module}:{getattr(plain, '__qualname__', type(plain).__qualname__)}"
    if names is not None:
        fields["retry_on"] = names
    return FunctionTask(function, make_task({**fields, "function": full_name, "kind": kind}))


_TASK_OPTIONS = frozenset(["name", "retry_on", "process", "max_retries", "backoff_s", "max_backoff_s",
                           "jitter", "timeout_s", "grace_s", "tags", "description", "trigger_rule",
                           "allow_failure", "pool", "priority"])


if TYPE_CHECKING:
    @overload
    def task(function: Callable[..., Any]) -> FunctionTask:
        """@task: with the options at their defaults."""

    @overload
    def task(function: None = None, *, name: Optional[str] = None, max_retries: int = 0, backoff_s: float = 0,
             max_backoff_s: float = 3600, jitter: float = 0, retry_on: Any = None,
             timeout_s: Optional[float] = None,
             grace_s: float = 5, tags: Sequence[str] = (), description: Optional[str] = None,
             trigger_rule: str = "all_success", allow_failure: bool = False, pool: Optional[str] = None,
             priority: int = 0, process: bool = False) -> Callable[[Callable[..., Any]], FunctionTask]:
        """@task(…): with options."""


def task(function: Optional[Callable[..., Any]] = None, *, name: Optional[str] = None, retry_on: Any = None,
         process: bool = False, **options: Any) -> Any:
    """Make a task of a function, which is called with the task's context, a dict: @task or @task(…).

    The options are those of a task in a flow file.  `name` is by default that of the function, `description`
    the first line of its docstring; `retry_on` takes classes of exceptions and "timeout"; `process` runs a
    plain function in a process of its own.  Raises FlowError for what makes no sense.
    """
    def make(function: Callable[..., Any]) -> FunctionTask:
        if not callable(function):
            raise TypeError(f"@task: expected a function, got {function!r}")
        given = {field: value for field, value in options.items() if value is not None}
        if "description" not in given:
            given["description"] = (function.__doc__ or "").strip().partition("\n")[0]
        return _make_function_task(function, name, retry_on, process, given)

    unknown = sorted(options.keys() - _TASK_OPTIONS)
    if unknown:
        raise TypeError(f"@task has no option {unknown[0]}{near(unknown[0], _TASK_OPTIONS)}")
    return make if function is None else make(function)


def make_flow(name: str, tasks: Sequence[FunctionTask], **fields: Any) -> Flow:
    """Return the checked Flow of `tasks`; raise FlowError with all that is wrong.

    `fields` are those of a Flow: description, version, tags, max_parallel, pools, fail_fast, schedule.
    """
    ours, problems = set(tasks), []
    for item in tasks:
        for up in item.upstream:
            if up not in ours:
                problems.append(f"workflow {name}: task {item.name} waits for {up.name}, "
                                "which is not among the workflow's tasks; add it to them")
    schemas = {field.name: field.schema for field in FLOW_FIELDS}
    found: List[Problem] = [] if tasks else [Problem(("tasks",), "there are none; give at least one")]
    for field, value in {"name": name, **fields}.items():
        if value is not None:
            check_schema(schemas[field], list(value) if isinstance(value, tuple) else value, (field,), found)
    members = {field: _frozen(value) for field, value in fields.items() if value is not None}
    upstream = [tuple(up.name for up in item.upstream if up in ours) for item in tasks]
    if "schedule" in members:
        members["schedule"] = make_schedules(members["schedule"]) if not found else ()
    flow = Flow(name, tuple(item.task._replace(depends_on=names) if names else item.task
                            for item, names in zip(tasks, upstream)), **members)
    if not found:
        found += check_flow(flow)
    problems += [f"workflow {name}: {format_path(problem.path)}: {problem.what}" for problem in found]
    if problems:
        raise FlowError(problems)
    return flow


# ============================================================================
# == 9. PLAN: in which order will what happen?
# ============================================================================
# A Plan is worked out once, before anything starts, and never changes.  What is left out of a partial run
# stays in it as satisfied, with the outputs of its last success, so that nothing downstream needs to know.
#
# Two orders live here.  The topological one, with ties by declaration, says whose outputs win when they are
# merged; it depends on the flow alone.  The key says who starts first among ready tasks: priority, then the
# longest path of work from the task on, then declaration.  Both are the same on every machine.  The key is a
# task's place in that order: comparing the three themselves is what a heap of 100,000 would spend its time
# on.
#
# Work is what tasks took when they last succeeded, in powers of two of an eighth of a second: what chance
# makes of a duration then seldom changes the order, and whole numbers add up alike everywhere.  Simulated,
# exact durations gave hardly better runs.  A task that is not known counts as the median of those that are.

class Selection(NamedTuple):
    """Which part of a flow runs; where several are given, a task has to be in each."""

    only: Tuple[str, ...] = ()
    from_: Tuple[str, ...] = ()
    until: Tuple[str, ...] = ()
    skip: Tuple[str, ...] = ()
    tags: Tuple[str, ...] = ()


class Plan(NamedTuple):
    """What a run of `flow` will do.

    `order` is topological with ties by declaration, `rank` its inverse, and `key` the place of a task among
    ready ones; `left_out` maps tasks that are not run to the outputs they count with.  `durations` are those
    that the key was made by, as far as they are known, and those of instances.
    """

    flow: Flow
    tasks: Mapping[str, Task]
    order: Tuple[str, ...]
    rank: Mapping[str, int]
    downstream: Mapping[str, Sequence[str]]
    key: Mapping[str, int]
    left_out: Mapping[str, Mapping[str, Any]]
    durations: Mapping[str, float] = {}


def _reach(starts: Iterable[str], edges: Mapping[str, Sequence[str]]) -> Set[str]:
    """Return `starts` and all that can be reached from them along `edges`."""
    reached = set(starts)
    todo = list(reached)
    while todo:
        for name in edges[todo.pop()]:
            if name not in reached:
                reached.add(name)
                todo.append(name)
    return reached


def _downstream(tasks: Mapping[str, Task]) -> Dict[str, Sequence[str]]:
    """Return for each task the tasks that wait for it, in the order of declaration."""
    found: Dict[str, List[str]] = {}
    for task in tasks.values():
        for name in task.depends_on:
            found.setdefault(name, []).append(task.id)
    return {name: found.get(name, ()) for name in tasks}


def select(flow: Flow, selection: Selection) -> Set[str]:
    """Return the ids of the tasks that `selection` leaves out; raise NotFound for a task or tag not there."""
    if not any(selection):
        return set()
    tasks = {task.id: task for task in flow.tasks}
    for name in selection.only + selection.from_ + selection.until + selection.skip:
        if name not in tasks:
            raise NotFound(f"flow {flow.name} has no task {shown(name)}{near(name, tasks)}")
    every_tag = {tag for task in flow.tasks for tag in task.tags}
    for tag in selection.tags:
        if tag not in every_tag:
            raise NotFound(f"flow {flow.name} has no task with the tag {shown(tag)}{near(tag, every_tag)}")
    upstream = {task.id: task.depends_on for task in flow.tasks}
    tagged = [task.id for task in flow.tasks if set(task.tags) & set(selection.tags)]
    kept = set(tasks)
    alone: Dict[str, Sequence[str]] = {name: () for name in tasks}
    ways: Tuple[Tuple[Iterable[str], Mapping[str, Sequence[str]]], ...] = (
        (selection.only, alone), (selection.from_, _downstream(tasks)),
        (selection.until, upstream), (tagged, upstream))
    for starts, edges in ways:
        if starts:
            kept &= _reach(starts, edges)
    kept -= {task.id for task in flow.tasks if task.handler}
    kept -= set(selection.skip)
    if not kept:
        raise UsageError(f"flow {flow.name}: this selection leaves no task to run; give a wider one")
    return set(tasks) - kept - {task.id for task in flow.tasks
                                if task.handler and task.id not in selection.skip}


def _weights(tasks: Iterable[str], left_out: Collection[str], durations: Mapping[str, float],
             ) -> Dict[str, int]:
    """Return how much work each task is: eighths of a second, rounded to a power of two; none if left out."""
    known = {name: 1 << max(0, int(seconds * 8 * 2 ** 0.5).bit_length() - 1)
             for name, seconds in durations.items()}
    usual = sorted(known.values())[len(known) // 2] if known else 1
    return {name: 0 if name in left_out else known.get(name, usual) for name in tasks}


def make_plan(flow: Flow, left_out: Mapping[str, Mapping[str, Any]] = {},
              durations: Mapping[str, float] = {}) -> Plan:
    """Order a checked flow.  `durations`, in seconds, say how long a path of work is; some may be unknown."""
    tasks = {task.id: task for task in flow.tasks}
    order = tuple(topological_order({task.id: task.depends_on for task in flow.tasks}))
    assert len(order) == len(tasks), "the flow was not checked"
    downstream = _downstream(tasks)
    work = _weights(tasks, left_out, {name: durations[name] for name in order if name in durations})
    for name in reversed(order):
        work[name] += max((work[below] for below in downstream[name]), default=0)
    first = sorted(tasks, key=lambda name: (-tasks[name].priority, -work[name]))
    key, rank = ({name: n for n, name in enumerate(names)} for names in (first, order))
    known = {name: seconds for name, seconds in durations.items()
             if name in tasks or name.rpartition("[")[0] in tasks}
    return Plan(flow, tasks, order, rank, downstream, key, left_out, known)


# ============================================================================
# == 10. EVENTS AND RUN: what has happened, and what does it add up to?
# ============================================================================
# An Event is a fact with the time it became one (seconds since 1970).  A Run is the fold of its events:
# apply() is the only way to change it, and costs the same however many tasks there are.
#
# What a task sees is decided by its upstream alone.  A Scope says, for each key, which ancestor wrote it last
# in topological order.  Scopes are shared as long as nothing new is written, so a chain of thousands of tasks
# without outputs has one Scope, and values are never copied into it.
#
# A task with foreach or matrix becomes a group: its instances are tasks like others, which came to be by an
# event, and it ends as part of what the last of them does.

class AttemptStarted(NamedTuple):
    """An attempt is about to start; `inputs` names the task that each key it reads comes from."""

    at: float
    task: str
    attempt: int
    log: Optional[str] = None
    inputs: Mapping[str, str] = {}


class AttemptSpawned(NamedTuple):
    """The attempt is process `pid`, which the system started at `ticks` (field 22 of /proc/PID/stat).

    `forked` tells that a template interpreter was forked for it, so that it did not have to start Python.
    """

    at: float
    task: str
    attempt: int
    pid: int
    ticks: Optional[int] = None
    forked: bool = False


class AttemptSubmitted(NamedTuple):
    """The attempt is a job of a cluster, which may have to wait there before it begins."""

    at: float
    task: str
    attempt: int
    job: str


class AttemptDeferred(NamedTuple):
    """The attempt could not start for want of the engine's own means; it counts for nothing."""

    at: float
    task: str
    attempt: int
    reason: str


class AttemptStopping(NamedTuple):
    """The attempt is being ended by `signal` (TERM or KILL) because of `reason`."""

    at: float
    task: str
    attempt: int
    reason: str
    signal: str = "TERM"


class AttemptEnded(NamedTuple):
    """The attempt is over.

    `code` is what retry_on is held against; after a `final` failure a retry is pointless.  `unsaved` names
    what a Python task handed on beside `output` and JSON can't hold, with its type; `inputs` what it read.
    """

    at: float
    task: str
    attempt: int
    status: str
    reason: Optional[str] = None
    code: Union[int, str, None] = None
    output: Optional[Mapping[str, Any]] = None
    error: Optional[str] = None
    final: bool = False
    unsaved: Mapping[str, str] = {}
    inputs: Optional[Mapping[str, str]] = None


class TaskAdmitted(NamedTuple):
    """Nothing speaks against the task: it is to run as soon as there is room."""

    at: float
    task: str


class TaskReading(NamedTuple):
    """Its inputs are being read, which takes a while; what becomes of the task shows afterwards."""

    at: float
    task: str


class TaskExpanded(NamedTuple):
    """Nothing speaks against the task: there is to be an instance of it for each entry of `each`."""

    at: float
    task: str
    each: Sequence[Mapping[str, Any]]


class TaskSettled(NamedTuple):
    """The task has ended without an attempt of its own."""

    at: float
    task: str
    status: str
    reason: Optional[str] = None
    output: Optional[Mapping[str, Any]] = None


class CancelRequested(NamedTuple):
    """Somebody wants the run to end; with `kill` at once.  `exit_code` is what the engine then exits with."""

    at: float
    reason: str
    exit_code: int = 143
    kill: bool = False
    expired: bool = False                      # it was nobody: the run has taken too long


class RunFinished(NamedTuple):
    """Every task has settled and the run has ended as `status`."""

    at: float
    status: str
    reason: Optional[str] = None


if TYPE_CHECKING:
    Event = Union[AttemptStarted, AttemptSpawned, AttemptSubmitted, AttemptDeferred, AttemptStopping,
                  AttemptEnded, TaskAdmitted, TaskReading, TaskExpanded, TaskSettled, CancelRequested,
                  RunFinished]

#: The words by which events are known on disk and in --output json: never renamed.
EVENTS: Dict[str, Type[Any]] = {
    "attempt_started": AttemptStarted, "attempt_spawned": AttemptSpawned,
    "attempt_submitted": AttemptSubmitted, "attempt_deferred": AttemptDeferred,
    "attempt_stopping": AttemptStopping,
    "attempt_ended": AttemptEnded, "task_admitted": TaskAdmitted, "task_reading": TaskReading,
    "task_expanded": TaskExpanded, "task_settled": TaskSettled,
    "cancel_requested": CancelRequested,
    "run_finished": RunFinished,
}
EVENT_WORDS = {kind: word for word, kind in EVENTS.items()}
#: The defaults of each kind's fields; EVENTS, which no field holds, stands for none.
_USUAL = {kind: [kind._field_defaults.get(name, EVENTS) for name in kind._fields] for kind in EVENT_WORDS}


class Lineage:
    """Which ancestors handed something on: the rank of one of them, or none, and those before it."""

    __slots__ = ("bases", "rank")

    def __init__(self, bases: Tuple[Lineage, ...] = (), rank: Optional[int] = None) -> None:
        self.bases, self.rank = bases, rank

    def ranks(self) -> List[int]:
        """Return the ranks of all ancestors with outputs, ascending; walks them all."""
        seen, todo, found = {id(self)}, [self], []
        while todo:
            lineage = todo.pop()
            if lineage.rank is not None:
                found.append(lineage.rank)
            for base in lineage.bases:
                if id(base) not in seen:
                    seen.add(id(base))
                    todo.append(base)
        return sorted(found)


def is_flat(values: Mapping[str, Any]) -> bool:
    """Tell whether none of the values of a JSON object is a list or an object itself."""
    for value in values.values():
        if isinstance(value, (list, dict)):
            return False
    return True


class Scope(NamedTuple):
    """What a task may read: for each key the rank of its last writer, and its value.

    `unsaved` has the keys whose value JSON can't hold: it is in the memory of the engine alone.  Where no
    value is a list or a dict (`flat`), a copy of `values` shares nothing with it that could be changed.
    """

    lineage: Lineage
    writers: Mapping[str, int]
    values: Mapping[str, Any]
    unsaved: FrozenSet[str] = frozenset()
    flat: bool = True

    def extended(self, rank: int, output: Mapping[str, Any], unsaved: Iterable[str]) -> Scope:
        """Return the scope of those downstream of the task with `rank` that may read this one."""
        values, lost = {**self.values, **output}, frozenset(unsaved)
        for key in lost - output.keys():
            values.pop(key, None)
        writers = {**self.writers, **dict.fromkeys([*output, *lost], rank)}
        return Scope(Lineage((self.lineage,), rank), writers, values, (self.unsaved - output.keys()) | lost,
                     self.flat and is_flat(output))


NO_SCOPE = Scope(Lineage(), {}, {})


def join_scopes(scopes: Sequence[Scope]) -> Scope:
    """Return the scope of a task downstream of distinct `scopes`: the highest rank wins each key."""
    if len(scopes) < 2:
        return scopes[0] if scopes else NO_SCOPE
    writers, values, unsaved = dict(scopes[0].writers), dict(scopes[0].values), set(scopes[0].unsaved)
    for scope in scopes[1:]:
        for key, rank in scope.writers.items():
            if rank > writers.get(key, -1):
                writers[key] = rank
                unsaved.discard(key)
                unsaved |= scope.unsaved & {key}
                values.pop(key, None)
                if key in scope.values:
                    values[key] = scope.values[key]
    return Scope(Lineage(tuple(scope.lineage for scope in scopes)), writers, values, frozenset(unsaved),
                 all(scope.flat for scope in scopes))


class Attempt:
    """One try of a task in a run."""

    __slots__ = ("status", "reason", "started", "finished", "error", "log", "pid", "ticks", "forked", "job")

    def __init__(self, started: float, log: Optional[str] = None) -> None:
        self.status, self.started, self.log = RUNNING, started, log
        self.finished: Optional[float] = None
        self.reason: Optional[str] = None
        self.error: Optional[str] = None
        self.pid: Optional[int] = None
        self.ticks: Optional[int] = None
        self.forked = False
        self.job: Optional[str] = None          # of a cluster


class TaskRun:
    """Where one task stands within one run."""

    __slots__ = ("status", "reason", "attempt", "started", "finished", "inputs", "output", "error",
                 "attempts", "first_attempt", "retry_at", "stopping", "killed", "scope",
                 "unsaved", "deadline", "each")

    each: Optional[Mapping[str, Any]]           # of an instance: what it has for item or matrix

    def __init__(self) -> None:
        self.status = PENDING
        self.reason: Optional[str] = None
        self.attempt = 0                        # the number of the latest attempt
        self.first_attempt = 1                  # the one from which retries are counted; resume moves it on
        self.started: Optional[float] = None
        self.finished: Optional[float] = None
        self.inputs: Mapping[str, str] = {}
        self.output: Optional[Mapping[str, Any]] = None
        self.unsaved: Mapping[str, str] = {}    # keys handed on that JSON can't hold, with their types
        self.error: Optional[str] = None
        self.attempts: List[Attempt] = []
        self.retry_at: Optional[float] = None
        self.stopping: Optional[str] = None     # why the running attempt is being ended
        self.killed = False                     # it was sent SIGKILL
        self.deadline: Optional[float] = None   # when the running attempt's time is over
        self.scope = NO_SCOPE                   # what it may read, once its upstream has settled
        self.each = None

    def go_on(self, old: TaskRun) -> None:
        """Keep the attempts of `old`, and begin anew with counting retries."""
        self.attempts, self.attempt, self.first_attempt = old.attempts, old.attempt, old.attempt + 1

    @property
    def is_touched(self) -> bool:
        """False as long as nothing has happened to the task: all such are alike."""
        return self.status != PENDING or bool(self.attempts) or self.each is not None


class Scopes:
    """What settled tasks have opened to those downstream; nothing is kept that all of them have taken."""

    _KEPT = 16                                  # joins that are kept for tasks with the same upstream

    def __init__(self, plan: Plan) -> None:
        self._rank = plan.rank
        self._open: Dict[str, Scope] = {}
        self._untaken = {name: len(below) for name, below in plan.downstream.items()}
        self._joins: Dict[Tuple[int, ...], Tuple[List[Scope], Scope]] = {}

    def give(self, name: str, scope: Scope, task_run: TaskRun) -> None:
        """Open to its downstream what task `name` may read and what it hands on."""
        if self._untaken[name]:
            if task_run.output or task_run.unsaved:
                scope = scope.extended(self._rank[name], task_run.output or {}, task_run.unsaved)
            self._open[name] = scope

    def take(self, task: Task) -> Scope:
        """Return what `task` may read."""
        distinct = {id(scope): scope for scope in (self._open.get(up, NO_SCOPE) for up in task.depends_on)
                    if scope is not NO_SCOPE}
        for up in task.depends_on:
            self._untaken[up] -= 1
            if not self._untaken[up]:
                self._open.pop(up, None)
        if len(distinct) < 2:
            return next(iter(distinct.values()), NO_SCOPE)
        ids = tuple(distinct)
        if ids not in self._joins:
            scopes = list(distinct.values())    # kept beside the join, so that their ids stay theirs
            self._joins[ids] = scopes, join_scopes(scopes)
            if len(self._joins) > self._KEPT:
                del self._joins[next(iter(self._joins))]
        return self._joins[ids][1]


#: The pool of plain functions that have none of their own; no pool of a flow can have this name.
PLAIN_FUNCTIONS = "(plain functions)"
#: Among the limits of a task: its process here, if any, only waits, and takes up none of the run's slots.
WAITING = "(waiting)"
#: The pool of all tasks that run as jobs of a cluster.
JOBS = "(jobs)"


class Queues:
    """Which tasks are ready, in a heap for each set of limits, and how many run under each limit.

    A limit is a pool, or what the instances of one task have in common; a task is under none, one or two.
    """

    def __init__(self, plan: Plan) -> None:
        self._key: Dict[str, float] = {}       # of instances, between that of their task and the next
        self._plan = plan
        self._limits: Dict[str, Tuple[str, ...]] = {
            task.id: (task.pool or PLAIN_FUNCTIONS,) for task in plan.flow.tasks
            if task.pool or isinstance(task.action, Function) and task.action.kind != "async"}
        for task in plan.flow.tasks:
            elsewhere = executor_of(plan.flow, task) != LOCAL
            if isinstance(task.action, WaitFor) or elsewhere:
                self._limits[task.id] = (*self.limits_of(task.id), WAITING, *([JOBS] if elsewhere else []))
        self.some_wait = any(WAITING in limits for limits in self._limits.values())
        self.limits: Dict[str, int] = dict(plan.flow.pools)
        self.ready: Dict[Tuple[str, ...], List[Tuple[float, str]]] = {}
        self._running: Dict[str, int] = {}

    def add_instances(self, task: Task, names: Sequence[str]) -> None:
        """Task `task` has instances: they come when it would, in their order, so many at once as it says."""
        limits = self.limits_of(task.id)
        if task.max_parallel is not None:
            limits += (f"{task.id}[]",)
            self.limits[limits[-1]] = task.max_parallel
        for n, name in enumerate(names):
            self._key[name] = self._plan.key[task.id] + n / len(names)
            self._limits[name] = limits

    def limits_of(self, name: str) -> Tuple[str, ...]:
        """Return the limits that task `name` is under."""
        return self._limits.get(name, ())

    def key(self, name: str) -> float:
        """Return the place of task `name` among all that are ready."""
        return self._plan.key[name] if name in self._plan.key else self._key[name]

    def push(self, name: str) -> None:
        """Task `name` is ready."""
        heapq.heappush(self.ready.setdefault(self.limits_of(name), []), (self.key(name), name))

    def drop(self, is_ready: Callable[[str], bool]) -> None:
        """Take from the tops of the heaps what is not ready any more."""
        for heap in self.ready.values():
            while heap and not is_ready(heap[0][1]):
                heapq.heappop(heap)

    def enter(self, name: str) -> None:
        """Task `name` runs now."""
        for limit in self.limits_of(name):
            self._running[limit] = self._running.get(limit, 0) + 1

    def leave(self, name: str) -> None:
        """Task `name` does not run any more."""
        for limit in self.limits_of(name):
            self._running[limit] -= 1

    @property
    def waiting(self) -> int:
        """How many run that take up no slot."""
        return self._running.get(WAITING, 0)

    def room(self, limits: Tuple[str, ...], taken: Mapping[str, int] = {}) -> bool:
        """Tell whether one more task may run under `limits`, beside what runs and has been `taken`."""
        return all(self._running.get(limit, 0) + taken.get(limit, 0) < self.limits[limit]
                   for limit in limits if limit in self.limits)


def log_name(run_id: str, task_id: str, attempt: int) -> str:
    """Return where the log of an attempt lies, relative to the output directory."""
    return f"logs/{run_id}/{task_id}.{attempt}.log"


def judge(task: Task, kinds: Sequence[str]) -> Tuple[str, str]:
    """Return what becomes of `task`, by its rule and how its upstream counts: RUNNING or an end, and why."""
    if not kinds:
        return RUNNING, ""
    rule = HANDLERS[task.handler] if task.handler else TRIGGER_RULES[task.trigger_rule]
    end = rule(Counts(*map(kinds.count, (SUCCESS, SKIPPED, FAILED))))
    if end == RUNNING:
        return end, ""
    if task.handler:
        return end, "no task failed" if task.handler == "on_failure" else "a task failed"
    kind = FAILED if end == UPSTREAM_FAILED else SKIPPED
    culprit = next((name for name, k in zip(task.depends_on, kinds) if k == kind), None)
    if culprit and task.trigger_rule not in ("all_failed", "one_failed"):
        return end, f"upstream {culprit} {'failed' if kind == FAILED else 'was skipped'}"
    return end, f"trigger rule {task.trigger_rule} does not hold"


def judge_group(ends: Mapping[str, str]) -> Tuple[str, str]:
    """Return the end of a task whose instances have ended so, and why."""
    end = next((end for end in (CANCELLED, FAILED) if end in ends.values()), SUCCESS)
    bad = [name for name, status in ends.items() if status == end != SUCCESS]
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return end, f"{len(bad)} of {len(ends)} {end}: {', '.join(bad[:3])}{more}" if bad else ""


#: So long an attempt waits that the system had no means for, in seconds.
PRESSURE_S = 1.0

def _sort_instances(plan: Plan, tasks: Mapping[str, TaskRun]
                    ) -> Tuple[Dict[str, TaskRun], Dict[str, List[str]]]:
    """Return the instances of earlier arrays, and by their task the names of those that are there."""
    earlier, there = {}, {}    # type: Dict[str, TaskRun], Dict[str, List[str]]
    for name, task_run in tasks.items():
        if name not in plan.tasks:
            if task_run.each is None:
                earlier[name] = task_run
            else:
                there.setdefault(name[:name.rindex("[")], []).append(name)
    return earlier, there


#: What each event changes in a run.
_APPLY: Dict[Type[Any], Callable[[Any, Any], None]] = {}


def _applies(event: Type[Any]) -> Callable[[Any], Any]:
    """Enter a function that takes an event of that type into a run."""
    def enter(handler: Any) -> Any:
        _APPLY[event] = handler
        return handler
    return enter


class Run:
    """All that is known of one run of a plan; it changes through apply() alone.

    The sets and heaps below `tasks` are the frontier: what due() looks at instead of looking at every task.
    """

    def __init__(self, plan: Plan, id: str, params: Optional[Mapping[str, Any]] = None, started: float = 0,
                 flow: str = "", source: str = "", tasks: Optional[Dict[str, TaskRun]] = None) -> None:
        self.plan, self.id, self.params, self.started = plan, id, dict(params or {}), started
        self.parent: Optional[Mapping[str, str]] = None                # run and task that it is a part of
        self.flow, self.source = flow or plan.flow.name, source
        self.scheduled_time = started
        self.finished: Optional[float] = None
        self.outcome: Optional[str] = None
        self.reason: Optional[str] = None
        self.cancel: Optional[CancelRequested] = None
        self.first_failure: Optional[str] = None
        self.warnings = 0
        self.earlier, found = _sort_instances(plan, tasks or {})
        self.tasks: Dict[str, TaskRun] = {name: tasks[name] if tasks else TaskRun() for name in plan.order}
        for names in found.values():
            self.tasks.update((name, tasks[name]) for name in names if tasks)
        self.defs = dict(plan.tasks)           # of the instances, too
        self.groups: Dict[str, List[str]] = {} # task to its instances
        self.group_of: Dict[str, str] = {}     # instance to its task
        self.unsettled = len(self.tasks)
        self.waits: Dict[str, int] = {}                                # task to its unsettled upstream count
        self.queues = Queues(plan)
        self.barred: Dict[str, Tuple[str, str]] = {}                   # task to the end that its rule demands
        self.asking: Dict[str, None] = {}      # tasks that may run if what else they ask for is so
        self.running: Dict[str, None] = {}
        self.retries: List[Tuple[float, str, int]] = []                # heap of (time, task, failed attempt)
        self.deadlines: List[Tuple[float, str, int, str]] = []         # heap of (time, task, attempt, signal)
        self.stopping = self.killed = 0
        self.expires: Optional[float] = None   # when it will have taken too long
        self.secrets: Tuple[str, ...] = ()     # texts that are stored as ***
        self.room: Optional[int] = None                      # attempts at once that the system has means for
        self._scopes = Scopes(plan)
        for name in plan.order:
            self._survey(name, found.get(name, ()))

    def _survey(self, name: str, names: Sequence[str]) -> None:
        """Find the place of a task with such instances in the frontier; its upstream has been surveyed."""
        task, task_run = self.plan.tasks[name], self.tasks[name]
        self.waits[name] = sum(self.tasks[up].status not in SETTLED for up in task.depends_on)
        if task_run.status == PENDING:
            if not self.waits[name]:
                self._reached(name)
            return
        task_run.scope = self._scopes.take(task)
        is_group = names or task.many and task_run.status == RUNNING
        if is_group:
            self._gather(name, names)
        for instance in names:
            if task_run.status not in SETTLED:
                self._resume(instance)
            else:
                self._count(instance)
        if task_run.status in SETTLED:
            self._count(name)
        elif is_group:
            self._bar_group(name)
        else:
            self._resume(name)

    def _resume(self, name: str) -> None:
        """Find the place in the frontier of a task that has been reached before."""
        task_run = self.tasks[name]
        if task_run.status in SETTLED:
            self._count(name)
        elif task_run.status == RUNNING:
            self.running[name] = None
            self.queues.enter(name)
            self.set_deadline(name, task_run.attempts[-1].started)
        elif task_run.status == RETRYING:
            heapq.heappush(self.retries, (task_run.retry_at or 0, name, task_run.attempt))
        else:
            self.ask_or_push(name)

    def _gather(self, name: str, names: Sequence[str]) -> None:
        """The instances of task `name` are `names`, which have a TaskRun each."""
        task = self.defs[name]
        self.groups[name] = list(names)
        self.queues.add_instances(task, names)
        self.waits[name] = sum(self.tasks[instance].status not in SETTLED for instance in names)
        condition = task.condition if asks_each(task) else None
        for instance in names:
            self.group_of[instance] = name
            self.defs[instance] = instance_of(task, instance, condition)
            self.tasks[instance].scope = self.tasks[name].scope

    def expand(self, name: str, each: Sequence[Mapping[str, Any]], at: float) -> None:
        """Make the instances of task `name`, one for each of `each`."""
        task_run = self.tasks[name]
        task_run.status, task_run.started = RUNNING, at
        names = [instance_id(name, n) for n in range(len(each))]
        for instance, values in zip(names, each):
            self.tasks[instance] = TaskRun()
            self.tasks[instance].each = values
            if instance in self.earlier:
                self.tasks[instance].go_on(self.earlier.pop(instance))
        self.unsettled += len(names)
        self._gather(name, names)
        for instance in names:
            self.ask_or_push(instance)
        self._bar_group(name)

    def ask_or_push(self, name: str) -> None:
        """Nothing upstream keeps task `name` from running."""
        if self.defs[name].asks:
            self.asking[name] = None
        else:
            self.queues.push(name)

    def _bar_group(self, name: str) -> None:
        """If all instances of task `name` have ended, it is to end itself, as they say."""
        if not self.waits[name]:
            self.barred[name] = judge_group({each: self.tasks[each].status for each in self.groups[name]})

    def __repr__(self) -> str:
        return f"<Run {self.id}: {self.status}>"

    @property
    def status(self) -> str:
        """One of RUN_STATES but interrupted, which only somebody else can see."""
        return self.outcome or RUNNING

    @property
    def ok(self) -> bool:
        """True if the run ended in success."""
        return self.outcome == SUCCESS

    @property
    def ctx(self) -> Dict[str, Any]:
        """The params and all outputs so far, merged in topological order."""
        merged = dict(self.params)
        for name in self.plan.order:
            output = self.tasks[name].output
            if output:
                merged.update(output)
        return merged

    def ctx_of(self, task_id: str) -> Dict[str, Any]:
        """Return a new dict of what the task may read: params and its ancestors' outputs."""
        return {**self.params, **self.tasks[task_id].scope.values}

    def outputs_of(self, scope: Scope) -> Dict[str, Mapping[str, Any]]:
        """Return the outputs of every ancestor in `scope` by its id, in topological order."""
        names = [self.plan.order[rank] for rank in scope.lineage.ranks()]
        return {name: self.tasks[name].output or {} for name in names}

    # -- changing --

    def apply(self, event: Event) -> None:
        """Take in one fact."""
        _APPLY[type(event)](self, event)
        while self.retries and self.retries[0][0] <= event.at:
            _, name, attempt = heapq.heappop(self.retries)
            if self._waits_for_retry(name, attempt):
                self.queues.push(name)
        self.queues.drop(self.is_ready)
        while self.deadlines and not self.is_pressing(self.deadlines[0]):
            heapq.heappop(self.deadlines)
        while self.retries and not self._waits_for_retry(*self.retries[0][1:]):
            heapq.heappop(self.retries)

    def is_ready(self, name: str) -> bool:
        """Tell whether an entry of `ready` still holds."""
        return self.tasks[name].status in (PENDING, RETRYING)

    def is_pressing(self, deadline: Tuple[float, str, int, str]) -> bool:
        """Tell whether an entry of `deadlines` still holds."""
        at, name, attempt, word = deadline
        task_run = self.tasks[name]
        if task_run.status != RUNNING or task_run.attempt != attempt:
            return False
        return not task_run.killed if word == "KILL" else not task_run.stopping and at == task_run.deadline

    def _waits_for_retry(self, name: str, attempt: int) -> bool:
        """Tell whether an entry of `retries` still holds."""
        return self.tasks[name].status == RETRYING and self.tasks[name].attempt == attempt

    def set_deadline(self, name: str, started: float) -> None:
        """Note when the running attempt's time is over; a job, which may wait, keeps its own time."""
        limit, task_run = self.defs[name].timeout_s, self.tasks[name]
        if limit is not None and executor_of(self.plan.flow, self.defs[name]) == LOCAL:
            task_run.deadline = round(started + limit, 6)
            heapq.heappush(self.deadlines, (task_run.deadline, name, task_run.attempt, "TERM"))

    def settle(self, name: str, status: str, at: Optional[float], reason: Optional[str],
                output: Optional[Mapping[str, Any]], error: Optional[str]) -> None:
        """Give task `name` its end, and reach those downstream for which it was the last to wait for."""
        task_run = self.tasks[name]
        task_run.status, task_run.finished, task_run.reason, task_run.error = status, at, reason, error
        task_run.output = output or None
        self._count(name)
        if name in self.group_of:
            group = self.group_of[name]
            self.waits[group] -= 1
            self._bar_group(group)
            return
        for below in self.plan.downstream[name]:
            self.waits[below] -= 1
            if not self.waits[below]:
                self._reached(below)

    def _count(self, name: str) -> None:
        """Count the end of task `name`, and open its outputs to its downstream."""
        task_run = self.tasks[name]
        self.unsettled -= 1
        if task_run.status in (FAILED, UPSTREAM_FAILED):
            if self.defs[name].allow_failure:
                self.warnings += name not in self.group_of
            elif self.first_failure is None:
                self.first_failure = name
        if name not in self.group_of:
            self._scopes.give(name, task_run.scope, task_run)
        task_run.scope = NO_SCOPE

    def _reached(self, name: str) -> None:
        """The upstream of task `name` has settled: it is ready, or its trigger rule bars it."""
        task, task_run = self.plan.tasks[name], self.tasks[name]
        scope = self._scopes.take(task)
        if task_run.status in SETTLED:
            return                              # settled before its upstream: a cancelled run
        task_run.scope = scope
        if name in self.plan.left_out:
            self.barred[name] = (SKIPPED, "left out")
            return
        end, reason = judge(task, [self.counts_as(up) for up in task.depends_on])
        if end == RUNNING:
            self.ask_or_push(name)
        else:
            self.barred[name] = (end, reason)

    def counts_as(self, name: str) -> str:
        """Return how the end of task `name` counts for downstream and verdict: success, skipped or failed."""
        status = self.tasks[name].status
        if status in (SUCCESS, CACHED) or name in self.plan.left_out:
            return SUCCESS
        if status == SKIPPED:
            return SKIPPED
        return SUCCESS if self.plan.tasks[name].allow_failure else FAILED


@_applies(AttemptStarted)
def _on_started(run: Run, event: AttemptStarted) -> None:
    task_run = run.tasks[event.task]
    assert task_run.status in (PENDING, RETRYING), event
    run.asking.pop(event.task, None)
    task_run.status, task_run.attempt = RUNNING, event.attempt
    task_run.reason = task_run.error = task_run.retry_at = None
    task_run.inputs = event.inputs
    task_run.attempts.append(Attempt(event.at, event.log))
    if task_run.started is None:
        task_run.started = event.at
    run.running[event.task] = None
    run.queues.enter(event.task)
    run.set_deadline(event.task, event.at)


@_applies(AttemptSpawned)
def _on_spawned(run: Run, event: AttemptSpawned) -> None:
    attempt = run.tasks[event.task].attempts[-1]
    attempt.pid, attempt.ticks, attempt.forked = event.pid, event.ticks, event.forked
    run.set_deadline(event.task, event.at)  # the record of the start may have waited for a disk


@_applies(AttemptSubmitted)
def _on_submitted(run: Run, event: AttemptSubmitted) -> None:
    run.tasks[event.task].attempts[-1].job = event.job


@_applies(AttemptDeferred)
def _on_deferred(run: Run, event: AttemptDeferred) -> None:
    task_run = run.tasks[event.task]
    task_run.attempts.pop()
    task_run.started = task_run.started if task_run.attempts else None
    task_run.status, task_run.attempt, task_run.reason = RETRYING, event.attempt - 1, event.reason
    task_run.retry_at = round(event.at + PRESSURE_S, 6)
    heapq.heappush(run.retries, (task_run.retry_at, event.task, task_run.attempt))
    del run.running[event.task]
    run.queues.leave(event.task)
    run.room = max(1, len(run.running))


@_applies(AttemptStopping)
def _on_stopping(run: Run, event: AttemptStopping) -> None:
    task_run, task = run.tasks[event.task], run.defs[event.task]
    if not task_run.stopping:
        task_run.stopping = event.reason
        run.stopping += 1
    if event.signal == "KILL":
        task_run.killed = True
        run.killed += 1
    else:
        heapq.heappush(run.deadlines, (event.at + task.grace_s, event.task, event.attempt, "KILL"))


@_applies(AttemptEnded)
def _on_ended(run: Run, event: AttemptEnded) -> None:
    task_run, task = run.tasks[event.task], run.defs[event.task]
    attempt = task_run.attempts[-1]
    attempt.status, attempt.reason, attempt.error = event.status, event.reason, event.error
    attempt.finished = event.at
    run.stopping -= task_run.stopping is not None
    run.killed -= task_run.killed
    task_run.stopping, task_run.killed = None, False
    del run.running[event.task]
    run.queues.leave(event.task)
    run.room = run.room and run.room + 1
    task_run.unsaved = event.unsaved
    if event.inputs is not None:
        task_run.inputs = event.inputs
    tries = task_run.attempt - task_run.first_attempt + 1
    if (event.status == FAILED and tries <= task.retry.max_retries
            and task.retry.covers(event.code, event.final)):
        task_run.status, task_run.reason, task_run.error = RETRYING, event.reason, event.error
        wait = task.retry.wait_s(tries, chance(run.id, event.task, event.attempt))
        task_run.retry_at = round(event.at + wait, 6)
        heapq.heappush(run.retries, (task_run.retry_at, event.task, event.attempt))
    else:
        run.settle(event.task, event.status, event.at, event.reason, event.output, event.error)


@_applies(TaskAdmitted)
def _on_admitted(run: Run, event: TaskAdmitted) -> None:
    run.asking.pop(event.task, None)
    run.queues.push(event.task)


@_applies(TaskReading)
def _on_reading(run: Run, event: TaskReading) -> None:
    del run.asking[event.task]                 # nobody has to ask again


@_applies(TaskExpanded)
def _on_expanded(run: Run, event: TaskExpanded) -> None:
    del run.asking[event.task]
    run.expand(event.task, event.each, event.at)


@_applies(TaskSettled)
def _on_settled(run: Run, event: TaskSettled) -> None:
    run.barred.pop(event.task, None)
    run.asking.pop(event.task, None)
    output = event.output
    if event.status == SUCCESS and event.task in run.groups:   # which holds them; the event need not
        each = [run.tasks[instance] for instance in run.groups[event.task]]
        output = {"items": [instance.output for instance in each]}
        run.tasks[event.task].unsaved = {"items": "secret"} if any(one.unsaved for one in each) else {}
    run.settle(event.task, event.status, event.at, event.reason, output, None)


@_applies(CancelRequested)
def _on_cancel(run: Run, event: CancelRequested) -> None:
    if run.cancel and not run.cancel.expired:
        run.cancel = run.cancel._replace(kill=run.cancel.kill or event.kill)
    else:                                      # the first that is somebody's
        run.cancel = event


@_applies(RunFinished)
def _on_finished(run: Run, event: RunFinished) -> None:
    run.outcome, run.reason, run.finished = event.status, event.reason, event.at


def inputs_of(run: Run, task: Task) -> Dict[str, str]:
    """Return, for each key that templates of `task` read from outputs of others, the task it comes from."""
    inputs = {}
    writers = run.tasks[task.id].scope.writers
    for path, text in templates(task):
        for ref in refs_at(path, text):
            if ref.path[0] == "tasks" and len(ref.path) > 3:
                inputs[str(ref.path[3])] = str(ref.path[1])
            elif ref.path[0] == "ctx" and ref.path[1] in writers:
                inputs[str(ref.path[1])] = run.plan.order[writers[str(ref.path[1])]]
    return inputs


# ============================================================================
# == 11. SCHEDULER: given a run and the time, what should be done now?
# ============================================================================
# due() and next_wake() are questions: they read a Run and change nothing.  drive() is the whole runner: it
# asks what is due, writes down what it is about to do, does it through a World, and otherwise waits.  It is a
# generator that yields how long to wait and is sent the events that came, so that one drive serves a loop of
# processes, an asyncio loop and a simulated world.
#
# What due() may look at is bounded by what it finds: the heap of ready tasks from its top, the deadlines and
# retries up to now, the running attempts only while a run is being cancelled.  What is in a heap may be stale
# (its task has been settled meanwhile); apply() drops such entries when they come to the top.
#
# There is no event for "its retry is due": that is a matter of the clock, and a question's answer.  apply()
# moves retries whose time has come by the time of any event, so that they queue among the ready ones by their
# key.

class Start(NamedTuple):
    """Start attempt number `attempt` of a task."""

    task: str
    attempt: int


class Stop(NamedTuple):
    """End the running attempt of a task by `signal` (TERM or KILL)."""

    task: str
    attempt: int
    reason: str
    signal: str


class Ask(NamedTuple):
    """Find out whether a task is to run that its upstream lets run."""

    task: str


class Settle(NamedTuple):
    """Give a task its end without an attempt."""

    task: str
    status: str
    reason: str


class Expire(NamedTuple):
    """The run has taken too long."""

    reason: str


class Finish(NamedTuple):
    """Give the run its end."""

    status: str
    reason: Optional[str]


if TYPE_CHECKING:
    Due = Union[Start, Stop, Ask, Settle, Expire, Finish]


def _ascending(heap: Sequence[Any]) -> Iterator[Any]:
    """Yield the entries of a heap from the least on, without changing it, at log k for the k-th."""
    front = [(heap[0], 0)] if heap else []
    while front:
        entry, at = heapq.heappop(front)
        yield entry
        for child in (2 * at + 1, 2 * at + 2):
            if child < len(heap):
                heapq.heappush(front, (heap[child], child))


def verdict(run: Run) -> Finish:
    """Return the end of a run whose tasks have all settled; it looks at all, never only at the leaves."""
    if run.cancel:
        return Finish(FAILED if run.cancel.expired else CANCELLED, run.cancel.reason)
    if run.first_failure is not None:
        return Finish(FAILED, f"{run.first_failure} {run.tasks[run.first_failure].status}")
    return Finish(SUCCESS, None)


def _settle_rest(run: Run, reason: str, spared: Collection[str]) -> List[Due]:
    """Settle every task that is not running; all in one go, so that looking at all of them happens once."""
    if run.unsettled == len(run.running):
        return []
    return [Settle(name, CANCELLED, reason) for name, task_run in run.tasks.items()
            if task_run.status in (PENDING, RETRYING) and run.defs[name].handler not in spared]


def _stop_all(run: Run, cancel: CancelRequested, spared: Collection[str]) -> List[Due]:
    """Return a Stop for every running attempt that has not been sent the signal of `cancel` yet."""
    done = run.killed if cancel.kill else run.stopping
    if done == len(run.running):
        return []
    word = "KILL" if cancel.kill else "TERM"
    return [Stop(name, run.tasks[name].attempt, cancel.reason, word) for name in run.running
            if not (run.tasks[name].killed if cancel.kill else run.tasks[name].stopping)
            and run.defs[name].handler not in spared]


def was_cancelled(run: Run) -> bool:
    """Tell whether somebody has cancelled the run; that it has taken too long is nobody's doing."""
    return run.cancel is not None and not run.cancel.expired


def _some_task_left(run: Run) -> bool:
    """Tell whether a task has not settled that is no handler: the time of the run is for these only."""
    late = [name for task in run.plan.flow.tasks[-len(HANDLERS):] if task.handler
            for name in (task.id, *run.groups.get(task.id, ()))]
    return run.unsettled > sum(run.tasks[name].status not in SETTLED for name in late)


def _spared(cancel: CancelRequested) -> Collection[str]:
    """Return the handlers that run although their run is cancelled, or has taken too long."""
    return () if cancel.kill else ("on_failure", "finally") if cancel.expired else ("finally",)


def _overdue(run: Run, now: float) -> List[Due]:
    """Return a Stop for every attempt whose time, or whose grace, is over."""
    stops: List[Due] = []
    for deadline in _ascending(run.deadlines):
        at, name, attempt, word = deadline
        if at > now:
            break
        if run.is_pressing(deadline):
            reason = run.tasks[name].stopping or f"timeout after {run.defs[name].timeout_s:g} s"
            stops.append(Stop(name, attempt, reason, word))
    return stops


#: So many attempts start in one go.  Without a limit thousands of functions may be ready at once: those that
#: have ended are taken in before more begin, so that memory is needed for what runs and not for all of them.
AT_ONCE = 500


def _starts(run: Run, now: float, free: Optional[int]) -> List[Due]:
    """Return a Start for the first `free` tasks by key: those that are ready, and retries that are due."""
    queues, late = run.queues, {}              # type: Queues, Dict[Tuple[str, ...], List[Tuple[float, str]]]
    for at, name, attempt in _ascending(run.retries):
        if at > now:
            break
        if run.tasks[name].status == RETRYING and run.tasks[name].attempt == attempt:
            late.setdefault(queues.limits_of(name), []).append((queues.key(name), name))

    def queue(limits: Tuple[str, ...]) -> Iterator[Tuple[float, str]]:
        entries = _ascending(queues.ready.get(limits, ()))
        if limits in late:
            entries = heapq.merge(entries, sorted(late[limits]))
        return (entry for entry in entries if run.is_ready(entry[1]))

    starts: List[Due] = []
    taken: Dict[str, int] = {}
    heads = [(*entry, limits, rest) for limits in {**queues.ready, **late}
             if free is None or free > 0 or WAITING in limits
             for rest in [queue(limits)] for entry in islice(rest, 1)]
    heapq.heapify(heads)
    while heads and len(starts) < AT_ONCE:
        _, name, limits, rest = heads[0]
        slots = len(starts) - taken.get(WAITING, 0)
        following = None                        # where there is no room, nothing more of its kind
        if queues.room(limits, taken) and (free is None or slots < free or WAITING in limits):
            starts.append(Start(name, run.tasks[name].attempt + 1))
            for limit in limits:
                taken[limit] = taken.get(limit, 0) + 1
            following = next(rest, None)
        if following:
            heapq.heapreplace(heads, (*following, limits, rest))
        else:
            heapq.heappop(heads)
    return starts


def free_slots(run: Run, slots: Optional[int]) -> Optional[int]:
    """Return how many more attempts may start; None: no limit."""
    limits = [limit for limit in (slots, run.room) if limit is not None]
    return min(limits) - len(run.running) + run.queues.waiting if limits else None


def due(run: Run, now: float, slots: Optional[int]) -> List[Due]:
    """Return what should be done now, with at most `slots` attempts running (None: no limit)."""
    if run.outcome:
        return []
    actions: List[Due] = []
    if run.cancel:
        spared = _spared(run.cancel)
        actions = _settle_rest(run, run.cancel.reason, spared) + _stop_all(run, run.cancel, spared)
    elif run.expires is not None and run.expires <= now and _some_task_left(run):
        return [Expire("run timeout")]
    elif run.first_failure is not None and run.plan.flow.fail_fast:
        actions = _settle_rest(run, f"fail_fast: {run.first_failure} failed", HANDLERS)
    if not actions:
        actions = [Settle(name, *end) for name, end in run.barred.items()]
    actions += _overdue(run, now)
    if not actions:
        actions = [Ask(name) for name in islice(run.asking, AT_ONCE)]
    if not actions:
        actions = _starts(run, now, free_slots(run, slots))
    if not actions and not run.unsettled:
        return [verdict(run)]
    return actions


def next_wake(run: Run, slots: Optional[int]) -> Optional[float]:
    """Return the soonest time at which due() may answer otherwise without a new event; None: never.

    A retry whose time has come and that waits for a slot is no reason to wake: the end of an attempt is.
    """
    times = [run.deadlines[0][0]] if run.deadlines else []
    if run.expires is not None and not run.cancel and _some_task_left(run):
        times.append(run.expires)
    free, queues = free_slots(run, slots), run.queues
    if free is None or free > 0 or queues.some_wait:
        times += islice((at for at, limits in ((at, queues.limits_of(name)) for at, name, _ in
                                               _ascending(run.retries))
                         if queues.room(limits) and (free is None or free > 0 or WAITING in limits)), 1)
    return min(times, default=None)


def fact(run: Run, action: Due, now: float) -> Optional[Event]:
    """Return the event that records that `action` is being taken; None for a question."""
    if isinstance(action, Ask):
        return None
    if isinstance(action, Start):
        task = run.defs[action.task]
        in_process = isinstance(task.action, Function) and task.action.kind != "process"
        log = None if in_process else log_name(run.id, action.task, action.attempt)
        return AttemptStarted(now, action.task, action.attempt, log, inputs_of(run, task))
    if isinstance(action, Stop):
        return AttemptStopping(now, action.task, action.attempt, action.reason, action.signal)
    if isinstance(action, Settle):
        return TaskSettled(now, action.task, action.status, action.reason or None,
                           run.plan.left_out.get(action.task))
    if isinstance(action, Expire):
        return CancelRequested(now, action.reason, 1, expired=True)
    return RunFinished(now, action.status, action.reason)


def drive(run: Run, world: Any, record: Callable[[List[Event], int], None], slots: Optional[int] = None,
          observe: Callable[[Event], None] = lambda event: None,
          ) -> Generator[Optional[float], List[Event], None]:
    """Drive `run` to its end.

    Yields when to wake up (None: when something happens) and is sent the new events.

    `world` has now(), and start(), stop() and ask(), which take (run, action) and return the events that came
    of it.
    `record` puts the events of one turn on disk, and is told how many of them the run has taken in already;
    only then is anything done, and `observe` told of each of them.
    """
    perform = {Start: world.start, Stop: world.stop, Ask: world.ask}
    if run.plan.flow.timeout_s is not None:     # a resumed run has it anew
        run.expires = round(world.now() + run.plan.flow.timeout_s, 6)
    events: List[Event] = []
    while run.outcome is None:
        for event in events:
            run.apply(event)                    # what has happened …
        now, happened = world.now(), len(events)
        actions = due(run, now, slots)
        events += filter(None, [fact(run, action, now) for action in actions])
        if events:
            record(events, happened)            # … is durable, with what follows of it …
        for n, event in enumerate(events):      # … then it is shown and done
            if n >= happened:
                run.apply(event)
            observe(event)
        events = [event for action in actions if type(action) in perform
                  for event in perform[type(action)](run, action)]
        if run.outcome is None:                 # wait, unless there may be more to do by now
            more = events or len(actions) == AT_ONCE or any(type(action) is not Start for action in actions)
            events += yield world.now() if more else next_wake(run, slots)


# ============================================================================
# == 12. DUE RUNS: given schedules and the time, which runs should start?
# ============================================================================
# A scheduled time starts one run, a while later if the schedule has a jitter.  The Ledger of a flow says for
# each of its schedules up to which start all has been seen to: started, skipped, or missed for good.  What
# lies between that and now is owed.  due_runs() reads it and returns what is to be started and the next
# Ledger; it is told which runs are there already, so that asking again after any crash starts nothing twice.
#
#   catchup   none     what was missed, by more than LATE_S, is dropped
#             latest   if all that is owed was missed, the last of it is started
#             all      everything that is owed is started, the oldest first
#   overlap   skip     what comes while the flow runs is dropped
#             queue    it waits for the end of that run; of several the last one does
#             allow    it is started all the same
#
# What was missed is never skipped for a run that goes on: it waits, or `all` would make up for one time of
# many.  That takes no list of times: the Ledger stays where it is.
#
# The Ledger is kept by what a schedule says, not by its place: a schedule that was changed is a new one and
# owes nothing older.  Where the clock was set back behind the Ledger, that goes back, too: runs that were
# made by the wrong clock are there and are not made again.

MAX_STARTS = 16                                # of one flow in one turn, where runs may overlap
BUSY_LOOK_S = 1                                # how often to see whether the run that others wait for is over


class Ledger(NamedTuple):
    """What has been seen to of one flow: by schedule the last start, and a scheduled time that waits."""

    seen: Mapping[str, int] = {}
    queued: Optional[int] = None


class DueRun(NamedTuple):
    """A run that is to be started: its scheduled time and its params."""

    time: int
    params: Mapping[str, Any]


class Decision(NamedTuple):
    """What to start now, the Ledger once that is done, and when to ask again (None: no time will come)."""

    starts: Tuple[DueRun, ...]
    ledger: Ledger
    wake: Optional[int]


def schedule_key(schedule: Schedule) -> str:
    """Return what a schedule is known by: the times that it names."""
    word, value = next((name, getattr(schedule, name)) for name in WHEN_FIELDS
                       if getattr(schedule, name) is not None)
    return f"{word} {value}" + (f" {schedule.timezone}" if schedule.timezone else "")


def starts(flow: str, schedule: Schedule, after: int) -> Iterator[Tuple[int, int]]:
    """Yield (start, scheduled time) in the order of the starts, those later than `after`.

    How long after its scheduled time a run starts is drawn from that and the flow, so that everybody who asks
    gets the same.
    """
    waiting: List[Tuple[int, int]] = []
    at = next_time(schedule, after - int(schedule.jitter_s) - 1)
    while waiting or at is not None:
        if at is None or waiting and waiting[0][0] <= at:
            found = heapq.heappop(waiting)
            if found[0] > after:
                yield found
        else:
            heapq.heappush(waiting, (at + int(chance(flow, at) * schedule.jitter_s), at))
            at = next_time(schedule, at)


def _latest(flow: str, schedule: Schedule, after: int, now: int) -> Iterator[Tuple[int, int]]:
    """Yield the last start that is later than `after` and not later than `now`, if there is one."""
    found, back = None, 3600                   # looked for further and further back
    while found is None:
        since = max(after, now - back)
        for start in starts(flow, schedule, since):
            if start[0] > now:
                break
            found = start
        if since == after:
            break
        back *= 4
    if found:
        yield found


def _owed(flow: str, schedule: Schedule, seen: int, now: int) -> Iterator[Tuple[int, int]]:
    """Yield (start, scheduled time) of what is owed, in order."""
    fresh = max(seen, now - LATE_S - 1)
    if schedule.catchup == "latest" and next(starts(flow, schedule, fresh), (now + 1, 0))[0] > now:
        yield from _latest(flow, schedule, seen, now)
        return
    for start in starts(flow, schedule, seen if schedule.catchup == "all" else fresh):
        if start[0] > now:
            return
        yield start


def _owner(schedules: Sequence[Schedule], at: int) -> Optional[int]:
    """Return the number of the first schedule that names a time."""
    return next((n for n, schedule in enumerate(schedules) if next_time(schedule, at - 1) == at), None)


def due_runs(flow: str, schedules: Sequence[Schedule], ledger: Ledger, now: int, is_busy: Callable[[], bool],
             is_made: Callable[[int], bool], only_queued: bool = False) -> Decision:
    """Return what to start of a flow at `now`, at most MAX_STARTS runs; `only_queued`: what has waited.

    `is_busy` tells whether a run of the flow goes on, `is_made` whether the run of a scheduled time is there.
    """
    keys = [schedule_key(schedule) for schedule in schedules]
    seen = {key: now if ledger.seen.get(key, now) > now + LATE_S else ledger.seen.get(key, now)
            for key in keys}
    due: List[DueRun] = []
    queued, waits = ledger.queued, False
    if queued is not None:
        number = _owner(schedules, queued)
        if number is None or queued > now + LATE_S or is_made(queued):
            queued = None                      # its schedule has gone, or a killed daemon started it
        elif not is_busy():
            due.append(DueRun(queued, schedules[number].params))
            queued = None
    heads: List[Tuple[bool, int, int, int, Iterator[Tuple[int, int]]]] = []

    def go_on(number: int, rest: Iterator[Tuple[int, int]]) -> None:
        for start, at in islice(rest, 1):      # what comes now goes before what was missed
            heapq.heappush(heads, (now - start > LATE_S, start, number, at, rest))

    for number, schedule in enumerate(() if only_queued else schedules):
        go_on(number, _owed(flow, schedule, seen[keys[number]], now))
    while heads and len(due) < MAX_STARTS:
        is_late, start, number, at, rest = heapq.heappop(heads)
        schedule = schedules[number]
        if _owner(schedules, at) == number and not is_made(at):
            if schedule.overlap == "allow" or not due and not is_busy():
                due.append(DueRun(at, schedule.params))
            elif is_late:
                waits = True
                continue                       # and so does all that comes after it
            elif schedule.overlap == "queue":
                queued = at
        seen[keys[number]] = start
        go_on(number, rest)
    later = [start[0] for schedule in schedules for start in islice(starts(flow, schedule, now), 1)]
    if waits or heads or queued is not None:
        later.append(now + BUSY_LOOK_S)
    return Decision(tuple(due), Ledger(seen, queued), min(later, default=None))


# ============================================================================
# == 13. STATE: how is a run written down, and read back?
# ============================================================================
# The state of a run (RUN.json) is one JSON object: a first line that says how the run stands, then its parts,
# a line for each task.  The journal (RUN.jsonl) has one event a line; its first record, `opened`, holds a
# whole state.  Both carry a sequence number, by which the newer is known, and a CRC-32 of the bytes before
# it, by which damage is.  Times are ISO 8601 in UTC with microseconds: the world's clock ticks in those, so
# that reading gives what was written.
#
# `durations` says how long each task took when it last succeeded, in this run or before it: a run begins with
# those of its flow's newest run and replaces what it finds out.  So the order of a run follows from its own
# record, also when it is gone on with years later, and a new run reads one line of one earlier run, however
# many there are and however little that one got done.
#
# A state is made in pieces of some hundred tasks, so that writing it takes no memory that grows with the run.
# What does not change while a run goes on, the text of its definition, is made once and kept.
#
# Left alone: rows put together from strings by hand would be faster, and say the format a second time; the C
# encoder within json, called directly, saves a third of the time, and no document promises that it is there.

FORMAT = 1
_CRC = b'"crc":"'
_PIECE = 500                                   # lines of a state that are made at a time


def _epoch() -> datetime.datetime:
    return datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)


@_remembering                                  # much happens in one second
def _format_second(second: int) -> str:
    """Return whole seconds since 1970 as 2026-11-21T22:14:00."""
    return (_epoch() + datetime.timedelta(seconds=second)).isoformat()[:19]


@_remembering                                  # an event, an attempt and its task have the same
def format_time(at: Optional[float]) -> Optional[str]:
    """Return seconds since 1970 as 2026-11-21T22:14:00.123456Z; None stays None."""
    if at is None:
        return None
    second, microseconds = divmod(round(at * 1_000_000), 1_000_000)
    return f"{_format_second(second)}.{microseconds:06d}Z"


@_remembering
def parse_time(text: Optional[str]) -> Optional[float]:
    """Return the seconds since 1970 of what format_time gave; raise ValueError for another text."""
    if text is None:
        return None
    return (datetime.datetime.fromisoformat(text.replace("Z", "+00:00")) - _epoch()).total_seconds()


def span(started: Optional[float], finished: Optional[float]) -> Optional[float]:
    """Return the seconds from one to the other, never negative; None while either is unknown."""
    return None if started is None or finished is None else round(max(0.0, finished - started), 6)


def _attempt_to_json(attempt: Attempt) -> Dict[str, Any]:
    """Return what RUN.json says of one attempt."""
    members = {"status": attempt.status, "reason": attempt.reason, "started": format_time(attempt.started),
               "finished": format_time(attempt.finished),
               "duration_s": span(attempt.started, attempt.finished),
               "error": attempt.error, "log": attempt.log}
    if attempt.pid is not None:
        members.update(pid=attempt.pid, ticks=attempt.ticks)
    if attempt.forked:
        members["forked"] = True
    if attempt.job is not None:
        members["job"] = attempt.job
    return members


def task_run_to_json(task_run: TaskRun) -> Dict[str, Any]:
    """Return what RUN.json says of one task."""
    members = {"status": task_run.status, "reason": task_run.reason, "attempt": task_run.attempt,
               "started": format_time(task_run.started), "finished": format_time(task_run.finished),
               "duration_s": span(task_run.started, task_run.finished), "inputs": task_run.inputs,
               "output": task_run.output, "error": task_run.error,
               "log": task_run.attempts[-1].log if task_run.attempts else None,
               "attempts": [_attempt_to_json(attempt) for attempt in task_run.attempts]}
    for name, value, usual in (("first_attempt", task_run.first_attempt, 1),
                               ("stopping", task_run.stopping, None),
                               ("retry_at", format_time(task_run.retry_at), None),
                               ("each", task_run.each, None),
                               ("unsaved", task_run.unsaved, {})):
        if value != usual:
            members[name] = value
    return members


def known_durations(run: Run) -> Dict[str, float]:
    """Return the seconds of the last success of each task, in `run` or as it was known when that began."""
    known = {}
    for name, task_run in run.tasks.items():
        last = task_run.attempts[-1] if task_run.attempts else None
        seconds = (span(last.started, last.finished) if last and last.status == SUCCESS
                   else run.plan.durations.get(name))
        if seconds is not None:
            known[name] = seconds
    return known


def _parts_to_json(run: Run, engine: Optional[Mapping[str, Any]]) -> Dict[str, Any]:
    """Return the state of `run` but for its tasks and its definition."""
    return {"id": run.id, "flow": run.flow, "status": run.status, "reason": run.reason,
            "started": format_time(run.started), "finished": format_time(run.finished),
            "duration_s": span(run.started, run.finished), "warnings": run.warnings, "parent": run.parent,
            "miniflow": __version__, "format": FORMAT, "engine": engine, "source": run.source,
            "scheduled_time": format_time(run.scheduled_time),
            "cancel": run.cancel._asdict() if run.cancel else None,
            "left_out": dict(run.plan.left_out), "durations": known_durations(run),
            "params": run.params, "ctx": run.ctx}


def _rows_of(run: Run) -> Mapping[str, TaskRun]:
    """Return what is recorded of tasks, also of instances that are to be made anew, or came to be no more."""
    return {**run.tasks, **run.earlier} if run.earlier else run.tasks


def run_to_json(run: Run, engine: Optional[Mapping[str, Any]] = None) -> Dict[str, Any]:
    """Return the whole state of `run`; `engine` tells who works on it."""
    return {**_parts_to_json(run, engine),
            "tasks": {name: task_run_to_json(task_run) for name, task_run in _rows_of(run).items()},
            "definition": flow_to_json(run.plan.flow)}


_HEAD = ("id", "flow", "status", "reason", "started", "finished", "duration_s", "warnings", "parent")


@_remembering
def _encoder(separators: Optional[Tuple[str, str]]) -> Callable[[Any], str]:
    """Return what turns a value into JSON; json.dumps would make it anew each time.

    Nothing here holds itself: what comes from outside was read as JSON or copied by json_copy().
    """
    return json.JSONEncoder(check_circular=False, separators=separators).encode


def _encode(value: Any) -> str:
    """Return `value` as JSON that is good to read."""
    return str(_encoder(None)(value))


def _joined(rows: Iterable[str]) -> Iterator[str]:
    """Yield the lines of an array or object with commas between them, many at a time."""
    rows, before = iter(rows), ""
    for piece in iter(lambda: ",\n ".join(islice(rows, _PIECE)), ""):
        yield before + piece
        before = ",\n "


def encode_definition(flow: Flow) -> bytes:
    """Return the text of a flow as a state has it: a line for each task."""
    handlers = tuple(task for task in flow.tasks if task.handler)
    parts = _encode(flow_to_json(flow._replace(tasks=handlers)))[:-2]
    rows = _joined(_encode(task_to_json(task)) for task in flow.tasks if not task.handler)
    return "".join([parts, "\n ", *rows, "\n]}"]).encode("ascii")


#: Members of events and rows that may hold what a task or a user has said.
_MAY_HOLD_SECRETS = ("reason", "error", "output", "ctx")


def without_secrets(members: Mapping[str, Any], secrets: Sequence[str]) -> Mapping[str, Any]:
    """Return the members of an event, a row or a head as they are stored."""
    if not secrets:
        return members
    return {name: masked(value, secrets) if name in _MAY_HOLD_SECRETS else
            [without_secrets(item, secrets) for item in value] if name == "attempts" else value
            for name, value in members.items()}


def _state_pieces(run: Run, engine: Optional[Mapping[str, Any]], seq: int, definition: bytes
                  ) -> Iterator[bytes]:
    """Yield the members of a state: a line of head, and one for each part and each task."""
    parts = dict(without_secrets(_parts_to_json(run, engine), run.secrets))
    head = _encode({**{name: parts.pop(name) for name in _HEAD}, "seq": seq})[1:-1]
    lines = [f"{_encode(name)}: {_encode(value)}" for name, value in parts.items()]
    yield ",\n".join([head, *lines, '"tasks": {\n ']).encode("ascii")
    encode, tasks = _encoder(None), _rows_of(run)
    untouched = encode(task_run_to_json(TaskRun()))
    rows = (encode(without_secrets(task_run_to_json(task_run), run.secrets))
            if task_run.is_touched else untouched for task_run in tasks.values())
    for piece in _joined(f"{encode(name)}: {row}" for name, row in zip(tasks, rows)):
        yield piece.encode("ascii")
    yield b'\n},\n"definition": ' + definition


def _sealed(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the pieces of an object's text that lacks its end, and that end, which has the CRC of it all."""
    crc = 0
    for piece in pieces:
        crc = zlib.crc32(piece, crc)
        yield piece
    yield _CRC + b'%08x"}\n' % crc


def encode_state(run: Run, engine: Optional[Mapping[str, Any]], seq: int, definition: bytes
                 ) -> Iterator[bytes]:
    """Yield the text of RUN.json; `definition` is what encode_definition() gives for the run's flow."""
    return _sealed(chain([b"{"], _state_pieces(run, engine, seq, definition), [b",\n"]))


def encode_opened(run: Run, engine: Mapping[str, Any], seq: int, definition: bytes) -> Iterator[bytes]:
    """Yield the first record of a journal: a line that holds the whole state of `run`."""
    state = (piece.replace(b"\n", b"") for piece in _state_pieces(run, engine, seq, definition))
    return _sealed(chain([b'{"event":"opened","state":{'], state, [b'},"seq":%d,' % seq]))


def decode_state(content: bytes) -> Optional[Dict[str, Any]]:
    """Return the state that encode_state wrote, with its `seq`; None if a single bit of it is otherwise."""
    at = content.rfind(_CRC)
    if at < 0 or content[at:] != _CRC + b'%08x"}\n' % zlib.crc32(content[:at]):
        return None
    try:
        state = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return state if isinstance(state, dict) and isinstance(state.get("seq"), int) else None


def decode_durations(content: bytes) -> Optional[Dict[str, float]]:
    """Return the durations of a state that encode_state wrote, without reading the rest; None if damaged."""
    begin, crc = content.find(b'\n"durations": '), content.rfind(_CRC)
    if not 0 < begin < crc or content[crc:] != _CRC + b'%08x"}\n' % zlib.crc32(content[:crc]):
        return None
    return dict(json.loads(content[content.index(b"{", begin):content.index(b",\n", begin + 1)]))


def encode_record(members: Mapping[str, Any], seq: int) -> bytes:
    """Return one line of a journal."""
    body = f'{_encoder((",", ":"))(members)[:-1]},"seq":{seq},'.encode("ascii")
    return body + _CRC + b'%08x"}\n' % zlib.crc32(body)


def decode_record(line: bytes) -> Optional[Dict[str, Any]]:
    """Return the members of one line of a journal, newline included; None if it is torn or damaged."""
    return decode_state(line)


def event_to_json(event: Event) -> Dict[str, Any]:
    """Return `event` as an object: its word, its time, and what is not at its default."""
    kind: Any = type(event)
    members: Dict[str, Any] = {"event": EVENT_WORDS[kind]}
    for name, value, usual in zip(kind._fields, event, _USUAL[kind]):
        if value is not usual and value != usual:
            members[name] = value
    members["at"] = format_time(event.at)
    return members


def event_from_json(members: Mapping[str, Any]) -> Event:
    """Return the event that event_to_json wrote."""
    fields = {name: value for name, value in members.items() if name not in ("event", "seq", "crc")}
    event: Event = EVENTS[members["event"]](**{**fields, "at": parse_time(fields["at"])})
    return event


def _attempt_from_json(members: Mapping[str, Any]) -> Attempt:
    """Return the Attempt that _attempt_to_json wrote."""
    attempt = Attempt(parse_time(members["started"]) or 0, members["log"])
    attempt.status, attempt.reason, attempt.error = members["status"], members["reason"], members["error"]
    attempt.finished = parse_time(members["finished"])
    attempt.pid, attempt.ticks = members.get("pid"), members.get("ticks")
    attempt.forked, attempt.job = members.get("forked", False), members.get("job")
    return attempt


def _task_run_from_json(members: Mapping[str, Any]) -> TaskRun:
    """Return the TaskRun that task_run_to_json wrote."""
    task_run = TaskRun()
    for name in ("status", "reason", "attempt", "inputs", "output", "error"):
        setattr(task_run, name, members[name])
    task_run.started, task_run.finished = parse_time(members["started"]), parse_time(members["finished"])
    task_run.attempts = [_attempt_from_json(attempt) for attempt in members["attempts"]]
    task_run.first_attempt = members.get("first_attempt", 1)
    task_run.stopping, task_run.retry_at = members.get("stopping"), parse_time(members.get("retry_at"))
    task_run.unsaved, task_run.each = members.get("unsaved", {}), members.get("each")
    return task_run


def run_from_json(state: Mapping[str, Any]) -> Run:
    """Rebuild a Run from the state that run_to_json gave."""
    if state["format"] != FORMAT:
        raise ValueError(f"it has format {state['format']}, not {FORMAT}")
    flow = recorded_flow(state["definition"])
    tasks = {name: _task_run_from_json(members) for name, members in state["tasks"].items()}
    plan = make_plan(flow, state["left_out"], state.get("durations", {}))
    run = Run(plan, state["id"], state["params"],
              parse_time(state["started"]) or 0, state["flow"], state["source"], tasks)
    run.scheduled_time = parse_time(state["scheduled_time"]) or run.started
    run.finished = parse_time(state["finished"])
    run.outcome = None if state["status"] == RUNNING else state["status"]
    run.reason, run.parent = state["reason"], state.get("parent")
    run.cancel = CancelRequested(**state["cancel"]) if state["cancel"] else None
    return run


def changed_tasks(old: Flow, new: Flow) -> Dict[str, str]:
    """Return the tasks that are not the same in both flows: id to added, removed or changed."""
    text = json.JSONEncoder(sort_keys=True).encode
    before = {task.id: text(task_to_json(task)) for task in old.tasks}
    after = {task.id: text(task_to_json(task)) for task in new.tasks}
    everywhere = "changed" if old.env != new.env else ""
    changes = {name: "added" if name not in before else "changed" if before[name] != now else everywhere
               for name, now in after.items()}
    changes.update((name, "removed") for name in before if name not in after)
    return {name: change for name, change in changes.items() if change}


#: So many interruptions in a row fail a task; the resume after that tries again.
POISON = 3


def _afresh(old: TaskRun) -> TaskRun:
    """Return a pending TaskRun that keeps the attempts of `old`; an interrupted one uses up no retry."""
    new = TaskRun()
    new.attempts, new.attempt, new.first_attempt = old.attempts, old.attempt, old.first_attempt
    new.each = old.each
    if old.status == RUNNING and old.attempts:
        old.attempts[-1].status, old.attempts[-1].reason = INTERRUPTED, "interrupted"
        new.first_attempt += 1
        others = [n for n, attempt in enumerate(old.attempts, 1) if attempt.status != INTERRUPTED]
        times = len(old.attempts) - max(others, default=0)
        if times % POISON == 0:
            new.status, new.finished = FAILED, old.attempts[-1].started
            new.reason = f"interrupted {times} times in a row: it may be what ends the engine"
    elif old.status in SETTLED:
        new.first_attempt = old.attempt + 1
    return new


def _goes_on(flow: Flow, task: Task, old: TaskRun) -> bool:
    """Tell whether the running attempt of a task is none of its engine's, with which it did not end."""
    return (old.status == RUNNING and bool(old.attempts) and not old.stopping
            and executor_of(flow, task) != LOCAL)


def _history(old: TaskRun) -> TaskRun:
    """Return the TaskRun of an instance that may come to be once more: the attempts of `old`, and no more."""
    new = TaskRun()
    new.go_on(old)
    if old.status == RUNNING:
        old.attempts[-1].status, old.attempts[-1].reason = INTERRUPTED, "interrupted"
    return new


def _reopened(old: TaskRun) -> TaskRun:
    """Return the TaskRun of a task some of whose instances are to run again."""
    new = TaskRun()
    new.status, new.started = RUNNING, old.started
    return new


def reopen(old: Run, flow: Flow) -> Run:
    """Return `old` ready to go on with `flow`: what ended well stays, the rest and its downstream rerun.

    So does a job of a cluster stay, which goes on without an engine.
    """
    changes = changed_tasks(old.plan.flow, flow)
    left_out = {task.id: old.plan.left_out[task.id] for task in flow.tasks if task.id in old.plan.left_out}
    plan = make_plan(flow, left_out, known_durations(old))
    again = _reach({name for name in plan.order if name in changes
                    or old.tasks[name].status not in (SUCCESS, CACHED, SKIPPED)}, plan.downstream)
    unsaved = {name for name in plan.order if name in old.tasks and old.tasks[name].unsaved}
    while True:  # what only an engine's memory held is made again, if needed
        needed = _reach(again, {task.id: task.depends_on for task in flow.tasks}) & unsaved - again
        if not needed:
            break
        again = _reach(again | needed, plan.downstream)
    tasks, kept = {}, {}                       # type: Dict[str, TaskRun], Dict[str, TaskRun]
    for name in plan.order:
        tasks[name] = old.tasks.get(name) or TaskRun()
        names = old.groups.get(name, ())
        anew = (not names or name in changes or name in unsaved
                or bool(again.intersection(plan.tasks[name].depends_on)))
        goes_on = (_goes_on(flow, plan.tasks[name], tasks[name]) and name not in changes
                   and not again.intersection(plan.tasks[name].depends_on))
        if name in again and anew:
            tasks[name] = tasks[name] if goes_on else _afresh(tasks[name])
            kept.update((instance, _history(old.tasks[instance])) for instance in names)
            names = ()
        elif name in again:                    # of its instances, those that ended well stay
            tasks[name] = _reopened(tasks[name])
        for instance in names:
            task_run = old.tasks[instance]
            done = (name not in again or task_run.status in (SUCCESS, CACHED, SKIPPED)
                    or _goes_on(flow, plan.tasks[name], task_run))
            kept[instance] = task_run if done else _afresh(task_run)
    tasks.update({**old.earlier, **kept})
    run = Run(plan, old.id, old.params, old.started, old.flow, old.source, tasks)
    run.scheduled_time, run.parent = old.scheduled_time, old.parent
    return run


# ============================================================================
# == 14. INVOCATION: what exactly is executed for an attempt, and what did it hand on?
# ============================================================================
# An attempt is a program, its arguments, its environment, a directory and its input: worked out here from the
# task, the values of its templates and the surroundings that the engine hands in, without touching any of
# them.  One element of `args` is one argument, whatever is in it.  The way back is here as well: what an exit
# code, a signal or a file of outputs means for the attempt.
#
# The environment is built in layers: the engine's, the flow's, the task's, MiniFlow's own.  A template in one
# layer sees the layers below it, never its neighbours, so that the order of members in a JSON object, which
# means nothing, changes nothing.

class Setting(NamedTuple):
    """What an engine's surroundings contribute to an attempt; the directories are absolute."""

    environ: Mapping[str, str]
    python: str
    start_dir: str
    tasks_dir: str
    tmp_dir: str
    token: str                                 # the engine's, by which its tasks' processes are known
    context: str                               # path of the context file
    output: str                                # path of the file that the task may write
    output_dir: str = ""
    engine: str = ""                           # path of this file
    options: Mapping[str, Any] = {}            # of the command line, as they are for flows within a flow, too


class Invocation(NamedTuple):
    """What is executed: an argument vector, its whole environment, a directory, and standard input if any.

    `can_fork` tells that it is a Python script that would find in a fork of its interpreter, which has
    started already, what a new one would have found.
    """

    argv: Tuple[str, ...]
    env: Mapping[str, str]
    cwd: str
    stdin: Optional[str]
    can_fork: bool = False


def option_argv(name: str, value: Any) -> List[str]:
    """Return the arguments that one member of an `args` object stands for."""
    if value is None or value is False:
        return []
    if isinstance(value, list):
        return [argument for item in value for argument in option_argv(name, item)]
    if value is True:
        return [f"-{name}" if len(name) == 1 else f"--{name}"]
    return [f"-{name}", to_text(value)] if len(name) == 1 else [f"--{name}={to_text(value)}"]


def args_argv(args: Any, values: Values) -> List[str]:
    """Return the arguments that `args` stands for, templates replaced: one element in, one element out."""
    if isinstance(args, dict):
        options = {name: [render(item, values) for item in value] if isinstance(value, list)
                   else render(value, values) for name, value in args.items()}
        return [argument for name, value in options.items() for argument in option_argv(name, value)]
    return [to_text(render(item, values)) for item in args]


def values_of(run: Run, task_id: str, env: Mapping[str, str]) -> Values:
    """Return what the templates of a task may read, with `env` for its environment."""
    def task_values(name: str) -> Mapping[str, Any]:
        return {"outputs": run.tasks[name].output or {}, "status": run.tasks[name].status}

    facts = {"id": run.id, "scheduled_time": format_time(run.scheduled_time)}
    return Values(run.params, run.ctx_of(task_id), facts, env, task_values, **run.tasks[task_id].each or {})


#: Python, its C library and its site packages look at these variables when they start, and not again.
_READ_AT_START = ("PYTHON", "LD_", "LC_", "LANG", "MALLOC_", "GLIBC_", "HOME", "COVERAGE_")


def _absolute(path: str, start_dir: str) -> str:
    """Return `path` as seen from `start_dir`; drive letters count as roots."""
    return path if path.startswith(("/", "\\")) or path[1:2] == ":" else f"{start_dir}/{path}"


def attempt_cookie(token: str, task_id: str, attempt: int) -> str:
    """Return what marks the processes of one attempt of the engine that has `token`."""
    return f"{token}/{task_id}/{attempt}"


def run_env(run: Run, setting: Setting) -> Dict[str, str]:
    """Return the variables that MiniFlow itself gives all attempts of a run."""
    env = {"MINIFLOW_PARAM_" + param_variable(name): to_text(value) for name, value in run.params.items()}
    env.update(MINIFLOW_RUN_ID=run.id, MINIFLOW_FLOW=run.flow, TMP_DIR=setting.tmp_dir)
    return env


def _attempt_env(run: Run, task: Task, setting: Setting) -> Dict[str, str]:
    """Return the variables that MiniFlow itself gives this attempt alone."""
    attempt, outer = run.tasks[task.id].attempt, setting.environ.get("MINIFLOW_COOKIE")
    cookie = attempt_cookie(setting.token, task.id, attempt)
    return {"MINIFLOW_COOKIE": f"{outer}:{cookie}" if outer else cookie,    # an outer run finds ours, too
            "MINIFLOW_TASK": task.id, "MINIFLOW_ATTEMPT": str(attempt), "MINIFLOW_CONTEXT": setting.context,
            "MINIFLOW_OUTPUT": setting.output, "GITHUB_OUTPUT": setting.output}


#: What the process of a function executes: it loads this file under its name here, and goes on there.
FUNCTION_PROGRAM = """
import importlib, importlib.util, json, sys
call = json.load(sys.stdin)
sys.path[:], name = call["sys_path"], call["miniflow"]
try:
    miniflow = importlib.import_module(name)
    assert miniflow.__file__ == call["file"]
except (ImportError, AttributeError, AssertionError):
    spec = importlib.util.spec_from_file_location(name, call["file"])
    miniflow = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(miniflow)
sys.exit(miniflow.answer_call(call))
"""


#: Opens addresses as the two programs below do: http and https, proxies, nothing else.  A redirection never
#: leads from https to http, and takes no credentials to another host.
_OPENER = """
import base64, json, os, sys, urllib.error, urllib.parse, urllib.request


class Redirects(urllib.request.HTTPRedirectHandler):
    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302

    def redirect_request(self, request, file, code, message, headers, url):
        if code in expected:
            return None
        old, new = urllib.parse.urlsplit(request.full_url), urllib.parse.urlsplit(url)
        if new.scheme not in ("http", "https") or old.scheme == "https" != new.scheme:
            raise urllib.error.URLError("it redirects to %s, which is not followed" % shown(url))
        method, body, kept = request.get_method(), request.data, dict(request.headers)
        if code not in (307, 308) and method not in ("GET", "HEAD"):
            if code != 303 and method != "POST":
                return None
            method, body = "GET", None
            kept = {name: text for name, text in kept.items() if not name.startswith("Content-")}
        if old.netloc != new.netloc.rpartition("@")[2]:
            for name in ("Authorization", "Cookie", "Proxy-authorization"):
                kept.pop(name, None)
        return request_for(url, body, kept, method=method)


def shown(url):
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return "(no address)"
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def fail(reason, code=1, final=False):
    print(reason, file=sys.stderr)
    with open(os.environ["MINIFLOW_OUTPUT"], "w", encoding="ascii") as file:
        json.dump({"reason": reason, "code": code, "final": final}, file)
    sys.exit(1)


def request_for(url, *args, **more):
    parts = urllib.parse.urlsplit(url)
    if parts.port == 0:                               # a port that is too large raises by itself
        raise ValueError("port 0")
    user, at, host = parts.netloc.rpartition("@")
    if not host.isascii():
        name, colon, port = host.partition(":")
        host = name.encode("idna").decode() + colon + port
    path, query = (urllib.parse.quote(part, "!#$%&'()*+,/:;=?@[]~") for part in (parts.path, parts.query))
    request = urllib.request.Request(urllib.parse.urlunsplit((parts.scheme, host, path, query, "")), *args,
                                     **more)
    if at and not request.has_header("Authorization"):
        word = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
        request.add_header("Authorization", "Basic " + word)
    return request


opener = urllib.request.OpenerDirector()
for handler in (urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler,
                Redirects, urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPErrorProcessor,
                urllib.request.UnknownHandler):
    opener.add_handler(handler())
opener.addheaders = [("User-Agent", "MiniFlow")]
ask = json.load(sys.stdin)
expected = ask.get("expect_status", [])
expected = [expected] if isinstance(expected, int) else expected
"""

#: So many bytes of an answer are handed on; more needs `save`.
MAX_ANSWER = 2 * 2**20

#: What the process of an `http` task executes.
HTTP_PROGRAM = _OPENER + """
import http.client, signal, stat
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))         # which removes what is not whole
headers, body = dict(ask.get("headers", {})), ask.get("body")
given = {name.lower() for name in headers}
if "json" in ask:
    body = json.dumps(ask["json"])
if body is not None and "content-type" not in given:
    headers["Content-Type"] = "application/json" if "json" in ask else "text/plain; charset=utf-8"
method = ask.get("method") or ("GET" if body is None else "POST")
name = method + " " + shown(ask["url"])
try:
    body = body if body is None else body.encode()
    try:
        answer = opener.open(request_for(ask["url"], body, headers, method=method), timeout=60)
    except urllib.error.HTTPError as exc:
        answer = exc
    except (ValueError, http.client.InvalidURL) as exc:   # says what is in query, password or header
        fail("%s: the address or a header is not valid (%s)" % (name, type(exc).__name__), final=True)
    status, word = answer.status, http.client.responses.get(answer.status, "")
    output = {"status": status, "headers": {}}
    for key, value in answer.headers.items():
        key = key.lower()
        output["headers"][key] = output["headers"][key] + ", " + value if key in output["headers"] else value
    if not (status in expected if expected else 200 <= status < 300):
        fail("%s: HTTP %d %s" % (name, status, word), status)
    if ask.get("save"):
        place, size, mode = os.path.realpath(ask["save"]), 0, None
        if os.path.exists(place):
            mode = os.stat(place).st_mode
        plain = mode is None or stat.S_ISREG(mode)
        part = "%s.%s.part" % (place, os.environ["MINIFLOW_TASK"]) if plain else place
        try:
            with open(part, "wb") as file:
                for block in iter(lambda: answer.read(2**16), b""):
                    size += file.write(block)
            if answer.length:
                fail("%s: the answer ended early" % name)
            if plain and mode is not None:
                os.chmod(part, stat.S_IMODE(mode))
            if plain:
                os.replace(part, place)
        finally:
            if plain and os.path.exists(part):
                os.unlink(part)
        output.update(file=ask["save"], bytes=size)
    else:
        content = answer.read(ask["most"] + 1)
        if len(content) > ask["most"]:
            fail("%s: the answer is longer than %d bytes; give save" % (name, ask["most"]))
        if answer.length:
            fail("%s: the answer ended early" % name)
        kind = answer.headers.get_content_type()
        text = content.decode(answer.headers.get_content_charset("utf-8"), "replace").lstrip("\\ufeff")
        if text.strip() and (kind == "application/json" or kind.endswith("+json")):
            output["json"] = json.loads(text, parse_constant=lambda word: fail(
                "%s: %s in JSON" % (name, word)))
        else:
            output["text"] = text.replace("\\0", "\\ufffd")
except (OSError, ValueError, LookupError, RecursionError, http.client.HTTPException) as exc:
    what = getattr(exc, "reason", None) or exc
    fail("%s: %s" % (name, what if str(what) else type(what).__name__))
print("%s: HTTP %d %s" % (name, status, word), file=sys.stderr)
with open(os.environ["MINIFLOW_OUTPUT"], "w", encoding="ascii") as file:
    json.dump(output, file)
"""

#: What the process of a `wait_for` task executes.
WAIT_PROGRAM = _OPENER + """
import glob, http.client, subprocess, time


def look():
    if "file" in ask:
        found = sorted(glob.glob(ask["file"], recursive=True))
        return {"files": found} if found else "no file matches " + ask["file"]
    if "url" in ask:
        try:
            status = opener.open(request_for(ask["url"]), timeout=60).status
        except (ValueError, http.client.InvalidURL) as exc:
            fail("%s: the address is not valid (%s)" % (shown(ask["url"]), type(exc).__name__), final=True)
        except (OSError, http.client.HTTPException) as exc:
            return "%s: %s" % (shown(ask["url"]), getattr(exc, "reason", None) or exc)
        return {"status": status}
    if "command" in ask:
        if os.path.exists(os.environ["MINIFLOW_OUTPUT"]):
            os.unlink(os.environ["MINIFLOW_OUTPUT"])                # of the look before
        try:
            code = subprocess.call(ask["command"], stdin=subprocess.DEVNULL)
        except OSError as exc:
            fail("cannot start: %s: %s" % (ask["command"][0], exc.strerror),
                 127 if isinstance(exc, FileNotFoundError) else 126, True)
        return "exit %d" % code if code else {}
    return {}


if "url" in ask and not shown(ask["url"]).startswith(("http://", "https://")):
    fail("%s is no address; it has to begin with http:// or https://" % shown(ask["url"]), final=True)
for word in set(ask) & {"seconds", "poll_s"}:
    try:
        value = ask[word]
        ask[word] = float(value if type(value) in (int, float, str) else "none")
        assert (0.001 if word == "poll_s" else 0) <= ask[word] <= 315360000
    except (ValueError, AssertionError):
        fail("wait_for.%s: expected a number of seconds, got %s" % (word, json.dumps(value)), final=True)
if "seconds" in ask:
    time.sleep(ask["seconds"])
said = None
while True:
    try:
        found = look()
    except (OSError, ValueError) as exc:
        fail("%s" % exc)
    if isinstance(found, dict):
        break
    if found != said:
        print("not yet:", found, file=sys.stderr, flush=True)
    said = found
    time.sleep(ask.get("poll_s", 5))
if found:
    with open(os.environ["MINIFLOW_OUTPUT"], "w", encoding="ascii") as file:
        json.dump(found, file)
"""


#: What a process of ours executes that is to begin with one function of the engine at sys.argv[1].
_ENGINE_PROGRAM = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("miniflow", sys.argv[1])
miniflow = sys.modules["miniflow"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(miniflow)
sys.exit(miniflow.%s())
"""
#: What the process of a task that is a flow executes, and that of a run that is due.
SUBFLOW_PROGRAM = _ENGINE_PROGRAM % "run_subflow"
SCHEDULED_PROGRAM = _ENGINE_PROGRAM % "run_scheduled"


def subflow_id(run: Run, task_id: str, params: Mapping[str, Any]) -> str:
    """Return the id of the run that a task with those params is.

    It is the same one for each attempt, so that the next goes on where the last one stopped; what is to run
    again although it succeeded gets another one.
    """
    import hashlib
    successes = sum(attempt.status == SUCCESS for attempt in run.tasks[task_id].attempts)
    content = json.dumps([run.id, task_id, params, successes], sort_keys=True).encode()
    name = re.sub("[^A-Za-z0-9_-]", "_", f"{run.id}-{task_id}")[:100]
    return f"{name}-{hashlib.sha256(content).hexdigest()[:12]}"


def _subflow_asked(run: Run, task_id: str, setting: Setting, params: Mapping[str, Any]) -> Dict[str, Any]:
    """Return what the program of a task that is a flow reads from its standard input."""
    if masked(params, run.secrets) != params:
        raise LookupError("cannot start: a param holds a secret, which would be stored; let tasks read it "
                          "from their environment")
    return {"flow": run.defs[task_id].action[0], "run_id": subflow_id(run, task_id, params), "params": params,
            "flows_dir": run.source.rpartition("/")[0] or ".", "tasks_dir": setting.tasks_dir,
            "output_dir": setting.output_dir,
            "options": {**setting.options, "executor": run.plan.flow.executor,
                        "secrets": run.plan.flow.secrets,
                        "parent": {"run": run.id, "task": task_id}}}


def _glob_part(value: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", value)


#: How a value is written within an address or a pattern, so that it stays a part of it and no more.
_ESCAPES: Dict[str, Callable[[str], str]] = {"url": _url_part, "file": _glob_part}


def render_parts(name: str, text: str, values: Values) -> str:
    """Return an address or a pattern with its templates replaced; each value stays within its part.

    What an address begins with may be the value of a template, and the whole of a pattern.
    """
    parts, escape = parse_template(text), _ESCAPES[name]
    return "".join(part if isinstance(part, str) else to_text(lookup(part, values))
                   if n == 0 and (name == "url" or len(parts) == 1) else escape(to_text(lookup(part, values)))
                   for n, part in enumerate(parts))


def _asked(action: Union[Http, WaitFor], values: Values) -> str:
    """Return what the program of an action reads from its standard input."""
    ask: Dict[str, Any] = {"most": MAX_ANSWER}
    for name, value in action[0].items():
        if name in _ESCAPES:
            ask[name] = render_parts(name, value, values)
        elif name in ("body", "save"):
            ask[name] = to_text(render(value, values))
        elif name == "command":
            ask[name] = [to_text(render(word, values)) for word in value]
        elif name == "headers":
            ask[name] = {key: to_text(render(text, values)) for key, text in value.items()}
        else:
            ask[name] = render_all(value, values)
    return json.dumps(ask)


def _flow_env(run: Run, task_id: str, environ: Mapping[str, str]) -> Tuple[Dict[str, str], Values]:
    """Return what the flow adds to the environment `environ` of a task, and the values that this leads to."""
    values = values_of(run, task_id, environ)
    added = {name: to_text(render(text, values)) for name, text in run.plan.flow.env.items()}
    return added, values._replace(env={**environ, **added}) if added else values


def _asked_values(run: Run, task: Task, environ: Mapping[str, str]) -> Values:
    """Return what decides whether and how often a task runs; of its own variables those that are read."""
    values = _flow_env(run, task.id, environ)[1]
    read = {ref.path[1] for path, text in templates(task) if path[0] in ("if", "foreach", "matrix")
            for ref in refs_at(path, text) if ref.path[0] == "env"}
    own = {name: to_text(render(text, values)) for name, text in task.env.items() if name in read}
    return values._replace(env={**values.env, **own}) if own else values


def admit(run: Run, task_id: str, now: float, environ: Mapping[str, str]) -> Event:
    """Return what becomes of a task that its upstream lets run: it may be skipped, run, or become many."""
    task, field = run.defs[task_id], "if"
    try:
        values = _asked_values(run, task, environ)
        if task.condition is not None and not (task.many and asks_each(task)):
            if not holds(task.condition, values):
                return TaskSettled(now, task_id, SKIPPED, "if is false")
        if task.many is None:
            return TaskAdmitted(now, task_id)
        field = task.many
        each = instances(task, values)
        if run.secrets and masked(each, run.secrets) != each:
            raise ValueError("a value holds a secret, which can't be recorded; let the task read it from its "
                             "environment")
        return TaskExpanded(now, task_id, each)
    except (LookupError, ValueError) as exc:
        return TaskSettled(now, task_id, FAILED, f"{field}: {exc}")


def invoke(run: Run, task_id: str, setting: Setting) -> Invocation:
    """Return what the current attempt of a task executes; raise LookupError if a template finds no value."""
    task = run.defs[task_id]
    action = task.action
    flow_env, values = _flow_env(run, task_id, setting.environ)
    task_env = {name: to_text(render(text, values)) for name, text in task.env.items()}
    if task_env:
        values = values._replace(env={**values.env, **task_env})
    args = args_argv(action.args, values)
    own = {*flow_env, *task_env}
    can_fork = False
    if isinstance(action, Script):
        python = action.python or setting.python
        head = [_absolute(python, setting.start_dir) if "/" in python else python,
                f"{setting.tasks_dir}/{action.path}"]
        can_fork = not any(name.startswith(_READ_AT_START) or name == "PATH" and "/" not in python
                           for name in own)
    elif isinstance(action, Function):
        head = [setting.python, "-c", FUNCTION_PROGRAM]
    elif isinstance(action, SubFlow):
        asked = _subflow_asked(run, task_id, setting, render_all(action.params, values))
        head = [setting.python, "-c", SUBFLOW_PROGRAM, setting.engine, asked["flow"], asked["run_id"]]
    elif isinstance(action, (Http, WaitFor)):
        head = [setting.python, "-I", "-c", HTTP_PROGRAM if isinstance(action, Http) else WAIT_PROGRAM]
    elif isinstance(action.command, str):
        head = ["/bin/sh", "-c", action.command.replace("$${{", "${{"), "sh"]
    else:
        head = [to_text(render(text, values)) for text in action.command]
    cwd = _absolute(to_text(render(task.cwd, values)), setting.start_dir) if task.cwd else setting.start_dir
    stdin = (_asked(action, values) if isinstance(action, (Http, WaitFor)) else
             json.dumps(asked) if isinstance(action, SubFlow) else
             None if action.stdin is None else to_text(render(action.stdin, values)))
    env = {**setting.environ, **run_env(run, setting), **flow_env, **task_env,
           **_attempt_env(run, task, setting)}
    return Invocation(tuple(head + args), env, cwd, stdin, can_fork)


def context_json(run: Run, task_id: str) -> str:
    """Return the text of the context file of a task: params, its ancestors' outputs, and both merged."""
    return json.dumps({"params": run.params, "tasks": run.outputs_of(run.tasks[task_id].scope),
                       "ctx": run.ctx_of(task_id)})


MAX_OUTPUT = 16 * 2**20


def parse_output(content: bytes) -> Dict[str, Any]:
    """Read what a task wrote to $MINIFLOW_OUTPUT: a JSON object, or GitHub's name=value and name<<MARK lines.

    Raises ValueError that says what is wrong with it.  The lines are read as GitHub's runner reads
    $GITHUB_OUTPUT.
    """
    if content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        try:
            return dict(parse_json(content, "output", MAX_OUTPUT).value)
        except FlowError as exc:
            raise ValueError(str(exc)) from None
    try:
        lines = content.decode().removeprefix(BYTE_ORDER_MARK).replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as exc:
        raise ValueError(f"output: byte 0x{content[exc.start]:02x} at {exc.start} is not UTF-8") from None
    output: Dict[str, Any] = {}
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        name, equals, value = line.partition("=")
        head, heredoc, mark = line.partition("<<")
        if heredoc and len(head) < len(name):
            if mark not in lines[number:]:
                raise ValueError(f"output: line {number} opens {shown(line)}, "
                                 f"which no line {shown(mark)} closes")
            end = lines.index(mark, number)
            name, value, number = head, "\n".join(lines[number:end]), end + 1
        elif not equals:
            if not line:
                continue
            raise ValueError(f"output: line {number}, {shown(line)}, is neither a JSON object nor name=value")
        if not name:
            raise ValueError(f"output: line {number} has no name: {shown(line)}")
        output[name] = value
    return output


#: Stands for the exit code of a process that somebody else in this program has waited for.
LOST_EXIT = 256


def describe_exit(code: int) -> Tuple[str, int]:
    """Return the reason for a process's exit `code` (negative: a signal) and the number a shell gives it."""
    if code == LOST_EXIT:
        return "exit code lost: somebody else waits for all children, or its template interpreter died", 255
    return (f"exit {code}", code) if code >= 0 else (f"killed by signal {-code}", 128 - code)


def attempt_end(run: Run, task_id: str, now: float, code: int, stopping: Optional[str],
                output: Callable[[], Mapping[str, Any]]) -> AttemptEnded:
    """Return how the running attempt ended, by its exit code and why it was being stopped by then."""
    attempt = run.tasks[task_id].attempt
    if stopping:
        if run.cancel and stopping == run.cancel.reason:
            return AttemptEnded(now, task_id, attempt, CANCELLED, stopping)
        return AttemptEnded(now, task_id, attempt, FAILED, stopping, "timeout")
    if code < 0 or code and not isinstance(run.defs[task_id].action, TELLING):
        return AttemptEnded(now, task_id, attempt, FAILED, *describe_exit(code))
    try:
        handed_on = output()
    except ValueError as exc:
        return AttemptEnded(now, task_id, attempt, FAILED, f"bad output: {exc}")
    if code:                                   # of a program of ours, which says why
        reason, number = describe_exit(code)
        return AttemptEnded(now, task_id, attempt, FAILED, handed_on.get("reason", reason),
                            handed_on.get("code", number), final=bool(handed_on.get("final")))
    return AttemptEnded(now, task_id, attempt, SUCCESS, output=handed_on or None)


_MAX_DEPTH = 200                               # of a value; what is deeper JSON can't hold everywhere


def json_copy(value: Any, depth: int = 0) -> Any:
    """Return a copy of `value`, which is just what JSON holds; raise TypeError if JSON would change it.

    Raises ValueError for NaN and the infinities, which no JSON reader takes.
    """
    kind = type(value)
    if kind is str or kind is bool or value is None:
        return value
    if kind is float:
        if value - value != 0:
            raise ValueError(f"{value} is no JSON number")
        return value
    if kind is int and value.bit_length() < 10000:           # longer ones Python itself may refuse to write
        return value
    if kind is list and depth < _MAX_DEPTH:
        return [json_copy(item, depth + 1) for item in value]
    if kind is dict and depth < _MAX_DEPTH and all(type(key) is str for key in value):
        return {key: json_copy(item, depth + 1) for key, item in value.items()}
    raise TypeError(f"JSON can't hold a {class_name(kind)} as it is")


class Returned(NamedTuple):
    """What a function returned: what JSON holds, and the rest by key, with its type."""

    output: Dict[str, Any]
    kept: Dict[str, Any]
    unsaved: Dict[str, str]


def split_returned(value: Any) -> Returned:
    """Sort what a function returned; raise ValueError that says what is wrong with it."""
    if value is None:
        return Returned({}, {}, {})
    if not isinstance(value, dict):
        hint = "; declare the function async" if hasattr(value, "__await__") else "; return a dict or None"
        raise ValueError(f"it returned a {class_name(type(value))}{hint}")
    output, kept, unsaved = {}, {}, {}
    for key, item in value.items():
        if type(key) is not str:
            raise ValueError(f"it returned the key {key!r}, a {class_name(type(key))}; "
                             "keys have to be strings")
        try:
            output[key] = json_copy(item)
        except ValueError as exc:
            raise ValueError(f"it returned {key!r}: {exc}; return None or a string instead") from None
        except TypeError:
            kept[key], unsaved[key] = item, class_name(type(item))
    return Returned(output, kept, unsaved)


class ContextDict(dict[str, "Any"]):
    """The context of a Python task: a dict of its own that notes which of its keys are read."""

    def __init__(self, values: Mapping[str, Any], keys: Iterable[str]) -> None:
        super().__init__(values)
        self._keys = keys                      # those that count as read where all are
        self.read: Set[str] = set()

    def _note_all(self) -> None:
        self.read.update(self._keys)

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.read.add(str(key))
        return super().__contains__(key)

    def pop(self, key: str, *default: Any) -> Any:
        self.read.add(key)
        return super().pop(key, *default)

    def setdefault(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().setdefault(key, default)

    def __iter__(self) -> Iterator[str]:
        self._note_all()
        return super().__iter__()

    def keys(self) -> Any:
        self._note_all()
        return super().keys()

    def values(self) -> Any:
        self._note_all()
        return super().values()

    def items(self) -> Any:
        self._note_all()
        return super().items()

    def copy(self) -> Dict[str, Any]:
        self._note_all()
        return dict(super().items())

    def popitem(self) -> Tuple[str, Any]:
        self._note_all()
        return super().popitem()


def inputs_read(run: Run, task_id: str, keys: Iterable[str]) -> Dict[str, str]:
    """Return which task each of `keys` came from that the running attempt of a task has read."""
    writers = run.tasks[task_id].scope.writers
    return {key: run.plan.order[writers[key]] for key in sorted(filter(writers.__contains__, keys))}


def function_ended(run: Run, task_id: str, now: float, stopping: Optional[str], returned: Returned,
                   read: Iterable[str]) -> AttemptEnded:
    """Return the end of the running attempt of a function that has returned."""
    inputs = inputs_read(run, task_id, read)
    if stopping:
        return attempt_end(run, task_id, now, 0, stopping, dict)._replace(inputs=inputs)
    return AttemptEnded(now, task_id, run.tasks[task_id].attempt, SUCCESS, output=returned.output or None,
                        unsaved=returned.unsaved, inputs=inputs or None)


def function_failed(run: Run, task_id: str, now: float, stopping: Optional[str], reason: str,
                    classes: Sequence[str], error: Optional[str], read: Iterable[str]) -> AttemptEnded:
    """Return the end of an attempt of a function that has raised an exception of `classes`, its own first.

    The code of the end is the class that retry_on names, else its own.
    """
    inputs = inputs_read(run, task_id, read)
    if stopping:
        return attempt_end(run, task_id, now, 1, stopping, dict)._replace(inputs=inputs)
    names = run.defs[task_id].retry.retry_on or ()
    steering = {class_name(RetryError): RetryError.__name__, class_name(NoRetry): NoRetry.__name__}
    code = next((steering[name] for name in classes if name in steering),
                next((name for name in classes if name in names), classes[0]))
    return AttemptEnded(now, task_id, run.tasks[task_id].attempt, FAILED, reason, code, error=error,
                        final=code == NoRetry.__name__, inputs=inputs)


def note_secrets(run: Run, end: AttemptEnded) -> AttemptEnded:
    """Return an end that says which of its outputs hold a secret, and so are not stored as they are."""
    found = {key: "secret" for key, value in (end.output or {}).items()
             if masked({key: value}, run.secrets) != {key: value}} if run.secrets else {}
    return end._replace(unsaved={**end.unsaved, **found}) if found else end


def attempt_unkillable(run: Run, task_id: str, now: float, stopping: str, what: str) -> AttemptEnded:
    """Return the end of an attempt that SIGKILL did not end: no other will be beside `what` it is."""
    status = CANCELLED if run.cancel and stopping == run.cancel.reason else FAILED
    return AttemptEnded(now, task_id, run.tasks[task_id].attempt, status,
                        f"{stopping}; unkillable: {what} is given up", "unkillable", final=True)


def attempt_unstartable(run: Run, task_id: str, now: float, reason: str, code: Optional[int]) -> AttemptEnded:
    """Return the end of an attempt that never came to be; without a retry unless retry_on names `code`."""
    return AttemptEnded(now, task_id, run.tasks[task_id].attempt, FAILED, reason, code, final=True)


# ============================================================================
# == 15. JOBS: what is an attempt to a cluster, and what does the cluster say of it?
# ============================================================================
# An attempt that is a job has three files beside each other on the disk that all machines share: what is to
# be executed (.job), who executes it (.began), and how it ended (.end), which comes by a rename, as the last
# act.  Those files are the truth.  Slurm is asked only whether a job that has left no end is still there.
#
# .began is made by whoever is first, by O_EXCL: the job when it begins, or the engine when it gives the
# attempt up.  So no attempt runs twice, however many jobs a controller that did not answer has made of it,
# and one that has been given up does not run at all when it comes to light again.
#
# Nothing of a flow stands in the job script, which Slurm copies to a place of its own, but the quoted path of
# these files.  The environment of the engine goes with the job by itself; what is different in an attempt's
# own is in its .job.

#: What a job executes.  It leads no process of the attempt, so that it outlives them and can tell of their
#: end: SIGTERM ends them with grace, SIGINT at once, and so does their time.
JOB_PROGRAM = """
import collections, json, os, signal, subprocess, sys, tempfile, time

told = [signal.SIGCHLD, signal.SIGTERM, signal.SIGINT]
signal.pthread_sigmask(signal.SIG_BLOCK, told)
base, began = sys.argv[1], time.time()
os.dup2(1, 2)
try:
    fd = os.open(base + ".began", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
except FileExistsError:
    sys.exit("this attempt has been given up, or another job is at it")
os.write(fd, ("%(SLURM_JOB_ID)s;%(SLURM_CLUSTER_NAME)s" % collections.defaultdict(str, os.environ)).encode())
os.close(fd)
with open(base + ".job", encoding="ascii") as file:
    job = json.load(file)


def finish(code, **told):
    end = {"code": code, "began": began, "ended": time.time(), **told}
    for wait in 1, 2, 4, 8, 16, 32, 0:
        try:
            fd = os.open(base + ".end.part", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(fd, "w", encoding="ascii") as file:
                json.dump(end, file)
                file.flush()
                os.fsync(fd)
            os.replace(base + ".end.part", base + ".end")
            break
        except OSError as exc:
            print("the end of this attempt can't be recorded:", exc, file=sys.stderr, flush=True)
            time.sleep(wait)
    sys.exit(code if code >= 0 else 128 - code)


def send(*numbers):
    for number in numbers:
        try:
            os.killpg(child.pid, number)
        except OSError:
            pass


def some_live():
    for name in os.listdir("/proc"):
        try:
            with open("/proc/%s/stat" % name, "rb") as file:
                state, _, group = file.read().rpartition(b")")[2].split()[:3]
        except OSError:
            continue
        if int(group) == child.pid and state not in (b"Z", b"X"):
            return True
    return False


try:
    os.chdir(job["cwd"])
    with tempfile.TemporaryFile() if job["stdin"] else open(os.devnull, "r+b") as stdin:
        stdin.write(os.fsencode(job["stdin"]))
        stdin.seek(0)
        child = subprocess.Popen(
            job["argv"], env={**os.environ, **job["env"]}, stdin=stdin, start_new_session=True,
            preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, told))
except (OSError, ValueError) as exc:
    finish(127 if isinstance(exc, FileNotFoundError) else 126, cannot=str(exc))
why, kill_at, grace_s, asked = None, None, job["grace_s"], False
stop_at = None if job["timeout_s"] is None else time.monotonic() + job["timeout_s"]
while child.poll() is None:
    wait = min([3600] + [at - time.monotonic() for at in (stop_at, kill_at) if at is not None])
    info = signal.sigtimedwait(told, max(0, wait))
    number, now = info.si_signo if info else None, time.monotonic()
    asked = number in (signal.SIGTERM, signal.SIGINT)
    if why is None and child.poll() is None and (asked or stop_at is not None and now >= stop_at):
        why, stop_at, kill_at = "signal" if asked else "timeout", None, now + grace_s
        send(signal.SIGTERM, signal.SIGCONT)
    if number == signal.SIGINT or kill_at is not None and now >= kill_at:
        kill_at = None
        send(signal.SIGKILL)
if why is None and child.returncode and (asked or signal.sigtimedwait([signal.SIGTERM], 0.1)):
    why = "signal"                       # which Slurm sends to all of the job, one after another
if why is None and some_live():
    send(signal.SIGTERM, signal.SIGCONT)
    kill_at = time.monotonic() + grace_s
kill_at = kill_at or time.monotonic()
while some_live() and time.monotonic() < kill_at + 5:
    if time.monotonic() >= kill_at:
        send(signal.SIGKILL)
    time.sleep(0.02)
finish(child.returncode, why=why)
"""


def job_script(python: str, base: str) -> str:
    """Return the script of a job whose files begin with `base`, for the standard input of sbatch."""
    import shlex
    return f"#!/bin/sh\nexec {shlex.quote(python)} -I -S -c {shlex.quote(JOB_PROGRAM)} {shlex.quote(base)}\n"


def job_spec(run: Run, task: Task, invocation: Invocation, environ: Mapping[str, str]) -> str:
    """Return the text of a .job; of the environment what differs from `environ`, which the job has anyway.

    It lacks the engine's mark: a job is not to end with its engine.
    """
    own = {*run.plan.flow.env, *task.env}
    env = {name: value for name, value in invocation.env.items()
           if name in own or name != "MINIFLOW_COOKIE" and environ.get(name) != value}
    return json.dumps({"argv": invocation.argv, "env": env, "cwd": invocation.cwd,
                       "stdin": invocation.stdin or "", "timeout_s": task.timeout_s, "grace_s": task.grace_s})


def job_minutes(task: Task) -> Optional[int]:
    """Return the time limit that Slurm is given, if any: beyond the attempt's own, which the job keeps."""
    if "time_s" in task.resources:
        return int(-(-task.resources["time_s"] // 60))
    return None if task.timeout_s is None else int(-(-(task.timeout_s + task.grace_s) // 60)) + 2


def job_name(run_id: str) -> str:
    """Return the name of all jobs of a run."""
    return f"mf:{run_id}"


def job_comment(task_id: str, attempt: int, place: str) -> str:
    """Return the comment of a job: which attempt it is, and of the run in which directory."""
    return f"{task_id}.{attempt} {zlib.crc32(place.encode('utf-8', 'surrogateescape')):08x}"


def sbatch_argv(run_id: str, task: Task, comment: str, log: str, cwd: str) -> List[str]:
    """Return the call that submits a job, whose script it reads from its standard input."""
    # In the name of an output file Slurm replaces %j and the like, unless there is a backslash in it.
    output = log.replace("\\", "\\\\") if "\\" in log else log.replace("%", "%%")
    argv = ["sbatch", "--parsable", "--no-requeue", "--export=ALL", "--open-mode=append", "--nodes=1",
            "--ntasks=1", f"--job-name={job_name(run_id)}", f"--comment={comment}", f"--output={output}",
            f"--chdir={cwd}"]
    minutes = job_minutes(task)
    options = {"--time": minutes, "--cpus-per-task": task.resources.get("cpus"),
               "--mem": task.resources.get("memory_mb"), "--partition": task.resources.get("partition"),
               "--gpus": task.resources.get("gpus")}
    return argv + [f"{option}={value}" for option, value in options.items() if value is not None]


def parse_submitted(text: str) -> Optional[str]:
    """Return the job that sbatch has told of, with ;cluster if it named one; None if it told of none."""
    match = re.fullmatch(r"(?s:.*\n)?([0-9]+(?:;[\w.-]+)?)\s*", text)
    return match[1] if match else None


#: What sbatch says where the job may or may not have come to be, and where there are too many for now.
_NO_ANSWER = r"(?i)contact|connect|timed out|temporarily|zero bytes|try again|not responding"
_TOO_MANY = r"(?i)limit|policy|too many"
_NEVER = r"(?i)time limit is invalid|time limit specification required"       # which no waiting changes


def judge_refusal(code: Optional[int], said: str) -> str:
    """Return what a submission that gave no job may mean: no answer, too many, or refused."""
    if not code or re.search(_NO_ANSWER, said):
        return "no answer"
    return "too many" if re.search(_TOO_MANY, said) and not re.search(_NEVER, said) else "refused"


#: The states of jobs that squeue still tells of, though they are over.
_ENDED = frozenset(["BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
                    "PREEMPTED", "REVOKED", "TIMEOUT"])


class Queued(NamedTuple):
    """What squeue says of one job."""

    job: str
    state: str
    task: str
    attempt: int

    @property
    def is_live(self) -> bool:
        """True if the job waits, runs, or is about to end."""
        return self.state not in _ENDED


def squeue_argv(run_id: str, uid: int, clusters: Collection[str]) -> List[str]:
    """Return the call that asks for all jobs of a run."""
    where = ["-M", ",".join(sorted(clusters))] if clusters else ["-h"]     # with -M heads name them
    return ["squeue", *where, "-t", "all", "-u", str(uid), "-n", job_name(run_id), "-o", "%i|%T|%k"]


def parse_queue(text: str, place: str) -> List[Queued]:
    """Return what squeue has told of the jobs of a run in `place`; raise ValueError if it told odd things."""
    found, cluster = [], ""
    for line in text.splitlines():
        match = re.fullmatch(r"([0-9]\S*)\|([A-Z_]+)\|(.*)", line)
        if line.startswith("CLUSTER: "):
            cluster = ";" + line[9:].strip()
        elif match:
            name, dot, number = match[3].split(" ")[0].rpartition(".")
            if dot and number.isdecimal() and match[3] == job_comment(name, int(number), place):
                found.append(Queued(match[1] + cluster, match[2], name, int(number)))
        elif line.strip() and not line.startswith("JOBID|"):
            raise ValueError(f"squeue: {shown(line)} tells of no job")
    return found


def scancel_argvs(jobs: Iterable[str], word: str) -> Iterator[List[str]]:
    """Yield the calls that end jobs: by TERM with grace, by KILL at once, by CANCEL where they wait."""
    groups: Dict[str, List[str]] = {}
    for job in jobs:
        number, _, cluster = job.partition(";")
        groups.setdefault(cluster, []).append(number)
    how = {"TERM": ["--signal=TERM", "--batch"], "KILL": ["--signal=INT", "--batch"], "CANCEL": []}[word]
    for cluster, numbers in sorted(groups.items()):
        yield ["scancel", "--quiet", *(["-M", cluster] if cluster else []), *how, *sorted(numbers)]


def job_end(run: Run, task_id: str, now: float, end: Mapping[str, Any],
            output: Callable[[], Mapping[str, Any]]) -> AttemptEnded:
    """Return how the running attempt of a task ended, by the .end that its job has left."""
    task, task_run = run.defs[task_id], run.tasks[task_id]
    code, why, limit = int(end["code"]), end.get("why"), task.resources.get("time_s")
    if "cannot" in end:
        return attempt_unstartable(run, task_id, now, f"cannot start: {end['cannot']}", code)
    if why == "signal" and task_run.stopping is None:
        if limit is not None and end["ended"] - end["began"] >= limit:
            return AttemptEnded(now, task_id, task_run.attempt, FAILED,
                                f"Slurm's time limit of {limit:g} s is over", "timeout")
        return AttemptEnded(now, task_id, task_run.attempt, FAILED, "ended by Slurm: somebody has cancelled "
                            "its job, or it was preempted", 143)
    stopping = f"timeout after {task.timeout_s or 0:g} s" if why == "timeout" else task_run.stopping
    return attempt_end(run, task_id, now, code, stopping if why else None, output)


def job_lost(run: Run, task_id: str, now: float, job: Optional[str], state: Optional[str]) -> AttemptEnded:
    """Return the end of a running attempt whose job has left none and is not there any more."""
    task_run = run.tasks[task_id]
    if task_run.stopping:
        return attempt_end(run, task_id, now, -15, task_run.stopping, dict)
    told = f"job {job} {'is not there any more' if state is None else f'is {state}'}, and has left no end"
    return AttemptEnded(now, task_id, task_run.attempt, FAILED, f"lost by Slurm: {told}")


# ============================================================================
# == 16. TEXT: how is a value made fit to be seen?
# ============================================================================
# Text that came from a flow or a task is shown with its control characters written as escapes, so that it
# can't drive a terminal, nor turn the direction of what stands around it.  How many columns it takes there is
# not its length: a Chinese character takes two, an accent of its own none.

_UNSAFE = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"


def safe(text: Any) -> str:
    """Return `text` with every character that could drive a terminal written as an escape."""
    text = str(text)
    return text if text.isprintable() else re.sub(
        _UNSAFE, lambda m: f"\\x{ord(m[0]):02x}" if ord(m[0]) < 256 else f"\\u{ord(m[0]):04x}", text)


def one_line(text: Any) -> str:
    """Return `text` safe to show and on one line."""
    return " ".join(safe(text).split())


def width_of(text: str) -> int:
    """Return how many columns a text takes on a terminal."""
    if text.isascii():
        return len(text)
    import unicodedata
    return sum(0 if unicodedata.category(char) in ("Mn", "Me", "Cf") else
               2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def clip(text: str, width: int, mark: str = "…") -> str:
    """Return `text` cut to `width` columns; where it is cut, `mark` is its end."""
    if width_of(text) <= width:
        return text
    taken, kept = width_of(mark), ""
    for char in text:
        taken += width_of(char)
        if taken > width:
            break
        kept += char
    return kept + mark if width >= width_of(mark) else ""


def padded(text: str, width: int) -> str:
    """Return `text` with as many blanks behind it as it takes to fill `width` columns."""
    return text + " " * (width - width_of(text))


def wrapped(text: str, width: int, indent: str) -> str:
    """Return `text` in lines of at most `width` columns where its blanks allow; the rest is indented."""
    lines, line = [], ""
    for word in re.findall(r"\s*\S+", text):
        if line.strip() and width_of(line) + width_of(word) > width:
            lines.append(line)
            word = indent + word.lstrip()
            line = ""
        line += word
    return "\n".join([*lines, line])


def format_span(seconds: Optional[float]) -> str:
    """Return a duration for people: 0.42 s, 12.3 s, 3 min 20 s, 2 h 5 min."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"


def format_table(rows: Sequence[Sequence[Any]]) -> str:
    """Return rows, the first of them the heading, as columns; a last column may be of any width."""
    cells = [["-" if cell is None else safe(cell).replace("\n", " ") for cell in row] for row in rows]
    widths = [max(width_of(row[n]) for row in cells) for n in range(len(cells[0]))]
    return "\n".join("  ".join(padded(cell, width) for cell, width in zip(row, widths)).rstrip()
                     for row in cells)


def format_counts(statuses: Iterable[str]) -> str:
    """Return how many there are of each state of a task: 3 success, 1 failed."""
    counts: Dict[str, int] = {}
    for status in statuses:
        counts[status] = counts.get(status, 0) + 1
    return ", ".join(f"{counts[state]} {state}" for state in (*TASK_STATES, INTERRUPTED) if state in counts)


# ============================================================================
# == 17. EXPORTERS: how does a plan look in other languages?
# ============================================================================
# An exporter turns a plan into text in one pass; nobody edits the text afterwards.  What a language can't
# express is named and refused, never dropped in silence.

class Exported(NamedTuple):
    """A plan in another language, and in words whatever of it that language does otherwise."""

    text: str
    losses: Tuple[str, ...] = ()
    is_program: bool = False                   # it can be executed


#: Python for what exporters write: reads what a task has written to $MINIFLOW_OUTPUT as parse_output() does.
#: There is no single quote in it, as it stands between two in a bash script.
OUTPUT_READER = r'''
def members(pairs):
    if len(dict(pairs)) != len(pairs):
        raise ValueError("duplicate keys")
    return dict(pairs)


def constant(word):
    raise ValueError(word + " is not JSON")


def decimal(text, kind=float):
    if len(text) > 308 or float(text) in (float("inf"), -float("inf")):
        raise ValueError("a number is too large")
    return kind(text)


def check(value, depth=0):
    if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
        raise ValueError("a NUL character, or half of a surrogate pair")
    if isinstance(value, (dict, list)):
        if depth >= 64:
            raise ValueError("nested deeper than 64 levels")
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            check(part, depth + 1)


def parse(text):
    try:
        value = json.loads(text, object_pairs_hook=members, parse_constant=constant, parse_float=decimal,
                           parse_int=lambda text: decimal(text, int))
    except RecursionError:
        raise ValueError("nested deeper than 64 levels") from None
    check(value)
    return value


def read_lines(text):
    lines, found, at = text.replace("\r\n", "\n").split("\n"), {}, 0
    while at < len(lines):
        line, at = lines[at], at + 1
        name, equals, value = line.partition("=")
        head, heredoc, mark = line.partition("<<")
        if heredoc and len(head) < len(name):
            if mark not in lines[at:]:
                raise ValueError("line %d opens what no line closes" % at)
            end = lines.index(mark, at)
            name, value, at = head, "\n".join(lines[at:end]), end + 1
        elif not line:
            continue
        elif not equals:
            raise ValueError("line %d is neither a JSON object nor name=value" % at)
        if not name:
            raise ValueError("line %d has no name" % at)
        found[name] = value
    return found


def read_output(path):
    with open(path, "rb") as file:
        content = file.read(2**24 + 1)
    if len(content) > 2**24:
        raise ValueError("more than %d bytes; write a file and hand on its path" % 2**24)
    is_json = content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")
    return (parse if is_json else read_lines)(content.decode("utf-8-sig"))

'''


#: Language -> what takes a plan, its params and the tasks directory, and returns it in that language; raises
#: UsageError with all that can't be said in it.
EXPORTERS: Dict[str, Callable[[Plan, Mapping[str, Any], str], Exported]] = {}


def exporter(name: str) -> Callable[[Any], Any]:
    """Enter the decorated function into EXPORTERS under `name`."""
    def enter(function: Any) -> Any:
        EXPORTERS[name] = function
        return function
    return enter


def left_to_miniflow(plan: Plan) -> Iterator[str]:
    """Yield what a language does otherwise that runs all tasks at once, and where it runs itself."""
    if plan.flow.schedule:
        yield "schedule: it runs once, when it is started"
    for task in plan.flow.tasks:
        if task.executor not in (None, LOCAL):
            yield f"task {task.id}: executor {task.executor} is left out: it runs where all the others do"


def schedule_losses(flow: Flow, words: Sequence[str], catchups: Sequence[str], overlaps: Sequence[str]
                    ) -> Iterator[str]:
    """Yield what does not carry over of a schedule into an engine that has one, which may be by `words`."""
    for n, schedule in enumerate(flow.schedule):
        if n or not any(getattr(schedule, word) for word in words):
            yield f"schedule[{n}]: left out; there is one, by {' or '.join(words)}, and the first counts"
            continue
        if schedule.params:
            yield f"schedule[{n}].params: left out; a scheduled run has the params' defaults"
        if schedule.jitter_s:
            yield f"schedule[{n}].jitter_s: left out; runs start at the time itself"
        if schedule.catchup not in catchups:
            yield f"schedule[{n}].catchup: {schedule.catchup} is not known there; it is {catchups[0]}"
        if schedule.overlap not in overlaps:
            yield f"schedule[{n}].overlap: {schedule.overlap} is not known there; it is {overlaps[0]}"


def describe_action(task: Task) -> str:
    """Return what a task does, on one line."""
    action = task.action
    if isinstance(action, Script):
        return f"script {action.path}"
    if isinstance(action, Function):
        return f"function {action.name}"
    if isinstance(action, Http):
        return f"http {action.request.get('method', 'GET')} {shown(action.request['url'])}"
    if isinstance(action, WaitFor):
        return "wait_for " + ", ".join(f"{name} {shown(value)}" for name, value in action.condition.items())
    if isinstance(action, SubFlow):
        return f"flow {action.flow}"
    text = action.command if isinstance(action.command, str) else " ".join(action.command)
    return "command " + (text if len(text) <= 50 and text.isprintable() else shown(text, 50))


# ============================================================================
# == 18. LAYERS: where does each task of a plan stand in a picture?
# ============================================================================
# A picture is made in Sugiyama's four steps.  A task stands one layer behind the last that it waits for.  A
# line that passes layers gets a place in each of them, one for all lines from the same task.  The places of a
# layer are sorted by the mean of their neighbours' places, to and fro, and the order with the fewest
# crossings is kept.  At last each layer is put as near to its neighbours' middle as its order allows, which
# is a problem of least squares that one pass over the layer solves (pool adjacent violators).
#
# Tasks that all wait for the same tasks get a joint: n + m lines instead of n * m, without which layers of a
# hundred tasks would be a black square.  Handlers come after all tasks, so their lines would say nothing;
# they stand at the end, without lines.

if TYPE_CHECKING:
    Node = Any                                 # a task's id, (number,) for a joint, or (node, layer)


class Look(NamedTuple):
    """How a task of a run is to look: its state, and what else there is to say of it."""

    status: str
    told: str = ""


class Layers(NamedTuple):
    """The nodes of a picture by layer, and which of them lines connect."""

    rows: List[List[Node]]
    above: Dict[Node, List[Node]]
    below: Dict[Node, List[Node]]
    edges: List[Tuple[Node, Node]]             # from a task or a joint to another, however far
    long: List[Tuple[Node, Node]]              # those of them that pass no node between


def looks_of(run: Run, live: bool = True) -> Dict[str, Look]:
    """Return how each task of a run stands; in one that is not `live` nothing runs any more."""
    looks = {}
    for name in run.plan.order:
        task_run = run.tasks[name]
        status = INTERRUPTED if task_run.status == RUNNING and not live else task_run.status
        took = span(task_run.started, task_run.finished)
        told = [format_span(took)] if took is not None else []
        told += [f"{len(task_run.attempts)} attempts"] if len(task_run.attempts) > 1 else []
        if name in run.groups:
            told.append(format_counts(run.tasks[each].status for each in run.groups[name]))
        told += [one_line(task_run.reason)] if task_run.reason else []
        looks[name] = Look(status, ", ".join(told))
    return looks


def levels_of(plan: Plan) -> Dict[str, int]:
    """Return on which level each task stands, from 1 on; handlers, which come after all, on none."""
    level: Dict[str, int] = {}
    for name in plan.order:
        if not plan.tasks[name].handler:
            level[name] = 1 + max((level[up] for up in plan.tasks[name].depends_on), default=0)
    return level


def marks_of(task: Task) -> List[str]:
    """Return what is unusual about when, how often and with what effect a task runs."""
    marks = [f"if {one_line(task.condition)}"] if task.condition is not None else []
    if task.many:
        marks.append(task.many + (f", {task.max_parallel} at once" if task.max_parallel else ""))
    marks += [task.trigger_rule] if task.trigger_rule != "all_success" else []
    return marks + (["allow_failure"] if task.allow_failure and not task.handler else [])


_LONG = 30                                     # a line over more layers than this is drawn straight
_SWEEPS = 8


def _nodes_and_edges(plan: Plan, joints: bool) -> Tuple[Dict[Node, int], List[Tuple[Node, Node]]]:
    """Return how deep each node lies, and the lines between them; with `joints`, of which there are few."""
    level = levels_of(plan)
    depth: Dict[Node, int] = {name: 2 * number for name, number in level.items()}
    alike: Dict[Tuple[str, ...], List[str]] = {}
    for name in level:
        upstream = sorted(set(plan.tasks[name].depends_on), key=plan.rank.__getitem__)
        alike.setdefault(tuple(upstream), []).append(name)
    edges: List[Tuple[Node, Node]] = []
    for number, (ups, downs) in enumerate(alike.items()):
        if joints and len(ups) * len(downs) > len(ups) + len(downs):
            joint = (number,)
            depth[joint] = depth[downs[0]] - 1
            edges += [(up, joint) for up in ups] + [(joint, down) for down in downs]
        else:
            edges += [(up, down) for down in downs for up in ups]
    return depth, edges


def make_layers(plan: Plan, joints: bool) -> Layers:
    """Return the layers of a plan, with a place in each for the lines that pass it."""
    depth, edges = _nodes_and_edges(plan, joints)
    number = {deep: n for n, deep in enumerate(sorted(set(depth.values())))}
    layer = {node: number[deep] for node, deep in depth.items()}
    long = [(up, down) for up, down in edges if layer[down] - layer[up] > _LONG]
    above, below = ({node: [] for node in depth} for _ in range(2))     # type: Dict[Node, List[Node]], Any
    layers = Layers([[] for _ in number], above, below, edges, long)
    for node, n in layer.items():
        layers.rows[n].append(node)
    ends: Dict[Node, List[Node]] = {}
    for up, down in edges:
        if layer[down] - layer[up] <= _LONG:
            ends.setdefault(up, []).append(down)
    for up, downs in ends.items():
        chain = [up]
        for n in range(layer[up] + 1, max(layer[down] for down in downs)):
            chain.append((up, n))
            layers.rows[n].append(chain[-1])
            above[chain[-1]], below[chain[-1]] = [chain[-2]], []
            below[chain[-2]].append(chain[-1])
        for down in downs:
            last = chain[layer[down] - layer[up] - 1]
            below[last].append(down)
            above[down].append(last)
    return layers


def count_crossings(layers: Layers) -> int:
    """Return how many pairs of lines between neighbouring layers cross."""
    from bisect import bisect_right, insort
    total = 0
    for upper, lower in zip(layers.rows, layers.rows[1:]):
        place = {node: n for n, node in enumerate(lower)}
        seen: List[int] = []
        for node in upper:
            ends = sorted(place[down] for down in layers.below[node])
            total += sum(len(seen) - bisect_right(seen, end) for end in ends)
            for end in ends:
                insort(seen, end)
    return total


def _mean(near: Sequence[Node], place: Mapping[Node, float], otherwise: float) -> float:
    """Return the mean of the places of nodes, of which there may be none."""
    return sum(place[other] for other in near) / len(near) if near else otherwise


def sort_layers(layers: Layers) -> None:
    """Put the nodes of each layer into an order with few crossings."""
    best, fewest = [list(row) for row in layers.rows], count_crossings(layers)
    for sweep in range(_SWEEPS):
        near = layers.below if sweep % 2 else layers.above
        place: Dict[Node, float] = {}
        for row in reversed(layers.rows) if sweep % 2 else layers.rows:
            mean = {node: _mean(near[node], place, n) for n, node in enumerate(row)}
            row.sort(key=mean.__getitem__)
            place.update((node, n) for n, node in enumerate(row))
        crossings = count_crossings(layers)
        if crossings < fewest:
            best, fewest = [list(row) for row in layers.rows], crossings
        if not fewest:
            break
    layers.rows[:] = best


def _spread(wanted: Sequence[float], weights: Sequence[float], sizes: Sequence[int], gap: int) -> List[float]:
    """Return where things of these sizes have their middles: in order, apart, and nearest to where wanted."""
    offsets, offset = [], 0
    blocks: List[List[float]] = []             # weighted sum, weight and number of things that touch
    for n, (want, weight) in enumerate(zip(wanted, weights)):
        offset += (sizes[n - 1] + sizes[n]) // 2 + gap if n else 0
        offsets.append(offset)
        blocks.append([weight * (want - offset), weight, 1])
        while len(blocks) > 1 and blocks[-2][0] * blocks[-1][1] >= blocks[-1][0] * blocks[-2][1]:
            last = blocks.pop()
            blocks[-1] = [a + b for a, b in zip(blocks[-1], last)]
    places = [round(total / weight) for total, weight, number in blocks for _ in range(int(number))]
    return [place + offset for place, offset in zip(places, offsets)]


def place_layers(layers: Layers, size: Mapping[Node, int], small: int, gap: int) -> Dict[Node, float]:
    """Return where in its layer each node has its middle, from 0 on; a node without `size` is `small`."""
    at: Dict[Node, float] = {}
    sizes = [[size.get(node, small) for node in row] for row in layers.rows]
    weights = [[1 if node in size else 8 for node in row] for row in layers.rows]
    for turn in range(_SWEEPS + 2):
        near = (layers.above, layers.below)[turn % 2]
        numbers = range(len(sizes))
        for n in reversed(numbers) if turn % 2 else numbers:
            wanted = [_mean(near[node], at, at.get(node, 0)) for node in layers.rows[n]]
            at.update(zip(layers.rows[n], _spread(wanted, weights[n], sizes[n], gap)))
    first = min(at[node] - size.get(node, small) // 2 for node in at)
    return {node: place - first for node, place in at.items()}


# ============================================================================
# == 19. GRAPHS: how does a plan look as a picture?
# ============================================================================
# The same layers serve SVG, from left to right in pixels, and text, from top to bottom in columns.  In a text
# each line between two layers gets a row of its own, above those whose ends it would run into.  Where no
# such order of rows exists, or the picture is too wide, there is the list alone, which says everything.

# -- a picture in text --

class Glyphs(NamedTuple):
    """What a picture in text is drawn with: `lines` has a character for each set of directions it goes in."""

    lines: str                                 # up 1, down 2, left 4, right 8
    arrow: str
    marks: Mapping[str, str]                   # of the states of a task
    bar: str
    failed: str
    rest: str
    cut: str


GLYPHS = Glyphs(" │││─┘┐┤─└┌├─┴┬┼", "▼", {
    PENDING: "·", RUNNING: "▶", RETRYING: "↻", SUCCESS: "✓", CACHED: "=", SKIPPED: "-", FAILED: "✗",
    UPSTREAM_FAILED: "!", CANCELLED: "■", INTERRUPTED: "?"}, "█", "▒", "·", "…")
ASCII_GLYPHS = Glyphs(" |||-+++-+++-+++", "v", {
    PENDING: ".", RUNNING: ">", RETRYING: "~", SUCCESS: "+", CACHED: "=", SKIPPED: "-", FAILED: "x",
    UPSTREAM_FAILED: "!", CANCELLED: "#", INTERRUPTED: "?"}, "#", "x", ".", "~")
_UP, _DOWN, _LEFT, _RIGHT = 1, 2, 4, 8


class _Net(NamedTuple):
    """Lines between two layers that are drawn as one: from each of the columns `tops` to each of `ends`."""

    tops: List[int]
    ends: List[int]

    @property
    def first(self) -> int:
        """The leftmost column."""
        return min(self.tops + self.ends)

    @property
    def last(self) -> int:
        """The rightmost column."""
        return max(self.tops + self.ends)

    @property
    def is_straight(self) -> bool:
        """True if it goes down in one column, and needs no row to turn in."""
        return self.first == self.last


def _nets(row: List[Node], layers: Layers, at: Mapping[Node, float]) -> List[_Net]:
    """Return the lines from a layer to the next; those that go to the same nodes are one.

    Each reaches a node in a column of its own: lines that met above it could be read as going on in another.
    """
    tops: Dict[FrozenSet[Node], List[int]] = {}
    for node in row:
        if layers.below[node]:
            tops.setdefault(frozenset(layers.below[node]), []).append(int(at[node]))
    reach: Dict[Node, List[FrozenSet[Node]]] = {}
    for downs in sorted(tops, key=lambda downs: sum(tops[downs]) / len(tops[downs])):
        for down in downs:
            reach.setdefault(down, []).append(downs)
    return [_Net(tops[downs], sorted(int(at[down]) + 2 * reach[down].index(downs) - len(reach[down]) + 1
                                     for down in downs)) for downs in tops]


def _tracks(nets: List[_Net]) -> Optional[List[int]]:
    """Return in which row below the layer each net turns; None: there is no way without ambiguity."""
    before = [[k for k, other in enumerate(nets) if k != n and set(net.ends) & set(other.tops)]
              for n, net in enumerate(nets)]   # which come from where this one goes to
    track: Dict[int, int] = {}
    while len(track) < len(nets):
        free = [n for n in range(len(nets)) if n not in track and all(k in track for k in before[n])]
        if not free:
            return None
        n = min(free, key=lambda n: (nets[n].last - nets[n].first, n))
        row = -1 if nets[n].is_straight else 1 + max((track[k] for k in before[n]), default=-1)
        while any(track[k] == row and nets[k].first <= nets[n].last + 1 and nets[n].first <= nets[k].last + 1
                  for k in track if row >= 0):
            row += 1
        track[n] = row
    return [track[n] for n in range(len(nets))]


def _draw_nets(nets: List[_Net], tracks: List[int], width: int, glyphs: Glyphs) -> List[List[str]]:
    """Return the rows of characters between two layers; where lines cross, the upright one is above."""
    height = 1 + max(tracks)
    bits = [[0] * width for _ in range(height + 1)]
    for net, row in zip(nets, tracks):
        for x in range(net.first, net.last + 1) if not net.is_straight else ():
            bits[row][x] |= (_LEFT if x > net.first else 0) | (_RIGHT if x < net.last else 0)
        turns = [] if net.is_straight else [(x, _UP) for x in net.tops] + [(x, _DOWN) for x in net.ends]
        for x, direction in turns:
            bits[row][x] |= direction
    for net, row in zip(nets, tracks):
        for x, y in chain(((x, y) for x in net.tops for y in range(row)),
                          ((x, y) for x in net.ends for y in range(row + 1, height + 1))):
            bits[y][x] = _UP | _DOWN
    return [[glyphs.lines[bit] for bit in row] for row in bits]


def draw_text(plan: Plan, labels: Mapping[str, str], glyphs: Glyphs, width: int) -> Optional[List[str]]:
    """Return the lines of a picture of a plan, at most `width` columns wide; None: it can't be drawn so."""
    if len(levels_of(plan)) > 200:
        return None
    layers = make_layers(plan, joints=False)
    if layers.long:
        return None
    sort_layers(layers)
    size = {}                                  # odd, so that there is a middle
    for name, label in labels.items():
        lines_in = len({frozenset(layers.below[up]) for up in layers.above[name]})
        size[name] = max(width_of(label), 2 * lines_in - 1) | 1
    at = place_layers(layers, size, 1, 2)
    if max(at[node] + size.get(node, 1) // 2 for node in at) >= width:
        return None
    lines: List[str] = []
    for n, row in enumerate(layers.rows):
        text = ""
        for node in row:
            label = labels.get(node, glyphs.lines[_UP | _DOWN])
            text = padded(text, int(at[node]) - width_of(label) // 2) + label
        lines.append(text)
        nets = _nets(row, layers, at)
        tracks = _tracks(nets)
        if tracks is None:
            return None
        if nets:
            rows = _draw_nets(nets, tracks, width, glyphs)
            tasks = [(at[node] - size[node] / 2, at[node] + size[node] / 2) for node in layers.rows[n + 1]
                     if node in size]
            for x in chain(*(net.ends for net in nets)):
                if any(left <= x <= right for left, right in tasks):
                    rows[-1][x] = glyphs.arrow
            lines += ["".join(cells) for cells in rows]
    return [line.rstrip() for line in lines]


def _list_lines(plan: Plan, looks: Mapping[str, Look], glyphs: Glyphs) -> Iterator[Tuple[str, int]]:
    """Yield a line for each level and each task, and how far its continuation is indented."""
    level, width = levels_of(plan), max(map(len, plan.order))
    blocks: Dict[int, List[str]] = {}
    for name in plan.order:
        blocks.setdefault(level.get(name, len(plan.order) + 1), []).append(name)
    for number, names in sorted(blocks.items()):
        yield str(number) if number <= len(plan.order) else "after all", 0
        for name in names:
            task, look = plan.tasks[name], looks.get(name)
            head = f"   {glyphs.marks[look.status]} " if look else "   "
            line = f"{head}{name:<{width}}  "
            indent = len(line)
            line += f"{look.status}{', ' if look.told else ''}{look.told}  " if look else ""
            line += one_line(describe_action(task))
            marks = marks_of(task)
            line += f"  [{', '.join(marks)}]" if marks else ""
            line += f"  <- {', '.join(task.depends_on)}" if task.depends_on and not task.handler else ""
            yield line + (f"  ({one_line(task.description)})" if task.description else ""), indent


def to_text_graph(plan: Plan, looks: Mapping[str, Look] = {}, glyphs: Glyphs = GLYPHS, width: int = 80
                  ) -> str:
    """Return the graph as text: a picture if it fits, and by level a list of all about the tasks."""
    flow, level = plan.flow, levels_of(plan)
    head = [f"{flow.name}: {len(plan.order)} tasks, {max(level.values(), default=0)} levels",
            flow.description, f"version {flow.version}" if flow.version else "",
            *(f"#{tag}" for tag in flow.tags)]
    labels = {name: (f"{glyphs.marks[looks[name].status]} " if name in looks else "") + name
              + ("[*]" if plan.tasks[name].many else "") for name in level}
    picture = draw_text(plan, labels, glyphs, width - 2) if len(level) > 1 else None
    lines = [wrapped("  ".join(one_line(word) for word in head if word), width, "   ")]
    if picture:
        lines += ["", *(f"  {line}".rstrip() for line in picture), ""]
    lines += [wrapped(line, width, " " * min(indent, width // 2))
              for line, indent in _list_lines(plan, looks, glyphs)]
    return "\n".join(lines)


# -- a picture in pixels --

_BOX, _NARROWEST, _ROW_GAP, _COLUMN_GAP, _JOINT = 40, 128, 14, 52, 8
_LABEL, _LABEL_WIDTH = 28, 7.9                 # characters of a name at most, and how wide one is


def _column_sides(layers: Layers) -> List[Tuple[int, int]]:
    """Return where each layer begins and ends, from left to right."""
    sides, left = [], 0.0                      # type: List[Tuple[int, int]], float
    for row in layers.rows:
        names = [min(_LABEL, len(node)) for node in row if isinstance(node, str)]
        right = left + (max(_NARROWEST, max(names) * _LABEL_WIDTH + 24) if names else 0)
        sides.append((round(left), round(right)))
        left = right + (_COLUMN_GAP if names else _COLUMN_GAP / 2)
    return sides


def layout(plan: Plan) -> Dict[str, Any]:
    """Return where the tasks of a plan stand in a picture, in pixels; made of what JSON holds.

    `tasks` has the left, top, width and height of each; `edges` the tasks that a line goes from and to (None
    for a joint, which lines to the same tasks share) and the points x, y, x, y, … that it passes.
    """
    layers = make_layers(plan, joints=True)
    sort_layers(layers)
    size = {name: _BOX for name in plan.order}
    at = place_layers(layers, size, _JOINT, _ROW_GAP)
    sides = _column_sides(layers)
    column = {node: n for n, row in enumerate(layers.rows) for node in row}
    tasks = {name: [left, at[name] - _BOX / 2, right - left, _BOX] for name in plan.order if name in column
             for left, right in [sides[column[name]]]}
    edges = []
    for up, down in layers.edges:
        points = [sides[column[up]][1], at[up]]
        for n in range(column[up] + 1, column[down]):
            if (up, n) in at:
                points += [sides[n][0], at[up, n], sides[n][1], at[up, n]]
        points += [sides[column[down]][0], at[down]]
        edges.append([up if isinstance(up, str) else None, down if isinstance(down, str) else None, points])
    behind = sides[-1][1] + _COLUMN_GAP if sides else 0
    handlers = [name for name in plan.order if name not in tasks]
    widest = max((min(_LABEL, len(name)) for name in handlers), default=0) * _LABEL_WIDTH + 24
    for n, name in enumerate(handlers):
        tasks[name] = [behind, n * (_BOX + _ROW_GAP), round(max(_NARROWEST, widest)), _BOX]
    return {"width": max(x + wide for x, _, wide, _ in tasks.values()),
            "height": max(y + high for _, y, _, high in tasks.values()), "tasks": tasks, "edges": edges}


#: The colours of states, in light and in dark; the report has the same.
STATE_STYLE = """\
:root{color-scheme:light dark;--back:#fff;--fore:#1c2128;--soft:#656d76;--line:#afb8c1;--face:#f6f8fa;
--good:#1a7f37;--bad:#cf222e;--warn:#9a6700;--busy:#0969da;--idle:#8c959f}
@media (prefers-color-scheme:dark){:root{--back:#0d1117;--fore:#e6edf3;--soft:#9198a1;--line:#4a535e;
--face:#161b22;--good:#3fb950;--bad:#f85149;--warn:#d29922;--busy:#58a6ff;--idle:#7d8590}}
.success,.cached{--state:var(--good)}.failed,.upstream_failed{--state:var(--bad)}
.retrying,.cancelled,.interrupted{--state:var(--warn)}.running{--state:var(--busy)}
.pending,.skipped{--state:var(--idle)}
"""
GRAPH_STYLE = """\
.graph{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.graph text{fill:var(--fore)}.graph .told{fill:var(--soft);font-size:10.5px}
.graph rect{fill:var(--face);stroke:var(--state,var(--line));stroke-width:1.2}
.graph .side{fill:var(--state,none);stroke:none}
.graph .upstream_failed rect,.graph .skipped rect,.graph .pending rect{stroke-dasharray:4 3}
.graph .handler rect{rx:14px}.graph .edge{fill:none;stroke:var(--line);stroke-width:1.3}
.graph .tip{fill:var(--line)}
"""


def html_text(text: Any) -> str:
    """Return a text, safe to show, as it is written in HTML and XML."""
    import html
    return html.escape(safe(text))


def _number(value: float) -> str:
    """Return a length in pixels in as few characters as it takes."""
    return f"{value:.1f}".rstrip("0").rstrip(".")


def _curve(points: Sequence[float]) -> str:
    """Return the path of a line that passes points, and is level where it leaves and reaches each of them."""
    path = f"M{_number(points[0])} {_number(points[1])}"
    for x, y, to_x, to_y in zip(points[::2], points[1::2], points[2::2], points[3::2]):
        middle = _number((x + to_x) / 2)
        path += (f"H{_number(to_x)}" if y == to_y else
                 f"C{middle} {_number(y)} {middle} {_number(to_y)} {_number(to_x)} {_number(to_y)}")
    return path


def _svg_task(task: Task, box: Sequence[float], look: Optional[Look]) -> str:
    """Return the box of a task, with its name, and below that how it stands or what is unusual about it."""
    x, y, wide, high = box
    marks = marks_of(task)
    told = f"{look.status} {look.told}" if look else ", ".join(marks) or describe_action(task)
    title = "\n".join([task.id, *([f"{look.status} {look.told}"] if look else []),
                       one_line(describe_action(task)), *marks, one_line(task.description)]).strip()
    kinds = " ".join(["task", *([look.status] if look else []), *(["handler"] if task.handler else [])])
    size = f'width="{_number(wide)}" height="{high}" rx="5"'
    shadow = f'<rect x="{_number(x + 4)}" y="{_number(y + 4)}" {size}/>' if task.many else ""
    name = clip(task.id + ("[*]" if task.many else ""), int((wide - 18) / _LABEL_WIDTH))
    return (f'<g class="{kinds}"><title>{html_text(title)}</title>{shadow}'
            f'<rect x="{_number(x)}" y="{_number(y)}" {size}/>'
            f'<rect class="side" x="{_number(x)}" y="{_number(y + 5)}" width="4" height="{high - 10}"/>'
            f'<text x="{_number(x + 12)}" y="{_number(y + 17)}">{html_text(name)}</text>'
            f'<text class="told" x="{_number(x + 12)}" y="{_number(y + 32)}">'
            f'{html_text(clip(one_line(told), int((wide - 18) / 6.4)))}</text></g>\n')


def to_svg(plan: Plan, looks: Mapping[str, Look] = {}, alone: bool = True,
           links: Mapping[str, str] = {}) -> str:
    """Return the graph as an SVG picture; one that does not stand `alone` is part of a page with its style.

    `links` are addresses within that page.
    """
    places = layout(plan)
    wide, high = places["width"] + 24, places["height"] + 28
    style = (f"<style>{STATE_STYLE}{GRAPH_STYLE}.graph .back{{fill:var(--back);stroke:none}}</style>\n"
             f'<rect class="back" x="-12" y="-12" width="{_number(wide)}" height="{_number(high)}"/>\n')
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" class="graph" width="{_number(wide)}" '
             f'height="{_number(high)}" viewBox="-12 -12 {_number(wide)} {_number(high)}">\n'
             f"<title>{html_text(one_line(f'flow {plan.flow.name}: {len(plan.order)} tasks'))}</title>\n",
             style if alone else ""]
    for _, down, points in places["edges"]:
        x, y = points[-2:]
        tip = "" if down is None else (
            f'<path class="tip" d="M{_number(x)} {_number(y)}l-7-4v8z"/>')
        parts.append(f'<path class="edge" d="{_curve(points)}"/>{tip}\n')
    for name, box in places["tasks"].items():
        drawn = _svg_task(plan.tasks[name], box, looks.get(name))
        parts.append(f'<a href="{html_text(links[name])}">{drawn}</a>' if name in links else drawn)
    return "".join(parts) + "</svg>"


# -- other languages for graphs --

def _mermaid_text(text: str) -> str:
    """Return a text as it stands within quotes in Mermaid: what is more than a letter by its number."""
    return "".join(char if char.isalnum() or char in " _.-" else f"#{ord(char)};" for char in one_line(text))


def _dot_text(text: str) -> str:
    """Return a text as it stands within quotes in Graphviz's language."""
    return one_line(text).replace("\\", "\\\\").replace('"', '\\"').replace("&", "&amp;")


def _told_lines(task: Task, look: Optional[Look]) -> List[str]:
    """Return what stands in the box of a task: its name, its state, and what is unusual about it."""
    state = [f"{look.status} {look.told}".strip()] if look else []
    return [task.id + ("[*]" if task.many else ""), *state, *marks_of(task)]


_MERMAID_BOXES = {"handler": ('(["', '"])'), "many": ('[["', '"]]'), "condition": ('{{"', '"}}'),
                  "": ('["', '"]')}
#: Fill and frame of the states in Mermaid and Graphviz, which know no variables.
_FILLS = {SUCCESS: ("#dafbe1", "#1a7f37"), CACHED: ("#dafbe1", "#1a7f37"), FAILED: ("#ffebe9", "#cf222e"),
          UPSTREAM_FAILED: ("#ffebe9", "#cf222e"), RUNNING: ("#ddf4ff", "#0969da"),
          RETRYING: ("#fff8c5", "#9a6700"), CANCELLED: ("#fff8c5", "#9a6700"),
          INTERRUPTED: ("#fff8c5", "#9a6700"), SKIPPED: ("#f6f8fa", "#8c959f"),
          PENDING: ("#f6f8fa", "#8c959f")}


def to_mermaid(plan: Plan, looks: Mapping[str, Look] = {}) -> str:
    """Return the graph as a flowchart of Mermaid; handlers come after all and have no lines."""
    lines = ["flowchart LR"]
    for name in plan.order:
        task = plan.tasks[name]
        kind = ("handler" if task.handler else "many" if task.many else
                "condition" if task.condition is not None else "")
        text = "<br/>".join(map(_mermaid_text, _told_lines(task, looks.get(name))))
        lines.append(f"  t{plan.rank[name]}{_MERMAID_BOXES[kind][0]}{text}{_MERMAID_BOXES[kind][1]}")
    lines += [f"  t{plan.rank[up]} --> t{plan.rank[name]}" for name in plan.order
              for up in plan.tasks[name].depends_on if not plan.tasks[name].handler]
    for status in sorted({look.status for look in looks.values()}):
        names = ",".join(f"t{plan.rank[name]}" for name in plan.order if looks[name].status == status)
        fill, frame = _FILLS[status]
        lines += [f"  classDef {status} fill:{fill},stroke:{frame},color:#1c2128",
                  f"  class {names} {status}"]
    return "\n".join(lines)


def to_dot(plan: Plan, looks: Mapping[str, Look] = {}) -> str:
    """Return the graph in Graphviz's language; handlers come after all and have no lines."""
    lines = [f'digraph "{_dot_text(plan.flow.name)}" {{', "  rankdir=LR",
             '  node [shape=box style="rounded,filled" fillcolor="#f6f8fa" color="#656d76" '
             'fontname="monospace"]']
    for name in plan.order:
        task, look = plan.tasks[name], looks.get(name)
        text = "\\n".join(map(_dot_text, _told_lines(task, look)))
        more = ' fillcolor="{}" color="{}"'.format(*_FILLS[look.status]) if look else ""
        more += " peripheries=2" if task.many else ""
        lines.append(f'  t{plan.rank[name]} [label="{text}"{more}]')
    lines += [f"  t{plan.rank[up]} -> t{plan.rank[name]}" for name in plan.order
              for up in plan.tasks[name].depends_on if not plan.tasks[name].handler]
    return "\n".join([*lines, "}"])


#: What `graph` can print beside text.
GRAPHS: Dict[str, Callable[[Plan, Mapping[str, Look]], str]] = {
    "mermaid": to_mermaid, "dot": to_dot, "svg": to_svg}


# ============================================================================
# == 20. BASH: how does a flow run where there is no MiniFlow?
# ============================================================================
# A script is four parts: a head, the flow as arrays by the number of the task, a function a task that says
# what is executed, and an engine that is the same for all flows: due(), apply() and judge() once more, in
# bash.  A test runs both over many flows and compares all that they did.
#
# Numbers are in topological order, so the outputs of what is upstream merge by ascending number.  An attempt
# is a child of the script that leads a process group of its own (`set -m`), so that a timeout and a signal
# reach grandchildren.  The engine waits for its children alone; what is to happen at a certain time, one
# sleep(1) at a time stands for.  What needs JSON is done by python3.
#
# `wait -n` has two gaps.  Of a child that ends just when it begins to wait, it may tell only when another one
# has ended; so there is always another one, which sleeps for a while, longer as long as nothing happens.  And
# it does not tell of a child that died by a signal if bash has told of it before: while it waits for another
# program, or when it reads its next line.  So the loop starts nothing else that it waits for, all code is in
# functions, and after a nap or a trap, which is read as well, the engine looks itself who has ended.
#
# Nothing is ever put into the text of a command.  The variables of an attempt are worked out before any of
# them is set, and those of the engine begin with mf_, as a local variable hides one that is to be handed on.

_BASH_HEAD = r'''#!/usr/bin/env bash
# Made by MiniFlow: runs the tasks of a flow, as many at once as their dependencies and -j allow.
#
#   bash THIS-FILE [-j N] [--param NAME=VALUE]...
#
# Needs bash 5.1 or newer, coreutils and, for Python scripts, for outputs and for --param, python3 (or what
# PYTHON names).  Logs and ends.tsv (task, end, attempts, reason) go below MINIFLOW_OUTPUT_DIR, by default
# ./miniflow_output; at the end ends.tsv is printed.
# Exit code: 0 success, 1 a task failed, 2 can't run, 129, 130 or 143 ended by SIGHUP, SIGINT or SIGTERM.
# shellcheck disable=SC1003,SC1112,SC2016,SC2034,SC2154,SC2317,SC2329
set -u
unset "${!mf_@}" # all variables of ours begin so, and none comes from outside
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 501)); then
    echo 'this script needs bash 5.1 or newer' >&2
    exit 2
fi
'''

#: What the engine leaves to python3: params, outputs and what templates find in them.
_BASH_PYTHON = r'''
# What is JSON, python3 reads: params, what a task hands on, and what templates find there.
mf_py='
import json, os, re, sys
verb, io, *rest = sys.argv[1:]
kinds = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list,
         "object": dict}

def load(name):
    with open(io + "/" + name, encoding="utf-8") as file:
        return json.load(file)

def save(name, value):
    new = "%s/%s.%d" % (io, name, os.getpid())
    with open(new, "w", encoding="utf-8") as file:
        json.dump(value, file)
    os.replace(new, io + "/" + name)

''' + OUTPUT_READER + r'''
def text_of(value):
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

def print_words(words):
    sys.stdout.buffer.write(b"".join(word.encode("utf-8", "surrogateescape") + b"\0" for word in words))

def is_a(kind, value):
    return isinstance(value, kinds[kind]) and isinstance(value, bool) == (kind == "boolean")

def fits(schema, value):
    if "type" in schema and not is_a(schema["type"], value):
        return False
    if "enum" in schema and not any(value == each and isinstance(value, bool) == isinstance(each, bool)
                                    for each in schema["enum"]):
        return False
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        return False
    bounds = {str: ("minLength", "maxLength"), list: ("minItems", "maxItems")}
    low, high = bounds.get(type(value), ("minimum", "maximum"))
    size = len(value) if isinstance(value, (str, list)) else value
    return not is_a("number", size) or schema.get(low, size) <= size <= schema.get(high, size)

def convert(name, text, param):
    value = text
    if param["kind"] != "string":
        try:
            value = parse(text.strip())
        except ValueError:
            value = None
        if not is_a(param["kind"], value):
            raise ValueError("--param %s: expected %s, got %s" % (name, param["form"], json.dumps(text)))
    if not fits(param["schema"], value):
        raise ValueError("params.%s: expected %s, got %s" % (name, param["fits"], json.dumps(value)))
    return value

def variable(name):
    return re.sub("[^A-Z0-9_]", "_", name.upper())

def set_params(declared, given):
    context, problems = load("context.json"), []
    params = context["params"]
    for item in given:
        name, equals, text = item.partition("=")
        if not (name and equals):
            problems.append("--param %s: expected NAME=VALUE" % json.dumps(item))
        elif declared is not None and name not in declared:
            problems.append("params.%s: there is no such param; there is %s" % (
                name, ", ".join(declared) or "none"))
        else:
            try:
                params[name] = convert(name, text, declared[name]) if declared is not None else text
            except ValueError as exc:
                problems.append(str(exc))
    names = {}
    for name in params:
        if names.setdefault(variable(name), name) != name:
            problems.append("params.%s: %s is MINIFLOW_PARAM_%s as well; rename one" % (
                name, names[variable(name)], variable(name)))
    if problems:
        sys.exit("\n".join("".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)
                           for line in problems))
    save("context.json", {"params": params, "tasks": {}, "ctx": params})
    print_words("MINIFLOW_PARAM_%s=%s" % (variable(name), text_of(value)) for name, value in params.items())

def take(task, number, path):
    try:
        found = read_output(path)
    except (ValueError, OSError) as exc:
        sys.exit("output: " + str(exc))
    if found:
        save(number + ".json", [task, found])
    os.unlink(path)

def make_context(path, numbers):
    context = load("context.json")
    for number in numbers.split():
        task, output = load(number + ".json")
        context["tasks"][task] = output
        context["ctx"].update(output)
    save(path, context)

def option(name, value):
    if value is None or value is False:
        return []
    if isinstance(value, list):
        return [word for item in value for word in option(name, item)]
    flag = ("-" if len(name) == 1 else "--") + name
    if value is True:
        return [flag]
    return [flag, text_of(value)] if len(name) == 1 else [flag + "=" + text_of(value)]

def find(context, path, source, name):
    value, steps = context[path[0]], path[1:]
    if path[0] == "tasks":
        value, steps = value.get(path[1], {}), path[2:]
    for step in steps:
        try:
            value = value[step] if isinstance(value, dict if isinstance(step, str) else list) else {}[step]
        except LookupError:
            sys.exit("%s: there is no %s" % (source, json.dumps(step)))
    words = [text_of(value)] if name is None else option(name, value)
    if any("\0" in word for word in words):
        sys.exit("%s: a NUL character can not be handed on" % source)
    return [str(len(words)), *words]

if verb == "params":
    set_params(json.loads(rest[0]), rest[1:])
elif verb == "take":
    take(*rest)
else:
    if not os.path.exists(io + "/" + rest[0]):
        make_context(rest[0], rest[1])
    context = load(rest[0])
    for query in json.loads(rest[2]):
        print_words(find(context, *query))
'
'''

_BASH_ENGINE = r'''
# ---- the engine

tell() { # line
    printf '%s\n' "$1" >&2
}

refuse() { # line: what is wrong with how the script was called, or where
    tell "$1"
    exit 2
}

tick() { # sets mf_now, in milliseconds
    mf_now=$((${EPOCHREALTIME//[!0-9]/} / 1000))
}

to_seconds() { # milliseconds: sets mf_seconds
    printf -v mf_seconds '%d.%03d' "$(($1 / 1000))" "$(($1 % 1000))"
}

# -- what a task may be told: in a process of its own, which becomes its program

give_up() { # reason, exit code: nothing can be executed, and no other attempt would help
    printf '%s' "$1" >"$mf_try.why"
    exit "$2"
}

look() { # queries: sets mf_v1, mf_v2, … to the words that they lead to in the context, once that is made
    "$mf_python" -I -S -X utf8 -c "$mf_py" look "$mf_io" "$mf_context_name" "$mf_seen" "$1" \
        >"$mf_try.words" 2>"$mf_try.why" || exit 125
    mapfile -d '' -t mf_words <"$mf_try.words"
    for ((mf_i = 0, mf_k = 1; mf_i < ${#mf_words[@]}; mf_i += 1 + mf_words[mf_i], mf_k += 1)); do
        declare -n mf_found=mf_v$mf_k
        mf_found=("${mf_words[@]:mf_i + 1:mf_words[mf_i]}")
    done
}

go() { # directory: relative to where the script was started
    [[ $1 == /* ]] || set -- "$mf_start_dir/$1"
    [[ -e $1 ]] || give_up 'cannot start: its directory is not there' 127
    cd -- "$1" || give_up 'cannot start: its directory can not be entered' 126
}

be() { # program and arguments; where exec fails, bash ends at once and tells nobody why
    if [[ $1 == */* && -e $1 ]]; then
        [[ -x $1 && ! -d $1 ]] || give_up "cannot start: ${1@Q} can not be executed" 126
    elif [[ ! $1 || $1 == */* ]] || ! type -P -- "$1" >/dev/null; then
        give_up "cannot start: ${1@Q} is not there" 127
    fi
    exec -- "$@"
}

attempt() { # number
    set +mu
    mf_try=$mf_io/$1.${mf_attempts[$1]}
    exec </dev/null >"$mf_logs/${mf_id[$1]}.${mf_attempts[$1]}.log" 2>&1 ||
        give_up 'cannot start: its log can not be written' 126
    mf_seen=${mf_sees[$1]} mf_context_name=context.json mf_env=() mf_argv=() mf_dir=''
    [[ ! $mf_seen ]] || mf_context_name=context-${mf_context_of[$mf_seen]}.json
    "task_$1"
    [[ -e $mf_io/$mf_context_name ]] || look '[]'
    if [[ ${mf_stdin+x} ]]; then
        printf '%s' "$mf_stdin" >"$mf_try.in" || give_up 'cannot start: its stdin can not be written' 126
        exec <"$mf_try.in"
    fi
    [[ ! $mf_dir ]] || go "$mf_dir"
    export "${mf_env[@]}" "${!MINIFLOW_PARAM_@}" MINIFLOW_RUN_ID="$mf_run_id" MINIFLOW_FLOW="$mf_flow" \
        MINIFLOW_TASK="${mf_id[$1]}" MINIFLOW_ATTEMPT="${mf_attempts[$1]}" TMP_DIR="$mf_io/work" \
        MINIFLOW_CONTEXT="$mf_io/$mf_context_name" MINIFLOW_OUTPUT="$mf_try.out" GITHUB_OUTPUT="$mf_try.out"
    be "${mf_argv[@]}"
}

# -- how tasks hang together

judge() { # number: sets mf_verdict to run, or to the end that its rule demands, and mf_why
    local up rule=${mf_rule[$1]:-all_success} success=0 skipped=0 failed=0 kind=skipped
    mf_verdict=run mf_why=''
    [[ ${mf_needs[$1]:-} ]] || return 0
    for up in ${mf_needs[$1]}; do
        case ${mf_counts_as[up]} in
            success) ((success += 1)) ;;
            skipped) ((skipped += 1)) ;;
            *) ((failed += 1)) ;;
        esac
    done
    case $rule in
        all_success)
            if ((failed)); then mf_verdict=upstream_failed; elif ((skipped)); then mf_verdict=skipped; fi ;;
        all_failed) if ((success + skipped)); then mf_verdict=skipped; fi ;;
        one_success)
            if ((failed && !success)); then mf_verdict=upstream_failed; fi
            if ((!failed && !success)); then mf_verdict=skipped; fi
            ;;
        one_failed | on_failure) if ((!failed)); then mf_verdict=skipped; fi ;;
        on_success) if ((failed)); then mf_verdict=skipped; fi ;;
        none_failed) if ((failed)); then mf_verdict=upstream_failed; fi ;;
        none_failed_min_one_success)
            if ((failed)); then mf_verdict=upstream_failed; elif ((!success)); then mf_verdict=skipped; fi ;;
        none_skipped) if ((skipped)); then mf_verdict=skipped; fi ;;
    esac
    case $rule:$mf_verdict in
        *:run) return 0 ;;
        on_failure:*) mf_why='no task failed' && return ;;
        on_success:*) mf_why='a task failed' && return ;;
        *:upstream_failed) kind=failed ;;
    esac
    mf_why="trigger rule $rule does not hold"
    [[ $rule != all_failed && $rule != one_failed ]] || return 0
    for up in ${mf_needs[$1]}; do
        if [[ ${mf_counts_as[up]} == "$kind" ]]; then
            mf_why="upstream ${mf_id[up]} ${kind/skipped/was skipped}"
            return 0
        fi
    done
}

is_handler() { # number
    [[ ${mf_rule[$1]:-} == @(on_success|on_failure|finally) ]]
}

queue() { # number: it is ready
    local place=${mf_place[$1]} pool=${mf_pool[$1]:-0}
    mf_ready[$1]=1
    ((mf_queued[pool] += 1))
    if ((place < mf_first_place[pool])); then mf_first_place[pool]=$place; fi
}

reach() { # number: all that it waits for has ended
    local up from seen=()
    [[ ! ${mf_end[$1]:-} ]] || return 0 # it was cancelled before
    for up in ${mf_needs[$1]:-}; do
        for from in ${mf_opens[up]}; do seen[from]=1; done
    done
    mf_sees[$1]=${!seen[*]}
    if [[ ${mf_left_out[$1]:-} ]]; then
        mf_barred+=("$1 skipped left out")
        return 0
    fi
    judge "$1"
    if [[ $mf_verdict == run ]]; then queue "$1"; else mf_barred+=("$1 $mf_verdict $mf_why"); fi
}

settle() { # number, end, reason: gives it its end, and reaches those for which it was the last to wait for
    local n=$1 as=failed why=${3//[[:cntrl:]]/ } below
    if [[ $2 == success || ${mf_left_out[n]:-} ]]; then
        as=success
    elif [[ $2 == skipped ]]; then
        as=skipped
    elif [[ ${mf_allow_failure[n]:-} ]]; then
        as=success
    elif [[ $2 != cancelled && ! $mf_red ]]; then
        mf_red=$n
    fi
    mf_end[n]=$2 mf_counts_as[n]=$as mf_opens[n]=${mf_sees[n]:-}
    ((mf_unsettled -= 1))
    is_handler "$n" || ((mf_left -= 1))
    [[ ! -e $mf_io/$n.json ]] || mf_opens[n]+=" $n"
    printf '%s\t%s\t%s\t%s\n' "${mf_id[n]}" "$2" "${mf_attempts[n]:-0}" "$why" >>"$mf_logs/ends.tsv"
    tell "$2  ${mf_id[n]}${why:+: $why}"
    for below in ${mf_feeds[n]:-}; do
        if ((--mf_missing[below] == 0)); then reach "$below"; fi
    done
}

# -- attempts

next() { # sets mf_next to the first ready task of those whose pool has room
    local pool at best=$mf_count
    mf_next=''
    for pool in "${!mf_first_place[@]}"; do
        ((mf_queued[pool] && (pool == 0 || mf_used[pool] < mf_pool_size[pool]))) || continue
        for ((at = mf_first_place[pool]; at < mf_count; at += 1)); do
            if [[ ${mf_ready[mf_at[at]]:-} && ${mf_pool[mf_at[at]]:-0} == "$pool" ]]; then break; fi
        done
        mf_first_place[pool]=$at
        if ((at < best)); then best=$at mf_next=${mf_at[at]}; fi
    done
    [[ $mf_next ]]
}

dequeue() { # number: it is not ready any more
    unset "mf_ready[$1]"
    ((mf_queued[${mf_pool[$1]:-0}] -= 1))
}

start() { # number: an attempt
    dequeue "$1"
    ((mf_attempts[$1] += 1, mf_running += 1, mf_used[${mf_pool[$1]:-0}] += 1))
    [[ ! ${mf_sees[$1]} ]] || : "${mf_context_of[${mf_sees[$1]}]:=$1}"
    set -m
    attempt "$1" &
    set +m
    mf_group[$1]=$! mf_task_of[$!]=$1
    tick
    [[ ! ${mf_timeout_ms[$1]:-} ]] || mf_due[$1]=$((mf_now + mf_timeout_ms[$1]))
}

stop() { # number, reason, TERM or KILL: sends a signal to the group of its attempt
    local grace=${mf_grace_ms[$1]:-5000}
    mf_did=1 mf_patience=25 mf_stopping[$1]=${mf_stopping[$1]:-$2}
    if [[ $3 == KILL ]]; then mf_killed[$1]=1; fi
    if [[ ! ${mf_code[$1]:-} ]]; then # else what is left of the group is looked at as before
        unset "mf_due[$1]"
        [[ $3 == KILL ]] || mf_due[$1]=$((mf_now + grace))
    fi
    signal "${mf_group[$1]}" "$3"
}

signal() { # group, TERM or KILL
    kill "-$2" -- "-$1"
    [[ $2 == KILL ]] || kill -CONT -- "-$1"
} 2>/dev/null

lives() { # group: tells whether anybody in it runs; a zombie, which nobody may ever reap, does not
    local file line
    kill -0 -- "-$1" || return 1
    [[ -e /proc/self/stat ]] || return 0
    for file in /proc/[0-9]*/stat; do
        read -r line <"$file" && line=${line##*) } && [[ $line == [!ZX]' '*([0-9])" $1 "* ]] && return 0
    done
    return 1
} 2>/dev/null

leader_ended() { # number, exit code: the attempt has ended unless something of its group runs on
    mf_code[$1]=$2 mf_ended_by[$1]=${mf_stopping[$1]:-}
    unset "mf_due[$1]"
    if lives "${mf_group[$1]}"; then
        [[ ${mf_stopping[$1]:-} ]] || signal "${mf_group[$1]}" TERM
        mf_kill_rest_at[$1]=$((mf_now + ${mf_grace_ms[$1]:-5000})) mf_due[$1]=$mf_now
    else
        attempt_ended "$1"
    fi
}

look_at_rest() { # number: its leader has ended, but others of its group have not
    if ! lives "${mf_group[$1]}" || ((mf_now >= mf_kill_rest_at[$1] + 2000)); then
        attempt_ended "$1"
    else
        ((mf_now < mf_kill_rest_at[$1])) || signal "${mf_group[$1]}" KILL
        mf_due[$1]=$((mf_now + 30))
    fi
}

leave() { # number: it takes up no slot any more
    ((mf_running -= 1, mf_used[${mf_pool[$1]:-0}] -= 1))
}

attempt_ended() { # number: nothing of it runs any more
    local n=$1 code=${mf_code[$1]} by=${mf_ended_by[$1]} try=$mf_io/$1.${mf_attempts[$1]}
    unset "mf_group[n]" "mf_due[n]" "mf_code[n]" "mf_stopping[n]" "mf_killed[n]"
    if [[ ! $by ]] && ((code == 0)) && [[ -e $try.out ]]; then
        "$mf_python" -I -S -X utf8 -c "$mf_py" take "$mf_io" "${mf_id[n]}" "$n" "$try.out" 2>"$try.why" &
        mf_task_of[$!]=$n mf_reading[n]=1
        return
    fi
    leave "$n"
    if [[ $by && $by == "$mf_cancel" ]]; then
        settle "$n" cancelled "$by"
    elif [[ $by ]]; then
        failed "$n" "$by" timeout
    elif [[ -s $try.why ]]; then
        read_why "$try"
        failed "$n" "$mf_why" "${code/#125/none}" final
    elif ((code)); then
        failed "$n" "exit $code" "$code"
    else
        settle "$n" success ''
    fi
}

output_read() { # number, exit code of what read it
    unset "mf_reading[$1]"
    leave "$1"
    if (($2 == 0)); then
        settle "$1" success ''
    else
        read_why "$mf_io/$1.${mf_attempts[$1]}"
        failed "$1" "bad output: $mf_why" none
    fi
}

read_why() { # attempt: sets mf_why
    IFS= read -r -d '' mf_why <"$1.why"
    mf_why=${mf_why%$'\n'}
}

failed() { # number, reason, what retry_on is held against, whether it is final
    local n=$1 tried=${mf_attempts[$1]} list ms
    if ((tried > ${mf_retries[n]:-0})) ||
        { [[ ${mf_retry_on[n]:-} ]] && [[ ${mf_retry_on[n]} != *" $3 "* ]]; } ||
        { [[ ${4:-} && ! ${mf_retry_on[n]:-} ]]; }; then
        settle "$n" failed "$2"
        return
    fi
    read -ra list <<<"${mf_pauses_ms[n]:-0}"
    ms=${list[tried > ${#list[@]} ? ${#list[@]} - 1 : tried - 1]}
    ((ms -= ms * ${mf_jitter[n]:-0} * (SRANDOM % 1001) / 1000000))
    to_seconds "$ms"
    tell "attempt $tried of ${mf_id[n]} failed: ${2//[[:cntrl:]]/ }; the next in $mf_seconds s"
    if ((ms == 0)); then
        queue "$n"
    else
        mf_retry_at[n]=$((mf_now + ms))
        if ((mf_next_retry == 0 || mf_retry_at[n] < mf_next_retry)); then mf_next_retry=${mf_retry_at[n]}; fi
    fi
}

queue_retries() { # those whose time has come wait for a slot among the other ready tasks
    local n
    ((mf_next_retry && mf_next_retry <= mf_now)) || return 0
    mf_next_retry=0
    for n in "${!mf_retry_at[@]}"; do
        if ((mf_retry_at[n] <= mf_now)); then
            unset "mf_retry_at[n]"
            queue "$n"
        elif ((mf_next_retry == 0 || mf_retry_at[n] < mf_next_retry)); then
            mf_next_retry=${mf_retry_at[n]}
        fi
    done
}

# -- the run

interrupt() { # exit code, signal: the first ends the run, the second all that runs, at once
    mf_signalled=1
    if [[ $mf_cancel && ! $mf_expired ]]; then
        mf_kill=1 mf_spared=''
    else
        mf_cancel="cancelled by $2" mf_exit=$1 mf_expired='' mf_spared=' finally '
    fi
}

settle_rest() { # reason: of all that does not run and is not spared
    local n
    ((mf_unsettled > mf_running)) || return 0
    for ((n = 1; n <= mf_count; n += 1)); do
        [[ ! ${mf_end[n]:-} && ! ${mf_group[n]:-} && ! ${mf_reading[n]:-} ]] || continue
        [[ $mf_spared != *" ${mf_rule[n]:-none} "* ]] || continue
        [[ ! ${mf_ready[n]:-} ]] || dequeue "$n"
        unset "mf_retry_at[n]"
        mf_did=1
        settle "$n" cancelled "$1"
    done
}

stop_all() { # that is not spared
    local n
    for n in "${!mf_group[@]}"; do
        [[ $mf_spared != *" ${mf_rule[n]:-none} "* ]] || continue
        if [[ $mf_kill && ! ${mf_killed[n]:-} ]]; then
            stop "$n" "$mf_cancel" KILL
        elif [[ ! $mf_kill && ! ${mf_stopping[n]:-} ]]; then
            stop "$n" "$mf_cancel" TERM
        fi
    done
}

settle_barred() { # those that their rules do not let run
    local entry rest entries=("${mf_barred[@]}")
    mf_barred=()
    for entry in "${entries[@]}"; do
        [[ ! ${mf_end[${entry%% *}]:-} ]] || continue
        rest=${entry#* } mf_did=1
        settle "${entry%% *}" "${rest%% *}" "${rest#* }"
    done
}

stop_late() { # attempts whose time, or whose grace, is over
    local n
    for n in "${!mf_due[@]}"; do
        ((mf_due[n] <= mf_now)) || continue
        mf_did=1
        if [[ ${mf_code[n]:-} ]]; then
            look_at_rest "$n"
        elif [[ ${mf_stopping[n]:-} ]]; then
            stop "$n" '' KILL
        else
            stop "$n" "timeout after ${mf_timeout_words[n]} s" TERM
        fi
    done
}

turn() { # does what is due, and sets mf_did if that was anything
    mf_did=''
    tick
    queue_retries
    if [[ $mf_cancel ]]; then
        settle_rest "$mf_cancel"
        stop_all
    elif ((mf_expires && mf_left && mf_expires <= mf_now)); then
        mf_cancel='run timeout' mf_exit=1 mf_expired=1 mf_spared=' on_failure finally ' mf_did=1
        return
    elif [[ $mf_red && $mf_fail_fast ]]; then
        mf_spared=' on_success on_failure finally '
        settle_rest "fail_fast: ${mf_id[mf_red]} failed"
    fi
    [[ $mf_did ]] || settle_barred
    stop_late
    [[ ! $mf_did ]] || return 0
    while ((mf_running < mf_jobs)) && next; do start "$mf_next"; done
}

set_alarm() { # has something end when the next thing is due, or patience is over; fails if that is now
    local at expires=0 soonest=$((mf_now + mf_patience))
    [[ $mf_cancel ]] || ((!mf_left)) || expires=$mf_expires
    for at in "${mf_due[@]}" "$mf_next_retry" "$expires"; do
        if ((at && at < soonest)); then soonest=$at; fi
    done
    ((soonest > mf_now)) || return 1
    if [[ $mf_alarm ]]; then
        ((soonest < mf_alarm_at)) || return 0
        disown "$mf_alarm"
        kill "$mf_alarm"
    fi
    to_seconds "$((soonest - mf_now))"
    sleep "$mf_seconds" &
    mf_alarm=$! mf_alarm_at=$soonest
} 2>/dev/null

ended() { # process, exit code
    local n=${mf_task_of[$1]:-}
    [[ $n ]] || return 0
    unset "mf_task_of[$1]"
    mf_patience=25
    if [[ ${mf_reading[n]:-} ]]; then output_read "$n" "$2"; else leader_ended "$n" "$2"; fi
}

find_ended() { # those that `wait -n` has not told of
    local pid
    for pid in "${!mf_task_of[@]}"; do
        kill -0 "$pid" 2>/dev/null && continue
        wait "$pid" 2>/dev/null
        ended "$pid" "$?"
    done
}

await() { # waits until a child has ended or a signal comes
    local code
    set_alarm || return 0
    mf_pid=''
    if [[ ! $mf_signalled ]]; then
        wait -n -p mf_pid 2>/dev/null
        code=$?
        tick
    fi
    if [[ ${mf_pid:-} && $mf_pid != "$mf_alarm" ]]; then
        ended "$mf_pid" "$code"
        return
    fi
    if [[ ${mf_pid:-} ]]; then mf_alarm='' mf_patience=$((mf_patience < 16000 ? mf_patience * 2 : 16000)); fi
    mf_signalled=''
    find_ended
}

read_options() { # arguments
    mf_jobs=$mf_max_parallel mf_given=()
    while (($#)); do
        case $1 in
            -j | --jobs | --param) [[ ${2:-} ]] || refuse "$1: its value is missing" ;;&
            -j | --jobs) mf_jobs=$2 && shift ;;
            --param) mf_given+=("$2") && shift ;;
            -j* | --jobs=*) mf_jobs=${1#--jobs=} mf_jobs=${mf_jobs#-j} ;;
            --param=*) mf_given+=("${1#--param=}") ;;
            -h | --help) echo "usage: bash $0 [-j N] [--param NAME=VALUE]..." && exit ;;
            *) refuse "${1@Q}: there is no such option; there are -j N and --param NAME=VALUE" ;;
        esac
        shift
    done
    [[ $mf_jobs ]] || mf_jobs=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) || mf_jobs=1
    [[ $mf_jobs =~ ^[1-9][0-9]{0,5}$ ]] || refuse "-j ${mf_jobs@Q}: expected a number from 1 on"
}

prepare() { # directories, variables, what is known before the first task starts
    mf_start_dir=$PWD
    mf_python=$(command -v "${PYTHON:-python3}") || mf_python=${PYTHON:-python3}
    [[ $mf_python == /* || $mf_python != */* ]] || mf_python=$mf_start_dir/$mf_python
    mf_out=${MINIFLOW_OUTPUT_DIR:-miniflow_output}
    [[ $mf_out == /* ]] || mf_out=$mf_start_dir/$mf_out
    mf_scheduled_time=$(date -u +%Y-%m-%dT%H:%M:%S.%6NZ)
    mf_run_id=${mf_scheduled_time%.*}Z mf_run_id=${mf_run_id//[-:]/}
    printf -v mf_run_id '%s-%s-%04x' "${mf_flow//[!A-Za-z0-9_-]/_}" "$mf_run_id" "$((SRANDOM % 65536))"
    mf_logs=$mf_out/logs/$mf_run_id mf_mask=$(umask)
    umask 077
    mf_io=$(mktemp -d) || exit 2
    [[ $mf_io == /* ]] || mf_io=$mf_start_dir/$mf_io
    trap clean_up EXIT
    mkdir -- "$mf_io/work" && printf '%s' "$mf_context" >"$mf_io/context.json" || exit 2
    for mf_i in "${!mf_kept[@]}"; do printf '%s' "${mf_kept[mf_i]}" >"$mf_io/$mf_i.json" || exit 2; done
    ((${#mf_given[@]} == 0)) || take_params
    mkdir -p -- "$mf_out/logs" && mkdir -- "$mf_logs" && : >"$mf_logs/ends.tsv" || exit 2
    umask "$mf_mask"
}

take_params() { # those that were given take the place of those that the script was made with
    command -v -- "$mf_python" >/dev/null || refuse '--param is read by python3; name one in PYTHON'
    "$mf_python" -I -S -X utf8 -c "$mf_py" params "$mf_io" "$mf_declared" "${mf_given[@]}" \
        >"$mf_io/params" || exit 2
    while IFS= read -r -d '' mf_param; do
        printf -v "${mf_param%%=*}" '%s' "${mf_param#*=}"
    done <"$mf_io/params"
}

begin() { # finds the tasks that wait for nothing
    local n pool
    mf_count=${#mf_id[@]} mf_unsettled=${#mf_id[@]} mf_left=0 mf_red='' mf_barred=()
    mf_cancel='' mf_expired='' mf_kill='' mf_spared='' mf_signalled='' mf_exit=0 mf_alarm='' mf_running=0
    mf_next_retry=0 mf_patience=25
    declare -gA mf_context_of=()
    mf_end=() mf_counts_as=() mf_attempts=() mf_sees=() mf_opens=() mf_ready=() mf_missing=() mf_place=()
    mf_group=() mf_task_of=() mf_due=() mf_code=() mf_ended_by=() mf_stopping=() mf_killed=() mf_reading=()
    mf_kill_rest_at=() mf_retry_at=() mf_used=() mf_queued=() mf_first_place=()
    for pool in 0 "${!mf_pool_size[@]}"; do
        mf_used[pool]=0 mf_queued[pool]=0 mf_first_place[pool]=$mf_count
    done
    read -ra mf_at <<<"$mf_order"
    for n in "${!mf_at[@]}"; do mf_place[mf_at[n]]=$n; done
    for ((n = 1; n <= mf_count; n += 1)); do
        mf_attempts[n]=0
        is_handler "$n" || ((mf_left += 1))
        # shellcheck disable=SC2086
        set -- ${mf_needs[n]:-}
        mf_missing[n]=$#
    done
    for ((n = 1; n <= mf_count; n += 1)); do
        ((mf_missing[n])) || reach "$n"
    done
}

clean_up() { # however the script ends, nothing of it is left
    trap '' HUP INT TERM QUIT
    for mf_i in "${mf_group[@]}"; do signal "$mf_i" KILL; done
    [[ ! $mf_alarm ]] || kill "$mf_alarm"
    rm -rf -- "$mf_io"
} 2>/dev/null

main() { # arguments
    read_options "$@"
    begin
    trap 'interrupt 129 SIGHUP' HUP
    trap 'interrupt 130 SIGINT' INT
    trap 'interrupt 143 SIGTERM' TERM
    trap 'exit 131' QUIT
    trap : PIPE
    prepare
    tick
    mf_expires=$((mf_run_timeout_ms ? mf_now + mf_run_timeout_ms : 0))
    while ((mf_unsettled)); do
        turn
        [[ $mf_did ]] || ((!mf_unsettled)) || await
    done
    trap - HUP INT TERM # it has ended as it has
    [[ $mf_cancel || ! $mf_red ]] || mf_exit=1
    cat -- "$mf_logs/ends.tsv"
    tell "logs and ends.tsv: $mf_logs"
    exit "$mf_exit"
}

main "$@"
'''


def bash_quote(text: str) -> str:
    """Return `text` as one word of bash; raise ValueError for a NUL, which no word can hold."""
    if "\0" in text:
        raise ValueError(f"bash can't hold the NUL character in {shown(text)}")
    return "'" + text.replace("'", "'\\''") + "'"


#: Variables that bash keeps for itself: setting them fails, or means something else.
_BASH_VARIABLES = frozenset("""BASHOPTS BASHPID BASH_ALIASES BASH_ARGC BASH_ARGV BASH_ARGV0 BASH_CMDS
    BASH_COMMAND BASH_COMPAT BASH_LINENO BASH_SOURCE BASH_SUBSHELL BASH_VERSINFO BASH_VERSION BASH_XTRACEFD
    COMP_WORDBREAKS DIRSTACK EPOCHREALTIME EPOCHSECONDS EUID EXECIGNORE FUNCNAME FUNCNEST GROUPS HISTCMD
    LINENO OPTIND POSIXLY_CORRECT PPID RANDOM SECONDS SHELLOPTS SHLVL SRANDOM
    UID _""".split())


def _option_kind(param: Param, value: Any) -> str:
    """Return how a param becomes an option, whatever is given for it: as text, as a flag, or not known."""
    kinds = {_same_kind(param), next((kind for kind in PARAM_TYPES if _TYPES[kind](value)), "null")}
    if kinds == {"boolean"}:
        return "flag"
    return "text" if kinds <= {"string", "integer", "number"} else ""


class _BashTask:
    """Writes the function that says what one task executes: lookups, then the words that they lead to."""

    def __init__(self, plan: Plan, task: Task, params: Mapping[str, Any]) -> None:
        self.plan, self.task, self.params = plan, task, params
        self.lines: List[str] = []             # what is to be done before the words are there
        self.queries: List[Any] = []           # what is looked up in the context
        self.env: Dict[str, str] = {}          # what the flow and the task set: name to word

    def word(self, text: Any) -> str:
        """Return a word of bash for `text`, templates and all."""
        parts = parse_template(text) if isinstance(text, str) else (to_text(text),)
        words = [bash_quote(part) if isinstance(part, str) else self.reference(part) for part in parts]
        return "".join(words) or "''"

    def reference(self, ref: Ref) -> str:
        """Return a word for what a template refers to."""
        root, name = ref.path[0], str(ref.path[1])
        if root == "params" and len(ref.path) == 2:
            return f'"$MINIFLOW_PARAM_{param_variable(name)}"'
        if root == "run":
            return f'"$mf_{"run_id" if name == "id" else name}"'
        if root == "tasks" and ref.path[2] == "status":
            return f'"${{mf_end[{self.plan.rank[name] + 1}]}}"'
        if root != "env":
            return f'"${self.query(ref)}"'
        if name in self.env:
            return self.env[name]
        if not re.fullmatch(_VARIABLE, name):
            raise ValueError(f"{ref.text}: bash can't read a variable of that name")
        self.lines.append(f"[[ ${{{name}@a}} == *x* ]] || give_up 'env.{name} is not set' 125")
        return f'"${name}"'

    def query(self, ref: Ref, option: Optional[str] = None) -> str:
        """Return the name of the variable that holds what is found in the context, as text or as `option`."""
        steps = ("tasks", ref.path[1], *ref.path[3:]) if ref.path[0] == "tasks" else ref.path
        self.queries.append([steps, ref.text, option])
        return f"mf_v{len(self.queries)}"

    def set_env(self, env: Mapping[str, Any]) -> None:
        """Add a layer of environment; its values see the layers below it."""
        for name in env:
            if name in _BASH_VARIABLES or name.startswith("mf_"):
                raise ValueError(f"env.{name}: {'the script' if name[0] == 'm' else 'bash'} keeps this "
                                 "variable for itself; use another name")
        self.env = {**self.env, **{name: self.word(value) for name, value in env.items()}}

    def option_words(self, name: str, ref: Ref) -> List[str]:
        """Return the words of one option whose value is one template and nothing else."""
        kind = "" if ref.path[0] in ("params", "ctx") or ref.path[2:3] == ("outputs",) else "text"
        if ref.path[0] == "params" and len(ref.path) == 2:
            param = (self.plan.flow.params or {}).get(str(ref.path[1]), Param())
            kind = _option_kind(param, self.params[str(ref.path[1])])
        if kind == "text":
            word = self.reference(ref)
            return [bash_quote(f"-{name}"), word] if len(name) == 1 else [bash_quote(f"--{name}=") + word]
        if kind == "flag":
            flag = f"mf_flag{len(self.lines)}"
            self.lines.append(f"{flag}=(); [[ {self.reference(ref)} == false ]] || "
                              f"{flag}=({bash_quote(option_argv(name, True)[0])})")
            return [f'"${{{flag}[@]}}"']
        return [f'"${{{self.query(ref, name)}[@]}}"']

    def argument_words(self) -> List[str]:
        """Return the words of the task's arguments."""
        args = self.task.action.args
        if not isinstance(args, dict):
            return [self.word(item) for item in args]
        words = []
        for name, value in args.items():
            for item in value if isinstance(value, list) else [value]:
                if not isinstance(item, str):
                    words += [bash_quote(word) for word in option_argv(name, item)]
                elif refs(item) and _is_template(item):
                    words += self.option_words(name, refs(item)[0])
                elif len(name) == 1:
                    words += [bash_quote(f"-{name}"), self.word(item)]
                else:
                    words.append(bash_quote(f"--{name}=") + self.word(item))
        return words

    def program_words(self, tasks_dir: str) -> List[str]:
        """Return the words of what is executed, without its arguments."""
        action = self.task.action
        if isinstance(action, Script):
            python = '"$mf_python"'
            if action.python:
                start = '"$mf_start_dir"/' if "/" in action.python and action.python[0] != "/" else ""
                python = start + bash_quote(action.python)
            return [python, bash_quote(f"{tasks_dir}/{action.path}")]
        if isinstance(action, Function):
            raise ValueError(f"{action.name} is a Python function; bash runs scripts and commands")
        if not isinstance(action, Command):
            raise ValueError(f"{ACTION_WORDS[type(action)]} is for MiniFlow to do; use a command, or leave "
                             "it out with --skip")
        if isinstance(action.command, str):
            return ["/bin/sh", "-c", bash_quote(action.command.replace("$${{", "${{")), "sh"]
        return [self.word(text) for text in action.command]

    def function(self, number: int, tasks_dir: str) -> str:
        """Return the whole function."""
        self.set_env(self.plan.flow.env)
        self.set_env(self.task.env)
        words = self.program_words(tasks_dir) + self.argument_words()
        sets = [f"mf_argv=({' '.join(words)})"]
        sets += [f"mf_env+=({name}={word})" for name, word in self.env.items()]
        for name, text in (("stdin", self.task.action.stdin), ("dir", self.task.cwd)):
            if text is not None:
                sets.append(f"mf_{name}={self.word(text)}")
        looks = [f"look {bash_quote(json.dumps(self.queries))}"] if self.queries else []
        body = "".join(f"    {line}\n" for line in looks + self.lines + sets)
        return f"task_{number}() {{ # {self.task.id}\n{body}}}\n"


def _refuse_for_bash(task: Task) -> None:
    """Raise ValueError for what of a task is for MiniFlow alone to decide."""
    if task.condition is not None:
        raise ValueError(f"if: {task.condition} is for MiniFlow to decide, which bash can't; let the task "
                         "itself decide, or leave it out with --skip")
    if task.may_be_cached:
        raise ValueError("inputs and outputs are for MiniFlow to look at, which bash can't; leave them out "
                         "of the flow, or the task by --skip")
    if task.many:
        raise ValueError(f"{task.many}: how often a task runs is for MiniFlow to decide, which bash can't; "
                         "write its instances as tasks, or leave it out with --skip")


def _bash_pauses(retry: Retry) -> Iterator[str]:
    """Yield the waits between attempts in milliseconds, up to the one that stays the same from then on."""
    plain, last = retry._replace(jitter=0), None
    for attempt in range(1, min(retry.max_retries, 64) + 1):
        pause = round(plain.wait_s(attempt, 0) * 1000)
        if pause == last:
            return
        yield str(pause)
        last = pause


def _milliseconds(seconds: Optional[float]) -> Optional[int]:
    """Return a time that is not over at once, as a whole number of milliseconds."""
    return None if seconds is None else max(1, round(seconds * 1000))


def _bash_array(name: str, cells: Iterable[Tuple[int, Any]]) -> str:
    """Return an array that has the cells which are not empty, a line each."""
    rows = "".join(f"    [{n}]={bash_quote(str(cell))}\n" for n, cell in cells
                   if cell not in (None, "", 0, False))
    return f"mf_{name}=(\n{rows})\n" if rows else f"mf_{name}=()\n"


def _bash_tables(plan: Plan) -> Iterator[str]:
    """Yield the arrays that hold what the engine needs to know of each task, by number from 1."""
    number = {name: n for n, name in enumerate(plan.order, 1)}
    pools = {name: n for n, name in enumerate(plan.flow.pools, 1)}

    def numbers(names: Iterable[str]) -> str:
        return " ".join(str(number[name]) for name in names)

    def of(name: str, value: Callable[[Task], Any]) -> str:
        return _bash_array(name, ((n, value(plan.tasks[key])) for key, n in number.items()))

    yield of("id", lambda task: task.id)
    yield of("needs", lambda task: numbers(task.depends_on))
    yield of("feeds", lambda task: numbers(plan.downstream[task.id]))
    yield of("rule", lambda task: task.trigger_rule if task.trigger_rule != "all_success" else "")
    yield of("allow_failure", lambda task: int(task.allow_failure))
    yield of("pool", lambda task: pools.get(task.pool or ""))
    yield of("retries", lambda task: task.retry.max_retries)
    yield of("pauses_ms", lambda task: " ".join(_bash_pauses(task.retry)))
    yield of("jitter", lambda task: round(task.retry.jitter * 1000))
    yield of("retry_on", lambda task: (
        f" {' '.join(map(str, task.retry.retry_on))} " if task.retry.retry_on is not None else ""))
    yield of("timeout_ms", lambda task: _milliseconds(task.timeout_s))
    yield of("timeout_words", lambda task: task.timeout_s and f"{task.timeout_s:g}")
    yield of("grace_ms", lambda task: str(round(task.grace_s * 1000)) if task.grace_s != 5 else "")
    yield of("left_out", lambda task: int(task.id in plan.left_out))
    yield _bash_array("kept", ((number[name], json.dumps([name, output]))
                               for name, output in plan.left_out.items() if output))
    yield _bash_array("pool_size", ((n, plan.flow.pools[name]) for name, n in pools.items()))
    yield f"mf_order='{numbers(sorted(plan.order, key=plan.key.__getitem__))}'\n"


def _bash_settings(plan: Plan, params: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the engine needs to know of the flow as a whole."""
    flow = plan.flow
    yield f"mf_flow={bash_quote(flow.name)}\n"
    yield f"mf_fail_fast={'1' if flow.fail_fast else ''}\n"
    yield f"mf_max_parallel={flow.max_parallel or ''}\n"
    yield f"mf_run_timeout_ms={_milliseconds(flow.timeout_s) or ''}\n"
    declared = None if flow.params is None else {name: {
        "kind": _same_kind(param), "form": describe_schema({"type": _same_kind(param)}),
        "schema": param_schema(param), "fits": describe_schema(param_schema(param))}
        for name, param in flow.params.items()}
    yield f"mf_declared={bash_quote(json.dumps(declared))}\n"
    yield f"mf_context={bash_quote(json.dumps({'params': params, 'tasks': {}, 'ctx': params}))}\n"
    for name, value in params.items():
        yield f"MINIFLOW_PARAM_{param_variable(name)}={bash_quote(to_text(value))}\n"


@exporter("bash")
def to_bash(plan: Plan, params: Mapping[str, Any], tasks_dir: str) -> Exported:
    """Return a bash script that runs `plan` with `params`; raise UsageError with all that bash can't do."""
    functions, problems = [], []
    for n, name in enumerate(plan.order, 1):
        try:
            if name not in plan.left_out:
                _refuse_for_bash(plan.tasks[name])
                functions.append(_BashTask(plan, plan.tasks[name], params).function(n, tasks_dir))
        except ValueError as exc:
            problems.append(f"task {name}: {exc}")
    if problems:
        raise UsageError("\n".join(problems))
    return Exported("".join([
        _BASH_HEAD, "\n# ---- the flow; its tasks have numbers\n", *_bash_settings(plan, params),
        *_bash_tables(plan),
        "\n# ---- what each task executes\n", *functions, _BASH_PYTHON, _BASH_ENGINE]),
        tuple(left_to_miniflow(plan)), is_program=True)


# ============================================================================
# == 21. MAKE: how does a flow run where there is make?
# ============================================================================
# A task is done when its stamp is there, so another make goes on where the last one stopped.  A stamp holds a
# digest of what was executed, and `given` all that concerns every task: where they are not what the Makefile
# says, they are made anew.  Make itself compares them when it reads the Makefile, so that `make -n` and
# `make -q` tell the truth; a rule that is always tried would have them say that all is to be done.
#
# What is executed is bash, written as by the exporter for bash.  It stands in a `define`, is taken from there
# by $(value) and handed to its own recipe in the environment: make expands nothing of it, and no recipe's
# text holds a value.  A variable for all recipes would be put into the environment of each of them, which
# takes a minute for 1,000 tasks.  A newline in a value is written $'\n', so no line of a `define` begins or
# ends with what a value holds.
#
# Only what make gives on its own carries over: a task waits for the success of others, or it is refused.

_MAKE_HEAD = r'''# Made by MiniFlow: make -j4 -f FILE runs the tasks of a flow.
# Another make goes on where the last one stopped.  make NAME=VALUE sets a param, and all tasks run anew.
# Needs GNU make 4.2, bash 5.1, coreutils and, for Python scripts, outputs and params, python3 (or PYTHON).
# Below MINIFLOW_OUTPUT_DIR, by default ./miniflow_output, are a log for each task and ends.tsv (task, end,
# attempts, reason); make clean removes what was made there.
ifneq ($(filter 3.% 4.0% 4.1 4.1.%,$(MAKE_VERSION)),)
$(error this needs GNU make 4.2 or newer, and is read by $(MAKE_VERSION))
endif
SHELL := bash
.SHELLFLAGS := -c
.SUFFIXES:
.PHONY: all clean mf_force
.DEFAULT_GOAL := all
MAKEFLAGS += --no-builtin-rules

mf_base := $(or $(value MINIFLOW_OUTPUT_DIR),miniflow_output)
mf_open := (
mf_bad := $(foreach c,% : ; | = * ? [ ~ & \ $$ $(mf_open),$(findstring $(c),$(mf_base)))
ifneq ($(words x$(mf_base)x)$(strip $(mf_bad)),1)
$(error MINIFLOW_OUTPUT_DIR: make can't have a file there: $(mf_base))
endif
mf_new = $(if $(filter $(2),$(file <$(mf_dir)/$(1).done)),,mf_force)
'''

#: Sees to what was given on the command line of make.
_MAKE_GIVEN = r'''
mf_set = $(if $(filter command,$(firstword $(origin $(1)))),$(1))
mf_strange := $(filter-out MINIFLOW_OUTPUT_DIR PYTHON SHELL,$(foreach v,$(.VARIABLES),$(call mf_set,$(v))))
ifneq ($(strip $(mf_strange)),)
$(error $(strip $(mf_strange)): no param that make can set; it can set $(or $(mf_known),none))
endif
mf_given += .
ifneq ($(file <$(mf_dir)/given),$(mf_given))
$(mf_dir)/params: mf_force
endif
$(mf_dir)/params: private export mf_given := $(mf_given)
$(mf_dir)/params: private export mf_begin := $(value mf_begin_text)
$(mf_dir)/params: private export mf_py_params := $(value mf_py_params_text)
$(mf_dir)/params:
	@: begin; eval "$$mf_begin"
'''

#: Begins a run: what is known when make is called goes into files.
_MAKE_BEGIN = r'''
[[ $mf_dir == /* ]] || mf_dir=$PWD/$mf_dir
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 501)); then
    echo 'this needs bash 5.1 or newer' >&2
    exit 2
fi
umask 077
mkdir -p -- "$mf_dir/io" || exit 2
{
    printf '%s\0' "${mf_flow//[^A-Za-z0-9_-]/_}-$(date -u +%Y%m%dT%H%M%SZ)-$$"
    printf '%s\0' "$(date -u +%Y-%m-%dT%H:%M:%S.%6NZ)"
    if [[ ${!mf_given_@} ]]; then
        "${PYTHON:-python3}" -c "$mf_py_params" "$mf_dir/io/context.part" "$mf_spec" "$mf_context" || exit 2
    else
        printf '%s' "$mf_context" >"$mf_dir/io/context.part" && printf '%s\0' "${mf_texts[@]}"
    fi
} >"$mf_dir/params.part" || exit 2
rm -rf -- "$mf_dir/given" "$mf_dir/tmp" "$mf_dir/ends.tsv" # first, so that a kill leaves a run to begin
mkdir -- "$mf_dir/tmp" && mv -f -- "$mf_dir/io/context.part" "$mf_dir/io/context.json" &&
    mv -f -- "$mf_dir/params.part" "$mf_dir/params" && printf '%s' "$mf_given" >"$mf_dir/given"
'''

#: What is JSON: what a task wrote, what its downstream sees, one value of that.
_MAKE_OUTPUTS = r'''
import json, re, sys
verb, io, number, *rest = sys.argv[1:]
def load(path):
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return {}
''' + OUTPUT_READER + r'''
if verb == "take":
    try:
        found = read_output(io + "/" + number + ".out")
    except (ValueError, OSError) as exc:
        sys.exit("output: " + str(exc))
    if found:
        with open(io + "/" + number + ".json", "w") as file:
            json.dump([rest[0], found], file)
elif verb == "context":
    seen = {}
    for up in rest:
        seen.update(load(io + "/" + up + ".seen"))
        own = load(io + "/" + up + ".json")
        if own:
            seen[up] = own
    base = load(io + "/context.json")
    for up in sorted(seen, key=int):
        base["tasks"][seen[up][0]] = seen[up][1]
        base["ctx"].update(seen[up][1])
    for name, value in ((".seen", seen), (".ctx", base)):
        with open(io + "/" + number + name, "w") as file:
            json.dump(value, file)
else:
    value = load(number)
    for step in json.loads(rest[0]):
        try:
            if not isinstance(value, dict if isinstance(step, str) else list):
                raise KeyError
            value = value[step]
        except LookupError:
            sys.exit(rest[0] + ": there is no such value")
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape") + b".")
'''

#: Takes params from the command line of make: checks them, and writes the context and their texts.
_MAKE_PARAMS = r'''
import json, os, re, sys
context, texts, problems = json.loads(sys.argv[3]), [], []
kinds = {"string": [str], "integer": [int], "number": [int, float]}
for name, kind, rules, words in json.loads(sys.argv[2]):
    value = text = os.environ.get("mf_given_" + name)
    if text is None:
        value = context["params"][name]
    elif kind != "string":
        try:
            value = json.loads(text)
        except ValueError:
            pass
    size = len(value) if isinstance(value, str) else value
    if (type(value) not in kinds[kind] or kind != "string" and value - value != 0
            or value not in rules.get("enum", [value])
            or kind == "string" and not re.search(rules.get("pattern", ""), value)
            or size < rules.get("minimum", rules.get("minLength", size))
            or size > rules.get("maximum", rules.get("maxLength", size))):
        problems.append("param %s: expected %s, got %s" % (name, words, json.dumps(text)))
    context["params"][name] = context["ctx"][name] = value
    texts.append(value if isinstance(value, str) else json.dumps(value))
if problems:
    sys.exit("\n".join(problems))
with open(sys.argv[1], "w") as file:
    json.dump(context, file)
for text in texts:
    sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape") + b"\0")
'''

#: What the process of an attempt executes.
_MAKE_ATTEMPT = r'''
give_up() { # reason: for a task that no attempt can help
    echo "$1" >&2
    : >"$mf_io/$mf_n.final"
    exit "${2:-125}"
}

go() { # directory: relative to where make was started
    local to=$1
    [[ $to == /* ]] || to=$mf_start_dir/$to
    cd -- "$to" || give_up 'the working directory is not there' 127
}

value() { # path as JSON: sets mf_v to the value that it leads to in the context
    mf_v=$("$mf_python" -c "$mf_py_outputs" value '' "$MINIFLOW_CONTEXT" "$@") ||
        give_up "$*: there is no such value"
    mf_v=${mf_v%.}
}

leave() { # nothing of make and of ours is the task's business
    export -n "${!mf_@}"
    unset MAKEFLAGS MAKEOVERRIDES MFLAGS MAKELEVEL MAKE_TERMOUT MAKE_TERMERR
    shopt -s execfail
}

eval "$mf_task"
task
'''

#: The recipe of a task.
_MAKE_ENGINE = r'''
set -u
eval "$mf_task"
mf_start_dir=$PWD
[[ $mf_dir == /* ]] || mf_dir=$PWD/$mf_dir
mf_io=$mf_dir/io
mapfile -d '' -t mf_p <"$mf_dir/params"
for mf_k in "${!mf_p[@]}"; do export "mf_p$mf_k=${mf_p[mf_k]}"; done
mf_python=$(command -v "${PYTHON:-python3}") || mf_python=python3
[[ $mf_python == /* || $mf_python != */* ]] || mf_python=$mf_start_dir/$mf_python
export mf_start_dir mf_io mf_n mf_python MINIFLOW_RUN_ID=$mf_p0 MINIFLOW_FLOW=$mf_flow MINIFLOW_TASK=$mf_id
export MINIFLOW_OUTPUT=$mf_io/$mf_n.out GITHUB_OUTPUT=$mf_io/$mf_n.out TMP_DIR=$mf_dir/tmp
export MINIFLOW_CONTEXT=$mf_io/context.json MINIFLOW_ATTEMPT
set_params

seconds() { # milliseconds, as seconds
    printf '%d.%03d' $(($1 / 1000)) $(($1 % 1000))
}

sweep() { # group, grace in ms: ends what is left of it
    local ms=0
    kill -TERM -- "-$1" 2>/dev/null || return 0
    while kill -0 -- "-$1" 2>/dev/null; do
        if ((ms >= $2)); then kill -KILL -- "-$1" 2>/dev/null; fi
        if ((ms >= $2 + 2000)); then return 0; fi # what is left then are zombies that nobody reaps
        sleep 0.05
        ((ms += 50))
    done
}

stop() { # exit code
    trap '' INT TERM HUP
    if [[ $mf_nap ]]; then kill "$mf_nap"; fi
    if [[ $mf_group ]]; then sweep "$mf_group" "$mf_grace"; fi
    exit "$1"
}
mf_group='' mf_nap=''
trap 'stop 129' HUP
trap 'stop 130' INT
trap 'stop 143' TERM

see() { # sets MINIFLOW_CONTEXT to a file with what the task may read
    local up
    for up in $mf_needs; do
        if [[ -e $mf_io/$up.json || -e $mf_io/$up.seen ]]; then
            # shellcheck disable=SC2086
            "$mf_python" -c "$mf_py_outputs" context "$mf_io" "$mf_n" $mf_needs || return 1
            MINIFLOW_CONTEXT=$mf_io/$mf_n.ctx
            return 0
        fi
    done
}

attempt() { # sets mf_why, and mf_code to what retry_on is held against
    local began rc limits
    rm -f -- "$MINIFLOW_OUTPUT" "$mf_io/$mf_n.final"
    began=${EPOCHREALTIME/[.,]/}
    limits=("$(seconds $((mf_grace ? mf_grace : 1)))" "$(seconds "$mf_limit")")
    timeout -k "${limits[@]}" bash -c "$mf_attempt" </dev/null >>"$mf_log" 2>&1 &
    mf_group=$!
    wait "$mf_group" 2>/dev/null
    rc=$?
    sweep "$mf_group" "$mf_grace"
    mf_group=''
    mf_code=$rc mf_why="exit $rc"
    if ((mf_limit && rc && ${EPOCHREALTIME/[.,]/} - began >= mf_limit * 1000)); then
        mf_code=timeout mf_why="timeout after $mf_limit_words s"
    fi
    ((rc == 0)) || return 1
    if [[ -e $MINIFLOW_OUTPUT ]]; then
        mf_code=output
        mf_why=$("$mf_python" -c "$mf_py_outputs" take "$mf_io" "$mf_n" "$mf_id" 2>&1) || return 1
    fi
}

settle() { # end reason
    (umask 077; printf '%s' "$1" >"$mf_io/$mf_n.end"
    printf '%s\t%s\t%s\t%s\n' "$mf_id" "$1" "$MINIFLOW_ATTEMPT" "$2" >>"$mf_dir/ends.tsv")
    printf '%-16s %s%s\n' "$1" "$mf_id" "${2:+: $2}" >&2
    [[ $1 == success || $mf_tolerant ]] || exit 1
    printf '%s' "$mf_digest" >"$mf_dir/$mf_id.done"
    exit
}

rm -f -- "$mf_dir/$mf_id.done" "$mf_io/$mf_n".*
mf_log=$mf_dir/$mf_id.log MINIFLOW_ATTEMPT=1
(umask 077; : >"$mf_log"; see) || exit 1
if [[ -e $mf_io/$mf_n.ctx ]]; then MINIFLOW_CONTEXT=$mf_io/$mf_n.ctx; fi
read -ra mf_list <<<"${mf_waits:-0}"
until attempt; do
    if ((MINIFLOW_ATTEMPT > mf_retries)) || [[ $mf_retry_on && $mf_retry_on != *" $mf_code "* ]] ||
        [[ -e $mf_io/$mf_n.final && ! $mf_retry_on ]]; then
        settle failed "$mf_why"
    fi
    echo "attempt $MINIFLOW_ATTEMPT of $mf_id failed: $mf_why" >&2
    ((mf_ms = mf_list[MINIFLOW_ATTEMPT > ${#mf_list[@]} ? ${#mf_list[@]} - 1 : MINIFLOW_ATTEMPT - 1]))
    ((mf_ms -= mf_ms * mf_jitter * (SRANDOM % 1001) / 1000000))
    sleep "$(seconds "$mf_ms")" &
    mf_nap=$!
    wait "$mf_nap"
    mf_nap=''
    ((MINIFLOW_ATTEMPT += 1))
    echo "--- attempt $MINIFLOW_ATTEMPT" >>"$mf_log"
done
settle success ''
'''

_MAKE_CLEAN = r'''
unset CDPATH
cd -- "$mf_dir" 2>/dev/null || exit 0
printf '%s\0' *.done *.log io/*.* params params.part given ends.tsv | xargs -0 rm -f --
rm -rf -- tmp
if rmdir -- io 2>/dev/null && cd - >/dev/null; then rmdir -- "$mf_dir" 2>/dev/null; fi
exit 0
'''

#: Rules that mean the same as all_success where no task is ever skipped.
_MAKE_RULES = ("all_success", "none_failed", "none_failed_min_one_success")
#: A recipe gets a task through its environment, where Linux takes 128 kB for one variable.
_MAKE_ROOM = 100_000


def _digest(*parts: Any) -> str:
    """Return a short word that is another one for other parts."""
    import hashlib
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _define(name: str, text: str) -> str:
    """Return the definition of a variable of make that holds `text` as it is."""
    lines = text.strip("\n").split("\n")
    assert not any(re.match(r"\t| *(override +|export +|private +)*(define|endef)\b", line)
                   or line.endswith("\\") for line in lines), f"make reads these lines of {name} otherwise"
    return "\n".join([f"define {name}", *lines, "endef", ""])


def _line(text: str) -> str:
    """Return a line of bash, in which all newlines are within '', without a newline."""
    return text.replace("\n", "'$'\\n''")


def _open_params(flow: Flow, params: Mapping[str, Any]) -> Dict[str, str]:
    """Return the params that make's command line may set, and the variables that the recipes have them in.

    A boolean, an array or an object may decide about flags, and a name in capitals be that of a variable
    that make or a program looks at.
    """
    kinds = {name: _same_kind((flow.params or {}).get(name, Param())) for name in params}
    names = [name for name, kind in kinds.items() if kind in ("string", "integer", "number")
             and _TYPES[kind](params[name])    # what is not declared may have any
             and re.fullmatch(r"(?!mf_)(?=.*[a-z])[A-Za-z][A-Za-z0-9_]*", name)]
    return {name: f"mf_p{n}" for n, name in enumerate(names, 2)}


class _MakeTask(_BashTask):
    """Writes what the recipe of one task knows of it: its settings, and a function that executes it."""

    def __init__(self, plan: Plan, task: Task, values: Values, opened: Mapping[str, str]) -> None:
        super().__init__(plan, task, values.params)
        self.values, self.opened = values, opened
        self.lookups: List[str] = []
        self.count = 0

    def reference(self, ref: Ref) -> str:
        """Return a word for what a template refers to; what is not known yet is looked up before."""
        root, path = ref.path[0], ref.path[1:]
        if root in EACH_ROOTS:
            return "''"                        # of a task that is refused anyway
        name = str(path[0])
        if root == "params" and name not in self.opened:
            return bash_quote(to_text(lookup(ref, self.values)))
        if root == "params" and len(path) > 1:
            raise ValueError(f"{ref.text}: a number or a string has nothing within it")
        if root == "params":
            return f'"${self.opened[name]}"'
        if root == "env" and name in self.env:
            return self.env[name]
        self.count += 1
        found = f"mf_v{self.count}"
        if root == "run":
            self.lookups.append(f"{found}=${'MINIFLOW_RUN_ID' if name == 'id' else 'mf_scheduled_time'}")
        elif root == "env":
            if not re.fullmatch(_VARIABLE, name):
                raise ValueError(f"{ref.text}: bash can't read a variable of that name")
            self.lookups.append(f"[[ ${{{name}@a}} == *x* ]] || give_up 'env.{name} is not set'")
            self.lookups.append(f"{found}=${name}")
        elif root == "tasks" and path[1] == "status":
            self.lookups.append(f'{found}=$(<"$mf_io/{self.plan.rank[name] + 1}.end")')
        else:
            steps = ("tasks", name, *path[2:]) if root == "tasks" else ("ctx", *path)
            self.lookups += [f"value {bash_quote(json.dumps(steps))}", f"{found}=$mf_v"]
        return f'"${found}"'

    def _option(self, name: str, item: Any) -> List[str]:
        """Return the words of one option; only what is known by now decides whether it is a flag."""
        later = [ref for ref in refs(item) if ref.path[0] != "params" or ref.path[1] in self.opened]
        if not later:
            return [bash_quote(word) for word in option_argv(name, render(item, self.values))]
        if later[0].path[0] in ("tasks", "ctx") and parse_template(item) == (later[0],):
            raise ValueError(f"args.{name}: whether {later[0].text} is a flag shows at run time only, which "
                             "make can't express; give args as an array")
        if len(name) == 1:
            return [bash_quote(f"-{name}"), self.word(item)]
        return [bash_quote(f"--{name}=") + self.word(item)]

    def argument_words(self) -> List[str]:
        """Return the words of the task's arguments."""
        args = self.task.action.args
        if not isinstance(args, dict):
            return [self.word(item) for item in args]
        options = [(name, item) for name, value in args.items()
                   for item in (value if isinstance(value, list) else [value])]
        return [word for option in options for word in self._option(*option)]

    def settings(self, number: int) -> Iterator[str]:
        """Yield what the recipe needs to know."""
        task, retry = self.task, self.task.retry
        limit = max(1, round(task.timeout_s * 1000)) if task.timeout_s else 0
        retry_on = "" if retry.retry_on is None else f" {' '.join(map(str, retry.retry_on))} "
        yield f"mf_n={number} mf_needs='{' '.join(str(self.plan.rank[up] + 1) for up in task.depends_on)}'"
        yield (f"mf_retries={retry.max_retries} mf_waits='{' '.join(_bash_pauses(retry))}' "
               f"mf_jitter={round(retry.jitter * 1000)} mf_retry_on={bash_quote(retry_on)}")
        yield f"mf_limit={limit} mf_limit_words={task.timeout_s or 0:g} mf_grace={round(task.grace_s * 1000)}"
        yield f"mf_tolerant={'1' if task.allow_failure else ''}"

    def text(self, number: int, tasks_dir: str) -> str:
        """Return the settings and the function."""
        self.set_env(self.plan.flow.env)
        self.set_env(self.task.env)
        words = self.program_words(tasks_dir) + self.argument_words()
        lines = []
        if self.task.action.stdin is not None:
            lines.append(f'printf %s {self.word(self.task.action.stdin)} >"$mf_io/$mf_n.in" || exit')
            lines.append('exec <"$mf_io/$mf_n.in"')
        lines += [f"go {self.word(self.task.cwd)}"] if self.task.cwd else []
        lines += ["leave", *(f"export {name}={word}" for name, word in self.env.items())]
        lines += [f"exec -- {' '.join(words)}", 'give_up "cannot start" "$?"']
        body = "".join(f"    {_line(line)}\n" for line in self.lookups + lines)
        return "\n".join(self.settings(number)) + f"\ntask() {{\n{body}}}"


def _make_problems(plan: Plan) -> Iterator[str]:
    """Yield what of a flow is more than scripts and commands that wait for the success of others."""
    if plan.flow.timeout_s is not None:
        yield f"timeout_s: make has no limit of {plan.flow.timeout_s:g} s for all tasks; run it by timeout(1)"
    if plan.left_out:
        yield f"a part of the flow, without {', '.join(plan.left_out)}, can't be a Makefile; export all of it"
    members: Dict[str, List[str]] = {}
    may_lack: Dict[str, bool] = {}             # whether a task may be left without a stamp
    for name in plan.order:
        task = plan.tasks[name]
        members.setdefault(task.pool or "", []).append(name)
        needs_lack = any(may_lack[up] for up in task.depends_on)
        may_lack[name] = needs_lack or not task.allow_failure
        if task.allow_failure and needs_lack and plan.downstream[name]:
            yield (f"task {name}: allow_failure: make can't go on behind it where what it waits for has "
                   "failed; give that allow_failure as well")
        for field, asked in (("if", task.condition is not None), ("inputs and outputs", task.may_be_cached),
                             (task.many, task.many), (task.handler, task.handler)):
            if asked:
                yield f"task {name}: {field}: make can't decide about that; let MiniFlow run the flow"
        if task.trigger_rule not in _MAKE_RULES and not task.handler:
            yield (f"task {name}: trigger_rule {task.trigger_rule}: with make a task waits for the success "
                   "of others; use all_success, or --to bash")
    for pool, size in plan.flow.pools.items():
        if size < len(members.get(pool, ())):
            names = ", ".join(members[pool])
            yield f"pools.{pool}: make can't bound {names} to {size} at once; let them depend on each other"


def _make_losses(plan: Plan, params: Mapping[str, Any], opened: Mapping[str, str]) -> Iterator[str]:
    """Yield what make does otherwise, and how to come by it."""
    yield from left_to_miniflow(plan)
    if plan.flow.max_parallel is not None:
        yield f"max_parallel is not in the Makefile; call make with -j{plan.flow.max_parallel}"
    if any(task.priority for task in plan.tasks.values()):
        yield "priority has no effect: make starts ready tasks in its own order"
    fixed = [name for name in params if name not in opened]
    if fixed:
        yield (f"make can't set {', '.join(f'params.{name}' for name in fixed)}; for another value, export "
               "the flow again")


def _make_of_params(plan: Plan, params: Mapping[str, Any], opened: Mapping[str, str]) -> Iterator[str]:
    """Yield the part of a Makefile that begins a run."""
    flow, declared = plan.flow, plan.flow.params or {}
    spec = [(name, kind, schema, describe_schema({"type": kind, **schema})) for name in opened
            for param in [declared.get(name, Param())]
            for kind, schema in [(_same_kind(param), param_schema(param))]]
    context = json.dumps({"params": params, "tasks": {}, "ctx": params})
    texts = " ".join(bash_quote(to_text(params[name])) for name in opened)
    lines = [f"mf_flow={bash_quote(flow.name)}", f"mf_context={bash_quote(context)}",
             f"mf_spec={bash_quote(json.dumps(spec))}", f"mf_texts=({texts})"]
    yield f"mf_dir := $(mf_base)/make/{flow.name}\nexport mf_dir\n"
    yield f"mf_given := {_digest(lines, plan.order)}\n"
    for name in opened:
        yield (f"ifeq ($(origin {name}),command line)\noverride {name} := $(value {name})\nunexport {name}\n"
               f"mf_given += {name}=$({name})\n"
               f"$(mf_dir)/params: private export mf_given_{name} := $({name})\nendif\n")
    yield f"mf_known := {' '.join(opened)}\n"
    yield _define("mf_begin_text", "\n".join(map(_line, lines)) + _MAKE_BEGIN)
    yield _define("mf_py_params_text", _MAKE_PARAMS)
    yield _MAKE_GIVEN


def _make_of_all(plan: Plan, params: Mapping[str, Any], opened: Mapping[str, str]) -> Iterator[str]:
    """Yield the part of a Makefile that all recipes have in common."""
    head, loop = _MAKE_ENGINE.split("\nset_params\n")
    exports = [
        f"export MINIFLOW_PARAM_{param_variable(name)}="
        + (f"${opened[name]}" if name in opened else _line(bash_quote(to_text(value))))
        for name, value in params.items()]
    outputs = _MAKE_OUTPUTS.strip("\n")
    engine = "\n".join([f"mf_flow={bash_quote(plan.flow.name)}", head, *exports, loop])
    for name, text in (("engine", engine), ("attempt", _MAKE_ATTEMPT), ("py_outputs", outputs)):
        yield _define(f"mf_{name}_text", text) + f"export mf_{name} := $(value mf_{name}_text)\n"
    yield _define("mf_clean_text", _MAKE_CLEAN)
    yield 'clean: private export mf_clean := $(value mf_clean_text)\nclean:\n\t@eval "$$mf_clean"\n'


@exporter("make")
def to_make(plan: Plan, params: Mapping[str, Any], tasks_dir: str) -> Exported:
    """Return a Makefile that runs `plan`; raise UsageError with all that make can't do."""
    values, opened = Values(params, {}, {}, {}, lambda name: {}), _open_params(plan.flow, params)
    problems, rules = list(_make_problems(plan)), []
    for number, name in enumerate(plan.order, 1):
        try:
            text = _MakeTask(plan, plan.tasks[name], values, opened).text(number, tasks_dir)
            if len(text.encode("utf-8", "surrogateescape")) > _MAKE_ROOM:
                raise ValueError(f"its values take more than {_MAKE_ROOM:,} bytes; let it read them from a "
                                 "file")
        except ValueError as exc:
            problems.append(f"task {name}: {exc}")
            continue
        stamp, digest = f"$(mf_dir)/{name}.done", _digest(text)
        needs = "".join(f" $(mf_dir)/{up}.done" for up in plan.tasks[name].depends_on)
        rules.append(f"\nall: {stamp}\n{_define(f'mf_task_{name}', text)}"
                     f"{stamp}: private export mf_task := $(value mf_task_{name})\n"
                     f"{stamp}: $(call mf_new,{name},{digest}) $(mf_dir)/params{needs}\n"
                     f'\t@mf_id={name} mf_digest={digest}; eval "$$mf_engine"\n')
    common = [*_make_of_params(plan, params, opened), *_make_of_all(plan, params, opened)]
    if max(len(text.encode("utf-8", "surrogateescape")) for text in common) > _MAKE_ROOM:
        problems.append(f"params: they take more than {_MAKE_ROOM:,} bytes; give the path of a file")
    if problems:
        raise UsageError("\n".join(problems))
    keep_going = "" if plan.flow.fail_fast else "MAKEFLAGS += --keep-going\n"
    return Exported("".join([_MAKE_HEAD, keep_going, *common, *rules]),
                    tuple(_make_losses(plan, params, opened)))


# ============================================================================
# == 22. AIRFLOW: how does a flow run where there is Airflow?
# ============================================================================
# A DAG file is a head that is the same for all flows and a call for each task, in which all that comes from
# the flow is a Python literal.  The head holds an operator that starts what the task executes as MiniFlow
# would.  Airflow's own BashOperator would not do: it renders commands as Jinja templates, knows no arguments,
# no standard input and no grace, and takes the last line that was printed for the output.  Our operator has
# no template fields, so that braces mean nothing in it.
#
# Trigger rules are Airflow's own.  What Airflow has no word for is said by empty tasks: one that counts as a
# success behind a task whose failure is tolerated (none_skipped: it is skipped only where that is), one that
# stands for all instances of a fan-out, and two for the handlers, of which Airflow would start on_failure at
# the first failure.  Airflow judges a run by its leaves, so one more waits for any failure, and fails.

_AIRFLOW_HEAD = r'''from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from datetime import datetime, timedelta, timezone

try:                                            # Airflow 3
    from airflow.sdk import DAG, BaseOperator, Param
    from airflow.sdk.exceptions import AirflowException, AirflowFailException
    from airflow.providers.standard.operators.empty import EmptyOperator
except ImportError:                             # Airflow 2
    from airflow import DAG
    from airflow.exceptions import AirflowException, AirflowFailException
    from airflow.models.baseoperator import BaseOperator
    from airflow.models.param import Param
    from airflow.operators.empty import EmptyOperator
from airflow.timetables.trigger import CronTriggerTimetable


class Value(list):
    """A text in pieces: text as it is, and paths (tuples) of what is looked up when the task starts."""


def to_text(value):
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def look_up(path, known):
    value = known
    for step in path:
        try:
            if not isinstance(value, dict if isinstance(step, str) else list):
                raise KeyError(step)
            value = value[step]
        except LookupError:
            raise AirflowFailException("%s: there is no such value" % (path,)) from None
    return value


def render(value, known):
    if isinstance(value, Value):
        pieces = [piece if isinstance(piece, str) else look_up(piece, known) for piece in value]
        return pieces[0] if len(pieces) == 1 else "".join(map(to_text, pieces))
    return value


def option(name, value):
    if value is None or value is False:
        return []
    if isinstance(value, list):
        return [word for item in value for word in option(name, item)]
    if value is True:
        return ["-" + name if len(name) == 1 else "--" + name]
    return ["-" + name, to_text(value)] if len(name) == 1 else ["--%s=%s" % (name, to_text(value))]

''' + OUTPUT_READER + r'''
class MiniFlowTask(BaseOperator):
    """Runs one task; its output is its XCom."""

    def __init__(self, *, does, **options):
        super().__init__(**options)
        self.does, self.process, self.timed_out = does, None, False

    def known(self, context):
        """Return what values are looked up in: params, and the outputs of all that is upstream."""
        own = self.does.get("of", self.does["id"])
        upstream, todo = set(), list(UPSTREAM[own])
        while todo:
            name = todo.pop()
            if name not in upstream:
                upstream.add(name)
                todo += UPSTREAM[name]
        params = dict(context["params"])
        outputs = {name: context["ti"].xcom_pull(task_ids=name) or {}
                   for name in UPSTREAM if name in upstream}
        merged = dict(params)
        for output in outputs.values():
            merged.update(output)
        run = context["dag_run"]
        at = getattr(run, "logical_date", None) or getattr(run, "run_after", None) or run.start_date
        text = at.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return {"params": params, "outputs": outputs, "ctx": merged, "env": dict(os.environ),
                "run": {"id": run.run_id, "scheduled_time": text},
                "tasks": {name: {"outputs": output} for name, output in outputs.items()},
                **self.does.get("each", {})}

    def arguments(self, known):
        """Return the program and its arguments."""
        does, args = self.does, self.does.get("args", [])
        if "shell" in does:
            words = ["/bin/sh", "-c", does["shell"], "sh"]
        elif "script" in does:
            python = does.get("python") or os.environ.get("PYTHON") or "python3"
            words = [os.path.join(START_DIR, python) if "/" in python else python,
                     os.path.join(TASKS_DIR, does["script"])]
        else:
            words = [to_text(render(word, known)) for word in does["command"]]
        if isinstance(args, dict):
            for name, value in args.items():
                words += option(name, [render(item, known) for item in value] if type(value) is list
                                else render(value, known))
            return words
        return words + [to_text(render(word, known)) for word in args]

    def environment(self, known, place, attempt):
        """Return the environment: the worker's, the flow's, the task's, MiniFlow's."""
        for layer in (FLOW_ENV, self.does.get("env", {})):
            added = {name: to_text(render(text, known)) for name, text in layer.items()}
            known["env"] = {**known["env"], **added}
        env = dict(known["env"])
        for name, value in known["params"].items():
            env["MINIFLOW_PARAM_" + re.sub("[^A-Z0-9_]", "_", name.upper())] = to_text(value)
        output = os.path.join(place, "output")
        env.update(MINIFLOW_RUN_ID=known["run"]["id"], MINIFLOW_FLOW=self.dag_id,
                   MINIFLOW_TASK=self.does["id"], MINIFLOW_ATTEMPT=str(attempt),
                   MINIFLOW_CONTEXT=os.path.join(place, "context.json"),
                   MINIFLOW_OUTPUT=output, GITHUB_OUTPUT=output, TMP_DIR=os.path.join(place, "tmp"))
        os.mkdir(env["TMP_DIR"])
        with open(env["MINIFLOW_CONTEXT"], "w") as file:
            outputs = {name: output for name, output in known["outputs"].items() if output}
            json.dump({"params": known["params"], "tasks": outputs, "ctx": known["ctx"]}, file)
        return env

    def execute(self, context):
        with tempfile.TemporaryDirectory() as place:
            known = self.known(context)
            env = self.environment(known, place, context["ti"].try_number)
            words = self.arguments(known)
            cwd = os.path.join(START_DIR, to_text(render(self.does.get("cwd", ""), known)))
            text = to_text(render(self.does.get("stdin", ""), known))
            with open(os.path.join(place, "stdin"), "w+b") as stdin:
                stdin.write(text.encode("utf-8", "surrogateescape"))
                stdin.seek(0)
                try:
                    self.process = subprocess.Popen(
                        words, env=env, cwd=cwd, stdin=stdin, stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT, start_new_session=True)
                except (OSError, ValueError) as exc:
                    self.fail("cannot start: %s" % exc, None, True)
            self.watch()
            code = self.process.returncode
            if self.timed_out:
                self.fail("timeout after %g s" % self.does["timeout_s"], "timeout")
            if code < 0:
                self.fail("killed by signal %d" % -code, 128 - code)
            if code:
                self.fail("exit %d" % code, code)
            try:
                return read_output(env["MINIFLOW_OUTPUT"]) or None
            except FileNotFoundError:
                return None
            except (ValueError, OSError) as exc:
                self.fail("bad output: %s" % exc, None)

    def watch(self):
        """Wait for the process with its output in our log, and end what is left of its group."""
        reader = threading.Thread(target=self.read_log, args=(self.process.stdout,), daemon=True)
        reader.start()
        try:
            self.process.wait(self.does.get("timeout_s"))
        except subprocess.TimeoutExpired:
            self.timed_out = True
        finally:
            self.on_kill()
            reader.join(5)

    def read_log(self, pipe):
        for line in pipe:
            self.log.info("%s", line.decode("utf-8", "replace").rstrip("\n"))

    def on_kill(self):
        """End the process group: SIGTERM, a time of grace, SIGKILL."""
        for word, seconds in ((signal.SIGTERM, self.does.get("grace_s", 5)), (signal.SIGKILL, 2)):
            end = time.monotonic() + seconds
            while self.process is not None and self.left(word):
                if time.monotonic() > end:
                    break
                word = 0
                time.sleep(0.02)

    def left(self, word):
        """Send a signal to the process group; tell whether there is one."""
        self.process.poll()
        try:
            os.killpg(self.process.pid, word)
        except (ProcessLookupError, PermissionError):
            return False
        return True

    def fail(self, reason, code, final=False):
        """Raise what has the task fail, and tried again only where it is to be."""
        retry_on = self.does.get("retry_on")
        final = final if retry_on is None else code not in retry_on
        raise (AirflowFailException if final else AirflowException)(reason)


class Gather(BaseOperator):
    """Stands for all instances of a task."""

    def __init__(self, *, instances, **options):
        super().__init__(**options)
        self.instances = instances

    def execute(self, context):
        return {"items": [context["ti"].xcom_pull(task_ids=name) for name in self.instances]}


class Watcher(BaseOperator):
    """Fails, so that the run is red although its last tasks may have succeeded."""

    def execute(self, context):
        raise AirflowFailException("a task has failed")
'''


class _Look(NamedTuple):
    """A value that the DAG file looks up when the task starts; its repr is what stands in the file."""

    pieces: Tuple[Any, ...]

    def __repr__(self) -> str:
        return f"Value({list(self.pieces)!r})"


def _airflow_value(value: Any) -> Any:
    """Return a JSON value with a _Look for each string that holds templates."""
    if isinstance(value, (list, tuple)):
        return [_airflow_value(item) for item in value]
    if isinstance(value, Mapping):
        return {name: _airflow_value(item) for name, item in value.items()}
    if not isinstance(value, str) or "${{" not in value:
        return value
    parts = parse_template(value)
    for part in parts:
        if isinstance(part, Ref) and part.path[0] == "tasks" and part.path[2] == "status":
            raise ValueError(f"{part.text}: how a task ended is not handed on by Airflow; hand on an output")
    if any(isinstance(part, Ref) for part in parts):
        return _Look(tuple(part.path if isinstance(part, Ref) else part for part in parts))
    return "".join(map(str, parts))


#: What the values of instances are looked up in that are written out in the flow.
_NO_VALUES = Values({}, {}, {}, {}, lambda name: {})


def _refuse_for(engine: str, task: Task) -> None:
    """Raise ValueError for what MiniFlow alone does and no other engine."""
    action = task.action
    if task.condition is not None:
        raise ValueError(f"if: {task.condition} is for MiniFlow to decide, which {engine} can't; let the "
                         "task itself decide")
    if isinstance(action, Function):
        raise ValueError(f"{action.name} is a Python function; {engine} runs scripts and commands")
    if not isinstance(action, (Script, Command)):
        raise ValueError(f"{ACTION_WORDS[type(action)]} is for MiniFlow to do; use a command")
    for name in (task.many,) if task.many else ():
        if any(refs(text) for _, text in _strings(getattr(task, name), ())):
            raise ValueError(f"{name}: its values show at run time only, which {engine} can't express; "
                             "write them out")
        instances(task, _NO_VALUES)


def _airflow_does(task: Task) -> Dict[str, Any]:
    """Return what the operator of a task is told."""
    action, does = task.action, {"id": task.id}  # type: Any, Dict[str, Any]
    if isinstance(action, Script):
        does.update(script=action.path)
        does.update({"python": action.python} if action.python else {})
    elif isinstance(action.command, str):
        does["shell"] = action.command.replace("$${{", "${{")
    else:
        does["command"] = _airflow_value(action.command)
    for name, value in (("args", action.args), ("env", task.env), ("cwd", task.cwd), ("stdin", action.stdin)):
        if value:
            does[name] = _airflow_value(value)
    for name, value, usual in (("timeout_s", task.timeout_s, None), ("grace_s", task.grace_s, 5)):
        if value != usual:
            does[name] = value
    if task.retry.retry_on is not None:
        does["retry_on"] = list(task.retry.retry_on)
    return does


def _waits(retry: Retry) -> List[float]:
    """Return the first waits between attempts; there are at most three different ones to tell apart."""
    plain = retry._replace(jitter=0)
    return [plain.wait_s(attempt, 0) for attempt in range(1, min(retry.max_retries, 3) + 1)]


def _airflow_retry(retry: Retry) -> Iterator[str]:
    """Yield the arguments that say how often and when Airflow tries again."""
    yield f"retries={retry.max_retries}"
    waits = _waits(retry)
    if waits:
        yield f"retry_delay=timedelta(seconds={waits[0]!r})"
    if len(set(waits)) > 1:
        longest = f"{min(float(retry.max_backoff_s), 86400.0)!r}"
        yield f"retry_exponential_backoff=True, max_retry_delay=timedelta(seconds={longest})"


_AIRFLOW_NOTES = (
    "Tasks start in START_DIR, below, on whichever worker has them; scripts are read from TASKS_DIR.",
    "Outputs are XComs, which are for small values; TMP_DIR is of an attempt, not of the run.",
    "A task is judged as soon as its rule allows it, so that of a skip and a failure the first decides.")


def _airflow_dict(name: str, value: Mapping[str, Any]) -> str:
    """Return the argument of a call that is a dict, with a line for each of its members."""
    lines = "".join(f"            {key!r}: {item!r},\n" for key, item in value.items())
    return f"{name}={{\n{lines}        }}"


def _airflow_schema(flow: Flow, name: str) -> Schema:
    """Return what Airflow is told of a param: the words of JSON Schema."""
    param = (flow.params or {}).get(name, Param())
    schema = param_schema(param)
    return {**schema, "description": param.description} if param.description else schema


class _AirflowFile:
    """Writes the DAG file of a plan: the calls that make tasks, and who waits for whom."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.names = plan, set(plan.tasks)
        self.calls: List[str] = []
        self.edges: List[str] = []
        self.seen_as: Dict[str, str] = {}      # a task of the flow to what its downstream waits for

    def fresh(self, name: str) -> str:
        """Return `name`, or one like it that no task has."""
        while name in self.names:
            name += "_"
        self.names.add(name)
        return name

    def call(self, name: str, operator: str, rule: str, upstream: Iterable[str], *options: str) -> str:
        """Add a task; return its name."""
        lines = [f"task_id={name!r}", f"trigger_rule={rule!r}", *options]
        told = "".join(f"        {line},\n" for line in lines)
        self.calls.append(f"    tasks[{name!r}] = {operator}(\n{told}    )\n")
        names = ", ".join(f"tasks[{up!r}]" for up in upstream)
        if names:
            self.edges.append(f"    tasks[{name!r}].set_upstream([{names}])\n")
        return name

    def add(self, task: Task, rule: str, upstream: Sequence[str]) -> None:
        """Add a task of the flow, its instances and what stands for it downstream."""
        options = list(_airflow_retry(task.retry))
        if task.priority:
            options.append(f"priority_weight={task.priority}, weight_rule='absolute'")
        if task.description:
            options.append(f"doc={task.description!r}")
        does = _airflow_does(task)
        if not task.many:
            self.call(task.id, "MiniFlowTask", rule, upstream, *options, _airflow_dict("does", does))
        else:
            made = []
            for n, each in enumerate(instances(task, _NO_VALUES)):
                told = {**does, "id": instance_id(task.id, n), "of": task.id, "each": each}
                made.append(self.call(self.fresh(f"{task.id}.{n}"), "MiniFlowTask", rule, upstream, *options,
                                      _airflow_dict("does", told)))
            rules = ("all_success", made) if made else (rule, upstream)
            self.call(task.id, "Gather", *rules, "retries=0", f"instances={made!r}")
        self.seen_as[task.id] = task.id
        if task.allow_failure:
            self.seen_as[task.id] = self.call(self.fresh(f"{task.id}.tolerated"), "EmptyOperator",
                                              "none_skipped", [task.id], "retries=0")

    def add_handlers(self, handlers: Sequence[Task]) -> None:
        """Add on_success, on_failure and finally behind all that comes before."""
        if not handlers:
            return
        ends = list(self.seen_as.values())
        done = self.call(self.fresh("all_done"), "EmptyOperator", "all_done", ends, "retries=0")
        failed = self.call(self.fresh("any_failed"), "EmptyOperator", "one_failed", ends, "retries=0")
        ways = {"on_success": ("all_skipped", [failed]), "on_failure": ("all_success", [done, failed])}
        for task in handlers:
            last = [done, *(self.seen_as[name] for name in task.depends_on if self.plan.tasks[name].handler)]
            self.add(task, *ways.get(str(task.handler), ("all_done", last)))

    def dag(self, params: Mapping[str, Any]) -> Iterator[str]:
        """Yield the arguments of the DAG itself."""
        flow = self.plan.flow
        yield f"dag_id={flow.name!r}"
        schedule = flow.schedule[0] if flow.schedule else Schedule()
        zone = schedule.timezone or "UTC"
        timing = f"timedelta(seconds={schedule.every_s})" if schedule.every_s else None
        if schedule.cron:
            timing = f"CronTriggerTimetable({plain_cron(schedule.cron)!r}, timezone={zone!r})"
        yield f"schedule={timing}"
        yield "start_date=datetime(2024, 1, 1, tzinfo=timezone.utc)"
        yield f"catchup={schedule.catchup == 'all'}"
        if timing and schedule.overlap != "allow":
            yield "max_active_runs=1"
        if flow.description:
            yield f"description={flow.description!r}"
        if flow.tags:
            yield f"tags={list(flow.tags)!r}"
        if flow.max_parallel:
            yield f"max_active_tasks={flow.max_parallel}"
        if flow.timeout_s:
            yield f"dagrun_timeout=timedelta(seconds={float(flow.timeout_s)!r})"
        told = "".join(f"        {name!r}: Param({value!r}, **{_airflow_schema(flow, name)!r}),\n"
                       for name, value in params.items())
        yield f"params={{\n{told}    }}" if told else "params={}"

    def text(self, params: Mapping[str, Any], tasks_dir: str, losses: Sequence[str]) -> str:
        """Return the whole file."""
        flow, plan = self.plan.flow, self.plan
        upstream = "".join(f"    {name!r}: {list(plan.tasks[name].depends_on)!r},\n" for name in plan.order)
        head = "# Made by MiniFlow: runs on Airflow 2.10 and newer, and on Airflow 3.\n" + "".join(
            f"# {line}\n" for line in (*_AIRFLOW_NOTES, *losses))
        return "".join([
            head, _AIRFLOW_HEAD, f"\n\nTASKS_DIR = {tasks_dir!r}\n",
            "START_DIR = os.environ.get('MINIFLOW_START_DIR') or os.path.dirname(TASKS_DIR)\n",
            f"FLOW_ENV = {_airflow_value(flow.env)!r}\n", f"UPSTREAM = {{\n{upstream}}}\n\nwith DAG(\n",
            *(f"    {option},\n" for option in self.dag(params)), "):\n    tasks = {}\n",
            *self.calls, *self.edges])


def _airflow_losses(flow: Flow) -> Iterator[str]:
    """Yield what Airflow does otherwise."""
    yield from schedule_losses(flow, ("cron", "every_s"), ("none", "all"), ("queue", "allow"))
    for task in flow.tasks:
        if len(set(_waits(task.retry))) > 1 or task.retry.jitter and task.retry.backoff_s:
            yield (f"task {task.id}: Airflow draws each wait between attempts, up to twice as long as it is "
                   "here")
        if task.may_be_cached:
            yield f"task {task.id}: inputs and outputs are not looked at; it runs each time"
        if task.max_parallel:
            yield f"task {task.id}: max_parallel of its instances does not hold"
        if task.pool:
            yield f"task {task.id}: pool {task.pool} does not hold; make one in Airflow and name it here"
    if flow.fail_fast:
        yield "fail_fast: after a failure Airflow goes on with what does not depend on it"
    if flow.timeout_s:
        yield "timeout_s of the flow: after it Airflow runs no handler"
    if flow.secrets:
        yield "secrets: Airflow masks only what it holds itself, as the values of its connections"


@exporter("airflow")
def to_airflow(plan: Plan, params: Mapping[str, Any], tasks_dir: str) -> Exported:
    """Return a DAG file for Airflow 2.10 and 3; raise UsageError for what Airflow can't do."""
    problems = []
    for task in plan.flow.tasks:
        try:
            _refuse_for("Airflow", task)
            _airflow_does(task)
        except ValueError as exc:
            problems.append(f"task {task.id}: {exc}")
    if problems:
        raise UsageError("\n".join(problems))
    file = _AirflowFile(plan)
    for task in (plan.tasks[name] for name in plan.order):
        if not task.handler:
            file.add(task, task.trigger_rule, [file.seen_as[name] for name in task.depends_on])
    file.add_handlers([task for task in plan.flow.tasks if task.handler])
    file.call(file.fresh("watcher"), "Watcher", "one_failed", list(file.seen_as.values()), "retries=0")
    losses = tuple(_airflow_losses(plan.flow))
    return Exported(file.text(params, tasks_dir, losses), losses)


# ============================================================================
# == 23. ARGO: how does a flow run on Kubernetes?
# ============================================================================
# A manifest is a Workflow of Argo's in JSON: a DAG, and a template for each task, whose container executes a
# script of sh.  Two substitutions go over its text, Argo's of {{ }} and that of Kubernetes, of $(NAME) and
# $$.  So all that comes from the flow is quoted for sh, two braces are never left side by side in it, and
# each $ is doubled, which Kubernetes undoes.  Params come as variables of the environment, which sh does not
# read again.
#
# Argo has no trigger rules but expressions over what tasks became (Succeeded, Failed, Errored, Omitted),
# which it evaluates when all tasks named in one have ended, as MiniFlow does.  Omitted is what did not run,
# whether a failure was why (upstream_failed) or not (skipped); where it can be either, why a task was omitted
# becomes part of the expressions of its downstream.  Failures that are tolerated end with 0, as Argo lets no
# DAG with expressions tolerate them; and as it judges a DAG by its leaves, a last task fails if any has.

_MAX_DEPENDS = 500_000                         # characters of one expression
#: Words of the language of expressions, which no task can have for a name there.
_ARGO_WORDS = frozenset("and or not in let if else true false nil matches contains all any one none".split())


class _ArgoEnds(NamedTuple):
    """Expressions that tell what became of a task; None: it never becomes that.

    `failed` are several, of which one has to hold: what is downstream shares them, where each of two tasks
    with a copy of the whole would give the next one two copies, and so on.
    """

    success: Optional[str]
    failed: Tuple[str, ...]
    skipped: Optional[str]
    done: Optional[str]


def _any_of(parts: Iterable[Optional[str]]) -> Optional[str]:
    """Join expressions of which one has to hold; None: none can."""
    found = list(dict.fromkeys(part for part in parts if part))
    return found[0] if len(found) == 1 else f"({' || '.join(found)})" if found else None


def _all_of(parts: Iterable[Optional[str]]) -> Optional[str]:
    """Join expressions that all have to hold; None: they can't."""
    found = list(dict.fromkeys(parts))
    if None in found:
        return None
    return found[0] if len(found) == 1 else f"({' && '.join(map(str, found))})" if found else None


def _argo_depends(rule: str, upstream: Sequence[_ArgoEnds]) -> str:
    """Return the expression that a trigger rule is, over the ends of a task's upstream."""
    success, skipped = [ends.success for ends in upstream], [ends.skipped for ends in upstream]
    failed, done = [_any_of(ends.failed) for ends in upstream], [ends.done for ends in upstream]
    settled, some_success = _all_of(done), _any_of(success)
    no_failure = _all_of(_any_of(pair) for pair in zip(success, skipped))
    found = {
        "all_success": _all_of(success),
        "all_failed": _all_of(failed),
        "one_success": _all_of([some_success, settled]),
        "one_failed": _all_of([_any_of(failed), settled]),
        "none_failed": no_failure,
        "none_failed_min_one_success": _all_of([no_failure, some_success]),
        "none_skipped": _all_of(_any_of(pair) for pair in zip(success, failed)),
    }
    return found.get(rule, settled) or f"{settled} && !{settled}"


#: Where a task may end skipped under a rule: where any, or all, of its upstream may, or always.
_ARGO_SKIPS: Dict[str, Callable[[Iterable[Any]], bool]] = {
    "all_success": any, "none_skipped": any, "one_success": all, "none_failed_min_one_success": all,
    "all_failed": lambda skipped: True, "one_failed": lambda skipped: True}
#: The rules under which a failure upstream makes a task upstream_failed.
_ARGO_BARS = ("all_success", "none_failed", "none_failed_min_one_success", "one_success")


def _check_depends(rule: str, length: int) -> None:
    """Raise ValueError if what a trigger rule becomes is too long an expression."""
    if length > _MAX_DEPENDS:
        raise ValueError(f"trigger_rule: {rule} becomes an expression of {length:,} characters here, "
                         f"and Argo takes at most {_MAX_DEPENDS:,}; use all_done")


def _argo_ends(name: str, task: Task, upstream: Sequence[_ArgoEnds]) -> _ArgoEnds:
    """Return how to tell what became of a task that is called `name` in the DAG."""
    omitted, bad, rule = f"{name}.Omitted", (f"{name}.Failed", f"{name}.Errored"), task.trigger_rule
    why = tuple(dict.fromkeys(chain.from_iterable(ends.failed for ends in upstream)))
    bars = rule in _ARGO_BARS and bool(why)
    barred: Tuple[str, ...] = (omitted,) if bars else ()
    may_skip = upstream and rule in _ARGO_SKIPS and _ARGO_SKIPS[rule](ends.skipped for ends in upstream)
    skipped = omitted if may_skip else None
    if may_skip and bars:
        _check_depends(rule, sum(map(len, why)))
        skipped = f"({omitted} && !{_any_of(why)})"
        # Under the other rules a failure upstream is enough, so that there it says the same.
        barred = (f"({omitted} && {_any_of(why)})",) if rule == "one_success" else why
    done = _any_of([f"{name}.Succeeded", *bad, omitted])
    if task.allow_failure:
        return _ArgoEnds(_any_of([f"{name}.Succeeded", *bad, *barred]), (), skipped, done)
    return _ArgoEnds(f"{name}.Succeeded", (*bad, *barred), skipped, done)


def _argo_group_ends(ends: Sequence[_ArgoEnds]) -> _ArgoEnds:
    """Return how to tell what became of a task of instances; either all of them are skipped, or none is."""
    failed = tuple(dict.fromkeys(chain.from_iterable(each.failed for each in ends)))
    return _ArgoEnds(_all_of(each.success for each in ends), failed, ends[0].skipped,
                     _all_of(each.done for each in ends))


def _sh_quote(text: str) -> str:
    """Return `text` as one word of sh in which no two braces stand side by side."""
    return re.sub(r"\{(?=\{)", "{''", bash_quote(text))


def _sh_seconds(seconds: float) -> str:
    """Return a number of seconds in digits, as timeout(1) and Argo read it."""
    return f"{seconds:.3f}".rstrip("0").rstrip(".")


def _exit_codes(retry_on: Iterable[Union[int, str]]) -> List[int]:
    """Return the exit codes of what is retried; those of timeout(1) stand for a timeout."""
    return [code for item in retry_on for code in ([item] if isinstance(item, int) else
                                                   [124, 137] if item == "timeout" else [])]


class _ArgoScript:
    """Writes the script that the container of one task executes."""

    def __init__(self, flow: Flow, task: Task, values: Values, tasks_dir: str) -> None:
        self.flow, self.task, self.values, self.tasks_dir = flow, task, values, tasks_dir
        self.lookups: List[str] = []
        self.env: Dict[str, str] = {}          # what the flow and the task set: name to word

    def word(self, text: Any) -> str:
        """Return a word of sh for `text`, templates and all."""
        parts = parse_template(text) if isinstance(text, str) else (to_text(text),)
        words = [_sh_quote(part) if isinstance(part, str) else self.reference(part) for part in parts]
        return "".join(words) or "''"

    def reference(self, ref: Ref) -> str:
        """Return a word for what a template refers to."""
        root, path = str(ref.path[0]), ref.path[1:]
        if root in EACH_ROOTS:
            return _sh_quote(to_text(lookup(ref, self.values)))
        if root == "params" and len(path) == 1:
            return f'"$MINIFLOW_PARAM_{param_variable(str(path[0]))}"'
        if ref.text == "run.id":
            return '"$MINIFLOW_RUN_ID"'
        if root == "env":
            name = str(path[0])
            return self.env.get(name) or self.variable(name)
        what = {"params": "a part of a param, and Argo hands on whole ones; make it a param of its own",
                "run": "not known to a task in Argo; use a param"}
        raise ValueError(f"{ref.text} is " + what.get(root, "not handed on by Argo; use a file that both "
                                                            "tasks see"))

    def variable(self, name: str) -> str:
        """Look a variable up before anything is exported; return a word for it."""
        if not re.fullmatch(_VARIABLE, name):
            raise ValueError(f"env.{name}: sh can't read a variable of that name; use letters, digits and _")
        mine = f"mf_v{len(self.lookups) + 1}"
        self.lookups.append(f"{mine}=${{{name}?env.{name} is not set}}")
        return f'"${mine}"'

    def set_env(self, env: Mapping[str, Any]) -> None:
        """Add a layer of environment; its values see the layers below it."""
        self.env = {**self.env, **{name: self.word(value) for name, value in env.items()}}

    def option_words(self, name: str, item: Any) -> List[str]:
        """Return the words of one member of an `args` object."""
        alone = refs(item)[0] if refs(item) and _is_template(item) else None
        if alone and alone.path[0] in EACH_ROOTS:
            item, alone = lookup(alone, self.values), None
            return list(map(_sh_quote, option_argv(name, item)))
        if alone and alone.path[0] == "params" and self.reference(alone) and type(
                lookup(alone, self.values)) not in (str, int, float):
            raise ValueError(f"args.{name}: whether {alone.text} is a flag shows at run time only, which "
                             "Argo can't express; give args as an array")
        if not isinstance(item, str):
            return list(map(_sh_quote, option_argv(name, item)))
        if len(name) == 1:
            return [_sh_quote(f"-{name}"), self.word(item)]
        return [_sh_quote(f"--{name}=") + self.word(item)]

    def words(self) -> List[str]:
        """Return the words of what is executed, with its arguments."""
        action: Any = self.task.action
        if isinstance(action, Script):
            python = _sh_quote(action.python or "python3")
            if "/" in python and not python.startswith("'/"):
                python = f'"$mf_start"/{python}'
            found = [python, _sh_quote(f"{self.tasks_dir}/{action.path}")]
        elif isinstance(action.command, str):
            found = ["/bin/sh", "-c", _sh_quote(action.command.replace("$${{", "${{")), "sh"]
        else:
            found = [self.word(text) for text in action.command]
        if not isinstance(action.args, dict):
            return found + [self.word(item) for item in action.args]
        return found + [word for name, value in action.args.items()
                        for item in (value if isinstance(value, list) else [value])
                        for word in self.option_words(name, item)]

    def ending(self, words: str) -> List[str]:
        """Return the lines that execute the task, and tolerate a failure of its last attempt."""
        task = self.task
        if not task.allow_failure:
            return [f"exec {words}"]
        lines = [f"(exec {words})", "code=$?",
                 f'[ "$MINIFLOW_ATTEMPT" -le {task.retry.max_retries} ] || code=0']
        if task.retry.retry_on is not None:
            again = "|".join(map(str, _exit_codes(task.retry.retry_on))) or "none"
            lines.append(f"case $code in {again}) ;; *) code=0 ;; esac")
        return [*lines, "exit $code"]

    def text(self) -> str:
        """Return the script."""
        task = self.task
        self.set_env(self.flow.env)
        self.set_env(task.env)
        own = {"MINIFLOW_FLOW": _sh_quote(self.flow.name), "MINIFLOW_TASK": _sh_quote(task.id),
               "MINIFLOW_ATTEMPT": "$((MINIFLOW_ATTEMPT + 1))", "MINIFLOW_OUTPUT": '"$mf_dir/output"',
               "GITHUB_OUTPUT": '"$mf_dir/output"', "TMP_DIR": '"$mf_dir/tmp"'}
        words, before = " ".join(self.words()), ["mf_start=$PWD"]
        if task.timeout_s is not None:
            grace = _sh_seconds(max(task.grace_s, 0.001))
            words = f"timeout -k {grace} {_sh_seconds(max(task.timeout_s, 0.001))} {words}"
        if task.action.stdin is not None:
            before.append(f'printf %s {self.word(task.action.stdin)} >"$mf_dir/stdin" || exit 125')
        if task.cwd is not None:
            before.append(f"cd -- {self.word(task.cwd)} || exit 127")
        stdin = "/dev/null" if task.action.stdin is None else '"$mf_dir/stdin"'
        exports = [f"export {name}={word}" for name, word in {**self.env, **own}.items()]
        return "\n".join(['mf_dir=$(mktemp -d) && mkdir "$mf_dir/tmp" || exit 125', *self.lookups, *before,
                          *exports, *self.ending(f"{words} <{stdin}"), ""])


def _argo_retry(retry: Retry) -> Schema:
    """Return how often and when Argo tries again."""
    strategy: Schema = {"limit": str(retry.max_retries), "retryPolicy": "Always"}
    if retry.backoff_s:
        first = _sh_seconds(min(retry.backoff_s, retry.max_backoff_s))
        strategy["backoff"] = {"duration": f"{first}s", "factor": "2",
                               "cap": f"{_sh_seconds(retry.max_backoff_s)}s"}
    if retry.retry_on is not None:
        strategy["expression"] = f"asInt(lastRetry.exitCode) in {_exit_codes(retry.retry_on)}"
    return strategy


class _ArgoManifest:
    """Writes the manifest of a plan."""

    def __init__(self, plan: Plan, params: Mapping[str, Any], tasks_dir: str) -> None:
        self.plan, self.params, self.tasks_dir = plan, params, tasks_dir
        self.templates: List[Schema] = []
        self.nodes: List[Schema] = []
        self.ends: Dict[str, _ArgoEnds] = {}
        self.red: List[str] = []               # nodes whose failure is one of the run
        self.handlers: Dict[str, str] = {}     # field to the name of its template
        self.names = {"main", "exit"}
        self.param_names: Dict[str, str] = {}
        for name in params:
            plain = re.sub(r"[^A-Za-z0-9_-]", "_", name) or "_"
            self.param_names[name] = self.fresh(plain, self.param_names.values())
        self.image = self.fresh("image", self.param_names.values())

    def fresh(self, name: str, taken: Collection[str]) -> str:
        """Return `name`, or one like it that is not among those taken."""
        return next(each for n in range(1, len(taken) + 2) for each in [f"{name}-{n}" if n > 1 else name]
                    if each not in taken)

    def name(self, task_id: str) -> str:
        """Return the name of a task in the manifest: DNS-1123, and a name in an expression too."""
        name = re.sub(r"[^a-z0-9]+", "-", task_id.lower()).strip("-")[:50].strip("-")
        if not name or name[0].isdigit() or name in _ARGO_WORDS:
            name = f"t-{name}".rstrip("-")
        name = self.fresh(name, self.names)
        self.names.add(name)
        return name

    def container(self, script: str, retried: bool = False) -> Schema:
        """Return a container that executes a script; in one that is retried Argo counts from 0."""
        env = {f"MINIFLOW_PARAM_{param_variable(name)}": f"{{{{workflow.parameters.{as_argo}}}}}"
               for name, as_argo in self.param_names.items()}
        env.update(MINIFLOW_RUN_ID="{{workflow.name}}", MINIFLOW_ATTEMPT="{{retries}}" if retried else "0")
        return {"name": "main", "image": f"{{{{workflow.parameters.{self.image}}}}}",
                "command": ["/bin/sh", "-c", script.replace("$", "$$")],
                "env": [{"name": name, "value": value} for name, value in env.items()]}

    def template(self, task: Task, each: Mapping[str, Any]) -> str:
        """Add the template of a task or an instance; return its name."""
        values = _NO_VALUES._replace(params=self.params, **each)
        script = _ArgoScript(self.plan.flow, task, values, self.tasks_dir).text()
        name, retried = self.name(task.id), bool(task.retry.max_retries)
        template: Schema = {"name": name, "container": self.container(script, retried)}
        if retried:
            template["retryStrategy"] = _argo_retry(task.retry)
        if task.timeout_s is not None:          # timeout(1) keeps it; this is for a pod that gets no image
            template["activeDeadlineSeconds"] = int(task.timeout_s + task.grace_s) + 60
        self.templates.append(template)
        return name

    def add(self, task: Task) -> None:
        """Add a task of the flow to the DAG, and each of its instances."""
        upstream = [self.ends[name] for name in task.depends_on]
        depends = {"depends": _argo_depends(task.trigger_rule, upstream)} if upstream else {}
        _check_depends(task.trigger_rule, len(depends.get("depends", "")))
        all_each = instances(task, _NO_VALUES) if task.many else [{}]
        if not all_each:
            raise ValueError(f"{task.many} is empty, which no DAG of Argo's can say; leave the task out")
        made = []
        for n, each in enumerate(all_each):
            one = instance_of(task, instance_id(task.id, n), None) if task.many else task
            name = self.template(one, each)
            self.nodes.append({"name": name, "template": name, **depends})
            made.append(_argo_ends(name, task, upstream))
            self.red += [] if task.allow_failure else [name]
        self.ends[task.id] = _argo_group_ends(made) if task.many else made[0]

    def watch(self) -> None:
        """Add the last task, which fails if any task has, as Argo judges a DAG by its leaves."""
        failed = _any_of(f"{name}.{end}" for name in self.red for end in ("Failed", "Errored"))
        if failed is None:
            return
        name = self.name("watcher")
        self.templates.append({"name": name, "container": self.container("echo a task has failed; exit 1")})
        self.nodes.append({"name": name, "template": name, "depends": failed})

    def add_handler(self, task: Task) -> None:
        """Add the template of on_success, on_failure or finally."""
        if task.many:
            raise ValueError(f"{task.many} of a handler is for MiniFlow to expand; write one task")
        self.handlers[str(task.handler)] = self.template(task, {})

    def exit(self) -> Schema:
        """Return what has the handlers run when the workflow ends, if there are any."""
        steps: List[List[Schema]] = [[], []]
        for field, name in self.handlers.items():
            step: Schema = {"name": name, "template": name}
            if field != "finally":
                step["when"] = f"{{{{workflow.status}}}} {'!=' if field == 'on_failure' else '=='} Succeeded"
                step["continueOn"] = {"failed": True, "error": True}
            steps[field == "finally"].append(step)
        if self.handlers:
            self.templates.append({"name": "exit", "steps": [some for some in steps if some]})
        return {"onExit": "exit"} if self.handlers else {}

    def parameters(self) -> Iterator[Schema]:
        """Yield the parameters of the workflow."""
        for name, value in self.params.items():
            declared = (self.plan.flow.params or {}).get(name, Param())
            parameter: Schema = {"name": self.param_names[name], "value": to_text(value)}
            if declared.enum is not None:
                parameter["enum"] = [to_text(item) for item in declared.enum]
            yield parameter
        yield {"name": self.image, "value": "python:3", "description": "has what the tasks need"}

    def spec(self) -> Schema:
        """Return the workflow's spec."""
        flow = self.plan.flow
        limits = {"parallelism": flow.max_parallel,
                  "activeDeadlineSeconds": flow.timeout_s and max(1, round(flow.timeout_s))}
        end = self.exit()
        main: Schema = {"name": "main", "dag": {"failFast": flow.fail_fast, "tasks": self.nodes}}
        return {"entrypoint": "main", **end, **{name: value for name, value in limits.items() if value},
                "arguments": {"parameters": list(self.parameters())}, "templates": [main, *self.templates]}


def _argo_losses(flow: Flow, tasks_dir: str) -> Iterator[str]:
    """Yield what Argo does otherwise."""
    yield from schedule_losses(flow, ("cron",), ("none",), ("skip", "allow"))
    yield "the parameter image names the image of all tasks, python:3 unless another one is given"
    if any(isinstance(task.action, Script) for task in flow.tasks):
        yield f"scripts are read from {shown(tasks_dir, 200)} in that image; have them there"
    yield "outputs: what a task writes is not handed on, and there is no context file"
    for task in flow.tasks:
        for name in ("pool", "priority", "max_parallel"):
            if getattr(task, name):
                yield f"task {task.id}: {name} does not hold"
        if task.retry.jitter and task.retry.backoff_s:
            yield f"task {task.id}: jitter does not hold"
        if task.may_be_cached:
            yield f"task {task.id}: inputs and outputs are not looked at; it runs each time"
    if flow.fail_fast:
        yield "fail_fast: Argo stops when a last task of the DAG has failed, and not at the first failure"
    if flow.secrets:
        yield "secrets: Argo masks nothing, and pods do not have the variables of this machine"


def _argo_unfit(params: Mapping[str, Any]) -> Iterator[str]:
    """Yield the params that would reach no task as they are."""
    for name, value in params.items():
        found = re.search(r"\$[$(]|\{\{", to_text(value))
        if found:
            yield (f"params.{name}: {found[0]} in {shown(value)} is replaced by Kubernetes or Argo; "
                   "leave it out")


@exporter("argo")
def to_argo(plan: Plan, params: Mapping[str, Any], tasks_dir: str) -> Exported:
    """Return the manifest of a Workflow for Argo, in JSON; raise UsageError for what Argo can't do."""
    manifest, problems = _ArgoManifest(plan, params, tasks_dir), list(_argo_unfit(params))
    for task in (plan.tasks[name] for name in plan.order):
        manifest.ends[task.id] = _argo_ends(task.id, task, [])             # for those downstream, if it fails
        try:
            _refuse_for("Argo", task)
            if task.handler:
                manifest.add_handler(task)
            else:
                manifest.add(task)
        except (ValueError, LookupError) as exc:
            problems.append(f"task {task.id}: {exc}")
    if problems:
        raise UsageError("\n".join(problems))
    manifest.watch()
    losses = tuple(_argo_losses(plan.flow, tasks_dir))
    notes = {"miniflow/flow": plan.flow.name, "miniflow/differs": "\n".join(losses),
             **({"miniflow/description": plan.flow.description} if plan.flow.description else {})}
    name = re.sub(r"[^a-z0-9]+", "-", plan.flow.name.lower()).strip("-")[:40].strip("-") or "flow"
    kind, spec, names = "Workflow", manifest.spec(), {"generateName": f"{name}-"}
    schedule = plan.flow.schedule[0] if plan.flow.schedule else Schedule()
    if schedule.cron:
        kind, names = "CronWorkflow", {"name": name}
        policy = {"skip": "Forbid", "queue": "Forbid", "allow": "Allow"}[schedule.overlap]
        spec = {"schedules": [plain_cron(schedule.cron)], "timezone": schedule.timezone or "UTC",
                "concurrencyPolicy": policy, "workflowSpec": spec}
    return Exported(json.dumps({
        "apiVersion": "argoproj.io/v1alpha1", "kind": kind, "metadata": {**names, "annotations": notes},
        "spec": spec}, indent=1) + "\n", losses)


# ============================================================================
# == 24. SIMULATION: what would a run do, and how long would it take?
# ============================================================================
# The scheduler that runs flows drives a world in which nothing is executed: an attempt is the time it takes
# and the code it ends with, and waiting makes the clock jump.  So retries, timeouts, trigger rules, pools and
# handlers are what they are in a run.
#
# What only a run can tell is taken from earlier ones: how long tasks take, what they hand on.  What none has
# told is assumed, and named: a task takes as long as the others do in the middle, a condition is true, a
# task with foreach has as many instances as are known of it.

class Simulated:
    """A World in which an attempt takes as many seconds, and ends with the code, that `attempt` returns."""

    def __init__(self, attempt: Callable[[str, int], Tuple[float, int]],
                 environ: Mapping[str, str] = {}) -> None:
        self.attempt, self.environ, self.clock = attempt, environ, 0.0
        self.ends: List[Tuple[float, int, str, int]] = []   # heap of (time, order, task, exit code)
        self.started = 0

    def now(self) -> float:
        """Return the time, which goes on in wait() alone."""
        return self.clock

    def start(self, run: Run, action: Start) -> List[Event]:
        """Start an attempt: note when it will end."""
        seconds, code = self.attempt(action.task, action.attempt)
        self.started += 1
        heapq.heappush(self.ends, (round(self.clock + seconds, 6), self.started, action.task, code))
        return []

    def stop(self, run: Run, action: Stop) -> List[Event]:
        """End an attempt by a signal, which it obeys at once."""
        code = -9 if action.signal == "KILL" else -15
        self.ends = [(self.clock, n, name, code) if name == action.task else (at, n, name, old)
                     for at, n, name, old in self.ends]
        heapq.heapify(self.ends)
        return []

    def ask(self, run: Run, action: Ask) -> List[Event]:
        """Find out whether a task is to run."""
        return [admit(run, action.task, self.clock, self.environ)]

    def output(self, task: str) -> Mapping[str, Any]:
        """Return what a task hands on."""
        return {}

    def wait(self, run: Run, until: Optional[float]) -> List[Event]:
        """Let the clock jump to `until` or the next end of an attempt, and return what happens then."""
        times = [at for at in (until, self.ends[0][0] if self.ends else None) if at is not None]
        assert times, "nothing can ever happen again"
        self.clock = max(self.clock, min(times))
        if not self.ends or self.ends[0][0] > self.clock:
            return []
        _, _, name, code = heapq.heappop(self.ends)
        return [attempt_end(run, name, self.clock, code, run.tasks[name].stopping, lambda: self.output(name))]


class Forecast(Simulated):
    """A World of what is known of earlier runs; `assumed` says by task what is not."""

    def __init__(self, plan: Plan, durations: Mapping[str, float], outputs: Mapping[str, Mapping[str, Any]],
                 failing: Collection[str] = (), seed: Optional[int] = None,
                 environ: Mapping[str, str] = {}) -> None:
        super().__init__(self._attempt, environ)
        self.plan, self.durations, self.outputs = plan, durations, outputs
        self.failing, self.seed = failing, seed
        self.assumed: Dict[str, str] = {}
        ordered = sorted(durations.values())
        self.usual = ordered[len(ordered) // 2] if ordered else 1.0
        self.groups: Dict[str, List[float]] = {}
        for name, seconds in durations.items():
            if name not in plan.tasks and name.endswith("]"):
                self.groups.setdefault(name[:name.rindex("[")], []).append(seconds)

    def seconds(self, name: str) -> float:
        """Return how long an attempt of a task, or of an instance of one, takes."""
        task = name if name in self.plan.tasks else name[:name.rindex("[")]
        action, known = self.plan.tasks[task].action, self.groups.get(task, ())
        for among in (name, task):
            if among in self.durations:
                return self.durations[among]
        if isinstance(action, WaitFor) and isinstance(action.condition.get("seconds"), (int, float)):
            return float(action.condition["seconds"])
        if known:
            return sorted(known)[len(known) // 2]
        self.assumed.setdefault(task, f"it takes {format_span(self.usual)}")
        return self.usual

    def _attempt(self, name: str, number: int) -> Tuple[float, int]:
        """Return how long an attempt lasts, with a seed from half to twice as long, and how it ends."""
        factor = 1.0 if self.seed is None else 4 ** (chance(self.seed, name, number) - 0.5)
        fails = name in self.failing or name.rpartition("[")[0] in self.failing
        return self.seconds(name) * factor, int(fails)

    def output(self, task: str) -> Mapping[str, Any]:
        return self.outputs.get(task, {})

    def ask(self, run: Run, action: Ask) -> List[Event]:
        event, task = admit(run, action.task, self.clock, self.environ), run.defs[action.task]
        if not isinstance(event, TaskSettled) or event.status != FAILED:
            return [event]
        if task.many is None:
            self.assumed.setdefault(task.id, f"its condition is true ({one_line(event.reason)})")
            return [TaskAdmitted(self.clock, task.id)]
        number = len(self.groups.get(task.id, ())) or 1
        self.assumed.setdefault(task.id, f"it has {number} instances ({one_line(event.reason)})")
        return [TaskExpanded(self.clock, task.id, [{"item": None}] * number)]


def simulate(run: Run, world: Simulated, slots: Optional[int]) -> Run:
    """Drive a run that nobody records to its end in a simulated world, and return it."""
    steps = drive(run, world, lambda events, happened: None, slots)
    events: Optional[List[Event]] = None
    try:
        while True:
            events = world.wait(run, steps.send(events))                # type: ignore[arg-type]
    except StopIteration:
        return run


# ############################################################################
# ## THE LINE: nothing above touches the clock, the disk, processes, the network, the environment or chance.
# ############################################################################


# ============================================================================
# == 25. DISK: how does a byte get onto the disk, and stay there?
# ============================================================================
# All state is written through the few calls of Disk, so that a test can put a fault at each of them, and
# rebuild what a power cut may leave behind.  A file is replaced by writing a new one beside it and renaming
# that, so that whoever reads finds the old or the new.  Nothing here follows a symbolic link but the way to
# the output directory.

_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_CLOEXEC = getattr(os, "O_CLOEXEC", 0)
_NONBLOCK = getattr(os, "O_NONBLOCK", 0)       # a FIFO in the place of a file is not waited for
#: What the system says where it has no means left for this process, and where the disk is the trouble; all
#: else is about what was asked.
PRESSURE_ERRORS = frozenset([errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE])
FULL_ERRORS = frozenset([errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)])
DISK_ERRORS = FULL_ERRORS | {errno.EIO, errno.EROFS}


class Disk:
    """The calls by which state reaches the disk: one small layer, so that a test can put a fault at each."""

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        """Open without following a symbolic link; a new file gets exactly `mode`, whatever the umask."""
        fd = os.open(path, flags | _NOFOLLOW | _CLOEXEC, mode)
        if flags & os.O_CREAT and hasattr(os, "fchmod"):
            os.fchmod(fd, mode)
        return fd

    def write(self, fd: int, content: bytes) -> None:
        """Write all of `content`."""
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(fd, rest):]

    def sync(self, fd: int) -> None:
        """Bring what was written to the medium, as far as fsync does (on macOS: F_FULLFSYNC)."""
        if sys.platform == "darwin":
            import fcntl
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        else:
            os.fsync(fd)

    def sync_dir(self, path: str) -> None:
        """Bring the entries of a directory to the medium, where the system can."""
        if os.name != "nt":
            fd = os.open(path, os.O_RDONLY | _CLOEXEC)
            try:
                os.fsync(fd)
            except OSError as exc:
                if exc.errno not in (errno.EINVAL, errno.ENOTSUP):
                    raise
            finally:
                os.close(fd)

    def replace(self, old: str, new: str) -> None:
        """Rename, replacing what is there."""
        os.replace(old, new)

    def unlink(self, path: str) -> None:
        """Remove a file; one that is not there is no error."""
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass

    def truncate(self, fd: int, size: int) -> None:
        """Cut an open file to `size` bytes."""
        os.ftruncate(fd, size)

    def close(self, fd: int) -> None:
        """Close a file."""
        os.close(fd)

    def link(self, old: str, new: str) -> None:
        """Give a file a second name; FileExistsError if that is taken."""
        os.link(old, new)

    def make_dir(self, path: str, outermost: bool = False, durable: bool = False) -> None:
        """Make a directory of mode 0700, or see that the one that is there is no way in for somebody else.

        The `outermost` one may be a symbolic link, and those above it are made as well.
        """
        above = os.path.dirname(path)
        if outermost and above != path and not os.path.isdir(above):
            self.make_dir(above, True, durable)
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            self._check_dir(path, (os.stat if outermost else os.lstat)(path))
        else:
            os.chmod(path, 0o700)
            if durable:
                self.sync_dir(above)

    def _check_dir(self, path: str, found: os.stat_result) -> None:
        """Raise OSError if `path` is no directory, or one through which others could lead us astray."""
        if not stat.S_ISDIR(found.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "is there and is not a directory", path)
        if os.name == "nt":
            return
        if found.st_uid not in (os.geteuid(), 0) and os.geteuid():
            raise PermissionError(errno.EPERM, f"it belongs to another user, uid {found.st_uid}", path)
        if found.st_mode & stat.S_IWOTH and self._has_modes(path):
            raise PermissionError(errno.EPERM, f"everybody may write there (mode {found.st_mode & 0o7777:o})",
                                  path)

    def _has_modes(self, path: str) -> bool:
        """Tell whether files below `path` have modes of their own: on some file systems all have the same."""
        probe = os.path.join(path, f".mode-{os.urandom(8).hex()}")
        os.mkdir(probe, 0o700)
        try:
            return not os.stat(probe).st_mode & stat.S_IWOTH
        finally:
            os.rmdir(probe)

    def put(self, path: str, content: Union[bytes, Iterable[bytes]], durable: bool) -> None:
        """Replace the file at `path` by one with `content`: it is always whole, the old or the new."""
        temporary = path + ".tmp"              # a fixed name: whoever writes holds the lock
        self.unlink(temporary)
        fd = self.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            for piece in [content] if isinstance(content, bytes) else content:
                self.write(fd, piece)
            if durable:
                self.sync(fd)
        except BaseException:
            self.close(fd)
            self.unlink(temporary)
            raise
        self.close(fd)
        self.replace(temporary, path)
        if durable:
            self.sync_dir(os.path.dirname(path))


def open_file(path: str, follow: bool = False) -> IO[bytes]:
    """Open a regular file to read its bytes; raise OSError for anything else, and for a symbolic link."""
    flags = os.O_RDONLY | _CLOEXEC | _NONBLOCK | getattr(os, "O_BINARY", 0)
    fd = os.open(path, flags if follow else flags | _NOFOLLOW)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is not a regular file", path)
    return open(fd, "rb")


def read_file(path: str, limit: int = -1, follow: bool = True) -> bytes:
    """Return the content of a regular file, at most `limit` bytes of it; raise OSError for anything else."""
    with open_file(path, follow) as file:
        return file.read(limit)


# ============================================================================
# == 26. LOCKS: which one engine may work on a run?
# ============================================================================
# The engine that works on a run holds the system's lock on RUN.lock (flock; on Windows that of a byte), which
# dies with it however it dies, so that there are no stale locks.  What the file says of its owner is for
# people.
#
# Some network file systems have no such locks.  There an engine owns a run by RUN.owner, a file that names
# its process: link() makes it whole, or fails if there is one.  If that process has gone, the file is
# renamed, so that of several engines that see this one succeeds.  Whether it has can be told on its own host
# only.

NO_LOCKS = frozenset([errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, getattr(errno, "EOPNOTSUPP", errno.ENOTSUP)])
_LOOKS_S = 0.2                                 # somebody who only looks holds a lock for an instant
_TELLS_S = 1.5                                 # whoever has just taken one tells who it is within an instant


def process_stat(pid: Union[int, str]) -> List[bytes]:
    """Return the fields of /proc/PID/stat from the third on (state, parent, group, …); none if unknown."""
    try:
        return read_file(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    except OSError:
        return []


def start_ticks(pid: int) -> Optional[int]:
    """Return when the system started a process, in its ticks (field 22 of its stat); None if unknown."""
    fields = process_stat(pid)
    return int(fields[19]) if fields else None


def this_engine(now: float) -> Dict[str, Any]:
    """Return who this engine is: its process, since when, and the token of its tasks' cookies."""
    try:
        boot = read_file("/proc/sys/kernel/random/boot_id").decode().strip()
        pids = os.stat("/proc/self/ns/pid").st_ino  # containers count their processes each for itself
    except OSError:
        boot, pids = "", 0
    host = os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", "?")
    return {"pid": os.getpid(), "ticks": start_ticks(os.getpid()), "host": host, "boot": boot, "pids": pids,
            "since": format_time(now), "token": os.urandom(8).hex()}


def is_visible(engine: Mapping[str, Any]) -> bool:
    """Tell whether the process of an engine can be seen from here: on this host, in the same container."""
    here = this_engine(0)
    return all(engine.get(key) == here[key] for key in ("host", "boot", "pids"))


def is_process(pid: Any, ticks: Any) -> bool:
    """Tell whether process `pid`, which the system started at `ticks`, still lives."""
    if not isinstance(pid, int):
        return False
    fields = process_stat(pid)
    if fields or os.path.exists("/proc/self/stat"):
        return bool(fields) and fields[0] != b"Z" and int(fields[19]) == ticks
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, AttributeError):
        return False
    except OSError:
        pass                                   # somebody else's process, but one that lives
    return True


def may_live(engine: Mapping[str, Any]) -> bool:
    """Tell whether an engine may be alive: what can't be seen from here may, unless the host was booted."""
    here = this_engine(0)
    if engine.get("host") == here["host"] and engine.get("boot") != here["boot"]:
        return False
    return not is_visible(engine) or is_process(engine.get("pid"), engine.get("ticks"))


def try_lock(fd: int, shared: bool = False) -> bool:
    """Lock an open file without waiting, until it is closed; tell whether that worked.

    Raises OSError with one of NO_LOCKS where the file system has no locks.
    """
    try:
        if os.name == "nt":
            import msvcrt
            os.lseek(fd, 2**30, os.SEEK_SET)   # a byte that nobody reads: a locked one can't be read
            try:
                msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
            finally:
                os.lseek(fd, 0, os.SEEK_SET)
        else:
            import fcntl
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as exc:
        if exc.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return False
        raise
    return True


def _parse_owner(content: bytes) -> Dict[str, Any]:
    """Return what the owner of a lock wrote of itself; nothing if that can't be read."""
    try:
        owner = json.loads(content)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _owner_file(path: str) -> str:
    """Return what stands for the lock `path` where there are no locks."""
    return path[:-len(".lock")] + ".owner"


def _file_owner(path: str) -> Dict[str, Any]:
    """Return who owns a run by a file, where there are no locks; nothing if nobody does any more."""
    try:
        owner = _parse_owner(read_file(_owner_file(path), follow=False))
    except OSError:
        return {}
    return owner if owner and may_live(owner) else {}


def lock_owner(path: str) -> Optional[Dict[str, Any]]:
    """Return who holds the lock RUN.lock at `path`, {} if that is not known, or None if nobody does."""
    owner = _file_owner(path)
    if owner:
        return owner
    try:
        fd = os.open(path, (os.O_RDONLY if os.name != "nt" else os.O_RDWR) | _CLOEXEC | _NOFOLLOW | _NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError:
        return {}                              # somebody else's: better not touched
    try:
        return None if try_lock(fd, shared=True) else _parse_owner(os.read(fd, 4096))
    except OSError as exc:
        return None if exc.errno in NO_LOCKS else {}
    finally:
        os.close(fd)


def _is_file(fd: int, path: str) -> bool:
    """Tell whether an open file is the one at `path`: its last owner may just have removed that."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except OSError:
        return False


class Lock:
    """What the one engine that works on a run holds; made by take_lock()."""

    #: Open files of locks in this process: a forked child closes its own of them, or it would hold the locks.
    held: Set[int] = set()

    def __init__(self, disk: Disk, path: str, content: bytes, fd: Optional[int] = None) -> None:
        self.path, self._disk, self._content, self._fd = path, disk, content, fd
        if fd is not None:
            self.held.add(fd)

    @property
    def is_weak(self) -> bool:
        """True where the file system has no locks and a file has to do."""
        return self._fd is None

    def is_held(self) -> bool:
        """Tell whether the lock is still ours: its file may have been removed, and another engine come."""
        if self._fd is not None:
            return _is_file(self._fd, self.path)
        try:
            return read_file(self.path) == self._content
        except OSError:
            return False

    def release(self, remove: bool) -> None:
        """Let go of the run, and `remove` the file, unless somebody may look at it to see what went wrong."""
        try:
            if (remove or self.is_weak) and self.is_held():
                self._disk.unlink(self.path)
        finally:
            if self._fd is not None:
                self.held.discard(self._fd)
                self._disk.close(self._fd)

    @classmethod
    def close_in_child(cls) -> None:
        """Close what a forked child has inherited: the lock is the parent's."""
        while cls.held:
            os.close(cls.held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=Lock.close_in_child)


def locked_by(run_id: str, owner: Mapping[str, Any]) -> RunLocked:
    """Return the error that says who works on a run."""
    return RunLocked(f"run {run_id} is being run by process {owner.get('pid', '?')} on host "
                     f"{owner.get('host', '?')} since {owner.get('since', '?')}; wait for it, or cancel it")


def _locked(path: str, owner: Mapping[str, Any]) -> RunLocked:
    """Return the error that says who holds the lock at `path`."""
    return locked_by(os.path.basename(path).rpartition(".")[0], owner)


def _take_by_file(disk: Disk, path: str, me: Mapping[str, Any], force: bool) -> None:
    """Own a run by the file at `path`, which names this engine, or raise RunLocked."""
    mine, stale = f"{path}.{me['token']}", f"{path}.stale-{me['token']}"
    disk.put(mine, json.dumps(me).encode(), True)
    try:
        while True:
            try:
                return disk.link(mine, path)
            except FileExistsError:
                pass
            try:
                owner = read_file(path, follow=False)
                if may_live(_parse_owner(owner)) and not force:
                    raise _locked(path, _parse_owner(owner))
                disk.replace(path, stale)
            except FileNotFoundError:
                continue                       # another engine was quicker
            if read_file(stale) != owner:      # by then it was the file of an engine that lives
                disk.replace(stale, path)
                raise _locked(path, _parse_owner(read_file(path)))
            disk.unlink(stale)
    finally:
        disk.unlink(mine)


def take_lock(disk: Disk, path: str, me: Mapping[str, Any], force: bool = False) -> Lock:
    """Take the lock RUN.lock at `path` for the engine `me`; raise RunLocked if another one holds it.

    With `force` an engine on another host is taken to be gone; that matters only where there are no locks.
    """
    end, content = time.monotonic() + _LOOKS_S, json.dumps(me).encode()
    while True:
        fd = disk.open(path, os.O_RDWR | os.O_CREAT)
        try:
            if try_lock(fd):
                owner = _file_owner(path)
                if owner and not force:
                    raise _locked(path, owner)             # by an engine that sees no locks here
                if _is_file(fd, path):
                    disk.unlink(_owner_file(path))
                    disk.truncate(fd, 0)
                    disk.write(fd, content)
                    lock, fd = Lock(disk, path, content, fd), -1
                    return lock
            else:
                owner = _parse_owner(os.read(fd, 4096))      # it may not have written who it is yet
                if time.monotonic() > end + (0 if owner and may_live(owner) else _TELLS_S):
                    raise _locked(path, owner)
        except OSError as exc:
            if exc.errno not in NO_LOCKS:
                raise
            disk.unlink(path)
            _take_by_file(disk, _owner_file(path), me, force)
            return Lock(disk, _owner_file(path), content)
        finally:
            if fd >= 0:
                disk.close(fd)
        time.sleep(0.01)


# ============================================================================
# == 27. STORE: where do runs live, and how do they survive?
# ============================================================================
# The engine that holds the lock of a run appends to its journal RUN.jsonl, and now and then rewrites the view
# RUN.json.  The protocol:
#
#   open    take the lock; read what is there; keep a damaged tail aside; put a fresh journal, whose first
#           record holds the whole state, in place of the old one by rename; write the view durably.
#   event   one write of whole lines; if it fails, cut the file back to the last good byte.  If the disk is
#           full, wait for space; after another error go on in a fresh journal, once; else stop.
#   view    temporary file and rename, without fsync, and never more than a twentieth of the time: after one
#           that took a second nothing is written for twenty, the one that `open` wrote among them.
#   finish  view with fsync and rename, then remove journal and lock.  Doing it again does no harm.
#
# The ends of some attempts and the starts of the next are two writes.  One would do if events were true
# before they are on disk; but a journal that is begun anew after an error would then hold some of them twice.
#
# Reading takes no lock and repairs nothing: the journal first, then the snapshot (the other order can miss
# both), the longest valid prefix of the one and the other if its checksum holds; the highest sequence number
# wins.  Files without a valid state are reported and never replaced by an empty one.

_RUN_ID = r"[A-Za-z0-9_][A-Za-z0-9_-]{0,127}"
_MADE_ID = r"(.+)-[0-9]{8}T[0-9]{6}Z-[0-9a-f]{4}"
_DEVICES = r"(?i)con|prn|aux|nul|com[0-9]|lpt[0-9]"
STALL_S = 60.0                                 # how long a full disk is waited for
_RECENT = 16                                   # of so many runs the newest one is asked how long tasks take
_CHECK_S = 2.0  # how often an idle engine sees if the run is still its own
_TRUST_S = 0.005                               # so soon after having seen it, a busy one takes it for granted
DURABILITIES = ("full", "normal", "off")


class RunFiles(NamedTuple):
    """Where everything of one run lies."""

    state: str
    journal: str
    lock: str
    logs: str
    tmp: str


class Loaded(NamedTuple):
    """A run as found on disk: `live` if an engine works on it; `damage` is the unread tail of its journal."""

    run: Run
    seq: int
    live: bool
    engine: Mapping[str, Any]
    damage: bytes

    @property
    def status(self) -> str:
        """The status of the run: interrupted, if it should be running and nobody works on it."""
        return self.run.status if self.live or self.run.outcome else INTERRUPTED

    def status_of(self, task_run: TaskRun) -> str:
        """Return the status of a task: without an engine only a job of a cluster can be running."""
        goes_on = self.live or task_run.attempts and task_run.attempts[-1].job is not None
        return INTERRUPTED if task_run.status == RUNNING and not goes_on else task_run.status


def _read_journal(path: str) -> Tuple[Optional[Run], int, Mapping[str, Any], bytes]:
    """Return the run of a journal's valid prefix, its last seq, its engine, and the rest of the bytes."""
    try:
        content = read_file(path, follow=False)
    except FileNotFoundError:
        return None, -1, {}, b""
    run: Optional[Run] = None
    seq, at, engine = -1, 0, {}
    for line in content.splitlines(keepends=True):
        record = decode_record(line)
        if (record is None or (run is None) != (record.get("event") == "opened")
                or run and record["seq"] != seq + 1):
            break
        if run is None:
            run, engine = run_from_json(record["state"]), record["state"]["engine"]
        else:
            run.apply(event_from_json(record))
        seq, at = record["seq"], at + len(line)
    return run, seq, engine, content[at:]


def check_run_id(run_id: Any) -> None:
    """Raise UsageError for what can't be the id of a run."""
    if not isinstance(run_id, str) or not re.fullmatch(_RUN_ID, run_id) or re.fullmatch(_DEVICES, run_id):
        raise UsageError(f"{shown(run_id)} is no run id; use letters, digits, _ and -, not starting with -, "
                         "at most 128, and no name of a device")


def _id_stem(flow: str) -> str:
    """Return what the ids that we give to runs of `flow` begin with."""
    return re.sub("[^A-Za-z0-9_-]", "_", flow)[:100].lstrip("-") or "_"


class Store:
    """The output directory: the runs, their logs, and generated scripts."""

    def __init__(self, path: str, disk: Optional[Disk] = None) -> None:
        self.path, self.disk = os.path.abspath(path), disk or Disk()
        self.runs, self.place = os.path.join(self.path, "runs"), os.path.realpath(path)

    def files(self, run_id: str) -> RunFiles:
        """Return where the files of a run lie; raise UsageError if `run_id` can't be the name of a run."""
        check_run_id(run_id)
        base = os.path.join(self.runs, run_id)
        return RunFiles(base + ".json", base + ".jsonl", base + ".lock",
                        os.path.join(self.path, "logs", run_id), os.path.join(self.path, "tmp", run_id))

    def prepare(self, *parts: str, durable: bool = False) -> str:
        """Make the output directory and the directory `parts` in it, and return its path."""
        path = self.path
        try:
            self.disk.make_dir(path, outermost=True, durable=durable)
            for part in parts:
                path = os.path.join(path, part)
                self.disk.make_dir(path, durable=durable)
        except OSError as exc:
            raise StateError(f"{path}: can't be used for state: {exc.strerror}; "
                             "give another directory by -o") from None
        return path

    def check(self) -> None:
        """Raise StateError if one of the directories is not fit to remove things from."""
        for part in ("", "runs", "logs", "tmp", "scripts"):
            path = os.path.join(self.path, part) if part else self.path
            if os.path.lexists(path):
                try:
                    self.disk.make_dir(path, outermost=not part)
                except OSError as exc:
                    raise StateError(f"{path}: {exc.strerror}; nothing was removed") from None

    def ids(self) -> List[str]:
        """Return the ids of all runs, in no order."""
        try:
            names = os.listdir(self.runs)
        except FileNotFoundError:
            return []
        except OSError as exc:
            raise StateError(f"{self.runs}: can't be read: {exc.strerror}") from None
        stems = {name.rpartition(".")[0] for name in names if name.endswith((".json", ".jsonl"))}
        return [stem for stem in stems if re.fullmatch(_RUN_ID, stem)]

    def exists(self, run_id: str) -> bool:
        """Tell whether there is a run of that id."""
        files = self.files(run_id)
        return os.path.lexists(files.state) or os.path.lexists(files.journal)

    def load(self, run_id: str) -> Loaded:
        """Read a run as it stands, without a lock; raise NotFound, or StateError if nothing valid is left."""
        files = self.files(run_id)
        live = self.owner(run_id) is not None
        try:
            run, seq, engine, damage = _read_journal(files.journal)
            content = read_file(files.state, follow=False) if os.path.lexists(files.state) else b""
            state = decode_state(content)
            if state and state["seq"] > seq:
                run, seq, engine = run_from_json(state), state["seq"], state["engine"] or {}
        except OSError as exc:
            raise StateError(f"{exc.filename}: can't be read: {exc.strerror}") from None
        except (KeyError, ValueError, TypeError, AttributeError, IndexError, AssertionError) as exc:
            raise StateError(f"{files.state}, or its journal: the checksums hold, but MiniFlow {__version__} "
                             f"can't make sense of it: {exc!r}; use the one that wrote it") from None
        if run is None and not content and not self.exists(run_id):
            raise NotFound(f"no run {run_id} in {self.runs}; see: miniflow runs")
        if run is None or run.id != run_id:
            what = f"the state of run {run.id}" if run else "damaged, and so is its journal if it is there"
            raise StateError(f"{files.state}: {what}; nothing was changed; restore it, or remove both files "
                             "to give the run up")
        return Loaded(run, seq, live, engine, damage)

    def summary(self, run_id: str) -> Dict[str, Any]:
        """Return the head of a run's state, with `interrupted` where its engine is gone, or `damaged`."""
        files = self.files(run_id)
        try:
            if not os.path.lexists(files.journal):
                content = read_file(files.state, follow=False)
                at = content.rfind(_CRC)
                if at > 0 and content[at:] == _CRC + b'%08x"}\n' % zlib.crc32(content[:at]):
                    head: Dict[str, Any] = json.loads(content.partition(b",\n")[0] + b"}")
                    if head["status"] != RUNNING and head["id"] == run_id:
                        return head
            loaded = self.load(run_id)
            state = run_to_json(loaded.run)
            return {**{name: state[name] for name in _HEAD}, "status": loaded.status}
        except (MiniFlowError, OSError) as exc:
            return {**dict.fromkeys(_HEAD), "id": run_id, "status": "damaged", "reason": str(exc)}

    def history(self, flow: Optional[str] = None) -> List[Dict[str, Any]]:
        """Return the summaries of all runs (of one flow), newest first."""
        heads = [head for head in map(self.summary, self.ids()) if flow in (None, head["flow"])]
        return sorted(heads, key=lambda head: (head["started"] or "", head["id"]), reverse=True)

    def peek(self, run_id: str) -> Dict[str, Any]:
        """Return the head of a run's state as it stands there, unchecked; {} if it can't be read."""
        try:
            content = read_file(self.files(run_id).state, 4096, follow=False)
            head = json.loads(content.partition(b",\n")[0] + b"}")
        except (MiniFlowError, OSError, ValueError, RecursionError):
            return {}
        return head if isinstance(head, dict) else {}

    def durations(self, flow: str, ids: Iterable[str]) -> Dict[str, float]:
        """Return how many seconds tasks of `flow` took, as its newest run that has ended tells; else {}.

        Of `ids`, all the runs that are there, few are looked at: of the ids that we gave the latest, of those
        that somebody else gave the last by name.
        """
        ours, others, stem = [], [], _id_stem(flow)            # type: List[str], List[str], str
        for run_id in ids:
            made = re.fullmatch(_MADE_ID, run_id)
            if made is None:
                others.append(run_id)
            elif made[1] == stem:
                ours.append(run_id)
        heads = [(self.peek(run_id), run_id) for names in (ours, others)
                 for run_id in heapq.nlargest(_RECENT, names)]
        ended = [(str(head.get("started")), run_id) for head, run_id in heads
                 if head.get("flow") == flow and head.get("status") != RUNNING]
        for _, run_id in sorted(ended, reverse=True):
            try:
                known = decode_durations(read_file(self.files(run_id).state, follow=False))
            except (OSError, ValueError):
                continue
            if known is not None:
                return known
        return {}

    def resolve(self, name: str) -> str:
        """Return the run id that `name` stands for: itself, or that of the newest run for `last`."""
        if name != "last" or self.exists(name):
            return name
        heads = [head for head in self.history() if not head.get("parent")]
        if not heads:
            raise NotFound(f"there is no run in {self.runs} yet")
        return str(heads[0]["id"])

    def new_id(self, flow: str, now: float) -> str:
        """Return a fresh run id: the flow, the time, and four hexadecimal digits of chance."""
        stamp = (format_time(now) or "")[:19].replace("-", "").replace(":", "")
        while True:
            run_id = f"{_id_stem(flow)}-{stamp}Z-{os.urandom(2).hex()}"
            if not self.exists(run_id):
                return run_id

    def lock(self, run_id: str, engine: Mapping[str, Any], force: bool = False) -> Lock:
        """Take the lock of a run for `engine`; raise RunLocked if another one holds it."""
        path = self.files(run_id).lock
        try:
            return take_lock(self.disk, path, engine, force)
        except OSError as exc:
            raise StateError(f"{path}: can't be locked: {exc.strerror}") from None

    def owner(self, run_id: str) -> Optional[Dict[str, Any]]:
        """Return who works on a run, {} if that is not known, or None if nobody does."""
        return lock_owner(self.files(run_id).lock)

    def remove_script(self, name: str) -> None:
        """Remove a generated script."""
        path = os.path.join(self.path, "scripts", name)
        try:
            self.disk.unlink(path)
        except OSError as exc:
            raise StateError(f"{path}: can't be removed: {exc.strerror}") from None

    def remove(self, run_id: str) -> None:
        """Remove a run with its logs; raise RunLocked if an engine works on it."""
        import shutil
        self.check()
        files = self.files(run_id)
        lock = self.lock(run_id, this_engine(time.time()))
        try:
            for path in (files.logs, files.tmp):
                shutil.rmtree(path, ignore_errors=True)
            aside = [os.path.join(self.runs, name) for name in os.listdir(self.runs)
                     if name.startswith(f"{run_id}.jsonl.bad-")]
            for path in (files.journal, files.state, *aside):
                self.disk.unlink(path)
        except OSError as exc:
            raise StateError(f"{exc.filename}: can't be removed: {exc.strerror}") from None
        finally:
            lock.release(remove=True)


class Journal:
    """The state of one run on disk, in the hands of the engine that works on it."""

    def __init__(self, store: Store, run_id: str, durability: str = "normal", force: bool = False) -> None:
        self.store, self.disk, self.durability = store, store.disk, durability
        self.files, self.engine = store.files(run_id), this_engine(time.time())
        store.prepare("runs", durable=True)
        self._lock: Optional[Lock] = store.lock(run_id, self.engine, force)
        self._fd: Optional[int] = None
        self._seq = self._good = 0
        self._definition = b""
        self._dirty = self._unsynced = self._stalled = False
        self._next_sync = self._next_check = self._checked = 0.0
        self._next_view: Optional[float] = None
        self._rest = 0.0                                               # between two views
        self.note: Callable[[str], None] = lambda text: None           # is told what a user should know
        self.hurry: Callable[[], bool] = lambda: False                 # tells whether waiting makes no sense

    def begin(self, run: Run, last: Optional[Loaded] = None) -> None:
        """Start a fresh journal with the state of `run`, which goes on from `last`, if there is one."""
        path = self.files.journal
        if self._lock and self._lock.is_weak:
            self.note(f"{self._lock.path}: this file system has no locks, so this file has to do; "
                      "see that no other host works on this run")
        try:
            if last and last.damage:
                self.disk.put(f"{path}.bad-{zlib.crc32(last.damage):08x}", last.damage, True)
            self._seq, self._definition = last.seq if last else 0, encode_definition(run.plan.flow)
            self._open_journal(run)
            self._put_view(run, True)
        except OSError as exc:
            if last is None and self._fd is None:
                self._unmake()
                raise StateError(f"{exc.filename or path}: state can't be written: {exc.strerror}; "
                                 "the run was not begun") from None
            raise self._error(exc) from None

    def _unmake(self) -> None:
        """Leave as little as possible of a run that could not be begun."""
        try:
            self.disk.unlink(self.files.journal)
            self.close(remove=True)
        except OSError:
            pass                               # the disk refuses this, too

    def _open_journal(self, run: Run) -> None:
        """Put a fresh journal, which begins with the whole state of `run`, in place of the old one."""
        opened = encode_opened(run, self.engine, self._seq + 1, self._definition)
        self.disk.put(self.files.journal, opened, True)
        fd = self.disk.open(self.files.journal, os.O_WRONLY | os.O_APPEND)
        if self._fd is not None:
            self.disk.close(self._fd)
        self._run, self._fd, self._seq, self._good = run, fd, self._seq + 1, os.fstat(fd).st_size

    def append(self, events: List[Event], happened: int = 0) -> None:
        """Write events down, all or none; raise StateError if that can't be done.

        The first `happened` of them are a part of the state of the run already.
        """
        began, renewed = time.monotonic(), False
        if began >= self._checked + _TRUST_S:
            self._check_ownership()
        while True:
            content = b"".join(encode_record(without_secrets(event_to_json(event), self._run.secrets),
                                             self._seq + n) for n, event in enumerate(events, 1))
            try:
                self._write(content)
                break
            except OSError as exc:
                if exc.errno in FULL_ERRORS:
                    self._wait_for_space(exc, began)
                elif renewed:
                    raise self._error(exc) from None
                else:
                    self._renew(exc)
                    events, renewed = events[happened:], True
        self._seq += len(events)
        self._good += len(content)
        self._dirty = self._unsynced = True
        self._stalled = False

    def _write(self, content: bytes) -> None:
        """Write whole lines to the journal, or cut it back to the last good one."""
        assert self._fd is not None
        try:
            self.disk.write(self._fd, content)
            if self.durability == "full":
                self.disk.sync(self._fd)
        except OSError:
            self.disk.truncate(self._fd, self._good)
            raise

    def _wait_for_space(self, exc: OSError, began: float) -> None:
        """Wait a moment, as a disk is full since `began`; raise StateError if that was long enough."""
        if time.monotonic() - began >= STALL_S or self.hurry():
            raise self._error(exc) from None
        if not self._stalled:
            self.note(f"{self.files.journal}: {exc.strerror}; waiting up to {STALL_S:g} s for space")
        self._stalled = True
        time.sleep(0.2)

    def _renew(self, exc: OSError) -> None:
        """Go on in a fresh journal: what the system could not write it may have dropped from the old one."""
        try:
            self._open_journal(self._run)
        except OSError as again:
            raise self._error(again) from None
        self.note(f"{self.files.journal}: {exc.strerror}; going on in a new file")

    def idle(self, run: Run, now: float) -> Optional[float]:
        """Use a moment without work to sync the journal and bring the view up to date, if it is time.

        Returns when to be called again.
        """
        if now >= self._next_check:
            self._check_ownership()
            self._next_check = now + _CHECK_S
        if self._unsynced and self.durability == "normal" and now >= self._next_sync:
            assert self._fd is not None
            try:
                self.disk.sync(self._fd)
            except OSError as exc:
                self._renew(exc)
            self._next_sync, self._unsynced = now + 0.2, False
        times = [self._next_sync] if self._unsynced and self.durability == "normal" else []
        if self._dirty:
            self._next_view = self._next_view or now + self._rest
            if now < self._next_view:
                return min([*times, self._next_view])
            self._next_view = None
            try:
                self._put_view(run, False)
            except OSError as exc:
                if exc.errno not in PRESSURE_ERRORS | DISK_ERRORS:
                    raise self._error(exc) from None
                self._rest = 20.0               # the view can wait: the journal has it all
        return min(times, default=self._next_check)

    def _check_ownership(self) -> None:
        """Raise StateError if lock or journal are not ours any more: another engine took the run over."""
        assert self._fd is not None and self._lock
        self._checked = time.monotonic()
        try:
            ours = os.path.samestat(os.fstat(self._fd), os.stat(self.files.journal, follow_symlinks=False))
        except OSError:
            ours = False
        if not ours or not self._lock.is_held():
            raise StateError(f"{self.files.journal}: it or its lock was replaced or removed; another engine "
                             "may have taken the run over, so this one ends its tasks and stops")

    def finish(self, run: Run) -> None:
        """Write the final state and remove journal and lock."""
        self._check_ownership()
        began = time.monotonic()
        try:
            while True:
                try:
                    self._put_view(run, True)
                    break
                except OSError as exc:
                    if exc.errno not in FULL_ERRORS:
                        raise
                    self._wait_for_space(exc, began)
            self.disk.unlink(self.files.journal)
            self.close(remove=True)
        except OSError as exc:
            raise self._error(exc) from None
        finally:
            self.close()

    def close(self, remove: bool = False) -> None:
        """Let go of the run, for good with `remove`; what is in the journal stays for whoever resumes it."""
        (fd, self._fd), (lock, self._lock) = (self._fd, None), (self._lock, None)
        if fd is not None:
            self.disk.close(fd)
        if lock:
            lock.release(remove)

    def _put_view(self, run: Run, durable: bool) -> None:
        """Rewrite RUN.json."""
        began = time.monotonic()
        state = encode_state(run, self.engine, self._seq, self._definition)
        self.disk.put(self.files.state, state, durable)
        self._dirty, self._rest = False, max(1.0, 20 * (time.monotonic() - began))

    def _error(self, exc: OSError) -> StateError:
        """Return what to tell the user when the disk refuses."""
        return StateError(f"{exc.filename or self.files.journal}: state can't be written: {exc.strerror}; "
                          "what was recorded before is safe: "
                          f"miniflow resume {os.path.basename(self.files.logs)}")


class MemoryStore(Store):
    """Runs that are kept in memory alone; for the logs of processes there is a temporary directory."""

    def __init__(self) -> None:
        import threading
        self.disk, self._states, self.live = Disk(), {}, set()     # type: Disk, Dict[str, str], Set[str]
        self._durations: Dict[str, Tuple[str, Dict[str, float]]] = {}    # of runs that ended, the latest last
        self._folder: Any = None
        self._lock, self.place = threading.Lock(), f"memory {id(self)}"

    @property
    def path(self) -> str:                      # type: ignore[override]
        """The temporary directory, made when it is needed, and removed with the store."""
        with self._lock:
            if self._folder is None:
                import tempfile
                self._folder = tempfile.TemporaryDirectory(prefix="miniflow-")
        return str(self._folder.name)

    def prepare(self, *parts: str, durable: bool = False) -> str:
        """Make the directory `parts` in the temporary one; for the runs themselves there is none."""
        return "" if parts == ("runs",) else super().prepare(*parts, durable=durable)

    @property
    def has_folder(self) -> bool:
        """True once the temporary directory has been made."""
        return self._folder is not None

    @property
    def runs(self) -> str:                      # type: ignore[override]
        """Stands for a directory in messages."""
        return "memory"

    def ids(self) -> List[str]:
        """Return the ids of all runs, in no order."""
        return list(self._states)

    def exists(self, run_id: str) -> bool:
        """Tell whether there is a run of that id."""
        return run_id in self._states

    def load(self, run_id: str) -> Loaded:
        """Return a run as it stands; raise NotFound."""
        if run_id not in self._states:
            raise NotFound(f"no run {run_id} in memory")
        state = json.loads(self._states[run_id])
        return Loaded(run_from_json(state), 0, run_id in self.live, state["engine"], b"")

    def save(self, run: Run, engine: Mapping[str, Any]) -> None:
        """Keep a run as it stands."""
        self._states[run.id] = json.dumps(run_to_json(run, engine))
        self._durations.pop(run.id, None)
        if run.outcome:
            self._durations[run.id] = run.flow, known_durations(run)

    def durations(self, flow: str, ids: Iterable[str]) -> Dict[str, float]:
        """Return how many seconds tasks of `flow` took, as its run that ended last tells; {}: none does."""
        return next((known for other, known in reversed(list(self._durations.values())) if other == flow), {})

    def summary(self, run_id: str) -> Dict[str, Any]:
        """Return the head of a run's state."""
        state = json.loads(self._states[run_id])
        return {name: state[name] for name in _HEAD}

    def owner(self, run_id: str) -> Optional[Dict[str, Any]]:
        """Return who works on a run, or None if nobody does."""
        return this_engine(0) if run_id in self.live else None

    def remove(self, run_id: str) -> None:
        """Remove a run; raise RunLocked if it goes on."""
        if run_id in self.live:
            raise RunLocked(f"run {run_id} goes on; wait for it, or cancel it")
        del self._states[run_id]
        self._durations.pop(run_id, None)


class MemoryJournal:
    """What a Journal does, for a run that is kept in memory."""

    def __init__(self, store: MemoryStore, run_id: str) -> None:
        check_run_id(run_id)
        if run_id in store.live:
            raise RunLocked(f"run {run_id} is being run by this very program; wait for it, or cancel it")
        store.live.add(run_id)
        self.store, self.run_id, self.engine = store, run_id, this_engine(time.time())
        self.note: Callable[[str], None] = lambda text: None
        self.hurry: Callable[[], bool] = lambda: False

    def begin(self, run: Run, last: Optional[Loaded] = None) -> None:
        """Keep the run as it stands."""
        self.store.save(run, self.engine)

    def append(self, events: List[Event], happened: int = 0) -> None:
        """Nothing is written down: the Run itself has it all."""

    def idle(self, run: Run, now: float) -> Optional[float]:
        """There is nothing to be written."""
        return None

    def finish(self, run: Run) -> None:
        """Keep the run as it has ended."""
        self.store.save(run, self.engine)
        self.close()

    def close(self, remove: bool = False) -> None:
        """Let go of the run."""
        self.store.live.discard(self.run_id)


def open_journal(store: Store, run_id: str, durability: str, force: bool) -> Union[Journal, MemoryJournal]:
    """Take hold of a run; raise RunLocked if somebody else has."""
    if isinstance(store, MemoryStore):
        return MemoryJournal(store, run_id)
    return Journal(store, run_id, durability, force)


# ============================================================================
# == 28. SPAWN: how does a process begin with nothing of ours but what it is given?
# ============================================================================
# posix_spawn starts a process three times as fast as Popen does on Python 3.9, which forks, and still saves
# the engine half of its work where Popen uses vfork.  It can't do everything: another directory, a system
# without setsid in it, other threads that may open something in the same moment; for these there is Popen.
#
# Two fifths of what a task of nothing costs are spent here: posix_spawn comes back only when the new program
# has been loaded.
#
# Tried and rejected: POSIX_SPAWN_CLOSEFROM, which Python doesn't have; marking everything inherited as
# close-on-exec once at the start, which is not ours to do in a program that only uses us; a process that
# spawns while the engine goes on (no faster: two cores have enough to do); what subprocess itself calls, a
# third faster, which no document promises.

class Spawned:
    """A process that posix_spawn started, to be asked like a Popen."""

    __slots__ = ("pid", "ticks", "returncode")

    def __init__(self, pid: int, ticks: Optional[int]) -> None:
        self.pid, self.ticks = pid, ticks
        self.returncode: Optional[int] = None

    def poll(self) -> Optional[int]:
        """Return the exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                self.returncode = LOST_EXIT
            else:
                self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def kill(self) -> None:
        """Send SIGKILL."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def wait_for(poll: Callable[[], Optional[int]], seconds: float) -> Optional[int]:
    """Ask until there is an answer, at most so long."""
    end = time.monotonic() + seconds
    while poll() is None and time.monotonic() < end:
        time.sleep(0.001)
    return poll()


def inheritable_fds() -> List[int]:
    """Return what of ours a process would inherit beside its standard streams (Linux)."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if int(name) > 2 and os.get_inheritable(int(name)):
                found.append(int(name))
        except OSError:
            pass                               # the one that listdir used
    return found


def program_path(name: str, env: Mapping[str, str]) -> Optional[str]:
    """Return the path of the program that `name` means to a process with `env`; None if there is none."""
    if "/" in name:
        return name
    paths = [os.path.join(folder, name) for folder in os.get_exec_path(env)]
    return next((path for path in paths if os.access(path, os.X_OK) and not os.path.isdir(path)), None)


#: Where programs were found, by name and PATH: looking for one takes a fifth of the time of a start.
_known_paths: Dict[Tuple[str, Optional[str]], str] = {}


def _known_path(name: str, env: Mapping[str, str]) -> str:
    """Return what program_path() says or has said, as a shell remembers it; raise FileNotFoundError."""
    asked = name, env.get("PATH")
    path = _known_paths.get(asked) or program_path(name, env)
    if path is None or not os.access(path, os.X_OK):
        _known_paths.pop(asked, None)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    _known_paths[asked] = path
    return path


_TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 0


def _boot_ticks() -> int:
    """Return the time since the system was started as /proc/PID/stat tells it (Linux)."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * _TICKS_PER_S)


def _posix_spawn(argv: Sequence[str], env: Mapping[str, str], files: Tuple[int, int, int],
                 keep: Sequence[int], inherited: Optional[Sequence[int]]) -> Spawned:
    """Start a process as spawn() does."""
    actions: List[Tuple[int, ...]] = [(os.POSIX_SPAWN_DUP2, fd, n) for n, fd in enumerate(files)]
    actions += [(os.POSIX_SPAWN_CLOSE, fd)
                for fd in (inheritable_fds() if inherited is None else inherited)]
    try:
        for fd in keep:
            os.set_inheritable(fd, True)
        before = _boot_ticks()
        pid = os.posix_spawn(_known_path(argv[0], env), list(argv), env, file_actions=actions, setsid=True,
                             setsigdef=(signal.SIGPIPE, signal.SIGXFSZ))
        return Spawned(pid, before if before == _boot_ticks() else start_ticks(pid))
    finally:
        for fd in keep:
            os.set_inheritable(fd, False)


def spawn(argv: Sequence[str], env: Mapping[str, str], cwd: str, files: Tuple[int, int, int],
          keep: Sequence[int] = (), inherited: Optional[Sequence[int]] = None) -> Any:
    """Start a process in a session of its own, with three standard files, and `keep` under their own numbers.

    A program without a slash is looked up in the PATH of `env`.  Who starts many passes `inherited`, which is
    what inheritable_fds() has said before.
    Returns a Spawned, on Windows a Popen.  Raises OSError, and ValueError for a NUL in an argument.
    """
    threading = sys.modules.get("threading")   # without it there is one thread
    if sys.platform == "linux" and (not threading or threading.active_count() == 1) and min(files) > 2:
        try:
            if os.getcwd() == cwd:
                return _posix_spawn(argv, env, files, keep, inherited)
        except (OSError, NotImplementedError) as exc:
            if getattr(exc, "errno", None) not in (errno.ENOENT, errno.ENOEXEC, errno.EBADF, None):
                raise
            # Popen tells better which file it is, or can do it: it looks on where one is no program
            # (ENOEXEC); EBADF: a file that ulimit -n forbids by now
    import subprocess
    process = subprocess.Popen(
        argv, stdin=files[0], stdout=files[1], stderr=files[2], env=env, cwd=cwd, close_fds=True,
        pass_fds=keep, start_new_session=os.name != "nt",
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0))
    if os.name == "nt":
        return process
    process.returncode = 0                     # it is ours to wait for: Popen takes a lost exit code for 0
    return Spawned(process.pid, start_ticks(process.pid))


# ============================================================================
# == 29. ORPHANS: which processes belong to an attempt, and who ends them when its engine is gone?
# ============================================================================
# Three signs tell that something of an attempt runs: its log is locked (whoever inherited it holds the lock),
# its process is there with the start time that was recorded, or some process carries the attempt's cookie in
# its environment, wherever it has put itself.  Cookies of nested runs are appended to those around them, so
# that whoever stops the outer run finds the processes of the inner one.
#
# While an engine runs, a watchdog waits at the other end of a pipe.  If the pipe ends, the engine was killed:
# the watchdog ends the groups that stand in a table which both have open, and every process with the engine's
# token.  (Telling it of each group through the pipe woke it twice a task.)  It has a session of its own and
# ignores the signals that end a run.  Should both be killed at once, resume finds out.

_FOREVER_S = 3600.0
WATCHDOG_GRACE_S = 1.0
UNKILLABLE_S = 5.0                             # how long after SIGKILL what does not end is given up

#: What the watchdog executes: a program of its own, for which importing this file would be too much.
_WATCHDOG = r"""
import os, signal, sys, time
token, grace, table = sys.argv[1].encode(), float(sys.argv[2]), int(sys.argv[3])
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
sys.stdin.buffer.read()                  # until the engine is gone
groups = set(map(int, os.pread(table, 2**24, 0).split())) - {0}

def read(pid, name):
    with open("/proc/%s/%s" % (pid, name), "rb") as file:
        return file.read()

def found():
    pids = []
    for pid in os.listdir("/proc"):
        if pid.isdigit() and int(pid) != os.getpid():
            try:
                state, _, group = read(pid, "stat").rpartition(b")")[2].split()[:3]
                ours = int(group) in groups or token + b"/" in read(pid, "environ")
                if ours and state not in (b"Z", b"X"):
                    pids.append(int(pid))
            except OSError:
                pass
    return pids

def send(number):
    for kill, targets in ((os.kill, found() if linux else ()), (os.killpg, () if linux else groups)):
        for target in targets:
            try:
                kill(target, number)
            except OSError:
                pass

linux = os.path.exists("/proc/self/environ")
end = time.monotonic() + grace
send(signal.SIGTERM)
send(signal.SIGCONT)
while time.monotonic() < end and not (linux and not found()):
    time.sleep(0.02)
end = time.monotonic() + 10
quiet = 0                                # one that was just being started may show itself only now
while time.monotonic() < end and quiet < 8:
    send(signal.SIGKILL)
    quiet = quiet + 1 if linux and not found() else 0
    time.sleep(0.05)
"""


def group_has_living(group: int) -> bool:
    """Tell whether a process group has members other than zombies, which somebody else has to reap."""
    try:
        names = os.listdir("/proc")
    except FileNotFoundError:
        return True                            # a system without /proc can't tell
    stats = (process_stat(name) for name in names if name.isdigit())
    return any(fields[2] == b"%d" % group and fields[0] not in (b"Z", b"X") for fields in stats if fields)


def bearers(cookie: str) -> List[int]:
    """Return the processes that carry `cookie`, or one that goes on with a slash; none where unknown."""
    mark, wanted, found = b"MINIFLOW_COOKIE=", cookie.encode(), []
    try:
        names = os.listdir("/proc")
    except OSError:
        return []
    for name in names:
        try:
            environ = read_file(f"/proc/{name}/environ") if name.isdigit() else b""
        except OSError:
            continue
        for part in environ.split(b"\0") if wanted in environ else ():
            if part.startswith(mark) and any(element == wanted or element.startswith(wanted + b"/")
                                             for element in part[len(mark):].split(b":")):
                found.append(int(name))
    return found


def holders(path: str) -> List[int]:
    """Return the processes that have a file open, as far as this user may know."""
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc/self/fd") else ():
        try:
            fds = os.listdir(f"/proc/{name}/fd") if name.isdigit() else ()
            if int(name) != os.getpid() and any(os.readlink(f"/proc/{name}/fd/{fd}") == path for fd in fds):
                found.append(int(name))
        except (OSError, ValueError):
            pass                               # gone, or somebody else's
    return found


def escaped(cookie: str, group: Optional[int]) -> List[int]:
    """Return the processes that carry `cookie` and have left the process group of their attempt."""
    return [pid for pid in bearers(cookie) if process_stat(pid)[2:3] != [b"%d" % (group or 0)]]


def send_signal(pids: Iterable[int], word: str) -> None:
    """Send TERM or KILL to processes; those that have gone, or are somebody else's, are let be."""
    for pid in pids:
        try:
            os.kill(pid, getattr(signal, "SIG" + word))
            if word == "TERM":
                os.kill(pid, signal.SIGCONT)
        except (ProcessLookupError, PermissionError):
            pass


def reap_strangers(ours: Collection[Optional[int]]) -> None:
    """Reap what others have left to PID 1, which we are; never waitpid(-1), which takes everybody's."""
    for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
        state, parent, *_ = process_stat(pid) or (b"", b"")
        if state == b"Z" and parent == b"1" and pid not in ours:
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                pass                           # another thread was quicker


class Orphan(NamedTuple):
    """An attempt that was running when its engine died."""

    task: str
    attempt: Attempt
    cookie: str
    log: str
    grace_s: float

    def leader_lives(self) -> bool:
        """Tell whether the process that was recorded is still that process."""
        return is_process(self.attempt.pid, self.attempt.ticks)

    def log_is_locked(self) -> bool:
        """Tell whether somebody still holds the attempt's log open for writing."""
        try:
            fd = os.open(self.log, os.O_RDONLY | _CLOEXEC | _NOFOLLOW | _NONBLOCK)
        except OSError:
            return False
        try:
            return not try_lock(fd, shared=True)
        except OSError:
            return False                       # no locks here: the other signs have to do
        finally:
            os.close(fd)

    def trace(self) -> Optional[str]:
        """Return by what it shows that something of the attempt still runs, if it does."""
        if self.leader_lives():
            return f"it is process {self.attempt.pid}"
        locked = self.log_is_locked()
        pids = bearers(self.cookie) or (holders(self.log) if locked else [])
        if pids:
            return f"it left {'process' if len(pids) == 1 else 'processes'} {', '.join(map(str, pids))}"
        return f"something of it holds its log {self.log}" if locked else None

    def send(self, word: str) -> None:
        """Send TERM or KILL to all of the attempt that can be told to be of it."""
        group = self.attempt.pid if self.leader_lives() else None
        if group:
            try:
                os.killpg(group, getattr(signal, "SIG" + word))
            except (ProcessLookupError, PermissionError):
                pass
        send_signal(escaped(self.cookie, group), word)
        if not group and self.log_is_locked():
            send_signal(holders(self.log), word)


class Watchdog:
    """Ends the processes of an engine that was killed; started before there is a group to watch."""

    def __init__(self, token: str, place: str) -> None:
        self._token, self._place = token, place
        self._rows: Dict[int, int] = {}        # where each group stands in the table
        self._free: List[int] = []             # rows that are free again
        self._table, self._pipe, self._process = -1, -1, None           # type: int, int, Any

    @property
    def pid(self) -> Optional[int]:
        """The watchdog's process, if there is one."""
        return self._process.pid if self._process else None

    def is_gone(self) -> bool:
        """Tell whether the watchdog has died."""
        if self._process is None or self._process.poll() is None:
            return False
        self._dismiss()
        return True

    def ready(self) -> None:
        """See that there is one, before a process starts that it would find by its cookie alone."""
        if self._process is None:
            self._start()

    def add(self, group: int) -> None:
        """Watch a process group as well."""
        row = self._rows[group] = self._free.pop() if self._free else len(self._rows)
        self._write(row, group)

    def remove(self, group: int) -> None:
        """Watch a process group no more."""
        row = self._rows.pop(group, None)
        if row is not None:
            self._free.append(row)
            self._write(row, 0)

    def _write(self, row: int, group: int) -> None:
        """Write a row of the table: a group, or 0."""
        try:
            os.pwrite(self._table, b"%11d\n" % group, row * 12)
        except OSError:
            pass                               # there is none, or a full disk: cookies have to do

    def _open_table(self) -> int:
        """Return a new file that has no name."""
        try:
            return os.memfd_create("groups")
        except (AttributeError, OSError):
            path = os.path.join(self._place, f"groups.{os.getpid()}")
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | _CLOEXEC | _NOFOLLOW, 0o600)
            os.unlink(path)
            return fd

    def _start(self) -> None:
        """Start the process; without one the run goes on all the same."""
        reader = null = -1
        env = {name: value for name, value in os.environ.items() if name != "MINIFLOW_COOKIE"}
        try:
            if self._table < 0:
                self._table = self._open_table()
                for group, row in self._rows.items():
                    self._write(row, group)
            reader, self._pipe = os.pipe()
            null = os.open(os.devnull, os.O_WRONLY | _CLOEXEC)
            self._process = spawn([sys.executable or "python3", "-I", "-S", "-c", _WATCHDOG, self._token,
                                   str(WATCHDOG_GRACE_S), str(self._table)],
                                  env, os.getcwd(), (reader, null, null), [self._table])
        except OSError:
            self._dismiss()                    # tried again with the next group
        finally:
            for fd in (reader, null):
                if fd >= 0:
                    os.close(fd)

    def _dismiss(self) -> None:
        """End the process, which has nothing to do but to wait."""
        if self._process is not None:
            self._process.kill()
            wait_for(self._process.poll, UNKILLABLE_S)
            self._process = None
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1

    def close(self) -> None:
        """Send the watchdog home."""
        self._dismiss()
        if self._table >= 0:
            os.close(self._table)
            self._table = -1


# ============================================================================
# == 30. TEMPLATE INTERPRETER: how does a Python script begin without a start of Python?
# ============================================================================
# A start of Python costs ten to twenty milliseconds before the first line of a script runs; a fork of one
# that has started costs two.  So one process for each interpreter does nothing but fork: it imports what most
# scripts import and what the flow names in `preload`, and turns each child into what `python script.py` would
# be.  It is made by exec, never by a fork of the engine, and has one thread.
#
# The child lets Python end as ever: threads are joined, atexit runs, __del__ and finally run, files are
# flushed.  Two things make that end cheap.  Modules of the standard library that the template has imported
# are left alone, as tidying them up would copy all of their memory, unless one of them holds something of the
# script that has an end of its own; and once nothing of the script is left the process ends.  Both are
# invisible to a script.  Where there is more to an end (threads, other streams, compiled code of others that
# may wait for it) it is left to Python.
#
# Most of what a child costs are pages of memory: each that it is the first to write to is copied, at three
# microseconds, and to let go of an object is to write to it.  So a child frees as little as can be of what
# the template has, buffers are not large enough to be mapped by themselves, the variables that all scripts
# of a run have are the template's own, and the engine, which no child is a copy of, finds out what it can.
#
# One frame of this program lies below the script's own.  Its file is named so that `warnings` and `logging`
# take it for a part of the import system, which they skip.
#
# Its arguments and its cookie are written over those that the template was given, so that ps, the watchdog
# and whoever looks for leftovers see what they would see of any other process.
#
# Where anything could differ, a child executes a new interpreter: a file beside the script hides a module
# that the template has, the script does not compile or compiles with a warning, it can't be read.  If the
# template can't live, scripts are started as any command.
#
# Tried and rejected: ending by os._exit (loses what is not flushed); a fork of the engine (has its modules,
# its open files and maybe threads); JSON for requests (half a millisecond in a young child); reading the
# script and compiling it in the template (a script that runs long would have to be read again to see a
# change); a child forked before it is asked for (no faster: two scripts at a time leave no core idle for it);
# filling up the free memory of the template so that what is new lies together, and LD_BIND_NOW (no faster).

FORK_PAYS_FROM = 6                             # scripts; for fewer a template costs more than it saves
PRELOAD_PAYS_FROM = 3                          # the same where modules are to be imported once
ANSWER_S = 20.0                                # how long a template may take to start, or to answer
_LAST_WORDS_S = 2.0                            # how long one that closed its socket may take to end
_REQUEST_BYTES = 60_000                        # longer ones are not sent; memory for 128 KiB costs a mapping
_COOKIE_ROOM = 400
_ARGUMENTS_ROOM = 8000

#: How a template interpreter begins.  Of what Python compiles by itself it keeps the tree to the end, and
#: every child would free a copy of it.
_BOOTSTRAP = "exec(compile(%r, __file__, 'exec'))\n"

#: What a template interpreter executes.
TEMPLATE_PROGRAM = r'''
import sys
bare = set(sys.modules) - {"linecache"}       # what every start imports, so that no script can hide it
if not getattr(sys.flags, "safe_path", False):
    del sys.path[0]                           # this file's directory: not before anything of the script's
import _imp, atexit, builtins, errno, gc, importlib, importlib.machinery, os, select, socket, time, warnings
channel, folder = socket.socket(fileno=int(sys.argv[1])), os.path.realpath(sys.argv[2])
channel.set_inheritable(False)
preload = sys.argv[4:]                        # argv[3] is nothing but room for the arguments of scripts
library = os.path.dirname(os.__file__) + os.sep
unseen = {"_ctypes", "readline", "_tkinter", "_curses"}       # of the library, but with ends of their own
hiding = {}                                   # directory of scripts: its mtime, and what is_hidden said of it
TEMPLATE = [b"(template of miniflow)"]
code = None                                   # what the script ends with, once that is a plain number
ours, our_module = globals(), sys.modules["__main__"]         # a circle: once frozen, it is never freed,
our_code = sys._getframe().f_code             # nor is what it holds
running, poll = {}, select.poll()             # pidfd of a child: the number of its request, and its pid


def memory_of(name):
    """Return where in this process's memory others look for its arguments and for the value of a variable."""
    with open("/proc/self/stat", "rb") as file:
        argv, argv_end, environ = map(int, file.read().rpartition(b")")[2].split()[45:48])
    with open("/proc/self/environ", "rb") as file:
        text = b"\0" + file.read()
    at = text.index(b"\0%s=" % name) + len(name) + 2
    return (argv, argv_end), (environ + at - 1, environ + text.index(b"\0", at) - 1)


def show(argv, cookie):
    """Let others see the arguments and the cookie of a script where those of the template stood."""
    memory = os.open("/proc/self/mem", os.O_RDWR)
    (begin, end), (cookie_begin, cookie_end) = places
    os.pwrite(memory, b" ".join(argv)[:end - begin - 2] + b"\0", begin)
    os.pwrite(memory, cookie.ljust(cookie_end - cookie_begin, b"\0"), cookie_begin)
    if argv[1:] == TEMPLATE:
        # A last byte other than 0 says that it is one string (get_mm_cmdline in the kernel).
        os.pwrite(memory, b".", end - 1)
    os.close(memory)


def file_of(module):
    return getattr(module, "__file__", None) or ""


def of_library(file):
    return file.startswith(library) and "-packages" + os.sep not in file


def needs_the_end(name, module):
    """Tell whether a module is compiled code that may do something when the interpreter ends."""
    file = file_of(module)
    return name in unseen or ".so" in file and not of_library(file)


def is_hidden(place):
    """Tell whether scripts in the directory `place` would find another module by a name of one here."""
    changed = os.stat(place).st_mtime_ns
    if hiding.get(place, ())[:1] != (changed,) or time.time_ns() - changed < 2 * 10**9:
        finder = importlib.machinery.FileFinder(place, *loaders)
        answer = False
        for name in tops & {entry.partition(".")[0] for entry in os.listdir(place)} | local.keys():
            spec = finder.find_spec(name)
            there = spec.origin if spec and spec.loader else None
            answer |= there != local.get(name)
        hiding[place] = changed, answer
    return hiding[place][1]


class End:
    """Ends the process when all of the script is gone; what Python would do after that nobody sees."""

    def __init__(self):
        self.code = code

    def __del__(self, gc=gc, collect=gc.collect, leave=os._exit, ours=ours):
        try:
            collect()
            if any(hasattr(type(thing), "__del__") for thing in gc.get_objects() if thing is not self):
                gc.unfreeze()                 # something of the script lives on in the library
                for module in reversed(list(ours["kept"].values())):
                    vars(module).update(dict.fromkeys(vars(module).keys() - {"__builtins__"}))
                ours["limbo"].clear()
                collect()
                return
            for stream in ours["streams"]:
                stream is None or stream.closed or stream.flush()
        except BaseException:
            return                            # Python goes on and tells of it
        leave(self.code)


def ends_plainly():
    """Tell whether nothing of this process's end is for Python alone to do."""
    if len(modules) < count or "__main__" not in modules:
        return False
    newest = reversed(modules)
    added = [next(newest) for _ in range(len(modules) - count)]
    return (not for_python and code is not None and next(newest) == last
            and [getattr(sys, name, None) for name in ("stdout", "stderr")] == streams
            and len(os.listdir("/proc/self/task")) == 1
            and not any(needs_the_end(name, modules[name]) for name in added))


def let_go():
    """Keep the library out of the interpreter's last tidying, which would touch all of its memory.

    popitem() hands modules over without touching them, so those that nobody has used stay shared with the
    template.  What the script has imported comes after all that was there before.
    """
    try:
        if not ends_plainly():
            return
    except Exception:                         # a script may replace even the builtins
        return
    added = [modules.popitem() for _ in range(len(modules) - count)]
    added.append(("__main__", modules.pop("__main__")))
    limbo.extend([modules.popitem() for _ in range(count - 1)])
    modules.update(left)
    modules.update(reversed(added))
    _imp.__miniflow_end__ = End()             # one of the first modules, and so of the last to be tidied up


def serve():
    """Fork when asked to, tell of it and of the ends; return in each child what is asked of it."""
    poll.register(channel, select.POLLIN)
    channel.send(b"ready")
    while True:
        for fd, _ in poll.poll():
            if fd in running:
                number, pid = running.pop(fd)
                poll.unregister(fd)
                os.close(fd)
                channel.send(b"%d %d" % (number, os.waitpid(pid, 0)[1]))
                continue
            request, files, flags, _ = socket.recv_fds(channel, 2**16, 3)
            if not request:
                os._exit(0)
            number, place, words = request.split(b"\0", 2)
            number, place = int(number), os.fsdecode(place)
            try:
                hidden = is_hidden(place)
            except OSError:
                hidden = True
            try:
                if flags & socket.MSG_CTRUNC: # no more room for open files
                    raise OSError(errno.EMFILE, "")
                before = boot_ticks()
                pid = os.fork()
            except OSError as exc:
                pid = None
                channel.send(b"%d %d" % (number, -exc.errno))
            if pid == 0:
                for fd in running:
                    os.close(fd)
                return number, before, words, files, place, hidden
            for fd in files:
                os.close(fd)
            if not pid:
                continue
            fd = os.pidfd_open(pid)
            running[fd] = number, pid
            poll.register(fd, select.POLLIN)


def boot_ticks():
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * ticks_per_s)


def start_ticks():
    """Return when this process was started, as field 22 of its /proc/PID/stat says."""
    stat = os.open("/proc/self/stat", os.O_RDONLY)
    ticks = os.read(stat, 4096).rpartition(b")")[2].split()[19]
    os.close(stat)
    return int(ticks)


def become(number, before, words, files):
    """Turn into the process of a script, in all but its code, and tell of it; return its arguments."""
    ticks = before if before == boot_ticks() else start_ticks()
    os.setsid()
    for n, fd in enumerate((files[0], files[1], files[1])):
        os.dup2(fd, n)
    if len(files) > 2:
        os.fchdir(files[2])
    for fd in files:
        os.close(fd)
    count, *words = words.split(b"\0")
    argv = words[:int(count)]
    for part in words[int(count):]:
        name, _, value = part.partition(b"=")
        os.environb[name] = value
        if name == b"TZ":
            time.tzset()
    show(argv, os.environb[b"MINIFLOW_COOKIE"])
    try:
        channel.send(b"%d %d %d" % (number, os.getpid(), ticks))
    except OSError:
        os._exit(0)                           # the engine is gone
    channel.close()
    return argv


def load(argv, place):
    """Return a script's code and its namespace; raise whatever shows that it is not a plain one."""
    file = os.open(argv[0], os.O_RDONLY)
    text = b"".join(iter(lambda: os.read(file, 2**16), b""))
    os.close(file)
    program = compile(text, argv[0], "exec", dont_inherit=True)
    usual_warnings.__exit__(None, None, None)
    if not getattr(sys.flags, "safe_path", False):
        sys.path.insert(0, place)
    main = type(sys)("__main__")
    main.__loader__ = importlib.machinery.SourceFileLoader("__main__", argv[0])
    if sys.version_info < (3, 14):
        main.__annotations__ = {}
    main.__builtins__, main.__file__, main.__cached__ = builtins, argv[0], None
    sys.modules["__main__"] = main
    return program, main.__dict__


def flush():
    for name in ("stderr", "stdout"):
        try:
            getattr(sys, name).flush()
        except BaseException:
            pass                              # as Python does it


def say(text):
    try:
        sys.stderr.write(text)
    except Exception:
        os.write(2, text.encode())


def strip(exc):
    """Cut the frames of this program off a traceback; return what sys.excepthook is given."""
    trace = exc.__traceback__
    while trace and trace.tb_frame.f_globals is ours:
        trace = trace.tb_next
    exc.__traceback__ = trace
    return type(exc), exc, trace


def tell(exc):
    """Tell of an exception that nobody caught, as Python does; SystemExit of a hook is let through."""
    told = sys.last_type, sys.last_value, sys.last_traceback = strip(exc)
    if sys.version_info >= (3, 12):
        sys.last_exc = exc
    try:
        if not hasattr(sys, "excepthook"):
            say("sys.excepthook is missing\n")
        getattr(sys, "excepthook", sys.__excepthook__)(*told)
    except SystemExit:
        raise
    except BaseException as failure:
        again = strip(failure)
    else:
        return
    say("Error in sys.excepthook:\n")
    sys.__excepthook__(*again)
    say("\nOriginal exception was:\n")
    sys.__excepthook__(*told)


def plain(exc):
    """Return the exit code that an exit stands for if that is a plain number."""
    return exc.code or 0 if exc.code is None or type(exc.code) is int and 0 <= exc.code < 256 else None


ticks_per_s = os.sysconf("SC_CLK_TCK")
places = memory_of(b"MINIFLOW_COOKIE")
own_cookie = os.environb[b"MINIFLOW_COOKIE"]
if b":" not in own_cookie.rstrip(b":"):       # no run around ours has given us one: a script gets it last
    del os.environb[b"MINIFLOW_COOKIE"]
loaders = [(importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES),
           (importlib.machinery.SourceFileLoader, importlib.machinery.SOURCE_SUFFIXES),
           (importlib.machinery.SourcelessFileLoader, importlib.machinery.BYTECODE_SUFFIXES)]
for name in ("datetime", "json", "re"):       # what most scripts import
    importlib.import_module(name)
for name in set(sys.modules) - bare:
    if file_of(sys.modules[name]) and not of_library(file_of(sys.modules[name])):
        sys.exit("%s hides a module of Python" % file_of(sys.modules[name]))
sys.path.insert(0, folder)
for name in preload:
    importlib.import_module(name)
del sys.path[0]
if unseen & sys.modules.keys():
    unseen.add("__main__")                    # of every script, then
tops = {name.partition(".")[0] for name in set(sys.modules) - bare} - set(sys.builtin_module_names)
local = {name: sys.modules[name].__spec__.origin for name in tops
         if name in sys.modules and file_of(sys.modules[name]).startswith(folder + os.sep)}
show([os.fsencode(sys.executable), *TEMPLATE], own_cookie)
if len(os.listdir("/proc/self/task")) > 1 or sys.gettrace() or sys.getprofile():
    sys.exit("something that was imported has started threads or tracing")
streams = [sys.stdout, sys.stderr]
modules, count, last = sys.modules, len(sys.modules), next(reversed(sys.modules))
limbo = [sys.path_importer_cache]
finders = [*sys.path_hooks, *sys.meta_path]   # held, so that they are not freed with those lists
kept = {name: module for name, module in modules.items()
        if isinstance(module, type(sys)) and name not in ("sys", "builtins", "_imp", "__main__")
        and (of_library(file_of(module)) or not file_of(module))}
left = {name: module for name, module in modules.items() if name not in kept and name != "__main__"}
for_python = any(needs_the_end(*item) for item in modules.items())
atexit.register(let_go)                       # before any of a script's, so that it comes last
compile("import os\nprint('')\n", "", "exec") # the first one takes a millisecond
usual_warnings = warnings.catch_warnings()
usual_warnings.__enter__()
warnings.simplefilter("error")                # until the script is compiled
gc.collect()
gc.freeze()
number, before, words, files, place, hidden = serve()
argv = become(number, before, words, files)
sys.argv[:] = map(os.fsdecode, argv[1:])
if hasattr(sys, "orig_argv"):
    sys.orig_argv = list(map(os.fsdecode, argv))
try:
    if hidden:
        raise ImportError
    script = [load(sys.argv, place)]
except Exception:
    os.execvp(argv[0], argv)                  # a new interpreter knows best what is wrong
failure, code = None, 0
try:
    exec(*script.pop())
except SystemExit as exc:
    code = plain(exc)
    flush()
    raise
except BaseException as exc:
    failure = exc
flush()
if failure:
    code = 1
    try:
        tell(failure)
    except SystemExit as exc:
        code = plain(exc)
        raise
    if type(failure) is KeyboardInterrupt:
        sys.excepthook, code = lambda *told: None, None       # it is told; Python itself ends by SIGINT
        raise failure
    del failure
    sys.exit(1)
'''


def _close_all(fds: List[int]) -> None:
    """Close files, and forget them."""
    while fds:
        os.close(fds.pop())


class Forked:
    """The process of a script that a template is asked to fork; it has a number once that has answered."""

    __slots__ = ("task", "request", "fds", "pid", "ticks", "returncode", "asked", "word", "template",
                 "refusal")

    def __init__(self, task: str, template: Any, request: List[bytes], fds: List[int]) -> None:
        self.task, self.template, self.request, self.fds = task, template, request, fds      # of its Template
        self.asked = time.monotonic()
        self.pid: Optional[int] = None
        self.ticks: Optional[int] = None
        self.returncode: Optional[int] = None
        self.word: Optional[str] = None        # the signal that it is to get as soon as it is there
        self.refusal: Optional[OSError] = None # why there is no such process

    def call_off(self, word: str) -> None:
        """Have it end by TERM or KILL before it has begun, or as soon as it has."""
        self.word = word
        if self.template.withdraw(self):
            self.returncode = -getattr(signal, "SIG" + word)
        elif word == "KILL":
            self.template.process.kill()       # it has not answered for as long as the task's grace

    def poll(self) -> Optional[int]:
        """Return the exit code, negative for a signal; None while it runs, or while that is not told."""
        if self.returncode is None and self.template.is_dead and not is_process(self.pid, self.ticks):
            self.returncode = LOST_EXIT
        return self.returncode


class Template:
    """The engine's side of a template interpreter.  Raises OSError if there can't be one."""

    def __init__(self, python: str, run: Run, setting: Setting, place: str) -> None:
        import socket
        self.python, self.is_ready, self.is_dead = python, False, False
        self._forked: Dict[int, Forked] = {}   # those whose end has not been told of
        self._unsent: List[int] = []
        self._count = 0
        self._said = os.path.join(place, f"template.{os.getpid()}.{id(self)}")
        self._program = self._said + ".importlib_bootstrap.py"
        outer = setting.environ.get("MINIFLOW_COOKIE")
        cookie = f"{outer}:{setting.token}/" if outer else f"{setting.token}/"
        self._environ = {**setting.environ, **run_env(run, setting)}   # which a script's process has already
        env = {**self._environ, "MINIFLOW_COOKIE": cookie.ljust(len(cookie) + _COOKIE_ROOM, ":")}
        self._cookie_room, self._start_dir = len(os.fsencode(env["MINIFLOW_COOKIE"])), setting.start_dir
        python_path = setting.environ.get("PYTHONPATH")
        self._is_same_anywhere = not python_path or all(map(os.path.isabs, python_path.split(os.pathsep)))
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        files: List[int] = []
        try:
            self.socket.setblocking(False)
            files.append(os.open(os.devnull, os.O_RDONLY | _CLOEXEC))
            for name in (self._said + ".out", self._said):   # files, as a script's own output is one
                files.append(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND | _CLOEXEC, 0o600))
            program = os.open(self._program, os.O_WRONLY | os.O_CREAT | _CLOEXEC, 0o600)
            files.append(program)
            os.write(program, (_BOOTSTRAP % TEMPLATE_PROGRAM).encode())
            argv = [python, self._program, str(theirs.fileno()), setting.tasks_dir, "-" * _ARGUMENTS_ROOM,
                    *run.plan.flow.preload]
            self.process = spawn(argv, env, setting.start_dir, (files[0], files[1], files[2]),
                                 [theirs.fileno()])
        except BaseException:
            self.socket.close()
            raise
        finally:
            theirs.close()
            for fd in files:
                os.close(fd)

    def fork(self, task: str, invocation: Invocation, stdin: int, log: int) -> Optional[Forked]:
        """Ask for a process; None if it has to be started in another way."""
        words = [*invocation.argv, *(f"{name}={value}" for name, value in invocation.env.items()
                                     if self._environ.get(name) != value)]
        if (self.is_dead or any("\0" in word for word in words)
                or len(os.fsencode(invocation.env["MINIFLOW_COOKIE"])) > self._cookie_room
                or not self._is_same_anywhere and invocation.cwd != self._start_dir):
            return None
        place = os.path.dirname(os.path.realpath(invocation.argv[1]))  # here, as no child has to pay for it
        request = list(map(os.fsencode, [place, str(len(invocation.argv)), *words]))
        if sum(map(len, request)) + len(request) > _REQUEST_BYTES:
            return None
        fds: List[int] = []
        try:
            fds += [os.dup(stdin)]
            fds += [os.dup(log)]
            if invocation.cwd != os.getcwd():
                fds += [os.open(invocation.cwd, os.O_RDONLY | os.O_DIRECTORY | _CLOEXEC)]
        except OSError:                        # the other way tells what is wrong
            _close_all(fds)
            return None
        self._count += 1
        forked = self._forked[self._count] = Forked(task, self, request, fds)
        self._unsent.append(self._count)
        if self.is_ready:
            self._send()
        return forked

    def _send(self) -> None:
        """Send what the template has not been asked yet, as far as it takes it now."""
        import socket
        while self._unsent:
            forked = self._forked[self._unsent[0]]
            try:
                request = b"\0".join([b"%d" % self._unsent[0], *forked.request])
                socket.send_fds(self.socket, [request], forked.fds)
            except BlockingIOError:
                return                         # the next answer makes room
            except OSError:
                return                         # it is dead: what it has told before is to be read first
            del self._unsent[0]
            _close_all(forked.fds)

    def news(self) -> List[Tuple[Forked, bool]]:
        """Take in what the template has told; return the processes that have begun (True) or ended since.

        A process tells itself that it has begun, before it is anything of a script's, so that a template that
        dies loses none; only then are all gone who can write to the socket, and it is at its end.
        """
        told: List[Tuple[Forked, bool]] = []
        if not self.patience():
            self.is_dead = True                # it hangs
            self.process.kill()
        while not self.is_dead:
            try:
                numbers = self.socket.recv(1000).split()
            except BlockingIOError:
                break
            except ConnectionResetError:       # it died before it read all; what it had told follows
                continue
            except OSError:
                numbers = []
            if not numbers:
                self.is_dead = True
            elif numbers == [b"ready"]:
                self.is_ready = True
            else:
                told.append(self._take(*map(int, numbers)))
        if self.is_ready:
            self._send()
        return told

    def _take(self, number: int, first: int, ticks: Optional[int] = None) -> Tuple[Forked, bool]:
        """Take in that a process has begun (its pid and ticks), ended (its wait status) or can't be."""
        forked = self._forked[number]
        if first < 0:
            forked.refusal = OSError(-first, os.strerror(-first))
            forked.returncode = -getattr(signal, "SIG" + forked.word) if forked.word else None
            del self._forked[number]
        elif ticks is None:
            forked.returncode = os.waitstatus_to_exitcode(first)
            del self._forked[number]
        else:
            forked.pid, forked.ticks = first, ticks
        return forked, ticks is not None

    def patience(self) -> float:
        """Return for how many seconds more it may keep us waiting for an answer."""
        asked = [forked.asked for forked in self._forked.values() if forked.pid is None]
        return max(0.0, min(asked) + ANSWER_S - time.monotonic()) if asked else _FOREVER_S

    def withdraw(self, forked: Forked) -> bool:
        """Take back a request that has not been sent; tell whether that was in time."""
        number = next((n for n in self._unsent if self._forked[n] is forked), None)
        if number is None:
            return False
        self._unsent.remove(number)
        del self._forked[number]
        _close_all(forked.fds)
        return True

    def bury(self) -> Tuple[List[Forked], str]:
        """Return what was asked of a dead template and not begun, and why it has died, in its words."""
        if self.is_dead:                       # and may have something to say yet
            wait_for(self.process.poll, _LAST_WORDS_S)
        self.is_dead = True
        self.process.kill()
        wait_for(self.process.poll, UNKILLABLE_S)
        try:
            said = read_file(self._said).decode(errors="replace").strip()
        except OSError:
            said = ""
        lost = [forked for forked in self._forked.values() if forked.pid is None]
        for forked in lost:
            _close_all(forked.fds)
        return lost, said.splitlines()[-1] if said else describe_exit(self.process.poll() or 0)[0]

    def close(self) -> None:
        """Send the template home, which has nothing to do any more."""
        self.bury()
        self.socket.close()
        for name in (self._said, self._said + ".out", self._program):
            try:
                os.unlink(name)
            except OSError:
                pass                           # somebody tidied up


def is_binary(program: str, env: Mapping[str, str]) -> bool:
    """Tell whether a program is none that another one interprets: a shell script may set variables."""
    path = program_path(program, env)
    try:
        return bool(path) and read_file(path or "", 4) == b"\x7fELF"
    except OSError:
        return False


#: With one of these Python, or a package, does something at its start or its end that a fork would not do.
_FORBIDDING = ("PYTHONINSPECT", "PYTHONMALLOCSTATS", "PYTHONPROFILEIMPORTTIME", "PYTHONDUMPREFS",
               "PYTHONDUMPREFSFILE", "PYTHONVERBOSE", "PYTHONTRACEMALLOC", "PYTHONPERFSUPPORT",
               "COVERAGE_PROCESS_START")


class Templates:
    """The templates of a run, one for each interpreter that so many scripts need that it pays."""

    def __init__(self, setting: Setting, place: str, listen: Callable[[int], None]) -> None:
        self._setting, self._place, self._listen = setting, place, listen
        self._by_python: Dict[str, Optional[Template]] = {}  # None: not worth while, or it can't live
        self.can_be = (sys.platform == "linux" and hasattr(os, "pidfd_open")
                       and os.environ.get("MINIFLOW_NO_FORK", "0") in ("", "0")
                       and not any(setting.environ.get(name) for name in _FORBIDDING))

    def __iter__(self) -> Iterator[Template]:
        return iter([template for template in self._by_python.values() if template])

    def foresee(self, run: Run) -> None:
        """Start the templates that will pay, so that they are ready when the first script is."""
        counts: Dict[str, int] = {}
        for name, task in run.plan.tasks.items():
            if (isinstance(task.action, Script) and run.tasks[name].status not in SETTLED
                    and executor_of(run.plan.flow, task) == LOCAL):
                python = task.action.python or self._setting.python
                if "/" in python:
                    python = _absolute(python, self._setting.start_dir)
                counts[python] = counts.get(python, 0) + 1
        pays_from = PRELOAD_PAYS_FROM if run.plan.flow.preload else FORK_PAYS_FROM
        for python, count in counts.items():
            if self.can_be and count >= pays_from and is_binary(python, self._setting.environ):
                try:
                    template = Template(python, run, self._setting, self._place)
                except (OSError, ValueError):
                    continue                   # a script that is started with it tells what is wrong
                self._by_python[python] = template
                self._listen(template.socket.fileno())

    def fork(self, task: str, invocation: Invocation, stdin: int, log: int) -> Optional[Forked]:
        """Ask for a fork; None if the process has to be started in another way."""
        template = self._by_python.get(invocation.argv[0]) if invocation.can_fork else None
        return template.fork(task, invocation, stdin, log) if template else None

    def let_go(self, template: Template) -> None:
        """Close a template and ask it no more."""
        self._by_python[template.python] = None
        template.close()

    def close(self) -> None:
        """Close them all."""
        for template in self:
            self.let_go(template)


def end_unseen(token: str, cookies: Collection[str]) -> Set[str]:
    """Kill what a dead template may have forked and not told of; return the cookies of what had begun."""
    begun: Set[str] = set()
    end = time.monotonic() + UNKILLABLE_S
    while cookies and time.monotonic() < end:
        found = {cookie: bearers(cookie) for cookie in cookies}
        pids = bearers(token + "/") + [pid for some in found.values() for pid in some]
        if not pids:
            break
        begun.update(cookie for cookie in cookies if found[cookie])
        send_signal(pids, "KILL")              # the first ones have not come to a cookie of their own
        time.sleep(0.001)
    return begun


# ============================================================================
# == 31. FRESHNESS: which tasks need not run, as nothing that they are made of has changed?
# ============================================================================
# A task with `inputs` or `outputs` is made of its script, arguments, environment, directory, params, what its
# upstream hands on, and the content of its inputs.  What that was when it last succeeded is recorded; sizes
# and times of change spare reading files again, and are trusted only where they are older than the record.

def hash_of(content: bytes) -> str:
    """Return the SHA-256 of some bytes."""
    import hashlib
    return hashlib.sha256(content).hexdigest()


def digest(path: str) -> str:
    """Return the SHA-256 of a file's content."""
    import hashlib
    found = hashlib.sha256()
    with open_file(path, follow=True) as file:
        for block in iter(lambda: file.read(2**20), b""):
            found.update(block)
    return found.hexdigest()


def matching(patterns: Iterable[str], cwd: str) -> List[str]:
    """Return the paths, seen from `cwd`, that patterns match, each once, sorted."""
    import glob
    found = {path for pattern in patterns
             for path in glob.glob(os.path.join(glob.escape(cwd), pattern), recursive=True)}
    return sorted(os.path.relpath(path, cwd) if path.startswith(cwd + os.sep) else path for path in found)


#: What is compared, in this order, and how a change of it is told.
_RECIPE = {"script": "its script has changed", "args": "its arguments have changed",
           "env": "its environment has changed", "cwd": "its directory has changed",
           "params": "the params have changed", "upstream": "what its upstream hands on has changed"}
_SETTLED_NS = 2 * 10**9                        # a file may change this long without a new time of change
_AT_ONCE_BYTES = 32 * 2**20                    # of inputs; what has more to read is read aside


class Recipe(NamedTuple):
    """What a task is made of, before any file is read; `known` and `at` are of when it was last recorded."""

    hashes: Mapping[str, str]
    inputs: Sequence[str]                      # files, seen from `place`
    outputs: Sequence[str]                     # patterns
    place: str
    script: Optional[str]
    known: Mapping[str, Any]
    at: int

    def sizes(self, path: str) -> Tuple[int, int, bool]:
        """Return size and time of change of an input, and whether it has to be read.

        A file that changed just before it was recorded may have changed again in the same instant.
        """
        found, old = os.stat(os.path.join(self.place, path)), self.known.get(path)
        trusted = (isinstance(old, list) and old[:2] == [found.st_size, found.st_mtime_ns]
                   and self.at - found.st_mtime_ns > _SETTLED_NS)
        return found.st_size, found.st_mtime_ns, not trusted

    def unread(self) -> int:
        """Return how many bytes of inputs have to be read; raise OSError."""
        return sum(size for size, _, unread in map(self.sizes, self.inputs) if unread)

    def stamp(self) -> Dict[str, Any]:
        """Return what the task is made of now; raise OSError if a file can't be read."""
        stamp: Dict[str, Any] = {**self.hashes, "at": time.time_ns()}
        if self.script is not None:
            stamp["script"] = digest(self.script)
        inputs = {}
        for path in self.inputs:
            size, changed, unread = self.sizes(path)
            content = digest(os.path.join(self.place, path)) if unread else self.known[path][2]
            inputs[path] = [size, changed, content]
        return {**stamp, "inputs": inputs, "outputs": self.outputs, "place": self.place}


def files_matching(patterns: Iterable[str], cwd: str) -> Iterator[str]:
    """Yield the files that patterns match, and those below the directories that they match."""
    for path in matching(patterns, cwd):
        if os.path.isdir(os.path.join(cwd, path)):
            for folder, folders, names in os.walk(os.path.join(cwd, path)):
                folders.sort()
                yield from (os.path.join(path, os.path.relpath(os.path.join(folder, name),
                                                               os.path.join(cwd, path)))
                            for name in sorted(names) if os.path.isfile(os.path.join(folder, name)))
        elif os.path.isfile(os.path.join(cwd, path)):
            yield path


def _folder(flow: str) -> str:
    """Return the name of a directory for a flow, which no other flow has."""
    name = _id_stem(flow)
    return name if name == flow else f"{name}-{hash_of(os.fsencode(flow))[:12]}"


class Freshness:
    """Tells which tasks with `inputs` or `outputs` need not run, as nothing changed since they succeeded.

    What a task was made of when it last succeeded is recorded in OUTPUT/cache/FLOW/TASK.json.  Before it
    runs again the record is replaced by one that says so: what an interrupted task has left is never taken
    for good.
    """

    def __init__(self, store: Store, setting: Setting, now: Callable[[], float],
                 listen: Callable[[int], None] = lambda fd: None) -> None:
        self._store, self._setting, self._now, self._listen = store, setting, now, listen
        self.force = False                     # tasks run although nothing has changed
        self._stamps: Dict[str, Dict[str, Any]] = {}
        self._read: Deque[Tuple[str, Any]] = deque()           # what was read aside, or why it was not
        self._pipe: Optional[Tuple[int, int]] = None           # tells of it
        self._readers: List[Any] = []

    def look(self, run: Run, name: str, aside: bool = False) -> Tuple[Event, Optional[str]]:
        """Return what becomes of a task that its upstream lets run, and if it runs, why it has to.

        Where `aside`, large inputs are read in a thread, and answers() tells what became of that.
        """
        event, task = admit(run, name, self._now(), self._setting.environ), run.defs[name]
        if not isinstance(event, TaskAdmitted) or not task.may_be_cached:
            return event, "it has neither inputs nor outputs"
        try:
            recipe = self._recipe(run, name)
            if aside and recipe.unread() > _AT_ONCE_BYTES:
                self._read_aside(name, recipe)
                return TaskReading(event.at, name), None
            return self._judge(run, name, recipe.stamp())
        except (LookupError, ValueError) as exc:
            return TaskSettled(event.at, name, FAILED, f"cannot start: {exc}"), None
        except OSError as exc:
            return TaskSettled(event.at, name, FAILED, f"inputs: {exc.filename}: {exc.strerror}"), None

    def _judge(self, run: Run, name: str, stamp: Dict[str, Any]) -> Tuple[Event, Optional[str]]:
        """Return what becomes of a task that is made of what `stamp` says, and if it runs, why."""
        record = self.record(run, name)
        reason = "it is forced to" if self.force else self.why(stamp, record)
        if reason is None:
            found = [text for text in run.defs[name].inputs or () if not stamp["inputs"]][:1]
            note = f"; no file matches {found[0]}" if found else ""
            end = TaskSettled(self._now(), name, CACHED, f"nothing has changed{note}", record["output"])
            return end, None
        self._stamps[name] = stamp
        return TaskAdmitted(self._now(), name), reason

    def _read_aside(self, name: str, recipe: Recipe) -> None:
        """Read the inputs of a task in a thread, as the engine has to hear of signals and of time."""
        import threading
        if self._pipe is None:
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[0], False)
            self._listen(self._pipe[0])

        def read() -> None:
            found: Any
            try:
                found = recipe.stamp()
            except OSError as exc:
                found = exc
            self._read.append((name, found))
            assert self._pipe
            os.write(self._pipe[1], b".")
        self._readers.append(threading.Thread(target=read, daemon=True))
        self._readers[-1].start()

    def close(self) -> None:
        """Let go of the pipe, unless somebody who is not waited for may still write to it."""
        if self._pipe and not any(reader.is_alive() for reader in self._readers):
            for fd in self._pipe:
                os.close(fd)

    def answers(self, run: Run) -> List[Event]:
        """Return what becomes of the tasks whose inputs have been read aside."""
        events: List[Event] = []
        if self._pipe:
            try:
                os.read(self._pipe[0], 4096)   # which only says that there is something
            except BlockingIOError:
                pass
        while self._read:
            name, found = self._read.popleft()
            if run.tasks[name].status != PENDING:
                continue                       # settled meanwhile: a cancelled run
            events.append(self._taken(run, TaskSettled(
                self._now(), name, FAILED, f"inputs: {found.filename}: {found.strerror}")
                if isinstance(found, OSError) else self._judge(run, name, found)[0]))
        return events

    def ask(self, run: Run, action: Ask) -> List[Event]:
        """Find out whether a task is to run, and if so put its record out of force."""
        return [self._taken(run, self.look(run, action.task, aside=True)[0])]

    def _taken(self, run: Run, event: Any) -> Event:
        """Return the event, once the record of a task that is to run is out of force."""
        if isinstance(event, TaskAdmitted) and event.task in self._stamps:
            try:
                at_work = self._at_work(self.record(run, event.task))
                self._put(run, event.task, {"incomplete": list(dict.fromkeys([*at_work, run.id]))})
            except OSError as exc:
                return TaskSettled(event.at, event.task, FAILED,
                                   f"cannot start: {exc.filename or 'its record'}: {exc.strerror}")
        return event  # type: ignore[no-any-return]

    def made(self, run: Run, end: AttemptEnded) -> AttemptEnded:
        """Return the end of an attempt, which fails without its outputs; record a success."""
        stamp = self._stamps.get(end.task)
        if stamp is None or end.status != SUCCESS:
            return end
        for pattern in stamp["outputs"]:
            if not matching([pattern], stamp["place"]):
                return AttemptEnded(end.at, end.task, end.attempt, FAILED,
                                    f"output {pattern} is not there, although the task has succeeded")
        record = {key: value for key, value in stamp.items() if key not in ("outputs", "place")}
        record["output"] = end.output
        if end.unsaved or masked(record, run.secrets) != record:
            record = {"secret": run.id}
        others = [other for other in self._at_work(self.record(run, end.task)) if other != run.id]
        try:
            self._put(run, end.task, {"incomplete": others} if others else record)
        except OSError:
            pass                               # it runs once more, then
        return end

    def _at_work(self, record: Mapping[str, Any]) -> List[str]:
        """Return the runs that may be making the outputs of a task at this moment, as its record tells."""
        return [run_id for run_id in record.get("incomplete", ()) if self._store.owner(run_id) is not None]

    def _path(self, run: Run, name: str) -> str:
        return os.path.join(self._store.path, "cache", _folder(run.flow), f"{name}.json")

    def _put(self, run: Run, name: str, record: Mapping[str, Any]) -> None:
        self._store.prepare("cache", _folder(run.flow))
        self._store.disk.put(self._path(run, name), json.dumps(record).encode(), True)

    def record(self, run: Run, name: str) -> Dict[str, Any]:
        """Return what is recorded of a task; {}: nothing that could be read."""
        try:
            record = json.loads(read_file(self._path(run, name), follow=False))
            whole = isinstance(record.get("inputs"), dict) and isinstance(record.get("at"), int) and all(
                isinstance(known, list) and len(known) == 3 for known in record["inputs"].values())
            for run_id in record.get("incomplete", ()):
                check_run_id(run_id)
            return record if whole or record.get("incomplete") or "secret" in record else {}
        except (OSError, ValueError, AttributeError, RecursionError):
            return {}

    def _recipe(self, run: Run, name: str) -> Recipe:
        """Return what a task is made of, before files are read; raise LookupError or ValueError.

        But for the names of files only hashes are recorded, as values may be secret.
        """
        task, does = run.defs[name], invoke(run, name, self._setting)
        values = values_of(run, name, does.env)
        patterns = {field: [render_parts("file", text, values) for text in getattr(task, field) or ()]
                    for field in ("inputs", "outputs")}
        env = {key: does.env[key] for key in sorted({*run.plan.flow.env, *task.env})}
        argv: Sequence[str] = does.argv
        script = None
        if isinstance(task.action, Script):    # its content counts, not where the tasks directory is
            script = f"{self._setting.tasks_dir}/{task.action.path}"
            argv = [argv[0], task.action.path, *argv[2:]]
        recipe = {"args": [argv, does.stdin], "env": env, "cwd": does.cwd, "params": run.params,
                  "upstream": [run.ctx_of(name), run.outputs_of(run.tasks[name].scope)]}
        hashes = {key: hash_of(json.dumps(value, sort_keys=True).encode()) for key, value in recipe.items()}
        files = sorted({*files_matching(patterns["inputs"], does.cwd)})
        old = self.record(run, name)
        return Recipe(hashes, files, patterns["outputs"], does.cwd, script, old.get("inputs", {}),
                      old.get("at", 0))

    @staticmethod
    def why(stamp: Mapping[str, Any], record: Mapping[str, Any]) -> Optional[str]:
        """Return why a task has to run; None: it need not."""
        if not record:
            return "it has not succeeded yet"
        if "incomplete" in record:
            return f"it did not end well in run {record['incomplete'][-1]}"
        if "secret" in record:
            return "what it hands on holds a secret, which is not kept"
        for key, told in _RECIPE.items():
            if record.get(key) != stamp.get(key):
                return told
        for path in sorted({*stamp["inputs"], *record["inputs"]}):
            if path not in record["inputs"]:
                return f"input {path} is new"
            if path not in stamp["inputs"]:
                return f"input {path} is gone"
            if stamp["inputs"][path][2] != record["inputs"][path][2]:
                return f"input {path} has changed"
        return next((f"output {pattern} is not there" for pattern in stamp["outputs"]
                     if not matching([pattern], stamp["place"])), None)


# ============================================================================
# == 32. PROCESSES: how are attempts started, watched and ended?
# ============================================================================
# Every attempt is a process group (and session) of its own whose output goes straight into its log, so
# nothing of it passes through the engine.  The end of the group's leader is seen by its pidfd where there is
# one, else by SIGCHLD, else by looking fifty times a second.  When the leader has ended and others of its
# group have not, they get SIGTERM, grace_s later SIGKILL, and only then is the attempt over: nothing of a
# task survives it.
#
# What a task with inputs or outputs was made of is recorded here as well, so that it need not run again.
#
# One clock: the system's, read once, and monotonic time since, in whole microseconds.  Times never go back
# within an engine's life, and durations are right even where somebody sets the system's clock.

SIGNAL_EXITS = {"SIGINT": 130, "SIGTERM": 143, **({} if os.name == "nt" else {"SIGHUP": 129})}
_SWEEP_S = 0.01                                # how often the rest of a group is looked at
KEPT_CONTEXTS = 64                             # context files that are kept for tasks that see the same
_LOOK_S = 0.02                                 # the same for processes without a pidfd
_REAP_S = 1.0                                  # how often PID 1 looks for the orphans of others


class Clock:
    """Seconds since 1970 that never go back."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def now(self) -> float:
        """Return the time in whole microseconds."""
        return round(self._offset + time.monotonic(), 6)


class Waiter:
    """Waits for the first of: the end of a watched process, a signal to the engine, the time.

    Signals can be had by the main thread alone; elsewhere they stay whoever's they are.
    """

    def __init__(self, take_signals: bool = True) -> None:
        import threading
        self.signals: List[str] = []
        self._old: Dict[int, Any] = {}
        self._poll: Any = None
        self._pipe: Tuple[int, int] = (-1, -1)
        if os.name != "nt":
            import select
            self._poll = select.poll()
        if take_signals and threading.current_thread() is threading.main_thread():
            self._take_signals()

    def _take_signals(self) -> None:
        """Route the signals that end a run to wait(), and keep their old handlers."""
        for name in SIGNAL_EXITS:
            number = getattr(signal, name)
            if name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN:
                self._old[number] = signal.signal(number, self._on_signal)
        if self._poll:
            self._pipe = os.pipe()
            for fd in self._pipe:
                os.set_blocking(fd, False)
            self._old_wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._poll.register(self._pipe[0], 1)          # 1: POLLIN
            if not hasattr(os, "pidfd_open"):
                self._old[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda number, frame: None)
            elif signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:      # the system would eat exit codes
                self._old[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def _on_signal(self, number: int, frame: Any) -> None:
        """Remember a signal; that it came wakes wait() through the pipe."""
        self.signals.append(signal.Signals(number).name)

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._old.items():
            signal.signal(number, handler)
        if self._pipe[0] >= 0:
            signal.set_wakeup_fd(self._old_wakeup)
            for fd in self._pipe:
                os.close(fd)

    def watch(self, pid: int) -> Optional[int]:
        """Begin to watch a child; return its pidfd, or None where there is no such thing."""
        try:
            fd: int = os.pidfd_open(pid)       # type: ignore[attr-defined, unused-ignore]
        except (AttributeError, OSError):
            return None
        self.listen(fd)
        return fd

    def listen(self, fd: int) -> None:
        """Wake as well when there is something to read from `fd`."""
        self._poll.register(fd, 1)

    def ignore(self, fd: int) -> None:
        """Wake no more for `fd`."""
        self._poll.unregister(fd)

    def unwatch(self, fd: Optional[int]) -> None:
        """Stop watching a child."""
        if fd is not None:
            self._poll.unregister(fd)
            os.close(fd)

    def wait(self, seconds: float) -> List[int]:
        """Wait at most so long; return the pidfds of processes that have ended, and what can be read."""
        seconds = min(max(seconds, 0), _FOREVER_S)
        if not self._poll:
            time.sleep(min(seconds, _LOOK_S))
            return []
        ended = [fd for fd, _ in self._poll.poll(-(-seconds * 1000 // 1))]
        if self._pipe[0] in ended:
            ended.remove(self._pipe[0])
            try:
                os.read(self._pipe[0], 4096)
            except BlockingIOError:
                pass
        return ended


class Context:
    """A context file, and how many running attempts were given it."""

    __slots__ = ("scope", "path", "users")

    def __init__(self, scope: Scope, path: str) -> None:
        self.scope, self.path, self.users = scope, path, 0


class Child:
    """A running attempt: its process, which leads its group, and how to see its end."""

    __slots__ = ("task", "process", "pidfd", "code", "stopping", "kill_at", "give_up_at", "output", "context",
                 "cookie")

    def __init__(self, task: str, process: Any, pidfd: Optional[int], output: str, context: Context,
                 cookie: str) -> None:
        self.task, self.process, self.pidfd, self.cookie = task, process, pidfd, cookie
        self.output, self.context = output, context
        self.code: Optional[int] = None        # the leader's exit code, once it has ended
        self.stopping: Optional[str] = None    # why it was being stopped when it ended
        self.kill_at: Optional[float] = None   # when the rest of the group gets SIGKILL
        self.give_up_at: Optional[float] = None              # when its leader is given up: it had SIGKILL

    def signal_group(self, word: str) -> bool:
        """Send TERM or KILL to the group; tell whether there was anybody."""
        try:
            if os.name == "nt":
                self.process.terminate() if self.code is None else None
                return False
            if self.process.pid is None:       # its template has never told of it
                return False
            os.killpg(self.process.pid, getattr(signal, "SIG" + word))
            if word == "TERM":
                os.killpg(self.process.pid, signal.SIGCONT)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass                               # somebody of another user is in the group (macOS: or a zombie)
        return True

    def is_told_of(self) -> bool:
        """Tell whether something wakes us when it ends; its end has to be looked for otherwise."""
        return (self.pidfd is not None
                or isinstance(self.process, Forked) and not self.process.template.is_dead)

    def is_due(self) -> bool:
        """Tell whether to look at it, though nothing has woken us."""
        return (self.code is not None or bool(self.give_up_at) or not self.is_told_of()
                or self.process.returncode is not None)

    def leaves_something(self) -> bool:
        """Tell whether anything of the attempt still runs; after a stop also outside its group."""
        return self.group_lives() or bool(self.stopping and bearers(self.cookie))

    def group_lives(self) -> bool:
        """Tell whether anybody is left in the group, once its leader has been reaped."""
        if self.process.pid is None:
            return False                       # it has not come to be
        try:
            os.killpg(self.process.pid, 0)
        except (ProcessLookupError, AttributeError):
            return False
        except PermissionError:
            return sys.platform != "darwin"
        try:
            while os.waitpid(-self.process.pid, os.WNOHANG)[0]:
                pass                           # orphans that came to us: we may be PID 1
        except ChildProcessError:
            pass
        return group_has_living(self.process.pid)


class Exchange:
    """The files by which attempts of a run are given something and hand something on."""

    def __init__(self, store: Store, run_id: str) -> None:
        self._store, self._run_id, self._disk = store, run_id, store.disk
        self._logs = store.prepare("logs", run_id)
        self._io = store.prepare("tmp", run_id, "io")
        self.work = store.prepare("tmp", run_id, "work")
        self._found = set(os.listdir(self._io))# of attempts whose record a power cut may have taken
        self.null = os.open(os.devnull, os.O_RDONLY | _CLOEXEC)
        self._contexts: Dict[int, Context] = {}
        self._made = 0

    def output(self, action: Start) -> str:
        """Return where an attempt may write what it hands on; nothing is there before."""
        if not os.path.isdir(self.work):
            self._disk.make_dir(self.work)     # some task has removed it
        return self._fresh(f"{action.task}.{action.attempt}.out")

    def _fresh(self, name: str) -> str:
        """Return the path of a file between us and an attempt, where nothing is."""
        path = f"{self._io}/{name}"
        if name in self._found:
            self._disk.unlink(path)
        return path

    def base(self, task: str, attempt: int) -> str:
        """Return what the paths of an attempt's own files begin with."""
        return f"{self._io}/{task}.{attempt}"

    def names(self) -> List[str]:
        """Return the names of all files of all attempts; none if the disk does not tell."""
        try:
            return os.listdir(self._io)
        except OSError:
            return []

    def log_path(self, action: Start) -> str:
        """Return where the log of an attempt lies."""
        return os.path.join(self._logs, f"{action.task}.{action.attempt}.log")

    def open_log(self, action: Start) -> int:
        """Open a new log and lock it; whoever inherits it holds the lock, which is a proof of life."""
        path = self.log_path(action)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
        try:
            fd = self._disk.open(path, flags)
        except FileExistsError:                # of an attempt whose record a power cut took
            os.replace(path, path + ".lost")
            fd = self._disk.open(path, flags)
        except FileNotFoundError:              # somebody tidied up
            self._store.prepare("logs", self._run_id)
            fd = self._disk.open(path, flags)
        try:
            try_lock(fd)
        except OSError:
            pass                               # no locks here
        return fd

    def open_stdin(self, content: bytes, action: Start) -> int:
        """Open what a task reads: a file that has no name any more."""
        path = self._fresh(f"{action.task}.{action.attempt}.in")
        fd = self._disk.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        self._disk.unlink(path)
        self._disk.write(fd, content)
        os.lseek(fd, 0, os.SEEK_SET)
        return fd

    def context(self, run: Run, task_id: str) -> Context:
        """Return the task's context file; tasks that see the same share one, old ones are removed."""
        scope = run.tasks[task_id].scope
        context = self._contexts.get(id(scope))
        if context is None:
            self._made += 1
            while f"context-{self._made}.json" in self._found:
                self._made += 1                # an earlier engine's, which a job may read still
            context = Context(scope, os.path.join(self._io, f"context-{self._made}.json"))
            self._disk.put(context.path, context_json(run, task_id).encode(), False)
            self._contexts[id(scope)] = context
            for old in list(self._contexts.values())[:-KEPT_CONTEXTS]:
                if not old.users:
                    del self._contexts[id(old.scope)]
                    self._disk.unlink(old.path)
        context.users += 1
        return context

    def take_output(self, path: str, remove: bool = True) -> Mapping[str, Any]:
        """Read what a task wrote to $MINIFLOW_OUTPUT, and remove it; raise ValueError if it can't be used."""
        try:
            content = read_file(path, MAX_OUTPUT + 1)
            if remove:
                os.unlink(path)
        except FileNotFoundError:
            return {}
        except OSError as exc:
            raise ValueError(f"output: {exc.strerror}") from None
        if len(content) > MAX_OUTPUT:
            raise ValueError(f"output: more than {MAX_OUTPUT} bytes; write a file and hand on its path")
        return parse_output(content)


class Need:
    """Since when the system has no means for any attempt, while nothing runs that could give some back."""

    def __init__(self, place: str) -> None:
        self.since: Optional[float] = None
        self._place = place

    def bear(self, exc: OSError, run: Run, now: float, is_idle: bool) -> None:
        """Raise StateError if this has gone on for too long, or if it is another trouble."""
        if exc.errno in PRESSURE_ERRORS | FULL_ERRORS:
            if not is_idle or self.since is None:
                self.since = now
            if now - self.since < STALL_S:
                return
        raise StateError(f"{exc.filename or self._place}: no attempt can be started: {exc.strerror}; "
                         f"what was recorded before is safe: miniflow resume {run.id}") from None


def make_setting(tasks_dir: str, output_dir: str, work: str, token: str,
                 options: Mapping[str, Any] = {}) -> Setting:
    """Return what the surroundings of this process contribute to attempts."""
    return Setting(dict(os.environ), sys.executable or "python3", os.getcwd(), os.path.abspath(tasks_dir),
                   work, token, "", "", os.path.abspath(output_dir), os.path.abspath(__file__), options)


class Processes:
    """The real World: attempts are processes of this machine.  To be used as a context manager."""

    def __init__(self, store: Store, run_id: str, tasks_dir: str, clock: Clock, token: str,
                 take_signals: bool = True, options: Mapping[str, Any] = {}) -> None:
        self.now, self._store, self._files = clock.now, store, store.files(run_id)
        self._exchange = Exchange(store, run_id)
        self._setting = make_setting(tasks_dir, store.path, self._exchange.work, token, options)
        self._watchdog = Watchdog(token, self._exchange.work)
        self._inherited = inheritable_fds() if sys.platform == "linux" else None
        self._children: Dict[str, Child] = {}
        self._by_fd: Dict[int, Child] = {}
        self._reap_at = 0.0
        self._need = Need(store.path)
        self.note: Callable[[str], None] = lambda text: None # is told what a user should know
        self._waiter = Waiter(take_signals)
        self.freshness = Freshness(store, self._setting, self.now, self._waiter.listen)
        self.ask = self.freshness.ask
        self.templates = Templates(self._setting, self._exchange.work, self._waiter.listen)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.templates.close()
        for child in list(self._children.values()):    # only where the engine itself failed
            child.signal_group("KILL")
            wait_for(child.process.poll, UNKILLABLE_S) # nothing more can be done about one that does not end
            self._forget(child)
        send_signal(bearers(self._setting.token) if exc_info[0] else (), "KILL")
        self._watchdog.close()
        self._waiter.close()
        self.freshness.close()
        os.close(self._exchange.null)

    def is_signalled(self) -> bool:
        """Tell whether a signal has come that wait() has not told of yet."""
        return bool(self._waiter.signals)

    def start(self, run: Run, action: Start) -> List[Event]:
        """Start an attempt; return that it was spawned, or how it failed to."""
        log = child = context = None
        try:
            context, output = self._exchange.context(run, action.task), self._exchange.output(action)
            setting = self._setting._replace(context=context.path, output=output)
            log = self._exchange.open_log(action)
            self._watchdog.ready()
            process = self._try_spawn(run, action, setting, log)
            if isinstance(process, AttemptEnded):
                return [process]
            pidfd = None if isinstance(process, Forked) else self._waiter.watch(process.pid)
            child = Child(action.task, process, pidfd, output, context,
                          attempt_cookie(setting.token, action.task, action.attempt))
        except OSError as exc:
            self._need.bear(exc, run, self.now(), not self._children)
            if log is not None:
                self._store.disk.unlink(self._exchange.log_path(action))
            return [AttemptDeferred(self.now(), action.task, action.attempt, f"can't start yet: {exc}")]
        finally:
            if log is not None:
                os.close(log)
            if context and not child:
                context.users -= 1
        self._need.since = None
        self._children[action.task] = child
        if isinstance(process, Forked):
            return []                          # its template will tell
        if child.pidfd is not None:
            self._by_fd[child.pidfd] = child
        return [self._spawned(run, child)]

    def _spawned(self, run: Run, child: Child) -> AttemptSpawned:
        """Watch a process that has begun; return the event."""
        pid, ticks = child.process.pid, getattr(child.process, "ticks", None)
        self._watchdog.add(pid)
        return AttemptSpawned(self.now(), child.task, run.tasks[child.task].attempt, pid, ticks,
                              isinstance(child.process, Forked))

    def _try_spawn(self, run: Run, action: Start, setting: Setting, log: int) -> Any:
        """Return the process of an attempt, or its end if it is to blame itself that it can't start.

        Raises OSError where the system has no means for it.
        """
        try:
            invocation = self._invocation(run, action.task, setting)
            stdin = None if invocation.stdin is None else os.fsencode(invocation.stdin)
        except LookupError as exc:             # a template without a value: no attempt will find one
            return attempt_unstartable(run, action.task, self.now(), exc.args[0], None)
        except ValueError as exc:              # half a surrogate pair
            return attempt_unstartable(run, action.task, self.now(), f"cannot start: {exc}", 126)
        source = self._exchange.null if stdin is None else self._exchange.open_stdin(stdin, action)
        try:
            return (self.templates.fork(action.task, invocation, source, log)
                    or spawn(invocation.argv, invocation.env, invocation.cwd, (source, log, log),
                             inherited=self._inherited))
        except (OSError, ValueError) as exc:   # ValueError: a NUL in an argument
            if getattr(exc, "errno", None) in PRESSURE_ERRORS | FULL_ERRORS:
                raise
            code = 127 if isinstance(exc, FileNotFoundError) else 126
            return attempt_unstartable(run, action.task, self.now(), f"cannot start: {exc}", code)
        finally:
            if source != self._exchange.null:
                os.close(source)

    def _invocation(self, run: Run, task_id: str, setting: Setting) -> Invocation:
        """Return what is executed for a task."""
        return invoke(run, task_id, setting)

    def _end(self, run: Run, child: Child, code: int) -> AttemptEnded:
        """Return how an attempt ended whose processes have."""
        return attempt_end(run, child.task, self.now(), code, child.stopping,
                           lambda: self._exchange.take_output(child.output))

    def stop(self, run: Run, action: Stop) -> List[Event]:
        """Send the signal of `action` to the attempt's group."""
        child = self._children.get(action.task)
        if child and child.process.pid is None:
            child.process.call_off(action.signal)
        elif child:
            child.signal_group(action.signal)
            send_signal(escaped(child.cookie, child.process.pid), action.signal)
            if action.signal == "KILL":
                child.give_up_at = self.now() + UNKILLABLE_S
        return []

    def wait(self, run: Run, until: Optional[float]) -> List[Event]:
        """Wait until something happens, at the longest until `until`; return what did."""
        fds = self._waiter.wait(self.patience(until))
        ended = [self._by_fd[fd] for fd in fds if fd in self._by_fd]
        events = [event for template in self.templates for event in self._hear(run, template, ended)]
        if self._watchdog.is_gone() and self._children:
            self.note("the watchdog has died; another is started")
            self._watchdog.ready()
        if os.getpid() == 1 and self.now() >= self._reap_at:
            reap_strangers([self._watchdog.pid, *(child.process.pid for child in self._children.values()),
                            *(template.process.pid for template in self.templates)])
            self._reap_at = self.now() + _REAP_S
        ended += [child for child in self._children.values() if child not in ended and child.is_due()]
        events += [event for child in ended for event in self._look_at(run, child)]
        events += self.freshness.answers(run)
        while self._waiter.signals:
            name = self._waiter.signals.pop(0)
            events.append(CancelRequested(self.now(), f"cancelled by {name}", SIGNAL_EXITS[name],
                                          was_cancelled(run) or bool(
                                              events and isinstance(events[-1], CancelRequested))))
        return events

    def patience(self, until: Optional[float]) -> float:
        """Return how many seconds to wait, at the longest until `until`."""
        seconds = _FOREVER_S if until is None else until - self.now()
        if os.getpid() == 1:
            seconds = min(seconds, _REAP_S)
        for template in self.templates:
            seconds = min(seconds, template.patience())
        if any(child.code is not None for child in self._children.values()):
            return min(seconds, _SWEEP_S)
        if any(child.is_due() for child in self._children.values()):
            return min(seconds, _LOOK_S)
        return seconds

    def _hear(self, run: Run, template: Template, ended: List[Child]) -> List[Event]:
        """Take in what a template has told; return what has begun, and add to `ended` what has ended."""
        events: List[Event] = []
        for forked, has_begun in template.news():
            child = self._children[forked.task]
            if forked.refusal and not forked.word:
                self._need.bear(forked.refusal, run, self.now(), len(self._children) == 1)
                events.append(self._put_back(run, child, f"can't start yet: {forked.refusal}"))
            elif has_begun:
                events.append(self._spawned(run, child))
                if forked.word:
                    self.stop(run, Stop(child.task, run.tasks[child.task].attempt, "", forked.word))
            else:
                ended.append(child)
        if template.is_dead:
            self._waiter.ignore(template.socket.fileno())
            events += self._outlive(run, template)
        return events

    def _outlive(self, run: Run, template: Template) -> List[Event]:
        """Put back what was asked of a template that has died, when nothing of it runs unseen."""
        lost, why = template.bury()
        self.templates.let_go(template)
        self.note(f"scripts are started without a template of {template.python}: {why}")
        begun = end_unseen(self._setting.token, [self._children[forked.task].cookie for forked in lost])
        events: List[Event] = []
        for forked in lost:
            child, task_run = self._children[forked.task], run.tasks[forked.task]
            if task_run.stopping:
                forked.returncode = -signal.SIGKILL
            elif child.cookie in begun:
                forked.returncode = LOST_EXIT
            else:
                events.append(self._put_back(run, child, "its template interpreter has died"))
        return events

    def _put_back(self, run: Run, child: Child, why: str) -> AttemptDeferred:
        """Forget an attempt that has not begun."""
        task_run = run.tasks[child.task]
        self._forget(child)
        self._store.disk.unlink(os.path.join(self._store.path, task_run.attempts[-1].log or ""))
        return AttemptDeferred(self.now(), child.task, task_run.attempt, why)

    def _look_at(self, run: Run, child: Child) -> List[Event]:
        """Return the end of an attempt, if its leader and all of its group have ended.

        What the leader's end means is settled then; a stop that comes later only hastens the end of the rest.
        """
        now = self.now()
        if child.code is None:
            child.code = child.process.poll()
            if child.code is None and child.give_up_at and now >= child.give_up_at:
                self._forget(child)
                stopping = run.tasks[child.task].stopping or "stopped"
                return [attempt_unkillable(run, child.task, now, stopping,
                                           f"process {child.process.pid}")]
            if child.code is None:
                return []
            child.stopping = run.tasks[child.task].stopping
            if child.leaves_something():
                child.kill_at = now + run.defs[child.task].grace_s
                if not child.stopping:         # else it has had its SIGTERM
                    child.signal_group("TERM")
        left = child.kill_at is not None and child.leaves_something()
        if left and child.kill_at and now < child.kill_at + UNKILLABLE_S:
            if now >= child.kill_at:
                child.signal_group("KILL")
                send_signal(escaped(child.cookie, child.process.pid), "KILL")
            self._unwatch(child)               # its leader has told all it can
            return []
        self._forget(child)
        end = self.freshness.made(run, note_secrets(run, self._end(run, child, child.code)))
        return [end._replace(error="unkillable: some of its processes are given up") if left else end]

    def _unwatch(self, child: Child) -> None:
        """Stop waiting for the end of a leader."""
        if child.pidfd is not None:
            del self._by_fd[child.pidfd]
            self._waiter.unwatch(child.pidfd)
            child.pidfd = None

    def _forget(self, child: Child) -> None:
        """Stop watching a child that has ended."""
        del self._children[child.task]
        if child.process.pid is not None:
            self._watchdog.remove(child.process.pid)
        child.context.users -= 1
        self._unwatch(child)


# ============================================================================
# == 33. SLURM: how do attempts run as jobs of a cluster?
# ============================================================================
# The engine decides, and one attempt is one job: retries, order and limits are as everywhere else.  How an
# attempt has ended is in the file that its job leaves; squeue is asked only whether the job is still there.
#
# A controller that is dead does not refuse a call, it keeps it waiting for minutes.  So each call of sbatch,
# squeue and scancel is a process beside the engine's loop, which never waits for it, and whose time is
# bounded.  That no answer has come means that nothing is known, never that a job has ended, or has not come
# to be: it is looked for, and only then submitted again.  Its .began keeps two jobs of one attempt apart.
#
# The jobs live on without an engine; the next one takes up what was running by name and comment.  A task of
# which a job may be left that was given up is in doubt: it waits until squeue shows none, and what it shows
# is cancelled.
#
# Left alone: accounting (sacct), which small sites don't have; a call for each job instead of one for all,
# ten times as dear; dependencies between jobs, as they can say neither retries nor conditions.

#: How many jobs a run has at once, and in seconds, how soon squeue is asked again and how long an answer may
#: take, unless the environment says otherwise.
SLURM_DEFAULTS = {"MINIFLOW_SLURM_JOBS": 100.0, "MINIFLOW_SLURM_POLL_S": 2.0, "MINIFLOW_SLURM_CALL_S": 30.0}
_SLOWEST = 15                                  # times as long as at first it is until squeue is asked again
_LOOK_MOST_S = 2.0                             # how long an end may lie there unseen
_CALLS = 4                                     # submissions at a time
#: Variables that tell Slurm's programs what is told by options here, or belong to a job that we are in.
_NOT_OURS = ("SQUEUE_", "SCANCEL_", "SLURM_", "SBATCH_WAIT", "SBATCH_ARRAY", "SBATCH_ERROR", "SBATCH_INPUT",
             "MINIFLOW_COOKIE")


def slurm_setting(name: str) -> float:
    """Return the value of one of SLURM_DEFAULTS; raise UsageError for one that makes no sense."""
    text = os.environ.get(name) or str(SLURM_DEFAULTS[name])
    try:
        value = float(text)
        if not 0.01 <= value <= 1e6:
            raise ValueError(text)
        return value
    except ValueError:
        raise UsageError(f"{name}={shown(text)}: expected a number from 0.01 to 1000000; "
                         f"unset, it is {SLURM_DEFAULTS[name]:g}") from None


def needs_slurm(flow: Flow) -> List[str]:
    """Return the tasks of a flow that run as jobs."""
    return [task.id for task in flow.tasks if executor_of(flow, task) == SLURM]


def check_slurm(flow: Flow) -> None:
    """Raise UsageError if tasks of `flow` are to run as jobs and can't."""
    if flow.executor == SLURM:
        for task in flow.tasks:
            if isinstance(task.action, Function):
                raise UsageError(f"flow {flow.name}: task {task.id} is a Python function, which can't run on "
                                 "Slurm; leave out --executor slurm")
    names = needs_slurm(flow)
    for program in ("sbatch", "squeue", "scancel") if names else ():
        if program_path(program, os.environ) is None:
            raise UsageError(f"flow {flow.name}: task {names[0]} is to run on Slurm, and there is no "
                             f"{program} in PATH; add it to PATH, or run the task with executor local")
    for name in SLURM_DEFAULTS if names else ():
        slurm_setting(name)


class Said(NamedTuple):
    """What a call of one of Slurm's programs gave; code None: nothing in time."""

    code: Optional[int]
    out: str
    error: str
    began: float

    @property
    def said(self) -> str:
        """What a user should know of it, on one line."""
        lines = (self.error or self.out).strip().splitlines()
        return lines[-1] if lines else "no answer" if self.code is None else f"exit {self.code}"


class Inquiry:
    """A call under way."""

    __slots__ = ("process", "pidfd", "began", "take", "_files")

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], stdin: str, began: float,
                 take: Callable[[Said], List[Event]]) -> None:
        import tempfile
        self.began, self.take = began, take
        self._files = [tempfile.TemporaryFile() for _ in range(3)]     # pipes could fill up
        self._files[0].write(os.fsencode(stdin))
        self._files[0].seek(0)
        files = self._files[0].fileno(), self._files[1].fileno(), self._files[2].fileno()
        self.process = spawn(argv, env, os.getcwd(), files)
        self.pidfd: Optional[int] = None

    def answer(self, code: Optional[int]) -> Said:
        """Return what came of it."""
        texts = []
        for file in self._files[1:]:
            file.seek(0)
            texts.append(file.read(2**26).decode("utf-8", "replace"))
        return Said(code, texts[0], texts[1], self.began)

    def close(self) -> None:
        """Let go of the files."""
        for file in self._files:
            file.close()


class Inquiries:
    """The calls of Slurm's programs that are under way."""

    def __init__(self, now: Callable[[], float], waiter: Waiter, watchdog: Watchdog) -> None:
        self._now, self._waiter, self._watchdog = now, waiter, watchdog
        self._env = {name: value for name, value in os.environ.items()
                     if name == "SLURM_CONF" or not name.startswith(_NOT_OURS)}
        self._call_s = slurm_setting("MINIFLOW_SLURM_CALL_S")
        self._calls: List[Inquiry] = []
        self._failed: List[Tuple[Callable[[Said], List[Event]], Said]] = []

    def make(self, argv: Sequence[str], take: Callable[[Said], List[Event]], stdin: str = "") -> None:
        """Begin a call; `take` is given its answer and returns what has happened by it."""
        self._watchdog.ready()
        try:
            call = Inquiry(argv, self._env, stdin, self._now(), take)
        except OSError as exc:
            self._failed.append((take, Said(None, "", f"{argv[0]}: {exc.strerror}", self._now())))
            return
        call.pidfd = self._waiter.watch(call.process.pid)
        self._watchdog.add(call.process.pid)   # for the engine may be killed while nobody answers
        self._calls.append(call)

    def turn(self) -> List[Event]:
        """Take in the answers that have come, and give up waiting for those that are late."""
        failed, self._failed = self._failed, []
        events = [event for take, answer in failed for event in take(answer)]
        for call in list(self._calls):
            code = call.process.poll()
            late = self._now() >= call.began + self._call_s
            if code is not None or late:
                self._calls.remove(call)
                self._end(call)
                events += call.take(call.answer(code))
                call.close()
        return events

    def _end(self, call: Inquiry) -> None:
        """See that nothing of a call runs any more."""
        call.process.kill()
        wait_for(call.process.poll, UNKILLABLE_S)
        self._watchdog.remove(call.process.pid)
        self._waiter.unwatch(call.pidfd)

    def wake(self) -> float:
        """Return when to look at the latest."""
        if self._failed or any(call.pidfd is None for call in self._calls):
            return self._now() + _LOOK_S
        return min((call.began + self._call_s for call in self._calls), default=self._now() + _FOREVER_S)

    def wait(self, until: float) -> bool:
        """Wait for an answer, at the longest until then; tell whether there is one to wait for."""
        if self._calls and self._now() < until:
            self._waiter.wait(min(self.wake(), until) - self._now())
            return True
        return False

    def close(self) -> None:
        """End all calls that are under way."""
        for call in self._calls:
            self._end(call)
            call.close()


class Job:
    """A running attempt that is, or is to be, a job."""

    __slots__ = ("task", "attempt", "base", "id", "stage", "since", "missed", "state", "odd", "word",
                 "give_up_at", "context", "is_barred")

    def __init__(self, task: str, attempt: int, base: str, stage: str, since: float) -> None:
        self.task, self.attempt, self.base, self.stage, self.since = task, attempt, base, stage, since
        self.id: Optional[str] = None
        self.missed = self.odd = 0             # looks that did not show it; answers to it that made no sense
        self.state: Optional[str] = None       # as squeue said last
        self.word: Optional[str] = None        # the signal that it has been sent
        self.give_up_at: Optional[float] = None
        self.context: Optional[Context] = None
        self.is_barred = False                 # the engine itself has made its .began

    def claim(self) -> bool:
        """See that the attempt never begins; tell whether that was in time."""
        try:
            os.close(os.open(self.base + ".began", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        except OSError:
            return False
        return True

    def has_begun(self) -> bool:
        """Tell whether a job of the attempt has begun."""
        return os.path.lexists(self.base + ".began")


#: Where a job stands: to be submitted; sbatch has been called; it may be there or not; it was submitted.
_READY, _SENT, _UNSURE, _THERE = "ready", "sent", "unsure", "there"


class Pulse:
    """When Slurm is asked, and the disk looked at: soon after something has happened, then more seldom."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now, self.note = now, lambda text: None          # type: Any, Callable[[str], None]
        self.poll_s = self.pace = slurm_setting("MINIFLOW_SLURM_POLL_S")
        self.ask_at = self.look_at = self.send_at = now()
        self._troubles: Set[str] = set()

    def hurry(self) -> None:
        """Something has happened, so more may soon."""
        self.pace = self.poll_s
        self.ask_at = min(self.ask_at, self._now() + self.pace)
        self.look_at = min(self.look_at, self._now() + self.pace / 4)

    def looked(self) -> None:
        """The disk has been looked at."""
        self.look_at = self._now() + min(self.pace / 4, _LOOK_MOST_S)

    def asked(self, unclear: bool) -> None:
        """Slurm has been asked; where that left something unclear it is asked again soon."""
        self.pace = self.poll_s if unclear else min(self.pace * 1.5, self.poll_s * _SLOWEST)
        self.ask_at = self._now() + self.pace

    def complain(self, of: str, text: str) -> None:
        """Tell of a trouble, unless it is known that there is one of that kind."""
        if of not in self._troubles:
            self.note(text)
        self._troubles.add(of)

    def recover(self, of: str) -> None:
        """A trouble is over, if there was one."""
        if of in self._troubles:
            self.note(f"Slurm {of} again")
        self._troubles.discard(of)


class JobTable:
    """The attempts of a run that are jobs, what is known of each, and what follows from it."""

    def __init__(self, run: Run, store: Store, exchange: Exchange, setting: Setting, calls: Inquiries,
                 now: Callable[[], float], ended: Callable[[Run, AttemptEnded], AttemptEnded]) -> None:
        self._run, self._store, self._exchange, self._setting = run, store, exchange, setting
        self._calls, self._now, self._ended = calls, now, ended
        self.pulse = Pulse(now)
        self._jobs: Dict[str, Job] = {}
        self._clusters: Set[str] = set()       # that sbatch has named
        self._doubts: Dict[str, float] = {}    # tasks of which a job may be left, and since when
        self._told: Dict[str, Set[str]] = {}   # words to the jobs that are to be told them
        self._left: List[Tuple[Job, bool]] = []# attempts that are over, and whether all they left may go
        self._take_up()

    def _take_up(self) -> None:
        """Find what an earlier engine of the run has left."""
        run = self._run
        for name in run.running:
            task_run = run.tasks[name]
            if executor_of(run.plan.flow, run.defs[name]) == SLURM:
                job = self._enter(name, task_run.attempt, _UNSURE)
                job.id = task_run.attempts[-1].job
                job.stage = _THERE if job.id else _UNSURE
                self._clusters |= set((job.id or "").split(";")[1:])
        for name in self._exchange.names():
            match = re.fullmatch(r"(.+)\.([0-9]+)\.job", name)
            if match and (match[1] not in self._jobs or self._jobs[match[1]].attempt != int(match[2])):
                Job(match[1], int(match[2]), self._exchange.base(match[1], int(match[2])), "", 0).claim()
                self._doubts[match[1]] = self._now()

    def _enter(self, task: str, attempt: int, stage: str) -> Job:
        """Look after an attempt from now on."""
        self._jobs[task] = job = Job(task, attempt, self._exchange.base(task, attempt), stage, self._now())
        return job

    def _tell(self, word: str, job: str) -> None:
        self._told.setdefault(word, set()).add(job)

    def _say(self, job: Job, again: bool = False) -> None:
        """Tell a job that has begun to end."""
        job.id = job.id or self._at_work(job)  # else squeue will tell who it is
        if job.id and job.word:
            self._tell(job.word, job.id)
            if again and job.word == "KILL":
                self._tell("CANCEL", job.id)

    def _over(self, job: Job, end: AttemptEnded, tidy: bool) -> AttemptEnded:
        """Let go of an attempt; what is left of one that was given up stands in the way of its job."""
        del self._jobs[job.task]
        if job.context:
            job.context.users -= 1
        self._left.append((job, tidy))
        if not tidy:
            self._doubts[job.task] = self._now()
        self.pulse.hurry()
        return end

    def tidy(self) -> None:
        """Remove what attempts have left whose end is recorded by now; what stays bars one that was given up.

        Done any sooner, an engine that dies before it has recorded the end would never find it again.
        """
        for job, tidy in self._left:
            try:
                if not tidy:
                    self._store.disk.put(job.base + ".job", b"", False)
                for suffix in (".out", ".end", ".began", ".job") if tidy else ():
                    self._store.disk.unlink(job.base + suffix)
            except OSError:
                pass                           # it stands in nobody's way
        self._left.clear()

    def _give_up(self, now: float) -> List[Event]:
        """Return the ends of attempts that not even SIGKILL has ended."""
        late = [job for job in self._jobs.values() if job.give_up_at is not None and now >= job.give_up_at]
        reasons = [self._run.tasks[job.task].stopping or "stopped" for job in late]
        return [self._over(job, attempt_unkillable(self._run, job.task, now, reason, f"job {job.id}"), False)
                for job, reason in zip(late, reasons)]

    def _take_end(self, job: Job) -> List[Event]:
        """Return how an attempt has ended, by what its job has written."""
        now = self._now()
        try:
            told = json.loads(read_file(job.base + ".end"))
            end = job_end(self._run, job.task, now, told,
                          lambda: self._exchange.take_output(job.base + ".out", remove=False))
        except (OSError, ValueError, KeyError, TypeError):
            if job.missed < 2:                 # a disk that is slow to show all of it
                job.missed += 1
                return []
            end = job_lost(self._run, job.task, now, job.id, "over")
        events = self._learn(job, self._at_work(job)) if job.id is None else []
        return [*events, self._over(job, self._ended(self._run, end), True)]

    def _at_work(self, job: Job) -> Optional[str]:
        """Return which job has begun an attempt, if that can be told."""
        try:
            number, _, cluster = read_file(job.base + ".began", 256).decode().partition(";")
        except (OSError, ValueError):
            return None
        return f"{number};{cluster}" if cluster and self._clusters else number or None

    def _learn(self, job: Job, number: Optional[str]) -> List[Event]:
        """Note which job an attempt is."""
        job.id = number
        return [AttemptSubmitted(self._now(), job.task, job.attempt, number)] if number else []

    def _compare(self, job: Job, rows: Sequence[Queued]) -> List[Event]:
        """Take in what squeue shows of an attempt."""
        events: List[Event] = []
        live = [row for row in rows if row.is_live]
        if live:
            job.missed, job.state = 0, live[0].state
            if job.id is None:
                events += self._learn(job, live[0].job)
            job.stage = _THERE
            self._say(job, again=True)
            return events
        if job.stage == _UNSURE and not job.has_begun():
            job.stage = _READY                 # it has not come to be, or not to begin: once more
            return []
        job.missed += 1
        job.state = next((row.state for row in rows if job.id in (None, row.job)), None)
        if job.missed < 2:                     # the disk may show its end later than squeue
            return []
        events += self._take_end(job) if os.path.lexists(job.base + ".end") else ()
        if job.task in self._jobs:
            job.claim()                        # should it turn up all the same, it does not run
            end = job_lost(self._run, job.task, self._now(), job.id, job.state)
            events.append(self._over(job, end, False))
        return events

    def _clear_doubts(self, rows: Sequence[Queued], began: float) -> None:
        """Cancel jobs of attempts that were given up; a task of which there are none may go on."""
        for task, since in list(self._doubts.items()):
            job = self._jobs.get(task)
            left = [row.job for row in rows if row.task == task and row.is_live
                    and (job is None or row.attempt != job.attempt or job.stage == _READY)]
            for number in left:
                self._tell("CANCEL", number)
            if not left and since < began:
                del self._doubts[task]


class Jobs(JobTable):
    """The same, beside calls of sbatch, squeue and scancel that find out and get done what is to be."""

    _sending, _asking = 0, False               # submissions under way; whether squeue has been called

    def start(self, action: Start) -> List[Event]:
        """Take in an attempt; it is submitted in the next turn."""
        job = self._enter(action.task, action.attempt, _READY)
        if os.path.lexists(job.base + ".job"): # a power cut took the record of it
            job.is_barred = not self._at_work(job)
            if not job.is_barred:
                job.stage = _UNSURE
        self.pulse.hurry()
        return []

    def stop(self, action: Stop) -> List[Event]:
        """End an attempt: at once if it has not begun, else by a signal to its job."""
        job = self._jobs.get(action.task)
        if job is None:
            return []
        job.word = action.signal
        if job.claim():
            if job.id:
                self._tell("CANCEL", job.id)
            end = job_lost(self._run, job.task, self._now(), job.id, None)
            return [self._over(job, end, job.stage == _READY)]
        self._say(job)
        if action.signal == "KILL":
            job.give_up_at = self._now() + _SLOWEST * self.pulse.poll_s
        self.pulse.hurry()
        return []

    def turn(self) -> List[Event]:
        """Take in what has been answered, and how jobs have ended; ask, submit and cancel anew."""
        self.tidy()
        events, now = self._calls.turn(), self._now()
        if self._jobs and now >= self.pulse.look_at:
            events += self._look()
        if self._is_unknown() and now >= self.pulse.ask_at:
            self._ask()
        events += self._give_up(now)
        if now >= self.pulse.send_at:
            events += self._send()
        for word, jobs in self._told.items():
            for argv in scancel_argvs(jobs, word):
                self._calls.make(argv, lambda answer: [])
        self._told.clear()
        return events

    def wake(self) -> float:
        """Return when the next turn is due at the latest."""
        times = [self._now() if self._told else self._calls.wake()]
        if self._jobs:
            times += [self.pulse.look_at, self.pulse.ask_at] if self._is_unknown() else [self.pulse.look_at]
            times += [job.give_up_at for job in self._jobs.values() if job.give_up_at is not None]
            if self._sending < _CALLS and self._next():
                times.append(self.pulse.send_at)
        return min(times)

    def _look(self) -> List[Event]:
        """Return the ends that jobs have left."""
        names = set(self._exchange.names())
        self.pulse.looked()
        events: List[Event] = []
        for job in list(self._jobs.values()):
            if os.path.basename(job.base) + ".end" in names:
                events += self._take_end(job)
        return events

    def _is_unknown(self) -> bool:
        """Tell whether squeue knows what is not known here, and has not been called already."""
        return not self._asking and bool(self._jobs) and (
            bool(self._doubts) or any(job.stage in (_THERE, _UNSURE) for job in self._jobs.values()))

    def _ask(self) -> None:
        """Call squeue."""
        self._asking = True
        uid = os.getuid() if hasattr(os, "getuid") else 0
        self._calls.make(squeue_argv(self._run.id, uid, self._clusters), self._take_queue)

    def _take_queue(self, answer: Said) -> List[Event]:
        """Take in what squeue has answered; what it does not know is known only if it answers well."""
        self._asking = False
        try:
            if answer.code != 0:
                raise ValueError(f"squeue: {answer.said}")
            rows = parse_queue(answer.out, self._store.place)
        except ValueError as exc:
            self.pulse.complain("answers", f"Slurm gives no answer ({exc}); it is asked again")
            self.pulse.asked(False)
            return []
        self.pulse.recover("answers")
        by_attempt: Dict[Tuple[str, int], List[Queued]] = {}
        for row in rows:
            by_attempt.setdefault((row.task, row.attempt), []).append(row)
        events: List[Event] = []
        for job in list(self._jobs.values()):
            if job.stage in (_THERE, _UNSURE) and job.since < answer.began:
                events += self._compare(job, by_attempt.get((job.task, job.attempt), []))
        self._clear_doubts(rows, answer.began)
        self.pulse.asked(bool(self._doubts) or any(job.missed or job.word or job.stage == _UNSURE
                                                   for job in self._jobs.values()))
        return events

    def _next(self) -> Optional[Job]:
        """Return the attempt to be submitted next, if there is one."""
        return next((job for job in self._jobs.values()
                     if job.stage == _READY and job.task not in self._doubts), None)

    def _send(self) -> List[Event]:
        """Submit what is ready, some at a time."""
        events: List[Event] = []
        while self._sending < _CALLS:
            job = self._next()
            if job is None:
                break
            try:
                argv, script = self._prepare(job)
            except OSError as exc:
                place = exc.filename or self._store.path
                self.pulse.complain("takes jobs", f"{place}: {exc.strerror}, so no job is made yet")
                self.pulse.send_at = self._now() + self.pulse.pace
                break
            except (LookupError, ValueError) as exc:
                why = str(exc.args[0]) if isinstance(exc, LookupError) else f"cannot start: {exc}"
                events.append(self._over(job, attempt_unstartable(
                    self._run, job.task, self._now(), why,
                    None if isinstance(exc, LookupError) else 126), True))
                continue
            self._submit(job, argv, script)
        return events

    def _submit(self, job: Job, argv: Sequence[str], script: str) -> None:
        """Call sbatch."""
        job.stage, self._sending = _SENT, self._sending + 1
        self._calls.make(argv, lambda answer: self._take_submitted(job, answer), script)

    def _prepare(self, job: Job) -> Tuple[List[str], str]:
        """Write down what a job is to execute; return the call that submits it, and its script."""
        run, action = self._run, Start(job.task, job.attempt)
        if job.is_barred:                      # and no job is left that this was to keep from it
            self._store.disk.unlink(job.base + ".began")
            job.is_barred = False
        if not os.path.lexists(self._exchange.log_path(action)):
            os.close(self._exchange.open_log(action))
        job.context = job.context or self._exchange.context(run, job.task)
        setting = self._setting._replace(context=job.context.path, output=self._exchange.output(action))
        invocation, task = invoke(run, job.task, setting), run.defs[job.task]
        if "\0" in invocation.cwd:
            raise ValueError(f"there is a NUL in its directory {shown(invocation.cwd)}")
        spec = job_spec(run, task, invocation, self._setting.environ)
        self._store.disk.put(job.base + ".job", spec.encode("ascii"), False)
        comment = job_comment(job.task, job.attempt, self._store.place)
        argv = sbatch_argv(run.id, task, comment, self._exchange.log_path(action), invocation.cwd)
        return argv, job_script(self._setting.python, job.base)

    def _take_submitted(self, job: Job, answer: Said) -> List[Event]:
        """Take in what sbatch has answered."""
        self._sending -= 1
        number = parse_submitted(answer.out) if answer.code == 0 else None
        if number:
            self._clusters |= set(number.split(";")[1:])
        if self._jobs.get(job.task) is not job:                # it was stopped meanwhile
            if number:
                self._tell("CANCEL", number)
            return []
        job.since = self._now()
        if number:
            job.stage = _THERE
            self.pulse.recover("takes jobs")
            self._say(job)
            self.pulse.hurry()
            return self._learn(job, number)
        meaning = judge_refusal(answer.code, answer.said)
        others = any(other is not job and other.stage == _THERE for other in self._jobs.values())
        job.odd += answer.code == 0 or meaning == "too many" and not others
        if meaning == "refused" or job.odd > 2:
            if not job.claim():
                job.stage = _UNSURE            # it is at work, whatever was said
                return []
            why = f"cannot start: sbatch: {answer.said}"
            end = attempt_unstartable(self._run, job.task, self._now(), why, answer.code or None)
            return [self._over(job, end, answer.code != 0)]
        job.stage = _READY if meaning == "too many" else _UNSURE
        self.pulse.complain("takes jobs", f"Slurm takes no job now ({answer.said}); it is tried again")
        self.pulse.send_at = self._now() + self.pulse.pace
        return []


class Cluster(Processes):
    """The World of a run of which some attempts are jobs, and the others processes beside the engine."""

    def __init__(self, run: Run, store: Store, tasks_dir: str, clock: Clock, token: str,
                 options: Mapping[str, Any]) -> None:
        super().__init__(store, run.id, tasks_dir, clock, token, options=options)
        self._calls = Inquiries(self.now, self._waiter, self._watchdog)
        self.jobs = Jobs(run, store, self._exchange, self._setting, self._calls, self.now, self._hand_on)

    def __exit__(self, *exc_info: Any) -> None:
        end = self.now() + slurm_setting("MINIFLOW_SLURM_CALL_S")
        if exc_info[0] is None:
            self.jobs.turn()
            while self._calls.wait(end):       # to cancel jobs takes a moment
                self.jobs.turn()
        self._calls.close()
        super().__exit__(*exc_info)

    def _hand_on(self, run: Run, end: AttemptEnded) -> AttemptEnded:
        """Return the end of a job as that of every attempt is told."""
        return self.freshness.made(run, note_secrets(run, end))

    def start(self, run: Run, action: Start) -> List[Event]:
        """Start an attempt where it is to run."""
        if executor_of(run.plan.flow, run.defs[action.task]) == SLURM:
            return self.jobs.start(action)
        return super().start(run, action)

    def stop(self, run: Run, action: Stop) -> List[Event]:
        """End an attempt where it runs."""
        return self.jobs.stop(action) + super().stop(run, action)

    def wait(self, run: Run, until: Optional[float]) -> List[Event]:
        """Wait until something happens here or there, at the longest until `until`; return what did."""
        self.jobs.pulse.note = self.note
        wake = self.jobs.wake()
        return super().wait(run, wake if until is None else min(until, wake)) + self.jobs.turn()


# ============================================================================
# == 34. FUNCTIONS: how are Python functions called, and what becomes of what they return?
# ============================================================================
# The World of a Python flow.  Async functions run on the loop of whoever started the run, plain ones in
# threads of daemons, and those with process=True as processes like any other, whose answer is JSON.  All that
# ends goes into one queue, and a run goes on in turns, one after another, each of which takes in what has
# ended.  The turns of async functions and processes are taken on the loop, whose they are.
#
# A task gets a context of its own, copied by marshal, the fastest copy of plain values there is; what JSON
# can't hold stays here in memory and is handed on as the object that it is.  An async call that does not heed
# its cancellation within grace_s, and a thread at once, as nothing can stop it, are given up by name.
#
# A switch between threads costs more than a short call and its turn of the run.  So where all functions are
# plain, whoever ends a call takes the next turn itself, and goes on with what becomes of it; a thread that
# finds another one at it leaves its end there.  While calls are short, one thread makes them all, as many for
# a turn as may run at once.  The loop is woken for the clock, for signals and for the end.  A timer that is
# set stays set as long as it is soon enough: a new one for each wait was a tenth of the time.

TRACEBACK_CHARS = 8000                         # what is kept of a traceback: its end
_SHORT_S = 0.0002                              # a call is short: to wake a thread for another takes as long
_SURE = 20                                     # so many short calls make up for one that is not
_LOOKOUT_S = 0.01                              # a call that waits for so long gets another thread


def describe_error(exc: BaseException) -> str:
    """Return what an exception says, after the name of its class; an odd one may be unable to."""
    try:
        text = str(exc)
        return f"{class_name(type(exc))}: {text[:1000]}" if text else class_name(type(exc))
    except Exception:
        return f"{type.__repr__(type(exc))}, which can't say what it is"


def format_error(exc: BaseException) -> str:
    """Return the end of the traceback of an exception, without the frames of this file."""
    import traceback
    try:
        told = traceback.TracebackException(type(exc), exc, exc.__traceback__)
        told.stack[:] = [frame for frame in told.stack if frame.filename != __file__]
        return "".join(told.format())[-TRACEBACK_CHARS:]
    except Exception:
        return describe_error(exc)


def describe_bad(exc: Exception) -> str:
    """Return why what a function returned can't be handed on."""
    return f"bad output: {exc}" if type(exc) is ValueError else f"bad output: {describe_error(exc)}"


def error_classes(exc: BaseException) -> List[str]:
    """Return the names of the classes of an exception, its own first."""
    try:
        return [class_name(cls) for cls in type(exc).__mro__ if cls is not object]
    except Exception:                          # a class that can't say where it is from
        return ["BaseException"]


def load_module(name: str, path: str) -> Any:
    """Import a file as the module `name`, in which `import miniflow` gives this very module."""
    import importlib.util
    sys.modules.setdefault("miniflow", sys.modules[__name__])
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


#: Why no workflow may be started now, if so: a program that holds one is being imported, not run.
why_not: Optional[str] = None


def _find_function(call: Mapping[str, Any]) -> Callable[..., Any]:
    """Return the function that a call names, in the process that answers it."""
    import importlib
    if call["main"]:
        from multiprocessing import spawn
        spawn.prepare(call["main"])
    found: Any
    try:
        found = sys.modules.get(call["module"]) or importlib.import_module(call["module"])
    except ImportError:
        found = load_module(call["module"], call["path"])
    for name in call["function"].split("."):
        found = getattr(found, name)
    function: Callable[..., Any] = found.function if isinstance(found, FunctionTask) else found
    return function


def _answer(value: Any) -> Dict[str, Any]:
    """Return the answer that says that a function returned `value`."""
    try:
        returned = split_returned(value)
        for key, kind in returned.unsaved.items():
            raise ValueError(f"it returned {key!r}, a {kind}, which can't be sent from one process to "
                             "another; return what JSON can hold, or leave out process=True")
    except Exception as exc:
        return {"reason": describe_bad(exc), "classes": error_classes(exc), "error": None}
    return {"output": returned.output}


def answer_call(call: Mapping[str, Any]) -> int:
    """Call a function in a process of its own, write its answer, and return the exit code."""
    global why_not
    ctx = ContextDict(call["ctx"], call["ctx"])
    why_not = ("this program is being imported by the process of a task, to find its function; put what "
               'starts a workflow under if __name__ == "__main__":')
    try:
        function = _find_function(call)
        why_not = None                         # a task may run workflows of its own
        value = function(ctx)
    except BaseException as exc:
        answer: Dict[str, Any] = {"reason": describe_error(exc), "classes": error_classes(exc),
                                  "error": format_error(exc)}
    else:
        answer = _answer(value)
    with open(os.environ["MINIFLOW_OUTPUT"], "w", encoding="ascii") as file:
        json.dump({**answer, "read": sorted(key for key in ctx.read if isinstance(key, str))}, file)
    try:
        sys.stderr.write(answer.get("error") or "")
    except (OSError, ValueError, AttributeError):
        pass                                   # the function has closed it
    return 1 if "reason" in answer else 0


class FunctionProcesses(Processes):
    """Processes that call a Python function each."""

    def __init__(self, store: Store, run_id: str, clock: Clock, token: str,
                 functions: Mapping[str, Callable[..., Any]],
                 context: Callable[[Run, str], Dict[str, Any]]) -> None:
        super().__init__(store, run_id, "", clock, token, take_signals=False)
        self._functions, self._context_of = functions, context
        self.on_close: Callable[[int], None] = lambda fd: None

    def _invocation(self, run: Run, task_id: str, setting: Setting) -> Invocation:
        function, scope = self._functions[task_id], run.tasks[task_id].scope
        for key in sorted(scope.unsaved):
            source = run.tasks[run.plan.order[scope.writers[key]]]
            raise LookupError(f"cannot start: {key!r} of its context is a {source.unsaved[key]}, which "
                              "can't be sent to another process; hand on what JSON can hold, or leave out "
                              "process=True")
        program: Dict[str, Any] = {}
        module = sys.modules.get(function.__module__)
        found: Any = module
        for name in function.__qualname__.split("."):
            found = getattr(found, name, None)
        if (found.function if isinstance(found, FunctionTask) else found) != function:
            raise LookupError(f"cannot start: {function.__qualname__} in module {function.__module__} is not "
                              "this function, so another process would call something else; give it a name "
                              "of its own")
        path = os.path.abspath(getattr(module, "__file__", None) or "")
        if function.__module__ == "__main__":
            if not path or not os.path.isfile(path):
                raise LookupError("cannot start: its function is not in a file, so another process can't "
                                  "import it; put it into a module, or leave out process=True")
            from multiprocessing import spawn
            program = spawn.get_preparation_data(task_id)
            program.pop("authkey", None)
        call = {"sys_path": sys.path, "miniflow": "miniflow" if __name__ == "__main__" else __name__,
                "file": os.path.abspath(__file__), "main": program, "module": function.__module__,
                "path": path,
                "function": function.__qualname__, "ctx": self._context_of(run, task_id)}
        invocation = invoke(run, task_id, setting)
        env = {name: value for name, value in invocation.env.items()
               if not name.startswith("MINIFLOW_PARAM_")}    # its context has the params, of any size
        return invocation._replace(env=env, stdin=json.dumps(call))

    def _end(self, run: Run, child: Child, code: int) -> AttemptEnded:
        try:
            answer = json.loads(read_file(child.output))
            self._store.disk.unlink(child.output)
        except (OSError, ValueError):
            answer = {}
        now, read = self.now(), answer.get("read", ())
        if "reason" in answer:
            return function_failed(run, child.task, now, child.stopping, answer["reason"], answer["classes"],
                                   answer["error"], read)
        if "output" in answer and not code:
            returned = Returned(answer["output"], {}, {})
            return function_ended(run, child.task, now, child.stopping, returned, read)
        if not code and not child.stopping:
            return AttemptEnded(now, child.task, run.tasks[child.task].attempt, FAILED,
                                "it ended without an answer")
        return attempt_end(run, child.task, now, code, child.stopping, dict)

    def fds(self) -> List[int]:
        """Return the descriptors that become readable when a process ends."""
        return list(self._by_fd)

    def _unwatch(self, child: Child) -> None:
        if child.pidfd is not None:
            self.on_close(child.pidfd)         # before another file gets its number
        super()._unwatch(child)


class Call:
    """A running call of a function."""

    __slots__ = ("task", "function", "ctx", "can_wait", "code", "is_short", "future", "value", "error",
                 "is_over")

    def __init__(self, task: str, function: Callable[..., Any], ctx: ContextDict, can_wait: bool) -> None:
        self.task, self.function, self.ctx, self.can_wait = task, function, ctx, can_wait
        self.code = 0                          # that of the function, see _code_id()
        self.is_short = False                  # as expected, and as it was once it is over
        self.future: Any = None                # of an async function
        self.value: Any = None
        self.error: Optional[BaseException] = None
        self.is_over = False


def _code_id(function: Any) -> int:
    """Return what tells the code of a function, be it wrapped by others, from that of other functions."""
    try:
        for _ in range(10):
            inner = getattr(function, "__wrapped__", None) or getattr(function, "func", None)
            if inner is None:
                break
            function = inner
        return id(function.__code__)
    except Exception:                          # an odd one, or one that is not written in Python
        return id(function)


def _peek(calls: Deque[Call]) -> Optional[Call]:
    """Return the first call of a queue, if there is one; others may be taking them."""
    try:
        return calls[0]
    except IndexError:
        return None


class Threads:
    """Threads that make calls, one after another; they are daemons, as none can be ended.

    A thread that has made calls goes on with the run.  What it submits then it keeps for itself, if it is one
    call, or several whose functions have been short until now; and once it has made those it goes on again.
    As one of them may be long this time, another thread is on the lookout for what waits.
    """

    _WORK, _HELP, _LOOK_OUT, _END = "work", "help", "look out", "end"

    def __init__(self, ended: Deque[Call], go_on: Callable[[], bool], hurry: Callable[[], None]) -> None:
        import queue
        import threading
        self._ended, self._go_on, self._hurry = ended, go_on, hurry
        self._short: Dict[int, int] = {}       # for each code, its short calls less _SURE times its long ones
        self._waiting: Deque[Call] = deque()   # for any thread that is told to work
        self._kept: Deque[Call] = deque()      # for those that go on with the run, or help
        self._orders: Any = queue.SimpleQueue()                     # what idle threads are to do
        self._lock = threading.Lock()          # for what follows
        self._idle = self._all = self._news = 0
        self._has_lookout = self._is_closed = False
        self.goes_on = False                   # one of the threads submits, and will make calls afterwards

    def submit(self, call: Call) -> None:
        """Let a thread make a call."""
        call.code = _code_id(call.function)
        call.is_short = call.can_wait and self._short.get(call.code, 0) > 0
        first = _peek(self._kept)
        if not (self.goes_on and call.can_wait) or first and not (first.is_short and call.is_short):
            self._waiting.append(call)
            self._tell(self._WORK)
            return
        self._kept.append(call)
        with self._lock:
            self._news += 1
            is_told, self._has_lookout = self._has_lookout, True
        if not is_told and not self._try_tell(self._LOOK_OUT):
            self._has_lookout = False

    def withdraw(self, call: Call) -> bool:
        """Take a call back; return False if a thread has taken it."""
        for calls in (self._kept, self._waiting):
            try:
                calls.remove(call)
                return True
            except ValueError:
                pass
        return False

    def _tell(self, order: str) -> None:
        """Give an order to an idle thread, or to a new one; raise RuntimeError if none can be started."""
        with self._lock:
            if self._is_closed:
                return
            if self._idle > 0:
                self._idle -= 1
            else:
                self._start_one()
        self._orders.put(order)

    def _start_one(self) -> None:
        """Start a thread, which waits for an order."""
        import threading
        threading.Thread(target=self._obey, name=f"miniflow-{self._all + 1}", daemon=True).start()
        self._all += 1

    def _obey(self) -> None:
        """Do as idle threads are told."""
        order = self._orders.get()
        while order != self._END:
            if order != self._LOOK_OUT:
                self._work(order == self._HELP)
            with self._lock:
                self._idle += 1
            order = self._look_out() if order == self._LOOK_OUT else self._orders.get()

    def _work(self, goes_on: bool) -> None:
        """Make the calls that wait, and go on with the run; `goes_on`: also those that are kept."""
        holds = False                          # what has ended is taken in together with the next call
        while True:
            calls = self._kept if goes_on and self._kept else self._waiting
            if holds and calls is self._waiting:                    # somebody helps
                holds, goes_on = False, self._go_on()
                continue
            try:
                call = calls.popleft()
            except IndexError:
                if holds:
                    continue
                return
            self._make(call)
            with self._lock:                   # a lookout does not leave while there is something to take in
                holds = self._has_lookout and call.is_short and goes_on
            if not holds:
                goes_on = self._go_on()

    def _make(self, call: Call) -> None:
        """Call a plain function."""
        began, was_short = time.monotonic(), call.is_short
        try:
            call.value = call.function(call.ctx)
        except BaseException as exc:
            call.error = exc
        call.is_short = time.monotonic() - began < _SHORT_S
        rating = self._short.get(call.code, 0)
        self._short[call.code] = min(rating + 1, _SURE) if call.is_short else rating - _SURE
        call.is_over = True
        self._ended.append(call)
        if was_short and not call.is_short:
            self._try_tell(self._HELP, len(self._kept) - 1)

    def _try_tell(self, order: str, count: int = 1) -> bool:
        """Give an order to so many threads; return False if no more can be started."""
        try:
            for _ in range(count):
                self._tell(order)
        except RuntimeError:
            return False
        return True

    def _look_out(self) -> str:
        """Return the next order; meanwhile see that nothing waits for long, while calls are kept."""
        import queue
        helped: Optional[Call] = None
        while True:
            news, first, ended = self._news, _peek(self._kept), _peek(self._ended)
            try:
                order = str(self._orders.get(timeout=_LOOKOUT_S))
            except queue.Empty:
                order = ""
                if first is not None and first is _peek(self._kept) and first is not helped \
                        and self._try_tell(self._HELP, len(self._kept)):
                    helped = first
                if ended is not None and ended is _peek(self._ended) and not self.goes_on:
                    self._hurry()              # else the thread at it takes it in
            with self._lock:
                is_wanted = self._has_lookout = bool(news != self._news or self._kept or self._ended)
            if order and is_wanted and not self._try_tell(self._LOOK_OUT):
                self._has_lookout = False
                self._hurry()                  # what is held by now nobody will see to
            if order or not is_wanted:
                return order or str(self._orders.get())

    def close(self) -> None:
        """Make no more calls; the threads end, those that are busy when they are not any more."""
        with self._lock:
            self._is_closed = True
        for call in [*self._waiting.copy(), *self._kept.copy()]:
            call.is_over = self.withdraw(call) or call.is_over
        for _ in range(self._all):
            self._orders.put(self._END)


class Strays:
    """The calls of this program that were given up and still run."""

    def __init__(self) -> None:
        self._calls: Dict[Tuple[str, str, str], Call] = {}          # by place and id of the run, and task

    def add(self, place: str, run: Run, call: Call) -> None:
        """A call of a run is given up."""
        self._calls[place, run.id, call.task] = call

    def check(self, place: str, run: Run) -> None:
        """Raise RunLocked if a task that is to run was given up before and is running still."""
        for key, call in list(self._calls.items()):
            if call.is_over or call.future is not None and call.future.get_loop().is_closed():
                self._calls.pop(key, None)     # an async call ends with its loop; others may be at it, too
        for name, task_run in run.tasks.items() if self._calls else ():
            if task_run.status not in SETTLED and (place, run.id, name) in self._calls:
                raise RunLocked(f"run {run.id}: task {name} was given up and still runs in this program, "
                                "where nothing can stop it; wait for its end")


strays = Strays()


class Alarm:
    """Calls `ring` when it is time; once set it stays so, as long as it is soon enough."""

    def __init__(self, loop: Any, ring: Callable[[], None]) -> None:
        self._loop, self._call = loop, ring
        self._timer: Any = None

    def set(self, seconds: float) -> None:
        """See that it rings in so many seconds at the latest."""
        at = self._loop.time() + seconds
        if self._timer is None or at < self._timer.when():
            self.cancel()
            self._timer = self._loop.call_at(at, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self._call()

    def cancel(self) -> None:
        """Ring no more."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None


class Turns:
    """The turns in which a run goes on, one at a time, whoever takes them."""

    def __init__(self, steps: Iterator[Optional[float]], news: List[Event],
                 happened: Callable[[], List[Event]]) -> None:
        import threading
        self._steps, self._news, self._happened = steps, news, happened
        self.lock = threading.Lock()           # held by whoever takes a turn
        self.until: Optional[float] = None     # when to take another one, as the last one said
        self.is_over = False
        self.failure: Optional[BaseException] = None                # how they have ended, if not well

    def take(self) -> None:
        """Let the run go on from what has happened; the lock is the caller's."""
        if self.is_over:
            return
        try:
            self._news[:] = self._happened()
            self.until = next(self._steps)
        except StopIteration:
            self.is_over = True
        except BaseException as exc:           # whoever waits for the run raises it
            self.is_over, self.failure = True, exc

    def close(self) -> None:
        """Take no more turns."""
        with self.lock:
            self.is_over = True


class LoopSignals:
    """The signals that end a run, as an event loop hears them; `names` are those not taken in yet."""

    def __init__(self, loop: Any, rouse: Callable[[], None]) -> None:
        self._loop, self._rouse = loop, rouse
        self.names: List[str] = []
        self._old_handlers: Dict[int, Any] = {}

    def listen(self) -> None:
        """Hear them from now on; only in the main thread, whose they are."""
        import threading
        if threading.current_thread() is not threading.main_thread():
            return
        for name in SIGNAL_EXITS:
            number = getattr(signal, name)
            if name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN:
                self._old_handlers[number] = signal.getsignal(number)
                try:
                    self._loop.add_signal_handler(number, self._on_signal, name)
                except NotImplementedError:    # Windows
                    signal.signal(number, lambda number, frame: self._loop.call_soon_threadsafe(
                        self._on_signal, signal.Signals(number).name))

    def _on_signal(self, name: str) -> None:
        self.names.append(name)
        self._rouse()

    def close(self) -> None:
        """Let everything be as it was."""
        for number, handler in self._old_handlers.items():
            try:
                self._loop.remove_signal_handler(number)
            except NotImplementedError:
                pass
            signal.signal(number, handler)


class Functions:
    """The World of a Python flow, on the running event loop."""

    def __init__(self, functions: Mapping[str, Callable[..., Any]], clock: Clock, place: str,
                 processes: Callable[[Callable[[Run, str], Dict[str, Any]]], FunctionProcesses]) -> None:
        import asyncio
        self._loop = asyncio.get_running_loop()
        self._functions, self._place, self.now = functions, place, clock.now
        self.ask = lambda run, action: [admit(run, action.task, clock.now(), os.environ)]
        self._make_processes, self._processes = processes, None     # type: Any, Optional[FunctionProcesses]
        self._calls: Dict[str, Call] = {}
        self._ended: Deque[Call] = deque()     # any thread adds to it
        self._threads = Threads(self._ended, self._go_on, self._rouse_from_thread)
        self._wake: Any = None
        self._wakes_at = 0.0                   # when the loop will take a turn if nothing happens
        self._requests: List[Event] = []       # to cancel the run
        self._turns: Any = None                # a Turns once there is one
        self._alarm = Alarm(self._loop, self._rouse)
        self._watched: Set[int] = set()
        self.kept: Dict[str, Dict[str, Any]] = {}  # task to what only memory holds of its output
        self.errors: Dict[str, BaseException] = {}                  # task to what its last attempt raised
        self.cancelled = 0  # how often whoever waits for us was cancelled
        self.signals = LoopSignals(self._loop, self._rouse)

    def context(self, run: Run, task_id: str) -> Dict[str, Any]:
        """Return a new dict of what a task may read, but for what only memory holds."""
        values = run.ctx_of(task_id)
        if run.tasks[task_id].scope.flat and is_flat(run.params):
            return values
        import marshal
        copied: Dict[str, Any] = marshal.loads(marshal.dumps(values))
        return copied

    def start(self, run: Run, action: Start) -> List[Event]:
        """Call the function of a task."""
        name = action.task
        self.errors.pop(name, None)
        kind = run.defs[name].action.kind                     # type: ignore[union-attr]
        if kind == "process":
            if self._processes is None:
                self._processes = self._make_processes(self.context)
                self._processes.on_close = self._forget_fd
            return self._processes.start(run, action)
        scope = run.tasks[name].scope
        ctx = ContextDict(self.context(run, name), scope.writers)
        for key in scope.unsaved:
            ctx[key] = self.kept[run.plan.order[scope.writers[key]]][key]
        can_wait = (run.defs[name].timeout_s or 1) >= 1
        call = self._calls[name] = Call(name, self._functions[name], ctx, can_wait)
        if kind == "async":
            call.future = self._loop.create_task(self._call_async(call))
            call.future.add_done_callback(lambda future: self._done(call))
        else:
            self._threads.submit(call)
        return []

    async def _call_async(self, call: Call) -> None:
        """Await an async function; nothing that it raises may reach the loop, which some of it would stop."""
        try:
            call.value = await call.function(call.ctx)
        except BaseException as exc:
            call.error = exc

    def _done(self, call: Call) -> None:
        """An async call has ended."""
        if call.future.cancelled():
            import asyncio
            call.error = asyncio.CancelledError()
        call.is_over = True
        self._ended.append(call)
        self._rouse()

    def _go_on(self) -> bool:
        """Take the turns that ended calls bring about, in a thread; tell whether it is to make what is kept.

        If another thread is at it, that one will; on the loop nobody would.
        """
        turns: Turns = self._turns
        if not self._all_plain:
            self._rouse_from_thread()
            return False
        while self._ended and not turns.is_over:
            if not turns.lock.acquire(blocking=False):
                return not self._threads.goes_on
            try:
                self._threads.goes_on = True
                self._take_turn()
                while turns.until is not None and turns.until <= self.now() and not turns.is_over:
                    self._take_turn()
                is_late = turns.is_over or turns.until is not None and turns.until < self._wakes_at
            finally:
                self._threads.goes_on = False
                turns.lock.release()
            if is_late:
                self._rouse_from_thread()
        return not turns.is_over and not self._threads.goes_on

    def _take_turn(self) -> None:
        """Take a turn; no call is begun with after the last one."""
        self._turns.take()
        if self._turns.is_over:
            self._threads.close()

    def _rouse_from_thread(self) -> None:
        """Wake the loop."""
        try:
            self._loop.call_soon_threadsafe(self._rouse)
        except RuntimeError:                   # the run has ended long ago, and the loop is closed
            pass

    def _rouse(self) -> None:
        """Wake whoever waits in _pause()."""
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def stop(self, run: Run, action: Stop) -> List[Event]:
        """Cancel a call, or give it up if that is of no use."""
        call = self._calls.get(action.task)
        if call is None:
            return self._processes.stop(run, action) if self._processes else []
        if call.is_over:
            return []                          # its end is on its way
        if call.future is not None and action.signal == "TERM":
            call.future.cancel()
            return []
        del self._calls[action.task]
        end = attempt_end(run, action.task, self.now(), 1, action.reason, dict)
        if call.future is None and self._threads.withdraw(call):
            return [end]
        strays.add(self._place, run, call)
        what = "it goes on although it was cancelled" if call.future else "nothing can stop its thread"
        return [end._replace(reason=f"{end.reason}; given up: {what}", final=True,
                             inputs=inputs_read(run, action.task, call.ctx.read.copy()))]

    async def work(self, run: Run, steps: Iterator[Optional[float]], news: List[Event]) -> None:
        """Take the turns of a run to the last, each of which finds in `news` what has happened."""
        import asyncio
        kinds = {task.action.kind for task in run.plan.flow.tasks}  # type: ignore[union-attr]
        self._all_plain = kinds == {"thread"}
        turns = self._turns = Turns(steps, news, lambda: self._happened(run))
        while not turns.is_over:
            with turns.lock:
                self._take_turn()
            try:
                await self._pause()
            except asyncio.CancelledError:
                self.cancelled += 1
                self._requests.append(CancelRequested(self.now(), "cancelled", 130, self.cancelled > 1))
        if turns.failure:
            raise turns.failure

    def _happened(self, run: Run) -> List[Event]:
        """Return what has happened since it was called last."""
        events, now = [], self.now()           # type: List[Event], float
        while self._ended:
            call = self._ended.popleft()
            if self._calls.get(call.task) is call:                  # else it was given up
                events.append(self._judge(run, call, now))
        while self._requests:
            events.append(self._requests.pop(0))
        while self.signals.names:
            name = self.signals.names.pop(0)
            again = was_cancelled(run) or any(isinstance(event, CancelRequested) for event in events)
            events.append(CancelRequested(self.now(), f"cancelled by {name}", SIGNAL_EXITS[name], again))
        return events + (self._processes.wait(run, 0) if self._processes else [])

    async def _pause(self) -> None:
        """Give the loop away until there is something to take a turn for."""
        import asyncio
        turns = self._turns
        with turns.lock:
            until = float("inf") if turns.until is None else turns.until
            if self._processes:
                self._watch(self._processes)
                until = self.now() + self._processes.patience(turns.until)
            self._wakes_at, self._wake = until, self._loop.create_future()
        try:
            if turns.is_over:
                return
            seconds = until - self.now()
            if self._ended or self.signals.names or seconds <= 0:
                await asyncio.sleep(0)         # others have to have their turn on the loop as well
                return
            if seconds < float("inf"):
                self._alarm.set(seconds)
            await self._wake
        finally:
            self._wake = None

    def _watch(self, processes: FunctionProcesses) -> None:
        """Let the loop wake us when a process ends."""
        for fd in set(processes.fds()) - self._watched:
            self._loop.add_reader(fd, self._rouse)
            self._watched.add(fd)

    def _forget_fd(self, fd: int) -> None:
        """Stop watching a descriptor that is about to be closed."""
        if fd in self._watched:
            self._watched.remove(fd)
            self._loop.remove_reader(fd)

    def _judge(self, run: Run, call: Call, now: float) -> AttemptEnded:
        """Return the end of a call."""
        del self._calls[call.task]
        name, stopping, read = call.task, run.tasks[call.task].stopping, call.ctx.read
        if call.error is None:
            try:
                returned = split_returned(call.value)
            except Exception as exc:           # also one of an odd object's own
                self.errors[name] = exc
                return function_failed(run, name, now, stopping, describe_bad(exc), error_classes(exc), None,
                                       read)
            if returned.kept:
                self.kept[name] = returned.kept
            return function_ended(run, name, now, stopping, returned, read)
        self.errors[name] = TimeoutError(stopping) if stopping else call.error
        return function_failed(run, name, now, stopping, describe_error(call.error),
                               error_classes(call.error), format_error(call.error), read)

    def is_signalled(self) -> bool:
        """Tell whether a signal has come that wait() has not told of yet."""
        return bool(self.signals.names)

    def result(self, run: Run) -> Dict[str, Any]:
        """Return the final context of a run: params and all outputs, merged in topological order."""
        ctx: Dict[str, Any] = json_copy(run.params)
        for name in run.plan.order:
            ctx.update(json_copy(run.tasks[name].output or {}))
            ctx.update(self.kept.get(name, {}))
        return ctx

    def close(self, run: Run, failed: bool) -> None:
        """Let go of threads and processes; what still runs is ended where that is possible."""
        if self._turns:
            self._turns.close()                # threads may run on whose calls were given up
        self._threads.close()
        for call in self._calls.values():
            if call.future is not None:
                call.future.cancel()
            elif not call.is_over:             # the engine has failed
                strays.add(self._place, run, call)
        self._alarm.cancel()
        for fd in self._watched:
            self._loop.remove_reader(fd)
        self.signals.close()
        if self._processes:
            self._processes.__exit__(RuntimeError if failed else None)


# ============================================================================
# == 35. RUNNER: how is one run driven to its end?
# ============================================================================
# Here the pure half and the world meet.  work() is the loop around drive(): it waits for the world, keeps the
# journal's promises while it waits, and lets a Watcher tell of it.  open_new() and open_again() differ in
# the Run that they begin with and in nothing else.
#
# A run is locked before anything is decided by what is on disk, and it is let go whatever happens; what its
# processes left behind when the engine failed is ended before the error goes on.

def usable_cpus() -> int:
    """Return how many CPUs this process may use."""
    try:
        return len(os.sched_getaffinity(0))    # type: ignore[attr-defined, unused-ignore]
    except AttributeError:
        return os.cpu_count() or 1


class Watcher:
    """Whoever looks on while a run goes on; this one says nothing."""

    def begin(self, run: Run, slots: Optional[int]) -> None:
        """The run is about to start or to go on, with at most `slots` attempts at once (None: no limit)."""

    def observe(self, event: Event) -> None:
        """The event is on disk and has been applied."""

    def note(self, text: str) -> None:
        """Something outside the run has happened that a user should know."""

    def refresh(self, now: float) -> Optional[float]:
        """Nothing is due now; return when to be called again at the latest, None: when something happened."""
        return None

    def end(self, run: Run) -> None:
        """The run has ended."""


def remove_files(store: Store, run_id: str, ok: bool) -> None:
    """Remove what a run exchanged with its tasks, and if it has ended well, its TMP_DIR, too."""
    import shutil
    if not isinstance(store, MemoryStore) or store.has_folder:
        tmp = store.files(run_id).tmp
        io = os.path.join(tmp, "io")
        try:
            kept = [name for name in os.listdir(io) if name.endswith((".job", ".began"))] if not ok else []
            for name in set(os.listdir(io)) - set(kept) if kept else ():   # what bars jobs stays
                store.disk.unlink(os.path.join(io, name))
            if not kept:
                shutil.rmtree(tmp if ok else io, ignore_errors=True)
        except OSError:
            pass  # a disk that can't be looked at: the run has ended all the same


def _turns(run: Run, journal: Union[Journal, MemoryJournal], world: Any, slots: Optional[int],
           watcher: Watcher, news: List[Event]) -> Iterator[Optional[float]]:
    """Drive a run whose journal has begun to its end.

    Yields how long to wait (until when, None: until something happens); whoever waits puts what has happened
    into `news`, be it by blocking or by awaiting.
    """
    watcher.begin(run, slots)
    steps = drive(run, world, journal.append, slots, watcher.observe)
    events: Optional[List[Event]] = None
    while True:
        try:
            until = steps.send(events)         # type: ignore[arg-type]
        except StopIteration:
            break
        now = world.now()
        times = [at for at in (until, journal.idle(run, now), watcher.refresh(now)) if at is not None]
        yield min(times, default=None)
        events = list(news)
    remove_files(journal.store, run.id, run.ok)
    journal.finish(run)
    watcher.end(run)


class NoteTaker(Watcher):
    """Passes notes on and says nothing else."""

    def __init__(self, take: Callable[[str], None]) -> None:
        self.take = take

    def note(self, text: str) -> None:
        self.take(text)


class Order(NamedTuple):
    """How a run is to be made; `slots` None: as the flow says, else one attempt a usable CPU."""

    tasks_dir: str
    slots: Optional[int] = None
    durability: str = "normal"
    on_orphan: str = "kill"
    force_host: bool = False
    fork: bool = True                          # scripts may be forked from a template interpreter
    force: bool = False                        # tasks run although nothing has changed
    parent: Optional[Mapping[str, str]] = None # run and task that it is a part of
    executor: Optional[str] = None             # where tasks run that don't say; None: as the run did before
    cancel: bool = False                       # what runs is only ended
    scheduled_time: Optional[float] = None     # of a run that the schedule starts, and nobody has before

    def options(self) -> Dict[str, Any]:
        """Return the options of the command line that a flow within this one is run with as well."""
        return {"jobs": self.slots, "durability": self.durability, "on_orphan": self.on_orphan,
                "force_host": self.force_host, "no_fork": not self.fork, "force": self.force}


class Source(NamedTuple):
    """A flow, the name that it is run by, the file that it comes from, and its functions if it has any."""

    flow: Flow
    stem: str
    path: str
    functions: Optional[Mapping[str, Callable[..., Any]]] = None


class Opened(NamedTuple):
    """A run that is ours, ready to begin or to go on from `last`; without a journal nothing is to be done."""

    run: Run
    journal: Union[Journal, MemoryJournal, None]
    clock: Clock
    last: Optional[Loaded] = None


def make_world(opened: Opened, store: Store, order: Order, token: str) -> Processes:
    """Return a world of processes, and of jobs if the run has tasks that need them."""
    run, clock = opened.run, opened.clock
    if not needs_slurm(run.plan.flow):
        return Processes(store, run.id, order.tasks_dir, clock, token, options=order.options())
    most = order.slots or run.plan.flow.max_parallel
    if os.environ.get("MINIFLOW_SLURM_JOBS") and not order.slots or not most:
        most = int(max(1, slurm_setting("MINIFLOW_SLURM_JOBS")))
    run.queues.limits[JOBS] = most
    return Cluster(run, store, order.tasks_dir, clock, token, order.options())


def carry_out(opened: Opened, store: Store, order: Order, watcher: Watcher) -> Run:
    """Drive a run to its end in a world of processes, and let go of it whatever happens."""
    run, journal, news = opened.run, opened.journal, []      # type: Run, Any, List[Event]
    if journal is None:
        return run
    try:
        slots = order.slots or run.plan.flow.max_parallel or usable_cpus()
        with make_world(opened, store, order, journal.engine["token"]) as world:
            journal.note, journal.hurry, world.note = watcher.note, world.is_signalled, watcher.note
            world.freshness.force = order.force
            if order.fork:
                world.templates.foresee(run)
            journal.begin(run, opened.last)
            for until in _turns(run, journal, world, slots, watcher, news):
                news[:] = world.wait(run, until)
    finally:
        journal.close()
    return run


def run_on_own_loop(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine on an event loop of its own; what it has given up does not keep us from returning."""
    import asyncio
    loop = asyncio.new_event_loop()
    try:
        asyncio.set_event_loop(loop)
        return loop.run_until_complete(coroutine)
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
            task._log_destroy_pending = False  # type: ignore[attr-defined]    # it is left knowingly
        if left:
            loop.run_until_complete(asyncio.wait(left, timeout=0.2))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        asyncio.set_event_loop(None)
        loop.close()


async def carry_out_on_loop(opened: Opened, store: Store, order: Order, watcher: Watcher,
                            functions: Mapping[str, Callable[..., Any]], take_signals: bool) -> Functions:
    """Drive a run of functions to its end on the running loop, and let go of it whatever happens."""
    import asyncio
    run, journal = opened.run, opened.journal
    token = journal.engine["token"] if journal else ""
    world = Functions(functions, opened.clock, store.place, lambda context: FunctionProcesses(
        store, run.id, opened.clock, token, functions, context))
    if journal is None:
        return world
    failed = True
    try:
        strays.check(store.place, run)
        if take_signals:
            world.signals.listen()
        journal.note, journal.hurry = watcher.note, world.is_signalled
        journal.begin(run, opened.last)
        slots = order.slots or run.plan.flow.max_parallel
        if slots is None:
            run.queues.limits[PLAIN_FUNCTIONS] = usable_cpus()
        news: List[Event] = []
        await world.work(run, _turns(run, journal, world, slots, watcher, news), news)
        failed = False
        for _ in range(2 if take_signals else 0):
            await asyncio.sleep(0)             # a signal of the last turn is heard, too
    finally:
        world.close(run, failed)
        journal.close()
    if world.cancelled:
        raise asyncio.CancelledError()
    return world


def last_outputs(store: Store, flow: str, names: Iterable[str]) -> Dict[str, Dict[str, Any]]:
    """Return the outputs of the last success of each task in `names`."""
    outputs: Dict[str, Dict[str, Any]] = {name: {} for name in names}
    missing = set(outputs)
    for head in store.history(flow) if missing else ():
        if not missing or head["status"] == "damaged":
            continue
        tasks = store.load(head["id"]).run.tasks
        for name in sorted(missing & tasks.keys()):
            if tasks[name].status in (SUCCESS, CACHED):
                outputs[name] = dict(tasks[name].output or {})
                missing.discard(name)
    return outputs


def check_secrets(flow: Flow, params: Mapping[str, Any]) -> Tuple[str, ...]:
    """Return the texts that are not to be shown; raise UsageError for a param that holds one."""
    secrets = secret_texts(flow.secrets, os.environ)
    for name, value in params.items():
        if masked(value, secrets) != value:
            raise UsageError(f"params.{name}: it holds the value of a secret, which would be stored; let "
                             "tasks read it from their environment")
    return secrets


def open_new(store: Store, source: Source, params: Optional[Mapping[str, Any]], order: Order,
             selection: Selection = Selection(), run_id: Optional[str] = None) -> Opened:
    """Make a run of a checked flow; raise RunExists if there is one of that id."""
    flow = source.flow._replace(executor=order.executor)
    values = complete_params(flow, params or {})
    secrets = check_secrets(flow, values)
    check_slurm(flow)
    store.prepare("runs", durable=True)
    ids = store.ids()
    plan = make_plan(flow, last_outputs(store, source.stem, select(flow, selection)),
                     store.durations(source.stem, ids))
    clock = Clock()
    now = clock.now()
    run_id = run_id or store.new_id(source.stem, now)
    if masked(run_id, secrets) != run_id:
        raise UsageError("run id: it holds the value of a secret; give another")
    if run_id == "last":
        raise UsageError("run id last stands for the newest run; give another")
    twin = next((other for other in ids if other.lower() == run_id.lower() and other != run_id), None)
    if twin:
        raise UsageError(f"run id {run_id} differs from that of run {twin} by case only; give another")
    journal = open_journal(store, run_id, order.durability, order.force_host)
    if store.exists(run_id):                   # somebody else was quicker, and is through
        journal.close(remove=True)
        raise RunExists(f"run {run_id} exists; resume it, or give another run id")
    path = os.path.abspath(source.path) if source.path else ""
    run = Run(plan, run_id, values, now, source.stem, path)
    run.secrets, run.parent = secrets, order.parent
    if order.scheduled_time is not None:
        run.scheduled_time = order.scheduled_time
    return Opened(run, journal, clock)


ON_ORPHAN = ("kill", "wait", "fail")


def orphans_of(loaded: Loaded, store: Store) -> List[Orphan]:
    """Return the attempts that may run still, though the engine of their run is gone."""
    there, seen = loaded.engine, is_visible(loaded.engine)
    if there.get("boot") != this_engine(0)["boot"]:
        return []                              # the machine was started anew since
    found = []
    for name, task_run in loaded.run.tasks.items():
        if task_run.status != SUCCESS and task_run.attempts:
            attempt = task_run.attempts[-1]
            if not seen:                       # its number means another process here
                attempt.pid = None
            cookie = attempt_cookie(there.get("token", "?"), name, task_run.attempt)
            orphan = Orphan(name, attempt, cookie, os.path.join(store.path, attempt.log or ""),
                            loaded.run.defs[name].grace_s)
            if task_run.status == RUNNING or orphan.leader_lives():        # unkillable, and given up
                found.append(orphan)
    return found


def _clear_orphans(loaded: Loaded, store: Store, order: Order, note: Callable[[str], None]) -> None:
    """See that nothing of the run's attempts runs any more, by the means that `order.on_orphan` names."""
    run, host = loaded.run, loaded.engine.get("host")
    if host != this_engine(0)["host"] and any(
            t.status == RUNNING and t.attempts and executor_of(run.plan.flow, run.defs[name]) == LOCAL
            for name, t in run.tasks.items()):
        if not order.force_host:
            raise RunLocked(f"run {run.id} was being run on host {host}, where its tasks may still run; "
                            "resume it there, or with --force-host if that host is gone")
        return
    left = [(orphan, trace) for orphan in orphans_of(loaded, store) for trace in [orphan.trace()] if trace]
    for orphan, trace in left:
        if order.on_orphan == "fail":
            raise RunLocked(f"run {run.id}: task {orphan.task} still runs, though its engine is gone: "
                            f"{trace}; resume with --on-orphan kill or wait")
        note(f"task {orphan.task} still runs, though its engine is gone: {trace}; "
             + ("it is ended" if order.on_orphan == "kill" else "waiting for its end"))
    orphans = [orphan for orphan, _ in left]
    began, termed = time.monotonic(), False
    grace = max((orphan.grace_s for orphan in orphans), default=0)
    while orphans:
        late = time.monotonic() - began - grace
        if order.on_orphan == "kill" and (late >= 0 or not termed):
            for orphan in orphans:
                orphan.send("KILL" if late >= 0 else "TERM")
            termed = True
        if order.on_orphan == "kill" and late > UNKILLABLE_S:
            raise RunLocked(f"run {run.id}: task {orphans[0].task} can't be ended: {orphans[0].trace()}; "
                            "end it, then resume")
        time.sleep(0.02)
        orphans = [orphan for orphan in orphans if orphan.trace()]


def _check_jobs(last: Run, flow: Flow) -> None:
    """Raise RunLocked if a task that may be a job still is no task for a cluster any more."""
    tasks = {task.id: task for task in flow.tasks}
    for name, task_run in last.tasks.items():
        task = tasks.get(last.group_of.get(name, name))
        was = executor_of(last.plan.flow, last.defs[name])
        if (task_run.status == RUNNING and task_run.attempts and was != LOCAL
                and (task is None or executor_of(flow, task) != was)):
            job = task_run.attempts[-1].job or "?"
            raise RunLocked(f"run {last.id}: task {name} may still be job {job} of {was}, where it is not to "
                            f"run any more; end it: miniflow cancel {last.id}")


def _check_same(last: Run, source: Optional[Source], params: Optional[Mapping[str, Any]]) -> None:
    """Raise UsageError if a run that exists is to go on as one of another flow, or with other params."""
    if source and source.stem != last.flow:
        raise UsageError(f"run {last.id} is one of flow {last.flow}, not of {source.stem}; "
                         "give another run id")
    flow = source.flow if source else last.plan.flow
    given = last.params if params is None else complete_params(flow, params)
    for name in [*given, *last.params]:
        if name not in given or name not in last.params or given[name] != last.params[name]:
            was = shown(last.params[name]) if name in last.params else "not given"
            raise UsageError(f"run {last.id} exists and keeps its own params, of which {name} is {was}; "
                             "give none, or another run id")


def open_again(store: Store, run_id: str, source: Optional[Source], params: Optional[Mapping[str, Any]],
               order: Order, note: Callable[[str], None]) -> Opened:
    """Take hold of a run that exists, to go on with it by its flow as it is now (None: as it was).

    One that succeeded stays as it is, and other params or another flow are refused.  `note` is told what a
    user should know.
    """
    if not store.exists(run_id):
        store.load(run_id)                     # says what is wrong
    journal = open_journal(store, run_id, order.durability, order.force_host)
    journal.note = note
    try:
        last = store.load(run_id)
        _check_same(last.run, source, params)
        _clear_orphans(last, store, order, note)
        if last.damage:
            note(f"{len(last.damage)} bytes at the end of {store.files(run_id).journal} are torn; they are "
                 "kept beside it and what they recorded happens again")
        if last.run.outcome == SUCCESS:
            note(f"run {run_id} has succeeded already; nothing is done")
            remove_files(store, run_id, True)  # its engine may have died before it could
            if os.path.lexists(store.files(run_id).journal):
                # Its engine died before it could tidy up.
                journal.begin(last.run, last)
                journal.finish(last.run)
            else:
                journal.close(remove=True)
            return Opened(last.run, None, Clock())
        flow = source.flow if source else last.run.plan.flow
        flow = flow._replace(executor=order.executor or last.run.plan.flow.executor)
        check_slurm(flow)
        _check_jobs(last.run, flow)
        for name, change in changed_tasks(last.run.plan.flow, flow).items():
            note(f"task {name} was {change} since run {run_id} began"
                 + ("" if change == "removed" else "; it runs again, and so does its downstream"))
        run = reopen(last.run, flow)
        if run.running:
            note(f"jobs of the run go on and are taken up as they are: {', '.join(run.running)}")
        run.secrets = secret_texts(flow.secrets, os.environ)
        if order.cancel:
            run.cancel = CancelRequested(time.time(), "cancelled by miniflow cancel")
        if source and source.path:
            run.source = os.path.abspath(source.path)
        return Opened(run, journal, Clock(), last)
    except BaseException:
        journal.close(remove=True)
        raise


def signal_engine(store: Store, run_id: str, name: str) -> bool:
    """Send a signal to the engine of a run; tell whether there was one, raise UsageError if not ours."""
    owner = store.owner(run_id)
    if owner is None:
        return False
    if not is_visible(owner):
        raise UsageError(f"run {run_id} is being run by process {owner.get('pid', '?')} on host "
                         f"{owner.get('host', '?')}, which can't be seen from here; cancel it there")
    if not is_process(owner.get("pid"), owner.get("ticks")):
        return store.owner(run_id) is not None
    try:
        os.kill(int(owner["pid"]), getattr(signal, name))
    except (ProcessLookupError, KeyError):
        return store.owner(run_id) is not None
    except PermissionError:
        raise UsageError(f"run {run_id} is being run by process {owner['pid']}, which is another user's; "
                         "ask that one") from None
    return True


def open_run(store: Store, source: Source, params: Optional[Mapping[str, Any]], order: Order,
             selection: Selection, run_id: Optional[str], note: Callable[[str], None]) -> Opened:
    """Make a run, or take hold of the one that has the given id, which keeps its params and selection."""
    if run_id is not None:
        check_run_id(run_id)
    if run_id is None or not store.exists(run_id):
        try:
            return open_new(store, source, params, order, selection, run_id)
        except RunExists:
            assert run_id
    if order.scheduled_time is not None:
        raise RunExists(f"run {run_id} has been started already")
    if any(selection):
        raise UsageError(f"run {run_id} exists and keeps its own selection of tasks; give none, or another "
                         "run id")
    return open_again(store, run_id, source, params, order, note)


def run_to_end(opened: Opened, store: Store, source: Optional[Source], order: Order,
               watcher: Watcher = Watcher()) -> Run:
    """Carry out a run in the way that its tasks demand; functions get an event loop of their own."""
    functions = source.functions if source else None
    if functions is None:
        return carry_out(opened, store, order, watcher)
    run_on_own_loop(carry_out_on_loop(opened, store, order, watcher, functions, take_signals=True))
    return opened.run


# ============================================================================
# == 36. REPORTING: how is it told to a person?
# ============================================================================
# Talk goes to stderr, results to stdout.

_COLOURS = {SUCCESS: "32", CACHED: "32", FAILED: "31", UPSTREAM_FAILED: "31", CANCELLED: "33", RETRYING: "33",
            SKIPPED: "36", RUNNING: "34", INTERRUPTED: "33"}
TAIL_LINES = 20


#: What is not to be shown, in any form; hide() adds to it.
hidden: List[str] = []


def hide(names: Iterable[str]) -> None:
    """Show the values of these environment variables as *** from now on."""
    hidden[:] = sorted({*hidden, *secret_texts(names, os.environ)}, key=lambda text: (-len(text), text))


def say(text: str) -> None:
    """Write a line of talk to stderr; if nobody listens any more, that is no reason to stop."""
    try:
        sys.stderr.write(masked(text, hidden) + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        pass


def glyphs_for(stream: Any) -> Glyphs:
    """Return what pictures are drawn with on a stream: line-drawing characters where it can write them."""
    try:
        "".join([*GLYPHS[:2], *GLYPHS.marks.values(), *GLYPHS[3:]]).encode(stream.encoding)
        return GLYPHS
    except (UnicodeError, LookupError, AttributeError, TypeError):
        return ASCII_GLYPHS


def columns_of(stream: Any) -> int:
    """Return how wide a result may be: as the terminal that it goes to is, else 80 columns."""
    try:
        return max(40, os.get_terminal_size(stream.fileno()).columns or 80)
    except (OSError, ValueError, AttributeError):
        return 80


def let_go_of_stdout() -> None:
    """Send what is still written to stdout, by the interpreter's own end too, to nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def short_path(path: str) -> str:
    """Return a path as seen from the working directory, if that is shorter."""
    try:
        return min(os.path.relpath(path), path, key=len)
    except (OSError, ValueError):              # the directory is gone; on Windows, another drive
        return path


def without_hidden(content: bytes) -> bytes:
    """Return bytes of a log with what is hidden in them replaced by ***."""
    for text in hidden:
        content = content.replace(text.encode("utf-8", "surrogateescape"), MASK.encode())
    return content


def hidden_bytes() -> int:
    """Return how many bytes at the end of a piece of a log may be the beginning of something hidden."""
    return max(map(len, hidden), default=1) * 4 - 4


def read_from(file: IO[bytes], start: int, size: int) -> bytes:
    """Return bytes from the middle of a log, less the end of something hidden that begins before them."""
    early = begin = min(start, hidden_bytes())
    file.seek(start - early)
    content = file.read(early + size)
    for text in hidden:
        secret = text.encode("utf-8", "surrogateescape")
        for at in range(max(0, early - len(secret) + 1), early):
            if content.startswith(secret, at):
                begin = max(begin, at + len(secret))
    return content[begin:]


def log_tail(path: str, lines: int = TAIL_LINES) -> Tuple[List[str], int]:
    """Return the last lines of a log, decoded and safe to show, and how many bytes come before them."""
    try:
        with open_file(path) as file:
            size = file.seek(0, os.SEEK_END)
            start = max(0, size - 64 * 1024)
            content = without_hidden(read_from(file, start, size - start))
    except OSError as exc:
        return [f"({path}: {exc.strerror})"], 0
    tail = content.splitlines(keepends=True)[-lines:]
    return [safe(line.decode("utf-8", "replace").rstrip("\r\n")) for line in tail
            ], start + len(content) - sum(map(len, tail))


def count_states(run: Run) -> str:
    """Return how many tasks are in which state: 3 success, 1 failed."""
    return format_counts(task_run.status for task_run in run.tasks.values())


def format_verdict(run: Run) -> str:
    """Return one line that tells how a run ended."""
    warnings = f", {run.warnings} tolerated failures" if run.warnings else ""
    reason = f" ({safe(run.reason)})" if run.reason else ""
    return (f"run {run.id}: {run.status}{reason}: {count_states(run)}{warnings} "
            f"in {format_span(span(run.started, run.finished))}")


@_remembering
def _hidden_pattern(texts: Tuple[str, ...]) -> Any:
    """Return what finds the longest of `texts` in bytes."""
    return re.compile(b"|".join(re.escape(text.encode("utf-8", "surrogateescape")) for text in texts))


def _longest_hidden() -> int:
    """Return how many bytes the longest that is hidden can be, 0 if nothing is."""
    return max(map(len, hidden), default=0) * 4


def bytes_shown(file: IO[bytes], start: int, end: int) -> bytes:
    """Return the bytes of a log from `start` to `end`, with *** where something hidden begins among them.

    What is hidden is found also where it reaches over an edge, so that no choice of edges brings it to light.
    """
    begin, keep = max(0, start - _longest_hidden()), _longest_hidden()
    file.seek(begin)
    content = file.read(end + keep - begin)
    at, end = start - begin, min(end - begin, len(content))
    found = b""
    for match in _hidden_pattern(tuple(hidden)).finditer(content) if hidden else ():
        if match.end() > at and match.start() < end:
            if match.start() >= at:
                found += content[at:match.start()] + MASK.encode()
            at = min(match.end(), end)
    return found + content[at:end]


def unfinished_secret(file: IO[bytes], end: int) -> int:
    """Return how many bytes before `end` may be the beginning of something hidden that is being written."""
    file.seek(max(0, end - _longest_hidden()))
    tail = file.read(end - file.tell())
    parts = [text.encode("utf-8", "surrogateescape") for text in hidden]
    sizes = (size for part in parts for size in range(1, len(part)) if tail.endswith(part[:size]))
    return max(sizes, default=0)


@_remembering
def _time_of_day(second: int) -> str:
    """Return seconds since 1970 as a clock on the wall shows them."""
    return time.strftime("%H:%M:%S", time.localtime(second))


class Lines(Watcher):
    """Tells of a run on stderr, a line a change."""

    def __init__(self, store: Store, colour: bool = False) -> None:
        self.store, self.colour = store, colour

    def begin(self, run: Run, slots: Optional[int]) -> None:
        self.run = run
        left = f", {run.unsettled} of them to do" if run.unsettled < len(run.tasks) else ""
        jobs = f", {run.queues.limits[JOBS]} jobs at once" if JOBS in run.queues.limits else ""
        self.tell(f"run {run.id}: {len(run.tasks)} tasks{left}{f', {slots} at once' if slots else ''}{jobs}")

    def tell(self, text: str) -> None:
        """Show a line for good."""
        say(text)

    def note(self, text: str) -> None:
        self.tell(safe(text))

    def paint(self, status: str, text: str) -> str:
        """Return `text` in the colour of `status`, where there are colours."""
        return f"\x1b[{_COLOURS.get(status, '0')}m{text}\x1b[0m" if self.colour else text

    def observe(self, event: Event) -> None:
        if isinstance(event, AttemptStarted):
            self.started(event)
        elif isinstance(event, AttemptSubmitted):
            self.line("submitted", event.task, f": job {event.job}")
        elif isinstance(event, AttemptStopping):
            self.line("stopping", event.task,
                      f": {event.reason}" + (" (SIGKILL)" if event.signal == "KILL" else ""))
        elif isinstance(event, AttemptEnded):
            self.ended(event)
        elif isinstance(event, TaskReading):
            self.line("reading", event.task, ": its inputs")
        elif isinstance(event, TaskExpanded):
            self.line("expanded", event.task, f": {len(event.each)} instances")
        elif isinstance(event, AttemptDeferred):
            self.line("deferred", event.task, f": {event.reason}")
        elif isinstance(event, TaskSettled):
            self.line(event.status, event.task, f": {event.reason}" if event.reason else "")
        elif isinstance(event, CancelRequested):
            self.tell(f"{event.reason}: stopping what runs" + (
                " at once" if event.kill else "" if event.expired else "; once more to kill it at once"))

    def line(self, word: str, task: str, rest: str = "") -> None:
        """Show that something has happened to a task."""
        self.tell(f"{_time_of_day(int(time.time()))}  {self.paint(word, f'{word:<9}')}  {task}{safe(rest)}")

    def started(self, event: AttemptStarted) -> None:
        """An attempt has started."""
        self.line("start", event.task, f" (attempt {event.attempt})" if event.attempt > 1 else "")

    def ended(self, event: AttemptEnded) -> None:
        """An attempt has ended, and its task with it, or it will be retried."""
        task_run = self.run.tasks[event.task]
        took = format_span(span(task_run.attempts[-1].started, event.at))
        reason = f": {event.reason}" if event.reason else ""
        if task_run.status == RETRYING:
            wait = format_span(span(event.at, task_run.retry_at))
            self.line(RETRYING, event.task, f"{reason} ({took}); attempt {event.attempt + 1} in {wait}")
        else:
            self.line(event.status, event.task, f"{reason} ({took})")
        for line in (event.error or "").splitlines()[-TAIL_LINES:]:
            self.tell(f"    | {safe(line)}")
        if event.status == FAILED:
            self.tail(task_run.attempts[-1].log)

    def tail(self, log: Optional[str]) -> None:
        """Show the last lines of a failed attempt's log, and where the rest is."""
        if log:
            lines, before = log_tail(os.path.join(self.store.path, log))
            for line in lines:
                self.tell(f"    | {line}")
            shown_path = short_path(os.path.join(self.store.path, log))
            self.tell(f"    log: {shown_path}" + (f" ({before} bytes more)" if before else ""))

    def end(self, run: Run) -> None:
        self.tell(self.paint(run.status, format_verdict(run)))
        if not run.ok:
            self.tell(f"to go on with it: miniflow resume {run.id}")


class Quiet(Lines):
    """Tells of failures only."""

    def begin(self, run: Run, slots: Optional[int]) -> None:
        self.run = run

    def observe(self, event: Event) -> None:
        if isinstance(event, AttemptEnded) and event.status == FAILED:
            self.ended(event)

    def end(self, run: Run) -> None:
        if not run.ok:
            super().end(run)


SHOWN_BYTES = 2**20                            # at most so much of a log is shown at a time
SHOWN_LINE = 4096                              # a longer line is shown in pieces


def follow_lines(path: str, place: List[Any], whole: bool) -> Iterator[str]:
    """Yield the new lines of a growing log, safe to show; what would be too much is left out and named.

    `place` keeps the offset and an unfinished line, which is given at the end if `whole`.  Where a line is
    given in pieces, so much of it is kept back that nothing that is hidden is cut in two.
    """
    keep = hidden_bytes()
    most = SHOWN_LINE + keep
    try:
        with open_file(path) as file:
            size = file.seek(0, os.SEEK_END)
            if size - place[0] > SHOWN_BYTES:
                yield f"({size - place[0] - SHOWN_BYTES} bytes left out)"
                place[:] = [size - SHOWN_BYTES + keep, read_from(file, size - SHOWN_BYTES, keep)]
            file.seek(place[0])
            while place[0] < size:
                raw = file.readline(most - len(place[1]))
                if not raw:
                    break
                place[0] += len(raw)
                place[1] += raw
                if raw.endswith(b"\n") or len(place[1]) >= most:
                    place[1] = without_hidden(place[1])
                    end = len(place[1]) if raw.endswith(b"\n") else max(0, len(place[1]) - keep)
                    line, place[1] = place[1][:end], place[1][end:]
                    if line:
                        yield safe(line.decode("utf-8", "replace").rstrip("\r\n"))
    except OSError:
        return
    if whole and place[1]:
        yield safe(without_hidden(place[1]).decode("utf-8", "replace"))
        place[1] = b""


class Grouped(Lines):
    """Tells of a run a line a change, and shows each attempt's whole log when it has ended."""

    def tail(self, log: Optional[str]) -> None:
        pass                                   # ended() has shown it all

    def ended(self, event: AttemptEnded) -> None:
        log = self.run.tasks[event.task].attempts[-1].log
        if log:
            for line in follow_lines(os.path.join(self.store.path, log), [0, b""], True):
                self.tell(f"    | {line}")
        super().ended(event)


class Prefixed(Lines):
    """Tells of a run a line a change, and shows the lines of tasks as they come, each after its task's id."""

    def begin(self, run: Run, slots: Optional[int]) -> None:
        super().begin(run, slots)
        self.places: Dict[str, List[Any]] = {}

    def started(self, event: AttemptStarted) -> None:
        super().started(event)
        self.places[event.task] = [0, b""]

    def show(self, task: str, whole: bool) -> None:
        """Show what is new in the log of a task."""
        log = self.run.tasks[task].attempts[-1].log
        for line in follow_lines(os.path.join(self.store.path, log or ""), self.places[task], whole):
            self.tell(f"{task} | {line}")

    def refresh(self, now: float) -> Optional[float]:
        for task in self.places:
            self.show(task, False)
        return now + 0.1 if self.places else None

    def tail(self, log: Optional[str]) -> None:
        pass                                   # it was shown as it came

    def ended(self, event: AttemptEnded) -> None:
        if event.task in self.places:
            self.show(event.task, True)
            del self.places[event.task]
        super().ended(event)


def event_row(run: Run, event: Event) -> Dict[str, Any]:
    """Return an event that `run` knows of as it is told: with run, task, and the status that follows."""
    members = event_to_json(event)
    task = members.get("task")
    status = (RUNNING if isinstance(event, (AttemptSpawned, AttemptSubmitted)) else
              run.tasks[task].status if task else run.status)
    return {**without_secrets(members, hidden), "run": run.id, "task": task, "status": status}


class JsonLines(Watcher):
    """Writes each event to stdout as one line of JSON that holds run, task and status."""

    def begin(self, run: Run, slots: Optional[int]) -> None:
        self.run = run

    def observe(self, event: Event) -> None:
        try:
            sys.stdout.write(json.dumps(event_row(self.run, event)) + "\n")
            sys.stdout.flush()
        except OSError:                        # nobody listens: the run goes on all the same
            let_go_of_stdout()


# ============================================================================
# == 37. TERMINAL: how does a run look while it goes on?
# ============================================================================
# The live part of the screen is below what is said for good, and is drawn over itself.  What it costs does
# not grow with the run: an event changes some counts, and a draw looks at what runs, as far as there is room
# for it.  How long the run will still take is told only where earlier runs know.

def _ticks(seconds: float) -> str:
    """Return a duration that goes on: its last digit does not race."""
    return f"{max(0.0, seconds):.1f} s" if seconds < 60 else format_span(seconds)


class Progress:
    """How far a run is, and how long it will still take as earlier runs tell; asking costs little always."""

    _LOOKED_AT = 200                            # running tasks, of which there may be thousands

    def __init__(self, run: Run, slots: Optional[int]) -> None:
        self.run, self.slots = run, slots
        self.ended: Dict[str, int] = {}         # how many tasks ended in each state
        self.retrying: Set[str] = set()
        self.cost: Dict[str, float] = {}        # seconds of tasks and instances, where they are known
        self.known: Dict[str, List[float]] = {} # seconds of instances by their task
        for name, seconds in run.plan.durations.items():
            self.cost[name] = seconds
            if name not in run.plan.tasks:
                self.known.setdefault(name[:name.rindex("[")], []).append(seconds)
        self.behind: Dict[str, float] = {}      # the longest path of work downstream of a task
        for name in reversed(run.plan.order):
            self.behind[name] = max((self.alone(down) + self.behind[down]
                                     for down in run.plan.downstream[name]), default=0.0)
        self.work, self.unknown = 0.0, set()    # type: float, Set[str]
        for name, task_run in run.tasks.items():
            if task_run.status in SETTLED:
                self.ended[task_run.status] = self.ended.get(task_run.status, 0) + 1
            elif name not in run.groups and name not in run.plan.left_out:
                self.owe(name)

    def alone(self, name: str) -> float:
        """Return how long a task of the plan takes by itself, all of its instances at once; 0: unknown."""
        return max(self.known.get(name, [self.cost.get(name, 0.0)]))

    def owe(self, name: str, sign: int = 1) -> None:
        """Count the work of a task or an instance as still to be done, or no more."""
        task, cost = self.run.defs[name], self.cost.get(name)
        if cost is None and name in self.known:
            cost = sum(self.known[name])
        if isinstance(task.action, WaitFor):
            return                              # it takes up no slot
        if cost is not None:
            self.work += sign * cost
        elif sign < 0:
            self.unknown.discard(name)
        elif task.handler != "on_failure":
            self.unknown.add(name)

    def observe(self, event: Event) -> None:
        """Take in an event that the run has taken in."""
        if isinstance(event, AttemptStarted):
            self.retrying.discard(event.task)
        elif isinstance(event, (AttemptEnded, TaskSettled)):
            status = self.run.tasks[event.task].status
            if status == RETRYING:
                self.retrying.add(event.task)
                return
            self.retrying.discard(event.task)
            self.ended[status] = self.ended.get(status, 0) + 1
            if event.task not in self.run.groups:
                self.owe(event.task, -1)
        elif isinstance(event, AttemptDeferred):
            self.retrying.add(event.task)
        elif isinstance(event, TaskExpanded):
            self.owe(event.task, -1)
            known = self.known.pop(event.task, None)
            for name in self.run.groups[event.task]:
                if known:
                    self.cost.setdefault(name, sum(known) / len(known))
                self.owe(name)

    def _path(self, name: str) -> float:
        """Return the longest path of work from a task on, or from an instance of one."""
        own = self.cost.get(name, 0.0) if name in self.run.group_of else self.alone(name)
        return own + self.behind[self.run.group_of.get(name, name)]

    def left(self, now: float) -> Optional[float]:
        """Return how many seconds the run will take at least, were all as it was; None: that is unknown."""
        run, work, longest = self.run, self.work, 0.0
        for name in islice(run.running, self._LOOKED_AT):
            done = min(max(0.0, now - run.tasks[name].attempts[-1].started), self.cost.get(name, 0.0))
            work -= 0 if isinstance(run.defs[name].action, WaitFor) else done
            longest = max(longest, self._path(name) - done)
        for heap in run.queues.ready.values():
            longest = max(longest, self._path(heap[0][1]) if heap else 0.0)
        seconds = max(longest, work / self.slots if self.slots else 0.0)
        return seconds if seconds >= 0.05 and not run.cancel else None


class Above:
    """Stands for a stream to the terminal that a live part is on: whole lines are put above that."""

    def __init__(self, stream: Any, put: Callable[[Any, str], None], lock: Any) -> None:
        self._stream, self._put, self._lock, self._rest = stream, put, lock, ""

    def write(self, text: str) -> int:
        """Write text; what is no whole line yet waits for its end."""
        with self._lock:
            whole, newline, self._rest = (self._rest + text).rpartition("\n")
            if newline:
                self._put(self._stream, whole + newline)
        return len(text)

    def let_go(self) -> Any:
        """Write what waits still, and return the stream."""
        self._stream.write(self._rest)
        return self._stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Live(Lines):
    """Tells of a run on a terminal: what has happened above, and below it a line a running task and a bar.

    What is drawn is drawn over what was there, in one write, so that nothing flickers; at most ten times a
    second, and the lines that come meanwhile are put above the last picture.  What functions print within
    this process goes there, too, from whichever thread.
    """

    def begin(self, run: Run, slots: Optional[int]) -> None:
        import _thread
        self.lock = _thread.RLock()
        self.lines: List[str] = []              # the live part as it is on the screen
        self.widths: List[int] = []             # of each of these lines
        self.next_draw = 0.0
        self.progress = Progress(run, slots)
        self.stream, self.glyphs = sys.stderr, glyphs_for(sys.stderr)
        super().begin(run, slots)
        self.small = len(run.tasks) <= 50
        if any(isinstance(task.action, Function) for task in run.plan.flow.tasks):
            for name in ("stdout", "stderr"):
                if getattr(sys, name).isatty():
                    setattr(sys, name, Above(getattr(sys, name), self.put, self.lock))

    def observe(self, event: Event) -> None:
        self.progress.observe(event)
        if self.small or not isinstance(event, (AttemptStarted, AttemptSpawned, AttemptEnded)) or (
                isinstance(event, AttemptEnded) and event.status != SUCCESS):
            super().observe(event)             # of many tasks only what is unusual is told

    def line(self, word: str, task: str, rest: str = "") -> None:
        if self.small or word not in (SUCCESS, CACHED, SKIPPED, UPSTREAM_FAILED, CANCELLED):
            super().line(word, task, rest)

    def started(self, event: AttemptStarted) -> None:
        pass                                   # the live part shows it

    def tell(self, text: str) -> None:
        self.put(self.stream, masked(text, hidden) + "\n")

    def put(self, stream: Any, text: str) -> None:
        """Write whole lines to a stream, and the live part below them once more."""
        with self.lock:
            before = self.home() + "\x1b[J" * bool(self.lines)
            after = "".join(line + "\n" for line in self.lines)
            if stream is self.stream:
                self.write(before + text + after)
            else:
                self.write(before)
                stream.write(text)
                stream.flush()
                self.write(after)

    def home(self) -> str:
        """Return what takes the cursor to the begin of the live part.

        A terminal that was made narrower since has broken its lines, as all that can show them again do.
        """
        columns = self.size()[0]
        rows = sum(max(1, -(-width // columns)) for width in self.widths)
        return f"\x1b[{rows}F" if rows else ""

    def size(self) -> Tuple[int, int]:
        """Return how many columns and rows the terminal has now."""
        try:
            columns, rows = os.get_terminal_size(2)
        except OSError:                        # the terminal has been closed
            columns, rows = 0, 0
        return columns or 80, rows or 24

    def write(self, text: str) -> None:
        """Write to the terminal as it is."""
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):
            pass

    def refresh(self, now: float) -> Optional[float]:
        if now >= self.next_draw or self.next_draw > now + 1:           # or the clock was put back
            picture = self.picture(now, *self.size())
            with self.lock:
                home = self.home()
                self.lines = ["".join(self.paint(status, text) if status and text else text
                                      for status, text in parts) for parts in picture]
                self.widths = [sum(width_of(text) for _, text in parts) for parts in picture]
                self.write(home + "".join(f"{line}\x1b[K\n" for line in self.lines) + "\x1b[J")
            self.next_draw = now + 0.1
        return self.next_draw

    def picture(self, now: float, columns: int, rows: int) -> List[List[Tuple[str, str]]]:
        """Return the lines of the live part, each in pieces of one colour: a state or nothing, and a text."""
        run, room = self.run, max(0, min(rows - 4, 12))
        lines = [self._task_line(name, now, columns) for name in islice(run.running, room)]
        if len(run.running) > room:
            lines.append([("", clip(f"  and {len(run.running) - room} more", columns - 1, self.glyphs.cut))])
        return [*lines, self._bar(now, columns)]

    def _task_line(self, name: str, now: float, columns: int) -> List[Tuple[str, str]]:
        """Return the line of a running task."""
        task_run, usual = self.run.tasks[name], self.progress.cost.get(name)
        word = f"{_ticks(now - task_run.attempts[-1].started)}"
        word += f" of about {_ticks(usual)}" if usual and usual >= 1 else ""
        word += f", attempt {task_run.attempt}" if task_run.attempt > 1 else ""
        word += f", stopping: {one_line(task_run.stopping)}" if task_run.stopping else ""
        mark = self.glyphs.marks[RETRYING if task_run.stopping else RUNNING]
        shown_name = clip(masked(safe(name), hidden), max(8, columns - 24), self.glyphs.cut)
        rest = clip(f"{shown_name}  {masked(word, hidden)}", max(1, columns - 5), self.glyphs.cut)
        return [("", "  "), (RUNNING, mark), ("", " " + rest)] if columns > 8 else [("", rest)]

    def _bar(self, now: float, columns: int) -> List[Tuple[str, str]]:
        """Return the bar with its counts; where there is little room, what matters least is left out."""
        run, progress = self.run, self.progress
        total, done = len(run.tasks), len(run.tasks) - run.unsettled
        left, at_least = progress.left(now), "at least" if progress.unknown else "about"
        parts = [(0, "", f"{done}/{total} done"), (2, RUNNING, f"{len(run.running)} running"),
                 (3, RETRYING, f"{len(progress.retrying)} retrying" if progress.retrying else "")]
        parts += [(1 if state == FAILED else 6, state, f"{progress.ended[state]} {state}")
                  for state in TASK_STATES if progress.ended.get(state)]
        parts += [(4, "", _ticks(now - run.started)),
                  (5, "", "" if left is None else f"{at_least} {_ticks(left)} left")]
        parts = [part for part in parts if part[2]]
        width = max(5, min(30, columns - 60))
        while len(parts) > 1 and width + 3 + sum(len(text) + 2 for _, _, text in parts) > columns:
            parts.remove(max(parts))
        filled = width * done // total
        pieces = [(SUCCESS, self.glyphs.bar * filled), ("", self.glyphs.rest * (width - filled) + "  ")]
        for n, (_, status, text) in enumerate(parts):
            pieces += [("", ", " if n else ""), (status, text)]
        wide = sum(len(text) for _, text in pieces)
        return pieces if wide < columns else [("", clip(parts[0][2], columns - 1, self.glyphs.cut))]

    def end(self, run: Run) -> None:
        with self.lock:
            self.write(self.home() + "\x1b[J" * bool(self.lines))
            self.lines, self.widths = [], []
        for name in ("stdout", "stderr"):
            if isinstance(getattr(sys, name), Above):
                setattr(sys, name, getattr(sys, name).let_go())
        super().end(run)


OUTPUTS: Dict[str, Callable[[Store, bool], Watcher]] = {
    "progress": Lines, "prefix": Prefixed, "group": Grouped, "quiet": Quiet,
    "json": lambda store, colour: JsonLines()}


def make_watcher(style: str, store: Store) -> Watcher:
    """Return the Watcher for a --output; progress is live on a terminal that can do it."""
    terminal = sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    colour = terminal and not os.environ.get("NO_COLOR")
    if style == "progress" and terminal:
        return Live(store, colour)
    return OUTPUTS[style](store, colour)


# ============================================================================
# == 38. SUMMARIES: how is it told what a run did, or would do?
# ============================================================================

def critical_path(run: Run) -> List[str]:
    """Return the tasks that decided the run's end: from its last, back over whichever upstream ended last.

    Tasks that ended without an attempt are not among them, but what those waited for is.
    """
    def finished(name: str) -> float:
        return run.tasks[name].finished or 0

    ran = {name for name in run.plan.order if run.tasks[name].attempts or run.groups.get(name)}
    path: List[str] = []
    last: Sequence[str] = sorted(ran)
    while last:
        path.append(max(last, key=finished))
        last = [up for up in run.defs[path[-1]].depends_on if up not in run.plan.left_out]
    return [name for name in reversed(path) if name in ran]


def _gantt_rows(run: Run, most: int) -> Tuple[List[str], int]:
    """Return the tasks of a run that had attempts, in the order they began, and how many are left out.

    Of many those stay that were on the critical path or took longest.
    """
    ran = [name for name in run.tasks if run.tasks[name].attempts]
    if len(ran) > most:
        path = set(critical_path(run))
        ran = heapq.nsmallest(most, ran, key=lambda name: (name not in path, -(span(
            run.tasks[name].started, run.tasks[name].finished) or 0)))
    left_out = sum(bool(task_run.attempts) for task_run in run.tasks.values()) - len(ran)
    return sorted(ran, key=lambda name: run.tasks[name].attempts[0].started), left_out


def format_gantt(run: Run, glyphs: Glyphs, width: int = 80, most: int = 40) -> str:
    """Return a Gantt chart of a run that has ended: a line a task; failed attempts look otherwise."""
    names, left_out = _gantt_rows(run, most)
    path = set(critical_path(run))
    begin = min((run.tasks[name].attempts[0].started for name in names), default=run.started)
    whole = max(1e-6, (run.finished or begin) - begin)
    label = min(max(map(len, names), default=0), 28) + 2
    room = max(10, width - label - 12)
    lines = []
    for name in names:
        task_run, cells = run.tasks[name], [" "] * room
        for attempt in task_run.attempts:
            ends = attempt.finished if attempt.finished is not None else run.finished or begin
            first = min(room - 1, int((attempt.started - begin) / whole * room))
            last = max(first + 1, min(room, round((ends - begin) / whole * room)))
            filled = [n for n, cell in enumerate(cells) if cell != " "]
            for n in range(filled[-1] + 1, first) if filled else ():
                cells[n] = glyphs.rest
            cells[first:last] = [glyphs.bar if attempt.status == SUCCESS else glyphs.failed] * (last - first)
        head = clip(safe(name), label - 2, glyphs.cut) + (" *" if name in path else "")
        took = format_span(span(task_run.started, task_run.finished))
        lines.append(f"{padded(head, label)} {''.join(cells)} {took:>9}")
    if left_out:
        lines.append(f"and {left_out} tasks that took less time")
    return "\n".join(lines)


class Forecasts(NamedTuple):
    """What a flow was simulated with, and the runs that came of it, each with how many attempts at once."""

    flow: str
    known: int                                 # tasks whose durations earlier runs tell
    assumed: Mapping[str, str]
    runs: Sequence[Tuple[Optional[int], Run]]


def busy_seconds(run: Run) -> float:
    """Return how long all attempts of a run that take up a slot took together."""
    return sum(span(attempt.started, attempt.finished) or 0.0
               for name, task_run in run.tasks.items() if WAITING not in run.queues.limits_of(name)
               for attempt in task_run.attempts)


def forecasts_to_json(made: Forecasts) -> Dict[str, Any]:
    """Return simulated runs as JSON; times are seconds from the begin of the run."""
    def task_members(task_run: TaskRun) -> Dict[str, Any]:
        members = {"status": task_run.status, "reason": task_run.reason, "started_s": task_run.started,
                   "finished_s": task_run.finished}
        return {**members, "attempts": [
            {"status": attempt.status, "reason": attempt.reason, "started_s": attempt.started,
             "finished_s": attempt.finished} for attempt in task_run.attempts]}

    return {"flow": made.flow, "assumed": dict(made.assumed), "runs": [
        {"jobs": slots, "status": run.status, "reason": run.reason, "makespan_s": run.finished,
         "busy_s": round(busy_seconds(run), 6), "critical_path": critical_path(run),
         "tasks": {name: task_members(task_run) for name, task_run in run.tasks.items()}}
        for slots, run in made.runs]}


def _unusual_ends(run: Run) -> Iterator[str]:
    """Yield a line for each state other than success that tasks ended in, with the first of them."""
    for state in (FAILED, UPSTREAM_FAILED, SKIPPED, CANCELLED):
        names = [name for name in run.tasks if run.tasks[name].status == state]
        if names:
            told = [name + (f" ({len(run.tasks[name].attempts)} attempts)"
                            if len(run.tasks[name].attempts) > 1 else "") for name in names[:20]]
            yield f"{state}: {', '.join(told)}" + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def format_forecasts(made: Forecasts, glyphs: Glyphs, width: int = 80) -> str:
    """Return simulated runs as text: how long each took, and each as a Gantt chart."""
    tasks = len(made.runs[0][1].plan.order)
    lines = [f"{one_line(made.flow)}: {tasks} tasks, {made.known} of them with durations of earlier runs"]
    told: Dict[str, List[str]] = {}
    for name, text in made.assumed.items():
        told.setdefault(text, []).append(name)
    lines += [wrapped(f"assumed: {text}: {', '.join(names[:20])}"
                      + (f" and {len(names) - 20} more" if len(names) > 20 else ""), width, "   ")
              for text, names in told.items()]
    if len(made.runs) > 1:
        rows = [("at once", "takes", "busy", "status")]
        for slots, run in made.runs:
            share = busy_seconds(run) / ((slots or 1) * (run.finished or 1))
            rows.append((str(slots or "all"), format_span(run.finished), f"{share:.0%}" if slots else "-",
                         run.status))
        lines += ["", format_table(rows)]
    for slots, run in made.runs:
        reason = f" ({one_line(run.reason)})" if run.reason else ""
        head = f"{slots or 'all'} at once: {run.status}{reason} after {format_span(run.finished)}: "
        lines += ["", wrapped(head + count_states(run), width, "   "),
                  *(wrapped(line, width, "   ") for line in _unusual_ends(run)),
                  format_gantt(run, glyphs, width),
                  wrapped("critical path (*): " + " -> ".join(critical_path(run)), width, "   ")]
    return "\n".join(lines)


def _shown_tasks(run: Run) -> Iterator[Tuple[str, TaskRun]]:
    """Yield the tasks of a run in the order in which the flow has them, each followed by its instances."""
    for task in run.plan.flow.tasks:
        for name in (task.id, *run.groups.get(task.id, ())):
            yield name, run.tasks[name]


def _process_word(task_run: TaskRun) -> str:
    """Return how the process of a task's latest attempt came to be; functions may have none of their own."""
    last = task_run.attempts[-1] if task_run.attempts else None
    if last and last.job is not None:
        return f"job {last.job}"
    return "-" if not last or last.pid is None else "forked" if last.forked else "started"


def format_param(param: Param) -> str:
    """Return what may be given for a param, and what it is for."""
    schema = param_schema(param)
    words = [describe_schema(schema)] if schema else []
    return ": ".join(words + ([param.description] if param.description else []))


def format_run(loaded: Loaded, store: Store) -> str:
    """Return what `show` tells of a run."""
    run = loaded.run
    lines = [f"run {run.id} of flow {safe(run.flow)}: {loaded.status}"
             + (f" ({safe(run.reason)})" if run.reason else ""),
             f"started {format_time(run.started)}, took {format_span(span(run.started, run.finished))}"]
    if run.parent:
        lines.append(f"part of run {run.parent['run']}, task {run.parent['task']}")
    declared = run.plan.flow.params or {}
    if run.params:
        lines += ["", format_table([("param", "value", "takes")] + [
            (name, shown(value), format_param(declared.get(name, Param())))
            for name, value in run.params.items()])]
    rows = [("task", "status", "attempts", "duration", "process", "reason")]
    rows += [(name, loaded.status_of(task_run), str(len(task_run.attempts)),
              format_span(span(task_run.started, task_run.finished)), _process_word(task_run),
              task_run.reason or "")
             for name, task_run in _shown_tasks(run)]
    lines += ["", format_table(rows), ""]
    path = critical_path(run)
    if path:
        lines.append("critical path: " + " -> ".join(path))
    if any(attempt.log for task_run in run.tasks.values() for attempt in task_run.attempts):
        lines.append("logs: " + short_path(store.files(run.id).logs))
    return "\n".join(lines)


def format_plan(plan: Plan, slots: int) -> str:
    """Return what a run would do, in the order of the plan."""
    rows = [("", "task", "does", "after", "with")]
    for n, name in enumerate(plan.order, 1):
        task = plan.tasks[name]
        extra = [f"{word} {value}" for word, value, usual in (
            ("retries", task.retry.max_retries, 0), ("timeout_s", task.timeout_s, None),
            ("trigger_rule", task.trigger_rule, "all_success"), ("executor", task.executor, None),
            ("if", task.condition, None)) if value != usual]
        extra += [task.many] if task.many else []
        after = "all" if task.handler else ", ".join(task.depends_on) or "-"
        rows.append((str(n), name, describe_action(task), after,
                     "left out" if name in plan.left_out else ", ".join(extra)))
    return f"{len(plan.order)} tasks, {slots} at once\n{format_table(rows)}"


# ============================================================================
# == 39. REPORT: how does a run become one page that stands for itself?
# ============================================================================
# The page is one file without any address outside itself.  All that came from a flow, a task or a log is
# escaped where it is put in, as text; a Content-Security-Policy lets the two constants below run and show,
# known by their hashes, and nothing else, should anything ever slip through.  Without scripts the page still
# says everything: the script sorts and filters, and opens what is folded before the page is printed.
#
# However large a run is, the page stays one that a browser opens: there are bounds for what is drawn, for
# tasks told in detail, for lines of logs and for the length of values.  What is left out is named.

REPORT_STYLE = r"""
*{box-sizing:border-box}
body{margin:0 auto;padding:1.2rem;max-width:82rem;background:var(--back);color:var(--fore);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:1.5rem;margin:0 0 .3rem;overflow-wrap:anywhere}h2{font-size:1.1rem;margin:2rem 0 .6rem}
p{margin:.3rem 0}a{color:var(--busy)}.soft{color:var(--soft)}
code,pre,td,.name{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
font-size:13px}
.state{color:var(--state);font-weight:600;white-space:nowrap}
.state::before{content:"";display:inline-block;width:.6em;height:.6em;border-radius:50%;margin-right:.45em;
background:var(--state)}
.facts{display:flex;flex-wrap:wrap;gap:.2rem 2rem;margin:.8rem 0}
.facts dt{color:var(--soft);font-size:.8rem}.facts dd{margin:0;overflow-wrap:anywhere}
.scroll{overflow:auto;max-height:80vh;border:1px solid var(--line);border-radius:8px}
.scroll svg{display:block;margin:6px}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:.28rem .7rem;border-bottom:1px solid var(--line);vertical-align:top}
tbody tr:last-child td{border-bottom:0}
thead th{position:sticky;top:0;background:var(--face);font-size:.8rem;color:var(--soft);white-space:nowrap}
th button{all:unset;cursor:pointer}th button:focus-visible{outline:2px solid var(--busy)}
th[aria-sort=ascending] button::after{content:" \25b2"}
th[aria-sort=descending] button::after{content:" \25bc"}
td{white-space:nowrap}td.long{white-space:normal;min-width:14rem;overflow-wrap:anywhere}
.number{text-align:right}
.bars{display:grid;grid-template-columns:fit-content(14rem) minmax(4rem,1fr) auto;gap:2px .8rem;
align-items:center;font-size:13px}
.bars .name{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.bars svg{width:100%;height:16px;background:var(--face);border-radius:3px;display:block}
.bars rect{fill:var(--state)}.bars .wait{fill:none;stroke:var(--idle);stroke-dasharray:2 3}
.bars .on{font-weight:700}.bars .on::before{content:"\2605\a0"}
.ticks{display:flex;justify-content:space-between;color:var(--soft);font-size:12px}
details{border:1px solid var(--line);border-radius:8px;margin:.4rem 0;padding:.4rem .8rem}
.why{color:var(--state)}details .name{white-space:pre-wrap}
summary{cursor:pointer;overflow-wrap:anywhere}summary .state{margin-left:.6rem}
details td.long{min-width:0}details p{font-size:.9rem}
details:target{border-color:var(--busy)}
pre{background:var(--face);border-radius:6px;padding:.6rem .8rem;margin:.4rem 0;overflow-x:auto;
white-space:pre-wrap;overflow-wrap:anywhere}
input{font:inherit;color:inherit;background:var(--face);border:1px solid var(--line);border-radius:6px;
padding:.25rem .6rem;margin-bottom:.5rem;width:min(22rem,100%)}
@media (max-width:30rem){body{padding:.7rem}
.bars{grid-template-columns:6rem minmax(4rem,1fr) auto;gap:2px .4rem}}
@media print{body{max-width:none;padding:0}.scroll{overflow:visible;max-height:none;border:0}
.screen{display:none}
.scroll svg{max-width:100%;height:auto}details,.bars>*{break-inside:avoid}thead th{position:static}}
"""

REPORT_SCRIPT = r"""
"use strict";
const body = document.querySelector("#tasks tbody"), filter = document.querySelector("#filter");
const heads = [...document.querySelectorAll("#tasks th")];
const key = (row, n) => { const cell = row.cells[n]; return cell.dataset.v ?? cell.textContent; };
heads.forEach((head, n) => head.firstElementChild.addEventListener("click", () => {
  const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1, rows = [...body.rows];
  const numbers = head.classList.contains("number");
  const order = numbers ? (a, b) => a - b : (a, b) => a < b ? -1 : a > b ? 1 : 0;
  rows.sort((a, b) => sign * order(key(a, n), key(b, n)));
  heads.forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  body.append(...rows);
}));
filter.hidden = false;
filter.addEventListener("input", () => {
  const wanted = filter.value.toLowerCase();
  for (const row of body.rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
});
const open = one => { if (one) one.open = true; };
const unfold = () => open(document.querySelector("details:target"));
addEventListener("hashchange", unfold);
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(open));
unfold();
"""

#: Of what there may be much, so much is shown.
REPORT_GRAPH, REPORT_BARS, REPORT_ROWS, REPORT_DETAILS = 2000, 300, 10_000, 200
REPORT_VALUE = 2000                            # characters of a value, a line of a log, an error
REPORT_ATTEMPTS = 20                           # of one task, the latest


def _element(tag: str, text: Any, classes: str = "") -> str:
    """Return an HTML element that holds a text."""
    return f"<{tag}{f' class={chr(34)}{classes}{chr(34)}' if classes else ''}>{html_text(text)}</{tag}>"


def _soft(text: str) -> str:
    """Return a paragraph of what matters less."""
    return _element("p", text, "soft")


def _bounded_text(text: str) -> str:
    """Return a text for a page, of which much is left out if it is long."""
    left_out = len(text) - REPORT_VALUE
    return text if left_out <= 0 else f"{text[:REPORT_VALUE]}… ({left_out} characters more)"


def _json_text(value: Any) -> str:
    """Return a value as JSON that is good to read, of bounded length."""
    pieces, size = [], 0
    for piece in json.JSONEncoder(indent=1, ensure_ascii=False).iterencode(value):
        pieces.append(piece)
        size += len(piece)
        if size > 2 * REPORT_VALUE:
            return "".join(pieces)[:REPORT_VALUE] + "… (and more)"
    return _bounded_text("".join(pieces))


def _action_text(task: Task) -> str:
    """Return what a task does; of a command the whole, and not just its begin."""
    action = task.action
    if not isinstance(action, Command):
        return one_line(describe_action(task))
    return "command " + (action.command if isinstance(action.command, str) else
                         json.dumps(action.command, ensure_ascii=False))


def _latest_attempts(task_run: TaskRun) -> List[Tuple[int, Attempt]]:
    """Return the attempts of a task that are shown, with their numbers."""
    return list(enumerate(task_run.attempts, 1))[-REPORT_ATTEMPTS:]


_NUMBERS = ("attempts", "duration", "start")    # columns of the table of tasks


class Report:
    """One run as a page; each method returns a part of it as HTML."""

    def __init__(self, loaded: Loaded, store: Store, now: float) -> None:
        self.loaded, self.run, self.live, self.status = loaded, loaded.run, loaded.live, loaded.status
        self.store = store
        self.now = now if loaded.live else None
        self.looks = looks_of(self.run, self.live)
        self.path = dict.fromkeys(critical_path(self.run))
        self.told = self._told()

    def status_of(self, name: str) -> str:
        """Return the state of a task or an instance, as a person is to see it."""
        return self.loaded.status_of(self.run.tasks[name])

    def end_of(self, task_run: TaskRun, attempt: Attempt) -> str:
        """Return the state of an attempt of a task, as a person is to see it."""
        return self.loaded.status_of(task_run) if attempt.status == RUNNING else attempt.status

    def _told(self) -> Dict[str, str]:
        """Return the tasks told in detail with their ids on the page: failures first, then those retried."""
        tasks = [name for name, _ in _shown_tasks(self.run)]

        def matters(name: str) -> int:
            status, on_path = self.status_of(name), name in self.path
            return (0 if status == FAILED else 1 if status in (RUNNING, RETRYING, INTERRUPTED) else
                    2 if len(self.run.tasks[name].attempts) > 1 else 3 if on_path else 4)

        first = set(sorted(tasks, key=matters)[:REPORT_DETAILS])
        return {name: f"d{n}" for n, name in enumerate(tasks) if name in first}

    def head(self) -> str:
        """Return what the run was, and how it ended."""
        run = self.run
        took = span(run.started, run.finished if run.finished is not None else self.now)
        started = (format_time(run.started) or "")[:19].replace("T", " ")
        facts: List[Tuple[str, Any]] = [("run", run.id), ("started", f"{started} UTC"),
                                        ("duration", format_span(took)),
                                        ("tasks", format_counts(map(self.status_of, run.tasks)))]
        facts += [("reason", run.reason)] if run.reason else []
        facts += [("version", run.plan.flow.version)] if run.plan.flow.version else []
        facts += [("tolerated failures", run.warnings)] if run.warnings else []
        facts += [("part of", f"run {run.parent['run']}, task {run.parent['task']}")] if run.parent else []
        told = "".join(f"<div>{_element('dt', name)}{_element('dd', value)}</div>" for name, value in facts)
        about = _element("p", run.plan.flow.description, "soft") if run.plan.flow.description else ""
        return (f"<header><h1>{html_text(one_line(run.flow))} <span class=\"state {self.status}\">"
                f"{self.status}</span></h1>{about}<dl class=facts>{told}</dl></header>\n")

    def graph(self) -> str:
        """Return the picture of the flow, with the states of the tasks."""
        tasks = len(self.run.plan.order)
        if tasks > REPORT_GRAPH:
            return _soft(f"{tasks} tasks are too many for a picture; at most {REPORT_GRAPH} are drawn.")
        links = {name: f"#{self.told[name]}" for name in self.run.plan.order if name in self.told}
        return f"<div class=scroll tabindex=0>{to_svg(self.run.plan, self.looks, False, links)}</div>\n"

    def _bar(self, name: str, begin: float, whole: float) -> str:
        """Return a line of the Gantt chart: a rectangle an attempt, in thousandths of the whole."""
        parts, before = [], None               # type: List[str], Optional[float]
        for n, attempt in _latest_attempts(self.run.tasks[name]):
            ends = attempt.finished if attempt.finished is not None else self.now or self.run.finished
            left = min(998.0, (attempt.started - begin) / whole * 1000)
            wide = max(2.0, ((ends or attempt.started) - attempt.started) / whole * 1000)
            if before is not None and left > before:
                parts.append(f'<path class="wait" d="M{before:.1f} 8H{left:.1f}"/>')
            status = self.end_of(self.run.tasks[name], attempt)
            title = f"{name}, attempt {n}: {status}{': ' if attempt.reason else ''}{attempt.reason or ''}"
            parts.append(f'<rect class="{status}" x="{left:.1f}" y="2" width="{wide:.1f}" height="12">'
                         f"<title>{html_text(one_line(title))}</title></rect>")
            before = left + wide
        on_path = " on" if name in self.path else ""
        took = format_span(span(self.run.tasks[name].started, self.run.tasks[name].finished))
        return (f'<div class="name{on_path}" title="{html_text(name)}">{html_text(name)}</div>'
                f'<svg viewBox="0 0 1000 16" preserveAspectRatio="none">{"".join(parts)}</svg>'
                f"{_element('div', took, 'number soft')}\n")

    def gantt(self) -> str:
        """Return the Gantt chart."""
        run = self.run
        names, left_out = _gantt_rows(run, REPORT_BARS)
        if not names:
            return _soft("No attempt has begun.")
        begin = min(run.tasks[name].attempts[0].started for name in names)
        end = max(at for name in names for attempt in run.tasks[name].attempts
                  for at in (attempt.started, attempt.finished or self.now) if at is not None)
        whole = max(1e-3, end - begin)
        ticks = "".join(_element("span", format_span(whole * n / 4) if n else "0") for n in range(5))
        rows = "".join(self._bar(name, begin, whole) for name in names)
        more = _soft(f"{left_out} tasks that took less time are left out.") if left_out else ""
        path = _element("p", "★ critical path: " + _bounded_text(" → ".join(self.path)), "soft name")
        return (f"<div class=bars>{rows}<span></span><div class=ticks>{ticks}</div><span></span></div>"
                f"{more}{path}\n")

    def _row(self, name: str, task_run: TaskRun) -> str:
        """Return a row of the table of tasks."""
        started = span(self.run.started, task_run.started)
        took = span(task_run.started, task_run.finished)
        label = html_text(name)
        if name in self.told:
            label = f'<a href="#{self.told[name]}">{label}</a>'
        cells = ((len(task_run.attempts), str(len(task_run.attempts))), (took, format_span(took)),
                 (started, "-" if started is None else f"+{format_span(started)}"))
        numbers = "".join(f'<td class=number data-v="{-1 if value is None else value}">{text}</td>'
                          for value, text in cells)
        status = self.status_of(name)
        reason = _bounded_text(one_line(task_run.reason or ""))[:300]
        return (f'<tr><td>{label}</td><td class="state {status}">{status}</td>{numbers}'
                f"<td class=long>{html_text(reason)}</td></tr>\n")

    def table(self) -> str:
        """Return the table of tasks."""
        tasks = list(islice(_shown_tasks(self.run), REPORT_ROWS))
        left_out = len(self.run.tasks) - len(tasks)
        heads = "".join(f"<th{' class=number' if title in _NUMBERS else ''}><button>{title}</button></th>"
                        for title in ("task", "state", *_NUMBERS, "reason"))
        more = f"{left_out} tasks more are left out; miniflow show {self.run.id} has them."
        rows = "".join(self._row(*task) for task in tasks)
        return ('<input id=filter class=screen type=search placeholder="filter tasks" '
                'aria-label="filter tasks" hidden><div class=scroll tabindex=0><table id=tasks><thead>'
                f"<tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
                f"{_soft(more) * (left_out > 0)}\n")

    def _attempts(self, task_run: TaskRun) -> str:
        """Return the attempts of a task with their reasons, and the last lines of the latest one's log."""
        rows = "".join(
            f'<tr><td class=number>{n}</td><td class="state {self.end_of(task_run, attempt)}">'
            f'{self.end_of(task_run, attempt)}</td>'
            f"<td class=number>{format_span(span(attempt.started, attempt.finished))}</td>"
            f"<td class=long>{html_text(_bounded_text(one_line(attempt.reason or '')))}</td></tr>"
            for n, attempt in _latest_attempts(task_run))
        parts = [f"<div class=scroll><table><tbody>{rows}</tbody></table></div>" if rows else ""]
        last = task_run.attempts[-1] if task_run.attempts else None
        if last and last.log:
            lines, before = log_tail(os.path.join(self.store.path, last.log))
            text = "\n".join(_bounded_text(line) for line in lines)
            where = f"{last.log}, after {before} bytes" if before else last.log
            parts += [_element("p", where, "soft name"), _element("pre", text or "(empty)")]
        return "".join(parts)

    def detail(self, name: str, place: str) -> str:
        """Return all about one task, folded unless it failed."""
        run, task_run, task = self.run, self.run.tasks[name], self.run.defs[name]
        status = self.status_of(name)
        does = ", ".join([_action_text(task), *marks_of(task)])
        after = "" if task.handler else ", ".join(task.depends_on[:50])
        parts = [_element(tag, text, classes) for tag, text, classes in (
            ("p", task.description, "soft"), ("p", _bounded_text(does), "name"),
            ("p", after and f"after {after}", "soft name"),
            ("p", _bounded_text(task_run.reason or ""), f"why {status}"),
            ("pre", _json_text(task_run.each) if task_run.each else "", "")) if text]
        parts.append(self._attempts(task_run))
        parts += [_element("pre", _bounded_text(task_run.error))] if task_run.error else []
        parts += [_soft("output"), _element("pre", _json_text(task_run.output))] if task_run.output else []
        is_open = " open" if name == run.first_failure else ""
        return (f'<details id="{place}"{is_open}><summary><span class=name>{html_text(name)}</span>'
                f'<span class="state {status}">{status}</span></summary>{"".join(parts)}</details>\n')

    def details(self) -> str:
        """Return the tasks that are told in detail."""
        left_out = len(self.run.tasks) - len(self.told)
        more = f"{left_out} tasks more are in the table alone; failures and retries come first."
        told = "".join(self.detail(name, place) for name, place in self.told.items())
        return _soft(more) * (left_out > 0) + told

    def values(self) -> str:
        """Return the params, and what the run came to."""
        parts = []
        for title, value in (("Params", self.run.params), ("Context at the end", self.run.ctx)):
            if value:
                parts.append(f"<h2>{title}</h2>{_element('pre', _json_text(value))}")
        return "".join(parts) + "\n"


def to_report(loaded: Loaded, store: Store, now: float) -> str:
    """Return a page that tells all about a run, in one file; `now` is for one that still runs."""
    import base64
    import hashlib
    report = Report(loaded, store, now)
    style, hashes = STATE_STYLE + GRAPH_STYLE + REPORT_STYLE, []
    for text in (style, REPORT_SCRIPT):
        hashes.append("sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode())
    policy = (f"default-src 'none'; style-src '{hashes[0]}'; script-src '{hashes[1]}'; img-src data:; "
              "base-uri 'none'; form-action 'none'")
    body = "".join([
        report.head(), "<main>\n<h2>Graph</h2>", report.graph(), "<h2>Gantt chart</h2>", report.gantt(),
        "<h2>Tasks</h2>", report.table(), "<h2>Task by task</h2>", report.details(), report.values(),
        f"</main>\n<footer class=soft>MiniFlow {__version__}</footer>\n"])
    title = html_text(one_line(f"{loaded.run.flow}: {loaded.status}"))
    secrets = sorted({form for text in hidden for form in (text, html_text(text))}, key=len, reverse=True)
    body, title = masked(body, secrets), masked(title, secrets)
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<link rel="icon" href="data:,">\n'
            f"<title>{title}</title>\n<style>{style}</style></head>\n<body>\n{body}"
            f"<script>{REPORT_SCRIPT}</script>\n</body></html>\n")


# ============================================================================
# == 40. LIBRARY: what does a Python program use?
# ============================================================================
# A flow is known by the stem of its file, so looking one up reads one file and lists no directory.  Scripts
# are checked when a flow is loaded: a run whose last script is missing should not find out after three hours.

if TYPE_CHECKING:
    Aged = Tuple[str, str, float]               # what it belongs to, its name, and when it was made


def removable(newest_first: Iterable[Aged], keep: Optional[int], before: Optional[float]) -> List[Aged]:
    """Return those that are beyond the newest `keep` of their kind and were made before `before`."""
    seen: Dict[str, int] = {}
    found = []
    for kind, name, at in newest_first:
        seen[kind] = seen.get(kind, 0) + 1
        if (keep is None or seen[kind] > keep) and (before is None or at < before):
            found.append((kind, name, at))
    return found


def aged_runs(store: Store) -> Tuple[List[Aged], Dict[str, List[str]]]:
    """Return the runs that may be removed, newest first, and by run the runs that go with it.

    The run of a flow within a flow goes with the one that it is a part of, which may need it to go on.
    """
    heads = store.history()
    there, parts = {head["id"] for head in heads}, {}          # type: Set[str], Dict[str, List[str]]
    for head in heads:
        parent = (head.get("parent") or {}).get("run")
        if parent in there:
            parts.setdefault(parent, []).append(head["id"])
    within = set(chain.from_iterable(parts.values()))
    return [(str(head["flow"]), head["id"], parse_time(head["started"]) or 0) for head in heads
            if head["status"] not in (RUNNING, "damaged") and head["id"] not in within], parts


def with_parts(run_id: str, parts: Mapping[str, Sequence[str]]) -> List[str]:
    """Return a run and all that go with it, itself last."""
    return [*(name for part in parts.get(run_id, ()) for name in with_parts(part, parts)), run_id]


def _aged_scripts(store: Store) -> List[Aged]:
    """Return the generated scripts, newest first."""
    try:
        with os.scandir(os.path.join(store.path, "scripts")) as entries:
            found = [(entry.name, entry.stat(follow_symlinks=False).st_mtime) for entry in entries
                     if entry.name.endswith(".sh")]
    except FileNotFoundError:
        return []
    except OSError as exc:
        raise StateError(f"{exc.filename}: can't be read: {exc.strerror}") from None
    return sorted(((re.sub(r"-\d{8}T\d{6}Z(-\d+)?\.sh$", "", name), name, at) for name, at in found),
                  key=lambda aged: (-aged[2], aged[1]))


class StateStore:
    """Where runs of Python flows are kept.  A run is a dict with the keys of RUN.json."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def list_runs(self, status: Optional[str] = None) -> List[Dict[str, Any]]:
        """Return all runs, newest first; with `status` those that have it."""
        if status is not None and status not in RUN_STATES:
            raise UsageError(f"status: expected one of {', '.join(RUN_STATES)}, got {shown(status)}")
        heads = [head for head in self.store.history() if head["status"] != "damaged"]
        runs = [self.get_run(head["id"]) for head in heads if status in (None, head["status"])]
        return [run for run in runs if run]

    def get_run(self, run_id: str) -> Optional[Dict[str, Any]]:
        """Return a run, or None if there is none of that id; raise StateError if its state can't be read."""
        try:
            check_run_id(run_id)
            loaded = self.store.load(run_id)
        except (NotFound, UsageError):
            return None
        return {**run_to_json(loaded.run, loaded.engine), "status": loaded.status}

    def get_task(self, run_id: str, name: str) -> Optional[Dict[str, Any]]:
        """Return one task of a run, or None if there is no such task or run."""
        task: Optional[Dict[str, Any]] = (self.get_run(run_id) or {"tasks": {}})["tasks"].get(name)
        return task

    def delete_run(self, run_id: str) -> bool:
        """Remove a run with its logs; return whether there was one, raise RunLocked if it goes on."""
        try:
            check_run_id(run_id)
            there = self.store.exists(run_id)
        except UsageError:
            return False
        if there:
            self.store.remove(run_id)
        return there

    def cleanup_old_runs(self, days: float = 30) -> int:
        """Remove the runs that began more than `days` days ago, but none that goes on; return how many."""
        runs, parts = aged_runs(self.store)
        old = removable(runs, None, time.time() - days * 86400)
        return sum(self.delete_run(name) for _, run_id, _ in old for name in with_parts(run_id, parts))


class JSONStateStore(StateStore):
    """Keeps runs below a directory, as the command line does below its output directory."""

    def __init__(self, path: Union[str, os.PathLike[str]] = "./data") -> None:
        super().__init__(Store(os.fsdecode(path)))


class MemoryStateStore(StateStore):
    """Keeps runs in memory, as long as it lives itself."""

    def __init__(self) -> None:
        super().__init__(MemoryStore())


def check_no_loop(who: str) -> None:
    """Raise UsageError where an event loop runs already, in which nobody can wait for another one."""
    import asyncio
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise UsageError(f"{who} can't wait where an event loop runs already; use: await workflow.run(…)")


class Workflow:
    """Tasks made by @task that hang together, to be run by `await workflow.run()`.

    It takes the edges among its own tasks.  `max_concurrent_tasks` None means no limit for async tasks, and
    as many plain ones at once as there are usable CPUs.  Raises FlowError with all that is wrong.
    """

    def __init__(self, tasks: Sequence[FunctionTask], name: str = "",
                 max_concurrent_tasks: Optional[int] = None, *, description: str = "", version: str = "",
                 tags: Sequence[str] = (),
                 pools: Optional[Mapping[str, int]] = None, fail_fast: bool = False,
                 schedule: Any = None) -> None:
        found = each_task(tasks if isinstance(tasks, FunctionTask) else list(tasks))
        self.tasks: Tuple[FunctionTask, ...] = tuple(found)
        self.name, self.max_concurrent_tasks = name, max_concurrent_tasks
        self._fields: Dict[str, Any] = {"description": description, "version": version, "tags": tags,
                                        "pools": pools if pools is not None else {}, "fail_fast": fail_fast,
                                        "schedule": schedule}
        self._made_of: Any = None
        self._flow = self.flow                 # is it sound?

    def __repr__(self) -> str:
        return f"<Workflow {self.name or 'workflow'}: {len(self.tasks)} tasks>"

    @property
    def flow(self) -> Flow:
        """The checked Flow; edges may be added to the tasks until it runs."""
        made_of = sum(len(task.upstream) for task in self.tasks), self.name, self.max_concurrent_tasks
        if made_of != self._made_of:
            self._flow = make_flow(self.name or "workflow", self.tasks,
                                   max_parallel=self.max_concurrent_tasks, **self._fields)
            self._made_of = made_of
        return self._flow

    @property
    def functions(self) -> Dict[str, Callable[..., Any]]:
        """The function of each task by its name."""
        return {task.name: task.function for task in self.tasks}

    def visualize(self) -> str:
        """Return the graph as text: a block for each level, and for each task what it waits for."""
        return to_text_graph(make_plan(self.flow), glyphs=glyphs_for(sys.stdout))

    async def run(self, run_id: Optional[str] = None, store: Optional[StateStore] = None,
                  initial_ctx: Optional[Mapping[str, Any]] = None) -> Dict[str, Any]:
        """Run the workflow on the running event loop and return the final context.

        A `run_id` that exists is gone on with; one that succeeded gives what it gave.  Without a `store` it
        is JSONStateStore("./data").  Raises FlowFailed if the run did not succeed, with the exception of its
        first failed task as cause, and UsageError, RunLocked or StateError if the run can't be made.
        """
        run, world = await self._run(run_id, store, initial_ctx, take_signals=False)
        return self._result(run, world)

    def run_sync(self, run_id: Optional[str] = None, store: Optional[StateStore] = None,
                 initial_ctx: Optional[Mapping[str, Any]] = None) -> Dict[str, Any]:
        """Run the workflow on an event loop of its own and return the final context; see run().

        In the main thread, SIGINT, SIGTERM and SIGHUP cancel the run, which then ends by KeyboardInterrupt or
        SystemExit.
        """
        check_no_loop("run_sync")
        run, world = run_on_own_loop(self._run(run_id, store, initial_ctx, take_signals=True))
        late = world.signals.names
        code = run.cancel.exit_code if run.cancel else SIGNAL_EXITS[late[0]] if late else 0
        if code == SIGNAL_EXITS["SIGINT"]:
            raise KeyboardInterrupt
        if code:
            raise SystemExit(code)
        return self._result(run, world)

    async def _run(self, run_id: Optional[str], store: Optional[StateStore],
                   initial_ctx: Optional[Mapping[str, Any]], take_signals: bool) -> Tuple[Run, Functions]:
        """Make a run and drive it to its end on the running loop."""
        if why_not:
            raise UsageError(why_not)
        import logging
        if not isinstance(store, (StateStore, type(None))):
            raise UsageError(f"store: expected a JSONStateStore or a MemoryStateStore, got {store!r}")
        flow, logger = self.flow, logging.getLogger("miniflow")
        kept = (JSONStateStore() if store is None else store).store
        source = Source(flow, flow.name, "", self.functions)
        opened = open_run(kept, source, self._params(initial_ctx), Order(""), Selection(), run_id,
                          logger.warning)
        return opened.run, await carry_out_on_loop(opened, kept, Order(""), NoteTaker(logger.warning),
                                                   self.functions, take_signals)

    def _params(self, initial_ctx: Optional[Mapping[str, Any]]) -> Optional[Dict[str, Any]]:
        """Return a copy of the initial context; raise UsageError if the record of the run can't hold it."""
        if initial_ctx is None:
            return None
        if not isinstance(initial_ctx, Mapping):
            raise UsageError(f"initial_ctx: expected a dict, got {shown(initial_ctx)}")
        params = {}
        for key, value in initial_ctx.items():
            try:
                if type(key) is not str:
                    raise TypeError("keys have to be strings")
                params[key] = json_copy(value)
            except (TypeError, ValueError) as exc:
                raise UsageError(f"initial_ctx[{key!r}]: {exc}; make such a value in a task") from None
        return params

    def _result(self, run: Run, world: Functions) -> Dict[str, Any]:
        """Return the final context of a run, or raise FlowFailed."""
        if run.ok:
            lost = [f"{key} ({kind})" for name in run.plan.order
                    for key, kind in run.tasks[name].unsaved.items()
                    if key not in world.kept.get(name, {})]
            if lost:
                import logging
                logging.getLogger("miniflow").warning(
                    "run %s: what only memory held is not there any more: %s", run.id, ", ".join(lost))
            return world.result(run)
        cause = None
        if run.first_failure is not None:
            failed = run.tasks[run.first_failure]
            kind = TimeoutError if (failed.reason or "").startswith("timeout after") else RuntimeError
            cause = world.errors.get(run.first_failure) or kind(failed.error or failed.reason)
        raise FlowFailed(format_verdict(run), run) from cause


def _line_in(path: str, exc: BaseException) -> int:
    """Return the line of a file where an exception came from, as far as its traceback knows."""
    if isinstance(exc, SyntaxError) and exc.filename == path:
        return exc.lineno or 1
    frame, line = exc.__traceback__, 1
    while frame:
        if frame.tb_frame.f_code.co_filename == path:
            line = frame.tb_lineno
        frame = frame.tb_next
    return line


def import_workflow(path: str, stem: str, where: str) -> Workflow:
    """Import a flow in Python and return its `workflow`, or what create_workflow() gives; raise FlowError."""
    import contextlib
    global why_not
    path = os.path.abspath(path)
    folder = os.path.dirname(path)
    if folder not in sys.path:
        sys.path.append(folder)                # last: a flow called queue.py must not hide the module
    name = FLOW_MODULE + re.sub("[^A-Za-z0-9_]", "_", stem)
    why_not = 'it is being imported to find its workflow; put what runs it under if __name__ == "__main__":'
    try:
        with contextlib.redirect_stdout(sys.stderr):
            module = load_module(name, path)
            found = getattr(module, "workflow", None)
            if found is None and callable(getattr(module, "create_workflow", None)):
                found = module.create_workflow()
    except MiniFlowError as exc:
        raise FlowError(f"{where}: {line}" for line in str(exc).split("\n")) from None
    except KeyboardInterrupt:
        raise
    except BaseException as exc:
        raise FlowError([f"{where}:{_line_in(path, exc)}: {describe_error(exc)}"]) from None
    finally:
        why_not = None
    if not isinstance(found, Workflow):
        what = "neither a workflow nor a function create_workflow()" if found is None else \
            f"as workflow a {class_name(type(found))}, which is no Workflow of this MiniFlow ({__file__})"
        raise FlowError([f"{where}: it has {what}; give it: workflow = Workflow([…])"])
    return found


def flow_files(flows_dir: str) -> Dict[str, str]:
    """Return the flow files of a directory: stem to path, sorted; raise NotFound if it can't be read."""
    try:
        names = sorted(os.listdir(flows_dir))
    except OSError as exc:
        raise NotFound(f"{flows_dir}: the flows directory can't be read: {exc.strerror}; "
                       "give another by -f, or make an example: miniflow init") from None
    found: Dict[str, str] = {}
    for name in names:
        stem, dot, kind = name.rpartition(".")
        is_flow = kind == "json" or kind == "py" and not stem.startswith("_")
        if stem and not stem.startswith(".") and is_flow:
            found.setdefault(stem, os.path.join(flows_dir, name))
    return found


def find_flow(flows_dir: str, name: str) -> Tuple[str, str]:
    """Return the name and the path of a flow, given by its name or by a path; raise FlowNotFound."""
    name = os.fspath(name)
    if "/" in name or os.sep in name or name.endswith((".json", ".py")):
        if os.path.exists(name):
            return re.sub(r"\.(json|py)$", "", os.path.basename(name)), name
        raise FlowNotFound(f"{safe(name)}: no such flow file")
    paths = [path for kind in (".json", ".py") for path in [os.path.join(flows_dir, name + kind)]
             if name and os.path.lexists(path)]
    if len(paths) > 1:
        raise UsageError(f"{safe(paths[0])} and {safe(paths[1])} have the same name; "
                         "rename one, or give its path")
    if paths:
        return name, paths[0]
    try:
        names = flow_files(flows_dir)
    except NotFound as exc:
        raise FlowNotFound(str(exc)) from None
    raise FlowNotFound(f"no flow {shown(name)} in {flows_dir}"
                       + (near(name, names) or f"; it has {', '.join(names) or 'none'}"))


def script_checker(tasks_dir: str) -> Callable[[str], Optional[str]]:
    """Return a function that tells what is wrong with the path of a script, if anything."""
    root = os.path.realpath(tasks_dir)
    known: Dict[str, Optional[str]] = {}

    def problem(path: str) -> Optional[str]:
        if "\0" in path or any("\ud800" <= char <= "\udfff" for char in path):
            return None                         # the text itself is wrong, and reported as such
        real = os.path.realpath(os.path.join(root, path))
        if os.path.isabs(path) or not real.startswith(root + os.sep):
            return (f"{shown(path)} lies outside the tasks directory {tasks_dir}; "
                    "put it below it, or use command")
        try:
            os.stat(real)
        except PermissionError as exc:
            return f"{shown(path)} in {tasks_dir} can't be read: {exc.strerror}"
        except OSError:
            names = [os.path.relpath(os.path.join(folder, file), root)
                     for folder, _, files in os.walk(root) for file in files] if os.path.isdir(root) else []
            return f"there is no {shown(path)} in {tasks_dir}{near(path, names)}"
        if not os.path.isfile(real) or not os.access(real, os.R_OK):
            return f"{shown(path)} in {tasks_dir} is not a file that can be read"
        return None

    def remembered(path: str) -> Optional[str]:
        if path not in known:
            known[path] = problem(path)
        return known[path]

    return remembered


MAX_FLOWS_DEEP = 20                            # flows within flows


def flow_checker(path: str, outer: Sequence[str], load_file: Callable[[str, str, Sequence[str]], Flow],
                 known: Dict[str, Union[Flow, str]]) -> Callable[[SubFlow], List[Problem]]:
    """Return what tells what is wrong with a task that is another flow, in the flow file at `path`.

    `outer` are the files of the flows that this one is a part of, `known` the flows that are known already.
    """
    chain = [*outer, os.path.realpath(path)]

    def load(name: str) -> Union[Flow, str]:
        if name.endswith((".json", ".py")):
            return f"{shown(name)} is the name of a file; give that of the flow, without its ending"
        if len(chain) > MAX_FLOWS_DEEP:
            return f"flows within flows, more than {MAX_FLOWS_DEEP} deep"
        try:
            _, found = find_flow(os.path.dirname(path) or ".", name)
            if os.path.realpath(found) in chain:
                names = [os.path.basename(file).rpartition(".")[0] for file in chain]
                return f"a flow that runs itself: {' -> '.join(names)} -> {name}; take it out of one of them"
            return load_file(found, name, chain)
        except FlowError as exc:
            return f"flow {name} is invalid: {exc.problems[0]}"
        except MiniFlowError as exc:
            return str(exc)

    def check(action: SubFlow) -> List[Problem]:
        found = known[action.flow] = known.get(action.flow) or load(action.flow)
        if isinstance(found, str):
            return [Problem(("flow",), found)]
        declared = found.params
        if declared is None:
            return []
        problems = [Problem(("params", name), f"flow {action.flow} has no such param"
                            + (near(name, declared) or f"; it has {', '.join(declared) or 'none'}"))
                    for name in action.params if name not in declared]
        lacking = [name for name, param in declared.items() if param.required and name not in action.params]
        place = "params" if action.params else "flow"
        return problems + [Problem((place,), f"flow {action.flow} requires {name}; give it in params")
                           for name in lacking]
    return check


def load_flow(path: str, stem: str, tasks_dir: str, outer: Sequence[str] = (),
              known: Optional[Dict[str, Union[Flow, str]]] = None) -> Source:
    """Read and check a flow file, in JSON or in Python; raise FlowError with all that is wrong with it."""
    where = short_path(path)
    try:
        content = read_file(path, MAX_BYTES + 1)
    except OSError as exc:
        raise FlowError([f"{where}: can't be read: {exc.strerror}"]) from None
    if path.endswith(".py"):
        workflow = import_workflow(path, stem, where)
        flow = workflow.flow if workflow.name else workflow.flow._replace(name=stem)
        return Source(flow, stem, path, workflow.functions)
    found: Dict[str, Union[Flow, str]] = {} if known is None else known

    def load_file(file: str, name: str, chain: Sequence[str]) -> Flow:
        return load_flow(file, name, tasks_dir, chain, found).flow

    check = flow_checker(path, outer, load_file, found)
    flow = parse_flow(content, where, script_checker(tasks_dir), check)
    hide(flow.secrets)
    return Source(flow, stem, path)


def flow_row(name: str, path: str, load: Callable[[str, str], Flow]) -> Dict[str, Any]:
    """Return what is told of a flow, broken or not, by `list --json` and by the web."""
    row: Dict[str, Any] = {"name": name, "path": path, "error": None}
    try:
        flow = load(path, name)
        row.update(flow_name=flow.name, tasks=len(flow.tasks), description=flow.description,
                   version=flow.version, tags=flow.tags, params=flow_to_json(flow).get("params"),
                   schedule=schedules_to_json(flow.schedule) if flow.schedule else None,
                   next=[scheduled_text(at) for at in islice(upcoming(flow.schedule, int(time.time())), 5)])
    except FlowError as exc:
        row.update(flow_name=None, tasks=None, description="", version="", tags=[], params=None,
                   schedule=None, next=[], error=exc.problems)
    return row


def flow_by_file(flow: Flow, stem: str) -> Flow:
    """Return a flow by the name that it is run by, that of its file, where other engines can have it, too."""
    return flow._replace(name=stem) if accepts(_NAME, stem) else flow


def write_script(store: Store, stem: str, plan: Plan, params: Mapping[str, Any], tasks_dir: str) -> str:
    """Write the bash script of a plan into the output directory and return its path."""
    check_secrets(plan.flow, params)
    folder = store.prepare("scripts")
    plan = plan._replace(flow=flow_by_file(plan.flow, stem))
    script = EXPORTERS["bash"](plan, params, os.path.abspath(tasks_dir))
    content = script.text.encode("utf-8", "surrogateescape")
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    name = re.sub("[^A-Za-z0-9_.-]", "_", stem)
    for n in range(1, 10000):
        path = os.path.join(folder, f"{name}-{stamp}{f'-{n}' if n > 1 else ''}.sh")
        try:
            fd = store.disk.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o700)
        except FileExistsError:
            continue
        except OSError as exc:
            raise StateError(f"{path}: can't be written: {exc.strerror}") from None
        try:
            store.disk.write(fd, content)
        except OSError as exc:
            store.disk.unlink(path)
            raise StateError(f"{path}: can't be written: {exc.strerror}") from None
        finally:
            store.disk.close(fd)
        return path
    raise StateError(f"{folder}: holds 10000 scripts of {stem} made in this second")


class MiniFlow:
    """The flows of a directory, to be run from a Python program."""

    def __init__(self, flows_dir: Union[str, os.PathLike[str]] = "./flows",
                 tasks_dir: Union[str, os.PathLike[str]] = "./tasks",
                 output_dir: Union[str, os.PathLike[str]] = "./miniflow_output") -> None:
        self.flows_dir, self.tasks_dir = os.fspath(flows_dir), os.fspath(tasks_dir)
        self.store = Store(os.fspath(output_dir))

    def list_flows(self) -> List[str]:
        """Return the names of all flows, sorted, broken ones among them."""
        return list(flow_files(self.flows_dir))

    def source(self, name: str) -> Source:
        """Return a flow, checked, with where it comes from; raise FlowNotFound or FlowError."""
        stem, path = find_flow(self.flows_dir, name)
        return load_flow(path, stem, self.tasks_dir)

    def load(self, name: str) -> Flow:
        """Return a flow, checked; raise FlowNotFound or FlowError."""
        return self.source(name).flow

    def run(self, name: str, params: Optional[Mapping[str, Any]] = None, *, run_id: Optional[str] = None,
            max_parallel: Optional[int] = None) -> Run:
        """Run a flow to its end and return its Run, whether it succeeded or not.

        A `run_id` that exists is gone on with, by its own params.  Raises FlowNotFound, FlowError,
        UsageError, RunLocked or StateError if the run can't be made.
        """
        source = self.source(name)
        if max_parallel is not None and not (_TYPES["integer"](max_parallel) and max_parallel > 0):
            raise UsageError(f"max_parallel: expected an integer of at least 1, got {shown(max_parallel)}")
        if source.functions is not None:
            check_no_loop("MiniFlow.run")
        order = Order(self.tasks_dir, max_parallel)
        opened = open_run(self.store, source, params or None, order, Selection(), run_id, say)
        return run_to_end(opened, self.store, source, order)

    def execute_flow(self, name: str, params: Optional[Mapping[str, Any]] = None,
                     dry_run: bool = False) -> str:
        """Write a bash script that runs the flow, run it (unless `dry_run`), and return the script's path.

        Raises FlowNotFound, FlowError, or FlowFailed (with the Run as `.run`) if the run did not succeed.
        """
        source = self.source(name)
        script = write_script(self.store, source.stem, make_plan(source.flow),
                              complete_params(source.flow, params or {}), self.tasks_dir)
        if not dry_run:
            order = Order(self.tasks_dir)
            run = run_to_end(open_new(self.store, source, params, order), self.store, source, order)
            if not run.ok:
                raise FlowFailed(format_verdict(run), run)
        return script


# ============================================================================
# == 41. DAEMON: how is what is due started, exactly once?
# ============================================================================
# Any number of daemons and ticks may work on one output directory.  A turn takes schedule.lock, asks
# due_runs() for every flow, starts the runs, waits until they are there, and only then writes the Ledgers to
# schedule.json.  A run's id is made of its flow and its scheduled time, and the engine that is started for it
# makes a new run or nothing.  So whatever dies, and wherever:
#
#   before the engine is started     the next turn starts it
#   before its run is there          the next turn starts another; one of the two makes the run
#   before the Ledger is written     the next turn finds the run there
#   later                            the Ledger says that it has been seen to
#
# An engine is a process of its own in a session of its own, which outlives the daemon; what it says goes to
# engine.log beside the logs of its tasks.  When its run has ended it starts itself what has waited for that.

START_S = 30.0                                 # how long an engine may take until its run is there
HELD_S = 60.0                                  # how long another daemon's turn is waited for
LOOK_S = 10.0                                  # how often to see if a flow has changed, or the clock
AGAIN_S = 60.0                                 # how soon to try once more to read a flow that is broken
_LEDGERS_FORMAT = 1


def scheduled_id(flow: str, at: int) -> str:
    """Return the id of the run of a flow for a scheduled time; no two flows have the same."""
    stem = _id_stem(flow)
    mark = "" if stem == flow else f"-{zlib.crc32(flow.encode()):08x}"
    return f"{stem}{mark}-{re.sub('[-:]', '', scheduled_text(at))}"


def encode_ledgers(ledgers: Mapping[str, Ledger]) -> bytes:
    """Return the content of schedule.json."""
    flows = {flow: {"seen": {key: scheduled_text(at) for key, at in ledger.seen.items()},
                    "queued": None if ledger.queued is None else scheduled_text(ledger.queued)}
             for flow, ledger in sorted(ledgers.items())}
    return json.dumps({"format": _LEDGERS_FORMAT, "flows": flows}, indent=1).encode() + b"\n"


def decode_ledgers(content: bytes) -> Dict[str, Ledger]:
    """Return what encode_ledgers() wrote; raise ValueError or the like for anything else."""
    def time_of(text: Any) -> int:
        return parse_at(str(text), datetime.timezone.utc)

    value = json.loads(content)
    if value["format"] != _LEDGERS_FORMAT:
        raise ValueError(f"it has format {shown(value['format'])}, not {_LEDGERS_FORMAT}")
    return {flow: Ledger({key: time_of(at) for key, at in members["seen"].items()},
                         None if members["queued"] is None else time_of(members["queued"]))
            for flow, members in value["flows"].items()}


class ScheduleTurn(NamedTuple):
    """What a turn has come to: ids of runs, and when the next one may have something to do (None: never)."""

    started: Tuple[str, ...] = ()
    failed: Tuple[str, ...] = ()               # not there, though they are due; the next turn tries again
    wake: Optional[float] = None


class Starting(NamedTuple):
    """An engine that has been started for a flow, and of which the run is awaited."""

    flow: str
    run_id: str
    process: Any


class Scheduler:
    """Starts the runs that are due of the flows of `mini`; `note` is told what a user should know."""

    def __init__(self, mini: MiniFlow, clock: Callable[[], float] = time.time,
                 note: Callable[[str], None] = say,
                 load: Optional[Callable[[str, str], Flow]] = None) -> None:
        self._mini, self._store, self._clock, self._note = mini, mini.store, clock, note
        self._load = load or (lambda path, flow: load_flow(path, flow, mini.tasks_dir).flow)
        self._known: Dict[str, Tuple[Any, Tuple[Schedule, ...]]] = {}  # by path, while the file is the same
        self._broken: Dict[str, Tuple[Any, float]] = {}        # by path, and until when
        self._told: Dict[str, str] = {}
        self._engines: List[Any] = []          # children of ours, which have to be waited for

    def due(self) -> List[str]:
        """Return the ids of the runs that a turn would start now; nothing is started or written."""
        ledgers, now = self._read(), int(self._clock())
        return [scheduled_id(flow, start.time) for flow, _, decision in self._decide(ledgers, now)
                for start in decision.starts]

    def turn(self, ended: Optional[str] = None) -> ScheduleTurn:
        """Start what is due, once; raise StateError, or RunLocked if another daemon's turn does not end.

        With `ended` it is the end of a run of that flow, which starts what has waited for it and no more: a
        daemon that was stopped is not to go on in the runs that it has left.
        """
        self._engines = [engine for engine in self._engines if engine.poll() is None]
        self._store.prepare("runs", durable=True)
        lock = self._lock()
        try:
            before, now = self._read(), int(self._clock())
            ledgers, wakes, starting = dict(before), [], []    # type: Dict[str, Ledger], List[int], List[Any]
            for flow, path, decision in self._decide(before, now, ended):
                ledgers[flow] = decision.ledger
                starting += [self._start(flow, path, start) for start in decision.starts]
                wakes += [decision.wake] if decision.wake is not None else []
            failed = [each for each in starting if not self._await(each)]
            for each in failed:                # its flow is asked for again
                ledgers[each.flow] = before.get(each.flow, Ledger())
                wakes.append(now + 5)
            ledgers = {flow: ledger for flow, ledger in ledgers.items() if ledger.seen}
            if ledgers != before:
                self._write(ledgers)
        finally:
            lock.release(remove=True)
        lost = {each.run_id for each in failed}
        return ScheduleTurn(tuple(each.run_id for each in starting if each.run_id not in lost),
                            tuple(sorted(lost)), min(wakes, default=None))

    def _decide(self, ledgers: Mapping[str, Ledger], now: int, ended: Optional[str] = None
                ) -> Iterator[Tuple[str, str, Decision]]:
        """Yield each flow that has been read, its path, and what is to be done about it."""
        live: List[Set[str]] = []
        for flow, path in flow_files(self._mini.flows_dir).items():
            if ended not in (None, flow):
                continue

            def is_live(name: str = flow) -> bool:
                if not live:                   # asked once a turn, and only if something is due
                    live.append(self._live())
                return name in live[0]

            def is_made(at: int, name: str = flow) -> bool:
                return self._store.exists(scheduled_id(name, at))

            schedules = self._schedules(flow, path)
            if schedules is not None:
                ledger = ledgers.get(flow, Ledger())
                yield flow, path, due_runs(flow, schedules, ledger, now, is_live, is_made, ended is not None)

    def _schedules(self, flow: str, path: str) -> Optional[Tuple[Schedule, ...]]:
        """Return the schedules of a flow file; None, and once a note, if it can't be read.

        A file without the word is not even parsed: what is no concern of the schedule's can't disturb it.
        """
        try:
            found = os.stat(path)
            stamp = found.st_mtime_ns, found.st_size, found.st_ino
            if path not in self._known or self._known[path][0] != stamp:
                broken, until = self._broken.get(path, (None, 0.0))
                if broken == stamp and time.monotonic() < until:
                    return None
                self._known.pop(path, None)
                has_some = b"schedule" in read_file(path, MAX_BYTES + 1)
                self._known[path] = stamp, self._load(path, flow).schedule if has_some else ()
            self._told.pop(path, None)
            return self._known[path][1]
        except (MiniFlowError, OSError) as exc:
            what = exc.problems[0] if isinstance(exc, FlowError) else str(exc)
            if self._told.get(path) != what:
                self._note(f"flow {safe(flow)} can't be scheduled: {safe(what)}")
            self._told[path] = what
            if not isinstance(exc, OSError):   # it may have taken its time, and what it lacks may come to be
                self._broken[path] = stamp, time.monotonic() + AGAIN_S
            return None

    def _live(self) -> Set[str]:
        """Return the flows of which a run goes on."""
        try:
            names = os.listdir(self._store.runs)
        except FileNotFoundError:
            return set()
        ids = {name.rpartition(".")[0] for name in names if name.endswith((".lock", ".owner"))}
        return {str(self._store.summary(run_id)["flow"]) for run_id in ids if re.fullmatch(_RUN_ID, run_id)
                and self._store.owner(run_id) is not None and self._store.exists(run_id)}

    def _start(self, flow: str, path: str, due: DueRun) -> Starting:
        """Start an engine that makes a run; what it says goes to its log."""
        run_id, store = scheduled_id(flow, due.time), self._store
        argv = ["-f", self._mini.flows_dir, "-t", self._mini.tasks_dir, "-o", store.path,
                "run", os.path.abspath(path), "--run-id", run_id]
        argv += ["--params", json.dumps(due.params)] if due.params else []
        env = {name: value for name, value in os.environ.items()
               if not _is_own_variable(name) and name != "MINIFLOW_TOKEN"}
        fds = [-1, -1]
        try:
            fds[0] = os.open(os.devnull, os.O_RDONLY)
            log = os.path.join(store.prepare("logs", run_id), "engine.log")
            fds[1] = store.disk.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            process = spawn([sys.executable or "python3", "-c", SCHEDULED_PROGRAM, os.path.abspath(__file__),
                             str(due.time), *argv], env, os.getcwd(), (fds[0], fds[1], fds[1]))
            self._engines.append(process)
        except (OSError, ValueError, StateError) as exc:
            self._note(f"run {run_id} can't be started: {exc}")
            process = None
        finally:
            for fd in fds:
                if fd >= 0:
                    os.close(fd)
        return Starting(flow, run_id, process)

    def _await(self, starting: Starting) -> bool:
        """Wait until a run is there; tell whether it is."""
        end, process = time.monotonic() + START_S, starting.process
        if process is None:
            return False
        while True:
            code = process.poll()              # asked first: at its end the run is there, or never will be
            if self._store.exists(starting.run_id):
                return True
            if code is not None or time.monotonic() > end:
                what = f"after {START_S:g} s" if code is None else f"its engine ended with exit code {code}"
                log = os.path.join(self._store.path, "logs", starting.run_id, "engine.log")
                self._note(f"run {starting.run_id} is not there: {what}; see {log}")
                return False
            time.sleep(0.01)

    def _lock(self) -> Lock:
        """Take hold of the schedule, as soon as the others let go of it."""
        path, end = os.path.join(self._store.path, "schedule.lock"), time.monotonic() + HELD_S
        while True:
            try:
                return take_lock(self._store.disk, path, this_engine(time.time()))
            except RunLocked:
                if time.monotonic() > end:
                    raise RunLocked(f"{path}: another daemon has held it for {HELD_S:g} s; see what process "
                                    f"{(lock_owner(path) or {}).get('pid', '?')} does") from None
            except OSError as exc:
                raise StateError(f"{path}: can't be locked: {exc.strerror}") from None

    def _read(self) -> Dict[str, Ledger]:
        """Return the Ledgers, by flow."""
        path = os.path.join(self._store.path, "schedule.json")
        try:
            return decode_ledgers(read_file(path, follow=False))
        except FileNotFoundError:
            return {}
        except OSError as exc:
            raise StateError(f"{path}: can't be read: {exc.strerror}") from None
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as exc:
            raise StateError(f"{path}: it is damaged ({exc}); nothing was started; restore it, or remove it "
                             "and with it what is owed") from None

    def _write(self, ledgers: Mapping[str, Ledger]) -> None:
        """Write the Ledgers down."""
        path = os.path.join(self._store.path, "schedule.json")
        try:
            self._store.disk.put(path, encode_ledgers(ledgers), True)
        except OSError as exc:
            raise StateError(f"{path}: can't be written: {exc.strerror}; the next turn tries again") from None


def schedule_loop(scheduler: Scheduler, rest: Callable[[float], bool], clock: Callable[[], float] = time.time,
                  note: Callable[[str], None] = say) -> None:
    """Take turn after turn; in between `rest` waits so many seconds and tells whether to stop.

    The wait of a threading.Event is such a `rest`.  What goes wrong with a turn is told once, and the next
    one tries again.
    """
    told = ""
    while True:
        wait = LOOK_S
        try:
            wake = scheduler.turn().wake
            told = ""
            if wake is not None:
                wait = min(LOOK_S, max(0.05, wake - clock()))
        except (MiniFlowError, OSError) as exc:
            if str(exc) != told:
                note(f"the schedule waits: {safe(exc)}")
            told = str(exc)
        if rest(wait):
            return


# ============================================================================
# == 42. FOLLOWING: what happens in runs, as seen from outside their engines?
# ============================================================================
# Who wants to know how runs stand, and is not their engine, looks at the files.  An ended run does not
# change, so its head is read once; of a run that goes on, the journal is read as it grows.  An engine notices
# none of it: nothing here takes a lock for longer than an instant, or writes.

def signature_of(path: str) -> Optional[Tuple[int, int, int]]:
    """Return what changes when a file does; None if there is none."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def last_event(journal: str) -> Optional[str]:
    """Return the word of the event at the end of a journal, if it is there and whole."""
    try:
        with open_file(journal) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().splitlines(keepends=True)
    except OSError:
        return None
    record = decode_record(lines[-1]) if lines else None
    return str(record["event"]) if record else None


def count_rows(path: str) -> Dict[str, int]:
    """Return how many tasks are in which state, by the lines that the state at `path` has for them."""
    counts: Dict[str, int] = {}
    try:
        content = read_file(path, follow=False)
    except OSError:
        return counts
    for found in re.finditer(rb'(?m)^ "(?:[^"\\]|\\.)*": \{"status": "(\w+)"', content):
        state = found[1].decode()
        counts[state] = counts.get(state, 0) + 1
    return counts


class History:
    """The heads of all runs, each read again only when its files have changed."""

    def __init__(self, store: Store) -> None:
        import threading
        self.store = store
        self._known: Dict[str, Tuple[Any, Dict[str, Any]]] = {}
        self._lock = threading.Lock()

    def head(self, run_id: str) -> Dict[str, Any]:
        """Return the head of one run, with how many of its `tasks` are in which state."""
        files = self.store.files(run_id)
        journal, state = signature_of(files.journal), signature_of(files.state)
        live = journal is not None and self.store.owner(run_id) is not None
        known = self._known.get(run_id)
        if known and known[0] == (live, journal, state):
            return known[1]
        head: Mapping[str, Any] = {}
        if live and last_event(files.journal) != EVENT_WORDS[RunFinished]:
            head = self.store.peek(run_id)     # the whole of a journal is read only where it has to be
        if journal is None or head:
            counts = known[1]["tasks"] if known and known[0][2] == state else count_rows(files.state)
        else:
            counts = self._count_tasks(run_id)
        head = head or self.store.summary(run_id)
        found = {**{name: head.get(name) for name in _HEAD}, "tasks": counts}
        self._known[run_id] = (live, journal, state), found
        return found

    def _count_tasks(self, run_id: str) -> Dict[str, int]:
        """Return how many tasks are in which state by the journal, which knows more than the state."""
        counts: Dict[str, int] = {}
        try:
            for task_run in self.store.load(run_id).run.tasks.values():
                counts[task_run.status] = counts.get(task_run.status, 0) + 1
        except MiniFlowError:
            pass                               # its head says that it is damaged
        return counts

    def heads(self) -> List[Dict[str, Any]]:
        """Return the heads of all runs, newest first."""
        with self._lock:
            ids = self.store.ids()
            for gone in self._known.keys() - set(ids):
                del self._known[gone]
            found = [self.head(run_id) for run_id in ids]
        return sorted(found, key=lambda head: (head["started"] or "", head["id"]), reverse=True)


class Follower:
    """What happens in one run, read from its journal as that grows; its engine does not notice."""

    def __init__(self, store: Store, run_id: str, after: int = -1) -> None:
        self.store, self.run_id = store, run_id
        self.told, self.at = after, -1         # the number of the latest event that was told, and read
        self.run: Optional[Run] = None
        self._file: Optional[IO[bytes]] = None
        self._rest = b""

    def close(self) -> None:
        """Let go of the journal."""
        if self._file:
            self._file.close()
        self._file, self._rest = None, b""

    def news(self) -> Iterator[Optional[Event]]:
        """Yield what is new, with its number as `told`; None where the whole run is to be looked at anew."""
        journal = self.store.files(self.run_id).journal
        for _ in range(3):                     # a journal that is replaced all the time is for the next call
            if self._file is None:
                try:
                    self._file = open_file(journal)
                except OSError:
                    yield from self._from_state()
                    return
            yield from self._lines()
            if self._file is not None and not self._is_gone(journal):
                return
            yield from self._lines()           # what was written just before it went
            self.close()

    def _is_gone(self, journal: str) -> bool:
        """Tell whether the journal that we read is not the run's any more."""
        assert self._file
        try:
            found = os.stat(journal, follow_symlinks=False)
            return not os.path.samestat(os.fstat(self._file.fileno()), found)
        except OSError:
            return True

    def _from_state(self) -> Iterator[Optional[Event]]:
        """Look at the state of a run that has no journal."""
        try:
            loaded = self.store.load(self.run_id)
        except MiniFlowError:
            return                             # removed, or damaged, which other routes tell
        self.run, self.at = loaded.run, loaded.seq
        if loaded.seq > self.told:
            self.told = loaded.seq
            yield None

    def _lines(self) -> Iterator[Optional[Event]]:
        """Read whole lines as long as there are any."""
        while self._file:
            self._rest += self._file.readline()
            if not self._rest.endswith(b"\n"):
                return
            record, self._rest = decode_record(self._rest), b""
            follows = record and (record["event"] == "opened" or self.run and record["seq"] == self.at + 1)
            if record is None or not follows:
                self.close()                   # it was cut back after a full disk: begin anew
                return
            yield from self._take(record)

    def _take(self, record: Mapping[str, Any]) -> Iterator[Optional[Event]]:
        """Let the run know what a record says, and tell it unless it was told."""
        event: Optional[Event] = None
        if record["event"] == "opened":
            self.run = run_from_json(record["state"])
        else:
            assert self.run
            event = event_from_json(record)
            self.run.apply(event)
        self.at = int(record["seq"])
        if self.at > self.told:
            self.told = self.at
            yield event


# ============================================================================
# == 43. PAGE: the web page
# ============================================================================
# One raw constant with the style, the markup and the script of the page, each under a banner of its own.  It
# is served in those three parts, so that the browser may be told to run nothing else.  There is no build step
# and no outside address.  What comes from the API is shown as text alone (textContent), never as HTML.

PAGE = r"""
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>MiniFlow</title>
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32" width="32" height="32">
<rect width="32" height="32" rx="8" fill="#4457d6"/>
<path d="M9 10h4c5 0 3 12 10 12M9 10h14" fill="none" stroke="#fff" stroke-width="2.4"
 stroke-linecap="round"/>
<circle cx="9" cy="10" r="3.2" fill="#fff"/><circle cx="23" cy="10" r="3.2" fill="#7ee2b8"/>
<circle cx="23" cy="22" r="3.2" fill="#fff"/></svg>
<style>
/* ---- colours: light, dark by the system's wish, and either by the reader's ---- */
:root { --bg: #f5f6f9; --surface: #ffffff; --raised: #ffffff; --ink: #1b2333; --soft: #5d687c;
  --faint: #8b95a7;
  --line: #e3e7ee; --hover: #f0f2f7; --accent: #4457d6; --on-accent: #ffffff; --code: #f3f5f9;
  --success: #1f9d6b; --cached: #0d9ba8; --running: #2f7bea; --retrying: #d98a08; --failed: #d63a3a;
  --upstream_failed: #c06a7c; --cancelled: #8a6d4f; --skipped: #8e99ab; --pending: #b4bdcb;
    --interrupted: #8b5cd6;
  --shadow: 0 1px 2px rgba(20, 30, 60, .06), 0 4px 16px rgba(20, 30, 60, .05);
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
    --tall: max(420px, calc(100vh - 322px)); color-scheme: light; }
:root[data-theme="dark"] { --bg: #0f131b; --surface: #171d28; --raised: #1c2330; --ink: #e6eaf2;
  --soft: #a0abbe;
  --faint: #75819a; --line: #283142; --hover: #1f2735; --accent: #8594ff; --on-accent: #0f131b;
    --code: #111722;
  --success: #3ecf95; --cached: #35bdca; --running: #5c9dff; --retrying: #f0ad3d; --failed: #ff6b6b;
  --upstream_failed: #dd8d9d; --cancelled: #b99a78; --skipped: #7f8ba0; --pending: #4b566b;
    --interrupted: #b08cf5;
  --shadow: 0 1px 2px rgba(0, 0, 0, .4), 0 6px 20px rgba(0, 0, 0, .25); color-scheme: dark; }
.s-pending { --c: var(--pending); } .s-running { --c: var(--running); } .s-retrying {
  --c: var(--retrying); }
.s-success { --c: var(--success); } .s-cached { --c: var(--cached); } .s-skipped { --c: var(--skipped); }
.s-failed { --c: var(--failed); } .s-upstream_failed { --c: var(--upstream_failed); }
.s-cancelled { --c: var(--cancelled); } .s-interrupted { --c: var(--interrupted); } .s-damaged {
  --c: var(--failed); }

/* ---- the whole ---- */
* { box-sizing: border-box; }
html, body { margin: 0; min-height: 100%; }
body { background: var(--bg); color: var(--ink); font: 14px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto,
  "Helvetica Neue", "DejaVu Sans", sans-serif; overflow-x: hidden; }
[hidden] { display: none !important; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
h1, h2, h3 { line-height: 1.25; margin: 0; font-weight: 650; letter-spacing: -.01em; }
h1 { font-size: 21px; } h1.mono { font-size: 17px; letter-spacing: 0; } h2.mono { font-size: 14px; } h2 {
  font-size: 15px; } h3 { font-size: 13px; }
h1, h2, p, td, dd, .name { overflow-wrap: anywhere; }
code, pre, .mono { font-family: var(--mono); font-size: 12px; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 6px; }
.skip { position: absolute; left: -999px; } .skip:focus { left: 8px; top: 8px; z-index: 9;
  background: var(--surface); padding: 8px; }
.bar { position: sticky; top: 0; z-index: 3; display: flex; align-items: center; gap: 4px;
  padding: 0 20px; height: 52px;
  background: var(--surface); border-bottom: 1px solid var(--line); }
.bar .brand { display: flex; align-items: center; gap: 9px; font-weight: 680; font-size: 15px;
  color: var(--ink); margin-right: 14px; }
.bar .brand img { width: 24px; height: 24px; display: block; }
.bar nav { display: flex; gap: 2px; flex: 1; }
.bar nav a { color: var(--soft); padding: 6px 11px; border-radius: 7px; font-weight: 550; }
.bar nav a:hover { background: var(--hover); text-decoration: none; }
.bar nav a[aria-current] { color: var(--ink); background: var(--hover); }
.live { display: flex; align-items: center; gap: 6px; color: var(--faint); font-size: 12px;
  margin-right: 6px; }
.live::before { content: ""; width: 7px; height: 7px; border-radius: 50%; background: var(--pending); }
.live.on::before { background: var(--success); }
main { max-width: 1320px; margin: 0 auto; padding: 22px 20px 28px; outline: none; }
.row { display: flex; align-items: center; gap: 10px; flex-wrap: wrap; }
.row > .grow { flex: 1; min-width: 0; }
.soft { color: var(--soft); } .faint { color: var(--faint); } .small { font-size: 12px; } .num {
  font-variant-numeric: tabular-nums; }
.card { background: var(--surface); border: 1px solid var(--line); border-radius: 12px;
  box-shadow: var(--shadow); }
.pad { padding: 16px 18px; }
.gap { margin-top: 18px; }

/* ---- buttons, fields ---- */
button, .button { font: inherit; font-weight: 560; color: var(--ink); background: var(--surface);
  border: 1px solid var(--line);
  border-radius: 8px; padding: 5px 12px; min-height: 32px; cursor: pointer; display: inline-flex;
    align-items: center; gap: 6px; }
button:hover { background: var(--hover); }
button:disabled { opacity: .5; cursor: default; }
button.primary { background: var(--accent); border-color: var(--accent); color: var(--on-accent); }
button.primary:hover { filter: brightness(1.07); }
button.go { color: var(--accent); border-color: color-mix(in srgb, var(--accent) 35%, var(--line)); }
button.go:hover { background: var(--accent); color: var(--on-accent); }
button.danger { color: var(--failed); border-color: color-mix(in srgb, var(--failed) 40%, var(--line)); }
button.plain { border-color: transparent; background: none; padding: 5px 8px; color: var(--soft); }
button.plain:hover { background: var(--hover); }
input, select, textarea { font: inherit; color: var(--ink); background: var(--surface);
  border: 1px solid var(--line);
  border-radius: 8px; padding: 5px 10px; min-height: 32px; max-width: 100%; }
input[type="checkbox"] { min-height: 0; width: 16px; height: 16px; accent-color: var(--accent); }
textarea { width: 100%; font-family: var(--mono); font-size: 12px; resize: vertical; }
input::placeholder { color: var(--faint); }
[aria-invalid="true"] { border-color: var(--failed); }

/* ---- states ---- */
.chip { display: inline-flex; align-items: center; gap: 5px; border-radius: 99px;
  padding: 1px 9px 1px 7px; font-size: 12px; font-weight: 600;
  white-space: nowrap; color: color-mix(in srgb, var(--c) 78%, var(--ink)); background: color-mix(in srgb,
    var(--c) 14%, var(--surface)); }
.chip::before { content: ""; width: 7px; height: 7px; border-radius: 50%; background: var(--c); }
.chip.s-running::before { animation: pulse 1.4s ease-in-out infinite; }
.tag { font-size: 11px; color: var(--soft); background: var(--hover); border-radius: 5px;
  padding: 1px 6px; }
.meter { display: flex; height: 7px; border-radius: 99px; overflow: hidden; background: var(--hover);
  gap: 1px; min-width: 40px; }
.meter i { background: var(--c); min-width: 2px; transition: flex-grow .3s; }
@keyframes pulse { 50% { opacity: .35; } }

/* ---- flows ---- */
.flows { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 380px), 1fr));
  gap: 14px; }
.flow { display: flex; flex-direction: column; gap: 10px; padding: 16px 18px; }
.flow .name { font-size: 15px; font-weight: 650; color: var(--ink); }
.flow .about { color: var(--soft); margin: 0; display: -webkit-box; -webkit-line-clamp: 2;
  -webkit-box-orient: vertical; overflow: hidden; }
.flow .foot { margin-top: auto; padding-top: 4px; }
.spark { display: flex; align-items: flex-end; gap: 3px; height: 30px; flex: 1; min-width: 0; }
.spark a { flex: 0 0 9px; border-radius: 3px; background: var(--c); min-height: 5px; opacity: .85; }
.spark a:hover { opacity: 1; }
.spark .none { flex: 0 0 9px; height: 5px; border-radius: 3px; background: var(--hover); }
.trouble { background: color-mix(in srgb, var(--failed) 8%, var(--surface)); border-radius: 8px;
  padding: 8px 11px; margin: 0;
  font: 12px/1.5 var(--mono); color: color-mix(in srgb, var(--failed) 80%, var(--ink));
    white-space: pre-wrap; overflow-wrap: anywhere; }

/* ---- tables ---- */
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-size: 12px; font-weight: 550; color: var(--faint); padding: 9px 14px;
  border-bottom: 1px solid var(--line); white-space: nowrap; }
td { padding: 8px 14px; border-bottom: 1px solid var(--line); vertical-align: middle; }
tr:last-child td { border-bottom: 0; }
tbody tr:hover { background: var(--hover); }
td .meter { width: 110px; }
.empty { text-align: center; color: var(--soft); padding: 42px 18px; }

/* ---- a run ---- */
.facts { display: flex; flex-wrap: wrap; gap: 4px 22px; color: var(--soft); font-size: 13px;
  margin-top: 8px; }
.facts b { color: var(--ink); font-weight: 560; }
.progress { margin-top: 14px; } .progress .meter { height: 9px; }
.legend { display: flex; flex-wrap: wrap; gap: 5px 14px; margin-top: 8px; font-size: 12px;
  color: var(--soft); }
.legend span::before { content: ""; display: inline-block; width: 8px; height: 8px; border-radius: 3px;
  background: var(--c); margin-right: 5px; }
.tabs { display: flex; gap: 2px; padding: 8px 10px 0; border-bottom: 1px solid var(--line);
  align-items: flex-end; flex-wrap: wrap; }
.tabs [role="tab"] { border: 0; background: none; border-radius: 8px 8px 0 0; color: var(--soft);
  padding: 7px 13px 9px; border-bottom: 2px solid transparent; }
.tabs [role="tab"][aria-selected="true"] { color: var(--ink); border-bottom-color: var(--accent); }
.tabs .title { padding: 8px 8px 14px; }
.tabs .room { flex: 1; min-width: 0; }
.tabs .tools { display: flex; gap: 6px; align-items: center; justify-content: flex-end;
  padding-bottom: 7px; min-width: 0; }
.tabs .tools input { width: 190px; min-width: 0; }
.split { display: flex; align-items: stretch; }
.split > .left { flex: 1; min-width: 0; }

/* ---- graph ---- */
.graph { display: block; width: 100%; height: var(--tall); touch-action: none; cursor: grab;
  user-select: none;
  background-image: radial-gradient(var(--line) 1px, transparent 1px); background-size: 22px 22px;
    border-radius: 0 0 12px 12px; }
.graph.drag { cursor: grabbing; }
.edge { fill: none; stroke: var(--faint); stroke-width: 1.3; opacity: .42; }
.edge.on { stroke: var(--accent); stroke-width: 2.2; opacity: 1; }
.edge.critical { stroke-width: 2.2; opacity: .75; }
.node { cursor: pointer; outline: none; }
.node rect { fill: color-mix(in srgb, var(--c) 11%, var(--surface)); stroke: color-mix(in srgb,
  var(--c) 60%, var(--line)); stroke-width: 1.3; }
.node .dot { fill: var(--c); stroke: none; }
.node text { fill: var(--ink); font-size: 12.5px; font-weight: 540; }
.node .mark { fill: var(--surface); font-size: 10px; font-weight: 800; text-anchor: middle; }
.node .count { fill: var(--soft); font-size: 11px; text-anchor: end; }
.node.s-running rect { stroke: var(--c); stroke-width: 2; } .node.s-running .dot {
  animation: pulse 1.4s ease-in-out infinite; }
.node.s-pending text { fill: var(--soft); }
.node:hover rect { stroke: var(--c); stroke-width: 2; }
.node:focus-visible rect, .node.on rect { stroke: var(--accent); stroke-width: 2.6; }
.far .node text, .far .node .dot { display: none; } .far .node rect { fill: var(--c); stroke: none; }
.far .edge { stroke-width: 2.4; opacity: .22; }
.dim .node:not(.hit):not(.on) { opacity: .18; } .dim .edge:not(.on) { opacity: .08; }

/* ---- Gantt chart ---- */
.gantt { max-height: var(--tall); overflow: auto; overflow-x: hidden; border-radius: 0 0 12px 12px; }
.gantt svg { display: block; width: 100%; }
.gantt .axis { position: sticky; top: 0; background: var(--surface); border-bottom: 1px solid var(--line);
  z-index: 1; }
.gantt text { fill: var(--soft); font-size: 11px; } .gantt .label { fill: var(--ink); font-size: 12px; }
.gantt .grid { stroke: var(--line); } .gantt .now { stroke: var(--accent); stroke-dasharray: 3 3; }
.gantt .span { fill: var(--c); } .gantt .span.retry { opacity: .55; } .gantt .line { cursor: pointer;
  outline: none; }
.gantt .line .back { fill: transparent; } .gantt .line:hover .back, .gantt .line:focus-visible .back,
  .gantt .line.on .back { fill: var(--hover); }
.gantt .line.off { display: none; }

/* ---- a task ---- */
.drawer { width: 460px; flex: none; border-left: 1px solid var(--line); display: flex;
  flex-direction: column; outline: none; min-width: 0;
  height: var(--tall); min-height: 0; overflow: auto; overscroll-behavior: contain;
    background: var(--surface); border-radius: 0 0 12px 0; }
.drawer > * { padding: 12px 16px; border-bottom: 1px solid var(--line); } .drawer > :last-child {
  border-bottom: 0; }
.drawer h3 { color: var(--soft); font-weight: 600; margin-bottom: 6px; }
dl { display: grid; grid-template-columns: auto 1fr; gap: 3px 14px; margin: 8px 0 0; font-size: 13px; }
dt { color: var(--faint); } dd { margin: 0; }
.json { background: var(--code); border-radius: 8px; padding: 9px 12px; margin: 0; max-height: 220px;
  overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
.log { background: #10151f; color: #d5dceb; border: 1px solid var(--line); border-radius: 8px;
  padding: 10px 12px; margin: 6px 0 0;
  min-height: 110px; max-height: 300px; overflow: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; line-height: 1.5; tab-size: 4; }
.attempts { display: flex; gap: 6px; flex-wrap: wrap; } .attempts button { min-height: 28px;
  padding: 2px 9px; font-size: 12px; }
.attempts [aria-pressed="true"] { border-color: var(--accent); background: color-mix(in srgb,
  var(--accent) 10%, var(--surface)); }

/* ---- dialogs, messages ---- */
dialog { border: 1px solid var(--line); border-radius: 14px; background: var(--raised); color: var(--ink);
  padding: 0; width: min(560px, calc(100vw - 24px));
  box-shadow: 0 20px 60px rgba(0, 0, 0, .3); max-height: calc(100dvh - 24px); }
dialog::backdrop { background: rgba(10, 14, 24, .45); }
dialog form { display: flex; flex-direction: column; gap: 14px; padding: 20px 22px; }
.field { display: flex; flex-direction: column; gap: 3px; } .field > label { font-weight: 560; }
.field input:not([type="checkbox"]), .field select { width: 100%; }
.field .wrong { color: var(--failed); font-size: 12px; margin: 0; } .field .req { color: var(--failed); }
.check { display: flex; align-items: center; gap: 8px; }
.toasts { position: fixed; bottom: 18px; left: 50%; transform: translateX(-50%); z-index: 10;
  display: flex; flex-direction: column; gap: 8px; width: max-content;
  max-width: calc(100vw - 24px); }
.toast { background: var(--ink); color: var(--bg); border-radius: 9px; padding: 9px 15px;
  box-shadow: var(--shadow); overflow-wrap: anywhere; }
.toast.bad { background: var(--failed); color: #fff; }

/* ---- a narrow screen; less motion ---- */
@media (max-width: 900px) {
  .split { display: block; }
  .drawer { position: fixed; inset: 0; z-index: 5; width: auto; height: auto; border: 0; border-radius: 0; }
}
@media (max-width: 640px) {
  main { padding: 16px 12px 40px; } .bar { padding: 0 12px; } .bar .brand { margin-right: 4px; }
  .bar .brand span, .live span { display: none; }
  .wide { display: none; } td, th { padding: 8px 10px; } :root { --tall: max(320px, 66vh); }
  .tabs .room { flex: 1 0 100%; } .tabs .tools input { flex: 1; }
  .tabs [role="tab"] { padding: 7px 9px 9px; } td .meter { width: 60px; }
}
@media (prefers-reduced-motion: reduce) { * { animation: none !important; transition: none !important; } }
</style>
</head>
<body>
<a class="skip" href="#main">to the content</a>
<header class="bar">
<a class="brand" href="#/"><img src="icon.svg" alt=""><span>MiniFlow</span></a>
<nav aria-label="views"><a href="#/" data-nav="">Flows</a><a href="#/runs" data-nav="runs">Runs</a></nav>
<span class="live" id="live" role="status"><span>offline</span></span>
<button class="plain" id="theme" aria-label="light or dark">◐</button>
</header>
<main id="main" tabindex="-1"></main>
<div class="toasts" id="toasts" role="status" aria-live="polite"></div>
<noscript>This page needs JavaScript; the same can be had by: miniflow list, runs, show, logs.</noscript>
<script>
"use strict";
// ---- state: what the page knows ----

const STATES = ["success", "cached", "skipped", "running", "retrying", "failed", "upstream_failed",
  "cancelled",
  "interrupted", "pending"];
const MARKS = {success: "✓", cached: "≡", skipped: "–", running: "▸", retrying: "↻", failed: "✕",
  upstream_failed: "✕",
  cancelled: "■", interrupted: "!", pending: ""};
const app = {token: "", view: null, stop: new AbortController(), returnTo: null};
const $ = (id) => document.getElementById(id);

function readToken() {
  const given = /^#token=(.+)$/.exec(location.hash);
  if (given) {
    app.token = decodeURIComponent(given[1]);
    sessionStorage.setItem("token", app.token);
    history.replaceState(null, "", location.pathname + "#/");
  }
  app.token = app.token || sessionStorage.getItem("token") || "";
}

function place() { // where the reader is: #/runs/ID/gantt/TASK
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  return {parts: path.split("/").map(decodeURIComponent), query: new URLSearchParams(query || "")};
}

const link = (...parts) => "#/" + parts.map(encodeURIComponent).join("/");
const enc = encodeURIComponent;
const seconds = (text) => text ? Date.parse(text) / 1000 : null;

// ---- fetch: what the API says ----

async function ask(path, options = {}) {
  const answer = await fetch("." + path, {...options,
    headers: {Authorization: "Bearer " + app.token, ...options.headers}});
  if (answer.status === 401) {
    askForToken();
    throw new Error("the token is missing or wrong");
  }
  if (!answer.ok) {
    const told = await answer.json().catch(() => ({error: answer.statusText, problems: []}));
    throw Object.assign(new Error(told.error), {problems: told.problems || [], status: answer.status});
  }
  return answer;
}

const get = async (path, signal) => (await ask(path, {signal})).json();

const post = async (path, body) => (await ask(path, {
  method: "POST", body: JSON.stringify(body), headers: {"Content-Type": "application/json"}})).json();

async function follow(path, take, signal, ended) { // server-sent events; EventSource could not send the token
  let last = null, pause = 500;
  while (!signal.aborted) {
    try {
      const answer = await ask(path, {signal, headers: last === null ? {} : {"Last-Event-ID": last}});
      setLive(true);
      pause = 500;
      if (answer.status === 200) {
        const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
        for (let rest = ""; ;) {
          const {done, value} = await reader.read();
          if (done) break;
          const parts = (rest + value).split("\n\n");
          rest = parts.pop();
          for (const part of parts) {
            const data = /^data: (.*)$/m.exec(part), id = /^id: (.*)$/m.exec(part);
            if (id) last = id[1];
            if (data) take(JSON.parse(data[1]));
          }
        }
      }
      if (ended && !signal.aborted) return ended();
    } catch (error) {
      if (signal.aborted) return;
      setLive(false);
      pause = Math.min(pause * 2, 10000);
    }
    await new Promise((go) => setTimeout(go, pause));
  }
}

// ---- draw: small things ----

const SVG = new Set(["svg", "g", "path", "rect", "circle", "text", "line", "title"]);

function el(tag, attrs, ...kids) { // the only way in which the page is made: text stays text
  const made = SVG.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attrs || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, text] of Object.entries(value)) made.style.setProperty(key,
      text);
    else made.setAttribute(name, value === true ? "" : value);
  }
  for (const kid of kids.flat(Infinity)) {
    if (kid !== null && kid !== undefined && kid !== false) made.append(kid instanceof Node ? kid
      : String(kid));
  }
  return made;
}

function fill(parent, ...kids) { // replaces what is there; the keyboard stays where it was
  const key = parent.contains(document.activeElement) && document.activeElement.dataset.key;
  parent.replaceChildren(...kids.flat(Infinity).filter((kid) => kid !== null && kid !== undefined
    && kid !== false));
  if (key) [...parent.querySelectorAll("[data-key]")].find((found) => found.dataset.key === key)?.focus();
}

function toast(text, bad) {
  const made = el("div", {class: "toast" + (bad ? " bad" : "")}, text);
  $("toasts").append(made);
  setTimeout(() => made.remove(), bad ? 7000 : 3500);
}

const complain = (error) => { if (error.name !== "AbortError") toast(
  [error.message, ...(error.problems || []).filter(
  (line) => line !== error.message)].join("\n"), true); };

function setLive(on) {
  $("live").className = "live" + (on ? " on" : "");
  $("live").firstChild.textContent = on ? "live" : "offline";
}

function span(value) {
  if (value === null || value === undefined) return "–";
  if (value < 10) return value.toFixed(2) + " s";
  if (value < 60) return value.toFixed(1) + " s";
  if (value < 3600) return Math.floor(value / 60) + " min " + Math.floor(value % 60) + " s";
  if (value < 86400) return Math.floor(value / 3600) + " h " + Math.floor(value % 3600 / 60) + " min";
  return Math.floor(value / 86400) + " d " + Math.floor(value % 86400 / 3600) + " h";
}

function ago(text) {
  if (!text) return "never";
  const past = Date.now() / 1000 - seconds(text);
  if (Math.abs(past) < 5) return "now";
  const rounded = Math.abs(past) < 60 ? Math.round(Math.abs(past)) + " s"
    : Math.abs(past) < 3600 ? Math.round(Math.abs(past) / 60) + " min"
    : Math.abs(past) < 86400 ? Math.round(Math.abs(past) / 3600) + " h"
      : Math.round(Math.abs(past) / 86400) + " d";
  return past > 0 ? rounded + " ago" : "in " + rounded;
}

const when = (text) => el("time", {datetime: text || "", title: text ? new Date(text).toLocaleString()
  : ""}, ago(text));
const chip = (status) => el("span", {class: "chip s-" + status}, status.replace("_", " "));
const spent = (head) => head.duration_s ?? (head.started && head.status === "running"
  ? Date.now() / 1000 - seconds(head.started) : null);

function meter(counts) {
  const total = Object.values(counts).reduce((sum, n) => sum + n, 0);
  const said = STATES.filter((state) => counts[state]).map((state) => `${counts[state]} ${state}`).join(", ");
  return el("div", {class: "meter", role: "img", "aria-label": said || "no tasks", title: said},
    STATES.filter((state) => counts[state] && state !== "pending").map((state) =>
      el("i", {class: "s-" + state, style: {"flex-grow": counts[state]}})),
    el("b", {style: {"flex-grow": total ? counts.pending || 0 : 1}}));
}

const shownJson = (value) => el("pre", {class: "json", tabindex: "0"}, typeof value === "string" ? value
  : JSON.stringify(value, null, 2));

// ---- draw: flows ----

function flowCard(flow) {
  const longest = Math.max(...flow.recent.map((head) => spent(head) || 0), 0.001);
  const bars = [...flow.recent].reverse().map((head) =>
    el("a", {class: "s-" + head.status, href: link("runs", head.id),
    style: {height: Math.max(18, 100 * (spent(head) || 0) / longest) + "%"}, "data-key": "spark " + head.id,
    "aria-label": `run ${head.id}: ${head.status}`,
      title: `${head.id}\n${head.status}, ${span(spent(head))}, ${ago(head.started)}`}));
  const next = (flow.next || [])[0];
  return el("article", {class: "card flow"},
    el("div", {class: "row"}, el("a", {class: "name grow", href: link("flows", flow.name),
      "data-key": "flow " + flow.name}, flow.name,
      flow.flow_name && flow.flow_name !== flow.name ? ` (${flow.flow_name})` : ""),
      flow.error ? el("span", {class: "chip s-failed"}, "broken")
        : el("button", {class: "go", "aria-label": "start " + flow.name, "data-key": "start " + flow.name,
          onclick: () => startDialog(flow)}, "▶ start")),
    flow.error ? el("pre", {class: "trouble"}, flow.error.slice(0, 4).join("\n"))
      : el("p", {class: "about"}, flow.description || "no description"),
    el("div", {class: "row small faint"}, flow.tasks !== null
      && el("span", null, flow.tasks + (flow.tasks === 1 ? " task" : " tasks")),
      flow.version && el("span", null, "version " + flow.version), (flow.tags || [])
        .map((tag) => el("span", {class: "tag"}, tag)),
      next && el("span", {title: flow.next.map((at) => new Date(at).toLocaleString()).join("\n")}, "next ",
        when(next))),
    el("div", {class: "row foot"}, el("div", {class: "spark", "aria-label": "latest runs"}, bars.length
      ? bars : el("span", {class: "none"})),
      flow.last_run ? el("span", {class: "row small soft"}, chip(flow.last_run.status),
        when(flow.last_run.started))
        : el("span", {class: "small faint"}, "never ran")));
}

function runRows(heads, withFlow) {
  return el("div", {class: "table"}, el("table", null,
    el("thead", null, el("tr", null, el("th", {scope: "col"}, "run"), withFlow
      && el("th", {scope: "col", class: "wide"}, "flow"),
      el("th", {scope: "col"}, "status"), el("th", {scope: "col", class: "wide"}, "tasks"),
        el("th", {scope: "col"}, "started"),
      el("th", {scope: "col", class: "wide"}, "duration"))),
    el("tbody", null, heads.map((head) => el("tr", null,
      el("td", null, el("a", {class: "mono", href: link("runs", head.id), "data-key": head.id}, head.id)),
      withFlow && el("td", {class: "wide"}, head.flow ? el("a", {href: link("flows", head.flow)}, head.flow)
        : "–"),
      el("td", null, chip(head.status)), el("td", {class: "wide"}, meter(head.tasks)),
        el("td", {class: "small soft"}, when(head.started)),
      el("td", {class: "wide num small soft"}, span(spent(head))))))));
}

async function flowsView(main, signal) {
  const list = el("div", {class: "flows"}), runs = el("div");
  main.append(el("div", {class: "row"}, el("h1", {class: "grow"}, "Flows")), el("div", {class: "gap"}, list),
    el("div", {class: "row gap"}, el("h2", {class: "grow"}, "Latest runs"),
      el("a", {href: "#/runs"}, "all runs")),
    el("div", {class: "card gap"}, runs));
  const draw = async () => {
    const [flows, latest] = await Promise.all(
      [get("/api/v1/flows?limit=1000", signal), get("/api/v1/runs?limit=8", signal)]);
    fill(list, flows.flows.length ? flows.flows.map(flowCard)
      : el("p", {class: "soft"}, "no flows yet; make an example: miniflow init"));
    fill(runs, latest.runs.length ? runRows(latest.runs, true)
      : el("p", {class: "empty"}, "nothing ran yet: start a flow"));
  };
  await refreshing(draw, signal);
}

async function runsView(main, signal, query) {
  const list = el("div"), size = 25;
  const chosen = {flow: query.get("flow") || "", status: query.get("status") || "",
    offset: Number(query.get("offset")) || 0};
  const go = (change) => { location.hash = "#/runs?" + new URLSearchParams(
    {...chosen, offset: 0, ...change}); };
  const flows = (await get("/api/v1/flows?limit=1000", signal)).flows.map((flow) => flow.name);
  const pick = (name, words, label) => el("select",
    {"aria-label": label, "data-key": name, onchange: (event) => go({[name]: event.target.value})},
    el("option", {value: ""}, label), words.map((word) =>
      el("option", {value: word, selected: word === chosen[name]}, word)));
  main.append(el("div", {class: "row"}, el("h1", {class: "grow"}, "Runs"), pick("flow", flows, "every flow"),
    pick("status", ["running", "success", "failed", "cancelled", "interrupted"], "every status")),
      el("div", {class: "card gap"}, list));
  await refreshing(async () => {
    const asked = new URLSearchParams({limit: size, offset: chosen.offset});
    for (const name of ["flow", "status"]) if (chosen[name]) asked.set(name, chosen[name]);
    const found = await get("/api/v1/runs?" + asked, signal);
    fill(list, found.runs.length ? runRows(found.runs, true) : el("p", {class: "empty"}, "no such runs"),
      found.total > size && el("div", {class: "row pad"}, el("span", {class: "grow small soft num"},
        `${found.offset + 1} to ${found.offset + found.runs.length} of ${found.total}`),
        el("button", {"data-key": "newer", disabled: !found.offset, onclick: () =>
          go({offset: Math.max(0, chosen.offset - size)})}, "newer"),
        el("button", {"data-key": "older", disabled: found.offset + size >= found.total, onclick: () =>
          go({offset: chosen.offset + size})}, "older")));
  }, signal);
}

async function flowView(main, signal, name) {
  const head = el("div"), problems = el("div"), picture = el("div", {class: "card gap"}),
    runs = el("div", {class: "card gap"});
  main.append(head, problems, picture, el("h2", {class: "gap"}, "Runs"), runs);
  let drawn = "";
  await refreshing(async () => {
    const [flow, latest] = await Promise.all([get(`/api/v1/flows/${enc(name)}`, signal),
      get(`/api/v1/runs?limit=15&flow=${enc(name)}`, signal)]);
    fill(head, el("div", {class: "row"}, el("h1", {class: "grow"}, flow.name),
      !flow.error && el("button", {class: "primary", "data-key": "start", onclick: () => startDialog(flow)},
        "▶ start")),
      el("p", {class: "soft"}, flow.description || ""), el("div", {class: "row small faint"},
        flow.tasks !== null && el("span", null, flow.tasks + " tasks"), flow.version
          && el("span", null, "version " + flow.version),
        (flow.tags || []).map((tag) => el("span", {class: "tag"}, tag)),
        (flow.next || []).length > 0 && el("span", null, "next: ", flow.next.slice(0, 3)
          .map((at, n) => [n ? ", " : "", when(at)]))));
    fill(problems, flow.error && el("pre", {class: "trouble gap"}, flow.error.join("\n")));
    fill(runs, latest.runs.length ? runRows(latest.runs, false) : el("p", {class: "empty"}, "it never ran"));
    const text = JSON.stringify(flow.definition);
    picture.hidden = !flow.definition;
    if (flow.definition && text !== drawn) {
      drawn = text;
      const graph = makeGraph(tasksOf(flow.definition), () => {});
      fill(picture, el("div", {class: "tabs"}, el("h2", {class: "title"}, "Graph"),
        el("div", {class: "room"}, graph.tools)), graph.svg);
      graph.fit();
    }
  }, signal);
}

async function refreshing(draw, signal) { // draws now, and again a moment after something has happened
  let timer = null;
  await draw();
  follow("/api/v1/events", () => {
    timer = timer || setTimeout(() => { timer = null; draw().catch(complain); }, 600);
  }, signal);
  const beat = setInterval(() => draw().catch(() => {}), 30000);
  signal.addEventListener("abort", () => { clearInterval(beat); clearTimeout(timer); });
}

// ---- draw: a graph ----

function tasksOf(definition) { // the tasks of a flow and its handlers, each with what it waits for
  const found = (definition.tasks || []).map((task) =>
    ({id: task.id, up: task.depends_on || [], many: Boolean(task.foreach || task.matrix), task}));
  const waited = new Set(found.flatMap((task) => task.up));
  let ends = found.filter((task) => !waited.has(task.id)).map((task) => task.id);
  for (const field of ["on_success", "on_failure", "finally"]) {
    const task = definition[field];
    if (!task) continue;
    found.push({id: task.id || field, up: field === "finally" && found.some((one) => one.handler)
      ? found.filter((one) => one.handler).map((one) => one.id) : ends, handler: field, task});
  }
  return found;
}

const NODE = {height: 34, across: 56, down: 16};

function layOut(tasks) { // in layers by the longest way to each task; in a layer, near to what it hangs on
  const at = new Map(tasks.map((task) => [task.id,
    {...task, up: task.up.filter((up) => up !== task.id), down: [], rank: 0}]));
  for (const node of at.values()) node.up = node.up.filter((up) => at.has(up));
  for (const node of at.values()) for (const up of node.up) at.get(up).down.push(node.id);
  const waits = new Map([...at.values()].map((node) => [node.id, node.up.length]));
  const ready = [...at.values()].filter((node) => !node.up.length);
  for (let n = 0; n < ready.length; n++) {
    for (const id of ready[n].down) {
      const below = at.get(id);
      below.rank = Math.max(below.rank, ready[n].rank + 1);
      waits.set(id, waits.get(id) - 1);
      if (!waits.get(id)) ready.push(below);
    }
  }
  const layers = [];
  for (const node of at.values()) (layers[node.rank] = layers[node.rank] || []).push(node);
  const number = () => { for (const layer of layers) layer.forEach((node, n) =>
    { node.n = (n + 0.5) / layer.length; }); };
  number();
  for (let sweep = 0; sweep < 8; sweep++) {
    const side = sweep % 2 ? "down" : "up";
    for (const layer of sweep % 2 ? [...layers].reverse() : layers) {
      for (const node of layer) {
        const near = node[side].map((id) => at.get(id).n);
        node.key = near.length ? near.reduce((sum, n) => sum + n, 0) / near.length : node.n;
      }
      layer.sort((a, b) => a.key - b.key);
      layer.forEach((node, n) => { node.n = (n + 0.5) / layer.length; });
    }
  }
  const upright = innerWidth < 640;
  const longest = Math.max(...tasks.map((task) => task.id.length + (task.many ? 5 : 0)));
  const width = Math.min(190, Math.max(84, longest * 7.6 + 48));
  const most = upright ? Math.max(2, Math.ceil(Math.sqrt(tasks.length) / 2.5))
    : Math.max(9, Math.ceil(Math.sqrt(tasks.length) * 1.25));
  let along = 0;
  // a layer of many tasks is folded into lines; on a narrow screen layers go downwards
  for (const layer of layers) {
    const lines = Math.ceil(layer.length / most), per = Math.ceil(layer.length / lines);
    layer.forEach((node, n) => {
      const line = Math.floor(n / per), inLine = Math.min(per, layer.length - line * per),
        side = n % per - (inLine - 1) / 2;
      node.x = upright ? side * (width + 18) : along + line * (width + 16);
      node.y = upright ? along + line * (NODE.height + 12) : side * (NODE.height + NODE.down);
    });
    along += upright ? lines * (NODE.height + 12) + 30
      : lines * (width + 16) - 16 + NODE.across + Math.min(60, layer.length * 2);
  }
  const nodes = [...at.values()], high = Math.max(...nodes.map((node) => node.y)) - Math.min(
    ...nodes.map((node) => node.y)) + NODE.height;
  const spread = upright ? 1 : Math.min(1.9, Math.max(1, along / high / 2.6));
  for (const node of nodes) node.y *= spread;
  return {nodes, width, upright};
}

function makeGraph(tasks, choose) {
  const {nodes, width, upright} = layOut(tasks), at = new Map(nodes.map((node) => [node.id, node]));
  const inner = el("g"), svg = el("svg", {class: "graph", role: "group",
    "aria-label": "graph of the tasks; arrow keys move, + and - zoom", tabindex: "0"}, inner);
  const edges = [];
  for (const node of nodes) for (const up of node.up) {
    const from = at.get(up), x1 = from.x + (upright ? width / 2 : width),
      y1 = from.y + (upright ? NODE.height : NODE.height / 2);
    const x2 = node.x + (upright ? width / 2 : 0), y2 = node.y + (upright ? 0 : NODE.height / 2);
    const bend = Math.max(20, Math.min(120, (upright ? y2 - y1 : x2 - x1) / 2));
    const path = el("path", {class: "edge", d: upright
      ? `M${x1} ${y1}C${x1} ${y1 + bend} ${x2} ${y2 - bend} ${x2} ${y2}`
      : `M${x1} ${y1}C${x1 + bend} ${y1} ${x2 - bend} ${y2} ${x2} ${y2}`});
    edges.push({from: up, to: node.id, path});
    inner.append(path);
  }
  for (const node of nodes) {
    const letters = Math.floor((width - 42) / 7.4), short = node.id.length > letters
      ? node.id.slice(0, letters - 1) + "…" : node.id;
    node.mark = el("text", {class: "mark", x: 17, y: 20.5});
    node.count = el("text", {class: "count", x: width - 9, y: 21.5});
    node.tip = el("title", null, node.id);
    node.g = el("g", {class: "node s-pending", tabindex: "0", role: "button",
      transform: `translate(${node.x} ${node.y})`, "data-task": node.id,
      onclick: () => choose(node.id), onfocus: () => light(node.id), onblur: () => light(null),
      onpointerenter: () => light(node.id), onpointerleave: () => light(null),
      onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault();
        choose(node.id); } }},
      node.tip, el("rect", {width: width, height: NODE.height, rx: 9}),
        el("circle", {class: "dot", cx: 17, cy: 17, r: 8}), node.mark,
      el("text", {x: 32, y: 21.5}, short), node.count);
    inner.append(node.g);
  }
  let scale = 1, dx = 0, dy = 0, chosen = null, touched = false;
  const draw = () => {
    inner.setAttribute("transform", `translate(${dx} ${dy}) scale(${scale})`);
    svg.classList.toggle("far", scale < 0.36);
  };
  const light = (id) => { for (const edge of edges) edge.path.classList.toggle("on",
    edge.from === (id || chosen) || edge.to === (id || chosen)); };
  const fit = () => {
    const box = svg.getBoundingClientRect();
    if (!nodes.length || !box.width) return;
    const left = Math.min(...nodes.map((n) => n.x)), right = Math.max(...nodes.map((n) => n.x)) + width;
    const top = Math.min(...nodes.map((n) => n.y)), bottom = Math.max(...nodes.map((n) => n.y)) + NODE.height;
    scale = Math.min(upright ? 1 : 1.15, (box.width - 36) / (right - left),
      (box.height - 36) / (bottom - top));
    dx = (box.width - (right + left) * scale) / 2;
    dy = (box.height - (bottom + top) * scale) / 2;
    draw();
  };
  const zoom = (factor, x, y) => {
    const box = svg.getBoundingClientRect(), to = Math.min(3, Math.max(0.05, scale * factor));
    const px = x === undefined ? box.width / 2 : x - box.left, py = y === undefined ? box.height / 2
      : y - box.top;
    dx = px - (px - dx) * to / scale;
    dy = py - (py - dy) * to / scale;
    scale = to;
    touched = true;
    draw();
  };
  const centre = (id) => {
    const node = at.get(id), box = svg.getBoundingClientRect();
    if (!node) return;
    scale = Math.max(scale, 0.8);
    dx = box.width / 2 - (node.x + width / 2) * scale;
    dy = box.height / 2 - (node.y + NODE.height / 2) * scale;
    touched = true;
    draw();
  };
  const pointers = new Map();
  let moved = 0;
  svg.addEventListener("wheel", (event) => { event.preventDefault();
    zoom(Math.exp(-event.deltaY * 0.0015), event.clientX, event.clientY); }, {passive: false});
  svg.addEventListener("pointerdown", (event) => { pointers.set(event.pointerId, event); moved = 0; });
  svg.addEventListener("pointermove", (event) => {
    const before = pointers.get(event.pointerId);
    if (!before) return;
    const other = [...pointers.values()].find((one) => one.pointerId !== event.pointerId);
    if (other) {
      const far = (one) => Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY);
      zoom(far(event) / Math.max(1, far(before)), (event.clientX + other.clientX) / 2,
        (event.clientY + other.clientY) / 2);
    } else {
      moved += Math.abs(event.clientX - before.clientX) + Math.abs(event.clientY - before.clientY);
      if (moved > 4) {
        if (!svg.hasPointerCapture(event.pointerId)) svg.setPointerCapture(event.pointerId);
        svg.classList.add("drag");
        touched = true;
        dx += event.clientX - before.clientX;
        dy += event.clientY - before.clientY;
        draw();
      }
    }
    pointers.set(event.pointerId, event);
  });
  for (const word of ["pointerup", "pointercancel"]) svg.addEventListener(word, (event) =>
    { pointers.delete(event.pointerId); svg.classList.remove("drag"); });
  svg.addEventListener("click", (event) => { if (moved > 4) event.stopPropagation(); }, true);
  svg.addEventListener("keydown", (event) => {
    const step = {ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60]}[event.key];
    if (step) { dx += step[0]; dy += step[1]; draw();
      } else if (event.key === "+" || event.key === "=") zoom(1.25);
    else if (event.key === "-") zoom(0.8); else if (event.key === "0") { touched = false; fit();
      } else return;
    event.preventDefault();
  });
  new ResizeObserver(() => { if (!touched) fit(); }).observe(svg);
  let hits = [], shownHit = 0;
  const search = el("input", {type: "search", placeholder: "find a task", "aria-label": "find a task",
    oninput: (event) => find(event.target.value),
    onkeydown: (event) => { if (event.key === "Enter"
      && hits.length) centre(hits[shownHit++ % hits.length]); }});
  const find = (text) => {
    const wanted = text.trim().toLowerCase();
    hits = wanted ? nodes.filter((node) => node.id.toLowerCase().includes(wanted)).map((node) => node.id)
      : [];
    shownHit = 0;
    svg.classList.toggle("dim", Boolean(wanted));
    for (const node of nodes) node.g.classList.toggle("hit", hits.includes(node.id));
  };
  const tools = el("div", {class: "tools"}, search,
    el("button", {"aria-label": "zoom in", onclick: () => zoom(1.3)}, "+"),
    el("button", {"aria-label": "zoom out", onclick: () => zoom(1 / 1.3)}, "−"),
      el("button", {"aria-label": "show all of the graph", onclick: () => { touched = false; fit(); }},
      "fit"));
  const paint = (id, status, note) => {
    const node = at.get(id);
    if (!node || node.painted === status + note) return;
    node.painted = status + note;
    node.g.setAttribute("class", "node s-" + status + (chosen === id ? " on" : "") + (hits.includes(id)
      ? " hit" : ""));
    node.g.setAttribute("aria-label", `${id}: ${status}`);
    node.tip.textContent = `${id}: ${status}${note ? " " + note : ""}`;
    node.mark.textContent = MARKS[status] || "";
    node.count.textContent = note || "";
  };
  const select = (id) => {
    for (const node of nodes) node.g.classList.toggle("on", node.id === id);
    chosen = id;
    light(null);
  };
  const critical = (path) => { for (const edge of edges) { const n = path.indexOf(edge.from);
    edge.path.classList.toggle("critical", n >= 0 && path[n + 1] === edge.to); } };
  for (const node of nodes) paint(node.id, "pending", "");
  const reveal = (id) => { if (id && scale < 0.6) centre(id); };
  return {svg, tools, fit, paint, select, critical, reveal};
}

// ---- draw: a Gantt chart ----

function makeGantt(choose) {
  const high = 24, axis = el("svg", {class: "axis", height: 28, "aria-hidden": "true"}),
    body = el("svg", {role: "group", "aria-label": "Gantt chart of the tasks"});
  const box = el("div", {class: "gantt", tabindex: "0", "aria-label": "Gantt chart"}, axis, body),
    lines = new Map();
  const grid = el("g"), now = el("line", {class: "now"});
  body.append(grid, now);
  const draw = (run) => {
    const width = box.clientWidth;
    if (!width) return;
    const names = Object.keys(run.tasks).filter((name) => run.tasks[name].attempts.length
      || run.tasks[name].started);
    const began = (name) => seconds((run.tasks[name].attempts[0] || run.tasks[name]).started);
    // instances follow the task that they are of
    const whole = (name) => name.replace(/\[\d+\]$/, ""), first = new Map();
    for (const name of names) first.set(whole(name),
      Math.min(began(name), first.get(whole(name)) ?? Infinity));
    names.sort((a, b) => first.get(whole(a)) - first.get(whole(b)) || whole(a).localeCompare(whole(b))
      || a.length - b.length || a.localeCompare(b));
    const left = Math.min(width < 600 ? 118 : 210, width / 3),
      start = Math.min(seconds(run.started), ...names.map(began));
    const clock = run.live ? Date.now() / 1000 : null;
    const ends = names.flatMap((name) => run.tasks[name].attempts.map((attempt) => seconds(attempt.finished)
      || clock || seconds(attempt.started)));
    const end = Math.max(start + 0.05, clock || 0, seconds(run.finished) || 0, ...ends);
    const x = (at) => left + (at - start) / (end - start) * (width - left - 16);
    body.setAttribute("height", Math.max(60, names.length * high + 8));
    const step = niceStep((end - start) / Math.max(2, Math.floor((width - left) / 95))), ticks = [];
    for (let at = 0; at <= end - start; at += step) ticks.push(at);
    fill(axis, ...ticks.map((at) => el("text", {x: x(start + at) + 3, y: 18}, tick(at, step))));
    fill(grid, ...ticks.map((at) => el("line",
      {class: "grid", x1: x(start + at), x2: x(start + at), y1: 0, y2: names.length * high + 8})));
    for (const [name, value] of Object.entries(
      {x1: x(end), x2: x(end), y1: 0, y2: clock ? names.length * high + 8 : 0})) now.setAttribute(name,
      value);
    names.forEach((name, n) => line(name, n, run, x, left, width, clock));
    for (const [name, made] of lines) if (!run.tasks[name]) { made.g.remove(); lines.delete(name); }
  };
  const line = (name, n, run, x, left, width, clock) => {
    const task = run.tasks[name], attempts = task.attempts.length ? task.attempts : [task];
    let made = lines.get(name);
    if (!made) {
      made = {label: el("text", {class: "label", x: 10, y: 16}),
        back: el("rect", {class: "back", height: high, x: 0, y: 0}), tip: el("title"), spans: el("g")};
      made.g = el("g", {class: "line", tabindex: "0", role: "button", onclick: () => choose(name),
        onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault();
          choose(name); } }}, made.tip, made.back, made.label, made.spans);
      lines.set(name, made);
      body.append(made.g);
    }
    const letters = Math.floor((left - 16) / 7.1), took = task.started
      ? (seconds(task.finished) || clock || seconds(task.started)) - seconds(task.started) : 0;
    made.g.setAttribute("transform", `translate(0 ${n * high + 4})`);
    made.g.setAttribute("aria-label", `${name}: ${task.status}, ${span(took)}`);
    made.tip.textContent = `${name}: ${task.status}${task.reason ? " (" + task.reason + ")" : ""}, ${span(
      took)}`;
    made.label.textContent = name.length > letters ? name.slice(0, letters - 1) + "…" : name;
    made.back.setAttribute("width", width);
    fill(made.spans, ...attempts.map((attempt, k) => {
      const from = x(seconds(attempt.started)),
        to = x(seconds(attempt.finished) || clock || seconds(attempt.started));
      return el("rect", {class: "span s-" + attempt.status + (k < attempts.length - 1 ? " retry" : ""),
        x: from, y: 5, height: high - 10, rx: 3, width: Math.max(2.5, to - from)});
    }));
  };
  const select = (id) => { for (const [name, made] of lines) made.g.classList.toggle("on", name === id); };
  return {box, draw, select};
}

function niceStep(rough) {
  for (const step of [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800,
    3600, 7200, 14400, 43200]) if (step >= rough) return step;
  return Math.ceil(rough / 86400) * 86400;
}

function tick(at, step) {
  if (step >= 86400) return Math.round(at / 86400) + " d";
  if (step >= 3600) return Math.round(at / 3600) + " h";
  if (step >= 60) return Math.round(at / 60) + " min";
  return at.toFixed(step < 0.1 ? 2 : step < 1 ? 1 : 0) + " s";
}

// ---- draw: a run ----

async function runView(main, signal, id, tab, task) {
  let run = await get(`/api/v1/runs/${enc(id)}`, signal);
  const head = el("div"), bar = el("div", {class: "progress"}), panel = el("div", {class: "left"}),
    side = el("aside", {class: "drawer", "aria-label": "task", tabindex: "-1", hidden: true});
  const tabs = el("div", {class: "tabs"}), list = el("div",
    {role: "tablist", "aria-label": "views of the run"}), tools = el("div", {class: "room"});
  const choose = (name) => { app.returnTo = document.activeElement;
    location.hash = link("runs", run.id, view.tab, name); };
  let graph = makeGraph(tasksOf(run.definition), choose);
  const gantt = makeGantt(choose), rows = el("div"), facts = el("div", {class: "pad"});
  const words = {graph: "Graph", gantt: "Gantt", tasks: "Tasks", data: "Data"};
  const buttons = Object.entries(words).map(([name, word]) =>
    el("button", {role: "tab", id: "tab-" + name, "aria-controls": "panel", "data-key": "tab-" + name,
    onclick: () => { location.hash = link("runs", run.id, name, ...(view.task ? [view.task] : [])); },
    onkeydown: (event) => {
      const by = {ArrowRight: 1, ArrowLeft: -1}[event.key], names = Object.keys(words);
      if (by) $("tab-" + names[(names.indexOf(name) + by + names.length) % names.length]).focus();
    }}, word));
  list.append(...buttons);
  tabs.append(list, tools);
  panel.id = "panel";
  panel.setAttribute("role", "tabpanel");
  main.append(head, bar, el("div", {class: "card gap"}, tabs, el("div", {class: "split"}, panel, side)));
  const view = {tab: "", task: "", closeTask: null};
  const status = (name) => run.tasks[name].status === "running" && !run.live ? "interrupted"
    : run.tasks[name].status;
  const counts = () => Object.keys(run.tasks).reduce((sum, name) =>
    { sum[status(name)] = (sum[status(name)] || 0) + 1; return sum; }, {});
  const note = (name) => {
    const many = Object.keys(run.tasks).filter((one) => one.startsWith(name + "["));
    return many.length ? `${many.filter((one) => ["success", "cached", "skipped"].includes(
      run.tasks[one].status)).length}/${many.length}` : "";
  };
  const drawHead = () => {
    document.title = `${run.status} · ${run.flow} · MiniFlow`;
    const act = (word) => async (event) => {
      event.target.disabled = true;
      try {
        await (word === "cancel" ? post(`/api/v1/runs/${enc(run.id)}/cancel`, {})
          : post(`/api/v1/runs/${enc(run.id)}/resume`, {}));
        toast(word === "cancel" ? "cancel: what runs is being stopped; once more stops it at once"
          : "resume: it goes on");
        if (word === "resume") setTimeout(show, 0);
          else setTimeout(() => { event.target.disabled = false; }, 800);
      } catch (error) { complain(error); event.target.disabled = false; }
    };
    fill(head, el("div", {class: "row"}, el("h1", {class: "mono grow"}, run.id), chip(run.status),
      run.live ? el("button", {class: "danger", "data-key": "cancel", onclick: act("cancel")}, "■ cancel")
        : run.status !== "success" && el("button",
          {class: "primary", "data-key": "resume", onclick: act("resume")}, "↻ resume")),
      el("div", {class: "facts num"}, el("span", null, "flow ",
        el("a", {href: link("flows", run.flow)}, run.flow)),
        el("span", null, "started ", el("b", null, when(run.started))),
          el("span", null, "took ", el("b", null, span(spent(run)))),
        run.parent && el("span", null, "part of ",
          el("a", {class: "mono", href: link("runs", run.parent.run)}, run.parent.run)),
        run.warnings > 0 && el("span", null, el("b", null, run.warnings), " tolerated failures"), run.reason
          && el("span", null, run.reason)));
  };
  const drawBar = () => {
    const found = counts();
    fill(bar, meter(found), el("div", {class: "legend num"}, STATES.filter((state) => found[state])
      .map((state) =>
      el("span", {class: "s-" + state}, `${found[state]} ${state.replace("_", " ")}`))));
  };
  const drawRows = () => fill(rows, el("div", {class: "table"}, el("table", null,
    el("thead", null, el("tr", null, ["task", "status", "attempts", "duration", "reason"].map((word, n) =>
      el("th", {scope: "col", class: n > 2 ? "wide" : null}, word)))),
    el("tbody", null, Object.entries(run.tasks).map(([name, one]) => el("tr", null,
      el("td", null, el("a", {href: link("runs", run.id, "tasks", name), "data-key": "task " + name},
        name)), el("td", null, chip(status(name))),
      el("td", {class: "num"}, one.attempts.length),
        el("td", {class: "num wide"}, span(one.duration_s ?? (one.status === "running" ? spent(one) : null))),
      el("td", {class: "soft wide"}, one.reason || "")))))));
  const drawFacts = () => fill(facts, el("h3", null, "params"), shownJson(run.params),
    el("h3", {class: "gap"}, "final context"), shownJson(run.ctx),
    (run.critical_path || []).length > 0 && [el("h3", {class: "gap"}, "critical path"),
      el("p", null, run.critical_path.join(" → "))]);
  const drawTab = () => {
    if (view.tab === "gantt") gantt.draw(run); else if (view.tab === "tasks") drawRows();
      else if (view.tab === "data") drawFacts();
  };
  const drawAll = () => {
    drawHead();
    drawBar();
    for (const name of Object.keys(run.tasks)) if (!/\[\d+\]$/.test(name)) graph.paint(name, status(name),
      note(name));
    graph.critical(run.live ? [] : run.critical_path || []);
    drawTab();
  };
  const showTab = (name) => {
    for (const button of buttons) {
      const on = button.id === "tab-" + name;
      button.setAttribute("aria-selected", on);
      button.tabIndex = on ? 0 : -1;
    }
    panel.setAttribute("aria-labelledby", "tab-" + name);
    view.tab = name;
    fill(tools, name === "graph" ? graph.tools : []);
    fill(panel, {graph: graph.svg, gantt: gantt.box, tasks: rows, data: facts}[name]);
    drawTab();
  };
  const showTask = (name) => {
    view.closeTask?.();
    view.closeTask = null;
    view.task = name && run.tasks[name] ? name : "";
    side.hidden = !view.task;
    graph.select(view.task.replace(/\[\d+\]$/, ""));
    gantt.select(view.task);
    if (view.task) {
      view.closeTask = taskDrawer(side, run, view.task, () =>
        { location.hash = link("runs", run.id, view.tab); });
      side.focus({preventScroll: true});
      requestAnimationFrame(() => requestAnimationFrame(() =>
        { if (view.tab === "graph") graph.reveal(view.task.replace(/\[\d+\]$/, "")); }));
    } else if (app.returnTo?.isConnected) app.returnTo.focus({preventScroll: true});
  };
  app.moved = (parts) => { // within the run, nothing is fetched anew
    if (parts[0] !== "runs" || parts[1] !== id) return false;
    if (view.tab !== (parts[2] || "graph")) showTab(words[parts[2]] ? parts[2] : "graph");
    if (view.task !== (parts[3] || "")) showTask(parts[3] || "");
    return true;
  };
  const load = async () => {
    const before = JSON.stringify(run.definition);
    run = await get(`/api/v1/runs/${enc(id)}`, signal);
    if (JSON.stringify(run.definition) !== before) { graph = makeGraph(tasksOf(run.definition), choose);
      showTab(view.tab); }
    drawAll();
    view.renew?.();
  };
  let timer = null, stale = false;
  const soon = () => { timer = timer || setTimeout(() => { timer = null; drawAll(); }, 120); };
  const take = (event) => {
    if (event.event === "state") {
      run.live = event.status === "running";
      if (Object.keys(event.tasks).some((name) => !run.tasks[name]
        || run.tasks[name].status !== event.tasks[name])) load().catch(complain);
    } else if (event.task && run.tasks[event.task]) {
      const one = run.tasks[event.task];
      run.live = true;
      run.status = "running";
      one.status = event.status;
      if (event.event === "attempt_started") {
        one.attempts[event.attempt - 1] = {status: "running", started: event.at, finished: null,
          reason: null, log: event.log};
        one.started = one.started || event.at;
        one.finished = null;
      } else if (event.event === "attempt_ended") {
        Object.assign(one.attempts[event.attempt - 1] || {},
          {status: event.status === "retrying" ? "failed" : event.status, finished: event.at,
          reason: event.reason});
      }
      if (!["pending", "running", "retrying"].includes(one.status)) Object.assign(one,
        {finished: event.at, reason: event.reason || null,
        duration_s: one.started ? seconds(event.at) - seconds(one.started) : null});
      if (event.event === "task_expanded") load().catch(complain);
      if (view.task === event.task) side.dispatchEvent(new Event("changed"));
      soon();
    } else if (event.event === "run_finished") { run.live = false; run.status = event.status;
      run.finished = event.at; soon(); }
  };
  const watch = () => follow(`/api/v1/runs/${enc(id)}/events`, take, signal, () =>
    load().then(() => { side.dispatchEvent(new Event("changed")); wake(); }).catch(complain));
  const wake = () => follow("/api/v1/events", (event) => { // somebody may resume it
    if (event.run === id && event.status === "running") show();
  }, signal);
  showTab(words[tab] ? tab : "graph");
  drawAll();
  requestAnimationFrame(graph.fit);
  showTask(task || "");
  if (run.live) watch(); else wake();
  const beat = setInterval(() => { if (run.live) { drawHead(); drawTab(); } }, 1000);
  const resized = () => drawTab();
  addEventListener("resize", resized);
  signal.addEventListener("abort", () => { clearInterval(beat); clearTimeout(timer);
    removeEventListener("resize", resized); view.closeTask?.(); app.moved = null; });
}

// ---- draw: a task ----

function taskDrawer(side, run, name, close) { // returns what ends it
  const over = new AbortController();
  let shownAttempt = null, log = null;
  const head = el("div"), attempts = el("div"), logPart = el("div"), data = el("div");
  side.replaceChildren(head, attempts, logPart, data);
  const draw = (one) => {
    fill(head, el("div", {class: "row"}, el("h2", {class: "grow mono"}, name),
      chip(one.status === "running" && !run.live ? "interrupted" : one.status),
      el("button", {class: "plain", "aria-label": "close", "data-key": "close", onclick: close}, "✕")),
      one.definition.description && el("p", {class: "soft"}, one.definition.description),
      el("dl", null, Object.entries({reason: one.reason, started: one.started && when(one.started),
        took: one.duration_s !== null && span(one.duration_s),
        action: actionOf(one.definition), "depends on": (one.definition.depends_on || []).join(", "),
          rule: one.definition.trigger_rule, if: one.definition.if})
        .filter(([, value]) => value).map(([word, value]) => [el("dt", null, word), el("dd", null, value)])),
      one.error && el("pre", {class: "trouble gap"}, one.error));
    const number = shownAttempt || one.attempts.length;
    fill(attempts, el("h3", null, "attempts"),
      el("div", {class: "attempts"}, one.attempts.length ? one.attempts.map((attempt, n) => el("button", {
      "aria-pressed": String(n + 1 === number), "data-key": "attempt " + n, title: attempt.reason || "",
        onclick: () => { shownAttempt = n + 1; log?.stop(); log = null; draw(one); }},
      `${n + 1}`, el("span", {class: "chip s-" + attempt.status}, attempt.status),
        attempt.duration_s !== null && attempt.duration_s !== undefined && span(attempt.duration_s)))
      : el("span", {class: "faint"}, "none yet")));
    const attempt = one.attempts[number - 1];
    if (attempt?.log && (!log || log.number !== number)) {
      log?.stop();
      log = followLog(logPart, run.id, name, number, over.signal);
    } else if (!attempt?.log) fill(logPart, el("h3", null, "log"),
      el("p", {class: "faint"}, attempt ? "it ran within its program and has no log of its own"
      : "it has not run"));
    fill(data, el("h3", null, "inputs"), Object.keys(one.inputs || {}).length
      ? el("dl", null, Object.entries(one.inputs).map(([key, from]) =>
      [el("dt", null, key), el("dd", null, "from ",
        el("a", {href: link("runs", run.id, place().parts[2] || "graph", from)}, from))]))
        : el("p", {class: "faint"}, "none"),
      el("h3", {class: "gap"}, "output"), one.output ? shownJson(one.output)
        : el("p", {class: "faint"}, "none"),
      el("h3", {class: "gap"}, "definition"), shownJson(one.definition));
  };
  const load = () => get(`/api/v1/runs/${enc(run.id)}/tasks/${enc(name)}`, over.signal).then(draw)
    .catch(complain);
  let timer = null;
  side.addEventListener("changed", () => { timer = timer
    || setTimeout(() => { timer = null; load(); }, 150); }, {signal: over.signal});
  side.addEventListener("keydown", (event) => { if (event.key === "Escape") close(); },
    {signal: over.signal});
  load();
  return () => { over.abort(); clearTimeout(timer); log?.stop(); side.replaceChildren(); };
}

function actionOf(task) {
  const word = ["script", "command", "function", "flow", "http", "wait_for"].find((one) =>
    task[one] !== undefined);
  const value = task[word];
  return word ? `${word} ${typeof value === "string" ? value : JSON.stringify(value)}` : "";
}

const ESCAPES = /\x1b\[[0-9;?]*[ -\/]*[@-~]|\x1b\][^\x07\x1b]*(\x07|\x1b\\)/g;
const CONTROLS = /[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]/g;

// the end of a log first, then what comes, then what came before
function followLog(parent, runId, task, number, signal) {
  const TAIL = 65536, MOST = 600000, out = el("pre",
    {class: "log", tabindex: "0", role: "log", "aria-label": `log of ${task}, attempt ${number}`});
  const info = el("span", {class: "grow small faint num"}),
    earlier = el("button", {class: "plain", hidden: true, onclick: () => before()}, "earlier");
  const keep = el("input", {type: "checkbox", checked: true, id: "follow-log"});
  fill(parent, el("div", {class: "row"}, el("h3", null, "log"), info, earlier,
    el("label", {class: "check small soft", for: "follow-log"}, keep, "follow")), out);
  let first = null, next = null, size = 0, stopped = false, timer = null, decoder = new TextDecoder();
  const path = `/api/v1/runs/${enc(runId)}/tasks/${enc(task)}/log?attempt=${number}`;
  const clean = (text) => text.replace(/\r\n/g, "\n").replace(ESCAPES, "").replace(CONTROLS, "");
  const tell = () => {
    earlier.hidden = !first;
    info.textContent = size ? `${size.toLocaleString()} bytes` + (first
      ? `, shown from ${first.toLocaleString()}` : "") : "";
  };
  const poll = async () => {
    try {
      const from = next === null ? -TAIL : next;
      const answer = await ask(`${path}&offset=${from}&limit=${TAIL}`, {signal});
      const bytes = await answer.arrayBuffer(), ended = answer.headers.get("X-Log-Ended") === "true";
      if (stopped) return;
      size = Number(answer.headers.get("X-Log-Size"));
      if (next === null) first = Math.max(0, size - TAIL);
      next = Number(answer.headers.get("X-Log-Next"));
      if (bytes.byteLength) {
        out.append(clean(decoder.decode(bytes, {stream: true})));
        while (out.textContent.length > MOST && out.childNodes.length > 1) out.firstChild.remove();
        if (keep.checked) out.scrollTop = out.scrollHeight;
      }
      tell();
      if (!size && ended) out.textContent = "(it said nothing)";
      if (next < size || !ended) timer = setTimeout(poll, next < size ? 0 : 700);
    } catch (error) {
      if (!stopped && error.name !== "AbortError") { info.textContent = error.message;
        timer = setTimeout(poll, 3000); }
    }
  };
  const before = async () => {
    const from = Math.max(0, first - TAIL);
    const answer = await ask(`${path}&offset=${from}&limit=${first - from}`, {signal});
    keep.checked = false;
    const tall = out.scrollHeight;
    out.prepend(clean(new TextDecoder().decode(await answer.arrayBuffer())));
    out.scrollTop = out.scrollHeight - tall;
    first = from;
    tell();
  };
  poll();
  return {number, stop: () => { stopped = true; clearTimeout(timer); }};
}

// ---- draw: dialogs ----

function kindOf(param) {
  const like = param.default ?? (param.enum || [])[0];
  return param.type || (typeof like === "boolean" ? "boolean" : typeof like === "number" ? "number"
    : Array.isArray(like) ? "array"
    : like !== null && typeof like === "object" ? "object" : "string");
}

// one param: its field, and how its value is read (undefined: not given)
function paramField(name, param, number) {
  const id = "param-" + number, kind = kindOf(param), start = param.default,
    given = {id, name, "aria-describedby": id + "-about"};
  let input, read;
  if (param.enum) {
    input = el("select", given, start === undefined && el("option", {value: ""}, "–"),
      param.enum.map((value, n) =>
      el("option", {value: n, selected: JSON.stringify(value) === JSON.stringify(start)},
        typeof value === "string" ? value : JSON.stringify(value))));
    read = () => input.value === "" ? undefined : param.enum[Number(input.value)];
  } else if (kind === "boolean") {
    if (start === undefined) {
      input = el("select", given, ["–", "true", "false"].map((word, n) => el("option", {value: n}, word)));
      read = () => input.value === "0" ? undefined : input.value === "1";
    } else {
      input = el("input", {...given, type: "checkbox", checked: start === true});
      read = () => input.checked;
    }
  } else if (kind === "integer" || kind === "number") {
    input = el("input", {...given, type: "number", step: kind === "integer" ? 1 : "any", min: param.min,
      max: param.max, value: start ?? ""});
    read = () => input.value === "" ? undefined : Number(input.value);
  } else if (kind === "array" || kind === "object") {
    input = el("textarea", {...given, rows: 3, spellcheck: "false"}, start === undefined ? ""
      : JSON.stringify(start, null, 1));
    read = () => input.value.trim() === "" ? undefined : JSON.parse(input.value);
  } else {
    const long = /[\r\n]/.test(start ?? "");
    input = long ? el("textarea", {...given, rows: 3, spellcheck: "false"}, start)
      : el("input", {...given, type: "text", value: start ?? "", pattern: null, autocomplete: "off"});
    const before = input.value;
    read = () => input.value === before ? (start ?? undefined) : input.value;
  }
  const bounds = [param.min !== undefined && "from " + param.min, param.max !== undefined
    && "to " + param.max, param.pattern && "matching " + param.pattern].filter(Boolean).join(" ");
  const wrong = el("p", {class: "wrong", role: "alert"});
  const label = el("label", {for: id}, name, param.required
    && el("span", {class: "req", title: "required"}, " *"), " ",
    el("span", {class: "small faint"}, kind, bounds ? ", " + bounds : ""));
  return {name, read, input, wrong, start, field: el("div", {class: "field"}, kind === "boolean"
    && !param.enum ? el("div", {class: "check"}, input, label) : [label, input],
    el("span", {class: "small soft", id: id + "-about"}, param.description || ""), wrong)};
}

function startDialog(flow) {
  const declared = flow.params;
  const fields = declared ? Object.entries(declared).map(([name, param], n) => paramField(name, param, n))
    : [];
  const free = declared ? null : paramField("params",
    {type: "object", description: "any params, as a JSON object"}, 0);
  const wrong = el("pre", {class: "trouble", role: "alert", hidden: true}),
    go = el("button", {class: "primary", type: "submit"}, "▶ start");
  const dialog = el("dialog", {"aria-label": "start " + flow.name},
    el("form", {method: "dialog", novalidate: true, onsubmit: (event) => { event.preventDefault(); send(); }},
    el("div", {class: "row"}, el("h2", {class: "grow"}, "start " + flow.name),
      el("button", {class: "plain", type: "button", "aria-label": "close", onclick: () => dialog.close()},
      "✕")),
    fields.map((one) => one.field), free && free.field, declared && !fields.length
      && el("p", {class: "soft"}, "this flow takes no params"), wrong,
    el("div", {class: "row"}, el("span", {class: "grow"}),
      el("button", {type: "button", onclick: () => dialog.close()}, "not now"), go)));
  const send = async () => {
    let bad = false, params = {};
    wrong.hidden = true;
    for (const one of [...fields, ...(free ? [free] : [])]) {
      one.wrong.textContent = "";
      one.input.removeAttribute("aria-invalid");
      try {
        const value = one.read();
        if (one === free) params = value || {};
        else if (value !== undefined && JSON.stringify(value) !== JSON.stringify(
          one.start)) params[one.name] = value;
      } catch (error) { one.wrong.textContent = "no JSON: " + error.message;
        one.input.setAttribute("aria-invalid", "true"); bad = true; }
    }
    if (bad) return;
    go.disabled = true;
    try {
      const found = await post(`/api/v1/flows/${enc(flow.name)}/validate`, {params});
      if (!found.valid) throw Object.assign(new Error("it can't be started"), found);
      const made = await post("/api/v1/runs", {flow: flow.name, params});
      dialog.close();
      location.hash = link("runs", made.id);
    } catch (error) {
      const rest = (error.problems || []).filter((line) => {
        const one = fields.find((field) => line.startsWith(`params.${field.name}:`)
          || line.startsWith(`params.${field.name}[`));
        if (one) { one.wrong.textContent = line.slice(line.indexOf(": ") + 2);
          one.input.setAttribute("aria-invalid", "true"); }
        return !one;
      });
      wrong.textContent = (error.problems || []).length ? rest.join("\n") : error.message;
      wrong.hidden = !wrong.textContent;
      dialog.querySelector("[aria-invalid]")?.focus();
      go.disabled = false;
    }
  };
  openDialog(dialog);
}

function openDialog(dialog) {
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}

function askForToken() {
  if ($("token-dialog")) return;
  const field = el("input", {id: "token", type: "password", autocomplete: "off", required: true});
  openDialog(el("dialog", {id: "token-dialog", "aria-label": "token"},
    el("form", {method: "dialog", onsubmit: () => {
    app.token = field.value.trim();
    sessionStorage.setItem("token", app.token);
    show();
  }}, el("h2", null, "Who is there?"), el("p", {class: "soft"},
    "Give the token: MINIFLOW_TOKEN of the server, or open the address that miniflow serve printed."),
    el("div", {class: "field"}, el("label", {for: "token"}, "token"), field),
      el("div", {class: "row"}, el("span", {class: "grow"}), el("button", {class: "primary"}, "go on")))));
}

// ---- wire: where the reader is, decides what is shown ----

async function show() {
  const {parts, query} = place();
  app.stop.abort();
  app.stop = new AbortController();
  app.moved = null;
  setLive(false);
  const main = $("main"), signal = app.stop.signal;
  main.replaceChildren();
  document.title = "MiniFlow";
  for (const one of document.querySelectorAll("[data-nav]")) {
    if (one.dataset.nav === (parts[0] === "flows" ? "" : parts[0])) one.setAttribute("aria-current",
      "page"); else one.removeAttribute("aria-current");
  }
  try {
    if (parts[0] === "runs" && parts[1]) await runView(main, signal, parts[1], parts[2] || "graph", parts[3]
      || "");
    else if (parts[0] === "runs") await runsView(main, signal, query);
    else if (parts[0] === "flows" && parts[1]) await flowView(main, signal, parts[1]);
    else await flowsView(main, signal);
  } catch (error) {
    if (!signal.aborted) main.append(el("p", {class: "empty", role: "alert"}, error.message));
  }
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme
    || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
}

$("theme").addEventListener("click", () => {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  localStorage.setItem("theme", theme);
  setTheme(theme);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
  setTheme(localStorage.getItem("theme")));
addEventListener("hashchange", () => {
  if (location.hash.startsWith("#token=")) readToken();
  if (location.hash === "#main") return;
  if (!app.moved?.(place().parts)) show();
});
document.addEventListener("visibilitychange", () =>
  { if (document.hidden) app.hidden = setTimeout(() => { app.stop.abort(); app.asleep = true; }, 60000);
  else { clearTimeout(app.hidden); if (app.asleep) { app.asleep = false; show(); } } });
readToken();
setTheme(localStorage.getItem("theme"));
show();
</script>
</body>
</html>
"""


#: Which elements of the page are served each by itself, and what stands in their place then.
_PARTS = {"style": '<link rel="stylesheet" href="app.css">', "script": '<script src="app.js" defer></script>',
          "svg": '<link rel="icon" href="icon.svg">'}


def page_parts() -> Dict[str, str]:
    """Return the page in the parts in which it is served: its style, script and svg, and the html."""
    parts = {"html": PAGE.strip() + "\n"}
    for tag, link in _PARTS.items():
        found = re.search(rf"(?s)<{tag}\b[^>]*>(.*?)</{tag}>", parts["html"])
        assert found
        parts[tag] = found[0 if tag == "svg" else 1].strip() + "\n"
        parts["html"] = parts["html"].replace(found[0], link)
    return parts


# ============================================================================
# == 44. WEB: what is the answer to a request?
# ============================================================================
# respond() turns a Request into a Response; it knows no socket.  What can be asked stands in ROUTES, a table
# from which requests are checked and openapi.json is made, so that the one can't say what the other does not.
#
# Flow authors run code here by right.  Not trusted are the pages that the user's browser has open beside
# ours (Host, Origin and Sec-Fetch-Site are checked first, on every route), whoever has no token, and all that
# is in a request.  No path of the disk is made from a request but that of a log: out of a run's id, which is
# checked, and a task and an attempt, which are looked up in the run.
#
# The server only reads what is on disk; the engines are processes of their own, in sessions of their own, and
# know nothing of it.  A flow in Python is imported by a process of its own as well: it may do anything.

MAX_TARGET = 8192                              # bytes of a request's path and query
MAX_BODY = 2**20
LOG_PIECE = 2**16
_ENGINE_S = 30.0                               # how long an engine may take to begin its run
_POLL_S = 0.2                                  # how often what engines write is looked at
_BEAT_S = 10.0                                 # how often a quiet stream of events says that it lives
MAX_STREAMS = 16
#: Not for the engines that we start: whose run they are in, and what opens this server.
_OURS = (*OWN_VARIABLES, "MINIFLOW_TOKEN")
_SAFE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
                               "img-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin"}
_SANDBOX = {"Content-Security-Policy": "sandbox; default-src 'none'; frame-ancestors 'none'"}
_JSON, _PLAIN, _EVENTS = "application/json", "text/plain; charset=utf-8", "text/event-stream"


class Request(NamedTuple):
    """What somebody asks: `read` gives so many bytes of the body, or fewer if there are no more."""

    method: str
    target: str
    headers: Sequence[Tuple[str, str]] = ()
    read: Callable[[int], bytes] = lambda size: b""


class Response(NamedTuple):
    """What is answered; a `body` in pieces is made while it is sent."""

    status: int
    body: Union[bytes, Iterable[bytes]] = b""
    kind: str = _JSON
    headers: Mapping[str, str] = {}


class Asked(NamedTuple):
    """A request that was found to be in order, as the function of a route gets it."""

    path: Mapping[str, str]
    query: Mapping[str, Any]
    body: Any
    headers: Mapping[str, str]


class Refused(MiniFlowError):
    """A request that is not done, with the status that says why."""

    def __init__(self, status: int, text: str, problems: Sequence[str] = (), **headers: str) -> None:
        super().__init__(text)
        self.status, self.problems = status, list(problems)
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Route(NamedTuple):
    """One thing that can be asked: how, what it does, what it takes, what is answered."""

    method: str
    path: str
    does: str
    answer: Callable[[Any, Asked], Response]
    query: Mapping[str, Schema]
    body: Optional[Schema]                     # of a POST; a body that may be left out has no `required`
    answers: Mapping[int, str]
    kind: str
    is_open: bool


ROUTES: List[Route] = []
if TYPE_CHECKING:
    Answer = Callable[[Any, Asked], Response]


def route(method: str, path: str, does: str, *, query: Mapping[str, Schema] = {},
          body: Optional[Schema] = None, answers: Mapping[int, str] = {}, kind: str = _JSON,
          is_open: bool = False) -> Callable[[Answer], Answer]:
    """Enter the decorated function into ROUTES."""
    def enter(function: Answer) -> Answer:
        ROUTES.append(Route(method, path, does, function, query, body, {200: "it is so", **answers}
                            if not any(status < 300 for status in answers) else answers, kind, is_open))
        return function
    return enter


# -- other processes --

#: Runs a function of this very file, compiled or not, with the words that come after its name.
ENGINE_PROGRAM = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("miniflow", sys.argv[1])
miniflow = sys.modules["miniflow"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(miniflow)
sys.exit(getattr(miniflow, sys.argv[2])(sys.argv[3:]))
"""


def _launch(function: str, words: Sequence[str], stdin: bytes = b"") -> Tuple[Any, IO[bytes]]:
    """Start a function of ours in a process and a session of its own; return it, and the file of its stderr.

    The file has no name, and nobody has to read it, as somebody would have to read a pipe.
    """
    import subprocess
    import tempfile
    env = {name: value for name, value in os.environ.items()
           if name not in _OURS and not name.startswith("MINIFLOW_PARAM_") or name == "MINIFLOW_COOKIE"}
    with tempfile.TemporaryFile() as given:
        given.write(stdin)
        given.seek(0)
        told: IO[bytes] = tempfile.TemporaryFile()
        argv = [sys.executable, "-c", ENGINE_PROGRAM, os.path.abspath(__file__), function, *words]
        return subprocess.Popen(argv, stdin=given, stdout=told if function != "main" else subprocess.DEVNULL,
                                stderr=told, env=env, start_new_session=True), told


def tell_flow(words: Sequence[str]) -> int:
    """Print a flow, or what is wrong with it, as JSON: what import_elsewhere() reads."""
    mini, name = MiniFlow(words[0], words[1], words[2]), words[3]
    mark, output = words[4], os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)                              # what the flow itself prints is not ours
    try:
        told: Any = flow_to_json(mini.load(name))
    except MiniFlowError as exc:
        told = list(exc.problems) if isinstance(exc, FlowError) else [str(exc)]
    output.write(f"\n{mark}{json.dumps(told)}\n")
    output.close()
    return 0


def import_elsewhere(mini: MiniFlow, path: str) -> Flow:
    """Return a flow in Python, imported by another process; raise FlowError."""
    mark = os.urandom(8).hex()
    process, told = _launch("tell_flow", [mini.flows_dir, mini.tasks_dir, mini.store.path,
                                         os.path.abspath(path), mark])
    with told:
        try:
            process.wait(_ENGINE_S)
        except BaseException:
            process.kill()
            process.wait()
            raise FlowError([f"{short_path(path)}: importing it takes more than {_ENGINE_S:g} s; "
                             "do less at the top level"]) from None
        told.seek(0)
        found = re.search(rb"(?m)^%s(.*)$" % mark.encode(), told.read())
    if not found:
        raise FlowError([f"{short_path(path)}: importing it ended Python with exit code "
                         f"{process.returncode}"])
    value = json.loads(found[1])
    if isinstance(value, list):
        raise FlowError(value)
    return recorded_flow(value)


# -- what the server knows --

class Web:
    """What answers are made from: the flows, the runs, who may ask, and what was asked."""

    def __init__(self, mini: MiniFlow, token: str, is_own: Callable[[str], bool]) -> None:
        import threading
        self.mini, self.store, self.token, self.is_own = mini, mini.store, token, is_own
        self.history = History(mini.store)
        self.stopped = threading.Event()
        self.children: List[Any] = []          # engines that we have started, to be waited for
        self.asked: Dict[Tuple[str, str, int], int] = {}
        self.streams = 0
        self.connections: Callable[[], int] = lambda: 0
        self.starting: Set[str] = set()        # ids of runs that are being made
        self._flows: Dict[str, Tuple[Any, float, Union[Flow, FlowError]]] = {}
        self._loading: Dict[str, Any] = {}     # a lock for each flow
        self._lock = threading.RLock()

    def count(self, method: str, path: str, status: int) -> None:
        """Count an answer, for /metrics."""
        with self._lock:
            key = method, path, status
            self.asked[key] = self.asked.get(key, 0) + 1

    def open_stream(self) -> None:
        """Count one more stream of events; raise Refused beyond MAX_STREAMS."""
        with self._lock:
            if self.streams >= MAX_STREAMS:
                raise Refused(429, f"{self.streams} streams of events are open already; close one",
                              Retry_After="5")
            self.streams += 1

    def close_stream(self) -> None:
        """Count one stream of events less."""
        with self._lock:
            self.streams -= 1

    def claim(self, run_id: str) -> None:
        """See that nobody else makes that run meanwhile; raise Refused if somebody does, or it is there."""
        with self._lock:
            if run_id in self.starting or self.store.exists(run_id):
                raise Refused(409, f"run {run_id} exists; resume it, or give another run_id")
            self.starting.add(run_id)

    def let_go(self, run_id: str) -> None:
        """The run has been made, or could not be."""
        with self._lock:
            self.starting.discard(run_id)

    def reap(self) -> None:
        """Let go of the engines that have ended."""
        with self._lock:
            self.children = [child for child in self.children if child.poll() is None]

    def hide(self, names: Iterable[str]) -> None:
        """Show these secrets to nobody from now on; two threads at once would lose some."""
        with self._lock:
            hide(names)

    def flow_path(self, name: str) -> str:
        """Return the path of a flow, which is looked up and not made from `name`; raise FlowNotFound."""
        files = flow_files(self.mini.flows_dir)
        if name not in files:
            raise FlowNotFound(f"no flow {shown(name)}{near(name, files)}")
        return files[name]

    def flow(self, path: str, name: str, afresh: bool = False) -> Flow:
        """Return a checked flow, as it was found up to a few seconds ago; raise FlowError.

        Whoever waits for one flow to be imported keeps nobody else waiting.
        """
        import threading
        with self._lock:
            one = self._loading.setdefault(name, threading.Lock())
        with one:
            now, version = time.monotonic(), signature_of(os.path.realpath(path))
            known = self._flows.get(name)
            if not known or known[0] != version or now >= known[1] or afresh:
                found: Union[Flow, FlowError]
                try:
                    found = self.load(path, name)
                    self.hide(found.secrets)
                except FlowError as exc:
                    found = exc
                took = time.monotonic() - now
                known = self._flows[name] = version, now + max(2.0, 20 * took), found
        if isinstance(known[2], FlowError):
            raise known[2]
        return known[2]

    def load(self, path: str, name: str) -> Flow:
        """Read and check a flow; one in Python is imported by another process."""
        if path.endswith(".py"):
            return import_elsewhere(self.mini, path)
        with self._lock:                       # for load_flow() hides secrets, too
            return load_flow(path, name, self.mini.tasks_dir).flow

    def run_id(self, asked: Asked) -> str:
        """Return the id of the run that a path names; raise Refused or NotFound."""
        name = asked.path["run"]
        try:
            check_run_id(name)
        except UsageError as exc:
            raise Refused(400, str(exc)) from None
        run_id = self.store.resolve(name)
        if not self.store.exists(run_id):
            raise NotFound(f"no run {run_id}; see /api/v1/runs")
        return run_id

    def loaded(self, asked: Asked) -> Loaded:
        """Return the run that a path names, as it stands."""
        found = self.store.load(self.run_id(asked))
        self.hide(found.run.plan.flow.secrets)
        return found


def respond_json(value: Any, status: int = 200, **headers: str) -> Response:
    """Return an answer in JSON, without what is hidden."""
    text = json.dumps(masked(value, hidden) if hidden else value, ensure_ascii=True)
    return Response(status, text.replace("<", "\\u003c").encode() + b"\n", _JSON, headers)


def _start_engine(web: Web, words: Sequence[str], stdin: bytes, is_there: Callable[[int], bool]) -> None:
    """Start an engine and wait until its run `is_there`, or say why it did not come to be."""
    mini = web.mini
    process, told = _launch("main", ["-f", mini.flows_dir, "-t", mini.tasks_dir, "-o", web.store.path, *words,
                                     "--output", "quiet"], stdin)
    end = time.monotonic() + _ENGINE_S
    with told:
        while process.poll() is None and not is_there(process.pid):
            if time.monotonic() > end:
                break                          # a slow disk: it goes on, and will be seen
            time.sleep(0.005)
        if process.poll() is None:
            with web._lock:
                web.children.append(process)
        elif process.returncode in (2, 3, 4, 70, 74):
            told.seek(0)
            lines = without_hidden(told.read(MAX_TARGET)).decode("utf-8", "replace").strip().split("\n")
            status = {2: 422, 3: 404, 4: 409, 74: 503}.get(process.returncode, 500)
            lines = [safe(line.partition("error: ")[2] or line) for line in lines]
            raise Refused(status, lines[0], lines)


# -- flows --

_PAGING: Dict[str, Schema] = {
    "limit": {"type": "integer", "minimum": 1, "maximum": 1000, "description": "at most so many (50)"},
    "offset": {"type": "integer", "minimum": 0, "description": "leave out the first so many (0)"}}
_PARAMS: Schema = {"type": "object", "description": "params by their names"}


def _page(name: str, rows: Sequence[Any], asked: Asked) -> Dict[str, Any]:
    """Return the part of a list that was asked for, and how long it is."""
    limit, offset = asked.query.get("limit", 50), asked.query.get("offset", 0)
    return {name: rows[offset:offset + limit], "total": len(rows), "limit": limit, "offset": offset}


def _flow_rows(web: Web, paths: Mapping[str, str]) -> List[Dict[str, Any]]:
    """Return what is told of flows: what `list --json` says, and their latest runs."""
    recent: Dict[str, List[Dict[str, Any]]] = {name: [] for name in paths}
    for head in web.history.heads():
        if head["flow"] in recent and len(recent[head["flow"]]) < 12:
            recent[head["flow"]].append(head)
    return [{**flow_row(name, path, web.flow),
             "last_run": recent[name][0] if recent[name] else None, "recent": recent[name]}
            for name, path in paths.items()]


@route("GET", "/api/v1/flows", "the flows, broken ones with what is wrong", query=_PAGING)
def list_flows(web: Web, asked: Asked) -> Response:
    """Answer with the flows."""
    page = _page("flows", list(flow_files(web.mini.flows_dir).items()), asked)
    return respond_json({**page, "flows": _flow_rows(web, dict(page["flows"]))})


@route("GET", "/api/v1/flows/{flow}", "one flow with its definition", answers={404: "there is no such flow"})
def show_flow(web: Web, asked: Asked) -> Response:
    """Answer with one flow."""
    name = asked.path["flow"]
    path = web.flow_path(name)
    row = _flow_rows(web, {name: path})[0]
    return respond_json({**row, "definition": None if row["error"] else flow_to_json(web.flow(path, name))})


@route("GET", "/api/v1/flows/{flow}/validate", "check a flow", answers={404: "there is no such flow"})
@route("POST", "/api/v1/flows/{flow}/validate", "check a flow, and params for it",
       body={"type": "object", "properties": {"params": _PARAMS}, "additionalProperties": False},
       answers={200: "whether it is valid, and all problems", 404: "there is no such flow"})
def validate_flow(web: Web, asked: Asked) -> Response:
    """Answer with all that is wrong."""
    name = asked.path["flow"]
    path, problems = web.flow_path(name), []   # type: str, Sequence[str]
    try:
        flow = web.flow(path, name, afresh=True)
        if asked.body and "params" in asked.body:
            check_secrets(flow, complete_params(flow, asked.body["params"]))
    except (FlowError, UsageError) as exc:
        problems = exc.problems if isinstance(exc, FlowError) else str(exc).split("\n")
    return respond_json({"flow": name, "valid": not problems, "problems": problems})


# -- runs --

_START_BODY: Schema = {
    "type": "object", "required": ["flow"], "additionalProperties": False,
    "properties": {"flow": {"type": "string", "minLength": 1, "description": "the name of the flow"},
                   "params": _PARAMS,
                   "run_id": {"type": "string", "description": "the id of the run; else one is made"}}}


@route("POST", "/api/v1/runs", "start a run, by an engine of its own", body=_START_BODY,
       answers={201: "it was begun; Location says where it is", 404: "there is no such flow",
                409: "there is a run of that id", 422: "the flow is invalid, or the params are"})
def start_run(web: Web, asked: Asked) -> Response:
    """Start a run and answer with its id, once it is on disk."""
    name, params, run_id = asked.body["flow"], asked.body.get("params", {}), asked.body.get("run_id")
    path = web.flow_path(name)
    flow = web.flow(path, name, afresh=True)
    try:
        check_secrets(flow, complete_params(flow, params))
    except UsageError as exc:
        raise Refused(422, f"flow {name}: the params don't fit", str(exc).split("\n")) from None
    if run_id is None:
        run_id = web.store.new_id(name, time.time())
    try:
        check_run_id(run_id)
    except UsageError as exc:
        raise Refused(400, f"run_id: {exc}") from None
    web.claim(run_id)
    try:
        _start_engine(web, ["run", os.path.abspath(path), "--run-id", run_id, "--params", "-"],
                      json.dumps(params).encode(), lambda pid: web.store.exists(run_id))
    finally:
        web.let_go(run_id)
    return respond_json({"id": run_id, "flow": name, "status": web.history.head(run_id)["status"]}, 201,
                        Location=f"/api/v1/runs/{run_id}")


@route("GET", "/api/v1/runs", "the runs, newest first",
       query={**_PAGING, "flow": {"type": "string", "description": "only runs of this flow"},
              "status": {"enum": list(RUN_STATES), "description": "only runs with this status"}})
def list_runs(web: Web, asked: Asked) -> Response:
    """Answer with heads of runs."""
    flow, status = asked.query.get("flow"), asked.query.get("status")
    heads = [head for head in web.history.heads()
             if flow in (None, head["flow"]) and status in (None, head["status"])]
    return respond_json(_page("runs", heads, asked))


@route("GET", "/api/v1/runs/{run}", "one run: its whole state, as in RUN.json",
       answers={404: "there is no such run"})
def show_run(web: Web, asked: Asked) -> Response:
    """Answer with one run."""
    loaded = web.loaded(asked)
    return respond_json({**run_to_json(loaded.run, loaded.engine), "status": loaded.status,
                         "live": loaded.live, "seq": loaded.seq,
                         "critical_path": critical_path(loaded.run)})


_NO_BODY: Schema = {"type": "object", "properties": {}, "additionalProperties": False}


@route("POST", "/api/v1/runs/{run}/cancel", "cancel a run; asked a second time, at once", body=_NO_BODY,
       answers={202: "its engine was told", 404: "there is no such run", 409: "it does not run"})
def cancel_run(web: Web, asked: Asked) -> Response:
    """Tell the engine of a run to end it."""
    run_id = web.run_id(asked)
    status = web.history.head(run_id)["status"]
    try:
        there = status == RUNNING and signal_engine(web.store, run_id, "SIGTERM")
    except UsageError as exc:
        raise Refused(409, str(exc)) from None
    if not there:
        raise Refused(409, f"run {run_id} does not run: it is {status}")
    return respond_json({"id": run_id, "status": status}, 202)


@route("POST", "/api/v1/runs/{run}/resume", "go on with a run that failed, was cancelled or interrupted",
       body=_NO_BODY,
       answers={202: "it goes on", 200: "it has succeeded already", 404: "there is no such run",
                409: "an engine works on it", 422: "its flow is invalid"})
def resume_run(web: Web, asked: Asked) -> Response:
    """Start an engine that goes on with a run."""
    loaded, end = web.loaded(asked), time.monotonic() + 2
    while loaded.live and loaded.run.outcome and time.monotonic() < end:
        time.sleep(0.01)                       # its engine is tidying up
        loaded = web.loaded(asked)
    run_id = loaded.run.id
    if loaded.run.outcome == SUCCESS:
        return respond_json({"id": run_id, "status": SUCCESS, "note": "it has succeeded already"})
    if loaded.live:
        raise locked_by(run_id, web.store.owner(run_id) or loaded.engine)
    before = loaded.seq

    def goes_on(pid: int) -> bool:
        return (web.store.owner(run_id) or {}).get("pid") == pid and web.store.load(run_id).seq > before

    _start_engine(web, ["resume", run_id], b"", goes_on)
    return respond_json({"id": run_id, "status": web.history.head(run_id)["status"]}, 202)


# -- tasks and logs --

@route("GET", "/api/v1/runs/{run}/tasks", "the tasks of a run",
       query={**_PAGING, "status": {"enum": list(TASK_STATES), "description": "only tasks in this state"}},
       answers={404: "there is no such run"})
def list_tasks(web: Web, asked: Asked) -> Response:
    """Answer with the tasks of a run, in the order of the flow."""
    run, status = web.loaded(asked).run, asked.query.get("status")
    names = [name for name, task_run in run.tasks.items() if status in (None, task_run.status)]
    page = _page("tasks", names, asked)
    return respond_json({**page, "tasks": [{"id": name, **task_run_to_json(run.tasks[name])}
                                           for name in page["tasks"]]})


def _task_of(run: Run, asked: Asked) -> str:
    """Return the task that a path names; raise NotFound."""
    name = asked.path["task"]
    if name not in run.tasks:
        raise NotFound(f"run {run.id} has no task {shown(name)}{near(name, run.tasks)}")
    return name


@route("GET", "/api/v1/runs/{run}/tasks/{task}", "one task of a run, with its attempts and its definition",
       answers={404: "there is no such run or task"})
def show_task(web: Web, asked: Asked) -> Response:
    """Answer with one task."""
    run = web.loaded(asked).run
    name = _task_of(run, asked)
    return respond_json({"id": name, "run": run.id, **task_run_to_json(run.tasks[name]),
                         "definition": task_to_json(run.defs[name])})


def _log_pieces(file: IO[bytes], start: int, end: int) -> Iterator[bytes]:
    """Yield a part of an open log a piece at a time, and close it."""
    with file:
        for at in range(start, end, LOG_PIECE):
            yield bytes_shown(file, at, min(at + LOG_PIECE, end))


@route("GET", "/api/v1/runs/{run}/tasks/{task}/log", "the log of an attempt, or a part of it", kind=_PLAIN,
       query={"attempt": {"type": "integer", "minimum": 1, "description": "which attempt (the latest)"},
              "offset": {"type": "integer", "description": "from this byte on (0); negative: from the end"},
              "limit": {"type": "integer", "minimum": 1, "description": "at most so many bytes (all)"}},
       answers={200: "X-Log-Size: its bytes; X-Log-Next: the offset to go on at; X-Log-Ended: true or false",
                404: "there is no such run, task, attempt or log"})
def show_log(web: Web, asked: Asked) -> Response:
    """Answer with bytes of a log as they lie on disk, but for secrets."""
    loaded = web.loaded(asked)
    run, name = loaded.run, _task_of(loaded.run, asked)
    attempts = run.tasks[name].attempts
    number = asked.query.get("attempt", len(attempts))
    if not 1 <= number <= len(attempts) or not attempts[number - 1].log:
        raise NotFound(f"task {name} of run {run.id} has no log of an attempt {number or 1}; "
                       f"it is {run.tasks[name].status} and had {len(attempts)} attempts")
    path = os.path.join(web.store.place, *log_name(run.id, name, number).split("/"))
    try:
        if os.path.realpath(path) != path:
            raise OSError(errno.ELOOP, "a symbolic link is on the way")
        file = open_file(path)
    except OSError as exc:
        raise NotFound(f"the log of task {name} of run {run.id} can't be read: {exc.strerror}") from None
    ended = not loaded.live or attempts[number - 1].status != RUNNING
    size = end = os.fstat(file.fileno()).st_size
    start = asked.query.get("offset", 0)
    start = min(size, start) if start >= 0 else max(0, size + start)
    end = min(size, start + asked.query.get("limit", size))
    if end == size and not ended:              # a secret may be half written
        end = max(start, end - unfinished_secret(file, end))
    return Response(200, _log_pieces(file, start, end), _PLAIN,
                    {"X-Log-Size": str(size), "X-Log-Next": str(end), "X-Log-Ended": str(ended).lower(),
                     **_SANDBOX})


# -- events --

def _sse(number: Any, value: Mapping[str, Any]) -> bytes:
    """Return one server-sent event; without a number a client does not take up the thread there."""
    text = json.dumps(masked(value, hidden) if hidden else value)
    return (f"id: {number}\n" if number is not None else "").encode() + f"data: {text}\n\n".encode()


def _state_row(run: Run, live: bool) -> Dict[str, Any]:
    """Return what a stream tells where it begins, or where a run was begun anew."""
    status = run.status if live or run.outcome else INTERRUPTED
    return {"event": "state", "run": run.id, "flow": run.flow, "task": None, "status": status,
            "tasks": {name: task_run.status for name, task_run in run.tasks.items()}}


def _beating(web: Web, passes: Iterator[bytes]) -> Iterator[bytes]:
    """Yield what each pass yields (b"" ends one), with pauses between them and a beat where nothing comes.

    After each pause comes b"", so that whoever sends this may see whether anybody listens.
    """
    beat = time.monotonic()
    try:
        yield b": events\n\n"
        for text in passes:
            if text:
                beat = time.monotonic()
                yield text
            elif web.stopped.wait(_POLL_S):
                return
            elif time.monotonic() > beat + _BEAT_S:
                beat = time.monotonic()
                yield b": still here\n\n"
            else:
                yield b""
    finally:
        web.close_stream()


def _recounted(run: Run) -> Iterator[Dict[str, Any]]:
    """Yield what happened in a run that has ended, as far as its record tells, in the order of time."""
    found: List[Tuple[float, int, Event, str]] = []
    for name, task_run in run.tasks.items():
        for number, attempt in enumerate(task_run.attempts, 1):
            found.append((attempt.started, 0, AttemptStarted(
                attempt.started, name, number, attempt.log), RUNNING))
            if attempt.finished is not None:
                last = number == len(task_run.attempts)
                found.append((attempt.finished, 1, AttemptEnded(
                    attempt.finished, name, number, attempt.status, attempt.reason, error=attempt.error),
                    task_run.status if last else RETRYING))
        if not task_run.attempts and task_run.finished is not None:
            found.append((task_run.finished, 1, TaskSettled(
                task_run.finished, name, task_run.status, task_run.reason), task_run.status))
    for _, _, event, status in sorted(found, key=lambda row: row[:2]):
        yield {**event_row(run, event), "status": status}
    yield event_row(run, RunFinished(run.finished or run.started, run.status, run.reason))


def _whole(run: Run, live: bool) -> Iterator[Dict[str, Any]]:
    """Yield how a run stands, and what led there if it is over."""
    yield _state_row(run, live)
    if run.outcome:
        yield from _recounted(run)


def _tell(web: Web, follower: Follower, live: bool) -> Iterator[Dict[str, Any]]:
    """Yield a row for each thing that is new in a run; what was over before we looked is recounted."""
    for event in follower.news():
        assert follower.run
        if event:
            yield event_row(follower.run, event)
            continue
        web.hide(follower.run.plan.flow.secrets)
        yield from _whole(follower.run, live)
    run = follower.run
    if run and (follower.told > follower.at or not live and not run.outcome):
        follower.told = follower.at            # the client saw another run of that id, or the engine is gone
        yield from _whole(run, live)


def _run_stream(web: Web, follower: Follower) -> Iterator[bytes]:
    """Yield what happens in one run until nobody works on it any more."""
    while True:
        live = web.store.owner(follower.run_id) is not None      # asked first, so that all is told
        for row in _tell(web, follower, live):
            is_past = follower.run and follower.run.outcome and row["event"] != "run_finished"
            yield _sse(None if is_past else follower.told, row)
        if not live:
            follower.close()
            return
        yield b""


@route("GET", "/api/v1/runs/{run}/events", "what happens in a run, until nobody works on it", kind=_EVENTS,
       answers={200: "events with run, task and status; Last-Event-ID goes on where one was",
                204: "nobody works on the run, and all of it was told", 404: "there is no such run",
                429: "too many streams"})
def run_events(web: Web, asked: Asked) -> Response:
    """Answer with a stream of events."""
    run_id, last = web.run_id(asked), asked.headers.get("last-event-id", "")
    after = int(last) if re.fullmatch("[0-9]{1,15}", last) else -1
    if after >= 0 and web.store.owner(run_id) is None and web.store.load(run_id).seq == after:
        return Response(204, b"", _EVENTS)
    web.hide(web.store.load(run_id).run.plan.flow.secrets)
    web.open_stream()
    return Response(200, _beating(web, _run_stream(web, Follower(web.store, run_id, after))), _EVENTS)


def _versions(web: Web) -> Iterator[Tuple[str, Optional[Tuple[int, int, int]]]]:
    """Yield each run with what changes when its state is written."""
    return ((run_id, signature_of(web.store.files(run_id).state)) for run_id in web.store.ids())


def _all_stream(web: Web, since: Optional[float]) -> Iterator[bytes]:
    """Yield what happens in all runs; ids are times, and what is told again after one overlaps by seconds."""
    known: Dict[str, Any] = {}
    followers: Dict[str, Follower] = {}
    for run_id, version in _versions(web):
        if since is None or version and version[2] / 1e9 < since - 2:
            known[run_id] = version            # what has happened until now is not news
            if os.path.lexists(web.store.files(run_id).journal):
                followers[run_id] = Follower(web.store, run_id)
                deque(_tell(web, followers[run_id], True), 0)
    looked: Any = None
    while True:
        folder = signature_of(web.store.runs)  # each state that is written is a change of this directory
        if folder != looked:
            looked = folder
            for run_id, version in _versions(web):
                if run_id not in followers and known.get(run_id, ()) != version:
                    followers[run_id], known[run_id] = Follower(web.store, run_id), version
        for run_id, follower in list(followers.items()):
            live = web.store.owner(run_id) is not None
            for row in _tell(web, follower, live):
                yield _sse(row.get("at") or format_time(time.time()), row)
            if not live:
                follower.close()
                del followers[run_id]
                known[run_id] = signature_of(web.store.files(run_id).state)
        yield b""


@route("GET", "/api/v1/events", "what happens in all runs, as it happens", kind=_EVENTS,
       answers={200: "events with run, task and status; Last-Event-ID goes on where one was",
                429: "too many streams"})
def all_events(web: Web, asked: Asked) -> Response:
    """Answer with a stream of events."""
    try:
        since = parse_time(asked.headers.get("last-event-id"))
    except ValueError:
        since = None
    web.open_stream()
    return Response(200, _beating(web, _all_stream(web, since)), _EVENTS)


# -- about the server itself --

def _metric(name: str, kind: str, does: str, rows: Iterable[Tuple[Mapping[str, Any], float]]
            ) -> Iterator[str]:
    """Yield the lines of one metric in the text format of Prometheus."""
    escapes = {ord("\\"): "\\\\", ord('"'): '\\"', ord("\n"): "\\n"}
    yield f"# HELP {name} {does}\n# TYPE {name} {kind}"
    for labels, value in rows:
        text = ",".join(f'{label}="{str(said).translate(escapes)}"' for label, said in labels.items())
        yield f"{name}{{{text}}} {value:.15g}" if text else f"{name} {value:.15g}"


@route("GET", "/metrics", "numbers for Prometheus", kind=_PLAIN)
def metrics(web: Web, asked: Asked) -> Response:
    """Answer with numbers of runs, tasks and requests."""
    runs: Dict[str, int] = dict.fromkeys(RUN_STATES, 0)
    tasks: Dict[str, int] = dict.fromkeys(TASK_STATES, 0)
    took: Dict[Tuple[str, str], List[float]] = {}
    for head in web.history.heads():
        runs[head["status"]] = runs.get(head["status"], 0) + 1
        for state, count in head["tasks"].items():
            tasks[state] = tasks.get(state, 0) + count
        if head["duration_s"] is not None:
            took.setdefault((head["flow"], head["status"]), []).append(head["duration_s"])
    durations = [({"flow": flow, "status": status}, spans) for (flow, status), spans in sorted(took.items())]
    with web._lock:
        asked_for = sorted(web.asked.items())
    lines = [
        *_metric("miniflow_info", "gauge", "The version.", [({"version": __version__}, 1)]),
        *_metric("miniflow_runs", "gauge", "Runs by status.", [({"status": s}, n) for s, n in runs.items()]),
        *_metric("miniflow_tasks", "gauge", "Tasks of all runs by state.",
                 [({"status": s}, n) for s, n in tasks.items()]),
        *_metric("miniflow_run_duration_seconds_sum", "gauge", "How long ended runs took, together.",
                 [(labels, sum(spans)) for labels, spans in durations]),
        *_metric("miniflow_run_duration_seconds_count", "gauge", "How many runs that are.",
                 [(labels, len(spans)) for labels, spans in durations]),
        *_metric("miniflow_http_requests_total", "counter", "Requests that were answered.",
                 [({"method": m, "route": r, "status": s}, n) for (m, r, s), n in asked_for]),
        *_metric("miniflow_http_connections", "gauge", "Open connections.", [({}, web.connections())]),
        *_metric("miniflow_http_streams", "gauge", "Open streams of events.", [({}, web.streams)])]
    text = "\n".join(lines) + "\n"
    return Response(200, str(masked(text, hidden)).encode(), "text/plain; version=0.0.4; charset=utf-8")


@route("GET", "/healthz", "whether the server lives", is_open=True)
def healthz(web: Web, asked: Asked) -> Response:
    """Answer that all is well."""
    return respond_json({"status": "ok"})


@route("GET", "/", "the page", kind="text/html; charset=utf-8", is_open=True)
def show_page(web: Web, asked: Asked) -> Response:
    """Answer with the page."""
    return Response(200, page_parts()["html"].encode(), "text/html; charset=utf-8")


@route("GET", "/app.css", "the page's style", kind="text/css; charset=utf-8", is_open=True)
def show_style(web: Web, asked: Asked) -> Response:
    """Answer with the page's style."""
    return Response(200, page_parts()["style"].encode(), "text/css; charset=utf-8")


@route("GET", "/app.js", "the page's script", kind="text/javascript; charset=utf-8", is_open=True)
def show_script(web: Web, asked: Asked) -> Response:
    """Answer with the page's script."""
    return Response(200, page_parts()["script"].encode(), "text/javascript; charset=utf-8")


@route("GET", "/icon.svg", "the page's icon", kind="image/svg+xml", is_open=True)
def show_icon(web: Web, asked: Asked) -> Response:
    """Answer with the page's icon."""
    return Response(200, page_parts()["svg"].encode(), "image/svg+xml")


def _describe_route(one: Route) -> Dict[str, Any]:
    """Return what openapi.json says of a route."""
    parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                  for name in re.findall(r"{(\w+)}", one.path)]
    parameters += [{"name": name, "in": "query", "required": False, "schema": schema,
                    "description": str(schema.get("description", ""))} for name, schema in one.query.items()]
    if one.kind == _EVENTS:
        parameters.append({"name": "Last-Event-ID", "in": "header", "required": False,
                           "schema": {"type": "string"}})
    error = {"content": {_JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}}
    answers = {**one.answers, 400: "the request is not in order"}
    if not one.is_open:
        answers[401] = "the token is missing or wrong"
    told: Dict[str, Any] = {"summary": one.does, "operationId": f"{one.method.lower()}_{one.answer.__name__}",
                            "parameters": parameters, "responses": {
                                str(status): {"description": text, **(error if status >= 400 else {
                                    "content": {one.kind.split(";")[0]: {}}})}
                                for status, text in sorted(answers.items())}}
    if one.body is not None:
        told["requestBody"] = {"required": "required" in one.body, "content": {_JSON: {"schema": one.body}}}
    if one.is_open:
        told["security"] = []
    return told


@route("GET", "/api/v1/openapi.json", "this description of the API")
def openapi(web: Web, asked: Asked) -> Response:
    """Answer with what can be asked, made from ROUTES."""
    paths: Dict[str, Dict[str, Any]] = {}
    for one in ROUTES:
        paths.setdefault(one.path, {})[one.method.lower()] = _describe_route(one)
    error = {"type": "object", "required": ["error", "problems"], "properties": {
        "error": {"type": "string"}, "problems": {"type": "array", "items": {"type": "string"}}}}
    return respond_json({
        "openapi": "3.1.0", "info": {"title": "MiniFlow", "version": __version__}, "paths": paths,
        "security": [{"token": []}],
        "components": {"schemas": {"Error": error},
                       "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}}})


# -- from a request to its answer --

def _check_length(headers: Mapping[str, List[str]]) -> Optional[int]:
    """Return how long the body is, None if that is not said; raise Refused for what can't be."""
    if "transfer-encoding" in headers:
        raise Refused(411, "Transfer-Encoding is not taken; send the body whole, with its Content-Length")
    lengths = headers.get("content-length", [])
    if len(lengths) > 1 or lengths and not re.fullmatch("[0-9]{1,20}", lengths[0]):
        raise Refused(400, f"Content-Length: expected one number, got {shown(', '.join(lengths))}")
    length = int(lengths[0]) if lengths else None
    if length is not None and length > MAX_BODY:
        raise Refused(413, f"Content-Length: {length} is more than the {MAX_BODY} bytes that are read")
    return length


def _check_sender(web: Web, headers: Mapping[str, List[str]]) -> None:
    """Raise Refused for a request that a page of somebody else's may have sent."""
    hosts = headers.get("host", [])
    if len(hosts) != 1 or not web.is_own(hosts[0]):
        raise Refused(421 if len(hosts) < 2 else 400,
                      f"Host {shown(', '.join(hosts))} is not this server; use the address that it printed")
    for origin in headers.get("origin", []):
        scheme, _, host = origin.partition("://")
        if scheme != "http" or not web.is_own(host):
            raise Refused(403, f"Origin {shown(origin)} is not this server's page")
    for site in headers.get("sec-fetch-site", []):
        if site not in ("same-origin", "none"):
            raise Refused(403, f"Sec-Fetch-Site is {shown(site)}: only this server's own page may ask; "
                               "type its address, or open it from the terminal")


def _check_token(web: Web, headers: Mapping[str, List[str]]) -> None:
    """Raise Refused unless the request has the token."""
    import hmac
    given = headers.get("authorization", [])
    scheme, _, token = (given[0] if len(given) == 1 else "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(
            token.strip().encode("utf-8", "surrogateescape"), web.token.encode()):
        raise Refused(401, "the token is missing or wrong; send Authorization: Bearer TOKEN, with the token "
                           "that serve printed or MINIFLOW_TOKEN holds", WWW_Authenticate="Bearer")


def _decoded_path(target: str) -> Tuple[List[str], str]:
    """Return the segments of a path, each decoded once, and the query."""
    from urllib.parse import unquote_to_bytes
    path, _, query = target.partition("?")
    if not path.startswith("/") or not target.isascii() or not target.isprintable():
        raise Refused(400, f"{shown(target)}: expected a path, as in /api/v1/runs")
    try:
        return [unquote_to_bytes(part).decode() for part in path[1:].split("/")], query
    except UnicodeDecodeError:
        raise Refused(400, f"{shown(path)}: what is behind % is no UTF-8") from None


def find_route(method: str, parts: Sequence[str]) -> Tuple[Route, Dict[str, str]]:
    """Return the route that a request means, with what its path names; raise Refused."""
    allowed = []
    for one in ROUTES:
        wanted = one.path[1:].split("/")
        if len(wanted) == len(parts) and all(want.startswith("{") or want == part
                                             for want, part in zip(wanted, parts)):
            allowed.append(one.method)
            if method == one.method or method == "HEAD" and one.method == "GET":
                return one, {want[1:-1]: part for want, part in zip(wanted, parts) if want.startswith("{")}
    if allowed:
        raise Refused(405, f"{method} can't be done here; there is {', '.join(sorted(allowed))}",
                      Allow=", ".join(sorted({*allowed, *(["HEAD"] if "GET" in allowed else [])})))
    raise Refused(404, f"there is no /{safe('/'.join(parts))}; see /api/v1/openapi.json")


def _read_query(one: Route, query: str) -> Dict[str, Any]:
    """Return the values behind the ? of a request, as the route declares them."""
    from urllib.parse import parse_qsl
    problems: List[str] = []
    values: Dict[str, Any] = {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=20)
    except ValueError as exc:
        raise Refused(400, f"the query can't be read: {exc}") from None
    for name, text in pairs:
        found: List[Problem] = []
        number = one.query.get(name, {}).get("type") == "integer" and re.fullmatch("-?[0-9]{1,18}", text)
        values[name] = int(text) if number else text
        if name not in one.query:
            problems.append(f"{name}: is not known here{near(name, one.query)}")
        else:
            check_schema(one.query[name], values[name], (name,), found)
        problems += [f"{format_path(problem.path)}: {problem.what}" for problem in found]
    if problems:
        raise Refused(400, "the query: " + problems[0], problems)
    return values


def _read_body(one: Route, request: Request, headers: Mapping[str, List[str]], length: Optional[int]) -> Any:
    """Return the JSON body of a request, checked by the schema of its route."""
    if one.body is None:
        return None
    kinds = headers.get("content-type", [])
    if kinds and kinds[0].partition(";")[0].strip().lower() != _JSON or not kinds and length:
        raise Refused(415, f"Content-Type: expected {_JSON}, got {shown(', '.join(kinds))}")
    if length is None and "required" in one.body:
        raise Refused(411, "Content-Length is missing, and so is the body: a JSON object")
    try:
        content = request.read(length or 0)
    except OSError:
        raise Refused(408, f"the {length} bytes of the body did not come in time") from None
    if len(content) < (length or 0):
        raise Refused(400, f"the body ended after {len(content)} of {length} bytes")
    if not content and "required" not in one.body:
        return {}
    problems: List[Problem] = []
    try:
        value = parse_json(content, "body", MAX_BODY).value
    except FlowError as exc:
        raise Refused(400, f"the body is no sound JSON: {exc.problems[0]}", exc.problems) from None
    check_schema(one.body, value, ("body",), problems)
    if problems:
        lines = [f"{format_path(problem.path)}: {problem.what}" for problem in problems]
        raise Refused(400, lines[0], lines)
    return value


def _find_answer(web: Web, request: Request, count: Callable[[str], None]) -> Response:
    """Return the answer to a request; raise what is wrong with it."""
    headers: Dict[str, List[str]] = {}
    for name, value in request.headers:
        headers.setdefault(name.lower(), []).append(value)
    if len(request.target) > MAX_TARGET:
        raise Refused(414, f"an address of {len(request.target)} bytes, more than {MAX_TARGET}")
    length = _check_length(headers)
    _check_sender(web, headers)
    parts, query = _decoded_path(request.target)
    if parts[0] in ("api", "metrics"):
        _check_token(web, headers)
    one, path = find_route(request.method, parts)
    count(one.path)
    body = _read_body(one, request, headers, length)
    return one.answer(web, Asked(path, _read_query(one, query), body,
                                 {name: values[0] for name, values in headers.items()}))


#: The status for each kind of error that may be raised where an answer is made.
_STATUSES: Tuple[Tuple[Type[MiniFlowError], int], ...] = (
    (NotFound, 404), (RunLocked, 409), (RunExists, 409), (FlowError, 422), (UsageError, 400),
    (StateError, 500))


def respond_error(exc: Exception) -> Response:
    """Return the answer that says what is wrong; of a bug only that it is one: stderr tells more."""
    if isinstance(exc, Refused):
        told = {"error": str(exc), "problems": exc.problems}
        return respond_json(told, exc.status, **exc.headers)
    if isinstance(exc, MiniFlowError):
        status = next((status for kind, status in _STATUSES if isinstance(exc, kind)), 500)
        problems = list(exc.problems) if isinstance(exc, FlowError) else []
        return respond_json({"error": problems[0] if problems else str(exc), "problems": problems}, status)
    if isinstance(exc, OSError) and exc.errno in PRESSURE_ERRORS | DISK_ERRORS:
        return respond_json({"error": f"the system has no means left: {exc.strerror}", "problems": []}, 503)
    import traceback
    say("".join(traceback.format_exception(type(exc), exc, exc.__traceback__)))
    return respond_json({"error": "this is a bug in MiniFlow; what serve wrote to stderr tells more",
                         "problems": []}, 500)


def respond(web: Web, request: Request) -> Response:
    """Return the answer to a request, whatever that is."""
    found = ["(none)"]
    try:
        response = _find_answer(web, request, lambda path: found.__setitem__(0, path))
    except Exception as exc:
        response = respond_error(exc)
    method = request.method if request.method in ("GET", "HEAD", "POST") else "(other)"
    web.count(method, found[0], response.status)
    return response._replace(headers={**_SAFE_HEADERS, **response.headers})


# ============================================================================
# == 45. SERVER: how do requests come in, and how do answers go out?
# ============================================================================
# A thin rim of http.server around respond().  One request a connection, HTTP/1.0, a thread each: at most
# MAX_CONNECTIONS of them, and MAX_STREAMS that tell of events.  Whoever is slow costs nobody else a thing:
#
#   reading   head and body of a request have to be there within READ_S, all together: a timeout of each read
#             would let somebody who sends a byte a second stay for hours
#   writing   each piece of an answer has to be taken within WRITE_S, however it is taken
#   full      a connection more waits a moment for room, then takes the place of the one that has been silent
#             for the longest; where all are at work it is told to come back (503)

READ_S = WRITE_S = 10.0
MAX_CONNECTIONS = 32
MAX_HEAD = 2**17                               # bytes of a request's first line and headers
_SILENT_S, _BUSY_S, _ROOM_S = 1.0, 10.0, 1.0   # after how long one may be turned out; how long one waits
_LAST_S = 2.0                                  # how long the last answers may take when the server ends
_FULL = (b"HTTP/1.0 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 2\r\n"
         b'Connection: close\r\n\r\n{"error": "too many connections at once; come back", "problems": []}\n')


class _HeadTooLarge(Exception):
    """The head of a request is more than MAX_HEAD bytes."""


def turn_away(sock: Any) -> None:
    """Tell a client that there is no room, without waiting for it, and end the connection."""
    import socket
    try:
        sock.setblocking(False)
        sock.send(_FULL)
    except OSError:
        pass
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass                                   # it has gone by itself


class Doors:
    """The open connections, and who has to go where there are too many."""

    def __init__(self) -> None:
        import threading
        self._room = threading.Condition()
        self._open: Dict[Any, Tuple[bool, float]] = {}       # socket to: has it sent its request, since when

    def __len__(self) -> int:
        return len(self._open)

    def enter(self, sock: Any) -> bool:
        """Let a connection in, if need be in place of another; tell whether it may stay."""
        with self._room:
            end = time.monotonic() + _ROOM_S
            while len(self._open) >= MAX_CONNECTIONS:
                victim = self._victim()
                if victim is not None:
                    turn_away(victim)
                    del self._open[victim]
                elif time.monotonic() >= end:
                    return False
                else:
                    self._room.wait(0.05)
            self._open[sock] = False, time.monotonic()
            return True

    def _victim(self) -> Any:
        """Return the connection that is to go first, if one has had its time."""
        at = time.monotonic()
        late = [(asked, since, id(sock), sock) for sock, (asked, since) in self._open.items()
                if at > since + (_BUSY_S if asked else _SILENT_S)]
        return min(late)[3] if late else None

    def asked(self, sock: Any) -> None:
        """Note that a connection has sent its request."""
        with self._room:
            if sock in self._open:
                self._open[sock] = True, time.monotonic()

    def leave(self, sock: Any) -> None:
        """Note that a connection is over, or needs no place here any more."""
        with self._room:
            self._open.pop(sock, None)
            self._room.notify()

    def wait_until_empty(self, seconds: float) -> None:
        """Wait for the answers that are on their way, at most so long."""
        with self._room:
            self._room.wait_for(lambda: not self._open, seconds)


def limited_reader(sock: Any, seconds: float) -> Tuple[Any, Callable[[int], None]]:
    """Return a file to read a request from, all of which has to come within `seconds`.

    Raises TimeoutError, and _HeadTooLarge beyond MAX_HEAD bytes; `allow` so many more for the body.
    """
    import io
    end = time.monotonic() + seconds

    class Limited(io.RawIOBase):
        left = MAX_HEAD + 1

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            if self.left <= 0:
                raise _HeadTooLarge
            sock.settimeout(max(0.001, end - time.monotonic()))
            size = int(sock.recv_into(buffer))
            self.left -= size
            return size

        def allow(self, more: int) -> None:
            self.left += more

    limited = Limited()
    return io.BufferedReader(limited, 8192), limited.allow


def has_gone(sock: Any) -> bool:
    """Tell whether a client that has asked and waits for more has closed its end."""
    import socket
    try:
        sock.setblocking(False)
        return not sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        sock.settimeout(WRITE_S)


def _drain(sock: Any) -> None:
    """Read on for a moment what nobody wants: to close with it unread would take the answer back (RST)."""
    import socket
    end = time.monotonic() + 1
    try:
        sock.shutdown(socket.SHUT_WR)
        for _ in range(64):
            sock.settimeout(max(0.001, end - time.monotonic()))
            if not sock.recv(LOG_PIECE):
                return
    except OSError:
        pass


def make_handler(web: Web, doors: Doors) -> Any:
    """Return the class that reads a request from a connection and writes its answer."""
    from http.server import BaseHTTPRequestHandler

    class Handler(BaseHTTPRequestHandler):
        def setup(self) -> None:
            super().setup()
            self.rfile, self.allow = limited_reader(self.connection, READ_S)

        def handle(self) -> None:
            try:
                self.handle_one_request()
            except _HeadTooLarge:
                self.send_error(431)
            except OSError:
                pass                           # the client has gone
            else:
                _drain(self.connection)

        def answer(self) -> None:
            self.allow(MAX_BODY)
            self.write(respond(web, Request(self.command, self.path, self.headers.items(), self.rfile.read)))

        do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = answer

        def send_error(self, code: int, message: Optional[str] = None, explain: Optional[str] = None) -> None:
            self.command = self.command or ""
            text = message or self.responses[code][0]
            response = respond_error(Refused(int(code), f"the request can't be read: {text}"))
            web.count("(other)", "(none)", int(code))
            self.write(response._replace(headers={**_SAFE_HEADERS, **response.headers}))

        def write(self, response: Response) -> None:
            doors.asked(self.connection)
            if response.kind == _EVENTS:       # these have a limit of their own
                doors.leave(self.connection)
            self.connection.settimeout(WRITE_S)
            body = response.body
            headers = {"Content-Type": response.kind, "Connection": "close", **response.headers}
            if isinstance(body, bytes):
                headers["Content-Length"] = str(len(body))
            self.request_version = "HTTP/1.0"      # also where what came was no HTTP at all
            self.send_response_only(response.status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            pieces = [body] if isinstance(body, bytes) else body
            try:
                for piece in pieces if self.command != "HEAD" else ():
                    if not piece and has_gone(self.connection):
                        break
                    self.wfile.write(piece)
            finally:
                getattr(pieces, "close", lambda: None)()

        def log_message(self, format: str, *args: Any) -> None:
            pass                               # /metrics counts what was asked

    return Handler


def make_server(web: Web, address: Tuple[Any, ...], family: int) -> Any:
    """Return a server that listens at `address`; raise OSError."""
    import socketserver
    import threading
    doors = Doors()
    web.connections = doors.__len__

    class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
        address_family, request_queue_size = family, 128
        allow_reuse_address, daemon_threads = os.name != "nt", True

        def begin(self) -> None:
            threading.Thread(target=self.serve_forever, args=(0.2,), daemon=True).start()

        def process_request(self, request: Any, client_address: Any) -> None:
            if doors.enter(request):
                super().process_request(request, client_address)
            else:
                turn_away(request)
                request.close()

        def shutdown_request(self, request: Any) -> None:
            doors.leave(request)
            super().shutdown_request(request)

        def service_actions(self) -> None:
            web.reap()

        def handle_error(self, request: Any, client_address: Any) -> None:
            say(f"a request could not be answered: {sys.exc_info()[1]!r}")

        def end(self) -> None:
            self.shutdown()
            self.socket.close()
            doors.wait_until_empty(_LAST_S)

    return Server(address, make_handler(web, doors))


def own_hosts(host: str, address: str, port: int) -> Callable[[str], bool]:
    """Return what tells whether a Host is this server: another name for it would be somebody else's.

    A page of evil.example can have its name point here, but has to send it; what can't be pointed anywhere is
    the number of an address, so where we listen on all of them any number will do.
    """
    import ipaddress
    import socket
    names = {"localhost", "127.0.0.1", "[::1]"}
    listens = ipaddress.ip_address(address)
    if not listens.is_loopback:
        names |= {host.lower(), socket.gethostname().lower(),
                  f"[{address}]" if listens.version == 6 else address}

    def is_own(given: str) -> bool:
        name, colon, number = given.lower().rpartition(":") if not given.endswith("]") else (given, "", "")
        name, number = (name, number) if colon else (given.lower(), "80")
        if number != str(port):
            return False
        if name in names or not listens.is_unspecified:
            return name in names
        try:
            return bool(ipaddress.ip_address(name.strip("[]")))
        except ValueError:
            return False
    return is_own


def find_address(host: str, port: int) -> Tuple[int, Tuple[Any, ...], bool]:
    """Return family and address that a --host means, and whether that is loopback; raise UsageError."""
    import ipaddress
    import socket
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as exc:
        raise UsageError(f"--host {shown(host)}: {exc}; give an address of this machine") from None
    family, _, _, _, address = found[0]
    return family, address, ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback


def find_token(is_loopback: bool, host: str) -> Tuple[str, bool]:
    """Return the token, and whether it was made here and now; raise UsageError."""
    token = os.environ.get("MINIFLOW_TOKEN", "")
    if token and (not token.isascii() or not token.isprintable() or " " in token):
        raise UsageError("MINIFLOW_TOKEN: a token is of printable ASCII characters without spaces; "
                         "make one: python3 -c 'import secrets; print(secrets.token_urlsafe())'")
    if not token and not is_loopback:
        raise UsageError(f"--host {shown(host)}: whoever reaches this address could run what they like; set "
                         "MINIFLOW_TOKEN, which they then have to know, or leave --host out")
    if token:
        return token, False
    import secrets
    return secrets.token_urlsafe(32), True


def serve(mini: MiniFlow, host: str, port: int, schedule: bool, ready: Callable[[str], None]) -> None:
    """Answer requests until SIGTERM, and start what is due if `schedule`; tell `ready` the page's address.

    SIGINT raises KeyboardInterrupt.  Runs are processes of their own, and go on.
    """
    import threading
    family, address, is_loopback = find_address(host, port)
    token, is_new = find_token(is_loopback, host)
    web = Web(mini, token, lambda given: False)
    try:
        server = make_server(web, address, family)
    except OSError as exc:
        raise UsageError(f"--host {shown(host)} --port {port}: can't listen there: {exc.strerror}; "
                         "give another port, or 0 for any that is free") from None
    number, place = server.server_address[1], str(server.server_address[0])
    web.is_own = own_hosts(host, place, number)
    daemon = threading.Thread(target=schedule_loop, args=(Scheduler(mini, load=web.load), web.stopped.wait),
                              daemon=True)
    shown_host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(place, f"[{place}]" if ":" in place else place)
    signal.signal(signal.SIGTERM, lambda number, frame: web.stopped.set())
    try:
        server.begin()
        if schedule:
            daemon.start()
        ready(f"http://{shown_host}:{number}/" + (f"#token={token}" if is_new else ""))
        web.stopped.wait()
    finally:
        web.stopped.set()
        server.end()


# ============================================================================
# == 46. BUNDLE: how does a flow travel, with all that it needs, in one file?
# ============================================================================
# A bundle is a zip file that Python executes.  It holds the engine, a flow and those within it, and the whole
# tasks directory where any of them has a script: what a script imports or reads beside itself nobody can
# tell, so nothing is picked out.  A flow in Python brings the whole flows directory for the same reason.
#
# Scripts and the engine have to be files: `python script.py` finds its neighbours by its path, and other
# processes load this file by its own.  So each start of a bundle puts what it holds into a directory that
# only its user can change, named by its content, and runs the engine there.  A file that is not as it should
# be is put anew, by rename; nothing runs before all are there.  So it does not matter who else starts at the
# same time, where the last start was killed, or what has been tidied up since.
#
# The same input gives the same bytes: sorted names, one date, two modes, and no compression, which each zlib
# does in its own way.  A bundle made by a bundle is that bundle.

MAX_BUNDLE = 100 * 2**20                       # bytes
MAX_BUNDLE_FILES = 10_000

#: What a bundle executes; behind it stands the call of start().
BUNDLE_PROGRAM = r'''
import binascii, os, stat, sys
if sys.version_info < (3, 9):
    sys.exit("this needs Python 3.9 or newer, and %s is %s" % (sys.executable, sys.version.split()[0]))
archive = os.path.dirname(__file__)               # as it was typed: the loader knows it by this name


def places():
    """Yield the directories in which bundles may be unpacked, the best one first."""
    if os.environ.get("MINIFLOW_BUNDLE_DIR"):
        yield os.environ["MINIFLOW_BUNDLE_DIR"]
        return
    cache = os.environ.get("XDG_CACHE_HOME", "")
    yield os.path.join(cache if os.path.isabs(cache) else os.path.expanduser("~/.cache"), "miniflow")
    import tempfile
    yield os.path.join(tempfile.gettempdir(), "miniflow-%s" % (os.geteuid() if os.name == "posix" else ""))


def make_private(path):
    """Make a directory; raise OSError if somebody else may change what is in it, or put another there."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    found, above = os.lstat(path), os.stat(os.path.dirname(path))
    if not stat.S_ISDIR(found.st_mode):
        raise OSError(0, "it is no directory", path)
    if os.name == "posix" and (found.st_uid != os.geteuid() or found.st_mode & 0o022
                               or above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX):
        raise OSError(0, "others may change what is there", path)


def put(folder, name, content, mode, crc):
    """See that a file of the bundle is there, with its content."""
    path = os.path.join(folder, *name.split("/"))
    try:
        with open(path, "rb") as file:
            if file.read() == content and not os.path.islink(path):
                return
    except OSError:
        pass
    if binascii.crc32(content) != crc:
        sys.exit("%s: damaged at %s; copy it again" % (archive, name))
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    part = os.path.join(folder, "part-%d-%s" % (os.getpid(), os.urandom(4).hex()))
    try:
        with open(part, "xb") as file:
            file.write(content)
        os.chmod(part, mode & 0o700)
        os.replace(part, path)
    except BaseException:
        if os.path.exists(part):
            os.unlink(part)
        raise


def unpack(place, key, members):
    """Put all files below a directory of their own in `place`, and return it."""
    above, name = os.path.split(os.path.abspath(place))
    os.makedirs(above, 0o700, exist_ok=True)
    place = os.path.join(os.path.realpath(above), name)
    folder = os.path.join(place, key)
    make_private(place)
    make_private(folder)
    for name, mode, crc in members:
        steps = name.split("/")
        if any(step in ("", ".", "..") or set(step) & set("\\:\0") for step in steps):
            sys.exit("%s: holds %r, which is no name for a file of a bundle" % (archive, name))
        put(folder, name, __loader__.get_data(os.path.join(archive, *steps)), mode, crc)
    return folder


def start(key, flow, members):
    """Unpack, and run the engine that was unpacked."""
    said = []
    for place in places():
        try:
            folder = unpack(place, key, members)
            break
        except (OSError, UnicodeError) as exc:
            said.append("%s: %s" % (getattr(exc, "filename", None) or place,
                                    getattr(exc, "strerror", None) or exc))
    else:
        said.append("%s can't be unpacked; name a directory of yours by MINIFLOW_BUNDLE_DIR" % archive)
        sys.stderr.write("\n".join(said) + "\n")
        sys.exit(74)
    sys.path[0] = folder
    import miniflow
    sys.exit(miniflow.start_bundle(folder, flow))


'''

if TYPE_CHECKING:
    Members = Dict[str, Tuple[bytes, int]]      # name to content and mode

#: The flow that this engine is in a bundle with, if it is in one.
bundled: Optional[str] = None


def _paths_below(folder: str, skipped: str, left_out: List[str], problems: List[str]
                 ) -> Iterator[Tuple[str, str]]:
    """Yield name and path of each file that a bundle takes from a directory, noting what it does not take.

    Names that begin with a dot belong to tools (.git, .venv, .env), and are often nobody else's business.
    """
    root = os.path.realpath(folder)
    for place, folders, files in os.walk(root):
        kept = []
        for name in sorted(folders + files):
            path = os.path.join(place, name)
            real = os.path.realpath(path)
            if name == "__pycache__" or real == skipped:
                continue
            if name.startswith("."):
                left_out.append(os.path.relpath(path, root))
            elif re.search(r"[\\:\ud800-\udfff]", name):
                problems.append(f"{shown(path)}: not every system can have a file of that name; rename it")
            elif not real.startswith(root + os.sep) or name in folders and os.path.islink(path):
                problems.append(f"{shown(path)}: a symbolic link to {shown(real)}, which does not travel "
                                "with it; put a copy in its place")
            elif name in folders:
                kept.append(name)
            else:
                yield os.path.relpath(path, root).replace(os.sep, "/"), path
        folders[:] = kept


def _flows_within(flows_dir: str, name: str, tasks_dir: str) -> Dict[str, Source]:
    """Return a flow and all that are tasks of it, however deep, each checked, by their names."""
    found: Dict[str, Source] = {}
    todo = [find_flow(flows_dir, name)]
    while todo:
        stem, path = todo.pop()
        if stem not in found:
            found[stem] = load_flow(path, stem, tasks_dir)
            todo += [find_flow(os.path.dirname(path) or ".", task.action.flow)
                     for task in found[stem].flow.tasks if isinstance(task.action, SubFlow)]
    return found


def _paths_of_bundle(mini: MiniFlow, name: str, problems: List[str], left_out: List[str]
                     ) -> Tuple[str, Dict[str, str]]:
    """Return the name of a flow, and the paths of all files of its bundle by their names there."""
    sources = _flows_within(mini.flows_dir, name, mini.tasks_dir)
    main = next(iter(sources))
    tasks = [task for source in sources.values() for task in source.flow.tasks]
    paths = {"miniflow.py": os.path.abspath(__file__)}
    trees = {"tasks": mini.tasks_dir} if any(isinstance(task.action, Script) for task in tasks) else {}
    if any(source.functions is not None for source in sources.values()):
        trees["flows"] = os.path.dirname(sources[main].path) or "."
    for prefix, folder in trees.items():
        for inner, path in _paths_below(folder, mini.store.place, left_out, problems):
            paths[f"{prefix}/{inner}"] = path
            if len(paths) > MAX_BUNDLE_FILES:
                raise UsageError(f"{safe(folder)}: holds more than {MAX_BUNDLE_FILES:,} files, too many for "
                                 "a bundle; give a smaller directory by -t")
    paths.update((f"flows/{os.path.basename(source.path)}", source.path) for source in sources.values())
    return main, paths


def _read_members(paths: Mapping[str, str], problems: List[str]) -> Members:
    """Return the files of a bundle."""
    members: Members = {}
    size = 0
    for name, path in sorted(paths.items()):
        try:
            with open_file(path, follow=True) as file:
                mode = 0o755 if os.fstat(file.fileno()).st_mode & stat.S_IXUSR else 0o644
                content = file.read(MAX_BUNDLE + 1 - size)
        except OSError as exc:
            problems.append(f"{shown(path)}: can't be read: {exc.strerror}; remove it, or mend it")
            continue
        size += len(content)
        if size > MAX_BUNDLE:
            raise UsageError(f"{shown(path)}: with it the bundle has more than {MAX_BUNDLE // 2**20} MB; "
                             "keep data elsewhere, and give its path as a param")
        members[name] = content, mode
    return members


def _zipped(members: Members) -> bytes:
    """Return the bytes of an executable zip file."""
    import io
    import zipfile
    file = io.BytesIO()
    file.write(b"#!/usr/bin/env python3\n")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, (content, mode) in sorted(members.items()):
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, (stat.S_IFREG | mode) << 16
            archive.writestr(info, content)
    return file.getvalue()


def make_bundle(mini: MiniFlow, name: str) -> Tuple[str, bytes, List[str], List[str]]:
    """Return the name of a flow, the bytes of its bundle, the names of its files, and what was left out.

    Raises UsageError with all that can't travel.
    """
    import hashlib
    problems: List[str] = []
    left_out: List[str] = []
    stem, paths = _paths_of_bundle(mini, name, problems, left_out)
    members = _read_members(paths, problems)
    if problems:
        raise UsageError("\n".join(problems))
    table = [(name, mode, zlib.crc32(content)) for name, (content, mode) in members.items()]
    digest = hashlib.sha256(repr(table).encode())
    for content, _ in members.values():
        digest.update(content)
    key = re.sub("[^A-Za-z0-9_-]", "_", stem)[:60] + "-" + digest.hexdigest()[:16]
    program = f"{BUNDLE_PROGRAM}start({key!a}, {stem!a}, {ascii(table)})\n"
    return stem, _zipped({**members, "__main__.py": (program.encode(), 0o644)}), list(members), left_out


def write_bundle(path: str, content: bytes) -> None:
    """Put an executable file in the place of what is there; raise UsageError if that can't be."""
    part = f"{path}.{os.getpid()}.part"
    try:
        try:
            with open(part, "xb") as file:
                file.write(content)
            os.chmod(part, 0o755)
            os.replace(part, path)
        except BaseException:
            if os.path.lexists(part):
                os.unlink(part)
            raise
    except OSError as exc:
        raise UsageError(f"-o {shown(path)}: can't be written: {exc.strerror}") from None


# ============================================================================
# == 47. COMMAND LINE: what can be typed?
# ============================================================================
# Each command is one function, entered into COMMANDS with its help, an example, and the function that adds
# its arguments.  Global options are parsed twice, before the command and after it, and the later one wins.
#
# Two readers that agree read what was typed, as in section 3.  What is plainly right is read here; for help,
# for --option=value and whatever else is unusual or wrong, argparse is asked, which answers in its own words.
# With argparse alone `list` took a third longer: with gettext, locale and shutil it costs as much as json.
#
# A command prints its result to stdout and returns its exit code; whatever goes wrong it raises.  main()
# alone turns errors into text and codes.

class Cli(NamedTuple):
    """One command: its function, what it does, an example, and the function that adds its arguments."""

    run: Callable[[Any], int]
    does: str
    example: str
    add: Callable[[Any], None]


COMMANDS: Dict[str, Cli] = {}
CANCEL_S = 5.0                                  # how long a cancelled engine may take beyond its tasks' grace
if TYPE_CHECKING:
    Run_command = Callable[[Any], int]


def command(name: str, does: str, example: str, add: Callable[[Any], None] = lambda parser: None
            ) -> Callable[[Run_command], Run_command]:
    """Enter the decorated function into COMMANDS; it gets the parsed arguments and returns an exit code."""
    def enter(function: Run_command) -> Run_command:
        COMMANDS[name] = Cli(function, does, example, add)
        return function
    return enter


def _write_out(content: bytes) -> None:
    """Write to stdout what has no secrets in it any more; raises as write_result() does."""
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(content)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as exc:
        let_go_of_stdout()
        raise StateError(f"stdout: can't be written: {exc.strerror}; send it elsewhere") from None


def write_result(content: bytes) -> None:
    """Write a result to stdout; raise StateError if that fails, BrokenPipeError if its reader has gone."""
    _write_out(without_hidden(content))


def print_result(text: str) -> None:
    """Write a line of text to stdout."""
    write_result((text + "\n").encode(sys.stdout.encoding or "utf-8", "backslashreplace"))


def print_json(value: Any) -> None:
    """Write a result to stdout as JSON."""
    _write_out((json.dumps(masked(value, hidden), indent=1) + "\n").encode())


def _miniflow(options: Any) -> MiniFlow:
    return MiniFlow(options.flows_dir, options.tasks_dir, options.output_dir)


def _is_chatty(options: Any) -> bool:
    return bool(options.level in ("DEBUG", "INFO"))


_SAMPLE_FLOW = {
    "name": "hello",
    "description": "a script that hands a number on, and a command that prints it",
    "params": {"names": {"type": "array", "default": ["world"], "description": "whom to greet"}},
    "tasks": [
        {"id": "greet", "script": "greet.py", "args": ["${{ params.names }}"]},
        {"id": "count", "command": ["echo", "greeted:", "${{ tasks.greet.outputs.greeted }}"],
         "depends_on": ["greet"]},
    ],
}
_TOUR_FLOW = {
    "name": "tour",
    "description": "what a flow can say, once each; every task tells what it shows",
    "params": {"days": {"type": "integer", "default": 2, "min": 1, "max": 7, "description": "how many days"},
               "url": {"type": "string", "default": "", "description": "a web address, to be asked for"}},
    "env": {"TOUR_DAYS": "${{ params.days }}"},
    "pools": {"printer": 1},
    "timeout_s": 600,
    "defaults": {"timeout_s": 60},
    "tasks": [
        {"id": "wait", "description": "waits without taking a slot", "wait_for": {"seconds": 0.2}},
        {"id": "numbers", "description": "hands on a JSON object",
         "command": "echo '{\"list\": [2, 3, 5]}' > \"$MINIFLOW_OUTPUT\""},
        {"id": "square", "description": "one instance for each value that came from upstream",
         "depends_on": ["numbers"], "foreach": "${{ tasks.numbers.outputs.list }}", "max_parallel": 2,
         "command": "echo \"square=$(($1 * $1))\" >> \"$MINIFLOW_OUTPUT\"", "args": ["${{ item }}"]},
        {"id": "print", "description": "one instance for each combination, one at a time", "pool": "printer",
         "depends_on": ["square", "wait"], "priority": 1,
         "matrix": {"paper": ["a4", "a5"], "colour": [True, False],
                    "exclude": [{"paper": "a5", "colour": True}]},
         "command": ["echo", "${{ matrix.paper }}", "${{ matrix.colour }}",
                     "${{ tasks.square.outputs.items }}"]},
        {"id": "flaky", "description": "fails once, and succeeds when it is tried again", "max_retries": 3,
         "backoff_s": 0.1, "command": "test \"$MINIFLOW_ATTEMPT\" -ge 2"},
        {"id": "may_fail", "description": "its failure is a warning", "allow_failure": True,
         "command": "echo it does not matter; exit 3"},
        {"id": "week", "description": "skipped unless there are enough days", "if": "params.days >= 5",
         "command": "echo a week of $TOUR_DAYS days"},
        {"id": "either", "description": "runs although one of its upstream was skipped",
         "depends_on": ["week", "flaky"], "trigger_rule": "one_success", "command": "echo one is enough"},
        {"id": "file", "description": "runs only where its input or its output has changed",
         "inputs": ["flows/tour.json"], "outputs": ["tour_copy.json"],
         "command": "cp flows/tour.json tour_copy.json"},
        {"id": "ask", "description": "a request, where there is an address: --param url=https://…",
         "if": "params.url != ''", "http": {"url": "${{ params.url }}"}, "retry_on": [502, 503],
         "max_retries": 2},
        {"id": "hello", "description": "another flow, as a run of its own", "flow": "hello",
         "params": {"names": ["everybody", "the tour"]}},
    ],
    "on_failure": {"description": "runs where a task has failed", "command": "echo something went wrong"},
    "finally": {"description": "runs last, whatever has happened", "command": "echo that was it"},
}
_SAMPLE_SCRIPT = (
    '"""Greets everybody in the JSON array that is its argument, and hands on how many they were."""\n'
    '''import json
import os
import sys

names = json.loads(sys.argv[1])
for name in names:
    print(f"Hello, {name}!")
with open(os.environ["MINIFLOW_OUTPUT"], "w", encoding="utf-8") as file:
    json.dump({"greeted": len(names)}, file)
''')


def _add_init(parser: Any) -> None:
    parser.add_argument("dir", nargs="?", default=".", metavar="DIR", help="where to put it (default: here)")


@command("init", "make a working example: a flow and its script, and a tour of what flows can say",
         "miniflow init demo && cd demo && miniflow run hello && miniflow run tour", _add_init)
def run_init(options: Any) -> int:
    """Write the example and the tour, over nothing that is there."""
    files = {os.path.join(options.dir, "flows", "hello.json"): json.dumps(_SAMPLE_FLOW, indent=2) + "\n",
             os.path.join(options.dir, "flows", "tour.json"): json.dumps(
                 _TOUR_FLOW, indent=2, ensure_ascii=False) + "\n",
             os.path.join(options.dir, "tasks", "greet.py"): _SAMPLE_SCRIPT}
    for path in files:
        if os.path.lexists(path):
            raise UsageError(f"{safe(path)} is there already; give another directory")
    for path, content in files.items():
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "x", encoding="utf-8") as file:
                file.write(content)
        except OSError as exc:
            raise UsageError(f"{safe(path)}: can't be written: {exc.strerror}") from None
        print_result(safe(path))
    return 0


def _add_json(parser: Any) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON")


def _list_row(row: Dict[str, Any]) -> Tuple[str, ...]:
    """Return what `list` shows of a flow."""
    named = row["flow_name"] not in (None, row["name"])
    last = row["last_run"]
    text = (f"broken: {row['error'][0]}"
            + (f" (and {len(row['error']) - 1} more)" if len(row["error"]) > 1 else "")
            if row["error"] else " ".join([row["description"]] + [f"#{tag}" for tag in row["tags"]]).strip())
    return (row["name"] + (f" ({row['flow_name']})" if named else ""), str(row["tasks"] or "-"),
            row["next"][0] if row["next"] else "-",
            f"{last['status']} {(last['started'] or '')[:19]}" if last else "-", text)


@command("list", "list the flows", "miniflow list --json", _add_json)
def run_list(options: Any) -> int:
    """List all flows; a broken one is shown with its error and stops no other."""
    mini = _miniflow(options)
    newest: Dict[str, Dict[str, Any]] = {}
    for head in mini.store.history():
        newest.setdefault(str(head["flow"]), head)
    rows = [{**flow_row(name, path, lambda path, name: load_flow(path, name, mini.tasks_dir).flow),
             "last_run": newest.get(name)} for name, path in flow_files(mini.flows_dir).items()]
    if options.json:
        print_json(rows)
    elif rows:
        print_result(format_table([("flow", "tasks", "next", "last run", "description")]
                                  + [_list_row(row) for row in rows]))
    else:
        say(f"no flows in {mini.flows_dir}; make an example: miniflow init")
    return 0


def _add_flows(parser: Any) -> None:
    parser.add_argument("flows", nargs="*", metavar="FLOW", help="a flow's name or path (default: all)")


@command("validate", "check flows and report all errors at once", "miniflow validate etl", _add_flows)
def run_validate(options: Any) -> int:
    """Check the named flows, or all of them."""
    mini = _miniflow(options)
    paths = [find_flow(mini.flows_dir, name) for name in options.flows]
    paths = paths or list(flow_files(mini.flows_dir).items())
    problems: List[str] = []
    for name, path in paths:
        try:
            flow = load_flow(path, name, mini.tasks_dir).flow
        except FlowError as exc:
            problems += exc.problems
            continue
        print_result(f"{safe(path)}: ok, {len(flow.tasks)} tasks")
        if flow.name != name:
            say(f"warning: {safe(path)}: its name is {flow.name}; it is run as {safe(name)}")
    if problems:
        raise FlowError(problems)
    return 0


def _add_flow(parser: Any) -> None:
    how: Dict[str, Any] = {"nargs": "?", "default": bundled} if bundled else {}
    parser.add_argument("flow", metavar="FLOW", help="a flow's name or path"
                        + (f" (default: {bundled})" if bundled else ""), **how)


def _add_graph(parser: Any) -> None:
    parser.add_argument("flow", nargs="?", metavar="FLOW", help="a flow's name or path")
    parser.add_argument("--run", metavar="RUN", help="instead of a flow: a run, with the states of its tasks")
    parser.add_argument("--format", choices=["text", *GRAPHS], default="text", help="how (default: text)")


@command("graph", "show a flow's tasks and what they wait for", "miniflow graph etl --format svg > etl.svg",
         _add_graph)
def run_graph(options: Any) -> int:
    """Print the graph of a flow, or of a run."""
    options.flow = options.flow or (bundled if options.run is None else None)
    if (options.flow is None) == (options.run is None):
        raise UsageError("graph: give either the name of a flow, or --run and the id of a run")
    mini, looks = _miniflow(options), {}       # type: MiniFlow, Dict[str, Look]
    if options.run is None:
        plan = make_plan(mini.load(options.flow))
    else:
        loaded = mini.store.load(mini.store.resolve(options.run))
        hide(loaded.run.plan.flow.secrets)
        plan, looks = loaded.run.plan, looks_of(loaded.run, loaded.live)
    print_result(to_text_graph(plan, looks, glyphs_for(sys.stdout), columns_of(sys.stdout))
                 if options.format == "text" else GRAPHS[options.format](plan, looks))
    return 0


def _add_params(parser: Any) -> None:
    parser.add_argument("-p", "--params", metavar="JSON",
                        help="params as a JSON object, a file of it, or - for stdin")
    parser.add_argument("--param", action="append", default=[], metavar="KEY=VALUE",
                        help="one param; repeatable")


def _positive(text: str) -> int:
    """For argparse: a number from 1 on."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


_positive.__name__ = "positive number"          # argparse says: invalid positive number value: '0'


def _add_execution(parser: Any) -> None:
    parser.add_argument("-j", "--jobs", type=_positive, metavar="N",
                        help="tasks at once (default: the flow's max_parallel, else usable CPUs)")
    parser.add_argument("--output", choices=list(OUTPUTS), default="progress", help="how to tell of it")
    parser.add_argument("--durability", choices=DURABILITIES, default="normal", help="when state is fsynced")
    parser.add_argument("--on-orphan", choices=ON_ORPHAN, default="kill",
                        help="what to do about tasks that still run after their engine died (default: kill)")
    parser.add_argument("--force-host", action="store_true",
                        help="resume although the run was last on another host, which is gone")
    parser.add_argument("--executor", choices=[LOCAL, SLURM],
                        help="where tasks run that don't say it themselves (default: local)")
    parser.add_argument("--no-fork", action="store_true",
                        help="start a new interpreter for each Python script (also: MINIFLOW_NO_FORK=1)")


def _add_run(parser: Any) -> None:
    _add_flow(parser)
    _add_params(parser)
    parser.add_argument("--dry-run", action="store_true",
                        help="write the bash script, print its path and the plan")
    parser.add_argument("--explain", action="store_true",
                        help="tell which tasks would run, and why; run nothing")
    parser.add_argument("--force", action="store_true", help="run tasks although nothing has changed")
    parser.add_argument("--run-id", metavar="ID", help="name the run; one that exists is resumed")
    parser.add_argument("--fail-fast", action="store_true", help="start nothing more after the first failure")
    for flag, does in (("--only", "run just this task"),
                       ("--from", "run this task and what is downstream of it"),
                       ("--until", "run this task and what it needs upstream"),
                       ("--skip", "leave this task out"),
                       ("--tags", "run the tasks with one of these tags, and what they need upstream")):
        parser.add_argument(flag, action="append", default=[], metavar="TAGS" if flag == "--tags" else "T",
                            dest=flag[2:] + "_", help=does + "; repeatable, or a,b")
    _add_execution(parser)


def read_params(options: Any, flow: Flow) -> Dict[str, Any]:
    """Return the params that the command line gives; raise UsageError for any that can't be read."""
    params: Dict[str, Any] = {}
    source = options.params
    if source is not None:
        where, content = "--params", source
        if source == "-":
            where, content = "stdin", sys.stdin.buffer.read(MAX_BYTES + 1)
        elif not source.lstrip().startswith(("{", "[", '"')):
            where = source
            try:
                content = read_file(source, MAX_BYTES + 1)
            except OSError as exc:
                raise UsageError(f"--params {shown(source)}: neither a JSON object nor a file that can be "
                                 f"read: {exc.strerror}") from None
        params = parse_json(content, where).value
        if not isinstance(params, dict):
            raise UsageError(f"{where}: expected a JSON object of params, got {shown(params)}")
    for text in options.param:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UsageError(f"--param {shown(text)}: expected KEY=VALUE")
        params[name] = parse_param(name, value, (flow.params or {}).get(name, Param()))
    return params


def _selection(options: Any) -> Selection:
    """Return the part of the flow that the options name."""
    parts = []
    for word in ("only", "from", "until", "skip", "tags"):
        given = vars(options)[word + "_"]
        parts.append(tuple(name for text in given for name in text.split(",") if name))
        if given and not parts[-1]:
            raise UsageError(f"--{word} {shown(given[0])}: names nothing; leave it out to run everything")
    return Selection(*parts)


def _watcher(options: Any, store: Store) -> Watcher:
    """Return who tells of the run: at a level above INFO, failures alone."""
    style = options.output
    return make_watcher("quiet" if style == "progress" and not _is_chatty(options) else style, store)


def _finish(run: Run, options: Any) -> int:
    """Print the run's id and return its exit code, which an stdout that can't be written does not change."""
    if options.output != "json":
        try:
            print_result(run.id)
        except StateError as exc:
            say(str(exc))
        except BrokenPipeError:
            let_go_of_stdout()
    if run.outcome == CANCELLED and run.cancel:
        return run.cancel.exit_code
    return 0 if run.ok else 1


def _order(options: Any) -> Order:
    """Return how the options want the run to be made."""
    return Order(options.tasks_dir, options.jobs, options.durability, options.on_orphan, options.force_host,
                 not options.no_fork, getattr(options, "force", False), getattr(options, "parent", None),
                 options.executor, scheduled_time=getattr(options, "scheduled_time", None))


def _with_secrets(source: Source, *more: Iterable[str]) -> Source:
    """Return a flow whose secrets are also those of the run that it is a part of."""
    flow = source.flow
    names = tuple(dict.fromkeys(chain(flow.secrets, *more)))
    hide(names)
    return source._replace(flow=flow._replace(secrets=names)) if names != flow.secrets else source


def _foretell(run: Run, freshness: Freshness, name: str) -> str:
    """Return what would become of a task whose upstream need not run, and let the run know its end."""
    event, reason = freshness.look(run, name)
    if isinstance(event, TaskSettled):
        run.apply(event)
        return f"{event.status}: {event.reason}"
    if isinstance(event, TaskExpanded):
        run.apply(event)
        return SUCCESS
    return f"run: {reason}"


def _explain(mini: MiniFlow, source: Source, params: Dict[str, Any], options: Any) -> int:
    """Tell which tasks would run, and why; nothing runs, and nothing is written."""
    flow = source.flow
    plan = make_plan(flow, last_outputs(mini.store, source.stem, select(flow, _selection(options))))
    run = Run(plan, "explain", complete_params(flow, params), time.time(), source.stem)
    freshness = Freshness(mini.store, make_setting(mini.tasks_dir, mini.store.path, "", ""), time.time)
    freshness.force = options.force
    told: Dict[str, str] = {}
    for name in plan.order:
        up = next((up for up in plan.tasks[name].depends_on if told[up].startswith(("run", "perhaps"))), None)
        if name in plan.left_out:
            told[name] = "left out"
            run.apply(TaskSettled(0, name, SKIPPED, "left out", plan.left_out[name]))
        elif up is not None:
            told[name] = f"perhaps: {up} comes before it"
        elif name in run.barred:
            told[name] = ": ".join(run.barred[name])
            run.apply(TaskSettled(0, name, *run.barred[name]))
        else:
            told[name] = _foretell(run, freshness, name)
            if name not in run.groups:
                continue
            found = {each: _foretell(run, freshness, each) for each in run.groups[name]}
            told[name] = "run: some of its instances run"
            if name in run.barred:
                status, reason = run.barred[name]
                run.apply(TaskSettled(0, name, status, reason))
                told[name] = (f"{status}: {reason}" if reason else
                              "cached: none of it runs" if found else "success: it has no instances")
            told.update(found)
    print_result("\n".join(f"{name}  {safe(text)}" for name, text in told.items()))
    return 0


def _dry_run(mini: MiniFlow, stem: str, flow: Flow, params: Dict[str, Any], options: Any) -> int:
    """Write the script and print its path; the plan is talk."""
    values = complete_params(flow, params)
    plan = make_plan(flow, last_outputs(mini.store, stem, select(flow, _selection(options))))
    print_result(write_script(mini.store, stem, plan, values, mini.tasks_dir))
    say(format_plan(plan, options.jobs or flow.max_parallel or usable_cpus()))
    return 0


@command("run", "run a flow", "miniflow run etl --param date=2026-11-21 -j 4", _add_run)
def run_run(options: Any) -> int:
    """Run a flow to its end; the run's id is the result."""
    mini = _miniflow(options)
    source = _with_secrets(mini.source(options.flow), getattr(options, "secrets", ()))
    if options.fail_fast:
        source = source._replace(flow=source.flow._replace(fail_fast=True))
    params = read_params(options, source.flow)
    if options.dry_run:
        return _dry_run(mini, source.stem, source.flow, params, options)
    if options.explain:
        return _explain(mini, source, params, options)
    order = _order(options)
    opened = open_run(mini.store, source, params or None, order, _selection(options), options.run_id, say)
    return _finish(run_to_end(opened, mini.store, source, order, _watcher(options, mini.store)), options)


def _add_run_id(parser: Any) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's id, or last")


def _add_resume(parser: Any) -> None:
    _add_run_id(parser)
    _add_execution(parser)


@command("resume", "go on with a run that failed, was cancelled or was interrupted",
         "miniflow resume last", _add_resume)
def run_resume(options: Any) -> int:
    """Resume a run by its flow as it is now, or, where the flow is gone, as it was."""
    mini = _miniflow(options)
    run_id = mini.store.resolve(options.run)
    recorded = mini.store.load(run_id).run
    hide(recorded.plan.flow.secrets)
    source: Optional[Source] = None
    path = flow_files(mini.flows_dir).get(recorded.flow, recorded.source) if bundled else recorded.source
    if recorded.outcome == SUCCESS:
        pass                                   # whatever its flow is by now
    elif os.path.exists(path):
        source = load_flow(path, recorded.flow, mini.tasks_dir)
        source = source._replace(flow=source.flow._replace(fail_fast=recorded.plan.flow.fail_fast))
        if recorded.parent:
            source = _with_secrets(source, recorded.plan.flow.secrets, getattr(options, "secrets", ()))
    elif any(isinstance(task.action, Function) for task in recorded.plan.tasks.values()):
        where = f"{safe(recorded.source)}, which is gone" if recorded.source else "a Python program"
        raise UsageError(f"run {run_id}: its functions are in {where}; start that again, with this run id")
    else:
        say(f"{safe(recorded.source)} is gone; going on by the definition that the run recorded")
    order = _order(options)
    opened = open_again(mini.store, run_id, source, None, order, say)
    return _finish(run_to_end(opened, mini.store, source, order, _watcher(options, mini.store)), options)


def _cancel_jobs(store: Store, run_id: str, options: Any) -> int:
    """Cancel a run whose engine is gone while its jobs go on: it is taken up to that end."""
    order = Order(options.tasks_dir, cancel=True)
    run = run_to_end(open_again(store, run_id, None, None, order, say), store, None, order, Lines(store))
    print_result(f"{run_id} {run.status}")
    return 0


@command("cancel", "stop a running run from another terminal", "miniflow cancel last", _add_run_id)
def run_cancel(options: Any) -> int:
    """Cancel a run and wait for its end: as Ctrl-C does, as a second one, at last by killing its engine."""
    store = _miniflow(options).store
    run_id = store.resolve(options.run)
    loaded = store.load(run_id)
    if loaded.status == INTERRUPTED and needs_slurm(loaded.run.plan.flow):
        return _cancel_jobs(store, run_id, options)
    tasks = loaded.run.plan.flow.tasks
    grace = max(task.grace_s for task in tasks)
    if any(task.handler == "finally" for task in tasks):
        grace = _FOREVER_S                     # it runs to its end
    for name, patience in (("SIGTERM", grace + CANCEL_S), ("SIGTERM", CANCEL_S), ("SIGKILL", CANCEL_S)):
        if not signal_engine(store, run_id, name):
            break
        end = time.monotonic() + patience
        while store.owner(run_id) is not None and time.monotonic() < end:
            time.sleep(0.05)
        if store.owner(run_id) is not None:
            say(f"run {run_id} still goes on, {patience:g} s after {name}")
    status = store.load(run_id).status
    if loaded.status != RUNNING:
        say(f"run {run_id} does not run: it is {status}")
    print_result(f"{run_id} {status}")
    return 1 if status == RUNNING else 0


def _add_runs(parser: Any) -> None:
    parser.add_argument("flow", nargs="?", metavar="FLOW", help="only runs of this flow")
    parser.add_argument("--status", choices=RUN_STATES, help="only runs with this status")
    parser.add_argument("--limit", type=_positive, default=20, metavar="N", help="at most N (default: 20)")
    _add_json(parser)


@command("runs", "list runs, newest first", "miniflow runs etl --status failed", _add_runs)
def run_runs(options: Any) -> int:
    """List the history."""
    store = _miniflow(options).store
    heads = store.history(options.flow)
    if options.flow is not None and not heads:
        find_flow(options.flows_dir, options.flow)              # a flow that never ran, or none at all?
    heads = [head for head in heads if options.status in (None, head["status"])][:options.limit]
    if options.json:
        print_json(heads)
    elif heads:
        print_result(format_table([("run", "flow", "status", "started", "duration", "reason")] + [
            (head["id"], head["flow"], head["status"], (head["started"] or "-")[:19],
             format_span(head["duration_s"]), head["reason"] or "") for head in heads]))
    else:
        say(f"no such runs in {store.runs}")
    return 0


def _add_show(parser: Any) -> None:
    _add_run_id(parser)
    _add_json(parser)


@command("show", "show one run: tasks, durations, attempts, reasons", "miniflow show last", _add_show)
def run_show(options: Any) -> int:
    """Show a run; with --json its whole state as in RUN.json."""
    store = _miniflow(options).store
    loaded = store.load(store.resolve(options.run))
    hide(loaded.run.plan.flow.secrets)
    if options.json:
        print_json({**run_to_json(loaded.run, loaded.engine), "status": loaded.status})
    else:
        print_result(format_run(loaded, store))
    return 0


def _add_logs(parser: Any) -> None:
    _add_run_id(parser)
    parser.add_argument("task", nargs="?", metavar="TASK", help="only this task's")
    parser.add_argument("--attempt", type=_positive, metavar="N", help="only attempt N (default: the latest)")
    parser.add_argument("-f", "--follow", action="store_true", help="show what comes until the run ends")


def _overlapping(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield blocks without what is hidden, also where it begins in one and ends in the next."""
    keep, rest = hidden_bytes(), b""
    for block in blocks:
        rest = without_hidden(rest + block)
        cut = max(0, len(rest) - keep)
        yield rest[:cut]
        rest = rest[cut:]
    yield rest


def _print_log(path: str) -> None:
    """Copy a log to stdout."""
    terminal = sys.stdout.isatty()
    try:
        with open_file(path) as file:
            blocks = iter(lambda: file.readline(1 << 16) if terminal else file.read(1 << 20), b"")
            for chunk in blocks if terminal else _overlapping(blocks):
                if terminal:
                    print_result(safe(chunk.decode("utf-8", "replace").rstrip("\r\n")))
                else:
                    write_result(chunk)
    except BrokenPipeError:
        raise
    except OSError as exc:
        raise NotFound(f"{path}: the log can't be read: {exc.strerror}") from None


def _follow(store: Store, run_id: str, options: Any) -> int:
    """Show what comes in the logs of a run until it ends; of several tasks each line after its id."""
    places: Dict[str, List[Any]] = {}
    while True:
        live = store.owner(run_id) is not None  # asked first, so that all is shown before leaving
        run = store.load(run_id).run
        for name, task_run in run.tasks.items():
            for number, attempt in enumerate(task_run.attempts, 1):
                wanted = options.task in (None, name, run.group_of.get(name))
                if wanted and options.attempt in (None, number) and attempt.log:
                    place = places.setdefault(attempt.log, [0, b""])
                    over = not live or attempt.status != RUNNING
                    for line in follow_lines(os.path.join(store.path, attempt.log), place, over):
                        print_result(line if options.task == name else f"{name} | {line}")
        if not live:
            return 0
        time.sleep(0.2)


@command("logs", "show the logs of a run", "miniflow logs last fetch", _add_logs)
def run_logs(options: Any) -> int:
    """Print the logs: bytes as they are into a file or pipe, made safe on a terminal."""
    store = _miniflow(options).store
    run = store.load(store.resolve(options.run)).run
    hide(run.plan.flow.secrets)
    if options.task is not None and options.task not in run.tasks:
        raise NotFound(f"run {run.id} has no task {shown(options.task)}{near(options.task, run.tasks)}")
    if options.follow:
        return _follow(store, run.id, options)
    names = list(run.tasks) if options.task is None else run.groups.get(options.task) or [options.task]
    found = [(name, number, run.tasks[name].attempts[number - 1].log) for name in names
             for number in [options.attempt or run.tasks[name].attempt]
             if 0 < number <= len(run.tasks[name].attempts)]
    if options.task is None and options.attempt and not found:
        raise NotFound(f"no task of run {run.id} has an attempt {options.attempt}")
    if options.task is not None and not found:
        raise NotFound(f"task {options.task} of run {run.id} has no attempt {options.attempt or 1}; "
                       f"it is {run.tasks[options.task].status} and "
                       f"had {len(run.tasks[options.task].attempts)}")
    if options.task is not None and found[0][2] is None:
        raise NotFound(f"task {options.task} of run {run.id} ran within its program, so it has no log of "
                       "its own; a function has one with process=True")
    for name, number, log in found:
        if log and len(names) > 1:
            print_result(f"==> {name}, attempt {number} <==")
        if log:
            _print_log(os.path.join(store.path, log))
    return 0


def _write_file(path: str, content: bytes, mode: Optional[int] = None) -> None:
    """Write a result to a file of the user's."""
    try:
        with open(path, "wb") as file:
            file.write(content)
        if mode is not None:
            os.chmod(path, mode)
    except OSError as exc:
        raise UsageError(f"-o {shown(path)}: can't be written: {exc.strerror}") from None


def _add_export(parser: Any) -> None:
    _add_flow(parser)
    _add_params(parser)
    parser.add_argument("--to", required=True, choices=sorted(EXPORTERS), help="the language")
    parser.add_argument("-o", dest="file", metavar="FILE", help="where to (default: stdout)")


@command("export", "write a flow as a script that needs no MiniFlow",
         "miniflow export etl --to bash -o etl.sh", _add_export)
def run_export(options: Any) -> int:
    """Export a flow."""
    mini = _miniflow(options)
    flow = mini.load(options.flow)
    params = complete_params(flow, read_params(options, flow))
    check_secrets(flow, params)
    flow = flow_by_file(flow, find_flow(mini.flows_dir, options.flow)[0])
    exported = EXPORTERS[options.to](make_plan(flow), params, os.path.abspath(mini.tasks_dir))
    for loss in exported.losses:
        say(f"note: {loss}")
    content = exported.text.encode("utf-8", "surrogateescape")
    if options.file in (None, "-"):
        write_result(content)
        return 0
    _write_file(options.file, content, 0o755 if exported.is_program else None)
    return 0


def _add_report(parser: Any) -> None:
    _add_run_id(parser)
    parser.add_argument("-o", dest="file", metavar="FILE.html",
                        help="where to (default: RUN.html in the working directory; -: stdout)")


@command("report", "make one page of a run: graph, Gantt chart, tasks, logs",
         "miniflow report last -o report.html", _add_report)
def run_report(options: Any) -> int:
    """Write a page that tells all about a run, and print its path."""
    store = _miniflow(options).store
    loaded = store.load(store.resolve(options.run))
    hide(loaded.run.plan.flow.secrets)
    content = to_report(loaded, store, time.time()).encode("utf-8", "backslashreplace")
    if options.file == "-":
        write_result(content)
        return 0
    path = options.file or f"{loaded.run.id}.html"
    _write_file(path, content)
    print_result(path)
    return 0


def _add_simulate(parser: Any) -> None:
    parser.add_argument("flow", nargs="?", metavar="FLOW", help="a flow's name or path")
    _add_params(parser)
    parser.add_argument("-j", "--jobs", action="extend", nargs="+", default=[], metavar="N",
                        help="tasks at once; several are compared (default: as for run)")
    parser.add_argument("--fail", action="append", default=[], metavar="T",
                        help="every attempt of this task fails; repeatable")
    parser.add_argument("--seed", type=int, metavar="N",
                        help="let attempts take half to twice as long, by chance, alike for the same N")
    parser.add_argument("--duration", action="append", default=[], metavar="T=SECONDS",
                        help="how long a task takes; repeatable")
    _add_json(parser)


def _read_jobs(options: Any) -> List[int]:
    """Return the numbers that -j gives; a flow that stands behind them becomes options.flow."""
    words = [word for text in options.jobs for word in text.split(",") if word]
    if options.flow is None and words and not words[-1].isdecimal():
        options.flow = words.pop()
    if options.flow is None:
        raise UsageError("simulate: give the name of a flow")
    for word in words:
        if not word.isdecimal() or not 0 < int(word) < 10**6:
            raise UsageError(f"-j {shown(word)}: expected a positive number")
    return [int(word) for word in words]


def _check_known(flow: Flow, name: str) -> None:
    """Raise NotFound unless a flow has a task, or may have an instance, of this name."""
    tasks = {task.id: task for task in flow.tasks}
    group = tasks.get(name.rpartition("[")[0])
    if name not in tasks and not (group and group.many and re.fullmatch(r"\[\d+\]", name[len(group.id):])):
        raise NotFound(f"flow {flow.name} has no task {shown(name)}{near(name, tasks)}")


def _read_durations(options: Any, flow: Flow) -> Dict[str, float]:
    """Return the durations that the command line gives."""
    durations = {}
    for text in options.duration:
        name, _, value = text.rpartition("=")
        try:
            durations[name] = float(value)
        except ValueError:
            durations[name] = -1
        if not name or not 0 <= durations[name] < 1e9:
            raise UsageError(f"--duration {shown(text)}: expected TASK=SECONDS")
        _check_known(flow, name)
    return durations


def _asked_outputs(flow: Flow) -> Set[str]:
    """Return the tasks on whose outputs it depends which others run, and how often."""
    found: Set[str] = set()
    for task in flow.tasks:
        for path, text in templates(task):
            for ref in refs_at(path, text) if path[0] in ("if", "foreach", "matrix") else ():
                if ref.path[0] == "tasks":
                    found.add(str(ref.path[1]))
                elif ref.path[0] == "ctx":
                    found.update(other.id for other in flow.tasks)
    return found


@command("simulate", "tell what a run would do and how long it would take; runs nothing",
         "miniflow simulate etl -j 1 2 4 --fail load", _add_simulate)
def run_simulate(options: Any) -> int:
    """Simulate runs of a flow by the durations of earlier ones; nothing is run, and nothing written."""
    jobs, mini = _read_jobs(options), _miniflow(options)
    source = mini.source(options.flow)
    flow, store = source.flow, mini.store
    params = complete_params(flow, read_params(options, flow))
    secrets = check_secrets(flow, params)
    given = _read_durations(options, flow)
    for name in options.fail:
        _check_known(flow, name)
    ids = store.ids()
    known = {**store.durations(source.stem, ids), **given}
    outputs = last_outputs(store, source.stem, _asked_outputs(flow)) if ids else {}
    plan, assumed = make_plan(flow, {}, known), {}            # type: Plan, Dict[str, str]
    found: List[Tuple[Optional[int], Run]] = []
    usual = flow.max_parallel or (None if source.functions is not None else usable_cpus())
    for slots in [*jobs] if jobs else [usual]:
        run = Run(plan, f"simulated-{options.seed or 0}", params, 0, source.stem)
        run.scheduled_time, run.secrets = time.time(), secrets
        if slots is None:
            run.queues.limits[PLAIN_FUNCTIONS] = usable_cpus()
        world = Forecast(plan, known, outputs, options.fail, options.seed, os.environ)
        found.append((slots, simulate(run, world, slots)))
        assumed.update(world.assumed)
    made = Forecasts(source.stem, sum(name in known or any(
        each.startswith(f"{name}[") for each in known) for name in plan.order), assumed, found)
    if options.json:
        print_json(forecasts_to_json(made))
    else:
        print_result(format_forecasts(made, glyphs_for(sys.stdout), columns_of(sys.stdout)))
    return 0


def _add_bundle(parser: Any) -> None:
    _add_flow(parser)
    parser.add_argument("-o", dest="file", metavar="FILE", help="where to (default: FLOW.pyz)")


@command("bundle", "put a flow, its scripts and the engine into one executable file",
         "miniflow bundle etl -o etl.pyz && ./etl.pyz run", _add_bundle)
def run_bundle(options: Any) -> int:
    """Write the bundle and print its path; what is in it is talk."""
    mini = _miniflow(options)
    stem, content, names, left_out = make_bundle(mini, options.flow)
    path = options.file or f"{stem}.pyz"
    for folder in {name.partition("/")[0] for name in names if name.count("/")}:
        place = os.path.realpath({"tasks": mini.tasks_dir, "flows": mini.flows_dir}[folder])
        if os.path.realpath(path).startswith(place + os.sep):
            raise UsageError(f"-o {shown(path)}: lies in {safe(place)}, which goes into the bundle; put it "
                             "elsewhere")
    write_bundle(path, content)
    if left_out:
        say(f"left out, as their names begin with a dot: {', '.join(sorted(left_out)[:20])}")
    say(f"{len(names)} files, {len(content) // 1024:,} kB: {', '.join(names[:20])}"
        + (", …" if len(names) > 20 else ""))
    print_result(safe(path))
    return 0


def _count(text: str) -> int:
    """For argparse: a number from 0 on."""
    number = int(text)
    if number < 0:
        raise ValueError(text)
    return number


def _days(text: str) -> float:
    """For argparse: a number of days, with a fraction if need be."""
    days = float(text)
    if not 0 <= days < 1e6:
        raise ValueError(text)
    return days


_count.__name__, _days.__name__ = "number", "number of days"


def _add_tick(parser: Any) -> None:
    parser.add_argument("--dry-run", action="store_true", help="print what would be started, start nothing")


@command("tick", "start what is due by the flows' schedules, once; for cron and systemd timers",
         "miniflow tick   # in crontab: * * * * * cd /srv/etl && miniflow tick", _add_tick)
def run_tick(options: Any) -> int:
    """Start what is due; the ids of the runs are the result."""
    scheduler = Scheduler(_miniflow(options))
    if options.dry_run:
        for run_id in scheduler.due():
            print_result(run_id)
        return 0
    turn = scheduler.turn(getattr(options, "ended", None))
    for run_id in turn.started:
        print_result(run_id)
    return 1 if turn.failed else 0


def _add_clean(parser: Any) -> None:
    parser.add_argument("--keep", type=_count, metavar="N", help="keep the newest N runs of each flow")
    parser.add_argument("--older-than", type=_days, metavar="DAYS",
                        help="remove only what is older than this")
    parser.add_argument("--dry-run", action="store_true",
                        help="say what would be removed, and remove nothing")


@command("clean", "remove old runs with their logs and scripts",
         "miniflow clean --keep 10 --older-than 30", _add_clean)
def run_clean(options: Any) -> int:
    """Remove what is beyond --keep and older than --older-than, where both are given; never a live run."""
    if options.keep is None and options.older_than is None:
        raise UsageError("clean: say what to remove, by --keep N, --older-than DAYS or both")
    store = _miniflow(options).store
    store.check()
    before = time.time() - options.older_than * 86400 if options.older_than is not None else None
    code = 0
    runs, parts = aged_runs(store)
    old: List[Tuple[str, str, Callable[[str], None]]] = [
        (kind, name, store.remove) for kind, run_id, _ in removable(runs, options.keep, before)
        for name in with_parts(run_id, parts)]
    old += [(kind, name, store.remove_script)
            for kind, name, _ in removable(_aged_scripts(store), options.keep, before)]
    for kind, name, remove in old:
        try:
            if not options.dry_run:
                remove(name)
        except RunLocked:
            continue
        except StateError as exc:
            say(str(exc))
            code = exc.exit_code
            continue
        print_result(f"{kind} {name}")
    return code


def _port(text: str) -> int:
    """For argparse: the number of a port, 0 for any that is free."""
    number = int(text)
    if not 0 <= number < 65536:
        raise ValueError(text)
    return number


_port.__name__ = "port number"


def _add_serve(parser: Any) -> None:
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS",
                        help="where to listen (default: 127.0.0.1); another than this machine's own needs "
                             "MINIFLOW_TOKEN")
    parser.add_argument("--port", type=_port, default=8080, metavar="N",
                        help="the port (default: 8080); 0: any that is free")
    parser.add_argument("--no-schedule", action="store_true", help="start no run by its schedule")


def _print_address(address: str) -> None:
    """Print the page's address, with the token, which is for whoever reads it."""
    _write_out((address + "\n").encode())


@command("serve", "the web page and the REST API", "miniflow serve --port 8080", _add_serve)
def run_serve(options: Any) -> int:
    """Serve until SIGTERM."""
    mini = _miniflow(options)
    flow_files(mini.flows_dir)                  # is there such a directory?
    mini.store.prepare("runs")
    serve(mini, options.host, options.port, not options.no_schedule, _print_address)
    return 0


@command("schema", "print the JSON Schema of the flow file, for editors",
         "miniflow schema > flow.schema.json")
def run_schema(options: Any) -> int:
    """Print the schema."""
    print_json(flow_schema())
    return 0


# -- parsing --

_GLOBALS = (("-f", "--flows-dir", "DIR", "./flows", "where the flows are"),
            ("-t", "--tasks-dir", "DIR", "./tasks", "where the scripts are"),
            ("-o", "--output-dir", "DIR", "./miniflow_output", "where state and logs go"),
            ("-l", "--level", "LEVEL", "INFO", "how much to say: DEBUG, INFO, WARNING or ERROR"))
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


def _taken(word: str, how: Mapping[str, Any]) -> Any:
    """Return the value that a word plainly gives for an argument; raise ValueError for any other word."""
    value = how.get("type", str)(word)
    if word.startswith("-") or value not in how.get("choices", [value]):
        raise ValueError(word)
    return value


class Arguments:
    """What a command takes, entered as into an argparse.ArgumentParser, and the reading of what was typed."""

    def __init__(self, prog: str, does: str, epilog: str, usage: Optional[str] = None) -> None:
        self._about: Dict[str, Any] = {"prog": prog, "description": does, "epilog": epilog, "usage": usage}
        self._own: List[Tuple[Sequence[str], str, Mapping[str, Any]]] = []
        self._global: List[Tuple[Sequence[str], str, Mapping[str, Any]]] = []

    def add_argument(self, *flags: str, dest: str = "", **how: Any) -> None:
        """Enter an argument of the command's own."""
        self._own.append((flags, dest or max(flags, key=len).lstrip("-").replace("-", "_"), how))

    def add_globals(self) -> None:
        """Enter the global options, but for those that the command has made its own."""
        taken = {flag for flags, _, _ in self._own for flag in flags}
        for short, long, metavar, default, does in _GLOBALS:
            flags = [flag for flag in (short, long) if flag not in taken]
            self._global.append((flags, long[2:].replace("-", "_"),
                                 {"metavar": metavar, "help": f"{does} (default: {default})"}))

    def read(self, words: Sequence[str]) -> Dict[str, Any]:
        """Return what the words mean; raise LookupError or ValueError unless they are plainly right."""
        options = {flag: (name, how) for flags, name, how in self._own + self._global for flag in flags}
        values = {name: how.get("default", False if "action" in how else None)
                  for _, name, how in self._own if not how.get("required")}
        at, places = 0, []
        while at < len(words):
            word, at = words[at], at + 1
            if not word.startswith("-"):
                places.append(at - 1)
                continue
            name, how = options[word]
            if "nargs" in how:
                raise ValueError(word)         # how many words it takes is for argparse to tell
            if how.get("action") == "store_true":
                values[name] = True
                continue
            value, at = _taken(words[at], how), at + 1
            values[name] = values[name] + [value] if how.get("action") == "append" else value
        left = list(words[places[0]:places[-1] + 1]) if places else []
        for (flag, *_), name, how in self._own:
            if flag.startswith("-"):
                continue
            if how.get("nargs") == "*":
                values[name], left = [_taken(word, how) for word in left], []
            elif left or how.get("nargs") != "?":
                values[name] = _taken(left.pop(0), how)
        if left or not {name for _, name, _ in self._own} <= values.keys():
            raise ValueError(words)
        return values

    def parser(self) -> Any:
        """Return the same as an argparse.ArgumentParser that raises UsageError instead of ending us."""
        import argparse

        class Parser(argparse.ArgumentParser):
            def error(self, message: str) -> Any:
                raise UsageError(f"{self.format_usage().strip()}\n{self.prog}: {message}")

        parser = Parser(**self._about, allow_abbrev=False,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
        for flags, name, how in self._own:
            named: Dict[str, Any] = {"dest": name} if flags[0].startswith("-") else {}
            parser.add_argument(*flags, **how, **named)
        group = parser.add_argument_group("options of every command, taken before and after it")
        for flags, name, how in self._global:
            group.add_argument(*flags, dest=name, default=argparse.SUPPRESS, **how)
        return parser

    def parse(self, words: Sequence[str]) -> Dict[str, Any]:
        """Return the arguments by their names; raise UsageError, or SystemExit once help is printed."""
        try:
            return self.read(words)
        except (LookupError, ValueError):
            return dict(vars(self.parser().parse_args(words)))


def arguments_of(name: str) -> Arguments:
    """Return what the command of that name takes."""
    cli = COMMANDS[name]
    arguments = Arguments(f"miniflow {name}", cli.does, f"example:\n  {cli.example}")
    cli.add(arguments)
    arguments.add_globals()
    return arguments


def _command_at(argv: Sequence[str]) -> int:
    """Return where the command stands: the first argument that is no option and no option's value."""
    at = 0
    while at < len(argv) and argv[at].startswith("-"):
        at += 2 if any(argv[at] in row[:2] for row in _GLOBALS) else 1
    return at


def _environment_defaults() -> Dict[str, str]:
    """Return the values of the global options where the command line gives none."""
    return {long[2:].replace("-", "_"):
            os.environ.get("MINIFLOW_" + long[2:].replace("-", "_").upper()) or default
            for _, long, _, default, _ in _GLOBALS}


def parse_arguments(argv: Sequence[str]) -> Tuple[str, Any]:
    """Return the command that `argv` names and its options; raise UsageError."""
    from types import SimpleNamespace
    listing = "\n".join(f"  {name:<9} {cli.does}" for name, cli in COMMANDS.items())
    top = Arguments("miniflow", "A workflow engine in one file.",
                    f"commands:\n{listing}\n\nminiflow COMMAND --help tells more of each.\n\n"
                    "example:\n  miniflow run sample_flow",
                    "miniflow [-f DIR] [-t DIR] [-o DIR] [-l LEVEL] COMMAND ...")
    top.add_argument("--version", action="store_true", help="show program's version number and exit")
    top.add_globals()
    at = _command_at(argv)
    before = top.parse(argv[:at])
    if before.pop("version"):
        print_result(f"miniflow {__version__}")
        sys.exit(0)
    if at >= len(argv):
        raise UsageError(top.parser().format_help().strip())
    name = argv[at]
    if name not in COMMANDS:
        raise UsageError(f"miniflow: there is no command {shown(name)}"
                         + (near(name, COMMANDS) or f"; there are {', '.join(COMMANDS)}"))
    given = arguments_of(name).parse(argv[at + 1:])
    options = SimpleNamespace(**{**_environment_defaults(), **before, **given})
    options.level = options.level.upper()
    if options.level not in LEVELS:
        raise UsageError(f"--level {shown(options.level)}: expected one of {', '.join(LEVELS)}")
    return name, options


def _settle_in() -> None:
    """Make sure of the standard streams, so that no file of ours becomes one, and of the directory."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)      # gets the lowest number that is free: this one
    for name, fd in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, "r" if fd == 0 else "w", encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        os.getcwd()
    except OSError as exc:
        raise UsageError(f"the working directory can't be found: {exc.strerror}; change to another") from None


def answer(argv: Sequence[str], more: Mapping[str, Any], tell: Callable[[str], None] = say) -> int:
    """Do what was typed, with `more` options than can be; only here does an error become text and a code."""
    try:
        _settle_in()
        name, options = parse_arguments(argv)
        vars(options).update(more)
        return COMMANDS[name].run(options)
    except MiniFlowError as exc:
        tell("\n".join(f"error: {line}" if isinstance(exc, FlowError) else line
                       for line in safe(exc).split("\n")))
        return exc.exit_code
    except BrokenPipeError:                     # whoever read stdout has gone
        let_go_of_stdout()
        return 141
    except KeyboardInterrupt:
        return 130
    except Exception as exc:
        if isinstance(exc, OSError) and exc.errno in PRESSURE_ERRORS | DISK_ERRORS:
            say(f"the system has no means left for MiniFlow itself: {exc}")
            return StateError.exit_code
        import traceback
        say(traceback.format_exc())
        say(f"this is a bug in MiniFlow {__version__}; "
            "please report it with the lines above and what you typed")
        return 70


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line and return the exit code."""
    if argv is None:                            # this process is ours, and what is imported stays in it:
        gc.freeze()                             # neither a collection nor the exit has to go through that
    return answer(sys.argv[1:] if argv is None else argv, {})


def start_bundle(folder: str, flow: str) -> int:
    """Run the command line in a bundle that was unpacked to `folder`, of which `flow` is what it is for."""
    global bundled
    bundled = flow
    sys.argv[1:1] = ["-f", os.path.join(folder, "flows"), "-t", os.path.join(folder, "tasks")]
    return main()


def run_subflow() -> int:
    """Run a flow as the task of another run, as stdin says; hand on its final context, or why it failed."""
    global bundled
    asked, output = json.load(sys.stdin), os.environ["MINIFLOW_OUTPUT"]
    bundled = asked["flow"]                     # if resumed, it goes by the flow beside the outer one
    for name in list(os.environ):
        if name in OWN_VARIABLES and name != "MINIFLOW_COOKIE" or name.startswith("MINIFLOW_PARAM_"):
            del os.environ[name]                # the outer run's
    store, run_id = Store(asked["output_dir"]), asked["run_id"]
    again = ["resume", run_id] if store.exists(run_id) else [
        "run", asked["flow"], "--run-id", run_id, "--params", json.dumps(asked["params"])]
    said: List[str] = []

    def tell(text: str) -> None:
        said.append(text)
        say(text)

    code = answer(["-f", asked["flows_dir"], "-t", asked["tasks_dir"], "-o", asked["output_dir"], *again],
                  asked["options"], tell)
    told = {"reason": said[0].partition("\n")[0] if said else f"run {run_id}: exit {code}", "code": code}
    try:
        run = store.load(run_id).run
        if run.ok:
            told = run.ctx
        elif not said:
            told["reason"] = f"run {run_id}: {run.status}" + (f" ({run.reason})" if run.reason else "")
        for key, kind in (pair for task in run.tasks.values() for pair in task.unsaved.items()):
            say(f"{safe(key)} is not handed on: "
                + ("it holds a secret" if kind == "secret" else f"JSON can't hold a {kind}"))
    except MiniFlowError:
        pass                                    # said already
    with open(output, "w", encoding="ascii") as file:
        json.dump(told, file)
    return code


def run_scheduled() -> int:
    """Make the run of a scheduled time, as sys.argv says; then start what has waited for its end."""
    at, argv = int(sys.argv[2]), sys.argv[3:]
    code = answer(argv, {"scheduled_time": at})
    if code in (0, 1):                         # the run has ended, and not by somebody who wants an end
        flow = re.sub(r"\.(json|py)$", "", os.path.basename(argv[argv.index("run") + 1]))
        answer([*argv[:6], "tick"], {"ended": flow})
    return code


if __name__ == "__main__":
    sys.exit(main())
