#!/usr/bin/env bash
# jax 0.12.0.1: the derivative of jax.scipy.special.erf raises inside jax.shard_map ("requires varying manual axes
# to match"). So does the derivative of the exact GELU. The value and the tanh form of GELU work, as did
# jax 0.11.2. Anyone who trains a transformer's feed-forward layer (or a mixture of experts)
# under shard_map with its default check_vma=True cannot take a step after the upgrade.
. "$(dirname "$0")/lib.sh"
need_python 13 12
venv "jax==0.12.0.1" "jaxlib==0.12.0"
cat > run.py <<'PY'
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P

jax.config.update("jax_num_cpu_devices", 2)
mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
values = jnp.linspace(-2.0, 2.0, 8)

def seen(f, **options):
    inside = jax.shard_map(f, mesh=mesh, in_specs=P("x"), out_specs=P("x"), **options)
    try:
        jax.jit(jax.grad(lambda v: inside(v).sum()))(values).block_until_ready()
    except Exception as error:
        return str(error).splitlines()[0][:90]
    return "fine"

print("jax", jax.__version__)
forms = {
    "erf": (jax.scipy.special.erf, {}),
    "exact GELU": (lambda v: jax.nn.gelu(v, approximate=False), {}),
    "tanh GELU": (lambda v: jax.nn.gelu(v, approximate=True), {}),
    "erf, check_vma=False": (jax.scipy.special.erf, {"check_vma": False}),
}
found = {name: seen(f, **options) for name, (f, options) in forms.items()}
for name, what in found.items():
    print(f"derivative of {name} inside shard_map: {what}")
raises = ["varying manual axes" in found[n] for n in ("erf", "exact GELU")]
raise SystemExit(not (all(raises) and found["tanh GELU"] == found["erf, check_vma=False"] == "fine"))
PY
"$py" run.py
