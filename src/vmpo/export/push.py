"""An exported folder on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from vmpo.errors import UserError


def check_repo(repo: str) -> None:
    """Says early what the hub would say late.

    Raises:
        UserError: if the name is not 'owner/name', or HF_HUB_OFFLINE forbids uploads.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repo):
        raise UserError(f"--push '{repo}': a repository on the hub is named OWNER/NAME")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise UserError("--push: HF_HUB_OFFLINE forbids uploads; unset it")


def push(folder: Path, repo: str, *, private: bool) -> str:
    """Uploads a folder in one commit, making the repository if need be; returns its address.

    Raises:
        UserError: if the hub refuses or cannot be reached; the folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repo, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload by vmpo export")
    except Exception as error:  # of whichever HTTP library the hub's client is built on
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"'{folder}' could not be pushed to '{repo}': {reason}; it is complete on disk: after 'hf auth login', "
            f"'hf upload {repo} {folder}' sends it"
        ) from error
    return str(address)
