"""mvle_kernels needs torch alone: it imports and computes where nothing else can be imported."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import mvle_kernels

FOLDER = Path(mvle_kernels.__file__).parent
ALONE = """
import sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is hidden", name=name)

BLOCKED = {"numpy", "triton", "transformers", "pydantic", "torchvision", "timm", "yaml", "rich", "PIL", "mvle"}
sys.meta_path.insert(0, Nothing())
sys.path.insert(0, sys.argv[1])
import warnings
warnings.simplefilter("ignore")  # torch says that numpy is missing
import torch
import mvle_kernels
x = torch.ones(5, 2, 4, requires_grad=True)
ends = torch.tensor([0, 2, 5], dtype=torch.int32)
mvle_kernels.ragged_attention(x, x, x, ends, ends, 3, 3).sum().backward()
assert x.grad.shape == x.shape
mvle_kernels.sample_patch_mask(0, torch.arange(2), (4, 4), 2, [1, 2])
assert not BLOCKED & {name.split(".")[0] for name in sys.modules}
print(mvle_kernels.explain("ragged_attention"))
"""


def test_it_imports_and_attends_where_only_torch_is_installed() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, str(FOLDER.parent)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ragged_attention: ") and "dense (" in done.stdout


def test_it_names_no_module_but_torch_and_the_standard_library_at_its_head() -> None:
    allowed = {"torch", "numpy", "triton", *sys.stdlib_module_names}
    for file in FOLDER.glob("*.py"):
        # files of Triton kernels are imported when their backend is first taken
        late = {"numpy"} if file.stem.endswith("_triton") else {"numpy", "triton"}
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in (full.split(".")[0] for full in names):
                assert name in allowed, f"{file.name} imports {name}"
                assert name not in late or node.col_offset > 0, f"{file.name} imports {name} at its head"
