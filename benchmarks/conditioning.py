"""How much of a gradient norm is rounding; see `benchmarks.parity`."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import goldens, parity, save
from swinsmt_jax import checks, convert
from swinsmt_jax.models.nnunet import PlainConvUNetConfig
from swinsmt_jax.training import losses

NNUNET = "zoo/nnunet_plain_small"
NETWORKS = {NNUNET: goldens.ZOO[NNUNET], **goldens.NETWORKS}


def pytorch_norms(config, golden, *, double: bool, scale: float = 1.0) -> dict:
    """Return the gradient norms of PyTorch's network, the input times `scale`."""
    import torch
    from monai.losses import DiceCELoss

    dtype = torch.float64 if double else torch.float32
    network = _pytorch_network(config)
    arrays = goldens.part(golden, "param/")
    names = {k: k.replace("experts.experts", "experts") for k in network.state_dict()}
    network.load_state_dict(
        {k: torch.from_numpy(arrays[n]) for k, n in names.items() if n in arrays},
        strict=False,  # index buffers are not in the goldens
    )
    network.to(dtype)
    x = torch.from_numpy(golden["x"] * np.float32(scale)).to(dtype)
    y = torch.from_numpy(golden["y"]).long()
    DiceCELoss(to_onehot_y=True, softmax=True)(network(x), y).backward()
    used = {k: p.grad for k, p in network.named_parameters() if p.grad is not None}
    return parity.norms({names[k]: gradient.numpy() for k, gradient in used.items()})


def _pytorch_network(config):
    import torch

    if isinstance(config, PlainConvUNetConfig):
        from dynamic_network_architectures.architectures.unet import PlainConvUNet

        return PlainConvUNet(
            config.in_channels,
            len(config.features_per_stage),
            config.features_per_stage,
            torch.nn.Conv3d,
            3,
            config.strides,
            2,
            config.out_channels,
            2,
            conv_bias=True,
            norm_op=torch.nn.InstanceNorm3d,
            norm_op_kwargs={"eps": 1e-5, "affine": True},
            nonlin=torch.nn.LeakyReLU,
        )
    from benchmarks import pytorch_network

    return pytorch_network.create(config)


def our_norms(config, golden):
    """Return a function from the factor of the input to our gradient norms."""
    graphdef, params = goldens.loaded(config, goldens.part(golden, "param/"))
    y = jnp.asarray(golden["y"][:, 0])

    @jax.jit
    def gradient(params, x):
        return jax.grad(lambda p: losses.make("dice_ce")(nnx.merge(graphdef, p)(x), y))(
            params
        )

    def run(scale):
        x = jnp.moveaxis(golden["x"] * np.float32(scale), 1, -1)
        return parity.norms(convert.to_torch(nnx.merge(graphdef, gradient(params, x))))

    return run


def compare(ours: dict, theirs: dict) -> dict:
    """Return the largest relative differences, where, and how many exceed 1e-3.

    Norms below a millionth of the largest are left out: in nnU-Net those of biases
    before a norm, which are rounding alone.
    """
    plain = parity.deviations(ours, theirs, floor=1e-6)
    guarded = parity.deviations(ours, theirs, guard=parity.GUARD, floor=1e-6)
    worst = max(plain, key=plain.get)
    return {
        "plain": plain[worst],
        "guarded": max(guarded.values()),
        "beyond": sum(v > 1e-3 for v in plain.values()),
        "parameter": worst,
    }


def measure(config, golden) -> list[dict]:
    """Return the rows of one golden."""
    scales = {
        "": 1.0,
        ", last bit down": 1 - parity.LAST_BIT,
        ", last bit up": 1 + parity.LAST_BIT,
    }
    run = our_norms(config, golden)
    exact = pytorch_norms(config, golden, double=True)
    wanted = {k: float(v) for k, v in goldens.part(golden, "grad_norm/").items()}
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


def report(folder: Path, *, quick: bool) -> None:
    """Compare all programs on the goldens of a folder."""
    for name in ("torch", "monai", "soft_moe_pytorch", "dynamic_network_architectures"):
        checks.require(
            importlib.util.find_spec(name) is not None,
            f"{name} is not installed, but norms are compared with PyTorch's; "
            'pip install -e ".[reference]" dynamic-network-architectures',
        )
    rows = []
    for name in [NNUNET] if quick else list(NETWORKS):
        for row in measure(NETWORKS[name], goldens.read(folder, name)):
            rows.append({"golden": name, **row})
            print(
                f"{name:26} {row['program']:24} beside {row['other']:17}"
                f"{row['plain']:9.1e}, guarded {row['guarded']:7.1e}; "
                f"{row['beyond']:2} beyond 1e-3, worst {row['parameter']}",
                flush=True,
            )
    headline = {
        f"{r['golden']}: {r['program']} beside {r['other']}": r["plain"] for r in rows
    }
    save(headline, rows=rows)
