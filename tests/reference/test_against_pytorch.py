"""Swin SMT and Swin UNETR against MONAI and soft-moe-pytorch, with fresh weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from swinsmt_jax import SwinSMTConfig, SwinUNETRConfig, convert, models
from swinsmt_jax.inference.sliding_window import sliding_window
from swinsmt_jax.training import losses

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore"),
]
torch = pytest.importorskip("torch")
pytest.importorskip("monai.networks.nets")
pytest.importorskip("soft_moe_pytorch")
pytorch_network = pytest.importorskip("benchmarks.pytorch_network")

CASES = {
    "smt_e8_not_cubic": (
        SwinSMTConfig(
            in_channels=1,
            out_channels=4,
            feature_size=12,
            num_experts=8,
            num_moe_stages=2,
            patch_merging="octants_v2",
        ),
        (64, 32, 96),
    ),
    "smt_e5_v2": (
        SwinSMTConfig(
            in_channels=2,
            out_channels=3,
            feature_size=12,
            num_experts=5,
            num_moe_stages=3,
            residual_conv=True,
        ),
        (64, 64, 32),
    ),
    "smt_e4_learned_slots_streaming": (
        SwinSMTConfig(
            in_channels=1,
            out_channels=3,
            feature_size=12,
            num_experts=4,
            num_moe_stages=3,
            window_size=4,
            slots="learned",
            slots_per_expert=3,
            routing="streaming",
        ),
        (64, 32, 32),
    ),
    "unetr_window_not_cubic": (
        SwinUNETRConfig(
            in_channels=1,
            out_channels=3,
            feature_size=12,
            window_size=(4, 7, 5),
            depths=(2, 2, 4, 2),
            qkv_bias=False,
        ),
        (64, 64, 64),
    ),
}


def renamed(named):
    """Leave out the container in which SoftMoE, unlike DynamicSlots, has experts."""
    return {name.replace("experts.experts", "experts"): v for name, v in named.items()}


@pytest.mark.parametrize("name", CASES)
def test_logits_loss_and_gradients(name):
    from monai.losses import DiceCELoss

    config, shape = CASES[name]
    torch.manual_seed(0)
    network = pytorch_network.create(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    x = torch.randn(1, config.in_channels, *shape)
    y = torch.randint(0, config.out_channels, (1, 1, *shape))
    expected = network(x)
    expected_loss = DiceCELoss(to_onehot_y=True, softmax=True)(expected, y)
    expected_loss.backward()

    graphdef, params = nnx.split(
        nnx.eval_shape(lambda: models.create(config, rngs=nnx.Rngs(0)))
    )
    params = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), params)
    model = nnx.merge(graphdef, params)
    convert.load_torch(model, renamed(network.state_dict()))
    graphdef, params = nnx.split(model)

    @jax.jit
    def run(params, x, y):
        def loss(params):
            logits = nnx.merge(graphdef, params)(x)
            return losses.make("dice_ce")(logits, y), logits

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, logits), gradients = run(
        params, jnp.asarray(x.permute(0, 2, 3, 4, 1).numpy()), jnp.asarray(y[:, 0])
    )
    expected = expected.detach().permute(0, 2, 3, 4, 1).numpy()
    np.testing.assert_allclose(logits, expected, atol=2e-4)
    np.testing.assert_allclose(loss, float(expected_loss), atol=1e-5)
    ours = convert.to_torch(nnx.merge(graphdef, gradients))
    theirs = renamed({n: p.grad.numpy() for n, p in network.named_parameters()})
    assert ours.keys() == theirs.keys()
    largest = max(np.linalg.norm(g) for g in theirs.values())
    for key, gradient in theirs.items():
        # A rounding that moves one activation across the kink of a leaky ReLU changes
        # gradients by some 1e-6 of the largest, which is 1 % of the smallest ones.
        norm = np.linalg.norm(gradient)
        deviation = abs(np.linalg.norm(ours[key]) - norm)
        assert deviation < 3e-3 * norm + 1e-5 * largest, (key, deviation, norm)


def test_a_written_state_dict_loads_strictly_into_pytorch():
    config, _ = CASES["smt_e8_not_cubic"]
    model = models.create(config, rngs=nnx.Rngs(0))
    state_dict = convert.to_torch(model, buffers=True)
    network = pytorch_network.create(config)
    network.load_state_dict({k: torch.tensor(v) for k, v in state_dict.items()})


@pytest.mark.parametrize("overlap", [0.25, 0.6])
def test_sliding_window(overlap):
    from monai.inferers import sliding_window_inference

    rng = np.random.default_rng(0)
    volume = rng.standard_normal((40, 20, 33, 1)).astype("f4")

    def predict(p):
        return jnp.concatenate([p, p * p.mean((1, 2, 3, 4), keepdims=True)], -1)

    def torch_predict(p):
        return torch.cat([p, p * p.mean((1, 2, 3, 4), keepdim=True)], 1)

    ours = sliding_window(
        jax.jit(predict),
        volume,
        window=(16, 32, 16),
        num_classes=2,
        overlap=overlap,
        blend="gaussian",
    )
    theirs = sliding_window_inference(
        torch.tensor(volume).permute(3, 0, 1, 2)[None],
        (16, 32, 16),
        1,
        torch_predict,
        overlap=overlap,
        mode="gaussian",
    )
    np.testing.assert_allclose(ours, theirs[0].permute(1, 2, 3, 0), atol=1e-5)
