"""Volumes in NRRD and MetaImage files; needs SimpleITK from the extra `dicom`."""

import importlib.util
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np

from swinsmt_jax import checks
from swinsmt_jax.data import geometry

SUFFIXES = (".nrrd", ".mha", ".mhd")
TABLE = "label_table"  # the key under which names of label ids are kept
TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK's axes run to the left and back


def is_itk(path: Path) -> bool:
    """Whether a file's name belongs to one of these formats."""
    return path.suffix.lower() in SUFFIXES


def opened(path: Path) -> nib.Nifti1Image:
    """Return the header of a file in nibabel's form; voxels are read on request.

    Names of label ids from `write` become NIfTI's header extension.

    Raises:
        UserError: without the extra, and for other files.
    """
    sitk = _library(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise checks.UserError(
            f"{path} cannot be read as NRRD or MetaImage "
            f"({str(error).strip().splitlines()[-1]}); copy or export it again."
        ) from error
    shape, count = reader.GetSize(), reader.GetNumberOfComponents()
    checks.require(
        count == 1,
        f"{path} has {count} values in each voxel, but a scan has one; export it "
        "without colours.",
    )
    affine = np.eye(4)
    direction = np.reshape(reader.GetDirection(), (len(shape),) * 2)
    sides = np.array(reader.GetSpacing())[:3]
    known = min(len(shape), 3)
    affine[:known, :known] = direction[:known, :known] * sides
    affine[:known, 3] = reader.GetOrigin()[:3]
    header = geometry.header_like(None, TO_RAS @ affine, shape)
    image = nib.Nifti1Image(_Voxels(path, sitk, reader), TO_RAS @ affine, header)
    if reader.HasMetaDataKey(TABLE):
        table = nib.nifti1.Nifti1Extension(0, reader.GetMetaData(TABLE).encode())
        image.header.extensions.append(table)
    return image


def write(path: Path, array: np.ndarray, affine: np.ndarray, *, table: str) -> None:
    """Write an array [X, Y, Z] to a compressed file.

    Args:
        path: .nrrd or .mha.
        array: in any axes.
        affine: [4, 4], voxel indices to mm to the right, front and head.
        table: of label ids, from `label_table.xml`.

    Raises:
        UserError: without the extra, and for axes that are not at right angles.
    """
    sitk = _library(path)
    checks.require(
        geometry.skew(affine) < geometry.SKEW,
        f"{path} cannot be written: the scan's axes are not at right angles, which "
        "NRRD and MetaImage files of ITK cannot say; give --format=nii.gz.",
    )
    lps = TO_RAS @ affine
    sides = np.linalg.norm(lps[:3, :3], axis=0)
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing(sides.tolist())
    image.SetDirection((lps[:3, :3] / sides).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    if table:
        image.SetMetaData(TABLE, table)
    sitk.WriteImage(image, str(path), useCompression=True)


class _Voxels:
    """Reads a file on conversion to an array, as nibabel's ArrayProxy does."""

    slope, inter, offset = 1, 0, 0

    def __init__(self, path, sitk, reader):
        pixel = sitk.Image([1] * reader.GetDimension(), reader.GetPixelID())
        self.shape = reader.GetSize()
        self.dtype = sitk.GetArrayViewFromImage(pixel).dtype
        self.ndim = len(self.shape)
        self._read = lambda: sitk.GetArrayFromImage(sitk.ReadImage(str(path))).T
        self._path = path

    def __array__(self, dtype=None, copy=None):
        _require_whole(self._path)
        return self._read().astype(dtype or self.dtype, copy=False)


def _require_whole(path):
    """Raise `zlib.error` for a compressed MetaImage with a wrong checksum.

    ITK itself prints a line and returns what it has read.
    """
    if path.suffix.lower() == ".nrrd":
        return
    with path.open("rb") as file:
        header = {}
        while "ElementDataFile" not in header:
            key, _, value = file.readline(4096).decode("latin-1").partition("=")
            header[key.strip()] = value.strip()
            if not key:
                return  # no MetaImage; ITK says so
        if header.get("CompressedData", "").lower() != "true":
            return
        place = header["ElementDataFile"]
        content = (
            file.read() if place == "LOCAL" else (path.parent / place).read_bytes()
        )
    zlib.decompress(content)


def _library(path):
    checks.require(
        importlib.util.find_spec("SimpleITK") is not None,
        f'{path} needs SimpleITK: pip install "swinsmt_jax[dicom]".',
    )
    import SimpleITK as sitk  # noqa: N813

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    return sitk
