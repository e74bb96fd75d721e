"""Segment a scan in Python and print the volumes of its structures.

    python examples/volumes.py runs/demo data/phantoms/s0036/ct.nii.gz

The same lines work in a notebook.
"""

import sys

import numpy as np

from swinsmt_jax import load
from swinsmt_jax.inference.segmenter import load_scan


def main(workdir: str, scan: str) -> None:
    """Print millilitres of every structure found, the largest first."""
    segmenter = load(workdir)
    labels = segmenter.segment(scan)  # uint8, in the axes of the file
    millilitres = abs(np.linalg.det(load_scan(scan).affine[:3, :3])) / 1000
    voxels = np.bincount(labels.reshape(-1), minlength=256)
    for number in np.argsort(-voxels[1:]) + 1:
        if voxels[number]:
            name = segmenter.class_names[number]
            print(f"{name:32} {voxels[number] * millilitres:10.1f} ml")


if __name__ == "__main__":
    main(*sys.argv[1:])
