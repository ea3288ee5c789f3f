"""One short training run, which several files look at."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_pretraining import Run, write_recipe

from quantlab.training.corpus import read_documents
from quantlab.training.pretrain import pretrain


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, prose: Path) -> Run:
    """Thirty steps on six documents of the prose; the other two are validation and test text."""
    folder = tmp_path_factory.mktemp("pretrain")
    documents = read_documents(prose)
    corpus = folder / "corpus"
    corpus.mkdir()
    for name, chosen in (("train", documents[2:]), ("validation", documents[:1]), ("test", documents[1:2])):
        (corpus / f"{name}.txt").write_text("\n<|endoftext|>\n".join(chosen), encoding="utf-8")
    recipe, reports = write_recipe(folder), []
    out = folder / "out"
    result = pretrain(recipe, corpus, out, progress=lambda *report: reports.append(report))
    return Run(recipe, corpus, out, result, reports)
