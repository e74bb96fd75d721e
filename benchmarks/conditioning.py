"""How much of a gradient norm is rounding: ours and PyTorch's beside double precision.

    python -m benchmarks.conditioning [--quick] [--goldens=FOLDER] [--json=FILE]

For the goldens of Swin SMT and Swin UNETR, every parameter's gradient norm is computed
by PyTorch in double precision, by PyTorch in float32 and by ours in float32, the two
also with the input times 1 - 1e-7 and 1 + 1e-7, about its last bit. The table has the
largest relative differences. What PyTorch differs from itself by is the least that can
be asked of another program. --quick takes Swin UNETR alone. Needs PyTorch and MONAI.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from benchmarks import define_file, parity, report, write
from swinsmt_jax import convert, losses

LAST_BIT = 1e-7


def pytorch_norms(config, golden, *, double: bool, scale: float = 1.0) -> dict:
    """Return the gradient norms of PyTorch's network, the input times `scale`."""
    import torch
    from monai.losses import DiceCELoss

    from benchmarks import pytorch_network

    dtype = torch.float64 if double else torch.float32
    network = pytorch_network.create(config)
    arrays = parity.part(golden, "param/")
    names = {k: k.replace("experts.experts", "experts") for k in network.state_dict()}
    network.load_state_dict(
        {k: torch.from_numpy(arrays[n]) for k, n in names.items() if n in arrays},
        strict=False,  # index buffers are not in the goldens
    )
    network.to(dtype)
    x = torch.from_numpy(golden["x"] * np.float32(scale)).to(dtype)
    y = torch.from_numpy(golden["y"]).long()
    DiceCELoss(to_onehot_y=True, softmax=True)(network(x), y).backward()
    found = {names[k]: p.grad.numpy() for k, p in network.named_parameters()}
    missing = arrays.keys() - found.keys()
    if missing:
        raise ValueError(f"the PyTorch network has no {sorted(missing)}.")
    return norms(found)


def our_norms(config, golden):
    """Return a function from the factor of the input to our gradient norms."""
    graphdef, params = parity.loaded(config, parity.part(golden, "param/"))
    y = jnp.asarray(golden["y"][:, 0])

    @jax.jit
    def gradient(params, x):
        return jax.grad(
            lambda p: losses.dice_cross_entropy(nnx.merge(graphdef, p)(x), y)
        )(params)

    def run(scale):
        x = jnp.moveaxis(golden["x"] * np.float32(scale), 1, -1)
        return norms(convert.to_torch(nnx.merge(graphdef, gradient(params, x))))

    return run


def norms(gradients: dict) -> dict[str, float]:
    """Return the norm of each array, summed in double precision."""
    return {k: float(np.linalg.norm(g.astype(float))) for k, g in gradients.items()}


def compare(ours: dict, theirs: dict) -> dict:
    """Return the largest relative difference, where, and how many exceed 1e-3."""
    by_name = {k: abs(ours[k] - theirs[k]) / theirs[k] for k in theirs}
    worst = max(by_name, key=by_name.get)
    beyond = sum(v > 1e-3 for v in by_name.values())
    return {"largest": by_name[worst], "beyond": beyond, "parameter": worst}


def measure(config, golden) -> list[dict]:
    """Return the rows of one golden."""
    scales = {"": 1.0, ", last bit down": 1 - LAST_BIT, ", last bit up": 1 + LAST_BIT}
    run = our_norms(config, golden)
    exact = pytorch_norms(config, golden, double=True)
    wanted = {k: float(v) for k, v in parity.part(golden, "grad_norm/").items()}
    found = {}
    for what, scale in scales.items():
        found[f"PyTorch{what}"] = pytorch_norms(
            config, golden, double=False, scale=scale
        )
        found[f"ours{what}"] = run(scale)
    return [
        {"program": name, "other": other, **compare(found[name], theirs)}
        for name in sorted(found)
        for other, theirs in (("golden", wanted), ("double precision", exact))
    ]


def main(_):
    options = flags.FLAGS
    names = list(parity.NETWORKS)[1 if options.quick else 0 :]
    rows = []
    for name in names:
        golden = parity.read(Path(options.goldens), name)
        for row in measure(parity.NETWORKS[name], golden):
            rows.append({"golden": name, **row})
            print(
                f"{name:26} {row['program']:24} beside {row['other']:17}"
                f"{row['largest']:9.1e}, {row['beyond']:2} beyond 1e-3, "
                f"worst {row['parameter']}",
                flush=True,
            )
    headline = {
        f"{r['golden']}: {r['program']} beside {r['other']}": r["largest"] for r in rows
    }
    write(options.json, report(headline, rows=rows))


if __name__ == "__main__":
    flags.DEFINE_bool("quick", False, "Swin UNETR alone")
    flags.DEFINE_string("goldens", "../shared/parity", "folder of the golden tensors")
    define_file("json", "also write the figures to this file")
    app.run(main)
