"""One page that shows a scan with its labels, offline; needs the extra `view`.

NiiVue draws the page. It comes from the package ipyniivue, whose module for notebooks
contains it but does not export it.
"""

import base64
import gzip
import importlib.util
import re
from importlib import metadata, resources
from pathlib import Path

import nibabel as nib
import numpy as np

from swinsmt_jax import checks
from swinsmt_jax.data.label_table import colour
from swinsmt_jax.results import anatomy, statistics
from swinsmt_jax.results.result import Result
from swinsmt_jax.runtime import html

MAX_VOXELS = 2**26  # of what is shown; larger scans are thinned
LIBRARY = "ipyniivue"


def require() -> None:
    """Raise `UserError` without the extra."""
    checks.require(
        importlib.util.find_spec(LIBRARY) is not None,
        'pages with a viewer need ipyniivue: pip install "swinsmt_jax[view]".',
    )


def write(path: Path, result: Result, *, truth: np.ndarray | None = None) -> None:
    """Write an HTML page with CT, labels, names, colours, statistics and warnings.

    With `truth`, label ids [X, Y, Z], it is shown beside the result. Of a scan of more
    than `MAX_VOXELS` every second, third, ... voxel is shown, which the page says;
    statistics are of all voxels.

    Raises:
        UserError: as `require`.
    """
    require()
    shape = np.array(result.labels.shape)
    step = next(n for n in range(1, 99) if np.prod(-(-shape // n)) <= MAX_VOXELS)
    affine = result.volume.affine @ np.diag([step, step, step, 1])
    thin = (slice(None, None, step),) * 3
    maps = {"labels": result.labels}
    shown = Result(result.volume, result.labels, result.names)
    if truth is not None:
        maps = {"truth": truth, **maps}
        shown = Result(result.volume, truth, result.names)
    measured = statistics.measure(result)
    numbers = sorted({*result.boxes, *shown.boxes})
    page = html.render(
        "viewer.html",
        title=result.volume.path.name,
        library=_niivue(),
        version=f"{LIBRARY} {metadata.version(LIBRARY)}",
        step=step,
        ct=_packed(result.volume.array[thin].astype(np.int16), affine),
        maps=[
            {"title": title, "nifti": _packed(_shifted(labels[thin]), affine)}
            for title, labels in maps.items()
        ],
        beside=truth is not None,
        confident=result.probability is not None,
        warnings=[found.reason for found in anatomy.check(result)],
        structures=[
            {
                "id": number + 1,
                "name": result.names[number],
                "rgb": [round(255 * part) for part in colour(number)],
                "centre": _inside(result if number in result.boxes else shown, number),
                "truth_ml": _millilitres(shown, number),
                **measured[result.names[number]],
            }
            for number in numbers
        ],
    )
    path.write_text(page, encoding="utf-8")


def _packed(array, affine):
    """Return a volume as compressed NIfTI in base64."""
    image = nib.Nifti1Image(np.ascontiguousarray(array), affine)
    return base64.b64encode(gzip.compress(image.to_bytes(), 6)).decode()


def _shifted(labels):
    """Return ids from 2 on: renderers that round let id 1 shine through where 0 is."""
    return np.where(labels > 0, labels.astype(np.int16) + 1, 0).astype(np.int16)


def _millilitres(result, number):
    there = number in result.boxes
    return np.count_nonzero(result.mask(number)) * result.voxel_ml if there else 0.0


def _inside(result, number):
    """Return the place in mm of the voxel nearest to a structure's centre."""
    voxels = np.argwhere(result.mask(number))
    nearest = voxels[np.abs(voxels - voxels.mean(0)).sum(1).argmin()]
    start = [part.start for part in result.boxes[number]]
    return np.round(result.to_mm((nearest + start)[None])[0], 2).tolist()


def _niivue():
    """Return NiiVue as a script that sets `window.Niivue`."""
    module = resources.files(LIBRARY) / "static" / "widget.js"
    text = module.read_text(encoding="utf-8")
    canvas = re.search(r"\b(\w{1,9})\.attachToCanvas\(\w+,\1\.opts\.", text)
    made = canvas and re.search(rf"[;,]{canvas[1]}=new (\w+)\(", text)
    checks.require(
        bool(made) and text.rstrip().endswith(" as default};"),
        f"{LIBRARY} {metadata.version(LIBRARY)} holds NiiVue in another form than "
        'this program knows; pip install "swinsmt_jax[view]" takes one that it knows.',
    )
    assert made
    body = text[: text.rindex("export{")]
    return f"{body};window.Niivue={made[1]};".replace("</script", "<\\/script")
