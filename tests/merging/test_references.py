"""How models are named."""

import pytest

from quantlab.errors import InputError
from quantlab.merging.references import ModelReference, parse_reference


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("org/model", ("org/model", None, None, None)),
        (" org/model ", ("org/model", None, None, None)),
        ("org/model@v1.0", ("org/model", "v1.0", None, None)),
        ("org/model+org/lora", ("org/model", None, "org/lora", None)),
        ("org/model@main+org/lora@abc", ("org/model", "main", "org/lora", "abc")),
        ("./folder/model.gguf+lora", ("./folder/model.gguf", None, "lora", None)),
    ],
)
def test_references(text, parts):
    reference = parse_reference(text)
    assert reference == ModelReference(*parts)
    assert str(reference) == text.strip()
    assert parse_reference(str(reference)) == reference


@pytest.mark.parametrize("name", ["c++", "a@b", "x+y@z"])
def test_paths_that_exist_win(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    assert parse_reference(str(folder)) == ModelReference(str(folder))
    assert parse_reference(f"{folder}+lora@2") == ModelReference(str(folder), None, "lora", "2")
    assert parse_reference(f"{folder}@rev") == ModelReference(str(folder), "rev")


def test_an_adapter_that_exists_with_a_plus_in_its_name(tmp_path):
    (tmp_path / "l+r").mkdir()
    adapter = str(tmp_path / "l+r")
    assert parse_reference(f"org/model+{adapter}") == ModelReference("org/model", None, adapter)


@pytest.mark.parametrize("text", ["", "  ", "@v1", "+lora", "model+", "model@", "model@v+"])
def test_what_names_no_model(text):
    with pytest.raises(InputError, match="is no model; write path_or_repo"):
        parse_reference(text)


def test_the_model_alone():
    assert parse_reference("a/b@c+d").without_adapter == ModelReference("a/b", "c")
