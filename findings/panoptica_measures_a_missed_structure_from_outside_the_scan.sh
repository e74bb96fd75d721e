#!/usr/bin/env bash
# panoptica 2.1.7: if the prediction lacks a structure, Metric.HD95 is the 95th percentile of its surface's distances
# to the voxel (-1, 0, 0), one before the scan's first: 15.2 mm for a cube near that corner, 27.2 mm for the same cube
# elsewhere. It looks like a measured distance, and flipping an axis changes it. ASSD of the same pair is NaN.
. "$(dirname "$0")/lib.sh"
cat > run.py <<'PY'
from importlib import metadata
import numpy as np
from panoptica.metrics import Metric
from scipy import ndimage

def missed(start):
    truth = np.zeros((20, 20, 20), bool)
    truth[tuple(slice(a, a + 5) for a in start)] = True
    surface = np.argwhere(truth ^ ndimage.binary_erosion(truth))
    outside = np.percentile(np.linalg.norm(surface - [-1, 0, 0], axis=1), 95)
    return float(Metric.HD95(truth, np.zeros_like(truth))), float(outside)

near, far = missed((5, 5, 5)), missed((12, 12, 12))
print("panoptica", metadata.version("panoptica"), "HD95 and distance to (-1, 0, 0):", near, far)
raise SystemExit(not (np.allclose(*near) and np.allclose(*far) and far[0] > near[0] > 0))
PY
venv "panoptica==2.1.7" "numpy==2.2.6"
"$py" run.py 2>/dev/null
