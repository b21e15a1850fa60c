"""The wheel holds what the tree holds, and the layout's traps stay closed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {
    "vtprune": "vtprune",
    "kernels": "vtprune/kernels",
    "integrations": "vtprune/integrations",
    "eval": "vtprune/eval",
}

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")


def tracked() -> list[str]:
    out = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [f for f in out.splitlines() if (ROOT / f).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy of the tracked files, so that stale build folders play no part."""
    tree = tmp_path_factory.mktemp("tree")
    for name in tracked():
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not (ROOT / name).is_symlink():
            shutil.copy2(ROOT / name, target)
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(tree)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_every_module_and_all_data(wheel: zipfile.ZipFile) -> None:
    expected = set()
    for name in tracked():
        top, _, rest = name.partition("/")
        if top in SOURCES and rest and not (ROOT / name).is_symlink():
            expected.add(f"{SOURCES[top]}/{rest}")
    # Not meant for users of the package.
    expected -= {e for e in expected if e.endswith(("kernels/README.md",)) or "/eval/results/" in e}
    missing = expected - set(wheel.namelist())
    assert not missing, f"not in the wheel: {sorted(missing)}; add packages or package-data in pyproject.toml"


def test_wheel_holds_the_reference_model(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for folder in ("llava", "clip"):
        assert f"vtprune/eval/reference/{folder}/model.safetensors" in names
        assert f"vtprune/eval/reference/{folder}/config.json" in names


def test_no_file_is_too_large() -> None:
    large = {f: size for f in tracked() if (size := (ROOT / f).stat().st_size) > 16 * 2**20}
    assert not large


def test_kernels_folder_is_no_package() -> None:
    # With an __init__.py it would shadow Hugging Face's `kernels` package for anything run at the root.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_importing_vtprune_changes_nothing_elsewhere() -> None:
    program = """
import sys
import torch, torch.nn as nn
before = {k: dict(vars(v)) for k, v in list(sys.modules.items()) if k.startswith("torch")}
import vtprune
assert "transformers" not in sys.modules and "timm" not in sys.modules
for name, namespace in before.items():
    now = vars(sys.modules[name])
    changed = {k for k in namespace if namespace[k] is not now.get(k, None) and not k.startswith("__")}
    assert not changed, (name, changed)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
