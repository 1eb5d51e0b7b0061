"""What can go wrong on a report connection.

ProtocolError
├── FrameTooLarge        a length prefix above the reader's limit
├── MalformedFrame       bytes that are no message, or a message in the wrong place
├── IncompatibleVersion  the other side speaks another major version
└── Refused              the other side turned the connection or a call down (wrong token, unknown operation)
"""


class ProtocolError(Exception):
    """The connection cannot go on; the text names the cause and the cure."""


class FrameTooLarge(ProtocolError):
    pass


class MalformedFrame(ProtocolError):
    pass


class IncompatibleVersion(ProtocolError):
    pass


class Refused(ProtocolError):
    pass
