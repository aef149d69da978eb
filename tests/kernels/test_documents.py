"""docs/kernels.md: its programs run, in an environment that has nothing of this project but the kernels; its table is
complete."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import mvle_kernels
from mvle_kernels.dispatch import OPS

DOCUMENT = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
FOLDER = str(Path(mvle_kernels.__file__).parents[1])


def test_its_programs_run_with_the_kernels_alone() -> None:
    first, *further = re.findall(r"```python\n(.*?)```", DOCUMENT, re.S)
    assert len([line for line in first.splitlines() if line.strip()]) <= 12
    program = "\n".join([f"import sys; sys.path.insert(0, {FOLDER!r})", first, *further])

    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torch.Size([9, 4, 8])\n") and "dense chosen" in done.stdout


def test_its_table_names_every_op_with_its_backends_in_order() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \|[^\n]*?\| ((?:\w+, )+reference) \|", DOCUMENT, re.M))

    assert rows == {name: ", ".join(b.name for b in op.backends) for name, op in OPS.items()}
