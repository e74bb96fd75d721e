"""Classify the DICOM files of a folder by their headers, before pixels are read.

Facts of the standard: PS3.3 C.7.6.2 (image plane), C.8.15 (enhanced CT), PS3.6 (tags).
"""

import contextlib
import dataclasses
import functools
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from swinsmt_jax import checks

PREAMBLE = 128  # bytes before the letters DICM
DIRECTORY = "1.2.840.10008.1.3.10"
CT, ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1"
LEGACY_CT = "1.2.840.10008.5.1.4.1.1.2.2"
CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # also what converters call slices
HU_TYPES = ("", "HU", "US")  # of RescaleType; US is "unspecified"
UNCOMPRESSED = {"", *(f"1.2.840.10008.1.2{end}" for end in ("", ".1", ".2"))}
MARK = "#"  # between a folder and the UID of one of its series
AGAIN = "Export the series again."


@dataclasses.dataclass(frozen=True)
class Slice:
    """One plane of a CT, as its header describes it.

    Attributes:
        file: that contains it.
        frame: its number in a multi-frame file; None if it has its own file.
        series: the series' UID.
        shape: (rows, columns).
        position: [3] mm, of the first voxel's centre, to the left, back and head.
        orientation: [2, 3], directions of growing columns and of growing rows.
        spacing: mm between (rows, columns).
        thickness: mm, or None if no tag gives it.
        rescale: (slope, intercept) from stored values to HU.
    """

    file: Path
    frame: int | None
    series: str
    shape: tuple[int, int]
    position: np.ndarray
    orientation: np.ndarray
    spacing: tuple[float, float]
    thickness: float | None
    rescale: tuple[float, float]


def one_of_many(folder: Path, series: str) -> Path:
    """Return folder#UID, the name of a series whose files lie anywhere in a folder."""
    return folder.parent / f"{folder.name}{MARK}{series}"


def is_dicom(scan: Path) -> bool:
    """Whether a scan is a folder, or one of its series as named by `one_of_many`."""
    return scan.is_dir() or _parted(scan) is not None


def _parted(scan):
    """Return folder and UID of a series that `one_of_many` named, or None."""
    name, mark, series = scan.name.rpartition(MARK)
    folder = scan.parent / name
    return (folder, series) if mark and not scan.exists() and folder.is_dir() else None


def series_in(folder: Path) -> dict[str, list[Path]]:
    """Return {UID: DICOM files} of all series in a folder and its subfolders.

    Raises:
        UserError: for a file without a series UID, since its series may lack it.
    """
    found = sorted(file for file in folder.rglob("*") if file.is_file())
    stamps = [(file.stat().st_size, file.stat().st_mtime_ns) for file in found]
    return _series_of(tuple(found), tuple(stamps))


@functools.lru_cache(maxsize=2)  # each series of a folder asks for it
def _series_of(files, stamps):
    import pydicom

    found: dict[str, list[Path]] = {}
    with _quiet():
        for file in _of_dicom(files):
            try:
                tags = ["SeriesInstanceUID", "DirectoryRecordSequence"]
                header = pydicom.dcmread(
                    file, force=True, stop_before_pixels=True, specific_tags=tags
                )
            except Exception as error:  # pydicom raises whatever parsing runs into
                raise checks.UserError(
                    f"{file} is damaged ({checks.one_line(error)}), so its "
                    f"series is unknown. {AGAIN}"
                ) from error
            series = str(header.get("SeriesInstanceUID") or "")
            if "DirectoryRecordSequence" not in header:
                found.setdefault(series, []).append(file)
    return found


def dicom_files(scan: Path) -> Iterator[Path]:
    """Yield the files with DICOM content, with or without a preamble.

    A folder yields its own files; a series of `one_of_many` its files in any folder.
    """
    if (parted := _parted(scan)) is not None:
        yield from series_in(parted[0]).get(parted[1], ())
        return
    yield from _of_dicom(sorted(filter(Path.is_file, scan.iterdir())))


def _of_dicom(files):
    for file in files:
        with file.open("rb") as stream:
            head = stream.read(PREAMBLE + 4)
        bare = head[:2] in (b"\2\0", b"\10\0") and head[4:6].isupper()
        if head[PREAMBLE:] == b"DICM" or bare:
            yield file


def look(file: Path) -> list[Slice] | str:
    """Return the slices of a DICOM file, or a description of another file.

    Raises:
        UserError: for a CT image whose tags cannot be parsed.
    """
    import pydicom

    with _quiet():
        try:
            header = pydicom.dcmread(file, force=True, defer_size=4096)
            return _what_else(file, header) or _slices(file, header)
        except checks.UserError:
            raise
        except Exception as error:  # pydicom raises whatever parsing runs into
            return f"damaged ({error})"


@contextlib.contextmanager
def _quiet():
    """Hide pydicom's own warnings about broken values from the user."""
    logger = logging.getLogger("pydicom")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _what_else(file, header):
    """Describe a file that is not a CT slice."""
    from pydicom.uid import UID

    meta = getattr(header, "file_meta", {})
    sop = str(header.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID") or "")
    modality = str(header.get("Modality") or "").strip()
    if sop == DIRECTORY or "DirectoryRecordSequence" in header:
        return "a directory (DICOMDIR), whose images lie in other folders"
    kind = UID(sop).name if sop else ""
    if sop not in ("", CT, ENHANCED_CT, LEGACY_CT, CAPTURE):
        return f"{modality or 'no CT'} ({kind})"
    pixels = header.get_item("PixelData")
    if pixels is None:
        return "a header without pixel data"
    if not (header.get("Rows") and header.get("Columns")):
        return "damaged (without Rows and Columns)"
    if header.get("SamplesPerPixel", 1) != 1:
        return "a colour image (screen capture)"
    if modality not in ("", "CT"):
        return f"{modality} ({kind or 'of no stated class'})"
    if "LOCALIZER" in [str(part).upper() for part in _listed(header, "ImageType")]:
        return "a localizer (scout), a projection without Hounsfield units"
    return _lack_of_pixels(file, header, pixels, str(meta.get("TransferSyntaxUID", "")))


def _lack_of_pixels(file, header, pixels, syntax):
    """Describe a file that ends before its pixels do; otherwise None."""
    length = pixels.length if pixels.is_raw else len(pixels.value)
    whole = file.stat().st_size >= getattr(pixels, "value_tell", 0) + length
    if syntax in UNCOMPRESSED:
        bits = header.Rows * header.Columns * int(header.get("NumberOfFrames") or 1)
        whole &= length >= bits * header.get("BitsAllocated", 16) // 8
    return None if whole else "damaged (cut short: pixels are missing)"


def _listed(header, keyword):
    value = header.get(keyword) or ()
    return [value] if isinstance(value, str) else list(value)


def _slices(file, header):
    frames = header.get("PerFrameFunctionalGroupsSequence")
    if frames is None:
        count = int(header.get("NumberOfFrames") or 1)
        if count > 1:
            return f"{count} frames in one file without the position of each"
        return [_slice(file, None, header, [header])]
    shared = list(header.get("SharedFunctionalGroupsSequence") or ())
    return [
        _slice(file, i, header, [*_groups(frame), *_all_groups(shared), header])
        for i, frame in enumerate(frames)
    ]


def _all_groups(items):
    return [group for item in items for group in _groups(item)]


def _groups(item):
    return [group for element in item if element.VR == "SQ" for group in element.value]


def _slice(file, frame, header, places):
    """Make a slice from tags, each from the first of `places` that has it."""

    def numbers(keyword, count, *, default=None, positive=False):
        holder = next((p for p in places if p.get_item(keyword) is not None), None)
        raw = None if holder is None else holder.get_item(keyword).value
        if raw in (None, b"", "") and default is not None:
            return default
        checks.require(
            raw not in (None, b"", ""),
            f"{file} has no {keyword}, without which its place is unknown; a CT needs "
            f"it in every slice. {AGAIN}",
        )
        try:
            value = holder[keyword].value
            values = np.array(value, dtype=float).reshape(-1)
            fits = len(values) == count and bool(np.isfinite(values).all())
        except (TypeError, ValueError):
            fits, value = False, raw
        fits = fits and not (positive and bool((values <= 0).any()))
        rule = f"{count} {'positive ' if positive else ''}number{'s' * (count > 1)}"
        checks.require(
            fits, f"{file}: {keyword} is {_text(value)}, but must be {rule}. {AGAIN}"
        )
        return values

    position = numbers("ImagePositionPatient", 3)
    orientation = numbers("ImageOrientationPatient", 6).reshape(2, 3)
    lengths, skew = np.linalg.norm(orientation, axis=1), orientation[0] @ orientation[1]
    checks.require(
        bool(np.allclose(lengths, 1, atol=1e-2)) and abs(skew) < 1e-2,
        f"{file}: ImageOrientationPatient is {_text(orientation.ravel())}, but must be "
        f"two directions of length 1 at a right angle. {AGAIN}",
    )
    spacing = numbers("PixelSpacing", 2, positive=True)
    apart = (
        numbers("SpacingBetweenSlices", 1, default=np.zeros(1)),
        numbers("SliceThickness", 1, default=np.zeros(1)),
    )
    thickness = next((float(x[0]) for x in apart if x[0] > 0), None)
    kinds = [str(p.get("RescaleType") or "").strip() for p in places]
    kind = next((kind for kind in kinds if kind), "")
    checks.require(
        kind in HU_TYPES,
        f"{file}: RescaleType is {kind!r}, but must be HU: its values are not "
        "Hounsfield units. Export the series with HU.",
    )
    slope = numbers("RescaleSlope", 1, default=np.ones(1))
    intercept = numbers("RescaleIntercept", 1, default=np.zeros(1))
    return Slice(
        file=file,
        frame=frame,
        series=str(header.get("SeriesInstanceUID") or ""),
        shape=(int(header.Rows), int(header.Columns)),
        position=position,
        orientation=orientation,
        spacing=(float(spacing[0]), float(spacing[1])),
        thickness=thickness,
        rescale=(float(slope[0]), float(intercept[0])),
    )


def _text(value: Sequence) -> str:
    if isinstance(value, bytes):
        return repr(value.decode("ascii", "replace").strip())
    return repr(str(value).strip())
