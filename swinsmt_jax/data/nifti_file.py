"""A NIfTI file's header and voxels, or the reason why they cannot be read."""

import contextlib
import gzip
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import nibabel as nib
import numpy as np
from nibabel.arrayproxy import ArrayProxy

from swinsmt_jax import checks
from swinsmt_jax.data import itk_file
from swinsmt_jax.runtime import host_memory

ENDINGS = (".nii.gz", ".nii", *itk_file.SUFFIXES)  # in letters of any case
MAX_VOXELS = 2**32  # a whole body of 512 x 512 x 2,500 has 2^29.3
MAX_SIDE = 2**15 - 1  # voxels; a store keeps places as int16
DEFLATE = 1032  # bytes that a byte of gzip stands for at most
CHECKED = 3  # bytes a voxel: int16 HU, and a map of those that are dense
MAX_HEADER = 2**24  # bytes, with extensions
MAX_TAIL = 2**24  # bytes read after the voxels, to the end of a gzip stream


def stem(path: Path) -> str:
    """Return the name of a scan's file without its ending."""
    name = path.name
    lengths = (len(end) for end in ENDINGS if name.lower().endswith(end))
    return name[: len(name) - next(lengths, 0)]


def is_named(path: Path) -> bool:
    """Whether the name of a file is a scan's."""
    return stem(path) != path.name


def files_in(folder: Path) -> list[Path]:
    """Return a folder's scan files, sorted; hidden files do not count."""
    found = filter(is_named, folder.iterdir())
    return sorted(file for file in found if file.name[0] != "." and file.is_file())


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Turn any exception of reading a damaged file into a `UserError`."""
    try:
        yield
    except (checks.UserError, MemoryError):
        raise
    except Exception as error:
        reason = checks.one_line(error)
        if isinstance(error, nib.spatialimages.HeaderDataError):
            raise checks.UserError(
                f"{path} is a NIfTI file with a bad header ({reason}); fix it, or "
                "export the scan again."
            ) from error
        if isinstance(error, nib.filebasedimages.ImageFileError):
            raise checks.UserError(
                f"{path} is not a NIfTI file ({reason}); copy or download it again, or "
                "convert it to NIfTI."
            ) from error
        raise checks.UserError(
            f"{path} is truncated or corrupt ({reason}); copy or download it again."
        ) from error


class _RoundedHeader(nib.Nifti1Header):
    quaternion_threshold = np.float64(1e-3)  # nibabel's own is the last bit


class _RoundedImage(nib.Nifti1Image):
    header_class = _RoundedHeader


def opened(path: Path) -> nib.filebasedimages.FileBasedImage:
    """Open a file as nibabel does, even if its only form is a rounded quaternion.

    Voxels are read, not mapped: if another program truncates a mapped file, this
    process dies.
    """
    _require_small_header(path)
    try:
        return nib.load(path, mmap=False)
    except ValueError:
        return _RoundedImage.from_filename(path, mmap=False)


class _Start:
    """The start of a stream; reading more than a header may have is an error."""

    def __init__(self, stream):
        self._stream, self.tell = stream, stream.tell

    def read(self, size: int) -> bytes:
        """Return that many bytes, or fewer at the end of the stream."""
        if self.tell() + size > MAX_HEADER:
            raise nib.spatialimages.HeaderDataError(
                f"its header claims more than {MAX_HEADER} bytes"
            )
        return self._stream.read(size)


def _require_small_header(path):
    """Refuse a header whose extensions claim absurd memory, before allocating it."""
    for kind in (nib.Nifti1Image, nib.Nifti2Image, nib.Nifti1Pair, nib.Nifti2Pair):
        if kind.path_maybe_image(path)[0]:
            found = kind.filespec_to_file_map(path)
            file = found.get("header", found["image"]).filename
            with nib.openers.ImageOpener(file) as stream:
                kind.header_class.from_fileobj(_Start(stream), check=False)
            return


def proxy(image: nib.Nifti1Pair) -> ArrayProxy:
    """Return the proxy that reads the voxels of an opened file."""
    return cast(ArrayProxy, image.dataobj)


def voxels(image: nib.Nifti1Pair) -> np.ndarray:
    """Read the voxels; read a gzip file completely, for the checksum at its end.

    nibabel itself stops after the last voxel and misses damage.
    """
    reader, file = proxy(image), str(image.file_map["image"].filename)
    if not file.lower().endswith(".gz"):
        return np.asanyarray(reader)
    with gzip.open(file) as stream:
        parts = reader.shape, reader.dtype, reader.offset, reader.slope, reader.inter
        array = np.asanyarray(ArrayProxy(stream, parts))
        left = MAX_TAIL
        while block := stream.read(min(left, 2**16)):
            left -= len(block)
        if not left:
            raise ValueError(f"more than {MAX_TAIL} bytes follow the voxels")
    return array


def without_last_ones(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape without axes of length one after the third: it is one volume.

    FSL, SPM and MATLAB write such shapes.
    """
    shape = tuple(shape)
    return shape[:3] if set(shape[3:]) <= {1} else shape


def require_room(path: Path, image: nib.Nifti1Pair) -> None:
    """Refuse voxels that do not fit into the host's memory, before reading any."""
    reader = proxy(image)
    plain = (reader.slope, reader.inter) == (1, 0)
    size = reader.dtype.itemsize if plain else 8  # nibabel scales in float64
    host_memory.require(path, math.prod(image.shape) * (size + CHECKED))


def is_possible(shape: Sequence[int]) -> bool:
    """Whether a volume of this shape can be a scan."""
    return math.prod(shape) <= MAX_VOXELS and max(shape, default=0) <= MAX_SIDE


def require_possible(path: Path, image: nib.Nifti1Pair) -> None:
    """Refuse a header that requests absurd memory, before allocating it."""
    shape, reader = image.shape, proxy(image)
    offset = reader.offset
    checks.require(
        min(shape, default=1) >= 0 and offset >= 0,
        f"{path} claims a shape of {tuple(shape)} and voxels from byte {offset} "
        "on; its header is damaged: export or download it again.",
    )
    checks.require(
        is_possible(shape),
        f"{path} claims a shape of {tuple(shape)}, {math.prod(shape)} voxels, but a "
        f"scan has at most {MAX_VOXELS}, and {MAX_SIDE} along an axis; its header is "
        "damaged: export or download it again.",
    )
    if not isinstance(reader, ArrayProxy):
        return  # another library reads it, and compares sizes itself
    file = Path(str(image.file_map["image"].filename))
    wanted = offset + math.prod(shape) * reader.dtype.itemsize
    size = file.stat().st_size
    factors = {".nii": 1, ".img": 1, ".gz": DEFLATE}
    checks.require(
        wanted <= size * factors.get(file.suffix.lower(), math.inf),
        f"{file} has {size} bytes, too few for the {wanted} of the shape "
        f"{tuple(shape)} that its header claims: it is truncated or its header is "
        "damaged; copy or download it again.",
    )
