"""Change valid files at random and read them: `python -m tests.fuzz KIND EXAMPLES`.

A reader must give something or raise a `UserError`, in one line, and take less than
1 GB of memory: the process has no more. No file is kept.
"""

import io
import json
import resource
import sys
import tempfile
import zipfile
from pathlib import Path

import hypothesis
import jax
import jax.export
import nibabel as nib
import numpy as np
import safetensors.numpy
from hypothesis import strategies as st

from swinsmt_jax import checks, labels
from swinsmt_jax.convert import files as weights
from swinsmt_jax.data import dataset, dicom, nifti, store
from swinsmt_jax.inference import portable
from swinsmt_jax.training import workdir

MEMORY = 10**9  # bytes beyond what the process has at its start
NUMBERS = (0, 1, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1)
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "number", "cut", "insert", "repeat"]),
        st.floats(0, 1),
        st.integers(0, 255),
        st.sampled_from(NUMBERS),
    ),
    min_size=1,
    max_size=6,
)


def edited(content: bytes, edits) -> bytes:
    """Return bytes with edits: flipped bits, large numbers, cuts and insertions."""
    for kind, where, byte, number in edits:
        at = min(int(where * len(content)), len(content) - 1)
        start, rest = content[: max(at, 0)], content[max(at, 0) :]
        if kind == "flip" and rest:
            content = start + bytes([rest[0] ^ (byte or 1)]) + rest[1:]
        elif kind == "number":
            size = 8 if number >= 2**32 else 4
            content = start + number.to_bytes(size, "little") + rest[size:]
        elif kind == "cut":
            content = start + rest[byte:]
        elif kind == "insert":
            content = start + bytes([byte]) * (byte + 1) + rest
        else:
            content = start + rest[: 4 * byte] + rest
    return content


def archive(members: dict[str, bytes]) -> bytes:
    """Return a zip archive, whose checksums fit whatever its members hold."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def text(string: str) -> bytes:
    """Return a string as pickles of protocol 2 have it."""
    return b"X" + len(string).to_bytes(4, "little") + string.encode()


def torch_pickle() -> bytes:
    """Return the pickle of a state dictionary with one tensor, as PyTorch writes it."""
    kind = b"ctorch\nFloatStorage\n"
    storage = b"(" + text("storage") + kind + text("0") + text("cpu") + b"K\x04tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\nq\x00("
    tensor += storage + b"K\x00K\x02K\x02\x86K\x02K\x01\x86\x89"
    tensor += b"ccollections\nOrderedDict\n)RtR"
    return b"\x80\x02}q\x01" + text("w") + b"r\x02\x00\x00\x00" + tensor + b"s."


def nifti_file(kind=nib.Nifti1Image) -> bytes:
    """Return an uncompressed NIfTI file with an extension."""
    image = kind(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4))
    image.header.extensions.append(nib.nifti1.Nifti1Extension(6, b"a comment"))
    return image.to_bytes()


def dicom_slice() -> bytes:
    """Return a slice of a CT."""
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian

    slice_ = pydicom.Dataset()
    slice_.SOPClassUID, slice_.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", "1.2.3.4"
    slice_.Modality, slice_.SeriesInstanceUID = "CT", "1.2.3"
    slice_.Rows, slice_.Columns, slice_.BitsAllocated, slice_.BitsStored = 4, 5, 16, 16
    slice_.HighBit, slice_.PixelRepresentation, slice_.SamplesPerPixel = 15, 1, 1
    slice_.PhotometricInterpretation = "MONOCHROME2"
    slice_.PixelSpacing, slice_.SliceThickness = [1, 1], 2
    slice_.ImagePositionPatient = [0, 0, 0]
    slice_.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    slice_.RescaleSlope, slice_.RescaleIntercept = 1, 0
    slice_.PixelData = np.arange(20, dtype=np.int16).tobytes()
    slice_.file_meta = pydicom.dataset.FileMetaDataset()
    slice_.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, slice_, enforce_file_format=True)
    return buffer.getvalue()


def exported_network(folder: Path) -> dict[str, bytes]:
    """Return the members of an exported network."""
    program = jax.jit(lambda parameters, windows: windows * parameters[0])
    windows = jax.ShapeDtypeStruct((1, 8, 8, 8, 1), "float32")
    exported = jax.export.export(program)(
        [jax.ShapeDtypeStruct((2,), "float32")], windows
    )
    about = {"window": [8, 8, 8], "window_batch": 1, "hu_range": [0, 1]}
    about |= {"num_classes": 2, "overlap": 0.5, "blend": "constant"}
    portable.save(folder / "x.npz", exported, [np.float32([1, 2])], about)
    with zipfile.ZipFile(folder / "x.npz") as file:
        return {name: file.read(name) for name in file.namelist()}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
KEYS = ("classes", "groups", "labels", "channel_names", "image", "splits", "options")
DESCRIPTION = st.dictionaries(st.sampled_from(KEYS) | st.text(), JSON)


def file_of(name: str, content: bytes, read):
    """Return (what changes content, what reads it from a file of this name)."""

    def attempt(folder, edits):
        (folder / name).write_bytes(edited(content, edits))
        read(folder / name)

    return EDITS, attempt


def member_of(name: str, members: dict[str, bytes], read):
    """Return the same for one member of an archive, chosen by the first edit."""
    names = sorted(members)

    def attempt(folder, edits):
        chosen = names[edits[0][2] % len(names)]
        changed = members | {chosen: edited(members[chosen], edits)}
        (folder / name).write_bytes(archive(changed))
        read(folder / name)

    return EDITS, attempt


def json_of(name: str, strategy, read):
    """Return the same for a JSON file of any content."""

    def attempt(folder, content):
        (folder / name).write_text(json.dumps(content))
        read(folder / name)

    return strategy, attempt


def kinds(folder: Path) -> dict:
    """Return what is changed and read."""
    torch = {"a/data.pkl": torch_pickle(), "a/data/0": bytes(16)}
    tensors = safetensors.numpy.save({"w": np.zeros((2, 2), np.float32)})
    return {
        "pt": member_of("x.pt", torch, weights.read),
        "pt archive": file_of("x.pt", archive(torch), weights.read),
        "safetensors": file_of("x.safetensors", tensors, weights.read),
        "nifti 1": file_of("x.nii", nifti_file(), nifti.load_ct),
        "nifti 2": file_of("x.nii", nifti_file(nib.Nifti2Image), nifti.load_labels),
        "dicom": file_of("x.dcm", dicom_slice(), lambda f: dicom.load_series(f.parent)),
        "description": json_of(
            "dataset.json", DESCRIPTION, lambda f: dataset.open_dataset(f.parent)
        ),
        "groups": json_of("groups.json", JSON, labels.load_groups),
        "config": json_of("config.json", JSON, workdir.recorded_config),
        "store": json_of(
            "store.json",
            st.fixed_dictionaries({"format": st.just(store.FORMAT), "options": JSON}),
            lambda f: store.read_options(f.parent),
        ),
        "network": member_of("x.npz", exported_network(folder), portable.load),
    }


def main(kind: str, examples: int) -> None:
    """Read so many changed files of a kind."""
    with tempfile.TemporaryDirectory() as name:
        strategy, attempt = kinds(Path(name))[kind]
        limit = int(Path("/proc/self/statm").read_text().split()[0])
        limit = limit * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

        @hypothesis.settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(strategy)
        def read(change):
            with tempfile.TemporaryDirectory(dir=name) as folder:
                try:
                    attempt(Path(folder), change)
                except checks.UserError as error:
                    assert len(str(error).splitlines()) == 1, error

        read()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
