"""Files with the roots of two tokenizers, in the user's cache and in run folders.

A folder contains ROOTS, which is loaded again, and SUMMARY, which is for people.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stillhouse.checksums import seal_broken, sealed
from stillhouse.disk_errors import disk_errors
from stillhouse.errors import ModelError, RunError
from stillhouse.file_locks import building_folder
from stillhouse.teachers.align_tokens import TokenAligner
from stillhouse.teachers.hashing import cache_folder
from stillhouse.teachers.roots import Roots
from stillhouse.teachers.text_tokens import Ids, TextTokens

ROOTS, SUMMARY = "roots.safetensors", "roots.json"
VERSION = 1
"""Part of the cache key: increase it whenever the same tokenizers would get different roots."""
EXAMPLES = 20


@lru_cache(maxsize=4)
def pair_identity(aligner: TokenAligner) -> str:
    """SHA-256 of both tokenizers and their corresponding special tokens."""
    found = hashlib.sha256()
    for tokens in (aligner.student, aligner.teacher):
        found.update(tokens.tokenizer.backend_tokenizer.to_str().encode())
    found.update(json.dumps([VERSION, aligner.partners]).encode())
    return found.hexdigest()


def cached_roots(aligner: TokenAligner, cache: Path | None = None) -> Roots:
    """The roots of two tokenizers before any text is seen, computed once for each pair.

    A damaged file in the cache is replaced. A cache that cannot be written costs only time.
    """
    folder = cache_folder(cache) / "roots" / pair_identity(aligner)
    if (folder / ROOTS).is_file():
        with suppress(ModelError):
            return load_roots(folder, aligner)
    roots = aligner.roots()
    with suppress(OSError, RunError), building_folder(folder) as building:
        save_roots(roots, building, aligner)
        if (folder / ROOTS).is_file():
            (building / ROOTS).replace(folder / ROOTS)
        else:
            building.rename(folder)
    return roots


def save_roots(roots: Roots, folder: Path, aligner: TokenAligner) -> None:
    """Write ROOTS and SUMMARY to a folder. Raises RunError if it cannot be written."""
    maps = {
        "student": torch.from_numpy(roots.student_V.astype(np.int32)),
        "teacher": torch.from_numpy(roots.teacher_W.astype(np.int32)),
    }
    facts = sealed(
        {
            "tokenizers": pair_identity(aligner),
            "count": roots.count,
            "shared": roots.shared,
            "merges": roots.merges,
            "maps": _hash_of(*maps.values()),
        }
    )
    text = json.dumps(summary(roots, aligner), indent=2, ensure_ascii=False)
    with disk_errors(folder):
        save_file(maps, folder / ROOTS, metadata={"roots": json.dumps(facts)})
        (folder / SUMMARY).write_text(text + "\n", encoding="utf-8")


def load_roots(folder: Path, aligner: TokenAligner) -> Roots:
    """Load roots that `save_roots` wrote for these tokenizers.

    Raises ModelError if the file is damaged or belongs to different tokenizers.
    """
    path = folder / ROOTS
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["roots"])
            maps = [file.get_tensor(name) for name in ("student", "teacher")]
        if seal_broken(facts) or facts["maps"] != _hash_of(*maps):
            raise ValueError("its content does not match its checksum")
        student_V, teacher_W = (map_X.numpy().astype(np.int64) for map_X in maps)
        merges = tuple((int(s), int(t), int(n)) for s, t, n in facts["merges"])
        roots = Roots(student_V, teacher_W, int(facts["count"]), int(facts["shared"]), merges)
        tokenizers = facts["tokenizers"]
    except (OSError, SafetensorError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise _unusable(path, f"the file cannot be read ({error})") from error
    if tokenizers != pair_identity(aligner):
        raise _unusable(path, "the file belongs to different tokenizers")
    sides = (student_V, aligner.student), (teacher_W, aligner.teacher)
    for roots_X, tokens in sides:
        if len(roots_X) != tokens.size or set(np.unique(roots_X)) != set(range(roots.count)):
            raise _unusable(path, f"the file does not match the tokens of {tokens.name}")
    return roots


def _hash_of(*maps: Tensor) -> str:
    found = xxhash.xxh3_128()
    for map_X in maps:
        found.update(map_X.numpy().tobytes())
    return found.hexdigest()


def _unusable(path: Path, why: str) -> ModelError:
    return ModelError(
        f"the roots of two tokenizers cannot be used: {why}",
        where=path,
        fix="delete its folder, which the next run creates again",
    )


def summary(roots: Roots, aligner: TokenAligner) -> dict[str, Any]:
    """A summary of the roots and how they came about, as plain data with tokens as text."""
    student, teacher = aligner.student, aligner.teacher
    names = _root_names(roots, aligner)
    sides = ("student", student, roots.student_V), ("teacher", teacher, roots.teacher_W)
    return {
        **{side: _vocabulary(tokens, roots_X, names) for side, tokens, roots_X in sides},
        "roots": roots.count,
        "strings_that_are_tokens_of_both": roots.shared,
        "special_tokens_of_one_meaning": [
            [token_text(ours, student), token_text(theirs, teacher)]
            for ours, theirs in aligner.partners
        ],
        "merged_since_they_begin_at_one_place_of_the_text": [
            {
                "student": token_text(ours, student),
                "teacher": token_text(theirs, teacher),
                "times": count,
            }
            for ours, theirs, count in roots.merges
        ],
    }


def _vocabulary(tokens: TextTokens, roots_X: Ids, names: Mapping[int, bytes]) -> dict[str, Any]:
    """Facts about one tokenizer, with examples of tokens that belong to another string's root."""
    found = {id: names.get(int(roots_X[id])) for id in tokens.strings}
    other = {id: name for id, name in found.items() if name not in (None, tokens.strings[id])}
    return {
        "tokenizer": tokens.name,
        "tokens": len(tokens.strings),
        "tokens_of_the_root_of_another_string": len(other),
        "for_example": {
            token_text(id, tokens): (name or b"").decode(errors="backslashreplace")
            for id, name in islice(other.items(), EXAMPLES)
        },
    }


def _root_names(roots: Roots, aligner: TokenAligner) -> dict[int, bytes]:
    """For each root, the shortest string that is a token of both vocabularies."""
    shared = set(aligner.teacher.strings.values())
    names: dict[int, bytes] = {}
    for id, value in aligner.student.strings.items():
        root = int(roots.student_V[id])
        if value in shared and (root not in names or len(value) < len(names[root])):
            names[root] = value
    return names


def token_text(id: int, tokens: TextTokens) -> str:
    """A token as text: a special token's name, or its bytes."""
    if id in tokens.special:
        return tokens.special[id]
    return tokens.strings.get(id, b"").decode(errors="backslashreplace")
