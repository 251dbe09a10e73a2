"""Bodies drawn from a server's own /openapi.json, those that keep to it and those that do not, and
bytes that are no body at all.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Iterator
from typing import Any

VALID: dict[str, Any] = {
    "model": "fake",
    "prompt": "x",
    "max_tokens": 2,
    "temperature": 0.5,
    "stop": ["##"],
    "logit_bias": {"1": 1},
}
WRONG: dict[str, list[Any]] = {
    "model": [1, [], {}, None],
    "prompt": [1, {}, True, [True], [None], [{}], [-1], [2**40], [["x"]], [1, "x"], None],
    "max_tokens": [0, -1, 1.5, "2", True, [], {}, 2**64],
    "temperature": [-1, 3, "hot", True, [], {}],
    "n": [0, 33, -1, 1.5, "1", True, [], {}],
    "stream": [1, "yes", [], {}],
    "stop": [1, True, {}, [1], [[]], [""], ["x"] * 17],
    "logit_bias": [1, [], "x", {"a": 1}, {"1": "x"}, {"1": 1e9}, {"1": None}, {"-5": 1}],
    "seed": [2**80, 0.5, "x", []],
    "user": [1, [], {}],
}
PLAIN = ("string", "integer", "number", "boolean", "array", "object")


class SchemaBodies:
    """Draws bodies of the routes that take one."""

    def __init__(self, openapi: Any, seed: int = 0):
        self._schemas = openapi["components"]["schemas"]
        self._draw = random.Random(seed)
        self.routes: dict[str, Any] = {}
        for path, methods in openapi["paths"].items():
            if body := methods.get("post", {}).get("requestBody"):
                self.routes[path] = self._resolved(body["content"]["application/json"]["schema"])

    def kept(self, path: str) -> dict[str, Any]:
        """A body that the schema allows: required fields and some others."""
        return self._value(self.routes[path], 0)

    def broken(self, path: str) -> dict[str, Any]:
        """One that it forbids in one place: a wrong type, an unknown field, one left out."""
        schema, body = self.routes[path], self.kept(path)
        ways: list[Callable[[], None]] = [
            lambda: body.__setitem__("no_such_field", 1),
            *(lambda name=name: body.pop(name) for name in schema.get("required", [])),
            *(
                lambda name=name, part=part: body.__setitem__(name, self._wrong(part))
                for name, part in schema["properties"].items()
                if self._wrong_types(part)
            ),
        ]
        self._draw.choice(ways)()
        return body

    def _resolved(self, schema: Any) -> Any:
        while "$ref" in schema:
            schema = self._schemas[schema["$ref"].rpartition("/")[2]]
        return schema

    def _value(self, schema: Any, depth: int) -> Any:
        schema = self._resolved(schema)
        if "anyOf" in schema:
            return self._value(self._draw.choice(schema["anyOf"]), depth)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return self._draw.choice(schema["enum"])
        return getattr(self, f"_{schema.get('type', 'anything')}")(schema, depth)

    def _anything(self, schema: Any, depth: int) -> Any:
        return self._draw.choice([None, 1, "x", [], {}])

    def _null(self, schema: Any, depth: int) -> None:
        return None

    def _boolean(self, schema: Any, depth: int) -> bool:
        return self._draw.random() < 0.5

    def _integer(self, schema: Any, depth: int) -> int:
        low, high = self._bounds(schema)
        return self._draw.choice([int(low), int(high), self._draw.randint(int(low), int(high))])

    def _number(self, schema: Any, depth: int) -> float:
        low, high = self._bounds(schema)
        return self._draw.choice([low, high, self._draw.uniform(low, high)])

    def _bounds(self, schema: Any) -> tuple[float, float]:
        low = schema.get("minimum", -1000)
        return low, min(schema.get("maximum", 1000), low + 10**6)

    def _string(self, schema: Any, depth: int) -> str:
        letters = string.ascii_letters if "pattern" in schema else 'ab é\n\x00🙂"\\{<'
        length = max(schema.get("minLength", 0), 1 if "pattern" in schema else 0)
        most = min(schema.get("maxLength", 20), length + 20)
        return "".join(self._draw.choices(letters, k=self._draw.randint(length, most)))

    def _array(self, schema: Any, depth: int) -> list[Any]:
        least = schema.get("minItems", 0)
        most = min(schema.get("maxItems", 3), max(least, 0 if depth > 4 else 3))
        count = self._draw.randint(least, most)
        return [self._value(schema.get("items", {}), depth + 1) for _ in range(count)]

    def _object(self, schema: Any, depth: int) -> dict[str, Any]:
        if "properties" not in schema:
            inner = schema.get("additionalProperties", {})
            inner = inner if isinstance(inner, dict) else {}
            return {str(i): self._value(inner, depth + 1) for i in range(self._draw.randint(0, 3))}
        required = schema.get("required", [])
        return {
            name: self._value(part, depth + 1)
            for name, part in schema["properties"].items()
            if name in required or self._draw.random() < 0.25
        }

    def _types(self, schema: Any) -> set[str]:
        """Types that a value may have; all of them where the schema does not say."""
        schema = self._resolved(schema)
        if "anyOf" in schema:
            return set().union(*(self._types(part) for part in schema["anyOf"]))
        kinds = {bool: "boolean", int: "integer", float: "number", str: "string"}
        values = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if values is not None:
            return {kinds.get(type(value), "null") for value in values}
        return {schema["type"]} if "type" in schema else {*PLAIN, "null"}

    def _wrong_types(self, schema: Any) -> list[str]:
        allowed = self._types(schema)
        allowed |= {"integer"} if "number" in allowed else set()
        return [kind for kind in PLAIN if kind not in allowed]

    def _wrong(self, schema: Any) -> Any:
        values = {"string": "x", "integer": 7, "number": 0.5, "boolean": True}
        values |= {"array": [{"x": 1}], "object": {"x": {"y": 1}}}
        return values[self._draw.choice(self._wrong_types(schema))]


def malformed_bodies(valid: dict[str, Any]) -> Iterator[bytes]:
    """Some two hundred contents that no route can take, made from a body that it does take."""
    whole = json.dumps(valid).encode()
    yield from (whole[:length] for length in range(len(whole)))  # broken off anywhere
    for name, values in WRONG.items():
        yield from (json.dumps(valid | {name: value}).encode() for value in values)
    yield from (whole + more for more in (b"}", b",", b"\x00", whole, b"\xff", b"//"))
    yield from (whole.decode().encode(code) for code in ("utf-16", "utf-32"))
    for value in (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"0x10", b"01", b"+1"):
        yield whole[:-1] + b', "temperature": ' + value + b"}"
    for digits in (20, 400, 5_000):
        yield whole[:-1] + b', "n": ' + b"9" * digits + b"}"
        yield whole[:-1] + b', "seed": -' + b"9" * digits + b"}"
    for text in (
        rb'"\ud800"',
        rb'"\udc00\ud800"',
        rb'"\x"',
        b'"\xff\xfe"',
        b'"\xc0\xaf"',
        b'"\x00"',
    ):
        yield whole[:-1] + b', "user": ' + text + b"}"
    for depth in (200, 100_000):
        for opened, closed in ((b"[", b"]"), (b'{"a":', b"}")):
            yield opened * depth
            nested = opened * depth + b"1" + closed * depth
            yield nested
            yield whole[:-1] + b', "messages": ' + nested + b"}"
            yield whole[:-1] + b', "logit_bias": ' + nested + b"}"
    yield from (
        b"",
        b" ",
        b"null",
        b"true",
        b"7",
        b'"x"',
        b"[]",
        b"[" + whole + b"]",
        b"\xef\xbb\xbf",
    )
    yield from (b"<xml/>", b"a=1&b=2", b"\x1f\x8b\x08\x00", b"\x00" * 1000, b"\xff" * 1000, b"'{}'")
    yield b'{"model": 1}' * 100_000
    yield b'{"prompt": "' + b"x" * 10_000_000 + b'"}'
    yield b'{"' + b"k" * 1_000_000 + b'": 1}'
    yield b"{" + b",".join(b'"k%d": 1' % number for number in range(50_000)) + b"}"


def check_refusal(response: Any) -> None:
    """The answer to a content that is no body: OpenAI's envelope, and nothing of the content."""
    assert response.status_code in (400, 413), response.text[:1000]
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert len(response.content) < 1000
