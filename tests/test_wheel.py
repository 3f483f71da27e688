"""What `python -m build` makes: the source distribution holds what a build needs, the wheel what a user needs."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def build(folder: Path, *settings: str) -> tuple[set[str], zipfile.ZipFile]:
    """Names in the source distribution, and the wheel made from it, as CONTRIBUTING.md says but without isolation."""
    for module in ("build.__main__", "scikit_build_core", "pybind11"):  # a bare `build` may be the folder of objects
        pytest.importorskip(module, reason=f'{module} is not installed; pip install -c constraints.txt -e ".[test]"')
    words = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        str(folder),
        f"-Cbuild-dir={folder}/objects",
    ]
    done = subprocess.run(
        [*words, *settings, str(ROOT)], cwd=folder, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (source,) = folder.glob("*.tar.gz")
    (wheel,) = folder.glob("*.whl")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    return names, zipfile.ZipFile(wheel)


def sources(folder: str, prefix: str) -> set[str]:
    """The Python files of a folder under the names they are installed by."""
    base = ROOT / folder
    return {f"{prefix}/{file.relative_to(base).as_posix()}" for file in base.rglob("*.py")}


def test_contents(tmp_path: Path) -> None:
    """Without compiling: the Python side, its data and its metadata."""
    source, wheel = build(tmp_path, "-Cwheel.cmake=false")
    for needed in ("CMakeLists.txt", "csrc/bindings.cpp", "csrc/cuda/kernels.h", "lightning_lrtt/_C.pyi", "LICENSE"):
        assert needed in source
    assert {name.partition("/")[0] for name in source} >= {"callbacks", "csrc", "docs", "examples", "tests"}
    assert not [name for name in source if "__pycache__" in name or name.endswith((".so", ".whl", ".o"))]
    assert not [name for name in source if name.split("/")[0] in {"build", "logs", ".git", ".mypy_path", ".mypy_cache"}]

    names = set(wheel.namelist())
    python = sources("lightning_lrtt", "lightning_lrtt") | sources("callbacks", "lightning_lrtt/callbacks")
    rest = {name for name in names if not name.startswith("lightning_lrtt-")}
    assert rest == python | {"lightning_lrtt/py.typed", "lightning_lrtt/_C.pyi"}
    (entry,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
    points = ConfigParser(delimiters=("=",))
    points.read_string(wheel.read(entry).decode())
    assert dict(points["console_scripts"]) == {"lrtt": "lightning_lrtt.cli:main"}
    assert dict(points["lightning.pytorch.callbacks_factory"]) == {"lrtt": "lightning_lrtt.callbacks:default_callbacks"}
    assert any(name.endswith("/licenses/LICENSE") for name in names)


@pytest.mark.slow
@pytest.mark.timeout(1300)
def test_compiled(tmp_path: Path) -> None:
    """The wheel that is published: the core inside, nothing else beside it, importable from where it was unpacked."""
    _, wheel = build(tmp_path, "-Ccmake.define.LRTT_CUDA=OFF")
    library = [name for name in wheel.namelist() if name.endswith((".so", ".pyd"))]
    assert [name.split(".")[0] for name in library] == ["lightning_lrtt/_C"]
    assert not [name for name in wheel.namelist() if name.endswith((".cpp", ".cu", ".cuh", ".h", ".a", ".cmake"))]
    wheel.extractall(tmp_path / "site")
    code = (
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'Redirecting' not in type(f).__name__]\n"
        f"sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import lightning_lrtt.callbacks as c, lightning_lrtt as l\n"
        "print(c.__file__, l._C.__file__, l.build_info()['cpu_instructions'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(tmp_path / "site")) == 2
