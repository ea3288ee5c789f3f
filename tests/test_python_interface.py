"""What people write who import quantlab: the examples of the documents run, and paths may be strings."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest

import quantlab

REPOSITORY = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
EXAMPLES = {
    "README.md": (
        "report = quantlab.quantize_checkpoint",
        "CalibrationOptions",
        "import quantlab.hf",
        "load_engine",
    ),  # as they build
    "docs/chat.md": ("Chat(",),
    "docs/prompting.md": ("evaluate_templates",),
}
FUNCTIONS = [name for name in quantlab.__all__ if inspect.isfunction(getattr(quantlab, name))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With the files that the examples name."""
    (tmp_path / "models").symlink_to(REPOSITORY / "models")
    prose = (REPOSITORY / "docs" / "decisions.md").read_text(encoding="utf-8")
    (tmp_path / "prose.txt").write_text(prose[:4000], encoding="utf-8")
    (tmp_path / "held-out.txt").write_text(prose[4000:6000], encoding="utf-8")
    sums = [{"question": "What is 2 + 2?", "answer": "4"}, {"question": "What is 3 + 4?", "answer": "7"}]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("document", EXAMPLES)
def test_examples_run(document: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One after the other, names shared; each that is listed is there, and so is no other."""
    blocks = BLOCK.findall((REPOSITORY / document).read_text(encoding="utf-8"))
    assert len(blocks) == len(EXAMPLES[document])
    names = {"quantlab": quantlab, "model": "models/fable-9m-instruct"}
    for mark in EXAMPLES[document]:
        (code,) = [block for block in blocks if mark in block]
        exec(compile(code, f"{document}: {mark}", "exec"), names)
    assert capsys.readouterr().out


@pytest.mark.parametrize("name", FUNCTIONS)
def test_paths_may_be_strings(name: str) -> None:
    parameters = inspect.signature(getattr(quantlab, name)).parameters.values()
    places = [
        str(parameter.annotation) for parameter in parameters if re.search(r"\bPath\b", str(parameter.annotation))
    ]
    assert [annotation for annotation in places if not re.search(r"\bstr \| Path\b", annotation)] == []


def test_strings_do_where_paths_do(make_model, tmp_path: Path) -> None:
    a, b = (str(make_model(tmp_path / name, "llama", seed=seed)) for seed, name in enumerate("ab"))
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat, and the dog sat on the cat. " * 20)
    config = json.dumps(
        {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 1}} for m in (a, b)]}
    )
    quantlab.merge_checkpoints(f"# JSON is YAML\n{config}", str(tmp_path / "merged"), report=str(tmp_path / "report"))
    quantlab.extract_adapter(a, str(tmp_path / "merged"), str(tmp_path / "adapter"), rank=2)
    quantlab.fuse_adapter(a, str(tmp_path / "adapter"), str(tmp_path / "fused"))
    genome = {"models": [a, b], "merge_method": "linear", "ranges": {"weight": [0.1, 1]}}
    search = {"genome": genome, "fitness": {"loss": str(text), "context": 16}}
    quantlab.evolve(f"# JSON is YAML\n{json.dumps(search)}", str(tmp_path / "evolved"), trials=2)
    for name in ("merged", "fused", "evolved"):
        assert quantlab.perplexity(str(tmp_path / name), str(text), context=16).perplexity > 1
