"""Rows that stay in their files: a list of rows to whoever reads it, whatever their number.

Of a row only its place is kept, 40 bytes, and it is read back, parsed and resolved again when it is taken. So the order
of prompts, full shuffles, the exact shares of a mixture and resumes are the same at any size. A stream with a shuffle
buffer (what `datasets` has for data too large for memory, IterableDataset) gives none of these: it shuffles within the
buffer only, cannot know a domain's rows in advance, and replays what it has given to resume. Data that is on the hub
only must therefore be brought here first (Dataset.save_to_disk, or the files).
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import overload

import numpy as np

from .errors import Problems, RowError
from .schema import ImageSource, Row, parse_row
from .streaming import RowFile


class StoredRows(Sequence[Row]):
    """Rows in files that `dataset.load_rows` has checked. A row is a new object each time that it is taken.

    Raises:
        RowError: on taking a row whose file was changed or removed since it was checked.
    """

    def __init__(self, files: Sequence[RowFile], places: np.ndarray, names: list[str]) -> None:
        """
        Args:
            files: that the rows lie in.
            places: (rows, 5) int64: index in `files`, the two numbers of `RowFile.read`, number for messages, domain as
                index in `names`.
            names: the domains.
        """
        self._files, self._places, self._names = files, places, names

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> "StoredRows": ...
    def __getitem__(self, index: int | slice) -> "Row | StoredRows":
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        owner, first, second, number, _ = self._places[index].tolist()
        file = self._files[owner]
        where = f"{file.path}:{number}"
        return with_paths(parse_row(file.read(first, second), where), file.folder, where)

    @property
    def domains(self) -> list[str]:
        """The domain of each row, without reading it."""
        return [self._names[code] for code in self._places[:, 4].tolist()]

    def where(self, index: int) -> str:
        """FILE:LINE of a row, as messages name it."""
        return f"{self._files[int(self._places[index, 0])].path}:{self._places[index, 3]}"

    def select(self, indices: Sequence[int] | np.ndarray) -> "StoredRows":
        """The rows at `indices`, in that order; nothing is read."""
        return StoredRows(self._files, self._places[np.asarray(indices, dtype=np.int64)], self._names)


def select(rows: Sequence[Row], indices: Sequence[int]) -> Sequence[Row]:
    """The rows at `indices`, in that order; of stored rows without reading them."""
    return rows.select(indices) if isinstance(rows, StoredRows) else [rows[i] for i in indices]


def domains(rows: Sequence[Row]) -> list[str]:
    """The domain of each row; of stored rows without reading them."""
    return rows.domains if isinstance(rows, StoredRows) else [row.domain for row in rows]


def with_paths(row: Row, folder: str, where: str) -> Row:
    """The row with absolute image paths, relative ones taken from `folder`.

    Raises:
        RowError: a path, as written, leads out of `folder`; a symbolic link inside it is followed.
    """
    if not row.images:
        return row

    def absolute(image: ImageSource, field: str) -> ImageSource:
        if not isinstance(image, str):
            return image
        path = os.path.normpath(os.path.join(folder, image))
        if not path.startswith(os.path.join(folder, "")):
            raise RowError(where, field, f"{image} leads out of the data folder {folder}",
                           "move the image into it and give its path relative to the row file")
        return path

    problems = Problems()
    images = tuple(problems.take(absolute, image, f"images[{i}]") for i, image in enumerate(row.images))
    problems.settle()
    return replace(row, images=images)
