"""Looks at what MiniFlow draws in a real Chromium: python3 .ci/pages.py [NAME…].

Each check prints a line; the last one is "N passed, N failed, N skipped".  Without a Chromium all are skipped.
"""
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from browser import Browser, find_chromium  # noqa: E402

ENGINE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "miniflow.py")
CHECKS = {}

# Texts that would do something if they were taken for more than text; the first three would be told of.
HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror="alert(1)">', "<svg onload=alert(1)>", "</script>",
           "</style>", "]]>", "<!--", "\x1b[31mred\x1b[0m", "a\u202eb", "javascript:alert(1)", "\\u003cb>", "&lt;b&gt;"]


def check(function):
    """Enter a check, which gets a Browser and a directory, and raises where something is wrong."""
    CHECKS[function.__name__] = function
    return function


def miniflow(folder, *args, codes=(0,)):
    """Run a command in `folder` and return its stdout."""
    done = subprocess.run([sys.executable, ENGINE, *args], cwd=folder, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode in codes, (args, done.returncode, done.stderr.decode())
    return done.stdout.decode()


def write_flow(folder, name, *tasks, **fields):
    """Write a flow into `folder`."""
    os.makedirs(os.path.join(folder, "flows"), exist_ok=True)
    with open(os.path.join(folder, "flows", f"{name}.json"), "w", encoding="utf-8") as file:
        json.dump({"name": name, **fields, "tasks": tasks}, file)


def make_report(folder, name, *tasks, **fields):
    """Run a flow, whatever comes of it, and return the address of its report."""
    write_flow(folder, name, *tasks, **fields)
    run = miniflow(folder, "run", name, codes=(0, 1)).strip()
    path = os.path.join(folder, miniflow(folder, "report", run).strip())
    return "file://" + path


def etl():
    """Return the tasks of a flow with a bit of everything."""
    return [{"id": "fetch", "command": "echo rows=3 >> $MINIFLOW_OUTPUT; sleep 0.2"},
            {"id": "check", "command": "test $MINIFLOW_ATTEMPT = 2", "depends_on": ["fetch"], "max_retries": 1},
            {"id": "shard", "command": "sleep 0.1", "depends_on": ["fetch"], "foreach": [1, 2, 3]},
            {"id": "load", "command": "echo 'no such table' >&2; exit 3", "depends_on": ["check", "shard"]},
            {"id": "a_task_with_a_rather_long_name_for_a_box", "command": "true", "depends_on": ["load"]},
            {"id": "tell", "command": "true", "depends_on": ["load", "fetch"], "trigger_rule": "all_done"}]


def hostile():
    """Return the tasks of a flow that has hostile texts wherever there is room for one."""
    tasks = [{"id": f"t{n}", "description": text, "command": ["printf", "%s\\n", text],
              "if": f"run.id != {json.dumps(text)}"} for n, text in enumerate(HOSTILE)]
    return [*tasks, {"id": "bad", "command": ["sh", "-c", 'printf "%s\\n" "$@" >&2; exit 1', "sh", *HOSTILE]}]


def look(page, url, **options):
    """Open a page and hold that it is in order: no errors, no requests, no scrolling sideways."""
    page.open(url, **options)
    assert page.errors == [], page.errors
    outside = [request for request in page.requests if request not in (url, "data:,")]
    assert outside == [], outside
    wide = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert wide[0] <= wide[1], f"it scrolls sideways: {wide}"


@check
def a_report_is_in_order_on_a_desk_and_on_a_phone_in_light_and_in_dark(page, folder):
    url, seen = make_report(folder, "etl", *etl(), params={"day": "2026-11-21"}), {}
    for width in (1200, 375):
        for dark in (False, True):
            look(page, url, width=width, dark=dark)
            seen[width, dark] = page.screenshot(os.environ.get("PAGES_SHOTS") and os.path.join(
                os.environ["PAGES_SHOTS"], f"report-{width}-{'dark' if dark else 'light'}.png"))
            page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
            wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert wide <= 0, f"unfolded it scrolls sideways by {wide} at {width}"
    assert len(set(seen.values())) == 4
    backs = []
    for dark in (False, True):
        page.open(url, dark=dark)
        backs.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert backs == ["rgb(255, 255, 255)", "rgb(13, 17, 23)"], backs


@check
def the_table_of_a_report_is_sorted_and_filtered(page, folder):
    look(page, make_report(folder, "etl", *etl()))
    names = ("[...document.querySelector('#tasks tbody').rows].filter(row => !row.hidden)"
             ".map(row => row.cells[0].innerText)")
    before = page.evaluate(names)
    page.click("#tasks th:nth-child(4) button")
    seconds = page.evaluate("[...document.querySelectorAll('#tasks td:nth-child(4)')].map(cell => +cell.dataset.v)")
    assert seconds == sorted(seconds) and seconds[0] < seconds[-1], seconds
    page.click("#tasks th:nth-child(4) button")
    assert page.evaluate("[...document.querySelectorAll('#tasks td:nth-child(4)')].map(cell => +cell.dataset.v)"
                         ) == seconds[::-1]
    page.click("#tasks th:nth-child(1) button")
    assert page.evaluate(names) == sorted(before) != before
    page.click("#filter")
    for char in "upstream":
        page.key(char, char)
    assert page.evaluate(names) == ["a_task_with_a_rather_long_name_for_a_box"], page.evaluate(names)


@check
def a_task_of_the_graph_leads_to_all_about_it(page, folder):
    look(page, make_report(folder, "etl", *etl()))
    assert page.evaluate("document.querySelectorAll('details[open]').length") == 1
    page.click("svg.graph a:nth-of-type(1) text")
    page.wait("document.querySelectorAll('details[open]').length === 2")
    assert "rows" in page.evaluate("document.querySelector('details:target').innerText")


@check
def hostile_texts_are_shown_and_do_nothing(page, folder):
    url = make_report(folder, "hostile", *hostile(), description=HOSTILE[1])
    look(page, url)
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    text = page.evaluate("document.body.innerText")
    for one in HOSTILE:
        shown = one.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
        assert text.count(shown) >= 2, one
    assert page.evaluate("document.querySelectorAll('script, img, iframe').length") == 1
    # Should a text become markup after all, the policy does not let it run.
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.ran = 1\">')")
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = 1'}))")
    time.sleep(0.2)
    assert page.evaluate("window.ran === undefined")
    assert any("Content Security Policy" in error for error in page.errors), page.errors


@check
def a_report_prints(page, folder):
    look(page, make_report(folder, "etl", *etl()))
    printed = page.call("Page.printToPDF", printBackground=False)["data"]
    assert len(printed) > 20_000, len(printed)
    assert page.evaluate("document.querySelectorAll('details:not([open])').length") == 0, "all is printed"


@check
def a_report_of_ten_thousand_tasks_opens(page, folder):
    url = make_report(folder, "many", {"id": "each", "command": "true", "foreach": [0]}, *[
        {"id": f"t{n}", "wait_for": {"seconds": 0}, "if": "false"} for n in range(10_000)])
    began = time.monotonic()
    look(page, url)
    page.click("#tasks th:nth-child(1) button")
    page.wait("document.querySelector('th[aria-sort]') !== null")
    print(f"        {os.path.getsize(url[7:]) / 1e6:.1f} MB, open and sorted in {time.monotonic() - began:.1f} s")


@check
def a_graph_as_svg_is_seen_in_light_and_in_dark(page, folder):
    write_flow(folder, "hostile", *hostile(), {"id": "end", "command": "true", "depends_on": ["t0", "t1", "bad"]})
    path, seen = os.path.join(folder, "graph.svg"), []
    with open(path, "w", encoding="utf-8") as file:
        file.write(miniflow(folder, "graph", "hostile", "--format", "svg"))
    for dark in (False, True):
        page.open(f"file://{path}", dark=dark)
        assert (page.errors, page.requests) == ([], [f"file://{path}"]), (page.errors, page.requests)
        assert page.evaluate("document.querySelectorAll('g.task').length") == len(HOSTILE) + 2
        seen.append(page.screenshot())
    assert seen[0] != seen[1]


def main():
    """Make the checks that are named, or all; return the exit code."""
    names = sys.argv[1:] or list(CHECKS)
    if find_chromium() is None:
        print("pages: there is no Chromium; install it by apt-get install chromium")
        print(f"0 passed, 0 failed, {len(names)} skipped")
        return 0
    failed = 0
    with Browser() as page:
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    CHECKS[name](page, os.path.realpath(folder))
                    print(f"ok      {name.replace('_', ' ')}")
                except Exception:
                    failed += 1
                    print(f"FAILED  {name.replace('_', ' ')}\n{traceback.format_exc()}")
            sys.stdout.flush()
    print(f"{len(names) - failed} passed, {failed} failed, 0 skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
