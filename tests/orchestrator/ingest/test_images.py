"""Decoding of one file, against Pillow and torchvision; reasons for quarantine."""

from __future__ import annotations

import resource

import numpy as np
import pytest
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from orchestrator.ingest.images import INTERPOLATIONS, BadImageError, decode, square
from tests.orchestrator.ingest.pictures import encoded, picture, png_claiming


def reason(data: bytes) -> str:
    with pytest.raises(BadImageError) as error:
        decode(data, 16, "bilinear")
    return str(error.value)


class TestPlainPictures:
    @pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"])
    @pytest.mark.parametrize("size", [(40, 30), (30, 41), (25, 25), (17, 90)])
    def test_resized_and_cropped_as_torchvision_does(self, size: tuple[int, int], interpolation: str) -> None:
        image = picture(1, *size)
        reference = transforms.Compose(
            [transforms.Resize(24, InterpolationMode(interpolation), antialias=True), transforms.CenterCrop(24)]
        )
        decoded = decode(encoded(image), 24, interpolation)
        assert np.array_equal(decoded.pixels, np.asarray(reference(image)))
        assert (decoded.width, decoded.height, decoded.format, decoded.notes) == (*size, "PNG", ())

    @pytest.mark.parametrize(("side", "crop"), [(33, 32), (34, 32), (35, 32), (36, 32), (235, 224), (40, 40)])
    def test_cropped_again_it_is_what_one_crop_gives(self, side: int, crop: int) -> None:
        """Two crops in a row round twice: of 47 x 33 pixels the crop of 32 would lie one pixel to the left."""
        for number, long in enumerate(range(side, side + 20)):
            for size in ((long, side), (side, long)):
                image = picture(number, *size)
                stored = square(image, side, "bilinear", crop)
                assert stored.size == (side, side)
                once = transforms.CenterCrop(crop)(image)
                assert np.array_equal(np.asarray(transforms.CenterCrop(crop)(stored)), np.asarray(once)), size

    def test_an_image_of_the_requested_size_is_unchanged(self) -> None:
        image = picture(2, 16, 16)
        assert np.array_equal(decode(encoded(image), 16, "bicubic").pixels, np.asarray(image))

    @pytest.mark.parametrize("kind", ["JPEG", "WEBP", "BMP", "TIFF", "PPM", "GIF"])
    def test_formats_are_recognised_by_content(self, kind: str) -> None:
        decoded = decode(encoded(picture(3, 16, 16), kind), 16, "nearest")
        assert decoded.format == kind
        assert decoded.pixels.shape == (16, 16, 3)

    def test_every_interpolation_has_a_name_of_its_own(self) -> None:
        assert len(set(INTERPOLATIONS.values())) == len(INTERPOLATIONS)


class TestSpecialPictures:
    def test_d4_sixteen_bit_png_is_scaled_not_clipped(self) -> None:
        ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
        decoded = decode(encoded(Image.fromarray(ramp)), 16, "nearest")
        assert decoded.notes == ("sixteen_bit",)
        assert np.array_equal(decoded.pixels[..., 0], np.round(ramp / 257).astype(np.uint8))
        assert len(np.unique(decoded.pixels)) == 256

    def test_d4_sixteen_bit_tiff(self) -> None:
        ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
        assert np.array_equal(
            decode(encoded(Image.fromarray(ramp), "TIFF"), 16, "nearest").pixels[..., 1],
            np.round(ramp / 257).astype(np.uint8),
        )

    def test_pixels_without_a_declared_range_are_refused(self) -> None:
        floats = Image.fromarray(np.zeros((16, 16), np.float32))
        assert reason(encoded(floats, "TIFF")) == (
            "pixels of mode 'F' have no declared range; save them with 8 or 16 bits"
        )

    def test_d5_cmyk_jpeg_is_converted_and_noted(self) -> None:
        image = picture(4, 16, 16).resize((4, 4)).resize((16, 16))
        decoded = decode(encoded(image.convert("CMYK"), "JPEG", quality=100), 16, "nearest")
        assert decoded.notes == ("cmyk",)
        assert np.abs(decoded.pixels.astype(int) - np.asarray(image)).mean() < 4

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
    def test_d6_transparency_is_put_on_white(self, mode: str) -> None:
        image = Image.new("RGBA", (16, 16), (0, 0, 0, 255))
        image.paste((200, 0, 0, 0), (0, 0, 8, 16))
        if mode == "P":
            image = Image.new("P", (16, 16), 1)
            image.putpalette([200, 0, 0, 0, 0, 0])
            image.paste(0, (0, 0, 8, 16))
            data = encoded(image, transparency=0)
        else:
            data = encoded(image.convert(mode))
        decoded = decode(data, 16, "nearest")
        assert decoded.notes == ("transparent",)
        assert (decoded.pixels[:, :8] == 255).all()
        assert (decoded.pixels[:, 8:] == 0).all()

    @pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
    def test_d7_the_first_frame_of_an_animation_is_used(self, kind: str) -> None:
        frames = [Image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 0, 255))]
        options = {"lossless": True} if kind == "WEBP" else {}
        decoded = decode(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options), 16, "nearest")
        assert "animated" in decoded.notes
        assert np.array_equal(decoded.pixels, np.asarray(frames[0]))

    def test_d11_exif_orientation_is_applied(self) -> None:
        image = picture(5, 16, 24)
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was turned: show the picture rotated by 90 degrees clockwise
        decoded = decode(encoded(image, exif=exif.tobytes()), 16, "nearest")
        assert decoded.notes == ("rotated_by_exif",)
        assert (decoded.width, decoded.height) == (24, 16)
        assert np.array_equal(decoded.pixels, np.rot90(np.asarray(image), -1)[:, 4:20])


class TestBadFiles:
    def test_d1_truncated_jpeg(self) -> None:
        data = encoded(picture(6, 200, 200), "JPEG")
        assert reason(data[: len(data) // 2]).startswith("truncated or damaged: image file is truncated")

    def test_d2_zero_bytes(self) -> None:
        assert reason(b"") == "the file is empty"

    @pytest.mark.parametrize(
        ("data", "beginning"),
        [
            (b"<html><body>404</body></html>", 'the text "<html><body>"'),
            (bytes(range(1, 200)), "the bytes 01 02 03 04 05 06 07 08 09 0a 0b 0c"),
        ],
    )
    def test_d3_something_else(self, data: bytes, beginning: str) -> None:
        assert reason(data) == f"not a picture (JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM): it begins with {beginning}"

    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # an error in the workers
    @pytest.mark.parametrize(("width", "height", "megapixels"), [(12_000, 10_000, 120), (11_000, 8_000, 88)])
    def test_d9_more_than_fifty_megapixels_cost_no_memory(self, width: int, height: int, megapixels: int) -> None:
        data = png_claiming(width, height)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert reason(data) == f"{megapixels} megapixels are over the limit of 50"
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB

    def test_d8_a_bomb_of_400_megapixels(self) -> None:
        assert reason(png_claiming(20_000, 20_000)) == "400 megapixels are over the limit of 50"

    def test_d10_eps_is_not_opened(self) -> None:
        assert reason(encoded(picture(7), "EPS")).startswith("not a picture")

    @pytest.mark.parametrize(
        ("size", "text"),
        [
            ((1, 1), "1 x 1 is too small: the shorter side must have 4 pixels"),
            ((1, 3000), "1 x 3000 is too small: the shorter side must have 4 pixels"),
            ((40_000, 10), "40000 x 10 is too thin: the longer side may be 20 times the shorter"),
        ],
    )
    def test_d12_extreme_shapes(self, size: tuple[int, int], text: str) -> None:
        assert reason(encoded(Image.new("RGB", size))) == text

    def test_a_flipped_bit_in_a_png_is_found_by_its_checksum(self) -> None:
        data = bytearray(encoded(picture(8, 64, 64)))
        data[len(data) // 2] ^= 1
        assert reason(bytes(data)).startswith("truncated or damaged:")
