"""The history of the canvas: every change with its time and author, kept in SQLite.

``python -m pixel.history serve`` follows the event stream and answers questions over HTTP; the other
commands read the same file (``python -m pixel.history --help``).
"""
