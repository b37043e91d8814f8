"""Sources and places: which source a store is, and where a store keeps its values.

``location`` tells where, `identity` which, `describe` puts it into words, ``copies`` tells what a pickled copy
shares. Nothing here calls ``repr``, ``str`` or ``==`` of a store: a library's may fail, panic, show a secret,
or be the same for different data.
"""
