"""Uploads a result to the Hugging Face hub, in one commit.

Large files are sent before it, one by one. The hub keeps those that are complete, so that another try sends only the
rest.
"""

import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Optional

from litgpt.checkpoint.download import (
    ADAPTER as ADAPTER_WEIGHTS,
)
from litgpt.checkpoint.download import (
    SHARD,
    RemoteFile,
    Repository,
    in_words,
    quiet_library,
    say,
    status_of,
)
from litgpt.checkpoint.folder import Checkpoint
from litgpt.checkpoint.hub import offline
from litgpt.checkpoint.model_card import ADAPTER, CARD, LEGAL, usage
from litgpt.errors import BUGS, UserError
from litgpt.generate.reference_outputs import FILE as REFERENCE
from litgpt.litgpt_format.folder import has_hf_weights
from litgpt.methods.adapter_folder import open_adapter
from litgpt.storage.files import is_there, read_json
from litgpt.storage.http import SILENCE, checked_token
from litgpt.storage.outputs import SINGLE, SUMS, files_below
from litgpt.text.prompts import MORE_TEMPLATES, STYLE_FILE
from litgpt.text.tokenizer import FILES as TOKENIZER_FILES

GROUPS = {  # what is uploaded
    "weights": rf"{SHARD.pattern}|{'|'.join(map(re.escape, ADAPTER_WEIGHTS))}",
    "settings": "|".join(map(re.escape, ("config.json", ADAPTER, REFERENCE))),
    "tokenizer": "|".join([*map(re.escape, (*TOKENIZER_FILES, STYLE_FILE)), rf"{MORE_TEMPLATES}/[\w-]+\.jinja"]),
    "card": rf"{re.escape(CARD)}|(?i:{LEGAL.pattern})",
}
OWN = (SUMS, SINGLE)  # records that are of use on this machine alone
SMALL = 10**6  # bytes of a file that goes with the commit
WIDTH = 80  # of a screen
AGAIN = "Run the same command again to continue: files that are there already are not sent again."


@dataclass
class Upload:
    """A folder to upload to a repository of models. Raises `UserError` if one of them is not suitable, or there is no
    access token."""

    folder: Path
    repo_id: str
    private: bool = False
    access_token: Optional[str] = None
    files: dict[str, Path] = field(init=False)  # by their names in the repository
    groups: dict[str, list[str]] = field(init=False)  # the same names
    left: list[str] = field(init=False)  # what is in the folder and not uploaded

    def __post_init__(self) -> None:
        from huggingface_hub import HfApi, get_token

        check_name(self.repo_id)
        self.groups, self.left = find_files(self.folder)
        self.files = {name: self.folder / name for names in self.groups.values() for name in names}
        self.endpoint = Repository(self.repo_id, None).endpoint
        self.page = f"{self.endpoint}/{self.repo_id}"
        self.tokens = f"{self.endpoint}/settings/tokens"
        if offline():
            raise UserError("Cannot upload because HF_HUB_OFFLINE is set. Unset it.")
        given = checked_token(self.access_token or os.environ.get("HF_TOKEN") or "")
        self.token = given or get_token() or ""
        if not self.token:
            raise UserError(
                f"There is no access token. Create one with write access at {self.tokens}, and pass it with "
                "--access_token or in HF_TOKEN."
            )
        self.api = HfApi(endpoint=self.endpoint, token=self.token)

    def __call__(self) -> None:
        """Say what will be uploaded, and to where, then upload it."""
        quiet_library()
        if sys.stderr.isatty():
            from huggingface_hub.utils import enable_progress_bars

            enable_progress_bars()
        try:
            remote = self.find_repository()
            self.describe(remote)
            if remote is None:
                self.api.create_repo(self.repo_id, private=self.private, exist_ok=True)
            self.send(remote or {})
        except KeyboardInterrupt:
            say(f"Stopped. {AGAIN}")
            raise
        except UserError:
            raise
        except Exception as e:
            self.explain(e)
        print(f"uploaded   {self.page}")

    def find_repository(self) -> Optional[dict[str, RemoteFile]]:
        """The files in the repository by their names; None if it does not exist."""
        try:
            info = self.api.model_info(self.repo_id, files_metadata=True, timeout=SILENCE)
        except Exception as e:
            if status_of(e) != 404:
                raise
            return None
        if self.private and not info.private:
            raise UserError(f"{self.page} is public. Make it private in its settings, or omit --private.")
        self.private = bool(info.private)
        files = info.siblings or []
        return {
            f.rfilename: RemoteFile(f.rfilename, f.size or 0, f.lfs.sha256 if f.lfs else None, f.blob_id) for f in files
        }

    def describe(self, remote: Optional[dict[str, RemoteFile]]) -> None:
        """Print what will be uploaded."""
        state = "new, " if remote is None else ""
        print(f"folder     {self.folder}")
        print(f"upload to  {self.page} ({state}{'private' if self.private else 'public'})")
        if ADAPTER in self.files and (base := read_json(self.files[ADAPTER]).get("base_model_name_or_path")):
            print(f"base       {base}")
            if Path(base).is_absolute():
                print("note       The base is a path on this machine. Others must load the base themselves.")
        for group, names in self.groups.items():
            print(first_of(names, f"{group:10} {self.size_of(names)}: "))
        print(f"total      {self.size_of(list(self.files))}")
        if self.left:
            print(first_of(self.left, "not sent   "))
        if CARD not in self.files:
            print(f"note       There is no {CARD}, so the page of the model will be empty.")

    def size_of(self, names: list[str]) -> str:
        size = sum(self.files[name].stat().st_size for name in names)
        return f"{len(names)} file{'s' * (len(names) != 1)}, {in_words(size)}"

    def send(self, remote: dict[str, RemoteFile]) -> None:
        """Send the large files that are not in the repository, then commit. Weights of another model that are there and
        that programs would load instead are removed."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        operations: list[Any] = []
        for name, path in self.files.items():
            if name in remote and name != CARD and remote[name].is_complete(path):
                say(f"{name} is there already.")
                continue
            operation = CommitOperationAdd(name, self.card() if name == CARD else path)
            if path.stat().st_size > SMALL:
                say(f"Sending {name} ({in_words(path.stat().st_size)})")
                self.api.preupload_lfs_files(self.repo_id, [operation], free_memory=False)
            operations.append(operation)
        for name in remote:
            if re.fullmatch(GROUPS["weights"], name) and name not in self.files:
                say(f"Removing {name}, which belongs to another model, from the repository.")
                operations.append(CommitOperationDelete(name))
        if operations:
            self.api.create_commit(self.repo_id, operations, commit_message="Upload by litgpt")

    def card(self) -> bytes:
        """The card, with the name of the repository in the place of the folder."""
        here, there = (usage(self.folder, name).encode() for name in (".", self.repo_id))
        return self.files[CARD].read_bytes().replace(here, there)

    def explain(self, error: BaseException) -> NoReturn:
        """Raise a `UserError` that says in one line what an error of the library means."""
        while status_of(error) is None and error.__cause__ is not None:
            error = error.__cause__
        status = status_of(error)
        reason = " ".join(str(getattr(error, "server_message", None) or error).split()) or type(error).__name__
        reason = reason.replace(self.token, "***")[:200].rstrip(".")
        if status == 401:
            message = f"{self.endpoint} rejects the access token. Create one with write access at {self.tokens}."
        elif status == 403:
            message = (
                f"The access token may not write to {self.repo_id}. Create one with write access to "
                f"{self.repo_id.partition('/')[0]} at {self.tokens}."
            )
        elif status == 429:
            message = f"{self.endpoint} refuses the upload because of too many requests. Wait a few minutes. {AGAIN}"
        elif status is not None and status < 500:
            message = f"{self.endpoint} refuses the upload (error {status}): {reason}."
        elif status is not None:
            message = f"{self.endpoint} returned error {status}. {AGAIN}"
        elif isinstance(error, BUGS):
            raise error
        else:
            message = f"Cannot upload to {self.endpoint}: {reason}. Check the network. {AGAIN}"
        raise UserError(message) from error


def check_name(repo_id: str) -> None:
    """Raise `UserError` unless this can be the name of a repository."""
    part = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?"
    is_name = re.fullmatch(f"{part}/{part}", repo_id, re.ASCII)
    if not is_name or len(repo_id) > 96 or re.search(r"--|\.\.|\.git$", repo_id):
        raise UserError(
            f"{repo_id!r} is not the name of a repository. Expected ORG/NAME, such as me/my-model, of letters, digits, "
            "and single '-', '_', or '.'."
        )


def find_files(folder: Path) -> tuple[dict[str, list[str]], list[str]]:
    """The names of the files of a result, by their group in `GROUPS`, and the names of all others. Raises `UserError`
    if the folder is neither a model nor an adapter, or is damaged."""
    is_adapter = is_there(folder / ADAPTER)
    if not is_adapter and not has_hf_weights(folder) and any(folder.glob("lit_model.pth*")):
        raise UserError(
            f"{folder} has the files of LitGPT, which other programs do not read. Run litgpt export {folder} --to hf, "
            "and upload the folder that it writes."
        )
    if is_adapter:
        weights = [open_adapter(folder).file.name]
    else:
        weights = [path.name for path in Checkpoint(folder).shards()]
        kind = "model.safetensors" if weights[0].endswith(".safetensors") else "pytorch_model.bin"
        weights += [f"{kind}.index.json"] * (kind not in weights)
    groups: dict[str, list[str]] = {group: [] for group in GROUPS} | {"weights": weights}
    left: dict[str, None] = {}
    for path in sorted(files_below(folder)):
        name = path.relative_to(folder).as_posix()
        group = next((g for g, pattern in GROUPS.items() if re.fullmatch(pattern, name)), None)
        if path.is_file() and group is not None and group != "weights":
            groups[group].append(name)
        elif name not in (*weights, *OWN):
            top, inside, _ = name.partition("/")
            left[f"{top}/" if inside else name] = None
    return {group: names for group, names in groups.items() if names}, list(left)


def first_of(names: list[str], begin: str) -> str:
    """A line with as many names as fit on a screen, and how many more there are."""
    n = len(names)
    while True:
        more = f" and {len(names) - n} more" if n < len(names) else ""
        line = f"{begin}{', '.join(names[:n])}{more}"
        if n <= 1 or len(line) <= WIDTH:
            return line
        n -= 1
