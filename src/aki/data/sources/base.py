"""What every source has in common: annotations parsed once into memory-mapped Arrow, samples made when asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import datasets
from datasets.exceptions import DatasetGenerationError
from torch.utils.data import Dataset

from aki.data.augment import Augment, Box, View
from aki.data.plain import check_texts
from aki.data.report import BadSample, Reason
from aki.data.schema import Sample
from aki.data.sources.files import Columns, ImageRoots, Paths, Row, SourceError, find_files, fingerprint
from aki.models.images import ImageError, open_image


class Source(Dataset, ABC):
    """Samples of one data set.

    `source[i]` is an `aki.data.schema.Sample` whose images are paths; only where `augment` is set are they opened. It
    depends on (seed, name, the sample's id) alone, `sample(i, epoch)` on the epoch too.

    Attributes:
        FILES: the annotation files' released names.
        COLUMNS: the Arrow type of each column that `parse` yields, besides "id".
        VERSION: changes when `entries` or `parse` do, so that what was cached is parsed anew.

    Args:
        annotations: the files in the order of FILES, or the folder that they lie in.
        images: the folder that image names are relative to, or several, which are looked through in order.
        name: what counts and messages call it.
        seed: of everything drawn: the order of options, augmentation.
        augment: changes of the pictures; none if absent.
        cache: where the parsed annotations are kept, the `datasets` library's own cache if absent.

    Raises:
        SourceError: a file or folder is missing, or a file is not in the source's format.
    """

    FILES: ClassVar[tuple[str, ...]] = ()
    COLUMNS: ClassVar[Columns] = {}
    VERSION: ClassVar[int] = 1

    def __init__(
        self,
        annotations: Paths,
        images: Paths | None = None,
        *,
        name: str = "",
        seed: int = 0,
        augment: Augment | None = None,
        cache: str | Path | None = None,
    ):
        self.name, self.seed, self.augment = name or type(self).__name__.lower(), seed, augment
        self.roots = ImageRoots(images)
        self.rows = self.open_rows(annotations, cache)

    def entries(self, *files: Path) -> Iterable[Any]:
        """Read the annotations, an entry after the other; one that cannot be read is a BadSample in its place."""
        raise NotImplementedError

    def parse(self, entry: Any) -> Iterator[Row]:
        """The rows of an entry, "id" and COLUMNS: one a sample, none for what belongs to another split.

        Raises:
            BadSample, or any error of taking an entry apart: it is counted as a sample that cannot be used.
        """
        raise NotImplementedError

    @abstractmethod
    def chat(self, row: Row, rng: Random, view: View | None) -> list[dict[str, Any]]:
        """The messages of a row; an image is its name below the image root.

        Args:
            rng: of everything that is drawn for this sample.
            view: what augmentation does to the picture; `view.box` does it to a box.

        Raises:
            BadSample: the row cannot be used.
        """

    def box(self, row: Row) -> Box | None:
        """The box that a row speaks of."""
        return None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        """
        Raises:
            BadSample: the sample cannot be used; it says why.
        """
        return self.sample(index)

    def sample(self, index: int, epoch: int = 0) -> Sample:
        """The sample as an epoch sees it: options in another order, another augmentation."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.name}")
        name = str(index)
        try:
            row = self.row(index)
            name, key = row["id"], f"{self.seed}/{self.name}/{row['id']}/{epoch}"
            with malformed(name, row):
                view = self.augment.draw(Random(f"{key}/view"), str(row), self.box(row)) if self.augment else None
                messages = [self._with_images(message, view) for message in self.chat(row, Random(key), view)]
            check_texts(messages)
        except BadSample as bad:
            raise BadSample(bad.reason, bad.detail, self.name, bad.id or name) from bad.__cause__
        return Sample(messages, self.name, name, answers=tuple(row.get("answers") or ()))

    def _with_images(self, message: dict[str, Any], view: View | None) -> dict[str, Any]:
        return {**message, "content": [self._with_media(part, view) for part in message["content"]]}

    def _with_media(self, part: dict[str, Any], view: View | None) -> dict[str, Any]:
        kind = part["type"]
        if kind == "image":
            return {"type": kind, kind: self._image(part[kind], view)}
        if kind not in ("video", "audio"):
            return part
        found = part[kind]
        if isinstance(found, list):
            return {"type": kind, kind: [self._image(one, None) for one in found]}
        return {"type": kind, kind: self._image(found, None)}

    def _image(self, image: Any, view: View | None) -> Any:
        """A name as a path inside the image roots (clips lie there too), and the view of it if there is one."""
        if isinstance(image, str) and not image.startswith("data:"):
            image = str(self.roots.find(image))
        if view is None:
            return image
        try:
            return view.picture(open_image(image))
        except ImageError as error:
            raise BadSample(error.reason, str(error)) from error

    def files(self, annotations: Paths) -> list[Path]:
        """The annotation files, all of which the cache depends on."""
        return find_files(annotations, self.FILES)

    def row(self, index: int) -> Row:
        """
        Raises:
            BadSample: it could not be parsed.
        """
        row = self.rows[index]
        if row["reason"]:
            raise BadSample(row["reason"], row["detail"], id=row["id"])
        return row

    def open_rows(self, annotations: Paths, cache: str | Path | None) -> datasets.Dataset:
        """The parsed annotations."""
        files = self.files(annotations)
        columns: Columns = {"id": "string", "reason": "string", "detail": "string", **self.COLUMNS}
        key = fingerprint(files, type(self).__qualname__, self.VERSION, columns)
        try:
            return parse_once(lambda: self._some_good(files), columns, key, cache)
        except (LookupError, TypeError, AttributeError) as error:
            raise self._another_format(files, f"{type(error).__name__} {error}") from error

    def _some_good(self, files: list[Path]) -> Iterator[Row]:
        """The rows.

        Raises:
            SourceError: after them, if none of them can be used.
        """
        good, bad = 0, ""
        for row in self._parsed(files):
            good, bad = good + (row["reason"] is None), bad or row["detail"]
            yield row
        if not good:
            raise self._another_format(files, bad or "no samples for training are in it.")

    def _another_format(self, files: list[Path], why: str) -> SourceError:
        return SourceError(f"{', '.join(map(str, files))}: not in the format of {type(self).__name__}: {why}")

    def _parsed(self, files: list[Path]) -> Iterator[Row]:
        for number, entry in enumerate(self.entries(*files)):
            try:
                if isinstance(entry, BadSample):
                    raise entry
                with malformed(f"entry {number}", entry):
                    for row in self.parse(entry):
                        yield {"reason": None, "detail": None, **checked(row, self.COLUMNS)}
            except BadSample as bad:
                name = bad.id or f"entry {number}"
                yield {"id": name, "reason": bad.reason, "detail": bad.detail, **dict.fromkeys(self.COLUMNS)}


@contextmanager
def malformed(name: str, entry: Any) -> Iterator[None]:
    """What goes wrong in taking an entry apart, as a BadSample of that name."""
    try:
        yield
    except BadSample:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        shown = str(entry)[:200].encode(errors="backslashreplace").decode()
        detail = f"{type(error).__name__} {error} in {shown}"
        raise BadSample(Reason.MALFORMED, detail, id=name) from error


def checked(row: Row, columns: Columns) -> Row:
    """The row, if each column holds what its Arrow type says, or nothing.

    Raises:
        TypeError: it does not.
        UnicodeEncodeError: a text has half of a surrogate pair, as JSON may write it and Arrow may not.
    """
    python: dict[str, Any] = {"string": str, "int64": int, "float64": (int, float)}
    for name, kind in columns.items():
        values = row[name] if isinstance(kind, list) else [row[name]]
        wanted = python[kind[0] if isinstance(kind, list) else kind]
        fits = isinstance(values, list) and all(value is None or isinstance(value, wanted) for value in values)
        if not fits:
            raise TypeError(f"{name} is {row[name]!r} and should be {kind}")
    for value in row.values():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                text.encode()
    return row


def parse_once(
    rows: Callable[[], Iterator[Row]], columns: Columns, key: str, cache: str | Path | None
) -> datasets.Dataset:
    """Rows as memory-mapped Arrow: written when `key` is new (by one process, others wait), found afterwards.

    Raises:
        SourceError: as `rows` raises it.
    """
    features = datasets.Features({name: _feature(kind) for name, kind in columns.items()})
    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        return datasets.Dataset.from_generator(
            rows, features=features, cache_dir=None if cache is None else str(cache), fingerprint=key
        )
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None
    finally:
        if shown:
            datasets.enable_progress_bars()


def _feature(kind: Any) -> Any:
    return datasets.List(datasets.Value(kind[0])) if isinstance(kind, list) else datasets.Value(kind)


def said(text: Any, what: str) -> str:
    """A text without the white space at its ends, which must not be all of it.

    Raises:
        BadSample: it is, or is no text.
    """
    if not isinstance(text, str) or not text.strip():
        raise BadSample(Reason.EMPTY_TEXT, f"the {what} is empty.")
    return text.strip()
