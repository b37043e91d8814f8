"""What a test says of the volume of its cache directories."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from zcache import OptionTypeError, OptionValueError
from zcache.testing import set_block_size


@pytest.mark.parametrize("size", [0, -5, 2**32 + 1, "x", True, 1.0, np.int64(1)])
def test_block_size_without_a_meaning_is_named_and_changes_nothing(size: Any) -> None:
    kind = OptionValueError if type(size) is int else OptionTypeError
    with pytest.raises(kind) as error:
        set_block_size(size)
    assert f"invalid size: {size!r}. Give a whole number of bytes from 1" in str(error.value)
    assert set_block_size(1) == 1


def test_block_size_that_was_in_force_is_returned() -> None:
    for size, before in [(4096, 1), (2**32, 4096), (None, 2**32), (1, None)]:
        assert set_block_size(size) == before
