"""A run's records as Parquet, one file a kind, for other tools: `pandas.read_parquet(DIR / "layer.parquet")`.

Columns are a record's fields under their own names and types, and `line`, its place among all records, so that reading
back gives the same records in the same order. A field that is a mapping is JSON text. Samples are a kind of their own.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from evalkit.errors import InputError
from evalkit.records import Record, RunDirectory, read_samples
from evalkit.schema import HINTS, KINDS, SCHEMA

LINE = "line"
VERSION = b"evalkit.schema"


def export(run: Path, out: Path) -> list[Path]:
    """Write each kind's records to `out/<kind>.parquet`; returns the files.

    Raises:
        InputError: there is no such run, or `out` holds something already.
    """
    records = [*RunDirectory(run).read(), *read_samples(run)]
    if not records:
        raise InputError(f"{run} has recorded nothing: it stopped at its start; run it again")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise InputError(f"{out} is not empty, and kinds of another run would stay: name a new directory")
    except OSError as error:
        raise InputError(f"no records can be written to {out}: {error.strerror}") from None
    from pyarrow import parquet

    written = []
    for kind, found in _by_kind(records).items():
        path = out / f"{kind}.parquet"
        parquet.write_table(_table(kind, found), path)
        written.append(path)
    return written


def read(folder: Path) -> list[Record]:
    """The records of an export, in the run's order; samples last.

    Raises:
        InputError: it is none, or of a schema that this version does not read.
    """
    from pyarrow import parquet

    found: list[tuple[int, Record]] = []
    for path in sorted(folder.glob("*.parquet")):
        table = parquet.read_table(path)
        schema = (table.schema.metadata or {}).get(VERSION, b"none").decode()
        if schema != str(SCHEMA) or path.stem not in KINDS:
            raise InputError(f"{path} is of schema {schema}; this version of evalkit reads schema {SCHEMA}")
        hints = HINTS[path.stem]
        for row in table.to_pylist():
            place = row.pop(LINE)
            values = {
                name: json.loads(value) if _is_mapping(hints[name]) else value for name, value in row.items()
            }
            found.append((place, KINDS[path.stem](**values)))
    if not found:
        raise InputError(f"no export at {folder}: `evalkit export RUN --out {folder}` makes one")
    return [record for _, record in sorted(found, key=lambda pair: pair[0])]


def _by_kind(records: Sequence[Record]) -> dict[str, list[tuple[int, Record]]]:
    found: dict[str, list[tuple[int, Record]]] = defaultdict(list)
    for place, record in enumerate(records):
        found[record.kind].append((place, record))
    return found


def _table(kind: str, found: Sequence[tuple[int, Record]]) -> Any:
    import pyarrow as pa

    columns: dict[str, Any] = {LINE: pa.array([place for place, _ in found], pa.int64())}
    for name, hint in HINTS[kind].items():
        values = [getattr(record, name) for _, record in found]
        if _is_mapping(hint):
            values = [json.dumps(value) for value in values]
        columns[name] = pa.array(values, _type(pa, hint))
    return pa.table(columns).replace_schema_metadata({VERSION: str(SCHEMA)})


def _is_mapping(hint: Any) -> bool:
    return get_origin(hint) is dict


def _type(pa: Any, hint: Any) -> Any:
    """The column of a field; every column may hold nulls."""
    if isinstance(hint, UnionType):
        (hint,) = (option for option in get_args(hint) if option is not NoneType)
    if get_origin(hint) is list:
        return pa.list_(_type(pa, get_args(hint)[0]))
    plain = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    return pa.string() if _is_mapping(hint) else plain[hint]
