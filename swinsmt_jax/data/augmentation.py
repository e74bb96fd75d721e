"""Augmentations of training crops, and their parameters in the config.

Each augmentation is one class below, with its name, its parameters and their limits.
The config contains them as `data.augmentations.<name>.<parameter>`, and they act in
this file's order. Each one has its own generator, so a new one changes no other draw.

Zoom, rotation and intensity come from the released recipe. The others, off by default,
come from nnU-Net. The image is scaled: 0 is air, and values stay in [0, 1] except after
noise and shifts of intensity.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, NamedTuple, TypeVar

import numpy as np

from swinsmt_jax import checks
from swinsmt_jax.checks import Share, Within
from swinsmt_jax.class_map import ClassMap
from swinsmt_jax.data.interpolation import interpolate
from swinsmt_jax.data.sample import Sample

Rng = np.random.Generator
Names = tuple[str, ...]
_CLASSES: dict[str, "type[Augmentation]"] = {}
A = TypeVar("A", bound="Augmentation")


def register(name: str) -> Callable[[type[A]], type[A]]:
    """Make an augmentation known by its name in the config.

    Raises:
        UserError: for a name that is taken, or after `Augmentations` was built.
    """

    def add(cls: type[A]) -> type[A]:
        checks.require(
            name not in _CLASSES,
            f"an augmentation named {name!r} is registered already.",
        )
        checks.require(
            "Augmentations" not in globals(),
            f"the augmentation {name!r} comes too late; write its class into "
            f"{__file__}, above the line that makes Augmentations.",
        )
        cls.name = name
        _CLASSES[name] = cls
        return cls

    return add


class Range(NamedTuple):
    """A rule for a parameter (low, high): 0 < low, and least <= low <= high <= most."""

    least: float
    most: float

    def __call__(self, name: str, value: tuple[float, float]) -> None:
        """Raise `UserError` unless the value follows the rule."""
        least, most = self
        checks.require(
            len(value) == 2 and least <= value[0] <= value[1] <= most and value[0] > 0,
            f"{name} is {value}, but must be (low, high) with "
            f"{'0 <' if least == 0 else f'{least:g} <='} low <= high <= {most:g}.",
        )


@dataclass(frozen=True)
class Augmentation:
    """The base of all augmentations; each acts on a crop with `probability`."""

    name: ClassVar[str]  # set by `register`

    probability: Share = 0.0

    def __post_init__(self):
        checks.typed_fields(f"data.augmentations.{self.name}", self)

    def region(self, shape: Sequence[int], rng: Rng) -> Sequence[int]:
        """Return the shape to read, and to enlarge to the crop."""
        return shape

    def apply(self, sample: Sample, rng: Rng, names: Names) -> Sample:
        """Return the changed crop; `names` belong to the label ids."""
        return sample


@register("zoom")
@dataclass(frozen=True)
class Zoom(Augmentation):
    """Enlarge by a factor uniform in `factor`: a smaller region fills the crop."""

    probability: Share = 0.3
    factor: Annotated[tuple[float, float], Range(1, 100)] = (1.3, 1.5)

    def region(self, shape: Sequence[int], rng: Rng) -> Sequence[int]:  # noqa: D102
        factor = rng.uniform(*self.factor)
        return [max(1, round(side / factor)) for side in shape]


@register("rotate")
@dataclass(frozen=True)
class Rotate(Augmentation):
    """Rotate by 90, 180 or 270 degrees in the axial plane (axes 0 and 1).

    A crop that is not square there is only rotated by 180 degrees. Rotated and mirrored
    samples keep their affine, which is no longer useful.
    """

    probability: Share = 0.1

    def apply(self, sample: Sample, rng: Rng, names: Names) -> Sample:  # noqa: D102
        quarters = int(rng.integers(1, 4))
        if sample.label.shape[0] != sample.label.shape[1]:
            quarters = 2
        image, label = (np.rot90(a, quarters) for a in (sample.image, sample.label))
        return replace(sample, image=image, label=label)


@register("intensity")
@dataclass(frozen=True)
class Intensity(Augmentation):
    """Add one number, uniform in [-shift, shift], to the whole image."""

    probability: Share = 0.2
    shift: Annotated[float, Within(0, 10)] = 0.1

    def apply(self, sample: Sample, rng: Rng, names: Names) -> Sample:  # noqa: D102
        offset = np.float32(rng.uniform(-self.shift, self.shift))
        return replace(sample, image=sample.image + offset)


@register("mirror")
@dataclass(frozen=True)
class Mirror(Augmentation):
    """Swap the patient's right and left, in the image and in the labels' names.

    Structures without a counterpart (the right lung's middle lobe, the left atrial
    appendage) keep their name, so a mirrored patient is not quite realistic.
    """

    def apply(self, sample: Sample, rng: Rng, names: Names) -> Sample:  # noqa: D102
        swap, known = left_right_swap(names), sample.annotated
        return replace(
            sample,
            image=sample.image[::-1],
            label=swap[sample.label[::-1]],
            annotated=known and tuple(swap[list(known)].tolist()),
        )


@functools.cache
def left_right_swap(names: tuple[str, ...]) -> np.ndarray:
    """Return `ClassMap.left_right_swap` of the label ids of these names."""
    return ClassMap(names).left_right_swap()


@register("low_resolution")
@dataclass(frozen=True)
class LowResolution(Augmentation):
    """Keep the voxels of a coarser grid and interpolate the others linearly.

    The ratio of the grids is uniform in `scale`. Kept voxels stay in place, including
    the outermost, so nothing moves.
    """

    scale: Annotated[tuple[float, float], Range(0, 1)] = (0.5, 1.0)

    def apply(self, sample: Sample, rng: Rng, names: Names) -> Sample:  # noqa: D102
        scale = rng.uniform(*self.scale)
        sides = sample.image.shape
        kept = [
            np.linspace(0, n - 1, min(n, max(2, round(n * scale)))).round().astype(int)
            for n in sides
        ]
        places = [
            np.interp(np.arange(n), k, np.arange(len(k)))
            for n, k in zip(sides, kept, strict=True)
        ]
        return replace(sample, image=interpolate(sample.image[np.ix_(*kept)], places))


@register("blur")
@dataclass(frozen=True)
class Blur(Augmentation):
    """Smooth by a Gaussian with a standard deviation uniform in `sigma`, in voxels."""

    sigma: Annotated[tuple[float, float], Range(0, 100)] = (0.5, 1.0)

    def apply(self, sample: Sample, rng: Rng, names: Names) -> Sample:  # noqa: D102
        sigma = rng.uniform(*self.sigma)
        from scipy import ndimage  # slow to import

        smooth = ndimage.gaussian_filter(sample.image, sigma, mode="nearest")
        return replace(sample, image=smooth)


@register("gamma")
@dataclass(frozen=True)
class Gamma(Augmentation):
    """Raise the image, clipped at 0, to a power uniform in `exponent`."""

    exponent: Annotated[tuple[float, float], Range(0, 100)] = (0.7, 1.5)

    def apply(self, sample: Sample, rng: Rng, names: Names) -> Sample:  # noqa: D102
        power = np.float32(rng.uniform(*self.exponent))
        return replace(sample, image=np.maximum(sample.image, 0) ** power)


@register("noise")
@dataclass(frozen=True)
class Noise(Augmentation):
    """Add Gaussian noise whose standard deviation is uniform in [0, std_max]."""

    std_max: Annotated[float, Within(0, 10)] = 0.1

    def apply(self, sample: Sample, rng: Rng, names: Names) -> Sample:  # noqa: D102
        std = np.float32(rng.uniform(0, self.std_max))
        noise = rng.standard_normal(sample.image.shape, np.float32)
        return replace(sample, image=sample.image + noise * std)


if TYPE_CHECKING:

    @dataclass(frozen=True)
    class Augmentations:
        """The type checker's view of the class below."""

        def __getattr__(self, name: str) -> Augmentation: ...


Augmentations = dataclasses.make_dataclass(  # type: ignore
    "Augmentations",
    [(name, cls, field(default_factory=cls)) for name, cls in _CLASSES.items()],
    frozen=True,
    namespace={
        "__module__": __name__,
        "__doc__": "All augmentations by name, in the order in which they act.",
    },
)


def generator(seed: int, name: str) -> np.random.Generator:
    """Return the generator of one purpose, such as an augmentation, on one crop."""
    return np.random.default_rng((seed, zlib.crc32(name.encode())))


def region(
    augmentations: Augmentations, seed: int, shape: Sequence[int]
) -> Sequence[int]:
    """Return the shape to read for a crop of `shape`, and to enlarge to it."""
    for augmentation, rng in _acting(augmentations, seed):
        shape = augmentation.region(shape, rng)
    return shape


def augment(
    augmentations: Augmentations,
    seed: int,
    sample: Sample,
    names: tuple[str, ...],
) -> Sample:
    """Apply all augmentations that act on a scaled crop.

    Args:
        augmentations: of the config.
        seed: of the crop.
        sample: the crop.
        names: of the label ids, the background first.
    """
    for augmentation, rng in _acting(augmentations, seed):
        sample = augmentation.apply(sample, rng, names)
    return sample


def _acting(
    augmentations: Augmentations, seed: int
) -> Iterator[tuple[Augmentation, np.random.Generator]]:
    """Yield the augmentations that act on this seed's crop, with their generators."""
    for name in _CLASSES:
        augmentation = getattr(augmentations, name)
        rng = generator(seed, name) if augmentation.probability else None
        if rng is not None and rng.random() < augmentation.probability:
            yield augmentation, rng
