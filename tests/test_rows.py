"""Row stores: any row by its number, in any order."""

import pickle

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskspec.data.rows import RowStore
from taskspec.errors import ArtifactError


def table(start, count):
    rows = range(start, start + count)
    return pa.table(
        {
            "row": pa.array(rows, pa.int64()),
            "text": pa.array([f"text {row}" for row in rows], pa.string()),
            "pages": pa.array([[[str(row)], []] for row in rows], pa.list_(pa.list_(pa.string()))),
        }
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.arrow"
    assert RowStore.write(path, [table(0, 5), table(5, 0), table(5, 9)], rows_per_batch=4) == 14
    return RowStore(path)


def test_rows_come_in_the_order_asked_and_as_often(rows):
    assert len(rows) == 14
    assert rows.take([13, 0, 7, 13], ["text", "pages"]) == {
        "text": ["text 13", "text 0", "text 7", "text 13"],
        "pages": [[["13"], []], [["0"], []], [["7"], []], [["13"], []]],
    }
    assert rows.take(np.array([3, 4]), ["row"]) == {"row": [3, 4]}
    assert rows.take([], ["row"]) == {"row": []}


def test_a_whole_column_is_one_array(rows):
    assert rows.column("row").tolist() == list(range(14))
    assert rows.schema.names == ["row", "text", "pages"]


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6), rows_per_batch=st.integers(1, 5))
def test_how_rows_are_written_does_not_matter(tmp_path_factory, lengths, rows_per_batch):
    path = tmp_path_factory.mktemp("rows") / "rows.arrow"
    starts = np.cumsum([0, *lengths])
    written = RowStore.write(
        path, (table(start, count) for start, count in zip(starts, lengths, strict=False)), rows_per_batch
    )
    rows = RowStore(path)
    assert written == len(rows) == sum(lengths)
    assert rows.column("row").tolist() == list(range(sum(lengths)))
    assert rows.take(range(len(rows)), ["row"])["row"] == list(range(sum(lengths)))


def test_a_row_store_travels_as_its_path(rows):
    assert pickle.loads(pickle.dumps(rows)).take([2], ["text"]) == {"text": ["text 2"]}


@pytest.mark.parametrize("row", [14, -1])
def test_a_row_that_is_not_there_is_refused(rows, row):
    with pytest.raises(IndexError, match=rf"has rows 0 to 13 but was asked for {row}"):
        rows.take([row], ["row"])


def test_a_column_that_is_not_there_is_refused(rows):
    with pytest.raises(KeyError, match="title"):
        rows.take([0], ["title"])


def test_a_broken_file_is_named(tmp_path):
    path = tmp_path / "rows.arrow"
    path.write_bytes(b"no arrow file")
    with pytest.raises(ArtifactError, match=r"rows\.arrow: cannot be read as rows .* remove it, it is made again"):
        RowStore(path)
