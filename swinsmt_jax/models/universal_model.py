"""The CLIP-Driven Universal Model (Liu et al., ICCV 2023).

A Swin UNETR without its last layer. The image, pooled, and one embedding of each class
make the weights of a small network for each class, which gives its logit in every
voxel. Written from a description; no code, weights or embeddings are the authors'.
"""

import functools
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from swinsmt_jax import checks
from swinsmt_jax.layers import initializers
from swinsmt_jax.layers.conv import Conv
from swinsmt_jax.layers.linear import linear
from swinsmt_jax.models.network import Network
from swinsmt_jax.models.registry import register
from swinsmt_jax.models.swin import TINY, SwinUNETRConfig
from swinsmt_jax.models.swin.network import SwinBackbone
from swinsmt_jax.models.swin.torch_names import TORCH_NAMES
from swinsmt_jax.models.torch_names import Layout, NameTable
from swinsmt_jax.ops.normalization import standardize
from swinsmt_jax.runtime.files import absolute

WIDTH = 8  # channels of a class' network
# Weights of its layers 8 -> 8 -> 8 -> 1, then their biases.
SIZES = (WIDTH * WIDTH, WIDTH * WIDTH, WIDTH, WIDTH, WIDTH, 1)
BLOCK = 2**24  # hidden values of a sample's classes that are held at once


@dataclass(frozen=True, kw_only=True)
class UniversalModelConfig(SwinUNETRConfig):
    """The Universal Model on a Swin UNETR.

    Attributes:
        embeddings: of the classes: "learned"; a file, .npy or .safetensors, with a row
            of `text_size` numbers for each class and a list of their names beside it,
            in a .json of the same name; or "random", fixed numbers in place of a file.
        text_size: length of an embedding that is not learned.
        hidden: length of the vectors of the image and of the classes.
        groups: of the group norms.
        zero_plane: whether the background is a plane of zeros; else it has an embedding
            and a network like any class.
    """

    embeddings: str = "learned"
    text_size: checks.Positive = 512
    hidden: checks.Positive = 256
    groups: checks.Positive = 16
    zero_plane: bool = True

    def __post_init__(self):
        super().__post_init__()
        checks.divides(
            "model.groups", self.groups, of="feature_size", number=self.feature_size
        )
        checks.require(
            self.out_channels > 1,
            "model.out_channels is 1, but must be at least 2: the background and one "
            "class.",
        )

    @property
    def num_heads_made(self) -> int:
        """Number of classes that have an embedding and a network."""
        return self.out_channels - self.zero_plane

    def check_classes(self, names: Sequence[str]) -> None:
        """Raise `UserError` unless the file of embeddings is of these classes."""
        if self.embeddings in ("learned", "random"):
            return
        fixed_embeddings(self)
        file = absolute(self.embeddings).with_suffix(".json")
        try:
            found = json.loads(file.read_text())
            if not isinstance(found, list):
                raise ValueError(f"it holds a {type(found).__name__}")
        except (OSError, ValueError) as error:
            raise checks.UserError(
                f"{file} cannot be read ({checks.one_line(error)}); it must hold the "
                f"names of the classes that the rows of {self.embeddings} are of, as a "
                "JSON list."
            ) from error
        wanted = list(names[self.zero_plane : self.out_channels])
        pairs = enumerate(itertools.zip_longest(found, wanted))
        for row, (name, expected) in pairs:
            checks.require(
                name == expected,
                f"{file} names {len(found)} classes and the data have {len(wanted)}: "
                f"row {row} is {name!r}, but must be {expected!r}. Make embeddings of "
                "the data's classes, in the order of their ids.",
            )


def fixed_embeddings(config: UniversalModelConfig) -> np.ndarray:
    """Return embeddings that are not learned, float32 [classes, text_size].

    Raises:
        UserError: for a file that cannot be read, or of another shape, and rows that
            are not finite or equal to one another.
    """
    if config.embeddings == "random":
        return random_embeddings(config.num_heads_made, config.text_size)
    path = absolute(config.embeddings)
    readers: dict[str, Callable] = {".npy": np.load, ".safetensors": _the_array}
    checks.require(
        path.suffix in readers and path.is_file(),
        f"model.embeddings is {config.embeddings!r}, but must be 'learned', 'random' "
        "or an existing .npy or .safetensors file.",
    )
    try:
        found = np.asarray(readers[path.suffix](path), np.float32)
    except Exception as error:  # a damaged file raises anything
        raise checks.UserError(
            f"{path} cannot be read as an array ({checks.one_line(error)}); write it "
            "again, with numpy.save for example."
        ) from error
    wanted = (config.num_heads_made, config.text_size)
    checks.require(
        found.shape == wanted,
        f"{path} has shape {found.shape}, but must have {wanted}: a row for each class "
        "of model.out_channels that has an embedding, of model.text_size numbers.",
    )
    checks.finite(path, {"the array of embeddings": found})
    checks.require(
        len(np.unique(found, axis=0)) == len(found),
        f"{path} has equal rows, so the network could not tell their classes apart.",
    )
    return found


def _the_array(path: Path) -> np.ndarray:
    (array,) = safetensors.numpy.load_file(path).values()
    return array


def random_embeddings(count: int, size: int) -> np.ndarray:
    """Return fixed numbers of the scale of CLIP's text embeddings, float32.

    Their norm is about 8.9, and 8.3 of it a direction that all rows share.
    """
    draw = np.random.default_rng(0).standard_normal((1 + count, size))
    draw /= np.linalg.norm(draw, axis=1, keepdims=True)
    return (8.3 * draw[:1] + 3.05 * draw[1:]).astype(np.float32)


class GroupNorm(nnx.Module):
    """Group norm with scale and bias, then ReLU; statistics of each sample, float32."""

    def __init__(self, channels: int, *, groups: int):
        self.groups = groups
        self.scale = initializers.constant(1.0, (channels,))
        self.bias = initializers.constant(0.0, (channels,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [B, D, H, W, C] to the same shape."""
        grouped = x.reshape(*x.shape[:-1], self.groups, -1)
        y = standardize(grouped, (1, 2, 3, 5)).reshape(x.shape)
        return nnx.relu(y * self.scale[...] + self.bias[...])


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("kernels",),
    meta_fields=("zero_plane", "dtype"),
)
@dataclass(frozen=True, eq=False)
class ClassHeads:
    """The networks of the classes, for each image; see `losses.Loss.of_head`.

    Attributes:
        kernels: [B, classes, 153], of `SIZES`.
        zero_plane: whether a plane of zeros comes first.
        dtype: of the products.
    """

    kernels: jax.Array
    zero_plane: bool
    dtype: str

    @property
    def num_classes(self) -> int:
        """Number of logits of a voxel."""
        return self.kernels.shape[1] + self.zero_plane

    @property
    def width(self) -> int:
        """Number of hidden values of a voxel."""
        return self.kernels.shape[1] * WIDTH

    def __call__(self, features: jax.Array) -> jax.Array:
        """Map [B, D, H, W, 8] to float32 logits [B, D, H, W, K]."""
        ends = np.cumsum(SIZES)[:-1]
        *weights, b1, b2, b3 = jnp.split(self.kernels.astype(self.dtype), ends, axis=2)
        square = (*self.kernels.shape[:2], WIDTH, WIDTH)  # [B, K, out, in]
        w1, w2 = (w.reshape(square) for w in weights[:2])
        b1, b2, b3 = (b[:, None, None, None] for b in (b1, b2, b3[..., 0]))
        x = features.astype(self.dtype)
        y = nnx.relu(jnp.einsum("bxyzi,bkoi->bxyzko", x, w1) + b1)
        y = nnx.relu(jnp.einsum("bxyzki,bkoi->bxyzko", y, w2) + b2)
        y = jnp.einsum("bxyzki,bki->bxyzk", y, weights[2]) + b3
        pad = ((0, 0),) * 4 + ((int(self.zero_plane), 0),)
        return jnp.pad(y.astype(jnp.float32), pad)

    def pull_back(self, features: jax.Array, g: jax.Array) -> tuple:
        """Return the gradients of features and heads for that of the logits."""
        return jax.vjp(lambda x, heads: heads(x), features, self)[1](g)

    def sum_samples(self, gradient: Any) -> Any:
        """Return the gradient: each sample has its own heads."""
        return gradient


class UniversalModel(Network):
    """The Universal Model. Its heads depend on the image, so it has no `head`."""

    organ_embedding: Any  # a table that is learned, or a buffer

    def __init__(self, config: UniversalModelConfig, *, rngs: nnx.Rngs):
        super().__init__(config)
        f, hidden, count = config.feature_size, config.hidden, config.num_heads_made
        self.zero_plane = config.zero_plane
        self.backbone = SwinBackbone(config, rngs=rngs)
        self.precls_conv = nnx.Dict(
            norm=GroupNorm(f, groups=config.groups),
            conv=Conv(
                f, WIDTH, kernel_size=1, use_bias=True, dtype=config.dtype, rngs=rngs
            ),
        )
        self.GAP = nnx.Dict(
            norm=GroupNorm(16 * f, groups=config.groups),
            linear=linear(16 * f, hidden, rngs=rngs),
        )
        self.controller = linear(2 * hidden, sum(SIZES), rngs=rngs)
        if config.embeddings == "learned":
            table = initializers.normal(rngs, (count, hidden))
            self.text_to_vision = None
            self.organ_embedding = nnx.Dict(weight=table)
        else:
            size = config.text_size
            self.text_to_vision = linear(size, hidden, rngs=rngs)
            rows = initializers.made(lambda: fixed_embeddings(config), (count, size))
            self.organ_embedding = nnx.Variable(rows)

    def features_and_head(
        self, x: jax.Array, *, rngs: nnx.Rngs | None = None
    ) -> tuple[jax.Array, ClassHeads]:
        """Return [B, D, H, W, 8], and the networks that make logits of it."""
        y, bottom, _ = self.backbone.ends(x, rngs=rngs)
        with jax.named_scope("head"):
            features = self.precls_conv.conv(self.precls_conv.norm(y))
            image = self.GAP.linear(self.GAP.norm(bottom).mean((1, 2, 3)))  # [B, V]
            classes = self.class_vectors()  # [K, V]
            shape = len(image), *classes.shape
            parts = image[:, None], classes[None]
            pairs = [jnp.broadcast_to(part, shape) for part in parts]
            kernels = self.controller(jnp.concatenate(pairs, axis=-1))
        return features, ClassHeads(kernels, self.zero_plane, self.config.dtype)

    def class_vectors(self) -> jax.Array:
        """Return a vector for each class, float32 [classes, hidden]."""
        if self.text_to_vision is None:
            return self.organ_embedding.weight[...]
        return nnx.relu(self.text_to_vision(self.organ_embedding[...]))

    def __call__(self, x: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Segment a batch of volumes; see `Network`.

        A few planes at a time, so that no hidden layer of all classes exists.
        """
        features, head = self.features_and_head(x, rngs=rngs)
        _, depth, height, width, _ = features.shape
        most = max(1, BLOCK // (height * width * head.width))
        count = max(n for n in checks.divisors(depth) if n <= most)
        with jax.named_scope("head"):
            if count == depth:
                return head(features)
            planes = features.reshape(len(x), -1, count, *features.shape[2:])
            logits = jax.lax.map(jax.checkpoint(head), planes.swapaxes(0, 1))
            return logits.swapaxes(0, 1).reshape(*features.shape[:4], -1)


# A linear layer that is a convolution in PyTorch: [in, out] -> [out, in, 1, 1, 1].
_POINT = Layout(
    lambda a: a.T[:, :, None, None, None], lambda a, shape: a.reshape(shape[::-1]).T
)
register(
    "universal_model",
    UniversalModelConfig,
    UniversalModel,
    torch_names=NameTable(
        renames=(
            (r"^(GAP|precls_conv)\.norm", r"\1.0"),
            (r"^GAP\.linear", "GAP.3"),
            (r"^precls_conv\.conv", "precls_conv.2"),
            *(
                (pattern.replace("^", r"(?<=^backbone\.)"), replacement)
                for pattern, replacement in TORCH_NAMES.renames
            ),
        ),
        layouts=((r"^(controller|GAP/linear)/kernel", _POINT), *TORCH_NAMES.layouts),
        unneeded=TORCH_NAMES.unneeded,
    ),
    tiny={**TINY, "embeddings": "random", "text_size": 6, "hidden": 4, "groups": 2},
)
