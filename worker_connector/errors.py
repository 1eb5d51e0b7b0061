"""What can go wrong in the connector.

ConnectorError
├── ConfigurationError   a setting is unknown, impossible, or contradicts another; the text names key, value and cure
├── UnsupportedCache     the engine's KV cache cannot be stored exactly; the connector turns itself off
├── ReportUnavailable    the report port cannot be opened
└── StatsUnavailable     no engine's figures could be read
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
