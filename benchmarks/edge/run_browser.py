"""Run the cases in headless Chromium: a server on 127.0.0.1 gives it the page, onnxruntime-web, the cases; takes the results."""

from __future__ import annotations

import json
import queue
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
_TYPES = {".html": "text/html", ".mjs": "text/javascript", ".wasm": "application/wasm", ".json": "application/json"}
#: No service of its own may go out; nothing is asked of a display or a sandbox.
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--no-default-browser-check", "--disable-extensions", "--mute-audio",
    "--disable-dev-shm-usage", "--disable-domain-reliability", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip


def serve(web: Path, cases: Path, names: list[str], results: queue.Queue[dict[str, Any]]) -> ThreadingHTTPServer:
    """The server, started in a thread."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/names":
                self._send(json.dumps(names).encode(), ".json")
                return
            roots = {"/web/": web, "/cases/": cases}
            root = next((folder for prefix, folder in roots.items() if self.path.startswith(prefix)), HERE)
            relative = self.path.split("/", 2)[2] if root is not HERE else self.path.lstrip("/")
            path = root / relative
            if not path.is_file():
                self.send_error(404)
                return
            self._send(path.read_bytes(), path.suffix)

        def do_POST(self) -> None:
            results.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self._send(b"{}", ".json")

        def _send(self, body: bytes, suffix: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", _TYPES.get(suffix, "application/octet-stream"))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Requests are not logged."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def run(chromium: str, web: Path, cases: Path, names: list[str], timeout: float) -> Iterator[dict[str, Any]]:
    """What the page tells, line by line. Raises TimeoutError where nothing comes for `timeout` seconds."""
    results: queue.Queue[dict[str, Any]] = queue.Queue()
    server = serve(web, cases, names, results)
    with tempfile.TemporaryDirectory(prefix="edge-chromium-", ignore_cleanup_errors=True) as profile:
        address = f"http://127.0.0.1:{server.server_address[1]}/page.html"
        command = [chromium, *FLAGS, f"--user-data-dir={profile}", address]
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while True:
                try:
                    found = results.get(timeout=timeout)
                except queue.Empty as error:
                    raise TimeoutError(f"Chromium said nothing for {timeout:g} s") from error
                if found.get("done"):
                    return
                yield found
        finally:
            browser.terminate()
            browser.wait(30)
            server.shutdown()
