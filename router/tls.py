"""TLS on both sides: what the gateway shows its clients, and what it asks of the workers."""

import ssl

from router.config import Settings
from router.errors import ConfigError


def server_context(cert: str, key: str, client_ca: str = "") -> ssl.SSLContext:
    """For the listener; with ``client_ca``, clients have to show a certificate of one of its CAs.

    Raises:
        ConfigError: a file cannot be used.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    _load_pair(context, cert, key, "tls_cert and tls_key")
    if client_ca:
        _load_authorities(context, client_ca, "tls_client_ca")
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(*, authorities: str = "", cert: str = "", key: str = "", verify: bool = True) -> ssl.SSLContext:
    """For connections to workers. Without ``authorities``, the system's are trusted.

    Raises:
        ConfigError: a file cannot be used.
    """
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if authorities:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts those alone
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        _load_authorities(context, authorities, "worker_ca")
    if cert:
        _load_pair(context, cert, key, "worker_cert and worker_cert_key")
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def check_tls(settings: Settings) -> None:
    """Raises:
    ConfigError: a file that the settings name cannot be used.
    """
    if settings.tls_cert:
        server_context(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    worker_context(settings)


def worker_context(settings: Settings) -> ssl.SSLContext:
    """For connections to workers, as the settings want them. Raises as ``client_context`` does."""
    return client_context(
        authorities=settings.worker_ca,
        cert=settings.worker_cert,
        key=settings.worker_cert_key,
        verify=settings.worker_tls_verify,
    )


def _load_pair(context: ssl.SSLContext, cert: str, key: str, names: str) -> None:
    try:
        # An encrypted key must fail here, not ask a terminal for its password.
        context.load_cert_chain(cert, key, password=lambda: "")
    except (OSError, ssl.SSLError, ValueError) as error:
        raise ConfigError(f"{names} ({cert}, {key}) cannot be used: {error}") from error


def _load_authorities(context: ssl.SSLContext, path: str, name: str) -> None:
    try:
        context.load_verify_locations(cafile=path)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{name} ({path}) cannot be used: {error}") from error
