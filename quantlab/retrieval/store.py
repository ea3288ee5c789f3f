"""Where an index lies: one LanceDB table of chunks, their vectors and their words, in a folder or at a LanceDB URI.

A commit of the table is all or nothing, and takes a document's old chunks away with its new ones; so whatever kills the
process, a document is in the index as it was or as it is. What decides how chunks are made lies in the metadata of the
table's schema.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from quantlab.errors import InputError, missing_extra, one_line

TABLE = "chunks"
METADATA = b"quantlab.retrieval"
FORMAT = 1
COMPLETE = "complete"  # the tag of the version that the last finished run left
KEPT = datetime.timedelta(hours=1)  # old versions stay as long, for searches that have begun
SOURCES_A_STATEMENT = 500
_RUST_LINE = re.compile(r",? /\S+\.rs:\d+:\d+")  # where LanceDB's own code noticed it
SHOWN = ("source", "position", "place", "text")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Settings:
    """What an index was made with. `probe` is the model's vector of `embedding.PROBE`, which tells its weights."""

    embedding_model: str
    dimension: int
    chunk_tokens: int
    overlap: int
    probe: tuple[float, ...]


@dataclass(frozen=True)
class Row:
    """A chunk as it is stored. `document` is the hash of its document's content."""

    source: str
    document: str
    position: int
    place: str
    text: str
    vector: np.ndarray


@dataclass(frozen=True)
class Hit:
    """A chunk that a search found; `score` is a cosine or a BM25 score."""

    source: str
    position: int
    place: str
    text: str
    score: float


class Store:
    """An open index.

    Attributes:
        uri: where it lies.
        settings: what it was made with.
    """

    def __init__(self, uri: str, table: Any) -> None:  # Any: LanceDB has no types here
        self.uri, self._table = uri, table
        self.settings = _settings(uri, table)

    def documents(self) -> dict[str, str]:
        """The hash of every document's content, by its source."""
        rows = self._call(lambda: self._table.search().select(["source", "document"]).limit(None).to_arrow())
        return dict(zip(rows["source"].to_pylist(), rows["document"].to_pylist(), strict=True))

    def chunks(self) -> int:
        """How many there are."""
        return int(self._call(self._table.count_rows))

    def replace(self, sources: Sequence[str], rows: Sequence[Row]) -> None:
        """In one commit: these are all chunks of these documents."""
        import pyarrow as pa

        vectors = np.stack([row.vector for row in rows]).astype(np.float32)
        values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        columns = {name: [getattr(row, name) for row in rows] for name in ("source", "document", "place", "text")}
        data = pa.table(
            {
                "id": [f"{row.position}:{row.source}" for row in rows],
                "position": pa.array([row.position for row in rows], pa.int32()),
                "vector": values,
                **columns,
            }
        ).select(_schema(self.settings).names)
        merge = self._table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
        self._call(lambda: merge.when_not_matched_by_source_delete(_among(sources)).execute(data))

    def delete(self, sources: Sequence[str]) -> None:
        """Take documents away."""
        for start in range(0, len(sources), SOURCES_A_STATEMENT):
            self._call(partial(self._table.delete, _among(sources[start : start + SOURCES_A_STATEMENT])))

    def finish(self) -> None:
        """Bring the keywords up to date, join what many commits left, and note that nothing is missing."""
        self._call(partial(_index_words, self._table))  # a process may have been killed between table and index
        self._tag()
        self._call(lambda: self._table.optimize(cleanup_older_than=KEPT))
        self._tag()

    @property
    def complete(self) -> bool:
        """Whether the last run that changed the index has finished."""
        version = self._call(lambda: self._table.tags.list().get(COMPLETE, {}).get("version"))
        return version == self._call(lambda: self._table.version)

    def nearest(self, vector: np.ndarray, count: int) -> list[Hit]:
        """The chunks of the largest cosines, by a look at all of them; equal ones by source and position."""
        search = self._table.search(vector.astype(np.float32), vector_column_name="vector").distance_type("cosine")
        rows = self._call(lambda: search.select([*SHOWN, "_distance"]).limit(count).to_list())
        return _sorted(_hit(row, 1 - row["_distance"]) for row in rows)

    def matching(self, text: str, count: int) -> list[Hit]:
        """The chunks of the largest BM25 scores for the words of `text`; equal ones by source and position."""
        from lancedb.query import MatchQuery  # its words alone: quotes and signs are no operators

        search = self._table.search(MatchQuery(text, "text"), query_type="fts")
        rows = self._call(lambda: search.select([*SHOWN, "_score"]).limit(count).to_list())
        return _sorted(_hit(row, row["_score"]) for row in rows)

    def _tag(self) -> None:
        tags, version = self._table.tags, self._table.version
        self._call(lambda: (tags.update if COMPLETE in tags.list() else tags.create)(COMPLETE, version))

    def _call(self, action: Callable[[], Result]) -> Result:
        return _told(self.uri, action)


def is_remote(uri: str) -> bool:
    """Whether LanceDB finds it elsewhere than in a folder of this machine's."""
    return "://" in uri


def open_store(uri: str) -> Store | None:
    """The index there; None if there is none.

    Raises:
        InputError: it cannot be read, is damaged, or is of a version that this one does not know.
    """
    if not is_remote(uri) and not Path(uri).expanduser().is_dir():
        return None
    database = _database(uri)
    if TABLE not in _tables(uri, database):
        return None
    return Store(uri, _told(uri, lambda: database.open_table(TABLE)))


def create_store(uri: str, settings: Settings) -> Store:
    """An empty index, in the place of one that is there.

    Raises:
        InputError: it cannot be written.
    """
    database = _database(uri)
    schema = _schema(settings)
    if TABLE in _tables(uri, database):
        try:
            table = _told(uri, lambda: database.create_table(TABLE, schema=schema, mode="overwrite"))
        except InputError:  # it is damaged: nothing of it can be kept until the new one is there
            _told(uri, lambda: database.drop_table(TABLE))
            table = _told(uri, lambda: database.create_table(TABLE, schema=schema))
    else:
        table = _told(uri, lambda: database.create_table(TABLE, schema=schema))
    _told(uri, lambda: _index_words(table))
    return Store(uri, table)


def _index_words(table: Any) -> None:
    """Have an index of words, without which a search by them reads every chunk."""
    from lancedb.index import FTS

    if not table.list_indices():
        table.create_index("text", config=FTS())


def _database(uri: str) -> Any:
    try:
        import lancedb
    except ImportError as error:
        raise missing_extra(error.name or "lancedb", "retrieval") from None
    place = uri if is_remote(uri) else str(Path(uri).expanduser())
    return _told(uri, lambda: lancedb.connect(place, read_consistency_interval=datetime.timedelta(0)))


def _tables(uri: str, database: Any) -> list[str]:
    names: list[str] = _told(uri, lambda: database.list_tables().tables)
    return names


def _told(uri: str, action: Callable[[], Result]) -> Result:
    """What LanceDB cannot do, in one line: its errors are of many classes, and come from a file system or a network."""
    try:
        return action()
    except (ImportError, InputError):
        raise
    except Exception as error:
        reason = one_line(_RUST_LINE.sub("", str(error).split("\n")[0]), 300) or type(error).__name__
        raise InputError(
            f"{uri}: the index cannot be used: {reason}; if it is damaged, make it anew (--rebuild)"
        ) from None


def _schema(settings: Settings) -> Any:
    import pyarrow as pa

    text = pa.string()
    fields = [("id", text), ("source", text), ("document", text), ("position", pa.int32()), ("place", text)]
    vector = ("vector", pa.list_(pa.float32(), settings.dimension))
    metadata = {METADATA: json.dumps({"format": FORMAT, **asdict(settings)}).encode()}
    return pa.schema([*fields, ("text", text), vector], metadata=metadata)


def _settings(uri: str, table: Any) -> Settings:
    metadata = (_told(uri, lambda: table.schema.metadata) or {}).get(METADATA)
    if metadata is None:
        raise InputError(f"{uri}: its table {TABLE} was not made by quantlab; choose another place")
    values = json.loads(metadata)
    if (found := values.pop("format", None)) != FORMAT:
        raise InputError(f"{uri}: is an index of format {found}; this version reads {FORMAT}; make it anew (--rebuild)")
    return Settings(**{**values, "probe": tuple(values["probe"])})


def _among(sources: Iterable[str]) -> str:
    return "source IN (" + ", ".join("'" + source.replace("'", "''") + "'" for source in sources) + ")"


def _hit(row: dict[str, Any], score: float) -> Hit:
    return Hit(row["source"], row["position"], row["place"], row["text"], score)


def _sorted(hits: Iterable[Hit]) -> list[Hit]:
    return sorted(hits, key=lambda hit: (-hit.score, hit.source, hit.position))
