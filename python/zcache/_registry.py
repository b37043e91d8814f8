"""The engines of this process: by name, so that copies that meet again are one, and after a fork."""

from __future__ import annotations

import os
import threading
import uuid
import weakref
from typing import TYPE_CHECKING

from zcache import _coroutines, _flights, _identity, _offload, _sharing, _threads

if TYPE_CHECKING:
    from zcache._books import Books
    from zcache._engine import Engine

# Guards the making of tokens; never held over anything that waits.
_lock = threading.Lock()
_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
_books: weakref.WeakSet[Books] = weakref.WeakSet()
_by_token: weakref.WeakValueDictionary[str, Engine] = weakref.WeakValueDictionary()


def add(engine: Engine) -> None:
    """Take note of a new engine."""
    _engines.add(engine)


def add_books(books: Books) -> None:
    """Take note of the books of an engine that is being made: to open a directory takes its time."""
    _books.add(books)


def token(engine: Engine) -> str:
    """The name of an engine, which it gets when first asked for it."""
    with _lock:
        if engine.known_as is None:
            engine.known_as = uuid.uuid4().hex
        _by_token[engine.known_as] = engine
        return engine.known_as


def find(token: str) -> Engine | None:
    """The engine of this process with this token."""
    return _by_token.get(token)


def find_or_add(engine: Engine) -> Engine:
    """The engine of this process with the token of this one, which is this one if there is none."""
    with _lock:
        return _by_token.setdefault(engine.known_as or "", engine)


def after_fork() -> None:
    """Make everything usable in a forked child."""
    global _lock
    _lock = threading.Lock()
    _flights.after_fork()
    _threads.after_fork()
    _offload.after_fork()
    _coroutines.after_fork()
    _sharing.after_fork()
    _identity.after_fork()
    for engine in list(_engines):
        engine.after_fork()
    # Those that another thread of the parent was about to open nobody ever has here.
    made = {id(engine.books) for engine in list(_engines)}
    for books in list(_books):
        if id(books) not in made:
            books.let_go()


os.register_at_fork(after_in_child=after_fork)
