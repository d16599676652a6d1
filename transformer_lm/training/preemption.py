"""Google Cloud's notice that it takes a virtual machine away, 30 seconds before it does.

https://cloud.google.com/compute/docs/instances/spot#preemption-process, and how the metadata server is asked:
https://cloud.google.com/compute/docs/metadata/querying-metadata#waitforchange
"""

import contextlib
import http
import http.client
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

PRODUCT_NAME = Path("/sys/class/dmi/id/product_name")  # what the machine says it is; nothing is asked of a network
METADATA_HOST = "metadata.google.internal"
HOST_VARIABLE = "GCE_METADATA_HOST"  # another host in its place, as Google's libraries have it
NOTICE = "/computeMetadata/v1/instance/preempted"
WAIT_SECONDS = 60  # after which the server answers though nothing has changed
PATIENCE_SECONDS = 10  # beyond that, for a server that does not answer
PAUSE_SECONDS = 2  # between questions


@contextlib.contextmanager
def preemption_watched(notify: Callable[[str], object]) -> Iterator[None]:
    """On Google Cloud, tells `notify` when the machine is to be preempted, from a thread; elsewhere does nothing."""
    over = threading.Event()
    if host := _metadata_host():
        threading.Thread(target=_watch, args=(host, notify, over), daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _metadata_host() -> str | None:
    """HOST or HOST:PORT of the metadata server, None where there is none."""
    with contextlib.suppress(OSError):
        if PRODUCT_NAME.read_text().startswith("Google"):
            return os.environ.get(HOST_VARIABLE) or METADATA_HOST
    return os.environ.get(HOST_VARIABLE)


def _watch(host: str, notify: Callable[[str], object], over: threading.Event):
    tag = "0"  # of no value: the first answer comes at once
    while not over.is_set():
        with contextlib.suppress(OSError, http.client.HTTPException):  # it is asked again
            status, value, tag = _ask(host, tag)
            if value == "TRUE":
                notify("Google Cloud's preemption notice")
                return
            if status in (http.HTTPStatus.FORBIDDEN, http.HTTPStatus.NOT_FOUND):  # as in Kubernetes: SIGTERM comes
                return
        over.wait(PAUSE_SECONDS)


def _ask(host: str, tag: str) -> tuple[int, str, str]:
    """Status, value and its tag, as soon as there is another value than that of `tag`, or WAIT_SECONDS have passed."""
    connection = http.client.HTTPConnection(host, timeout=WAIT_SECONDS + PATIENCE_SECONDS)  # never by way of a proxy
    with contextlib.closing(connection):
        question = f"{NOTICE}?wait_for_change=true&timeout_sec={WAIT_SECONDS}&last_etag={tag}"
        connection.request("GET", question, headers={"Metadata-Flavor": "Google"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace").strip(), answer.headers.get("ETag", tag)
