"""Uploads of exported models and adapters to the Hugging Face Hub, or to whatever ``HF_ENDPOINT`` names."""

from __future__ import annotations

import logging
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from heretic_ds.checkpoint.source import is_hub_id
from heretic_ds.errors import UserError
from heretic_ds.export.adapter import holds_export
from heretic_ds.export.target import MANIFEST_NAME
from heretic_ds.foreign.reading import read_json
from heretic_ds.foreign.text import in_one_line

log = logging.getLogger(__name__)

_LONGEST = 600
"""Characters of what the hub says that are told."""
_LOGIN = "log in with `hf auth login`, or set the environment variable HF_TOKEN, with a token that may write"


def check_upload(folder: Path, repository: str | None) -> None:
    """Refuse, before anything is asked of the hub, a folder that is no whole export, and what is no repository's name.

    Raises UserError that says what to do instead.
    """
    file = folder / MANIFEST_NAME
    manifest = read_json(file) if file.is_file() else {}
    if not holds_export(folder, str(manifest.get("format", "model"))) or not manifest:
        raise UserError(f"export.dir={folder} holds no export that is whole; export a trial first (task=export)")
    check_access(repository)


def check_access(repository: str | None) -> None:
    """Refuse what is no repository's name, and a user whom the hub will not know. Raises UserError."""
    if repository is not None and not is_hub_id(repository):
        raise UserError(
            f"export.repo={repository} is no repository's name; give owner/name, or a name for one of your own"
        )
    if get_token() is None:
        raise UserError(f"task=upload needs to know you: {_LOGIN}")


def upload_export(folder: Path, repository: str | None, private: bool, overwrite: bool) -> str:
    """Create a repository, and write all of an export's folder to it in one commit; its address.

    ``repository`` without an owner is one of the user's own; None: named after the base model. One that holds other
    things is left alone unless ``overwrite``. Raises UserError for what the hub refuses; the token is in no message.
    """
    check_upload(folder, repository)
    api = HfApi()
    try:
        name = repository or f"{str(read_json(folder / MANIFEST_NAME)['base_model']).rsplit('/', 1)[-1]}-abliterated"
        name = name if "/" in name else f"{api.whoami()['name']}/{name}"
        if api.repo_exists(name):
            _refuse_other(api, name, overwrite)
        else:
            api.create_repo(name, private=private)
            log.info("made %s, %s", name, "private" if private else "public")
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message="Directional ablation by heretic_ds",
            ignore_patterns=[".*"],
        )
    except LocalTokenNotFoundError as error:
        raise UserError(f"task=upload needs to know you: {_LOGIN}") from error
    except OfflineModeIsEnabled as error:
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it") from error
    except (HfHubHTTPError, HFValidationError, ValueError, OSError, RuntimeError) as error:
        raise UserError(f"the hub did not take the upload: {_without_token(error)}") from _Told(_without_token(error))
    return f"{constants.ENDPOINT}/{name}"


class _Told(Exception):
    """The cause of an error without what its own objects hold: requests, with headers."""


def _refuse_other(api: HfApi, name: str, overwrite: bool) -> None:
    """A repository that holds anything but an export may be somebody's other work."""
    names = set(api.list_repo_files(name)) - {".gitattributes", "README.md"}
    if names and MANIFEST_NAME not in names and not overwrite:
        raise UserError(
            f"export.repo={name} exists and holds other files ({min(names)}); give another name, or set "
            "export.overwrite=true"
        )


def _without_token(error: BaseException) -> str:
    """An error, and what it came of, in one line that does not tell the token."""
    lines = [str(each) for each in (error, error.__cause__) if each is not None]
    text = in_one_line(" ".join(lines), _LONGEST)
    if isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code in (401, 403):
        text = f"{text} ({_LOGIN})"
    token = get_token()
    return text if token is None else text.replace(token, "[token]")
