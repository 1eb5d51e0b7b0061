"""The model's name out of forms, against a well-kept parser."""

from email.message import EmailMessage
from email.parser import BytesParser
from email.policy import HTTP

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    body = (
        b"preamble\r\n--%s  \r\nContent-Type: text/plain\r\nCONTENT-DISPOSITION: form-data; name=model\r\n\r\nm\r\n"
        % mark
    )
    body += b"--%s\r\n\r\nno head\r\n--%s--\r\nepilogue" % (mark, mark)
    assert form_field(body, f"multipart/form-data; charset=x; Boundary={boundary}".encode(), "model") == "m"


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
