"""Where workers come from: named in settings, added by operators, registered by themselves, found by DNS
or by the Kubernetes API."""
