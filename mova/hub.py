"""The folders beside a model's own files (experts, routing LoRA, tokenizer), in a directory or a hub repository."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, errors, snapshot_download
from transformers.utils import hub as _hub

_LOADING = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")
# These arguments describe the model's own repository and do not apply to another one.
_OF_THE_MODEL = ("revision", "subfolder")


def loading_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Select the arguments of ``from_pretrained`` that say where and how files are found; None counts as absent."""
    return {key: given[key] for key in _LOADING if given.get(key) is not None}


def elsewhere(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the loading arguments that also apply to a repository other than the model's own."""
    return {key: value for key, value in arguments.items() if key not in _OF_THE_MODEL}


def pinned(source: str | os.PathLike[str], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return loading arguments whose ``revision`` is the current commit, so that later reads come from the same one.

    If the repository cannot be found, the arguments stay as they are: transformers reports the error when it loads.
    """
    if Path(source).is_dir():
        return dict(arguments)
    try:
        root = _fetched(str(source), "config.json", arguments)
    except (OSError, ValueError, errors.HTTPError):
        return dict(arguments)
    return {**arguments, "revision": root.name}


def folder(source: str, name: str, arguments: Mapping[str, Any]) -> Path:
    """Return the folder ``name`` of a model's directory; a folder of a hub repository is fetched first.

    Args:
        source: a directory or a hub repository.
        name: with ``/`` between its parts.
        arguments: of :func:`loading_arguments`; ``subfolder`` says where in ``source`` the model lies.

    Raises:
        FileNotFoundError: there is no such folder. Other errors of the download (OSError) pass through.
    """
    where = _inside(name, arguments)
    root = Path(source)
    if not root.is_dir():
        root = _fetched(source, f"{where}/*", arguments)
    if not (root / where).is_dir():
        raise FileNotFoundError(f"{source} has no folder {where}")
    return root / where


def file_names(source: str, name: str, arguments: Mapping[str, Any]) -> set[str]:
    """List the files in the folder ``name`` and below; of a hub repository only the JSON files are fetched.

    If the hub cannot be reached, the list has the files that were fetched before.
    """
    where = _inside(name, arguments)
    root = Path(source)
    remote: set[str] = set()
    if not root.is_dir():
        root = _fetched(source, f"{where}/*.json", arguments)
        if not arguments.get("local_files_only"):
            try:
                info = HfApi(token=arguments.get("token")).model_info(source, revision=arguments.get("revision"))
                remote = {file.rfilename for file in info.siblings or ()}
            except (OSError, errors.HTTPError):
                pass  # snapshot_download does the same
    local = {path.relative_to(root).as_posix() for path in (root / where).rglob("*") if path.is_file()}
    return {path[len(where) + 1 :] for path in local | remote if path.startswith(f"{where}/")}


def small_files(source: str | os.PathLike[str], arguments: Mapping[str, Any]) -> Path:
    """Return a directory as it is; fetch configs and tokenizers of a hub repository and return their directory."""
    if Path(source).exists():
        return Path(source)
    patterns = [_inside(f"*.{suffix}", arguments) for suffix in ("json", "jinja", "model", "txt")]
    return _fetched(str(source), patterns, arguments)


def _inside(name: str, arguments: Mapping[str, Any]) -> str:
    subfolder = str(arguments.get("subfolder") or "").strip("/")
    return f"{subfolder}/{name}" if subfolder else name


def _fetched(source: str, pattern: str | list[str], arguments: Mapping[str, Any]) -> Path:
    options = {key: value for key, value in arguments.items() if key != "subfolder"}
    return Path(snapshot_download(source, allow_patterns=pattern, **options))


class UploadsFolders:
    """Extends transformers' PushToHubMixin: the files in :meth:`_folders` are uploaded in the same commit.

    transformers itself uploads changed files of the top folder, and of other folders only the files directly in them.
    """

    def _folders(self) -> list[str]:
        """Return the folders below the saved directory that belong to the object, with ``/`` between their parts."""
        raise NotImplementedError

    def _upload_modified_files(
        self,
        working_dir: str | os.PathLike[str],
        repo_id: str,
        files_timestamps: Mapping[str, float],
        commit_message: str | None = None,
        token: bool | str | None = None,
        create_pr: bool = False,
        revision: str | None = None,
        commit_description: str | None = None,
    ) -> Any:
        root = Path(working_dir)
        files = [
            path
            for path in sorted(root.iterdir())
            if path.is_file() and path.stat().st_mtime > files_timestamps.get(path.name, -1)
        ]
        files += [path for name in self._folders() for path in sorted((root / name).rglob("*")) if path.is_file()]
        client = getattr(_hub, "hf_api", HfApi)()  # newer versions of transformers have a client of their own
        if revision is not None and not revision.startswith("refs/pr"):
            client.create_branch(repo_id=repo_id, branch=revision, token=token, exist_ok=True)
        return client.create_commit(
            repo_id=repo_id,
            operations=[CommitOperationAdd(path.relative_to(root).as_posix(), path) for path in files],
            commit_message=commit_message or "Upload model",
            commit_description=commit_description,
            token=token,
            create_pr=create_pr,
            revision=revision,
        )
