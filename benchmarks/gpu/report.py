"""What the measurements say against the bars."""

from collections.abc import Iterator
from typing import Any

KIB = 1 << 10
Row = tuple[str, str, str, str]


def verdicts(results: dict[str, Any]) -> list[Row]:
    """Per bar: what, measured, wanted, and ``pass``, ``FAIL`` or ``not measured``."""
    parts = (_checks, _engines, _direct, _codecs, _told, _errors)
    return [row for part in parts for row in part(results)]


def _row(what: str, value: float | None, wanted: str, ok: bool | None) -> Row:
    if value is None or value != value:  # noqa: PLR0124 - not a number
        return what, "-", wanted, "not measured"
    return what, f"{value:.3f}", wanted, "pass" if ok else "told" if ok is None else "FAIL"


def _checks(results: dict[str, Any]) -> Iterator[Row]:
    parts = (
        ("build", "build"),
        ("tests", "tests"),
        ("tests", "movers"),
        ("sanitizer", "memcheck"),
        ("sanitizer", "racecheck"),
    )
    for part, name in parts:
        outcome = results.get(part, {}).get(name)
        ok = None if outcome is None else outcome.get("ok")
        word = "not run" if outcome is None else f"{outcome.get('seconds', '')}"
        yield name, word, "ends well", "not measured" if ok is None else "pass" if ok else "FAIL"


def _least(rows: list[dict[str, Any]], **wanted: Any) -> float | None:
    chosen = [row["ratio"] for row in rows if all(row[key] == value for key, value in wanted.items())]
    return min(chosen, default=None)


def _swept(bench: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for name, rows in bench.items() if name.startswith("sweep") for row in rows]


def _engines(results: dict[str, Any]) -> Iterator[Row]:
    bench = results.get("bench", {})
    sweep, many = _swept(bench), bench.get("many pages", [])
    for direction in ("load", "save"):
        large = [row for row in sweep if row["page"] == 2048 * KIB and row["pages"] > 64]
        value = _least(large, path="copy_engine", direction=direction)
        yield _row(f"copy engines, 2 MiB, {direction}", value, ">= 0.95", value is not None and value >= 0.95)
        value = _least(many, direction=direction)
        yield _row(f"copy engines, 64 KiB, {direction}", value, ">= 0.90", value is not None and value >= 0.90)


def _direct(results: dict[str, Any]) -> Iterator[Row]:
    sweep = _swept(results.get("bench", {}))
    for page in (4 * KIB, 8 * KIB, 16 * KIB):
        rows = [
            row["ratio"]
            for row in sweep
            if row["path"] == "kernel" and row["direction"] == "load" and row["page"] == page and row["pages"] > 8192
            and row["thread_blocks"] <= 16
        ]  # fmt: skip
        value = max(rows, default=None)
        yield _row(
            f"direct loads, {page // KIB} KiB, <= 16 blocks", value, ">= 0.80", value is not None and value >= 0.80
        )


def _codecs(results: dict[str, Any]) -> Iterator[Row]:
    found = results.get("bench", {}).get("encodings", {})
    for name, least in (("fp8", 1.7), ("exp12", None)):
        for direction in ("load", "save"):
            pair = found.get(f"{name} {direction}"), found.get(f"raw {direction}")
            value = pair[0]["gbps"] / pair[1]["gbps"] if all(pair) else None
            ok = None if least is None else value is not None and value >= least
            yield _row(f"{name} over raw, {direction}", value, f">= {least}" if least else "told", ok)
    plain = found.get("plain scatter", {}).get("ms_per_chunk")
    for name, wanted in (("rotation", "<= 1.05"), ("checksums", "told")):
        other = found.get(f"scatter with {name}", {}).get("ms_per_chunk")
        value = other / plain if other and plain else None
        yield _row(f"scatter with {name} over plain", value, wanted, None if wanted == "told" else (value or 9) <= 1.05)


def _told(results: dict[str, Any]) -> Iterator[Row]:
    bench = results.get("bench", {})
    yield _row("loads and saves at once", bench.get("both ways", {}).get("ratio"), "told", None)
    for name, value in bench.get("slowdown", {}).items():
        if name not in {"alone_ms", "tflops"}:
            yield _row(f"8192^3 product, {name}", value, "told", None)


def _errors(results: dict[str, Any]) -> Iterator[Row]:
    for step, said in results.get("errors", {}).items():
        yield step, said.splitlines()[0][:60] if said else "", "ends", "FAIL"


def table(rows: list[Row]) -> str:
    """The verdicts as text."""
    widths = [max(len(row[at]) for row in rows) for at in range(4)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
