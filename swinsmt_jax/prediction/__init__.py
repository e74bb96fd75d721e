"""Segment scans with a trained network: files or arrays in, labels on their grid out.

from swinsmt_jax import prediction
segmenter = prediction.load("runs/x")
labels = segmenter.segment("scan.nii.gz")         # uint8, in the axes of the file
labels = segmenter.segment_array(hu, affine)      # hu [X, Y, Z], in any axes
prediction.save("labels.nii.gz", labels, like="scan.nii.gz")
"""

from swinsmt_jax.prediction.scans import Wishes, find_scans, segment_scans
from swinsmt_jax.prediction.segmenter import Segmenter, load, save

__all__ = ["Segmenter", "Wishes", "find_scans", "load", "save", "segment_scans"]
