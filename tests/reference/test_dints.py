"""DiNTS against MONAI's, with other architectures than the published one."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.goldens import loaded
from swinsmt_jax import convert
from swinsmt_jax.models.dints import DiNTSConfig

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch")
nets = pytest.importorskip("monai.networks.nets")

DOCS = Path(__file__).resolve().parents[2] / "docs" / "networks.md"
# Inputs that are off, a last column without its coarsest map, odd widths.
ARCHITECTURES = {
    "two_depths": ("1.2.", "3041"),
    "coarse_input_alone": ("..2.", "...4"),
    "three_depths": ("1.23.41", "123.401", "4..1..."),
}


def arrays(rows):
    """Return MONAI's node_a, arch_code_a and arch_code_c."""
    exists = np.array([[o != "." for o in row] for row in rows], int)
    operations = np.array([[int(o.replace(".", "0")) for o in row] for row in rows])
    nodes = np.zeros((len(rows) + 1, (len(rows[0]) + 2) // 3), int)
    for block, row in enumerate(exists):
        for path in np.flatnonzero(row):
            target, step = divmod(path + 1, 3)
            nodes[block + 1, target] = 1
            if block == 0:
                nodes[0, target - 1 + step] = 1
    return nodes, exists, operations


@pytest.mark.parametrize(
    ("name", "use_downsample"),
    [("two_depths", True), ("coarse_input_alone", True), ("three_depths", False)],
)
def test_logits_and_gradients(name, use_downsample):
    nodes, exists, operations = arrays(ARCHITECTURES[name])
    options = {"channel_mul": 5 / 32, "use_downsample": use_downsample}
    config = DiNTSConfig(2, 3, architecture=ARCHITECTURES[name], **options)
    torch.manual_seed(0)
    space = nets.TopologyInstance(
        num_blocks=len(exists),
        num_depths=nodes.shape[1],
        arch_code=[exists, operations],
        **options,
    )
    network = nets.DiNTS(
        space, 2, 3, use_downsample=use_downsample, node_a=torch.tensor(nodes)
    )
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            parameter += 0.02 * torch.randn_like(parameter) + key.endswith("bias")
    x = torch.randn(1, 2, 16, 8, 24)
    expected = network(x)
    expected.square().mean().backward()
    graphdef, params = loaded(config, network.state_dict())

    @jax.jit
    def run(params, x):
        def loss(params):
            logits = nnx.merge(graphdef, params)(x)
            return jnp.square(logits).mean(), logits

        return jax.grad(loss, has_aux=True)(params)

    gradients, logits = run(params, jnp.asarray(x.permute(0, 2, 3, 4, 1).numpy()))
    expected = expected.detach().permute(0, 2, 3, 4, 1).numpy()
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    ours = convert.to_torch(nnx.merge(graphdef, gradients))
    for key, parameter in network.named_parameters():
        wanted = 0.0 if parameter.grad is None else float(parameter.grad.norm())
        assert np.linalg.norm(ours[key]) == pytest.approx(wanted, 1e-3, 1e-6), key


def test_the_docs_make_a_file_of_what_a_search_saves(tmp_path, monkeypatch):
    rows = ARCHITECTURES["three_depths"]
    nodes, exists, operations = arrays(rows)
    monkeypatch.chdir(tmp_path)
    found = {"node_a": nodes.astype(float), "arch_code_a": exists.astype(float)}
    found |= {"arch_code_c": operations, "arch_code_a_max": exists, "iter_num": 3}
    torch.save(found, "search_code.pth")
    code = re.search(r"```python\n(import json.*?)```", DOCS.read_text(), re.DOTALL)[1]
    exec(code, {})
    assert "node_a" in json.loads(Path("searched.json").read_text())
    assert DiNTSConfig(1, 2, architecture="searched.json").architecture == rows
