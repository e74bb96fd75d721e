"""Labels of a DICOM series as a DICOM segmentation object; needs the extra `dicom`.

Each frame lies at the place of a slice of the series. The file is read back and
compared before it gets its name.

Facts of the standard: PS3.3 A.51 and C.8.20 (segmentation), PS3.5 A.5 (deflated).
"""

import csv
import functools
import importlib.util
import logging
from importlib import metadata, resources
from pathlib import Path

import numpy as np

from swinsmt_jax import checks
from swinsmt_jax.class_map import class_key
from swinsmt_jax.data import dicom, nifti
from swinsmt_jax.data.dicom_files import AGAIN, is_dicom
from swinsmt_jax.data.label_table import colour
from swinsmt_jax.results.result import Result

KINDS = ("labelmap", "binary")
NAME = "swinsmt_jax"
SCHEME = "99SWINSMT"  # of the codes of structures that have none in SNOMED CT
TOLERANCE = 1e-3  # mm between the place of a frame and that of its slice
EMPTY = (
    *("AccessionNumber", "Manufacturer", "PatientBirthDate", "PatientID"),
    *("PatientName", "PatientSex", "ReferringPhysicianName", "StudyDate"),
    *("StudyID", "StudyTime"),
)
LETTERS = 16  # of a code at most


def write(path: Path, result: Result, kind: str) -> None:
    """Write the labels of a DICOM series.

    "labelmap" has one frame for each slice, whose values are the label ids, compressed
    without loss (RLE). "binary" has frames for each structure, numbered from 1 without
    gaps as the standard wants it, for viewers that do not know label maps.

    Args:
        path: .dcm.
        result: labels of a series.
        kind: of `KINDS`.

    Raises:
        UserError: as `require`, for a scan without any of the structures, and for
            frames that would lie elsewhere than the slices.
    """
    folder = result.volume.path
    require(folder)
    import highdicom as hd
    import pydicom

    logging.getLogger("highdicom").setLevel(logging.WARNING)  # it tells each step
    slices = dicom.slices(folder)
    frames = nifti.in_file_axes(result.labels, result.volume).transpose(2, 1, 0)
    ids = [number for number in result.names if number in result.boxes]
    checks.require(
        bool(ids),
        f"{folder}: none of the {len(result.names)} structures is in the scan, and a "
        "DICOM segmentation cannot be empty.",
    )
    numbers = {i: i if kind == "labelmap" else n for n, i in enumerate(ids, start=1)}
    table = np.zeros(256, np.uint8)
    table[list(numbers)] = list(numbers.values())
    frames = table[frames]
    sources = [
        pydicom.dcmread(file, stop_before_pixels=True)
        for file in dict.fromkeys(part.file for part in slices)
    ]
    for source in sources:
        for keyword in ("StudyInstanceUID", "FrameOfReferenceUID"):
            checks.require(
                bool(source.get(keyword)),
                f"{source.filename!s} has no {keyword}, without which a segmentation "
                f"cannot say what it belongs to. {AGAIN}",
            )
        for keyword in EMPTY:  # must be there, but may be empty
            source.setdefault(keyword, None)
    if slices[0].frame is not None:  # frames of one file, in its order
        order = np.argsort([part.frame or 0 for part in slices])
        slices, frames = [slices[i] for i in order], frames[order]
    version = metadata.version(NAME)
    segmentation = hd.seg.Segmentation(
        source_images=sources,
        pixel_array=frames,
        segmentation_type=kind.upper(),
        segment_descriptions=[
            _description(hd, numbers[i], i, result.names[i], version) for i in ids
        ],
        series_instance_uid=hd.UID(),
        series_number=1000,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer=NAME,
        manufacturer_model_name=NAME,
        software_versions=version,
        device_serial_number="1",
        series_description="Segmentation",
        content_label="SEGMENTATION",
        omit_empty_frames=kind == "binary",  # else one for each slice and structure
        transfer_syntax_uid=pydicom.uid.RLELossless
        if kind == "labelmap"
        else pydicom.uid.ExplicitVRLittleEndian,
    )
    if kind == "binary":  # frames of bits can only be compressed with the whole file
        syntax = pydicom.uid.DeflatedExplicitVRLittleEndian
        segmentation.file_meta.TransferSyntaxUID = syntax
    segmentation.save_as(path)
    _require_in_place(pydicom.dcmread(path), path, slices, frames)


@functools.cache
def codes() -> dict[str, dict[str, str]]:
    """Return {structure: its codes in SNOMED CT}, those that TotalSegmentator uses.

    From totalsegmentator_snomed_mapping.csv of TotalSegmentator 2.18.0.
    """
    table = resources.files("swinsmt_jax.results") / "snomed_codes.csv"
    rows = csv.DictReader(table.read_text().splitlines())
    return {class_key(row["structure"]): row for row in rows}


def require(scan: Path) -> None:
    """Raise `UserError` for a scan that is not a DICOM series, or without the extra."""
    checks.require(
        is_dicom(scan),
        f"a DICOM segmentation needs the DICOM series that it belongs to, but {scan} "
        "is a file; give the folder of the series as --input.",
    )
    checks.require(
        importlib.util.find_spec("highdicom") is not None,
        f"a DICOM segmentation of {scan} needs highdicom: "
        'pip install "swinsmt_jax[dicom]".',
    )


def _description(hd, number, label, name, version):
    """Describe a segment: what it is, on which side, by which program, which colour."""
    row = codes().get(class_key(name))

    def concept(key):
        if row is None or not row[key]:
            return None
        return hd.sr.CodedConcept(row[key], "SCT", row[f"{key}_meaning"])

    own = hd.sr.CodedConcept(f"id-{label}"[:LETTERS], SCHEME, name[:64])
    structure = hd.sr.CodedConcept("123037004", "SCT", "Anatomical Structure")
    region = concept("region")
    described = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=name[:64],
        segmented_property_category=concept("category") or structure,
        segmented_property_type=concept("type") or own,
        algorithm_type="AUTOMATIC",
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name=NAME,
            version=version,
            family=hd.sr.CodedConcept("123109", "DCM", "Artificial Intelligence"),
        ),
        tracking_uid=hd.UID(),
        tracking_id=name[:64],
        anatomic_regions=None if region is None else [region],
        display_color=hd.color.CIELabColor.from_rgb(
            *(round(255 * part) for part in colour(label))
        ),
    )
    if (side := concept("type_modifier")) is not None:
        item = described.SegmentedPropertyTypeCodeSequence[0]
        item.SegmentedPropertyTypeModifierCodeSequence = [side]
    if (side := concept("region_modifier")) is not None:
        item = described.AnatomicRegionSequence[0]
        item.AnatomicRegionModifierSequence = [side]
    return described


def _require_in_place(written, path, slices, frames):
    """Read a segmentation back, and require each voxel where it was meant to be."""
    places = np.array([part.position for part in slices])
    found = np.zeros_like(frames)
    pixels = written.pixel_array.reshape(-1, *frames.shape[1:])
    for plane, group in zip(
        pixels, written.PerFrameFunctionalGroupsSequence, strict=True
    ):
        position = group.PlanePositionSequence[0].ImagePositionPatient
        miss = np.abs(places - np.array(position, float)).max(axis=1)
        checks.require(
            miss.min() <= TOLERANCE,
            f"a frame for {path} would lie {miss.min():.3f} mm from the nearest slice.",
        )
        segment = group.get("SegmentIdentificationSequence")
        number = segment[0].ReferencedSegmentNumber if segment else 1
        found[miss.argmin()] += plane * np.uint8(number)
    checks.require(
        np.array_equal(found, frames), f"{path} was not read back as it was written."
    )
