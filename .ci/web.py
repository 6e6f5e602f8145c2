"""Tries `miniflow serve` from outside: its page in a real Chromium, and itself under load.

usage: python3 .ci/web.py [page] [load] [--shots DIR]

Prints a line for each part and ends with "N passed, N failed, N skipped".  --shots keeps pictures of the page.
"""
import concurrent.futures
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback

import browser

HERE = os.path.dirname(os.path.abspath(__file__))
ENGINE = os.path.join(os.path.dirname(HERE), "miniflow.py")
EVIL = "<img src=x onerror=alert(1)>\"'</script><script>document.title='pwned'</script>"


def flows():
    """Return the flows of the tried project."""
    slow = {"name": "slow", "description": EVIL, "tags": [EVIL], "params": {
        "greeting": {"type": "string", "default": "hi", "description": EVIL},
        "times": {"type": "integer", "min": 1, "max": 5, "required": True},
        "colour": {"enum": ["red", "green"], "default": "red"}, "loud": {"type": "boolean", "default": False},
        "list": {"type": "array", "default": [1]}}, "tasks": [
            {"id": "first", "description": EVIL, "command": "printf '%s\\n' \"$1\"; printf '\\033[31mred\\033[0m\\n'; "
             "echo \"$MINIFLOW_PARAM_GREETING times $MINIFLOW_PARAM_TIMES\"", "args": [EVIL]},
            {"id": "each", "depends_on": ["first"], "foreach": [1, 2, 3], "command": "echo $1",
             "args": ["${{ item }}"]},
            {"id": "waits", "depends_on": ["each"], "command": "while test ! -e go; do echo waiting; sleep 0.1; done"},
            {"id": "last", "depends_on": ["waits"],
             "command": "echo \"said=$MINIFLOW_PARAM_GREETING\" > $MINIFLOW_OUTPUT"}]}
    dice, tasks = random.Random(5), []
    for n in range(500):
        up = dice.sample(range(max(0, n - 60), n), min(n, dice.choice([0, 1, 1, 2, 2, 3]))) if n > 12 else []
        tasks.append({"id": f"task_{n:03}", "command": "true", "depends_on": [f"task_{m:03}" for m in sorted(up)]})
    return {"slow": slow, "big": {"name": "big", "tasks": tasks}, "red": {"name": "red", "tasks": [
        {"id": "boom", "command": "echo it went wrong here >&2; exit 4"}]},
            "bad": {"name": "bad", "tasks": [{"id": EVIL}]}}


class Server:
    """A project that is served; a context manager."""

    def __enter__(self):
        self.folder = tempfile.mkdtemp(prefix="miniflow-web-")
        os.mkdir(os.path.join(self.folder, "flows"))
        for name, flow in flows().items():
            with open(os.path.join(self.folder, "flows", f"{name}.json"), "w") as file:
                json.dump(flow, file)
        self.errors = open(os.path.join(self.folder, "stderr"), "w+")
        env = {name: value for name, value in os.environ.items() if name != "MINIFLOW_TOKEN"}
        self.process = subprocess.Popen([sys.executable, ENGINE, "serve", "--port", "0"], cwd=self.folder, env=env,
                                        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self.errors, text=True)
        self.address = self.process.stdout.readline().strip()
        found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/#token=(.+)", self.address)
        self.port, self.token = int(found[1]), found[2]
        return self

    def __exit__(self, *exc_info):
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(20)
        self.process.stdout.close()
        self.errors.seek(0)
        told = self.errors.read()
        self.errors.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        if exc_info[0] is None:
            assert (code, told) == (0, ""), (code, told)

    def at(self, *parts):
        return os.path.join(self.folder, *parts)

    def ask(self, method, path, body=None, timeout=60):
        """Return the status and the body of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), {
                "Authorization": f"Bearer {self.token}", "Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def memory(self):
        """Return the MB of memory that the server has used at most."""
        with open(f"/proc/{self.process.pid}/status") as file:
            return int(re.search(r"VmHWM:\s+(\d+)", file.read())[1]) / 1024


def try_page(shots):
    """List, start with params, watch, look at a log, cancel, resume; narrow and wide, light and dark."""
    def shoot(page, name):
        return page.screenshot(os.path.join(shots, name + ".png") if shots else None)

    with Server() as server, browser.Browser() as page:
        page.open(server.address, width=1280)
        page.wait("document.querySelectorAll('.flow').length === 4")
        assert "token" not in page.evaluate("location.href"), "the token stays in the address"
        light = shoot(page, "flows")
        page.click("[aria-label='start slow']")
        page.wait("document.querySelector('dialog [name=times]')")
        kinds = page.evaluate("[...document.querySelectorAll('dialog [name]')].map(e => e.name + ' ' + e.type)")
        assert kinds == ["greeting text", "times number", "colour select-one", "loud checkbox", "list textarea"], kinds
        page.click("dialog [type=submit]")              # a required param lacks
        page.wait("document.activeElement.name === 'times' && document.querySelector('[aria-invalid]')")
        shoot(page, "start")
        page.evaluate("document.querySelector('dialog [name=times]').value = 3")
        page.evaluate("document.querySelector('dialog [name=greeting]').value = 'hello <b>you</b>'")
        page.key("Enter", "\r")                     # the focus is in the form still
        page.wait("document.querySelector('h1')?.textContent.startsWith('slow-')")
        run_id = page.evaluate("document.querySelector('h1').textContent")
        page.wait("document.querySelector('[data-task=waits].s-running')")
        page.wait("document.querySelector('[data-task=each].s-success .count').textContent === '3/3'")
        shoot(page, "live")
        page.click("[data-task=first]")
        page.wait("document.querySelector('.log')?.textContent.includes('hello <b>you</b> times 3')")
        assert page.evaluate("document.querySelector('.log').textContent").startswith(EVIL + "\nred\n")
        assert page.evaluate("document.querySelectorAll('.log *').length") == 0
        shoot(page, "log")
        page.evaluate("document.querySelector('.drawer').dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))")
        page.wait("document.querySelector('.drawer').hidden")
        page.evaluate("document.querySelector('[data-task=waits]').focus()")
        page.key("Enter", "\r")                     # by the keyboard
        page.wait("document.querySelector('.log')?.textContent.split('waiting').length > 3")    # it follows
        page.click("#tab-gantt")
        page.wait("document.querySelectorAll('.gantt .line').length >= 5")
        shoot(page, "gantt")
        page.click("[data-key=cancel]")
        page.wait("document.querySelector('.chip')?.textContent === 'cancelled'")
        with open(server.at("go"), "w"):
            pass
        page.click("[data-key=resume]")
        page.wait("document.querySelector('.chip')?.textContent === 'success'")
        status, content = server.ask("GET", f"/api/v1/runs/{run_id}")
        told = json.loads(content)
        assert (told["status"], told["params"]["times"], told["ctx"]["said"]) == ("success", 3,
            "hello <b>you</b>"), told
        page.click("#tab-data")
        page.wait("document.querySelector('.json')?.textContent.includes('hello <b>you</b>')")
        dark = try_looks(page, server, shoot)
        assert light != dark, "dark looks like light"
        assert page.evaluate("document.title") != "pwned"
        assert page.evaluate("document.querySelectorAll('img').length") == 1, "something hostile became an element"
        page.evaluate('1')
        wrong = page.errors
        assert not wrong, json.dumps(wrong)[:2000]
        strays = [url for url in page.requests if not url.startswith((f"http://127.0.0.1:{server.port}/", "about:"))]
        assert not strays, strays


def try_looks(page, server, shoot):
    """See that every view fits a narrow screen; return a picture of the flows in the dark."""
    status, content = server.ask("POST", "/api/v1/runs", {"flow": "big"})
    assert status == 201, content
    big = json.loads(content)["id"]
    views = ["", f"runs/{big}", f"runs/{big}/gantt", f"runs/{big}/tasks", f"runs/{big}/graph/task_007", "runs",
             "flows/slow"]
    dark = b""
    for width, is_dark in ((1280, True), (1280, False), (375, False), (375, True)):
        page.resize(width, 800, is_dark)
        for view in views:
            page.evaluate(f"location.hash = '#/{view}'; show()")
            page.wait("document.querySelector('.flow, .node, .gantt .line, tbody tr')")
            if big in view:
                page.wait("document.querySelector('.chip')?.textContent === 'success'", 60)
            time.sleep(0.4)                             # for what moves
            picture = shoot(page, f"{view.split('/')[0] or 'flows'}{view.count('/')}-{view.split('/')[-1][:9]}-{width}"
                            + ("-dark" if is_dark else ""))
            dark = picture if is_dark and not view and width == 1280 else dark
            out = page.evaluate("""[...document.querySelectorAll('body *')]
                .filter((e) => !e.closest('svg, .table, .json, .log'))
                .filter((e) => e.getBoundingClientRect().right > innerWidth + 1)
                .map((e) => e.tagName + '.' + e.className)""")
            assert not out, (width, view, out)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (width, view)
    return dark


def try_load(_):
    """500 requests at once, clients that are slow in every way, a log of 1 GB: answered, within some MB."""
    with Server() as server:
        server.ask("POST", "/api/v1/runs", {"flow": "red", "run_id": "r"})
        while json.loads(server.ask("GET", "/api/v1/runs/r")[1])["status"] == "running":
            time.sleep(0.05)
        with open(server.at("miniflow_output", "logs", "r", "boom.1.log"), "r+b") as file:
            file.truncate(2**30)
        before = server.memory()
        slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(60)]
        for n, sock in enumerate(slow):                 # silent; dripping; never reading
            sock.sendall([b"", b"GET / HTTP/1.1\r\nX: ", (
                f"GET /api/v1/runs/r/tasks/boom/log HTTP/1.1\r\nHost: localhost:{server.port}\r\n"
                f"Authorization: Bearer {server.token}\r\n\r\n").encode()][n % 3])
        began = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(500) as pool:
            found = [answer.result()[0] for answer in [pool.submit(retried, server) for _ in range(500)]]
        took = time.monotonic() - began
        assert found == [200] * 500, {status: found.count(status) for status in found}
        status, tail = server.ask("GET", "/api/v1/runs/r/tasks/boom/log?offset=-1000")
        assert (status, tail) == (200, bytes(1000))
        size, began = read_log(server), time.monotonic()
        assert size == 2**30, size
        grown = server.memory() - before
        print(f"        500 requests beside 60 slow clients in {took:.1f} s; a log of 1 GB; {before:.0f} MB of memory, "
              f"and {grown:.0f} more")
        assert grown < 48, grown
        for sock in slow:
            sock.close()


def retried(server):
    """Ask for the runs until there is room, as the server asks a client to do."""
    for _ in range(60):
        try:
            answer = server.ask("GET", "/api/v1/runs?limit=1")
        except OSError:
            continue
        if answer[0] != 503:
            return answer
        time.sleep(0.2)
    return answer


def read_log(server):
    """Read the whole log and return its size."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", "/api/v1/runs/r/tasks/boom/log", headers={"Authorization": f"Bearer {server.token}"})
    answer, size = connection.getresponse(), 0
    while True:
        part = answer.read(1 << 20)
        if not part:
            connection.close()
            return size
        size += len(part)


def main(words):
    """Try what the words name, or everything."""
    shots = words.pop(words.index("--shots") + 1) if "--shots" in words else None
    if shots:
        os.makedirs(shots, exist_ok=True)
    parts = {"page": try_page, "load": try_load}
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for name in [word for word in words if word in parts] or parts:
        if name == "page" and not browser.find_chromium():
            what, why = "skipped", ": there is no Chromium"
        else:
            try:
                parts[name](shots)
                what, why = "passed", ""
            except Exception:
                what, why = "failed", ":\n" + traceback.format_exc()
        counts[what] += 1
        print(f"{what:<8}{name}{why}", flush=True)
    print(", ".join(f"{count} {what}" for what, count in counts.items()))
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
