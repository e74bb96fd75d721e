"""How close the network is to the PyTorch one, measured on golden tensors.

    python -m benchmarks.parity [--quick] [--goldens=../shared/parity] [--json=FILE]
    python -m benchmarks.parity --conditioning [--quick] [--goldens=...] [--json=FILE]

Exits with status 1 if a figure is beyond its tolerance. The goldens hold inputs,
parameters, outputs and gradients of the PyTorch network in float32 on CPU. --quick
measures modules, loss and sliding window, and no network.

--conditioning shows how much of a gradient norm is rounding. For the goldens of Swin
SMT, Swin UNETR and the plain nnU-Net, every parameter's gradient norm is computed by
PyTorch in double precision, by PyTorch in float32 and by ours in float32, the two also
with the input times 1 - 1e-7 and 1 + 1e-7, about its last bit. The table has the
largest relative differences; "guarded" ones are relative to the norm plus 0.1 % of the
largest. No program can be asked to agree with PyTorch better than PyTorch with itself.
--quick takes nnU-Net alone. Needs PyTorch, MONAI, soft-moe-pytorch and
dynamic-network-architectures.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # gpu_check measures the same on its device
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from benchmarks import parity_rows, run, save
from benchmarks.goldens import NETWORKS, ZOO, loaded, part, read
from swinsmt_jax import convert
from swinsmt_jax.inference.sliding_window import sliding_window
from swinsmt_jax.layers.linear import MLP
from swinsmt_jax.layers.patch import PatchMerging
from swinsmt_jax.layers.soft_moe import SoftMoE, SoftMoEConfig
from swinsmt_jax.layers.swin import SwinBlock
from swinsmt_jax.models.swin.torch_names import TORCH_NAMES
from swinsmt_jax.training import losses

LAST_BIT = 1e-7
GUARD = 1e-3


class Figure(NamedTuple):
    """One measured deviation and the most that it may be."""

    golden: str
    what: str
    value: float
    tolerance: float


def network_figures(
    golden: Mapping, config, *, name: str, floor: float = 0.0
) -> list[Figure]:
    """Compare logits, hidden states, loss, gradients and bfloat16 with a golden.

    Gradient norms are compared twice. Those of weights behind a norm are small
    differences of large sums, and a rounding that moves one activation across the kink
    of a leaky ReLU moves them by 0.1 %: PyTorch's own do so when the last bit of the
    input changes (--conditioning). So the guarded figure, relative to the norm plus
    0.1 % of the largest norm, is the least of three inputs that differ by their last
    bit. The plain one is of the golden's input, and leaves out norms below
    `floor` of the largest, which are rounding: those of biases before a norm.
    """
    state_dict = part(golden, "param/")
    graphdef, params = loaded(config, state_dict)
    x = jnp.moveaxis(golden["x"], 1, -1)
    y = jnp.asarray(golden["y"][:, 0])

    @jax.jit
    def loss_and_logits(params, x, y):
        def loss(params):
            logits = nnx.merge(graphdef, params)(x)
            return losses.make("dice_ce")(logits, y), logits

        return jax.value_and_grad(loss, has_aux=True)(params)

    wanted = {k: float(v) for k, v in part(golden, "grad_norm/").items()}

    def norms_of(gradients):
        return norms(convert.to_torch(nnx.merge(graphdef, gradients)))

    (loss, logits), gradients = loss_and_logits(params, x, y)
    found = [norms_of(gradients)]
    for scale in (1 - LAST_BIT, 1 + LAST_BIT):
        found.append(norms_of(loss_and_logits(params, x * np.float32(scale), y)[1]))
    plain = deviations(found[0], wanted, floor=floor)
    guarded = [max(deviations(f, wanted, guard=GUARD).values()) for f in found]
    written = convert.to_torch(nnx.merge(graphdef, params))
    bf16_graph, bf16_params = loaded(
        dataclasses.replace(config, dtype="bfloat16"), state_dict
    )
    bf16 = jax.jit(lambda p, x: nnx.merge(bf16_graph, p)(x))(bf16_params, x)

    unequal = set(written) ^ set(state_dict) or [
        k for k in state_dict if not np.array_equal(written[k], state_dict[k])
    ]
    rows = [("parameters that change on the way out", len(unequal), 0)]
    rows += [("logits, absolute", _absolute(logits, golden["logits"]), 2e-4)]
    if "hidden/0" in golden:
        run = jax.jit(lambda p, x: nnx.merge(graphdef, p).hidden_states(x))
        rows += [
            (f"hidden state {i}, absolute", _absolute(h, golden[f"hidden/{i}"]), 2e-4)
            for i, h in enumerate(run(params, x))
        ]
    rows += [
        ("Dice + CE, absolute", abs(float(loss) - float(golden["dice_ce"])), 1e-6),
        ("gradient norms, guarded relative", min(guarded), 1e-3),
        ("gradient norms, plain relative", max(plain.values()), 5e-3),
        ("bfloat16 logits, relative L2", _relative_l2(bf16, logits), 2e-2),
    ]
    return [Figure(name, what, float(v), tol) for what, v, tol in rows]


def zoo_figures(golden: Mapping, *, name: str) -> list[Figure]:
    """Compare a network of `ZOO` with its golden, and what more that holds."""
    figures = network_figures(golden, ZOO[name], name=name, floor=1e-6)
    more = parity_rows.FIGURES.get(name, lambda *_: ())(golden, ZOO[name])
    return figures + [Figure(name, what, float(v), tol) for what, v, tol in more]


def module_figures(golden: Mapping) -> list[Figure]:
    """Compare the Soft MoE, two Swin blocks and three mergings, with gradients."""
    rngs = nnx.Rngs(0)

    def block(shift):
        return SwinBlock(
            24,
            num_heads=6,
            window_size=(7, 7, 7),
            shift=shift,
            mlp=MLP(24, hidden=96, rngs=rngs),
            rngs=rngs,
        )

    def run_block(module, x):
        return module(x)[0]

    stage, moe = "swinViT.layers1.0.blocks.0.", "swinViT.layers1.0.blocks.0.mlp."
    merging = "swinViT.layers1.0.downsample."
    figures = _module(
        golden,
        "soft_moe",
        SoftMoE(24, SoftMoEConfig(num_experts=4), rngs=rngs),
        moe,
        _call,
    )
    for name, shift in (("plain_block", (0, 0, 0)), ("shifted_block", (3, 3, 3))):
        figures += _module(golden, name, block(shift), stage, run_block)
    for mode in ("legacy", "octants", "octants_v2"):
        module = PatchMerging(24, mode=mode, rngs=rngs)
        figures += _module(golden, f"merging_{mode}", module, merging, _call)
    return figures


def loss_and_window_figures(golden: Mapping) -> list[Figure]:
    """Compare the loss with its gradient, and the sliding window in both blends."""
    logits = jnp.moveaxis(golden["dice_ce/logits"], 1, -1)
    labels = jnp.asarray(golden["dice_ce/y"][:, 0])
    value, gradient = jax.jit(jax.value_and_grad(losses.make("dice_ce")))(
        logits, labels
    )
    figures = [
        Figure("dice_ce", "value", abs(float(value - golden["dice_ce/value"])), 1e-6),
        Figure(
            "dice_ce", "gradient", _absolute(gradient, golden["dice_ce/grad"]), 1e-6
        ),
    ]
    kernel = jnp.asarray(golden["sliding/kernel"]).transpose(2, 3, 4, 1, 0)

    @jax.jit
    def predict(p):
        y = jax.lax.conv_general_dilated(
            p, kernel, (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
        )
        return jnp.tanh(y) * p.mean(axis=(1, 2, 3, 4), keepdims=True)

    for blend in ("constant", "gaussian"):
        result = sliding_window(
            predict,
            np.moveaxis(golden["sliding/volume"], 1, -1)[0],
            window=(32, 32, 32),
            num_classes=3,
            overlap=0.5,
            blend=blend,
        )
        deviation = _absolute(result[None], golden[f"sliding/{blend}"])
        figures.append(Figure("sliding", blend, deviation, 1e-5))
    return figures


def _module(golden, name, module, torch_prefix, call: Callable) -> list[Figure]:
    graphdef, params = nnx.split(module)
    params = _fill(params, part(golden, f"{name}/param/"), torch_prefix)
    x, cotangent = (jnp.asarray(golden[f"{name}/{k}"]) for k in ("in0", "cotangent"))

    @jax.jit
    def run(params, x):
        out, pullback = jax.vjp(lambda p, x: call(nnx.merge(graphdef, p), x), params, x)
        return out, *pullback(cotangent)

    out, param_gradients, x_gradient = run(params, x)
    wanted = _fill(params, part(golden, f"{name}/grad/"), torch_prefix)
    worst = max(
        _relative(a, b)
        for a, b in zip(
            jax.tree.leaves(param_gradients), jax.tree.leaves(wanted), strict=True
        )
    )
    rows = (
        ("output, relative", _relative(out, golden[f"{name}/out"])),
        ("input gradient, relative", _relative(x_gradient, golden[f"{name}/grad_in0"])),
        ("parameter gradients, relative", worst),
    )
    return [Figure(name, what, value, 1e-5) for what, value in rows]


def _fill(params, arrays, torch_prefix):
    """Put the PyTorch arrays of one module into its parameters."""
    ours = torch_prefix.replace(".0.", "/", 1).replace(".", "/")
    flat = []
    for path, leaf in nnx.to_flat_state(params):
        path_name, shape = ours + "/".join(map(str, path)), leaf[...].shape
        name = TORCH_NAMES.name(path_name).removeprefix(torch_prefix)
        many = "{e}" in name
        layout = TORCH_NAMES.layout(path_name, len(shape) - many)
        if many:
            parts = [arrays[name.format(e=e)] for e in range(shape[0])]
            array = np.stack([layout.from_torch(a, shape[1:]) for a in parts])
        else:
            array = layout.from_torch(arrays[name], shape)
        flat.append((path, leaf.replace(jnp.asarray(array))))
    return nnx.from_flat_state(flat)


def _call(module, x):
    return module(x)


def norms(gradients: Mapping) -> dict[str, float]:
    """Return the norm of each array, summed in double precision."""
    return {k: float(np.linalg.norm(g.astype(float))) for k, g in gradients.items()}


def deviations(
    ours: Mapping, theirs: Mapping, *, guard: float = 0.0, floor: float = 0.0
) -> dict[str, float]:
    """Return differences relative to the norms `theirs` plus a share of the largest.

    Norms below the share `floor` of the largest are left out.
    """
    largest = max(theirs.values())
    return {
        k: abs(ours[k] - v) / (v + guard * largest)
        for k, v in theirs.items()
        if v >= floor * largest
    }


def _absolute(ours, theirs):
    """Largest deviation; theirs is [B, C, D, H, W]."""
    return float(np.abs(np.moveaxis(np.asarray(ours), -1, 1) - theirs).max())


def _relative(ours, theirs):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def _relative_l2(ours, theirs):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def all_figures(goldens: Path, *, quick: bool = False) -> list[Figure]:
    """Measure everything that the folder of goldens has a figure for."""
    modules = read(goldens, "modules")
    figures = module_figures(modules) + loss_and_window_figures(modules)
    if quick:
        return figures
    for name, config in NETWORKS.items():
        figures += network_figures(read(goldens, name), config, name=name)
    for name in ZOO:
        figures += zoo_figures(read(goldens, name), name=name)
    return figures


def headline(figures: list[Figure]) -> dict[str, float]:
    """Return the largest deviation of each kind, by flat names."""
    found = {
        "figures": len(figures),
        "beyond": sum(not f.value <= f.tolerance for f in figures),
    }
    for f in figures:
        kind = f"{f.golden} {f.what}" if f.golden in ("dice_ce", "sliding") else f.what
        key = re.sub(r"\W+", "_", re.sub(r" \d+", "", kind.lower())).strip("_")
        found[key] = max(found.get(key, 0.0), f.value)
    return found


def print_table(figures: list[Figure]) -> None:
    """Print one row for each figure."""
    for f in figures:
        verdict = "ok" if f.value <= f.tolerance else "BEYOND"
        print(
            f"{f.golden:26} {f.what:46} {f.value:9.2e} <= {f.tolerance:7.0e} {verdict}"
        )


def main(options):
    """Print the table, write it if asked, and fail if a figure is beyond."""
    if options.conditioning:
        from benchmarks import conditioning

        return conditioning.report(Path(options.goldens), quick=options.quick)
    figures = all_figures(Path(options.goldens), quick=options.quick)
    print_table(figures)
    save(headline(figures), rows=[f._asdict() for f in figures])
    return int(any(not f.value <= f.tolerance for f in figures))


if __name__ == "__main__":
    flags.DEFINE_string("goldens", "../shared/parity", "folder of goldens")
    flags.DEFINE_bool("conditioning", False, "how much of gradients' norms is rounding")
    run(main, quick="no networks")
