"""Sealed files, with which the stages pass on their results.

The seal is part of a checkpoint; any other file has it beside, as `<file>.seal.json`. Files are written whole or not at all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from qdbev.config_migrations import MIGRATIONS as CONFIG_MIGRATIONS
from qdbev.facts import Facts, Kind
from qdbev.seal_migrations import MIGRATIONS
from qdbev.settings import ConfigError, build, check_format, migrate, require

if TYPE_CHECKING:
    from torch import Tensor

_PACKAGES = ("torch", "numpy", "onnx", "onnxruntime", "pytorch-quantization", "tensorrt-rtx", "tensorrt", "openvino", "nuscenes-devkit")
_FACTS: dict[str, type] = {kind.kind: kind for kind in get_args(Facts)}


class ArtifactError(ValueError):
    """A file that is missing, damaged, of another kind, or made from something else."""


@dataclass(frozen=True, kw_only=True)
class Seal:
    """Kind, config, origin and facts of an artifact."""

    kind: Kind
    config: dict[str, Any]
    """Output of `config.to_dict`."""
    parent: str | None
    """sha256 of the artifact that this one was made from."""
    facts: Facts
    provenance: dict[str, str]
    """When, where and with which versions it was made."""
    sha256: str = ""
    """Hash of the sealed file; filled in when the seal is read back."""


def seal(path: Path, *, config: dict[str, Any], parent: Seal | None, facts: Facts) -> Seal:
    """Write the seal of the finished file `path` beside it; the class of `facts` decides its kind."""
    seal_ = dataclasses.replace(_new_seal(config, parent, facts), sha256=sha256(path))
    with atomic(seal_path(path)) as temporary:
        temporary.write_text(json.dumps(_to_dict(seal_), indent=1))
    return seal_


def unseal(path: Path, kind: Kind) -> Seal:
    """Seal of `path`. Raises ArtifactError if file or seal is missing, damaged or of another kind, or they do not belong together."""
    if not path.is_file():
        raise ArtifactError(f"{path} {_absence(path)}; it should be {_a(kind)} file")
    if not seal_path(path).is_file():
        raise ArtifactError(f"{path} has no seal ({seal_path(path).name}); make it again with this project, or bring the seal along")
    try:
        found = _from_dict(json.loads(seal_path(path).read_text()))
    except (ValueError, RecursionError) as error:  # ConfigError, and what JSON raises for wrong, too long or too deep text
        raise ArtifactError(f"{seal_path(path)} cannot be read: {error}. If the file is damaged, make {path.name} again") from error
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
    path: Path, *, config: dict[str, Any], weights: dict[str, Tensor], parent: Seal | None, facts: Facts, state: Any = None
) -> None:
    """Write weights and their seal as one file; the class of `facts` decides its kind. `state` is additional data for `--resume`."""
    import torch  # here, because a session in a vehicle reads seals without torch

    with atomic(path) as temporary:
        torch.save({"seal": _to_dict(_new_seal(config, parent, facts)), "weights": weights, "state": state}, temporary)


def load_checkpoint(path: Path, *kinds: Kind) -> tuple[Seal, dict[str, Tensor], Any]:
    """Seal, weights and training state. Raises ArtifactError if the file is missing, damaged, not ours, or of none of `kinds`."""
    import torch

    if not path.is_file():
        raise ArtifactError(f"{path} {_absence(path)}; it should be a {' or '.join(kinds)} checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        damaged = zipfile.ZipFile(path).testzip() if zipfile.is_zipfile(path) else None  # torch does not compare the CRC of tensors
    except Exception as error:  # torch and zipfile raise many types, which differ with the damaged place
        reason = f"{type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0][:120]}"
        raise ArtifactError(f"{path} is damaged or no checkpoint ({reason}); copy or train it again") from error
    if damaged is not None:
        raise ArtifactError(f"{path} is damaged: the content of {damaged} does not fit its checksum; copy or train it again")
    if not isinstance(content, dict) or "seal" not in content:
        raise ArtifactError(f"{path} is no checkpoint of this project; python -m train.official makes one of a published checkpoint")
    try:
        found = dataclasses.replace(_from_dict(content["seal"]), sha256=sha256(path))
    except ConfigError as error:
        raise ArtifactError(f"the seal of {path} cannot be read: {error}") from error
    _expect_kind(path, found.kind, kinds)
    weights = content.get("weights")
    if not isinstance(weights, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in weights.items()):
        raise ArtifactError(f"{path} has a seal, but its weights are missing or are no tensors with names; copy or train it again")
    return found, weights, content.get("state")


def _new_seal(config: dict[str, Any], parent: Seal | None, facts: Facts) -> Seal:
    return Seal(kind=facts.kind, config=config, parent=parent.sha256 if parent else None, facts=facts, provenance=provenance())


def _to_dict(seal_: Seal) -> dict[str, Any]:
    return {"format": len(MIGRATIONS) + 1, **dataclasses.asdict(seal_)}


def _from_dict(values: Any) -> Seal:
    """A seal from the values that `_to_dict` returned in this or an earlier version; raises ConfigError if they are no such seal."""
    values = migrate(values, MIGRATIONS, "seal")
    known = {field.name for field in dataclasses.fields(Seal)}
    require(values.keys() == known, f"its fields are {', '.join(sorted(values))}; a seal has {', '.join(sorted(known))}")
    kind = values["kind"]
    require(isinstance(kind, str) and kind in _FACTS, f"its kind is {kind!r}, must be one of {', '.join(_FACTS)}")
    check_format(values["config"], CONFIG_MIGRATIONS, "config")
    return build(Seal, {**values, "facts": build(_FACTS[kind], values["facts"], "facts.")})


def _expect_kind(path: Path, found: str, wanted: tuple[str, ...]) -> None:
    if found not in wanted:
        raise ArtifactError(f"{path} is {_a(found)} file, {_a(' or '.join(wanted))} is needed here")


def _absence(path: Path) -> str:
    return "is a folder" if path.is_dir() else "does not exist"


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def seal_path(path: Path) -> Path:
    """Path of the seal of `path`."""
    return path.with_name(path.name + ".seal.json")


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_target(path: Path | None, *sources: Path | None) -> None:
    """Raise ArtifactError, before any work is done, if the result of `sources` cannot be written to `path`; None is no file."""
    if path is None:
        return
    if path.is_dir():
        raise ArtifactError(f"{path} is a folder; give the path of a file to write")
    read = [file.resolve() for source in sources if source is not None for file in (source, seal_path(source))]
    if path.resolve() in read:
        raise ArtifactError(f"{path} is read and cannot also be the file to write; give another path")
    _require_writable(path)


def require_folder(path: Path) -> None:
    """Raise ArtifactError, before any work is done, if files cannot be written into the folder `path`."""
    if path.exists() and not path.is_dir():
        raise ArtifactError(f"{path} is a file; give the path of a folder")
    _require_writable(path / "file")


def _require_writable(path: Path) -> None:
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        reason = "is not writable" if nearest.is_dir() else "is no folder"
        raise ArtifactError(f"{path} cannot be written: {nearest} {reason}; give a path in another folder")


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
        with suppress(metadata.PackageNotFoundError):
            facts[package] = metadata.version(package)
    return facts


def commit() -> str:
    """Commit of the source tree, with '+' when it has changes, or 'unknown' outside a repository."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = subprocess.check_output([*git, "rev-parse", "--short=12", "HEAD"], text=True, stderr=subprocess.DEVNULL).strip()
        changed = subprocess.check_output([*git, "status", "--porcelain", "-uno"], stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")
