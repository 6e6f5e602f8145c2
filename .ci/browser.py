"""Drives a headless Chromium over its DevTools protocol, with the standard library alone.

    with start() as browser:
        browser.open("http://127.0.0.1:8080/")
        browser.click("button")
        browser.wait("document.title === 'done'")
"""
import base64
import contextlib
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import time
import urllib.request

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def program():
    """Return the path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a Chromium; made by start()."""

    def __init__(self, width, height):
        self.folder = tempfile.mkdtemp(prefix="miniflow-browser-")
        self.process = subprocess.Popen(
            [program(), "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions",
             "--disable-background-networking", "--remote-debugging-port=0", f"--window-size={width},{height}",
             f"--user-data-dir={self.folder}", "about:blank"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
        found = next(filter(None, (re.search(rb"ws://127\.0\.0\.1:(\d+)/", line) for line in self.process.stderr)))
        threading.Thread(target=self.process.stderr.read, daemon=True).start()      # keeps its stderr drained
        port, self.number, self.rest, self.events = int(found[1]), 0, b"", []
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
            page = next(tab for tab in json.load(answer) if tab["type"] == "page")["webSocketDebuggerUrl"]
        self.socket = socket.create_connection(("127.0.0.1", port), 60)
        self.socket.sendall((f"GET {page.split(str(port), 1)[1]} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
                             "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                             f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}\r\n\r\n").encode())
        while b"\r\n\r\n" not in self.rest:
            self.rest += self.socket.recv(65536)
        self.rest = self.rest.partition(b"\r\n\r\n")[2]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        with contextlib.suppress(Exception):
            self.call("Browser.close")
            self.process.wait(5)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.process.stderr.close()
        self.socket.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, size):
        while len(self.rest) < size:
            more = self.socket.recv(1 << 16)
            if not more:
                raise EOFError("the browser has gone")
            self.rest += more
        content, self.rest = self.rest[:size], self.rest[size:]
        return content

    def _message(self):
        content = b""
        while True:
            first, second = self._read(2)
            size = second & 127
            if size > 125:
                size = int.from_bytes(self._read(2 if size == 126 else 8), "big")
            part = self._read(size)
            if first & 15 < 3:
                content += part
                if first & 128:
                    return json.loads(content)

    def call(self, method, **params):
        """Call a method of the protocol and return its result; what happens meanwhile is kept in `events`."""
        self.number += 1
        content, mask = json.dumps({"id": self.number, "method": method, "params": params}).encode(), os.urandom(4)
        size = len(content)
        head = (bytes([129, 128 | size]) if size < 126 else
                b"\x81\xfe" + struct.pack(">H", size) if size < 65536 else b"\x81\xff" + struct.pack(">Q", size))
        self.socket.sendall(head + mask + bytes(byte ^ mask[n & 3] for n, byte in enumerate(content)))
        while True:
            message = self._message()
            if message.get("id") == self.number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self.events.append(message)

    def open(self, address):
        """Go to an address and wait until it is there."""
        self.call("Page.navigate", url="about:blank")
        self.wait("location.href === 'about:blank'")
        self.call("Page.navigate", url=address)
        self.wait("location.href !== 'about:blank' && document.readyState === 'complete'")

    def evaluate(self, script):
        """Return the value of a JavaScript expression; a promise is waited for."""
        told = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in told:
            raise RuntimeError(told["exceptionDetails"]["exception"].get("description"))
        return told["result"].get("value")

    def wait(self, script, seconds=20):
        """Return the value of an expression once it is there and not false (an element comes as {})."""
        end = time.monotonic() + seconds
        while True:
            value = self.evaluate(script)
            if value not in (None, False, 0, ""):
                return value
            if time.monotonic() > end:
                raise AssertionError(f"waited in vain for {script}; the page says: "
                                     + str(self.evaluate("document.body.innerText"))[:600])
            time.sleep(0.05)

    def click(self, selector):
        """Click with the mouse in the middle of the first element of a CSS selector."""
        where = self.wait(f"(() => {{ const e = document.querySelector({json.dumps(selector)}); if (!e) return null;"
                          " e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
                          " return b.width ? [b.x + b.width / 2, b.y + b.height / 2] : null; })()")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=where[0], y=where[1], button="left", clickCount=1)

    def key(self, name, code, text=""):
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, windowsVirtualKeyCode=code,
                      **({"text": text} if text and kind == "keyDown" else {}))

    def resize(self, width, height, dark=False):
        """Give the page another size, and the system another wish for light or dark."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=False)
        self.call("Emulation.setEmulatedMedia",
                  features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def screenshot(self, path=None):
        """Return a picture of the page as PNG, and write it to a file."""
        picture = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        if path:
            with open(path, "wb") as file:
                file.write(picture)
        return picture

    def console(self):
        """Return what went wrong in the page so far: errors, exceptions, what the policy blocked."""
        self.evaluate("1")
        return [event["params"] for event in self.events if event["method"] == "Runtime.exceptionThrown"
                or event["method"] == "Runtime.consoleAPICalled" and event["params"]["type"] == "error"
                or event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error"]

    def requests(self):
        """Return the addresses that the page has asked for so far."""
        self.evaluate("1")
        return [event["params"]["request"]["url"] for event in self.events
                if event["method"] == "Network.requestWillBeSent"]


def start(width=1280, height=800):
    """Start a browser; use it in a with statement."""
    return Browser(width, height)
