"""The built wheel, away from the repository: the package and its commands are whole, and nothing else is in it."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest

REPOSITORY = Path(__file__).parents[1]


def copy_sources(destination: Path) -> None:
    """What a clone holds, tests and models included, without the build folder of this one."""
    if shutil.which("git") is None or not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (REPOSITORY / name).is_file():
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPOSITORY / name, destination / name)


def build_wheel(sources: Path, folder: Path) -> None:
    """With the build tools of this environment if it has them, else with pip's own isolated ones."""
    has_tools = all(importlib.util.find_spec(name) for name in ("scikit_build_core", "nanobind")) and shutil.which(
        "cmake"
    )
    command = [sys.executable, "-m", "pip", "wheel", "--disable-pip-version-check", "--no-deps", "-w", str(folder)]
    done = subprocess.run(
        [*command, *(["--no-build-isolation"] if has_tools else []), str(sources)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built once even where several workers run these tests."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / "wheel"
    with (shared / "wheel.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            copy_sources(shared / "wheel-sources")
            build_wheel(shared / "wheel-sources", shared / "wheel-built")
            (shared / "wheel-built").rename(folder)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    """Every Python file of quantlab/ and cli/, the compiled core, the calibration text, the chat page, py.typed; no
    C++, tests, models or benchmarks.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    installed = names - info
    sources = {
        prefix + file.relative_to(REPOSITORY / folder).as_posix()
        for folder, prefix in (("quantlab", "quantlab/"), ("cli", "quantlab/cli/"))
        for file in (REPOSITORY / folder).rglob("*.py")
    }
    (core,) = [name for name in installed if name.startswith("quantlab/native/_core.")]
    assert core.endswith(sysconfig.get_config_var("EXT_SUFFIX"))
    data = {"quantlab/calibration/calibration.txt", "quantlab/py.typed", "quantlab/cli/py.typed"}
    page = {file.relative_to(REPOSITORY).as_posix() for file in (REPOSITORY / "quantlab/serving/page").iterdir()}
    assert installed == sources | {core} | data | page
    assert any(name.endswith("licenses/LICENSE") for name in info)


def test_the_wheel_declares_the_command_and_its_floors(wheel: Path) -> None:
    """The console script, the Python floor, and transformers' range."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name.split("/")[-1]: name for name in archive.namelist() if ".dist-info/" in name}
        entry_points = archive.read(names["entry_points.txt"]).decode()
        metadata = archive.read(names["METADATA"]).decode().splitlines()
    assert "[console_scripts]" in entry_points
    assert "quantlab = quantlab.cli:main" in entry_points.replace("quantlab=", "quantlab = ")
    assert "Name: quantlab" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert any(line.startswith("Requires-Dist: transformers") and ">=5.20" in line for line in metadata)


PROBE = """
import json, sys
sys.path[1:1] = json.loads(sys.argv[1])
import numpy as np
import quantlab, quantlab.cli, quantlab.native
weights = np.asarray(json.loads(sys.argv[2]), dtype=np.float32)
sys.argv = ["quantlab", "--version"]
status = quantlab.cli._run()
print(json.dumps({
    "package": quantlab.__file__, "cli": quantlab.cli.__file__, "status": status,
    "editable": [type(finder).__module__ for finder in sys.meta_path if "editable" in type(finder).__module__],
    "blocks": {
        f.name: quantlab.native.quantize(f.name, weights, f.levels).tolist()
        for f in quantlab.FORMATS.values() if f.scale_of == "block"
    },
}))
"""


def test_the_wheel_works_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    """Package and commands come from the unpacked wheel, not from this repository, and the core gives gguf's bytes."""
    unpacked, empty = tmp_path / "unpacked", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    weights = np.random.default_rng(0).normal(0, 0.02, (3, 64)).astype(np.float32)
    # -S leaves out site-packages with its .pth files, and with them an editable install; the libraries come by path.
    paths = [str(unpacked), *dict.fromkeys(sysconfig.get_paths()[kind] for kind in ("purelib", "platlib"))]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-S", "-c", PROBE, json.dumps(paths), json.dumps(weights.tolist())],
        cwd=empty,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    version, report = done.stdout.splitlines()
    found = json.loads(report)
    assert version == f"quantlab {wheel.name.split('-')[1]}"
    assert found["editable"] == []
    assert found["status"] == 0
    assert Path(found["package"]) == unpacked / "quantlab" / "__init__.py"
    assert Path(found["cli"]) == unpacked / "quantlab" / "cli" / "__init__.py"
    for name, blocks in found["blocks"].items():
        expected = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[name.upper()])
        assert np.array_equal(np.asarray(blocks, dtype=np.uint8), expected)
    assert list(empty.iterdir()) == []
