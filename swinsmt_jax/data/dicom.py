"""A CT series of DICOM files as a volume; needs the extra `dicom` (SimpleITK)."""

from pathlib import Path

import numpy as np

from swinsmt_jax import checks
from swinsmt_jax.data import nifti

PREAMBLE = 128  # bytes before the letters DICM
TOLERANCE = 0.1  # mm by which a slice may lie elsewhere than its neighbours say
POSITION, MODALITY = "0020|0032", "0008|0060"


def is_series(folder: Path) -> bool:
    """Whether a folder holds a DICOM file, by its content."""
    return next(_dicom_files(folder), None) is not None


def load_series(folder: str | Path) -> nifti.Volume:
    """Read the CT of a folder as int16 Hounsfield units in RAS orientation.

    The distance and direction between slices are those of their positions, so that a
    tilted gantry gives a sheared affine, as NIfTI has it.

    Raises:
        UserError: without SimpleITK; for a folder without DICOM files or with several
            series, files that cannot be read, another modality, and slices that are
            missing or unevenly spaced.
    """
    try:
        import SimpleITK as sitk  # noqa: N813
    except ImportError as error:
        raise checks.UserError(
            f"{folder} holds DICOM files, and reading them needs SimpleITK: "
            'pip install "swinsmt_jax[dicom]", or convert them to NIfTI.'
        ) from error
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # what matters is checked below
    find = sitk.ImageSeriesReader
    series = {
        number: find.GetGDCMSeriesFileNames(str(folder), number)
        for number in find.GetGDCMSeriesIDs(str(folder))
    }
    counts = ", ".join(f"{number} ({len(files)})" for number, files in series.items())
    checks.require(
        len(series) == 1,
        f"{folder} holds {len(series)} DICOM series, but must hold one: "
        f"{counts or 'none'}. Put each into a folder of its own.",
    )
    (files,) = series.values()
    read = {Path(file).name for file in files} | {"DICOMDIR"}
    others = [f.name for f in _dicom_files(Path(folder)) if f.name not in read]
    checks.require(
        not others,
        f"{folder}: {len(others)} DICOM files are damaged or no slices of the series: "
        f"{', '.join(sorted(others)[:5])}. Export the series again.",
    )
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(files)
    reader.MetaDataDictionaryArrayUpdateOn()
    try:
        image = reader.Execute()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise checks.UserError(
            f"the DICOM series in {folder} cannot be read: {reason}"
        ) from error

    def tag(i, name):
        return reader.GetMetaData(i, name) if reader.HasMetaDataKey(i, name) else ""

    modality = tag(0, MODALITY).strip()
    checks.require(
        modality == "CT",
        f"{folder} holds a series of the modality {modality!r}, but must hold CT.",
    )
    axes = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    origin = np.array(image.GetOrigin())
    if len(files) > 1:
        places = np.array(
            [
                [float(x) for x in tag(i, POSITION).split("\\")]
                for i in range(len(files))
            ]
        )
        _require_even(places, folder)
        axes[:, 2] = (places[-1] - places[0]) / (len(files) - 1)
        origin = places[0]
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes, origin
    affine = (
        np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    )  # left and back to right and front
    return nifti.from_array(
        sitk.GetArrayViewFromImage(image).transpose(2, 1, 0), affine, path=Path(folder)
    )


def _require_even(places, folder):
    steps = np.diff(places, axis=0)
    step = np.median(steps, axis=0)
    off = np.linalg.norm(steps - step, axis=1)
    i = int(off.argmax())
    length = np.linalg.norm(steps[i])
    checks.require(
        off[i] <= TOLERANCE,
        f"{folder}: slices {i + 1} and {i + 2} lie {length:.2f} mm apart, but others "
        f"{np.linalg.norm(step):.2f} mm; slices are missing, doubled or unevenly "
        "spaced. Export the series again.",
    )


def _dicom_files(folder):
    for file in filter(Path.is_file, folder.iterdir()):
        with file.open("rb") as stream:
            if stream.read(PREAMBLE + 4)[PREAMBLE:] == b"DICM":
                yield file
