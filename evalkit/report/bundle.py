"""A run as one file to sign off: report, records, samples, policy and environment, with the SHA-256 of each.

The same run gives the same bytes: names are sorted, times are fixed, and nothing is compressed, so that no version of a
compressor matters. Who signs, signs the hash of the whole file, which `write` returns: within it, the manifest says
which file was changed, but whoever changes a file can change the manifest too.
"""

import hashlib
import json
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path, PurePosixPath

from evalkit.errors import InputError
from evalkit.files import replacing
from evalkit.records import EnvironmentRecord, PolicyRecord, RunDirectory, only
from evalkit.report import html, markdown

MANIFEST = "MANIFEST.sha256"
FILES = ("run.json", "records.jsonl", "report.html", "summary.md")
EPOCH = (1980, 1, 1, 0, 0, 0)


def write(run: Path, file: Path) -> str:
    """Bundle a run, its report written again; returns the SHA-256 of the bundle.

    Raises:
        InputError: there is no such run, it has recorded nothing, or `file` cannot be written.
    """
    directory = RunDirectory(run)
    records = directory.read()
    environments = only(records, EnvironmentRecord)
    if not environments:
        raise InputError(f"{run} has recorded nothing: it stopped at its start; run it again")
    html.write(run)
    markdown.write(run)
    paths = [run / name for name in FILES] + sorted((run / "samples").glob("*.jsonl"))
    contents = {path.relative_to(run).as_posix(): path.read_bytes() for path in paths}
    contents["environment.json"] = _json(asdict(environments[0]))
    for policy in only(records, PolicyRecord)[:1]:
        try:
            contents["policy.json"] = _json(json.loads(policy.text))
        except (ValueError, RecursionError) as error:
            where = f"{run / 'records.jsonl'}, line {records.index(policy) + 1}"
            raise InputError(f"{where}: the text of policy {policy.name!r} is not JSON: {error}") from None
    folder = directory.path.resolve().name
    contents = {f"{folder}/{name}": contents[name] for name in sorted(contents)}
    contents[MANIFEST] = "".join(f"{_sha256(data)}  {name}\n" for name, data in contents.items()).encode()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as bundle:
            for name, data in contents.items():
                entry = zipfile.ZipInfo(name, EPOCH)
                entry.create_system, entry.external_attr = 3, 0o100644 << 16
                bundle.writestr(entry, data)
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror}") from None
    return sha256(file)


def sha256(file: Path) -> str:
    """SHA-256 of a file, as `sha256sum` prints it."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def verify(file: Path) -> dict[str, bytes]:
    """Every file of a bundle but its manifest, each as its manifest says.

    Raises:
        InputError: it is no bundle; or a file is missing, was added, or was changed: the message names it.
    """
    try:
        with zipfile.ZipFile(file) as bundle:
            names = bundle.namelist()
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise InputError(f"{file}: {twice} is there twice")
            contents = {name: _read(bundle, name, file) for name in names}
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{file} is not a bundle: {error}") from None
    manifest = contents.pop(MANIFEST, None)
    if manifest is None:
        raise InputError(f"{file} is not a bundle: it has no {MANIFEST}")
    listed = {}
    for line in manifest.decode("utf-8", "replace").splitlines():
        digest, _, name = line.partition("  ")
        listed[name] = digest
    for name in sorted(listed.keys() | contents.keys()):
        if name not in contents:
            raise InputError(f"{file}: {name} is missing, which the manifest lists")
        if name not in listed:
            raise InputError(f"{file}: {name} was added: the manifest does not list it")
        if _sha256(contents[name]) != listed[name]:
            raise InputError(f"{file}: {name} was changed: its SHA-256 is not the manifest's")
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name:
            raise InputError(f"{file}: {name!r} lies outside the bundle")
    return contents


@contextmanager
def opened(file: Path) -> Iterator[Path]:
    """The run directory of a verified bundle, for as long as the block lasts; `file` stays as it is.

    Raises:
        InputError: as `verify`, or there is no one run in it.
    """
    contents = verify(file)
    folders = {PurePosixPath(name).parts[0] for name in contents}
    if len(folders) != 1:
        raise InputError(f"{file} holds {len(folders)} runs: a bundle has one")
    with tempfile.TemporaryDirectory(prefix="evalkit-") as place:
        for name, data in contents.items():
            path = Path(place, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        yield Path(place, *folders)


def _read(bundle: zipfile.ZipFile, name: str, file: Path) -> bytes:
    try:
        return bundle.read(name)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError):
        raise InputError(f"{file}: {name} was changed: it does not match its own checksum") from None


def _json(values: object) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
