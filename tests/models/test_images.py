"""Pictures of every make, in and out of order."""

import base64
import io
import struct
import threading
import zlib
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image, ImageSequence

from aki.models import images
from aki.models.images import ImageError, open_image

RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(source) -> np.ndarray:
    image = open_image(source)
    assert image.mode == "RGB"
    return np.asarray(image)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, 2)


COLOURED = Image.fromarray(np.stack([RAMP, RAMP.T, 255 - RAMP], 2))
PNG = saved(COLOURED, "PNG")


class TestSources:
    @pytest.fixture
    def path(self, tmp_path) -> Path:
        path = tmp_path / "a picture.png"
        path.write_bytes(PNG)
        return path

    def test_each_gives_the_same(self, path):
        encoded = base64.b64encode(PNG).decode()
        array = np.asarray(COLOURED)
        opaque = np.concatenate([array, np.full((8, 8, 1), 255, np.uint8)], 2)
        for source in (path, str(path), PNG, f"data:image/png;base64,{encoded}", COLOURED, array, opaque):
            assert (pixels(source) == array).all()

    @pytest.mark.parametrize(
        "array",
        [
            np.zeros((8, 8, 3), np.float32),
            np.zeros((8, 8, 3), np.int64),
            np.zeros((8, 8), np.uint8),
            np.zeros((3, 8, 8), np.uint8),
            np.zeros((8, 0, 3), np.uint8),
            np.zeros((1, 8, 8, 3), np.uint8),
        ],
    )
    def test_arrays_of_other_shapes_and_dtypes(self, array):
        message = rf"an array of shape {array.shape} and dtype {array.dtype} is not a picture".replace("(", r"\(")
        with pytest.raises(ImageError, match=message.replace(")", r"\)")):
            open_image(array)

    @pytest.mark.parametrize("source", [None, 3, [PNG], {"path": "a.png"}])
    def test_other_things(self, source):
        with pytest.raises(ImageError, match=rf"a {type(source).__name__} is not a picture: pass a path"):
            open_image(source)

    def test_nothing_is_done_to_a_picture_that_is_passed(self):
        image = Image.open(io.BytesIO(saved(COLOURED.convert("RGBA"), "PNG")))
        open_image(image)
        assert image.mode == "RGBA"


class TestModes:
    def test_sixteen_bits_are_scaled(self):
        values = np.array([[0, 255, 256, 257, 32768, 65535]], np.uint16)
        wanted = grey(np.array([[0, 1, 1, 1, 128, 255]], np.uint8))
        image = Image.fromarray(values)
        assert image.mode == "I;16"
        assert (pixels(image) == wanted).all()
        for kind in ("PNG", "TIFF"):
            assert (pixels(saved(image, kind)) == wanted).all()
        assert (pixels(image.convert("I")) == wanted).all()
        big_endian = Image.frombytes("I;16B", (6, 1), values.byteswap().tobytes())
        assert (pixels(big_endian) == wanted).all()

    def test_floats_are_from_0_to_1(self):
        values = np.array([[-1, 0, 0.5, 1, 7]], np.float32)
        assert (pixels(Image.fromarray(values)) == grey(np.array([[0, 0, 128, 255, 255]], np.uint8))).all()

    def test_grey_and_bilevel(self):
        assert (pixels(saved(Image.fromarray(RAMP), "PNG")) == grey(RAMP)).all()
        assert (pixels(saved(Image.fromarray(RAMP > 100), "PNG")) == grey((RAMP > 100).astype(np.uint8) * 255)).all()

    def test_cmyk(self):
        ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
        for source in (ink, saved(ink, "JPEG", quality=100), saved(ink, "TIFF")):
            np.testing.assert_allclose(pixels(source), np.broadcast_to([255, 0, 0], (8, 8, 3)), atol=3)

    def test_palettes(self):
        image = Image.fromarray(RAMP // 64).convert("P")
        image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
        wanted = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]])[RAMP // 64]
        assert (pixels(saved(image, "PNG")) == wanted).all()
        assert (pixels(saved(image, "GIF")) == wanted).all()
        wanted[RAMP // 64 == 1] = 255
        assert (pixels(saved(image, "PNG", transparency=1)) == wanted).all()
        assert (pixels(saved(image, "GIF", transparency=1)) == wanted).all()

    def test_what_is_transparent_becomes_white(self):
        alpha = np.array([[0, 128, 255]], np.uint8)
        colour = np.concatenate([np.full((1, 3, 3), [200, 0, 100], np.uint8), alpha[..., None]], 2)
        wanted = np.array([[[255, 255, 255], [227, 127, 177], [200, 0, 100]]])
        for kind in ("PNG", "TIFF"):
            np.testing.assert_allclose(pixels(saved(Image.fromarray(colour), kind)), wanted, atol=1)
        dark = Image.merge("LA", [Image.new("L", (3, 1), 0), Image.fromarray(alpha)])
        np.testing.assert_allclose(pixels(saved(dark, "PNG")), grey(255 - alpha), atol=1)

    @pytest.mark.parametrize("mode", ["RGB", "L"])
    def test_one_colour_that_means_transparent(self, mode):
        image = Image.new(mode, (2, 1), 0)
        image.putpixel((1, 0), 9 if mode == "L" else (9, 9, 9))
        source = saved(image, "PNG", transparency=0 if mode == "L" else (0, 0, 0))
        assert pixels(source).tolist() == [[[255] * 3, [9] * 3]]

    @pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
    def test_the_first_frame_of_an_animation(self, kind):
        frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
        options = {"lossless": True} if kind == "WEBP" else {}
        source = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert (pixels(source) == [255, 0, 0]).all()
        image = Image.open(io.BytesIO(source))
        assert image.n_frames == 3

    @pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
    def test_21_the_frame_that_the_caller_chose(self, kind):
        """Issue 12, entry 21: it stays that frame, and the caller's image stands where it stood."""
        frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
        options = {"lossless": True} if kind == "WEBP" else {}
        image = Image.open(io.BytesIO(saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)))
        opened = [open_image(frame) for frame in ImageSequence.Iterator(image)]
        assert [frame.getpixel((0, 0)) for frame in opened] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
        image.seek(1)
        assert (pixels(image) == [0, 255, 0]).all()
        assert image.tell() == 1

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("kind", ["PNG", "TIFF"])
    def test_exif_rotation_is_applied(self, orientation, kind):
        upright = np.asarray(COLOURED)[:, :5]
        # What a camera stores, for each orientation of the standard, of a scene that stands upright.
        stored = {
            1: upright,
            2: upright[:, ::-1],
            3: upright[::-1, ::-1],
            4: upright[::-1],
            5: upright.transpose(1, 0, 2),
            6: np.rot90(upright, 1),
            7: upright.transpose(1, 0, 2)[::-1, ::-1],
            8: np.rot90(upright, -1),
        }[orientation]
        exif = Image.Exif()
        exif[0x0112] = orientation
        source = saved(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif)
        assert (pixels(source) == upright).all()
        assert (pixels(open_image(source)) == upright).all(), "once, however often it is opened"

    def test_exif_rotation_of_sixteen_bits(self):
        values = RAMP[:, :5].astype(np.uint16) * 257
        exif = Image.Exif()
        exif[0x0112] = 6
        source = saved(Image.fromarray(np.ascontiguousarray(np.rot90(values, 1))), "PNG", exif=exif)
        assert (pixels(source) == grey(RAMP[:, :5])).all()

    @pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
    def test_21_metadata_that_cannot_be_read_is_no_broken_picture(self, kind):
        """Issue 12, entry 21: EXIF that is rubbish, and an orientation that is none."""
        flat = Image.new("RGB", (8, 4), (200, 100, 50))
        sideways = Image.Exif()
        sideways[0x0112] = 99
        options = {"lossless": True} if kind == "WEBP" else {}
        for exif in (b"rubbish" * 9, b"Exif\0\0II*\0" + b"\xff" * 40, b"Exif\0\0", sideways):
            source = saved(flat, kind, exif=exif, **options)
            assert (abs(pixels(source).astype(int) - np.asarray(flat)) < 4).all()
            assert pixels(source).shape == (4, 8, 3)
            assert open_image(Image.open(io.BytesIO(source))).size == (8, 4)

    @pytest.mark.parametrize("place", [33, -12], ids=["before the pixels", "after them"])
    def test_21_png_chunks_that_no_pixel_needs(self, tmp_path, place):
        """Issue 12, entry 21: a viewer passes over what it cannot read of them, and over wrong checksums."""
        large = b"a\0\0" + zlib.compress(bytes(70_000_000))
        extras = [(b"eXIf", b"x"), (b"tEXt", b"\xff"), (b"zTXt", b"a\0\7x"), (b"zTXt", large), (b"iCCP", b"x" * 9)]
        for name, data in [*extras, (b"pHYs", b"x"), (b"sRGB", b""), (b"gAMA", b"x"), (b"own ", b"x")]:
            for extra in (chunk(name, data), chunk(name, data)[:-1] + b"?"):
                source = PNG[:place] + extra + PNG[place:]
                (tmp_path / "a.png").write_bytes(source)
                assert (pixels(source) == np.asarray(COLOURED)).all()
                assert (pixels(tmp_path / "a.png") == np.asarray(COLOURED)).all()

    def test_21_what_is_kept_of_a_png_whose_metadata_is_broken(self):
        """Issue 12, entry 21: its transparency and its orientation."""
        exif = Image.Exif()
        exif[0x0112] = 6
        image = Image.new("RGB", (2, 1), "red")
        image.putpixel((1, 0), (9, 9, 9))
        source = saved(image, "PNG", exif=exif, transparency=(9, 9, 9))
        broken = source[:33] + chunk(b"zTXt", b"a\0\7x") + source[33:]
        assert pixels(broken).tolist() == pixels(source).tolist() == [[[255, 0, 0]], [[255, 255, 255]]]


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds almost nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


class TestRefused:
    """One sentence that names the file."""

    def refused(self, source, *parts: str) -> None:
        with pytest.raises(ImageError) as caught:
            open_image(source)
        message = str(caught.value)
        assert "\n" not in message
        assert len(message) < 400
        for part in parts:
            assert part in message

    @pytest.fixture
    def file(self, tmp_path):
        def write(content: bytes) -> Path:
            (tmp_path / "the picture").write_bytes(content)
            return tmp_path / "the picture"

        return write

    def test_missing(self, tmp_path):
        self.refused(tmp_path / "nowhere.png", "there is no picture at", "nowhere.png")
        self.refused("nowhere.png", "there is no picture at nowhere.png")

    def test_a_folder(self, tmp_path):
        self.refused(tmp_path, str(tmp_path), "is a folder")

    def test_not_a_picture(self, file):
        self.refused(file(b"Once upon a time"), "the picture", "is not a picture")
        self.refused(b"Once upon a time", "the bytes given is not a picture")

    @pytest.mark.parametrize("name", ["a.jpg", "a.eps", "a"])
    def test_22_postscript_starts_no_ghostscript(self, tmp_path, monkeypatch, name):
        """Issue 12, entry 22: formats are those that are named, whatever the file is called."""
        monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("it was started"))
        content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
        (tmp_path / name).write_bytes(content)
        self.refused(tmp_path / name, name, "is not a picture (JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM, JPEG2000)")
        self.refused(content, "is not a picture")
        self.refused(f"data:image/jpeg;base64,{base64.b64encode(content).decode()}", "is not a picture")

    def test_zero_bytes(self, file):
        self.refused(file(b""), "the picture", "is not a picture")

    def test_zero_pixels(self, file):
        self.refused(Image.new("RGB", (0, 8)), "has no pixels (0 x 8)")
        self.refused(file(saved(Image.new("RGB", (8, 8)), "PPM").replace(b"8 8", b"0 8")), "the picture")

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
    def test_truncated(self, file, kind):
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
        content = saved(noise, kind)
        for cut in (len(content) // 2, 60, 20):
            self.refused(file(content[:cut]), "the picture")

    @pytest.mark.parametrize("size", [(10_001, 10_000), (60_000, 60_000)])
    def test_a_decompression_bomb(self, file, size):
        self.refused(file(png_header(*size)), "the picture", "pixels")

    def test_many_pixels_of_a_picture_that_is_already_open(self, monkeypatch):
        monkeypatch.setattr(images, "MAX_PIXELS", 63)
        self.refused(COLOURED, "the Image given has 8 x 8 pixels, more than the 63 that are allowed")
        monkeypatch.setattr(images, "MAX_PIXELS", 64)
        open_image(COLOURED)

    def test_just_under_the_limit_is_no_bomb(self, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)  # Pillow warns from here on, and refuses at twice that
        assert open_image(PNG).size == (8, 8)

    def test_a_picture_whose_file_was_closed(self, file):
        image = Image.open(file(PNG))
        image.close()
        self.refused(image, "the picture")

    @pytest.mark.parametrize("data", ["%%%%", "abc", "ünicode", "", base64.b64encode(b"no picture").decode()])
    def test_a_broken_data_url(self, data):
        self.refused(f"data:image/png;base64,{data}", "the data URL")

    def test_a_string_that_holds_a_file(self):
        self.refused(base64.b64encode(PNG * 100).decode(), "iVBOR")

    @pytest.mark.parametrize("url", ["http://[", "https://", "http://localhost:1/a.png"])
    def test_an_address_that_leads_nowhere(self, url):
        self.refused(url, url)

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "PPM", "WEBP", "TIFF"])
    @pytest.mark.filterwarnings("ignore")
    @given(data=st.data())
    def test_broken_files_raise_nothing_else(self, kind, data):
        content = saved(COLOURED, kind)
        broken = bytearray(content[: data.draw(st.integers(1, len(content)))])
        for _ in range(data.draw(st.integers(0, 4))):
            broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
        with suppress(ImageError):
            assert open_image(bytes(broken)).mode == "RGB"


class TestWeb:
    @pytest.fixture(scope="class")
    def site(self):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                if self.path == "/moved":
                    self.send_response(302)
                    self.send_header("Location", "/a.png")
                    self.end_headers()
                    return
                content = {"/a.png": PNG, "/page": b"<html>"}.get(self.path)
                self.send_response(404 if content is None else 200)
                self.end_headers()
                self.wfile.write(content or b"")

            def log_message(self, *args):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        server.server_close()

    def test_it_is_fetched(self, site):
        for path in ("a.png", "moved"):
            assert (pixels(f"{site}/{path}") == np.asarray(COLOURED)).all()

    def test_what_is_not_there(self, site):
        with pytest.raises(ImageError, match=rf"{site}/b\.png could not be fetched: .*404"):
            open_image(f"{site}/b.png")

    def test_what_is_not_a_picture(self, site):
        with pytest.raises(ImageError, match=rf"{site}/page is not a picture"):
            open_image(f"{site}/page")
