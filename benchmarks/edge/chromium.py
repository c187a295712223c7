"""Headless Chromium by its pipe (DevTools protocol over file descriptors 3 and 4), with the standard library alone."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from run_browser import FLAGS


class Page:
    """One page; `requests`: every address that it asked for. Use as a context manager."""

    def __init__(self, address: str, timeout: float = 60.0) -> None:
        program = next((p for p in ("chromium", "chromium-browser", "google-chrome") if shutil.which(p)), None)
        if program is None:
            raise FileNotFoundError("chromium is not installed")
        self.requests: list[str] = []
        self._timeout, self._count, self._buffer = timeout, 0, b""
        self._profile = tempfile.TemporaryDirectory(prefix="edge-chromium-", ignore_cleanup_errors=True)
        read, theirs = os.pipe()
        mine, write = os.pipe()

        shell = ["bash", "-c", f'exec "$0" "$@" 3<&{mine} 4>&{theirs}', program, *FLAGS]
        command = [*shell, "--remote-debugging-pipe", f"--user-data-dir={self._profile.name}", "about:blank"]
        self._browser = subprocess.Popen(command, pass_fds=(mine, theirs), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(mine)
        os.close(theirs)
        self._read, self._write, self._session = read, write, ""
        targets = self._call("Target.getTargets")["targetInfos"]
        target = next(t["targetId"] for t in targets if t["type"] == "page")
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Network", "Page", "Runtime", "DOM"):
            self._call(f"{domain}.enable")
        self._call("Page.navigate", url=address)

    def __enter__(self) -> Page:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._browser.terminate()
        self._browser.wait(30)
        os.close(self._read)
        os.close(self._write)
        self._profile.cleanup()

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives; None where it raises."""
        return self._call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until it is true. Raises TimeoutError with what the page shows."""
        end = time.monotonic() + self._timeout
        while not self.value(expression):
            if time.monotonic() > end:
                raise TimeoutError(
                    f"{expression}: not in {self._timeout:g} s; the page says {self.value('document.body.innerText')!r}"
                )
            time.sleep(0.1)

    def choose_file(self, selector: str, path: Path) -> None:
        """Put a file into a file picker."""
        root = self._call("DOM.getDocument")["root"]["nodeId"]
        node = self._call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self._call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def screenshot(self, path: Path) -> None:
        """The page as PNG."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + self._timeout
        while True:
            found = self._receive(end)
            if found.get("method") == "Network.requestWillBeSent":
                self.requests.append(found["params"]["request"]["url"])
            if found.get("id") == self._count:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']['message']}")
                result: dict[str, Any] = found["result"]
                return result

    def _receive(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError("Chromium does not answer")
            part = os.read(self._read, 1 << 16)
            if not part:
                raise RuntimeError("Chromium has ended")
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(line)
        return found
