"""From files here to a repository of the Hub."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from topwork.errors import CheckpointError


def upload(
    save: Callable[[Path], Any],
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload with Topwork",
    create_pr: bool = False,
) -> str:
    """Write files by `save(folder)` and put them into the model repository `repo_id`.

    The repository is made when it is not there (`private`: the account's default). Returns the
    commit's address. CheckpointError names what the Hub refused.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # The endpoint is read at call time: huggingface_hub itself reads it once, at import.
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            done = api.upload_folder(
                repo_id=repo_id, folder_path=folder, revision=revision,
                commit_message=commit_message, create_pr=create_pr,
            )  # fmt: skip
        except HFValidationError as error:
            raise CheckpointError(f"{repo_id!r} is no valid name on the Hub: {error}") from error
        except HfHubHTTPError as error:
            raise CheckpointError(
                f"{repo_id}: the Hub refused the upload (a token that may write is passed as "
                f"token= or stands in HF_TOKEN): {error}"
            ) from error
    return str(done.commit_url)
