"""Reading in threads gives what reading in turn gives, errors too."""

import threading
from contextlib import closing

import pytest

from fastpo.system.read_ahead import read_ahead


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_items_come_in_the_streams_order_and_then_end(threads):
    items = read_ahead(lambda n: n * n, iter(range(20)), threads=threads, ahead=2)
    assert list(items) == [n * n for n in range(20)]
    assert next(items, None) is None


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_is_raised_where_its_item_is_asked_for(threads, error):
    def read(number):
        if number == 2:
            raise error("bad item")
        return number

    items = read_ahead(read, range(6), threads=threads)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(error, match="bad item"):
        next(items)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_an_error_of_the_stream_is_raised_behind_its_items(threads):
    def stream():
        yield 1
        raise OSError("bad stream")

    items = read_ahead(str, stream(), threads=threads)
    assert next(items) == "1"
    with pytest.raises(OSError, match="bad stream"):
        next(items)


def test_threads_end_when_the_reader_leaves():
    before = threading.active_count()
    with closing(read_ahead(str, iter(int, 1), threads=3)) as items:
        assert next(items) == "0"
        assert threading.active_count() == before + 3
    assert threading.active_count() == before
