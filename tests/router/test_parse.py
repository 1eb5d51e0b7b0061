"""The model of requests that are no prompts."""

import pytest

from router.errors import InvalidRequest
from router.parse import parse_other

FORM = b"application/x-www-form-urlencoded"


def model_of(raw: bytes, content_type: bytes, query: bytes = b"") -> str:
    scope = {"method": "POST", "headers": [(b"content-type", content_type)], "query_string": query}
    return parse_other("load", scope, raw, [], "id", repeatable=False).model


@pytest.mark.parametrize(
    ("raw", "content_type", "query", "model"),
    [
        (b"", b"", b"model=a", "a"),
        (b"", b"", b"model=a&model=b%20c", "b c"),
        (b"", b"", b"model=a&model=", ""),
        (b"model=a&x=1&model=b", FORM, b"model=c", "b"),
        (b"x=1", FORM + b"; charset=utf-8", b"model=c", ""),
        (b'{"model":"a"}', b"application/json", b"model=c", "a"),
        (b"sound", b"audio/wav", b"model=c", "c"),
    ],
)
def test_the_model_is_the_one_workers_read(raw: bytes, content_type: bytes, query: bytes, model: str) -> None:
    assert model_of(raw, content_type, query) == model


def test_too_many_fields_are_the_clients_fault() -> None:
    with pytest.raises(InvalidRequest):
        model_of(b"", b"", b"a=1&" * 101)
