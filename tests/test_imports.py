"""What an import costs: quantlab's names, its help, its tables and its readers need neither torch nor transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

import quantlab

REPORT = """
import json, sys
heavy = ("torch", "transformers", "safetensors", "peft", "gguf", "sentencepiece")
print(json.dumps({"loaded": [name for name in heavy if name in sys.modules], "found": globals().get("found")}))
"""


def run_apart(code: str, *arguments: str) -> tuple[list[str], object]:
    """Run `code` in a new interpreter: the heavy modules it loaded, and what it left as `found`."""
    done = subprocess.run(
        [sys.executable, "-c", code + REPORT, *arguments], capture_output=True, text=True, check=True, timeout=120
    )
    report = json.loads(done.stdout.splitlines()[-1])
    return report["loaded"], report["found"]


@pytest.mark.parametrize(
    "code",
    [
        "import quantlab",
        "import quantlab.cli.app",
        "import quantlab, quantlab.errors; quantlab.InputError; dir(quantlab); quantlab.__version__",
        "import quantlab.training.prepared, quantlab.training.show_batch, quantlab.cli.batch_view",
        "import sys; sys.argv = ['quantlab', '--help']\nimport quantlab.cli\nfound = quantlab.cli._run()",
        "import sys; sys.argv = ['quantlab', 'generate', '--help']\nimport quantlab.cli\nfound = quantlab.cli._run()",
    ],
    ids=["quantlab", "commands", "light names", "training data", "help", "help of a command"],
)
def test_a_light_import_loads_no_heavy_package(code: str) -> None:
    """`import quantlab`, the table of commands and `--help` load neither torch nor transformers."""
    loaded, status = run_apart(code)
    assert loaded == []
    assert status in (None, 0)


def test_format_tables_are_plain_python() -> None:
    """Names, sizes and types of block formats, and recipes over them, need no torch."""
    loaded, found = run_apart(
        "from quantlab.formats import FORMATS, Recipe, format_named\n"
        "recipe = Recipe((('*.norm.weight', None), ('*.weight', 'q4_1')))\n"
        "found = [{name: [f.block_bytes, f.ggml_type] for name, f in FORMATS.items()},\n"
        "         format_named('Q8_0').row_bytes(64), recipe.format_for('a.weight', (4, 64)).name,\n"
        "         recipe.format_for('a.norm.weight', (4, 64))]"
    )
    assert loaded == []
    table = {"q4_0": [18, 2], "q4_1": [20, 3], "q5_0": [22, 6], "q5_1": [24, 7], "q8_0": [34, 8], "tq2_0": [66, 35]}
    assert found == [table, 68, "q4_1", None]


def test_the_native_core_needs_numpy_only() -> None:
    """Weights become blocks and weights again without torch: 32 equal weights are one minimum and codes of zero."""
    loaded, found = run_apart(
        "import numpy as np\nfrom quantlab.native import dequantize, quantize\n"
        "blocks = quantize('q4_1', np.full((1, 32), 0.5, dtype=np.float32), 16)\n"
        "found = [blocks.tolist(), dequantize('q4_1', blocks).tolist()]"
    )
    assert loaded == []
    assert found == [[[0, 0, 0x00, 0x38, *[0] * 16]], [[0.5] * 32]]  # 0x3800 is 0.5 in half precision


def test_a_checkpoint_is_read_without_torch(llama_model: Path) -> None:
    """Names, shapes and raw bytes of a safetensors folder are those the safetensors library reads."""
    loaded, found = run_apart(
        "import hashlib, sys\nfrom quantlab.checkpoint import open_checkpoint\n"
        "checkpoint = open_checkpoint(sys.argv[1])\n"
        "digest = lambda name: hashlib.sha256(checkpoint.read_bytes(name)).hexdigest()\n"
        "found = {name: [list(checkpoint.shape(name)), digest(name)] for name in checkpoint.names}",
        str(llama_model),
    )
    assert loaded == []
    expected = {}
    with safe_open(llama_model / "model.safetensors", framework="np") as file:
        for name in file.keys():  # noqa: SIM118 it is no dict
            tensor: np.ndarray = file.get_tensor(name)
            expected[name] = [list(tensor.shape), digest(tensor.tobytes())]
    assert found == expected


def digest(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


def test_inspect_needs_no_torch(llama_model: Path) -> None:
    """The whole command runs on headers alone."""
    loaded, status = run_apart(
        "import sys; sys.argv = ['quantlab', 'inspect', sys.argv[1]]\nimport quantlab.cli\nfound = quantlab.cli._run()",
        str(llama_model),
    )
    assert loaded == []
    assert status == 0


def test_a_tokenizer_is_read_without_transformers(tokenizer_folder: Path) -> None:
    """A folder with tokenizer.json encodes and decodes on the `tokenizers` library alone."""
    text = "Once upon a time 42"
    loaded, found = run_apart(
        "import sys\nfrom quantlab.checkpoint import load_tokenizer\n"
        "tokenizer = load_tokenizer(sys.argv[1]); ids = tokenizer.encode(sys.argv[2])\n"
        "found = [ids, tokenizer.decode(ids)]",
        str(tokenizer_folder),
        text,
    )
    assert loaded == []
    assert found == [Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json")).encode(text).ids, text]


def test_every_public_name_resolves() -> None:
    """Each name of __all__ is the object of that name in the module that the table gives."""
    import importlib

    assert sorted(quantlab.__all__) == sorted(quantlab._HOMES)
    for name in quantlab.__all__:
        assert getattr(quantlab, name) is getattr(importlib.import_module(quantlab._HOMES[name]), name)


def test_names_win_over_modules_that_share_them() -> None:
    """`quantlab.perplexity` is the function also after its module of the same name was imported."""
    import quantlab.evaluation.compare
    import quantlab.evaluation.perplexity

    assert callable(quantlab.perplexity)
    assert callable(quantlab.compare)


def test_dir_lists_the_public_names() -> None:
    """What completion in a shell shows: the public names and the version, sorted."""
    assert dir(quantlab) == sorted([*quantlab.__all__, "__version__"])


def test_an_unknown_name_is_an_attribute_error() -> None:
    """As in any module; `from quantlab import nothing` is an ImportError."""
    with pytest.raises(AttributeError, match="module 'quantlab' has no attribute 'nothing'"):
        quantlab.nothing  # noqa: B018 the access is the point
    with pytest.raises(ImportError):
        from quantlab import nothing  # noqa: F401


def test_the_version_is_the_installed_one() -> None:
    """`quantlab.__version__` is what the package's metadata says."""
    from importlib.metadata import version

    assert quantlab.__version__ == version("quantlab")
