"""vLLM's way to the connector by its short name (entry point group ``vllm.general_plugins``)."""


def register() -> None:
    """Make ``"kv_connector": "WarmrouteConnector"`` and ``"ec_connector": "WarmrouteECConnector"`` known. vLLM calls this in
    every process it starts; calling it again changes nothing, and nothing of the connectors is imported until an engine
    asks for one."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory  # noqa: PLC0415 - only with vLLM

    if "WarmrouteConnector" not in KVConnectorFactory._registry:  # noqa: SLF001 - there is no public question to ask
        KVConnectorFactory.register_connector("WarmrouteConnector", "worker_connector.connector", "WarmrouteConnector")
    _register_vision_cache()


def _register_vision_cache() -> None:
    try:
        from vllm.distributed.ec_transfer.ec_connector.factory import ECConnectorFactory  # noqa: PLC0415 - only with vLLM
    except ImportError:
        return  # a version without encoder caches that connectors fill
    if "WarmrouteECConnector" not in ECConnectorFactory._registry:  # noqa: SLF001 - there is no public question to ask
        ECConnectorFactory.register_connector(
            "WarmrouteECConnector", "worker_connector.vision_cache", "WarmrouteECConnector"
        )
