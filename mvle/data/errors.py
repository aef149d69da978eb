"""What goes wrong with data, as one family: programs catch DataError and print its message."""


class DataError(ValueError):
    """Data that cannot be used as it is; the message says how to mend it."""
