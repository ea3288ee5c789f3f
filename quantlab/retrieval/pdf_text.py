"""The text of a PDF's pages, by pypdf."""

from __future__ import annotations

import io

from quantlab.errors import missing_extra, one_line
from quantlab.retrieval.document_files import UnreadableError


def pdf_pages(source: str, data: bytes, most_characters: int) -> list[str]:
    """The text of every page in order, up to the page that goes beyond `most_characters`; pictures have none.

    Raises:
        UnreadableError: it is no PDF, is broken, or cannot be opened without a password.
    """
    try:
        import pypdf
    except ImportError:
        raise missing_extra("pypdf", "retrieval") from None

    pages: list[str] = []
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise UnreadableError(source, "is encrypted; save it without its password first")
        for page in reader.pages:
            pages.append(_text(page.extract_text()))
            if sum(map(len, pages)) > most_characters:
                break
    except UnreadableError:
        raise
    except Exception as error:  # of a broken file pypdf raises whatever its parser stumbled over
        reason = one_line(str(error), 200) or type(error).__name__
        raise UnreadableError(source, f"not a readable PDF: {reason}") from None
    return pages


def _text(text: str) -> str:
    """Without the halves of surrogate pairs that broken character maps give."""
    return text.encode("utf-8", "replace").decode("utf-8")
