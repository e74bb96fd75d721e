#!/usr/bin/env bash
# safetensors 0.8.0: save_file writes the raw buffer of a NumPy array that is not C-contiguous (a transpose, a flip,
# a slice). Name, shape and dtype are right, the values are wrong, and nothing is raised.
# 0.7.0 wrote the values. Anyone who transposes kernels between PyTorch's layout and channels-last
# just before saving ships wrong weights. Call np.ascontiguousarray first (it turns shape () into (1,)).
. "$(dirname "$0")/lib.sh"
cat > run.py <<'PY'
import numpy as np, safetensors
from safetensors.numpy import load_file, save_file

kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
views = {"transposed": kernel.T, "flipped": kernel[::-1], "whole": kernel}
save_file(views, "weights.safetensors")
back = load_file("weights.safetensors")
same = {name: bool(np.array_equal(back[name], view)) for name, view in views.items()}
print("safetensors", safetensors.__version__, "numpy", np.__version__, "equal after a round trip:", same)
new = safetensors.__version__ == "0.8.0"
raise SystemExit(same != {"transposed": not new, "flipped": not new, "whole": True})
PY
venv "safetensors==0.7.0" "numpy==2.2.6"
"$py" run.py || exit 1
"$here/venv/bin/pip" install -q "safetensors==0.8.0" >pip.log 2>&1 || exit 2
"$py" run.py
