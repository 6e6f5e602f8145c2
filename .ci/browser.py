"""Drives Chromium over its DevTools protocol, with the standard library alone.

    with Browser() as page:
        page.open("file:///…/report.html", width=375, dark=True)
        page.click("#tasks th button")
        page.wait("document.title !== ''")
        page.evaluate("document.body.scrollWidth")
        page.screenshot("shot.png")
        page.errors, page.requests        # what the console complained of; every address that was asked for

find_chromium() returns its path, or None where there is none.
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


def find_chromium():
    """Return the path of a Chromium or Chrome, or None."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    return next(filter(None, map(shutil.which, names)), None)


class Browser:
    """One page in a Chromium of its own, without a window; a context manager."""

    def __init__(self, chromium=None, patience=20):
        self.folder = tempfile.mkdtemp(prefix="miniflow-chromium-")
        self.patience, self.serial, self.received = patience, 0, b""
        self.errors, self.requests = [], []
        self.process = subprocess.Popen(
            [chromium or find_chromium(), "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
             "--disable-background-networking", "--remote-debugging-port=0", f"--user-data-dir={self.folder}",
             "about:blank"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def _connect(self):
        """Find the page among what the browser has open, and talk to it over a WebSocket."""
        for line in self.process.stderr:
            found = re.search(rb"ws://127\.0\.0\.1:(\d+)/", line)
            if found:
                break
        else:
            raise RuntimeError(f"Chromium did not start: exit {self.process.wait()}")
        port = int(found[1])
        threading.Thread(target=self.process.stderr.read, daemon=True).start()      # or it would block
        pages, end = [], time.monotonic() + self.patience
        while not pages and time.monotonic() < end:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
                pages = [page for page in json.load(answer) if page["type"] == "page"]
        path = pages[0]["webSocketDebuggerUrl"].split(str(port), 1)[1]
        self.socket = socket.create_connection(("127.0.0.1", port), self.patience)
        key = base64.b64encode(os.urandom(16)).decode()
        self.socket.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\n"
                            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\n"
                            "Sec-WebSocket-Version: 13\r\n\r\n".encode())
        head = self._take_until(b"\r\n\r\n")
        if b" 101 " not in head:
            raise RuntimeError(f"Chromium refuses the connection: {head!r}")
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _take_until(self, mark):
        while mark not in self.received:
            self.received += self.socket.recv(65536)
        head, self.received = self.received.split(mark, 1)
        return head

    def _take(self, size):
        while len(self.received) < size:
            chunk = self.socket.recv(65536)
            if not chunk:
                raise EOFError("Chromium has gone")
            self.received += chunk
        taken, self.received = self.received[:size], self.received[size:]
        return taken

    def _message(self):
        """Return the next message of the browser's."""
        content = b""
        while True:
            first, second = self._take(2)
            size = second & 127
            if size > 125:
                form = ">H" if size == 126 else ">Q"
                size, = struct.unpack(form, self._take(struct.calcsize(form)))
            part = self._take(size)
            if first & 15 in (0, 1, 2):
                content += part
                if first & 128:
                    return json.loads(content)

    def call(self, method, **params):
        """Call a method of the protocol and return its result; note what events come meanwhile."""
        self.serial += 1
        content = json.dumps({"id": self.serial, "method": method, "params": params}).encode()
        size, mask = len(content), os.urandom(4)
        head = struct.pack(">BB", 0x81, 0x80 | size) if size < 126 else (
            struct.pack(">BBH", 0x81, 0xfe, size) if size < 65536 else struct.pack(">BBQ", 0x81, 0xff, size))
        self.socket.sendall(head + mask + bytes(byte ^ mask[n & 3] for n, byte in enumerate(content)))
        while True:
            message = self._message()
            if message.get("id") == self.serial:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self._note(message)

    def _note(self, event):
        """Keep what tells of errors and requests."""
        params, method = event.get("params", {}), event.get("method")
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
        elif method == "Page.javascriptDialogOpening":
            self.errors.append(f"dialog: {params['message']}")
            self.serial += 1
            self.call("Page.handleJavaScriptDialog", accept=True)

    def open(self, url, width=1200, height=800, dark=False):
        """Show an address in a window of this size, in a light or a dark world; errors and requests begin anew."""
        self.errors, self.requests = [], []
        self.resize(width, height, dark)
        result = self.call("Page.navigate", url=url)
        if result.get("errorText"):
            raise RuntimeError(f"{url}: {result['errorText']}")
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def resize(self, width, height, dark=False):
        """Give the window another size, and the system another wish for light or dark."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def evaluate(self, expression):
        """Return the value of a JavaScript expression, awaited; raise RuntimeError for an exception."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {json.dumps(result['exceptionDetails'])}")
        return result["result"].get("value")

    def wait(self, expression, seconds=None):
        """Return the value of an expression once there is one that is not false (an element comes as {})."""
        end = time.monotonic() + (seconds or self.patience)
        while True:
            value = self.evaluate(expression)
            if value not in (None, False, 0, ""):
                return value
            if time.monotonic() > end:
                raise TimeoutError(f"waited in vain for {expression}; the page says: "
                                   + str(self.evaluate("document.body.innerText"))[:600])
            time.sleep(0.02)

    def click(self, selector):
        """Click in the middle of the first element that a selector finds."""
        x, y = self.wait(
            "(() => { const one = document.querySelector(%s); if (!one) return null;"
            " one.scrollIntoView({block: 'center'}); const box = one.getBoundingClientRect();"
            " return box.width ? [box.x + box.width / 2, box.y + box.height / 2] : null; })()" % json.dumps(selector))
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def key(self, name, text=""):
        """Press and release a key: Tab, Enter, a, …"""
        code = {"Enter": 13, "Tab": 9, "Escape": 27}.get(name, 0)
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, windowsVirtualKeyCode=code,
                      **({"text": text} if text and kind == "keyDown" else {}))

    def screenshot(self, path=None, whole=False):
        """Return the picture of what is seen, or of the whole page, as PNG; write it to `path` if one is given."""
        content = base64.b64decode(self.call("Page.captureScreenshot", format="png",
                                             captureBeyondViewport=whole)["data"])
        if path:
            with open(path, "wb") as file:
                file.write(content)
        return content

    def close(self):
        """End the browser and remove what it has left."""
        with contextlib.suppress(Exception):
            self.call("Browser.close")
        with contextlib.suppress(Exception):
            self.socket.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
