"""Generate rows of sample data that satisfy a JSON Schema.

stdin: {"schema": {"type": "object", …}, "count": 10, "seed": 0}; the last two may be left out
stdout: {"rows": […]}, or {"error": …} and exit 1
"""

from __future__ import annotations

import json
import math
import random
import string
import sys
import uuid
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_ROWS = 1000
FIRST_DAY = datetime(2020, 1, 1, tzinfo=UTC)
KNOWN = {
    "type",
    "enum",
    "const",
    "properties",
    "required",
    "additionalProperties",
    "items",
    "minItems",
    "maxItems",
}
KNOWN |= {"minimum", "maximum", "minLength", "maxLength", "format"}
NOTES = {"title", "description", "default", "examples", "$schema", "$id", "$comment"}


class Generator:
    """Values for schemas, always the same ones for a seed."""

    def __init__(self, seed: int) -> None:
        """Begin the sequence of the seed."""
        self.random = random.Random(seed)  # noqa: S311 - sample data keeps no secret

    def value(self, schema: dict[str, Any]) -> Any:  # noqa: ANN401 - any JSON value
        """Return a value that satisfies the schema; raise ValueError for what this does not understand."""
        if unknown := set(schema) - KNOWN - NOTES:
            raise ValueError(
                f"cannot generate for {', '.join(sorted(unknown))}: use {', '.join(sorted(KNOWN))}"
            )
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return self.random.choice(schema["enum"])
        kind = schema.get("type", "object" if "properties" in schema else "string")
        if isinstance(kind, list):
            kind = self.random.choice(kind)
        make: Callable[[dict[str, Any]], Any] | None = {
            "object": self.object,
            "array": self.array,
            "string": self.string,
            "integer": self.integer,
            "number": self.number,
            "boolean": self.boolean,
            "null": self.null,
        }.get(kind)
        if make is None:
            raise ValueError(f"there is no type {kind!r}")
        return make(schema)

    def object(self, schema: dict[str, Any]) -> dict[str, Any]:
        """Return all properties that the schema describes."""
        properties = schema.get("properties", {})
        if missing := set(schema.get("required", [])) - set(properties):
            raise ValueError(f"required but not in properties: {', '.join(sorted(missing))}")
        return {name: self.value(inner) for name, inner in properties.items()}

    def array(self, schema: dict[str, Any]) -> list[Any]:
        """Return minItems to maxItems items, by default up to three."""
        length = self.length(schema, "Items", 1, 3)
        return [self.value(schema.get("items", {})) for _ in range(length)]

    def string(self, schema: dict[str, Any]) -> str:
        """Return lower-case letters, or what the format asks for."""
        if "format" not in schema:
            return self.letters(self.length(schema, "Length", 4, 12))
        text = self.formatted(schema["format"])
        if not schema.get("minLength", 0) <= len(text) <= schema.get("maxLength", len(text)):
            raise ValueError(f"{schema['format']} has {len(text)} characters: change minLength or maxLength")
        return text

    def letters(self, count: int) -> str:
        """Return so many lower-case letters."""
        return "".join(self.random.choices(string.ascii_lowercase, k=count))

    def formatted(self, form: str) -> str:
        """Return a string of one of JSON Schema's formats."""
        moment = FIRST_DAY + timedelta(seconds=self.random.randrange(10 * 365 * 86400))
        match form:
            case "date":
                return moment.date().isoformat()
            case "date-time":
                return moment.isoformat()
            case "uuid":
                return str(uuid.UUID(int=self.random.getrandbits(128), version=4))
            case "email":
                return f"{self.letters(8)}@example.com"
        raise ValueError(f"cannot generate format {form!r}: use date, date-time, email or uuid")

    def boolean(self, _: dict[str, Any]) -> bool:
        """Return either."""
        return self.random.random() < 0.5

    def null(self, _: dict[str, Any]) -> None:
        """Return null."""

    def integer(self, schema: dict[str, Any]) -> int:
        """Return a whole number from minimum to maximum."""
        low, high = self.bounds(schema)
        if math.ceil(low) > math.floor(high):
            raise ValueError(f"no integer lies between {low} and {high}")
        return self.random.randint(math.ceil(low), math.floor(high))

    def number(self, schema: dict[str, Any]) -> float:
        """Return a number from minimum to maximum."""
        low, high = self.bounds(schema)
        return min(high, max(low, round(self.random.uniform(low, high), 2)))

    @staticmethod
    def bounds(schema: dict[str, Any]) -> tuple[float, float]:
        """Return minimum and maximum, by default 0 and 1000, or 1000 apart from the one that is given."""
        low, high = schema.get("minimum"), schema.get("maximum")
        low = low if low is not None else 0 if high is None or high >= 0 else high - 1000
        high = high if high is not None else low + 1000
        if low > high:
            raise ValueError(f"minimum {low} is above maximum {high}")
        return low, high

    def length(self, schema: dict[str, Any], of: str, low: int, high: int) -> int:
        """Return a length between min{of} and max{of}, whose defaults are `low` and `high`."""
        least = schema.get(f"min{of}", min(low, schema.get(f"max{of}", low)))
        most = schema.get(f"max{of}", max(high, least))
        if least > most:
            raise ValueError(f"min{of} {least} is above max{of} {most}")
        return self.random.randint(least, most)


def run(inputs: dict[str, Any]) -> list[Any]:
    """Return the rows that the inputs ask for."""
    count = int(inputs.get("count", 10))
    if not 1 <= count <= MOST_ROWS:
        raise ValueError(f"count is {count}: 1 to {MOST_ROWS} rows")
    generator = Generator(int(inputs.get("seed", 0)))
    return [generator.value(inputs["schema"]) for _ in range(count)]


def main() -> int:
    """Read the inputs, print the result, return the exit code."""
    try:
        rows = run(json.load(sys.stdin))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        return 1
    print(json.dumps({"rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
