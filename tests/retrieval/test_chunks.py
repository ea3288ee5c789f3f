"""Chunks: nothing is lost, nothing is too long, sentences stay whole, headings stay with their text."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_embedder import TinyEmbedder

from quantlab.errors import InputError
from quantlab.retrieval.chunks import ChunkSize, chunks_of
from quantlab.retrieval.document_files import DocumentFile
from quantlab.retrieval.documents import Document, read_document
from quantlab.retrieval.sentences import sentences

count = TinyEmbedder().count
PIECES = [
    "word",
    "# head\n",
    "\n## sub\n\n",
    ". ",
    ".\n",
    "\n\n",
    "- item\n",
    "x" * 40,
    "!?",
    "```\n",
    " ",
    "\t",
    "\u3002",
    "a.b",
    "    code\n",
]


def read(text: str, kind="markdown") -> Document:
    return read_document(DocumentFile("a", None, kind, 0), text.encode())  # type: ignore[arg-type]


def parts(text: str) -> list[str]:
    ends = sentences(text, 0, len(text))
    return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=200).map("".join).filter(lambda text: text.strip()),
    st.sampled_from(["text", "markdown", "code"]),
    st.integers(16, 40),
    st.integers(0, 8),
)
def test_every_character_is_in_a_chunk_that_the_model_reads_whole(text, kind, tokens, overlap):
    document = read(text, kind)
    found = chunks_of(document, ChunkSize(tokens, overlap), count)
    assert (found[0].start, found[-1].end) == (0, len(document.text))
    for before, after in pairwise(found):
        assert before.start < after.start <= before.end < after.end
        assert sum(count([document.text[after.start : before.end]])) <= overlap
    for chunk in found:
        assert document.text[chunk.start : chunk.end].strip() in chunk.text
        assert 0 < count([chunk.text])[0] <= tokens + chunk.text.count(">")  # the joints between headings


def test_sentences_end_where_readers_think_they_do():
    text = (
        'Dr. Who, e.g. J. Smith (cf. Fig. 3), paid 3.50. "Really?" she said. No! Yes\u2026 It is 2.\nThen. a small one.'
    )
    assert parts(text) == [
        "Dr. Who, e.g. J. Smith (cf. Fig. 3), paid 3.50. ",
        '"Really?" ',
        "she said. ",
        "No! ",
        "Yes\u2026 ",
        "It is 2.\n",
        "Then. a small one.",
    ]
    assert parts("One line\nof two\n\nNext.\n- a\n- b\n1. c\n") == [
        "One line\nof two\n\n",
        "Next.\n",
        "- a\n",
        "- b\n",
        "1. c\n",
    ]
    assert parts("\u4f60\u597d\u3002\u518d\u89c1\u3002") == ["\u4f60\u597d\u3002", "\u518d\u89c1\u3002"]


def test_the_last_sentences_come_again_in_the_next_chunk():
    text = " ".join(f"Sentence number {number:02}." for number in range(12))  # of 4 tokens each
    found = chunks_of(Document("a", "text", text), ChunkSize(20, 8), count)
    assert [chunk.text.split(" ")[2] for chunk in found] == ["00.", "03.", "06.", "09."]
    assert found[0].text.endswith("Sentence number 04.")
    assert found[1].text.startswith("Sentence number 03. Sentence number 04. Sentence number 05.")


def test_chunks_stay_under_their_headings():
    """A heading without text of its own goes with the next; what stands deeper names what is above it."""
    text = (
        "# Book\n\n## Ports\n\nRivers. Harbours.\n\n## Hills\n\n"
        + " ".join(f"Hill {n}." for n in range(12))
        + "\n# End\nText."
    )
    found = chunks_of(read(text), ChunkSize(20, 0), count)
    assert [chunk.text for chunk in found] == [
        "# Book\n\n## Ports\n\nRivers. Harbours.",
        "Book\n\n## Hills\n\nHill 0. Hill 1. Hill 2. Hill 3.",
        "Book > Hills\n\nHill 4. Hill 5. Hill 6. Hill 7. Hill 8.",
        "Book > Hills\n\nHill 9. Hill 10. Hill 11.",
        "# End\nText.",
    ]


def test_long_headings_leave_room_for_the_text():
    text = f"# {'very ' * 50}\n\n## Short\n\n" + "Words and words. " * 20
    found = chunks_of(read(text), ChunkSize(16, 0), count)
    assert {chunk.text.split("\n\n")[0] for chunk in found[5:]} == {"Short"}


def test_code_is_cut_at_blank_lines_then_lines():
    text = "def one():\n    return 1\n\n\ndef two():\n    return 2\n\n" + "".join(f"call({n})\n" for n in range(10))
    found = chunks_of(Document("a.py", "code", text), ChunkSize(16, 0), count)
    assert [chunk.text.split("\n")[0] for chunk in found] == ["def one():", "call(0)", "call(4)", "call(8)"]


def test_a_word_longer_than_a_chunk_is_cut():
    text = "{}" * 50
    assert [chunk.end - chunk.start for chunk in chunks_of(Document("a", "text", text), ChunkSize(16, 0), count)] == [
        12, 13, 12, 13, 12, 13, 12, 13,
    ]  # fmt: skip


def test_a_character_larger_than_a_chunk_is_a_chunk():
    """Some tokenizers make dozens of pieces of one."""
    document = Document("wide.txt", "text", "abcd")
    chunks = chunks_of(document, ChunkSize(16, 0), lambda texts: [20 * len(text) for text in texts])
    assert [chunk.text for chunk in chunks] == ["a", "b", "c", "d"]


def test_sizes():
    assert ChunkSize.of(254) == ChunkSize(254, 31)
    assert ChunkSize.of(8190) == ChunkSize(254, 31)
    assert ChunkSize.of(126) == ChunkSize(126, 15)
    assert ChunkSize.of(512, 400, 0) == ChunkSize(400, 0)


@pytest.mark.parametrize("asked", [(15, None), (255, None), (100, 51), (100, -1)])
def test_sizes_that_no_model_can_read_are_refused(asked):
    with pytest.raises(InputError, match=r"chunks of|overlap of"):
        ChunkSize.of(254, *asked)
