"""One volume through many resamplers and windows; for `benchmarks.conventions`.

The image has 40 voxels of 1 mm along its last axis, whose values are their places in
mm, and goes to 1.5 mm, linearly. The labels are its slices 11 to 20, at 2 mm. Each
function takes array, spacing in mm and order (1 or 0), and returns the new array and
its affine, None if the tool does not have one. A Gaussian that smooths first is off.
"""

import warnings

import nibabel as nib
import numpy as np

SHAPE = (6, 6, 40)


def image() -> np.ndarray:
    """Return the volume of places in mm."""
    return np.broadcast_to(np.arange(40, dtype=np.float32), SHAPE).copy()


def slices() -> np.ndarray:
    """Return the label map."""
    return ((image() >= 11) & (image() <= 20)).astype(np.float32)


def ours(array, spacing, order):
    from swinsmt_jax.data import resampling

    kind = np.uint8 if order == 0 else np.float32
    return resampling.resample(
        array.astype(kind), np.eye(4), spacing=spacing, order=order, rule="nearest"
    )


def scipy_zoom(array, spacing, order):
    from scipy import ndimage

    return ndimage.zoom(array, 1 / spacing, order=order), None


def skimage_resize(array, spacing, order):
    from skimage.transform import resize

    shape = np.round(np.array(array.shape) / spacing).astype(int)
    return resize(array, shape, order=order, mode="edge", anti_aliasing=False), None


def nnunet(array, spacing, order):
    from nnunetv2.preprocessing.resampling import default_resampling as tool

    shape = tool.compute_new_shape(array.shape, (1, 1, 1), (spacing,) * 3)
    options = {"is_seg": order == 0, "order": order, "force_separate_z": False}
    found = tool.resample_data_or_seg_to_shape(
        array[None], shape, (1, 1, 1), (spacing,) * 3, **options
    )
    return np.asarray(found[0]), None


def monai(array, spacing, order):
    from monai.data import MetaTensor
    from monai.transforms import Spacing

    mode = "bilinear" if order else "nearest"
    move = Spacing((spacing,) * 3, mode=mode, padding_mode="border")
    found = move(MetaTensor(array[None], affine=np.eye(4)))
    return found[0].numpy(), found.affine.numpy()


def torchio(array, spacing, order):
    import torch
    import torchio as tool

    kind = tool.ScalarImage if order else tool.LabelMap
    made = kind(tensor=torch.from_numpy(array[None]), affine=np.eye(4))
    found = tool.Resample(spacing)(made)
    return found.data[0].numpy(), found.affine


def nibabel(array, spacing, order):
    from nibabel import processing

    made = nib.Nifti1Image(array, np.eye(4))
    found = processing.resample_to_output(made, spacing, order=order, mode="nearest")
    return found.get_fdata(), found.affine


def nilearn(array, spacing, order):
    from nilearn import image as tool

    made = nib.Nifti1Image(array, np.eye(4))
    found = tool.resample_img(
        made,
        np.eye(3) * spacing,
        interpolation="linear" if order else "nearest",
        force_resample=True,
        copy_header=True,
    )
    return found.get_fdata(), found.affine


def torch_interpolate(array, spacing, order):
    import torch

    mode = {"mode": "trilinear", "align_corners": False} if order else {}
    tensor = torch.from_numpy(array[None, None])
    function = torch.nn.functional.interpolate
    return function(tensor, scale_factor=1 / spacing, **mode)[0, 0].numpy(), None


def totalsegmentator(array, spacing, order):
    from totalsegmentator.resampling import change_spacing

    made = nib.Nifti1Image(array, np.eye(4))
    found = change_spacing(made, (spacing,) * 3, order=order)
    return found.get_fdata(), found.affine


RESAMPLERS = {  # title: (function, package)
    "swinsmt_jax": (ours, ""),
    "scipy `zoom`": (scipy_zoom, "scipy"),
    "skimage `resize`": (skimage_resize, "scikit-image"),
    "nnU-Net": (nnunet, "nnunetv2"),
    "MONAI `Spacing`": (monai, "monai"),
    "torchio `Resample`": (torchio, "torchio"),
    "nibabel": (nibabel, "nibabel"),
    "nilearn": (nilearn, "nilearn"),
    "torch `interpolate`": (torch_interpolate, "torch"),
    "TotalSegmentator": (totalsegmentator, "TotalSegmentator"),
}


def row(resampler) -> list[str]:
    """Return length, first and last value, error of the affine, and label slices."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, affine = resampler(image(), 1.5, 1)
        labels, _ = resampler(slices(), 2.0, 0)
    line = found[3, 3]
    said = "none"
    if affine is not None:
        places = affine[2, 2] * np.arange(len(line)) + affine[2, 3]
        worst = np.abs(line - places)
        said = f"{worst.max():.3g} mm" + (" at the end" if worst[-1] > 1e-3 else "")
    filled = np.flatnonzero(np.asarray(labels)[2, 2] > 0.5)
    return [
        str(len(line)),
        f"{line[0]:.3f}, {line[-1]:.3f}",
        said,
        f"{filled[0]}-{filled[-1]} of {labels.shape[2]}",
    ]


CASES = (  # image, patch, overlap
    (260, 20, 0.9),
    (160, 96, 0.9),
    (82, 33, 0.5),
    (110, 64, 0.5),
    (97, 32, 0.5),
)


def our_windows(length, side, overlap):
    from swinsmt_jax.inference.windows import window_starts

    return [start for (start,) in window_starts((length,), (side,), overlap=overlap)]


def monai_windows(length, side, overlap):
    from monai.data.utils import dense_patch_slices
    from monai.inferers.utils import _get_scan_interval

    step = _get_scan_interval((length,), (side,), 1, (overlap,))
    return [s[0].start for s in dense_patch_slices((length,), (side,), step)]


def nnunet_windows(length, side, overlap):
    from nnunetv2.inference.sliding_window_prediction import (
        compute_steps_for_sliding_window,
    )

    return compute_steps_for_sliding_window((length,), (side,), 1 - overlap)[0]


WINDOWS = {
    "swinsmt_jax": (our_windows, ""),
    "MONAI": (monai_windows, "monai"),
    "nnU-Net": (nnunet_windows, "nnunetv2"),
}


def starts(windows, case) -> str:
    """Return the first voxels of windows, or how many there are of them."""
    found = windows(*case)
    return ", ".join(map(str, found)) if len(found) < 7 else f"{len(found)} windows"
