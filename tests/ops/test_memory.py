from __future__ import annotations

import platform
import subprocess
import sys

import pytest

TOUCHED = """
import resource, torch
from topwork.ops.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(40 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

assert min(faults() for _ in range(3)) > 10000, "by default every tensor is mapped anew"
assert keep_freed_memory()
faults()
assert min(faults() for _ in range(5)) < 4000
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no glibc")
def test_freed_memory_is_kept_for_the_next_tensor():
    subprocess.run([sys.executable, "-c", TOUCHED], check=True)
