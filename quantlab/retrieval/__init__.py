"""Retrieval: documents become chunks, chunks become vectors and keywords, and a question finds its passages."""
