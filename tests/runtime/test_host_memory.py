"""What the host's memory gets back."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import numpy as np
from swinsmt_jax.runtime import host_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 // 2**20

if {returning}:
    host_memory.return_freed_blocks()
np.ones(30 * 2**20, np.uint8)  # freed: glibc then keeps blocks of up to 30 MB
sizes = [16 * 2**20, 2**20] * 10  # a small block behind each large one
blocks = [np.ones(size, np.uint8) for size in sizes]
full = resident()
blocks = blocks[1::2]
print(full - resident())
"""


def freed(returning, **environment):
    """Return the MB that freeing 160 MB gives back to the system."""
    program = [sys.executable, "-c", PROGRAM.format(returning=returning)]
    known = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    done = subprocess.run(
        program, env=known | environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="glibc's malloc is not here"
)
def test_freed_blocks_go_back_to_the_system_unless_the_user_has_set_malloc():
    assert freed(True) > 150
    assert freed(False) < 20  # what glibc does by itself
    assert freed(True, MALLOC_MMAP_THRESHOLD_="100000000") < 20
