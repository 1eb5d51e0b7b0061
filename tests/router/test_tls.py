import asyncio
import ssl
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from router.config import load
from router.errors import ConfigError, UpstreamError
from router.tls import check_tls, client_context, server_context
from router.upstream import Timeouts, Upstream
from tests.support.simulated_worker import SimulatedWorker, chat_body, run, running_gateway


def test_simulated_tls_and_client_certificates(tmp_path: Path) -> None:
    made = certificates(tmp_path)
    settings = {"tls_cert": made["server.pem"], "tls_key": made["server.key"], "tls_client_ca": made["ca.pem"]}

    async def scenario() -> None:
        worker = await SimulatedWorker().start()
        async with running_gateway(worker, **settings) as gateway:
            context = ssl.create_default_context(cafile=made["ca.pem"])
            url = f"https://127.0.0.1:{gateway.port}/health"
            async with httpx.AsyncClient(verify=context) as client:
                with pytest.raises(httpx.TransportError):
                    (await client.get(url)).raise_for_status()
            context.load_cert_chain(made["client.pem"], made["client.key"])
            async with httpx.AsyncClient(verify=context) as client:
                assert (await client.get(url)).status_code == 200
                chat = await client.post(url.replace("/health", "/v1/chat/completions"), json=chat_body("x"))
                assert chat.status_code == 200
            with pytest.raises(httpx.TransportError):
                await gateway.client.get("/health")

    run(scenario())


def test_workers_are_spoken_to_by_tls_and_shown_a_certificate(tmp_path: Path) -> None:
    made = certificates(tmp_path)
    seen: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok")
        writer.close()

    async def scenario() -> None:
        context = server_context(made["server.pem"], made["server.key"], made["ca.pem"])
        server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        pair = {"cert": made["client.pem"], "key": made["client.key"]}

        async def fetch(**options: Any) -> int:
            upstream = Upstream("w", url, Timeouts(2, 2, 2), key="worker-secret", tls=client_context(**options))
            try:
                return (await upstream.fetch("GET", "/health", timeout=2)).status
            finally:
                upstream.close()

        assert await fetch(authorities=made["ca.pem"], **pair) == 200
        assert await fetch(verify=False, **pair) == 200
        for options in (pair, {"authorities": made["ca.pem"]}):
            with pytest.raises(UpstreamError) as caught:
                await fetch(**options)
            assert "worker-secret" not in str(caught.value)
        assert all(b"authorization: Bearer worker-secret\r\n" in head for head in seen)
        server.close()

    run(scenario())


def test_files_for_tls_are_checked_before_serving(tmp_path: Path) -> None:
    made = certificates(tmp_path)
    with pytest.raises(ConfigError, match="belong together"):
        load({"tls_cert": made["server.pem"]}, {})
    with pytest.raises(ConfigError, match="tls_client_ca needs"):
        load({"tls_client_ca": made["ca.pem"]}, {})
    for wrong in (
        {"tls_cert": made["server.pem"], "tls_key": made["client.key"]},
        {"tls_cert": made["server.pem"], "tls_key": "/nowhere"},
        {"worker_ca": "/nowhere"},
        {"worker_cert": made["client.pem"], "worker_cert_key": made["server.key"]},
    ):
        with pytest.raises(ConfigError, match="cannot be used"):
            check_tls(load(wrong, {}))


def certificates(directory: Path) -> dict[str, str]:
    """A CA, and what it signed: a server's and a client's certificate with their keys."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)

    new = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    openssl(*new, "-x509", "-days", "2", "-subj", "/CN=ca", "-keyout", "ca.key", "-out", "ca.pem")
    (directory / "san").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost")
    for name in ("server", "client"):
        openssl(*new, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        sign = ["x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-days", "2"]
        openssl(*sign, "-CAcreateserial", "-extfile", "san", "-out", f"{name}.pem")
    return {path.name: str(path) for path in directory.iterdir()}
