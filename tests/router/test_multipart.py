"""The model's name out of forms, against a well-kept parser."""

import asyncio
from collections.abc import AsyncGenerator
from email.message import EmailMessage
from email.parser import BytesParser
from email.policy import HTTP

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from router.errors import InvalidRequest
from router.multipart import LONGEST_FIELD, MOST_PARTS, form_field


def form(fields: dict[str, str], files: dict[str, bytes]) -> tuple[bytes, bytes]:
    """Body and content type as an HTTP client writes them."""
    parts = {name: (f"{name}.bin", content) for name, content in files.items()}
    request = httpx.Request("POST", "http://h", data=fields, files=parts or {"nothing": ("n", b"")})
    return request.read(), request.headers["content-type"].encode()


def by_email(body: bytes, content_type: bytes, name: str) -> str | None:
    message = BytesParser(EmailMessage, policy=HTTP).parsebytes(b"content-type: " + content_type + b"\r\n\r\n" + body)
    value = None
    for part in message.iter_parts():
        if part.get_param("name", header="content-disposition") == name and part.get_filename() is None:
            value = part.get_payload(decode=True).decode()  # type: ignore[union-attr]
    return value


@given(
    model=st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=50),
    others=st.dictionaries(st.sampled_from(["language", "models", "mode", "prompt"]), st.text(max_size=20)),
    audio=st.binary(max_size=300),
)
def test_a_field_is_found_among_others(model: str, others: dict[str, str], audio: bytes) -> None:
    body, content_type = form({**others, "model": model, "last": "x"}, {"file": audio, "model": b"a file, not a field"})
    assert (form_field(body, content_type, "model") or "") == model
    assert form_field(body, content_type, "absent") is None


@pytest.mark.parametrize("quoted", [True, False])
def test_other_spellings(quoted: bool) -> None:
    boundary = '"a b"' if quoted else "ab"
    mark = boundary.strip('"').encode()
    body = b"--%s\r\nContent-Type: text/plain\r\nCONTENT-DISPOSITION: form-data; name=model\r\n\r\nm\r\n" % mark
    body += b'--%s\r\ncontent-disposition:form-data;name="x";FILENAME="a;\\"b"\r\n\r\nm\r\n--%s--\r\nepilogue' % (
        mark,
        mark,
    )
    assert form_field(body, f"multipart/form-data; charset=UTF-8; Boundary={boundary}".encode(), "model") == "m"


HONEST = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nmine\r\n'
TYPE = b"multipart/form-data; boundary=b"


@pytest.mark.parametrize(
    ("part", "content_type"),
    [
        (b"--b\r\nX-Content-Disposition: form-data; name=x\r\nContent-Disposition: form-data; name=model", TYPE),
        (b"--b\r\nContent-Disposition: form-data; name=x\r\nContent-Disposition: form-data; name=model", TYPE),
        (b"--b\r\nContent-Disposition: form-data; name=x; name=model", TYPE),
        (b"--b\r\nContent-Disposition: form-data; name=model; filename*=utf-8''a", TYPE),
        (b'--b\r\nContent-Disposition: form-data; x="; name=x"; name=model', TYPE),
        (b"--b\r\nX: " + b"x" * 9000 + b"\r\nContent-Disposition: form-data; name=model", TYPE),
        (b"--b\r\nX: y\r\n Content-Disposition: form-data; name=x\r\nContent-Disposition: form-data; name=model", TYPE),
        (HONEST[:-2], b"multipart/form-data; xboundary=a; boundary=b"),
        (HONEST[:-2], b"multipart/form-data; boundary=a; boundary=b"),
        (HONEST[:-2], TYPE + b"; charset=utf-7"),
    ],
)
def test_a_worker_never_reads_another_model(part: bytes, content_type: bytes) -> None:
    """After an honest part comes one that hides; what reads it as a worker does has to find what was found here."""
    body = HONEST + part + (b"\r\n\r\ntheirs" if part[:9] != HONEST[:9] or b"mine" not in part else b"") + b"\r\n--b--"
    try:
        found = form_field(body, content_type, "model")
    except InvalidRequest:
        return
    assert found == by_worker(body, content_type)


def test_no_part_hides_behind_what_begins_as_a_boundary() -> None:
    decoy = b'\r\n--bx\r\ncontent-disposition: form-data; name="model"\r\n\r\nmine'
    body = b'--b\r\ncontent-disposition: form-data; name="model"\r\n\r\ntheirs\r\n'
    body += b'--b\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\n' + decoy + b"\r\n--b--"
    with pytest.raises(InvalidRequest):
        form_field(body, TYPE, "model")


def test_the_last_one_counts_even_if_empty() -> None:
    assert form_field(HONEST + HONEST.replace(b"mine", b"") + b"--b--", TYPE, "model") == ""


def by_worker(body: bytes, content_type: bytes) -> str | None:
    """As vLLM's server framework reads forms."""
    pytest.importorskip("python_multipart")
    from starlette.formparsers import MultiPartException, MultiPartParser

    async def parse() -> str | None:
        async def stream() -> AsyncGenerator[bytes, None]:
            yield body

        headers = Headers(raw=[(b"content-type", content_type)])
        values = (await MultiPartParser(headers, stream()).parse()).getlist("model")
        return str(values[-1]) if values else None

    try:
        return asyncio.run(parse())
    except (MultiPartException, ValueError, LookupError):
        return "mine"


def test_agrees_with_the_standard_library() -> None:
    body, content_type = form({"model": "m", "x": "y"}, {"file": b"\r\n--almost\r\n\r\n"})
    assert form_field(body, content_type, "model") == by_email(body, content_type, "model") == "m"


def test_broken_forms_are_refused() -> None:
    body, content_type = form({"model": "m" * (LONGEST_FIELD + 1)}, {})
    for given_body, given_type in (
        (body, content_type),
        (body, b"multipart/form-data"),
        (b"", content_type),
        (body[:100], content_type),
        (b"--b" + b"x" * 500, b"multipart/form-data; boundary=b"),
        (b"--b\r\nname=a\r\n\r\nv", b"multipart/form-data; boundary=b"),
        (b"--b\r\n\r\n\r\n" * (MOST_PARTS + 2) + b"--b--", b"multipart/form-data; boundary=b"),
        (b'--b\r\ncontent-disposition: x; name="model"\r\n\r\n\xff\r\n--b--', b"multipart/form-data; boundary=b"),
    ):
        with pytest.raises(InvalidRequest):
            form_field(given_body, given_type, "model")


@given(st.binary(max_size=400), st.sampled_from([b"b", b"--", b"\r\n"]))
def test_any_bytes_end_in_a_value_or_a_refusal(noise: bytes, mark: bytes) -> None:
    for body in (noise, b"--b\r\n" + noise, b"--b" + noise + b"\r\n--b--", noise + b"--b--"):
        try:
            found = form_field(body, b"multipart/form-data; boundary=" + (mark.strip() or b"b"), "model")
        except InvalidRequest:
            continue
        assert found is None or isinstance(found, str)
