"""Sealed files: how stages talk.

An artifact carries what it is, the config it came from, the hash of the artifact it was made of, and the facts measured when it was
made. A checkpoint holds its seal inside; any other file has it beside, as `<file>.seal.json`. Files are written whole or not at all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import platform
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["infos", "training", "teacher", "student", "packed", "onnx", "engine", "predictions", "metrics"]
_PACKAGES = ("torch", "numpy", "onnx", "onnxruntime", "pytorch-quantization", "tensorrt-rtx", "tensorrt", "nuscenes-devkit")


class ArtifactError(ValueError):
    """A file that is missing, damaged, of another kind, or made from something else."""


@dataclass(frozen=True, kw_only=True)
class Seal:
    """What an artifact says about itself. `config` is `config.to_dict` output; `parent` is the parent's sha256."""

    kind: Kind
    config: dict[str, Any]
    parent: str | None
    facts: dict[str, Any]
    made: dict[str, str]
    sha256: str = ""
    """Of the sealed file; filled in when it is read back."""


def seal(path: Path, *, kind: Kind, config: dict[str, Any], parent: Seal | None, facts: dict[str, Any]) -> Seal:
    """Write the seal of the finished file `path` beside it."""
    seal_ = Seal(kind=kind, config=config, parent=parent.sha256 if parent else None, facts=facts, made=provenance(), sha256=sha256(path))
    with atomic(seal_path(path)) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(seal_), indent=1))
    return seal_


def unseal(path: Path, kind: Kind) -> Seal:
    """Seal of `path`, after checking that file and seal belong together.

    Raises:
        ArtifactError: The file or its seal is missing or damaged, or it is of another kind.
    """
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist; it should be {_a(kind)} file")
    if not seal_path(path).is_file():
        raise ArtifactError(f"{path} has no seal ({seal_path(path).name}); make it again with this project, or bring the seal along")
    try:
        found = Seal(**json.loads(seal_path(path).read_text()))
    except (json.JSONDecodeError, TypeError) as error:
        raise ArtifactError(f"{seal_path(path)} is damaged ({error}); make {path.name} again") from error
    _expect_kind(path, found.kind, (kind,))
    actual = sha256(path)
    if actual != found.sha256:
        raise ArtifactError(f"{path} is not the file that was sealed: sha256 {actual[:12]}, seal says {found.sha256[:12]}; make it again")
    return found


def expect_parent(child: Path, child_seal: Seal, parent: Path, parent_seal: Seal) -> None:
    """Raise ArtifactError unless `child` was made from exactly `parent`."""
    if child_seal.parent != parent_seal.sha256:
        made_from = (child_seal.parent or "nothing")[:12]
        raise ArtifactError(
            f"{child} was made from {made_from}, not from {parent} ({parent_seal.sha256[:12]}); build it again from this file"
        )


def save_checkpoint(
    path: Path,
    *,
    kind: Kind,
    config: dict[str, Any],
    weights: dict[str, Tensor],
    parent: Seal | None,
    facts: dict[str, Any],
    state: Any = None,
) -> None:
    """Write weights and their seal as one file. `state` is what `--resume` needs besides."""
    import torch  # not above: a session in a vehicle reads seals without it

    seal_ = Seal(kind=kind, config=config, parent=parent.sha256 if parent else None, facts=facts, made=provenance())
    with atomic(path) as temporary:
        torch.save({"seal": dataclasses.asdict(seal_), "weights": weights, "state": state}, temporary)


def load_checkpoint(path: Path, *kinds: Kind) -> tuple[Seal, dict[str, Tensor], Any]:
    """Seal, weights and training state of a checkpoint of one of `kinds`.

    Raises:
        ArtifactError: The file is missing, damaged, not one of ours, or of another kind.
    """
    import torch

    if not path.is_file():
        raise ArtifactError(f"{path} does not exist; it should be a {' or '.join(kinds)} checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError, OSError) as error:
        raise ArtifactError(f"{path} is damaged or no checkpoint ({str(error).splitlines()[0][:120]}); copy or train it again") from error
    if not isinstance(content, dict) or "seal" not in content:
        raise ArtifactError(f"{path} is no checkpoint of this project; python -m train.official makes one of a published checkpoint")
    found = Seal(**{**content["seal"], "sha256": sha256(path)})
    _expect_kind(path, found.kind, kinds)
    return found, content["weights"], content["state"]


def _expect_kind(path: Path, found: str, wanted: tuple[str, ...]) -> None:
    if found not in wanted:
        raise ArtifactError(f"{path} is {_a(found)} file, {_a(' or '.join(wanted))} is needed here")


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def seal_path(path: Path) -> Path:
    """Where the seal of `path` lies."""
    return path.with_name(path.name + ".seal.json")


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder that becomes `path` when the block succeeds and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def provenance() -> dict[str, str]:
    """When, with which versions and from which commit something is made."""
    facts = {"utc": datetime.now(UTC).isoformat(timespec="seconds"), "python": platform.python_version(), "commit": commit()}
    for package in _PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return facts


def commit() -> str:
    """Commit of the source tree, with '+' when it has changes, or 'unknown' outside a repository."""
    root = Path(__file__).resolve().parent.parent
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")
