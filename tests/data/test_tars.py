"""Issue 12, entries 16, 17, 20 and 22: what can be read of a shard is read, the rest is counted with its place."""

import io
import random
import re
import tarfile

import numpy as np
import pytest
from streams import picture, write_shard

from aki.data.report import BadSample, DataReport
from aki.data.shards import ShardError, ShardMixture, ShardReader, open_shards

FILES = {"jpg": picture(), "txt": b"good"}
NAMES = [f"{i:03}" for i in range(12)]


def once(*urls):
    """One pass over shards: the keys of what can be used, and what was counted instead."""
    shards = open_shards("kale", list(map(str, urls)))
    reader = ShardReader(shards, 0, 0, 1)
    good, bad = [], []
    for member in reader:
        if reader.place.turn:
            break
        try:
            if isinstance(member, BadSample):
                raise member
            good.append(shards.sample(member).id.split("/", 1)[1])
        except BadSample as error:
            bad.append(f"{error.id}: {error.detail}")
        if len(good) + len(bad) > 200:
            break
    return sorted(good), bad


@pytest.fixture
def whole(tmp_path):
    return tmp_path / "whole.tar", (write_shard(tmp_path / "whole.tar", [(name, FILES) for name in NAMES]))


def headers(path):
    with tarfile.open(path) as tar:
        return {info.name: info.offset for info in tar}


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def test_16_a_flipped_bit_in_a_header_costs_its_sample_alone(whole):
    path, _ = whole
    at = headers(path)
    flip(path, at["005.jpg"] + 20)
    good, bad = once(path)
    assert good == [name for name in NAMES if name != "005"]
    assert any("whole.tar/005" in one for one in bad)
    assert any(f"bytes {at['005.jpg']} to {at['005.txt']} of the tar cannot be read" in one for one in bad)


def test_16_a_file_cut_between_members_or_in_a_header_is_counted(whole):
    path, _ = whole
    at, data = headers(path), path.read_bytes()
    for end in (at["004.jpg"], at["004.jpg"] + 100, at["004.txt"], len(data) - 10240):
        path.write_bytes(data[:end])
        good, bad = once(path)
        assert good == [name for name in NAMES if at[f"{name}.txt"] < end - 512]
        assert any(str(path) in one and "on the tar cannot be read" in one for one in bad)


def test_16_zeros_in_the_middle_are_no_end_mark(whole):
    path, _ = whole
    at, data = headers(path), bytearray(path.read_bytes())
    start, end = at["003.jpg"], at["006.jpg"]
    for more in (0, 600):  # behind the zeros stands a header, or what is left of a picture
        data[start : end + more] = bytes(end + more - start)
        path.write_bytes(data)
        good, bad = once(path)
        assert good == [name for name in NAMES if name not in ("003", "004", "005", "006")[: 3 + bool(more)]]
        assert any(
            f"bytes {start} to {end if not more else at['006.txt']} of the tar cannot be read" in one for one in bad
        )


def test_16_two_tars_one_behind_the_other_are_both_read(whole, tmp_path):
    path, _ = whole
    second = tmp_path / "second.tar"
    write_shard(second, [(f"b{name}", FILES) for name in NAMES])
    both = tmp_path / "both.tar"
    both.write_bytes(path.read_bytes() + second.read_bytes())
    assert once(both) == (sorted([*NAMES, *(f"b{name}" for name in NAMES)]), [])
    again = tmp_path / "again.tar"
    again.write_bytes(path.read_bytes() * 2)
    assert once(again) == (sorted(NAMES * 2), [])


def test_16_links_are_counted_and_folders_named_like_meta_data_are_read(tmp_path):
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w") as tar:

        def add(name, content=b"", **values):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in values.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content))

        add("folder", type=tarfile.DIRTYPE)
        add("a.jpg", picture())
        add("a.txt", b"A")
        add("b.jpg", type=tarfile.LNKTYPE, linkname="a.jpg")
        add("b.txt", b"B")
        add("c.jpg", type=tarfile.SYMTYPE, linkname="a.jpg")
        add("c.txt", b"C")
        add("__x__/d.jpg", picture())
        add("__x__/d.txt", b"D")
        add("._e.jpg", b"what macOS writes")
    good, bad = once(path)
    assert good == ["__x__/d", "a"]
    assert [
        bool(re.match(rf"odd.tar/{key}: its jpg is a link", one)) for key, one in zip("bc", sorted(bad), strict=True)
    ]


@pytest.mark.parametrize("packing", ["w", "w:gz"])
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_16_every_form_of_a_whole_tar_is_read_without_a_complaint(tmp_path, packing, form):
    long = "folder/" * 12 + "x" * (40 if form == tarfile.USTAR_FORMAT else 120)
    path = tmp_path / "some.tar"
    with tarfile.open(path, packing, format=form) as tar:
        for key in ("a", long):
            for extension, content in FILES.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size, info.mtime = len(content), 1.5
                tar.addfile(info, io.BytesIO(content))
    assert once(path) == (sorted(["a", long]), [])


@pytest.mark.parametrize("seed", range(20))
def test_16_what_a_random_fault_takes_is_counted(whole, seed):
    """Each sample that is lost is named by its key, or lies in bytes that are."""
    path, _ = whole
    rng, at, data = random.Random(seed), headers(path), bytearray(path.read_bytes())
    place = rng.randrange(max(at.values()) + 512)
    fault = rng.choice(("bit", "zeros", "cut", "noise"))
    if fault == "bit":
        data[place] ^= 1 << rng.randrange(8)
    elif fault == "cut":
        del data[place:]
    else:
        width = rng.randrange(1, 4096)
        data[place : place + width] = bytes(width) if fault == "zeros" else rng.randbytes(width)
    path.write_bytes(data)
    good, bad = once(path)
    ranges = [found.groups() for one in bad if (found := re.search(r"bytes (\d+) to (\d+)", one))]
    cuts = [int(found[1]) for one in bad if (found := re.search(r"from byte (\d+) on", one))]
    for name in set(NAMES) - set(good):
        start = at[f"{name}.jpg"]
        named = any(f"/{name}: " in one for one in bad)
        inside = any(int(first) <= start + 1536 and start <= int(last) for first, last in ranges)
        assert named or inside or any(cut <= start + 1536 for cut in cuts), (fault, place, name, bad)


def test_17_names_with_dots_are_read_by_the_last_where_the_first_would_merge_them(tmp_path):
    names = [f"photo.{i:06}" for i in range(100)]
    path = write_shard(tmp_path / "dots.tar", [(name, {**FILES, "json": b"{}"}) for name in names])
    assert once(path) == (names, [])


def test_17_further_files_of_a_sample_are_webdatasets(tmp_path):
    files = {"depth.png": b"-", "jpg": picture(), "seg.png": b"-", "TXT": b"good"}
    path = write_shard(tmp_path / "parts.tar", [(f"v1.2/{name}", files) for name in NAMES])
    assert once(path) == ([f"v1.2/{name}" for name in NAMES], [])


def test_17_names_that_mean_two_things_are_said(tmp_path):
    path = write_shard(tmp_path / "both.tar", [("photo", FILES), ("photo.1", FILES), ("photo.2", FILES)])
    good, bad = once(path)
    assert good == ["photo"]
    assert len(bad) == 2
    assert (
        "'photo.1' has a picture and a caption, but by the first dot of its name it belongs to the sample"
        in sorted(bad)[0]
    )


def test_20_a_byte_order_mark_is_no_part_of_a_caption(tmp_path):
    url = write_shard(tmp_path / "mark.tar", [("a", {"jpg": picture(), "txt": b"\xef\xbb\xbfa cat"})])
    samples = ShardMixture([open_shards("kale", [url])], np.ones(1), 0, 1)
    assert samples.take(0, (0, 1), 1, lambda sample: sample.answer, DataReport()) == ["a cat"]


@pytest.mark.parametrize("url", ["pipe:touch {}", "PIPE:touch {}", "none.tar::pipe:touch {}"])
def test_22_a_command_in_a_recipe_is_not_run_without_a_yes(tmp_path, monkeypatch, url):
    monkeypatch.delenv("AKI_ALLOW_PIPES", raising=False)
    with pytest.raises(ShardError, match=r"runs a command in a shell.*AKI_ALLOW_PIPES=1"):
        open_shards("kale", [url.format(tmp_path / "ran")])
    assert not (tmp_path / "ran").exists()
