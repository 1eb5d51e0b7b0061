"""vLLM's way to the connector by its short name (entry point group ``vllm.general_plugins``)."""


def register() -> None:
    """Make ``"kv_connector": "WarmrouteConnector"`` known. vLLM calls this in every process it starts; calling it again
    changes nothing, and nothing of the connector is imported until an engine asks for it."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory  # noqa: PLC0415 - only with vLLM

    if "WarmrouteConnector" not in KVConnectorFactory._registry:  # noqa: SLF001 - there is no public question to ask
        KVConnectorFactory.register_connector("WarmrouteConnector", "worker_connector.connector", "WarmrouteConnector")
