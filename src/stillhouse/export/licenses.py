"""Licenses of the models that a student was made from, and their terms for students."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stillhouse.finding import Finding
from stillhouse.markdown import inert
from stillhouse.teachers.model_source import ModelSource

CARD = "README.md"
UNKNOWN = "unknown"
OTHER = "other"
"""The Hub's name for licenses that it does not know; the card adds the license's own name."""
API_TERMS = "the provider's terms"
TEACHER = "The teacher"
HUB_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")
"""The form of license names on the Hub."""

FREE = re.compile(
    r"apache-?2(\.0)?|mit(-0)?|0?bsd(-.*)?|isc|zlib|cc0(-1\.0)?|cc-by-[1-4]\.0|unlicense|wtfpl|bsl-1\.0"
    r"|postgresql|ncsa|afl-3\.0|pddl|odc-by|cdla-permissive-[12]\.0"
)
"""Licenses, by their Hub names, that require only a notice and attribution."""

NEW_LLAMA = (
    "Meta's license allows students of any kind, but requires a student's name to begin with "
    "“Llama”, and “Built with Llama” to be displayed where it is used."
)
OLD_LLAMA = (
    "Meta's license forbids using the model or its answers to improve any large language model "
    "that is not based on Llama; Llama 3's also requires a name that begins with “Llama 3”, "
    "and “Built with Meta Llama 3” to be displayed."
)
SOME_LLAMA = (
    "the version of Meta's license is unknown: versions before 3.1 forbid using the model or its "
    "answers to improve a large language model that is not Llama; later versions require the name "
    "to begin with “Llama”, and “Built with Llama” to be displayed."
)

RESTRICTIONS = {
    r"llama\D*(3\.[1-9]|[4-9])": NEW_LLAMA,
    r"llama\D*[123]": OLD_LLAMA,
    r"llama": SOME_LLAMA,
    r"gemma": "Google's terms treat a student as a model derivative: they apply to it too, and "
    "their use restrictions must be passed on with it.",
    r"non-?commercial|(?<![a-z])nc(?![a-z])": "this license does not allow commercial use of the "
    "model or of models derived from it.",
    r"research|amlr|mrl|mnpl": "this license is for research: check what else it allows before "
    "you share or use a student.",
    r"tongyi|qianwen|qwen": "its first version forbids using the model or its answers to improve "
    "other large language models; later versions require “Built with Qwen” to be displayed: check "
    "which version the model has.",
    r"(?<![a-z])nd(?![a-z])": "this license does not allow sharing modified versions, and a "
    "student might be one.",
    r"rail": "its use restrictions also apply to derived models: they must be passed on with a "
    "student.",
    r"gpl|(?<![a-z])(sa|mpl|osl|eupl)(?![a-z])": "derived models can only be shared under the "
    "same license: check whether that applies to a student.",
    r"^other$": "the model has its own license: check whether it allows distillation before you "
    "share a student.",
}
"""A license's terms for students, by a pattern in its name; the first match counts."""


@dataclass(frozen=True)
class License:
    """A license.

    id: its name on the Hub, or as stated in a recipe.
    name, link: for licenses that the Hub does not know, whose id is `other`.
    """

    id: str
    name: str | None = None
    link: str | None = None

    @property
    def shown(self) -> str:
        return self.name if self.id == OTHER and self.name else self.id

    @property
    def head(self) -> dict[str, str]:
        """The metadata for a model card; empty if the license is unknown."""
        if self.id in (UNKNOWN, API_TERMS):
            return {}
        named = {"license": self.id, "license_name": self.name, "license_link": self.link}
        plain = _plain(self.id)
        if FREE.fullmatch(plain):
            named["license"] = plain
        elif not HUB_ID.fullmatch(self.id):  # The Hub would reject the card.
            name = re.sub(r"[^a-z0-9.]+", "-", plain).strip("-")
            named = {"license": OTHER, "license_name": name}
        return {key: " ".join(value.split()) for key, value in named.items() if value}


@dataclass(frozen=True)
class Origin:
    """A model that a student was made from. part: its role. model: the resolved source."""

    part: str
    model: str
    license: License

    @property
    def warning(self) -> str | None:
        """The license's terms for students; None if it allows them freely."""
        warning = license_warning(self.license.shown)
        if self.license.id == UNKNOWN and self.part == TEACHER:
            return f"{warning}, and state it in the recipe (teacher.license)"
        return warning

    @property
    def repository(self) -> str | None:
        """The model's name on the Hub, if it came from there."""
        name = self.model.split(" ")[0]
        found = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and "(commit " in self.model
        return name if found else None


def origin(part: str, source: ModelSource, stated: str | None = None) -> Origin:
    return Origin(part, source.described, find_license(stated, source.card or source.path))


def api_origin(part: str, described: str, stated: str | None = None) -> Origin:
    return Origin(part, described, License(stated or API_TERMS))


def teacher_origin(source: ModelSource | None, described: str, stated: str | None) -> Origin:
    """The teacher's origin. source: None for an API. stated: its license in the recipe."""
    if source is None:
        return api_origin(TEACHER, described, stated)
    return origin(TEACHER, source, stated)


def distinct(origins: Sequence[Origin]) -> list[Origin]:
    """The origins without repeated models; each model has its first role."""
    first: dict[str, Origin] = {}
    for one in origins:
        first.setdefault(one.model, one)
    return list(first.values())


def find_license(stated: str | None, folder: Path) -> License:
    """The license stated in the recipe, else the license in the model's card, else `unknown`."""
    if stated:
        return License(stated)
    head = _card_head(folder / CARD)
    named = head.get("license")
    if not named:
        return License(UNKNOWN)
    names = named if isinstance(named, list) else [named]
    name, link = head.get("license_name"), head.get("license_link")
    return License(", ".join(map(str, names)), name and str(name), link and str(link))


def _card_head(card: Path) -> dict[str, Any]:
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    head = re.match(r"---\n(.*?)\n---", text, flags=re.DOTALL)
    try:
        found = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def license_warning(license_: str) -> str | None:
    """A license's terms for students; None if it allows them freely.

    license_: the license's name on the Hub, or free text.
    """
    if license_ == UNKNOWN:
        return "the license is unknown: look it up before you publish a student"
    if license_ == API_TERMS:
        return (
            "an API's terms often forbid training other models on its answers: check them before "
            "you share a student"
        )
    plain = _plain(license_)
    if FREE.fullmatch(plain):
        return None
    for pattern, warning in RESTRICTIONS.items():
        if re.search(pattern, plain):
            return warning
    return "this license is not known to allow students freely: check it before you share one."


def _plain(license_: str) -> str:
    """Normalize “Apache License, Version 2.0” to apache-2.0; keep names such as `unlicense`."""
    words = re.sub(r"\b(the|licen[sc]e|version)\b|[,()]", " ", license_.lower())
    return re.sub(r"[\s_]+", "-", words.strip()).strip("-")


def license_lines(origins: Sequence[Origin]) -> Iterator[Finding]:
    """Yield a warning for each origin whose license restricts students."""
    for one in origins:
        if one.warning is not None:
            yield Finding("warning", "license", f"{one.part}, {one.model}: {one.warning}")


def licenses_section(origins: Sequence[Origin]) -> str:
    """A paragraph for each model with its license and warning, the teacher's first."""
    return "\n\n".join(_of(one) for one in origins)


def _of(one: Origin) -> str:
    whose = f"{one.part}'s" if one.part == TEACHER else f"{one.part}, {inert(one.model)}"
    text = f"{whose}: **{inert(one.license.shown)}**."
    return text if one.warning is None else f"{text} Warning: {one.warning}"


def origins_head(origins: Sequence[Origin]) -> dict[str, Any]:
    """A card's `license` and `base_model`. The license is the one that restricts students or, if
    there is none, the teacher's; if several do, no single license covers them all."""
    binding = list(dict.fromkeys(one.license for one in origins if one.warning is not None))
    if len(binding) > 1:
        head: dict[str, Any] = {"license": OTHER, "license_name": "several-see-below"}
    else:
        head = {**(binding[0] if binding else origins[0].license).head}
    models = [one.repository for one in origins if one.repository]
    if models:
        head["base_model"] = models[0] if len(models) == 1 else models
    return head
