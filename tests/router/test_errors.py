import json

import pytest

from router import errors


def api_errors() -> list[type[errors.ApiError]]:
    found: list[type[errors.ApiError]] = []
    waiting: list[type[errors.ApiError]] = [errors.ApiError]
    while waiting:
        kind = waiting.pop()
        found.append(kind)
        waiting += kind.__subclasses__()
    return found


@pytest.mark.parametrize("kind", api_errors())
def test_every_api_error_is_an_openai_error_object(kind: type[errors.ApiError]) -> None:
    error = json.loads(kind("what and how to cure it").body())["error"]
    assert error["message"] == "what and how to cure it"
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"]
    assert 400 <= kind("x").status < 600


def test_retry_after_is_whole_seconds_from_one_up() -> None:
    headers = dict(errors.Busy("later", retry_after=0.2).headers())
    assert headers[b"retry-after"] == b"1"
    assert dict(errors.Unavailable("later", retry_after=2.6).headers())[b"retry-after"] == b"3"


def test_the_tree_is_drawn_as_it_is() -> None:
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    drawn = errors.__doc__ or ""
    for kind in classes:
        assert kind.__name__ in drawn, f"{kind.__name__} is missing from the drawing"
        assert issubclass(kind, errors.RouterError)


def test_upstream_errors_name_the_worker() -> None:
    assert str(errors.ConnectFailed("w1", "cannot be reached")) == "worker w1 cannot be reached"
