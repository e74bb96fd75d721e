import jax
import jax.numpy as jnp
from flax import nnx

from swinsmt_jax.layers import recompute
from swinsmt_jax.layers.conv import ResidualBlock


def test_recomputation_spares_memory_and_changes_no_gradient():
    blocks = [ResidualBlock(4, 4, rngs=nnx.Rngs(i)) for i in range(4)]
    graphdef, params = nnx.split(nnx.List(blocks))
    x = jax.random.normal(jax.random.key(0), (1, 16, 16, 16, 4))

    def gradient(spares):
        run = recompute.maybe_remat(spares)

        def loss(params, x):
            for block in nnx.merge(graphdef, params):
                x = run(block, x)
            return jnp.square(x).mean()

        options = recompute.compiler_options("cpu")
        program = jax.jit(jax.grad(loss), compiler_options=options)
        compiled = program.lower(params, x).compile()
        memory = compiled.memory_analysis().temp_size_in_bytes
        return memory, compiled(params, x)

    (spared, ours), (kept, theirs) = gradient(True), gradient(False)
    assert spared < 0.7 * kept
    close = jax.tree.map(lambda a, b: jnp.allclose(a, b, atol=1e-6), ours, theirs)
    assert all(jax.tree.leaves(close))
