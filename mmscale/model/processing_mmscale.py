"""Pictures to pixels and texts to token ids, as in training; needs Pillow, but not torchvision."""

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ProcessorMixin

_MAX_ASPECT = 8  # a longer picture is cut before it is resized, or a line of pixels would become gigabytes


class MMScaleImageProcessor(BaseImageProcessor):
    """The evaluation transform: shorter side to `image_size` (antialiased bicubic), centred square, normalised.

    Args:
        image_size: pixels of a side.
        image_mean, image_std: per channel, of pixels between 0 and 1.
    """

    def __init__(
        self,
        image_size: int = 224,
        image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073),
        image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711),
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.image_size = image_size
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    def preprocess(
        self, images, return_tensors: str | None = "pt", do_normalize: bool = True, **kwargs
    ) -> BatchFeature:
        """Pictures (PIL, arrays [height, width, 3], uint8 tensors [3, height, width]; one or more) to `pixel_values`.

        Returns:
            `pixel_values` [pictures, 3, image_size, image_size]: normalised floats, or uint8 without `do_normalize`.
        """
        if isinstance(images, (list, tuple)):
            items = [item for image in images for item in (image if isinstance(image, (list, tuple)) else [image])]
        else:
            items = list(images) if isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4 else [images]
        pixels = torch.stack([square_view(_to_array(image), self.image_size) for image in items])
        if do_normalize:
            mean, std = (torch.tensor(values)[:, None, None] for values in (self.image_mean, self.image_std))
            pixels = (pixels / 255 - mean) / std
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def to_dict(self) -> dict:
        names = ("image_size", "image_mean", "image_std")
        output = {"image_processor_type": type(self).__name__, **{name: getattr(self, name) for name in names}}
        if getattr(self, "auto_map", None):
            output["auto_map"] = self.auto_map
        return output


class MMScaleProcessor(ProcessorMixin):
    """The image processor and the tokenizer behind one call: `processor(images=..., text=...)`."""

    def __init__(self, image_processor=None, tokenizer=None, **kwargs):
        super().__init__(image_processor, tokenizer, **kwargs)


def square_view(pixels: np.ndarray, size: int) -> Tensor:
    """uint8 [height, width, 3] to uint8 [3, size, size]: shorter side to `size`, then the centred square."""
    height, width = pixels.shape[:2]
    longest = _MAX_ASPECT * min(height, width)
    top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
    pixels = pixels[top : top + longest, left : left + longest]
    height, width = pixels.shape[:2]
    long_side = size * max(height, width) // min(height, width)
    height, width = (size, long_side) if height <= width else (long_side, size)
    tensor = torch.tensor(pixels).permute(2, 0, 1)
    if tensor.shape[1:] != (height, width):
        tensor = interpolate(tensor[None], size=(height, width), mode="bicubic", antialias=True)[0]
    top, left = (height - size) // 2, (width - size) // 2
    return tensor[:, top : top + size, left : left + size].contiguous()


def _to_array(image: Image.Image | np.ndarray | Tensor) -> np.ndarray:
    """RGB uint8 [height, width, 3], upright, alpha over white."""
    if isinstance(image, Tensor):
        image = image.permute(1, 2, 0).numpy()
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"an image array is uint8 [height, width, 3]; found {image.dtype} {list(image.shape)}")
        return image
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        high = np.asarray(image).astype(np.int64) >> 8  # 16-bit grey: the high byte
        image = Image.fromarray(high.clip(0, 255).astype(np.uint8))
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))
