#!/usr/bin/env bash
# jaxlib 0.10.2 on a CPU of two or more cores: a 2-D convolution (48 to 16 channels, 3 x 3, NHWC) of 16 planes of
# 96 x 96 runs in one thread. The same voxels as one image of 6 rows run in all threads. XLA divides the work along
# the last spatial axis alone, not along the batch or the rows, and 96 columns make one part. jaxlib 0.12.0
# divides both. Anyone who trains on slices or writes 3-D convolutions as 2-D ones there leaves cores idle.
. "$(dirname "$0")/lib.sh"
cat > run.py <<'PY'
import os
import time

import jax
import jax.numpy as jnp


@jax.jit
def conv(x, kernel):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dimensions)


def threads(*shape):
    """Return the processor's seconds for each second that passes."""
    x, kernel = jnp.ones((*shape, 48)), jnp.ones((3, 3, 48, 16))
    conv(x, kernel).block_until_ready()
    busy, start = time.process_time(), time.perf_counter()
    for _ in range(40):
        conv(x, kernel).block_until_ready()
    return (time.process_time() - busy) / (time.perf_counter() - start)


if len(os.sched_getaffinity(0)) < 2:
    print("needs two cores")
    raise SystemExit(2)
planes, strip = threads(16, 96, 96), threads(1, 6, 16 * 96 * 16)
print(f"jaxlib {jax.lib.__version__}: 16 planes of 96 x 96 keep {planes:.2f} cores busy, one of 6 x 24576 keeps {strip:.2f}")
divided = jax.lib.__version__ != "0.10.2"
raise SystemExit(not (strip > 1.35 and (planes > 1.35 if divided else planes < 1.15)))
PY
need_python 11 12
venv "jax==0.10.2" "jaxlib==0.10.2" "numpy<3"
"$py" run.py || exit $?
need_python 13
rm -rf "$here/venv"
venv "jax==0.12.0.1" "jaxlib==0.12.0" "numpy<3"
"$py" run.py
