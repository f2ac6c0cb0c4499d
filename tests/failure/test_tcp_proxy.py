"""The proxy of the failure harness does to connections what a bad network does."""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.failure.tcp_proxy import TcpProxy, running_proxy

DELAY_SECONDS = 0.2


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        # What a proxy cuts is reset.
        with suppress(ConnectionError):
            while data := self.request.recv(1024):
                self.request.sendall(data)


@pytest.fixture
def proxy() -> Iterator[TcpProxy]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        host, port = server.server_address[:2]
        with running_proxy((str(host), int(port))) as proxy:
            yield proxy
        server.shutdown()
        thread.join()


def connected(proxy: TcpProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=30)


def echo(connection: socket.socket, data: bytes = b"hello") -> bytes:
    connection.sendall(data)
    return connection.recv(1024)


def test_bytes_pass_both_ways(proxy: TcpProxy) -> None:
    with connected(proxy) as one, connected(proxy) as other:
        assert (echo(one, b"one"), echo(other, b"other")) == (b"one", b"other")
    assert proxy.num_connections == 2


def test_a_cut_resets_what_is_open_and_what_is_new_until_it_is_healed(proxy: TcpProxy) -> None:
    with connected(proxy) as before:
        assert echo(before) == b"hello"
        proxy.cut()
        with pytest.raises(OSError, match=r"reset|Broken pipe"):
            while echo(before):
                pass
    # The reset comes before the connection is made, before the end of the stream, or after it.
    with pytest.raises(OSError, match=r"reset|Broken pipe"), connected(proxy) as meanwhile:
        while True:
            echo(meanwhile)
    proxy.heal()
    with connected(proxy) as after:
        assert echo(after) == b"hello"


def test_what_was_sent_in_silence_arrives_when_it_is_over(proxy: TcpProxy) -> None:
    with connected(proxy) as connection:
        assert echo(connection) == b"hello"
        proxy.silence()
        connection.sendall(b"anybody?")
        connection.settimeout(DELAY_SECONDS)
        with pytest.raises(TimeoutError):
            connection.recv(1024)
        connection.settimeout(30)
        proxy.heal()
        assert connection.recv(1024) == b"anybody?"


@pytest.mark.parametrize("direction", ["to_upstream_seconds", "to_server_seconds"])
def test_a_delay_holds_every_byte(direction: str, proxy: TcpProxy) -> None:
    with connected(proxy) as connection:
        proxy.delay(**{direction: DELAY_SECONDS})
        start = time.monotonic()
        assert echo(connection) == b"hello"
        assert time.monotonic() - start >= DELAY_SECONDS
