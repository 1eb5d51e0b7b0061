"""What can go wrong in the connector.

ConnectorError
├── ConfigurationError   a setting is unknown, impossible, or contradicts another; the text names key, value and cure
├── UnsupportedCache     the engine's KV cache cannot be stored exactly; the connector turns itself off
├── ReportUnavailable    the report port cannot be opened
├── StatsUnavailable     no engine's figures could be read
├── ImpossibleOperation  a control request names what is not there, or what cannot be
├── MissingOutput        a rank does not have an encoder output that it is to load; never, unless the ledger is wrong
├── StoreUnavailable     a store of a lower tier does not serve for now; cause is one word, fit for a metric's label
└── BadObject            a chunk object failed a check and must not be used; check names it
"""


class ConnectorError(Exception):
    """The text names the cause and the cure."""


class ConfigurationError(ConnectorError, ValueError):
    pass


class UnsupportedCache(ConnectorError):
    pass


class ReportUnavailable(ConnectorError):
    pass


class StatsUnavailable(ConnectorError):
    pass


class ImpossibleOperation(ConnectorError, ValueError):
    pass


class MissingOutput(ConnectorError):
    pass


class StoreUnavailable(ConnectorError):
    """``store`` is the store's name and ``cause`` one word of a small set (timeout, unreachable, auth, ...)."""

    def __init__(self, store: str, cause: str, text: str) -> None:
        super().__init__(f"{store}: {text}")
        self.store = store
        self.cause = cause


class NativeError(ConnectorError):
    pass


class NativeUnavailable(NativeError):
    pass


class NativeRefusal(NativeError, ValueError):
    pass


class Incompressible(NativeError):
    pass


class Corrupt(NativeError):
    """Encoded bytes that no encoder writes."""


class BadObject(ConnectorError):
    """``check`` names what failed, one word of a small set fit for a metric's label (``chunk_object.Check``)."""

    def __init__(self, check: str, text: str) -> None:
        super().__init__(f"{check}: {text}")
        self.check = check
