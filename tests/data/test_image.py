"""Decoding within limits, and tiles compared with the reference."""

import io
import pickle
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from pangea_jax.anyres import layout
from pangea_jax.data.image import ImageError, check, decode, header_size, resize_and_pad, views

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def test_decode_takes_bytes_paths_and_pictures(tmp_path, picture):
    original = picture(31, 17)
    (tmp_path / "a.png").write_bytes(encoded(original))
    for source in (encoded(original), tmp_path / "a.png", str(tmp_path / "a.png"), original):
        found = decode(source)
        assert found.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(found), np.asarray(original))


def test_transparency_is_dropped_as_in_the_reference_or_flattened_on_request():
    rgba = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    assert decode(encoded(rgba)).getpixel((0, 0)) == (200, 0, 0)
    assert decode(encoded(rgba), background=(255, 255, 255)).getpixel((0, 0)) == (255, 255, 255)
    half = Image.new("RGBA", (4, 4), (200, 0, 0, 128))
    red, green, blue = decode(encoded(half), background=(255, 255, 255)).getpixel((0, 0))
    np.testing.assert_allclose((red, green, blue), (227, 127, 127), atol=1)


def test_palette_with_transparency_keeps_the_colours_of_the_reference():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    data = encoded(palette, transparency=bytes([0, 255]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [decode(data).getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (40, 50, 60)]
        flat = decode(data, background=(255, 255, 255))
    assert [flat.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (40, 50, 60)]


def test_sixteen_bit_grey_keeps_its_high_byte():
    levels = np.array([[0, 0x0100, 0x7FFF, 0xFFFF]], np.uint16)
    found = decode(encoded(Image.fromarray(levels)))
    assert np.asarray(found)[0].tolist() == [[0] * 3, [1] * 3, [127] * 3, [255] * 3]


def test_cmyk_first_frame_and_exif():
    cmyk = decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    red, green, blue = cmyk.getpixel((4, 4))
    np.testing.assert_allclose((red, green, blue), (255, 0, 0), atol=15)
    frames = [Image.new("RGB", (3, 3), colour) for colour in ("blue", "red")]
    animated = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(animated).getpixel((1, 1)) == (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    assert decode(encoded(Image.new("RGB", (6, 4)), "JPEG", exif=exif)).size == (6, 4)


def png_header(width: int, height: int) -> bytes:
    """The header of a PNG of this size, without pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(chunk))
    header = struct.pack(">I", len(chunk) - 4) + chunk + checksum
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 9) + b"IDAT"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_500, 60_000])
def test_too_many_pixels_are_refused_from_the_header(side):
    with pytest.raises(ImageError, match=r"picture 'bomb\.png': .*over the limit") as caught:
        decode(png_header(side, side), name="bomb.png")
    assert caught.value.name == "bomb.png"


def test_own_limit_of_pixels(picture):
    with pytest.raises(ImageError, match="31 x 17 is over the limit of 500 pixels"):
        decode(picture(31, 17), max_pixels=500)


def test_broken_data_is_named(tmp_path, picture):
    whole = encoded(picture(64, 64))
    for name, data in {
        "empty.png": b"",
        "text.png": b"not a picture",
        "cut.png": whole[: len(whole) // 2],
        "header.png": whole[:20],
        "cut.jpg": encoded(picture(64, 64), "JPEG")[:300],
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ImageError, match=f"{name}'.*: cannot be decoded"):
            decode(tmp_path / name)


@pytest.mark.parametrize(
    ("format", "mode", "size"),
    [
        ("JPEG", "RGB", (641, 33)),
        ("JPEG", "RGB", (1, 4096)),
        ("JPEG", "CMYK", (9, 8)),
        ("JPEG", "L", (7, 5)),
        ("PNG", "I;16", (30, 20)),
        ("PNG", "P", (30, 20)),
        ("GIF", "P", (30, 20)),
        ("WEBP", "RGBA", (30, 20)),
        ("BMP", "1", (30, 20)),
    ],
)
def test_check_gives_the_size_of_what_can_be_decoded(format, mode, size):
    data = encoded(Image.new(mode, size), format)
    assert check(data) == size == decode(data).size


def test_check_does_not_turn_pictures_by_their_exif():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert check(encoded(Image.new("RGB", (60, 40)), "JPEG", exif=exif)) == (60, 40)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (lambda picture: encoded(picture, "JPEG")[:-500], "picture is damaged"),
        (lambda picture: encoded(picture)[:-500], "picture is damaged"),
        (lambda picture: encoded(picture, "WEBP")[:-500], "picture is damaged"),
        (lambda picture: b"<html>not found</html>", "picture of no known format"),
        (lambda picture: b"", "picture of no known format"),
        (lambda picture: png_header(60_000, 60_000), "picture is too large"),
        (lambda picture: encoded(picture.convert("F"), "TIFF"), "picture of 32-bit grey"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_check_refuses_the_same_files_as_decode(picture, data, fault):
    data = data(picture(300, 200))
    for read in (check, decode):
        with pytest.raises(ImageError, match=r"'x\.jpg'") as caught:
            read(data, name="x.jpg")
        assert caught.value.fault == fault
        assert pickle.loads(pickle.dumps(caught.value)).fault == fault


def turned(orientation, format="JPEG", size=(40, 20)):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    return encoded(Image.fromarray(pixels), format, exif=exif)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_is_what_transformers_sees(tmp_path, orientation, format):
    load_image = pytest.importorskip("transformers.image_utils").load_image
    path = tmp_path / "phone"
    path.write_bytes(turned(orientation, format))
    found = decode(path, orientation="upright")
    np.testing.assert_array_equal(np.asarray(found), np.asarray(load_image(str(path))))
    assert check(path, orientation="upright") == found.size == ((40, 20), (20, 40))[orientation > 4]
    assert header_size(path, orientation="upright") == found.size
    # Pillow itself turns a TIFF; the reference sees it so, too.
    stored = found.size if format == "TIFF" else (40, 20)
    assert check(path) == decode(path).size == header_size(path) == stored


@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning", "ignore:Truncated:UserWarning")
@pytest.mark.parametrize("damage", [b"????", b"MM\0*\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff"])
def test_damaged_exif_data_are_read_in_one_way(damage):
    data = turned(6)
    begin = data.index(b"Exif\0\0") + 6
    data = data[:begin] + damage + data[begin + len(damage) :]
    sizes = [read(data, orientation="upright") for read in (check, header_size)]
    assert [decode(data, orientation="upright").size] * 2 == sizes
    assert decode(data).size == (40, 20)


def test_postscript_and_float_pictures_are_refused():
    with pytest.raises(ImageError, match="cannot be decoded"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(ImageError, match="32-bit grey"):
        decode(encoded(Image.new("F", (4, 4)), "TIFF"), name="depth")


def test_missing_file_says_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        decode(tmp_path / "nowhere.png")


def test_tiles_are_the_padded_canvas_row_by_row(picture):
    image = picture(640, 480)
    tiles = views(image, PINPOINTS, 336)
    canvas = np.asarray(resize_and_pad(image, (672, 672)))
    assert (tiles.shape, tiles.dtype) == ((5, 336, 336, 3), np.uint8)
    for n, (y, x) in enumerate([(0, 0), (0, 336), (336, 0), (336, 336)]):
        np.testing.assert_array_equal(tiles[1 + n], canvas[y : y + 336, x : x + 336])
    # 640 x 480 becomes 672 x 504, 84 black rows above and below.
    picture_rows = [84 <= y < 588 for y in range(672)]
    np.testing.assert_array_equal(canvas.any(axis=(1, 2)), picture_rows)


def test_base_view_is_stretched_and_alone_without_pinpoints():
    image = Image.new("RGB", (200, 50), "white")
    assert (views(image, (), 28) == 255).all()
    assert views(image, (), 28).shape == (1, 28, 28, 3)


@pytest.mark.parametrize("size", [(1, 1), (5000, 3), (3, 5000), (336, 336)])
def test_extreme_sizes_have_as_many_tiles_as_their_layout(picture, size):
    tiles = views(picture(*size), PINPOINTS, 336)
    assert len(tiles) == layout(size, PINPOINTS, 336, 24).num_tiles


def test_views_wants_rgb():
    with pytest.raises(ValueError, match="not mode L"):
        views(Image.new("L", (5, 5)), (), 28)


@pytest.mark.parametrize("size", [(640, 480), (333, 500), (1000, 300), (224, 100), (1722, 656)])
def test_tiles_equal_the_processor_of_transformers(picture, size):
    pytest.importorskip("transformers", reason="transformers is in requirements-dev.txt")
    processors = pytest.importorskip(
        "transformers.models.llava_next.image_processing_pil_llava_next",
        reason="this transformers has no Pillow processor for LLaVA-NeXT",
    )
    processor = processors.LlavaNextImageProcessorPil(
        image_grid_pinpoints=[[height, width] for width, height in PINPOINTS],
        do_normalize=False,
        size={"shortest_edge": 336},
        crop_size={"height": 336, "width": 336},
    )
    image = picture(*size)
    expected = processor(images=image, return_tensors="np")["pixel_values"][0]
    found = views(image, PINPOINTS, 336).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(np.rint(expected * 255).astype(np.uint8), found)
