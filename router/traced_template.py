"""Chat templates by heart: what a template does with message texts, recorded once and repeated without running it.

For a chat of plain texts a template mostly copies: its output is the same for every chat with the same roles but for
the texts themselves. This is not assumed but observed. The template runs once with message texts replaced by objects
that are no strings. Whatever the template does to one of them is either recorded (it is copied, trimmed, split, joined
to other text; asked whether it is empty, contains or begins with something: a *condition*) or unknown, and then this
chat is not repeated but rendered in full, always. A recording is used for a chat with the same roles only where every
condition, tried on the chat's own texts in the template's order, comes out as it did; the template could not have told
the two chats apart. A date the template writes is a condition too.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from threading import Lock
from typing import Any, NamedTuple, NoReturn, cast

from jinja2 import nodes
from jinja2.compiler import Frame
from jinja2.environment import Environment
from jinja2.nativetypes import NativeCodeGenerator

_PLACE_BYTES = 100
_MOST_VARIANTS = 4
_PATIENCE = 32
_COPIES = frozenset({"strip", "lstrip", "rstrip", "removeprefix", "removesuffix", "replace", "lower", "upper"})
_ANSWERS = frozenset({"startswith", "endswith", "isspace"})
_METHODS = _COPIES | _ANSWERS | {"split", "rsplit"}
_FILTERS = {"trim": "strip", "lower": "lower", "upper": "upper"}
_TESTS = ("string", "iterable", "sequence")

Roles = tuple[str, ...]
Step = Callable[[str], str]
Variables = Callable[[list[dict[str, Any]]], dict[str, Any]]


class Untraceable(BaseException):
    """The template does something to a text that is not recorded. Not an Exception: Jinja swallows some of those."""


class Piece(NamedTuple):
    """A message's text as it was after ``steps``."""

    message: int
    steps: tuple[Step, ...]

    def of(self, texts: Sequence[str]) -> str:
        text = texts[self.message]
        for step in self.steps:
            text = step(text)
        return text


class Condition(NamedTuple):
    """What a text was asked, and the answer."""

    piece: Piece
    ask: Callable[[str], Any]
    answer: Any

    def holds(self, texts: Sequence[str]) -> bool:
        return bool(self.ask(self.piece.of(texts)) == self.answer)


class Recording:
    """The output for one order of roles: constant text, and places for the texts."""

    def __init__(self, parts: list["str | Text"], conditions: list[Condition], dates: Mapping[str, str]) -> None:
        merged: list[str | Text] = []
        for part in parts:
            if isinstance(part, str) and merged and isinstance(merged[-1], str):
                merged[-1] += part
            else:
                merged.append(part)
        self._parts = ["" if isinstance(part, Text) else part for part in merged]
        places = [(at, part.piece) for at, part in enumerate(merged) if isinstance(part, Text)]
        self._plain = [(at, piece.message) for at, piece in places if not piece.steps]
        self._made = [(at, piece) for at, piece in places if piece.steps]
        first = dict.fromkeys(c.piece.message for c in conditions if c.ask is bool and c.answer and not c.piece.steps)
        self._not_empty = list(first)
        self._conditions = [c for c in conditions if c.ask is not bool or not c.answer or c.piece.steps]
        self._dates = dict(dates)
        self.cost = sum(map(len, self._parts)) + _PLACE_BYTES * (len(merged) + len(conditions))

    def repeat(self, texts: Sequence[str], date: Callable[[str], str]) -> str | None:
        """The output for ``texts``; None where the template would tell them from those recorded."""
        for index in self._not_empty:
            if not texts[index]:
                return None
        try:
            for condition in self._conditions:
                if not condition.holds(texts):
                    return None
            parts = self._parts.copy()
            for at, index in self._plain:
                parts[at] = texts[index]
            for at, piece in self._made:
                parts[at] = piece.of(texts)
        except IndexError:  # a part that a split did not give this time
            return None
        if any(date(pattern) != text for pattern, text in self._dates.items()):
            return None
        return "".join(parts)


class TracedTemplate:
    """Renders chats of plain texts from recordings; all of them with the same variables but for the messages.

    ``limit`` bounds the recordings, in bytes. Safe to share by threads.
    """

    def __init__(self, tracer: "Tracer", variables: Variables, *, parts: bool, limit: int) -> None:
        """``variables`` makes the template's variables from the messages; ``parts`` tells that contents are lists of one
        text part.
        """
        self._tracer = tracer
        self._variables = variables
        self._in_parts = parts
        self._limit = limit
        self._known: dict[Roles, list[Recording]] = {}
        self._bytes = 0
        self.repeated = 0
        self.traced = 0

    def render(self, roles: Roles, texts: Sequence[str]) -> str | None:
        """The output for messages of these roles and texts; None where only the template itself can tell."""
        date = self._tracer.date
        for recording in self._known.get(roles, ()):
            if (text := recording.repeat(texts, date)) is not None:
                self.repeated += 1
                return text
        if self.traced > _PATIENCE + self.repeated:
            return None  # recordings do not pay here
        self.traced += 1
        made = self._tracer.record(roles, texts, self._variables, parts=self._in_parts)
        if made is None:
            return None
        self._keep(roles, made)
        return made.repeat(texts, date)

    def _keep(self, roles: Roles, recording: Recording) -> None:
        variants = [recording, *self._known.pop(roles, ())]
        self._known[roles] = variants[:_MOST_VARIANTS]
        self._bytes += recording.cost - sum(each.cost for each in variants[_MOST_VARIANTS:])
        while self._bytes > self._limit and self._known:
            self._bytes -= sum(each.cost for each in self._known.pop(next(iter(self._known))))


class Tracer:
    """One template, compiled to be run on texts that are no strings."""

    def __init__(self, environment: Environment, source: str) -> None:
        """``environment`` is what the template is rendered with otherwise."""
        self.date = cast("Callable[[str], str]", environment.globals["strftime_now"])
        self._dates: dict[str, str] = {}
        self._lock = Lock()
        self._template = _prepared(environment, self._noted_date).from_string(source)

    def record(self, roles: Roles, texts: Sequence[str], variables: Variables, *, parts: bool) -> Recording | None:
        """Run the template once; None where it does something to a text that is not recorded, or fails."""
        trace = _Trace()
        messages = []
        for index, (role, text) in enumerate(zip(roles, texts, strict=True)):
            content = Text(trace, Piece(index, ()), text)
            # vLLM hands a tool's answer to every template as one text.
            in_parts = parts and role != "tool"
            messages.append({"role": role, "content": [{"type": "text", "text": content}] if in_parts else content})
        with self._lock:
            self._dates = {}
            try:
                context = self._template.new_context(variables(messages))
                written = _flat(self._template.root_render_func(context))
            except (Exception, Untraceable):  # noqa: BLE001 - the template itself will say what is wrong
                return None
            return Recording(written, trace.conditions, self._dates) if trace.intact else None

    def _noted_date(self, pattern: str) -> str:
        self._dates[pattern] = text = self.date(pattern)
        return text


class _Trace:
    def __init__(self) -> None:
        self.conditions: list[Condition] = []
        self.intact = True

    def unknown(self) -> NoReturn:
        self.intact = False
        raise Untraceable


def _refuse(self: "Text | Joined | Split", *_: Any, **__: Any) -> NoReturn:
    self._trace.unknown()


class _Tracked:
    """No string: what is not defined here cannot be done to it, and what Python defines for every object is refused."""

    __slots__ = ("_trace",)
    _trace: _Trace

    def __getattr__(self, name: str) -> NoReturn:
        self._trace.unknown()


# Set like this because subclasses bring some of them back, with other signatures.
for (
    _name
) in """bytes bool contains eq float format ge getitem gt hash index int iter le len lt mod mul ne repr reversed rmod
    rmul round str""".split():  # noqa: SIM905 - a table of names
    setattr(_Tracked, f"__{_name}__", _refuse)


class Text(_Tracked):  # noqa: PLW1641 - set below
    """A message's text, or what a recorded step made of it."""

    __slots__ = ("_value", "piece")

    def __init__(self, trace: _Trace, piece: Piece, value: str) -> None:
        self._trace = trace
        self.piece = piece
        self._value = value

    def __getattr__(self, name: str) -> Any:
        if name not in _METHODS:
            self._trace.unknown()
        if name in _COPIES:
            return lambda *arguments: self.made(name, *arguments)
        if name in _ANSWERS:
            return lambda *arguments: self.asked(_calling(name, self.plain(arguments)))
        return lambda *arguments: Split(self._trace, self, name, self.plain(arguments))

    def __bool__(self) -> bool:
        return bool(self.asked(bool))

    def __contains__(self, needle: object) -> bool:
        if not isinstance(needle, str):
            self._trace.unknown()
        return bool(self.asked(lambda text: needle in text))

    def __eq__(self, other: object) -> bool:
        self.plain((other,))
        return bool(self.asked(lambda text: text == other))

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __add__(self, other: object) -> "Joined":
        return Joined(self._trace, _pieces(self._trace, self, other))

    def __radd__(self, other: object) -> "Joined":
        return Joined(self._trace, _pieces(self._trace, other, self))

    def made(self, name: str, *arguments: Any) -> "Text":
        """What the string method makes of it."""
        return self.through(cast("Step", _calling(name, self.plain(arguments))))

    def through(self, step: Step) -> "Text":
        return Text(self._trace, Piece(self.piece.message, (*self.piece.steps, step)), step(self._value))

    def has_part(self, name: str, arguments: tuple[Any, ...], index: int) -> bool:
        """Whether splitting it gives a part of that number."""
        parts = len(getattr(self._value, name)(*arguments))
        return -parts <= index < parts

    def asked(self, ask: Callable[[str], Any]) -> Any:
        answer = ask(self._value)
        self._trace.conditions.append(Condition(self.piece, ask, answer))
        return answer

    def plain(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Arguments that are what they seem, the same for every chat."""
        if not all(argument is None or type(argument) in (str, int, bool, tuple) for argument in arguments):
            self._trace.unknown()
        return arguments


class Joined(_Tracked):
    """Text put together from constant text and message texts; it can only be added to and written out."""

    __slots__ = ("pieces",)

    def __init__(self, trace: _Trace, pieces: "list[str | Text]") -> None:
        self._trace = trace
        self.pieces = pieces

    def __add__(self, other: object) -> "Joined":
        return Joined(self._trace, _pieces(self._trace, self, other))

    def __radd__(self, other: object) -> "Joined":
        return Joined(self._trace, _pieces(self._trace, other, self))

    def __bool__(self) -> bool:
        if not any(isinstance(piece, str) and piece for piece in self.pieces):
            self._trace.unknown()
        return True


class Split(_Tracked):
    """A text cut up; single parts can be taken out."""

    __slots__ = ("_arguments", "_name", "_text")

    def __init__(self, trace: _Trace, text: Text, name: str, arguments: tuple[Any, ...]) -> None:
        self._trace = trace
        self._text = text
        self._name = name
        self._arguments = arguments

    def __getitem__(self, index: Any) -> Text:
        if type(index) is not int:
            self._trace.unknown()
        name, arguments = self._name, self._arguments
        if not self._text.has_part(name, arguments, index):
            self._trace.unknown()  # Jinja makes nothing of a missing part, a repetition gives up on it
        return self._text.through(lambda text: str(getattr(text, name)(*arguments)[index]))


# A class with __eq__ loses its __hash__, and what Python then raises is swallowed by Jinja.
setattr(Text, "__hash__", _refuse)  # noqa: B010 - mypy takes no such assignment


def _calling(name: str, arguments: tuple[Any, ...]) -> Callable[[str], Any]:
    return lambda text: getattr(text, name)(*arguments)


def _pieces(trace: _Trace, *values: object) -> "list[str | Text]":
    pieces: list[str | Text] = []
    for value in values:
        if isinstance(value, Joined):
            pieces += value.pieces
        elif isinstance(value, str | Text):
            pieces.append(value)
        else:
            trace.unknown()
    return pieces


def _flat(values: Iterable[Any]) -> "list[str | Text]":
    parts: list[str | Text] = []
    for value in values:
        if isinstance(value, Joined):
            parts += value.pieces
        else:
            parts.append(value if isinstance(value, Text) else str(value))
    return parts


def _concat(values: Iterable[Any]) -> Any:
    parts = _flat(values)
    tracked = next((part for part in parts if isinstance(part, Text)), None)
    return "".join(cast("list[str]", parts)) if tracked is None else Joined(tracked._trace, parts)  # noqa: SLF001


class _Generator(NativeCodeGenerator):
    """Writes objects out as they are, also where ``~`` joins them."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802 - jinja2's name
        self.write("concat((")
        for argument in node.nodes:
            self.visit(argument, frame)
            self.write(", ")
        self.write("))")


def _copying(name: str, usual: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is a string method by another name."""

    def filtered(value: Any, *arguments: Any) -> Any:
        if not isinstance(value, _Tracked):
            return usual(value, *arguments)
        if not isinstance(value, Text):
            value._trace.unknown()  # noqa: SLF001
        return value.made(name, *arguments)

    return filtered


def _guarded(usual: Callable[..., Any]) -> Callable[..., Any]:
    """Attribute access that shows templates the recorded methods of a text and none of ours."""

    def access(value: Any, name: Any) -> Any:
        if isinstance(name, _Tracked):
            name._trace.unknown()  # noqa: SLF001
        if isinstance(value, Text | Joined) and name not in _METHODS:
            value._trace.unknown()  # noqa: SLF001
        return usual(value, name)

    return access


def _unfiltered(*_: Any) -> NoReturn:
    raise Untraceable


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, _Tracked) or isinstance(other, _Tracked):
        raise Untraceable
    return one is other


def _like_strings(usual: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Text | Joined) or usual(value)


def _prepared(environment: Environment, date: Callable[[str], str]) -> Environment:
    """The same environment, keeping objects that are no strings as they are."""
    tracing = environment.overlay()
    changed: dict[str, Any] = {
        "code_generator_class": _Generator,
        "concat": _concat,
        "getattr": _guarded(environment.getattr),
        "getitem": _guarded(environment.getitem),
        "globals": environment.globals | {"strftime_now": date},
        "filters": environment.filters
        | {name: _copying(method, environment.filters[name]) for name, method in _FILTERS.items()}
        | {"attr": _unfiltered},
        "tests": environment.tests
        | {name: _like_strings(cast("Callable[[Any], bool]", environment.tests[name])) for name in _TESTS}
        | {"sameas": _same},
    }
    for name, value in changed.items():
        setattr(tracing, name, value)
    return tracing
