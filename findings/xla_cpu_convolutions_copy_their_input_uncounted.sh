#!/usr/bin/env bash
# jaxlib 0.10.2 on a CPU: a padded 2-D convolution of 48 planes of 48 x 48 with 128 channels copies its whole
# input while it runs. Compiled.memory_analysis() does not count the copy: temp_size_in_bytes is 0, but
# the process grows by the result and by another input. Anyone who chooses a batch, rematerialisation or a
# window size by the compiler's figure plans for too little memory.
. "$(dirname "$0")/lib.sh"
need_python 11 12
venv "jax==0.10.2" "jaxlib==0.10.2" "numpy<3"
cat > run.py <<'PY'
import resource

import jax
import jax.numpy as jnp


def conv(x, kernel):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dimensions)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


kernel = jnp.ones((3, 3, 128, 32))
jax.jit(conv)(jnp.ones((1, 8, 8, 128)), kernel).block_until_ready()  # loads the library
x = jnp.ones((48, 48, 48, 128))
program = jax.jit(conv).lower(x, kernel).compile()
stated = program.memory_analysis()
before = peak()
program(x, kernel).block_until_ready()
grown = peak() - before
uncounted = grown - (stated.output_size_in_bytes + stated.temp_size_in_bytes) / 1e6
print(
    f"jaxlib {jax.lib.__version__}: input {x.nbytes / 1e6:.0f} MB, result "
    f"{stated.output_size_in_bytes / 1e6:.0f} MB, temporaries stated {stated.temp_size_in_bytes / 1e6:.0f} MB; "
    f"the process grew by {grown:.0f} MB, {uncounted:.0f} MB of them uncounted"
)
raise SystemExit(not (stated.temp_size_in_bytes == 0 and uncounted > 0.8 * x.nbytes / 1e6))
PY
"$py" run.py
