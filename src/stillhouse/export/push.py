"""Upload exports to a Hugging Face Hub repository: the first to its root, others to folders."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import HfApi

from stillhouse.errors import RunError
from stillhouse.export.export_config import PushRecipe
from stillhouse.progress import note
from stillhouse.teachers.api_keys import redacted

LONGEST = 500
"""Maximum number of characters of a Hub error that are shown."""


def push(section: PushRecipe, folders: Mapping[str, Path], name: str) -> dict[str, str]:
    """Upload each export's folder, including its card, and return the commits' URLs by format.
    Creates the repository if needed.

    folders: by format; the first goes to the repository's root.
    name: the run's name, for commit messages.

    Raises RunError if there is no token, or the upload fails.
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
    except Exception as error:  # The HTTP and Xet clients' errors have no common base class.
        words = redacted(str(error), token).split() or [type(error).__name__]
        raise RunError(
            f"the upload to the Hub failed: {' '.join(words)[:LONGEST]}",
            where=f"export.push_to_hub.repo: {section.repo}",
            fix="check the network and that the token has write access, and run again; finished "
            "uploads are kept",
        ) from error
    note(f"Uploaded to {section.repo}: {', '.join(commits)}")
    return commits


def require_token(section: PushRecipe) -> str:
    """Return the token from the environment. Raises RunError if there is none."""
    token = os.environ.get(section.token_env, "").strip()
    if not token:
        raise RunError(
            f"{section.token_env} is not set, so there is no token for the Hub",
            where="export.push_to_hub",
            fix=f"set {section.token_env} to a token with write access, or remove the section",
        )
    return token
