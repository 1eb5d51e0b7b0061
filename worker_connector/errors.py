"""What can go wrong in the connector.

ConnectorError
├── ConfigurationError   a setting is unknown, impossible, or contradicts another; the text names key, value and cure
├── ReportUnavailable    the report port cannot be opened
└── StatsUnavailable     no engine's figures could be read
"""


class ConnectorError(Exception):
    """The text names the cause and the cure."""


class ConfigurationError(ConnectorError, ValueError):
    pass


class ReportUnavailable(ConnectorError):
    pass


class StatsUnavailable(ConnectorError):
    pass
