"""The protocol between a reader or writer, the source and the index. It knows no kind of cache store."""
