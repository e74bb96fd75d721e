"""Several runs as one network: the mean of probabilities, classes by name."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swinsmt_jax.checks import UserError
from swinsmt_jax.config import from_config_dict, to_dict
from swinsmt_jax.inference.ensemble import load_networks, workdirs_of


def experiment(*classes, **data):
    model = {"name": "swin_unetr", "in_channels": 1, "out_channels": 1 + len(classes)}
    given = {"root": "x", "patch_shape": (32, 32, 32), "batch_size": 1}
    return from_config_dict(
        {
            "model": model | {"feature_size": 12},
            "data": given | {"classes": classes, **data},
            "optimizer": {"learning_rate": 1e-3},
            "training": {"num_steps": 1},
        }
    )


def of(logits):
    def network(logits, windows):
        return jnp.broadcast_to(logits, (*windows.shape[:-1], len(logits)))

    return jax.tree_util.Partial(network, jnp.array(logits, jnp.float32))


NETWORKS = {
    "a": (experiment("liver", "spleen"), of([0.0, 2.0, 1.0]), {"step": 3}),
    "b": (experiment("Spleen", "liver"), of([1.0, 5.0, 0.0]), {"step": 5}),
    "c": (experiment("liver", "colon"), of([0.0, 0.0, 0.0]), {"step": 1}),
    "e": (
        from_config_dict(
            to_dict(experiment("liver", "spleen"))
            | {"training": {"num_steps": 1, "loss": "one_vs_all"}}
        ),
        of([0.0] * 3),
        {"step": 1},
    ),
    "d": (experiment("liver", "spleen", spacing=2.0), of([0.0] * 3), {"step": 1}),
}


def read(workdir, *, step):
    return NETWORKS[workdir.name]


def test_probabilities_are_averaged_by_the_names_of_classes():
    config, model, info = load_networks([Path("a"), Path("b")], load=read)
    assert config == NETWORKS["a"][0] and info["step"] == [3, 5]
    found = jax.jit(model)(jnp.zeros((1, 2, 2, 2, 1)))[0, 0, 0, 0]
    one, other = jax.nn.softmax(jnp.array([[0.0, 2, 1], [1, 0, 5]]))
    np.testing.assert_allclose(np.exp(found), (one + other) / 2, rtol=1e-5)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ("c", "no class colon|no class spleen"),
        ("d", "data.spacing differ: 2.0 and 0"),
        ("e", "training.loss are one_vs_all and dice_ce"),
    ],
)
def test_networks_that_do_not_fit_each_other_are_refused(other, words):
    with pytest.raises(UserError, match=words):
        load_networks([Path("a"), Path(other)], load=read)


def test_one_network_stays_as_it_is(tmp_path, monkeypatch):
    config, model, _ = load_networks([Path("a")], load=read)
    assert (config, model) == NETWORKS["a"][:2] and replace(config) == config
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x,y").mkdir()
    assert workdirs_of("x,y") == [tmp_path / "x,y"]
    assert workdirs_of("a,b") == workdirs_of(["a", "b"]) == [tmp_path / x for x in "ab"]
