"""Signal stores in dataset repositories on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from stillhouse.disk_errors import disk_errors
from stillhouse.errors import StillhouseError, StoreError, first_line
from stillhouse.signals.folded_store import FOLD
from stillhouse.signals.verify import verify

FILES = ["*.json", "shards/*.bin", FOLD]
"""Patterns of a store's files."""


def upload_store(path: Path, repository: str, *, private: bool = True) -> str:
    """Upload a finished store to a dataset repository, and return the commit's URL.

    The Hub token comes from the environment. Raises StoreError if the store is damaged or the
    upload fails.
    """
    _reject_damaged(path)
    api = HfApi()
    try:
        api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            repo_type="dataset",
            folder_path=path,
            allow_patterns=FILES,
            commit_message="A store of a teacher's signals",
        )
    except Exception as error:  # the HTTP and Xet clients' errors have no common base class
        raise _hub_error("upload", repository, error) from error
    return str(commit.commit_url)


def download_store(repository: str, path: Path, *, revision: str | None = None) -> Path:
    """Download a store to the folder `path` and verify it. Raises StoreError if either fails."""
    try:
        with disk_errors(path, fix="free some space and run the same command again"):
            snapshot_download(
                repository,
                repo_type="dataset",
                revision=revision,
                local_dir=path,
                allow_patterns=FILES,
            )
    except StillhouseError:
        raise
    except Exception as error:
        raise _hub_error("download", repository, error) from error
    _reject_damaged(path)
    return path


def _reject_damaged(path: Path) -> None:
    wrong = verify(path)
    if wrong:
        raise StoreError(
            f"the store is damaged: {wrong[0].what}", where=wrong[0].where, fix=wrong[0].fix
        )


def _hub_error(what: str, repository: str, error: Exception) -> StoreError:
    return StoreError(
        f"the {what} failed ({first_line(error)})",
        where=repository,
        fix="check the network, the repository's name, and the permissions of HF_TOKEN",
    )
