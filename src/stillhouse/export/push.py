"""Uploads exports to one Hugging Face Hub repository: the first at its root, others in folders."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi

from stillhouse.errors import RunError
from stillhouse.export.export_config import PushRecipe
from stillhouse.progress import note
from stillhouse.teachers.redact import redacted

LONGEST = 500
"""Characters of an error of the Hub that are shown."""


@dataclass(frozen=True)
class Pushed:
    """commits: URLs, by format."""

    repo: str
    commits: dict[str, str]


def push(section: PushRecipe, folders: Mapping[str, Path], name: str) -> Pushed:
    """Upload each export's folder, with its card; the repository is created if needed.

    folders: by format, the one for the repository's root first. name: of the run, for the commits.
    Raises RunError if there is no token or network, or the upload fails.
    """
    token = require_token(section)
    api = HfApi(token=token)
    commits = {}
    try:
        api.create_repo(section.repo, private=section.private, exist_ok=True)
        for place, (form, folder) in enumerate(folders.items()):
            done = api.upload_folder(
                repo_id=section.repo,
                folder_path=folder,
                path_in_repo=None if place == 0 else form,
                commit_message=f"{name}: {form}",
            )
            commits[form] = str(done.commit_url)
    except Exception as error:  # its HTTP and Xet clients have errors without a common base
        words = redacted(str(error), token).split() or [type(error).__name__]
        raise RunError(
            f"the upload to the Hub failed ({' '.join(words)[:LONGEST]})",
            where=f"export.push_to_hub.repo: {section.repo}",
            fix="check that the token may write there and that the network works, then run again: "
            "finished uploads are kept",
        ) from error
    note(f"Uploaded to {section.repo}: {', '.join(commits)}")
    return Pushed(section.repo, commits)


def require_token(section: PushRecipe) -> str:
    """Raise RunError if the environment has no token."""
    token = os.environ.get(section.token_env, "").strip()
    if not token:
        raise RunError(
            f"{section.token_env} is not set, so there is no token for the Hub",
            where="export.push_to_hub",
            fix=f"set {section.token_env} to a token with write access, or remove the section",
        )
    return token
