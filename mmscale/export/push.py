"""Uploading an exported folder to the Hugging Face Hub.

`huggingface_hub` does the transfer. What a broken upload has brought over is not sent again, and the files become
visible together, in one commit.
"""

import json
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from mmscale.errors import UserError
from mmscale.model.configuration_mmscale import MMScaleConfig

# The Hub's error is made from that of the HTTP library beneath it: its bases hold lost connections too.
NETWORK_ERRORS = (*HfHubHTTPError.__bases__, OSError, RuntimeError)


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    dry_run: bool = False,
    endpoint: str | None = None,
    token: str | None = None,
    say: Callable[[str], None] = print,
) -> str:
    """Uploads a folder made by `export_hub` and returns the repository's address.

    Args:
        repo_id: `USER/REPO` or `ORGANIZATION/REPO`; made when it is not there.
        private: whether a repository that is made is private; one that is there stays as it is.
        dry_run: only say what would go where; nothing is sent or asked.
        endpoint: of the Hub; `HF_ENDPOINT` or huggingface.co unless given.
        token: `HF_TOKEN` or that of `hf auth login` unless given.
        say: takes lines for people.

    Raises:
        UserError: not an exported folder, a name the Hub does not allow, no token, or an upload that failed.
    """
    folder = Path(folder)
    files = _files_of_export(folder)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(
            f"--push: `{repo_id}` is not a name that the Hub allows: {' '.join(str(error).split())}"
        ) from None
    if repo_id.count("/") != 1:
        raise UserError(f"--push: `{repo_id}` does not say whose repository it is; write USER/{repo_id}")
    api = HfApi(endpoint=endpoint, token=token)
    address = f"{api.endpoint}/{repo_id}"
    if dry_run:
        for name, size in files.items():
            say(f"{size:>15,}  {name}")
        kind = "private" if private else "public"
        say(f"{sum(files.values()):>15,}  bytes would go to {address} ({kind} if it is new); nothing was sent")
        return address
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=list(files), commit_message="Upload with mmscale"
        )
    except LocalTokenNotFoundError:
        raise UserError("--push: you are not logged in; run `hf auth login`, or set HF_TOKEN") from None
    except NETWORK_ERRORS as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--push: the upload to {address} failed: {reason}. The same command goes on where it stopped; "
            "a 401 or 403 means that the token may not write there"
        ) from None
    say(f"uploaded {sum(files.values()):,} bytes to {address}")
    return address


def _files_of_export(folder: Path) -> dict[str, int]:
    """Names and sizes of what would be uploaded: everything but hidden files."""
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        kind = None
    if kind != MMScaleConfig.model_type:
        raise UserError(f"{folder}: not a folder made by `mmscale export`, so nothing is uploaded from it")
    paths = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return {path.name: path.stat().st_size for path in paths}
