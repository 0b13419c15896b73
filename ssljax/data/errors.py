"""The one error with which data say that a record cannot be used."""


class BadSample(ValueError):
    """A record that cannot be used; the message says why. The stream counts it, logs it and goes on without it.

    `key` names the record, where it is known.
    """

    def __init__(self, reason: str, key: str | int | None = None):
        super().__init__(reason)
        self.key = key

    def __reduce__(self):  # the default forgets `key` on the way back from a worker process
        return type(self), (str(self), self.key)
