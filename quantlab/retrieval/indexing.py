"""Documents into an index, and only what changed since the last time."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from quantlab.checkpoint.unfinished import locked
from quantlab.errors import InputError
from quantlab.retrieval.chunks import Chunk, ChunkSize, chunks_of
from quantlab.retrieval.document_files import DocumentFile, Found, Skipped, UnreadableError, find_documents
from quantlab.retrieval.documents import Document, read_bytes, read_document
from quantlab.retrieval.embedding import DEFAULT_MODEL, PROBE, Embedder, load_embedder
from quantlab.retrieval.index import chosen_embedder
from quantlab.retrieval.store import TABLE, Row, Settings, Store, create_store, is_remote, open_store

READING = b"1\n"  # raised when documents are read or cut in another way: then all of them count as changed
CHUNKS_A_COMMIT = 128  # at least, and whole documents: what an interruption can cost

Progress = Callable[[int, int, str], None]  # (bytes done, bytes in all, documents and chunks so far)


@dataclass(frozen=True)
class IndexReport:
    """What an index holds after a run, and what the run did.

    Attributes:
        documents: in the index.
        chunks: in the index.
        seconds: of the run.
        embedded: documents that were new or had changed.
        embedded_chunks: the chunks of these.
        unchanged: documents that were there as they are.
        deleted: documents that are not there any more.
        skipped: files that hold no text, or none that can be read.
        other_files: how many files there are of suffixes that are no documents'.
        embedding_model: a folder or hub id.
        dimension: of its vectors.
        chunk_tokens: the most that a chunk has, in tokens of the embedding model.
        overlap: the most that the next chunk repeats.
        notes: what the user should know.
    """

    documents: int
    chunks: int
    seconds: float
    embedded: int
    embedded_chunks: int
    unchanged: int
    deleted: int
    skipped: tuple[Skipped, ...]
    other_files: Mapping[str, int]
    embedding_model: str
    dimension: int
    chunk_tokens: int
    overlap: int
    notes: tuple[str, ...]


def index_documents(
    docs: str | Path,
    out: str | Path,
    *,
    embedding_model: str | Embedder | None = None,
    chunk_tokens: int | None = None,
    overlap: int | None = None,
    rebuild: bool = False,
    progress: Progress | None = None,
) -> IndexReport:
    """Make the index `out` hold the documents `docs`, as they are now.

    Documents whose content has not changed are not read again; those that are gone disappear. Everything is committed a
    few documents at a time, so an interrupted run leaves an index that can be searched, and the next one goes on.

    Args:
        docs: a folder, or one file.
        out: a folder, or a URI that LanceDB takes.
        embedding_model: folder or hub id of a model of sentence-transformers, or an `Embedder`; by default the index's
            own, of a new index all-MiniLM-L6-v2.
        chunk_tokens: the most that a chunk has; by default the index's own, or what the model reads, 254 at most.
        overlap: the most that a chunk repeats of the one before; by default the index's own, or an eighth of a chunk.
        rebuild: make it anew, with whatever settings.
        progress: called with bytes of documents done and in all.

    Raises:
        InputError: there are no documents, or none with text; the index was made with other settings, holds other
            documents, is none, or is being written by another process; the embedding model cannot be loaded.
    """
    started = time.perf_counter()
    docs, uri = Path(docs).expanduser(), str(out)
    place = None if is_remote(uri) else Path(uri).expanduser()
    found = find_documents(docs, place)
    if not found.files:
        raise InputError(f"{docs}: holds no document{_looked_for(found)}")
    if place is not None:
        _check_place(place)
    with _alone(place):
        run = _Run(found, uri, embedding_model, chunk_tokens, overlap, rebuild)
        run.check(docs)
        run.go(progress)
        return run.report(time.perf_counter() - started)


@dataclass(frozen=True)
class _Waiting:
    """A document that waits for its vectors."""

    document: Document
    digest: str
    chunks: list[Chunk]
    bytes: int


class _Run:
    """One run: what was there, what was asked for, and what has been done."""

    def __init__(
        self,
        found: Found,
        uri: str,
        embedding_model: str | Embedder | None,
        chunk_tokens: int | None,
        overlap: int | None,
        rebuild: bool,
    ) -> None:
        self._found, self._uri = found, uri
        self._asked = embedding_model
        self._tokens, self._overlap = chunk_tokens, overlap
        self._store: Store | None = None if rebuild else open_store(uri)
        self._before = self._store.documents() if self._store is not None else {}
        self._embedder: Embedder | None = None
        self._waiting: list[_Waiting] = []
        self._skipped = list(found.skipped)
        self._notes: list[str] = []
        self._kept: set[str] = set()
        self._embedded = self._embedded_chunks = 0

    def check(self, docs: Path) -> None:
        """Refuse what does not fit the index that is there, before any work.

        Raises:
            InputError: see `index_documents`.
        """
        if self._store is None:
            return
        settings, uri = self._store.settings, self._uri
        for name, asked, had in (
            ("chunks of {} tokens", self._tokens, settings.chunk_tokens),
            ("an overlap of {} tokens", self._overlap, settings.overlap),
        ):
            if asked is not None and asked != had:
                raise InputError(
                    f"{uri}: was made with {name.format(had)}, not {asked}; pass --rebuild to make it anew"
                )
        if self._before and not any(file.source in self._before for file in self._found.files):
            raise InputError(
                f"{uri}: holds {len(self._before)} documents, none of which is in {docs}; give another name, or pass "
                "--rebuild to replace them"
            )
        if self._asked is not None and self._asked != settings.embedding_model:
            self._model()

    def go(self, progress: Progress | None) -> None:
        """Read, cut, embed and store what has changed; take away what is gone."""
        files = self._found.files
        total = sum(file.bytes for file in files)
        done = 0  # bytes that have been dealt with
        for number, file in enumerate(files, 1):
            note = f"{number} of {len(files)} documents"

            def report(part: float, before: int, note: str = note) -> None:
                if progress is not None:
                    progress(before + int(part), total, f"{note}, {self._embedded_chunks} chunks")

            done += self._take(file)
            if sum(len(each.chunks) for each in self._waiting) >= CHUNKS_A_COMMIT or number == len(files):
                done += self._commit(partial(report, before=done))
            report(0, done)
        if not self._kept:
            raise InputError(f"none of the {len(files)} documents holds text that can be read; {_first(self._skipped)}")
        assert self._store is not None
        gone = sorted(set(self._before) - self._kept)
        self._store.delete(gone)
        if self._embedded or gone or not self._store.complete:
            self._store.finish()

    def report(self, seconds: float) -> IndexReport:
        """Of a run that has ended."""
        assert self._store is not None
        settings = self._store.settings
        return IndexReport(
            documents=len(self._kept),
            chunks=self._store.chunks(),
            seconds=seconds,
            embedded=self._embedded,
            embedded_chunks=self._embedded_chunks,
            unchanged=len(self._kept) - self._embedded,
            deleted=len(set(self._before) - self._kept),
            skipped=tuple(self._skipped),
            other_files=self._found.other_files,
            embedding_model=settings.embedding_model,
            dimension=settings.dimension,
            chunk_tokens=settings.chunk_tokens,
            overlap=settings.overlap,
            notes=tuple(self._notes),
        )

    def _take(self, file: DocumentFile) -> int:
        """Read a document if it has changed; its bytes if nothing more is to be done with it, else 0."""
        try:
            data = read_bytes(file)
            digest = hashlib.sha256(READING + data).hexdigest()
            document = None if self._before.get(file.source) == digest else read_document(file, data)
        except UnreadableError as error:
            self._skipped.append(error.skipped)
            return file.bytes
        self._kept.add(file.source)
        if document is None:
            return file.bytes
        model = self._model()
        self._waiting.append(
            _Waiting(document, digest, chunks_of(document, self._size(model), model.count), file.bytes)
        )
        return 0

    def _commit(self, report: Callable[[float], None]) -> int:
        """Embed and store what waits; its bytes."""
        if not self._waiting:
            return 0
        texts = [chunk.text for each in self._waiting for chunk in each.chunks]
        size = sum(each.bytes for each in self._waiting)
        model = self._model()
        vectors = iter(model.documents(texts, lambda done: report(size * done / len(texts))))
        if self._store is None:
            self._store = create_store(self._uri, self._settings(model))
        rows = [
            Row(
                each.document.source,
                each.digest,
                position,
                each.document.place(chunk.start, chunk.end),
                chunk.text,
                vector,
            )
            for each in self._waiting
            for position, (chunk, vector) in enumerate(zip(each.chunks, vectors))  # noqa: B905 they go on
        ]
        self._store.replace([each.document.source for each in self._waiting], rows)
        self._embedded += len(self._waiting)
        self._embedded_chunks += len(rows)
        self._waiting.clear()
        return size

    def _model(self) -> Embedder:
        if self._embedder is None:
            if self._store is not None:
                chosen = self._asked if self._asked is not None else self._store.settings.embedding_model
                self._embedder = chosen_embedder(self._store, chosen, self._notes.append)
            else:
                asked = self._asked if self._asked is not None else DEFAULT_MODEL
                self._embedder = load_embedder(asked, self._notes.append) if isinstance(asked, str) else asked
        return self._embedder

    def _size(self, model: Embedder) -> ChunkSize:
        if self._store is None:
            return ChunkSize.of(model.tokens, self._tokens, self._overlap)
        return ChunkSize(self._store.settings.chunk_tokens, self._store.settings.overlap)

    def _settings(self, model: Embedder) -> Settings:
        size, probe = self._size(model), model.documents([PROBE])[0]
        return Settings(model.name, len(probe), size.tokens, size.overlap, tuple(map(float, probe)))


def _check_place(place: Path) -> None:
    """A new index takes the place of nothing else."""
    if place.is_dir():
        if any(place.iterdir()) and not (place / f"{TABLE}.lance").is_dir():
            raise InputError(f"{place}: holds other files and no index; choose another name")
    elif place.exists() or place.is_symlink():
        raise InputError(f"{place}: is no folder; choose another name")


@contextlib.contextmanager
def _alone(place: Path | None) -> Iterator[None]:
    """One process at a time; at a URI that is up to the user. A folder that stays empty does not stay."""
    if place is None:
        yield
        return
    made = not place.exists()
    with locked(place):
        try:
            yield
        finally:
            if made:
                with contextlib.suppress(OSError):
                    place.rmdir()


def _looked_for(found: Found) -> str:
    if found.skipped:
        return f" that can be read; {_first(found.skipped)}"
    names = ", ".join(f"{count} {suffix}" for suffix, count in list(found.other_files.items())[:5])
    return " (text, Markdown, HTML, PDF or source code)" + (f"; it holds other files: {names}" if names else "")


def _first(skipped: Sequence[Skipped]) -> str:
    return f"{skipped[0].source}: {skipped[0].reason}" + (f"; and {len(skipped) - 1} more" if skipped[1:] else "")
