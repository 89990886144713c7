"""Remote images: off by default; when on, of public addresses alone."""

from __future__ import annotations

import asyncio
import http.server
import socket
import threading
import time
from contextlib import contextmanager, suppress

import httpcore
import pytest
from serving import WEB, data_url, message, picture_bytes, running

from aki.apps.serve import remote
from aki.apps.serve.images import image_files
from aki.apps.serve.limits import Limits, Refused
from aki.apps.serve.remote import PublicNetwork, is_public

LIMITS = Limits(max_body_mb=1, patience=1.0)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.8.9.10",
        "0.0.0.0",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "192.0.2.1",
        "198.18.0.1",
        "::",
        "::1",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "ff02::1",
        "2001:db8::1",
        "fec0::1",
        "64:ff9b:1::7f00:1",
        "::127.0.0.1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "2002:7f00:1::",
        "2001:0:4136:e378:8000:63bf:80ff:fffe",  # Teredo around 127.0.0.1
    ],
)
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["93.184.216.34", "8.8.8.8", "2606:4700::1111"])
def test_addresses_that_are(address):
    assert is_public(address)


class Recorder(httpcore.AsyncNetworkBackend):
    def __init__(self):
        self.hosts = []

    async def connect_tcp(self, host, port, timeout=None, local_address=None, socket_options=None):
        self.hosts.append(host)
        raise httpcore.ConnectError


def resolving(monkeypatch, *answers):
    """Name servers that answer otherwise each time."""
    left = list(answers)

    async def getaddrinfo(self, host, port, **_):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in left.pop(0)]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)


def test_the_address_that_was_checked_is_the_one_that_is_connected_to(monkeypatch):
    resolving(monkeypatch, ["93.184.216.34"], ["127.0.0.1"])
    inner = Recorder()
    with pytest.raises(httpcore.ConnectError):
        asyncio.run(PublicNetwork(inner).connect_tcp("rebinding.example", 80))
    assert inner.hosts == ["93.184.216.34"]


def test_one_private_address_among_public_ones_is_enough_to_refuse(monkeypatch):
    resolving(monkeypatch, ["93.184.216.34", "10.0.0.1"])
    inner = Recorder()
    with pytest.raises(remote.NotPublic):
        asyncio.run(PublicNetwork(inner).connect_tcp("mixed.example", 80))
    assert inner.hosts == []


@contextmanager
def website():
    """A web server here; gives its address and what it was asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            place, _, to = self.path[1:].partition("?")
            if place == "redirect":
                self.send_response(302)
                self.send_header("Location", to)
                self.end_headers()
            elif place == "picture":
                self.send(picture_bytes(40))
            elif place == "large":
                self.send(b"x" * 1_200_000)
            elif place == "half":
                self.send(b"x" * 600_000)
            elif place == "rather-slow":
                time.sleep(0.4)
                self.send(b"x")
            elif place == "slow":
                self.send_response(200)
                self.end_headers()
                for _ in range(20):
                    self.wfile.write(b"x")
                    self.wfile.flush()
                    time.sleep(0.2)
            else:
                self.send_error(404)

        def send(self, data):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

        def handle(self):
            with suppress(BrokenPipeError, ConnectionResetError):
                super().handle()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def site():
    with website() as both:
        yield both


@pytest.fixture
def home_is_public(monkeypatch):
    """127.0.0.1 plays the public internet; the rest of the loopback network stays what it is."""
    honest = is_public
    monkeypatch.setattr(remote, "is_public", lambda address: address == "127.0.0.1" or honest(address))


def got(*urls):
    return asyncio.run(image_files(list(urls), LIMITS, remote=True))


@pytest.mark.usefixtures("home_is_public")
class TestFetch:
    def test_a_picture(self, site):
        assert got(site[0] + "/picture") == [picture_bytes(40)]

    def test_a_redirect(self, site):
        assert got(f"{site[0]}/redirect?/redirect?/picture") == [picture_bytes(40)]

    @pytest.mark.parametrize("to", ["http://127.0.0.2/picture", "http://[::1]/picture", "http://169.254.169.254/"])
    def test_a_redirect_to_a_private_address(self, site, to):
        with pytest.raises(Refused, match="not of the public internet"):
            got(f"{site[0]}/redirect?{to}")

    @pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:image/png;base64,AAAA", ""])
    def test_a_redirect_to_something_else(self, site, to):
        with pytest.raises(Refused, match="could not be fetched"):
            got(f"{site[0]}/redirect?{to}")

    def test_too_many_redirects(self, site):
        with pytest.raises(Refused, match="could not be fetched"):
            got(site[0] + "/redirect?" * 5 + "/picture")
        assert len(site[1]) == 4

    def test_too_large(self, site):
        with pytest.raises(Refused, match="larger than the 1 MB"):
            got(site[0] + "/large")

    def test_too_large_together(self, site):
        half = site[0] + "/half"
        assert len(got(half, data_url(b"x" * 900_000))) == 2
        with pytest.raises(Refused, match="larger than the 1 MB"):
            got(half, half)

    def test_too_slow_together(self, site):
        started = time.monotonic()
        with pytest.raises(Refused, match="could not be fetched"):
            got(*[site[0] + "/rather-slow"] * 8)
        assert time.monotonic() - started < 2

    def test_too_slow(self, site):
        started = time.monotonic()
        with pytest.raises(Refused, match="could not be fetched"):
            got(site[0] + "/slow")
        assert time.monotonic() - started < 3.5

    @pytest.mark.parametrize(
        "url",
        [
            "{site}/nothing",
            "http://127.0.0.1:1/",
            "http://",
            "http://:80",
            "http://no such host/",
            "http://xn--/",
            "https://{port}",
            "http://exämple.test/",
            "{site}/é",
            "http://①②⑦.0.0.1/",
        ],
    )
    def test_nothing_there(self, site, url):
        port = site[0].removeprefix("http://")
        with pytest.raises(Refused, match="could not be fetched"):
            got(url.format(site=site[0], port=port))

    def test_proxies_of_the_environment_are_not_asked(self, site, monkeypatch):
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
        monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
        assert got(site[0] + "/picture") == [picture_bytes(40)]


def post(port, url):
    body = {"model": "tiny", "messages": [message("how many digits are red?", url)], "max_tokens": 8}
    return WEB.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=20)


@pytest.mark.usefixtures("home_is_public")
def test_off_by_default_and_on_it_is_the_picture(engine, port, site):
    url = site[0] + "/picture"
    assert "fetches no remote images" in post(port, url).json()["error"]["message"]
    assert site[1] == []
    with running(engine, LIMITS, remote_images=True) as willing:
        said = post(willing, url).json()["choices"][0]["message"]["content"]
        assert said == post(port, data_url(picture_bytes(40))).json()["choices"][0]["message"]["content"]
        for other in ("file:///etc/passwd", "/etc/passwd", "ftp://127.0.0.1/x"):
            assert post(willing, other).status_code == 400


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]"])
def test_on_it_reaches_nothing_private(engine, site, host):
    url = site[0].replace("127.0.0.1", host) + "/picture"
    with running(engine, LIMITS, remote_images=True) as willing:
        answer = post(willing, url)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_image_url"
    assert site[1] == []
