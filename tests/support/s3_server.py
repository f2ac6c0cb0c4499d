"""A real S3-speaking server (moto's) in a process of its own, on a port that the system chose."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from xml.etree import ElementTree

BUCKET = "artifacts"
XML_NAMESPACE = "{http://s3.amazonaws.com/doc/2006-03-01/}"


class S3Server:
    """A server with one empty bucket; can be killed and started again on its port, without its objects."""

    def __init__(self) -> None:
        self._port = 0
        self.start()

    @property
    def endpoint(self) -> str:
        """Base URL of the server."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs to know, by the variables that S3 clients read."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": "secret",
        }

    def keys(self) -> list[str]:
        """The keys of all objects, in order."""
        keys: list[str] = []
        query = {"list-type": "2"}
        while True:
            url = f"{self.endpoint}/{BUCKET}?{urllib.parse.urlencode(query)}"
            with urllib.request.urlopen(url, timeout=30) as answer:
                page = ElementTree.fromstring(answer.read())
            keys += [element.text or "" for element in page.iter(f"{XML_NAMESPACE}Key")]
            if not (token := page.findtext(f"{XML_NAMESPACE}NextContinuationToken")):
                return keys
            query["continuation-token"] = token

    def start(self) -> None:
        """Start it, and return when it has its bucket."""
        # Its own warnings are none of our tests'.
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self._port)],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if match := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                self._port = int(match[1])
                break
        else:
            raise AssertionError(f"the S3 server has not started: {self._process.wait()}")
        # It logs every request, and stands still when nobody reads that.
        self._reader = threading.Thread(target=self._process.stderr.read, name="S3 log")
        self._reader.start()
        request = urllib.request.Request(f"{self.endpoint}/{BUCKET}", method="PUT")
        urllib.request.urlopen(request, timeout=30).close()

    def kill(self) -> None:
        """End it: connections are refused from now on."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        assert self._process.stderr is not None
        self._process.stderr.close()

    def freeze(self) -> None:
        """Let it answer nobody: connections are taken, and nothing comes back."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it answer again."""
        self._process.send_signal(signal.SIGCONT)


@contextmanager
def running_s3_server() -> Iterator[S3Server]:
    """A server that ends with the block."""
    server = S3Server()
    try:
        yield server
    finally:
        server.kill()
