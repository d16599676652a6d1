"""A stand-in for the metadata server of Google Cloud, as its documentation describes it."""

import contextlib
import http.server
import threading
import urllib.parse
from collections.abc import Iterator


class MetadataServer(http.server.ThreadingHTTPServer):
    """Says whether the machine is preempted, at once to who does not know the value, else when it changes.

    Attributes:
      preempted: set when it is.
      statuses: of the answers; the first is that it is not available, as the real server has at times.
    """

    def __init__(self):
        super().__init__(("localhost", 0), _Handler)
        self.preempted = threading.Event()
        self.statuses: list[int] = []


class _Handler(http.server.BaseHTTPRequestHandler):
    server: MetadataServer

    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        asked = dict(urllib.parse.parse_qsl(url.query))
        if self.headers["Metadata-Flavor"] != "Google":
            self._answer(403, "")
        elif url.path != "/computeMetadata/v1/instance/preempted":
            self._answer(404, "")
        elif not self.server.statuses:
            self._answer(503, "")
        else:
            if asked.get("wait_for_change") == "true" and asked.get("last_etag") == "FALSE":
                self.server.preempted.wait(float(asked["timeout_sec"]))
            self._answer(200, str(self.server.preempted.is_set()).upper())

    def _answer(self, status: int, value: str):
        self.server.statuses.append(status)
        self.send_response(status)
        self.send_header("ETag", value)
        self.end_headers()
        self.wfile.write(value.encode())

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving() -> Iterator[MetadataServer]:
    """A server on a free port."""
    with MetadataServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.preempted.set()  # nobody waits any more
        server.shutdown()
