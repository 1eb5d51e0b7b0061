"""Objects in S3, Google Cloud Storage or Azure Blob Storage, through obstore.

One event loop on a thread of its own carries the requests of all calls: a batch's keys travel side by side, and what is
late is cancelled, which closes its connection. Objects of several parts are read with ranges side by side, all of the
version that the first one met.

Object stores do not delete by age by themselves: with ``ttl``, what was last written longer ago counts as missing, and
a lifecycle rule of the bucket should delete it. A ``ttl`` for one put is kept by the object's own header only.
"""

import asyncio
import concurrent.futures
import re
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, PreconditionError, UnauthenticatedError
from obstore.store import AzureStore, GCSStore, MemoryStore, S3Store

from worker_connector.errors import ConfigurationError, StoreUnavailable
from worker_connector.tiers.base import (
    DELETED,
    MISSING,
    Entry,
    LoanEnded,
    Outcome,
    Page,
    Sink,
    Source,
    Status,
    Store,
    failed,
)

T = TypeVar("T")
_Work: TypeAlias = Callable[[], Coroutine[Any, Any, Outcome]]

_PART_BYTES = 8 << 20
_MULTIPART_BYTES = 256 << 20
_DELETE_KEYS = 1000
_GRACE_SECONDS = 0.25
_RETRIES = 2


@dataclass(frozen=True, kw_only=True)
class ObjectSettings:
    """Where the bucket is and how to log in. What is empty comes from the provider's usual environment variables.

    ``key_id`` and ``secret`` are S3's access key, or Azure's account name and key; for Google, ``secret`` is the path of
    a service account's file. ``connections`` bounds the objects that are read at a time, and those that are written; ``ttl``
    is in seconds, 0 for none.
    """

    kind: Literal["s3", "gs", "az", "memory"]
    bucket: str
    prefix: str = ""
    endpoint: str = ""
    region: str = ""
    path_style: bool | None = None
    key_id: str = ""
    secret: str = field(default="", repr=False)
    token: str = field(default="", repr=False)
    anonymous: bool = False
    ca_certs: str = ""
    verify: bool = True
    connections: int = 16
    ttl: float = 0.0
    name: str = ""


class ObjectStore(Store):
    """Every operation ends at its deadline, whatever the server does; host names are resolved off the event loop."""

    max_object_bytes = 5 << 30

    def __init__(self, settings: ObjectSettings) -> None:
        self.name = settings.name or f"{settings.kind}://{settings.bucket}/{settings.prefix}".rstrip("/")
        self._settings = settings
        self._store = _client(settings, self.name)
        self._loop = _Loop(self.name)
        self._slots = asyncio.Semaphore(settings.connections)
        # What is read does not queue behind what is written, for which nobody waits.
        self._put_slots = asyncio.Semaphore(settings.connections)
        self._range_slots = asyncio.Semaphore(settings.connections)

    def get(self, keys: Sequence[str], into: Sequence[Sink], deadline: float) -> list[Outcome]:
        return self._batch([partial(self._get, key, sink) for key, sink in zip(keys, into, strict=True)], deadline)

    def put(self, keys: Sequence[str], values: Sequence[Source], deadline: float, ttl: float = 0.0) -> list[Outcome]:
        del ttl
        works = [partial(self._put, key, value) for key, value in zip(keys, values, strict=True)]
        return self._batch(works, deadline, self._put_slots)

    def exists(self, keys: Sequence[str], deadline: float) -> list[Outcome]:
        return self._batch([partial(self._head, key) for key in keys], deadline)

    def delete(self, keys: Sequence[str], deadline: float) -> list[Outcome]:
        """Deleted also where the object was not there, unless the store tells."""
        groups = [list(keys[at : at + _DELETE_KEYS]) for at in range(0, len(keys), _DELETE_KEYS)]
        return [
            outcome for group in groups for outcome in self._loop.run(partial(self._delete, group, deadline), deadline)
        ]

    def scan(self, cursor: str, deadline: float, limit: int = 1000) -> Page:
        """The cursor is the last key met."""
        return self._loop.run(lambda: self._within(self._page(cursor, limit), deadline), deadline)

    def ping(self, deadline: float) -> None:
        """The bucket can be listed."""
        self._loop.run(lambda: self._within(self._page("", 1), deadline), deadline)

    def close(self) -> None:
        self._loop.close()

    # What runs on the loop.

    async def _get(self, key: str, sink: Sink) -> Outcome:
        sink.rewind()
        first = await obstore.get_async(self._store, key, options={"range": (0, min(_PART_BYTES, max(1, sink.size)))})
        size = first.meta["size"]
        if self._expired(first.meta["last_modified"].timestamp()):
            return MISSING
        if size > sink.size:
            return sink.too_small(size)
        ranges = [(start, min(start + _PART_BYTES, size)) for start in range(_PART_BYTES, size, _PART_BYTES)]
        rest = [asyncio.ensure_future(self._range(key, each, first.meta["e_tag"])) for each in ranges]
        try:
            sink.write(memoryview(await first.buffer_async()))
            for part in rest:
                sink.write(memoryview(await part))
        finally:
            for part in rest:
                part.cancel()
        return sink.finish() if sink.filled == size else failed("short", f"{sink.filled} of {size} bytes came")

    async def _range(self, key: str, span: tuple[int, int], tag: str | None) -> Any:
        async with self._range_slots:  # not the slots of whole objects: those wait for their ranges
            part = await obstore.get_async(self._store, key, options={"range": span, "if_match": tag})
            return await part.buffer_async()

    async def _put(self, key: str, value: Source) -> Outcome:
        data = value.join()
        try:
            await obstore.put_async(self._store, key, data, use_multipart=len(data) > _MULTIPART_BYTES)
        except FileNotFoundError as error:
            raise self._unavailable(error) from None
        return Outcome(Status.STORED, len(data))

    async def _head(self, key: str) -> Outcome:
        meta = await obstore.head_async(self._store, key)
        return MISSING if self._expired(meta["last_modified"].timestamp()) else Outcome(Status.FOUND, meta["size"])

    async def _delete(self, keys: list[str], deadline: float) -> list[Outcome]:
        try:
            await self._within(obstore.delete_async(self._store, keys), deadline)
        except FileNotFoundError:
            return await self._gather([partial(self._delete_one, key) for key in keys], deadline, self._slots)
        return [DELETED] * len(keys)

    async def _delete_one(self, key: str) -> Outcome:
        await obstore.delete_async(self._store, key)
        return DELETED

    async def _page(self, cursor: str, limit: int) -> Page:
        stream = obstore.list(self._store, None, offset=cursor or None, chunk_size=limit)
        try:
            found = await stream.__anext__()
        except StopAsyncIteration:
            return Page([], "")
        met = [Entry(each["path"], each["size"], each["last_modified"].timestamp()) for each in found]
        entries = [entry for entry in met if not self._expired(entry.modified)]
        return Page(entries, met[-1].key if len(met) >= limit else "")

    # Deadlines and errors.

    def _batch(self, works: Sequence[_Work], deadline: float, slots: asyncio.Semaphore | None = None) -> list[Outcome]:
        return self._loop.run(lambda: self._gather(works, deadline, slots or self._slots), deadline)

    async def _gather(self, works: Sequence[_Work], deadline: float, slots: asyncio.Semaphore) -> list[Outcome]:
        """All at once; what is not done at the deadline is cancelled. Raises what kept every one of them from an answer."""
        if not works:
            return []
        tasks = [asyncio.ensure_future(self._one(work, slots)) for work in works]
        _, late = await asyncio.wait(tasks, timeout=max(0.0, deadline - time.monotonic()))
        for task in late:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, LoanEnded):
                raise result
        errors = [self._error(result) for result in results if isinstance(result, BaseException)]
        if len(errors) == len(results):
            raise errors[0]
        return [self._outcome(result) for result in results]

    def _outcome(self, result: Outcome | BaseException) -> Outcome:
        if not isinstance(result, BaseException):
            return result
        error = self._error(result)
        return failed(error.cause, str(error))

    def _error(self, error: BaseException) -> StoreUnavailable:
        if isinstance(error, asyncio.CancelledError):
            return StoreUnavailable(self.name, "timeout", "no answer within the deadline")
        return self._unavailable(error)

    async def _one(self, work: _Work, slots: asyncio.Semaphore) -> Outcome:
        async with slots:
            try:
                return await work()
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error) or "ContainerNotFound" in str(error):
                    raise self._unavailable(error) from None
                return MISSING
            except PreconditionError:
                return failed("changed", "the object was replaced while it was read")

    async def _within(self, work: Awaitable[T], deadline: float) -> T:
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                return await work
        except TimeoutError:
            raise StoreUnavailable(self.name, "timeout", "no answer within the deadline") from None
        except FileNotFoundError:
            raise
        except BaseError as error:
            raise self._unavailable(error) from None

    def _unavailable(self, error: BaseException) -> StoreUnavailable:
        if isinstance(error, StoreUnavailable):
            return error
        if not isinstance(error, (BaseError, OSError)):
            raise error
        return StoreUnavailable(self.name, *_explain(error))

    def _expired(self, modified: float) -> bool:
        return bool(self._settings.ttl) and time.time() > modified + self._settings.ttl


class _Loop:
    """An event loop on a daemon thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop = asyncio.new_event_loop()
        self._closed = False
        threading.Thread(target=self._serve, name=f"warmroute-{name}", daemon=True).start()

    def run(self, work: Callable[[], Coroutine[Any, Any, T]], deadline: float) -> T:
        """The result of ``work`` on the loop, at the deadline at the latest."""
        if self._closed:
            raise StoreUnavailable(self._name, "closed", "it was closed")
        future = asyncio.run_coroutine_threadsafe(work(), self._loop)
        try:
            return future.result(max(0.0, deadline - time.monotonic()) + _GRACE_SECONDS)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise StoreUnavailable(self._name, "timeout", "no answer within the deadline") from None
        except concurrent.futures.CancelledError:
            raise StoreUnavailable(self._name, "closed", "it was closed") from None

    def close(self) -> None:
        self._closed = True
        self._loop.call_soon_threadsafe(self._cancel_all)

    def _cancel_all(self) -> None:
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.call_later(0.05, self._loop.stop)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()


_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w{1,60})</Code>")
_CODES = {
    "NoSuchBucket": ("config", "there is no such bucket: make it, or see the URL"),
    "ContainerNotFound": ("config", "there is no such container: make it, or see the URL"),
    "SignatureDoesNotMatch": ("auth", "it refuses the secret key: check it"),
    "InvalidAccessKeyId": ("auth", "it does not know the access key: check it"),
    "ExpiredToken": ("auth", "the session token has expired"),
    "AccessDenied": ("auth", "access is denied: the login may lack rights to list, read, write and delete"),
    "RequestTimeTooSkewed": ("auth", "the clocks of this machine and of the store differ too much"),
    "SlowDown": ("throttled", "it asks for fewer requests"),
    "PermanentRedirect": ("config", "the bucket is in another region: give region="),
    "AuthorizationHeaderMalformed": ("config", "the bucket is in another region: give region="),
}


def _explain(error: BaseException) -> tuple[str, str]:
    """The cause in one word, and cause and cure in a sentence. The client's own text is not passed on: it holds whole
    URLs, which carry signatures with some providers."""
    text = str(error)
    code = _CODE.search(text)
    if code and code[1] in _CODES:
        return _CODES[code[1]]
    if "169.254.169.254" in text or "metadata.google" in text or "missing credential" in text.lower():
        return "auth", "no credentials: set the provider's environment variables, or anonymous=true"
    if isinstance(error, (PermissionDeniedError, UnauthenticatedError)):
        return "auth", "access is denied: check the credentials and their rights"
    if "certificate" in text.lower() or "InvalidCertificate" in text:
        return "tls", "its certificate is not trusted: give ca_certs=, the file of the authority that signed it"
    if status := _STATUS.search(text):
        return _of_status(int(status[1]), code[1] if code else "")
    if "kind: Timeout" in text or "TimedOut" in text:
        return "timeout", "no answer in time"
    return "unreachable", "it cannot be reached, or closed the connection: check the endpoint"


def _of_status(status: int, code: str) -> tuple[str, str]:
    if status == 404:
        return "config", "there is no such bucket: make it, or see the URL"
    if status in (429, 503):
        return "throttled", f"it asks for fewer requests (status {status})"
    if status == 507:
        return "full", "it is full"
    if status >= 500:
        return "server", f"it fails inside (status {status} {code})".rstrip()
    return "error", f"it refuses the request (status {status} {code})".rstrip()


def _client(settings: ObjectSettings, name: str) -> Any:
    if settings.kind == "memory":
        return MemoryStore()
    made: Any = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}[settings.kind]
    try:
        return made(
            settings.bucket,
            prefix=settings.prefix or None,
            config=_provider_options(settings),
            client_options=_client_options(settings),
            retry_config={
                "max_retries": _RETRIES,
                "backoff": {"init_backoff": timedelta(milliseconds=50), "max_backoff": timedelta(seconds=1), "base": 2},
                "retry_timeout": timedelta(seconds=30),
            },
        )
    except (BaseError, ValueError, OSError) as error:
        reason = str(error).split("\n", 1)[0][:200]
        raise ConfigurationError(f"{name}: the client cannot be made: {reason}") from None


def _provider_options(settings: ObjectSettings) -> dict[str, Any]:
    own = {
        "s3": {
            "endpoint": settings.endpoint,
            "region": settings.region,
            "access_key_id": settings.key_id,
            "secret_access_key": settings.secret,
            "token": settings.token,
        },
        "gs": {"service_account": settings.secret},
        "az": {
            "endpoint": settings.endpoint,
            "account_name": settings.key_id,
            "account_key": settings.secret,
            "sas_token": settings.token,
        },
    }[settings.kind]
    options: dict[str, Any] = {name: value for name, value in own.items() if value}
    if settings.kind == "s3":
        path_style = bool(settings.endpoint) if settings.path_style is None else settings.path_style
        options["virtual_hosted_style_request"] = not path_style
    if settings.kind == "gs" and settings.endpoint:
        options["base_url"] = settings.endpoint
    if settings.anonymous:
        options["skip_signature"] = True
    return options


def _client_options(settings: ObjectSettings) -> dict[str, Any]:
    options: dict[str, Any] = {
        "connect_timeout": timedelta(seconds=5),
        "timeout": timedelta(seconds=120),
        "allow_http": settings.endpoint.startswith("http://"),
        "allow_invalid_certificates": not settings.verify,
    }
    if settings.ca_certs:
        try:
            options["root_certificate"] = Path(settings.ca_certs).read_bytes()
        except OSError as error:
            raise ConfigurationError(f"ca_certs names {settings.ca_certs}: {error.strerror}") from error
    return options
