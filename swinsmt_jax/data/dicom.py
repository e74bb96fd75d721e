"""A CT series of DICOM files as a volume; needs the extra `dicom`.

pydicom reads the headers. They settle as much as possible before SimpleITK decodes
pixels.
"""

import collections
from pathlib import Path

import numpy as np
from absl import logging

from swinsmt_jax import checks
from swinsmt_jax.data import nifti
from swinsmt_jax.data.dicom_files import (
    AGAIN,
    Slice,
    dicom_files,
    look,
    one_of_many,
    series_in,
)
from swinsmt_jax.runtime import host_memory
from swinsmt_jax.runtime.files import absolute

TOLERANCE = 0.1  # mm by which a slice may lie elsewhere than its neighbours say
PLANE_BYTES = 8  # a voxel: float32 planes, and all of them together
TURN = 1e-3  # by which directions may differ between slices


def is_series(folder: Path) -> bool:
    """Whether a folder contains a DICOM file, judged by content."""
    return next(dicom_files(folder), None) is not None


def load_series(folder: str | Path) -> nifti.Volume:
    """Read the CT of a folder as int16 Hounsfield units in RAS orientation.

    A name from `dicom_files.one_of_many` selects that series. Positions give the
    distance and direction between slices, so a tilted gantry gives a sheared affine, as
    in NIfTI. Each slice, or frame of an enhanced CT, is rescaled by its own slope and
    intercept. Other files (scouts, reports, structures, directories) are skipped and
    named in the notes.

    Raises:
        UserError: without the extra; for a folder without CT slices or with those of
            several series; damaged files, and missing or malformed tags; slices that
            differ in shape, spacing or orientation, are missing, unevenly spaced or all
            in one place; a single slice of unknown thickness.
    """
    folder = absolute(folder)
    slices, notes = _sorted_slices(folder)
    affine = _affine(folder, slices)
    room = len(slices) * slices[0].shape[0] * slices[0].shape[1] * PLANE_BYTES
    host_memory.require(folder, room)
    hu = np.stack([plane.T for plane in _planes(folder, slices)], axis=-1)
    return nifti.noted(nifti.from_array(hu, affine, path=folder), *notes)


def chosen_series(folder: Path, series: str) -> dict[str, Path]:
    """Return {UID: scan} of series in a folder and its subfolders.

    Args:
        folder: to search.
        series: a UID, or "all" for every series with CT slices.

    Raises:
        UserError: without the extra, for a path that is not a folder, an unknown UID,
            and a folder without a CT.
    """
    _require_extra(folder)
    checks.require(
        folder.is_dir(),
        f"--series is {series}, but {folder} is not a folder of DICOM files; leave "
        "--series out for other scans.",
    )
    there = series_in(folder)
    scans = {uid: one_of_many(folder, uid) for uid in there}
    if series != "all":
        counts = [f"{uid} ({len(files)} files)" for uid, files in there.items()]
        checks.require(
            series in there,
            f"--series is {series}, but {folder} and the folders in it hold "
            f"{checks.few(counts) if counts else 'no DICOM files'}.",
        )
        return {series: scans[series]}
    found = {uid: scan for uid, scan in scans.items() if _is_ct(there[uid])}
    checks.require(
        bool(found),
        f"{folder} and the folders in it hold {len(there)} DICOM series, none of them "
        "with slices of a CT.",
    )
    if "" in there.keys() - found.keys():
        logging.warning(
            "%s: %s do not name a series, which may therefore lack them, such as %s",
            *(folder, f"{len(there[''])} files", there[""][0]),
        )
    if others := len(there) - len(found):
        logging.info("%s: %d series without slices of a CT", folder, others)
    return found


def _is_ct(files):
    for file in files:
        try:
            if not isinstance(look(file), str):
                return True
        except checks.UserError:  # a CT that will be refused by name
            return True
    return False


def slices(folder: str | Path) -> list[Slice]:
    """Return the slices of a folder's series in the order of `load_series`.

    Raises:
        UserError: as `load_series`, except for pixels that cannot be decoded.
    """
    return _sorted_slices(absolute(folder))[0]


def _require_extra(folder):
    try:
        import pydicom  # noqa: F401
        import SimpleITK  # noqa: F401
    except ImportError as error:
        raise checks.UserError(
            f"{folder} holds DICOM files, which need SimpleITK and pydicom: "
            'pip install "swinsmt_jax[dicom]", or convert them to NIfTI.'
        ) from error


def _sorted_slices(folder):
    _require_extra(folder)
    found, notes = _series(folder)
    return _in_order(folder, found), notes


def _series(folder):
    """Return the slices of the only series, and a note on skipped files."""
    by_series, others = collections.defaultdict(list), {}
    for file in dicom_files(folder):
        found = look(file)
        if isinstance(found, str):
            others[file] = found
        else:
            by_series[found[0].series].extend(found)
    damaged = [
        f"{file.name}: {what}"
        for file, what in others.items()
        if what.startswith("damag")
    ]
    checks.require(
        not damaged,
        f"{folder}: {len(damaged)} DICOM files are damaged: {'; '.join(damaged[:5])}. "
        f"{AGAIN}",
    )
    kinds = collections.Counter(others.values())
    said = "; ".join(
        f"{number} {'is' if number == 1 else 'are'} {kind}"
        for kind, number in kinds.items()
    )
    checks.require(
        bool(by_series),
        f"{folder} holds no image slices of a CT. Of its {len(others)} DICOM files "
        f"{said or 'none is an image'}. Give the folder that holds the slices; folders "
        "in a folder are not searched.",
    )
    counts = ", ".join(f"{uid} ({len(s)})" for uid, s in sorted(by_series.items()))
    checks.require(
        len(by_series) == 1,
        f"{folder} holds {len(by_series)} DICOM series, but must hold one: {counts}. "
        "Put each into a folder of its own, or choose by --series=UID or all.",
    )
    (slices,) = by_series.values()
    note = f"{len(others)} DICOM files are not slices and were skipped: {said}."
    return slices, (note,) if others else ()


def _in_order(folder, slices):
    """Require that the slices form one volume, and sort them along their normal."""
    first = slices[0]
    for other in slices[1:]:
        for what in ("shape", "spacing", "orientation"):
            one, two = getattr(first, what), getattr(other, what)
            checks.require(
                np.allclose(one, two, rtol=TURN, atol=TURN),
                f"{folder}: {other.file.name} has the {what} {_brief(two)}, but "
                f"{first.file.name} has {_brief(one)}; the slices of one volume agree. "
                f"{AGAIN}",
            )
    normal = np.cross(*first.orientation)
    slices = sorted(slices, key=lambda s: float(s.position @ normal))
    places = np.array([s.position for s in slices])
    if len(slices) == 1:
        return slices
    steps = np.diff(places, axis=0)
    step = np.median(steps, axis=0)
    extent = float(np.linalg.norm(places[-1] - places[0]))
    checks.require(
        extent > TOLERANCE,
        f"{folder}: all {len(slices)} slices lie at the same place. That is a time "
        "series (bolus tracking, perfusion), not a volume. Give a scan of a region.",
    )
    off = np.linalg.norm(steps - step, axis=1)
    i = int(off.argmax())
    checks.require(
        off[i] <= TOLERANCE and float(step @ normal) > TOLERANCE / 10,
        f"{folder}: slices {i + 1} and {i + 2} ({slices[i].file.name}, "
        f"{slices[i + 1].file.name}) lie {np.linalg.norm(steps[i]):.2f} mm apart, but "
        f"others {np.linalg.norm(step):.2f} mm; slices are missing, doubled or "
        f"unevenly spaced. {AGAIN}",
    )
    return slices


def _affine(folder, slices):
    """Return [4, 4] from (column, row, slice) to mm to the right, front and head."""
    first, last = slices[0], slices[-1]
    affine = np.eye(4)
    affine[:3, 0] = first.orientation[0] * first.spacing[1]
    affine[:3, 1] = first.orientation[1] * first.spacing[0]
    if len(slices) > 1:
        affine[:3, 2] = (last.position - first.position) / (len(slices) - 1)
    else:
        checks.require(
            first.thickness is not None,
            f"{first.file} is a single slice, and no tag says how thick it is; "
            "SpacingBetweenSlices or SliceThickness must be there.",
        )
        affine[:3, 2] = np.cross(*first.orientation) * first.thickness
    affine[:3, 3] = first.position
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # from left and back


def _planes(folder, slices):
    """Yield the HU of each slice, float32 [rows, columns]."""
    if slices[0].frame is not None:
        yield from _frames(slices)
        return
    import SimpleITK as sitk  # noqa: N813

    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # headers are checked already
    for part in slices:
        try:
            image = sitk.ReadImage(str(part.file))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise checks.UserError(
                f"the pixels of {part.file} cannot be decoded: {reason}. {AGAIN}"
            ) from error
        plane = sitk.GetArrayFromImage(image).reshape(-1)
        checks.require(
            plane.size == part.shape[0] * part.shape[1],
            f"{part.file} holds {plane.size} pixels, but its header says "
            f"{part.shape[0]} rows of {part.shape[1]}. {AGAIN}",
        )
        yield plane.reshape(part.shape).astype(np.float32)


def _frames(slices):
    """Yield the frames of an enhanced CT, each by its own slope and intercept.

    SimpleITK applies the first frame's values to all frames.
    """
    import pydicom

    stored = {}
    for part in slices:
        if part.file not in stored:
            stored.clear()  # frames of a file follow one another
            try:
                pixels = pydicom.dcmread(part.file, force=True).pixel_array
            except Exception as error:  # of whatever decodes this transfer syntax
                raise checks.UserError(
                    f"the frames of {part.file} cannot be decoded: {error}. Convert it "
                    "to NIfTI, by dcm2niix for example."
                ) from error
            stored[part.file] = pixels.reshape(-1, *part.shape)
        slope, intercept = part.rescale
        yield np.float32(stored[part.file][part.frame] * slope + intercept)


def _brief(value):
    return tuple(round(float(x), 4) for x in np.ravel(value))
