"""python -m swinsmt_jax.phantoms: write a dataset of phantoms."""

from swinsmt_jax.phantoms.dataset import main

main()
