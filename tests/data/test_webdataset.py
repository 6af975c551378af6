import pickle
import tarfile

import pytest
from fsspec.implementations.local import LocalFileSystem
from tar_files import image, samples, write_tar

from bitdance_jax.data.captioned_config import CaptionedDataConfig, open_source
from bitdance_jax.data.patterns import expand
from bitdance_jax.data.webdataset import WebDatasetSource
from bitdance_jax.errors import ConfigError, FileError, UserError
from bitdance_jax.io.image_files import DamagedImage


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def shards(tmp_path):
    for number in range(3):
        write_tar(tmp_path / f"s-{number:02d}.tar", samples(4, 4 * number))
    return f"{tmp_path}/s-{{00..02}}.tar"


def test_text_captions(shards, cache):
    source = WebDatasetSource(shards)
    assert len(source) == 12
    for index in (0, 5, 11):
        assert source[index].captions == source.captions_of(index) == (f"image {index}",)
        assert source[index].image[3, 4].tolist() == [index] * 3
    assert str(source.skipped) == ""
    assert pickle.loads(pickle.dumps(source))[7].captions == ("image 7",)
    assert len(list(cache.rglob("*.npz"))) == 3


def test_json_captions_and_splits(shards):
    source = WebDatasetSource(shards, "alt", "split")
    assert source[6].captions == source.captions_of(6) == ("alt 6", "other 6")
    assert source.splits == ["train", "train", "train", "test"] * 3
    with pytest.raises(ConfigError, match=r"has no field 'title'; it has: alt, split "):
        WebDatasetSource(shards, "title")
    with pytest.raises(ConfigError, match=r"has no field 'part'; it has: alt, split "):
        WebDatasetSource(shards, None, "part")


def test_the_index_follows_the_file(shards, tmp_path):
    WebDatasetSource(shards)
    write_tar(tmp_path / "s-01.tar", samples(6, 50))
    source = WebDatasetSource(shards)
    assert len(source) == 14
    assert source[4].captions == ("image 50",)


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_keys_and_extensions(tmp_path, kind):
    long = "./deep/" + "x" * 120 + "/ä"
    members = [
        (f"{long}.seg.png", 1),
        (f"{long}.PNG", 2),
        (f"{long}.txt", "a long name"),
        ("a.b.jpg", image(9, "JPEG")),
        ("a.txt", "an image of another extension"),
        ("c.webp", image(3, "WEBP")),
        ("c.jpg", image(4, "JPEG")),
        ("c.txt", "two images"),
        ("._c.jpg", "hidden"),
        ("d.png", 5),
        ("e.txt", "no image"),
        ("f.png", 6),
        ("f.txt", ""),
        ("noextension", "x"),
    ]
    write_tar(tmp_path / "a.tar", members, format=kind)
    source = open_source(str(tmp_path / "a.tar"))
    assert [source[i].captions[0] for i in range(len(source))] == ["a long name", "two images"]
    assert source[0].image[0, 0, 0] == 2
    assert source[1].image[0, 0, 0] == 4
    assert source.skipped.counts == {"captions without an image": 2, "images without a caption": 2}


def test_damaged_members_are_skipped_and_named(tmp_path):
    members = [*samples(3), ("bad.png", b"no image"), ("bad.txt", "bad"), *samples(20, 10)]
    members[4] = ("00001.txt", b"\xff\xfe")
    write_tar(tmp_path / "a.tar", members)
    data = CaptionedDataConfig(
        paths=(str(tmp_path / "a.tar"),),
        held_out=(str(tmp_path / "a.tar"),),
        resolutions=(32,),
        resolution_weights=(),
    )
    train, held_out = data.open_splits()
    mixture = data.samples(train, seed=0, size_multiple=16)
    drawn = [mixture.draw(n) for n in range(24)]
    skipped = sorted(message for sample in drawn for message in sample.skipped)
    assert len(skipped) == 2
    assert "a.tar/00001.png's .txt is UTF-16 text" in skipped[0]
    assert "cannot read the image" in skipped[1] and "a.tar/bad.png" in skipped[1]
    with pytest.raises(DamagedImage, match=r"bad\.png"):
        held_out[0][3]
    write_tar(
        tmp_path / "b.tar", [("0.png", 1), ("0.json", "{"), ("1.png", 2), ("1.json", {"a": "b"})]
    )
    source = WebDatasetSource(f"{tmp_path}/b.tar", "a")
    assert source[1].captions == ("b",)
    with pytest.raises(DamagedImage, match=r"0\.png's \.json"):
        source[0]


def test_two_hosts_see_what_one_sees(shards):
    def mixture(seed=5):
        data = CaptionedDataConfig(
            paths=(shards,), held_out_field="split", resolutions=(32, 64), resolution_weights=()
        )
        return data.samples(data.open_splits()[0], seed=seed, size_multiple=16)

    def key(sample):
        return sample.caption, sample.resolution, sample.record.image.tobytes()

    one = mixture()
    alone = [key(one.draw(n)) for n in range(24)]
    hosts = [mixture(), mixture()]
    together = [key(hosts[n % 2].draw(n)) for n in range(24)]
    assert together == alone
    resumed = mixture()
    assert [key(resumed.draw(n)) for n in range(13, 24)] == alone[13:]
    assert [key(mixture(6).draw(n)) for n in range(24)] != alone


def test_unreadable_shards(shards, tmp_path):
    whole = (tmp_path / "s-01.tar").read_bytes()
    (tmp_path / "s-01.tar").write_bytes(whole[:5000])
    with pytest.raises(FileError, match=r"s-01.tar is truncated: it ends after 5,120 bytes"):
        WebDatasetSource(shards)
    (tmp_path / "s-01.tar").write_bytes(b"no tar at all" * 1000)
    with pytest.raises(FileError, match=r"s-01.tar is no tar or is damaged 0 bytes from its start"):
        WebDatasetSource(shards)
    (tmp_path / "s-01.tar").unlink()
    with pytest.raises(FileError, match=r"there is no file .*s-01.tar"):
        WebDatasetSource(shards)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", 1), ("a.json", {"text": "A", "url": "u"})], "its .json instead, .*: text, url"),
        ([("a.png", 1), ("b.png", 2)], r"has no captioned images: .* images without a caption: 2 "),
        ([("a.txt", "A")], r"has no captioned images: .* captions without an image: 1 \(.*a.txt\)"),
        ([], "has no captioned images"),
    ],
)
def test_no_captioned_images(tmp_path, members, message):
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=message):
        WebDatasetSource(str(tmp_path / "a.tar"))


def test_patterns(tmp_path):
    for name in ("x-8.tar", "x-9.tar", "x-10.tar", "y.tar"):
        (tmp_path / name).touch()

    def names(pattern):
        return [
            path.removeprefix(f"{tmp_path}/") for path in expand(f"{tmp_path}/{pattern}", ".tar")
        ]

    assert names("x-{8..10}.tar") == ["x-8.tar", "x-9.tar", "x-10.tar"]
    assert names("x-{08..10}.tar") == ["x-08.tar", "x-09.tar", "x-10.tar"]
    assert names("{y,x-{8..9}}.tar") == ["y.tar", "x-8.tar", "x-9.tar"]
    assert names("x-*.tar") == ["x-10.tar", "x-8.tar", "x-9.tar"]
    assert len(names("")) == 4
    with pytest.raises(FileError, match="no file matches"):
        names("z*.tar")
    with pytest.raises(FileError, match="stands for more than 1,000,000 files"):
        names("{0..99999999}.tar")


class Bucket(LocalFileSystem):
    """gs:// in a local folder."""

    root = ""
    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
        return cls.root + str(path).removeprefix("gs://").removeprefix(cls.root)

    def glob(self, path):
        return [name.removeprefix(self.root) for name in super().glob(path)]


def test_google_storage(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(Bucket, "root", f"{tmp_path}/")
    monkeypatch.setattr("etils.epath.backend.fsspec_backend._get_filesystem", lambda name: Bucket())
    for pattern in ("gs://s-{00..02}.tar", "gs://bucket/s-*.tar"):
        (tmp_path / "bucket").mkdir(exist_ok=True)
        source = WebDatasetSource(pattern, "alt")
        assert len(source) == 12
        assert source[10].captions == ("alt 10", "other 10")
        assert source[10].image[0, 0, 0] == 10
        for path in tmp_path.glob("*.tar"):
            path.rename(tmp_path / "bucket" / path.name)
