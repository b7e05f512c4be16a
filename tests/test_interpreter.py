"""Where there is no GPU, the kernel tests run in Triton's interpreter, which has to be chosen before Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dlpkit.kernels import runtime

FILES = [
    "test_matmul.py", "test_pack_kernels.py", "test_cull.py", "test_sweep.py", "test_attend.py", "test_tile.py", "test_fragment.py", "test_parts.py",
]  # fmt: skip


@pytest.mark.parametrize("file", FILES)
@pytest.mark.skipif(torch.cuda.is_available() or runtime.INTERPRET, reason="they run by themselves")
def test_kernels_in_the_interpreter(file):
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(here / file)]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=here.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
