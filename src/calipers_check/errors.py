"""Why nothing was accepted."""


class Refused(Exception):
    """The certificate is malformed, belongs to something else, or does not prove the property."""


class Unusable(Exception):
    """The network or the property cannot be read, so that there is nothing to check a certificate against."""
