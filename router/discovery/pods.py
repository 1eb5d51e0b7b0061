"""Which pods are workers, and which of those may be sent requests.

A pod is a worker from when it is first seen Ready, with an address and not terminating, until it is deleted, has ended or
has lost its address. Meanwhile it is *held* while it is not Ready, and from when it is told to terminate: it gets no
further request, what it answers is finished, and what is known of its cache is kept. A pod is told from another at the
same address by its uid.

Annotations of a pod go before the settings: ``warmroute/port``, ``warmroute/report-port`` and ``warmroute/dp``.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from router.config import WorkerSpec
from router.discovery.names import NOT_READY, TERMINATING, PodSpec

PORT, REPORT_PORT, DP = "warmroute/port", "warmroute/report-port", "warmroute/dp"
_ENDED = frozenset({"Failed", "Succeeded"})
_LONGEST_NAME = 128
_OWNERS = 4096


class Metadata(msgspec.Struct):
    """What is read of a pod's metadata; all members are Kubernetes' own."""

    name: str = ""
    uid: str = ""
    resourceVersion: str = ""  # noqa: N815
    creationTimestamp: str | None = None  # noqa: N815
    deletionTimestamp: str | None = None  # noqa: N815
    annotations: dict[str, str] | None = None


class ContainerPort(msgspec.Struct):
    containerPort: int  # noqa: N815
    name: str | None = None


class Container(msgspec.Struct):
    ports: list[ContainerPort] | None = None


class Containers(msgspec.Struct):
    """A pod's ``spec``; sidecars are among ``initContainers``."""

    containers: list[Container] | None = None
    initContainers: list[Container] | None = None  # noqa: N815


class Condition(msgspec.Struct):
    type: str = ""
    status: str = ""


class State(msgspec.Struct):
    """A pod's ``status``."""

    phase: str = ""
    podIP: str | None = None  # noqa: N815
    conditions: list[Condition] | None = None


class Pod(msgspec.Struct):
    """The little of a pod that matters here."""

    metadata: Metadata = msgspec.field(default_factory=Metadata)
    spec: Containers = msgspec.field(default_factory=Containers)
    status: State = msgspec.field(default_factory=State)

    @property
    def is_there(self) -> bool:
        """Whether something may run at its address: one that has ended keeps an address that others get."""
        return bool(self.status.podIP) and self.status.phase not in _ENDED

    @property
    def why_not(self) -> str:
        """Why it is not to be sent requests; empty if it may be."""
        if self.metadata.deletionTimestamp is not None:
            return TERMINATING
        ready = any(item.type == "Ready" and item.status == "True" for item in self.status.conditions or ())
        return "" if ready else NOT_READY

    def port(self, wanted: str) -> int:
        """The number of a container port given by name or number.

        Raises:
            ValueError: no container has a port of that name.
        """
        if wanted.isascii() and wanted.isdigit():
            return int(wanted)
        containers = [*(self.spec.containers or ()), *(self.spec.initContainers or ())]
        ports: dict[str | None, int] = {
            port.name: port.containerPort for container in containers for port in container.ports or ()
        }
        if wanted not in ports:
            named = ", ".join(sorted(filter(None, ports))) or "none"
            raise ValueError(f"it has no container port named {wanted!r}; it names: {named}")
        return ports[wanted]

    def workers(self, spec: PodSpec) -> list[WorkerSpec]:
        """The worker it is, or one for each data-parallel rank.

        Raises:
            ValueError: its ports cannot be told, or an annotation is wrong.
        """
        said = self.metadata.annotations or {}
        port = self.port(said.get(PORT, spec.port))
        wanted = said.get(REPORT_PORT, spec.reports)
        ip = self.status.podIP or ""
        host = f"[{ip}]" if ":" in ip else ip
        members: dict[str, Any] = {
            "url": f"{spec.scheme}://{host}:{port}",
            "reports": "none" if wanted == "none" else f"{host}:{self.port(wanted)}",
            "name": self.metadata.name if len(self.metadata.name) <= _LONGEST_NAME else "",
        }
        ranks = said.get(DP, str(spec.dp))
        return WorkerSpec.all_of(members | ({"dp": ranks} if ranks != "1" else {}))


class Found(msgspec.Struct):
    """What pods make workers: ``held`` is why some get no further request, and ``replaced`` which are another pod's than
    before, both by URL."""

    workers: list[WorkerSpec]
    held: dict[str, str]
    replaced: set[str]


class Pods:
    """The pods that a selector matches, as far as the API told."""

    def __init__(self, spec: PodSpec) -> None:
        self._spec = spec
        self._pods: dict[str, Pod] = {}
        self._workers: dict[str, list[WorkerSpec]] = {}
        self._owners: OrderedDict[str, str] = OrderedDict()
        self.problems: dict[str, str] = {}
        """Why a pod is no worker though it is ready, by its name."""

    def __len__(self) -> int:
        return len(self._pods)

    @property
    def names(self) -> Mapping[str, str]:
        """Every worker's pod and, if it is held, why. O(pods)."""
        return {self._pods[uid].metadata.name: self._pods[uid].why_not for uid in self._workers}

    def replace(self, pods: Iterable[Pod]) -> None:
        """These are all."""
        self._pods = {pod.metadata.uid: pod for pod in pods}
        for uid in self._workers.keys() - self._pods.keys():
            del self._workers[uid]
        for pod in self._pods.values():
            self._judge(pod)
        names = {pod.metadata.name for pod in self._pods.values()}
        self.problems = {name: why for name, why in self.problems.items() if name in names}

    def put(self, pod: Pod) -> None:
        """A pod came, or is another than it was."""
        self._pods[pod.metadata.uid] = pod
        self._judge(pod)

    def remove(self, pod: Pod) -> None:
        self._pods.pop(pod.metadata.uid, None)
        self._workers.pop(pod.metadata.uid, None)
        self.problems.pop(pod.metadata.name, None)

    def found(self) -> Found:
        """The workers as of now. O(pods)."""
        owners: dict[str, str] = {}
        # Of several pods at one address, the last that may be used, or else the youngest.
        for uid in sorted(self._workers, key=self._rank):
            owners.update((worker.url, uid) for worker in self._workers[uid])
        replaced = {url for url, uid in owners.items() if self._owners.get(url, uid) != uid}
        self._remember(owners)
        specs = {
            worker.url: worker for uid in self._workers for worker in self._workers[uid] if owners[worker.url] == uid
        }
        held = {url: why for url, uid in owners.items() if (why := self._pods[uid].why_not)}
        return Found([specs[url] for url in sorted(specs)], held, replaced)

    def _remember(self, owners: Mapping[str, str]) -> None:
        """Whose each address was last, also while it is nobody's."""
        for url, uid in owners.items():
            self._owners[url] = uid
            self._owners.move_to_end(url)
        while len(self._owners) > max(_OWNERS, 2 * len(owners)):
            self._owners.popitem(last=False)

    def _rank(self, uid: str) -> tuple[bool, str, str]:
        pod = self._pods[uid]
        return not pod.why_not, pod.metadata.creationTimestamp or "", uid

    def _judge(self, pod: Pod) -> None:
        uid, name = pod.metadata.uid, pod.metadata.name
        self.problems.pop(name, None)
        if not pod.is_there:
            self._workers.pop(uid, None)
        elif uid in self._workers or not pod.why_not:
            try:
                self._workers[uid] = pod.workers(self._spec)
            except ValueError as error:
                self._workers.pop(uid, None)
                self.problems[name] = str(error)
