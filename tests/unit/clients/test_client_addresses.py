import pytest

from hidream.addresses import endpoint
from hidream.connection import Tls
from hidream.errors import AddressError


@pytest.mark.parametrize(
    ("address", "target", "is_encrypted"),
    [
        ("localhost", "localhost:8088", False),
        ("localhost:9", "localhost:9", False),
        ("10.0.0.1", "10.0.0.1:8088", False),
        ("http://images.example", "images.example:8088", False),
        ("HTTP://images.example:80/", "images.example:80", False),
        ("https://images.example", "images.example:443", True),
        ("https://images.example:8088", "images.example:8088", True),
        ("::1", "[::1]:8088", False),
        ("[::1]", "[::1]:8088", False),
        ("[fe80::1%eth0]:9", "[fe80::1%eth0]:9", False),
        ("https://[::1]", "[::1]:443", True),
        ("unix:/run/hidream.sock", "unix:/run/hidream.sock", False),
        ("dns:///images.example:9", "dns:///images.example:9", False),
        ("ipv4:10.0.0.1:9,10.0.0.2:9", "ipv4:10.0.0.1:9,10.0.0.2:9", False),
    ],
)
def test_an_address_is_understood_as_people_write_it(address: str, target: str, is_encrypted: bool) -> None:
    found, tls = endpoint(address)
    assert (found, tls) == (target, Tls() if is_encrypted else None)
    if not address.lower().startswith("http:"):
        asked_for = Tls(server_name="images.example")
        assert endpoint(address, asked_for) == (target, asked_for)


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("localhost:0", "port '0' is not 1 to 65535"),
        ("localhost:65536", "port '65536' is not 1 to 65535"),
        ("localhost:http", "port 'http' is not"),
        ("localhost:", "port '' is not"),
        (":8088", "is no host"),
        ("two words", "is no host"),
        ("https://images.example/v1", "without a path"),
        ("https://", "is no host"),
        ("grpc://images.example:9", "port '//images.example:9' is not"),
        ("", "is no host"),
    ],
)
def test_what_is_no_address_is_refused_before_any_call(address: str, reason: str) -> None:
    with pytest.raises(AddressError, match=reason):
        endpoint(address)


def test_a_url_that_says_plaintext_is_not_encrypted_in_silence() -> None:
    with pytest.raises(AddressError, match="say https://"):
        endpoint("http://images.example", Tls())
