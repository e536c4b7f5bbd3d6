"""Checks the references in a JSON schema before answers are validated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jsonschema_specifications import REGISTRY
from referencing import Resource
from referencing.jsonschema import DRAFT202012


def check_references(schema: dict[str, Any]) -> None:
    """Raises referencing.exceptions.Unresolvable for a `$ref` that is neither in the schema nor in
    a specification of JSON schema: nothing is fetched."""
    whole: Resource[Any] = Resource.from_contents(schema, default_specification=DRAFT202012)
    registry: Any = REGISTRY.with_resource(whole.id() or "", whole)
    todo = [(whole, registry.resolver_with_root(whole))]
    while todo:
        part, resolver = todo.pop()
        if isinstance(part.contents, Mapping) and isinstance(part.contents.get("$ref"), str):
            resolver.lookup(part.contents["$ref"])
        todo += [(inner, resolver.in_subresource(inner)) for inner in part.subresources()]
