"""Checkpoints from the Hugging Face hub, through `huggingface_hub` and its cache.

Downloads resume, are shared with every other tool, and show progress; what is added here is which
revision was taken, and errors that say what to do.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from twotower_contract.errors import TwoTowerError

# Files that an export needs: no remote code, no other formats, no folders (a `*` matches a slash).
PATTERNS: Final = ("*.safetensors", "*.json", "*.jinja")
NOT_PATTERNS: Final = ("*/*",)

_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")


class HubError(TwoTowerError):
    """A checkpoint could not be fetched from the Hugging Face hub."""


def is_id(name: str) -> bool:
    """Whether a text has the form `organisation/name`."""
    return _ID.fullmatch(name) is not None


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a full commit hash, which cannot move."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def is_same_commit(revision: str, commit: str | None) -> bool:
    """Whether a revision, in full or from seven digits on, names a commit."""
    return commit is not None and (
        revision == commit
        or (re.fullmatch(r"[0-9a-f]{7,40}", revision) is not None and commit.startswith(revision))
    )


def cached_identity(folder: Path) -> tuple[str | None, str | None]:
    """Hub id and commit of a snapshot folder of a cache: `models--org--name/snapshots/commit`.

    Both None for any other folder. Links on the way to the folder are followed.
    """
    resolved = folder.resolve()
    repository = resolved.parent.parent.name
    if resolved.parent.name != "snapshots" or not repository.startswith("models--"):
        return None, None
    return repository.removeprefix("models--").replace("--", "/", 1), resolved.name


def cached_reference(folder: Path, name: str) -> str | None:
    """Commit that a branch or tag had when a snapshot's cache was last updated.

    Args:
        name: For example `main`, or `refs/pr/1`.

    Returns:
        None where the cache knows no such name.
    """
    references = folder.resolve().parent.parent / "refs"
    path = (references / name).resolve()
    if not path.is_relative_to(references) or not path.is_file():
        return None
    commit = path.read_text(encoding="utf-8", errors="replace").strip()
    return commit if is_commit(commit) else None


def fetch(
    id_: str, revision: str | None, *, local_only: bool = False
) -> tuple[Path, tuple[str, str], list[str]]:
    """Download a checkpoint into the hub's cache, or complete what lies there.

    Args:
        id_: `organisation/name`.
        revision: Branch, tag or commit; the main branch by default.
        local_only: Take what the cache holds.

    Returns:
        The snapshot's folder, the hub id with the commit that was taken, and warnings.

    Raises:
        HubError: The hub does not know it, does not let us, or cannot be reached.
    """
    import huggingface_hub

    # the base of the errors of whichever HTTP library the client uses
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        folder = huggingface_hub.snapshot_download(
            id_,
            revision=revision,
            allow_patterns=list(PATTERNS),
            ignore_patterns=list(NOT_PATTERNS),
            local_files_only=local_only,
        )
    except (HTTPError, OSError, ValueError) as error:
        raise HubError(f"{id_}: {_reason(error, revision, local_only)}") from error
    path = Path(folder).resolve()
    commit = cached_identity(path)[1]
    if commit is None:
        raise HubError(f"{id_}: {path} is no snapshot folder; set HF_HOME to an ordinary cache")
    warnings = []
    if not is_commit(revision):
        warnings.append(
            f"{id_}: {'no revision was named' if revision is None else f'{revision!r} can move'}; "
            f"took {commit}. Pin it with {id_}@{commit}"
        )
    return path, (id_, commit), warnings


def _reason(error: Exception, revision: str | None, local_only: bool) -> str:
    """Say why a download failed, and what to do."""
    from huggingface_hub import errors

    cause = error.__cause__ if isinstance(error.__cause__, errors.HfHubHTTPError) else error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(cause, errors.GatedRepoError):
        return (
            "its owner asks you to accept terms first: open its page on the hub, then sign in with "
            "`hf auth login`"
        )
    if isinstance(cause, errors.RevisionNotFoundError):
        named = f"revision {revision!r}" if revision else "main branch"
        return f"the hub has no {named} of it; its page lists branches, tags and commits"
    # the hub answers 401 for a repository that is not there to a caller whom it does not know
    if isinstance(cause, errors.RepositoryNotFoundError):
        return (
            f"there is neither such a folder nor such a repository on the hub (status {status}), "
            "or it is private, or not for your token: sign in with `hf auth login`"
        )
    if status in (401, 403):
        return (
            f"the hub does not accept your token (status {status}): sign in again with `hf auth "
            "login`, or unset HF_TOKEN"
        )
    if status == 429:
        wait = cause.response.headers.get("Retry-After")  # type: ignore[attr-defined]
        when = f"in {wait} seconds" if wait else "in a few minutes"
        return f"the hub gets too many requests from here (status 429): try again {when}"
    if status is not None and status >= 500:
        return (
            f"the hub has a fault of its own (status {status}): run the same command again later, "
            "finished files are kept"
        )
    # version 1.0 has no such error; it gives the folder, whose index names what is missing
    if isinstance(error, getattr(errors, "IncompleteSnapshotError", ())):
        return (
            "its download into the local cache is not complete; `twotower export` fetches the rest "
            "when the hub can be reached"
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        which = f"revision {revision}" if revision else "it"
        return f"there is no such folder, and the local cache does not hold {which}; " + (
            "`twotower export` downloads it"
            if local_only
            else f"the hub did not answer ({type(error.__cause__).__name__}): check the network, "
            "or name a folder"
        )
    return (
        f"the download did not finish: {error}; run the same command again, finished files are kept"
    )
