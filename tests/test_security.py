"""Nothing that swan reads from a file can run code (SECURITY.md)."""

import ast
import pickle
from pathlib import Path

import pytest

import swan
from tests.tiny import attached

FOLDER = Path(swan.__file__).parent
MODULES = {"dill", "cloudpickle", "joblib", "marshal", "pickle", "shelve", "yaml"}
CALLS = {"eval", "exec", "torch.load", "torch.save", "np.load", "numpy.load"}


def uses(source: str) -> set[str]:
    """The modules and functions in some code that could run what is in a file."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Call):
            found.add(ast.unparse(node.func))
    return found & (MODULES | CALLS)


def test_such_uses_are_found():
    assert uses("import pickle\nfrom yaml import load\ntorch.load(file)\neval(text)") == {
        "pickle", "yaml", "torch.load", "eval"
    }  # fmt: skip
    assert uses("model.eval()") == set()


def test_swan_has_no_reader_that_runs_code():
    assert {str(f): used for f in FOLDER.rglob("*.py") if (used := uses(f.read_text()))} == {}


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_a_pickle_is_refused_unread(tmp_path):
    trapped, file = tmp_path / "trapped", tmp_path / "calibration.safetensors"
    file.write_bytes(pickle.dumps(Trap(trapped)))
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        swan.Calibration.load(file)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        swan.attach(swan.SwanAttention(64, heads=4), str(file))
    assert not trapped.exists()
    pickle.loads(file.read_bytes())  # it would have shown
    assert trapped.exists()


def test_a_pickled_cache_is_refused_unread(tmp_path):
    trapped, file = tmp_path / "trapped", tmp_path / "cache.safetensors"
    file.write_bytes(pickle.dumps(Trap(trapped)))
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        swan.SwanCache.load(file, attached(num_hidden_layers=1))
    assert not trapped.exists()
